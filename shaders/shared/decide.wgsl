// How the sequences of a pass choose and commit tokens: a record for each, which the host sends along with the pass.
// Beside it a sequence has marks of its own: 16 words of stop tokens, then a bit a token for those that are forbidden,
// and a bit a token for those that stand in its text. Needs bindings `lanes` and `marks`.
struct Lane {
    first: u32,         // its first row among the decided ones, and how many it has
    rows: u32,
    sequence: u32,      // whose state and marks are its own
    hole: u32,          // the token that stands for an open position
    key_low: u32,       // names the random draws
    key_high: u32,
    stops: u32,         // stop tokens
    forbids: u32,       // 1 with forbidden tokens
    temperature: f32,
    top_k: u32,         // 0 without
    top_p: f32,         // 1 without
    penalty: f32,       // 1 without
    order: u32,         // what a row's priority is: one of the four below
    rule: u32,          // which rows are committed: one of the four below
    most: u32,
    bound: f32,
}
const CONFIDENCE: u32 = 0u;   // of the chosen token
const MARGIN: u32 = 1u;       // of the likeliest token over the second
const ENTROPY: u32 = 2u;      // negative
const RANDOM: u32 = 3u;
const BEST: u32 = 0u;         // the `most` best rows
const AT_LEAST: u32 = 1u;     // the best, and all of at least `bound`
const FACTOR: u32 = 2u;       // the best, and the r-th if its confidence is at least 1 - bound / (r + 1)
const UNSURE: u32 = 3u;       // the best, and those behind it while their entropies sum to at most `bound`
const STOPS: u32 = 16u;
const LOWEST: u32 = 0xff7fffffu;
const NOTHING: u32 = 0xffffffffu;

fn is_finite(bits: u32) -> bool {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

// x - largest, halved on the way, so that the difference of two large numbers does not overflow.
fn below(x: f32, largest: f32) -> f32 {
    return 2.0 * max(0.5 * x - 0.5 * largest, -60.0);
}

// What is no finite number becomes the lowest one, so that it spreads no further; `choose` tells of it.
fn number(bits: u32) -> f32 {
    return bitcast<f32>(select(LOWEST, bits, is_finite(bits)));
}

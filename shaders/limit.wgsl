// limit: the lowest logit of an open position that top_k and top_p leave to be drawn, by bisection over the logits'
// bits: 32 sums over the vocabulary for each of the two. Tokens that tie with the last one are left as well.
// logits    [R, C]    places [R]    lanes [L]    marks [sequences, 16 + 2 words]: see choose
// limits    [R], the lowest number where nothing is cut off
// dispatch  one workgroup a row
// shared    WG words
#import reduce
#import decide
#import marks
struct Params { columns: u32, words: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;          // [R, C]
@group(0) @binding(2) var<storage, read> places: array<vec4<u32>>;    // [R]
@group(0) @binding(3) var<storage, read> lanes: array<Lane>;           // [L]
@group(0) @binding(4) var<storage, read> marks: array<u32>;           // [sequences, 16 + 2 words]
@group(0) @binding(5) var<storage, read_write> limits: array<f32>;    // [R]

// Bits in the order of the numbers.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

fn disordered(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u));
}

// Tokens of at least this key, counted or weighed by exp((logit - largest) / T).
fn above(how: Lane, row: u32, key: u32, largest: f32, weighed: bool, lane: u32) -> f32 {
    var sum = 0.0;
    for (var i = lane; i < p.columns; i += WG) {
        let logit = penalised(how, p.words, i, number(logits[row * p.columns + i]));
        if ordered(logit) >= key && is_allowed(how, p.words, i) {
            let less = max(0.5 * logit - 0.5 * largest, -60.0 * how.temperature) / (0.5 * how.temperature);
            sum += select(1.0, exp(less), weighed);
        }
    }
    return reduce_sum(sum, lane);
}

// The highest key above which there is still so much.
fn highest(how: Lane, row: u32, least: f32, floor: u32, largest: f32, weighed: bool, lane: u32) -> u32 {
    var key = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit >>= 1u) {
        if above(how, row, max(key | bit, floor), largest, weighed, lane) >= least {
            key |= bit;
        }
    }
    return max(key, floor);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.x;
    let how = lanes[places[row].z];
    if how.temperature == 0.0 || (how.top_k == 0u && how.top_p >= 1.0) {
        if lane == 0u {
            limits[row] = bitcast<f32>(LOWEST);
        }
        return;
    }
    var largest = bitcast<f32>(LOWEST);
    for (var i = lane; i < p.columns; i += WG) {
        if is_allowed(how, p.words, i) {
            largest = max(largest, penalised(how, p.words, i, number(logits[row * p.columns + i])));
        }
    }
    largest = reduce_max(largest, lane);
    var key = 0u;
    if how.top_k > 0u {
        key = highest(how, row, f32(how.top_k), 0u, largest, false, lane);
    }
    if how.top_p < 1.0 {
        let mass = above(how, row, key, largest, true, lane);
        key = highest(how, row, how.top_p * mass, key, largest, true, lane);
    }
    if lane == 0u {
        limits[row] = disordered(clamp(key, ordered(bitcast<f32>(LOWEST)), ordered(largest)));
    }
}

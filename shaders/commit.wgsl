// commit: the token and confidence of each open row from its segments' offers; the best rows get their tokens
// offers    [R, S, 6], see choose
// stops     [E], the tokens that end the answer
// tokens    [capacity], the token of each position; row r is position + r, open if it holds the token hole
// state     [3]: passes done, 1 until the answer ended, 1 while these rows want another pass
// records   [R, 4]: token, its probability under the raw logits, priority (-1 if not open), 1 committed or 2 no
//           finite logits
// dispatch  one workgroup
// shared    WG f32
#import reduce
#import philox
const LOWEST: u32 = 0xff7fffffu;
const NOTHING: u32 = 0xffffffffu;
const NOT_OPEN: u32 = 0xbf800000u;
const COMMITTED: u32 = 1u;
const BROKEN: u32 = 2u;
// The `quota` best rows are committed; 0 stands for the best one and all of at least the threshold.
struct Params {
    rows: u32, segments: u32, stops: u32, position: u32, hole: u32, quota: u32, random: u32, key_low: u32,
    key_high: u32, threshold: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> offers: array<u32>;                 // [R, S, 6]
@group(0) @binding(2) var<storage, read> stops: array<u32>;                  // [E]
@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;           // [capacity]
@group(0) @binding(4) var<storage, read_write> state: array<u32>;            // [3]
@group(0) @binding(5) var<storage, read_write> records: array<vec4<u32>>;    // [R, 4]

// exp(x - largest), halved against overflow.
fn weight(x: f32, largest: f32) -> f32 {
    return exp(2.0 * max(0.5 * x - 0.5 * largest, -60.0));
}

fn decide(row: u32, passes: u32) -> vec4<u32> {
    let first = row * p.segments * 6u;
    let end = first + p.segments * 6u;
    var largest = bitcast<f32>(LOWEST);
    var flag = 0u;
    for (var at = first; at < end; at += 6u) {
        largest = max(largest, bitcast<f32>(offers[at]));
        flag = max(flag, offers[at + 5u]);
    }
    var sum = 0.0;
    var best = bitcast<f32>(LOWEST);
    var token = NOTHING;
    var logit = bitcast<f32>(LOWEST);
    for (var at = first; at < end; at += 6u) {
        sum += bitcast<f32>(offers[at + 1u]) * weight(bitcast<f32>(offers[at]), largest);
        let value = bitcast<f32>(offers[at + 2u]);
        let id = offers[at + 3u];
        if id != NOTHING && (token == NOTHING || value > best) {
            best = value;
            token = id;
            logit = bitcast<f32>(offers[at + 4u]);
        }
    }
    if flag != 1u || token == NOTHING {
        return vec4<u32>(NOTHING, 0u, 0u, BROKEN);
    }
    let confidence = min(weight(logit, largest) / sum, 1.0);
    var priority = confidence;
    if p.random == 1u {
        let counter = vec4<u32>(0u, p.position + row, passes, 1u);
        let word = philox(counter, vec2<u32>(p.key_low, p.key_high)).x;
        priority = f32(word >> 8u) * (1.0 / 16777216.0);
    }
    return vec4<u32>(token, bitcast<u32>(confidence), bitcast<u32>(priority), 0u);
}

// True if this row is among those that the pass commits; of equals the leftmost comes first.
fn is_chosen(row: u32, own: f32) -> bool {
    var better = 0u;
    var sure = 0u;
    for (var r = 0u; r < p.rows; r += 1u) {
        let other = bitcast<f32>(records[r].z);
        better += u32(other > own || (other == own && r < row));
        sure += u32(other >= max(p.threshold, 0.0));
    }
    return better < select(p.quota, max(sure, 1u), p.quota == 0u);
}

fn is_stop(token: u32) -> bool {
    var found = false;
    for (var i = 0u; i < p.stops; i += 1u) {
        found |= stops[i] == token;
    }
    return found;
}

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    let passes = state[0];
    let going = state[1] == 1u;
    var worst = 0.0;
    for (var r = lane; r < p.rows; r += WG) {
        var record = vec4<u32>(0u, 0u, NOT_OPEN, 0u);
        if going && tokens[p.position + r] == p.hole {
            record = decide(r, passes);
            worst = max(worst, 1.0 + f32(record.w));
        }
        records[r] = record;
    }
    storageBarrier();
    // 0 without open rows, 1 with sound ones, 3 with a broken one.
    worst = reduce_max(worst, lane);
    for (var r = lane; r < p.rows; r += WG) {
        let own = bitcast<f32>(records[r].z);
        if own >= 0.0 && worst == 1.0 && is_chosen(r, own) {
            tokens[p.position + r] = records[r].x;
            records[r].w = COMMITTED;
        }
    }
    storageBarrier();
    // Counted from the last row, so that the first one is the largest.
    var hole = 0.0;
    var stop = 0.0;
    for (var r = lane; r < p.rows; r += WG) {
        let token = tokens[p.position + r];
        let from_end = f32(p.rows - r);
        hole = max(hole, select(0.0, from_end, token == p.hole));
        stop = max(stop, select(0.0, from_end, token != p.hole && is_stop(token)));
    }
    hole = reduce_max(hole, lane);
    stop = reduce_max(stop, lane);
    if lane == 0u && worst > 0.0 {
        let goes_on = worst == 1.0 && stop <= hole;
        state[0] = passes + 1u;
        state[1] = u32(goes_on);
        state[2] = u32(goes_on && hole > 0.0);
    }
}

// choose: what one segment of the vocabulary offers an open position: its best token and its part of the softmax
// logits    [R, C], columns first .. first + C of the vocabulary, as bits
// tokens    [capacity], the token of each position; row r is position + r, open if it holds the token hole
// state     [3]: passes done, 1 until the answer ended, unused here
// offers    [R, S, 6], segments skip .. on: largest logit, sum of exp(logit - largest), best value, its token, its
//           logit, 2 with a NaN or +infinity, else 1 with a finite logit
// dispatch  (segments of 2048 columns, R)
// shared    3 WG words
#import reduce
#import philox
#import gumbel
const SEGMENT: u32 = 2048u;
const LOWEST: u32 = 0xff7fffffu;
const NOTHING: u32 = 0xffffffffu;
struct Params {
    columns: u32, first: u32, segments: u32, skip: u32, position: u32, hole: u32, key_low: u32, key_high: u32,
    temperature: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;          // [R, C]
@group(0) @binding(2) var<storage, read> tokens: array<u32>;          // [capacity]
@group(0) @binding(3) var<storage, read> state: array<u32>;           // [3]
@group(0) @binding(4) var<storage, read_write> offers: array<u32>;    // [R, S, 6]

var<workgroup> values: array<f32, WG>;
var<workgroup> ids: array<u32, WG>;

fn is_finite(bits: u32) -> bool {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

// -infinity becomes the lowest number, because WGSL leaves infinities undefined.
fn number(bits: u32) -> f32 {
    return bitcast<f32>(select(LOWEST, bits, is_finite(bits)));
}

// What decides: the logit itself, or argmax(logit + T g), a sample from softmax(logits / T). A token that even the
// largest draw could not lift to `best` keeps its logit and loses.
fn noisy(logit: f32, id: u32, position: u32, best: f32) -> f32 {
    if p.temperature == 0.0 || logit + p.temperature * 23.0 < best {
        return logit;
    }
    let words = philox(vec4<u32>(id, position, state[0], 0u), vec2<u32>(p.key_low, p.key_high));
    return logit + p.temperature * gumbel(words.x);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let position = p.position + row;
    if tokens[position] != p.hole || state[1] == 0u {
        return;
    }
    let base = row * p.columns;
    let begin = group.x * SEGMENT + lane;
    let end = min((group.x + 1u) * SEGMENT, p.columns);
    var largest = bitcast<f32>(LOWEST);
    var flag = 0.0;
    var best = bitcast<f32>(LOWEST);
    var id = NOTHING;
    for (var i = begin; i < end; i += WG) {
        let bits = logits[base + i];
        flag = max(flag, select(select(2.0, 0.0, bits == 0xff800000u), 1.0, is_finite(bits)));
        let logit = number(bits);
        largest = max(largest, logit);
        let token = p.first + i;
        let value = noisy(logit, token, position, best);
        if token != p.hole && (value > best || id == NOTHING) {
            best = value;
            id = token;
        }
    }
    largest = reduce_max(largest, lane);
    flag = reduce_max(flag, lane);
    var sum = 0.0;
    for (var i = begin; i < end; i += WG) {
        // Halved, so that the difference of two large logits does not overflow.
        sum += exp(2.0 * max(0.5 * number(logits[base + i]) - 0.5 * largest, -60.0));
    }
    sum = reduce_sum(sum, lane);
    values[lane] = best;
    ids[lane] = id;
    workgroupBarrier();
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            let value = values[lane + stride];
            let other = ids[lane + stride];
            // Of equals the lowest id wins; nothing is the largest id.
            if value > values[lane] || (value == values[lane] && other < ids[lane]) {
                values[lane] = value;
                ids[lane] = other;
            }
        }
        workgroupBarrier();
    }
    if lane == 0u {
        let at = (row * p.segments + p.skip + group.x) * 6u;
        offers[at] = bitcast<u32>(largest);
        offers[at + 1u] = bitcast<u32>(sum);
        offers[at + 2u] = bitcast<u32>(values[0]);
        offers[at + 3u] = ids[0];
        if ids[0] != NOTHING {
            offers[at + 4u] = bitcast<u32>(number(logits[base + ids[0] - p.first]));
        }
        offers[at + 5u] = u32(flag);
    }
}

// choose: what one segment of the vocabulary offers an open position: its best token and its part of the softmax
// logits    [R, C], as bits
// tokens    [slots]
// places    [R]: slot, position and lane of each row; a row is open if its slot holds the lane's hole
// lanes     [L], the sequences of the pass    marks [sequences, 16 + 2 words]: see decide
// state     [sequences]: passes done, 1 until the answer ended
// limits    [R]: the lowest penalised logit that may be drawn
// offers    [R, S, 8]: largest logit, sum of exp(logit - largest), best value, its token, its logit, 2 with a NaN or
//           an infinity, else 1; second largest logit, sum of exp(logit - largest) (logit - largest)
// dispatch  (segments of 2048 columns, R)
// shared    3 WG words
#import reduce
#import philox
#import gumbel
#import decide
#import marks
const SEGMENT: u32 = 2048u;
struct Params { columns: u32, segments: u32, words: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;          // [R, C]
@group(0) @binding(2) var<storage, read> tokens: array<u32>;          // [slots]
@group(0) @binding(3) var<storage, read> places: array<vec4<u32>>;    // [R]
@group(0) @binding(4) var<storage, read> lanes: array<Lane>;           // [L]
@group(0) @binding(5) var<storage, read> state: array<vec4<u32>>;     // [sequences]
@group(0) @binding(6) var<storage, read> marks: array<u32>;           // [sequences, 16 + 2 words]
@group(0) @binding(7) var<storage, read> limits: array<f32>;          // [R]
@group(0) @binding(8) var<storage, read_write> offers: array<u32>;    // [R, S, 8]

var<workgroup> values: array<f32, WG>;
var<workgroup> ids: array<u32, WG>;

// What decides: the logit itself, or argmax(logit + T g), a sample from softmax(logits / T). A token that even the
// largest draw could not lift to `best` keeps its logit and loses.
fn noisy(how: Lane, logit: f32, id: u32, position: u32, best: f32) -> f32 {
    if how.temperature == 0.0 || logit + how.temperature * 23.0 < best {
        return logit;
    }
    let counter = vec4<u32>(id, position, state[how.sequence].x, 0u);
    return logit + how.temperature * gumbel(philox(counter, vec2<u32>(how.key_low, how.key_high)).x);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let row = group.y;
    let place = places[row];
    let how = lanes[place.z];
    if tokens[place.x] != how.hole || state[how.sequence].y == 0u {
        return;
    }
    let base = row * p.columns;
    let begin = group.x * SEGMENT + lane;
    let end = min((group.x + 1u) * SEGMENT, p.columns);
    let lowest = bitcast<f32>(LOWEST);
    let limit = limits[row];
    var largest = lowest;
    var flag = 0.0;
    var best = lowest;
    var id = NOTHING;
    for (var i = begin; i < end; i += WG) {
        let bits = logits[base + i];
        flag = max(flag, select(2.0, 1.0, is_finite(bits)));
        largest = max(largest, number(bits));
        let logit = penalised(how, p.words, i, number(bits));
        if logit >= limit && is_allowed(how, p.words, i) {
            let value = noisy(how, logit, i, place.y, best);
            if value > best || id == NOTHING {
                best = value;
                id = i;
            }
        }
    }
    largest = reduce_max(largest, lane);
    flag = reduce_max(flag, lane);
    var sum = 0.0;
    var spread = 0.0;
    var equal = 0.0;
    var second = lowest;
    for (var i = begin; i < end; i += WG) {
        let logit = number(logits[base + i]);
        let less = below(logit, largest);
        sum += exp(less);
        spread += exp(less) * less;
        equal += select(0.0, 1.0, logit == largest);
        second = max(second, select(logit, lowest, logit == largest));
    }
    sum = reduce_sum(sum, lane);
    if how.order == ENTROPY {
        spread = reduce_sum(spread, lane);
    }
    if how.order == MARGIN {
        equal = reduce_sum(equal, lane);
        second = select(reduce_max(second, lane), largest, equal > 1.0);
    }
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
        let at = (row * p.segments + group.x) * 8u;
        offers[at] = bitcast<u32>(largest);
        offers[at + 1u] = bitcast<u32>(sum);
        offers[at + 2u] = bitcast<u32>(values[0]);
        offers[at + 3u] = ids[0];
        if ids[0] != NOTHING {
            offers[at + 4u] = bitcast<u32>(number(logits[base + ids[0]]));
        }
        offers[at + 5u] = u32(flag);
        offers[at + 6u] = bitcast<u32>(second);
        offers[at + 7u] = bitcast<u32>(spread);
    }
}

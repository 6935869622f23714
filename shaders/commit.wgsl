// commit: the token and confidence of each open row from its segments' offers; the best rows get their tokens
// offers    [R, S, 8], see choose; of a lane with its rows side by side
// tokens    [slots]    places [R]    lanes [L]: see choose
// state     [sequences]: passes done, 1 until the answer ended, 1 while these rows want another pass
// marks     [sequences, 16 + 2 words], see decide
// records   [R]: token, its probability under the raw logits, priority, one of the four below
// dispatch  one workgroup a lane
// shared    WG f32
#import reduce
#import philox
#import decide
const OPEN: u32 = 0u;
const COMMITTED: u32 = 1u;
const BROKEN: u32 = 2u;   // no finite logits
const CLOSED: u32 = 3u;
struct Params { segments: u32, words: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> offers: array<u32>;                 // [R, S, 8]
@group(0) @binding(2) var<storage, read> places: array<vec4<u32>>;           // [R]
@group(0) @binding(3) var<storage, read> lanes: array<Lane>;           // [L]
@group(0) @binding(4) var<storage, read_write> tokens: array<u32>;           // [slots]
@group(0) @binding(5) var<storage, read_write> state: array<vec4<u32>>;      // [sequences]
@group(0) @binding(6) var<storage, read_write> marks: array<atomic<u32>>;    // [sequences, 16 + 2 words]
@group(0) @binding(7) var<storage, read_write> records: array<vec4<u32>>;    // [R]

fn decide(how: Lane, row: u32, passes: u32) -> vec4<u32> {
    let first = row * p.segments * 8u;
    let end = first + p.segments * 8u;
    var largest = bitcast<f32>(LOWEST);
    var second = bitcast<f32>(LOWEST);
    var flag = 0u;
    for (var at = first; at < end; at += 8u) {
        let own = bitcast<f32>(offers[at]);
        second = select(max(second, own), max(largest, bitcast<f32>(offers[at + 6u])), own > largest);
        largest = max(largest, own);
        flag = max(flag, offers[at + 5u]);
    }
    var sum = 0.0;
    var spread = 0.0;
    var best = bitcast<f32>(LOWEST);
    var token = NOTHING;
    var logit = bitcast<f32>(LOWEST);
    for (var at = first; at < end; at += 8u) {
        let own = bitcast<f32>(offers[at]);
        let less = below(own, largest);
        let part = bitcast<f32>(offers[at + 1u]) * exp(less);
        sum += part;
        spread += bitcast<f32>(offers[at + 7u]) * exp(less) + part * less;
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
    let confidence = min(exp(below(logit, largest)) / sum, 1.0);
    var priority = confidence;
    if how.order == RANDOM {
        let counter = vec4<u32>(0u, places[row].y, passes, 1u);
        let word = philox(counter, vec2<u32>(how.key_low, how.key_high)).x;
        priority = f32(word >> 8u) * (1.0 / 16777216.0);
    } else if how.order == MARGIN {
        priority = (1.0 - exp(below(second, largest))) / sum;
    } else if how.order == ENTROPY {
        priority = min(spread / sum - log(sum), 0.0);
    }
    return vec4<u32>(token, bitcast<u32>(confidence), bitcast<u32>(priority), OPEN);
}

// True if this row is among those that the pass commits; of equals the leftmost comes first.
fn is_chosen(how: Lane, row: u32) -> bool {
    let own = bitcast<f32>(records[row].z);
    var better = 0u;
    var entropies = -own;
    for (var r = how.first; r < how.first + how.rows; r += 1u) {
        let other = bitcast<f32>(records[r].z);
        if records[r].w != CLOSED && (other > own || (other == own && r < row)) {
            better += 1u;
            entropies -= other;
        }
    }
    switch how.rule {
        case BEST: { return better < how.most; }
        case AT_LEAST: { return better == 0u || own >= how.bound; }
        case FACTOR: { return better == 0u || own >= 1.0 - how.bound / f32(better + 2u); }
        default: { return better == 0u || entropies <= how.bound; }
    }
}

fn is_stop(how: Lane, token: u32) -> bool {
    var found = false;
    for (var i = 0u; i < how.stops; i += 1u) {
        found |= atomicLoad(&marks[how.sequence * (STOPS + 2u * p.words) + i]) == token;
    }
    return found;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let how = lanes[group.x];
    let end = how.first + how.rows;
    let passes = state[how.sequence].x;
    let going = state[how.sequence].y == 1u;
    var worst = 0.0;
    for (var r = how.first + lane; r < end; r += WG) {
        var record = vec4<u32>(0u, 0u, 0u, CLOSED);
        if going && tokens[places[r].x] == how.hole {
            record = decide(how, r, passes);
            worst = max(worst, 1.0 + f32(record.w));
        }
        records[r] = record;
    }
    storageBarrier();
    // 0 without open rows, 1 with sound ones, 3 with a broken one.
    worst = reduce_max(worst, lane);
    for (var r = how.first + lane; r < end; r += WG) {
        if records[r].w != CLOSED && worst == 1.0 && is_chosen(how, r) {
            let token = records[r].x;
            tokens[places[r].x] = token;
            let seen = how.sequence * (STOPS + 2u * p.words) + STOPS + p.words + token / 32u;
            atomicOr(&marks[seen], 1u << (token % 32u));
        }
    }
    storageBarrier();
    // Counted from the last row, so that the first one is the largest.
    var hole = 0.0;
    var stop = 0.0;
    for (var r = how.first + lane; r < end; r += WG) {
        let token = tokens[places[r].x];
        if records[r].w == OPEN && token != how.hole {
            records[r].w = COMMITTED;
        }
        let from_end = f32(end - r);
        hole = max(hole, select(0.0, from_end, token == how.hole));
        stop = max(stop, select(0.0, from_end, token != how.hole && is_stop(how, token)));
    }
    hole = reduce_max(hole, lane);
    stop = reduce_max(stop, lane);
    if lane == 0u && worst > 0.0 {
        let goes_on = worst == 1.0 && stop <= hole;
        state[how.sequence] = vec4<u32>(passes + 1u, u32(goes_on), u32(goes_on && hole > 0.0), 0u);
    }
}

// attention: o[q] = sum_k softmax_k(scale q.k) v[k] over allowed keys; lse[q] = ln sum_k exp(scale q.k)
// q, o      [B, Tq, N, H]    k, v  [B, capacity, G, H], the first tk rows of it
// stats     [2, B, Tq, N]: lse, then room for the backward pass    spans [B, length, 2]
// dispatch  (query tiles of 8, N, B): 64 lanes are keys for the scores, then head dimensions for the sum
// shared    8 queries, 8 x 64 scores: 10 KiB at H = 128
#import mask
const H: u32 = 64u; // host 4 64 128 192
const H4: u32 = H / 4u;
const PER_LANE: u32 = (H + 63u) / 64u;
const NEVER: f32 = -3.0e38;
struct Params {
    tq: u32, tk: u32, heads: u32, kv_heads: u32, capacity: u32, mask: u32, block: u32, length: u32,
    q_start: u32, scale: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;         // [B, capacity, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<f32>;               // [B, capacity, G, H]
@group(0) @binding(4) var<storage, read> spans: array<u32>;           // [B, length, 2]
@group(0) @binding(5) var<storage, read_write> o: array<f32>;         // [B, Tq, N, H]
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;     // [2, B, Tq, N]

var<workgroup> queries: array<vec4<f32>, 8u * H4>;   // [8, H / 4]
var<workgroup> scores: array<f32, 512>;              // [8, 64]
var<workgroup> partial: array<f32, 64>;              // [8, 8]
var<workgroup> largest: array<f32, 8>;
var<workgroup> total: array<f32, 8>;
var<workgroup> shrink: array<f32, 8>;
var<private> sum: array<f32, 8u * PER_LANE>;         // [8, PER_LANE]

// Scores of one key with the eight queries; masked ones are NEVER.
fn score(batch: u32, kv_head: u32, key: u32, end: u32, tile: vec2<u32>, lane: u32) {
    var s: array<f32, 8>;
    let row = ((batch * p.capacity + min(key, end - 1u)) * p.kv_heads + kv_head) * H4;
    for (var d = 0u; d < H4; d += 1u) {
        let kd = k[row + d];
        for (var r = 0u; r < 8u; r += 1u) {
            s[r] += dot(queries[r * H4 + d], kd);
        }
    }
    for (var r = 0u; r < 8u; r += 1u) {
        let seen = key < end && r < tile.y && allowed(batch, tile.x + r, key);
        scores[r * 64u + lane] = select(NEVER, s[r] * p.scale, seen);
    }
}

// Turns scores into weights against the running maximum, eight lanes a row.
fn weigh(lane: u32) {
    let r = lane / 8u;
    let first = r * 64u + (lane % 8u) * 8u;
    var m = NEVER;
    for (var i = 0u; i < 8u; i += 1u) {
        m = max(m, scores[first + i]);
    }
    partial[lane] = m;
    workgroupBarrier();
    let before = largest[r];
    m = before;
    for (var i = 0u; i < 8u; i += 1u) {
        m = max(m, partial[r * 8u + i]);
    }
    workgroupBarrier();
    var weight = 0.0;
    for (var i = 0u; i < 8u; i += 1u) {
        let s = scores[first + i];
        let e = select(0.0, exp(s - m), s > NEVER);
        scores[first + i] = e;
        weight += e;
    }
    partial[lane] = weight;
    workgroupBarrier();
    if lane % 8u == 0u {
        let c = exp(before - m);
        var t = total[r] * c;
        for (var i = 0u; i < 8u; i += 1u) {
            t += partial[r * 8u + i];
        }
        total[r] = t;
        shrink[r] = c;
        largest[r] = m;
    }
    workgroupBarrier();
}

fn gather(batch: u32, kv_head: u32, first: u32, count: u32, lane: u32) {
    for (var j = 0u; j < PER_LANE; j += 1u) {
        let d = min(lane + 64u * j, H - 1u);
        var acc: array<f32, 8>;
        for (var i = 0u; i < count; i += 1u) {
            let x = v[((batch * p.capacity + first + i) * p.kv_heads + kv_head) * H + d];
            for (var r = 0u; r < 8u; r += 1u) {
                acc[r] = fma(scores[r * 64u + i], x, acc[r]);
            }
        }
        for (var r = 0u; r < 8u; r += 1u) {
            sum[r * PER_LANE + j] = sum[r * PER_LANE + j] * shrink[r] + acc[r];
        }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let batch = group.z;
    let kv_head = head / (p.heads / p.kv_heads);
    let tile = tile_rows(group.x, p.tq);
    for (var i = lane; i < 8u * H4; i += 64u) {
        let row = tile.x + min(i / H4, tile.y - 1u);
        queries[i] = q[((batch * p.tq + row) * p.heads + head) * H4 + i % H4];
    }
    if lane < 8u {
        largest[lane] = NEVER;
        total[lane] = 0.0;
    }
    workgroupBarrier();
    let ranges = keys_of(batch, tile.x, tile.x + tile.y - 1u);
    for (var part = 0u; part < 2u; part += 1u) {
        let range = select(ranges.xy, ranges.zw, part == 1u);
        for (var first = range.x; first < range.y; first += 64u) {
            score(batch, kv_head, first + lane, range.y, tile, lane);
            workgroupBarrier();
            weigh(lane);
            gather(batch, kv_head, first, min(64u, range.y - first), lane);
            workgroupBarrier();
        }
    }
    // Eight rounds whatever the tile holds: an array indexed in an open-ended loop would live in memory.
    for (var r = 0u; r < 8u; r += 1u) {
        let row = (batch * p.tq + tile.x + r) * p.heads + head;
        // A row that may see nothing is zero, not NaN.
        let inverse = select(0.0, 1.0 / total[r], total[r] > 0.0);
        for (var j = 0u; j < PER_LANE; j += 1u) {
            let d = lane + 64u * j;
            if d < H && r < tile.y {
                o[row * H + d] = sum[r * PER_LANE + j] * inverse;
            }
        }
        if lane == 0u && r < tile.y {
            stats[row] = select(NEVER, largest[r] + log(total[r]), total[r] > 0.0);
        }
    }
}

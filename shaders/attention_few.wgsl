// attention_few: attention for a few query rows: o[q] = sum_k softmax_k(scale q.k) v[k], lse[q] = ln sum_k exp
// q         [B, Tq, N, H]    k, v  [B, Tk, G, H]    spans [words], see mask
// o         [splits, B, Tq, N, H]    stats [splits, B, Tq, N]: lse
// dispatch  (query tiles of 16 x splits, G, B): 64 lanes are keys for the scores, then dimensions for the sum
// shared    16 queries, 64 x 16 weights, 13 KiB at H = 128
#import mask
#import keys
#import weigh
const H: u32 = 64u; // host 4 64 128
const H4: u32 = H / 4u;
const PER_LANE: u32 = (H + 63u) / 64u;
struct Params {
    tq: u32, tk: u32, kv_heads: u32, mask: u32, block: u32, length: u32, scale: f32, rows: u32, splits: u32,
    zero: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;            // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<KeyQuad>;              // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<KeyPair>;              // [B, Tk, G, H / 2]
@group(0) @binding(4) var<storage, read> spans: array<u32>;              // [words]
@group(0) @binding(5) var<storage, read_write> o: array<f32>;            // [splits, B, Tq, N, H]
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;        // [splits, B, Tq, N]

var<workgroup> queries: array<vec4<f32>, 16u * H4>;   // [H / 4, 16]
var<workgroup> weights: array<vec4<f32>, 256>;        // [64 keys, 4 row quads]
var<workgroup> partial: array<vec4<f32>, 64>;         // [16 times 4 keys, 4 row quads]
var<workgroup> shrink: array<vec4<f32>, 4>;
var<private> sum: array<mat4x4<f32>, PER_LANE>;       // 16 rows of a dimension

// Products of one key with four queries from `row` on.
fn scores(d: u32, row: u32, x: vec4<f32>) -> vec4<f32> {
    let at = d * 16u + row;
    return vec4<f32>(dot(queries[at], x), dot(queries[at + 1u], x), dot(queries[at + 2u], x), dot(queries[at + 3u], x));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let split = group.x % p.splits;
    let rows = tile_rows(batch, group.x / p.splits, 16u, p.tq, SHARED);
    if rows.x >= rows.y {
        return;
    }
    // Rows past the edge repeat the last one.
    for (var i = lane; i < 16u * H4; i += 64u) {
        let at = query_at(batch, kv_head, vec4<u32>(min(rows.x + i % 16u, rows.y - 1u)));
        queries[i] = q[at.x * H4 + i / 16u];
    }
    // For the softmax a lane has four rows of every sixteenth key quad.
    let quad = lane % 4u;
    let own = min(vec4<u32>(rows.x + quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(rows.y - 1u));
    let token = own / SHARED;
    let seen = array<vec4<u32>, 4>(keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z),
        keys_of(batch, token.w));
    let head = keys_of(batch, rows.x / SHARED);
    let tail = keys_of(batch, (rows.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 63u) / 64u;
    let steps = near + (max(tail.w, head.z) - head.z + 63u) / 64u;
    var m = vec4<f32>(NEVER);
    var total = vec4<f32>();
    for (var step = steps * split / p.splits; step < steps * (split + 1u) / p.splits; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 64u, head.z + (step - near) * 64u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let kx = key_at(batch, kv_head, vec4<u32>(min(first + lane, last))).x * H4;
        var s: mat4x4<f32>;
        workgroupBarrier();
        for (var d = 0u; d < H4; d += 1u) {
            let x = wide(k[kx + d]);
            s += mat4x4<f32>(scores(d, 0u, x), scores(d, 4u, x), scores(d, 8u, x), scores(d, 12u, x));
        }
        for (var c = 0u; c < 4u; c += 1u) {
            weights[lane * 4u + c] = s[c] * p.scale;
        }
        workgroupBarrier();
        var top = vec4<f32>(NEVER);
        for (var c = 0u; c < 4u; c += 1u) {
            let key = vec4<u32>(first + lane / 4u * 4u + c);
            let at = (lane / 4u * 4u + c) * 4u + quad;
            s[c] = select(vec4<f32>(NEVER), weights[at], (key >= low) & (key < high));
            top = max(top, s[c]);
        }
        partial[lane] = top;
        workgroupBarrier();
        let before = m;
        for (var i = quad; i < 64u; i += 4u) {
            m = max(m, partial[i]);
        }
        total *= exp(before - m);
        for (var c = 0u; c < 4u; c += 1u) {
            let e = weights_of(s[c], m);
            weights[(lane / 4u * 4u + c) * 4u + quad] = e;
            total += e;
        }
        if lane < 4u {
            shrink[lane] = exp(before - m);
        }
        workgroupBarrier();
        for (var j = 0u; j < PER_LANE; j += 1u) {
            let d = min(lane + 64u * j, H - 1u);
            let y = sum[j];
            var x = mat4x4<f32>(y[0] * shrink[0], y[1] * shrink[1], y[2] * shrink[2], y[3] * shrink[3]);
            for (var i = 0u; i < min(64u, last + 1u - first); i += 1u) {
                let value = wide_pair(v[(key_at(batch, kv_head, vec4<u32>(first + i)).x * H + d) / 2u])[d % 2u];
                let at = i * 4u;
                x += mat4x4<f32>(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u]) * value;
            }
            sum[j] = x;
        }
    }
    partial[lane] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var i = quad; i < 64u; i += 4u) {
        total += partial[i];
    }
    if lane < 4u {
        shrink[lane] = inverse_of(total);
    }
    workgroupBarrier();
    let lse = lse_of(m, total);
    for (var r = 0u; r < 16u && rows.x + r < rows.y; r += 1u) {
        let to = query_at(batch, kv_head, vec4<u32>(rows.x + r)).x + split * p.rows;
        for (var d = lane; d < H; d += 64u) {
            o[to * H + d] = sum[d / 64u][r / 4u][r % 4u] * shrink[r / 4u][r % 4u];
        }
        if lane == r / 4u {
            stats[to] = lse[r % 4u];
        }
    }
}

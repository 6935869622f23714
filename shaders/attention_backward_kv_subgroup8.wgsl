// attention_backward_kv_subgroup8: dv[k] = sum_q p[q, k] dy[q],  dk[k] = scale sum_q ds[q, k] q[q], over the heads
// q, dy     [B, Tq, N, H]    k, v, dk, dv  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots        spans [words], see mask
// dispatch  (key tiles of 32, G, B): a workgroup is one subgroup of 8, a lane has four key rows
// shared    twice 32 x 32 values, 8 KiB; a lane reads only what it wrote
#import mask
#import eight
const H: u32 = 64u; // host 8 64 128
struct Params {
    tq: u32, tk: u32, kv_heads: u32, mask: u32, block: u32, length: u32, scale: f32, rows: u32, splits: u32,
    zero: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(4) var<storage, read> spans: array<u32>;           // [words]
@group(0) @binding(5) var<storage, read> dy: array<vec4<f32>>;        // [B, Tq, N, H / 4]
@group(0) @binding(6) var<storage, read> stats: array<f32>;           // [2, B, Tq, N]
@group(0) @binding(7) var<storage, read_write> dk: array<vec4<f32>>;  // [B, Tk, G, H / 4]
@group(0) @binding(8) var<storage, read_write> dv: array<vec4<f32>>;  // [B, Tk, G, H / 4]

var<workgroup> weights: array<vec4<f32>, 256>;   // [32 queries, 8 lanes]
var<workgroup> ds: array<vec4<f32>, 256>;

// Keys, or with `values` values; below, queries or their cotangents.
fn mine(values: bool, at: u32) -> vec4<f32> {
    if values { return v[at]; }
    return k[at];
}

fn other(values: bool, at: u32) -> vec4<f32> {
    if values { return dy[at]; }
    return q[at];
}

fn rows_at(values: bool, at: vec4<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(other(values, at.x), other(values, at.y), other(values, at.z), other(values, at.w));
}

fn products(values: bool, kx: vec4<u32>, qx: vec4<u32>) -> Scores {
    var s: Scores;
    for (var d = 0u; d < H / 4u; d += 1u) {
        let w = transpose(mat4x4<f32>(mine(values, kx.x + d), mine(values, kx.y + d), mine(values, kx.z + d),
            mine(values, kx.w + d)));
        s[0] = eight(s[0], other(values, qx.x + d), w);
        s[1] = eight(s[1], other(values, qx.y + d), w);
        s[2] = eight(s[2], other(values, qx.z + d), w);
        s[3] = eight(s[3], other(values, qx.w + d), w);
    }
    return s;
}

// Adds 32 queries times ds or, with `values`, cotangents times weights; the quads from `offset` on.
fn gather(values: bool, sums: Sums, batch: u32, kv_head: u32, first: u32, last: u32, offset: u32, lane: u32) -> Sums {
    var x = sums;
    for (var i = 0u; i < last + 1u - first; i += 4u) {
        let at = i * 8u + lane;
        var w = mat4x4<f32>(ds[at], ds[at + 8u], ds[at + 16u], ds[at + 24u]);
        if values {
            w = mat4x4<f32>(weights[at], weights[at + 8u], weights[at + 16u], weights[at + 24u]);
        }
        let qx = query_at(batch, kv_head, min(quad_of(first + i), vec4<u32>(last))) * (H / 4u);
        let d = min(vec2<u32>(offset, offset + 8u) + lane, vec2<u32>(H / 4u - 1u));
        x[0] = add_rows(x[0], rows_at(values, qx + d.x), w);
        if B > 1u {
            x[LAST] = add_rows(x[LAST], rows_at(values, qx + d.y), w);
        }
    }
    return x;
}

// The 32 dimensions from quad d on of a lane's four rows; those past H are of no row.
fn store(to: vec4<u32>, d: u32, many: u32, x: Scores, y: Scores) {
    for (var i = 0u; i < 8u; i += 1u) {
        let rows_k = transpose(mat4x4<f32>(x[0][i], x[1][i], x[2][i], x[3][i]));
        let rows_v = transpose(mat4x4<f32>(y[0][i], y[1][i], y[2][i], y[3][i]));
        for (var r = 0u; r < 4u; r += 1u) {
            if r < many && d + i < H / 4u {
                dk[to[r] * (H / 4u) + d + i] = rows_k[r] * p.scale;
                dv[to[r] * (H / 4u) + d + i] = rows_v[r];
            }
        }
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let tile = tile_rows(batch, group.x, 32u, p.tk, 1u);
    // Lanes past the edge repeat the last row: every lane must take part in the broadcasts.
    let row = min(quad_of(tile.x + 4u * lane), vec4<u32>(tile.y - 1u));
    let at = key_at(batch, kv_head, row);
    let seen = array<vec4<u32>, 4>(queries_of(batch, row.x) * SHARED, queries_of(batch, row.y) * SHARED,
        queries_of(batch, row.z) * SHARED, queries_of(batch, row.w) * SHARED);
    let head = queries_of(batch, tile.x) * SHARED;
    let tail = queries_of(batch, tile.y - 1u) * SHARED;
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    var sums_k: array<Sums, 2>;
    var sums_v: array<Sums, 2>;
    for (var step = 0u; step < steps; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = min(select(tail.y, tail.w, far), first + 32u) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let query = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(last));
        let qx = query_at(batch, kv_head, query) * (H / 4u);
        let s = products(false, at * (H / 4u), qx);
        let g = products(true, at * (H / 4u), qx);
        for (var c = 0u; c < 4u; c += 1u) {
            for (var i = 0u; i < 8u; i += 1u) {
                weights[c * 64u + i * 8u + lane] = s[c][i];
                ds[c * 64u + i * 8u + lane] = g[c][i];
            }
        }
        // An open-ended loop: 32 exponentials in the text take the driver seconds.
        let count = (last - first) / 4u * 4u + 4u;
        for (var i = 0u; i < count; i += 1u) {
            let number = vec4<u32>(first + i);
            let row = query_at(batch, kv_head, min(number, vec4<u32>(last))).x;
            let j = i * 8u + lane;
            let e = exp(weights[j] * p.scale - stats[row]);
            let weight = select(vec4<f32>(), e, (number >= low) & (number < high));
            weights[j] = weight;
            ds[j] = weight * (ds[j] - stats[p.rows + row]);
        }
        sums_v[0] = gather(true, sums_v[0], batch, kv_head, first, last, 0u, lane);
        sums_k[0] = gather(false, sums_k[0], batch, kv_head, first, last, 0u, lane);
        if H > 64u { sums_v[1] = gather(true, sums_v[1], batch, kv_head, first, last, 16u, lane); }
        if H > 64u { sums_k[1] = gather(false, sums_k[1], batch, kv_head, first, last, 16u, lane); }
    }
    let many = tile.y - min(tile.x + 4u * lane, tile.y);
    store(at, 0u, many, sums_k[0][0], sums_v[0][0]);
    if B > 1u { store(at, 8u, many, sums_k[0][LAST], sums_v[0][LAST]); }
    if H > 64u { store(at, 16u, many, sums_k[1][0], sums_v[1][0]); }
    if H > 64u { store(at, 24u, many, sums_k[1][LAST], sums_v[1][LAST]); }
}

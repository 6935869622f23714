// attention_backward_kv_subgroup8: dv[k] = sum_q p[q, k] dy[q],  dk[k] = scale sum_q ds[q, k] q[q], over the heads
// q, dy     [B, Tq, N, H]    k, v, dk, dv  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots        spans [B, length, 2]
// dispatch  (key tiles of 32, G, B): a workgroup is one subgroup of 8, a lane has four key rows
// shared    twice 32 x 32 values, 8 KiB; a lane reads only what it wrote
#import mask
#import eight
const H: u32 = 64u; // host 8 64 128 192
struct Params {
    tq: u32, tk: u32, kv_heads: u32, capacity: u32, mask: u32, block: u32, length: u32, q_start: u32,
    scale: f32, rows: u32, splits: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(4) var<storage, read> spans: array<u32>;           // [B, length, 2]
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

fn weight_of(values: bool, at: u32) -> vec4<f32> {
    if values { return weights[at]; }
    return ds[at];
}

// Adds 32 queries times ds or, with `values`, cotangents times weights; the dimensions from `offset` on.
fn gather(values: bool, sums: Sums, batch: u32, kv_head: u32, first: u32, last: u32, offset: u32, lane: u32) -> Sums {
    var x = sums;
    for (var i = 0u; i < 32u; i += 4u) {
        let at = i * 8u + lane;
        let w = mat4x4<f32>(weight_of(values, at), weight_of(values, at + 8u), weight_of(values, at + 16u),
            weight_of(values, at + 24u));
        let qx = query_at(batch, kv_head, min(quad_of(first + i), vec4<u32>(last))) * (H / 4u);
        for (var j = 0u; j < J; j += 1u) {
            let d = min(offset + 8u * j, H - 8u) + lane;
            let e = d % 4u;
            let at = qx + d / 4u;
            x[j] = eight(x[j], vec4<f32>(other(values, at.x)[e], other(values, at.y)[e], other(values, at.z)[e],
                other(values, at.w)[e]), w);
        }
    }
    return x;
}

// Eight dimensions of a lane's four rows; those past H are of no row.
fn store(to: vec4<u32>, d: u32, many: u32, to_k: Eight, to_v: Eight) {
    let a = transpose(mat4x4<f32>(to_k[0], to_k[1], to_k[2], to_k[3]));
    let b = transpose(mat4x4<f32>(to_k[4], to_k[5], to_k[6], to_k[7]));
    let f = transpose(mat4x4<f32>(to_v[0], to_v[1], to_v[2], to_v[3]));
    let g = transpose(mat4x4<f32>(to_v[4], to_v[5], to_v[6], to_v[7]));
    for (var c = 0u; c < 4u; c += 1u) {
        if c < many && d < H {
            let at = (to[c] * H + d) / 4u;
            dk[at] = a[c] * p.scale;
            dk[at + 1u] = b[c] * p.scale;
            dv[at] = f[c];
            dv[at + 1u] = g[c];
        }
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let tile = tile_rows(group.x, 32u, p.tk, 1u);
    // Lanes past the edge repeat the last row: every lane must take part in the broadcasts.
    let row = min(quad_of(tile.x + 4u * lane), vec4<u32>(tile.y - 1u));
    let at = key_at(batch, kv_head, row);
    let seen = array<vec4<u32>, 4>(queries_of(batch, row.x) * SHARED, queries_of(batch, row.y) * SHARED,
        queries_of(batch, row.z) * SHARED, queries_of(batch, row.w) * SHARED);
    let head = queries_of(batch, tile.x) * SHARED;
    let tail = queries_of(batch, tile.y - 1u) * SHARED;
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    var k0: Sums;
    var k1: Sums;
    var k2: Sums;
    var v0: Sums;
    var v1: Sums;
    var v2: Sums;
    for (var step = 0u; step < steps; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let query = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(last));
        let qx = query_at(batch, kv_head, query);
        let s = products(false, at * (H / 4u), qx * (H / 4u));
        for (var c = 0u; c < 4u; c += 1u) {
            let lse = spread(stats[qx[c]]);
            for (var i = 0u; i < 8u; i += 1u) {
                let number = vec4<u32>(first + 8u * c + i);
                let weight = exp(s[c][i] * p.scale - lse[i]);
                weights[c * 64u + i * 8u + lane] = select(vec4<f32>(), weight, (number >= low) & (number < high));
            }
        }
        let g = products(true, at * (H / 4u), qx * (H / 4u));
        for (var c = 0u; c < 4u; c += 1u) {
            let dots = spread(stats[p.rows + qx[c]]);
            for (var i = 0u; i < 8u; i += 1u) {
                ds[c * 64u + i * 8u + lane] = weights[c * 64u + i * 8u + lane] * (g[c][i] - dots[i]);
            }
        }
        v0 = gather(true, v0, batch, kv_head, first, last, 0u, lane);
        k0 = gather(false, k0, batch, kv_head, first, last, 0u, lane);
        if H > 64u { v1 = gather(true, v1, batch, kv_head, first, last, 64u, lane); }
        if H > 64u { k1 = gather(false, k1, batch, kv_head, first, last, 64u, lane); }
        if H > 128u { v2 = gather(true, v2, batch, kv_head, first, last, 128u, lane); }
        if H > 128u { k2 = gather(false, k2, batch, kv_head, first, last, 128u, lane); }
    }
    let many = tile.y - min(tile.x + 4u * lane, tile.y);
    for (var j = 0u; j < J; j += 1u) {
        store(at, 8u * j, many, k0[j], v0[j]);
        if H > 64u { store(at, 64u + 8u * j, many, k1[j], v1[j]); }
        if H > 128u { store(at, 128u + 8u * j, many, k2[j], v2[j]); }
    }
}

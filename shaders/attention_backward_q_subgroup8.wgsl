// attention_backward_q_subgroup8: dq[q] = scale sum_k ds[q, k] k[k],  ds = p (do.v - dots),  p = exp(scale q.k - lse)
// q, dy, dq [B, Tq, N, H]    k, v  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots        spans [words], see mask
// dispatch  (query tiles of 32, G, B): a workgroup is one subgroup of 8, a lane has four query rows
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
@group(0) @binding(7) var<storage, read_write> dq: array<vec4<f32>>;  // [B, Tq, N, H / 4]

var<workgroup> ds: array<vec4<f32>, 256>;           // [32 keys, 8 lanes]
var<workgroup> products_v: array<vec4<f32>, 256>;

// Scores, or with `values` the products of cotangents and values.
fn products(values: bool, qx: vec4<u32>, kx: vec4<u32>) -> Scores {
    var s: Scores;
    for (var d = 0u; d < H / 4u; d += 1u) {
        var w = transpose(mat4x4<f32>(q[qx.x + d], q[qx.y + d], q[qx.z + d], q[qx.w + d]));
        if values {
            w = transpose(mat4x4<f32>(dy[qx.x + d], dy[qx.y + d], dy[qx.z + d], dy[qx.w + d]));
        }
        s[0] = eight(s[0], other(values, kx.x + d), w);
        s[1] = eight(s[1], other(values, kx.y + d), w);
        s[2] = eight(s[2], other(values, kx.z + d), w);
        s[3] = eight(s[3], other(values, kx.w + d), w);
    }
    return s;
}

fn other(values: bool, at: u32) -> vec4<f32> {
    if values {
        return v[at];
    }
    return k[at];
}

// Adds 32 keys times ds, the quads from `offset` on.
fn gather(sums: Sums, batch: u32, kv_head: u32, first: u32, last: u32, offset: u32, lane: u32) -> Sums {
    var x = sums;
    for (var i = 0u; i < last + 1u - first; i += 4u) {
        let at = i * 8u + lane;
        let w = mat4x4<f32>(ds[at], ds[at + 8u], ds[at + 16u], ds[at + 24u]);
        let kx = key_at(batch, kv_head, min(quad_of(first + i), vec4<u32>(last))) * (H / 4u);
        let d = min(vec2<u32>(offset, offset + 8u) + lane, vec2<u32>(H / 4u - 1u));
        x[0] = add_rows(x[0], mat4x4<f32>(k[kx.x + d.x], k[kx.y + d.x], k[kx.z + d.x], k[kx.w + d.x]), w);
        if B > 1u {
            let y = mat4x4<f32>(k[kx.x + d.y], k[kx.y + d.y], k[kx.z + d.y], k[kx.w + d.y]);
            x[LAST] = add_rows(x[LAST], y, w);
        }
    }
    return x;
}

// The 32 dimensions from quad d on of a lane's four rows; those past H are of no row.
fn store(to: vec4<u32>, d: u32, many: u32, x: Scores) {
    for (var i = 0u; i < 8u; i += 1u) {
        let rows = transpose(mat4x4<f32>(x[0][i], x[1][i], x[2][i], x[3][i]));
        for (var r = 0u; r < 4u; r += 1u) {
            if r < many && d + i < H / 4u {
                dq[to[r] * (H / 4u) + d + i] = rows[r] * p.scale;
            }
        }
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let tile = tile_rows(batch, group.x, 32u, p.tq, SHARED);
    // Lanes past the edge repeat the last row: every lane must take part in the broadcasts.
    let row = min(quad_of(tile.x + 4u * lane), vec4<u32>(tile.y - 1u));
    let at = query_at(batch, kv_head, row);
    let lse = vec4<f32>(stats[at.x], stats[at.y], stats[at.z], stats[at.w]);
    let to = at + p.rows;
    let dots = vec4<f32>(stats[to.x], stats[to.y], stats[to.z], stats[to.w]);
    let token = row / SHARED;
    let seen = array<vec4<u32>, 4>(keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z),
        keys_of(batch, token.w));
    let head = keys_of(batch, tile.x / SHARED);
    let tail = keys_of(batch, (tile.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    var sum0: Sums;
    var sum1: Sums;
    for (var step = 0u; step < steps; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = min(select(tail.y, tail.w, far), first + 32u) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let key = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(last));
        let kx = key_at(batch, kv_head, key) * (H / 4u);
        let qx = at * (H / 4u);
        let s = products(false, qx, kx);
        let g = products(true, qx, kx);
        for (var c = 0u; c < 4u; c += 1u) {
            for (var i = 0u; i < 8u; i += 1u) {
                ds[c * 64u + i * 8u + lane] = s[c][i];
                products_v[c * 64u + i * 8u + lane] = g[c][i];
            }
        }
        // An open-ended loop: 32 exponentials in the text take the driver seconds.
        let count = (last - first) / 4u * 4u + 4u;
        for (var i = 0u; i < count; i += 1u) {
            let number = vec4<u32>(first + i);
            let j = i * 8u + lane;
            let value = exp(ds[j] * p.scale - lse) * (products_v[j] - dots);
            ds[j] = select(vec4<f32>(), value, (number >= low) & (number < high));
        }
        sum0 = gather(sum0, batch, kv_head, first, last, 0u, lane);
        if H > 64u { sum1 = gather(sum1, batch, kv_head, first, last, 16u, lane); }
    }
    let many = tile.y - min(tile.x + 4u * lane, tile.y);
    store(at, 0u, many, sum0[0]);
    if B > 1u { store(at, 8u, many, sum0[LAST]); }
    if H > 64u { store(at, 16u, many, sum1[0]); }
    if H > 64u { store(at, 24u, many, sum1[LAST]); }
}

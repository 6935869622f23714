// attention_subgroup8: attention for subgroups of 8: o[q] = sum_k softmax_k(scale q.k) v[k], lse[q] = ln sum_k exp
// q         [B, Tq, N, H]    k, v  [B, Tk, G, H]    spans [words], see mask
// o         [splits, B, Tq, N, H]    stats [splits, B, Tq, N]: lse
// dispatch  (query tiles of 32 x splits, G, B): a workgroup is one subgroup, a lane has four query rows
// shared    32 x 32 weights, 4 KiB; a lane reads only what it wrote
#import mask
#import keys
#import eight
#import weigh
const H: u32 = 64u; // host 8 64 128
struct Params {
    tq: u32, tk: u32, kv_heads: u32, mask: u32, block: u32, length: u32, scale: f32, rows: u32, splits: u32,
    zero: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;            // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<KeyQuad>;              // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<KeyQuad>;              // [B, Tk, G, H / 4]
@group(0) @binding(4) var<storage, read> spans: array<u32>;              // [words]
@group(0) @binding(5) var<storage, read_write> o: array<vec4<f32>>;      // [splits, B, Tq, N, H / 4]
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;        // [splits, B, Tq, N]

var<workgroup> weights: array<vec4<f32>, 256>;   // [32 keys, 8 lanes]

fn products(qx: vec4<u32>, kx: vec4<u32>) -> Scores {
    var s: Scores;
    for (var d = 0u; d < H / 4u; d += 1u) {
        let w = transpose(mat4x4<f32>(q[qx.x + d], q[qx.y + d], q[qx.z + d], q[qx.w + d]));
        s[0] = eight(s[0], wide(k[kx.x + d]), w);
        s[1] = eight(s[1], wide(k[kx.y + d]), w);
        s[2] = eight(s[2], wide(k[kx.z + d]), w);
        s[3] = eight(s[3], wide(k[kx.w + d]), w);
    }
    return s;
}

fn rows_at(x: vec4<u32>) -> mat4x4<f32> {
    return mat4x4<f32>(wide(v[x.x]), wide(v[x.y]), wide(v[x.z]), wide(v[x.w]));
}

// Adds the weighted values of 32 keys, the quads from `offset` on.
fn gather(sums: Sums, batch: u32, kv_head: u32, first: u32, last: u32, offset: u32, lane: u32) -> Sums {
    var x = sums;
    for (var i = 0u; i < last + 1u - first; i += 4u) {
        let at = i * 8u + lane;
        let w = mat4x4<f32>(weights[at], weights[at + 8u], weights[at + 16u], weights[at + 24u]);
        let vx = key_at(batch, kv_head, min(quad_of(first + i), vec4<u32>(last))) * (H / 4u);
        let d = min(vec2<u32>(offset, offset + 8u) + lane, vec2<u32>(H / 4u - 1u));
        x[0] = add_rows(x[0], rows_at(vx + d.x), w);
        if B > 1u {
            x[LAST] = add_rows(x[LAST], rows_at(vx + d.y), w);
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
                o[to[r] * (H / 4u) + d + i] = rows[r];
            }
        }
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let split = group.x % p.splits;
    let tile = tile_rows(batch, group.x / p.splits, 32u, p.tq, SHARED);
    if tile.x >= tile.y {
        return;
    }
    // Lanes past the edge repeat the last row: every lane must take part in the broadcasts.
    let row = min(quad_of(tile.x + 4u * lane), vec4<u32>(tile.y - 1u));
    let at = query_at(batch, kv_head, row);
    let token = row / SHARED;
    let seen = array<vec4<u32>, 4>(keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z),
        keys_of(batch, token.w));
    let head = keys_of(batch, tile.x / SHARED);
    let tail = keys_of(batch, (tile.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    var m = vec4<f32>(NEVER);
    var total = vec4<f32>();
    var sum0: Sums;
    var sum1: Sums;
    for (var step = steps * split / p.splits; step < steps * (split + 1u) / p.splits; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = min(select(tail.y, tail.w, far), first + 32u) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let key = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(last));
        var s = products(at * (H / 4u), key_at(batch, kv_head, key) * (H / 4u));
        let before = m;
        for (var c = 0u; c < 4u; c += 1u) {
            for (var i = 0u; i < 8u; i += 1u) {
                let number = vec4<u32>(first + 8u * c + i);
                s[c][i] = select(vec4<f32>(NEVER), s[c][i] * p.scale, (number >= low) & (number < high));
                m = max(m, s[c][i]);
            }
        }
        let shrink = exp(before - m);
        for (var c = 0u; c < 4u; c += 1u) {
            for (var i = 0u; i < 8u; i += 1u) {
                weights[c * 64u + i * 8u + lane] = s[c][i];
            }
        }
        total *= shrink;
        // An open-ended loop: 32 exponentials in the text take the driver seconds.
        let count = (last - first) / 4u * 4u + 4u;
        for (var i = 0u; i < count; i += 1u) {
            let e = weights_of(weights[i * 8u + lane], m);
            weights[i * 8u + lane] = e;
            total += e;
        }
        sum0 = gather(scaled(sum0, shrink), batch, kv_head, first, last, 0u, lane);
        if H > 64u {
            sum1 = gather(scaled(sum1, shrink), batch, kv_head, first, last, 16u, lane);
        }
    }
    let inverse = inverse_of(total);
    let lse = lse_of(m, total);
    let many = tile.y - min(tile.x + 4u * lane, tile.y);
    let to = at + split * p.rows;
    for (var c = 0u; c < min(many, 4u); c += 1u) {
        stats[to[c]] = lse[c];
    }
    sum0 = scaled(sum0, inverse);
    sum1 = scaled(sum1, inverse);
    store(to, 0u, many, sum0[0]);
    if B > 1u { store(to, 8u, many, sum0[LAST]); }
    if H > 64u { store(to, 16u, many, sum1[0]); }
    if H > 64u { store(to, 24u, many, sum1[LAST]); }
}

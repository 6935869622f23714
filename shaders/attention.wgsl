// attention: o[q] = sum_k softmax_k(scale q.k) v[k] over allowed keys; lse[q] = ln sum_k exp(scale q.k)
// q         [B, Tq, N, H]    k, v  [B, Tk, G, H]    spans [words], see mask
// o         [splits, B, Tq, N, H]    stats [splits, B, Tq, N]: lse
// dispatch  (query tiles of 64 x splits, G, B)
// shared    8 quads of 64 queries and 32 keys, then 64 x 32 weights and 8 quads of 32 values: 13.5 KiB
#import mask
#import keys
#import tile
#import weigh
const H: u32 = 64u; // host 4 64 128 192
const H4: u32 = H / 4u;
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

var<private> sum: array<mat4x4<f32>, (H + 31u) / 32u>;   // quads x, x + 8, .. of four rows

fn stage_scores(t: u32, d: u32, qx: vec4<u32>, kx: vec4<u32>) {
    let quad = min(d + t % 8u, H4 - 1u);
    let inside = vec4<f32>(select(0.0, 1.0, d + t % 8u < H4));
    let to = t / 8u * 9u + t % 8u;
    tile[to] = inside * q[qx.x * H4 + quad];
    tile[to + 144u] = inside * q[qx.y * H4 + quad];
    tile[to + 288u] = inside * q[qx.z * H4 + quad];
    tile[to + 432u] = inside * q[qx.w * H4 + quad];
    tile[to + OTHERS] = inside * wide(k[kx.x * H4 + quad]);
    tile[to + OTHERS + 144u] = inside * wide(k[kx.y * H4 + quad]);
}

fn largest(t: u32) -> vec4<f32> {
    let y = t / 8u;
    return max(max(max(tile[y], tile[y + 16u]), max(tile[y + 32u], tile[y + 48u])),
        max(max(tile[y + 64u], tile[y + 80u]), max(tile[y + 96u], tile[y + 112u])));
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let split = group.x % p.splits;
    let rows = tile_rows(batch, group.x / p.splits, 64u, p.tq, SHARED);
    if rows.x >= rows.y {
        return;
    }
    // Rows past the edge repeat the last one.
    let own = min(quad_of(rows.x + t / 8u * 4u, 1u), vec4<u32>(rows.y - 1u));
    let staged = query_at(batch, kv_head, min(quad_of(rows.x + t / 8u, 16u), vec4<u32>(rows.y - 1u)));
    let token = own / SHARED;
    let seen = array<vec4<u32>, 4>(keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z),
        keys_of(batch, token.w));
    let head = keys_of(batch, rows.x / SHARED);
    let tail = keys_of(batch, (rows.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    var m = vec4<f32>(NEVER);
    var total = vec4<f32>();
    for (var step = steps * split / p.splits; step < steps * (split + 1u) / p.splits; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let kx = key_at(batch, kv_head, min(quad_of(first + t / 8u, 16u), vec4<u32>(last)));
        var s: mat4x4<f32>;
        for (var d = 0u; d < H4; d += 8u) {
            workgroupBarrier();
            stage_scores(t, d, staged, kx);
            workgroupBarrier();
            s = products(s, t);
        }
        s = transpose(s) * p.scale;
        for (var c = 0u; c < 4u; c += 1u) {
            let key = vec4<u32>(first + t % 8u + 8u * c);
            s[c] = select(vec4<f32>(NEVER), s[c], (key >= low) & (key < high));
        }
        workgroupBarrier();
        tile[t % 8u * 16u + t / 8u] = max(max(s[0], s[1]), max(s[2], s[3]));
        workgroupBarrier();
        let before = m;
        m = max(m, largest(t));
        let shrink = exp(before - m);
        total *= shrink;
        for (var c = 0u; c < 4u; c += 1u) {
            s[c] = weights_of(s[c], m);
            total += s[c];
        }
        workgroupBarrier();
        keep(t, s);
        for (var d = 0u; d < H4; d += 8u) {
            let quad = min(d + t % 8u, H4 - 1u);
            workgroupBarrier();
            tile[STAGED + t] = wide(v[kx.x * H4 + quad]);
            tile[STAGED + t + 128u] = wide(v[kx.y * H4 + quad]);
            workgroupBarrier();
            let x = sum[d / 8u];
            sum[d / 8u] = weighted(mat4x4<f32>(x[0] * shrink.x, x[1] * shrink.y, x[2] * shrink.z, x[3] * shrink.w), t);
        }
    }
    workgroupBarrier();
    tile[t % 8u * 16u + t / 8u] = total;
    workgroupBarrier();
    total = vec4<f32>();
    for (var x = 0u; x < 8u; x += 1u) {
        total += tile[x * 16u + t / 8u];
    }
    let inverse = inverse_of(total);
    let lse = lse_of(m, total);
    let to = query_at(batch, kv_head, own) + split * p.rows;
    for (var r = 0u; r < 4u; r += 1u) {
        let is_row = rows.x + t / 8u * 4u + r < rows.y;
        for (var d = t % 8u; d < H4 && is_row; d += 8u) {
            o[to[r] * H4 + d] = sum[d / 8u][r] * inverse[r];
        }
        if is_row && t % 8u == 0u {
            stats[to[r]] = lse[r];
        }
    }
}

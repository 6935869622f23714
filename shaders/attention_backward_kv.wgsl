// attention_backward_kv: dv[k] = sum_q p[q, k] dy[q],  dk[k] = scale sum_q ds[q, k] q[q], over the query heads
// q, dy     [B, Tq, N, H]    k, v, dk, dv  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots    spans [words], see mask
// dispatch  (key tiles of 64, G, B)
// shared    8 quads of 64 keys and 32 queries, then 64 x 32 weights and 8 quads of 32 queries: 13.5 KiB
#import mask
#import tile
const H: u32 = 64u; // host 4 64 128 192
const H4: u32 = H / 4u;
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

var<private> sum_k: array<mat4x4<f32>, (H + 31u) / 32u>;   // quads x, x + 8, .. of four rows
var<private> sum_v: array<mat4x4<f32>, (H + 31u) / 32u>;

// Keys and queries or, with `values`, values and cotangents.
fn stage(values: bool, t: u32, d: u32, kx: vec4<u32>, qx: vec4<u32>) {
    let quad = min(d + t % 8u, H4 - 1u);
    let inside = vec4<f32>(select(0.0, 1.0, d + t % 8u < H4));
    let to = t / 8u * 9u + t % 8u;
    for (var i = 0u; i < 4u; i += 1u) {
        let at = kx[i] * H4 + quad;
        if values {
            tile[to + i * 144u] = inside * v[at];
        } else {
            tile[to + i * 144u] = inside * k[at];
        }
    }
    for (var i = 0u; i < 2u; i += 1u) {
        let at = qx[i] * H4 + quad;
        if values {
            tile[to + OTHERS + i * 144u] = inside * dy[at];
        } else {
            tile[to + OTHERS + i * 144u] = inside * q[at];
        }
    }
}

fn products_of(values: bool, t: u32, kx: vec4<u32>, qx: vec4<u32>) -> mat4x4<f32> {
    var s: mat4x4<f32>;
    for (var d = 0u; d < H4; d += 8u) {
        workgroupBarrier();
        stage(values, t, d, kx, qx);
        workgroupBarrier();
        s = products(s, t);
    }
    return transpose(s);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let rows = tile_rows(batch, group.x, 64u, p.tk, 1u);
    // Rows past the edge repeat the last one.
    let own = min(quad_of(rows.x + t / 8u * 4u, 1u), vec4<u32>(rows.y - 1u));
    let staged = key_at(batch, kv_head, min(quad_of(rows.x + t / 8u, 16u), vec4<u32>(rows.y - 1u)));
    let seen = array<vec4<u32>, 4>(queries_of(batch, own.x) * SHARED, queries_of(batch, own.y) * SHARED,
        queries_of(batch, own.z) * SHARED, queries_of(batch, own.w) * SHARED);
    let head = queries_of(batch, rows.x) * SHARED;
    let tail = queries_of(batch, rows.y - 1u) * SHARED;
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    for (var step = 0u; step < steps; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let qx = query_at(batch, kv_head, min(quad_of(first + t / 8u, 16u), vec4<u32>(last)));
        let mine = query_at(batch, kv_head, min(quad_of(first + t % 8u, 8u), vec4<u32>(last)));
        var s = products_of(false, t, staged, qx);
        var g = products_of(true, t, staged, qx);
        for (var c = 0u; c < 4u; c += 1u) {
            let query = vec4<u32>(first + t % 8u + 8u * c);
            let weight = exp(s[c] * p.scale - stats[mine[c]]);
            s[c] = select(vec4<f32>(), weight, (query >= low) & (query < high));
            g[c] = s[c] * (g[c] - stats[p.rows + mine[c]]);
        }
        workgroupBarrier();
        keep(t, s);
        for (var d = 0u; d < H4; d += 8u) {
            let quad = min(d + t % 8u, H4 - 1u);
            workgroupBarrier();
            tile[STAGED + t] = dy[qx.x * H4 + quad];
            tile[STAGED + t + 128u] = dy[qx.y * H4 + quad];
            workgroupBarrier();
            sum_v[d / 8u] = weighted(sum_v[d / 8u], t);
        }
        workgroupBarrier();
        keep(t, g);
        for (var d = 0u; d < H4; d += 8u) {
            let quad = min(d + t % 8u, H4 - 1u);
            workgroupBarrier();
            tile[STAGED + t] = q[qx.x * H4 + quad];
            tile[STAGED + t + 128u] = q[qx.y * H4 + quad];
            workgroupBarrier();
            sum_k[d / 8u] = weighted(sum_k[d / 8u], t);
        }
    }
    let at = key_at(batch, kv_head, own);
    for (var r = 0u; r < 4u; r += 1u) {
        let is_row = rows.x + t / 8u * 4u + r < rows.y;
        for (var d = t % 8u; d < H4 && is_row; d += 8u) {
            dk[at[r] * H4 + d] = sum_k[d / 8u][r] * p.scale;
            dv[at[r] * H4 + d] = sum_v[d / 8u][r];
        }
    }
}

// attention_backward_q: dq[q] = scale sum_k ds[q, k] k[k],  ds = p (do.v - dots),  p = exp(scale q.k - lse)
// q, dy, dq [B, Tq, N, H]    k, v  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots        spans [words], see mask
// dispatch  (query tiles of 64, G, B)
// shared    8 quads of 64 queries and 32 keys, then 64 x 32 values of ds and 8 quads of 32 keys: 13.5 KiB
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
@group(0) @binding(7) var<storage, read_write> dq: array<vec4<f32>>;  // [B, Tq, N, H / 4]

var<private> sum: array<mat4x4<f32>, (H + 31u) / 32u>;   // quads x, x + 8, .. of four rows

// Queries and keys or, with `values`, cotangents and values.
fn stage(values: bool, t: u32, d: u32, qx: vec4<u32>, kx: vec4<u32>) {
    let quad = min(d + t % 8u, H4 - 1u);
    let inside = vec4<f32>(select(0.0, 1.0, d + t % 8u < H4));
    let to = t / 8u * 9u + t % 8u;
    for (var i = 0u; i < 4u; i += 1u) {
        let at = qx[i] * H4 + quad;
        if values {
            tile[to + i * 144u] = inside * dy[at];
        } else {
            tile[to + i * 144u] = inside * q[at];
        }
    }
    for (var i = 0u; i < 2u; i += 1u) {
        let at = kx[i] * H4 + quad;
        if values {
            tile[to + OTHERS + i * 144u] = inside * v[at];
        } else {
            tile[to + OTHERS + i * 144u] = inside * k[at];
        }
    }
}

fn products_of(values: bool, t: u32, qx: vec4<u32>, kx: vec4<u32>) -> mat4x4<f32> {
    var s: mat4x4<f32>;
    for (var d = 0u; d < H4; d += 8u) {
        workgroupBarrier();
        stage(values, t, d, qx, kx);
        workgroupBarrier();
        s = products(s, t);
    }
    return transpose(s);
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let rows = tile_rows(batch, group.x, 64u, p.tq, SHARED);
    // Rows past the edge repeat the last one.
    let own = min(quad_of(rows.x + t / 8u * 4u, 1u), vec4<u32>(rows.y - 1u));
    let staged = query_at(batch, kv_head, min(quad_of(rows.x + t / 8u, 16u), vec4<u32>(rows.y - 1u)));
    let at = query_at(batch, kv_head, own);
    let lse = vec4<f32>(stats[at.x], stats[at.y], stats[at.z], stats[at.w]);
    let to = at + p.rows;
    let dots = vec4<f32>(stats[to.x], stats[to.y], stats[to.z], stats[to.w]);
    let token = own / SHARED;
    let seen = array<vec4<u32>, 4>(keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z),
        keys_of(batch, token.w));
    let head = keys_of(batch, rows.x / SHARED);
    let tail = keys_of(batch, (rows.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 31u) / 32u;
    let steps = near + (max(tail.w, head.z) - head.z + 31u) / 32u;
    for (var step = 0u; step < steps; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 32u, head.z + (step - near) * 32u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        let r = select(0u, 2u, far);
        let low = vec4<u32>(seen[0][r], seen[1][r], seen[2][r], seen[3][r]);
        let high = vec4<u32>(seen[0][r + 1u], seen[1][r + 1u], seen[2][r + 1u], seen[3][r + 1u]);
        let kx = key_at(batch, kv_head, min(quad_of(first + t / 8u, 16u), vec4<u32>(last)));
        var ds = products_of(false, t, staged, kx);
        let g = products_of(true, t, staged, kx);
        for (var c = 0u; c < 4u; c += 1u) {
            let key = vec4<u32>(first + t % 8u + 8u * c);
            let weight = exp(ds[c] * p.scale - lse) * (g[c] - dots);
            ds[c] = select(vec4<f32>(), weight, (key >= low) & (key < high));
        }
        workgroupBarrier();
        keep(t, ds);
        for (var d = 0u; d < H4; d += 8u) {
            let quad = min(d + t % 8u, H4 - 1u);
            workgroupBarrier();
            tile[STAGED + t] = k[kx.x * H4 + quad];
            tile[STAGED + t + 128u] = k[kx.y * H4 + quad];
            workgroupBarrier();
            sum[d / 8u] = weighted(sum[d / 8u], t);
        }
    }
    for (var r = 0u; r < 4u; r += 1u) {
        let is_row = rows.x + t / 8u * 4u + r < rows.y;
        for (var d = t % 8u; d < H4 && is_row; d += 8u) {
            dq[at[r] * H4 + d] = sum[d / 8u][r] * p.scale;
        }
    }
}

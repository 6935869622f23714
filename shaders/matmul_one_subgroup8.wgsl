// matmul_one_subgroup8: y[n] = sum_k a[k] w[n, k], one row, for subgroups of 8
// a         [M, K]
// w         [N, K]; any weight type
// r         [M, N], added to the product with ONTO 2
// g         [K], with NORMED: a is normed under it first
// y         [M, N], added to with ONTO 1
// dispatch  (N / 32, M), with GATED (N / 16, M): a workgroup is one subgroup; K a multiple of 8
// Lane i makes columns i, 8 + i, 16 + i and 24 + i. It loads k = i of eight k and hands it round.
#import weight
#import few
struct Params { m: u32, n: u32, k: u32, w_row: u32, y_from: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [M, K]
@group(0) @binding(2) var<storage, read> w: array<Weight>;      // [N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;         // [M, N]
@group(0) @binding(4) var<storage, read> g: array<f32>;         // [K]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;   // [M, N]

var<private> squares: f32;
var<private> total: f32;   // of the lane's elements in this block

// Eight k of one column: x are the row's elements, v the column's.
fn dot8(x: mat2x4<f32>, v: mat2x4<f32>, sum: f32) -> f32 {
    let first = fma(x[0].w, v[0].w, fma(x[0].z, v[0].z, fma(x[0].y, v[0].y, fma(x[0].x, v[0].x, sum))));
    return fma(x[1].w, v[1].w, fma(x[1].z, v[1].z, fma(x[1].y, v[1].y, fma(x[1].x, v[1].x, first))));
}

// Eight k of the four columns n.
fn step(row: u32, lane: u32, factor: f32, oct: u32, n: vec4<u32>, sum: vec4<f32>) -> vec4<f32> {
    let k = 8u * oct + lane;
    var x = a[row + k];
    if NORMED == 1u {
        squares = fma(x, x, squares);
        x *= g[k];
    }
    if MINIMA {
        total += x;
    }
    x *= factor;
    let all = mat2x4<f32>(
        subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u),
        subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), subgroupBroadcast(x, 6u), subgroupBroadcast(x, 7u),
    );
    return vec4<f32>(
        dot8(all, weight8_raw(n.x, p.k, oct), sum.x),
        dot8(all, weight8_raw(n.y, p.k, oct), sum.y),
        dot8(all, weight8_raw(n.z, p.k, oct), sum.z),
        dot8(all, weight8_raw(n.w, p.k, oct), sum.w),
    );
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let column = vec4<u32>(0u, 8u, 16u, 24u) + group.x * select(32u, 16u, GATED == 1u) + lane;
    // Lanes past the edge repeat the last column: every lane must take part in the broadcasts.
    let inside = min(column, vec4<u32>(p.n - 1u));
    let n = select(inside, vec4<u32>(inside.xy, inside.xy + p.n), GATED == 1u) + p.w_row;
    let row = group.y * p.k;
    let factor = raw_factor(lane);
    let blocks = p.k / 32u;
    var sum = vec4<f32>();
    for (var block = 0u; block < blocks; block += 1u) {
        let oct = 4u * block;
        total = 0.0;
        var raw = step(row, lane, factor, oct, n, vec4<f32>());
        raw = step(row, lane, factor, oct + 1u, n, raw);
        raw = step(row, lane, factor, oct + 2u, n, raw);
        raw = step(row, lane, factor, oct + 3u, n, raw);
        let s = transpose(mat4x2<f32>(
            weight_scale(n.x, p.k, block), weight_scale(n.y, p.k, block),
            weight_scale(n.z, p.k, block), weight_scale(n.w, p.k, block),
        ));
        sum = fma(raw, s[0], sum);
        if MINIMA {
            sum = fma(vec4<f32>(subgroupAdd(total)), s[1], sum);
        }
    }
    // What is no whole block has no scale either.
    for (var oct = 4u * blocks; oct < p.k / 8u; oct += 1u) {
        sum = step(row, lane, factor, oct, n, sum);
    }
    if NORMED == 1u {
        sum *= norm_scale(vec4<f32>(subgroupAdd(squares)));
    }
    if GATED == 1u {
        put(group.y, column.x, gated(sum.x, sum.z));
        put(group.y, column.y, gated(sum.y, sum.w));
    } else {
        put(group.y, column.x, sum.x);
        put(group.y, column.y, sum.y);
        put(group.y, column.z, sum.z);
        put(group.y, column.w, sum.w);
    }
}

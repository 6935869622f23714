// matmul_one_subgroup8: y[n] = sum_k a[k] w[n, k], one row, for subgroups of 8
// a         [M, K]
// w         [N, K]; any weight type
// r         [M, N], added to the product with ONTO 2
// y         [M, N], added to with ONTO 1
// dispatch  (N / 32, M): a workgroup is one subgroup; K a multiple of 8
// Lane i makes columns i, 8 + i, 16 + i and 24 + i. It loads k = i of eight k and hands it round.
#import weight
override ONTO: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [M, K]
@group(0) @binding(2) var<storage, read> w: array<Weight>;      // [N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;         // [M, N]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;   // [M, N]

// Eight k of one column: x are the row's elements, v the column's.
fn dot8(x: mat2x4<f32>, v: mat2x4<f32>, sum: f32) -> f32 {
    let first = fma(x[0].w, v[0].w, fma(x[0].z, v[0].z, fma(x[0].y, v[0].y, fma(x[0].x, v[0].x, sum))));
    return fma(x[1].w, v[1].w, fma(x[1].z, v[1].z, fma(x[1].y, v[1].y, fma(x[1].x, v[1].x, first))));
}

// Eight k of the four columns n, whose scales are the rows of s.
fn step(x: f32, oct: u32, n: vec4<u32>, s: mat4x2<f32>, sum: vec4<f32>) -> vec4<f32> {
    let all = mat2x4<f32>(
        subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u),
        subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), subgroupBroadcast(x, 6u), subgroupBroadcast(x, 7u),
    );
    return vec4<f32>(
        dot8(all, weight8_scaled(n.x, p.k, oct, s[0]), sum.x),
        dot8(all, weight8_scaled(n.y, p.k, oct, s[1]), sum.y),
        dot8(all, weight8_scaled(n.z, p.k, oct, s[2]), sum.z),
        dot8(all, weight8_scaled(n.w, p.k, oct, s[3]), sum.w),
    );
}

fn put(at: u32, value: f32) {
    if ONTO == 0u {
        y[at] = value;
    } else if ONTO == 1u {
        y[at] += value;
    } else {
        y[at] = r[at] + value;
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let column = vec4<u32>(0u, 8u, 16u, 24u) + group.x * 32u + lane;
    // Lanes past the edge repeat the last column: every lane must take part in the broadcasts.
    let n = min(column, vec4<u32>(p.n - 1u)) + p.w_row;
    let row = group.y * p.k + lane;
    let blocks = p.k / 32u;
    var sum = vec4<f32>();
    for (var block = 0u; block < blocks; block += 1u) {
        let s = mat4x2<f32>(
            weight_scale(n.x, p.k, block), weight_scale(n.y, p.k, block),
            weight_scale(n.z, p.k, block), weight_scale(n.w, p.k, block),
        );
        let k = row + 32u * block;
        sum = step(a[k], 4u * block, n, s, sum);
        sum = step(a[k + 8u], 4u * block + 1u, n, s, sum);
        sum = step(a[k + 16u], 4u * block + 2u, n, s, sum);
        sum = step(a[k + 24u], 4u * block + 3u, n, s, sum);
    }
    // What is no whole block has no scale either.
    for (var oct = 4u * blocks; oct < p.k / 8u; oct += 1u) {
        sum = step(a[row + 8u * oct], oct, n, mat4x2<f32>(), sum);
    }
    let at = p.y_from + group.y * p.n + column;
    if column.x < p.n {
        put(at.x, sum.x);
    }
    if column.y < p.n {
        put(at.y, sum.y);
    }
    if column.z < p.n {
        put(at.z, sum.z);
    }
    if column.w < p.n {
        put(at.w, sum.w);
    }
}

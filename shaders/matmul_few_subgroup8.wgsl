// matmul_few_subgroup8: y[m, n] = sum_k a[m, k] w[n, k] for a few rows and subgroups of 8; one pass over w
// a         [M, K]
// w         [N, K]; any weight type
// r         [M, N], added to the product with ONTO 2
// y         [M, N], added to with ONTO 1
// dispatch  (N / 16, M / (4 QUADS)): a workgroup is one subgroup; K a multiple of 8
// Lane i makes columns i and 8 + i. It loads k = i of eight k for four rows at once and hands it round.
#import weight
override QUADS: u32 = 1u;
override ONTO: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [M, K]
@group(0) @binding(2) var<storage, read> w: array<Weight>;      // [N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;         // [M, N]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;   // [M, N]

var<private> low: array<vec4<f32>, 4>;    // [row quad], column i
var<private> high: array<vec4<f32>, 4>;   // [row quad], column 8 + i

// Eight k of four rows; x holds the rows' elements at k = lane.
fn eight(q: u32, x: vec4<f32>, l: mat2x4<f32>, h: mat2x4<f32>) {
    let x0 = subgroupBroadcast(x, 0u);
    let x1 = subgroupBroadcast(x, 1u);
    let x2 = subgroupBroadcast(x, 2u);
    let x3 = subgroupBroadcast(x, 3u);
    let x4 = subgroupBroadcast(x, 4u);
    let x5 = subgroupBroadcast(x, 5u);
    let x6 = subgroupBroadcast(x, 6u);
    let x7 = subgroupBroadcast(x, 7u);
    let lows = fma(x3, vec4(l[0].w), fma(x2, vec4(l[0].z), fma(x1, vec4(l[0].y), fma(x0, vec4(l[0].x), low[q]))));
    let highs = fma(x3, vec4(h[0].w), fma(x2, vec4(h[0].z), fma(x1, vec4(h[0].y), fma(x0, vec4(h[0].x), high[q]))));
    low[q] = fma(x7, vec4(l[1].w), fma(x6, vec4(l[1].z), fma(x5, vec4(l[1].y), fma(x4, vec4(l[1].x), lows))));
    high[q] = fma(x7, vec4(h[1].w), fma(x6, vec4(h[1].z), fma(x5, vec4(h[1].y), fma(x4, vec4(h[1].x), highs))));
}

fn load_a(first: u32, k: u32) -> vec4<f32> {
    let rows = min(vec4<u32>(first) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.m - 1u)) * p.k + k;
    return vec4<f32>(a[rows.x], a[rows.y], a[rows.z], a[rows.w]);
}

// Eight k of all rows and both columns, whose scales are ls and hs.
fn step(first: u32, oct: u32, lane: u32, columns: vec2<u32>, ls: vec2<f32>, hs: vec2<f32>) {
    let l = weight8_scaled(columns.x, p.k, oct, ls);
    let h = weight8_scaled(columns.y, p.k, oct, hs);
    let k = 8u * oct + lane;
    eight(0u, load_a(first, k), l, h);
    if QUADS > 1u {
        eight(1u, load_a(first + 4u, k), l, h);
    }
    if QUADS > 2u {
        eight(2u, load_a(first + 8u, k), l, h);
        eight(3u, load_a(first + 12u, k), l, h);
    }
}

fn put(row: u32, column: u32, value: f32) {
    if row < p.m && column < p.n {
        let at = p.y_from + row * p.n + column;
        if ONTO == 0u {
            y[at] = value;
        } else if ONTO == 1u {
            y[at] += value;
        } else {
            y[at] = r[at] + value;
        }
    }
}

fn store(row: u32, column: u32, value: vec4<f32>) {
    put(row, column, value.x);
    put(row + 1u, column, value.y);
    put(row + 2u, column, value.z);
    put(row + 3u, column, value.w);
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let column = group.x * 16u + lane;
    let first = group.y * 4u * QUADS;
    // Lanes past the edge repeat the last row or column: every lane must take part in the broadcasts.
    let columns = min(vec2<u32>(column, column + 8u), vec2<u32>(p.n - 1u)) + p.w_row;
    let blocks = p.k / 32u;
    for (var block = 0u; block < blocks; block += 1u) {
        let ls = weight_scale(columns.x, p.k, block);
        let hs = weight_scale(columns.y, p.k, block);
        let oct = 4u * block;
        step(first, oct, lane, columns, ls, hs);
        step(first, oct + 1u, lane, columns, ls, hs);
        step(first, oct + 2u, lane, columns, ls, hs);
        step(first, oct + 3u, lane, columns, ls, hs);
    }
    // What is no whole block has no scale either.
    for (var oct = 4u * blocks; oct < p.k / 8u; oct += 1u) {
        step(first, oct, lane, columns, vec2<f32>(), vec2<f32>());
    }
    store(first, column, low[0]);
    store(first, column + 8u, high[0]);
    if QUADS > 1u {
        store(first + 4u, column, low[1]);
        store(first + 4u, column + 8u, high[1]);
    }
    if QUADS > 2u {
        store(first + 8u, column, low[2]);
        store(first + 8u, column + 8u, high[2]);
        store(first + 12u, column, low[3]);
        store(first + 12u, column + 8u, high[3]);
    }
}

// matmul_few_subgroup8: y[m, n] = sum_k a[m, k] w[n, k] for a few rows and subgroups of 8; one pass over w
// a         [M, K]
// w         [N, K]; any weight type
// r         [M, N], added to the product with ONTO 2
// g         [K], with NORMED: a is normed under it first
// y         [M, N], added to with ONTO 1
// dispatch  (N / 16, M / (4 QUADS)), with GATED (N / 8, ..): a workgroup is one subgroup; K a multiple of 8
// Lane i makes columns i and 8 + i. It loads k = i of eight k for four rows at once and hands it round.
#import weight
#import few
override QUADS: u32 = 1u;
struct Params { m: u32, n: u32, k: u32, w_row: u32, y_from: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [M, K]
@group(0) @binding(2) var<storage, read> w: array<Weight>;      // [N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;         // [M, N]
@group(0) @binding(4) var<storage, read> g: array<f32>;         // [K]
@group(0) @binding(5) var<storage, read_write> y: array<f32>;   // [M, N]

// By row quad: sums of columns i and 8 + i, the same of one block as the weight type has it, and what the norm and the
// blocks' minima need.
var<private> low: array<vec4<f32>, 4>;
var<private> high: array<vec4<f32>, 4>;
var<private> raw_low: array<vec4<f32>, 4>;
var<private> raw_high: array<vec4<f32>, 4>;
var<private> squares: array<vec4<f32>, 4>;
var<private> total: array<vec4<f32>, 4>;

fn four(sum: vec4<f32>, x: mat4x4<f32>, w: vec4<f32>) -> vec4<f32> {
    return fma(x[3], vec4(w.w), fma(x[2], vec4(w.z), fma(x[1], vec4(w.y), fma(x[0], vec4(w.x), sum))));
}

// Eight k of four rows; x holds the rows' elements at k = lane.
fn eight(q: u32, x: vec4<f32>, l: mat2x4<f32>, h: mat2x4<f32>) {
    let u = mat4x4<f32>(
        subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u),
    );
    let v = mat4x4<f32>(
        subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), subgroupBroadcast(x, 6u), subgroupBroadcast(x, 7u),
    );
    raw_low[q] = four(four(raw_low[q], u, l[0]), v, l[1]);
    raw_high[q] = four(four(raw_high[q], u, h[0]), v, h[1]);
}

fn load_a(q: u32, first: u32, k: u32) -> vec4<f32> {
    let row = vec4<u32>(0u, 1u, 2u, 3u) + first + 4u * q;
    let rows = min(row, vec4<u32>(p.m - 1u)) * p.k + k;
    var x = vec4<f32>(a[rows.x], a[rows.y], a[rows.z], a[rows.w]);
    if NORMED == 1u {
        squares[q] = fma(x, x, squares[q]);
        x *= g[k];
    }
    if MINIMA {
        total[q] += x;
    }
    return x;
}

// Eight k of all rows and both columns.
fn step(first: u32, oct: u32, lane: u32, factor: f32, columns: vec2<u32>) {
    let l = weight8_raw(columns.x, p.k, oct);
    let h = weight8_raw(columns.y, p.k, oct);
    let k = 8u * oct + lane;
    eight(0u, load_a(0u, first, k) * factor, l, h);
    if QUADS > 1u {
        eight(1u, load_a(1u, first, k) * factor, l, h);
    }
    if QUADS > 2u {
        eight(2u, load_a(2u, first, k) * factor, l, h);
        eight(3u, load_a(3u, first, k) * factor, l, h);
    }
}

// Ends a block of four rows; ls and hs are the columns' scales.
fn scale_quad(q: u32, ls: vec2<f32>, hs: vec2<f32>) {
    low[q] = fma(raw_low[q], vec4(ls.x), low[q]);
    high[q] = fma(raw_high[q], vec4(hs.x), high[q]);
    if MINIMA {
        let sum = subgroupAdd(total[q]);
        low[q] = fma(sum, vec4(ls.y), low[q]);
        high[q] = fma(sum, vec4(hs.y), high[q]);
        total[q] = vec4<f32>();
    }
    raw_low[q] = vec4<f32>();
    raw_high[q] = vec4<f32>();
}

fn scale_block(ls: vec2<f32>, hs: vec2<f32>) {
    scale_quad(0u, ls, hs);
    if QUADS > 1u {
        scale_quad(1u, ls, hs);
    }
    if QUADS > 2u {
        scale_quad(2u, ls, hs);
        scale_quad(3u, ls, hs);
    }
}

// Four rows of the lane's columns.
fn store(q: u32, first: u32, column: u32) {
    let row = first + 4u * q;
    var scale = vec4<f32>(1.0);
    if NORMED == 1u {
        scale = norm_scale(subgroupAdd(squares[q]));
    }
    var l = low[q] * scale;
    let h = high[q] * scale;
    if GATED == 1u {
        l = vec4<f32>(gated(l.x, h.x), gated(l.y, h.y), gated(l.z, h.z), gated(l.w, h.w));
    } else {
        put_quad(row, column + 8u, h);
    }
    put_quad(row, column, l);
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let column = group.x * select(16u, 8u, GATED == 1u) + lane;
    let first = group.y * 4u * QUADS;
    // Lanes past the edge repeat the last row or column: all must take part in the broadcasts.
    let inside = min(vec2<u32>(column, column + 8u), vec2<u32>(p.n - 1u));
    let columns = select(inside, vec2<u32>(inside.x, inside.x + p.n), GATED == 1u) + p.w_row;
    let blocks = p.k / 32u;
    let factor = raw_factor(lane);
    for (var block = 0u; block < blocks; block += 1u) {
        let oct = 4u * block;
        step(first, oct, lane, factor, columns);
        step(first, oct + 1u, lane, factor, columns);
        step(first, oct + 2u, lane, factor, columns);
        step(first, oct + 3u, lane, factor, columns);
        scale_block(weight_scale(columns.x, p.k, block), weight_scale(columns.y, p.k, block));
    }
    // What is no whole block has no scale either.
    for (var oct = 4u * blocks; oct < p.k / 8u; oct += 1u) {
        step(first, oct, lane, factor, columns);
    }
    scale_block(vec2<f32>(1.0, 0.0), vec2<f32>(1.0, 0.0));
    store(0u, first, column);
    if QUADS > 1u {
        store(1u, first, column);
    }
    if QUADS > 2u {
        store(2u, first, column);
        store(3u, first, column);
    }
}

// matmul_few: y[m, n] = sum_k a[m, k] w[n, k] for up to sixteen rows, as decoding has; one pass over the weights
// a         [M, K]
// w         [N, K]; any weight type
// r         [M, N], added to the product with ONTO 2
// g         [K], with NORMED: a is normed under it first
// y         [M, N], added to with ONTO 1
// dispatch  (N / 4, M / 16), with GATED (N / 2, ..): 64 lanes share K; K a multiple of 8
// shared    64 partial sums of 64 outputs, 16 KiB
#import weight
#import few
override ROWS: u32 = 16u;   // how many of the sixteen rows there are, rounded up to a power of two
struct Params { m: u32, n: u32, k: u32, w_row: u32, y_from: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;         // [M, K], flat quads
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;               // [M, N]
@group(0) @binding(4) var<storage, read> g: array<vec4<f32>>;         // [K], quads
@group(0) @binding(5) var<storage, read_write> y: array<f32>;         // [M, N]

var<workgroup> partial: array<vec4<f32>, 1024>;   // [64 lanes, 16 rows], a column quad each
var<private> squares: array<f32, 16>;
var<private> norm: mat2x4<f32>;                   // eight k of g

// What row first + i adds to its four columns: eight k.
fn dots(first: u32, i: u32, oct: u32, w0: mat2x4<f32>, w1: mat2x4<f32>, w2: mat2x4<f32>, w3: mat2x4<f32>) -> vec4<f32> {
    let at = min(first + i, p.m - 1u) * (p.k / 4u) + 2u * oct;
    var x = a[at];
    var z = a[at + 1u];
    if NORMED == 1u {
        squares[i] += dot(x, x) + dot(z, z);
        x *= norm[0];
        z *= norm[1];
    }
    return vec4<f32>(dot(x, w0[0]), dot(x, w1[0]), dot(x, w2[0]), dot(x, w3[0]))
        + vec4<f32>(dot(z, w0[1]), dot(z, w1[1]), dot(z, w2[1]), dot(z, w3[1]));
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = group.y * 16u;
    let column = group.x * select(4u, 2u, GATED == 1u);
    // Rows and columns past the edge repeat the last one; they are not stored.
    let inside = min(vec4<u32>(column, column + 1u, column + 2u, column + 3u), vec4<u32>(p.n - 1u));
    let n = select(inside, vec4<u32>(inside.xy, inside.xy + p.n), GATED == 1u) + p.w_row;
    var y0 = vec4<f32>();
    var y1 = vec4<f32>();
    var y2 = vec4<f32>();
    var y3 = vec4<f32>();
    var y4 = vec4<f32>();
    var y5 = vec4<f32>();
    var y6 = vec4<f32>();
    var y7 = vec4<f32>();
    var y8 = vec4<f32>();
    var y9 = vec4<f32>();
    var y10 = vec4<f32>();
    var y11 = vec4<f32>();
    var y12 = vec4<f32>();
    var y13 = vec4<f32>();
    var y14 = vec4<f32>();
    var y15 = vec4<f32>();
    for (var oct = lane; oct < p.k / 8u; oct += 64u) {
        let w0 = weight8(n.x, p.k, oct);
        let w1 = weight8(n.y, p.k, oct);
        let w2 = weight8(n.z, p.k, oct);
        let w3 = weight8(n.w, p.k, oct);
        if NORMED == 1u {
            norm = mat2x4<f32>(g[2u * oct], g[2u * oct + 1u]);
        }
        y0 += dots(first, 0u, oct, w0, w1, w2, w3);
        if ROWS > 1u {
            y1 += dots(first, 1u, oct, w0, w1, w2, w3);
        }
        if ROWS > 2u {
            y2 += dots(first, 2u, oct, w0, w1, w2, w3);
            y3 += dots(first, 3u, oct, w0, w1, w2, w3);
        }
        if ROWS > 4u {
            y4 += dots(first, 4u, oct, w0, w1, w2, w3);
            y5 += dots(first, 5u, oct, w0, w1, w2, w3);
            y6 += dots(first, 6u, oct, w0, w1, w2, w3);
            y7 += dots(first, 7u, oct, w0, w1, w2, w3);
        }
        if ROWS > 8u {
            y8 += dots(first, 8u, oct, w0, w1, w2, w3);
            y9 += dots(first, 9u, oct, w0, w1, w2, w3);
            y10 += dots(first, 10u, oct, w0, w1, w2, w3);
            y11 += dots(first, 11u, oct, w0, w1, w2, w3);
            y12 += dots(first, 12u, oct, w0, w1, w2, w3);
            y13 += dots(first, 13u, oct, w0, w1, w2, w3);
            y14 += dots(first, 14u, oct, w0, w1, w2, w3);
            y15 += dots(first, 15u, oct, w0, w1, w2, w3);
        }
    }
    partial[lane * 16u] = y0;
    partial[lane * 16u + 1u] = y1;
    partial[lane * 16u + 2u] = y2;
    partial[lane * 16u + 3u] = y3;
    partial[lane * 16u + 4u] = y4;
    partial[lane * 16u + 5u] = y5;
    partial[lane * 16u + 6u] = y6;
    partial[lane * 16u + 7u] = y7;
    partial[lane * 16u + 8u] = y8;
    partial[lane * 16u + 9u] = y9;
    partial[lane * 16u + 10u] = y10;
    partial[lane * 16u + 11u] = y11;
    partial[lane * 16u + 12u] = y12;
    partial[lane * 16u + 13u] = y13;
    partial[lane * 16u + 14u] = y14;
    partial[lane * 16u + 15u] = y15;
    workgroupBarrier();
    // Four lanes a row, and each takes one of its four sums.
    var sum = vec4<f32>();
    for (var i = 0u; i < 64u; i += 1u) {
        sum += partial[i * 16u + lane / 4u];
    }
    if NORMED == 1u {
        workgroupBarrier();
        for (var i = 0u; i < ROWS; i += 1u) {
            partial[lane * 16u + i].x = squares[i];
        }
        workgroupBarrier();
        var total = 0.0;
        for (var i = 0u; i < 64u; i += 1u) {
            total += partial[i * 16u + lane / 4u].x;
        }
        sum *= norm_scale(vec4<f32>(total));
    }
    let row = first + lane / 4u;
    let c = lane % 4u;
    if GATED == 0u {
        put(row, column + c, sum[c]);
    } else if c < 2u {
        put(row, column + c, gated(sum[c], sum[c + 2u]));
    }
}

// matmul_subgroup8: y[m, n] = sum_k a(m, k) w(k, n) for subgroups of 8, as software adapters have
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// w         [Z, K, N], or [Z, N, K] with W_TRANSPOSED; any weight type
// r         [Z, M, N], added to the product with ONTO 2
// y         [Z, M, N], added to with ONTO 1
// dispatch  (N / 64, M / 32, Z): a workgroup is one subgroup; K, N and (transposed) M multiples of 4
// On a CPU loads, and stores of sums that do not fit its registers, decide. Each lane loads another four
// elements of a and hands them round; a sum is read and written once for four k.
#import weight
#import swizzle
override A_TRANSPOSED: u32 = 0u;
override W_TRANSPOSED: u32 = 0u;
override ONTO: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;         // [Z, M, K / 4] or [Z, K, M / 4]
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [Z, K, N] or [Z, N, K]
@group(0) @binding(3) var<storage, read> r: array<vec4<f32>>;         // [Z, M, N / 4]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;   // [Z, M, N / 4]

var<private> left: array<vec4<f32>, 32>;    // columns 4 lane .. 4 lane + 3 of the first 32
var<private> right: array<vec4<f32>, 32>;   // of the second 32

// Four k of one row: s holds the row's elements of a, l and h column quads of w, a k each.
fn row(i: u32, s: vec4<f32>, l: mat4x4<f32>, h: mat4x4<f32>) {
    left[i] = fma(vec4(s.w), l[3], fma(vec4(s.z), l[2], fma(vec4(s.y), l[1], fma(vec4(s.x), l[0], left[i]))));
    right[i] = fma(vec4(s.w), h[3], fma(vec4(s.z), h[2], fma(vec4(s.y), h[1], fma(vec4(s.x), h[0], right[i]))));
}

// Lane j holds four k of row i + j in x.
fn eight(i: u32, x: vec4<f32>, l: mat4x4<f32>, h: mat4x4<f32>) {
    row(i, subgroupBroadcast(x, 0u), l, h);
    row(i + 1u, subgroupBroadcast(x, 1u), l, h);
    row(i + 2u, subgroupBroadcast(x, 2u), l, h);
    row(i + 3u, subgroupBroadcast(x, 3u), l, h);
    row(i + 4u, subgroupBroadcast(x, 4u), l, h);
    row(i + 5u, subgroupBroadcast(x, 5u), l, h);
    row(i + 6u, subgroupBroadcast(x, 6u), l, h);
    row(i + 7u, subgroupBroadcast(x, 7u), l, h);
}

fn load_a(z: u32, rows: vec4<u32>, k: u32) -> mat4x4<f32> {
    let at = z * p.a_z / 4u;
    if A_TRANSPOSED == 1u {
        // A column quad of four k: transposed, lane i holds rows 4 i .. 4 i + 3.
        let m4 = p.m / 4u;
        let start = at + 4u * k * m4 + rows.x;
        return transpose(mat4x4<f32>(a[start], a[start + m4], a[start + 2u * m4], a[start + 3u * m4]));
    }
    let quads = at + rows * (p.k / 4u) + k;
    return mat4x4<f32>(a[quads.x], a[quads.y], a[quads.z], a[quads.w]);
}

fn load_w(first: u32, column: u32, k: u32) -> mat4x4<f32> {
    if W_TRANSPOSED == 1u {
        let row = first + column;
        return transpose(mat4x4<f32>(
            weight4(row, p.k, k), weight4(row + 1u, p.k, k), weight4(row + 2u, p.k, k), weight4(row + 3u, p.k, k),
        ));
    }
    let row = first + 4u * k;
    let quad = column / 4u;
    return mat4x4<f32>(
        weight4(row, p.n, quad), weight4(row + 1u, p.n, quad), weight4(row + 2u, p.n, quad), weight4(row + 3u, p.n, quad),
    );
}

fn put(row: u32, column: u32, z: u32, value: vec4<f32>) {
    if row < p.m && column < p.n {
        let at = (p.y_from + (z * p.m + row) * p.n + column) / 4u;
        if ONTO == 0u {
            y[at] = value;
        } else if ONTO == 1u {
            y[at] += value;
        } else {
            y[at] = r[at] + value;
        }
    }
}

// Rows i .. i + 7 of the tile. In the text, not in a loop: an array indexed by a variable would live in memory.
fn store_eight(group: vec3<u32>, column: u32, i: u32) {
    store(group, column, i, left[i], right[i]);
    store(group, column, i + 1u, left[i + 1u], right[i + 1u]);
    store(group, column, i + 2u, left[i + 2u], right[i + 2u]);
    store(group, column, i + 3u, left[i + 3u], right[i + 3u]);
    store(group, column, i + 4u, left[i + 4u], right[i + 4u]);
    store(group, column, i + 5u, left[i + 5u], right[i + 5u]);
    store(group, column, i + 6u, left[i + 6u], right[i + 6u]);
    store(group, column, i + 7u, left[i + 7u], right[i + 7u]);
}

fn store(group: vec3<u32>, column: u32, i: u32, l: vec4<f32>, h: vec4<f32>) {
    // The row's place in the tile, in the order that `load_a` gave the lanes.
    let row = group.y * 32u + select(i, 4u * (i % 8u) + i / 8u, A_TRANSPOSED == 1u);
    put(row, column, group.z, l);
    put(row, column + 32u, group.z, h);
}

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) place: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // Down the rows first, so that w is read from afar once. A transposed a is a derivative's: its sums are short, and
    // rows of y written one after the other count for more.
    let tile = select(swizzle(place.xy, grid.xy), place.xy, A_TRANSPOSED == 1u);
    let group = vec3<u32>(tile, place.z);
    // Lanes past the edge repeat the last row or column: every lane must take part in the broadcasts.
    let column = group.x * 64u + lane * 4u;
    let columns = min(vec2<u32>(column, column + 32u), vec2<u32>(p.n - 4u));
    let first = group.y * 32u;
    var rows = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(p.m - 1u));
    if A_TRANSPOSED == 1u {
        rows = vec4<u32>(min(first / 4u + lane, p.m / 4u - 1u));
    }
    let origin = group.z * p.w_z + p.w_row;
    for (var k = 0u; k < p.k / 4u; k += 1u) {
        let x = load_a(group.z, rows, k);
        let l = load_w(origin, columns.x, k);
        let h = load_w(origin, columns.y, k);
        eight(0u, x[0], l, h);
        eight(8u, x[1], l, h);
        eight(16u, x[2], l, h);
        eight(24u, x[3], l, h);
    }
    store_eight(group, column, 0u);
    store_eight(group, column, 8u);
    store_eight(group, column, 16u);
    store_eight(group, column, 24u);
}

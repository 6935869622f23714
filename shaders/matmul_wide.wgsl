// matmul_wide: y[m, n] = sum_k a(m, k) w(k, n), 128 x 128 outputs a workgroup, 8 x 8 an invocation
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// w         [Z, K, N], or [Z, N, K] with W_TRANSPOSED; any weight type
// r         [Z, M, N], added to the product with ONTO 2
// y         [Z, M, N], added to with ONTO 1; [slices, M, N] with SLICED
// dispatch  (N / 128, M / 128, Z or slices); the contiguous extents of a and w, K and N are multiples of 4
// shared    two 16 x 128 tiles, k outermost, 16 KiB
// For large products on GPUs with registers to spare: twice the arithmetic for each value read as `matmul`.
#import weight
#import swizzle
#import matmul
#import stage
const QUADS: u32 = 32u;
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;         // [Z, M, K] or [Z, K, M], flat quads
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [Z, K, N] or [Z, N, K]
@group(0) @binding(3) var<storage, read> r: array<vec4<f32>>;         // [Z, M, N], flat quads
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;   // [Z, M, N], flat quads

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let first = 128u * swizzle(group.xy, groups.xy);
    let range = k_range(group.z);
    // Row quads m and 16 + m, column quads n and 16 + n: lanes side by side read side by side.
    let m = t / 16u;
    let n = t % 16u;
    var l0 = vec4<f32>();
    var h0 = vec4<f32>();
    var l1 = vec4<f32>();
    var h1 = vec4<f32>();
    var l2 = vec4<f32>();
    var h2 = vec4<f32>();
    var l3 = vec4<f32>();
    var h3 = vec4<f32>();
    var l4 = vec4<f32>();
    var h4 = vec4<f32>();
    var l5 = vec4<f32>();
    var h5 = vec4<f32>();
    var l6 = vec4<f32>();
    var h6 = vec4<f32>();
    var l7 = vec4<f32>();
    var h7 = vec4<f32>();
    for (var k = range.x; k < range.y; k += 16u) {
        load(t, first, k, range.y, group.z);
        workgroupBarrier();
        for (var i = 0u; i < 16u; i += 1u) {
            let a0 = tile_a[i * 32u + m];
            let a1 = tile_a[i * 32u + 16u + m];
            let w0 = tile_w[i * 32u + n];
            let w1 = tile_w[i * 32u + 16u + n];
            l0 = fma(vec4<f32>(a0.x), w0, l0);
            h0 = fma(vec4<f32>(a0.x), w1, h0);
            l1 = fma(vec4<f32>(a0.y), w0, l1);
            h1 = fma(vec4<f32>(a0.y), w1, h1);
            l2 = fma(vec4<f32>(a0.z), w0, l2);
            h2 = fma(vec4<f32>(a0.z), w1, h2);
            l3 = fma(vec4<f32>(a0.w), w0, l3);
            h3 = fma(vec4<f32>(a0.w), w1, h3);
            l4 = fma(vec4<f32>(a1.x), w0, l4);
            h4 = fma(vec4<f32>(a1.x), w1, h4);
            l5 = fma(vec4<f32>(a1.y), w0, l5);
            h5 = fma(vec4<f32>(a1.y), w1, h5);
            l6 = fma(vec4<f32>(a1.z), w0, l6);
            h6 = fma(vec4<f32>(a1.z), w1, h6);
            l7 = fma(vec4<f32>(a1.w), w0, l7);
            h7 = fma(vec4<f32>(a1.w), w1, h7);
        }
        workgroupBarrier();
    }
    let row = first.y + 4u * m;
    let column = first.x + 4u * n;
    put(group.z, row, column, l0);
    put(group.z, row, column + 64u, h0);
    put(group.z, row + 1u, column, l1);
    put(group.z, row + 1u, column + 64u, h1);
    put(group.z, row + 2u, column, l2);
    put(group.z, row + 2u, column + 64u, h2);
    put(group.z, row + 3u, column, l3);
    put(group.z, row + 3u, column + 64u, h3);
    put(group.z, row + 64u, column, l4);
    put(group.z, row + 64u, column + 64u, h4);
    put(group.z, row + 65u, column, l5);
    put(group.z, row + 65u, column + 64u, h5);
    put(group.z, row + 66u, column, l6);
    put(group.z, row + 66u, column + 64u, h6);
    put(group.z, row + 67u, column, l7);
    put(group.z, row + 67u, column + 64u, h7);
}

// matmul: y[m, n] = sum_k a(m, k) w(k, n), 64 x 64 outputs a workgroup, 4 x 4 an invocation
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// w         [Z, K, N], or [Z, N, K] with W_TRANSPOSED; any weight type
// r         [Z, M, N], added to the product with ONTO 2
// y         [Z, M, N], added to with ONTO 1; [slices, M, N] with SLICED
// dispatch  (N / 64, M / 64, Z or slices); the contiguous extents of a and w, K and N are multiples of 4
// shared    two 32 x 64 tiles, k outermost, 16 KiB
#import weight
#import swizzle
#import matmul
#import stage
const QUADS: u32 = 16u;
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
    let first = 64u * swizzle(group.xy, groups.xy);
    let range = k_range(group.z);
    let m = t / 16u;
    let n = t % 16u;
    var y0 = vec4<f32>();
    var y1 = vec4<f32>();
    var y2 = vec4<f32>();
    var y3 = vec4<f32>();
    for (var k = range.x; k < range.y; k += 32u) {
        load(t, first, k, range.y, group.z);
        workgroupBarrier();
        for (var i = 0u; i < 32u; i += 1u) {
            let av = tile_a[i * 16u + m];
            let wv = tile_w[i * 16u + n];
            y0 = fma(vec4<f32>(av.x), wv, y0);
            y1 = fma(vec4<f32>(av.y), wv, y1);
            y2 = fma(vec4<f32>(av.z), wv, y2);
            y3 = fma(vec4<f32>(av.w), wv, y3);
        }
        workgroupBarrier();
    }
    let row = first.y + 4u * m;
    let column = first.x + 4u * n;
    put(group.z, row, column, y0);
    put(group.z, row + 1u, column, y1);
    put(group.z, row + 2u, column, y2);
    put(group.z, row + 3u, column, y3);
}

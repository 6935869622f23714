// matmul_any: y[m, n] = sum_k a(m, k) b(k, n) for extents that are no multiples of 4
// a         [Z, M, K], or [Z, K, M] with a_m = 1, a_k = M
// b         [Z, K, N], or [Z, N, K] with B_TRANSPOSED; f32, bf16 or f16
// y         [Z, M, N], or added to it with ADD
// dispatch  (N / 16, M / 16, Z)
// shared    two 16 x 16 tiles, 2 KiB
#import weight
override B_TRANSPOSED: u32 = 0u;
override ADD: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_m: u32, a_k: u32, a_z: u32, b_z: u32, b_from: u32, y_from: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;           // [Z, M, K]
@group(0) @binding(2) var<storage, read> b: array<Weight4>;       // [Z, K, N] or [Z, N, K], flat quads
@group(0) @binding(3) var<storage, read_write> y: array<f32>;     // [Z, M, N]

var<workgroup> tile_a: array<f32, 256>;   // [m, k]
var<workgroup> tile_b: array<f32, 256>;   // [k, n]

fn weight(k: u32, n: u32, z: u32) -> f32 {
    let at = z * p.b_z + p.b_from + select(k * p.n + n, n * p.k + k, B_TRANSPOSED == 1u);
    return unpack_weight4(b[at / 4u])[at % 4u];
}

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) id: vec3<u32>) {
    let row = group.y * 16u + id.y;
    let column = group.x * 16u + id.x;
    var sum = 0.0;
    for (var first = 0u; first < p.k; first += 16u) {
        var av = 0.0;
        if row < p.m && first + id.x < p.k {
            av = a[group.z * p.a_z + row * p.a_m + (first + id.x) * p.a_k];
        }
        var bv = 0.0;
        if column < p.n && first + id.y < p.k {
            bv = weight(first + id.y, column, group.z);
        }
        tile_a[id.y * 16u + id.x] = av;
        tile_b[id.y * 16u + id.x] = bv;
        workgroupBarrier();
        for (var k = 0u; k < 16u; k += 1u) {
            sum = fma(tile_a[id.y * 16u + k], tile_b[k * 16u + id.x], sum);
        }
        workgroupBarrier();
    }
    if row < p.m && column < p.n {
        let at = p.y_from + (group.z * p.m + row) * p.n + column;
        if ADD == 1u {
            y[at] += sum;
        } else {
            y[at] = sum;
        }
    }
}

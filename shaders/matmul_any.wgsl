// matmul_any: y[m, n] = sum_k a(m, k) w(k, n) for extents that are no multiples of 4
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// w         [Z, K, N], or [Z, N, K] with W_TRANSPOSED; any weight type
// r         [Z, M, N], added to the product with ONTO 2
// y         [Z, M, N], added to with ONTO 1
// dispatch  (N / 16, M / 16, Z)
// shared    two 16 x 16 tiles, 2 KiB
#import weight
override A_TRANSPOSED: u32 = 0u;
override W_TRANSPOSED: u32 = 0u;
override ONTO: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [Z, M, K] or [Z, K, M]
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [Z, K, N] or [Z, N, K]
@group(0) @binding(3) var<storage, read> r: array<f32>;         // [Z, M, N]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;   // [Z, M, N]

var<workgroup> tile_a: array<f32, 256>;   // [m, k]
var<workgroup> tile_w: array<f32, 256>;   // [k, n]

@compute @workgroup_size(16, 16)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_id) id: vec3<u32>) {
    let row = group.y * 16u + id.y;
    let column = group.x * 16u + id.x;
    var sum = 0.0;
    for (var first = 0u; first < p.k; first += 16u) {
        var av = 0.0;
        if row < p.m && first + id.x < p.k {
            let k = first + id.x;
            av = a[group.z * p.a_z + select(row * p.k + k, k * p.m + row, A_TRANSPOSED == 1u)];
        }
        var wv = 0.0;
        if column < p.n && first + id.y < p.k {
            let k = first + id.y;
            let row = group.z * p.w_z + p.w_row;
            if W_TRANSPOSED == 1u {
                wv = weight(row + column, p.k, k);
            } else {
                wv = weight(row + k, p.n, column);
            }
        }
        tile_a[id.y * 16u + id.x] = av;
        tile_w[id.y * 16u + id.x] = wv;
        workgroupBarrier();
        for (var k = 0u; k < 16u; k += 1u) {
            sum = fma(tile_a[id.y * 16u + k], tile_w[k * 16u + id.x], sum);
        }
        workgroupBarrier();
    }
    if row < p.m && column < p.n {
        let at = p.y_from + (group.z * p.m + row) * p.n + column;
        if ONTO == 0u {
            y[at] = sum;
        } else if ONTO == 1u {
            y[at] += sum;
        } else {
            y[at] = r[at] + sum;
        }
    }
}

// matmul_few: y[m, n] = sum_k a[m, k] b[n, k] for a few rows, as decoding has; one pass over the weights
// a         [M, K]
// b         [N, K]; f32, bf16 or f16
// y         [M, N], or added to it with ADD
// dispatch  (N / 4, M / 8): 64 lanes share K; K a multiple of 4
// shared    64 partial sums of 32 outputs, 8 KiB
#import weight
override ADD: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_m: u32, a_k: u32, a_z: u32, b_z: u32, b_from: u32, y_from: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;     // [M, K / 4]
@group(0) @binding(2) var<storage, read> b: array<Weight4>;       // [N, K / 4]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;     // [M, N]

var<workgroup> partial: array<vec4<f32>, 512>;   // [64 lanes, 8 rows], a column quad each

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let k4 = p.k / 4u;
    let first_n = group.x * 4u;
    let first_m = group.y * 8u;
    // Rows and columns past the edge repeat the last one; they are not stored.
    let n = min(vec4<u32>(first_n) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(p.n - 1u)) * k4 + p.b_from / 4u;
    var acc: array<vec4<f32>, 8>;
    for (var k = lane; k < k4; k += 64u) {
        let w0 = unpack_weight4(b[n.x + k]);
        let w1 = unpack_weight4(b[n.y + k]);
        let w2 = unpack_weight4(b[n.z + k]);
        let w3 = unpack_weight4(b[n.w + k]);
        for (var r = 0u; r < 8u; r += 1u) {
            let x = a[min(first_m + r, p.m - 1u) * k4 + k];
            acc[r] += vec4<f32>(dot(x, w0), dot(x, w1), dot(x, w2), dot(x, w3));
        }
    }
    for (var r = 0u; r < 8u; r += 1u) {
        partial[lane * 8u + r] = acc[r];
    }
    workgroupBarrier();
    let row = first_m + lane / 4u;
    let column = first_n + lane % 4u;
    if lane < 32u && row < p.m && column < p.n {
        var sum = 0.0;
        for (var i = 0u; i < 64u; i += 1u) {
            sum += partial[i * 8u + lane / 4u][lane % 4u];
        }
        let at = p.y_from + row * p.n + column;
        if ADD == 1u {
            y[at] += sum;
        } else {
            y[at] = sum;
        }
    }
}

// rms_norm: y[r, d] = x[r, d] s_r w[d], s_r = 1 / sqrt(mean_d x[r, d]^2 + eps)
// x, y      [R, D]
// w         [D]
// s         [R], kept for the derivative
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
struct Params { rows: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [R, D]
@group(0) @binding(2) var<storage, read> w: array<f32>;         // [D]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;   // [R, D]
@group(0) @binding(4) var<storage, read_write> s: array<f32>;   // [R]

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = linear_workgroup(group, groups);
    if row >= p.rows {
        return;
    }
    let base = row * p.d;
    var sum = 0.0;
    for (var d = lane; d < p.d; d += WG) {
        sum += x[base + d] * x[base + d];
    }
    let scale = 1.0 / sqrt(reduce_sum(sum, lane) / f32(p.d) + p.eps);
    for (var d = lane; d < p.d; d += WG) {
        y[base + d] = x[base + d] * scale * w[d];
    }
    if lane == 0u {
        s[row] = scale;
    }
}

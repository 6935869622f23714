// add_rms_norm: z[r, d] = x[r, d] + y[r, d], n[r, d] = z[r, d] w[d] / sqrt(mean_d z[r, d]^2 + eps)
// x, y, z, n  [R, D]
// w           [D]
// dispatch    one workgroup a row, folded
// shared      WG f32
#import grid
#import reduce
struct Params { rows: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [R, D]
@group(0) @binding(2) var<storage, read> y: array<f32>;         // [R, D]
@group(0) @binding(3) var<storage, read> w: array<f32>;         // [D]
@group(0) @binding(4) var<storage, read_write> z: array<f32>;   // [R, D]
@group(0) @binding(5) var<storage, read_write> n: array<f32>;   // [R, D]

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
        let value = x[base + d] + y[base + d];
        sum += value * value;
    }
    let scale = 1.0 / sqrt(reduce_sum(sum, lane) / f32(p.d) + p.eps);
    for (var d = lane; d < p.d; d += WG) {
        let value = x[base + d] + y[base + d];
        z[base + d] = value;
        n[base + d] = value * scale * w[d];
    }
}

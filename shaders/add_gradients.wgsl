// add_gradients: y[i] = a[i] + b[i], two cotangents of one tensor
// a, b, y   [n]
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [n]
@group(0) @binding(2) var<storage, read> b: array<f32>;         // [n]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;   // [n]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        y[i] = a[i] + b[i];
    }
}

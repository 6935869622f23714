// elementwise_unary_backward: dx[i] = dy[i] f(x[i]); the table in elementwise.rs gives f, a derivative
// dy, x, dx [n]
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32, scalar: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<f32>;         // [n]
@group(0) @binding(2) var<storage, read> x: array<f32>;          // [n]
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;   // [n]

fn f(x: f32) -> f32 {
    return x;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        dx[i] = dy[i] * f(x[i]);
    }
}

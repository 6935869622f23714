// elementwise_unary: y[i] = f(x[i]); the table in elementwise.rs gives each op its f, here the identity
// x, y      [n]
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32, scalar: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [n]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [n]

// y, or x where that is NaN, which min, max and clamp of some drivers lose.
fn or_nan(x: f32, y: f32) -> f32 {
    return select(y, x, (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u);
}

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
        y[i] = f(x[i]);
    }
}

// limit_copy: y = x, the most bytes a second
// x, y      [n] of four floats
// dispatch  256 elements a workgroup, folded over y
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;   // [n]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.y * groups.x + group.x) * 256u + lane;
    if i < p.n {
        y[i] = x[i];
    }
}

// matmul_slices: y = sum_s x[s], the end of a product whose K was cut into slices
// x         [S, M, N]
// r         [M, N], added to the sum with ONTO 2
// y         [M, N], added to with ONTO 1
// dispatch  256 quads of y a workgroup, folded
#import grid
override ONTO: u32 = 0u;
struct Params { quads: u32, slices: u32, y_from: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [S, M, N], flat quads
@group(0) @binding(2) var<storage, read> r: array<vec4<f32>>;         // [M, N], flat quads
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [M, N], flat quads

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i >= p.quads {
        return;
    }
    let at = p.y_from / 4u + i;
    var sum = vec4<f32>();
    if ONTO == 1u {
        sum = y[at];
    } else if ONTO == 2u {
        sum = r[at];
    }
    for (var s = 0u; s < p.slices; s += 1u) {
        sum += x[s * p.quads + i];
    }
    y[at] = sum;
}

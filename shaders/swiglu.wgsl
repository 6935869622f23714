// swiglu: y[i] = gate[i] sigmoid(gate[i]) up[i]
// gate, up  [n], in quads; what lies behind the last element is of no one
// y         [n]
// dispatch  256 quads a workgroup, folded
#import grid
struct Params { quads: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<vec4<f32>>;      // [n / 4]
@group(0) @binding(2) var<storage, read> up: array<vec4<f32>>;        // [n / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [n / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.quads {
        let g = gate[i];
        // Bounded, because WGSL leaves infinities undefined.
        y[i] = g / (1.0 + exp(min(-g, vec4<f32>(80.0)))) * up[i];
    }
}

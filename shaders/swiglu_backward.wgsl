// swiglu_backward: dgate[i] = dy[i] up[i] s (1 + g (1 - s)), dup[i] = dy[i] g s; g = gate[i], s = sigmoid(g)
// gate, up  [n]
// dy        [n]
// dgate     [n], like dup
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;          // [n]
@group(0) @binding(2) var<storage, read> up: array<f32>;            // [n]
@group(0) @binding(3) var<storage, read> dy: array<f32>;            // [n]
@group(0) @binding(4) var<storage, read_write> dgate: array<f32>;   // [n]
@group(0) @binding(5) var<storage, read_write> dup: array<f32>;     // [n]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        let g = gate[i];
        // Bounded, because WGSL leaves infinities undefined.
        let s = 1.0 / (1.0 + exp(min(-g, 80.0)));
        dgate[i] = dy[i] * up[i] * s * (1.0 + g * (1.0 - s));
        dup[i] = dy[i] * g * s;
    }
}

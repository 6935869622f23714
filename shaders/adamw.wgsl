// adamw: m += rest1 (g - m), v = beta2 v + rest2 g^2, w = decay w - step m / (sqrt(v) / bias2 + eps)
// grad      [n], g = grad * grad_scale * clip; all in quads, what lies behind the last element is of no one
// norm_clip [2], the bits of the gradients' norm and of clip; where clip is 0 nothing changes
// w, m, v   [n], in place
// dispatch  256 quads a workgroup, folded
#import grid
struct Params {
    quads: u32,
    grad_scale: f32,
    decay: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step: f32,
    bias2: f32,
    eps: f32,
    zero: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>;        // [n / 4]
@group(0) @binding(2) var<storage, read> norm_clip: array<u32>;         // [2]
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;     // [n / 4]
@group(0) @binding(4) var<storage, read_write> m: array<vec4<f32>>;     // [n / 4]
@group(0) @binding(5) var<storage, read_write> v: array<vec4<f32>>;     // [n / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.quads && norm_clip[1] != 0u {
        let g = grad[i] * (p.grad_scale * bitcast<f32>(norm_clip[1]));
        let mean = m[i] + p.rest1 * (g - m[i]);
        let square = p.beta2 * v[i] + p.rest2 * g * g;
        m[i] = mean;
        v[i] = square;
        // An infinite moment would stop its weight for good, in silence: 0, which compilers do not know, makes it NaN.
        let kept = p.decay * w[i] + p.zero * square;
        w[i] = kept - p.step * mean / (sqrt(square) / p.bias2 + p.eps);
    }
}

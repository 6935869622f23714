// max_backward: dx[o, first[o, i], i] = dy[o, i]; the rest of dx is zero already
// dy, first [O, I]
// dx        [O, R, I]
// dispatch  256 elements of dy a workgroup, folded
#import grid
struct Params { n: u32, extent: u32, inner: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<f32>;         // [O, I]
@group(0) @binding(2) var<storage, read> first: array<u32>;      // [O, I]
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;   // [O, R, I]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        let row = (i / p.inner) * p.extent + first[i];
        dx[row * p.inner + i % p.inner] = dy[i];
    }
}

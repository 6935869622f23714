// columns: copies between a narrow matrix and columns from .. from + n of a wide one
// x         [R, n]: the narrow one; with OUT [R, O], the wide one
// y         [R, O]: the wide one; with OUT [R, n], the narrow one
// dispatch  256 elements of the narrow one a workgroup, folded
#import grid
override OUT: u32 = 0u;
struct Params { n: u32, narrow: u32, wide: u32, start: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [R, n] or, with OUT, [R, O]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [R, O] or, with OUT, [R, n]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        let far = (i / p.narrow) * p.wide + p.start + i % p.narrow;
        if OUT == 1u {
            y[i] = x[far];
        } else {
            y[far] = x[i];
        }
    }
}

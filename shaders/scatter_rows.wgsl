// scatter_rows: y[rows[r], d] = x[r, d]; rows are distinct, the others stay as they are
// x         [R, D]     rows [R]     y [T, D]
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32, d: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [R, D]
@group(0) @binding(2) var<storage, read> rows: array<u32>;      // [R]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;   // [T, D]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        y[rows[i / p.d] * p.d + i % p.d] = x[i];
    }
}

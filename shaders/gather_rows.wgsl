// gather_rows: y[r, d] = x[rows[r], d]
// x         [T, D]     rows [R]     y [R, D]; D = pieces, or four times as many
// dispatch  256 pieces a workgroup, folded
#import grid
#import quad
struct Params { n: u32, pieces: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [T, D / 4]
@group(0) @binding(2) var<storage, read> rows: array<u32>;            // [R]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [R, D / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i >= p.n {
        return;
    }
    let at = rows[i / p.pieces] * p.pieces + i % p.pieces;
    let v = piece(x[quad_of_piece(at)], at);
    if WIDE == 1u {
        y[i] = v;
    } else {
        y[i / 4u][i % 4u] = v.x;
    }
}

// gather_rows: y[r, d] = x[rows[r], d]
// x         [T, D]     rows [R]     y [R, D]; D = pieces, or four times as many
// dispatch  one workgroup a row, folded
#import grid
#import quad
struct Params { rows: u32, pieces: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [T, D / 4]
@group(0) @binding(2) var<storage, read> rows: array<u32>;            // [R]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [R, D / 4]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let r = linear_workgroup(group, groups);
    if r >= p.rows {
        return;
    }
    for (var d = lane; d < p.pieces; d += 64u) {
        let near = r * p.pieces + d;
        let far = rows[r] * p.pieces + d;
        let v = piece(x[quad_of_piece(far)], far);
        if WIDE == 1u {
            y[near] = v;
        } else {
            y[near / 4u][near % 4u] = v.x;
        }
    }
}

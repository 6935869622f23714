// rms_norm_dw: partial[c, d] = sum of dy[r, d] x[r, d] s_r over the 32 rows r of chunk c
// x, dy     [R, D], D = pieces, or four times as many
// s         [R]
// partial   [C, D], C = R / 32; the host sums it over c
// dispatch  one workgroup for 64 pieces of one chunk, folded
#import grid
#import quad
struct Params { rows: u32, pieces: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;               // [R, D / 4]
@group(0) @binding(2) var<storage, read> s: array<f32>;                     // [R]
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;              // [R, D / 4]
@group(0) @binding(4) var<storage, read_write> partial: array<vec4<f32>>;   // [C, D / 4]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = linear_workgroup(group, groups);
    let tiles = (p.pieces + 63u) / 64u;
    let first = (at / tiles) * 32u;
    let d = (at % tiles) * 64u + lane;
    if first >= p.rows || d >= p.pieces {
        return;
    }
    var sum = vec4<f32>();
    for (var r = first; r < min(first + 32u, p.rows); r += 1u) {
        let i = r * p.pieces + d;
        sum += piece(dy[quad_of_piece(i)], i) * piece(x[quad_of_piece(i)], i) * s[r];
    }
    let to = (at / tiles) * p.pieces + d;
    if WIDE == 1u {
        partial[to] = sum;
    } else {
        partial[to / 4u][to % 4u] = sum.x;
    }
}

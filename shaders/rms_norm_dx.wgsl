// rms_norm_dx: dx[r, d] = s_r (dy[r, d] w[d] - x[r, d] s_r^2 mean_d(dy[r, d] w[d] x[r, d]))
// x, dy, dx [R, D], D = pieces, or four times as many
// w         [D]
// s         [R], s_r = 1 / sqrt(mean_d x[r, d]^2 + eps)
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
#import quad
struct Params { rows: u32, pieces: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;          // [R, D / 4]
@group(0) @binding(2) var<storage, read> w: array<vec4<f32>>;          // [D / 4]
@group(0) @binding(3) var<storage, read> s: array<f32>;                // [R]
@group(0) @binding(4) var<storage, read> dy: array<vec4<f32>>;         // [R, D / 4]
@group(0) @binding(5) var<storage, read_write> dx: array<vec4<f32>>;   // [R, D / 4]

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = linear_workgroup(group, groups);
    if row >= p.rows {
        return;
    }
    var sum = vec4<f32>();
    for (var d = lane; d < p.pieces; d += WG) {
        let i = row * p.pieces + d;
        let at = quad_of_piece(i);
        sum += piece(dy[at], i) * piece(w[quad_of_piece(d)], d) * piece(x[at], i);
    }
    let scale = s[row];
    let mean = reduce_sum(sum4(sum), lane) / f32(p.d) * scale * scale;
    for (var d = lane; d < p.pieces; d += WG) {
        let i = row * p.pieces + d;
        let at = quad_of_piece(i);
        let v = scale * (piece(dy[at], i) * piece(w[quad_of_piece(d)], d) - piece(x[at], i) * mean);
        if WIDE == 1u {
            dx[at] = v;
        } else {
            dx[at][i % 4u] = v.x;
        }
    }
}

// rms_norm: y[r, d] = x[r, d] s_r w[d], s_r = 1 / sqrt(mean_d x[r, d]^2 + eps)
// x, y      [R, D], D = pieces, or four times as many
// w         [D]
// s         [R], kept for the derivative
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
#import quad
struct Params { rows: u32, pieces: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [R, D / 4]
@group(0) @binding(2) var<storage, read> w: array<vec4<f32>>;         // [D / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [R, D / 4]
@group(0) @binding(4) var<storage, read_write> s: array<f32>;         // [R]

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
        let v = piece(x[quad_of_piece(i)], i);
        sum += v * v;
    }
    let scale = 1.0 / sqrt(reduce_sum(sum4(sum), lane) / f32(p.d) + p.eps);
    for (var d = lane; d < p.pieces; d += WG) {
        let i = row * p.pieces + d;
        let at = quad_of_piece(i);
        let v = piece(x[at], i) * scale * piece(w[quad_of_piece(d)], d);
        if WIDE == 1u {
            y[at] = v;
        } else {
            y[at][i % 4u] = v.x;
        }
    }
    if lane == 0u {
        s[row] = scale;
    }
}

// add_rms_norm: z[r, d] = x[r, d] + y[r, d], n[r, d] = z[r, d] w[d] / sqrt(mean_d z[r, d]^2 + eps)
// x, y, z, n  [R, D], D = pieces, or four times as many
// w           [D]
// dispatch    one workgroup a row, folded
// shared      WG f32
#import grid
#import reduce
#import quad
struct Params { rows: u32, pieces: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [R, D / 4]
@group(0) @binding(2) var<storage, read> y: array<vec4<f32>>;         // [R, D / 4]
@group(0) @binding(3) var<storage, read> w: array<vec4<f32>>;         // [D / 4]
@group(0) @binding(4) var<storage, read_write> z: array<vec4<f32>>;   // [R, D / 4]
@group(0) @binding(5) var<storage, read_write> n: array<vec4<f32>>;   // [R, D / 4]

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
        let v = piece(x[quad_of_piece(i)], i) + piece(y[quad_of_piece(i)], i);
        sum += v * v;
    }
    let scale = 1.0 / sqrt(reduce_sum(sum4(sum), lane) / f32(p.d) + p.eps);
    for (var d = lane; d < p.pieces; d += WG) {
        let i = row * p.pieces + d;
        let at = quad_of_piece(i);
        let v = piece(x[at], i) + piece(y[at], i);
        let normed = v * scale * piece(w[quad_of_piece(d)], d);
        if WIDE == 1u {
            z[at] = v;
            n[at] = normed;
        } else {
            z[at][i % 4u] = v.x;
            n[at][i % 4u] = normed.x;
        }
    }
}

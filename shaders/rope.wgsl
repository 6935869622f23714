// rope: (y_i, y_j) = (x_i cos a - x_j sin a, x_j cos a + x_i sin a) scale, j = i + H/2, a = position * frequency_i
// x, y      [B, T, N, H]; the derivative is the rotation by -a: sign = -1
// positions [B, T] or [T]
// frequency [H / 2], pieces, or four times as many
// dispatch  256 invocations a workgroup, folded; one turns a piece of 8 heads of a token by the same angles
#import grid
#import quad
#import rotation
struct Params { n: u32, pieces: u32, heads: u32, positions: u32, sign: f32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;           // [B, T, N, H / 4]
@group(0) @binding(2) var<storage, read> positions: array<u32>;         // [B, T] or [T]
@group(0) @binding(3) var<storage, read> frequency: array<vec4<f32>>;   // [H / 8]
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;     // [B, T, N, H / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let item = linear_workgroup(group, groups) * 256u + lane;
    if item >= p.n {
        return;
    }
    let d = item % p.pieces;
    let parts = (p.heads + 7u) / 8u;
    let token = item / p.pieces / parts;
    let first = item / p.pieces % parts * 8u;
    let position = positions[token % p.positions];
    let f = piece(frequency[quad_of_piece(d)], d);
    let a0 = cos_sin(rotary_angle(position, f.x));
    let a1 = cos_sin(rotary_angle(position, f.y));
    let a2 = cos_sin(rotary_angle(position, f.z));
    let a3 = cos_sin(rotary_angle(position, f.w));
    let c = vec4<f32>(a0.x, a1.x, a2.x, a3.x) * p.scale;
    let s = vec4<f32>(a0.y, a1.y, a2.y, a3.y) * p.scale * p.sign;
    for (var head = first; head < min(first + 8u, p.heads); head += 1u) {
        let i = (token * p.heads + head) * 2u * p.pieces + d;
        let j = i + p.pieces;
        let a = piece(x[quad_of_piece(i)], i);
        let b = piece(x[quad_of_piece(j)], j);
        if WIDE == 1u {
            y[i] = a * c - b * s;
            y[j] = b * c + a * s;
        } else {
            y[i / 4u][i % 4u] = a.x * c.x - b.x * s.x;
            y[j / 4u][j % 4u] = b.x * c.x + a.x * s.x;
        }
    }
}

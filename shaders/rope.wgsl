// rope: (y_i, y_j) = (x_i cos a - x_j sin a, x_j cos a + x_i sin a), j = i + H/2, a = position * frequency_i
// x, y      [B, T, N, H]; the derivative is the rotation by -a: sign = -1
// positions [B, T] or [T]
// frequency [H / 2]
// dispatch  256 pairs a workgroup, folded
#import grid
#import rotation
struct Params { pairs: u32, half: u32, heads: u32, positions: u32, sign: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // [B, T, N, H]
@group(0) @binding(2) var<storage, read> positions: array<u32>;   // [B, T] or [T]
@group(0) @binding(3) var<storage, read> frequency: array<f32>;   // [H / 2]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // [B, T, N, H]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let pair = linear_workgroup(group, groups) * 256u + lane;
    if pair >= p.pairs {
        return;
    }
    let i = pair % p.half;
    let head = pair / p.half;
    let position = positions[(head / p.heads) % p.positions];
    let angle = rotary_angle(position, frequency[i]);
    let rotation = cos_sin(angle) * vec2<f32>(1.0, p.sign);
    let at = head * 2u * p.half + i;
    let a = x[at];
    let b = x[at + p.half];
    y[at] = a * rotation.x - b * rotation.y;
    y[at + p.half] = b * rotation.x + a * rotation.y;
}

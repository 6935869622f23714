// rope: (y_i, y_j) = (x_i cos a - x_j sin a, x_j cos a + x_i sin a), j = i + H/2, a = position * frequency_i
// x, y      [B, T, N, H]; the derivative is the rotation by -a: sign = -1
// positions [B, T] or [T]
// frequency [H / 2]
// dispatch  256 pairs a workgroup, folded
#import grid
struct Params { pairs: u32, half: u32, heads: u32, positions: u32, sign: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;           // [B, T, N, H]
@group(0) @binding(2) var<storage, read> positions: array<u32>;   // [B, T] or [T]
@group(0) @binding(3) var<storage, read> frequency: array<f32>;   // [H / 2]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;     // [B, T, N, H]

// Cosine and sine of an angle in [0, 100000]. WGSL promises 2^-11 and only on [-pi, pi], so both are computed
// here: quarter turns are taken off in three steps whose products are exact (Cody and Waite), then Cephes'
// polynomials on [-pi/4, pi/4]. The clamp changes nothing; it keeps compilers from merging the steps.
fn cos_sin(angle: f32) -> vec2<f32> {
    let turns = round(angle * 0.63661977);
    let rough = clamp(angle - turns * 1.5703125, -1000.0, 1000.0);
    let r = (rough - turns * 4.837512969970703e-4) - turns * 7.549789948768648e-8;
    let z = r * r;
    let s = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1);
    let c = 1.0 - 0.5 * z
        + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2);
    let quarter = u32(turns) % 4u;
    let swapped = select(vec2<f32>(c, s), vec2<f32>(s, c), quarter % 2u == 1u);
    let negative = vec2<bool>(quarter == 1u || quarter == 2u, quarter >= 2u);
    return select(swapped, -swapped, negative);
}

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
    // Hugging Face rounds this product to f32. The max changes nothing; it keeps compilers from fusing the
    // product into the subtraction above, which would leave it unrounded.
    let angle = max(f32(position) * frequency[i], 0.0);
    let rotation = cos_sin(angle) * vec2<f32>(1.0, p.sign);
    let at = head * 2u * p.half + i;
    let a = x[at];
    let b = x[at + p.half];
    y[at] = a * rotation.x - b * rotation.y;
    y[at + p.half] = b * rotation.x + a * rotation.y;
}

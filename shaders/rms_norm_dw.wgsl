// rms_norm_dw: partial[c, d] = sum of dy[r, d] x[r, d] s_r over the 32 rows r of chunk c
// x, dy     [R, D]
// s         [R]
// partial   [C, D], C = R / 32; the host sums it over c
// dispatch  (D / 64, C)
struct Params { rows: u32, d: u32, eps: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;               // [R, D]
@group(0) @binding(2) var<storage, read> s: array<f32>;               // [R]
@group(0) @binding(3) var<storage, read> dy: array<f32>;              // [R, D]
@group(0) @binding(4) var<storage, read_write> partial: array<f32>;   // [C, D]

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let d = group.x * 64u + lane;
    if d >= p.d {
        return;
    }
    let end = min(group.y * 32u + 32u, p.rows);
    var sum = 0.0;
    for (var r = group.y * 32u; r < end; r += 1u) {
        sum += dy[r * p.d + d] * x[r * p.d + d] * s[r];
    }
    partial[group.y * p.d + d] = sum;
}

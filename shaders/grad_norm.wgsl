// grad_norm: norm = sqrt(sum_i partial[i]), scale = min(1, max_norm / (norm + 1e-6)), 0 if norm is not finite or
// above limit: then nothing moves or
// above limit: then nothing moves
// partial   [n]
// y         [2]: norm, scale
// dispatch  one workgroup
// shared    WG f32
#import reduce
struct Params { n: u32, max_norm: f32, limit: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> partial: array<f32>;   // [n]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [2]

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var i = lane; i < p.n; i += WG) {
        sum += partial[i];
    }
    let norm = sqrt(reduce_sum(sum, lane));
    // By its bits, because compilers may assume that no float is infinite or NaN.
    let finite = (bitcast<u32>(norm) & 0x7f800000u) != 0x7f800000u;
    let trusted = finite && norm <= p.limit;
    var scale = select(0.0, 1.0, trusted);
    if trusted && norm + 1e-6 > p.max_norm {
        scale = p.max_norm / (norm + 1e-6);
    }
    if lane == 0u {
        y[0] = norm;
        y[1] = scale;
    }
}

// sum_squares: partial[first + g] = sum of (scale x[i])^2 over the share of workgroup g
// x         [n], in quads
// partial   [first + G ..], the places of this tensor among all
// dispatch  (G), G at most 256
// shared    WG f32
#import reduce
struct Params { n: u32, first: u32, groups: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [n / 4]
@group(0) @binding(2) var<storage, read_write> partial: array<f32>;   // [first + G ..]

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let whole = p.n / 4u;
    var sum = 0.0;
    for (var i = group.x * WG + lane; i < whole; i += p.groups * WG) {
        let value = p.scale * x[i];
        sum += dot(value, value);
    }
    if group.x == 0u && lane < p.n % 4u {
        let value = p.scale * x[whole][lane];
        sum += value * value;
    }
    let total = reduce_sum(sum, lane);
    if lane == 0u {
        partial[p.first + group.x] = total;
    }
}

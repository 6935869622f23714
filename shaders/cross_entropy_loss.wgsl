// cross_entropy_loss: loss = scale sum_r weights[r] ce[r],  ce[r] = maximum + ln sum - logit of the target
// state     [R, 3] as cross_entropy_chunk leaves it
// weights   [R]
// ce        [R]     loss [1]
// dispatch  one workgroup
// shared    WG f32
#import reduce
struct Params { rows: u32, scale: f32, zero: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> state: array<f32>;           // [R, 3]
@group(0) @binding(2) var<storage, read> weights: array<f32>;         // [R]
@group(0) @binding(3) var<storage, read_write> ce: array<f32>;        // [R]
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;      // [1]

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var r = lane; r < p.rows; r += WG) {
        let total = state[r * 3u + 1u];
        // The total is at least 1, or NaN, which the last term keeps whatever log makes of it.
        let value = state[r * 3u] + log(total) - state[r * 3u + 2u] + p.zero * total;
        ce[r] = value;
        sum += weights[r] * value;
    }
    sum = reduce_sum(sum, lane);
    if lane == 0u {
        loss[0] = sum * p.scale;
    }
}

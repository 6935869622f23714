// cross_entropy_chunk: one vocabulary chunk of a running log-sum-exp, and the target's logit if it lies here
// logits    [R, C], columns first .. first + C of the vocabulary
// targets   [R]
// state     [R, 3]: maximum, sum of exp(logit - maximum), logit of the target; started anew when first is 0
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
struct Params { rows: u32, columns: u32, first: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;          // [R, C]
@group(0) @binding(2) var<storage, read> targets: array<u32>;         // [R]
@group(0) @binding(3) var<storage, read_write> state: array<f32>;     // [R, 3]

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = linear_workgroup(group, groups);
    let row = min(index, p.rows - 1u);
    let base = row * p.columns;
    var largest = -3.4e38;
    for (var i = lane; i < p.columns; i += WG) {
        largest = max(largest, logits[base + i]);
    }
    largest = reduce_max(largest, lane);
    var sum = 0.0;
    for (var i = lane; i < p.columns; i += WG) {
        sum += exp(logits[base + i] - largest);
    }
    sum = reduce_sum(sum, lane);
    if lane != 0u || index >= p.rows {
        return;
    }
    if p.first > 0u {
        let before = state[row * 3u];
        let top = max(before, largest);
        sum = state[row * 3u + 1u] * exp(before - top) + sum * exp(largest - top);
        largest = top;
    }
    state[row * 3u] = largest;
    state[row * 3u + 1u] = sum;
    let column = targets[row] - p.first;
    // Unsigned: a target before this chunk wraps past its end.
    if column < p.columns {
        state[row * 3u + 2u] = logits[base + column];
    }
}

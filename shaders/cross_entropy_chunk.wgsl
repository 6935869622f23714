// cross_entropy_chunk: one vocabulary chunk of a running log-sum-exp, and the target's logit if it lies here
// logits    [R, C], columns first .. first + C of the vocabulary; C = pieces, or four times as many
// targets   [R]
// state     [R, 3]: maximum, sum of exp(logit - maximum), logit of the target; started anew when first is 0
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
#import quad
const NEVER: f32 = -3.4e38;
struct Params { rows: u32, pieces: u32, columns: u32, first: u32, zero: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<vec4<f32>>;    // [R, C / 4]
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
    // A lane's own maximum and sum follow each other in one pass over the logits.
    var top = NEVER;
    var sum = vec4<f32>();
    for (var c = lane; c < p.pieces; c += WG) {
        let i = row * p.pieces + c;
        var v = piece(logits[quad_of_piece(i)], i);
        if WIDE == 0u {
            v = vec4<f32>(v.x, NEVER, NEVER, NEVER);
        }
        let before = top;
        top = max(max(top, max(v.x, v.y)), max(v.z, v.w));
        // What is not finite makes the sum NaN, whatever max and exp make of it: 0, which compilers do not know.
        sum = sum * exp(before - top) + fma(v, vec4<f32>(p.zero), exp(v - top));
    }
    var largest = reduce_max(top, lane);
    var total = reduce_sum(sum4(sum) * exp(top - largest), lane);
    if lane != 0u || index >= p.rows {
        return;
    }
    if p.first > 0u {
        let before = state[row * 3u];
        let both = max(before, largest);
        total = state[row * 3u + 1u] * exp(before - both) + total * exp(largest - both);
        largest = both;
    }
    state[row * 3u] = largest;
    state[row * 3u + 1u] = total;
    let column = targets[row] - p.first;
    // Unsigned: a target before this chunk wraps past its end.
    if column < p.columns {
        let at = row * p.columns + column;
        state[row * 3u + 2u] = logits[at / 4u][at % 4u];
    }
}

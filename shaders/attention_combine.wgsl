// attention_combine: o[r] = sum_s w_s parts[s, r], w_s = exp(lse_s - lse[r]), lse[r] = ln sum_s exp(part_lse[s, r])
// parts     [S, rows, H]    part_lse [S, rows]: what each piece of the keys gives
// o         [rows, H]       stats    [2, rows]: lse, then room for the backward pass
// dispatch  64 quads of o a workgroup, folded
#import grid
const NEVER: f32 = -3.0e38;
struct Params { rows: u32, h4: u32, splits: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> parts: array<vec4<f32>>;     // [S, rows, H / 4]
@group(0) @binding(2) var<storage, read> part_lse: array<f32>;        // [S, rows]
@group(0) @binding(3) var<storage, read_write> o: array<vec4<f32>>;   // [rows, H / 4]
@group(0) @binding(4) var<storage, read_write> stats: array<f32>;     // [2, rows]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 64u + lane;
    let row = i / p.h4;
    if row >= p.rows {
        return;
    }
    var m = NEVER;
    for (var s = 0u; s < p.splits; s += 1u) {
        m = max(m, part_lse[s * p.rows + row]);
    }
    let never = bitcast<u32>(NEVER);
    var total = 0.0;
    var sum = vec4<f32>();
    for (var s = 0u; s < p.splits; s += 1u) {
        let lse = part_lse[s * p.rows + row];
        // A piece in which the row sees no key has no weight; by its bits, because drivers differ on how NaN compares.
        let w = select(exp(lse - m), 0.0, bitcast<u32>(lse) == never);
        total += w;
        sum += w * parts[s * p.rows * p.h4 + i];
    }
    let sees_nothing = bitcast<u32>(total) == 0u;
    o[i] = select(sum / total, vec4<f32>(), sees_nothing);
    if i % p.h4 == 0u {
        stats[row] = select(m + log(total), NEVER, sees_nothing);
    }
}

// embedding: y[t, c] = w[tokens[t] - first, c] for the tokens of one row shard
// tokens    [n]
// w         [rows, D], the table; any weight type; D = pieces, or four times as many
// y         [n, D]; tokens of no shard leave zeros, written with the first shard (first = 0)
// dispatch  one workgroup a token, folded
#import grid
#import weight
#import quad
struct Params { n: u32, pieces: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;          // [n]
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [rows, D]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [n, D / 4]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let t = linear_workgroup(group, groups);
    if t >= p.n {
        return;
    }
    let row = tokens[t] - p.first;
    let is_here = tokens[t] >= p.first && row < p.rows;
    if !is_here && p.first > 0u {
        return;
    }
    for (var d = lane; d < p.pieces; d += 64u) {
        var v = vec4<f32>();
        if is_here && WIDE == 1u {
            v = weight4(row, 4u * p.pieces, d);
        } else if is_here {
            v.x = weight(row, p.pieces, d);
        }
        let i = t * p.pieces + d;
        if WIDE == 1u {
            y[i] = v;
        } else {
            y[i / 4u][i % 4u] = v.x;
        }
    }
}

// embedding: y[t, c] = w[tokens[t] - first, c] for the tokens of one row shard
// tokens    [n]
// w         [rows, D], the table; any weight type; D = pieces, or four times as many
// y         [n, D]; tokens of no shard leave zeros, written with the first shard (first = 0)
// dispatch  256 pieces of y a workgroup, folded
#import grid
#import weight
#import quad
struct Params { n: u32, pieces: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;          // [n]
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [rows, D]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [n, D / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i >= p.n * p.pieces {
        return;
    }
    let token = tokens[i / p.pieces];
    let is_here = token >= p.first && token - p.first < p.rows;
    if !is_here && p.first > 0u {
        return;
    }
    let row = token - p.first;
    var v = vec4<f32>();
    if is_here && WIDE == 1u {
        v = weight4(row, 4u * p.pieces, i % p.pieces);
    } else if is_here {
        v.x = weight(row, p.pieces, i % p.pieces);
    }
    if WIDE == 1u {
        y[i] = v;
    } else {
        y[i / 4u][i % 4u] = v.x;
    }
}

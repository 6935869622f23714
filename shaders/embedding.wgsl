// embedding: y[t, c] = w[tokens[t] - first, c] for the tokens of one row shard
// tokens    [n]
// w         [rows, D], the table; any weight type
// y         [n, D]; tokens of no shard leave zeros, written with the first shard (first = 0)
// dispatch  256 elements of y a workgroup, folded
#import grid
#import weight
struct Params { n: u32, d: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;      // [n]
@group(0) @binding(2) var<storage, read> w: array<Weight>;        // [rows, D]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;     // [n, D]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i >= p.n * p.d {
        return;
    }
    let token = tokens[i / p.d];
    if token >= p.first && token - p.first < p.rows {
        y[i] = weight(token - p.first, p.d, i % p.d);
    } else if p.first == 0u {
        y[i] = 0.0;
    }
}

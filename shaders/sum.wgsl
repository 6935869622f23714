// sum: y[o, c] = scale * sum of x[o, r] over r in chunk c, lanes along the row
// x         [O, R]
// y         [O, C], C = R / chunk; the host runs it again until C is 1
// dispatch  one workgroup an element of y, folded
// shared    WG f32
#import grid
#import reduce
struct Params { n: u32, extent: u32, chunk: u32, chunks: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [O, R]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [O, C]

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = linear_workgroup(group, groups);
    if at >= p.n {
        return;
    }
    let row = (at / p.chunks) * p.extent;
    let first = (at % p.chunks) * p.chunk;
    let end = min(first + p.chunk, p.extent);
    var sum = 0.0;
    for (var r = first + lane; r < end; r += WG) {
        sum += x[row + r];
    }
    let total = reduce_sum(sum, lane);
    if lane == 0u {
        y[at] = p.scale * total;
    }
}

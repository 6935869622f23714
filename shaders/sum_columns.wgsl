// sum_columns: y[o, c, i] = scale * sum of x[o, r, i] over r in chunk c, lanes along the columns
// x         [O, R, I]
// y         [O, C, I], C = R / chunk; the host runs it again until C is 1
// dispatch  one workgroup for 32 columns of one chunk, folded
// shared    8 x 32 partial sums, 1 KiB
#import grid
struct Params { n: u32, extent: u32, chunk: u32, chunks: u32, inner: u32, tiles: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [O, R, I]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [O, C, I]

var<workgroup> partial: array<f32, 256>;   // [8, 32]

@compute @workgroup_size(32, 8)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_id) id: vec3<u32>,
) {
    let at = linear_workgroup(group, groups);
    if at >= p.n {
        return;
    }
    let row = at / p.tiles;   // o * C + c
    let column = (at % p.tiles) * 32u + id.x;
    let first = (row % p.chunks) * p.chunk;
    let end = min(first + p.chunk, p.extent);
    let base = (row / p.chunks) * p.extent;
    var sum = 0.0;
    if column < p.inner {
        for (var r = first + id.y; r < end; r += 8u) {
            sum += x[(base + r) * p.inner + column];
        }
    }
    partial[id.y * 32u + id.x] = sum;
    workgroupBarrier();
    if id.y == 0u && column < p.inner {
        for (var i = 1u; i < 8u; i += 1u) {
            sum += partial[i * 32u + id.x];
        }
        y[row * p.inner + column] = p.scale * sum;
    }
}

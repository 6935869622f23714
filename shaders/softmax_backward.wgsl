// softmax_backward: dx[r, c] = y[r, c] (dy[r, c] - sum_c y[r, c] dy[r, c])
// y, dy, dx [R, C]
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
struct Params { rows: u32, columns: u32, zero: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> y: array<f32>;          // [R, C]
@group(0) @binding(2) var<storage, read> dy: array<f32>;         // [R, C]
@group(0) @binding(3) var<storage, read_write> dx: array<f32>;   // [R, C]

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = linear_workgroup(group, groups);
    if row >= p.rows {
        return;
    }
    let base = row * p.columns;
    var sum = 0.0;
    for (var c = lane; c < p.columns; c += WG) {
        sum += y[base + c] * dy[base + c];
    }
    let mean = reduce_sum(sum, lane);
    for (var c = lane; c < p.columns; c += WG) {
        dx[base + c] = y[base + c] * (dy[base + c] - mean);
    }
}

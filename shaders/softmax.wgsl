// softmax: y[r, c] = exp(x[r, c] - m_r) / sum_c exp(x[r, c] - m_r), m_r = max_c x[r, c]
// x, y      [R, C]
// dispatch  one workgroup a row, folded
// shared    WG f32
#import grid
#import reduce
struct Params { rows: u32, columns: u32, zero: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [R, C]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [R, C]

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
    var largest = -3.4028234e38;
    for (var c = lane; c < p.columns; c += WG) {
        largest = max(largest, x[base + c]);
    }
    let m = reduce_max(largest, lane);
    var sum = 0.0;
    for (var c = lane; c < p.columns; c += WG) {
        // What is not finite makes the sum NaN, whatever max and exp make of it: 0, which compilers do not know.
        sum += fma(x[base + c], p.zero, exp(x[base + c] - m));
    }
    let total = reduce_sum(sum, lane);
    for (var c = lane; c < p.columns; c += WG) {
        y[base + c] = exp(x[base + c] - m) / total;
    }
}

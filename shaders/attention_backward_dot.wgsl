// attention_backward_dot: stats[1, row] = sum_d dy[row, d] o[row, d], what both backward kernels subtract
// dy, o     [rows, H] with rows = B Tq N
// stats     [2, rows]: lse, then dots
// dispatch  64 rows a workgroup, folded
#import grid
struct Params { rows: u32, h4: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> dy: array<vec4<f32>>;        // [rows, H / 4]
@group(0) @binding(2) var<storage, read> o: array<vec4<f32>>;         // [rows, H / 4]
@group(0) @binding(3) var<storage, read_write> stats: array<f32>;     // [2, rows]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = linear_workgroup(group, groups) * 64u + lane;
    if row < p.rows {
        var sum = 0.0;
        for (var d = 0u; d < p.h4; d += 1u) {
            sum += dot(dy[row * p.h4 + d], o[row * p.h4 + d]);
        }
        stats[p.rows + row] = sum;
    }
}

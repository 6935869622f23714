// cross_entropy_backward: logits become their gradient, in place:
//           g[r, c] = (softmax[r, c] - [c is the target]) weights[r] scale dy
// state     [R, 3] as cross_entropy_chunk leaves it
// targets, weights [R]    dy [1]
// logits    [R, C], columns first .. first + C of the vocabulary
// dispatch  256 elements a workgroup, folded
#import grid
struct Params { n: u32, columns: u32, first: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> state: array<f32>;           // [R, 3]
@group(0) @binding(2) var<storage, read> targets: array<u32>;         // [R]
@group(0) @binding(3) var<storage, read> weights: array<f32>;         // [R]
@group(0) @binding(4) var<storage, read> dy: array<f32>;              // [1]
@group(0) @binding(5) var<storage, read_write> logits: array<f32>;    // [R, C]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        let row = i / p.columns;
        let hit = select(0.0, 1.0, p.first + i % p.columns == targets[row]);
        let softmax = exp(logits[i] - state[row * 3u]) / state[row * 3u + 1u];
        logits[i] = (softmax - hit) * weights[row] * p.scale * dy[0];
    }
}

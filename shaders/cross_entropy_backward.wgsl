// cross_entropy_backward: logits become their gradient, in place:
//           g[r, c] = (softmax[r, c] - [c is the target]) weights[r] scale dy
// state     [R, 3] as cross_entropy_chunk leaves it
// targets, weights [R]    dy [1]
// logits    [R, C], columns first .. first + C of the vocabulary; C = pieces, or four times as many
// dispatch  one workgroup for 1024 pieces of a row, rows folded over x and y: (R, 1, pieces / 1024)
#import grid
#import quad
struct Params { rows: u32, pieces: u32, first: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> state: array<f32>;                 // [R, 3]
@group(0) @binding(2) var<storage, read> targets: array<u32>;               // [R]
@group(0) @binding(3) var<storage, read> weights: array<f32>;               // [R]
@group(0) @binding(4) var<storage, read> dy: array<f32>;                    // [1]
@group(0) @binding(5) var<storage, read_write> logits: array<vec4<f32>>;    // [R, C / 4]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = linear_workgroup(group, groups);
    if row >= p.rows {
        return;
    }
    let top = state[row * 3u];
    let total = state[row * 3u + 1u];
    let target_ = targets[row];
    let factor = weights[row] * p.scale * dy[0];
    let end = min((group.z + 1u) * 1024u, p.pieces);
    for (var c = group.z * 1024u + lane; c < end; c += 256u) {
        let i = row * p.pieces + c;
        let at = quad_of_piece(i);
        let first = p.first + c * select(1u, 4u, WIDE == 1u);
        let columns = vec4<u32>(first, first + 1u, first + 2u, first + 3u);
        let hit = select(vec4<f32>(), vec4<f32>(1.0), columns == vec4<u32>(target_));
        let g = (exp(piece(logits[at], i) - top) / total - hit) * factor;
        if WIDE == 1u {
            logits[at] = g;
        } else {
            logits[at][i % 4u] = g.x;
        }
    }
}

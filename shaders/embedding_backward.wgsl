// embedding_backward: dtable[r, c] = sum of dy[t, c] over the t with tokens[t] = first + r, t ascending
// tokens    [n]    order [2, n]: the tokens' numbers sorted by id, stably
// dy        [n, D], D = pieces, or four times as many
// dtable    [rows, D], zero already; one row shard
// partial   [2 C, D]: sums of ids that go over the border of chunks of 64, left for the next kernel: of chunk c
//           [2 c] the id that began before it, [2 c + 1] the one that begins in it and goes on behind
// dispatch  one workgroup a chunk and 64 pieces, chunks folded over x and y: (C, 1, pieces / 64)
#import grid
#import quad
struct Params { n: u32, pieces: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;                // [n]
@group(0) @binding(2) var<storage, read> order: array<u32>;                 // [2, n]
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;              // [n, D / 4]
@group(0) @binding(4) var<storage, read_write> dtable: array<vec4<f32>>;    // [rows, D / 4]
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>;   // [2 C, D / 4]

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let chunk = linear_workgroup(group, groups);
    let d = group.z * 64u + lane;
    let begin = chunk * 64u;
    if begin >= p.n || d >= p.pieces {
        return;
    }
    let end = min(begin + 64u, p.n);
    var goes_on = begin > 0u && tokens[order[max(begin, 1u) - 1u]] == tokens[order[begin]];
    var sum = vec4<f32>();
    for (var i = begin; i < end; i += 1u) {
        let t = order[i];
        let token = tokens[t];
        let at = t * p.pieces + d;
        sum += piece(dy[quad_of_piece(at)], at);
        let is_last = i + 1u >= p.n || tokens[order[min(i + 1u, p.n - 1u)]] != token;
        if !is_last && i + 1u < end {
            continue;
        }
        let row = token - p.first;
        if goes_on || !is_last {
            let to = (2u * chunk + select(1u, 0u, goes_on)) * p.pieces + d;
            if WIDE == 1u { partial[to] = sum; } else { partial[to / 4u][to % 4u] = sum.x; }
        } else if token >= p.first && row < p.rows {
            let to = row * p.pieces + d;
            if WIDE == 1u { dtable[to] = sum; } else { dtable[to / 4u][to % 4u] = sum.x; }
        }
        goes_on = false;
        sum = vec4<f32>();
    }
}

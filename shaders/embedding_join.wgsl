// embedding_join: dtable rows of the ids that go over a border of chunks, plus the sums of their chunks, in order
// tokens    [n]    order [2, n]: the tokens' numbers sorted by id, stably
// partial   [2 C, D] as embedding_backward leaves it, D = pieces, or four times as many
// dtable    [rows, D]; one row shard
// dispatch  one workgroup a chunk and 64 pieces, chunks folded over x and y: (C, 1, pieces / 64)
#import grid
#import quad
struct Params { n: u32, pieces: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;                // [n]
@group(0) @binding(2) var<storage, read> order: array<u32>;                 // [2, n]
@group(0) @binding(3) var<storage, read> partial: array<vec4<f32>>;         // [2 C, D / 4]
@group(0) @binding(4) var<storage, read_write> dtable: array<vec4<f32>>;    // [rows, D / 4]

fn part(at: u32, d: u32) -> vec4<f32> {
    let i = at * p.pieces + d;
    return piece(partial[quad_of_piece(i)], i);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let chunk = linear_workgroup(group, groups);
    let d = group.z * 64u + lane;
    let border = chunk * 64u + 64u;
    if border >= p.n || d >= p.pieces {
        return;
    }
    let token = tokens[order[border - 1u]];
    let row = token - p.first;
    let begins_before = chunk > 0u && tokens[order[chunk * 64u - 1u]] == token;
    if begins_before || tokens[order[border]] != token || token < p.first || row >= p.rows {
        return;
    }
    var sum = part(2u * chunk + 1u, d);
    for (var c = chunk + 1u; c * 64u < p.n && tokens[order[min(c * 64u, p.n - 1u)]] == token; c += 1u) {
        sum += part(2u * c, d);
    }
    let to = row * p.pieces + d;
    if WIDE == 1u { dtable[to] += sum; } else { dtable[to / 4u][to % 4u] += sum.x; }
}

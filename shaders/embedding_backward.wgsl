// embedding_backward: dtable[r, c] += sum of dy[t, c] over the t with tokens[t] = first + r, t ascending
// tokens    [n]    order [2, n]: the tokens' numbers sorted by id, stably
// dy        [n, D], D = pieces, or four times as many
// dtable    [rows, D], added to; one row shard
// partial   [2 C, D]: sums of ids that go over the border of chunks of 64, left for the next kernel: of chunk c
//           [2 c] the id that began before it, [2 c + 1] the one that begins in it and goes on behind
// dispatch  one workgroup a chunk and 256 pieces, chunks folded over x and y: (C, 1, pieces / 256)
// shared    a chunk's ids with a neighbour on each side, and its tokens' numbers, 520 bytes
#import grid
#import quad
const NONE: u32 = 0xffffffffu;
struct Params { n: u32, pieces: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;                // [n]
@group(0) @binding(2) var<storage, read> order: array<u32>;                 // [2, n]
@group(0) @binding(3) var<storage, read> dy: array<vec4<f32>>;              // [n, D / 4]
@group(0) @binding(4) var<storage, read_write> dtable: array<vec4<f32>>;    // [rows, D / 4]
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>;   // [2 C, D / 4]

var<workgroup> ids: array<u32, 66>;
var<workgroup> numbers: array<u32, 64>;

fn id_at(i: u32) -> u32 {
    if i < p.n {
        return tokens[order[i]];
    }
    return NONE;
}

fn store(is_partial: bool, row: u32, d: u32, sum: vec4<f32>) {
    if d >= p.pieces {
        return;
    }
    let to = row * p.pieces + d;
    if is_partial {
        if WIDE == 1u { partial[to] = sum; } else { partial[to / 4u][to % 4u] = sum.x; }
    } else {
        if WIDE == 1u { dtable[to] += sum; } else { dtable[to / 4u][to % 4u] += sum.x; }
    }
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let chunk = linear_workgroup(group, groups);
    let begin = chunk * 64u;
    if begin >= p.n {
        return;
    }
    numbers[lane] = order[min(begin + lane, p.n - 1u)];
    ids[lane + 1u] = id_at(begin + lane);
    if lane == 0u {
        // Unsigned: in front of the first token lies none.
        ids[0] = id_at(begin - 1u);
        ids[65] = id_at(begin + 64u);
    }
    workgroupBarrier();
    let count = min(64u, p.n - begin);
    var goes_on = ids[0] == ids[1];
    // Four pieces a lane, so that they share what it costs to find the row.
    let d = vec4<u32>(0u, 64u, 128u, 192u) + group.z * 256u + lane;
    let near = min(d, vec4<u32>(p.pieces - 1u));
    var sum: mat4x4<f32>;
    for (var i = 0u; i < count; i += 1u) {
        let at = numbers[i] * p.pieces + near;
        sum += mat4x4<f32>(piece(dy[quad_of_piece(at.x)], at.x), piece(dy[quad_of_piece(at.y)], at.y),
            piece(dy[quad_of_piece(at.z)], at.z), piece(dy[quad_of_piece(at.w)], at.w));
        let token = ids[i + 1u];
        let is_last = ids[i + 2u] != token;
        if !is_last && i + 1u < count {
            continue;
        }
        let is_partial = goes_on || !is_last;
        let row = select(token - p.first, 2u * chunk + select(1u, 0u, goes_on), is_partial);
        if is_partial || (token >= p.first && row < p.rows) {
            store(is_partial, row, d.x, sum[0]);
            store(is_partial, row, d.y, sum[1]);
            store(is_partial, row, d.z, sum[2]);
            store(is_partial, row, d.w, sum[3]);
        }
        goes_on = false;
        sum = mat4x4<f32>();
    }
}

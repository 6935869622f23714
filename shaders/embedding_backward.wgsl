// embedding_backward: dtable[r, c] = sum of dy[t, c] over the t with tokens[t] = first + r, t ascending
// tokens    [n]
// dy        [n, D]
// dtable    [rows, D], zero already; one row shard
// dispatch  one workgroup a token and 256 columns, tokens folded over x and y: (n, 1, D / 256)
// shared    one bit for each of 256 tokens, 32 bytes
// The first token of an id makes that id's row: no two workgroups write the same place, in a fixed order.
#import grid
struct Params { n: u32, d: u32, first: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;         // [n]
@group(0) @binding(2) var<storage, read> dy: array<f32>;             // [n, D]
@group(0) @binding(3) var<storage, read_write> dtable: array<f32>;   // [rows, D]

var<workgroup> hits: array<atomic<u32>, 8>;   // bit t of a tile of 256 tokens: token t has this id
var<workgroup> seen: u32;                     // not zero: an earlier token has this id

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let own = linear_workgroup(group, groups);
    if own >= p.n {
        return;
    }
    let token = tokens[own];
    if token < p.first || token - p.first >= p.rows {
        return;
    }
    if lane < 8u {
        atomicStore(&hits[lane], 0u);
    }
    workgroupBarrier();
    var earlier = false;
    for (var t = lane; t < own && !earlier; t += 256u) {
        earlier = tokens[t] == token;
    }
    if earlier {
        atomicOr(&hits[0], 1u);
    }
    workgroupBarrier();
    if lane == 0u {
        seen = atomicLoad(&hits[0]);
    }
    if workgroupUniformLoad(&seen) != 0u {
        return;
    }
    let column = group.z * 256u + lane;
    var sum = 0.0;
    for (var tile = own; tile < p.n; tile += 256u) {
        let t = tile + lane;
        if t < p.n && tokens[min(t, p.n - 1u)] == token {
            atomicOr(&hits[lane / 32u], 1u << (lane % 32u));
        }
        workgroupBarrier();
        for (var word = 0u; word < 8u && column < p.d; word += 1u) {
            for (var bits = atomicLoad(&hits[word]); bits != 0u; bits &= bits - 1u) {
                sum += dy[(tile + word * 32u + firstTrailingBit(bits)) * p.d + column];
            }
        }
        workgroupBarrier();
        if lane < 8u {
            atomicStore(&hits[lane], 0u);
        }
        workgroupBarrier();
    }
    if column < p.d {
        dtable[(token - p.first) * p.d + column] = sum;
    }
}

// embedding_sort: the numbers of tokens in the order of their ids, equal ids in the order of the text
// tokens    [n]
// order     [2, n]: the result, and room for every other pass
// dispatch  one workgroup
// shared    16 digits x 128 lanes and their sums, 8.5 KiB
// A radix sort by four bits a pass; a lane has a run of the tokens, so equal digits keep their order.
struct Params { n: u32, passes: u32, rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;         // [n]
@group(0) @binding(2) var<storage, read_write> order: array<u32>;    // [2, n]

// Ids that no row has are one: the passes see only the bits of row numbers.
fn digit_of(token: u32, shift: u32) -> u32 {
    return (min(tokens[token], p.rows) >> shift) & 15u;
}

var<workgroup> places: array<u32, 2048>;   // [16 digits, 128 lanes]
var<workgroup> sums: array<u32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(local_invocation_index) lane: u32) {
    let share = (p.n + 127u) / 128u;
    let first = min(lane * share, p.n);
    let end = min(first + share, p.n);
    // After the last pass the result lies in the first half.
    var here = p.passes % 2u * p.n;
    for (var i = first; i < end; i += 1u) {
        order[here + i] = i;
    }
    for (var pass_ = 0u; pass_ < p.passes; pass_ += 1u) {
        let shift = 4u * pass_;
        for (var digit = 0u; digit < 16u; digit += 1u) {
            places[digit * 128u + lane] = 0u;
        }
        for (var i = first; i < end; i += 1u) {
            places[digit_of(order[here + i], shift) * 128u + lane] += 1u;
        }
        workgroupBarrier();
        // Exclusive sums: of 16 places a lane, then of the lanes before it.
        var total = 0u;
        for (var i = 0u; i < 16u; i += 1u) {
            let count = places[lane * 16u + i];
            places[lane * 16u + i] = total;
            total += count;
        }
        sums[lane] = total;
        workgroupBarrier();
        var before = 0u;
        for (var i = 0u; i < lane; i += 1u) {
            before += sums[i];
        }
        for (var i = 0u; i < 16u; i += 1u) {
            places[lane * 16u + i] += before;
        }
        workgroupBarrier();
        let there = p.n - here;
        for (var i = first; i < end; i += 1u) {
            let token = order[here + i];
            let place = digit_of(token, shift) * 128u + lane;
            order[there + places[place]] = token;
            places[place] += 1u;
        }
        here = there;
        storageBarrier();
        workgroupBarrier();
    }
}

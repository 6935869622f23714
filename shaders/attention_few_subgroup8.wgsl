// attention_few_subgroup8: attention for a few rows and subgroups of 8: o[q] = sum_k softmax_k(scale q.k) v[k], lse[q]
// q         [B, Tq, N, H]    k, v  [B, Tk, G, H]    spans [words], see mask
// o         [splits, B, Tq, N, H]    stats [splits, B, Tq, N]: lse
// dispatch  (query tiles of 4 QUADS rows x splits, G, B): a workgroup is one subgroup
// Eight keys at a time. For the scores a lane has a key, for the sum every eighth dimension; the rows are a quad's
// components. Nothing is shared but by broadcasts, and arrays are indexed by constants, so that no lane loads for another.
#import mask
#import keys
#import weigh
const H: u32 = 64u;      // host 8 64 128
const QUADS: u32 = 1u;   // host 1 2 3 4
const OCTS: u32 = H / 8u;
const PAIRS: u32 = (OCTS + 1u) / 2u;
const FOUR: vec4<u32> = vec4<u32>(0u, 1u, 2u, 3u);
alias Eight = array<vec4<f32>, 8>;
struct Params {
    tq: u32, tk: u32, kv_heads: u32, mask: u32, block: u32, length: u32, scale: f32, rows: u32, splits: u32,
    zero: f32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                  // [B, Tq, N, H]
@group(0) @binding(2) var<storage, read> k: array<KeyQuad>;              // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<KeyPair>;              // [B, Tk, G, H / 2]
@group(0) @binding(4) var<storage, read> spans: array<u32>;              // [words]
@group(0) @binding(5) var<storage, read_write> o: array<vec2<f32>>;      // [splits, B, Tq, N, H / 2]
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;        // [splits, B, Tq, N]

var<private> queries: array<vec4<f32>, QUADS * OCTS>;   // dimension 8 oct + lane of a quad's rows
var<private> sums: array<mat2x4<f32>, QUADS * PAIRS>;   // of the output, pairs 8 i + lane of dimensions
var<private> s: array<vec4<f32>, QUADS>;                // scores of the lane's key
var<private> m: array<vec4<f32>, QUADS>;
var<private> total: array<vec4<f32>, QUADS>;            // of the lane's keys
var<private> shrink: array<vec4<f32>, QUADS>;
var<private> weights: array<Eight, QUADS>;              // of the eight keys, in every lane
var<private> seen: array<array<vec4<u32>, 4>, QUADS>;   // by row, the two ranges of keys

// A quad of rows from `first` on; past the edge the last one again.
fn begin(quad: u32, batch: u32, kv_head: u32, tile: vec2<u32>, lane: u32) {
    let row = min(FOUR + tile.x + 4u * quad, vec4<u32>(tile.y - 1u));
    let at = query_at(batch, kv_head, row) * H + lane;
    for (var i = 0u; i < OCTS; i += 1u) {
        queries[quad * OCTS + i] = vec4<f32>(q[at.x + 8u * i], q[at.y + 8u * i], q[at.z + 8u * i], q[at.w + 8u * i]);
    }
    let token = row / SHARED;
    seen[quad] = array<vec4<u32>, 4>(
        keys_of(batch, token.x), keys_of(batch, token.y), keys_of(batch, token.z), keys_of(batch, token.w),
    );
    m[quad] = vec4<f32>(NEVER);
}

fn handed_round(x: vec4<f32>) -> Eight {
    return Eight(
        subgroupBroadcast(x, 0u), subgroupBroadcast(x, 1u), subgroupBroadcast(x, 2u), subgroupBroadcast(x, 3u),
        subgroupBroadcast(x, 4u), subgroupBroadcast(x, 5u), subgroupBroadcast(x, 6u), subgroupBroadcast(x, 7u),
    );
}

fn add(sum: vec4<f32>, x: Eight, a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    let half = fma(x[3], vec4(a.w), fma(x[2], vec4(a.z), fma(x[1], vec4(a.y), fma(x[0], vec4(a.x), sum))));
    return fma(x[7], vec4(b.w), fma(x[6], vec4(b.z), fma(x[5], vec4(b.y), fma(x[4], vec4(b.x), half))));
}

// Scores to weights, which are handed round.
fn weigh(quad: u32, number: u32, far: bool) {
    let rows = seen[quad];
    let r = select(0u, 2u, far);
    let low = vec4<u32>(rows[0][r], rows[1][r], rows[2][r], rows[3][r]);
    let high = vec4<u32>(rows[0][r + 1u], rows[1][r + 1u], rows[2][r + 1u], rows[3][r + 1u]);
    let sees = (vec4<u32>(number) >= low) & (vec4<u32>(number) < high);
    let x = select(vec4<f32>(NEVER), s[quad] * p.scale, sees);
    let top = max(m[quad], subgroupMax(x));
    shrink[quad] = exp(m[quad] - top);
    m[quad] = top;
    let e = weights_of(x, top);
    total[quad] = fma(total[quad], shrink[quad], e);
    weights[quad] = handed_round(e);
    s[quad] = vec4<f32>();
}

// Adds the weighted values of eight keys, in two dimensions.
fn values(i: u32, x: vec4<u32>, y: vec4<u32>) {
    let a = transpose(mat4x2<f32>(wide_pair(v[x.x]), wide_pair(v[x.y]), wide_pair(v[x.z]), wide_pair(v[x.w])));
    let b = transpose(mat4x2<f32>(wide_pair(v[y.x]), wide_pair(v[y.y]), wide_pair(v[y.z]), wide_pair(v[y.w])));
    for (var quad = 0u; quad < QUADS; quad += 1u) {
        let old = sums[quad * PAIRS + i];
        let w = weights[quad];
        let even = add(old[0] * shrink[quad], w, a[0], b[0]);
        sums[quad * PAIRS + i] = mat2x4<f32>(even, add(old[1] * shrink[quad], w, a[1], b[1]));
    }
}

fn end(quad: u32, batch: u32, kv_head: u32, tile: vec2<u32>, split: u32, lane: u32) {
    let all = subgroupAdd(total[quad]);
    let inverse = inverse_of(all);
    let lse = lse_of(m[quad], all);
    let row = FOUR + tile.x + 4u * quad;
    let to = query_at(batch, kv_head, row) + split * p.rows;
    for (var r = 0u; r < 4u; r += 1u) {
        if row[r] >= tile.y {
            return;
        }
        stats[to[r]] = lse[r];
        for (var i = 0u; i < PAIRS && 8u * i + lane < H / 2u; i += 1u) {
            let x = sums[quad * PAIRS + i];
            o[to[r] * (H / 2u) + 8u * i + lane] = vec2<f32>(x[0][r], x[1][r]) * inverse[r];
        }
    }
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(subgroup_invocation_id) lane: u32) {
    let split = group.x % p.splits;
    let tile = tile_rows(group.z, group.x / p.splits, 4u * QUADS, p.tq, SHARED);
    if tile.x >= tile.y {
        return;
    }
    for (var i = 0u; i < QUADS; i += 1u) {
        begin(i, group.z, group.y, tile, lane);
    }
    let head = keys_of(group.z, tile.x / SHARED);
    let tail = keys_of(group.z, (tile.y - 1u) / SHARED);
    let near = (max(tail.y, head.x) - head.x + 7u) / 8u;
    let steps = near + (max(tail.w, head.z) - head.z + 7u) / 8u;
    for (var step = steps * split / p.splits; step < steps * (split + 1u) / p.splits; step += 1u) {
        let far = step >= near;
        let first = select(head.x + step * 8u, head.z + (step - near) * 8u, far);
        let last = select(tail.y, tail.w, far) - 1u;
        // Past the last key that one again, which no row then sees.
        let key = key_at(group.z, group.y, vec4<u32>(min(first + lane, last))).x;
        for (var i = 0u; i < OCTS; i += 1u) {
            let at = key * (H / 4u) + 2u * i;
            for (var j = 0u; j < QUADS; j += 1u) {
                s[j] = add(s[j], handed_round(queries[j * OCTS + i]), wide(k[at]), wide(k[at + 1u]));
            }
        }
        for (var i = 0u; i < QUADS; i += 1u) {
            weigh(i, first + lane, far);
        }
        let a = key_at(group.z, group.y, min(first + FOUR, vec4<u32>(last))) * (H / 2u);
        let b = key_at(group.z, group.y, min(first + 4u + FOUR, vec4<u32>(last))) * (H / 2u);
        for (var i = 0u; i < PAIRS; i += 1u) {
            let d = min(8u * i + lane, H / 2u - 1u);
            values(i, a + d, b + d);
        }
    }
    for (var i = 0u; i < QUADS; i += 1u) {
        end(i, group.z, group.y, tile, split, lane);
    }
}

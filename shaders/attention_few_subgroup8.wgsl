// attention_few_subgroup8: attention for a few rows and subgroups of 8: o[q] = sum_k softmax_k(scale q.k) v[k], lse[q]
// q         [B, Tq, N, H]    k, v  [B, Tk, G, H]    spans [words], see mask
// o         [splits, B, Tq, N, H]    stats [splits, B, Tq, N]: lse
// dispatch  (query tiles of 4 QUADS rows x splits, G, B): a workgroup is one subgroup
// Eight keys at a time. For the scores a lane has a key, for the sum every eighth dimension; the rows are a quad's
// components. Nothing is shared but by broadcasts, and arrays are indexed by constants, so that no lane loads for another.
#import mask
const H: u32 = 64u;      // host 8 64 128
const QUADS: u32 = 1u;   // host 1 2 3 4
const OCTS: u32 = H / 8u;
const NEVER: f32 = -3.0e38;
alias Eight = array<vec4<f32>, 8>;
struct Params {
    tq: u32, tk: u32, kv_heads: u32, mask: u32, block: u32, length: u32, scale: f32, rows: u32, splits: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;                  // [B, Tq, N, H]
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;            // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<f32>;                  // [B, Tk, G, H]
@group(0) @binding(4) var<storage, read> spans: array<u32>;              // [words]
@group(0) @binding(5) var<storage, read_write> o: array<f32>;            // [splits, B, Tq, N, H]
@group(0) @binding(6) var<storage, read_write> stats: array<f32>;        // [splits, B, Tq, N]

var<private> queries: array<vec4<f32>, QUADS * OCTS>;   // dimension 8 oct + lane of a quad's rows
var<private> sums: array<vec4<f32>, QUADS * OCTS>;      // the same of the output
var<private> s: array<vec4<f32>, QUADS>;                // scores of the lane's key
var<private> m: array<vec4<f32>, QUADS>;
var<private> total: array<vec4<f32>, QUADS>;            // of the lane's keys
var<private> shrink: array<vec4<f32>, QUADS>;
var<private> weights: array<Eight, QUADS>;              // of the eight keys, in every lane
var<private> seen: array<array<vec4<u32>, 4>, QUADS>;   // by row, the two ranges of keys

// A quad of rows from `first` on; past the edge the last one again.
fn begin(quad: u32, batch: u32, kv_head: u32, tile: vec2<u32>, lane: u32) {
    let row = min(vec4<u32>(0u, 1u, 2u, 3u) + tile.x + 4u * quad, vec4<u32>(tile.y - 1u));
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

// What each of the eight lanes holds of a quad of rows.
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
    // Not only by exp, which software adapters bound from below.
    let e = select(vec4<f32>(), exp(x - top), x > vec4<f32>(NEVER));
    total[quad] = fma(total[quad], shrink[quad], e);
    weights[quad] = handed_round(e);
    s[quad] = vec4<f32>();
}

// Adds the weighted values of eight keys, in one dimension.
fn values(oct: u32, from_a: vec4<u32>, from_b: vec4<u32>) {
    let a = vec4<f32>(v[from_a.x], v[from_a.y], v[from_a.z], v[from_a.w]);
    let b = vec4<f32>(v[from_b.x], v[from_b.y], v[from_b.z], v[from_b.w]);
    for (var quad = 0u; quad < QUADS; quad += 1u) {
        let at = quad * OCTS + oct;
        sums[at] = add(sums[at] * shrink[quad], weights[quad], a, b);
    }
}

fn end(quad: u32, batch: u32, kv_head: u32, tile: vec2<u32>, split: u32, lane: u32) {
    let all = subgroupAdd(total[quad]);
    // A row that may see nothing is zero, not NaN.
    let inverse = select(vec4<f32>(), 1.0 / all, all > vec4<f32>());
    let lse = select(vec4<f32>(NEVER), m[quad] + log(all), all > vec4<f32>());
    let row = vec4<u32>(0u, 1u, 2u, 3u) + tile.x + 4u * quad;
    let to = query_at(batch, kv_head, row) + split * p.rows;
    for (var r = 0u; r < 4u; r += 1u) {
        if row[r] >= tile.y {
            return;
        }
        stats[to[r]] = lse[r];
        for (var i = 0u; i < OCTS; i += 1u) {
            o[to[r] * H + 8u * i + lane] = sums[quad * OCTS + i][r] * inverse[r];
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
        let number = select(head.x + step * 8u, head.z + (step - near) * 8u, far) + lane;
        // Past the last key that one again, which no row then sees.
        let key = key_at(group.z, group.y, vec4<u32>(min(number, select(tail.y, tail.w, far) - 1u))).x;
        for (var i = 0u; i < OCTS; i += 1u) {
            let at = key * (H / 4u) + 2u * i;
            for (var j = 0u; j < QUADS; j += 1u) {
                s[j] = add(s[j], handed_round(queries[j * OCTS + i]), k[at], k[at + 1u]);
            }
        }
        for (var i = 0u; i < QUADS; i += 1u) {
            weigh(i, number, far);
        }
        let at = key * H;
        let a = lane + vec4<u32>(
            subgroupBroadcast(at, 0u), subgroupBroadcast(at, 1u), subgroupBroadcast(at, 2u), subgroupBroadcast(at, 3u),
        );
        let b = lane + vec4<u32>(
            subgroupBroadcast(at, 4u), subgroupBroadcast(at, 5u), subgroupBroadcast(at, 6u), subgroupBroadcast(at, 7u),
        );
        for (var i = 0u; i < OCTS; i += 1u) {
            values(i, a + 8u * i, b + 8u * i);
        }
    }
    for (var i = 0u; i < QUADS; i += 1u) {
        end(i, group.z, group.y, tile, split, lane);
    }
}

// attention_backward_kv: dv[k] = sum_q p[q, k] dy[q],  dk[k] = scale sum_q ds[q, k] q[q], over the query heads
// q, dy     [B, Tq, N, H]    k, v  [B, Tk, G, H]
// dk, dv    [B, Tk, G, H]    stats [2, B, Tq, N]: lse, then dots    spans [B, length, 2]
// dispatch  (key tiles of 8, G, B): 64 lanes are queries for p and ds, then head dimensions for the sums
// shared    8 keys, 8 values, twice 8 x 64 numbers: 12 KiB at H = 128
#import mask
const H: u32 = 64u; // host 4 64 128 192
const H4: u32 = H / 4u;
const PER_LANE: u32 = (H + 63u) / 64u;
struct Params {
    tq: u32, tk: u32, heads: u32, kv_heads: u32, capacity: u32, mask: u32, block: u32, length: u32,
    q_start: u32, scale: f32, stats: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;         // [B, Tq, N, H / 4]
@group(0) @binding(2) var<storage, read> k: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;         // [B, Tk, G, H / 4]
@group(0) @binding(4) var<storage, read> spans: array<u32>;           // [B, length, 2]
@group(0) @binding(5) var<storage, read> dy: array<vec4<f32>>;        // [B, Tq, N, H / 4]
@group(0) @binding(6) var<storage, read> stats: array<f32>;           // [2, B, Tq, N]
@group(0) @binding(7) var<storage, read_write> dk: array<f32>;        // [B, Tk, G, H]
@group(0) @binding(8) var<storage, read_write> dv: array<f32>;        // [B, Tk, G, H]

var<workgroup> keys: array<vec4<f32>, 8u * H4>;      // [8, H / 4]
var<workgroup> values: array<vec4<f32>, 8u * H4>;
var<workgroup> weights: array<f32, 512>;             // [8, 64]
var<workgroup> ds: array<f32, 512>;
var<private> sum_k: array<f32, 8u * PER_LANE>;       // [8, PER_LANE]
var<private> sum_v: array<f32, 8u * PER_LANE>;

fn differences(batch: u32, head: u32, query: u32, end: u32, tile: vec2<u32>, lane: u32) {
    var s: array<f32, 8>;
    var g: array<f32, 8>;
    let row = (batch * p.tq + min(query, end - 1u)) * p.heads + head;
    for (var d = 0u; d < H4; d += 1u) {
        let qd = q[row * H4 + d];
        let gd = dy[row * H4 + d];
        for (var r = 0u; r < 8u; r += 1u) {
            s[r] += dot(keys[r * H4 + d], qd);
            g[r] += dot(values[r * H4 + d], gd);
        }
    }
    for (var r = 0u; r < 8u; r += 1u) {
        var weight = 0.0;
        if query < end && r < tile.y && allowed(batch, query, tile.x + r) {
            weight = exp(s[r] * p.scale - stats[row]);
        }
        weights[r * 64u + lane] = weight;
        ds[r * 64u + lane] = weight * (g[r] - stats[p.stats + row]);
    }
}

fn gather(batch: u32, head: u32, first: u32, count: u32, lane: u32) {
    for (var j = 0u; j < PER_LANE; j += 1u) {
        let d = min(lane + 64u * j, H - 1u);
        for (var i = 0u; i < count; i += 1u) {
            let at = ((batch * p.tq + first + i) * p.heads + head) * H4 + d / 4u;
            let qd = q[at][d % 4u];
            let gd = dy[at][d % 4u];
            for (var r = 0u; r < 8u; r += 1u) {
                sum_k[r * PER_LANE + j] = fma(ds[r * 64u + i], qd, sum_k[r * PER_LANE + j]);
                sum_v[r * PER_LANE + j] = fma(weights[r * 64u + i], gd, sum_v[r * PER_LANE + j]);
            }
        }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let kv_head = group.y;
    let batch = group.z;
    let tile = tile_rows(group.x, p.tk);
    for (var i = lane; i < 8u * H4; i += 64u) {
        let row = tile.x + min(i / H4, tile.y - 1u);
        let at = ((batch * p.capacity + row) * p.kv_heads + kv_head) * H4 + i % H4;
        keys[i] = k[at];
        values[i] = v[at];
    }
    workgroupBarrier();
    let ranges = queries_of(batch, tile.x, tile.x + tile.y - 1u);
    let shared_by = p.heads / p.kv_heads;
    for (var head = kv_head * shared_by; head < (kv_head + 1u) * shared_by; head += 1u) {
        for (var part = 0u; part < 2u; part += 1u) {
            let range = select(ranges.xy, ranges.zw, part == 1u);
            for (var first = range.x; first < range.y; first += 64u) {
                differences(batch, head, first + lane, range.y, tile, lane);
                workgroupBarrier();
                gather(batch, head, first, min(64u, range.y - first), lane);
                workgroupBarrier();
            }
        }
    }
    // Eight rounds whatever the tile holds: an array indexed in an open-ended loop would live in memory.
    for (var r = 0u; r < 8u; r += 1u) {
        for (var j = 0u; j < PER_LANE; j += 1u) {
            let d = lane + 64u * j;
            if d < H && r < tile.y {
                let row = (batch * p.tk + tile.x + r) * p.kv_heads + kv_head;
                dk[row * H + d] = sum_k[r * PER_LANE + j] * p.scale;
                dv[row * H + d] = sum_v[r * PER_LANE + j];
            }
        }
    }
}

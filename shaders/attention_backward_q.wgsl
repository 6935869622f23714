// attention_backward_q: dq[q] = scale sum_k ds[q, k] k[k],  ds = p (do.v - dots),  p = exp(scale q.k - lse)
// q, dy, dq [B, Tq, N, H]    k, v  [B, Tk, G, H]
// stats     [2, B, Tq, N]: lse, then dots        spans [B, length, 2]
// dispatch  (query tiles of 8, N, B): 64 lanes are keys for ds, then head dimensions for the sum
// shared    8 queries, 8 cotangents, 8 x 64 values: 10 KiB at H = 128
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
@group(0) @binding(7) var<storage, read_write> dq: array<f32>;        // [B, Tq, N, H]

var<workgroup> queries: array<vec4<f32>, 8u * H4>;   // [8, H / 4]
var<workgroup> cotangents: array<vec4<f32>, 8u * H4>;
var<workgroup> ds: array<f32, 512>;                  // [8, 64]
var<private> sum: array<f32, 8u * PER_LANE>;         // [8, PER_LANE]

fn differences(batch: u32, head: u32, kv_head: u32, key: u32, end: u32, tile: vec2<u32>, lane: u32) {
    var s: array<f32, 8>;
    var g: array<f32, 8>;
    let row = ((batch * p.capacity + min(key, end - 1u)) * p.kv_heads + kv_head) * H4;
    for (var d = 0u; d < H4; d += 1u) {
        let kd = k[row + d];
        let vd = v[row + d];
        for (var r = 0u; r < 8u; r += 1u) {
            s[r] += dot(queries[r * H4 + d], kd);
            g[r] += dot(cotangents[r * H4 + d], vd);
        }
    }
    for (var r = 0u; r < 8u; r += 1u) {
        var value = 0.0;
        if key < end && r < tile.y && allowed(batch, tile.x + r, key) {
            let at = (batch * p.tq + tile.x + r) * p.heads + head;
            value = exp(s[r] * p.scale - stats[at]) * (g[r] - stats[p.stats + at]);
        }
        ds[r * 64u + lane] = value;
    }
}

fn gather(batch: u32, kv_head: u32, first: u32, count: u32, lane: u32) {
    for (var j = 0u; j < PER_LANE; j += 1u) {
        let d = min(lane + 64u * j, H - 1u);
        for (var i = 0u; i < count; i += 1u) {
            let x = k[((batch * p.capacity + first + i) * p.kv_heads + kv_head) * H4 + d / 4u][d % 4u];
            for (var r = 0u; r < 8u; r += 1u) {
                sum[r * PER_LANE + j] = fma(ds[r * 64u + i], x, sum[r * PER_LANE + j]);
            }
        }
    }
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let head = group.y;
    let batch = group.z;
    let kv_head = head / (p.heads / p.kv_heads);
    let tile = tile_rows(group.x, p.tq);
    for (var i = lane; i < 8u * H4; i += 64u) {
        let row = tile.x + min(i / H4, tile.y - 1u);
        let at = ((batch * p.tq + row) * p.heads + head) * H4 + i % H4;
        queries[i] = q[at];
        cotangents[i] = dy[at];
    }
    workgroupBarrier();
    let ranges = keys_of(batch, tile.x, tile.x + tile.y - 1u);
    for (var part = 0u; part < 2u; part += 1u) {
        let range = select(ranges.xy, ranges.zw, part == 1u);
        for (var first = range.x; first < range.y; first += 64u) {
            differences(batch, head, kv_head, first + lane, range.y, tile, lane);
            workgroupBarrier();
            gather(batch, kv_head, first, min(64u, range.y - first), lane);
            workgroupBarrier();
        }
    }
    // Eight rounds whatever the tile holds: an array indexed in an open-ended loop would live in memory.
    for (var r = 0u; r < 8u; r += 1u) {
        for (var j = 0u; j < PER_LANE; j += 1u) {
            let d = lane + 64u * j;
            if d < H && r < tile.y {
                let row = (batch * p.tq + tile.x + r) * p.heads + head;
                dq[row * H + d] = sum[r * PER_LANE + j] * p.scale;
            }
        }
    }
}

// rope_cache: rotates the queries and keys of new tokens by their positions; keys and values go into a layer's cache
// x             [T, N + 2 G, H]: queries, keys, values
// frequency     [H / 2]
// places        [T]: each token's position and slot
// y             [T, N, H], the queries
// keys, values  [slots, G, H]
// dispatch      256 pairs a workgroup, folded
#import grid
#import rotation
struct Params { tokens: u32, heads: u32, kv_heads: u32, half: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;               // [T, N + 2 G, H]
@group(0) @binding(2) var<storage, read> frequency: array<f32>;       // [H / 2]
@group(0) @binding(3) var<storage, read> places: array<vec2<u32>>;    // [T]
@group(0) @binding(4) var<storage, read_write> y: array<f32>;         // [T, N, H]
@group(0) @binding(5) var<storage, read_write> keys: array<f32>;      // [slots, G, H]
@group(0) @binding(6) var<storage, read_write> values: array<f32>;    // [slots, G, H]

fn rotated(a: f32, b: f32, r: vec2<f32>) -> vec2<f32> {
    return vec2<f32>(a * r.x - b * r.y, b * r.x + a * r.y);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let pair = linear_workgroup(group, groups) * 256u + lane;
    let heads = p.heads + 2u * p.kv_heads;
    let token = pair / (heads * p.half);
    if token >= p.tokens {
        return;
    }
    let head = pair / p.half % heads;
    let i = pair % p.half;
    let at = (token * heads + head) * 2u * p.half + i;
    let place = places[token];
    let kv_head = place.y * p.kv_heads + head - p.heads;
    if head >= p.heads + p.kv_heads {
        let to = (kv_head - p.kv_heads) * 2u * p.half + i;
        values[to] = x[at];
        values[to + p.half] = x[at + p.half];
        return;
    }
    let turned = rotated(x[at], x[at + p.half], cos_sin(rotary_angle(place.x, frequency[i])));
    if head < p.heads {
        let to = (token * p.heads + head) * 2u * p.half + i;
        y[to] = turned.x;
        y[to + p.half] = turned.y;
    } else {
        let to = kv_head * 2u * p.half + i;
        keys[to] = turned.x;
        keys[to + p.half] = turned.y;
    }
}

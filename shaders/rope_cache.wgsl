// rope_cache: rotates the queries and keys of new tokens by their positions; keys and values go into a layer's cache
// x             [T, N + 2 G, H]: queries, keys, values
// frequency     [H / 2], or [T, H / 2]: each token's own (own = 1); H a multiple of 4
// places        [T]: each token's position and slot
// y             [T, N, H], the queries
// keys, values  [slots, G, H]
// dispatch      256 times two neighbouring pairs a workgroup, folded
#import grid
#import rotation
#import keys
struct Params { tokens: u32, heads: u32, kv_heads: u32, half: u32, own: u32, scale: f32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec2<f32>>;             // [T, N + 2 G, H / 2]
@group(0) @binding(2) var<storage, read> frequency: array<vec2<f32>>;     // [H / 4] or [T, H / 4]
@group(0) @binding(3) var<storage, read> places: array<vec2<u32>>;        // [T]
@group(0) @binding(4) var<storage, read_write> y: array<vec2<f32>>;       // [T, N, H / 2]
@group(0) @binding(5) var<storage, read_write> keys: array<KeyPair>;      // [slots, G, H / 2]
@group(0) @binding(6) var<storage, read_write> values: array<KeyPair>;    // [slots, G, H / 2]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let unit = linear_workgroup(group, groups) * 256u + lane;
    let heads = p.heads + 2u * p.kv_heads;
    let quarter = p.half / 2u;
    let token = unit / (heads * quarter);
    if token >= p.tokens {
        return;
    }
    let head = unit / quarter % heads;
    let i = unit % quarter;
    // Two elements of the head's first half, and those of its second that they turn with.
    let at = (token * heads + head) * p.half + i;
    let a = x[at];
    let b = x[at + quarter];
    let place = places[token];
    let kv_head = place.y * p.kv_heads + head - p.heads;
    if head >= p.heads + p.kv_heads {
        let to = (kv_head - p.kv_heads) * p.half + i;
        values[to] = narrow(a);
        values[to + quarter] = narrow(b);
        return;
    }
    let f = frequency[token * quarter * p.own + i];
    let first = cos_sin(rotary_angle(place.x, f.x));
    let second = cos_sin(rotary_angle(place.x, f.y));
    let c = vec2<f32>(first.x, second.x) * p.scale;
    let s = vec2<f32>(first.y, second.y) * p.scale;
    let low = a * c - b * s;
    let high = b * c + a * s;
    if head < p.heads {
        let to = (token * p.heads + head) * p.half + i;
        y[to] = low;
        y[to + quarter] = high;
    } else {
        let to = kv_head * p.half + i;
        keys[to] = narrow(low);
        keys[to + quarter] = narrow(high);
    }
}

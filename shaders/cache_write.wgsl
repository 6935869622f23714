// cache_write: appends the keys and values of new tokens to a layer's cache, in place
// k, v              [T, G H]: n = T G H numbers
// k_cache, v_cache  [capacity, G H], written from number `start` on
// dispatch          256 numbers a workgroup, folded
#import grid
struct Params { n: u32, start: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> k: array<f32>;               // [T, G H]
@group(0) @binding(2) var<storage, read> v: array<f32>;               // [T, G H]
@group(0) @binding(3) var<storage, read_write> k_cache: array<f32>;   // [capacity, G H]
@group(0) @binding(4) var<storage, read_write> v_cache: array<f32>;   // [capacity, G H]

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.n {
        k_cache[p.start + i] = k[i];
        v_cache[p.start + i] = v[i];
    }
}

// elementwise_binary: y[i] = f(a[i], b[i]); the table in elementwise.rs gives each op its f, here the first
// a, b      [n], or broadcast to four axes by strides of zero with BROADCAST
// y         [n], n the product of the extents
// dispatch  256 elements a workgroup, folded
#import grid
override BROADCAST: u32 = 0u;
struct Params { extent: vec4<u32>, a_stride: vec4<u32>, b_stride: vec4<u32> }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;         // [n] or broadcast
@group(0) @binding(2) var<storage, read> b: array<f32>;         // [n] or broadcast
@group(0) @binding(3) var<storage, read_write> y: array<f32>;   // [n]

// y, or x where that is NaN, which min, max and clamp of some drivers lose.
fn or_nan(x: f32, y: f32) -> f32 {
    return select(y, x, (bitcast<u32>(x) & 0x7fffffffu) > 0x7f800000u);
}

fn f(a: f32, b: f32) -> f32 {
    return a;
}

fn strided(i: u32, stride: vec4<u32>) -> u32 {
    let z = i / p.extent.w;
    let y = z / p.extent.z;
    let x = y / p.extent.y;
    let index = vec4<u32>(x, y % p.extent.y, z % p.extent.z, i % p.extent.w) * stride;
    return index.x + index.y + index.z + index.w;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = linear_workgroup(group, groups) * 256u + lane;
    if i < p.extent.x * p.extent.y * p.extent.z * p.extent.w {
        if BROADCAST == 1u {
            y[i] = f(a[strided(i, p.a_stride)], b[strided(i, p.b_stride)]);
        } else {
            y[i] = f(a[i], b[i]);
        }
    }
}

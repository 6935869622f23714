// max: y[o, i] = max_r x[o, r, i], and the first r that has it; NaN is above all
// x         [O, R, I], R > 0
// y, first  [O, I]
// dispatch  one workgroup an element of y, folded; lanes along R
// shared    256 keys and their places, 2 KiB
#import grid
struct Params { n: u32, extent: u32, inner: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;             // [O, R, I]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;       // [O, I]
@group(0) @binding(3) var<storage, read_write> first: array<u32>;   // [O, I]

var<workgroup> keys: array<u32, 256>;
var<workgroup> places: array<u32, 256>;

// Bits in the order of the numbers, so that no driver's way with NaN counts. Both zeros are one.
fn key(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let size = bits & 0x7fffffffu;
    let ordered = select(size | 0x80000000u, ~bits, (bits >> 31u) == 1u && size != 0u);
    return select(ordered, 0xffffffffu, size > 0x7f800000u);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = linear_workgroup(group, groups);
    if at >= p.n {
        return;
    }
    let base = (at / p.inner) * p.extent * p.inner + at % p.inner;
    // A lane past the end repeats the last element, which changes neither the maximum nor its place.
    var place = min(lane, p.extent - 1u);
    var best = key(x[base + place * p.inner]);
    for (var r = lane + 256u; r < p.extent; r += 256u) {
        let value = key(x[base + r * p.inner]);
        if value > best {
            best = value;
            place = r;
        }
    }
    keys[lane] = best;
    places[lane] = place;
    workgroupBarrier();
    for (var stride = 128u; stride > 0u; stride /= 2u) {
        if lane < stride {
            let value = keys[lane + stride];
            let other = places[lane + stride];
            if value > keys[lane] || (value == keys[lane] && other < places[lane]) {
                keys[lane] = value;
                places[lane] = other;
            }
        }
        workgroupBarrier();
    }
    if lane == 0u {
        y[at] = x[base + places[0] * p.inner];
        first[at] = places[0];
    }
}

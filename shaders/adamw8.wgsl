// adamw8: m += rest1 (g - m), v = beta2 v + rest2 g^2, w = decay w - step m / (sqrt(v) / bias2 + eps), m and v in 8 bits
// grad      [n], g = grad * grad_scale * clip; in quads, what lies behind the last element is of no one
// norm_clip [2], the bits of the gradients' norm and of clip; where clip is 0 nothing changes
// w         [n], in place
// m, v      [B, 64], codes of blocks of 256 elements, the first of four lowest in its word, in place
// scales    [B, 2], the largest |m| and v of each block, in place
// dispatch  16 blocks a workgroup, 16 lanes a block, folded
// shared    256 pairs
// A code counts units of its block's largest over TOP: c below 8, else (8 + c % 8) 2^(c / 8 - 1), so that the last code
// is TOP. m has 7 bits of it and a sign above them, v has 8. Rounding is up with the fraction's probability.
#import grid
const TOP: vec2<f32> = vec2<f32>(245760.0, 16106127360.0);   // 15 2^14, 15 2^30
// Below it a block's largest is as good as zero, and its reciprocal might be infinite.
const SMALLEST: f32 = 1.2e-38;
struct Params {
    n: u32,
    grad_scale: f32,
    decay: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    step: f32,
    bias2: f32,
    eps: f32,
    key_a: u32,
    key_b: u32,
    key_c: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>;            // [n / 4]
@group(0) @binding(2) var<storage, read> norm_clip: array<u32>;             // [2]
@group(0) @binding(3) var<storage, read_write> w: array<vec4<f32>>;         // [n / 4]
@group(0) @binding(4) var<storage, read_write> m: array<u32>;               // [B, 64]
@group(0) @binding(5) var<storage, read_write> v: array<u32>;               // [B, 64]
@group(0) @binding(6) var<storage, read_write> scales: array<vec2<f32>>;    // [B, 2]

var<workgroup> largest: array<vec2<f32>, 256>;

struct Moments { mean: vec4<f32>, square: vec4<f32> }

fn bytes(word: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
}

fn word(bytes: vec4<u32>) -> u32 {
    return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}

// From code 8 on, which is 8.0, codes count as the upper twelve bits of a float do.
fn units(code: vec4<u32>) -> vec4<f32> {
    let far = bitcast<vec4<f32>>((code + vec4<u32>(1032u)) << vec4<u32>(20u));
    return select(far, vec4<f32>(code), code < vec4<u32>(8u));
}

// Sixteen random bits, and a half, stand for the twenty that a float has beyond a code.
fn code(units: vec4<f32>, random: vec4<u32>, most: u32) -> vec4<u32> {
    let more = (random << vec4<u32>(4u)) + vec4<u32>(8u);
    let far = ((bitcast<vec4<u32>>(units) + more) >> vec4<u32>(20u)) - vec4<u32>(1032u);
    let near = vec4<u32>(min(units, vec4<f32>(8.0)) + vec4<f32>(more) / 1048576.0);
    return min(select(far, near, units < vec4<f32>(8.0)), vec4<u32>(most));
}

// pcg4d (Jarzynski and Olano, JCGT 9(3), 2020)
fn draw(quad: u32) -> vec4<u32> {
    var x = vec4<u32>(quad, p.key_a, p.key_b, p.key_c) * 1664525u + 1013904223u;
    x.x += x.y * x.w;
    x.y += x.z * x.x;
    x.z += x.x * x.y;
    x.w += x.y * x.z;
    x ^= x >> vec4<u32>(16u);
    x.x += x.y * x.w;
    x.y += x.z * x.x;
    x.z += x.x * x.y;
    x.w += x.y * x.z;
    return x;
}

// Updates four weights; their new moments.
fn update(quad: u32, block: u32) -> Moments {
    if quad * 4u >= p.n {
        return Moments();
    }
    let inside = vec4<u32>(quad * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.n);
    let g = select(vec4<f32>(), grad[quad] * (p.grad_scale * bitcast<f32>(norm_clip[1])), inside);
    let scale = scales[block];
    let c = bytes(m[quad]);
    let size = units(c & vec4<u32>(127u)) * (1.0 / TOP.x) * scale.x;
    let old = select(size, -size, c > vec4<u32>(127u));
    let mean = old + p.rest1 * (g - old);
    let square = p.beta2 * (units(bytes(v[quad])) * (1.0 / TOP.y) * scale.y) + p.rest2 * g * g;
    w[quad] = p.decay * w[quad] - p.step * mean / (sqrt(square) / p.bias2 + p.eps);
    return Moments(mean, square);
}

fn keep(quad: u32, fresh: Moments, per: vec2<f32>) {
    if quad * 4u >= p.n {
        return;
    }
    let random = draw(quad);
    let size = code(abs(fresh.mean) * per.x * TOP.x, random >> vec4<u32>(16u), 127u);
    m[quad] = word(select(size, size | vec4<u32>(128u), fresh.mean < vec4<f32>()));
    // What divides never becomes zero: it would make a step of a rest of m boundless.
    let least = select(vec4<u32>(), vec4<u32>(1u), fresh.square > vec4<f32>());
    v[quad] = word(max(code(fresh.square * per.y * TOP.y, random & vec4<u32>(65535u), 255u), least));
}

fn larger(best: vec2<f32>, fresh: Moments) -> vec2<f32> {
    let a = max(abs(fresh.mean.xy), abs(fresh.mean.zw));
    let b = max(fresh.square.xy, fresh.square.zw);
    return max(best, vec2<f32>(max(a.x, a.y), max(b.x, b.y)));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if norm_clip[1] == 0u {
        return;
    }
    let block = linear_workgroup(group, groups) * 16u + lane / 16u;
    let quad = block * 64u + lane % 16u;
    let one = update(quad, block);
    let two = update(quad + 16u, block);
    let three = update(quad + 32u, block);
    let four = update(quad + 48u, block);
    largest[lane] = larger(larger(larger(larger(vec2<f32>(), one), two), three), four);
    workgroupBarrier();
    var most = vec2<f32>();
    for (var i = 0u; i < 16u; i += 1u) {
        most = max(most, largest[(lane & 0xf0u) + i]);
    }
    if lane % 16u == 0u && block * 256u < p.n {
        scales[block] = most;
    }
    let per = 1.0 / max(most, vec2<f32>(SMALLEST));
    keep(quad, one, per);
    keep(quad + 16u, two, per);
    keep(quad + 32u, three, per);
    keep(quad + 48u, four, per);
}

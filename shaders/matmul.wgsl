// matmul: y[m, n] = sum_k a(m, k) b(k, n), 64 x 64 outputs a workgroup, 4 x 4 an invocation
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// b         [Z, K, N], or [Z, N, K] with B_TRANSPOSED; f32, bf16 or f16
// y         [Z, M, N], or added to it with ADD
// dispatch  (N / 64, M / 64, Z); the contiguous extents of a and b and N are multiples of 4
// shared    two 16 x 64 tiles, k outermost, 8 KiB
#import weight
override A_TRANSPOSED: u32 = 0u;
override B_TRANSPOSED: u32 = 0u;
override ADD: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_m: u32, a_k: u32, a_z: u32, b_z: u32, b_from: u32, y_from: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;         // [Z, M, K / 4] or [Z, K, M / 4]
@group(0) @binding(2) var<storage, read> b: array<Weight4>;           // [Z, K, N / 4] or [Z, N, K / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [Z, M, N / 4]

const TILE: u32 = 64u;
const STEP: u32 = 16u;
var<workgroup> tile_a: array<f32, 1024>;   // [STEP, TILE]
var<workgroup> tile_b: array<f32, 1024>;   // [STEP, TILE]

// Four values along k for one row go to four rows of the tile; past the edge they are zero.
fn store_across(v: vec4<f32>, along: u32, k: u32, is_a: bool) {
    for (var i = 0u; i < 4u; i += 1u) {
        if is_a {
            tile_a[(k + i) * TILE + along] = v[i];
        } else {
            tile_b[(k + i) * TILE + along] = v[i];
        }
    }
}

fn load_a(t: u32, first_m: u32, first_k: u32, z: u32) {
    if A_TRANSPOSED == 1u {
        let k = t / 16u;
        let m = (t % 16u) * 4u;
        var v = vec4<f32>();
        if first_k + k < p.k && first_m + m < p.m {
            v = a[(z * p.a_z + (first_k + k) * p.m + first_m + m) / 4u];
        }
        for (var i = 0u; i < 4u; i += 1u) {
            tile_a[k * TILE + m + i] = v[i];
        }
    } else {
        let m = t / 4u;
        let k = (t % 4u) * 4u;
        var v = vec4<f32>();
        if first_m + m < p.m && first_k + k < p.k {
            v = a[(z * p.a_z + (first_m + m) * p.k + first_k + k) / 4u];
        }
        store_across(v, m, k, true);
    }
}

fn load_b(t: u32, first_n: u32, first_k: u32, z: u32) {
    if B_TRANSPOSED == 1u {
        let n = t / 4u;
        let k = (t % 4u) * 4u;
        var v = vec4<f32>();
        if first_n + n < p.n && first_k + k < p.k {
            v = unpack_weight4(b[(z * p.b_z + p.b_from + (first_n + n) * p.k + first_k + k) / 4u]);
        }
        store_across(v, n, k, false);
    } else {
        let k = t / 16u;
        let n = (t % 16u) * 4u;
        var v = vec4<f32>();
        if first_k + k < p.k && first_n + n < p.n {
            v = unpack_weight4(b[(z * p.b_z + p.b_from + (first_k + k) * p.n + first_n + n) / 4u]);
        }
        for (var i = 0u; i < 4u; i += 1u) {
            tile_b[k * TILE + n + i] = v[i];
        }
    }
}

fn quad(is_a: bool, at: u32) -> vec4<f32> {
    if is_a {
        return vec4<f32>(tile_a[at], tile_a[at + 1u], tile_a[at + 2u], tile_a[at + 3u]);
    }
    return vec4<f32>(tile_b[at], tile_b[at + 1u], tile_b[at + 2u], tile_b[at + 3u]);
}

fn store(row: u32, column: u32, z: u32, value: vec4<f32>) {
    if row < p.m && column < p.n {
        let at = (p.y_from + (z * p.m + row) * p.n + column) / 4u;
        if ADD == 1u {
            y[at] += value;
        } else {
            y[at] = value;
        }
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) t: u32) {
    let first_m = group.y * TILE;
    let first_n = group.x * TILE;
    let m = (t / 16u) * 4u;
    let n = (t % 16u) * 4u;
    var y0 = vec4<f32>();
    var y1 = vec4<f32>();
    var y2 = vec4<f32>();
    var y3 = vec4<f32>();
    for (var first_k = 0u; first_k < p.k; first_k += STEP) {
        load_a(t, first_m, first_k, group.z);
        load_b(t, first_n, first_k, group.z);
        workgroupBarrier();
        for (var k = 0u; k < STEP; k += 1u) {
            let av = quad(true, k * TILE + m);
            let bv = quad(false, k * TILE + n);
            y0 = fma(vec4<f32>(av.x), bv, y0);
            y1 = fma(vec4<f32>(av.y), bv, y1);
            y2 = fma(vec4<f32>(av.z), bv, y2);
            y3 = fma(vec4<f32>(av.w), bv, y3);
        }
        workgroupBarrier();
    }
    store(first_m + m, first_n + n, group.z, y0);
    store(first_m + m + 1u, first_n + n, group.z, y1);
    store(first_m + m + 2u, first_n + n, group.z, y2);
    store(first_m + m + 3u, first_n + n, group.z, y3);
}

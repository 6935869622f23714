// matmul_coop: y[m, n] = sum_k a(m, k) w(k, n) on matrix units; four subgroups make 4 EDGE x 4 EDGE outputs
// a         [Z, M, K], or [Z, K, M] with A_TRANSPOSED
// w         [Z, K, N], or [Z, N, K] with W_TRANSPOSED; any weight type
// r         [Z, M, N], added to the product with ONTO 2
// y         [Z, M, N], added to with ONTO 1; [slices, M, N] with SLICED
// dispatch  (N / (4 EDGE), M / (4 EDGE), Z or slices); the contiguous extents of a and w, K and N are multiples of 4
// shared    two 4 EDGE x 2 EDGE tiles of operands, four EDGE x EDGE of sums: at most 12 KiB
// The operands become Part (f16 or f32, by the import `coop`) on the way; sums are f32.
#import weight
#import swizzle
#import matmul
#import coop
override LANES: u32 = 32u;   // invocations of a subgroup
struct Params {
    m: u32, n: u32, k: u32, a_z: u32, w_z: u32, w_row: u32, y_from: u32, k_slice: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;         // [Z, M, K] or [Z, K, M], flat quads
@group(0) @binding(2) var<storage, read> w: array<Weight>;            // [Z, K, N] or [Z, N, K]
@group(0) @binding(3) var<storage, read> r: array<vec4<f32>>;         // [Z, M, N], flat quads
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;   // [Z, M, N], flat quads

const TILE: u32 = 4u * EDGE;
const STEP: u32 = 2u * EDGE;
var<workgroup> tile_a: array<Part, STEP * TILE>;       // [k, m]
var<workgroup> tile_w: array<Part, STEP * TILE>;       // [k, n]
var<workgroup> sums: array<f32, 4u * EDGE * EDGE>;     // [subgroup, m, n]

// Blocks of 4 k by 4, shared out over the workgroup. Neighbours read along memory.
fn load(t: u32, first: vec2<u32>, k: u32, end: u32, z: u32) {
    for (var i = t; i < STEP * TILE / 16u; i += 4u * LANES) {
        let at = (i % (STEP / 4u)) * 4u;
        let along = (i / (STEP / 4u)) * 4u;
        let block_of_a = block_a(z, first.y + along, k + at, end);
        let block_of_w = block_w(z, first.x + along, k + at, end);
        for (var row = 0u; row < 4u; row += 1u) {
            for (var j = 0u; j < 4u; j += 1u) {
                tile_a[(at + row) * TILE + along + j] = Part(block_of_a[row][j]);
                tile_w[(at + row) * TILE + along + j] = Part(block_of_w[row][j]);
            }
        }
    }
}

// One EDGE x EDGE piece through workgroup memory, where its elements can be reached.
fn store(sum: Sum, subgroup: u32, lane: u32, row: u32, column: u32, z: u32) {
    let base = subgroup * EDGE * EDGE;
    coopStoreT(sum, &sums[base], EDGE);
    workgroupBarrier();
    for (var i = lane; i < EDGE * EDGE / 4u; i += LANES) {
        let at = base + 4u * i;
        let value = vec4<f32>(sums[at], sums[at + 1u], sums[at + 2u], sums[at + 3u]);
        put(z, row + 4u * i / EDGE, column + (4u * i) % EDGE, value);
    }
    workgroupBarrier();
}

@compute @workgroup_size(4u * LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let first = TILE * swizzle(group.xy, groups.xy);
    let range = k_range(group.z);
    let subgroup = t / LANES;
    let m = 2u * EDGE * (subgroup / 2u);
    let n = 2u * EDGE * (subgroup % 2u);
    var s00 = Sum();
    var s01 = Sum();
    var s10 = Sum();
    var s11 = Sum();
    for (var k = range.x; k < range.y; k += STEP) {
        load(t, first, k, range.y, group.z);
        workgroupBarrier();
        for (var i = 0u; i < STEP; i += EDGE) {
            let a0 = coopLoad<Left>(&tile_a[i * TILE + m], TILE);
            let a1 = coopLoad<Left>(&tile_a[i * TILE + m + EDGE], TILE);
            let w0 = coopLoadT<Right>(&tile_w[i * TILE + n], TILE);
            let w1 = coopLoadT<Right>(&tile_w[i * TILE + n + EDGE], TILE);
            s00 = coopMultiplyAdd(a0, w0, s00);
            s01 = coopMultiplyAdd(a0, w1, s01);
            s10 = coopMultiplyAdd(a1, w0, s10);
            s11 = coopMultiplyAdd(a1, w1, s11);
        }
        workgroupBarrier();
    }
    let lane = t % LANES;
    let row = first.y + m;
    let column = first.x + n;
    store(s00, subgroup, lane, row, column, group.z);
    store(s01, subgroup, lane, row, column + EDGE, group.z);
    store(s10, subgroup, lane, row + EDGE, column, group.z);
    store(s11, subgroup, lane, row + EDGE, column + EDGE, group.z);
}

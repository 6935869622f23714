// matmul_subgroup8: y[m, n] = sum_k a(m, k) b(k, n) for subgroups of 8, as software adapters have
// a         [Z, M, K], or [Z, K, M] with a_m = 1, a_k = M
// b         [Z, K, N], or [Z, N, K] with B_TRANSPOSED; f32, bf16 or f16; K and N multiples of 4
// y         [Z, M, N], or added to it with ADD
// dispatch  (N / 32, M / 32, Z): a workgroup is one subgroup and makes 32 x 32 outputs
// Software adapters turn a load into one scalar load per lane, so loads decide: each lane loads another
// element of a and hands it round, which needs an eighth of the loads.
#import weight
override B_TRANSPOSED: u32 = 0u;
override ADD: u32 = 0u;
struct Params {
    m: u32, n: u32, k: u32, a_m: u32, a_k: u32, a_z: u32, b_z: u32, b_from: u32, y_from: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;               // [Z, M, K]
@group(0) @binding(2) var<storage, read> b: array<Weight4>;           // [Z, K, N / 4] or [Z, N, K / 4]
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;   // [Z, M, N / 4]

var<private> acc: array<vec4<f32>, 32>;

// One k: lane i of the subgroup holds rows i, 8 + i, 16 + i and 24 + i of a in x, and a column quad of b in w.
fn step(x: vec4<f32>, w: vec4<f32>) {
    acc[0] = fma(vec4<f32>(subgroupBroadcast(x.x, 0u)), w, acc[0]);
    acc[1] = fma(vec4<f32>(subgroupBroadcast(x.x, 1u)), w, acc[1]);
    acc[2] = fma(vec4<f32>(subgroupBroadcast(x.x, 2u)), w, acc[2]);
    acc[3] = fma(vec4<f32>(subgroupBroadcast(x.x, 3u)), w, acc[3]);
    acc[4] = fma(vec4<f32>(subgroupBroadcast(x.x, 4u)), w, acc[4]);
    acc[5] = fma(vec4<f32>(subgroupBroadcast(x.x, 5u)), w, acc[5]);
    acc[6] = fma(vec4<f32>(subgroupBroadcast(x.x, 6u)), w, acc[6]);
    acc[7] = fma(vec4<f32>(subgroupBroadcast(x.x, 7u)), w, acc[7]);
    acc[8] = fma(vec4<f32>(subgroupBroadcast(x.y, 0u)), w, acc[8]);
    acc[9] = fma(vec4<f32>(subgroupBroadcast(x.y, 1u)), w, acc[9]);
    acc[10] = fma(vec4<f32>(subgroupBroadcast(x.y, 2u)), w, acc[10]);
    acc[11] = fma(vec4<f32>(subgroupBroadcast(x.y, 3u)), w, acc[11]);
    acc[12] = fma(vec4<f32>(subgroupBroadcast(x.y, 4u)), w, acc[12]);
    acc[13] = fma(vec4<f32>(subgroupBroadcast(x.y, 5u)), w, acc[13]);
    acc[14] = fma(vec4<f32>(subgroupBroadcast(x.y, 6u)), w, acc[14]);
    acc[15] = fma(vec4<f32>(subgroupBroadcast(x.y, 7u)), w, acc[15]);
    acc[16] = fma(vec4<f32>(subgroupBroadcast(x.z, 0u)), w, acc[16]);
    acc[17] = fma(vec4<f32>(subgroupBroadcast(x.z, 1u)), w, acc[17]);
    acc[18] = fma(vec4<f32>(subgroupBroadcast(x.z, 2u)), w, acc[18]);
    acc[19] = fma(vec4<f32>(subgroupBroadcast(x.z, 3u)), w, acc[19]);
    acc[20] = fma(vec4<f32>(subgroupBroadcast(x.z, 4u)), w, acc[20]);
    acc[21] = fma(vec4<f32>(subgroupBroadcast(x.z, 5u)), w, acc[21]);
    acc[22] = fma(vec4<f32>(subgroupBroadcast(x.z, 6u)), w, acc[22]);
    acc[23] = fma(vec4<f32>(subgroupBroadcast(x.z, 7u)), w, acc[23]);
    acc[24] = fma(vec4<f32>(subgroupBroadcast(x.w, 0u)), w, acc[24]);
    acc[25] = fma(vec4<f32>(subgroupBroadcast(x.w, 1u)), w, acc[25]);
    acc[26] = fma(vec4<f32>(subgroupBroadcast(x.w, 2u)), w, acc[26]);
    acc[27] = fma(vec4<f32>(subgroupBroadcast(x.w, 3u)), w, acc[27]);
    acc[28] = fma(vec4<f32>(subgroupBroadcast(x.w, 4u)), w, acc[28]);
    acc[29] = fma(vec4<f32>(subgroupBroadcast(x.w, 5u)), w, acc[29]);
    acc[30] = fma(vec4<f32>(subgroupBroadcast(x.w, 6u)), w, acc[30]);
    acc[31] = fma(vec4<f32>(subgroupBroadcast(x.w, 7u)), w, acc[31]);
}

fn load_a(rows: vec4<u32>, k: u32) -> vec4<f32> {
    let at = rows + k * p.a_k;
    return vec4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]);
}

fn store(z: u32, row: u32, column: u32, value: vec4<f32>) {
    if row < p.m {
        let at = (p.y_from + (z * p.m + row) * p.n + column) / 4u;
        if ADD == 1u {
            y[at] += value;
        } else {
            y[at] = value;
        }
    }
}

@compute @workgroup_size(8)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    // Lanes past the edge repeat the last row or column: every lane must take part in the broadcasts.
    let column = group.x * 32u + lane * 4u;
    let safe = min(column, p.n - 4u);
    let first = group.y * 32u;
    let row = min(vec4<u32>(first, first + 8u, first + 16u, first + 24u) + lane, vec4<u32>(p.m - 1u));
    let rows = row * p.a_m + group.z * p.a_z;
    let base = group.z * p.b_z + p.b_from;
    if B_TRANSPOSED == 1u {
        let k4 = p.k / 4u;
        let b0 = (base + safe * p.k) / 4u;
        for (var k = 0u; k < k4; k += 1u) {
            let v0 = unpack_weight4(b[b0 + k]);
            let v1 = unpack_weight4(b[b0 + k4 + k]);
            let v2 = unpack_weight4(b[b0 + 2u * k4 + k]);
            let v3 = unpack_weight4(b[b0 + 3u * k4 + k]);
            step(load_a(rows, 4u * k), vec4<f32>(v0.x, v1.x, v2.x, v3.x));
            step(load_a(rows, 4u * k + 1u), vec4<f32>(v0.y, v1.y, v2.y, v3.y));
            step(load_a(rows, 4u * k + 2u), vec4<f32>(v0.z, v1.z, v2.z, v3.z));
            step(load_a(rows, 4u * k + 3u), vec4<f32>(v0.w, v1.w, v2.w, v3.w));
        }
    } else {
        for (var k = 0u; k < p.k; k += 1u) {
            step(load_a(rows, k), unpack_weight4(b[(base + k * p.n + safe) / 4u]));
        }
    }
    if column >= p.n {
        return;
    }
    // In the text, not in a loop: an array indexed by a variable would live in memory, not in registers.
    store(group.z, first + 0u, column, acc[0]);
    store(group.z, first + 1u, column, acc[1]);
    store(group.z, first + 2u, column, acc[2]);
    store(group.z, first + 3u, column, acc[3]);
    store(group.z, first + 4u, column, acc[4]);
    store(group.z, first + 5u, column, acc[5]);
    store(group.z, first + 6u, column, acc[6]);
    store(group.z, first + 7u, column, acc[7]);
    store(group.z, first + 8u, column, acc[8]);
    store(group.z, first + 9u, column, acc[9]);
    store(group.z, first + 10u, column, acc[10]);
    store(group.z, first + 11u, column, acc[11]);
    store(group.z, first + 12u, column, acc[12]);
    store(group.z, first + 13u, column, acc[13]);
    store(group.z, first + 14u, column, acc[14]);
    store(group.z, first + 15u, column, acc[15]);
    store(group.z, first + 16u, column, acc[16]);
    store(group.z, first + 17u, column, acc[17]);
    store(group.z, first + 18u, column, acc[18]);
    store(group.z, first + 19u, column, acc[19]);
    store(group.z, first + 20u, column, acc[20]);
    store(group.z, first + 21u, column, acc[21]);
    store(group.z, first + 22u, column, acc[22]);
    store(group.z, first + 23u, column, acc[23]);
    store(group.z, first + 24u, column, acc[24]);
    store(group.z, first + 25u, column, acc[25]);
    store(group.z, first + 26u, column, acc[26]);
    store(group.z, first + 27u, column, acc[27]);
    store(group.z, first + 28u, column, acc[28]);
    store(group.z, first + 29u, column, acc[29]);
    store(group.z, first + 30u, column, acc[30]);
    store(group.z, first + 31u, column, acc[31]);
}

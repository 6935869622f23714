// A step of tiled attention: 64 own rows against 32 others, by 128 invocations. Invocation t has the own rows
// 4 y .. 4 y + 3, y = t / 8, and the others x, x + 8, x + 16 and x + 24, x = t % 8. Strides of 9 and 17 quads keep
// neighbours out of each other's memory banks.
const OTHERS: u32 = 576u;    // behind 64 own rows of 8 quads, stride 9, lie 32 other rows
const STAGED: u32 = 544u;    // behind 32 x 64 weights, stride 17, lie 8 quads of 32 other rows, stride 8
var<workgroup> tile: array<vec4<f32>, 864>;

// s[r][c] + the product of own row r and other row c over the 8 quads that lie there.
fn products(s: mat4x4<f32>, t: u32) -> mat4x4<f32> {
    var x = s;
    let a = t / 8u * 36u;
    let b = OTHERS + t % 8u * 9u;
    for (var d = 0u; d < 8u; d += 1u) {
        let b0 = tile[b + d];
        let b1 = tile[b + 72u + d];
        let b2 = tile[b + 144u + d];
        let b3 = tile[b + 216u + d];
        let a0 = tile[a + d];
        let a1 = tile[a + 9u + d];
        let a2 = tile[a + 18u + d];
        let a3 = tile[a + 27u + d];
        x[0] += vec4<f32>(dot(a0, b0), dot(a0, b1), dot(a0, b2), dot(a0, b3));
        x[1] += vec4<f32>(dot(a1, b0), dot(a1, b1), dot(a1, b2), dot(a1, b3));
        x[2] += vec4<f32>(dot(a2, b0), dot(a2, b1), dot(a2, b2), dot(a2, b3));
        x[3] += vec4<f32>(dot(a3, b0), dot(a3, b1), dot(a3, b2), dot(a3, b3));
    }
    return x;
}

// Leaves weights of the own rows, one column per other row, for `weighted`.
fn keep(t: u32, columns: mat4x4<f32>) {
    let at = t % 8u * 17u + t / 8u;
    tile[at] = columns[0];
    tile[at + 136u] = columns[1];
    tile[at + 272u] = columns[2];
    tile[at + 408u] = columns[3];
}

// sum[r] + the sum over the other rows of weight times quad x of them.
fn weighted(sum: mat4x4<f32>, t: u32) -> mat4x4<f32> {
    var s = sum;
    let y = t / 8u;
    let x = STAGED + t % 8u;
    for (var i = 0u; i < 32u; i += 1u) {
        let w = tile[i * 17u + y];
        let v = tile[x + i * 8u];
        s[0] = fma(vec4<f32>(w.x), v, s[0]);
        s[1] = fma(vec4<f32>(w.y), v, s[1]);
        s[2] = fma(vec4<f32>(w.z), v, s[2]);
        s[3] = fma(vec4<f32>(w.w), v, s[3]);
    }
    return s;
}

fn quad_of(first: u32, stride: u32) -> vec4<u32> {
    return vec4<u32>(first, first + stride, first + 2u * stride, first + 3u * stride);
}

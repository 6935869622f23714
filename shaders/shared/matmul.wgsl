// What the tiled matrix products share, beside the weight type that they import. Their bindings: a [Z, M, K],
// w [Z, K, N], r and y [Z, M, N]; a, r and y in quads.
override A_TRANSPOSED: u32 = 0u;   // a is [Z, K, M]
override W_TRANSPOSED: u32 = 0u;   // w is [Z, N, K]
override ONTO: u32 = 0u;           // 1 adds to what y holds, 2 to r
override SLICED: u32 = 0u;         // z counts slices of k_slice along K instead of matrices; y is [slices, M, N]

// First and last k of this workgroup.
fn k_range(z: u32) -> vec2<u32> {
    if SLICED == 1u {
        return vec2<u32>(z * p.k_slice, min((z + 1u) * p.k_slice, p.k));
    }
    return vec2<u32>(0u, p.k);
}

// a at rows m .. m + 3 and k .. k + 3: four rows, a column for each k. Rows past M repeat the last one and are not
// stored; m and k are multiples of 4.
fn block_a(z: u32, m: u32, k: u32, end: u32) -> mat4x4<f32> {
    if k >= end {
        return mat4x4<f32>();
    }
    let base = select(z * p.a_z, 0u, SLICED == 1u);
    if A_TRANSPOSED == 1u {
        let at = (base + k * p.m + min(m, p.m - 4u)) / 4u;
        let m4 = p.m / 4u;
        return mat4x4<f32>(a[at], a[at + m4], a[at + 2u * m4], a[at + 3u * m4]);
    }
    let rows = min(vec4<u32>(m, m + 1u, m + 2u, m + 3u), vec4<u32>(p.m - 1u));
    let at = (base + rows * p.k + k) / vec4<u32>(4u);
    return transpose(mat4x4<f32>(a[at.x], a[at.y], a[at.z], a[at.w]));
}

// w at k .. k + 3 and columns n .. n + 3: four columns, one matrix column for each k.
fn block_w(z: u32, n: u32, k: u32, end: u32) -> mat4x4<f32> {
    if k >= end {
        return mat4x4<f32>();
    }
    let first = select(z * p.w_z, 0u, SLICED == 1u) + p.w_row;
    let column = min(n, p.n - 4u);
    if W_TRANSPOSED == 1u {
        let row = first + column;
        let q = k / 4u;
        return transpose(mat4x4<f32>(
            weight4(row, p.k, q), weight4(row + 1u, p.k, q), weight4(row + 2u, p.k, q), weight4(row + 3u, p.k, q),
        ));
    }
    let row = first + k;
    let q = column / 4u;
    return mat4x4<f32>(
        weight4(row, p.n, q), weight4(row + 1u, p.n, q), weight4(row + 2u, p.n, q), weight4(row + 3u, p.n, q),
    );
}

fn put(z: u32, row: u32, column: u32, value: vec4<f32>) {
    if row < p.m && column < p.n {
        let at = (p.y_from + (z * p.m + row) * p.n + column) / 4u;
        if ONTO == 0u {
            y[at] = value;
        } else if ONTO == 1u {
            y[at] += value;
        } else {
            y[at] = r[at] + value;
        }
    }
}

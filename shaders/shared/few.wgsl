// What the products of a few rows share, beside the weight type that they import: what they do before and after the
// sums, so that a decoding step needs no kernels of its own for it. Their bindings: a [M, K], w [N, K], r and y [M, N],
// g [K].
override ONTO: u32 = 0u;     // 1 adds to what y holds, 2 to r
override NORMED: u32 = 0u;   // the product is of rms_norm(a) under g, whose scale is applied to the sums
override GATED: u32 = 0u;    // w is [2 N, K], the gate's rows and then those of up; y = silu(gate) up

// Of four rows.
fn norm_scale(squares: vec4<f32>) -> vec4<f32> {
    return 1.0 / sqrt(squares / f32(p.k) + p.eps);
}

fn gated(gate: f32, up: f32) -> f32 {
    // Bounded, because WGSL leaves infinities undefined.
    return gate / (1.0 + exp(min(-gate, 80.0))) * up;
}

fn put(row: u32, column: u32, value: f32) {
    if row < p.m && column < p.n {
        let at = p.y_from + row * p.n + column;
        if ONTO == 0u {
            y[at] = value;
        } else if ONTO == 1u {
            y[at] += value;
        } else {
            y[at] = r[at] + value;
        }
    }
}

// A column of four rows.
fn put_quad(row: u32, column: u32, value: vec4<f32>) {
    put(row, column, value.x);
    put(row + 1u, column, value.y);
    put(row + 2u, column, value.z);
    put(row + 3u, column, value.w);
}

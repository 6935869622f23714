// Weights stored as f32, from the binding `w` of the kernel: flat quads of rows of `columns` elements.
alias Weight = vec4<f32>;

// One element; `columns` may be any number.
fn weight(row: u32, columns: u32, column: u32) -> f32 {
    let at = row * columns + column;
    return w[at / 4u][at % 4u];
}

// Elements 4 quad .. 4 quad + 3; columns a multiple of 4.
fn weight4(row: u32, columns: u32, quad: u32) -> vec4<f32> {
    return w[row * (columns / 4u) + quad];
}

// Elements 8 oct .. 8 oct + 7; columns a multiple of 8.
fn weight8(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let at = row * (columns / 4u) + 2u * oct;
    return mat2x4<f32>(w[at], w[at + 1u]);
}

// Scale and minimum of elements 32 block .. 32 block + 31, for types that have them.
fn weight_scale(row: u32, columns: u32, block: u32) -> vec2<f32> {
    return vec2<f32>(1.0, 0.0);
}

// `weight8` for elements whose scale is at hand.
fn weight8_scaled(row: u32, columns: u32, oct: u32, scale: vec2<f32>) -> mat2x4<f32> {
    return weight8(row, columns, oct);
}

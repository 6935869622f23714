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

// For kernels that take 32 elements, a block, at a time: a sum of x w over a block is
//   d sum(x raw_factor raw) + m sum(x),  (d, m) = weight_scale
// so that less is done for each element where elements are quantised. Here raw is the element itself.
const MINIMA: bool = false;   // m may be other than 0

// Elements 8 oct .. 8 oct + 7; columns a multiple of 8.
fn weight8_raw(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    return weight8(row, columns, oct);
}

// For element i of eight.
fn raw_factor(i: u32) -> f32 {
    return 1.0;
}

// Of elements 32 block .. 32 block + 31.
fn weight_scale(row: u32, columns: u32, block: u32) -> vec2<f32> {
    return vec2<f32>(1.0, 0.0);
}

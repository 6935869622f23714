// Weights stored as f32, from the binding `w` of the kernel: flat quads of rows of `columns` elements.
//
// Kernels that take 32 elements, a block, at a time use four more names, so that less is done for each element where
// elements are quantised. A sum of x w over a block is
//   d sum(x raw_factor(i) weight8_raw) + m sum(x),  (d, m) = weight_scale of the block,
// i being the element's place among its eight; MINIMA says that m may be other than 0.
#import plain
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

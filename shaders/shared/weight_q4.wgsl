// Weights in blocks of 32 along a row, x = d q + m: a row is its 4-bit q, eight to a word, then the f16 pairs (d, m)
// of its blocks, one to a word. Columns are a multiple of 32. See weight_f32 for the functions.
alias Weight = u32;

fn row_start(row: u32, columns: u32) -> u32 {
    return row * (columns / 8u + columns / 32u);
}

fn nibbles(word: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u));
}

fn weight(row: u32, columns: u32, column: u32) -> f32 {
    return weight4(row, columns, column / 4u)[column % 4u];
}

fn weight4(row: u32, columns: u32, quad: u32) -> vec4<f32> {
    let start = row_start(row, columns);
    let dm = unpack2x16float(w[start + columns / 8u + quad / 8u]);
    return fma(vec4<f32>(dm.x), nibbles(w[start + quad / 2u] >> (16u * (quad % 2u))), vec4<f32>(dm.y));
}

fn weight8(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let word = w[row_start(row, columns) + oct];
    let scale = weight_scale(row, columns, oct / 4u);
    let d = vec4<f32>(scale.x);
    let m = vec4<f32>(scale.y);
    return mat2x4<f32>(fma(d, nibbles(word), m), fma(d, nibbles(word >> 16u), m));
}

const MINIMA: bool = true;

// Nibble i where it stands in the word, 16^i q, which spares a shift; the last one would be a sign and is shifted.
fn weight8_raw(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let word = w[row_start(row, columns) + oct];
    let low = vec4<u32>(word) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u);
    let high = vec4<u32>(word & 0xf0000u, word & 0xf00000u, word & 0xf000000u, word >> 28u);
    return mat2x4<f32>(vec4<f32>(bitcast<vec4<i32>>(low)), vec4<f32>(bitcast<vec4<i32>>(high)));
}

fn raw_factor(i: u32) -> f32 {
    return select(exp2(-4.0 * f32(i)), 1.0, i == 7u);
}

fn weight_scale(row: u32, columns: u32, block: u32) -> vec2<f32> {
    return unpack2x16float(w[row_start(row, columns) + columns / 8u + block]);
}

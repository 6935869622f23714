// Weights in blocks of 32 along a row, x = d q: a row is its i8 q, four to a word, then the f16 d of its blocks,
// two to a word. Columns are a multiple of 32. See weight_f32 for the functions.
alias Weight = u32;

fn row_start(row: u32, columns: u32) -> u32 {
    return row * (columns / 4u + (columns / 32u + 1u) / 2u);
}

fn block_scale(start: u32, columns: u32, block: u32) -> f32 {
    return unpack2x16float(w[start + columns / 4u + block / 2u])[block % 2u];
}

fn signed(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(word << 24u, word << 16u, word << 8u, word)) >> vec4<u32>(24u));
}

fn weight(row: u32, columns: u32, column: u32) -> f32 {
    return weight4(row, columns, column / 4u)[column % 4u];
}

fn weight4(row: u32, columns: u32, quad: u32) -> vec4<f32> {
    let start = row_start(row, columns);
    return block_scale(start, columns, quad / 8u) * signed(w[start + quad]);
}

fn weight8(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let start = row_start(row, columns);
    let scale = block_scale(start, columns, oct / 4u);
    return mat2x4<f32>(scale * signed(w[start + 2u * oct]), scale * signed(w[start + 2u * oct + 1u]));
}

const MINIMA: bool = false;

// Four q 2^24: what lies below a byte is masked, instead of shifting the byte down again.
fn top_bytes(word: u32) -> vec4<f32> {
    let top = vec4<u32>(word << 24u, word << 16u, word << 8u, word) & vec4<u32>(0xff000000u);
    return vec4<f32>(bitcast<vec4<i32>>(top));
}

fn weight8_raw(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let at = row_start(row, columns) + 2u * oct;
    return mat2x4<f32>(top_bytes(w[at]), top_bytes(w[at + 1u]));
}

fn raw_factor(i: u32) -> f32 {
    return 1.0;
}

fn weight_scale(row: u32, columns: u32, block: u32) -> vec2<f32> {
    return vec2<f32>(exp2(-24.0) * block_scale(row_start(row, columns), columns, block), 0.0);
}

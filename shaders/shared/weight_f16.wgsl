// Weights stored as f16, two to a word; needs no device feature. See weight_f32 for the functions.
#import plain
alias Weight = vec2<u32>;

fn widen(words: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
}

fn weight(row: u32, columns: u32, column: u32) -> f32 {
    let at = row * columns + column;
    return widen(w[at / 4u])[at % 4u];
}

fn weight4(row: u32, columns: u32, quad: u32) -> vec4<f32> {
    return widen(w[row * (columns / 4u) + quad]);
}

fn weight8(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    let at = row * (columns / 4u) + 2u * oct;
    return mat2x4<f32>(widen(w[at]), widen(w[at + 1u]));
}

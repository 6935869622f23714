// What weight types without blocks say to kernels that take 32 elements, a block, at a time; see weight_f32.
const MINIMA: bool = false;

fn weight8_raw(row: u32, columns: u32, oct: u32) -> mat2x4<f32> {
    return weight8(row, columns, oct);
}

fn raw_factor(i: u32) -> f32 {
    return 1.0;
}

fn weight_scale(row: u32, columns: u32, block: u32) -> vec2<f32> {
    return vec2<f32>(1.0, 0.0);
}

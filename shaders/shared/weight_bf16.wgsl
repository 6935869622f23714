// Four consecutive weights stored as bf16, two to a word: a bf16 is the upper half of an f32.
alias Weight4 = vec2<u32>;

fn unpack_weight4(w: Weight4) -> vec4<f32> {
    return vec4<f32>(
        bitcast<f32>(w.x << 16u),
        bitcast<f32>(w.x & 0xffff0000u),
        bitcast<f32>(w.y << 16u),
        bitcast<f32>(w.y & 0xffff0000u),
    );
}

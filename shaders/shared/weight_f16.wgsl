// Four consecutive weights stored as f16, two to a word; needs no device feature.
alias Weight4 = vec2<u32>;

fn unpack_weight4(w: Weight4) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
}

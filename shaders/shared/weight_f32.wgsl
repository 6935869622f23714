// Four consecutive weights stored as f32.
alias Weight4 = vec4<f32>;

fn unpack_weight4(w: Weight4) -> vec4<f32> {
    return w;
}

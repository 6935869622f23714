// Keys and values stored as f16, two to a word; needs no device feature. See keys_f32.
alias KeyQuad = vec2<u32>;
alias KeyPair = u32;

fn wide(x: KeyQuad) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y));
}

fn wide_pair(x: KeyPair) -> vec2<f32> {
    return unpack2x16float(x);
}

fn narrow(x: vec2<f32>) -> KeyPair {
    // WGSL leaves open what becomes of larger values.
    return pack2x16float(clamp(x, vec2<f32>(-65504.0), vec2<f32>(65504.0)));
}

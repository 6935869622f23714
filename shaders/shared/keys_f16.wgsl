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
    // WGSL leaves open what becomes of larger values, of infinity and of NaN; the last two shall be noticed.
    let lost = (bitcast<vec2<u32>>(x) & vec2<u32>(0x7f800000u)) == vec2<u32>(0x7f800000u);
    let kept = clamp(select(x, vec2<f32>(), lost), vec2<f32>(-65504.0), vec2<f32>(65504.0));
    let nan = select(vec2<u32>(), vec2<u32>(0x7e00u, 0x7e000000u), lost);
    return pack2x16float(kept) | nan.x | nan.y;
}

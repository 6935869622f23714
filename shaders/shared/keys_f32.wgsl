// How keys and values lie in a cache, a quad or a pair of a head's dimensions at a time: as they are. keys_f16 has the
// same names.
alias KeyQuad = vec4<f32>;
alias KeyPair = vec2<f32>;

fn wide(x: KeyQuad) -> vec4<f32> {
    return x;
}

fn wide_pair(x: KeyPair) -> vec2<f32> {
    return x;
}

fn narrow(x: vec2<f32>) -> KeyPair {
    return x;
}

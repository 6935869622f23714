// Rows of any length through bindings of quads: a piece is a quad where rows consist of quads, else one element, as
// the x of a quad whose rest is zero.
override WIDE: u32 = 1u;

fn quad_of_piece(i: u32) -> u32 {
    return select(i / 4u, i, WIDE == 1u);
}

fn piece(quad: vec4<f32>, i: u32) -> vec4<f32> {
    if WIDE == 1u {
        return quad;
    }
    return vec4<f32>(quad[i % 4u], 0.0, 0.0, 0.0);
}

fn sum4(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

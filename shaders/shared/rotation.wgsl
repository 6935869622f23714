// Cosine and sine of rotary angles.

// Hugging Face rounds this product to f32. Clearing the sign changes nothing, as there is none; it keeps compilers from
// fusing the product into the subtraction below, which would leave it unrounded. (max does too, but may lose NaN.)
fn rotary_angle(position: u32, frequency: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(f32(position) * frequency) & 0x7fffffffu);
}

// Cosine and sine of an angle in [0, 100000]. WGSL promises 2^-11 and only on [-pi, pi], so both are computed
// here: quarter turns are taken off in three steps whose products are exact (Cody and Waite), then Cephes'
// polynomials on [-pi/4, pi/4]. The clamp changes nothing; it keeps compilers from merging the steps.
fn cos_sin(angle: f32) -> vec2<f32> {
    let turns = round(angle * 0.63661977);
    let rough = clamp(angle - turns * 1.5703125, -1000.0, 1000.0);
    let r = (rough - turns * 4.837512969970703e-4) - turns * 7.549789948768648e-8;
    let z = r * r;
    let s = r + r * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1);
    let c = 1.0 - 0.5 * z
        + z * z * ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2);
    let quarter = u32(turns) % 4u;
    let swapped = select(vec2<f32>(c, s), vec2<f32>(s, c), quarter % 2u == 1u);
    let negative = vec2<bool>(quarter == 1u || quarter == 2u, quarter >= 2u);
    return select(swapped, -swapped, negative);
}

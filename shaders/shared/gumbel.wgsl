// Gumbel draws from random words. Logarithms are computed here, so that a seed draws the same on every device:
// WGSL promises only an absolute error of 2^-21 near 1.

// ln x of a positive normal x = m 2^e with m in [sqrt(1/2), sqrt(2)): ln m is 2 atanh((m - 1) / (m + 1)).
fn ln(x: f32) -> f32 {
    let shifted = bitcast<u32>(x) - 0x3f3504f3u;
    let e = f32(bitcast<i32>(shifted) >> 23u);
    let m = bitcast<f32>((shifted & 0x7fffffu) + 0x3f3504f3u);
    let z = (m - 1.0) / (m + 1.0);
    let q = z * z;
    return e * 0.69314718 + 2.0 * z * (1.0 + q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * 0.11111111))));
}

// -ln(-ln(1 - v)) with v = (word + 1/2) / 2^32: fine near v = 0, where the large draws are. At most 23.
fn gumbel(word: u32) -> f32 {
    if word >= 0x80000000u {
        return -ln(-ln((f32(0xffffffffu - word) + 0.5) * 2.3283064e-10));
    }
    let v = (f32(word) + 0.5) * 2.3283064e-10;
    let z = v / (2.0 - v);
    let q = z * z;
    let tail = q * (0.14285715 + q * (0.11111111 + q * (0.09090909 + q * 0.07692308)));
    return -ln(2.0 * z * (1.0 + q * (0.33333334 + q * (0.2 + tail))));
}

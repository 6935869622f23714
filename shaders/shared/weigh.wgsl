// From scores to the weights of a softmax. What decides is never how a float compares, nor what max makes of NaN:
// drivers differ there. A score that is not allowed is NEVER and known by its bits; one that is allowed and not finite
// makes its weight NaN, hence the row's sums: `p.zero` is 0, which compilers do not know and so cannot leave out.
const NEVER: f32 = -3.0e38;

// exp(s - m), 0 for what is not allowed. Not only by exp, which some adapters bound from below.
fn weights_of(s: vec4<f32>, m: vec4<f32>) -> vec4<f32> {
    let allowed = bitcast<vec4<u32>>(s) != bitcast<vec4<u32>>(vec4<f32>(NEVER));
    return select(vec4<f32>(), fma(s, vec4<f32>(p.zero), exp(s - m)), allowed);
}

// A row that sees something has a weight of 1. One that may see nothing is zero, not NaN.
fn sees_nothing(total: vec4<f32>) -> vec4<bool> {
    return bitcast<vec4<u32>>(total) == vec4<u32>();
}

fn inverse_of(total: vec4<f32>) -> vec4<f32> {
    return select(1.0 / total, vec4<f32>(), sees_nothing(total));
}

// NaN where the total is, whatever log makes of it: a finite number could be lost in NEVER, hence the piece.
fn lse_of(m: vec4<f32>, total: vec4<f32>) -> vec4<f32> {
    let lse = fma(total, vec4<f32>(p.zero), m + log(total));
    return select(lse, vec4<f32>(NEVER), sees_nothing(total));
}

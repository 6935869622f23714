// numerics: y[i] = what row i of the table in engine/src/numerics.rs comes out as on this driver
// x         [18], the operands of that table, so that no compiler knows them
// y         [M]
// dispatch  one invocation
struct Params { rows: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;         // [18]
@group(0) @binding(2) var<storage, read_write> y: array<f32>;   // [M]

var<private> row: u32;

fn put(value: f32) {
    if row < p.rows {
        y[row] = value;
    }
    row += 1u;
}

fn told(condition: bool) {
    put(select(0.0, 1.0, condition));
}

// Of the f16 that a number becomes, exactly, so that nothing but packing is asked.
fn half(value: f32) {
    put(f32(pack2x16float(vec2<f32>(value, 0.0)) & 0xffffu));
}

@compute @workgroup_size(1)
fn main() {
    let nan = x[0];
    let one = x[1];
    let zero = x[2];
    let infinity = x[3];
    put(nan * zero);
    put(infinity * zero);
    put(-infinity * zero);
    put(fma(nan, zero, one));
    put(fma(infinity, zero, one));
    put(infinity + x[17]);
    put(infinity - infinity);
    put(nan + one);
    put(one / nan);
    put(dot(vec4<f32>(one, nan, one, one), vec4<f32>(one, zero, one, one)));
    put(-infinity);
    put(x[4]);
    put(max(nan, one));
    put(max(one, nan));
    put(min(nan, one));
    put(min(one, nan));
    put(clamp(nan, zero, one));
    told(nan > one);
    told(nan < one);
    told(nan == nan);
    told(nan != nan);
    told(!(nan <= one));
    put(select(zero, one, nan < one));
    put(sign(nan));
    put(exp(nan));
    put(log(nan));
    put(sqrt(nan));
    put(exp(x[5]));
    put(exp(x[6]));
    put(exp(x[7]));
    put(exp(-infinity));
    put(log(zero));
    put(log(-one));
    put(sqrt(-one));
    put(inverseSqrt(zero));
    put(one / zero);
    put(pow(zero, zero));
    put(x[4] * one);
    put(x[4] + zero);
    put(x[8] * x[9] - one);
    put(fma(x[8], x[9], -one));
    half(x[10]);
    half(x[11]);
    half(x[12]);
    half(nan);
    put(f32(i32(x[13])));
    put(f32(u32(-one)));
    put(f32(i32(nan)));
    put(round(x[14]));
    put(sqrt(x[15]));
    put(one / x[16]);
}

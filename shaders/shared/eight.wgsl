// Products in subgroups of eight, as software adapters have them: every load there is one scalar load per lane, so
// each lane loads another element and hands it round. Four terms of a sum at a time, so that the sum stays in its
// register meanwhile. Arrays are indexed by constants, or by short loops that drivers unroll; else they live in memory.
// A lane has four columns; H is the importing kernel's.
alias Eight = array<vec4<f32>, 8>;
alias Scores = array<Eight, 4>;   // 32 rows
const B: u32 = (min(H, 64u) + 31u) / 32u;
const LAST: u32 = B - 1u;
alias Sums = array<Scores, B>;    // [b][c][i] is dimension 32 b + 4 i + c, up to 64 of them: more in one loop exceed
                                  // the instruction cache

fn four(sum: vec4<f32>, x: vec4<f32>, w: mat4x4<f32>) -> vec4<f32> {
    let half = fma(vec4<f32>(x.y), w[1], fma(vec4<f32>(x.x), w[0], sum));
    return fma(vec4<f32>(x.w), w[3], fma(vec4<f32>(x.z), w[2], half));
}

// sum[i] + w x_i, where x_i is the x of lane i.
fn eight(sum: Eight, x: vec4<f32>, w: mat4x4<f32>) -> Eight {
    return Eight(
        four(sum[0], subgroupBroadcast(x, 0u), w),
        four(sum[1], subgroupBroadcast(x, 1u), w),
        four(sum[2], subgroupBroadcast(x, 2u), w),
        four(sum[3], subgroupBroadcast(x, 3u), w),
        four(sum[4], subgroupBroadcast(x, 4u), w),
        four(sum[5], subgroupBroadcast(x, 5u), w),
        four(sum[6], subgroupBroadcast(x, 6u), w),
        four(sum[7], subgroupBroadcast(x, 7u), w),
    );
}

fn scaled_eight(x: Eight, f: vec4<f32>) -> Eight {
    return Eight(x[0] * f, x[1] * f, x[2] * f, x[3] * f, x[4] * f, x[5] * f, x[6] * f, x[7] * f);
}

fn scaled(sums: Sums, f: vec4<f32>) -> Sums {
    var x = sums;
    x[0] = Scores(scaled_eight(x[0][0], f), scaled_eight(x[0][1], f), scaled_eight(x[0][2], f),
        scaled_eight(x[0][3], f));
    if B > 1u {
        x[LAST] = Scores(scaled_eight(x[LAST][0], f), scaled_eight(x[LAST][1], f), scaled_eight(x[LAST][2], f),
            scaled_eight(x[LAST][3], f));
    }
    return x;
}

// sums + w times four rows, of which a lane has quads: row r is rows[r].
fn add_rows(sums: Scores, rows: mat4x4<f32>, w: mat4x4<f32>) -> Scores {
    let x = transpose(rows);
    return Scores(eight(sums[0], x[0], w), eight(sums[1], x[1], w), eight(sums[2], x[2], w), eight(sums[3], x[3], w));
}

fn quad_of(first: u32) -> vec4<u32> {
    return vec4<u32>(first, first + 1u, first + 2u, first + 3u);
}

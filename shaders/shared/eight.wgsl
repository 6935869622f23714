// Products in subgroups of eight, as software adapters have them: every load there is one scalar load per lane, so
// each lane loads another element and hands it round. Four terms of a sum at a time, so that the sum stays in its
// register meanwhile. Arrays are indexed by constants, or by loops that drivers unroll; else they live in memory.
// A lane has four columns; H is the importing kernel's.
alias Eight = array<vec4<f32>, 8>;
alias Scores = array<Eight, 4>;   // 32 rows
const J: u32 = min(H, 64u) / 8u;
alias Sums = array<Eight, J>;     // up to 64 dimensions: more in one loop exceed the instruction cache

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

// The x of each lane.
fn spread(x: f32) -> Eight {
    return Eight(
        vec4<f32>(subgroupBroadcast(x, 0u)),
        vec4<f32>(subgroupBroadcast(x, 1u)),
        vec4<f32>(subgroupBroadcast(x, 2u)),
        vec4<f32>(subgroupBroadcast(x, 3u)),
        vec4<f32>(subgroupBroadcast(x, 4u)),
        vec4<f32>(subgroupBroadcast(x, 5u)),
        vec4<f32>(subgroupBroadcast(x, 6u)),
        vec4<f32>(subgroupBroadcast(x, 7u)),
    );
}

fn scaled(sums: Sums, factor: vec4<f32>) -> Sums {
    var x = sums;
    for (var j = 0u; j < J; j += 1u) {
        for (var i = 0u; i < 8u; i += 1u) {
            x[j][i] *= factor;
        }
    }
    return x;
}

fn quad_of(first: u32) -> vec4<u32> {
    return vec4<u32>(first, first + 1u, first + 2u, first + 3u);
}

// Workgroup reductions with a fixed tree: the same input gives the same bits.
// Both must be called by all WG invocations; the result is uniform.
override WG: u32 = 256u;
var<workgroup> reduce_scratch: array<f32, WG>;

fn reduce_sum(value: f32, lane: u32) -> f32 {
    reduce_scratch[lane] = value;
    workgroupBarrier();
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            reduce_scratch[lane] += reduce_scratch[lane + stride];
        }
        workgroupBarrier();
    }
    let total = workgroupUniformLoad(&reduce_scratch[0]);
    workgroupBarrier();
    return total;
}

fn reduce_max(value: f32, lane: u32) -> f32 {
    reduce_scratch[lane] = value;
    workgroupBarrier();
    for (var stride = WG / 2u; stride > 0u; stride /= 2u) {
        if lane < stride {
            reduce_scratch[lane] = max(reduce_scratch[lane], reduce_scratch[lane + stride]);
        }
        workgroupBarrier();
    }
    let largest = workgroupUniformLoad(&reduce_scratch[0]);
    workgroupBarrier();
    return largest;
}

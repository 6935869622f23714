//! Every case that states a cost, forward and (where it has one) backward: time on the device where timestamps exist,
//! as GFLOP/s and GB/s. What each stands for: benches/README.md.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::ops::case::Case;
use demask_engine::ops::cases;
use demask_engine::tensor::Tensor;

fn inputs(gpu: &Gpu, case: &Case) -> Vec<Tensor> {
    let values = case.inputs.iter().enumerate().map(|(i, input)| input.values(i as u64));
    case.inputs.iter().zip(values).map(|(input, v)| input.upload(gpu, &v)).collect()
}

/// Device time of one call from timestamps; wall time up to a wait where there are none.
fn time(gpu: &Gpu, case: &Case, inputs: &[Tensor], iterations: u64) -> Duration {
    gpu.reset_stats();
    let start = std::time::Instant::now();
    for _ in 0..iterations {
        (case.run)(inputs);
    }
    gpu.sync().expect("the device works");
    let device = gpu.stats().device_time();
    if device.is_zero() { start.elapsed() } else { device }
}

fn ops(criterion: &mut Criterion) {
    let gpu = Gpu::open(GpuOptions { timestamps: true, ..GpuOptions::default() })
        .unwrap_or_else(|e| panic!("benches need an adapter: {e}"));
    eprintln!("{}", gpu.adapter().describe());
    for case in cases().iter().filter(|c| c.runs_on(&gpu)) {
        let Some(cost) = case.cost else { continue };
        let inputs = inputs(&gpu, case);
        // One line a person can read; criterion keeps the statistics.
        let once = time(&gpu, case, &inputs, 3) / 3;
        let seconds = once.as_secs_f64();
        eprintln!(
            "{:<60} {:>10.3} ms {:>8.2} GFLOP/s {:>8.2} GB/s",
            case.name,
            seconds * 1e3,
            cost.flops / seconds / 1e9,
            cost.bytes / seconds / 1e9
        );
        let mut group = criterion.benchmark_group(case.name.split(' ').next().unwrap_or("op"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200));
        group.throughput(Throughput::Elements(cost.flops as u64));
        group.bench_function(&case.name, |b| b.iter_custom(|n| time(&gpu, case, &inputs, n)));
        group.finish();
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);

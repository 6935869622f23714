//! Every case that states a cost, and whole steps, under criterion: each is checked first, then timed on the
//! session's clock (device timestamps on a GPU, processor time on a software adapter), with its wall time, its rates
//! and its share of the limits measured on this device beside criterion's statistics.

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use demask_benches::export::time;
use demask_benches::measure::{Prepared, Session};
use demask_benches::record::{CaseRecord, Limits};
use demask_benches::suite::{Suite, entries};

/// One line a person can read; criterion keeps the statistics.
fn line(session: &Session, prepared: &Prepared, limits: &Limits) -> demask_engine::Result<String> {
    let mut times = Vec::new();
    for _ in 0..3 {
        times.push(session.times(prepared)?);
    }
    let samples = session.round(std::slice::from_ref(prepared))?;
    let case = CaseRecord::new(prepared, samples, &times);
    let known = |t: Option<f64>| t.map_or("-".to_owned(), time);
    Ok(format!(
        "{:<70} device {:>11} wall {:>11} {:>8.2} GFLOP/s {:>8.2} GB/s {:>4.0} % of the limit",
        case.name,
        known(case.device),
        known(case.wall),
        case.gflops(),
        case.gbytes(),
        100.0 * case.of_limit(limits)
    ))
}

fn ops(criterion: &mut Criterion) {
    let session = Session::open(None).unwrap_or_else(|e| panic!("benches need an adapter: {e}"));
    let limits = session.limits().unwrap_or_else(|e| panic!("the limits: {e}"));
    eprintln!("{}, {}", session.gpu.adapter().describe(), session.clock.describe());
    eprintln!("limits {:.1} GFLOP/s, {:.1} GB/s, measured", limits.gflops, limits.gbytes);
    // Only what criterion's own filter asks for is checked and uploaded.
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    for entry in
        entries(&session.gpu, &Suite::Full).into_iter().filter(|e| e.name.contains(&filter))
    {
        let work = entry.make(&session.gpu).unwrap_or_else(|e| panic!("{e}"));
        let prepared = match session.prepare(work).unwrap_or_else(|e| panic!("{e}")) {
            Ok(prepared) => prepared,
            Err((name, why)) => panic!("{name} gives a wrong result, so it has no time: {why}"),
        };
        eprintln!("{}", line(&session, &prepared, &limits).unwrap_or_else(|e| panic!("{e}")));
        let mut group =
            criterion.benchmark_group(prepared.work.name.split(' ').next().unwrap_or("op"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200));
        group.throughput(Throughput::Elements(prepared.work.cost.flops as u64));
        group.bench_function(&prepared.work.name, |b| {
            b.iter_custom(|n| {
                let seconds = session.sample(&prepared, n.min(u64::from(u32::MAX)) as u32);
                Duration::from_secs_f64(seconds.unwrap_or_else(|e| panic!("{e}")) * n as f64)
            });
        });
        group.finish();
    }
}

criterion_group!(benches, ops);
criterion_main!(benches);

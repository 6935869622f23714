//! scratch
use demask_engine::gpu::*;
use demask_trainer::{recipe::Recipe, train::*};
use std::ops::ControlFlow;
fn main() -> anyhow::Result<()> {
    let a: Vec<String> = std::env::args().collect();
    let timed = std::env::var("TIMED").is_ok();
    let gpu = Gpu::open(GpuOptions { timestamps: timed, ..Default::default() })?;
    eprintln!("{}", gpu.adapter().describe());
    let recipe = Recipe::read(a[1].as_ref())?;
    let stop: u64 = a.get(3).map_or(u64::MAX, |s| s.parse().unwrap());
    let mut t = Trainer::open(&gpu, recipe, a[2].as_ref(), &mut |e| match e { Event::Corpus(r) => eprintln!("{r}"), Event::Tokenizer(n) => eprintln!("vocab {n}"), Event::Packed{sequences,tokens} => eprintln!("{sequences} seqs {tokens} tokens"), Event::Resumed(s) => eprintln!("resumed {s}"), _ => {} })?;
    gpu.reset_stats();
    let mut n = 0;
    let r = t.run(&mut |e| { if let Event::Step(m, total) = e { n += 1; eprintln!("{}/{total} {} loss {:.4} ce {:.3} gn {:.3} {:.0} tok/s", m.step, m.phase, m.loss, m.ce_per_masked.unwrap_or(0.0), m.grad_norm, m.tokens_per_second); if n >= stop { return ControlFlow::Break(()); } } ControlFlow::Continue(()) })?;
    eprintln!("{r:?}");
    let s = gpu.stats();
    eprintln!("{} dispatches {} submits host {:?} ({:.2} us/dispatch) device {:?} mem {:?}", s.dispatches, s.submits, s.host_time, s.host_time.as_secs_f64()*1e6/s.dispatches as f64, s.device_time(), gpu.memory());
    let mut k: Vec<_> = s.kernels.iter().collect(); k.sort_by_key(|(_, k)| std::cmp::Reverse(k.time));
    for (name, k) in k.iter().take(16) { eprintln!("{name:28} {:6} {:?}", k.count, k.time); }
    Ok(())
}

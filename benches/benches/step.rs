//! Where a whole step goes: dispatches, host time per dispatch, device time by kernel, memory.
//! `cargo bench -p demask-benches --bench step -- MODEL [train]`

use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use demask_engine::autograd::{Gradients, backward};
use demask_engine::decode::{
    self, BlockOptions, DecodeOptions, Decoder, Mode, Request, Sampling, Schedule,
};
use demask_engine::gpu::{Gpu, GpuOptions, Stats};
use demask_engine::model::{Inputs, Llama, Precision};
use demask_engine::ops::{AttentionOptions, Mask, Supervision, linear_cross_entropy};
use demask_engine::tensor::Tensor;
use demask_engine::{Error, Result};

fn main() -> ExitCode {
    let arguments: Vec<String> =
        std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let Some(model) = arguments.first() else {
        println!("step: no model given; see benches/README.md");
        return ExitCode::SUCCESS;
    };
    let run = || -> Result<()> {
        decode(Path::new(model))?;
        if gpu_computes()? {
            generate(Path::new(model))?;
        }
        if arguments.iter().any(|a| a == "train") { train(Path::new(model)) } else { Ok(()) }
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `step` five times untimed by the device (the last one counts), then once with timestamps.
fn report(name: &str, gpu: &Gpu, timed: &Gpu, step: impl Fn(&Gpu) -> Result<()>) -> Result<()> {
    for _ in 0..5 {
        gpu.reset_stats();
        gpu.reset_peak();
        let start = Instant::now();
        step(gpu)?;
        gpu.sync()?;
        let wall = start.elapsed();
        let stats = gpu.stats();
        let host = stats.host_time.as_secs_f64() * 1e6 / stats.dispatches.max(1) as f64;
        let whole = wall.as_secs_f64() * 1e6 / stats.dispatches.max(1) as f64;
        println!(
            "{name}: {} dispatches ({} new bind groups) in {} batches, host {host:.2} µs a dispatch, submit {:.4} s, wall {:.4} s ({whole:.2} µs a dispatch), peak {:.0} MB",
            stats.dispatches,
            stats.bind_groups,
            stats.submits,
            stats.submit_time.as_secs_f64(),
            wall.as_secs_f64(),
            gpu.memory().peak as f64 / 1e6
        );
    }
    timed.reset_stats();
    step(timed)?;
    let stats = timed.stats();
    print_kernels(name, &stats);
    Ok(())
}

fn print_kernels(name: &str, stats: &Stats) {
    println!("{name}: device {:.3} s", stats.device_time().as_secs_f64());
    let mut kernels: Vec<_> = stats.kernels.iter().collect();
    kernels.sort_by_key(|(_, k)| std::cmp::Reverse(k.time));
    for (kernel, k) in kernels.iter().take(10) {
        println!(
            "  {kernel:<28} {:>5} × {:>9.3} ms",
            k.count,
            k.time.as_secs_f64() * 1e3 / k.count as f64
        );
    }
}

fn open(timestamps: bool) -> Result<Gpu> {
    Gpu::open(GpuOptions { timestamps, ..GpuOptions::default() })
}

/// Four rows against a cache of 64, one block of a block-diffusion decode; then one row, as AR decodes.
fn decode(path: &Path) -> Result<()> {
    let models = [open(false)?, open(true)?]
        .map(|gpu| Llama::load(&gpu, path, Precision::Stored))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    println!("{}", models[0].gpu().adapter().describe());
    let prompt: Vec<u32> = (0..64).map(|i| 20 + i % 200).collect();
    for rows in [4, 1] {
        let step = |gpu: &Gpu| {
            let model = models.iter().find(|m| std::ptr::eq(m.gpu().adapter(), gpu.adapter()));
            let model = model.ok_or_else(|| Error::Request("a model per device".into()))?;
            let mut cache = model.cache(96);
            let hidden = model.step(&prompt[..rows], 64, Mask::BlockCausal(4), &mut cache);
            model.logits(&hidden).to_vec().map(drop)
        };
        report(&format!("decode of {rows} rows"), models[0].gpu(), models[1].gpu(), step)?;
    }
    Ok(())
}

/// False on wgpu's noop backend, where no token is ever chosen.
fn gpu_computes() -> Result<bool> {
    Ok(open(false)?.adapter().info.backend != wgpu::Backend::Noop)
}

/// Whole answers, with 1, 2 and 4 passes recorded ahead: what skipped passes and waits cost. A model without a mask
/// token takes token 0 for it; only the time counts.
fn generate(path: &Path) -> Result<()> {
    let gpu = open(false)?;
    let model = Llama::load(&gpu, path, Precision::Stored)?;
    let timed = Llama::load(&open(true)?, path, Precision::Stored)?;
    let prompt: Vec<u32> = (0..16).map(|i| 20 + i % 200).collect();
    let mask = model.config().mask_token_id.unwrap_or(0);
    let block = |schedule| Mode::Block(BlockOptions { schedule, ..BlockOptions::new(mask, 4) });
    let modes = [
        ("fixed, 2 passes a block", block(Schedule::Fixed { steps: 2 })),
        ("threshold 0, 1 pass a block", block(Schedule::Threshold(0.0))),
        ("autoregressive", Mode::Autoregressive),
    ];
    for (name, mode) in modes {
        let options =
            DecodeOptions { mode, max_tokens: 16, sampling: Sampling::greedy(), eos_ids: vec![] };
        for round in 0..2 {
            for ahead in [1, 2, 4] {
                gpu.reset_stats();
                let start = Instant::now();
                let request = Request::answer(model.config(), &prompt, &options)?;
                let mut decoder = Decoder::for_one(&model, &request).with_look_ahead(ahead);
                let id = decoder.submit(request)?;
                while !decoder.is_idle() {
                    decoder.advance(&mut Vec::new())?;
                }
                let passes = decoder.counters(id).map_or(0, |done| done.passes);
                let seconds = start.elapsed().as_secs_f64();
                let stats = gpu.stats();
                if round > 0 {
                    println!(
                        "{name}, {ahead} ahead: {:.1} tokens/s, {} passes, {} dispatches, host {:.2} µs a dispatch",
                        16.0 / seconds,
                        passes,
                        stats.dispatches,
                        stats.host_time.as_secs_f64() * 1e6 / stats.dispatches as f64
                    );
                }
            }
        }
        timed.gpu().reset_stats();
        decode::generate(&timed, &prompt, &options, |_| ControlFlow::Continue(()))?;
        print_kernels(name, &timed.gpu().stats());
    }
    Ok(())
}

/// Forward, loss and backward over one sequence of 128 tokens, f32 (the optimiser adds one pass over the weights).
fn train(path: &Path) -> Result<()> {
    let models = [open(false)?, open(true)?]
        .map(|gpu| Llama::load(&gpu, path, Precision::F32).map(Llama::trainable))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let t = 128;
    let tokens: Vec<u32> = (0..t as u32 + 1).map(|i| 20 + i * 37 % 400).collect();
    let step = |gpu: &Gpu| {
        let model = models.iter().find(|m| std::ptr::eq(m.gpu().adapter(), gpu.adapter()));
        let model = model.ok_or_else(|| Error::Request("a model per device".into()))?;
        let positions: Vec<u32> = (0..t as u32).collect();
        let inputs = Inputs {
            tokens: Tensor::from_u32(gpu, &tokens[..t], [1, t]),
            positions: Tensor::from_u32(gpu, &positions, [1, t]),
            attention: AttentionOptions::new(Mask::Causal),
        };
        let supervision = Supervision {
            targets: Tensor::from_u32(gpu, &tokens[1..], [t]),
            weights: Tensor::from_f32(gpu, &vec![1.0; t], [t]),
            divisor: t as f32,
        };
        let ce = linear_cross_entropy(&model.hidden(&inputs, false), model.head(), &supervision);
        let mut gradients = Gradients::new();
        backward(&ce.loss, &Tensor::from_f32(gpu, &[1.0], [1]), &mut gradients);
        ce.loss.item().map(drop)
    };
    report("training step", models[0].gpu(), models[1].gpu(), step)
}

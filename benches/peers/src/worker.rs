//! A peer that is part of this program, on the other end of the pipe: sets the work up, runs it on command.

use std::io::{BufRead as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::race::Results;
use crate::work::Work;
use crate::{attention, decode, matmul, step};

/// Some work, set up in one engine.
pub trait Job {
    /// Runs it `times` times and waits for the device; seconds for all.
    fn run(&mut self, times: usize) -> Result<f64>;
    /// Samples of the last run's results, by name.
    fn results(&mut self) -> Result<Results>;
}

/// A job on a device of this name, or why there is none.
pub enum Prepared {
    /// The device's name, and the job.
    Job(String, Box<dyn Job>),
    /// Why not, and the remedy.
    Skip(String),
}

/// Seconds that `work` takes, which must wait for its device.
pub fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Answers requests until the pipe closes.
pub fn serve(engine: &str) -> Result<()> {
    let mut job: Option<Box<dyn Job>> = None;
    for line in std::io::stdin().lock().lines() {
        let request: Value = serde_json::from_str(&line?)?;
        let answer = catch_unwind(AssertUnwindSafe(|| answer(engine, &request, &mut job)));
        let answer = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(e)) => json!({ "error": format!("{e:#}") }),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
                json!({ "error": text.unwrap_or_else(|| "a panic without a word".into()) })
            }
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn answer(engine: &str, request: &Value, job: &mut Option<Box<dyn Job>>) -> Result<Value> {
    if !request["setup"].is_null() {
        let work: Work = serde_json::from_value(request["setup"].clone())?;
        return Ok(match prepare(engine, &work)? {
            Prepared::Skip(why) => json!({ "skip": why }),
            Prepared::Job(device, mut ready) => {
                ready.run(1)?;
                *job = Some(ready);
                json!({ "device": device })
            }
        });
    }
    let job = job.as_mut().context("no work was set up")?;
    if let Some(times) = request["run"].as_u64() {
        return Ok(json!({ "seconds": job.run(times as usize)? }));
    }
    let results = job.results()?;
    Ok(json!({ "results": results.into_iter().collect::<std::collections::BTreeMap<_, _>>() }))
}

fn prepare(engine: &str, work: &Work) -> Result<Prepared> {
    match (engine, work) {
        ("demask", Work::Matmul { m, n, k, half }) => matmul::demask(*m, *n, *k, *half),
        ("demask", Work::Step { folder, tokens }) => step::demask(folder, *tokens),
        ("demask", Work::Attention { rows, block }) => attention::demask(*rows, *block),
        ("demask", Work::Decode { file, four_bits, prompt, tokens, .. }) => {
            decode::demask(file, *four_bits, prompt, *tokens)
        }
        ("openblas", Work::Matmul { m, n, k, .. }) => matmul::openblas(*m, *n, *k),
        #[cfg(feature = "burn")]
        ("burn", Work::Matmul { m, n, k, half }) => matmul::burn(*m, *n, *k, *half),
        #[cfg(feature = "burn")]
        ("burn", Work::Step { folder, tokens }) => step::burn(folder, *tokens),
        #[cfg(feature = "burn")]
        ("burn", Work::Attention { rows, block }) => attention::burn(*rows, *block),
        #[cfg(feature = "meganeura")]
        ("meganeura", Work::Matmul { m, n, k, half }) => matmul::meganeura(*m, *n, *k, *half),
        #[cfg(feature = "meganeura")]
        ("meganeura", Work::Step { folder, tokens }) => step::meganeura(folder, *tokens),
        ("burn" | "meganeura", _) => {
            Ok(Prepared::Skip(format!("built without {engine}; build with --features {engine}")))
        }
        _ => bail!("{engine} has no such work"),
    }
}

//! Greedy autoregressive decoding of one sequence; the pass over the prompt is left out of the time. Compared are
//! the tokens, with those of llama.cpp on f32 weights; where they part, the reference must have found both nearly as
//! likely.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use demask_engine::decode::{DecodeOptions, Event, generate};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::model::{Llama, Precision};

use crate::race::Results;
use crate::work::Work;
use crate::worker::{Job, Prepared};

/// "A function is a piece of a program that has a name. For example, in Python a function that adds two numbers"
const PROMPT: [u32; 22] = [
    49, 1517, 314, 253, 3800, 282, 253, 1578, 338, 553, 253, 1462, 30, 1068, 1183, 28, 281, 5905,
    253, 1517, 338, 7845,
];

/// f16 and 4-bit weights of the same model.
pub fn works(cache: &Path, quick: bool) -> Vec<Work> {
    let work = |(name, four_bits): (&str, bool)| Work::Decode {
        file: cache.join(format!("{name}.gguf")),
        f32_file: cache.join(format!("{name}-as-f32.gguf")),
        four_bits,
        prompt: PROMPT.to_vec(),
        tokens: if quick { 4 } else { 32 },
    };
    [("f16", false), ("q4", true)].map(work).into()
}

struct Demask {
    model: Llama,
    prompt: Vec<u32>,
    options: DecodeOptions,
    answer: Vec<u32>,
}

/// demask's job.
pub fn demask(file: &Path, four_bits: bool, prompt: &[u32], tokens: usize) -> Result<Prepared> {
    if !file.is_file() {
        let why = format!("no {}; run benches/peers/prepare.sh", file.display());
        return Ok(Prepared::Skip(why));
    }
    let gpu = Gpu::open(GpuOptions::default())?;
    // As the files have them.
    let precision = if four_bits { Precision::Stored } else { Precision::F16 };
    let model = Llama::load(&gpu, file, precision)?;
    let mut options = DecodeOptions::autoregressive(model.config());
    (options.max_tokens, options.eos_ids) = (tokens, Vec::new());
    let device = gpu.adapter().describe();
    let job = Demask { model, prompt: prompt.to_vec(), options, answer: Vec::new() };
    Ok(Prepared::Job(device, Box::new(job)))
}

impl Job for Demask {
    fn run(&mut self, times: usize) -> Result<f64> {
        let mut seconds = 0.0;
        for _ in 0..times {
            let mut first = None;
            let done = generate(&self.model, &self.prompt, &self.options, |event| {
                if matches!(event, Event::Committed { .. }) {
                    first.get_or_insert_with(Instant::now);
                }
                ControlFlow::Continue(())
            })?;
            self.answer = done.token_ids;
            seconds += first.context("no token was decoded")?.elapsed().as_secs_f64();
        }
        Ok(seconds)
    }

    fn results(&mut self) -> Result<Results> {
        Ok(vec![("tokens".into(), self.answer.iter().map(|&t| t.into()).collect())])
    }
}

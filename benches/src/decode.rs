//! How fast a model decodes: the time of a forward pass by its rows and by how much text lies before them, and whole
//! answers by schedule, in turn. The clock is the wall's, with the wait for each pass, because that is what a user
//! feels; what slows the machine slows all of them.

use std::time::{Duration, Instant};

use demask_engine::decode::{DecodeOptions, Decoder, Event, Request};
use demask_engine::model::{KvCache, Llama};
use demask_engine::ops::{self, Mask};
use demask_engine::tensor::Tensor;
use demask_engine::{Error, Result};
use serde::Serialize;

use crate::ab::Hear;
use crate::stats::median;

/// Times that each pass is run, in turn, after the first, which compiles: at most, and at least when they take longer
/// than `ENOUGH` together.
const ROUNDS: usize = 9;
const FEWEST: usize = 3;
const ENOUGH: Duration = Duration::from_secs(60);

/// What to measure.
pub struct Options {
    /// Tokens of a diffusion block.
    pub block: usize,
    /// Tokens before the rows of a pass.
    pub depths: Vec<usize>,
    /// Prompt of the answers; at least one token.
    pub prompt: Vec<u32>,
    /// By name and how: answers to the prompt.
    pub answers: Vec<(String, DecodeOptions)>,
    /// Times that each answer is given, in turn.
    pub rounds: usize,
}

/// A forward pass from tokens to logits that the host has waited for.
#[derive(Clone, Debug, Serialize)]
pub struct Pass {
    /// Whose rows: one token, the tokens of a block, or these with the block before.
    pub rows: usize,
    /// Tokens before the last block of them, whose keys and values are read.
    pub depth: usize,
    /// Median.
    pub seconds: f64,
    /// How many times as long as the pass of as many rows after the fewest tokens: the median over rounds.
    pub growth: f64,
    /// 10⁹ floating-point operations a second: products with the weights, and attention.
    pub gflops: f64,
    /// 10⁹ bytes a second: weights, keys and values, each read once.
    pub gbytes: f64,
}

/// An answer of full length: stop tokens are forbidden.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Its name.
    pub mode: String,
    /// Tokens.
    pub tokens: usize,
    /// Forward passes, prefill left out.
    pub forwards: usize,
    /// Median time from the end of prefill to the last token.
    pub seconds: f64,
    /// Shortest and longest.
    pub range: [f64; 2],
    /// Time to read the prompt, of the fastest run.
    pub prompt_seconds: f64,
    /// Seconds a token, of the fastest run, from one power of two to the next: `(first, end, seconds)`.
    pub parts: Vec<(usize, usize, f64)>,
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Decoding {
    /// By rows, then by depth.
    pub passes: Vec<Pass>,
    /// In the order of the options.
    pub answers: Vec<Answer>,
    /// Device memory at its peak, the model included.
    pub peak_bytes: u64,
}

/// Measures. `None` if `hear` stopped it.
///
/// # Errors
/// A request that does not fit the model; a device fault.
pub fn run(llama: &Llama, options: &Options, hear: Hear<'_>) -> Result<Option<Decoding>> {
    let gpu = llama.gpu();
    gpu.reset_peak();
    let mut done = Decoding::default();
    let block = options.block;
    let mut shapes: Vec<Shape> = Vec::new();
    for (rows, before) in [(1, 0), (block, 0), (2 * block, block)] {
        let depths = options.depths.iter().filter(|&&depth| depth >= before);
        shapes.extend(depths.map(|&depth| Shape { rows, depth, before }));
    }
    let mut step = 0;
    let steps = (ROUNDS + 1) * shapes.len() + options.rounds * options.answers.len();
    let mut go_on = |what: &str| {
        step += 1;
        hear(what, (step - 1) as f64 / steps as f64).is_continue()
    };
    {
        let deepest = options.depths.iter().max().copied().unwrap_or(0);
        let mut cache = llama.cache(deepest + block);
        let mut rounds = Vec::new();
        let began = Instant::now();
        for round in 0..=ROUNDS {
            if round > FEWEST && began.elapsed() > ENOUGH {
                break;
            }
            let mut times = Vec::new();
            for shape in &shapes {
                let Shape { rows, depth, .. } = shape;
                if !go_on(&format!("{rows} rows after {depth} tokens, {round} of {ROUNDS}")) {
                    return Ok(None);
                }
                times.push(shape.time(llama, &mut cache)?);
            }
            rounds.push(times);
        }
        for (i, shape) in shapes.iter().enumerate() {
            let alike = shapes.iter().enumerate().filter(|(_, other)| other.rows == shape.rows);
            let first = alike.min_by_key(|(_, other)| other.depth).map_or(i, |(first, _)| first);
            let of = |value: &dyn Fn(&Vec<f64>) -> f64| {
                median(&rounds[1..].iter().map(value).collect::<Vec<f64>>())
            };
            let growth = of(&|times| times[i] / times[first]);
            done.passes.push(shape.pass(llama, &cache, of(&|times| times[i]), growth));
        }
    }
    let mut runs: Vec<Vec<Run>> = options.answers.iter().map(|_| Vec::new()).collect();
    for round in 0..options.rounds {
        for ((name, how), runs) in options.answers.iter().zip(&mut runs) {
            if !go_on(&format!("{name}, {} of {}", round + 1, options.rounds)) {
                return Ok(None);
            }
            runs.push(answer(llama, &options.prompt, how)?);
        }
    }
    for ((name, _), mut runs) in options.answers.iter().zip(runs) {
        runs.sort_by(|a, b| a.seconds().total_cmp(&b.seconds()));
        let (Some(fastest), Some(slowest)) = (runs.first(), runs.last()) else { continue };
        done.answers.push(Answer {
            mode: name.clone(),
            tokens: fastest.tokens(),
            forwards: fastest.forwards,
            seconds: median(&runs.iter().map(Run::seconds).collect::<Vec<f64>>()),
            range: [fastest.seconds(), slowest.seconds()],
            prompt_seconds: fastest.prompt,
            parts: fastest.parts(),
        });
    }
    done.peak_bytes = gpu.memory().peak;
    Ok(Some(done))
}

/// The rows of a pass: `rows` of them after `depth - before` tokens.
struct Shape {
    rows: usize,
    depth: usize,
    /// Rows of the block before, about which nothing is decided.
    before: usize,
}

impl Shape {
    /// Runs it and waits. What the cache holds is of no matter: no time depends on it.
    fn time(&self, llama: &Llama, cache: &mut KvCache) -> Result<f64> {
        let Shape { rows, depth, before } = *self;
        let (gpu, config) = (llama.gpu(), llama.config());
        let tokens: Vec<u32> = (0..rows).map(|i| (i % config.vocab_size) as u32).collect();
        let mask = if rows == 1 { Mask::Causal } else { Mask::BlockCausal(rows - before) };
        let began = Instant::now();
        let decided: Vec<u32> = (before as u32..rows as u32).collect();
        let decided = Tensor::from_u32(gpu, &decided, [rows - before]);
        let hidden = llama.step(&tokens, depth - before, mask, cache);
        let hidden = if before > 0 { ops::gather(&hidden, &decided) } else { hidden };
        let _logits = llama.logits(&hidden);
        gpu.sync()?;
        Ok(began.elapsed().as_secs_f64())
    }

    fn pass(&self, llama: &Llama, cache: &KvCache, seconds: f64, growth: f64) -> Pass {
        let Shape { rows, depth, before } = *self;
        let config = llama.config();
        let (mut weights, mut bytes) = (0, 0);
        // Of a table of embeddings that is not the head too, a pass reads a few rows.
        let read = |name: &str| config.tie_word_embeddings || !name.contains("embed_tokens");
        for parameter in llama.parameters().iter().filter(|p| read(&p.name)) {
            weights += parameter.shards.iter().map(Tensor::numel).sum::<usize>();
            bytes += parameter.shards.iter().map(|t| t.dtype().bytes(t.shape())).sum::<usize>();
        }
        let layers = config.num_hidden_layers * config.head_dim;
        let keys = depth + rows - before;
        let flops = 2 * rows * weights + 4 * rows * keys * config.num_attention_heads * layers;
        let bytes = bytes + cache.bytes() / cache.capacity() * keys;
        let rate = |amount: usize| amount as f64 / seconds / 1e9;
        Pass { rows, depth, seconds, growth, gflops: rate(flops), gbytes: rate(bytes) }
    }
}

/// One answer, as it came.
struct Run {
    /// Tokens that were settled, and when, from the end of prefill on.
    settled: Vec<(usize, f64)>,
    /// Seconds to read the prompt.
    prompt: f64,
    forwards: usize,
}

fn answer(llama: &Llama, prompt: &[u32], options: &DecodeOptions) -> Result<Run> {
    let mut options = options.clone();
    options.sampling.forbidden.append(&mut options.eos_ids);
    let request = Request::answer(llama.config(), prompt, &options)?;
    let mut decoder = Decoder::for_one(llama, &request);
    let id = decoder.submit(request)?;
    let (mut began, mut prompt_seconds) = (Instant::now(), 0.0);
    let mut settled = vec![(0, 0.0)];
    let mut events = Vec::new();
    while !decoder.is_idle() {
        decoder.advance(&mut events)?;
        for (_, event) in events.drain(..) {
            match event {
                Event::Prefilled { .. } => {
                    prompt_seconds += began.elapsed().as_secs_f64();
                    began = Instant::now();
                }
                Event::BlockDone { end, .. } => {
                    settled.push((end - prompt.len(), began.elapsed().as_secs_f64()));
                }
                _ => {}
            }
        }
    }
    let answer = decoder.take(id).ok_or_else(|| Error::Request("the answer is gone".into()))?;
    Ok(Run { settled, prompt: prompt_seconds, forwards: answer.counters.forwards })
}

impl Run {
    fn tokens(&self) -> usize {
        self.settled[self.settled.len() - 1].0
    }

    fn seconds(&self) -> f64 {
        self.settled[self.settled.len() - 1].1
    }

    /// When the first `n` tokens were settled, between two blocks in proportion.
    fn when(&self, n: usize) -> f64 {
        let after = self.settled.partition_point(|&(tokens, _)| tokens < n);
        let (Some(&(tokens, at)), true) = (self.settled.get(after), after > 0) else {
            return if after == 0 { 0.0 } else { self.seconds() };
        };
        let (before, began) = self.settled[after - 1];
        began + (at - began) * (n - before) as f64 / (tokens - before) as f64
    }

    fn parts(&self) -> Vec<(usize, usize, f64)> {
        let mut parts = Vec::new();
        let (mut first, mut end) = (0, 64);
        while first < self.tokens() {
            let end_here = end.min(self.tokens());
            let seconds = self.when(end_here) - self.when(first);
            parts.push((first, end_here, seconds / (end_here - first) as f64));
            (first, end) = (end, 2 * end);
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_go_from_one_power_of_two_to_the_next() {
        // Two seconds a block of four, and one from token 64 on.
        let block = |i: usize| (4 * i, if i <= 16 { 2 * i } else { 16 + i } as f64);
        let run = Run { settled: (0..=40).map(block).collect(), prompt: 0.0, forwards: 40 };
        assert_eq!((run.tokens(), run.seconds()), (160, 56.0));
        assert_eq!(run.parts(), [(0, 64, 0.5), (64, 128, 0.25), (128, 160, 0.25)]);
        assert_eq!((run.when(0), run.when(2), run.when(66)), (0.0, 1.0, 32.5));
    }
}

//! How fast a model decodes: the time of a forward pass by its rows and by how much text lies before them, and whole
//! answers by schedule, in turn. The clock is the wall's, with the wait for each pass, because that is what a user
//! feels; what slows the machine slows all of them.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use demask_engine::Result;
use demask_engine::decode::{self, DecodeOptions, Event, FinishReason, Request};
use demask_engine::model::{KvCache, Llama, LlamaConfig};
use demask_engine::ops::{self, Mask};
use demask_engine::tensor::Tensor;
use serde::Serialize;

use crate::ab::Hear;
use crate::stats::median;

/// Times that each pass is run, in turn, after the first, which compiles: at most, and at least when they take longer
/// than `ENOUGH` together.
const ROUNDS: usize = 9;
const FEWEST: usize = 3;
const ENOUGH: Duration = Duration::from_secs(60);
/// Tokens of an answer that is not timed, for whatever is compiled on the way.
const FIRST: usize = 12;

/// What to measure.
pub struct Options {
    /// Tokens of a diffusion block.
    pub block: usize,
    /// Tokens before the rows of a pass, whole blocks of them; none to leave the passes out.
    pub depths: Vec<usize>,
    /// By name: answers to give.
    pub answers: Vec<(String, Request)>,
    /// Times that each answer is given, in turn.
    pub rounds: usize,
}

/// An answer of full length: stop tokens are forbidden.
///
/// # Errors
/// If it does not fit the model.
pub fn full_length(
    config: &LlamaConfig,
    prompt: &[u32],
    mut options: DecodeOptions,
) -> Result<Request> {
    options.sampling.forbidden.append(&mut options.eos_ids);
    let request = Request::answer(config, prompt, &options)?;
    request.check(config)?;
    Ok(request)
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
/// A device fault, or a model that gives no finite logits.
pub fn run(llama: &Llama, options: &Options, hear: Hear<'_>) -> Result<Option<Decoding>> {
    let gpu = llama.gpu();
    gpu.reset_peak();
    let mut done = Decoding::default();
    let shapes = shapes(options);
    // A pass of one row and a token one at a time are one unit of work.
    let tokens = |request: &Request| request.open.iter().filter(|&&open| open).count();
    let answers: usize = options.answers.iter().map(|(_, request)| tokens(request)).sum();
    let all = (ROUNDS + 1) * shapes.len() + options.rounds * answers;
    let mut units = 0;
    let mut rounds = Vec::new();
    let began = Instant::now();
    let mut cache = llama.cache(options.depths.iter().max().map_or(0, |d| d + options.block));
    for round in 0..=ROUNDS {
        if round > FEWEST && began.elapsed() > ENOUGH {
            break;
        }
        let mut times = Vec::new();
        for shape in &shapes {
            let what = format!("{} rows after {} tokens", shape.rows, shape.depth);
            if hear(&what, units as f64 / all as f64).is_break() {
                return Ok(None);
            }
            times.push(shape.time(llama, &mut cache)?);
            units += 1;
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
    drop(cache);
    units = (ROUNDS + 1) * shapes.len();
    let mut runs: Vec<Vec<Run>> = options.answers.iter().map(|_| Vec::new()).collect();
    for round in 0..=options.rounds {
        for ((name, request), runs) in options.answers.iter().zip(&mut runs) {
            let short = if round == 0 { FIRST } else { usize::MAX };
            let what = format!("{name}, {round} of {}", options.rounds);
            let mut on_token = |settled| hear(&what, (units + settled) as f64 / all as f64);
            let Some(run) = answer(llama, request, short, &mut on_token)? else { return Ok(None) };
            if round > 0 {
                units += tokens(request);
                runs.push(run);
            }
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

/// One token, a block, and a block with the one before it, behind each length.
fn shapes(options: &Options) -> Vec<Shape> {
    let block = options.block;
    let mut shapes: Vec<Shape> = Vec::new();
    for (rows, before) in [(1, 0), (block, 0), (2 * block, block)] {
        for &depth in options.depths.iter().filter(|&&depth| depth >= before) {
            let shape = Shape { rows, depth, before };
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }
    shapes
}

/// The rows of a pass: `rows` of them after `depth - before` tokens.
#[derive(PartialEq)]
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
        let (keys, decided) = (depth + rows - before, rows - before);
        let head: usize = llama.head().iter().map(Tensor::numel).sum();
        let products = 2 * (rows * (weights - head) + decided * head);
        let flops = products + 4 * rows * keys * config.num_attention_heads * layers;
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

/// Gives the answer, or the first `most` tokens of it. `None` if `on_token` stopped it.
fn answer(
    llama: &Llama,
    request: &Request,
    most: usize,
    on_token: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Run>> {
    let Request { tokens, open, options } = request;
    let prompt = open.iter().position(|&open| open).unwrap_or(open.len());
    let end = tokens.len().min(prompt.saturating_add(most));
    let (tokens, open) = (tokens[..end].to_vec(), open[..end].to_vec());
    let (mut began, mut prompt_seconds) = (Instant::now(), 0.0);
    let mut settled = vec![(0, 0.0)];
    let request = Request { tokens, open, options: options.clone() };
    let answer = decode::fill(llama, request, |event| match event {
        Event::Prefilled { .. } => {
            prompt_seconds += began.elapsed().as_secs_f64();
            began = Instant::now();
            on_token(0)
        }
        Event::BlockDone { end, .. } => {
            settled.push((end - prompt, began.elapsed().as_secs_f64()));
            on_token(end - prompt)
        }
        _ => ControlFlow::Continue(()),
    })?;
    let run = Run { settled, prompt: prompt_seconds, forwards: answer.counters.forwards };
    Ok((answer.finish_reason != FinishReason::Interrupted).then_some(run))
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

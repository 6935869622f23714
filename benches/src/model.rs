//! Whole steps as works: a block of a block-diffusion decode, and a training step with its update. The model has the
//! shape of a small Llama and drawn weights; an f64 forward pass, written from the formulas, says what must come out.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Inputs, Llama, LlamaConfig};
use demask_engine::ops::case::{Cost, Tolerance};
use demask_engine::ops::{
    AdamW, AttentionOptions, Mask, Supervision, adamw_step, grad_norm, linear_cross_entropy,
};
use demask_engine::philox::Philox;
use demask_engine::tensor::{DType, Tensor};
use demask_engine::{Error, Result};

use crate::work::{Checked, Work, compare};

/// Tokens of a diffusion block.
const BLOCK: usize = 4;
/// Rows in the cache of a decode step; base tokens of a training step.
const LENGTH: usize = 32;

/// One whole step.
#[derive(Clone, Copy)]
pub struct Step {
    kind: Kind,
    hidden: usize,
    vocabulary: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Decode,
    Train,
}

impl Step {
    /// Decoding and training, at a small width and at that of a 135 M model (two of its layers).
    pub fn all() -> Vec<Step> {
        let sizes = [(128, 2048), (576, 16_384)];
        let of = |kind| sizes.map(|(hidden, vocabulary)| Step { kind, hidden, vocabulary });
        [of(Kind::Decode), of(Kind::Train)].concat()
    }

    /// Its name in records.
    pub fn name(self) -> String {
        let kind = match self.kind {
            Kind::Decode => format!("step decode {BLOCK} of {}", LENGTH + BLOCK),
            Kind::Train => format!("step train two-copy 2x{LENGTH}"),
        };
        format!("{kind} d{} v{}", self.hidden, self.vocabulary)
    }

    fn config(self) -> Result<LlamaConfig> {
        let heads = self.hidden / 64;
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": self.vocabulary, "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 8 / 3 / 4 * 4, "num_hidden_layers": 2,
            "num_attention_heads": heads, "num_key_value_heads": heads.div_ceil(3),
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        });
        LlamaConfig::from_json(&json, "the benches' model".as_ref())
    }

    /// Floating-point operations of the matrix products and of attention; weights read once (decoding), or read twice
    /// with the gradients written, normed and applied (training).
    pub fn cost(self) -> Cost {
        let Ok(config) = self.config() else { return Cost { flops: 0.0, bytes: 0.0 } };
        let all = config.num_parameters() as f64;
        let head = (self.vocabulary * self.hidden) as f64;
        let layers = all - 2.0 * head;
        let width =
            (config.num_hidden_layers * config.num_attention_heads * config.head_dim) as f64;
        match self.kind {
            Kind::Decode => {
                let rows = BLOCK as f64;
                let attention = 4.0 * rows * (LENGTH + BLOCK) as f64 * width;
                let flops = 2.0 * rows * (layers + head) + attention;
                Cost { flops, bytes: 4.0 * (layers + head) }
            }
            Kind::Train => {
                let (rows, supervised) = (2.0 * LENGTH as f64, supervised(LENGTH).len() as f64);
                let attention = 14.0 * (LENGTH * (LENGTH + BLOCK)) as f64 * width;
                let flops = 6.0 * (rows * layers + supervised * head) + attention;
                Cost { flops, bytes: 44.0 * all }
            }
        }
    }

    /// The model on the device, and the step over it.
    pub fn make(self, gpu: &Gpu) -> Result<Work> {
        let config = self.config()?;
        let model = Llama::random(gpu, &config, 7)?;
        let weights = redraw(&model);
        let reference = Rc::new(Reference { config, weights });
        let (name, cost) = (self.name(), self.cost());
        Ok(match self.kind {
            Kind::Decode => decode(name, cost, model, reference),
            Kind::Train => train(name, cost, model.trainable(), reference),
        })
    }
}

/// Rows that are masked, and so supervised: three of each block of four.
fn supervised(length: usize) -> Vec<u32> {
    (0..length as u32).filter(|i| i % 4 != 1).collect()
}

fn token(i: usize, vocabulary: usize) -> u32 {
    (i * 37 % 251 + i * i % 509) as u32 % vocabulary as u32
}

/// Weights that keep activations near one, so that an error anywhere shows at the end.
fn redraw(model: &Llama) -> HashMap<String, Vec<f64>> {
    let mut weights = HashMap::new();
    for (index, parameter) in model.parameters().into_iter().enumerate() {
        let mut random = Philox::new(29, [index as u32, 0, 0]);
        let fan_in = if parameter.name.contains("embed") {
            1
        } else {
            *parameter.shape.last().unwrap_or(&1)
        };
        let mut draw = |matrix: bool| match matrix {
            true => random.normal() / (fan_in as f32).sqrt(),
            false => 1.0 + 0.2 * random.normal(),
        };
        let mut all = Vec::new();
        for shard in &parameter.shards {
            let values: Vec<f32> =
                (0..shard.numel()).map(|_| draw(parameter.shape.len() == 2)).collect();
            shard.overwrite(&values);
            all.extend(values.into_iter().map(f64::from));
        }
        weights.insert(parameter.name.clone(), all);
    }
    weights
}

fn decode(name: String, cost: Cost, model: Llama, reference: Rc<Reference>) -> Work {
    let vocabulary = model.config().vocab_size;
    let tokens: Vec<u32> = (0..LENGTH + BLOCK).map(|i| token(i, vocabulary)).collect();
    let mask = Mask::BlockCausal(BLOCK);
    let mut cache = model.cache(LENGTH + BLOCK);
    model.step(&tokens[..LENGTH], 0, mask, &mut cache);
    let cache = RefCell::new(cache);
    let block = tokens[LENGTH..].to_vec();
    let run = move || {
        let hidden = model.step(&block, LENGTH, mask, &mut cache.borrow_mut());
        vec![model.logits(&hidden)]
    };
    let check = move |outputs: &[Tensor]| {
        let got = outputs[0].to_vec().map_err(|e| e.to_string())?;
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let hidden = reference.hidden(&tokens, &positions, |q, k| q / BLOCK >= k / BLOCK);
        let d = reference.config.hidden_size;
        let want = product(&hidden[LENGTH * d..], &reference.weights["lm_head.weight"], d);
        let all: Vec<usize> = (0..want.len()).collect();
        // Two layers of f32 sums on values of order one.
        compare(&got, &all, &want, Tolerance { absolute: 2e-3, relative: 1e-3 })
    };
    Work { name, cost, run: Box::new(run), check: Box::new(check) }
}

/// Two copies of a sequence, as block diffusion trains: noisy, then clean. Supervised are the masked rows.
struct Sequence {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    rows: Vec<u32>,
    targets: Vec<u32>,
}

impl Sequence {
    fn new(vocabulary: usize) -> Sequence {
        let clean: Vec<u32> = (0..LENGTH).map(|i| token(i, vocabulary - 1)).collect();
        let rows = supervised(LENGTH);
        let mut noisy = clean.clone();
        rows.iter().for_each(|&r| noisy[r as usize] = vocabulary as u32 - 1);
        let targets = rows.iter().map(|&r| clean[r as usize]).collect();
        let once: Vec<u32> = (0..LENGTH as u32).collect();
        Sequence { tokens: [noisy, clean].concat(), positions: once.repeat(2), rows, targets }
    }

    fn sees(q: usize, k: usize) -> bool {
        let (bq, bk) = (q % LENGTH / BLOCK, k % LENGTH / BLOCK);
        match (q < LENGTH, k < LENGTH) {
            (true, true) => bq == bk,
            (true, false) => bq > bk,
            (false, false) => bq >= bk,
            (false, true) => false,
        }
    }
}

fn train(name: String, cost: Cost, model: Llama, reference: Rc<Reference>) -> Work {
    let gpu = model.gpu().clone();
    let sequence = Sequence::new(model.config().vocab_size);
    let (t, r) = (sequence.tokens.len(), sequence.rows.len());
    let inputs = Inputs {
        tokens: Tensor::from_u32(&gpu, &sequence.tokens, [1, t]),
        positions: Tensor::from_u32(&gpu, &sequence.positions, [1, t]),
        attention: AttentionOptions::new(Mask::TwoCopy(BLOCK)),
    };
    let rows = Tensor::from_u32(&gpu, &sequence.rows, [r]);
    let supervision = Supervision {
        targets: Tensor::from_u32(&gpu, &sequence.targets, [r]),
        weights: Tensor::from_f32(&gpu, &vec![1.0; r], [r]),
        divisor: r as f32,
    };
    let shards: Vec<(String, Tensor)> = model
        .parameters()
        .into_iter()
        .flat_map(|p| p.shards.iter().map(|s| (p.name.clone(), s.clone())))
        .collect();
    let zeros = |t: &Tensor| Tensor::zeros(&gpu, t.shape(), DType::F32, "moment");
    let moments: Vec<[Tensor; 2]> = shards.iter().map(|(_, t)| [zeros(t), zeros(t)]).collect();
    let names: Vec<String> = shards.iter().map(|(name, _)| name.clone()).collect();
    let one = Tensor::from_f32(&gpu, &[1.0], [1]);
    // A learning rate of zero does all the work and leaves the weights, so that every call gives the same bits.
    let settings =
        AdamW { lr: 0.0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.0, step: 1 };
    let run = move || {
        let hidden = model.hidden_at(&inputs, &rows, false);
        let ce = linear_cross_entropy(&hidden, model.head(), &supervision);
        let mut gradients = Gradients::new();
        backward(&ce.loss, &one, &mut gradients);
        let of = |t: &Tensor| gradients.get(t).expect("every weight is used").clone();
        let all: Vec<Tensor> = shards.iter().map(|(_, t)| of(t)).collect();
        let norm = grad_norm(&all.iter().collect::<Vec<_>>(), 1.0, 1.0);
        for (((_, w), g), [m, v]) in shards.iter().zip(&all).zip(&moments) {
            adamw_step(w, g, m, v, &norm, settings, 1.0);
        }
        [vec![ce.loss.detach(), norm], all].concat()
    };
    let check = move |outputs: &[Tensor]| {
        reference.check_training(&sequence, &names, outputs).map_err(|e| e.to_string())
    };
    Work { name, cost, run: Box::new(run), check: Box::new(check) }
}

/// The network in f64.
struct Reference {
    config: LlamaConfig,
    weights: HashMap<String, Vec<f64>>,
}

impl Reference {
    /// The loss against f64; the gradients against the slope of the f64 loss along one drawn direction through all
    /// weights, which an error in any of them turns; the norm against the gradients.
    fn check_training(
        &self,
        sequence: &Sequence,
        names: &[String],
        outputs: &[Tensor],
    ) -> Result<Checked> {
        let wrong = |why: String| Err(Error::Request(why));
        let loss = f64::from(outputs[0].item()?);
        let norm = f64::from(outputs[1].to_vec()?[0]);
        let want = self.loss(sequence);
        let mut worst = (loss - want).abs() / (1e-4 * want.abs());
        if worst.is_nan() || worst > 1.0 {
            return wrong(format!("loss {loss} instead of {want}"));
        }
        let mut random = Philox::new(31, [0; 3]);
        let direction: HashMap<&String, Vec<f64>> = names
            .iter()
            .map(|name| {
                (name, self.weights[name].iter().map(|_| f64::from(random.normal())).collect())
            })
            .collect();
        let (mut slope, mut squares, mut spread, mut values) = (0.0, 0.0, 0.0, 0);
        let mut first = HashMap::new();
        for (name, gradient) in names.iter().zip(&outputs[2..]) {
            let from: &mut usize = first.entry(name).or_insert(0);
            let gradient = gradient.to_vec()?;
            for (&g, &v) in gradient.iter().zip(&direction[name][*from..]) {
                let g = f64::from(g);
                slope += g * v;
                squares += g * g;
                spread += (g * v) * (g * v);
            }
            *from += gradient.len();
            values += gradient.len();
        }
        let moved = |h: f64| {
            let along = |(name, w): (&String, &Vec<f64>)| {
                let moved = w.iter().zip(&direction[name]).map(|(w, v)| w + h * v).collect();
                (name.clone(), moved)
            };
            let weights = self.weights.iter().map(along).collect();
            Reference { config: self.config.clone(), weights }.loss(sequence)
        };
        let h = 1e-5;
        let want = (moved(h) - moved(-h)) / (2.0 * h);
        // A random sum's own size is the measure: what goes wrong in one weight is a share of it.
        let error = (slope - want).abs() / (1e-3 * spread.sqrt());
        if error.is_nan() || error > 1.0 {
            return wrong(format!(
                "the gradient's slope along a direction is {slope} instead of {want}"
            ));
        }
        let norm_error = (norm - squares.sqrt()).abs() / (1e-4 * norm);
        if norm_error.is_nan() || norm_error > 1.0 {
            return wrong(format!("gradient norm {norm} instead of {}", squares.sqrt()));
        }
        worst = worst.max(error).max(norm_error);
        Ok(Checked { values, of: values, worst })
    }

    fn loss(&self, sequence: &Sequence) -> f64 {
        let d = self.config.hidden_size;
        let hidden = self.hidden(&sequence.tokens, &sequence.positions, Sequence::sees);
        let row = |&r: &u32| hidden[r as usize * d..][..d].to_vec();
        let rows: Vec<f64> = sequence.rows.iter().flat_map(row).collect();
        let logits = product(&rows, &self.weights["lm_head.weight"], d);
        let vocabulary = self.config.vocab_size;
        let loss = logits.chunks(vocabulary).zip(&sequence.targets).map(|(z, &target)| {
            let top = z.iter().copied().fold(f64::MIN, f64::max);
            top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln() - z[target as usize]
        });
        loss.sum::<f64>() / sequence.rows.len() as f64
    }

    /// Final-normed hidden states, [T, D].
    fn hidden(
        &self,
        tokens: &[u32],
        positions: &[u32],
        sees: impl Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let c = &self.config;
        let d = c.hidden_size;
        let embed = &self.weights["model.embed_tokens.weight"];
        let row = |&t: &u32| embed[t as usize * d..][..d].to_vec();
        let mut x: Vec<f64> = tokens.iter().flat_map(row).collect();
        let add = |x: &mut [f64], y: &[f64]| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        for i in 0..c.num_hidden_layers {
            let w = |name: &str| &self.weights[&format!("model.layers.{i}.{name}.weight")];
            let normed = self.norm(&x, w("input_layernorm"));
            let mut q = product(&normed, w("self_attn.q_proj"), d);
            let mut k = product(&normed, w("self_attn.k_proj"), d);
            let v = product(&normed, w("self_attn.v_proj"), d);
            self.rotate(&mut q, positions, c.num_attention_heads);
            self.rotate(&mut k, positions, c.num_key_value_heads);
            let o = self.attend(&q, &k, &v, tokens.len(), &sees);
            add(&mut x, &product(&o, w("self_attn.o_proj"), c.num_attention_heads * c.head_dim));
            let normed = self.norm(&x, w("post_attention_layernorm"));
            let gate = product(&normed, w("mlp.gate_proj"), d);
            let up = product(&normed, w("mlp.up_proj"), d);
            let silu = |(g, up): (&f64, &f64)| g / (1.0 + (-g).exp()) * up;
            let y: Vec<f64> = gate.iter().zip(&up).map(silu).collect();
            add(&mut x, &product(&y, w("mlp.down_proj"), c.intermediate_size));
        }
        self.norm(&x, &self.weights["model.norm.weight"])
    }

    fn norm(&self, x: &[f64], w: &[f64]) -> Vec<f64> {
        let row = |row: &[f64]| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
            let s = 1.0 / (mean + f64::from(self.config.rms_norm_eps)).sqrt();
            row.iter().zip(w).map(|(x, w)| x * s * w).collect::<Vec<_>>()
        };
        x.chunks(w.len()).flat_map(row).collect()
    }

    /// Rotate-half by the position, the angle rounded to f32 as the engine has it.
    fn rotate(&self, x: &mut [f64], positions: &[u32], heads: usize) {
        let (h, inv_freq) = (self.config.head_dim, self.config.inv_freq());
        for (row, &position) in x.chunks_mut(heads * h).zip(positions) {
            for head in row.chunks_mut(h) {
                for (i, f) in inv_freq.iter().enumerate() {
                    let (sin, cos) = f64::from(position as f32 * f).sin_cos();
                    let (a, b) = (head[i], head[i + h / 2]);
                    (head[i], head[i + h / 2]) = (a * cos - b * sin, b * cos + a * sin);
                }
            }
        }
    }

    fn attend(
        &self,
        q: &[f64],
        k: &[f64],
        v: &[f64],
        t: usize,
        sees: impl Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let c = &self.config;
        let (n, g, h) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let mut out = vec![0.0; q.len()];
        for (row, y) in out.chunks_mut(h).enumerate() {
            let (i, head) = (row / n, row % n);
            let at = |j: usize| (j * g + head / (n / g)) * h;
            let keys: Vec<usize> = (0..t).filter(|&j| sees(i, j)).collect();
            let scores: Vec<f64> = keys
                .iter()
                .map(|&j| dot(&q[row * h..][..h], &k[at(j)..][..h]) / (h as f64).sqrt())
                .collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
            for (&j, s) in keys.iter().zip(&scores) {
                let p = (s - top).exp() / total;
                y.iter_mut().zip(&v[at(j)..][..h]).for_each(|(y, v)| *y += p * v);
            }
        }
        out
    }
}

/// Four sums at once: one after the other they would wait for each other.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (fours_a, fours_b) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest: f64 = fours_a.remainder().iter().zip(fours_b.remainder()).map(|(a, b)| a * b).sum();
    let mut sums = [0.0; 4];
    for (a, b) in fours_a.zip(fours_b) {
        for i in 0..4 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// x · Wᵀ for x: [.., k] and W: [n, k].
fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|row| w.chunks(k).map(move |w| dot(row, w))).collect()
}

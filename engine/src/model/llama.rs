//! The Llama decoder as Hugging Face's `LlamaForCausalLM` defines it: pre-norm blocks of grouped-query attention
//! with rotary positions and a SwiGLU feed-forward, a final norm, a head. Nothing here is specific to diffusion:
//! only the mask and the loss differ (arXiv 2601.15892 §2.2).

use std::path::Path;
use std::rc::Rc;

use super::cache::KvCache;
use super::config::LlamaConfig;
use super::save::{SaveTensor, save_model};
use super::tokenizer::Tokenizer;
use super::weights::quant::repack;
use super::weights::{StoredType, Weights};
use crate::autograd::{checkpoint, without_recording};
use crate::gpu::Gpu;
use crate::ops::{
    self, AttentionOptions, Mask, add_rms_norm, attention, embedding, linear, linear_onto,
    rms_norm, rope, rope_into_cache, swiglu,
};
use crate::philox::Philox;
use crate::tensor::stored::{decode, encode};
use crate::tensor::{DType, QUANT_BLOCK, Tensor};
use crate::{Error, Result};

/// How weight matrices rest in device memory; norms are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As the file has them: floats unchanged, blocks of Q8_0 as [`DType::Q8`], of Q4_0 and Q4_1 as
    /// [`DType::Q4`], all exactly.
    Stored,
    /// f32, as training needs.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit blocks of 32, [`DType::Q8`].
    Q8,
    /// 4-bit blocks of 32, [`DType::Q4`].
    Q4,
}

/// One named weight. A matrix larger than one storage binding is several tensors of consecutive rows.
#[derive(Clone)]
pub struct Parameter {
    /// Hugging Face name.
    pub name: String,
    /// Whole extents.
    pub shape: Vec<usize>,
    /// Row shards in order.
    pub shards: Vec<Tensor>,
}

/// A model on a device.
pub struct Llama {
    gpu: Gpu,
    config: LlamaConfig,
    inv_freq: Tensor,
    embed: Parameter,
    layers: Vec<Rc<Layer>>,
    norm: Parameter,
    /// `None` when tied to the embedding.
    head: Option<Parameter>,
}

struct Layer {
    input_norm: Parameter,
    q: Parameter,
    k: Parameter,
    v: Parameter,
    o: Parameter,
    post_norm: Parameter,
    gate: Parameter,
    up: Parameter,
    down: Parameter,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
}

/// One batch for [`Llama::hidden`].
pub struct Inputs {
    /// u32 [B, T], each below the vocabulary.
    pub tokens: Tensor,
    /// u32 [B, T].
    pub positions: Tensor,
    /// Who sees whom.
    pub attention: AttentionOptions,
}

/// Where a decoding step stands, for each of its layers.
struct Step<'a> {
    start: usize,
    inv_freq: &'a Tensor,
    options: AttentionOptions,
}

impl Llama {
    /// Loads a Hugging Face folder or a GGUF file.
    pub fn load(gpu: &Gpu, path: &Path, precision: Precision) -> Result<Llama> {
        let (config, weights) = Weights::open(path)?;
        Self::from_weights(gpu, &config, &weights, precision)
    }

    /// Uploads opened weights.
    pub fn from_weights(
        gpu: &Gpu,
        config: &LlamaConfig,
        weights: &Weights,
        precision: Precision,
    ) -> Result<Llama> {
        let model =
            Self::build(gpu, config, |name, shape| upload(gpu, weights, precision, name, shape))?;
        gpu.sync()?;
        Ok(model)
    }

    /// Fresh f32 weights: normal with deviation 0.02, those that write to the residual stream divided by
    /// √(2 L), norms one.
    pub fn random(gpu: &Gpu, config: &LlamaConfig, seed: u64) -> Result<Llama> {
        let mut index = 0;
        let residual = 0.02 / (2.0 * config.num_hidden_layers as f32).sqrt();
        let model = Self::build(gpu, config, |name, shape| {
            index += 1;
            let mut random = Philox::new(seed, [index, 0, 0]);
            let std = if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
                residual
            } else {
                0.02
            };
            let norm = shape.len() == 1;
            sharded(gpu, name, shape, DType::F32, |rows| {
                let n = rows.len() * shape[1..].iter().product::<usize>();
                let values = (0..n).map(|_| if norm { 1.0 } else { std * random.normal() });
                Ok(bytemuck::cast_slice(&values.collect::<Vec<f32>>()).to_vec())
            })
        })?;
        gpu.sync()?;
        Ok(model)
    }

    fn build(
        gpu: &Gpu,
        config: &LlamaConfig,
        mut make: impl FnMut(&str, &[usize]) -> Result<Parameter>,
    ) -> Result<Llama> {
        let shapes: std::collections::HashMap<_, _> = config.parameters().into_iter().collect();
        let mut get = |name: &str| make(name, &shapes[name]);
        let embed = get("model.embed_tokens.weight")?;
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let mut part = |name: &str| get(&format!("model.layers.{i}.{name}.weight"));
            layers.push(Rc::new(Layer {
                input_norm: part("input_layernorm")?,
                q: part("self_attn.q_proj")?,
                k: part("self_attn.k_proj")?,
                v: part("self_attn.v_proj")?,
                o: part("self_attn.o_proj")?,
                post_norm: part("post_attention_layernorm")?,
                gate: part("mlp.gate_proj")?,
                up: part("mlp.up_proj")?,
                down: part("mlp.down_proj")?,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                eps: config.rms_norm_eps,
            }));
        }
        let norm = get("model.norm.weight")?;
        let head = if config.tie_word_embeddings { None } else { Some(get("lm_head.weight")?) };
        let inv_freq = Tensor::from_f32(gpu, &config.inv_freq(), [config.head_dim / 2]);
        let (gpu, config) = (gpu.clone(), config.clone());
        Ok(Llama { gpu, config, inv_freq, embed, layers, norm, head })
    }

    /// This model with every weight a trainable leaf. The weights must be f32.
    pub fn trainable(mut self) -> Llama {
        let leaf = |p: &mut Parameter| p.shards.iter_mut().for_each(|t| *t = t.trainable());
        leaf(&mut self.embed);
        for layer in &mut self.layers {
            let layer = Rc::get_mut(layer).expect("no forward pass is open");
            layer.parameters_mut().into_iter().for_each(leaf);
        }
        leaf(&mut self.norm);
        self.head.as_mut().map(leaf);
        self
    }

    /// What the model is.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// For writing training facts (block length, mask id) into a saved config.
    pub fn config_mut(&mut self) -> &mut LlamaConfig {
        &mut self.config
    }

    /// Where it lives.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Every weight once, in the order of [`LlamaConfig::parameters`].
    pub fn parameters(&self) -> Vec<&Parameter> {
        let layers = self.layers.iter().flat_map(|l| l.parameters());
        [&self.embed].into_iter().chain(layers).chain([&self.norm]).chain(&self.head).collect()
    }

    /// Row shards of the output head: [V_i, D].
    pub fn head(&self) -> &[Tensor] {
        &self.head.as_ref().unwrap_or(&self.embed).shards
    }

    /// Final-normed hidden states f32 [B, T, D]. With `recompute`, each layer keeps only its input for the
    /// backward pass.
    pub fn hidden(&self, inputs: &Inputs, recompute: bool) -> Tensor {
        let mut x = embedding(&inputs.tokens, &self.embed.shards);
        for layer in &self.layers {
            let (layer, inv_freq) = (layer.clone(), self.inv_freq.clone());
            let (positions, options) = (inputs.positions.clone(), inputs.attention.clone());
            let forward = move |x: &Tensor| layer.forward(x, &positions, &inv_freq, &options);
            x = if recompute { checkpoint(&x, forward) } else { forward(&x) };
        }
        rms_norm(&x, &self.norm.shards[0], self.config.rms_norm_eps)
    }

    /// Runs `tokens` at absolute positions `start`.. under `mask`, writes their keys and values into the cache
    /// there, and attends to all rows up to them. Returns final-normed hidden states f32 [T, D].
    ///
    /// # Panics
    /// If the cache has no room, or `mask` is the two-copy one.
    pub fn step(&self, tokens: &[u32], start: usize, mask: Mask, cache: &mut KvCache) -> Tensor {
        let tokens = Tensor::from_u32(&self.gpu, tokens, [tokens.len()]);
        self.step_on_device(&tokens, start, mask, cache)
    }

    /// As [`Llama::step`], for tokens on the device: u32 [T] or [T, 1].
    ///
    /// # Panics
    /// If the cache has no room, or `mask` is the two-copy one.
    pub fn step_on_device(
        &self,
        tokens: &Tensor,
        start: usize,
        mask: Mask,
        cache: &mut KvCache,
    ) -> Tensor {
        assert!(!matches!(mask, Mask::TwoCopy(_)), "the two-copy mask is for training");
        let t = tokens.numel();
        let options = AttentionOptions { mask, spans: None, q_start: start, keys: Some(start + t) };
        let step = Step { start, inv_freq: &self.inv_freq, options };
        without_recording(|| {
            let mut x = embedding(&tokens.reshape([t]), &self.embed.shards);
            let norms = self.layers.iter().map(|layer| &layer.input_norm).chain([&self.norm]);
            let mut norms = norms.map(|norm| &norm.shards[0]);
            let first = norms.next().expect("the final norm is one of them");
            let mut h = rms_norm(&x, first, self.config.rms_norm_eps);
            for (i, (layer, norm)) in self.layers.iter().zip(norms).enumerate() {
                (x, h) = layer.decode(&x, &h, norm, &step, cache.layer(i));
            }
            h
        })
    }

    /// Logits f32 [R, V] of hidden states [R, D].
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        without_recording(|| linear(hidden, self.head()))
    }

    /// Logits of the given rows of hidden states [T, D]: f32 [R, V_i], one tensor for each row shard of the head.
    ///
    /// # Panics
    /// If the rows are not all there.
    pub fn logits_of_rows(&self, hidden: &Tensor, rows: std::ops::Range<usize>) -> Vec<Tensor> {
        without_recording(|| {
            let whole = rows == (0..hidden.shape()[0]);
            let x = if whole { hidden.clone() } else { ops::rows(hidden, rows.start, rows.len()) };
            self.head().iter().map(|shard| linear(&x, std::slice::from_ref(shard))).collect()
        })
    }

    /// Writes a Hugging Face folder that `transformers` loads unchanged, with the weights as `dtype`
    /// (norms too) and the tokenizer beside them.
    pub fn save(&self, dir: &Path, dtype: StoredType, tokenizer: Option<&Tokenizer>) -> Result<()> {
        let parameters = self.parameters();
        let tensors: Vec<SaveTensor> = parameters
            .iter()
            .map(|p| SaveTensor { name: p.name.clone(), shape: p.shape.clone(), dtype })
            .collect();
        let files = tokenizer.map_or(Ok(Vec::new()), Tokenizer::files)?;
        let fill = |tensor: &SaveTensor, sink: &mut super::save::Sink<'_>| {
            let parameter = parameters.iter().find(|p| p.name == tensor.name);
            for shard in &parameter.expect("tensors are made of parameters").shards {
                sink(&encode(&widen(shard)?, shard.shape().last(), saved_type(dtype)))?;
            }
            Ok(())
        };
        save_model(dir, &self.config, &tensors, fill, &files)
    }
}

impl Layer {
    fn parameters(&self) -> [&Parameter; 9] {
        let Layer { input_norm, q, k, v, o, post_norm, gate, up, down, .. } = self;
        [input_norm, q, k, v, o, post_norm, gate, up, down]
    }

    fn parameters_mut(&mut self) -> [&mut Parameter; 9] {
        let Layer { input_norm, q, k, v, o, post_norm, gate, up, down, .. } = self;
        [input_norm, q, k, v, o, post_norm, gate, up, down]
    }

    /// One block: x [B, T, D] → [B, T, D].
    fn forward(
        &self,
        x: &Tensor,
        positions: &Tensor,
        inv_freq: &Tensor,
        options: &AttentionOptions,
    ) -> Tensor {
        let [b, t] = [x.shape()[0], x.shape()[1]];
        let h = rms_norm(x, &self.input_norm.shards[0], self.eps);
        let heads = |w: &Parameter, n| linear(&h, &w.shards).reshape([b, t, n, self.head_dim]);
        let q = rope(&heads(&self.q, self.heads), positions, inv_freq);
        let k = rope(&heads(&self.k, self.kv_heads), positions, inv_freq);
        let v = heads(&self.v, self.kv_heads);
        let a = attention(&q, &k, &v, options).reshape([b, t, self.heads * self.head_dim]);
        let x = linear_onto(x, &a, &self.o.shards);
        let h = rms_norm(&x, &self.post_norm.shards[0], self.eps);
        let f = swiglu(&linear(&h, &self.gate.shards), &linear(&h, &self.up.shards));
        linear_onto(&x, &f, &self.down.shards)
    }

    /// The same block in fewer dispatches, without gradients, on one sequence and its cache: x, the residual stream,
    /// and h, its norm, both [T, D]. Returns x behind the block, and its norm under `next_norm`.
    fn decode(
        &self,
        x: &Tensor,
        h: &Tensor,
        next_norm: &Tensor,
        step: &Step<'_>,
        (keys, values): (&Tensor, &Tensor),
    ) -> (Tensor, Tensor) {
        let t = x.shape()[0];
        let heads = |w: &Parameter, n| linear(h, &w.shards).reshape([1, t, n, self.head_dim]);
        let (q, k) = (heads(&self.q, self.heads), heads(&self.k, self.kv_heads));
        let v = heads(&self.v, self.kv_heads);
        let q = rope_into_cache([&q, &k, &v], step.inv_freq, step.start, keys, values);
        let a = attention(&q, keys, values, &step.options).reshape([t, self.heads * self.head_dim]);
        let (x, h) =
            add_rms_norm(x, &linear(&a, &self.o.shards), &self.post_norm.shards[0], self.eps);
        let f = swiglu(&linear(&h, &self.gate.shards), &linear(&h, &self.up.shards));
        add_rms_norm(&x, &linear(&f, &self.down.shards), next_norm, self.eps)
    }
}

/// Makes a parameter of row shards that one binding can take; `rows` gives the bytes of a row range.
fn sharded(
    gpu: &Gpu,
    name: &str,
    shape: &[usize],
    dtype: DType,
    mut rows: impl FnMut(std::ops::Range<usize>) -> Result<Vec<u8>>,
) -> Result<Parameter> {
    let row_bytes = dtype.row_bytes(shape[1..].iter().product());
    // Multiples of four rows keep every shard on the fast kernels.
    let most = ((gpu.max_binding() as usize / row_bytes.max(1)) & !3).max(1);
    let mut shards = Vec::new();
    for first in (0..shape[0]).step_by(most) {
        let range = first..(first + most).min(shape[0]);
        let extents = [&[range.len()], &shape[1..]].concat();
        shards.push(Tensor::from_bytes(gpu, &rows(range)?, extents, dtype, name));
    }
    Ok(Parameter { name: name.to_owned(), shape: shape.to_vec(), shards })
}

fn upload(
    gpu: &Gpu,
    weights: &Weights,
    precision: Precision,
    name: &str,
    shape: &[usize],
) -> Result<Parameter> {
    let stored = weights.dtype(name);
    let dtype = match (shape.len(), precision, stored) {
        (2, Precision::Bf16, _) | (2, Precision::Stored, StoredType::BF16) => DType::Bf16,
        (2, Precision::F16, _) | (2, Precision::Stored, StoredType::F16) => DType::F16,
        (2, Precision::Q8, _) | (2, Precision::Stored, StoredType::Q8_0) => DType::Q8,
        (2, Precision::Q4, _) | (2, Precision::Stored, StoredType::Q4_0 | StoredType::Q4_1) => {
            DType::Q4
        }
        _ => DType::F32,
    };
    let columns: usize = shape[1..].iter().product();
    if matches!(dtype, DType::Q8 | DType::Q4) && !columns.is_multiple_of(QUANT_BLOCK) {
        return Err(Error::model(
            weights.path(),
            format!(
                "{name} has rows of {columns}, which are no whole blocks of {QUANT_BLOCK}; load it in a \
                 precision without blocks (bf16, say)"
            ),
        ));
    }
    sharded(gpu, name, shape, dtype, |rows| {
        if saved_type(stored) == dtype
            && let Some(bytes) = weights.rows_bytes(name, rows.clone())?
        {
            return Ok(bytes.into_owned());
        }
        if let (StoredType::Q8_0, DType::Q8) | (StoredType::Q4_0 | StoredType::Q4_1, DType::Q4) =
            (stored, dtype)
        {
            return Ok(repack(stored, &weights.rows_stored(name, rows)?, columns));
        }
        Ok(encode(&weights.rows_f32(name, rows)?, columns, dtype))
    })
}

/// The type that weights are saved as.
fn saved_type(dtype: StoredType) -> DType {
    match dtype {
        StoredType::BF16 => DType::Bf16,
        StoredType::F16 => DType::F16,
        _ => DType::F32,
    }
}

/// A shard's values as f32 on the host.
fn widen(shard: &Tensor) -> Result<Vec<f32>> {
    Ok(decode(&shard.to_bytes()?, shard.shape().last(), shard.dtype()))
}

//! The Llama decoder as Hugging Face's `LlamaForCausalLM` defines it: pre-norm blocks of grouped-query attention
//! with rotary positions and a SwiGLU feed-forward, a final norm, a head. Nothing here is specific to diffusion:
//! only the mask and the loss differ (arXiv 2601.15892 §2.2).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::rc::Rc;

use super::cache::KvCache;
use super::config::LlamaConfig;
use super::lora::{Decoding, HEAD, Lora, Replaced};
use super::parameter::{
    Fresh, Parameter, Precision, Source, Stored, joined, parameter, saved_type, widen,
};
use super::projection::{Adapter, Projection};
use super::save::{SaveTensor, save_model};
use super::tokenizer::Tokenizer;
use super::weights::{StoredType, Weights};
use crate::Result;
use crate::autograd::{checkpoint, without_recording};
use crate::gpu::Gpu;
use crate::ops::{
    self, AttentionOptions, Lane, Lanes, Mask, attention, attention_cached, embedding, linear,
    norm_linear, norm_swiglu, rms_norm, rope, rope_into_cache, swiglu,
};
use crate::tensor::stored::encode;
use crate::tensor::{DType, Tensor};

/// A model on a device.
pub struct Llama {
    gpu: Gpu,
    config: LlamaConfig,
    /// Of texts of up to [`LlamaConfig::steady_length`] tokens: [H / 2].
    inv_freq: Tensor,
    /// What rotated queries and keys are multiplied by.
    rope_scale: f32,
    embed: Parameter,
    layers: Vec<Rc<Layer>>,
    norm: Parameter,
    /// `None` when tied to the embedding.
    head: Option<Parameter>,
    /// Parameters that an adapter brought values for: which rows, and whether a tied head goes with them.
    replaced: BTreeMap<String, (Option<Vec<u32>>, bool)>,
    /// Type of the keys and values of its caches.
    cache: DType,
}

struct Layer {
    input_norm: Parameter,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    post_norm: Parameter,
    gate: Projection,
    up: Projection,
    down: Projection,
    /// q, k and v, which decoding multiplies by at once: one tensor where they share memory, else their shards.
    qkv: Vec<Tensor>,
    /// Gate and up as one tensor, where they share memory.
    gate_up: Option<Tensor>,
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
        let model = Self::build(gpu, config, Stored { weights, precision })?;
        gpu.sync()?;
        Ok(model)
    }

    /// Fresh f32 weights: normal with deviation 0.02, those that write to the residual stream divided by
    /// √(2 L), norms one.
    pub fn random(gpu: &Gpu, config: &LlamaConfig, seed: u64) -> Result<Llama> {
        let residual = 0.02 / (2.0 * config.num_hidden_layers as f32).sqrt();
        let model = Self::build(gpu, config, Fresh::new(seed, residual))?;
        gpu.sync()?;
        Ok(model)
    }

    fn build(gpu: &Gpu, config: &LlamaConfig, mut source: impl Source) -> Result<Llama> {
        let shapes: HashMap<_, _> = config.parameters().into_iter().collect();
        let get = |source: &mut _, name: &str| parameter(gpu, source, name, &shapes[name]);
        let embed = get(&mut source, "model.embed_tokens.weight")?;
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            let part = |source: &mut _, part: &str| get(source, &name(part));
            let input_norm = part(&mut source, "input_layernorm")?;
            let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(name);
            let ([q, k, v], qkv) = joined(gpu, &mut source, names, &shapes)?;
            let apart = || [&q, &k, &v].map(|p| p.shards.clone()).concat();
            let qkv = qkv.map_or_else(apart, |whole| vec![whole]);
            let o = part(&mut source, "self_attn.o_proj")?;
            let post_norm = part(&mut source, "post_attention_layernorm")?;
            let names = ["mlp.gate_proj", "mlp.up_proj"].map(name);
            let ([gate, up], gate_up) = joined(gpu, &mut source, names, &shapes)?;
            let down = part(&mut source, "mlp.down_proj")?;
            let mut projection = |weight: Parameter| {
                let bias = weight.name.replace(".weight", ".bias");
                let bias = shapes.contains_key(&bias).then(|| get(&mut source, &bias));
                Ok::<_, crate::Error>(Projection::with_bias(weight, bias.transpose()?))
            };
            layers.push(Rc::new(Layer {
                input_norm,
                q: projection(q)?,
                k: projection(k)?,
                v: projection(v)?,
                o: projection(o)?,
                post_norm,
                gate: projection(gate)?,
                up: projection(up)?,
                down: projection(down)?,
                qkv,
                gate_up,
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                eps: config.rms_norm_eps,
            }));
        }
        let norm = get(&mut source, "model.norm.weight")?;
        let head = match config.tie_word_embeddings {
            true => None,
            false => Some(get(&mut source, "lm_head.weight")?),
        };
        let inv_freq = Tensor::from_f32(gpu, &config.inv_freq(), [config.head_dim / 2]);
        let rope_scale = config.rope_attention_factor();
        let (gpu, config) = (gpu.clone(), config.clone());
        let cache = DType::F32;
        let replaced = BTreeMap::new();
        Ok(Llama { gpu, config, inv_freq, rope_scale, embed, layers, norm, head, replaced, cache })
    }

    /// This model with every weight a trainable leaf, or with the adapter's alone if it has one. Weights that are
    /// trained must be f32.
    pub fn trainable(mut self) -> Llama {
        let adapted = self.has_adapter();
        for layer in &mut self.layers {
            let layer = Rc::get_mut(layer).expect("no forward pass is open");
            for projection in layer.projections_mut() {
                projection.adapter.as_mut().map(Adapter::train);
            }
            if !adapted {
                layer.parameters_mut().for_each(leaf);
            }
        }
        if !adapted {
            leaf(&mut self.embed);
            leaf(&mut self.norm);
            self.head.as_mut().map(leaf);
        }
        self
    }

    /// This model with an adapter over its weights, which may be of any type. Parameters that the adapter brings values
    /// of its own for take these, in the type that they have; a tied head that is no longer the embedding gets memory of
    /// its own.
    pub fn adapted(mut self, lora: &Lora) -> Result<Llama> {
        lora.check(&self.config)?;
        if lora.unties(&self.config) {
            self.config.tie_word_embeddings = false;
            self.head = Some(self.embed.copy(HEAD)?);
        }
        for parameter in self.parameters() {
            if let Some(replaced) = lora.replaced.get(&parameter.name) {
                parameter.replace(replaced.rows.as_deref(), &replaced.values)?;
            }
        }
        for (name, Replaced { rows, tied, .. }) in &lora.replaced {
            self.replaced.insert(name.clone(), (rows.clone(), *tied));
        }
        for layer in &mut self.layers {
            let layer = Rc::get_mut(layer).expect("no forward pass is open");
            for projection in layer.projections_mut() {
                let name = projection.weight.name.trim_end_matches(".weight").to_owned();
                if let Some(low) = lora.modules.get(&name) {
                    let low = lora.over_whole_weight(&name, low, || projection.weight.values())?;
                    projection.adapt(&self.gpu, &low, lora)?;
                }
            }
        }
        lora.decoding.apply(&mut self.config);
        self.gpu.sync()?;
        Ok(self)
    }

    /// Its adapter as it stands, on the host; `None` if it has none.
    pub fn adapter(&self) -> Result<Option<Lora>> {
        let mut lora: Option<Lora> = None;
        let decoding = Decoding::of(&self.config);
        for projection in self.layers.iter().flat_map(|layer| layer.projections()) {
            let Some(adapter) = &projection.adapter else { continue };
            let name = projection.weight.name.trim_end_matches(".weight").to_owned();
            let lora = lora.get_or_insert_with(|| adapter.empty());
            lora.modules.insert(name, adapter.read()?);
        }
        for parameter in self.parameters() {
            let Some((rows, tied)) = self.replaced.get(&parameter.name) else { continue };
            let lora = lora.get_or_insert_with(|| Lora::empty(false, false));
            let values = parameter.values_of(rows.as_deref())?;
            let n = rows.as_ref().map_or(parameter.shape[0], Vec::len);
            let shape = [&[n], &parameter.shape[1..]].concat();
            let replaced = Replaced { shape, values, rows: rows.clone(), tied: *tied };
            lora.replaced.insert(parameter.name.clone(), replaced);
        }
        Ok(lora.map(|lora| Lora { decoding, ..lora }))
    }

    /// Gives its adapter the values of another of the same kind.
    pub fn overwrite_adapter(&self, lora: &Lora) -> Result<()> {
        lora.check(&self.config)?;
        for projection in self.layers.iter().flat_map(|layer| layer.projections()) {
            let name = projection.weight.name.trim_end_matches(".weight");
            if let Some((adapter, low)) = projection.adapter.as_ref().zip(lora.modules.get(name)) {
                adapter.overwrite(low)?;
            }
        }
        Ok(())
    }

    /// Whether an adapter lies over its weights.
    pub fn has_adapter(&self) -> bool {
        self.layers.iter().flat_map(|layer| layer.projections()).any(|p| p.adapter.is_some())
    }

    /// This model with keys and values cached in another type than f32: f16 takes half the memory, and rounds each of
    /// them to 11 bits.
    ///
    /// # Panics
    /// If it is neither f32 nor f16.
    pub fn cached_in(self, dtype: DType) -> Llama {
        assert!(matches!(dtype, DType::F32 | DType::F16), "a cache in {dtype:?}");
        Llama { cache: dtype, ..self }
    }

    /// Room for the keys and values of so many tokens: 2 · layers · G · H elements each.
    pub fn cache(&self, tokens: usize) -> KvCache {
        KvCache::new(&self.gpu, &self.config, tokens, self.cache)
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

    /// What an optimiser moves: the adapter's tensors if it has one, else [`Llama::parameters`].
    pub fn trained(&self) -> Vec<&Parameter> {
        if !self.has_adapter() {
            return self.parameters();
        }
        let all = self.layers.iter().flat_map(|layer| layer.projections());
        all.filter_map(|p| p.adapter.as_ref()).flat_map(Adapter::parameters).collect()
    }

    /// What decoding multiplies by instead of by q, k, v, gate and up alone.
    pub fn joined(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|layer| layer.qkv.iter().chain(&layer.gate_up))
    }

    /// Row shards of the output head: [V_i, D].
    pub fn head(&self) -> &[Tensor] {
        &self.head.as_ref().unwrap_or(&self.embed).shards
    }

    /// Final-normed hidden states f32 [B, T, D]. With `recompute`, each layer keeps only its input for the
    /// backward pass.
    pub fn hidden(&self, inputs: &Inputs, recompute: bool) -> Tensor {
        self.hidden_of(inputs, None, recompute)
    }

    /// [`Llama::hidden`] of some rows of the [B T], u32 [R], distinct: [R, D]. What only the others need is not
    /// computed: in the last layer, all but their keys and values.
    pub fn hidden_at(&self, inputs: &Inputs, rows: &Tensor, recompute: bool) -> Tensor {
        self.hidden_of(inputs, Some(rows), recompute)
    }

    fn hidden_of(&self, inputs: &Inputs, rows: Option<&Tensor>, recompute: bool) -> Tensor {
        let copies = if matches!(inputs.attention.mask, Mask::TwoCopy(_)) { 2 } else { 1 };
        let shared = self.frequencies(inputs.tokens.shape().last() / copies);
        let scale = self.rope_scale;
        let mut x = embedding(&inputs.tokens, &self.embed.shards);
        for (i, layer) in self.layers.iter().enumerate() {
            let (layer, inv_freq) = (layer.clone(), shared.clone());
            let (positions, options) = (inputs.positions.clone(), inputs.attention.clone());
            let rows = rows.filter(|_| i + 1 == self.layers.len()).cloned();
            let forward = move |x: &Tensor| {
                layer.forward(x, &positions, (&inv_freq, scale), &options, rows.as_ref())
            };
            x = if recompute { checkpoint(&x, forward) } else { forward(&x) };
        }
        rms_norm(&x, &self.norm.shards[0], self.config.rms_norm_eps)
    }

    /// Runs `tokens` as positions `start`.. of one sequence that lies in the cache from slot 0 on, under `mask`: see
    /// [`Llama::pass`].
    ///
    /// # Panics
    /// If the cache has no room, or `mask` is the two-copy one.
    pub fn step(&self, tokens: &[u32], start: usize, mask: Mask, cache: &mut KvCache) -> Tensor {
        let block = mask.block().expect("the two-copy mask is for training");
        let rows = tokens.len();
        let lane = Lane { rows, position: start, block, ..Lane::default() };
        let tokens = Tensor::from_u32(&self.gpu, tokens, [rows]);
        self.pass(&tokens, &Lanes::new(&self.gpu, &[lane]), cache)
    }

    /// Runs tokens, u32 [R], by which sequences go on: writes their keys and values into the cache, and attends to what
    /// the lanes say. Returns final-normed hidden states f32 [R, D].
    ///
    /// # Panics
    /// If the lanes have other rows, or reach past the cache.
    pub fn pass(&self, tokens: &Tensor, lanes: &Lanes, cache: &mut KvCache) -> Tensor {
        assert!(lanes.slots() <= cache.capacity(), "{lanes:?} reach past the cache");
        let inv_freq = self.frequencies_of(lanes);
        let rotary = (&inv_freq, self.rope_scale);
        without_recording(|| {
            let mut x = embedding(tokens, &self.embed.shards);
            for (i, layer) in self.layers.iter().enumerate() {
                x = layer.decode(&x, lanes, rotary, cache.layer(i));
            }
            rms_norm(&x, &self.norm.shards[0], self.config.rms_norm_eps)
        })
    }

    /// Rotary frequencies in a text of `length` tokens: [H / 2].
    fn frequencies(&self, length: usize) -> Tensor {
        if length <= self.config.steady_length() {
            return self.inv_freq.clone();
        }
        Tensor::from_f32(&self.gpu, &self.config.inv_freq_in(length), [self.config.head_dim / 2])
    }

    /// Rotary frequencies of a pass: [H / 2], or of each row, [R, H / 2], where its texts have different ones. As in
    /// transformers, keys that lie in the cache stay as they were rotated when the text was shorter.
    fn frequencies_of(&self, lanes: &Lanes) -> Tensor {
        let steady = self.config.steady_length();
        let lengths = || lanes.lengths().iter().map(|&(rows, length)| (rows, length.max(steady)));
        let (_, first) = lengths().next().unwrap_or_default();
        if lengths().all(|(_, length)| length == first) {
            return self.frequencies(first);
        }
        let rows = |(rows, length)| std::iter::repeat_n(self.config.inv_freq_in(length), rows);
        let all: Vec<f32> = lengths().flat_map(rows).flatten().collect();
        let half = self.config.head_dim / 2;
        Tensor::from_f32(&self.gpu, &all, [all.len() / half, half])
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
    fn projections(&self) -> [&Projection; 7] {
        let Layer { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down]
    }

    fn projections_mut(&mut self) -> [&mut Projection; 7] {
        let Layer { q, k, v, o, gate, up, down, .. } = self;
        [q, k, v, o, gate, up, down]
    }

    fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let [q, k, v, o, gate, up, down] = self.projections().map(|p| &p.weight);
        let biases = self.projections().into_iter().filter_map(|p| p.bias.as_ref());
        [&self.input_norm, q, k, v, o, &self.post_norm, gate, up, down].into_iter().chain(biases)
    }

    fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let Layer { input_norm, q, k, v, o, post_norm, gate, up, down, .. } = self;
        let mut biases = Vec::new();
        let weights = [q, k, v, o, gate, up, down].map(|p| {
            biases.extend(&mut p.bias);
            &mut p.weight
        });
        let [q, k, v, o, gate, up, down] = weights;
        [input_norm, q, k, v, o, post_norm, gate, up, down].into_iter().chain(biases)
    }

    /// One block: x [B, T, D] → [B, T, D], or those of its rows that are wanted, [R, D].
    fn forward(
        &self,
        x: &Tensor,
        positions: &Tensor,
        rotary: (&Tensor, f32),
        options: &AttentionOptions,
        rows: Option<&Tensor>,
    ) -> Tensor {
        let [b, t] = [x.shape()[0], x.shape()[1]];
        let h = rms_norm(x, &self.input_norm.shards[0], self.eps);
        let heads = |w: &Projection, n| w.forward(&h).reshape([b, t, n, self.head_dim]);
        let q = rope(&heads(&self.q, self.heads), positions, rotary);
        let k = rope(&heads(&self.k, self.kv_heads), positions, rotary);
        let v = heads(&self.v, self.kv_heads);
        let a = attention(&q, &k, &v, options).reshape([b, t, self.heads * self.head_dim]);
        let x = match rows {
            None => self.o.onto(x, &a),
            Some(rows) => self.o.onto(&ops::gather(x, rows), &ops::gather(&a, rows)),
        };
        let h = rms_norm(&x, &self.post_norm.shards[0], self.eps);
        let f = swiglu(&self.gate.forward(&h), &self.up.forward(&h));
        self.down.onto(&x, &f)
    }

    /// The same block in fewer dispatches, without gradients, on sequences and their cache: x [R, D] → [R, D].
    fn decode(
        &self,
        x: &Tensor,
        lanes: &Lanes,
        rotary: (&Tensor, f32),
        (keys, values): (&Tensor, &Tensor),
    ) -> Tensor {
        let t = x.shape()[0];
        let norm = (&self.input_norm.shards[0], self.eps);
        let qkv = match [&self.q, &self.k, &self.v] {
            plain if plain.iter().all(|p| p.is_plain()) => norm_linear(x, norm, &self.qkv),
            parts => {
                let h = rms_norm(x, norm.0, norm.1);
                ops::beside(&parts.map(|p| p.forward(&h)))
            }
        };
        let q = rope_into_cache(&qkv, lanes.places(), rotary, keys, values);
        let a = attention_cached(&q, keys, values, lanes).reshape([t, self.heads * self.head_dim]);
        let x = self.o.onto(x, &a);
        let norm = (&self.post_norm.shards[0], self.eps);
        let f = match [&self.gate, &self.up] {
            plain @ [gate, up] if plain.iter().all(|p| p.is_plain()) => {
                let (gate, up) = (&gate.weight.shards, &up.weight.shards);
                norm_swiglu(&x, norm, gate, up, self.gate_up.as_ref())
            }
            [gate, up] => {
                let h = rms_norm(&x, norm.0, norm.1);
                swiglu(&gate.forward(&h), &up.forward(&h))
            }
        };
        self.down.onto(&x, &f)
    }
}

fn leaf(parameter: &mut Parameter) {
    parameter.shards.iter_mut().for_each(|shard| *shard = shard.trainable());
}

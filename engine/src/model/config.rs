//! The shape of a Llama model: Hugging Face `config.json` in and out, checked before anything is
//! sized by it. Not here: weights (`weights.rs`), GGUF metadata (`gguf/llama.rs`), rotary
//! frequencies (`config/rope.rs`).

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

mod fields;
pub(crate) mod generation;
mod rope;

use super::weights::source::read_capped;
use crate::ops::MOST_HEAD_DIM;
use crate::{Error, Result};
use fields::{Fields, brief, shortest};
use rope::Rope;
pub use rope::{LongRope, RopeScaling, Yarn};

/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Values of `model_type` with the architectures whose network is the one of `llama.rs`: plain Llama, to which the
/// diffusion ones add sampling code only, and Qwen2, which is Llama that always has biases on q, k and v.
const LLAMA: (&str, &[&str]) =
    ("llama", &["LlamaForCausalLM", "StableDiffcoderForCausalLM", "SeedDiffcoderForCausalLM"]);
/// Of these, the ones that say by their architecture alone that they are trained by diffusion, with this mask token and
/// this block length: those of the published sampler.
const DIFFCODERS: [&str; 2] = ["StableDiffcoderForCausalLM", "SeedDiffcoderForCausalLM"];
const DIFFCODER_MASK: u32 = 5;
const DIFFCODER_BLOCK: usize = 4;
const QWEN2: (&str, &[&str]) = ("qwen2", &["Qwen2ForCausalLM"]);

/// Everything that fixes the network. Sizes are counts of elements; names are those of HF
/// `config.json`.
///
/// Bounds that [`LlamaConfig::validate`] enforces: vocabulary ≤ 2^24, hidden ≤ 2^17, intermediate ≤
/// 2^19, layers ≤ 1024, heads ≤ 4096, head_dim a multiple of 4 and ≤ 192, positions ≤ 2^30. Inside them no
/// product of sizes overflows `u64`.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Rows of the embedding, V. May exceed the tokenizer's ids (padding).
    pub vocab_size: usize,
    /// Width of the residual stream, D.
    pub hidden_size: usize,
    /// Width of the SwiGLU feed-forward layer, F.
    pub intermediate_size: usize,
    /// Transformer blocks, L.
    pub num_hidden_layers: usize,
    /// Query heads, N.
    pub num_attention_heads: usize,
    /// Key/value heads, G; divides N. Absent in `config.json` means N.
    pub num_key_value_heads: usize,
    /// Elements of one head, H. Absent in `config.json` means D / N.
    pub head_dim: usize,
    /// Added to the mean square inside RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies were stretched for long contexts, if they were.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of attention has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether the embedding doubles as LM head (then there is no `lm_head.weight`).
    pub tie_word_embeddings: bool,
    /// Context length in tokens the model was trained for.
    pub max_position_embeddings: usize,
    /// Token that begins a text. Absent from the `config.json` of a Llama means 1, as in transformers; `null` means none.
    pub bos_token_id: Option<u32>,
    /// Tokens that end an answer, the one that ends a text first: those of `generation_config.json` where that file is,
    /// else those of `config.json`. Absent or `null` means none, as for transformers' `generate`.
    pub eos_token_ids: Vec<u32>,
    /// Token that stands for a masked position. Not an HF Llama key; other loaders ignore it.
    pub mask_token_id: Option<u32>,
    /// Token that fills batches. Negative values, which some files carry, mean none.
    pub pad_token_id: Option<u32>,
    /// What else `generation_config.json` says. Nothing here reads it; it goes where the model goes.
    pub generation: Map<String, Value>,
    /// Diffusion block length in tokens the model was trained with. Ours; other loaders ignore it.
    pub block_length: Option<usize>,
    /// What the tokens see under diffusion. Absent in `config.json` means the block-causal mask. Ours, as above.
    pub diffusion_attention: DiffusionAttention,
}

/// Which tokens a token sees in a model that was trained by diffusion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiffusionAttention {
    /// Its own block and the blocks before it.
    #[default]
    Block,
    /// Itself and the tokens before it.
    Causal,
    /// The whole sequence.
    Full,
}

impl LlamaConfig {
    /// Whether it says of itself that it was trained by diffusion.
    pub fn is_diffusion(&self) -> bool {
        let says =
            self.block_length.is_some() || self.diffusion_attention != DiffusionAttention::Block;
        self.mask_token_id.is_some() && says
    }

    /// Reads and checks `dir/config.json`, and `dir/generation_config.json` if it is there (at most 1 MiB each).
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = read_capped(&path, MAX_CONFIG_BYTES)?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| {
            Error::model(
                &path,
                format!("not valid JSON ({e}); expected a Hugging Face config.json"),
            )
        })?;
        let mut config = Self::from_json(&value, &path)?;
        generation::read(dir, &mut config)?;
        Ok(config)
    }

    /// Takes the parsed `config.json`; `path` only names the file in errors. The result is
    /// validated.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let Some(map) = value.as_object() else {
            return Err(Error::model(
                path,
                "the top level is not an object; expected a Hugging Face config.json",
            ));
        };
        let fields = Fields { map, path };
        let network = network(&fields)?;
        // transformers' Qwen2 does not look at these fields.
        let flag = |name: &str| Ok(network == LLAMA && fields.bool(name)?.unwrap_or(false));
        let (o_bias, mlp_bias) = (flag("attention_bias")?, flag("mlp_bias")?);
        let diffcoder = names(&fields).any(|name| DIFFCODERS.iter().any(|known| name == known));
        let hidden_size = fields.need_usize("hidden_size")?;
        let num_attention_heads = fields.need_usize("num_attention_heads")?;
        let head_dim = match fields.usize("head_dim")? {
            Some(head_dim) => head_dim,
            None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                return Err(fields.error(format!(
                    "num_attention_heads {num_attention_heads} does not divide hidden_size \
                     {hidden_size}; give head_dim"
                )));
            }
        };
        let (rope_theta, rope_scaling) = rope_fields(&fields)?;
        let config = Self {
            vocab_size: fields.need_usize("vocab_size")?,
            hidden_size,
            intermediate_size: fields.need_usize("intermediate_size")?,
            num_hidden_layers: fields.need_usize("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: fields
                .usize("num_key_value_heads")?
                .unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: fields.f32("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            qkv_bias: network == QWEN2 || o_bias,
            o_bias,
            mlp_bias,
            tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings: fields.usize("max_position_embeddings")?.unwrap_or(2048),
            bos_token_id: {
                let default: &[u32] = if network == QWEN2 { &[] } else { &[1] };
                fields.ids("bos_token_id", default)?.first().copied()
            },
            eos_token_ids: fields.ids("eos_token_id", &[])?,
            mask_token_id: {
                let named = fields.ids("mask_token_id", &[])?.first().copied();
                named.or(diffcoder.then_some(DIFFCODER_MASK))
            },
            pad_token_id: fields.ids("pad_token_id", &[])?.first().copied(),
            generation: Map::new(),
            block_length: fields.usize("block_length")?.or(diffcoder.then_some(DIFFCODER_BLOCK)),
            diffusion_attention: fields.word("diffusion_attention")?.unwrap_or_default(),
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Whether only q, k and v have biases: what Hugging Face and llama.cpp call a Qwen2.
    pub fn is_qwen2(&self) -> bool {
        self.qkv_bias && !self.o_bias && !self.mlp_bias
    }

    /// The `config.json` that transformers, and [`LlamaConfig::from_json`], read back to the same
    /// values. `torch_dtype` is the type of the weights beside it: `float32`, `float16` or
    /// `bfloat16`.
    pub fn to_json(&self, torch_dtype: &str) -> Value {
        let (model_type, architectures) = if self.is_qwen2() { QWEN2 } else { LLAMA };
        let mut value = json!({
            "architectures": [architectures[0]],
            "attention_bias": self.o_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": ids_json(&self.eos_token_ids),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "pretraining_tp": 1,
            "rms_norm_eps": shortest(self.rms_norm_eps),
            "rope_scaling": self.rope_scaling.as_ref().map(RopeScaling::to_json),
            "rope_theta": shortest(self.rope_theta),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": torch_dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        if let Some(id) = self.mask_token_id {
            value["mask_token_id"] = json!(id);
        }
        if let Some(length) = self.block_length {
            value["block_length"] = json!(length);
        }
        if self.diffusion_attention != DiffusionAttention::Block {
            value["diffusion_attention"] = json!(self.diffusion_attention);
        }
        value
    }

    /// Checks every field against the bounds above; `path` only names the file in errors.
    pub fn validate(&self, path: &Path) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, 1 << 24),
            ("hidden_size", self.hidden_size, 1 << 17),
            ("intermediate_size", self.intermediate_size, 1 << 19),
            ("num_hidden_layers", self.num_hidden_layers, 1 << 10),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 12),
            ("head_dim", self.head_dim, MOST_HEAD_DIM),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 30),
            ("block_length", self.block_length.unwrap_or(1), 1 << 20),
        ];
        for (name, size, most) in sizes {
            if size == 0 || size > most {
                return Err(Error::model(
                    path,
                    format!("{name} is {size}; supported are 1 to {most}"),
                ));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return Err(Error::model(
                path,
                format!(
                    "num_key_value_heads {} does not divide num_attention_heads {}",
                    self.num_key_value_heads, self.num_attention_heads
                ),
            ));
        }
        if !self.head_dim.is_multiple_of(4) {
            let reason = format!(
                "head_dim {} is no multiple of 4, which the attention kernels need",
                self.head_dim
            );
            return Err(Error::model(path, reason));
        }
        if self.o_bias != self.qkv_bias && !self.is_qwen2() {
            let reason = "its biases are those of no Llama (q, k, v and o, or none of them) and of no Qwen2 (q, k and \
                          v alone)";
            return Err(Error::model(path, reason));
        }
        self.validate_numbers(path)?;
        self.validate_ids(path)
    }

    fn validate_numbers(&self, path: &Path) -> Result<()> {
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            let reason =
                format!("rms_norm_eps is {}; it must lie between 0 and 1", self.rms_norm_eps);
            return Err(Error::model(path, reason));
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta <= 1e15) {
            let reason =
                format!("rope_theta is {}; it must be finite, from 1 to 1e15", self.rope_theta);
            return Err(Error::model(path, reason));
        }
        match &self.rope_scaling {
            Some(RopeScaling::Yarn(_)) if self.rope_theta == 1.0 => {
                Err(Error::model(path, "rope_theta is 1; yarn needs one above 1"))
            }
            Some(scaling) => scaling.validate(self.head_dim, path),
            None => Ok(()),
        }
    }

    fn validate_ids(&self, path: &Path) -> Result<()> {
        let named = [
            ("bos_token_id", self.bos_token_id),
            ("mask_token_id", self.mask_token_id),
            ("pad_token_id", self.pad_token_id),
        ];
        let ends = self.eos_token_ids.iter().map(|&id| ("eos_token_id", Some(id)));
        for (name, id) in named.into_iter().chain(ends) {
            if let Some(id) = id.filter(|&id| id as usize >= self.vocab_size) {
                let reason = format!(
                    "{name} {id} is not below vocab_size {}; give an id inside the vocabulary, or \
                     null",
                    self.vocab_size
                );
                return Err(Error::model(path, reason));
            }
        }
        Ok(())
    }

    /// Rotary frequencies in radians per position, `[head_dim / 2]`, scaling included, in a text of up to
    /// [`LlamaConfig::steady_length`] tokens, by the formulas of transformers' `modeling_rope_utils`.
    pub fn inv_freq(&self) -> Vec<f32> {
        self.inv_freq_in(0)
    }

    /// The same in a text of `length` tokens.
    pub fn inv_freq_in(&self, length: usize) -> Vec<f32> {
        self.rope().frequencies(length)
    }

    /// What the sines and cosines of rotary angles are multiplied by.
    pub fn rope_attention_factor(&self) -> f32 {
        self.rope().attention_factor()
    }

    /// The longest text, in tokens, that has the rotary frequencies of short ones; in longer ones they depend on the
    /// length. `usize::MAX` but for the scalings `dynamic` and `longrope`.
    pub fn steady_length(&self) -> usize {
        self.rope().steady_length()
    }

    /// The longest text, in tokens, that the model reads. It is `max_position_embeddings`, but where that is the
    /// context before it was stretched: the scalings `linear` and `yarn` reach as much further as they say, and
    /// `dynamic` has no end.
    pub fn context_length(&self) -> usize {
        const MOST: usize = 1 << 30;
        let most = self.max_position_embeddings;
        let stretched = |n: usize, factor: f32| ((n as f64 * f64::from(factor)) as usize).min(MOST);
        match &self.rope_scaling {
            Some(RopeScaling::Linear { factor }) => stretched(most, *factor),
            Some(RopeScaling::Yarn(yarn)) => {
                most.max(stretched(yarn.original_max_position_embeddings, yarn.factor))
            }
            Some(RopeScaling::Dynamic { .. }) => MOST,
            _ => most,
        }
    }

    fn rope(&self) -> Rope<'_> {
        Rope {
            head_dim: self.head_dim,
            theta: self.rope_theta,
            max_position_embeddings: self.max_position_embeddings,
            scaling: self.rope_scaling.as_ref(),
        }
    }

    /// Every parameter's HF name and shape, in the order of the network: embedding, layers, norm,
    /// head. Linear weights are `[out, in]`.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (q, kv) =
            (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        let layer = [
            ("input_layernorm", vec![d], false),
            ("self_attn.q_proj", vec![q, d], self.qkv_bias),
            ("self_attn.k_proj", vec![kv, d], self.qkv_bias),
            ("self_attn.v_proj", vec![kv, d], self.qkv_bias),
            ("self_attn.o_proj", vec![d, q], self.o_bias),
            ("post_attention_layernorm", vec![d], false),
            ("mlp.gate_proj", vec![f, d], self.mlp_bias),
            ("mlp.up_proj", vec![f, d], self.mlp_bias),
            ("mlp.down_proj", vec![d, f], self.mlp_bias),
        ];
        let mut parameters =
            vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, d])];
        for n in 0..self.num_hidden_layers {
            for (name, shape, _) in &layer {
                parameters.push((format!("model.layers.{n}.{name}.weight"), shape.clone()));
            }
            for (name, shape, _) in layer.iter().filter(|(.., biased)| *biased) {
                parameters.push((format!("model.layers.{n}.{name}.bias"), vec![shape[0]]));
            }
        }
        parameters.push(("model.norm.weight".to_owned(), vec![d]));
        if !self.tie_word_embeddings {
            parameters.push(("lm_head.weight".to_owned(), vec![self.vocab_size, d]));
        }
        parameters
    }

    /// Number of elements in all parameters.
    pub fn num_parameters(&self) -> u64 {
        let elements = |shape: &[usize]| shape.iter().map(|&n| n as u64).product::<u64>();
        self.parameters().iter().map(|(_, shape)| elements(shape)).sum()
    }
}

/// Token ids as the files of a folder have them.
fn ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// The architectures that it names.
fn names<'a>(fields: &Fields<'a>) -> impl Iterator<Item = &'a Value> {
    fields.map.get("architectures").and_then(Value::as_array).into_iter().flatten()
}

/// Which network it is. Refuses whatever would load but compute something else.
fn network(fields: &Fields) -> Result<(&'static str, &'static [&'static str])> {
    let network = match fields.map.get("model_type").and_then(Value::as_str) {
        Some("llama") => LLAMA,
        Some("qwen2") => QWEN2,
        Some(other) => {
            return Err(fields.error(format!(
                "model_type `{other}` is not supported; expected `llama` or `qwen2`"
            )));
        }
        None => return Err(fields.error("model_type is missing; expected `llama` or `qwen2`")),
    };
    for architecture in names(fields) {
        if !network.1.iter().any(|known| architecture == known) {
            let known = network.1.join(", ");
            return Err(fields.error(format!(
                "architecture {architecture} is not supported; expected one of {known}"
            )));
        }
    }
    if fields.bool("use_sliding_window")? == Some(true) {
        return Err(fields.error("use_sliding_window is true; only whole attention is supported"));
    }
    if let Some(act) = fields.map.get("hidden_act").filter(|act| *act != "silu") {
        return Err(fields.error(format!("hidden_act {act} is not supported; expected \"silu\"")));
    }
    if fields.map.get("quantization_config").is_some_and(|q| !q.is_null()) {
        return Err(fields
            .error("quantization_config is set; give the unquantised weights, or a GGUF file"));
    }
    Ok(network)
}

/// The base and the scaling of rotary frequencies, with the precedence of transformers 5: `rope_scaling` over
/// `rope_parameters`, and in what is left its own `rope_theta` over the one beside it, which files keep from older
/// versions.
fn rope_fields(fields: &Fields) -> Result<(f32, Option<RopeScaling>)> {
    let Fields { map, path } = *fields;
    let mut inner = None;
    for name in ["rope_scaling", "rope_parameters"] {
        match map.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::Object(found)) if found.is_empty() => {}
            Some(Value::Object(found)) => {
                inner.get_or_insert(Fields { map: found, path });
            }
            Some(other) => {
                let found = brief(other);
                return Err(fields.error(format!("{name} is {found}; expected an object or null")));
            }
        }
    }
    for fields in [Some(fields), inner.as_ref()].into_iter().flatten() {
        if fields.f32("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
            return Err(fields
                .error("partial_rotary_factor is not 1; only fully rotated heads are supported"));
        }
    }
    let (theta, scaling) = match &inner {
        None => (None, None),
        Some(inner) => (inner.f32("rope_theta")?, RopeScaling::from_json(inner, fields)?),
    };
    let theta = theta.map_or_else(|| fields.f32("rope_theta"), |theta| Ok(Some(theta)))?;
    Ok((theta.unwrap_or(10_000.0), scaling))
}

#[cfg(test)]
pub(crate) mod tests;

//! What the GGUF of a Llama means: its configuration, and which HF parameter each tensor is.
//! Not here: the container (`gguf.rs`).

use super::Gguf;
use super::ends::Ends;
use crate::model::config::{DiffusionAttention, LlamaConfig, RopeScaling, Yarn};
use crate::model::weights::quant::dequantise;
use crate::{Error, Result};

/// Factors per frequency that llama.cpp derives from Llama 3's `rope_scaling`, `[head_dim / 2]`.
pub(crate) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Which HF row order a GGUF tensor needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RowOrder {
    /// As stored.
    Same,
    /// llama.cpp stores the rows of each q and k head interleaved (0, H/2, 1, H/2+1, …), because it
    /// rotates neighbours; HF rotates halves.
    Interleaved {
        /// Rows of one head, H.
        head_dim: usize,
    },
}

impl RowOrder {
    /// The stored row that holds HF row `row`.
    pub fn stored_row(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, j) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * j + half
            }
        }
    }

    /// The HF row that stored row `row` holds.
    pub fn hf_row(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                head * head_dim + within % 2 * (head_dim / 2) + within / 2
            }
        }
    }
}

/// GGUF's and HF's names of what is there once, and of a layer's parts.
const WHOLE: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];
const PARTS: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// What a name ends in behind the part it is of.
const KINDS: [&str; 2] = [".weight", ".bias"];

/// HF name of a GGUF tensor; `None` for a name no Llama has.
pub(crate) fn hf_name(name: &str) -> Option<String> {
    let kind = KINDS.into_iter().find(|kind| name.ends_with(kind))?;
    let stem = name.strip_suffix(kind)?;
    Some(match stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => {
            let (_, part) = PARTS.iter().find(|(gguf, _)| *gguf == part)?;
            format!("model.layers.{layer}.{part}{kind}")
        }
        None => format!("{}{kind}", WHOLE.iter().find(|(gguf, _)| *gguf == stem)?.1),
    })
}

/// GGUF name of an HF parameter; `None` for a name no Llama has.
pub(crate) fn gguf_name(name: &str) -> Option<String> {
    let kind = KINDS.into_iter().find(|kind| name.ends_with(kind))?;
    let stem = name.strip_suffix(kind)?;
    let Some((layer, part)) = stem.strip_prefix("model.layers.").and_then(|s| s.split_once('.'))
    else {
        return Some(format!("{}{kind}", WHOLE.iter().find(|(_, hf)| *hf == stem)?.0));
    };
    let (part, _) = PARTS.iter().find(|(_, hf)| *hf == part)?;
    Some(format!("blk.{layer}.{part}{kind}"))
}

/// How a file of this architecture orders the rows of an HF parameter. Of a Qwen2 llama.cpp rotates halves, as HF does.
pub(crate) fn row_order(name: &str, architecture: &str, config: &LlamaConfig) -> RowOrder {
    let rotated = ["q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"];
    match architecture == LLAMA && rotated.iter().any(|end| name.ends_with(end)) {
        true => RowOrder::Interleaved { head_dim: config.head_dim },
        false => RowOrder::Same,
    }
}

/// `general.architecture` of what is written, which all keys about the network begin with.
pub(crate) fn architecture(config: &LlamaConfig) -> &'static str {
    if config.is_qwen2() { QWEN2 } else { LLAMA }
}

const LLAMA: &str = "llama";
const QWEN2: &str = "qwen2";

/// The configuration that `llama.*` (or `qwen2.*`) and `tokenizer.ggml.*` describe, validated.
pub(crate) fn config(gguf: &Gguf) -> Result<LlamaConfig> {
    let path = gguf.path;
    let architecture = match gguf.text("general.architecture")? {
        Some(LLAMA) => LLAMA,
        Some(QWEN2) => QWEN2,
        other => {
            let found = other.unwrap_or("missing");
            return Err(Error::model(
                path,
                format!(
                    "general.architecture is {found:?}; only \"llama\" and \"qwen2\" are supported"
                ),
            ));
        }
    };
    let key = |name: &str| format!("{architecture}.{name}");
    if size(gguf, &key("expert_count"))?.is_some_and(|n| n > 0) {
        let experts = key("expert_count");
        return Err(Error::model(
            path,
            format!("{experts} is set; mixtures of experts are not supported"),
        ));
    }
    let shape =
        |name: &str| gguf.tensors().iter().find(|t| t.name == name).map(|t| t.shape.as_slice());
    let Some(&[vocab_size, _]) = shape("token_embd.weight") else {
        return Err(Error::model(
            path,
            "token_embd.weight is missing or not a matrix; is this a whole model?",
        ));
    };
    let hidden_size = need(gguf, &key("embedding_length"))?;
    let num_attention_heads = need(gguf, &key("attention.head_count"))?;
    let head_dim = match size(gguf, &key("attention.key_length"))? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(num_attention_heads).unwrap_or(0),
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        let key = key(name);
        if let Some(other) = size(gguf, &key)?.filter(|&other| other != head_dim) {
            return Err(Error::model(
                path,
                format!("{key} is {other}, not the head dimension {head_dim}"),
            ));
        }
    }
    let id = |key: &str| -> Result<Option<u32>> {
        match gguf.u64(key)?.map(u32::try_from) {
            // llama.cpp writes the largest u32 for "none".
            None | Some(Ok(u32::MAX)) => Ok(None),
            Some(Ok(id)) => Ok(Some(id)),
            Some(Err(_)) => Err(Error::model(path, format!("metadata {key} is not a token id"))),
        }
    };
    let ends = Ends::read(gguf)?;
    let mut config = LlamaConfig {
        vocab_size,
        hidden_size,
        intermediate_size: need(gguf, &key("feed_forward_length"))?,
        num_hidden_layers: need(gguf, &key("block_count"))?,
        num_attention_heads,
        num_key_value_heads: size(gguf, &key("attention.head_count_kv"))?
            .unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: gguf.f32(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5),
        rope_theta: gguf.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: key_scaling(gguf, &key)?,
        qkv_bias: shape("blk.0.attn_q.bias").is_some(),
        o_bias: shape("blk.0.attn_output.bias").is_some(),
        mlp_bias: shape("blk.0.ffn_down.bias").is_some(),
        tie_word_embeddings: shape("output.weight").is_none(),
        max_position_embeddings: need(gguf, &key("context_length"))?,
        bos_token_id: ends.bos,
        eos_token_ids: ends.ends,
        mask_token_id: id("tokenizer.ggml.mask_token_id")?,
        pad_token_id: id("tokenizer.ggml.padding_token_id")?,
        generation: serde_json::Map::new(),
        block_length: size(gguf, "demask.block_length")?,
        diffusion_attention: match gguf.text("demask.diffusion_attention")? {
            None => DiffusionAttention::default(),
            Some(word) => serde_json::from_value(word.into()).map_err(|e| {
                Error::model(path, format!("metadata demask.diffusion_attention: {e}"))
            })?,
        },
    };
    config.validate(path)?;
    if let Some(scaling) = llama3_scaling(gguf, &config)? {
        config.rope_scaling = Some(scaling);
    }
    Ok(config)
}

fn size(gguf: &Gguf, key: &str) -> Result<Option<usize>> {
    match gguf.u64(key)? {
        None => Ok(None),
        Some(n) => match usize::try_from(n) {
            Ok(n) => Ok(Some(n)),
            Err(_) => {
                Err(Error::model(gguf.path, format!("metadata {key} is {n}, which is absurd")))
            }
        },
    }
}

fn need(gguf: &Gguf, key: &str) -> Result<usize> {
    size(gguf, key)?.ok_or_else(|| {
        Error::model(gguf.path, format!("metadata {key} is missing; is this a whole model?"))
    })
}

/// `llama.rope.scaling.*`, and the older `llama.rope.scale_linear`.
fn key_scaling(gguf: &Gguf, key: &dyn Fn(&str) -> String) -> Result<Option<RopeScaling>> {
    let scaling = |rest: &str| key(&format!("rope.scaling.{rest}"));
    let factor = match gguf.text(&scaling("type"))? {
        Some("none") => None,
        None => gguf.f32(&key("rope.scale_linear"))?,
        Some("linear") => gguf.f32(&scaling("factor"))?,
        Some("yarn") => return yarn(gguf, key).map(Some),
        Some(other) => {
            let reason = format!(
                "{} {other:?} is not supported; expected \"none\", \"linear\" or \"yarn\"",
                scaling("type")
            );
            return Err(Error::model(gguf.path, reason));
        }
    };
    Ok(factor
        .filter(|&factor| factor != 1.0 && factor != 0.0)
        .map(|factor| RopeScaling::Linear { factor }))
}

/// YaRN with the numbers that llama.cpp and transformers both take where none are given; others change the two in
/// different ways.
fn yarn(gguf: &Gguf, key: &dyn Fn(&str) -> String) -> Result<RopeScaling> {
    let scaling = |rest: &str| key(&format!("rope.scaling.{rest}"));
    for (rest, usual) in [
        ("attn_factor", 1.0),
        ("yarn_ext_factor", 1.0),
        ("yarn_attn_factor", 1.0),
        ("yarn_beta_fast", 32.0),
        ("yarn_beta_slow", 1.0),
        ("yarn_log_multiplier", 0.0),
    ] {
        if let Some(other) = gguf.f32(&scaling(rest))?.filter(|&x| x != usual) {
            let reason = format!(
                "{} is {other}; only {usual} is supported: use the Hugging Face folder instead",
                scaling(rest)
            );
            return Err(Error::model(gguf.path, reason));
        }
    }
    let factor = scaling("factor");
    let original = match size(gguf, &scaling("original_context_length"))? {
        Some(length) => length,
        None => need(gguf, &key("context_length"))?,
    };
    Ok(RopeScaling::Yarn(Yarn {
        factor: gguf.f32(&factor)?.ok_or_else(|| {
            Error::model(gguf.path, format!("metadata {factor} is missing; yarn needs it"))
        })?,
        original_max_position_embeddings: original,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: None,
        mscale: None,
    }))
}

/// llama.cpp stores the divisors of Llama 3's frequencies, not the four numbers they came from. The
/// published models used few settings; the one that gives these divisors is the one, and none is an
/// error.
fn llama3_scaling(gguf: &Gguf, config: &LlamaConfig) -> Result<Option<RopeScaling>> {
    let Some(tensor) = gguf.tensors().iter().find(|t| t.name == ROPE_FREQS) else {
        return Ok(None);
    };
    let half = config.head_dim / 2;
    if tensor.shape != [half] {
        let reason = format!(
            "{ROPE_FREQS} has shape {:?}; expected [{half}], one factor a frequency",
            tensor.shape
        );
        return Err(Error::model(gguf.path, reason));
    }
    let mut stored = vec![];
    dequantise(tensor.dtype, gguf.data(tensor), &mut stored);
    if stored.iter().all(|&factor| factor == 1.0) {
        return Ok(None);
    }
    let plain = LlamaConfig { rope_scaling: None, ..config.clone() }.inv_freq();
    for factor in [8.0, 32.0, 4.0, 16.0, 64.0, 2.0] {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let scaled =
            LlamaConfig { rope_scaling: Some(scaling.clone()), ..config.clone() }.inv_freq();
        let close = |((p, s), f): ((&f32, &f32), &f32)| (p / s / f - 1.0).abs() < 1e-3;
        if config.rope_scaling.is_none() && plain.iter().zip(&scaled).zip(&stored).all(close) {
            return Ok(Some(scaling));
        }
    }
    let reason = format!(
        "{ROPE_FREQS} holds factors of no known Llama 3 scaling; use the Hugging Face folder \
         instead"
    );
    Err(Error::model(gguf.path, reason))
}

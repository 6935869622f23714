//! Writing a model as one GGUF file (version 3) that llama.cpp loads: what `llama.rs` and `from_gguf.rs` read. Not
//! here: how a type is rounded (`weights/quant.rs`).
//!
//! A thread for each processor rounds pieces of rows, in turn, while the calling one writes them in order; so reading,
//! rounding and writing go on at once, the file is the same for any number of threads, and a few pieces for each are
//! in memory.

use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread;

use super::llama::{ROPE_FREQS, RowOrder, architecture as architecture_of, gguf_name, row_order};
use crate::model::config::{LlamaConfig, RopeScaling, Yarn};
use crate::model::save::write_file;
use crate::model::weights::quant::quantise;
use crate::model::weights::{StoredType, Weights};
use crate::{Error, Result};

/// Where tensors begin: a multiple of this, GGUF's default.
const ALIGNMENT: u64 = 32;
/// Elements that are rounded at a time, about: as f32 they fit a processor's cache.
const PIECE: usize = 1 << 18;
/// Rounded pieces of each thread that may wait to be written.
const WAITING: usize = 4;

/// A metadata value to be written.
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
}

struct Entry {
    name: String,
    /// HF name; `None` for the rotary factors.
    hf: Option<String>,
    shape: Vec<usize>,
    dtype: StoredType,
}

impl Entry {
    fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|&n| n as u64).product();
        self.dtype.bytes(elements).expect("rows are whole blocks")
    }
}

/// Some rows of one tensor, as they are stored.
struct Piece<'a> {
    entry: &'a Entry,
    rows: Range<usize>,
}

/// Writes `path`, replacing it at once when it is complete. Matrices become `dtype`, vectors stay f32; `tokenizer` is
/// what `Tokenizer::to_gguf` says of it. `progress` hears the share done.
///
/// # Errors
/// If `dtype` is only read, rows are no whole blocks of it, or the file cannot be written.
pub(crate) fn write_gguf(
    path: &Path,
    config: &LlamaConfig,
    weights: &Weights,
    tokenizer: Vec<(String, Meta)>,
    dtype: StoredType,
    progress: &mut dyn FnMut(f64),
) -> Result<()> {
    if let Some(reason) = no_place(config) {
        return Err(Error::model(path, reason));
    }
    let Some(file_type) = dtype.file_type() else {
        let reason = format!("{dtype:?} is only read; choose another type");
        return Err(Error::model(path, reason));
    };
    let mut meta = architecture(config, file_type);
    meta.extend(tokenizer);
    let factors = rope_factors(config);
    let mut entries = Vec::new();
    for (hf, shape) in config.parameters() {
        let name = gguf_name(&hf).expect("each parameter has a name there");
        let dtype = if shape.len() == 2 { dtype } else { StoredType::F32 };
        let columns: usize = shape[1..].iter().product();
        if !columns.is_multiple_of(dtype.block_elements()) {
            return Err(Error::model(
                weights.path(),
                format!(
                    "{hf} has rows of {columns}, which are no whole blocks of {} for {dtype:?}; choose another type",
                    dtype.block_elements()
                ),
            ));
        }
        entries.push(Entry { name, hf: Some(hf), shape, dtype });
    }
    if let Some(factors) = &factors {
        let shape = vec![factors.len()];
        entries.push(Entry { name: ROPE_FREQS.into(), hf: None, shape, dtype: StoredType::F32 });
    }
    let header = header(&meta, &entries);
    let all: u64 = entries.iter().map(Entry::bytes).sum();
    let pieces: Vec<Piece> = entries.iter().flat_map(pieces).collect();
    let threads = thread::available_parallelism().map_or(1, |n| n.get()).min(pieces.len()).max(1);
    let factors = factors.as_deref().unwrap_or_default();
    write_file(path, |out, path| {
        let io = |e| Error::io(path, e);
        out.write_all(&header).map_err(io)?;
        thread::scope(|scope| {
            // Each thread has every so manieth piece, and its own queue: so the order needs no sorting, and a queue
            // that is full makes its thread wait. Queues that are dropped on an error end the threads.
            let mut queues = Vec::new();
            for first in 0..threads {
                let (sender, queue) = sync_channel(WAITING);
                let mine = pieces.iter().skip(first).step_by(threads);
                scope.spawn(move || {
                    let mut values = Vec::new();
                    for piece in mine {
                        let rounded = rounded(piece, config, weights, factors, &mut values);
                        if sender.send(rounded).is_err() {
                            break;
                        }
                    }
                });
                queues.push(queue);
            }
            let mut done = 0;
            for (piece, queue) in pieces.iter().zip(queues.iter().cycle()) {
                let bytes = queue.recv().map_err(|e| Error::io(path, e))??;
                out.write_all(&bytes).map_err(io)?;
                done += bytes.len() as u64;
                let Piece { entry, rows } = piece;
                if rows.end == entry.shape[0] {
                    out.write_all(&vec![0; padding(entry.bytes())]).map_err(io)?;
                    entry.hf.iter().for_each(|hf| weights.forget(hf));
                    progress(done as f64 / all.max(1) as f64);
                }
            }
            Ok(())
        })
    })
}

/// A tensor in pieces, in order.
fn pieces(entry: &Entry) -> impl Iterator<Item = Piece<'_>> {
    let (rows, columns) = (entry.shape[0], entry.shape[1..].iter().product::<usize>());
    let most = (PIECE / columns.max(1)).max(1);
    let firsts = (0..rows).step_by(most);
    firsts.map(move |first| Piece { entry, rows: first..(first + most).min(rows) })
}

/// The bytes of a piece, its rows in the order that llama.cpp has them; `values` is memory to be used again.
fn rounded(
    piece: &Piece,
    config: &LlamaConfig,
    weights: &Weights,
    factors: &[f32],
    values: &mut Vec<f32>,
) -> Result<Vec<u8>> {
    let Piece { entry, rows } = piece;
    let mut bytes = Vec::new();
    values.clear();
    match entry.hf.as_deref().map(|hf| (hf, row_order(hf, architecture_of(config), config))) {
        None => values.extend_from_slice(&factors[rows.clone()]),
        Some((hf, RowOrder::Same)) => {
            weights.append_rows(hf, rows.clone(), values)?;
            weights.forget_rows(hf, rows.clone());
        }
        Some((hf, interleaved)) => {
            for row in rows.clone().map(|stored| interleaved.hf_row(stored)) {
                weights.append_rows(hf, row..row + 1, values)?;
            }
        }
    }
    quantise(entry.dtype, values, &mut bytes);
    Ok(bytes)
}

fn padding(bytes: u64) -> usize {
    (bytes.next_multiple_of(ALIGNMENT) - bytes) as usize
}

fn architecture(config: &LlamaConfig, file_type: u32) -> Vec<(String, Meta)> {
    let number = |n: usize| Meta::U32(n as u32);
    let name = architecture_of(config);
    let key = |rest: &str| format!("{name}.{rest}");
    let mut meta = vec![
        ("general.architecture".to_owned(), Meta::Text(name.into())),
        ("general.file_type".to_owned(), Meta::U32(file_type)),
        ("general.quantization_version".to_owned(), Meta::U32(2)),
        (key("vocab_size"), number(config.vocab_size)),
        (key("context_length"), number(config.max_position_embeddings)),
        (key("embedding_length"), number(config.hidden_size)),
        (key("block_count"), number(config.num_hidden_layers)),
        (key("feed_forward_length"), number(config.intermediate_size)),
        (key("attention.head_count"), number(config.num_attention_heads)),
        (key("attention.head_count_kv"), number(config.num_key_value_heads)),
        (key("attention.key_length"), number(config.head_dim)),
        (key("attention.value_length"), number(config.head_dim)),
        (key("rope.dimension_count"), number(config.head_dim)),
        (key("attention.layer_norm_rms_epsilon"), Meta::F32(config.rms_norm_eps)),
        (key("rope.freq_base"), Meta::F32(config.rope_theta)),
    ];
    let (scaling, factor) = match &config.rope_scaling {
        Some(RopeScaling::Linear { factor }) => (Some("linear"), *factor),
        Some(RopeScaling::Yarn(yarn)) => {
            let original = number(yarn.original_max_position_embeddings);
            meta.push((key("rope.scaling.original_context_length"), original));
            (Some("yarn"), yarn.factor)
        }
        _ => (None, 1.0),
    };
    if let Some(scaling) = scaling {
        meta.push((key("rope.scaling.type"), Meta::Text(scaling.into())));
        meta.push((key("rope.scaling.factor"), Meta::F32(factor)));
    }
    // Ours; other readers skip what they do not know.
    if let Some(length) = config.block_length {
        meta.push(("demask.block_length".to_owned(), number(length)));
    }
    if config.is_diffusion() {
        let word = serde_json::json!(config.diffusion_attention);
        meta.push((
            "demask.diffusion_attention".to_owned(),
            Meta::Text(word.as_str().unwrap_or("").into()),
        ));
    }
    meta
}

/// What of a model no GGUF file can hold so that llama.cpp computes the same.
fn no_place(config: &LlamaConfig) -> Option<String> {
    let scaling = match &config.rope_scaling {
        Some(RopeScaling::Dynamic { .. }) => "dynamic",
        Some(RopeScaling::LongRope(_)) => "longrope",
        Some(RopeScaling::Yarn(yarn)) => {
            let usual = Yarn {
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: None,
                mscale: None,
                ..*yarn
            };
            if *yarn == usual {
                return None;
            }
            "yarn with numbers of its own (beta_fast, beta_slow, truncate, attention_factor, mscale)"
        }
        _ => return None,
    };
    Some(format!(
        "a GGUF file has no place for rope scaling {scaling}; write a Hugging Face folder"
    ))
}

/// What llama.cpp divides Llama 3's frequencies by.
fn rope_factors(config: &LlamaConfig) -> Option<Vec<f32>> {
    let Some(RopeScaling::Llama3 { .. }) = config.rope_scaling else { return None };
    let plain = LlamaConfig { rope_scaling: None, ..config.clone() }.inv_freq();
    Some(plain.iter().zip(config.inv_freq()).map(|(plain, scaled)| plain / scaled).collect())
}

fn header(meta: &[(String, Meta)], entries: &[Entry]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend((meta.len() as u64).to_le_bytes());
    for (key, value) in meta {
        text(&mut out, key);
        match value {
            Meta::U32(n) => kind(&mut out, 4, &n.to_le_bytes()),
            Meta::F32(x) => kind(&mut out, 6, &x.to_le_bytes()),
            Meta::Bool(flag) => kind(&mut out, 7, &[u8::from(*flag)]),
            Meta::Text(value) => {
                kind(&mut out, 8, &[]);
                text(&mut out, value);
            }
            Meta::Texts(values) => {
                array(&mut out, 8, values.len());
                values.iter().for_each(|value| text(&mut out, value));
            }
            Meta::I32s(values) => {
                array(&mut out, 5, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }
    let mut offset = 0u64;
    for entry in entries {
        text(&mut out, &entry.name);
        out.extend((entry.shape.len() as u32).to_le_bytes());
        // Innermost first.
        out.extend(entry.shape.iter().rev().flat_map(|&n| (n as u64).to_le_bytes()));
        out.extend(entry.dtype.ggml_number().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += entry.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len() + padding(out.len() as u64), 0);
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn kind(out: &mut Vec<u8>, kind: u32, bytes: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(bytes);
}

fn array(out: &mut Vec<u8>, of: u32, count: usize) {
    kind(out, 9, &of.to_le_bytes());
    out.extend((count as u64).to_le_bytes());
}

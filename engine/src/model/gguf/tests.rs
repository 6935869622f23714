//! Builds small GGUF files, and reads them back.

use std::path::Path;

use super::llama::{RowOrder, config};
use super::*;
use crate::model::config::RopeScaling;

/// Writes a GGUF file version 3 field by field.
#[derive(Default)]
pub(crate) struct Writer {
    pairs: (u64, Vec<u8>),
    infos: (u64, Vec<u8>),
    data: Vec<u8>,
    tensors: Vec<Entry>,
}

/// Name, shape, GGML's number of the type, and bytes.
pub(crate) type Entry = (String, Vec<usize>, u32, Vec<u8>);

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Writer {
    /// One pair; `value` is already encoded.
    pub fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs.0 += 1;
        text(&mut self.pairs.1, key);
        self.pairs.1.extend(kind.to_le_bytes());
        self.pairs.1.extend(value);
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, 4, &value.to_le_bytes());
    }

    pub fn text(&mut self, key: &str, value: &str) {
        let mut bytes = vec![];
        text(&mut bytes, value);
        self.pair(key, 8, &bytes);
    }

    /// An array; `items` are already encoded.
    pub fn array(&mut self, key: &str, kind: u32, count: usize, items: &[u8]) {
        let head = [&kind.to_le_bytes()[..], &(count as u64).to_le_bytes()].concat();
        self.pair(key, 9, &[&head, items].concat());
    }

    pub fn texts(&mut self, key: &str, texts: &[String]) {
        let mut items = vec![];
        texts.iter().for_each(|t| text(&mut items, t));
        self.array(key, 8, texts.len(), &items);
    }

    /// A tensor; `shape` outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) {
        self.infos.0 += 1;
        text(&mut self.infos.1, name);
        self.infos.1.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&n| self.infos.1.extend((n as u64).to_le_bytes()));
        self.infos.1.extend(kind.to_le_bytes());
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.infos.1.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.tensors.push((name.to_owned(), shape.to_vec(), kind, bytes.to_vec()));
    }

    /// What was given to [`Writer::tensor`].
    pub fn tensors(self) -> Vec<Entry> {
        self.tensors
    }

    /// Takes the tensors of another writer in place of its own.
    pub fn replace_tensors(&mut self, other: Writer) {
        (self.infos, self.data, self.tensors) = (other.infos, other.data, other.tensors);
    }

    pub fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.infos.0.to_le_bytes());
        out.extend(self.pairs.0.to_le_bytes());
        out.extend(&self.pairs.1);
        out.extend(&self.infos.1);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

/// A Llama with 2 layers, width 32, 4/2 heads of 8, tied; q and k in F32 hold their stored row
/// number, v is Q8_0, the rest of the matrices Q4_1. With a byte-level tokenizer of 258 tokens.
pub(crate) fn tiny_gguf() -> Writer {
    let mut w = Writer::default();
    w.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 2),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 8),
    ] {
        w.u32(&format!("llama.{key}"), value);
    }
    w.pair("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
    w.pair("llama.rope.freq_base", 6, &10_000f32.to_le_bytes());
    w.text("tokenizer.ggml.model", "gpt2");
    w.text("tokenizer.ggml.pre", "seed-coder");
    let mut tokens = vec!["<[begin▁of▁sentence]>".to_owned(), "<[MASK_TOKEN]>".to_owned()];
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    tokens.extend(alphabet.iter().map(char::to_string));
    let types: Vec<u8> =
        (0..tokens.len()).flat_map(|id| if id < 2 { 3i32 } else { 1 }.to_le_bytes()).collect();
    w.array("tokenizer.ggml.token_type", 5, tokens.len(), &types);
    w.texts("tokenizer.ggml.tokens", &tokens);
    w.texts("tokenizer.ggml.merges", &[]);
    w.u32("tokenizer.ggml.bos_token_id", 0);
    w.u32("tokenizer.ggml.eos_token_id", 1);
    w.pair("tokenizer.ggml.add_bos_token", 7, &[1]);

    let ones = |n: usize| 1f32.to_le_bytes().repeat(n);
    let rows = |n: usize| -> Vec<u8> {
        (0..n).flat_map(|row| (row as f32).to_le_bytes().repeat(32)).collect()
    };
    let half = half::f16::from_f32(0.5).to_le_bytes();
    let q4_1 = |n: usize| [&half[..], &[0, 0], &[0x21; 16]].concat().repeat(n / 32);
    let q8_0 = |n: usize| [&half[..], &[3; 32]].concat().repeat(n / 32);
    w.tensor("token_embd.weight", &[300, 32], 3, &q4_1(300 * 32));
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize], kind: u32, bytes: Vec<u8>| {
            w.tensor(&format!("blk.{layer}.{name}.weight"), shape, kind, &bytes);
        };
        add("attn_norm", &[32], 0, ones(32));
        add("attn_q", &[32, 32], 0, rows(32));
        add("attn_k", &[16, 32], 0, rows(16));
        add("attn_v", &[16, 32], 8, q8_0(16 * 32));
        add("attn_output", &[32, 32], 3, q4_1(32 * 32));
        add("ffn_norm", &[32], 0, ones(32));
        add("ffn_gate", &[64, 32], 3, q4_1(64 * 32));
        add("ffn_up", &[64, 32], 3, q4_1(64 * 32));
        add("ffn_down", &[32, 64], 3, q4_1(64 * 32));
    }
    w.tensor("output_norm.weight", &[32], 0, &ones(32));
    w
}

fn refused(bytes: &[u8], part: &str) {
    let path = Path::new("model.gguf");
    let error = match Gguf::parse(path, bytes).and_then(|gguf| config(&gguf)) {
        Ok(_) => panic!("accepted; expected an error about {part}"),
        Err(e) => e.to_string(),
    };
    assert!(error.contains(part) && !error.contains('\n'), "{error}; expected {part}");
}

#[test]
fn rows_are_unpermuted_as_the_numpy_recipe_does() {
    // w.reshape(heads, H/2, 2).transpose(1, 2) lists for every HF row the stored row it came from.
    let order = RowOrder::Interleaved { head_dim: 6 };
    let rows: Vec<usize> = (0..12).map(|row| order.stored_row(row)).collect();
    assert_eq!(rows, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
}

#[test]
fn hostile_directories_are_refused() {
    let good = tiny_gguf().finish();
    for length in [0, 3, 7, 20, 24, 60, 300, good.len() - 1] {
        refused(&good[..length], "");
    }
    let with = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    refused(&with(0, b"GGML"), "does not begin with GGUF");
    refused(&with(4, &[1]), "version 1");
    refused(&with(4, &[0, 0, 0, 3]), "big-endian");
    refused(&with(8, &u64::MAX.to_le_bytes()), "tensors");
    refused(&with(16, &u64::MAX.to_le_bytes()), "metadata pairs");
    refused(&with(24, &u64::MAX.to_le_bytes()), "truncated");
    let find = |text: &str| good.windows(text.len()).position(|w| w == text.as_bytes()).unwrap();
    let types = find("tokenizer.ggml.token_type") + 25 + 4;
    refused(&with(types, &[9]), "array of arrays");
    refused(&with(types + 4, &u64::MAX.to_le_bytes()), "does not fit");
    let embedding = find("token_embd.weight") + 17;
    refused(&with(embedding, &[9]), "dimensions");
    refused(&with(embedding + 4, &u64::MAX.to_le_bytes()), "absurd");
    refused(&with(embedding + 4, &[33]), "rows of 33");
    refused(&with(embedding + 20, &[12]), "Q4_K");
    refused(&with(embedding + 24, &[32]), "data offset");
}

#[test]
fn what_is_not_a_plain_llama_is_refused() {
    let extra = |change: &dyn Fn(&mut Writer)| {
        let mut w = tiny_gguf();
        change(&mut w);
        w.finish()
    };
    refused(&extra(&|w| w.u32("llama.expert_count", 8)), "experts");
    refused(&extra(&|w| w.u32("general.alignment", 0)), "alignment");
    refused(&extra(&|w| w.u32("general.alignment", 24)), "alignment");
    refused(&extra(&|w| w.u32("llama.block_count", 2)), "twice");
    refused(&extra(&|w| w.text("llama.rope.scaling.type", "yarn")), "yarn");
    refused(&extra(&|w| w.tensor("output_norm.weight", &[1], 0, &[0; 4])), "twice");
    let odd = [1.0f32, 1.0, 2.0, 3.0].map(f32::to_le_bytes).concat();
    refused(&extra(&|w| w.tensor("rope_freqs.weight", &[4], 0, &odd)), "rope_freqs");
    let mut w = Writer::default();
    w.text("general.architecture", "gemma");
    refused(&w.finish(), "gemma");
}

#[test]
fn llama3_scaling_is_recognised_by_its_factors() {
    let path = Path::new("model.gguf");
    let bytes = tiny_gguf().finish();
    let plain = config(&Gguf::parse(path, &bytes).unwrap()).unwrap();
    assert_eq!(plain.rope_scaling, None);
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let mut scaled = plain.clone();
    scaled.rope_theta = 500_000.0;
    let base = scaled.inv_freq();
    scaled.rope_scaling = Some(scaling.clone());
    let factors: Vec<u8> =
        base.iter().zip(scaled.inv_freq()).flat_map(|(p, s)| (p / s).to_le_bytes()).collect();
    let mut w = tiny_gguf();
    w.tensor("rope_freqs.weight", &[4], 0, &factors);
    let mut bytes = w.finish();
    let key = b"llama.rope.freq_base";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&500_000f32.to_le_bytes());
    let read = config(&Gguf::parse(path, &bytes).unwrap()).unwrap();
    assert_eq!(read.rope_scaling, Some(scaling));
}

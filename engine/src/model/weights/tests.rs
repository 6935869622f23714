//! Small model folders made on the spot, and the traps of real ones.

use super::*;
use crate::model::config::tests::tiny;
use crate::model::gguf::tests::{Writer, tiny_gguf};
use crate::model::save::{SaveTensor, save_model};

/// A folder of its own, removed in the end.
pub(crate) struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("demask-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Element `i` of a parameter in the synthetic models; exact in bf16 and f16.
pub(crate) fn element(name: &str, i: usize) -> f32 {
    let seed: usize = name.bytes().map(usize::from).sum();
    ((seed * 31 + i * 7) % 128) as f32 / 16.0 - 4.0
}

pub(crate) fn parameters(config: &LlamaConfig, dtype: StoredType) -> Vec<SaveTensor> {
    config.parameters().into_iter().map(|(name, shape)| SaveTensor { name, shape, dtype }).collect()
}

/// The bytes of a synthetic parameter.
pub(crate) fn bytes_of(tensor: &SaveTensor) -> Vec<u8> {
    let elements = 0..tensor.shape.iter().product();
    let values = elements.map(|i| element(&tensor.name, i));
    match tensor.dtype {
        StoredType::BF16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        StoredType::F16 => values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    }
}

/// Writes a synthetic model; every weight is `element`.
pub(crate) fn write_model(dir: &Path, config: &LlamaConfig, dtype: StoredType) {
    let tensors = parameters(config, dtype);
    save_model(dir, config, &tensors, |tensor, sink| sink(&bytes_of(tensor)), &[]).unwrap();
}

pub(crate) fn stories() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/stories260K");
    if !dir.join("hf/model.safetensors").exists() {
        eprintln!("SKIPPED: {} is not there", dir.display());
        return None;
    }
    Some(dir)
}

fn refused(path: &Path, part: &str) {
    let error = match Weights::open(path) {
        Ok(_) => panic!("accepted; expected an error about {part}"),
        Err(e) => e.to_string(),
    };
    assert!(error.contains(part) && !error.contains('\n'), "{error}; expected {part}");
}

/// A safetensors file with the given header text and data.
fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn folders_open_in_every_float_type() {
    for dtype in [StoredType::F32, StoredType::BF16, StoredType::F16] {
        let scratch = Scratch::new(&format!("floats-{dtype:?}"));
        write_model(&scratch.0, &tiny(), dtype);
        let (config, weights) = Weights::open(&scratch.0).unwrap();
        assert_eq!(config, tiny());
        for (name, shape) in config.parameters() {
            assert_eq!((weights.dtype(&name), weights.shape(&name)), (dtype, shape.as_slice()));
            let columns: usize = shape[1..].iter().product();
            let rows = shape[0] / 2..shape[0];
            let want: Vec<f32> =
                (rows.start * columns..rows.end * columns).map(|i| element(&name, i)).collect();
            assert_eq!(weights.rows_f32(&name, rows.clone()).unwrap(), want, "{name}");
            let bytes = weights.rows_bytes(&name, rows).unwrap().unwrap();
            assert_eq!(bytes.len(), want.len() * dtype.block_bytes());
            assert!(matches!(bytes, Cow::Borrowed(_)));
        }
        assert!(weights.rows_f32("model.norm.weight", 0..33).is_err());
        assert!(weights.rows_f32("nonsense", 0..1).is_err());
    }
}

#[test]
fn gguf_rows_come_in_hugging_face_order() {
    let scratch = Scratch::new("gguf");
    scratch.write("model.gguf", tiny_gguf().finish());
    let (config, weights) = Weights::open(&scratch.0).unwrap();
    assert!(config.tie_word_embeddings);
    let q = "model.layers.1.self_attn.q_proj.weight";
    let first = |rows: Range<usize>| -> Vec<f32> {
        weights.rows_f32(q, rows).unwrap().chunks(32).map(|row| row[0]).collect()
    };
    assert_eq!(first(0..8), [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]);
    assert_eq!(first(11..14), [14.0, 9.0, 11.0]);
    assert!(matches!(weights.rows_bytes(q, 0..2).unwrap(), Some(Cow::Owned(_))));
    let v = "model.layers.0.self_attn.v_proj.weight";
    assert_eq!(weights.dtype(v), StoredType::Q8_0);
    assert_eq!(weights.rows_bytes(v, 0..1).unwrap(), None);
    assert_eq!(weights.rows_f32(v, 3..5).unwrap(), [1.5; 64]);
    let embedding = weights.rows_f32("model.embed_tokens.weight", 299..300).unwrap();
    assert_eq!(embedding, [[0.5; 16], [1.0; 16]].concat());

    let mut extra = tiny_gguf();
    extra.tensor("blk.0.attn_q.bias", &[32], 0, &[0; 128]);
    scratch.write("model.gguf", extra.finish());
    refused(&scratch.0, "self_attn.k_proj.bias of shape [16] is missing");
    scratch.write("other.gguf", Writer::default().finish());
    refused(&scratch.0, "holds 2 GGUF models: model.gguf, other.gguf; name the one you mean");
}

#[test]
fn tensors_must_match_the_configuration() {
    let scratch = Scratch::new("match");
    let tied = LlamaConfig { tie_word_embeddings: true, ..tiny() };
    write_model(&scratch.0, &tiny(), StoredType::F32);
    let json = |config: &LlamaConfig| config.to_json("float32").to_string();
    // Under a tied configuration a head of its own wins; a copy of the embedding is one with it.
    scratch.write("config.json", json(&tied));
    let (config, weights) = Weights::open(&scratch.0).unwrap();
    assert!(!config.tie_word_embeddings);
    assert_eq!(weights.rows_f32("lm_head.weight", 0..1).unwrap()[1], element("lm_head.weight", 1));
    let same = |tensor: &SaveTensor| match tensor.name.as_str() {
        "lm_head.weight" => {
            SaveTensor { name: "model.embed_tokens.weight".into(), ..tensor.clone() }
        }
        _ => tensor.clone(),
    };
    let tensors = parameters(&tiny(), StoredType::F32);
    save_model(&scratch.0, &tiny(), &tensors, |t, sink| sink(&bytes_of(&same(t))), &[]).unwrap();
    scratch.write("config.json", json(&tied));
    assert_eq!(Weights::open(&scratch.0).unwrap().0, tied);
    write_model(&scratch.0, &tied, StoredType::F32);
    scratch.write("config.json", json(&tiny()));
    refused(&scratch.0, "lm_head.weight of shape [300, 32] is missing");
    scratch.write("config.json", json(&LlamaConfig { num_hidden_layers: 1, ..tied.clone() }));
    refused(&scratch.0, "is not part of the model");
    scratch.write("config.json", json(&LlamaConfig { vocab_size: 299, ..tied }));
    refused(&scratch.0, "asks for [299, 32]");
}

#[test]
fn hostile_headers_are_refused() {
    let scratch = Scratch::new("headers");
    write_model(&scratch.0, &tiny(), StoredType::F32);
    let good = std::fs::read(scratch.0.join("model.safetensors")).unwrap();
    let refuse = |bytes: &[u8], part: &str| {
        scratch.write("model.safetensors", bytes);
        refused(&scratch.0, part);
    };
    refuse(&[], "empty");
    refuse(&good[..5], "truncated");
    refuse(&good[..500], "truncated");
    refuse(&good[..good.len() - 1], "truncated");
    refuse(&[&good[..], &[0]].concat(), "data bytes");
    refuse(&[&u64::MAX.to_le_bytes(), &good[8..]].concat(), "header of");
    refuse(
        &with_header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}"#, &[0; 4]),
        "twice",
    );
    refuse(
        &with_header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]),
        "invalid",
    );
    refuse(
        &with_header(r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, &[0; 8]),
        "invalid offset",
    );
    refuse(
        &with_header(r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
        "F99",
    );
    // Spans whose sum passes 2^64: the crate alone would wrap around or panic.
    let eighth = u64::MAX / 8;
    let spans: Vec<String> = (0..8)
        .map(|i| {
            let (start, end) = (i * eighth, (i + 1) * eighth);
            format!(r#""t{i}":{{"dtype":"U8","shape":[{eighth}],"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    refuse(&with_header(&format!("{{{}}}", spans.join(",")), &[0; 8]), "ends at byte");
    refuse(&with_header(&format!("{}1", "[".repeat(100_000)), &[]), "invalid");
}

#[test]
fn an_index_cannot_leave_its_folder() {
    let scratch = Scratch::new("index");
    write_model(&scratch.0, &tiny(), StoredType::F32);
    std::fs::rename(scratch.0.join("model.safetensors"), scratch.0.join("a.safetensors")).unwrap();
    let index = |shard: &str| {
        let names = tiny().parameters().into_iter().map(|(name, _)| (name, shard.to_owned()));
        let map: BTreeMap<String, String> = names.collect();
        serde_json::json!({ "weight_map": map }).to_string()
    };
    scratch.write("model.safetensors.index.json", index("a.safetensors"));
    assert!(Weights::open(&scratch.0).is_ok());
    for bad in [
        "../a.safetensors",
        "/tmp/a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "config.json",
        "",
    ] {
        scratch.write("model.safetensors.index.json", index(bad));
        refused(&scratch.0, "weight_map sends");
    }
    scratch.write("model.safetensors.index.json", r#"{"weight_map": {"x": "a.safetensors"}}"#);
    refused(&scratch.0, "different tensors");
    scratch.write("model.safetensors.index.json", r#"{"weight_map": {}}"#);
    refused(&scratch.0, "missing");
    scratch.write("model.safetensors.index.json", "[]");
    refused(&scratch.0, "not a safetensors index");
}

#[test]
fn a_real_model_opens() {
    let Some(dir) = stories() else { return };
    let (config, weights) = Weights::open(&dir.join("hf")).unwrap();
    assert_eq!(
        (config.num_hidden_layers, config.num_key_value_heads, config.num_parameters()),
        (5, 4, 260_032)
    );
    // The original file holds the same q matrices in the order of llama.cpp: both layouts must
    // agree.
    let original = std::fs::read(dir.join("stories260K.bin")).unwrap();
    let (vocab, dim, layers) = (512, 64, 5);
    let wq = 28 + 4 * (vocab * dim + layers * dim);
    let mut stored = vec![];
    quant::dequantise(StoredType::F32, &original[wq..wq + 4 * dim * dim], &mut stored);
    let order = RowOrder::Interleaved { head_dim: 8 };
    let unpermuted: Vec<f32> =
        (0..dim).flat_map(|row| stored[order.stored_row(row) * dim..][..dim].to_vec()).collect();
    assert_eq!(
        weights.rows_f32("model.layers.0.self_attn.q_proj.weight", 0..dim).unwrap(),
        unpermuted
    );
}

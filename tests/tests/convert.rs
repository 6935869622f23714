//! Models written as GGUF and read back: weights within each type's step, configuration and tokenizer as they were.
//! That other programs read the same numbers is `interop/gguf_check.py`'s to show.

use std::path::{Path, PathBuf};

use demask_engine::Error;
use demask_engine::model::merge::convert;
use demask_engine::model::save::{SaveTensor, Sink, save_model};
use demask_engine::model::{
    DiffusionAttention, LlamaConfig, RopeScaling, StoredType, Tokenizer, Weights,
};
use demask_engine::philox::Philox;
use tempfile::TempDir;

/// A model of one layer with random weights and the small model's tokenizer; rows of 256 and 512.
fn source() -> (TempDir, LlamaConfig) {
    source_of(false)
}

/// The same as a Llama, or as a Qwen2.
fn source_of(qkv_bias: bool) -> (TempDir, LlamaConfig) {
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/models/small-coder");
    let (small_config, _) = Weights::open(&small).unwrap();
    let files = Tokenizer::for_model(&small, &small_config).unwrap().files().unwrap();
    let config = LlamaConfig {
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        qkv_bias,
        tie_word_embeddings: false,
        block_length: Some(8),
        diffusion_attention: DiffusionAttention::Causal,
        bos_token_id: Some(2),
        rope_scaling: Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }),
        ..small_config
    };
    let dir = tempfile::tempdir().unwrap();
    let tensor = |(name, shape)| SaveTensor { name, shape, dtype: StoredType::F32 };
    let tensors: Vec<SaveTensor> = config.parameters().into_iter().map(tensor).collect();
    let mut seed = 0;
    let fill = |tensor: &SaveTensor, sink: &mut Sink<'_>| {
        seed += 1;
        let mut random = Philox::new(seed, [0; 3]);
        let n: usize = tensor.shape.iter().product();
        let values: Vec<u8> = (0..n).flat_map(|_| (0.1 * random.normal()).to_le_bytes()).collect();
        sink(&values)
    };
    save_model(dir.path(), &config, &tensors, fill, &files).unwrap();
    (dir, config)
}

fn written(source: &Path, dir: &Path, dtype: StoredType) -> PathBuf {
    let out = dir.join(format!("{dtype:?}.gguf"));
    let mut heard = Vec::new();
    convert(source, &out, dtype, &mut |share| heard.push(share)).unwrap();
    assert!(heard.is_sorted() && heard.last() == Some(&1.0));
    out
}

/// Root mean square of the difference, over that of the values.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / a.iter().map(|&a| square(a)).sum::<f64>()).sqrt()
}

#[test]
fn gguf_files_hold_the_model_in_every_type() {
    let (source, config) = source();
    let dir = tempfile::tempdir().unwrap();
    let (_, original) = Weights::open(source.path()).unwrap();
    for (dtype, bound) in [
        (StoredType::F32, 0.0),
        (StoredType::F16, 4e-4),
        (StoredType::BF16, 3e-3),
        (StoredType::Q8_0, 8e-3),
        (StoredType::Q6_K, 0.025),
        (StoredType::Q4_1, 0.09),
        (StoredType::Q4_K, 0.09),
        (StoredType::Q4_0, 0.11),
    ] {
        let out = written(source.path(), dir.path(), dtype);
        let (read, weights) = Weights::open(&out).unwrap();
        assert_eq!(read, config, "{dtype:?}");
        for (name, shape) in config.parameters() {
            let want = original.rows_f32(&name, 0..shape[0]).unwrap();
            let got = weights.rows_f32(&name, 0..shape[0]).unwrap();
            let own = if shape.len() == 2 { dtype } else { StoredType::F32 };
            assert_eq!(weights.dtype(&name), own, "{name}");
            let distance = distance(&want, &got);
            let bound = if own == StoredType::F32 { 0.0 } else { bound };
            assert!(distance <= bound, "{name} as {dtype:?}: {distance}");
            assert!(bound == 0.0 || distance > bound / 20.0, "{name} as {dtype:?}: {distance}");
        }
    }
}

#[test]
fn a_qwen2_keeps_its_biases_and_its_rows() {
    let (source, config) = source_of(true);
    let dir = tempfile::tempdir().unwrap();
    let (_, original) = Weights::open(source.path()).unwrap();
    let out = written(source.path(), dir.path(), StoredType::Q8_0);
    let (read, weights) = Weights::open(&out).unwrap();
    assert_eq!(read, config);
    let bias = "model.layers.0.self_attn.k_proj.bias";
    let values = |of: &Weights| of.rows_f32(bias, 0..128).unwrap();
    assert_eq!(values(&original), values(&weights));
    let folder = dir.path().join("again");
    convert(&out, &folder, StoredType::F32, &mut |_| {}).unwrap();
    let (read, weights) = Weights::open(&folder).unwrap();
    assert_eq!((read, values(&weights)), (config, values(&original)));
    let q = |of: &Weights| of.rows_f32("model.layers.0.self_attn.q_proj.weight", 0..256).unwrap();
    assert!(distance(&q(&original), &q(&weights)) < 8e-3);
}

#[test]
fn the_tokenizer_goes_along() {
    let (source, config) = source();
    let dir = tempfile::tempdir().unwrap();
    let out = written(source.path(), dir.path(), StoredType::Q8_0);
    let ours = Tokenizer::for_model(source.path(), &config).unwrap();
    let read = Tokenizer::for_model(&out, &config).unwrap();
    assert_eq!(ours.mask_token_id(), read.mask_token_id());
    assert_eq!(ours.chat_template(), read.chat_template());
    // A dataset is made with the tokenizer in the file, or in the file of a folder.
    for place in [&out, &dir.path().to_owned()] {
        let vocabulary = demask_trainer::data::sample::Vocabulary::open(place).unwrap();
        assert_eq!(vocabulary.size, ours.vocab_size());
    }
    for text in ["def f(x):\n    return x\n", "  π ≈ 3.14159 <mask>", "\t\r\n漢字", ""] {
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(read.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(read.decode(&ids, false), ours.decode(&ids, false));
    }
}

#[test]
fn a_converted_file_is_converted_again_to_the_same_numbers() {
    let (source, config) = source();
    let dir = tempfile::tempdir().unwrap();
    for dtype in [StoredType::Q8_0, StoredType::Q4_K, StoredType::Q6_K] {
        let gguf = written(source.path(), dir.path(), dtype);
        let folder = dir.path().join(format!("{dtype:?}"));
        convert(&gguf, &folder, StoredType::F32, &mut |_| {}).unwrap();
        let ((read, of_gguf), (_, of_folder)) =
            (Weights::open(&gguf).unwrap(), Weights::open(&folder).unwrap());
        assert_eq!(read, config);
        for (name, shape) in config.parameters() {
            let rows = 0..shape[0];
            let want = of_gguf.rows_f32(&name, rows.clone()).unwrap();
            assert_eq!(of_folder.rows_f32(&name, rows).unwrap(), want, "{name}");
        }
    }
}

#[test]
fn what_cannot_be_written_is_refused_and_nothing_is_left() {
    let (source, _) = source();
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/models/small-coder");
    let dir = tempfile::tempdir().unwrap();
    let refused = |from: &Path, to: &str, dtype, word: &str| {
        let result = convert(from, &dir.path().join(to), dtype, &mut |_| {});
        let Err(error) = result else { panic!("{to} was written") };
        assert!(matches!(error, Error::Model { .. } | Error::Io { .. }), "{error:?}");
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(source.path(), "folder", StoredType::Q8_0, "gguf");
    // Rows of 704 are no whole blocks of 256.
    refused(&small, "small.gguf", StoredType::Q4_K, "rows of 704");
    refused(source.path(), "no/such/folder/a.gguf", StoredType::F16, "no/such/folder");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

/// Ends and beginnings by any files: a GGUF file and the folder made of it mean what the first folder meant, and what
/// llama.cpp makes otherwise of the file is said.
#[test]
fn ends_and_beginnings_go_along_both_ways() {
    let (source, _) = source();
    let dir = tempfile::tempdir().unwrap();
    let [gguf, folder] = ["a.gguf", "again"].map(|name| dir.path().join(name));
    let tokenizer = source.path().join("tokenizer.json");
    let settings = source.path().join("tokenizer_config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&tokenizer).unwrap()).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&settings).unwrap()).unwrap();
    config["bos_token"] = "<|endoftext|>".into();
    let end = |name: &str| serde_json::json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
    let around = |single: serde_json::Value| {
        let mut pair = single.as_array().unwrap().clone();
        pair.push(serde_json::json!({"Sequence": {"id": "B", "type_id": 1}}));
        serde_json::json!({
            "type": "TemplateProcessing", "single": single, "pair": pair,
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]},
                "<|im_end|>": {"id": "<|im_end|>", "ids": [6], "tokens": ["<|im_end|>"]},
            },
        })
    };
    let begins = around(serde_json::json!([end("<|endoftext|>"), text]));
    let both = around(serde_json::json!([end("<|endoftext|>"), text, end("<|im_end|>")]));
    let chatml = demask_engine::model::CHATML;
    let written = format!("{{{{ bos_token }}}}{chatml}");
    // <|endoftext|> is 0, <|im_end|> 6; both are ends to llama.cpp by their spelling.
    let cases: [(&[u32], &serde_json::Value, &str, &[&str]); 8] = [
        (&[0, 6], &serde_json::Value::Null, chatml, &[]),
        (&[6, 0], &serde_json::Value::Null, chatml, &[]),
        (&[0], &serde_json::Value::Null, chatml, &["also end an answer at <|im_end|>"]),
        (&[0, 6, 40, 41], &begins, &written, &[]),
        (&[0, 6, 40, 41, 42], &begins, &written, &["not end an answer at"]),
        (&[0, 6], &begins, chatml, &["begin a conversation with <|endoftext|>"]),
        (&[0, 6], &both, &written, &[]),
        (&[], &serde_json::Value::Null, chatml, &["also end an answer at"]),
    ];
    for (ends, processor, template, notes) in cases {
        json["post_processor"] = processor.clone();
        config["chat_template"] = template.into();
        std::fs::write(&tokenizer, json.to_string()).unwrap();
        std::fs::write(&settings, config.to_string()).unwrap();
        let generation = serde_json::json!({"eos_token_id": ends, "temperature": 0.5});
        let file = |folder: &Path| folder.join("generation_config.json");
        std::fs::write(file(source.path()), generation.to_string()).unwrap();
        convert(source.path(), &gguf, StoredType::Q8_0, &mut |_| {}).unwrap();
        convert(&gguf, &folder, StoredType::F32, &mut |_| {}).unwrap();
        let read = |path: &Path| {
            let (config, _) = Weights::open(path).unwrap();
            let tokenizer = Tokenizer::for_model(path, &config).unwrap();
            (config, tokenizer)
        };
        let (config, ours) = read(source.path());
        let said = ours.otherwise_in_llama_cpp(&config).unwrap();
        assert_eq!(said.len(), notes.len(), "{said:?}");
        assert!(said.iter().zip(notes).all(|(said, note)| said.contains(note)), "{said:?}");
        for place in [source.path(), &gguf, &folder] {
            let (config, tokenizer) = read(place);
            assert_eq!(config.eos_token_ids, ends, "{}", place.display());
            for text in ["def f(x):", ""] {
                assert_eq!(tokenizer.encode(text, true).unwrap(), ours.encode(text, true).unwrap());
            }
            let turns = [serde_json::json!({"role": "user", "content": "hi"})];
            let told = |tokenizer: &Tokenizer| {
                let chat = tokenizer.chat().unwrap().unwrap();
                tokenizer.encode_chat(&chat.render(&turns, true).unwrap()).unwrap()
            };
            assert_eq!(told(&tokenizer), told(&ours), "{}", place.display());
            assert_eq!(tokenizer.end_of_turn().unwrap(), Some(6));
        }
        // To a folder everything goes, also what nothing here reads.
        let copy = dir.path().join("copy");
        convert(source.path(), &copy, StoredType::F32, &mut |_| {}).unwrap();
        let text = std::fs::read(file(&copy)).unwrap();
        let written: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(written["temperature"], 0.5);
    }
}

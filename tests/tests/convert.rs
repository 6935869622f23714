//! Models written as GGUF and read back: weights within each type's step, configuration and tokenizer as they were.
//! That other programs read the same numbers is `interop/gguf_check.py`'s to show.

use std::path::{Path, PathBuf};

use demask_engine::Error;
use demask_engine::model::merge::{ConvertOptions, convert};
use demask_engine::model::save::{SaveTensor, Sink, save_model};
use demask_engine::model::{
    DiffusionAttention, LlamaConfig, RopeScaling, StoredType, Tokenizer, Weights,
};
use demask_engine::philox::Philox;
use tempfile::TempDir;

/// A model of one layer with random weights and the small model's tokenizer; rows of 256 and 512.
fn source() -> (TempDir, LlamaConfig) {
    source_of([false; 3])
}

/// The same with biases on q, k and v, on the output projection of attention, and in the feed-forward layer.
fn source_of([qkv_bias, o_bias, mlp_bias]: [bool; 3]) -> (TempDir, LlamaConfig) {
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
        o_bias,
        mlp_bias,
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
    let (source, config) = source_of([true, false, false]);
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

/// Biases of q and k are stored in the order of the rows that they are added to.
#[test]
fn a_llama_keeps_its_biases() {
    for biases in [[true, true, false], [false, false, true], [true; 3]] {
        let (source, config) = source_of(biases);
        let dir = tempfile::tempdir().unwrap();
        let (_, original) = Weights::open(source.path()).unwrap();
        let out = written(source.path(), dir.path(), StoredType::F32);
        let bytes = std::fs::read(&out).unwrap();
        let name = b"general.architecture";
        let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 12;
        assert_eq!(&bytes[at..at + 5], b"llama");
        let (read, weights) = Weights::open(&out).unwrap();
        assert_eq!(read, config);
        for (name, shape) in config.parameters() {
            let values = |of: &Weights| of.rows_f32(&name, 0..shape[0]).unwrap();
            assert_eq!(values(&original), values(&weights), "{name}");
        }
    }
}

/// YaRN as llama.cpp and transformers both compute it has a place in a GGUF file; other scalings are refused by name.
#[test]
fn stretched_contexts_are_kept_or_refused() {
    let (source, config) = source();
    let dir = tempfile::tempdir().unwrap();
    let path = source.path().join("config.json");
    let with = |scaling: &serde_json::Value| {
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json["rope_scaling"] = scaling.clone();
        std::fs::write(&path, json.to_string()).unwrap();
    };
    let yarn = serde_json::json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512
    });
    with(&yarn);
    let (of_folder, _) = Weights::open(source.path()).unwrap();
    let out = written(source.path(), dir.path(), StoredType::Q8_0);
    let (read, _) = Weights::open(&out).unwrap();
    assert_eq!(read, of_folder);
    assert!(matches!(&read.rope_scaling, Some(RopeScaling::Yarn(y)) if y.factor == 4.0));
    let factors = vec![1.0; config.head_dim / 2];
    let mut own = yarn.clone();
    own["beta_fast"] = 16.into();
    for (named, scaling) in [
        ("dynamic", serde_json::json!({"rope_type": "dynamic", "factor": 2.0})),
        ("beta_fast", own),
        (
            "longrope",
            serde_json::json!({
                "rope_type": "longrope", "short_factor": factors, "long_factor": factors
            }),
        ),
    ] {
        with(&scaling);
        let out = dir.path().join("refused.gguf");
        let error = convert(source.path(), &out, StoredType::Q8_0, &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
        assert!(!out.exists());
    }
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

/// FNV-1a.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// How a type is rounded is part of what a file is: the same model gives the same weights from version to version, with
/// any number of threads.
#[test]
fn the_bytes_of_weights_stay_what_they_were() {
    let (source, config) = source();
    let dir = tempfile::tempdir().unwrap();
    let want = [
        (StoredType::F16, 16_884_604_382_419_149_856),
        (StoredType::BF16, 15_458_483_905_805_988_741),
        (StoredType::Q8_0, 4_232_973_751_682_818_782),
        (StoredType::Q6_K, 8_768_220_465_366_367_425),
        (StoredType::Q4_1, 5_486_355_382_712_855_187),
        (StoredType::Q4_K, 1_939_767_490_827_397_319),
        (StoredType::Q4_0, 16_790_058_401_010_539_633u64),
    ];
    let got = want.map(|(dtype, _)| {
        let out = written(source.path(), dir.path(), dtype);
        let (_, weights) = Weights::open(&out).unwrap();
        let stored = |(name, shape): (String, Vec<usize>)| {
            weights.rows_stored(&name, 0..shape[0]).unwrap().into_owned()
        };
        (dtype, hash(config.parameters().into_iter().flat_map(stored)))
    });
    assert_eq!(got, want);
}

/// A folder whose tokenizer has tokens with flags that GGUF has no place for.
fn flagged() -> (TempDir, [String; 2]) {
    let (source, _) = source();
    let path = source.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    let want = [
        format!("{} has lstrip and rstrip", added[0]["content"]),
        format!("{} has single_word", added[1]["content"]),
    ];
    (added[0]["lstrip"], added[0]["rstrip"]) = (true.into(), true.into());
    added[1]["single_word"] = true.into();
    std::fs::write(&path, json.to_string()).unwrap();
    (source, want)
}

#[test]
fn flags_that_gguf_cannot_hold_are_refused_or_named() {
    let (source, want) = flagged();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("a.gguf");
    let error = convert(source.path(), &out, StoredType::F16, &mut |_| {}).unwrap_err().to_string();
    let named = want.iter().all(|token| error.contains(token));
    assert!(named && error.contains("--lossy-tokenizer"), "{error}");
    assert!(!out.exists());
    let options = ConvertOptions { dtype: StoredType::F16, lossy_tokenizer: true };
    assert_eq!(convert(source.path(), &out, options, &mut |_| {}).unwrap(), want);
    let folder = dir.path().join("folder");
    let lost = convert(source.path(), &folder, StoredType::F32, &mut |_| {}).unwrap();
    assert!(lost.is_empty(), "a folder holds everything");
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
    refused(source.path(), "five.gguf", StoredType::Q5_K, "only read");
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

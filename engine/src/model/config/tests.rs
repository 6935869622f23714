//! Configurations that are read, refused and written back.

use super::*;

pub(crate) fn tiny() -> LlamaConfig {
    LlamaConfig {
        vocab_size: 300,
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        tie_word_embeddings: false,
        max_position_embeddings: 64,
        bos_token_id: Some(0),
        eos_token_ids: vec![2, 7],
        mask_token_id: Some(5),
        pad_token_id: None,
        generation: Map::new(),
        block_length: Some(4),
        diffusion_attention: DiffusionAttention::Causal,
    }
}

fn llama3(factor: f32) -> RopeScaling {
    RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    }
}

fn path() -> &'static Path {
    Path::new("config.json")
}

#[test]
fn json_round_trip_keeps_every_field() {
    let yarn = Yarn {
        factor: 4.0,
        original_max_position_embeddings: 16,
        beta_fast: 16.0,
        beta_slow: 0.5,
        truncate: false,
        attention_factor: None,
        mscale: Some([0.7, 1.3]),
    };
    let plain_yarn = Yarn { attention_factor: Some(1.2), mscale: None, ..yarn.clone() };
    let long = LongRope {
        short_factor: vec![1.0, 1.1, 1.2, 1.3],
        long_factor: vec![1.0, 2.0, 4.0, 8.0],
        original_max_position_embeddings: 16,
        factor: None,
        attention_factor: None,
    };
    for rope_scaling in [
        None,
        Some(llama3(8.0)),
        Some(RopeScaling::Linear { factor: 2.5 }),
        Some(RopeScaling::Dynamic { factor: 2.5 }),
        Some(RopeScaling::Yarn(yarn)),
        Some(RopeScaling::Yarn(plain_yarn)),
        Some(RopeScaling::LongRope(LongRope { factor: Some(4.0), ..long.clone() })),
        Some(RopeScaling::LongRope(long)),
    ] {
        let config = LlamaConfig { rope_scaling, ..tiny() };
        let json = config.to_json("bfloat16");
        assert_eq!(LlamaConfig::from_json(&json, path()).unwrap(), config);
    }
    let qwen2 = LlamaConfig { qkv_bias: true, ..tiny() };
    assert_eq!(LlamaConfig::from_json(&qwen2.to_json("float32"), path()).unwrap(), qwen2);
    assert_eq!(qwen2.parameters().len(), tiny().parameters().len() + 3 * 2);
    assert_eq!(tiny().to_json("float32")["rms_norm_eps"], json!(1e-5));
    for (o_bias, mlp_bias) in [(true, false), (false, true), (true, true)] {
        let llama = LlamaConfig { qkv_bias: o_bias, o_bias, mlp_bias, ..tiny() };
        let json = llama.to_json("float32");
        assert_eq!(json["model_type"], "llama");
        assert_eq!(LlamaConfig::from_json(&json, path()).unwrap(), llama);
        let more = 2 * (4 * usize::from(o_bias) + 3 * usize::from(mlp_bias));
        assert_eq!(llama.parameters().len(), tiny().parameters().len() + more);
    }
    let neither = LlamaConfig { qkv_bias: true, mlp_bias: true, ..tiny() };
    assert!(neither.validate(path()).is_err());
}

#[test]
fn absent_fields_default_as_in_transformers() {
    let json = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "pad_token_id": -1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    });
    let config = LlamaConfig::from_json(&json, path()).unwrap();
    assert_eq!((config.num_key_value_heads, config.head_dim), (4, 16));
    assert_eq!(
        (config.bos_token_id, config.eos_token_ids.as_slice(), config.pad_token_id),
        (Some(1), &[][..], None)
    );
    assert_eq!((config.rope_theta, config.rms_norm_eps), (500_000.0, 1e-6));
    assert_eq!((config.rope_scaling, config.tie_word_embeddings), (None, false));
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let refuse = |key: &str, value: Value| {
        let mut json = tiny().to_json("float32");
        json[key] = value;
        let error = LlamaConfig::from_json(&json, path()).expect_err(key).to_string();
        assert!(!error.contains('\n'), "{error}");
        let named =
            error.contains(key) || error.contains("architecture") || error.contains("rope_scaling");
        assert!(named, "{key}: {error}");
    };
    refuse("model_type", json!("qwen3"));
    // The architecture is still Llama's.
    refuse("model_type", json!("qwen2"));
    refuse("use_sliding_window", json!(true));
    refuse("architectures", json!(["MistralForCausalLM"]));
    refuse("attention_bias", json!(1));
    refuse("mlp_bias", json!("yes"));
    refuse("hidden_act", json!("gelu"));
    refuse("quantization_config", json!({"bits": 4}));
    refuse("num_key_value_heads", json!(3));
    refuse("head_dim", json!(7));
    refuse("head_dim", json!(258));
    for zero in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ] {
        refuse(zero, json!(0));
        refuse(zero, json!(u64::MAX));
        refuse(zero, json!(-1));
        refuse(zero, json!("64"));
    }
    refuse("rms_norm_eps", json!(0.0));
    refuse("rms_norm_eps", json!(1e300));
    refuse("rope_theta", json!(1e300));
    refuse("bos_token_id", json!(300));
    refuse("eos_token_id", json!([2, 300]));
    refuse("mask_token_id", json!(300));
    refuse("block_length", json!(0));
    refuse("rope_scaling", json!({"rope_type": "proportional", "factor": 4.0}));
    refuse("rope_scaling", json!({"rope_type": "yarn", "factor": 0.5}));
    refuse("rope_scaling", json!({"rope_type": "yarn"}));
    refuse("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0, "beta_slow": 40}));
    refuse("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": -1}));
    refuse("rope_scaling", json!({"rope_type": "dynamic"}));
    refuse("rope_scaling", json!({"rope_type": "longrope", "short_factor": [1, 1, 1, 1]}));
    let long = |short: Value| json!({"type": "longrope", "short_factor": short, "long_factor": [1, 2, 3, 4]});
    refuse("rope_scaling", long(json!([1, 1, 1])));
    refuse("rope_scaling", long(json!([1, 1, 1, 0])));
    refuse("rope_scaling", json!("linear"));
    refuse("partial_rotary_factor", json!(0.5));
    refuse("rope_scaling", json!({"rope_type": "linear", "factor": 0.0}));
    refuse("rope_scaling", json!({"rope_type": "llama3", "factor": 8.0}));
}

/// The published config.json names neither.
#[test]
fn diffcoders_are_known_by_their_architecture() {
    let plain = LlamaConfig {
        mask_token_id: None,
        block_length: None,
        diffusion_attention: DiffusionAttention::Block,
        ..tiny()
    };
    let mut json = plain.to_json("bfloat16");
    assert!(!LlamaConfig::from_json(&json, path()).unwrap().is_diffusion());
    for architecture in ["StableDiffcoderForCausalLM", "SeedDiffcoderForCausalLM"] {
        json["architectures"] = json!([architecture]);
        let config = LlamaConfig::from_json(&json, path()).unwrap();
        assert_eq!((config.mask_token_id, config.block_length), (Some(5), Some(4)));
        json["block_length"] = json!(8);
        assert_eq!(LlamaConfig::from_json(&json, path()).unwrap().block_length, Some(8));
        json["block_length"] = Value::Null;
    }
}

#[test]
fn parameters_of_stable_diffcoder_sum_to_its_published_size() {
    let config = LlamaConfig {
        vocab_size: 155_136,
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        ..tiny()
    };
    assert_eq!(config.num_parameters(), 8_250_462_208);
}

/// The rest of what scalings compute is held to transformers' numbers by the tests of whole folders.
#[test]
fn only_some_scalings_depend_on_the_length() {
    let with = |rope_scaling| LlamaConfig { rope_scaling: Some(rope_scaling), ..tiny() };
    let dynamic = with(RopeScaling::Dynamic { factor: 2.0 });
    assert_eq!((dynamic.steady_length(), dynamic.inv_freq()), (64, tiny().inv_freq()));
    assert_eq!(dynamic.inv_freq_in(64), dynamic.inv_freq());
    let longer = dynamic.inv_freq_in(65);
    assert!(longer[0] == 1.0 && longer[1] < dynamic.inv_freq()[1]);
    assert!(dynamic.context_length() > 1 << 20);
    let linear = with(RopeScaling::Linear { factor: 2.0 });
    assert_eq!((linear.steady_length(), linear.context_length()), (usize::MAX, 128));
    assert_eq!((linear.inv_freq_in(65), linear.rope_attention_factor()), (linear.inv_freq(), 1.0));
    assert_eq!((tiny().steady_length(), tiny().context_length()), (usize::MAX, 64));
}

#[test]
fn llama3_frequencies_keep_short_waves_and_stretch_long_ones() {
    let plain = LlamaConfig { head_dim: 128, rope_theta: 500_000.0, ..tiny() };
    let scaled = LlamaConfig { rope_scaling: Some(llama3(8.0)), ..plain.clone() }.inv_freq();
    let plain = plain.inv_freq();
    assert_eq!((plain.len(), plain[0], scaled[0]), (64, 1.0, 1.0));
    for (p, s) in plain.iter().zip(&scaled) {
        let wavelength = std::f32::consts::TAU / p;
        let factor = p / s;
        match wavelength {
            w if w < 2048.0 => assert_eq!(factor, 1.0),
            w if w > 8192.0 => assert_eq!(factor, 8.0),
            _ => assert!(factor > 1.0 && factor < 8.0),
        }
    }
}

/// The table that transformers itself filled in (`tests/golden/generate_ends.py`).
#[test]
fn ends_are_those_of_transformers() {
    let scratch = crate::model::weights::tests::Scratch::new("ends");
    for case in crate::model::gguf::ends::tests::golden()["folder_ends"].as_array().unwrap() {
        let file = scratch.0.join(generation::FILE);
        match &case["generation_config"] {
            Value::Null => drop(std::fs::remove_file(&file)),
            generation => std::fs::write(&file, generation.to_string()).unwrap(),
        }
        scratch.write("config.json", case["config"].to_string());
        let config = LlamaConfig::read(&scratch.0).unwrap();
        assert_eq!(json!(config.eos_token_ids), case["ends"], "{case}");
        // What is written says the same, and whatever else the file said.
        let written = generation::to_json(&config);
        std::fs::write(&file, written.to_string()).unwrap();
        scratch.write("config.json", config.to_json("float32").to_string());
        assert_eq!(LlamaConfig::read(&scratch.0).unwrap(), config);
        assert_eq!(written.get("top_p"), case["generation_config"].get("top_p"));
        assert_eq!(written.get("_from_model_config"), None);
    }
    let faults = [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        (r#"{"eos_token_id": 8}"#, "8 is not below"),
    ];
    for (content, part) in faults {
        std::fs::write(scratch.0.join(generation::FILE), content).unwrap();
        let error = LlamaConfig::read(&scratch.0).unwrap_err().to_string();
        assert!(error.contains(generation::FILE) && error.contains(part), "{error}");
    }
}

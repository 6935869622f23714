//! The table that llama.cpp itself filled in (`tests/golden/generate_ends.py`).

use std::path::Path;

use serde_json::Value;

use super::*;
use crate::model::gguf::tests::Writer;

/// Where transformers and llama.cpp begin and end.
pub(crate) fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/ends.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn ends_and_beginnings_are_those_of_llama_cpp() {
    for case in golden()["gguf"].as_array().unwrap() {
        let mut w = Writer::default();
        w.text("tokenizer.ggml.model", case["model"].as_str().unwrap());
        if let Some(pre) = case["pre"].as_str() {
            w.text("tokenizer.ggml.pre", pre);
        }
        let tokens: Vec<String> = serde_json::from_value(case["tokens"].clone()).unwrap();
        w.texts("tokenizer.ggml.tokens", &tokens);
        for (key, value) in case["keys"].as_object().unwrap() {
            let key = format!("tokenizer.ggml.{key}");
            match value.as_bool() {
                Some(flag) => w.pair(&key, 7, &[u8::from(flag)]),
                None => w.u32(&key, value.as_u64().unwrap() as u32),
            }
        }
        let bytes = w.finish();
        let found = Ends::read(&Gguf::parse(Path::new("a.gguf"), &bytes).unwrap()).unwrap();
        let mut ends = found.ends.clone();
        ends.sort_unstable();
        assert_eq!(serde_json::json!(ends), case["ends"], "{case}");
        assert_eq!(Some(found.add_bos), case["add_bos"].as_bool(), "{case}");
        // Of tokens that are no control tokens the package asked does not tell.
        if let Some(bos) = case["bos"].as_u64() {
            assert_eq!(found.bos.map(u64::from), Some(bos), "{case}");
        }
        if let Some(eos) = case["eos"].as_u64() {
            assert_eq!(found.eos.map(u64::from), Some(eos), "{case}");
            assert_eq!(found.ends[0], eos as u32, "the end of a text comes first: {case}");
        }
        assert_eq!(found.add_eos, case["keys"]["add_eos_token"] == true);
    }
}

#[test]
fn our_own_list_comes_before_the_rules() {
    let mut w = Writer::default();
    w.text("tokenizer.ggml.model", "gpt2");
    w.texts("tokenizer.ggml.tokens", &["<|im_end|>", "a", "b"].map(str::to_owned));
    w.u32("tokenizer.ggml.eos_token_id", 0);
    w.array(OWN_ENDS, 5, 2, &[2i32, 1].map(i32::to_le_bytes).concat());
    let bytes = w.finish();
    let found = Ends::read(&Gguf::parse(Path::new("a.gguf"), &bytes).unwrap()).unwrap();
    assert_eq!((found.ends, found.eos), (vec![2, 1], Some(0)));
}

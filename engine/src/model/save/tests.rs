//! Written folders and what is in them.

use super::*;
use crate::model::config::tests::tiny;
use crate::model::weights::Weights;
use crate::model::weights::tests::{Scratch, bytes_of, element, parameters, write_model};

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> =
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn shards_replace_a_single_file_and_read_back_equal() {
    let scratch = Scratch::new("shards");
    write_model(&scratch.0, &tiny(), StoredType::F32);
    // Types are mixed and chunks are small and uneven.
    let mut tensors = parameters(&tiny(), StoredType::BF16);
    tensors.iter_mut().step_by(3).for_each(|tensor| tensor.dtype = StoredType::F32);
    let fill = |tensor: &SaveTensor, sink: &mut Sink| {
        bytes_of(tensor).chunks(1000).try_for_each(&mut *sink)
    };
    let files = [("tokenizer.json".to_owned(), b"{}".to_vec())];
    save_sharded(&scratch.0, &tiny(), &tensors, fill, &files, 20_000).unwrap();
    let found = names(&scratch.0);
    assert!(found.contains(&"model.safetensors.index.json".to_owned()), "{found:?}");
    assert!(!found.contains(&"model.safetensors".to_owned()) && found.len() > 6, "{found:?}");
    assert!(!found.iter().any(|name| name.ends_with(".tmp")), "{found:?}");
    let (config, weights) = Weights::open(&scratch.0).unwrap();
    assert_eq!(config, tiny());
    for tensor in &tensors {
        assert_eq!(weights.dtype(&tensor.name), tensor.dtype);
        let elements: usize = tensor.shape.iter().product();
        let want: Vec<f32> = (0..elements).map(|i| element(&tensor.name, i)).collect();
        assert_eq!(
            weights.rows_f32(&tensor.name, 0..tensor.shape[0]).unwrap(),
            want,
            "{}",
            tensor.name
        );
    }
    write_model(&scratch.0, &tiny(), StoredType::F16);
    let found = names(&scratch.0);
    assert_eq!(
        found,
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    );
    let config = std::fs::read_to_string(scratch.0.join("config.json")).unwrap();
    assert!(config.contains(r#""torch_dtype": "float16""#), "{config}");
}

#[test]
fn a_failed_save_leaves_the_old_model() {
    let scratch = Scratch::new("failed");
    write_model(&scratch.0, &tiny(), StoredType::F32);
    let before = names(&scratch.0);
    let tensors = parameters(&tiny(), StoredType::F32);
    let refuse = |tensors: &[SaveTensor], files: &[(String, Vec<u8>)], short: usize, part: &str| {
        let fill = |tensor: &SaveTensor, sink: &mut Sink| sink(&bytes_of(tensor)[short..]);
        let error = save_model(&scratch.0, &tiny(), tensors, fill, files).unwrap_err().to_string();
        assert!(error.contains(part), "{error}; expected {part}");
        assert_eq!(names(&scratch.0), before);
        assert!(Weights::open(&scratch.0).is_ok());
    };
    refuse(&tensors, &[], 4, "were given");
    refuse(&tensors[1..], &[], 0, "without model.embed_tokens.weight");
    refuse(&[&tensors[..], &tensors[..1]].concat(), &[], 0, "given twice");
    refuse(&tensors, &[("../x".to_owned(), vec![])], 0, "cannot be saved");
    refuse(&tensors, &[("config.json".to_owned(), vec![])], 0, "cannot be saved");
    let mut quantised = tensors.clone();
    quantised[0].dtype = StoredType::Q8_0;
    refuse(&quantised, &[], 0, "expected floats");
}

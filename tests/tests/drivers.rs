//! Drivers as machines bring them, by way of Mesa's software driver: with the vector widths of other processors, that
//! is with subgroups of 4, 8 and 16, and with features that are offered and then refused. A driver reads its variables
//! once, so each has a process of its own. `DEMASK_RUNNER=PROGRAM` starts these by another program, which may bring
//! another Mesa.

use std::process::Command;

use demask_tests::{binary, gpu};
use serde_json::Value;

/// What the binary prints as JSON on a driver with vectors of so many bits.
fn demask(width: u32, args: &[&str]) -> Value {
    let mut command = match std::env::var_os("DEMASK_RUNNER") {
        Some(runner) => {
            let mut command = Command::new(runner);
            command.arg(binary());
            command
        }
        None => Command::new(binary()),
    };
    command.args(args).args(["--json", "--quiet", "--no-tune", "--adapter", "llvmpipe"]);
    command.env("LP_NATIVE_VECTOR_WIDTH", width.to_string());
    let output = command.output().expect("the binary runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{width}: {args:?}: {told}");
    assert!(!told.contains("panicked"), "{width}: {args:?}: {told}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{width}: {args:?}: {e}"))
}

#[test]
fn a_software_driver_of_any_vector_width_computes_and_decodes() {
    let Some(gpu) = gpu() else { return };
    if !gpu.adapter().info.name.contains("llvmpipe") {
        println!("SKIPPED: {} is not Mesa's software driver", gpu.adapter().describe());
        return;
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/models/small-coder/model.gguf");
    let mut answers = Vec::new();
    for width in [128, 256, 512] {
        let doctor = demask(width, &["doctor"]);
        let index = doctor["chosen"].as_u64().expect("an adapter was chosen") as usize;
        let adapter = &doctor["adapters"][index];
        println!("{width}: {}, refused {}", adapter["driver"], adapter["refused"]);
        let size = width / 32;
        assert_eq!(adapter["features"]["subgroup_sizes"], serde_json::json!([size, size]));
        assert_eq!(doctor["ok"], true, "{width}: {}", doctor["selftest"]);
        let refused = adapter["refused"].as_array().expect("a list");
        for refusal in refused {
            assert!(refusal["what"].is_string() && refusal["why"].is_string(), "{refusal}");
            // Who refuses matrices has none.
            let is_coop = refusal["what"] == "EXPERIMENTAL_COOPERATIVE_MATRIX";
            let shapes = &adapter["features"]["cooperative_matrix"];
            assert!(!is_coop || shapes.as_array().is_some_and(Vec::is_empty), "{adapter}");
        }
        let prompt = ["generate", "--model", model, "--prompt", "def add(a, b):\n"];
        let options = ["--max-tokens", "12", "--mode", "ar", "--temperature", "0"];
        let answer = demask(width, &[&prompt[..], &options].concat());
        assert!(
            answer["token_ids"].as_array().is_some_and(|ids| !ids.is_empty()),
            "{width}: {answer}"
        );
        answers.push(answer["token_ids"].clone());
    }
    assert!(answers.iter().all(|a| *a == answers[0]), "{answers:?}");
}

//! The binary as people and scripts meet it: exit codes, what goes to stdout and what to stderr,
//! the shape of JSON.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use demask_engine::model::StoredType;
use demask_engine::model::merge::convert;
use demask_tests::{binary, golden, gpu, shared_data};
use serde_json::Value;

fn demask(args: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    // Choices of kernels are kept here, not among the user's.
    command.env("DEMASK_CACHE", env!("CARGO_TARGET_TMPDIR"));
    command.output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// The one object on stdout.
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e} in {}", text(&output.stdout)))
}

/// A failure: exit code 1, nothing on stdout, one line on stderr (behind notices) that names the
/// cause.
fn fails(args: &[&str], cause: &str) {
    let output = demask(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert_eq!(text(&output.stdout), "", "{args:?}");
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
    assert!(stderr.trim_end().ends_with(errors[0]), "{args:?}: more behind the error: {stderr}");
    assert!(errors[0].contains(cause), "{args:?}: {cause:?} is not in {stderr}");
}

/// A wrong command line: exit code 2 and the way to help.
fn misused(args: &[&str]) {
    let output = demask(args);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "", "{args:?}");
    assert!(text(&output.stderr).contains("--help"), "{args:?}");
}

/// A model in the tree, by ids only: it has no tokenizer.
fn tiny() -> String {
    golden("tiny").display().to_string()
}

/// A real one with a tokenizer.
fn stories() -> Option<String> {
    shared_data("stories260K/hf").map(|path| path.display().to_string())
}

#[test]
fn help_teaches_and_is_a_success() {
    let commands = ["demo", "doctor", "train", "generate", "infill", "edit", "score", "bench"];
    for command in commands {
        let output = demask(&[command, "--help"]);
        assert!(output.status.success());
        let help = text(&output.stdout);
        assert!(help.contains("Examples:"), "{command} has no examples");
        assert!(help.contains("--adapter") && help.contains("--json"), "{command}");
        let wide = help.lines().find(|l| l.chars().count() > 100);
        assert_eq!(wide, None, "{command}");
    }
    for command in [
        &["bench", "decode"][..],
        &["data", "build"],
        &["data", "show"],
        &["template"],
        &["tokenizer", "train"],
        &["report"],
        &["merge"],
        &["convert"],
    ] {
        let output = demask(&[command, &["--help"]].concat());
        let help = text(&output.stdout);
        assert!(output.status.success() && help.contains("--json"), "{command:?}");
        assert_eq!(help.lines().find(|l| l.chars().count() > 100), None, "{command:?}");
    }
    assert!(text(&demask(&["data", "--help"]).stdout).contains("Examples:"));
    assert!(text(&demask(&["--version"]).stdout).starts_with("demask "));
}

/// Text becomes a tokenizer, a dataset, and a model that was trained on it.
#[test]
fn the_program_describes_itself() {
    let said = |args: &[&str]| {
        let output = demask(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let short = said(&["-V"]);
    assert!(short.starts_with(concat!("demask ", env!("CARGO_PKG_VERSION"))), "{short}");
    assert_eq!(short.lines().count(), 1);
    let long = said(&["--version"]);
    for field in ["commit    ", "wgpu      3", "backends  ", "target    "] {
        assert!(long.contains(&format!("\n{field}")), "{field:?} is not in {long}");
    }
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = said(&["completions", shell]);
        assert!(script.contains("generate") && script.contains("max-tokens"), "{shell}");
    }
    misused(&["completions", "csh"]);
    assert!(said(&["man"]).contains(".TH demask 1"));
    let page = said(&["man", "data", "build"]);
    assert!(page.contains("demask data build") || page.contains("demask\\-data\\-build"), "{page}");
    misused(&["man", "data", "built"]);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("man1").display().to_string();
    assert_eq!(said(&["man", "--out", &out]), format!("{out}\n"));
    for page in ["demask.1", "demask-train.1", "demask-data-build.1"] {
        assert!(Path::new(&out).join(page).exists(), "{page}");
    }
}

#[test]
fn text_becomes_a_tokenizer_and_a_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::create_dir_all(folder.path().join("code/a")).unwrap();
    std::fs::write(folder.path().join("code/a/x.rs"), include_str!("cli.rs")).unwrap();
    std::fs::write(folder.path().join("code/a/y.rs"), include_str!("ops.rs")).unwrap();
    let chat = r#"{"prompt": "say hello", "response": "hello"}"#;
    std::fs::write(folder.path().join("chat.jsonl"), chat).unwrap();
    let (code, tokenizer, out) = (at("code"), at("tokenizer"), at("data"));
    let train = ["tokenizer", "train", &code, "--vocab-size", "400", "--out", &tokenizer, "--json"];
    assert_eq!(json(&demask(&train))["vocab_size"], 400);
    fails(&["data", "build", &code, "--out", &out], "--tokenizer");
    let build = ["data", "build", &code, "--tokenizer", &tokenizer, "--out", &out, "--json"];
    let made = json(&demask(&build));
    assert_eq!(made["sources"][0]["train"]["documents"], 2);
    let again = json(&demask(&build));
    assert_eq!(made["sources"], again["sources"]);
    let shown = text(&demask(&["data", "show", &out, "--documents", "1"]).stdout);
    assert!(shown.contains("kept") && shown.contains("The binary as people"), "{shown}");
    let recipe = format!(
        "tokenizer = {tokenizer:?}\n[[source]]\nname = \"chat\"\npaths = [{:?}]\nformat = \"prompt_response\"\n",
        at("chat.jsonl")
    );
    std::fs::write(folder.path().join("chat.toml"), recipe).unwrap();
    let made = json(&demask(&["data", "build", &at("chat.toml"), "--out", &at("chat"), "--json"]));
    let train = &made["sources"][0]["train"];
    assert!(train["learnt"].as_u64() < train["tokens"].as_u64(), "{train}");
    fails(&["data", "show", &at("nothing")], "demask data build");
}

#[test]
fn a_wrong_command_line_is_2() {
    misused(&["generate", "--no-such-option"]);
    misused(&["no-such-command"]);
    misused(&["generate", "--model", &tiny()]);
    misused(&["score", "--ids", "1,2"]);
    misused(&["score", "--model", &tiny(), "--ids", "1,x"]);
    misused(&["score", "--model", &tiny(), "--ids", "1,2", "--text", "a"]);
    misused(&["generate", "--model", &tiny(), "--prompt", "a", "--steps", "2", "--threshold", "1"]);
    misused(&["train", "recipe.toml"]);
}

#[test]
fn bad_files_are_one_line_and_1() {
    fails(&["score", "--model", "/no/such/model", "--ids", "1"], "/no/such/model");
    fails(&["generate", "--model", "/no/such/model", "--prompt", "a"], "/no/such/model");
    fails(&["demo", "--model", "/no/such/model"], "/no/such/model");
    fails(&["train", "/no/such/recipe.toml", "--out", "/no/such"], "/no/such/recipe.toml");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display().to_string();
    fails(&["score", "--model", &path, "--ids", "1"], "neither");
    std::fs::copy(golden("tiny/config.json"), folder.path().join("config.json")).unwrap();
    let weights = std::fs::read(golden("tiny/model.safetensors")).unwrap();
    for length in [0, 4, 100, weights.len() / 2, weights.len() - 1] {
        std::fs::write(folder.path().join("model.safetensors"), &weights[..length]).unwrap();
        fails(&["score", "--model", &path, "--ids", "1"], "model.safetensors");
    }
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "[model]\nform = 'x'\n").unwrap();
    let out = folder.path().join("out").display().to_string();
    fails(&["train", &recipe.display().to_string(), "--out", &out], "form");
}

#[test]
fn an_unknown_adapter_is_1_and_names_those_that_exist() {
    for command in [
        &["score", "--model", &tiny(), "--ids", "1", "--adapter", "nonsense"][..],
        &["doctor", "--json", "--quiet", "--adapter", "nonsense"],
    ] {
        let output = demask(command);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("nonsense") && stderr.contains("found: "), "{stderr}");
    }
}

#[test]
fn doctor_finds_the_kernels_right() {
    let Some(gpu) = gpu() else { return };
    let report = json(&demask(&["doctor", "--json"]));
    assert_eq!(report["ok"], true);
    assert_eq!(report["chosen"], gpu.adapter().index);
    assert_eq!(report["adapters"][gpu.adapter().index]["name"], gpu.adapter().info.name);
    let checks = report["selftest"].as_array().expect("a list");
    assert!(checks.len() >= 10 && checks.iter().all(|c| c["ok"] == true));
    assert!(report["matmul_gflops"].as_f64().is_some_and(|g| g > 0.0));
    let kernels = report["kernels"].as_object().expect("by class");
    assert_eq!(kernels.len(), 8);
    for (class, decision) in kernels {
        let chosen = decision["chosen"].as_str().expect("a name");
        let raced = decision["candidates"].as_object().expect("by kernel");
        let won = raced.is_empty() || raced[chosen]["milliseconds"].as_f64() > Some(0.0);
        assert!(won, "{class}: {decision}");
    }
    let output = demask(&["doctor", "--quiet"]);
    assert!(text(&output.stdout).contains("Self-test"));
    assert!(text(&output.stdout).contains("Kernels chosen"));
    // What was chosen once is not raced again.
    assert_eq!(json(&demask(&["doctor", "--json"]))["kernels"], report["kernels"]);
    assert!(!text(&demask(&["doctor", "--no-tune"]).stdout).contains("Kernels chosen"));
    assert_eq!(text(&output.stderr), "");
}

/// The loss of an independent framework is the mean of what `score` prints.
#[test]
fn score_agrees_with_the_golden_loss() {
    if gpu().is_none() {
        return;
    }
    let bytes = std::fs::read(golden("tiny/golden.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tokens = file.tensor("ar.tokens").unwrap();
    let ids: Vec<u32> = bytemuck::pod_collect_to_vec(tokens.data());
    let (mut sum, mut n) = (0.0, 0);
    for row in ids.chunks(tokens.shape()[1]) {
        let row: Vec<String> = row.iter().map(u32::to_string).collect();
        let report =
            json(&demask(&["score", "--model", &tiny(), "--ids", &row.join(","), "--json"]));
        let tokens = report["tokens"].as_array().expect("a list");
        assert_eq!(tokens.len(), row.len());
        assert!(tokens[0]["logprob"].is_null());
        let scores: Vec<f64> =
            tokens[1..].iter().map(|t| t["logprob"].as_f64().expect("a number")).collect();
        let mean = -scores.iter().sum::<f64>() / scores.len() as f64;
        let perplexity = report["perplexity"].as_f64().expect("a number");
        assert!((perplexity.ln() - mean).abs() < 1e-9);
        sum -= scores.iter().sum::<f64>();
        n += scores.len();
    }
    let golden: Value =
        serde_json::from_slice(&std::fs::read(golden("tiny/golden.json")).unwrap()).unwrap();
    let loss = golden["ar"]["loss"].as_f64().unwrap();
    assert!(
        (sum / f64::from(n as u32) - loss).abs() < 1e-5,
        "{} instead of {loss}",
        sum / n as f64
    );
}

#[test]
fn an_adapter_is_laid_over_a_model_or_merged_into_it() {
    let work = tempfile::tempdir().unwrap();
    let (adapter, out) = (golden("lora").display().to_string(), work.path().join("merged"));
    let out = out.to_str().unwrap();
    let report = json(&demask(&["merge", &tiny(), "--lora", &adapter, "--out", out, "--json"]));
    assert_eq!((&report["out"], &report["type"]), (&out.into(), &"F32".into()));
    let mean = work.path().join("mean").display().to_string();
    let report =
        json(&demask(&["merge", &tiny(), out, "--out", &mean, "--type", "bf16", "--json"]));
    assert_eq!(report["type"], "BF16");
    misused(&["merge", &tiny(), "--out", &mean]);
    misused(&["merge", &tiny(), out, "--lora", &adapter, "--out", &mean]);
    fails(&["merge", &tiny(), "--lora", &tiny(), "--out", &mean], "adapter_config.json");
    let tied = golden("tiny_tied").display().to_string();
    fails(&["merge", &tied, "--lora", &adapter, "--out", &mean], "do not fit");
    if gpu().is_none() {
        return;
    }
    let score = |model: &str, more: &[&str]| {
        let args = ["score", "--model", model, "--ids", "3,14,15,92,65,35", "--json"];
        json(&demask(&[&args, more].concat()))["perplexity"].as_f64().unwrap().ln()
    };
    let (beside, merged) = (score(&tiny(), &["--lora", &adapter]), score(out, &[]));
    assert!((beside - merged).abs() < 1e-4, "{beside} beside, {merged} merged");
    assert!((beside - score(&tiny(), &[])).abs() > 1e-2, "the adapter changes nothing");
}

#[test]
fn score_of_nothing_and_of_too_much() {
    if gpu().is_none() {
        return;
    }
    let score = |ids: &str| demask(&["score", "--model", &tiny(), "--ids", ids, "--json"]);
    for (ids, n) in [("", 0), ("5", 1)] {
        let report = json(&score(ids));
        assert_eq!(report["tokens"].as_array().map(Vec::len), Some(n));
        assert!(report["perplexity"].is_null() && report["bits_per_byte"].is_null());
    }
    fails(&["score", "--model", &tiny(), "--ids", "1,97"], "vocabulary");
    fails(&["score", "--model", &tiny(), "--ids", &["1"; 300].join(",")], "positions");
}

#[test]
fn score_reads_text_from_anywhere() {
    let (Some(stories), Some(_)) = (stories(), gpu()) else { return };
    let line = "Once upon a time";
    let from_option = json(&demask(&["score", "--model", &stories, "--text", line, "--json"]));
    let texts: Vec<&str> = from_option["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|t| t["text"].as_str())
        .collect();
    assert_eq!(texts.concat().trim_start(), line);
    assert!(from_option["bits_per_byte"].as_f64().is_some_and(|b| b > 0.0));

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), line).unwrap();
    let path = file.path().display().to_string();
    assert_eq!(
        json(&demask(&["score", "--model", &stories, "--file", &path, "--json"])),
        from_option
    );
    let mut piped = Command::new(binary());
    piped.args(["score", "--model", &stories, "--json"]);
    piped.stdin(std::fs::File::open(file.path()).unwrap());
    assert_eq!(json(&piped.output().unwrap()), from_option);
}

#[test]
fn generate_streams_what_it_reports() {
    let (Some(stories), Some(_)) = (stories(), gpu()) else { return };
    let args =
        ["generate", "--model", &stories, "--prompt", "Once upon a time", "--max-tokens", "12"];
    let report = json(&demask(&[&args[..], &["--json"]].concat()));
    let ids = report["token_ids"].as_array().expect("a list");
    assert_eq!(ids.len(), 12);
    assert_eq!(report["finish_reason"], "length");
    assert_eq!(report["mode"], "ar");
    assert_eq!(report["forwards"], 12);
    assert_eq!(report["tokens_per_forward"], 1.0);
    assert!(report["tokens_per_second"].as_f64().is_some_and(|r| r > 0.0));
    assert!(!report["prompt_token_ids"].as_array().expect("a list").is_empty());
    let plain = demask(&[&args[..], &["--quiet"]].concat());
    assert_eq!(text(&plain.stdout), report["text"].as_str().unwrap());
    assert_eq!(text(&plain.stderr), "");
    // The same seed is the same answer, another one is not.
    let sample = |seed: &str| {
        let options = ["--temperature", "1", "--seed", seed, "--json"];
        json(&demask(&[&args[..], &options].concat()))["token_ids"].clone()
    };
    assert_eq!(sample("3"), sample("3"));
    assert_ne!(sample("3"), sample("4"));
    fails(&[&args[..], &["--mode", "diffusion"]].concat(), "mask_token_id");
    fails(&[&args[..], &["--temperature", "-1"]].concat(), "temperature");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let (Some(stories), Some(_)) = (stories(), gpu()) else { return };
    let prompt = "Once upon a time";
    let mut child = Command::new(binary())
        .args(["generate", "--model", &stories, "--prompt", prompt, "--max-tokens", "200", "-q"])
        .arg("--no-tune")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()));
}

/// A model trained, stopped, resumed, and used: the run is the one that was never stopped.
#[test]
fn train_stops_resumes_and_leaves_a_model() {
    if gpu().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let code = folder.path().join("code");
    std::fs::create_dir(&code).unwrap();
    for i in 0..24 {
        let line = |j| format!("def f{i}_{j}(x, y):\n    return x + {i} * y - {j}\n\n");
        std::fs::write(code.join(format!("m{i}.py")), (0..40).map(line).collect::<String>())
            .unwrap();
    }
    let recipe = folder.path().join("recipe.toml");
    let toml = "seed = 3\n[model.fresh]\nvocab_size = 300\nhidden_size = 16\nintermediate_size = 32\nlayers = 1\n\
                heads = 2\nkv_heads = 1\n[data]\npaths = ['code']\nlength = 32\n\
                [optimizer]\nbatch = 2\nmicro_batch = 2\n\
                [[phase]]\nobjective = 'ar'\nsteps = 2\nlr = 1e-3\n\
                [[phase]]\nobjective = 'block_diffusion'\nsteps = 2\nlr = 1e-3\nblock_length = 4\n";
    std::fs::write(&recipe, toml).unwrap();
    let recipe = recipe.display().to_string();
    let run = |out: &str, options: &[&str]| {
        let out = folder.path().join(out).display().to_string();
        let args = ["train", &recipe, "--out", &out, "--json", "--no-tune"];
        json(&demask(&[&args[..], options].concat()))
    };
    let whole = run("whole", &[]);
    assert_eq!((&whole["finished"], &whole["step"]), (&Value::from(true), &Value::from(4)));
    let half = run("halves", &["--stop-after", "3"]);
    assert_eq!((&half["finished"], &half["step"]), (&Value::from(false), &Value::from(3)));
    let rest = run("halves", &[]);
    assert_eq!((&rest["resumed_from"], &rest["finished"]), (&Value::from(3), &Value::from(true)));
    assert_eq!(rest["loss"], whole["loss"]);

    let model = whole["model"].as_str().expect("a path");
    let args = ["generate", "--model", model, "--prompt", "def f", "--max-tokens", "9", "--json"];
    let answer = json(&demask(&args));
    assert_eq!(answer["mode"], "diffusion");
    let one_by_one = json(&demask(&[&args[..], &["--steps", "4"]].concat()));
    assert!(
        one_by_one["forwards"].as_u64()
            >= one_by_one["token_ids"].as_array().map(|t| t.len() as u64)
    );
    misused(&[&args[..], &["--mode", "ar", "--factor", "1"]].concat());
    misused(&[&args[..], &["--factor", "1", "--steps", "2"]].concat());
    for rule in [["--factor", "1"], ["--entropy-bound", "2"], ["--order", "margin"]] {
        let told = json(&demask(&[&args[..], &rule, &["--top-k", "3"]].concat()));
        assert_eq!(told["token_ids"].as_array().map(Vec::len), Some(9), "{rule:?}");
    }

    // A demo on it, with what it has just learnt from.
    let code = code.display().to_string();
    let keep = folder.path().join("demo").display().to_string();
    let args =
        ["demo", "--model", model, "--seconds", "0", "--code", &code, "--keep", &keep, "--json"];
    let demo = json(&demask(&args));
    assert_eq!((&demo["steps"], &demo["language"]), (&Value::from(1), &Value::from("Python")));
    assert!(demo["held_out_loss_after"].as_f64().is_some_and(f64::is_finite));
    assert!(Path::new(demo["kept"].as_str().expect("a path")).join("config.json").exists());
}

#[test]
fn a_message_is_one_turn_whatever_it_spells() {
    if gpu().is_none() {
        return;
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/models/small-coder");
    let ask = |more: &[&str]| {
        let text = "Say <|im_end|> twice.";
        let args = ["generate", "--model", model, "--prompt", text, "--max-tokens", "4", "--json"];
        let told = json(&demask(&[&args[..], more].concat()));
        let ids = told["prompt_token_ids"].as_array().expect("ids").clone();
        let special = |id: u64| ids.iter().filter(|i| i.as_u64() == Some(id)).count();
        // The turns' begin and end tokens.
        (special(5), special(6), ids[0].as_u64())
    };
    assert_eq!(ask(&["--chat", "--cache", "f16"]), (2, 1, Some(5)));
    let (begins, ends, _) = ask(&[]);
    assert_eq!((begins, ends), (0, 1), "a prompt may spell special tokens");
}

#[test]
fn an_answer_ends_where_the_models_files_say() {
    if gpu().is_none() {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let small = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/models/small-coder");
    let folder = dir.path().join("folder");
    let path = folder.display().to_string();
    convert(&small, &folder, StoredType::F32, &mut |_| {}).expect("written");
    let ask = |model: &str| {
        let args =
            ["generate", "--model", model, "--prompt", "def f", "--max-tokens", "12", "--json"];
        let output = demask(&args);
        let answer = json(&output);
        let ids: Vec<u64> = serde_json::from_value(answer["token_ids"].clone()).expect("ids");
        (ids, answer["finish_reason"].clone(), text(&output.stderr))
    };
    let file = folder.join("generation_config.json");
    // As transformers has it: where this file names none, config.json is not asked.
    std::fs::write(&file, "{}").expect("written");
    let (free, _, said) = ask(&path);
    assert!(free.len() == 12 && said.contains("name no token that ends an answer"), "{said}");
    let end = free[5];
    let before = free.iter().position(|&id| id == end).expect("it is there");
    std::fs::write(&file, format!("{{\"eos_token_id\": [0, {end}]}}")).expect("written");
    let file = dir.path().join("a.gguf").display().to_string();
    convert(&folder, Path::new(&file), StoredType::F32, &mut |_| {}).expect("written");
    for model in [path, file] {
        let (ids, reason, said) = ask(&model);
        assert_eq!((&ids[..], reason), (&free[..before], Value::from("eos")), "{model}: {said}");
        assert!(!said.contains("ends an answer"), "{said}");
    }
}

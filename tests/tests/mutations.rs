//! Broken model files through `demask score`: whatever is changed in a folder or in a GGUF header, the answer is the
//! right numbers or one line and exit code 1 or 2; never a panic, a hang, or memory beyond a bound.
//! Each test makes 250 of them; MUTATIONS sets another number.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use demask_engine::model::{LlamaConfig, Weights};
use demask_engine::philox::Philox;
use demask_tests::{binary, gpu, shared_data};
use serde_json::Value;

/// Address space of one run in KiB: the driver's own gigabytes and little beside them.
const ADDRESS_SPACE_KIB: u64 = 6 << 20;
const TIME_LIMIT: Duration = Duration::from_secs(60);
const FOLDER_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];

fn mutations() -> u32 {
    std::env::var("MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(250)
}

/// Runs `demask score` on 24 ids under the memory bound; panics if it does not end in time.
fn score(model: &Path) -> Output {
    let ids = (1..25).map(|i| (i * 19).to_string()).collect::<Vec<_>>().join(",");
    let script = format!("ulimit -v {ADDRESS_SPACE_KIB}; exec \"$0\" \"$@\"");
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .arg(binary())
        .args(["score", "--quiet", "--json", "--ids", &ids, "--model"])
        .arg(model)
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > TIME_LIMIT {
            child.kill().unwrap();
            panic!("score hangs on {}", model.display());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// The log-probabilities of a successful run, or the one line of a failed one.
fn outcome(output: &Output) -> Result<Vec<f64>, String> {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => {
            let json: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
            let tokens = json["tokens"].as_array().expect("tokens");
            Ok(tokens[1..]
                .iter()
                .map(|t| t["logprob"].as_f64().expect("a finite number"))
                .collect())
        }
        Some(1 | 2) => {
            let lines: Vec<&str> = stderr.lines().collect();
            assert!(lines.len() == 1 && lines[0].starts_with("error: "), "not one line: {stderr}");
            assert!(
                !lines[0].contains("internal error") && !lines[0].contains("panicked"),
                "{stderr}"
            );
            Err(stderr)
        }
        other => panic!("exit {other:?}: {stderr}"),
    }
}

/// One change to a file: flipped bytes, a huge number, a digit, a cut, a hole, something twice.
fn mutate(bytes: &mut Vec<u8>, header: usize, random: &mut Philox) -> String {
    let at = random.below(header as u32) as usize;
    match random.below(7) {
        0 => {
            bytes[at] ^= 1 << random.below(8);
            format!("bit flipped at {at}")
        }
        1 => {
            let end = (at + 8).min(header);
            bytes[at..end].fill(0xff);
            format!("0xff from {at}")
        }
        2 => {
            bytes.truncate(at);
            format!("cut at {at}")
        }
        3 => {
            let n = 1 + random.below(16) as usize;
            bytes.drain(at..(at + n).min(header));
            format!("{n} bytes removed at {at}")
        }
        4 => {
            let copy = bytes[at..(at + 24).min(header)].to_vec();
            bytes.splice(at..at, copy);
            format!("24 bytes doubled at {at}")
        }
        5 => {
            let digits: Vec<usize> = (0..header).filter(|&i| bytes[i].is_ascii_digit()).collect();
            let at = digits[random.below(digits.len() as u32) as usize];
            bytes[at] = b'0' + random.below(10) as u8;
            format!("another digit at {at}")
        }
        _ => {
            bytes[at] = random.next_u32() as u8;
            format!("another byte at {at}")
        }
    }
}

#[test]
fn a_mutated_folder_gives_the_right_numbers_or_one_line() {
    let (Some(_), Some(source)) = (gpu(), shared_data("stories260K/hf")) else { return };
    let right = outcome(&score(&source)).expect("the model as it is");
    let (mut good, mut refused) = (0, 0);
    for round in 0..mutations() {
        let mut random = Philox::new(21, [round, 0, 0]);
        let folder = tempfile::tempdir().unwrap();
        for file in FOLDER_FILES {
            fs::copy(source.join(file), folder.path().join(file)).unwrap();
        }
        let file = FOLDER_FILES[random.below(3) as usize];
        let path = folder.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        let header = match file {
            "model.safetensors" => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
            _ => bytes.len(),
        };
        let what = mutate(&mut bytes, header, &mut random);
        fs::write(&path, bytes).unwrap();
        match outcome(&score(folder.path())) {
            // A changed number of the config (rope_theta, say) is another, legal model.
            Ok(numbers) if file == "config.json" => good += numbers.len().min(1),
            Ok(numbers) => {
                assert_eq!(numbers, right, "round {round}: {file}, {what}: other numbers");
                good += 1;
            }
            Err(_) => refused += 1,
        }
    }
    println!("{good} right, {refused} refused");
    assert!(refused > 0, "no mutation was refused: the harness cannot fail");
}

/// A GGUF of the same model, written by this test.
fn gguf(source: &Path) -> (Vec<u8>, usize) {
    let (config, weights) = Weights::open(source).unwrap();
    let json: Value =
        serde_json::from_slice(&fs::read(source.join("tokenizer.json")).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens: Vec<(&str, u64)> =
        vocab.iter().map(|(token, id)| (token.as_str(), id.as_u64().unwrap())).collect();
    tokens.sort_by_key(|t| t.1);
    let mut w = Writer(Vec::new());
    let names = names(&config);
    w.0.extend(b"GGUF");
    w.0.extend(3u32.to_le_bytes());
    w.u64(names.len() as u64);
    w.u64(15);
    w.string("general.architecture", "llama");
    let numbers = [
        ("llama.context_length", config.max_position_embeddings),
        ("llama.embedding_length", config.hidden_size),
        ("llama.feed_forward_length", config.intermediate_size),
        ("llama.block_count", config.num_hidden_layers),
        ("llama.attention.head_count", config.num_attention_heads),
        ("llama.attention.head_count_kv", config.num_key_value_heads),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ];
    for (key, value) in numbers {
        w.value(key, 4, &(value as u32).to_le_bytes());
    }
    w.value("llama.attention.layer_norm_rms_epsilon", 6, &config.rms_norm_eps.to_le_bytes());
    w.value("llama.rope.freq_base", 6, &config.rope_theta.to_le_bytes());
    w.string("tokenizer.ggml.model", "llama");
    w.array("tokenizer.ggml.tokens", 8, tokens.len());
    tokens.iter().for_each(|(token, _)| w.text(token));
    w.array("tokenizer.ggml.scores", 6, tokens.len());
    (0..tokens.len()).for_each(|i| w.0.extend((-(i as f32)).to_le_bytes()));
    w.array("tokenizer.ggml.token_type", 5, tokens.len());
    // unknown, control, control, bytes, then normal
    let kind =
        |i: usize| -> i32 { [2, 3, 3].get(i).copied().unwrap_or(if i < 259 { 6 } else { 1 }) };
    (0..tokens.len()).for_each(|i| w.0.extend(kind(i).to_le_bytes()));
    let mut data: Vec<u8> = Vec::new();
    for (hf, name) in &names {
        let shape = weights.shape(hf).to_vec();
        w.text(name);
        w.0.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&extent| w.u64(extent as u64));
        w.0.extend(0u32.to_le_bytes());
        w.u64(data.len() as u64);
        let rows = weights.rows_f32(hf, 0..shape[0]).unwrap();
        let heads = match name.split('.').nth(2) {
            Some("attn_q") => config.num_attention_heads,
            Some("attn_k") => config.num_key_value_heads,
            _ => 0,
        };
        let rows =
            if heads > 0 { interleave(&rows, heads, config.head_dim, shape[1]) } else { rows };
        data.extend(rows.iter().flat_map(|v| v.to_le_bytes()));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    let header = w.0.len();
    w.0.resize(header.next_multiple_of(32), 0);
    w.0.extend(data);
    (w.0, header)
}

/// llama.cpp keeps the two halves of a rotary pair beside each other.
fn interleave(rows: &[f32], heads: usize, head_dim: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows.len());
    for head in 0..heads {
        for i in 0..head_dim {
            let from = head * head_dim + i % 2 * (head_dim / 2) + i / 2;
            out.extend(&rows[from * columns..][..columns]);
        }
    }
    out
}

/// Hugging Face and GGUF names of every weight.
fn names(config: &LlamaConfig) -> Vec<(String, String)> {
    let parts = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let mut names = vec![
        ("model.embed_tokens.weight".to_owned(), "token_embd.weight".to_owned()),
        ("model.norm.weight".to_owned(), "output_norm.weight".to_owned()),
    ];
    for layer in 0..config.num_hidden_layers {
        names.extend(parts.iter().map(|(hf, gguf)| {
            (format!("model.layers.{layer}.{hf}.weight"), format!("blk.{layer}.{gguf}.weight"))
        }));
    }
    names
}

struct Writer(Vec<u8>);

impl Writer {
    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.text(key);
        self.0.extend(kind.to_le_bytes());
        self.0.extend(bytes);
    }

    fn string(&mut self, key: &str, value: &str) {
        self.value(key, 8, &[]);
        self.text(value);
    }

    fn array(&mut self, key: &str, kind: u32, length: usize) {
        self.value(key, 9, &kind.to_le_bytes());
        self.u64(length as u64);
    }
}

#[test]
fn a_mutated_gguf_gives_finite_numbers_or_one_line() {
    let (Some(_), Some(source)) = (gpu(), shared_data("stories260K/hf")) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let (bytes, header) = gguf(&source);
    fs::write(&path, &bytes).unwrap();
    let right = outcome(&score(&source)).expect("the folder");
    assert_eq!(outcome(&score(&path)).expect("the GGUF as it is"), right, "one model, two formats");
    let (mut same, mut other, mut refused) = (0, 0, 0);
    for round in 0..mutations() {
        let mut random = Philox::new(22, [round, 0, 0]);
        let mut changed = bytes.clone();
        mutate(&mut changed, header, &mut random);
        fs::write(&path, changed).unwrap();
        match outcome(&score(&path)) {
            Ok(numbers) if numbers == right => same += 1,
            // The header holds eps, theta and the tokens' texts: other values there are another, legal model.
            Ok(_) => other += 1,
            Err(_) => refused += 1,
        }
    }
    println!("{same} right, {other} of another model, {refused} refused");
    assert!(refused > 0, "no mutation was refused: the harness cannot fail");
    assert!(other * 10 <= mutations(), "too many mutations change numbers unnoticed");
}

//! Random damage to model files: opening must answer, with a model or an error, and never panic or
//! dawdle.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::tests::{Scratch, write_model};
use super::*;
use crate::model::config::tests::tiny;
use crate::model::gguf::tests::tiny_gguf;
use crate::model::tokenizer::Tokenizer;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n.max(1)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

const NUMBERS: [u64; 12] =
    [0, 1, 2, 31, 33, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 61, 1 << 63, u64::MAX];
const WORDS: [&str; 16] = [
    "0",
    "1",
    "-1",
    "1e400",
    "18446744073709551615",
    "4294967296",
    "0.5",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
    "[[[[1]]]]",
    "NaN",
    "\"F32\"",
    "\"../x\"",
];

/// Damages the first `head` bytes of a binary file, or cuts it.
fn damage_binary(random: &mut Random, bytes: &mut Vec<u8>, head: usize) {
    let head = head.min(bytes.len().saturating_sub(9)).max(1);
    let at = random.below(head);
    match random.below(6) {
        0 => bytes.truncate(random.below(bytes.len())),
        1 => bytes[at] = random.below(256) as u8,
        2 => bytes[at] ^= 1 << random.below(8),
        3 => bytes[at..at + 8].copy_from_slice(&random.pick(&NUMBERS).to_le_bytes()),
        4 => {
            let from = random.below(head);
            let piece = bytes[from..(from + 24).min(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
        }
        _ => {
            let end = (at + 1 + random.below(16)).min(bytes.len());
            bytes.drain(at..end);
        }
    }
}

/// Replaces one JSON value (a run of digits, or a quoted text) by something else.
fn damage_text(random: &mut Random, text: &str) -> String {
    let starts: Vec<usize> = text.match_indices([':', ',', '[']).map(|(at, _)| at + 1).collect();
    // Half of the time near the beginning, where the structure is; vocabularies fill the rest.
    let among = if random.below(2) == 0 { starts.len() } else { starts.len().min(150) };
    let start = starts[random.below(among)];
    let rest = &text[start..];
    let end = start + rest.find([',', ']', '}']).unwrap_or(rest.len());
    let value = match random.below(3) {
        0 => random.pick(&NUMBERS).to_string(),
        _ => random.pick(&WORDS).to_owned(),
    };
    format!("{}{value}{}", &text[..start], &text[end..])
}

/// Opens whatever lies at `path`, and reads all of it if it opens.
fn use_model(path: &Path) -> Result<()> {
    let (config, weights) = Weights::open(path)?;
    for (name, shape) in config.parameters() {
        weights.rows_f32(&name, 0..shape[0])?;
        weights.rows_bytes(&name, 0..shape[0])?;
    }
    config.inv_freq();
    let tokenizer = Tokenizer::for_model(path, &config)?;
    let ids = tokenizer.encode("def f(x):\n    return 'größe' # 123", true)?;
    tokenizer.decode(&ids, false);
    Ok(())
}

#[test]
fn damaged_files_answer() {
    let scratch = Scratch::new("mutations");
    let (folder, gguf) = (scratch.0.join("hf"), scratch.0.join("model.gguf"));
    write_model(&folder, &tiny(), StoredType::F32);
    let gguf_bytes = tiny_gguf().finish();
    std::fs::write(&gguf, &gguf_bytes).unwrap();
    let (config, _) = Weights::open(&gguf).unwrap();
    Tokenizer::for_model(&gguf, &config).unwrap().save(&folder).unwrap();
    use_model(&folder).unwrap();
    use_model(&gguf).unwrap();

    let names = ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"];
    let originals = names.map(|name| std::fs::read(folder.join(name)).unwrap());
    let texts = originals.each_ref().map(|bytes| String::from_utf8_lossy(bytes));
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut accepted = 0;
    let total = 600;
    for round in 0..total {
        let file = random.below(names.len() + 2);
        let (path, target, bytes) = match file {
            0 => {
                let header = 8 + u64::from_le_bytes(*originals[0].first_chunk().unwrap()) as usize;
                let mut bytes = originals[0].clone();
                damage_binary(&mut random, &mut bytes, header);
                (&folder, folder.join(names[0]), bytes)
            }
            1..4 => {
                let damaged = damage_text(&mut random, &texts[file]).into_bytes();
                (&folder, folder.join(names[file]), damaged)
            }
            _ => {
                let mut bytes = gguf_bytes.clone();
                damage_binary(&mut random, &mut bytes, 6000);
                (&gguf, gguf.clone(), bytes)
            }
        };
        std::fs::write(&target, &bytes).unwrap();
        let start = Instant::now();
        let answer = catch_unwind(AssertUnwindSafe(|| use_model(path)));
        let Ok(answer) = answer else { panic!("round {round} panicked; see {}", target.display()) };
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "round {round} took {:?}",
            start.elapsed()
        );
        match answer {
            Ok(()) => accepted += 1,
            Err(e) => assert!(!e.to_string().contains('\n'), "round {round}: {e}"),
        }
        if file < names.len() {
            std::fs::write(&target, &originals[file]).unwrap();
        }
    }
    assert!(
        accepted < total / 2,
        "{accepted} of {total} damaged files were accepted; is anything damaged?"
    );
}

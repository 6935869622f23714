//! Text that an evaluation set and a document share: runs of consecutive words, punctuation and case aside.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::rows::json_rows;
use super::{fnv1a, recipe::Decontaminate};

/// Every run of n words of the evaluation sets, by hash.
pub struct Contamination {
    words: usize,
    runs: HashSet<u64>,
}

impl Contamination {
    /// Reads the evaluation sets: every string of every line.
    pub fn read(settings: &Decontaminate) -> Result<Contamination> {
        let mut all = Contamination { words: settings.words, runs: HashSet::new() };
        for path in &settings.against {
            let before = all.runs.len();
            json_rows(path, &mut |value, _| {
                all.add(&value);
                Ok(true)
            })?;
            ensure!(
                all.runs.len() > before,
                "decontaminate: {} has no text of {} words",
                path.display(),
                settings.words
            );
        }
        Ok(all)
    }

    fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => {
                let runs: Vec<u64> = runs(text, self.words).collect();
                self.runs.extend(runs);
            }
            Value::Array(values) => values.iter().for_each(|v| self.add(v)),
            Value::Object(fields) => fields.values().for_each(|v| self.add(v)),
            _ => {}
        }
    }

    /// Says the contents of the sets; not where they lie, nor their order.
    pub fn fingerprint(&self) -> u64 {
        self.runs.iter().fold(self.runs.len() as u64, |sum, run| sum.wrapping_add(*run))
    }

    /// Whether a text shares a run with an evaluation set.
    pub fn touches(&self, text: &str) -> bool {
        runs(text, self.words).any(|run| self.runs.contains(&run))
    }
}

/// Hashes of all runs of n words. Words have a letter: lists of numbers are alike everywhere.
fn runs(text: &str, n: usize) -> impl Iterator<Item = u64> {
    let words = text
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| w.contains(char::is_alphabetic));
    let hashes: Vec<u64> =
        words.map(|w| fnv1a(w.bytes().map(|b| b.to_ascii_lowercase()))).collect();
    let mut first = 0;
    std::iter::from_fn(move || {
        let run = hashes.get(first..first + n)?;
        first += 1;
        Some(fnv1a(run.iter().flat_map(|h| h.to_le_bytes())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_run_is_found_whatever_its_punctuation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.jsonl");
        let line = r#"{"prompt": "def a(b, c): return b + c * d", "tests": ["one two three four", "1, 2, 3, 4, 5"]}"#;
        std::fs::write(&path, line).unwrap();
        let read = |words| {
            let against = vec![path.clone()];
            Contamination::read(&Decontaminate { against, words })
        };
        let found = read(4).unwrap();
        assert!(found.touches("x; DEF A(b: c) # more"), "def a b c");
        assert!(found.touches("zero one.two\nthree four"));
        assert!(!found.touches("1, 2, 3, 4, 5, 6"), "numbers");
        assert!(!found.touches("def a b d") && !found.touches("one two three"));
        assert!(read(9).is_err(), "no text that long");
    }
}

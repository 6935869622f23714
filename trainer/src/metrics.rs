//! What a run records of a step, of held-out text and of what the model writes: files of one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// One line of `metrics.jsonl`: one optimiser step. Unknown fields are ignored, so a run may record more.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Optimiser step, counted over the whole run, not from the start of a phase.
    pub step: u64,
    /// The phase's name, such as "ar", "cpt" or "sft".
    pub phase: String,
    /// The training loss, weighted and divided by all maskable tokens; NaN (null in the file) if
    /// the run diverged.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Norm of the whole gradient before clipping; NaN as above.
    #[serde(deserialize_with = "null_is_nan")]
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens of the base sequences per second.
    pub tokens_per_second: f64,
    /// Tokens of the base sequences since the run began, this step included.
    #[serde(default)]
    pub tokens: u64,
    /// Unweighted cross-entropy per supervised token (masked ones under diffusion), in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ce_per_masked: Option<f64>,
    /// Upper end of the mask rate while the noise warms up; absent afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub u_max: Option<f64>,
    /// Block length under block diffusion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_length: Option<usize>,
    /// Under diffusion, the unweighted cross-entropy of the masked tokens whose block's mask rate lies in
    /// (i/n, (i + 1)/n], for n equal buckets; null where this step drew none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ce_by_rate: Vec<Option<f64>>,
    /// Floating-point operations of the step by the usual count (6 a weight and token, and attention), as a share of
    /// what the device was measured to do in f32 when the run began: above 1 on matrix units, or if other work
    /// disturbed that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flop_utilisation: Option<f64>,
    /// Most device memory in use so far, in bytes.
    #[serde(default)]
    pub peak_bytes: u64,
    /// Why the weights did not move in this step, if they did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// One line of `validation.jsonl`: held-out text at one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Optimiser steps done.
    pub step: u64,
    /// The phase's name.
    pub phase: String,
    /// Which text: "held_out" for all of it, or a source's name.
    pub text: String,
    /// Nats a token, under the unclipped schedule and its weights for diffusion: an upper bound of the negative
    /// log-likelihood, comparable with an autoregressive model's.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Unweighted cross-entropy per supervised token, in nats.
    #[serde(deserialize_with = "null_is_nan")]
    pub ce: f64,
    /// Tokens it is over.
    pub tokens: u64,
}

/// One line of `samples.jsonl`: what the model wrote at one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Optimiser steps done.
    pub step: u64,
    /// What it was given.
    pub prompt: String,
    /// What it wrote.
    pub text: String,
}

/// A log of one JSON object a line that is cut back to its length at the checkpoint on resume.
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens it and cuts off what was written after the checkpoint.
    pub fn open(path: &Path, bytes: u64) -> Result<Log> {
        let open = || -> std::io::Result<File> {
            let mut file =
                OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
            file.set_len(bytes)?;
            file.seek(SeekFrom::Start(bytes))?;
            Ok(file)
        };
        let file = open().with_context(|| format!("cannot open {}", path.display()))?;
        Ok(Log { path: path.to_owned(), file })
    }

    /// Adds a line.
    pub fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let line = serde_json::to_string(record)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .with_context(|| format!("cannot write {}; make room and resume", self.path.display()))
    }

    /// Its length once it is on the disk.
    pub fn synced(&mut self) -> Result<u64> {
        self.file.sync_all().with_context(|| self.path.display().to_string())?;
        self.file.stream_position().with_context(|| self.path.display().to_string())
    }
}

/// JSON has no NaN, and `serde_json` writes it as null.
pub(crate) fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// One line of a run's file: what it is of, and when.
pub trait Record: DeserializeOwned {
    /// Optimiser steps done.
    fn step(&self) -> u64;

    /// What tells it from the other records of its step, where there are several.
    fn subject(&self) -> &str {
        ""
    }
}

impl Record for Metrics {
    fn step(&self) -> u64 {
        self.step
    }
}

impl Record for Validation {
    fn step(&self) -> u64 {
        self.step
    }

    fn subject(&self) -> &str {
        &self.text
    }
}

impl Record for Sample {
    fn step(&self) -> u64 {
        self.step
    }

    fn subject(&self) -> &str {
        &self.prompt
    }
}

/// Reads a metrics file; see [`read_records`].
pub fn read_metrics(path: &Path) -> Result<Vec<Metrics>> {
    read_records(path)
}

/// Reads a file of records in order of steps. Where a resumed run repeated steps, its later lines count. An unfinished
/// last line, as an interrupted run leaves it, is passed over.
pub fn read_records<R: Record>(path: &Path) -> Result<Vec<R>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read {}; has the run started?", path.display()))?;
    let mut records: Vec<R> = Vec::new();
    for (i, line) in text.split_inclusive('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let record: R = match serde_json::from_str(line) {
            Ok(record) => record,
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => bail!("{} line {}: {e}; fix or delete the line", path.display(), i + 1),
        };
        records.truncate(records.partition_point(|r| r.step() <= record.step()));
        let same = records.iter().rposition(|r| r.step() < record.step()).map_or(0, |at| at + 1);
        match records[same..].iter_mut().find(|r| r.subject() == record.subject()) {
            Some(earlier) => *earlier = record,
            None => records.push(record),
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64) -> Metrics {
        let (phase, u_max) = if step < 30 { ("ar", None) } else { ("diffusion", Some(0.5)) };
        Metrics {
            step,
            phase: phase.to_string(),
            loss: 2.5,
            grad_norm: 0.25,
            lr: 1e-3,
            tokens_per_second: 5e4,
            ce_per_masked: u_max,
            u_max,
            ..Metrics::default()
        }
    }

    #[test]
    fn metrics_survive_a_file_a_restart_and_a_torn_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let line = |step| serde_json::to_string(&point(step)).unwrap() + "\n";
        let diverged = Metrics { loss: f64::NAN, ..point(60) };
        let mut file: String = (0..40).chain(30..60).map(line).collect();
        file += &(serde_json::to_string(&diverged).unwrap() + "\n");
        file += "{\"step\": 61, \"pha";
        std::fs::write(&path, &file).unwrap();
        let read = read_metrics(&path).unwrap();
        assert_eq!(read[..60], (0..60).map(point).collect::<Vec<_>>());
        assert!(read.len() == 61 && read[60].loss.is_nan());
        std::fs::write(&path, file + "\n").unwrap();
        let error = read_metrics(&path).unwrap_err().to_string();
        assert!(error.contains("line 72"), "{error}");
    }

    #[test]
    fn a_step_has_one_record_of_each_text_and_resuming_replaces_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("validation.jsonl");
        let line = |(step, text, loss): (u64, &str, f64)| {
            let (phase, text) = ("ar".to_owned(), text.to_owned());
            let record = Validation { step, phase, text, loss, ce: loss, tokens: 9 };
            serde_json::to_string(&record).unwrap() + "\n"
        };
        let read = || -> Vec<(u64, String, f64)> {
            let records: Vec<Validation> = read_records(&path).unwrap();
            records.into_iter().map(|r| (r.step, r.text, r.loss)).collect()
        };
        let mut file: String =
            [(5, "a", 3.0), (5, "b", 4.0), (10, "a", 2.0), (10, "b", 3.0)].map(line).concat();
        std::fs::write(&path, &file).unwrap();
        assert_eq!(read().len(), 4);
        file += &line((5, "b", 3.5));
        std::fs::write(&path, &file).unwrap();
        assert_eq!(
            read(),
            [(5, "a".into(), 3.0), (5, "b".into(), 3.5)],
            "step 10 was not reached again"
        );
        file += &[(10, "b", 1.0), (10, "a", 1.5)].map(line).concat();
        file += "{\"step\": 15, \"te";
        std::fs::write(&path, &file).unwrap();
        let again = [(5, "a", 3.0), (5, "b", 3.5), (10, "b", 1.0), (10, "a", 1.5)];
        assert_eq!(read(), again.map(|(step, text, loss)| (step, text.to_owned(), loss)));
    }
}

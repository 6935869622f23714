//! A run's records as TensorBoard event files, beside the JSON lines: `tensorboard --logdir RUN`.
//!
//! Messages are encoded by prost and records checked by the `crc` crate; the few fields below are declared here,
//! because the crates that know the whole format want `protoc` at build time (tboard, tfrecord) or an old image
//! library, panics at a full disk and write no text (tensorboard-rs).
//!
//! A file is never continued. A resumed run opens a new one, which sorts behind the older ones and begins with a start
//! of session at the first step to come: TensorBoard then drops what the older files hold from that step on.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use crc::{CRC_32_ISCSI, Crc};
use prost::Message;

use crate::metrics::{Metrics, Sample, Validation};

const FILE_PREFIX: &str = "events.out.tfevents.";
const FILE_VERSION: &str = "brain.Event:2";
const SESSION_START: i32 = 1;
const STRING_TYPE: i32 = 7;
const CRC32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<StringTensor>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<SummaryMetadata>,
}

/// A `TensorProto` of strings.
#[derive(Clone, PartialEq, Message)]
struct StringTensor {
    #[prost(int32, tag = "1")]
    dtype: i32,
    /// Without extents: a scalar.
    #[prost(message, optional, tag = "2")]
    shape: Option<Scalar>,
    #[prost(string, repeated, tag = "8")]
    string_val: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {}

#[derive(Clone, PartialEq, Message)]
struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

/// Writes one event file of a run.
pub struct TensorBoard {
    path: PathBuf,
    file: File,
    /// Prompts in the order they were met; a prompt's place names its samples.
    prompts: Vec<String>,
}

impl TensorBoard {
    /// Opens a new event file in `folder` for a run that has done `steps` steps.
    pub fn open(folder: &Path, steps: u64) -> Result<TensorBoard> {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let earlier = event_files(folder)?;
        let name = next_name(&earlier, seconds_since_epoch() as u64);
        let path = folder.join(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        let mut writer = TensorBoard { path, file, prompts: Vec::new() };
        writer.write(Event { file_version: Some(FILE_VERSION.to_owned()), ..Event::default() })?;
        if !earlier.is_empty() {
            // What was recorded at `steps` itself came before the checkpoint; at 0 there was none.
            let step = if steps == 0 { 0 } else { steps as i64 + 1 };
            let session_log = Some(SessionLog { status: SESSION_START });
            writer.write(Event { step, session_log, ..Event::default() })?;
        }
        Ok(writer)
    }

    /// One optimiser step.
    pub fn step(&mut self, metrics: &Metrics) -> Result<()> {
        let always = [
            ("train/loss", metrics.loss),
            ("train/grad_norm", metrics.grad_norm),
            ("train/lr", metrics.lr),
            ("train/tokens", metrics.tokens as f64),
            ("device/tokens_per_second", metrics.tokens_per_second),
            ("device/peak_bytes", metrics.peak_bytes as f64),
        ];
        let sometimes = [
            ("train/ce_per_masked", metrics.ce_per_masked),
            ("train/u_max", metrics.u_max),
            ("train/skipped", metrics.skipped.as_ref().map(|_| 1.0)),
            ("device/flop_utilisation", metrics.flop_utilisation),
        ];
        let sometimes = sometimes.iter().filter_map(|&(tag, value)| Some((tag, value?)));
        let mut values: Vec<Value> =
            always.into_iter().chain(sometimes).map(|(tag, v)| scalar(tag.to_owned(), v)).collect();
        let n = metrics.ce_by_rate.len() as f64;
        for (i, ce) in metrics.ce_by_rate.iter().enumerate() {
            let (low, high) = (i as f64 / n, (i as f64 + 1.0) / n);
            let tag = format!("ce_by_mask_rate/{low:.2}-{high:.2}");
            values.extend(ce.map(|ce| scalar(tag, ce)));
        }
        self.summary(metrics.step, values)
    }

    /// Held-out text.
    pub fn validation(&mut self, validation: &Validation) -> Result<()> {
        let of =
            |what: &str, value| scalar(format!("validation_{what}/{}", validation.text), value);
        let values = vec![of("loss", validation.loss), of("ce", validation.ce)];
        self.summary(validation.step, values)
    }

    /// What the model wrote, shown as a block of code behind its prompt.
    pub fn sample(&mut self, sample: &Sample) -> Result<()> {
        let known = self.prompts.iter().position(|p| *p == sample.prompt);
        let place = known.unwrap_or_else(|| {
            self.prompts.push(sample.prompt.clone());
            self.prompts.len() - 1
        });
        let words = sample.prompt.split_whitespace().collect::<Vec<_>>().join(" ");
        let name: String = words.chars().take(48).collect();
        // Shown as Markdown: indented text is code, whatever it contains.
        let whole = format!("{}{}", sample.prompt, sample.text);
        let code: Vec<String> = whole.lines().map(|line| format!("    {line}")).collect();
        let tensor = StringTensor {
            dtype: STRING_TYPE,
            shape: Some(Scalar {}),
            string_val: vec![code.join("\n")],
        };
        let plugin_data = Some(PluginData { plugin_name: "text".to_owned() });
        let value = Value {
            tag: format!("samples/{} {name}", place + 1),
            simple_value: None,
            tensor: Some(tensor),
            metadata: Some(SummaryMetadata { plugin_data }),
        };
        self.summary(sample.step, vec![value])
    }

    /// Brings all to the disk. Records are written at once, so a reader need not wait for this.
    pub fn flush(&mut self) -> Result<()> {
        let result = self.file.sync_data();
        result
            .with_context(|| format!("cannot write {}; make room and resume", self.path.display()))
    }

    fn summary(&mut self, step: u64, value: Vec<Value>) -> Result<()> {
        let summary = Some(Summary { value });
        self.write(Event { step: step as i64, summary, ..Event::default() })
    }

    fn write(&mut self, mut event: Event) -> Result<()> {
        event.wall_time = seconds_since_epoch();
        let result = self.file.write_all(&record(&event.encode_to_vec()));
        result
            .with_context(|| format!("cannot write {}; make room and resume", self.path.display()))
    }
}

fn scalar(tag: String, value: f64) -> Value {
    Value { tag, simple_value: Some(value as f32), tensor: None, metadata: None }
}

/// Length, its checksum, data, their checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let sums = [masked(&length).to_le_bytes(), masked(data).to_le_bytes()];
    [&length[..], &sums[0], data, &sums[1]].concat()
}

/// The format's checksum: CRC-32C, rotated and moved.
fn masked(data: &[u8]) -> u32 {
    CRC32C.checksum(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn seconds_since_epoch() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Names of the event files in a folder, in the order that TensorBoard reads them.
fn event_files(folder: &Path) -> Result<Vec<String>> {
    let list = || -> std::io::Result<Vec<String>> {
        let names = fs::read_dir(folder)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<Vec<String>>>()?;
        Ok(names.into_iter().filter(|name| name.starts_with(FILE_PREFIX)).collect())
    };
    let mut names = list().with_context(|| format!("cannot list {}", folder.display()))?;
    names.sort();
    Ok(names)
}

/// A name behind all earlier ones, also within one second and after a clock was set back.
fn next_name(earlier: &[String], now: u64) -> String {
    let second = |name: &String| name[FILE_PREFIX.len()..].split('.').next()?.parse().ok();
    let latest: u64 = earlier.iter().filter_map(second).max().unwrap_or(0);
    format!("{FILE_PREFIX}{:010}.{:06}", now.max(latest), earlier.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Events of a file, with lengths and checksums checked.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut rest, mut events) = (&bytes[..], Vec::new());
        let word = |b: &[u8]| u32::from_le_bytes(b[..4].try_into().unwrap());
        while !rest.is_empty() {
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let (data, sum) = (&rest[12..12 + n], word(&rest[12 + n..]));
            assert_eq!((word(&rest[8..]), sum), (masked(&rest[..8]), masked(data)));
            events.push(Event::decode(data).unwrap());
            rest = &rest[16 + n..];
        }
        events
    }

    fn values(event: &Event) -> Vec<(&str, f32)> {
        let values = event.summary.iter().flat_map(|s| &s.value);
        values.filter_map(|v| Some((v.tag.as_str(), v.simple_value?))).collect()
    }

    #[test]
    fn checksums_are_those_of_the_format() {
        assert_eq!(CRC32C.checksum(b"123456789"), 0xe306_9283);
        // A header that TensorFlow wrote: the length 24 and its masked checksum.
        assert_eq!(record(&[0; 24])[..12], [24, 0, 0, 0, 0, 0, 0, 0, 163, 127, 75, 34]);
    }

    #[test]
    fn records_come_back_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = TensorBoard::open(folder.path(), 0).unwrap();
        let metrics = Metrics {
            step: 7,
            loss: 2.5,
            grad_norm: f64::NAN,
            lr: 1e-3,
            ce_per_masked: Some(3.25),
            ce_by_rate: vec![None, Some(1.5)],
            skipped: Some("the gradient is not finite".into()),
            ..Metrics::default()
        };
        writer.step(&metrics).unwrap();
        let validation = Validation {
            step: 8,
            phase: "ar".into(),
            text: "held_out".into(),
            loss: 1.25,
            ce: 1.5,
            tokens: 99,
        };
        writer.validation(&validation).unwrap();
        let sample =
            |step, prompt: &str| Sample { step, prompt: prompt.into(), text: " 1\n<b>".into() };
        for (step, prompt) in [(8, "def f():\n    return"), (8, "x ="), (9, "x =")] {
            writer.sample(&sample(step, prompt)).unwrap();
        }
        writer.flush().unwrap();
        let events = read(&writer.path);
        assert_eq!(events[0].file_version.as_deref(), Some(FILE_VERSION));
        assert_eq!(events.iter().map(|e| e.step).collect::<Vec<_>>(), [0, 7, 8, 8, 8, 9]);
        assert!(events.iter().all(|e| e.session_log.is_none() && e.wall_time > 1e9));
        let step = values(&events[1]);
        for expected in [
            ("train/loss", 2.5),
            ("train/lr", 1e-3),
            ("train/ce_per_masked", 3.25),
            ("train/skipped", 1.0),
            ("ce_by_mask_rate/0.50-1.00", 1.5),
        ] {
            assert!(step.contains(&expected), "{expected:?} in {step:?}");
        }
        assert!(step.iter().any(|(tag, v)| *tag == "train/grad_norm" && v.is_nan()));
        assert!(
            !step.iter().any(|(tag, _)| ["train/u_max", "ce_by_mask_rate/0.00-0.50"].contains(tag))
        );
        let held_out = [("validation_loss/held_out", 1.25), ("validation_ce/held_out", 1.5)];
        assert_eq!(values(&events[2]), held_out);
        let text = |event: &Event| {
            let value = &event.summary.as_ref().unwrap().value[0];
            let plugin = value.metadata.clone().unwrap().plugin_data.unwrap().plugin_name;
            assert_eq!(plugin, "text");
            (value.tag.clone(), value.tensor.clone().unwrap().string_val.concat())
        };
        let code = "    def f():\n        return 1\n    <b>";
        assert_eq!(text(&events[3]), ("samples/1 def f(): return".into(), code.into()));
        assert_eq!(text(&events[4]).0, "samples/2 x =");
        assert_eq!(text(&events[5]).0, "samples/2 x =");
    }

    #[test]
    fn a_resumed_run_takes_back_the_steps_it_repeats() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for (steps, doing) in [(0, 1..6), (4, 5..9), (8, 9..10)] {
            let mut writer = TensorBoard::open(folder.path(), steps).unwrap();
            for step in doing {
                writer.step(&Metrics { step, ..Metrics::default() }).unwrap();
            }
            paths.push(writer.path);
        }
        let names = event_files(folder.path()).unwrap();
        let written: Vec<String> =
            paths.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert_eq!(names, written, "files sort as they were written");
        let started = |path| {
            let events = read(path).into_iter();
            events.filter(|e| e.session_log.is_some()).map(|e| e.step).collect::<Vec<_>>()
        };
        assert_eq!(
            [started(&paths[0]), started(&paths[1]), started(&paths[2])],
            [vec![], vec![5], vec![9]]
        );
        let back = next_name(&names, 12);
        assert!(back > names[2], "{back} after the clock was set back");
    }
}

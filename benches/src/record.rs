//! The file that `demask bench run` writes and `compare` reads: one JSON object, described in docs/regression-gate.md.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use demask_engine::gpu::VariantUse;
use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::measure::{Clock, Prepared, Sample, Times};
use crate::stats;

/// What the file calls itself.
pub const SCHEMA: &str = "demask-bench";
/// Raised whenever an older reader would misunderstand.
pub const VERSION: u32 = 1;
/// Larger files are none of ours.
const MOST_BYTES: u64 = 64 << 20;

/// One run of a suite on one device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// By what and when.
    pub made: Made,
    /// On what.
    pub device: Device,
    /// What `seconds` are read from.
    pub clock: Clock,
    /// What the controls reached at their best.
    pub limits: Limits,
    /// In the order they were measured.
    pub cases: Vec<CaseRecord>,
}

/// The program and the run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Made {
    /// Version of demask.
    pub demask: String,
    /// Commit, where it is known.
    pub commit: Option<String>,
    /// Seconds since 1970.
    pub unix_time: u64,
    /// The suite's name.
    pub suite: String,
    /// How long it took, in seconds.
    pub took: f64,
    /// Shared by two records whose samples were taken in turn: sample i of one beside sample i of the other.
    pub session: Option<u64>,
}

/// The device's limits, measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// 10⁹ floating-point operations a second, multiply-adds in registers.
    pub gflops: f64,
    /// 10⁹ bytes a second, read and written by a copy.
    pub gbytes: f64,
}

/// One case's times, or why it has none.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CaseRecord {
    /// The case.
    pub name: String,
    /// Floating-point operations of one call.
    pub flops: f64,
    /// Bytes that one call must move at least.
    pub bytes: f64,
    /// Kernels of one call.
    pub kernels: Vec<KernelRecord>,
    /// Why its result is wrong; then nothing below is there.
    pub wrong: Option<String>,
    /// How it was checked.
    pub checked: Option<CheckRecord>,
    /// Calls in one sample.
    pub calls: u32,
    /// Median seconds of one call on the record's clock; 0 if wrong.
    pub seconds: f64,
    /// Seconds of one call from timestamps, the shortest of a few.
    pub device: Option<f64>,
    /// Wall seconds of one call, the shortest of a few.
    pub wall: Option<f64>,
    /// Device memory of one call at its peak, inputs left out; older records do not say.
    #[serde(default)]
    pub peak_bytes: Option<u64>,
    /// Every sample, in the order taken.
    pub samples: Vec<Sample>,
}

/// One kernel of a case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelRecord {
    /// Name, constants, imports.
    pub variant: String,
    /// Hash of the expanded WGSL, 16 hexadecimal digits.
    pub hash: String,
    /// Dispatches of it in one call.
    pub dispatches: u64,
}

/// What was compared with the reference.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct CheckRecord {
    /// Values compared.
    pub values: usize,
    /// Of this many.
    pub of: usize,
    /// The worst error, in units of what is allowed.
    pub worst: f64,
}

impl CaseRecord {
    /// From its samples.
    pub fn new(prepared: &Prepared, samples: Vec<Sample>, times: &[Times]) -> CaseRecord {
        let seconds: Vec<f64> = samples.iter().map(|s| s.seconds).collect();
        let shortest = |f: fn(&Times) -> Option<f64>| times.iter().filter_map(f).reduce(f64::min);
        let checked = prepared.checked;
        let (values, of, worst) = (checked.values, checked.of, checked.worst);
        CaseRecord {
            name: prepared.work.name.clone(),
            flops: prepared.work.cost.flops,
            bytes: prepared.work.cost.bytes,
            kernels: kernels(&prepared.kernels),
            wrong: None,
            checked: Some(CheckRecord { values, of, worst }),
            calls: prepared.calls,
            seconds: stats::median(&seconds),
            device: shortest(|t| t.device),
            wall: shortest(|t| Some(t.wall)),
            peak_bytes: Some(prepared.peak_bytes),
            samples,
        }
    }

    /// A case whose result is wrong has no time.
    pub fn wrong(name: String, why: String) -> CaseRecord {
        CaseRecord {
            name,
            flops: 0.0,
            bytes: 0.0,
            kernels: Vec::new(),
            wrong: Some(why),
            checked: None,
            calls: 0,
            seconds: 0.0,
            device: None,
            wall: None,
            peak_bytes: None,
            samples: Vec::new(),
        }
    }

    /// 10⁹ floating-point operations a second.
    pub fn gflops(&self) -> f64 {
        self.rate(self.flops)
    }

    /// 10⁹ bytes a second.
    pub fn gbytes(&self) -> f64 {
        self.rate(self.bytes)
    }

    /// Rates are of the device where it has timestamps: processor time counts all cores, so it is no duration.
    fn rate(&self, amount: f64) -> f64 {
        let seconds = self.device.or(self.wall).unwrap_or(self.seconds);
        if seconds > 0.0 { amount / seconds / 1e9 } else { 0.0 }
    }

    /// Share of the limit that binds it: the larger of the two.
    pub fn of_limit(&self, limits: &Limits) -> f64 {
        (self.gflops() / limits.gflops).max(self.gbytes() / limits.gbytes)
    }
}

/// For the record.
pub fn kernels(used: &[VariantUse]) -> Vec<KernelRecord> {
    let one = |v: &VariantUse| KernelRecord {
        variant: v.variant.clone(),
        hash: format!("{:016x}", v.hash),
        dispatches: v.dispatches,
    };
    used.iter().map(one).collect()
}

impl Record {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Record> {
        let file = path.display();
        let size = std::fs::metadata(path).with_context(|| format!("cannot read {file}"))?.len();
        ensure!(size <= MOST_BYTES, "{file} has {size} bytes: not a record of demask bench run");
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {file}"))?;
        Self::parse(&text).with_context(|| format!("{file} is not a usable benchmark record"))
    }

    fn parse(text: &str) -> Result<Record> {
        let again = "make it again with `demask bench run --json FILE`";
        let value: serde_json::Value =
            serde_json::from_str(text).with_context(|| format!("not JSON; {again}"))?;
        let schema = value.get("schema").and_then(|v| v.as_str()).unwrap_or("none");
        ensure!(schema == SCHEMA, "its schema is {schema}, not {SCHEMA}; {again}");
        let version = value.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version != u64::from(VERSION) {
            bail!("its version is {version}, this demask reads {VERSION}; {again} and this demask");
        }
        let record: Record =
            serde_json::from_value(value).with_context(|| format!("a field is amiss; {again}"))?;
        record.check().with_context(|| again.to_owned())?;
        Ok(record)
    }

    fn check(&self) -> Result<()> {
        ensure!(!self.cases.is_empty(), "it holds no case");
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let Limits { gflops, gbytes } = self.limits;
        ensure!(positive(gflops) && positive(gbytes), "its limits are not positive");
        let mut names: Vec<&str> = self.cases.iter().map(|c| c.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|w| w[0] == w[1]) {
            bail!("case {:?} is there twice", twice[0]);
        }
        for case in self.cases.iter().filter(|c| c.wrong.is_none()) {
            let name = &case.name;
            ensure!(!case.samples.is_empty(), "case {name:?} has no samples");
            let fine = |s: &Sample| positive(s.seconds) && positive(s.fma) && positive(s.copy);
            ensure!(case.samples.iter().all(fine), "case {name:?} has a time that is not positive");
            ensure!(positive(case.seconds), "case {name:?} has no time");
            let known = [case.device, case.wall];
            ensure!(known.into_iter().flatten().all(positive), "case {name:?} has a negative time");
            let cost = [case.flops, case.bytes].iter().all(|v| v.is_finite() && *v >= 0.0);
            ensure!(cost, "case {name:?} has a negative cost");
        }
        Ok(())
    }

    /// Writes the file whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).context("a record is always JSON")? + "\n";
        write_whole(path, &text)
    }

    /// A record of what this program measured just now.
    pub fn new(
        suite: &str,
        commit: Option<String>,
        device: Device,
        clock: Clock,
        limits: Limits,
    ) -> Record {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let made = Made {
            demask: env!("CARGO_PKG_VERSION").into(),
            commit,
            unix_time: now.map_or(0, |t| t.as_secs()),
            suite: suite.into(),
            took: 0.0,
            session: None,
        };
        Record {
            schema: SCHEMA.into(),
            version: VERSION,
            made,
            device,
            clock,
            limits,
            cases: Vec::new(),
        }
    }

    /// The commit's first characters, else the version.
    pub fn label(&self) -> String {
        match &self.made.commit {
            Some(commit) => commit.chars().take(10).collect(),
            None => format!("v{}", self.made.demask),
        }
    }
}

/// Writes a file whole or not at all: beside it first, then renamed.
pub fn write_whole(path: &Path, text: &str) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let fail = || format!("cannot write {}", path.display());
    let mut builder = tempfile::Builder::new();
    // A temporary file is its owner's alone; this one is for others to read, as far as the umask lets them.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(folder).with_context(fail)?;
    file.write_all(text.as_bytes()).with_context(fail)?;
    file.persist(path).map_err(|e| e.error).with_context(fail)?;
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::device::tests::device;

    /// A record of one case with the given times.
    pub(crate) fn record(seconds: &[f64]) -> Record {
        let sample = |&seconds: &f64| Sample { seconds, fma: 1e-3, copy: 2e-3 };
        let kernel = |hash: &str| KernelRecord {
            variant: "swiglu".into(),
            hash: hash.into(),
            dispatches: 1,
        };
        let case = CaseRecord {
            flops: 1e6,
            bytes: 1e6,
            kernels: vec![kernel("0123456789abcdef")],
            wrong: None,
            checked: Some(CheckRecord { values: 4, of: 4, worst: 0.1 }),
            calls: 3,
            seconds: stats::median(seconds),
            device: Some(1e-3),
            wall: Some(2e-3),
            samples: seconds.iter().map(sample).collect(),
            ..CaseRecord::wrong("swiglu [3]".into(), String::new())
        };
        Record {
            schema: SCHEMA.into(),
            version: VERSION,
            made: Made {
                demask: "0.1.0".into(),
                commit: Some("0123456789abcdef".into()),
                unix_time: 1_800_000_000,
                suite: "quick".into(),
                took: 1.0,
                session: None,
            },
            device: device(),
            clock: Clock::Device,
            limits: Limits { gflops: 100.0, gbytes: 10.0 },
            cases: vec![case],
        }
    }

    #[test]
    fn a_record_survives_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let mut whole = record(&[1e-3, 1.5e-3, 1.1e-3]);
        whole.cases.push(CaseRecord::wrong("rope".into(), "[3] is 1 instead of 2".into()));
        whole.write(&path).unwrap();
        let back = Record::read(&path).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), serde_json::to_value(&whole).unwrap());
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }

    #[test]
    fn hostile_files_are_refused_with_a_reason() {
        let good = serde_json::to_value(record(&[1e-3])).unwrap();
        let refused = |change: &dyn Fn(&mut serde_json::Value), why: &str| {
            let mut value = good.clone();
            change(&mut value);
            let e = format!("{:#}", Record::parse(&value.to_string()).expect_err(why));
            assert!(e.contains(why) && e.contains("bench run"), "{e}");
        };
        assert!(Record::parse(&good.to_string()).is_ok());
        refused(&|v| v["version"] = 2.into(), "version is 2");
        refused(&|v| v["schema"] = "criterion".into(), "schema is criterion");
        refused(&|v| v["cases"] = serde_json::json!([]), "no case");
        refused(&|v| v["cases"][0]["samples"] = serde_json::json!([]), "no samples");
        refused(&|v| v["cases"][0]["samples"][0]["fma"] = 0.into(), "not positive");
        refused(&|v| v["cases"][0]["samples"][0]["seconds"] = "fast".into(), "a field is amiss");
        refused(&|v| v["cases"][0]["seconds"] = (-1).into(), "no time");
        refused(&|v| v["limits"]["gflops"] = 0.into(), "limits");
        refused(
            &|v| {
                v.as_object_mut().unwrap().remove("device");
            },
            "a field is amiss",
        );
        refused(
            &|v| {
                let case = v["cases"][0].clone();
                v["cases"].as_array_mut().unwrap().push(case);
            },
            "twice",
        );
        for text in ["", "{", "[]", "nul", "\u{0}", &"[".repeat(10_000)] {
            assert!(Record::parse(text).is_err(), "{text:.20}");
        }
    }
}

//! Two programs in turn on one device: each runs as a worker that measures what it is told, one at a time, in the order
//! A B B A. What slows the machine slows both, so a small change is found where two runs one after the other would
//! only differ by the weather. Workers are started afresh between sessions, because memory lands elsewhere each time.
//!
//! The protocol is one JSON object a line, asked and answered.

use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::compare::{Comparison, Verdict, compare};
use crate::device::Device;
use crate::measure::{Clock, Prepared, Sample, Session, Times};
use crate::record::{CaseRecord, Limits, Record};
use crate::stats;
use crate::suite::{Suite, entries};

/// Raised when an older worker would misunderstand.
const PROTOCOL: u32 = 1;
/// Quads of a case in the first session, in each further visit, and at most.
const FIRST: usize = 24;
const MORE: usize = 12;
const MOST: usize = 400;
/// Quads without which nothing is decided, as far as the budget goes: of fewer even the interval is a guess.
const LEAST: usize = 40;

/// What a worker says first.
#[derive(Serialize, Deserialize)]
struct Hello {
    protocol: u32,
    commit: Option<String>,
    device: Device,
    clock: Clock,
    names: Vec<String>,
}

/// What it is asked.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Ask {
    /// Check and warm up a case: answers a [`CaseRecord`] without samples.
    Prepare(String),
    /// One sample of so many calls: answers seconds.
    Sample(String, u32),
    /// Both controls: answers two times.
    Control,
    /// The device's limits: answers [`Limits`].
    Limits,
}

/// Serves a parent over stdin and stdout until stdin ends. `commit` is the one that this program was built from.
pub fn work(suite: &Suite, adapter: Option<String>, commit: Option<String>) -> Result<()> {
    let session = Session::open(adapter)?;
    let mut left = entries(&session.gpu, suite);
    let hello = Hello {
        protocol: PROTOCOL,
        commit,
        device: Device::of(&session.gpu),
        clock: session.clock,
        names: left.iter().map(|e| e.name.clone()).collect(),
    };
    let mut out = std::io::stdout().lock();
    let mut say = |value: Value| -> Result<()> {
        writeln!(out, "{value}")?;
        Ok(out.flush()?)
    };
    say(serde_json::to_value(hello)?)?;
    let mut ready: Vec<Prepared> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let ask: Ask = serde_json::from_str(&line?).context("the parent asked nonsense")?;
        say(match ask {
            Ask::Prepare(name) => {
                let at = left.iter().position(|e| e.name == name).context("an unknown case")?;
                match session.prepare(left.swap_remove(at).make(&session.gpu)?)? {
                    Err((name, why)) => serde_json::to_value(CaseRecord::wrong(name, why))?,
                    Ok(prepared) => {
                        let times: [Times; 1] = [session.times(&prepared)?];
                        let seconds = [session.sample(&prepared, prepared.calls)?];
                        let samples =
                            seconds.map(|seconds| Sample { seconds, fma: 1.0, copy: 1.0 });
                        let record = CaseRecord::new(&prepared, samples.to_vec(), &times);
                        ready.push(prepared);
                        serde_json::to_value(record)?
                    }
                }
            }
            Ask::Sample(name, calls) => {
                let found = ready.iter().find(|p| p.work.name == name);
                session.sample(found.context("a case that was not prepared")?, calls)?.into()
            }
            Ask::Control => session.control()?.to_vec().into(),
            Ask::Limits => serde_json::to_value(session.limits()?)?,
        })?;
    }
    Ok(())
}

/// A running worker.
struct Worker {
    path: PathBuf,
    child: Child,
    asks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    hello: Hello,
}

impl Worker {
    fn start(path: &Path, suite: &Suite, adapter: Option<&str>) -> Result<Worker> {
        let file = path.display();
        let mut command = Command::new(path);
        command.args(["bench", "worker", "--suite", suite.name()]);
        command.args(adapter.iter().flat_map(|a| ["--adapter", a]));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run {file}"))?;
        let asks = child.stdin.take();
        let mut answers = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut line = String::new();
        answers.read_line(&mut line).with_context(|| format!("reading from {file}"))?;
        let protocol = |v: &Value| v.get("protocol").and_then(Value::as_u64);
        let value: Value = serde_json::from_str(&line).unwrap_or_default();
        if protocol(&value) != Some(u64::from(PROTOCOL)) {
            drop(asks);
            let output = child.wait_with_output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            let said =
                said.lines().find(|l| l.starts_with("error: ")).unwrap_or("no more is known");
            bail!(
                "{file} does not serve as a bench worker ({said}); both programs must be demask of \
                 a version with `bench ab`, protocol {PROTOCOL}"
            );
        }
        let hello =
            serde_json::from_value(value).with_context(|| format!("{file}: its greeting"))?;
        Ok(Worker { path: path.to_owned(), child, asks, answers, hello })
    }

    fn ask<T: serde::de::DeserializeOwned>(&mut self, ask: &Ask) -> Result<T> {
        let gone = || format!("the worker {} ended before its time", self.path.display());
        let asks = self.asks.as_mut().context("a pipe")?;
        writeln!(asks, "{}", serde_json::to_string(ask)?).with_context(gone)?;
        let mut line = String::new();
        self.answers.read_line(&mut line).with_context(gone)?;
        serde_json::from_str(&line).with_context(gone)
    }
}

impl Drop for Worker {
    /// The end of its stdin ends a worker; one that hangs in a driver is killed.
    fn drop(&mut self) {
        drop(self.asks.take());
        let since = Instant::now();
        while since.elapsed() < Duration::from_secs(5) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What to compare, and how.
pub struct Options {
    /// The base's program, then the new one.
    pub programs: [PathBuf; 2],
    /// Cases.
    pub suite: Suite,
    /// As for every command.
    pub adapter: Option<String>,
    /// The largest regression that is let pass.
    pub threshold: f64,
    /// When undecided cases stay undecided.
    pub budget: Duration,
}

/// Both records, with what they came to.
pub struct Outcome {
    /// The base's record, then the new one's.
    pub records: [Record; 2],
    /// Between them.
    pub comparison: Comparison,
    /// Cases that a first measurement found slower and a fresh one did not.
    pub unconfirmed: Vec<String>,
}

/// How far it is: what is done, and a share of the budget between 0 and 1.
pub type Hear<'a> = &'a mut dyn FnMut(&str, f64) -> ControlFlow<()>;

/// Measures both programs in turn until every case is decided or the budget is spent. `None` if `hear` stopped it.
pub fn run(options: &Options, hear: Hear<'_>) -> Result<Option<Outcome>> {
    let began = Instant::now();
    let mut first = Interleaved::start(options, None)?;
    // Two sessions of fresh workers see every case; the second stays for what they leave undecided.
    for session in 0..2 {
        if session > 0 {
            first.restart(options)?;
        }
        let names = first.names();
        // The first two sessions together take at most half of the budget.
        let until = began + options.budget.mul_f64(0.25 * f64::from(session + 1));
        if first.visit(&names, FIRST, until, options, began, hear)?.is_break() {
            return Ok(None);
        }
    }
    let most = began + options.budget.mul_f64(0.75);
    if first.decide(most, options, began, hear)?.is_break() {
        return Ok(None);
    }
    let mut comparison = first.compare(options.threshold);
    let suspects: Vec<String> = comparison
        .rows
        .iter()
        .filter(|r| r.verdict == Verdict::Regression)
        .map(|r| r.name.clone())
        .collect();
    let mut unconfirmed = Vec::new();
    if !suspects.is_empty() {
        let mut again = Interleaved::start(options, Some(&suspects))?;
        if again
            .visit(&suspects, 2 * FIRST, began + options.budget, options, began, hear)?
            .is_break()
        {
            return Ok(None);
        }
        if again.decide(began + options.budget, options, began, hear)?.is_break() {
            return Ok(None);
        }
        let fresh = again.compare(options.threshold);
        for row in comparison.rows.iter_mut().filter(|r| suspects.contains(&r.name)) {
            let change = fresh.rows.iter().find(|r| r.name == row.name).and_then(|r| r.change);
            // Seen twice: above the threshold again, and surely above zero.
            let confirmed = change.is_some_and(|c| c.estimate > options.threshold && c.low > 0.0);
            if !confirmed {
                let second =
                    change.map_or("nothing".into(), |c| format!("{:+.1} %", 100.0 * c.estimate));
                row.verdict = Verdict::Unclear;
                row.note = format!("a fresh measurement gave {second}");
                unconfirmed.push(row.name.clone());
            }
        }
    }
    first.records.iter_mut().for_each(|r| r.made.took = began.elapsed().as_secs_f64());
    Ok(Some(Outcome { records: first.records, comparison, unconfirmed }))
}

/// Two workers and what they gave so far.
struct Interleaved {
    workers: [Worker; 2],
    records: [Record; 2],
    calls: Vec<(String, u32)>,
}

impl Interleaved {
    fn start(options: &Options, only: Option<&[String]>) -> Result<Interleaved> {
        let mut workers = Self::workers(options)?;
        // One device, so one measurement of what it can do; a confirmation keeps no record.
        let limits: Limits = match only {
            None => workers[0].ask(&Ask::Limits)?,
            Some(_) => Limits { gflops: 1.0, gbytes: 1.0 },
        };
        let [a, b] = [&workers[0].hello, &workers[1].hello];
        let unlike = a.device.unlike(&b.device);
        ensure!(unlike.is_empty(), "the two programs use different devices: {}", unlike.join("; "));
        ensure!(a.clock == b.clock, "the two programs use different clocks");
        let names: Vec<String> = a
            .names
            .iter()
            .filter(|n| b.names.contains(n) && only.is_none_or(|only| only.contains(n)))
            .cloned()
            .collect();
        let suite = options.suite.name();
        ensure!(!names.is_empty(), "the two programs have no case of suite {suite:?} in common");
        let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let stamp = stamp.map_or(1, |t| t.as_nanos() as u64 >> 10);
        let record = |h: &Hello| {
            let mut record =
                Record::new(suite, h.commit.clone(), h.device.clone(), h.clock, limits);
            record.made.session = Some(stamp);
            record
        };
        let records = [record(a), record(b)];
        let mut both = Interleaved { workers, records, calls: Vec::new() };
        for name in names {
            let [a, b] = both.prepare(&name)?;
            both.calls.push((name, a.calls));
            for (record, mut case) in both.records.iter_mut().zip([a, b]) {
                case.samples.clear();
                record.cases.push(case);
            }
        }
        Ok(both)
    }

    fn workers(options: &Options) -> Result<[Worker; 2]> {
        let start = |path| Worker::start(path, &options.suite, options.adapter.as_deref());
        Ok([start(&options.programs[0])?, start(&options.programs[1])?])
    }

    fn prepare(&mut self, name: &str) -> Result<[CaseRecord; 2]> {
        let mut one = |i: usize| self.workers[i].ask(&Ask::Prepare(name.to_owned()));
        Ok([one(0)?, one(1)?])
    }

    fn restart(&mut self, options: &Options) -> Result<()> {
        self.workers = Self::workers(options)?;
        for name in self.names() {
            for (i, case) in self.prepare(&name)?.into_iter().enumerate() {
                if let Some(why) = case.wrong {
                    let record = self.records[i].cases.iter_mut().find(|c| c.name == name);
                    *record.context("a case")? = CaseRecord::wrong(name.clone(), why);
                }
            }
        }
        Ok(())
    }

    /// Cases that are right in both.
    fn names(&self) -> Vec<String> {
        let right = |name: &str| {
            self.records.iter().all(|r| r.cases.iter().any(|c| c.name == name && c.wrong.is_none()))
        };
        self.calls.iter().map(|(name, _)| name.clone()).filter(|name| right(name)).collect()
    }

    /// One quad A B B A, or B A A B, of one case.
    fn quad(&mut self, name: &str) -> Result<()> {
        let calls = self.calls.iter().find(|(n, _)| n == name).map_or(1, |(_, calls)| *calls);
        let taken =
            self.records[0].cases.iter().find(|c| c.name == name).map_or(0, |c| c.samples.len());
        let order = if taken.is_multiple_of(4) { [0, 1, 1, 0] } else { [1, 0, 0, 1] };
        let [fma, copy]: [f64; 2] = self.workers[order[0]].ask(&Ask::Control)?;
        for i in order {
            let seconds = self.workers[i].ask(&Ask::Sample(name.to_owned(), calls))?;
            let case = self.records[i].cases.iter_mut().find(|c| c.name == name);
            case.context("a case")?.samples.push(Sample { seconds, fma, copy });
        }
        Ok(())
    }

    /// `quads` of each of these cases, round by round, or as many as fit before `until` (at least eight).
    fn visit(
        &mut self,
        names: &[String],
        quads: usize,
        until: Instant,
        options: &Options,
        began: Instant,
        hear: Hear<'_>,
    ) -> Result<ControlFlow<()>> {
        for round in 0..quads {
            if round >= 8 && Instant::now() > until {
                break;
            }
            for name in names {
                self.quad(name)?;
            }
            let share = began.elapsed().as_secs_f64() / options.budget.as_secs_f64();
            let what = format!("{} cases, round {}", names.len(), round + 1);
            if hear(&what, share.min(1.0)).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Visits the cases whose interval holds the threshold until none is left or time is up.
    fn decide(
        &mut self,
        until: Instant,
        options: &Options,
        began: Instant,
        hear: Hear<'_>,
    ) -> Result<ControlFlow<()>> {
        while Instant::now() < until {
            let comparison = self.compare(options.threshold);
            let quads = |name: &str| {
                let case = self.records[0].cases.iter().find(|c| c.name == name);
                case.map_or(0, |c| c.samples.len() / 2)
            };
            let open = |r: &&crate::compare::Row| {
                let near =
                    |c: stats::Change| c.low <= options.threshold && c.high > options.threshold;
                r.change.is_some_and(|c| near(c) || quads(&r.name) < LEAST)
            };
            let names: Vec<String> = comparison
                .rows
                .iter()
                .filter(open)
                .map(|r| r.name.clone())
                .filter(|n| quads(n) < MOST)
                .collect();
            if names.is_empty() {
                break;
            }
            if self.visit(&names, MORE, until, options, began, hear)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn compare(&mut self, threshold: f64) -> Comparison {
        for case in self.records.iter_mut().flat_map(|r| &mut r.cases).filter(|c| c.wrong.is_none())
        {
            let seconds: Vec<f64> = case.samples.iter().map(|s| s.seconds).collect();
            case.seconds = stats::median(&seconds);
        }
        compare(&self.records[0], &self.records[1], threshold)
    }
}

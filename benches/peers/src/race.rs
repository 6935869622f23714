//! One work, every peer, round by round; then the results side by side.

use std::time::Duration;

use anyhow::Result;

use crate::peer::{Out, Peer, Programs, Running};
use crate::work::Work;

/// How to measure.
pub struct Rules {
    /// Each peer runs once in each round.
    pub rounds: usize,
    /// How long to wait for one answer.
    pub patience: Duration,
}

/// A run shorter than this is repeated within its turn, until the turn is about so long.
const TURN: f64 = 0.2;
/// At most so many runs a turn.
const MOST: f64 = 200.0;

/// One peer's line in a table.
pub struct Row {
    /// The work's name.
    pub work: String,
    /// The peer's.
    pub peer: Peer,
    /// The device that it named.
    pub device: String,
    /// What it did, or why it did not.
    pub outcome: Result<Measured, Out>,
}

/// A peer that ran.
pub struct Measured {
    /// Seconds of one run in each round, sorted.
    pub seconds: Vec<f64>,
    /// What one second is worth: GFLOP/s or tokens/s, at the median.
    pub figure: f64,
    /// Its unit.
    pub unit: &'static str,
    /// Median over the rounds of its time divided by demask's: above 1, demask is faster.
    pub ratio: Option<f64>,
    /// Largest difference from the reference, as a part of the largest value; `None` for the reference.
    pub error: Option<f64>,
    /// The difference is within the work's tolerance.
    pub agrees: bool,
}

impl Row {
    /// False if results differ, or if demask itself broke.
    pub fn is_good(&self) -> bool {
        match &self.outcome {
            Ok(measured) => measured.agrees,
            Err(Out::Skipped(_)) => true,
            Err(Out::Failed(_)) => self.peer != Peer::Demask,
        }
    }
}

/// A peer in its row, as long as it has not broken.
struct Lane {
    peer: Peer,
    device: String,
    state: Result<Racer, Out>,
}

struct Racer {
    running: Running,
    times: usize,
    seconds: Vec<f64>,
}

/// Runs the race. demask comes first among `peers`: the others must be on its adapter and are compared with it.
pub fn race(
    work: &Work,
    peers: impl Iterator<Item = Peer>,
    programs: &Programs,
    rules: &Rules,
) -> Result<Vec<Row>> {
    let mut lanes: Vec<Lane> = Vec::new();
    for peer in peers {
        eprintln!("{}: {} prepares", work.name(), peer.name());
        let (device, state) = match Running::start(peer, work, programs, rules.patience) {
            Ok((running, device)) => {
                let home = lanes.iter().find(|l| l.peer == Peer::Demask).map(|l| l.device.clone());
                let state = match home {
                    Some(home) if peer.shares_adapter() && !same_device(&home, &device) => Err(
                        Out::Failed(format!("ran on {device}, demask on {home}; see README.md")),
                    ),
                    _ => calibrate(running),
                };
                (device, state)
            }
            // Nothing that could be installed would help: no row.
            Err(Out::Skipped(why)) if why.is_empty() => continue,
            Err(out) => (String::new(), Err(out)),
        };
        lanes.push(Lane { peer, device, state });
    }
    for round in 0..rules.rounds {
        for lane in &mut lanes {
            let Ok(racer) = &mut lane.state else { continue };
            eprintln!(
                "{}: round {} of {}, {}",
                work.name(),
                round + 1,
                rules.rounds,
                lane.peer.name()
            );
            match racer.running.run(racer.times) {
                Ok(seconds) => racer.seconds.push(seconds),
                Err(e) => lane.state = Err(Out::Failed(e.to_string())),
            }
        }
    }
    Ok(compare(work, lanes))
}

/// Vendors and APIs decorate a device's name differently: one name must contain the other's first words.
fn same_device(a: &str, b: &str) -> bool {
    let key = |s: &str| s.to_lowercase().split(['(', ',']).next().unwrap_or("").trim().to_owned();
    let (a, b) = (key(a), key(b));
    a.contains(&b) || b.contains(&a)
}

fn calibrate(mut running: Running) -> Result<Racer, Out> {
    match running.run(1) {
        Ok(once) => {
            let times = (TURN / once).clamp(1.0, MOST) as usize;
            Ok(Racer { running, times, seconds: Vec::new() })
        }
        Err(e) => Err(Out::Failed(e.to_string())),
    }
}

/// Samples by name.
pub type Results = Vec<(String, Vec<f64>)>;
/// Seconds of the rounds, and results.
type Finish = Result<(Vec<f64>, Results), Out>;

/// Holds every result to the reference: PyTorch's or llama.cpp's where there is one, else demask's.
fn compare(work: &Work, lanes: Vec<Lane>) -> Vec<Row> {
    let known = crate::matmul::reference(work);
    let home: Option<Vec<f64>> = lanes.iter().find_map(|l| match &l.state {
        Ok(racer) if l.peer == Peer::Demask => Some(racer.seconds.clone()),
        _ => None,
    });
    let mut done: Vec<(Peer, String, Finish)> = Vec::new();
    for Lane { peer, device, state } in lanes {
        let outcome = state.and_then(|mut racer| match racer.running.results() {
            Ok(results) => Ok((racer.seconds, results)),
            Err(e) => Err(Out::Failed(e.to_string())),
        });
        done.push((peer, device, outcome));
    }
    let judge = [Peer::TorchCpu, Peer::LlamaCpu, Peer::TorchCuda, Peer::LlamaVulkan, Peer::Demask];
    let referee = judge.into_iter().find_map(|judge| {
        let own = done.iter().find(|(peer, ..)| *peer == judge)?;
        own.2.as_ref().ok().map(|(_, results)| (judge, results.clone()))
    });
    let (judge, reference) = match known {
        Some(results) => (None, results),
        None => referee.map_or((None, Vec::new()), |(peer, results)| (Some(peer), results)),
    };
    let (unit, amount) = work.figure();
    let row = |(peer, device, outcome): (Peer, String, Finish)| {
        let outcome = outcome.map(|(seconds, results)| {
            let ratio = home.as_ref().map(|home| {
                median(seconds.iter().zip(home).map(|(peer, home)| peer / home).collect())
            });
            let error = (judge != Some(peer)).then(|| difference(&reference, &results));
            let agrees = error.is_none_or(|e| e <= work.tolerance());
            let mut seconds = seconds;
            seconds.sort_by(f64::total_cmp);
            let figure = amount / median(seconds.clone());
            Measured { seconds, figure, unit, ratio, error, agrees }
        });
        Row { work: work.name(), peer, device, outcome }
    };
    done.into_iter().map(row).collect()
}

/// The middle of some numbers; of two middles the lower.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() - 1) / 2]
}

/// The worst group's largest difference, as a part of the group's largest value; infinite if a group is missing,
/// has another length or is not finite.
fn difference(reference: &Results, results: &Results) -> f64 {
    let group = |(name, expected): &(String, Vec<f64>)| {
        let Some((_, found)) = results.iter().find(|(n, _)| n == name) else {
            return f64::INFINITY;
        };
        if found.len() != expected.len() || found.iter().any(|x| !x.is_finite()) {
            return f64::INFINITY;
        }
        let top = expected.iter().fold(f64::MIN_POSITIVE, |a, x| a.max(x.abs()));
        expected.iter().zip(found).fold(0.0f64, |a, (x, y)| a.max((x - y).abs())) / top
    };
    reference.iter().map(group).fold(0.0, f64::max)
}

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
    /// How its results compare with the reference's.
    pub verdict: Verdict,
}

/// A peer's results beside the reference's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// These are the reference's.
    Reference,
    /// There is no reference.
    Unjudged,
    /// Numbers: the largest difference, as a part of the largest value.
    Numbers {
        /// That part.
        error: f64,
        /// It is within the work's tolerance.
        agrees: bool,
    },
    /// Tokens: the first that is not the reference's.
    Parts {
        /// Its position in the answer.
        at: usize,
        /// By how much the reference prefers its own token there, in nats; infinite where the other is not among the
        /// tokens that it named, or one answer is shorter.
        margin: f64,
        /// The margin is within the work's tolerance: the two tokens are nearly as likely.
        agrees: bool,
    },
}

impl Verdict {
    /// False for results that are wrong.
    pub fn is_good(&self) -> bool {
        match *self {
            Verdict::Reference | Verdict::Unjudged => true,
            Verdict::Numbers { agrees, .. } | Verdict::Parts { agrees, .. } => agrees,
        }
    }
}

impl Row {
    /// False if results differ, or if demask itself broke.
    pub fn is_good(&self) -> bool {
        match &self.outcome {
            Ok(measured) => measured.verdict.is_good(),
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
    let known = reference(work, programs, rules);
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
    Ok(compare(work, lanes, known))
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

/// What a result is held to.
enum Known {
    /// Numbers, or the tokens of an answer with what else was likely.
    Results(Results),
    /// The results of one of the peers.
    Peer,
    /// It cannot be had here.
    Nothing,
}

/// The reference of works that have one of their own, computed before the race.
fn reference(work: &Work, programs: &Programs, rules: &Rules) -> Known {
    if !matches!(work, Work::Decode { .. }) {
        return crate::matmul::reference(work).map_or(Known::Peer, Known::Results);
    }
    eprintln!("{}: {} answers", work.name(), Peer::LlamaF32.name());
    let started = Running::start(Peer::LlamaF32, work, programs, rules.patience);
    let results = started
        .and_then(|(mut running, _)| running.results().map_err(|e| Out::Failed(e.to_string())));
    match results {
        Ok(results) => Known::Results(results),
        Err(Out::Skipped(why) | Out::Failed(why)) => {
            eprintln!("{}: no reference, so tokens are not compared: {why}", work.name());
            Known::Nothing
        }
    }
}

/// Holds every result to the reference: the work's own, PyTorch's where it ran, else demask's.
fn compare(work: &Work, lanes: Vec<Lane>, known: Known) -> Vec<Row> {
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
    let judge = [Peer::TorchCpu, Peer::TorchCuda, Peer::Demask];
    let referee = judge.into_iter().find_map(|judge| {
        let own = done.iter().find(|(peer, ..)| *peer == judge)?;
        own.2.as_ref().ok().map(|(_, results)| (judge, results.clone()))
    });
    let (judge, reference) = match known {
        Known::Results(results) => (None, Some(results)),
        Known::Peer => referee.map_or((None, None), |(peer, results)| (Some(peer), Some(results))),
        Known::Nothing => (None, None),
    };
    let (unit, amount) = work.figure();
    let row = |(peer, device, outcome): (Peer, String, Finish)| {
        let outcome = outcome.map(|(seconds, results)| {
            let ratio = home.as_ref().map(|home| {
                median(seconds.iter().zip(home).map(|(peer, home)| peer / home).collect())
            });
            let verdict = match &reference {
                Some(_) if judge == Some(peer) => Verdict::Reference,
                Some(reference) => judged(work, reference, &results),
                None => Verdict::Unjudged,
            };
            let mut seconds = seconds;
            seconds.sort_by(f64::total_cmp);
            let figure = amount / median(seconds.clone());
            Measured { seconds, figure, unit, ratio, verdict }
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

fn judged(work: &Work, reference: &Results, results: &Results) -> Verdict {
    if let Work::Decode { .. } = work {
        return parting(reference, results, work.tolerance());
    }
    let error = difference(reference, results);
    Verdict::Numbers { error, agrees: error <= work.tolerance() }
}

/// Where an answer parts from the reference's. Up to there both had the same tokens before them, so the reference's
/// probabilities at that position judge the token; behind it they say nothing. The reference's group `likely` holds,
/// for each position, pairs of a token and its log-probability, most likely first.
fn parting(reference: &Results, results: &Results, tolerance: f64) -> Verdict {
    let group = |of: &Results, name: &str| {
        of.iter().find(|(n, _)| n == name).map_or(Vec::new(), |(_, values)| values.clone())
    };
    let (expected, found) = (group(reference, "tokens"), group(results, "tokens"));
    let likely = group(reference, "likely");
    let lengths = expected.len().max(found.len());
    let Some(at) = (0..lengths).find(|&i| expected.get(i) != found.get(i)) else {
        return Verdict::Numbers { error: 0.0, agrees: !expected.is_empty() };
    };
    let pairs: Vec<&[f64]> = match likely.len().checked_div(expected.len()) {
        Some(width) if width > 0 => likely.chunks(width).nth(at).unwrap_or(&[]).chunks(2).collect(),
        _ => Vec::new(),
    };
    let of =
        |token: Option<&f64>| pairs.iter().find(|pair| Some(&pair[0]) == token).map(|pair| pair[1]);
    let margin = match (of(expected.get(at)), of(found.get(at))) {
        (Some(own), Some(other)) => own - other,
        _ => f64::INFINITY,
    };
    Verdict::Parts { at, margin, agrees: margin <= tolerance }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_other_token_is_judged_by_the_margin_there() {
        let group = |name: &str, values: &[f64]| (name.to_owned(), values.to_vec());
        let likely = [5.0, -0.1, 9.0, -2.5, 6.0, -0.7, 7.0, -0.8, 4.0, -0.1, 3.0, -3.0];
        let reference = vec![group("tokens", &[5.0, 6.0, 4.0]), group("likely", &likely)];
        let parts = |tokens: &[f64]| parting(&reference, &vec![group("tokens", tokens)], 0.25);
        assert_eq!(parts(&[5.0, 6.0, 4.0]), Verdict::Numbers { error: 0.0, agrees: true });
        let Verdict::Parts { at: 1, margin, agrees: true } = parts(&[5.0, 7.0, 99.0]) else {
            panic!("a near tie is no fault, whatever follows it: {:?}", parts(&[5.0, 7.0, 99.0]))
        };
        assert!((margin - 0.1).abs() < 1e-12);
        assert!(matches!(parts(&[9.0, 6.0, 4.0]), Verdict::Parts { at: 0, agrees: false, .. }));
        let unlikely = Verdict::Parts { at: 2, margin: f64::INFINITY, agrees: false };
        assert_eq!(parts(&[5.0, 6.0, 8.0]), unlikely);
        assert_eq!(parts(&[5.0, 6.0]), unlikely);
        assert!(!parting(&Vec::new(), &Vec::new(), 0.25).is_good());
    }
}

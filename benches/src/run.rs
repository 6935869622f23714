//! One program's run of a suite, to a record.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::ab::Hear;
use crate::device::Device;
use crate::measure::{Sample, Session};
use crate::record::{CaseRecord, Record};
use crate::suite::{Suite, entries};

/// Rounds at least, whatever the budget, and at most.
const FEWEST: usize = 3;
const MOST: usize = 240;
/// Rounds in which the other clocks are read too.
const ALL_CLOCKS: usize = 3;

/// What to measure.
pub struct Options {
    /// Cases.
    pub suite: Suite,
    /// As for every command.
    pub adapter: Option<String>,
    /// What this program was built from, if that was not said at build time.
    pub commit: Option<String>,
    /// When no further round is begun, from the start on.
    pub budget: Duration,
}

impl Options {
    /// The budget of a suite where none is given: `quick` ends within a minute.
    pub fn budget(suite: &Suite) -> Duration {
        Duration::from_secs(match suite {
            Suite::Quick => 36,
            Suite::Full => 600,
            Suite::Named(_) => 60,
        })
    }
}

/// Checks every case, then takes samples round by round. `None` if `hear` stopped it.
pub fn run(options: &Options, hear: Hear<'_>) -> Result<Option<Record>> {
    let began = Instant::now();
    let session = Session::open(options.adapter.clone())?;
    let entries = entries(&session.gpu, &options.suite);
    let suite = options.suite.name();
    ensure!(
        !entries.is_empty(),
        "no case of this device has {suite:?} in its name; try --suite full"
    );
    let device = Device::of(&session.gpu);
    let limits = session.limits()?;
    let commit = options.commit.clone();
    let mut record = Record::new(suite, commit, device, session.clock, limits);
    let (mut works, mut wrong) = (Vec::new(), Vec::new());
    let share = || (began.elapsed().as_secs_f64() / options.budget.as_secs_f64()).min(1.0);
    for entry in entries {
        if hear(&format!("checking {}", entry.name), share()).is_break() {
            return Ok(None);
        }
        match session.prepare(entry.make(&session.gpu)?)? {
            Ok(prepared) => works.push(prepared),
            Err((name, why)) => wrong.push(CaseRecord::wrong(name, why)),
        }
    }
    let mut samples: Vec<Vec<Sample>> = works.iter().map(|_| Vec::new()).collect();
    let mut times: Vec<Vec<_>> = works.iter().map(|_| Vec::new()).collect();
    for round in 0..MOST {
        if works.is_empty() || (round >= FEWEST && began.elapsed() > options.budget) {
            break;
        }
        for (of, sample) in samples.iter_mut().zip(session.round(&works)?) {
            of.push(sample);
        }
        if round < ALL_CLOCKS {
            for (of, work) in times.iter_mut().zip(&works) {
                of.push(session.times(work)?);
            }
        }
        if hear(&format!("{} cases, round {}", works.len(), round + 1), share()).is_break() {
            return Ok(None);
        }
    }
    for ((work, samples), times) in works.iter().zip(samples).zip(times) {
        record.cases.push(match session.confirm(work)? {
            Ok(()) => CaseRecord::new(work, samples, &times),
            Err(why) => CaseRecord::wrong(work.work.name.clone(), why),
        });
    }
    record.cases.extend(wrong);
    record.made.took = began.elapsed().as_secs_f64();
    Ok(Some(record))
}

/// For those who do not listen.
pub fn deaf(_: &str, _: f64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

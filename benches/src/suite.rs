//! Which cases a suite has. A case is in the benches if it states its cost; a suite picks by cost or by name.

use demask_engine::Result;
use demask_engine::gpu::Gpu;
use demask_engine::ops::case::Cost;
use demask_engine::ops::cases;

use crate::model::Step;
use crate::work::{Work, derivative_name};

/// A choice of cases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Forward passes of at most 0.28 GFLOP and 50 MB a call, and whole steps, without those that a sibling stands for:
    /// within a minute on a software adapter.
    Quick,
    /// All.
    Full,
    /// Those whose name contains one of these parts, separated by commas.
    Named(String),
}

impl From<&str> for Suite {
    fn from(name: &str) -> Suite {
        match name {
            "quick" => Suite::Quick,
            "full" => Suite::Full,
            name => Suite::Named(name.to_owned()),
        }
    }
}

impl Suite {
    /// As it is written on the command line.
    pub fn name(&self) -> &str {
        match self {
            Suite::Quick => "quick",
            Suite::Full => "full",
            Suite::Named(name) => name,
        }
    }

    fn has(&self, name: &str, cost: Cost) -> bool {
        match self {
            Suite::Quick => cost.flops <= 2.8e8 && cost.bytes <= 50e6,
            Suite::Full => true,
            Suite::Named(parts) => parts.split(',').any(|part| name.contains(part.trim())),
        }
    }
}

/// How a case is put on a device.
type Make = Box<dyn FnOnce(&Gpu) -> Result<Work>>;

/// One case of a suite, not yet on the device.
pub struct Entry {
    /// Its name.
    pub name: String,
    make: Make,
}

impl Entry {
    /// Uploads what it needs.
    pub fn make(self, gpu: &Gpu) -> Result<Work> {
        (self.make)(gpu)
    }
}

/// The suite's cases that this device can run.
pub fn entries(gpu: &Gpu, suite: &Suite) -> Vec<Entry> {
    let ops = cases().into_iter().filter(|c| c.runs_on(gpu)).filter_map(|case| {
        let cost = case.cost?;
        let name = case.name.clone();
        let chosen = suite.has(&name, cost) && !(*suite == Suite::Quick && case.full_only);
        let make: Make = Box::new(move |gpu| Ok(Work::of_case(gpu, case)));
        chosen.then_some(Entry { name, make })
    });
    let derivatives = cases().into_iter().filter(|c| c.runs_on(gpu)).filter_map(|case| {
        let (cost, derivative) = (case.cost?, case.derivative?);
        let both =
            Cost { flops: cost.flops + derivative.flops, bytes: cost.bytes + derivative.bytes };
        let name = derivative_name(&case.name);
        let make: Make = Box::new(move |gpu| {
            Ok(Work::of_derivative(gpu, case).expect("it states what its derivative costs"))
        });
        let chosen = suite.has(&name, both) && *suite != Suite::Quick;
        chosen.then_some(Entry { name, make })
    });
    let steps = Step::all().into_iter().filter_map(|step| {
        let name = step.name();
        let chosen = suite.has(&name, step.cost());
        let make: Make = Box::new(move |gpu| step.make(gpu));
        chosen.then_some(Entry { name, make })
    });
    ops.chain(derivatives).chain(steps).collect()
}

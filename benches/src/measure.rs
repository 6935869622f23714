//! A device with works on it, and samples of their times.

use std::time::{Duration, Instant};

use demask_engine::gpu::{Gpu, GpuOptions, VariantUse};
use demask_engine::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::control::Control;
use crate::record::Limits;
use crate::work::{Checked, Work};

/// Shortest sample, by the clock, and shortest sample of a control. A software adapter's are short: between two
/// slices of other programs, so that most are not interrupted at all, which the median then finds.
const SAMPLE: [f64; 2] = [6e-3, 2.5e-3];
const CONTROL: f64 = 1.5e-3;
/// Calls in one sample at most.
const MOST_CALLS: u32 = 4096;

/// What a time is taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clock {
    /// Timestamps of the device, kernel by kernel: a GPU.
    Device,
    /// Processor time of this process: a software adapter, whose kernels run inside it.
    Cpu,
    /// Wall time up to a wait, where there is nothing else.
    Wall,
}

impl Clock {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Clock::Device => "device timestamps",
            Clock::Cpu => "processor time of the process",
            Clock::Wall => "wall time",
        }
    }
}

/// Seconds of one call.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// On the session's clock.
    pub seconds: f64,
    /// Of the multiply-add control beside it.
    pub fma: f64,
    /// Of the copy control beside it.
    pub copy: f64,
}

/// Times of one call on the clocks that exist.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Wall time up to a wait, as in use: dispatches share passes.
    pub wall: f64,
    /// Processor time of the process over the same.
    pub cpu: Option<f64>,
    /// Sum over the kernels of their timestamps, each in a pass of its own.
    pub device: Option<f64>,
}

/// A work that was found right, and how often a sample calls it.
pub struct Prepared {
    /// What is timed.
    pub work: Work,
    /// Calls of one sample.
    pub calls: u32,
    /// How it was checked.
    pub checked: Checked,
    /// Kernels of one call.
    pub kernels: Vec<VariantUse>,
    /// Device memory of one call at its peak, its inputs left out and its outputs not.
    pub peak_bytes: u64,
    /// Bits of the result that was checked; later results must be the same.
    result: Vec<Vec<u8>>,
}

/// A device, its clock and its controls.
pub struct Session {
    /// The device.
    pub gpu: Gpu,
    /// What decides.
    pub clock: Clock,
    fma: (Control, u32),
    copy: (Control, u32),
}

impl Session {
    /// Opens a device and sizes the controls.
    pub fn open(adapter: Option<String>) -> Result<Session> {
        let gpu = Gpu::open(GpuOptions { adapter, ..GpuOptions::default() })?;
        let clock = if gpu.adapter().is_software() && process_time().is_some() {
            Clock::Cpu
        } else if gpu.has(wgpu::Features::TIMESTAMP_QUERY) {
            Clock::Device
        } else {
            Clock::Wall
        };
        let fma = sized(&gpu, clock)?;
        let control = Control::copy(&gpu, false);
        control.run();
        control.check()?;
        let one = time(&gpu, clock, 1, || control.run())?;
        let copy = (control, repeats(CONTROL, one));
        Ok(Session { gpu, clock, fma, copy })
    }

    /// Checks a work, warms it up, and finds how many calls make a sample. An `Err` of the inner kind is a wrong
    /// result.
    pub fn prepare(&self, work: Work) -> Result<std::result::Result<Prepared, (String, String)>> {
        let live = self.gpu.memory().live;
        self.gpu.reset_peak();
        let outputs = (work.run)();
        self.gpu.sync()?;
        let peak_bytes = self.gpu.memory().peak - live;
        let checked = match (work.check)(&outputs) {
            Ok(checked) => checked,
            Err(why) => return Ok(Err((work.name, why))),
        };
        let result = read(&outputs)?;
        drop(outputs);
        self.gpu.reset_stats();
        let mut one = self.time(1, &work)?;
        let kernels = self.gpu.stats().variants;
        let target = SAMPLE[usize::from(self.clock == Clock::Cpu)];
        let mut calls = repeats(target, one);
        if calls > 1 {
            one = self.time(calls, &work)?;
            calls = repeats(target, one);
        }
        Ok(Ok(Prepared { work, calls, checked, kernels, peak_bytes, result }))
    }

    fn time(&self, calls: u32, work: &Work) -> Result<f64> {
        time(&self.gpu, self.clock, calls, || drop((work.run)()))
    }

    /// One sample of each work in turn, with the controls before and after each.
    pub fn round(&self, works: &[Prepared]) -> Result<Vec<Sample>> {
        let mut before = self.control()?;
        let mut samples = Vec::with_capacity(works.len());
        for work in works {
            let seconds = self.sample(work, work.calls)?;
            let after = self.control()?;
            let between = |i: usize| (before[i] + after[i]) / 2.0;
            samples.push(Sample { seconds, fma: between(0), copy: between(1) });
            before = after;
        }
        Ok(samples)
    }

    /// Seconds of one of `calls` calls, behind one that is not timed where calls are short: it brings the data back
    /// into the caches from which the last case has driven them.
    pub fn sample(&self, prepared: &Prepared, calls: u32) -> Result<f64> {
        if calls > 1 {
            drop((prepared.work.run)());
            self.gpu.sync()?;
        }
        self.time(calls, &prepared.work)
    }

    /// Seconds of one call of each control, multiply-adds and copy.
    pub fn control(&self) -> Result<[f64; 2]> {
        let one = |(control, calls): &(Control, u32)| {
            time(&self.gpu, self.clock, *calls, || control.run())
        };
        Ok([one(&self.fma)?, one(&self.copy)?])
    }

    /// What the controls reach at their best, in the device's own time where it has timestamps.
    pub fn limits(&self) -> Result<Limits> {
        Ok(Limits {
            gflops: best(&self.gpu, &self.fma.0, self.fma.1)? / 1e9,
            gbytes: copied(&self.gpu)?,
        })
    }

    /// All clocks, for the record; the decisive one is in every sample.
    pub fn times(&self, prepared: &Prepared) -> Result<Times> {
        times(&self.gpu, prepared.calls, || drop((prepared.work.run)()))
    }

    /// Runs once more and compares every bit with the result that was checked.
    pub fn confirm(&self, prepared: &Prepared) -> Result<std::result::Result<(), String>> {
        let same = read(&(prepared.work.run)())? == prepared.result;
        Ok(same.then_some(()).ok_or_else(|| "the result changed between two calls".into()))
    }
}

/// What a device can do at most, by its own timestamps where it has them.
pub fn limits(gpu: &Gpu) -> Result<Limits> {
    Ok(Limits { gflops: multiply_adds(gpu)? / 1e9, gbytes: copied(gpu)? })
}

/// 10⁹ bytes a second of a copy.
fn copied(gpu: &Gpu) -> Result<f64> {
    Ok(best(gpu, &Control::copy(gpu, true), 1)? / 1e9)
}

/// Floating-point operations of f32 that the device does in a second at most, as multiply-adds in registers. Takes some
/// tens of milliseconds.
pub fn multiply_adds(gpu: &Gpu) -> Result<f64> {
    let (control, calls) = sized(gpu, Clock::Wall)?;
    best(gpu, &control, calls)
}

/// Multiply-adds that take long enough to be timed, with the calls of one sample.
fn sized(gpu: &Gpu, clock: Clock) -> Result<(Control, u32)> {
    let mut n = 64;
    loop {
        let control = Control::fma(gpu, n);
        control.run();
        gpu.sync()?;
        let one = time(gpu, clock, 1, || control.run())?;
        if one > 0.7 * CONTROL || n >= 1 << 16 {
            control.check()?;
            return Ok((control, repeats(CONTROL, one)));
        }
        n *= 2;
    }
}

/// Amount a second of the best of seven samples.
fn best(gpu: &Gpu, control: &Control, calls: u32) -> Result<f64> {
    control.run();
    let mut shortest = f64::INFINITY;
    for _ in 0..7 {
        let t = times(gpu, calls, || control.run())?;
        shortest = shortest.min(t.device.unwrap_or(t.wall));
    }
    control.check()?;
    Ok(control.amount() / shortest)
}

fn read(outputs: &[demask_engine::tensor::Tensor]) -> Result<Vec<Vec<u8>>> {
    outputs.iter().map(|t| t.to_bytes()).collect()
}

fn repeats(target: f64, one: f64) -> u32 {
    ((target / one.max(1e-9)).ceil() as u32).clamp(1, MOST_CALLS)
}

/// Seconds of one of `calls` calls on one clock.
fn time(gpu: &Gpu, clock: Clock, calls: u32, run: impl Fn()) -> Result<f64> {
    if clock == Clock::Device {
        return device_time(gpu, calls, run);
    }
    let cpu = process_time();
    let start = Instant::now();
    (0..calls).for_each(|_| run());
    gpu.sync()?;
    let wall = start.elapsed();
    let taken = match (clock, cpu, process_time()) {
        (Clock::Cpu, Some(before), Some(after)) => after.saturating_sub(before),
        _ => wall,
    };
    Ok(taken.as_secs_f64() / f64::from(calls))
}

fn device_time(gpu: &Gpu, calls: u32, run: impl Fn()) -> Result<f64> {
    gpu.time_kernels(true);
    gpu.reset_stats();
    (0..calls).for_each(|_| run());
    let stats = gpu.stats();
    gpu.time_kernels(false);
    gpu.sync()?;
    let seconds = stats.device_time().as_secs_f64();
    if seconds > 0.0 {
        return Ok(seconds / f64::from(calls));
    }
    let adapter = gpu.adapter().describe();
    Err(Error::Request(format!("{adapter} gives timestamps that stand still; update its driver")))
}

fn times(gpu: &Gpu, calls: u32, run: impl Fn()) -> Result<Times> {
    let timed = gpu.has(wgpu::Features::TIMESTAMP_QUERY);
    let device = timed.then(|| device_time(gpu, calls, &run)).transpose()?;
    let cpu = process_time();
    let start = Instant::now();
    (0..calls).for_each(|_| run());
    gpu.sync()?;
    let n = f64::from(calls);
    let wall = start.elapsed().as_secs_f64() / n;
    let cpu = cpu.zip(process_time()).map(|(a, b)| b.saturating_sub(a).as_secs_f64() / n);
    Ok(Times { wall, cpu, device })
}

/// Processor time of all threads of this process, where the system tells.
#[cfg(unix)]
fn process_time() -> Option<Duration> {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes the one struct it is given.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    (code == 0).then(|| Duration::new(t.tv_sec as u64, t.tv_nsec as u32))
}

#[cfg(not(unix))]
fn process_time() -> Option<Duration> {
    None
}

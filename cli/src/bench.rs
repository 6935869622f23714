//! `demask bench`: measure kernels, compare two measurements, stop what has become slower.

mod decode;

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use demask_benches::compare::{Comparison, Row, Verdict, compare};
use demask_benches::record::{Record, write_whole};
use demask_benches::suite::Suite;
use demask_benches::{ab, export, html, run as measure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::ui::Notices;
use crate::{interrupt, ui, version};

const EXAMPLES: &str = "\
Examples:
  demask bench run --json base.json                 the quick suite, within a minute
  demask bench run --suite matmul --json new.json   cases with \"matmul\" in their name
  demask bench compare base.json new.json           a table; 1 if one is 5% slower
  demask bench ab old/demask new/demask             two programs in turn: the surest
  demask bench report *.json --html report.html
  demask bench decode --model DIR                   tokens/s of a model, by mode and length

Every kernel's result is checked against an f64 reference before it is timed. In a project's
own CI: docs/regression-gate.md. Options common to all: --adapter where a device is
used, --json FILE where a record is written (- is stdout; decode prints it there).";

const EXITS: &str = "\
Exit codes: 0 no regression, 1 a confirmed regression, a wrong result or a failure, 2 the two
cannot be compared (other device, driver, features or kernels; --force compares nevertheless),
or a wrong command line.";

const RUN_EXAMPLES: &str = "\
Examples:
  demask bench run --json base.json
  demask bench run --suite full --json full.json
  demask bench run --suite attention --markdown -
  demask bench run --json out.json --github github.json --bmf bencher.json

Suites: quick (default; at most 0.28 GFLOP and 50 MB a call), full (all), or parts of
names. A wrong result is named, has no time, and makes the exit code 1.";

const COMPARE_EXAMPLES: &str = "\
Examples:
  demask bench compare base.json new.json
  demask bench compare base.json new.json --max-regress 3% --markdown summary.md
  demask bench compare base.json new.json --json -

A case is a regression if the whole confidence interval of its change lies above
--max-regress; \"unclear\" if only the best guess does. Intervals hold for all cases
together. Records of two runs are adjusted by the controls measured beside each
sample; a change of the machine between them widens the intervals. On machines that
are not quiet use `demask bench ab`.";

const AB_EXAMPLES: &str = "\
Examples:
  demask bench ab old/demask target/release/demask
  demask bench ab old/demask new/demask --suite softmax --max-regress 3%
  demask bench ab old/demask new/demask --json base.json --json new.json

Both programs run by turns on the same device, so that what slows the machine slows
both. Cases near --max-regress get more samples until --budget is spent; what looks
slower is measured again with fresh processes before it counts.";

const REPORT_EXAMPLES: &str = "\
Examples:
  demask bench report out.json --html report.html
  demask bench report history/*.json --html report.html --markdown -
  demask bench report out.json --bmf bencher.json --github github.json

The page shows for each device its measured limits, a roofline, every case, and
over several records the history. The other forms are of the newest record.";

/// Time kernels and steps, compare two versions, and fail on a regression
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(RunArgs),
    Compare(CompareArgs),
    Ab(AbArgs),
    Report(ReportArgs),
    Decode(decode::Args),
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// Measure a suite on one device
#[derive(clap::Args)]
#[command(after_help = RUN_EXAMPLES)]
struct RunArgs {
    /// quick, full, or parts of the cases' names, separated by commas
    #[arg(long, value_name = "SUITE", default_value = "quick")]
    suite: String,

    /// Write the record to FILE; - is stdout
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// The commit that this program was built from [default: the one that --version says]
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,

    /// Seconds after which no further round begins [default: 36 quick, 600 full, 60 else]
    #[arg(long, value_name = "SECONDS")]
    budget: Option<u64>,

    #[command(flatten)]
    device: DeviceArgs,

    #[command(flatten)]
    forms: Forms,
}

#[derive(clap::Args)]
struct DeviceArgs {
    /// GPU adapter: index, backend (vulkan, metal, dx12, gl) or part of its name
    #[arg(long, value_name = "ADAPTER")]
    adapter: Option<String>,

    /// No notices and no progress on stderr, only errors
    #[arg(long, short)]
    quiet: bool,
}

/// Files in other forms; - is stdout.
#[derive(clap::Args)]
struct Forms {
    /// Bencher metric format (latency in ns)
    #[arg(long, value_name = "FILE")]
    bmf: Option<PathBuf>,

    /// For github-action-benchmark, customSmallerIsBetter
    #[arg(long, value_name = "FILE")]
    github: Option<PathBuf>,

    /// A table
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// A page with plots, in one file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Compare two records
#[derive(clap::Args)]
#[command(after_help = COMPARE_EXAMPLES, after_long_help = format!("{COMPARE_EXAMPLES}\n\n{EXITS}"))]
struct CompareArgs {
    /// The record to compare with
    base: PathBuf,

    /// The newer record
    new: PathBuf,

    #[command(flatten)]
    limits: LimitArgs,

    /// Compare although device, driver, features, cases or kernels differ
    #[arg(long)]
    force: bool,

    /// Write the comparison to FILE as one JSON object; - is stdout
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(clap::Args)]
struct LimitArgs {
    /// The largest regression that passes, as in 5% or 0.05
    #[arg(long, value_name = "SHARE", default_value = "5%", value_parser = share)]
    max_regress: f64,

    /// Write the table to FILE as Markdown; - is stdout
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
}

/// Compare two programs, measured in turn
#[derive(clap::Args)]
#[command(after_help = AB_EXAMPLES, after_long_help = format!("{AB_EXAMPLES}\n\n{EXITS}"))]
struct AbArgs {
    /// The demask to compare with
    old: PathBuf,

    /// The newer demask
    new: PathBuf,

    /// quick, full, or parts of the cases' names, separated by commas
    #[arg(long, value_name = "SUITE", default_value = "quick")]
    suite: String,

    #[command(flatten)]
    limits: LimitArgs,

    /// Seconds that may be spent on what is not clear
    #[arg(long, value_name = "SECONDS", default_value_t = 180)]
    budget: u64,

    /// Write the base's record to FILE, given again the new one's
    #[arg(long, value_name = "FILE")]
    json: Vec<PathBuf>,

    #[command(flatten)]
    device: DeviceArgs,
}

/// Records as tables, plots, or for other tools
#[derive(clap::Args)]
#[command(after_help = REPORT_EXAMPLES)]
struct ReportArgs {
    /// Records of `demask bench run`
    #[arg(required = true, value_name = "RECORD.json")]
    records: Vec<PathBuf>,

    #[command(flatten)]
    forms: Forms,
}

/// Serve `demask bench ab`
#[derive(clap::Args)]
struct WorkerArgs {
    #[arg(long)]
    suite: String,

    #[arg(long)]
    adapter: Option<String>,
}

/// `5%` or `0.05`.
fn share(text: &str) -> Result<f64, String> {
    let (number, scale) = match text.trim().strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(v) if (0.0..1.0).contains(&(v / scale)) => Ok(v / scale),
        _ => Err(format!("{text:?} is no share from 0% to 100%, such as 5% or 0.05")),
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Run(args) => run_suite(args),
        Command::Compare(args) => compare_records(args),
        Command::Ab(args) => compare_programs(args),
        Command::Report(args) => report(args),
        Command::Decode(args) => decode::run(args),
        Command::Worker(args) => {
            ab::work(&Suite::from(args.suite.as_str()), args.adapter, version::commit())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_suite(args: RunArgs) -> Result<ExitCode> {
    interrupt::listen("nothing is written");
    let notices = Notices::new(args.device.quiet);
    let suite = Suite::from(args.suite.as_str());
    let budget = args.budget.map_or(measure::Options::budget(&suite), Duration::from_secs);
    let adapter = args.device.adapter;
    let commit = args.commit.or_else(version::commit);
    let options = measure::Options { suite, adapter, commit, budget };
    let mut progress = Progress::new(notices);
    let record = measure::run(&options, &mut |what, share| progress.step(what, share))?;
    drop(progress);
    let Some(record) = record else { bail!("interrupted; nothing was written") };
    if let Some(path) = &args.json {
        put(path, &(serde_json::to_string(&record)? + "\n"))?;
    }
    let none = args.json.is_none() && args.forms.none();
    args.forms.write(std::slice::from_ref(&record), &record)?;
    if none {
        ui::print(&table_of(&record))?;
    }
    notices.say(&format!(
        "{} cases on {} in {}, by {}",
        record.cases.len(),
        record.device.describe(),
        ui::duration(Duration::from_secs_f64(record.made.took)),
        record.clock.describe()
    ));
    let wrong: Vec<&str> =
        record.cases.iter().filter(|c| c.wrong.is_some()).map(|c| c.name.as_str()).collect();
    if !wrong.is_empty() {
        let first = record.cases.iter().find_map(|c| c.wrong.as_deref()).unwrap_or_default();
        bail!(
            "wrong results, so no times, for {} of {} cases: {}; the first: {first}",
            wrong.len(),
            record.cases.len(),
            wrong.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn compare_records(args: CompareArgs) -> Result<ExitCode> {
    let (base, new) = (Record::read(&args.base)?, Record::read(&args.new)?);
    let comparison = compare(&base, &new, args.limits.max_regress);
    if !comparison.unlike.is_empty() && !args.force {
        for why in &comparison.unlike {
            ui::complain(&format!("  {why}"));
        }
        ui::complain(&format!(
            "error: {} and {} cannot be compared ({} reasons above); measure both alike, or compare with --force",
            args.base.display(),
            args.new.display(),
            comparison.unlike.len()
        ));
        return Ok(ExitCode::from(2));
    }
    show(&comparison, &args.limits, args.json.as_deref())?;
    Ok(verdict(&comparison))
}

fn compare_programs(args: AbArgs) -> Result<ExitCode> {
    if args.json.len() == 1 || args.json.len() > 2 {
        crate::usage("bench", "--json is given twice: for the base's record and for the new one's");
    }
    interrupt::listen("nothing is written");
    let notices = Notices::new(args.device.quiet);
    let programs = [args.old, args.new].map(|path| match path.components().count() {
        // A bare name is a file here, as for the other arguments, and not looked for on the PATH.
        1 => Path::new(".").join(path),
        _ => path,
    });
    let options = ab::Options {
        programs,
        suite: Suite::from(args.suite.as_str()),
        adapter: args.device.adapter,
        threshold: args.limits.max_regress,
        budget: Duration::from_secs(args.budget.max(1)),
    };
    let mut progress = Progress::new(notices);
    let outcome = ab::run(&options, &mut |what, share| progress.step(what, share));
    drop(progress);
    // Ctrl-C reaches the workers too, and then it is they who are missed first.
    let outcome = match outcome {
        Ok(Some(outcome)) if !interrupt::asked() => outcome,
        Err(e) if !interrupt::asked() => return Err(e),
        _ => bail!("interrupted; nothing was written"),
    };
    for (path, record) in args.json.iter().zip(&outcome.records) {
        put(path, &(serde_json::to_string(record)? + "\n"))?;
    }
    show(&outcome.comparison, &args.limits, None)?;
    notices.say(&format!(
        "measured in turn on {} in {}, by {}",
        outcome.records[0].device.describe(),
        ui::duration(Duration::from_secs_f64(outcome.records[0].made.took)),
        outcome.records[0].clock.describe()
    ));
    Ok(verdict(&outcome.comparison))
}

fn report(args: ReportArgs) -> Result<ExitCode> {
    if args.forms.none() {
        crate::usage("bench", "name a form: --html, --markdown, --github or --bmf FILE");
    }
    let records = args.records.iter().map(|p| Record::read(p)).collect::<Result<Vec<_>>>()?;
    let newest = records.iter().max_by_key(|r| r.made.unix_time).context("no record")?;
    args.forms.write(&records, newest)?;
    Ok(ExitCode::SUCCESS)
}

impl Forms {
    fn none(&self) -> bool {
        [&self.bmf, &self.github, &self.markdown, &self.html].iter().all(|f| f.is_none())
    }

    fn write(&self, records: &[Record], newest: &Record) -> Result<()> {
        let line = |value: serde_json::Value| format!("{value}\n");
        if let Some(path) = &self.bmf {
            put(path, &line(export::bencher(newest)))?;
        }
        if let Some(path) = &self.github {
            put(path, &line(export::github(newest)))?;
        }
        if let Some(path) = &self.markdown {
            put(path, &export::markdown(newest))?;
        }
        if let Some(path) = &self.html {
            put(path, &html::page(records)?)?;
        }
        Ok(())
    }
}

/// To a file, whole or not at all; to stdout for `-`.
fn put(path: &Path, text: &str) -> Result<()> {
    if path.as_os_str() == "-" { ui::print(text) } else { write_whole(path, text) }
}

fn verdict(comparison: &Comparison) -> ExitCode {
    if comparison.failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The table on stdout unless stdout is asked for something else.
fn show(comparison: &Comparison, limits: &LimitArgs, json: Option<&Path>) -> Result<()> {
    let stdout = |path: Option<&Path>| path.is_some_and(|p| p.as_os_str() == "-");
    if let Some(path) = json {
        put(path, &format!("{}\n", comparison_json(comparison)))?;
    }
    if let Some(path) = &limits.markdown {
        put(path, &export::markdown_comparison(comparison))?;
    }
    if !stdout(json) && !stdout(limits.markdown.as_deref()) {
        ui::print(&comparison_table(comparison))?;
    }
    Ok(())
}

fn comparison_json(comparison: &Comparison) -> serde_json::Value {
    let row = |r: &Row| {
        json!({
            "name": r.name,
            "base": r.base,
            "new": r.new,
            "change": r.change.map(|c| c.estimate),
            "interval": r.change.map(|c| [c.low, c.high]),
            "verdict": format!("{:?}", r.verdict).to_lowercase(),
            "note": r.note,
        })
    };
    json!({
        "failed": comparison.failed(),
        "threshold": comparison.threshold,
        "paired": comparison.paired,
        "unlike": comparison.unlike,
        "cases": comparison.rows.iter().map(row).collect::<Vec<_>>(),
    })
}

fn comparison_table(comparison: &Comparison) -> String {
    let width = comparison.rows.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).min(60);
    let head = format!(
        "{:width$}  {:>11}  {:>11}  {:>8}  {:^19}\n",
        "case", "base", "new", "change", "interval"
    );
    let mut text = ui::heading(head.trim_end()) + "\n";
    for row in &comparison.rows {
        let known = |t: Option<f64>| t.map_or("-".to_owned(), export::time);
        let [guess, interval] = export::change(row);
        let verdict = match row.verdict {
            Verdict::Regression | Verdict::Wrong => ui::bad(row.verdict.describe()),
            Verdict::Improvement => ui::good(row.verdict.describe()),
            _ => row.verdict.describe().to_owned(),
        };
        let note = if row.note.is_empty() { String::new() } else { format!(" ({})", row.note) };
        text += &format!(
            "{:width$}  {:>11}  {:>11}  {guess:>8}  {interval:^19}  {verdict}{note}\n",
            row.name,
            known(row.base),
            known(row.new)
        );
    }
    for why in &comparison.unlike {
        text += &format!("compared by force: {why}\n");
    }
    text + &export::summary(comparison) + "\n"
}

fn table_of(record: &Record) -> String {
    let width = record.cases.iter().map(|c| c.name.chars().count()).max().unwrap_or(0).min(70);
    let head = format!(
        "{:width$}  {:>11}  {:>11}  {:>11}  {:>9}  {:>8}  {:>8}  {:>9}",
        "case", "time", "device", "wall", "GFLOP/s", "GB/s", "of limit", "memory"
    );
    let mut text = ui::heading(&head) + "\n";
    for case in &record.cases {
        if let Some(why) = &case.wrong {
            text += &format!("{:width$}  {} {why}\n", case.name, ui::bad("WRONG"));
            continue;
        }
        let known = |t: Option<f64>| t.map_or("-".to_owned(), export::time);
        text += &format!(
            "{:width$}  {:>11}  {:>11}  {:>11}  {:>9.2}  {:>8.2}  {:>6.0} %  {:>9}\n",
            case.name,
            export::time(case.seconds),
            known(case.device),
            known(case.wall),
            case.gflops(),
            case.gbytes(),
            100.0 * case.of_limit(&record.limits),
            export::memory(case.peak_bytes)
        );
    }
    let limits = record.limits;
    text + &format!("limits  {:.1} GFLOP/s  {:.1} GB/s, measured\n", limits.gflops, limits.gbytes)
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    notices: Notices,
    began: Instant,
    last_line: Instant,
}

impl Progress {
    fn new(notices: Notices) -> Self {
        let target = match notices.animated() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(1000), target);
        let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  {wide_msg}");
        bar.set_style(style.expect("the template is valid").progress_chars("━╸─"));
        bar.set_message("opening the device …");
        bar.tick();
        Progress { bar, notices, began: Instant::now(), last_line: Instant::now() }
    }

    fn step(&mut self, what: &str, share: f64) -> ControlFlow<()> {
        let left = self.began.elapsed().mul_f64((1.0 / share.max(0.01) - 1.0).max(0.0));
        let text = format!("{what}  ETA at most {}", ui::duration(left));
        self.bar.set_position((1000.0 * share) as u64);
        if self.notices.animated() {
            self.bar.set_message(text);
        } else if self.last_line.elapsed() > Duration::from_secs(15) {
            self.notices.say(&text);
            self.last_line = Instant::now();
        }
        if interrupt::asked() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        let _ = std::io::stderr().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_both_ways() {
        assert_eq!(share("5%"), Ok(0.05));
        assert_eq!(share(" 2.5 % "), Ok(0.025));
        assert_eq!(share("0.05"), Ok(0.05));
        for bad in ["", "%", "5", "-1%", "x", "100%", "nan", "inf"] {
            assert!(share(bad).is_err(), "{bad}");
        }
    }
}

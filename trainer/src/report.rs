//! One page to look at for one run or several: numbers, curves, what the model writes, the recipes. No network, no
//! files beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use minijinja::Environment;
use minijinja::value::Serde;
use plotters::style::RGBColor;
use serde::Serialize;

use crate::disk::write_atomically;
use crate::figures::{Figure, Figures, HELD_OUT, Key, colour, colours, legend};
use crate::metrics::{Metrics, Record, Sample, Validation, read_metrics, read_records};

const TEMPLATE: &str = include_str!("report.html");
/// Samples shown of one prompt and run.
const MAX_SAMPLES: usize = 40;
const MAX_SAMPLE_CHARS: usize = 4000;

/// A run's folder, read.
pub(crate) struct Run {
    pub name: String,
    pub folder: PathBuf,
    pub colour: RGBColor,
    pub points: Vec<Metrics>,
    pub validation: Vec<Validation>,
    pub samples: Vec<Sample>,
    pub recipe: Option<(String, toml::Value)>,
}

/// A phase of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PhaseSummary {
    /// "ar" or "diffusion".
    pub objective: String,
    /// How long it lasts.
    pub steps: u64,
}

/// The lowest loss on all held-out text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Best {
    /// Nats a token.
    pub loss: f64,
    /// Optimiser steps done then.
    pub step: u64,
}

/// What a run comes to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Its folder's name, or the whole path where two are alike.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// As the recipe has them.
    pub phases: Vec<PhaseSummary>,
    /// Steps done.
    pub step: u64,
    /// Steps of the recipe.
    pub total_steps: Option<u64>,
    /// Of the last step.
    pub loss: f64,
    /// Cross-entropy per supervised token of the last step that has one.
    pub ce_per_masked: Option<f64>,
    /// Over the steps of the last phase so far.
    pub best_validation: Option<Best>,
    /// Median over the steps.
    pub tokens_per_second: f64,
    /// Tokens seen in training.
    pub tokens: u64,
    /// Most device memory.
    pub peak_bytes: u64,
    /// Steps that did not move the weights.
    pub skipped: usize,
    /// Time spent in steps, without validation, samples and checkpoints.
    pub seconds: f64,
}

/// A page, and the numbers in its first table.
pub struct Report {
    /// HTML.
    pub page: String,
    /// One of each run.
    pub runs: Vec<Summary>,
}

/// What the template fills in; it escapes all text.
#[derive(Serialize)]
struct Page {
    names: Vec<String>,
    facts: Vec<Row>,
    differences: Vec<Row>,
    legend: Vec<Key>,
    figures: Vec<Figure>,
    by_tokens: bool,
    prompts: Vec<(String, Vec<Written>)>,
    recipes: Vec<(String, String)>,
    /// On a light page and on a dark one.
    colours: Vec<(String, String)>,
}

/// The report of these runs' folders.
pub fn report(folders: &[PathBuf]) -> Result<Report> {
    ensure!(!folders.is_empty(), "there is no run to report on; name the folder of one");
    let mut runs = Vec::new();
    for (i, folder) in folders.iter().enumerate() {
        runs.push(Run::read(folder, colour(i))?);
    }
    let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
    for run in &mut runs {
        if names.iter().filter(|n| **n == run.name).count() > 1 {
            run.name = run.folder.display().to_string();
        }
    }
    let summaries: Vec<Summary> = runs.iter().map(Run::summary).collect();
    let columns = (1600 / runs.len()).clamp(60, 480);
    let mut figures = Figures { runs: &runs, columns, by_tokens: false }.all()?;
    let by_tokens = runs.len() > 1 && runs.iter().all(|r| r.points.iter().all(|p| p.tokens > 0));
    if by_tokens {
        let others = Figures { runs: &runs, columns, by_tokens: true }.all()?;
        for (figure, other) in figures.iter_mut().zip(others) {
            figure.by_tokens = Some(other.by_steps);
        }
    }
    let texts = runs.iter().filter_map(|r| Some((r.name.clone(), r.recipe.as_ref()?.0.clone())));
    let page = Page {
        names: runs.iter().map(|r| r.name.clone()).collect(),
        facts: facts(&summaries),
        differences: differences(&runs),
        legend: legend(&runs),
        figures,
        by_tokens,
        prompts: prompts(&runs),
        recipes: texts.collect(),
        colours: colours(&runs),
    };
    let page = Environment::new().render_named_str("report.html", TEMPLATE, Serde(page))?;
    Ok(Report { page, runs: summaries })
}

/// Writes a page, whole or not at all.
pub fn write(path: &Path, page: &str) -> Result<()> {
    write_atomically(path, page.as_bytes())
}

impl Run {
    fn read(folder: &Path, colour: RGBColor) -> Result<Run> {
        let metrics = folder.join("metrics.jsonl");
        ensure!(
            metrics.exists(),
            "{} has no metrics.jsonl; name the folder that was given to `demask train --out`",
            folder.display()
        );
        let points = read_metrics(&metrics)?;
        ensure!(
            !points.is_empty(),
            "{} has no whole line yet; wait for the run's first step",
            metrics.display()
        );
        let path = folder.join("recipe.toml");
        let recipe = match path.exists() {
            true => {
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                let value = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
                Some((text, value))
            }
            false => None,
        };
        let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let name = whole.file_name().map_or("run".into(), |n| n.to_string_lossy().into_owned());
        Ok(Run {
            name,
            folder: folder.to_owned(),
            colour,
            points,
            validation: optional(&folder.join("validation.jsonl"))?,
            samples: optional(&folder.join("samples.jsonl"))?,
            recipe,
        })
    }

    pub fn last(&self) -> &Metrics {
        &self.points[self.points.len() - 1]
    }

    fn phases(&self) -> Vec<PhaseSummary> {
        let recipe = self.recipe.as_ref().and_then(|(_, r)| r.get("phase")?.as_array());
        let phase = |p: &toml::Value| {
            let steps = u64::try_from(p.get("steps")?.as_integer()?).ok()?;
            Some(PhaseSummary { objective: p.get("objective")?.as_str()?.to_owned(), steps })
        };
        recipe.into_iter().flatten().filter_map(phase).collect()
    }

    fn summary(&self) -> Summary {
        let last = self.last();
        let phases = self.phases();
        let total: u64 = phases.iter().map(|p| p.steps).sum();
        let mut speeds: Vec<f64> = self.points.iter().map(|p| p.tokens_per_second).collect();
        speeds.sort_by(f64::total_cmp);
        let held_out = self.validation.iter().filter(|v| v.text == HELD_OUT && v.loss.is_finite());
        // Losses of different objectives do not compare.
        let phase = held_out.clone().next_back().map(|v| &v.phase);
        let best = held_out.filter(|v| Some(&v.phase) == phase);
        let best = best.min_by(|a, b| a.loss.total_cmp(&b.loss));
        // A record holds the speed of its step, not its time.
        let first = if self.points[0].step <= 1 { 0 } else { self.points[0].tokens };
        let before = std::iter::once(first).chain(self.points.iter().map(|p| p.tokens));
        let times = self.points.iter().zip(before);
        let time = |(p, before): (&Metrics, u64)| {
            p.tokens.saturating_sub(before) as f64 / p.tokens_per_second
        };
        Summary {
            name: self.name.clone(),
            folder: self.folder.clone(),
            total_steps: (total > 0).then_some(total),
            phases,
            step: last.step,
            loss: last.loss,
            ce_per_masked: self.points.iter().rev().find_map(|p| p.ce_per_masked),
            best_validation: best.map(|v| Best { loss: v.loss, step: v.step }),
            tokens_per_second: speeds[speeds.len() / 2],
            tokens: last.tokens,
            peak_bytes: self.points.iter().map(|p| p.peak_bytes).max().unwrap_or(0),
            skipped: self.points.iter().filter(|p| p.skipped.is_some()).count(),
            seconds: times.map(time).filter(|t| t.is_finite()).sum(),
        }
    }
}

/// Records of a file that a run need not have.
fn optional<R: Record>(path: &Path) -> Result<Vec<R>> {
    if path.exists() { read_records(path) } else { Ok(Vec::new()) }
}

/// A line of the table: its name, and a cell for each run.
type Row = (String, Vec<String>);

fn facts(runs: &[Summary]) -> Vec<Row> {
    let dash = || "–".to_owned();
    let row = |name: &str, cell: &dyn Fn(&Summary) -> String| {
        (name.to_owned(), runs.iter().map(cell).collect())
    };
    let rows: Vec<Row> = vec![
        row("phases", &|r| {
            let names: Vec<String> =
                r.phases.iter().map(|p| format!("{} {}", p.objective, p.steps)).collect();
            if names.is_empty() { dash() } else { names.join(" → ") }
        }),
        row("steps", &|r| match r.total_steps {
            Some(total) if total > r.step => format!("{} of {total}", r.step),
            _ => r.step.to_string(),
        }),
        row("last loss", &|r| number(r.loss)),
        row("last cross-entropy", &|r| r.ce_per_masked.map_or(dash(), number)),
        row("best validation loss of the last phase", &|r| match r.best_validation {
            Some(best) => format!("{} at step {}", number(best.loss), best.step),
            None => dash(),
        }),
        row("tokens/s, median", &|r| count(r.tokens_per_second)),
        row("tokens", &|r| if r.tokens > 0 { count(r.tokens as f64) } else { dash() }),
        row("device memory", &|r| if r.peak_bytes > 0 { bytes(r.peak_bytes) } else { dash() }),
        row("skipped steps", &|r| r.skipped.to_string()),
        row("time in steps", &|r| if r.tokens > 0 { duration(r.seconds) } else { dash() }),
    ];
    rows.into_iter().filter(|(_, cells)| cells.iter().any(|c| c != "–")).collect()
}

/// What the recipes do not have in common.
fn differences(runs: &[Run]) -> Vec<Row> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (i, run) in runs.iter().enumerate() {
        let mut leaves = Vec::new();
        if let Some((_, value)) = &run.recipe {
            flatten("", value, &mut leaves);
        }
        for (name, value) in leaves {
            all.entry(name).or_insert_with(|| vec!["–".to_owned(); runs.len()])[i] = value;
        }
    }
    all.into_iter().filter(|(_, cells)| cells.iter().any(|c| *c != cells[0])).collect()
}

fn flatten(name: &str, value: &toml::Value, leaves: &mut Vec<(String, String)>) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                flatten(&name, value, leaves);
            }
        }
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            for (i, item) in items.iter().enumerate() {
                flatten(&format!("{name}[{i}]"), item, leaves);
            }
        }
        leaf => leaves.push((name.to_owned(), leaf.to_string())),
    }
}

#[derive(Serialize)]
struct Shown {
    step: u64,
    text: String,
}

/// What one run wrote behind a prompt: last and before.
#[derive(Serialize)]
struct Written {
    run: String,
    latest: Shown,
    older: Vec<Shown>,
}

fn prompts(runs: &[Run]) -> Vec<(String, Vec<Written>)> {
    let mut prompts: Vec<&str> = Vec::new();
    for sample in runs.iter().flat_map(|r| &r.samples) {
        if !prompts.contains(&sample.prompt.as_str()) {
            prompts.push(&sample.prompt);
        }
    }
    let written = |run: &Run, prompt: &str| {
        let of: Vec<&Sample> = run.samples.iter().filter(|s| s.prompt == prompt).collect();
        let n = of.len().min(MAX_SAMPLES);
        let shown = |k: usize| {
            let sample = of[if n == 1 { 0 } else { k * (of.len() - 1) / (n - 1) }];
            let mut text: String = sample.text.chars().take(MAX_SAMPLE_CHARS).collect();
            if text.len() < sample.text.len() {
                text += " […]";
            }
            Shown { step: sample.step, text }
        };
        let latest = shown(n.checked_sub(1)?);
        Some(Written {
            run: run.name.clone(),
            latest,
            older: (0..n - 1).rev().map(shown).collect(),
        })
    };
    let all = |prompt: &str| runs.iter().filter_map(|run| written(run, prompt)).collect();
    prompts.into_iter().map(|prompt| (prompt.to_owned(), all(prompt))).collect()
}

fn number(value: f64) -> String {
    if value.is_finite() { format!("{value:.4}") } else { "not finite".to_owned() }
}

fn count(n: f64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e4, "k")];
    match units.into_iter().find(|(least, _)| n >= *least) {
        Some((1e4, unit)) => format!("{:.1} {unit}", n / 1e3),
        Some((size, unit)) => format!("{:.2} {unit}", n / size),
        None if n < 100.0 => format!("{n:.1}"),
        None => format!("{n:.0}"),
    }
}

fn bytes(n: u64) -> String {
    let mib = n as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

fn duration(seconds: f64) -> String {
    match seconds.round() as u64 {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        s => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;

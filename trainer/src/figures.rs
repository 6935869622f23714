//! The figures of a report: each quantity that was recorded, over steps or tokens, for one run or several.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result};
use plotters::style::{Color, HSLColor, RGBColor};
use serde::Serialize;

use crate::metrics::{Metrics, Validation};
use crate::plot::{
    ALARM, Axis, COLOURS, INK, Line, Look, MUTED, Panel, Segment, Stroke, WARMUP, curve, median,
    segments, svg, thinned, traced,
};
use crate::report::Run;

/// Twice the pixels that a figure has on a page: the backend draws at whole pixels.
const SIZE: (u32, u32) = (960, 500);
const LOOK: Look = Look { text: 27, thin: 2, left: 106, below: 56, right: 44, x_ticks: 5 };
/// The name of all held-out text among the records of validation.
pub(crate) const HELD_OUT: &str = "held_out";

/// A colour and what it stands for.
#[derive(Clone, Serialize)]
pub(crate) struct Key {
    pub colour: String,
    pub name: String,
}

fn key(colour: RGBColor, name: impl Into<String>) -> Key {
    Key { colour: hex(colour), name: name.into() }
}

/// What the colours of most figures mean: phases of a run, or runs.
pub(crate) fn legend(runs: &[Run]) -> Vec<Key> {
    let [run] = runs else { return runs.iter().map(|r| key(r.colour, &r.name)).collect() };
    let segments = segments(&run.points);
    let mut keys: Vec<Key> = Vec::new();
    for segment in segments.iter().filter(|s| s.opens_phase) {
        if segment.phase == keys.len() {
            keys.push(key(colour(segment.phase), &segment.points[0].phase));
        }
    }
    if segments.iter().any(|s| s.warming) {
        keys.push(key(WARMUP, "noise warm-up"));
    }
    if run.points.iter().any(|p| p.skipped.is_some()) {
        keys.push(key(ALARM, "skipped step"));
    }
    keys
}

/// A plot on the page.
#[derive(Serialize)]
pub(crate) struct Figure {
    pub title: String,
    pub unit: String,
    pub legend: Vec<Key>,
    pub by_steps: String,
    pub by_tokens: Option<String>,
}

/// A quantity of a step.
struct Quantity {
    title: &'static str,
    unit: &'static str,
    value: fn(&Metrics) -> f64,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Scattered, and not about zero: a median is drawn through it.
    Scattered,
    /// The same from zero.
    FromZero,
    /// The same over powers of ten.
    Logarithmic,
    /// As it is.
    Exact,
}

const LOSSES: [Quantity; 2] = [
    Quantity {
        title: "Training loss",
        unit: "nats, weighted",
        value: |p| p.loss,
        kind: Kind::Scattered,
    },
    Quantity {
        title: "Cross-entropy",
        unit: "nats per supervised token",
        value: |p| p.ce_per_masked.unwrap_or(f64::NAN),
        kind: Kind::Scattered,
    },
];

const OTHERS: [Quantity; 5] = [
    Quantity {
        title: "Gradient norm",
        unit: "before clipping",
        value: |p| p.grad_norm,
        kind: Kind::Logarithmic,
    },
    Quantity { title: "Learning rate", unit: "", value: |p| p.lr, kind: Kind::Exact },
    Quantity {
        title: "Speed",
        unit: "tokens per second",
        value: |p| p.tokens_per_second,
        kind: Kind::FromZero,
    },
    Quantity {
        title: "FLOP utilisation",
        unit: "% of the device's measured rate",
        value: |p| p.flop_utilisation.map_or(f64::NAN, |u| 100.0 * u),
        kind: Kind::FromZero,
    },
    Quantity {
        title: "Device memory",
        unit: "MiB, most so far",
        value: |p| {
            if p.peak_bytes > 0 { p.peak_bytes as f64 / f64::from(1 << 20) } else { f64::NAN }
        },
        kind: Kind::Exact,
    },
];

/// Draws all figures over one x axis.
pub(crate) struct Figures<'a> {
    pub runs: &'a [Run],
    pub columns: usize,
    pub by_tokens: bool,
}

impl Figures<'_> {
    /// Every figure for which something was recorded.
    pub fn all(&self) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        for quantity in &LOSSES {
            figures.extend(self.quantity(quantity)?);
        }
        figures.extend(self.validation()?);
        figures.extend(self.mask_rates()?);
        for quantity in &OTHERS {
            figures.extend(self.quantity(quantity)?);
        }
        Ok(figures)
    }

    fn x(&self, p: &Metrics) -> f64 {
        if self.by_tokens { p.tokens as f64 } else { p.step as f64 }
    }

    /// The place of a step that need not have a record of its own.
    fn x_of_step(&self, run: &Run, step: u64) -> f64 {
        let reached = run.points.partition_point(|p| p.step <= step);
        match (self.by_tokens, reached.checked_sub(1)) {
            (false, _) => step as f64,
            (true, Some(at)) => run.points[at].tokens as f64,
            (true, None) => 0.0,
        }
    }

    /// The same in all figures.
    fn range(&self) -> Range<f64> {
        let ends = self.runs.iter().map(|r| self.x(r.last()));
        0.0..ends.fold(1.0, f64::max)
    }

    /// One line for each run, or for each phase of a single one.
    fn quantity(&self, quantity: &Quantity) -> Result<Option<Figure>> {
        let value = quantity.value;
        let values =
            || self.runs.iter().flat_map(|r| &r.points).map(value).filter(|v| v.is_finite());
        if values().next().is_none() {
            return Ok(None);
        }
        let y = match quantity.kind {
            Kind::Logarithmic => Axis::logarithmic(values()),
            _ => Axis::linear(values(), 5, false),
        };
        let runs: Vec<&Run> = self.runs.iter().collect();
        let mut panel = self.panel(&runs, y);
        let x = |p: &Metrics| self.x(p);
        for run in self.runs {
            let segments = segments(&run.points);
            let colour =
                |s: &Segment| if self.runs.len() == 1 { colour(s.phase) } else { run.colour };
            if quantity.kind == Kind::Exact {
                panel.lines.extend(segments.iter().map(|segment| {
                    let points = thinned(&curve(segment.points, &x, &value), self.columns);
                    Line { points, colour: colour(segment), stroke: Stroke::Strong }
                }));
            } else {
                panel.lines.extend(traced(&segments, &x, &value, self.columns, &colour));
            }
            if quantity.kind == Kind::Logarithmic {
                let skipped = run.points.iter().filter(|p| p.skipped.is_some());
                // Beyond any axis: drawn along the upper edge.
                let points =
                    thinned(&skipped.map(|p| (x(p), f64::MAX)).collect::<Vec<_>>(), self.columns);
                panel.lines.push(Line { points, colour: ALARM, stroke: Stroke::Dots });
            }
        }
        if quantity.kind == Kind::Scattered {
            // The first fall from a fresh model's loss would take most of the axis.
            let settled = 0.03 * panel.x.end;
            let medians = panel.lines.iter().filter(|l| l.stroke == Stroke::Strong);
            let medians = medians.flat_map(|l| &l.points);
            let late: Vec<f64> = medians.filter(|p| p.0 >= settled).map(|p| p.1).collect();
            if !late.is_empty() {
                panel.y = Axis::linear(late.into_iter(), 5, true);
            }
        }
        self.figure(quantity.title, quantity.unit, &panel, Vec::new()).map(Some)
    }

    /// Cross-entropy by mask rate: a figure for each run, a line for each bucket.
    fn mask_rates(&self) -> Result<Vec<Figure>> {
        let all: Vec<_> = self.runs.iter().map(|r| self.mask_rate_lines(r)).collect();
        let values =
            || all.iter().flat_map(|(lines, _)| lines).flat_map(|l| l.points.iter().map(|p| p.1));
        let mut figures = Vec::new();
        for (run, (lines, keys)) in self.runs.iter().zip(&all) {
            if lines.is_empty() {
                continue;
            }
            let mut panel = self.panel(&[run], Axis::linear(values(), 5, false));
            panel.lines = lines.clone();
            let unit = match self.runs {
                [_] => "nats, median".to_owned(),
                _ => format!("nats, median; {}", run.name),
            };
            figures.push(self.figure("Cross-entropy by mask rate", &unit, &panel, keys.clone())?);
        }
        Ok(figures)
    }

    fn mask_rate_lines(&self, run: &Run) -> (Vec<Line>, Vec<Key>) {
        let n = run.points.iter().map(|p| p.ce_by_rate.len()).max().unwrap_or(0);
        let of = |i: usize| {
            move |p: &Metrics| p.ce_by_rate.get(i).copied().flatten().unwrap_or(f64::NAN)
        };
        let x = |p: &Metrics| self.x(p);
        let (mut lines, mut keys) = (Vec::new(), Vec::new());
        for i in 0..n {
            let colour = ramp(i, n);
            for segment in segments(&run.points) {
                let measured = curve(segment.points, &x, &of(i));
                let points = median(&measured, run.points.len() / 50, self.columns / 2);
                if !points.is_empty() {
                    lines.push(Line { points, colour, stroke: Stroke::Strong });
                }
            }
            let (low, high) = (100.0 * i as f64 / n as f64, 100.0 * (i + 1) as f64 / n as f64);
            keys.push(key(colour, format!("{low:.0}–{high:.0} %")));
        }
        (lines, keys)
    }

    /// All held-out text and each source: in one figure for one run, in one each for several.
    fn validation(&self) -> Result<Vec<Figure>> {
        let mut texts: Vec<&str> = Vec::new();
        for v in self.runs.iter().flat_map(|r| &r.validation) {
            if !texts.contains(&v.text.as_str()) {
                texts.push(&v.text);
            }
        }
        texts.sort_by_key(|t| (*t != HELD_OUT, *t));
        let [run] = self.runs else {
            return texts.iter().map(|text| self.validation_of_runs(text)).collect();
        };
        if texts.is_empty() {
            return Ok(Vec::new());
        }
        let place = |i: usize| if texts[i] == HELD_OUT { INK } else { colour(i) };
        let (mut lines, mut keys) = (Vec::new(), Vec::new());
        for i in (0..texts.len()).rev() {
            lines.extend(self.validation_lines(run, texts[i], place(i)));
            keys.insert(0, key(place(i), text_name(texts[i])));
        }
        let panel = self.over(&[run], lines);
        let title = "Validation loss";
        Ok(vec![self.figure(
            title,
            "nats per token, an upper bound under diffusion",
            &panel,
            keys,
        )?])
    }

    fn validation_of_runs(&self, text: &str) -> Result<Figure> {
        let runs: Vec<&Run> = self.runs.iter().collect();
        let lines = runs.iter().flat_map(|run| self.validation_lines(run, text, run.colour));
        let panel = self.over(&runs, lines.collect());
        let unit = format!("nats per token; {}", text_name(text));
        self.figure("Validation loss", &unit, &panel, Vec::new())
    }

    /// One line a phase: what bounds the likelihood differs between them.
    fn validation_lines(&self, run: &Run, text: &str, colour: RGBColor) -> Vec<Line> {
        let records: Vec<&Validation> = run.validation.iter().filter(|v| v.text == text).collect();
        let stroke = if records.len() > 60 { Stroke::Strong } else { Stroke::Dotted };
        let line = |records: &[&Validation]| {
            let points = records.iter().filter(|v| v.loss.is_finite());
            let points: Vec<_> = points.map(|v| (self.x_of_step(run, v.step), v.loss)).collect();
            Line { points: thinned(&points, self.columns), colour, stroke }
        };
        records.chunk_by(|a, b| a.phase == b.phase).map(line).collect()
    }

    fn over(&self, runs: &[&Run], lines: Vec<Line>) -> Panel<'static> {
        let values = lines.iter().flat_map(|l| l.points.iter().map(|p| p.1));
        let mut panel = self.panel(runs, Axis::linear(values, 5, true));
        panel.lines = lines;
        panel
    }

    /// An empty panel with the phases of its runs marked; warm-ups only where there is one run.
    fn panel(&self, runs: &[&Run], y: Axis) -> Panel<'static> {
        let (bands, rules, names, lines) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let x = self.range();
        let mut panel = Panel { x, y, x_title: "", y_title: "", bands, rules, names, lines };
        for run in runs {
            let rule = if runs.len() == 1 { MUTED } else { run.colour };
            panel.mark(&segments(&run.points), &|p| self.x(p), rule);
        }
        if runs.len() > 1 {
            panel.bands.clear();
        }
        panel
    }

    fn figure(&self, title: &str, unit: &str, panel: &Panel, own: Vec<Key>) -> Result<Figure> {
        let drawing = svg(SIZE, |area| panel.draw(area, &LOOK))
            .with_context(|| format!("drawing {title}"))?;
        let (title, unit) = (title.to_owned(), unit.to_owned());
        let keys = if own.is_empty() { legend(self.runs) } else { own.clone() };
        let by_steps = inline(&drawing, &keys);
        Ok(Figure { title, unit, legend: own, by_steps, by_tokens: None })
    }
}

fn text_name(text: &str) -> &str {
    if text == HELD_OUT { "all held-out text" } else { text }
}

/// An SVG as part of a page: it takes the width it finds, and its lines say what they are.
fn inline(svg: &str, keys: &[Key]) -> String {
    let body = svg.find('>').map_or(svg, |end| &svg[end + 1..]);
    let mut page = format!("<svg viewBox=\"0 0 {} {}\" role=\"img\">", SIZE.0, SIZE.1);
    for line in body.split_inclusive("/>") {
        let stands_for = keys.iter().find(|k| line.contains(&format!("stroke=\"{}\"", k.colour)));
        match (stands_for, line.strip_suffix("/>")) {
            (Some(key), Some(open)) if line.contains("<polyline") => {
                let name = minijinja::HtmlEscape(&key.name);
                page += &format!("{open}><title>{name}</title></polyline>");
            }
            _ => page += line,
        }
    }
    page
}

/// The colour of the i-th phase or run.
pub(crate) fn colour(i: usize) -> RGBColor {
    COLOURS.get(i).copied().unwrap_or_else(|| hue(i, 0.42))
}

fn hue(i: usize, lightness: f64) -> RGBColor {
    let (r, g, b) = HSLColor((i as f64 * 0.618).fract(), 0.55, lightness).to_backend_color().rgb;
    RGBColor(r, g, b)
}

/// Of the i-th of n mask rates, from blue for few holes to red for many.
fn ramp(i: usize, n: usize) -> RGBColor {
    let stops = [(42, 120, 200), (120, 84, 190), (190, 62, 120), (214, 100, 30)];
    let at = 3.0 * i as f64 / (n.max(2) - 1) as f64;
    let from = (at as usize).min(2);
    let mix = |a: i32, b: i32| (f64::from(a) + (at - from as f64) * f64::from(b - a)).round() as u8;
    let (a, b) = (stops[from], stops[from + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

pub(crate) fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// Colours of lines, and what they are on a dark page: halfway to white.
pub(crate) fn colours(runs: &[Run]) -> Vec<(String, String)> {
    let buckets =
        runs.iter().flat_map(|r| &r.points).map(|p| p.ce_by_rate.len()).max().unwrap_or(0);
    let texts =
        runs.iter().map(|r| r.validation.iter().map(|v| &v.text).collect::<BTreeSet<_>>().len());
    let n = COLOURS.len().max(runs.len()).max(texts.max().unwrap_or(0));
    let all = (0..n).map(colour).chain((0..buckets).map(|i| ramp(i, buckets))).chain([ALARM]);
    let lighter = |c: u8| c + ((255 - c) as f64 * 0.42) as u8;
    all.map(|c| (hex(c), hex(RGBColor(lighter(c.0), lighter(c.1), lighter(c.2))))).collect()
}

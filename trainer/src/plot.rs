//! What the curve of a run and the report of several share: panels, axes, medians and thinning, drawn as SVG.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::chart::MeshStyle;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::metrics::Metrics;

/// Points in order of x.
pub(crate) type Curve = Vec<(f64, f64)>;

/// The place of a record on the x axis.
pub(crate) type Place<'a> = &'a dyn Fn(&Metrics) -> f64;

type Area<'b> = DrawingArea<SVGBackend<'b>, Shift>;
type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

pub(crate) const INK: RGBColor = RGBColor(40, 44, 52);
pub(crate) const FAINT: RGBColor = RGBColor(228, 230, 235);
pub(crate) const MUTED: RGBColor = RGBColor(120, 126, 138);
/// Cross-entropy beside the loss.
pub(crate) const CROSS_ENTROPY: RGBColor = RGBColor(88, 148, 108);
/// Behind a noise warm-up.
pub(crate) const WARMUP: RGBColor = RGBColor(250, 236, 205);
/// Steps whose update was skipped.
pub(crate) const ALARM: RGBColor = RGBColor(190, 30, 45);
/// One colour per phase of a run, or per run, in order of appearance.
pub(crate) const COLOURS: [RGBColor; 8] = [
    RGBColor(47, 105, 178),
    RGBColor(200, 84, 40),
    RGBColor(122, 76, 160),
    RGBColor(20, 128, 128),
    RGBColor(178, 48, 110),
    RGBColor(84, 124, 30),
    RGBColor(146, 106, 18),
    RGBColor(84, 98, 116),
];

/// Consecutive records of one phase, on one side of the end of its noise warm-up. Medians do not run across: the loss
/// jumps there by design.
pub(crate) struct Segment<'a> {
    pub points: &'a [Metrics],
    /// Which of the run's phases, by name and in order of appearance.
    pub phase: usize,
    /// A new phase begins here.
    pub opens_phase: bool,
    /// Noise is warming up.
    pub warming: bool,
    /// Where the next segment begins, or the run ends.
    pub end: &'a Metrics,
}

/// A run in segments.
pub(crate) fn segments(points: &[Metrics]) -> Vec<Segment<'_>> {
    let mut names: Vec<&str> = Vec::new();
    let mut segments: Vec<Segment> = Vec::new();
    let alike =
        |a: &Metrics, b: &Metrics| a.phase == b.phase && a.u_max.is_some() == b.u_max.is_some();
    for run in points.chunk_by(alike) {
        let name = run[0].phase.as_str();
        let opens_phase = segments.last().is_none_or(|s| s.points[0].phase != name);
        if let Some(previous) = segments.last_mut() {
            previous.end = &run[0];
        }
        let phase = names.iter().position(|n| *n == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        });
        let (warming, end) = (run[0].u_max.is_some(), &run[run.len() - 1]);
        segments.push(Segment { points: run, phase, opens_phase, warming, end });
    }
    segments
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stroke {
    /// What was measured.
    Pale,
    /// What it amounts to.
    Strong,
    /// Another quantity beside it.
    Dashed,
    /// Few measurements: each has a dot.
    Dotted,
    /// Dots alone.
    Dots,
}

/// One line of a panel.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub points: Curve,
    pub colour: RGBColor,
    pub stroke: Stroke,
}

/// The y axis: its range, and where it has labels.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub range: Range<f64>,
    pub ticks: Vec<(f64, String)>,
    pub logarithmic: bool,
}

impl Axis {
    /// Above every value, unless single spikes would flatten all the rest (the first step after a change of phase);
    /// such spikes are drawn at the edge. Begins at zero, unless the values lie far from it and `tight` is asked for.
    pub fn linear(values: impl Iterator<Item = f64>, n_ticks: usize, tight: bool) -> Axis {
        let mut values: Vec<f64> = values.filter(|v| v.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = match (values.first(), values.last()) {
            (Some(&low), Some(&high)) => {
                let usual = values[(values.len() - 1) * 99 / 100];
                (low, if high > 4.0 * usual && usual > 0.0 { 1.5 * usual } else { high })
            }
            _ => (0.0, 1.0),
        };
        let range = match tight && low > 0.5 * high {
            true => {
                low - 0.1 * (high - low).max(0.01 * high)
                    ..high + 0.1 * (high - low).max(0.01 * high)
            }
            false if high > 0.0 => low.min(0.0)..1.1 * high,
            false => low.min(0.0)..1.0,
        };
        let ticks = even_ticks(&range, n_ticks);
        let labels = labels(&ticks);
        Axis { range, ticks: ticks.into_iter().zip(labels).collect(), logarithmic: false }
    }

    /// From the lowest to the highest positive value, with labels at round numbers.
    pub fn logarithmic(values: impl Iterator<Item = f64>) -> Axis {
        let finite = values.map(f64::log10).filter(|v| v.is_finite());
        let span = |(low, high): (f64, f64), v: f64| (low.min(v), high.max(v));
        let (low, high) = match finite.fold((f64::INFINITY, f64::NEG_INFINITY), span) {
            (low, high) if low > high => (-1.0, 1.0),
            (low, high) => {
                let room = (0.06 * (high - low)).max(0.04);
                (low - room, high + room)
            }
        };
        let ticks = decade_ticks(low, high).into_iter();
        let ticks = ticks.map(|v| (v.log10(), labels(&[v]).concat())).collect();
        Axis { range: low..high, ticks, logarithmic: true }
    }

    /// Where a value is drawn: at the edge if it lies beyond, and nowhere if it is none.
    fn place(&self, value: f64) -> Option<f64> {
        let value = if self.logarithmic { value.log10() } else { value };
        value.is_finite().then(|| value.clamp(self.range.start, self.range.end))
    }
}

/// What plotters calls a coordinate: linear, with ticks of our choice.
struct Scale {
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        low + (share * f64::from(high - low)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// At most `n` round numbers in a range, evenly spaced.
pub(crate) fn even_ticks(range: &Range<f64>, n: usize) -> Vec<f64> {
    let least = (range.end - range.start) / n.max(1) as f64;
    let power = 10_f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|&s| s >= least * 0.999);
    let Some(step) = step.filter(|s| s.is_finite() && *s > 0.0) else { return vec![range.start] };
    let (first, last) = (range.start / step - 1e-9, range.end / step + 1e-9);
    let (first, last) = (first.ceil() as i64, last.floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Round numbers between two powers of ten: as few multiples in a decade as give three labels.
fn decade_ticks(low: f64, high: f64) -> Vec<f64> {
    let every = |n: i32, multiples: &[f64]| -> Vec<f64> {
        let decades = (low.floor() as i32..=high.ceil() as i32).filter(|d| d.rem_euclid(n) == 0);
        let all = decades.flat_map(|d| multiples.iter().map(move |m| m * 10_f64.powi(d)));
        all.filter(|v| (low..=high).contains(&v.log10())).collect()
    };
    let coarse = (((high - low) / 7.0).ceil() as i32).max(1);
    let fine: [&[f64]; 3] = [&[1.0], &[1.0, 3.0], &[1.0, 2.0, 5.0]];
    let choices = fine.into_iter().map(|multiples| every(coarse, multiples));
    let even = || even_ticks(&(10_f64.powf(low)..10_f64.powf(high)), 4);
    choices.into_iter().find(|ticks| ticks.len() >= 3).unwrap_or_else(even)
}

/// Numbers of one axis, in one unit.
pub(crate) fn labels(ticks: &[f64]) -> Vec<String> {
    let most = ticks.iter().fold(0.0, |most: f64, t| most.max(t.abs()));
    let least = ticks.iter().map(|t| t.abs()).filter(|t| *t > 0.0).fold(most, f64::min);
    let units = [(1e9, "G"), (1e6, "M"), (1e4, "k")];
    let unit = units.into_iter().find(|(least, _)| most >= *least).map(|(_, name)| name);
    let number = |value: f64| match (unit, value) {
        (_, 0.0) => "0".to_owned(),
        (Some("G"), v) => format!("{}G", round(v / 1e9)),
        (Some("M"), v) => format!("{}M", round(v / 1e6)),
        (Some(_), v) => format!("{}k", round(v / 1e3)),
        (None, v) if least < 1e-3 => format!("{v:.1e}").replace(".0e", "e"),
        (None, v) => round(v).to_string(),
    };
    ticks.iter().map(|&t| number(t)).collect()
}

fn round(value: f64) -> f64 {
    (value * 1e5).round() / 1e5
}

/// How large things are drawn.
pub(crate) struct Look {
    /// Pixels of a label's text.
    pub text: u32,
    /// Width of a thin line.
    pub thin: u32,
    /// Space for labels left of and below the plot, and right of it for half a label.
    pub left: u32,
    pub below: u32,
    pub right: u32,
    pub x_ticks: usize,
}

/// One plot.
pub(crate) struct Panel<'a> {
    pub x: Range<f64>,
    pub y: Axis,
    pub x_title: &'a str,
    pub y_title: &'a str,
    /// Noise warm-ups, from and to.
    pub bands: Vec<(f64, f64)>,
    /// Where a phase begins.
    pub rules: Vec<(f64, RGBColor)>,
    /// Names along the upper edge.
    pub names: Vec<(f64, String, RGBColor)>,
    pub lines: Vec<Line>,
}

impl Panel<'_> {
    /// Marks warm-ups and the beginnings of phases.
    pub fn mark(&mut self, segments: &[Segment], x: Place, rule: RGBColor) {
        for (i, segment) in segments.iter().enumerate() {
            let start = x(&segment.points[0]);
            if segment.warming {
                self.bands.push((start, x(segment.end)));
            }
            if segment.opens_phase && i > 0 {
                self.rules.push((start, rule));
            }
        }
    }

    /// Draws all of it.
    pub fn draw(&self, area: &Area, look: &Look) -> Drawn {
        let x_ticks = even_ticks(&self.x, look.x_ticks);
        let x_labels = labels(&x_ticks);
        let y = &self.y.range;
        let (y_ticks, y_labels): (Vec<f64>, Vec<String>) = self.y.ticks.iter().cloned().unzip();
        let mut chart: ChartContext<'_, _, Cartesian2d<Scale, Scale>> = ChartBuilder::on(area)
            .margin_top(look.text / 2)
            .margin_left(if self.y_title.is_empty() { 0 } else { look.text })
            .margin_right(look.right)
            .set_label_area_size(LabelAreaPosition::Left, look.left)
            .set_label_area_size(LabelAreaPosition::Bottom, look.below)
            .build_cartesian_2d(
                Scale { range: self.x.clone(), ticks: x_ticks.clone() },
                Scale { range: y.clone(), ticks: y_ticks.clone() },
            )?;
        for &(from, to) in &self.bands {
            let area = [(from, y.start), (to, y.end)];
            chart.draw_series([Rectangle::new(area, WARMUP.filled())])?;
        }
        let x_label = |x: &f64| named(&x_ticks, &x_labels, *x);
        let y_label = |y: &f64| named(&y_ticks, &y_labels, *y);
        let mut style: MeshStyle<_, _, _> = chart.configure_mesh();
        style
            .disable_x_mesh()
            .max_light_lines(0)
            .bold_line_style(FAINT.stroke_width(look.thin))
            .axis_style(MUTED.stroke_width(look.thin))
            .label_style(text(look.text, INK))
            .axis_desc_style(text(look.text + 1, INK))
            .set_all_tick_mark_size(look.text / 2)
            .x_label_formatter(&x_label)
            .y_label_formatter(&y_label)
            .x_desc(self.x_title)
            .y_desc(self.y_title)
            .draw()?;
        for &(x, colour) in &self.rules {
            let style = colour.mix(0.6).stroke_width(look.thin);
            chart.draw_series([PathElement::new([(x, y.start), (x, y.end)], style)])?;
        }
        for (x, name, colour) in &self.names {
            let style = text(look.text + 1, *colour).pos(Pos::new(HPos::Left, VPos::Center));
            let place = (*x, y.end - 0.045 * (y.end - y.start));
            let element = EmptyElement::at(place) + Text::new(name.clone(), (7, 0), style);
            chart.draw_series([element])?;
        }
        let pale_first = |line: &&Line| line.stroke != Stroke::Pale;
        let mut lines: Vec<&Line> = self.lines.iter().collect();
        lines.sort_by_key(pale_first);
        for line in lines {
            let points = line.points.iter();
            let mut points: Curve =
                points.filter_map(|&(x, y)| Some((x, self.y.place(y)?))).collect();
            if line.stroke == Stroke::Strong {
                // A spike shows at the edge; what amounts to a curve just enters there.
                let entered = points.iter().position(|p| p.1 < y.end).unwrap_or(0);
                points.drain(..entered.saturating_sub(1));
            }
            let (thin, thick) = (look.thin, 2 * look.thin);
            let dot = |&at| {
                Circle::new(
                    at,
                    if line.stroke == Stroke::Dots { thick } else { thick + thin },
                    line.colour.filled(),
                )
            };
            if matches!(line.stroke, Stroke::Dotted | Stroke::Dots) {
                chart.draw_series(points.iter().map(dot))?;
            }
            match line.stroke {
                Stroke::Pale => {
                    chart.draw_series(LineSeries::new(
                        points,
                        line.colour.mix(0.4).stroke_width(thin),
                    ))?;
                }
                Stroke::Strong | Stroke::Dotted => {
                    chart.draw_series(LineSeries::new(points, line.colour.stroke_width(thick)))?;
                }
                Stroke::Dashed => {
                    let style = line.colour.stroke_width(thick);
                    chart.draw_series(DashedLineSeries::new(points, 5, 3, style))?;
                }
                Stroke::Dots => {}
            }
        }
        Ok(())
    }
}

fn named(ticks: &[f64], labels: &[String], at: f64) -> String {
    let found = ticks.iter().position(|t| *t == at);
    found.map_or(String::new(), |i| labels[i].clone())
}

/// Text of so many pixels.
pub(crate) fn text(pixels: u32, colour: RGBColor) -> TextStyle<'static> {
    // The SVG backend divides a size by 1.24 on its way to `font-size`.
    ("sans-serif", f64::from(pixels) * 1.24).into_font().color(&colour)
}

/// An SVG of the given size, with what `paint` draws on it.
pub(crate) fn svg(size: (u32, u32), paint: impl FnOnce(&Area) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        paint(&root).and_then(|()| Ok(root.present()?)).map_err(|e| anyhow!("{e}"))?;
    }
    Ok(svg)
}

/// The finite values of records.
pub(crate) fn curve(points: &[Metrics], x: Place, value: &dyn Fn(&Metrics) -> f64) -> Curve {
    points.iter().map(|p| (x(p), value(p))).filter(|(_, v)| v.is_finite()).collect()
}

/// A running median at up to `columns` places. Its window reaches `reach` points to both sides and is cut short at the
/// ends: unlike an exponential average it neither lags behind a fall nor drags a single spike along.
pub(crate) fn median(curve: &[(f64, f64)], reach: usize, columns: usize) -> Curve {
    let at = |i: usize| {
        let window = i.saturating_sub(reach)..curve.len().min(i + reach + 1);
        let mut window: Vec<f64> = curve[window].iter().map(|c| c.1).collect();
        let middle = window.len() / 2;
        (curve[i].0, *window.select_nth_unstable_by(middle, f64::total_cmp).1)
    };
    let Some(last) = curve.len().checked_sub(1) else { return Curve::new() };
    let n = curve.len().min(columns.max(2));
    (0..n).map(|k| at(if n == 1 { 0 } else { k * last / (n - 1) })).collect()
}

/// At most two points per column, the lowest and the highest, so that spikes survive.
pub(crate) fn thinned(curve: &[(f64, f64)], columns: usize) -> Curve {
    if curve.len() <= 2 * columns {
        return curve.to_vec();
    }
    let extremes = |column: &[(f64, f64)]| {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let pair = [column.iter().min_by(by_value), column.iter().max_by(by_value)];
        let mut pair: Curve = pair.into_iter().flatten().copied().collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair
    };
    curve.chunks(curve.len().div_ceil(columns.max(1))).flat_map(extremes).collect()
}

/// What was measured of a run, pale, under its running median over about a fiftieth of the run, both of at most so
/// many columns, in a colour for each segment.
pub(crate) fn traced(
    segments: &[Segment],
    x: Place,
    value: &dyn Fn(&Metrics) -> f64,
    columns: usize,
    colour: &dyn Fn(&Segment) -> RGBColor,
) -> Vec<Line> {
    let n_points: usize = segments.iter().map(|s| s.points.len()).sum();
    let mut lines = Vec::new();
    for stroke in [Stroke::Pale, Stroke::Strong] {
        for segment in segments {
            let measured = curve(segment.points, x, value);
            let share = (columns * segment.points.len() / n_points.max(1)).max(8);
            let points = match stroke {
                Stroke::Pale => thinned(&measured, share),
                _ => median(&measured, n_points / 100, share),
            };
            lines.push(Line { points, colour: colour(segment), stroke });
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(even_ticks(&(0.0..1.1), 5), [0.0, 0.5, 1.0]);
        assert_eq!(even_ticks(&(0.0..600.0), 9), [0.0, 100.0, 200.0, 300.0, 400.0, 500.0, 600.0]);
        assert_eq!(labels(&even_ticks(&(1.0..20_000.0), 4)), ["5k", "10k", "15k", "20k"]);
        assert_eq!(labels(&even_ticks(&(0.0..3e-4), 3)), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(labels(&[0.0, 5e-4, 1e-3]), ["0", "5e-4", "1e-3"]);
        assert_eq!(labels(&[0.25, 1.5]), ["0.25", "1.5"]);
        assert_eq!(decade_ticks(-2.1, 1.2), [0.01, 0.1, 1.0, 10.0]);
        assert_eq!(decade_ticks(-0.4, 1.1), [1.0, 3.0, 10.0]);
        assert_eq!(decade_ticks(-0.1, 0.8), [1.0, 2.0, 5.0]);
        assert!((3..=5).contains(&decade_ticks(-0.05, 0.05).len()));
        assert!(decade_ticks(-30.0, 30.0).len() <= 8);
    }

    #[test]
    fn a_spike_does_not_flatten_an_axis() {
        let values = |spike: f64| (0..200).map(move |i| if i == 100 { spike } else { 2.0 });
        assert!(Axis::linear(values(50.0), 5, false).range.end < 4.0);
        assert!(Axis::linear(values(6.0), 5, false).range.end > 6.0);
        let tight = Axis::linear([1.0, 1.1].into_iter(), 5, true).range;
        assert!(tight.start > 0.9 && tight.end < 1.2, "{tight:?}");
        assert_eq!(Axis::linear([1.0, 1.1].into_iter(), 5, false).range.start, 0.0);
        let nothing = Axis::linear([f64::NAN].into_iter(), 5, true).range;
        assert!(nothing.start < nothing.end);
    }

    #[test]
    fn thinning_keeps_the_extremes() {
        let wave = |i: usize| match i {
            31_234 => 9.0,
            77_777 => -9.0,
            i => (i as f64 / 500.0).sin(),
        };
        let long: Curve = (0..100_000).map(|i| (i as f64, wave(i))).collect();
        let short = thinned(&long, 400);
        assert!(short.len() <= 800 && short.is_sorted_by(|a, b| a.0 <= b.0));
        assert!(short.contains(&(31_234.0, 9.0)) && short.contains(&(77_777.0, -9.0)));
        assert_eq!(thinned(&long[..800], 400), long[..800]);
    }

    #[test]
    fn a_median_is_whole_and_passes_over_spikes() {
        let long: Curve =
            (0..5_000).map(|i| (i as f64, if i == 2_500 { 1e6 } else { 3.0 })).collect();
        let median = median(&long, 50, 100);
        assert_eq!((median.len(), median[0].0, median[99].0), (100, 0.0, 4_999.0));
        assert!(median.iter().all(|p| p.1 == 3.0));
        assert_eq!(super::median(&long[..1], 50, 100), [(0.0, 3.0)]);
        assert!(super::median(&[], 50, 100).is_empty());
    }
}

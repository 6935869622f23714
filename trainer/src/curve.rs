//! Training metrics as one self-contained SVG. Loss above, gradient norm below, since their shapes
//! around a change of phase tell whether a conversion from autoregression to diffusion is healthy
//! (arXiv 2601.15892 §3.2 and Fig. 4).

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use plotters::chart::MeshStyle;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::metrics::Metrics;

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Curve = Vec<(f64, f64)>;

const SIZE: (u32, u32) = (1000, 660);
const LOSS_HEIGHT: u32 = 396;
/// Space for the labels left of the plots, and beside the last label of the step axis.
const LEFT: u32 = 84;
const RIGHT: u32 = 28;
const INK: RGBColor = RGBColor(40, 44, 52);
const FAINT: RGBColor = RGBColor(228, 230, 235);
const MUTED: RGBColor = RGBColor(120, 126, 138);
const CROSS_ENTROPY: RGBColor = RGBColor(88, 148, 108);
const WARMUP: RGBColor = RGBColor(250, 236, 205);
/// One colour per phase, in order of appearance.
const PHASES: [RGBColor; 4] =
    [RGBColor(47, 105, 178), RGBColor(200, 84, 40), RGBColor(122, 76, 160), RGBColor(20, 128, 128)];
/// Curves are thinned to about two points per pixel column.
const COLUMNS: usize = 900;

/// Plots `points` (in order of steps) as an SVG file: loss and, where recorded, cross-entropy per
/// masked token over the gradient norm on a logarithmic axis, with phases and noise warm-up marked.
/// Each measured curve is drawn pale, its running median strong.
pub fn draw(points: &[Metrics], title: &str, path: &Path) -> Result<()> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        bail!("there are no metrics to plot in {}; train a few steps first", path.display());
    };
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let steps = first.step as f64..last.step.max(first.step + 1) as f64;
        draw_panels(&root, points, title, steps)
            .map_err(|e| anyhow!("plotting {}: {e}", path.display()))?;
    }
    std::fs::write(path, svg)
        .with_context(|| format!("cannot write {}; does its folder exist?", path.display()))
}

type Drawn<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;
type Steps = std::ops::Range<f64>;

fn draw_panels(
    root: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    points: &[Metrics],
    title: &str,
    steps: Steps,
) -> Drawn {
    root.fill(&WHITE)?;
    root.draw_text(
        title,
        &text(20, INK).pos(Pos::new(HPos::Left, VPos::Center)),
        (LEFT as i32, 22),
    )?;
    let (_, body) = root.split_vertically(48);
    let (upper, lower) = body.split_vertically(LOSS_HEIGHT);
    let segments = segments(points);

    let top = loss_limit(points);
    let mut chart = panel(&upper, steps.clone(), 0.0..top)?;
    mark_phases(&mut chart, &segments, 0.0..top, true)?;
    mesh(&mut chart, "loss (nats)", "", 7, &|y| format!("{}", (y * 1e4).round() / 1e4))?;
    plot(&mut chart, &segments, &|p| p.loss.min(top))?;
    for segment in &segments {
        let ce = |p: &Metrics| p.ce_per_masked.map_or(f64::NAN, |ce| ce.min(top));
        let curve = thinned(&smoothed(segment.points, points.len(), &ce));
        chart.draw_series(DashedLineSeries::new(curve, 5, 3, CROSS_ENTROPY.stroke_width(2)))?;
    }
    if points.iter().any(|p| p.ce_per_masked.is_some()) {
        let style = text(14, CROSS_ENTROPY).pos(Pos::new(HPos::Right, VPos::Center));
        let right = (SIZE.0 - RIGHT) as i32;
        root.draw_text("dashed: cross-entropy per masked token", &style, (right, 40))?;
    }

    let decades = decades(points);
    let mut chart = panel(&lower, steps, decades.clone())?;
    mark_phases(&mut chart, &segments, decades.clone(), false)?;
    let n_labels = (decades.end - decades.start) as usize + 1;
    mesh(&mut chart, "gradient norm", "step", n_labels, &decade_label)?;
    plot(&mut chart, &segments, &|p| p.grad_norm.log10())?;
    root.present()?;
    Ok(())
}

/// Consecutive points of one phase, on one side of the end of its noise warm-up. Medians do not
/// run across: the loss jumps there by design.
struct Segment<'a> {
    points: &'a [Metrics],
    colour: RGBColor,
    /// A new phase begins here.
    opens_phase: bool,
    end: f64,
}

fn segments(points: &[Metrics]) -> Vec<Segment<'_>> {
    let mut names: Vec<&str> = Vec::new();
    let mut segments: Vec<Segment> = Vec::new();
    let alike =
        |a: &Metrics, b: &Metrics| (&a.phase, a.u_max.is_some()) == (&b.phase, b.u_max.is_some());
    for run in points.chunk_by(alike) {
        let phase = run[0].phase.as_str();
        let opens_phase = segments.last().is_none_or(|s| s.points[0].phase != phase);
        if let Some(previous) = segments.last_mut() {
            previous.end = run[0].step as f64;
        }
        let place = names.iter().position(|n| *n == phase).unwrap_or_else(|| {
            names.push(phase);
            names.len() - 1
        });
        let colour = PHASES[place % PHASES.len()];
        let end = run[run.len() - 1].step as f64;
        segments.push(Segment { points: run, colour, opens_phase, end });
    }
    segments
}

/// The top of the loss axis: above every point, unless single spikes would flatten all the rest
/// (the first step after a change of phase); such spikes are drawn at the edge.
fn loss_limit(points: &[Metrics]) -> f64 {
    let values = points.iter().flat_map(|p| [Some(p.loss), p.ce_per_masked]);
    let mut values: Vec<f64> = values.flatten().filter(|v| v.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let Some(&highest) = values.last() else { return 1.0 };
    let usual = values[(values.len() - 1) * 99 / 100];
    let top = if highest > 4.0 * usual { 1.5 * usual } else { highest };
    if top > 0.0 { 1.1 * top } else { 1.0 }
}

/// The range of the gradient norm in whole powers of ten.
fn decades(points: &[Metrics]) -> Steps {
    let finite = points.iter().map(|p| p.grad_norm.log10()).filter(|v| v.is_finite());
    let (low, high) =
        finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { -1.0..1.0 } else { low.floor()..high.ceil().max(low.floor() + 1.0) }
}

fn decade_label(exponent: &f64) -> String {
    match exponent.round() {
        e if (exponent - e).abs() > 1e-6 => String::new(),
        e if (-3.0..=4.0).contains(&e) => format!("{}", 10_f64.powf(e)),
        e => format!("1e{e}"),
    }
}

fn step_label(step: &f64) -> String {
    match *step {
        s if s >= 10_000.0 && s % 1000.0 == 0.0 => format!("{}k", s / 1000.0),
        s => format!("{s}"),
    }
}

fn text(pixels: u32, colour: RGBColor) -> TextStyle<'static> {
    // The SVG backend divides a size by 1.24 on its way to `font-size`.
    ("sans-serif", f64::from(pixels) * 1.24).into_font().color(&colour)
}

fn panel<'a, 'b>(
    area: &DrawingArea<SVGBackend<'b>, plotters::coord::Shift>,
    x: Steps,
    y: Steps,
) -> Drawn<Chart<'a, 'b>> {
    Ok(ChartBuilder::on(area)
        .margin_top(8)
        .margin_left(12)
        .margin_right(RIGHT)
        .set_label_area_size(LabelAreaPosition::Left, LEFT - 12)
        .set_label_area_size(LabelAreaPosition::Bottom, 44)
        .build_cartesian_2d(x, y)?)
}

fn mesh(
    chart: &mut Chart,
    y_title: &str,
    x_title: &str,
    n_labels: usize,
    y_label: &dyn Fn(&f64) -> String,
) -> Drawn {
    let mut style: MeshStyle<_, _, _> = chart.configure_mesh();
    style
        .disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(FAINT)
        .axis_style(MUTED)
        .label_style(text(13, INK))
        .axis_desc_style(text(14, INK))
        .x_labels(9)
        .y_labels(n_labels)
        .x_label_formatter(&step_label)
        .y_label_formatter(y_label)
        .x_desc(x_title)
        .y_desc(y_title)
        .draw()?;
    Ok(())
}

/// Tints the noise warm-ups, rules a dashed line where a phase begins, and names both.
fn mark_phases(chart: &mut Chart, segments: &[Segment], y: Steps, named: bool) -> Drawn {
    let below_top = y.end - 0.045 * (y.end - y.start);
    for (i, segment) in segments.iter().enumerate() {
        let start = segment.points[0].step as f64;
        let warming = segment.points[0].u_max.is_some();
        if warming {
            let area = [(start, y.start), (segment.end, y.end)];
            chart.draw_series([Rectangle::new(area, WARMUP.filled())])?;
        }
        let new_phase = segment.opens_phase && i > 0;
        if new_phase {
            let line = [(start, y.start), (start, y.end)];
            chart.draw_series(DashedLineSeries::new(line, 4, 4, INK.stroke_width(1)))?;
        }
        if named && (segment.opens_phase || warming) {
            let phase = &segment.points[0].phase;
            let name = if warming { format!("{phase}, noise warm-up") } else { phase.clone() };
            let style = text(14, segment.colour).pos(Pos::new(HPos::Left, VPos::Center));
            let element = EmptyElement::at((start, below_top)) + Text::new(name, (7, 0), style);
            chart.draw_series([element])?;
        }
    }
    Ok(())
}

fn plot(chart: &mut Chart, segments: &[Segment], value: &dyn Fn(&Metrics) -> f64) -> Drawn {
    let n_points = segments.iter().map(|s| s.points.len()).sum();
    for segment in segments {
        let measured = segment.points.iter().map(|p| (p.step as f64, value(p)));
        let measured: Curve = measured.filter(|(_, v)| v.is_finite()).collect();
        let pale = segment.colour.mix(0.4).stroke_width(1);
        chart.draw_series(LineSeries::new(thinned(&measured), pale))?;
        let median = thinned(&smoothed(segment.points, n_points, value));
        chart.draw_series(LineSeries::new(median, segment.colour.stroke_width(2)))?;
    }
    Ok(())
}

/// Running median over about a fiftieth of the run, centred, cut short at the ends: unlike an
/// exponential average it neither lags behind a fall nor drags a single spike along. Steps without
/// a finite value are left out.
fn smoothed(points: &[Metrics], n_points: usize, value: &dyn Fn(&Metrics) -> f64) -> Curve {
    let curve = points.iter().map(|p| (p.step as f64, value(p)));
    let curve: Curve = curve.filter(|(_, v)| v.is_finite()).collect();
    let reach = n_points / 100;
    let median = |i: usize| {
        let window = i.saturating_sub(reach)..curve.len().min(i + reach + 1);
        let mut window: Vec<f64> = curve[window].iter().map(|c| c.1).collect();
        let middle = window.len() / 2;
        *window.select_nth_unstable_by(middle, f64::total_cmp).1
    };
    (0..curve.len()).map(|i| (curve[i].0, median(i))).collect()
}

/// At most two points per pixel column, the lowest and the highest, so that spikes survive.
fn thinned(curve: &[(f64, f64)]) -> Curve {
    if curve.len() <= 2 * COLUMNS {
        return curve.to_vec();
    }
    let extremes = |column: &[(f64, f64)]| {
        let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut pair: Curve = [column.iter().min_by(by_value), column.iter().max_by(by_value)]
            .into_iter()
            .flatten()
            .copied()
            .collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        pair
    };
    curve.chunks(curve.len().div_ceil(COLUMNS)).flat_map(extremes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u64, phase: &str, loss: f64, u_max: Option<f64>) -> Metrics {
        let phase = phase.to_string();
        let (grad_norm, lr, tokens_per_second) = (loss / 7.0, 1e-3, 5e4);
        let ce_per_masked = (phase == "diffusion").then_some(2.0);
        Metrics {
            step,
            phase,
            loss,
            grad_norm,
            lr,
            tokens_per_second,
            ce_per_masked,
            u_max,
            ..Metrics::default()
        }
    }

    /// Autoregression, a noise warm-up with its jump, diffusion, one spike and one divergence.
    fn run(n: u64) -> Vec<Metrics> {
        let wobble = |step: u64| 1.0 + 0.08 * ((step * 7919 % 101) as f64 / 50.0 - 1.0);
        let at = |step: u64| match (step as f64 / n as f64, step) {
            (_, s) if s == n / 3 => point(s, "diffusion", 12.6, Some(1e-3)),
            (_, s) if s == n - 9 => point(s, "diffusion", f64::NAN, None),
            (x, s) if x < 1.0 / 3.0 => {
                point(s, "ar", (1.4 + 4.0 * (-20.0 * x).exp()) * wobble(s), None)
            }
            (x, s) if x < 0.5 => {
                let u = (x - 1.0 / 3.0) * 6.0;
                point(s, "diffusion", (0.02 + u) * wobble(s), Some(u))
            }
            (_, s) => point(s, "diffusion", 1.6 * wobble(s), None),
        };
        (0..n).map(at).collect()
    }

    #[test]
    fn segments_end_with_phases_and_warmup() {
        let points = run(60);
        let segments = segments(&points);
        let lengths: Vec<usize> = segments.iter().map(|s| s.points.len()).collect();
        assert_eq!(lengths, [20, 10, 30]);
        assert_eq!(segments.iter().map(|s| s.end).collect::<Vec<_>>(), [20.0, 30.0, 59.0]);
        assert_eq!(segments[1].colour, segments[2].colour);
        assert_ne!(segments[0].colour, segments[1].colour);
    }

    #[test]
    fn a_plot_is_one_small_svg_whatever_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curve.svg");
        let long = run(20_000);
        for points in [&long[..], &long[..1], &long[19_991..19_992], &run(60)] {
            draw(points, "a <run> & more", &path).unwrap();
            let svg = std::fs::read_to_string(&path).unwrap();
            assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
            assert!(svg.contains("gradient norm") && svg.contains("a &lt;run&gt; &amp; more"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"));
            assert!(svg.len() < 600_000, "{} bytes", svg.len());
        }
        assert!(draw(&[], "", &path).unwrap_err().to_string().contains("train a few steps"));
    }
}

//! Training metrics as one self-contained SVG. Loss above, gradient norm below, since their shapes
//! around a change of phase tell whether a conversion from autoregression to diffusion is healthy
//! (arXiv 2601.15892 §3.2 and Fig. 4).

use std::path::Path;

use anyhow::{Context, Result, bail};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::disk::write_atomically;
use crate::metrics::Metrics;
use crate::plot::{
    Axis, COLOURS, CROSS_ENTROPY, INK, Line, Look, Panel, Segment, Stroke, curve, median, segments,
    svg, text, traced,
};

const SIZE: (u32, u32) = (1000, 660);
const LOSS_HEIGHT: u32 = 396;
const LOOK: Look = Look { text: 13, thin: 1, left: 71, below: 44, right: 28, x_ticks: 9 };
/// Curves are thinned to about two points per pixel column.
const COLUMNS: usize = 900;

/// Plots `points` (in order of steps) as an SVG file: loss and, where recorded, cross-entropy per
/// masked token over the gradient norm on a logarithmic axis, with phases and noise warm-up marked.
/// Each measured curve is drawn pale, its running median strong.
pub fn draw(points: &[Metrics], title: &str, path: &Path) -> Result<()> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else {
        bail!("there are no metrics to plot in {}; train a few steps first", path.display());
    };
    let steps = first.step as f64..last.step.max(first.step + 1) as f64;
    let (loss, norm) = panels(points, steps);
    let svg = svg(SIZE, |root| {
        root.fill(&WHITE)?;
        let style = text(20, INK).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw_text(title, &style, ((LOOK.text + LOOK.left) as i32, 22))?;
        if points.iter().any(|p| p.ce_per_masked.is_some()) {
            let style = text(14, CROSS_ENTROPY).pos(Pos::new(HPos::Right, VPos::Center));
            let right = (SIZE.0 - LOOK.right) as i32;
            root.draw_text("dashed: cross-entropy per masked token", &style, (right, 40))?;
        }
        let (upper, lower) = root.split_vertically(48).1.split_vertically(LOSS_HEIGHT);
        loss.draw(&upper, &LOOK)?;
        norm.draw(&lower, &LOOK)
    })
    .with_context(|| format!("plotting {}", path.display()))?;
    write_atomically(path, svg.as_bytes())
}

fn panels(points: &[Metrics], steps: std::ops::Range<f64>) -> (Panel<'static>, Panel<'static>) {
    let segments = segments(points);
    let step = |p: &Metrics| p.step as f64;
    let colour = |s: &Segment| COLOURS[s.phase % COLOURS.len()];
    let panel = |y: Axis, x_title, y_title, lines| {
        let x = steps.clone();
        let (bands, rules, names) = (Vec::new(), Vec::new(), Vec::new());
        let mut panel = Panel { x, y, x_title, y_title, bands, rules, names, lines };
        panel.mark(&segments, &step, INK);
        panel
    };

    let values = points.iter().flat_map(|p| [Some(p.loss), p.ce_per_masked]).flatten();
    let lines = traced(&segments, &step, &|p| p.loss, COLUMNS, &colour);
    let mut loss = panel(Axis::linear(values, 7, false), "", "loss (nats)", lines);
    for segment in &segments {
        let ce = curve(segment.points, &step, &|p| p.ce_per_masked.unwrap_or(f64::NAN));
        let points = median(&ce, points.len() / 100, COLUMNS);
        loss.lines.push(Line { points, colour: CROSS_ENTROPY, stroke: Stroke::Dashed });
        if segment.opens_phase || segment.warming {
            let phase = &segment.points[0].phase;
            let name =
                if segment.warming { format!("{phase}, noise warm-up") } else { phase.clone() };
            loss.names.push((step(&segment.points[0]), name, colour(segment)));
        }
    }

    let norms = Axis::logarithmic(points.iter().map(|p| p.grad_norm));
    let lines = traced(&segments, &step, &|p| p.grad_norm, COLUMNS, &colour);
    (loss, panel(norms, "step", "gradient norm", lines))
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
        assert_eq!(segments.iter().map(|s| s.end.step).collect::<Vec<_>>(), [20, 30, 59]);
        assert_eq!(segments.iter().map(|s| s.phase).collect::<Vec<_>>(), [0, 1, 1]);
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

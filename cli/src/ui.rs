//! What all commands share of the terminal: where text goes, numbers for people, a few colours.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use console::{Style, Term};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Prints a result to stdout. A closed pipe is an error that `main` turns into success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints one JSON object to stdout.
pub fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value}\n"))
}

/// Prints a line to stderr, whatever was asked for; a stderr that nobody reads is no reason to
/// fail.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Notices and progress on stderr, unless `--quiet`.
#[derive(Clone, Copy)]
pub struct Notices {
    quiet: bool,
}

impl Notices {
    /// As the options say.
    pub fn new(quiet: bool) -> Self {
        Notices { quiet }
    }

    /// One line.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            complain(line);
        }
    }

    /// Whether a moving display on stderr has a reader.
    pub fn animated(&self) -> bool {
        !self.quiet && Term::stderr().is_term()
    }
}

/// A bar of 1000 parts with an ETA.
pub fn share_bar(notices: Notices) -> ProgressBar {
    let target = match notices.animated() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(1000), target);
    let style = ProgressStyle::with_template("{bar:24} {percent}%  ETA {eta}");
    bar.set_style(style.expect("the template is valid").progress_chars("━╸─"));
    bar
}

/// Whether stdout is a terminal that can be drawn on.
pub fn stdout_is_terminal() -> bool {
    let dumb = std::env::var("TERM").is_ok_and(|t| t == "dumb");
    std::io::stdout().is_terminal() && !dumb
}

/// Columns of the terminal.
pub fn columns() -> usize {
    let (_, columns) = Term::stdout().size_checked().unwrap_or((24, 80));
    usize::from(columns).max(20)
}

/// Whether a drawing has hidden the cursor.
static HIDDEN: AtomicBool = AtomicBool::new(false);

/// Hides the cursor of a terminal that is drawn on.
pub fn hide_cursor() {
    HIDDEN.store(true, Ordering::SeqCst);
    let _ = Term::stdout().hide_cursor();
}

/// Shows it again, if it was hidden.
pub fn restore_cursor() {
    if HIDDEN.swap(false, Ordering::SeqCst) {
        let _ = Term::stdout().show_cursor();
    }
}

/// Headings on stdout; plain where colours are off.
pub fn heading(text: &str) -> String {
    Style::new().bold().apply_to(text).to_string()
}

/// Something fine on stdout.
pub fn good(text: &str) -> String {
    Style::new().green().apply_to(text).to_string()
}

/// Something wrong on stdout.
pub fn bad(text: &str) -> String {
    Style::new().red().bold().apply_to(text).to_string()
}

/// Something of less interest on stdout.
pub fn dim(text: &str) -> String {
    Style::new().dim().apply_to(text).to_string()
}

/// The same on stderr.
pub fn dim_stderr(text: &str) -> String {
    Style::new().for_stderr().dim().apply_to(text).to_string()
}

/// [`dim`] line by line, so that the last line stands for itself.
pub fn dim_lines(text: &str) -> String {
    let line = |line: &str| if line.is_empty() { String::new() } else { dim(line) };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// Breaks text into lines of at most the terminal's width, each behind `indent` blanks.
pub fn wrap(text: &str, indent: usize) -> String {
    let most = columns().min(100);
    let (mut lines, mut line) = (String::new(), " ".repeat(indent));
    for word in text.split(' ') {
        if line.len() > indent && line.chars().count() + 1 + word.chars().count() > most {
            lines += &format!("{line}\n");
            line = " ".repeat(indent);
        }
        if line.len() > indent {
            line.push(' ');
        }
        line += word;
    }
    lines + &line + "\n"
}

/// `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64 / 1024.0;
    let mut unit = units[0];
    for larger in &units[1..] {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    match n {
        0..1024 => format!("{n} bytes"),
        _ if value.fract() < 0.05 => format!("{value:.0} {unit}"),
        _ => format!("{value:.1} {unit}"),
    }
}

/// Three significant digits, thousands as `k`, millions as `M`.
pub fn count(n: f64) -> String {
    match n {
        0.0 => "0".to_owned(),
        n if n >= 999_500.0 => format!("{:.2}M", n / 1e6),
        n if n >= 9_995.0 => format!("{:.1}k", n / 1e3),
        n if n >= 99.95 => format!("{n:.0}"),
        n if n >= 9.995 => format!("{n:.1}"),
        n => format!("{n:.2}"),
    }
}

/// `3.2 s`, `4 m 05 s`, `2 h 10 m`.
pub fn duration(d: Duration) -> String {
    let s = d.as_secs_f64();
    match s.round() as u64 {
        _ if s < 9.95 => format!("{s:.1} s"),
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} m {:02} s", s / 60, s % 60),
        s => format!("{} h {:02} m", s / 3600, s % 3600 / 60),
    }
}

/// Recent values as bars, the largest on top; older ones are averaged so that `width` bars tell
/// all.
pub fn sparkline(values: &[f64], width: usize) -> String {
    let n = values.len();
    let bars = n.min(width);
    let means: Vec<f64> = (0..bars)
        .map(|i| {
            let part = &values[i * n / bars..(i + 1) * n / bars];
            part.iter().sum::<f64>() / part.len() as f64
        })
        .collect();
    let low = means.iter().copied().fold(f64::INFINITY, f64::min);
    let high = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let blocks = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let bar = |v: f64| match v.is_finite() {
        true if high > low => blocks[((v - low) / (high - low) * 7.0).round() as usize],
        true => blocks[3],
        false => '?',
    };
    means.into_iter().map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        assert_eq!([bytes(12), bytes(1024), bytes(1 << 27)], ["12 bytes", "1 KiB", "128 MiB"]);
        assert_eq!([bytes(1_600_000_000), bytes(u64::MAX)], ["1.5 GiB", "16777216 TiB"]);
        assert_eq!(count(0.0), "0");
        assert_eq!([count(0.5), count(12.34), count(1234.0)], ["0.50", "12.3", "1234"]);
        assert_eq!([count(12_345.0), count(1_234_567.0)], ["12.3k", "1.23M"]);
        let times = [3.21, 59.7, 245.0, 7800.0].map(|s| duration(Duration::from_secs_f64(s)));
        assert_eq!(times, ["3.2 s", "1 m 00 s", "4 m 05 s", "2 h 10 m"]);
    }

    #[test]
    fn a_sparkline_follows_its_values() {
        assert_eq!(sparkline(&[], 8), "");
        assert_eq!(sparkline(&[1.0, 1.0], 8), "▄▄");
        assert_eq!(sparkline(&[8.0, 4.5, 1.0], 8), "█▅▁");
        assert_eq!(sparkline(&[4.0, 2.0, 1.0, 1.0], 2), "█▁");
        assert_eq!(sparkline(&[f64::NAN, 2.0, 1.0], 3), "?█▁");
    }
}

//! The three ways to print rows.

use std::fs::File;
use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::peer::Out;
use crate::race::{Measured, Row, Verdict, median};

/// How to print.
#[derive(Clone, Copy, PartialEq)]
pub enum Format {
    /// Columns of blanks.
    Text,
    /// A Markdown table.
    Markdown,
    /// One JSON object a line.
    Json,
}

/// A table whose rows appear as soon as they are measured.
pub struct Table {
    format: Format,
    title: &'static str,
    devices: Vec<String>,
    save: Option<File>,
}

const HEADINGS: [&str; 6] =
    ["work", "peer", "median of a run", "figure", "demask is × as fast", "result"];
const WIDTHS: [usize; 6] = [30, 19, 17, 15, 20, 30];

impl Table {
    /// Prints the heading. `save` gets every row as JSON, whatever is printed.
    pub fn begin(format: Format, title: &'static str, save: Option<File>) -> Table {
        match format {
            Format::Text => {
                println!("{title}\n");
                println!("{}", columns(HEADINGS.map(str::to_owned)));
            }
            Format::Markdown => {
                println!("### {title}\n\n| {} |\n|---|---|---|---|---|---|", HEADINGS.join(" | "));
            }
            Format::Json => {}
        }
        Table { format, title, devices: Vec::new(), save }
    }

    /// Prints some rows.
    pub fn add(&mut self, rows: &[Row]) -> Result<()> {
        for row in rows {
            if let Some(file) = &mut self.save {
                writeln!(file, "{}", object(self.title, row))
                    .context("cannot write --save's file")?;
            }
            let device = format!("{}: {}", row.peer.name(), row.device);
            if !row.device.is_empty() && !self.devices.contains(&device) {
                self.devices.push(device);
            }
            match self.format {
                Format::Text => println!("{}", columns(cells(row))),
                Format::Markdown => println!("| {} |", cells(row).join(" | ")),
                Format::Json => println!("{}", object(self.title, row)),
            }
        }
        Ok(())
    }

    /// Prints the devices that ran.
    pub fn end(self) {
        if self.format != Format::Json {
            println!("\n{}\n", self.devices.join("  \n"));
        }
    }
}

fn columns(cells: [String; 6]) -> String {
    let padded = cells.iter().zip(WIDTHS).map(|(cell, width)| format!("{cell:<width$}"));
    padded.collect::<String>().trim_end().to_owned()
}

fn cells(row: &Row) -> [String; 6] {
    let blank = String::new;
    let (name, peer) = (row.work.clone(), row.peer.name().to_owned());
    match &row.outcome {
        Ok(m) => {
            let figure = format!("{} {}", short(m.figure), m.unit);
            let ratio = m.ratio.map_or_else(blank, |r| format!("{r:.2}"));
            [name, peer, time(m), figure, ratio, verdict(m)]
        }
        Err(Out::Skipped(why)) => {
            [name, peer, blank(), blank(), blank(), format!("SKIPPED: {why}")]
        }
        Err(Out::Failed(why)) => [name, peer, blank(), blank(), blank(), format!("FAILED: {why}")],
    }
}

fn short(x: f64) -> String {
    if x >= 100.0 { format!("{x:.0}") } else { format!("{x:.1}") }
}

/// The median, and how far the rounds lie apart.
fn time(m: &Measured) -> String {
    let middle = median(m.seconds.clone());
    let spread = 100.0 * (m.seconds[m.seconds.len() - 1] - m.seconds[0]) / 2.0 / middle;
    match middle {
        s if s >= 1.0 => format!("{s:.2} s ±{spread:.0} %"),
        s if s >= 1e-3 => format!("{:.1} ms ±{spread:.0} %", s * 1e3),
        s => format!("{:.1} µs ±{spread:.0} %", s * 1e6),
    }
}

fn verdict(m: &Measured) -> String {
    let word = if m.verdict.is_good() { "agrees" } else { "DIFFERS" };
    match m.verdict {
        Verdict::Reference => "reference".to_owned(),
        Verdict::Unjudged => "not compared".to_owned(),
        Verdict::Numbers { error: 0.0, agrees: true } => "equal".to_owned(),
        Verdict::Numbers { error, .. } => format!("{word}, {error:.0e}"),
        Verdict::Parts { at, margin, .. } => {
            format!("{word}, parts at token {} by {margin:.0e} nats", at + 1)
        }
    }
}

fn object(title: &str, row: &Row) -> serde_json::Value {
    let mut object = json!({
        "table": title, "work": row.work, "peer": row.peer.name(), "device": row.device,
    });
    match &row.outcome {
        Ok(m) => {
            object["seconds"] = json!(m.seconds);
            object["figure"] = json!(m.figure);
            object["unit"] = json!(m.unit);
            object["times_demask"] = json!(m.ratio);
            match m.verdict {
                Verdict::Numbers { error, .. } => object["error"] = json!(error),
                Verdict::Parts { at, margin, .. } => {
                    object["parts_at"] = json!(at);
                    object["margin"] = json!(margin);
                }
                Verdict::Reference | Verdict::Unjudged => {}
            }
            object["compared"] = json!(m.verdict != Verdict::Unjudged);
            object["agrees"] = json!(m.verdict.is_good());
        }
        Err(Out::Skipped(why)) => object["skipped"] = json!(why),
        Err(Out::Failed(why)) => object["failed"] = json!(why),
    }
    object
}

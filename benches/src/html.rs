//! One file to look at: for each device what it can do, how near each case comes to that (roofline), and how times went
//! over commits. No scripts, nothing to load.

use std::collections::BTreeMap;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::export::{memory, time};
use crate::record::{CaseRecord, Record};

const STYLE: &str = "\
body{font:15px/1.45 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.5rem;border-top:1px solid #d5dae2;padding-top:1.2rem}
h3{font-size:1rem;margin-bottom:.3rem}
p.facts{color:#4a5568;margin:.2rem 0}
table{border-collapse:collapse;width:100%;font-size:.86rem}
th,td{text-align:right;white-space:nowrap;padding:.25rem .5rem;border-bottom:1px solid #e6e9ee;vertical-align:top}
th{font-weight:600;color:#4a5568}td.name,th.name,td.text,th.text,td.wrong{text-align:left;white-space:normal}
td.wrong{color:#b3261e;text-align:left}
td.text{font-family:ui-monospace,monospace;font-size:.75rem;color:#4a5568;max-width:22rem;overflow-wrap:anywhere}
svg{max-width:100%;height:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:.5rem 1rem}
.grid figure{margin:0}.grid figcaption{font-size:.8rem;overflow-wrap:anywhere}
.up{color:#b3261e}.down{color:#1b7a3d}";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The whole page. Records are put in order of time; those of one device and clock make one section.
pub fn page(records: &[Record]) -> Result<String> {
    let mut sections: BTreeMap<String, Vec<&Record>> = BTreeMap::new();
    for record in records {
        let key = format!("{} · {}", record.device.describe(), record.clock.describe());
        sections.entry(key).or_default().push(record);
    }
    let mut body = String::new();
    for (title, mut records) in sections {
        records.sort_by_key(|r| r.made.unix_time);
        body += &section(&title, &records)?;
    }
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>demask benchmarks</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style></head>\n\
         <body><h1>demask benchmarks</h1>\n{body}</body></html>\n"
    ))
}

fn section(title: &str, records: &[&Record]) -> Result<String> {
    let newest = records.last().ok_or_else(|| anyhow!("a section without records"))?;
    let device = &newest.device;
    let mut text = format!("<h2>{}</h2>\n", escape(title));
    let facts = [
        format!("{}, {}, wgpu {}", device.system, device.processor, device.wgpu),
        format!(
            "Limits measured here: {:.1} GFLOP/s (multiply-adds in registers), {:.1} GB/s (a copy through memory)",
            newest.limits.gflops, newest.limits.gbytes
        ),
        format!(
            "Newest of {}: demask {} ({}), suite {}, {}",
            records.len(),
            newest.made.demask,
            newest.label(),
            newest.made.suite,
            date(newest.made.unix_time)
        ),
    ];
    for fact in facts {
        text += &format!("<p class=\"facts\">{}</p>\n", escape(&fact));
    }
    let timed: Vec<&CaseRecord> = newest.cases.iter().filter(|c| c.wrong.is_none()).collect();
    if !timed.is_empty() {
        text += "<h3>Roofline</h3>\n<p class=\"facts\">Each number is a case of the table below. On the slope memory is \
                 the limit, on the roof arithmetic; a case whose data stay in a cache may lie above it.</p>\n";
        text += &roofline(newest, &timed)?;
    }
    text += "<h3>Cases</h3>\n";
    text += &table(newest);
    if records.len() > 1 {
        text += "<h3>History</h3>\n<p class=\"facts\">Median time of one call, oldest to newest commit; bars span the \
                 quartiles.</p>\n<div class=\"grid\">\n";
        for case in &timed {
            text += &history(records, &case.name)?;
        }
        text += "</div>\n";
    }
    Ok(text)
}

fn table(record: &Record) -> String {
    let mut text = String::from(
        "<table><tr><th>#</th><th class=\"name\">case</th><th>time</th><th>device</th><th>wall</th><th>GFLOP/s</th>\
         <th>GB/s</th><th>of limit</th><th>memory</th><th class=\"text\">kernels (hash of their WGSL)</th></tr>\n",
    );
    let mut number = 0;
    for case in &record.cases {
        let name = escape(&case.name);
        if let Some(why) = &case.wrong {
            let why = escape(why);
            text += &format!(
                "<tr><td></td><td class=\"name\">{name}</td><td class=\"wrong\" colspan=\"8\">wrong: {why}</td></tr>\n"
            );
            continue;
        }
        number += 1;
        let known = |t: Option<f64>| t.map_or("–".to_owned(), time);
        let kernels: Vec<String> = case
            .kernels
            .iter()
            .map(|k| format!("{} ({:.8}) ×{}", k.variant, k.hash, k.dispatches))
            .collect();
        text += &format!(
            "<tr><td>{number}</td><td class=\"name\">{name}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.2}</td>\
             <td>{:.2}</td><td>{:.0} %</td><td>{}</td><td class=\"text\">{}</td></tr>\n",
            time(case.seconds),
            known(case.device),
            known(case.wall),
            case.gflops(),
            case.gbytes(),
            100.0 * case.of_limit(&record.limits),
            memory(case.peak_bytes),
            escape(&shorten(&kernels))
        );
    }
    text + "</table>\n"
}

/// A whole step has some thirty kernels; the first few tell enough.
fn shorten(kernels: &[String]) -> String {
    const SHOWN: usize = 4;
    let more = kernels.len().saturating_sub(SHOWN);
    let shown = kernels[..kernels.len().min(SHOWN)].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// GFLOP/s over floating-point operations a byte, both logarithmic, under the device's two limits.
fn roofline(record: &Record, cases: &[&CaseRecord]) -> Result<String> {
    let fail = |e: &dyn std::fmt::Display| anyhow!("drawing the roofline: {e}");
    let limits = record.limits;
    // A case without arithmetic (a gather) has no place on a logarithmic axis.
    let points: Vec<(usize, f64, f64)> = cases
        .iter()
        .enumerate()
        .filter(|(_, c)| c.flops > 0.0 && c.bytes > 0.0)
        .map(|(i, c)| (i + 1, c.flops / c.bytes, c.gflops()))
        .collect();
    let spread = |of: fn(&(usize, f64, f64)) -> f64| {
        let low = points.iter().map(of).fold(f64::INFINITY, f64::min);
        (low, points.iter().map(of).fold(0.0, f64::max))
    };
    let ((x0, x1), (y0, y1)) = (spread(|p| p.1), spread(|p| p.2));
    let ridge = limits.gflops / limits.gbytes;
    let (x0, x1) = (x0.min(ridge) / 2.0, x1.max(ridge) * 2.0);
    let (y0, y1) = (y0.min(limits.gbytes * x0).max(1e-3) / 2.0, y1.max(limits.gflops) * 2.0);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (980, 440)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| fail(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d((x0..x1).log_scale(), (y0..y1).log_scale())
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .light_line_style(RGBColor(240, 242, 245))
            .bold_line_style(RGBColor(222, 226, 232))
            .label_style(("sans-serif", 13))
            .axis_desc_style(("sans-serif", 14))
            .x_desc("floating-point operations per byte")
            .y_desc("GFLOP/s")
            .draw()
            .map_err(|e| fail(&e))?;
        let roof = [(x0, limits.gbytes * x0), (ridge, limits.gflops), (x1, limits.gflops)];
        let line = ShapeStyle::from(&RGBColor(47, 93, 168)).stroke_width(2);
        chart.draw_series(LineSeries::new(roof, line)).map_err(|e| fail(&e))?;
        let dots =
            points.iter().map(|&(_, x, y)| Circle::new((x, y), 4, RGBColor(179, 38, 30).filled()));
        chart.draw_series(dots).map_err(|e| fail(&e))?;
        let font = ("sans-serif", 13).into_font().color(&RGBColor(28, 35, 48));
        let labels = points.iter().map(|&(i, x, y)| {
            EmptyElement::at((x, y)) + Text::new(i.to_string(), (6, -12), font.clone())
        });
        chart.draw_series(labels).map_err(|e| fail(&e))?;
        root.present().map_err(|e| fail(&e))?;
    }
    Ok(svg)
}

/// One case over the records.
fn history(records: &[&Record], name: &str) -> Result<String> {
    let fail = |e: &dyn std::fmt::Display| anyhow!("drawing the history of {name}: {e}");
    let mut points = Vec::new();
    for (i, record) in records.iter().enumerate() {
        let case = record.cases.iter().find(|c| c.name == name && c.wrong.is_none());
        points.extend(case.map(|c| {
            let mut ms: Vec<f64> = c.samples.iter().map(|s| s.seconds * 1e3).collect();
            ms.sort_by(f64::total_cmp);
            (i as f64, ms[ms.len() / 4], c.seconds * 1e3, ms[ms.len() * 3 / 4], record.label())
        }));
    }
    let top = points.iter().map(|p| p.3).fold(0.0, f64::max) * 1.15;
    let labels: Vec<String> = records.iter().map(|r| r.label()).collect();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (380, 170)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| fail(&e))?;
        let mut chart = ChartBuilder::on(&root)
            .margin(6)
            .x_label_area_size(22)
            .y_label_area_size(48)
            .build_cartesian_2d(-0.5..records.len() as f64 - 0.5, 0.0..top)
            .map_err(|e| fail(&e))?;
        let label = |x: &f64| match (x.fract() == 0.0 && *x >= 0.0).then(|| labels.get(*x as usize))
        {
            Some(Some(label)) => label.chars().take(7).collect(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(230, 233, 238))
            .x_labels(records.len().min(6))
            .x_label_formatter(&label)
            .y_labels(4)
            .y_desc("ms")
            .draw()
            .map_err(|e| fail(&e))?;
        let colour = RGBColor(47, 93, 168);
        let line = points.iter().map(|p| (p.0, p.2));
        let thick = ShapeStyle::from(&colour).stroke_width(2);
        chart.draw_series(LineSeries::new(line, thick)).map_err(|e| fail(&e))?;
        let bars = points.iter().map(|p| PathElement::new([(p.0, p.1), (p.0, p.3)], colour));
        chart.draw_series(bars).map_err(|e| fail(&e))?;
        let dots = points.iter().map(|p| Circle::new((p.0, p.2), 3, colour.filled()));
        chart.draw_series(dots).map_err(|e| fail(&e))?;
        root.present().map_err(|e| fail(&e))?;
    }
    let change = match points.as_slice() {
        [.., a, b] => {
            let ratio = 100.0 * (b.2 / a.2 - 1.0);
            let class = if ratio > 5.0 {
                "up"
            } else if ratio < -5.0 {
                "down"
            } else {
                ""
            };
            format!(" <span class=\"{class}\">{ratio:+.1} % to the one before</span>")
        }
        _ => String::new(),
    };
    Ok(format!("<figure><figcaption>{}{change}</figcaption>{svg}</figure>\n", escape(name)))
}

/// `2027-01-15 08:00 UTC`; the civil calendar from days since 1970.
fn date(unix: u64) -> String {
    let (days, seconds) = (unix / 86_400, unix % 86_400);
    let z = days as i64 + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", seconds / 3600, seconds / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::record;

    #[test]
    fn a_page_holds_all_and_loads_nothing() {
        let mut first = record(&[1e-3, 2e-3]);
        first.cases[0].name = "a <b> & c".into();
        let mut second = first.clone();
        second.made.unix_time += 60;
        second.cases.push(CaseRecord::wrong("lost".into(), "[0] is 1 < 2".into()));
        let mut other = first.clone();
        other.device.adapter = "another".into();
        let page = page(&[second, first, other]).unwrap();
        assert_eq!(page.matches("<h2>").count(), 2);
        assert_eq!(page.matches("<h3>Roofline").count(), 2);
        assert_eq!(page.matches("<h3>History").count(), 1, "one record has no history");
        assert!(page.contains("a &lt;b&gt; &amp; c") && !page.contains("<b>"));
        assert!(page.contains("wrong: [0] is 1 &lt; 2"));
        let outside = ["<script", "href=", "src=", "url(", "@import"];
        assert!(outside.iter().all(|o| !page.contains(o)));
    }

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_800_000_000), "2027-01-15 08:00 UTC");
    }
}

//! A record and a comparison in the forms that others read: Bencher's metric format, github-action-benchmark, Markdown.

use serde_json::{Value, json};

use crate::compare::{Comparison, Row, Verdict};
use crate::record::{CaseRecord, Record};

/// Quartiles of a case's samples.
fn quartiles(case: &CaseRecord) -> (f64, f64) {
    let mut seconds: Vec<f64> = case.samples.iter().map(|s| s.seconds).collect();
    seconds.sort_by(f64::total_cmp);
    let at = |q: usize| seconds.get(seconds.len() * q / 4).copied().unwrap_or(case.seconds);
    (at(1), at(3))
}

fn timed(record: &Record) -> impl Iterator<Item = &CaseRecord> {
    record.cases.iter().filter(|c| c.wrong.is_none())
}

/// Bencher metric format: latency in nanoseconds between its quartiles, for `bencher run --adapter json`.
pub fn bencher(record: &Record) -> Value {
    let metric = |case: &CaseRecord| {
        let (low, high) = quartiles(case);
        let nano = |seconds: f64| seconds * 1e9;
        let latency = json!({
            "value": nano(case.seconds), "lower_value": nano(low), "upper_value": nano(high),
        });
        (case.name.clone(), json!({ "latency": latency }))
    };
    Value::Object(timed(record).map(metric).collect())
}

/// What github-action-benchmark reads as `customSmallerIsBetter`.
pub fn github(record: &Record) -> Value {
    let entry = |case: &CaseRecord| {
        let (low, high) = quartiles(case);
        json!({
            "name": case.name,
            "unit": "ms",
            "value": case.seconds * 1e3,
            "range": format!("± {:.4}", (high - low) / 2.0 * 1e3),
            "extra": format!("{}\n{}", record.device.describe(), record.clock.describe()),
        })
    };
    timed(record).map(entry).collect()
}

/// `1.234 ms` with a fitting unit.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.3} s"),
        s if s >= 1e-3 => format!("{:.3} ms", s * 1e3),
        s => format!("{:.2} µs", s * 1e6),
    }
}

fn percent(ratio: f64) -> String {
    format!("{:+.1} %", 100.0 * ratio)
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// A record as a table.
pub fn markdown(record: &Record) -> String {
    let mut text = format!(
        "{}, {}, demask {}; limits {:.1} GFLOP/s and {:.1} GB/s, measured\n\n",
        record.device.describe(),
        record.clock.describe(),
        record.label(),
        record.limits.gflops,
        record.limits.gbytes
    );
    text += "| case | time | device | wall | GFLOP/s | GB/s | of the limit | memory |\n|---|--:|--:|--:|--:|--:|--:|--:|\n";
    for case in &record.cases {
        let name = cell(&case.name);
        if let Some(why) = &case.wrong {
            text += &format!("| {name} | wrong: {} | | | | | | |\n", cell(why));
            continue;
        }
        let known = |t: Option<f64>| t.map_or(String::new(), time);
        text += &format!(
            "| {name} | {} | {} | {} | {:.1} | {:.1} | {:.0} % | {} |\n",
            time(case.seconds),
            known(case.device),
            known(case.wall),
            case.gflops(),
            case.gbytes(),
            100.0 * case.of_limit(&record.limits),
            memory(case.peak_bytes)
        );
    }
    text
}

/// `17.3 MB`, or nothing where it is not known.
pub fn memory(bytes: Option<u64>) -> String {
    bytes.map_or(String::new(), |b| format!("{:.1} MB", b as f64 / 1e6))
}

/// `+10.2 %` and its interval.
pub fn change(row: &Row) -> [String; 2] {
    match row.change {
        None => [String::new(), String::new()],
        Some(c) => [percent(c.estimate), format!("{} … {}", percent(c.low), percent(c.high))],
    }
}

/// A comparison as a table, what changed most on top.
pub fn markdown_comparison(comparison: &Comparison) -> String {
    let mut rows: Vec<&Row> = comparison.rows.iter().collect();
    let weight = |r: &Row| r.change.map_or(f64::INFINITY, |c| c.estimate);
    rows.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
    let mut text = format!("{}\n\n", summary(comparison));
    text += "| case | base | new | change | interval | |\n|---|--:|--:|--:|--:|---|\n";
    for row in rows {
        let known = |t: Option<f64>| t.map_or(String::new(), time);
        let [guess, interval] = change(row);
        let mut verdict = row.verdict.describe().to_owned();
        if row.verdict == Verdict::Regression {
            verdict = format!("**{verdict}**");
        }
        if !row.note.is_empty() {
            verdict += &format!(" ({})", cell(&row.note));
        }
        let (base, new) = (known(row.base), known(row.new));
        text += &format!(
            "| {} | {base} | {new} | {guess} | {interval} | {verdict} |\n",
            cell(&row.name)
        );
    }
    text
}

/// One line: how many cases came to what.
pub fn summary(comparison: &Comparison) -> String {
    let all = [
        Verdict::Regression,
        Verdict::Wrong,
        Verdict::Unclear,
        Verdict::Improvement,
        Verdict::Same,
        Verdict::Missing,
    ];
    let parts: Vec<String> = all
        .into_iter()
        .map(|v| (v, comparison.count(v)))
        .filter(|(_, n)| *n > 0)
        .map(|(v, n)| format!("{n} {}", v.describe()))
        .collect();
    let how = if comparison.paired { "measured in turn" } else { "two runs" };
    format!("{}; threshold {}, {how}", parts.join(", "), percent(comparison.threshold))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::compare;
    use crate::record::tests::record;

    #[test]
    fn forms_hold_what_their_readers_want() {
        let mut record = record(&[1e-3, 2e-3, 3e-3, 4e-3]);
        record.cases.push(CaseRecord::wrong("a|b".into(), "[0] is 1 instead of 2".into()));
        let bmf = bencher(&record);
        assert_eq!(bmf["swiglu [3]"]["latency"]["value"], 2.5e6);
        assert_eq!(bmf["swiglu [3]"]["latency"]["lower_value"], 2e6);
        assert!(bmf.get("a|b").is_none(), "a wrong kernel has no time");
        let github = github(&record);
        assert_eq!((&github[0]["name"], &github[0]["value"]), (&json!("swiglu [3]"), &json!(2.5)));
        assert_eq!(github.as_array().map(Vec::len), Some(1));
        let markdown = markdown(&record);
        assert!(
            markdown.contains("| swiglu [3] | 2.500 ms | 1.000 ms | 2.000 ms | 1.0 | 1.0 | 10 % |")
        );
        assert!(markdown.contains("| a\\|b | wrong: [0] is 1 instead of 2 |"));
    }

    #[test]
    fn the_largest_change_is_on_top() {
        let mut base = record(&[1e-3; 20]);
        base.cases.push(CaseRecord { name: "slow".into(), ..base.cases[0].clone() });
        let mut new = base.clone();
        new.cases[1].samples.iter_mut().for_each(|s| s.seconds *= 1.2);
        let text = markdown_comparison(&compare(&base, &new, 0.05));
        let rows: Vec<&str> = text.lines().skip(4).collect();
        assert!(rows[0].starts_with("| slow |") && rows[0].contains("**REGRESSION**"), "{text}");
        assert!(rows[1].ends_with("same |"), "{text}");
        assert!(text.starts_with("1 REGRESSION, 1 same; threshold +5.0 %, two runs\n"), "{text}");
    }
}

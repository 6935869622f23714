//! Reports of made-up runs.

use super::*;
use crate::figures::hex;
use crate::plot::WARMUP;

const RECIPE: &str = "seed = 7\n[optimizer]\nbatch = 8\n[[phase]]\nobjective = \"ar\"\nsteps = 100\nlr = 1e-3\n\
                      [[phase]]\nobjective = \"diffusion\"\nsteps = 200\nlr = 1e-3\n# <recipe & all>\n";

fn point(step: u64, n: u64) -> Metrics {
    let wobble = 1.0 + 0.1 * ((step * 7919 % 101) as f64 / 50.0 - 1.0);
    let diffusion = step > n / 3;
    let warming = diffusion && step < n / 2;
    Metrics {
        step,
        phase: if diffusion { "diffusion" } else { "ar" }.into(),
        loss: wobble * (1.0 + 300.0 / (step as f64 + 50.0)),
        grad_norm: wobble * 0.3,
        lr: 1e-3,
        tokens_per_second: 1000.0,
        tokens: 512 * step,
        ce_per_masked: Some(2.0 * wobble),
        u_max: warming.then_some(0.5),
        ce_by_rate: if diffusion { vec![Some(wobble), None, Some(3.0 * wobble)] } else { vec![] },
        flop_utilisation: Some(0.25),
        peak_bytes: 3 << 20,
        skipped: (step == n / 2).then(|| "the gradient is not finite".into()),
        ..Metrics::default()
    }
}

fn lines<R: Serialize>(path: &Path, records: impl Iterator<Item = R>) {
    let line = |r| serde_json::to_string(&r).unwrap() + "\n";
    fs::write(path, records.map(line).collect::<String>()).unwrap();
}

/// A run's folder with all that a run may have.
fn whole(folder: &Path, n: u64) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    lines(&folder.join("metrics.jsonl"), (1..=n).map(|step| point(step, n)));
    fs::write(folder.join("recipe.toml"), RECIPE).unwrap();
    let validation = (1..=6).flat_map(|i| {
        ["held_out", "src/<lib>"].map(|text| Validation {
            step: i * n / 6,
            phase: if i > 2 { "diffusion" } else { "ar" }.into(),
            text: text.into(),
            loss: if i > 2 { 7.0 } else { 4.0 } - 0.5 * i as f64,
            ce: 2.0,
            tokens: 900,
        })
    });
    lines(&folder.join("validation.jsonl"), validation);
    let prompt = "def f(a):\n    ";
    let sample = |i: u64| Sample {
        step: i * n / 3,
        prompt: prompt.into(),
        text: format!("return {i}\n<script>alert({i})</script>"),
    };
    lines(&folder.join("samples.jsonl"), (1..=3).map(sample));
    folder.to_owned()
}

fn titles(page: &str) -> Vec<&str> {
    page.split("<figcaption>").skip(1).filter_map(|f| f.split('<').next()).collect()
}

#[test]
fn a_run_has_every_section_and_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let run = whole(&folder.path().join("first"), 300);
    let report = report(&[run]).unwrap();
    let summary = &report.runs[0];
    assert_eq!((summary.step, summary.total_steps, summary.skipped), (300, Some(300), 1));
    assert_eq!(
        (summary.tokens, summary.best_validation),
        (153_600, Some(Best { loss: 4.0, step: 300 }))
    );
    assert!((summary.seconds - 153.6).abs() < 1e-6, "{} s", summary.seconds);
    let expected = [
        "Training loss",
        "Cross-entropy",
        "Validation loss",
        "Cross-entropy by mask rate",
        "Gradient norm",
        "Learning rate",
        "Speed",
        "FLOP utilisation",
        "Device memory",
    ];
    assert_eq!(titles(&report.page), expected);
    for part in [
        "ar 100 → diffusion 200",
        "4.0000 at step 300",
        "153.6 k",
        "3 MiB",
        "2 min 34 s",
        "noise warm-up",
        "skipped step",
        "67–100 %",
        "all held-out text",
        "What it writes",
        "# &lt;recipe &amp; all&gt;",
    ] {
        assert!(report.page.contains(part), "{part} is missing");
    }
    assert!(report.page.contains(&format!("fill=\"{}\"", hex(WARMUP))), "no warm-up is tinted");
    assert!(!report.page.contains("by-tokens\""), "one run has no switch");
    assert!(!report.page.contains("NaN") && !report.page.contains("inf,"));
}

#[test]
fn what_a_model_writes_stays_text() {
    let folder = tempfile::tempdir().unwrap();
    let page = report(&[whole(&folder.path().join("a <b> & c"), 30)]).unwrap().page;
    assert!(!page.contains("<script"), "a sample became part of the page");
    assert!(!page.contains("<b>") && !page.contains("<lib>"));
    assert_eq!(page.matches("&lt;script&gt;alert(").count(), 3);
    let (latest, earlier) = page.split_once("<details><summary>earlier").unwrap();
    assert!(latest.contains("alert(3)") && !latest.contains("alert(2)"));
    assert!(earlier.find("alert(2)").unwrap() < earlier.find("alert(1)").unwrap());
}

#[test]
fn a_page_loads_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let runs = ["a", "b"].map(|name| whole(&folder.path().join(name), 60));
    let page = report(&runs).unwrap().page;
    for outside in ["http:", "https:", "src=", "href=", "url(", "@import", "<link", "<script"] {
        assert!(!page.contains(outside), "{outside}");
    }
}

#[test]
fn several_runs_share_their_figures() {
    let folder = tempfile::tempdir().unwrap();
    let runs = [("a/run", 60), ("b/run", 90), ("c", 60)]
        .map(|(name, n)| whole(&folder.path().join(name), n));
    let recipe = RECIPE.replace("batch = 8", "batch = 16");
    fs::write(runs[1].join("recipe.toml"), recipe).unwrap();
    let report = report(&runs).unwrap();
    let names: Vec<&str> = report.runs.iter().map(|r| r.name.as_str()).collect();
    let path = |i: usize| runs[i].display().to_string();
    assert_eq!(names, [path(0).as_str(), path(1).as_str(), "c"], "equal names are told apart");
    let page = &report.page;
    let loss = page.split("<figure>").nth(1).unwrap();
    let steps = loss.split("class=\"tokens\"").next().unwrap();
    for (i, name) in names.iter().enumerate() {
        // Each: a pale and a strong line for each of three segments.
        let stroke = format!("stroke=\"{}\"", hex(colour(i)));
        let name = minijinja::HtmlEscape(name);
        let lines = steps.split("<polyline").filter(|l| l.contains(&stroke));
        assert!(lines.filter(|l| l.contains(&format!("<title>{name}</title>"))).count() >= 6);
    }
    assert!(page.contains("id=\"by-tokens\"") && page.contains("class=\"tokens\""));
    assert_eq!(titles(page).iter().filter(|t| **t == "Validation loss").count(), 2);
    assert_eq!(titles(page).iter().filter(|t| t.contains("by mask rate")).count(), 3);
    let rows: Vec<&str> =
        page.split("<th scope=\"row\">").filter_map(|r| r.split('<').next()).collect();
    assert!(rows.contains(&"optimizer.batch") && !rows.contains(&"seed"), "{rows:?}");
}

#[test]
fn what_a_run_lacks_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let run = whole(folder.path(), 60);
    for file in ["validation.jsonl", "samples.jsonl", "recipe.toml"] {
        fs::remove_file(run.join(file)).unwrap();
    }
    let page = report(std::slice::from_ref(&run)).unwrap().page;
    assert!(
        !page.contains("Validation")
            && !page.contains("What it writes")
            && !page.contains("Recipe")
    );
    assert!(!page.contains("phases") && page.contains("Training loss"));
    let torn = fs::read_to_string(run.join("metrics.jsonl")).unwrap() + "{\"step\": 61, \"pha";
    fs::write(run.join("metrics.jsonl"), torn).unwrap();
    assert_eq!(report(std::slice::from_ref(&run)).unwrap().runs[0].step, 60);
    fs::write(run.join("metrics.jsonl"), "").unwrap();
    let error = report(std::slice::from_ref(&run)).err().unwrap().to_string();
    assert!(error.contains("wait for the run's first step"), "{error}");
    fs::remove_file(run.join("metrics.jsonl")).unwrap();
    let error = report(std::slice::from_ref(&run)).err().unwrap().to_string();
    assert!(
        error.contains(&run.display().to_string()) && error.contains("demask train --out"),
        "{error}"
    );
}

#[test]
fn a_long_run_makes_a_small_page() {
    let folder = tempfile::tempdir().unwrap();
    let run = whole(folder.path(), 100_000);
    let began = std::time::Instant::now();
    let page = report(std::slice::from_ref(&run)).unwrap().page;
    assert!(page.len() < 700_000, "{} bytes", page.len());
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
}

#[test]
fn a_page_is_written_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.html");
    write(&path, "one").unwrap();
    write(&path, "two").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "two");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    assert!(write(&folder.path().join("none/report.html"), "").is_err());
}

//! `demask bench` as scripts meet it: records, exit codes, hostile files, a wrong kernel, a worker that is none.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use demask_benches::measure::Session;
use demask_benches::record::Record;
use demask_benches::suite::{Suite, entries};
use demask_benches::work::Work;
use demask_engine::ops::case::{Case, Input};
use demask_engine::ops::{add_scalar, mul, scale};
use demask_engine::tensor::Tensor;
use demask_engine::tensor::host::Array;
use demask_tests::{binary, gpu};
use serde_json::{Value, json};

fn demask(args: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
    command.output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

/// Exit code and both streams.
fn ends(args: &[&str], code: i32) -> (String, String) {
    let output = demask(args);
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
    (out, err)
}

/// A record made here, with the times multiplied and a change made.
fn variant(of: &Value, factor: f64, change: impl Fn(&mut Value)) -> String {
    let mut value = of.clone();
    for sample in value["cases"][0]["samples"].as_array_mut().expect("samples") {
        sample["seconds"] = json!(sample["seconds"].as_f64().expect("a number") * factor);
    }
    change(&mut value);
    value.to_string()
}

#[test]
fn a_run_is_recorded_compared_and_reported() {
    if gpu().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let base = path(folder.path(), "base.json");
    let run =
        ["bench", "run", "--suite", "swiglu [512,add [512", "--budget", "3", "--commit", "abc123"];
    ends(&[&run[..], &["--json", &base, "--quiet"]].concat(), 0);
    let record = Record::read(Path::new(&base)).unwrap();
    // One sum, two gates, and these with their derivatives.
    assert_eq!((record.cases.len(), record.label().as_str()), (5, "abc123"));
    for case in &record.cases {
        assert!(case.checked.is_some_and(|c| c.values > 0 && c.worst <= 1.0), "{case:?}");
        assert!(case.kernels.iter().all(|k| k.hash.len() == 16 && k.dispatches == 1), "{case:?}");
        assert!(case.samples.len() >= 3 && case.wall.is_some_and(|w| w > 0.0));
        assert!(case.gflops() > 0.0 && case.gbytes() > 0.0);
    }
    assert_eq!(record.cases[1].kernels[0].variant, "swiglu");

    // The samples are made even, so that the outcome is that of the change alone.
    let mut even: Value = serde_json::from_str(&std::fs::read_to_string(&base).unwrap()).unwrap();
    for case in even["cases"].as_array_mut().unwrap() {
        let sample = |i: usize| json!({ "seconds": 1e-3 + 1e-6 * (i % 7) as f64, "fma": 1e-3, "copy": 1e-3 });
        case["samples"] = (0..40).map(sample).collect();
    }
    let write = |name: &str, text: String| {
        std::fs::write(folder.path().join(name), text).unwrap();
        path(folder.path(), name)
    };
    let base = write("even.json", variant(&even, 1.0, |_| ()));
    let slow = write("slow.json", variant(&even, 1.1, |_| ()));
    let fast = write("fast.json", variant(&even, 0.8, |_| ()));
    let compare = |new: &str, options: &[&str], code| {
        ends(&[&["bench", "compare", &base, new], options].concat(), code)
    };
    assert!(compare(&base, &[], 0).0.contains("5 same"));
    assert!(compare(&slow, &[], 1).0.contains("REGRESSION"));
    compare(&slow, &["--max-regress", "15%"], 0);
    assert!(compare(&fast, &[], 0).0.contains("faster"));
    let (out, _) = compare(&slow, &["--json", "-"], 1);
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&report["failed"], &report["cases"][0]["verdict"]),
        (&json!(true), &json!("regression"))
    );

    // Unlike things: 2, each with its reason, and a way past it.
    let driver = |v: &mut Value| v["device"]["driver_info"] = json!("other");
    let features = |v: &mut Value| v["device"]["features"] = json!([]);
    let kernels = |v: &mut Value| v["cases"][0]["kernels"][0]["variant"] = json!("other");
    let cases = |v: &mut Value| drop(v["cases"].as_array_mut().unwrap().remove(1));
    for (name, why, new) in [
        ("driver", "driver version", variant(&even, 1.0, driver)),
        ("features", "features", variant(&even, 1.0, features)),
        ("kernels", "kernels", variant(&even, 1.0, kernels)),
        ("cases", "not in the new record", variant(&even, 1.0, cases)),
    ] {
        let new = write(name, new);
        let (out, err) = compare(&new, &[], 2);
        assert_eq!(out, "");
        assert!(err.contains(why) && err.contains("--force"), "{name}: {err}");
        assert!(compare(&new, &["--force"], 0).0.contains(why));
    }
    let wrong = |v: &mut Value| v["cases"][0]["wrong"] = json!("[0] is 1 instead of 2");
    let wrong = write("wrong.json", variant(&even, 1.0, wrong));
    assert!(compare(&wrong, &[], 1).0.contains("WRONG RESULT"));

    // Other forms, from files whole.
    let page = path(folder.path(), "page.html");
    ends(&["bench", "report", &base, &slow, "--html", &page, "--bmf", "-"], 0);
    let page = std::fs::read_to_string(page).unwrap();
    assert!(
        page.contains("<svg") && page.contains("History") && page.contains("swiglu [512, 1536]")
    );
    let (bmf, _) = ends(&["bench", "report", &base, "--bmf", "-"], 0);
    let bmf: Value = serde_json::from_str(&bmf).unwrap();
    assert!(bmf["swiglu [512, 1536]"]["latency"]["value"].as_f64().is_some_and(|ns| ns > 0.0));
}

/// The model that comes with demask, block by block and one token at a time: what is counted adds up.
#[test]
fn a_model_is_timed_by_rows_by_length_and_by_mode() {
    if gpu().is_none() {
        return;
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../trainer/models/small-coder");
    let run = ["bench", "decode", "--model", model, "--quiet", "--no-tune", "--rounds", "2"];
    let asked = ["--tokens", "96", "--depths", "16,64", "--steps", "1", "--threshold", "1"];
    let (out, _) = ends(&[&run[..], &asked, &["--json"]].concat(), 0);
    let told: Value = serde_json::from_str(&out).expect("one object");
    let passes = told["passes"].as_array().expect("passes");
    let shapes: Vec<_> = passes.iter().map(|p| (p["rows"].as_u64(), p["depth"].as_u64())).collect();
    let each = |rows| [(Some(rows), Some(16)), (Some(rows), Some(64))];
    assert_eq!(shapes, [each(1), each(4), each(8)].concat());
    assert!(passes.iter().all(|p| p["seconds"].as_f64() > Some(0.0)));
    assert_eq!(passes[0]["growth"].as_f64(), Some(1.0));
    let answers = told["answers"].as_array().expect("answers");
    let counts: Vec<_> =
        answers.iter().map(|a| (a["tokens"].as_u64(), a["forwards"].as_u64())).collect();
    // A prompt of 18 tokens: the first block has two open positions, the last one too.
    assert_eq!(told["prompt_tokens"], 18);
    assert_eq!(counts, [(Some(96), Some(96)), (Some(96), Some(96)), (Some(96), Some(25))]);
    for answer in answers {
        let parts = answer["parts"].as_array().expect("parts");
        let bounds: Vec<_> = parts.iter().map(|p| (p[0].as_u64(), p[1].as_u64())).collect();
        assert_eq!(bounds, [(Some(0), Some(64)), (Some(64), Some(96))]);
        let range = [0, 1].map(|i| answer["range"][i].as_f64().expect("seconds"));
        let fastest: f64 = parts
            .iter()
            .map(|p| p[2].as_f64().unwrap() * [64.0, 32.0][usize::from(p[0] != 0)])
            .sum();
        assert!((fastest - range[0]).abs() < 1e-6 && range[0] <= range[1], "{answer}");
    }
    let (table, _) = ends(&[&run[..], &["--tokens", "8", "--depths", "16"]].concat(), 0);
    assert!(
        ["after", "tokens/pass", "threshold 0.95"].iter().all(|w| table.contains(w)),
        "{table}"
    );
    let (_, err) = ends(&[&run[..], &["--depths", "100000"]].concat(), 1);
    assert!(err.contains("--depths") && err.contains("2048"), "{err}");
}

#[test]
fn hostile_files_and_lines_are_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let bad = path(folder.path(), "bad.json");
    for (content, cause) in [
        ("", "not JSON"),
        ("{\"schema\": ", "not JSON"),
        ("[1, 2]", "schema"),
        ("{\"schema\": \"demask-bench\", \"version\": 99}", "version is 99"),
        ("{\"schema\": \"demask-bench\", \"version\": 1, \"cases\": []}", "a field is amiss"),
    ] {
        std::fs::write(&bad, content).unwrap();
        for args in
            [&["bench", "compare", &bad, &bad][..], &["bench", "report", &bad, "--html", "-"]]
        {
            let (out, err) = ends(args, 1);
            assert!(out.is_empty() && err.contains(cause) && err.contains("bad.json"), "{err}");
            assert_eq!(err.lines().count(), 1, "{err}");
        }
    }
    ends(&["bench", "compare", "/no/such.json", &bad], 1);
    ends(&["bench", "compare", &bad, &bad, "--max-regress", "half"], 2);
    ends(&["bench", "report", &bad], 2);
    ends(&["bench"], 2);
    if gpu().is_some() {
        let nowhere = path(folder.path(), "no/such/folder/out.json");
        let run = ["bench", "run", "--suite", "add [512", "--budget", "1", "--json", &nowhere];
        assert!(ends(&run, 1).1.contains("out.json"));
        let (_, err) = ends(&["bench", "run", "--suite", "no such case"], 1);
        assert!(err.contains("no such case"));
    }
}

#[test]
fn a_program_with_itself_is_the_same_and_a_stranger_is_refused() {
    if gpu().is_none() {
        return;
    }
    let demask = binary().display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (path(folder.path(), "a.json"), path(folder.path(), "b.json"));
    // A threshold that no noise reaches: what is tested is the way, not the statistics.
    let ab = ["bench", "ab", &demask, &demask, "--suite", "add [512", "--budget", "8"];
    let (out, _) =
        ends(&[&ab[..], &["--max-regress", "90%", "--json", &a, "--json", &b]].concat(), 0);
    assert!(out.contains("1 same") && out.contains("measured in turn"), "{out}");
    let records = [&a, &b].map(|p| Record::read(Path::new(p)).unwrap());
    assert_eq!(records[0].made.session, records[1].made.session);
    assert!(records[0].made.session.is_some());
    assert_eq!(records[0].cases[0].samples.len(), records[1].cases[0].samples.len());
    let (out, _) = ends(&["bench", "compare", &a, &b, "--max-regress", "90%"], 0);
    assert!(out.contains("measured in turn"));
    if cfg!(unix) {
        let (_, err) = ends(&["bench", "ab", "/bin/true", &demask], 1);
        assert!(err.contains("/bin/true") && err.contains("bench worker"), "{err}");
    }
    let (_, err) = ends(&["bench", "ab", "/no/such/demask", &demask], 1);
    assert!(err.contains("/no/such/demask"), "{err}");
    ends(&["bench", "ab", &demask, &demask, "--json", &a], 2);
}

/// An op over 64 × 96 values that is right but for what `break_it` does.
fn broken(break_it: fn(&Tensor) -> Tensor) -> Case {
    let inputs = vec![Input::Normal([64, 96].into())];
    let square = |x: &[Array]| x[0].map(|x| x * x);
    Case::new("square", inputs, move |t| break_it(&mul(&t[0], &t[0])), square).cost(1.0, 1.0)
}

#[test]
fn a_wrong_kernel_has_no_time() {
    let Some(_) = gpu() else { return };
    let session = Session::open(None).unwrap();
    let prepare = |case: Case| session.prepare(Work::of_case(&session.gpu, case)).unwrap();
    let right = prepare(broken(|y| scale(y, 1.0)));
    assert!(right.is_ok_and(|p| p.checked.values == 64 * 96));
    let why = |case: Case| prepare(case).err().expect("it is wrong").1;
    assert!(why(broken(|y| scale(y, 1.001))).contains("instead of"));
    assert!(why(broken(|y| y.reshape([96, 64]))).contains("shape"));
    // With a reference for single outputs, every large case's way: one tile of many is wrong.
    let sampled = |wrong: bool| {
        let inputs = vec![Input::Normal([512, 512].into())];
        let run = move |t: &[Tensor]| {
            let mut y = mul(&t[0], &t[0]).to_vec().expect("the device works");
            for i in (0..512 * 512).filter(|i| wrong && i / 512 / 32 == 7 && i % 512 / 32 == 3) {
                y[i] += 1.0;
            }
            Tensor::from_f32(t[0].gpu(), &y, [512, 512])
        };
        Case::new("tile", inputs, run, |_| panic!("the whole reference is not asked"))
            .sampled(|x, at| at.iter().map(|&i| x[0].data[i] * x[0].data[i]).collect())
            .cost(1.0, 1.0)
    };
    assert!(prepare(sampled(false)).is_ok_and(|p| p.checked.values == 4096));
    assert!(why(sampled(true)).contains("of 4096 values compared are wrong"));
    // Right when checked, and other bits later.
    let calls = std::cell::Cell::new(0);
    let inputs = vec![Input::Normal([8].into())];
    let run = move |t: &[Tensor]| {
        calls.set(calls.get() + 1);
        add_scalar(&t[0], if calls.get() > 2 { 1e-6 } else { 0.0 })
    };
    let case = Case::new("unsteady", inputs, run, |x| x[0].clone()).cost(1.0, 1.0);
    let unsteady = prepare(case).expect("right at first");
    assert!(session.confirm(&unsteady).unwrap().is_err());
}

#[test]
fn a_wrong_derivative_has_no_time() {
    let Some(_) = gpu() else { return };
    let session = Session::open(None).unwrap();
    let square = |factor: f32| {
        let run = move |t: &[Tensor]| {
            let x = t[0].detach();
            let rule = {
                let x = x.clone();
                move |dy: &Tensor| vec![Some(scale(&mul(dy, &x), factor))]
            };
            mul(&x, &x).record("square", &[&t[0]], rule)
        };
        let reference = |x: &[Array]| x[0].map(|x| x * x);
        let inputs = vec![Input::Normal([64, 96].into())];
        Case::new("square", inputs, run, reference).cost(1.0, 1.0).derivative(2.0, 3.0)
    };
    let prepare = |case| {
        let work = Work::of_derivative(&session.gpu, case).expect("it states its costs");
        assert_eq!((work.cost.flops, work.cost.bytes), (3.0, 4.0));
        session.prepare(work).unwrap()
    };
    assert!(prepare(square(2.0)).is_ok_and(|p| p.checked.of == 64 * 96));
    let (name, why) = prepare(square(2.02)).err().expect("it is wrong");
    assert!(name == "square and backward" && why.contains("gradient of input 0"), "{why}");
}

/// Whole steps: their references must find them right, and a wrong weight wrong.
#[test]
fn steps_are_checked_against_f64() {
    let Some(_) = gpu() else { return };
    let session = Session::open(None).unwrap();
    let steps = entries(&session.gpu, &Suite::from("d128"));
    assert_eq!(steps.len(), 2);
    for entry in steps {
        let work = entry.make(&session.gpu).unwrap();
        let outputs = (work.run)();
        let checked = (work.check)(&outputs).unwrap_or_else(|e| panic!("{}: {e}", work.name));
        assert!(checked.worst < 1.0 && checked.values > 1000, "{checked:?}");
        // The last output is the logits, or the head's gradient.
        let (last, rest) = outputs.split_last().expect("outputs");
        let wrong = [rest, &[scale(last, 1.02)]].concat();
        assert!((work.check)(&wrong).is_err(), "{} does not see a wrong result", work.name);
    }
}

//! Holes filled and files edited by the binary, with the model of this tree: what is not asked for stays as it is, and
//! diffs are taken by git.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use demask_engine::model::{Tokenizer, Weights};
use demask_tests::{binary, gpu};
use serde_json::Value;
use tempfile::TempDir;

const TEXT: &str =
    "import os\n\n\ndef size(path):\n    \"\"\"Größe\"\"\"\n    total = 0\n    return total\n";

fn model() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/models/small-coder");
    folder.display().to_string()
}

/// A folder with a file in it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new(text: &str) -> Place {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("a.py"), text).expect("it is writable");
        Place { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).expect("the file is there")
    }

    /// The command on the file, run in its folder.
    fn demask(&self, command: &str, args: &[&str]) -> Output {
        let mut demask = Command::new(binary());
        demask.args([command, "a.py", "--model", &model(), "--no-tune"]).args(args);
        demask.current_dir(self.folder.path()).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        demask.output().expect("the binary runs")
    }

    fn json(&self, command: &str, args: &[&str]) -> Value {
        let output = self.demask(command, &[args, &["--json"]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        serde_json::from_slice(&output.stdout).expect("one object")
    }

    /// What git makes of a diff.
    fn patched(&self, diff: &str) -> String {
        std::fs::write(self.path("diff"), diff).expect("it is writable");
        let mut git = Command::new("git");
        git.args(["apply", "diff"]).current_dir(self.folder.path());
        git.env("GIT_CEILING_DIRECTORIES", self.folder.path().parent().expect("a parent"));
        let output = git.output().expect("git is there");
        assert!(output.status.success(), "{}\n{diff}", String::from_utf8_lossy(&output.stderr));
        self.text("a.py")
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

/// All commits of explained steps, by position: (position, token).
fn commits(steps: &Value) -> Vec<(u64, u64)> {
    let passes = steps.as_array().expect("passes").iter();
    let all = passes.flat_map(|pass| pass["committed"].as_array().expect("choices"));
    let number = |choice: &Value, name: &str| choice[name].as_u64().expect("a number");
    let mut all: Vec<_> = all.map(|c| (number(c, "position"), number(c, "token"))).collect();
    all.sort_unstable();
    all
}

#[test]
fn a_hole_is_filled_and_nothing_else_changes() {
    if gpu().is_none() {
        return;
    }
    let place = Place::new(TEXT);
    // Behind "total = 0".
    let ask = ["--at", "6:14", "--max-tokens", "12", "--temperature", "0.7", "--explain-steps"];
    let answer = place.json("infill", &ask);
    let at = TEXT.find("= 0\n").expect("it is there") + 3;
    let (middle, after) = (text(&answer["text"]), text(&answer["after"]));
    assert_eq!(answer["how"], "prompt");
    assert!(!middle.is_empty());
    assert_eq!(after, format!("{}{middle}{}", &TEXT[..at], &TEXT[at..]));
    // The prompt says suffix, prefix, middle; steps and tokens tell one story.
    let (config, _) = Weights::open(Path::new(&model())).expect("the model");
    let tokenizer = Tokenizer::for_model(Path::new(&model()), &config).expect("its tokenizer");
    let prompt: Vec<u64> = answer["prompt_token_ids"]
        .as_array()
        .expect("ids")
        .iter()
        .map(|id| id.as_u64().expect("an id"))
        .collect();
    let id = |name: &str| u64::from(tokenizer.token_id(name).expect("a token"));
    assert_eq!(
        (prompt[0], *prompt.last().expect("ids")),
        (id("<|fim_suffix|>"), id("<|fim_middle|>"))
    );
    let ids = answer["token_ids"].as_array().expect("ids");
    let told = commits(&answer["steps"]);
    for (i, id) in ids.iter().enumerate() {
        assert_eq!(told[i], ((prompt.len() + i) as u64, id.as_u64().expect("an id")));
    }
    assert_eq!(place.text("a.py"), TEXT, "it was not asked to write");
    assert_eq!(place.patched(text(&answer["diff"])), after);
}

#[test]
fn several_holes_are_filled_in_order_and_written() {
    if gpu().is_none() {
        return;
    }
    let marked = TEXT.replace("0\n", "@@\n").replace("\"\"\"Größe\"\"\"", "@@");
    let place = Place::new(&marked);
    let ask = ["--hole-marker", "@@", "--max-tokens", "6", "--temperature", "0.7", "--apply"];
    let answer = place.json("infill", &ask);
    let holes = answer["holes"].as_array().expect("holes");
    let parts: Vec<&str> = marked.split("@@").collect();
    assert_eq!((holes.len(), parts.len()), (2, 3));
    let texts = [&holes[0], &holes[1]].map(|hole| text(&hole["text"]));
    let want = [parts[0], texts[0], parts[1], texts[1], parts[2]].concat();
    assert_eq!(place.text("a.py"), want);
    assert_eq!(
        (answer["after"].as_str(), place.text("a.py~")),
        (Some(want.as_str()), marked.clone())
    );
    let place = Place::new(&marked);
    assert_eq!(place.patched(text(&answer["diff"])), want);
}

#[test]
fn the_likeliest_length_fills_open_positions() {
    if gpu().is_none() {
        return;
    }
    let place = Place::new(TEXT);
    let answer = place.json("infill", &["--at", "6:14", "--lengths", "5,1,3,3"]);
    assert_eq!(answer["how"], "in_place");
    let tried = answer["lengths"].as_array().expect("lengths");
    let lengths: Vec<_> = tried.iter().map(|t| t["length"].as_u64().expect("a number")).collect();
    assert_eq!(lengths, [1, 3, 5]);
    let value = |t: &Value| t["mean_logprob"].as_f64().expect("a number");
    let best = tried.iter().max_by(|a, b| value(a).total_cmp(&value(b))).expect("three");
    let ids = answer["token_ids"].as_array().expect("ids");
    assert_eq!(best["length"], ids.len());
    let middle = text(&answer["text"]);
    let after = text(&answer["after"]);
    assert_eq!(after.len(), TEXT.len() + middle.len());
    // Together or alone, a length is judged alike.
    let alone = place.json("infill", &["--at", "6:14", "--lengths", &ids.len().to_string()]);
    assert_eq!(alone["token_ids"], answer["token_ids"]);
    assert!((value(&alone["lengths"][0]) - value(best)).abs() < 1e-5);
}

#[test]
fn doubted_tokens_are_written_anew() {
    if gpu().is_none() {
        return;
    }
    let place = Place::new(TEXT);
    let none = place.json("infill", &["--below", "0"]);
    assert_eq!((&none["hidden"], text(&none["diff"])), (&Value::from(0), ""));
    let ask = ["--below", "0.2", "--lines", "4:6", "--explain-steps"];
    let some = place.json("infill", &ask);
    let hidden = some["hidden"].as_u64().expect("a number");
    assert!(hidden > 0 && hidden < some["tokens"].as_u64().expect("a number"), "{hidden}");
    assert_eq!(commits(&some["steps"]).len() as u64, hidden);
    let after = text(&some["after"]);
    assert!(after.starts_with("import os\n\n\n"), "{after:?}");
    assert!(after.contains("return total\n"), "{after:?}");
    assert_eq!(place.patched(text(&some["diff"])), after);
}

#[test]
fn an_edit_keeps_to_its_lines() {
    if gpu().is_none() {
        return;
    }
    let mut done = 0;
    for line in ["        return None", "import sys", "        pass"] {
        let text = format!("class A:\n    def a(self):\n        x = 1\n{line}\n");
        let place = Place::new(&text);
        let ask = ["--instruction", "more", "--lines", "3", "--max-tokens", "60"];
        let ask = [&ask[..], &["--temperature", "0.8", "--json"]].concat();
        let output = place.demask("edit", &ask);
        if !output.status.success() {
            // A small model may not come to the line behind so soon: then nothing is changed.
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(stderr.contains("not complete after 60 tokens"), "{stderr}");
            assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
            continue;
        }
        done += 1;
        let answer: Value = serde_json::from_slice(&output.stdout).expect("one object");
        let after = answer["after"].as_str().expect("text");
        assert!(after.starts_with("class A:\n    def a(self):\n"), "{after:?}");
        assert!(after.ends_with(&format!("\n{line}\n")), "{after:?}");
        assert_eq!(place.patched(answer["diff"].as_str().expect("text")), after);
    }
    assert!(done > 0, "none came to an end");
    let place = Place::new(TEXT);
    let cut = place.demask("edit", &["--instruction", "x", "--max-tokens", "2", "--apply"]);
    assert_eq!(cut.status.code(), Some(1));
    assert_eq!(place.text("a.py"), TEXT);
    assert!(!place.path("a.py~").exists());
    let nothing = place.json("edit", &["--instruction", "x", "--below", "0"]);
    assert_eq!((text(&nothing["after"]), text(&nothing["diff"])), (TEXT, ""));
}

#[test]
fn a_trace_holds_every_pass() {
    if gpu().is_none() {
        return;
    }
    let place = Place::new(TEXT);
    let ask = ["--at", "6:14", "--max-tokens", "9", "--trace", "t.html", "--explain-steps"];
    let answer = place.json("infill", &ask);
    let page = place.text("t.html");
    let (_, data) = page.split_once("application/json\">").expect("the data");
    let (data, _) = data.split_once("</script>").expect("its end");
    let data: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(data["passes"].as_array().map(Vec::len), answer["steps"].as_array().map(Vec::len));
    let open = data["cells"].as_array().expect("cells").iter().filter(|cell| cell.is_null());
    assert_eq!(open.count(), 9);
    assert!(!page.contains("http://") && !page.contains("https://"), "it loads nothing");
}

#[test]
fn what_cannot_be_done_is_said() {
    let place = Place::new(TEXT);
    let fails = |command: &str, args: &[&str], code: i32, cause: &str| {
        let output = place.demask(command, args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(cause) && output.stdout.is_empty(), "{args:?}: {stderr}");
    };
    fails("infill", &[], 2, "--at");
    fails("infill", &["--at", "1"], 2, "LINE:COLUMN");
    fails("infill", &["--at", "99:1"], 1, "fewer than 99 lines");
    fails("infill", &["--at", "1:99"], 1, "last column");
    fails("infill", &["--hole-marker", "@@"], 1, "does not occur");
    fails("infill", &["--lines", "1:2", "--at", "1:1"], 2, "--lines");
    fails("infill", &["--at", "1:1", "--mode", "ar", "--lengths", "2"], 1, "block diffusion");
    fails("edit", &[], 2, "--instruction");
    fails("edit", &["--instruction", "x", "--lines", "3:99"], 1, "no line 99");
}

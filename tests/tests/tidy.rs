//! What the compiler does not check about the tree as text: floors, module pages, leftovers, sizes,
//! paths. Marks are spelled in halves, `to|do!`, so that this file does not break its own rules.

use std::fs;
use std::path::{Path, PathBuf};

use demask_tests::report;

/// Modules of the engine from the ground up; each may use its own floor and those below.
const FLOORS: &[&str] = &[
    "error Error Result philox",
    "gpu",
    "tensor autograd",
    "ops numerics",
    "model selftest",
    "tune",
    "decode",
];

fn floor(name: &str) -> Option<usize> {
    FLOORS.iter().position(|names| names.split(' ').any(|n| n == name))
}

fn climbs(path: &str, code: &str) -> bool {
    let inside = path.strip_prefix("engine/src/").filter(|p| *p != "lib.rs");
    let Some(inside) = inside else { return false };
    let module = inside.trim_end_matches(".rs").trim_end_matches("/mod");
    let Some(own) = floor(module.split('/').next().unwrap_or(module)) else { return true };
    let not_a_name = |c: char| !c.is_alphanumeric() && c != '_';
    let uses = |prefix: &str, unknown: bool| {
        code.split(prefix).skip(1).any(|rest| {
            let group = rest.starts_with('{');
            let end = if group { rest.find(';') } else { rest.find(not_a_name) };
            let mut names = rest[..end.unwrap_or(rest.len())].split(not_a_name);
            names.any(|name| floor(name).map_or(unknown && !group, |other| other > own))
        })
    };
    // A test module's `super::` stays inside, so there only known names count.
    uses("crate::", true) || uses(&"super::".repeat(module.split('/').count()), false)
}

/// Everything wrong with one file.
fn faults(path: &str, text: &str) -> Vec<String> {
    let has = |s: &str, marks: &[&str]| marks.iter().any(|m| s.contains(&m.replace('|', "")));
    let is_rust = path.ends_with(".rs");
    let is_script = [".py", ".sh"].iter().any(|end| path.ends_with(end)) || text.starts_with("#!/");
    let n_lines = text.lines().count();
    let mut faults = Vec::new();
    let mut code = String::new();
    for (i, line) in text.lines().enumerate() {
        let long_string = line.contains('"') || line.ends_with('\\');
        if line.chars().count() > 120 && (is_script || is_rust && !long_string) {
            faults.push(format!("{}: over 120 columns", i + 1));
        }
        let roots = ["/ho|me/", "/ro|ot/", "/Us|ers/", "/wo|rk/"].map(|r| r.replace('|', ""));
        let mut words = line.split(|c| " \"'`(<=:".contains(c));
        if words.any(|word| roots.iter().any(|root| word.starts_with(root))) {
            faults.push(format!("{}: a path of one machine", i + 1));
        }
        code += line.split("//").next().unwrap_or(line);
        code += "\n";
    }
    let prints = has(&code, &["print|ln!", "print|!("]);
    let may_print =
        ["cli/", "tests", "benches/", "examples/", "build.rs"].iter().any(|p| path.contains(p));
    let allow = "[al|low(".replace('|', "");
    let reasonless = |rest: &str| !rest.split(")]").next().is_some_and(|a| a.contains("reason"));
    let silent = code.split(&allow).skip(1).any(reasonless);
    if (is_rust || is_script) && n_lines > 700 {
        faults.push("over 700 lines".into());
    }
    let rules = [
        (!text.starts_with("//! "), "does not open with `//! `"),
        (climbs(path, &code), "uses a higher floor of the engine, or is or uses an unknown module"),
        (has(&code, &["to|do!", "unimple|mented!", "db|g!"]), "unfinished or debugging code"),
        (
            prints && !may_print,
            "prints; that is for cli, tests, benches, examples and build scripts",
        ),
        (silent, "allows a lint without a reason"),
    ];
    faults.extend(rules.iter().filter(|(b, _)| is_rust && *b).map(|(_, what)| (*what).into()));
    if path.ends_with(".wgsl") && n_lines > 150 {
        faults.push("over 150 lines".into());
    }
    faults.into_iter().map(|fault| format!("{path}: {fault}")).collect()
}

/// The files that the ARCHITECTURE asks to read first and that do not exist.
fn missing(readme: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let at = readme.to_lowercase().find("read these six files").unwrap_or(readme.len());
    let quoted = readme[at..].split('`').skip(1).step_by(2).filter(|w| w.contains('/'));
    let files: Vec<&str> = quoted.take(6).collect();
    let absent = files.iter().filter(|file| !exists(file)).map(|file| format!("no {file}"));
    let few =
        (files.len() < 6).then(|| "ARCHITECTURE.md: no six behind `read these six files`".into());
    absent.chain(few).collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Checks the text files below `folder` that belong to the project.
fn walk(folder: &str, failures: &mut Vec<String>) {
    for entry in fs::read_dir(root().join(folder)).expect("the folder exists") {
        let name = entry.expect("can be listed").file_name().to_string_lossy().into_owned();
        let path = format!("{folder}{name}");
        let foreign = name.starts_with('.') && name != ".ci" || name == "target" || name == "runs";
        if root().join(&path).is_dir() && !foreign {
            walk(&format!("{path}/"), failures);
        } else if let (false, Ok(text)) = (foreign, fs::read_to_string(root().join(&path))) {
            failures.extend(faults(&path, &text));
        }
    }
}

#[test]
fn the_tree_is_tidy() {
    let mut failures = Vec::new();
    walk("", &mut failures);
    match fs::read_to_string(root().join("ARCHITECTURE.md")) {
        Ok(readme) => failures.extend(missing(&readme, |file| root().join(file).exists())),
        Err(_) => println!("SKIPPED: no ARCHITECTURE.md yet"),
    }
    report(failures);
}

#[test]
fn each_rule_can_fail() {
    let (wide, long, longer) = ("é".repeat(117), "\n".repeat(700), "\n".repeat(701));
    let check = |path: &str, text: &str, count: usize| {
        let text = if path.ends_with(".rs") { format!("//! {text}") } else { text.to_owned() };
        assert_eq!(faults(path, &text.replace('|', "")).len(), count, "{path}: {text}");
    };
    check("engine/src/ops/rope.rs", "A\nuse crate::{Error, gpu::{Gpu, fold}, tensor::T};", 0);
    check(
        "engine/src/ops/rope.rs",
        "A\nuse crate::{\n    gpu::{Gpu, x},\n    model::Model,\n};",
        1,
    );
    check("engine/src/gpu/mod.rs", "A\n/// [`crate::ops`]\nmod tests { use super::*; }", 0);
    check("engine/src/gpu/mod.rs", "A\nuse crate::tensor::Tensor;", 1);
    check("engine/src/gpu/mod.rs", "A\nuse super::ops;", 1);
    check("engine/src/model/llama.rs", "A\nfn f() { super::super::decode::run() }", 1);
    check("engine/src/tensor/mod.rs", "A\nuse crate::Tensor;", 1);
    check("engine/src/helpers.rs", "A", 1);
    check("a.rs", "A\nfn f() { to|do!() }", 1);
    check("cli/src/main.rs", "A\nfn main() { print|ln!() }", 0);
    check("trainer/src/lib.rs", "A\nfn main() { eprint|ln!() }", 1);
    check("shaders/build.rs", "A\nfn main() { print|ln!() }", 0);
    check("a.rs", "A\n#[al|low(\n    dead_code,\n    reason = \"why\"\n)]", 0);
    check("a.rs", "A\n#[al|low(dead_code)]", 1);
    check("a.rs", &wide[2..], 0);
    check("a.rs", &wide, 1);
    check("a.rs", &long, 0);
    check("a.rs", &longer, 1);
    check("a.wgsl", &"// A.\n".repeat(151), 1);
    for (path, first) in [("a.py", ""), ("a.sh", ""), (".ci/run", "#!/bin/sh\n")] {
        check(path, &format!("{first}# {}", "é".repeat(118)), 0);
        check(path, &format!("{first}print '{}'", "é".repeat(118)), 1);
        check(path, &format!("{first}{}", &long[first.lines().count()..]), 0);
        check(path, &format!("{first}{longer}"), 1);
    }
    check("a.md", &format!("{} {longer}", "é".repeat(121)), 0);
    check("docs/a.md", "see docs/wo|rk/file", 0);
    check("docs/a.md", "/wo|rk/file", 1);
    assert_eq!(faults("a.rs", "use std::fs;").len(), 1);
    let readme = "Read these six files first: `a/1`, `a/2`, `a/3`, `cargo`, `a/4`, `a/5`, `a/6`.";
    assert_eq!(missing(readme, |_| true), Vec::<String>::new());
    assert_eq!(missing(readme, |file| file != "a/5"), ["no a/5"]);
    assert_eq!(missing("Read on: `a/1`", |_| true).len(), 1);
}

//! Scripts say in a line what they miss and how to get it: each one is run where its tools or modules are not, and must
//! name them; no traceback, no half-done work.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use demask_tests::report;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Paths of the tree's files with this ending, and without any other.
fn files(folder: &str, end: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(root().join(folder)).expect("the folder exists") {
        let name = entry.expect("can be listed").file_name().to_string_lossy().into_owned();
        let path = format!("{folder}{name}");
        let foreign = name.starts_with('.') && name != ".ci" || name == "target" || name == "runs";
        if root().join(&path).is_dir() && !foreign {
            files(&format!("{path}/"), end, found);
        } else if !foreign && (name.ends_with(end) || end == ".sh" && folder == ".ci/") {
            found.push(path);
        }
    }
}

fn run(command: &mut Command) -> Output {
    command.current_dir(root()).stdin(Stdio::null()).output().expect("starts")
}

/// What is wrong with how a script ended: it must fail and name what it needs, with the remedy.
fn ending(path: &str, output: &Output, named: &[&str]) -> Vec<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    let lost = named.iter().filter(|word| !said.contains(**word));
    let mut faults: Vec<String> =
        lost.map(|w| format!("{path} does not name {w}: {said}")).collect();
    if output.status.success() {
        faults.push(format!("{path} succeeds without what it needs"));
    }
    if said.contains("Traceback") || said.contains("command not found") {
        faults.push(format!("{path} breaks instead of saying: {said}"));
    }
    faults
}

#[test]
fn python_scripts_name_the_modules_that_they_miss() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("SKIPPED: no python3");
        return;
    }
    let mut scripts = Vec::new();
    files("", ".py", &mut scripts);
    let mut failures = Vec::new();
    for path in scripts {
        let text = fs::read_to_string(root().join(&path)).expect("text");
        // The others are parts of these.
        if !text.contains("sys.argv") && !text.contains("argparse") && !text.starts_with("#!") {
            continue;
        }
        // -S: without the folder of installed modules; -I: without the user's and the caller's.
        let bare = run(Command::new("python3").args(["-S", "-I"]).arg(root().join(&path)));
        let said = String::from_utf8_lossy(&bare.stderr).to_lowercase();
        // Sources of its own folder, which -I hides too, are no module to install.
        let own = path.contains("corpora/") && said.contains("no module named 'derive'");
        if !own && !said.contains("usage") {
            failures.extend(ending(&path, &bare, &["No module named", "pip install"]));
        }
    }
    report(failures);
}

/// What each script needs first, and arguments that bring it so far.
const SHELL: &[(&str, &[&str], &str)] = &[
    (".ci/package", &[], "cargo"),
    (".ci/release", &[], "cargo"),
    (".ci/run", &[], "cargo"),
    ("benches/gate-trial.sh", &[], "perl"),
    ("benches/gpu-carried.sh", &["pack"], "cargo"),
    ("benches/gpu.sh", &["OUT"], "cargo"),
    ("benches/peers/prepare.sh", &[], "npm"),
    ("benches/plan-trial.sh", &[], "jq"),
    ("benches/start-time.sh", &["MODEL", "BASE", "HEAD"], "python3"),
    ("benches/training-ablations.sh", &["MODEL", "DATASET", "OUT"], "jq"),
    ("findings/add_bos_token_beside_tokenizer_json.sh", &[], "python3"),
    ("tests/hlsl/microsoft.sh", &[], "npm"),
    ("tests/hlsl/run.sh", &[], "glslangValidator"),
    ("trainer/corpora/six-languages/fetch.sh", &["OUT"], "cargo"),
    ("trainer/corpora/six-languages/make.sh", &["OUT"], "demask"),
];
/// Installs or fetches what it misses; started by another program.
const NOT_RUN: &[&str] = &[".ci/setup", ".ci/swiftshader", "benches/peers/node_under_runner.sh"];

#[test]
fn shell_scripts_name_the_tools_that_they_miss() {
    let mut scripts = Vec::new();
    files("", ".sh", &mut scripts);
    scripts.retain(|path| !NOT_RUN.contains(&path.as_str()));
    scripts.sort();
    let known: Vec<&str> = SHELL.iter().map(|(path, ..)| *path).collect();
    assert_eq!(scripts, known, "a script that this test does not know, or no more");
    // A PATH with what every system has, and nothing that has to be installed.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).expect("a folder");
    let usual = "bash cat chmod cp dirname env grep id ls mkdir mktemp mv nproc realpath rm sed sha256sum sort tee tr uname";
    for tool in usual.split(' ') {
        let places = ["/usr/bin", "/bin"].map(|place| Path::new(place).join(tool));
        if let Some(place) = places.iter().find(|place| place.exists()) {
            symlink(place, bin.join(tool)).expect("a link");
        }
    }
    let mut failures = Vec::new();
    for (path, args, needs) in SHELL {
        // What stands for a path is in capitals.
        let args = args.iter().map(|arg| match arg.to_uppercase() == **arg {
            true => folder.path().join(arg),
            false => arg.into(),
        });
        let mut command = Command::new(root().join(path));
        command.args(args).env_clear().env("PATH", &bin).env("HOME", folder.path());
        failures.extend(ending(path, &run(&mut command), &[*needs]));
    }
    report(failures);
}

#[test]
fn llama_cpp_check_names_its_package() {
    let script = "tests/interop/llama_cpp_check.mjs";
    let mut node = Command::new("node");
    if node.arg("--version").output().is_err() {
        println!("SKIPPED: no node");
        return;
    }
    let output =
        run(Command::new("node").args([script, "M.gguf", "TEXT"]).env_remove("NODE_LLAMA_CPP"));
    report(ending(script, &output, &["npm install node-llama-cpp"]));
}

#[test]
fn a_silent_or_broken_ending_is_found() {
    let shell = |text: &str| run(Command::new("bash").args(["-c", text]));
    assert_eq!(ending("a", &shell("echo 'no jq; install it' >&2; exit 2"), &["jq"]).len(), 0);
    assert_eq!(ending("a", &shell("exit 2"), &["jq"]).len(), 1);
    assert_eq!(ending("a", &shell("echo jq >&2"), &["jq"]).len(), 1);
    assert_eq!(ending("a", &shell("no-such-tool-jq"), &["jq"]).len(), 1);
}

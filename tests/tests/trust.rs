//! What a week of training must survive: SIGKILL at any moment, also while a checkpoint is written, a full disk,
//! Ctrl-C, and steps that go wrong. Here the program itself is started and killed; `training.rs` looks from inside.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use demask_tests::{binary, gpu, small_corpus, small_recipe};
use demask_trainer::checkpoint;
use demask_trainer::metrics::read_metrics;
use demask_trainer::recipe::Recipe;

const STEPS: u64 = 24;

/// One at a time: a software device takes all cores, and these tests watch a process closely.
static ALONE: Mutex<()> = Mutex::new(());

/// A folder with text and a recipe that writes a checkpoint after each step.
struct Lab {
    folder: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

impl Lab {
    fn new() -> Lab {
        Lab::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut Recipe)) -> Lab {
        let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let folder = tempfile::tempdir().unwrap();
        let corpus = folder.path().join("corpus");
        small_corpus(&corpus);
        let mut recipe = small_recipe(&corpus);
        (recipe.checkpoints.every, recipe.checkpoints.keep) = (1, 2);
        (recipe.validation.every, recipe.validation.sequences) = (6, 2);
        recipe.data.held_out = 0.3;
        recipe.phase.iter_mut().for_each(|phase| phase.steps = STEPS / 2);
        change(&mut recipe);
        let text = toml::to_string(&recipe).unwrap();
        std::fs::write(folder.path().join("recipe.toml"), text).unwrap();
        Lab { folder, _alone: alone }
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `demask train` into a run's folder; with a limit of the size of files in KiB, as a full disk has it.
    fn train(&self, name: &str, limit: Option<u32>) -> Command {
        let mut command = Command::new("sh");
        // A signal that is ignored stays ignored in the program: it gets an error instead, as from a full disk.
        let limit =
            limit.map_or(String::new(), |kib| format!("trap '' XFSZ; ulimit -f {}; ", kib * 2));
        command.arg("-c").arg(limit + "exec \"$@\"").arg("sh").arg(binary());
        command.arg("train").arg(self.run("recipe.toml")).arg("--out").arg(self.run(name));
        command.args(["--no-tune", "--quiet"]);
        command.env("DEMASK_CACHE", env!("CARGO_TARGET_TMPDIR")).env_remove("RUST_BACKTRACE");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn spawn(&self, name: &str) -> Child {
        self.train(name, None).spawn().expect("sh runs")
    }

    fn finish(&self, name: &str) {
        let output = self.train(name, None).output().expect("sh runs");
        assert!(output.status.success(), "{}", stderr(&output));
    }

    /// The final weights and the bits of every step.
    fn result(&self, name: &str) -> (Vec<u8>, Vec<(u64, u64, u64)>) {
        let run = self.run(name);
        let metrics = read_metrics(&run.join("metrics.jsonl")).unwrap();
        let bits = metrics.iter().map(|m| (m.step, m.loss.to_bits(), m.grad_norm.to_bits()));
        (std::fs::read(run.join("model/model.safetensors")).unwrap(), bits.collect())
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Whether a checkpoint is being written.
fn is_writing(run: &Path) -> bool {
    let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    entries.into_iter().any(|e| e.file_name().to_string_lossy().starts_with(".writing"))
}

fn newest(run: &Path) -> u64 {
    checkpoint::list(run).unwrap().last().map_or(0, |(step, _)| *step)
}

/// Waits for something to become true; `false` if the process ended before.
fn wait_for(child: &mut Child, what: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(120), "nothing happens");
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

#[test]
fn a_run_that_is_killed_again_and_again_is_the_unbroken_one() {
    if gpu().is_none() {
        return;
    }
    let lab = Lab::new();
    lab.finish("whole");
    let run = lab.run("killed");
    let mut killed_in_a_write = 0;
    for round in 0..6 {
        let mut child = lab.spawn("killed");
        let from = newest(&run);
        // Some steps on, then anywhere in the next checkpoint's writing, or anywhere at all.
        let advanced = wait_for(&mut child, || newest(&run) >= from + 1 + round % 3);
        if advanced && round % 2 == 0 {
            wait_for(&mut child, || is_writing(&run));
            std::thread::sleep(Duration::from_micros(400 * round));
        } else {
            std::thread::sleep(Duration::from_millis(7 * round));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        killed_in_a_write += u32::from(is_writing(&run));
    }
    let before = newest(&run);
    assert!(before > 0 && before < STEPS, "killed after step {before} for the last time");
    println!("{killed_in_a_write} of 6 kills hit the writing of a checkpoint");
    assert!(killed_in_a_write > 0, "no kill hit the writing of a checkpoint");
    lab.finish("killed");
    assert!(!is_writing(&run), "what a kill left is cleared away");
    let (whole, killed) = (lab.result("whole"), lab.result("killed"));
    assert_eq!(whole.1.len() as u64, STEPS);
    assert_eq!(whole.1, killed.1, "steps differ");
    assert!(whole.0 == killed.0, "weights differ");
}

#[test]
fn a_full_disk_loses_nothing() {
    if gpu().is_none() {
        return;
    }
    let lab = Lab::new();
    let mut child = lab.spawn("full");
    let run = lab.run("full");
    wait_for(&mut child, || newest(&run) >= 2);
    child.kill().unwrap();
    child.wait().unwrap();
    let before = newest(&run);
    let output = lab.train("full", Some(48)).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = stderr(&output);
    assert!(text.contains("make room and resume") && text.contains("is intact"), "{text}");
    assert_eq!(newest(&run), before);
    assert!(!is_writing(&run), "the unfinished checkpoint goes on taking room");
    lab.finish("full");
    lab.finish("whole");
    assert!(lab.result("full") == lab.result("whole"), "the run differs");
}

#[test]
fn ctrl_c_leaves_a_checkpoint() {
    if gpu().is_none() {
        return;
    }
    let lab = Lab::with(|recipe| recipe.checkpoints.every = 1000);
    let mut child = lab.spawn("stopped");
    let run = lab.run("stopped");
    let lines =
        || std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |t| t.lines().count());
    wait_for(&mut child, || lines() >= 2);
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let step = newest(&run);
    assert!(step >= 2 && step as usize == lines(), "{} lines, checkpoint of {step}", lines());
}

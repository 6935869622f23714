//! Who takes part, and how each is started. Every peer is a process of its own, demask too: a peer that crashes
//! or hangs costs one row, and each has the machine's memory to itself when its work is over.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::work::Work;

/// A contestant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// This project.
    Demask,
    /// Burn on wgpu, WGSL, with autotune and fusion.
    Burn,
    /// meganeura on blade, tuned.
    Meganeura,
    /// What the processor can do.
    OpenBlas,
    /// PyTorch on the processor.
    TorchCpu,
    /// PyTorch on CUDA.
    TorchCuda,
    /// llama.cpp's Vulkan backend.
    LlamaVulkan,
    /// llama.cpp on the processor.
    LlamaCpu,
    /// llama.cpp on the processor with the same weights as f32: the reference of decoding, which takes part in no race.
    /// With weights in fewer bits that backend rounds activations too, to 8 bits or to f16.
    LlamaF32,
}

/// The programs that peers are started with.
pub struct Programs {
    this: PathBuf,
    runner: Option<PathBuf>,
    python: PathBuf,
}

impl Programs {
    /// `runner` goes before the programs that use the GPU.
    pub fn new(runner: Option<PathBuf>, python: PathBuf) -> Result<Programs> {
        let this = std::env::current_exe().context("cannot find this program's own file")?;
        Ok(Programs { this, runner, python })
    }

    fn gpu(&self, program: &str) -> Command {
        match &self.runner {
            Some(runner) => {
                let mut command = Command::new(runner);
                command.arg(program).env("DEMASK_PEERS_RUNNER", runner);
                command
            }
            None => Command::new(program),
        }
    }

    /// This program under the runner, with one subcommand.
    pub fn this(&self, subcommand: &str) -> Command {
        let mut command = self.gpu(&self.this.to_string_lossy());
        command.arg(subcommand);
        command
    }
}

impl Peer {
    /// Every one that races.
    pub const ALL: [Peer; 8] = [
        Peer::Demask,
        Peer::Burn,
        Peer::Meganeura,
        Peer::OpenBlas,
        Peer::TorchCpu,
        Peer::TorchCuda,
        Peer::LlamaVulkan,
        Peer::LlamaCpu,
    ];

    /// As the tables print it.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Demask => "demask",
            Peer::Burn => "Burn 0.22.1",
            Peer::Meganeura => "meganeura 0.3.0",
            Peer::OpenBlas => "OpenBLAS (CPU)",
            Peer::TorchCpu => "PyTorch (CPU)",
            Peer::TorchCuda => "PyTorch (CUDA)",
            Peer::LlamaVulkan => "llama.cpp (Vulkan)",
            Peer::LlamaCpu => "llama.cpp (CPU)",
            Peer::LlamaF32 => "llama.cpp (CPU, f32 weights)",
        }
    }

    /// True for the first word of the name, in any case.
    pub fn is_called(self, name: &str) -> bool {
        self.name().split(' ').next().is_some_and(|word| word.eq_ignore_ascii_case(name))
    }

    /// True where the peer must run on the adapter that demask runs on.
    pub fn shares_adapter(self) -> bool {
        matches!(self, Peer::Demask | Peer::Burn | Peer::Meganeura | Peer::LlamaVulkan)
    }

    fn command(self, programs: &Programs) -> Command {
        let home = env!("CARGO_MANIFEST_DIR");
        let worker = |engine: &str| {
            let mut command = programs.this("worker");
            command.arg(engine);
            command
        };
        let script = |mut command: Command, file: &str, device: &str| {
            command.arg(format!("{home}/{file}")).arg(device).current_dir(home);
            command
        };
        match self {
            Peer::Demask => worker("demask"),
            Peer::Burn => worker("burn"),
            Peer::Meganeura => worker("meganeura"),
            Peer::OpenBlas => {
                let mut command = Command::new(&programs.this);
                command.args(["worker", "openblas"]);
                command
            }
            Peer::TorchCpu => script(Command::new(&programs.python), "torch_peer.py", "cpu"),
            Peer::TorchCuda => script(Command::new(&programs.python), "torch_peer.py", "cuda"),
            Peer::LlamaVulkan => {
                let mut command = script(programs.gpu("node"), "llama_cpp.mjs", "vulkan");
                // Without it llama.cpp passes over adapters that are processors.
                if std::env::var_os("GGML_VK_VISIBLE_DEVICES").is_none() {
                    command.env("GGML_VK_VISIBLE_DEVICES", "0");
                }
                command
            }
            Peer::LlamaCpu => script(Command::new("node"), "llama_cpp.mjs", "cpu"),
            Peer::LlamaF32 => script(Command::new("node"), "llama_cpp.mjs", "reference"),
        }
    }
}

/// Why a peer takes no part in a row.
#[derive(Debug)]
pub enum Out {
    /// It is not installed or cannot do this work; the text says which, and the remedy. Empty where none exists.
    Skipped(String),
    /// It broke.
    Failed(String),
}

/// A started peer: one JSON object a line, each answered by one.
pub struct Running {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// The last line that it wrote to standard error.
    complaint: Arc<Mutex<String>>,
    patience: Duration,
}

impl Running {
    /// Starts a peer and gives it its work, which it prepares and runs once. Returns its device's name.
    pub fn start(
        peer: Peer,
        work: &Work,
        programs: &Programs,
        patience: Duration,
    ) -> Result<(Running, String), Out> {
        let mut command = peer.command(programs);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .spawn()
            .map_err(|e| Out::Skipped(format!("cannot start {program} ({e}); install it")))?;
        let input = child.stdin.take().expect("piped");
        let output = child.stdout.take().expect("piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // Drivers and libraries print here too.
                if line.starts_with('{') && sender.send(line).is_err() {
                    return;
                }
            }
        });
        let errors = child.stderr.take().expect("piped");
        let complaint = Arc::new(Mutex::new(String::new()));
        let last = complaint.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                if !line.trim().is_empty() {
                    *last.lock().unwrap_or_else(|e| e.into_inner()) = line;
                }
            }
        });
        let mut running = Running { child, input, lines, complaint, patience };
        let answer =
            running.ask(&json!({ "setup": work })).map_err(|e| Out::Failed(e.to_string()))?;
        match (answer["skip"].as_str(), answer["device"].as_str()) {
            (Some(why), _) => Err(Out::Skipped(why.to_owned())),
            (_, Some(device)) => Ok((running, device.to_owned())),
            _ => Err(Out::Failed(format!("answered {answer}"))),
        }
    }

    /// Runs the work `times` times; seconds for one.
    pub fn run(&mut self, times: usize) -> Result<f64> {
        let answer = self.ask(&json!({ "run": times }))?;
        let seconds = answer["seconds"].as_f64().filter(|s| *s > 0.0);
        Ok(seconds.with_context(|| format!("answered {answer}"))? / times as f64)
    }

    /// Samples of what it computed, by name.
    pub fn results(&mut self) -> Result<Vec<(String, Vec<f64>)>> {
        let answer = self.ask(&json!({ "results": true }))?;
        let groups = answer["results"].as_object().context("no results")?;
        let floats = |v: &Value| -> Option<Vec<f64>> {
            v.as_array()?.iter().map(|x| x.as_f64().or(Some(f64::NAN))).collect()
        };
        let group = |(name, v): (&String, &Value)| {
            Ok((name.clone(), floats(v).context("results are no numbers")?))
        };
        groups.iter().map(group).collect()
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        // A peer that is gone is told by its silence below.
        let _ = writeln!(self.input, "{request}").and_then(|()| self.input.flush());
        match self.lines.recv_timeout(self.patience) {
            Ok(line) => {
                let answer: Value = serde_json::from_str(&line)?;
                match answer["error"].as_str() {
                    Some(error) => Err(anyhow!("{}", one_line(error))),
                    None => Ok(answer),
                }
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("no answer within {:.0} s", self.patience.as_secs_f64())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait()?;
                bail!(
                    "ended with {status}: {}",
                    self.complaint.lock().unwrap_or_else(|e| e.into_inner())
                )
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An error of many lines as one of at most 240 characters.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(240).collect()
}

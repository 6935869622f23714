//! What the test files share: a device opened as tests want it, comparison against references, the place of optional
//! data, and a run small enough for a test.

pub mod hlsl;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::ops::case::Tolerance;
use demask_trainer::recipe::Recipe;

/// A device in checked and guarded mode, or `None` (said aloud) where there is no adapter.
/// With `REQUIRE_GPU=1` a missing adapter fails.
pub fn checked_gpu() -> Option<Gpu> {
    open(GpuOptions { checked: true, guards: true, ..GpuOptions::default() })
}

/// A device as users have it.
pub fn gpu() -> Option<Gpu> {
    open(GpuOptions::default())
}

/// A device with the given options; its kernels go through HLSL if [`hlsl::folder`] says so.
pub fn open(mut options: GpuOptions) -> Option<Gpu> {
    if hlsl::folder().is_some() {
        options.translator = Some(hlsl::translate);
    }
    match Gpu::open(options) {
        Ok(gpu) => Some(gpu),
        Err(e) if std::env::var("REQUIRE_GPU").as_deref() == Ok("1") => panic!("{e}"),
        Err(e) => {
            println!("SKIPPED: {e}");
            None
        }
    }
}

/// The folder of optional small public data beside the checkout, or `None`, said aloud.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("SKIPPED: no {}", path.display());
    None
}

/// A file of this crate's `golden` folder.
pub fn golden(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(path)
}

/// Elementwise |got − want| ≤ absolute + relative·|want|; NaN differs from everything. Says the first five.
pub fn compare(name: &str, got: &[f32], want: &[f64], tolerance: Tolerance) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{name}: {} values, expected {}", got.len(), want.len()));
    }
    let wrong = |(g, w): &(f64, f64)| {
        let bound = tolerance.absolute + tolerance.relative * w.abs();
        let error = (g - w).abs();
        error.is_nan() || error > bound
    };
    let pairs = got.iter().map(|&g| f64::from(g)).zip(want.iter().copied());
    let bad: Vec<_> = pairs.enumerate().filter(|(_, pair)| wrong(pair)).collect();
    if bad.is_empty() {
        return Ok(());
    }
    let first: Vec<_> =
        bad.iter().take(5).map(|(i, (g, w))| format!("[{i}] {g} instead of {w}")).collect();
    Err(format!("{name}: {} of {} values differ: {}", bad.len(), got.len(), first.join(", ")))
}

/// Panics with all failures at once, so that one run shows the whole picture.
pub fn report(failures: Vec<String>) {
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Makes a folder of four packages of text that never changes, so that what is learnt of it does not either.
pub fn small_corpus(folder: &Path) {
    let license = Path::new(env!("CARGO_MANIFEST_DIR")).join("../LICENSE-APACHE");
    let text = std::fs::read_to_string(license).expect("the licence is there");
    let lines: Vec<&str> = text.lines().collect();
    for (package, part) in ["a", "b", "c", "d"].iter().zip(lines.chunks(lines.len().div_ceil(4))) {
        let folder = folder.join(package);
        std::fs::create_dir_all(&folder).expect("a temporary folder is writable");
        std::fs::write(folder.join("text.rs"), part.join("\n")).expect("can be written");
    }
}

/// A recipe on such a folder that is done in seconds: 9 steps autoregressive, 9 of block diffusion.
pub fn small_recipe(corpus: &Path) -> Recipe {
    let text = format!(
        r#"
        seed = 3
        checkpoints.every = 4
        [model.fresh]
        vocab_size = 300
        hidden_size = 32
        intermediate_size = 48
        layers = 2
        heads = 4
        kv_heads = 2
        [data]
        paths = [{corpus:?}]
        length = 32
        [optimizer]
        batch = 4
        micro_batch = 2
        [[phase]]
        objective = "ar"
        steps = 9
        lr = 1e-2
        lr_warmup = 2
        [[phase]]
        objective = "block_diffusion"
        steps = 9
        lr = 1e-2
        block_length = 4
        corruption_warmup = 4
        u_init = 0.2
        "#
    );
    let recipe: Recipe = toml::from_str(&text).expect("a recipe");
    recipe.check().expect("a good one");
    recipe
}

/// The binary of this build's profile, built if it is not there.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        // target/<profile>/deps/cli-<hash>
        let test = std::env::current_exe().expect("a test knows its own path");
        let profile = test.ancestors().nth(2).expect("target/<profile>");
        let name = profile.file_name().expect("has a name").to_string_lossy().into_owned();
        // Cargo decides whether there is anything to do; a stale binary would test something else.
        let mut cargo = Command::new(env!("CARGO"));
        // The whole default selection, so that features resolve as they did for this test and nothing is built twice.
        cargo.args(["build", "--quiet", "--bins", "--profile"]);
        cargo.arg(if name == "debug" { "dev" } else { &name });
        cargo.arg("--target-dir").arg(profile.parent().expect("target"));
        cargo.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        assert!(cargo.status().expect("cargo runs").success(), "the binary does not build");
        profile.join(format!("demask{}", std::env::consts::EXE_SUFFIX))
    })
}

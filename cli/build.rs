//! Tells `src/version.rs` the commit and the target that this program is built from and for. Never fails: outside git,
//! and without git, there is no commit.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// What the whole program is made from, seen from here: should any of it change, the commit may be "-dirty" now.
const SOURCES: &[&str] = &[
    "src",
    "../Cargo.toml",
    "../Cargo.lock",
    "../shaders",
    "../engine/src",
    "../trainer/src",
    "../benches/src",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DEMASK_COMMIT");
    let named = env::var("DEMASK_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = named.or_else(packaged).or_else(checked_out).unwrap_or_default();
    println!("cargo::rustc-env=DEMASK_BUILT_FROM={commit}");
    println!("cargo::rustc-env=DEMASK_TARGET={}", env::var("TARGET").unwrap_or_default());
}

/// The commit that cargo wrote into this package.
fn packaged() -> Option<String> {
    let info = fs::read_to_string(".cargo_vcs_info.json").ok()?;
    let commit = info.split("\"sha1\": \"").nth(1)?.split('"').next()?.to_owned();
    Some(if info.contains("\"dirty\": true") { commit + "-dirty" } else { commit })
}

/// The commit of the repository that holds this file, with "-dirty" behind it if tracked files differ from it.
fn checked_out() -> Option<String> {
    // A copy without git may lie in a repository of something else.
    git(&["ls-files", "--error-unmatch", "build.rs"])?;
    for part in ["HEAD", "logs/HEAD", "index"] {
        let path = git(&["rev-parse", "--git-path", part])?;
        if Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    for source in SOURCES.iter().filter(|source| Path::new(source).exists()) {
        println!("cargo::rerun-if-changed={source}");
    }
    git(&["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok()?;
    let said = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !said.is_empty()).then_some(said)
}

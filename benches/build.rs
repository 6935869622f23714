//! Tells `src/device.rs` which wgpu is built in, from the lock file; wgpu itself does not say.

use std::fs;
use std::path::Path;

fn main() {
    // A package carries the lock file it was made with; in the tree it is the workspace's.
    let locks = ["Cargo.lock", "../Cargo.lock"];
    let found = locks.iter().find(|lock| Path::new(lock).exists());
    println!("cargo::rerun-if-changed={}", found.unwrap_or(&"Cargo.toml"));
    let lock = found.and_then(|lock| fs::read_to_string(lock).ok()).unwrap_or_default();
    let entry = lock.split("[[package]]").find(|entry| entry.contains("name = \"wgpu\"\n"));
    let version = entry.and_then(|e| e.split("version = \"").nth(1)?.split('"').next());
    println!("cargo::rustc-env=WGPU_VERSION={}", version.unwrap_or("unknown"));
}

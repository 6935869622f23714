//! That others can take the crates: what each is compiled from lies in its package, and its manifest says what they
//! need to know. `.ci/package` builds everything from the packages alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use demask_tests::{binary, report};
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

fn cargo(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO")).args(args).current_dir(root()).output();
    let output = output.expect("cargo runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo {args:?}: {said}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The manifests of the workspace's crates that others may take, by name.
fn packages() -> BTreeMap<String, Value> {
    let text = cargo(&["metadata", "--no-deps", "--offline", "--format-version", "1"]);
    let mut metadata: Value = serde_json::from_str(&text).expect("JSON");
    let all = metadata["packages"].as_array_mut().expect("a list").drain(..);
    // `publish = false` reads as an empty list of places.
    let open = all.filter(|p| p["publish"].is_null());
    open.map(|p| (p["name"].as_str().expect("a name").to_owned(), p)).collect()
}

/// The files of the workspace that a compiler read, by its own account, written as a rule of make: `target: files`.
fn read_by_compiler(rules: &str, root: &Path, target: &Path) -> BTreeSet<PathBuf> {
    let files = rules
        .lines()
        .filter_map(|l| l.split_once(": "))
        .flat_map(|(_, files)| files.split(' ').map(|file| without_steps_up(&root.join(file))));
    // clippy, whose account may be the newest, reads the workspace's manifest; no compiler does.
    let manifest = root.join("Cargo.toml");
    files.filter(|f| f.starts_with(root) && !f.starts_with(target) && *f != manifest).collect()
}

/// `a/src/../b` as `a/b`.
fn without_steps_up(path: &Path) -> PathBuf {
    let mut short = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(short.pop()),
            part => short.push(part),
        }
    }
    short
}

#[test]
fn packages_hold_what_they_are_compiled_from() {
    binary();
    let test = std::env::current_exe().expect("a test knows its own path");
    let deps = test.parent().expect("target/<profile>/deps");
    let target = deps.ancestors().nth(2).expect("target");
    let mut failures = Vec::new();
    for (name, manifest) in packages() {
        let listed = cargo(&["package", "--list", "--offline", "--allow-dirty", "-p", &name]);
        let listed: BTreeSet<&Path> = listed.lines().map(Path::new).collect();
        let folder = Path::new(manifest["manifest_path"].as_str().expect("a path"));
        let folder = folder.parent().expect("a manifest lies in a folder");
        // The newest account, should there be older builds.
        let stem = format!("{}-", name.replace('-', "_"));
        let entries = fs::read_dir(deps).expect("can be listed").map(|e| e.expect("listed"));
        let account = entries
            .filter(|e| e.file_name().to_string_lossy().starts_with(&stem))
            .filter(|e| e.path().extension().is_some_and(|end| end == "d"))
            .max_by_key(|e| e.metadata().and_then(|m| m.modified()).expect("has a time"));
        let account = account.unwrap_or_else(|| panic!("no {stem}*.d in {}", deps.display()));
        let rules = fs::read_to_string(account.path()).expect("text");
        let read = read_by_compiler(&rules, &root(), target);
        assert!(read.len() > 1, "{name} is compiled from nothing: {rules}");
        for file in read {
            let inside = file.strip_prefix(folder).ok();
            if !inside.is_some_and(|inside| listed.contains(inside)) {
                failures.push(format!("{name} is compiled from {}, not in it", file.display()));
            }
        }
    }
    report(failures);
}

#[test]
fn accounts_of_the_compiler_are_read() {
    let rules = "/w/target/a.rlib: a/lib.rs /w/a/src/.././b.wgsl /w/Cargo.toml /w/target/out/t.rs /usr/x.rs\n\na/lib.rs:\n\n# env-dep:A=b\n";
    let read = read_by_compiler(rules, Path::new("/w"), Path::new("/w/target"));
    assert_eq!(read, ["/w/a/b.wgsl", "/w/a/lib.rs"].map(PathBuf::from).into());
}

#[test]
fn manifests_say_what_others_need() {
    let packages = packages();
    assert_eq!(packages.len(), 5, "{:?}", packages.keys());
    let mut failures = Vec::new();
    for (name, manifest) in packages {
        for field in ["description", "license", "readme", "rust_version"] {
            if manifest[field].as_str().is_none_or(str::is_empty) {
                failures.push(format!("{name} has no {field}"));
            }
        }
        for field in ["keywords", "categories"] {
            // Registries take one to five.
            if !matches!(manifest[field].as_array().map_or(0, Vec::len), 1..=5) {
                failures.push(format!("{name} has no {field}, or too many"));
            }
        }
        for dependency in manifest["dependencies"].as_array().expect("a list") {
            let local = !dependency["path"].is_null();
            if local && dependency["req"] == "*" && dependency["kind"] != "dev" {
                failures.push(format!("{name} takes any version of {}", dependency["name"]));
            }
        }
    }
    report(failures);
}

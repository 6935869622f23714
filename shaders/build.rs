//! Writes the tables of `lib.rs`: each WGSL file of this folder and of `shared/`, so that nobody keeps a list.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let out = env::var_os("OUT_DIR").expect("cargo names a folder for what is generated");
    let kernels = table("KERNELS", "Every kernel", ".")?;
    let shared = table("SHARED", "Every file that kernels import", "shared")?;
    fs::write(Path::new(&out).join("tables.rs"), kernels + &shared)
}

/// Stem and text of each WGSL file of a folder, in order.
fn table(name: &str, what: &str, folder: &str) -> io::Result<String> {
    println!("cargo::rerun-if-changed={folder}");
    let entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    let names = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut stems: Vec<_> =
        names.filter_map(|name| name.strip_suffix(".wgsl").map(str::to_owned)).collect();
    stems.sort();
    let mut text = format!("/// {what}: stem and text.\npub static {name}: &[(&str, &str)] = &[\n");
    for stem in stems {
        let path = format!("\"/{folder}/{stem}.wgsl\"");
        text +=
            &format!("({stem:?}, include_str!(concat!(env!(\"CARGO_MANIFEST_DIR\"), {path}))),\n");
    }
    Ok(text + "];\n")
}

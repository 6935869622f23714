//! Where a model's files lie, and how they are opened: a Hugging Face folder or one GGUF file.
//! Not here: what the files say.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::model::gguf::split::first_part;
use crate::model::hub;
use crate::{Error, Result};

/// A model on disk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    /// A folder with `config.json` and safetensors.
    Folder(PathBuf),
    /// One `.gguf` file, or a part of a split one.
    Gguf(PathBuf),
}

/// Decides what `path` is: a Hugging Face folder, a `.gguf` file, a folder with one such file (or the parts of one), or
/// the name of one of these in the hub's cache.
pub(crate) fn locate(path: &Path) -> Result<Source> {
    let asked = path;
    let path = &hub::resolve(path)?;
    let info = std::fs::metadata(path).map_err(|e| unlinked(path, e))?;
    if !info.is_dir() {
        return match is_gguf(path) {
            true => Ok(Source::Gguf(path.to_owned())),
            false => {
                Err(Error::model(path, "not a model; give a Hugging Face folder or a .gguf file"))
            }
        };
    }
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        let file = path.join(name);
        match std::fs::metadata(&file) {
            Ok(_) => return Ok(Source::Folder(path.to_owned())),
            Err(error) if file.is_symlink() => return Err(unlinked(&file, error)),
            Err(_) => {}
        }
    }
    // The parts of a split model are one.
    let mut models = BTreeMap::<PathBuf, Vec<PathBuf>>::new();
    let mut pickled = false;
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let file = entry.map_err(|e| Error::io(path, e))?.path();
        let stem = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        pickled |= stem.starts_with("pytorch_model");
        if is_gguf(&file) {
            models.entry(first_part(&file)).or_default().push(file);
        }
    }
    models.values_mut().for_each(|parts| parts.sort());
    let mut all = models.values().filter_map(|parts| Some((parts.first()?, parts.len())));
    match (all.next(), all.next()) {
        (Some((file, _)), None) => Ok(Source::Gguf(file.clone())),
        (Some(first), Some(second)) => {
            let told = |(file, parts): (&PathBuf, usize)| {
                let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if parts == 1 { name } else { format!("{name} ({parts} parts)") }
            };
            let example = asked.join(first.0.file_name().unwrap_or_default());
            let names: Vec<String> = [first, second].into_iter().chain(all).map(told).collect();
            let reason = format!(
                "holds {} GGUF models: {}; name the one you mean, as in {}",
                names.len(),
                names.join(", "),
                example.display()
            );
            Err(Error::model(path, reason))
        }
        (None, _) if pickled => Err(Error::model(
            path,
            "its weights are in pytorch_model.bin, which is a program to run; convert them to safetensors",
        )),
        (None, _) => Err(Error::model(
            path,
            "holds neither model.safetensors, nor model.safetensors.index.json, nor a .gguf file; if it is a part of \
             the hub's cache, get the rest with `hf download`",
        )),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
}

/// Says of a link whose file is gone that it is one: what a hub's cache is left with when it was cleaned or cut off.
fn unlinked(path: &Path, error: std::io::Error) -> Error {
    match path.is_symlink() {
        true => Error::model(
            path,
            "a link to a file that is not there; get it again with `hf download`",
        ),
        false => Error::io(path, error),
    }
}

/// Opens a regular file; a pipe or device would block or never end.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let info = std::fs::metadata(path).map_err(|e| unlinked(path, e))?;
    if !info.is_file() {
        return Err(Error::model(path, "not a regular file"));
    }
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    Ok((file, length))
}

/// The whole file, refused above `most` bytes.
pub(crate) fn read_capped(path: &Path, most: u64) -> Result<Vec<u8>> {
    let (file, length) = open_regular(path)?;
    let mut bytes = vec![];
    // One byte more than allowed: the file may have grown since its length was read.
    file.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if length > most || bytes.len() as u64 > most {
        return Err(Error::model(
            path,
            format!("larger than {most} bytes, which no such file needs"),
        ));
    }
    Ok(bytes)
}

/// Maps a file into memory read-only.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let (file, length) = open_regular(path)?;
    if length == 0 {
        return Err(Error::model(path, "the file is empty; fetch it again"));
    }
    // SAFETY: the map is read-only and only ever read as bytes. Another process that truncates the
    // file meanwhile ends this one with a bus error; that is the price of mapping, and saving never
    // does it, because it renames finished files into place.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

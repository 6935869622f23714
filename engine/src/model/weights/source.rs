//! Where a model's files lie, and how they are opened: a Hugging Face folder or one GGUF file.
//! Not here: what the files say.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::model::gguf::split::first_part;
use crate::{Error, Result};

/// A model on disk.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Source {
    /// A folder with `config.json` and safetensors.
    Folder(PathBuf),
    /// One `.gguf` file, or a part of a split one.
    Gguf(PathBuf),
}

/// Decides what `path` is: a Hugging Face folder, a `.gguf` file, or a folder with one such file.
pub(crate) fn locate(path: &Path) -> Result<Source> {
    let info = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !info.is_dir() {
        return match path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            true => Ok(Source::Gguf(path.to_owned())),
            false => {
                Err(Error::model(path, "not a model; give a Hugging Face folder or a .gguf file"))
            }
        };
    }
    if path.join("model.safetensors").exists() || path.join("model.safetensors.index.json").exists()
    {
        return Ok(Source::Folder(path.to_owned()));
    }
    let mut found = None;
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let file = entry.map_err(|e| Error::io(path, e))?.path();
        // The parts of a split model are one.
        let file = first_part(&file);
        if file.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
            && found.replace(file.clone()).is_some_and(|other| other != file)
        {
            return Err(Error::model(
                path,
                "holds more than one .gguf file; name the one you mean",
            ));
        }
    }
    found.map(Source::Gguf).ok_or_else(|| {
        Error::model(
            path,
            "holds neither model.safetensors, nor model.safetensors.index.json, nor a .gguf file",
        )
    })
}

/// Opens a regular file; a pipe or device would block or never end.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    let info = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
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

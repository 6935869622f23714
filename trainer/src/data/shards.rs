//! A dataset on disk: documents as token ids, end to end, in files that are mapped into memory. Nothing about sequences
//! is decided here, so that one dataset serves every length, block and seed.
//!
//!   dataset.json           what it is, its sources, what was left out
//!   tokenizer/             the tokenizer's files
//!   train/NAME-00000.tokens    u32 little-endian ids, bit 31 set on those that are read but not learnt
//!   train/NAME-00000.ends      u64 little-endian: for each document, where it ends in .tokens (in ids)
//!   held_out/…             the same, never trained on

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use super::filter::Report;
use super::recipe::Format;
use crate::disk::write_atomically;

/// Raised when the files change their meaning.
pub const VERSION: u32 = 1;

/// What `dataset.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`VERSION`].
    pub version: u32,
    /// Hash of the recipe, the inputs' names and sizes, and the tokenizer.
    pub fingerprint: u64,
    /// Ids are below this.
    pub vocab_size: usize,
    /// The token that ends a document.
    pub eos: u32,
    /// The token that ends an answer in its conversations, where it has any and their template writes one.
    #[serde(default)]
    pub end_of_turn: Option<u32>,
    /// Sources in the recipe's order.
    pub sources: Vec<SourceManifest>,
}

/// One source of a dataset.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceManifest {
    /// Its name.
    pub name: String,
    /// Documents are kept whole in one sequence: conversations, whose answers mean nothing without their prompt.
    pub whole: bool,
    /// What its rows were read as.
    #[serde(default)]
    pub format: Format,
    /// Its share of the training sequences, relative to the others'.
    pub weight: Option<f64>,
    /// For training.
    pub train: Vec<Shard>,
    /// For measuring.
    pub held_out: Vec<Shard>,
    /// What was kept and left out.
    pub report: Report,
}

/// One pair of files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Path below the dataset's folder, without ending.
    pub name: String,
    /// Documents.
    pub documents: u64,
    /// Ids.
    pub tokens: u64,
    /// Of these, ids that are learnt.
    pub learnt: u64,
}

/// An opened dataset.
pub struct Dataset {
    /// Its folder.
    pub folder: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// One shard in memory.
pub struct Mapped {
    tokens: Mmap,
    ends: Mmap,
}

impl Dataset {
    /// Opens the dataset in `folder`.
    pub fn open(folder: &Path) -> Result<Dataset> {
        let path = folder.join("dataset.json");
        let text = fs::read_to_string(&path).with_context(|| {
            format!("{} is no finished dataset; make one with demask data build", folder.display())
        })?;
        let manifest: Manifest =
            serde_json::from_str(&text).with_context(|| format!("in {}", path.display()))?;
        ensure!(
            manifest.version == VERSION,
            "{} has version {}, this program reads {VERSION}: build the dataset again",
            path.display(),
            manifest.version
        );
        Ok(Dataset { folder: folder.to_owned(), manifest })
    }

    /// Folder of its tokenizer.
    pub fn tokenizer(&self) -> PathBuf {
        self.folder.join("tokenizer")
    }

    /// Maps a shard and checks its size.
    pub fn map(&self, shard: &Shard) -> Result<Mapped> {
        let open = |ending: &str, bytes: u64| -> Result<Mmap> {
            let path = self.folder.join(format!("{}.{ending}", shard.name));
            let file = File::open(&path).with_context(|| {
                format!("cannot open {}; build the dataset again", path.display())
            })?;
            // SAFETY: datasets are written once, under another name, and never changed in place.
            let map = unsafe { Mmap::map(&file) }.with_context(|| path.display().to_string())?;
            ensure!(
                map.len() as u64 == bytes,
                "{} has {} bytes instead of {bytes}; build the dataset again",
                path.display(),
                map.len()
            );
            Ok(map)
        };
        Ok(Mapped {
            tokens: open("tokens", shard.tokens * 4)?,
            ends: open("ends", shard.documents * 8)?,
        })
    }
}

impl Mapped {
    /// Ids with their marks.
    pub fn tokens(&self) -> &[u32] {
        bytemuck::cast_slice(&self.tokens)
    }

    /// Where each document ends.
    pub fn ends(&self) -> &[u64] {
        bytemuck::cast_slice(&self.ends)
    }
}

/// Writes one shard: under another name until it is complete.
pub struct Writer {
    folder: PathBuf,
    shard: Shard,
    tokens: BufWriter<File>,
    ends: Vec<u64>,
}

impl Writer {
    /// Begins the shard `name` below `folder`.
    pub fn new(folder: &Path, name: String) -> Result<Writer> {
        let path = folder.join(format!("{name}.tokens.writing"));
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
        let file =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let shard = Shard { name, documents: 0, tokens: 0, learnt: 0 };
        Ok(Writer { folder: folder.to_owned(), shard, tokens: BufWriter::new(file), ends: vec![] })
    }

    /// Adds a document.
    pub fn push(&mut self, ids: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        self.tokens.write_all(&bytes).with_context(|| {
            format!("cannot write {}; make room and run the same again", self.shard.name)
        })?;
        self.shard.documents += 1;
        self.shard.tokens += ids.len() as u64;
        self.shard.learnt += ids.iter().filter(|&id| id & super::sample::GIVEN == 0).count() as u64;
        self.ends.push(self.shard.tokens);
        Ok(())
    }

    /// Puts the shard in its place; `None` if it has no document.
    pub fn finish(self) -> Result<Option<Shard>> {
        let place = |ending: &str| self.folder.join(format!("{}.{ending}", self.shard.name));
        let write = || -> Result<()> {
            self.tokens.into_inner().map_err(|e| e.into_error())?.sync_all()?;
            if self.shard.documents == 0 {
                fs::remove_file(place("tokens.writing"))?;
                return Ok(());
            }
            let bytes: Vec<u8> = self.ends.iter().flat_map(|end| end.to_le_bytes()).collect();
            write_atomically(&place("ends"), &bytes)?;
            fs::rename(place("tokens.writing"), place("tokens"))?;
            Ok(())
        };
        write().with_context(|| {
            format!("cannot write {}; make room and run the same again", self.shard.name)
        })?;
        Ok((self.shard.documents > 0).then_some(self.shard))
    }
}

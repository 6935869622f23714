//! A folder of source files as a corpus: reading, filtering, and the held-out split. What comes out
//! depends on the files, the settings and a seed alone, not on the order in which the system lists
//! them. Tokens and sequences are [`crate::pack`]'s.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use demask_engine::philox::Philox;
use serde::{Deserialize, Serialize};

/// Keeps this stream apart from others drawn under the same user seed.
const HELD_OUT: u64 = u64::from_le_bytes(*b"held_out");

/// Which files count as source code.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Filter {
    /// Extensions to read, without the dot.
    pub extensions: Vec<String>,
    /// Names of folders to pass over, at any depth: what an installation keeps beside its own code.
    pub skip_folders: Vec<String>,
    /// Longest file in bytes.
    pub max_bytes: u64,
    /// Longest line in characters; longer ones are data or generated code.
    pub max_line: usize,
    /// Longest mean line in characters.
    pub max_mean_line: usize,
}

impl Filter {
    /// The default limits (400 kB, lines of 1000 and of 100 on average) for these extensions,
    /// without version control's folders and installed packages.
    pub fn new(extensions: &[&str]) -> Self {
        let owned = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        Filter {
            extensions: owned(extensions),
            skip_folders: owned(&[".git", "node_modules", "site-packages"]),
            max_bytes: 400_000,
            max_line: 1000,
            max_mean_line: 100,
        }
    }

    /// Why this content is no training text, if it is none.
    fn refuses(&self, text: &str) -> Option<Reason> {
        if text.trim().is_empty() {
            return Some(Reason::Empty);
        }
        let (mut lines, mut chars, mut longest) = (0, 0, 0);
        for line in text.lines() {
            let length = line.chars().count();
            lines += 1;
            chars += length;
            longest = longest.max(length);
        }
        if longest > self.max_line {
            Some(Reason::LongLine)
        } else if chars > lines * self.max_mean_line {
            Some(Reason::LongMeanLine)
        } else {
            None
        }
    }
}

/// Why a file was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A symbolic link, to a file or a folder.
    Symlink,
    /// A folder to pass over; counted as one, whatever it contains.
    Folder,
    /// Not one of the extensions.
    Extension,
    /// Over the size cap.
    TooLarge,
    /// Not UTF-8.
    NotUtf8,
    /// Nothing but whitespace.
    Empty,
    /// A line over the cap.
    LongLine,
    /// Lines too long on average.
    LongMeanLine,
    /// Equal to an earlier file, whitespace aside.
    Duplicate,
}

/// Every reason with its wording; a reason's discriminant is its index here.
const REASONS: [(Reason, &str); 9] = [
    (Reason::Symlink, "symbolic link"),
    (Reason::Folder, "folder passed over"),
    (Reason::Extension, "other extension"),
    (Reason::TooLarge, "too large"),
    (Reason::NotUtf8, "not UTF-8"),
    (Reason::Empty, "empty"),
    (Reason::LongLine, "a line too long"),
    (Reason::LongMeanLine, "lines too long on average"),
    (Reason::Duplicate, "duplicate"),
];

/// Files left out for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// The reason.
    pub reason: Reason,
    /// How many files.
    pub files: usize,
    /// Their size together.
    pub bytes: u64,
}

/// What was read and what was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Files kept.
    pub files: usize,
    /// Their size together.
    pub bytes: u64,
    /// One entry per reason, in the order in which the filters apply.
    pub dropped: Vec<Dropped>,
}

impl Report {
    fn empty() -> Self {
        let dropped = REASONS.map(|(reason, _)| Dropped { reason, files: 0, bytes: 0 }).to_vec();
        Report { files: 0, bytes: 0, dropped }
    }

    fn drop(&mut self, reason: Reason, bytes: u64) {
        let entry = &mut self.dropped[reason as usize];
        entry.files += 1;
        entry.bytes += bytes;
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        writeln!(f, "{:<26}{:>8} files {:>9.2} MB", "kept", self.files, megabytes(self.bytes))?;
        for d in self.dropped.iter().filter(|d| d.files > 0) {
            let wording = REASONS[d.reason as usize].1;
            writeln!(f, "{wording:<26}{:>8} files {:>9.2} MB", d.files, megabytes(d.bytes))?;
        }
        Ok(())
    }
}

/// One source file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Path below the corpus folder, parts separated by '/'.
    pub path: String,
    /// Its content.
    pub text: String,
}

impl Document {
    /// The top-level folder, which is a package in a corpus of packages; the file itself if it lies
    /// at the top.
    pub fn package(&self) -> &str {
        self.path.split('/').next().unwrap_or(&self.path)
    }
}

/// A folder of source files, filtered, in order of their paths.
#[derive(Clone, Debug)]
pub struct Corpus {
    /// The files kept.
    pub documents: Vec<Document>,
    /// What was kept and left out.
    pub report: Report,
}

/// Documents to train on and documents to measure on.
#[derive(Clone, Debug)]
pub struct Split<'a> {
    /// For training.
    pub train: Vec<&'a Document>,
    /// Never trained on.
    pub held_out: Vec<&'a Document>,
}

impl Corpus {
    /// Reads every file below `root` that passes the filter. Symbolic links are not followed, so
    /// nothing outside `root` is read and no cycle is walked.
    pub fn read(root: &Path, filter: &Filter) -> Result<Corpus> {
        let mut report = Report::empty();
        let mut paths = Vec::new();
        walk(root, filter, &mut paths, &mut report)?;
        let mut paths: Vec<(String, PathBuf)> =
            paths.into_iter().map(|p| (below(root, &p), p)).collect();
        // Before reading, so that the first of several duplicates is the same one everywhere.
        paths.sort();
        let mut documents = Vec::new();
        let mut seen = HashSet::new();
        for (name, path) in paths {
            let bytes = std::fs::read(&path).with_context(|| {
                format!("cannot read {}; make it readable or remove it", path.display())
            })?;
            let size = bytes.len() as u64;
            let Ok(text) = String::from_utf8(bytes) else {
                report.drop(Reason::NotUtf8, size);
                continue;
            };
            let refused = filter
                .refuses(&text)
                .or_else(|| (!seen.insert(fingerprint(&text))).then_some(Reason::Duplicate));
            if let Some(reason) = refused {
                report.drop(reason, size);
                continue;
            }
            report.files += 1;
            report.bytes += size;
            documents.push(Document { path: name, text });
        }
        if documents.is_empty() {
            bail!(
                "no file below {} passes the filter (extensions: {}); check the folder and the \
                 extensions\n{report}",
                root.display(),
                filter.extensions.join(", ")
            );
        }
        Ok(Corpus { documents, report })
    }

    /// Both corpora as one, documents of `self` first.
    pub fn join(mut self, other: Corpus) -> Corpus {
        self.documents.extend(other.documents);
        self.report.files += other.report.files;
        self.report.bytes += other.report.bytes;
        for (mine, theirs) in self.report.dropped.iter_mut().zip(other.report.dropped) {
            mine.files += theirs.files;
            mine.bytes += theirs.bytes;
        }
        self
    }

    /// Holds out about `fraction` of the bytes: whole packages, so that a file is not measured
    /// beside its trained siblings, and single files where the packages are too few or too large to
    /// fit. Both are taken in the order of a seeded hash of their name, as long as they fit; a
    /// package larger than the share is therefore always trained on.
    pub fn split(&self, fraction: f64, seed: u64) -> Split<'_> {
        let budget = (self.report.bytes as f64 * fraction) as usize;
        let packages = choose(&self.documents, Document::package, budget, seed);
        let held: usize = self
            .documents
            .iter()
            .filter(|d| packages.contains(d.package()))
            .map(|d| d.text.len())
            .sum();
        let files = if held * 2 < budget {
            choose(&self.documents, |d| &d.path, budget, seed)
        } else {
            HashSet::new()
        };
        let by_package = files.is_empty();
        let (held_out, train) = self.documents.iter().partition(|d| {
            if by_package { packages.contains(d.package()) } else { files.contains(&*d.path) }
        });
        Split { train, held_out }
    }
}

/// Group names in the order of their seeded hash, taken while they fit into `budget` bytes.
fn choose(
    documents: &[Document],
    group: impl Fn(&Document) -> &str,
    budget: usize,
    seed: u64,
) -> HashSet<&str> {
    let mut sizes = BTreeMap::<&str, usize>::new();
    for document in documents {
        *sizes.entry(group(document)).or_default() += document.text.len();
    }
    let mut order: Vec<(&str, usize)> = sizes.into_iter().collect();
    order.sort_by_cached_key(|(name, _)| {
        let hash = fnv1a(name.bytes());
        Philox::new(seed ^ HELD_OUT, [hash as u32, (hash >> 32) as u32, 0]).next_u32()
    });
    let mut room = budget;
    order.retain(|&(_, size)| {
        let fits = size <= room;
        room -= if fits { size } else { 0 };
        fits
    });
    order.into_iter().map(|(name, _)| name).collect()
}

/// Collects the paths of `folder` that have the right extension and size.
fn walk(
    folder: &Path,
    filter: &Filter,
    paths: &mut Vec<PathBuf>,
    report: &mut Report,
) -> Result<()> {
    let context = || format!("cannot list {}; does the folder exist?", folder.display());
    for entry in std::fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let metadata = path
            .symlink_metadata()
            .with_context(|| format!("cannot inspect {}", path.display()))?;
        let listed = |names: &[String], name: Option<&OsStr>| {
            name.is_some_and(|name| names.iter().any(|n| name == n.as_str()))
        };
        if metadata.is_symlink() {
            report.drop(Reason::Symlink, 0);
        } else if metadata.is_dir() {
            if listed(&filter.skip_folders, path.file_name()) {
                report.drop(Reason::Folder, 0);
            } else {
                walk(&path, filter, paths, report)?;
            }
        } else if !metadata.is_file() || !listed(&filter.extensions, path.extension()) {
            report.drop(Reason::Extension, metadata.len());
        } else if metadata.len() > filter.max_bytes {
            report.drop(Reason::TooLarge, metadata.len());
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// The path of a file below `root`, with '/' between its parts on every system.
fn below(root: &Path, path: &Path) -> String {
    let parts = path.strip_prefix(root).unwrap_or(path).components();
    parts.map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

/// What two files that differ only in whitespace share.
fn fingerprint(text: &str) -> (usize, u64) {
    let dense = || text.bytes().filter(|b| !b.is_ascii_whitespace());
    (dense().count(), fnv1a(dense()))
}

/// 64-bit FNV-1a: unlike the standard library's hasher, the same in every release.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
#[path = "data_tests.rs"]
mod tests;

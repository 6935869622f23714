//! From files to documents: directories of source code, JSON and Parquet as Hugging Face hands them out. What comes out
//! depends on the files alone, not on the order in which the system lists them. Not here: rows of files (`rows.rs`) and
//! what they mean (`conversation.rs`).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::conversation;
use super::filter::{Filter, Reason, Report};
use super::recipe::{CorpusRecipe, SourceRecipe};
use super::rows::{Kind, file_name, json_rows, kind_of, table_rows};
use super::{Content, Document};

/// Files of a directory are handed out in lots of about this many bytes, unless asked otherwise.
pub const LOT: u64 = 16 << 20;
const PACKAGE_COLUMNS: [&str; 4] = ["source", "package", "repo_name", "max_stars_repo_name"];

/// Endings of source files by language.
pub const LANGUAGES: [(&str, &[&str]); 21] = [
    ("python", &["py", "pyi"]),
    ("rust", &["rs"]),
    ("c", &["c", "h"]),
    ("cpp", &["cc", "cpp", "cxx", "hpp", "hh", "cu", "cuh"]),
    ("javascript", &["js", "mjs", "cjs", "jsx"]),
    ("typescript", &["ts", "tsx", "mts"]),
    ("php", &["php"]),
    ("csharp", &["cs"]),
    ("go", &["go"]),
    ("java", &["java"]),
    ("kotlin", &["kt", "kts"]),
    ("swift", &["swift"]),
    ("ruby", &["rb"]),
    ("scala", &["scala"]),
    ("haskell", &["hs"]),
    ("lua", &["lua"]),
    ("shell", &["sh", "bash"]),
    ("sql", &["sql"]),
    ("wgsl", &["wgsl", "glsl", "hlsl"]),
    ("html", &["html", "css"]),
    ("markdown", &["md", "rst", "txt"]),
];

/// The language of a file by its ending; `None` where the ending says nothing.
pub fn language(name: &str) -> Option<&'static str> {
    let (_, ending) = name.rsplit_once('.')?;
    LANGUAGES.iter().find(|(_, endings)| endings.contains(&ending)).map(|(language, _)| *language)
}

/// Input files that are read by one thread, one after the other.
#[derive(Debug)]
pub struct Part {
    /// Which source of the recipe.
    pub source: usize,
    /// Size of the files together.
    pub bytes: u64,
    files: Vec<Input>,
}

#[derive(Debug)]
enum Input {
    /// A source file, and its path below its directory.
    Source(String, PathBuf),
    Lines(PathBuf),
    Table(PathBuf),
}

/// What was found at one place of an input.
pub type Found = std::result::Result<Document, LeftOut>;

/// A document that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Why.
    pub reason: Reason,
    /// What part of it is at fault, where the reason alone does not say.
    pub what: Option<String>,
    /// Where it stands.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

impl Part {
    /// What decides the content of the part: names and sizes.
    pub fn describe(&self) -> String {
        let names = self.files.iter().map(|f| match f {
            Input::Source(name, _) => name.clone(),
            Input::Lines(path) | Input::Table(path) => file_name(path),
        });
        format!("{} {} {}", self.source, self.bytes, names.collect::<Vec<_>>().join("\n"))
    }

    /// Hands over every document, or why there is none, in an order of its own that never changes.
    pub fn read(
        &self,
        source: &SourceRecipe,
        hear: &mut dyn FnMut(Found) -> Result<()>,
    ) -> Result<()> {
        for file in &self.files {
            match file {
                Input::Source(name, path) => {
                    let bytes = std::fs::read(path).with_context(|| {
                        format!("cannot read {}; make it readable or remove it", path.display())
                    })?;
                    let size = bytes.len() as u64;
                    hear(match String::from_utf8(bytes) {
                        Ok(text) => Ok(Document {
                            name: name.clone(),
                            package: name.split('/').next().unwrap_or(name).to_owned(),
                            content: Content::Text(text),
                        }),
                        Err(_) => Err(LeftOut {
                            reason: Reason::NotUtf8,
                            what: None,
                            name: name.clone(),
                            bytes: size,
                        }),
                    })?;
                }
                Input::Lines(path) => {
                    let mut number = 0;
                    json_rows(path, &mut |value, bytes| {
                        number += 1;
                        let name = format!("{}:{number}", file_name(path));
                        hear(document(source, name, value, bytes))?;
                        Ok(true)
                    })?;
                }
                Input::Table(path) => {
                    let mut number = 0;
                    table_rows(path, &wanted(source), &mut |row| {
                        number += 1;
                        let name = format!("{}:{number}", file_name(path));
                        hear(match row {
                            Ok((value, bytes)) => document(source, name, value, bytes),
                            Err(bytes) => {
                                Err(LeftOut { reason: Reason::NotUtf8, what: None, name, bytes })
                            }
                        })
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// The columns that a source's rows are made of.
fn wanted(source: &SourceRecipe) -> Vec<&str> {
    let mut wanted = conversation::columns(source.format());
    wanted.extend(PACKAGE_COLUMNS);
    wanted.extend(source.text.as_deref());
    wanted.extend(source.package.as_deref());
    wanted
}

/// All parts of a recipe's sources, in order; files of a directory are put together to parts of about `lot_bytes`, and
/// those that are passed over by name are counted.
pub fn parts(recipe: &CorpusRecipe, report: &mut [Report], lot_bytes: u64) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    for (i, source) in recipe.source.iter().enumerate() {
        let mut extensions: Vec<&str> = source.extensions.iter().map(String::as_str).collect();
        if extensions.is_empty() {
            extensions =
                LANGUAGES.iter().flat_map(|(_, endings)| endings.iter().copied()).collect();
        }
        for path in &source.paths {
            let size = |path: &Path| std::fs::metadata(path).map(|m| m.len());
            let context = || format!("source {}: cannot open {}", source.name, path.display());
            let kind = std::fs::metadata(path).with_context(context)?;
            if kind.is_dir() {
                let wanted = Wanted { filter: &recipe.filter, extensions: &extensions };
                let mut found = Vec::new();
                wanted.walk(path, &mut found, &mut report[i])?;
                let mut found: Vec<(String, PathBuf)> =
                    found.into_iter().map(|p| (below(path, &p), p)).collect();
                // Before reading, so that the first of several duplicates is the same one everywhere.
                found.sort();
                let mut lot = Part { source: i, bytes: 0, files: Vec::new() };
                for (name, path) in found {
                    lot.bytes += size(&path).with_context(|| path.display().to_string())?;
                    lot.files.push(Input::Source(name, path));
                    if lot.bytes >= lot_bytes {
                        parts.push(std::mem::replace(
                            &mut lot,
                            Part { source: i, bytes: 0, files: Vec::new() },
                        ));
                    }
                }
                if !lot.files.is_empty() {
                    parts.push(lot);
                }
            } else {
                let file = match kind_of(path)? {
                    Kind::Table => Input::Table(path.clone()),
                    Kind::Json => Input::Lines(path.clone()),
                };
                parts.push(Part { source: i, bytes: kind.len(), files: vec![file] });
            }
        }
    }
    Ok(parts)
}

/// The document that a row holds.
fn document(source: &SourceRecipe, name: String, value: Value, bytes: u64) -> Found {
    let Value::Object(row) = value else {
        return Err(LeftOut { reason: Reason::NoText, what: None, name, bytes });
    };
    let text = |column: &str| row.get(column).and_then(Value::as_str);
    let package = match &source.package {
        Some(column) => text(column),
        None => PACKAGE_COLUMNS.iter().find_map(|&c| text(c)),
    };
    let package = package.unwrap_or(&name).to_owned();
    match conversation::content(source, source.format(), row) {
        Ok(content) => Ok(Document { name, package, content }),
        Err((reason, what)) => Err(LeftOut { reason, what, name, bytes }),
    }
}

struct Wanted<'a> {
    filter: &'a Filter,
    extensions: &'a [&'a str],
}

impl Wanted<'_> {
    /// Collects the paths of `folder` that have the right extension and size. Symbolic links are not followed, so
    /// nothing outside is read and no cycle is walked.
    fn walk(&self, folder: &Path, paths: &mut Vec<PathBuf>, report: &mut Report) -> Result<()> {
        let context = || format!("cannot list {}; does the folder exist?", folder.display());
        for entry in std::fs::read_dir(folder).with_context(context)? {
            let path = entry.with_context(context)?.path();
            let metadata = path
                .symlink_metadata()
                .with_context(|| format!("cannot inspect {}", path.display()))?;
            let name = path.file_name().map(OsStr::to_string_lossy).unwrap_or_default();
            let extension = path.extension().and_then(OsStr::to_str).unwrap_or_default();
            let passed_over = || self.filter.skip_endings.iter().any(|end| name.ends_with(end));
            if metadata.is_symlink() {
                report.drop(Reason::Symlink, 0);
            } else if metadata.is_dir() {
                if self.filter.skip_folders.iter().any(|f| name == *f) {
                    report.drop(Reason::Folder, 0);
                } else {
                    self.walk(&path, paths, report)?;
                }
            } else if !metadata.is_file() || !self.extensions.contains(&extension) || passed_over()
            {
                report.drop(Reason::Extension, metadata.len());
            } else if metadata.len() > self.filter.max_bytes {
                report.drop(Reason::TooLarge, metadata.len());
            } else {
                paths.push(path);
            }
        }
        Ok(())
    }
}

/// The path of a file below `root`, with '/' between its parts on every system.
fn below(root: &Path, path: &Path) -> String {
    let parts = path.strip_prefix(root).unwrap_or(path).components();
    parts.map(|c| c.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;

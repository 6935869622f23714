//! From files to documents: directories of source code, JSONL (plain, .gz, .zst) and Parquet as Hugging Face hands
//! them out. What comes out depends on the files alone, not on the order in which the system lists them.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::filter::{Filter, Reason, Report};
use super::recipe::{CorpusRecipe, Format, SourceRecipe};
use super::{Content, Document, Turn};

/// Files of a directory are handed out in lots of about this many bytes, unless asked otherwise.
pub const LOT: u64 = 16 << 20;
/// Longest line of JSONL.
const MOST_LINE: u64 = 64 << 20;
const TEXT_COLUMNS: [&str; 3] = ["content", "text", "code"];
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
pub type Found = std::result::Result<Document, (Reason, String, u64)>;

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
                        Err(_) => Err((Reason::NotUtf8, name.clone(), size)),
                    })?;
                }
                Input::Lines(path) => {
                    let mut number = 0;
                    json_lines(path, &mut |value, size| {
                        number += 1;
                        let name = format!("{}:{number}", file_name(path));
                        hear(document(source, name, value, size))
                    })?;
                }
                Input::Table(path) => table(path, source, hear)?,
            }
        }
        Ok(())
    }
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
                    Kind::Lines => Input::Lines(path.clone()),
                };
                parts.push(Part { source: i, bytes: kind.len(), files: vec![file] });
            }
        }
    }
    Ok(parts)
}

enum Kind {
    Lines,
    Table,
}

fn kind_of(path: &Path) -> Result<Kind> {
    let name = file_name(path);
    let plain = name.trim_end_matches(".gz").trim_end_matches(".zst");
    match plain.rsplit_once('.').map(|(_, ending)| ending) {
        Some("jsonl" | "json" | "ndjson") => Ok(Kind::Lines),
        Some("parquet") => Ok(Kind::Table),
        _ => Err(anyhow!(
            "{}: neither a directory nor .jsonl, .json (also .gz, .zst) or .parquet",
            path.display()
        )),
    }
}

/// Hands over each line of a JSONL file as a value, with its size.
pub fn json_lines(path: &Path, hear: &mut dyn FnMut(Value, u64) -> Result<()>) -> Result<()> {
    let place = || path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {}", place()))?;
    let name = file_name(path);
    let plain: Box<dyn Read> = if name.ends_with(".gz") {
        Box::new(flate2::read::MultiGzDecoder::new(file))
    } else if name.ends_with(".zst") {
        Box::new(zstd::Decoder::new(file).with_context(place)?)
    } else {
        Box::new(file)
    };
    let mut reader = BufReader::with_capacity(1 << 16, plain);
    let (mut line, mut number) = (Vec::new(), 0_u64);
    loop {
        line.clear();
        number += 1;
        let mut limited = (&mut reader).take(MOST_LINE);
        let read = limited.read_until(b'\n', &mut line);
        let read = read.with_context(|| format!("{} line {number}: cannot read", place()))?;
        if read == 0 {
            return Ok(());
        }
        ensure!(
            (read as u64) < MOST_LINE,
            "{} line {number}: longer than {} MiB; is it JSONL?",
            place(),
            MOST_LINE >> 20
        );
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let value = serde_json::from_slice(&line).with_context(|| {
            format!("{} line {number} is no JSON; fix or remove the line", place())
        })?;
        hear(value, read as u64)?;
    }
}

/// Rows of a Parquet file, read column by column but only those that are needed.
fn table(
    path: &Path,
    source: &SourceRecipe,
    hear: &mut dyn FnMut(Found) -> Result<()>,
) -> Result<()> {
    let place = || format!("{}: not a Parquet file that can be read", path.display());
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader = SerializedFileReader::new(file).with_context(place)?;
    let schema = reader.metadata().file_metadata().schema();
    let mut wanted: Vec<&str> = match source.format {
        Format::Text => TEXT_COLUMNS.to_vec(),
        Format::Messages => vec!["messages", "conversations"],
        Format::PromptResponse => vec!["prompt", "response", "completion"],
        Format::Alpaca => vec!["instruction", "input", "output"],
        Format::Edit => vec!["before", "instruction", "after"],
    };
    wanted.extend(PACKAGE_COLUMNS);
    wanted.extend(source.text.as_deref());
    wanted.extend(source.package.as_deref());
    let columns: Vec<_> =
        schema.get_fields().iter().filter(|f| wanted.contains(&f.name())).cloned().collect();
    let projection = parquet::schema::types::Type::group_type_builder(schema.name())
        .with_fields(columns)
        .build()
        .with_context(place)?;
    for (number, row) in reader.get_row_iter(Some(projection)).with_context(place)?.enumerate() {
        let value = row.with_context(place)?.to_json_value();
        let size = value
            .as_object()
            .map_or(0, |o| o.values().map(|v| v.as_str().map_or(0, str::len) as u64).sum::<u64>());
        hear(document(source, format!("{}:{}", file_name(path), number + 1), value, size))?;
    }
    Ok(())
}

/// The document that a line or row holds.
fn document(source: &SourceRecipe, name: String, mut value: Value, size: u64) -> Found {
    let package = match &source.package {
        Some(column) => value[column].as_str(),
        None => PACKAGE_COLUMNS.iter().find_map(|&c| value[c].as_str()),
    };
    let package = package.unwrap_or(&name).to_owned();
    match content(source, &mut value) {
        Some(content) => Ok(Document { name, package, content }),
        None => Err((Reason::NoText, name, size)),
    }
}

fn content(source: &SourceRecipe, value: &mut Value) -> Option<Content> {
    let mut text = |column: &str| match value.get_mut(column)?.take() {
        Value::String(text) => Some(text),
        _ => None,
    };
    let chat = |question: String, answer: String| {
        Content::Chat(vec![Turn::new("user", question), Turn::new("assistant", answer)])
    };
    Some(match source.format {
        Format::Text => Content::Text(match &source.text {
            Some(column) => text(column)?,
            None => TEXT_COLUMNS.into_iter().find_map(text)?,
        }),
        Format::PromptResponse => {
            chat(text("prompt")?, text("response").or_else(|| text("completion"))?)
        }
        Format::Alpaca => {
            let instruction = text("instruction")?;
            let input = text("input").filter(|i| !i.trim().is_empty());
            let question = match input {
                Some(input) => format!("{instruction}\n\n{input}"),
                None => instruction,
            };
            chat(question, text("output")?)
        }
        Format::Edit => {
            let before = text("before")?;
            chat(edit_request(&before, &text("instruction")?), text("after")?)
        }
        Format::Messages => {
            let turns = ["messages", "conversations"].iter().find_map(|c| value[c].as_array())?;
            let turn = |turn: &Value| {
                let either = |a: &str, b: &str| turn[a].as_str().or(turn[b].as_str());
                let role = match either("role", "from")? {
                    "human" => "user",
                    "gpt" => "assistant",
                    role => role,
                };
                Some(Turn::new(role, either("content", "value")?.to_owned()))
            };
            let turns: Vec<Turn> = turns.iter().map(turn).collect::<Option<_>>()?;
            let answered = turns.iter().any(|t| t.role == "assistant");
            Content::Chat(answered.then_some(turns)?)
        }
    })
}

/// What a user says who wants `before` changed: the same words in training and in `demask edit`. The answer is the
/// changed text alone.
pub fn edit_request(before: &str, instruction: &str) -> String {
    format!("{}\n\n```\n{}\n```", instruction.trim(), before.trim_end_matches('\n'))
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

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

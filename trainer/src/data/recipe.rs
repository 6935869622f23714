//! A corpus recipe: one TOML file that says which files make up a dataset, and what is left out. Every field but the
//! tokenizer and the sources has a default.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::conversation;
use super::filter::Filter;
use super::rows::{columns, file_name};

/// The whole file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusRecipe {
    /// Decides the held-out split, what a cap keeps, and where a hole is cut.
    #[serde(default)]
    pub seed: u64,
    /// Folder with a tokenizer.json, a model's folder, or a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// Share of each source's text kept for validation, by package.
    #[serde(default = "default_held_out")]
    pub held_out: f64,
    /// Share of the documents turned into suffix, prefix, middle (fill in the middle).
    #[serde(default)]
    pub fim_rate: f64,
    /// What counts as text worth training on.
    #[serde(default)]
    pub filter: Filter,
    /// Evaluation sets that no document may share text with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decontaminate: Option<Decontaminate>,
    /// What the chat template of conversations is told, by name.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_args: Map<String, Value>,
    /// Where text comes from, in order; of equal documents the first one is kept.
    pub source: Vec<SourceRecipe>,
}

fn default_held_out() -> f64 {
    0.01
}

/// Evaluation sets that no document may share text with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decontaminate {
    /// JSONL files (also .gz, .zst); every string in them counts.
    pub against: Vec<PathBuf>,
    /// A document goes if it shares this many consecutive words with one of them.
    #[serde(default = "default_words")]
    pub words: usize,
}

fn default_words() -> usize {
    13
}

/// One source of text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecipe {
    /// Its name in reports, and in the mixture of a training recipe.
    pub name: String,
    /// Directories, and files in JSON (.jsonl, .json, also .gz and .zst) or Parquet.
    pub paths: Vec<PathBuf>,
    /// Endings of the files to read below a directory, without the dot; empty reads those of every known language.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extensions: Vec<String>,
    /// What a row holds; default: what the columns of its files say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The column with the text; default: the first of content, text, code that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The column that names the package (the repository) a line or row is from; default: the first of
    /// source, package, repo_name, max_stars_repo_name that is there, else each document is its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub package: Option<String>,
    /// Its share of the training sequences beside the other sources' weights; without any, each text is seen once
    /// an epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// Most text of one package, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_package_bytes: Option<u64>,
    /// Most text of the source, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

/// What a document of a source is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Plain text, all of it learnt.
    #[default]
    Text,
    /// `messages` (or `conversations`): a list of {role, content} or {from, value}; the assistant's turns are learnt.
    /// `tools`, `documents` and `chat_template_kwargs` beside it reach the chat template.
    Messages,
    /// `prompt` and `response` (or `completion`), each a text or a list of messages: the response is learnt.
    PromptResponse,
    /// `instruction`, `input` (may be empty), `history` and `output`: the output is learnt.
    Alpaca,
    /// `before`, `instruction`, `after`: the edited text is learnt.
    Edit,
}

impl Format {
    /// What it is, for people.
    pub fn describe(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Messages => "conversations",
            Format::PromptResponse => "prompts with answers",
            Format::Alpaca => "instructions with answers",
            Format::Edit => "edits",
        }
    }

    /// Its name in a recipe.
    pub fn name(self) -> &'static str {
        match self {
            Format::Text => "text",
            Format::Messages => "messages",
            Format::PromptResponse => "prompt_response",
            Format::Alpaca => "alpaca",
            Format::Edit => "edit",
        }
    }
}

impl SourceRecipe {
    /// What a row holds; text, until [`CorpusRecipe::recognise`] has looked.
    pub fn format(&self) -> Format {
        self.format.unwrap_or_default()
    }
}

impl CorpusRecipe {
    /// Reads and checks a recipe; relative paths in it are relative to `base`, or to the recipe's folder.
    pub fn read(path: &Path, base: Option<&Path>) -> Result<CorpusRecipe> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the recipe {}", path.display()))?;
        let mut recipe: CorpusRecipe =
            toml::from_str(&text).with_context(|| format!("in the recipe {}", path.display()))?;
        let base = base.or(path.parent()).unwrap_or(Path::new("."));
        let against = recipe.decontaminate.iter_mut().flat_map(|d| &mut d.against);
        let sources = recipe.source.iter_mut().flat_map(|s| &mut s.paths);
        for path in sources.chain(against).chain(&mut recipe.tokenizer) {
            *path = base.join(&path);
        }
        recipe.check().with_context(|| format!("in the recipe {}", path.display()))?;
        Ok(recipe)
    }

    /// Sources of plain text with the default settings.
    pub fn of_paths(paths: &[PathBuf], extensions: &[String]) -> CorpusRecipe {
        let source = SourceRecipe {
            name: "text".into(),
            paths: paths.to_vec(),
            extensions: extensions.to_vec(),
            format: None,
            text: None,
            package: None,
            weight: None,
            max_package_bytes: None,
            max_bytes: None,
        };
        CorpusRecipe {
            seed: 0,
            tokenizer: None,
            held_out: default_held_out(),
            fim_rate: 0.0,
            filter: Filter::default(),
            chat_args: Map::new(),
            decontaminate: None,
            source: vec![source],
        }
    }

    /// Gives each source that does not say what its rows hold the format that its files' columns say, and returns what to
    /// say about it, a line for each file of rows and its like. A source whose files are of several formats becomes
    /// several.
    ///
    /// # Errors
    /// If a file cannot be read, or no column of it is known.
    pub fn recognise(&mut self) -> Result<Vec<String>> {
        let mut said = Vec::new();
        let mut sources = Vec::new();
        for source in std::mem::take(&mut self.source) {
            if source.format.is_some() || source.text.is_some() {
                sources.push(SourceRecipe { format: Some(source.format()), ..source });
                continue;
            }
            let mut groups: Vec<(Format, Vec<PathBuf>)> = Vec::new();
            // File, format and columns of the first of a kind, and how many there are.
            let mut lines: Vec<(String, Format, String, usize)> = Vec::new();
            for path in &source.paths {
                let (format, columns) =
                    recognised(path).with_context(|| format!("source {}", source.name))?;
                match groups.iter_mut().find(|(other, _)| *other == format) {
                    Some((_, paths)) => paths.push(path.clone()),
                    None => groups.push((format, vec![path.clone()])),
                }
                let Some(columns) = columns else { continue };
                match lines.iter_mut().find(|line| (line.1, &line.2) == (format, &columns)) {
                    Some(line) => line.3 += 1,
                    None => lines.push((file_name(path), format, columns, 1)),
                }
            }
            said.extend(lines.into_iter().map(|(file, format, columns, n)| {
                let more = if n > 1 { format!(" and {} more", n - 1) } else { String::new() };
                format!("{file}{more}: {}, by {columns}", format.describe())
            }));
            ensure!(
                groups.len() < 2 || (source.weight, source.max_bytes) == (None, None),
                "source {}: its files are of several formats, which its weight or max_bytes cannot be shared among; \
                 make a [[source]] of each",
                source.name
            );
            for (i, (format, paths)) in groups.into_iter().enumerate() {
                // What paths on the command line are called.
                let unnamed = source.name == "text";
                let name = match (unnamed, i) {
                    (true, _) => format.name().to_owned(),
                    (false, 0) => source.name.clone(),
                    (false, _) => format!("{}-{}", source.name, format.name()),
                };
                sources.push(SourceRecipe { name, paths, format: Some(format), ..source.clone() });
            }
        }
        self.source = sources;
        Ok(said)
    }

    /// Refuses what makes no dataset, naming the field.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.source.is_empty(), "there is no [[source]]: say where the text comes from");
        ensure!((0.0..1.0).contains(&self.held_out), "held_out must be in [0, 1)");
        ensure!((0.0..=1.0).contains(&self.fim_rate), "fim_rate must be in [0, 1]");
        if let Some(d) = &self.decontaminate {
            ensure!(d.words > 0, "decontaminate.words must be at least 1");
        }
        let weighted = self.source.iter().filter(|s| s.weight.is_some()).count();
        ensure!(
            weighted == 0 || weighted == self.source.len(),
            "some sources have a weight and some have none; give all of them one, or none"
        );
        for (i, source) in self.source.iter().enumerate() {
            let name = &source.name;
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            ensure!(
                !name.is_empty() && name.chars().all(plain),
                "source {name:?}: a name is made of letters, digits, _ and -"
            );
            ensure!(
                self.source[..i].iter().all(|s| s.name != *name),
                "two sources are called {name:?}"
            );
            ensure!(!source.paths.is_empty(), "source {name}: paths is empty");
            ensure!(
                source.weight.is_none_or(|w| w.is_finite() && w > 0.0),
                "source {name}: weight must be positive"
            );
        }
        Ok(())
    }
}

/// What a file's columns say that its rows hold, and which columns; a directory holds text.
fn recognised(path: &Path) -> Result<(Format, Option<String>)> {
    let kind =
        std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    if kind.is_dir() {
        return Ok((Format::Text, None));
    }
    let columns = columns(path)?;
    if columns.is_empty() {
        return Ok((Format::Text, None));
    }
    if let Some((format, names)) = conversation::recognise(&columns) {
        return Ok((format, Some(names.join(", "))));
    }
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    bail!(
        "{}: no column of it is known as text or conversation ({}); say in a corpus recipe which one is the text \
         (text = \"COLUMN\"), or rename them",
        path.display(),
        names.join(", ")
    )
}

//! Changes of a file: as a unified diff, or made in place.

use std::fs;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use similar::TextDiff;

use crate::args::read_text;
use crate::ui::Notices;

/// What happens to a changed file.
#[derive(Args)]
pub struct ApplyArgs {
    /// Write the change into the file; what it was stays beside it, with ~ behind its name
    #[arg(long)]
    apply: bool,
}

/// A text that a command changes.
pub struct Draft {
    /// Where it comes from; - is stdin.
    path: PathBuf,
    /// The text as it was read.
    pub text: String,
}

impl ApplyArgs {
    /// Reads the text.
    pub fn open(&self, path: &Path) -> Result<Draft> {
        ensure!(!self.apply || path.as_os_str() != "-", "--apply needs a file, and this is stdin");
        Ok(Draft { path: path.to_owned(), text: read_text(path)? })
    }

    /// Writes the changed text if that was asked for; says where the old one is. Returns the backup for JSON.
    pub fn settle(&self, draft: &Draft, after: &str, notices: Notices) -> Result<Value> {
        if !self.apply || after == draft.text {
            return Ok(Value::Null);
        }
        let backup = draft.replace(after)?;
        notices.say(&format!(
            "{} is changed; as it was: {}",
            draft.path.display(),
            backup.display()
        ));
        Ok(json!(backup.display().to_string()))
    }
}

impl Draft {
    /// The change as a unified diff that `git apply` and `patch -p1` take in the working directory; empty if there is
    /// none.
    pub fn diff(&self, after: &str) -> String {
        if after == self.text {
            return String::new();
        }
        let name = self.name();
        // A name with blanks ends at a tab.
        let end = if name.contains(char::is_whitespace) { "\t" } else { "" };
        TextDiff::from_lines(self.text.as_str(), after)
            .unified_diff()
            .context_radius(3)
            .header(&format!("a/{name}{end}"), &format!("b/{name}{end}"))
            .to_string()
    }

    /// The file's name in a diff: below the working directory if it lies there.
    fn name(&self) -> String {
        let plain = self.path.strip_prefix("./").unwrap_or(&self.path);
        let below = std::env::current_dir().ok();
        let below = below.and_then(|dir| plain.strip_prefix(dir).ok().map(Path::to_owned));
        let name = below.unwrap_or_else(|| plain.to_owned());
        match name.to_string_lossy() {
            stdin if stdin == "-" => "stdin".to_owned(),
            name => name.trim_start_matches('/').to_owned(),
        }
    }

    /// Puts the new text in the file's place, whole, with the old one's permissions, and returns where the old one is.
    fn replace(&self, after: &str) -> Result<PathBuf> {
        // The file itself, not a link to it.
        let path = fs::canonicalize(&self.path)
            .with_context(|| format!("cannot find {} again", self.path.display()))?;
        if read_text(&path)? != self.text {
            bail!(
                "{} was changed by someone else in the meantime; nothing is written",
                self.path.display()
            );
        }
        let mut name = path.file_name().context("it names no file")?.to_owned();
        name.push("~");
        let backup = path.with_file_name(name);
        let write = || -> std::io::Result<()> {
            fs::copy(&path, &backup)?;
            let folder = path.parent().unwrap_or(Path::new("."));
            let mut fresh = tempfile::NamedTempFile::new_in(folder)?;
            fresh.write_all(after.as_bytes())?;
            fresh.as_file().set_permissions(fs::metadata(&path)?.permissions())?;
            fresh.as_file().sync_all()?;
            fresh.persist(&path)?;
            Ok(())
        };
        write()
            .with_context(|| format!("cannot write {}; it is as it was", self.path.display()))?;
        Ok(backup)
    }
}

/// A place in a text, as in `12:5`: line and column, both from 1, a column being a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    line: usize,
    column: usize,
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let wrong = || format!("{text:?} is no place; write LINE:COLUMN, both from 1, as in 12:5");
        let (line, column) = text.split_once(':').ok_or_else(wrong)?;
        let number = |n: &str| n.parse().ok().filter(|&n: &usize| n > 0).ok_or_else(wrong);
        Ok(Place { line: number(line)?, column: number(column)? })
    }
}

impl Place {
    /// Where it is in the text, in bytes; behind the last character of a line is a place too.
    pub fn offset(self, text: &str) -> Result<usize> {
        let mut start = 0;
        for _ in 1..self.line {
            let end = text[start..].find('\n');
            let Some(end) = end else { bail!("the text has fewer than {} lines", self.line) };
            start += end + 1;
        }
        let line = text[start..].split('\n').next().unwrap_or_default();
        let line = line.strip_suffix('\r').unwrap_or(line);
        let mut places = line.char_indices().map(|(at, _)| at).chain([line.len()]);
        let at = places.nth(self.column - 1).with_context(|| {
            let n = line.chars().count();
            format!("line {} has {n} characters, so its last column is {}", self.line, n + 1)
        })?;
        Ok(start + at)
    }
}

/// Lines of a text, as in `3:7` or `5`: from 1, the last one included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lines(pub RangeInclusive<usize>);

impl std::str::FromStr for Lines {
    type Err = String;

    fn from_str(text: &str) -> Result<Lines, String> {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first @ 1usize..), Ok(last)) if last >= first => Ok(Lines(first..=last)),
            _ => Err(format!("{text:?} are no lines; write FIRST:LAST, from 1, as in 3:7")),
        }
    }
}

impl Lines {
    /// Where they are in the text, in bytes, the last one's line end included.
    pub fn offsets(&self, text: &str) -> Result<std::ops::Range<usize>> {
        let starts: Vec<usize> = text
            .split_inclusive('\n')
            .scan(0, |at, line| Some(std::mem::replace(at, *at + line.len())))
            .collect();
        let (first, last) = (*self.0.start(), *self.0.end());
        ensure!(last <= starts.len(), "the text has {} lines, and no line {last}", starts.len());
        Ok(starts[first - 1]..starts.get(last).copied().unwrap_or(text.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft(path: &Path, text: &str) -> Draft {
        Draft { path: path.to_owned(), text: text.to_owned() }
    }

    #[test]
    fn places_and_lines() {
        let text = "añb\r\ncd\n\nlast";
        let at = |place: &str| place.parse::<Place>().unwrap().offset(text);
        assert_eq!([at("1:1").unwrap(), at("1:3").unwrap(), at("1:4").unwrap()], [0, 3, 4]);
        assert_eq!([at("2:3").unwrap(), at("3:1").unwrap(), at("4:5").unwrap()], [8, 9, 14]);
        assert!(at("1:5").unwrap_err().to_string().contains("last column is 4"));
        assert!(at("5:1").is_err());
        for wrong in ["", "3", "0:1", "1:0", "1:x", "-1:2"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
        let lines = |lines: &str| lines.parse::<Lines>().unwrap().offsets(text);
        assert_eq!(
            [lines("1").unwrap(), lines("2:3").unwrap(), lines("4").unwrap()],
            [0..6, 6..10, 10..14]
        );
        assert!(lines("4:5").is_err());
        for wrong in ["", "0", "3:2", "a:b"] {
            assert!(wrong.parse::<Lines>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_is_replaced_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.py");
        fs::write(&path, "one\n").unwrap();
        let change = draft(&path, "one\n");
        let backup = change.replace("two\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        assert_eq!(fs::read_to_string(&backup).unwrap(), "one\n");
        assert_eq!(backup, fs::canonicalize(dir.path()).unwrap().join("a.py~"));
        // Someone else was faster.
        assert!(change.replace("three\n").unwrap_err().to_string().contains("in the meantime"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
    }

    #[test]
    fn a_diff_names_the_file_below_the_working_directory() {
        let here = std::env::current_dir().unwrap();
        let change = draft(&here.join("my file.py"), "a\nb\n");
        let diff = change.diff("a\nc");
        let want = "--- a/my file.py\t\n+++ b/my file.py\t\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n\\ No newline at end of file\n";
        assert_eq!(diff, want);
        assert_eq!(change.diff("a\nb\n"), "");
    }
}

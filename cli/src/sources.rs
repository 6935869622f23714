//! Source code on this machine for the demo to learn from: where to look, and a bounded copy of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Most files that are looked at.
const MOST_FILES: usize = 30_000;
/// Longest file that is taken.
const MOST_FILE_BYTES: u64 = 100_000;

/// A programming language: how its files end, and a prompt in it.
#[derive(Clone, Copy, Debug)]
pub struct Language {
    /// Its name.
    pub name: &'static str,
    /// File extensions without the dot.
    pub extensions: &'static [&'static str],
    /// The beginning of a function.
    pub prompt: &'static str,
}

/// What the model that comes with demask knows.
pub const PYTHON: Language = Language {
    name: "Python",
    extensions: &["py"],
    prompt: "class Stack:\n    \"\"\"A stack of items.\"\"\"\n\n    def __init__(self",
};

const RUST: Language = Language {
    name: "Rust",
    extensions: &["rs"],
    prompt: "/// A stack of items.\npub struct Stack<T> {\n    items: Vec<T>,\n}\n\nimpl<T> Stack<T> {\n",
};

const LANGUAGES: [Language; 6] = [
    PYTHON,
    RUST,
    Language {
        name: "C and C++",
        extensions: &["c", "h", "cc", "cpp", "hpp"],
        prompt: "/* A stack of items. */\nstruct stack {\n    int size;\n",
    },
    Language {
        name: "JavaScript and TypeScript",
        extensions: &["js", "ts"],
        prompt: "// A stack of items.\nclass Stack {\n  constructor() {\n",
    },
    Language {
        name: "Go",
        extensions: &["go"],
        prompt: "// A Stack of items.\ntype Stack struct {\n",
    },
    Language {
        name: "Java",
        extensions: &["java"],
        prompt: "/** A stack of items. */\npublic class Stack {\n",
    },
];

/// A folder with code in one language.
#[derive(Debug)]
pub struct Sources {
    /// Where.
    pub root: PathBuf,
    /// The language that most of its bytes are in.
    pub language: Language,
    /// Paths below `root` and sizes, shuffled.
    files: Vec<(String, u64)>,
}

impl Sources {
    /// The code in `folder`; without one, Python's standard library, else Rust crates that cargo has
    /// fetched. Python first, because it is what the model that comes with demask can write.
    pub fn find(folder: Option<&Path>) -> Result<Sources> {
        if let Some(folder) = folder {
            return Self::read(folder, &LANGUAGES)?.with_context(|| {
                let all = LANGUAGES.iter().flat_map(|l| l.extensions);
                let all: Vec<&str> = all.copied().collect();
                format!("--code {}: no source file ({})", folder.display(), all.join(", "))
            });
        }
        let python = python_libraries().into_iter().map(|root| (root, PYTHON));
        for (root, language) in python.chain(cargo_sources().into_iter().map(|r| (r, RUST))) {
            // A folder that cannot be listed is passed over; another may do.
            let found = Self::read(&root, &[language]).ok().flatten();
            if let Some(found) = found.filter(|f| f.bytes() > 200_000) {
                return Ok(found);
            }
        }
        bail!("no source code found (Python's library, cargo's crates); name a folder with --code")
    }

    fn read(root: &Path, languages: &[Language]) -> Result<Option<Sources>> {
        let mut files = Vec::new();
        walk(root, root, &mut files)?;
        let of = |language: &Language| {
            let is_ours = |path: &str| {
                path.rsplit_once('.').is_some_and(|(_, end)| language.extensions.contains(&end))
            };
            files.iter().filter(|(path, _)| is_ours(path)).cloned().collect::<Vec<_>>()
        };
        let sources = languages.iter().map(|language| {
            let mut files = of(language);
            // The same order on every machine, whatever its system lists first.
            files.sort_by_cached_key(|(path, _)| shuffle_key(path));
            Sources { root: root.to_owned(), language: *language, files }
        });
        Ok(sources.max_by_key(Sources::bytes).filter(|most| most.bytes() > 0))
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, size)| size).sum()
    }

    /// Copies files up to `most` bytes into `to` under their own paths, and returns their size. A
    /// folder that exists, from an earlier demo, is taken as it is.
    pub fn copy(&self, to: &Path, most: u64) -> Result<u64> {
        let fresh = !to.exists();
        let mut total = 0;
        for (path, size) in &self.files {
            if total + size > most {
                continue;
            }
            total += size;
            let target = to.join(path);
            if fresh {
                let parent = target.parent().unwrap_or(to);
                std::fs::create_dir_all(parent)
                    .and_then(|()| std::fs::copy(self.root.join(path), &target))
                    .with_context(|| format!("cannot copy {path} to {}", target.display()))?;
            }
        }
        Ok(total)
    }
}

/// Collects paths below `root` with '/' between their parts, and sizes. Links are not followed.
fn walk(root: &Path, folder: &Path, files: &mut Vec<(String, u64)>) -> Result<()> {
    let context = || format!("cannot list {}", folder.display());
    for entry in std::fs::read_dir(folder).with_context(context)? {
        if files.len() >= MOST_FILES {
            return Ok(());
        }
        let entry = entry.with_context(context)?;
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(metadata) = entry.metadata() else { continue };
        let skipped = ["target", "node_modules", "site-packages", "test", "tests"];
        let hidden = name.to_string_lossy().starts_with('.');
        if metadata.is_dir() && !hidden && !skipped.iter().any(|s| name == *s) {
            walk(root, &path, files)?;
        } else if metadata.is_file() && metadata.len() <= MOST_FILE_BYTES {
            let below = path.strip_prefix(root).unwrap_or(&path);
            let parts: Vec<_> = below.iter().map(|part| part.to_string_lossy()).collect();
            files.push((parts.join("/"), metadata.len()));
        }
    }
    Ok(())
}

/// 64-bit FNV-1a.
fn shuffle_key(path: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    path.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn home() -> Option<PathBuf> {
    std::env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

/// Each registry's unpacked crates.
fn cargo_sources() -> Vec<PathBuf> {
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| home().map(|home| home.join(".cargo")));
    cargo.map(|cargo| folders(&cargo.join("registry/src"), "")).unwrap_or_default()
}

/// What the interpreter says, and the usual places.
fn python_libraries() -> Vec<PathBuf> {
    let ask = "import sysconfig; print(sysconfig.get_paths()['stdlib'])";
    let said = ["python3", "python"].iter().find_map(|python| {
        let output = Command::new(python).args(["-c", ask]).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?;
        Some(PathBuf::from(path.trim())).filter(|path| path.join("os.py").exists())
    });
    let mut libraries: Vec<PathBuf> = said.into_iter().collect();
    for lib in ["/usr/lib", "/usr/local/lib", "/opt/homebrew/lib"] {
        libraries.extend(folders(Path::new(lib), "python3."));
    }
    if let Some(home) = home() {
        for version in folders(&home.join(".pyenv/versions"), "") {
            libraries.extend(folders(&version.join("lib"), "python3."));
        }
    }
    libraries
}

/// Folders of `parent` whose names begin with `prefix`, in order.
fn folders(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.is_dir() && name.starts_with(prefix)
    };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(named).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_copy_in_the_language_of_most_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let code = folder.path().join("code");
        for (path, size) in [("a/x.py", 30), ("a/y.py", 30), ("b/z.go", 50), (".git/w.py", 90)] {
            let path = code.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x".repeat(size)).unwrap();
        }
        let sources = Sources::find(Some(&code)).unwrap();
        assert_eq!((sources.language.name, sources.bytes()), ("Python", 60));
        let copy = folder.path().join("copy");
        assert_eq!(sources.copy(&copy, 59).unwrap(), 30);
        assert!(copy.join("a/x.py").exists() ^ copy.join("a/y.py").exists());
        assert!(Sources::find(Some(&copy.join("none"))).is_err());
    }
}

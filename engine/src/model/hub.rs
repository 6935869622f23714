//! Names of models as people type them: a path, or the name that a model has on the Hugging Face hub, looked up in the
//! cache that the hub's own tools fill on this machine. Nothing is fetched.
//!   org/name   org/name@revision   org/name[@revision]/file.gguf
//!   CACHE/models--org--name/refs/REVISION holds a commit; CACHE/models--org--name/snapshots/COMMIT/ its files

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Where `path` lies: itself if it is there, or what the hub's cache has under that name. The folder of a whole
/// repository of the cache stands for its main revision.
///
/// # Errors
/// If it is neither, with how to get it.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    resolve_in(path, cache().as_deref())
}

/// Whether `path` is nothing on this machine and may be a model's name on the hub, `org/name`.
pub fn may_name(path: &Path) -> bool {
    let name = path.to_str().and_then(Name::parse);
    std::fs::symlink_metadata(path).is_err() && name.is_some_and(|n| n.repository.contains('/'))
}

fn resolve_in(path: &Path, cache: Option<&Path>) -> Result<PathBuf> {
    if path.join("snapshots").is_dir() && !path.join("config.json").exists() {
        return snapshot(path, None, path);
    }
    // What is there under this path has the precedence, as with the hub's own tools.
    let missing = match std::fs::symlink_metadata(path) {
        Ok(_) => return Ok(path.to_owned()),
        Err(error) => Error::io(path, error),
    };
    let (Some(name), Some(cache)) = (path.to_str().and_then(Name::parse), cache) else {
        return Err(missing);
    };
    let repository = cache.join(format!("models--{}", name.repository.replace('/', "--")));
    if !repository.is_dir() {
        let Name { repository, revision, .. } = &name;
        let revision = revision.map_or_else(String::new, |r| format!(" --revision {r}"));
        return Err(Error::model(
            path,
            format!(
                "no such file or folder, and the Hugging Face cache {} has no {repository}; demask downloads nothing: \
                 get it with `hf download {repository}{revision}`, or set HF_HOME or HF_HUB_CACHE if it is in another \
                 cache",
                cache.display()
            ),
        ));
    }
    let folder = snapshot(&repository, name.revision, path)?;
    let file = folder.join(name.file);
    match file.exists() {
        true => Ok(if name.file.is_empty() { folder } else { file }),
        false => Err(Error::model(
            path,
            format!(
                "{} is not in the cached {}; get it with `hf download {} {}`",
                name.file, name.repository, name.repository, name.file
            ),
        )),
    }
}

/// A model's name on the hub.
struct Name<'a> {
    /// `org/name`, or `name` alone for a few old models.
    repository: &'a str,
    revision: Option<&'a str>,
    /// A file in it; empty for all of it.
    file: &'a str,
}

impl<'a> Name<'a> {
    /// `None` for what can only be a path.
    fn parse(text: &'a str) -> Option<Name<'a>> {
        let (repository, revision, file) = match text.split_once('@') {
            Some((repository, rest)) => {
                // A revision may have slashes (refs/pr/1); a file's name ends like a model's.
                let at = rest.find('/').filter(|_| rest.ends_with(".gguf"));
                let (revision, file) = at.map_or((rest, ""), |at| (&rest[..at], &rest[at + 1..]));
                (repository, Some(revision), file)
            }
            None => match text.match_indices('/').nth(1) {
                Some((at, _)) => (&text[..at], None, &text[at + 1..]),
                None => (text, None, ""),
            },
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let named = |part: &str| {
            !part.is_empty()
                && part.chars().all(plain)
                && !part.starts_with('.')
                && part.len() <= 96
        };
        let inside = |path: &str| path.is_empty() || path.split('/').all(named);
        let known = repository.split('/').all(named)
            && repository.matches('/').count() <= 1
            && revision.is_none_or(|revision| revision.split('/').all(named))
            && inside(file);
        known.then_some(Name { repository, revision, file })
    }
}

/// The folder of a revision; `main` where none is named. `asked` only names the thing in errors.
fn snapshot(repository: &Path, revision: Option<&str>, asked: &Path) -> Result<PathBuf> {
    let snapshots = repository.join("snapshots");
    let wanted = revision.unwrap_or("main");
    let commit = std::fs::read_to_string(repository.join("refs").join(wanted)).ok();
    let folder = snapshots.join(commit.as_deref().map_or(wanted, str::trim));
    if folder.is_dir() {
        return Ok(folder);
    }
    let mut there = names(&repository.join("refs"));
    there.extend(names(&snapshots));
    let there = match there.is_empty() {
        true => "nothing".into(),
        false => there.join(", "),
    };
    Err(Error::model(
        asked,
        format!(
            "revision {wanted} is not in the cache {}, which has {there}; name one of these with @, or get it with `hf \
             download`",
            repository.display()
        ),
    ))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The hub's cache on this machine, by the environment as the hub's own tools read it.
fn cache() -> Option<PathBuf> {
    cache_by(&|name| std::env::var(name).ok(), std::env::home_dir())
}

fn cache_by(variable: &dyn Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let expanded = |path: String| match (path.strip_prefix('~'), &home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            home.join(rest.trim_start_matches('/'))
        }
        _ => PathBuf::from(path),
    };
    if let Some(cache) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return Some(expanded(cache));
    }
    let own = || {
        let cache = set("XDG_CACHE_HOME").map(expanded);
        cache.or_else(|| Some(home.as_ref()?.join(".cache"))).map(|c| c.join("huggingface"))
    };
    set("HF_HOME").map(expanded).or_else(own).map(|home| home.join("hub"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::tests::Scratch;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    /// A cache with one repository of one commit, under two names.
    fn cache(name: &str) -> Scratch {
        let cache = Scratch::new(name);
        let repository = cache.0.join("models--some-org--tiny.model");
        for folder in ["refs/refs/pr", "blobs", &format!("snapshots/{COMMIT}/q4")] {
            std::fs::create_dir_all(repository.join(folder)).unwrap();
        }
        std::fs::write(repository.join("refs/main"), format!("{COMMIT}\n")).unwrap();
        std::fs::write(repository.join("refs/refs/pr/7"), COMMIT).unwrap();
        std::fs::write(repository.join("refs/lost"), "f".repeat(40)).unwrap();
        std::fs::write(repository.join(format!("snapshots/{COMMIT}/q4/a.gguf")), "").unwrap();
        cache
    }

    #[test]
    fn a_name_is_the_snapshot_of_its_revision() {
        let cache = cache("hub-found");
        let repository = cache.0.join("models--some-org--tiny.model");
        let folder = repository.join("snapshots").join(COMMIT);
        let resolve = |name: &str| resolve_in(Path::new(name), Some(cache.0.as_path()));
        let by_commit = format!("some-org/tiny.model@{COMMIT}");
        for name in [
            "some-org/tiny.model",
            "some-org/tiny.model@main",
            "some-org/tiny.model@refs/pr/7",
            &by_commit,
        ] {
            assert_eq!(resolve(name).unwrap(), folder, "{name}");
        }
        assert_eq!(resolve(repository.to_str().unwrap()).unwrap(), folder);
        for name in ["some-org/tiny.model/q4/a.gguf", "some-org/tiny.model@main/q4/a.gguf"] {
            assert_eq!(resolve(name).unwrap(), folder.join("q4/a.gguf"), "{name}");
        }
        // A folder of that name goes first.
        let here = cache.0.as_path().to_str().unwrap();
        assert_eq!(resolve(here).unwrap(), cache.0.as_path());
    }

    #[test]
    fn what_is_not_there_says_how_to_get_it() {
        let cache = cache("hub-missing");
        let refused = |name: &str, words: &[&str]| {
            let error =
                resolve_in(Path::new(name), Some(cache.0.as_path())).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{name}: {error}");
        };
        refused("some-org/other", &["hf download some-org/other`", "HF_HOME", "no such file"]);
        refused("some-org/other@v1", &["hf download some-org/other --revision v1`"]);
        refused("some-org/tiny.model@v1", &["revision v1", "lost, main", COMMIT]);
        refused("some-org/tiny.model@lost", &["revision lost"]);
        refused(
            "some-org/tiny.model/b.gguf",
            &["b.gguf", "hf download some-org/tiny.model b.gguf"],
        );
        // No name on the hub, so only a path.
        for path in ["/none/of/this", "../x", "./org/name", "some-org/../tiny.model", "a b/c"] {
            let error = resolve_in(Path::new(path), Some(cache.0.as_path())).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{path}: {error}");
        }
    }

    #[test]
    fn the_cache_is_where_the_hubs_tools_have_it() {
        let of = |set: &[(&str, &str)]| {
            let set: Vec<(String, String)> =
                set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            let variable = |name: &str| set.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone());
            cache_by(&variable, Some("/h".into())).unwrap().to_str().unwrap().replace('\\', "/")
        };
        assert_eq!(of(&[]), "/h/.cache/huggingface/hub");
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(of(&[("HF_HOME", "/y"), ("XDG_CACHE_HOME", "/x")]), "/y/hub");
        assert_eq!(of(&[("HF_HOME", "~/y")]), "/h/y/hub");
        assert_eq!(of(&[("HF_HUB_CACHE", "/z"), ("HF_HOME", "/y")]), "/z");
        assert_eq!(of(&[("HUGGINGFACE_HUB_CACHE", "/z"), ("HF_HUB_CACHE", "")]), "/z");
    }
}

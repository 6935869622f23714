//! A model in several GGUF files, as llama.cpp's `gguf-split` cuts it: `NAME-00001-of-00003.gguf` and so on, of which
//! the first holds all metadata, and each its own directory of tensors. Any part names the whole.

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::Gguf;
use crate::model::weights::source::map_file;
use crate::{Error, Result};

/// Most parts of one model.
const MAX_PARTS: usize = 1024;

/// The mapped files of one model, in order.
pub(crate) struct Parts {
    pub paths: Vec<PathBuf>,
    pub maps: Vec<Mmap>,
}

impl Parts {
    /// Maps the file at `path`, and where it is a part of a split model, all of the others.
    pub fn open(path: &Path) -> Result<Self> {
        let paths = parts_of(path);
        if paths.len() > MAX_PARTS {
            let reason =
                format!("is one of {} parts; at most {MAX_PARTS} are accepted", paths.len());
            return Err(Error::model(path, reason));
        }
        let mut maps = vec![];
        for (number, part) in paths.iter().enumerate() {
            if !part.exists() {
                let (n, of) = (number + 1, paths.len());
                let reason = format!("part {n} of {of} of the model is missing; fetch it too");
                return Err(Error::model(part, reason));
            }
            maps.push(map_file(part)?);
        }
        Ok(Self { paths, maps })
    }

    /// The directory of all parts.
    pub fn gguf(&self) -> Result<Gguf<'_>> {
        let parts = self.paths.iter().zip(&self.maps);
        let parts = parts.map(|(path, map)| Gguf::parse(path, map)).collect::<Result<Vec<_>>>()?;
        join(parts)
    }
}

/// One directory of the parts' directories.
fn join<'a>(mut parts: Vec<Gguf<'a>>) -> Result<Gguf<'a>> {
    let count = parts.len();
    for (number, part) in parts.iter().enumerate() {
        let claimed = part.u64("split.count")?.unwrap_or(1);
        let own = part.u64("split.no")?.unwrap_or(0);
        if (claimed, own) != (count as u64, number as u64) {
            let reason = format!(
                "says it is part {} of {claimed}, but is named as part {} of {count}; give the files \
                 their names back (NAME-00001-of-{claimed:05}.gguf and so on)",
                own.saturating_add(1),
                number + 1
            );
            return Err(Error::model(part.path, reason));
        }
    }
    let mut whole = parts.remove(0);
    for (number, part) in parts.into_iter().enumerate() {
        whole.bytes.extend(part.bytes);
        let moved = part.tensors.into_iter().map(|mut tensor| {
            tensor.file = number + 1;
            tensor
        });
        whole.tensors.extend(moved);
    }
    let claimed = whole.u64("split.tensors.count")?.filter(|_| count > 1);
    if let Some(claimed) = claimed.filter(|&n| n != whole.tensors.len() as u64) {
        let reason = format!(
            "its parts hold {} tensors together, not {claimed}; are all of one model?",
            whole.tensors.len()
        );
        return Err(Error::model(whole.path, reason));
    }
    Ok(whole)
}

/// The paths of all parts where the name is that of one, else the path alone.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    match Name::of(path) {
        Some(name) => (1..=name.count).map(|number| name.path(path, number)).collect(),
        None => vec![path.to_owned()],
    }
}

/// The first part of the model that a file is a part of: what stands for the model in a list of files.
pub(crate) fn first_part(path: &Path) -> PathBuf {
    Name::of(path).map_or_else(|| path.to_owned(), |name| name.path(path, 1))
}

/// `STEM-00001-of-00003.gguf`, taken apart.
struct Name<'a> {
    stem: &'a str,
    count: usize,
    extension: &'a str,
}

impl<'a> Name<'a> {
    fn of(path: &'a Path) -> Option<Self> {
        let (name, extension) = path.file_name()?.to_str()?.rsplit_once('.')?;
        let (rest, count) = name.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        let five = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        if !extension.eq_ignore_ascii_case("gguf") || !five(number) || !five(count) {
            return None;
        }
        let (number, count): (usize, usize) = (number.parse().ok()?, count.parse().ok()?);
        (1..=count).contains(&number).then_some(Self { stem, count, extension })
    }

    fn path(&self, beside: &Path, number: usize) -> PathBuf {
        let Self { stem, count, extension } = self;
        beside.with_file_name(format!("{stem}-{number:05}-of-{count:05}.{extension}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::gguf::tests::{Writer, tiny_gguf};
    use crate::model::weights::Weights;
    use crate::model::weights::tests::Scratch;

    #[test]
    fn any_part_names_all() {
        let part = |n: usize| PathBuf::from(format!("a/b-of-x-00001-of-1.2-0000{n}-of-00003.gguf"));
        for n in 1..=3 {
            assert_eq!(parts_of(&part(n)), [part(1), part(2), part(3)]);
            assert_eq!(first_part(&part(n)), part(1));
        }
        for whole in ["a.gguf", "a-00004-of-00003.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin"] {
            assert_eq!(parts_of(Path::new(whole)), [PathBuf::from(whole)]);
        }
    }

    /// The tiny model with its last tensors in a second file.
    fn split(scratch: &Scratch, count: u16, number: u16, tensors: i32) {
        let (mut first, mut second) = (Writer::default(), Writer::default());
        for (index, (name, shape, kind, bytes)) in tiny_gguf().tensors().into_iter().enumerate() {
            let part = if index < 7 { &mut first } else { &mut second };
            part.tensor(&name, &shape, kind, &bytes);
        }
        let mut whole = tiny_gguf();
        whole.replace_tensors(first);
        for (writer, no) in [(&mut whole, 0), (&mut second, number)] {
            writer.pair("split.no", 2, &no.to_le_bytes());
            writer.pair("split.count", 2, &count.to_le_bytes());
            writer.pair("split.tensors.count", 5, &tensors.to_le_bytes());
        }
        scratch.write("m-00001-of-00002.gguf", whole.finish());
        scratch.write("m-00002-of-00002.gguf", second.finish());
    }

    #[test]
    fn a_split_model_is_the_whole_one() {
        let scratch = Scratch::new("split");
        let single = Scratch::new("unsplit");
        single.write("m.gguf", tiny_gguf().finish());
        let (want_config, want) = Weights::open(&single.0).unwrap();
        split(&scratch, 2, 1, 20);
        let [first, second] = [1, 2].map(|n| scratch.0.join(format!("m-0000{n}-of-00002.gguf")));
        for path in [&scratch.0, &first, &second] {
            let (config, weights) = Weights::open(path).unwrap();
            assert_eq!(config, want_config);
            for (name, shape) in config.parameters() {
                let rows = |of: &Weights| of.rows_f32(&name, 0..shape[0]).unwrap();
                assert_eq!(rows(&weights), rows(&want), "{name}");
            }
        }
        let refused = |word: &str| {
            let error = Weights::open(&second).err().expect(word).to_string();
            assert!(error.contains(word) && !error.contains('\n'), "{error}");
        };
        split(&scratch, 2, 1, 21);
        refused("20 tensors together, not 21");
        split(&scratch, 3, 1, 20);
        refused("part 1 of 3");
        split(&scratch, 2, 0, 20);
        refused("part 1 of 2, but is named as part 2 of 2");
        std::fs::copy(&first, &second).unwrap();
        refused("named as part 2 of 2");
        std::fs::rename(&first, scratch.0.join("renamed.gguf")).unwrap();
        refused("part 1 of 2 of the model is missing");
        let error = Weights::open(&scratch.0.join("renamed.gguf")).err().unwrap().to_string();
        assert!(error.contains("part 1 of 2"), "{error}");
    }
}

//! Makes a dataset: reads every document twice, first to decide what is kept (which takes all of them together: of
//! equal documents the first stays), then to write tokens. Both passes work on parts of the input in parallel; what
//! comes out does not depend on the number of threads. A part that is written is not written again, so an interrupted
//! build goes on where it was.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use demask_engine::philox::Philox;
use serde::{Deserialize, Serialize};

use super::Content;
use super::contamination::Contamination;
use super::filter::{Reason, Report};
use super::fnv1a;
use super::read::{LOT, LeftOut, Part, parts};
use super::recipe::{CorpusRecipe, Format};
use super::sample::Vocabulary;
use super::shards::{Dataset, Manifest, Shard, SourceManifest, VERSION, Writer};
use crate::disk::write_atomically;

/// Keep these streams apart from others drawn under the same user seed.
const HELD_OUT: u64 = u64::from_le_bytes(*b"held_out");
const CAP: u64 = u64::from_le_bytes(*b"cap\0\0\0\0\0");

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Deciding what is kept: bytes of input done, of so many.
    Reading(u64, u64),
    /// Writing tokens: bytes of input done, of so many.
    Writing(u64, u64),
}

/// What the first pass notes of a document.
struct Note {
    name: String,
    package: String,
    bytes: u64,
    fingerprint: (u64, u64),
    verdict: Verdict,
    /// What is at fault in it, where the reason does not say.
    what: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Train,
    HeldOut,
    Drop(Reason),
}

/// What a part gave, in `parts/`, until the dataset is complete.
#[derive(Serialize, Deserialize)]
struct Written {
    train: Option<Shard>,
    held_out: Option<Shard>,
}

/// What a build says while it works, and whether it shall stop.
pub type Hear<'a> = &'a (dyn Fn(Progress) -> bool + Sync);

/// Builds the dataset of a recipe in folder `out`. `hear` is told how far it is, from several threads, and returns
/// whether to go on; where it does not, the result is an error, and the same call goes on with the work later.
pub fn build(
    recipe: &CorpusRecipe,
    vocabulary: &Vocabulary,
    out: &Path,
    hear: Hear<'_>,
) -> Result<Dataset> {
    build_in_lots(recipe, vocabulary, out, hear, LOT)
}

fn build_in_lots(
    recipe: &CorpusRecipe,
    vocabulary: &Vocabulary,
    out: &Path,
    hear: Hear<'_>,
    lot_bytes: u64,
) -> Result<Dataset> {
    let mut recipe = recipe.clone();
    recipe.recognise()?;
    recipe.check()?;
    let recipe = &recipe;
    let chat = recipe.source.iter().any(|s| s.format() != Format::Text);
    vocabulary.check(recipe.fim_rate > 0.0, chat)?;
    let mut reports = vec![Report::default(); recipe.source.len()];
    let parts = parts(recipe, &mut reports, lot_bytes)?;
    let contamination = recipe.decontaminate.as_ref().map(Contamination::read).transpose()?;
    let fingerprint = fingerprint(recipe, vocabulary, contamination.as_ref(), &parts)?;
    if out.join("dataset.json").exists() {
        let dataset = Dataset::open(out)?;
        ensure!(
            dataset.manifest.fingerprint == fingerprint,
            "{} holds a dataset of another recipe, input, evaluation set or tokenizer; remove it or name another folder",
            out.display()
        );
        return Ok(dataset);
    }
    begin(out, fingerprint)?;
    let total = parts.iter().map(|p| p.bytes).sum();
    let read = |part: &Part| survey(recipe, vocabulary, contamination.as_ref(), part);
    let mut notes = in_parallel(&parts, &read, &|done| hear(Progress::Reading(done, total)))?;
    select(recipe, &parts, &mut notes, &mut reports);
    if reports.iter().all(|r| r.documents == 0) {
        let all: Vec<String> = reports.iter().map(Report::to_string).collect();
        bail!(
            "no document passes the filters; check the paths, extensions and formats\n{}",
            all.join("")
        );
    }
    write_dropped(out, recipe, &parts, &notes)?;
    let indexed: Vec<(usize, &Part)> = parts.iter().enumerate().collect();
    let write = |&(i, part): &(usize, &Part)| {
        let verdicts: Vec<Verdict> = notes[i].iter().map(|n| n.verdict).collect();
        write_part(recipe, vocabulary, out, i, part, &verdicts)
    };
    let written = in_parallel(&indexed, &write, &|done| hear(Progress::Writing(done, total)))?;
    let sources = recipe.source.iter().enumerate().zip(reports).map(|((i, source), report)| {
        let mine = || written.iter().zip(&parts).filter(move |(_, part)| part.source == i);
        SourceManifest {
            name: source.name.clone(),
            whole: source.format() != Format::Text,
            format: source.format(),
            weight: source.weight,
            train: mine().filter_map(|(w, _)| w.train.clone()).collect(),
            held_out: mine().filter_map(|(w, _)| w.held_out.clone()).collect(),
            report,
        }
    });
    let manifest = Manifest {
        version: VERSION,
        fingerprint,
        vocab_size: vocabulary.size,
        eos: vocabulary.eos,
        end_of_turn: vocabulary.end_of_turn.filter(|_| chat),
        sources: sources.collect(),
    };
    let tokenizer = out.join("tokenizer");
    fs::create_dir_all(&tokenizer).with_context(|| tokenizer.display().to_string())?;
    for (name, contents) in &vocabulary.files {
        write_atomically(&tokenizer.join(name), contents)?;
    }
    write_atomically(&out.join("dataset.json"), &serde_json::to_vec_pretty(&manifest)?)?;
    fs::remove_dir_all(out.join("parts")).context("removing parts/")?;
    Dataset::open(out)
}

/// What decides the result: recipe, tokenizer, text of the evaluation sets, names and sizes of the inputs.
fn fingerprint(
    recipe: &CorpusRecipe,
    vocabulary: &Vocabulary,
    contamination: Option<&Contamination>,
    parts: &[Part],
) -> Result<u64> {
    // Paths are left out: the same files elsewhere make the same dataset.
    let mut recipe = recipe.clone();
    recipe.tokenizer = None;
    recipe.source.iter_mut().for_each(|s| s.paths.clear());
    recipe.decontaminate.iter_mut().for_each(|d| d.against.clear());
    let mut text = toml::to_string(&recipe)?;
    text += &format!("{VERSION} {}\n", vocabulary.fingerprint());
    if let Some(contamination) = contamination {
        text += &format!("{}\n", contamination.fingerprint());
    }
    parts.iter().for_each(|part| text += &part.describe());
    Ok(fnv1a(text.bytes()))
}

/// Makes the folder, or finds it as an interrupted build of the same left it.
fn begin(out: &Path, fingerprint: u64) -> Result<()> {
    let parts = out.join("parts");
    let path = parts.join("fingerprint");
    let before = fs::read_to_string(&path).unwrap_or_default();
    if before == fingerprint.to_string() {
        return Ok(());
    }
    ensure!(
        !parts.join("00000.json").exists(),
        "{} holds the beginning of another dataset; remove it or name another folder",
        out.display()
    );
    fs::create_dir_all(&parts).with_context(|| format!("cannot make {}", parts.display()))?;
    write_atomically(&path, fingerprint.to_string().as_bytes())
}

/// Works on every item on all cores, in the order of the items; the results are in that order too, and so is the
/// choice of the error to report.
fn in_parallel<I: Sync + Sizable, T: Send>(
    items: &[I],
    work: &(dyn Fn(&I) -> Result<T> + Sync),
    hear: &(dyn Fn(u64) -> bool + Sync),
) -> Result<Vec<T>> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let done = Mutex::new((0_u64, BTreeMap::new()));
    let run = || {
        while !stop.load(Ordering::Relaxed) {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(i) else { return };
            let result = work(item);
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let mut done = done.lock().unwrap_or_else(|e| e.into_inner());
            done.0 += item.size();
            done.1.insert(i, result);
            if !hear(done.0) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        (0..threads.min(items.len())).for_each(|_| {
            scope.spawn(run);
        });
    });
    let (_, results) = done.into_inner().unwrap_or_else(|e| e.into_inner());
    let complete = results.len() == items.len();
    let results: Vec<T> = results.into_values().collect::<Result<_>>()?;
    ensure!(complete, "stopped; the same command goes on with the work");
    Ok(results)
}

/// Bytes of input that an item stands for.
trait Sizable {
    fn size(&self) -> u64;
}

impl Sizable for Part {
    fn size(&self) -> u64 {
        self.bytes
    }
}

impl Sizable for (usize, &Part) {
    fn size(&self) -> u64 {
        self.1.bytes
    }
}

/// The first pass over a part.
fn survey(
    recipe: &CorpusRecipe,
    vocabulary: &Vocabulary,
    contamination: Option<&Contamination>,
    part: &Part,
) -> Result<Vec<Note>> {
    let mut notes = Vec::new();
    part.read(&recipe.source[part.source], &mut |found| {
        notes.push(match found {
            Err(LeftOut { reason, what, name, bytes }) => Note {
                name,
                package: String::new(),
                bytes,
                fingerprint: (0, 0),
                verdict: Verdict::Drop(reason),
                what,
            },
            Ok(document) => {
                let mut what = None;
                // Filters about lines are for code that someone wrote; a prompt may be anything but empty.
                let refused = match &document.content {
                    Content::Text(text) => recipe.filter.refuses(text),
                    Content::Chat(chat) if chat.has_empty_turn() => Some(Reason::Empty),
                    Content::Chat(_) if document.content.bytes() > recipe.filter.max_bytes => {
                        Some(Reason::TooLarge)
                    }
                    Content::Chat(chat) if vocabulary.is_spoofed(chat) => {
                        Some(Reason::SpecialToken)
                    }
                    Content::Chat(chat) => {
                        what = vocabulary.without_place(chat);
                        what.is_some().then_some(Reason::NoPlace)
                    }
                };
                let texts = document.content.texts();
                let touches = |t: &str| contamination.is_some_and(|c| c.touches(t));
                let refused = refused
                    .or_else(|| texts.iter().any(|t| touches(t)).then_some(Reason::Contaminated));
                Note {
                    bytes: document.content.bytes(),
                    fingerprint: document.content.fingerprint(),
                    verdict: refused.map_or(Verdict::Train, Verdict::Drop),
                    name: document.name,
                    package: document.package,
                    what,
                }
            }
        });
        Ok(())
    })?;
    Ok(notes)
}

/// Decides over all documents together: duplicates, caps, and what is held out.
fn select(recipe: &CorpusRecipe, parts: &[Part], notes: &mut [Vec<Note>], reports: &mut [Report]) {
    let mut seen = HashSet::new();
    for note in notes.iter_mut().flatten().filter(|n| n.verdict == Verdict::Train) {
        if !seen.insert(note.fingerprint) {
            note.verdict = Verdict::Drop(Reason::Duplicate);
        }
    }
    for (i, source) in recipe.source.iter().enumerate() {
        let mut mine: Vec<&mut Note> = notes
            .iter_mut()
            .zip(parts)
            .filter(|(_, part)| part.source == i)
            .flat_map(|(notes, _)| notes)
            .collect();
        // Which documents stay under a cap is a matter of their names, not of where they lie.
        mine.sort_by_cached_key(|n| (shuffle_key(&n.name, recipe.seed ^ CAP), n.name.clone()));
        let kept = |n: &Note| n.verdict == Verdict::Train;
        if let Some(most) = source.max_package_bytes {
            let mut used = BTreeMap::<String, u64>::new();
            for note in mine.iter_mut().filter(|n| kept(n)) {
                let used = used.entry(note.package.clone()).or_default();
                match *used + note.bytes <= most {
                    true => *used += note.bytes,
                    false => note.verdict = Verdict::Drop(Reason::PackageFull),
                }
            }
        }
        if let Some(most) = source.max_bytes {
            let mut used = 0;
            for note in mine.iter_mut().filter(|n| kept(n)) {
                match used + note.bytes <= most {
                    true => used += note.bytes,
                    false => note.verdict = Verdict::Drop(Reason::SourceFull),
                }
            }
        }
        hold_out(&mut mine, recipe.held_out, recipe.seed);
        for note in mine {
            match note.verdict {
                Verdict::Drop(reason) => {
                    reports[i].drop_for(reason, note.what.as_deref(), note.bytes)
                }
                Verdict::Train | Verdict::HeldOut => reports[i].keep(note.bytes),
            }
        }
    }
}

/// Holds out about `fraction` of the bytes of a source: whole packages, so that a file is not measured beside its
/// trained siblings, and single documents where the packages are too few or too large to fit. Both are taken in the
/// order of a seeded hash of their name, as long as they fit; a package larger than the share is therefore always
/// trained on.
fn hold_out(notes: &mut [&mut Note], fraction: f64, seed: u64) {
    let kept = |n: &&&mut Note| n.verdict == Verdict::Train;
    let total: u64 = notes.iter().filter(kept).map(|n| n.bytes).sum();
    let budget = (total as f64 * fraction) as u64;
    if budget == 0 {
        return;
    }
    let choose = |group: &dyn Fn(&Note) -> String| -> (HashSet<String>, u64) {
        let mut sizes = BTreeMap::<String, u64>::new();
        for note in notes.iter().filter(kept) {
            *sizes.entry(group(note)).or_default() += note.bytes;
        }
        let mut order: Vec<(String, u64)> = sizes.into_iter().collect();
        order.sort_by_cached_key(|(name, _)| shuffle_key(name, seed ^ HELD_OUT));
        let mut held = 0;
        order.retain(|&(_, size)| {
            let fits = held + size <= budget;
            held += if fits { size } else { 0 };
            fits
        });
        (order.into_iter().map(|(name, _)| name).collect(), held)
    };
    let (packages, held) = choose(&|n| n.package.clone());
    let by_package = held * 2 >= budget;
    let names = if by_package { packages } else { choose(&|n| n.name.clone()).0 };
    for note in notes.iter_mut().filter(|n| n.verdict == Verdict::Train) {
        if names.contains(if by_package { &note.package } else { &note.name }) {
            note.verdict = Verdict::HeldOut;
        }
    }
}

fn shuffle_key(name: &str, seed: u64) -> u32 {
    let hash = fnv1a(name.bytes());
    Philox::new(seed, [hash as u32, (hash >> 32) as u32, 0]).next_u32()
}

/// Lists every document that was read and left out, with the reason.
fn write_dropped(
    out: &Path,
    recipe: &CorpusRecipe,
    parts: &[Part],
    notes: &[Vec<Note>],
) -> Result<()> {
    let mut lines = String::new();
    for (part, notes) in parts.iter().zip(notes) {
        for note in notes {
            if let Verdict::Drop(reason) = note.verdict {
                let source = &recipe.source[part.source].name;
                let mut line = serde_json::json!({
                    "name": note.name, "reason": reason, "bytes": note.bytes, "source": source,
                });
                if let Some(what) = &note.what {
                    line["what"] = what.as_str().into();
                }
                lines += &format!("{line}\n");
            }
        }
    }
    write_atomically(&out.join("dropped.jsonl"), lines.as_bytes())
}

/// The second pass over a part.
fn write_part(
    recipe: &CorpusRecipe,
    vocabulary: &Vocabulary,
    out: &Path,
    number: usize,
    part: &Part,
    verdicts: &[Verdict],
) -> Result<Written> {
    let place = out.join("parts").join(format!("{number:05}.json"));
    if let Ok(text) = fs::read(&place) {
        return serde_json::from_slice(&text).with_context(|| place.display().to_string());
    }
    let source = &recipe.source[part.source];
    let shard = |set: &str| Writer::new(out, format!("{set}/{}-{number:05}", source.name));
    let (mut train, mut held_out) = (shard("train")?, shard("held_out")?);
    let mut verdicts = verdicts.iter();
    part.read(source, &mut |found| {
        let verdict = verdicts.next().context("an input changed while it was read; start again")?;
        let Ok(document) = found else { return Ok(()) };
        let writer = match verdict {
            Verdict::Train => &mut train,
            Verdict::HeldOut => &mut held_out,
            Verdict::Drop(_) => return Ok(()),
        };
        let ids = vocabulary.tokens(&document, recipe.fim_rate, recipe.seed);
        writer.push(&ids.with_context(|| format!("cannot tokenise {}", document.name))?)
    })?;
    let written = Written { train: train.finish()?, held_out: held_out.finish()? };
    write_atomically(&place, &serde_json::to_vec(&written)?)?;
    Ok(written)
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;

//! A dataset as training sequences: packing into sequences of one length, and the order in which they are visited
//! (arXiv 2601.15892 §4.1). Nothing is copied: a sequence is put together from the mapped shards when it is asked for.
//! The order is a pure function of the sequence's global index, so the state of a data loader is one integer.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use demask_engine::philox::Philox;
use serde::{Deserialize, Serialize};

use crate::data::sample::GIVEN;
use crate::data::shards::{Dataset, Mapped, Shard};

/// Keep these streams apart from each other, and from others drawn under the same user seed.
const EOS: u64 = u64::from_le_bytes(*b"eos\0\0\0\0\0");
const SHUFFLE: u64 = u64::from_le_bytes(*b"shuffle\0");
const MIXTURE: u64 = u64::from_le_bytes(*b"mixture\0");

/// Sequences of one round of a weighted mixture: every source gets its share of each round, to this precision.
const ROUND: u64 = 1 << 16;
/// Among how many of the next documents one is looked for that fills what is left of a sequence.
const LOOK_AHEAD: usize = 256;

/// Which tokens of a packed sequence may see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Visibility {
    /// All of them, whatever document they are from: the paper's choice (§4.1).
    Mutual,
    /// Those of one document. Every document is padded with end-of-sequence tokens to a multiple
    /// of `alignment`: the block length under diffusion, so that no block spans two documents, and
    /// 1 for autoregressive training. The padding is supervised like the rest; it teaches that
    /// after the end only the end follows.
    Confined {
        /// Documents start at multiples of this many tokens.
        alignment: usize,
    },
}

/// How documents become sequences.
#[derive(Clone, Copy, Debug)]
pub struct Packing {
    /// L, tokens per sequence.
    pub length: usize,
    /// The end-of-sequence id. 1 to 4 of them, at random, end each document, so that a model can
    /// stop at any offset within a block (§4.1).
    pub eos: u32,
    /// Which tokens may see each other.
    pub visibility: Visibility,
    /// Decides the number of end tokens and the order of visits.
    pub seed: u64,
}

/// Which part of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What is trained on.
    Train,
    /// What is only measured on.
    HeldOut,
}

/// A dataset, packed.
pub struct Packed {
    packing: Packing,
    sources: Vec<Source>,
    /// Sequences of a round that each source gets; empty where each text is visited once an epoch.
    shares: Vec<u64>,
}

/// One source, its documents end to end. A document of text may begin in one sequence and go on in the next, and an
/// incomplete last sequence is left out; conversations stay whole.
struct Source {
    name: String,
    shards: Vec<Mapped>,
    /// In the order in which they are laid out.
    documents: Vec<Document>,
    n_sequences: u64,
    /// Documents that are longer than a sequence and cannot be cut.
    too_long: u64,
}

#[derive(Clone, Copy)]
struct Document {
    shard: u32,
    /// Ids.
    length: u32,
    /// In the shard.
    first: u64,
    /// In the sequences of the source, end to end.
    start: u64,
    /// Where its end tokens stop; what follows up to the next document is filled and not learnt.
    end: u64,
}

/// One training sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Token ids \[L].
    pub tokens: Vec<u32>,
    /// \[L]: whether a token is learnt, and not a prompt or a filler.
    pub learnt: Vec<bool>,
    /// \[L]: half-open range of the positions visible from each one; (0, L) under mutual
    /// visibility.
    pub spans: Vec<[u32; 2]>,
}

impl Packed {
    /// Packs the documents of a part of a dataset in their order. `weights` replace those of the dataset: the share of
    /// the sequences that each source gets.
    pub fn new(
        dataset: &Dataset,
        part: Part,
        weights: &BTreeMap<String, f64>,
        packing: Packing,
    ) -> Result<Packed> {
        let mut sources = Vec::new();
        let mut wanted = Vec::new();
        for manifest in &dataset.manifest.sources {
            let shards = match part {
                Part::Train => &manifest.train,
                Part::HeldOut => &manifest.held_out,
            };
            let source = Source::new(dataset, &manifest.name, shards, manifest.whole, &packing)?;
            if source.n_sequences > 0 {
                wanted.push(weights.get(&manifest.name).copied().or(manifest.weight));
                sources.push(source);
            }
        }
        let known = |name: &str| dataset.manifest.sources.iter().any(|s| s.name == name);
        if let Some(name) = weights.keys().find(|name| !known(name)) {
            let all: Vec<&str> = dataset.manifest.sources.iter().map(|s| &*s.name).collect();
            anyhow::bail!("data.weights: there is no source {name:?} in {}", all.join(", "));
        }
        ensure!(
            !sources.is_empty() || part == Part::HeldOut,
            "the documents fill no sequence of {} tokens; add documents or shorten the sequences",
            packing.length
        );
        // Held-out text is measured as it is.
        let shares = match part {
            Part::Train => shares(&wanted, &sources)?,
            Part::HeldOut => Vec::new(),
        };
        Ok(Packed { packing, sources, shares })
    }

    /// Sequences in one epoch: each text once, whatever the mixture.
    pub fn n_sequences(&self) -> u64 {
        self.sources.iter().map(|s| s.n_sequences).sum()
    }

    /// Name of each source with the sequences of its epoch, and its documents that are longer than a sequence and are
    /// left out because they cannot be cut.
    pub fn sources(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.sources.iter().map(|s| (&*s.name, s.n_sequences, s.too_long))
    }

    /// The `index`-th sequence of a run, any number of epochs long. Without weights each epoch visits every sequence
    /// once, in an order of its own; with weights each source goes through epochs of its own.
    pub fn sequence(&self, index: u64) -> Sequence {
        let seed = self.packing.seed;
        if self.shares.is_empty() {
            let n = self.n_sequences();
            return self.in_order(shuffled(index % n, n, seed ^ SHUFFLE, (index / n) as u32));
        }
        let (round, slot) = (index / ROUND, index % ROUND);
        let mut rank = shuffled(slot, ROUND, seed ^ MIXTURE, round as u32);
        for (i, (source, &share)) in self.sources.iter().zip(&self.shares).enumerate() {
            if rank < share {
                let visit = round * share + rank;
                let n = source.n_sequences;
                let seed = seed ^ SHUFFLE ^ ((i as u64) << 32);
                let place = shuffled(visit % n, n, seed, (visit / n) as u32);
                return source.sequence(place, &self.packing);
            }
            rank -= share;
        }
        unreachable!("shares add up to a round")
    }

    /// Sequence `place` < `n_sequences` in the order of the documents, for evaluation.
    #[track_caller]
    pub fn in_order(&self, mut place: u64) -> Sequence {
        for source in &self.sources {
            if place < source.n_sequences {
                return source.sequence(place, &self.packing);
            }
            place -= source.n_sequences;
        }
        panic!("pack: {place} sequences past the last of {}", self.n_sequences())
    }

    /// Sequences of one source in the order of its documents.
    pub fn of_source(&self, source: usize) -> impl Iterator<Item = Sequence> {
        let source = &self.sources[source];
        (0..source.n_sequences).map(|place| source.sequence(place, &self.packing))
    }
}

/// Slots of a round for each source, in proportion to the weights and at least one each; none where nothing is
/// weighted.
fn shares(wanted: &[Option<f64>], sources: &[Source]) -> Result<Vec<u64>> {
    if wanted.iter().all(Option::is_none) {
        return Ok(Vec::new());
    }
    for (weight, source) in wanted.iter().zip(sources) {
        let name = &source.name;
        let Some(weight) = weight else {
            anyhow::bail!("data.weights: source {name} has no weight, and others have one")
        };
        ensure!(weight.is_finite() && *weight > 0.0, "data.weights: {name} must be positive");
    }
    let total: f64 = wanted.iter().flatten().sum();
    let exact = |w: f64| w / total * ROUND as f64;
    let mut shares: Vec<u64> = wanted.iter().flatten().map(|&w| (exact(w) as u64).max(1)).collect();
    let largest = (0..shares.len()).max_by_key(|&i| shares[i]).unwrap_or(0);
    let sum: u64 = shares.iter().sum();
    shares[largest] = shares[largest] + ROUND - sum;
    Ok(shares)
}

impl Source {
    fn new(
        dataset: &Dataset,
        name: &str,
        shards: &[Shard],
        whole: bool,
        packing: &Packing,
    ) -> Result<Source> {
        let mut documents = Vec::new();
        let mut mapped = Vec::new();
        for (i, shard) in shards.iter().enumerate() {
            let map = dataset.map(shard)?;
            let mut first = 0;
            for &end in map.ends() {
                let length = u32::try_from(end.saturating_sub(first))?;
                documents.push(Document { shard: i as u32, length, first, start: 0, end: 0 });
                first = end;
            }
            ensure!(
                first <= map.tokens().len() as u64,
                "{}: documents end behind the last token; build the dataset again",
                shard.name
            );
            mapped.push(map);
        }
        let before = documents.len() as u64;
        let end = lay_out(&mut documents, whole, packing);
        let length = packing.length as u64;
        Ok(Source {
            name: name.to_owned(),
            shards: mapped,
            too_long: before - documents.len() as u64,
            documents,
            // Conversations fill their last sequence up; text leaves an incomplete one out.
            n_sequences: if whole { end.div_ceil(length) } else { end / length },
        })
    }

    /// Puts sequence `place` together.
    fn sequence(&self, place: u64, packing: &Packing) -> Sequence {
        let (length, eos) = (packing.length as u64, packing.eos);
        let (base, limit) = (place * length, (place + 1) * length);
        let mut out = Sequence { tokens: Vec::new(), learnt: Vec::new(), spans: Vec::new() };
        let mut at = self.documents.partition_point(|d| d.start <= base).saturating_sub(1);
        let mut position = base;
        while position < limit {
            let document = self.documents.get(at);
            let next = self.documents.get(at + 1).map_or(limit, |d| d.start.min(limit));
            let text_end = document.map_or(position, |d| d.start + u64::from(d.length)).min(limit);
            let learnt_end = document.map_or(position, |d| d.end).min(limit);
            if let Some(d) = document.filter(|_| position < text_end) {
                let from = (d.first + position - d.start) as usize;
                let ids = &self.shards[d.shard as usize].tokens()
                    [from..from + (text_end - position) as usize];
                out.tokens.extend(ids.iter().map(|id| id & !GIVEN));
                out.learnt.extend(ids.iter().map(|id| id & GIVEN == 0));
            }
            out.tokens.resize((next - base) as usize, eos);
            out.learnt.resize((learnt_end.max(position) - base) as usize, true);
            out.learnt.resize((next - base) as usize, false);
            let relative = |p: u64| (p.max(base) - base) as u32;
            // What fills up is a document of its own.
            for [start, end] in [[position, learnt_end], [learnt_end.max(position), next]] {
                let span = [relative(start), relative(end)];
                out.spans.resize((end.max(start) - base) as usize, span);
            }
            position = next;
            at += 1;
        }
        if packing.visibility == Visibility::Mutual {
            out.spans.fill([0, length as u32]);
        }
        out
    }
}

/// Gives each document its place, and returns where the last one ends. Documents that are kept whole change their order
/// (the longest of the next ones that fits goes first) and are left out if none fits into a sequence.
fn lay_out(documents: &mut Vec<Document>, whole: bool, packing: &Packing) -> u64 {
    let alignment = match packing.visibility {
        Visibility::Mutual => 1,
        Visibility::Confined { alignment } => alignment as u64,
    };
    let length = packing.length as u64;
    let n_eos = |d: &Document| {
        let coordinates = [d.shard, d.first as u32, (d.first >> 32) as u32];
        1 + u64::from(Philox::new(packing.seed ^ EOS, coordinates).below(4))
    };
    let end = |d: &Document| (d.start + u64::from(d.length) + n_eos(d)).next_multiple_of(alignment);
    let mut position = 0;
    if !whole {
        for d in documents.iter_mut() {
            d.start = position;
            d.end = end(d);
            position = d.end;
        }
        return position;
    }
    let size = |d: &Document| end(&Document { start: 0, ..*d });
    documents.retain(|d| size(d) <= length);
    for i in 0..documents.len() {
        let room = length - position % length;
        let last = documents.len().min(i + LOOK_AHEAD);
        let fits = (i..last).filter(|&j| size(&documents[j]) <= room);
        match fits.max_by_key(|&j| (size(&documents[j]), std::cmp::Reverse(j))) {
            Some(j) => documents[i..=j].rotate_right(1),
            None => position = position.next_multiple_of(length),
        }
        documents[i].start = position;
        documents[i].end = end(&documents[i]);
        position = documents[i].end;
    }
    position
}

/// Where a seeded permutation of 0..n sends `place`: a Feistel network over the next power of four,
/// walked until it lands below n. Unlike a shuffled list it needs no memory and no start-up, so
/// resuming in the middle of an epoch costs nothing.
fn shuffled(place: u64, n: u64, seed: u64, epoch: u32) -> u64 {
    let half = (u64::BITS - (n - 1).leading_zeros()).div_ceil(2);
    let mask = (1_u64 << half) - 1;
    let mut x = place;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..6 {
            let coordinates = [epoch, round, right as u32];
            let noise = u64::from(Philox::new(seed, coordinates).next_u32());
            (left, right) = (right, left ^ (noise & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;

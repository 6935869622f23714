//! Documents as training sequences: tokenising, packing into sequences of one length, and the
//! order in which they are visited (arXiv 2601.15892 §4.1). The order is a pure function of the
//! sequence's global index, so the state of a data loader is one integer.

use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use demask_engine::philox::Philox;
use serde::{Deserialize, Serialize};

use crate::data::Document;

/// Keep these streams apart from each other, and from others drawn under the same user seed.
const EOS: u64 = u64::from_le_bytes(*b"eos\0\0\0\0\0");
const SHUFFLE: u64 = u64::from_le_bytes(*b"shuffle\0");

/// Tokenises documents on `n_threads` threads. The result is in the order of the documents, and so
/// is the choice of the error to report.
pub fn tokenise(
    documents: &[&Document],
    n_threads: usize,
    encode: &(dyn Fn(&str) -> Result<Vec<u32>> + Sync),
) -> Result<Vec<Vec<u32>>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            // A queue instead of equal shares: the longest files would leave the others waiting.
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(document) = documents.get(i) else { return done };
            let ids = encode(&document.text);
            done.push((i, ids.with_context(|| format!("cannot tokenise {}", document.path))));
        }
    };
    let mut encoded: Vec<(usize, Result<Vec<u32>>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads.max(1)).map(|_| scope.spawn(work)).collect();
        let join = |worker: std::thread::ScopedJoinHandle<_>| match worker.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        workers.into_iter().flat_map(join).collect()
    });
    encoded.sort_by_key(|&(i, _)| i);
    encoded.into_iter().map(|(_, ids)| ids).collect()
}

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

/// Tokenised documents, end to end, cut into sequences of one length. A document may begin in one
/// sequence and go on in the next; an incomplete last sequence is left out.
#[derive(Clone, Debug)]
pub struct Packed {
    packing: Packing,
    /// [n_sequences · L]
    tokens: Vec<u32>,
    /// Where documents start in `tokens`, ascending, from 0.
    starts: Vec<usize>,
}

/// One training sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence<'a> {
    /// Token ids \[L].
    pub tokens: &'a [u32],
    /// \[L]: half-open range of the positions visible from each one; (0, L) under mutual
    /// visibility.
    pub spans: Vec<[u32; 2]>,
}

impl Packed {
    /// Packs tokenised documents in their order.
    #[track_caller]
    pub fn new(documents: &[Vec<u32>], packing: Packing) -> Result<Packed> {
        assert!(packing.length > 0, "pack: sequences of length 0");
        let alignment = match packing.visibility {
            Visibility::Mutual => 1,
            Visibility::Confined { alignment } => alignment,
        };
        assert!(
            alignment > 0 && packing.length.is_multiple_of(alignment),
            "pack: length {} is no multiple of the alignment {alignment}",
            packing.length
        );
        let mut tokens: Vec<u32> = Vec::new();
        let mut starts = Vec::new();
        for (i, document) in documents.iter().enumerate() {
            starts.push(tokens.len());
            tokens.extend(document);
            let n_eos = 1 + Philox::new(packing.seed ^ EOS, [i as u32, 0, 0]).below(4) as usize;
            tokens.resize((tokens.len() + n_eos).next_multiple_of(alignment), packing.eos);
        }
        let whole = tokens.len() - tokens.len() % packing.length;
        if whole == 0 {
            bail!(
                "{} documents make {} tokens, which fill no sequence of {}; add documents or \
                 shorten the sequences",
                documents.len(),
                tokens.len(),
                packing.length
            );
        }
        tokens.truncate(whole);
        Ok(Packed { packing, tokens, starts })
    }

    /// Sequences in one epoch.
    pub fn n_sequences(&self) -> u64 {
        (self.tokens.len() / self.packing.length) as u64
    }

    /// The `index`-th sequence of a run, any number of epochs long: each epoch visits every
    /// sequence once, in an order of its own.
    pub fn sequence(&self, index: u64) -> Sequence<'_> {
        let n = self.n_sequences();
        self.in_order(shuffled(index % n, n, self.packing.seed, (index / n) as u32))
    }

    /// Sequence `place` < `n_sequences` in the order of the documents, for evaluation.
    #[track_caller]
    pub fn in_order(&self, place: u64) -> Sequence<'_> {
        assert!(place < self.n_sequences(), "pack: sequence {place} of {}", self.n_sequences());
        let length = self.packing.length;
        let base = place as usize * length;
        let spans = match self.packing.visibility {
            Visibility::Mutual => vec![[0, length as u32]; length],
            Visibility::Confined { .. } => self.document_spans(base),
        };
        Sequence { tokens: &self.tokens[base..base + length], spans }
    }

    /// The documents of the sequence that starts at `base`, clipped to it, one span per position.
    fn document_spans(&self, base: usize) -> Vec<[u32; 2]> {
        let length = self.packing.length;
        let mut spans = Vec::with_capacity(length);
        let mut next = self.starts.partition_point(|&start| start <= base);
        while spans.len() < length {
            let end = self.starts.get(next).map_or(length, |start| length.min(start - base));
            spans.resize(end, [spans.len() as u32, end as u32]);
            next += 1;
        }
        spans
    }
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
            let noise = u64::from(Philox::new(seed ^ SHUFFLE, coordinates).next_u32());
            (left, right) = (right, left ^ (noise & mask));
        }
        x = left << half | right;
        if x < n {
            return x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS_ID: u32 = 0;

    /// Documents of 1, 2, … n tokens; document i consists of the token i + 10.
    fn documents(n: u32) -> Vec<Vec<u32>> {
        (0..n).map(|i| vec![i + 10; i as usize + 1]).collect()
    }

    fn packed(n: u32, length: usize, visibility: Visibility) -> Packed {
        Packed::new(&documents(n), Packing { length, eos: EOS_ID, visibility, seed: 3 }).unwrap()
    }

    #[test]
    fn one_to_four_ends_follow_each_document() {
        let packed = packed(400, 7, Visibility::Mutual);
        let mut seen = [0; 5];
        for run in packed.tokens.chunk_by(|a, b| (*a == EOS_ID) == (*b == EOS_ID)) {
            if run[0] == EOS_ID && run.as_ptr_range().end != packed.tokens.as_ptr_range().end {
                seen[run.len()] += 1;
            }
        }
        assert_eq!(seen[0], 0);
        assert!(seen[1..].iter().all(|&n| (70..130).contains(&n)), "{seen:?}");
        assert_eq!(packed.in_order(0).spans, [[0, 7]; 7]);
    }

    #[test]
    fn confined_documents_start_on_a_block_and_see_only_themselves() {
        let packed = packed(50, 16, Visibility::Confined { alignment: 4 });
        let mut documents_seen = 0;
        for place in 0..packed.n_sequences() {
            let Sequence { tokens, spans } = packed.in_order(place);
            for (i, &[start, end]) in spans.iter().enumerate() {
                assert!((start..end).contains(&(i as u32)) && start % 4 == 0 && end % 4 == 0);
                let document = &tokens[start as usize..end as usize];
                let text: Vec<u32> = document.iter().copied().filter(|&t| t != EOS_ID).collect();
                assert!(text.iter().all(|t| *t == text[0]), "two documents in one span");
                documents_seen += u32::from(i as u32 == start && !text.is_empty());
            }
        }
        assert!(documents_seen >= 49);
        let first = packed.in_order(0);
        assert_eq!(first.tokens[0], 10, "the first document is one token and its ends");
        assert!(first.tokens[1..first.spans[0][1] as usize].iter().all(|&t| t == EOS_ID));
    }

    #[test]
    fn an_epoch_visits_every_sequence_once_in_its_own_order() {
        let packed = packed(60, 5, Visibility::Mutual);
        let n = packed.n_sequences();
        let places = |epoch| (0..n).map(move |i| shuffled(i, n, 3, epoch)).collect::<Vec<_>>();
        let mut sorted = places(0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n).collect::<Vec<_>>());
        assert_ne!(places(0), places(1));
        assert_eq!(packed.sequence(n + 4), packed.in_order(places(1)[4]));
    }

    /// Each place comes first in about a tenth of the epochs: χ² with 9 degrees of freedom exceeds
    /// 27.9 for one seed in a thousand.
    #[test]
    fn the_order_is_uniform_even_for_few_sequences() {
        let mut first = [0_u32; 10];
        (0..10_000).for_each(|epoch| first[shuffled(0, 10, 5, epoch) as usize] += 1);
        let chi2: f64 = first.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi2 < 27.9, "{first:?}");
        assert_eq!(shuffled(0, 1, 5, 0), 0);
    }

    #[test]
    fn too_few_tokens_are_an_error_with_a_remedy() {
        let packing = Packing { length: 64, eos: 0, visibility: Visibility::Mutual, seed: 0 };
        let error = Packed::new(&documents(3), packing).unwrap_err().to_string();
        assert!(error.contains("shorten the sequences"), "{error}");
    }

    #[test]
    fn tokenising_keeps_the_order_and_names_the_first_failure() {
        let document = |i: usize| Document { path: format!("{i:03}.py"), text: "x".repeat(i) };
        let documents: Vec<Document> = (0..100).map(document).collect();
        let documents: Vec<&Document> = documents.iter().collect();
        let lengths = tokenise(&documents, 3, &|text| Ok(vec![text.len() as u32])).unwrap();
        assert!(lengths.iter().enumerate().all(|(i, ids)| *ids == [i as u32]));
        let picky = |text: &str| if text.len() > 40 { bail!("too long") } else { Ok(vec![]) };
        let error = format!("{:#}", tokenise(&documents, 3, &picky).unwrap_err());
        assert_eq!(error, "cannot tokenise 041.py: too long");
    }
}

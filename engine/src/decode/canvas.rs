//! The tokens of all sequences on the device. What a pass decides, which token an open position would get, how sure it
//! is, and which positions are committed, is decided by kernels and written where the next pass reads it; only a
//! record of four words a position comes back, whenever the host cares to wait for it.
//!
//! The rules are those of the sampler on the host (`sampler.rs`), whose draws have the same names: argmax of the
//! logits, or of logit + T · g with a Gumbel draw g per (seed, token, position, pass), which samples from
//! softmax(logits / T). So a sequence draws the same in any company.

use bytemuck::{Pod, Zeroable};

use super::Sampling;
use super::options::{MOST_STOPS, Order};
use crate::Result;
use crate::gpu::{Gpu, Kernel, ReadBack, kernel};
use crate::ops::Lanes;
use crate::tensor::{DType, Tensor};

const CHOOSE: Kernel = kernel!("choose");
const LIMIT: Kernel = kernel!("limit");
const COMMIT: Kernel = kernel!("commit");
const SLOT_TOKENS: Kernel = kernel!("slot_tokens");

/// Columns of the vocabulary that one workgroup looks through.
const SEGMENT: usize = 2048;
/// Lanes of a workgroup. Few, because each barrier costs a software adapter in proportion.
const LANES: (&str, u32) = ("WG", 64);
/// Words of a segment's offer, of a record and of a sequence's state.
const OFFER: usize = 8;
const RECORD: usize = 4;
const STATE: usize = 4;
/// A temperature above this drowns every logit just the same, and does not overflow.
const HOTTEST: f32 = 1e30;

/// The tokens of the slots of a cache, and what sequences keep beside it.
pub struct Canvas {
    /// u32 [slots].
    tokens: Tensor,
    /// u32 [sequences, 4]: passes done; 1 until the answer ended; 1 while the rows of the last pass want another one.
    state: Tensor,
    /// u32 [sequences, 16 + 2 words]: stop tokens, then a bit a token for the forbidden ones and for those in the text.
    marks: Tensor,
    vocab_size: usize,
}

/// When a pass that is recorded ahead is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Wanted {
    /// Unless the answer has ended.
    WhileGoing,
    /// Unless the answer has ended or the rows of the last pass are full.
    WhileOpen,
}

/// How many of the open positions a pass commits; the one of the highest priority in any case.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quota {
    /// This many of the highest priority.
    Best(usize),
    /// All whose priority is at least this.
    AtLeast(f32),
    /// The r-th if its priority is at least 1 − f / (r + 1), counted from 1.
    Factor(f32),
    /// The first ones as long as their entropies sum to at most this; the priority must be [`Order::Entropy`].
    EntropyBound(f32),
}

/// A row of logits and the position that it decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Slot of the position's token.
    pub slot: usize,
    /// The position.
    pub position: usize,
}

/// How some rows that lie side by side, of one sequence, are decided.
#[derive(Clone, Debug)]
pub struct Decider<'a> {
    /// The sequence's number on the canvas.
    pub sequence: usize,
    /// How many rows. They should be all of a block that were open when its first pass began: once they hold a stop
    /// token and nothing open before it, later passes do nothing.
    pub rows: usize,
    /// The token that an open position holds, which is never chosen. It need not be one of the vocabulary.
    pub hole: u32,
    /// How a token is drawn.
    pub sampling: &'a Sampling,
    /// What makes a position come before others.
    pub order: Order,
    /// How many are committed.
    pub quota: Quota,
    /// How many stop tokens the sequence has.
    pub stops: usize,
}

/// What a pass is to decide, on the device.
pub struct Question {
    lanes: Tensor,
    places: Tensor,
    limits: Tensor,
    /// Whether some row is drawn among a part of the vocabulary.
    cuts: bool,
    rows: Vec<Row>,
    parts: Vec<usize>,
}

/// What a pass did about a position that was open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Proposal {
    /// The position.
    pub position: usize,
    /// Its likeliest or drawn token.
    pub token: u32,
    /// The token's probability under the raw logits.
    pub confidence: f32,
    /// True if the position got the token for good.
    pub committed: bool,
}

/// What a pass did for the rows of one [`Decider`].
#[derive(Clone, Debug, PartialEq)]
pub enum Decided {
    /// Those that were open.
    Proposals(Vec<Proposal>),
    /// Nothing: at this position the logits are not finite.
    NotFinite(usize),
}

/// The record of a pass, on its way to the host.
pub struct Outcome {
    read: ReadBack,
    rows: Vec<Row>,
    parts: Vec<usize>,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Record {
    first: u32,
    rows: u32,
    sequence: u32,
    hole: u32,
    key: [u32; 2],
    stops: u32,
    forbids: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    penalty: f32,
    order: u32,
    rule: u32,
    most: u32,
    bound: f32,
}

impl Canvas {
    /// Room for so many slots and sequences.
    pub fn new(gpu: &Gpu, slots: usize, sequences: usize, vocab_size: usize) -> Canvas {
        let words = MOST_STOPS + 2 * vocab_size.div_ceil(32);
        Canvas {
            tokens: Tensor::zeros(gpu, [slots], DType::U32, "canvas"),
            state: Tensor::zeros(gpu, [sequences, STATE], DType::U32, "canvas"),
            marks: Tensor::zeros(gpu, [sequences, words], DType::U32, "canvas"),
            vocab_size,
        }
    }

    /// Begins a sequence under a number: `text` is what its penalty counts as seen.
    ///
    /// # Panics
    /// If there are more than 16 stop tokens.
    pub fn begin(&self, sequence: usize, stops: &[u32], sampling: &Sampling, text: &[u32]) {
        assert!(stops.len() <= MOST_STOPS, "{} stop tokens", stops.len());
        let mut marks = vec![0u32; MOST_STOPS];
        marks[..stops.len()].copy_from_slice(stops);
        for ids in [&sampling.forbidden[..], text] {
            let mut bits = vec![0u32; self.vocab_size.div_ceil(32)];
            for &id in ids.iter().filter(|&&id| (id as usize) < self.vocab_size) {
                bits[id as usize / 32] |= 1 << (id % 32);
            }
            marks.extend(bits);
        }
        let gpu = self.tokens.gpu();
        let at = (4 * sequence * marks.len()) as u64;
        gpu.write(self.marks.buffer(), at, bytemuck::cast_slice(&marks));
        let state = [0u32, 1, 0, 0];
        gpu.write(self.state.buffer(), (4 * STATE * sequence) as u64, bytemuck::cast_slice(&state));
    }

    /// Writes tokens into slots from `slot` on.
    pub fn write(&self, slot: usize, tokens: &[u32]) {
        let gpu = self.tokens.gpu();
        gpu.write(self.tokens.buffer(), 4 * slot as u64, bytemuck::cast_slice(tokens));
    }

    /// The tokens of a pass: u32 [R].
    pub fn tokens(&self, lanes: &Lanes) -> Tensor {
        let rows = lanes.places().shape()[0];
        let y = Tensor::empty(self.tokens.gpu(), [rows], DType::U32, "slot_tokens");
        let grid = [rows.div_ceil(64) as u32, 1, 1];
        SLOT_TOKENS.run(&[rows as u32], &[&self.tokens, lanes.places()], &[&y], grid);
        y
    }

    /// What the slots hold, from the device.
    pub fn read(&self) -> Result<Vec<u32>> {
        self.tokens.to_vec_u32()
    }

    /// Records a pass that the device skips where it is not wanted by this sequence any more.
    pub(super) fn pass_if<R>(
        &self,
        sequence: usize,
        wanted: Wanted,
        pass: impl FnOnce() -> R,
    ) -> R {
        let word = match wanted {
            Wanted::WhileGoing => 1,
            Wanted::WhileOpen => 2,
        };
        self.tokens.gpu().only_if(self.state.buffer(), STATE * sequence + word, pass)
    }

    /// Uploads what a pass is to decide. Before the pass is recorded, because a host write submits what was recorded.
    ///
    /// # Panics
    /// If the deciders have other rows, or a slot or sequence is not on the canvas.
    pub fn ask(&self, rows: Vec<Row>, deciders: &[Decider<'_>]) -> Question {
        let gpu = self.tokens.gpu();
        let (n, told) = (rows.len(), deciders.iter().map(|d| d.rows).sum::<usize>());
        assert_eq!(told, n, "rows of the sequences");
        let (mut places, mut lanes): (Vec<u32>, Vec<Record>) = (Vec::new(), Vec::new());
        for (i, decider) in deciders.iter().enumerate() {
            let first = places.len() / 4;
            assert!(decider.sequence < self.state.shape()[0], "sequence {}", decider.sequence);
            lanes.push(decider.record(first));
            for row in &rows[first..first + decider.rows] {
                assert!(row.slot < self.tokens.numel(), "slot {}", row.slot);
                places.extend([row.slot as u32, row.position as u32, i as u32, 0]);
            }
        }
        let words: &[u32] = bytemuck::cast_slice(&lanes);
        let cuts = |s: &Sampling| s.temperature > 0.0 && (s.top_k.is_some() || s.top_p.is_some());
        Question {
            lanes: Tensor::from_u32(gpu, words, [lanes.len(), size_of::<Record>() / 4]),
            places: Tensor::from_u32(gpu, &places, [n, 4]),
            limits: Tensor::from_f32(gpu, &vec![f32::MIN; n], [n]),
            cuts: deciders.iter().any(|d| cuts(d.sampling)),
            parts: deciders.iter().map(|d| d.rows).collect(),
            rows,
        }
    }

    /// Records a choice for each row whose position is open, and the commit of some of them. `logits` are [R, V].
    ///
    /// # Panics
    /// If the logits have another shape.
    pub fn decide(&self, logits: &Tensor, question: Question) -> Outcome {
        let gpu = self.tokens.gpu();
        let Question { lanes, places, limits, cuts, rows, parts } = question;
        let n = rows.len();
        assert!(**logits.shape() == [n, self.vocab_size], "{} for {n} rows", logits.shape());
        let (columns, words) = (self.vocab_size as u32, self.vocab_size.div_ceil(32) as u32);
        if cuts {
            let reads = [logits, &places, &lanes, &self.marks];
            LIMIT.with(&[LANES]).run(&[columns, words], &reads, &[&limits], [n as u32, 1, 1]);
        }
        let segments = self.vocab_size.div_ceil(SEGMENT);
        let offers = Tensor::empty(gpu, [n, segments, OFFER], DType::U32, "choose");
        let reads = [logits, &self.tokens, &places, &lanes, &self.state, &self.marks, &limits];
        let grid = [segments as u32, n as u32, 1];
        CHOOSE.with(&[LANES]).run(&[columns, segments as u32, words], &reads, &[&offers], grid);
        let records = Tensor::empty(gpu, [n, RECORD], DType::U32, "commit");
        let writes = [&self.tokens, &self.state, &self.marks, &records];
        let grid = [parts.len() as u32, 1, 1];
        let reads = [&offers, &places, &lanes];
        COMMIT.with(&[LANES]).run(&[segments as u32, words], &reads, &writes, grid);
        let read = gpu.read_later(records.buffer(), 0, (4 * RECORD * n) as u64);
        Outcome { read, rows, parts }
    }
}

impl Decider<'_> {
    fn record(&self, first: usize) -> Record {
        let Sampling { temperature, seed, top_k, top_p, repetition_penalty, .. } = *self.sampling;
        let (rule, most, bound) = match self.quota {
            Quota::Best(n) => (0, n.clamp(1, 1 << 30), 0.0),
            Quota::AtLeast(least) => (1, 0, least.clamp(-1e30, 1e30)),
            Quota::Factor(factor) => (2, 0, factor.clamp(-1e30, 1e30)),
            Quota::EntropyBound(most) => (3, 0, most.clamp(-1e30, 1e30)),
        };
        Record {
            first: first as u32,
            rows: self.rows as u32,
            sequence: self.sequence as u32,
            hole: self.hole,
            key: [seed as u32, (seed >> 32) as u32],
            stops: self.stops as u32,
            forbids: u32::from(!self.sampling.forbidden.is_empty()),
            temperature: temperature.min(HOTTEST),
            top_k: top_k.unwrap_or(0).min(1 << 30) as u32,
            top_p: top_p.unwrap_or(1.0),
            penalty: repetition_penalty,
            order: self.order as u32,
            rule,
            most: most as u32,
            bound,
        }
    }
}

impl Outcome {
    /// Waits for the pass, and for no later one: what it did, for each decider.
    ///
    /// # Errors
    /// A device fault.
    pub fn wait(self) -> Result<Vec<Decided>> {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(&self.read.wait()?);
        let mut all = self.rows.iter().zip(words.chunks_exact(RECORD));
        let decided = self.parts.iter().map(|&rows| {
            let mut proposals = Vec::new();
            let mut broken = None;
            for (row, record) in all.by_ref().take(rows) {
                let (position, token) = (row.position, record[0]);
                let confidence = f32::from_bits(record[1]);
                match record[3] {
                    2 => broken = broken.or(Some(position)),
                    3 => {}
                    status => {
                        let committed = status == 1;
                        proposals.push(Proposal { position, token, confidence, committed });
                    }
                }
            }
            broken.map_or(Decided::Proposals(proposals), Decided::NotFinite)
        });
        Ok(decided.collect())
    }
}

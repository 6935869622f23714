//! Many sequences on one model: each forward pass runs whatever rows its sequences need next, of any lengths and modes
//! together, over one cache. Sequences come and go between passes; those that begin alike share what the cache has of
//! their prompts. What a sequence gets depends on its request alone, not on its company: its random draws have names
//! of their own, and kernels are chosen as for a fixed number of rows.
//!
//! A pass decides on the device (`canvas.rs`), so with a single sequence the passes of a block, and of the next one,
//! can be recorded before their outcomes are known: up to `look_ahead` of them. The host replays them in order.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use super::canvas::{Canvas, Decided, Decider, Outcome, Quota, Row, Wanted};
use super::options::{DecodeOptions, Mode, Order, Request, Schedule};
use super::pool::{Pool, Prefix};
use super::sequence::{Next, Sequence, Work};
use super::{Answer, Counters, Event, FinishReason, PREFILL_ROWS};
use crate::gpu::Gpu;
use crate::model::{KvCache, Llama};
use crate::ops::{self, Lane, Lanes};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// Stands for a token that is not chosen yet where none is reserved for it; no vocabulary has it.
const OPEN: u32 = u32::MAX;
/// Rows that a sequence's pass usually has at most: two blocks of the published length, and some.
const USUAL_ROWS: usize = 16;

/// What a decoder has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Tokens in the cache, of all sequences together and of the prompts that are kept.
    pub tokens: usize,
    /// Sequences at a time; more of them wait.
    pub sequences: usize,
}

/// Names a request of one decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(u64);

/// See the module's page.
pub struct Decoder<'a> {
    llama: &'a Llama,
    room: Room,
    cache: KvCache,
    canvas: Canvas,
    pool: Pool,
    waiting: VecDeque<(Id, Request)>,
    active: BTreeMap<Id, Active>,
    ended: BTreeMap<Id, Answer>,
    /// Numbers on the canvas that no active sequence has.
    numbers: Vec<usize>,
    /// Passes recorded whose outcomes were not replayed, oldest first.
    recorded: VecDeque<Recorded>,
    /// How many passes may be recorded at a time.
    look_ahead: Option<usize>,
    next: u64,
    /// The last pass only read a prompt.
    read_last: bool,
    /// Prompt tokens that were found in the cache.
    reused: usize,
}

struct Active {
    sequence: Sequence,
    options: DecodeOptions,
    number: usize,
    /// The prefix that it shares, and how many of its tokens.
    prefix: Option<(Rc<Prefix>, usize)>,
    /// Slots of the tokens behind.
    own: Range<usize>,
    /// Whole blocks of the prompt have been read.
    prompt_read: bool,
    /// Planned, and not recorded yet.
    planned: Option<Work>,
}

struct Recorded {
    /// Whose rows were decided, and the start of the block.
    parts: Vec<(Id, usize)>,
    outcome: Outcome,
}

impl<'a> Decoder<'a> {
    /// Takes the device's memory for the cache: 2 · layers · G · H elements a token.
    pub fn new(llama: &'a Llama, room: Room) -> Decoder<'a> {
        let (gpu, config) = (llama.gpu(), llama.config());
        let (tokens, sequences) = (room.tokens.max(1), room.sequences.max(1));
        Decoder {
            llama,
            room: Room { tokens, sequences },
            cache: llama.cache(tokens),
            canvas: Canvas::new(gpu, tokens, sequences, config.vocab_size),
            pool: Pool::new(tokens),
            waiting: VecDeque::new(),
            active: BTreeMap::new(),
            ended: BTreeMap::new(),
            numbers: (0..sequences).rev().collect(),
            recorded: VecDeque::new(),
            look_ahead: None,
            next: 0,
            read_last: false,
            reused: 0,
        }
    }

    /// Room for one request and nothing else.
    pub fn for_one(llama: &'a Llama, request: &Request) -> Decoder<'a> {
        Decoder::new(llama, Room { tokens: request.tokens.len(), sequences: 1 })
    }

    /// Lets up to `passes` (at least 1) be recorded before the outcome of the first of them is known, while there is
    /// one sequence. The answer and the events are the same; only time differs. See [`look_ahead`] for the default.
    pub fn with_look_ahead(mut self, passes: usize) -> Self {
        self.look_ahead = Some(passes.max(1));
        self
    }

    /// Puts a request into the line; nothing runs yet.
    ///
    /// # Errors
    /// [`Error::Request`] if it fits neither the model nor the cache.
    pub fn submit(&mut self, request: Request) -> Result<Id> {
        request.check(self.llama.config())?;
        if request.tokens.len() > self.room.tokens {
            return Err(Error::Request(format!(
                "a prompt and an answer of {} tokens do not fit the cache of {}; ask for fewer, or give it more room",
                request.tokens.len(),
                self.room.tokens
            )));
        }
        let id = Id(self.next);
        self.next += 1;
        self.waiting.push_back((id, request));
        Ok(id)
    }

    /// True if nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.active.is_empty()
    }

    /// What was done so far for a request that is at work, or ended and was not taken.
    pub fn counters(&self, id: Id) -> Option<Counters> {
        let active = self.active.get(&id).map(|active| active.sequence.counters());
        active.or_else(|| self.ended.get(&id).map(|answer| answer.counters))
    }

    /// Prompt tokens that did not have to be read because the cache had them.
    pub fn reused(&self) -> usize {
        self.reused
    }

    /// What a request came to; ends it where it is still at work. `None` for one that is not known, or was taken.
    pub fn take(&mut self, id: Id) -> Option<Answer> {
        if let Some(active) = self.active.remove(&id) {
            let answer = active.answer(FinishReason::Interrupted);
            self.release(active);
            return Some(answer);
        }
        if let Some(at) = self.waiting.iter().position(|(waiting, _)| *waiting == id) {
            let (_, request) = self.waiting.remove(at)?;
            return Some(Sequence::new(&request, 0).end(FinishReason::Interrupted));
        }
        self.ended.remove(&id)
    }

    /// Waits for the next pass and appends what it did, having recorded passes behind it as far as the decoder looks
    /// ahead. Does nothing when idle.
    ///
    /// # Errors
    /// A device fault; the decoder cannot go on after it.
    pub fn advance(&mut self, events: &mut Vec<(Id, Event)>) -> Result<()> {
        self.admit(events);
        let ready = self.active.values().any(|active| active.prompt_read);
        if !(self.read_last && ready) && self.read_prompt(events)? {
            self.read_last = true;
            return Ok(());
        }
        self.read_last = false;
        while self.recorded.len() < self.ahead() && self.record() {}
        let Some(Recorded { parts, outcome }) = self.recorded.pop_front() else { return Ok(()) };
        for ((id, block), decided) in parts.into_iter().zip(outcome.wait()?) {
            self.replay(id, block, decided, events);
        }
        Ok(())
    }

    /// How many passes may be recorded now.
    fn ahead(&self) -> usize {
        let mut all = self.active.values();
        let (Some(only), None) = (all.next(), all.next()) else { return 1 };
        let surplus = match &only.options.mode {
            Mode::Block(block) => !matches!(block.schedule, Schedule::Fixed { .. }),
            Mode::Autoregressive => false,
        };
        self.look_ahead.unwrap_or_else(|| look_ahead(self.llama.gpu(), surplus))
    }

    /// Begins what waits while there is room. While one sequence reads its prompt no other begins, which may then
    /// find its own prompt read.
    fn admit(&mut self, events: &mut Vec<(Id, Event)>) {
        while self.active.values().all(|active| active.prompt_read) {
            let Some((id, request)) = self.waiting.pop_front() else { return };
            let Some(mut active) = self.begin(&request) else {
                return self.waiting.push_front((id, request));
            };
            if active.sequence.is_full() {
                // Nothing is open.
                let mut own = Vec::new();
                active.sequence.finish(FinishReason::Length, &mut own);
                events.extend(own.into_iter().map(|event| (id, event)));
                self.ended.insert(id, active.answer(FinishReason::Length));
                self.release(active);
                continue;
            }
            self.active.insert(id, active);
        }
    }

    fn begin(&mut self, request: &Request) -> Option<Active> {
        let fresh = Sequence::new(request, 0);
        let number = *self.numbers.last()?;
        let block = fresh.attended_block();
        let prompt = &request.tokens[..fresh.prompt()];
        let mut prefix = match self.is_steady(fresh.given()) {
            true => self.pool.find(prompt, block, fresh.granularity()),
            false => None,
        };
        let total = request.tokens.len();
        let shared = |prefix: &Option<(Rc<Prefix>, usize)>| prefix.as_ref().map_or(0, |p| p.1);
        let mut own = self.pool.take(total - shared(&prefix));
        if own.is_none() && self.active.is_empty() {
            // The prefix itself is in the way.
            prefix = None;
            own = self.pool.take(total);
        }
        let (own, shared) = (own?, shared(&prefix));
        self.numbers.pop();
        self.reused += shared;
        let options = request.options.clone();
        let hole = options.hole();
        let tokens = request.tokens.iter().zip(&request.open);
        let tokens: Vec<u32> = tokens.map(|(&t, &open)| if open { hole } else { t }).collect();
        self.canvas.write(own.start, &tokens[shared..]);
        self.canvas.begin(number, &options.eos_ids, &options.sampling, &tokens);
        let sequence = if shared == 0 { fresh } else { Sequence::new(request, shared) };
        Some(Active { sequence, options, number, prefix, own, prompt_read: false, planned: None })
    }

    /// Reads the next piece of a prompt that is not read yet. False if there is none.
    fn read_prompt(&mut self, events: &mut Vec<(Id, Event)>) -> Result<bool> {
        let Some((&id, _)) = self.active.iter().find(|(_, active)| !active.prompt_read) else {
            return Ok(false);
        };
        let active = self.active.get_mut(&id).expect("it was found");
        match active.sequence.next() {
            Next::Read(rows) => {
                let lane = active.lane(0, &rows);
                let mut own = Vec::new();
                active.sequence.read(&rows, &mut own);
                events.extend(own.into_iter().map(|event| (id, event)));
                self.run(&[lane]);
                // Nothing is read back, but a caller who breaks off should not wait for the whole prompt.
                self.llama.gpu().sync()?;
                Ok(true)
            }
            Next::Decide(work) => {
                (active.prompt_read, active.planned) = (true, Some(work));
                self.keep_prompt(id);
                Ok(false)
            }
            Next::Nothing => unreachable!("a sequence with open positions has a pass"),
        }
    }

    /// Whether the keys of a text of so many tokens are those that other texts with the same beginning have: not so
    /// where rotary frequencies depend on a text's length.
    fn is_steady(&self, tokens: usize) -> bool {
        tokens <= self.llama.config().steady_length()
    }

    /// Lets others share the prompt of a sequence that has just read it.
    fn keep_prompt(&mut self, id: Id) {
        let active = &self.active[&id];
        let n = active.sequence.prompt();
        let given = active.sequence.given();
        if active.prefix.is_some() || n == 0 || self.room.sequences == 1 || !self.is_steady(given) {
            return;
        }
        let active = self.active.get_mut(&id).expect("an active sequence");
        let prefix = self.pool.keep(Prefix {
            slots: active.own.start..active.own.start + n,
            tokens: active.sequence.tokens()[..n].to_vec(),
            block: active.sequence.attended_block(),
        });
        active.prefix = Some((prefix, n));
        active.own.start += n;
    }

    /// Records one more pass over what all sequences that have read their prompts want next. False if that is
    /// nothing.
    fn record(&mut self) -> bool {
        let mut wanted: Vec<(Id, Work)> = Vec::new();
        let ready = self.active.iter().filter(|(_, active)| active.prompt_read);
        let ids: Vec<Id> = ready.map(|(id, _)| *id).collect();
        for id in ids {
            loop {
                let active = self.active.get_mut(&id).expect("an active sequence");
                match active.planned.take().map_or_else(|| active.sequence.next(), Next::Decide) {
                    Next::Nothing => break,
                    Next::Decide(work) => {
                        wanted.push((id, work));
                        break;
                    }
                    Next::Read(rows) => {
                        let lane = active.lane(0, &rows);
                        self.run(&[lane]);
                    }
                }
            }
        }
        if wanted.is_empty() {
            return false;
        }
        let (mut lanes, mut rows, mut picked) = (Vec::new(), Vec::new(), Vec::new());
        let mut deciders = Vec::new();
        let mut row = 0;
        for (id, work) in &wanted {
            let active = &self.active[id];
            let lane = active.lane(row, &work.rows);
            let shift = usize::from(active.options.mode == Mode::Autoregressive);
            picked.extend(work.decide.iter().map(|at| (row + at - shift - work.rows.start) as u32));
            rows.extend(work.decide.iter().map(|&at| Row { slot: lane.slot_of(at), position: at }));
            deciders.push(active.decider(work));
            row += lane.rows;
            lanes.push(lane);
        }
        let gpu = self.llama.gpu().clone();
        let question = self.canvas.ask(rows, &deciders);
        let all = picked.len() == row;
        let picked = Tensor::from_u32(&gpu, &picked, [picked.len()]);
        let lanes = Lanes::new(&gpu, &lanes);
        let gate = match (self.recorded.is_empty(), &wanted[..]) {
            (false, [(id, work)]) if work.first => {
                Some((self.active[id].number, Wanted::WhileGoing))
            }
            (false, [(id, _)]) => Some((self.active[id].number, Wanted::WhileOpen)),
            _ => None,
        };
        let (llama, canvas, cache) = (self.llama, &self.canvas, &mut self.cache);
        let class = (self.room.sequences > 1).then_some(USUAL_ROWS);
        let pass = || {
            gpu.as_for_rows(class, || {
                let hidden = llama.pass(&canvas.tokens(&lanes), &lanes, cache);
                let hidden = if all { hidden } else { ops::gather(&hidden, &picked) };
                canvas.decide(&llama.logits(&hidden), question)
            })
        };
        let outcome = match gate {
            None => pass(),
            Some((number, wanted)) => canvas.pass_if(number, wanted, pass),
        };
        let parts = wanted.iter().map(|(id, work)| (*id, work.block)).collect();
        self.recorded.push_back(Recorded { parts, outcome });
        true
    }

    /// Runs rows of one sequence that nothing is decided about.
    fn run(&mut self, lanes: &[Lane]) {
        let lanes = Lanes::new(self.llama.gpu(), lanes).of_many_rows();
        let class = (self.room.sequences > 1).then_some(PREFILL_ROWS);
        let (llama, canvas, cache) = (self.llama, &self.canvas, &mut self.cache);
        llama.gpu().as_for_rows(class, || llama.pass(&canvas.tokens(&lanes), &lanes, cache));
    }

    /// Tells a sequence what was decided about a block of it, if that is not full already.
    fn replay(&mut self, id: Id, block: usize, decided: Decided, events: &mut Vec<(Id, Event)>) {
        let Some(active) = self.active.get_mut(&id) else { return };
        if active.sequence.block() != block {
            return;
        }
        let mut own = Vec::new();
        match decided {
            Decided::Proposals(proposals) => active.sequence.replay(&proposals, &mut own),
            Decided::NotFinite(at) => active.sequence.finish(FinishReason::NotFinite(at), &mut own),
        }
        events.extend(own.into_iter().map(|event| (id, event)));
        if let Some(reason) = active.sequence.finished() {
            let active = self.active.remove(&id).expect("it is active");
            self.ended.insert(id, active.answer(reason));
            self.release(active);
        }
    }

    /// Takes back what a sequence had. What is final of it stays in the cache for sequences to come.
    fn release(&mut self, active: Active) {
        let Active { sequence, number, prefix, own, .. } = active;
        self.numbers.push(number);
        let shared = prefix.as_ref().map_or(0, |p| p.1);
        let n = sequence.last_final() / sequence.granularity() * sequence.granularity();
        let steady = self.is_steady(sequence.tokens().len());
        if self.room.sequences == 1 || n <= shared || !steady {
            return self.pool.give(own);
        }
        let (tokens, block) = (sequence.tokens()[..n].to_vec(), sequence.attended_block());
        let (used, rest) = (own.start..own.start + n - shared, own.start + n - shared..own.end);
        self.pool.give(rest);
        let Some((prefix, _)) = prefix else {
            self.pool.keep(Prefix { slots: used, tokens, block });
            return;
        };
        // A prefix is one run of slots: the one that was shared grows, if it lies right before and no one else has it.
        let before = prefix.slots.start..prefix.slots.start + shared;
        let grows = prefix.slots.end == used.start && before.end == used.start;
        drop(prefix);
        if grows && self.pool.forget(before.start) {
            self.pool.keep(Prefix { slots: before.start..used.end, tokens, block });
            return;
        }
        if let Some(slots) = self.pool.take_free(n) {
            self.cache.copy(before.clone(), slots.start);
            self.cache.copy(used.clone(), slots.start + before.len());
            self.pool.keep(Prefix { slots, tokens, block });
        }
        self.pool.give(used);
    }
}

impl Active {
    fn lane(&self, row: usize, rows: &Range<usize>) -> Lane {
        Lane {
            row,
            rows: rows.len(),
            position: rows.start,
            block: self.sequence.attended_block(),
            prefix: self.prefix.as_ref().map_or((0, 0), |(p, n)| (p.slots.start, *n)),
            slot: self.own.start,
            // A prompt is read as one text, whatever pieces it is read in; behind it the text grows pass by pass.
            length: rows.end.max(self.sequence.given()),
        }
    }

    fn decider(&self, work: &Work) -> Decider<'_> {
        let order = match (&self.options.mode, work.quota) {
            (_, Quota::EntropyBound(_)) => Order::Entropy,
            (Mode::Block(block), _) => block.order,
            (Mode::Autoregressive, _) => Order::Confidence,
        };
        Decider {
            sequence: self.number,
            rows: work.decide.len(),
            hole: self.options.hole(),
            sampling: &self.options.sampling,
            order,
            quota: work.quota,
            stops: self.options.eos_ids.len(),
        }
    }

    fn answer(&self, reason: FinishReason) -> Answer {
        self.sequence.end(reason)
    }
}

impl DecodeOptions {
    /// The token that stands for an open position.
    fn hole(&self) -> u32 {
        match &self.mode {
            Mode::Block(block) => block.mask_id,
            Mode::Autoregressive => OPEN,
        }
    }
}

/// How many passes are recorded before the first of them is waited for, unless told otherwise. With two, a GPU
/// finds its next pass while the host still waits for this one, and never idles. Where `surplus` says that the next
/// pass may turn out to be one too many, the device must be able to skip it. A software adapter computes on the
/// host's own cores: there is no idle time to fill, and deciding what to skip takes time of its own.
pub fn look_ahead(gpu: &Gpu, surplus: bool) -> usize {
    if gpu.adapter().is_software() || (surplus && !gpu.can_skip()) { 1 } else { 2 }
}

/// Names what went wrong.
pub(super) fn not_finite(position: usize) -> Error {
    Error::Request(format!(
        "the model gave no finite logits at position {position}; its weights are damaged, or their \
         precision is too low for it"
    ))
}

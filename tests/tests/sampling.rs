//! Choosing and committing on the device against the sampler on the host, and what looking ahead must not change.

use demask_engine::decode::{
    Answer, BlockOptions, Canvas, Choice, Decided, Decider, DecodeOptions, Decoder, Event, Mode,
    Order, Proposal, Quota, Request, Row, Sampler, Sampling, Schedule,
};
use demask_engine::gpu::{Gpu, Kernel};
use demask_engine::model::{Llama, Precision};
use demask_engine::philox::{Philox, philox4x32};
use demask_engine::tensor::{DType, Tensor};
use demask_tests::{checked_gpu, golden, gpu};

const WORDS: &str = "
#import philox
struct Params { low: u32, high: u32, n: u32 }
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> counters: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> words: array<vec4<u32>>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < p.n {
        words[id.x] = philox(counters[id.x], vec2<u32>(p.low, p.high));
    }
}
";

#[test]
fn random_words_are_those_of_the_host() {
    let Some(gpu) = checked_gpu() else { return };
    let mut random = Philox::new(8, [0; 3]);
    for key in [[0, 0], [u32::MAX; 2], [random.next_u32(), random.next_u32()]] {
        let mut counters = vec![[0; 4], [u32::MAX; 4], [0xffff, 0x10000, 0xffff_0000, 1]];
        counters.resize_with(500, || [(); 4].map(|()| random.next_u32()));
        let n = counters.len();
        let input = Tensor::from_u32(&gpu, counters.as_flattened(), [n, 4]);
        let output = Tensor::empty(&gpu, [n, 4], DType::U32, "words");
        let grid = [n.div_ceil(64) as u32, 1, 1];
        let params = [key[0], key[1], n as u32];
        Kernel::new("words", WORDS).run(&params, &[&input], &[&output], grid);
        let want: Vec<u32> = counters.iter().flat_map(|&c| philox4x32(c, key)).collect();
        assert_eq!(output.to_vec_u32().expect("the device works"), want);
    }
}

/// One pass over `logits` (rows of V), all rows open from `start` on.
struct Pass {
    logits: Vec<Vec<f32>>,
    start: usize,
    hole: u32,
    sampling: Sampling,
    text: Vec<u32>,
    stops: Vec<u32>,
    quota: Quota,
    order: Order,
}

impl Pass {
    fn new(logits: Vec<Vec<f32>>) -> Pass {
        Pass {
            logits,
            start: 3,
            hole: u32::MAX,
            sampling: Sampling::greedy(),
            text: vec![],
            stops: vec![],
            quota: Quota::Best(usize::MAX >> 33),
            order: Order::Confidence,
        }
    }

    fn canvas(&self, gpu: &Gpu) -> Canvas {
        let rows = self.logits.len();
        let canvas = Canvas::new(gpu, self.start + rows, 2, self.logits[0].len());
        canvas.write(0, &vec![1; self.start]);
        canvas.write(self.start, &vec![self.hole; rows]);
        canvas.begin(1, &self.stops, &self.sampling, &self.text);
        canvas
    }

    fn decider(&self) -> Decider<'_> {
        Decider {
            sequence: 1,
            rows: self.logits.len(),
            hole: self.hole,
            sampling: &self.sampling,
            order: self.order,
            quota: self.quota,
            stops: self.stops.len(),
        }
    }

    fn run_on(&self, gpu: &Gpu, canvas: &Canvas) -> Decided {
        let [rows, v] = [self.logits.len(), self.logits[0].len()];
        let logits = Tensor::from_f32(gpu, &self.logits.concat(), [rows, v]);
        let places = (self.start..self.start + rows).map(|at| Row { slot: at, position: at });
        let question = canvas.ask(places.collect(), &[self.decider()]);
        let mut all = canvas.decide(&logits, question).wait().expect("the device works");
        all.pop().expect("one decider")
    }

    fn proposals_on(&self, gpu: &Gpu, canvas: &Canvas) -> Vec<Proposal> {
        match self.run_on(gpu, canvas) {
            Decided::Proposals(proposals) => proposals,
            Decided::NotFinite(at) => panic!("no finite logits at {at}"),
        }
    }

    fn run(&self, gpu: &Gpu) -> Vec<Proposal> {
        self.proposals_on(gpu, &self.canvas(gpu))
    }

    /// The same on the host: token, confidence and whether it is committed, of each row.
    fn on_host(&self, pass: usize) -> Vec<(u32, f32, bool)> {
        let hole = Some(self.hole);
        let sampler = Sampler { sampling: self.sampling.clone(), hole, text: self.text.clone() };
        let rows = self.logits.iter().enumerate();
        let mut all: Vec<(usize, Choice, f32)> = rows
            .map(|(i, row)| {
                let choice = sampler.choose(row, self.start + i, pass).expect("finite logits");
                let priority = match self.order {
                    Order::Confidence => choice.confidence,
                    Order::Margin => choice.margin,
                    Order::Entropy => -choice.entropy,
                    Order::Random => sampler.order(self.start + i, pass),
                };
                (i, choice, priority)
            })
            .collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        let mut entropies = 0.0;
        let chosen = |(rank, (_, choice, priority)): (usize, &(usize, Choice, f32))| {
            entropies += choice.entropy;
            rank == 0
                || match self.quota {
                    Quota::Best(n) => rank < n,
                    Quota::AtLeast(t) => *priority >= t,
                    Quota::Factor(f) => *priority >= 1.0 - f / (rank + 2) as f32,
                    Quota::EntropyBound(most) => entropies <= most,
                }
        };
        let chosen: Vec<bool> = all.iter().enumerate().map(chosen).collect();
        let told = |((i, c, _), chosen): (&(usize, Choice, f32), bool)| {
            (*i, (c.token, c.confidence, chosen))
        };
        let mut rows: Vec<_> = all.iter().zip(chosen).map(told).collect();
        rows.sort_by_key(|r| r.0);
        rows.into_iter().map(|r| r.1).collect()
    }
}

fn random_logits(rows: usize, v: usize, scale: f32) -> Vec<Vec<f32>> {
    let mut random = Philox::new(5, [rows as u32, v as u32, 0]);
    (0..rows).map(|_| (0..v).map(|_| scale * random.normal()).collect()).collect()
}

fn compare(got: &[Proposal], want: &[(u32, f32, bool)], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (g, w) in got.iter().zip(want) {
        assert_eq!((g.token, g.committed), (w.0, w.2), "{what}: {g:?} instead of {w:?}");
        let bound = 1e-7 + 1e-5 * w.1;
        assert!((g.confidence - w.1).abs() <= bound, "{what}: {g:?} instead of {w:?}");
    }
}

#[test]
fn choices_are_those_of_the_host() {
    let Some(gpu) = checked_gpu() else { return };
    for (rows, v) in [(1, 1), (3, 5), (2, 97), (64, 300), (4, 4097), (2, 20_000)] {
        for temperature in [0.0, 0.7, 3.0] {
            for hole in [u32::MAX, (v as u32 / 2).max(1)] {
                let sampling = Sampling { temperature, seed: 1 << 40 | 9, ..Sampling::greedy() };
                let pass = Pass { hole, sampling, ..Pass::new(random_logits(rows, v, 4.0)) };
                let got = pass.run(&gpu);
                let what = format!("{rows} rows of {v}, T {temperature}, hole {hole}");
                compare(&got, &pass.on_host(0), &what);
                assert_eq!(got, pass.run(&gpu), "{what}: two runs");
                assert!(got.iter().all(|p| p.token != hole));
            }
        }
    }
}

#[test]
fn limits_penalties_and_forbidden_tokens_are_those_of_the_host() {
    let Some(gpu) = checked_gpu() else { return };
    let mut differ = 0;
    for v in [1, 40, 5000] {
        let logits = random_logits(12, v, 3.0);
        let some: Vec<u32> = (0..v as u32).filter(|id| id % 3 == 1).collect();
        let free = Pass {
            sampling: Sampling { temperature: 1.5, seed: 4, ..Sampling::greedy() },
            ..Pass::new(logits)
        };
        let before = free.run(&gpu);
        for (top_k, top_p) in [(None, None), (Some(1), None), (Some(7), None), (None, Some(0.6))]
            .into_iter()
            .chain([(None, Some(1e-6)), (Some(20), Some(0.8)), (Some(1 << 40), Some(1.0))])
        {
            for (repetition_penalty, forbidden) in [(1.0, &[][..]), (1.8, &[]), (0.5, &some)] {
                let sampling = Sampling {
                    top_k,
                    top_p,
                    repetition_penalty,
                    forbidden: forbidden.to_vec(),
                    ..free.sampling.clone()
                };
                let text = (0..v as u32).filter(|id| id % 4 < 2).collect();
                let pass = Pass { sampling, text, ..Pass::new(free.logits.clone()) };
                let got = pass.run(&gpu);
                compare(&got, &pass.on_host(0), &format!("{v} tokens, {:?}", pass.sampling));
                assert!(got.iter().all(|p| !forbidden.contains(&p.token)));
                differ += usize::from(got != before);
            }
        }
    }
    assert!(differ > 20, "only {differ} of the requests changed anything");
}

#[test]
fn what_a_pass_commits_counts_as_seen() {
    let Some(gpu) = checked_gpu() else { return };
    // Each row likes token 7 most; once it was said, it is the last choice.
    let mut logits = vec![vec![1.0; 40]; 3];
    for (i, row) in logits.iter_mut().enumerate() {
        (row[7], row[10 + i]) = (9.0 - i as f32, 5.0);
    }
    let sampling = Sampling { repetition_penalty: 20.0, ..Sampling::greedy() };
    let pass = Pass { sampling, quota: Quota::Best(1), ..Pass::new(logits) };
    let canvas = pass.canvas(&gpu);
    let mut said = Vec::new();
    for _ in 0..3 {
        let got = pass.proposals_on(&gpu, &canvas);
        said.extend(got.iter().filter(|p| p.committed).map(|p| p.token));
    }
    assert_eq!(said.iter().filter(|t| **t == 7).count(), 1, "{said:?}");
}

#[test]
fn the_forbidden_token_keeps_its_share_and_ties_go_to_the_lowest() {
    let Some(gpu) = checked_gpu() else { return };
    let mut logits = random_logits(3, 5000, 1.0);
    logits[0][4500] = 30.0;
    logits[1][4999] = 9.0;
    logits[1][17] = 9.0;
    logits[2][4200] = 9.0;
    logits[2][4100] = 9.0;
    let pass = Pass { hole: 4500, ..Pass::new(logits) };
    let got = pass.run(&gpu);
    compare(&got, &pass.on_host(0), "forbidden and ties");
    assert_eq!((got[1].token, got[2].token), (17, 4100));
    assert!(got[0].confidence < 1e-9);
}

#[test]
fn quotas_and_orders_are_those_of_the_host() {
    let Some(gpu) = checked_gpu() else { return };
    let mut logits = random_logits(40, 64, 3.0);
    // Exact ties between rows: the leftmost comes first.
    logits[7] = logits[3].clone();
    logits[30] = logits[3].clone();
    // And within a row.
    logits[5] = vec![0.5; 64];
    let quotas = [0.0, 0.3, 0.6, 1.5].map(Quota::AtLeast).into_iter();
    let quotas = quotas.chain([1, 2, 5, 39, 40, 100].map(Quota::Best));
    let quotas = quotas.chain([0.0, 0.9, 4.0, 30.0].map(Quota::Factor));
    for quota in quotas.chain([0.0, 1.0, 9.0, 500.0].map(Quota::EntropyBound)) {
        for order in [Order::Confidence, Order::Margin, Order::Entropy, Order::Random] {
            if matches!(quota, Quota::EntropyBound(_)) && order != Order::Entropy {
                continue;
            }
            let pass = Pass { quota, order, ..Pass::new(logits.clone()) };
            compare(&pass.run(&gpu), &pass.on_host(0), &format!("{quota:?} {order:?}"));
        }
    }
}

#[test]
fn passes_are_counted_on_the_device_until_a_stop_token() {
    let Some(gpu) = checked_gpu() else { return };
    let sampling = Sampling { temperature: 1.0, seed: 2, ..Sampling::greedy() };
    let pass = Pass { quota: Quota::Best(1), sampling, ..Pass::new(random_logits(4, 50, 1.0)) };
    let canvas = pass.canvas(&gpu);
    let mut open = vec![0, 1, 2, 3];
    for n in 0..4 {
        let got = pass.proposals_on(&gpu, &canvas);
        let positions: Vec<usize> = got.iter().map(|p| p.position - pass.start).collect();
        assert_eq!(positions, open);
        let host = pass.on_host(n);
        for p in &got {
            assert_eq!(p.token, host[p.position - pass.start].0, "pass {n}");
        }
        open.retain(|&i| !got.iter().any(|p| p.committed && p.position == pass.start + i));
        assert_eq!(open.len(), 3 - n);
    }
    assert_eq!(pass.proposals_on(&gpu, &canvas), []);

    // Row 1 stops; row 0 is filled a pass later, and rows 2 and 3 stay open for good.
    let mut logits = vec![vec![0.0; 50]; 4];
    for (row, sure) in [(0, 5.0), (1, 9.0), (2, 3.0), (3, 2.0)] {
        logits[row][10 + row] = sure;
    }
    let pass = Pass { quota: Quota::Best(1), stops: vec![40, 11], ..Pass::new(logits) };
    let canvas = pass.canvas(&gpu);
    let mut commits = Vec::new();
    for _ in 0..4 {
        let got = pass.proposals_on(&gpu, &canvas);
        commits.push(got.iter().filter(|p| p.committed).map(|p| p.token).collect::<Vec<_>>());
    }
    assert_eq!(commits, [vec![11], vec![10], vec![], vec![]]);
}

#[test]
fn broken_logits_are_told_and_commit_nothing() {
    let Some(gpu) = checked_gpu() else { return };
    let v = 5000;
    let fine = random_logits(3, v, 1.0);
    let with = |at: usize, value: f32| {
        let mut logits = fine.clone();
        logits[1][at] = value;
        Pass::new(logits)
    };
    let infinite = [with(4200, f32::INFINITY), with(7, f32::NEG_INFINITY)];
    for pass in [with(0, f32::NAN), with(4999, -f32::NAN)].iter().chain(&infinite) {
        let canvas = pass.canvas(&gpu);
        assert_eq!(pass.run_on(&gpu, &canvas), Decided::NotFinite(4));
        assert!(canvas.read().expect("a read")[3..].iter().all(|&t| t == u32::MAX));
    }
    let large = Pass::new(vec![vec![3e38, -3e38, 1e5]; 2]);
    assert!(large.run(&gpu).iter().all(|p| (p.token, p.confidence) == (0, 1.0)));
    let flat = Pass::new(vec![vec![-7.25; 155_136]]);
    let got = flat.run(&gpu);
    assert!((got[0].confidence * 155_136.0 - 1.0).abs() < 1e-4, "{got:?}");
}

fn events(llama: &Llama, prompt: &[u32], options: &DecodeOptions, ahead: usize) -> Told {
    let request = Request::answer(llama.config(), prompt, options).expect("it fits");
    let mut decoder = Decoder::for_one(llama, &request).with_look_ahead(ahead);
    let id = decoder.submit(request).expect("it fits");
    let mut events = Vec::new();
    while !decoder.is_idle() {
        decoder.advance(&mut events).expect("the device works");
    }
    let answer = decoder.take(id).expect("it ended");
    (events.into_iter().map(|(_, event)| event).collect(), answer)
}

type Told = (Vec<Event>, Answer);

#[test]
fn looking_ahead_changes_nothing_but_time() {
    let Some(gpu) = gpu() else { return };
    let llama = Llama::load(&gpu, &golden("tiny"), Precision::F32).expect("the model loads");
    let prompt = [57, 11, 28, 44, 39, 92, 35];
    let mut differ = 0;
    let mut modes = vec![(Mode::Autoregressive, 0.0), (Mode::Autoregressive, 1.0)];
    for schedule in [Schedule::Fixed { steps: 3 }, Schedule::Threshold(0.04)] {
        for (fused, temperature, order) in [
            (true, 0.0, Order::Confidence),
            (false, 1.0, Order::Confidence),
            (true, 1.0, Order::Random),
        ] {
            let block = BlockOptions { schedule, fused, order, ..BlockOptions::new(96, 4) };
            modes.push((Mode::Block(block), temperature));
        }
    }
    for (mode, temperature) in modes {
        let sampling = Sampling { temperature, seed: 3, ..Sampling::greedy() };
        let free = DecodeOptions { mode, max_tokens: 14, sampling, eos_ids: vec![] };
        let (_, answer) = events(&llama, &prompt, &free, 1);
        differ += usize::from(answer.counters.passes < 14);
        let stops = [2, 6, 9].map(|at| answer.token_ids[at]);
        for eos_ids in [vec![], vec![stops[0]], vec![stops[2], stops[1]]] {
            let options = DecodeOptions { eos_ids, ..free.clone() };
            let want = events(&llama, &prompt, &options, 1);
            for ahead in [2, 3, 9, 50] {
                let got = events(&llama, &prompt, &options, ahead);
                assert_eq!(got, want, "{options:?}, {ahead} passes ahead");
            }
        }
    }
    assert!(differ > 0, "no schedule ever commits two tokens in a pass");
}

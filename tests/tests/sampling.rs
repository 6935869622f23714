//! Choosing and committing on the device against the sampler on the host, and what looking ahead must not change.

use demask_engine::Error;
use demask_engine::decode::{
    AutoregressiveOptions, AutoregressiveSession, BlockOptions, BlockSession, Canvas, Counters,
    DecodeOptions, Event, Mode, Proposal, Quota, Remasking, Sampler, Schedule, Session,
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

/// One pass over `logits` (rows of V), all rows open from `start` on, the vocabulary in parts of `part` tokens.
struct Pass {
    logits: Vec<Vec<f32>>,
    start: usize,
    part: usize,
    hole: u32,
    sampler: Sampler,
    stops: Vec<u32>,
    quota: Quota,
    remasking: Remasking,
}

impl Pass {
    fn new(logits: Vec<Vec<f32>>) -> Pass {
        Pass {
            part: logits[0].len(),
            logits,
            start: 3,
            hole: u32::MAX,
            sampler: Sampler::greedy(),
            stops: vec![],
            quota: Quota::Best(usize::MAX >> 33),
            remasking: Remasking::LowConfidence,
        }
    }

    fn parts(&self, gpu: &Gpu) -> Vec<Tensor> {
        let v = self.logits[0].len();
        let part = |first: usize| {
            let end = (first + self.part).min(v);
            let values: Vec<f32> =
                self.logits.iter().flat_map(|row| row[first..end].to_vec()).collect();
            Tensor::from_f32(gpu, &values, [self.logits.len(), end - first])
        };
        (0..v).step_by(self.part).map(part).collect()
    }

    fn canvas(&self, gpu: &Gpu) -> Canvas {
        let mut tokens = vec![1; self.start];
        tokens.resize(self.start + self.logits.len(), self.hole);
        Canvas::new(gpu, &tokens, self.hole, self.sampler.clone(), &self.stops)
    }

    fn run_on(&self, gpu: &Gpu, canvas: &Canvas) -> Result<Vec<Proposal>, Error> {
        canvas.commit(&self.parts(gpu), self.start, self.quota, self.remasking).wait()
    }

    fn run(&self, gpu: &Gpu) -> Result<Vec<Proposal>, Error> {
        self.run_on(gpu, &self.canvas(gpu))
    }

    /// The same on the host: token, confidence and whether it is committed, of each row.
    fn on_host(&self, pass: usize) -> Vec<(u32, f32, bool)> {
        let forbidden = ((self.hole as usize) < self.logits[0].len()).then_some(self.hole);
        let sampler = Sampler { forbidden, ..self.sampler.clone() };
        let rows = self.logits.iter().enumerate();
        let mut all: Vec<(usize, u32, f32, f32)> = rows
            .map(|(i, row)| {
                let choice = sampler.choose(row, self.start + i, pass).expect("finite logits");
                let priority = match self.remasking {
                    Remasking::LowConfidence => choice.confidence,
                    Remasking::Random => sampler.order(self.start + i, pass),
                };
                (i, choice.token, choice.confidence, priority)
            })
            .collect();
        all.sort_by(|a, b| b.3.total_cmp(&a.3));
        let n = match self.quota {
            Quota::Best(n) => n,
            Quota::AtLeast(t) => all.iter().filter(|r| r.3 >= t).count().max(1),
        };
        let mut rows: Vec<_> =
            all.iter().enumerate().map(|(i, r)| (r.0, (r.1, r.2, i < n))).collect();
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
    for (rows, v, part) in
        [(1, 1, 1), (3, 5, 5), (2, 97, 40), (64, 300, 300), (4, 4097, 4097), (2, 20_000, 9_001)]
    {
        for temperature in [0.0, 0.7, 3.0] {
            for hole in [u32::MAX, (v as u32 / 2).max(1)] {
                let sampler = Sampler { temperature, seed: 1 << 40 | 9, ..Sampler::greedy() };
                let pass = Pass { part, hole, sampler, ..Pass::new(random_logits(rows, v, 4.0)) };
                let got = pass.run(&gpu).expect("finite logits");
                let what = format!("{rows} rows of {v} in {part}, T {temperature}, hole {hole}");
                compare(&got, &pass.on_host(0), &what);
                assert_eq!(got, pass.run(&gpu).expect("finite logits"), "{what}: two runs");
                assert!(got.iter().all(|p| p.token != hole));
            }
        }
    }
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
    let got = pass.run(&gpu).expect("finite logits");
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
    let best = [0.0, 0.3, 0.6, 1.5].map(Quota::AtLeast);
    for quota in best.into_iter().chain([1, 2, 5, 39, 40, 100].map(Quota::Best)) {
        for remasking in [Remasking::LowConfidence, Remasking::Random] {
            let pass = Pass { quota, remasking, ..Pass::new(logits.clone()) };
            let got = pass.run(&gpu).expect("finite logits");
            compare(&got, &pass.on_host(0), &format!("{quota:?} {remasking:?}"));
        }
    }
}

#[test]
fn passes_are_counted_on_the_device_until_a_stop_token() {
    let Some(gpu) = checked_gpu() else { return };
    let sampler = Sampler { temperature: 1.0, seed: 2, ..Sampler::greedy() };
    let pass = Pass { quota: Quota::Best(1), sampler, ..Pass::new(random_logits(4, 50, 1.0)) };
    let canvas = pass.canvas(&gpu);
    let mut open = vec![0, 1, 2, 3];
    for n in 0..4 {
        let got = pass.run_on(&gpu, &canvas).expect("finite logits");
        let positions: Vec<usize> = got.iter().map(|p| p.position - pass.start).collect();
        assert_eq!(positions, open);
        let host = pass.on_host(n);
        for p in &got {
            assert_eq!(p.token, host[p.position - pass.start].0, "pass {n}");
        }
        open.retain(|&i| !got.iter().any(|p| p.committed && p.position == pass.start + i));
        assert_eq!(open.len(), 3 - n);
    }
    assert_eq!(pass.run_on(&gpu, &canvas).expect("nothing is open"), []);

    // Row 1 stops; row 0 is filled a pass later, and rows 2 and 3 stay open for good.
    let mut logits = vec![vec![0.0; 50]; 4];
    for (row, sure) in [(0, 5.0), (1, 9.0), (2, 3.0), (3, 2.0)] {
        logits[row][10 + row] = sure;
    }
    let pass = Pass { quota: Quota::Best(1), stops: vec![40, 11], ..Pass::new(logits) };
    let canvas = pass.canvas(&gpu);
    let mut commits = Vec::new();
    for _ in 0..4 {
        let got = pass.run_on(&gpu, &canvas).expect("finite logits");
        commits.push(got.iter().filter(|p| p.committed).map(|p| p.token).collect::<Vec<_>>());
    }
    assert_eq!(commits, [vec![11], vec![10], vec![], vec![]]);
}

#[test]
fn broken_logits_are_an_error_and_commit_nothing() {
    let Some(gpu) = checked_gpu() else { return };
    let v = 5000;
    let fine = random_logits(3, v, 1.0);
    let with = |at: usize, value: f32| {
        let mut logits = fine.clone();
        logits[1][at] = value;
        Pass::new(logits)
    };
    let minus = |keep: Option<usize>| {
        let mut logits = fine.clone();
        logits[1] = vec![f32::NEG_INFINITY; v];
        keep.into_iter().for_each(|at| logits[1][at] = 2.0);
        Pass::new(logits)
    };
    for pass in [with(0, f32::NAN), with(4999, -f32::NAN), with(4200, f32::INFINITY), minus(None)] {
        let canvas = pass.canvas(&gpu);
        let Err(Error::Request(why)) = pass.run_on(&gpu, &canvas) else { panic!("no error") };
        assert!(why.contains("no finite logits at position 4"), "{why}");
        assert!(canvas.rows(3..6).to_vec_u32().expect("a read").iter().all(|&t| t == u32::MAX));
    }
    for pass in [with(7, f32::NEG_INFINITY), minus(Some(4500))] {
        let got = pass.run(&gpu).expect("one finite logit is enough");
        compare(&got, &pass.on_host(0), "minus infinity");
    }
    let large = Pass::new(vec![vec![3e38, -3e38, 1e5]; 2]);
    let got = large.run(&gpu).expect("finite logits");
    assert!(got.iter().all(|p| (p.token, p.confidence) == (0, 1.0)));
    let flat = Pass::new(vec![vec![-7.25; 155_136]]);
    let got = flat.run(&gpu).expect("finite logits");
    assert!((got[0].confidence * 155_136.0 - 1.0).abs() < 1e-4, "{got:?}");
}

fn events(mut session: impl Session) -> (Vec<Event>, Counters, Vec<u32>) {
    let mut events = Vec::new();
    while session.finished().is_none() {
        session.advance(&mut events).expect("the device works");
    }
    (events, session.counters(), session.answer().to_vec())
}

#[test]
fn looking_ahead_changes_nothing_but_time() {
    let Some(gpu) = gpu() else { return };
    let llama = Llama::load(&gpu, &golden("tiny"), Precision::F32).expect("the model loads");
    let prompt = [57, 11, 28, 44, 39, 92, 35];
    let mut differ = 0;
    for schedule in [Schedule::Fixed { steps: 3 }, Schedule::Threshold(0.04)] {
        for (fused, temperature, remasking) in [
            (true, 0.0, Remasking::LowConfidence),
            (false, 1.0, Remasking::LowConfidence),
            (true, 1.0, Remasking::Random),
        ] {
            let block = BlockOptions { schedule, fused, remasking, ..BlockOptions::new(96, 4) };
            let mode = Mode::Block(block);
            let free =
                DecodeOptions { mode, max_tokens: 14, temperature, seed: 3, eos_ids: vec![] };
            let run = |options: &DecodeOptions, ahead: usize| {
                let session = BlockSession::new(&llama, &prompt, options).expect("it fits");
                events(session.with_look_ahead(ahead))
            };
            let (_, counters, answer) = run(&free, 1);
            differ += usize::from(counters.passes < 14);
            for eos_ids in [vec![], vec![answer[2]], vec![answer[9], answer[6]]] {
                let options = DecodeOptions { eos_ids, ..free.clone() };
                let want = run(&options, 1);
                for ahead in [2, 3, 9, 50] {
                    assert_eq!(run(&options, ahead), want, "{options:?}, {ahead} passes ahead");
                }
            }
        }
    }
    assert!(differ > 0, "no schedule ever commits two tokens in a pass");
    for temperature in [0.0, 1.0] {
        let mode = Mode::Autoregressive(AutoregressiveOptions::default());
        let free = DecodeOptions { mode, max_tokens: 12, temperature, seed: 3, eos_ids: vec![] };
        let run = |options: &DecodeOptions, ahead: usize| {
            let session = AutoregressiveSession::new(&llama, &prompt, options).expect("it fits");
            events(session.with_look_ahead(ahead))
        };
        let answer = run(&free, 1).2;
        for eos_ids in [vec![], vec![answer[5]]] {
            let options = DecodeOptions { eos_ids, ..free.clone() };
            let want = run(&options, 1);
            for ahead in [2, 5, 50] {
                assert_eq!(run(&options, ahead), want, "{options:?}, {ahead} tokens ahead");
            }
        }
    }
}

//! Many sequences on one decoder: each gets what it would get alone, prompts are shared, and requests come and go.

use demask_engine::Error;
use demask_engine::decode::{
    Answer, BlockOptions, DecodeOptions, Decoder, Event, FinishReason, Id, Mode, Order, Request,
    Room, Sampling, Schedule,
};
use demask_engine::gpu::Gpu;
use demask_engine::model::{DiffusionAttention, Llama, Precision};
use demask_engine::tensor::DType;
use demask_tests::{golden, gpu};

const MASK_ID: u32 = 96;
const ROOM: Room = Room { tokens: 400, sequences: 5 };

fn tiny(gpu: &Gpu, precision: Precision) -> Llama {
    Llama::load(gpu, &golden("tiny"), precision).expect("the golden model loads")
}

fn options(mode: Mode, max_tokens: usize, seed: u64) -> DecodeOptions {
    let sampling =
        Sampling { temperature: if seed > 0 { 0.8 } else { 0.0 }, seed, ..Sampling::greedy() };
    DecodeOptions { mode, max_tokens, sampling, eos_ids: vec![2] }
}

fn block(length: usize, schedule: Schedule) -> BlockOptions {
    BlockOptions { schedule, ..BlockOptions::new(MASK_ID, length) }
}

fn prompt(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (seed * 31 + i * 7 + i * i * seed) % 95).collect()
}

/// Requests of all modes and lengths.
fn requests(llama: &Llama) -> Vec<Request> {
    let full = |b| BlockOptions { attention: DiffusionAttention::Full, ..b };
    let random = |b| BlockOptions { order: Order::Random, ..b };
    let modes = [
        (Mode::Block(block(4, Schedule::Threshold(0.05))), 3, 17, 0),
        (Mode::Autoregressive, 20, 9, 0),
        (Mode::Block(block(8, Schedule::Fixed { steps: 3 })), 33, 21, 1),
        (Mode::Autoregressive, 1, 30, 2),
        (Mode::Block(full(block(8, Schedule::Factor(1.0)))), 11, 12, 0),
        (Mode::Block(block(1, Schedule::Threshold(0.9))), 5, 6, 0),
        (Mode::Block(random(block(4, Schedule::Threshold(0.6)))), 0, 13, 3),
        (Mode::Block(block(4, Schedule::EntropyBound(4.0))), 26, 8, 4),
    ];
    let request = |(i, (mode, p, n, seed)): (usize, (Mode, usize, usize, u64))| {
        let prompt = prompt(i as u32 + 1, p);
        Request::answer(llama.config(), &prompt, &options(mode, n, seed)).expect("it fits")
    };
    modes.into_iter().enumerate().map(request).collect()
}

type Told = (Vec<Event>, Answer);

/// All of them on one decoder, of which `late` come a few passes later.
fn together(llama: &Llama, room: Room, requests: &[Request], late: usize) -> Vec<Told> {
    let mut decoder = Decoder::new(llama, room);
    let (first, rest) = requests.split_at(requests.len() - late);
    let submit = |decoder: &mut Decoder<'_>, all: &[Request]| -> Vec<Id> {
        all.iter().map(|r| decoder.submit(r.clone()).expect("it fits")).collect()
    };
    let mut ids = submit(&mut decoder, first);
    let mut events = Vec::new();
    for _ in 0..6 {
        decoder.advance(&mut events).expect("the device works");
    }
    ids.extend(submit(&mut decoder, rest));
    while !decoder.is_idle() {
        decoder.advance(&mut events).expect("the device works");
    }
    let told = |id: Id| {
        let own = events.iter().filter(|e| e.0 == id).map(|e| e.1.clone()).collect();
        (own, decoder.take(id).expect("it ended"))
    };
    ids.into_iter().map(told).collect()
}

#[test]
fn a_sequence_gets_the_same_bits_in_any_company() {
    let Some(gpu) = gpu() else { return };
    for (precision, cache) in [(Precision::F32, DType::F32), (Precision::Bf16, DType::F16)] {
        let llama = tiny(&gpu, precision).cached_in(cache);
        let requests = requests(&llama);
        let alone: Vec<Told> = requests
            .iter()
            .map(|r| together(&llama, ROOM, std::slice::from_ref(r), 0).remove(0))
            .collect();
        assert!(alone.iter().all(|told| told.1.counters.tokens > 0));
        for late in [0, 3, 8] {
            let got = together(&llama, ROOM, &requests, late);
            for (i, (got, want)) in got.iter().zip(&alone).enumerate() {
                assert_eq!(got, want, "request {i}, {late} late, {precision:?}");
            }
        }
        // With room for one only, kernels are chosen for its own rows; the text is the same.
        for (request, want) in requests.iter().zip(&alone) {
            let room = Room { sequences: 1, ..ROOM };
            let got = together(&llama, room, std::slice::from_ref(request), 0).remove(0);
            assert_eq!(got.1.token_ids, want.1.token_ids);
        }
    }
}

#[test]
fn prompts_that_begin_alike_are_read_once() {
    let Some(gpu) = gpu() else { return };
    for cache in [DType::F32, DType::F16] {
        read_once(&tiny(&gpu, Precision::F32).cached_in(cache));
    }
}

fn read_once(llama: &Llama) {
    let common = prompt(5, 70);
    let ask = |tail: &[u32], mode: &Mode, seed| {
        let prompt = [&common[..], tail].concat();
        Request::answer(llama.config(), &prompt, &options(mode.clone(), 10, seed)).expect("it fits")
    };
    for (mode, length, whole) in
        [(Mode::Block(block(4, Schedule::Threshold(0.3))), 4, 68), (Mode::Autoregressive, 1, 70)]
    {
        let requests =
            [ask(&[1, 2, 3, 4, 5], &mode, 0), ask(&[9, 8], &mode, 0), ask(&[], &mode, 7)];
        let alone: Vec<Told> = requests
            .iter()
            .map(|r| together(llama, ROOM, std::slice::from_ref(r), 0).remove(0))
            .collect();
        let mut decoder = Decoder::new(llama, ROOM);
        let mut ids = Vec::new();
        let mut events = Vec::new();
        for request in &requests {
            ids.push(decoder.submit(request.clone()).expect("it fits"));
        }
        while !decoder.is_idle() {
            decoder.advance(&mut events).expect("the device works");
        }
        let last = if length == 1 { 69 } else { 68 };
        assert_eq!(decoder.reused(), whole + last, "{mode:?}");
        for (id, (told, want)) in ids.into_iter().zip(&alone) {
            let got = decoder.take(id).expect("it ended");
            assert_eq!(got.token_ids, want.token_ids, "{mode:?}");
            let own: Vec<Event> =
                events.iter().filter(|e| e.0 == id).map(|e| e.1.clone()).collect();
            assert_eq!(decided(&own), decided(told), "{mode:?}: not the same bits");
        }
        // A conversation goes on: the answer is in the cache as well, but for what its last passes left open. It was
        // not read as a prompt is, by passes of many rows, so its numbers are the same only to rounding.
        let reused = decoder.reused();
        let answer = &alone[0].1.token_ids;
        let longer = [&common[..], &[1, 2, 3, 4, 5], answer, &[7; 9]].concat();
        let request = Request::answer(llama.config(), &longer, &options(mode.clone(), 6, 0));
        let request = request.expect("it fits");
        let want = together(llama, ROOM, std::slice::from_ref(&request), 0).remove(0);
        let id = decoder.submit(request).expect("it fits");
        while !decoder.is_idle() {
            decoder.advance(&mut events).expect("the device works");
        }
        let again = decoder.reused() - reused;
        assert!(again + 2 * length > 75 + answer.len() && again <= 75 + answer.len(), "{again}");
        assert_eq!(decoder.take(id).expect("it ended").token_ids, want.1.token_ids);
    }
}

/// What was proposed and committed; what was read of a prompt may differ.
fn decided(events: &[Event]) -> Vec<&Event> {
    events.iter().filter(|event| !matches!(event, Event::Prefilled { .. })).collect()
}

#[test]
fn more_requests_than_room_wait_their_turn() {
    let Some(gpu) = gpu() else { return };
    let llama = tiny(&gpu, Precision::F32);
    let requests = requests(&llama);
    let alone: Vec<Told> = requests
        .iter()
        .map(|r| together(&llama, ROOM, std::slice::from_ref(r), 0).remove(0))
        .collect();
    let longest = requests.iter().map(|r| r.tokens.len()).max().expect("some");
    for room in [Room { tokens: longest, sequences: 5 }, Room { tokens: 90, sequences: 2 }] {
        let got = together(&llama, room, &[&requests[..], &requests[..]].concat(), 0);
        for (got, want) in got.iter().zip(alone.iter().chain(&alone)) {
            assert_eq!(got.1.token_ids, want.1.token_ids, "{room:?}");
        }
    }
    let mut small = Decoder::new(&llama, Room { tokens: longest - 1, sequences: 2 });
    let refused: Vec<_> = requests.iter().filter_map(|r| small.submit(r.clone()).err()).collect();
    assert!(matches!(&refused[..], [Error::Request(why)] if why.contains("cache")), "{refused:?}");
}

#[test]
fn a_request_can_be_taken_back_at_any_time() {
    let Some(gpu) = gpu() else { return };
    let llama = tiny(&gpu, Precision::F32);
    let requests = requests(&llama);
    let want = together(&llama, ROOM, &requests, 0);
    for passes in [0, 1, 3, 7, 12] {
        let mut decoder = Decoder::new(&llama, ROOM);
        let ids: Vec<Id> =
            requests.iter().map(|r| decoder.submit(r.clone()).expect("it fits")).collect();
        let mut events = Vec::new();
        for _ in 0..passes {
            decoder.advance(&mut events).expect("the device works");
        }
        for (i, &id) in ids.iter().enumerate().filter(|(i, _)| i % 2 == 0) {
            let got = decoder.take(id).expect("it is known");
            let ended = got.finish_reason != FinishReason::Interrupted;
            assert!(want[i].1.token_ids.starts_with(&got.token_ids));
            assert!(!ended || got == want[i].1);
            assert_eq!(decoder.take(id), None, "it was taken");
        }
        while !decoder.is_idle() {
            decoder.advance(&mut events).expect("the device works");
        }
        for (i, &id) in ids.iter().enumerate().filter(|(i, _)| i % 2 == 1) {
            assert_eq!(decoder.take(id), Some(want[i].1.clone()), "request {i} after {passes}");
        }
    }
}

#[test]
fn holes_anywhere_are_filled_and_nothing_else_changes() {
    let Some(gpu) = gpu() else { return };
    let llama = tiny(&gpu, Precision::F32);
    let text = prompt(3, 40);
    let holes = [1, 2, 13, 14, 15, 27, 39];
    let open: Vec<bool> = (0..40).map(|at| holes.contains(&at)).collect();
    for mode in [
        block(4, Schedule::Threshold(0.4)),
        BlockOptions {
            attention: DiffusionAttention::Full,
            ..block(40, Schedule::Fixed { steps: 3 })
        },
        BlockOptions { fused: false, ..block(8, Schedule::Fixed { steps: 2 }) },
    ] {
        let options = DecodeOptions { eos_ids: vec![], ..options(Mode::Block(mode), 0, 0) };
        let request = Request { tokens: text.clone(), open: open.clone(), options };
        let (events, answer) = together(&llama, ROOM, std::slice::from_ref(&request), 0).remove(0);
        let filled = events.iter().filter_map(|e| match e {
            Event::Committed { position, .. } => Some(*position),
            _ => None,
        });
        let mut filled: Vec<usize> = filled.collect();
        filled.sort_unstable();
        assert_eq!(filled, holes);
        assert!((0..40).all(|at| open[at] || answer.tokens[at] == text[at]));
        assert!(answer.tokens.iter().all(|&t| t != MASK_ID) && !answer.open.contains(&true));
        // What stands at open positions does not matter.
        let mut other = request.clone();
        holes.iter().for_each(|&at| other.tokens[at] = 50);
        let again = together(&llama, ROOM, &[other], 0).remove(0);
        assert_eq!(again.1.tokens, answer.tokens);
    }
    let causal = Request { tokens: text, open, options: options(Mode::Autoregressive, 0, 0) };
    let refused = Decoder::new(&llama, ROOM).submit(causal);
    assert!(matches!(refused, Err(Error::Request(why)) if why.contains("holes")));
}

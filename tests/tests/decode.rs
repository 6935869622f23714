//! Decoding against an independent implementation's answers (`golden/tiny`), against a decoder
//! without cache written here, and the rules that no single answer shows.

use std::ops::ControlFlow;

use demask_engine::decode::{
    BlockOptions, Counters, DecodeOptions, Decoder, Event, FinishReason, Generation, Mode, Order,
    Request, Sampling, Schedule, bits_per_byte, generate, perplexity, score,
};
use demask_engine::model::{DiffusionAttention, Llama, Precision};
use demask_engine::ops::Mask;
use demask_engine::{Error, Result};
use demask_tests::{golden, gpu};
use safetensors::SafeTensors;
use serde_json::Value;

const MASK_ID: u32 = 96;
const PROMPT: [u32; 11] = [57, 11, 28, 44, 39, 92, 35, 61, 2, 60, 21];

fn tiny() -> Option<Llama> {
    let model = Llama::load(&gpu()?, &golden("tiny"), Precision::F32);
    Some(model.expect("the golden model loads"))
}

fn block(length: usize, schedule: Schedule, max_tokens: usize) -> DecodeOptions {
    let mode = Mode::Block(BlockOptions { schedule, ..BlockOptions::new(MASK_ID, length) });
    DecodeOptions { mode, max_tokens, sampling: Sampling::greedy(), eos_ids: vec![] }
}

fn change(mut options: DecodeOptions, change: impl FnOnce(&mut BlockOptions)) -> DecodeOptions {
    if let Mode::Block(block) = &mut options.mode {
        change(block);
    }
    options
}

fn unfused(options: DecodeOptions) -> DecodeOptions {
    change(options, |block| block.fused = false)
}

fn drawn(options: DecodeOptions, seed: u64, temperature: f32) -> DecodeOptions {
    let sampling = Sampling { seed, temperature, ..options.sampling };
    DecodeOptions { sampling, ..options }
}

fn fixed(steps: usize) -> Schedule {
    Schedule::Fixed { steps }
}

/// Runs to the end; returns the answer and all events.
fn run(llama: &Llama, prompt: &[u32], options: &DecodeOptions) -> (Generation, Vec<Event>) {
    let mut events = Vec::new();
    let generation = generate(llama, prompt, options, |event| {
        events.push(event.clone());
        ControlFlow::Continue(())
    });
    (generation.expect("the request is fine"), events)
}

fn answer(llama: &Llama, prompt: &[u32], options: &DecodeOptions) -> Vec<u32> {
    run(llama, prompt, options).0.token_ids
}

/// Positions committed in each pass.
fn commits(events: &[Event]) -> Vec<Vec<usize>> {
    let mut commits: Vec<Vec<usize>> = Vec::new();
    for event in events {
        if let Event::Committed { position, pass, .. } = *event {
            commits.resize_with(commits.len().max(pass + 1), Vec::new);
            commits[pass].push(position);
        }
    }
    commits
}

/// Logits [T, V] of one pass over all tokens, with nothing cached.
fn full_pass(llama: &Llama, tokens: &[u32], mask: Mask) -> Vec<Vec<f32>> {
    let mut cache = llama.cache(tokens.len());
    let logits = llama.logits(&llama.step(tokens, 0, mask, &mut cache));
    let logits = logits.to_vec().expect("the device works");
    logits.chunks(llama.config().vocab_size).map(<[f32]>::to_vec).collect()
}

/// The likeliest token but `forbidden`, and its probability in f64.
fn best(row: &[f32], forbidden: Option<u32>) -> (u32, f64) {
    let allowed = (0..row.len()).filter(|&i| forbidden != Some(i as u32));
    let top = allowed.fold(None, |b: Option<usize>, i| match b {
        Some(b) if row[b] >= row[i] => Some(b),
        _ => Some(i),
    });
    let top = top.expect("a vocabulary");
    let sum: f64 = row.iter().map(|&z| f64::from(z - row[top]).exp()).sum();
    (top as u32, 1.0 / sum)
}

/// Block decoding without a cache, greedy, by the definition. Returns prompt and answer, and
/// commits.
fn uncached(llama: &Llama, prompt: &[u32], options: &DecodeOptions) -> (Vec<u32>, Vec<Vec<usize>>) {
    let Mode::Block(block) = &options.mode else { panic!("block mode") };
    let b = block.block_length;
    let mut x = prompt.to_vec();
    x.resize(prompt.len() + options.max_tokens, MASK_ID);
    let mut holes: Vec<usize> = (prompt.len()..x.len()).collect();
    let mut commits = Vec::new();
    while let Some(&hole) = holes.first() {
        let end = ((hole / b + 1) * b).min(x.len());
        let mut open: Vec<usize> = holes.iter().copied().filter(|&i| i < end).collect();
        let n = open.len();
        for step in 0.. {
            let quota = match block.schedule {
                Schedule::Fixed { steps } => n / steps + usize::from(step < n % steps),
                _ => 1,
            };
            let logits = match block.attention {
                DiffusionAttention::Block => full_pass(llama, &x[..end], Mask::BlockCausal(b)),
                DiffusionAttention::Causal => full_pass(llama, &x[..end], Mask::Causal),
                DiffusionAttention::Full => full_pass(llama, &x, Mask::Full),
            };
            let of = |i: usize| (i, best(&logits[i], Some(MASK_ID)));
            let mut found: Vec<(usize, (u32, f64))> = open.iter().map(|&i| of(i)).collect();
            found.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
            let sure = |t: f32| found.iter().filter(|f| f.1.1 >= f64::from(t)).count();
            found.truncate(match block.schedule {
                Schedule::Threshold(t) => sure(t).max(1),
                _ => quota,
            });
            let mut positions: Vec<usize> = found.iter().map(|f| f.0).collect();
            positions.sort_unstable();
            found.iter().for_each(|&(i, (token, _))| x[i] = token);
            open.retain(|i| !positions.contains(i));
            commits.push(positions);
            if open.is_empty() {
                break;
            }
        }
        holes.retain(|&i| i >= end);
    }
    (x, commits)
}

fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().expect("a list");
    list.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

#[test]
fn golden_decodings_are_reproduced() {
    let Some(llama) = tiny() else { return };
    let text = std::fs::read(golden("tiny/golden.json")).expect("the golden is there");
    let value: Value = serde_json::from_slice(&text).expect("valid JSON");
    let cases = value["decode"]["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let number = case["value"].as_f64().expect("a number");
        let schedule = match case["mode"].as_str() {
            Some("fixed") => fixed(number as usize),
            _ => Schedule::Threshold(number as f32),
        };
        let prompt = ids(&case["prompt"]);
        let max_tokens = case["gen_length"].as_u64().expect("a length") as usize;
        let options = block(4, schedule, max_tokens);
        let want = ids(&case["ids"])[prompt.len()..].to_vec();
        let passes = case["passes"].as_u64().expect("a count") as usize;
        let steps = case["commits"].as_array().expect("commits");
        let steps: Vec<Vec<usize>> =
            steps.iter().map(|s| ids(s).into_iter().map(|i| i as usize).collect()).collect();

        let (plain, events) = run(&llama, &prompt, &unfused(options.clone()));
        assert_eq!(plain.token_ids, want, "{case}");
        assert_eq!(plain.forwards, passes, "{case}");
        assert_eq!(commits(&events), steps, "{case}");
        assert_eq!(plain.finish_reason, FinishReason::Length);
        let (fused, events) = run(&llama, &prompt, &options);
        assert_eq!(fused.token_ids, want, "{case}");
        assert_eq!(commits(&events), steps, "{case}");
        assert_eq!(fused.forwards, steps.len(), "fused, only passes that commit are left");
        assert_eq!(fused.tokens_per_forward, max_tokens as f32 / steps.len() as f32);
    }
}

/// The published sampler, replicated (`golden/reference_sampler.py`): prompts of every length modulo B, in fixed and
/// threshold modes, with and without a stop token.
#[test]
fn the_reference_sampler_decodes_the_same_tokens() {
    let Some(llama) = tiny() else { return };
    let text = std::fs::read(golden("tiny/sampler.json")).expect("the golden is there");
    let cases: Vec<Value> = serde_json::from_slice(&text).expect("valid JSON");
    assert_eq!(cases.len(), 80);
    for case in &cases {
        let (prompt, eos) = (ids(&case["prompt"]), case["eos"].as_u64().map(|eos| eos as u32));
        let schedule = match case["threshold"].as_f64() {
            Some(threshold) => Schedule::Threshold(threshold as f32),
            None => fixed(case["steps"].as_u64().expect("a number") as usize),
        };
        let max_tokens = case["gen_length"].as_u64().expect("a number") as usize;
        let eos_ids = eos.into_iter().collect();
        let options = DecodeOptions { eos_ids, ..block(4, schedule, max_tokens) };
        let steps = case["commits"].as_array().expect("commits");
        let want: Vec<Vec<usize>> =
            steps.iter().map(|s| ids(s).into_iter().map(|i| i as usize).collect()).collect();
        for options in [unfused(options.clone()), options] {
            let (got, events) = run(&llama, &prompt, &options);
            assert_eq!(got.token_ids, ids(&case["answer"]), "{case}");
            let commits = commits(&events);
            // A block with a stop token is left as soon as all before that is filled; the reference fills it whole.
            let last = if eos.is_some() { commits.len() } else { want.len() };
            assert_eq!(commits, want[..last], "{case}");
        }
    }
}

#[test]
fn models_trained_without_blocks_decode_as_they_were_trained() {
    let Some(mut llama) = tiny() else { return };
    let mut answers = Vec::new();
    for attention in [DiffusionAttention::Causal, DiffusionAttention::Full] {
        for (p, schedule) in [(1, fixed(2)), (6, Schedule::Threshold(0.2)), (11, fixed(8))] {
            let options = block(8, schedule, 13);
            let options = change(options, |block| block.attention = attention);
            let prompt = &PROMPT[..p];
            let (want, steps) = uncached(&llama, prompt, &options);
            for options in [options.clone(), unfused(options)] {
                let (got, events) = run(&llama, prompt, &options);
                assert_eq!(got.token_ids, want[p..], "prompt of {p}, {options:?}");
                assert_eq!(commits(&events), steps, "prompt of {p}, {options:?}");
                if attention == DiffusionAttention::Full {
                    assert_eq!(
                        got.forwards,
                        steps.len(),
                        "nothing is cached, so nothing is sealed"
                    );
                }
            }
            answers.push(want);
        }
        let config = llama.config_mut();
        (config.mask_token_id, config.block_length) = (Some(MASK_ID), None);
        config.diffusion_attention = attention;
        assert!(config.is_diffusion());
        let Mode::Block(options) = DecodeOptions::for_model(config).mode else { panic!("blocks") };
        assert_eq!((options.attention, options.block_length), (attention, 32));
    }
    assert_ne!(answers[2], answers[5], "the masks differ");
}

#[test]
fn cached_is_uncached_for_every_block_length_and_prompt_length() {
    let Some(llama) = tiny() else { return };
    for b in [1, 2, 4, 8] {
        // Without a prompt the holes of the first block are all alike: their logits tie exactly, and rounding alone
        // would choose among them.
        for p in usize::from(b > 1)..=b.min(PROMPT.len()) {
            for schedule in [fixed(2), Schedule::Threshold(0.2)] {
                // The last block is cut.
                let options = block(b, schedule, b + 3);
                let prompt = &PROMPT[..p];
                let (want, steps) = uncached(&llama, prompt, &options);
                for options in [options.clone(), unfused(options)] {
                    let (got, events) = run(&llama, prompt, &options);
                    assert_eq!(got.token_ids, want[p..], "prompt of {p}, {options:?}");
                    assert_eq!(commits(&events), steps, "prompt of {p}, {options:?}");
                }
            }
        }
    }
}

#[test]
fn blocks_of_one_decode_left_to_right() {
    let Some(llama) = tiny() else { return };
    let (got, events) = run(&llama, &PROMPT, &block(1, fixed(1), 9));
    let order: Vec<Vec<usize>> = (11..20).map(|i| vec![i]).collect();
    assert_eq!(commits(&events), order);
    // Under B = 1 the mask is the causal one: each token is what the model puts in place of a mask.
    let mut x = PROMPT.to_vec();
    for &token in &got.token_ids {
        x.push(MASK_ID);
        let logits = full_pass(&llama, &x, Mask::Causal);
        assert_eq!(best(&logits[x.len() - 1], Some(MASK_ID)).0, token);
        x.pop();
        x.push(token);
    }
}

#[test]
fn forwards_are_counted_as_the_arithmetic_says() {
    let Some(llama) = tiny() else { return };
    let nfe = |options: &DecodeOptions, p| run(&llama, &PROMPT[..p], options).0.forwards;
    let one_each = block(4, fixed(4), 16);
    assert_eq!(nfe(&unfused(one_each.clone()), 8), 4 * 5);
    assert_eq!(nfe(&one_each, 8), 4 * 4);
    let whole = block(4, Schedule::Threshold(0.0), 16);
    assert_eq!(nfe(&unfused(whole.clone()), 8), 4 * 2);
    assert_eq!(nfe(&whole, 8), 4);
    assert_eq!(nfe(&block(4, Schedule::Threshold(1.1), 16), 8), 16);
    // More steps than holes, and a remainder: 3 holes over 2 steps are 2 + 1.
    assert_eq!(nfe(&block(4, fixed(100), 16), 8), 16);
    let (_, events) = run(&llama, &PROMPT[..5], &block(4, fixed(2), 3));
    assert_eq!(commits(&events).iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
    // An empty prompt, and one of one token in one block with the answer.
    assert_eq!(nfe(&one_each, 0), 16);
    assert_eq!(nfe(&block(4, fixed(4), 3), 1), 3);
}

#[test]
fn prompts_are_read_in_pieces() {
    let Some(mut llama) = tiny() else { return };
    llama.config_mut().max_position_embeddings = 2048;
    let prompt: Vec<u32> = (0..1101).map(|i| i * 7 % 95).collect();
    let options = block(4, fixed(4), 8);
    let mut answers = Vec::new();
    // 1100 rows in whole blocks: 512 + 512 + 76.
    for (options, want) in [(options.clone(), 8), (unfused(options.clone()), 11)] {
        let request = Request::answer(llama.config(), &prompt, &options).expect("it fits");
        let mut decoder = Decoder::for_one(&llama, &request);
        let id = decoder.submit(request).expect("it fits");
        while !decoder.is_idle() {
            decoder.advance(&mut Vec::new()).expect("the device works");
        }
        let answer = decoder.take(id).expect("it ended");
        let Counters { prefills, passes, tokens, forwards } = answer.counters;
        assert_eq!((prefills, passes, tokens, forwards), (3, 8, 8, want));
        answers.push(answer.token_ids);
    }
    assert_eq!(answers[0], answers[1]);
    let mut x = prompt.clone();
    x.extend([MASK_ID; 3]);
    let logits = full_pass(&llama, &x, Mask::BlockCausal(4));
    let (_, events) = run(&llama, &prompt, &options);
    let first = events.iter().find_map(|event| match *event {
        Event::Committed { position, token, .. } => Some((position, token)),
        _ => None,
    });
    let (position, token) = first.expect("a commit");
    assert_eq!(best(&logits[position], Some(MASK_ID)).0, token);

    let causal = DecodeOptions { max_tokens: 3, ..DecodeOptions::autoregressive(llama.config()) };
    let (got, events) = run(&llama, &prompt, &causal);
    let prefilled = |e: &&Event| matches!(e, Event::Prefilled { total: 1100, .. });
    assert_eq!(events.iter().filter(prefilled).count(), 3);
    let logits = full_pass(&llama, &prompt, Mask::Causal);
    assert_eq!(best(&logits[1100], None).0, got.token_ids[0]);
    let scores = score(&llama, &prompt, &Mode::Autoregressive).expect("a fine request");
    let want = f64::from(scores[1100].expect("all but the first are scored")).exp();
    let row = &logits[1099];
    let (top, p) = best(row, None);
    let p = p * f64::from(row[prompt[1100] as usize] - row[top as usize]).exp();
    assert!((p - want).abs() < 1e-5, "{p} instead of {want}");
}

#[test]
fn stop_tokens_of_the_prompt_do_not_end_the_answer() {
    let Some(llama) = tiny() else { return };
    let eos = 2;
    for p in 4..8 {
        for behind in [0, 1, 2] {
            let mut prompt = PROMPT[..p].to_vec();
            prompt[p - 1 - behind] = eos;
            let free = block(4, Schedule::Threshold(0.95), 10);
            let options = DecodeOptions { eos_ids: vec![eos], ..free.clone() };
            let free = answer(&llama, &prompt, &free);
            let want: Vec<u32> = free.into_iter().take_while(|&t| t != eos).collect();
            assert!(!want.is_empty(), "prompt {prompt:?} lets the model begin with eos");
            for options in [options.clone(), unfused(options)] {
                assert_eq!(answer(&llama, &prompt, &options), want, "prompt {prompt:?}");
            }
        }
    }
}

#[test]
fn answers_end_before_their_first_stop_token() {
    let Some(llama) = tiny() else { return };
    let autoregressive = DecodeOptions {
        max_tokens: 16,
        eos_ids: vec![],
        ..DecodeOptions::autoregressive(llama.config())
    };
    for options in [block(4, fixed(4), 16), unfused(block(4, fixed(2), 16)), autoregressive] {
        let (free, _) = run(&llama, &PROMPT[..6], &options);
        for &eos in &free.token_ids {
            let want: Vec<u32> = free.token_ids.iter().copied().take_while(|&t| t != eos).collect();
            let options = DecodeOptions { eos_ids: vec![95, eos], ..options.clone() };
            let want: Vec<u32> = want.into_iter().take_while(|&t| t != 95).collect();
            let (got, events) = run(&llama, &PROMPT[..6], &options);
            assert_eq!(got.token_ids, want);
            assert_eq!(got.finish_reason, FinishReason::Eos);
            assert!(got.forwards <= free.forwards);
            let last = Event::Finished { reason: FinishReason::Eos };
            assert_eq!(events.last(), Some(&last));
            let done: Vec<u32> = events.iter().flat_map(block_tokens).copied().collect();
            assert_eq!(done, want, "finished blocks make up the answer");
        }
    }
}

fn block_tokens(event: &Event) -> &[u32] {
    match event {
        Event::BlockDone { start, end, tokens, forwards } => {
            assert!(tokens.len() == end - start && *forwards > 0);
            tokens
        }
        _ => &[],
    }
}

#[test]
fn a_mask_token_in_the_prompt_is_a_token() {
    let Some(llama) = tiny() else { return };
    for p in [5, 6, 7, 8] {
        let mut prompt = PROMPT[..p].to_vec();
        prompt[p - 1] = MASK_ID;
        prompt[1] = MASK_ID;
        let options = block(4, fixed(4), 6);
        let (got, events) = run(&llama, &prompt, &options);
        assert_eq!(got.prompt_token_ids, prompt);
        assert_eq!(got.token_ids.len(), 6);
        assert!(commits(&events).iter().flatten().all(|&position| position >= p));
        assert_eq!(got.token_ids, uncached(&llama, &prompt, &options).0[p..]);
    }
}

#[test]
fn the_mask_token_is_never_proposed() {
    let Some(llama) = tiny() else { return };
    // Any token may serve as mask; one that the model likes to repeat puts the rule to the test.
    let liked = (0..97).find(|&id| {
        let logits = full_pass(&llama, &[id; 4], Mask::BlockCausal(4));
        logits.iter().any(|row| best(row, None).0 == id)
    });
    let mask_id = liked.expect("the model repeats some token");
    for temperature in [0.0, 1.0] {
        let options = drawn(block(4, Schedule::Threshold(0.0), 24), 0, temperature);
        let options = change(options, |block| block.mask_id = mask_id);
        let got = answer(&llama, &[], &options);
        assert!(got.len() == 24 && !got.contains(&mask_id), "{got:?}");
    }
}

#[test]
fn events_tell_the_whole_story() {
    let Some(llama) = tiny() else { return };
    let (got, events) = run(&llama, &PROMPT[..6], &block(4, fixed(4), 7));
    let mut x = [None; 13];
    let mut open: Vec<usize> = vec![];
    for event in &events {
        match *event {
            Event::Proposed { position, confidence, .. } => {
                assert!(x[position].is_none() && confidence > 0.0 && confidence <= 1.0);
                open.push(position);
            }
            Event::Committed { position, token, .. } => {
                assert!(open.contains(&position) && x[position].is_none());
                x[position] = Some(token);
                open.clear();
            }
            _ => {}
        }
    }
    assert_eq!(x[6..].iter().flatten().copied().collect::<Vec<_>>(), got.token_ids);
    let bounds: Vec<[usize; 3]> = events
        .iter()
        .filter_map(|event| match *event {
            Event::BlockDone { start, end, forwards, .. } => Some([start, end, forwards]),
            _ => None,
        })
        .collect();
    assert_eq!(bounds, [[6, 8, 2], [8, 12, 4], [12, 13, 1]]);
    assert_eq!(events.last(), Some(&Event::Finished { reason: FinishReason::Length }));
}

#[test]
fn random_commits_and_samples_depend_on_the_seed_alone() {
    let Some(llama) = tiny() else { return };
    let random = change(block(4, fixed(4), 12), |block| block.order = Order::Random);
    let at = |seed, temperature, options: &DecodeOptions| {
        let options = drawn(options.clone(), seed, temperature);
        let (got, events) = run(&llama, &PROMPT[..6], &options);
        (got.token_ids, commits(&events))
    };
    let sampling = Sampling { top_k: Some(50), top_p: Some(0.95), ..Sampling::greedy() };
    let mode = Mode::Autoregressive;
    let causal = DecodeOptions { mode, sampling, max_tokens: 12, ..block(1, fixed(1), 0) };
    for options in [&random, &causal] {
        assert_eq!(at(1, 1.0, options), at(1, 1.0, options));
        assert_ne!(at(1, 1.0, options).0, at(2, 1.0, options).0);
    }
    assert_eq!(at(1, 1.0, &random), at(1, 1.0, &unfused(random.clone())));
    assert_ne!(at(1, 0.0, &random).1, at(2, 0.0, &random).1, "the order is random");
    // Without temperature or random order the seed is unused.
    let greedy = block(4, fixed(4), 12);
    assert_eq!(at(1, 0.0, &greedy), at(2, 0.0, &greedy));
}

#[test]
fn autoregressive_greedy_is_the_argmax_of_a_full_pass() {
    let Some(llama) = tiny() else { return };
    let options = DecodeOptions {
        max_tokens: 20,
        eos_ids: vec![],
        ..DecodeOptions::autoregressive(llama.config())
    };
    let (got, events) = run(&llama, &PROMPT, &options);
    assert_eq!((got.token_ids.len(), got.forwards), (20, 20));
    let mut x = PROMPT.to_vec();
    x.extend(&got.token_ids);
    let logits = full_pass(&llama, &x, Mask::Causal);
    for event in &events {
        if let Event::Committed { position, token, confidence, .. } = *event {
            let (want, p) = best(&logits[position - 1], None);
            assert_eq!(token, want);
            assert!((f64::from(confidence) - p).abs() < 1e-4);
        }
    }
    // Sampling among one token is greedy.
    let sampling = Sampling { top_k: Some(1), temperature: 1.0, ..Sampling::greedy() };
    let one = DecodeOptions { sampling, ..options };
    assert_eq!(answer(&llama, &PROMPT, &one), got.token_ids);
}

#[test]
fn the_caller_can_break_off() {
    let Some(llama) = tiny() else { return };
    for options in [block(4, fixed(4), 40), DecodeOptions::autoregressive(llama.config())] {
        let options = DecodeOptions { eos_ids: vec![], max_tokens: 40, ..options };
        let free = answer(&llama, &PROMPT, &options);
        let mut left = 5;
        let got = generate(&llama, &PROMPT, &options, |event| {
            left -= usize::from(matches!(event, Event::Committed { .. }));
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        let got = got.expect("breaking off is no error");
        assert_eq!((got.finish_reason, got.forwards), (FinishReason::Interrupted, 5));
        assert!(free.starts_with(&got.token_ids) && got.token_ids.len() <= 5);
    }
}

#[test]
fn requests_that_do_not_fit_are_refused() {
    let Some(llama) = tiny() else { return };
    let fine = block(4, fixed(4), 8);
    let causal = DecodeOptions::autoregressive(llama.config());
    let refused = |prompt: &[u32], options: &DecodeOptions, word: &str| {
        let result = generate(&llama, prompt, options, |_| panic!("nothing runs"));
        let Err(Error::Request(why)) = &result else { panic!("{word}: {result:?}") };
        assert!(why.contains(word), "{why}");
    };
    refused(&[97], &fine, "vocabulary");
    for options in [&fine, &causal] {
        let long = |max_tokens| DecodeOptions { max_tokens, ..options.clone() };
        refused(&PROMPT, &long(246), "positions");
        refused(&PROMPT, &long(usize::MAX), "positions");
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            let options = drawn(options.clone(), 0, temperature);
            refused(&[1], &DecodeOptions { max_tokens: 8, ..options }, "temperature");
        }
    }
    refused(&PROMPT, &change(fine.clone(), |b| b.block_length = 0), "block_length");
    refused(&PROMPT, &change(fine.clone(), |b| b.mask_id = 97), "mask token");
    refused(&PROMPT, &change(fine.clone(), |b| b.schedule = fixed(0)), "steps");
    let nan = Schedule::Threshold(f32::NAN);
    refused(&PROMPT, &change(fine.clone(), |b| b.schedule = nan), "threshold");
    refused(&[], &DecodeOptions { max_tokens: 8, ..causal.clone() }, "empty");
    for (top_k, top_p, repetition_penalty, word) in [
        (Some(0), None, 1.0, "top_k"),
        (None, Some(0.0), 1.0, "top_p"),
        (None, None, 0.0, "repetition_penalty"),
    ] {
        let sampling = Sampling { top_k, top_p, repetition_penalty, ..Sampling::greedy() };
        refused(&[1], &DecodeOptions { sampling, max_tokens: 8, ..causal.clone() }, word);
    }
    refused(&[1], &DecodeOptions { eos_ids: vec![3; 17], ..fine.clone() }, "stop tokens");
    for schedule in [Schedule::Factor(f32::NAN), Schedule::EntropyBound(f32::NAN)] {
        refused(&PROMPT, &change(fine.clone(), |b| b.schedule = schedule), "not a number");
    }
    assert!(matches!(score(&llama, &[97], &Mode::Autoregressive), Err(Error::Request(_))));
    assert!(matches!(score(&llama, &[1; 257], &Mode::Autoregressive), Err(Error::Request(_))));
    // The golden model's configuration names no mask token.
    assert!(matches!(DecodeOptions::block(llama.config()), Err(Error::Request(_))));
    assert_eq!(DecodeOptions::for_model(llama.config()), causal);
}

#[test]
fn lengths_at_the_limits_are_served() {
    let Some(llama) = tiny() else { return };
    let (none, events) = run(&llama, &PROMPT, &block(4, fixed(4), 0));
    assert_eq!((none.token_ids.len(), none.forwards), (0, 0));
    assert_eq!(events, [Event::Finished { reason: FinishReason::Length }]);
    assert!(answer(&llama, &[], &block(4, fixed(4), 0)).is_empty());
    let all = block(64, Schedule::Threshold(0.0), 256 - PROMPT.len());
    assert_eq!(answer(&llama, &PROMPT, &all).len(), 256 - PROMPT.len());
    // A block longer than everything.
    assert_eq!(answer(&llama, &PROMPT, &block(usize::MAX, fixed(1), 9)).len(), 9);
}

#[test]
fn scores_are_the_log_softmax_of_the_golden_logits() -> Result<()> {
    let Some(llama) = tiny() else { return Ok(()) };
    let file = std::fs::read(golden("tiny/golden.safetensors")).expect("the golden is there");
    let file = SafeTensors::deserialize(&file).expect("valid safetensors");
    let tokens = file.tensor("ar.tokens").expect("a key").data().to_vec();
    let logits = file.tensor("ar.logits").expect("a key").data().to_vec();
    let tokens: Vec<u32> = bytemuck::pod_collect_to_vec(&tokens);
    let logits: Vec<f32> = bytemuck::pod_collect_to_vec(&logits);
    let mut all = Vec::new();
    for (row, tokens) in tokens.chunks(37).enumerate() {
        let scores = score(&llama, tokens, &Mode::Autoregressive)?;
        assert_eq!((scores.len(), scores[0]), (37, None));
        for i in 1..37 {
            let z = &logits[(row * 37 + i - 1) * 97..][..97];
            let sum: f64 = z.iter().map(|&z| f64::from(z).exp()).sum();
            let want = f64::from(z[tokens[i] as usize]) - sum.ln();
            let got = f64::from(scores[i].expect("all but the first are scored"));
            assert!((got - want).abs() < 1e-4, "{got} instead of {want}");
        }
        all.extend(scores);
    }
    let text = std::fs::read(golden("tiny/golden.json")).expect("the golden is there");
    let value: Value = serde_json::from_slice(&text).expect("valid JSON");
    let loss = value["ar"]["loss"].as_f64().expect("a loss");
    assert!((perplexity(&all).expect("scores").ln() - loss).abs() < 1e-5);
    let bits = bits_per_byte(&all, 72).expect("bytes");
    assert!((bits - loss / std::f64::consts::LN_2).abs() < 1e-4);
    assert_eq!(score(&llama, &[], &Mode::Autoregressive)?, []);
    assert_eq!(score(&llama, &[5], &Mode::Autoregressive)?, [None]);
    Ok(())
}

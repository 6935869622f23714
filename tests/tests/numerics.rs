//! Numbers that are none are seen. What is not finite in any input of any op, or in any parameter of a model, forward
//! and backward, reaches what checks for it, on every driver; and no kernel leans on what drivers differ in.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Instant;

use demask_engine::autograd::{Gradients, backward};
use demask_engine::decode::{BlockOptions, DecodeOptions, Mode, Sampling, generate, score};
use demask_engine::gpu::Gpu;
use demask_engine::model::{Inputs, Llama, Parameter, Precision};
use demask_engine::numerics::probe;
use demask_engine::ops::case::{Case, Input};
use demask_engine::ops::{AttentionOptions, Mask, Supervision, cases, linear_cross_entropy};
use demask_engine::tensor::host::Array;
use demask_engine::tensor::{DType, Tensor};
use demask_engine::{Error, selftest};
use demask_tests::{checked_gpu, golden, gpu, report};
use demask_trainer::optim::OptimizerState;
use demask_trainer::recipe::Optimizer;

const BROKEN: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// Ops whose formula has a finite limit at an infinity, as exp has at -infinity: there the reference says whether it
/// must be seen.
const LIMITS: [&str; 8] = ["exp", "tanh", "sigmoid", "silu", "relu", "recip", "div", "max"];

fn is_finite(values: &[f32]) -> bool {
    values.iter().all(|v| v.is_finite())
}

/// Up to two of the elements that matter: where another value changes what the op gives.
fn picked(n: usize, matters: impl FnMut(&usize) -> bool) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    // All over the tensor, and all of a small one.
    let spread = (0..40).map(|i| if n > 40 { i * 7919 % n } else { i }).filter(|i| *i < n);
    spread.filter(|i| seen.insert(*i)).filter(matters).take(2).collect()
}

/// What is tried at each of the elements that were picked.
fn tries(picked: &[usize]) -> Vec<(usize, f32)> {
    BROKEN
        .iter()
        .enumerate()
        .filter_map(|(i, &v)| Some((*picked.get(i % picked.len().max(1))?, v)))
        .collect()
}

/// A gradient that is not finite moves no weight: the norm, an op of its own, tells of it.
fn is_told_by_the_norm(case: &Case, input: usize) -> bool {
    case.name.starts_with("adamw") && input == 1
}

/// Of one class, or one of equals, no element matters; nor does one of a case that is of an overflow already.
fn has_nothing_to_break(case: &Case) -> bool {
    let names = ["softmax [1]", "max of equals", "grad_norm of an overflow"];
    names.contains(&case.name.as_str())
        || case.name.starts_with("gather 0 rows")
        || case.name.contains("shards [1] ")
        // Moments depend on the gradient alone, of which the norm tells.
        || case.name.starts_with("adamw8 mean")
        || case.inputs.iter().any(|input| input.shape().numel() == 0)
        || case.inputs.iter().all(|input| matches!(input, Input::Integers(..)))
}

/// An op's answer.
fn forward(gpu: &Gpu, case: &Case, values: &[Array]) -> Result<Vec<f32>, String> {
    let uploaded = case.inputs.iter().zip(values).map(|(input, v)| input.upload(gpu, v));
    (case.run)(&uploaded.collect::<Vec<_>>()).to_vec().map_err(|e| e.to_string())
}

/// True if a gradient is not finite; `None` without gradients.
fn gradients_tell(gpu: &Gpu, case: &Case, values: &[Array], dy: &[f32]) -> Option<bool> {
    let upload = |(input, v): (&Input, &Array)| {
        let tensor = input.upload(gpu, v);
        if input.is_differentiable() { tensor.trainable() } else { tensor }
    };
    let leaves: Vec<Tensor> = case.inputs.iter().zip(values).map(upload).collect();
    let y = (case.run)(&leaves);
    if !y.is_tracked() {
        return None;
    }
    let mut gradients = Gradients::new();
    backward(&y, &Tensor::from_f32(gpu, dy, y.shape()), &mut gradients);
    let broken = |leaf| gradients.get(leaf).is_some_and(|g| !is_finite(&g.to_vec().unwrap()));
    Some(leaves.iter().any(broken))
}

/// What stays unseen of a case, and how many places were tried.
fn unseen(gpu: &Gpu, case: &Case) -> (Vec<String>, usize) {
    let (mut failures, mut tried) = (Vec::new(), 0);
    let mut values: Vec<Array> =
        case.inputs.iter().enumerate().map(|(i, input)| input.values(21 + i as u64)).collect();
    let want = (case.reference)(&values);
    let op = case.name.split(' ').next().unwrap_or_default();
    let has_limits = LIMITS.iter().any(|name| op.starts_with(name));
    for (i, input) in case.inputs.iter().enumerate() {
        if matches!(input, Input::Integers(..)) || is_told_by_the_norm(case, i) {
            continue;
        }
        let mut with = |at: usize, value: f64| {
            let before = std::mem::replace(&mut values[i].data[at], value);
            let result = (case.reference)(&values);
            values[i].data[at] = before;
            result
        };
        let matters = |at: &usize| [1e3, -1e3].iter().any(|&v| with(*at, v).data != want.data);
        for (at, broken) in tries(&picked(input.shape().numel(), matters)) {
            let before = std::mem::replace(&mut values[i].data[at], f64::from(broken));
            let must = broken.is_nan()
                || !has_limits
                || (case.reference)(&values).data.iter().any(|y| !y.is_finite());
            let answer = forward(gpu, case, &values);
            values[i].data[at] = before;
            tried += 1;
            if must && answer.is_ok_and(|y| is_finite(&y)) {
                failures.push(format!("{}: {broken} at {at} of input {i} is lost", case.name));
            }
        }
    }
    let mut other = values.clone();
    for (input, values) in case.inputs.iter().zip(&mut other) {
        if input.is_differentiable() {
            values.data.iter_mut().for_each(|v| *v += 0.25);
        }
    }
    let other = (case.reference)(&other);
    let depends = |at: &usize| want.data[*at] != other.data[*at];
    for (at, broken) in tries(&picked(want.data.len(), depends)) {
        let mut dy = vec![0.5; want.data.len()];
        dy[at] = broken;
        match gradients_tell(gpu, case, &values, &dy) {
            Some(true) => tried += 1,
            Some(false) => {
                failures.push(format!("{}: {broken} at {at} of the cotangent is lost", case.name))
            }
            None => break,
        }
    }
    (failures, tried)
}

#[test]
fn what_is_not_finite_in_any_op_is_seen() {
    // As tests/ops.rs has it, so that the driver's cache has the kernels for both.
    let Some(gpu) = checked_gpu() else { return };
    let only = std::env::var("CASE").unwrap_or_default();
    let (mut failures, mut ran) = (Vec::new(), 0);
    for case in cases().iter().filter(|c| c.name.contains(&only) && c.runs_on(&gpu)) {
        if case.cost.is_some_and(|c| c.flops > 2e6 || c.bytes > 4e6) {
            continue;
        }
        let start = Instant::now();
        let (lost, tried) = unseen(&gpu, case);
        if start.elapsed().as_secs_f64() > 0.5 {
            println!("{:.1} s: {}", start.elapsed().as_secs_f64(), case.name);
        }
        if tried == 0 && !has_nothing_to_break(case) {
            failures.push(format!("{}: nothing was tried", case.name));
        }
        failures.extend(lost);
        ran += 1;
    }
    assert!(ran > 0, "no case matches CASE={only}");
    println!("{ran} cases on {}", gpu.adapter().describe());
    report(failures);
}

const PROMPT: [u32; 11] = [57, 11, 28, 44, 39, 92, 35, 61, 2, 60, 21];
const MASK_ID: u32 = 96;

fn block() -> Mode {
    Mode::Block(BlockOptions::new(MASK_ID, 4))
}

/// Puts a value into an element of a parameter while `work` runs; of a table, into the row of a token of the prompt.
fn broken_in<R>(parameter: &Parameter, value: f32, work: impl FnOnce() -> R) -> R {
    let shard = &parameter.shards[0];
    let sound = shard.to_vec().expect("the device works");
    let mut values = sound.clone();
    let at = PROMPT[5] as usize * shard.shape().last() + 3;
    values[if parameter.name.contains("embed") { at } else { sound.len() / 2 }] = value;
    shard.overwrite(&values);
    let result = work();
    shard.overwrite(&sound);
    result
}

/// Which ways of using the model do not tell that it is broken: autoregressive ones and, with `blocks`, block-wise.
fn trusting(llama: &Llama, blocks: bool) -> Vec<&'static str> {
    let mut trusting = Vec::new();
    let modes = [("autoregressive", Mode::Autoregressive), ("block", block())];
    for (name, mode) in modes.into_iter().take(1 + usize::from(blocks)) {
        let scores = score(llama, &PROMPT, &mode).expect("the device works");
        if scores.iter().flatten().all(|s| s.is_finite()) {
            trusting.push(if name == "block" { "block score" } else { "score" });
        }
        let (sampling, eos_ids) = (Sampling::greedy(), vec![]);
        let options = DecodeOptions { mode, max_tokens: 4, sampling, eos_ids };
        match generate(llama, &PROMPT, &options, |_| ControlFlow::Continue(())) {
            Err(Error::Request(why)) => assert!(why.contains("no finite logits"), "{why}"),
            Err(other) => panic!("{other}"),
            Ok(_) => trusting.push(name),
        }
    }
    trusting
}

#[test]
fn what_is_not_finite_in_any_parameter_is_seen_in_decoding_and_scoring() {
    let Some(gpu) = gpu() else { return };
    let mut failures = Vec::new();
    for (model, cache) in [("tiny", DType::F32), ("tiny", DType::F16), ("tiny_tied", DType::F32)] {
        let llama = Llama::load(&gpu, &golden(model), Precision::F32).expect("it loads");
        let llama = llama.cached_in(cache);
        for parameter in llama.parameters() {
            // What is tied is one table; of infinities it is enough to see one way what they become.
            if model == "tiny_tied" && !parameter.name.contains("embed") {
                continue;
            }
            for value in BROKEN {
                let all = value.is_nan();
                if !all && cache == DType::F16 {
                    continue;
                }
                let trusting = broken_in(parameter, value, || trusting(&llama, all));
                let lost =
                    |way| format!("{model}, {cache:?}: {value} in {}: {way}", parameter.name);
                failures.extend(trusting.into_iter().map(lost));
            }
        }
        assert_eq!(trusting(&llama, true).len(), 4, "the sound model is trusted");
    }
    report(failures);
}

/// The mean cross-entropy of the prompt, causal or with both copies of it.
fn loss(model: &Llama, mask: Mask) -> Tensor {
    let (gpu, n) = (model.gpu(), PROMPT.len() - 1);
    let copies = if mask == Mask::Causal { 1 } else { 2 };
    let tokens = PROMPT[..n].repeat(copies);
    let positions: Vec<u32> = (0..n as u32).collect::<Vec<_>>().repeat(copies);
    let inputs = Inputs {
        tokens: Tensor::from_u32(gpu, &tokens, [1, tokens.len()]),
        positions: Tensor::from_u32(gpu, &positions, [1, tokens.len()]),
        attention: AttentionOptions::new(mask),
    };
    let rows: Vec<u32> = (0..n as u32).collect();
    let supervision = Supervision {
        targets: Tensor::from_u32(gpu, &PROMPT[1..], [n]),
        weights: Tensor::from_f32(gpu, &vec![1.0; n], [n]),
        divisor: n as f32,
    };
    let hidden = model.hidden_at(&inputs, &Tensor::from_u32(gpu, &rows, [n]), false);
    linear_cross_entropy(&hidden, model.head(), &supervision).loss
}

#[test]
fn what_is_not_finite_in_any_parameter_is_seen_in_training_and_moves_nothing() {
    let Some(gpu) = gpu() else { return };
    let model = Llama::load(&gpu, &golden("tiny"), Precision::F32).expect("it loads").trainable();
    let settings = Optimizer::default();
    let mut optimizer = OptimizerState::new(&model, &settings);
    let mut failures = Vec::new();
    let mut step = |mask: Mask| -> [f32; 2] {
        let loss = loss(&model, mask);
        let mut gradients = Gradients::new();
        backward(&loss, &Tensor::from_f32(&gpu, &[1.0], [1]), &mut gradients);
        let norm = optimizer.step(&model, &gradients, &settings, 1e-2, f32::INFINITY);
        [loss.item().unwrap(), norm.expect("the device works").to_vec().unwrap()[0]]
    };
    let all = || -> Vec<f32> {
        model.parameters().iter().flat_map(|p| p.shards[0].to_vec().unwrap()).collect()
    };
    let before = all();
    for parameter in model.parameters() {
        for value in BROKEN {
            for mask in [Mask::Causal, Mask::TwoCopy(5)] {
                let [loss, norm] = broken_in(parameter, value, || step(mask));
                if loss.is_finite() || norm.is_finite() {
                    let name = &parameter.name;
                    failures.push(format!("{value} in {name}: {mask:?}: {loss}, norm {norm}"));
                }
            }
        }
    }
    assert!(all() == before, "a step that is not trusted moved a weight");
    report(failures);
    let [loss, norm] = step(Mask::Causal);
    assert!(loss.is_finite() && norm.is_finite() && all() != before, "{loss} {norm}");
}

#[test]
fn a_drivers_arithmetic_is_told() {
    let Some(gpu) = gpu() else { return };
    let rows = probe(&gpu).expect("the device works");
    for row in &rows {
        let differs = if row.differs { "differs" } else { "" };
        println!("{:<36} {:<14} {differs}", row.expression, row.text());
    }
    let named = |name: &str| rows.iter().find(|r| r.expression == name).expect("a row").text();
    assert_eq!(named("NaN * 0"), "NaN");
    assert_eq!(named("exp(89)"), "inf");
    assert_eq!(named("f16 of 65519"), "65504");
    assert_eq!(named("sqrt(-0)"), "-0");
    let lost: Vec<_> = rows.iter().filter(|r| r.needed && r.differs).collect();
    assert!(lost.is_empty(), "{lost:?}");
    let checks = selftest::run(&gpu).expect("the device works");
    assert!(checks.iter().any(|c| c.name == "NaN and infinity are kept" && c.ok));
}

//! Every case of every op: forward, gradient, fan-out, stray writes, determinism, in checked shader mode.

use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::Gpu;
use demask_engine::ops::case::{Case, Input, Tolerance};
use demask_engine::ops::{add, cases, linear, mul, rope_into_cache, scale};
use demask_engine::philox::Philox;
use demask_engine::tensor::host::Array;
use demask_engine::tensor::{DType, Tensor};
use demask_tests::{checked_gpu, compare, report};

/// Runs `check` over every case this device can run and collects what failed.
fn for_each_case(check: impl Fn(&Gpu, &Case) -> Result<(), String>) {
    let Some(gpu) = checked_gpu() else { return };
    let only = std::env::var("CASE").unwrap_or_default();
    let mut failures = Vec::new();
    let mut ran = 0;
    for case in cases().iter().filter(|c| c.name.contains(&only)) {
        if !case.runs_on(&gpu) {
            println!("SKIPPED: {}: this device has not what it needs", case.name);
            continue;
        }
        // Benches' extents are too large for references in f64; their kernels are those of smaller cases.
        if case.cost.is_some_and(|c| c.flops > 2e6 || c.bytes > 4e6) {
            continue;
        }
        ran += 1;
        failures.extend(check(&gpu, case).err());
    }
    assert!(ran > 0, "no case matches CASE={only}");
    println!("{ran} cases on {}", gpu.adapter().describe());
    report(failures);
}

fn values(case: &Case, seed: u64) -> Vec<Array> {
    case.inputs.iter().enumerate().map(|(i, input)| input.values(seed + i as u64)).collect()
}

fn upload(gpu: &Gpu, case: &Case, values: &[Array]) -> Vec<Tensor> {
    case.inputs.iter().zip(values).map(|(input, v)| input.upload(gpu, v)).collect()
}

fn check_forward(gpu: &Gpu, case: &Case) -> Result<(), String> {
    let values = values(case, 11);
    let inputs = upload(gpu, case, &values);
    let y = (case.run)(&inputs);
    let want = (case.reference)(&values);
    if *y.shape() != want.shape {
        return Err(format!("{}: shape {} instead of {}", case.name, y.shape(), want.shape));
    }
    let got = y.to_vec().map_err(|e| format!("{}: {e}", case.name))?;
    for tensor in inputs.iter().chain([&y]) {
        let intact = gpu.check_guards(tensor.buffer()).map_err(|e| e.to_string())?;
        if !intact {
            return Err(format!("{}: wrote behind {tensor:?}", case.name));
        }
    }
    compare(&case.name, &got, &want.data, case.tolerance)
}

#[test]
fn forward_matches_the_reference() {
    for_each_case(check_forward);
}

#[test]
fn two_runs_are_bit_equal() {
    for_each_case(|gpu, case| {
        let inputs = upload(gpu, case, &values(case, 12));
        let bits = || -> Result<Vec<u32>, String> {
            let y = (case.run)(&inputs).to_vec().map_err(|e| e.to_string())?;
            Ok(y.into_iter().map(f32::to_bits).collect())
        };
        if bits()? == bits()? { Ok(()) } else { Err(format!("{}: two runs differ", case.name)) }
    });
}

/// Σ w ⊙ f(x) in f64.
fn objective(case: &Case, x: &[Array], weights: &[f64]) -> f64 {
    (case.reference)(x).data.iter().zip(weights).map(|(y, w)| y * w).sum()
}

/// The op sits mid-graph: its inputs come through a node, its output goes into a random cotangent.
fn device_gradients(
    gpu: &Gpu,
    case: &Case,
    values: &[Array],
    weights: &[f64],
    twice: bool,
) -> Result<Option<Vec<Option<Vec<f32>>>>, String> {
    let leaves: Vec<Tensor> = upload(gpu, case, values)
        .into_iter()
        .zip(&case.inputs)
        .map(|(t, input)| if input.is_differentiable() { t.trainable() } else { t })
        .collect();
    let through: Vec<Tensor> = leaves.iter().map(|t| t.reshape(t.shape())).collect();
    let mut gradients = Gradients::new();
    let w: Vec<f32> = weights.iter().map(|&w| w as f32).collect();
    let mut y = (case.run)(&through);
    if !y.is_tracked() {
        return Ok(None);
    }
    if twice {
        y = add(&y, &(case.run)(&through));
    }
    let cotangent = Tensor::from_f32(gpu, &w, y.shape());
    backward(&y, &cotangent, &mut gradients);
    let read = |t: &Tensor| -> Result<Option<Vec<f32>>, String> {
        let Some(g) = gradients.get(t) else { return Ok(None) };
        if !gpu.check_guards(g.buffer()).map_err(|e| e.to_string())? {
            return Err(format!("{}: wrote behind the gradient {g:?}", case.name));
        }
        g.to_vec().map(Some).map_err(|e| format!("{}: {e}", case.name))
    };
    leaves.iter().map(read).collect::<Result<Vec<_>, _>>().map(Some)
}

fn cotangent(case: &Case, values: &[Array]) -> Vec<f64> {
    let mut random = Philox::new(5, [1, 2, 3]);
    let n = (case.reference)(values).shape.numel();
    (0..n).map(|_| f64::from(random.normal())).collect()
}

/// Elements of an input to differentiate: all of a small one, a sample of a large one.
fn sample(n: usize) -> Vec<usize> {
    const MOST: usize = 40;
    if n <= MOST {
        return (0..n).collect();
    }
    let mut random = Philox::new(6, [n as u32, 0, 0]);
    (0..MOST).map(|_| random.below(n as u32) as usize).collect()
}

fn check_gradients(gpu: &Gpu, case: &Case) -> Result<(), String> {
    let mut values = values(case, 13);
    let weights = cotangent(case, &values);
    let Some(gradients) = device_gradients(gpu, case, &values, &weights, false)? else {
        return Ok(());
    };
    for (i, input) in case.inputs.iter().enumerate() {
        let Some(gradient) = &gradients[i] else {
            if input.is_differentiable() && input.shape().numel() > 0 {
                return Err(format!("{}: input {i} got no gradient", case.name));
            }
            continue;
        };
        let picked = sample(input.shape().numel());
        let mut want = Vec::new();
        for &at in &picked {
            let x = values[i].data[at];
            // f64 leaves 1e-6² · f''' of truncation and 1e-16 / 1e-6 of rounding: both far below f32.
            let h = 1e-5 * x.abs().max(1.0);
            values[i].data[at] = x + h;
            let up = objective(case, &values, &weights);
            values[i].data[at] = x - h;
            let down = objective(case, &values, &weights);
            values[i].data[at] = x;
            want.push((up - down) / (2.0 * h));
        }
        let got: Vec<f32> = picked.iter().map(|&at| gradient[at]).collect();
        // A gradient sums over the other operand and over outliers of the cotangent.
        let scale = want.iter().fold(1.0f64, |m, w| m.max(w.abs()));
        let tolerance = Tolerance {
            absolute: case.tolerance.absolute * scale,
            relative: case.tolerance.relative * 4.0,
        };
        compare(&format!("{} gradient {i}", case.name), &got, &want, tolerance)?;
    }
    Ok(())
}

#[test]
fn gradients_match_central_differences() {
    for_each_case(check_gradients);
}

#[test]
fn an_input_used_twice_gets_both_gradients() {
    for_each_case(|gpu, case| {
        let values = values(case, 14);
        let weights = cotangent(case, &values);
        let once = device_gradients(gpu, case, &values, &weights, false)?;
        let twice = device_gradients(gpu, case, &values, &weights, true)?;
        let (Some(once), Some(twice)) = (once, twice) else { return Ok(()) };
        for (one, two) in once.into_iter().zip(twice) {
            let (Some(one), Some(two)) = (one, two) else { continue };
            let want: Vec<f64> = one.iter().map(|&g| 2.0 * f64::from(g)).collect();
            compare(&format!("{} used twice", case.name), &two, &want, Tolerance::F32)?;
        }
        Ok(())
    });
}

/// What a caller or another branch holds stays as it is, and a weight's gradient takes no pass of its own to add up.
#[test]
fn gradients_are_added_in_place_only_where_no_one_else_holds_them() {
    let Some(gpu) = checked_gpu() else { return };
    let tensor = |seed: u64, shape: [usize; 2]| {
        let values = Input::Normal(shape.into()).values(seed);
        Tensor::from_f32(&gpu, &values.data.iter().map(|&v| v as f32).collect::<Vec<_>>(), shape)
    };
    let (x, w) = (tensor(1, [4, 8]).trainable(), tensor(2, [8, 8]).trainable());
    let cotangent = tensor(3, [4, 8]);
    let before = cotangent.to_vec().expect("a cotangent");
    let mut gradients = Gradients::new();
    let mut dispatches = Vec::new();
    let mut dw = Vec::new();
    for _ in 0..2 {
        // `add` hands the same cotangent to x and to the layer, whose derivative then has more for x.
        let y = add(&x, &linear(&x, std::slice::from_ref(&w)));
        gpu.reset_stats();
        backward(&y, &cotangent, &mut gradients);
        dispatches.push(gpu.stats().dispatches);
        dw.push(gradients.get(&w).expect("a gradient").to_vec().expect("its values"));
    }
    assert_eq!(cotangent.to_vec().expect("a cotangent"), before, "a cotangent was added to");
    let doubled: Vec<f32> = dw[0].iter().map(|g| 2.0 * g).collect();
    assert_eq!(dw[1], doubled, "the same again is twice as much");
    // First: two products, and a sum for x, whose first part others hold. Then both products add to what is there, and
    // the first part is added in a pass.
    assert_eq!(dispatches, [3, 3], "dispatches of the two backward passes");
}

/// Names are what CASE= selects by and what a failure points at.
#[test]
fn case_names_are_unique_and_inputs_not_all_empty() {
    let cases = cases();
    let mut names: Vec<_> = cases.iter().map(|c| &c.name).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), cases.len(), "two cases share a name");
    assert!(cases.iter().any(|c| c.inputs.iter().any(|i| matches!(i, Input::Normal(_)))));
}

/// The harness must be able to fail: a wrong value, a NaN, and a wrong length are all reported.
#[test]
fn the_comparison_can_fail() {
    let tolerance = Tolerance::F32;
    assert!(compare("ok", &[1.0], &[1.0], tolerance).is_ok());
    assert!(compare("off", &[1.001], &[1.0], tolerance).is_err());
    assert!(compare("nan", &[f32::NAN], &[1.0], tolerance).is_err());
    assert!(compare("nan wanted", &[1.0], &[f64::NAN], tolerance).is_err());
    assert!(compare("short", &[], &[1.0], tolerance).is_err());
}

/// Each check must be able to fail: an op that is wrong in one way only is caught by the check for it.
#[test]
fn broken_ops_are_caught() {
    let Some(gpu) = checked_gpu() else { return };
    let case = |run: fn(&[Tensor]) -> Tensor| {
        let inputs = vec![Input::Normal([3, 5].into())];
        Case::new("broken", inputs, run, |x| x[0].map(|v| v * v))
    };
    let right = case(|t| mul(&t[0], &t[0]));
    assert_eq!(check_forward(&gpu, &right), Ok(()));
    assert_eq!(check_gradients(&gpu, &right), Ok(()));
    let wrong_value = case(|t| scale(&mul(&t[0], &t[0]), 1.001));
    assert!(check_forward(&gpu, &wrong_value).unwrap_err().contains("values differ"));
    let wrong_shape = case(|t| mul(&t[0], &t[0]).reshape([5, 3]));
    assert!(check_forward(&gpu, &wrong_shape).unwrap_err().contains("shape"));
    // The right value with half its derivative: a factor is cut from the graph.
    let lost = case(|t| mul(&t[0], &t[0].detach()));
    assert_eq!(check_forward(&gpu, &lost), Ok(()));
    assert!(check_gradients(&gpu, &lost).unwrap_err().contains("gradient 0"));
}

/// Values that f16 has no number for: large ones are cut, what is none stays none, so that logits tell of it.
#[test]
fn a_cache_in_f16_hides_no_broken_value() {
    let Some(gpu) = checked_gpu() else { return };
    let row = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1e6, -1e6, f32::INFINITY, f32::NAN];
    let x = Tensor::from_f32(&gpu, &row, [1, 12]);
    let places = Tensor::from_u32(&gpu, &[0, 0], [1, 2]);
    let inv_freq = Tensor::from_f32(&gpu, &[1.0, 0.1], [2]);
    let empty = || Tensor::zeros(&gpu, [1, 1, 1, 4], DType::F16, "cache");
    let (keys, values) = (empty(), empty());
    rope_into_cache(&x, &places, (&inv_freq, 1.0), &keys, &values);
    let bytes = values.to_bytes().expect("the device works");
    let halves: Vec<u16> = bytes.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    let is_nan = |half: u16| half & 0x7fff > 0x7c00;
    assert_eq!(halves[..2], [0x7bff, 0xfbff]);
    assert!(is_nan(halves[2]) && is_nan(halves[3]), "{halves:x?}");
}

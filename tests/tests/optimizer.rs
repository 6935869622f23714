//! AdamW on moments in 8 bits: what a case cannot say, because it takes many steps or the state between them.

use demask_engine::gpu::Gpu;
use demask_engine::ops::case::{Input, Tolerance};
use demask_engine::ops::{AdamW, Moments8, adamw_step, adamw8_step, decode_moments, grad_norm};
use demask_engine::philox::Philox;
use demask_engine::tensor::{DType, Tensor};
use demask_tests::{checked_gpu, compare};

const SETTINGS: AdamW =
    AdamW { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step: 1 };

fn normal(seed: u64, n: usize) -> Vec<f32> {
    Input::Normal([n].into()).values(seed).data.into_iter().map(|v| v as f32).collect()
}

/// Whose gradients are neither scaled nor clipped.
fn whole(gpu: &Gpu) -> Tensor {
    Tensor::from_f32(gpu, &[1.0, 1.0], [2])
}

/// Decoded, without the units.
fn values(moments: &Moments8, n: usize) -> [Vec<f64>; 2] {
    let decoded = decode_moments(moments, n).expect("moments");
    decoded.map(|moment| moment.into_iter().map(|[x, _]| x).collect())
}

/// The distance from the code at or below `x` to the next.
fn spacing(x: f64, unit: f64) -> f64 {
    let exponent = (x.abs() / unit / 8.0).log2().floor().max(0.0);
    unit * 2f64.powf(exponent)
}

/// The weights, then the bits of everything that a step changes.
fn state(w: &Tensor, moments: &Moments8) -> (Vec<f32>, Vec<Vec<u8>>) {
    let tensors = [w, &moments.m, &moments.v, &moments.scales];
    (w.to_vec().expect("weights"), tensors.map(|t| t.to_bytes().expect("bytes")).to_vec())
}

/// Each step against f64 from the state that the one before left: weights to f32, moments to the next code.
#[test]
fn every_step_follows_the_formula() {
    let Some(gpu) = checked_gpu() else { return };
    for n in [1, 255, 256, 257, 1000, 5003] {
        let mut w = normal(1, n);
        let tensor = Tensor::from_f32(&gpu, &w, [n]);
        let moments = Moments8::zeros(&gpu, n);
        for step in 1..6 {
            // Over six decades, zeros among them.
            let size = |i: usize| if i % 7 == 3 { 0.0 } else { 10f32.powi(-((i % 6) as i32)) };
            let g: Vec<f32> = normal(1 + u64::from(step), n)
                .iter()
                .enumerate()
                .map(|(i, g)| g * size(i))
                .collect();
            let before = values(&moments, n);
            let settings = AdamW { step, ..SETTINGS };
            let grad = Tensor::from_f32(&gpu, &g, [n]);
            adamw8_step(&tensor, &grad, &moments, &whole(&gpu), settings, 0.5, 3);
            let AdamW { lr, beta1, beta2, eps, weight_decay, .. } = settings;
            let bias = [1.0 - beta1.powi(step as i32), 1.0 - beta2.powi(step as i32)];
            let after = decode_moments(&moments, n).expect("moments");
            let mut want = Vec::new();
            for i in 0..n {
                let g = 0.5 * f64::from(g[i]);
                let m = beta1 * before[0][i] + (1.0 - beta1) * g;
                let v = beta2 * before[1][i] + (1.0 - beta2) * g * g;
                let kept = f64::from(w[i]) * (1.0 - lr * weight_decay);
                want.push(kept - lr * m / bias[0] / ((v / bias[1]).sqrt() + eps));
                for (which, exact) in [m, v].into_iter().enumerate() {
                    let [got, unit] = after[which][i];
                    let off = (got - exact).abs();
                    let bound = 1.0001 * spacing(exact, unit);
                    assert!(off <= bound, "{n}: step {step}, [{i}]: {got} instead of {exact}");
                    assert!(exact != 0.0 || got == 0.0, "zero stays zero");
                }
                assert!(v == 0.0 || after[1][i][0] > 0.0, "what divides is not zero");
            }
            let got = tensor.to_vec().expect("weights");
            compare("adamw8", &got, &want, Tolerance::F32).unwrap();
            w = got;
            for t in [&tensor, &moments.m, &moments.v, &moments.scales] {
                assert!(gpu.check_guards(t.buffer()).expect("guards"), "wrote behind {t:?}");
            }
        }
    }
}

/// 0.1 % a step is far below the distance of two codes: only rounding that is right on average gets from the squares of
/// one gradient to those of another.
#[test]
fn the_mean_square_of_a_constant_gradient_arrives() {
    let Some(gpu) = checked_gpu() else { return };
    let (n, turn) = (4096, 500);
    let mut random = Philox::new(23, [0; 3]);
    let first: Vec<f32> = (0..n).map(|_| 10f32.powf(-4.0 * random.uniform())).collect();
    let second: Vec<f32> = first.iter().rev().copied().collect();
    let gradients = [&first, &second].map(|g| Tensor::from_f32(&gpu, g, [n]));
    let (w, moments) = (Tensor::zeros(&gpu, [n], DType::F32, "w"), Moments8::zeros(&gpu, n));
    let mut exact = [vec![0.0; n], vec![0.0; n]];
    for step in 1..=3000 {
        let g = if step <= turn { &first } else { &second };
        for (i, g) in g.iter().map(|&g| f64::from(g)).enumerate() {
            exact[0][i] += (1.0 - SETTINGS.beta1) * (g - exact[0][i]);
            exact[1][i] += (1.0 - SETTINGS.beta2) * (g * g - exact[1][i]);
        }
        let grad = &gradients[usize::from(step > turn)];
        let settings = AdamW { step, ..SETTINGS };
        adamw8_step(&w, grad, &moments, &whole(&gpu), settings, 1.0, 5);
        if ![turn, 600, 1500, 3000].contains(&step) {
            continue;
        }
        let got = values(&moments, n);
        // Small, middle and large gradients each.
        for (from, to) in [(0.0, 0.001), (0.001, 0.03), (0.03, 2.0)] {
            let chosen: Vec<usize> = (0..n).filter(|&i| g[i] >= from && g[i] < to).collect();
            let [mean, square] = [0, 1].map(|which| {
                let ratio = |&i: &usize| got[which][i] / exact[which][i];
                chosen.iter().map(ratio).sum::<f64>() / chosen.len() as f64
            });
            println!("step {step}, gradients {from}..{to}: v {square:.4}, m {mean:.4}");
            assert!((square - 1.0).abs() < 0.03, "v is {square} of what it should be");
            assert!((mean - 1.0).abs() < 0.03, "m is {mean} of what it should be");
        }
    }
}

/// One step from one state under many seeds, and under many steps: their mean is the exact moment.
#[test]
fn rounding_is_right_on_average() {
    let Some(gpu) = checked_gpu() else { return };
    let (n, draws) = (512, 1024u32);
    let g: Vec<f32> =
        normal(9, n).iter().enumerate().map(|(i, g)| g * 10f32.powi(-((i % 4) as i32))).collect();
    let grad = Tensor::from_f32(&gpu, &g, [n]);
    let w = Tensor::zeros(&gpu, [n], DType::F32, "w");
    for by_step in [false, true] {
        let mut sums = [vec![0.0; n], vec![0.0; n]];
        let mut units = [vec![0.0; n], vec![0.0; n]];
        for draw in 1..=draws {
            let (step, seed) = if by_step { (draw, 1) } else { (1, u64::from(draw)) };
            let moments = Moments8::zeros(&gpu, n);
            let settings = AdamW { step, ..SETTINGS };
            adamw8_step(&w, &grad, &moments, &whole(&gpu), settings, 1.0, seed);
            let decoded = decode_moments(&moments, n).expect("moments");
            for which in 0..2 {
                for (i, &[x, unit]) in decoded[which].iter().enumerate() {
                    sums[which][i] += x / f64::from(draws);
                    units[which][i] = unit;
                }
            }
        }
        for (which, name) in ["m", "v"].into_iter().enumerate() {
            let (mut z, mut square) = (0.0, 0.0);
            for i in 0..n {
                let g = f64::from(g[i]);
                // Below its first unit v is rounded up.
                let exact = [0.1 * g, (0.001 * g * g).max(units[1][i])][which];
                let next = spacing(exact, units[which][i]);
                // Of a coin that shows up or down, at most.
                let deviation = 0.5 * next / f64::from(draws).sqrt();
                let off = (sums[which][i] - exact) / deviation;
                assert!(off.abs() < 5.0, "{name}[{i}] is {} instead of {exact}", sums[which][i]);
                z += off / (n as f64).sqrt();
                square += off * off / n as f64;
            }
            println!("{name}: {z:.2} standard deviations over all elements, square {square:.2}");
            assert!(z.abs() < 4.0, "{name} is off on average, by {z} standard deviations");
            // Fractions are evenly spread: 4 f (1 - f) is two thirds on average. Less were no chance, but a pattern.
            assert!(
                (square - 0.667).abs() < 0.2,
                "{name}: elements do not vary as coins: {square}"
            );
        }
    }
}

#[test]
fn without_a_finite_norm_nothing_changes() {
    let Some(gpu) = checked_gpu() else { return };
    let n = 777;
    let w = Tensor::from_f32(&gpu, &normal(1, n), [n]);
    let moments = Moments8::zeros(&gpu, n);
    let step = |grad: &Tensor, step: u32| {
        let norm_clip = grad_norm(&[grad], 1.0, 1.0);
        adamw8_step(&w, grad, &moments, &norm_clip, AdamW { step, ..SETTINGS }, 1.0, 3);
    };
    step(&Tensor::from_f32(&gpu, &normal(2, n), [n]), 1);
    let before = state(&w, &moments);
    for wrong in [f32::NAN, f32::INFINITY, 1e30] {
        let mut g = normal(3, n);
        g[500] = wrong;
        step(&Tensor::from_f32(&gpu, &g, [n]), 2);
        assert_eq!(state(&w, &moments), before, "a gradient of {wrong}");
    }
}

/// The bits are a function of inputs, step and seed; the state is all that a run needs to go on.
#[test]
fn a_run_that_resumes_is_the_unbroken_one() {
    let Some(gpu) = checked_gpu() else { return };
    let n = 5003;
    let steps = |w: &Tensor, moments: &Moments8, steps: std::ops::Range<u32>, seed: u64| {
        for step in steps {
            let grad = Tensor::from_f32(&gpu, &normal(u64::from(step), n), [n]);
            let norm_clip = grad_norm(&[&grad], 1.0, 1.0);
            adamw8_step(w, &grad, moments, &norm_clip, AdamW { step, ..SETTINGS }, 1.0, seed);
        }
        state(w, moments)
    };
    let start = || (Tensor::from_f32(&gpu, &normal(0, n), [n]), Moments8::zeros(&gpu, n));
    let (w, moments) = start();
    steps(&w, &moments, 1..5, 3);
    let again = |t: &Tensor| {
        let bytes = t.to_bytes().expect("bytes");
        Tensor::from_bytes(&gpu, &bytes, t.shape(), t.dtype(), "again")
    };
    let Moments8 { m, v, scales } = &moments;
    let read = Moments8 { m: again(m), v: again(v), scales: again(scales) };
    let resumed = steps(&again(&w), &read, 5..9, 3);
    assert_eq!(steps(&w, &moments, 5..9, 3), resumed);
    let (w, moments) = start();
    assert_eq!(steps(&w, &moments, 1..9, 3), resumed);
    let (w, moments) = start();
    assert_ne!(steps(&w, &moments, 1..9, 4), resumed, "another seed rounds otherwise");
}

/// A regression on noisy batches, its inputs over three decades, with the learning rate falling to nothing.
#[test]
fn a_regression_ends_where_f32_moments_end() {
    let Some(gpu) = checked_gpu() else { return };
    let (rows, n, batch, steps) = (1024, 300, 64, 400u32);
    let mut random = Philox::new(29, [0; 3]);
    let size: Vec<f32> = (0..n).map(|i| 10f32.powf(-3.0 * i as f32 / n as f32)).collect();
    let x: Vec<f32> = (0..rows * n).map(|i| random.normal() * size[i % n]).collect();
    let truth: Vec<f32> = size.iter().map(|s| random.normal() / s.sqrt()).collect();
    let dot = |row: usize, w: &[f32]| -> f32 {
        x[row * n..][..n].iter().zip(w).map(|(x, w)| x * w).sum()
    };
    let y: Vec<f32> = (0..rows).map(|row| dot(row, &truth) + random.normal()).collect();
    let loss = |w: &[f32]| -> f64 {
        (0..rows).map(|row| f64::from(dot(row, w) - y[row]).powi(2)).sum::<f64>() / rows as f64
    };
    let minimise = |update: &dyn Fn(&Tensor, &Tensor, &Tensor, AdamW)| -> f64 {
        let w = Tensor::zeros(&gpu, [n], DType::F32, "w");
        for step in 1..=steps {
            let now = w.to_vec().expect("weights");
            let mut g = vec![0.0f32; n];
            for row in (0..batch).map(|i| (step as usize * batch + i) % rows) {
                let error = 2.0 * (dot(row, &now) - y[row]) / batch as f32;
                g.iter_mut().zip(&x[row * n..]).for_each(|(g, x)| *g += error * x);
            }
            let lr = 0.3 * (1.0 - f64::from(step) / f64::from(steps + 1));
            let grad = Tensor::from_f32(&gpu, &g, [n]);
            let norm_clip = grad_norm(&[&grad], 1.0, 1e3);
            let settings = AdamW { lr, weight_decay: 0.0, step, ..SETTINGS };
            update(&w, &grad, &norm_clip, settings);
        }
        loss(&w.to_vec().expect("weights"))
    };
    let [m, v] = [(); 2].map(|()| Tensor::zeros(&gpu, [n], DType::F32, "moment"));
    let whole = minimise(&|w, g, norm, settings| adamw_step(w, g, &m, &v, norm, settings, 1.0));
    let first = loss(&vec![0.0; n]);
    println!("loss {first:.4} at first, {whole:.4} with moments in f32");
    assert!(whole < 0.05 * first, "the problem is solved at all");
    for seed in 0..3 {
        let moments = Moments8::zeros(&gpu, n);
        let coarse = minimise(&|w, g, norm, s| adamw8_step(w, g, &moments, norm, s, 1.0, seed));
        println!("{coarse:.4} with moments in 8 bits, seed {seed}");
        assert!((coarse / whole - 1.0).abs() < 0.05, "{coarse} instead of {whole}");
    }
}

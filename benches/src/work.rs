//! One thing that is timed: an op's case or a whole step, what it costs, and how its result is checked.

use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::Gpu;
use demask_engine::ops::case::{Case, Cost, Tolerance};
use demask_engine::philox::Philox;
use demask_engine::tensor::Tensor;
use demask_engine::tensor::host::Array;

/// Outputs that are compared where the whole reference takes long: one drawn from each of as many equal stretches, so
/// that a wrong tile, row or column is hit many times.
const SAMPLED: usize = 4096;

/// What was compared, and how far off the worst was.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// Values compared.
    pub values: usize,
    /// Of this many.
    pub of: usize,
    /// Largest error in units of what is allowed.
    pub worst: f64,
}

/// Holds results against a reference; the error says what is wrong.
pub type Check = Box<dyn Fn(&[Tensor]) -> Result<Checked, String>>;

/// Ready to run on a device.
pub struct Work {
    /// Unique; an op's case by its own name, a step by `step …`.
    pub name: String,
    /// Work of one call.
    pub cost: Cost,
    /// Records one call; returns what is checked.
    pub run: Box<dyn Fn() -> Vec<Tensor>>,
    /// Holds what a call returned against an f64 reference.
    pub check: Check,
}

/// Step of a central difference in f64.
const STEP: f64 = 1e-4;

/// The values of a case's inputs.
fn values(case: &Case) -> Vec<Array> {
    case.inputs.iter().enumerate().map(|(i, input)| input.values(i as u64)).collect()
}

impl Work {
    /// An op's case with its inputs on the device.
    pub fn of_case(gpu: &Gpu, case: Case) -> Work {
        let inputs: Vec<Tensor> =
            case.inputs.iter().zip(values(&case)).map(|(i, v)| i.upload(gpu, &v)).collect();
        let case = std::rc::Rc::new(case);
        let ran = case.clone();
        Work {
            name: case.name.clone(),
            cost: case.cost.expect("only cases that state their cost are timed"),
            run: Box::new(move || vec![(ran.run)(&inputs)]),
            // References and their inputs are many times the size of the op's: they live only while they are needed.
            check: Box::new(move |outputs| {
                let got = outputs[0].to_vec().map_err(|e| e.to_string())?;
                let values = values(&case);
                let (at, want) = match &case.sampled {
                    Some(sampled) if got.len() > SAMPLED => {
                        let at = draw(got.len(), SAMPLED);
                        let want = sampled(&values, &at);
                        (at, want)
                    }
                    _ => {
                        let want = (case.reference)(&values);
                        if want.shape != *outputs[0].shape() {
                            return Err(format!(
                                "shape {} instead of {}",
                                outputs[0].shape(),
                                want.shape
                            ));
                        }
                        ((0..got.len()).collect(), want.data)
                    }
                };
                compare(&got, &at, &want, case.tolerance)
            }),
        }
    }

    /// The same case, forward and backward; `None` if it has no bench of that. What is checked are the gradients, each
    /// along a random direction against a central difference of the reference.
    pub fn of_derivative(gpu: &Gpu, case: Case) -> Option<Work> {
        let (cost, derivative) = (case.cost?, case.derivative?);
        let inputs: Vec<Tensor> = (case.inputs.iter().zip(values(&case)))
            .map(|(input, v)| {
                let tensor = input.upload(gpu, &v);
                if input.is_differentiable() { tensor.trainable() } else { tensor }
            })
            .collect();
        let case = std::rc::Rc::new(case);
        let ran = case.clone();
        let shape = (case.run)(&inputs).shape().clone();
        let cotangent = signs(shape.numel(), 0);
        let c: Vec<f32> = cotangent.iter().map(|&v| v as f32).collect();
        let dy = Tensor::from_f32(gpu, &c, shape);
        Some(Work {
            name: derivative_name(&case.name),
            cost: Cost {
                flops: cost.flops + derivative.flops,
                bytes: cost.bytes + derivative.bytes,
            },
            run: Box::new(move || {
                let mut gradients = Gradients::new();
                backward(&(ran.run)(&inputs), &dy, &mut gradients);
                inputs.iter().filter_map(|leaf| gradients.get(leaf).cloned()).collect()
            }),
            check: Box::new(move |gradients| check_gradients(&case, &cotangent, gradients)),
        })
    }
}

/// What the bench of a case's derivative is called.
pub fn derivative_name(case: &str) -> String {
    format!("{case} and backward")
}

/// −1 or 1.
fn signs(n: usize, of: usize) -> Vec<f64> {
    let mut random = Philox::new(19, [n as u32, of as u32, 0]);
    (0..n).map(|_| if random.below(2) == 0 { -1.0 } else { 1.0 }).collect()
}

/// ⟨gradient, d⟩ of each differentiable input, along a direction d, against (f(x + h d) − f(x − h d)) / 2h, where
/// f = ⟨cotangent, reference⟩.
fn check_gradients(
    case: &Case,
    cotangent: &[f64],
    gradients: &[Tensor],
) -> Result<Checked, String> {
    let values = values(case);
    let inputs = (0..values.len()).filter(|&i| case.inputs[i].is_differentiable());
    let mut checked = Checked { values: 0, of: 0, worst: 0.0 };
    for (i, gradient) in inputs.zip(gradients) {
        let g = gradient.to_vec().map_err(|e| e.to_string())?;
        checked.of += g.len();
        let direction = signs(g.len(), 1 + i);
        let objective = |step: f64| -> f64 {
            let mut moved = values.clone();
            moved[i].data.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
            (case.reference)(&moved).data.iter().zip(cotangent).map(|(y, c)| y * c).sum()
        };
        let want = (objective(STEP) - objective(-STEP)) / (2.0 * STEP);
        let got: f64 = g.iter().zip(&direction).map(|(g, d)| f64::from(*g) * d).sum();
        // Of random signs, a sum is about as large as its norm; what one wrong tile changes is a good part of that.
        let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let error = (got - want).abs() / (1e-3 * norm + 1e-6);
        if error.is_nan() || error > 1.0 {
            return Err(format!(
                "the gradient of input {i} along a direction is {got} instead of {want}"
            ));
        }
        checked.worst = checked.worst.max(error);
        checked.values += 1;
    }
    Ok(checked)
}

/// One index from each of `n` stretches of `0..of`.
fn draw(of: usize, n: usize) -> Vec<usize> {
    let mut random = Philox::new(17, [of as u32, 0, 0]);
    let at = |i: usize| (i * of / n, (i + 1) * of / n);
    (0..n).map(at).map(|(from, to)| from + random.below((to - from) as u32) as usize).collect()
}

/// `got` at the indices `at` against `want`; NaN differs from everything.
pub fn compare(
    got: &[f32],
    at: &[usize],
    want: &[f64],
    tolerance: Tolerance,
) -> Result<Checked, String> {
    let mut worst = 0.0f64;
    let mut wrong = Vec::new();
    for (&i, &want) in at.iter().zip(want) {
        let allowed = tolerance.absolute + tolerance.relative * want.abs();
        let error = (f64::from(got[i]) - want).abs() / allowed;
        if error.is_nan() || error > 1.0 {
            wrong.push(format!("[{i}] is {} instead of {want}", got[i]));
        }
        worst = worst.max(error);
    }
    match wrong.first() {
        None => Ok(Checked { values: at.len(), of: got.len(), worst }),
        Some(first) => {
            Err(format!("{} of {} values compared are wrong, as {first}", wrong.len(), at.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_hits_every_tile() {
        // A stretch is 48 outputs of a row; a tile of 32 rows misses all of its own once in 10^15.
        let (rows, columns, tile) = (512, 384, 32);
        let mut hit = vec![0; rows / tile * columns / tile];
        for i in draw(rows * columns, SAMPLED) {
            hit[i / columns / tile * (columns / tile) + i % columns / tile] += 1;
        }
        assert!(hit.iter().all(|&n| n > 0));
    }

    #[test]
    fn wrong_values_and_nan_are_found() {
        let check = |got: &[f32]| compare(got, &[0, 1], &[1.0, 2.0], Tolerance::F32);
        assert!(check(&[1.0, 2.0]).is_ok_and(|c| c.worst == 0.0));
        assert!(check(&[1.0, 2.001]).unwrap_err().contains("[1] is 2.001 instead of 2"));
        assert!(check(&[f32::NAN, 2.0]).is_err());
    }
}

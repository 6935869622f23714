//! What an op declares about itself once, and tests and benches loop over: inputs, the op, its f64
//! reference, a tolerance with its reason, and what it costs.

use crate::gpu::Gpu;
use crate::philox::Philox;
use crate::tensor::host::Array;
use crate::tensor::stored::{decode, encode};
use crate::tensor::{DType, Shape, Tensor};

/// An op applied to its inputs on the device.
pub type Run = Box<dyn Fn(&[Tensor]) -> Tensor>;
/// The same in f64 on the host.
pub type Reference = Box<dyn Fn(&[Array]) -> Array>;
/// Whether a device has what a case needs.
pub type DeviceTest = Box<dyn Fn(&Gpu) -> bool>;
/// The reference at some flat indices of the output only.
pub type Sampled = Box<dyn Fn(&[Array], &[usize]) -> Vec<f64>>;

/// One configuration of one op.
pub struct Case {
    /// `op` or `op variant`, unique over all cases.
    pub name: String,
    /// Inputs in order.
    pub inputs: Vec<Input>,
    /// The op on the device.
    pub run: Run,
    /// The same from the formula, in f64.
    pub reference: Reference,
    /// The reference at chosen outputs, where the whole of a bench's shape takes long.
    pub sampled: Option<Sampled>,
    /// |got − want| ≤ absolute + relative · |want|, elementwise.
    pub tolerance: Tolerance,
    /// Work of one forward call; `None` keeps the case out of the benches.
    pub cost: Option<Cost>,
    /// Work of the derivative; with it the benches have the case a second time, forward and backward.
    pub derivative: Option<Cost>,
    /// Kept out of the quick suite: a sibling there stands for it.
    pub full_only: bool,
    /// Which devices can run it; on others it is skipped, by name.
    pub device: DeviceTest,
}

/// How an input is filled.
#[derive(Clone)]
pub enum Input {
    /// Normal values with a few outliers (uniform inputs test nothing of a softmax); differentiable.
    Normal(Shape),
    /// Values of magnitude in [0.5, 2) and either sign, away from kinks and poles; differentiable.
    Away(Shape),
    /// Positive values in [0.5, 2); differentiable.
    Positive(Shape),
    /// Normal values as a weight of this type rests in memory; the reference sees them as they read back.
    Weight(Shape, DType),
    /// Given integers (tokens, positions, spans).
    Integers(Shape, Vec<u32>),
}

/// Error bounds of one case; anything looser than [`Tolerance::F32`] carries its reason in place.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Absolute part.
    pub absolute: f64,
    /// Part relative to the reference.
    pub relative: f64,
}

impl Tolerance {
    /// A few roundings of f32 on values of order one.
    pub const F32: Tolerance = Tolerance { absolute: 2e-5, relative: 2e-5 };
    /// Sums of up to some thousand f32 products of order one.
    pub const SUM: Tolerance = Tolerance { absolute: 3e-4, relative: 1e-4 };
    /// Operands rounded to bf16 (8 bits) where the reference rounds them too; only the sum differs.
    pub const HALF: Tolerance = Tolerance { absolute: 1e-3, relative: 1e-3 };
}

/// Work of one forward call.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Floating-point operations, a fused multiply-add counting two.
    pub flops: f64,
    /// Bytes that must move at least once.
    pub bytes: f64,
}

impl Case {
    /// A case that only tests run.
    pub fn new(
        name: impl Into<String>,
        inputs: Vec<Input>,
        run: impl Fn(&[Tensor]) -> Tensor + 'static,
        reference: impl Fn(&[Array]) -> Array + 'static,
    ) -> Case {
        Case {
            name: name.into(),
            inputs,
            run: Box::new(run),
            reference: Box::new(reference),
            sampled: None,
            tolerance: Tolerance::F32,
            cost: None,
            derivative: None,
            full_only: false,
            device: Box::new(|_| true),
        }
    }

    /// With a reference for single outputs.
    pub fn sampled(self, f: impl Fn(&[Array], &[usize]) -> Vec<f64> + 'static) -> Case {
        Case { sampled: Some(Box::new(f)), ..self }
    }

    /// With another tolerance.
    pub fn tolerance(self, tolerance: Tolerance) -> Case {
        Case { tolerance, ..self }
    }

    /// Only for devices that pass the test.
    pub fn needs(self, test: impl Fn(&Gpu) -> bool + 'static) -> Case {
        Case { device: Box::new(test), ..self }
    }

    /// True if this device can run it.
    pub fn runs_on(&self, gpu: &Gpu) -> bool {
        (self.device)(gpu)
    }

    /// As a bench too.
    pub fn cost(self, flops: f64, bytes: f64) -> Case {
        Case { cost: Some(Cost { flops, bytes }), ..self }
    }

    /// Out of the quick suite.
    pub fn full_only(self) -> Case {
        Case { full_only: true, ..self }
    }

    /// With a bench of forward and backward, of which the backward pass alone costs this.
    pub fn derivative(self, flops: f64, bytes: f64) -> Case {
        Case { derivative: Some(Cost { flops, bytes }), ..self }
    }
}

impl Input {
    /// Extents.
    pub fn shape(&self) -> &Shape {
        match self {
            Input::Normal(s) | Input::Away(s) | Input::Positive(s) => s,
            Input::Weight(s, _) | Input::Integers(s, _) => s,
        }
    }

    /// True if gradients flow into it.
    pub fn is_differentiable(&self) -> bool {
        !matches!(self, Input::Integers(..) | Input::Weight(..))
    }

    /// Its values for a seed; f32-representable, so device and reference see the same numbers.
    pub fn values(&self, seed: u64) -> Array {
        let mut random = Philox::new(seed, [0; 3]);
        let mut draw = || match self {
            // One in 32 is an outlier: eight times as large.
            Input::Normal(_) | Input::Weight(..) => {
                let scale = if random.below(32) == 0 { 8.0 } else { 1.0 };
                scale * random.normal()
            }
            Input::Away(_) => {
                let sign = if random.below(2) == 0 { -1.0 } else { 1.0 };
                sign * (0.5 + 1.5 * random.uniform())
            }
            Input::Positive(_) => 0.5 + 1.5 * random.uniform(),
            Input::Integers(..) => 0.0,
        };
        match self {
            Input::Integers(shape, values) => {
                Array::new(shape, values.iter().map(|&v| f64::from(v)).collect())
            }
            Input::Weight(shape, dtype) => {
                let values: Vec<f32> = (0..shape.numel()).map(|_| draw()).collect();
                let stored = encode(&values, shape.last(), *dtype);
                let values = decode(&stored, shape.last(), *dtype);
                Array::new(shape, values.into_iter().map(f64::from).collect())
            }
            other => Array::from_fn(other.shape(), |_| f64::from(draw())),
        }
    }

    /// Those values on the device.
    pub fn upload(&self, gpu: &Gpu, values: &Array) -> Tensor {
        match self {
            Input::Integers(shape, values) => Tensor::from_u32(gpu, values, shape),
            Input::Weight(shape, dtype) => {
                let values: Vec<f32> = values.data.iter().map(|&v| v as f32).collect();
                let stored = encode(&values, shape.last(), *dtype);
                Tensor::from_bytes(gpu, &stored, shape, *dtype, "weight")
            }
            other => {
                let data: Vec<f32> = values.data.iter().map(|&v| v as f32).collect();
                Tensor::from_f32(gpu, &data, other.shape())
            }
        }
    }
}

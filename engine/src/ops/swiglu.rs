//! Gated activation of the feed-forward layer:  y = gate σ(gate) up,  s = σ(gate)
//! Backward:  dgate = dy up s (1 + gate (1 − s)),  dup = dy gate s          all [.., F]

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::tensor::{DType, Tensor};

const FORWARD: Kernel = kernel!("swiglu");
const BACKWARD: Kernel = kernel!("swiglu_backward");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    quads: u32,
}

/// silu(gate) ⊙ up.
///
/// # Panics
/// If the shapes differ or one is not f32.
#[track_caller]
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!(gate.shape(), up.shape(), "swiglu: gate and up");
    assert_eq!((gate.dtype(), up.dtype()), (DType::F32, DType::F32), "swiglu: types");
    // A buffer ends with a whole quad, so the last one needs no care.
    let quads = gate.numel().div_ceil(4);
    let params = Params { quads: quads as u32 };
    let grid = fold(quads.div_ceil(256));
    let y = gate.empty_like("swiglu");
    FORWARD.run(&params, &[gate, up], &[&y], grid);
    let (kept_gate, kept_up) = (gate.detach(), up.detach());
    y.record("swiglu", &[gate, up], move |dy| {
        let (dgate, dup) = (dy.empty_like("swiglu"), dy.empty_like("swiglu"));
        BACKWARD.run(&params, &[&kept_gate, &kept_up, dy], &[&dgate, &dup], grid);
        vec![Some(dgate), Some(dup)]
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input};
    use crate::ops::{mul, silu};
    use crate::tensor::host::Array;

    fn case_of(name: String, shape: &[usize], op: fn(&Tensor, &Tensor) -> Tensor) -> Case {
        Case::new(
            name,
            vec![Input::Normal(shape.into()), Input::Normal(shape.into())],
            move |t| op(&t[0], &t[1]),
            |x| {
                let gated = x[0].data.iter().zip(&x[1].data);
                let y = gated.map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                Array::new(&x[0].shape, y)
            },
        )
    }

    /// The fused op's cases, and its composition under the same reference.
    pub fn cases() -> Vec<Case> {
        let shapes = [&[1][..], &[3, 5], &[2, 3, 257], &[0, 4]];
        let fused = |shape: &[usize]| case_of(format!("swiglu {shape:?}"), shape, swiglu);
        let mut cases: Vec<_> = shapes.into_iter().map(fused).collect();
        cases.push(case_of("swiglu composed".into(), &[3, 257], |g, up| mul(&silu(g), up)));
        for f in [1536, 14_336] {
            let n = (512 * f) as f64;
            cases.push(fused(&[512, f]).cost(5.0 * n, 12.0 * n).derivative(10.0 * n, 20.0 * n));
        }
        cases
    }
}

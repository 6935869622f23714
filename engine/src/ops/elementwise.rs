//! Elementwise ops:  y = f(x),  y = f(a, b) with numpy's broadcasting up to four axes.
//! Backward:  dx = dy ⊙ f'(x),  da = dy ⊙ ∂f/∂a,  db = dy ⊙ ∂f/∂b, summed to the operand's shape.
//! A row of a table below is an op: its name, f and its derivatives as WGSL. These are the only generated
//! kernels: a row's expression takes the place of the one in the template's `fn f`.

use std::collections::HashMap;
use std::sync::LazyLock;

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::ops::sum_to;
use crate::tensor::{DType, Shape, Tensor};

const UNARY: Kernel = kernel!("elementwise_unary");
const UNARY_BACKWARD: Kernel = kernel!("elementwise_unary_backward");
const BINARY: Kernel = kernel!("elementwise_binary");
const BINARY_BACKWARD: Kernel = kernel!("elementwise_binary_backward");

/// Name, f(x), f'(x). Arguments of `exp` and `tanh` are bounded because WGSL leaves infinities undefined.
const UNARY_TABLE: [[&str; 3]; 11] = [
    ["scale", "x * p.scalar", "p.scalar"],
    ["add_scalar", "x + p.scalar", "1.0"],
    ["exp", "or_nan(x, exp(x))", "exp(x)"],
    ["log", LOG, "1.0 / x"],
    ["sqrt", "sqrt(x)", "0.5 / sqrt(x)"],
    ["recip", "1.0 / x", "-1.0 / (x * x)"],
    ["tanh", "or_nan(x, tanh(clamp(x, -15.0, 15.0)))", TANH_BACKWARD],
    ["sigmoid", SIGMOID, SIGMOID_BACKWARD],
    ["silu", "x / (1.0 + exp(min(-x, 80.0)))", SILU_BACKWARD],
    ["relu", "or_nan(x, max(x, 0.0))", "select(0.0, 1.0, x > 0.0)"],
    ["square", "x * x", "2.0 * x"],
];
// Drivers have finite logarithms of what is not finite.
const LOG: &str = "select(log(x), x, (bitcast<u32>(x) & 0x7f800000u) == 0x7f800000u)";
const TANH_BACKWARD: &str =
    "4.0 * exp(-2.0 * abs(x)) / ((1.0 + exp(-2.0 * abs(x))) * (1.0 + exp(-2.0 * abs(x))))";
const SIGMOID: &str = "or_nan(x, 1.0 / (1.0 + exp(min(-x, 80.0))))";
const SIGMOID_BACKWARD: &str = "1.0 / ((1.0 + exp(min(-x, 40.0))) * (1.0 + exp(min(x, 40.0))))";
const SILU_BACKWARD: &str = "(1.0 + x / (1.0 + exp(min(x, 80.0)))) / (1.0 + exp(min(-x, 80.0)))";

/// Name, f(a, b), ∂f/∂a, ∂f/∂b. A derivative of "1.0" costs no kernel.
const BINARY_TABLE: [[&str; 4]; 5] = [
    ["add", "a + b", "1.0", "1.0"],
    ["sub", "a - b", "1.0", "-1.0"],
    ["mul", "a * b", "b", "a"],
    ["div", "a / b", "1.0 / b", "-a / (b * b)"],
    [
        "maximum",
        "or_nan(a, or_nan(b, max(a, b)))",
        "select(0.0, 1.0, a >= b)",
        "select(1.0, 0.0, a >= b)",
    ],
];

/// The kernels of each row: f, then its derivatives.
static KERNELS: LazyLock<HashMap<&str, Vec<Kernel>>> = LazyLock::new(|| {
    let unary = UNARY_TABLE.iter().map(|[name, f, df]| {
        let backward = generate(UNARY_BACKWARD, name, "_backward", df);
        (*name, vec![generate(UNARY, name, "", f), backward])
    });
    let binary = BINARY_TABLE.iter().map(|[name, f, da, db]| {
        let da = generate(BINARY_BACKWARD, name, "_backward_a", da);
        let db = generate(BINARY_BACKWARD, name, "_backward_b", db);
        (*name, vec![generate(BINARY, name, "", f), da, db])
    });
    unary.chain(binary).collect()
});

/// A template with another expression in its `f`; the text lives as long as the program.
fn generate(template: Kernel, name: &str, suffix: &str, f: &str) -> Kernel {
    let body = if template.source.contains("f(x: f32)") { "return x;" } else { "return a;" };
    assert_eq!(template.source.matches(body).count(), 1, "{}: one f to replace", template.name);
    let text = template.source.replace(body, &format!("return {f};"));
    Kernel::new(format!("{name}{suffix}").leak(), text.leak())
}

/// Every generated kernel, for the tests that validate all WGSL.
#[cfg(feature = "cases")]
pub fn elementwise_kernels() -> Vec<Kernel> {
    KERNELS.values().flatten().copied().collect()
}

/// −x.
#[track_caller]
pub fn neg(x: &Tensor) -> Tensor {
    scale(x, -1.0)
}

/// factor · x.
#[track_caller]
pub fn scale(x: &Tensor, factor: f32) -> Tensor {
    // Linear: its derivative needs no x, which can be freed.
    forward_unary("scale", x, factor).record("scale", &[x], move |dy| vec![Some(scale(dy, factor))])
}

/// x + term.
#[track_caller]
pub fn add_scalar(x: &Tensor, term: f32) -> Tensor {
    forward_unary("add_scalar", x, term).record("add_scalar", &[x], |dy| vec![Some(dy.clone())])
}

/// eˣ.
#[track_caller]
pub fn exp(x: &Tensor) -> Tensor {
    unary("exp", x)
}

/// The natural logarithm.
#[track_caller]
pub fn log(x: &Tensor) -> Tensor {
    unary("log", x)
}

/// √x.
#[track_caller]
pub fn sqrt(x: &Tensor) -> Tensor {
    unary("sqrt", x)
}

/// 1 / x.
#[track_caller]
pub fn recip(x: &Tensor) -> Tensor {
    unary("recip", x)
}

/// The hyperbolic tangent.
#[track_caller]
pub fn tanh(x: &Tensor) -> Tensor {
    unary("tanh", x)
}

/// 1 / (1 + e⁻ˣ).
#[track_caller]
pub fn sigmoid(x: &Tensor) -> Tensor {
    unary("sigmoid", x)
}

/// x / (1 + e⁻ˣ).
#[track_caller]
pub fn silu(x: &Tensor) -> Tensor {
    unary("silu", x)
}

/// max(x, 0); its derivative at 0 is 0.
#[track_caller]
pub fn relu(x: &Tensor) -> Tensor {
    unary("relu", x)
}

/// x².
#[track_caller]
pub fn square(x: &Tensor) -> Tensor {
    unary("square", x)
}

/// a + b.
#[track_caller]
pub fn add(a: &Tensor, b: &Tensor) -> Tensor {
    binary("add", a, b)
}

/// a − b.
#[track_caller]
pub fn sub(a: &Tensor, b: &Tensor) -> Tensor {
    binary("sub", a, b)
}

/// a · b, elementwise.
#[track_caller]
pub fn mul(a: &Tensor, b: &Tensor) -> Tensor {
    binary("mul", a, b)
}

/// a / b.
#[track_caller]
pub fn div(a: &Tensor, b: &Tensor) -> Tensor {
    binary("div", a, b)
}

/// The larger of both; where they are equal the gradient goes to a.
#[track_caller]
pub fn maximum(a: &Tensor, b: &Tensor) -> Tensor {
    binary("maximum", a, b)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct UnaryParams {
    n: u32,
    scalar: f32,
}

#[track_caller]
fn forward_unary(name: &'static str, x: &Tensor, scalar: f32) -> Tensor {
    assert_eq!(x.dtype(), DType::F32, "{name} of {}", x.shape());
    let y = x.empty_like(name);
    let n = x.numel();
    let params = UnaryParams { n: n as u32, scalar };
    KERNELS[name][0].run(&params, &[x], &[&y], fold(n.div_ceil(256)));
    y
}

#[track_caller]
fn unary(name: &'static str, x: &Tensor) -> Tensor {
    let kept = x.detach();
    forward_unary(name, x, 0.0).record(name, &[x], move |dy| {
        let dx = kept.empty_like(name);
        let n = kept.numel();
        let params = UnaryParams { n: n as u32, scalar: 0.0 };
        KERNELS[name][1].run(&params, &[dy, &kept], &[&dx], fold(n.div_ceil(256)));
        vec![Some(dx)]
    })
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct BinaryParams {
    extent: [u32; 4],
    a_stride: [u32; 4],
    b_stride: [u32; 4],
}

/// The shape that both broadcast to: aligned at the last axis, an extent of one stretches.
#[track_caller]
fn broadcast(name: &str, a: &Shape, b: &Shape) -> Shape {
    let rank = a.len().max(b.len());
    let extent = |s: &Shape, axis: usize| (axis + s.len()).checked_sub(rank).map_or(1, |i| s[i]);
    let axes = (0..rank).map(|axis| match (extent(a, axis), extent(b, axis)) {
        (x, y) if x == y || y == 1 => x,
        (1, y) => y,
        _ => panic!("{name}: {a} and {b} do not broadcast"),
    });
    axes.collect::<Vec<_>>().into()
}

/// Four strides of `shape` inside a broadcast shape; zero where it stretches or has no axis.
fn strides(shape: &Shape) -> [u32; 4] {
    let mut strides = [0; 4];
    let mut step = 1;
    for (stride, &extent) in strides.iter_mut().rev().zip(shape.iter().rev()) {
        *stride = if extent == 1 { 0 } else { step };
        step *= extent as u32;
    }
    strides
}

#[track_caller]
fn binary(name: &'static str, a: &Tensor, b: &Tensor) -> Tensor {
    let same = a.shape() == b.shape();
    let shape = broadcast(name, a.shape(), b.shape());
    assert!(same || shape.len() <= 4, "{name}: {} and {} need too many axes", a.shape(), b.shape());
    let floats = (a.dtype(), b.dtype()) == (DType::F32, DType::F32);
    assert!(floats, "{name}: {:?} and {:?} must be f32", a.dtype(), b.dtype());
    let y = Tensor::empty(a.gpu(), &shape, DType::F32, name);
    let n = shape.numel();
    let mut extent = [1, 1, 1, n as u32];
    if !same {
        extent = [1; 4];
        for (to, &from) in extent.iter_mut().rev().zip(shape.iter().rev()) {
            *to = from as u32;
        }
    }
    let params =
        BinaryParams { extent, a_stride: strides(a.shape()), b_stride: strides(b.shape()) };
    let constants = [("BROADCAST", u32::from(!same))];
    let grid = fold(n.div_ceil(256));
    KERNELS[name][0].with(&constants).run(&params, &[a, b], &[&y], grid);
    let row = BINARY_TABLE.iter().find(|row| row[0] == name).expect("a row of this name");
    let shapes = [a.shape().clone(), b.shape().clone()];
    let tracked = [a.is_tracked(), b.is_tracked()];
    let needed = (0..2).any(|i| tracked[i] && row[2 + i] != "1.0");
    let kept = needed.then(|| [a.detach(), b.detach()]);
    y.record(name, &[a, b], move |dy| {
        let gradient = |i: usize| match &kept {
            Some([a, b]) if row[2 + i] != "1.0" => {
                let g = dy.empty_like(name);
                let reads = [dy, a, b];
                KERNELS[name][1 + i].with(&constants).run(&params, &reads, &[&g], grid);
                sum_to(&g, &shapes[i])
            }
            _ => sum_to(dy, &shapes[i]),
        };
        (0..2).map(|i| tracked[i].then(|| gradient(i))).collect()
    })
}

#[cfg(feature = "cases")]
pub use cases::cases;

#[cfg(feature = "cases")]
mod cases {
    use super::*;
    use crate::ops::case::{Case, Input, Tolerance};
    use crate::tensor::host::{Array, unravel};

    fn unary_case(
        name: &str,
        input: Input,
        op: impl Fn(&Tensor) -> Tensor + 'static,
        f: fn(f64) -> f64,
    ) -> Case {
        let name = format!("{name} {}", input.shape());
        Case::new(name, vec![input], move |t| op(&t[0]), move |x| x[0].map(f))
    }

    fn unary_cases(
        name: &str,
        input: fn(Shape) -> Input,
        op: fn(&Tensor) -> Tensor,
        f: fn(f64) -> f64,
    ) -> [Case; 2] {
        [[3, 257], [0, 4]].map(|shape| unary_case(name, input(shape.into()), op, f))
    }

    type Binary = (&'static str, fn(&Tensor, &Tensor) -> Tensor, fn(f64, f64) -> f64);

    fn binary_case((name, op, f): Binary, a: &[usize], b: &[usize]) -> Case {
        let shape = broadcast(name, &a.into(), &b.into());
        Case::new(
            format!("{name} {a:?} {b:?}"),
            vec![Input::Away(a.into()), Input::Away(b.into())],
            move |t| op(&t[0], &t[1]),
            move |x| {
                Array::from_fn(&shape, |i| {
                    let index = unravel(i, &shape);
                    f(x[0].at(&index), x[1].at(&index))
                })
            },
        )
        // Gradients are sums over the axes that were stretched.
        .tolerance(if a == b { Tolerance::F32 } else { Tolerance::SUM })
    }

    /// The cases of all rows.
    pub fn cases() -> Vec<Case> {
        let normal = |shape: &[usize]| Input::Normal(shape.into());
        let mut cases = vec![
            unary_case("scale", normal(&[2, 129]), |x| scale(x, -2.5), |x| -2.5 * x),
            unary_case("add_scalar", normal(&[2, 129]), |x| add_scalar(x, 0.75), |x| x + 0.75),
            unary_case("silu", normal(&[1]), silu, |x| x / (1.0 + (-x).exp())),
            unary_case(
                "sigmoid far out",
                normal(&[64]),
                |x| sigmoid(&scale(x, 100.0)),
                |x| 1.0 / (1.0 + (-100.0 * x).exp()),
            )
            // The derivative carries the factor of 100.
            .tolerance(Tolerance { absolute: 2e-4, relative: 2e-4 }),
        ];
        cases.extend(unary_cases("neg", Input::Normal, neg, |x| -x));
        cases.extend(unary_cases("exp", Input::Normal, exp, f64::exp));
        cases.extend(unary_cases("log", Input::Positive, log, f64::ln));
        cases.extend(unary_cases("sqrt", Input::Positive, sqrt, f64::sqrt));
        cases.extend(unary_cases("recip", Input::Away, recip, |x| 1.0 / x));
        cases.extend(unary_cases("tanh", Input::Normal, tanh, f64::tanh));
        cases.extend(unary_cases("sigmoid", Input::Normal, sigmoid, |x| 1.0 / (1.0 + (-x).exp())));
        cases.extend(unary_cases("silu", Input::Normal, silu, |x| x / (1.0 + (-x).exp())));
        cases.extend(unary_cases("relu", Input::Away, relu, |x| x.max(0.0)));
        cases.extend(unary_cases("square", Input::Normal, square, |x| x * x));
        let all: [Binary; 5] = [
            ("add", add, |a, b| a + b),
            ("sub", sub, |a, b| a - b),
            ("mul", mul, |a, b| a * b),
            ("div", div, |a, b| a / b),
            ("maximum", maximum, f64::max),
        ];
        for op in all {
            cases.push(binary_case(op, &[3, 5, 17], &[3, 5, 17]));
            cases.push(binary_case(op, &[4, 1, 3], &[2, 1]));
        }
        for (a, b) in [
            (&[2, 3, 4, 5][..], &[5][..]),
            (&[5], &[2, 3, 4, 5]),
            (&[2, 1, 4, 1], &[3, 1, 5]),
            (&[1], &[257]),
            (&[1], &[1]),
            (&[0, 3], &[3]),
            (&[1, 1, 2, 2, 3], &[1, 1, 2, 2, 3]),
        ] {
            cases.push(binary_case(all[2], a, b));
        }
        let (rows, d) = (512, 576);
        let n = (rows * d) as f64;
        cases.push(binary_case(all[0], &[rows, d], &[rows, d]).cost(n, 12.0 * n));
        cases.push(binary_case(all[2], &[rows, d], &[d]).cost(n, 8.0 * n));
        cases
    }
}

//! How a driver computes where WGSL leaves it open: NaN in comparisons, `max` and conversions, numbers below the
//! smallest normal one, overflow, one rounding or two. The table is asked of a device by one small kernel;
//! `demask doctor --json` prints it, so that a report from an unknown driver says what to expect of it. Kernels lean on
//! the rows marked as needed alone, to which [`crate::selftest`] therefore holds a device; tests/tests/shaders.rs and
//! numerics.rs keep kernels from leaning on more.

use half::f16;

use crate::Result;
use crate::gpu::{Gpu, Kernel, kernel};
use crate::tensor::{DType, Tensor};

const NUMERICS: Kernel = kernel!("numerics");

/// The operands, in the order of the kernel.
const OPERANDS: [f32; 18] = [
    f32::NAN,
    1.0,
    0.0,
    f32::INFINITY,
    1e-40,
    88.0,
    89.0,
    -200.0,
    1.0 + f32::EPSILON,
    1.0 - f32::EPSILON / 2.0,
    70_000.0,
    65_519.0,
    6e-8,
    3e9,
    2.5,
    -0.0,
    41.0,
    f32::NEG_INFINITY,
];

/// What the rows of a table are to kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Kernels lean on it.
    Needed,
    /// IEEE 754 says this; no kernel leans on it.
    Ieee,
    /// Nobody says anything.
    Open,
    /// An f16 in its bits, of which IEEE 754 says this.
    Half,
}
use Kind::{Half, Ieee, Needed, Open};

const NAN: f32 = f32::NAN;
const INF: f32 = f32::INFINITY;

/// An expression, what it is to kernels, and its value by IEEE 754 (by its operation `maximum` or `minimum`).
const TABLE: [(&str, Kind, f32); 51] = [
    ("NaN * 0", Needed, NAN),
    ("inf * 0", Needed, NAN),
    ("-inf * 0", Needed, NAN),
    ("fma(NaN, 0, 1)", Needed, NAN),
    ("fma(inf, 0, 1)", Needed, NAN),
    ("inf + -inf", Needed, NAN),
    ("inf - inf, the same one", Ieee, NAN),
    ("NaN + 1", Needed, NAN),
    ("1 / NaN", Needed, NAN),
    ("dot((1, NaN, 1, 1), (1, 0, 1, 1))", Needed, NAN),
    ("-inf", Needed, -INF),
    ("1e-40 loaded and stored", Ieee, 1e-40),
    ("max(NaN, 1)", Ieee, NAN),
    ("max(1, NaN)", Ieee, NAN),
    ("min(NaN, 1)", Ieee, NAN),
    ("min(1, NaN)", Ieee, NAN),
    ("clamp(NaN, 0, 1)", Ieee, NAN),
    ("NaN > 1", Ieee, 0.0),
    ("NaN < 1", Ieee, 0.0),
    ("NaN == NaN", Ieee, 0.0),
    ("NaN != NaN", Ieee, 1.0),
    ("!(NaN <= 1)", Ieee, 1.0),
    ("select(0, 1, NaN < 1)", Ieee, 0.0),
    ("sign(NaN)", Ieee, NAN),
    ("exp(NaN)", Ieee, NAN),
    ("log(NaN)", Ieee, NAN),
    ("sqrt(NaN)", Ieee, NAN),
    ("exp(88)", Open, 1.651_636_3e38),
    ("exp(89)", Ieee, INF),
    ("exp(-200)", Ieee, 0.0),
    ("exp(-inf)", Ieee, 0.0),
    ("log(0)", Ieee, -INF),
    ("log(-1)", Ieee, NAN),
    ("sqrt(-1)", Ieee, NAN),
    ("inverseSqrt(0)", Ieee, INF),
    ("1 / 0", Ieee, INF),
    ("pow(0, 0)", Ieee, 1.0),
    ("1e-40 * 1", Ieee, 1e-40),
    ("1e-40 + 0", Ieee, 1e-40),
    ("(1 + 2^-23) (1 - 2^-24) - 1", Ieee, 0.0),
    ("fma(1 + 2^-23, 1 - 2^-24, -1)", Ieee, 5.960_463_7e-8),
    ("f16 of 70000", Half, INF),
    ("f16 of 65519", Half, 65_504.0),
    ("f16 of 6e-8", Half, 5.960_464_5e-8),
    ("f16 of NaN", Half, NAN),
    ("i32(3e9)", Open, 2_147_483_520.0),
    ("u32(-1)", Open, 0.0),
    ("i32(NaN)", Open, 0.0),
    ("round(2.5)", Ieee, 2.0),
    ("sqrt(-0)", Ieee, -0.0),
    ("1 / 41", Ieee, 1.0 / 41.0),
];

/// One row as a device computes it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// What was computed.
    pub expression: &'static str,
    /// What came out.
    pub value: f32,
    /// IEEE 754 says otherwise.
    pub differs: bool,
    /// Kernels lean on IEEE's value.
    pub needed: bool,
}

impl Row {
    /// The value as text: `NaN`, `inf`, `-inf` and `-0` too, for which JSON has no numbers.
    pub fn text(&self) -> String {
        match self.value {
            value if value.abs() > 1e9 || (value != 0.0 && value.abs() < 1e-3) => match value {
                value if value.is_finite() => format!("{value:e}"),
                value => value.to_string(),
            },
            value => value.to_string(),
        }
    }
}

/// Computes the table on a device, in order.
///
/// # Errors
/// A fault of the device.
pub fn probe(gpu: &Gpu) -> Result<Vec<Row>> {
    let x = Tensor::from_f32(gpu, &OPERANDS, [OPERANDS.len()]);
    let y = Tensor::zeros(gpu, [TABLE.len()], DType::F32, "numerics");
    NUMERICS.run(&(TABLE.len() as u32), &[&x], &[&y], [1, 1, 1]);
    let row = |(&(expression, kind, want), value): (&(_, Kind, f32), f32)| {
        let value = match kind {
            Half => f16::from_bits(value as u16).to_f32(),
            _ => value,
        };
        let same = value.to_bits() == want.to_bits() || (value.is_nan() && want.is_nan());
        Row { expression, value, differs: !same && kind != Open, needed: kind == Needed }
    };
    Ok(TABLE.iter().zip(y.to_vec()?).map(row).collect())
}

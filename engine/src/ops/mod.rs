//! One file per op: formula, kernels, the function with its derivative, its cases. This list is the only registry.

mod attention;
mod elementwise;
mod embedding;
mod gather;
mod linear;
mod linear_cross_entropy;
mod matmul;
mod norm_linear;
mod optimizer;
mod optimizer8;
mod reduce;
mod rms_norm;
mod rope;
mod softmax;
mod swiglu;

#[cfg(feature = "cases")]
pub mod case;

pub use attention::{
    AttentionKernel, AttentionOptions, Lane, Lanes, MOST_HEAD_DIM, Mask, attention,
    attention_cached,
};
#[cfg(feature = "cases")]
pub use elementwise::elementwise_kernels;
pub use elementwise::{
    add, add_scalar, div, exp, log, maximum, mul, neg, recip, relu, scale, sigmoid, silu, sqrt,
    square, sub, tanh,
};
pub use embedding::embedding;
pub use gather::gather;
pub use linear::{beside, linear, linear_onto, rows};
pub use linear_cross_entropy::{CrossEntropy, Supervision, linear_cross_entropy};
pub use matmul::{Layout, MatmulKernel, Product, matmul};
pub use norm_linear::{norm_linear, norm_swiglu};
pub use optimizer::{AdamW, adamw_step, grad_norm, grad_norm_within};
#[cfg(feature = "cases")]
pub use optimizer8::decode_moments;
pub use optimizer8::{Moments8, adamw8_step};
pub use reduce::{max, mean, sum, sum_all, sum_to};
pub use rms_norm::rms_norm;
pub use rope::{rope, rope_into_cache};
pub use softmax::softmax;
pub use swiglu::swiglu;

/// Every case of every op.
#[cfg(feature = "cases")]
pub fn cases() -> Vec<case::Case> {
    let all = [
        attention::cases(),
        elementwise::cases(),
        embedding::cases(),
        gather::cases(),
        linear::cases(),
        linear_cross_entropy::cases(),
        matmul::cases(),
        norm_linear::cases(),
        optimizer::cases(),
        optimizer8::cases(),
        reduce::cases(),
        rms_norm::cases(),
        rope::cases(),
        softmax::cases(),
        swiglu::cases(),
    ];
    all.into_iter().flatten().collect()
}

//! Tensors, autograd, kernels, Llama models and decoding on WebGPU: any GPU, no CUDA.
//!
//! The engine is useful alone: tensors without the model, inference without the trainer. Tensors, a gradient, and
//! an op with its own WGSL, added from outside this crate:
//!
//! ```
//! use demask_engine::autograd::{Gradients, backward};
//! use demask_engine::gpu::{Gpu, GpuOptions, Kernel};
//! use demask_engine::ops::{Layout, matmul, sum_all};
//! use demask_engine::tensor::Tensor;
//!
//! /// y = x³, dx = 3 x² dy. Binding 0 is `Params`, then inputs, then outputs.
//! const CUBE: Kernel = Kernel::new("cube", "
//!     struct Params { n: u32 }
//!     @group(0) @binding(0) var<uniform> p: Params;
//!     @group(0) @binding(1) var<storage, read> x: array<f32>;
//!     @group(0) @binding(2) var<storage, read> dy: array<f32>;
//!     @group(0) @binding(3) var<storage, read_write> y: array<f32>;
//!     override BACKWARD: u32 = 0u;
//!     @compute @workgroup_size(64)
//!     fn main(@builtin(global_invocation_id) id: vec3<u32>) {
//!         let i = id.x;
//!         if i < p.n {
//!             y[i] = select(x[i] * x[i] * x[i], 3.0 * x[i] * x[i] * dy[i], BACKWARD == 1u);
//!         }
//!     }");
//!
//! fn cube(x: &Tensor) -> Tensor {
//!     let launch = |dy: &Tensor, backward: u32| {
//!         let (y, n) = (x.empty_like("cube"), x.numel() as u32);
//!         CUBE.with(&[("BACKWARD", backward)]).run(&n, &[x, dy], &[&y], [n.div_ceil(64), 1, 1]);
//!         y
//!     };
//!     let kept = x.detach();
//!     launch(x, 0).record("cube", &[x], move |dy| {
//!         let (dx, n) = (kept.empty_like("cube"), kept.numel() as u32);
//!         let grid = [n.div_ceil(64), 1, 1];
//!         CUBE.with(&[("BACKWARD", 1)]).run(&n, &[&kept, dy], &[&dx], grid);
//!         vec![Some(dx)]
//!     })
//! }
//!
//! # fn main() -> demask_engine::Result<()> {
//! # if pollster::block_on(demask_engine::gpu::list()).is_empty() { return Ok(()) }
//! let gpu = Gpu::open(GpuOptions::default())?;
//! let a = Tensor::from_f32(&gpu, &[1.0, 2.0, 3.0, 4.0], [2, 2]).trainable();
//! let b = Tensor::from_f32(&gpu, &[1.0, 0.0, 0.0, 1.0], [2, 2]);
//! let loss = sum_all(&cube(&matmul(&a, &b, Layout::NN)));
//! assert_eq!(loss.to_vec()?, [100.0]); // 1 + 8 + 27 + 64
//!
//! let mut gradients = Gradients::new();
//! let one = Tensor::from_f32(&gpu, &[1.0], loss.shape());
//! backward(&loss, &one, &mut gradients);
//! let da = gradients.get(&a).expect("a is trainable");
//! assert_eq!(da.to_vec()?, [3.0, 12.0, 27.0, 48.0]); // 3 x²
//! # Ok(())
//! # }
//! ```
//!
//! Floors, each knowing only those above it in this list: [`gpu`] (bytes and kernels), [`tensor`] and [`autograd`],
//! [`ops`], [`model`], [`decode`]. One thread owns a device; results come back by `to_vec`, which also returns
//! whatever fault the device had.

pub mod autograd;
pub mod decode;
pub mod error;
pub mod gpu;
pub mod model;
pub mod numerics;
pub mod ops;
pub mod philox;
pub mod selftest;
pub mod tensor;
pub mod tune;

pub use error::{Error, Result};

//! placeholder front page

pub mod autograd;
pub mod error;
pub mod gpu;
pub mod model;
pub mod ops;
pub mod philox;
pub mod tensor;

pub use error::{Error, Result};

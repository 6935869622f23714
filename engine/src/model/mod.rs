//! Llama-architecture models: configuration, weights in and out, tokenizer, forward pass.

mod cache;
mod chat;
pub mod config;
pub mod gguf;
pub mod hub;
mod llama;
pub mod lora;
pub mod merge;
mod parameter;
mod projection;
pub mod save;
pub mod tokenizer;
pub mod weights;

pub use cache::KvCache;
pub use chat::{CHATML, ChatOptions, ChatTemplate};
pub use config::{DiffusionAttention, LlamaConfig, LongRope, RopeScaling, Yarn};
pub use llama::{Inputs, Llama};
pub use lora::Lora;
pub use parameter::{Parameter, Precision, conversions};
pub use tokenizer::Tokenizer;
pub use weights::{Fidelity, StoredType, Weights};

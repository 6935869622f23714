//! Training: data, noise, objectives, optimiser loop.

pub mod batch;
pub mod bpe;
pub mod checkpoint;
pub mod curve;
pub mod data;
pub mod disk;
mod figures;
pub mod flops;
pub mod guard;
pub mod metrics;
pub mod noise;
pub mod optim;
pub mod pack;
pub mod plan;
mod plot;
pub mod recipe;
pub mod replay;
pub mod report;
pub mod schedule;
pub mod start;
pub mod tensorboard;
pub mod train;
pub mod validate;

/// The folder of the models that come with this crate's source. It exists while the source does: in the tree, and
/// where cargo unpacked the package.
pub const MODELS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models");

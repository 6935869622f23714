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

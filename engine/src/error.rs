//! The one error type of the engine: faults of the world (device, memory, files).
//! A caller's bug (wrong shape, wrong dtype) is not here: it panics where it was made, with op and shapes.

use std::path::{Path, PathBuf};

/// What can go wrong although the program is right.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No adapter fits the request, or there is none at all.
    #[error("no GPU adapter {wanted}; found: {found}. {remedy}")]
    NoAdapter {
        /// What was asked for, as in `matches "llvmpipe"`.
        wanted: String,
        /// The adapters that exist, or `none`.
        found: String,
        /// What the user can do about it.
        remedy: String,
    },
    /// The adapter refused to give a device.
    #[error("adapter {adapter} gave no device: {reason}")]
    NoDevice {
        /// Name of the adapter.
        adapter: String,
        /// The driver's words.
        reason: String,
    },
    /// An allocation passed the budget, or the device had no memory left.
    #[error(
        "out of device memory: {op} asked for {bytes} bytes ({tensor}) with {live} bytes live and {reserved} \
         reserved of a budget of {budget}; use a smaller batch, sequence or model, or raise the budget"
    )]
    OutOfMemory {
        /// Kernel or operation that asked.
        op: String,
        /// The tensor it asked for.
        tensor: String,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes in use by live buffers at that moment.
        live: u64,
        /// Bytes held from the driver, live or pooled.
        reserved: u64,
        /// The limit that was passed, in bytes; `u64::MAX` where only the device limits.
        budget: u64,
    },
    /// One tensor is larger than this device can bind to a kernel.
    #[error(
        "{op}: {tensor} takes {bytes} bytes, this device binds at most {limit}; split the batch or the sequence"
    )]
    TooLarge {
        /// Kernel or operation that asked.
        op: String,
        /// The tensor it asked for.
        tensor: String,
        /// Bytes asked for.
        bytes: u64,
        /// The device's limit in bytes.
        limit: u64,
    },
    /// The device was lost (driver reset, unplugged, time-out).
    #[error("the GPU was lost during {op}: {reason}; restart, and resume from the last checkpoint")]
    DeviceLost {
        /// Kernels of the batch in flight.
        op: String,
        /// The driver's words.
        reason: String,
    },
    /// The driver or wgpu found a command invalid: a bug of a kernel's declaration.
    #[error("{op} with {tensor}: invalid GPU command: {reason}")]
    Validation {
        /// Kernels of the batch in flight.
        op: String,
        /// The tensors of the last dispatch of that batch.
        tensor: String,
        /// wgpu's words.
        reason: String,
    },
    /// A model file (config, weights, tokenizer) that cannot be used.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// A file could not be read or written.
    #[error("{}: {reason}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        reason: String,
    },
    /// A request that the model or the session cannot serve (prompt too long, id out of range).
    #[error("{0}")]
    Request(String),
}

/// `Result` with the engine's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A model file at fault.
    pub fn model(path: impl AsRef<Path>, reason: impl Into<String>) -> Self {
        Error::Model { path: path.as_ref().to_owned(), reason: reason.into() }
    }

    /// A file that could not be read or written.
    pub fn io(path: impl AsRef<Path>, error: impl std::fmt::Display) -> Self {
        Error::Io { path: path.as_ref().to_owned(), reason: error.to_string() }
    }
}

//! Memory of a device: allocation under a budget, uploads, copies, guards.

use std::fmt::Display;
use std::rc::Rc;

use super::batch::Reported;
use super::buffer::{Allocation, GUARD_BYTES, GUARD_WORD, Holdings, Pool};
use super::{Buffer, Gpu, Memory};
use crate::{Error, Result};

/// Uploads are submitted whenever this much of them waits, so that staging memory stays bounded.
const UPLOAD_CHUNK: usize = 32 << 20;

impl Gpu {
    /// Live, peak and reserved bytes.
    pub fn memory(&self) -> Memory {
        self.0.pool.borrow().memory
    }

    /// Starts a new peak from what is live now.
    pub fn reset_peak(&self) {
        self.0.pool.borrow_mut().reset_peak();
    }

    /// Who holds what, on a device that only counts ([`super::GpuOptions::dry`]); nothing on others.
    pub fn holdings(&self) -> Holdings {
        self.0.pool.borrow().holdings.clone().unwrap_or_default()
    }

    /// True for a device that only counts: [`super::GpuOptions::dry`].
    pub fn is_dry(&self) -> bool {
        self.0.options.dry
    }

    /// Limits live bytes; an allocation past it fails by name.
    pub fn set_budget(&self, bytes: u64) {
        self.0.budget.set(bytes);
    }

    /// Allocates `bytes` of device memory for `tensor` on behalf of `op`; both are only for error messages.
    /// The contents are undefined. When memory is short the fault is kept and a minimal buffer returned.
    pub fn alloc(&self, bytes: u64, op: &str, tensor: &dyn Display) -> Buffer {
        let inner = &self.0;
        let guard = if inner.options.guards { GUARD_BYTES } else { 0 };
        if bytes > inner.max_binding {
            let limit = inner.max_binding;
            self.fail(Error::TooLarge { op: op.into(), tensor: tensor.to_string(), bytes, limit });
            return self.alloc(0, op, tensor);
        }
        let padded = bytes.next_multiple_of(16);
        let class = Pool::class(padded + guard).min(inner.max_buffer);
        let pooled = inner.pool.borrow_mut().take(class);
        let (raw, id) = match pooled {
            Some(found) => found,
            None => match self.create(class, op, tensor) {
                Some(raw) => {
                    let id = inner.pool.borrow_mut().adopt(class);
                    (raw, id)
                }
                None => return self.alloc(0, op, tensor),
            },
        };
        let gpu = Rc::downgrade(&self.0);
        let buffer =
            Buffer(Rc::new(Allocation { raw, id, offset: 0, bytes, class, whole: None, gpu }));
        if inner.options.guards && !inner.options.dry {
            let words = [GUARD_WORD; GUARD_BYTES as usize / 4];
            self.flush();
            inner.queue.write_buffer(&buffer.0.raw, padded, bytemuck::cast_slice(&words));
        }
        buffer
    }

    /// Where a part of a buffer may begin: at multiples of this many bytes.
    pub fn part_alignment(&self) -> u64 {
        u64::from(self.0.device.limits().min_storage_buffer_offset_alignment)
    }

    /// A part of `whole` that kernels and copies take like a buffer of its own. It keeps the whole alive. No dispatch
    /// may write one part and bind another.
    ///
    /// # Panics
    /// If `whole` is a part itself, the part lies beyond its end, or `offset` is no multiple of
    /// [`Gpu::part_alignment`].
    pub fn part(&self, whole: &Buffer, offset: u64, bytes: u64) -> Buffer {
        assert!(whole.0.whole.is_none(), "a part of a part");
        assert!(offset + bytes <= whole.bytes(), "{bytes} bytes at {offset} of {whole:?}");
        assert!(offset.is_multiple_of(self.part_alignment()), "a part at {offset} of {whole:?}");
        let (raw, id) = (whole.0.raw.clone(), self.0.pool.borrow_mut().new_id());
        let (whole, gpu) = (Some(whole.clone()), Rc::downgrade(&self.0));
        Buffer(Rc::new(Allocation { raw, id, offset, bytes, class: 0, whole, gpu }))
    }

    /// A new buffer from the driver; the pool is emptied first if the budget or the device is short.
    fn create(&self, class: u64, op: &str, tensor: &dyn Display) -> Option<wgpu::Buffer> {
        let inner = &self.0;
        let short = |gpu: &Gpu| {
            let memory = gpu.memory();
            gpu.fail(Error::OutOfMemory {
                op: op.into(),
                tensor: tensor.to_string(),
                bytes: class,
                live: memory.live,
                reserved: memory.reserved,
                budget: inner.budget.get(),
            });
        };
        // The smallest class always succeeds: it is what a failed allocation returns.
        if class > 512 {
            if self.memory().reserved + class > inner.budget.get() {
                self.trim();
            }
            if self.memory().live + class > inner.budget.get() {
                short(self);
                return None;
            }
        }
        if inner.options.dry {
            // Nothing is ever done with it, so any buffer will do.
            return Some(inner.arena.clone());
        }
        let descriptor = wgpu::BufferDescriptor {
            label: None,
            size: class,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let raw = inner.device.create_buffer(&descriptor);
        if !self.out_of_memory() {
            return Some(raw);
        }
        self.trim();
        let raw = inner.device.create_buffer(&descriptor);
        if self.out_of_memory() {
            short(self);
            return None;
        }
        Some(raw)
    }

    /// Takes an out-of-memory report, if that is what was reported.
    fn out_of_memory(&self) -> bool {
        let mut slot = self.0.reported.lock().unwrap_or_else(|e| e.into_inner());
        matches!(*slot, Some(Reported::OutOfMemory(_))) && slot.take().is_some()
    }

    /// Gives pooled memory back to the driver.
    pub fn trim(&self) {
        self.flush();
        if self.0.pool.borrow_mut().trim() {
            self.0.cache.borrow_mut().groups.clear();
            let _ = self.0.device.poll(wgpu::PollType::wait_indefinitely());
        }
    }

    /// Copies `bytes` into `buffer` at `offset` (a multiple of 4), in chunks.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        if self.idle() || bytes.is_empty() {
            return;
        }
        // A queue write runs before the next submit; what is recorded now must run before the write.
        self.flush();
        for (i, chunk) in bytes.chunks(UPLOAD_CHUNK).enumerate() {
            let at = buffer.0.offset + offset + (i * UPLOAD_CHUNK) as u64;
            let whole = chunk.len() & !3;
            self.0.queue.write_buffer(&buffer.0.raw, at, &chunk[..whole]);
            if whole < chunk.len() {
                let mut word = [0; 4];
                word[..chunk.len() - whole].copy_from_slice(&chunk[whole..]);
                self.0.queue.write_buffer(&buffer.0.raw, at + whole as u64, &word);
            }
            let waiting = self.0.uploads.get() + chunk.len();
            self.0.uploads.set(waiting);
            if waiting >= UPLOAD_CHUNK {
                // Frees the staging memory of these uploads before the next ones take more.
                self.0.queue.submit([]);
                let _ = self.0.device.poll(wgpu::PollType::wait_indefinitely());
                self.0.uploads.set(0);
            }
        }
    }

    /// Records a copy between two buffers; offsets and size are multiples of 4.
    ///
    /// # Panics
    /// If both are the same memory, or parts of it, which WebGPU does not copy.
    #[track_caller]
    pub fn copy(&self, from: &Buffer, from_offset: u64, to: &Buffer, to_offset: u64, bytes: u64) {
        assert!(!from.same(to), "a copy within {from:?}");
        if self.idle() || bytes == 0 {
            return;
        }
        let mut batch = self.0.batch.borrow_mut();
        batch.encoder(&self.0).copy_buffer_to_buffer(
            &from.0.raw,
            from.0.offset + from_offset,
            &to.0.raw,
            to.0.offset + to_offset,
            bytes,
        );
    }

    /// Records a fill of the whole buffer with zeros.
    pub fn zero(&self, buffer: &Buffer) {
        if self.idle() || buffer.bytes() == 0 {
            return;
        }
        let mut batch = self.0.batch.borrow_mut();
        let bytes = buffer.bytes().next_multiple_of(4);
        batch.encoder(&self.0).clear_buffer(&buffer.0.raw, buffer.0.offset, Some(bytes));
    }

    /// In guard mode, says whether the pattern behind `buffer` is intact.
    pub fn check_guards(&self, buffer: &Buffer) -> Result<bool> {
        if !self.0.options.guards || self.is_dry() {
            return Ok(true);
        }
        let owner = buffer.0.whole.as_ref().unwrap_or(buffer);
        let at = owner.bytes().next_multiple_of(16);
        let bytes = pollster::block_on(self.read_async(owner, at, GUARD_BYTES))?;
        Ok(bytes.chunks_exact(4).all(|w| w == GUARD_WORD.to_ne_bytes()))
    }
}

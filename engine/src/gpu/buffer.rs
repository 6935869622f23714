//! Device memory: buffers in size classes that return to a pool when dropped. The queue is in order, so a
//! buffer dropped on the host may be handed out again at once: whatever was recorded before runs before.

use std::collections::{BTreeMap, HashMap};
use std::rc::{Rc, Weak};

use super::GpuInner;
use super::hash::FastMap;

/// Bytes of pattern behind each buffer in guard mode.
pub(super) const GUARD_BYTES: u64 = 256;
/// The pattern itself.
pub(super) const GUARD_WORD: u32 = 0xA5C3_96E1;

/// A piece of device memory. Clones share it; the last one returns it to the pool.
#[derive(Clone)]
pub struct Buffer(pub(super) Rc<Allocation>);

pub(super) struct Allocation {
    pub raw: wgpu::Buffer,
    /// Unique for the lifetime of the device; keys the bind-group cache.
    pub id: u64,
    /// Where it begins in `raw`; not 0 only in a part.
    pub offset: u64,
    /// Bytes that the owner asked for.
    pub bytes: u64,
    /// Bytes that it takes; none in a part, whose whole takes them.
    pub class: u64,
    /// Of what it is a part; the whole owns the memory.
    pub whole: Option<Buffer>,
    pub gpu: Weak<GpuInner>,
}

impl Buffer {
    /// Bytes that were asked for; the allocation may be larger.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// True when both are the same memory, or parts of it.
    pub fn same(&self, other: &Buffer) -> bool {
        let owner = |buffer: &Buffer| buffer.0.whole.as_ref().map_or(buffer.0.id, |b| b.0.id);
        owner(self) == owner(other)
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer#{}({} bytes)", self.0.id, self.0.bytes)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(gpu) = self.gpu.upgrade().filter(|_| self.whole.is_none()) {
            gpu.pool.borrow_mut().put(self.raw.clone(), self.id, self.class);
        }
    }
}

/// Bytes held from the driver and how they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// In live buffers.
    pub live: u64,
    /// The largest `live` since the start or the last [`super::Gpu::reset_peak`].
    pub peak: u64,
    /// Held from the driver: live, or waiting in the pool.
    pub reserved: u64,
}

/// What a device that only counts holds: bytes of each allocation, by a number that no other one ever has.
#[derive(Clone, Debug, Default)]
pub struct Holdings {
    /// Now.
    pub now: HashMap<u64, u64>,
    /// When the most was live since the start or the last [`super::Gpu::reset_peak`].
    pub at_peak: HashMap<u64, u64>,
}

#[derive(Default)]
pub(super) struct Pool {
    /// Free buffers of each class by id. The lowest id is handed out first, whatever the order of the drops: a
    /// step that asks like the one before gets the same buffers, and finds its bind groups in the cache.
    free: FastMap<u64, BTreeMap<u64, wgpu::Buffer>>,
    next_id: u64,
    pub memory: Memory,
    /// Only of a device that only counts.
    pub holdings: Option<Holdings>,
}

impl Pool {
    /// An empty pool; if `dry`, it tells its allocations apart.
    pub fn new(dry: bool) -> Pool {
        Pool { holdings: dry.then(Holdings::default), ..Pool::default() }
    }

    /// Eight classes an octave: at most an eighth of a buffer is waste, and a training step finds all its
    /// buffers again in the next one.
    pub fn class(bytes: u64) -> u64 {
        let bytes = bytes.max(256);
        let step = (1 << (63 - bytes.leading_zeros())) / 8;
        bytes.next_multiple_of(step.max(256))
    }

    /// A pooled buffer of this class, if one is free.
    pub fn take(&mut self, class: u64) -> Option<(wgpu::Buffer, u64)> {
        let (mut id, raw) = self.free.get_mut(&class)?.pop_first()?;
        if self.holdings.is_some() {
            id = self.new_id();
        }
        self.hold(id, class);
        Some((raw, id))
    }

    /// Counts a buffer fresh from the driver and names it.
    pub fn adopt(&mut self, class: u64) -> u64 {
        self.memory.reserved += class;
        let id = self.new_id();
        self.hold(id, class);
        id
    }

    /// An id that was never given out.
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn hold(&mut self, id: u64, class: u64) {
        self.memory.live += class;
        if let Some(holdings) = &mut self.holdings {
            holdings.now.insert(id, class);
        }
        if self.memory.live > self.memory.peak {
            self.reset_peak();
        }
    }

    /// The peak is what is live now.
    pub fn reset_peak(&mut self) {
        self.memory.peak = self.memory.live;
        if let Some(holdings) = &mut self.holdings {
            holdings.at_peak.clone_from(&holdings.now);
        }
    }

    fn put(&mut self, raw: wgpu::Buffer, id: u64, class: u64) {
        self.memory.live -= class;
        if let Some(holdings) = &mut self.holdings {
            holdings.now.remove(&id);
        }
        self.free.entry(class).or_default().insert(id, raw);
    }

    /// Gives every free buffer back to the driver; true if there were any.
    pub fn trim(&mut self) -> bool {
        let mut freed = 0;
        for (class, buffers) in self.free.drain() {
            freed += class * buffers.len() as u64;
            buffers.into_values().for_each(|raw| raw.destroy());
        }
        self.memory.reserved -= freed;
        freed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn classes_waste_little() {
        for bytes in (1..100_000u64).step_by(37).chain([1 << 20, (1 << 30) + 1]) {
            let class = Pool::class(bytes);
            assert!(class >= bytes && class.is_multiple_of(256));
            assert!(class <= (bytes + bytes / 8).max(256) + 256, "{bytes} -> {class}");
        }
    }
}

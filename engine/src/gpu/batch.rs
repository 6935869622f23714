//! Recording and submitting: dispatches go into an open batch, a batch goes to the queue, and what the device
//! reports becomes a typed fault. A dispatch is encoded when its batch is submitted (or when a copy has to follow it):
//! until then its pipeline may still be compiled by another thread.

use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::time::Instant;

use super::buffer::Allocation;
use super::hash::FastMap;
use super::kernel::{Compiling, Layout, LayoutKey, MOST_BUFFERS, PipelineKey, kernel};
use super::profile::{TIMED_DISPATCHES, VariantUse};
use super::{BATCH, Buffer, Gpu, GpuInner, Kernel, PARAMS_SLOT, Variant};
use crate::{Error, Result};

const GATE: Kernel = kernel!("gate");

/// What wgpu's callbacks say; they may come from any thread.
pub(super) enum Reported {
    Lost(String),
    OutOfMemory(String),
    Invalid(String),
}

/// The open batch: what is encoded of it, the dispatches that are not yet, and the parameters of them all.
#[derive(Default)]
pub(super) struct Batch {
    encoder: Option<wgpu::CommandEncoder>,
    waiting: Vec<Dispatch>,
    params: Vec<u8>,
    grids: Vec<u32>,
    names: Vec<&'static str>,
    last_buffers: String,
    condition: Option<Condition>,
}

/// A dispatch that is recorded and not yet encoded.
struct Dispatch {
    name: &'static str,
    pipeline: Rc<Compiling>,
    group: wgpu::BindGroup,
    /// Of its parameters in the arena.
    offset: u32,
    grid: Grid,
}

enum Grid {
    Fixed([u32; 3]),
    /// Read by the device from a buffer, at this offset.
    Live(Buffer, u64),
}

/// Dispatches take their grids from `live`, which [`GATE`] fills from `grids` at the start of a batch.
#[derive(Clone)]
struct Condition {
    flag: Buffer,
    word: u32,
    grids: Buffer,
    live: Buffer,
}

/// Compiled pipelines, their layouts, and bind groups by the buffers they bind.
#[derive(Default)]
pub(super) struct Cache {
    layouts: HashMap<LayoutKey, Rc<Layout>>,
    /// By the hash of their key.
    pub pipelines: FastMap<u64, Pipeline>,
    pub groups: FastMap<GroupKey, wgpu::BindGroup>,
}

/// A variant that is compiled or being compiled, and what reports need to know of it.
pub(super) struct Pipeline {
    key: PipelineKey,
    compiling: Rc<Compiling>,
    layout: Rc<Layout>,
    /// Since the last reset of the counters.
    pub dispatches: u64,
}

impl Pipeline {
    pub fn used(&self) -> VariantUse {
        let (variant, hash) = (self.key.describe(), self.compiling.hash());
        VariantUse { variant, hash, dispatches: self.dispatches }
    }
}

/// The layout's counts, then the ids of the buffers, then zeros.
type GroupKey = [u64; 1 + MOST_BUFFERS];

impl Cache {
    /// The pipeline of this variant, whose compilation begins if it is new.
    fn pipeline(
        &mut self,
        inner: &GpuInner,
        variant: Variant<'_>,
        key: LayoutKey,
    ) -> &mut Pipeline {
        let mut hash = variant.hash(key);
        // Two variants of one hash, should they ever meet, live side by side.
        while self.pipelines.get(&hash).is_some_and(|p| !p.key.is(variant, key)) {
            hash = hash.wrapping_add(1);
        }
        self.pipelines.entry(hash).or_insert_with(|| {
            let layout = self
                .layouts
                .entry(key)
                .or_insert_with(|| Rc::new(Layout::new(&inner.device, key, PARAMS_SLOT as u64)));
            let compiling = Rc::new(Compiling::begin(inner, variant, layout));
            let key = PipelineKey::new(variant, key);
            Pipeline { key, compiling, layout: layout.clone(), dispatches: 0 }
        })
    }
}

impl Gpu {
    /// Records one dispatch of `grid` workgroups. `params` are the bytes of the kernel's `Params` (at most
    /// 256), `reads` and `writes` its bindings in order. An empty grid records nothing.
    ///
    /// Release builds run kernels without bounds checks: a kernel given here must keep to its buffers.
    ///
    /// # Panics
    /// If a buffer is both read and written, or twice written, there are more than eight, or the parameters are too
    /// large.
    pub fn dispatch(
        &self,
        variant: Variant<'_>,
        params: &[u8],
        reads: &[&Buffer],
        writes: &[&Buffer],
        grid: [u32; 3],
    ) {
        let name = variant.kernel.name;
        assert!(params.len() <= PARAMS_SLOT, "{name}: {} bytes of parameters", params.len());
        assert!(reads.len() + writes.len() <= MOST_BUFFERS, "{name}: too many buffers");
        for (i, w) in writes.iter().enumerate() {
            let alias = reads.iter().chain(&writes[..i]).any(|other| other.same(w));
            assert!(!alias, "{name}: output {i} aliases another binding");
        }
        if grid.contains(&0) || self.idle() {
            return;
        }
        let start = Instant::now();
        let full = self.record(variant, params, reads, writes, grid);
        let mut stats = self.0.stats.borrow_mut();
        stats.dispatches += 1;
        stats.host_time += start.elapsed();
        drop(stats);
        if self.0.options.synchronous {
            // Kept for the next read, like any fault.
            if let Err(fault) = self.sync() {
                self.fail(fault);
            }
        } else if full {
            self.flush();
        }
    }

    fn record(
        &self,
        variant: Variant<'_>,
        params: &[u8],
        reads: &[&Buffer],
        writes: &[&Buffer],
        grid: [u32; 3],
    ) -> bool {
        let inner = &*self.0;
        let mut batch = inner.batch.borrow_mut();
        if let Some(condition) = batch.condition.clone().filter(|_| batch.names.is_empty()) {
            let Condition { flag, word, grids, live } = &condition;
            let n = 3 * BATCH as u32;
            let own = [n, *word];
            let (reads, writes, grid) = ([flag, grids], [live], [n.div_ceil(256), 1, 1]);
            let own: &[u8] = bytemuck::cast_slice(&own);
            self.encode(&mut batch, GATE.with(&[]), own, &reads, &writes, grid, false);
            inner.stats.borrow_mut().dispatches += 1;
        }
        let conditional = batch.condition.is_some();
        self.encode(&mut batch, variant, params, reads, writes, grid, conditional);
        batch.names.len() >= BATCH.min(TIMED_DISPATCHES)
    }

    #[allow(clippy::too_many_arguments, reason = "a dispatch is all of these")]
    fn encode(
        &self,
        batch: &mut Batch,
        variant: Variant<'_>,
        params: &[u8],
        reads: &[&Buffer],
        writes: &[&Buffer],
        grid: [u32; 3],
        conditional: bool,
    ) {
        let inner = &*self.0;
        let mut cache = inner.cache.borrow_mut();
        let layout_key = LayoutKey { reads: reads.len(), writes: writes.len() };
        let mut key = [0; 1 + MOST_BUFFERS];
        key[0] = (reads.len() * 64 + writes.len()) as u64;
        for (id, buffer) in key[1..].iter_mut().zip(reads.iter().chain(writes)) {
            *id = buffer.0.id;
        }
        let pipeline = cache.pipeline(inner, variant, layout_key);
        pipeline.dispatches += 1;
        let (pipeline, layout) = (pipeline.compiling.clone(), pipeline.layout.clone());
        let group = cache.groups.entry(key).or_insert_with(|| {
            inner.stats.borrow_mut().bind_groups += 1;
            bind(&inner.device, &inner.arena, &layout, reads, writes)
        });
        let slot = batch.names.len();
        let offset = batch.params.len();
        batch.params.extend_from_slice(params);
        batch.params.resize(offset + PARAMS_SLOT, 0);
        batch.grids.extend_from_slice(&grid);
        batch.names.push(variant.kernel.name);
        if inner.options.synchronous || inner.options.checked {
            batch.last_buffers = format!("reads {reads:?}, writes {writes:?}");
        }
        let live = batch.condition.as_ref().filter(|_| conditional).map(|c| c.live.clone());
        let grid = match live {
            Some(live) => Grid::Live(live, 12 * slot as u64),
            None => Grid::Fixed(grid),
        };
        let (name, group, offset) = (variant.kernel.name, group.clone(), offset as u32);
        batch.waiting.push(Dispatch { name, pipeline, group, offset, grid });
    }

    /// True if [`Gpu::only_if`] can skip work here. DirectX gives kernels no number of workgroups when a dispatch
    /// takes its grid from a buffer, and OpenGL may have no such dispatches.
    pub fn can_skip(&self) -> bool {
        use wgpu::Backend::{Metal, Noop, Vulkan};
        matches!(self.0.entry.info.backend, Vulkan | Metal | Noop)
    }

    /// Records the dispatches of `work` so that the device skips them if this word of `flag` is 0 when it gets there:
    /// work can be recorded before it is known to be wanted. Copies are not skipped. Where [`Gpu::can_skip`] says no,
    /// everything is done.
    ///
    /// # Panics
    /// If one condition stands inside another.
    pub fn only_if<R>(&self, flag: &Buffer, word: usize, work: impl FnOnce() -> R) -> R {
        if !self.can_skip() || self.idle() {
            return work();
        }
        let inner = &*self.0;
        self.flush();
        let (grids, live) = inner.gate.borrow_mut().get_or_insert_with(|| self.gate()).clone();
        let condition = Condition { flag: flag.clone(), word: word as u32, grids, live };
        let before = inner.batch.borrow_mut().condition.replace(condition);
        assert!(before.is_none(), "a condition inside a condition");
        let result = work();
        self.flush();
        inner.batch.borrow_mut().condition = None;
        result
    }

    /// Grids as recorded, and as the device takes them.
    fn gate(&self) -> (Buffer, Buffer) {
        let bytes = (12 * BATCH) as u64;
        let grids = self.alloc(bytes, "only_if", &"grids");
        let raw = self.0.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("grids"),
            size: bytes,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::INDIRECT,
            mapped_at_creation: false,
        });
        let id = self.0.pool.borrow_mut().adopt(bytes);
        // Not the pool's: its buffers have another use.
        let (offset, class, whole, gpu) = (0, bytes, None, Weak::new());
        (grids, Buffer(Rc::new(Allocation { raw, id, offset, bytes, class, whole, gpu })))
    }

    /// Submits the open batch without waiting.
    pub fn flush(&self) {
        let _ = self.submit();
    }

    /// Submits the open batch, if there is one, and names the submission.
    pub(super) fn submit(&self) -> Option<wgpu::SubmissionIndex> {
        let inner = &*self.0;
        let mut batch = inner.batch.borrow_mut();
        let start = Instant::now();
        batch.settle(inner);
        let mut encoder = batch.encoder.take()?;
        let mut timestamps = inner.timestamps.borrow_mut();
        let timed = timestamps.as_mut().filter(|t| !t.names.is_empty());
        if let Some(t) = &timed {
            t.resolve(&mut encoder);
        }
        if !batch.params.is_empty() {
            inner.queue.write_buffer(&inner.arena, 0, &batch.params);
        }
        if let Some(condition) = &batch.condition {
            inner.queue.write_buffer(&condition.grids.0.raw, 0, bytemuck::cast_slice(&batch.grids));
        }
        let commands = encoder.finish();
        let mut stats = inner.stats.borrow_mut();
        stats.host_time += start.elapsed();
        let start = Instant::now();
        let submission = inner.queue.submit([commands]);
        stats.submits += 1;
        stats.submit_time += start.elapsed();
        if let Some(t) = timed {
            t.collect(&inner.device, inner.queue.get_timestamp_period(), &mut stats);
        } else {
            let _ = inner.device.poll(wgpu::PollType::Poll);
        }
        drop(stats);
        batch.params.clear();
        batch.grids.clear();
        let names = std::mem::take(&mut batch.names);
        let buffers = std::mem::take(&mut batch.last_buffers);
        drop(batch);
        self.take_report(&names, buffers);
        Some(submission)
    }

    /// Turns what wgpu reported into a typed fault that names the kernels in question.
    pub(super) fn take_report(&self, names: &[&'static str], buffers: String) {
        let report = self.0.reported.lock().unwrap_or_else(|e| e.into_inner()).take();
        let Some(report) = report else { return };
        let mut ops: Vec<_> = names.to_vec();
        ops.dedup();
        let op = match ops.as_slice() {
            [] => "an idle queue".to_owned(),
            [one] => (*one).to_owned(),
            many => format!("one of {}", many.join(", ")),
        };
        let memory = self.memory();
        self.fail(match report {
            Reported::Lost(reason) => Error::DeviceLost { op, reason },
            Reported::OutOfMemory(tensor) => Error::OutOfMemory {
                op,
                tensor,
                bytes: 0,
                live: memory.live,
                reserved: memory.reserved,
                budget: self.0.budget.get(),
            },
            Reported::Invalid(reason) => Error::Validation { op, tensor: buffers, reason },
        });
    }

    /// Keeps the first fault.
    pub(super) fn fail(&self, error: Error) {
        self.0.fault.borrow_mut().get_or_insert(error);
    }

    pub(super) fn faulted(&self) -> bool {
        self.0.fault.borrow().is_some()
    }

    /// True if work is dropped: after a fault, or on a device that only counts.
    pub(super) fn idle(&self) -> bool {
        self.is_dry() || self.faulted()
    }

    /// Submits everything and waits for it; returns the fault, if there was one, and clears it.
    pub fn sync(&self) -> Result<()> {
        self.flush();
        if let Err(e) = self.0.device.poll(wgpu::PollType::wait_indefinitely()) {
            self.fail(Error::DeviceLost { op: "waiting".into(), reason: e.to_string() });
        }
        self.take_report(&[], String::new());
        self.0.fault.borrow_mut().take().map_or(Ok(()), Err)
    }
}

impl Batch {
    /// The encoder behind everything recorded so far, for a copy.
    pub fn encoder(&mut self, inner: &GpuInner) -> &mut wgpu::CommandEncoder {
        self.settle(inner);
        self.open(inner)
    }

    fn open(&mut self, inner: &GpuInner) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| inner.device.create_command_encoder(&Default::default()))
    }

    /// Encodes the dispatches that wait, each as soon as its pipeline is compiled: in one pass, or, where they are
    /// timed, in one each.
    fn settle(&mut self, inner: &GpuInner) {
        let waiting = std::mem::take(&mut self.waiting);
        if waiting.is_empty() {
            return;
        }
        let mut timestamps = inner.timestamps.borrow_mut();
        let encoder = self.open(inner);
        // Without the lifetime that would keep the encoder from the next pass; each is dropped before that begins.
        let mut pass: Option<wgpu::ComputePass<'static>> = None;
        for dispatch in waiting {
            let stamps = timestamps.as_mut().map(|t| t.next(dispatch.name));
            if stamps.is_some() {
                pass = None;
            }
            let pass = pass.get_or_insert_with(|| {
                let stamps = stamps.as_ref().map(|(set, at)| wgpu::ComputePassTimestampWrites {
                    query_set: set,
                    beginning_of_pass_write_index: Some(*at),
                    end_of_pass_write_index: Some(at + 1),
                });
                let timed = wgpu::ComputePassDescriptor { label: None, timestamp_writes: stamps };
                encoder.begin_compute_pass(&timed).forget_lifetime()
            });
            pass.set_pipeline(dispatch.pipeline.ready());
            pass.set_bind_group(0, &dispatch.group, &[dispatch.offset]);
            match dispatch.grid {
                Grid::Live(grids, at) => pass.dispatch_workgroups_indirect(&grids.0.raw, at),
                Grid::Fixed([x, y, z]) => pass.dispatch_workgroups(x, y, z),
            }
        }
    }
}

fn bind(
    device: &wgpu::Device,
    arena: &wgpu::Buffer,
    layout: &Layout,
    reads: &[&Buffer],
    writes: &[&Buffer],
) -> wgpu::BindGroup {
    let params = wgpu::BufferBinding {
        buffer: arena,
        offset: 0,
        size: wgpu::BufferSize::new(PARAMS_SLOT as u64),
    };
    let mut entries =
        vec![wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(params) }];
    for (i, buffer) in reads.iter().chain(writes).enumerate() {
        // A part ends with its last quad, which kernels may read whole; a buffer of its own where its memory ends.
        let part = buffer.0.whole.as_ref().map(|_| buffer.bytes().next_multiple_of(16));
        let binding = wgpu::BufferBinding {
            buffer: &buffer.0.raw,
            offset: buffer.0.offset,
            size: part.and_then(wgpu::BufferSize::new),
        };
        let resource = wgpu::BindingResource::Buffer(binding);
        entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
    }
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &layout.group,
        entries: &entries,
    })
}

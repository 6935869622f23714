//! Device, memory, kernels, time. This floor knows bytes, not tensors.
//!
//! Work is recorded into an open batch and submitted in order; reading back is the only wait. A fault of the
//! device is kept and returned by the next [`Gpu::read`] or [`Gpu::sync`]; until then further work is dropped,
//! so nobody computes on garbage. One thread owns a device: the handle is `Rc`.

mod adapter;
mod buffer;
mod kernel;
mod profile;
pub mod source;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt::Display;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub use adapter::{ADAPTER_ENV, AdapterEntry, install_hint, list};
pub use buffer::{Buffer, Memory};
pub(crate) use kernel::kernel;
pub use kernel::{Kernel, Variant};
pub use profile::{KernelTime, Stats};

use crate::{Error, Result};
use buffer::{Allocation, GUARD_BYTES, GUARD_WORD, Pool};
use kernel::{Layout, LayoutKey, PipelineKey};
use profile::{TIMED_DISPATCHES, Timestamps};

/// Bytes of uniform arena that one dispatch's parameters take: the alignment every backend allows.
const PARAMS_SLOT: usize = 256;
/// Dispatches in one batch. Small enough that the device starts early, large enough that submits stay rare.
const BATCH: usize = 128;
/// Uploads larger than this are split, so that staging memory stays bounded.
const UPLOAD_CHUNK: usize = 32 << 20;

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// Index, backend or part of the name; `None` asks [`ADAPTER_ENV`], then takes the best.
    pub adapter: Option<String>,
    /// Compile kernels with bounds checks, loop bounds and zeroed workgroup memory.
    pub checked: bool,
    /// Put a pattern behind each buffer; [`Gpu::check_guards`] finds stray writes.
    pub guards: bool,
    /// Submit and wait after each dispatch, so that a fault names its kernel exactly.
    pub synchronous: bool,
    /// Time each kernel (needs timestamp queries; ignored without).
    pub timestamps: bool,
    /// Bytes of device memory that may be live; `None` leaves it to the device.
    pub budget: Option<u64>,
    /// A smaller binding limit than the device's, in bytes: how tests exercise sharding.
    pub max_binding: Option<u64>,
}

/// An open device. Clones share it.
#[derive(Clone)]
pub struct Gpu(Rc<GpuInner>);

pub(crate) struct GpuInner {
    entry: AdapterEntry,
    options: GpuOptions,
    device: wgpu::Device,
    queue: wgpu::Queue,
    max_binding: u64,
    arena: wgpu::Buffer,
    pool: RefCell<Pool>,
    batch: RefCell<Batch>,
    cache: RefCell<Cache>,
    stats: RefCell<Stats>,
    timestamps: RefCell<Option<Timestamps>>,
    staging: RefCell<Option<wgpu::Buffer>>,
    budget: Cell<u64>,
    fault: RefCell<Option<Error>>,
    /// Filled by wgpu's callbacks, which may come from any thread.
    reported: Arc<Mutex<Option<Reported>>>,
}

enum Reported {
    Lost(String),
    OutOfMemory(String),
    Invalid(String),
}

/// The open batch: an encoder with at most one open pass, and the parameters of its dispatches.
#[derive(Default)]
struct Batch {
    encoder: Option<wgpu::CommandEncoder>,
    pass: Option<wgpu::ComputePass<'static>>,
    params: Vec<u8>,
    names: Vec<&'static str>,
    last_buffers: String,
}

#[derive(Default)]
struct Cache {
    layouts: HashMap<LayoutKey, Rc<Layout>>,
    pipelines: HashMap<PipelineKey, (wgpu::ComputePipeline, Rc<Layout>)>,
    groups: HashMap<Vec<u64>, wgpu::BindGroup>,
    key: Vec<u64>,
}

impl Gpu {
    /// Opens a device and blocks until it is there.
    pub fn open(options: GpuOptions) -> Result<Gpu> {
        pollster::block_on(Self::open_async(options))
    }

    /// Opens a device with every limit and stable feature its adapter has.
    pub async fn open_async(options: GpuOptions) -> Result<Gpu> {
        let named = options.adapter.clone().or_else(|| std::env::var(ADAPTER_ENV).ok());
        let entry = adapter::choose(list().await, named.as_deref().filter(|n| !n.is_empty()))?;
        let mut limits = entry.limits.clone();
        // DX12 reserves memory for this many descriptors; the bind-group cache never holds so many.
        limits.max_non_sampler_bindings = limits.max_non_sampler_bindings.min(200_000);
        let coop = entry.features & wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("demask"),
            required_features: entry.features - wgpu::Features::all_experimental_mask() | coop,
            required_limits: limits,
            // SAFETY: the one experimental feature asked for, cooperative matrices, is used by no kernel that
            // has not passed its self-test on this device.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            // The pool keeps what it has; big driver-side blocks on top would be held twice.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
        };
        let (device, queue) = entry
            .adapter
            .request_device(&descriptor)
            .await
            .map_err(|e| Error::NoDevice { adapter: entry.describe(), reason: e.to_string() })?;
        Ok(Self::from_device(entry, options, device, queue))
    }

    fn from_device(
        entry: AdapterEntry,
        options: GpuOptions,
        device: wgpu::Device,
        queue: wgpu::Queue,
    ) -> Gpu {
        let reported: Arc<Mutex<Option<Reported>>> = Arc::default();
        let report = |slot: &Arc<Mutex<Option<Reported>>>, what: Reported| {
            // The first report is the cause; what follows are its consequences.
            slot.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(what);
        };
        let slot = reported.clone();
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                report(&slot, Reported::Lost(message));
            }
        });
        let slot = reported.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            let text = error.to_string();
            report(
                &slot,
                match error {
                    wgpu::Error::OutOfMemory { .. } => Reported::OutOfMemory(text),
                    _ => Reported::Invalid(text),
                },
            );
        }));
        let arena = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: (BATCH * PARAMS_SLOT) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let limits = device.limits();
        let device_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let timed =
            options.timestamps && device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        Gpu(Rc::new(GpuInner {
            max_binding: options.max_binding.unwrap_or(u64::MAX).min(device_binding),
            budget: Cell::new(options.budget.unwrap_or(u64::MAX)),
            timestamps: RefCell::new(timed.then(|| Timestamps::new(&device))),
            entry,
            options,
            device,
            queue,
            arena,
            pool: RefCell::default(),
            batch: RefCell::default(),
            cache: RefCell::default(),
            stats: RefCell::default(),
            staging: RefCell::default(),
            fault: RefCell::default(),
            reported,
        }))
    }

    /// The adapter behind this device, with the features and limits that were requested and granted.
    pub fn adapter(&self) -> &AdapterEntry {
        &self.0.entry
    }

    /// True if the device has all of these features.
    pub fn has(&self, features: wgpu::Features) -> bool {
        self.0.device.features().contains(features)
    }

    /// The largest tensor in bytes that one kernel binding can take; a larger weight is sharded by rows.
    pub fn max_binding(&self) -> u64 {
        self.0.max_binding
    }

    /// Live, peak and reserved bytes.
    pub fn memory(&self) -> Memory {
        self.0.pool.borrow().memory
    }

    /// Starts a new peak from what is live now.
    pub fn reset_peak(&self) {
        let mut pool = self.0.pool.borrow_mut();
        pool.memory.peak = pool.memory.live;
    }

    /// Limits live bytes; an allocation past it fails by name.
    pub fn set_budget(&self, bytes: u64) {
        self.0.budget.set(bytes);
    }

    /// Counters since the last reset. Submits what is open, so that all recorded work is counted.
    pub fn stats(&self) -> Stats {
        self.flush();
        self.0.stats.borrow().clone()
    }

    /// Sets all counters to zero.
    pub fn reset_stats(&self) {
        self.flush();
        *self.0.stats.borrow_mut() = Stats::default();
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
        let class = Pool::class(padded + guard).min(inner.device.limits().max_buffer_size & !255);
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
        let buffer = Buffer(Rc::new(Allocation { raw, id, bytes, gpu: Rc::downgrade(&self.0) }));
        if inner.options.guards {
            let words = [GUARD_WORD; GUARD_BYTES as usize / 4];
            self.flush();
            inner.queue.write_buffer(&buffer.0.raw, padded, bytemuck::cast_slice(&words));
        }
        buffer
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
        if self.faulted() || bytes.is_empty() {
            return;
        }
        // A queue write runs before the next submit; what is recorded now must run before the write.
        self.flush();
        let split = bytes.len() > UPLOAD_CHUNK;
        for (i, chunk) in bytes.chunks(UPLOAD_CHUNK).enumerate() {
            let at = offset + (i * UPLOAD_CHUNK) as u64;
            let whole = chunk.len() & !3;
            self.0.queue.write_buffer(&buffer.0.raw, at, &chunk[..whole]);
            if whole < chunk.len() {
                let mut word = [0; 4];
                word[..chunk.len() - whole].copy_from_slice(&chunk[whole..]);
                self.0.queue.write_buffer(&buffer.0.raw, at + whole as u64, &word);
            }
            if split {
                // Frees the staging memory of this chunk before the next one takes more.
                self.0.queue.submit([]);
                let _ = self.0.device.poll(wgpu::PollType::wait_indefinitely());
            }
        }
    }

    /// Records a copy between two buffers; offsets and size are multiples of 4.
    pub fn copy(&self, from: &Buffer, from_offset: u64, to: &Buffer, to_offset: u64, bytes: u64) {
        if self.faulted() || bytes == 0 {
            return;
        }
        let mut batch = self.0.batch.borrow_mut();
        batch.pass = None;
        batch.encoder(&self.0.device).copy_buffer_to_buffer(
            &from.0.raw,
            from_offset,
            &to.0.raw,
            to_offset,
            bytes,
        );
    }

    /// Records a fill of the whole buffer with zeros.
    pub fn zero(&self, buffer: &Buffer) {
        if self.faulted() || buffer.bytes() == 0 {
            return;
        }
        let mut batch = self.0.batch.borrow_mut();
        batch.pass = None;
        let bytes = buffer.bytes().next_multiple_of(4);
        batch.encoder(&self.0.device).clear_buffer(&buffer.0.raw, 0, Some(bytes));
    }

    /// Records one dispatch of `grid` workgroups. `params` are the bytes of the kernel's `Params` (at most
    /// 256), `reads` and `writes` its bindings in order. An empty grid records nothing.
    ///
    /// Release builds run kernels without bounds checks: a kernel given here must keep to its buffers.
    ///
    /// # Panics
    /// If a buffer is both read and written, or twice written, or the parameters are too large.
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
        for (i, w) in writes.iter().enumerate() {
            let alias = reads.iter().chain(&writes[..i]).any(|other| other.same(w));
            assert!(!alias, "{name}: output {i} aliases another binding");
        }
        if grid.contains(&0) || self.faulted() {
            return;
        }
        let start = Instant::now();
        let full = self.record(variant, params, reads, writes, grid);
        let mut stats = self.0.stats.borrow_mut();
        stats.dispatches += 1;
        stats.host_time += start.elapsed();
        drop(stats);
        if self.0.options.synchronous {
            let _ = self.sync();
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
        let mut cache = inner.cache.borrow_mut();
        let Cache { layouts, pipelines, groups, key } = &mut *cache;
        let layout_key = LayoutKey { reads: reads.len(), writes: writes.len() };
        let pipeline_key = PipelineKey::new(variant, layout_key);
        let (pipeline, layout) = pipelines.entry(pipeline_key).or_insert_with(|| {
            let layout = layouts
                .entry(layout_key)
                .or_insert_with(|| {
                    Rc::new(Layout::new(&inner.device, layout_key, PARAMS_SLOT as u64))
                })
                .clone();
            (kernel::compile(&inner.device, variant, &layout, inner.options.checked), layout)
        });
        key.clear();
        key.push((reads.len() * 64 + writes.len()) as u64);
        key.extend(reads.iter().chain(writes).map(|b| b.0.id));
        if !groups.contains_key(key) {
            let group = bind(&inner.device, &inner.arena, layout, reads, writes);
            groups.insert(key.clone(), group);
        }
        let offset = batch.params.len();
        batch.params.extend_from_slice(params);
        batch.params.resize(offset + PARAMS_SLOT, 0);
        batch.names.push(variant.kernel.name);
        if inner.options.synchronous || inner.options.checked {
            batch.last_buffers = format!("reads {reads:?}, writes {writes:?}");
        }
        let mut timestamps = inner.timestamps.borrow_mut();
        let pass = batch.pass(&inner.device, timestamps.as_mut(), variant.kernel.name);
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, &groups[key], &[offset as u32]);
        pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        if timestamps.is_some() {
            batch.pass = None;
        }
        batch.names.len() == BATCH.min(TIMED_DISPATCHES)
    }

    /// Submits the open batch without waiting.
    pub fn flush(&self) {
        let inner = &*self.0;
        let mut batch = inner.batch.borrow_mut();
        batch.pass = None;
        let Some(mut encoder) = batch.encoder.take() else { return };
        let start = Instant::now();
        let mut timestamps = inner.timestamps.borrow_mut();
        let timed = timestamps.as_mut().filter(|t| !t.names.is_empty());
        if let Some(t) = &timed {
            t.resolve(&mut encoder);
        }
        if !batch.params.is_empty() {
            inner.queue.write_buffer(&inner.arena, 0, &batch.params);
        }
        inner.queue.submit([encoder.finish()]);
        let mut stats = inner.stats.borrow_mut();
        stats.submits += 1;
        stats.host_time += start.elapsed();
        if let Some(t) = timed {
            t.collect(&inner.device, inner.queue.get_timestamp_period(), &mut stats);
        } else {
            let _ = inner.device.poll(wgpu::PollType::Poll);
        }
        drop(stats);
        batch.params.clear();
        let names = std::mem::take(&mut batch.names);
        let buffers = std::mem::take(&mut batch.last_buffers);
        drop(batch);
        self.take_report(&names, buffers);
    }

    /// Turns what wgpu reported into a typed fault that names the kernels in question.
    fn take_report(&self, names: &[&'static str], buffers: String) {
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
    fn fail(&self, error: Error) {
        self.0.fault.borrow_mut().get_or_insert(error);
    }

    fn faulted(&self) -> bool {
        self.0.fault.borrow().is_some()
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

    /// Reads a buffer's contents; blocks. Returns the fault, if there was one.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<u8>> {
        pollster::block_on(self.read_async(buffer, 0, buffer.bytes()))
    }

    /// Reads `bytes` from `offset` (a multiple of 4): the one place where the engine waits for the device.
    pub async fn read_async(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let inner = &*self.0;
        if let Some(fault) = inner.fault.borrow_mut().take() {
            return Err(fault);
        }
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let size = bytes.next_multiple_of(4);
        let staging = inner.staging.borrow_mut().take().filter(|s| s.size() >= size);
        let staging = staging.unwrap_or_else(|| {
            inner.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("read back"),
                size: size.next_power_of_two(),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        });
        {
            let mut batch = inner.batch.borrow_mut();
            batch.pass = None;
            let encoder = batch.encoder(&inner.device);
            encoder.copy_buffer_to_buffer(&buffer.0.raw, offset, &staging, 0, size);
        }
        self.flush();
        let mapped = Mapped::default();
        let done = mapped.clone();
        staging
            .slice(..size)
            .map_async(wgpu::MapMode::Read, move |result| done.set(result.is_ok()));
        if cfg!(not(target_arch = "wasm32")) {
            let _ = inner.device.poll(wgpu::PollType::wait_indefinitely());
        }
        let ok = mapped.await;
        self.take_report(&[], String::new());
        if let Some(fault) = inner.fault.borrow_mut().take() {
            return Err(fault);
        }
        let view = match ok.then(|| staging.slice(..size).get_mapped_range()) {
            Some(Ok(view)) => view,
            _ => {
                let reason = "a buffer could not be mapped".into();
                return Err(Error::DeviceLost { op: "read back".into(), reason });
            }
        };
        let data = view[..bytes as usize].to_vec();
        drop(view);
        staging.unmap();
        // A large staging buffer is not worth holding.
        if staging.size() <= 4 << 20 {
            *inner.staging.borrow_mut() = Some(staging);
        }
        Ok(data)
    }

    /// In guard mode, says whether the pattern behind `buffer` is intact.
    pub fn check_guards(&self, buffer: &Buffer) -> Result<bool> {
        if !self.0.options.guards {
            return Ok(true);
        }
        let at = buffer.bytes().next_multiple_of(16);
        let bytes = pollster::block_on(self.read_async(buffer, at, GUARD_BYTES))?;
        Ok(bytes.chunks_exact(4).all(|w| w == GUARD_WORD.to_ne_bytes()))
    }
}

impl Batch {
    fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
        self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
    }

    fn pass(
        &mut self,
        device: &wgpu::Device,
        timestamps: Option<&mut Timestamps>,
        name: &'static str,
    ) -> &mut wgpu::ComputePass<'static> {
        if self.pass.is_none() {
            let writes = timestamps.map(|t| {
                let at = 2 * t.names.len() as u32;
                t.names.push(name);
                (t.set.clone(), at)
            });
            let writes = writes.as_ref().map(|(set, at)| wgpu::ComputePassTimestampWrites {
                query_set: set,
                beginning_of_pass_write_index: Some(*at),
                end_of_pass_write_index: Some(at + 1),
            });
            let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes: writes };
            let pass = self.encoder(device).begin_compute_pass(&descriptor).forget_lifetime();
            self.pass = Some(pass);
        }
        self.pass.as_mut().expect("a pass was just begun")
    }
}

/// Grid of `n` workgroups folded over y, for kernels that use `linear_workgroup`.
pub fn fold(n: usize) -> [u32; 3] {
    const ROW: usize = 65_535;
    if n <= ROW { [n as u32, 1, 1] } else { [ROW as u32, n.div_ceil(ROW) as u32, 1] }
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
        entries.push(wgpu::BindGroupEntry {
            binding: i as u32 + 1,
            resource: buffer.0.raw.as_entire_binding(),
        });
    }
    device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &layout.group,
        entries: &entries,
    })
}

/// A one-shot future that wgpu's map callback completes.
#[derive(Clone, Default)]
struct Mapped(Arc<Mutex<(Option<bool>, Option<std::task::Waker>)>>);

impl Mapped {
    fn set(&self, ok: bool) {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        state.0 = Some(ok);
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    }
}

impl Future for Mapped {
    type Output = bool;

    fn poll(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<bool> {
        let mut state = self.0.lock().unwrap_or_else(|e| e.into_inner());
        match state.0 {
            Some(ok) => std::task::Poll::Ready(ok),
            None => {
                state.1 = Some(context.waker().clone());
                std::task::Poll::Pending
            }
        }
    }
}

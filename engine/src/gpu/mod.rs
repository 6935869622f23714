//! Device, memory, kernels, time. This floor knows bytes, not tensors.
//!
//! Work is recorded into an open batch and submitted in order; reading back is the only wait. A fault of the
//! device is kept and returned by the next [`Gpu::read`] or [`Gpu::sync`]; until then further work is dropped,
//! so nobody computes on garbage. One thread owns a device: the handle is `Rc`.

mod adapter;
mod batch;
mod buffer;
mod hash;
mod kernel;
mod memory;
mod open;
mod profile;
mod read_back;
pub mod source;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

pub use adapter::{ADAPTER_ENV, AdapterEntry, install_hint, list};
pub use buffer::{Buffer, Holdings, Memory};
pub(crate) use kernel::kernel;
pub use kernel::{Kernel, Translation, Translator, Variant};
pub use open::Refusal;
pub use profile::{KernelTime, Stats, VariantUse};
pub use read_back::ReadBack;

use crate::{Error, Result};
use batch::{Batch, Cache, Reported};
use buffer::Pool;
use profile::Timestamps;

/// Bytes of uniform arena that one dispatch's parameters take: the alignment every backend allows.
const PARAMS_SLOT: usize = 256;
/// Dispatches in one batch. Small enough that the device starts early, large enough that submits stay rare.
const BATCH: usize = 128;

/// What a [`Translator`] needs of a device, in place of cooperative matrices: other languages have none.
const PASSTHROUGH: wgpu::Features = wgpu::Features::PASSTHROUGH_SHADERS;

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
    /// Let matrix units round both factors of a product to f16 (sums stay f32) where that is fast. A value beyond
    /// 65504 overflows, so this is for inference in half precision.
    pub f16_products: bool,
    /// Count memory and do nothing else: no kernel is compiled or run, no memory is taken, what is read back is zeros.
    /// Everything is chosen and counted as on the adapter itself, so that what work would take is known before.
    pub dry: bool,
    /// A smaller binding limit than the device's, in bytes: how tests exercise sharding.
    pub max_binding: Option<u64>,
    /// Makes the SPIR-V of each kernel in place of wgpu: how tests run kernels that came through another compiler.
    /// Vulkan only.
    pub translator: Option<Translator>,
}

/// Names a decision that is made once for a device: which variant of an op serves a class of extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClassKey {
    /// The op.
    pub op: &'static str,
    /// What tells one class from another; the op knows what each means.
    pub numbers: [u32; 5],
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
    max_buffer: u64,
    arena: wgpu::Buffer,
    pool: RefCell<Pool>,
    batch: RefCell<Batch>,
    /// Bytes written since uploads were last waited for.
    uploads: Cell<usize>,
    cache: RefCell<Cache>,
    /// Buffers of `only_if`, made when it is first used.
    gate: RefCell<Option<(Buffer, Buffer)>>,
    stats: RefCell<Stats>,
    timestamps: RefCell<Option<Timestamps>>,
    staging: RefCell<Vec<wgpu::Buffer>>,
    budget: Cell<u64>,
    choices: RefCell<HashMap<ClassKey, usize>>,
    rows: Cell<Option<usize>>,
    fault: RefCell<Option<Error>>,
    /// Filled by wgpu's callbacks, which may come from any thread.
    reported: Arc<Mutex<Option<Reported>>>,
}

impl Gpu {
    /// Opens a device and blocks until it is there.
    pub fn open(options: GpuOptions) -> Result<Gpu> {
        pollster::block_on(Self::open_async(options))
    }

    /// Opens a device with every limit and stable feature that its adapter has and gives: a feature that is offered and
    /// then refused is done without, see [`AdapterEntry::refused`].
    pub async fn open_async(options: GpuOptions) -> Result<Gpu> {
        let named = options.adapter.clone().or_else(|| std::env::var(ADAPTER_ENV).ok());
        let named = named.as_deref().filter(|n| !n.is_empty());
        let mut entry = adapter::choose(adapter::candidates(named).await, named)?;
        let mut needed = wgpu::Features::empty();
        if options.translator.is_some() {
            needed |= PASSTHROUGH;
            entry.features.remove(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        }
        let (device, queue) = open::open(&mut entry, needed).await?;
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
        let pool = Pool::new(options.dry);
        Gpu(Rc::new(GpuInner {
            max_binding: options.max_binding.unwrap_or(u64::MAX).min(device_binding),
            max_buffer: limits.max_buffer_size & !255,
            budget: Cell::new(options.budget.unwrap_or(u64::MAX)),
            timestamps: RefCell::new(timed.then(|| Timestamps::new(&device))),
            entry,
            options,
            device,
            queue,
            arena,
            pool: RefCell::new(pool),
            batch: RefCell::default(),
            uploads: Cell::new(0),
            cache: RefCell::default(),
            gate: RefCell::default(),
            stats: RefCell::default(),
            staging: RefCell::default(),
            choices: RefCell::default(),
            rows: Cell::new(None),
            fault: RefCell::default(),
            reported,
        }))
    }

    /// The adapter behind this device, with the features and limits that it granted, and what it refused.
    pub fn adapter(&self) -> &AdapterEntry {
        &self.0.entry
    }

    /// True if the device has all of these features.
    pub fn has(&self, features: wgpu::Features) -> bool {
        self.0.device.features().contains(features)
    }

    /// True if every subgroup has `size` invocations.
    pub fn has_subgroups_of(&self, size: u32) -> bool {
        let info = &self.0.entry.info;
        self.has(wgpu::Features::SUBGROUP)
            && (info.subgroup_min_size, info.subgroup_max_size) == (size, size)
    }

    /// True if products may round their factors to f16; see [`GpuOptions::f16_products`].
    pub fn f16_products(&self) -> bool {
        self.0.options.f16_products
    }

    /// Chooses kernels within `work` as for products of so many rows, whatever they have: another kernel is another
    /// order of sums, and a sequence's numbers should not depend on how many others run beside it. `None` leaves it to
    /// the rows.
    pub(crate) fn as_for_rows<R>(&self, rows: Option<usize>, work: impl FnOnce() -> R) -> R {
        let before = self.0.rows.replace(rows);
        let result = work();
        self.0.rows.set(before);
        result
    }

    /// See [`Gpu::as_for_rows`].
    pub(crate) fn rows(&self) -> Option<usize> {
        self.0.rows.get()
    }

    /// Which variant was chosen for a class; `None` leaves it to the op's own judgement.
    pub(crate) fn choice(&self, class: ClassKey) -> Option<usize> {
        self.0.choices.borrow().get(&class).copied()
    }

    /// Makes, or with `None` takes back, a choice.
    pub(crate) fn set_choice(&self, class: ClassKey, variant: Option<usize>) {
        let mut choices = self.0.choices.borrow_mut();
        match variant {
            Some(variant) => choices.insert(class, variant),
            None => choices.remove(&class),
        };
    }

    /// The largest tensor in bytes that one kernel binding can take; a larger weight is sharded by rows.
    pub fn max_binding(&self) -> u64 {
        self.0.max_binding
    }

    /// Counters since the last reset. Submits what is open, so that all recorded work is counted.
    pub fn stats(&self) -> Stats {
        self.flush();
        let mut stats = self.0.stats.borrow().clone();
        let cache = self.0.cache.borrow();
        let used = cache.pipelines.values().filter(|pipeline| pipeline.dispatches > 0);
        stats.variants = used.map(|pipeline| pipeline.used()).collect();
        stats.variants.sort_by(|a, b| a.variant.cmp(&b.variant));
        stats
    }

    /// Sets all counters to zero.
    pub fn reset_stats(&self) {
        self.flush();
        *self.0.stats.borrow_mut() = Stats::default();
        for pipeline in self.0.cache.borrow_mut().pipelines.values_mut() {
            pipeline.dispatches = 0;
        }
    }

    /// Switches the timing of kernels on or off from here on; where it is off, dispatches share passes as in use.
    /// Without timestamp queries it stays off.
    pub fn time_kernels(&self, on: bool) {
        self.flush();
        let can = self.has(wgpu::Features::TIMESTAMP_QUERY);
        *self.0.timestamps.borrow_mut() = (on && can).then(|| Timestamps::new(&self.0.device));
    }
}

/// Grid of `n` workgroups folded over y, for kernels that use `linear_workgroup`.
pub fn fold(n: usize) -> [u32; 3] {
    const ROW: usize = 65_535;
    if n <= ROW { [n as u32, 1, 1] } else { [ROW as u32, n.div_ceil(ROW) as u32, 1] }
}

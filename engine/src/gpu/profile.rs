//! Where time goes: dispatches, host time to record them, device time per kernel from timestamps.

use std::collections::BTreeMap;
use std::time::Duration;

/// Device time of one kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelTime {
    /// Dispatches timed.
    pub count: u64,
    /// Sum of their device times.
    pub time: Duration,
}

/// A kernel with its constants and imports, as it was compiled, and how often it was dispatched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VariantUse {
    /// The kernel's name, then what was chosen: `matmul ADD=0 weight=weight_f32`.
    pub variant: String,
    /// FNV-1a of the expanded WGSL: tells two versions of a kernel apart.
    pub hash: u64,
    /// Dispatches recorded.
    pub dispatches: u64,
}

/// Counters since the start or the last [`super::Gpu::reset_stats`].
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Dispatches recorded.
    pub dispatches: u64,
    /// Bind groups made: dispatches whose combination of buffers was not in the cache.
    pub bind_groups: u64,
    /// Batches submitted.
    pub submits: u64,
    /// Host time spent recording dispatches and finishing encoders.
    pub host_time: Duration,
    /// Host time spent in the driver's submit. A GPU's driver returns at once; a software driver may do the work of the
    /// whole batch inside (Mesa's llvmpipe does).
    pub submit_time: Duration,
    /// Device time per kernel; empty unless the device was opened with `timestamps`.
    pub kernels: BTreeMap<&'static str, KernelTime>,
    /// What was dispatched, by variant, in order of their names.
    pub variants: Vec<VariantUse>,
}

impl Stats {
    /// Device time of all kernels together.
    pub fn device_time(&self) -> Duration {
        self.kernels.values().map(|k| k.time).sum()
    }
}

/// Timestamps of the open batch: two per dispatch, one compute pass per kernel, because Apple GPUs
/// can only stamp the borders of a pass.
pub(super) struct Timestamps {
    pub set: wgpu::QuerySet,
    resolve: wgpu::Buffer,
    staging: wgpu::Buffer,
    pub names: Vec<&'static str>,
}

/// Dispatches that one batch may hold when timed (two queries each; WebGPU allows 4096 in a set).
pub(super) const TIMED_DISPATCHES: usize = 128;

impl Timestamps {
    pub fn new(device: &wgpu::Device) -> Self {
        let count = 2 * TIMED_DISPATCHES as u32;
        let buffer = |usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: u64::from(count) * 8,
                usage,
                mapped_at_creation: false,
            })
        };
        Timestamps {
            set: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count,
            }),
            resolve: buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC),
            staging: buffer(wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ),
            names: Vec::new(),
        }
    }

    /// Where the next dispatch writes its beginning, and behind it its end.
    pub fn next(&mut self, name: &'static str) -> (wgpu::QuerySet, u32) {
        let at = 2 * self.names.len() as u32;
        self.names.push(name);
        (self.set.clone(), at)
    }

    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        let count = 2 * self.names.len() as u32;
        encoder.resolve_query_set(&self.set, 0..count, &self.resolve, 0);
        encoder.copy_buffer_to_buffer(&self.resolve, 0, &self.staging, 0, u64::from(count) * 8);
    }

    /// Waits for the batch and adds its times to `stats`. Timing serialises batches on purpose.
    pub fn collect(&mut self, device: &wgpu::Device, period_ns: f32, stats: &mut Stats) {
        let slice = self.staging.slice(..);
        slice.map_async(wgpu::MapMode::Read, |_| {});
        let names = std::mem::take(&mut self.names);
        if device.poll(wgpu::PollType::wait_indefinitely()).is_err() {
            return;
        }
        let Ok(view) = slice.get_mapped_range() else { return };
        let ticks: &[u64] = bytemuck::cast_slice(&view);
        for (i, name) in names.into_iter().enumerate() {
            let span = ticks[2 * i + 1].saturating_sub(ticks[2 * i]);
            let entry = stats.kernels.entry(name).or_default();
            entry.count += 1;
            entry.time += Duration::from_nanos((span as f64 * f64::from(period_ns)) as u64);
        }
        drop(view);
        self.staging.unmap();
    }
}

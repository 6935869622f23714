//! Recording and submitting: dispatches go into an open batch, a batch goes to the queue, and what the device
//! reports becomes a typed fault.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

use super::kernel::{self, Compiled, Layout, LayoutKey, PipelineKey};
use super::profile::{TIMED_DISPATCHES, Timestamps};
use super::{BATCH, Buffer, Gpu, PARAMS_SLOT, Variant};
use crate::{Error, Result};

/// What wgpu's callbacks say; they may come from any thread.
pub(super) enum Reported {
    Lost(String),
    OutOfMemory(String),
    Invalid(String),
}

/// The open batch: an encoder with at most one open pass, and the parameters of its dispatches.
#[derive(Default)]
pub(super) struct Batch {
    encoder: Option<wgpu::CommandEncoder>,
    pub pass: Option<wgpu::ComputePass<'static>>,
    params: Vec<u8>,
    names: Vec<&'static str>,
    last_buffers: String,
}

/// Compiled pipelines, their layouts, and bind groups by the buffers they bind.
#[derive(Default)]
pub(super) struct Cache {
    layouts: HashMap<LayoutKey, Rc<Layout>>,
    pub pipelines: HashMap<PipelineKey, Compiled>,
    pub groups: HashMap<Vec<u64>, wgpu::BindGroup>,
    key: Vec<u64>,
}

impl Gpu {
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
        let mut cache = inner.cache.borrow_mut();
        let Cache { layouts, pipelines, groups, key } = &mut *cache;
        let layout_key = LayoutKey { reads: reads.len(), writes: writes.len() };
        let pipeline_key = PipelineKey::new(variant, layout_key);
        let compiled = pipelines.entry(pipeline_key).or_insert_with(|| {
            let layout = layouts
                .entry(layout_key)
                .or_insert_with(|| {
                    Rc::new(Layout::new(&inner.device, layout_key, PARAMS_SLOT as u64))
                })
                .clone();
            kernel::compile(&inner.device, variant, layout, inner.options.checked)
        });
        compiled.dispatches += 1;
        key.clear();
        key.push((reads.len() * 64 + writes.len()) as u64);
        key.extend(reads.iter().chain(writes).map(|b| b.0.id));
        if !groups.contains_key(key) {
            let group = bind(&inner.device, &inner.arena, &compiled.layout, reads, writes);
            groups.insert(key.clone(), group);
            inner.stats.borrow_mut().bind_groups += 1;
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
        pass.set_pipeline(&compiled.pipeline);
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
        let commands = encoder.finish();
        let mut stats = inner.stats.borrow_mut();
        stats.host_time += start.elapsed();
        let start = Instant::now();
        inner.queue.submit([commands]);
        stats.submits += 1;
        stats.submit_time += start.elapsed();
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
    pub fn encoder(&mut self, device: &wgpu::Device) -> &mut wgpu::CommandEncoder {
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

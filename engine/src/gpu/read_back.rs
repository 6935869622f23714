//! Reading back: the one place where the engine waits for the device. Native code blocks; a browser awaits.

use std::sync::{Arc, Mutex};

use super::{Buffer, Gpu};
use crate::{Error, Result};

impl Gpu {
    /// Reads a buffer's contents; blocks. Returns the fault, if there was one.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<u8>> {
        pollster::block_on(self.read_async(buffer, 0, buffer.bytes()))
    }

    /// Reads `bytes` from `offset` (a multiple of 4): the one place where the engine waits for the device.
    pub async fn read_async(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        if let Some(fault) = self.0.fault.borrow_mut().take() {
            return Err(fault);
        }
        if bytes == 0 {
            return Ok(Vec::new());
        }
        self.read_later(buffer, offset, bytes).wait_async().await
    }

    /// Submits what is recorded and a copy of `bytes` from `offset` (a multiple of 4) behind it, without waiting.
    pub fn read_later(&self, buffer: &Buffer, offset: u64, bytes: u64) -> ReadBack {
        let inner = &*self.0;
        let size = bytes.next_multiple_of(4);
        if self.is_dry() {
            let (staging, mapped) = (inner.arena.clone(), Mapped::default());
            return ReadBack { gpu: self.clone(), staging, mapped, submission: None, bytes };
        }
        let mut kept = inner.staging.borrow_mut();
        let fits = kept.iter().position(|s| s.size() >= size);
        let staging = fits.map(|i| kept.swap_remove(i)).unwrap_or_else(|| {
            inner.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("read back"),
                size: size.next_power_of_two().max(1024),
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        });
        drop(kept);
        {
            let mut batch = inner.batch.borrow_mut();
            let encoder = batch.encoder(inner);
            let from = buffer.0.offset + offset;
            encoder.copy_buffer_to_buffer(&buffer.0.raw, from, &staging, 0, size);
        }
        // A submission that was refused never ends.
        let submission = self.submit().filter(|_| !self.faulted());
        let mapped = Mapped::default();
        let done = mapped.clone();
        staging
            .slice(..size)
            .map_async(wgpu::MapMode::Read, move |result| done.set(result.is_ok()));
        ReadBack { gpu: self.clone(), staging, mapped, submission, bytes }
    }
}

/// A copy of device memory on its way to the host. Work recorded after it does not delay it.
pub struct ReadBack {
    gpu: Gpu,
    staging: wgpu::Buffer,
    mapped: Mapped,
    submission: Option<wgpu::SubmissionIndex>,
    bytes: u64,
}

impl ReadBack {
    /// Waits for it, and for no work behind it; returns the fault, if there was one.
    pub fn wait(self) -> Result<Vec<u8>> {
        pollster::block_on(self.wait_async())
    }

    /// As [`ReadBack::wait`], where blocking is not possible.
    pub async fn wait_async(self) -> Result<Vec<u8>> {
        let ReadBack { gpu, staging, mapped, submission, bytes } = self;
        let inner = &*gpu.0;
        if gpu.is_dry() {
            let fault = inner.fault.borrow_mut().take();
            return fault.map_or_else(|| Ok(vec![0; bytes as usize]), Err);
        }
        if submission.is_some() && cfg!(not(target_arch = "wasm32")) {
            let wait = wgpu::PollType::Wait { submission_index: submission.clone(), timeout: None };
            if let Err(e) = inner.device.poll(wait) {
                gpu.fail(Error::DeviceLost { op: "waiting".into(), reason: e.to_string() });
            }
        }
        let ok = submission.is_some() && mapped.await;
        gpu.take_report(&[], String::new());
        if let Some(fault) = inner.fault.borrow_mut().take() {
            return Err(fault);
        }
        let size = bytes.next_multiple_of(4);
        let view = match ok.then(|| staging.slice(..size).get_mapped_range()) {
            Some(Ok(view)) => view,
            _ => {
                let reason = "a copy to the host could not be made or mapped".into();
                return Err(Error::DeviceLost { op: "read back".into(), reason });
            }
        };
        let data = view[..bytes as usize].to_vec();
        drop(view);
        staging.unmap();
        // A large staging buffer is not worth holding.
        if staging.size() <= 4 << 20 {
            inner.staging.borrow_mut().push(staging);
        }
        Ok(data)
    }
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

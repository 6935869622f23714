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

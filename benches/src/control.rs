//! What this device can do at most: multiply-adds in registers, and a copy through memory. Measured once they are the
//! limits that others are given in per cent of; measured beside each sample they are the control.

use demask_engine::gpu::{Buffer, Gpu, Kernel, fold};
use demask_engine::{Error, Result};

const FMA: Kernel = Kernel::new("limit_fma", include_str!("../shaders/limit_fma.wgsl"));
const COPY: Kernel = Kernel::new("limit_copy", include_str!("../shaders/limit_copy.wgsl"));

/// Threads of the multiply-add kernel: enough to fill a large GPU; a software adapter has a few cores.
const THREADS: [u32; 2] = [1 << 18, 1 << 11];
/// Bytes that the copy reads: for the limit more than most caches hold, as a control no more than shows the state of
/// the memory. A GPU and a software adapter.
const LIMIT_BYTES: [u64; 2] = [256 << 20, 96 << 20];
const CONTROL_BYTES: [u64; 2] = [64 << 20, 4 << 20];

/// One of the two micro-kernels, ready to run.
pub struct Control {
    gpu: Gpu,
    kind: Kind,
}

enum Kind {
    Fma { y: Buffer, threads: u32, n: u32 },
    Copy { x: Buffer, y: Buffer, bytes: u64 },
}

impl Control {
    /// Multiply-adds, `n` in each of twelve chains a thread.
    pub fn fma(gpu: &Gpu, n: u32) -> Control {
        let threads = THREADS[usize::from(gpu.adapter().is_software())];
        let y = gpu.alloc(u64::from(threads) * 4, "limit_fma", &"y");
        Control { gpu: gpu.clone(), kind: Kind::Fma { y, threads, n: n.next_multiple_of(4) } }
    }

    /// A copy between two buffers, to measure the limit or beside samples.
    pub fn copy(gpu: &Gpu, limit: bool) -> Control {
        let sizes = if limit { LIMIT_BYTES } else { CONTROL_BYTES };
        let most = sizes[usize::from(gpu.adapter().is_software())];
        let bytes = most.min(gpu.max_binding()) & !0xfff;
        let (x, y) = (gpu.alloc(bytes, "limit_copy", &"x"), gpu.alloc(bytes, "limit_copy", &"y"));
        let pattern: Vec<u32> = (0..bytes as u32 / 4).map(pattern).collect();
        gpu.write(&x, 0, bytemuck::cast_slice(&pattern));
        Control { gpu: gpu.clone(), kind: Kind::Copy { x, y, bytes } }
    }

    /// Floating-point operations of one call, or bytes moved.
    pub fn amount(&self) -> f64 {
        match &self.kind {
            Kind::Fma { threads, n, .. } => 24.0 * f64::from(*threads) * f64::from(*n),
            Kind::Copy { bytes, .. } => 2.0 * *bytes as f64,
        }
    }

    /// Records one call.
    pub fn run(&self) {
        match &self.kind {
            Kind::Fma { y, threads, n } => {
                let params = [*n, 0.5f32.to_bits(), 1.0f32.to_bits()];
                let params = bytemuck::bytes_of(&params);
                FMA.with(&[]).dispatch(&self.gpu, params, &[], &[y], [threads / 64, 1, 1]);
            }
            Kind::Copy { x, y, bytes } => {
                let quads = (bytes / 16) as u32;
                let params = bytemuck::bytes_of(&quads);
                let grid = fold(quads.div_ceil(256) as usize);
                COPY.with(&[]).dispatch(&self.gpu, params, &[x], &[y], grid);
            }
        }
    }

    /// Holds the result of the last call against what it must be: a limit that was not reached is none.
    pub fn check(&self) -> Result<()> {
        let fail = |what: &str| Err(Error::Request(format!("the {what} gives wrong results")));
        match &self.kind {
            Kind::Fma { y, .. } => {
                let y: Vec<f32> = bytemuck::pod_collect_to_vec(&self.gpu.read(y)?);
                let settled = y.iter().all(|y| (y - 24.0).abs() < 1e-3);
                if settled { Ok(()) } else { fail("multiply-add control") }
            }
            Kind::Copy { y, .. } => {
                let y: Vec<u32> = bytemuck::pod_collect_to_vec(&self.gpu.read(y)?);
                let same = y.iter().enumerate().all(|(i, &y)| y == pattern(i as u32));
                if same { Ok(()) } else { fail("copy control") }
            }
        }
    }
}

fn pattern(i: u32) -> u32 {
    i.wrapping_mul(0x9e37_79b9)
}

//! Attention under the two-copy mask of block diffusion, forward and backward. Burn and PyTorch get the mask as a
//! matrix, as their users do. Results are compared in demask's layout, [T, heads, H].

use anyhow::Result;
use demask_engine::autograd::{Gradients, backward};
use demask_engine::gpu::{Gpu, GpuOptions};
use demask_engine::ops::{self, AttentionOptions, Mask};
use demask_engine::tensor::Tensor;

use crate::race::Results;
use crate::work::{HEAD_DIM, HEADS, KV_HEADS, Work, samples, values};
use crate::worker::{Job, Prepared, timed};

/// The lengths, both copies together.
pub fn works(quick: bool) -> Vec<Work> {
    let lengths: &[usize] = if quick { &[128] } else { &[512, 1024, 2048, 4096] };
    lengths.iter().map(|&rows| Work::Attention { rows, block: 4 }).collect()
}

fn sampled(parts: [(&str, Vec<f32>); 4]) -> Results {
    let part = |(name, x): (&str, Vec<f32>)| {
        (name.to_owned(), samples(x.len()).map(|i| x[i].into()).collect())
    };
    parts.map(part).into()
}

struct Demask {
    inputs: [Tensor; 3],
    dy: Tensor,
    options: AttentionOptions,
    last: Option<(Tensor, Gradients)>,
}

/// demask's job.
pub fn demask(rows: usize, block: usize) -> Result<Prepared> {
    let gpu = Gpu::open(GpuOptions::default())?;
    let make = |salt, heads| {
        let x = values(rows * heads * HEAD_DIM, salt);
        Tensor::from_f32(&gpu, &x, [1, rows, heads, HEAD_DIM])
    };
    let inputs = [make(1, HEADS), make(2, KV_HEADS), make(3, KV_HEADS)].map(|t| t.trainable());
    let dy = make(4, HEADS);
    let options = AttentionOptions::new(Mask::TwoCopy(block));
    let job = Demask { inputs, dy, options, last: None };
    Ok(Prepared::Job(gpu.adapter().describe(), Box::new(job)))
}

impl Job for Demask {
    fn run(&mut self, times: usize) -> Result<f64> {
        let [q, k, v] = &self.inputs;
        timed(|| {
            for _ in 0..times {
                let o = ops::attention(q, k, v, &self.options);
                let mut gradients = Gradients::new();
                backward(&o, &self.dy, &mut gradients);
                self.last = Some((o, gradients));
            }
            Ok(q.gpu().sync()?)
        })
    }

    fn results(&mut self) -> Result<Results> {
        let (o, gradients) = self.last.as_ref().expect("run first");
        let [q, k, v] = &self.inputs;
        let gradient = |x| gradients.get(x).expect("a gradient flows into each input").to_vec();
        let parts = [("o", o.to_vec()?), ("dq", gradient(q)?), ("dk", gradient(k)?)];
        let [o, dq, dk] = parts;
        Ok(sampled([o, dq, dk, ("dv", gradient(v)?)]))
    }
}

#[cfg(feature = "burn")]
pub use with_burn::burn;

#[cfg(feature = "burn")]
mod with_burn {
    use burn::tensor::{Bool, Device, Tensor, TensorData};

    use super::*;
    use crate::burn_llama::{attend, device, numbers, wait};

    struct Burn {
        inputs: [Tensor<4>; 3],
        dy: Tensor<4>,
        /// True where a query must not look.
        mask: Tensor<4, Bool>,
        last: Option<[Tensor<4>; 4]>,
    }

    /// Burn's job.
    pub fn burn(rows: usize, block: usize) -> Result<Prepared> {
        let (device, name) = device()?;
        let plain = device.clone();
        let device = device.autodiff();
        let make = |salt, heads, device: &Device| {
            let x = values(rows * heads * HEAD_DIM, salt);
            let x = TensorData::new(x, [1, rows, heads, HEAD_DIM]);
            // The heads outside, where Burn's attention wants them, and at rest so.
            let x = Tensor::<4>::from_data(x, &plain).swap_dims(1, 2);
            Tensor::<4>::from_data(x.into_data(), device)
        };
        let inputs = [(1, HEADS), (2, KV_HEADS), (3, KV_HEADS)]
            .map(|(salt, heads)| make(salt, heads, &device).require_grad());
        let half = rows / 2;
        let hidden = |i: usize| {
            let (q, k) = (i / rows, i % rows);
            let (bq, bk) = (q % half / block, k % half / block);
            !match (q < half, k < half) {
                (true, true) => bq == bk,
                (true, false) => bq > bk,
                (false, false) => bq >= bk,
                (false, true) => false,
            }
        };
        let mask: Vec<bool> = (0..rows * rows).map(hidden).collect();
        let mask = Tensor::<4, Bool>::from_data(TensorData::new(mask, [1, 1, rows, rows]), &device);
        let dy = make(4, HEADS, &device);
        Ok(Prepared::Job(name, Box::new(Burn { inputs, dy, mask, last: None })))
    }

    impl Job for Burn {
        fn run(&mut self, times: usize) -> Result<f64> {
            let [q, k, v] = &self.inputs;
            timed(|| {
                for _ in 0..times {
                    let o = attend(q.clone(), k.clone(), v.clone(), Some(self.mask.clone()));
                    let gradients = (o.clone() * self.dy.clone()).sum().backward();
                    let gradient = |x: &Tensor<4>| {
                        x.grad(&gradients).expect("a gradient flows into each input")
                    };
                    self.last = Some([o.inner(), gradient(q), gradient(k), gradient(v)]);
                }
                let [o, dq, dk, dv] = self.last.clone().expect("just run");
                [o, dq, dk, dv].into_iter().try_for_each(wait)
            })
        }

        fn results(&mut self) -> Result<Results> {
            let flat = |x: Tensor<4>| numbers(x.swap_dims(1, 2));
            let [o, dq, dk, dv] = self.last.clone().expect("run first").map(flat);
            Ok(sampled([("o", o?), ("dq", dq?), ("dk", dk?), ("dv", dv?)]))
        }
    }
}

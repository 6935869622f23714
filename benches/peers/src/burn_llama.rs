//! A Llama in Burn, of its own tensor functions and in its own layouts, and what every Burn job needs.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use burn::tensor::activation::{log_softmax, silu};
use burn::tensor::module::{attention, embedding};
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::checkpoint::{Checkpoint, Shape};

/// Opens Burn's wgpu device; `CUBECL_WGPU_DEFAULT_DEVICE` picks another. Returns it and its name.
pub fn device() -> Result<(Device, String)> {
    let (device, setup) = Device::wgpu_options()
        .init_with_setup()
        .map_err(|e| anyhow!("Burn opens no device: {e}"))?;
    let info = setup.adapter.get_info();
    let name =
        format!("{} ({}, {} {})", info.name, info.backend.to_str(), info.driver, info.driver_info);
    Ok((device, name))
}

/// Waits until `x` is computed. Asking for the data may return before that, unpacking it may not.
pub fn wait<const D: usize>(x: Tensor<D>) -> Result<()> {
    let first = std::array::from_fn::<_, D, _>(|_| 0..1);
    numbers(x.slice(first).cast(burn::tensor::FloatDType::F32)).map(drop)
}

/// The elements.
pub fn numbers<const D: usize>(x: Tensor<D>) -> Result<Vec<f32>> {
    x.into_data().try_to_vec().map_err(|e| anyhow!("Burn gives no data: {e:?}"))
}

/// Grouped-query attention: q [B, N, T, H], k and v [B, G, T, H]; causal without a mask, which is true where a query
/// must not look.
pub fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    mask: Option<Tensor<4, Bool>>,
) -> Tensor<4> {
    let [b, n, t, _] = q.dims();
    let repeated = |x: Tensor<4>| {
        let [_, g, t, h] = x.dims();
        x.reshape([b, g, 1, t, h]).expand([b, g, n / g, t, h]).reshape([b, n, t, h])
    };
    let options = AttentionModuleOptions { is_causal: mask.is_none(), ..Default::default() };
    let mask = mask.map(|m| m.expand([b, n, t, t]));
    attention(q, repeated(k), repeated(v), mask, None, options)
}

/// A trainable Llama; matrices are [in, out].
pub struct BurnLlama {
    shape: Shape,
    embed: Tensor<2>,
    layers: Vec<Layer>,
    norm: Tensor<1>,
    cos: Tensor<3>,
    sin: Tensor<3>,
    tokens: Tensor<2, Int>,
    targets: Tensor<2, Int>,
}

struct Layer {
    norms: [Tensor<1>; 2],
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    o: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
    down: Tensor<2>,
}

impl BurnLlama {
    /// Loads a Hugging Face folder, and the tokens of the step.
    pub fn load(folder: &Path, tokens: usize, device: &Device) -> Result<BurnLlama> {
        let checkpoint = Checkpoint::read(folder)?;
        let shape = checkpoint.shape()?;
        let matrix = |name: &str, turned: bool| -> Result<Tensor<2>> {
            let (values, rows, columns) = checkpoint.matrix(name)?;
            let (values, rows, columns) = match turned {
                true => (crate::checkpoint::transposed(&values, rows, columns), columns, rows),
                false => (values, rows, columns),
            };
            Ok(Tensor::from_data(TensorData::new(values, [rows, columns]), device).require_grad())
        };
        let vector = |name: &str| -> Result<Tensor<1>> {
            let values = checkpoint.values(name)?;
            let len = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [len]), device).require_grad())
        };
        let layer = |i: usize| -> Result<Layer> {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            Ok(Layer {
                norms: [
                    vector(&name("input_layernorm"))?,
                    vector(&name("post_attention_layernorm"))?,
                ],
                q: matrix(&name("self_attn.q_proj"), true)?,
                k: matrix(&name("self_attn.k_proj"), true)?,
                v: matrix(&name("self_attn.v_proj"), true)?,
                o: matrix(&name("self_attn.o_proj"), true)?,
                gate: matrix(&name("mlp.gate_proj"), true)?,
                up: matrix(&name("mlp.up_proj"), true)?,
                down: matrix(&name("mlp.down_proj"), true)?,
            })
        };
        let layers = (0..shape.layers).map(layer).collect::<Result<_>>()?;
        let half = shape.head_dim / 2;
        let angle = |i: usize| {
            let (t, j) = (i / half, i % half);
            t as f64 * f64::from(shape.rope_theta).powf(-(j as f64) / half as f64)
        };
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..tokens * half).map(|i| f(angle(i)) as f32).collect();
            Tensor::<3>::from_data(TensorData::new(values, [tokens, 1, half]), device)
        };
        let (inputs, targets) = crate::work::step_tokens(tokens);
        let ids = |ids: Vec<u32>, shape: [usize; 2]| {
            let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            Tensor::<2, Int>::from_data(TensorData::new(ids, shape), device)
        };
        Ok(BurnLlama {
            embed: matrix("model.embed_tokens.weight", false)?,
            layers,
            norm: vector("model.norm.weight")?,
            cos: table(f64::cos),
            sin: table(f64::sin),
            tokens: ids(inputs, [1, tokens]),
            targets: ids(targets, [tokens, 1]),
            shape,
        })
    }

    fn rms_norm(&self, x: Tensor<2>, weight: &Tensor<1>) -> Tensor<2> {
        let mean = x.clone().square().mean_dim(1);
        x * (mean + self.shape.eps).sqrt().recip() * weight.clone().unsqueeze()
    }

    /// [T, N·H] → [1, N, T, H], rotated.
    fn heads(&self, x: Tensor<2>, heads: usize, rotate: bool) -> Tensor<4> {
        let (t, h) = (x.dims()[0], self.shape.head_dim);
        let x = x.reshape([t, heads, h]);
        let x = match rotate {
            true => {
                let a = x.clone().slice([0..t, 0..heads, 0..h / 2]);
                let b = x.slice([0..t, 0..heads, h / 2..h]);
                let (cos, sin) = (self.cos.clone(), self.sin.clone());
                let left = a.clone() * cos.clone() - b.clone() * sin.clone();
                Tensor::cat(vec![left, b * cos + a * sin], 2)
            }
            false => x,
        };
        x.swap_dims(0, 1).unsqueeze()
    }

    /// Mean cross-entropy.
    pub fn loss(&self) -> Tensor<1> {
        let Shape { width, heads, kv_heads, .. } = self.shape;
        let t = self.tokens.dims()[1];
        let mut x = embedding(self.embed.clone(), self.tokens.clone()).reshape([t, width]);
        for layer in &self.layers {
            let h = self.rms_norm(x.clone(), &layer.norms[0]);
            let q = self.heads(h.clone().matmul(layer.q.clone()), heads, true);
            let k = self.heads(h.clone().matmul(layer.k.clone()), kv_heads, true);
            let v = self.heads(h.matmul(layer.v.clone()), kv_heads, false);
            let a = attend(q, k, v, None).swap_dims(1, 2).reshape([t, width]);
            x = x + a.matmul(layer.o.clone());
            let h = self.rms_norm(x.clone(), &layer.norms[1]);
            let f = silu(h.clone().matmul(layer.gate.clone())) * h.matmul(layer.up.clone());
            x = x + f.matmul(layer.down.clone());
        }
        let x = self.rms_norm(x, &self.norm);
        let logits = x.matmul(self.embed.clone().transpose());
        log_softmax(logits, 1).gather(1, self.targets.clone()).mean().neg()
    }

    /// A parameter by its Hugging Face name.
    pub fn parameter(&self, name: &str) -> Result<&Tensor<2>> {
        let unknown = || format!("{name} is not compared");
        let Some(rest) = name.strip_prefix("model.layers.") else { return Ok(&self.embed) };
        let (layer, part) = rest.split_once('.').with_context(unknown)?;
        let layer = self.layers.get(layer.parse::<usize>()?).with_context(unknown)?;
        match part {
            "self_attn.q_proj.weight" => Ok(&layer.q),
            "mlp.down_proj.weight" => Ok(&layer.down),
            _ => Err(anyhow!(unknown())),
        }
    }
}

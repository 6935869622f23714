//! A Hugging Face folder of f32 weights, for the peers that bring no loader.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use safetensors::SafeTensors;

/// The folder, read.
pub struct Checkpoint {
    bytes: Vec<u8>,
    config: serde_json::Value,
}

/// What a Llama's configuration says.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Residual stream.
    pub width: usize,
    /// Feed-forward.
    pub inner: usize,
    /// Blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Of the norms.
    pub eps: f32,
    /// Of the rotary positions.
    pub rope_theta: f32,
}

impl Checkpoint {
    /// Reads `config.json` and `model.safetensors`.
    pub fn read(folder: &Path) -> Result<Checkpoint> {
        let file = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let config = serde_json::from_slice(&file("config.json")?)?;
        Ok(Checkpoint { bytes: file("model.safetensors")?, config })
    }

    /// The configuration. Only tied heads are known here, as SmolLM2 has them.
    pub fn shape(&self) -> Result<Shape> {
        let number = |key: &str| {
            self.config[key].as_f64().with_context(|| format!("config.json has no number {key}"))
        };
        ensure!(self.config["tie_word_embeddings"] == true, "the model's head is not tied");
        let (width, heads) =
            (number("hidden_size")? as usize, number("num_attention_heads")? as usize);
        Ok(Shape {
            width,
            inner: number("intermediate_size")? as usize,
            layers: number("num_hidden_layers")? as usize,
            heads,
            kv_heads: number("num_key_value_heads")? as usize,
            head_dim: width / heads,
            vocabulary: number("vocab_size")? as usize,
            eps: number("rms_norm_eps")? as f32,
            rope_theta: number("rope_theta")? as f32,
        })
    }

    /// A weight's values.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        let tensor = tensors.tensor(name)?;
        ensure!(tensor.dtype() == safetensors::Dtype::F32, "{name} is not f32");
        Ok(bytemuck::pod_collect_to_vec(tensor.data()))
    }

    /// A matrix's values, rows and columns.
    pub fn matrix(&self, name: &str) -> Result<(Vec<f32>, usize, usize)> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        let &[rows, columns] = tensors.tensor(name)?.shape() else { bail!("{name} is no matrix") };
        Ok((self.values(name)?, rows, columns))
    }
}

/// Swaps rows and columns.
pub fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns * rows).map(|i| values[i % rows * columns + i / rows]).collect()
}

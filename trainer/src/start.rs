//! What a run begins with: its dataset, its tokenizer, its model.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use demask_engine::autograd::without_recording;
use demask_engine::gpu::Gpu;
use demask_engine::model::{Llama, LlamaConfig, Lora, Precision, Tokenizer, Weights};
use demask_engine::ops::embedding;
use demask_engine::tensor::Tensor;

use crate::bpe;
use crate::data::build::{Hear, build};
use crate::data::fnv1a;
use crate::data::recipe::CorpusRecipe;
use crate::data::sample::Vocabulary;
use crate::data::shards::Dataset;
use crate::pack::{Packed, Packing, Part, Visibility};
use crate::recipe::{LoraSettings, Recipe};

/// Of the mean norm of the embeddings: a mask embedding that is this much shorter or longer is set right.
const SICK: f64 = 10.0;
/// Other tokens that its length is compared with.
const SAMPLE: usize = 512;

/// The dataset of a recipe: the one it names, or one made of its paths in the run's folder (with the model's tokenizer,
/// or one trained on this text).
pub fn dataset(recipe: &Recipe, run: &Path, hear: Hear<'_>) -> Result<Dataset> {
    if let Some(folder) = &recipe.data.dataset {
        return Dataset::open(folder);
    }
    let mut corpus = CorpusRecipe::of_paths(&recipe.data.paths, &recipe.data.extensions);
    corpus.seed = recipe.seed;
    corpus.held_out = recipe.data.held_out;
    let vocabulary = match (&recipe.model.from, &recipe.model.fresh) {
        (Some(from), _) => Vocabulary::open(from)?,
        (None, fresh) => {
            let folder = run.join("tokenizer");
            if !folder.join("tokenizer_config.json").exists() {
                let size = fresh.as_ref().context("a fresh model has a shape")?.vocab_size;
                bpe::train(&corpus, size, bpe::MOST_BYTES, &folder)?;
            }
            Vocabulary::open(&folder)?
        }
    };
    let folder = run.join("data");
    build(&corpus, &vocabulary, &folder, hear).with_context(|| {
        format!("making the dataset {} (remove it to make it anew)", folder.display())
    })
}

/// The model and tokenizer that a run starts from.
pub fn model(gpu: &Gpu, recipe: &Recipe, dataset: &Dataset) -> Result<(Llama, Tokenizer)> {
    if let Some(from) = &recipe.model.from {
        let mut model = weights(gpu, recipe, None)?;
        let tokenizer = Tokenizer::for_model(from, model.config())?;
        same_tokens(&tokenizer, dataset)?;
        learn_ends(&mut model, dataset);
        return Ok((model, tokenizer));
    }
    let fresh = recipe.model.fresh.as_ref().context("a recipe names a model or a shape")?;
    let vocabulary = Vocabulary::open(&dataset.tokenizer())?;
    let config = fresh.config(vocabulary.size, Some(vocabulary.eos), None);
    config.validate(&dataset.tokenizer())?;
    let tokenizer = Tokenizer::from_folder(&dataset.tokenizer(), &config)?;
    let config = fresh.config(vocabulary.size, Some(vocabulary.eos), tokenizer.mask_token_id());
    let mut model = weights(gpu, recipe, Some(&config))?;
    learn_ends(&mut model, dataset);
    Ok((model, tokenizer))
}

/// A model ends its answers with what it has learnt to end them with, beside what its files named before: the token behind
/// each document, and the one that ends a turn.
fn learn_ends(model: &mut Llama, dataset: &Dataset) {
    let learnt = [Some(dataset.manifest.eos), dataset.manifest.end_of_turn];
    let ends = &mut model.config_mut().eos_token_ids;
    for id in learnt.into_iter().flatten() {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
}

/// The weights that a run starts from: those on disk, frozen under a fresh adapter if the recipe wants one, or fresh
/// ones of this shape.
pub fn weights(gpu: &Gpu, recipe: &Recipe, fresh: Option<&LlamaConfig>) -> Result<Llama> {
    let model = match (&recipe.model.from, fresh) {
        (Some(from), _) => match &recipe.lora {
            None => Llama::load(gpu, from, Precision::F32)?,
            Some(lora) => {
                let base = Llama::load(gpu, from, lora.base)?;
                let LoraSettings { rank, alpha, dora, targets, .. } = lora;
                let fresh = Lora::fresh(base.config(), *rank, *alpha, *dora, targets, recipe.seed);
                base.adapted(&fresh)?
            }
        },
        (None, fresh) => {
            Llama::random(gpu, fresh.context("a fresh model has a shape")?, recipe.seed)?
        }
    };
    Ok(model.trainable())
}

/// Fingerprint of the weights that an adapter is trained over, of the first and the last row of each; `None` where all
/// weights are trained.
pub fn base(recipe: &Recipe) -> Result<Option<u64>> {
    let (Some(_), Some(from)) = (&recipe.lora, &recipe.model.from) else { return Ok(None) };
    let (config, weights) = Weights::open(from)?;
    let mut bytes = Vec::new();
    for (name, shape) in config.parameters() {
        for row in [0, shape[0] - 1] {
            let values = weights.rows_f32(&name, row..row + 1)?;
            bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
    }
    Ok(Some(fnv1a(bytes.into_iter())))
}

/// A dataset says tokens by number, so the model must mean the same by them.
pub fn same_tokens(tokenizer: &Tokenizer, dataset: &Dataset) -> Result<()> {
    let folder = dataset.tokenizer();
    let theirs = Vocabulary::open(&folder)?;
    let path = folder.join("tokenizer.json");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let theirs_json = bpe::for_corpus(&text)?;
    let differs = (0..theirs.size as u32)
        .find(|&id| theirs_json.id_to_token(id) != tokenizer.id_to_token(id));
    ensure!(
        differs.is_none(),
        "{} was made with another tokenizer than the model's: token {} is {:?} there and {:?} here; build the \
         dataset with tokenizer = the model's folder",
        dataset.folder.display(),
        differs.unwrap_or(0),
        theirs_json.id_to_token(differs.unwrap_or(0)),
        tokenizer.id_to_token(differs.unwrap_or(0)),
    );
    Ok(())
}

/// The token of a hole.
pub fn mask_id(recipe: &Recipe, model: &Llama, tokenizer: &Tokenizer) -> Result<u32> {
    if let Some(token) = &recipe.model.mask_token {
        return tokenizer.token_id(token).with_context(|| {
            format!("model.mask_token {token:?} is no token of this tokenizer; name one it has")
        });
    }
    let known = model.config().mask_token_id.or_else(|| tokenizer.mask_token_id());
    let needed = recipe.phase.iter().any(|p| p.objective.is_diffusion());
    ensure!(
        known.is_some() || !needed,
        "this model has no mask token; name a token it does not use otherwise with \
         model.mask_token, such as \"<empty_output>\" for SmolLM2"
    );
    Ok(known.unwrap_or(0))
}

/// A part of the dataset as sequences.
pub fn pack(recipe: &Recipe, dataset: &Dataset, part: Part) -> Result<Packed> {
    let packing = Packing {
        length: recipe.data.length,
        eos: dataset.manifest.eos,
        visibility: if recipe.data.document_mask {
            Visibility::Confined { alignment: recipe.alignment() }
        } else {
            Visibility::Mutual
        },
        seed: recipe.seed,
    };
    Packed::new(dataset, part, &recipe.data.weights, packing)
}

/// The mask token's embedding beside the others', as it was before a first diffusion step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MaskEmbedding {
    /// Its length.
    pub norm: f64,
    /// Mean length of a sample of embeddings.
    pub mean: f64,
    /// It was scaled to the mean length.
    pub mended: bool,
}

/// Looks after the embedding of the mask token, which autoregressive training never touches: one that decayed to
/// nothing lets gradients explode at the switch (LLaDA2.0 technical report §7.1), so a sick one gets the mean
/// length.
/// Under an adapter the embedding is frozen, and a sick one is an error.
pub fn mask_embedding(model: &Llama, mask_id: u32) -> Result<MaskEmbedding> {
    let embed = model.parameters()[0];
    let norm_of = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let (rows, width) = (embed.shape[0], embed.shape[1]);
    ensure!((mask_id as usize) < rows, "the mask token is no row of the embedding");
    // The mask token first, and behind it tokens from all over the vocabulary.
    let sample = (0..rows as u32).step_by(rows.div_ceil(SAMPLE));
    let ids: Vec<u32> = [mask_id].into_iter().chain(sample).collect();
    let ids = Tensor::from_u32(model.gpu(), &ids, [ids.len()]);
    let values = without_recording(|| embedding(&ids, &embed.shards)).to_vec()?;
    let (values, others) = values.split_at(width);
    let lengths: Vec<f64> = others.chunks(width).map(norm_of).collect();
    let (norm, mean) = (norm_of(values), lengths.iter().sum::<f64>() / lengths.len() as f64);
    let mended = norm * SICK < mean || norm > mean * SICK;
    ensure!(
        !mended || !model.has_adapter(),
        "the mask token's embedding has length {norm:.3} and the mean is {mean:.3}: an adapter cannot mend that; train \
         all weights, or name another token with model.mask_token"
    );
    if mended {
        let scaled: Vec<f32> = match norm > 0.0 {
            true => values.iter().map(|&x| (f64::from(x) * mean / norm) as f32).collect(),
            false => vec![(mean / (width as f64).sqrt()) as f32; width],
        };
        let mut row = mask_id as usize;
        for shard in &embed.shards {
            let height = shard.shape()[0];
            if row < height {
                let at = (row * width * 4) as u64;
                model.gpu().write(shard.buffer(), at, bytemuck::cast_slice(&scaled));
                break;
            }
            row -= height;
        }
    }
    Ok(MaskEmbedding { norm, mean, mended })
}

//! Choosing kernels before work starts: the options, the progress bar, and where choices are kept.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use demask_engine::gpu::Gpu;
use demask_engine::ops::Product;
use demask_engine::tune::{Tuning, cache_dir};
use demask_trainer::recipe::Recipe;
use indicatif::{ProgressBar, ProgressStyle};

use crate::ui::{Notices, complain};

/// Whether kernels may race, and for how long.
#[derive(Args)]
#[command(next_help_heading = "Choice of kernels")]
pub struct TuneArgs {
    /// Use the kernels that are usually best, without a race and without earlier races' results
    #[arg(long)]
    pub no_tune: bool,

    /// Seconds that kernels may race before work starts, the first time a device meets a model
    /// [default: 6; 0 for commands that answer]
    ///
    /// The results are kept (in the user's cache folder, or below DEMASK_CACHE); what a race had no
    /// time left for keeps the usual kernel for good. `demask doctor --retune` starts over.
    /// `generate`, `infill` and `edit` race nothing unless this is given: they take what earlier
    /// races decided, and the usual kernel for the rest.
    #[arg(long, value_name = "SECONDS", conflicts_with = "no_tune")]
    pub tune_seconds: Option<f64>,
}

/// Seconds of a race where nobody says otherwise.
const SECONDS: f64 = 6.0;

impl TuneArgs {
    /// Makes the device's choices for these products before an answer that someone waits for: what was decided
    /// earlier, and no race that was not asked for.
    pub fn recall(&self, gpu: &Gpu, products: &[Product], notices: Notices) -> Result<()> {
        if self.no_tune {
            return Ok(());
        }
        if self.tune_seconds.is_some() {
            return self.prepare(gpu, products, notices).map(drop);
        }
        let tuning = Tuning::open(gpu, &cache_dir());
        if let Some(notice) = &tuning.notice {
            notices.say(notice);
        }
        tuning.recall(products);
        Ok(())
    }

    /// Makes the device's choices for these products, by races where nothing is decided; `None` with `--no-tune`.
    pub fn prepare(
        &self,
        gpu: &Gpu,
        products: &[Product],
        notices: Notices,
    ) -> Result<Option<Tuning>> {
        if self.no_tune {
            return Ok(None);
        }
        let mut tuning = Tuning::open(gpu, &cache_dir());
        if let Some(notice) = &tuning.notice {
            notices.say(notice);
        }
        prepare(&mut tuning, products, self.tune_seconds.unwrap_or(SECONDS), notices)?;
        Ok(Some(tuning))
    }
}

/// Races what is undecided, with a progress bar, and names what was refused.
pub fn prepare(
    tuning: &mut Tuning,
    products: &[Product],
    seconds: f64,
    notices: Notices,
) -> Result<()> {
    let budget = Duration::try_from_secs_f64(seconds)
        .with_context(|| format!("--tune-seconds {seconds} is no time; give 0 or more"))?;
    let style = "choosing kernels {bar:24} {pos}/{len}, {eta} left  {msg}";
    let bar = match notices.animated() {
        true => ProgressBar::new(0),
        false => ProgressBar::hidden(),
    }
    .with_style(ProgressStyle::with_template(style).expect("the template is fixed"));
    let outcome = tuning.prepare(products, budget, |done, all, class| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
        bar.set_message(class.to_owned());
    });
    bar.finish_and_clear();
    if let Err(error) = outcome {
        // What cannot be kept is raced again next time; what the device said is not to be passed over.
        if !matches!(error, demask_engine::Error::Io { .. }) {
            return Err(error).context("choosing kernels");
        }
        notices.say(&format!("the choice of kernels could not be kept: {error}"));
    }
    let wanted: Vec<String> = products.iter().map(Product::class_name).collect();
    for (class, decision) in tuning.decisions().iter().filter(|(c, _)| wanted.contains(c)) {
        for (kernel, why) in decision.refused() {
            complain(&format!("{kernel} is refused on this driver, for {class}: it {why}"));
        }
    }
    Ok(())
}

/// Rows that a run's products have: of a plain pass, and of the two copies of block diffusion.
pub fn rows_of(recipe: &Recipe) -> [usize; 2] {
    let rows = recipe.data.length * recipe.optimizer.micro_batch;
    [rows, 2 * rows]
}

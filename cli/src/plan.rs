//! `demask train --plan`: what a run would take of the device's memory, as a table or as JSON.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use demask_engine::gpu::Gpu;
use demask_engine::tune::{Tuning, cache_dir, products};
use demask_trainer::plan::{Plan, Switch, plan, switches};
use demask_trainer::recipe::Recipe;
use serde_json::json;

use crate::args::Common;
use crate::tune::{TuneArgs, rows_of};
use crate::ui;

/// Plans a run within `memory` bytes, if it is known how many there are.
pub fn run(
    recipe: &Recipe,
    out: &Path,
    memory: Option<u64>,
    tune: &TuneArgs,
    common: &Common,
) -> Result<ExitCode> {
    let gpu = common.open_dry_gpu()?;
    let tuning = (!tune.no_tune).then(|| Tuning::open(&gpu, &cache_dir()));
    let planned = |recipe: &Recipe| {
        plan(&gpu, recipe, out, &|model| {
            if let Some(tuning) = &tuning {
                tuning.rehearse(&products(model, &rows_of(recipe), true));
            }
        })
    };
    let fits = |plan: &Plan| memory.map(|memory| plan.peak <= memory);
    let own = match planned(recipe) {
        Ok(plan) => plan,
        // A tensor that the device cannot bind, say: with smaller ones it might run.
        Err(why) => {
            let runs = |s: &Switch| planned(&s.recipe).is_ok_and(|p| fits(&p) != Some(false));
            return Err(match switches(recipe).into_iter().find(runs) {
                Some(switch) => why.context(format!("with {} it would run", switch.text)),
                None => why,
            });
        }
    };
    let mut tried: Vec<(Switch, Plan)> = Vec::new();
    if fits(&own) != Some(true) {
        for switch in switches(recipe) {
            // Where no limit is known, there is no end to what could be changed at once.
            if switch.several && memory.is_none() {
                break;
            }
            // What cannot run at all is no remedy.
            let Ok(plan) = planned(&switch.recipe) else { continue };
            let found = fits(&plan) == Some(true);
            tried.push((switch, plan));
            if found {
                break;
            }
        }
    }
    let remedy = tried.last().filter(|(_, plan)| fits(plan) == Some(true));
    if common.output.json {
        let change = |(switch, plan): &(Switch, Plan)| {
            let fits = fits(plan);
            json!({ "change": switch.text, "peak_bytes": plan.peak, "fits": fits })
        };
        let mut object = json!({
            "parameters": own.parameters,
            "peak_bytes": own.peak,
            "when": own.when,
            "vocabulary_asked": own.vocabulary_asked,
            "memory_bytes": memory,
            "fits": fits(&own),
            "changes": tried.iter().map(change).collect::<Vec<_>>(),
            "adapter": gpu.adapter().describe(),
        });
        for (name, bytes, _) in kinds(&own) {
            object[format!("{name}_bytes")] = json!(bytes);
        }
        ui::print_json(&object)?;
    } else {
        ui::print(&table(&gpu, &own, memory, &tried))?;
    }
    if fits(&own) != Some(false) {
        return Ok(ExitCode::SUCCESS);
    }
    let (peak, most) = (ui::bytes(own.peak), ui::bytes(memory.unwrap_or(0)));
    match remedy {
        Some((switch, plan)) => bail!(
            "the run takes {peak} and does not fit in {most}; with {} it takes {} and fits",
            switch.text,
            ui::bytes(plan.peak)
        ),
        None => bail!(
            "the run takes {peak} and does not fit in {most}, nor does it with any change that was tried; take a \
             smaller model or a device with more memory"
        ),
    }
}

/// Name, bytes, what it is.
fn kinds(plan: &Plan) -> [(&'static str, u64, &'static str); 5] {
    [
        ("weights", plan.weights, "the model"),
        ("moments", plan.moments, "the optimiser's"),
        ("gradients", plan.gradients, "of every weight"),
        ("activations", plan.activations, "kept for the pass back"),
        ("workspace", plan.workspace, "in passing: logits, cotangents, layers computed again"),
    ]
}

fn table(gpu: &Gpu, own: &Plan, memory: Option<u64>, tried: &[(Switch, Plan)]) -> String {
    let mut text = format!("{}\n", ui::heading("Device memory at its peak"));
    let share = |bytes: u64| bytes as f64 / own.peak.max(1) as f64 * 100.0;
    for (name, bytes, what) in kinds(own) {
        let (share, bytes) = (share(bytes), ui::bytes(bytes));
        text += &format!("   {name:<12}{bytes:>10}{share:>5.0} %   {}\n", ui::dim(what));
    }
    let peak = ui::bytes(own.peak);
    text += &format!("   {:<12}{peak:>10}{:>5.0} %   {}\n", "total", 100.0, ui::dim(&own.when));
    let parameters = ui::count(own.parameters as f64);
    let device = format!("{parameters} parameters on {}", gpu.adapter().describe());
    text += &format!("\n   {}\n", ui::dim(&device));
    if let Some(asked) = own.vocabulary_asked {
        let line = format!("vocabulary of {asked}, as asked for; the text may give a smaller one");
        text += &format!("   {}\n", ui::dim(&line));
    }
    let verdict = |plan: &Plan| match memory {
        Some(memory) if plan.peak <= memory => ui::good("fits"),
        Some(_) => ui::bad("does not fit"),
        None => String::new(),
    };
    text += &match memory {
        Some(most) => format!("\n{} in {}\n", verdict(own), ui::bytes(most)),
        None => {
            "\nHow much memory the device has is unknown; --memory 8GiB, say, tells\n".to_owned()
        }
    };
    if !tried.is_empty() {
        text += &format!("\n{}\n", ui::heading("What would take less, the cheapest change first"));
    }
    for (switch, plan) in tried {
        let line = format!("   {:>10}   {}   {}", ui::bytes(plan.peak), switch.text, verdict(plan));
        text += &format!("{}\n", line.trim_end());
    }
    text
}

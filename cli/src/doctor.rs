//! `demask doctor`: which adapters there are, which one would be used and why, what it can do,
//! whether it computes right, and what to install where something is missing.

use std::process::ExitCode;

use anyhow::{Context, Result};
use demask_engine::gpu::{ADAPTER_ENV, AdapterEntry, Gpu, GpuOptions, Refusal, install_hint, list};
use demask_engine::numerics;
use demask_engine::ops::{Layout, Product};
use demask_engine::selftest::{self, Check};
use demask_engine::tensor::DType;
use demask_engine::tune::{Decision, Tuning, Verdict, cache_dir};
use serde_json::{Value, json};
use wgpu::Features;

use crate::args::Common;
use crate::tune::TuneArgs;
use crate::ui;

const EXAMPLES: &str = "\
Examples:
  demask doctor
  demask doctor --adapter llvmpipe     test one adapter of several
  demask doctor --retune               race the kernels again, after a driver's update, say
  demask doctor --json | jq .selftest

Exit code 1 if there is no adapter or a kernel gives wrong numbers.";

/// Edge of the square matrices that the speed figure multiplies.
const SPEED_SIZE: usize = 512;

/// Show the adapters, their limits and features, and test the kernels' numbers on the chosen one
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Forget which kernels earlier races chose on this device
    #[arg(long, conflicts_with = "no_tune")]
    retune: bool,

    /// Race the kernels that round both factors of a product to f16 too
    #[arg(long)]
    f16_products: bool,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
}

/// What was found out about the chosen adapter.
struct Examined {
    gpu: Gpu,
    why: String,
    checks: Vec<Check>,
    numerics: Vec<numerics::Row>,
    gflops: f64,
    /// Which kernel serves which class of products, against what.
    kernels: Vec<(String, Decision)>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let mut adapters = pollster::block_on(list());
    let examined = examine(&args, &adapters);
    if let Ok(examined) = &examined {
        // Of the one that was opened it is known what it gives.
        let chosen = examined.gpu.adapter();
        adapters.iter_mut().filter(|a| a.index == chosen.index).for_each(|a| *a = chosen.clone());
    }
    if args.common.output.json {
        ui::print_json(&as_json(&adapters, &examined))?;
    } else {
        ui::print(&adapter_table(&adapters, &examined))?;
        if let Ok(examined) = &examined {
            ui::print(&report(examined))?;
        }
    }
    let examined = examined?;
    let failed: Vec<&str> = examined.checks.iter().filter(|c| !c.ok).map(|c| c.name).collect();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    anyhow::bail!(
        "{} computes wrong: {}; update its driver, or name another adapter with --adapter",
        examined.gpu.adapter().describe(),
        failed.join(", ")
    )
}

/// The products that are raced here: a decode step's, in every type of weights, and a training step's, with the
/// extents of a model of 135 million parameters.
fn typical_products() -> Vec<Product> {
    let product = |layout, weight, m, n, k| Product { layout, weight, m, n, k };
    let weights = [DType::F32, DType::F16, DType::Bf16, DType::Q8, DType::Q4];
    let decode = weights.map(|weight| product(Layout::NT, weight, 4, 1536, 576));
    let train = [
        product(Layout::NT, DType::F32, 512, 1536, 576),
        product(Layout::NN, DType::F32, 512, 576, 1536),
        product(Layout::TN, DType::F32, 1536, 576, 512),
    ];
    decode.into_iter().chain(train).collect()
}

fn kernels(args: &Args, gpu: &Gpu) -> Result<Vec<(String, Decision)>> {
    let products = typical_products();
    if args.retune {
        Tuning::open(gpu, &cache_dir()).forget(&products)?;
    }
    let Some(tuning) = args.tune.prepare(gpu, &products, args.common.notices())? else {
        return Ok(Vec::new());
    };
    let of = |p: &Product| {
        let class = p.class_name();
        tuning.decisions().get(&class).map(|decision| (class.clone(), decision.clone()))
    };
    Ok(products.iter().filter_map(of).collect())
}

fn examine(args: &Args, adapters: &[AdapterEntry]) -> Result<Examined> {
    let common = &args.common;
    let options = GpuOptions {
        adapter: common.adapter.clone(),
        f16_products: args.f16_products,
        ..GpuOptions::default()
    };
    let gpu = Gpu::open(options)?;
    common.notices().say("testing the kernels …");
    let checks = selftest::run(&gpu).context("the self-test could not run")?;
    let numerics = numerics::probe(&gpu).context("the table of the driver's arithmetic")?;
    let gflops = selftest::matmul_gflops(&gpu, SPEED_SIZE).context("the speed test")?;
    let kernels = kernels(args, &gpu).context("the race of kernels")?;
    let why = why(common, gpu.adapter(), adapters);
    Ok(Examined { gpu, why, checks, numerics, gflops, kernels })
}

fn why(common: &Common, chosen: &AdapterEntry, adapters: &[AdapterEntry]) -> String {
    let others = adapters.len() > 1;
    match (&common.adapter, common.adapter_named()) {
        (Some(name), _) => format!("--adapter {name} asks for it"),
        (None, Some(name)) => format!("{ADAPTER_ENV}={name} asks for it"),
        (None, None) if !others => "there is no other".into(),
        (None, None) if chosen.is_software() => "there is no GPU".into(),
        (None, None) => format!("{} is the best kind here", kind(chosen)),
    }
}

fn kind(entry: &AdapterEntry) -> &'static str {
    match entry.info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete GPU",
        wgpu::DeviceType::IntegratedGpu => "integrated GPU",
        wgpu::DeviceType::VirtualGpu => "virtual GPU",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    }
}

/// M×N×K and types that the adapter's matrix units take.
fn cooperative_shapes(entry: &AdapterEntry) -> Vec<String> {
    let shape = |p: &wgpu::CooperativeMatrixProperties| {
        let types = format!("{:?}→{:?}", p.ab_type, p.cr_type).to_lowercase();
        format!("{}×{}×{} {types}", p.m_size, p.n_size, p.k_size)
    };
    let mut shapes: Vec<String> = entry.cooperative.iter().map(shape).collect();
    shapes.dedup();
    shapes
}

/// `None` if the tier can be used, else what is missing.
fn tiers(entry: &AdapterEntry, shapes: &[String]) -> [(&'static str, Option<&'static str>); 3] {
    let has = |feature| entry.features.contains(feature);
    let subgroup = match (has(Features::SUBGROUP), has(Features::SHADER_F16)) {
        (true, true) => None,
        (false, true) => Some("no subgroups"),
        (true, false) => Some("no f16"),
        (false, false) => Some("neither subgroups nor f16"),
    };
    let is_refused = |name: &str| entry.refused.iter().any(|r| r.what == name);
    let cooperative = match shapes.is_empty() {
        true if is_refused("EXPERIMENTAL_COOPERATIVE_MATRIX") => {
            Some("the driver offers and then refuses it")
        }
        true => Some("the driver offers none"),
        false => None,
    };
    [("base (f32)", None), ("subgroup + f16", subgroup), ("cooperative matrix", cooperative)]
}

fn adapter_table(adapters: &[AdapterEntry], examined: &Result<Examined>) -> String {
    let mut text = format!("demask {}\n\n", env!("CARGO_PKG_VERSION"));
    text += &format!("{}\n", ui::heading("Adapters"));
    let chosen = examined.as_ref().ok().map(|e| e.gpu.adapter().index);
    for entry in adapters {
        let mark = if chosen == Some(entry.index) { "→" } else { " " };
        let i = &entry.info;
        let driver = format!("{} {}", i.driver, i.driver_info);
        let (backend, kind) = (i.backend.to_str(), kind(entry));
        text += &format!(" {mark} [{}] {}\n", entry.index, i.name);
        text += &ui::dim(&format!("       {backend}, {kind}, driver {}\n", driver.trim()));
    }
    if adapters.is_empty() {
        text += &format!("   none\n\n{}\n   {}\n", ui::heading("Remedy"), install_hint());
    }
    text
}

fn report(examined: &Examined) -> String {
    let Examined { gpu, why, checks, numerics, gflops, kernels } = examined;
    let entry = gpu.adapter();
    let limits = &entry.limits;
    let shapes = cooperative_shapes(entry);
    let row = |name: &str, value: &str| format!("   {name:<22}{value}\n");
    let mut text = format!(" → [{}] is used: {why}\n", entry.index);

    text += &format!("\n{}\n", ui::heading("Limits"));
    let binding = ui::bytes(gpu.max_binding());
    text += &row("storage binding", &format!("{binding}; larger weights are split by rows"));
    text += &row("buffer", &ui::bytes(limits.max_buffer_size));
    let memory = ui::bytes(u64::from(limits.max_compute_workgroup_storage_size));
    text += &row("workgroup memory", &memory);
    let invocations = limits.max_compute_invocations_per_workgroup;
    text += &row("workgroup invocations", &invocations.to_string());

    text += &format!("\n{}\n", ui::heading("Features"));
    let has = |feature| if entry.features.contains(feature) { "yes" } else { "no" };
    let (low, high) = (entry.info.subgroup_min_size, entry.info.subgroup_max_size);
    let subgroups = match has(Features::SUBGROUP) {
        "yes" if low == high => format!("yes, of {low}"),
        "yes" => format!("yes, of {low} to {high}"),
        no => no.to_owned(),
    };
    text += &row("f16 arithmetic", has(Features::SHADER_F16));
    text += &row("subgroups", &subgroups);
    text += &row("timestamps", has(Features::TIMESTAMP_QUERY));
    let matrices = if shapes.is_empty() { "no".to_owned() } else { shapes.join(", ") };
    text += &row("cooperative matrix", &matrices);

    if !entry.refused.is_empty() {
        text += &format!("\n{}\n", ui::heading("Offered by the driver and then refused"));
        for refusal in &entry.refused {
            text += &format!("   {}\n", refusal.what);
            text += &ui::dim(&ui::wrap(refusal.why.trim(), 7));
        }
    }

    text += &format!("\n{}\n", ui::heading("Kernel tiers this adapter allows"));
    for (name, missing) in tiers(entry, &shapes) {
        let value = missing.map_or("yes".to_owned(), |m| format!("no: {m}"));
        text += &row(name, &value);
    }

    text += &format!("\n{}\n", ui::heading("Self-test: error against f64"));
    for c in checks {
        let verdict = if c.ok { ui::good("ok    ") } else { ui::bad("WRONG ") };
        let name = c.name;
        text += &format!("   {verdict}{name:<34}{:>8.1e} of {:.0e}\n", c.max_error, c.bound);
    }
    let differs = |row: &numerics::Row| format!("{} = {}", row.expression, row.text());
    let differing: Vec<_> = numerics.iter().filter(|r| r.differs).map(differs).collect();
    if !differing.is_empty() {
        let differing = differing.join(",  ");
        text += &ui::dim(&ui::wrap(&format!("unlike IEEE 754, no kernel minds: {differing}"), 3));
    }
    let size = format!("f32 matmul {SPEED_SIZE}³");
    text += &format!("\n   {size}: {} GFLOP/s\n", ui::count(*gflops));

    text += &kernel_table(kernels);

    let hints = hints(entry);
    if !hints.is_empty() {
        text += &format!("\n{}\n", ui::heading("What would help"));
        hints.iter().for_each(|hint| text += &ui::wrap(hint, 3));
    }
    text
}

/// One line a class: the kernel that serves it, then the others, in GFLOP/s.
fn kernel_table(kernels: &[(String, Decision)]) -> String {
    if kernels.is_empty() {
        return String::new();
    }
    let title = "Kernels chosen, by layout, weight type and M×N×K; GFLOP/s";
    let mut text = format!("\n{}\n", ui::heading(title));
    for (class, decision) in kernels {
        let speed = |name: &str| match decision.candidates.get(name) {
            Some(Verdict::Milliseconds(ms)) => ui::count(decision.flops / ms / 1e6),
            Some(Verdict::Refused(_)) => ui::bad("REFUSED"),
            None => "not raced".into(),
        };
        let Decision { chosen, candidates, .. } = decision;
        let others = candidates.keys().filter(|name| *name != chosen);
        let others: Vec<String> = others.map(|n| format!("{n} {}", speed(n))).collect();
        text += &format!("   {class:<24}{chosen} {}\n", ui::good(&speed(chosen)));
        if !others.is_empty() {
            text += &format!("{:27}{}\n", "", ui::dim(&format!("against {}", others.join(", "))));
        }
    }
    text
}

/// What is missing and how to get it.
fn hints(entry: &AdapterEntry) -> Vec<String> {
    let mut hints = Vec::new();
    if entry.is_software() {
        hints.push(
            "This is the CPU in a GPU's place. If the machine has a GPU, install its Vulkan driver: \
             on Linux your vendor's, or Mesa's (`mesa-vulkan-drivers`) for AMD and Intel; in a \
             container, pass the device through."
                .to_owned(),
        );
        let mesa = entry.info.driver_info.strip_prefix("Mesa ");
        let major = mesa.and_then(|v| v.split('.').next()).and_then(|v| v.parse::<u32>().ok());
        if let Some(major) = major.filter(|&major| major < 24) {
            hints.push(format!(
                "Mesa {major} is old: release 24 or later runs several times faster."
            ));
        }
    }
    if entry.info.backend == wgpu::Backend::Gl {
        hints.push(format!("OpenGL is the last resort and slow. {}.", install_hint()));
    }
    if !entry.is_software() && !entry.features.contains(Features::SUBGROUP) {
        hints.push("Without subgroups the slower base kernels run; try a newer driver.".into());
    }
    hints
}

fn as_json(adapters: &[AdapterEntry], examined: &Result<Examined>) -> Value {
    let refusal = |r: &Refusal| json!({ "what": r.what, "why": r.why.trim() });
    let adapter = |entry: &AdapterEntry| {
        let has = |feature| entry.features.contains(feature);
        let shapes = cooperative_shapes(entry);
        let tiers: Vec<_> =
            tiers(entry, &shapes).iter().filter(|t| t.1.is_none()).map(|t| t.0).collect();
        let i = &entry.info;
        let l = &entry.limits;
        json!({
            "index": entry.index,
            "name": i.name,
            "backend": i.backend.to_str(),
            "type": kind(entry),
            "driver": format!("{} {}", i.driver, i.driver_info).trim(),
            "limits": {
                "max_storage_buffer_binding_size": l.max_storage_buffer_binding_size,
                "max_buffer_size": l.max_buffer_size,
                "max_compute_workgroup_storage_size": l.max_compute_workgroup_storage_size,
                "max_compute_invocations_per_workgroup": l.max_compute_invocations_per_workgroup,
            },
            "features": {
                "f16": has(Features::SHADER_F16),
                "subgroups": has(Features::SUBGROUP),
                "subgroup_sizes": [i.subgroup_min_size, i.subgroup_max_size],
                "timestamps": has(Features::TIMESTAMP_QUERY),
                "cooperative_matrix": shapes,
            },
            "refused": entry.refused.iter().map(refusal).collect::<Vec<_>>(),
            "tiers": tiers,
        })
    };
    let check = |c: &Check| {
        let Check { name, max_error, bound, ok } = c;
        json!({ "name": name, "max_error": max_error, "bound": bound, "ok": ok })
    };
    let numeric = |row: &numerics::Row| {
        let (expression, value) = (row.expression, row.text());
        json!({ "expression": expression, "value": value, "ieee": !row.differs, "needed": row.needed })
    };
    let mut object = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "adapters": adapters.iter().map(adapter).collect::<Vec<_>>(),
    });
    let found = match examined {
        Ok(e) => json!({
            "chosen": e.gpu.adapter().index,
            "why": e.why,
            "selftest": e.checks.iter().map(check).collect::<Vec<_>>(),
            "numerics": e.numerics.iter().map(numeric).collect::<Vec<_>>(),
            "matmul_gflops": e.gflops,
            "kernels": e.kernels.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "hints": hints(e.gpu.adapter()),
            "ok": e.checks.iter().all(|c| c.ok),
        }),
        Err(error) => json!({ "chosen": null, "error": format!("{error:#}"), "ok": false }),
    };
    if let (Value::Object(object), Value::Object(found)) = (&mut object, found) {
        object.extend(found);
    }
    object
}

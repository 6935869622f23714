//! Which kernel of a family serves a class of products on this device. A candidate first proves its numbers against
//! f64 on the host; those that pass race; the winner is chosen on the device and kept on disk under the device's
//! fingerprint and the kernels' text, so that a later start has it without a race. A candidate that computes wrong on
//! this driver is refused by name and never used. Not here: which kernels there are (`ops::matmul`).
//!
//! A choice changes the order of sums, hence bits: a class is decided once and then stays, also where the budget left
//! no time to race it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::gpu::{Gpu, source};
use crate::model::Llama;
use crate::ops::{Layout, MatmulKernel, Product};
use crate::tensor::stored::{decode, encode};
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Version of the file format.
const SCHEMA: u32 = 1;
/// Rounds of a race; each candidate's best counts.
const ROUNDS: usize = 4;
/// What one timed run should take at least, so that a submit does not weigh.
const RUN: Duration = Duration::from_millis(2);
/// A candidate this much slower than the best leaves the race.
const HOPELESS: f64 = 2.5;
/// What a candidate must gain over the default: noise should not choose.
const GAIN: f64 = 1.03;
/// Extents of a race are cut to these; beyond, only the number of workgroups grows.
const MOST: [usize; 3] = [1024, 4096, 4096];

/// How one candidate fared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Best time of one product, in milliseconds.
    Milliseconds(f64),
    /// It computes wrong or not at all on this driver; why.
    Refused(String),
}

/// What was decided for one class of products.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The kernel that is used.
    pub chosen: String,
    /// The kernel that would be used without a race.
    pub default: String,
    /// FLOP of the product that was raced.
    pub flops: f64,
    /// Every candidate by kernel name; empty where the budget left no time to race.
    pub candidates: BTreeMap<String, Verdict>,
}

#[derive(Serialize, Deserialize)]
struct File {
    schema: u32,
    device: String,
    decisions: BTreeMap<String, Decision>,
}

/// The decisions for one device, in memory and on disk.
pub struct Tuning {
    gpu: Gpu,
    path: PathBuf,
    device: String,
    decisions: BTreeMap<String, Decision>,
    /// Why the file that was there could not be used.
    pub notice: Option<String>,
}

impl Tuning {
    /// Reads what earlier races decided for this device below `dir` and makes it the device's choice. A file that
    /// cannot be used is replaced at the next race; [`Tuning::notice`] says why.
    pub fn open(gpu: &Gpu, dir: &Path) -> Tuning {
        let device = fingerprint(gpu);
        let texts = [device.as_str()].into_iter().chain(MatmulKernel::ALL.map(|k| k.source()));
        let name = source::hash(&texts.collect::<String>()) ^ source::shared_hash();
        let path = dir.join(format!("kernels-{name:016x}.json"));
        let (decisions, notice) = match read(&path, &device) {
            Ok(decisions) => (decisions, None),
            Err(why) => (BTreeMap::new(), Some(why)),
        };
        Tuning { gpu: gpu.clone(), path, device, decisions, notice }
    }

    /// The file behind it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What was decided, by class.
    pub fn decisions(&self) -> &BTreeMap<String, Decision> {
        &self.decisions
    }

    /// Makes the device use what was decided for these products, racing those without a decision as long as `budget`
    /// lasts; the rest keep their defaults, for good. `progress` hears (done, all) and the class at work.
    ///
    /// # Errors
    /// A lost device; a file that cannot be written.
    pub fn prepare(
        &mut self,
        products: &[Product],
        budget: Duration,
        mut progress: impl FnMut(usize, usize, &str),
    ) -> Result<()> {
        let end = Instant::now() + budget;
        let mut open = Vec::new();
        for product in products {
            let name = product.class_name();
            let known = self.decisions.get(&name);
            match known.and_then(|d| MatmulKernel::named(&d.chosen)) {
                Some(kernel) => product.decide(&self.gpu, kernel),
                None => open.push((name, product)),
            }
        }
        let all = open.len();
        for (done, (name, product)) in open.into_iter().enumerate() {
            progress(done, all, &name);
            let decision = match Instant::now() < end {
                true => race(&self.gpu, product)?,
                false => Decision::unraced(product.default_kernel(&self.gpu), 0.0),
            };
            if let Some(kernel) = MatmulKernel::named(&decision.chosen) {
                product.decide(&self.gpu, kernel);
            }
            self.decisions.insert(name, decision);
        }
        if all > 0 {
            progress(all, all, "");
            self.write()?;
        }
        Ok(())
    }

    /// Makes the device use what was decided for these products. The rest keep their defaults until a race decides.
    pub fn recall(&self, products: &[Product]) {
        for product in products {
            let known = self.decisions.get(&product.class_name());
            if let Some(kernel) = known.and_then(|d| MatmulKernel::named(&d.chosen)) {
                product.decide(&self.gpu, kernel);
            }
        }
    }

    /// Makes the device, one that only counts, use what was decided for these products, and takes the memory that the
    /// race of the others would take: see [`crate::gpu::GpuOptions::dry`].
    pub fn rehearse(&self, products: &[Product]) {
        for product in products {
            let known = self.decisions.get(&product.class_name());
            match known.and_then(|d| MatmulKernel::named(&d.chosen)) {
                Some(kernel) => product.decide(&self.gpu, kernel),
                None => {
                    let field = Field::empty(&self.gpu, cut(product).even());
                    let kernels = field.product.kernels(&self.gpu);
                    kernels.into_iter().for_each(|kernel| field.run(kernel));
                    // A kernel that wants more than the device can bind leaves the race.
                    let _ = self.gpu.sync();
                }
            }
        }
    }

    /// Forgets every decision, on the device and on disk.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&mut self, products: &[Product]) -> Result<()> {
        products.iter().for_each(|product| product.undecide(&self.gpu));
        self.decisions.clear();
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(&self.path, e)),
            _ => Ok(()),
        }
    }

    /// Written beside and renamed, so that a killed process leaves the old file or the new one. What another process
    /// decided meanwhile stays.
    fn write(&mut self) -> Result<()> {
        for (class, decision) in read(&self.path, &self.device).unwrap_or_default() {
            self.decisions.entry(class).or_insert(decision);
        }
        let file =
            File { schema: SCHEMA, device: self.device.clone(), decisions: self.decisions.clone() };
        let text = serde_json::to_string_pretty(&file).expect("plain data is JSON");
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let beside = self.path.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        std::fs::write(&beside, text).map_err(|e| Error::io(&beside, e))?;
        std::fs::rename(&beside, &self.path).map_err(|e| Error::io(&self.path, e))
    }
}

impl Decision {
    fn unraced(default: MatmulKernel, flops: f64) -> Decision {
        let name = default.name().to_owned();
        Decision { chosen: name.clone(), default: name, flops, candidates: BTreeMap::new() }
    }

    /// Candidates that gave wrong numbers or none.
    pub fn refused(&self) -> impl Iterator<Item = (&str, &str)> {
        self.candidates.iter().filter_map(|(name, verdict)| match verdict {
            Verdict::Refused(why) => Some((name.as_str(), why.as_str())),
            Verdict::Milliseconds(_) => None,
        })
    }
}

fn read(path: &Path, device: &str) -> Result<BTreeMap<String, Decision>, String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(format!("{}: {e}; kernels are raced anew", path.display())),
    };
    let file: File = serde_json::from_str(&text)
        .map_err(|e| format!("{}: {e}; kernels are raced anew", path.display()))?;
    if file.schema != SCHEMA || file.device != device {
        return Err(format!("{} is for another version; kernels are raced anew", path.display()));
    }
    Ok(file.decisions)
}

/// What a decision is valid for: adapter, driver, backend, what of the device kernels are chosen by, and which kernels
/// may race at all.
pub fn fingerprint(gpu: &Gpu) -> String {
    let entry = gpu.adapter();
    let i = &entry.info;
    let factors = if gpu.f16_products() { "f16" } else { "exact" };
    format!(
        "{} [{:04x}:{:04x}] {} {} {} subgroups {}-{} {:?} {factors} products",
        i.name,
        i.vendor,
        i.device,
        i.backend,
        i.driver,
        i.driver_info,
        i.subgroup_min_size,
        i.subgroup_max_size,
        entry.features,
    )
}

/// The products of a model in forward passes of these numbers of rows, and of the backward passes if `training`.
pub fn products(llama: &Llama, rows: &[usize], training: bool) -> Vec<Product> {
    let shards = llama.parameters().into_iter().flat_map(|p| &p.shards);
    let matrices = shards.chain(llama.joined()).filter_map(|w| match w.shape()[..] {
        [out, into] => Some((w.dtype(), out, into)),
        _ => None,
    });
    let mut products = Vec::new();
    for (weight, out, into) in matrices {
        for &m in rows {
            products.push(Product { layout: Layout::NT, weight, m, n: out, k: into });
            if training {
                let f32 = DType::F32;
                products.push(Product { layout: Layout::NN, weight, m, n: into, k: out });
                products.push(Product { layout: Layout::TN, weight: f32, m: out, n: into, k: m });
            }
        }
    }
    // Layers repeat.
    let mut seen = BTreeSet::new();
    products.retain(|p| seen.insert(p.class_name()));
    products
}

/// Where decisions are kept if nobody says otherwise: `DEMASK_CACHE`, else the user's cache folder.
pub fn cache_dir() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || from("HOME").unwrap_or_else(std::env::temp_dir);
    from("DEMASK_CACHE").unwrap_or_else(|| match std::env::consts::OS {
        "windows" => from("LOCALAPPDATA").unwrap_or_else(std::env::temp_dir).join("demask"),
        "macos" => home().join("Library/Caches/demask"),
        _ => from("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache")).join("demask"),
    })
}

/// `Some(why)` if `kernel` computes `product` wrong on this device: a sample of its outputs against f64.
///
/// # Errors
/// A lost device, or no memory for the operands.
pub fn fault(gpu: &Gpu, product: Product, kernel: MatmulKernel) -> Result<Option<String>> {
    Field::new(gpu, product).fault(gpu, kernel)
}

/// Operands of one product and the places where its numbers are checked.
struct Field {
    a: Tensor,
    w: Tensor,
    y: Tensor,
    product: Product,
    /// Output index, value in f64, and the sum of the magnitudes that rounding is relative to.
    samples: Vec<(usize, f64, f64)>,
}

impl Field {
    fn new(gpu: &Gpu, product: Product) -> Field {
        let Product { layout, weight, m, n, k } = product;
        let (a, w) = (values(1, m * k), values(2, n * k));
        let (a_shape, w_shape) = product.shapes();
        let bytes = encode(&w, w_shape[1], weight);
        let w = decode(&bytes, w_shape[1], weight);
        let sample = |i: usize| {
            let at = i.wrapping_mul(7919) % (m * n).max(1);
            let (row, column) = (at / n, at % n);
            let term = |i: usize| {
                let a = if layout == Layout::TN { a[i * m + row] } else { a[row * k + i] };
                let w = if layout == Layout::NT { w[column * k + i] } else { w[i * n + column] };
                f64::from(a) * f64::from(w)
            };
            let (sum, size) = (0..k).map(term).fold((0.0, 0.0), |s, t| (s.0 + t, s.1 + t.abs()));
            (at, sum, size)
        };
        Field {
            samples: (0..m.saturating_mul(n).min(256)).map(sample).collect(),
            a: Tensor::from_f32(gpu, &a, a_shape),
            w: Tensor::from_bytes(gpu, &bytes, w_shape, weight, "tuning"),
            y: Tensor::empty(gpu, [m, n], DType::F32, "tuning"),
            product,
        }
    }

    /// Operands without values.
    fn empty(gpu: &Gpu, product: Product) -> Field {
        let (a_shape, w_shape) = product.shapes();
        Field {
            a: Tensor::empty(gpu, a_shape, DType::F32, "tuning"),
            w: Tensor::empty(gpu, w_shape, product.weight, "tuning"),
            y: Tensor::empty(gpu, [product.m, product.n], DType::F32, "tuning"),
            product,
            samples: Vec::new(),
        }
    }

    fn run(&self, kernel: MatmulKernel) {
        self.product.run(kernel, &self.a, &self.w, &self.y);
    }

    /// `Some(why)` if the kernel's numbers are wrong. The output holds NaN before, so what is not written shows.
    fn fault(&self, gpu: &Gpu, kernel: MatmulKernel) -> Result<Option<String>> {
        self.y.overwrite(&vec![f32::NAN; self.y.numel()]);
        self.run(kernel);
        let y = match self.y.to_vec() {
            Ok(y) => y,
            Err(e @ (Error::DeviceLost { .. } | Error::OutOfMemory { .. })) => return Err(e),
            Err(e) => return Ok(Some(e.to_string())),
        };
        gpu.sync()?;
        let wrong = self.samples.iter().find(|(at, want, size)| {
            let error = (f64::from(y[*at]) - want).abs();
            error.is_nan() || error > kernel.rounding() * size + 1e-6
        });
        Ok(wrong.map(|(at, want, _)| {
            let Product { layout, m, n, k, .. } = self.product;
            format!("gives {} instead of {want:.6} at {at} of {layout:?} {m}x{n}x{k}", y[*at])
        }))
    }

    /// Seconds of one product, over `runs` of them.
    fn seconds(&self, gpu: &Gpu, kernel: MatmulKernel, runs: usize) -> Result<f64> {
        let start = Instant::now();
        (0..runs).for_each(|_| self.run(kernel));
        gpu.sync()?;
        Ok(start.elapsed().as_secs_f64() / runs as f64)
    }
}

fn best_of(racing: &[(MatmulKernel, f64)]) -> f64 {
    racing.iter().map(|(_, seconds)| *seconds).fold(f64::INFINITY, f64::min)
}

/// The product that races for `product`'s class.
fn cut(product: &Product) -> Product {
    let Product { m, n, k, .. } = *product;
    Product { m: m.min(MOST[0]), n: n.min(MOST[1]), k: k.min(MOST[2]), ..*product }
}

fn race(gpu: &Gpu, product: &Product) -> Result<Decision> {
    let cut = cut(product);
    // A small product with ragged extents first: edges are where kernels go wrong.
    let ragged = Field::new(gpu, Product { m: cut.m.min(37), n: 100, k: 96, ..cut }.even());
    let field = Field::new(gpu, cut.even());
    let default = product.default_kernel(gpu);
    let mut candidates = BTreeMap::new();
    let mut racing = Vec::new();
    let mut heats = Vec::new();
    for kernel in field.product.kernels(gpu) {
        match ragged.fault(gpu, kernel)? {
            Some(why) => drop(candidates.insert(kernel.name().to_owned(), Verdict::Refused(why))),
            None => heats.push((kernel, ragged.seconds(gpu, kernel, 2)?)),
        }
    }
    // Who is far behind on the small product need not hold up the race.
    let last = best_of(&heats) * HOPELESS * 2.0;
    for (kernel, _) in heats.into_iter().filter(|(k, heat)| *heat <= last || *k == default) {
        match field.fault(gpu, kernel)? {
            Some(why) => drop(candidates.insert(kernel.name().to_owned(), Verdict::Refused(why))),
            None => racing.push((kernel, field.seconds(gpu, kernel, 1)?)),
        }
    }
    for _ in 0..ROUNDS {
        let best = best_of(&racing);
        let runs = ((RUN.as_secs_f64() / best.max(1e-9)) as usize).clamp(1, 64);
        for (kernel, seconds) in racing.iter_mut().filter(|(_, s)| *s <= best * HOPELESS) {
            *seconds = seconds.min(field.seconds(gpu, *kernel, runs)?);
        }
    }
    let own = racing.iter().find(|(kernel, _)| *kernel == default).map_or(f64::INFINITY, |r| r.1);
    let winner = racing.iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let chosen = match winner {
        Some((kernel, seconds)) if *seconds * GAIN < own => *kernel,
        Some(_) => default,
        None => {
            let refused: Vec<&str> = candidates.keys().map(String::as_str).collect();
            return Err(Error::Request(format!(
                "{}: every kernel computes {} wrong ({}); update the driver or name another adapter",
                gpu.adapter().describe(),
                product.class_name(),
                refused.join(", "),
            )));
        }
    };
    // To a tenth of a microsecond: more is noise, and would not survive the file.
    let milliseconds = |seconds: f64| Verdict::Milliseconds((seconds * 1e7).round() / 1e4);
    candidates.extend(racing.iter().map(|(k, s)| (k.name().to_owned(), milliseconds(*s))));
    let flops = field.product.flops();
    let decision = Decision { candidates, ..Decision::unraced(default, flops) };
    Ok(Decision { chosen: chosen.name().to_owned(), ..decision })
}

/// Numbers in [-1, 1), the same for the same seed; cheap, since a race needs millions.
fn values(seed: u32, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

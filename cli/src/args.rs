//! Options that several commands share, under the same names, and what they open.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use demask_engine::gpu::{ADAPTER_ENV, Gpu, GpuOptions};
use demask_engine::model::{Llama, LlamaConfig, Lora, Precision, StoredType, Weights, conversions};
use demask_engine::tensor::DType;
use serde_json::json;

use crate::ui::{self, Notices};

/// Takes the name of one of these types.
pub fn type_parser(types: &[StoredType]) -> impl TypedValueParser<Value = StoredType> {
    let known = |name: String| StoredType::ALL.into_iter().find(|t| t.name() == name);
    PossibleValuesParser::new(types.iter().map(|t| t.name()))
        .map(move |name| known(name).expect("only known names are possible"))
}

/// Where to compute, and how much to say.
#[derive(Args)]
pub struct Common {
    /// GPU adapter: index, backend (vulkan, metal, dx12, gl) or part of its name
    ///
    /// `demask doctor` lists them. Default: the best GPU; a software adapter only where there is
    /// nothing else. The environment variable DEMASK_ADAPTER does the same.
    #[arg(long, value_name = "ADAPTER")]
    pub adapter: Option<String>,

    #[command(flatten)]
    pub output: Output,
}

/// How much to say, and in what form.
#[derive(Args)]
pub struct Output {
    /// Print the result as one JSON object on stdout
    #[arg(long)]
    pub json: bool,

    /// No notices and no progress on stderr, only errors
    #[arg(long, short)]
    pub quiet: bool,
}

impl Output {
    /// The channel for notices.
    pub fn notices(&self) -> Notices {
        Notices::new(self.quiet)
    }

    /// Says that a model was written.
    pub fn model_written(&self, out: &Path, dtype: StoredType) -> Result<()> {
        match self.json {
            true => ui::print_json(
                &json!({ "out": out.display().to_string(), "type": format!("{dtype:?}") }),
            ),
            false => ui::print(&format!("{}\n", out.display())),
        }
    }
}

impl Common {
    /// The channel for notices.
    pub fn notices(&self) -> Notices {
        self.output.notices()
    }

    /// The device, for exact products; a software adapter is announced.
    pub fn open_gpu(&self) -> Result<Gpu> {
        self.open_gpu_with(false)
    }

    /// The device for running a model.
    pub fn open_gpu_for(&self, model: &ModelArgs) -> Result<Gpu> {
        self.open_gpu_with(model.f16_products)
    }

    /// The device for training, of whose memory this much may be used.
    pub fn open_gpu_within(&self, budget: Option<u64>) -> Result<Gpu> {
        self.announced(GpuOptions { budget, ..GpuOptions::default() })
    }

    /// The device as one that only counts memory.
    pub fn open_dry_gpu(&self) -> Result<Gpu> {
        let adapter = self.adapter.clone();
        Ok(Gpu::open(GpuOptions { adapter, dry: true, ..GpuOptions::default() })?)
    }

    fn open_gpu_with(&self, f16_products: bool) -> Result<Gpu> {
        self.announced(GpuOptions { f16_products, ..GpuOptions::default() })
    }

    fn announced(&self, options: GpuOptions) -> Result<Gpu> {
        let gpu = Gpu::open(GpuOptions { adapter: self.adapter.clone(), ..options })?;
        let entry = gpu.adapter();
        if entry.is_software() {
            let why = match self.adapter_named() {
                Some(_) => "as asked, and slow",
                None => "no GPU found, so this is slow (see demask doctor)",
            };
            let name = &entry.info.name;
            self.notices().say(&format!("using the software adapter {name}: {why}"));
        }
        Ok(gpu)
    }

    /// What names the adapter: the option, else the environment.
    pub fn adapter_named(&self) -> Option<String> {
        let named = self.adapter.clone().or_else(|| std::env::var(ADAPTER_ENV).ok());
        named.filter(|name| !name.is_empty())
    }
}

/// Which model, and in what precision.
#[derive(Args)]
pub struct ModelArgs {
    /// Hugging Face folder (config.json, model.safetensors, tokenizer.json) or GGUF file, or a name in the hub's cache
    /// on this machine (org/name, org/name@revision, org/name/file.gguf)
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,

    /// Adapter in PEFT's format (adapter_config.json, adapter_model.safetensors) to lay over the model
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,

    /// Type of the weight matrices in device memory; sums are always f32
    #[arg(long, value_enum, default_value = "stored", value_name = "TYPE")]
    pub precision: PrecisionArg,

    /// Type of the keys and values of past tokens in device memory
    #[arg(long, value_enum, default_value = "f32", value_name = "TYPE")]
    pub cache: CacheArg,

    /// Let matrix units round both factors of a product to f16 where that is faster (sums stay f32)
    ///
    /// Activations beyond 65504 overflow: for models that are known to run in half precision.
    #[arg(long)]
    pub f16_products: bool,
}

/// A model on disk that was looked into, with its adapter.
pub struct Opened {
    /// Of the model with its adapter.
    pub config: LlamaConfig,
    weights: Weights,
    lora: Option<Lora>,
    precision: Precision,
    cache: DType,
}

impl ModelArgs {
    /// Opens the model's files.
    pub fn open(&self) -> Result<Opened> {
        let (mut config, weights) = Weights::open(&self.model)?;
        let lora = self.lora.as_deref().map(Lora::read).transpose()?;
        if let Some(lora) = &lora {
            lora.check(&config)?;
            lora.decoding.apply(&mut config);
        }
        let cache = match self.cache {
            CacheArg::F32 => DType::F32,
            CacheArg::F16 => DType::F16,
        };
        Ok(Opened { config, weights, lora, precision: self.precision.into(), cache })
    }
}

impl Opened {
    /// Uploads it, and says what of it becomes another type.
    pub fn load(&self, gpu: &Gpu, notices: Notices) -> Result<Llama> {
        let converted = conversions(&self.config, &self.weights);
        if let Some(line) = converted.filter(|_| self.precision == Precision::Stored) {
            notices.say(&format!("{}: {line}", self.weights.path().display()));
        }
        let base = Llama::from_weights(gpu, &self.config, &self.weights, self.precision)
            .with_context(|| format!("loading {}", self.weights.path().display()))?
            .cached_in(self.cache);
        Ok(match &self.lora {
            None => base,
            Some(lora) => base.adapted(lora)?,
        })
    }
}

/// Type of a cache by name.
#[derive(Clone, Copy, ValueEnum)]
pub enum CacheArg {
    /// Exact
    F32,
    /// Half the memory, and faster behind long texts: rounded to 11 bits, and cut at 65504
    F16,
}

/// [`Precision`] by name.
#[derive(Clone, Copy, ValueEnum)]
pub enum PrecisionArg {
    /// As in the file; GGUF's blocks in 8 or 4 bits, whichever is nearest
    Stored,
    /// 4 bytes a weight
    F32,
    /// 2 bytes a weight, f32's range
    Bf16,
    /// 2 bytes a weight, finer than bf16, values up to 65504
    F16,
    /// 8.5 bits a weight: i8 in blocks of 32
    Q8,
    /// 5 bits a weight: 4 bits in blocks of 32
    Q4,
}

impl From<PrecisionArg> for Precision {
    fn from(arg: PrecisionArg) -> Precision {
        match arg {
            PrecisionArg::Stored => Precision::Stored,
            PrecisionArg::F32 => Precision::F32,
            PrecisionArg::Bf16 => Precision::Bf16,
            PrecisionArg::F16 => Precision::F16,
            PrecisionArg::Q8 => Precision::Q8,
            PrecisionArg::Q4 => Precision::Q4,
        }
    }
}

/// The text of a file, or of stdin for `-`.
pub fn read_text(path: &Path) -> Result<String> {
    if path.as_os_str() == "-" {
        return std::io::read_to_string(std::io::stdin()).context("cannot read stdin as UTF-8");
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Token ids on the command line, as in `1,2,3`.
#[derive(Clone, Debug, PartialEq)]
pub struct Ids(pub Vec<u32>);

impl std::str::FromStr for Ids {
    type Err = String;

    fn from_str(text: &str) -> Result<Ids, String> {
        let parts = text.split([',', ' ', '\n']).filter(|part| !part.is_empty());
        let ids: Result<_, _> = parts
            .map(|part| part.parse().map_err(|_| format!("{part:?} is not a token id")))
            .collect();
        ids.map(Ids)
    }
}

/// An amount of memory, as in `8GiB`, `512M` or `1.5GB`; without a unit, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            _ => return Err(format!("{unit:?} is no unit; write 8GiB, 512MiB or 8GB")),
        };
        match number.parse::<f64>() {
            Ok(n) if n * factor >= 1.0 => Ok(Bytes((n * factor) as u64)),
            _ => Err(format!("{text:?} is no amount of memory; write 8GiB, 512MiB or 8GB")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Ids};

    #[test]
    fn amounts_of_memory() {
        let amounts = ["8GiB", "8G", "1.5 MiB", "2kb", "12"].map(|t| t.parse());
        let bytes = [8 << 30, 8 << 30, 3 << 19, 2000, 12].map(|b| Ok(Bytes(b)));
        assert_eq!(amounts, bytes);
        for wrong in ["", "GiB", "8 apples", "0", "-1", "1.2.3"] {
            assert!(wrong.parse::<Bytes>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn ids_from_a_list() {
        assert_eq!("1,2, 3".parse(), Ok(Ids(vec![1, 2, 3])));
        assert_eq!("".parse(), Ok(Ids(vec![])));
        assert!("1,-2".parse::<Ids>().is_err_and(|e| e.contains("-2")));
        assert!("4294967296".parse::<Ids>().is_err());
    }
}

//! Adapters in the format of Hugging Face PEFT: `adapter_config.json` beside `adapter_model.safetensors`, read and
//! written. What would compute something else than PEFT does is refused by name.

use std::fmt;
use std::path::Path;

use fancy_regex::Regex;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Value, json};

use super::{Decoding, Lora, LowRank, Replaced, Share};
use crate::model::hub;
use crate::model::save::save_files;
use crate::tensor::stored::decode;
use crate::tensor::{DType, Shape};
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT has no field for: how the adapted model decodes.
const DECODING: &str = "decoding.json";
/// What PEFT puts before the names of the base model.
const PREFIX: &str = "base_model.model.";
/// Behind the name of a matrix of which some rows are trained.
const TOKENS: &str = ".token_adapter.trainable_tokens_delta";

/// Settings of PEFT that change what an adapter computes, and that nothing here does.
const UNSUPPORTED: &[&str] = &[
    "target_parameters",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "alora_invocation_tokens",
];

/// Values of `init_lora_weights` that leave the base's weights as they are.
const BESIDE: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

impl Lora {
    /// Reads an adapter's folder, as PEFT or [`Lora::write`] wrote it; a name that no file has is looked for in the
    /// hub's cache. What would be left out silently is refused.
    pub fn read(dir: &Path) -> Result<Lora> {
        let dir = &hub::resolve(dir)?;
        let settings = Settings::read(&dir.join(CONFIG))?;
        let mut lora = Lora::empty(settings.by_root, settings.dora);
        lora.share = settings.share;
        lora.decoding = read_decoding(&dir.join(DECODING))?;
        lora.read_weights(&dir.join(WEIGHTS), &settings)?;
        Ok(lora)
    }

    fn read_weights(&mut self, path: &Path, settings: &Settings) -> Result<()> {
        let fail = |reason: String| Error::model(path, reason);
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| fail(e.to_string()))?;
        for (name, view) in file.tensors() {
            let inner = name.strip_prefix(PREFIX).unwrap_or(&name);
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::Bf16,
                other => return Err(fail(format!("{name} is {other:?}, not F32, F16 or BF16"))),
            };
            let shape = Shape::from(view.shape());
            let values = || decode(view.data(), shape.last(), dtype);
            let replaced = |rows, tied| Replaced {
                shape: view.shape().to_vec(),
                values: values(),
                rows,
                tied,
            };
            if let Some((module, part)) = inner.rsplit_once(".lora_") {
                let low = match self.modules.get_mut(module) {
                    Some(low) => low,
                    None => {
                        let (rank, alpha) = settings.numbers(module)?;
                        let empty =
                            LowRank { rank, alpha, a: vec![], b: vec![], magnitude: vec![] };
                        self.modules.entry(module.into()).or_insert(empty)
                    }
                };
                match part {
                    "A.weight" if shape.first() == Some(&low.rank) => low.a = values(),
                    "B.weight" if shape.len() == 2 && shape.last() == low.rank => low.b = values(),
                    "magnitude_vector" if self.dora => low.magnitude = values(),
                    _ => {
                        let rank = low.rank;
                        return Err(fail(format!(
                            "{name} {shape} is no part of an adapter of rank {rank} that can be read"
                        )));
                    }
                }
            } else if let Some(module) = inner.strip_suffix(TOKENS) {
                let rows = settings.rows(module)?;
                self.replaced.insert(format!("{module}.weight"), replaced(Some(rows), true));
            } else if inner.ends_with(".weight") || inner.ends_with(".bias") {
                // A module of its own is no longer tied to another; values without one are the base's, as PEFT writes
                // them where the vocabulary has grown.
                let tied = !settings.saves(inner);
                self.replaced.insert(inner.into(), replaced(None, tied));
            } else {
                return Err(fail(format!(
                    "{name} {shape} is no part of an adapter that can be read"
                )));
            }
        }
        if let Some(odd) = self.replaced.keys().find(|name| name.contains(".base_layer.")) {
            return Err(fail(format!(
                "{odd} is a weight under an adapter of its own; only matrices of layers can be adapted"
            )));
        }
        if self.modules.is_empty() && self.replaced.is_empty() {
            return Err(fail("it adapts nothing".into()));
        }
        Ok(())
    }

    /// Writes the folder that PEFT loads onto `base` (a path or the name of a repository).
    pub fn write(&self, dir: &Path, base: &str) -> Result<()> {
        let mut targets: Vec<&str> =
            self.modules.keys().filter_map(|name| name.rsplit('.').next()).collect();
        targets.sort_unstable();
        targets.dedup();
        let usual = self.modules.values().next().map_or((1, 1.0), |low| (low.rank, low.alpha));
        let others = |of: &dyn Fn(&LowRank) -> Value, usual: Value| -> Value {
            let differ = self.modules.iter().filter(|(_, low)| of(low) != usual);
            differ
                .map(|(name, low)| (name.clone(), of(low)))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let module = |name: &str| name.trim_end_matches(".weight").to_owned();
        let of_rows = |some: bool| {
            self.replaced.iter().filter(move |(_, replaced)| replaced.rows.is_some() == some)
        };
        let tokens: serde_json::Map<_, _> =
            of_rows(true).map(|(name, replaced)| (module(name), json!(replaced.rows))).collect();
        let saved: Vec<String> = of_rows(false)
            .filter(|(_, replaced)| !replaced.tied)
            .map(|(name, _)| module(name.trim_end_matches(".bias")))
            .collect();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": usual.0,
            "lora_alpha": usual.1,
            "rank_pattern": others(&|low| json!(low.rank), json!(usual.0)),
            "alpha_pattern": others(&|low| json!(low.alpha), json!(usual.1)),
            "lora_dropout": 0.0,
            "target_modules": targets,
            "use_dora": self.dora,
            "use_rslora": self.by_root,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match self.share {
                Share::None => json!(true),
                Share::Pissa => json!("pissa"),
                Share::Olora => json!("olora"),
            },
            "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
            "trainable_token_indices": if tokens.is_empty() { Value::Null } else { tokens.into() },
        });
        let mut tensors = Vec::new();
        for (module, LowRank { rank, a, b, magnitude, .. }) in &self.modules {
            let (d, o) = (a.len() / rank, b.len() / rank);
            tensors.push((format!("{PREFIX}{module}.lora_A.weight"), vec![*rank, d], a));
            tensors.push((format!("{PREFIX}{module}.lora_B.weight"), vec![o, *rank], b));
            if self.dora {
                let name = format!("{PREFIX}{module}.lora_magnitude_vector");
                tensors.push((name, vec![o], magnitude));
            }
        }
        for (name, Replaced { shape, values, rows, .. }) in &self.replaced {
            let name =
                if rows.is_some() { format!("{}{TOKENS}", module(name)) } else { name.clone() };
            tensors.push((format!("{PREFIX}{name}"), shape.clone(), values));
        }
        let broken = |e: safetensors::SafeTensorError| Error::model(dir, e.to_string());
        let views = tensors
            .iter()
            .map(|(name, shape, values)| {
                let bytes = bytemuck::cast_slice(values);
                Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(broken)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut files = vec![
            (WEIGHTS.to_owned(), serialize(views, None).map_err(broken)?),
            (CONFIG.to_owned(), pretty(&config)),
        ];
        if self.decoding != Decoding::default() {
            files.push((DECODING.to_owned(), pretty(&json!(self.decoding))));
        }
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        save_files(dir, &files)
    }
}

/// What `adapter_config.json` says of the tensors.
struct Settings {
    rank: Pattern<usize>,
    alpha: Pattern<f64>,
    by_root: bool,
    dora: bool,
    share: Share,
    /// Ends of the names of modules that the adapter has whole.
    modules_to_save: Vec<String>,
    /// Ends of the names of modules that the adapter has some rows of, and which.
    tokens: Vec<(String, Vec<u32>)>,
    path: std::path::PathBuf,
}

/// A number, and the ones that modules with certain names have instead.
struct Pattern<T> {
    usual: T,
    others: Vec<(Regex, T)>,
}

impl<T: Copy> Pattern<T> {
    /// As in PEFT, the first pattern counts that matches the name's end from a dot on.
    fn of(&self, module: &str) -> std::result::Result<T, fancy_regex::Error> {
        for (pattern, value) in &self.others {
            if pattern.is_match(module)? {
                return Ok(*value);
            }
        }
        Ok(self.usual)
    }
}

/// A JSON object in the order of the file, which decides between patterns.
#[derive(Default)]
struct InOrder<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for InOrder<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = InOrder<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut all: Vec<(String, T)> = Vec::new();
                while let Some((key, value)) = map.next_entry()? {
                    // Of a key that comes twice the first place counts, and the last value.
                    match all.iter_mut().find(|(k, _)| *k == key) {
                        Some(known) => known.1 = value,
                        None => all.push((key, value)),
                    }
                }
                Ok(InOrder(all))
            }
        }
        deserializer.deserialize_map(Entries(std::marker::PhantomData))
    }
}

/// The fields whose order matters.
#[derive(Deserialize)]
struct Ordered {
    #[serde(default)]
    rank_pattern: Option<InOrder<f64>>,
    #[serde(default)]
    alpha_pattern: Option<InOrder<f64>>,
    #[serde(default)]
    trainable_token_indices: Option<Tokens>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    OfEmbedding(Vec<u32>),
    OfModules(InOrder<Vec<u32>>),
}

impl Settings {
    fn read(path: &Path) -> Result<Settings> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let fail = |reason: String| Error::model(path, reason);
        let config: Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let ordered: Ordered = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
        let kind = config["peft_type"].as_str().unwrap_or("missing");
        if kind != "LORA" {
            return Err(fail(format!("peft_type is {kind}; only LORA adapters can be read")));
        }
        for field in UNSUPPORTED {
            if is_set(&config[*field]) {
                return Err(fail(format!("{field} = {} is not supported", config[*field])));
            }
        }
        let rank = |field: &str, value: f64| {
            let whole = (1.0..=1e6).contains(&value) && value.fract() == 0.0;
            whole
                .then_some(value as usize)
                .ok_or_else(|| fail(format!("{field} is no positive number: {value}")))
        };
        let alpha = |field: &str, value: f64| match value.is_finite() {
            true => Ok(value),
            false => Err(fail(format!("{field} is no finite number"))),
        };
        let number = |field: &str| {
            let missing = || fail(format!("{field} is no positive number: {}", config[field]));
            config[field].as_f64().ok_or_else(missing)
        };
        let flag = |field: &str| config[field].as_bool().unwrap_or(false);
        let names: Option<Vec<String>> = serde_json::from_value(config["modules_to_save"].clone())
            .map_err(|e| fail(format!("modules_to_save: {e}")))?;
        Ok(Settings {
            rank: Pattern {
                usual: rank("r", number("r")?)?,
                others: patterns(path, "rank_pattern", ordered.rank_pattern, rank)?,
            },
            alpha: Pattern {
                usual: alpha("lora_alpha", number("lora_alpha")?)?,
                others: patterns(path, "alpha_pattern", ordered.alpha_pattern, alpha)?,
            },
            by_root: flag("use_rslora"),
            dora: flag("use_dora"),
            share: share(&config["init_lora_weights"]).map_err(fail)?,
            modules_to_save: names.unwrap_or_default(),
            tokens: match ordered.trainable_token_indices {
                None => vec![],
                Some(Tokens::OfEmbedding(rows)) => vec![("embed_tokens".into(), rows)],
                Some(Tokens::OfModules(InOrder(modules))) => modules,
            },
            path: path.to_owned(),
        })
    }

    /// Rank and alpha of a module.
    fn numbers(&self, module: &str) -> Result<(usize, f64)> {
        let fail = |e: fancy_regex::Error| Error::model(&self.path, format!("{module}: {e}"));
        Ok((self.rank.of(module).map_err(fail)?, self.alpha.of(module).map_err(fail)?))
    }

    /// Whether a parameter belongs to a module that the adapter has whole.
    fn saves(&self, parameter: &str) -> bool {
        let module = parameter.rsplit_once('.').map_or(parameter, |(module, _)| module);
        self.modules_to_save.iter().any(|end| module.ends_with(end.as_str()))
    }

    /// The rows of a module that the adapter has.
    fn rows(&self, module: &str) -> Result<Vec<u32>> {
        let found = self.tokens.iter().find(|(end, _)| module.ends_with(end.as_str()));
        found.map(|(_, rows)| rows.clone()).ok_or_else(|| {
            let reason = format!("trainable_token_indices does not say which rows of {module}");
            Error::model(&self.path, reason)
        })
    }
}

fn patterns<T>(
    path: &Path,
    field: &str,
    given: Option<InOrder<f64>>,
    value: impl Fn(&str, f64) -> Result<T>,
) -> Result<Vec<(Regex, T)>> {
    let one = |(key, number): (String, f64)| {
        let pattern = Regex::new(&format!(r"^(.*\.)?({key})$")).map_err(|e| {
            Error::model(
                path,
                format!("{field} has the pattern {key:?}, which cannot be read: {e}"),
            )
        })?;
        Ok((pattern, value(&format!("{field}[{key:?}]"), number)?))
    };
    given.unwrap_or_default().0.into_iter().map(one).collect()
}

/// What of the base an adapter with this `init_lora_weights` was made of, or why that cannot be known.
fn share(init: &Value) -> std::result::Result<Share, String> {
    let name = match init {
        Value::Null | Value::Bool(_) => return Ok(Share::None),
        other => other.as_str().unwrap_or("?"),
    };
    let why = match name {
        "pissa" => return Ok(Share::Pissa),
        name if name.eq_ignore_ascii_case("olora") => return Ok(Share::Olora),
        name if BESIDE.iter().any(|known| name.eq_ignore_ascii_case(known)) => {
            return Ok(Share::None);
        }
        name if name.starts_with("pissa_niter_") => "it is drawn at random",
        "corda" | "lora_ga" => "it depends on the data that training began with",
        "loftq" => "it depends on how the base was quantised",
        _ => "demask does not know it",
    };
    Err(format!(
        "init_lora_weights is {init}: such an adapter stands on a base without its first share, and {why}; have PEFT \
         save it as a plain one (save_pretrained with path_initial_model_for_weight_conversion), or merge it there"
    ))
}

/// Whether a setting is more than PEFT's way of saying no.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(all) => !all.is_empty(),
        Value::Object(all) => !all.is_empty(),
        Value::String(text) => text != "none",
        _ => true,
    }
}

fn read_decoding(path: &Path) -> Result<Decoding> {
    if !path.exists() {
        return Ok(Decoding::default());
    }
    let fail = |e: serde_json::Error| Error::model(path, e.to_string());
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text).map_err(fail)
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

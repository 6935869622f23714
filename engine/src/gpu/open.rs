//! Opening a device on an adapter whose word is not trusted: drivers offer features that they then refuse, by an
//! error or by a panic inside wgpu. What kernels cannot do without is asked for together with all wishes; where that is
//! refused, the wishes are sorted out by halves, so that a refusal costs one wish and not the run.

use std::any::Any;
use std::cell::Cell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::task::Poll;

use wgpu::{Features, Limits};

use super::AdapterEntry;
use crate::{Error, Result};

/// Something that an adapter offered and did not give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The feature by wgpu's name, or `limits` for all limits beyond WebGPU's own.
    pub what: String,
    /// The driver's or wgpu's words.
    pub why: String,
}

/// What a device is asked for.
#[derive(Clone, Debug)]
struct Demand {
    features: Features,
    limits: Limits,
}

/// What would be good to have.
#[derive(Clone, Debug)]
enum Wish {
    Feature(&'static str, Features),
    Limits(Box<Limits>),
}

impl Wish {
    fn name(&self) -> &'static str {
        match self {
            Wish::Feature(name, _) => name,
            Wish::Limits(_) => "limits",
        }
    }
}

impl Demand {
    fn with(&self, wishes: &[Wish]) -> Demand {
        let mut more = self.clone();
        for wish in wishes {
            match wish {
                Wish::Feature(_, feature) => more.features |= *feature,
                Wish::Limits(limits) => more.limits = (**limits).clone(),
            }
        }
        more
    }
}

/// Opens a device on `entry`, which then tells what was granted and what was refused. Every limit is asked for, and
/// every feature but experimental ones; of these only cooperative matrices, and what is `needed`.
pub(super) async fn open(
    entry: &mut AdapterEntry,
    needed: Features,
) -> Result<(wgpu::Device, wgpu::Queue)> {
    let mut limits = entry.limits.clone();
    // DX12 reserves memory for this many descriptors; the bind-group cache never holds so many.
    limits.max_non_sampler_bindings = limits.max_non_sampler_bindings.min(200_000);
    let needed =
        Demand { features: needed, limits: Limits::defaults().or_worse_values_from(&limits) };
    let coop = entry.features & Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let wanted = (entry.features - Features::all_experimental_mask()) | coop;
    let features = wanted.iter_names().map(|(name, feature)| Wish::Feature(name, feature));
    let wishes = features.chain([Wish::Limits(Box::new(limits))]).collect();
    let adapter = entry.adapter.clone();
    let ask = async |demand: Demand| caught(request(&adapter, demand)).await;
    let (opened, granted, refused) = negotiate(needed, wishes, ask)
        .await
        .map_err(|reason| Error::NoDevice { adapter: entry.describe(), reason })?;
    entry.features = granted.features;
    entry.limits = granted.limits;
    entry.refused = refused;
    if !entry.features.contains(Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        entry.cooperative.clear();
    }
    Ok(opened)
}

async fn request(
    adapter: &wgpu::Adapter,
    demand: Demand,
) -> Result<(wgpu::Device, wgpu::Queue), String> {
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("demask"),
        required_features: demand.features,
        required_limits: demand.limits,
        // SAFETY: the one experimental feature asked for, cooperative matrices, is used by no kernel that
        // has not passed its self-test on this device.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        // The pool keeps what it has; big driver-side blocks on top would be held twice.
        memory_hints: wgpu::MemoryHints::MemoryUsage,
        trace: wgpu::Trace::Off,
    };
    adapter.request_device(&descriptor).await.map_err(|e| e.to_string())
}

/// The device with as many wishes as can be had together, what it was asked for, and the wishes that were refused. An
/// error is that of the bare need.
async fn negotiate<D>(
    needed: Demand,
    wishes: Vec<Wish>,
    ask: impl AsyncFn(Demand) -> Result<D, String>,
) -> Result<(D, Demand, Vec<Refusal>), String> {
    // Nearly always the first answer is yes.
    if let Ok(device) = ask(needed.with(&wishes)).await {
        return Ok((device, needed.with(&wishes), Vec::new()));
    }
    let mut device = ask(needed.clone()).await?;
    let mut granted = needed;
    let mut refused = Vec::new();
    let (first, second) = wishes.split_at(wishes.len() / 2);
    let mut open = vec![second, first];
    while let Some(group) = open.pop().filter(|group| !group.is_empty()) {
        let demand = granted.with(group);
        match (ask(demand.clone()).await, group) {
            (Ok(more), _) => (device, granted) = (more, demand),
            (Err(why), [wish]) => refused.push(Refusal { what: wish.name().into(), why }),
            (Err(_), _) => {
                let (first, second) = group.split_at(group.len() / 2);
                open.extend([second, first]);
            }
        }
    }
    Ok((device, granted, refused))
}

thread_local! {
    /// True while a panic of this thread is an answer and no fault.
    static ASKING: Cell<bool> = const { Cell::new(false) };
}

/// Awaits `work`; a panic in it is an error with the panic's words, and no panic hook hears of it.
async fn caught<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let heard = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !ASKING.get() {
                heard(panic);
            }
        }));
    });
    let mut work = Box::pin(work);
    poll_fn(move |context| {
        ASKING.set(true);
        let polled = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context)));
        ASKING.set(false);
        polled.unwrap_or_else(|panic| Poll::Ready(Err(words(&*panic))))
    })
    .await
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that refuses these, some by an error and some by a panic; it gives back what it was asked for.
    fn ask(errors: Features, panics: Features, demand: Demand) -> Result<Features, String> {
        assert!(!demand.features.intersects(panics), "the driver fell over");
        match demand.features & errors {
            none if none.is_empty() => Ok(demand.features),
            some => Err(format!("no {some:?}")),
        }
    }

    fn wish(features: Features) -> Vec<Wish> {
        features.iter_names().map(|(name, feature)| Wish::Feature(name, feature)).collect()
    }

    #[test]
    fn a_refusal_costs_its_wish_alone() {
        let all = Features::SUBGROUP
            | Features::SHADER_F16
            | Features::TIMESTAMP_QUERY
            | Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | Features::SHADER_INT64;
        let needed = Demand { features: Features::empty(), limits: Limits::defaults() };
        for (errors, panics) in [
            (Features::empty(), Features::empty()),
            (Features::SHADER_F16, Features::empty()),
            (Features::empty(), Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            (Features::SUBGROUP | Features::SHADER_INT64, Features::TIMESTAMP_QUERY),
            (all, Features::empty()),
        ] {
            let driver = async |demand| caught(async { ask(errors, panics, demand) }).await;
            let result = pollster::block_on(negotiate(needed.clone(), wish(all), driver));
            let (device, granted, refused) = result.expect("a device");
            assert_eq!((device, granted.features), (all - errors - panics, device));
            let names: Vec<_> = (errors | panics).iter_names().map(|(name, _)| name).collect();
            let mut told: Vec<_> = refused.iter().map(|r| r.what.as_str()).collect();
            told.sort_by_key(|name| names.iter().position(|n| n == name));
            assert_eq!(told, names);
            let fell = refused.iter().filter(|r| r.why.contains("the driver fell over"));
            assert_eq!(fell.count(), panics.iter_names().count());
        }
    }

    #[test]
    fn limits_are_a_wish_and_a_need_refused_is_an_error() {
        let needed = Demand { features: Features::empty(), limits: Limits::defaults() };
        let better = Limits { max_bind_groups: 8, ..Limits::defaults() };
        let mut wishes = wish(Features::SHADER_F16);
        wishes.push(Wish::Limits(Box::new(better)));
        let modest = async |demand: Demand| match demand.limits.max_bind_groups {
            8 => Err("too many".to_owned()),
            _ => Ok(demand.features),
        };
        let result = pollster::block_on(negotiate(needed.clone(), wishes.clone(), modest));
        let (device, granted, refused) = result.expect("a device");
        assert_eq!((device, granted.limits), (Features::SHADER_F16, needed.limits.clone()));
        assert_eq!(refused, [Refusal { what: "limits".into(), why: "too many".into() }]);
        let none = async |_: Demand| Err::<(), _>("out of order".to_owned());
        let error = pollster::block_on(negotiate(needed, wishes, none)).err();
        assert_eq!(error.as_deref(), Some("out of order"));
    }
}

//! Which adapter to use. The best real GPU by default; a software adapter only when nothing else exists
//! or when it is asked for, and the caller is told so.

use super::Refusal;
use crate::{Error, Result};

/// The environment variable that names an adapter when no option does.
pub const ADAPTER_ENV: &str = "DEMASK_ADAPTER";

/// One adapter as the system offers it, in the order of [`list`].
#[derive(Clone, Debug)]
pub struct AdapterEntry {
    /// Position in the list; `--adapter 1` selects by it.
    pub index: usize,
    /// Name, backend, driver, type as wgpu reports them.
    pub info: wgpu::AdapterInfo,
    /// What the adapter can do.
    pub features: wgpu::Features,
    /// How much of it.
    pub limits: wgpu::Limits,
    /// What its matrix units multiply.
    pub cooperative: Vec<wgpu::CooperativeMatrixProperties>,
    /// What of these it did not give when a device was opened on it; empty before.
    pub refused: Vec<Refusal>,
    pub(super) adapter: wgpu::Adapter,
}

impl AdapterEntry {
    /// True for a CPU rasteriser such as llvmpipe, SwiftShader or WARP.
    pub fn is_software(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu
    }

    /// Name, backend and driver in one line.
    pub fn describe(&self) -> String {
        let i = &self.info;
        format!("{} ({}, {} {})", i.name, i.backend.to_str(), i.driver, i.driver_info)
    }

    fn rank(&self) -> u32 {
        let kind = match self.info.device_type {
            wgpu::DeviceType::DiscreteGpu => 50,
            wgpu::DeviceType::IntegratedGpu => 40,
            wgpu::DeviceType::VirtualGpu => 30,
            wgpu::DeviceType::Other => 20,
            wgpu::DeviceType::Cpu => 0,
        };
        // OpenGL is the last resort on every system: no f16, no subgroups, no timestamps.
        kind + if self.info.backend == wgpu::Backend::Gl { 0 } else { 5 }
    }
}

/// Every adapter that can run compute kernels, in a stable order.
pub async fn list() -> Vec<AdapterEntry> {
    list_of(wgpu::Backends::all()).await
}

/// The adapters among which `wanted` is looked for: OpenGL, whose drivers are slow to load and talk on stderr, is only
/// asked where nothing else exists or an adapter is named. OpenGL comes last, so positions are those of [`list`].
/// `noop`, named exactly, is wgpu's backend that computes nothing: benches measure host time on it. It exists only
/// where the crate above turns wgpu's feature of that name on.
pub(super) async fn candidates(wanted: Option<&str>) -> Vec<AdapterEntry> {
    if wanted == Some("noop") {
        return list_of(wgpu::Backends::NOOP).await;
    }
    if wanted.is_none() {
        let entries = list_of(wgpu::Backends::all() - wgpu::Backends::GL).await;
        if !entries.is_empty() {
            return entries;
        }
    }
    list().await
}

async fn list_of(backends: wgpu::Backends) -> Vec<AdapterEntry> {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.flags = wgpu::InstanceFlags::empty();
    descriptor.backends = backends;
    descriptor.backend_options.noop = wgpu::NoopBackendOptions {
        enable: backends == wgpu::Backends::NOOP,
        limits: Some(wgpu::Limits::default()),
        features: Some(wgpu::Features::empty()),
        device_type: Some(wgpu::DeviceType::DiscreteGpu),
        ..Default::default()
    };
    let instance = wgpu::Instance::new(descriptor);
    let adapters = instance.enumerate_adapters(backends).await;
    adapters
        .into_iter()
        .filter(|a| {
            a.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
        })
        .enumerate()
        .map(|(index, adapter)| AdapterEntry {
            index,
            info: adapter.get_info(),
            features: adapter.features(),
            cooperative: match adapter.features() & wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            {
                none if none.is_empty() => Vec::new(),
                _ => adapter.cooperative_matrix_properties(),
            },
            limits: adapter.limits(),
            refused: Vec::new(),
            adapter,
        })
        .collect()
}

/// Picks an adapter. `wanted` is an index, a backend (`vulkan`, `metal`, `dx12`, `gl`) or a part of the name,
/// case-insensitive; without it [`ADAPTER_ENV`] is asked, and without that the best adapter is taken.
pub(super) fn choose(mut entries: Vec<AdapterEntry>, wanted: Option<&str>) -> Result<AdapterEntry> {
    let found = match entries.is_empty() {
        true => "none".to_owned(),
        false => entries
            .iter()
            .map(|e| format!("[{}] {}", e.index, e.describe()))
            .collect::<Vec<_>>()
            .join(", "),
    };
    if let Some(wanted) = wanted {
        let needle = wanted.to_lowercase();
        let fits = |e: &AdapterEntry| match needle.parse::<usize>() {
            Ok(index) => e.index == index,
            Err(_) => {
                e.info.backend.to_str() == needle || e.info.name.to_lowercase().contains(&needle)
            }
        };
        entries.retain(fits);
        if entries.is_empty() {
            return Err(Error::NoAdapter {
                wanted: format!("matches {wanted:?}"),
                found,
                remedy: "Name one of those by index, backend or part of its name".into(),
            });
        }
    }
    // The first of the best: equal ranks keep the system's order.
    entries.sort_by_key(|e| std::cmp::Reverse(e.rank()));
    entries.into_iter().next().ok_or_else(|| Error::NoAdapter {
        wanted: "was found".into(),
        found,
        remedy: install_hint().into(),
    })
}

/// What to install where no adapter exists.
pub fn install_hint() -> &'static str {
    if cfg!(target_os = "linux") {
        "Install your GPU's Vulkan driver, or the software one: `apt-get install mesa-vulkan-drivers libvulkan1` \
         (Debian, Ubuntu), `dnf install mesa-vulkan-drivers vulkan-loader` (Fedora), \
         `pacman -S vulkan-swrast vulkan-icd-loader` (Arch)"
    } else if cfg!(target_os = "macos") {
        "Metal is part of macOS: a Mac of 2015 or later with macOS 11 or later is needed"
    } else if cfg!(target_os = "windows") {
        "Install your GPU vendor's driver with DirectX 12 or Vulkan support; Windows 10 and later bring WARP"
    } else {
        "Install a Vulkan driver and loader"
    }
}

//! What a record was measured on: enough to refuse a comparison of unlike things.

use std::collections::BTreeMap;

use demask_engine::gpu::Gpu;
use serde::{Deserialize, Serialize};

/// A device's fingerprint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Name of the adapter.
    pub adapter: String,
    /// PCI vendor, or the backend's number for one.
    pub vendor: u32,
    /// PCI device.
    pub device: u32,
    /// `DiscreteGpu`, `IntegratedGpu`, `VirtualGpu`, `Cpu` or `Other`.
    pub kind: String,
    /// `vulkan`, `metal`, `dx12` or `gl`.
    pub backend: String,
    /// Name of the driver.
    pub driver: String,
    /// Its version.
    pub driver_info: String,
    /// Version of wgpu that the program was built with.
    pub wgpu: String,
    /// Features in use.
    pub features: Vec<String>,
    /// Limits that choose kernels.
    pub limits: BTreeMap<String, u64>,
    /// Operating system and architecture, `linux x86_64`.
    pub system: String,
    /// The processor, with its number of threads.
    pub processor: String,
}

impl Device {
    /// The fingerprint of an open device.
    pub fn of(gpu: &Gpu) -> Device {
        let entry = gpu.adapter();
        let (info, limits) = (&entry.info, &entry.limits);
        let features = entry.features.iter_names().filter(|(_, f)| gpu.has(*f));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Device {
            adapter: info.name.clone(),
            vendor: info.vendor,
            device: info.device,
            kind: format!("{:?}", info.device_type),
            backend: info.backend.to_str().to_owned(),
            driver: info.driver.clone(),
            driver_info: info.driver_info.clone(),
            wgpu: WGPU_VERSION.to_owned(),
            features: features.map(|(name, _)| name.to_owned()).collect(),
            limits: [
                ("max_binding", gpu.max_binding()),
                ("workgroup_storage", u64::from(limits.max_compute_workgroup_storage_size)),
                ("workgroup_invocations", u64::from(limits.max_compute_invocations_per_workgroup)),
                ("subgroup_min", u64::from(info.subgroup_min_size)),
                ("subgroup_max", u64::from(info.subgroup_max_size)),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor: format!("{}, {threads} threads", processor()),
        }
    }

    /// Name, backend and driver in one line.
    pub fn describe(&self) -> String {
        format!("{} ({}, {} {})", self.adapter, self.backend, self.driver, self.driver_info)
    }

    /// Why times of the two cannot be compared; empty where they can.
    pub fn unlike(&self, other: &Device) -> Vec<String> {
        let mut unlike = Vec::new();
        let mut hold = |what: &str, a: &dyn ToString, b: &dyn ToString| {
            let (a, b) = (a.to_string(), b.to_string());
            if a != b {
                unlike.push(format!("{what}: {a} against {b}"));
            }
        };
        hold("adapter", &self.adapter, &other.adapter);
        hold("vendor", &self.vendor, &other.vendor);
        hold("device", &self.device, &other.device);
        hold("kind", &self.kind, &other.kind);
        hold("backend", &self.backend, &other.backend);
        hold("driver", &self.driver, &other.driver);
        hold("driver version", &self.driver_info, &other.driver_info);
        hold("system", &self.system, &other.system);
        if self.kind == "Cpu" {
            hold("processor", &self.processor, &other.processor);
        }
        let only = |a: &Device, b: &Device| {
            let only = a.features.iter().filter(|f| !b.features.contains(f));
            only.map(String::as_str).collect::<Vec<_>>().join(" ")
        };
        hold("features not on both", &only(self, other), &only(other, self));
        for name in
            self.limits.keys().chain(other.limits.keys().filter(|k| !self.limits.contains_key(*k)))
        {
            let value = |d: &Device| d.limits.get(name).map_or("none".to_owned(), u64::to_string);
            hold(&format!("limit {name}"), &value(self), &value(other));
        }
        unlike
    }
}

/// The version of wgpu in the lock file that this program was built with.
pub const WGPU_VERSION: &str = env!("WGPU_VERSION");

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|l| l.starts_with("model name"));
    line.and_then(|l| l.split(": ").nth(1)).unwrap_or(std::env::consts::ARCH).to_owned()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A made-up device.
    pub(crate) fn device() -> Device {
        Device {
            adapter: "G".into(),
            vendor: 1,
            device: 2,
            kind: "DiscreteGpu".into(),
            backend: "vulkan".into(),
            driver: "d".into(),
            driver_info: "1.0".into(),
            wgpu: WGPU_VERSION.into(),
            features: vec!["SUBGROUP".into()],
            limits: [("subgroup_min".into(), 32)].into(),
            system: "linux x86_64".into(),
            processor: "p, 8 threads".into(),
        }
    }

    #[test]
    fn unlike_devices_are_told_apart() {
        assert_eq!(device().unlike(&device()), Vec::<String>::new());
        assert!(WGPU_VERSION.starts_with(|c: char| c.is_ascii_digit()));
        let driver = Device { driver_info: "1.1".into(), ..device() };
        assert_eq!(device().unlike(&driver), ["driver version: 1.0 against 1.1"]);
        let features = Device { features: vec!["SHADER_F16".into()], ..device() };
        assert_eq!(
            device().unlike(&features),
            ["features not on both: SUBGROUP against SHADER_F16"]
        );
        let limits = Device { limits: BTreeMap::new(), ..device() };
        assert_eq!(device().unlike(&limits), ["limit subgroup_min: 32 against none"]);
        // The host's processor counts only where it is the device.
        let host = |kind: &str, processor: &str| Device {
            kind: kind.into(),
            processor: processor.into(),
            ..device()
        };
        assert!(host("DiscreteGpu", "a").unlike(&host("DiscreteGpu", "b")).is_empty());
        assert_eq!(host("Cpu", "a").unlike(&host("Cpu", "b")).len(), 1);
    }
}

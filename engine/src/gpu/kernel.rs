//! A kernel is a name and WGSL text; a variant of it adds the values of its constants and imports.
//! Pipelines are compiled once per variant and kept. Bindings follow one rule, so nobody lists them:
//! binding 0 is the uniform `Params`, then the inputs (`read`), then the outputs (`read_write`).

use std::borrow::Cow;
use std::cell::{Cell, OnceCell};
use std::hash::Hasher;
use std::thread::JoinHandle;

use super::batch::Reported;
use super::hash::FastHasher;
use super::{Buffer, Gpu, GpuInner, GpuOptions, source};

/// WGSL with one entry point `main`, named after its file.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// File stem and pipeline label.
    pub name: &'static str,
    /// WGSL before expansion.
    pub source: &'static str,
}

/// Declares a kernel from `shaders/<name>.wgsl`; where there is none, the crate does not compile.
macro_rules! kernel {
    ($name:literal) => {
        $crate::gpu::Kernel::new($name, const { demask_shaders::kernel($name) })
    };
}
pub(crate) use kernel;

/// A kernel with chosen constants: `override NAME` through the pipeline, `const NAME … // host` in the text.
#[derive(Clone, Copy, Debug)]
pub struct Variant<'a> {
    pub(super) kernel: Kernel,
    pub(super) constants: &'a [(&'static str, u32)],
    pub(super) imports: &'a [(&'static str, &'static str)],
}

impl Kernel {
    /// A kernel from its name and WGSL text; ops outside this crate start here.
    pub const fn new(name: &'static str, source: &'static str) -> Self {
        Kernel { name, source }
    }

    /// This kernel with the given constants.
    pub fn with<'a>(self, constants: &'a [(&'static str, u32)]) -> Variant<'a> {
        Variant { kernel: self, constants, imports: &[] }
    }

    /// The expanded WGSL with default constants, as `tests/shaders.rs` validates it.
    pub fn expand(self, imports: &[(&'static str, &'static str)]) -> String {
        source::expand(self.name, self.source, imports, &[])
    }
}

impl<'a> Variant<'a> {
    /// Renames imports, as in `("weight", "weight_bf16")`.
    pub fn import(self, imports: &'a [(&'static str, &'static str)]) -> Variant<'a> {
        Variant { imports, ..self }
    }

    /// The hash of its [`PipelineKey`] under `layout`. Names are left out: the values that a kernel is given tell its
    /// variants apart well enough.
    pub(super) fn hash(self, layout: LayoutKey) -> u64 {
        let mut hasher = FastHasher::default();
        hasher.write_usize(self.kernel.source.as_ptr() as usize);
        hasher.write_usize(layout.reads * 64 + layout.writes);
        self.constants.iter().for_each(|(_, value)| hasher.write_u32(*value));
        self.imports.iter().for_each(|(_, file)| hasher.write(file.as_bytes()));
        hasher.finish()
    }

    /// Records one dispatch; see [`Gpu::dispatch`].
    pub fn dispatch(
        self,
        gpu: &Gpu,
        params: &[u8],
        reads: &[&Buffer],
        writes: &[&Buffer],
        grid: [u32; 3],
    ) {
        gpu.dispatch(self, params, reads, writes, grid);
    }
}

/// Storage buffers that one dispatch may bind: what every WebGPU device has.
pub(super) const MOST_BUFFERS: usize = 8;

/// What tells one compiled pipeline from another. The text of a kernel is told by its place in memory.
pub(super) struct PipelineKey {
    name: &'static str,
    source: usize,
    constants: Vec<(&'static str, u32)>,
    imports: Vec<(&'static str, &'static str)>,
    layout: LayoutKey,
}

/// A bind-group layout is told by its counts alone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct LayoutKey {
    pub reads: usize,
    pub writes: usize,
}

pub(super) struct Layout {
    pub group: wgpu::BindGroupLayout,
    pub pipeline: wgpu::PipelineLayout,
}

impl PipelineKey {
    pub fn new(variant: Variant<'_>, layout: LayoutKey) -> Self {
        PipelineKey {
            name: variant.kernel.name,
            source: variant.kernel.source.as_ptr() as usize,
            constants: variant.constants.to_vec(),
            imports: variant.imports.to_vec(),
            layout,
        }
    }

    /// True if this is the key of `variant` under `layout`; allocates nothing.
    pub fn is(&self, variant: Variant<'_>, layout: LayoutKey) -> bool {
        self.source == variant.kernel.source.as_ptr() as usize
            && self.layout == layout
            && self.constants == variant.constants
            && self.imports == variant.imports
    }

    /// The kernel's name, then what was chosen.
    pub fn describe(&self) -> String {
        let mut text = self.name.to_owned();
        for (constant, value) in &self.constants {
            text += &format!(" {constant}={value}");
        }
        for (import, file) in &self.imports {
            text += &format!(" {import}={file}");
        }
        text
    }
}

impl Layout {
    pub fn new(device: &wgpu::Device, key: LayoutKey, params_bytes: u64) -> Self {
        let entry = |binding: usize, ty, dynamic, size| wgpu::BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty,
                has_dynamic_offset: dynamic,
                min_binding_size: size,
            },
            count: None,
        };
        let mut entries = vec![entry(
            0,
            wgpu::BufferBindingType::Uniform,
            true,
            wgpu::BufferSize::new(params_bytes),
        )];
        for i in 0..key.reads + key.writes {
            let read_only = i < key.reads;
            entries.push(entry(i + 1, wgpu::BufferBindingType::Storage { read_only }, false, None));
        }
        let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &entries,
        });
        let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&group)],
            immediate_size: 0,
        });
        Layout { group, pipeline }
    }
}

/// A kernel as a [`Translator`] gets it.
#[derive(Clone, Copy, Debug)]
pub struct Translation<'a> {
    /// File stem.
    pub name: &'static str,
    /// WGSL with imports expanded and host constants set.
    pub wgsl: &'a str,
    /// Values of `override` constants.
    pub constants: &'a [(&'a str, f64)],
    /// Whether bounds checks, loop bounds and zeroed workgroup memory are asked for.
    pub checked: bool,
}

/// Of a translated kernel; what its SPIR-V says of sizes is what counts.
const ENTRY: wgpu::PassthroughShaderEntryPoint<'_> =
    wgpu::PassthroughShaderEntryPoint { name: Cow::Borrowed("main"), workgroup_size: (0, 0, 0) };

/// A way of one's own from WGSL to SPIR-V with the entry point `main`, bindings in descriptor set 0 as in the WGSL. For
/// checks of other compilers; an error becomes the device's fault.
pub type Translator = fn(&Translation<'_>) -> Result<Vec<u32>, String>;

/// A variant on its way to the device. Drivers take from milliseconds to seconds for one, so each is compiled by a
/// thread of its own from the moment it is first recorded, beside the others of the pass that needs it.
pub(super) struct Compiling {
    thread: Cell<Option<JoinHandle<Compiled>>>,
    compiled: OnceCell<Compiled>,
}

/// The pipeline, and a hash of its expanded WGSL.
type Compiled = (wgpu::ComputePipeline, u64);

impl Compiling {
    /// Begins to compile `variant`.
    pub fn begin(inner: &GpuInner, variant: Variant<'_>, layout: &Layout) -> Compiling {
        let (device, options) = (inner.device.clone(), inner.options.clone());
        let (kernel, layout) = (variant.kernel, layout.pipeline.clone());
        let (constants, imports) = (variant.constants.to_vec(), variant.imports.to_vec());
        let reported = inner.reported.clone();
        let work = move || {
            let variant = Variant { kernel, constants: &constants, imports: &imports };
            compile(&device, variant, &layout, &options).unwrap_or_else(|why| {
                // Work goes on under the fault, which the next read returns.
                let why = Reported::Invalid(format!("{}: {why}", kernel.name));
                reported.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(why);
                let plain = GpuOptions { translator: None, ..options };
                compile(&device, variant, &layout, &plain)
                    .expect("without a translator nothing refuses")
            })
        };
        // OpenGL has one context, for which threads would only wait; a browser has no threads.
        let alone = cfg!(target_family = "wasm") || inner.entry.info.backend == wgpu::Backend::Gl;
        let (thread, compiled) = (Cell::default(), OnceCell::new());
        if alone {
            let _ = compiled.set(work());
        } else {
            thread.set(Some(std::thread::spawn(work)));
        }
        Compiling { thread, compiled }
    }

    /// The pipeline; waits until it is compiled.
    pub fn ready(&self) -> &wgpu::ComputePipeline {
        &self.wait().0
    }

    /// The hash of its expanded WGSL; waits until it is compiled.
    pub fn hash(&self) -> u64 {
        self.wait().1
    }

    fn wait(&self) -> &Compiled {
        self.compiled.get_or_init(|| {
            let thread = self.thread.take().expect("a thread compiles what is not compiled");
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

/// Compiles one variant; also returns a hash of its expanded WGSL. In unchecked mode the driver's robustness is all
/// that stands between a wrong index and foreign memory, which is why every kernel also runs its hostile shapes in
/// checked mode in the tests.
///
/// # Errors
/// What the options' translator says of the kernel.
fn compile(
    device: &wgpu::Device,
    variant: Variant<'_>,
    layout: &wgpu::PipelineLayout,
    options: &GpuOptions,
) -> Result<Compiled, String> {
    let Kernel { name, source } = variant.kernel;
    let is_override = |constant: &str| {
        source::expand(name, source, variant.imports, &[])
            .contains(&format!("override {constant}:"))
    };
    let (overrides, consts): (Vec<_>, Vec<_>) =
        variant.constants.iter().copied().partition(|(constant, _)| is_override(constant));
    let text = source::expand(name, source, variant.imports, &consts);
    let hash = source::hash(&text);
    let constants: Vec<(&str, f64)> = overrides.iter().map(|&(n, v)| (n, f64::from(v))).collect();
    let checked = options.checked;
    let module = match options.translator {
        Some(translate) => {
            let constants = &constants;
            let words = translate(&Translation { name, wgsl: &text, constants, checked })?;
            // SAFETY: a translator is responsible for its SPIR-V, as a kernel is for its WGSL.
            unsafe {
                device.create_shader_module_passthrough(wgpu::ShaderModuleDescriptorPassthrough {
                    label: Some(name),
                    entry_points: [ENTRY].as_slice().into(),
                    spirv: Some(words.into()),
                    ..Default::default()
                })
            }
        }
        None => {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(name),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            };
            if checked {
                device.create_shader_module(descriptor)
            } else {
                let checks = wgpu::ShaderRuntimeChecks::unchecked();
                // SAFETY: the kernels are ours, terminate, and are run in checked mode over hostile shapes by the
                // tests; an op from outside the crate takes the same responsibility, stated at `Gpu::dispatch`.
                unsafe { device.create_shader_module_trusted(descriptor, checks) }
            }
        }
    };
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(name),
        layout: Some(layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            constants: &constants,
            // Kernels write workgroup memory before they read it; zeroing costs a serial loop on Metal and DX12.
            zero_initialize_workgroup_memory: checked,
        },
        cache: None,
    });
    Ok((pipeline, hash))
}

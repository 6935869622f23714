//! The family of kernels behind a matrix product: what each can do, which one a device uses without being asked
//! to race them, and how each is dispatched. Every one is held to the same cases.

use bytemuck::{Pod, Zeroable};

use super::{Extents, Layout, Target};
use crate::gpu::{ClassKey, Gpu, Kernel, Variant, fold, kernel};
use crate::tensor::{DType, QUANT_BLOCK, Tensor};

const TILE: Kernel = kernel!("matmul");
const WIDE: Kernel = kernel!("matmul_wide");
const SLICES: Kernel = kernel!("matmul_slices");
const FEW: Kernel = kernel!("matmul_few");
const SUBGROUP8: Kernel = kernel!("matmul_subgroup8");
const ONE_SUBGROUP8: Kernel = kernel!("matmul_one_subgroup8");
const FEW_SUBGROUP8: Kernel = kernel!("matmul_few_subgroup8");
const COOP: Kernel = kernel!("matmul_coop");
const ANY: Kernel = kernel!("matmul_any");

/// A way to compute the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MatmulKernel {
    /// 64 × 64 tiles through workgroup memory, 4 × 4 outputs an invocation.
    Tile,
    /// 128 × 128 tiles, 8 × 8 outputs an invocation.
    Wide,
    /// [`MatmulKernel::Tile`] over slices of K and a sum, for products of few tiles and long sums.
    Sliced,
    /// A few rows (decoding): lanes share K, one pass over the weights; NT only.
    Few,
    /// Broadcasts inside subgroups of eight, for software adapters.
    Subgroup8,
    /// The same for a few rows; NT only.
    FewSubgroup8,
    /// The same for one row; NT only.
    OneSubgroup8,
    /// Matrix units of 8 × 8, f32 throughout.
    CoopF32,
    /// Matrix units of 8 × 8 that round both factors to f16.
    CoopF16,
    /// Matrix units of 16 × 16 that round both factors to f16.
    CoopF16Wide,
    /// Any extents.
    Any,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    m: u32,
    n: u32,
    k: u32,
    a_z: u32,
    w_z: u32,
    w_row: u32,
    y_from: u32,
    k_slice: u32,
}

/// Of the kernels for a few rows.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct FewParams {
    m: u32,
    n: u32,
    k: u32,
    w_row: u32,
    y_from: u32,
    eps: f32,
}

/// What the kernels for a few rows can do around a product; the product is then NT, of one matrix, and overwrites.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Around<'a> {
    /// Multiply rms_norm(a) under this weight, [K], and epsilon.
    pub norm: Option<(&'a Tensor, f32)>,
    /// B is [2 N, K], the gate's rows and then those of up: y = silu(gate) ⊙ up.
    pub gated: bool,
    /// Add [M, N]. The only one of these that every kernel can do.
    pub residual: Option<&'a Tensor>,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SlicesParams {
    quads: u32,
    slices: u32,
    y_from: u32,
}

/// Rows from which a product is no longer one of a few rows.
const FEW_ROWS: usize = 16;
/// K that one slice takes.
const SLICE: usize = 256;
/// Tiles of 64 × 64 below which a GPU is not filled, so that cutting K pays.
const FEW_TILES: usize = 64;
/// Tiles of 128 × 128 from which a GPU is filled by them.
const MANY_TILES: usize = 128;

impl MatmulKernel {
    /// Every kernel, in the order they are raced.
    pub const ALL: [MatmulKernel; 11] = [
        MatmulKernel::Tile,
        MatmulKernel::Wide,
        MatmulKernel::Sliced,
        MatmulKernel::Few,
        MatmulKernel::Subgroup8,
        MatmulKernel::FewSubgroup8,
        MatmulKernel::OneSubgroup8,
        MatmulKernel::CoopF32,
        MatmulKernel::CoopF16,
        MatmulKernel::CoopF16Wide,
        MatmulKernel::Any,
    ];

    /// Its name in reports and in the cache of choices: the kernel's file, and what that imports.
    pub fn name(self) -> &'static str {
        match self {
            MatmulKernel::Tile => TILE.name,
            MatmulKernel::Wide => WIDE.name,
            MatmulKernel::Sliced => SLICES.name,
            MatmulKernel::Few => FEW.name,
            MatmulKernel::Subgroup8 => SUBGROUP8.name,
            MatmulKernel::FewSubgroup8 => FEW_SUBGROUP8.name,
            MatmulKernel::OneSubgroup8 => ONE_SUBGROUP8.name,
            MatmulKernel::CoopF32 => "matmul_coop f32 8",
            MatmulKernel::CoopF16 => "matmul_coop f16 8",
            MatmulKernel::CoopF16Wide => "matmul_coop f16 16",
            MatmulKernel::Any => ANY.name,
        }
    }

    /// The kernel of this name.
    pub fn named(name: &str) -> Option<MatmulKernel> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name)
    }

    /// The WGSL, which a choice is valid for.
    pub(crate) fn source(self) -> &'static str {
        match self {
            MatmulKernel::Tile => TILE.source,
            MatmulKernel::Wide => WIDE.source,
            MatmulKernel::Sliced => SLICES.source,
            MatmulKernel::Few => FEW.source,
            MatmulKernel::Subgroup8 => SUBGROUP8.source,
            MatmulKernel::FewSubgroup8 => FEW_SUBGROUP8.source,
            MatmulKernel::OneSubgroup8 => ONE_SUBGROUP8.source,
            MatmulKernel::CoopF32 | MatmulKernel::CoopF16 | MatmulKernel::CoopF16Wide => {
                COOP.source
            }
            MatmulKernel::Any => ANY.source,
        }
    }

    /// The matrix units it runs on: import, edge, type of the factors.
    fn cooperative(self) -> Option<(&'static str, u32, wgpu::CooperativeScalarType)> {
        use wgpu::CooperativeScalarType::{F16, F32};
        match self {
            MatmulKernel::CoopF32 => Some(("coop_f32_8", 8, F32)),
            MatmulKernel::CoopF16 => Some(("coop_f16_8", 8, F16)),
            MatmulKernel::CoopF16Wide => Some(("coop_f16_16", 16, F16)),
            _ => None,
        }
    }

    /// The largest error of a sum, relative to the sum of its terms' magnitudes.
    pub(crate) fn rounding(self) -> f64 {
        match self {
            // Each factor to 11 bits.
            MatmulKernel::CoopF16 | MatmulKernel::CoopF16Wide => 1.2e-3,
            _ => 1e-5,
        }
    }

    /// True if the device has what the kernel is made of, whatever the extents and whatever may be rounded.
    pub(crate) fn runs_on(self, gpu: &Gpu) -> bool {
        use wgpu::Features;
        if let Some((_, edge, part)) = self.cooperative() {
            let f16 = part == wgpu::CooperativeScalarType::F16;
            let entry = gpu.adapter();
            let one_size = entry.info.subgroup_min_size == entry.info.subgroup_max_size;
            return gpu.has(Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
                && (!f16 || gpu.has(Features::SHADER_F16))
                && one_size
                && entry.cooperative.iter().any(|p| {
                    (p.m_size, p.n_size, p.k_size) == (edge, edge, edge)
                        && p.ab_type == part
                        && p.cr_type == wgpu::CooperativeScalarType::F32
                });
        }
        match self {
            MatmulKernel::Subgroup8 | MatmulKernel::FewSubgroup8 | MatmulKernel::OneSubgroup8 => {
                gpu.has_subgroups_of(8)
            }
            _ => true,
        }
    }

    /// True if it can do all of [`Around`].
    pub(crate) fn does_around(self) -> bool {
        matches!(self, MatmulKernel::Few | MatmulKernel::FewSubgroup8 | MatmulKernel::OneSubgroup8)
    }

    /// True if this device and these extents allow it.
    pub(crate) fn able(self, gpu: &Gpu, layout: Layout, e: &Extents) -> bool {
        let contiguous = if layout == Layout::TN { e.m } else { e.k };
        let quads = [e.n, e.k, contiguous].iter().all(|extent| extent.is_multiple_of(4));
        let few = layout == Layout::NT && e.z == 1 && e.k.is_multiple_of(8);
        let shaped = match self {
            MatmulKernel::Any => true,
            MatmulKernel::Sliced => quads && e.z == 1 && e.k > SLICE,
            MatmulKernel::Few | MatmulKernel::FewSubgroup8 => few && e.m <= FEW_ROWS,
            // One pass over the weights for each row.
            MatmulKernel::OneSubgroup8 => few && e.m == 1,
            MatmulKernel::CoopF16 | MatmulKernel::CoopF16Wide => quads && gpu.f16_products(),
            _ => quads,
        };
        shaped && self.runs_on(gpu)
    }

    /// What is used without a race.
    pub(crate) fn default_for(gpu: &Gpu, layout: Layout, e: &Extents) -> MatmulKernel {
        let tiles = |edge: usize| e.m.div_ceil(edge) * e.n.div_ceil(edge) * e.z;
        let preferred: &[MatmulKernel] = if gpu.has_subgroups_of(8) {
            &[MatmulKernel::OneSubgroup8, MatmulKernel::FewSubgroup8, MatmulKernel::Subgroup8]
        } else if e.m <= FEW_ROWS {
            &[MatmulKernel::Few, MatmulKernel::Tile]
        } else if tiles(128) >= MANY_TILES {
            &[MatmulKernel::Wide, MatmulKernel::Tile]
        } else if tiles(64) < FEW_TILES && e.k >= 4 * SLICE {
            &[MatmulKernel::Sliced, MatmulKernel::Tile]
        } else {
            &[MatmulKernel::Tile]
        };
        let able = preferred.iter().copied().find(|kernel| kernel.able(gpu, layout, e));
        able.unwrap_or(MatmulKernel::Any)
    }

    /// The winner of the race for this class of products if there was one, else the default.
    pub(crate) fn choose(gpu: &Gpu, layout: Layout, weight: DType, e: &Extents) -> MatmulKernel {
        let told = gpu.rows().map(|m| Extents { m, output: e.output.clone(), ..*e });
        let e = told.as_ref().unwrap_or(e);
        let raced = gpu.choice(class(layout, weight, e)).and_then(|i| Self::ALL.get(i)).copied();
        raced
            .filter(|kernel| kernel.able(gpu, layout, e))
            .unwrap_or_else(|| Self::default_for(gpu, layout, e))
    }

    /// Records the product; K is at least 1.
    ///
    /// # Panics
    /// If it cannot do what `around` asks for.
    pub(crate) fn run(
        self,
        a: &Tensor,
        w: &Tensor,
        layout: Layout,
        e: &Extents,
        target: &Target<'_>,
        around: &Around<'_>,
    ) {
        if self.does_around() {
            return self.run_few(a, w, e, target, around);
        }
        let Around { norm: None, gated: false, residual } = *around else {
            panic!("{} can add a residual, not {around:?}", self.name())
        };
        let Extents { z, m, n, k, .. } = *e;
        let y = target.y;
        let y_from = (target.row * n) as u32;
        let slice = SLICE.max(k.div_ceil(32).next_multiple_of(32));
        let params = Params {
            m: m as u32,
            n: n as u32,
            k: k as u32,
            a_z: (m * k) as u32,
            w_z: if layout == Layout::NT { n } else { k } as u32,
            w_row: target.b_row as u32,
            y_from,
            k_slice: slice as u32,
        };
        let onto = match residual {
            Some(_) => 2,
            None => u32::from(target.add),
        };
        let onto = ("ONTO", onto);
        let a_transposed = ("A_TRANSPOSED", u32::from(layout == Layout::TN));
        let w_transposed = ("W_TRANSPOSED", u32::from(layout == Layout::NT));
        let imports = [("weight", w.dtype().weight_import())];
        // Without a residual the binding is never read; any tensor may stand in.
        let r = residual.unwrap_or(a);
        let run = |variant: Variant<'_>, [tile_n, tile_m]: [usize; 2]| {
            let grid = [n.div_ceil(tile_n) as u32, m.div_ceil(tile_m) as u32, z as u32];
            variant.import(&imports).run(&params, &[a, w, r], &[y], grid);
        };
        match self {
            MatmulKernel::Tile => run(TILE.with(&[a_transposed, w_transposed, onto]), [64, 64]),
            MatmulKernel::Wide => run(WIDE.with(&[a_transposed, w_transposed, onto]), [128, 128]),
            MatmulKernel::Sliced => {
                let slices = k.div_ceil(slice);
                let parts = Tensor::empty(a.gpu(), [slices, m, n], DType::F32, "matmul slices");
                let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, slices as u32];
                let sliced = [a_transposed, w_transposed, ("SLICED", 1)];
                let whole = Params { y_from: 0, ..params };
                TILE.with(&sliced).import(&imports).run(&whole, &[a, w, a], &[&parts], grid);
                let quads = m * n / 4;
                let params = SlicesParams { quads: quads as u32, slices: slices as u32, y_from };
                let r = residual.unwrap_or(&parts);
                SLICES.with(&[onto]).run(&params, &[&parts, r], &[y], fold(quads.div_ceil(256)));
            }
            MatmulKernel::Subgroup8 => {
                run(SUBGROUP8.with(&[a_transposed, w_transposed, onto]), [64, 32]);
            }
            MatmulKernel::Few | MatmulKernel::FewSubgroup8 | MatmulKernel::OneSubgroup8 => {
                unreachable!("run_few has them")
            }
            MatmulKernel::CoopF32 | MatmulKernel::CoopF16 | MatmulKernel::CoopF16Wide => {
                let (coop, edge, _) = self.cooperative().expect("one of the three");
                let lanes = a.gpu().adapter().info.subgroup_max_size;
                let constants = [a_transposed, w_transposed, onto, ("LANES", lanes)];
                let imports = [imports[0], ("coop", coop)];
                let tile = 4 * edge as usize;
                let grid = [n.div_ceil(tile) as u32, m.div_ceil(tile) as u32, z as u32];
                COOP.with(&constants).import(&imports).run(&params, &[a, w, r], &[y], grid);
            }
            MatmulKernel::Any => run(ANY.with(&[a_transposed, w_transposed, onto]), [16, 16]),
        }
    }

    /// As [`MatmulKernel::run`], for the kernels of a few rows.
    fn run_few(
        self,
        a: &Tensor,
        w: &Tensor,
        e: &Extents,
        target: &Target<'_>,
        around: &Around<'_>,
    ) {
        let Extents { m, n, k, .. } = *e;
        let Around { norm, gated, residual } = *around;
        let params = FewParams {
            m: m as u32,
            n: n as u32,
            k: k as u32,
            w_row: target.b_row as u32,
            y_from: (target.row * n) as u32,
            eps: norm.map_or(0.0, |(_, eps)| eps),
        };
        let onto = if residual.is_some() { 2 } else { u32::from(target.add) };
        let around =
            [("ONTO", onto), ("NORMED", u32::from(norm.is_some())), ("GATED", u32::from(gated))];
        let rows = m.clamp(1, FEW_ROWS).next_power_of_two();
        // Kernel, its own constant if it has one, columns and rows of a workgroup.
        let (kernel, own, columns, tile_m) = match self {
            MatmulKernel::Few => (FEW, Some(("ROWS", rows as u32)), 4, FEW_ROWS),
            MatmulKernel::FewSubgroup8 => {
                let quads = rows.div_ceil(4);
                (FEW_SUBGROUP8, Some(("QUADS", quads as u32)), 16, 4 * quads)
            }
            _ => (ONE_SUBGROUP8, None, 32, 1),
        };
        let constants = [around[0], around[1], around[2], own.unwrap_or(around[0])];
        let constants = &constants[..3 + usize::from(own.is_some())];
        // What is not asked for is never read; any tensor may stand in.
        let (r, g) = (residual.unwrap_or(a), norm.map_or(a, |(weight, _)| weight));
        let columns = if gated { columns / 2 } else { columns };
        let grid = [n.div_ceil(columns) as u32, m.div_ceil(tile_m) as u32, 1];
        let imports = [("weight", w.dtype().weight_import())];
        kernel.with(constants).import(&imports).run(&params, &[a, w, r, g], &[target.y], grid);
    }
}

/// Products of one class share a choice: the layout, the weight's type, and the extents rounded up to powers of two.
fn class(layout: Layout, weight: DType, e: &Extents) -> ClassKey {
    let up = |extent: usize| extent.next_power_of_two() as u32;
    let kind = layout as u32 * 8 + weight as u32;
    ClassKey { op: "matmul", numbers: [kind, e.z.min(2) as u32, up(e.m), up(e.n), up(e.k)] }
}

/// A product to choose a kernel for: [M, K] · [K, N], one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Which operand is stored transposed.
    pub layout: Layout,
    /// Type of the second operand.
    pub weight: DType,
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

impl Product {
    fn extents(&self) -> Extents {
        let Product { m, n, k, .. } = *self;
        Extents { z: 1, m, n, k, output: [m, n].into() }
    }

    fn class(&self) -> ClassKey {
        class(self.layout, self.weight, &self.extents())
    }

    /// The class in words, as in `NT F16 4x2048x1024`: layout, weight type, M×N×K up to which it reaches.
    pub fn class_name(&self) -> String {
        let [_, _, m, n, k] = self.class().numbers;
        format!("{:?} {:?} {m}x{n}x{k}", self.layout, self.weight)
    }

    /// Floating-point operations.
    pub fn flops(&self) -> f64 {
        2.0 * (self.m * self.n * self.k) as f64
    }

    /// The operands' shapes as stored.
    pub(crate) fn shapes(&self) -> ([usize; 2], [usize; 2]) {
        let Product { m, n, k, .. } = *self;
        match self.layout {
            Layout::NN => ([m, k], [k, n]),
            Layout::NT => ([m, k], [n, k]),
            Layout::TN => ([k, m], [k, n]),
        }
    }

    /// Whole blocks along the weight's rows, and quads where the fast kernels need them.
    pub(crate) fn even(self) -> Product {
        let row = if matches!(self.weight, DType::Q8 | DType::Q4) { QUANT_BLOCK } else { 4 };
        let up = |extent: usize, to: usize| extent.next_multiple_of(to);
        let (n, k) = match self.layout {
            Layout::NT => (up(self.n, 4), up(self.k, row)),
            Layout::NN | Layout::TN => (up(self.n, row), up(self.k, 4)),
        };
        let m = if self.layout == Layout::TN { up(self.m, 4) } else { self.m };
        Product { m, n, k, ..self }
    }

    /// The kernels that can do it here.
    pub(crate) fn kernels(&self, gpu: &Gpu) -> Vec<MatmulKernel> {
        let e = self.extents();
        MatmulKernel::ALL.into_iter().filter(|kernel| kernel.able(gpu, self.layout, &e)).collect()
    }

    /// What is used without a race.
    pub fn default_kernel(&self, gpu: &Gpu) -> MatmulKernel {
        MatmulKernel::default_for(gpu, self.layout, &self.extents())
    }

    /// Chooses a kernel for this product's class on this device.
    pub fn decide(&self, gpu: &Gpu, kernel: MatmulKernel) {
        let index = MatmulKernel::ALL.iter().position(|k| *k == kernel);
        gpu.set_choice(self.class(), index);
    }

    /// Leaves the class to the default again.
    pub fn undecide(&self, gpu: &Gpu) {
        gpu.set_choice(self.class(), None);
    }

    /// Records y = a · w with one kernel.
    pub(crate) fn run(&self, kernel: MatmulKernel, a: &Tensor, w: &Tensor, y: &Tensor) {
        let target = Target { y, row: 0, b_row: 0, add: false };
        kernel.run(a, w, self.layout, &self.extents(), &target, &Around::default());
    }
}

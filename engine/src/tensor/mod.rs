//! A tensor: shape, element type, a device buffer, and the node that made it. Always contiguous.
//! Cloning shares the buffer. There are no views but [`Tensor::reshape`] and, for weights, [`Tensor::part`], and no
//! in-place operations here: only the optimiser and the KV cache write in place, through their own kernels.

#[cfg(feature = "cases")]
pub mod host;
mod shape;
pub mod stored;

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;

use bytemuck::Pod;

pub use shape::Shape;

use crate::autograd::{Node, Origin};
use crate::gpu::{Buffer, Gpu, Kernel, Variant};
use crate::{Error, Result};

/// Element types. Arithmetic is f32; u32 is for tokens and positions, the others for weights at rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16, two to a word.
    Bf16,
    /// IEEE half precision, two to a word.
    F16,
    /// Unsigned integers.
    U32,
    /// Blocks of 32 along the last axis, x = d·q with i8 q and f16 d: 8.5 bits an element. Layout:
    /// `shaders/shared/weight_q8.wgsl`.
    Q8,
    /// Blocks of 32 along the last axis, x = d·q + m with 4-bit q and f16 d, m: 5 bits an element. Layout:
    /// `shaders/shared/weight_q4.wgsl`.
    Q4,
}

/// Elements of a quantised row that share a scale.
pub const QUANT_BLOCK: usize = 32;

impl DType {
    /// Bytes of one row (the last axis) of `columns` elements.
    ///
    /// # Panics
    /// If a quantised row is no whole number of blocks.
    #[track_caller]
    pub fn row_bytes(self, columns: usize) -> usize {
        let blocks = columns / QUANT_BLOCK;
        let quantised = matches!(self, DType::Q8 | DType::Q4);
        let whole = columns.is_multiple_of(QUANT_BLOCK);
        assert!(!quantised || whole, "a {self:?} row of {columns} is no multiple of {QUANT_BLOCK}");
        match self {
            DType::F32 | DType::U32 => 4 * columns,
            DType::Bf16 | DType::F16 => 2 * columns,
            // Scales are two to a word; the last word of an odd number is half used.
            DType::Q8 => columns + 4 * blocks.div_ceil(2),
            DType::Q4 => columns / 2 + 4 * blocks,
        }
    }

    /// Bytes of a tensor of this shape.
    ///
    /// # Panics
    /// As [`DType::row_bytes`].
    #[track_caller]
    pub fn bytes(self, shape: &Shape) -> usize {
        let [rows, columns] = shape.matrix();
        rows * self.row_bytes(columns)
    }

    /// The shared WGSL file that reads weights of this type.
    pub fn weight_import(self) -> &'static str {
        match self {
            DType::F32 => "weight_f32",
            DType::Bf16 => "weight_bf16",
            DType::F16 => "weight_f16",
            DType::Q8 => "weight_q8",
            DType::Q4 => "weight_q4",
            DType::U32 => panic!("u32 tensors are not weights"),
        }
    }

    /// The shared WGSL file that reads and writes cached keys and values of this type.
    ///
    /// # Panics
    /// If they are neither f32 nor f16.
    #[track_caller]
    pub(crate) fn keys_import(self) -> &'static str {
        match self {
            DType::F32 => "keys_f32",
            DType::F16 => "keys_f16",
            other => panic!("keys and values of {other:?}"),
        }
    }
}

/// See the module's page.
#[derive(Clone)]
pub struct Tensor(Rc<Inner>);

struct Inner {
    gpu: Gpu,
    shape: Shape,
    dtype: DType,
    buffer: Buffer,
    origin: Origin,
}

thread_local! {
    /// Names leaves; never reused, so gradients cannot be mixed up.
    static NEXT_LEAF: Cell<u64> = const { Cell::new(0) };
}

impl Tensor {
    /// Memory of this shape with undefined contents, for `op` to write all of.
    pub fn empty(gpu: &Gpu, shape: impl Into<Shape>, dtype: DType, op: &str) -> Tensor {
        let shape = shape.into();
        let buffer = gpu.alloc(dtype.bytes(&shape) as u64, op, &shape);
        Tensor(Rc::new(Inner { gpu: gpu.clone(), shape, dtype, buffer, origin: Origin::Constant }))
    }

    /// Like `self` in shape and type, contents undefined.
    pub fn empty_like(&self, op: &str) -> Tensor {
        Self::empty(self.gpu(), self.shape(), self.dtype(), op)
    }

    /// All zeros.
    pub fn zeros(gpu: &Gpu, shape: impl Into<Shape>, dtype: DType, op: &str) -> Tensor {
        let tensor = Self::empty(gpu, shape, dtype, op);
        gpu.zero(&tensor.0.buffer);
        tensor
    }

    /// Uploads f32 values.
    ///
    /// # Panics
    /// If `values` does not fill the shape exactly.
    #[track_caller]
    pub fn from_f32(gpu: &Gpu, values: &[f32], shape: impl Into<Shape>) -> Tensor {
        Self::from_bytes(gpu, bytemuck::cast_slice(values), shape, DType::F32, "upload")
    }

    /// Uploads u32 values.
    ///
    /// # Panics
    /// If `values` does not fill the shape exactly.
    #[track_caller]
    pub fn from_u32(gpu: &Gpu, values: &[u32], shape: impl Into<Shape>) -> Tensor {
        Self::from_bytes(gpu, bytemuck::cast_slice(values), shape, DType::U32, "upload")
    }

    /// Uploads little-endian elements; `name` is for error messages (a weight's name, say).
    ///
    /// # Panics
    /// If `bytes` does not fill the shape exactly.
    #[track_caller]
    pub fn from_bytes(
        gpu: &Gpu,
        bytes: &[u8],
        shape: impl Into<Shape>,
        dtype: DType,
        name: &str,
    ) -> Tensor {
        let tensor = Self::empty(gpu, shape, dtype, name);
        let expected = dtype.bytes(tensor.shape());
        assert_eq!(bytes.len(), expected, "{name}: bytes for {dtype:?} {}", tensor.shape());
        gpu.write(&tensor.0.buffer, 0, bytes);
        tensor
    }

    /// Overwrites a u32 or f32 tensor's contents from the host, in place.
    ///
    /// # Panics
    /// If `values` does not fill the tensor exactly.
    #[track_caller]
    pub fn overwrite<T: Pod>(&self, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert_eq!(bytes.len() as u64, self.0.buffer.bytes(), "overwrite of {self:?}");
        self.gpu().write(&self.0.buffer, 0, bytes);
    }

    /// Reads f32 contents back; waits for the device and returns its fault, if any.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.read(DType::F32)
    }

    /// Reads u32 contents back; waits for the device and returns its fault, if any.
    pub fn to_vec_u32(&self) -> Result<Vec<u32>> {
        self.read(DType::U32)
    }

    /// The little-endian elements, whatever the type.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        self.gpu().read(&self.0.buffer)
    }

    /// The single value of a one-element tensor.
    pub fn item(&self) -> Result<f32> {
        match self.to_vec()?.as_slice() {
            [value] => Ok(*value),
            _ => Err(Error::Request(format!("{self:?} is not one value"))),
        }
    }

    fn read<T: Pod>(&self, dtype: DType) -> Result<Vec<T>> {
        assert_eq!(self.dtype(), dtype, "read of {self:?}");
        Ok(bytemuck::pod_collect_to_vec(&self.to_bytes()?))
    }

    /// The device it lives on.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// Its extents.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.shape.numel()
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Its memory.
    pub fn buffer(&self) -> &Buffer {
        &self.0.buffer
    }

    /// The same elements under another shape; gradients pass through.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[track_caller]
    pub fn reshape(&self, shape: impl Into<Shape>) -> Tensor {
        let shape = shape.into();
        assert_eq!(shape.numel(), self.numel(), "reshape of {} to {shape}", self.shape());
        let back = self.shape().clone();
        self.with(shape, Origin::Constant)
            .record("reshape", &[self], move |dy| vec![Some(dy.reshape(back))])
    }

    /// Rows `first` .. `first + n` of this matrix, on the same memory: writing one writes the other. Constant.
    ///
    /// # Panics
    /// If the rows are not all there, or begin where no buffer may ([`Gpu::part_alignment`]).
    #[track_caller]
    pub fn part(&self, first: usize, n: usize) -> Tensor {
        let [rows, columns] = self.shape().matrix();
        assert!(first + n <= rows, "rows {first}..{} of {}", first + n, self.shape());
        let row = self.dtype().row_bytes(columns) as u64;
        let buffer = self.gpu().part(self.buffer(), first as u64 * row, n as u64 * row);
        let (gpu, shape, dtype) = (self.gpu().clone(), [n, columns].into(), self.dtype());
        Tensor(Rc::new(Inner { gpu, shape, dtype, buffer, origin: Origin::Constant }))
    }

    /// The same memory, cut from the graph.
    pub fn detach(&self) -> Tensor {
        self.with(self.shape().clone(), Origin::Constant)
    }

    /// The same memory as a leaf whose gradient `backward` collects.
    pub fn trainable(&self) -> Tensor {
        let id = NEXT_LEAF.replace(NEXT_LEAF.get() + 1);
        self.with(self.shape().clone(), Origin::Leaf(id))
    }

    /// True if a gradient flows into this tensor.
    pub fn is_tracked(&self) -> bool {
        !matches!(self.0.origin, Origin::Constant)
    }

    /// The leaf's number, if this is a trainable leaf.
    pub fn leaf_id(&self) -> Option<u64> {
        match self.0.origin {
            Origin::Leaf(id) => Some(id),
            _ => None,
        }
    }

    pub(crate) fn origin(&self) -> Origin {
        self.0.origin.clone()
    }

    pub(crate) fn with_node(&self, node: Rc<Node>) -> Tensor {
        self.with(self.shape().clone(), Origin::Node(node))
    }

    fn with(&self, shape: Shape, origin: Origin) -> Tensor {
        let Inner { gpu, dtype, buffer, .. } = &*self.0;
        let (gpu, buffer) = (gpu.clone(), buffer.clone());
        Tensor(Rc::new(Inner { gpu, shape, dtype: *dtype, buffer, origin }))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.dtype(), self.shape())
    }
}

impl Kernel {
    /// Records this kernel over whole tensors: `params` is the kernel's `Params`, `grid` its workgroups.
    pub fn run<P: Pod>(self, params: &P, reads: &[&Tensor], writes: &[&Tensor], grid: [u32; 3]) {
        self.with(&[]).run(params, reads, writes, grid);
    }
}

impl Variant<'_> {
    /// Records this variant over whole tensors.
    pub fn run<P: Pod>(self, params: &P, reads: &[&Tensor], writes: &[&Tensor], grid: [u32; 3]) {
        let gpu = writes[0].gpu();
        // On the stack: this is on the way of every dispatch.
        let mut buffers = [writes[0].buffer(); 8];
        let n = reads.len() + writes.len();
        assert!(n <= buffers.len(), "{n} tensors in one dispatch");
        for (buffer, tensor) in buffers.iter_mut().zip(reads.iter().chain(writes)) {
            *buffer = tensor.buffer();
        }
        let (reads, writes) = buffers[..n].split_at(reads.len());
        self.dispatch(gpu, bytemuck::bytes_of(params), reads, writes, grid);
    }
}

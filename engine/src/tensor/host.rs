//! f64 arrays on the host: the references that kernels are held against. Written from the formulas,
//! without tricks, and never on the way of a user's computation.

use super::Shape;

/// A dense row-major f64 array.
#[derive(Clone, Debug)]
pub struct Array {
    /// Extents.
    pub shape: Shape,
    /// Elements, last axis contiguous.
    pub data: Vec<f64>,
}

impl Array {
    /// An array from its elements.
    ///
    /// # Panics
    /// If they do not fill the shape.
    pub fn new(shape: impl Into<Shape>, data: Vec<f64>) -> Array {
        let shape = shape.into();
        assert_eq!(shape.numel(), data.len(), "elements of {shape}");
        Array { shape, data }
    }

    /// An array whose element `i` (flat) is `f(i)`.
    pub fn from_fn(shape: impl Into<Shape>, f: impl FnMut(usize) -> f64) -> Array {
        let shape = shape.into();
        let data = (0..shape.numel()).map(f).collect();
        Array { shape, data }
    }

    /// Applies `f` to each element.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Array {
        Array::new(&self.shape, self.data.iter().map(|&x| f(x)).collect())
    }

    /// The rows of the array as a matrix (leading axes × last).
    pub fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.data.chunks_exact(self.shape.last().max(1))
    }

    /// Applies `f` to each row and keeps the shape.
    pub fn map_rows(&self, f: impl Fn(&[f64]) -> Vec<f64>) -> Array {
        Array::new(&self.shape, self.rows().flat_map(f).collect())
    }

    /// Element at the given index of each axis; an index wraps on extents of one (broadcasting).
    pub fn at(&self, index: &[usize]) -> f64 {
        let skip = index.len() - self.shape.len();
        let flat = self
            .shape
            .iter()
            .zip(&index[skip..])
            .fold(0, |flat, (&extent, &i)| flat * extent + if extent == 1 { 0 } else { i });
        self.data[flat]
    }
}

/// Splits a flat index into one index per axis.
pub fn unravel(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (i, &extent) in index.iter_mut().zip(shape).rev() {
        *i = flat % extent;
        flat /= extent;
    }
    index
}

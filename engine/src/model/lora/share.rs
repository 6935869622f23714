//! The share of a weight that an adapter began with, as PEFT computes it whenever it loads the adapter.
//!   PiSSA    U_r S_r V_rᵀ of W = U S Vᵀ: the r largest singular values
//!   OLoRA    Q_r R_r of W = Q R: Q_r spans the first r columns of W, and R_r = Q_rᵀ W
//! Both are products of a matrix with its own projection, so signs and rotations of the vectors do not matter.

use super::Share;
use super::singular::{leading, orthonormal};

/// L R: L [O, r], R [r, D].
pub(super) struct Product {
    pub left: Vec<f64>,
    pub right: Vec<f64>,
}

/// The share of rank `rank` of a weight [O, columns].
pub(super) fn of(kind: Share, weight: &[f32], columns: usize, rank: usize) -> Product {
    let rows = weight.len() / columns;
    if kind == Share::Pissa && columns < rows {
        // W V Vᵀ, with V from the smaller side: [r, D].
        let v = leading(weight, columns, rank);
        let dot = |row: &[f32], v: &[f64]| row.iter().zip(v).map(|(w, v)| f64::from(*w) * v).sum();
        let products = weight
            .chunks(columns)
            .flat_map(|row| v.chunks(columns).map(move |v| dot(row, v)))
            .collect();
        return Product { left: products, right: v };
    }
    // Q Qᵀ W, Q: [r, O].
    let q = match kind {
        Share::Pissa => leading(&transposed(weight, columns), rows, rank),
        _ => {
            let first = |i: usize| weight[i..].iter().step_by(columns).map(|&w| f64::from(w));
            orthonormal((0..rank).flat_map(first).collect(), rows)
        }
    };
    let mut right = vec![0.0; rank * columns];
    for (q, right) in q.chunks(rows).zip(right.chunks_mut(columns)) {
        for (q, row) in q.iter().zip(weight.chunks(columns)) {
            right.iter_mut().zip(row).for_each(|(r, w)| *r += q * f64::from(*w));
        }
    }
    let left = (0..rows).flat_map(|o| q.chunks(rows).map(move |q| q[o])).collect();
    Product { left, right }
}

fn transposed(weight: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|i| weight[i..].iter().step_by(columns).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Philox;

    /// L R, [O, D].
    fn product(p: &Product, rank: usize, columns: usize) -> Vec<f64> {
        let sum = |l: &[f64], i: usize| {
            l.iter().zip(p.right[i..].iter().step_by(columns)).map(|(l, r)| l * r).sum::<f64>()
        };
        p.left.chunks(rank).flat_map(|l| (0..columns).map(move |i| sum(l, i))).collect()
    }

    /// Σ s_k u_k v_kᵀ with orthonormal u [n, O] and v [n, D].
    fn matrix(u: &[f64], v: &[f64], s: &[f64], columns: usize) -> Vec<f64> {
        let rows = u.len() / s.len();
        let at = |o: usize, i: usize| {
            (0..s.len()).map(|k| s[k] * u[k * rows + o] * v[k * columns + i]).sum::<f64>()
        };
        (0..rows).flat_map(|o| (0..columns).map(move |i| at(o, i))).collect()
    }

    fn random(seed: u64, n: usize) -> Vec<f64> {
        let mut random = Philox::new(seed, [0, 0, 0]);
        (0..n).map(|_| f64::from(random.normal())).collect()
    }

    fn furthest(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    /// The matrix is made of its singular values: some that lie close, one that comes twice, and a long tail.
    #[test]
    fn pissa_takes_the_largest_singular_values() {
        for (rows, columns, rank) in
            [(40, 24, 5), (24, 40, 5), (24, 24, 1), (300, 200, 8), (6, 9, 6)]
        {
            let n = rows.min(columns);
            let u = orthonormal(random(1, n * rows), rows);
            let v = orthonormal(random(2, n * columns), columns);
            let s: Vec<f64> = (0..n)
                .map(|k| match k {
                    0 => 9.0,
                    1 | 2 => 8.0,
                    k if k < rank => 7.0 - 1e-2 * k as f64,
                    k => 6.5 / (1.0 + 0.05 * (k - rank) as f64),
                })
                .collect();
            let mut sorted = s.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            assert_eq!(s, sorted);
            let w: Vec<f32> = matrix(&u, &v, &s, columns).iter().map(|&w| w as f32).collect();
            let mut largest = s.clone();
            largest[rank..].fill(0.0);
            let share = of(Share::Pissa, &w, columns, rank);
            let off = furthest(&product(&share, rank, columns), &matrix(&u, &v, &largest, columns));
            assert!(off < 2e-5, "{rows} x {columns}, rank {rank}: {off}");
        }
    }

    #[test]
    fn pissa_of_a_matrix_of_lower_rank_is_the_matrix() {
        let (u, v) = (orthonormal(random(3, 2 * 12), 12), orthonormal(random(4, 2 * 16), 16));
        let w = matrix(&u, &v, &[3.0, 1.0], 16);
        let rounded: Vec<f32> = w.iter().map(|&w| w as f32).collect();
        let share = of(Share::Pissa, &rounded, 16, 4);
        assert!(furthest(&product(&share, 4, 16), &w) < 1e-6);
        let nothing = of(Share::Pissa, &[0.0; 12 * 16], 16, 4);
        assert!(product(&nothing, 4, 16).iter().all(|&x| x == 0.0));
    }

    /// What is left has nothing in the space of the first columns, and those are gone whole.
    #[test]
    fn olora_takes_the_space_of_the_first_columns() {
        for (rows, columns) in [(20, 12), (12, 20)] {
            let w: Vec<f32> = random(5, rows * columns).iter().map(|&w| w as f32).collect();
            let taken = product(&of(Share::Olora, &w, columns, 3), 3, columns);
            let left: Vec<f64> = w.iter().zip(&taken).map(|(w, t)| f64::from(*w) - t).collect();
            let column = |m: &[f64], i: usize| -> Vec<f64> {
                m[i..].iter().step_by(columns).copied().collect()
            };
            let w: Vec<f64> = w.iter().map(|&w| f64::from(w)).collect();
            for i in 0..columns {
                for first in 0..3 {
                    let dot = column(&left, i).iter().zip(column(&w, first)).map(|(a, b)| a * b);
                    assert!(dot.sum::<f64>().abs() < 1e-12);
                }
            }
            assert!((0..3).all(|i| column(&left, i).iter().all(|x| x.abs() < 1e-12)));
        }
    }
}

//! The leading singular vectors of a matrix, on the host, in f64: a block Krylov space of WᵀW that grows, with all its
//! vectors kept orthonormal, until the wanted vectors in it are those of the matrix; at the latest when it is the whole
//! space, where they are exact. Eigenvectors of the small matrix by Jacobi's rotations.

use crate::philox::Philox;

/// What is left of W Wᵀ v − λ v, over the largest λ, when a vector counts as found.
const RESIDUAL: f64 = 1e-10;
/// Vectors a block has beyond those that are wanted: the closer the next singular values, the more they help.
const SPARE: usize = 8;

/// Right singular vectors of the `rank` largest singular values of a weight [O, n], as rows: [rank, n].
pub(super) fn leading(weight: &[f32], n: usize, rank: usize) -> Vec<f64> {
    let block = (rank + SPARE).min(n);
    let mut random = Philox::new(0, [0, 0, 0]);
    let start = (0..block * n).map(|_| f64::from(random.normal())).collect();
    // Of the basis, [k, n], the images of the first `done` vectors are known: G q_j = Σ_i h[j][i] q_i.
    let mut basis = orthonormal(start, n);
    let mut h: Vec<Vec<f64>> = Vec::new();
    let mut check = 2 * block;
    loop {
        let done = h.len();
        let images = squared(weight, n, &basis[done * n..]);
        for mut image in images {
            let mut row = vec![0.0; basis.len() / n];
            project_out(&basis, n, &mut image, &mut row);
            let length = norm(&image);
            let scale = row.iter().fold(length, |most: f64, c| most.max(c.abs()));
            if length > 1e-13 * scale && basis.len() < n * n {
                row.push(length);
                basis.extend(image.iter().map(|x| x / length));
            }
            h.push(row);
        }
        let k = h.len();
        if k == basis.len() / n || k >= check {
            check = 2 * k;
            let (values, vectors) = eigen(&h, k);
            let wanted = &vectors[..rank.min(k)];
            let most = values.first().copied().unwrap_or(0.0).max(f64::MIN_POSITIVE);
            let found = wanted.iter().all(|s| residual(&h, s) <= RESIDUAL * most);
            // Nothing grows any more: the space holds all that the matrix does not send to zero.
            if found || k == basis.len() / n {
                let mut leading = vec![0.0; rank * n];
                for (s, out) in wanted.iter().zip(leading.chunks_mut(n)) {
                    for (s, q) in s.iter().zip(basis.chunks(n)) {
                        out.iter_mut().zip(q).for_each(|(o, q)| *o += s * q);
                    }
                }
                return leading;
            }
        }
    }
}

/// Rows of `n`, made orthonormal in order; one that lies in the space of those before becomes zero.
pub(super) fn orthonormal(mut rows: Vec<f64>, n: usize) -> Vec<f64> {
    for i in 0..rows.len() / n {
        let (before, rest) = rows.split_at_mut(i * n);
        let row = &mut rest[..n];
        let was = norm(row);
        project_out(before, n, row, &mut vec![0.0; i]);
        let length = norm(row);
        let factor = if length > 1e-12 * was { 1.0 / length } else { 0.0 };
        row.iter_mut().for_each(|x| *x *= factor);
    }
    rows
}

/// Takes the parts along orthonormal rows out of a vector, twice because once leaves what rounding made, and adds them
/// to `parts`.
fn project_out(rows: &[f64], n: usize, vector: &mut [f64], parts: &mut [f64]) {
    for _ in 0..2 {
        for (q, part) in rows.chunks(n).zip(&mut *parts) {
            let dot: f64 = q.iter().zip(&*vector).map(|(q, v)| q * v).sum();
            vector.iter_mut().zip(q).for_each(|(v, q)| *v -= dot * q);
            *part += dot;
        }
    }
}

fn norm(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// WᵀW v of each row v, in one walk over W.
fn squared(weight: &[f32], n: usize, vectors: &[f64]) -> Vec<Vec<f64>> {
    let mut images = vec![vec![0.0; n]; vectors.len() / n];
    let mut wide = vec![0.0; n];
    for row in weight.chunks(n) {
        wide.iter_mut().zip(row).for_each(|(x, &w)| *x = f64::from(w));
        for (v, image) in vectors.chunks(n).zip(&mut images) {
            let dot: f64 = wide.iter().zip(v).map(|(w, v)| w * v).sum();
            image.iter_mut().zip(&wide).for_each(|(x, w)| *x += dot * w);
        }
    }
    images
}

/// ‖G y − λ y‖ of the vector y = Σ_j s_j q_j: what its image has outside the space of the first vectors.
fn residual(h: &[Vec<f64>], s: &[f64]) -> f64 {
    let outside = h.iter().map(Vec::len).max().unwrap_or(0);
    let part =
        |i: usize| -> f64 { h.iter().zip(s).map(|(h, s)| h.get(i).unwrap_or(&0.0) * s).sum() };
    (s.len()..outside).map(|i| part(i).powi(2)).sum::<f64>().sqrt()
}

/// Eigenvalues, the largest first, and eigenvectors of the symmetric matrix of the first `k` coefficients.
fn eigen(h: &[Vec<f64>], k: usize) -> (Vec<f64>, Vec<Vec<f64>>) {
    let entry = |i: usize, j: usize| h[i].get(j).copied().unwrap_or(0.0);
    let mut a: Vec<Vec<f64>> =
        (0..k).map(|i| (0..k).map(|j| (entry(i, j) + entry(j, i)) / 2.0).collect()).collect();
    let mut v: Vec<Vec<f64>> =
        (0..k).map(|i| (0..k).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    // The matrix's own norm does not change under rotations.
    let whole = a.iter().flatten().map(|x| x * x).sum::<f64>();
    for _ in 0..60 {
        let off: f64 = (0..k).flat_map(|i| a[i][..i].iter().map(|x| x * x)).sum();
        if off <= 1e-28 * whole {
            break;
        }
        for p in 0..k {
            for q in p + 1..k {
                if a[p][q] == 0.0 {
                    continue;
                }
                let theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = theta.signum() / (theta.abs() + theta.hypot(1.0));
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / t.hypot(1.0);
                rotate(&mut a, p, q, c, t * c);
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - t * c * row[q], t * c * row[p] + c * row[q]);
                }
                rotate(&mut v, p, q, c, t * c);
            }
        }
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&i, &j| a[j][j].total_cmp(&a[i][i]));
    (order.iter().map(|&i| a[i][i]).collect(), order.iter().map(|&i| v[i].clone()).collect())
}

/// Rows p and q turned into c p − s q and s p + c q.
fn rotate(rows: &mut [Vec<f64>], p: usize, q: usize, c: f64, s: f64) {
    let (before, rest) = rows.split_at_mut(q);
    for (x, y) in before[p].iter_mut().zip(&mut rest[0]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

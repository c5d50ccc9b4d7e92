"""Ridge regression on sparse rows, one penalty for all outputs by generalised cross-validation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp


def moments(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population sd of each column, sd 1 where it is 0, without densifying."""
    x = matrix.astype(np.float64)
    mean = np.asarray(x.mean(axis=0)).ravel()
    variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2
    return mean, np.sqrt(np.where(variance > 1e-12 * np.maximum(mean**2, 1e-30), variance, 1.0))


class Ridge(NamedTuple):
    """y = y_mean + z @ slopes for a standardised row z."""

    mean: np.ndarray
    sd: np.ndarray
    y_mean: np.ndarray
    slopes: np.ndarray

    def predict(self, x: sp.csr_matrix, moments: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """Estimate for sparse rows x, standardised by the fit's moments or those given; float32 [rows, H]."""
        mean, sd = (self.mean, self.sd) if moments is None else moments
        slopes = self.slopes / sd[:, None]
        return (x @ slopes + (self.y_mean - mean @ slopes)).astype(np.float32)


def fit_ridge(x: sp.csr_matrix, y: sp.csr_matrix) -> Ridge:
    """Ridge of y [n, H] on standardised x [n, T] from sparse moments, one penalty by GCV.

    Generalised cross-validation: GCV(a) = mean over outputs of (rss / variance) / (1 - df(a) / n)^2 with
    df(a) = 1 + sum l / (l + a) and the eigenvalues l of the standardised Gram matrix. Penalties that use more
    than 95 % of the degrees of freedom are not considered. Cost: one eigendecomposition of T x T, of n x n where genes are more than rows.
    """
    n = x.shape[0]
    mean, sd = moments(x)
    y_mean, _ = moments(y)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    cross = ((x64.T @ y64).toarray() - n * np.outer(mean, y_mean)) / sd[:, None]
    if x.shape[1] > n:  # the same eigenvalues and vectors, but for those with eigenvalue 0
        z = (x64.toarray() - mean) / sd
        eigenvalues, rows = np.linalg.eigh(z @ z.T)
        kept = eigenvalues > 1e-10 * max(eigenvalues[-1], 1e-300)
        eigenvalues = eigenvalues[kept]
        vectors = z.T @ (rows[:, kept] / np.sqrt(eigenvalues))
    else:
        gram = ((x64.T @ x64).toarray() - n * np.outer(mean, mean)) / np.outer(sd, sd)
        eigenvalues, vectors = np.linalg.eigh(gram)
        eigenvalues = np.maximum(eigenvalues, 0.0)
    projected = vectors.T @ cross
    y_square = np.asarray(y64.multiply(y64).sum(axis=0)).ravel() - n * y_mean**2
    varies = y_square > 1e-9 * n * np.maximum(y_mean**2, 1e-30)
    best, best_score = n * 1e3, np.inf
    for penalty in n * np.logspace(-5, 3, 33):
        df = 1.0 + (eigenvalues / (eigenvalues + penalty)).sum()
        if df > 0.95 * n or not varies.any():
            continue
        explained = (
            projected**2 * ((eigenvalues + 2 * penalty) / (eigenvalues + penalty) ** 2)[:, None]
        ).sum(0)
        left = np.maximum(y_square - explained, 0.0)[varies] / y_square[varies]
        score = left.mean() / (1.0 - df / n) ** 2
        if score < best_score:
            best, best_score = penalty, score
    return Ridge(mean, sd, y_mean, vectors @ (projected / (eigenvalues + best)[:, None]))

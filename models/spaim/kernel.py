r"""What the reference knows of two genes, as one covariance, and its finite features.

    c_gh     correlation of the log expression of genes g and h over reference cells
    d_gh     correlation of their cluster profiles (standardised over the K clusters)
    k_gh     = [ c_gh + exp(-(1 - c_gh) / l) + E exp(-(1 - d_gh) / l) ] / 3 + CONSTANT

The three parts speak of linear co-expression, of near neighbors among genes in that sense, and of near neighbors by cluster profile: SpaIM's own
input. The constant lets loadings share a mean over genes (depth, mostly). E is over the profiles' sampling errors: with standardised noise
variance e_g = sum_k SE_gk^2 / sum_k (p_gk - mean_g)^2 of each gene, spread evenly over K coordinates, the expectation of the radial kernel is
closed,

    (1 + (e_g + e_h) / (K l))^(-K/2) exp(-(1 - d_gh) / (l + (e_g + e_h) / K)),   g != h,    and 1 for g = h:

a gene with a badly known profile resembles nobody, so its prediction is wide.
"""

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.models.common.cells import DENSE_GENES, ROWS, moments
from ppl_st.models.spaim.data import Data

CONSTANT = 0.3
SELF = 1.0 + CONSTANT  # k_gg
JITTER = 1e-5
BLOCK = 1024
CROWDED = 0.12  # share of counts that are not zero from which dense products are faster


class GeneKernel:
    """k between genes of the reference; see the file's docstring."""

    def __init__(self, data: Data, lengthscale: float, *, errors: bool = True) -> None:
        self.mean, self.sd = moments(data.reference)
        n, genes = data.reference.shape
        crowded = genes <= DENSE_GENES and data.reference.nnz > CROWDED * n * genes
        self.all = _correlations(data.reference, self.mean, self.sd) if crowded else None
        self.reference = sp.csc_matrix((n, genes)) if crowded else sp.csc_matrix(data.reference)
        self.lengthscale = lengthscale
        centered = data.profiles.astype(np.float64) - data.profiles.mean(1, dtype=np.float64)[:, None]
        size = np.square(centered).sum(1)
        flat = size < 1e-10
        self.profiles = centered / np.sqrt(np.where(flat, 1.0, size))[:, None]  # [G, K] unit length
        self.noise = np.square(data.errors, dtype=np.float64).sum(1) / np.where(flat, 1.0, size)  # e [G]
        if not errors:
            self.noise = np.zeros_like(self.noise)

    def correlation(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """c [a, b]; 0 for a gene that does not vary."""
        if self.all is not None:
            return self.all[np.ix_(a, b)]
        n = self.reference.shape[0]
        cross = (self.reference[:, a].T @ self.reference[:, b]).toarray().astype(np.float64) / n
        cross -= np.outer(self.mean[a], self.mean[b])
        return np.clip(cross / np.outer(self.sd[a], self.sd[b]), -1.0, 1.0)

    def __call__(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """k [a, b]."""
        return self.mix(self.correlation(a, b), a, b)

    def mix(self, c: NDArray[np.float64], a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        """k [a, b] where the correlations c [a, b] are at hand."""
        length, clusters = self.lengthscale, self.profiles.shape[1]
        noise = (self.noise[a][:, None] + self.noise[b]) / clusters
        near = np.exp(-(1 - self.profiles[a] @ self.profiles[b].T) / (length + noise))
        near *= (1 + noise / length) ** (-clusters / 2)
        k = (c + np.exp(-(1 - c) / length) + near) / 3 + CONSTANT
        k[a[:, None] == b] = SELF
        return np.asarray(k)


def _correlations(reference: sp.csr_matrix, mean: NDArray[np.float64], sd: NDArray[np.float64]) -> NDArray[np.float64]:
    """c of all genes from dense blocks of cells: faster than sparse products where many counts are not zero."""
    n, genes = reference.shape
    gram = np.zeros((genes, genes))
    for start in range(0, n, ROWS):
        block = (reference[start : start + ROWS].toarray() - mean) / sd
        gram += block.T @ block
    return np.clip(gram / n, -1.0, 1.0)


def landmarks(panel: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Training genes that carry the features: all of them, or a random ``limit``."""
    if len(panel) <= limit:
        return panel
    return np.sort(np.random.default_rng([seed, 11]).choice(panel, limit, replace=False))


def features(kernel: GeneKernel, marks: NDArray[np.int64], panel: NDArray[np.int64], genes: NDArray[np.int64]) -> tuple[
    NDArray[np.float32], NDArray[np.float64]
]:
    """phi [genes, F] with phi_g . phi_h = k_gh for landmarks (Nystrom otherwise), rotated so that the Gram matrix over ``panel`` is diagonal.

    Also that diagonal [F], descending. With all training genes as landmarks nothing is approximated: |phi_g|^2 falls short of k_gg by the
    variance that the training genes leave to gene g.
    """
    factor = scipy.linalg.cholesky(kernel(marks, marks) + JITTER * np.eye(len(marks)), lower=True)

    def half(part: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(scipy.linalg.solve_triangular(factor, kernel(marks, part), lower=True).T)

    gram = np.zeros((len(marks), len(marks)))
    for start in range(0, len(panel), BLOCK):
        block = half(panel[start : start + BLOCK])
        gram += block.T @ block
    values, rotation = np.linalg.eigh(gram)
    values, rotation = values[::-1], rotation[:, ::-1]
    kept = values > 1e-7 * values[0]
    rotation = rotation[:, kept] * np.sign(rotation[np.abs(rotation).argmax(0), np.arange(len(values))])[kept]
    result = np.empty((len(genes), int(kept.sum())), np.float32)
    for start in range(0, len(genes), BLOCK):
        result[start : start + BLOCK] = half(genes[start : start + BLOCK]) @ rotation
    return result, values[kept]

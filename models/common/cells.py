"""Counts of one platform as log-normalised cells and their leading directions; one problem of genes shared by two platforms.

Shared by the methods that see a gene as a map over cells (SpaIM, SpaGene).
"""

from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh

DENSE_GENES = 2000  # genes up to which all eigenvectors of their correlation matrix are computed at once
ROWS = 4096  # cells made dense together

Some = TypeVar("Some", bound=Any)


class Problem(Protocol):
    """What this folder uses of a method's ``Data`` (a NamedTuple): n cells x A genes of the target, G genes of the reference, P in both."""

    @property
    def counts(self) -> sp.csr_matrix:
        """[n, A] target, with the genes that only the target has."""

    @property
    def columns(self) -> NDArray[np.int64]:
        """[P] where the shared genes are among the A."""

    @property
    def panel(self) -> NDArray[np.int64]:
        """[P] and among the G."""

    @property
    def reference(self) -> sp.csr_matrix:
        """[M, G] counts of the reference's cells, or their logs."""

    @property
    def log_share(self) -> NDArray[np.float64]:
        """[G] log of a gene's counts per count of the P genes, in the reference."""

    @property
    def share_variance(self) -> NDArray[np.float64]:
        """[G] sampling variance of ``log_share``: few cells, few counts."""

    @property
    def neighbors(self) -> sp.csr_matrix | None:
        """[n, n] rows sum to 1: mean over the spatial neighbors."""

    @property
    def relative(self) -> NDArray[np.float64]:
        """[n] usual depth of the cell's section, over that of the fit."""

    @property
    def totals(self) -> NDArray[np.float64]:
        """[n] counts of each cell over the shared genes."""


def all_counts(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """[n] counts of each cell over all genes that it was measured with: its depth."""
    return np.asarray(counts.sum(1), dtype=np.float64).ravel()


def totals_of(data: Problem) -> NDArray[np.float64]:
    """[n] counts of each cell over the shared genes."""
    return all_counts(data.counts[:, data.columns])


def living(data: Problem) -> NDArray[np.bool_]:
    """[P] shared genes that have counts on both sides; the others are probes that fail, or genes out of reach, and say nothing of levels."""
    here, there = (np.asarray(counts[:, columns].sum(0)).ravel() for counts, columns in ((data.counts, data.columns), (data.reference, data.panel)))
    return np.asarray((here > 0) & (there > 0))


def log_shares(reference: sp.csr_matrix, panel: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log of every gene's counts per count of the genes ``panel`` [G], and its sampling variance over the cells of the reference [G].

    The share is a ratio r of sums over cells; by the delta method Var log r = sum_i (c_ig - r t_i)^2 / (sum_i c_ig)^2, half a count added for
    genes with few: 1 / counts for Poisson counts, more where cells differ.
    """
    matrix = sp.csr_matrix(reference, dtype=np.float64)
    totals = np.asarray(matrix[:, panel].sum(1)).ravel()
    counts = np.asarray(matrix.sum(0)).ravel()
    share = (counts + 0.5) / (totals.sum() + 1)
    square = np.bincount(matrix.indices, weights=matrix.data**2, minlength=matrix.shape[1])
    residual = square - 2 * share * (matrix.T @ totals) + share**2 * (totals**2).sum()
    return np.log(share), (np.maximum(residual, 0.0) + 0.5) / (counts + 0.5) ** 2


def without(data: Some, inner: NDArray[np.int64]) -> Some:
    """The problem without the shared genes ``inner`` (positions among the P) in the target."""
    kept = np.setdiff1d(np.arange(len(data.panel)), inner)
    stay = np.setdiff1d(np.arange(data.counts.shape[1]), data.columns[inner])
    columns = np.searchsorted(stay, data.columns[kept])
    return data._replace(counts=sp.csr_matrix(data.counts[:, stay]), columns=columns, panel=data.panel[kept])


def take_cells(data: Some, rows: NDArray[np.int64]) -> Some:
    """The problem of some cells; neighbors outside are lost, and a cell that loses all of them keeps its own value."""
    near = None
    if data.neighbors is not None:
        near = sp.csr_matrix(data.neighbors[rows][:, rows])
        size = np.asarray(near.sum(1)).ravel()
        near = sp.csr_matrix(sp.diags(1 / np.where(size > 0, size, 1.0)) @ near + sp.diags((size == 0).astype(np.float64)), dtype=np.float32)
    return data._replace(counts=sp.csr_matrix(data.counts[rows]), neighbors=near, relative=data.relative[rows])


class Directions(NamedTuple):
    """Leading directions of the target: u_i = ((log1p(x_i depth / total_i) - mean) / sd) @ loadings, unit variance over the cells of the fit."""

    mean: NDArray[np.float32]  # [A]
    sd: NDArray[np.float32]  # [A]
    loadings: NDArray[np.float32]  # [A, q]
    scores: NDArray[np.float64]  # [q, A] loading of every gene on every direction: mean over cells of u_ik z_ig
    depth: float  # median total


def log_normalise(counts: sp.csr_matrix, totals: NDArray[np.float64], depth: float) -> sp.csr_matrix:
    """log1p(count x depth / total); rows without a total are zero."""
    factor = np.where(totals > 0, depth / np.where(totals > 0, totals, 1.0), 0.0)
    result = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    result.data = np.log1p(result.data * np.repeat(factor.astype(np.float32), np.diff(result.indptr)))
    return result


def median_depth(totals: NDArray[np.float64]) -> float:
    """Median of the positive totals."""
    return float(np.median(totals[totals > 0])) if (totals > 0).any() else 1.0


def moments(matrix: sp.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sd of each column; sd is 1 where the column is constant."""
    n = matrix.shape[0]
    mean = np.asarray(matrix.sum(0, dtype=np.float64)).ravel() / n
    square = np.bincount(matrix.indices, weights=np.square(matrix.data, dtype=np.float64), minlength=matrix.shape[1]) / n
    variance = square - mean**2
    return mean, np.sqrt(np.where(variance > 1e-9 * np.maximum(square, 1e-12), variance, 1.0))


def find_directions(counts: sp.csr_matrix, q: int, totals: NDArray[np.float64]) -> Directions:
    """The first ``q`` principal directions of standardised cells [n, A] with these ``totals`` [n], from their genes' correlation matrix alone (cells
    are streamed)."""
    depth = median_depth(totals)
    logs = log_normalise(counts, totals, depth)
    mean, sd = moments(logs)
    n, genes = logs.shape
    q = max(1, min(q, genes, n - 1))
    if genes <= DENSE_GENES:
        gram = np.zeros((genes, genes))
        for start in range(0, n, ROWS):
            block = (logs[start : start + ROWS].toarray() - mean) / sd
            gram += block.T @ block
        values, vectors = scipy.linalg.eigh(gram / n, subset_by_index=[genes - q, genes - 1])
    else:
        scaled = sp.csr_matrix(logs @ sp.diags(1 / sd))
        shift = mean / sd

        def product(v: NDArray[np.float64]) -> NDArray[np.float64]:
            w = scaled @ v - shift @ v
            return np.asarray(scaled.T @ w - shift * w.sum()) / n

        start_vector = np.random.default_rng(0).standard_normal(genes)
        values, vectors = eigsh(LinearOperator((genes, genes), matvec=product, dtype=np.float64), k=q, v0=start_vector)
    values, vectors = values[::-1], vectors[:, ::-1]
    useful = values > 1e-6 * values[0]
    values, vectors = values[useful], vectors[:, useful]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(len(values))])  # eigenvectors have no sign: fix one
    f32 = np.float32
    scores = np.sqrt(values)[:, None] * vectors.T
    return Directions(mean.astype(f32), sd.astype(f32), (vectors / np.sqrt(values)).astype(f32), scores, depth)


def place_cells(directions: Directions, counts: sp.csr_matrix) -> NDArray[np.float32]:
    """Scores u [n, q] of cells [n, A] on the directions."""
    scaled = directions.loadings / directions.sd[:, None]
    logs = log_normalise(counts, all_counts(counts), directions.depth)
    return np.asarray(logs @ scaled - directions.mean @ scaled, dtype=np.float32)

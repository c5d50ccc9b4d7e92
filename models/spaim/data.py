"""SpaIM's data as matrices, the directions over its cells, and minibatches of genes."""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from ppl_st.inference.svi import epoch_order

DENSE_GENES = 2000  # genes up to which all eigenvectors of their correlation matrix are computed at once
ROWS = 4096  # cells made dense together


class Data(NamedTuple):
    """One SpaIM problem: n cells x A genes of the target, M cells and K clusters of the reference with G genes; P genes are in both."""

    counts: sp.csr_matrix  # [n, A] target, with the genes that only the target has
    columns: NDArray[np.int64]  # [P] where the shared genes are among the A
    panel: NDArray[np.int64]  # [P] and among the G
    reference: sp.csr_matrix  # [M, G] log1p(count / total over the P genes x median total)
    profiles: NDArray[np.float32]  # [G, K] mean (or median) of ``reference`` in each cluster
    errors: NDArray[np.float32]  # [G, K] standard errors of the profiles
    log_share: NDArray[np.float64]  # [G] log of a gene's counts per count of the P genes, in the reference
    evidence: NDArray[np.float64]  # [G] counts in the reference
    neighbors: sp.csr_matrix | None = None  # [n, n] rows sum to 1: mean over the spatial neighbors

    @property
    def totals(self) -> NDArray[np.float64]:
        """[n] counts of each cell over the shared genes: its depth."""
        return np.asarray(self.counts[:, self.columns].sum(1), dtype=np.float64).ravel()

    def without(self, inner: NDArray[np.int64]) -> "Data":
        """The problem without the shared genes ``inner`` (positions among the P) in the target."""
        kept = np.setdiff1d(np.arange(len(self.panel)), inner)
        stay = np.setdiff1d(np.arange(self.counts.shape[1]), self.columns[inner])
        columns = np.searchsorted(stay, self.columns[kept])
        return self._replace(counts=sp.csr_matrix(self.counts[:, stay]), columns=columns, panel=self.panel[kept])

    def take_cells(self, rows: NDArray[np.int64]) -> "Data":
        """The problem of some cells; neighbors outside are lost."""
        near = None
        if self.neighbors is not None:
            near = sp.csr_matrix(self.neighbors[rows][:, rows])
            near = sp.csr_matrix(sp.diags(1 / np.maximum(np.asarray(near.sum(1)).ravel(), 1e-6)) @ near)
        return self._replace(counts=sp.csr_matrix(self.counts[rows]), neighbors=near)


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


def find_directions(data: Data, q: int) -> Directions:
    """The first ``q`` principal directions of the standardised target, from its genes' correlation matrix alone (cells are streamed)."""
    totals = data.totals
    depth = median_depth(totals)
    logs = log_normalise(data.counts, totals, depth)
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


def place_cells(directions: Directions, counts: sp.csr_matrix, totals: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scores u [n, q] of cells on the directions."""
    scaled = directions.loadings / directions.sd[:, None]
    logs = log_normalise(counts, totals, directions.depth)
    return np.asarray(logs @ scaled - directions.mean @ scaled, dtype=np.float32)


class Batch(NamedTuple):
    """Genes of one minibatch; ``x`` and ``profiles`` are empty for the closed form, which always sees all."""

    genes: Tensor  # [B] positions among the P shared genes
    profiles: Tensor  # [B, K] reference profile
    x: Tensor  # [B, n] what the target measured: log-normalised, or counts for likelihood "nb"
    totals: Tensor  # [n]
    n_genes: int
    step: int


class Batches:
    """Minibatches of ``size`` shared genes (0: all); a pure function of the step. Genes are the samples, cells the event."""

    def __init__(self, data: Data, size: int, seed: int, x: NDArray[np.float32] | None) -> None:
        self.x, self.seed = x, seed
        self.n_genes = len(data.panel)
        self.size = min(size, self.n_genes) if size else self.n_genes
        self.profiles = torch.from_numpy(data.profiles[data.panel])
        self.totals = torch.from_numpy(data.totals.astype(np.float32))

    def __len__(self) -> int:
        return -(-self.n_genes // self.size)

    def at(self, step: int) -> Batch:
        """The minibatch of ``step``."""
        genes = np.sort(epoch_order(self.n_genes, self.size, self.seed, step)) if self.size < self.n_genes else np.arange(self.n_genes)
        x = torch.zeros(len(genes), 0) if self.x is None else torch.from_numpy(self.x[genes])
        index = torch.from_numpy(genes)
        return Batch(index, self.profiles[index], x, self.totals, self.n_genes, step)

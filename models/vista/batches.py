"""VISTA's data as matrices, and minibatches of reference cells and of seed cells with their spatial neighbors.

The neighbor graph is computed once for all cells (`ppl_st.prepare.vista`), never inside a minibatch. A batch of the target holds its seeds,
whose likelihood counts, and after them every neighbor of a seed (context: encoded, not scored).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.svi import epoch_order


class Data(NamedTuple):
    """One problem: n spatial cells x P panel genes and E of their own, m reference cells x G genes."""

    counts: sp.csr_matrix  # [n, P]
    others: sp.csr_matrix  # [n, E] counts of genes that only the target has; E may be 0
    reference: sp.csr_matrix  # [m, G]
    panel: NDArray[np.int64]  # [P] positions of the panel among the G genes
    waves: NDArray[np.float32]  # [n, K] smooth functions of the coordinates; K = 0 where the method uses none
    graph: sp.csr_matrix  # [n, n] row i holds the spatial neighbors of cell i
    batch: NDArray[np.int64]  # [n] batch of each spatial cell
    reference_batch: NDArray[np.int64]  # [m]
    parent: NDArray[np.int64]  # [G] the gene itself; of a gene GENE:layer, position of the gene
    usual: NDArray[np.float64]  # [n] median total (all genes of the target) of the section of each spatial cell

    @property
    def measured(self) -> sp.csr_matrix:
        """[n, A] all genes of the target: the panel, then its own."""
        return sp.csr_matrix(sp.hstack([self.counts, self.others], format="csr")) if self.others.shape[1] else self.counts


class Batch(NamedTuple):
    """Tensors of one minibatch: B seeds among c context cells, R reference cells."""

    counts: Tensor  # [c, P] seeds first
    others: Tensor  # [c, E]
    usual: Tensor  # [B] median total in the section of each seed
    total: Tensor  # [c] counts of the visible genes of the target over their usual share: depth as it would be without the hidden ones
    batch: Tensor  # [c] batch of each
    rows: Tensor  # [B] rows of the seeds in the data
    neighbors: Tensor  # [B, k] positions in the context (0 where there is none)
    present: Tensor  # [B, k] bool
    reference: Tensor  # [R, G]
    reference_total: Tensor  # [R] the same over the visible panel genes
    reference_batch: Tensor  # [R]
    reference_rows: Tensor  # [R]
    visible: Tensor  # [P] bool: panel genes that the encoder sees
    n_cells: int
    n_reference: int


class Batches:
    """Minibatches of ``size`` seeds and ``reference_size`` reference cells; a pure function of the step (0 = everything).

    An epoch is one pass over the longer side; the shorter one starts again, in a new order, whenever it is through. ``visible`` is the share of
    panel genes that the encoder sees in a training step, drawn anew in every step for all of its cells, so that a hidden gene is hidden in a cell
    and in its neighbors, as a gene that was never measured is.
    """

    def __init__(self, data: Data, size: int, reference_size: int, seed: int, visible: float = 1.0) -> None:
        self.data, self.seed, self.visible = data, seed, visible
        self.n, self.m = data.counts.shape[0], data.reference.shape[0]
        self.size, self.reference_size = min(size or self.n, self.n), min(reference_size or self.m, self.m)
        self.share, self.reference_share = (shares(counts) for counts in (data.measured, data.reference[:, data.panel]))

    def __len__(self) -> int:
        return max(-(-self.n // max(1, self.size)), -(-self.m // max(1, self.reference_size)))

    def at(self, step: int) -> Batch:
        """The minibatch of ``step``."""
        seeds = epoch_order(self.n, self.size, self.seed, step)
        reference = epoch_order(self.m, self.reference_size, self.seed + 1, step)
        shown = np.ones(len(self.data.panel), dtype=bool)
        if self.visible < 1:
            hidden = max(1, round((1 - self.visible) * len(shown)))
            shown[np.random.default_rng([self.seed, 8, step]).permutation(len(shown))[:hidden]] = False
        return self._batch(np.sort(seeds), np.sort(reference), shown)

    def in_order(self, max_cells: int, rows: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Every spatial cell (or these ``rows``) once as a seed, every gene visible, no reference cells."""
        rows = np.arange(self.n) if rows is None else rows
        for start in range(0, len(rows), max(1, max_cells)):
            yield self.of(rows[start : start + max_cells])

    def of(self, rows: NDArray[np.int64]) -> Batch:
        """These spatial cells as seeds, every gene visible, no reference cells."""
        return self._batch(rows, np.empty(0, np.int64), np.ones(len(self.data.panel), dtype=bool))

    def of_reference(self, rows: NDArray[np.int64]) -> Batch:
        """These reference cells, every gene visible, no spatial cells."""
        return self._batch(np.empty(0, np.int64), rows, np.ones(len(self.data.panel), dtype=bool))

    def _batch(self, seeds: NDArray[np.int64], reference: NDArray[np.int64], shown: NDArray[np.bool_]) -> Batch:
        data = self.data
        context, neighbors, present = surroundings(data.graph, seeds)
        counts, own, other = dense_rows(data.counts, context), dense_rows(data.others, context), dense_rows(data.reference, reference)
        hidden = float(self.share[: len(shown)][~shown].sum())
        total = (counts[:, shown].sum(1) + own.sum(1)) / (1 - hidden)
        other_total = other[:, data.panel[shown]].sum(1) / self.reference_share[shown].sum()
        return Batch(
            counts=torch.from_numpy(counts),
            others=torch.from_numpy(own),
            usual=torch.from_numpy(data.usual[seeds].astype(np.float32)),
            total=torch.from_numpy(np.maximum(total, 1.0).astype(np.float32)),
            batch=torch.from_numpy(data.batch[context]),
            rows=torch.from_numpy(seeds),
            neighbors=torch.from_numpy(neighbors),
            present=torch.from_numpy(present),
            reference=torch.from_numpy(other),
            reference_total=torch.from_numpy(np.maximum(other_total, 1.0).astype(np.float32)),
            reference_batch=torch.from_numpy(data.reference_batch[reference]),
            reference_rows=torch.from_numpy(reference),
            visible=torch.from_numpy(shown),
            n_cells=self.n,
            n_reference=self.m,
        )


def neighbor_mean(x: Tensor, batch: Batch) -> Tensor:
    """Mean of x [c, d] over the neighbors of each seed [B, d]; 0 for a seed without any."""
    present = batch.present.to(x.dtype)
    total = torch.einsum("bk,bkd->bd", present, x[batch.neighbors])
    return total / present.sum(1, keepdim=True).clamp_min(1.0)


def mixed(x: Tensor, batch: Batch, share: Tensor | float) -> Tensor:
    """x [c, k] of the seeds with this share of their neighbors' mean, [B, k]; a seed without neighbors keeps its own."""
    own = x[: len(batch.rows)]
    return torch.where(batch.present.any(1, keepdim=True), own + share * (neighbor_mean(x, batch) - own), own)


def surroundings(graph: sp.csr_matrix, seeds: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Rows of the seeds and then of their other neighbors [c], positions of the seeds' neighbors among these [B, k], and whether each exists."""
    if not graph.nnz:
        return seeds, np.zeros((len(seeds), 1), dtype=np.int64), np.zeros((len(seeds), 1), dtype=bool)
    rows = graph[seeds]
    degree = np.diff(rows.indptr)
    context = np.concatenate([seeds, np.setdiff1d(rows.indices, seeds)])
    order = np.argsort(context, kind="stable")
    present = np.arange(max(1, int(degree.max(initial=0))))[None] < degree[:, None]
    neighbors = np.zeros(present.shape, dtype=np.int64)
    neighbors[present] = order[np.searchsorted(context[order], rows.indices)]
    return context, neighbors, present


def dense_rows(counts: sp.csr_matrix, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """counts[rows], dense."""
    if not counts.nnz or not len(rows):
        return np.zeros((len(rows), counts.shape[1]), dtype=counts.dtype)
    dense: NDArray[np.float32] = counts[rows].toarray()
    return dense


def panel_share(data: Data) -> float:
    """Log of the panel's share of the target's counts. Levels are shares of the panel, depth is the total of all A genes: this lies between them."""
    return float(np.log(shares(data.measured)[: len(data.panel)].sum()))


def shares(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Share of each gene in all counts, sums to 1."""
    total = np.asarray(counts.sum(0), dtype=np.float64).ravel() + 0.5
    return np.asarray(total / total.sum(), dtype=np.float64)

"""SIID's data as matrices, and spots-with-their-cells minibatches of them.

A spot's counts depend on every cell mapped to it, so the sampling unit is the spot with all of its cells; cells without a spot form a
second stratum that is cut into the same number of parts. Each cell is *owned* by the spot it weighs most in; with a soft map a batch also
holds *guests*, cells of other owners that its spots need, whose own likelihood does not count there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.svi import epoch_order
from ppl_st.product import csr_tensor


class Data(NamedTuple):
    """One SIID problem: n cells x P panel genes, s spots x G genes. ``panel`` must be the P positions of the panel among the G genes."""

    counts: sp.csr_matrix  # [n, P] cells
    spot_counts: sp.csr_matrix  # [s, G]
    mapping: sp.csr_matrix  # [n, s] weight of a cell in a spot, rows sum to at most 1
    panel: NDArray[np.int64]  # [P]
    cell_xy: NDArray[np.float64]  # [n, 2] positions in units of the spot pitch; sections lie far apart
    spot_xy: NDArray[np.float64]  # [s, 2]
    labels: NDArray[np.int64] | None = None  # [n] factor a cell is labelled with, -1 unknown
    profiles: NDArray[np.float64] | None = None  # [K, G] prior expression profiles, rows sum to 1
    pitch: float = 1.0  # of the spots, in the unit of the files
    names: tuple[str, ...] = ()  # of the first factors: cell types of the profiles, then labels that are none of them

    @property
    def named(self) -> int:
        """Factors that have a label or a profile: there are at least so many."""
        return len(self.names)

    def take_rows(self, cells: NDArray[np.int64], spots: NDArray[np.int64]) -> "Data":
        """The sub-problem of these cells and spots."""
        return self._replace(
            counts=self.counts[cells],
            spot_counts=self.spot_counts[spots],
            mapping=self.mapping[cells][:, spots],
            cell_xy=self.cell_xy[cells],
            spot_xy=self.spot_xy[spots],
            labels=None if self.labels is None else self.labels[cells],
        )


class Batch(NamedTuple):
    """Tensors of one minibatch: n cells, s spots."""

    counts: Tensor  # [n, P] sparse CSR
    spot_counts: Tensor  # [s, G] sparse CSR
    link_cell: Tensor  # [e] the cell -> spot map as entries: position of the cell in this batch,
    link_spot: Tensor  # [e] position of the spot,
    link_weight: Tensor  # [e] weight of the cell in the spot
    total: Tensor  # [n] counts of the cell
    cells: Tensor  # [n] row in the data
    spots: Tensor  # [s] row in the data
    owned: Tensor  # [n] bool: the cell's likelihood counts in this batch
    labels: Tensor  # [n] labelled factor or -1
    n_cells: (
        int  # plate sizes: batch size x number of batches, so that Pyro's scale is the inverse inclusion probability
    )
    n_spots: int
    step: int


class Batches:
    """Minibatches of ``batch_spots`` spots with their cells; a pure function of the step (0 = everything in one batch)."""

    def __init__(self, data: Data, batch_spots: int, seed: int) -> None:
        n, s = data.mapping.shape
        self.data = data
        self.seed = seed
        mapped = np.diff(data.mapping.indptr) > 0
        self.unmapped = np.flatnonzero(~mapped)
        owner = np.full(n, -1)
        if s:
            rows = np.flatnonzero(mapped)
            owner[rows] = np.asarray(data.mapping[rows].argmax(1)).ravel()
        self.owner = owner
        order = np.argsort(owner, kind="stable")
        self.cells_by_spot = np.split(order, np.searchsorted(owner[order], np.arange(s + 1)))[1:-1] if s else []
        self.members = data.mapping.T.tocsr()  # [s, n]
        size = batch_spots if batch_spots else max(s, 1)
        self.n_batches = max(1, -(-s // size)) if s else 1

    def __len__(self) -> int:
        return self.n_batches

    def at(self, step: int) -> Batch:
        """The minibatch of ``step``: every spot and every unmapped cell once per epoch."""
        place = step % self.n_batches
        spots = self._cut(self.data.mapping.shape[1], place, step)
        return self._batch(self._owned(spots, self.unmapped[self._cut(len(self.unmapped), place, step)]), spots, step)

    def in_order(self, max_cells: int) -> Iterator[Batch]:
        """Every cell exactly once as an owned cell, in batches of about ``max_cells`` cells (at least one spot's cells each).

        A batch holds every spot of its owned cells, also those that belong to cells of another batch more (a soft map): what is inferred of a
        cell hardly depends on how the cells are cut.
        """
        sizes = np.array([len(c) for c in self.cells_by_spot], dtype=np.int64)
        part = np.cumsum(sizes) // max(1, max_cells) if len(sizes) else np.empty(0, np.int64)
        for value in np.unique(part):
            owned = self._owned(np.flatnonzero(part == value), np.empty(0, np.int64))
            yield self._batch(owned, np.unique(self.data.mapping[owned].indices), 0)
        for start in range(0, len(self.unmapped), max_cells):
            yield self._batch(self.unmapped[start : start + max_cells], np.empty(0, np.int64), 0)

    def _owned(self, spots: NDArray[np.int64], unmapped: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([*(self.cells_by_spot[j] for j in spots), unmapped]).astype(np.int64)

    def _cut(self, n: int, place: int, step: int) -> NDArray[np.int64]:
        """Part ``place`` of this epoch's permutation of range(n), cut into as equal parts as possible."""
        if n == 0:
            return np.empty(0, np.int64)
        permutation = epoch_order(n, n, self.seed, step // self.n_batches)
        return np.sort(np.array_split(permutation, self.n_batches)[place])

    def _batch(self, owned: NDArray[np.int64], spots: NDArray[np.int64], step: int) -> Batch:
        members = self.members[spots]
        cells = np.union1d(owned, members.indices)  # in the data's order, guests included
        if not len(cells):  # bare spots alone: a plate needs a member, so the first cell is a guest without a part in them
            cells = np.zeros(1, np.int64)
        counts = self.data.counts[cells]
        links = members[:, cells].tocoo()
        labels = np.full(len(cells), -1) if self.data.labels is None else self.data.labels[cells]
        return Batch(
            counts=csr_tensor(counts),
            spot_counts=csr_tensor(self.data.spot_counts[spots]),
            link_cell=torch.from_numpy(links.col.astype(np.int64)),
            link_spot=torch.from_numpy(links.row.astype(np.int64)),
            link_weight=torch.from_numpy(links.data.astype(np.float32)),
            total=torch.from_numpy(np.asarray(counts.sum(1), dtype=np.float32).ravel()),
            cells=torch.from_numpy(cells),
            spots=torch.from_numpy(spots),
            owned=torch.from_numpy(np.isin(cells, owned)),
            labels=torch.from_numpy(labels),
            n_cells=len(cells) * self.n_batches,
            n_spots=len(spots) * self.n_batches,
            step=step,
        )

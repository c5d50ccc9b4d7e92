"""SpaGene's data as matrices, and minibatches of row numbers: codes are cached, so a step of stage 2 encodes no cell.

It reads the counts of the shared genes of its cells for an identity per cell and gene ("network", "paper"), of all genes for the cycle of a Gaussian
decoder ("paper"), otherwise none.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.svi import epoch_order
from ppl_st.models.common.cells import log_shares, totals_of


class Data(NamedTuple):
    """One problem: n spatial cells x A genes, M reference cells x G genes; P genes are in both."""

    counts: sp.csr_matrix  # [n, A] target, with the genes that only the target has
    columns: NDArray[np.int64]  # [P] where the shared genes are among the A
    panel: NDArray[np.int64]  # [P] and among the G
    reference: sp.csr_matrix  # [M, G]
    log_share: NDArray[np.float64]  # [G] log of a gene's counts per count of the P genes, in the reference
    share_variance: NDArray[np.float64]  # [G] its sampling variance
    relative: NDArray[np.float64]  # [n] usual depth of the cell's section, over that of the fit
    neighbors: sp.csr_matrix | None = None  # [n, n] rows sum to 1: mean over the spatial neighbors

    @property
    def totals(self) -> NDArray[np.float64]:
        """[n] counts of each spatial cell over the shared genes."""
        return totals_of(self)

    def turned(self) -> "Data":
        """The other direction: reference cells are the target, and know the genes that only the spatial side has."""
        return make(self.reference, self.panel, self.columns, self.counts, None, np.ones(self.reference.shape[0]))


def make(
    counts: sp.csr_matrix,
    columns: NDArray[np.int64],
    panel: NDArray[np.int64],
    reference: sp.csr_matrix,
    neighbors: sp.csr_matrix | None,
    relative: NDArray[np.float64],
) -> Data:
    """The problem with what follows from the counts."""
    return Data(counts, columns, panel, reference, *log_shares(reference, panel), relative, neighbors)


class Batch(NamedTuple):
    """Rows of one minibatch, B of the target and R of the reference."""

    rows: Tensor  # [B]
    reference_rows: Tensor  # [R]
    n_cells: int
    n_reference: int


class Batches:
    """Minibatches of ``size`` spatial and ``reference_size`` reference cells (0: all); a pure function of the step.

    An epoch is one pass over the longer side; the shorter one starts again, in a new order, whenever it is through.
    """

    def __init__(self, data: Data, size: int, reference_size: int, seed: int) -> None:
        self.seed = seed
        self.n, self.m = data.counts.shape[0], data.reference.shape[0]
        self.size, self.reference_size = min(size or self.n, self.n), min(reference_size or self.m, self.m)

    def __len__(self) -> int:
        return max(-(-self.n // self.size), -(-self.m // self.reference_size))

    def at(self, step: int) -> Batch:
        """The minibatch of ``step``."""
        rows = np.sort(epoch_order(self.n, self.size, self.seed, step))
        reference = np.sort(epoch_order(self.m, self.reference_size, self.seed + 1, step))
        return Batch(torch.from_numpy(rows), torch.from_numpy(reference), self.n, self.m)

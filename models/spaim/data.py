"""SpaIM's data as matrices, and minibatches of genes."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.svi import epoch_order
from ppl_st.models.common.cells import totals_of


class Data(NamedTuple):
    """One SpaIM problem: n cells x A genes of the target, M cells and K clusters of the reference with G genes; P genes are in both."""

    counts: sp.csr_matrix  # [n, A] target, with the genes that only the target has
    columns: NDArray[np.int64]  # [P] where the shared genes are among the A
    panel: NDArray[np.int64]  # [P] and among the G
    reference: sp.csr_matrix  # [M, G] log1p(count / total over the P genes x median total)
    profiles: NDArray[np.float32]  # [G, K] mean (or median) of ``reference`` in each cluster
    errors: NDArray[np.float32]  # [G, K] standard errors of the profiles
    log_share: NDArray[np.float64]  # [G] log of a gene's counts per count of the P genes, in the reference
    share_variance: NDArray[np.float64]  # [G] its sampling variance
    relative: NDArray[np.float64]  # [n] usual depth of the cell's section, over that of the fit
    neighbors: sp.csr_matrix | None = None  # [n, n] rows sum to 1: mean over the spatial neighbors

    @property
    def totals(self) -> NDArray[np.float64]:
        """[n] counts of each cell over the shared genes."""
        return totals_of(self)


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

r"""The process over the reference's cells (`ppl_st.models.common.process`) beside the closed-form map: what lines cannot say of a gene.

    a_i      z-scores of a cell's panel genes (`closed.py`), scaled to unit length             target cells and reference cells
    p_ig     = phi(a_i) . beta_g, with the neighbors' share that was chosen on inner genes, of unit sd over the target's cells
    score    = ((1 - s) (z_i A)_g + s p_ig) / its sd                                           of an unmeasured gene; s = 0 of a measured one

s is chosen on inner held-out genes. The process is a function of the stored reference, fitted again when a run is loaded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.models.common.cells import log_normalise
from ppl_st.models.common.process import Field, field, some_cells, unit
from ppl_st.models.vista.batches import Data
from ppl_st.models.vista.closed import Floats, Moments, mixed_rows, moments, standardise, totals_of

ROWS = 2048  # cells made dense together


class Weights(NamedTuple):
    """How the process enters the scores [G]: score = own x (z A) + beside x (phi . beta - center); sd of phi . beta over the cells."""

    own: Floats
    beside: Floats
    center: Floats
    curve_sd: Floats


def fit_process(data: Data, genes: NDArray[np.int64], seed: int) -> Field:
    """From the panel to ``genes`` of the reference."""
    rng = np.random.default_rng([seed, 12])
    panel = sp.csr_matrix(data.reference[:, data.panel])
    theirs = moments(panel, data.reference_batch)
    rows = some_cells(panel.shape[0], len(data.panel), rng)
    inside = np.concatenate(list(_unit_rows(panel[rows], data.reference_batch[rows], theirs, panel.shape[1])))
    logs = log_normalise(sp.csr_matrix(data.reference[rows][:, genes]), totals_of(panel[rows]), theirs.depth)
    return field(inside, logs, np.flatnonzero(~np.isin(genes, data.panel)), rng)


def _unit_rows(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments, panel: int) -> Iterator[NDArray[np.float32]]:
    """a [.., P] of cells in blocks: the first ``panel`` of their genes."""
    for i in range(0, counts.shape[0], ROWS):
        yield unit(standardise(counts[i : i + ROWS], batch[i : i + ROWS], m)[:, :panel])


def features_of(found: Field, counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments, panel: int) -> NDArray[np.float32]:
    """phi [n, F] of cells of the target with all their genes, of which the first ``panel`` are shared."""
    return np.concatenate([found.features(rows) for rows in _unit_rows(counts, batch, m, panel)])


def mixed_features(data: Data, mine: Moments, found: Field, mix: float, rows: NDArray[np.int64]) -> Floats:
    """phi [rows, F] of cells of the target, with their neighbors' share."""
    return mixed_rows(
        data.graph, mix, rows, lambda some: features_of(found, data.measured[some], data.batch[some], mine, len(data.panel))
    )


def weigh(phi: Floats, states: Floats, decoder: Floats, found: Field, share: float, panel: NDArray[np.int64]) -> Weights:
    """Of every gene that the target lacks, given features [n, F] and states [n, d] of some cells and A [d, G], of which every score has unit sd."""
    mean, z = phi.mean(0), states - states.mean(0)
    phi = phi - mean
    spread = np.maximum(np.sqrt(np.einsum("fg,fe,eg->g", found.beta, phi.T @ phi / len(phi), found.beta, optimize=True)), 1e-6)
    together = np.einsum("dg,df,fg->g", decoder, z.T @ phi / len(phi), found.beta, optimize=True) / spread
    size = np.maximum(np.sqrt((1 - share) ** 2 + share**2 + 2 * share * (1 - share) * np.clip(together, -1, 1)), 0.1)
    own, beside = (1 - share) / size, share / (size * spread)
    own[panel], beside[panel] = 1.0, 0.0
    return Weights(own, beside, mean @ found.beta, spread)

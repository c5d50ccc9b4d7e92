r"""What the reference's own regression says of a gene's loadings: the other extreme beside the translator.

The translator learns from the shared genes' loadings how the platforms relate, and needs many genes for it. Where they relate simply (the same
tissue by similar means) the reference's cells say more: with R the correlations of its genes over its cells, and P the shared ones,

    z_g = z_P B_g,   B_g = (R_PP + a I)^-1 R_Pg        ridge on standardised log-normalised genes of the reference, a by generalised cross-validation
    b_g = u'z_P B_g / n = t_P B_g                       loadings [q] that the target's cells then have

An unmeasured gene's loadings are (1 - c) W d_g + c b_g; c is chosen on inner held-out genes, like r (`closed.choose`). Inner genes are shared ones:
R_PP is all that the choice needs; one pass over the reference gives b of every gene.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.models.common.cells import DENSE_GENES, log_normalise
from ppl_st.models.spagene.autoencoder import Autoencoder
from ppl_st.models.spagene.data import Data

PENALTIES = np.logspace(-5, 3, 33)
MOST = 0.95  # of the cells' degrees of freedom that a regression may use


class Regression(NamedTuple):
    """The reference's regression among the shared genes, at one penalty for all genes."""

    panel: NDArray[np.int64]  # [P] of the whole problem
    gram: NDArray[np.float64]  # [P, P] correlations over the reference's cells
    penalty: float  # a

    def weights(self, scores: NDArray[np.float64], panel: NDArray[np.int64]) -> NDArray[np.float64]:
        """t_P (R_PP + a I)^-1 [q, P'] for the loadings ``scores`` [q, P'] of some of the shared genes."""
        kept = np.isin(self.panel, panel)
        system = self.gram[np.ix_(kept, kept)] + self.penalty * np.eye(int(kept.sum()))
        return np.asarray(scipy.linalg.solve(system, scores.T, assume_a="pos")).T

    def inner(self, scores: NDArray[np.float64], panel: NDArray[np.int64], genes: NDArray[np.int64]) -> NDArray[np.float64]:
        """Loadings b [q, genes] of shared genes that are not among ``panel``."""
        at = np.array([int(np.flatnonzero(self.panel == gene)[0]) for gene in genes])
        return self.weights(scores, panel) @ self.gram[np.isin(self.panel, panel)][:, at]


def regress(data: Data, other: Autoencoder, parts: Sequence[NDArray[np.int64]]) -> Regression | None:
    """The regression of ``data``'s reference, with the penalty that predicts the shared genes of every part best from the others; None where the
    shared genes are too many for their correlations."""
    p, m = len(data.panel), data.reference.shape[0]
    if p > DENSE_GENES:
        return None
    logs, mean, sd = _standard(data, other)
    shared = logs[:, data.panel]
    mean, sd = mean[data.panel], sd[data.panel]
    gram = ((shared.T @ shared).toarray() / m - np.outer(mean, mean)) / np.outer(sd, sd)
    score = np.zeros(len(PENALTIES))
    for inner in parts:
        kept = np.setdiff1d(np.arange(p), inner)
        values, vectors = scipy.linalg.eigh(gram[np.ix_(kept, kept)])
        values = np.maximum(values, 0.0)
        square = np.square(vectors.T @ gram[np.ix_(kept, inner)])  # [P', inner]
        total = np.maximum(np.diag(gram)[inner], 1e-12)
        for i, a in enumerate(PENALTIES):
            used = 1.0 + (values / (values + a)).sum()
            left = np.maximum(total - ((values + 2 * a) / (values + a) ** 2) @ square, 0.0) / total
            score[i] += left.sum() / (1 - used / m) ** 2 if used < MOST * m else np.inf
    return Regression(data.panel, gram, float(PENALTIES[score.argmin()]))


def loadings_of_all(data: Data, other: Autoencoder, weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """b [q, G] of every gene of the reference, given `Regression.weights` of all shared genes; one pass over its cells."""
    logs, mean, sd = _standard(data, other)
    scaled = weights / sd[data.panel]  # [q, P]
    through = np.asarray(logs[:, data.panel] @ scaled.T) - scaled @ mean[data.panel]  # [M, q]
    return np.asarray((logs.T @ through).T / (logs.shape[0] * sd), dtype=np.float32)  # its mean over cells is 0


def _standard(data: Data, other: Autoencoder) -> tuple[sp.csr_matrix, NDArray[np.float64], NDArray[np.float64]]:
    """Log-normalised reference, and the mean and sd of its genes, as its autoencoder reads it."""
    logs = log_normalise(data.reference, other.shape.totals(data.reference, data.panel), float(other.depth))
    return logs, other.mean.numpy().astype(np.float64), other.sd.numpy().astype(np.float64)

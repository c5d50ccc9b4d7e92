r"""Loadings that a gene would have had it not been measured, and what a regression inside the reference says of them.

OWN SHARE. A measured gene takes part in the directions of the cells. With C the genes' correlation in the target, v_k an eigenvector and l_k its
eigenvalue, a gene's loading is t_kg = sum_h C_gh v_kh / sqrt l_k. Of the diagonal C_gg = 1 only the part that other genes know, 1 - psi_g, would be
there for a gene that nobody measured; so the loadings that are comparable with those of unmeasured genes are

    t_kg (1 - psi_g / l_k),     psi_g = variance of z_g that a ridge on all other genes of the target leaves (generalised cross-validation).

In weak directions (l_k < psi_g) the sign turns: there a gene is mostly noise that the others must be spared. Left as they are, loadings of weak
directions look like noise without any structure, and all that they know is lost.

REGRESSION. In the reference, gene g on the panel genes (correlations c, penalty p by generalised cross-validation) has coefficients
b_g = (c_PP + p I)^-1 c_Pg; applied to the loadings of the target they predict m_kg = sum_h b_gh t_kh, and for a panel gene, from the others only,
m_kg = t_kg - [(c_PP + p I)^-1 t_k]_g / [(c_PP + p I)^-1]_gg. Where target and reference are alike m is all there is to know; where platforms differ
it is wrong. Its weight, one number, is chosen by a pseudo-likelihood (`ppl_st.models.spaim.model.choose`).
"""

import numpy as np
from numpy.typing import NDArray

from ppl_st.models.spaim.kernel import BLOCK, GeneKernel

PENALTIES = np.geomspace(1e-4, 30, 30)
FREEDOM = 0.95  # share of the observations that a ridge may use up


def own_share(scores: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """psi [A] of genes with loadings ``scores`` [q, A] on the principal directions of ``n`` cells; beyond these all variance counts as isotropic."""
    strength = np.square(scores).sum(1)  # l [q]
    share = np.square(scores) / strength[:, None]  # squared eigenvectors [q, A]
    q, genes = scores.shape
    beyond = max((genes - strength.sum()) / max(genes - q, 1), 0.0)
    values, squares = np.append(strength, beyond), np.vstack([share, (1 - share.sum(0)).clip(0)])
    return _left(values, np.append(np.ones(q), genes - q), squares, n)[1].clip(0, 1)


def _left(
    values: NDArray[np.float64], times: NDArray[np.float64], squares: NDArray[np.float64], n: int
) -> tuple[float, NDArray[np.float64]]:
    """Best ridge penalty for predicting every variable from all others, and the variance that it leaves of each.

    The correlation matrix has ``values`` [q], each so many ``times``, squared eigenvectors ``squares`` [q, A], and is of ``n`` observations.
    """
    penalty, best = float(PENALTIES[-1]), np.ones(squares.shape[1])
    for p in PENALTIES:
        inverse = 1 / (values + p)
        freedom = 1 + (times * values * inverse).sum()
        if freedom > FREEDOM * n:
            continue
        left = (inverse**2 * values) @ squares / np.square(inverse @ squares) / (1 - freedom / n) ** 2
        if left.mean() < best.mean():
            penalty, best = float(p), left
    return penalty, best


def positions(panel: NDArray[np.int64], genes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where ``genes`` are in ``panel``, which need not be sorted."""
    order = np.argsort(panel)
    return np.asarray(order[np.searchsorted(panel, genes, sorter=order)])


class Regression:
    """b of the reference, from the genes ``marks`` (among ``panel``); see the file's docstring."""

    def __init__(self, kernel: GeneKernel, marks: NDArray[np.int64], panel: NDArray[np.int64]) -> None:
        self.kernel, self.marks, self.at = kernel, marks, positions(panel, marks)
        values, vectors = np.linalg.eigh(kernel.correlation(marks, marks))
        values = values.clip(0)
        penalty, _ = _left(values, np.ones(len(values)), np.square(vectors).T, kernel.reference.shape[0])
        self.inverse = (vectors / (values + penalty)) @ vectors.T

    def of(self, scores: NDArray[np.float64], genes: NDArray[np.int64]) -> NDArray[np.float64]:
        """m [q, genes] for genes with ``scores`` [q, P] of the panel, as if none of ``genes`` were measured."""
        solved = scores[:, self.at] @ self.inverse  # [q, marks]
        found = np.empty((len(scores), len(genes)))
        for start in range(0, len(genes), BLOCK):
            found[:, start : start + BLOCK] = solved @ self.kernel.correlation(self.marks, genes[start : start + BLOCK])
        place = {int(g): i for i, g in enumerate(self.marks)}
        for j, gene in enumerate(genes):
            if (i := place.get(int(gene))) is not None:
                found[:, j] = scores[:, self.at[i]] - solved[:, i] / self.inverse[i, i]
        return found

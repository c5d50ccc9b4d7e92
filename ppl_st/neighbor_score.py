"""Prediction intervals from the disagreement of spatial neighbors (TISSUE: Sun, Ma, Zou, Nature Methods 2024), for any point prediction.

    score_ig = |y_ig - p_ig| / U_ig,   U_ig = 1 + sqrt(sum_j w_ij (p_jg - p_ig)^2),   w_ij ~ exp(cosine of p_i and p_j) over the neighbors j of i
    interval   p_ig -+ U_ig q,         q the ceil((n + 1) level) / n quantile of the scores of the group of (i, g)

Groups are k-means clusters of genes, then of cells within each. Scores are pooled over cells and genes as if each entry were an independent witness.
They are not: the entries of a gene share its level, so for a *new gene* there is no guarantee, and coverage has to be looked at gene by gene
(BENCHMARKS.md). Here as a competitor of `ppl_st.conformal`, written anew from the equations; differences: the number of clusters is given instead
of chosen by silhouette, and a group with fewer than 100 scores uses all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.errors import UserError

__all__ = ["Intervals", "neighbor_intervals", "neighbor_scale"]

MIN_GROUP = 100
BLOCK_ENTRIES = 1_000_000  # numbers (8 MB) of the unit rows of a block of edges

Floats = NDArray[np.float64]


class Intervals(NamedTuple):
    """Ends of the interval of every entry, [cells, genes]."""

    lower: Floats
    upper: Floats


def neighbor_scale(predicted: Any, graph: sp.csr_matrix) -> Floats:
    """U [cells, genes] of a prediction; 1 for a cell without neighbors."""
    p = np.asarray(predicted, dtype=np.float64)
    w = sp.csr_matrix(graph, dtype=np.float64)
    if p.ndim != 2 or w.shape != (len(p), len(p)):
        raise UserError(f"neighbor_scale: prediction {p.shape}, graph {w.shape}; need [cells, genes] and [cells, cells]")
    unit = p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12)
    rows = np.repeat(np.arange(len(p)), np.diff(w.indptr))
    step = max(1, BLOCK_ENTRIES // max(1, p.shape[1]))  # edges at a time: the rows of all of them are cells x neighbors x genes numbers
    blocks = [slice(start, start + step) for start in range(0, len(rows), step)]
    w.data = np.exp(np.concatenate([np.zeros(0), *(np.einsum("eg,eg->e", unit[rows[one]], unit[w.indices[one]]) for one in blocks)]))
    total = np.asarray(w.sum(1))
    mean, square = (np.asarray(w @ x) / np.where(total > 0, total, 1.0) for x in (p, p**2))
    return 1 + np.sqrt(np.where(total > 0, np.maximum(square - 2 * p * mean + p**2, 0.0), 0.0))


def neighbor_intervals(
    inner: Any,
    truth: Any,
    predicted: Any,
    graph: sp.csr_matrix,
    *,
    level: float = 0.9,
    gene_groups: int = 3,
    cell_groups: int = 3,
    seed: int = 0,
) -> Intervals:
    """Intervals of new genes from the errors on inner held-out ones.

    Parameters
    ----------
    inner, truth
        Held-out prediction of m measured genes and what was measured, [cells, m], on one scale (log1p of counts, say).
    predicted
        Prediction of the new genes on that scale, [cells, genes].
    graph
        Spatial neighbors of the cells.
    level, gene_groups, cell_groups, seed
        Wanted coverage; clusters of genes, and of cells within each; seed of k-means.
    """
    known, y, new = (np.asarray(x, dtype=np.float64) for x in (inner, truth, predicted))
    if known.shape != y.shape or len(new) != len(known) or not 0 < level < 1:
        raise UserError(
            f"neighbor_intervals: inner {known.shape}, truth {y.shape}, predicted {new.shape}, level {level}; need inner and truth [cells, m] alike, "
            "predicted [cells, genes], and a level between 0 and 1"
        )
    for name, values in (("inner", known), ("truth", y), ("predicted", new)):
        if (odd := ~np.isfinite(values)).any():
            at = np.argwhere(odd)[0].tolist()
            raise UserError(f"neighbor_intervals: {name} is not finite at {int(odd.sum())} of {values.size} entries, first at {at}; leave them out")
    both = np.hstack([known, new])
    scale = neighbor_scale(both, graph)
    score, m = np.abs(y - known) / scale[:, : known.shape[1]], known.shape[1]
    genes = _clusters(_standardised(both).T, gene_groups, seed)
    half = np.empty_like(new)
    for gene_group in np.unique(genes):
        columns = np.flatnonzero(genes == gene_group)
        cells = _clusters(both[:, columns], cell_groups, seed)
        for cell_group in np.unique(cells):
            rows, old, fresh = cells == cell_group, columns[columns < m], columns[columns >= m] - m
            pool = score[rows][:, old].ravel()
            q = _quantile(pool if pool.size >= MIN_GROUP else score.ravel(), level)
            half[np.ix_(rows, fresh)] = q * scale[np.ix_(rows, fresh + m)]
    return Intervals(new - half, new + half)


def _quantile(scores: Floats, level: float) -> float:
    rank = int(np.ceil((scores.size + 1) * level))
    return float(np.partition(scores, min(rank, scores.size) - 1)[min(rank, scores.size) - 1]) if rank <= scores.size else float("inf")


def _standardised(x: Floats) -> Floats:
    return (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)


def _clusters(points: Floats, number: int, seed: int) -> NDArray[np.int64]:
    from sklearn.cluster import KMeans

    number = min(number, len(np.unique(points, axis=0)))
    return np.asarray(KMeans(number, n_init=3, random_state=seed).fit_predict(points), dtype=np.int64)

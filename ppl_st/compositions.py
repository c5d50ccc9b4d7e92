"""Compositions of cells and spots against true types: factors have no names, so they are matched first.

Not here: accuracy of genes (`ppl_st.metrics`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ppl_st.errors import UserError
from ppl_st.metrics import js


def match_factors(truth: Any, estimate: Any) -> np.ndarray:
    """For each true type the factor that is matched to it, one to one; int [types], -1 where none is left.

    Maximises the summed overlap truth.T @ estimate of compositions [n, types], [n, factors] (Hungarian).
    """
    from scipy.optimize import linear_sum_assignment

    t, e = np.asarray(truth, dtype=np.float64), np.asarray(estimate, dtype=np.float64)
    if t.ndim != 2 or e.ndim != 2 or len(t) != len(e):
        raise UserError(f"match_factors: truth has shape {t.shape}, estimate {e.shape}; need the same cells")
    matched = np.full(t.shape[1], -1)
    types, factors = linear_sum_assignment(t.T @ e, maximize=True)
    matched[types] = factors
    return matched


def matched_accuracy(truth: Any, estimate: Any) -> float:
    """Share of cells whose largest factor is the one matched (as labels) to their largest true type."""
    t, e = (np.asarray(values) for values in (truth, estimate))
    labels, found = t.argmax(1), e.argmax(1)
    matched = match_factors(np.eye(t.shape[1])[labels], np.eye(e.shape[1])[found])
    return float((matched[labels] == found).mean())


def proportion_js(truth: Any, estimate: Any, matched: np.ndarray | None = None) -> np.ndarray:
    """Jensen-Shannon divergence in bits of proportions [spots, types] and [spots, factors]; [spots].

    ``matched`` comes from `match_factors`.
    Factors without a type count as types that are absent. A spot with an all-zero side gets 1, the largest.
    """
    t, e = (np.asarray(values, dtype=np.float64) for values in (truth, estimate))
    if matched is not None:
        rest = np.setdiff1d(np.arange(e.shape[1]), matched)
        t = np.hstack([t, np.zeros((len(t), rest.size))])
        e = np.hstack([np.where(matched >= 0, e[:, matched], 0.0), e[:, rest]])
    return js(t.T, e.T) / np.log(2.0)

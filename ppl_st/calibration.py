"""Calibration of count forecasts: randomised PIT and randomised coverage, without drawing random numbers.

Shapes: ``truth`` and PIT bounds are [cells, genes], draws [S, cells, genes]. Counts are integers with
probability mass, so a plain quantile interval of a sparse gene covers far more than its level even under the
true model; coverage here is the expected share of randomised PIT values inside the central interval.

Not here: the conformal layer, simulation-based calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppl_st.errors import UserError

__all__ = ["Coverage", "coverage", "pit_bounds"]


class Coverage(NamedTuple):
    """Randomised coverage of central intervals: ``per_gene`` [levels, genes] and ``overall`` [levels]."""

    levels: np.ndarray
    per_gene: np.ndarray
    overall: np.ndarray


def pit_bounds(draws: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the PIT mass of each truth among S draws: P(X < x) and P(X <= x), each like ``truth``.

    The truth is ranked among the draws, (below) / (S + 1) to (below + ties + 1) / (S + 1): when it is
    exchangeable with the draws the randomised PIT is then exactly uniform for any S.
    """
    x, y = np.asarray(draws), np.asarray(truth)
    if x.shape[1:] != y.shape:
        raise UserError(f"pit_bounds: draws have shape {x.shape}, truth {y.shape}; need [S, ...] and [...]")
    s = x.shape[0]
    return (x < y).sum(0) / (s + 1.0), ((x <= y).sum(0) + 1.0) / (s + 1.0)


def coverage(pit_low: Any, pit_high: Any, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> Coverage:
    """Expected randomised coverage of the central intervals, without drawing random numbers.

    ``pit_low`` and ``pit_high`` [cells, genes] are P(X < x) and P(X <= x) of the observed count x under its
    predictive distribution, ``levels`` nominal levels in (0, 1). The randomised PIT is u ~ Uniform(pit_low,
    pit_high) and a count is covered at level l when u lies in [(1 - l) / 2, (1 + l) / 2]. Averaging over u
    gives the share of [pit_low, pit_high] inside that interval, which is what is averaged over cells. Under a
    perfect forecaster its expectation is l exactly. A zero-width PIT (continuous data) counts as inside or
    outside.
    """
    low, high = np.asarray(pit_low, dtype=np.float64), np.asarray(pit_high, dtype=np.float64)
    level = np.asarray(levels, dtype=np.float64)
    if low.shape != high.shape or low.ndim != 2:
        raise UserError(f"coverage: pit_low is {low.shape}, pit_high {high.shape}; need one [cells, genes]")
    if not ((low >= -1e-9) & (high <= 1 + 1e-9) & (low <= high)).all():
        raise UserError("coverage: need 0 <= pit_low <= pit_high <= 1 (P(X < x) and P(X <= x))")
    if not ((level > 0) & (level < 1)).all():
        raise UserError(f"coverage: levels {level.tolist()} must lie strictly between 0 and 1")
    width = high - low
    shares = []
    for one in level:
        a, b = 0.5 - 0.5 * one, 0.5 + 0.5 * one
        overlap = np.clip(np.minimum(high, b) - np.maximum(low, a), 0.0, None)
        point = ((low >= a) & (low <= b)).astype(np.float64)
        shares.append(np.divide(overlap, width, out=point, where=width > 0).mean(0))
    per_gene = np.stack(shares)
    return Coverage(level, per_gene, per_gene.mean(1))

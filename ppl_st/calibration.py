"""Calibration of count forecasts: randomised PIT and coverage without drawing random numbers, and a conformal layer over genes.

Shapes: ``truth`` and PIT bounds are [cells, genes], draws [S, cells, genes]. Counts are integers with
probability mass, so a plain quantile interval of a sparse gene covers far more than its level even under the
true model; coverage here is the expected share of randomised PIT values inside the central interval.

The conformal layer treats *genes* as the exchangeable units: the cells of one gene share its gain and dispersion, so however many they are
they count as one observation of "how wrong is a gene". Inner held-out genes g = 1..m give curves c_g(l), the coverage of the nominal level l.
The nominal level for a new gene is

    l* = min { l : (m mean_g (1 - c_g(l)) + 1) / (m + 1) <= 1 - level }

Then E[coverage of a new gene] >= level for any m, whatever the forecaster, as long as the new gene is exchangeable with the inner ones
(conformal risk control: Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024, Theorem 1; the miscoverage falls with l and lies in [0, 1]). The
"+ 1" costs up to 1 / (m + 1) of over-coverage; ``guarantee=False`` leaves it out. The guarantee is for the mean over genes, not for each gene.

Not here: simulation-based calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ppl_st.errors import UserError

__all__ = ["GRID", "Coverage", "Recalibration", "conformal_level", "coverage", "pit_bounds", "recalibration"]

# Nominal levels of a coverage curve.
GRID = np.concatenate([np.arange(0.02, 0.98, 0.02), np.arange(0.98, 0.999, 0.002), [0.999]])
STRATUM = 50  # inner genes that a stratum needs


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


def coverage(
    pit_low: Any, pit_high: Any, levels: Sequence[float] | np.ndarray = (0.5, 0.8, 0.9, 0.95)
) -> Coverage:
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


def conformal_level(curves: Any, level: float, *, guarantee: bool = True) -> float:
    """Nominal level at which a new gene's central interval covers ``level`` on average.

    Parameters
    ----------
    curves
        Coverage of every inner gene at every nominal level of `GRID`, [levels, genes].
    level
        Wanted coverage, in (0, 1).
    guarantee
        Whether the finite-sample bound of the module's docstring holds; else the inner genes' own mean coverage reaches ``level``.

    Returns
    -------
    float
        A level of `GRID`; 1 (no finite interval will do) if even the widest covers too little.
    """
    table = np.asarray(curves, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != len(GRID) or table.shape[1] == 0:
        raise UserError(
            f"conformal_level: curves have shape {table.shape}; need [{len(GRID)}, genes] with at least one gene"
        )
    if not 0 < level < 1:
        raise UserError(f"conformal_level: level {level} must lie strictly between 0 and 1")
    genes = table.shape[1]
    miss = 1 - np.maximum.accumulate(table.mean(1))
    bound = (genes * miss + 1) / (genes + 1) if guarantee else miss
    enough = np.flatnonzero(bound <= 1 - level + 1e-12)
    return float(GRID[enough[0]]) if enough.size else 1.0


class Recalibration(NamedTuple):
    """What inner held-out genes say about the intervals of new genes; plain numbers, stored with a run."""

    level: float  # coverage that is wanted
    edges: list[float]  # values of the covariate between the strata
    nominal: list[float]  # nominal level of each stratum
    genes: int  # inner genes
    raw_coverage: float  # mean coverage of the uncorrected interval on them
    guarantee: bool

    def nominal_of(self, covariate: Any) -> np.ndarray:
        """Nominal level for genes with these values of the covariate, like ``covariate``."""
        return np.asarray(self.nominal)[np.searchsorted(self.edges, np.asarray(covariate, dtype=np.float64))]


def recalibration(curves: Any, covariate: Any, level: float = 0.9, *, guarantee: bool = True) -> Recalibration:
    """`conformal_level` in strata of a covariate, `STRATUM` inner genes or more in each (with fewer genes there is one stratum).

    ``curves`` [levels, genes] as in `conformal_level`; ``covariate`` [genes] is known of a new gene too, such as its mean count in the reference.
    """
    table, known = np.asarray(curves, dtype=np.float64), np.asarray(covariate, dtype=np.float64)
    if known.shape != table.shape[1:]:
        raise UserError(f"recalibration: {table.shape[1]} curves but {known.size} values of the covariate")
    strata = max(1, known.size // STRATUM)
    edges = [float(np.quantile(known, k / strata)) for k in range(1, strata)]
    of = np.searchsorted(edges, known)
    nominal = [conformal_level(table[:, of == k], level, guarantee=guarantee) for k in range(strata)]
    raw = float(np.mean([np.interp(level, GRID, curve) for curve in table.T]))
    return Recalibration(level, edges, nominal, known.size, raw, guarantee)

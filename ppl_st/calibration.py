"""How good are the forecasts of counts: coverage, PIT, risk against trust, where the variance comes from. Correcting them is `ppl_st.conformal`.

Shapes: ``truth`` and PIT bounds are [cells, genes], draws [S, cells, genes]. Counts are integers with
probability mass, so a plain quantile interval of a sparse gene covers far more than its level even under the
true model; coverage here is the expected share of randomised PIT values inside the central interval.

Genes are the units of every bootstrap interval: the cells of one gene share its level and dispersion, so however many they are they count as one
observation of "how wrong is a gene". ``predict(truth=...)`` gives the PIT bounds of every entry as layers ``pit_low`` and ``pit_high``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ppl_st.errors import UserError

__all__ = [
    "GRID", "LEVELS", "Coverage", "RiskCoverage", "coverage", "coverage_table", "interval_coverage", "pit_bounds", "pit_histogram", "randomised_pit",
    "risk_coverage", "score_columns", "variance_decomposition",
]  # fmt: skip

LEVELS = (0.5, 0.8, 0.9, 0.95)

# Nominal levels of a coverage curve.
GRID = np.concatenate([np.arange(0.02, 0.98, 0.02), np.arange(0.98, 0.999, 0.002), [0.999]])


class Coverage(NamedTuple):
    """Randomised coverage of central intervals: ``per_gene`` [levels, genes] and ``overall`` [levels]."""

    levels: np.ndarray
    per_gene: np.ndarray
    overall: np.ndarray


def score_columns(scores: Any, truth: Any, genes: pd.Index, ends: np.ndarray | None, maps: np.ndarray | None) -> pd.DataFrame:
    """Table [genes] of `ppl_st.posterior.Run.score` from the `ppl_st.inference.predict.Scores` of a sparse truth [cells, genes].

    ``ends`` and ``maps``, of a recalibrated run: `ppl_st.conformal.Recalibration.ends_of` and ``maps_of`` these genes.
    """
    table = pd.DataFrame(index=genes)
    table["mean_count"] = np.asarray(truth.mean(0)).ravel()
    table["log_score"] = scores.log_prob.mean(0, dtype=np.float64)
    table["crps"] = scores.crps.mean(0, dtype=np.float64)
    covered = coverage(scores.pit_low, scores.pit_high, LEVELS)
    for level, per_gene in zip(LEVELS, covered.per_gene, strict=True):
        table[f"coverage_{round(100 * level)}"] = per_gene
    if ends is not None and maps is not None and scores.corrected_crps is not None:
        table["recalibrated_crps"] = scores.corrected_crps.mean(0, dtype=np.float64)
        table["recalibrated_coverage"] = interval_coverage(scores.pit_low, scores.pit_high, ends)
    return table


def pit_bounds(draws: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the PIT mass of each truth among S draws: P(X < x) and P(X <= x), each like ``truth``.

    The truth is ranked among the draws, (below) / (S + 1) to (below + ties + 1) / (S + 1): when it is
    exchangeable with the draws the randomised PIT is then exactly uniform for any S. A truth that is NaN has no rank and is refused.
    """
    x, y = np.asarray(draws), np.asarray(truth)
    if x.shape[1:] != y.shape:
        raise UserError(f"pit_bounds: draws have shape {x.shape}, truth {y.shape}; need [S, ...] and [...]")
    for name, values in (("truth is", y), ("draws are", x)):
        if (odd := np.isnan(values)).any():
            where = np.argwhere(odd)[0].tolist()
            raise UserError(f"pit_bounds: the {name} NaN at {int(odd.sum())} of {values.size} entries, first at {where}; leave them out")
    s = x.shape[0]
    return (x < y).sum(0) / (s + 1.0), ((x <= y).sum(0) + 1.0) / (s + 1.0)


def coverage(
    pit_low: Any, pit_high: Any, levels: Sequence[float] | np.ndarray = LEVELS
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
    per_gene = np.stack([_mass(low, high, 0.5 - 0.5 * one, 0.5 + 0.5 * one).mean(0) for one in level])
    return Coverage(level, per_gene, per_gene.mean(1))


def _mass(low: np.ndarray, high: np.ndarray, a: Any, b: Any) -> np.ndarray:
    """Share of each [low, high] that lies in [a, b]; a point is in or out."""
    width = high - low
    overlap = np.clip(np.minimum(high, b) - np.maximum(low, a), 0.0, None)
    point = ((low >= a) & (low <= b)).astype(np.float64)
    return np.divide(overlap, width, out=point, where=width > 0)


def interval_coverage(pit_low: Any, pit_high: Any, ends: Any) -> np.ndarray:
    """Expected randomised coverage of the interval between two probabilities of each gene's predictive, ``ends`` [2, genes]; [genes]."""
    low, high, (a, b) = np.asarray(pit_low, dtype=np.float64), np.asarray(pit_high, dtype=np.float64), np.asarray(ends)
    return _mass(low, high, a, b).mean(0)


def coverage_table(
    pit_low: Any,
    pit_high: Any,
    groups: Any = None,
    *,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """`coverage` overall and in each group of cells, with 95 % bootstrap intervals over genes.

    Parameters
    ----------
    pit_low, pit_high
        As in `coverage`, [cells, genes].
    groups
        Label of every cell (a cell type, a region); None = all cells together only.
    levels, seed, resamples
        Nominal levels; of the bootstrap, which resamples the same genes in every group and at every level.

    Returns
    -------
    DataFrame
        Columns group (first "all", or "all cells" where a group has that name), level, coverage, lo, hi, cells, genes. lo and hi are NaN of a
        single gene, which says nothing of others; below 10 genes the intervals are too short.
    """
    low, high = np.asarray(pit_low), np.asarray(pit_high)
    labels = np.full(len(low), "all") if groups is None else np.asarray(groups).astype(str)
    if labels.shape != low.shape[:1]:
        raise UserError(f"coverage_table: {len(labels)} group labels for {len(low)} cells")
    names, overall = [] if groups is None else np.unique(labels).tolist(), "all"
    while overall in names:
        overall += " cells"
    parts = [(overall, slice(None))] + [(name, labels == name) for name in names]
    pick = np.random.default_rng([seed, 21]).integers(0, low.shape[1], (resamples, low.shape[1]))
    rows = []
    for name, cells in parts:
        found = coverage(low[cells], high[cells], levels)
        for level, per_gene in zip(levels, found.per_gene, strict=True):
            lo, hi = np.quantile(per_gene[pick].mean(1), [0.025, 0.975]) if len(per_gene) > 1 else (np.nan, np.nan)
            rows.append((name, level, per_gene.mean(), lo, hi, len(low[cells]), len(per_gene)))
    return pd.DataFrame(rows, columns=["group", "level", "coverage", "lo", "hi", "cells", "genes"])


def pit_histogram(pit_low: Any, pit_high: Any, bins: int = 20) -> np.ndarray:
    """Density of the randomised PIT of every gene in equal bins, [bins, genes]; 1 everywhere under a perfect forecaster (in expectation).

    No random numbers: each count spreads its mass evenly over [pit_low, pit_high]. High at both ends: intervals too short; high in the
    middle: too long; leaning to the right: the truth is larger than forecast.
    """
    low, high = np.asarray(pit_low, dtype=np.float64), np.asarray(pit_high, dtype=np.float64)
    edges = np.linspace(0, 1, bins + 1)
    upper = np.r_[edges[1:-1], 1.5]  # a point at 1 belongs to the last bin, at an inner edge to one bin only
    width, density = np.where(high > low, high - low, 1.0), []
    for a, b, top in zip(edges[:-1], edges[1:], upper, strict=True):  # one after the other: all at once would be bins x cells x genes
        overlap = np.clip(np.minimum(high, b) - np.maximum(low, a), 0.0, None)
        density.append(np.where(low == high, (low < top) & (low >= a), overlap / width).mean(0))
    return bins * np.stack(density)


def randomised_pit(pit_low: Any, pit_high: Any, seed: int = 0) -> np.ndarray:
    """One draw of the randomised PIT, like ``pit_low``: uniform on (0, 1) if the forecasts are right, also for counts."""
    low, high = np.asarray(pit_low, dtype=np.float64), np.asarray(pit_high, dtype=np.float64)
    return low + np.random.default_rng([seed, 22]).random(low.shape) * (high - low)


class RiskCoverage(NamedTuple):
    """Mean ``risk`` of the share ``retained`` of the genes that are trusted most, both [genes]; ``area`` under the curve, smaller is better."""

    retained: np.ndarray
    risk: np.ndarray
    area: float


def risk_coverage(risk: Any, trust: Any) -> RiskCoverage:
    """Does a score of trust say which genes to believe?

    ``risk`` [genes] is what went wrong (1 - R2, say), ``trust`` [genes] the score by which genes are kept, the largest first (equal scores share
    their mean risk). The area lies between that of the ranking by risk itself and that of its reverse; a useless score has the mean risk. Hold it
    against the ranking by mean expression: deep genes are easier, and every score that knows only this is no news.
    """
    r, t = np.asarray(risk, dtype=np.float64).ravel(), np.asarray(trust, dtype=np.float64).ravel()
    if r.shape != t.shape or not r.size or not (np.isfinite(r).all() and np.isfinite(t).all()):
        raise UserError(f"risk_coverage: {r.size} risks and {t.size} scores; need one finite value of each for every gene")
    _, tied = np.unique(-t, return_inverse=True)
    mean = np.bincount(tied, r) / np.bincount(tied)
    curve = np.cumsum(mean[np.sort(tied)]) / np.arange(1, r.size + 1)
    return RiskCoverage(np.arange(1, r.size + 1) / r.size, curve, float(curve.mean()))


def variance_decomposition(rate_mean: Any, rate_sd: Any, count_sd: Any) -> pd.DataFrame:
    """Where the predicted variance of a gene's counts over cells comes from: DataFrame [genes] x between, epistemic, noise.

    With layers of `Run.predict`, [cells, genes]: ``between`` = variance over cells of the mean rate (the pattern that is predicted), ``epistemic`` =
    mean over cells of rate_sd^2 (what the model does not know: state, level), ``noise`` = mean of count_sd^2 - rate_sd^2 (what no model could
    know). By the law of total variance they add up to the predictive variance of a count in a cell picked at random.

    The split does not say how the doubt is shared between cells. Where it is each cell's own, between / sum is the squared correlation with the
    counts that the model expects of its prediction. Doubt about the gene's level is shared by all cells and lowers no correlation: where that is all,
    the expected squared correlation is about between / (between + noise), however large the epistemic part. ``noise`` is a mean over draws of
    the dispersion as well: a few draws of a heavy tail can be most of it. ``var["trust"]`` leaves out level and dispersion.
    """
    mean, sd, count = (np.asarray(layer, dtype=np.float64) for layer in (rate_mean, rate_sd, count_sd))
    if not mean.shape == sd.shape == count.shape or mean.ndim != 2:
        raise UserError(
            f"variance_decomposition: rate_mean {mean.shape}, rate_sd {sd.shape}, count_sd {count.shape}; need three layers [cells, genes] alike"
        )
    between, epistemic = mean.var(0), (sd**2).mean(0)
    noise = np.maximum((count**2).mean(0) - epistemic, 0.0)
    return pd.DataFrame({"between": between, "epistemic": epistemic, "noise": noise})

"""Accuracy and proper scores: plain functions on arrays, one value per gene.

Shapes: ``truth`` and ``estimate`` are dense [cells, genes] blocks (any real dtype, float64 inside); the
answer is [genes]. Rules held everywhere:

- A constant truth or estimate has correlation 0, never NaN, and is never skipped from a mean.
- ``raw`` means counts. ``log`` means log1p(counts / cell total over the training genes x median of that
  total) (`log1p_normalise`): the scale on which depth alone explains little.
- Nothing is averaged over genes except in `bootstrap_mean`.

Not here: coverage (`ppl_st.calibration`), running methods, splitting genes, plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import rankdata

from ppl_st.errors import UserError

Scale = Literal["count", "log", "as_is"]

# A range below this share of the largest magnitude is rounding noise of float32: the gene is constant.
_CONSTANT_RANGE = 1e-6
# exp(50) is beyond any count; it only keeps an absurd log-scale estimate finite.
_LARGEST_LOG = 50.0
_BLOCK_ENTRIES = 2_000_000


# --- helpers
def _pair(truth: Any, estimate: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both blocks as float64 [cells, genes], checked."""
    t = np.asarray(truth, dtype=np.float64)
    e = np.asarray(estimate, dtype=np.float64)
    if t.ndim != 2 or t.shape != e.shape:
        raise UserError(
            f"metrics: truth has shape {t.shape}, estimate {e.shape}; need the same [cells, genes] block"
        )
    if t.shape[0] == 0:
        raise UserError("metrics: no cells to compare")
    for name, values in (("truth", t), ("estimate", e)):
        bad = ~np.isfinite(values)
        if bad.any():
            columns = np.flatnonzero(bad.any(0))
            raise UserError(
                f"metrics: {name} holds {int(bad.sum())} non-finite values, columns {columns[:5].tolist()} "
                f"({len(columns)} in all); mend or leave out these genes"
            )
    return t, e


def is_constant(values: Any) -> np.ndarray:
    """True for genes whose range over cells is below a millionth of the largest magnitude; bool [genes]."""
    v = np.asarray(values, dtype=np.float64)
    low, high = v.min(0), v.max(0)
    return high - low <= _CONSTANT_RANGE * np.maximum(np.abs(low), np.abs(high))


def _cosine_of_centered(t: np.ndarray, e: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Cosine of the centered columns where ``usable``, else 0; [genes]."""
    t = t - t.mean(0)
    e = e - e.mean(0)
    # Scaling first keeps squares of very small or very large estimates inside float64.
    t /= np.maximum(np.abs(t).max(0), np.finfo(np.float64).tiny)
    e /= np.maximum(np.abs(e).max(0), np.finfo(np.float64).tiny)
    norm = np.sqrt((t * t).sum(0) * (e * e).sum(0))
    cosine = (t * e).sum(0) / np.where(norm > 0, norm, 1.0)
    return np.where(usable, np.clip(cosine, -1.0, 1.0), 0.0)


# --- correlations
def pcc(truth: Any, estimate: Any) -> np.ndarray:
    """Pearson correlation over cells, [genes]; constants count as 0."""
    t, e = _pair(truth, estimate)
    return _cosine_of_centered(t, e, ~(is_constant(t) | is_constant(e)))


def scc(truth: Any, estimate: Any) -> np.ndarray:
    """Spearman correlation over cells (average ranks for ties), [genes]; constants count as 0."""
    t, e = _pair(truth, estimate)
    usable = ~(is_constant(t) | is_constant(e))
    return _cosine_of_centered(rankdata(t, axis=0), rankdata(e, axis=0), usable)


def r2(truth: Any, estimate: Any) -> np.ndarray:
    """Squared Pearson correlation, [genes] (the R2 of SIID; not the coefficient of determination)."""
    return pcc(truth, estimate) ** 2


def partial_pcc(truth: Any, estimate: Any, covariates: Any) -> np.ndarray:
    """Pearson correlation of what a linear fit on ``covariates`` leaves of truth and estimate, [genes].

    ``covariates`` is [cells] or [cells, q]. With the log total of the training genes this is the
    depth-controlled correlation: an estimate that only knows how deep a cell was sequenced gets 0. A side
    that the covariates explain up to rounding counts as constant.
    """
    t, e = _pair(truth, estimate)
    c = np.asarray(covariates, dtype=np.float64)
    c = c[:, None] if c.ndim == 1 else c
    if c.ndim != 2 or len(c) != len(t):
        raise UserError(
            f"metrics: covariates have shape {c.shape}; expected {len(t)} cells in the first axis"
        )
    c = c - c.mean(0)
    basis, sizes, _ = np.linalg.svd(c / np.maximum(np.abs(c).max(0), 1e-300), full_matrices=False)
    basis = basis[:, sizes > 1e-10 * max(sizes.max(), 1e-300)]
    usable = ~(is_constant(t) | is_constant(e))
    residuals = []
    for values in (t, e):
        centered = values - values.mean(0)
        left = centered - basis @ (basis.T @ centered)
        usable &= (left * left).sum(0) > _CONSTANT_RANGE**2 * (centered * centered).sum(0)
        residuals.append(left)
    return _cosine_of_centered(residuals[0], residuals[1], usable)


# --- distances, named by their source
def rmse(truth: Any, estimate: Any) -> np.ndarray:
    """Root mean squared error over cells, [genes], in the units of the input."""
    t, e = _pair(truth, estimate)
    return np.sqrt(((t - e) ** 2).mean(0))


def rmse_z(truth: Any, estimate: Any) -> np.ndarray:
    """RMSE after z-scoring both sides over cells (population sd), [genes]: identical to sqrt(2 - 2 pcc).

    SpaIM, SpaGene and VISTA report it beside PCC, though it holds no further information. A constant side has
    pcc 0 here and so scores sqrt(2); a z-score that maps constants to zeros would reward them with 1, better
    than most methods.
    """
    return np.sqrt(2.0 - 2.0 * pcc(truth, estimate))


def _ssim(t: np.ndarray, e: np.ndarray, c1: float, c2: float, *, ddof_cov: int) -> np.ndarray:
    mt, me = t.mean(0), e.mean(0)
    cov = ((t - mt) * (e - me)).sum(0) / max(t.shape[0] - ddof_cov, 1)
    luminance = (2 * mt * me + c1) / (mt**2 + me**2 + c1)
    return luminance * (2 * cov + c2) / (t.var(0) + e.var(0) + c2)


def ssim_li(truth: Any, estimate: Any) -> np.ndarray:
    """Global structural similarity of Li et al. 2022 (also the code of SpaIM and VISTA), [genes], in [-1, 1].

    Each side is divided by its own maximum (left alone when that is not positive); C1 = .01^2, C2 = .03^2,
    all moments with divisor n. Luminance x contrast x structure with C3 = C2 / 2 reduces to the two-factor
    form used here.
    """
    t, e = _pair(truth, estimate)
    top_t, top_e = t.max(0), e.max(0)
    t = t / np.where(top_t > 0, top_t, 1.0)
    e = e / np.where(top_e > 0, top_e, 1.0)
    return _ssim(t, e, 0.01**2, 0.03**2, ddof_cov=0)


def ssim_spagene(truth: Any, estimate: Any) -> np.ndarray:
    """Structural similarity as SpaGene computes it, [genes]; much larger than `ssim_li` on the same data.

    Both sides are scaled to [0, 1] by their range, C1 = .01 and C2 = .03 are not squared, and the covariance
    has divisor n - 1 while the variances have n. Not comparable with values of other papers.
    """
    scaled = []
    for values in _pair(truth, estimate):
        low, width = values.min(0), np.ptp(values, axis=0)
        scaled.append((values - low) / np.where(width > 0, width, 1.0))
    return _ssim(scaled[0], scaled[1], 0.01, 0.03, ddof_cov=1)


def js(truth: Any, estimate: Any) -> np.ndarray:
    """Jensen-Shannon divergence over cells in nats, [genes], between 0 and ln 2.

    Each gene is divided by its sum over cells first; negative values count as 0. It is the divergence, not
    its square root (the "distance" of scipy). A gene whose truth or estimate sums to 0 is no distribution and
    gets ln 2.
    """
    t, e = (np.maximum(values, 0.0) for values in _pair(truth, estimate))
    sum_t, sum_e = t.sum(0), e.sum(0)
    empty = (sum_t <= 0) | (sum_e <= 0)
    t = t / np.where(sum_t > 0, sum_t, 1.0)
    e = e / np.where(sum_e > 0, sum_e, 1.0)
    middle = 0.5 * (t + e)

    def kl(p: np.ndarray) -> np.ndarray:
        on = p > 0
        ratio = np.divide(p, middle, out=np.ones_like(p), where=on)
        return (p * np.log(ratio)).sum(0)

    divergence = 0.5 * (kl(t) + kl(e))
    return np.where(empty, np.log(2.0), np.clip(divergence, 0.0, np.log(2.0)))


# --- ceilings and proper scores
def poisson_ceiling(counts: Any) -> np.ndarray:
    """Best raw PCC that any rate could reach if ``counts`` [cells, genes] are Poisson around it, [genes].

    Var(count) = Var(rate) + E[rate], and the best estimate is the rate itself, so PCC^2 <= (var - mean) /
    var; clipped to [0, 1]. ``var`` has divisor n - 1. It bounds the expectation: real counts that are
    over-dispersed around their rate have a lower true ceiling, and a chance sample may exceed it. Constant
    genes get 0.
    """
    x = np.asarray(counts, dtype=np.float64)
    mean, var = x.mean(0), x.var(0, ddof=min(1, len(x) - 1))
    return np.sqrt(np.clip((var - mean) / np.where(var > 0, var, 1.0), 0.0, 1.0))


def poisson_ceiling_of_rate(rate: Any) -> np.ndarray:
    """The same ceiling from a known true ``rate`` [cells, genes]: sqrt(Var / (Var + mean)), [genes]."""
    x = np.asarray(rate, dtype=np.float64)
    total = x.var(0) + x.mean(0)
    return np.sqrt(x.var(0) / np.where(total > 0, total, 1.0))


def crps_from_draws(draws: Any, truth: Any) -> np.ndarray:
    """Continuous ranked probability score from predictive draws, lower is better, in the units of the counts.

    ``draws`` [S, ...] are independent draws of the predictive distribution of ``truth`` [...]; the answer is
    like ``truth``: mean |x_s - y| - 1/2 mean over s != s' of |x_s - x_s'|, the second term from the sorted
    draws. This "fair" form (Ferro 2014) is unbiased in S, so runs with unlike numbers of draws compare; it
    may dip below 0.
    """
    x = np.sort(np.asarray(draws, dtype=np.float64), axis=0)
    y = np.asarray(truth, dtype=np.float64)
    if x.shape[1:] != y.shape or x.shape[0] < 2:
        raise UserError(f"crps: draws have shape {x.shape}, truth {y.shape}; need [S >= 2, ...] and [...]")
    s = x.shape[0]
    weights = 2.0 * np.arange(1, s + 1) - s - 1.0
    spread = np.tensordot(weights, x, axes=1) / (s * (s - 1))
    return np.abs(x - y).mean(0) - spread


# --- scales and tables
def median_total(total: Any) -> float:
    """Median of the positive cell totals: the common depth to which cells are scaled."""
    t = np.asarray(total, dtype=np.float64)
    if not (t > 0).any():
        raise UserError(
            "metrics: no cell has a count in the training genes; check the gene names of both sides"
        )
    return float(np.median(t[t > 0]))


def log1p_normalise(counts: Any, total: Any) -> Any:
    """log1p(counts / cell total x median positive total): the ``log`` truth of the protocol.

    ``counts`` [cells, genes] is dense or sparse and may hold any genes; ``total`` [cells] is the cell's total
    over the TRAINING genes, so that the truth does not scale itself. The answer is like ``counts``: a float64
    array, or CSR float32. Cells with total 0 have no depth and become rows of zeros.
    """
    t = np.asarray(total, dtype=np.float64)
    factor = np.where(t > 0, median_total(t) / np.where(t > 0, t, 1.0), 0.0)
    if sp.issparse(counts):
        return _log1p_of_scaled_rows(counts, factor)
    return np.log1p(np.asarray(counts, dtype=np.float64) * factor[:, None])


def _log1p_of_scaled_rows(matrix: Any, factor: np.ndarray) -> sp.csr_matrix:
    scaled = sp.csr_matrix(matrix.multiply(factor[:, None]), dtype=np.float32)
    scaled.data = np.log1p(scaled.data)
    return scaled


def _on_both_scales(estimate: np.ndarray, factor: np.ndarray, scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """(raw, log) versions of an estimate; factor [cells] = median total / total, NaN where that is 0."""
    e = np.asarray(estimate, dtype=np.float64)
    if scale == "as_is":
        return e, e
    if scale == "log":
        depth = np.where(np.isfinite(factor), 1.0 / factor, 0.0)
        return np.expm1(np.clip(e, 0.0, _LARGEST_LOG)) * depth[:, None], e
    return e, np.log1p(np.maximum(e, 0.0) * np.nan_to_num(factor)[:, None])


def score_table(
    truth: Any,
    estimate: np.ndarray | Callable[[slice], np.ndarray],
    training_total: Any,
    genes: Sequence[str] | np.ndarray,
    *,
    scale: Scale = "count",
    block_entries: int = _BLOCK_ENTRIES,
) -> pd.DataFrame:
    """Every accuracy metric of one method for its held-out genes, on raw counts and on the ``log`` scale.

    Parameters
    ----------
    truth
        [cells, genes] held-out raw counts, sparse (or dense).
    estimate
        [cells, genes] array, or a function from a slice of gene positions to that dense block (nothing larger
        is built).
    training_total
        [cells] total over the training genes.
    genes
        Names, the index of the table.
    scale
        What the estimate is: ``"count"`` (expected counts), ``"log"`` (an estimate of the log truth) or
        ``"as_is"`` (a bare score, compared unchanged with both truths; its js and rmse mean nothing). Each is
        converted to the other scale with the cell's training total; negative estimates count as 0 in that
        conversion only.
    block_entries
        Largest cells x genes block held at once.

    Returns
    -------
    DataFrame [genes] with ``mean_count``, ``raw_ceiling`` (`poisson_ceiling`), and ``pcc, scc, r2,
    partial_pcc, ssim, js, rmse, constant`` with prefixes ``log_`` and ``raw_``; ``constant`` marks genes
    whose correlation is 0 because truth or estimate does not vary; ssim is `ssim_li`. ``partial_pcc`` is
    given the log training total, on raw counts given the total itself as well (depth acts linearly there).
    Cells with training total 0 have no depth: log columns and partial correlations leave them out.
    """
    matrix = sp.csc_matrix(truth)
    total = np.asarray(training_total, dtype=np.float64)
    if matrix.shape != (len(total), len(genes)):
        raise UserError(f"score_table: truth is {matrix.shape}; got {len(total)} totals, {len(genes)} genes")
    if not callable(estimate) and np.shape(estimate) != matrix.shape:
        raise UserError(f"score_table: estimate has shape {np.shape(estimate)}, truth {matrix.shape}")
    with_depth = total > 0
    factor = np.where(with_depth, median_total(total) / np.where(with_depth, total, 1.0), np.nan)
    width = max(1, block_entries // max(len(total), 1))
    parts = []
    for start in range(0, len(genes), width):
        where = slice(start, min(start + width, len(genes)))
        block = estimate(where) if callable(estimate) else estimate[:, where]
        counts = np.asarray(matrix[:, where].toarray(), dtype=np.float64)
        parts.append(_score_block(counts, block, total, factor, scale))
    return pd.concat(parts, ignore_index=True).set_index(pd.Index(np.asarray(genes, dtype=str), name="gene"))


def score_prediction(
    truth: Any, count: np.ndarray, lognorm: np.ndarray, training_total: Any, genes: Sequence[str] | np.ndarray
) -> pd.DataFrame:
    """`score_table` of a method that predicts both: raw columns from the mean ``count``, log columns from the mean log-normalised count.

    Each scale is for the posterior mean of its own quantity; the logarithm of a mean is not the mean of the logarithm (SpaIM and SpaGene give it
    all the same, see `ppl_st.inference.predict`: level-free scores as correlations hardly care, rmse does).
    """
    raw = score_table(truth, count, training_total, genes)
    log = score_table(truth, lognorm, training_total, genes, scale="log")
    return raw.assign(**{column: log[column] for column in log.columns if column.startswith("log_")})


def _score_block(
    counts: np.ndarray, block: np.ndarray, total: np.ndarray, factor: np.ndarray, scale: Scale
) -> pd.DataFrame:
    """`score_table` for one block of genes."""
    raw, log = _on_both_scales(block, factor, scale)
    deep = total > 0
    depth = np.column_stack([np.log(total[deep]), total[deep]])
    log_truth = np.log1p(counts[deep] * factor[deep, None])
    table: dict[str, np.ndarray] = {"mean_count": counts.mean(0), "raw_ceiling": poisson_ceiling(counts)}
    for name, t, e in (("log", log_truth, log[deep]), ("raw", counts, raw)):
        plain = pcc(t, e)
        rows = slice(None) if name == "log" else deep
        controls = depth[:, :1] if name == "log" else depth
        table |= {
            f"{name}_pcc": plain,
            f"{name}_scc": scc(t, e),
            f"{name}_r2": plain**2,
            f"{name}_partial_pcc": partial_pcc(t[rows], e[rows], controls),
            f"{name}_ssim": ssim_li(t, e),
            f"{name}_js": js(t, e),
            f"{name}_rmse": rmse(t, e),
            f"{name}_constant": is_constant(t) | is_constant(e),
        }
    return pd.DataFrame(table)


class MeanInterval(NamedTuple):
    """Mean and median over genes, with a 95 % bootstrap interval of the mean; lo and hi are NaN of a single gene."""

    mean: float
    median: float
    lo: float
    hi: float


def bootstrap_mean(values: Any, rng: np.random.Generator, n: int = 1000) -> MeanInterval:
    """Mean of per-gene ``values`` with a 95 % percentile interval from ``n`` resamplings of the genes.

    Genes, not cells, are the units: cells of one gene are no independent evidence about a new gene. One gene says nothing of the others, so lo and
    hi are NaN. Below 10 genes the interval is too short: of 2 normal values it covers the mean 48 % of the time, of 5 84 %, of 10 90 %.
    """
    v = np.asarray(values, dtype=np.float64).ravel()
    if v.size == 0 or not np.isfinite(v).all():
        raise UserError(f"bootstrap_mean: {v.size} values, {int((~np.isfinite(v)).sum())} of them not finite")
    if v.size < 2:
        return MeanInterval(float(v[0]), float(v[0]), float("nan"), float("nan"))
    block = max(1, _BLOCK_ENTRIES // v.size)  # resamplings at a time
    means = np.concatenate([v[rng.integers(0, v.size, (min(block, n - start), v.size))].mean(1) for start in range(0, n, block)])
    lo, hi = np.quantile(means, [0.025, 0.975])
    return MeanInterval(float(v.mean()), float(np.median(v)), float(lo), float(hi))

"""Multiple imputation: a downstream statistic of imputed counts, with what the imputation does not know in its standard error.

A gene that was never measured has no counts, only a predictive distribution of them. Whoever puts its mean in the place of data gets intervals that
are too short: the mean is smoother than counts and its error is the same for many cells. Rubin's rules (Rubin 1987) instead compute the
statistic on K joint draws of the counts (``ppl-st predict --samples K``), each as if it were data. With Q_k, U_k statistic and sampling variance
on draw k,

    estimate  Q = mean_k Q_k
    variance  T = U + (1 + 1/K) B,     U = mean_k U_k,   B = var_k Q_k (divisor K - 1)
    degrees of freedom  (K - 1) (T / ((1 + 1/K) B))^2
    missing   (1 + 1/K) B / T          share of the variance that comes from not having measured the gene

Statistics: `log_fold_change` between two groups of cells, `morans_i` over a neighbor graph, `ligand_receptor` product over neighbors. Each takes the
counts of all genes of one draw [cells, genes] and returns `Statistic`. With U = 0 (``population=False``) the estimand is the value that
measured counts *of these very cells* would have given; with U the value in the population that the cells come from. The U of `morans_i` and
`ligand_receptor` is no such variance: it is that under random exchange of values between cells, of a world without a pattern. It serves the test of
"no pattern" (`pool`, whose p is then that of this test), makes no interval, and `pooled` takes these two with ``population=False`` only.

Draws must be joint over cells: those of one draw share the gene's level, dispersion and every other thing that the model does not know. A model may
be calibrated entry by entry and still forget that an error in a gene's *pattern* is shared by many cells; then pooled intervals are too short, too
(BENCHMARKS.md). `widened` mends this with genes: the same statistic of measured genes that were hidden in turn (`ppl_st.refit.held_out_fits`) says
how many standard errors it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.stats import t as student

from ppl_st.errors import UserError
from ppl_st.metrics import is_constant

__all__ = [
    "Pooled", "Statistic", "draws_of", "joined", "ligand_receptor", "log_fold_change", "morans_i", "pool", "pooled", "widened",
]  # fmt: skip

Floats = NDArray[np.float64]


class Statistic(NamedTuple):
    """A statistic of one complete data set and its sampling variance, [genes]; ``exchanged``: the one if cells exchange values."""

    estimate: Floats
    variance: Floats
    exchanged: bool = False


class Pooled(NamedTuple):
    """Pooled over draws, each [genes]: standard error, interval, two-sided p for "0", degrees of freedom, share of missing information."""

    estimate: Floats
    se: Floats
    lo: Floats
    hi: Floats
    p: Floats
    df: Floats
    missing: Floats


def pool(estimates: Any, variances: Any, *, level: float = 0.95) -> Pooled:
    """Rubin's rules.

    Parameters
    ----------
    estimates, variances
        Statistic and sampling variance on each of K >= 2 draws, [K, ...].
    level
        Of the interval.

    Raises
    ------
    UserError
        Fewer than two draws, unlike shapes, a negative or non-finite value.
    """
    if not 0 < level < 1:
        raise UserError(f"pool: level {level} is no share between 0 and 1; 95 % is 0.95")
    q, u = np.asarray(estimates, dtype=np.float64), np.asarray(variances, dtype=np.float64)
    if q.shape != u.shape or q.ndim == 0 or q.shape[0] < 2:
        raise UserError(f"pool: estimates have shape {q.shape}, variances {u.shape}; need the same [K >= 2 draws, ...]")
    if not (np.isfinite(q).all() and np.isfinite(u).all() and (u >= 0).all()):
        raise UserError("pool: estimates must be finite, variances finite and not negative")
    k = q.shape[0]
    within, between = u.mean(0), (1 + 1 / k) * q.var(0, ddof=1)
    total = within + between
    # No variance between draws: nothing is missing and the normal interval holds.
    ratio = np.divide(total, between, out=np.full_like(total, np.inf), where=between > 0)
    with np.errstate(over="ignore"):
        df = (k - 1) * ratio**2
    se, mean = np.sqrt(total), q.mean(0)
    half = student.ppf(0.5 + level / 2, df) * se
    z = np.divide(np.abs(mean), se, out=np.where(mean == 0, 0.0, np.inf), where=se > 0)
    missing = np.divide(between, total, out=np.zeros_like(total), where=total > 0)
    return Pooled(mean, se, mean - half, mean + half, 2 * student.sf(z, df), df, missing)


def pooled(
    draws: Iterable[Any], statistic: Callable[[Any], Statistic], *, population: bool = True, level: float = 0.95
) -> Pooled:
    """`pool` of ``statistic`` over complete data sets [cells, genes], one at a time (see `draws_of`).

    ``population=False`` leaves the sampling variance out: the estimand is the statistic of these cells' own counts. It must be so for
    statistics whose variance is that of exchanged values.
    """
    found = [statistic(counts) for counts in draws]
    if len(found) < 2:
        raise UserError(f"pooled: {len(found)} draws; at least two are needed, 20 or more are sensible (predict --samples 20)")
    if population and any(one.exchanged for one in found):
        raise UserError(
            "pooled: the variance of this statistic is that of values exchanged between cells, which makes no interval for a population; with "
            "population=False the interval is for these cells' own counts (`pool` of both columns tests for no pattern)"
        )
    estimates = np.stack([one.estimate for one in found])
    variances = np.stack([one.variance for one in found])
    return pool(estimates, variances if population else np.zeros_like(variances), level=level)


def widened(found: Pooled, inner: Pooled, truth: Any, *, level: float = 0.95) -> Pooled:
    """Intervals of new genes as wide as the errors on inner held-out genes ask for.

    With z_g = |truth_g - estimate_g| / se_g of the m inner genes the interval is estimate -+ q se, q the ceil((m + 1) level)-th smallest z
    (infinite if there are too few genes), and p = (1 + number of z_g >= |estimate| / se) / (m + 1): whatever the model, a new gene whose z is
    exchangeable with the inner ones' is covered with probability ``level`` or more, because genes, not cells, are counted. The inner genes' runs were
    shown fewer genes than the run of the new one, so that is a promise as far as the fits err alike (`ppl_st.conformal`).

    Parameters
    ----------
    found
        Pooled statistic of the new genes, [genes].
    inner, truth
        The same statistic of inner genes by runs that were not shown them, and its value on their measured counts, [m].
    """
    error = np.abs(np.asarray(truth, dtype=np.float64) - inner.estimate)
    if error.ndim != 1 or not error.size or not np.isfinite(error).all():
        raise UserError(f"widened: {error.shape} inner genes; need [m] finite estimates and truths")
    z = np.sort(np.where(error > 0, error / np.maximum(inner.se, 1e-300), 0.0))
    rank = int(np.ceil((z.size + 1) * level - 1e-9))
    half = z[rank - 1] * found.se if rank <= z.size else np.full_like(found.se, np.inf)
    own = np.abs(found.estimate) / np.maximum(found.se, 1e-300)
    p = (1 + z.size - np.searchsorted(z, own)) / (z.size + 1)
    return found._replace(lo=found.estimate - half, hi=found.estimate + half, p=p)


def joined(parts: Iterable[Pooled]) -> Pooled:
    """Pooled statistics of several lists of genes as one."""
    return Pooled(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def draws_of(samples: Any, genes: Any = None) -> Iterable[Floats]:
    """Joint count draws one after the other, each [cells, genes], from the zarr store of ``predict --samples`` or the layers of `Run.predict`.

    ``genes`` names the columns wanted, in that order, or the only one; None = all.
    """
    if isinstance(samples, str | Path):
        import zarr

        try:
            group: Any = zarr.open_group(str(samples), mode="r")
            array, names = group["count"], list(group.attrs["genes"])
        except (KeyError, OSError) as error:
            raise UserError(f"{samples}: is no store of count draws ({error}); write one with `ppl-st predict --samples K`") from error
        columns = _columns(names, genes)
        for k in range(array.shape[0]):
            yield np.asarray(array.oindex[k, :, columns], dtype=np.float64)  # no other column is held in memory
        return
    layers = [name for name in samples.layers if name.startswith("sample_")]
    if not layers:
        raise UserError("the prediction holds no draws; predict with samples=20")
    columns = _columns(list(samples.var_names), genes)
    for k in range(len(layers)):
        yield np.asarray(samples.layers[f"sample_{k}"], dtype=np.float64)[:, columns]


def _columns(names: list[str], genes: Any) -> list[int]:
    if genes is None:
        return list(range(len(names)))
    genes = [genes] if isinstance(genes, str) else genes
    absent = [gene for gene in genes if gene not in names]
    if absent:
        raise UserError(f"draws hold no {', '.join(absent[:3])}; they hold {len(names)} genes, e.g. {', '.join(names[:3])}")
    return [names.index(gene) for gene in genes]


# ---- statistics of complete data ----


def log_fold_change(counts: Any, group: Any) -> Statistic:
    """log(mean count in the group / mean count outside), [genes], with its delta-method variance.

    ``counts`` [cells, genes], ``group`` [cells] bool (or 0 and 1) in the order of their rows, which the index of a Series does not change. A gene's
    own level cancels. Both means are floored at half a count in all cells of both sides.
    """
    x, marks = _counts(counts), np.asarray(group)
    known = list({repr(value): value for value in marks.ravel().tolist()}.values())  # nan once
    if marks.shape != x.shape[:1] or not all(isinstance(value, bool | int | float) and value in (0, 1) for value in known):
        shown = ", ".join(map(repr, known[:3])) + (", ..." if len(known) > 3 else "")
        raise UserError(
            f"log_fold_change: group has shape {marks.shape}, type {marks.dtype} and values {shown or 'none'}; need True or False for each of the "
            f"{len(x)} cells, as labels == 'B cells' gives them"
        )
    inside = marks.astype(bool)
    if min(inside.sum(), (~inside).sum()) < 2:
        raise UserError(f"log_fold_change: group marks {int(inside.sum())} of {len(x)} cells; both sides need two or more")
    value, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for sign, side in ((1, inside), (-1, ~inside)):
        n = int(side.sum())
        mean = np.maximum(x[side].mean(0), 0.5 / len(x))  # one floor: a gene that nobody has does not differ
        value += sign * np.log(mean)
        variance += np.maximum(x[side].var(0, ddof=1), mean) / (n * mean**2)
    return Statistic(value, variance)


def morans_i(counts: Any, graph: sp.csr_matrix) -> Statistic:
    """Moran's I over a neighbor graph, [genes], with its variance when the values are exchanged between cells at random (Cliff and Ord 1981).

    ``graph`` [cells, cells] sparse weights, no self-loops. A constant gene has I = 0. The variance serves the test of "no spatial pattern"; I is then
    compared with -1 / (n - 1), which is added so that 0 is the value without a pattern.
    """
    x = _counts(counts)
    w = _graph(graph, len(x))
    n, z, varies = len(x), x - x.mean(0), ~is_constant(x)
    square = (z**2).sum(0)
    total = w.sum()
    scale = np.where(varies, square, 1.0)
    i = np.where(varies, n / total * np.einsum("ig,ig->g", z, w @ z) / scale, 0.0)
    both = w + w.T
    s1, s2 = 0.5 * both.multiply(both).sum(), float(np.square(np.asarray(both.sum(1))).sum())
    kurtosis = n * (z**4).sum(0) / scale**2
    first = n * ((n**2 - 3 * n + 3) * s1 - n * s2 + 3 * total**2)
    second = kurtosis * ((n**2 - n) * s1 - 2 * n * s2 + 6 * total**2)
    expected = -1 / (n - 1)
    variance = (first - second) / ((n - 1) * (n - 2) * (n - 3) * total**2) - expected**2
    return Statistic(np.where(varies, i - expected, 0.0), np.where(varies, np.maximum(variance, 0.0), 0.0), exchanged=True)


def ligand_receptor(counts: Any, graph: sp.csr_matrix, pairs: Any) -> Statistic:
    """Product score of ligand-receptor pairs over neighbors, [pairs]: mean_i l_i (W r)_i over its value without a pattern, minus 1.

    ``pairs`` [pairs, 2] columns of ``counts`` (ligand, receptor); W is ``graph`` with rows that sum to 1. The variance is that under random exchange
    of the receptor's values between cells, which is exact. A pair without a count of one of the two has score 0.
    """
    x, given = _counts(counts), np.asarray(pairs)
    if given.size % 2 or (given.size and given.dtype.kind not in "iu"):
        raise UserError(f"ligand_receptor: pairs are {given.dtype} of shape {given.shape}; need numbers of columns [pairs, 2], not names of genes")
    index = given.astype(np.int64).reshape(-1, 2)
    if (odd := index[(index < 0) | (index >= x.shape[1])]).size:
        raise UserError(f"ligand_receptor: pairs name column {odd[0]}; there are {x.shape[1]} genes, 0 to {x.shape[1] - 1}")
    w = _graph(graph, len(x))
    degree = np.asarray(w.sum(1)).ravel()
    w = sp.csr_matrix(sp.diags(1 / np.where(degree > 0, degree, 1.0)) @ w)
    ligand, receptor = w.T @ x[:, index[:, 0]], x[:, index[:, 1]]  # what the neighbors send to each cell
    n = len(x)
    base = ligand.mean(0) * receptor.mean(0)
    safe = np.where(base > 0, base, 1.0)
    variance = ligand.var(0) * receptor.var(0) / (n - 1) / safe**2
    return Statistic(np.where(base > 0, (ligand * receptor).mean(0) / safe - 1, 0.0), np.where(base > 0, variance, 0.0), exchanged=True)


def _counts(counts: Any) -> Floats:
    x = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=np.float64)
    if x.ndim != 2 or len(x) < 4 or not np.isfinite(x).all():
        raise UserError(f"counts have shape {x.shape}; need finite [cells, genes] with four cells or more")
    return x


def _graph(graph: Any, n: int) -> sp.csr_matrix:
    w = sp.csr_matrix(graph, dtype=np.float64)
    if w.shape != (n, n) or not w.nnz:
        raise UserError(f"graph is {w.shape} with {w.nnz} links; need [{n}, {n}] with at least one (ppl_st.spatial.neighbors)")
    return w

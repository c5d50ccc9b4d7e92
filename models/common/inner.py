r"""What inner held-out genes teach about genes that nobody measured, for methods whose maps become counts by `ppl_st.models.common.counts`.

Inner genes are panel genes that a fit was not shown. They are scored under the posterior of that fit, so that the hyper-priors learned on them
describe what is left *beside* its spread; residuals of genes that the fit has seen would be far too small. In this order:

    smoothing, share of the process   by the log score of counts, each gene at its own level
    e          how far loadings are, over how far they are said to be:    r_g what the mean map leaves of the standardised gene z_g,  A = u'u / n,
               e^2 = sum_g (|u'r_g / n|^2 - tr(A) var(r_g) / n) / sum_g tr(A var(t_g) A)
    depth prior a, bend k             by the log score again
    level, slope, theta               random effects over genes; levels of genes with counts on both sides
    own depth                         which mean of a log-normalised count correlates better with them

e is measured by distances, not by the score of single counts, which cannot tell an error that all cells share from noise: intervals of sums and
differences over cells hang on it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from ppl_st.inference.hyperpriors import MIN_SCALE, parameter_prior, random_effects
from ppl_st.models.common.cells import Problem, all_counts, living, log_shares, take_cells, without
from ppl_st.models.common.counts import (
    FINE_SLOPES,
    FINE_THETA,
    LARGEST,
    SLOPES,
    Codes,
    Hyper,
    bend,
    depths,
    log_mean,
    refined,
    score_counts,
    smooth,
    true_shares,
)

SMOOTHING = (0.0, 0.25, 0.5)  # shares of the neighbors that are tried
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the process over the reference's cells
DOUBT = (0.25, 2.0)  # e lies within
DEPTH_PRIORS = (0.0, 0.25, 0.5, 1.0, 2.0)  # a that are tried, in this order, until one is worse than the one before it
BENDS = (0.0, 0.15, 0.3, 0.6)  # k, the same
SLOPE_LOC = (0.3, 4.5)  # within the grid; the belief, a slope near 1, is `parameter_prior`'s and yields to evidence
SLOPE_SCALE = 0.8
WIDE_SLOPE = (1.7, 0.0, 0.8)  # where there is nothing to learn from: what was learned on real data is mostly between 1 and 2.7
AGREEMENT_SD = 0.5  # of b around 1
FOLDS = 4
MIN_PANEL = 12  # shared genes below which nothing is held out to learn from
INNER_GENES = 40  # judged per fold, at most
INNER_CELLS = 1000


class Settings(Protocol):
    """What `learn_hyper` uses of a method's settings."""

    @property
    def smoothing(self) -> float | str:
        """Share of the spatial neighbors in a cell's place, or "auto"."""

    @property
    def process(self) -> float | str:
        """Share of the process over the reference's cells, or "auto"."""

    @property
    def depth_prior(self) -> float | str:
        """a, or "auto"."""

    @property
    def gain(self) -> str:
        """Level of unmeasured genes: "hierarchical" or "none"."""


class Fit(Protocol):
    """A fit to part of the panel: the inner genes' loadings, and places of cells."""

    def codes(self) -> Codes:
        """Loadings of the inner genes."""

    def place(self, data: Any) -> NDArray[np.float32]:
        """[n, q], centered."""


def default_hyper(data: Problem, config: Settings) -> Hyper:
    """Wide hyper-priors where nothing can be held out, a tiny panel; levels hang on nothing that is fitted and are learned from all its genes."""
    smoothing, share, depth_prior = (0.0 if one == "auto" else float(one) for one in (config.smoothing, config.process, config.depth_prior))
    z, doubt = (values[data.panel] for values in true_shares(data))
    level, noise = (values[data.columns] for values in log_shares(data.counts, data.columns))
    center = float(z.mean())
    levels = _levels(level, noise, z - center, doubt, living(data), config)
    return Hyper(smoothing, share, 1.0, depth_prior, 0.0, *levels, WIDE_SLOPE, (0.5, 0.0, 1.0), center, [])


def learn_hyper(
    data: Problem, config: Settings, seed: int, say: Callable[[str], None], fit: Callable[[Any, NDArray[np.int64]], Fit], folds: int = FOLDS
) -> Hyper:
    """Choose smoothing, share, doubt, the depths' prior and the bend, and learn the hyper-priors; ``fit(problem, genes)`` fits the problem and knows
    how to draw ``genes``; only the first ``folds`` of `FOLDS` parts of the panel are held out."""
    if len(data.panel) < MIN_PANEL:
        say(f"{len(data.panel)} shared genes: too few to learn hyper-priors from; wide ones are used")
        return default_hyper(data, config)
    rng = np.random.default_rng([seed, 1])
    data, rows = _subset(data, rng)
    options = SMOOTHING if config.smoothing == "auto" else (float(config.smoothing),)
    if data.neighbors is None:
        if config.smoothing not in ("auto", 0):
            say(f"smoothing = {config.smoothing}: without coordinates the target has no neighbors; 0 is used")
        options = (0.0,)
    priors = DEPTH_PRIORS if config.depth_prior == "auto" else (float(config.depth_prior),)
    order = rng.permutation(len(data.panel))
    tests: list[Fold] = []
    judged = []
    for fold in range(folds):
        inner = np.sort(order[fold::FOLDS])
        split = without(data, inner)
        seen = rows[split.totals[rows] > 0]
        judged.append(inner[np.sort(rng.permutation(len(inner))[:INNER_GENES])])
        problem = fit(split, data.panel[judged[-1]])
        counts = data.counts[seen][:, data.columns[judged[-1]]].toarray().astype(np.float64)
        place = problem.place(split)
        places = {option: smooth(place, split.neighbors, option)[seen] for option in options}
        every, relative = all_counts(split.counts[seen]), split.relative[seen]
        tests.append(Fold(counts, split.totals[seen], every, relative, places, problem.codes()))
    scores: dict[tuple[float, float, float, float, float], NDArray[np.float64]] = {}

    def tried(smoothing: float, share: float, doubt: float, a: float, k: float) -> float:
        one = smoothing, share, doubt, a, k
        if one not in scores:
            parts = [score_counts(t.counts, depths(t.every, t.relative, a), k, t.places[smoothing], t.codes.mixed(share, doubt)) for t in tests]
            scores[one] = np.concatenate(parts, 2)
        return float(logsumexp(scores[one], axis=(0, 1)).sum())

    shares = tests[0].codes.shares
    smoothing = climb(options, lambda one: tried(one, shares[0], 1.0, priors[0], 0.0))
    share = climb(shares, lambda one: tried(smoothing, one, 1.0, priors[0], 0.0))
    wide = doubt_of([(t.counts, t.totals, t.places[smoothing], t.codes) for t in tests], share)
    depth_prior = climb(priors, lambda a: tried(smoothing, share, wide, a, 0.0))
    bent = climb(BENDS, lambda k: tried(smoothing, share, wide, depth_prior, k))
    best = smoothing, share, wide, depth_prior, bent
    names = ("smoothing", "share", "doubt", "depth_prior", "bend", "inner genes")
    candidates = [dict(zip(names, (*one, float(logsumexp(score, axis=(0, 1)).sum())), strict=True)) for one, score in scores.items()]
    genes = np.concatenate(judged)
    z, doubt = (values[data.panel[genes]] for values in true_shares(data))
    level, noise = (values[data.columns[genes]] for values in log_shares(data.counts, data.columns))
    alive = living(data)[genes]
    if not alive.all():
        say(dead_genes(int((~alive).sum())))
    center = float(z.mean())
    at = z - center
    levels, (slope, theta) = _levels(level, noise, at, doubt, alive, config), _priors(refined(scores[best]), at)
    span = float(at.min()), float(at.max())
    hyper = Hyper(smoothing, share, wide, depth_prior, bent, *levels, slope, theta, center, candidates, span=span)
    hyper = hyper._replace(own_depth=own_depth(tests, hyper, z))
    if config.depth_prior == "auto":  # a T counts are what was chosen, T without the inner genes; of a larger T it is a smaller part
        inside = np.mean([t.every.mean() for t in tests])
        hyper = hyper._replace(depth_prior=float(depth_prior * inside / all_counts(data.counts[rows]).mean()))
    say(
        f"smoothing {smoothing:g}, "
        + (f"{share:.0%} of a process over the reference's cells, " if len(shares) > 1 else "")
        + f"{wide:.0%} of the maps' doubt, depth ~ total + {hyper.depth_prior:.2g} mean total, bend {bent:g}, "
        f"log-normalised at {'its own' if hyper.own_depth else 'the median'} depth; "
        f"gain {hyper.gain[0]:.2f} + {hyper.gain[1]:.2f} log share, sd {hyper.gain[2]:.2f}; "
        f"slope {hyper.slope[0]:.2f} + {hyper.slope[1]:.2f} log share, sd {hyper.slope[2]:.2f}; "
        f"log theta {hyper.log_theta[0]:.2f}, sd {hyper.log_theta[2]:.2f} ({len(z)} inner genes)"
    )
    return hyper


class Fold(NamedTuple):
    """The inner genes of one fold, and the cells that they are judged in."""

    counts: NDArray[np.float64]  # [n, genes]
    totals: NDArray[np.float64]  # [n] over the shared genes
    every: NDArray[np.float64]  # [n] over all genes of the target
    relative: NDArray[np.float64]  # [n] usual depth of the cell's section, over that of all
    places: dict[float, NDArray[np.float32]]  # [n, q] by smoothing
    codes: Codes


def own_depth(tests: Sequence[Fold], hyper: Hyper, z: NDArray[np.float64]) -> bool:
    """Whether `log_mean` at cells' own depths correlates better with log-normalised counts of inner genes than at the median: on average over genes,
    by more than the standard error of that."""
    gains, start = [], 0
    for t in tests:
        at = z[start : start + t.counts.shape[1]] - hyper.center
        start += len(at)
        slope, log_theta = (loc + tilt * at for loc, tilt, _ in (hyper.slope, hyper.log_theta))
        mean = t.places[hyper.smoothing].astype(np.float64) @ t.codes.mixed(hyper.share, hyper.doubt).mean
        trend, _ = bend(torch.from_numpy(mean), hyper.bend)
        share = (torch.from_numpy(slope).clamp_min(SLOPES[0]) * trend).clamp(-LARGEST, LARGEST).exp()
        depth, factor = (torch.from_numpy(x)[:, None] for x in (depths(t.every, t.relative, hyper.depth_prior), np.median(t.totals) / t.totals))
        depth = depth * (t.totals.sum() / depth.sum())
        share *= torch.from_numpy(t.counts.sum(0) + 0.5) / ((share * depth).sum(0) + 0.5)
        logs = torch.log1p(torch.from_numpy(t.counts) * factor)
        median = float(np.median(t.totals))
        both = (log_mean(share, depth, torch.from_numpy(log_theta), median, one) for one in (None, factor))
        plain, own = ((_standardised(logs) * _standardised(one)).mean(0).numpy() for one in both)
        gains.append(own - plain)
    gain = np.concatenate(gains)
    return bool(gain.mean() > gain.std() / np.sqrt(len(gain)))


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp_min(1e-9)


def doubt_of(tests: Sequence[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32], Codes]], share: float) -> float:
    """e from counts [n, g] of inner genes, the cells' totals and places, and the genes' loadings under fits that were not shown them.

    Amplitudes of maps are left to the slopes, which have a spread of their own.
    """
    found, claimed = 0.0, 0.0
    for counts, totals, place, codes in tests:
        seen = counts.sum(0) > 0  # a gene without counts is no map to be far from
        logs = np.log1p(counts * (np.median(totals) / totals)[:, None])
        z = (logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-9)
        where = place - place.mean(0, dtype=np.float64)
        trend = where @ codes.mixed(share, 1.0).mean
        steep = np.maximum((z * trend).sum(0) / np.maximum(np.square(trend).sum(0), 1e-9), 0)
        rest = z - steep * trend
        u = where[:, : len(codes.mean)]
        gram = u.T @ u / len(u)
        found += float((np.square(u.T @ rest / len(u)).sum(0) - np.trace(gram) * rest.var(0) / len(u))[seen].sum())
        claimed += float((np.square(gram) @ codes.variance)[:, seen].sum())
    return float(np.clip(np.sqrt(max(found, 0.0) / claimed), *DOUBT)) if claimed > 0 else 1.0


def climb(options: Sequence[float], score: Callable[[float], float]) -> float:
    """The best of ordered options, tried until the score falls, each at most once."""
    score, best = cache(score), options[0]
    for option in options[1:]:
        if score(option) <= score(best):
            break
        best = option
    return best


def _subset(data: Any, rng: np.random.Generator) -> tuple[Any, NDArray[np.int64]]:
    """About `INNER_CELLS` cells to judge, with their neighbors; also the rows of the judged ones."""
    n = data.counts.shape[0]
    chosen = np.sort(rng.permutation(n)[:INNER_CELLS])
    if n <= 4 * INNER_CELLS:
        return data, chosen
    near = np.empty(0, np.int64) if data.neighbors is None else data.neighbors[chosen].indices
    more = rng.permutation(n)[: 3 * INNER_CELLS]
    cells = np.unique(np.concatenate([chosen, near, more])).astype(np.int64)
    return take_cells(data, cells), np.searchsorted(cells, chosen)


def _priors(score: NDArray[np.float64], z: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(m, m', s') of slopes and (a', b', s'') of log theta, from `refined` scores and centered covariates [genes]."""
    loc, tilt, scale = parameter_prior(logsumexp(score, axis=1), z, FINE_SLOPES, 1.0, 0.5)
    loc, scale = float(np.clip(loc, *SLOPE_LOC)), min(scale, SLOPE_SCALE)
    prior = -0.5 * ((FINE_SLOPES[:, None] - loc - tilt * z) / scale) ** 2  # [slopes, genes]
    theta = parameter_prior(logsumexp(score + (prior - logsumexp(prior, axis=0))[:, None], axis=0), z, FINE_THETA, 1.0, 1.5)
    return (loc, tilt, scale), (theta[0], theta[1], theta[2])


def _levels(
    level: NDArray[np.float64],
    noise: NDArray[np.float64],
    z: NDArray[np.float64],
    doubt: NDArray[np.float64],
    alive: NDArray[np.bool_],
    config: Settings,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """`level_prior` of the genes that have counts on both sides, or the reference's levels as they are."""
    alive = alive if alive.sum() > 2 else np.ones(len(z), dtype=bool)
    level, noise, z, doubt = (values[alive] for values in (level, noise, z, doubt))
    if config.gain == "none":
        return (random_effects(level - z, noise)[0], 1.0, 1e-3), (0.0, 0.0, 0.0)
    return level_prior(level, noise, z, doubt)


def dead_genes(number: int) -> str:
    """What a reader is told of genes that are left out of the levels."""
    return f"{number} shared genes have no count in the cells looked at, of the target or of the reference: they say nothing of other genes' levels"


def level_prior(
    gains: NDArray[np.float64], noise: NDArray[np.float64], z: NDArray[np.float64], doubt: NDArray[np.float64]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(a, b, s) of gain_g ~ Normal(a + b z_g, s^2 + noise_g + b^2 doubt_g) with b ~ Normal(1, 1/2), and the posterior covariance of a and b.

    s^2 is its mean over a grid of s, weighted by the marginal likelihood (a and b integrated out): the most probable s of a few genes is too small
    for the next one. b in the variance is the last estimate.
    """
    design, prior = np.column_stack([np.ones_like(z), z]), np.diag([1e-6, AGREEMENT_SD**-2])

    def fit(s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Log evidence [k], mean [k, 2] and precision [k, 2, 2] of a and b at k values of s."""
        weight = 1 / (np.square(s)[:, None] + noise + slope**2 * doubt)  # [k, genes]
        precision = np.einsum("kg,gi,gj->kij", weight, design, design) + prior
        mean = np.linalg.solve(precision, ((weight * gains) @ design + prior @ [0.0, 1.0])[..., None])[..., 0]
        misfit = (weight * np.square(gains - mean @ design.T)).sum(1) + np.square(mean[:, 1] - 1) * prior[1, 1]
        return (np.log(weight).sum(1) - misfit - np.linalg.slogdet(precision)[1]) / 2, mean, precision

    slope, grid = 1.0, np.geomspace(MIN_SCALE, 3.0, 100)
    for _ in range(5):
        evidence = fit(grid)[0]
        s = float(np.sqrt(np.average(np.square(grid), weights=np.exp(evidence - evidence.max()))))
        _, (mean,), (precision,) = fit(np.array([s]))
        slope = float(mean[1])
    covariance = np.linalg.inv(precision)
    return (float(mean[0]), slope, s), (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))

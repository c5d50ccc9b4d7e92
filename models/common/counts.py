r"""From a standardised map f of a gene to its counts, and what inner held-out genes teach about genes that nobody measured.

    f_ig    = u_i . t_g;   m_ig, s_ig^2 its posterior mean and variance given the features
    v_ig    = bend(m_ig),   d_ig = slope_g bend'(m_ig) (f_ig - m_ig)
    rate_ig = depth_i exp(log_gain_g + slope_g v_ig - c_g(slope_g)) exp(d_ig - var(d_ig) / 2)
    x_ig    ~ NB(rate_ig, theta_g)
    depth_i ~ total_i + a T, T the mean total: posterior mean of a depth that is Gamma over cells, known from a total over all genes of the target
              (also those that the reference lacks); a, chosen on inner genes, is larger the less these say of the others. Scaled so that its sum
              is that of the counts of the shared genes
    c_g(b)  = log of the mean of exp(b v_ig) over cells of the fit, weighted by their depths
    bend(m) = log(1 + k m) / k (its argument kept above 0; k = 0: m itself), so exp(slope bend(m)) = (1 + k m)^(slope / k)

A map is a standardised log-normalised count, log1p of the rate, not its logarithm: where a gene is off it stops falling, and far above its mean it
grows less than the logarithm of an exponential would. k, chosen on inner genes, is between a logarithm (0) and a root.

    t_g         = its posterior mean + e x what is not known of it      e: how far inner genes' loadings are, over how far they are said to be,
                  e^2 = sum_g (|u'r_g / n|^2 - tr(A) var(r_g) / n) / sum_g tr(A var(t_g) A),    A = u'u / n,    r_g what the mean map leaves of z_g
    log_gain_g  ~ Normal(a + b z_g, s)     z_g = true log share of the gene in the reference, centered
    b           ~ Normal(1, 1/2)           1: the platforms agree
    z_g         ~ Normal(m, t), seen with the sampling variance of its reference; both doubts, and those of a and b, widen the level
    slope_g     ~ Normal(m + m' z_g, s'), floored at 0     a rare marker is on or off, an abundant gene varies by a factor
    log theta_g ~ Normal(a' + b' z_g, s'')

So log_gain is the log of a gene's counts per count of the shared genes, whatever its map and slope: the same quantity as the reference's log share.
e is measured by distances, not by the score of single counts, which cannot tell an error that all cells share from noise: intervals of sums and
differences over cells hang on it. The last factor of a rate, what is not known of the gene's map, has mean 1: a cell is not expected to have more
of a gene because less is known of it there.

A log-normalised count is log1p(x_ig D / t_i), t_i the total over the shared genes and D its median. If t_i is the depth, log1p(D rate_ig / depth_i)
is a good guess; if it is a noisy count beside depth_i, as where few genes are shared and many measured, P(x > 0) log1p(D / t_i E[x | x > 0]) is
better, and is taken where inner genes say so beyond their standard error (`own_depth`).

The hyper-priors are learned on inner genes: panel genes that a fit was not shown, scored with the posterior draws of that fit, so that they
describe what is left *beside* the spread of the draws. Residuals of genes that the fit has seen would be far too small. Measured genes keep their
own level, slope and theta.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from scipy.special import logsumexp
from torch import Tensor

from ppl_st.inference.hyperpriors import MIN_SCALE, parameter_prior, random_effects, score_nb
from ppl_st.models.common.cells import Problem, all_counts, log_shares, take_cells, without
from ppl_st.models.common.process import Process

SMOOTHING = (0.0, 0.25, 0.5)  # shares of the neighbors that are tried
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the process over the reference's cells
DOUBT = (0.25, 2.0)  # e lies within
DEPTH_PRIORS = (0.0, 0.25, 0.5, 1.0, 2.0)  # a that are tried, in this order, until one is worse than the one before it
BENDS = (0.0, 0.15, 0.3, 0.6)  # k, the same
SOFT = 0.1  # 1 + k m stays above about SOFT^2 / |1 + k m|
SLOPES = np.array([0.2, 0.5, 0.8, 1.1, 1.4, 1.8, 2.3, 3.0, 4.0])
SLOPE_LOC = (0.3, 3.5)  # within the grid; the belief, a slope near 1, is `parameter_prior`'s and yields to evidence
SLOPE_SCALE = 0.8
AGREEMENT_SD = 0.5  # of b around 1
LOG_THETA = np.linspace(-3.0, 5.0, 9)
FOLDS = 4
MIN_PANEL = 12  # shared genes below which nothing is held out to learn from
INNER_GENES = 40  # judged per fold, at most
INNER_CELLS = 1000
INNER_DRAWS = 6
LEVEL_CELLS = 1000  # of the fit, over which c_g is a mean
OWN_ENTRIES = 1_500_000  # cells x genes on which measured genes learn slope and theta
LARGEST = 8.0  # |slope f| is clamped: no cell is e^8 away from the mean


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    smoothing: float
    share: float  # of the process over the reference's cells in an unmeasured gene's map (`process.py`), where the method has one
    doubt: float  # e
    depth_prior: float  # a
    bend: float  # k
    gain: tuple[float, float, float]  # a, b, s
    gain_covariance: tuple[float, float, float]  # of a and b: aa, ab, bb
    slope: tuple[float, float, float]  # m, m', s'
    log_theta: tuple[float, float, float]  # a', b', s''
    center: float  # of z
    candidates: list[dict[str, float]]  # every smoothing, share, doubt, depth prior and bend tried, with its score
    own_depth: bool = False  # a log-normalised count is predicted at the cell's own depth and total, not at the median


class Codes(NamedTuple):
    """Loadings of genes under a fit that was not shown them."""

    mean: NDArray[np.float32]  # [q, genes]
    variance: NDArray[np.float32]  # [q, genes]
    draws: NDArray[np.float32]  # [draws, q, genes]
    noise: NDArray[np.float32] | None = None  # [K, genes] loadings of what differs from cell to cell in every draw: K standard normals each
    process: Process | None = None  # over the reference's cells; its features are the places after the first q
    shares: tuple[float, ...] = (0.0,)  # of the process that may be tried

    def mixed(self, share: float, doubt: float) -> "Codes":
        """(1 - share) of the loadings and ``share`` of the process, [q + F, genes], and ``doubt`` times what is not known of the former."""
        draws, variance = doubt * (self.draws - self.mean) + (1 - share) * self.mean, doubt**2 * self.variance
        if self.process is None:
            return self._replace(draws=draws, variance=variance)
        beta, sd = share * self.process.beta, share * self.process.beta_sd
        noise = np.random.default_rng(len(beta)).standard_normal((len(self.draws), *beta.shape), dtype=np.float32)
        mean, variance = np.vstack([(1 - share) * self.mean, beta]), np.vstack([variance, sd**2])
        return self._replace(mean=mean, variance=variance, draws=np.concatenate([draws, beta + sd * noise], 1))


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

    def codes(self, draws: int, seed: list[int]) -> Codes:
        """Loadings of the inner genes."""

    def place(self, data: Any) -> NDArray[np.float32]:
        """[n, q], centered."""


def default_hyper(data: Problem, config: Settings) -> Hyper:
    """Wide hyper-priors where nothing can be learned: a tiny panel."""
    z = data.log_share[data.panel]
    smoothing, share, depth_prior = (0.0 if one == "auto" else float(one) for one in (config.smoothing, config.process, config.depth_prior))
    gain = _mean_gain(data), 0.5, 1.0
    return Hyper(smoothing, share, 1.0, depth_prior, 0.0, gain, (0.0, 0.0, 0.0), (1.0, 0.0, 0.4), (0.5, 0.0, 1.0), float(z.mean()), [])


def _mean_gain(data: Problem) -> float:
    return float(log_shares(data.counts, data.columns)[0][data.columns].mean())


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
        options = (0.0,)
    priors = DEPTH_PRIORS if config.depth_prior == "auto" else (float(config.depth_prior),)
    order = rng.permutation(len(data.panel))
    tests: list[_Test] = []
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
        tests.append(_Test(counts, split.totals[seen], all_counts(split.counts[seen]), places, problem.codes(INNER_DRAWS, [seed, 2, fold])))
    scores: dict[tuple[float, float, float, float, float], NDArray[np.float64]] = {}

    def tried(smoothing: float, share: float, doubt: float, a: float, k: float) -> float:
        one = smoothing, share, doubt, a, k
        if one not in scores:
            parts = [_score(t.counts, depths(t.every, a), k, t.places[smoothing], t.codes.mixed(share, doubt)) for t in tests]
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
    hyper = _priors(scores[best], level, noise, z, doubt, config)
    hyper = hyper._replace(smoothing=smoothing, share=share, doubt=wide, depth_prior=depth_prior, bend=bent, candidates=candidates)
    hyper = hyper._replace(own_depth=_own_depth(tests, hyper, z))
    say(
        f"smoothing {smoothing:g}, "
        + (f"{share:.0%} of a process over the reference's cells, " if len(shares) > 1 else "")
        + f"{wide:.0%} of the maps' doubt, depth ~ total + {depth_prior:g} mean total, bend {bent:g}, "
        f"log-normalised at {'its own' if hyper.own_depth else 'the median'} depth; "
        f"gain {hyper.gain[0]:.2f} + {hyper.gain[1]:.2f} log share, sd {hyper.gain[2]:.2f}; "
        f"slope {hyper.slope[0]:.2f} + {hyper.slope[1]:.2f} log share, sd {hyper.slope[2]:.2f}; "
        f"log theta {hyper.log_theta[0]:.2f}, sd {hyper.log_theta[2]:.2f} ({len(z)} inner genes)"
    )
    return hyper


class _Test(NamedTuple):
    """Inner genes of a fold."""

    counts: NDArray[np.float64]  # [n, genes]
    totals: NDArray[np.float64]  # [n] over the shared genes
    every: NDArray[np.float64]  # [n] over all genes of the target
    places: dict[float, NDArray[np.float32]]  # [n, q] by smoothing
    codes: Codes


def log_mean(share: Tensor, depth: Tensor, log_theta: Tensor | None, median: float, factor: Tensor | None) -> Tensor:
    """Mean of a log-normalised count [n, g], see the file's docstring: from the rate ``share`` x ``depth`` [n, 1], at the median depth where no
    ``factor`` D / t [n, 1] is given; a count that is not 0 is taken at its mean. ``log_theta`` None: Poisson."""
    if factor is None:
        return torch.log1p(median * share)
    rate = share * depth
    zero = -rate if log_theta is None else -log_theta.exp() * torch.log1p(rate * (-log_theta).exp())
    positive = -torch.expm1(zero).clamp(max=-1e-12)
    return positive * torch.log1p(factor * rate / positive)


def _own_depth(tests: Sequence[_Test], hyper: Hyper, z: NDArray[np.float64]) -> bool:
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
        depth, factor = (torch.from_numpy(x)[:, None] for x in (depths(t.every, hyper.depth_prior), np.median(t.totals) / t.totals))
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
        logs = np.log1p(counts * (np.median(totals) / totals)[:, None])
        z = (logs - logs.mean(0)) / np.maximum(logs.std(0), 1e-9)
        where = place - place.mean(0, dtype=np.float64)
        trend = where @ codes.mixed(share, 1.0).mean
        steep = np.maximum((z * trend).sum(0) / np.maximum(np.square(trend).sum(0), 1e-9), 0)
        rest = z - steep * trend
        u = where[:, : len(codes.mean)]
        gram = u.T @ u / len(u)
        found += float((np.square(u.T @ rest / len(u)).sum(0) - np.trace(gram) * rest.var(0) / len(u)).sum())
        claimed += float((np.square(gram) @ codes.variance).sum())
    return float(np.clip(np.sqrt(max(found, 0.0) / claimed), *DOUBT)) if claimed > 0 else 1.0


def climb(options: Sequence[float], score: Callable[[float], float]) -> float:
    """The best of ordered options, tried until the score falls."""
    best = options[0]
    for option in options[1:]:
        if score(option) <= score(best):
            break
        best = option
    return best


def depths(totals: NDArray[np.float64], depth_prior: float) -> NDArray[np.float64]:
    """Relative depth [n] of cells with these totals over all genes: total + a x mean total; see the file's docstring."""
    return np.asarray(np.maximum(totals, 0.5) + depth_prior * totals.mean())


def true_shares(data: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Posterior mean and variance of every gene's true log share in the reference [G], under a normal prior over genes."""
    mean, scale = random_effects(data.log_share, data.share_variance)
    keep = scale**2 / (scale**2 + data.share_variance)
    return mean + keep * (data.log_share - mean), keep * data.share_variance


def smooth(place: NDArray[np.float32], neighbors: sp.csr_matrix | None, share: float) -> NDArray[np.float32]:
    """(1 - share) of the cell's own place and ``share`` of its neighbors' mean place."""
    if share == 0.0 or neighbors is None:
        return place
    return np.asarray((1 - share) * place + share * (neighbors @ place), dtype=np.float32)


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


def bend(m: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """log(1 + k m) / k and its slope in m, with 1 + k m kept above 0 by a smooth floor; see the file's docstring."""
    if k == 0.0:
        return m, torch.ones_like(m)
    u = 1 + k * m
    root = (u.square() + 4 * SOFT**2).sqrt()
    above = (u + root) / 2
    return above.log() / k, (1 + u / root) / 2 / above


def _score(
    counts: NDArray[np.float64], depth: NDArray[np.float64], bent: float, place: NDArray[np.float32], codes: Codes
) -> NDArray[np.float64]:
    """Log predictive score [slopes, thetas, genes] at each gene's own level, of cells of relative ``depth`` [n]."""
    depth, place = depth[:, None], place.astype(np.float64)
    mean, variance = place @ codes.mean, place**2 @ codes.variance  # [n, g]
    deviation = np.stack([place @ (code - codes.mean) for code in codes.draws])  # [D, n, g]
    if codes.noise is not None:
        variance += np.square(codes.noise).sum(0)
        rng = np.random.default_rng(len(counts))
        deviation += np.stack([rng.standard_normal((len(counts), len(codes.noise))) @ codes.noise for _ in deviation])
    mean, steep = (part.numpy() for part in bend(torch.from_numpy(mean), bent))
    deviation, variance = steep * deviation, steep**2 * variance
    score = np.empty((len(SLOPES), len(LOG_THETA), counts.shape[1]))
    for i, slope in enumerate(SLOPES):
        expected = depth * np.exp((slope * mean).clip(-LARGEST, LARGEST))
        expected *= (counts.sum(0) + 0.5) / (expected.sum(0) + 0.5)
        rates = expected * np.exp(slope * deviation - 0.5 * slope**2 * variance)
        score[i] = score_nb(counts, np.maximum(rates, 1e-8), LOG_THETA)
    return score


def _priors(
    score: NDArray[np.float64],
    level: NDArray[np.float64],
    noise: NDArray[np.float64],
    z: NDArray[np.float64],
    doubt: NDArray[np.float64],
    config: Settings,
) -> Hyper:
    center = float(z.mean())
    loc, tilt, scale = parameter_prior(logsumexp(score, axis=1), z - center, SLOPES, 1.0, 0.5)
    loc, scale = float(np.clip(loc, *SLOPE_LOC)), min(scale, SLOPE_SCALE)
    prior = -0.5 * ((SLOPES[:, None] - loc - tilt * (z - center)) / scale) ** 2  # [slopes, genes]
    theta = parameter_prior(logsumexp(score + (prior - logsumexp(prior, axis=0))[:, None], axis=0), z - center, LOG_THETA, 1.0, 1.5)
    gain, covariance = level_prior(level, noise, z - center, doubt)
    if config.gain == "none":
        mean, _ = random_effects(level - (z - center), noise)
        gain, covariance = (mean, 1.0, 1e-3), (0.0, 0.0, 0.0)
    return Hyper(0.0, 0.0, 1.0, 0.0, 0.0, gain, covariance, (loc, tilt, scale), (theta[0], theta[1], theta[2]), center, [])


def level_prior(
    gains: NDArray[np.float64], noise: NDArray[np.float64], z: NDArray[np.float64], doubt: NDArray[np.float64]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(a, b, s) of gain_g ~ Normal(a + b z_g, s^2 + noise_g + b^2 doubt_g) with b ~ Normal(1, 1/2), and the posterior covariance of a and b.

    s maximises the marginal likelihood (a and b integrated out); b in the variance is the last estimate.
    """
    design, prior = np.column_stack([np.ones_like(z), z]), np.diag([1e-6, AGREEMENT_SD**-2])
    slope = 1.0
    for _ in range(5):
        found = []
        for s in np.geomspace(MIN_SCALE, 3.0, 100):
            weight = 1 / (s**2 + noise + slope**2 * doubt)
            precision = design.T @ (weight[:, None] * design) + prior
            mean = np.linalg.solve(precision, design.T @ (weight * gains) + prior @ [0.0, 1.0])
            misfit = (weight * (gains - design @ mean) ** 2).sum() + (mean[1] - 1) ** 2 * prior[1, 1]
            found.append((misfit - np.log(weight).sum() + np.linalg.slogdet(precision)[1], s, mean, precision))
        _, s, mean, precision = min(found, key=lambda one: one[0])
        slope = float(mean[1])
    covariance = np.linalg.inv(precision)
    return (float(mean[0]), slope, float(s)), (float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1]))


class CountLayer(PyroModule):
    """Level, slope and dispersion of every gene: hyper-priors for unmeasured genes, own values for measured ones (`learn_own`)."""

    sample: Tensor  # [S, q] smoothed places of some cells of the fit, for c_g
    weight: Tensor  # [S] their share of the depth
    offset: Tensor  # log depth = offset + log(total + added)
    added: Tensor  # a T

    def __init__(self, data: Problem, hyper: Hyper, width: int) -> None:
        super().__init__()
        share, doubt = (torch.from_numpy(values).float() for values in true_shares(data))
        z, ones = share - hyper.center, torch.ones_like(share)
        (a, b, s), (aa, ab, bb) = hyper.gain, hyper.gain_covariance
        values = {
            "log_gain": (a + b * z, (s**2 + aa + 2 * ab * z + bb * z**2 + b**2 * doubt).sqrt()),
            "slope": ((hyper.slope[0] + hyper.slope[1] * z).clamp_min(SLOPES[0]), hyper.slope[2] * ones),
            "log_theta": (hyper.log_theta[0] + hyper.log_theta[1] * z, hyper.log_theta[2] * ones),
        }
        for name, (loc, scale) in values.items():
            self.register_buffer(f"{name}_loc", loc)  # [G]
            self.register_buffer(f"{name}_scale", scale)  # [G]
        cells = min(data.counts.shape[0], LEVEL_CELLS)
        self.register_buffer("sample", torch.zeros(cells, width))
        self.register_buffer("weight", torch.full((cells,), 1 / cells))
        for name in ("offset", "added"):
            self.register_buffer(name, torch.zeros(()))
        self.depth_prior, self.bend, self.own_depth = hyper.depth_prior, hyper.bend, hyper.own_depth

    def globals(self) -> None:
        """Sample level, slope and log theta of all genes [G] jointly, and the key of `gene_noise`."""
        for name in ("log_gain", "slope", "log_theta"):
            loc, scale = getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")
            pyro.sample(name, dist.Normal(loc, scale).to_event(1))  # [G]
        pyro.deterministic("gene_key", torch.randint(2**31, ()))

    def log_depth(self, totals: NDArray[np.float64]) -> NDArray[np.float32]:
        """Log depth of cells with these totals over all genes of the target, [n]."""
        return np.asarray(float(self.offset) + np.log(np.maximum(totals, 0.5) + float(self.added)), dtype=np.float32)

    def learn_own(self, data: Problem, place: Callable[[NDArray[np.int64]], NDArray[np.float32]], codes: Callable[[NDArray[np.int64]], Any]) -> None:
        """Level, slope and theta of the measured genes from their own counts; ``codes(genes)`` gives known loadings [q, g]."""
        n, p = data.counts.shape[0], len(data.panel)
        rows = np.random.default_rng(0).permutation(n)[:LEVEL_CELLS]
        where, totals, every = place(rows), data.totals[rows], all_counts(data.counts[rows])
        depth = depths(every, self.depth_prior)
        self.sample, self.weight = torch.from_numpy(where).float(), torch.from_numpy(depth / depth.sum()).float()
        self.offset.fill_(float(np.log(np.maximum(totals, 0.5).sum() / depth.sum())))
        self.added.fill_(self.depth_prior * every.mean())
        some = int(np.clip(OWN_ENTRIES // p, 100, len(rows)))
        used = np.flatnonzero(totals > 0)[:some]
        rows, where, depth = rows[used], where[used], depth[used]
        own, _ = log_shares(data.counts, data.columns)
        for start in range(0, p, 256):
            part = slice(start, start + 256)
            counts = data.counts[rows][:, data.columns[part]].toarray().astype(np.float64)
            known = codes(data.panel[part])
            score = _score(counts, depth, self.bend, where, Codes(known, np.zeros_like(known), known[None]))
            weight = np.exp(score - logsumexp(score, axis=(0, 1)))  # [slopes, thetas, g]
            slope = (weight.sum(1) * SLOPES[:, None]).sum(0)
            log_theta = (weight.sum(0) * LOG_THETA[:, None]).sum(0)
            index = torch.from_numpy(data.panel[part])
            for name, values in (("slope", slope), ("log_theta", log_theta), ("log_gain", own[data.columns[part]])):
                getattr(self, f"{name}_loc")[index] = torch.from_numpy(values).float()
                getattr(self, f"{name}_scale")[index] = 0.02

r"""From a standardised map f of a gene to its counts.

    f_ig    = u_i . t_g;   m_ig, s_ig^2 its posterior mean and variance given the features
    v_ig    = bend(m_ig),   d_ig = slope_g bend'(m_ig) (f_ig - m_ig)
    rate_ig = depth_i exp(log_gain_g + slope_g v_ig - c_g(slope_g)) exp(d_ig - var(d_ig) / 2)
    x_ig    ~ NB(rate_ig, theta_g)
    depth_i ~ total_i + a T, T the usual total in the cell's section: posterior mean of a depth that is Gamma over cells, known from a total over all
              genes of the target (also those that the reference lacks); a, chosen on inner genes (as counts: a T), is larger the less these say of
              the others. Scaled so that its sum is that of the counts of the shared genes. In draws Gamma(total_i + a T) of that mean, one for all
              genes of the cell: sums over genes are off together
    c_g(b)  = log of the mean of exp(b v_ig) over cells of the fit, weighted by their depths
    bend(m) = log(1 + k m) / k (its argument kept above 0; k = 0: m itself), so exp(slope bend(m)) = (1 + k m)^(slope / k)

A map is a standardised log-normalised count, log1p of the rate, not its logarithm: where a gene is off it stops falling, and far above its mean it
grows less than the logarithm of an exponential would. k, chosen on inner genes, is between a logarithm (0) and a root.

    t_g         = its posterior mean + e x what is not known of it      e: how far inner genes' loadings are, over how far they are said to be
    log_gain_g  ~ Normal(a + b z_g, s)     z_g = true log share of the gene in the reference, centered
    b           ~ Normal(1, 1/2)           1: the platforms agree
    z_g         ~ Normal(m, t), seen through the few counts of its reference; both doubts, and those of a and b, widen the level
    slope_g     ~ Normal(m + m' z_g, s'), floored at 0     a rare marker is on or off, an abundant gene varies by a factor;
    log theta_g ~ Normal(a' + b' z_g, s'')                 both lines stay as they are beyond the inner genes' z

So log_gain is the log of a gene's counts per count of the shared genes, whatever its map and slope: the same quantity as the reference's log share.
The last factor of a rate, what is not known of the gene's map, has mean 1: a cell is not expected to have more
of a gene because less is known of it there.

A log-normalised count is log1p(x_ig D / t_i), t_i the total over the shared genes and D its median. If t_i is the depth, log1p(D rate_ig / depth_i)
is a good guess; if it is a noisy count beside depth_i, as where few genes are shared and many measured, P(x > 0) log1p(D / t_i E[x | x > 0]) is
better, and is taken where inner genes say so beyond their standard error (`own_depth`).

What is said to be chosen or learned on inner genes, and e: `ppl_st.models.common.inner`. Slopes and log thetas are learned, and meant, between the
ends of their grids; draws are normal with the mean and sd that is. Measured genes have level, slope and theta from their own counts, these two with
the same priors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp
from torch import Tensor

from ppl_st.inference.hyperpriors import MIN_SCALE, random_effects, score_nb, within
from ppl_st.models.common.cells import Problem, all_counts, log_shares
from ppl_st.models.common.process import Process

SOFT = 0.1  # 1 + k m stays above about SOFT^2 / |1 + k m|
SLOPES = np.array([0.2, 0.5, 0.8, 1.1, 1.4, 1.7, 2.1, 2.6, 3.2, 4.0, 5.0])  # at which counts are scored,
LOG_THETA = np.linspace(-3.0, 5.0, 9)
FINE_SLOPES, FINE_THETA = np.linspace(0.2, 5.0, 49), np.linspace(-3.0, 5.0, 41)  # and what lies between: even, so that a sum is an integral
LEVEL_CELLS = 10_000  # of the fit, over which c_g is a mean: 50 of a type of which there are .5%, whose markers have their level from it
OWN_CELLS = 1000  # at most, and
OWN_ENTRIES = 1_500_000  # cells x genes, on which measured genes learn slope and theta
OWN_SD = 0.02  # of level, slope and log theta of measured genes, at least
LARGEST = 8.0  # |slope f| is clamped: no cell is e^8 away from the mean
NODES = 7  # of the quadrature over what is not known of a map
SHARE_NODES = np.linspace(-16.0, 8.0, 61)[:, None]  # of a posterior with a long tail below, in its sd at the mode
SHARE_STEPS = 12  # of EM


def quadrature(number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights of the expectation over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(number)
    return nodes, weights / weights.sum()


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
    span: tuple[float, float] = (-99.0, 99.0)  # of z - center among inner genes: m + m' z and a' + b' z stay as they are at its ends


class Codes(NamedTuple):
    """Loadings of genes under a fit that was not shown them: normal and independent, or ``draws`` of them around the mean."""

    mean: NDArray[np.float32]  # [q, genes]
    variance: NDArray[np.float32]  # [q, genes]; 0 where there are draws
    draws: NDArray[np.float32] | None = None  # [draws, q, genes], where no law is known in closed form
    noise: NDArray[np.float32] | None = None  # [K, genes] loadings of what differs from cell to cell in every draw: K standard normals each
    process: Process | None = None  # over the reference's cells; its features are the places after the first q
    shares: tuple[float, ...] = (0.0,)  # of the process that may be tried

    def mixed(self, share: float, doubt: float) -> "Codes":
        """(1 - share) of the loadings and ``share`` of the process, [q + F, genes], and ``doubt`` times what is not known of the former."""
        found = self._replace(variance=doubt**2 * self.variance)
        if self.draws is not None:
            found = found._replace(draws=doubt * (self.draws - self.mean) + self.mean)
        if self.process is None:
            return found
        beta, sd = share * self.process.field.beta, share * self.process.field.beta_sd
        return found._replace(mean=np.vstack([(1 - share) * self.mean, beta]), variance=np.vstack([found.variance, sd**2]))


def log_mean(share: Tensor, depth: Tensor, log_theta: Tensor | None, median: float, factor: Tensor | None) -> Tensor:
    """Mean of a log-normalised count [n, g], see the file's docstring: from the rate ``share`` x ``depth`` [n, 1], at the median depth where no
    ``factor`` D / t [n, 1] is given; a count that is not 0 is taken at its mean. ``log_theta`` None: Poisson."""
    if factor is None:
        return torch.log1p(median * share)
    rate = share * depth
    zero = -rate if log_theta is None else -log_theta.exp() * torch.log1p(rate * (-log_theta).exp())
    positive = -torch.expm1(zero).clamp(max=-1e-12)
    return positive * torch.log1p(factor * rate / positive)


def depths(totals: NDArray[np.float64], relative: NDArray[np.float64], depth_prior: float) -> NDArray[np.float64]:
    """Relative depth [n] of cells with these totals over all genes, in sections that are ``relative`` [n] times as deep as usual: total + a T."""
    return np.asarray(np.maximum(totals, 0.5) + depth_prior * totals.mean() * relative)


def true_shares(data: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`share_posterior` of every gene's log share in the reference [G]."""
    return share_posterior(data.log_share, data.share_variance)


def share_posterior(log_share: NDArray[np.float64], variance: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """True log shares of genes from `log_shares` and its sampling variance, all [G]: location z and variance v, such that exp(z + v / 2) is the
    posterior mean of the share.

    A share is seen as a Poisson count would show it, of so many counts as have its sampling variance (1 / v - 1/2; half of one was added to them), on
    a grid around the mode; its logarithm is normal over genes, with the mean and sd that this likelihood makes of all of them (EM).
    """
    variance = np.maximum(variance, 1e-9)
    counts, exposure = np.maximum(1 / variance - 0.5, 0.0), np.exp(-log_share) / variance
    (mean, scale), mode = random_effects(log_share, variance), log_share.copy()
    for _ in range(SHARE_STEPS):
        for _ in range(20):  # Newton: the log density is concave
            expected = exposure * np.exp(mode)
            mode += np.clip((counts - expected - (mode - mean) / scale**2) / (expected + scale**-2), -1, 1)
        expected = exposure * np.exp(mode)
        x = SHARE_NODES / np.sqrt(expected + scale**-2)  # [nodes, G]
        weight = np.exp(counts * x - expected * np.expm1(x) - (x / 2 + mode - mean) * x / scale**2)
        weight /= weight.sum(0)
        shift = (weight * x).sum(0)
        spread = (weight * np.square(x - shift)).sum(0)
        mean = (mode + shift).mean()
        scale = max(np.sqrt((spread + np.square(mode + shift - mean)).mean()), MIN_SCALE)
    return mode + np.log((weight * np.exp(x)).sum(0)) - spread / 2, spread


def smooth(place: NDArray[np.float32], neighbors: sp.csr_matrix | None, share: float) -> NDArray[np.float32]:
    """(1 - share) of the cell's own place and ``share`` of its neighbors' mean place."""
    if share == 0.0 or neighbors is None:
        return place
    return np.asarray((1 - share) * place + share * (neighbors @ place), dtype=np.float32)


def bend(m: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """log(1 + k m) / k and its slope in m, with 1 + k m kept above 0 by a smooth floor; see the file's docstring."""
    if k == 0.0:
        return m, torch.ones_like(m)
    u = 1 + k * m
    root = (u.square() + 4 * SOFT**2).sqrt()
    above = (u + root) / 2
    return above.log() / k, (1 + u / root) / 2 / above


def score_counts(
    counts: NDArray[np.float64], depth: NDArray[np.float64], bent: float, place: NDArray[np.float32], codes: Codes
) -> NDArray[np.float64]:
    """Log predictive score [slopes, thetas, genes] at each gene's own level, of cells of relative ``depth`` [n].

    What is not known of a cell's map is integrated by quadrature. The log of a mean over few draws is too small, the more so the more they differ:
    it would call for flat slopes, and so, less, do seven nodes where maps are steep (3 and more) and doubtful.
    """
    depth, place = depth[:, None], place.astype(np.float64)
    mean, variance = place @ codes.mean, place**2 @ codes.variance  # [n, g]
    if codes.noise is not None:
        variance += np.square(codes.noise).sum(0)
    if codes.draws is not None:
        deviation, weights = np.stack([place @ (code - codes.mean) for code in codes.draws]), None  # [D, n, g]
    else:
        nodes, weights = quadrature(NODES) if variance.any() else (np.zeros(1), np.ones(1))  # measured genes: known maps
        deviation = nodes[:, None, None] * np.sqrt(variance)
    mean, steep = (part.numpy() for part in bend(torch.from_numpy(mean), bent))
    deviation, variance = steep * deviation, steep**2 * variance
    score = np.empty((len(SLOPES), len(LOG_THETA), counts.shape[1]))
    for i, slope in enumerate(SLOPES):
        expected = depth * np.exp((slope * mean).clip(-LARGEST, LARGEST))
        expected *= (counts.sum(0) + 0.5) / (expected.sum(0) + 0.5)
        rates = expected * np.exp(slope * deviation - 0.5 * slope**2 * variance)
        score[i] = score_nb(counts, np.maximum(rates, 1e-8), LOG_THETA, weights)
    return score


def refined(score: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores on `FINE_SLOPES` and `FINE_THETA` [49, 41, genes] from those of `score_counts`, by cubic splines."""
    between = CubicSpline(SLOPES, score, axis=0)(FINE_SLOPES)
    return np.asarray(CubicSpline(LOG_THETA, between, axis=1)(FINE_THETA))


class CountLayer(PyroModule):
    """Level, slope and dispersion of every gene: hyper-priors for unmeasured genes, own values for measured ones (`learn_own`)."""

    sample: Tensor  # [S, q] smoothed places of some cells of the fit, for c_g
    weight: Tensor  # [S] their share of the depth
    offset: Tensor  # log depth = offset + log(total + added relative)
    added: Tensor  # a T of the fit

    def __init__(self, data: Problem, hyper: Hyper, width: int) -> None:
        super().__init__()
        share, doubt = (torch.from_numpy(values).float() for values in true_shares(data))
        z, ones = share - hyper.center, torch.ones_like(share)
        inside = z.clamp(*hyper.span)
        (a, b, s), (aa, ab, bb) = hyper.gain, hyper.gain_covariance
        values = {
            "log_gain": (a + b * z, (s**2 + aa + 2 * ab * z + bb * z**2 + b**2 * doubt).sqrt()),
            "slope": within(hyper.slope[0] + hyper.slope[1] * inside, hyper.slope[2] * ones, *SLOPES[[0, -1]]),
            "log_theta": within(hyper.log_theta[0] + hyper.log_theta[1] * inside, hyper.log_theta[2] * ones, *LOG_THETA[[0, -1]]),
        }
        for name, (loc, scale) in values.items():
            self.register_buffer(f"{name}_loc", loc)  # [G]
            self.register_buffer(f"{name}_scale", scale)  # [G]
        self.prior = {name: tuple(part.double().numpy() for part in values[name]) for name in ("slope", "log_theta")}  # of measured genes, too
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

    def log_depth(self, totals: NDArray[np.float64], relative: NDArray[np.float64]) -> NDArray[np.float32]:
        """Log depth of cells with these totals over all genes of the target, in sections that are ``relative`` times as deep as the fit, [n]."""
        return np.asarray(float(self.offset) + np.log(self.known(totals, relative)), dtype=np.float32)

    def known(self, totals: NDArray[np.float64], relative: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shape of the gamma posterior of the depths of cells with these totals, the counts that they are known from, [n]."""
        return np.asarray(np.maximum(totals, 0.5) + float(self.added) * relative)

    def learn_own(self, data: Problem, place: Callable[[NDArray[np.int64]], NDArray[np.float32]], codes: Callable[[NDArray[np.int64]], Any]) -> None:
        """Level, slope and theta of the measured genes from their own counts, slope and theta also from the hyper-priors: a gene without counts has
        theirs. ``codes(genes)`` gives known loadings [q, g]."""
        n, p = data.counts.shape[0], len(data.panel)
        rows = np.random.default_rng(0).permutation(n)[:LEVEL_CELLS]
        where, totals, every = place(rows), data.totals[rows], all_counts(data.counts[rows])
        depth = depths(every, data.relative[rows], self.depth_prior)
        self.sample, self.weight = torch.from_numpy(where).float(), torch.from_numpy(depth / depth.sum()).float()
        self.offset.fill_(float(np.log(np.maximum(totals, 0.5).sum() / depth.sum())))
        self.added.fill_(self.depth_prior * every.mean())
        some = int(np.clip(OWN_ENTRIES // p, 100, OWN_CELLS))
        used = np.flatnonzero(totals > 0)[:some]
        rows, where, depth = rows[used], where[used], depth[used]
        own, variance = (values[data.columns] for values in log_shares(data.counts, data.columns))
        level_sd = np.maximum(np.sqrt(variance), OWN_SD)
        for start in range(0, p, 256):
            part = slice(start, start + 256)
            counts = data.counts[rows][:, data.columns[part]].toarray().astype(np.float64)
            known = codes(data.panel[part])
            index = torch.from_numpy(data.panel[part])
            score = refined(score_counts(counts, depth, self.bend, where, Codes(known, np.zeros_like(known))))
            for axis, (name, grid) in enumerate((("slope", FINE_SLOPES), ("log_theta", FINE_THETA))):
                loc, scale = (values[data.panel[part]] for values in self.prior[name])
                score -= np.expand_dims(np.square((grid[:, None] - loc) / scale) / 2, 1 - axis)
            weight = np.exp(score - logsumexp(score, axis=(0, 1)))  # [slopes, thetas, g]
            self._set("log_gain", index, own[part] - level_sd[part] ** 2 / 2, level_sd[part])
            for axis, (name, grid) in enumerate((("slope", FINE_SLOPES), ("log_theta", FINE_THETA))):
                of_value = weight.sum(1 - axis)  # [grid, g]
                mean = grid @ of_value
                self._set(name, index, mean, np.sqrt(np.maximum(grid**2 @ of_value - mean**2, OWN_SD**2)))

    def _set(self, name: str, index: Tensor, loc: NDArray[np.float64], scale: NDArray[np.float64]) -> None:
        getattr(self, f"{name}_loc")[index] = torch.from_numpy(loc).float()
        getattr(self, f"{name}_scale")[index] = torch.from_numpy(scale).float()

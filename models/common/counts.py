r"""From a standardised map f of a gene to its counts, and what inner held-out genes teach about genes that nobody measured.

    f_ig    = u_i . t_g;   m_ig, s_ig^2 its posterior mean and variance given the features, v_g the variance of m_ig over cells
    rate_ig = total_i exp(log_gain_g + slope_g m_ig - slope_g^2 v_g / 2) exp(slope_g (f_ig - m_ig) - slope_g^2 s_ig^2 / 2)
    x_ig    ~ NB(rate_ig, theta_g)

    log_gain_g  ~ Normal(a + b z_g, s)     z_g = log share of the gene in the reference, centered
    slope_g     ~ Normal(m, s'), floored at 0
    log theta_g ~ Normal(a' + b' z_g, s'')

The second factor, what is not known of the gene's map, has mean 1: a cell is not expected to have more of a gene because less is known of it there.

The hyper-priors are learned on inner genes: panel genes that a fit was not shown, scored with the posterior draws of that fit, so that they
describe what is left *beside* the spread of the draws. Residuals of genes that the fit has seen would be far too small. Measured genes keep their
own level, slope and theta.
"""

from collections.abc import Callable
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

from ppl_st.inference.hyperpriors import parameter_prior, random_effects, score_nb
from ppl_st.models.common.cells import Problem, take_cells, without

SMOOTHING = (0.0, 0.25, 0.5)  # shares of the neighbors that are tried
SLOPES = np.array([0.2, 0.5, 0.8, 1.1, 1.4, 1.8, 2.3])
SLOPE_LOC = (0.6, 1.6)  # a map that was shrunk by its posterior already has a slope near 1
SLOPE_SCALE = 0.5
LOG_THETA = np.linspace(-3.0, 5.0, 9)
FOLDS = 4
MIN_PANEL = 12  # shared genes below which nothing is held out to learn from
INNER_GENES = 40  # judged per fold, at most
INNER_CELLS = 1000
INNER_DRAWS = 6
OWN_ENTRIES = 1_500_000  # cells x genes on which measured genes learn slope and theta
LARGEST = 8.0  # |slope f| is clamped: no cell is e^8 away from the mean


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    smoothing: float
    gain: tuple[float, float, float]  # a, b, s
    slope: tuple[float, float]  # m, s'
    log_theta: tuple[float, float, float]  # a', b', s''
    center: float  # of z
    candidates: list[dict[str, float]]  # every smoothing tried, with its score




class Codes(NamedTuple):
    """Loadings of genes under a fit that was not shown them."""

    mean: NDArray[np.float32]  # [q, genes]
    variance: NDArray[np.float32]  # [q, genes]
    draws: NDArray[np.float32]  # [draws, q, genes]
    noise: NDArray[np.float32] | None = None  # [K, genes] loadings of what differs from cell to cell in every draw: K standard normals each


class Settings(Protocol):
    """What `learn_hyper` uses of a method's settings."""

    @property
    def smoothing(self) -> float | str:
        """Share of the spatial neighbors in a cell's place, or "auto"."""

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
    smoothing = 0.0 if config.smoothing == "auto" else float(config.smoothing)
    return Hyper(smoothing, (_mean_gain(data), 0.5, 1.0), (1.0, 0.4), (0.5, 0.0, 1.0), float(z.mean()), [])


def _mean_gain(data: Problem) -> float:
    counts = np.asarray(data.counts[:, data.columns].sum(0), dtype=np.float64).ravel()
    return float(np.log((counts + 0.5) / (data.totals.sum() + 1)).mean())


def learn_hyper(
    data: Problem, config: Settings, seed: int, say: Callable[[str], None], fit: Callable[[Any, NDArray[np.int64]], Fit], folds: int = FOLDS
) -> Hyper:
    """Choose the smoothing and learn the hyper-priors; ``fit(problem, genes)`` fits the problem and knows how to
    draw ``genes``; only the first ``folds`` of `FOLDS` parts of the panel are held out."""
    if len(data.panel) < MIN_PANEL:
        say(f"{len(data.panel)} shared genes: too few to learn hyper-priors from; wide ones are used")
        return default_hyper(data, config)
    rng = np.random.default_rng([seed, 1])
    data, rows = _subset(data, rng)
    options = SMOOTHING if config.smoothing == "auto" else (float(config.smoothing),)
    if data.neighbors is None:
        options = (0.0,)
    order = rng.permutation(len(data.panel))
    scores: dict[float, list[NDArray[np.float64]]] = {option: [] for option in options}
    levels: dict[float, list[NDArray[np.float64]]] = {option: [] for option in options}
    noises, genes = [], []
    for fold in range(folds):
        inner = np.sort(order[fold::FOLDS])
        split = without(data, inner)
        judged = inner[np.sort(rng.permutation(len(inner))[:INNER_GENES])]
        problem = fit(split, data.panel[judged])
        codes = problem.codes(INNER_DRAWS, [seed, 2, fold])
        place = problem.place(split)
        counts = data.counts[rows][:, data.columns[judged]].toarray().astype(np.float64)
        totals = split.totals
        for option in options:
            score, level = _score(counts, totals[rows], smooth(place, split.neighbors, option)[rows], codes)
            scores[option].append(score)
            levels[option].append(level)
        noises.append(1 / (counts.sum(0) + 0.5) + 1 / (data.evidence[data.panel[judged]] + 0.5))
        genes.append(data.panel[judged])
    total = {option: float(logsumexp(np.concatenate(parts, 2), axis=(0, 1)).sum()) for option, parts in scores.items()}
    best = max(total, key=lambda option: total[option])
    candidates = [{"smoothing": option, "inner genes": value} for option, value in total.items()]
    z = data.log_share[np.concatenate(genes)]
    hyper = _priors(np.concatenate(scores[best], 2), np.concatenate(levels[best], 1), np.concatenate(noises), z, config, best, candidates)
    say(
        f"smoothing {best:g}; gain {hyper.gain[0]:.2f} + {hyper.gain[1]:.2f} log share, sd {hyper.gain[2]:.2f}; slope {hyper.slope[0]:.2f}, sd "
        f"{hyper.slope[1]:.2f}; log theta {hyper.log_theta[0]:.2f}, sd {hyper.log_theta[2]:.2f} ({len(z)} inner genes)"
    )
    return hyper


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


def log_shape(mean: Any, deviation: Any, variance: Any, spread: Any, slope: Any) -> Any:
    """log rate - log total - log gain of cells: arrays or tensors m, f - m and s^2 [n, g], v [g], slope [g] or one."""
    return (slope * mean).clip(-LARGEST, LARGEST) - 0.5 * slope**2 * (spread + variance) + slope * deviation


def _score(
    counts: NDArray[np.float64],
    totals: NDArray[np.float64],
    place: NDArray[np.float32],
    codes: Codes,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log predictive score [slopes, thetas, genes] at each gene's best level, and that log level [slopes, genes]."""
    used = totals > 0
    counts, depth, place = counts[used], np.maximum(totals[used], 0.5)[:, None], place[used].astype(np.float64)
    mean, variance = place @ codes.mean, place**2 @ codes.variance  # [n, g]
    deviation = np.stack([place @ (code - codes.mean) for code in codes.draws])  # [D, n, g]
    if codes.noise is not None:
        variance += np.square(codes.noise).sum(0)
        rng = np.random.default_rng(len(counts))
        deviation += np.stack([rng.standard_normal((len(counts), len(codes.noise))) @ codes.noise for _ in deviation])
    score = np.empty((len(SLOPES), len(LOG_THETA), counts.shape[1]))
    level = np.empty((len(SLOPES), counts.shape[1]))
    for i, slope in enumerate(SLOPES):
        rates = depth * np.exp(log_shape(mean, deviation, variance, mean.var(0), slope))
        gain = (counts.sum(0) + 0.5) / ((depth * np.exp(log_shape(mean, 0.0, 0.0, mean.var(0), slope))).sum(0) + 0.5)
        score[i] = score_nb(counts, np.maximum(rates * gain, 1e-8), LOG_THETA)
        level[i] = np.log(gain)
    return score, level


def _priors(
    score: NDArray[np.float64],
    level: NDArray[np.float64],
    noise: NDArray[np.float64],
    z: NDArray[np.float64],
    config: Settings,
    smoothing: float,
    candidates: list[dict[str, float]],
) -> Hyper:
    center = float(z.mean())
    flat = np.zeros_like(z)
    loc, _, scale = parameter_prior(logsumexp(score, axis=1), flat, SLOPES, 1.0, 0.5)
    loc, scale = float(np.clip(loc, *SLOPE_LOC)), min(scale, SLOPE_SCALE)
    prior = -0.5 * ((SLOPES - loc) / scale) ** 2
    theta = parameter_prior(logsumexp(score + (prior - logsumexp(prior))[:, None, None], axis=0), z - center, LOG_THETA, 1.0, 1.5)
    gains = level[np.abs(SLOPES - loc).argmin()]
    slope = float(((z - center) * (gains - gains.mean())).sum() / (np.square(z - center).sum() + 1.0))
    if config.gain == "none":
        slope = 1.0
    mean, sd = random_effects(gains - slope * (z - center), noise)
    return Hyper(
        smoothing, (mean, slope, sd if config.gain == "hierarchical" else 1e-3), (loc, scale), (theta[0], theta[1], theta[2]), center, candidates
    )


class CountLayer(PyroModule):
    """Level, slope and dispersion of every gene: hyper-priors for unmeasured genes, own values for measured ones (`learn_own`)."""

    def __init__(self, data: Problem, hyper: Hyper) -> None:
        super().__init__()
        z = torch.from_numpy(data.log_share - hyper.center).float()
        ones = torch.ones_like(z)
        values = {
            "log_gain": (hyper.gain[0] + hyper.gain[1] * z, hyper.gain[2] * ones),
            "slope": (hyper.slope[0] * ones, hyper.slope[1] * ones),
            "log_theta": (hyper.log_theta[0] + hyper.log_theta[1] * z, hyper.log_theta[2] * ones),
        }
        for name, (loc, scale) in values.items():
            self.register_buffer(f"{name}_loc", loc)  # [G]
            self.register_buffer(f"{name}_scale", scale)  # [G]

    def globals(self) -> None:
        """Sample level, slope and log theta of all genes [G] jointly, and the key of `gene_noise`."""
        for name in ("log_gain", "slope", "log_theta"):
            loc, scale = getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")
            pyro.sample(name, dist.Normal(loc, scale).to_event(1))  # [G]
        pyro.deterministic("gene_key", torch.randint(2**31, ()))

    def learn_own(self, data: Problem, place: Callable[[NDArray[np.int64]], NDArray[np.float32]], codes: Callable[[NDArray[np.int64]], Any]) -> None:
        """Level, slope and theta of the measured genes from their own counts; ``codes(genes)`` gives known loadings [q, g]."""
        n, p = data.counts.shape[0], len(data.panel)
        rows = np.sort(np.random.default_rng(0).permutation(n)[: int(np.clip(OWN_ENTRIES // p, 100, INNER_CELLS))])
        where, totals = place(rows), data.totals[rows]
        for start in range(0, p, 256):
            part = slice(start, start + 256)
            counts = data.counts[rows][:, data.columns[part]].toarray().astype(np.float64)
            known = codes(data.panel[part])
            score, level = _score(counts, totals, where, Codes(known, np.zeros_like(known), known[None]))
            weight = np.exp(score - logsumexp(score, axis=(0, 1)))  # [slopes, thetas, g]
            slope = (weight.sum(1) * SLOPES[:, None]).sum(0)
            log_theta = (weight.sum(0) * LOG_THETA[:, None]).sum(0)
            gain = (weight.sum(1) * level).sum(0)
            index = torch.from_numpy(data.panel[part])
            for name, values in (("slope", slope), ("log_theta", log_theta), ("log_gain", gain)):
                getattr(self, f"{name}_loc")[index] = torch.from_numpy(values).float()
                getattr(self, f"{name}_scale")[index] = 0.02


def gene_noise(key: Tensor, genes: Tensor, size: int) -> Tensor:
    """Standard normal numbers [size, g], a pure function of (key, gene): the same in every block of cells and for every choice of genes."""
    rows = [np.random.Generator(np.random.SFC64([int(key), int(gene)])).standard_normal(size, dtype=np.float32) for gene in genes]
    return torch.from_numpy(np.stack(rows, 1))

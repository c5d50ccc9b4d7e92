"""Hyper-priors of gene effects, learned from genes that were held out of a fit: for genes that nobody measured only these remain."""

import math
from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from torch import Tensor

from ppl_st.errors import UserError

if TYPE_CHECKING:
    from ppl_st.observation import Likelihood

__all__ = ["MIN_SCALE", "learn_parameters", "parameter_prior", "random_effects", "score_grid", "score_nb", "within"]

MIN_SCALE = 0.05  # no two platforms agree better than this: 5 % per gene
OWN_CELLS = 2000  # cells on which parameters of likelihoods other than the negative binomial are learned: each costs a log_prob per draw
ROWS = 512  # cells scored at once


def random_effects(values: NDArray[np.float64], noise: NDArray[np.float64], center: float | None = None) -> tuple[float, float]:
    """Mean and sd of Normal(m, s) when ``values`` carry sampling variances ``noise``; s is predictive (for a new gene).

    m is integrated (restricted likelihood), and s^2 is its posterior mean where log s is uniform between `MIN_SCALE` and 3: of a few genes the
    likeliest s is too small. ``center`` is m where it is known; s is then the likeliest, and may be as small as 0.005.
    """

    def fit(s: float) -> tuple[float, float]:
        weight = 1 / (s**2 + noise)
        mean = float((weight * values).sum() / weight.sum()) if center is None else center
        loss = float((weight * (values - mean) ** 2).sum() - np.log(weight).sum())
        return mean, loss + (np.log(weight.sum()) if center is None else 0.0)

    grid = np.geomspace(MIN_SCALE if center is None else 0.005, 3.0, 100)
    loss = np.array([fit(s)[1] for s in grid])
    if center is None:
        s = float(np.sqrt(np.average(grid**2, weights=np.exp(-0.5 * (loss - loss.min())))))
    else:
        s = float(grid[loss.argmin()])
    return fit(s)[0], s * float(np.sqrt(1 + 1 / len(values)))


def parameter_prior(
    score: NDArray[np.float64], z: NDArray[np.float64], grid: NDArray[np.float64], declared: float, width: float
) -> list[float]:
    """Hyper-prior Normal(a + b . z_g, s) of a parameter by marginal likelihood, each gene's value integrated over the grid: [a, *b, s]; z [k, genes]
    are covariates, or [genes] one.

    Genes without a trace of over-dispersion have a flat likelihood for large theta, so a maximum per gene would be noise; here they only say
    "large". Weak priors around the declared (location, width) keep the fit proper: a ~ Normal(location, 2.5 width), each b ~ Normal(0, width / 2),
    log s ~ Normal(log width / 2, 0.7).
    """
    likelihood, z = score - score.max(0), np.atleast_2d(z)

    def loss(parameters: NDArray[np.float64]) -> float:
        loc, slope, log_scale = parameters[0], parameters[1:-1], parameters[-1]
        scale = np.exp(np.clip(log_scale, np.log(width) - 4.0, np.log(width) + 2.0))
        log_prior = -0.5 * ((grid[:, None] - loc - slope @ z) / scale) ** 2
        log_prior -= logsumexp(log_prior, 0)  # normalised on the grid
        penalty = 0.5 * float(((slope / (width / 2)) ** 2).sum()) + 0.5 * ((log_scale - np.log(width / 2)) / 0.7) ** 2
        penalty += 0.5 * ((loc - declared) / (2.5 * width)) ** 2
        return float(penalty - logsumexp(likelihood + log_prior, 0).sum())

    start = np.array([np.median(grid[score.argmax(0)]), *np.zeros(len(z)), np.log(width / 2)])
    loc, *slope, log_scale = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 2000}).x
    scale = np.exp(np.clip(log_scale, np.log(width) - 4.0, np.log(width) + 2.0)) * np.sqrt(1 + 1 / score.shape[1])
    return [float(loc), *map(float, slope), float(scale)]


def within(loc: Tensor, scale: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Mean and sd of Normal(loc, scale) between ``low`` and ``high``, of any shape: what a hyper-prior learned on a grid means to a draw.

    For thousands of genes at once, which scipy's truncnorm takes one by one.
    """
    wide = scale.double()
    at = torch.minimum(torch.maximum(loc.double(), low - 500 * wide), high + 500 * wide)  # beyond, nothing changes
    left, right = (low - at) / wide, (high - at) / wide
    mirrored = left + right > 0  # seen from the side whose tail keeps its digits
    near, far = torch.where(mirrored, -left, right), torch.where(mirrored, -right, left)
    top = torch.special.log_ndtr(near)
    log_mass = top + torch.log1p(-(torch.special.log_ndtr(far) - top).exp())
    p, q = ((-0.5 * x.square() - 0.5 * math.log(2 * math.pi) - log_mass).exp() for x in (left, right))
    mean = p - q
    variance = 1 + left * p - right * q - mean.square()
    return (at + wide * mean).clamp(low, high).to(loc.dtype), (wide * variance.clamp_min(1e-12).sqrt()).to(loc.dtype)


def score_nb(
    counts: NDArray[np.float64], mu: NDArray[np.float64], grid: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """sum_i log mean_d NB(x_i | mean mu_di, inverse dispersion e^t) [grid, genes] for t on the grid of log theta; counts [n, g], mu [draws, n, g].

    ``weights`` [draws] of the mean, None: all the same.
    """
    score = np.zeros((len(grid), counts.shape[1]))
    values, at = np.unique(counts, return_inverse=True)  # few: gammaln once for each
    at = at.reshape(counts.shape)
    for first in range(0, len(counts), ROWS):
        x, rate = counts[first : first + ROWS], mu[:, first : first + ROWS]
        power, log_p = x * np.log(rate), np.empty(rate.shape)  # one large array for all steps
        for t, theta in enumerate(np.exp(grid)):
            np.log(np.add(rate, theta, out=log_p), out=log_p)
            np.subtract(power, np.multiply(x + theta, log_p, out=log_p), out=log_p)
            top = log_p.max(0)
            np.exp(np.subtract(log_p, top, out=log_p), out=log_p)
            log_mean = top + np.log(np.average(log_p, axis=0, weights=weights))
            gamma = gammaln(values + theta)[at[first : first + ROWS]]
            score[t] += (log_mean + gamma).sum(0) + len(x) * (theta * np.log(theta) - gammaln(theta))
    return score


def score_grid(
    likelihood: "Likelihood", name: str, others: dict[str, Tensor], counts: Tensor, rates: Tensor
) -> NDArray[np.float64]:
    """sum_i log mean_d p(x_i | rate_d, parameters) with one parameter on its grid [grid, genes].

    counts [n, genes] and rates [draws, n, genes] are float64. Other likelihoods than the negative binomial are scored on up to `OWN_CELLS` of the
    rows, evenly spread: rows may be in the order of sections.
    """
    grid = likelihood.grid(name)
    if likelihood.name == "nb":
        return score_nb(counts.numpy(), rates.numpy(), grid.numpy())
    score = torch.zeros(len(grid), counts.shape[1], dtype=torch.float64)
    with torch.no_grad(), pyro.validation_enabled(False):
        kept = np.linspace(0, len(counts) - 1, min(len(counts), OWN_CELLS)).astype(np.int64)
        for first in range(0, len(kept), ROWS):
            rows = torch.from_numpy(kept[first : first + ROWS])
            x, mu = counts[rows], rates[:, rows]
            for t, value in enumerate(grid):
                log_p = likelihood(mu, {**others, name: value.expand(counts.shape[1])}).log_prob(x.expand_as(mu))
                score[t] += (torch.logsumexp(log_p, 0) - np.log(len(rates))).sum(0)
    if not score.amax(0).isfinite().all():
        bad = grid[(score.isnan() | (score == torch.inf) | (score == -torch.inf)).any(1)]
        raise UserError(
            f"likelihood {likelihood.name!r}: log_prob of the counts is not finite at {name} = {bad[0]:.3g}, which is tried with all values from "
            f"{grid[0]:.3g} to {grid[-1]:.3g}; make it finite there, or give {name} a prior with a smaller scale"
        )
    return score.numpy()


def learn_parameters(
    likelihood: "Likelihood", inner_genes: list[tuple[Tensor, Tensor]], z: NDArray[np.float64]
) -> dict[str, list[float]]:
    """Hyper-priors [a, *b, s] of the likelihood's parameters from (counts, rates) of the inner genes of each fold; z [genes] is their covariate, or
    [k, genes] several.

    One parameter after the other, the others at the mean of their hyper-prior; twice where there are several.
    """
    z = np.atleast_2d(z)
    learned = {name: [loc, *np.zeros(len(z)), scale] for name, (loc, scale) in likelihood.priors.items()}
    sizes = [counts.shape[1] for counts, _ in inner_genes]
    for _ in range(min(2, len(learned))):
        for name in learned:
            center = {k: torch.from_numpy(a + np.array(b) @ z).split(sizes) for k, (a, *b, _) in learned.items()}
            scores = [
                score_grid(likelihood, name, {k: v[fold] for k, v in center.items()}, counts, rates)
                for fold, (counts, rates) in enumerate(inner_genes)
            ]
            learned[name] = parameter_prior(
                np.concatenate(scores, 1), z, likelihood.grid(name).numpy(), *likelihood.priors[name]
            )
    return learned

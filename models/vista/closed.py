r"""The data-driven start: a shared map in closed form, and what inner held-out genes teach.

THE MAP. Within either modality (and batch) log-normalised panel genes are z-scored, x [P]; this removes every gene-wise platform effect. With
weights w_n over reference cells, S = sum_n w_n x_n x_n', C = sum_n w_n x_n y_n' for all genes y [G] of the reference, the ridge prediction of every
gene is x' (S + penalty I)^{-1} C. It is factored through d latent dimensions: z = E' x [d] of unit variance on the reference, prediction z' A, with A
along the leading right singular vectors of the fitted values. When only the genes in V are visible, E_V = (S_VV + penalty I)^{-1} K_V estimates the
same z from fewer genes (K [P, d] = C in the coordinates of z; E = (S + penalty I)^{-1} K).

WHAT GENES HAVE IN COMMON. In the target the genes of a cell rise and fall together more than the reference can know (depth beyond the total, size,
quality, density). One more coordinate holds it, the mean of the visible z-scores, standardised; every gene's score is (prediction of the map in
units of its sd over the target) + ``common`` x this coordinate. The reference is decoded without it.

WEIGHTS. Reference and target differ in composition (a neuron-enriched reference, a tissue with glia). Each reference cell is weighted by the
density ratio target / reference of its neighborhood in the space of predictions, by k nearest neighbors, a few damped rounds. Every chain
multiplies these weights by exponential ones: the Bayesian bootstrap of the reference, which carries its sampling error into the posterior.

INNER HELD-OUT GENES. Panel genes are hidden from the map in folds and predicted in the target: exactly the situation of an unmeasured gene. On them
are chosen the penalty, whether to reweight, how much of the neighbors' states to mix in, and ``common``; learned on them are the hyper-priors of
gain (level in the target over level in the reference), slope (how much of the predicted log fold change shows in the target) and of the
likelihood's parameters.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from ppl_st.inference.hyperpriors import learn_parameters, random_effects
from ppl_st.models.vista.batches import Data, shares
from ppl_st.observation import Likelihood

Say = Callable[[str], None]
Floats = NDArray[np.float64]
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
MIXES = (0.0, 0.3, 0.5, 0.7)
COMMONS = (0.0, 0.25, 0.5, 0.75, 1.0)
FOLDS = 8
CELLS = 2000  # cells of either side on which weights and inner genes are judged
REFERENCE = 10_000  # reference cells that inner genes are predicted from
CLIP = 8.0  # standard deviations
ROWS = 4096  # cells made dense together
ROUNDS, DAMPING, NEAR = 4, 0.7, 30  # of the density ratio
RATIO_PENALTY = 3.0
DRAWS = 4
SPREAD = 0.5  # sd of the latent state given its genes, in units of its sd over the reference, at the start


class Moments(NamedTuple):
    """How the log-normalised panel of one modality is standardised, per batch."""

    mean: Floats  # [batches, P]
    sd: Floats  # [batches, P]
    depth: float  # median panel total


class Map(NamedTuple):
    """Closed-form map of one chain."""

    gram: Floats  # [P, P] S
    cross: Floats  # [P, d] K
    encoder: Floats  # [P, d] E
    decoder: Floats  # [d, G] A, z-scores
    scale: Floats  # [G] log rate per z-score, on the reference


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    penalty: float
    reweight: bool
    mix: float  # share of the neighbors' mean state
    common: float  # weight of what all genes have in common
    depth: float  # exponent of a cell's panel total in its rates
    covariate_mean: float  # of the log share in the reference
    gain: list[float]  # log gain of an unmeasured gene: mean, slope by covariate, sd
    slope: list[float]  # slope: mean, sd
    parameters: dict[str, list[float]]  # of the likelihood, e.g. log_theta: mean, slope by covariate, sd
    candidates: list[dict[str, float]]  # settings tried, with their mean correlation on inner genes


def panel_totals(counts: sp.csr_matrix) -> Floats:
    """Total of every row, at least 1."""
    return np.maximum(np.asarray(counts.sum(1), dtype=np.float64).ravel(), 1.0)


def log_normalised(counts: sp.csr_matrix, totals: Floats, depth: float) -> Floats:
    """log1p(counts / total x depth), dense."""
    return np.log1p(counts.toarray() * (depth / totals)[:, None])


def moments(counts: sp.csr_matrix, batch: NDArray[np.int64]) -> Moments:
    """Moments of log-normalised counts [n, P], batch by batch; sd 1 where a gene does not vary."""
    totals = panel_totals(counts)
    depth = float(np.median(totals))
    mean, sd = [], []
    for b in range(int(batch.max(initial=0)) + 1):
        x, n = sp.csr_matrix(counts[batch == b], dtype=np.float64, copy=True), max(1, int((batch == b).sum()))
        x.data = np.log1p(x.data * np.repeat(depth / totals[batch == b], np.diff(x.indptr)))
        mean.append(np.asarray(x.sum(0)).ravel() / n)
        x.data **= 2
        s = np.sqrt(np.maximum(np.asarray(x.sum(0)).ravel() / n - mean[-1] ** 2, 0.0))
        sd.append(np.where(s > 1e-6, s, 1.0))
    return Moments(np.stack(mean), np.stack(sd), depth)


def standardise(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments) -> Floats:
    """[n, P] z-scores, clipped."""
    x = log_normalised(counts, panel_totals(counts), m.depth)
    return np.clip((x - m.mean[batch]) / m.sd[batch], -CLIP, CLIP)


def project(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments, weights: Floats) -> Floats:
    """z-scores @ weights [P, d], in blocks of cells: [n, d]."""
    starts = range(0, counts.shape[0], ROWS)
    return np.concatenate([standardise(counts[i : i + ROWS], batch[i : i + ROWS], m) @ weights for i in starts])


def weighted(x: Floats, w: Floats) -> Floats:
    """Columns centered and scaled under weights w that sum to 1."""
    mean = w @ x
    sd = np.sqrt(w @ (x - mean) ** 2)
    return (x - mean) / np.where(sd > 1e-8, sd, 1.0)


def density_ratio(x: Floats, r: Floats, rng: np.random.Generator) -> Floats:
    """Weights [m] of the reference cells r [m, P] that make them look like cells of the target x [n, P]; they sum to 1."""
    m = len(r)
    w = np.full(m, 1.0 / m)
    pool = rng.permutation(m)[:CELLS]  # neighbors are sought among these
    k = max(1, min(NEAR, len(pool) // 4))
    for _ in range(ROUNDS):
        z = weighted(r, w)
        gram = (z * w[:, None]).T @ z
        smooth = np.linalg.solve(gram + RATIO_PENALTY * np.eye(len(gram)), gram)
        mine, theirs = (_unit(side @ smooth).astype(np.float32) for side in (z, x))
        used, expected = _nearest(theirs, mine[pool], k), _nearest(mine, mine[pool], k)
        usage = np.bincount(used.ravel(), minlength=len(pool)) / used.size
        base = np.bincount(expected.ravel(), weights=np.repeat(w, k), minlength=len(pool)) / k
        ratio = ((usage + 1e-6) / (base + 1e-6))[expected].mean(1)  # [m] smoothed over the reference neighborhood
        w = w * ratio**DAMPING
        w = 0.8 * w / w.sum() + 0.2 / m
    return w


def _unit(x: Floats) -> Floats:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _nearest(x: NDArray[np.float32], pool: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions in the pool of the k rows most alike to each row of x, by inner product, in blocks."""
    found = [np.argpartition(-(x[i : i + 512] @ pool.T), k - 1, axis=1)[:, :k] for i in range(0, len(x), 512)]
    return np.concatenate(found)


def weights(data: Data, mine: Moments, reweight: bool, rng: np.random.Generator) -> Floats:
    """Weights of the reference cells, summing to 1; ``mine`` standardises the target."""
    m = data.reference.shape[0]
    if not reweight:
        return np.full(m, 1.0 / m)
    some = rng.permutation(data.counts.shape[0])[:CELLS]
    x = standardise(data.counts[some], data.batch[some], mine)
    panel = sp.csr_matrix(data.reference[:, data.panel])
    return density_ratio(x, standardise(panel, data.reference_batch, moments(panel, data.reference_batch)), rng)


class SecondMoments(NamedTuple):
    """Weighted second moments of the standardised reference, from which the map of any penalty is solved."""

    gram: Floats  # [P, P] S
    cross: Floats  # [P, genes] C
    scale: Floats  # [genes] log rate per z-score


def second_moments(data: Data, w: Floats, genes: NDArray[np.int64] | None = None) -> SecondMoments:
    """S, C and scale of ``genes`` of the reference (all when None) under weights w [m] that sum to 1; the reference is never dense as a whole."""
    genes = np.arange(data.reference.shape[1]) if genes is None else genes
    panel = sp.csr_matrix(data.reference[:, data.panel])
    totals = panel_totals(panel)
    x = weighted(standardise(panel, data.reference_batch, moments(panel, data.reference_batch)), w)
    left, depth = (x * w[:, None]).T, float(np.median(totals))
    scale, cross = np.empty(len(genes)), np.empty((x.shape[1], len(genes)))
    for start in range(0, len(genes), 1024):
        part = slice(start, min(start + 1024, len(genes)))
        y = log_normalised(data.reference[:, genes[part]], totals, depth)
        mean = w @ y
        sd = np.sqrt(w @ (y - mean) ** 2)
        sd = np.where(sd > 1e-8, sd, 1.0)
        cross[:, part] = left @ ((y - mean) / sd)
        # From z-scores of log1p to the logarithm of the rate: d log u / d log1p(u) = (1 + u) / u at the mean.
        u = np.expm1(mean)
        scale[part] = np.minimum(sd * (1 + u) / np.maximum(u, 0.05), 3.0)
    return SecondMoments(left @ x, cross, scale)


def ridge(known: SecondMoments, penalty: float) -> Floats:
    """(S + penalty I)^-1 C [P, genes]."""
    return np.asarray(np.linalg.solve(known.gram + penalty * np.eye(len(known.gram)), known.cross))


def fit_map(known: SecondMoments, penalty: float, latent: int) -> Map:
    """The closed-form map through ``latent`` dimensions; see the file's docstring."""
    p, solved = len(known.gram), ridge(known, penalty)
    fitted = np.linalg.cholesky(known.gram + 1e-6 * np.eye(p)).T @ solved
    values, vectors = np.linalg.eigh(fitted @ fitted.T)
    keep = np.argsort(-values)[: min(latent, p)]
    size = np.sqrt(np.maximum(values[keep], 1e-12))
    basis = (vectors[:, keep].T @ fitted) / size[:, None]  # [d, G] orthonormal rows
    return Map(known.gram, known.cross @ basis.T / size, solved @ basis.T / size, size[:, None] * basis, known.scale)


class _Scores(NamedTuple):
    """Predictions of inner genes in the judged cells: of the map, of what genes have in common, and the same averaged over neighbors."""

    own: Floats  # [rows, genes]
    around: Floats
    common: Floats  # [rows, 1]
    common_around: Floats

    def mixed(self, mix: float, weight: float) -> Floats:
        """Scores [rows, genes] with a share of the neighbors' and ``weight`` of what genes have in common."""
        score = (1 - mix) * self.own + mix * self.around
        common = (1 - mix) * self.common + mix * self.common_around
        return score / np.maximum(score.std(0), 1e-9) + weight * (common - common.mean()) / max(float(common.std()), 1e-9)


def learn(
    data: Data, likelihood: Likelihood, penalty: float | None, reweight: bool | None, common: float | None, seed: int, say: Say
) -> Hyper:
    """Choose settings and learn hyper-priors on inner held-out genes; None means chosen."""
    rng = np.random.default_rng([seed, 1])
    p = len(data.panel)
    rows = np.sort(rng.permutation(data.counts.shape[0])[:CELLS])
    folds = np.array_split(rng.permutation(p), FOLDS)
    truth = standardise(data.counts[rows], data.batch[rows], moments(data.counts, data.batch))
    mixer = mean_of_neighbors(data.graph)[rows]
    needed = np.union1d(rows, mixer.indices)  # the judged cells and their neighbors
    mixer, rows_of = sp.csr_matrix(mixer[:, needed]), np.searchsorted(needed, rows)
    penalties = PENALTIES if penalty is None else (penalty,)
    options = (False, True) if reweight is None else (reweight,)
    mixes = MIXES if data.graph.nnz else (0.0,)
    commons = COMMONS if common is None else (common,)
    some = np.sort(rng.permutation(data.reference.shape[0])[:REFERENCE])
    reference = sp.csr_matrix(data.reference[some])
    correlations: dict[tuple[bool, float, float, float], list[Floats]] = {}
    states: dict[tuple[bool, float], list[_Scores]] = {}
    for inner in folds:
        kept = np.setdiff1d(np.arange(p), inner)
        sub = data._replace(
            counts=sp.csr_matrix(data.counts[:, kept]), panel=data.panel[kept], reference=reference, reference_batch=data.reference_batch[some]
        )
        mine = moments(sub.counts, sub.batch)
        maps: dict[tuple[bool, float], Floats] = {}
        for option in options:
            known = second_moments(sub, weights(sub, mine, option, np.random.default_rng([seed, 2])), data.panel[inner])
            maps |= {(option, strength): ridge(known, strength) for strength in penalties}
        everything = np.column_stack([*maps.values(), np.full(len(kept), 1 / len(kept))])
        found = project(sub.counts[needed], sub.batch[needed], mine, everything)
        around, found = mixer @ found, found[rows_of]
        for k, (option, strength) in enumerate(maps):
            part = slice(k * len(inner), (k + 1) * len(inner))
            score = _Scores(found[:, part], around[:, part], found[:, -1:], around[:, -1:])
            states.setdefault((option, strength), []).append(score)
            for mix, weight in itertools.product(mixes, commons):
                r = _correlation(truth[:, inner], score.mixed(mix, weight))
                correlations.setdefault((option, strength, mix, weight), []).append(r)
    means = {key: float(np.mean(np.concatenate(value))) for key, value in correlations.items()}
    best = max(means, key=lambda key: means[key])
    names = ("reweight", "penalty", "mix", "common", "inner genes")
    candidates = [dict(zip(names, map(float, (*key, value)), strict=True)) for key, value in means.items()]
    say(
        f"inner held-out genes: penalty {best[1]:g}, reweighted {best[0]}, {best[2]:.0%} from neighbors, {best[3]:g} of what genes share, "
        f"correlation {means[best]:.3f}"
    )
    predicted, depth = np.empty((len(rows), p)), np.empty((len(rows), p))
    share = shares(data.counts)
    for inner, score in zip(folds, states[best[:2]], strict=True):
        predicted[:, inner] = score.mixed(*best[2:])
        kept = np.setdiff1d(np.arange(p), inner)
        depth[:, inner] = np.log(panel_totals(data.counts[rows][:, kept]) / share[kept].sum())[:, None]
    return _hyper_priors(data, likelihood, best, predicted, depth, rows, candidates, seed, say)


def default_hyper(data: Data, likelihood: Likelihood, penalty: float | None, reweight: bool | None, common: float | None) -> Hyper:
    """Where nothing can be learned (a tiny panel, or the published settings): wide hyper-priors."""
    parameters = {name: [loc, 0.0, scale] for name, (loc, scale) in likelihood.priors.items()}
    center = float(log_share(data).mean())
    return Hyper(penalty or 3.0, bool(reweight), 0.0, common or 0.0, 1.0, center, [0.0, 0.0, 1.0], [0.5, 0.5], parameters, [])


def mean_of_neighbors(graph: sp.csr_matrix) -> sp.csr_matrix:
    """Row-normalised graph."""
    return sp.csr_matrix(sp.diags(1.0 / np.maximum(np.diff(graph.indptr), 1)) @ graph)


def log_share(data: Data) -> Floats:
    """Covariate of a gene: log of its share of the reference's counts, [G]."""
    total = np.asarray(data.reference.sum(0), dtype=np.float64).ravel() + 0.5
    return np.log(total / total.sum())


def _correlation(a: Floats, b: Floats) -> Floats:
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0)


def _hyper_priors(
    data: Data,
    likelihood: Likelihood,
    best: tuple[bool, float, float, float],
    predicted: Floats,
    log_depth: Floats,
    rows: NDArray[np.int64],
    candidates: list[dict[str, float]],
    seed: int,
    say: Say,
) -> Hyper:
    """Gain, slope, depth and the likelihood's parameters of the inner genes, from a log-linear regression of each gene's counts."""
    counts = data.counts[rows].toarray().astype(np.float64)
    median = float(np.log(np.median(panel_totals(data.counts))))
    depth = log_depth - median  # [rows, P]
    share = log_share(data)
    spread = predicted.std(0) + 1e-9
    panel = np.asarray(data.reference[:, data.panel].sum(0), dtype=np.float64).ravel() + 0.5
    offset = median + np.log(panel / panel.sum())  # [P]
    found, variance = _regressions(counts, predicted / spread, depth, offset)
    z = share[data.panel] - share.mean()
    exponent = float(np.clip(np.average(found[:, 2], weights=1 / (0.05 + variance[:, 2])), 0.2, 1.5))
    # Level: regression on the covariate, then the random effect around it.
    design = np.column_stack([np.ones_like(z), z])
    noise = np.maximum(variance[:, 0], 1e-6)
    weight = 1 / (0.25 + noise)
    beta = np.linalg.solve(
        design.T @ (design * weight[:, None]) + np.diag([1e-6, 1.0]), design.T @ (weight * found[:, 0])
    )
    center, gain_sd = random_effects(found[:, 0] - design @ beta, noise)
    slope = list(random_effects(found[:, 1], np.maximum(variance[:, 1], 1e-6)))
    rng = np.random.default_rng([seed, 3])
    draws = []
    for _ in range(DRAWS):
        noisy = predicted / spread + SPREAD * rng.standard_normal(predicted.shape)
        log_rate = offset + exponent * depth + found[:, 1] * noisy
        rate = np.exp(np.clip(log_rate, -20, 20))
        draws.append(rate * (counts.sum(0) + 0.5) / (rate.sum(0) + 0.5))
    inner_genes = [(torch.from_numpy(counts), torch.from_numpy(np.stack(draws)).clamp_min(1e-8))]
    parameters = learn_parameters(likelihood, inner_genes, z)
    gain = [float(beta[0] + center), float(beta[1]), float(gain_sd)]
    say(
        f"log gain {gain[0]:.2f} + {gain[1]:.2f} log share, sd {gain[2]:.2f}; slope {slope[0]:.2f}, sd {slope[1]:.2f}; depth {exponent:.2f}; "
        + ", ".join(f"{name} {a:.2f} + {b:.2f} log share, sd {s:.2f}" for name, (a, b, s) in parameters.items())
    )
    return Hyper(best[1], best[0], best[2], best[3], exponent, float(share.mean()), gain, slope, parameters, candidates)


def _regressions(counts: Floats, predicted: Floats, depth: Floats, offset: Floats) -> tuple[Floats, Floats]:
    """Quasi-Poisson regression of every gene: log mean = offset + c0 + c1 predicted + c2 depth; coefficients and their variances [genes, 3]."""
    n, genes = counts.shape
    coefficients, variances = np.zeros((genes, 3)), np.ones((genes, 3))
    prior, center = np.diag([1e-3, 1.0, 1.0]), np.array([0.0, 0.0, 1.0])  # slope ~ Normal(0, 1), depth ~ Normal(1, 1)
    for g in range(genes):
        x = np.column_stack([np.ones(n), predicted[:, g], depth[:, g]])
        beta = np.array([np.log((counts[:, g].sum() + 0.5) / (np.exp(offset[g] + depth[:, g]).sum() + 0.5)), 0.0, 1.0])
        mu, hessian = np.ones(n), prior
        for _ in range(25):
            mu = np.exp(np.clip(offset[g] + x @ beta, -20, 15))
            hessian = x.T @ (x * mu[:, None]) + prior
            step = np.linalg.solve(hessian, x.T @ (counts[:, g] - mu) - prior @ (beta - center))
            beta = beta + np.clip(step, -1, 1)
            if np.abs(step).max() < 1e-6:
                break
        pearson = float(((counts[:, g] - mu) ** 2 / np.maximum(mu, 1e-3)).mean())
        coefficients[g], variances[g] = beta, np.diag(np.linalg.inv(hessian)) * max(1.0, pearson)
    return coefficients, variances

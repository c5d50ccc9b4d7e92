r"""The data-driven start: a shared map in closed form, and what inner held-out genes teach.

THE MAP. Within either modality (and batch) log-normalised panel genes are z-scored, x [P]; this removes every gene-wise platform effect. With
weights w_n over reference cells, S = sum_n w_n x_n x_n', C = sum_n w_n x_n y_n' for all genes y [G] of the reference, the ridge prediction of every
gene is x' (S + penalty I)^{-1} C. It is factored through d latent dimensions: z = E' x [d] of unit variance on the reference, prediction z' A, with A
along the leading right singular vectors of the fitted values. When only the genes in V are visible, E_V = (S_VV + penalty I)^{-1} K_V estimates the
same z from fewer genes (K [P, d] = C in the coordinates of z; E = (S + penalty I)^{-1} K).

GENES THAT ONLY THE TARGET HAS. The map cannot read them, but they say of a cell what its few counts of a panel gene say badly. All A measured genes
of the target, z-scored, are a probabilistic principal component analysis, x = L u + noise of unit variance (up to scale), with as many directions
as rise above the noise (Marchenko and Pastur 1967). Given the visible genes V, u has mean (I + L_V' L_V)^{-1} L_V' x_V, and the panel is denoised,
x^ = u L_P'. A share ``denoise`` of the panel that the map reads is x^ instead of x. The depth of a cell is the total of all A genes.

WHAT GENES HAVE IN COMMON. In the target the genes of a cell rise and fall together more than the reference can know (depth beyond the total, size,
quality, density). One more coordinate holds it, the mean of the visible z-scores, standardised; every gene's score is (prediction of the map in
units of its sd over the target) + ``common`` x this coordinate. The reference is decoded without it.

WEIGHTS. Reference and target differ in composition (a neuron-enriched reference, a tissue with glia). Each reference cell is weighted by the
density ratio target / reference of its neighborhood in the space of predictions, by k nearest neighbors, a few damped rounds. Every chain
multiplies these weights by exponential ones: the Bayesian bootstrap of the reference, which carries its sampling error into the posterior.

INNER HELD-OUT GENES. Panel genes are hidden from the map in folds and predicted in the target: exactly the situation of an unmeasured gene. On them
are chosen the penalty, whether to reweight, ``denoise``, how much of the neighbors' states to mix in, and ``common``; learned on them are the hyper-priors of
gain (level in the target over level in the reference), slope (how much of the predicted log fold change shows in the target) and of the
likelihood's parameters.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import eigsh

from ppl_st.inference.hyperpriors import learn_parameters, random_effects
from ppl_st.models.vista.batches import Data, shares
from ppl_st.observation import Likelihood

Say = Callable[[str], None]
Floats = NDArray[np.float64]
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
MIXES = (0.0, 0.3, 0.5, 0.7)
COMMONS = (0.0, 0.25, 0.5, 0.75, 1.0)
DENOISES = (0.0, 0.5, 1.0)
DIRECTIONS = 50  # at most
FOLDS = 8
JUDGED = 60  # inner genes of a fold, at most
CELLS = 2000  # cells of either side on which weights and inner genes are judged
REFERENCE = 10_000  # reference cells that inner genes are predicted from
CLIP = 8.0  # standard deviations
ROWS = 4096  # cells made dense together
DENSE_GENES = 2000  # genes up to which all eigenvectors of their correlation matrix are computed at once
ROUNDS, DAMPING, NEAR = 4, 0.7, 30  # of the density ratio
RATIO_PENALTY = 3.0
DRAWS = 4
SPREAD = 0.5  # sd of the latent state given its genes, in units of its sd over the reference, at the start


class Moments(NamedTuple):
    """How the log-normalised genes of one modality are standardised, per batch: the panel, in the target all A."""

    mean: Floats  # [batches, A]
    sd: Floats  # [batches, A]
    depth: float  # median total


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
    denoise: float  # share of the panel that is read off the directions of all genes of the target
    mix: float  # share of the neighbors' mean state
    common: float  # weight of what all genes have in common
    depth: float  # exponent of a cell's total in its rates
    covariate_mean: float  # of the log share in the reference
    gain: list[float]  # log gain of an unmeasured gene: mean, slope by covariate, sd (also takes up the share of the panel in the depth)
    slope: list[float]  # slope: mean, sd
    parameters: dict[str, list[float]]  # of the likelihood, e.g. log_theta: mean, slope by covariate, sd
    candidates: list[dict[str, float]]  # settings tried, with their mean correlation on inner genes


def totals_of(counts: sp.csr_matrix) -> Floats:
    """Total of every row, at least 1."""
    return np.maximum(np.asarray(counts.sum(1), dtype=np.float64).ravel(), 1.0)


def log_normalised(counts: sp.csr_matrix, totals: Floats, depth: float) -> Floats:
    """log1p(counts / total x depth), dense."""
    return np.log1p(counts.toarray() * (depth / totals)[:, None])


def moments(counts: sp.csr_matrix, batch: NDArray[np.int64]) -> Moments:
    """Moments of log-normalised counts [n, A], batch by batch; sd 1 where a gene does not vary."""
    totals = totals_of(counts)
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
    """[n, A] z-scores, clipped."""
    x = log_normalised(counts, totals_of(counts), m.depth)
    return np.clip((x - m.mean[batch]) / m.sd[batch], -CLIP, CLIP)


def project(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments, weights: Floats) -> Floats:
    """z-scores @ weights [A, d], in blocks of cells: [n, d]."""
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
    x = standardise(data.measured[some], data.batch[some], mine)[:, : len(data.panel)]
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
    totals = totals_of(panel)
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


def directions(genes: int) -> int:
    """How many directions are looked at."""
    return min(DIRECTIONS, genes - 1)


def find_directions(data: Data, mine: Moments, rng: np.random.Generator) -> Floats:
    """Loadings L [A, q] of the target's genes on its leading directions, noise of unit variance, see the file's docstring; a direction that
    does not rise above the noise has loadings 0."""
    some = np.sort(rng.permutation(data.counts.shape[0])[:ROWS])
    x = standardise(data.measured[some], data.batch[some], mine)
    n, genes = x.shape
    q = directions(genes)
    correlation = x.T @ x / n
    if genes <= DENSE_GENES:
        values, vectors = scipy.linalg.eigh(correlation, subset_by_index=[genes - q, genes - 1])
    else:
        values, vectors = eigsh(correlation, k=q, v0=np.random.default_rng(0).standard_normal(genes))
    loud = values > (1 + np.sqrt(genes / n)) ** 2
    noise = max(float(np.trace(correlation) - values[loud].sum()) / (genes - int(loud.sum())), 1e-3)
    return np.asarray(vectors * np.sqrt(np.where(loud, np.maximum(values / noise - 1, 0.0), 0.0)))


def read_directions(loadings: Floats) -> Floats:
    """[A, q]: z-scores times this are the posterior mean of u."""
    return np.asarray(np.linalg.solve(np.eye(loadings.shape[1]) + loadings.T @ loadings, loadings.T).T)


def target_encoder(found: Map, loadings: Floats, denoise: float) -> Floats:
    """E of the target [A, d]: ``denoise`` of it reads the panel off the directions."""
    p = len(found.encoder)
    encoder = denoise * read_directions(loadings) @ (loadings[:p].T @ found.encoder)
    encoder[:p] += (1 - denoise) * found.encoder
    return encoder


class _Scores(NamedTuple):
    """Predictions of inner genes in the judged cells: of the map, of the map of the denoised panel, of what genes have in common; around: the
    same averaged over neighbors."""

    own: Floats  # [3, rows, genes]
    around: Floats

    def parts(self, denoise: float, mix: float) -> tuple[Floats, Floats]:
        """Standardised scores of the map and of what genes have in common, [rows, genes] each."""
        plain, smooth, common = (1 - mix) * self.own + mix * self.around
        score = (1 - denoise) * plain + denoise * smooth
        return tuple((x - x.mean(0)) / np.maximum(x.std(0), 1e-9) for x in (score, common))


def learn(data: Data, likelihood: Likelihood, fixed: dict[str, float | None], seed: int, say: Say) -> Hyper:
    """Choose settings and learn hyper-priors on inner held-out genes; ``fixed`` gives those that are not to be chosen."""
    rng = np.random.default_rng([seed, 1])
    p, n = len(data.panel), data.counts.shape[0]
    rows = np.sort(rng.permutation(n)[:CELLS])
    folds = np.array_split(rng.permutation(p), FOLDS)
    judged = [np.sort(inner[:JUDGED]) for inner in folds]
    truth = standardise(data.measured[rows], data.batch[rows], moments(data.measured, data.batch))
    mixer = mean_of_neighbors(data.graph)[rows]
    needed = np.union1d(rows, mixer.indices)  # the judged cells and their neighbors
    mixer, rows_of = sp.csr_matrix(mixer[:, needed]), np.searchsorted(needed, rows)

    def options(name: str, several: tuple[float, ...]) -> tuple[float, ...]:
        one = fixed.get(name)
        return several if one is None else (one,)

    penalties, reweights = options("penalty", PENALTIES), options("reweight", (0.0, 1.0))
    commons = np.array(options("common", COMMONS))[:, None]
    mixes = options("mix", MIXES) if data.graph.nnz else (0.0,)
    some = np.sort(rng.permutation(data.reference.shape[0])[:REFERENCE])
    reference = sp.csr_matrix(data.reference[some])
    correlations: dict[tuple[float, ...], list[Floats]] = {}
    states: dict[tuple[float, float], list[_Scores]] = {}
    for inner, genes in zip(folds, judged, strict=True):
        kept = np.setdiff1d(np.arange(p), inner)
        sub = data._replace(
            counts=sp.csr_matrix(data.counts[:, kept]), panel=data.panel[kept], reference=reference, reference_batch=data.reference_batch[some]
        )
        measured, batch, mine = sub.measured[needed], sub.batch[needed], moments(sub.measured, sub.batch)
        loadings = find_directions(sub, mine, np.random.default_rng([seed, 5]))
        maps: dict[tuple[float, float], Floats] = {}
        for option in reweights:
            known = second_moments(sub, weights(sub, mine, option > 0, np.random.default_rng([seed, 2])), data.panel[genes])
            maps |= {(option, strength): ridge(known, strength) for strength in penalties}
        a, width, ridges = measured.shape[1], len(genes), np.hstack(list(maps.values()))
        first = np.zeros((a, ridges.shape[1]))
        first[: len(kept)] = ridges
        read = project(measured, batch, mine, np.column_stack([first, np.full(a, 1 / a), read_directions(loadings)]))
        columns = ridges.shape[1]
        found = np.stack([read[:, :columns], read[:, columns + 1 :] @ (loadings[: len(kept)].T @ ridges)])
        for k, key in enumerate(maps):
            part = slice(k * width, (k + 1) * width)
            own = np.concatenate([found[:, :, part], np.broadcast_to(read[:, columns, None], (1, len(needed), width))])
            score = _Scores(own[:, rows_of], np.stack([mixer @ one for one in own]))
            states.setdefault(key, []).append(score)
            for denoise, mix in itertools.product(options("denoise", DENOISES), mixes):
                x, common = score.parts(denoise, mix)
                r = _correlation(truth[:, genes], x) + commons * _correlation(truth[:, genes], common)
                r /= np.sqrt(1 + commons**2 + 2 * commons * _correlation(x, common))  # [commons, genes] of x + weight x common
                for weight, one in zip(commons[:, 0], r, strict=True):
                    correlations.setdefault((*key, denoise, mix, float(weight)), []).append(one)
    means = {key: float(np.mean(np.concatenate(value))) for key, value in correlations.items()}
    best = max(means, key=lambda key: means[key])
    names = ("reweight", "penalty", "denoise", "mix", "common", "inner genes")
    candidates = [dict(zip(names, (*key, value), strict=True)) for key, value in means.items()]
    chosen = dict(zip(names, (*best, means[best]), strict=True))
    say(
        f"inner held-out genes: penalty {chosen['penalty']:g}, reweighted {bool(chosen['reweight'])}, panel {chosen['denoise']:.0%} denoised, "
        f"{chosen['mix']:.0%} from neighbors, {chosen['common']:g} of what genes share, correlation {means[best]:.3f}"
    )
    share = shares(data.measured)
    predicted, depth = [], []
    for inner, score in zip(folds, states[best[:2]], strict=True):
        x, common = score.parts(*best[2:4])
        predicted.append(x + best[4] * common)
        seen = np.setdiff1d(np.arange(len(share)), inner)
        total = np.log(totals_of(data.measured[rows][:, seen]) / share[seen].sum())
        depth.append(np.repeat(total[:, None], x.shape[1], 1))
    genes = np.concatenate(judged)
    return _hyper_priors(data, likelihood, chosen, genes, np.hstack(predicted), np.hstack(depth), rows, candidates, seed, say)


def default_hyper(data: Data, likelihood: Likelihood, fixed: dict[str, float | None]) -> Hyper:
    """Where nothing can be learned (a tiny panel, or the published settings): wide hyper-priors."""
    parameters = {name: [loc, 0.0, scale] for name, (loc, scale) in likelihood.priors.items()}
    center = float(log_share(data).mean())
    known = {name: value or 0.0 for name, value in fixed.items()} | {"penalty": fixed["penalty"] or 3.0}
    return Hyper(
        known["penalty"], bool(known["reweight"]), known["denoise"], known["mix"], known["common"], 1.0, center, [0.0, 0.0, 1.0], [0.5, 0.5],
        parameters, [],
    )  # fmt: skip


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
    chosen: dict[str, float],
    genes: NDArray[np.int64],
    predicted: Floats,
    log_depth: Floats,
    rows: NDArray[np.int64],
    candidates: list[dict[str, float]],
    seed: int,
    say: Say,
) -> Hyper:
    """Gain, slope, depth and the likelihood's parameters of the inner genes, from a log-linear regression of each gene's counts;
    ``genes`` are positions in the panel."""
    counts = data.counts[rows][:, genes].toarray().astype(np.float64)
    median = float(np.log(np.median(totals_of(data.measured))))
    depth = log_depth - median  # [rows, genes]
    share = log_share(data)
    spread = predicted.std(0) + 1e-9
    panel = np.asarray(data.reference[:, data.panel].sum(0), dtype=np.float64).ravel() + 0.5
    offset = median + np.log(panel / panel.sum())[genes]
    found, variance = _regressions(counts, predicted / spread, depth, offset)
    z = share[data.panel[genes]] - share.mean()
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
    picked = chosen["penalty"], bool(chosen["reweight"]), chosen["denoise"], chosen["mix"], chosen["common"]
    return Hyper(*picked, exponent, float(share.mean()), gain, slope, parameters, candidates)


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

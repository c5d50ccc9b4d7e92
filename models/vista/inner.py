r"""What inner held-out genes teach: settings of the closed-form map, and the hyper-priors of genes that nobody measured.

Panel genes are hidden from the map in folds and predicted in the target: exactly the situation of an unmeasured gene. On them are chosen the
penalty, whether to reweight, ``denoise``, how much of the neighbors' states to mix in, ``common`` and the share of the process over the reference's
cells (`process.py`); learned on them are the hyper-priors of gain (level in the target over level in the reference),
slope (how much of the predicted log fold change shows in the target) and of the likelihood's parameters. Their covariate is the log share in the
reference, for gains what is known of it (`levels_of`); slopes have the gene's signal (`log_signal`) as well, the likelihood's parameters the gene's
zeros in the reference (`closed.theta_of_zeros`). A score is bent (`ppl_st.models.common.counts.bend`) before its slope makes a log rate of it.

ERROR OF A PATTERN. What the map gets wrong of a gene is not wrong anew in every cell: the gene is too high in one kind of cells, or in one part
of the tissue. Let t_i [q] be the place of a cell along the directions of the target (u of `closed.py`, mixed with its neighbors', unit sd) and w_i
random Fourier features of its coordinates. The log rate of an unmeasured gene has the further term e_g . (t_i, w_i) with e_g drawn once per gene
and draw,

    e_gk ~ Normal(0, tau_k^2) for t,   Normal(0, tau_w^2 / K) for the K features w

The taus are those of the inner genes. The efficient score (beside level, slope and depth, which were fitted) of a gene's counts and its information
estimate e_gk with noise, over-dispersion included; tau_k maximises their likelihood, tau_w matches what is left of the squared scores along w.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp

from ppl_st.inference.hyperpriors import learn_parameters, random_effects, score_nb
from ppl_st.models.common.cells import log_shares
from ppl_st.models.common.counts import LOG_THETA, bend, share_posterior
from ppl_st.models.common.inner import BENDS, SHARES, climb, dead_genes, level_prior
from ppl_st.models.vista.batches import Data, panel_share, shares
from ppl_st.models.vista.closed import (
    DIRECTIONS,
    SPREAD,
    Floats,
    directions_above_noise,
    log_share,
    mean_of_neighbors,
    moments,
    project,
    read_directions,
    ridge,
    second_moments,
    standard_places,
    standardise,
    theta_of_zeros,
    totals_of,
    weights,
)
from ppl_st.models.vista.process import features_of, fit_process
from ppl_st.observation import Likelihood

Say = Callable[[str], None]
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0)
MIXES = (0.0, 0.3, 0.5, 0.7)
COMMONS = (0.0, 0.1, 0.2, 0.3, 0.45)  # in sds of a gene's z-score
DENOISES = (0.0, 0.5, 1.0)
FOLDS = 8
JUDGED = 60  # inner genes of a fold, at most
CELLS = 2000  # target cells in which inner genes are judged
REFERENCE = 10_000  # reference cells that inner genes are predicted from
DRAWS = 4
LEAST_COUNTS = 3  # of a gene that says how patterns err
CENTER, PRECISION = np.array([0.0, 0.0, 1.0]), np.array([1e-3, 1.0, 1.0])  # of level, slope and exponent in the regression of one gene
LEAST_KEPT = 0.05
EXPONENTS = (0.2, 1.5)  # a gene's exponent of depth lies within
ERROR = 0.2  # tau where there are no inner genes
LEAST_SIGNAL = 0.01  # that is added to a gene's signal


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    penalty: float
    reweight: bool
    denoise: float  # share of the panel that is read off the directions of all genes of the target
    mix: float  # share of the neighbors' mean state
    common: float  # weight of what all genes have in common, in sds of a gene's z-score
    share: float  # of the process over the reference's cells
    depth: list[float]  # exponent of a cell's total in the rate of a gene: mean, slope by covariate
    bend: float  # of a gene's score in its log rate
    covariate_mean: float  # of the log share in the reference
    gain: list[float]  # log gain of an unmeasured gene: mean, slope by its level, sd (also takes up the share of the panel in the depth)
    gain_covariance: list[float]  # of the first two: aa, ab, bb
    slope: list[float]  # slope: mean, slopes by covariate and by `log_signal`, sd
    signal_mean: float  # of the log signal among the inner genes
    parameters: dict[str, list[float]]  # of the likelihood, e.g. log_theta: mean, slopes by covariate and by `theta_of_zeros`, sd
    zeros_mean: float  # of `theta_of_zeros`
    error: list[float]  # tau [q]: sd of the error of a gene's log rate along each direction
    wave_error: float  # tau_w
    candidates: list[dict[str, float]]  # settings tried, with their mean correlation on inner genes
    level_mean: float  # of `levels_of` among the genes that taught the gains
    span: list[float]  # of log share, `theta_of_zeros` and log signal among the inner genes, [6], centered: lines in them end there


class _Scores(NamedTuple):
    """Predictions of inner genes in the judged cells: of the map, of the map of the denoised panel, of what genes have in common; around: the
    same averaged over neighbors."""

    own: Floats  # [3, rows, genes]
    around: Floats

    def parts(self, denoise: float, mix: float) -> tuple[Floats, Floats]:
        """What the map says of the genes' z-scores, and what genes have in common, of unit sd, [rows, genes] each."""
        plain, smooth, common = (1 - mix) * self.own + mix * self.around
        return (1 - denoise) * plain + denoise * smooth, _standardised(common)


def learn(data: Data, likelihood: Likelihood, fixed: dict[str, float | None], seed: int, say: Say) -> Hyper:
    """Choose settings and learn hyper-priors on inner held-out genes; ``fixed`` gives those that are not to be chosen."""
    rng = np.random.default_rng([seed, 1])
    p, n = len(data.panel), data.counts.shape[0]
    rows = np.sort(rng.permutation(n)[:CELLS])
    folds = np.array_split(rng.permutation(p), FOLDS)
    judged = [np.sort(inner[:JUDGED]) for inner in folds]
    truth = standardise(data.measured[rows], data.batch[rows], moments(data.measured, data.batch))
    mixer = mean_of_neighbors(data.graph, rows)
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
    places: list[tuple[Floats, Floats]] = []
    curves: list[tuple[Floats, Floats]] = []  # of the process: [rows, genes], and the same averaged over neighbors
    process_shares = options("process", SHARES)
    for inner, genes in zip(folds, judged, strict=True):
        kept = np.setdiff1d(np.arange(p), inner)
        sub = data._replace(
            counts=sp.csr_matrix(data.counts[:, kept]), panel=data.panel[kept], reference=reference, reference_batch=data.reference_batch[some]
        )
        measured, batch, mine = sub.measured[needed], sub.batch[needed], moments(sub.measured, sub.batch)
        loadings = directions_above_noise(sub, mine, np.random.default_rng([seed, 5]))
        maps: dict[tuple[float, float], Floats] = {}
        for option in reweights:
            known = second_moments(sub, weights(sub, mine, option > 0, np.random.default_rng([seed, 2])), data.panel[genes])
            maps |= {(option, strength): ridge(known, strength) for strength in penalties}
        a, width, ridges = measured.shape[1], len(genes), np.hstack(list(maps.values()))
        first = np.zeros((a, ridges.shape[1]))
        first[: len(kept)] = ridges
        read = project(measured, batch, mine, np.column_stack([first, np.full(a, 1 / a), read_directions(loadings)]))
        columns = ridges.shape[1]
        u = read[:, columns + 1 :]
        places.append((u[rows_of], mixer @ u))
        if max(process_shares) > 0:
            process = fit_process(sub, data.panel[genes], seed)
            curve: Floats = (features_of(process, measured, batch, mine, len(kept)) @ process.beta).astype(np.float64)
            curves.append((curve[rows_of], mixer @ curve))
        found = np.stack([read[:, :columns], u @ (loadings[: len(kept)].T @ ridges)])
        for k, key in enumerate(maps):
            part = slice(k * width, (k + 1) * width)
            own = np.concatenate([found[:, :, part], np.broadcast_to(read[:, columns, None], (1, len(needed), width))])
            score = _Scores(own[:, rows_of], np.stack([mixer @ one for one in own]))
            states.setdefault(key, []).append(score)
            for denoise, mix in itertools.product(options("denoise", DENOISES), mixes):
                x, common = score.parts(denoise, mix)
                relative = commons / np.maximum(x.std(0), 1e-9)  # [commons, genes]
                r = _correlation(truth[:, genes], x) + relative * _correlation(truth[:, genes], common)
                r /= np.sqrt(np.maximum(1 + relative**2 + 2 * relative * _correlation(x, common), 1e-12))  # of x + weight x common
                for weight, one in zip(commons[:, 0], r, strict=True):
                    correlations.setdefault((*key, denoise, mix, float(weight), 0.0), []).append(one)
    means = {key: float(np.mean(np.concatenate(value))) for key, value in correlations.items()}
    best = max(means, key=lambda key: means[key])
    natural = [x + best[4] * common for x, common in (score.parts(*best[2:4]) for score in states[best[0], best[1]])]
    predicted = [_standardised(x) for x in natural]
    mixed_curves = [(1 - best[3]) * own + best[3] * around for own, around in curves]
    steps = [_standardised(curve) for curve in mixed_curves]

    def with_process(share: float) -> list[Floats]:
        return [(1 - share) * x + share * p for x, p in zip(predicted, steps, strict=True)] if share > 0 else predicted

    def tried(share: float) -> float:
        key = *best[:5], share
        if key not in means:
            pairs = zip(judged, with_process(share), strict=True)
            means[key] = float(np.mean(np.concatenate([_correlation(truth[:, genes], x) for genes, x in pairs])))
        return means[key]

    share = climb(process_shares, tried)
    names = ("reweight", "penalty", "denoise", "mix", "common", "share", "inner genes")
    chosen = dict(zip(names, (*best[:5], share, tried(share)), strict=True))
    candidates = [dict(zip(names, (*key, value), strict=True)) for key, value in means.items()]
    say(
        f"inner held-out genes: penalty {chosen['penalty']:g}, reweighted {bool(chosen['reweight'])}, panel {chosen['denoise']:.0%} denoised, "
        f"{chosen['mix']:.0%} from neighbors, {chosen['common']:g} of what genes share, {share:.0%} of a process over the reference's cells, "
        f"correlation {chosen['inner genes']:.3f}"
    )
    shares_of_counts, depth = shares(data.measured), []
    for inner, x in zip(folds, predicted, strict=True):
        seen = np.setdiff1d(np.arange(len(shares_of_counts)), inner)
        total = np.log(totals_of(data.measured[rows][:, seen]) / shares_of_counts[seen].sum())
        depth.append(np.repeat(total[:, None], x.shape[1], 1))
    mixed = [standard_places((1 - chosen["mix"]) * own + chosen["mix"] * around) for own, around in places]
    sizes = np.concatenate([x.std(0) for x in natural])
    curve_sizes = np.concatenate([curve.std(0) for curve in mixed_curves]) if curves else 0 * sizes
    signal = log_signal(torch.from_numpy(sizes), torch.from_numpy(curve_sizes), share).numpy()
    return _hyper_priors(data, likelihood, chosen, judged, with_process(share), signal, depth, mixed, rows, candidates, seed, say)


def levels_of(data: Data) -> tuple[Floats, Floats]:
    """`share_posterior` of every gene's log share of the reference's panel counts [G]: exp(location + variance / 2) sums to 1 over the panel."""
    location, variance = share_posterior(*log_shares(data.reference, data.panel))
    return location - logsumexp((location + 0.5 * variance)[data.panel]), variance


def log_signal(own: torch.Tensor, curve: torch.Tensor, share: float) -> torch.Tensor:
    """Log signal [genes]: the sd, over the target's cells, of what map and common coordinate (``own``) and the process (``curve``) say of a gene's
    z-scores. They shrink what they do not know, so it tells how much of the gene they know, which scores of unit sd do not."""
    return ((1 - share) * own + share * curve + LEAST_SIGNAL).log()


def _standardised(x: Floats) -> Floats:
    return np.asarray((x - x.mean(0)) / np.maximum(x.std(0), 1e-9))


def default_hyper(data: Data, likelihood: Likelihood, fixed: dict[str, float | None], closed: bool) -> Hyper:
    """Where nothing can be learned (a tiny panel, or the published settings): wide hyper-priors, and no share of the neighbors. Levels (of a
    ``closed`` map) hang on nothing that is fitted and are learned from all genes of the panel."""
    parameters = {name: [loc, 0.0, 0.0, scale] for name, (loc, scale) in likelihood.priors.items()}
    share, gain, covariance, loud, level_mean = log_share(data), [panel_share(data), 0.0, 1.0], [0.0, 0.0, 0.0], 1, 0.0
    known = {name: value or 0.0 for name, value in fixed.items()} | {"penalty": fixed["penalty"] or 3.0}
    if closed:
        level, noise = log_shares(data.counts, np.arange(len(data.panel)))
        z, unsure = (one[data.panel] for one in levels_of(data))
        level_mean = float(z.mean())
        alive = _alive(data.counts, data.reference[:, data.panel])
        (a, b, sd), found = level_prior(*(one[alive] for one in (level - level_mean, noise, z - level_mean, unsure)))
        gain, covariance = [panel_share(data) + a, b - 1, sd], list(found)
        loadings = directions_above_noise(data, moments(data.measured, data.batch), np.random.default_rng(0))
        loud = max(1, int((loadings != 0).any(0).sum()))
    return Hyper(
        known["penalty"], bool(known["reweight"]), known["denoise"], known["mix"], known["common"], known["process"], [1.0, 0.0], 0.0,
        float(share.mean()), gain, covariance, [0.5, 0.0, 0.0, 0.5], 0.0, parameters, 0.0,
        [ERROR / np.sqrt(loud)] * DIRECTIONS, ERROR, [], level_mean, [-99.0, 99.0] * 3,
    )  # fmt: skip


def _correlation(a: Floats, b: Floats) -> Floats:
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0)


def _hyper_priors(
    data: Data,
    likelihood: Likelihood,
    chosen: dict[str, float],
    judged: list[NDArray[np.int64]],
    predicted: list[Floats],
    signal: Floats,
    log_depth: list[Floats],
    places: list[Floats],
    rows: NDArray[np.int64],
    candidates: list[dict[str, float]],
    seed: int,
    say: Say,
) -> Hyper:
    """Gain, slope, depth, pattern error and the likelihood's parameters of the inner genes, from a log-linear regression of each gene's counts.

    Per fold: positions in the panel of the judged genes, their scores and the log depth [rows, genes], the places [rows, q] of the cells; of all
    judged genes their log ``signal``.
    """
    genes, sizes = np.concatenate(judged), [len(part) for part in judged]
    counts = data.counts[rows][:, genes].toarray().astype(np.float64)
    usual = np.log(data.usual[rows])[:, None]
    depth = np.hstack(log_depth) - usual  # [rows, genes]: a section that is shallower as a whole has fewer counts of every gene
    share, zeros = log_share(data), theta_of_zeros(data)
    scores = np.hstack(predicted)
    spread = SPREAD * (1 - chosen["share"]) / (scores.std(0) + 1e-9)  # states are uncertain, features of the process are not
    scores /= scores.std(0) + 1e-9
    plain = torch.from_numpy(scores)
    panel = np.asarray(data.reference[:, data.panel].sum(0), dtype=np.float64).ravel() + 0.5
    offset = usual + np.log(panel / panel.sum())[genes]  # [rows, genes]
    tried: dict[float, tuple[Floats, Floats, Floats]] = {}

    def evidence(k: float) -> float:
        tried[k] = _regressions(counts, bend(plain, k)[0].numpy(), depth, offset)
        return _evidence(counts, tried[k][0], bend(plain, k)[0].numpy(), depth, offset)

    bent = climb(BENDS, evidence)
    scores, (found, variance, kept) = bend(plain, bent)[0].numpy(), tried[bent]
    # As if there had been no prior: what is shrunk most is faint, and would make a trend by itself.
    free, variance = CENTER + (found - CENTER) / kept, variance / kept
    z = share[data.panel[genes]] - share.mean()
    design = np.column_stack([np.ones_like(z), z])
    exponent = _trend(design, free[:, 2], variance[:, 2])
    # Level: counts per count of the target; regression on the same of the reference, then the random effect around it. Both sides are estimates; a
    # gene without a count on one of them is a probe that fails, or out of reach, and says nothing of levels.
    gains = np.log((counts.sum(0) + 0.5) / (np.exp(offset + depth).sum(0) + 0.5))
    alive = _alive(counts, panel[genes] - 0.5)
    if not alive.all():
        say(dead_genes(int((~alive).sum())))
    x, unsure = (one[data.panel[genes]] for one in levels_of(data))
    level_mean, seen_level = float(x.mean()), gains + np.log(panel / panel.sum())[genes]
    of_counts = np.maximum(variance[:, 0], 1e-6)
    (level, tilt, gain_sd), covariance = level_prior(*(one[alive] for one in (seen_level - level_mean, of_counts, x - level_mean, unsure)))
    signal_mean, of_slopes = float(signal.mean()), np.maximum(variance[:, 1], 1e-6)
    signal, known = signal - signal_mean, np.column_stack([design, signal - signal_mean])
    trend = _trend(known, free[:, 1], of_slopes)
    shift, slope_sd = random_effects(free[:, 1] - known @ trend, of_slopes)
    slope = [float(trend[0] + shift), *trend[1:].tolist(), float(slope_sd)]
    fitted = _rates(found, scores, depth, offset)
    waves = data.waves[rows].astype(np.float64)
    error = pattern_errors(counts, fitted, scores, depth, np.split(np.arange(len(genes)), np.cumsum(sizes)[:-1]), places, waves)
    gain, flicker = [level, tilt - 1, gain_sd], zeros[data.panel[genes]] - zeros.mean()
    span = [float(end) for one in (z, flicker, signal) for end in (one.min(), one.max())]
    hyper = Hyper(
        chosen["penalty"], bool(chosen["reweight"]), chosen["denoise"], chosen["mix"], chosen["common"], chosen["share"], exponent.tolist(), bent,
        float(share.mean()), gain, list(covariance), slope, signal_mean, {}, float(zeros.mean()), *error, candidates, level_mean, span,
    )  # fmt: skip
    exponents = np.clip(design @ exponent, *EXPONENTS)
    along = [np.hstack([t, waves]) * error_loads(hyper, waves.shape[1]) for t in places]
    rng = np.random.default_rng([seed, 3])
    draws = []
    for _ in range(DRAWS):
        noisy = bend(plain + torch.from_numpy(spread * rng.standard_normal(scores.shape)), bent)[0].numpy()
        log_rate = offset + exponents * depth + found[:, 1] * noisy
        noise = [rng.standard_normal((a.shape[1], size)) for a, size in zip(along, sizes, strict=True)]
        log_rate += np.hstack([a @ e - 0.5 * np.square(a).sum(1, keepdims=True) for a, e in zip(along, noise, strict=True)])
        rate = np.exp(np.clip(log_rate, -20, 20))
        draws.append(rate * (counts.sum(0) + 0.5) / (rate.sum(0) + 0.5))
    inner_genes = [(torch.from_numpy(counts), torch.from_numpy(np.stack(draws)).clamp_min(1e-8))]
    parameters = learn_parameters(likelihood, inner_genes, np.stack([z, flicker]))
    say(
        f"log gain {gain[0]:.2f} + {gain[1]:.2f} log share, sd {gain[2]:.2f}; slope {slope[0]:.2f} + {slope[1]:.2f} log share + "
        f"{slope[2]:.2f} log signal, sd {slope[3]:.2f}; depth {exponent[0]:.2f} + {exponent[1]:.2f} log share; bend {bent:g}; "
        + ", ".join(f"{name} {a:.2f} + {b:.2f} log share + {c:.2f} theta of zeros, sd {s:.2f}" for name, (a, b, c, s) in parameters.items())
        + f"; pattern error {np.linalg.norm(hyper.error):.2f} along directions, {hyper.wave_error:.2f} in space"
    )
    return hyper._replace(parameters=parameters)


def _alive(counts: Any, reference: Any) -> NDArray[np.bool_]:
    """Genes with a count on both sides, or all if these are fewer than 3; counts [n, genes] and [m, genes], or their sums."""
    target, other = (np.asarray(one.sum(0)).ravel() if one.ndim == 2 else one for one in (counts, reference))
    alive = (target > 0) & (other > 0)
    return alive if alive.sum() >= 3 else np.ones_like(alive)


def _trend(design: Floats, values: Floats, doubt: Floats) -> Floats:
    """Regression of effects on covariates, ``values`` [genes] with sampling variances ``doubt``: level and slopes, these ~ Normal(0, 1)."""
    weight, prior = 1 / (0.25 + doubt), np.diag([1e-6, *[1.0] * (design.shape[1] - 1)])
    return np.asarray(np.linalg.solve(design.T @ (design * weight[:, None]) + prior, design.T @ (weight * values)))


def _rates(found: Floats, scores: Floats, depth: Floats, offset: Floats) -> Floats:
    """Rates [rows, genes] that a regression fitted."""
    return np.asarray(np.exp(np.clip(offset + found[:, 0] + found[:, 1] * scores + found[:, 2] * depth, -20, 17)))


def _evidence(counts: Floats, found: Floats, scores: Floats, depth: Floats, offset: Floats) -> float:
    """Log score of the genes' counts given what a regression fitted, the dispersion of each gene integrated."""
    rates = np.maximum(_rates(found, scores, depth, offset), 1e-8)
    return float(logsumexp(score_nb(counts, rates[None], LOG_THETA), axis=0).sum())


def error_loads(hyper: Hyper, waves: int) -> Floats:
    """Standard deviations of e_g [q + K]."""
    return np.concatenate([hyper.error, np.full(waves, hyper.wave_error / np.sqrt(max(1, waves)))])


def pattern_errors(
    counts: Floats, fitted: Floats, scores: Floats, depth: Floats, parts: list[NDArray[np.int64]], places: list[Floats], waves: Floats
) -> tuple[list[float], float]:
    """tau [q] and tau_w from counts and rates that were fitted with level, slope and depth [rows, genes]; the genes ``parts[k]`` have the places
    ``places[k]`` [rows, q].

    What level, slope and depth of a gene could take up is taken out of t and w first: of that part its residuals say nothing. A gene without counts
    would be sure of an error of 0.
    """
    q, genes = places[0].shape[1], counts.shape[1]
    loud, k = max(int((np.abs(t).max(0) > 0).sum()) for t in places), waves.shape[1]
    estimate, noise, crossed = (np.zeros((loud, genes)) for _ in range(3))
    total, size, rough = np.zeros(genes), np.ones(genes), np.ones(genes)
    for part, t in zip(parts, places, strict=True):
        features = np.hstack([t[:, :loud], waves])
        for g in part:
            rate, rest = fitted[:, g, None], counts[:, g] - fitted[:, g]
            x = np.column_stack([np.ones(len(rest)), scores[:, g], depth[:, g]])
            f = features - x @ np.linalg.solve((rate * x).T @ x + 1e-6 * np.eye(3), (rate * x).T @ features)
            information, score, variance = (rate * f).T @ f, f.T @ rest, np.square(f).T @ np.square(rest)
            own = np.diag(information)[:loud] + 1.0
            estimate[:, g], noise[:, g] = score[:loud] / own, variance[:loud] / own**2
            crossed[:, g] = np.square(information[loud:, :loud]).sum(0)
            if k:
                total[g], rough[g] = np.square(score[loud:]).sum(), variance[loud:].sum()
                size[g] = max(float(np.square(information[loud:, loud:]).sum()) / k, 1e-9)
    seen = counts.sum(0) >= LEAST_COUNTS
    seen |= seen.sum() < 3
    tau = np.array([random_effects(e, v, center=0.0)[1] for e, v in zip(estimate[:, seen], noise[:, seen], strict=True)])
    left, doubt = ((total - rough - tau**2 @ crossed) / size)[seen], (rough / size)[seen]
    wave = float(np.sqrt(np.clip(np.average(left, weights=1 / np.square(0.05 + doubt)), 0.0, 1.0))) if k else 0.0
    return [*tau.tolist(), *[0.0] * (q - loud)], wave


def _regressions(counts: Floats, predicted: Floats, depth: Floats, offset: Floats) -> tuple[Floats, Floats, Floats]:
    """Quasi-Poisson regression of every gene: log mean = offset ([genes], or [rows, genes]) + c0 + c1 predicted + c2 depth; coefficients, their
    variances, and what the prior (`PRECISION` around `CENTER`) left of the way from there to them, [genes, 3] each."""
    n, genes = counts.shape
    coefficients, variances, kept = np.zeros((genes, 3)), np.ones((genes, 3)), np.ones((genes, 3))
    prior = np.diag(PRECISION)
    for g in range(genes):
        x = np.column_stack([np.ones(n), predicted[:, g], depth[:, g]])
        beta = np.array([np.log((counts[:, g].sum() + 0.5) / (np.exp(offset[..., g] + depth[:, g]).sum() + 0.5)), 0.0, 1.0])
        mu, hessian = np.ones(n), prior
        for _ in range(25):
            mu = np.exp(np.clip(offset[..., g] + x @ beta, -20, 17))
            hessian = x.T @ (x * mu[:, None]) + prior
            step = np.linalg.solve(hessian, x.T @ (counts[:, g] - mu) - prior @ (beta - CENTER))
            beta = beta + np.clip(step, -1, 1)
            if np.abs(step).max() < 1e-6:
                break
        pearson = float(((counts[:, g] - mu) ** 2 / np.maximum(mu, 1e-3)).mean())
        own = np.diag(np.linalg.inv(hessian))
        coefficients[g], variances[g], kept[g] = beta, own * max(1.0, pearson), np.maximum(1 - PRECISION * own, LEAST_KEPT)
    return coefficients, variances, kept

"""SIID's data-driven start: closed-form EM from a clustering of the cells, and what inner held-out genes teach.

One EM sweep is one sweep of the local posterior (`activity.py`) and the closed-form update of the global profiles under a gamma prior around
the prior profile q0 (the mean profile of the spots, or given scRNA-seq profiles), monotone in the Poisson likelihood plus log prior:

    Q <- (Q (U^T R_v + W^T R_x / phi) + a) / (sum_j U + sum_i W / phi + a / q0),  rows to sum 1, their scale into W      [h, G]
    phi_g <- sum_i (W Q)_ig / sum_i x_ig on the panel, centered: mean log phi = 0, the scale goes to rho = mean capture ratio

Chosen on *inner held-out genes* (panel genes taken from the cells but left in the spots: exactly the situation of a gene that the cells never
measured): the number of factors and the width and strength of the regional effect; on thinned counts: the sparsity of the compositions (a
composition that is too sparse, or not sparse enough, predicts the other half of the same cell's molecules worse). Learned there too: the hyper-priors
of gain and inverse dispersion of an unmeasured gene, as the values that, *together with the spread of the posterior draws*, explain the inner
genes' counts. Residuals of genes that the factors were fitted to would be far too small for that.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from ppl_st.models.siid.activity import FLOOR, Globals, Local, LocalPosterior, aggregate, sizes
from ppl_st.models.siid.batches import Batches, Data
from ppl_st.models.siid.regional import choose_regional, regional_posterior

if TYPE_CHECKING:
    from ppl_st.models.siid.model import Config

Say = Callable[[str], None]
CANDIDATES = (5, 10, 20, 40, 80, 160)  # numbers of factors that are tried
SPARSITIES = (0.0, 0.1, 0.3)
COMPONENTS = 50  # directions of the cells' counts that are clustered
LLOYD_LIMIT = 1_000_000  # cells x factors up to which full k-means is affordable
SELECTION_CELLS = 15_000  # cells on which settings are chosen
EM_CELLS = 60_000  # cells on which a chain's profiles are started
INNER_CELLS = 5000  # cells on which gain and dispersion of inner genes are learned
INNER_DRAWS = 4  # posterior draws per start there
LOG_THETA_GRID = np.linspace(-4.0, 6.0, 41)


class Start(NamedTuple):
    """What one EM run hands over to SVI (or to the choice of settings)."""

    g: Globals
    evidence: Tensor  # [h, G] counts attributed to each entry of Q
    log_phi: Tensor  # [P]
    log_theta: Tensor  # [P] inverse dispersion of the cells' counts around the fitted rates, by moments
    log_theta_spots: Tensor  # [G] the same of the spots
    log_likelihood: float  # Poisson, without constants, of the last sweep


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    factors: int
    sparsity: float
    gain_loc: float  # log gain (cells per spots) of an unmeasured gene: mean
    gain_scale: float  # and standard deviation
    theta_loc: float  # log inverse dispersion of an unmeasured gene: at the mean of the covariate,
    theta_slope: float  # per unit of log share of the spots' counts (centered),
    theta_scale: float  # and standard deviation
    covariate_mean: float
    bandwidth: float  # regional effect: kernel width in spot pitches, 0 = none
    regional_shape: float
    candidates: list[dict[str, float]]  # every setting tried, with its score per inner count


def log_share(data: Data) -> NDArray[np.float64]:
    """Log share of the spots' counts that falls to each gene, [G]."""
    totals = np.asarray(data.spot_counts.sum(0), dtype=np.float64).ravel() + 0.5
    return np.log(totals / totals.sum())


def run_em(data: Data, config: "Config", factors: int, sparsity: float, seed: int, sweeps: int) -> tuple[Start, Local, LocalPosterior]:
    """EM from a clustering of the cells; returns the global start, the last local posterior and its problem."""
    batch = Batches(data, 0, seed).at(0)
    problem = LocalPosterior(batch)
    panel = torch.from_numpy(data.panel)
    q0 = torch.from_numpy(prior_profiles(data, factors)).float()  # [h, G]
    strength = torch.full((factors, 1), config.profile_concentration)
    if data.profiles is not None:
        strength[: len(data.profiles)] = config.given_profile_concentration
    shared = bool(batch.spots.numel())
    g = Globals(
        profiles=q0,
        panel_profiles=q0[:, panel],
        usage=torch.full((factors,), 1.0 / factors),
        capture=1.0,
        concentration=config.concentration,
        capture_concentration=config.capture_concentration,
        sparsity=sparsity,
        label_weight=config.label_weight,
    )
    local = _clustered(data, g, batch.total, factors, seed)
    log_phi = torch.zeros(len(panel))
    x_total = torch.from_numpy(np.asarray(data.counts.sum(0), dtype=np.float32).ravel())
    evidence = torch.zeros_like(q0)
    for sweep in range(sweeps):
        activity, capture = local.activity, local.capture
        gain = torch.exp(-log_phi)
        evidence = strength.expand_as(q0).clone()
        exposure = strength / q0
        if shared:
            mixed = aggregate(batch, capture[:, None] * activity)
            evidence += g.profiles * problem.spots.columns(mixed, g.profiles)  # type: ignore[union-attr]
            exposure = exposure + mixed.sum(0)[:, None]
        evidence[:, panel] += g.panel_profiles * problem.cells.columns(activity, g.panel_profiles)
        exposure = exposure.expand_as(q0).clone()
        exposure[:, panel] += activity.sum(0)[:, None] * gain
        profiles = (evidence / exposure).clamp_min(1e-12)
        scale = profiles.sum(1)
        profiles, activity = profiles / scale[:, None], activity * scale
        if config.platform != "none" and shared:
            predicted = activity.sum(0) @ profiles[:, panel]
            log_phi = torch.log((predicted + 1.0) / (x_total + 1.0))
            shift = float((log_phi * x_total).sum() / x_total.sum())
            log_phi, activity = log_phi - shift, activity * np.exp(-shift)
        mass = activity.sum(0)
        rho = _capture(batch, activity, config, g) if shared else 1.0
        g = g._replace(profiles=profiles, panel_profiles=profiles[:, panel] * torch.exp(-log_phi), usage=mass / mass.sum(), capture=rho)
        capture = local.capture if np.isfinite(config.capture_concentration) and sweep else torch.full_like(batch.total, rho)
        local = Local(activity, torch.ones_like(activity), capture, torch.ones_like(capture))
        ramp = max(0.0, (2 * (sweep + 1) - sweeps) / sweeps) if sparsity else 0.0
        local = problem.update(local, g, ramp, 1.0)
    score = problem.cells.log_likelihood(local.activity, g.panel_profiles)
    log_theta = _dispersion(data.counts, local.activity, g.panel_profiles)
    log_theta_spots = torch.zeros(q0.shape[1])
    if problem.spots is not None:
        mixed = aggregate(batch, local.capture[:, None] * local.activity)
        score += problem.spots.log_likelihood(mixed, g.profiles)
        covered = np.flatnonzero(mixed.sum(1).numpy() > 0)
        log_theta_spots = _dispersion(data.spot_counts[covered], mixed[covered], g.profiles)
    return Start(g, evidence, log_phi, log_theta, log_theta_spots, score), local, problem


def _dispersion(counts: sp.csr_matrix, activity: Tensor, loadings: Tensor) -> Tensor:
    """log theta_g with sum_n (x - rate)^2 = sum_n rate + rate^2 / theta; sums of rate^2 and x rate come from h x h and h x G products."""
    a, q = activity.double(), loadings.double()
    rate, square = a.sum(0) @ q, torch.einsum("kg,kl,lg->g", q, a.T @ a, q)
    cross = (torch.from_numpy(counts.T @ a.numpy()).T * q).sum(0)
    x_square = torch.from_numpy(np.asarray(counts.multiply(counts).sum(0), dtype=np.float64).ravel())
    excess = (x_square - 2 * cross + square - rate).clamp_min(1e-3 * square + 1e-12)
    return (square.clamp_min(1e-12) / excess).log().clamp(-3.0, 6.0).float()


def prior_profiles(data: Data, factors: int) -> NDArray[np.float64]:
    """Prior mean of Q, [h, G]: the spots' mean profile, and given profiles for the first factors."""
    q0 = np.tile(np.exp(log_share(data)), (factors, 1))
    if data.profiles is not None:
        q0[: len(data.profiles)] = data.profiles
    return q0


def _clustered(data: Data, g: Globals, total: Tensor, factors: int, seed: int) -> Local:
    """One tenth of every cell spread over all factors, the rest on its cluster (or its label)."""
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.decomposition import TruncatedSVD

    roots = data.counts.copy()
    per_cell = np.maximum(np.asarray(roots.sum(1)).ravel(), 1.0)
    roots.data = np.sqrt(roots.data / np.repeat(per_cell, np.diff(roots.indptr))).astype(np.float32)
    directions = TruncatedSVD(min(COMPONENTS, roots.shape[1] - 1), random_state=seed).fit_transform(roots)
    n_clusters = min(factors, len(per_cell))
    if len(per_cell) * factors <= LLOYD_LIMIT:
        cluster = KMeans(n_clusters, random_state=seed, n_init=3).fit(directions).labels_
    else:
        cluster = MiniBatchKMeans(n_clusters, random_state=seed, n_init=3, batch_size=4096, max_iter=30).fit(directions).labels_
    cluster = cluster.astype(np.int64)
    if data.labels is not None:  # labelled cells take their factor, clusters move behind the labels
        n_labels = int(data.labels.max()) + 1
        cluster = np.where(data.labels >= 0, data.labels, n_labels + cluster % max(1, factors - n_labels)) % factors
    activity = torch.full((len(per_cell), factors), 0.1 / factors)
    activity[torch.arange(len(per_cell)), torch.from_numpy(cluster)] += 0.9
    activity = activity * sizes(total, g)[:, None]
    ones = torch.ones(len(per_cell))
    return Local(activity, torch.ones_like(activity), ones, ones)


def _capture(batch, activity: Tensor, config: "Config", g: Globals) -> float:  # type: ignore[no-untyped-def]
    """rho: counts of the spots that have cells per expected count at capture 1."""
    expected = aggregate(batch, activity).sum(1)  # [s]
    observed = batch.spot_counts @ torch.ones(batch.spot_counts.shape[1], 1)  # [s, 1]
    return float(observed[expected > 0].sum()) / max(float(expected.sum()), 1.0)


# ---- inner held-out genes ----


def default_hyper(data: Data, config: "Config") -> Hyper:
    """Hyper-priors where nothing can be learned (a tiny panel, or the published settings): wide, said to be so in the report."""
    factors = config.factors or min(20, max(2, data.counts.shape[0] // 20))
    sparsity = 0.0 if config.sparsity == "auto" else float(config.sparsity)
    return Hyper(factors, sparsity, 0.0, 0.5, 0.0, 0.0, 1.0, float(log_share(data).mean()), 0.0, 1.0, [])


def inner_split(data: Data, rng: np.random.Generator, fold: int, share: float = 0.2) -> tuple[Data, NDArray[np.int64]]:
    """The problem without a fifth of the panel in the cells, and the positions of those genes in the panel."""
    order = rng.permutation(len(data.panel))
    size = max(1, round(share * len(order)))
    inner = np.sort(order[fold * size : (fold + 1) * size])
    kept = np.setdiff1d(np.arange(len(data.panel)), inner)
    return data._replace(counts=data.counts[:, kept], panel=data.panel[kept]), inner


def learn_hyper(data: Data, config: "Config", seed: int, say: Say) -> Hyper:
    """Choose settings and learn hyper-priors on inner held-out genes; see the file's docstring."""
    data = subset(data, SELECTION_CELLS, np.random.default_rng([seed, 5]))
    split, inner = inner_split(data, np.random.default_rng([seed, 1]), 0)
    truth = sp.csr_matrix(data.counts[:, inner])
    candidates: list[dict[str, float]] = []

    def inner_score(factors: int, sparsity: float) -> NDArray[np.float64]:
        start, _, problem = run_em(split, config, factors, sparsity, seed, config.sweeps)
        rate = problem.solve(start.g, config.predict_steps).activity @ start.g.profiles[:, torch.from_numpy(data.panel[inner])]
        score = _poisson_score(truth, rate, fit_level=True)
        candidates.append({"factors": factors, "sparsity": sparsity, "inner genes": float(score.sum())})
        say(f"{factors} factors, sparsity {sparsity:g}: inner held-out genes score {score.sum():.4f} nats per count")
        return score

    factors, best = config.factors, None
    if factors == 0:
        limit = max(CANDIDATES[0], min(data.counts.shape[0] // 20, data.spot_counts.shape[0], 8 * len(data.panel)))
        for candidate in (c for c in CANDIDATES if c <= limit):
            score = inner_score(candidate, 0.0)
            if best is not None and _clearly_worse(score, best):
                break
            best, factors = score, candidate  # in doubt the larger number: chains are averaged, which favors it
    if config.sparsity != "auto":
        return _learn_priors(data, config, factors, float(config.sparsity), seed, candidates, say)
    best = inner_score(factors, 0.0) if best is None else best
    sparsity = _choose_sparsity(data, config, factors, seed, candidates, say)
    # Both must gain: other molecules of the same genes, and other genes.
    while sparsity > 0 and inner_score(factors, sparsity).sum() < best.sum():
        sparsity = max((s for s in SPARSITIES if s < sparsity), default=0.0)
    return _learn_priors(data, config, factors, sparsity, seed, candidates, say)


def subset(data: Data, cells: int, rng: np.random.Generator) -> Data:
    """At most about ``cells`` cells: random spots with their cells, and as large a share of the cells between spots."""
    n = data.counts.shape[0]
    if n <= cells:
        return data
    spots = np.arange(data.mapping.shape[1])
    mapped = np.diff(data.mapping.indptr) > 0
    if mapped.sum() > cells / 2:  # else keep every spot: the spots teach the unmeasured genes
        share = cells / 2 / mapped.sum()
        spots = np.sort(rng.permutation(spots)[: max(2, int(share * len(spots)))])
    inside = np.flatnonzero(np.asarray(data.mapping[:, spots].sum(1)).ravel() > 0)
    outside = rng.permutation(np.flatnonzero(~mapped))[: max(0, cells - len(inside))]
    return data.take_rows(np.sort(np.concatenate([inside, outside])), spots)


def _clearly_worse(score: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    """Whether the sum over genes is worse by more than one standard error of the paired differences."""
    difference = score - best
    return bool(difference.sum() < -np.sqrt(len(difference)) * difference.std(ddof=1))


def _choose_sparsity(data: Data, config: "Config", factors: int, seed: int, candidates: list[dict[str, float]], say: Say) -> float:
    """The sparsity under which half of a cell's molecules predict the other half best."""
    kept = data.counts.copy()
    kept.data = np.random.default_rng([seed, 4]).binomial(kept.data.astype(np.int64), 0.5).astype(np.float32)
    rest = sp.csr_matrix(data.counts - kept)
    best, chosen = -np.inf, 0.0
    for sparsity in SPARSITIES:
        start, _, problem = run_em(data._replace(counts=kept), config, factors, sparsity, seed, config.sweeps)
        local = problem.solve(start.g, config.predict_steps)
        score = float(_poisson_score(rest, local.activity @ start.g.panel_profiles, fit_level=False).sum())
        candidates.append({"factors": factors, "sparsity": sparsity, "thinned counts": score})
        say(f"sparsity {sparsity:g}: thinned counts score {score:.4f} nats per count")
        if score < best:
            break
        best, chosen = score, sparsity
    return chosen


def _poisson_score(truth: sp.csr_matrix, rate: Tensor, *, fit_level: bool) -> NDArray[np.float64]:
    """Each gene's part of the Poisson log-likelihood per count; ``fit_level`` fits each gene's level (the level is the gain's business)."""
    total = torch.zeros(rate.shape[1], dtype=torch.float64)
    level = torch.ones(rate.shape[1])
    if fit_level:
        level = (torch.from_numpy(np.asarray(truth.sum(0), dtype=np.float32).ravel()) + 0.5) / (rate.sum(0) + 0.5)
    for rows in range(0, rate.shape[0], 4096):
        x = torch.from_numpy(truth[rows : rows + 4096].toarray())
        scaled = (rate[rows : rows + 4096] * level).clamp_min(FLOOR)
        total += (x * scaled.log() - scaled).double().sum(0)
    return total.numpy() / max(float(truth.sum()), 1.0)


def _learn_priors(
    data: Data, config: "Config", factors: int, sparsity: float, seed: int, candidates: list[dict[str, float]], say: Say
) -> Hyper:
    share = log_share(data)
    gains, thetas, covariate = [], [], []
    bandwidth, regional_shape = 0.0, 1.0
    for fold in range(2):
        split, inner = inner_split(data, np.random.default_rng([seed, 1]), fold)
        genes = data.panel[inner]
        rng = np.random.default_rng([seed, 2, fold])
        rows = np.sort(rng.permutation(len(data.cell_xy))[:INNER_CELLS])
        draws: list[Tensor] = []
        for mode in range(2):
            start, local, problem = run_em(split, config, factors, sparsity, seed + mode, config.sweeps)
            mixed = aggregate(problem.batch, local.capture[:, None] * local.activity)  # [s, h]
            if fold == 0 and mode == 0 and config.regional:
                bandwidth, regional_shape = choose_regional(split, mixed, start.g.profiles)
                say(f"regional effect: bandwidth {bandwidth:g} pitches, shape {regional_shape:g}")
            draws += _draw_rates(split, config, start, local, mixed, rows, genes, (bandwidth, regional_shape), [seed, 3, fold, mode])
        counts = data.counts[rows][:, inner].toarray().astype(np.float64)
        gain, theta = _explain(counts, torch.stack(draws).double().numpy())
        gains.append(gain)
        thetas.append(theta)
        covariate.append(share[genes])
    gain, theta, z = np.concatenate(gains), np.concatenate(thetas), np.concatenate(covariate)
    theta_loc, theta_slope, theta_scale = _regress(theta, z - share.mean())
    m = len(gain)
    gain_scale = float(np.sqrt((gain.var(ddof=1) if m > 1 else 0.25) * (1 + 1 / m)))
    say(f"gain sd {gain_scale:.3f}, log theta {theta_loc:.2f} + {theta_slope:.2f} log share, sd {theta_scale:.2f} ({m} inner genes)")
    return Hyper(
        factors, sparsity, float(gain.mean()), max(gain_scale, 1e-3), theta_loc, theta_slope, theta_scale, float(share.mean()),
        bandwidth, regional_shape, candidates,
    )  # fmt: skip


def _draw_rates(
    data: Data,
    config: "Config",
    start: Start,
    local: Local,
    mixed: Tensor,
    rows: NDArray[np.int64],
    genes: NDArray[np.int64],
    regional: tuple[float, float],
    seed: list[int],
) -> list[Tensor]:
    """Posterior draws of the rates of ``genes`` in the cells ``rows``: activities and regional effect, [INNER_DRAWS] of [rows, genes]."""
    rng = np.random.default_rng(seed)
    profiles = start.g.profiles[:, torch.from_numpy(genes)]
    shape, rate = local.shape[rows].numpy(), local.rate[rows].numpy()
    effect = None
    if regional[0] > 0:
        effect = regional_posterior(data.cell_xy[rows], data.spot_xy, data.spot_counts[:, genes], (mixed @ profiles).numpy(), *regional)
    draws = []
    for _ in range(INNER_DRAWS):
        activity = torch.from_numpy((rng.standard_gamma(shape) / rate).astype(np.float32))
        drawn = activity @ profiles
        if effect is not None:
            drawn = drawn * torch.from_numpy((rng.standard_gamma(effect[0]) / effect[1]).astype(np.float32))
        draws.append(drawn.clamp_min(1e-6))
    return draws


def _explain(counts: NDArray[np.float64], rates: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log gain [genes] and the log theta [genes] that maximise sum_i log mean_d NB(x_i | gain rate_d, theta)."""
    gain = np.log((counts.sum(0) + 0.5) / (rates.mean(0).sum(0) + 0.5))
    mu = rates * np.exp(gain)
    score = np.empty((len(LOG_THETA_GRID), counts.shape[1]))
    for t, log_theta in enumerate(LOG_THETA_GRID):
        theta = np.exp(log_theta)
        fixed = gammaln(counts + theta) - gammaln(theta)
        log_p = fixed - theta * np.log1p(mu / theta) + counts * (np.log(mu) - np.log(mu + theta))
        top = log_p.max(0)
        score[t] = (top + np.log(np.exp(log_p - top).mean(0))).sum(0)
    return gain, LOG_THETA_GRID[score.argmax(0)]


def _regress(theta: NDArray[np.float64], z: NDArray[np.float64]) -> tuple[float, float, float]:
    """Intercept at z = 0, slope and predictive sd of log theta on the covariate; the slope is shrunk (prior sd 0.5 per log unit)."""
    center = z.mean()
    noise = max(theta.var(), 1e-2)
    slope = float(((z - center) * (theta - theta.mean())).sum() / (((z - center) ** 2).sum() + noise / 0.25)) if len(theta) > 3 else 0.0
    loc = float(theta.mean() - slope * center)
    residual = theta - loc - slope * z
    scale = float(np.sqrt((residual**2).sum() / max(1, len(theta) - 2) * (1 + 1 / len(theta)))) if len(theta) > 3 else 1.0
    return loc, slope, max(scale, 0.05)

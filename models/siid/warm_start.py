"""SIID's data-driven start: closed-form EM from a clustering of the cells.

One EM sweep is one sweep of the local posterior (`activity.py`) and the closed-form update of the global profiles under a gamma prior around
the prior profile q0 (the mean profile of the spots, or given scRNA-seq profiles), monotone in the Poisson likelihood plus log prior:

    Q <- (Q (U^T R_v + W^T R_x / phi) + a) / (sum_j U + sum_i W / phi + a / q0),  rows to sum 1, their scale into W      [h, G]
    phi_g <- sum_i (W Q)_ig / sum_i x_ig on the panel, centered: mean log phi = 0, the scale goes to rho = mean capture ratio
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppl_st.models.siid.activity import Globals, Local, LocalPosterior, aggregate, sizes
from ppl_st.models.siid.batches import Batches, Data

if TYPE_CHECKING:
    from ppl_st.models.siid.model import Config

STRIDE = 1_000_003  # between the seeds of a fit's starts: no other seed that a user may choose shares one
COMPONENTS = 50  # directions of the cells' counts that are clustered
LLOYD_LIMIT = 1_000_000  # cells x factors up to which full k-means is affordable
EM_CELLS = 60_000  # cells on which a chain's profiles are started
STREAMED = 2  # sweeps over all spots where that left some out


class Start(NamedTuple):
    """What one EM run hands over to SVI (or to the choice of settings)."""

    g: Globals
    evidence: Tensor  # [h, G] counts attributed to each entry of Q
    log_phi: Tensor  # [P]
    # Parameters [P] of the cells' likelihood: log_theta by moments around the fitted rates; `hyper.start_parameters` has those of others.
    parameters: dict[str, Tensor]
    log_likelihood: float  # Poisson, without constants, of the last sweep


def log_share(data: Data) -> NDArray[np.float64]:
    """Log share of the spots' counts that falls to each gene, [G]."""
    totals = np.asarray(data.spot_counts.sum(0), dtype=np.float64).ravel() + 0.5
    return np.log(totals / totals.sum())


def run_em(
    data: Data, config: "Config", factors: int, sparsity: float, seed: int, sweeps: int
) -> tuple[Start, Local, LocalPosterior]:
    """EM from a clustering of the cells; returns the global start, the last local posterior and its problem."""
    batch = Batches(data, 0, seed).at(0)
    problem = LocalPosterior(batch)
    panel = torch.from_numpy(data.panel)
    q0 = torch.from_numpy(prior_profiles(data, factors)).float()  # [h, G]
    prior = _prior_counts(data, config, factors)
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
    log_phi, evidence = torch.zeros(len(panel)), torch.zeros_like(q0)
    for sweep in range(sweeps):
        g, evidence, log_phi, scale = _profile_step(data, config, g, _sums(problem, g, local), log_phi, prior)
        activity = local.activity * scale
        capture = (
            local.capture
            if np.isfinite(config.capture_concentration) and sweep
            else torch.full_like(batch.total, g.capture)
        )
        local = Local(activity, torch.ones_like(activity), capture, torch.ones_like(capture))
        ramp = max(0.0, (2 * (sweep + 1) - sweeps) / sweeps) if sparsity else 0.0
        local = problem.update(local, g, ramp, 1.0)
    score = problem.cells.log_likelihood(local.activity, g.panel_profiles)
    log_theta = _dispersion(data.counts, local.activity, g.panel_profiles)
    if problem.spots is not None:
        mixed = aggregate(batch, local.capture[:, None] * local.activity)
        score += problem.spots.log_likelihood(mixed, g.profiles)
    return Start(g, evidence, log_phi, {"log_theta": log_theta}, score), local, problem


class Sums(NamedTuple):
    """What the update of the global profiles needs of the cells and spots: sums over them, so that parts can be added."""

    spot_counts: Tensor  # [h, G] counts of the spots attributed to each entry of Q
    cell_counts: Tensor  # [h, P] and of the cells
    activity: Tensor  # [h] of all cells
    captured: Tensor  # [h] activity times capture that reaches spots
    reach: Tensor  # [h] the same at capture 1
    observed: Tensor  # [] counts of the spots that have cells


def _sums(problem: LocalPosterior, g: Globals, local: Local) -> Sums:
    """The sums over the cells that the batch owns and over its spots."""
    batch = problem.batch
    owned = local.activity * batch.owned[:, None]
    spot_counts, captured = torch.zeros_like(g.profiles), torch.zeros_like(g.usage)
    reach, observed = captured, torch.zeros(())
    if problem.spots is not None:
        mixed = aggregate(batch, local.capture[:, None] * local.activity)
        spot_counts, captured = g.profiles * problem.spots.columns(mixed, g.profiles), mixed.sum(0)
        plain = aggregate(batch, local.activity)
        reach = plain.sum(0)
        observed = (batch.spot_counts @ torch.ones(batch.spot_counts.shape[1], 1))[plain.sum(1) > 0].sum()
    return Sums(spot_counts, g.panel_profiles * problem.cells.columns(owned, g.panel_profiles), owned.sum(0), captured, reach, observed)


def _prior_counts(data: Data, config: "Config", factors: int) -> tuple[Tensor, Tensor]:
    """Prior evidence [h, 1] and exposure [h, G] of Q."""
    strength = torch.full((factors, 1), config.profile_concentration)
    if data.profiles is not None:
        strength[: len(data.profiles)] = config.given_profile_concentration
    return strength, strength / torch.from_numpy(prior_profiles(data, factors)).float()


def _profile_step(
    data: Data, config: "Config", g: Globals, sums: Sums, log_phi: Tensor, prior: tuple[Tensor, Tensor]
) -> tuple[Globals, Tensor, Tensor, Tensor]:
    """Closed-form update of Q, phi and rho given the sums: new globals, evidence for Q [h, G], log phi [P], factors of the activities [h]."""
    panel = torch.from_numpy(data.panel)
    evidence, exposure = prior[0] + sums.spot_counts, prior[1] + sums.captured[:, None]
    evidence[:, panel] += sums.cell_counts
    exposure[:, panel] += sums.activity[:, None] * torch.exp(-log_phi)
    profiles = (evidence / exposure).clamp_min(1e-12)
    scale, rho = profiles.sum(1), 1.0
    profiles = profiles / scale[:, None]
    if data.spot_counts.shape[0]:
        if config.platform != "none":
            seen = torch.from_numpy(np.asarray(data.counts.sum(0), dtype=np.float32).ravel())
            log_phi = torch.log(((sums.activity * scale) @ profiles[:, panel] + 1.0) / (seen + 1.0))
            weight = 1 / (0.25 + 1 / (seen + 1.0))  # each gene about alike, so that no strong gene sets the level of all others
            shift = float((log_phi * weight).sum() / weight.sum())
            log_phi, scale = log_phi - shift, scale * np.exp(-shift)
        rho = float(sums.observed) / max(float((sums.reach * scale).sum()), 1.0)
    mass = sums.activity * scale
    g = g._replace(
        profiles=profiles, panel_profiles=profiles[:, panel] * torch.exp(-log_phi), usage=mass / mass.sum(), capture=rho
    )
    return g, evidence, log_phi, scale


def sweep_on(data: Data, config: "Config", start: Start, steps: int) -> Start:
    """``start``, which EM found on a part of ``data``, after `STREAMED` sweeps over all spots with their cells, one batch after the other.

    Memory does not grow with the spots. In every sweep a batch solves its cells anew, in ``steps`` sweeps of its own.
    """
    mapped = np.flatnonzero(np.diff(data.mapping.indptr) > 0)
    data = data.take_rows(mapped, np.arange(data.spot_counts.shape[0]))
    batches, prior = Batches(data, config.batch_spots, 0), _prior_counts(data, config, len(start.g.usage))
    for _ in range(STREAMED):
        total: Sums | None = None
        for step in range(len(batches)):
            problem = LocalPosterior(batches.at(step))
            sums = _sums(problem, start.g, problem.solve(start.g, steps))
            total = sums if total is None else Sums(*(one + more for one, more in zip(total, sums, strict=True)))
        assert total is not None
        g, evidence, log_phi, _ = _profile_step(data, config, start.g, total, start.log_phi, prior)
        start = start._replace(g=g, evidence=evidence, log_phi=log_phi)
    return start


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
        cluster = (
            MiniBatchKMeans(n_clusters, random_state=seed, n_init=3, batch_size=4096, max_iter=30)
            .fit(directions)
            .labels_
        )
    cluster, known = cluster.astype(np.int64), 0
    if data.profiles is not None:
        cluster, known = _like_profiles(data, data.profiles, cluster, factors)[cluster], len(data.profiles)
    if data.labels is not None:  # labelled cells take their factor, clusters that look like no profile move behind the names
        spare = factors - data.named
        others = np.where(cluster < known, cluster, data.named + cluster % spare if spare else cluster)
        cluster = np.where(data.labels >= 0, data.labels, others)
    activity = torch.full((len(per_cell), factors), 0.1 / factors)
    activity[torch.arange(len(per_cell)), torch.from_numpy(cluster)] += 0.9
    activity = activity * sizes(total, g)[:, None]
    ones = torch.ones(len(per_cell))
    return Local(activity, torch.ones_like(activity), ones, ones)


def _like_profiles(data: Data, profiles: NDArray[np.float64], cluster: NDArray[np.int64], factors: int) -> NDArray[np.int64]:
    """Factor of each cluster: that of the prior profile [K, G] it looks most like (one to one); clusters that look like none take other factors.

    Both are compared by log shares of the panel's genes, less their mean over clusters or profiles: the platforms' gene factors drop out.
    """
    size = int(cluster.max()) + 1
    member = sp.csr_matrix((np.ones(len(cluster)), (cluster, np.arange(len(cluster)))), shape=(size, len(cluster)))
    sums = np.asarray((member @ data.counts).todense(), dtype=np.float64)
    sums += 10 * (sums.sum(0) + 0.5) / (sums.sum() + 0.5 * sums.shape[1])  # a gene with few counts in a cluster says little, one without nothing
    found, wanted = (np.log(table / table.sum(1, keepdims=True)) for table in (sums, profiles[:, data.panel]))
    found, wanted = found - found.mean(0), wanted - wanted.mean(0)
    norms = np.linalg.norm(wanted, axis=1)[:, None] * np.linalg.norm(found, axis=1)
    likeness = wanted @ found.T / np.maximum(norms, 1e-12)  # [K, clusters]
    rows, columns = linear_sum_assignment(likeness, maximize=True)
    alike = likeness[rows, columns] > 0
    rows, columns = rows[alike], columns[alike]
    factor = np.full(size, -1)
    factor[columns] = rows
    free = [k for k in (*range(len(profiles), factors), *range(len(profiles))) if k not in rows]  # those without a profile first
    factor[factor < 0] = free[: size - len(rows)]
    return factor

"""The regional effect: what nearby spots say about a gene beyond the factors.

A gene that the cells never measured may be higher or lower in a region than its factors explain; the spots see it. With expected counts
E_jg = (U Q)_jg of a spot and kernel weights c_ij = exp(-d_ij^2 / (2 b^2)) of spot j at position i (d in pitches, the nearest spots only),

    delta_g(i) ~ Gamma(a, a)  a priori (mean 1),   delta_g(i) | v ~ Gamma(a + sum_j c_ij v_jg,  a + sum_j c_ij E_jg)

which is the exact conjugate posterior of a multiplicative effect under a kernel-weighted (local) Poisson likelihood. Bandwidth b and shape a
are chosen on the spots, each predicted from its neighbors without itself, so an effect that does not extend in space is not used.
"""

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from ppl_st.models.siid.batches import Data

NEAREST = 7  # a spot and its six neighbors on a hexagonal grid
BANDWIDTHS = (0.3, 0.45, 0.6, 0.8, 1.1)  # spot pitches
SHAPES = (1.0, 3.0, 10.0, 30.0)
MAX_GENES = 300  # genes that choose


def kernel(
    positions: NDArray[np.float64], spots: NDArray[np.float64], bandwidth: float, leave_out_self: bool = False
) -> sp.csr_matrix:
    """Weights c_ij of the nearest spots, CSR [n, s]."""
    k = min(NEAREST, len(spots))
    distance, index = cKDTree(spots).query(positions, k=[*range(1, k + 1)])
    weight = np.exp(-(distance**2) / (2 * bandwidth**2)).astype(np.float32)
    rows = np.repeat(np.arange(len(positions)), k)
    if leave_out_self:
        weight[index == np.arange(len(positions))[:, None]] = 0.0
    return sp.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(len(positions), len(spots)))


def regional_posterior(
    positions: NDArray[np.float64],
    spots: NDArray[np.float64],
    spot_counts: sp.csr_matrix,
    expected: NDArray[np.float32],
    bandwidth: float,
    shape: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Shape and rate of delta at ``positions`` [n, 2] for the genes of ``spot_counts`` and ``expected`` [s, g]; each [n, g]."""
    covered = sp.diags(
        (expected.sum(1) > 0).astype(np.float32)
    )  # a spot without cells has counts but nothing to compare them with
    weights = kernel(positions, spots, bandwidth) @ covered
    seen = weights @ spot_counts
    return np.asarray(seen.todense(), dtype=np.float32) + np.float32(shape), weights @ expected + np.float32(shape)


def choose_regional(data: Data, mixed: Tensor, profiles: Tensor) -> tuple[float, float]:
    """Bandwidth and shape by leave-one-spot-out Poisson score on genes that the cells lack; bandwidth 0 if no effect is best."""
    covered = np.flatnonzero(mixed.sum(1).numpy() > 0)
    data, mixed = data._replace(spot_counts=data.spot_counts[covered], spot_xy=data.spot_xy[covered]), mixed[covered]
    s, genes = data.spot_counts.shape
    unmeasured = np.setdiff1d(np.arange(genes), data.panel)
    if s < 2 or not len(unmeasured):
        return 0.0, 1.0
    if len(unmeasured) > MAX_GENES:
        totals = np.asarray(data.spot_counts[:, unmeasured].sum(0)).ravel()
        unmeasured = np.sort(unmeasured[np.argsort(-totals, kind="stable")[:MAX_GENES]])
    counts = data.spot_counts[:, unmeasured].toarray()
    expected = (mixed @ profiles[:, torch.from_numpy(unmeasured)]).numpy().clip(1e-6)

    def score(effect: NDArray[np.float32] | float) -> float:
        rate = expected * effect
        return float((counts * np.log(rate) - rate).sum(dtype=np.float64))

    best, chosen = score(1.0), (0.0, 1.0)
    for bandwidth in BANDWIDTHS:
        weights = kernel(data.spot_xy, data.spot_xy, bandwidth, leave_out_self=True)
        seen, due = weights @ counts, weights @ expected
        for shape in SHAPES:
            value = score((seen + shape) / (due + shape))
            if value > best:
                best, chosen = value, (bandwidth, shape)
    return chosen

"""The regional effect: what nearby spots say about a gene beyond the factors.

A gene that the cells never measured may be higher or lower in a region than its factors explain; the spots see it. With expected counts
E_jg = (U Q)_jg of a spot and kernel weights c_ij = exp(-d_ij^2 / (2 b^2)) of spot j at position i (d in pitches, the nearest spots only),

    delta_g(i) ~ Gamma(a, a)  a priori (mean 1),   delta_g(i) | v ~ Gamma(a + sum_j c_ij v_jg,  a + sum_j c_ij E_jg)

which is the exact conjugate posterior of a multiplicative effect under a kernel-weighted (local) Poisson likelihood. Bandwidth b and shape a
are chosen on inner held-out genes in the cells (`hyper.py`), so an effect that does not help there is not used.

What is not known of it is shared: cells that see the same spots would be wrong together. So a draw is one standard normal per gene and spot, which
the kernel, its rows scaled to unit length, makes into one per cell, z; the effect is the quantile of its Gamma(A, B) at Phi(z), by Wilson and
Hilferty's approximation

    delta = A / B (1 - 1 / (9 A) + z / (3 sqrt(A)))^3,     A >= a >= 1

Cell by cell it has the law above (mean and sd within .2 %); sums over a region keep the doubt that its cells have in common.
Cells of a new target have no spots around them: their effect is drawn from its prior Gamma(a, a), one for each square of one pitch.
"""

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

NEAREST = 7  # a spot and its six neighbors on a hexagonal grid
BANDWIDTHS = (0.3, 0.45, 0.6, 0.8, 1.1)  # spot pitches
SHAPES = (1.0, 3.0, 10.0, 30.0)


def kernel(positions: NDArray[np.float64], spots: NDArray[np.float64], bandwidth: float) -> sp.csr_matrix:
    """Weights c_ij of the nearest spots, CSR [n, s]."""
    k = min(NEAREST, len(spots))
    distance, index = cKDTree(spots).query(positions, k=[*range(1, k + 1)])
    weight = np.exp(-(distance**2) / (2 * bandwidth**2)).astype(np.float32)
    rows = np.repeat(np.arange(len(positions)), k)
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


def interpolation(positions: NDArray[np.float64], spots: NDArray[np.float64], bandwidth: float) -> tuple[sp.csr_matrix, NDArray[np.int64]]:
    """Kernel over the u spots that ``positions`` [n, 2] need, rows of unit length, CSR [n, u], and the numbers of these spots [u]."""
    k = min(NEAREST, len(spots))
    distance, index = map(np.asarray, cKDTree(spots).query(positions, k=[*range(1, k + 1)]))
    weight = np.exp((distance[:, :1] ** 2 - distance**2) / (2 * bandwidth**2))  # far from all spots the nearest still counts
    weight = (weight / np.linalg.norm(weight, axis=1, keepdims=True)).astype(np.float32)
    used, column = np.unique(index, return_inverse=True)
    rows = np.repeat(np.arange(len(positions)), k)
    return sp.csr_matrix((weight.ravel(), (rows, column.ravel())), shape=(len(positions), len(used))), used


def squares(positions: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number, from 0, of the square of one pitch in which each of ``positions`` [n, 2] (in pitches) lies, [n]."""
    return np.unique(np.floor(positions), axis=0, return_inverse=True)[1].ravel()


def shared_normals(weights: sp.csr_matrix, spots: NDArray[np.int64], key: Iterable[int], genes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard normals [n, g] of one draw: those of ``spots`` [u] follow from ``key``, spot and first gene alone, whatever cells are looked at."""
    stream = [*map(int, key), int(genes[0])]
    made = [np.random.Generator(np.random.SFC64([*stream, int(spot)])).standard_normal(len(genes), dtype=np.float32) for spot in spots]
    return np.asarray(weights @ np.stack(made))


def gamma_at(normal: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
    """Quantile of Gamma(shape >= 1, rate) at the probability of a standard normal value."""
    spread = 1 / (3 * shape.sqrt())
    return shape / rate * (1 - spread.square() + spread * normal).clamp_min(0).pow(3)

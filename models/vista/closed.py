r"""The data-driven start: a shared map in closed form, what only the target knows of its cells, and weights of the reference.

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
quality, density). One more coordinate holds it, the mean of the visible z-scores, standardised; every gene's score is prediction of the map +
``common`` x this coordinate, so that it says the more of a gene the less the map does. The reference is decoded without it.

WEIGHTS. Reference and target differ in composition (a neuron-enriched reference, a tissue with glia). Each reference cell is weighted by the
density ratio target / reference of its neighborhood in the space of predictions, by k nearest neighbors, a few damped rounds. Every chain
multiplies these weights by exponential ones: the Bayesian bootstrap of the reference, which carries its sampling error into the posterior (that of
the map: the process beside it, `process.py`, is neither weighted nor drawn again).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import LinearOperator, eigsh

from ppl_st.models.common import cells
from ppl_st.models.common.cells import DENSE_GENES, log_normalise
from ppl_st.models.common.counts import LOG_THETA
from ppl_st.models.common.process import unit
from ppl_st.models.vista.batches import Data

Floats = NDArray[np.float64]
DIRECTIONS = 50  # at most
CELLS = 2000  # cells of either side on which weights are found
DIRECTION_CELLS = 4096  # cells of the target from which its directions are found
CLIP = 8.0  # standard deviations
ROWS, ENTRIES = 4096, 2**23  # cells, and cells x genes, made dense together: memory must not grow with the cells
ROUNDS, DAMPING, NEAR = 4, 0.7, 30  # of the density ratio
RATIO_PENALTY = 3.0
FAR = 4.0  # standard deviations: places are clipped
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
    logs = log_normalise(counts, totals, depth)
    mean, sd = zip(*(cells.moments(sp.csr_matrix(logs[batch == b])) for b in range(int(batch.max(initial=0)) + 1)), strict=True)
    return Moments(np.stack(mean), np.stack(sd), depth)


def standardise(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments) -> Floats:
    """[n, A] z-scores, clipped."""
    x = log_normalised(counts, totals_of(counts), m.depth)
    return np.clip((x - m.mean[batch]) / m.sd[batch], -CLIP, CLIP)


def project(counts: sp.csr_matrix, batch: NDArray[np.int64], m: Moments, weights: Floats) -> Floats:
    """z-scores @ weights [A, d], in blocks of cells: [n, d]."""
    starts = range(0, counts.shape[0], ROWS)
    return np.concatenate([standardise(counts[i : i + ROWS], batch[i : i + ROWS], m) @ weights for i in starts])


class Panel:
    """The reference's panel as z-scores, dense in some cells only."""

    def __init__(self, data: Data) -> None:
        self.counts, self.batch = sp.csr_matrix(data.reference[:, data.panel]), data.reference_batch
        self.moments, self.totals = moments(self.counts, self.batch), totals_of(self.counts)
        self.block = lru_cache(maxsize=4)(self._block)  # of a small reference all

    def blocks(self, width: int) -> list[tuple[int, int]]:
        """First and last cell of the blocks in which ``width`` genes are made dense."""
        m = len(self.totals)
        step = int(np.clip(ENTRIES // width, 64, ROWS))
        return [(start, min(start + step, m)) for start in range(0, m, step)]

    def _block(self, start: int, stop: int) -> Floats:
        return self.rows(np.arange(start, stop))

    def rows(self, rows: NDArray[np.int64]) -> Floats:
        """[rows, P] z-scores, clipped."""
        return standardise(self.counts[rows], self.batch[rows], self.moments)


def density_ratio(x: Floats, panel: Panel, rng: np.random.Generator) -> Floats:
    """Weights [m] of the reference's cells that make them look like cells of the target x [n, P]; they sum to 1."""
    m, p = panel.counts.shape
    w = np.full(m, 1.0 / m)
    pool = rng.permutation(m)[:CELLS]  # neighbors are sought among these
    k = max(1, min(NEAR, len(pool) // 4))
    blocks, inside = panel.blocks(p), panel.rows(pool)
    for _ in range(ROUNDS):
        first, second = np.zeros(p), np.zeros((p, p))
        for start, stop in blocks:
            z, own = panel.block(start, stop), w[start:stop]
            first += own @ z
            second += (z * own[:, None]).T @ z
        center, sd, gram = _standard(first, second)
        smooth = np.linalg.solve(gram + RATIO_PENALTY * np.eye(p), gram)
        near = unit((inside - center) / sd @ smooth)
        used, usual, expected = _nearest(unit(x @ smooth), near, k), np.zeros(len(pool)), []
        for start, stop in blocks:
            found = _nearest(unit((panel.block(start, stop) - center) / sd @ smooth), near, k)
            usual += np.bincount(found.ravel(), weights=np.repeat(w[start:stop], k), minlength=len(pool)) / k
            expected.append(found)
        odds = (np.bincount(used.ravel(), minlength=len(pool)) / used.size + 1e-6) / (usual + 1e-6)
        ratio = np.concatenate([odds[found].mean(1) for found in expected])  # [m] smoothed over the reference neighborhood
        w = w * ratio**DAMPING
        w = 0.8 * w / w.sum() + 0.2 / m
    return w


def _standard(first: Floats, second: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean [P], sd [P] (1 where a gene does not vary) and correlation [P, P] from weighted first and second moments of z-scores."""
    covariance = second - np.outer(first, first)
    sd = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    sd = np.where(sd > 1e-7, sd, 1.0)
    return first, sd, covariance / np.outer(sd, sd)


def _nearest(x: NDArray[np.float32], pool: NDArray[np.float32], k: int) -> NDArray[np.int16]:
    """Positions in the pool of the k rows most alike to each row of x, by inner product, in blocks."""
    found = [np.argpartition(-(x[i : i + 512] @ pool.T), k - 1, axis=1)[:, :k].astype(np.int16) for i in range(0, len(x), 512)]
    return np.concatenate(found)


def weights(data: Data, mine: Moments, reweight: bool, rng: np.random.Generator) -> Floats:
    """Weights of the reference cells, summing to 1; ``mine`` standardises the target."""
    m = data.reference.shape[0]
    if not reweight:
        return np.full(m, 1.0 / m)
    some = rng.permutation(data.counts.shape[0])[:CELLS]
    x = standardise(data.measured[some], data.batch[some], mine)[:, : len(data.panel)]
    return density_ratio(x, Panel(data), rng)


class SecondMoments(NamedTuple):
    """Weighted second moments of the standardised reference, from which the map of any penalty is solved."""

    gram: Floats  # [P, P] S
    cross: Floats  # [P, genes] C
    scale: Floats  # [genes] log rate per z-score


def second_moments(data: Data, w: Floats, genes: NDArray[np.int64] | None = None) -> SecondMoments:
    """S, C and scale of ``genes`` of the reference (all when None) under weights w [m] that sum to 1, summed over blocks of cells."""
    genes = np.arange(data.reference.shape[1]) if genes is None else genes
    panel, g = Panel(data), len(genes)
    p, depth = panel.counts.shape[1], float(np.median(panel.totals))
    first, second, cross = np.zeros(p), np.zeros((p, p)), np.zeros((p, g))
    mean, square = np.zeros(g), np.zeros(g)
    for start, stop in panel.blocks(max(p, g)):
        x, own = panel.block(start, stop), w[start:stop]
        y = log_normalised(data.reference[start:stop][:, genes], panel.totals[start:stop], depth)
        left = (x * own[:, None]).T
        first += left.sum(1)
        second += left @ x
        cross += left @ y
        mean += own @ y
        square += own @ np.square(y, out=y)
    first, size, gram = _standard(first, second)
    variance = square - mean**2
    sd = np.sqrt(np.where(variance > 1e-12 * square, variance, 1.0))
    # From z-scores of log1p to the logarithm of the rate: d log u / d log1p(u) = (1 + u) / u at the mean.
    u = np.expm1(mean)
    scale = np.minimum(sd * (1 + u) / np.maximum(u, 0.05), 3.0)
    return SecondMoments(gram, (cross - np.outer(first, mean)) / np.outer(size, sd), scale)


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


def directions_above_noise(data: Data, mine: Moments, rng: np.random.Generator) -> Floats:
    """Loadings L [A, DIRECTIONS] of the target's genes on its leading directions, strongest first, noise of unit variance; see the file's
    docstring. Columns beyond the directions that rise above the noise are 0. (`ppl_st.models.common.cells.find_directions` has all directions asked
    for, of unit variance, from all cells.)"""
    some = np.sort(rng.permutation(data.counts.shape[0])[:DIRECTION_CELLS])
    x = standardise(data.measured[some], data.batch[some], mine)
    n, genes = x.shape
    correlation, q = x.T @ x / n, min(DIRECTIONS, genes - 1)

    def product(v: Floats) -> Floats:
        return np.asarray(correlation @ v)

    if genes <= DENSE_GENES:
        values, vectors = scipy.linalg.eigh(correlation, subset_by_index=[genes - q, genes - 1])
    else:
        start: Floats = np.random.default_rng(0).standard_normal((genes,))
        values, vectors = eigsh(LinearOperator((genes, genes), matvec=product, dtype=np.float64), k=q, v0=start)
    values, vectors = values[::-1], vectors[:, ::-1]
    loud = int((values > (1 + np.sqrt(genes / n)) ** 2).sum())
    noise = max(float(np.trace(correlation) - values[:loud].sum()) / (genes - loud), 1e-3)
    loadings = np.zeros((genes, DIRECTIONS))
    loadings[:, :loud] = vectors[:, :loud] * np.sqrt(np.maximum(values[:loud] / noise - 1, 0.0))
    return loadings


def read_directions(loadings: Floats) -> Floats:
    """[A, q]: z-scores times this are the posterior mean of u."""
    return np.asarray(np.linalg.solve(np.eye(loadings.shape[1]) + loadings.T @ loadings, loadings.T).T)


def target_encoder(found: Map, loadings: Floats, denoise: float) -> Floats:
    """E of the target [A, d]: ``denoise`` of it reads the panel off the directions."""
    p = len(found.encoder)
    encoder = denoise * read_directions(loadings) @ (loadings[:p].T @ found.encoder)
    encoder[:p] += (1 - denoise) * found.encoder
    return encoder


def standard_places(u: Floats) -> Floats:
    """t [n, q] of unit sd; 0 along directions without loadings."""
    return np.clip((u - u.mean(0)) / np.maximum(u.std(0), 1e-6), -FAR, FAR)


def mean_of_neighbors(graph: sp.csr_matrix, rows: NDArray[np.int64]) -> sp.csr_matrix:
    """``rows`` of the row-normalised graph; a cell without neighbors is its own."""
    near = graph[rows]
    degree = np.diff(near.indptr)
    alone = np.flatnonzero(degree == 0)
    own = sp.csr_matrix((np.ones(len(alone)), (alone, rows[alone])), shape=near.shape)
    return sp.csr_matrix(sp.diags(1.0 / np.maximum(degree, 1)) @ near + own)


def mixed_rows(graph: sp.csr_matrix, mix: float, rows: NDArray[np.int64], read: Callable[[NDArray[np.int64]], NDArray[Any]]) -> Floats:
    """What ``read`` says of any cells [.., k] for the cells ``rows``, with this share of their neighbors' mean: [rows, k]."""
    if not mix:
        return np.asarray(read(rows), dtype=np.float64)
    mixer = mean_of_neighbors(graph, rows)
    needed = np.union1d(rows, mixer.indices)
    x = read(needed)
    return np.asarray((1 - mix) * x[np.searchsorted(needed, rows)] + mix * (mixer[:, needed] @ x), dtype=np.float64)


def moments_over_cells(graph: sp.csr_matrix, mix: float, read: Callable[[NDArray[np.int64]], NDArray[Any]]) -> tuple[Floats, Floats]:
    """Mean [k] and covariance [k, k] (of n) of `mixed_rows` over all cells, summed over blocks of cells that are neighbors as far as can be."""
    n = graph.shape[0]
    order = reverse_cuthill_mckee(graph).astype(np.int64) if mix else np.arange(n)
    first, second = np.zeros(1), np.zeros(1)
    for start in range(0, n, ROWS):
        x = mixed_rows(graph, mix, np.sort(order[start : start + ROWS]), read)
        first, second = first + x.sum(0), second + x.T @ x
    return first / n, second / n - np.outer(first, first) / n**2


def theta_of_zeros(data: Data) -> Floats:
    """Covariate of a gene: its log theta as far as its zeros in the reference tell it, given its mean, [G].

    Posterior mean on the grid `LOG_THETA` when the gene has one share of every cell's total: genes too faint to tell have the grid's mean. What the
    states of the cells make of a gene is in it.
    """
    m, total = data.reference.shape[0], totals_of(data.reference)
    seen = np.bincount(data.reference.indices[data.reference.data > 0], minlength=data.reference.shape[1])
    depth = np.quantile(total, (np.arange(50) + 0.5) / 50)
    theta, mean = np.exp(LOG_THETA)[:, None, None], np.exp(log_share(data))[:, None] * depth  # [G, 50]
    zero = np.clip(np.exp(-theta * np.log1p(mean / theta)).mean(-1), 1e-9, 1 - 1e-9)  # [grid, G]
    score = (m - seen) * np.log(zero) + seen * np.log1p(-zero)
    weight = np.exp(score - score.max(0))
    return np.asarray(LOG_THETA @ weight / weight.sum(0))


def log_share(data: Data) -> Floats:
    """Covariate of a gene: log of its share of the reference's counts, [G]."""
    total = np.asarray(data.reference.sum(0), dtype=np.float64).ravel() + 0.5
    return np.log(total / total.sum())



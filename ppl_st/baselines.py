"""Cheap estimates of held-out genes, run on the same split as every method.

`REFERENCE_BASELINES` learn from a dissociated reference (scRNA-seq), `SPOT_BASELINES` from a second spatial
platform in the same frame (spots); `supervised_ridge` is the upper reference that sees the truth on other
cells. Every function takes a `Split` and returns a float32 array [cells, held-out genes] on the scale its
table entry names (`ppl_st.metrics.Scale`):

- ``log``    an estimate of log1p(count / training total x median training total of the target's cells)
- ``count``  expected raw counts
- ``as_is``  a bare score

"Training genes" are the genes measured in both target and reference. Both sides are normalised by their own
total over these genes to their own median total: nothing about held-out genes of the target enters, and every
tuning choice (ridge penalty, clusters) is made inside the reference. Sparse matrices stay sparse; dense
blocks are cells x held-out genes, genes x genes, or a bounded number of rows.

Not here: splits into folds, scoring (`ppl_st.metrics.score_table`), uncertainty: these are point estimates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ppl_st.data import Counts, labels_of
from ppl_st.errors import UserError
from ppl_st.metrics import Scale, log1p_normalise, median_total
from ppl_st.ridge import fit_ridge, moments
from ppl_st.spatial import neighbors

_BLOCK_ENTRIES = 4_000_000
_LARGEST_LOG = 700.0  # exp of more than 709 is infinite


@dataclass(frozen=True)
class Split:
    """What a baseline may see.

    Parameters
    ----------
    target
        Cells x measured genes, WITHOUT the held-out ones. ``xy`` is needed by the smoothed baselines and the
        spot ones.
    reference
        Cells or spots x genes, with the training and the held-out genes (``xy`` needed for spots).
    held_out
        Names of the genes to estimate, in the order of the answer's columns.
    seed
        Seeds clustering and cross-fitting folds.
    library_key
        Column of ``target.obs`` with the section of each cell: nothing is smoothed across sections.
    """

    target: Counts
    reference: Counts
    held_out: np.ndarray
    seed: int = 0
    library_key: str | None = None

    @classmethod
    def placed(cls, problem: tuple[Any, Counts, Counts], held_out: np.ndarray, seed: int, library_key: str | None) -> Split:
        """Of cells and spots where SIID's ``problem`` (its data, cells, spots) has them: in one frame, sections far apart, in units of the pitch."""
        data, target, reference = problem
        return cls(replace(target, xy=data.cell_xy), replace(reference, xy=data.spot_xy), held_out, seed, library_key)

    def __post_init__(self) -> None:
        held_out = np.asarray(self.held_out, dtype=str)
        leaked = np.intersect1d(held_out, self.target.genes)
        if leaked.size:
            raise UserError(
                f"split: {leaked.size} held-out genes are in the target ({', '.join(leaked[:3])}); "
                "remove them before fitting"
            )
        absent = np.setdiff1d(held_out, self.reference.genes)
        if absent.size or not held_out.size:
            raise UserError(
                f"split: {absent.size} of {held_out.size} held-out genes are absent from the reference "
                f"({', '.join(absent[:3])}); hold out genes that the reference measured"
            )
        if not np.isin(self.target.genes, self.reference.genes).any():
            raise UserError("split: target and reference share no training gene")
        if self.library_key is not None and self.library_key not in self.target.obs:
            raise UserError(f"split: target {self.target.source} has no obs column {self.library_key!r} (library_key)")

    @cached_property
    def training(self) -> np.ndarray:
        """Names of the training genes (in target and reference), target order."""
        genes = np.asarray(self.target.genes)
        return genes[np.isin(genes, self.reference.genes)]

    @cached_property
    def target_counts(self) -> sp.csr_matrix:
        """Target counts of the training genes, [cells, T]."""
        return sp.csr_matrix(self.target.take_genes(self.training).matrix)

    @cached_property
    def reference_counts(self) -> sp.csr_matrix:
        """Reference counts of the training genes, [reference rows with any of them, T]."""
        return sp.csr_matrix(self.reference.take_genes(self.training).matrix)[self.usable]

    @cached_property
    def reference_held_out(self) -> sp.csr_matrix:
        """Reference counts of the held-out genes, the same rows."""
        return sp.csr_matrix(self.reference.take_genes(np.asarray(self.held_out)).matrix)[self.usable]

    @cached_property
    def usable(self) -> np.ndarray:
        """Positions of the reference rows with at least one count in the training genes."""
        rows = np.flatnonzero(_row_sums(self.reference.take_genes(self.training).matrix) > 0)
        if not rows.size:
            raise UserError("split: the reference has no count in any training gene")
        return rows

    @cached_property
    def training_total(self) -> np.ndarray:
        """Total of each target cell over the training genes, [cells] float64: the depth of every metric."""
        return _row_sums(self.target_counts)

    @cached_property
    def reference_total(self) -> np.ndarray:
        """Total of each usable reference row over the training genes."""
        return _row_sums(self.reference_counts)

    @cached_property
    def log_target(self) -> sp.csr_matrix:
        """Log-normalised training genes of the target."""
        return log1p_normalise(self.target_counts, self.training_total)

    @cached_property
    def log_reference(self) -> sp.csr_matrix:
        """Log-normalised training genes of the reference, at its own median total."""
        return log1p_normalise(self.reference_counts, self.reference_total)

    @cached_property
    def log_reference_held_out(self) -> sp.csr_matrix:
        """Log-normalised held-out genes of the reference (by the totals over the training genes, at its own median total)."""
        return log1p_normalise(self.reference_held_out, self.reference_total)


class Baseline(NamedTuple):
    """A baseline and the scale of its answer."""

    estimate: Callable[[Split], np.ndarray]
    scale: Scale


# --- small numerics
def _row_sums(matrix: Any) -> np.ndarray:
    return np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()


def _scale_rows(matrix: Any, factor: np.ndarray) -> sp.csr_matrix:
    return sp.csr_matrix(sp.csr_matrix(matrix).multiply(factor[:, None]))


def _nearest_by_cosine(
    x: sp.csr_matrix, pool: sp.csr_matrix, values: sp.csr_matrix, k: int, *, z: bool = False
) -> np.ndarray:
    """Mean ``values`` [pool, H] of the k pool rows with the largest cosine to each row of x, [rows, H].

    With z each side is first centered and scaled by its own moments. The centering enters as rank-one terms,
    so only blocks of similarities are dense.
    """
    k = min(k, pool.shape[0])
    (mx, sx), (mp, sq) = moments(x), moments(pool)
    if not z:
        mx, sx, mp, sq = np.zeros_like(mx), np.ones_like(sx), np.zeros_like(mp), np.ones_like(sq)
    a, b = mx / sx, mp / sq
    x_scaled = sp.csr_matrix(x.astype(np.float64).multiply(1.0 / sx))
    pool_scaled = sp.csr_matrix(pool.astype(np.float64).multiply(1.0 / sq))
    pool_norm = np.sqrt(
        np.maximum(_row_sums(pool_scaled.multiply(pool_scaled)) - 2 * (pool_scaled @ b) + b @ b, 1e-24)
    )
    out = np.empty((x.shape[0], values.shape[1]), dtype=np.float32)
    size = max(1, _BLOCK_ENTRIES // pool.shape[0])
    for start in range(0, x.shape[0], size):
        rows = x_scaled[start : start + size].toarray() - a
        # The norm of the row itself does not change its ranking.
        similarity = ((pool_scaled @ rows.T) - (b @ rows.T)) / pool_norm[:, None]
        # Row-contiguous float32 makes the selection more than twice as fast.
        farness = np.ascontiguousarray(-similarity.T, dtype=np.float32)
        chosen = np.argpartition(farness, k - 1, axis=1)[:, :k]
        weights = sp.csr_matrix(
            (np.full(chosen.size, 1.0 / k), chosen.ravel(), np.arange(0, chosen.size + 1, k)),
            shape=(len(rows), pool.shape[0]),
        )
        out[start : start + size] = (weights @ values).toarray()
    return out


def _coordinates(counts: Counts, role: str) -> np.ndarray:
    if counts.xy is None:
        raise UserError(f"{role} {counts.source}: this baseline needs coordinates (obsm['spatial'])")
    return counts.xy


def _neighbor_mean(split: Split, k: int) -> sp.csr_matrix:
    """Row-normalised neighbor matrix of the target cells within each section, [cells, cells].

    A cell is no neighbor of its own, unless it is alone in its section: then it is its only one, so that smoothing leaves it as it is.
    """
    library = None if split.library_key is None else labels_of(split.target, split.library_key, "target", "library_key")
    graph = sp.csr_matrix(neighbors(_coordinates(split.target, "target"), k, library), dtype=np.float64)
    alone = (_row_sums(graph) == 0).astype(np.float64)
    graph = sp.csr_matrix(graph + sp.diags(alone))
    return _scale_rows(graph, 1.0 / _row_sums(graph))


def _at_target_depth(split: Split, estimate: np.ndarray) -> np.ndarray:
    """Estimates [cells, H] of log1p(count / total x median total of the reference), of the target's median total instead; float32.

    Negative ones count as 0.
    """
    ratio = median_total(split.training_total) / median_total(split.reference_total)
    counts = np.expm1(np.clip(estimate.astype(np.float64), 0.0, _LARGEST_LOG))
    return np.log1p(counts * ratio).astype(np.float32)


def _half_smoothed(split: Split, estimate: np.ndarray) -> np.ndarray:
    """Half the cell's own value, half the mean of its 10 spatial neighbors."""
    return (0.5 * estimate + 0.5 * (_neighbor_mean(split, 10) @ estimate)).astype(np.float32)


# --- scRNA reference -> target
def gene_mean(split: Split) -> np.ndarray:
    """The reference mean of each held-out gene: a constant on the log scale, depth only on raw counts."""
    mean = np.asarray(split.log_reference_held_out.mean(axis=0), dtype=np.float32).ravel()
    mean = _at_target_depth(split, mean)
    return np.tile(mean, (split.target_counts.shape[0], 1))


def cell_total(split: Split) -> np.ndarray:
    """The cell's total over the training genes as the score of every gene: the depth control."""
    return np.repeat(split.training_total.astype(np.float32)[:, None], len(split.held_out), axis=1)


def clusters(split: Split) -> np.ndarray:
    """Cluster of each reference row, [rows] int.

    k-means (20, fewer when the reference has under 200 rows; best of 10 starts) on the unit-length first 30
    components (uncentered SVD) of the whole log-normalised reference, all its genes.
    """
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    log_all = log1p_normalise(split.reference.matrix, _row_sums(split.reference.matrix))
    n, genes = log_all.shape
    components = min(30, n - 1, genes - 1)
    if components >= 2:
        points = TruncatedSVD(components, random_state=split.seed).fit_transform(log_all)
    else:
        points = log_all.toarray()
    k = min(20, max(1, n // 10))
    labels: np.ndarray = KMeans(k, random_state=split.seed, n_init=10).fit(normalize(points)).labels_
    return labels


def nearest_centroid(split: Split) -> np.ndarray:
    """Mean of the reference cluster (`clusters`) whose centroid is nearest to the cell (cosine over the training genes)."""
    used, labels = np.unique(clusters(split)[split.usable], return_inverse=True)
    member = sp.csr_matrix(
        (np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(len(used), len(labels))
    )
    member = _scale_rows(member, 1.0 / _row_sums(member))
    centroids, values = member @ split.log_reference, member @ split.log_reference_held_out
    return _at_target_depth(split, _nearest_by_cosine(split.log_target, centroids, values, 1))


def knn(split: Split) -> np.ndarray:
    """Mean of the 50 reference cells with the largest cosine over the log-normalised training genes."""
    return _at_target_depth(split, _nearest_by_cosine(split.log_target, split.log_reference, split.log_reference_held_out, 50))


def knn_z(split: Split) -> np.ndarray:
    """`knn` with each training gene z-scored within its own data set."""
    near = _nearest_by_cosine(split.log_target, split.log_reference, split.log_reference_held_out, 50, z=True)
    return _at_target_depth(split, near)


def ridge(split: Split) -> np.ndarray:
    """Ridge from log-normalised training genes to held-out genes, learned on the reference.

    Cells enter at their own median total, which keeps correlations; where that is far from the reference's, levels are off (not those of `ridge_z`).
    """
    fitted = fit_ridge(split.log_reference, split.log_reference_held_out)
    return _at_target_depth(split, fitted.predict(split.log_target))


def ridge_z(split: Split) -> np.ndarray:
    """`ridge` on target genes z-scored by their own moments: removes gene-wise platform effects."""
    fitted = fit_ridge(split.log_reference, split.log_reference_held_out)
    return _at_target_depth(split, fitted.predict(split.log_target, moments(split.log_target)))


def ridge_z_smooth(split: Split) -> np.ndarray:
    """Half `ridge_z` of the cell, half its mean over the 10 nearest cells in space."""
    return _half_smoothed(split, ridge_z(split))


def ensemble(split: Split) -> np.ndarray:
    """Mean of z-scored `ridge_z` and `knn`, rescaled to their average mean and sd, then smoothed, all at the target's depth."""
    parts = [ridge_z(split).astype(np.float64), knn(split).astype(np.float64)]
    means = [p.mean(0) for p in parts]
    sds = [p.std(0) for p in parts]
    z = sum((p - m) / np.where(s > 1e-6, s, 1.0) for p, m, s in zip(parts, means, sds, strict=True)) / 2
    return _half_smoothed(split, z * (sds[0] + sds[1]) / 2 + (means[0] + means[1]) / 2)


# --- spots -> cells
def _nearest_spot(split: Split) -> np.ndarray:
    """Row (among the usable spots) of the spot nearest to each cell, however far; [cells]."""
    from scipy.spatial import cKDTree

    spots = _coordinates(split.reference, "reference")[split.usable]
    return np.asarray(cKDTree(spots).query(_coordinates(split.target, "target"))[1])


def _proportions(split: Split) -> sp.csr_matrix:
    """Held-out counts of each spot per count of its training genes, [spots, H]."""
    return _scale_rows(split.reference_held_out, 1.0 / split.reference_total)


def _times_total(split: Split, proportions: np.ndarray) -> np.ndarray:
    return (np.maximum(proportions, 0.0) * split.training_total[:, None]).astype(np.float32)


def _mean_of_10(split: Split, estimate: np.ndarray) -> np.ndarray:
    """Mean over the cell and its 9 nearest cells."""
    return (0.1 * estimate + 0.9 * (_neighbor_mean(split, 9) @ estimate)).astype(np.float32)


def spot_gene_mean(split: Split) -> np.ndarray:
    """Mean count of each held-out gene over the spots, the same for every cell (a constant)."""
    mean = np.asarray(split.reference_held_out.mean(axis=0), dtype=np.float32).ravel()
    return np.tile(mean, (split.target_counts.shape[0], 1))


def spot_cell_total(split: Split) -> np.ndarray:
    """Share of each held-out gene over all spots x the cell's training total: the depth control."""
    share = np.asarray(split.reference_held_out.sum(axis=0)).ravel() / split.reference_total.sum()
    return _times_total(split, np.tile(share, (split.target_counts.shape[0], 1)))


def spot_copy(split: Split) -> np.ndarray:
    """SIID's baseline A: the count of the nearest spot."""
    return split.reference_held_out[_nearest_spot(split)].toarray().astype(np.float32)


def spot_copy_total(split: Split) -> np.ndarray:
    """SIID's baseline B: A x cell total / spot total (both over the training genes)."""
    return _times_total(split, _proportions(split)[_nearest_spot(split)].toarray())


def spot_copy_smooth(split: Split) -> np.ndarray:
    """SIID's baseline C: A averaged over the cell and its 9 nearest cells."""
    return _mean_of_10(split, spot_copy(split))


def spot_copy_total_smooth(split: Split) -> np.ndarray:
    """SIID's baseline D: B averaged over the cell and its 9 nearest cells."""
    return _mean_of_10(split, spot_copy_total(split))


def ridge_spots(split: Split) -> np.ndarray:
    """Ridge from training-gene to held-out shares learned on the spots, clipped at 0, x cell total."""
    spots = _scale_rows(split.reference_counts, 1.0 / split.reference_total)
    cells = _scale_rows(split.target_counts, 1.0 / np.maximum(split.training_total, 1.0))
    return _times_total(split, fit_ridge(spots, _proportions(split)).predict(cells))


def knn_spots(split: Split) -> np.ndarray:
    """Mean held-out shares of the 10 spots most alike over log training genes (cosine), x the cell's total.

    Spots are brought to the median depth of the cells, so that log1p bends both alike.
    """
    depth = np.median(split.training_total[split.training_total > 0]) / split.reference_total
    spots = _scale_rows(split.reference_counts, depth)
    spots.data = np.log1p(spots.data)
    return _times_total(split, _nearest_by_cosine(split.log_target, spots, _proportions(split), 10))


# --- upper reference
def supervised_ridge(split: Split, truth: Any, folds: int = 5) -> np.ndarray:
    """UPPER REFERENCE, not a competitor: it sees the true held-out counts of other cells of the target.

    Ridge from the target's own training genes and their means over 10 spatial neighbors to the log-normalised
    truth, cross-fitted: each cell is predicted from the other ``folds - 1`` random parts. ``truth`` [cells,
    held-out genes] holds raw counts, sparse or dense. Returns log-scale estimates, float32 [cells, held-out
    genes].
    """
    y = sp.csr_matrix(log1p_normalise(sp.csr_matrix(truth), split.training_total))
    cells = split.target_counts.shape[0]
    if y.shape != (cells, len(split.held_out)) or not 2 <= folds <= cells:
        raise UserError(
            f"supervised_ridge: truth has shape {y.shape}, folds={folds}; "
            f"expected {(cells, len(split.held_out))} and 2 to {cells} folds"
        )
    x = sp.csr_matrix(sp.hstack([split.log_target, _neighbor_mean(split, 10) @ split.log_target]))
    part = np.random.default_rng(split.seed).permutation(cells) % folds
    out = np.empty(y.shape, dtype=np.float32)
    for fold in range(folds):
        inside = part == fold
        out[inside] = fit_ridge(x[~inside], y[~inside]).predict(x[inside])
    return out


REFERENCE_BASELINES: dict[str, Baseline] = {
    "gene_mean": Baseline(gene_mean, "log"),
    "cell_total": Baseline(cell_total, "as_is"),
    "nearest_centroid": Baseline(nearest_centroid, "log"),
    "knn": Baseline(knn, "log"),
    "knn_z": Baseline(knn_z, "log"),
    "ridge": Baseline(ridge, "log"),
    "ridge_z": Baseline(ridge_z, "log"),
    "ridge_z_smooth": Baseline(ridge_z_smooth, "log"),
    "ensemble": Baseline(ensemble, "log"),
}

SPOT_BASELINES: dict[str, Baseline] = {
    "gene_mean": Baseline(spot_gene_mean, "as_is"),
    "cell_total": Baseline(spot_cell_total, "count"),
    "spot_copy": Baseline(spot_copy, "count"),
    "spot_copy_total": Baseline(spot_copy_total, "count"),
    "spot_copy_smooth": Baseline(spot_copy_smooth, "count"),
    "spot_copy_total_smooth": Baseline(spot_copy_total_smooth, "count"),
    "ridge_spots": Baseline(ridge_spots, "count"),
    "knn_spots": Baseline(knn_spots, "count"),
}

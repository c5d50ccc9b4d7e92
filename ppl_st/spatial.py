"""Geometry: cell -> spot maps, the radius of a spot judged by the counts, neighbor graphs, plane transforms.

Coordinates are [n, 2] float64 in one unit (whatever the files use); maps and graphs are scipy CSR float32 and
never dense.

Cell -> spot: W [cells, spots]. Nearest: W_ij = 1 for the nearest spot within the radius. Soft:
W_ij = exp(-d_ij^2 / (2 sigma^2)) over at most k spots within the radius, rows divided by their sum. A cell
out of reach of every spot has an empty row.

Radius from counts: both platforms measured the shared genes, so at the right radius r the sums S_r = W_r' X
of cell counts explain the spot counts V best. Both are projected on the leading directions of V (genes scaled
by 1 / sqrt(total): 5 numbers per cell or spot), and the score is the Gaussian log-likelihood of the linear
regression of V on S_r with free residual covariance, spots weighted by 1 / (total + mean total). The
regression absorbs gene factors and depth; the directions are strong sums over genes, so sparse counts do not
favor wide, smooth radii as a gene-wise Poisson score does. A shift of the spots is judged by the same score,
because a shift that is ignored looks like a wider radius.

Not done here: image or segmentation geometry, registration beyond a small shift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.sparse.linalg import svds
from scipy.spatial import cKDTree

from ppl_st.data import Counts, labels_of
from ppl_st.errors import UserError

Floats = NDArray[np.float64]

# Radius candidates as shares of the pitch. From 1/sqrt(2) on (square grid; 1/sqrt(3) on a hexagonal one)
# every cell belongs to its nearest spot.
FRACTIONS = np.append(np.geomspace(0.2, 0.7072, 12), 0.75)
DEFAULT_FRACTION = 0.275  # Visium: discs of 55 um on a pitch of 100 um
_DIRECTIONS = 5
_MAX_SPOTS = 3000  # enough to judge one number
_MAX_SHIFT = 0.3  # of the pitch; beyond half of it the spots are their own neighbors


def spot_pitch(xy: ArrayLike) -> float:
    """Distance between neighboring spots: median distance to the nearest other spot, on any grid."""
    points = _points(xy, "spots")
    if len(points) < 2:
        raise UserError(
            f"spots: {len(points)} spot has no neighbor to measure the pitch from; give the radius, --set "
            "radius=..."
        )
    distance, _ = _query(cKDTree(points), points, 2)
    pitch = float(np.median(distance[:, 1]))
    if pitch == 0:
        raise UserError(
            "spots: most positions in obsm['spatial'] are repeated; drop the repeated spots, or keep one "
            "section per file"
        )
    return pitch


def cell_to_spot(
    cells_xy: ArrayLike, spots_xy: ArrayLike, *, radius: float, k: int = 1, sigma: float | None = None
) -> sparse.csr_matrix:
    """Sparse weights of cells in spots.

    Parameters
    ----------
    cells_xy, spots_xy : [n_cells, 2] and [n_spots, 2] in one frame and unit.
    radius : reach of a spot, in that unit; inclusive.
    k : how many spots a cell may belong to. 1 (and no sigma): the nearest spot with weight 1.
    sigma : width of the Gaussian kernel, in the same unit; by default `radius` / 2. With k=1 a single spot
        keeps weight 1.

    Returns
    -------
    CSR float32 [n_cells, n_spots], rows sum to 1 or are empty.

    Raises
    ------
    UserError
        When no cell lies in any spot (frames or units differ), or for a radius, k or sigma that is not
        positive.
    """
    cells, spots = _points(cells_xy, "cells"), _points(spots_xy, "spots")
    for name, value in (("radius", radius), ("k", k), ("sigma", 1.0 if sigma is None else sigma)):
        if not (value > 0 and np.isfinite(value)):
            raise UserError(f"cell-to-spot map: {name}={value} must be a positive number")
    k = min(int(k), len(spots))
    reach = np.nextafter(radius, np.inf)  # the tree's bound is exclusive
    distance, index = _query(cKDTree(spots), cells, k, reach)
    inside = np.isfinite(distance)
    if not inside.any():
        raise UserError(_no_overlap(cells, spots, radius))
    # Distances are taken relative to the nearest spot's, so that the kernel cannot underflow in a whole row.
    width = radius / 2 if sigma is None else sigma
    squared = np.where(inside, distance, 0.0) ** 2
    relative = np.where(inside, squared - squared[:, :1], np.inf)
    weight = np.exp(-relative / (2 * width**2))
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1.0)  # the nearest spot weighs 1 before this
    rows, _ = np.nonzero(inside)
    entries = (weight[inside].astype(np.float32), (rows, index[inside]))
    matrix = sparse.csr_matrix(entries, shape=(len(cells), len(spots)))
    matrix.eliminate_zeros()
    return matrix


def _no_overlap(cells: Floats, spots: Floats, radius: float) -> str:
    swapped = np.isfinite(_query(cKDTree(spots[:, ::-1]), cells, 1, radius)[0]).mean()
    message = (
        f"no cell lies within {radius:.6g} of any spot: cells span {_ranges(cells)}, "
        f"spots span {_ranges(spots)}; both must be in one coordinate frame and unit"
    )
    if swapped > 0.01:
        message += f"; with the spots' x and y exchanged {swapped:.0%} of them would: are the axes swapped?"
    else:
        extent = np.ptp(cells, axis=0).max() / max(np.ptp(spots, axis=0).max(), 1e-300)
        if not 0.5 < extent < 2:
            message += (
                f"; the cells' extent is {extent:.3g} times the spots': do the units differ (pixels and um)?"
            )
    return message + "; give --set transform= (3x3 matrix, cells' frame from spots' frame) or --set radius="


def _ranges(xy: Floats) -> str:
    low, high = xy.min(axis=0), xy.max(axis=0)
    return f"x {low[0]:.6g} to {high[0]:.6g}, y {low[1]:.6g} to {high[1]:.6g}"


def apply_transform(xy: ArrayLike, matrix: ArrayLike) -> Floats:
    """Points [n, 2] moved by a homogeneous 3x3 matrix: (x, y, w) = matrix @ (x, y, 1), divided by w."""
    points = _points(xy, "points")
    try:
        homogeneous = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"transform: {matrix!r} is not a 3x3 matrix of numbers") from error
    if homogeneous.shape != (3, 3) or not np.isfinite(homogeneous).all():
        raise UserError(
            f"transform: need a 3x3 matrix of finite numbers, got shape {homogeneous.shape}: "
            f"{homogeneous.tolist()}"
        )
    if abs(np.linalg.det(homogeneous)) < 1e-12 * max(np.abs(homogeneous).max(), 1e-300) ** 3:
        raise UserError(
            f"transform: the matrix is singular and would collapse the plane: {homogeneous.tolist()}"
        )
    moved = points @ homogeneous[:, :2].T + homogeneous[:, 2]
    if (np.abs(moved[:, 2]) < 1e-12).any():
        raise UserError("transform: some points are sent to infinity; the last row should be 0, 0, 1")
    return moved[:, :2] / moved[:, 2:]


@dataclass(frozen=True)
class RadiusInfo:
    """How `infer_radius` came to its answer.

    Attributes
    ----------
    radius : the answer, in the unit of the coordinates.
    pitch : distance of neighboring spots.
    informative : whether the counts could tell; if not, `radius` is 0.275 x pitch.
    reason : one sentence for the log or the report.
    low, high : smallest and largest candidate that the counts do not clearly refuse (paired z over spots
        below 2).
    shift : (dx, dy) to ADD to the spots' positions so that they fit the cells; (0, 0) unless the counts
        clearly ask for it.
    radius_unshifted : the best radius when that shift is not applied.
    fractions, scores : candidates as shares of the pitch, and their log-likelihood (at `shift`) minus that of
        the best; empty if not informative.
    """

    radius: float
    pitch: float
    informative: bool
    reason: str
    low: float
    high: float
    shift: tuple[float, float]
    radius_unshifted: float
    fractions: tuple[float, ...]
    scores: tuple[float, ...]


def infer_radius(
    cells_xy: ArrayLike, spots_xy: ArrayLike, cell_counts: sparse.csr_matrix, spot_counts: sparse.csr_matrix
) -> tuple[float, RadiusInfo]:
    """Radius of the spots, 0.2 to 0.75 of the pitch, at which sums of cells explain the spots' counts best.

    Parameters
    ----------
    cells_xy, spots_xy : [n_cells, 2] and [n_spots, 2] in one frame and unit.
    cell_counts, spot_counts : CSR [n_cells, G] and [n_spots, G] over the SAME shared genes in one order.

    Returns
    -------
    radius, info : 0.75 x pitch means that every cell belongs to its nearest spot. Where the counts cannot
        tell, 0.275 x pitch and `info.informative` is False.
    """
    assert cell_counts.shape[1] == spot_counts.shape[1], "both sides must hold the same genes"
    cells, spots = _points(cells_xy, "cells"), _points(spots_xy, "spots")
    assert len(cells) == cell_counts.shape[0] and len(spots) == spot_counts.shape[0]
    pitch = spot_pitch(spots)
    trial = _RadiusTrial.prepare(cells, spots, cell_counts, spot_counts, pitch)
    if trial is None:
        return _fallback(pitch, "too few spots with counts, or too few cells near them, to judge the radius")
    radii = FRACTIONS * pitch
    plain = trial.scores(radii, np.zeros(2))
    plain_radius = _refined(radii, plain.sum(axis=1))
    shift = trial.best_shift(plain_radius)
    scores = trial.scores(radii, shift) if shift.any() else plain
    total = scores.sum(axis=1)
    best = int(np.argmax(total))
    radius = _refined(radii, total) if shift.any() else plain_radius
    if radius < FRACTIONS[-2] * pitch:
        fine = radius * np.geomspace(0.92, 1.08, 9)
        radius = float(fine[np.argmax(trial.scores(fine, shift).sum(axis=1))])
    kept = np.flatnonzero([not _clearly_better(scores[best], score) for score in scores])
    low, high = float(radii[kept[0]]), float(radii[kept[-1]])
    if high >= 2 * low:
        return _fallback(
            pitch, f"the counts fit every radius from {low:.4g} to {high:.4g} about equally well"
        )
    moved = f"; the spots fit best when moved by ({shift[0]:.4g}, {shift[1]:.4g})" if shift.any() else ""
    share = f"{radius / pitch:.3f} of the pitch {pitch:.4g}"
    reason = f"radius {radius:.4g} ({share}) explains the spots' counts best{moved}"
    low, high = min(low, radius), max(high, radius)
    return radius, RadiusInfo(
        radius=radius,
        pitch=pitch,
        informative=True,
        reason=reason,
        low=low,
        high=high,
        shift=(float(shift[0]), float(shift[1])),
        radius_unshifted=plain_radius if shift.any() else radius,
        fractions=tuple(FRACTIONS.tolist()),
        scores=tuple((total - total.max()).tolist()),
    )


def _fallback(pitch: float, why: str) -> tuple[float, RadiusInfo]:
    radius = DEFAULT_FRACTION * pitch
    choice = f"radius set to {DEFAULT_FRACTION} of the pitch, {radius:.4g}"
    reason = f"{why}: {choice}; give --set radius= if you know it"
    low, high = float(FRACTIONS[0] * pitch), float(FRACTIONS[-1] * pitch)
    return radius, RadiusInfo(radius, pitch, False, reason, low, high, (0.0, 0.0), radius, (), ())


def _refined(radii: Floats, total: Floats) -> float:
    """Top of the parabola in log radius through the best candidate and its neighbors (geometric part)."""
    best = int(np.argmax(total))
    if best == 0 or best >= len(radii) - 2:
        return float(radii[best])
    left, top, right = total[best - 1 : best + 2]
    bend = left - 2 * top + right
    step = np.log(radii[1] / radii[0])
    return float(radii[best] * np.exp(0.5 * step * (left - right) / bend)) if bend < 0 else float(radii[best])


def _clearly_better(one: Floats, other: Floats) -> bool:
    """Whether log-likelihoods [spots] beat others by 2 in sum and by 2 standard errors over spots."""
    gain = one - other
    return bool(gain.sum() > max(2.0, 2 * gain.std() * np.sqrt(len(gain))))


@dataclass(frozen=True)
class _RadiusTrial:
    """Projected data for scoring many radii and shifts. n spots judged, m cells near them, d directions."""

    cells: Floats  # [m, 2]
    cell_values: Floats  # [m, d]
    tree: cKDTree  # over all spots
    row_of: NDArray[np.int64]  # [all spots] row among the spots judged, or -1
    target: Floats  # [n, d] spots' values, weighted
    weight: Floats  # [n] square root of the weight, mean square 1
    pitch: float

    @classmethod
    def prepare(
        cls,
        cells: Floats,
        spots: Floats,
        cell_counts: sparse.csr_matrix,
        spot_counts: sparse.csr_matrix,
        pitch: float,
    ) -> "_RadiusTrial | None":
        """None when there is too little to judge."""
        totals = np.asarray(spot_counts.sum(axis=1, dtype=np.float64)).ravel()
        judged = np.flatnonzero(totals > 0)
        if len(judged) > _MAX_SPOTS:
            judged = np.sort(np.random.default_rng(0).choice(judged, _MAX_SPOTS, replace=False))
        if len(judged) < 20:
            return None
        reach = (FRACTIONS[-1] + _MAX_SHIFT) * pitch
        near = np.flatnonzero(np.isfinite(_query(cKDTree(spots[judged]), cells, 1, reach)[0]))
        a, b = _scaled(spot_counts[judged]), _scaled(cell_counts[near])
        size = min(_DIRECTIONS, min(a.shape) - 1, len(judged) // 20)
        if size < 1 or b.nnz == 0:
            return None
        _, _, directions = svds(a, k=size, v0=np.random.default_rng(0).random(min(a.shape)))
        row_of = np.full(len(spots), -1)
        row_of[judged] = np.arange(len(judged))
        weight = 1 / (totals[judged] + totals[judged].mean())
        weight = np.sqrt(weight / weight.mean())
        target = np.asarray(a @ directions.T) * weight[:, None]
        return cls(cells[near], np.asarray(b @ directions.T), cKDTree(spots), row_of, target, weight, pitch)

    def scores(self, radii: Floats, shift: Floats) -> Floats:
        """[radii, n] log-likelihood of each spot, summing the cells within each (ascending) radius of it."""
        distance, index = _query(self.tree, self.cells - shift, 1, np.nextafter(radii[-1], np.inf))
        distance, index = distance[:, 0], index[:, 0]
        inside = np.flatnonzero(np.isfinite(distance))
        inside = inside[self.row_of[index[inside]] >= 0]
        rows, values = self.row_of[index[inside]], self.cell_values[inside]
        ring = np.searchsorted(radii, distance[inside])  # the first radius that holds the cell
        sums = np.zeros((len(self.target), values.shape[1]))
        out = np.empty((len(radii), len(self.target)))
        for i in range(len(radii)):
            here = ring == i
            for d in range(values.shape[1]):
                sums[:, d] += np.bincount(rows[here], values[here, d], minlength=len(sums))
            design = np.column_stack([np.ones(len(sums)), sums]) * self.weight[:, None]
            out[i] = _log_likelihood(self.target, design)
        return out

    def best_shift(self, radius: float) -> Floats:
        """Shift [2] that a pattern search finds clearly better than none, else zeros. The radius is "
        "judged anew as the shift improves."""
        radii = FRACTIONS * self.pitch
        shift = np.zeros(2)
        start = best = self.scores(np.array([radius]), shift)[0]
        angles = np.arange(8) * np.pi / 4
        compass = np.column_stack([np.cos(angles), np.sin(angles)])
        for step in np.array([0.1, 0.05, 0.025, 0.0125]) * self.pitch:
            for _ in range(4):
                trials = [shift + step * direction for direction in compass]
                trials = [trial for trial in trials if np.hypot(*trial) <= _MAX_SHIFT * self.pitch]
                found = [self.scores(np.array([radius]), trial)[0] for trial in trials]
                top = int(np.argmax([score.sum() for score in found]))
                if found[top].sum() <= best.sum():
                    break
                shift, best = trials[top], found[top]
            radius = _refined(radii, self.scores(radii, shift).sum(axis=1))
            best = self.scores(np.array([radius]), shift)[0]
        return shift if best.sum() - start.sum() > 10 and _clearly_better(best, start) else np.zeros(2)


def _scaled(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Genes divided by the square root of their totals, so that each has about unit Poisson noise."""
    totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    return sparse.csr_matrix(counts @ sparse.diags(1 / np.sqrt(np.maximum(totals, 1.0))))


def _log_likelihood(target: Floats, design: Floats) -> Floats:
    """[n] Gaussian log-likelihood, up to a constant, of the least-squares fit target [n, d] ~ design [n, "
    "p] with its own residual covariance."""
    coefficients = np.linalg.lstsq(design, target, rcond=None)[0]
    residual = target - design @ coefficients
    covariance = residual.T @ residual / len(target)
    # A small ridge keeps an exact fit finite.
    covariance += 1e-10 * (target**2).mean(axis=0).max() * np.eye(target.shape[1])
    root = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(root, residual.T)
    return -np.log(np.diag(root)).sum() - 0.5 * (whitened**2).sum(axis=0)


def neighbors(
    xy: ArrayLike, k: int, library: Sequence[Any] | NDArray[Any] | None = None
) -> sparse.csr_matrix:
    """Graph of the k nearest other points: CSR float32 [n, n] of 0 and 1, row i holds the neighbors of i.

    Parameters
    ----------
    xy : [n, 2] coordinates.
    k : neighbors per point; a point has fewer when its library is smaller.
    library : [n] labels (section, slide); points of different libraries are never neighbors.
    """
    points = _points(xy, "points")
    if k < 1:
        raise UserError(f"neighbors: k={k} must be at least 1")
    labels = (
        np.zeros(len(points), dtype=np.int64)
        if library is None
        else np.unique(np.asarray(library).astype(str), return_inverse=True)[1]
    )
    if len(labels) != len(points):
        raise UserError(
            f"neighbors: {len(labels)} library labels for {len(points)} points; give one label per point"
        )
    rows, columns = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        width = min(k + 1, len(members))
        _, found = _query(cKDTree(points[members]), points[members], width)
        mine = found == np.arange(len(members))[:, None]
        # Among points at one place the tree may not return the point itself: then the farthest one goes.
        mine[~mine.any(axis=1), -1] = True
        rows.append(np.repeat(members, width - 1))
        columns.append(members[found[~mine]])
    row, column = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_matrix(
        (np.ones(len(row), dtype=np.float32), (row, column)), shape=(len(points), len(points))
    )


def neighbor_mean(cells: Counts, k: int, library_key: str | None = None) -> sparse.csr_matrix | None:
    """Rows average over the k nearest cells in space, within the section named by ``obs[library_key]``; a cell without any keeps its own value.

    None without coordinates.
    """
    library = sections(cells, library_key)
    if cells.xy is None or len(cells.names) < 2:
        return None
    graph = neighbors(cells.xy, k, library)
    size = np.asarray(graph.sum(1)).ravel()
    return sparse.csr_matrix(sparse.diags(1 / np.maximum(size, 1)) @ graph + sparse.diags((size == 0).astype(np.float64)), dtype=np.float32)


def sections(cells: Counts, library_key: str | None) -> NDArray[np.int64] | None:
    """Section of every cell by ``obs[library_key]``, counted from 0; None: one section."""
    if library_key is None:
        return None
    return np.unique(labels_of(cells, library_key, "target", "library_key"), return_inverse=True)[1].astype(np.int64)


def _query(tree: cKDTree, points: Floats, k: int, bound: float = np.inf) -> tuple[Floats, NDArray[np.int64]]:
    """Distances (inf where none is within `bound`, exclusive) and indices, both [n, k], also for k = 1."""
    distance, index = tree.query(points, k=[*range(1, k + 1)], distance_upper_bound=bound)
    return np.asarray(distance), np.asarray(index)


def _points(xy: ArrayLike, what: str) -> Floats:
    points = np.asarray(xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise UserError(f"{what}: coordinates have shape {points.shape}, need (n, 2) with n >= 1")
    if not np.isfinite(points).all():
        raise UserError(
            f"{what}: {int((~np.isfinite(points)).any(axis=1).sum())} of {len(points)} coordinates are NaN "
            "or infinite; drop or fill them"
        )
    return points

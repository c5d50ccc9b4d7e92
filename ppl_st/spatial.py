"""Geometry: cell -> spot maps, neighbor graphs, plane transforms.

Coordinates are [n, 2] float64 in one unit (whatever the files use); maps and graphs are scipy CSR float32 and
never dense.

Cell -> spot: W [cells, spots]. Nearest: W_ij = 1 for the nearest spot within the radius. Soft:
W_ij = exp(-d_ij^2 / (2 sigma^2)) over at most k spots within the radius, rows divided by their sum. A cell
out of reach of every spot has an empty row.

Not done here: image or segmentation geometry; what counts say about places is in `ppl_st.radius`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from ppl_st.data import Counts, labels_of
from ppl_st.errors import UserError

Floats = NDArray[np.float64]

DEFAULT_FRACTION = 0.275  # radius as a share of the pitch; Visium: discs of 55 um on a pitch of 100 um


def spot_pitch(xy: ArrayLike) -> float:
    """Distance between neighboring spots: median distance to the nearest other spot, on any grid."""
    points = checked_points(xy, "spots")
    if len(points) < 2:
        raise UserError(
            f"spots: {len(points)} spot has no neighbor to measure the pitch from; give the radius, --set "
            "radius=..."
        )
    distance, _ = nearest(cKDTree(points), points, 2)
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
    cells, spots = checked_points(cells_xy, "cells"), checked_points(spots_xy, "spots")
    for name, value in (("radius", radius), ("k", k), ("sigma", 1.0 if sigma is None else sigma)):
        if not (value > 0 and np.isfinite(value)):
            raise UserError(f"cell-to-spot map: {name}={value} must be a positive number")
    k = min(int(k), len(spots))
    reach = np.nextafter(radius, np.inf)  # the tree's bound is exclusive
    distance, index = nearest(cKDTree(spots), cells, k, reach)
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
    swapped = np.isfinite(nearest(cKDTree(spots[:, ::-1]), cells, 1, radius)[0]).mean()
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
    points = checked_points(xy, "points")
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
    points = checked_points(xy, "points")
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
        _, found = nearest(cKDTree(points[members]), points[members], width)
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


def nearest(tree: cKDTree, points: Floats, k: int, bound: float = np.inf) -> tuple[Floats, NDArray[np.int64]]:
    """Distances (inf where none is within `bound`, exclusive) and indices, both [n, k], also for k = 1."""
    distance, index = tree.query(points, k=[*range(1, k + 1)], distance_upper_bound=bound)
    return np.asarray(distance), np.asarray(index)


def checked_points(xy: ArrayLike, what: str) -> Floats:
    points = np.asarray(xy, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise UserError(f"{what}: coordinates have shape {points.shape}, need (n, 2) with n >= 1")
    if not np.isfinite(points).all():
        raise UserError(
            f"{what}: {int((~np.isfinite(points)).any(axis=1).sum())} of {len(points)} coordinates are NaN "
            "or infinite; drop or fill them"
        )
    return points

"""What the counts of cells and spots say about their places: the radius of a spot, a small shift of the spots, exchanged axes.

Both platforms measured the shared genes, so at the right radius r the sums S_r = W_r' X
of cell counts explain the spot counts V best. Both are projected on the leading directions of V (genes scaled
by 1 / sqrt(total): 5 numbers per cell or spot), and the score is the Gaussian log-likelihood of the linear
regression of V on S_r with free residual covariance, spots weighted by 1 / (total + mean total). The
regression absorbs gene factors and depth; the directions are strong sums over genes, so sparse counts do not
favor wide, smooth radii as a gene-wise Poisson score does. A shift of the spots is judged by the same score,
because a shift that is ignored looks like a wider radius.

Not done here: registration beyond a small shift.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse.linalg import svds
from scipy.spatial import cKDTree

from ppl_st.spatial import DEFAULT_FRACTION, Floats, checked_points, nearest, spot_pitch

# Radius candidates as shares of the pitch. From 1/sqrt(2) on (square grid; 1/sqrt(3) on a hexagonal one)
# every cell belongs to its nearest spot.
FRACTIONS = np.append(np.geomspace(0.2, 0.7072, 12), 0.75)
_DIRECTIONS = 5
_MAX_SPOTS = 3000  # enough to judge one number
_CLEAR = 10.0  # nats by which a shift or exchanged axes must win
_MAX_SHIFT = 0.3  # of the pitch; beyond half of it the spots are their own neighbors


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
    """

    radius: float
    pitch: float
    informative: bool
    reason: str
    low: float
    high: float
    shift: tuple[float, float]
    radius_unshifted: float


def infer_radius(
    cells_xy: ArrayLike,
    spots_xy: ArrayLike,
    cell_counts: sparse.csr_matrix,
    spot_counts: sparse.csr_matrix,
    known: float | None = None,
) -> tuple[float, RadiusInfo]:
    """Radius of the spots, 0.2 to 0.75 of the pitch, and shift at which sums of cells explain the spots' counts best.

    Parameters
    ----------
    cells_xy, spots_xy : [n_cells, 2] and [n_spots, 2] in one frame and unit.
    cell_counts, spot_counts : CSR [n_cells, G] and [n_spots, G] over the SAME shared genes in one order.
    known : the radius where it is known: then only the shift is looked for, and whether the counts could have told the radius.

    Returns
    -------
    radius, info : 0.75 x pitch means that every cell belongs to its nearest spot. Where the counts cannot
        tell, 0.275 x pitch and `info.informative` is False.
    """
    assert cell_counts.shape[1] == spot_counts.shape[1], "both sides must hold the same genes"
    cells, spots = checked_points(cells_xy, "cells"), checked_points(spots_xy, "spots")
    assert len(cells) == cell_counts.shape[0] and len(spots) == spot_counts.shape[0]
    pitch = spot_pitch(spots)
    trial = _RadiusTrial.prepare(cells, spots, cell_counts, spot_counts, pitch)
    if trial is None:
        return _fallback(pitch, "too few spots with counts, or too few cells near them, to judge the radius", known)
    radii = FRACTIONS * pitch
    plain = trial.scores(radii, np.zeros(2))
    plain_radius = _refined(radii, plain.sum(axis=1)) if known is None else known
    shift = trial.best_shift(plain_radius, known is not None)
    scores = trial.scores(radii, shift) if shift.any() else plain
    total = scores.sum(axis=1)
    best = int(np.argmax(total))
    radius = _refined(radii, total) if shift.any() and known is None else plain_radius
    if known is None and radius < FRACTIONS[-2] * pitch:
        fine = radius * np.geomspace(0.92, 1.08, 9)
        radius = float(fine[np.argmax(trial.scores(fine, shift).sum(axis=1))])
    kept = np.flatnonzero([not _clearly_better(scores[best], score) for score in scores])
    low, high = float(radii[kept[0]]), float(radii[kept[-1]])
    if high >= 2 * low:
        same = f"the counts fit every radius from {low:.4g} to {high:.4g} about equally well"
        return _fallback(pitch, f"{same}, as they do where cells and spots are not in one frame and unit", known)
    moved = f"; the spots fit best when moved by ({shift[0]:.4g}, {shift[1]:.4g})" if shift.any() else ""
    share = f"{radius / pitch:.3f} of the pitch {pitch:.4g}"
    reason = f"radius {radius:.4g} ({share}) " + ("explains the spots' counts best" if known is None else "as given") + moved
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
    )


def axes_look_swapped(
    cells_xy: ArrayLike, spots_xy: ArrayLike, cell_counts: sparse.csr_matrix, spot_counts: sparse.csr_matrix
) -> bool:
    """Whether sums of cells explain the spots' counts clearly better with the spots' x and y exchanged; arguments as in `infer_radius`."""
    cells, spots = checked_points(cells_xy, "cells"), checked_points(spots_xy, "spots")
    pitch = spot_pitch(spots)
    best = []
    for places in (spots, spots[:, ::-1]):
        trial = _RadiusTrial.prepare(cells, places, cell_counts, spot_counts, pitch)
        if trial is None:
            return False
        scores = trial.scores(FRACTIONS * pitch, np.zeros(2))
        best.append(scores[np.argmax(scores.sum(axis=1))])
    return bool(best[1].sum() - best[0].sum() > _CLEAR) and _clearly_better(best[1], best[0])


def _fallback(pitch: float, why: str, known: float | None) -> tuple[float, RadiusInfo]:
    radius = DEFAULT_FRACTION * pitch if known is None else known
    choice = f"radius set to {DEFAULT_FRACTION} of the pitch, {radius:.4g}; give --set radius= if you know it"
    reason = f"{why}: {choice if known is None else f'radius {radius:.4g} as given'}"
    low, high = float(FRACTIONS[0] * pitch), float(FRACTIONS[-1] * pitch)
    return radius, RadiusInfo(radius, pitch, False, reason, low, high, (0.0, 0.0), radius)


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
        near = np.flatnonzero(np.isfinite(nearest(cKDTree(spots[judged]), cells, 1, reach)[0]))
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
        distance, index = nearest(self.tree, self.cells - shift, 1, np.nextafter(radii[-1], np.inf))
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

    def best_shift(self, radius: float, known: bool) -> Floats:
        """Shift [2] that a pattern search finds clearly better than none, else zeros. Unless it is known, the radius is judged anew as the shift
        improves."""
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
            if not known:
                radius = _refined(radii, self.scores(radii, shift).sum(axis=1))
                best = self.scores(np.array([radius]), shift)[0]
        if best.sum() - start.sum() <= _CLEAR or not _clearly_better(best, start):
            return np.zeros(2)
        if known:
            return shift

        def loss(at: Floats) -> float:  # shift in pitches and log radius together: one after the other they stop on the ridge between them
            if np.hypot(*at[:2]) > _MAX_SHIFT:
                return np.inf
            return -float(self.scores(np.exp(at[2:]).clip(radii[0], radii[-1]), at[:2] * self.pitch)[0].sum())

        middle = np.append(shift / self.pitch, np.log(radius))
        simplex = np.vstack([middle, middle + np.diag([0.05, 0.05, 0.1])])
        solved = minimize(loss, middle, method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 0.003, "fatol": 0.5, "maxfev": 120})
        return np.asarray(solved.x[:2] * self.pitch)


def _scaled(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Genes divided by the square root of their totals, so that each has about unit Poisson noise."""
    totals = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    return sparse.csr_matrix(counts @ sparse.diags(1 / np.sqrt(np.maximum(totals, 1.0))))


def _log_likelihood(target: Floats, design: Floats) -> Floats:
    """[n] Gaussian log-likelihood, up to a constant, of the least-squares fit target [n, d] ~ design [n, p] with its own residual covariance."""
    coefficients = np.linalg.lstsq(design, target, rcond=None)[0]
    residual = target - design @ coefficients
    covariance = residual.T @ residual / len(target)
    # A small ridge keeps an exact fit finite.
    covariance += 1e-10 * (target**2).mean(axis=0).max() * np.eye(target.shape[1])
    root = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(root, residual.T)
    return -np.log(np.diag(root)).sum() - 0.5 * (whitened**2).sum(axis=0)

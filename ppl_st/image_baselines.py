"""Cheap estimates of counts at places that were not measured, from spots elsewhere and the image: what XFuse has to beat.

`IMAGE_BASELINES` name functions `Split` -> expected counts float64 [m, G] at the places asked for:

    gene_mean        mean count of every gene
    nearest, linear, knn   counts of the nearest spot; linear interpolation between spots (Delaunay, nearest outside); mean of the 6 nearest
    color            least squares on mean intensity in five bins, cut off at 0 (the published image-only baseline)
    gp_space, gp_image, gp_space_image   Gaussian processes on positions, on image features, on both

A Gaussian process here regresses the square root of every gene's counts (variance nearly constant for Poisson noise), standardised, on

    K = sum_k s_k^2 exp(-|u_k - v_k|^2 / (2 l_k^2)) + s_0^2 I,    k: positions (within a section), image features (across sections)

with s, l shared by all genes and chosen by their marginal likelihood; the count expected is mean^2 + variance of the root. Features are color,
gradient and local spread smoothed at 1/8, 1/3 and 1 pitch (`ppl_st.image_features`), at the middle of the spot.
Positions are in pitches. What needs positions near spots is left out where no section asked for was measured (``SPATIAL``).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.spatial import cKDTree

__all__ = ["IMAGE_BASELINES", "SPATIAL", "Places", "Split"]

Floats = NDArray[np.float64]
NEIGHBORS = 6
LEARN_FROM = 1000  # spots that hyper-parameters are learned on, at most
BINS = 5


class Places(NamedTuple):
    """n places: their section [n], position [n, 2] in pitches, features [n, F] and mean intensity [n] in [0, 1]."""

    section: NDArray[np.int64]
    xy: Floats
    features: Floats
    intensity: Floats


class Split(NamedTuple):
    """Where counts [n, G] were measured, and where they are asked for."""

    seen: Places
    counts: Floats
    asked: Places


def gene_mean(split: Split) -> Floats:
    """Mean of every gene."""
    return np.tile(split.counts.mean(0), (len(split.asked.xy), 1))


def nearest(split: Split) -> Floats:
    """Counts of the nearest spot."""
    return _by_section(split, lambda xy, counts, at: counts[cKDTree(xy).query(at)[1]])


def knn(split: Split) -> Floats:
    """Mean counts of the `NEIGHBORS` nearest spots."""

    def mean(xy: Floats, counts: Floats, at: Floats) -> Floats:
        index = cKDTree(xy).query(at, min(NEIGHBORS, len(xy)))[1].reshape(len(at), -1)
        return np.asarray(counts[index].mean(1))

    return _by_section(split, mean)


def linear(split: Split) -> Floats:
    """Linear interpolation on the Delaunay triangles of the spots; the nearest spot outside their hull."""
    from scipy.interpolate import LinearNDInterpolator
    from scipy.spatial import QhullError

    def interpolate(xy: Floats, counts: Floats, at: Floats) -> Floats:
        outside = counts[cKDTree(xy).query(at)[1]]
        try:
            found = np.asarray(LinearNDInterpolator(xy, counts)(at))
        except QhullError:  # three spots or fewer, or all on one line
            return np.asarray(outside)
        return np.where(np.isnan(found), outside, found)

    return _by_section(split, interpolate)


def color(split: Split) -> Floats:
    """Least squares on the bin of the mean intensity (`BINS` bins with equally many spots), one slope per gene, cut off at 0."""
    edges = np.quantile(split.seen.intensity, np.arange(1, BINS) / BINS)
    x, at = (np.searchsorted(edges, one.intensity).astype(np.float64) for one in (split.seen, split.asked))
    deviation = x - x.mean()
    slope = deviation @ split.counts / max(deviation @ deviation, 1e-12)
    return np.maximum(split.counts.mean(0) + (at - x.mean())[:, None] * slope, 0.0)


def gp_space(split: Split) -> Floats:
    """Gaussian process on positions."""
    return _gaussian_process(split, space=True, image=False)


def gp_image(split: Split) -> Floats:
    """Gaussian process on image features."""
    return _gaussian_process(split, space=False, image=True)


def gp_space_image(split: Split) -> Floats:
    """Gaussian process on positions plus image features."""
    return _gaussian_process(split, space=True, image=True)


IMAGE_BASELINES: dict[str, Callable[[Split], Floats]] = {
    "gene_mean": gene_mean,
    "nearest": nearest,
    "linear": linear,
    "knn": knn,
    "color": color,
    "gp_space": gp_space,
    "gp_image": gp_image,
    "gp_space_image": gp_space_image,
}
SPATIAL = frozenset({"nearest", "linear", "knn", "gp_space", "gp_space_image"})


# ---- helpers ----


def _by_section(split: Split, estimate: Callable[[Floats, Floats, Floats], Floats]) -> Floats:
    """``estimate(xy, counts, at)`` within every section asked for."""
    found = np.empty((len(split.asked.xy), split.counts.shape[1]))
    for section in np.unique(split.asked.section):
        seen, asked = split.seen.section == section, split.asked.section == section
        found[asked] = estimate(split.seen.xy[seen], split.counts[seen], split.asked.xy[asked])
    return found


def _gaussian_process(split: Split, *, space: bool, image: bool) -> Floats:
    root = np.sqrt(split.counts)
    mean, sd = root.mean(0), root.std(0)
    y = (root - mean) / np.where(sd > 0, sd, 1.0)
    among = _distances(split.seen, split.seen, space, image)
    some = np.random.default_rng(0).permutation(len(y))[:LEARN_FROM]
    log_s, log_l, log_noise = _learn([d[np.ix_(some, some)] for d in among], y[some])
    noise = np.exp(2 * log_noise)
    factor = cho_factor(_kernel(among, log_s, log_l) + noise * np.eye(len(y)), lower=True)
    across = _kernel(_distances(split.asked, split.seen, space, image), log_s, log_l)
    estimate = across @ cho_solve(factor, y)
    variance = np.exp(2 * log_s).sum() + noise - np.einsum("ij,ji->i", across, cho_solve(factor, across.T))
    return np.maximum(mean + sd * estimate, 0.0) ** 2 + sd**2 * variance[:, None]


def _distances(a: Places, b: Places, space: bool, image: bool) -> list[Floats]:
    """Squared distances [len(a), len(b)] of each kernel; infinite between positions of different sections."""
    found = []
    if space:
        found.append(np.where(a.section[:, None] == b.section, _squared(a.xy, b.xy), np.inf))
    if image:
        found.append(_squared(a.features, b.features))
    return found


def _squared(a: Floats, b: Floats) -> Floats:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)


def _kernel(distances: Sequence[Floats], log_s: Floats, log_l: Floats) -> Floats:
    return np.asarray(sum(np.exp(2 * s - d / 2 * np.exp(-2 * length)) for d, s, length in zip(distances, log_s, log_l, strict=True)))


def _learn(distances: Sequence[Floats], y: Floats) -> tuple[Floats, Floats, float]:
    """log s [kernels], log l [kernels] and log noise that maximise the mean marginal likelihood of the columns of ``y`` [n, G]."""
    kernels = len(distances)

    def loss(p: Floats) -> tuple[float, Floats]:
        log_s, log_l, noise = p[:kernels], p[kernels:-1], np.exp(2 * p[-1])
        parts = [np.exp(2 * s - d / 2 * np.exp(-2 * length)) for d, s, length in zip(distances, log_s, log_l, strict=True)]
        factor = cho_factor(sum(parts) + noise * np.eye(len(y)), lower=True)
        weights = cho_solve(factor, y)
        inner = cho_solve(factor, np.eye(len(y))) - weights @ weights.T / y.shape[1]  # dL = tr(inner dK) / 2
        scaled = [np.where(part > 0, part * np.where(part > 0, d, 0.0), 0.0) for part, d in zip(parts, distances, strict=True)]
        slope = [(inner * part).sum() for part in parts]
        slope += [(inner * part).sum() / 2 * np.exp(-2 * length) for part, length in zip(scaled, log_l, strict=True)]
        slope.append(noise * np.trace(inner))
        return 0.5 * (y * weights).sum() / y.shape[1] + np.log(np.diag(factor[0])).sum(), np.array(slope)

    middle = [0.5 * np.log(np.median(d[np.isfinite(d) & (d > 0)])) for d in distances]
    start = np.array([np.log(0.6)] * kernels + middle + [np.log(0.7)])
    bounds = [(-5.0, 2.0)] * kernels + [(m - 4.0, m + 4.0) for m in middle] + [(-3.0, 1.0)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return found[:kernels], found[kernels:-1], float(found[-1])

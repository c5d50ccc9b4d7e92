"""How unlike the fit's images a tile of an image is: a warning that what is predicted there is extrapolation.

Every tile of tissue has a mean of each image feature and, of those smoothed least, a standard deviation, in units of its section's contrast
(`ppl_st.image_features.contrast_features`): stain and exposure of a section as a whole do not matter. With the covariance of the fit's tiles as the
unit of length, a tile is as far from the fit as the mean distance to its `NEAREST` nearest tiles there; a tile of the fit is compared with those that
do not touch it. Novelty is the share of the fit's tiles that are nearer.

Not the likelihood of the image under the model: smooth and pale images are likely whatever they show (a bulb was less novel to a breast tumor than
its own next section), and networks are sensitive to how much glass is around the tissue (a section was novel to itself).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from ppl_st.image_features import FEATURES, contrast_features
from ppl_st.models.xfuse.data import Section
from ppl_st.models.xfuse.patches import pitch_of

__all__ = ["novelty"]

NEAREST = 3
VARYING = 10  # features of which a tile has a standard deviation as well: those smoothed over less than a pitch
TISSUE = 0.1  # share of a tile
SHRINK = 0.05  # of the covariance of tiles towards that of unrelated ones
MOST = 4000  # tiles of the fit that others are compared with, drawn where there are more
BLOCK = 1000  # tiles of which distances are kept at once
Array = NDArray[np.float64]


def novelty(sections: Sequence[Section], fitted: Sequence[Section], tile: int) -> list[Array]:
    """Of every tile of ``tile`` x ``tile`` pixels of each section, from 0 to 1 [tiles y, tiles x]; NaN: less than a tenth is tissue."""
    known, places = zip(*(_tiles(section, tile) for section in fitted), strict=True)
    fit = np.concatenate(known)
    owner = np.repeat(np.arange(len(fitted)), list(map(len, known)))
    if not len(fit):
        return [np.full([-(-side // tile) for side in section.mask.shape], np.nan) for section in sections]
    middle, spread = fit.mean(0), np.maximum(fit.std(0), 1e-6)
    correlation = (1 - SHRINK) * ((fit - middle) / spread).T @ ((fit - middle) / spread) / len(fit) + SHRINK * np.eye(fit.shape[1])
    unit = np.linalg.inv(np.linalg.cholesky(correlation)).T / spread[:, None]
    some = np.sort(np.random.default_rng(0).permutation(len(fit))[:MOST])
    fit, owner, place = (fit[some] - middle) @ unit, owner[some], np.concatenate(places)[some]
    at = np.column_stack([place, 2 * owner])  # sections do not touch
    own = np.sort(_distance(fit, fit, at))
    found = []
    for section in sections:
        tiles, where = _tiles(section, tile)
        values = np.full([-(-side // tile) for side in section.mask.shape], np.nan)
        values[tuple(where.T)] = np.searchsorted(own, _distance((tiles - middle) @ unit, fit)) / len(own)
        found.append(values)
    return found


def _distance(tiles: Array, fit: Array, at: NDArray[np.int64] | None = None) -> Array:
    """Mean distance of tiles [n, k] to the nearest of the fit's [m, k]; of the fit's own, at places ``at`` [m, 3], to those that do not touch."""
    found = []
    for first in range(0, len(tiles), BLOCK):
        apart = cdist(tiles[first : first + BLOCK], fit)
        if at is not None:
            touching = np.abs(at[first : first + BLOCK, None] - at).max(-1) <= 1
            touching[(~touching).sum(1) < NEAREST] = False
            apart[touching] = np.inf
            apart[np.arange(len(apart)), first + np.arange(len(apart))] = np.inf
        nearest = np.sort(np.partition(apart, min(NEAREST, len(fit)) - 1, axis=1)[:, :NEAREST], axis=1)
        found.append(np.where(np.isfinite(nearest), nearest, 0.0).sum(1) / np.maximum(np.isfinite(nearest).sum(1), 1))
    return np.concatenate([np.zeros(0), *found])


def _tiles(section: Section, tile: int) -> tuple[Array, NDArray[np.int64]]:
    """What is compared of the tiles on tissue [n, 25], and their row and column [n, 2]."""
    features = contrast_features(section.image, section.mask, pitch_of(section.shown or section))
    values, at = [], []
    for row in range(0, section.mask.shape[0], tile):
        for column in range(0, section.mask.shape[1], tile):
            window = np.s_[row : row + tile, column : column + tile]
            on = section.mask[window]
            if on.mean() > TISSUE:
                pixels = features[:, *window][:, on].astype(np.float64)
                values.append(np.append(pixels.mean(1), pixels[:VARYING].std(1)))
                at.append((row // tile, column // tile))
    return np.array(values).reshape(-1, FEATURES + VARYING), np.array(at, np.int64).reshape(-1, 2)

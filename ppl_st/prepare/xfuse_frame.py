"""A slide's whole image at the working resolution and the spots in it: do they lie where the tissue is?

Spots outside the image are an error, and so are spots off the tissue that another reading of the coordinates would put on it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_st.errors import UserError
from ppl_st.images import Slide, overlay, tissue_mask

__all__ = ["Frame", "box_around", "check_positions", "inside_share", "lie_outside", "share_on"]

ON_TISSUE, ELSEWHERE, BETTER = 0.85, 0.9, 0.1  # an error: a smaller share of spots on tissue than the first, while another reading of the
# positions puts at least the second there, and better by the third (measured: right positions .97 to .99, exchanged axes .58 to .79)
MUCH = 0.3  # or better by this (pale tissue: right positions .79, others at most .48)
BLOCK = 4096  # discs whose grids are held at once


class Frame(NamedTuple):
    """A slide's whole image at the working resolution, and its spots in it."""

    image: NDArray[np.uint8]
    centers: NDArray[np.float64]
    radius: float
    scale: float  # working pixels per coordinate


def check_positions(slide: Slide, frame: Frame, pictures: Path) -> None:
    """Refuse spots outside the image, and positions that another reading would put on tissue (see `ON_TISSUE`)."""
    shape = frame.image.shape[:2]
    outside = lie_outside(frame.centers, shape)
    mask = tissue_mask(frame.image)
    readings = _readings(frame, mask)
    share = {name: share_on(mask, xy) for name, xy in readings.items()}
    best = max(share, key=lambda name: share[name])
    own = share_on(mask, frame.centers)
    better = share[best] >= own + (BETTER if share[best] >= ELSEWHERE else MUCH)
    hint = f"; {best}, {share[best]:.0%} would lie on tissue" if better else ""
    width, height = shape[1] / frame.scale, shape[0] / frame.scale
    if outside.any():
        xy = frame.centers / frame.scale
        low, high = (f"({x:.6g}, {y:.6g})" for x, y in (xy.min(0), xy.max(0)))
        problem = (
            f"{outside.sum()} of {len(outside)} spots lie outside the image ({width:.6g} x {height:.6g} px): obsm['spatial'] spans {low} to "
            f"{high}{hint}"
        )
    elif own < ON_TISSUE and hint:
        problem = f"only {own:.0%} of the spots lie on tissue{hint}"
    else:
        return
    path = overlay(pictures / f"overlay_{slide.name}.png", frame.image, frame.centers, frame.radius)
    raise UserError(
        f"section {slide.name} ({slide.counts.source if slide.counts else ''}): {problem}; obsm['spatial'] must be x (right) and y (down) in "
        f"pixels of the image; see {path} (if the positions are right: --set input.check=false)"
    )


def _readings(frame: Frame, mask: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """Other meanings that the positions could have."""
    xy, (height, width) = frame.centers, frame.image.shape[:2]
    found = {
        "with x and y exchanged": xy[:, ::-1],
        "with x counted from the right": np.array([width, 0]) + xy * [-1, 1],
        "with y counted from below": np.array([0, height]) + xy * [1, -1],
        "turned by half a turn": np.array([width, height]) - xy,
        "turned by a quarter to the left": np.column_stack([xy[:, 1], height - xy[:, 0]]),
        "turned by a quarter to the right": np.column_stack([width - xy[:, 1], xy[:, 0]]),
    }
    middle = np.argwhere(mask)[:, ::-1].mean(0) + 0.5 if mask.any() else np.array([width, height]) / 2
    factor = float(np.hypot(*middle)) / max(float(np.hypot(*xy.mean(0))), 1e-300)
    if not 0.8 < factor < 1.25:
        found[f"multiplied by about {factor:.2g} (coordinates of another resolution, or um?)"] = xy * factor
    return found


def share_on(mask: NDArray[np.bool_], xy: NDArray[np.float64]) -> float:
    """Share of the positions that lie in the image and on the mask."""
    inside = ~lie_outside(xy, mask.shape)
    column, row = np.floor(xy[inside]).astype(np.int64).T
    return float(mask[row, column].sum() / max(1, len(xy)))


def lie_outside(xy: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.asarray((xy < 0).any(1) | (xy >= np.array([shape[1], shape[0]])).any(1))


def inside_share(xy: NDArray[np.float64], radius: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Share of each disc that lies in the image [n], by the pixels' middles of a disc on a grid of 20 x 20 where it may cross the border."""
    steps = (np.arange(20) + 0.5) / 10 - 1
    offset = radius * np.array([(a, b) for a in steps for b in steps if a * a + b * b <= 1])
    share = np.ones(len(xy))
    crossing = np.flatnonzero((np.minimum(xy, [shape[1], shape[0]] - xy) < radius).any(1))
    for start in range(0, len(crossing), BLOCK):
        some = crossing[start : start + BLOCK]
        share[some] = 1 - lie_outside((xy[some, None] + offset).reshape(-1, 2), shape).reshape(len(some), -1).mean(1)
    return share


def box_around(xy: NDArray[np.float64], shape: tuple[int, ...], margin: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the part of the image within ``margin`` of the positions."""
    left, top = np.maximum(0, np.floor(xy.min(0) - margin)).astype(int)
    right, bottom = np.minimum([shape[1], shape[0]], np.ceil(xy.max(0) + margin)).astype(int)
    return int(top), int(bottom), int(left), int(right)

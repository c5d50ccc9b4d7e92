"""Hand-made features of histology: color, gradient and local spread at several scales of the spot pitch. Arrays only."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["FEATURES", "SCALES", "contrast_features", "image_features"]

SCALES = (1 / 8, 1 / 3, 1.0)  # smoothing of the features, in spot pitches
FEATURES = 5 * len(SCALES)
CLIP = 5.0  # features are cut at so many standard deviations


def image_features(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], pitch: float, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Features [F, H, W] of an image [H, W, 3], smoothed with Gaussians of sd `SCALES` x pitch: red, green, blue, gradient and local spread of each.

    They are standardised over the pixels of ``mask`` [H, W], which takes out differences in staining between sections. ``out`` [F, H, W], if given,
    is filled and returned; beside it there are a few planes [H, W] at a time.
    """
    out = np.empty((FEATURES, *mask.shape), np.float32) if out is None else out
    _smooth(lambda channel: _plane(image, channel), pitch, out)
    for plane in out:
        _standardise(plane, mask)
        np.clip(plane, -CLIP, CLIP, out=plane)
    return out


def contrast_features(image: NDArray[np.uint8], mask: NDArray[np.bool_], pitch: float) -> NDArray[np.float32]:
    """The same features [F, H, W] in units of the contrast of the section: its channels are standardised over ``mask``, the features are not.

    Differences in staining between sections are taken out, differences in texture are left.
    """
    channels = [_plane(image, channel) for channel in range(3)]
    for plane in channels:
        _standardise(plane, mask)
    out = np.empty((FEATURES, *mask.shape), np.float32)
    _smooth(channels.__getitem__, pitch, out)
    return out


def _smooth(channel: Callable[[int], NDArray[np.float32]], pitch: float, out: NDArray[np.float32]) -> None:
    grey = (channel(0) + channel(1) + channel(2)) / 3
    gradient = np.hypot(*np.gradient(gaussian_filter(grey, 0.5)))
    for k, sd in enumerate(pitch * scale for scale in SCALES):
        for c in range(3):
            gaussian_filter(channel(c), sd, output=out[5 * k + c])
        gaussian_filter(gradient, sd, output=out[5 * k + 3])
        mean = gaussian_filter(grey, sd)
        out[5 * k + 4] = np.sqrt(np.maximum(gaussian_filter(grey * grey, sd) - mean * mean, 0))


def _standardise(plane: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
    """In place, to mean 0 and sd 1 over the mask (over all where it is empty)."""
    values = plane[mask if mask.any() else np.ones_like(mask)]  # sums in float64: those of float32 no longer grow beyond 2^24 or so
    middle, spread = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    plane -= np.float32(middle)
    plane /= np.float32(max(spread, 1e-3))


def _plane(image: NDArray[np.uint8], channel: int) -> NDArray[np.float32]:
    """One channel [H, W], from 0 to 1."""
    return np.asarray(image[..., channel].astype(np.float32) / 255)

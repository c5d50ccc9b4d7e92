"""Hand-made features of histology: color, gradient and local spread at several scales of the spot pitch. Arrays only."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["FEATURES", "SCALES", "image_features"]

SCALES = (1 / 8, 1 / 3, 1.0)  # smoothing of the features, in spot pitches
FEATURES = 5 * len(SCALES)
CLIP = 5.0  # features are cut at so many standard deviations


def image_features(image: NDArray[np.uint8], mask: NDArray[np.bool_], pitch: float) -> NDArray[np.float32]:
    """Features [F, H, W] of an image [H, W, 3], smoothed with Gaussians of sd `SCALES` x pitch: red, green, blue, gradient and local spread of each.

    They are standardised over the pixels of ``mask`` [H, W], which takes out differences in staining between sections.
    """
    rgb = image.astype(np.float32) / 255
    grey = rgb.mean(2)
    gradient = np.hypot(*np.gradient(gaussian_filter(grey, 0.5)))
    out = np.empty((FEATURES, *grey.shape), np.float32)
    for k, sd in enumerate(pitch * scale for scale in SCALES):
        mean = gaussian_filter(grey, sd)
        spread = np.sqrt(np.maximum(gaussian_filter(grey * grey, sd) - mean * mean, 0))
        smooth = [gaussian_filter(plane, sd) for plane in (*np.moveaxis(rgb, 2, 0), gradient)]
        out[5 * k : 5 * k + 5] = np.stack([*smooth, spread])
    on = mask if mask.any() else np.ones_like(mask)
    values = out[:, on]
    sd = np.maximum(values.std(1), 1e-3)
    return np.asarray(np.clip((out - values.mean(1)[:, None, None]) / sd[:, None, None], -CLIP, CLIP))

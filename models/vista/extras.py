"""The paper's uncertainty scores of a prediction, drawn and in closed form."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cosine_uncertainty", "cosine_uncertainty_closed_form"]


def cosine_uncertainty(mean: NDArray[Any], draws: NDArray[Any], *, of: str = "genes") -> NDArray[np.float64]:
    """The paper's score (eq. 12, 13): 1 - median over draws of the cosine between drawn counts and their mean.

    ``mean`` [n, g], ``draws`` [L, n, g]. ``of="genes"`` compares a gene's vectors over cells, [g]; "cells" a cell's over genes, [n]. It is a
    signal-to-noise score that falls with the level of a gene; compare it with ranking by mean expression.
    """
    axis = 0 if of == "genes" else 1
    x, m = np.asarray(draws, dtype=np.float64), np.asarray(mean, dtype=np.float64)
    norm = np.sqrt((x**2).sum(axis + 1) * (m**2).sum(axis))
    cosine = np.where(norm > 0, (x * m).sum(axis + 1) / np.maximum(norm, 1e-300), 0.0)
    return np.asarray(1 - np.median(cosine, axis=0), dtype=np.float64)


def cosine_uncertainty_closed_form(mean: NDArray[Any], variance: NDArray[Any], *, of: str = "genes") -> NDArray[np.float64]:
    """The same without draws: 1 - sqrt(S / (S + V)), S the sum of squared means and V of variances; both [n, g]."""
    axis = 0 if of == "genes" else 1
    square = np.square(mean, dtype=np.float64).sum(axis)
    total = square + np.asarray(variance, dtype=np.float64).sum(axis)
    return np.asarray(1 - np.sqrt(square / np.maximum(total, 1e-300)), dtype=np.float64)

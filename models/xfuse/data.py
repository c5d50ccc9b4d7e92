"""What XFuse works on: sections of tissue, each an image, a label map and the counts of its measurements. Arrays only, no files.

All images are at the working resolution; n is a section, l a measurement (a spot, or the whole area off the tissue), g a gene.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["Data", "Section"]


class Section(NamedTuple):
    """One section.

    Attributes
    ----------
    name
        Its name, unique among the sections.
    image
        [H, W, 3] uint8, red, green, blue.
    label
        [H, W] int64: 0 for a pixel in no measurement, k for a pixel of row k - 1 of ``counts``.
    counts
        [rows, G] float32 CSR of raw counts; rows = 0 for an image without counts.
    virtual
        Row of the virtual measurement, the area off the tissue with zero counts in every gene; -1: none.
    mask
        [H, W] bool, the tissue.
    centers
        [rows, 2] x and y of the measurements in pixels of ``image``; NaN for the virtual one.
    radius
        Of a spot, in pixels of ``image``.
    covariates
        [K] level of every covariate; -1: unknown, to be integrated over its prior.
    annotation
        [H, W] int64 region of every pixel, 0 for none; None without annotation.
    """

    name: str
    image: NDArray[np.uint8]
    label: NDArray[np.int64]
    counts: sp.csr_matrix
    virtual: int
    mask: NDArray[np.bool_]
    centers: NDArray[np.float64]
    radius: float
    covariates: NDArray[np.int64]
    annotation: NDArray[np.int64] | None


class Data(NamedTuple):
    """Sections of one fit, with their common genes and the names of their covariates' levels."""

    sections: tuple[Section, ...]
    genes: NDArray[np.str_]
    covariates: dict[str, tuple[str, ...]]

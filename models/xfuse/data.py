"""What XFuse works on: sections of tissue, each an image, a label map and the counts of its measurements. Arrays only, no files.

All images are at the working resolution; n is a section, l a measurement (a spot, or the whole area off the tissue), g a gene.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

__all__ = ["Data", "Input", "Section"]


FEW_SPOTS = 60  # in all: fewer do not say how much varies; with 10 to 18, 90% intervals covered .83 to .97, depending on the section


@dataclass(frozen=True)
class Input:
    """How files become sections (`ppl_st.prepare.xfuse`). Coordinates are those of ``obsm["spatial"]``.

    Attributes
    ----------
    scale
        Pixels of a section per pixel of its file, at most 1; None: so that the pitch of the spots becomes ``pitch`` pixels.
    pitch
        See ``scale``.
    radius
        Of the spots, in coordinates; None: what the file says, else 0.275 pitches (Visium's share).
    spot
        Its form; a square has twice the radius as its side; "auto": what the file says, else a disc.
    margin
        Of the image around the spots, in shares of their extent: what a fit keeps, and how far outside its spots it can be asked.
    mask
        "auto" (Otsu), "none" (tissue everywhere) or an image file, not 0 on tissue, for all sections or one each.
    background
        Whether the area off the tissue is a measurement of zero counts.
    check
        Whether positions that contradict the image are an error.
    min_counts, min_gene_counts
        Spots, and genes over all sections, with fewer counts are left out.
    drop_genes, top_genes
        Regular expression of genes to leave out ("^(RPS|RPL|MT-)"); keep only so many genes, those with the largest totals.
    covariates
        Columns of ``obs``, each with one value per section, or "section": every section is its own level.
    annotation
        A column of ``obs``, or files: GeoJSON polygons in coordinates or label images over the whole image; for all sections or one each.
    """

    scale: float | None = field(default=None, metadata={"gt": 0, "le": 1})
    pitch: float = field(default=16.0, metadata={"gt": 1})
    radius: float | None = field(default=None, metadata={"gt": 0})
    spot: Literal["auto", "disc", "square"] = "auto"
    margin: float = field(default=0.12, metadata={"ge": 0})
    mask: tuple[str, ...] = ("auto",)
    background: bool = True
    check: bool = True
    min_counts: int = field(default=1, metadata={"ge": 0})
    min_gene_counts: int = field(default=1, metadata={"ge": 0})
    drop_genes: str = ""
    top_genes: int | None = field(default=None, metadata={"gt": 0})
    covariates: tuple[str, ...] = ("section",)
    annotation: tuple[str, ...] = ()


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
    regions
        Names of regions 1, 2, ... of ``annotation``.
    scale, origin
        Pixel coordinates of ``image`` are (coordinates of the file - origin) * scale.
    micron
        Micrometers per pixel of ``image``; NaN: unknown.
    square
        Whether spots are squares of twice the radius, not discs.
    pitch
        Distance between neighboring spots of the slide in pixels of ``image``, whatever is measured or asked for here; scales of space go by it.
    shown
        The section as the fit saw it, or a new image without spots, where ``label`` and ``counts`` are of other places (`at`): what is tissue,
        and what the recognition network sees, does not depend on what is asked for. None: this one.
    frame
        Height and width of the whole image, of which ``image`` is a part, at the working resolution; (0, 0): unknown.
    file_scale
        Working pixels per pixel of the image's file (``scale`` is per coordinate); NaN: unknown.
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
    regions: tuple[str, ...] = ()
    scale: float = 1.0
    origin: tuple[float, float] = (0.0, 0.0)
    micron: float = float("nan")
    square: bool = False
    pitch: float = float("nan")
    shown: "Section | None" = None
    frame: tuple[int, int] = (0, 0)
    file_scale: float = float("nan")

    def at(self, label: NDArray[np.int64], centers: NDArray[np.float64]) -> "Section":
        """The section with other measurements [H, W] at ``centers`` [n, 2], without counts."""
        shape: Any = (len(centers), self.counts.shape[1])  # the stubs do not know csr_matrix(shape)
        shown = self if self.shown is None else self.shown
        return self._replace(label=label, counts=sp.csr_matrix(shape, dtype=np.float32), virtual=-1, centers=centers, shown=shown)


class Data(NamedTuple):
    """Sections of one fit, with their common genes and the names of their covariates' levels."""

    sections: tuple[Section, ...]
    genes: NDArray[np.str_]
    covariates: dict[str, tuple[str, ...]]

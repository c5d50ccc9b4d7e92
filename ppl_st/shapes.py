"""Synthetic sections of colored shapes, each kind of shape with its own expression (XFuse, specs B7.1), seedable.

    canvas     size x size pixels; up to ``shapes`` shapes at random places that keep 2 px apart: 32 attempts of up to 200 tries
    kinds      circle (radius 12 to 32), square (half side 12 to 30), triangle (side 28 to 64), rectangle (1 : 2.5), ring
    pixel      emits reads x profile_kind(pixel),g x depth(pixel) x exp(shift_batch,g) of gene g on average, nothing off the shapes
    profile    genes = kinds: every kind has a marker of its own; more genes: Dirichlet(0.2) programs
    spots      "tiles": 4 x 4 squares that cover the canvas; "hexagonal": discs of 0.55 pitches with gaps between them
    counts     Poisson(sum of the emission of the pixels that the spot covers), misaligned by ``misalignment`` spot radii in a random direction
    image      a color per kind on light gray (or one color for all: only form tells kinds apart), pixel noise of ``noise``, 8 bits;
               a share ``occlusion`` of its squares of 24 px is painted in the mean color
"""

from dataclasses import dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.images import Slide, label_spots
from ppl_st.simulate import SCALES, within

__all__ = ["KINDS", "ShapeSection", "Shapes", "shapes"]

KINDS = ("circle", "square", "triangle", "rectangle", "ring")
COLORS = np.array([(0.2, 0.3, 0.9), (0.9, 0.2, 0.2), (0.9, 0.8, 0.2), (0.2, 0.7, 0.3), (0.6, 0.2, 0.7)])
GLASS, ATTEMPTS, TRIES, GAP, OCCLUDED = 0.85, 32, 200, 2, 24


@dataclass(frozen=True)
class ShapeSection:
    """One section: ``adata`` spots x genes with ``obsm["spatial"]`` in pixels as a person would have them, ``image`` [H, W, 3] uint8, the kind of
    every pixel ``kind`` [H, W] (0 none, k the k-th of `KINDS`), its relative ``depth`` [H, W], and where the image is ``hidden`` [H, W].
    """

    adata: ad.AnnData
    image: NDArray[np.uint8]
    kind: NDArray[np.int64]
    depth: NDArray[np.float64]
    hidden: NDArray[np.bool_]


@dataclass(frozen=True)
class Shapes:
    """Simulated sections; ``profiles`` [kinds, genes] expected reads per pixel; ``settings`` of `ppl_st.models.xfuse.data.Input` that fit them."""

    sections: tuple[ShapeSection, ...]
    profiles: NDArray[np.float64]
    settings: dict[str, Any]

    def rate(self, section: int) -> NDArray[np.float64]:
        """Expected reads of every pixel and gene, [H, W, genes], without the shift of the batch."""
        one = self.sections[section]
        return np.vstack([np.zeros(self.profiles.shape[1]), self.profiles])[one.kind] * one.depth[..., None]

    @property
    def slides(self) -> list[Slide]:
        """The sections as if they had been read from files."""
        return [
            Slide(f"section{n}", read_counts(one.adata, role="target"), one.image) for n, one in enumerate(self.sections)
        ]


def shapes(
    *,
    seed: int = 0,
    sections: int = 1,
    size: int = 384,
    kinds: int = 3,
    genes: int = 3,
    reads: float = 10.0,
    spots: str = "tiles",
    pitch: float = 24.0,
    color: str = "kind",
    noise: float = 0.1,
    misalignment: float = 0.0,
    occlusion: float = 0.0,
    batches: int = 1,
    batch_sd: float = 0.5,
    depth_sd: float = 0.0,
) -> Shapes:
    """Simulate sections of shapes.

    Parameters
    ----------
    seed
        Section n has a generator of its own, made of ``seed`` and n: more sections leave the first ones as they are.
    sections, size
        How many, and pixels a side.
    kinds, genes, reads
        Kinds of shapes (1 to 5); genes (equal to kinds: markers); expected reads of a pixel over all genes.
    spots, pitch
        "tiles" or "hexagonal"; distance of hexagonal spots in pixels.
    color, noise
        "kind" or "same"; standard deviation of the pixels' noise on a scale of 1.
    misalignment
        Shift of the spots that the coordinates do not show, in spot radii.
    occlusion
        Share of the image's squares that are painted over.
    batches, batch_sd
        Sections belong to batch 0, 1, ... in turn (``obs["batch"]``); standard deviation of the log shift of a gene in a batch.
    depth_sd
        Standard deviation of a smooth log field of the depth.
    """
    known = spots in ("tiles", "hexagonal") and color in ("kind", "same")
    if not known or not 1 <= kinds <= min(genes, len(KINDS)) or sections < 1 or size < 128:
        raise UserError(
            f"shapes: kinds={kinds}, genes={genes}, sections={sections}, size={size}, spots={spots!r}, color={color!r} cannot be simulated; need "
            f"1 <= kinds <= {len(KINDS)}, genes >= kinds, sections >= 1, size >= 128, spots tiles or hexagonal, color kind or same"
        )
    within(
        "shapes", reads=(reads, *SCALES), pitch=(pitch, 4, size / 2), noise=(noise, 0, 10), misalignment=(misalignment, 0, 10),
        occlusion=(occlusion, 0, 1), batches=(batches, 1, 1000), batch_sd=(batch_sd, 0, 5), depth_sd=(depth_sd, 0, 5),
    )  # fmt: skip
    rng = np.random.default_rng([seed, 0])
    profiles = reads * (np.eye(kinds) if genes == kinds else rng.dirichlet(np.full(genes, 0.2), kinds))
    shift = np.where(np.arange(batches)[:, None] > 0, batch_sd * rng.standard_normal((batches, genes)), 0.0)
    centers, radius = _tiles(size) if spots == "tiles" else _hexagons(size, pitch)
    made = []
    for n in range(sections):
        own = np.random.default_rng([seed, 1, n])
        kind = _place(size, kinds, own)
        depth = np.exp(depth_sd * _field(size, own) - depth_sd**2 / 2)
        angle = own.uniform(0, 2 * np.pi)
        true = centers + misalignment * radius * np.array([np.cos(angle), np.sin(angle)])
        emission = np.vstack([np.zeros(genes), profiles])[kind.ravel()] * depth.reshape(-1, 1) * np.exp(shift[n % batches])
        label = label_spots((size, size), true, radius, square=spots == "tiles").ravel()
        member = sp.csr_matrix((np.ones(label.size), (label, np.arange(label.size))), shape=(len(centers) + 1, label.size))
        counts = own.poisson((member @ emission)[1:]).astype(np.float32)
        obs = pd.DataFrame({"batch": f"batch{n % batches}"}, index=[f"section{n}-{k}" for k in range(len(centers))])
        names = [f"{KINDS[k]}_marker" for k in range(kinds)] if genes == kinds else [f"gene{g:04d}" for g in range(genes)]
        adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))
        adata.obsm["spatial"], adata.uns["source"] = centers.copy(), f"simulated: shapes, seed {seed}, section {n}"
        image, hidden = _paint(kind, color, noise, occlusion, own)
        made.append(ShapeSection(adata, image, kind, depth, hidden))
    settings: dict[str, Any] = {"scale": 1.0, "radius": float(radius), "spot": "square" if spots == "tiles" else "disc", "mask": ("none",)}
    settings |= {"background": False, "check": False, "min_counts": 0, "min_gene_counts": 0, "covariates": ("batch",) if batches > 1 else ()}
    return Shapes(tuple(made), profiles, settings)


def _tiles(size: int) -> tuple[NDArray[np.float64], float]:
    """Middles of 4 x 4 squares that cover the canvas, and half of their side."""
    at = (np.arange(4) + 0.5) * size / 4
    return np.stack(np.meshgrid(at, at), -1).reshape(-1, 2), size / 8


def _hexagons(size: int, pitch: float) -> tuple[NDArray[np.float64], float]:
    """Spots of diameter 0.55 pitches on a hexagonal grid, all wholly on the canvas."""
    rows = np.arange(pitch / 2, size - pitch / 2 + 1e-9, pitch * np.sqrt(0.75))
    found = [(x, y) for k, y in enumerate(rows) for x in np.arange(pitch / 2 * (1 + k % 2), size - pitch / 2 + 1e-9, pitch)]
    return np.array(found), 0.275 * pitch


def _place(size: int, kinds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Kind of every pixel, 0 for none."""
    from scipy.ndimage import binary_dilation

    canvas = np.zeros((size + 2 * GAP, size + 2 * GAP), np.int64)
    for _ in range(ATTEMPTS):
        which = int(rng.integers(kinds))
        length = rng.uniform(*((12, 32), (12, 30), (28, 64), (10, 20), (16, 32))[which])
        shape = _draw(KINDS[which], length, rng.uniform(0, 2 * np.pi))
        shape = np.pad(shape, GAP)
        near = binary_dilation(shape, np.ones((3, 3), bool), iterations=GAP)
        for _ in range(TRIES):
            top, left = (int(rng.integers(0, len(canvas) - side + 1)) for side in shape.shape)
            window = canvas[top : top + shape.shape[0], left : left + shape.shape[1]]
            if not window[near].any():
                window[shape] = which + 1
                break
    return canvas[GAP:-GAP, GAP:-GAP].copy()


def _draw(kind: str, length: float, angle: float) -> NDArray[np.bool_]:
    """A shape in its bounding square."""
    reach = int(np.ceil(length * (2.7 if kind == "rectangle" else 1.0)))
    i, j = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    if kind in ("circle", "ring"):
        square = i**2 + j**2
        inside = (square <= length**2) & ((square >= (0.55 * length) ** 2) | (kind == "circle"))
    elif kind == "triangle":  # of side `length`, middle of gravity in the middle
        inside = np.ones(i.shape, bool)
        for corner in angle + 2 * np.pi / 3 * np.arange(3):
            inside &= j * np.cos(corner) + i * np.sin(corner) <= length / (2 * np.sqrt(3))
    else:
        u, v = (j * np.cos(angle) + i * np.sin(angle), i * np.cos(angle) - j * np.sin(angle)) if kind == "rectangle" else (j, i)
        inside = (np.abs(u) <= length * (2.5 if kind == "rectangle" else 1)) & (np.abs(v) <= length)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    return np.asarray(inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _field(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A smooth random field of mean 0 and variance 1 over the canvas."""
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.standard_normal((size, size)), size / 8, mode="wrap")
    return np.asarray((field - field.mean()) / field.std())


def _paint(
    kind: NDArray[np.int64], color: str, noise: float, occlusion: float, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    palette = np.vstack([np.full(3, GLASS), COLORS if color == "kind" else np.broadcast_to(COLORS[0], COLORS.shape)])
    image = palette[kind]
    squares = -(-len(kind) // OCCLUDED)
    grid = rng.uniform(size=(squares, squares)) < occlusion
    hidden = np.kron(grid, np.ones((OCCLUDED, OCCLUDED), bool))[: len(kind), : len(kind)].astype(bool)
    image[hidden] = image.reshape(-1, 3).mean(0)
    image = image + noise * rng.standard_normal(image.shape)
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8), hidden

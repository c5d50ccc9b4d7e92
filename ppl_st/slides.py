"""Where a section's counts and image come from: AnnData with an image file, a Space Ranger folder, a SpatialData store."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.images import VISIUM_RADIUS, VISIUM_SPOT, Slide, Source, image_size
from ppl_st.io import read_adata

__all__ = ["positions", "read_slide", "read_slides"]


def read_slides(
    targets: Sequence[str | Path | ad.AnnData], images: Sequence[Source | None], *, layer: str | None = None, gene_key: str | None = None
) -> list[Slide]:
    """One `read_slide` per target; images are none at all (each target carries its own) or one each. Names are made unique."""
    if images and len(images) != len(targets):
        raise UserError(
            f"{len(targets)} --target but {len(images)} --image: give one image per target, in the same order (none where each carries its own)"
        )
    slides: list[Slide] = []
    for target, image in zip(targets, images or [None] * len(targets), strict=True):
        slide = read_slide(target, image, layer=layer, gene_key=gene_key)
        taken = [one.name for one in slides]
        number = 2
        name = slide.name
        while name in taken:
            name, number = f"{slide.name}-{number}", number + 1
        slides.append(slide._replace(name=name))
    return slides


def read_slide(
    target: str | Path | ad.AnnData, image: Source | None, *, layer: str | None = None, gene_key: str | None = None
) -> Slide:
    """One section from an AnnData (object, ``.h5ad``, ``.zarr``), a Space Ranger ``outs`` folder or a SpatialData ``.zarr``.

    An AnnData in scanpy's convention (``uns["spatial"]``) tells spot size and scale, and its hires image serves where ``image`` is None; a given
    image may be the full-resolution one, or of the size of the stored hires or lowres one.
    """
    if isinstance(target, str | Path):
        path = Path(target)
        if path.is_dir() and path.suffix.lower() != ".zarr":
            from ppl_st.spaceranger import read_spaceranger

            return read_spaceranger(path, image, layer=layer, gene_key=gene_key)
        if path.suffix.lower() == ".zarr" and (path / "images").is_dir():
            from ppl_st.spatialdata_zarr import read_spatialdata

            return read_spatialdata(path, image, layer=layer, gene_key=gene_key)
    adata = read_adata(target, role="target")
    file = None if isinstance(target, ad.AnnData) else str(target)
    name = "section" if file is None else Path(file).stem
    counts = read_counts(adata, role="target", layer=layer, gene_key=gene_key, file=file)
    told = _scanpy(adata)
    if image is not None:
        return Slide(name, counts, image, _scale_of(image, told), told.radius, told.micron, told.square)
    for key in ("hires", "lowres"):
        if key in told.images and f"tissue_{key}_scalef" in told.factors:
            scale = float(told.factors[f"tissue_{key}_scalef"])
            return Slide(name, counts, np.asarray(told.images[key]), scale, told.radius, told.micron, told.square)
    raise UserError(
        f"target ({name}): it carries no image (uns['spatial'][...]['images']['hires']); give one with --image, in whose pixels obsm['spatial'] is"
    )


def positions(source: str | Path | ad.AnnData) -> tuple[np.ndarray, np.ndarray, float | None, bool | None]:
    """Names [n], coordinates [n, 2], radius and whether they are squares (None: it does not say) of any AnnData, whatever its counts."""
    adata = read_adata(source, role="target")
    if "spatial" not in adata.obsm:
        raise UserError("target: no obsm['spatial']; predictions of spots need their positions in the coordinates of the section")
    xy = np.asarray(adata.obsm["spatial"], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] < 2 or not np.isfinite(xy[:, :2]).all() or not len(xy):
        raise UserError(f"target: obsm['spatial'] has shape {xy.shape} or values that are not finite; it must be x and y of at least one spot")
    told = _scanpy(adata)
    return np.asarray(adata.obs_names, dtype=str), xy[:, :2], told.radius, None if told.radius is None else told.square


class _Told(NamedTuple):
    """What ``uns["spatial"]`` says in scanpy's convention: micrometers per pixel, scale factors and images; bins of Visium HD are squares."""

    radius: float | None
    micron: float
    square: bool
    factors: dict[str, Any]
    images: dict[str, Any]


def _scanpy(adata: ad.AnnData) -> _Told:
    """``uns["spatial"]`` where it has exactly one library."""
    libraries = adata.uns.get("spatial", {})
    library = next(iter(libraries.values())) if isinstance(libraries, dict) and len(libraries) == 1 else None
    library = library if isinstance(library, dict) else {}
    factors, images = library.get("scalefactors", {}), library.get("images", {})
    if "microns_per_pixel" in factors and "bin_size_um" in factors:  # HD, whose spot_diameter_fullres is the bin
        micron = float(factors["microns_per_pixel"])
        return _Told(float(factors["bin_size_um"]) / 2 / micron, micron, True, factors, images)
    if "spot_diameter_fullres" not in factors:
        return _Told(None, float("nan"), False, factors, images)
    micron = VISIUM_SPOT / float(factors["spot_diameter_fullres"])
    return _Told(VISIUM_RADIUS / micron, micron, False, factors, images)


def _scale_of(image: Source, told: _Told) -> float:
    """Pixels of a given image per coordinate: that of the stored image of its size, else it is the one in whose pixels coordinates are."""
    for key in ("hires", "lowres"):
        stored = told.images.get(key)
        if stored is not None and f"tissue_{key}_scalef" in told.factors and np.shape(stored)[:2] == image_size(image):
            return float(told.factors[f"tissue_{key}_scalef"])
    return 1.0

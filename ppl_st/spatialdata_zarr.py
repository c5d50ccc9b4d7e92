"""A SpatialData ``.zarr`` store -> `Slide`, with the package ``spatialdata`` (extra ``spatialdata``).

Needed: one table with counts, one shapes element (or points of the table's region) with the spots, one image. Where there are several,
the table's ``region`` names the shapes, and the image is the one with most pixels unless one is given by name.

Circles are the spots, except where spatialdata-io made them from a Space Ranger folder of Visium: then their size is Space Ranger's.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.images import VISIUM_RADIUS, VISIUM_SPOT, Slide, Source
from ppl_st.spatial import spot_pitch

__all__ = ["read_spatialdata"]

VISIUM_CIRCLE = VISIUM_SPOT / 2 / 100  # radius over pitch: spots are 100 um apart


def read_spatialdata(path: Path, image: Source | None = None, *, layer: str | None = None, gene_key: str | None = None) -> Slide:
    """Counts with the centers of their circles in pixels of the image, and the image at its full resolution.

    ``image`` may name an image element of the store. Both elements are brought into the image's own pixels by their transformations.
    """
    try:
        import spatialdata
        from spatialdata.transformations import get_transformation_between_coordinate_systems
    except ImportError as error:
        raise UserError(f"{path}: a SpatialData store needs one more package: pip install 'ppl-st[spatialdata]'") from error
    store: Any = spatialdata.read_zarr(path)
    tables = list(store.tables)
    if len(tables) != 1 or not len(store.images):
        raise UserError(f"{path}: holds {len(tables)} tables and {len(store.images)} images; one table and at least one image are needed")
    table = store.tables[tables[0]]
    attributes = table.uns.get("spatialdata_attrs", {})
    region, key = attributes.get("region"), attributes.get("instance_key")
    if isinstance(region, list) and len(region) == 1:
        region = region[0]
    if not isinstance(region, str) or region not in store.shapes:
        raise UserError(f"{path}: its table annotates {region!r}; one shapes element (circles) is needed per section: split the store")
    name = str(image) if image is not None and str(image) in store.images else _largest(store)
    shapes = store.shapes[region]
    matrix = get_transformation_between_coordinate_systems(store, shapes, store.images[name]).to_affine_matrix(("x", "y"), ("x", "y"))
    rows = shapes.loc[table.obs[key].to_numpy()]
    xy = np.stack([rows.geometry.centroid.x, rows.geometry.centroid.y], 1) @ matrix[:2, :2].T + matrix[:2, 2]
    adata = table.copy()
    adata.obsm["spatial"] = xy
    counts = read_counts(adata, role="target", layer=layer, gene_key=gene_key, file=str(path))
    grow = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))
    square, micron = False, float("nan")
    if "radius" in rows:
        size = rows["radius"].to_numpy(float)
        told = grow * float(np.median(size))
        known = len(xy) > 1 and {"array_row", "array_col"} <= set(table.obs)
        if known and abs(told / spot_pitch(xy) / VISIUM_CIRCLE - 1) < 0.1:  # circles in place of the bins of HD touch
            micron = VISIUM_SPOT / 2 / told
            size = size * VISIUM_RADIUS / (VISIUM_SPOT / 2)
    else:  # polygons: bins are squares, whose half side is the radius; others count as discs of their area
        area = rows.geometry.area.to_numpy(float)
        left, top, right, bottom = rows.geometry.bounds.to_numpy(float).T
        square = bool(np.allclose(area, (right - left) ** 2, rtol=0.1) and np.allclose(area, (bottom - top) ** 2, rtol=0.1))
        size = np.sqrt(area / (4 if square else np.pi))
    pixels = image if image is not None and name != str(image) else _pixels(store.images[name])
    return Slide(path.stem, counts, pixels, 1.0, grow * float(np.median(size)), micron, square)


def _pixels(element: Any) -> np.ndarray:
    """[H, W, channels] of an image element at its full resolution."""
    single = element["scale0"]["image"] if hasattr(element, "children") else element
    return np.asarray(single.transpose("y", "x", "c"))


def _largest(store: Any) -> str:
    def size(name: str) -> int:
        element = store.images[name]
        return int((element["scale0"]["image"] if hasattr(element, "children") else element).size)

    return str(max(store.images, key=size))

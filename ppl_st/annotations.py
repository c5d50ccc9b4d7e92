"""Annotations of a section: named regions from GeoJSON polygons, a label image or the labels of the spots, as [H, W] int64."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st.errors import UserError
from ppl_st.images import read_labels

__all__ = ["regions_from_geojson", "regions_from_image", "regions_from_spots"]

Regions = tuple[NDArray[np.int64], tuple[str, ...]]


def regions_from_geojson(path: Path, shape: tuple[int, int], scale: float, origin: NDArray[np.float64]) -> Regions:
    """Polygons and multipolygons of a GeoJSON file, in coordinates of the slide; later ones lie on top, holes stay open.

    A region is named by ``properties.classification.name`` (QuPath), ``properties.name``, ``properties.label`` or its number; features of one name
    are one region. Pixel coordinates are (coordinates - ``origin``) * ``scale``.
    """
    from skimage.draw import polygon

    try:
        polygons = list(_polygons(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise UserError(f"annotation {path}: cannot be read as GeoJSON ({type(error).__name__}: {error})") from error
    label = np.zeros(shape, np.int64)
    names = list(dict.fromkeys(name for name, _ in polygons))
    for name, rings in polygons:
        inside = np.zeros(shape, bool)
        for hole, ring in enumerate(rings):
            x, y = ((ring - origin) * scale).T
            inside[polygon(y - 0.5, x - 0.5, shape)] = hole == 0
        label[inside] = names.index(name) + 1
    return _nonempty(label, tuple(names), f"annotation {path}", "its polygons must be in the coordinates of obsm['spatial']")


def _polygons(content: Any) -> Iterator[tuple[str, list[NDArray[np.float64]]]]:
    """Name and rings [k, 2] of every polygon of a GeoJSON object."""
    features = content if isinstance(content, list) else content.get("features", [content])
    for number, feature in enumerate(features, start=1):
        geometry = feature.get("geometry", feature) or {}
        kind = geometry.get("type")
        if kind in ("Polygon", "MultiPolygon"):
            name = _feature_name(feature.get("properties") or {}, number)
            for rings in [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]:
                yield name, [np.asarray(ring, np.float64)[:, :2] for ring in rings]


def _feature_name(properties: dict[str, Any], number: int) -> str:
    classification = properties.get("classification")
    named = classification.get("name") if isinstance(classification, dict) else classification
    return str(named or properties.get("name") or properties.get("label") or number)


def regions_from_image(path: Path, shape: tuple[int, int], box: tuple[int, int, int, int]) -> Regions:
    """A label image over the whole image of the slide (any resolution): values 1, 2, ... are regions named by their value, 0 is none.

    ``shape`` is that of the whole image at the working resolution, ``box`` (top, bottom, left, right) the part kept.
    """
    whole = read_labels(path, shape)[box[0] : box[1], box[2] : box[3]]
    values = np.unique(whole[whole > 0])
    label = np.where(whole > 0, np.searchsorted(values, whole) + 1, 0)
    return _nonempty(label, tuple(str(value) for value in values), f"annotation {path}", "it is 0 wherever the section is")


def regions_from_spots(values: pd.Series, label: NDArray[np.int64]) -> Regions:
    """The pixels of every spot get the region of its value; missing values are none. ``label`` [H, W] holds spot k as k + 1."""
    codes, names = pd.factorize(values.astype("object"), sort=True)
    return np.append(0, codes + 1)[label * (label <= len(codes))], tuple(str(name) for name in names)


def _nonempty(label: NDArray[np.int64], names: tuple[str, ...], where: str, remedy: str) -> Regions:
    """The regions that have a pixel."""
    if not label.any():
        raise UserError(f"{where}: no region covers a pixel of the section; {remedy}")
    present = np.unique(label[label > 0])
    return np.where(label > 0, np.searchsorted(present, label) + 1, 0), tuple(names[k - 1] for k in present)

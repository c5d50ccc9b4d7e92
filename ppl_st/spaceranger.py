"""A Space Ranger ``outs`` folder -> `Slide`: versions 1 to 3, Visium and (with pyarrow) one bin size of Visium HD.

    filtered_feature_bc_matrix.h5                  counts; genes of one name are summed
    spatial/tissue_positions_list.csv              version 1: no header
    spatial/tissue_positions.csv | .parquet        from version 2: header; HD: parquet
    spatial/scalefactors_json.json                 sizes in full-resolution pixels
    spatial/tissue_hires_image.png                 the image, unless the full-resolution one is given

Coordinates are full-resolution pixels. An image that is given may be the full-resolution, the hires or the lowres one: told apart by its size.
"""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import h5py  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
from scipy import sparse

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.images import VISIUM_RADIUS, VISIUM_SPOT, Slide, Source, image_size

__all__ = ["read_spaceranger"]

COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def read_spaceranger(
    folder: Path, image: Source | None = None, *, layer: str | None = None, gene_key: str | None = None
) -> Slide:
    """The spots under tissue with their counts, and the image. See the module's docstring.

    Genes are named by their symbols, with ``gene_key`` "gene_ids" by their identifiers.

    Raises
    ------
    UserError
        Naming what the folder lacks; for a folder with several bin sizes, its names; for a layer or other names of genes.
    """
    if layer not in (None, "X") or gene_key not in (None, "gene_ids"):
        raise UserError(
            f"{folder}: layer={layer!r}, gene_key={gene_key!r}: a Space Ranger folder has one table of counts and names its genes by symbol or, with "
            "gene_key=gene_ids, by identifier; leave out others"
        )
    bins = sorted(path.name for path in folder.glob("binned_outputs/square_*"))
    if bins:
        shown = ", ".join(bins)
        raise UserError(f"{folder}: holds several bin sizes ({shown}); give one of them as target: {folder / 'binned_outputs' / bins[-1]}")
    spatial = folder / "spatial"
    factors = _factors(spatial / "scalefactors_json.json")
    table = _positions(spatial)
    adata = _matrix(folder, "features/name" if gene_key is None else "features/id")
    table = table[table["in_tissue"] == 1]
    known = adata.obs_names.intersection(table.index)
    if not len(known):
        raise UserError(f"{folder}: no barcode of the matrix is a spot under tissue in {spatial}; do both come from one run?")
    adata = adata[known].copy()
    adata.obs = table.loc[known, ["array_row", "array_col"]].copy()
    adata.obsm["spatial"] = table.loc[known, ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(np.float64)
    counts = read_counts(adata, role="target", file=str(folder))
    square = "microns_per_pixel" in factors
    if square:  # HD: square bins
        micron = factors["microns_per_pixel"]
        radius = factors["bin_size_um"] / 2 / micron
    else:
        micron = VISIUM_SPOT / factors["spot_diameter_fullres"]
        radius = VISIUM_RADIUS / micron
    name = folder.parent.name if folder.name == "outs" else folder.name
    hires = spatial / "tissue_hires_image.png"
    if image is None and not hires.is_file():
        raise UserError(f"{hires}: no such file; give the image of the section with --image")
    scale = 1.0
    for kind in ("hires", "lowres"):
        stored = spatial / f"tissue_{kind}_image.png"
        known = factors.get(f"tissue_{kind}_scalef")
        if known is not None and stored.is_file() and image_size(hires if image is None else image) == image_size(stored):
            scale = known
            break
    return Slide(name, counts, hires if image is None else image, scale, radius, micron, square)


def _positions(spatial: Path) -> pd.DataFrame:
    """One row per spot, indexed by barcode."""
    new, old, parquet = (spatial / name for name in ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet"))
    if new.is_file() or old.is_file():
        path = new if new.is_file() else old
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        # version 2 renamed the file and gave it a header; both mixtures exist
        table = pd.read_csv(path) if first.startswith("barcode") else pd.read_csv(path, header=None, names=COLUMNS)
    elif parquet.is_file():
        try:
            table = pd.read_parquet(parquet)
        except ImportError as error:
            raise UserError(f"{parquet}: reading it needs one more package: pip install pyarrow") from error
    else:
        raise UserError(
            f"{spatial}: no tissue_positions.csv, tissue_positions_list.csv or tissue_positions.parquet; give the outs folder of Space Ranger"
        )
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{spatial}: the table of positions lacks the columns {', '.join(missing)}")
    return table.set_index("barcode")


def _matrix(folder: Path, naming: str) -> ad.AnnData:
    """Gene expression of ``filtered_feature_bc_matrix.h5`` (else ``raw_...``), genes of one name (the data set ``naming``) summed."""
    path = next((folder / name for name in ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5") if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: no filtered_feature_bc_matrix.h5; give the outs folder of Space Ranger")
    try:
        with h5py.File(path) as file:
            group = file["matrix"]
            entries = tuple(group[name][:] for name in ("data", "indices", "indptr"))
            matrix = sparse.csr_matrix(entries, shape=tuple(group["shape"][:])[::-1])  # stored as genes x spots by column
            barcodes, genes, kinds = (np.asarray(group[name].asstr()[:]) for name in ("barcodes", naming, "features/feature_type"))
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a 10x matrix ({error}); is the file whole?") from error
    expression = kinds == "Gene Expression"
    names, index = np.unique(genes[expression], return_inverse=True)
    columns: Any = (np.ones(len(index), np.float32), (np.arange(len(index)), index))
    summed = sparse.csr_matrix(matrix[:, expression] @ sparse.csr_matrix(columns, shape=(len(index), len(names))))
    return ad.AnnData(summed.astype(np.float32), obs=pd.DataFrame(index=barcodes), var=pd.DataFrame(index=names))


def _factors(path: Path) -> dict[str, float]:
    """The scale factors, each a number above 0: those that are needed, and the lowres image's where there is one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give the outs folder of Space Ranger as target") from error
    found, stored = {}, stored if isinstance(stored, dict) else {}
    size = ("microns_per_pixel", "bin_size_um") if "microns_per_pixel" in stored else ("spot_diameter_fullres",)
    for key in (*size, "tissue_hires_scalef", *(("tissue_lowres_scalef",) if "tissue_lowres_scalef" in stored else ())):
        value = stored.get(key)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise UserError(f"{path}: {key} is {value!r}, not a number above 0; give the outs folder as Space Ranger wrote it")
        found[key] = float(value)
    return found

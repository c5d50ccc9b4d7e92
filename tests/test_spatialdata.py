"""A SpatialData store as target; skipped where the optional package is absent."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from test_prepare_xfuse import spaceranger, world

from ppl_st.errors import UserError
from ppl_st.slides import read_slide

pytestmark = pytest.mark.filterwarnings("ignore")


def test_counts_circles_and_image_of_a_store(tmp_path):
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (120, 200, 3), dtype=np.uint8)
    xy = np.stack(np.meshgrid(np.arange(30.0, 180, 20), np.arange(30.0, 100, 20)), -1).reshape(-1, 2)
    table = AnnData(sp.csr_matrix(rng.poisson(3.0, (len(xy), 5)).astype(np.float32)), obs=pd.DataFrame(index=[f"s{k}" for k in range(len(xy))]))
    table.var_names = list("abcde")
    table.obs["region"], table.obs["instance"] = pd.Categorical(["spots"] * len(xy)), np.arange(len(xy))
    half = Scale([2.0, 2.0], axes=("x", "y"))  # the circles lie on a grid of half the image's resolution
    store = spatialdata.SpatialData(
        images={"he": Image2DModel.parse(np.moveaxis(image, 2, 0), dims=("c", "y", "x"))},
        shapes={"spots": ShapesModel.parse(xy / 2, geometry=0, radius=3.0, index=pd.Index(np.arange(len(xy))), transformations={"global": half})},
        tables={"table": TableModel.parse(table, region="spots", region_key="region", instance_key="instance")},
    )
    store.write(tmp_path / "one.zarr")
    slide = read_slide(tmp_path / "one.zarr", None)
    assert slide.name == "one" and np.allclose(slide.counts.xy, xy) and slide.radius == pytest.approx(6.0)
    assert np.array_equal(slide.image, image) and (slide.counts.matrix != table.X).nnz == 0 and not slide.square
    from geopandas import GeoDataFrame
    from shapely import box

    bins = GeoDataFrame({"geometry": [box(x - 4, y - 4, x + 4, y + 4) for x, y in xy / 2]})
    store["spots"] = ShapesModel.parse(bins, transformations={"global": half})
    store.write(tmp_path / "bins.zarr")
    slide = read_slide(tmp_path / "bins.zarr", None)
    assert slide.square and slide.radius == pytest.approx(8.0) and np.allclose(slide.counts.xy, xy)


@pytest.mark.parametrize("made", ["space ranger", "other"])
def test_a_visium_sample_has_one_radius_and_size_as_folder_table_and_store(tmp_path, made):
    """spatialdata-io keeps Space Ranger's diameter of 65 um; circles of others are the spots."""
    spatialdata = pytest.importorskip("spatialdata")
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    adata, image, _ = world()  # a pitch of 20 pixels, Space Ranger's diameter is 13
    spaceranger(tmp_path / "outs", adata, 2, image)
    folder = read_slide(tmp_path / "outs", None)
    adata.uns["spatial"] = {"lib": {"images": {"hires": image}, "scalefactors": {"spot_diameter_fullres": 13.0, "tissue_hires_scalef": 1.0}}}
    table = read_slide(adata, None)
    bare = AnnData(adata.X, obs=pd.DataFrame({"region": pd.Categorical(["spots"] * adata.n_obs), "spot_id": np.arange(adata.n_obs)}, adata.obs_names))
    bare.var_names = adata.var_names
    if made == "space ranger":
        bare.obs["array_row"] = bare.obs["array_col"] = 0
    circles = ShapesModel.parse(adata.obsm["spatial"], geometry=0, radius=6.5, index=pd.Index(np.arange(adata.n_obs)))
    spatialdata.SpatialData(
        images={"he": Image2DModel.parse(np.moveaxis(image, 2, 0), dims=("c", "y", "x"))}, shapes={"spots": circles},
        tables={"table": TableModel.parse(bare, region="spots", region_key="region", instance_key="spot_id")},
    ).write(tmp_path / "one.zarr")  # fmt: skip
    store = read_slide(tmp_path / "one.zarr", None)
    assert (folder.radius, folder.micron) == (table.radius, table.micron) == (5.5, 5.0)
    if made == "space ranger":
        assert (store.radius, store.micron) == pytest.approx((5.5, 5.0))
    else:
        assert store.radius == pytest.approx(6.5) and np.isnan(store.micron)


def test_a_store_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spatialdata", None)
    (tmp_path / "one.zarr" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"pip install 'ppl-st\[spatialdata\]'"):
        read_slide(tmp_path / "one.zarr", None)

"""A SpatialData store as target; skipped where the optional package is absent."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

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


def test_a_store_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spatialdata", None)
    (tmp_path / "one.zarr" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"pip install 'ppl-st\[spatialdata\]'"):
        read_slide(tmp_path / "one.zarr", None)

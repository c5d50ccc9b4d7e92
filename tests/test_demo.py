"""The demonstration with small knobs: files, numbers beside the oracle, refusals."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from machine import dear
from ppl_st.data import read_counts
from ppl_st.demo import COLUMNS, ORACLE, demo, score_oracle
from ppl_st.errors import UserError

FAST = ["chains=1", "sparsity=0", "sweeps=5", "fit.steps=3"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    return out, demo(out=out, cells=350, types=3, squares=6, draws=12, overrides=FAST, say=said.append), said


def test_everything_that_is_promised_lies_there(done):
    out, _, said = done
    assert {p.name for p in (out / "data").iterdir()} == {"target.h5ad", "reference.h5ad", "truth.h5ad"}
    assert len(list((out / "figures").glob("*.png"))) == 5
    page = (out / "report.html").read_text()
    assert "@{value} um" in page  # the scale bars of the browser
    assert ORACLE in page and page.count('src="data:image/png') == 5 and "gene-browser" in page
    assert said and not [p for p in out.rglob("*") if ".tmp" in p.name]
    import ppl_st

    again = ppl_st.load(out / "run").predict(draws=2)  # genes that the cells never measured
    assert set(again.var_names) == set(ad.read_h5ad(out / "data" / "truth.h5ad").var_names)


def test_the_table_sets_the_fit_between_baselines_and_oracle(done):
    out, result, _ = done
    scores = result.scores
    assert list(scores.columns) == list(COLUMNS.values())
    ours, oracle = scores.loc["siid"], scores.loc[ORACLE]
    assert np.isfinite([ours, oracle]).all()
    assert scores.loc["baseline: spot_copy", "R2"] < ours["R2"] < oracle["R2"] + 0.02
    assert ours["log score"] < oracle["log score"] + 1e-3  # nobody beats the truth by more than chance
    assert oracle["coverage 90 %"] == pytest.approx(0.9, abs=0.01)
    stored = pd.read_csv(out / "scores.csv", index_col=0)
    np.testing.assert_allclose(stored.loc["siid"], ours)


def test_deconvolution_is_measured_against_the_true_types(done):
    _, result, _ = done
    facts = result.facts["value"]
    assert facts["cells whose largest factor is right (share)"] > 0.8
    assert 0 <= facts["spots: JS divergence of proportions (bits, mean)"] < 0.1


def test_oracle_scores_are_those_of_the_poisson_that_made_the_counts():
    rng = np.random.default_rng(0)
    rate = rng.gamma(1, 1, (4000, 2))
    import scipy.sparse as sp

    cells = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    truth = read_counts(cells, role="truth", need_spatial=False)
    table = score_oracle(truth, rate, np.ones(4000))
    x = truth.matrix.toarray()
    np.testing.assert_allclose(table["log_score"], stats.poisson.logpmf(x, rate).mean(0))
    np.testing.assert_allclose(table["coverage_90"], 0.9, atol=0.01)
    worse = score_oracle(truth, rate * 2, np.ones(4000))
    assert (worse["crps"] > table["crps"]).all() and (worse["log_score"] < table["log_score"]).all()


def test_a_used_folder_and_an_unknown_method_are_refused(done, tmp_path):
    out, _, _ = done
    with pytest.raises(UserError, match="not empty; choose another --out"):
        demo(out=out)
    with pytest.raises(UserError, match="unknown method 'vist'"):
        demo("vist", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_methods_of_images_have_no_knobs(tmp_path):
    with pytest.raises(UserError, match=r"demo xfuse: simulates .*; leave out cells, types, squares, rho, mixing$"):
        demo("xfuse", out=tmp_path / "new", cells=500, types=8, squares=4, rho=1.0, mixing=0.1)
    assert not (tmp_path / "new").exists()


def test_spatial_field_is_a_pair_over_one_state_with_its_truth():
    from ppl_st.simulate import spatial_field

    world = spatial_field(seed=3, n_cells=900, n_reference=700, n_genes=40, n_panel=15, platform_sd=0.0, theta=1e4, contrast=1.0)
    rate, x = world.truth.layers["rate"], world.truth.X.toarray()
    assert world.reference.shape == (700, 40) and "spatial" not in world.reference.obsm and world.proportions is None
    np.testing.assert_allclose(x.mean(0), rate.mean(0), rtol=0.15, atol=0.05)  # counts come from that rate
    again = spatial_field(seed=3, n_cells=900, n_reference=700, n_genes=40, n_panel=15, platform_sd=0.0, theta=1e4, contrast=1.0)
    assert (again.target.X != world.target.X).nnz == 0 and (again.reference.X != world.reference.X).nnz == 0
    # The profile of the bulk agrees between the sides when there is no platform effect; with one it does not.
    both = [np.log(np.asarray(t.X.mean(0)).ravel()[:15]) for t in (world.target, world.reference)]
    assert np.corrcoef(*both)[0, 1] > 0.97
    shifted = spatial_field(seed=3, n_cells=900, n_reference=700, n_genes=40, n_panel=15, platform_sd=1.0, theta=1e4, contrast=1.0)
    both = [np.log(np.asarray(t.X.mean(0)).ravel()[:15]) for t in (shifted.target, shifted.reference)]
    assert np.corrcoef(*both)[0, 1] < 0.95


def test_spatial_field_puts_like_beside_like_only_when_asked():
    from ppl_st.simulate import spatial_field
    from ppl_st.spatial import neighbors

    def agreement(spatial):
        world = spatial_field(seed=0, n_cells=1000, n_reference=50, n_genes=20, n_panel=10, spatial=spatial)
        rows, columns = neighbors(world.target.obsm["spatial"], 5).nonzero()
        kind = world.target.obs["type"].to_numpy()
        return (kind[rows] == kind[columns]).mean()

    assert agreement(1.0) > 0.6 and abs(agreement(0.0) - 1 / 8) < 0.04


@dear
def test_the_demo_of_a_method_with_a_cell_reference(tmp_path):
    result = demo("vista", out=tmp_path / "out", cells=150, types=3, draws=5, overrides=["fit.steps=3", "penalty=3", "reweight=false", "process=0"])
    assert {"vista", ORACLE, "baseline: ridge_z_smooth", "baseline: ensemble"} <= set(result.scores.index)
    assert result.scores.loc["vista", "coverage 90 %"] == pytest.approx(0.9, abs=0.06)
    with pytest.raises(UserError, match="squares shape the checkerboard of siid only"):
        demo("vista", out=tmp_path / "new", squares=4)

"""Two files read by one gene_key: it counts where the column is, and it must be somewhere."""

import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from ppl_st import api
from ppl_st.compare import compare
from ppl_st.errors import UserError
from ppl_st.evaluate import evaluate
from ppl_st.pairs import as_given, read_pair
from ppl_st.report_run import report_folder
from ppl_st.simulate import checkerboard, spatial_field

FAST = ["factors=3", "chains=1", "sparsity=0", "sweeps=3", "fit.steps=2", "batch_spots=0"]

torch.set_num_threads(1)


def table(genes, **var):
    made = ad.AnnData(np.ones((4, len(genes)), np.float32), var=pd.DataFrame(var, index=genes))
    made.obs_names = [f"c{i}" for i in range(4)]
    made.obsm["spatial"] = np.zeros((4, 2))
    return made


def test_a_column_names_the_genes_of_each_file_that_has_it(tmp_path):
    ids, symbols = table(["ENSG1", "ENSG2"], symbol=["Gad1", "Sst"]), table(["Gad1", "Sst"])
    for pair in ((ids, symbols), (symbols, ids), (ids, ids)):
        target, reference = read_pair(*pair, gene_key="symbol")
        assert target.genes.tolist() == reference.genes.tolist() == ["Gad1", "Sst"]
    assert read_pair(ids, symbols)[0].genes.tolist() == ["ENSG1", "ENSG2"]
    symbols.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(UserError, match=r"'symbol': neither target \(.*t\.h5ad\) nor reference \(AnnData\) has such a column"):
        read_pair(tmp_path / "t.h5ad", symbols, gene_key="symbol")


def test_columns_that_a_run_wrote_for_itself_are_not_believed_of_a_user_s_file():
    left = table(["b", "a"])
    left.obs = pd.DataFrame({"vista_shared_total": 9.0, "spaim_cluster": 1, "type": "x"}, index=left.obs_names)
    for counts in map(as_given, read_pair(left, left)):
        assert list(counts.obs) == ["type"] and counts.genes.tolist() == ["a", "b"]
    assert "spaim_cluster" in left.obs


def test_errors_name_the_file(tmp_path):
    bad = table(["a", "b"])
    bad.X = bad.X + 0.5
    bad.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(UserError, match=r"^target \(.*t\.h5ad\), X: 8 of 8 stored values"):
        read_pair(tmp_path / "t.h5ad", table(["a"]))


def elsewhere(plain):
    """The same counts in another layer, under ids; what lies in X and var_names would be refused."""
    made = ad.AnnData(plain.X * 0.3, var=pd.DataFrame({"symbol": plain.var_names}, index=[f"ENSG{name}" for name in plain.var_names]))
    made.obs_names, made.layers["molecules"], made.obsm["spatial"] = plain.obs_names, plain.X.copy(), plain.obsm["spatial"]
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bokeh")
def test_a_truth_is_read_as_the_files_of_the_fit(tmp_path):
    world = checkerboard(seed=2, n_cells=100, side=5, squares=5, n_types=3, n_genes=30, n_panel=20, contrast=1.0)
    target, reference, truth = map(elsewhere, (world.target, world.reference, world.truth))
    overrides = [*FAST, "layer=molecules", "gene_key=symbol"]
    run = api.fit("siid", target=target, reference=reference, overrides=overrides, out=tmp_path / "run")
    assert run.genes.tolist() == world.reference.var_names.tolist()
    pd.testing.assert_frame_equal(run.score(truth, draws=8), run.score(world.truth, draws=8))  # a truth of another layout is read as it is
    np.testing.assert_array_equal(run.predict(target=target, draws=8).X, run.predict(target=world.target, draws=8).X)
    assert run.arviz_groups(draws=2, truth=truth)["predictions_constant_data"]["count"].sum() > 0
    run.export(tmp_path / "p.nc", draws=2, truth=truth)
    shutil.copytree(run.folder, tmp_path / "twin")
    assert compare([run.folder, tmp_path / "twin"], truth=truth, draws=8)["genes"].iloc[0] == 10
    report_folder(run.folder, tmp_path / "r.html", truth=truth, draws=8)
    judged = evaluate(["siid"], target, reference, truth=truth, overrides=overrides, baselines=False, draws=8).scores
    assert set(judged["gene"]) == set(world.truth.var_names)


def test_a_target_may_lack_coordinates_where_the_method_does_without_but_not_have_bad_ones(tmp_path):
    world = spatial_field(seed=1, n_cells=120, n_reference=100, n_genes=24, n_panel=16, rho=3.0)
    bare, said = world.target.copy(), []
    del bare.obsm["spatial"]
    run = api.fit("spaim", target=bare, reference=world.reference, overrides=["clusters=4", "process=0"], out=tmp_path / "run", say=said.append)
    assert "no coordinates" in said[0]
    np.testing.assert_array_equal(api.load(run.folder).predict(draws=3).X, run.predict(draws=3).X)
    placed, told = api.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=4", "process=0", "smoothing=0.25"]), []
    placed.write(tmp_path / "p.h5ad", target=bare, draws=2, say=told.append)
    assert "neighbors in space are not used" in told[0]
    fast = ["graph=none", "penalty=3", "reweight=false", "process=0", "fit.steps=2"]
    assert api.fit("vista", target=bare, reference=world.reference, overrides=fast).predict(draws=2).n_vars == 8
    with pytest.raises(UserError, match="--set graph=none"):
        api.fit("vista", target=bare, reference=world.reference)
    with pytest.raises(UserError, match=r"no obsm\['spatial'\]"):
        api.fit("siid", target=bare, reference=world.target)
    bare.obsm["spatial"] = np.full((120, 2), np.nan)
    with pytest.raises(UserError, match="NaN or infinite"):
        api.fit("spaim", target=bare, reference=world.reference)


def test_a_third_coordinate_that_is_left_out_is_said():
    world = checkerboard(seed=2, n_cells=100, side=4, squares=4, n_types=2, n_genes=30, n_panel=20)
    said = []
    world.target.obsm["spatial"] = np.column_stack([world.target.obsm["spatial"], np.zeros(100)])
    with pytest.raises(UserError, match="--hold-out"):  # after the files were read
        api.fit("siid", target=world.target, reference=world.reference, hold_out=["nope"], say=said.append)
    assert any("third column" in line for line in said)


@pytest.mark.parametrize("method", ["siid", "vista", "spaim", "spagene"])
def test_a_cell_without_a_section_and_a_held_out_gene_that_cannot_be_predicted_are_refused(method):
    world = checkerboard(seed=2, n_cells=100, side=4, squares=4, n_types=2, n_genes=30, n_panel=20)
    target, reference = world.target.copy(), world.reference.copy()
    target.obs["slide"], reference.obs["slide"] = np.where(np.arange(100) % 4 > 0, "a", None), "a"
    with pytest.raises(UserError, match=r"25 of 100 cells have no value in obs column 'slide' \(library_key\)"):
        api.fit(method, target=target, reference=reference, overrides=["library_key=slide"])
    with pytest.raises(UserError, match=r"--hold-out: 1 of 2 genes are not in the reference \(AnnData\), e.g. gene0002"):
        api.fit(method, target=target, reference=reference[:, 5:].copy(), hold_out=["gene0002", "gene0007"])

"""The run: its folder, what predict returns, ArviZ and zarr exports that other people's readers read."""

import json
import shutil
import warnings
from dataclasses import replace

import anndata as ad
import matplotlib
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr

import ppl_st.api as api
from ppl_st import refit
from ppl_st.calibration import LEVELS
from ppl_st.conformal import KNOTS, Recalibration
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard

matplotlib.use("Agg")
torch.set_num_threads(1)
FAST = ["factors=4", "chains=2", "sparsity=0.0", "sweeps=4", "fit.steps=4"]
LAYERS = {"rate_mean", "rate_sd", "count_sd", "between_sd", "q05", "q50", "q95"}


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=2, n_cells=250, side=6, squares=6, n_types=4, n_genes=40, n_panel=30, contrast=1.0)


@pytest.fixture(scope="module")
def run(sim, tmp_path_factory):
    target = sim.target.copy()
    target.obs["batch"] = "A"
    return api.fit(
        "siid",
        target=target,
        reference=sim.reference,
        overrides=FAST,
        seed=3,
        out=tmp_path_factory.mktemp("post") / "run",
    )


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "posterior.nc"
    run.export(path, draws=12)
    return path


@pytest.fixture
def quiet_arviz():
    with warnings.catch_warnings():  # other people's deprecations are not ours to fix
        warnings.simplefilter("ignore")
        import arviz

        yield arviz


def loo_pit(arviz, idata):
    """Of the library of each cell; ArviZ 1.x names what it is asked of in another way."""
    if arviz.__version__.startswith("0."):
        return np.asarray(arviz.loo_pit(idata, y="library"))
    return arviz.loo_pit(idata, var_names="library")["library"].values


# ---- the folder ----


def test_run_folder_is_complete_and_readable_by_eye(run):
    found = {path.name for path in run.folder.iterdir()}
    assert found == {
        "config.toml", "manifest.json", "genes.txt", "target.h5ad", "reference.h5ad", "fit.json", "state.pt",
        "log.jsonl", "weights.safetensors",
    }  # fmt: skip
    manifest = json.loads((run.folder / "manifest.json").read_text())
    assert (
        manifest["method"] == "siid"
        and manifest["preset"] == "default"
        and manifest["overrides"] == FAST
        and manifest["seed"] == 3
    )
    assert "torch" in manifest["versions"]
    rows = [line.split("\t") for line in (run.folder / "genes.txt").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == run.genes.tolist() and [row[1] == "1" for row in rows] == run.measured.tolist()
    record = json.loads((run.folder / "fit.json").read_text())
    assert record["status"] == "done" and record["steps"] == 4 and len(record["losses"]) == 4
    torch.load(run.folder / "state.pt", weights_only=True)  # no code in it


def test_load_refuses_what_is_no_finished_run(run, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        api.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        api.load(tmp_path / "empty")
    shutil.copytree(run.folder, tmp_path / "half")
    (tmp_path / "half" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"interrupted.*--resume"):
        api.load(tmp_path / "half")
    shutil.copytree(run.folder, tmp_path / "broken")
    (tmp_path / "broken" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json"):
        api.load(tmp_path / "broken")
    shutil.copytree(run.folder, tmp_path / "older")
    record = json.loads((run.folder / "fit.json").read_text())
    record["spec"]["an_older_name"] = 1
    (tmp_path / "older" / "fit.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"fit\.json.*an_older_name.*fit again"):
        api.load(tmp_path / "older")


def test_fit_refuses_a_used_folder(run, sim, tmp_path):
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        api.fit("siid", target=sim.target, reference=sim.reference, out=run.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        api.fit("siid", target=sim.target, reference=sim.reference, out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="not a run folder"):
        api.fit("siid", out=tmp_path, resume=True)
    lines = []
    assert api.fit("siid", out=run.folder, resume=True, say=lines.append).genes.tolist() == run.genes.tolist()
    assert lines == ["the run is already finished"]


# ---- predict ----


def test_predict_contract(run, sim):
    table = run.predict(draws=20)
    assert (
        table.var_names.tolist() == sim.truth.var_names.tolist()
        and table.obs_names.tolist() == sim.target.obs_names.tolist()
    )
    assert set(table.layers) == LAYERS and not table.var["measured"].any() and table.var["trust"].between(0, 1).all()
    assert (table.obs["batch"] == "A").all() and "factor" in table.obs
    np.testing.assert_array_equal(table.X, table.layers["rate_mean"])
    np.testing.assert_array_equal(table.obsm["spatial"], sim.target.obsm["spatial"])
    np.testing.assert_allclose(table.obsm["proportions"].sum(1), 1, rtol=1e-4)
    assert json.loads(table.uns["ppl_st"])["method"] == "siid"
    layers = {name: np.asarray(table.layers[name]) for name in LAYERS}
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in layers.values())
    assert (layers["q05"] <= layers["q50"]).all() and (layers["q50"] <= layers["q95"]).all()
    assert (layers["count_sd"] > layers["rate_sd"]).all()
    assert (
        layers["count_sd"] ** 2 >= layers["rate_sd"] ** 2 + 0.99 * layers["rate_mean"]
    ).all()  # at least Poisson noise


def test_predict_any_gene_in_any_order_and_samples(run):
    genes = ["gene0035", "gene0002"]
    table = run.predict(genes, draws=10, samples=3)
    assert table.var_names.tolist() == genes and table.var["measured"].tolist() == [False, True]
    for k in range(3):
        sample = table.layers[f"sample_{k}"]
        assert (sample == np.floor(sample)).all() and sample.sum() > 0
    assert not np.array_equal(table.layers["sample_0"], table.layers["sample_1"])
    with pytest.raises(UserError, match=r"1 of 2 genes.*nonsense.*40 genes"):
        run.predict(["gene0001", "nonsense"])


def test_predicted_file_survives_a_round_trip(run, tmp_path):
    table = run.predict(draws=4)
    table.write_h5ad(tmp_path / "imputed.h5ad")
    back = ad.read_h5ad(tmp_path / "imputed.h5ad")
    np.testing.assert_array_equal(back.layers["q95"], table.layers["q95"])
    assert back.uns["ppl_st"] == table.uns["ppl_st"]


def test_predict_new_cells(run, sim, tmp_path):
    new = sim.target[:40].copy()
    new.obs_names = [f"new{i}" for i in range(40)]
    del new.obsm["spatial"]
    new = new[:, np.random.default_rng(0).permutation(30)].copy()  # another order of genes
    new.write_h5ad(tmp_path / "new.h5ad")
    for source in (new, tmp_path / "new.h5ad"):
        table = run.predict(target=source, draws=30)
        assert table.shape == (40, 10) and table.obs_names[0] == "new0" and "spatial" not in table.obsm
    truth = sim.truth.layers["rate"][:40]
    share = lambda x: x / x.sum(1, keepdims=True)  # noqa: E731
    r = [np.corrcoef(share(table.X)[:, g], share(truth)[:, g])[0, 1] for g in range(10)]
    assert np.mean(r) > 0.5  # it uses the counts of the new cells in the right gene order
    with pytest.raises(UserError, match=r"lacks 5 of the 30 panel genes"):
        run.predict(target=sim.target[:, :25].copy())


def test_score_table(run, sim):
    shuffled = sim.truth[np.random.default_rng(0).permutation(250)].copy()  # rows are matched by name
    table = run.score(shuffled, draws=20)
    assert table.index.tolist() == sim.truth.var_names.tolist()
    assert table.columns.tolist() == [
        "mean_count",
        "log_score",
        "crps",
        *[f"coverage_{round(100 * level)}" for level in LEVELS],
    ]
    np.testing.assert_allclose(table["mean_count"], np.asarray(sim.truth.X.mean(0)).ravel(), rtol=1e-5)
    assert (table["log_score"] < 0).all() and (table["crps"] > 0).all()
    assert (np.diff(table.filter(like="coverage").to_numpy(), axis=1) >= 0).all()
    wrong = sim.truth.copy()
    wrong.X = sp.csr_matrix(sim.truth.X.toarray()[::-1])
    assert run.score(wrong, draws=20)["log_score"].mean() < table["log_score"].mean() - 0.05
    with pytest.raises(UserError, match=r"lacks 1 of the 250 cells, e\.g\. cell0"):
        run.score(sim.truth[1:].copy())


def test_recalibration_is_stored_and_widens_or_narrows_as_the_inner_genes_say(run, sim, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    mine = api.load(tmp_path / "run")
    lines = []
    done = refit.recalibrate(mine, folds=2, draws=30, say=lines.append)
    assert mine.recalibration is None and done.recalibration.genes == mine.measured.sum()
    assert len(lines) == 3 and "raw 90% intervals cover" in lines[-1]
    again = api.load(tmp_path / "run")
    assert again.recalibration == done.recalibration
    for name, values in done.inner._asdict().items():
        np.testing.assert_array_equal(getattr(again.inner, name), values)
    assert sorted(done.inner.genes) == sorted(mine.target.genes) and done.inner.log_prob.shape == (250, 30)
    genes = ["gene0035", "gene0001"]
    table, plain = again.predict(genes, draws=40), mine.predict(genes, draws=40)
    np.testing.assert_array_equal(table.X, plain.X)  # the predictive itself is untouched
    ends = again.recalibration.ends_of(again.reference_mean[[35, 1]])
    np.testing.assert_allclose(table.var["nominal_level"], ends[1] - ends[0])
    assert (table.layers["lower"] <= table.layers["q50"]).all() and (table.layers["q50"] <= table.layers["upper"]).all()
    promised = again.recalibration._replace(nominal=[0.5])
    narrow = replace(again, recalibration=promised).predict(genes, draws=40)
    assert (narrow.layers["upper"] - narrow.layers["lower"]).sum() < (table.layers["upper"] - table.layers["lower"]).sum()
    assert "lower" not in plain.layers
    nothing = replace(again, recalibration=promised._replace(nominal=[1.0])).predict(genes, draws=40)
    assert (nothing.layers["lower"] == 0).all() and np.isinf(nothing.layers["upper"]).all()  # not the range of 40 draws
    with pytest.raises(UserError, match=r"30 measured genes cannot promise a coverage of 0\.99: that needs 99"):
        refit.recalibrate(mine, level=0.99, guarantee=True)
    (tmp_path / "run" / "recalibration.json").write_text('{"nominal_from_an_older_version": 1}')
    with pytest.raises(UserError, match=r"recalibration\.json.*repeat `ppl-st recalibrate"):
        api.load(tmp_path / "run")


def test_scores_of_the_corrected_predictive(run, sim):
    """The identity changes nothing; a map that says "too wide" shortens the interval, which here is wrong and costs CRPS."""

    def judged(one):
        made = Recalibration(0.9, [], [one.tolist()], [], 30, 0.9)
        return replace(run, recalibration=made).score(sim.truth, draws=60)

    same = judged(KNOTS)
    np.testing.assert_allclose(same["recalibrated_crps"], same["crps"], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(same["recalibrated_coverage"], same["coverage_90"], rtol=1e-6)
    wide = judged(np.clip(2 * KNOTS - 0.5, 0, 1) * 0.999 + 0.001 * KNOTS)
    assert (wide["recalibrated_coverage"] < same["recalibrated_coverage"] - 0.2).all()
    assert wide["recalibrated_crps"].mean() > same["recalibrated_crps"].mean()  # this predictive was right before
    assert run.score(sim.truth, draws=60).columns.tolist()[-1] == "coverage_95"


def test_proportions(run, sim):
    spots = run.proportions(draws=30)
    assert spots.shape == (36, 4) and spots.obs_names.tolist() == sim.reference.obs_names.tolist()
    np.testing.assert_allclose(spots.X.sum(1), 1, rtol=1e-3)
    assert (spots.layers["q05"] <= spots.layers["q95"]).all() and (spots.layers["sd"] > 0).any()
    assert spots.varm["profile"].shape == (4, 40)
    np.testing.assert_allclose(spots.varm["profile"].sum(1), 1, rtol=1e-3)


def test_write_samples(run, tmp_path):
    run.write_samples(tmp_path / "s.zarr", ["gene0035", "gene0001", "gene0036"], draws=5)
    group = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")
    counts = group["count"][:]
    assert counts.shape == (5, 250, 3) and (counts == np.floor(counts)).all()
    assert (
        group.attrs["genes"] == ["gene0035", "gene0001", "gene0036"]
        and group.attrs["cells"] == run.target.names.tolist()
    )
    mean = run.predict(["gene0035", "gene0001", "gene0036"], draws=40).X
    assert np.corrcoef(counts.mean(0).ravel(), mean.ravel())[0, 1] > 0.8  # rows and columns are where they belong
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr"]


# ---- ArviZ ----

DIMS = {
    "posterior_predictive": {"x": ("chain", "draw", "cell", "panel_gene"), "library": ("chain", "draw", "cell")},
    "observed_data": {"x": ("cell", "panel_gene"), "library": ("cell",)},
    "predictions": {"count": ("chain", "draw", "cell", "gene"), "rate": ("chain", "draw", "cell", "gene")},
    "log_likelihood": {"library": ("chain", "draw", "cell")},
    "constant_data": {"spatial": ("cell", "axis"), "measured": ("any_gene",)},
}


def test_export_is_what_arviz_reads(run, sim, exported, quiet_arviz):
    idata = quiet_arviz.from_netcdf(exported)
    for group, variables in DIMS.items():
        frame = idata[group]
        for name, dims in variables.items():
            assert frame[name].dims == dims, (group, name)
            assert np.isfinite(frame[name].values).all()
    posterior = idata["posterior"]
    assert posterior["xi"].dims == ("chain", "draw", "factor", "any_gene") and posterior["xi"].shape == (
        2,
        12,
        4,
        40,
    )
    assert posterior["log_phi"].dims == ("chain", "draw", "any_gene")
    assert posterior["any_gene"].values.tolist() == run.genes.tolist()
    assert idata["predictions"]["gene"].values.tolist() == sim.truth.var_names.tolist()
    assert idata["observed_data"]["cell"].values.tolist() == run.target.names.tolist()
    observed = sim.target[:, idata["observed_data"]["panel_gene"].values.tolist()].X.toarray()
    np.testing.assert_array_equal(idata["observed_data"]["x"].values, observed)
    np.testing.assert_array_equal(idata["constant_data"]["measured"].values.astype(bool), run.measured)
    np.testing.assert_allclose(idata["constant_data"]["spatial"].values, sim.target.obsm["spatial"])
    for group in [*DIMS, "posterior"]:
        attrs = idata[group].attrs
        assert (
            attrs["method"] == "siid"
            and attrs["inference_library"] == "pyro"
            and json.loads(attrs["manifest"])["seed"] == 3
        )
        assert attrs["inference_library_version"] and attrs["creation_library_version"]


def test_summary_and_ppc_plot_work(exported, quiet_arviz):
    idata = quiet_arviz.from_netcdf(exported)
    table = quiet_arviz.summary(idata, var_names=["log_phi"], kind="stats")
    assert len(table) == 40 and np.isfinite(table["mean"]).all()
    old = quiet_arviz.__version__.startswith("0.")
    assert (quiet_arviz.plot_ppc(idata, num_pp_samples=5) if old else quiet_arviz.plot_ppc_dist(idata, num_samples=5)) is not None
    matplotlib.pyplot.close("all")


def test_arviz_checks_run_on_the_export(run, tmp_path, quiet_arviz):
    """Bayesian p-values of the counts, and LOO-PIT of the library of a cell, with weights that leave out the cell's own counts."""
    run.export(tmp_path / "p.nc", draws=20)
    idata = quiet_arviz.from_netcdf(tmp_path / "p.nc")
    if quiet_arviz.__version__.startswith("0."):
        for kind in ("p_value", "u_value", "t_stat"):
            assert quiet_arviz.plot_bpv(idata, var_names=["x"], kind=kind) is not None
        assert quiet_arviz.plot_ppc(idata, var_names=["library"], num_pp_samples=5) is not None
        assert quiet_arviz.plot_loo_pit(idata, y="library") is not None
    else:
        assert quiet_arviz.plot_ppc_tstat(idata, var_names=["x"]) is not None
        assert quiet_arviz.plot_ppc_dist(idata, var_names=["library"], num_samples=5) is not None
        assert quiet_arviz.plot_ppc_pit(idata, var_names=["library"]) is not None
    pit = loo_pit(quiet_arviz, idata)
    assert pit.shape == (250,) and ((pit >= 0) & (pit <= 1)).all() and 0.3 < pit.mean() < 0.7
    matplotlib.pyplot.close("all")


def test_log_likelihood_of_held_out_genes(run, sim, tmp_path, quiet_arviz):
    run.export(tmp_path / "held.nc", draws=20, truth=sim.truth)
    idata = quiet_arviz.from_netcdf(tmp_path / "held.nc")
    held = idata["predictions"]["log_likelihood"]
    assert held.dims == ("chain", "draw", "cell") and held.shape == (2, 20, 250)
    score = run.score(sim.truth, draws=60)["log_score"].sum()  # of the mixture over draws, gene by gene: not less
    assert score - 6 < held.values.mean() < score
    np.testing.assert_array_equal(idata["predictions_constant_data"]["count"].values, sim.truth.X.toarray())
    assert idata["predictions_constant_data"]["count"].dims == idata["predictions"]["count"].dims[2:]
    np.testing.assert_array_equal(idata["log_likelihood"]["library"].values, run.to_arviz(draws=20)["log_likelihood"]["library"].values)
    assert loo_pit(quiet_arviz, idata).shape == (250,)  # a truth takes nothing away from the checks of the fit
    loo = quiet_arviz.loo(idata)
    assert np.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    with pytest.raises(UserError, match="none of its 30 genes is unmeasured"):
        run.to_arviz(draws=2, truth=sim.target)


def test_export_in_memory_equals_file(run, exported, quiet_arviz):
    one, two = run.to_arviz(draws=12), quiet_arviz.from_netcdf(exported)
    for group in DIMS:
        for name in DIMS[group]:
            np.testing.assert_array_equal(one[group][name].values, two[group][name].values)


def test_predictions_and_predict_agree(run, exported, quiet_arviz):
    """The same posterior by two ways."""
    rate = quiet_arviz.from_netcdf(exported)["predictions"]["rate"].values.mean((0, 1))
    assert np.corrcoef(rate.ravel(), run.predict(draws=60).X.ravel())[0, 1] > 0.95
    fitted = quiet_arviz.from_netcdf(exported)
    x, simulated = (
        fitted["observed_data"]["x"].values,
        fitted["posterior_predictive"]["x"].values.mean((0, 1)),
    )
    assert simulated.sum() == pytest.approx(x.sum(), rel=0.1)
    # log p of a cell given a draw, against the log score of its genes one by one
    score = run.score(run.target, draws=60)["log_score"].sum()
    assert fitted["log_likelihood"]["library"].values.mean() == pytest.approx(score, rel=0.1)


def test_zarr_export_is_readable_by_xarray(run, tmp_path, quiet_arviz):
    import xarray as xr

    run.export(tmp_path / "posterior.zarr", draws=3)
    tree = xr.open_datatree(tmp_path / "posterior.zarr", engine="zarr", consolidated=False)
    assert set(tree.children) == {*DIMS, "posterior"}
    assert tree["posterior"]["xi"].shape == (2, 3, 4, 40)
    one = xr.open_zarr(tmp_path / "posterior.zarr", group="predictions", consolidated=False)
    assert one["count"].dims == ("chain", "draw", "cell", "gene")
    tree.close()


def test_export_refuses_other_formats_and_leaves_nothing(run, tmp_path):
    with pytest.raises(UserError, match=r"posterior\.nc"):
        run.export(tmp_path / "posterior.txt")
    assert not list(tmp_path.iterdir())


def test_run_in_memory_has_no_folder(sim):
    run = api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST)
    assert run.folder is None and run.record["status"] == "done"


def test_hold_out(sim):
    held = ["gene0003", "gene0007"]
    run = api.fit("siid", target=sim.target, reference=sim.reference, hold_out=held, overrides=FAST)
    assert not run.measured[np.isin(run.genes, held)].any() and run.measured.sum() == 28
    truth = sim.target[:, held].copy()
    assert np.isfinite(run.score(truth, draws=5).to_numpy()).all()
    with pytest.raises(UserError, match="not in the target"):
        api.fit("siid", target=sim.target, reference=sim.reference, hold_out=["gene0039"], overrides=FAST)


def test_log_normalised_means_use_the_genes_shared_with_the_reference():
    """Genes that only the target has are no part of the depth by which scores normalise."""
    from ppl_st.data import read_counts
    from ppl_st.posterior import _factor

    table = ad.AnnData(sp.csr_matrix(np.array([[1, 1, 90], [2, 2, 0], [4, 4, 7]], np.float32)))
    table.obs_names, table.var_names = ["a", "b", "c"], ["g0", "g1", "g2"]
    table.obsm["spatial"] = np.random.default_rng(0).random((3, 2))
    np.testing.assert_allclose(_factor(read_counts(table, role="target"), np.array(["g0", "g1", "other"])), [2, 1, 0.5])


def test_streamed_export_holds_the_same_draws(run, sim, tmp_path, monkeypatch, quiet_arviz):
    """Block by block along the cells: the same numbers as in memory, one block at a time, readable lazily and as InferenceData."""
    import xarray as xr

    from ppl_st import export

    monkeypatch.setattr(export, "BLOCK_CELLS", 40)
    whole = run.arviz_groups(draws=5, max_cells=None, truth=sim.truth)
    held, empty = [], export._Plan.empty
    monkeypatch.setattr(export._Plan, "empty", lambda self, cells: held.append(cells) or empty(self, cells))
    monkeypatch.setattr(export, "STREAMED_BYTES", 0)
    monkeypatch.setattr(export, "MAX_BYTES", 0)
    said = []
    run.export(tmp_path / "p.zarr", draws=5, max_cells=None, truth=sim.truth, say=said.append)
    assert max(held) < 60 and sum(held) == 250 and said[0].startswith("250 cells, 2 x 5 draws")
    tree = xr.open_datatree(tmp_path / "p.zarr", engine="zarr", consolidated=False)
    assert set(tree.children) == set(whole)
    for name, frame in whole.items():
        other = tree[name].to_dataset()
        assert all(other[v].encoding["chunks"][x.dims.index("cell")] == 40 for v, x in frame.data_vars.items() if "cell" in x.dims)
        if "cell" in frame.dims:
            other = other.sel(cell=frame["cell"].values)
        for variable in frame.data_vars:
            np.testing.assert_array_equal(other[variable].values, frame[variable].values)
    assert json.loads(tree["predictions"].attrs["manifest"])["seed"] == 3
    if quiet_arviz.__version__.startswith("0."):  # ArviZ 1.x wants more draws than these
        idata = quiet_arviz.InferenceData.from_datatree(tree)
        assert loo_pit(quiet_arviz, idata.load() or idata).shape == (250,)
    tree.close()
    with pytest.raises(UserError, match=r"too many to hold.*\.zarr"):
        run.export(tmp_path / "p.nc", draws=5, max_cells=None)

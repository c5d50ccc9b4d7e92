"""ArviZ and zarr exports of a run, which other people's readers read."""

import json
import warnings

import matplotlib
import numpy as np
import pytest
import torch

from posterior_problems import small_run, small_sim
from ppl_st.errors import UserError

matplotlib.use("Agg")
torch.set_num_threads(1)
sim = pytest.fixture(small_sim, scope="module")
run = pytest.fixture(small_run, scope="module")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "posterior.nc"
    run.export(path, draws=20)
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
        20,
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


def test_arviz_checks_run_on_the_export(exported, quiet_arviz):
    """Bayesian p-values of the counts, and LOO-PIT of the library of a cell, with weights that leave out the cell's own counts."""
    idata = quiet_arviz.from_netcdf(exported)
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


def test_log_likelihood_of_held_out_genes(run, sim, exported, tmp_path, quiet_arviz):
    run.export(tmp_path / "held.nc", draws=20, truth=sim.truth)
    idata = quiet_arviz.from_netcdf(tmp_path / "held.nc")
    held = idata["predictions"]["log_likelihood"]
    assert held.dims == ("chain", "draw", "cell") and held.shape == (2, 20, 250)
    score = run.score(sim.truth, draws=60)["log_score"].sum()  # of the mixture over draws, gene by gene: not less
    assert score - 6 < held.values.mean() < score
    np.testing.assert_array_equal(idata["predictions_constant_data"]["count"].values, sim.truth.X.toarray())
    assert idata["predictions_constant_data"]["count"].dims == idata["predictions"]["count"].dims[2:]
    plain = quiet_arviz.from_netcdf(exported)["log_likelihood"]["library"]
    assert "compare" in quiet_arviz.from_netcdf(exported)["log_likelihood"].attrs["note"]
    np.testing.assert_array_equal(idata["log_likelihood"]["library"].values, plain.values)
    assert loo_pit(quiet_arviz, idata).shape == (250,)  # a truth takes nothing away from the checks of the fit
    loo = quiet_arviz.loo(idata)
    assert np.isfinite(loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd)
    with pytest.raises(UserError, match="none of its 30 genes is unmeasured"):
        run.to_arviz(draws=2, truth=sim.target)


def test_export_in_memory_equals_file(run, exported, quiet_arviz):
    one, two = run.to_arviz(draws=20), quiet_arviz.from_netcdf(exported)
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
    score = run.score(run.target, genes=run.target.genes.tolist(), draws=60)["log_score"].sum()
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


def test_streamed_export_holds_the_same_draws(run, sim, tmp_path, monkeypatch, quiet_arviz):
    """Block by block along the cells: the same numbers as in memory, one block at a time, readable lazily and as InferenceData."""
    import xarray as xr

    from ppl_st import export

    monkeypatch.setattr(export, "BLOCK_CELLS", 40)
    whole = run.arviz_groups(draws=5, max_cells=None, truth=sim.truth)
    held, empty = [], export._Plan.empty
    monkeypatch.setattr(export._Plan, "empty", lambda self, cells: held.append(cells) or empty(self, cells))
    posteriors, posterior = [], export._posterior
    monkeypatch.setattr(export, "_posterior", lambda *given: posteriors.append(posterior(*given)) or posteriors[-1])
    monkeypatch.setattr(export, "STREAMED_BYTES", 0)
    monkeypatch.setattr(export, "MAX_BYTES", 0)
    said = []
    run.export(tmp_path / "p.zarr", draws=5, max_cells=None, truth=sim.truth, say=said.append)
    assert max(held) < 60 and sum(held) == 250 and said[0].startswith("250 cells, 2 x 5 draws")
    assert len(posteriors) == 1  # not once for every block
    assert export._Plan(run, 5, 0, 1, None).size > sum(one.nbytes for one in posteriors[0].data_vars.values())
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

"""Several seeds of one fit as one run: stored, resumed, and what differs between them is seen in predictions, scores, ArviZ and report."""

import json
import shutil

import anndata as ad
import numpy as np
import pytest
import torch

from ppl_st import api, refit, report_run
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard, spatial_field
from ppl_st.stack import seeds, stack

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bokeh")
FAST = ["factors=3", "chains=2", "sparsity=0.0", "sweeps=3", "fit.steps=2"]


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=2, n_cells=200, side=5, squares=5, n_types=3, n_genes=30, n_panel=20, contrast=1.0)


@pytest.fixture(scope="module")
def run(sim, tmp_path_factory):
    out = tmp_path_factory.mktemp("seeds") / "run"
    return api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=4, seeds=3, out=out)


@pytest.fixture(scope="module")
def singles(run):
    return [api.load(run.folder / f"seed{seed}") for seed in (4, 5, 6)]


def test_each_seed_is_a_run_and_together_they_are_one(run, singles, sim):
    alone = api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=5)
    np.testing.assert_array_equal(alone.predict(draws=4).X, singles[1].predict(draws=4).X)
    genes = sim.truth.var_names[:4].tolist()
    joint, parts = run.predict(genes, draws=600), [one.predict(genes, draws=200) for one in singles]
    np.testing.assert_array_equal(api.load(run.folder).predict(genes, draws=12).X, run.predict(genes, draws=12).X)
    means = np.stack([part.X for part in parts]).astype(float)
    np.testing.assert_allclose(joint.X, means.mean(0), rtol=0.15, atol=0.05)
    total = means.var(0) + np.mean([part.layers["rate_sd"] ** 2 for part in parts], 0)
    np.testing.assert_allclose(joint.layers["rate_sd"].mean(), np.sqrt(total).mean(), rtol=0.1)
    noise = np.mean([part.layers["rate_sd"] ** 2 for part in parts], 0) * 2 / 3 / 200  # of the means themselves
    truth = np.maximum(means.var(0) - noise, 0).mean()
    assert np.square(joint.layers["between_sd"]).mean() == pytest.approx(truth, rel=0.4)
    share = joint.var["between_fits"]
    np.testing.assert_allclose(share, np.square(joint.layers["between_sd"]).mean(0) / np.square(joint.layers["rate_sd"]).mean(0), rtol=1e-4)
    assert ((share >= 0) & (share < 1)).all() and run.record["seeds"] == [4, 5, 6] and run.record["chains"] == 6


def test_written_as_predicted(run, tmp_path):
    run.write(tmp_path / "p.h5ad", draws=30)
    written, made = ad.read_h5ad(tmp_path / "p.h5ad"), run.predict(draws=30)
    np.testing.assert_array_equal(written.layers["between_sd"], made.layers["between_sd"])
    np.testing.assert_allclose(written.var["between_fits"], made.var["between_fits"], rtol=1e-4)


def test_every_fit_is_a_chain_in_arviz(run, singles):
    groups = run.arviz_groups(draws=3, max_cells=10)
    own = singles[2].arviz_groups(draws=3, max_cells=10)
    assert groups["predictions"]["rate"].shape == (6, 3, 10, 10) and dict(own["posterior"].sizes)["chain"] == 2
    assert groups["posterior"]["log_phi"].shape == (6, 3, 30)
    mean = groups["posterior"]["xi"].mean("draw").values  # chains in turns: the first of each seed, then the second
    want = own["posterior"]["xi"].mean("draw").values
    assert np.abs(mean[[2, 5]] - want).max() < np.abs(mean[[0, 3]] - want).max()


def test_scores_recalibration_and_report(run, sim, tmp_path):
    assert run.score(sim.truth, draws=12)["coverage_90"].between(0.3, 1).all()
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    better = refit.recalibrate(api.load(folder), folds=2, draws=12)
    assert api.load(folder).recalibration == better.recalibration and len(better.inner.genes) == 20
    report_run.report_folder(folder, tmp_path / "r.html", truth=sim.truth, draws=12)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "3 fits that differ in their seeds" in page and "between fits" in page


def test_an_unfinished_set_of_seeds_is_continued(run, sim, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "seed6")
    with pytest.raises(UserError, match=r"seed4, seed5.*--resume"):
        api.load(folder)
    with pytest.raises(UserError, match="empty or new folder"):
        api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=4, seeds=3, out=folder)
    with pytest.raises(UserError, match=r"seed4 was begun with other settings"):
        api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST[:-1], seed=4, seeds=3, out=folder, resume=True)
    again = api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=4, seeds=3, out=folder, resume=True)
    np.testing.assert_array_equal(again.predict(draws=6).X, run.predict(draws=6).X)
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [4, 5, 6]


def test_only_fits_of_one_method_with_other_seeds_are_joined(singles):
    with pytest.raises(UserError, match=r"siid \(seed 4\), siid \(seed 4\)"):
        seeds([singles[0], singles[0]])


def test_what_one_seed_alone_can_do_is_said(run):
    with pytest.raises(UserError, match=r"siid: this run deconvolves no spots; a siid run of one seed does \(RUN/seed0, say\)"):
        run.proportions()
    with pytest.raises(UserError, match=r"this run translates in one direction only; a spagene run of one seed has another"):
        run.turned()


@pytest.fixture(scope="module")
def mixture():
    world = spatial_field(seed=1, n_cells=200, n_reference=150, n_genes=40, n_panel=20)
    settings = {"spagene": ["process=0", "smoothing=0"], "spaim": ["process=0", "clusters=8"]}
    runs = [api.fit(method, target=world.target, reference=world.reference, overrides=some, seed=0) for method, some in settings.items()]
    return world, stack([refit.recalibrate(run, folds=2, draws=20) for run in runs])


def test_a_stack_is_exported_as_one_chain_of_the_mixture(mixture, tmp_path):
    import xarray as xr

    world, both = mixture
    both.export(tmp_path / "s.nc", draws=40, max_cells=30, truth=world.truth)
    groups = {name: xr.open_dataset(tmp_path / "s.nc", group=name, engine="h5netcdf") for name in ("posterior", "predictions", "log_likelihood")}
    weights = list(both.record["weights"].values())
    assert np.bincount(groups["posterior"]["run"].values[0], minlength=2) == pytest.approx(np.array(weights) * 40, abs=1.01)
    assert groups["predictions"]["count"].dims == ("chain", "draw", "cell", "gene") and groups["predictions"].sizes["chain"] == 1
    cells = groups["predictions"]["cell"].values.astype(str)
    rows = world.target.obs_names.get_indexer(cells)
    want = both.predict(groups["predictions"]["gene"].values.astype(str), draws=200).X[rows]
    got = groups["predictions"]["rate"].values[0].mean(0)
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.9
    assert np.isfinite(groups["predictions"]["log_likelihood"].values).all()
    assert json.loads(groups["posterior"].attrs["runs"]) == list(both.record["weights"])
    for one in groups.values():
        one.close()


def test_a_stack_is_uncorrected_until_it_is_recalibrated_itself(mixture):
    world, both = mixture
    genes = world.truth.var_names[:3].tolist()
    assert both.recalibration is None and all(run.recalibration is not None for run in both.spec.runs)
    assert "lower" not in both.predict(genes, draws=4).layers
    again = refit.recalibrate(both, folds=2, draws=8)
    table = again.predict(genes, draws=40)
    assert len(again.inner.genes) == 20 and (table.layers["lower"] <= table.layers["upper"]).all()


def test_more_draws_than_memory_are_refused(mixture, tmp_path, monkeypatch):
    monkeypatch.setattr("ppl_st.export.MAX_BYTES", 1e5)
    with pytest.raises(UserError, match=r"write them to a \.zarr.*lower --cells or --draws"):
        mixture[1].export(tmp_path / "s.nc", draws=40)
    assert not (tmp_path / "s.nc").exists()


def test_interrupted_seeds_are_continued_with_the_same_command(tmp_path):
    def one(seed, out, say):
        if seed == 1:
            raise api.Interrupted(f"interrupted at step 3 of 9; continue with --resume --out {out}")

    for folder, kept in ((tmp_path / "run", "continue with the same command and --resume"), (None, "nothing is kept")):
        with pytest.raises(api.Interrupted, match=f"^seed 1: interrupted at step 3 of 9; {kept}$"):
            api._fit_seeds(one, one, lambda seed: None, range(3), folder, False, lambda line: None)

"""Several seeds of one fit as one run: stored, resumed, and what differs between them is seen in predictions, scores, ArviZ and report."""

import json
import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch

from ppl_st import api, refit, report_run
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard, spatial_field
from ppl_st.stack import _inner_scores, seeds, stack, stacking_weights, turns

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bokeh")
FAST = ["factors=3", "chains=2", "sparsity=0.0", "sweeps=3", "fit.steps=2"]


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=2, n_cells=120, side=5, squares=5, n_types=3, n_genes=30, n_panel=20, contrast=1.0)


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
    joint, parts = run.predict(genes, draws=300), [one.predict(genes, draws=100) for one in singles]
    np.testing.assert_array_equal(api.load(run.folder).predict(genes, draws=12).X, run.predict(genes, draws=12).X)
    means = np.stack([part.X for part in parts]).astype(float)
    np.testing.assert_allclose(joint.X, means.mean(0), rtol=0.15, atol=0.05)
    total = means.var(0) + np.mean([part.layers["rate_sd"] ** 2 for part in parts], 0)
    np.testing.assert_allclose(joint.layers["rate_sd"].mean(), np.sqrt(total).mean(), rtol=0.1)
    noise = np.mean([part.layers["rate_sd"] ** 2 for part in parts], 0) * 2 / 3 / 100  # of the means themselves
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
    same = {"target": sim.target, "reference": sim.reference, "overrides": FAST}
    other = {"hold-out": {"hold_out": sim.target.var_names[:1].tolist()}, "target": {"target": sim.target[::-1].copy()}}

    def refuses_others():
        for role, options in other.items():
            with pytest.raises(UserError, match=f"seed4 was begun with another --{role}; "):
                api.fit("siid", **(same | options), seed=4, seeds=3, out=folder, resume=True)

    refuses_others()  # all have begun: nothing would be fitted with these
    with pytest.raises(UserError, match=r"seed4 was begun with other settings"):
        api.fit("siid", **(same | {"overrides": FAST[:-1]}), seed=4, seeds=3, out=folder, resume=True)
    shutil.rmtree(folder / "seed6")
    refuses_others()
    assert not (folder / "seed6").exists()
    with pytest.raises(UserError, match=r"seed4, seed5.*--resume"):
        api.load(folder)
    with pytest.raises(UserError, match="empty or new folder"):
        api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=4, seeds=3, out=folder)
    with pytest.raises(UserError, match=r"seed4 was begun with other settings"):
        api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST[:-1], seed=4, seeds=3, out=folder, resume=True)
    again = api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, seed=4, seeds=3, out=folder, resume=True)
    np.testing.assert_array_equal(again.predict(draws=6).X, run.predict(draws=6).X)
    assert json.loads((folder / "manifest.json").read_text())["seeds"] == [4, 5, 6]
    for name in ("recalibration.json", "inner.npz"):  # learned on three seeds
        (folder / name).write_text("{}")
    said = []
    fewer = api.fit("siid", seed=4, seeds=2, out=folder, resume=True, say=said.append)
    assert fewer.recalibration is None and "of other seeds and is removed" in said[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "seed4", "seed5", "seed6"]


def test_only_fits_of_one_method_with_other_seeds_are_joined(singles):
    with pytest.raises(UserError, match=r"siid \(seed 4\), siid \(seed 4\)"):
        seeds([singles[0], singles[0]])
    first, second = singles[:2]
    inputs = {role: one | {"sha256": "0"} for role, one in second.manifest["inputs"].items()}
    for other, what in (
        (replace(second, target=second.target.take_genes(second.target.genes[1:])), "genes of the target"),
        (replace(second, target=second.target.take_rows(np.arange(50))), "cells"),
        (replace(second, config=replace(second.config, chains=1)), "settings"),
        (replace(second, manifest=second.manifest | {"inputs": inputs}), "target and reference"),
    ):
        with pytest.raises(UserError, match=f"seed5 has other {what} than that of seed 4; remove it"):
            seeds([first, other])


def test_what_one_seed_alone_can_do_is_said(run):
    with pytest.raises(UserError, match=r"siid: this run deconvolves no spots; a siid run of one seed does \(RUN/seed0, say\)"):
        run.proportions()
    with pytest.raises(UserError, match=r"this run translates in one direction only; a spagene run of one seed has another"):
        run.turned()


@pytest.fixture(scope="module")
def mixture():
    world = spatial_field(seed=1, n_cells=120, n_reference=100, n_genes=40, n_panel=20)
    settings = {"spagene": ["process=0", "smoothing=0"], "spaim": ["process=0", "smoothing=0", "clusters=8"]}
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
    want = both.predict(groups["predictions"]["gene"].values.astype(str), draws=100).X[rows]
    got = groups["predictions"]["rate"].values[0].mean(0)
    assert np.corrcoef(want.ravel(), got.ravel())[0, 1] > 0.9
    assert np.isfinite(groups["predictions"]["log_likelihood"].values).all()
    assert json.loads(groups["posterior"].attrs["runs"]) == list(both.record["weights"])
    for one in groups.values():
        one.close()


def test_means_in_closed_form_stay_so(mixture):
    world, both = mixture
    genes = world.truth.var_names[:4].tolist()
    options = {"target": world.target, "reference": world.reference, "overrides": ["process=0", "clusters=8"]}
    order = [k for k, _ in turns(both.spec.weights, [1, 1], 10)]
    for run, share in ((api.fit("spaim", seeds=2, **options), [0.5, 0.5]), (both, np.bincount(order) / 10)):
        joint, *parts = (one.predict(genes, draws=10, lognorm=True) for one in (run, *run.spec.runs))
        for name in ("rate_mean", "lognorm_mean"):
            mean = np.average([part.layers[name] for part in parts], axis=0, weights=share)
            np.testing.assert_allclose(joint.layers[name], mean, rtol=1e-4)


def test_a_stack_is_uncorrected_until_it_is_recalibrated_itself(mixture, monkeypatch):
    world, both = mixture
    made, refit_one = [], refit._refit
    monkeypatch.setattr(refit, "_refit", lambda run, held: made.append((held, refit_one(run, held))) or made[-1][1])
    genes = world.truth.var_names[:3].tolist()
    assert both.recalibration is None and all(run.recalibration is not None for run in both.spec.runs)
    assert "lower" not in both.predict(genes, draws=4).layers
    again = refit.recalibrate(both, folds=2, draws=8)
    table = again.predict(genes, draws=40)
    log_prob, inner = _inner_scores(both.spec.runs)
    stacks = [(held, one) for held, one in made if one.method == "stack"]
    for held, one in stacks:  # the genes that are hidden had no say in the weights either
        weights = stacking_weights(log_prob[:, :, ~np.isin(inner, held)])
        assert one.spec.weights == pytest.approx(weights, abs=1e-9) and one.spec.weights != pytest.approx(both.spec.weights, abs=1e-4)
    assert len(stacks) == 2 and len(again.inner.genes) == 20 and (table.layers["lower"] <= table.layers["upper"]).all()


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

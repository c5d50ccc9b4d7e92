"""The run: its folder, what predict returns, scores, corrections, draws written to zarr."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

import ppl_st.api as api
from posterior_problems import FAST, small_run, small_sim
from ppl_st import refit, run_folder
from ppl_st.calibration import LEVELS
from ppl_st.conformal import KNOTS, Recalibration
from ppl_st.errors import UserError
from ppl_st.models import siid
from ppl_st.pairs import read_pair
from ppl_st.posterior import Run
from ppl_st.prepare import load_prepare
from ppl_st.run_folder import write_inputs

torch.set_num_threads(1)
LAYERS = {"rate_mean", "rate_sd", "count_sd", "between_sd", "q05", "q50", "q95"}
sim = pytest.fixture(small_sim, scope="module")
run = pytest.fixture(small_run, scope="module")


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


def test_a_folder_that_cannot_be_begun_is_left_empty_for_the_next_try(run, tmp_path, monkeypatch):
    folder, obs = tmp_path / "new" / "run", run.reference.obs
    odd = replace(run.reference, obs=obs.assign(odd=[True] + [None] * (len(obs) - 1)))
    with pytest.raises(UserError, match=r"reference: obs column 'odd' holds a bool"):
        write_inputs(folder, run.config, run.manifest, run.target, odd)
    assert not (tmp_path / "new").exists()

    def full(path, content):
        raise UserError("no space left")

    monkeypatch.setattr(run_folder, "write_json", full)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").touch()
    with pytest.raises(UserError, match="no space left"):
        write_inputs(folder, run.config, run.manifest, run.target, run.reference)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mine"]
    monkeypatch.undo()
    write_inputs(folder, run.config, run.manifest, run.target, run.reference)
    assert (folder / "config.toml").is_file()


@pytest.mark.parametrize("error", [UserError("no"), ValueError("no")])
def test_a_start_that_refuses_the_data_leaves_nothing_in_the_way_of_the_next_try(sim, tmp_path, monkeypatch, error):
    def refuse(*arguments):
        assert (tmp_path / "new" / "run" / "config.toml").is_file()
        raise error

    monkeypatch.setattr(siid, "start", refuse)
    ask = {"target": sim.target, "reference": sim.reference, "overrides": FAST, "out": tmp_path / "new" / "run"}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^no$"):
            api.fit("siid", **ask)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "new" / "run").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^no$"):
        api.fit("siid", **ask)
    assert list((tmp_path / "new").rglob("*")) == [tmp_path / "new" / "run"]


def test_what_has_begun_or_is_resumed_keeps_its_folder(sim, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("no")

    monkeypatch.setattr(api, "run_svi", refuse)
    with pytest.raises(ValueError, match=r"^no$"):
        api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST, out=tmp_path / "run")
    (tmp_path / "run" / "fit.json").unlink()  # as if it had been stopped before
    monkeypatch.setattr(siid, "start", refuse)
    with pytest.raises(ValueError, match=r"^no$"):
        api.fit("siid", out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.toml").is_file() and (tmp_path / "run" / "target.h5ad").is_file()


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
    (tmp_path / "broken" / "recalibration.json").write_text("{}")
    (tmp_path / "broken" / "inner.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"broken/inner\.npz: cannot be read .*ppl-st recalibrate"):
        api.load(tmp_path / "broken")
    for name, text in (("weights.safetensors", None), ("fit.json", None), ("manifest.json", None), ("manifest.json", "{}"), ("manifest.json", "[]")):
        (tmp_path / "broken" / name).write_bytes((run.folder / name).read_bytes()[:60] if text is None else text.encode())
        with pytest.raises(UserError, match=rf"broken/{name}: .* damaged"):
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
    np.testing.assert_array_equal(run.predict("gene0035", draws=10).X, run.predict(["gene0035"], draws=10).X)
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
    with pytest.raises(UserError, match=r"lacks 5 of the 30 genes"):
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
    both = ad.concat([sim.target[:, :3], sim.truth[sim.target.obs_names]], axis=1, merge="first")  # the panel's genes were shown to the fit
    pd.testing.assert_frame_equal(run.score(both, draws=20), table)
    assert run.score(both, genes=both.var_names[:4].tolist(), draws=5).index.tolist() == both.var_names[:4].tolist()
    blank = sim.truth[:, :1].copy()
    blank.var_names = ["BLANK_1"]  # counted beside the target's genes, unknown to the reference
    more = ad.concat([blank, sim.truth], axis=1, merge="first")
    pd.testing.assert_frame_equal(run.score(more, draws=20), table)
    with pytest.raises(UserError, match=r"1 of 1 genes cannot be predicted by this run, e\.g\. BLANK_1"):
        run.score(blank)
    with pytest.raises(UserError, match="no gene is left to predict, the fit was shown its 30 genes; give counts of held-out genes"):
        run.score(sim.target, draws=5)
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


def test_a_run_keeps_the_order_of_its_genes(run, sim, tmp_path):
    """Runs of older versions hold genes in the order of the user's file."""
    order = np.random.default_rng(0).permutation
    pair = read_pair(sim.target[:, order(30)].copy(), sim.reference[:, order(40)].copy())
    data, cells, other = load_prepare("siid").problem(*pair, run.config, lambda line: None)
    write_inputs(tmp_path / "run", run.config, run.manifest, cells, other)
    made = api.train("siid", run.module, run.config, data, cells, other, run.manifest, tmp_path / "run", None, "quiet", lambda line: None)
    again = api.load(tmp_path / "run")
    assert again.genes.tolist() == made.genes.tolist() != sorted(made.genes)
    np.testing.assert_array_equal(again.predict(draws=4).X, made.predict(draws=4).X)


def test_run_in_memory_has_no_folder(sim):
    run = api.fit("siid", target=sim.target, reference=sim.reference, overrides=FAST)
    assert run.folder is None and run.record["status"] == "done"
    assert repr(run) == "<siid run: 250 cells or spots x 40 genes, 30 measured and 10 unmeasured, in memory>"


def test_a_run_is_shown_in_one_line(run):
    assert repr(run) == f"<siid run: 250 cells or spots x 40 genes, 30 measured and 10 unmeasured, in {run.folder}>"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"seeds": 0}, "seeds=0: give 1 or more"),
        ({"seed": -1}, "seed=-1: give 0 or more"),
        ({"seeds": 2.0}, r"seeds=2\.0: is a float"),
        ({"target": pd.DataFrame(np.eye(3))}, r"target: a DataFrame is no AnnData; make one of it"),
        ({"hold_out": {"gene0003"}}, "--hold-out: is a set"),
        ({"hold_out": [f"gene{g:04d}" for g in range(27)]}, "--hold-out: hiding 27 of the 30 genes that .* leaves 3, but a fit needs 5: hide fewer"),
    ],
)
def test_what_a_fit_cannot_use_is_refused_by_name(sim, options, said):
    with pytest.raises(UserError, match=said):
        api.fit("siid", **{"target": sim.target, "reference": sim.reference, "overrides": FAST} | options)


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


def test_memory_bounds_the_samples_of_predict_too(run, tmp_path):
    """As `write_samples` has them in so little memory: block by block, each with random numbers of its own."""
    genes = run.genes[~run.measured][:4].tolist()
    run.write_samples(tmp_path / "s.zarr", genes, 3, memory_gb=1e-5)
    found = run.predict(genes, draws=2, samples=3, memory_gb=1e-5)
    stored = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")["count"][:]
    np.testing.assert_array_equal(np.stack([found.layers[f"sample_{k}"] for k in range(3)]), stored)


def test_means_of_the_reference_are_summed_in_double_precision():
    counts = np.ones((3001, 2), np.float32)
    counts[0, 0] = 2**24  # in float32 one more is no more
    run = SimpleNamespace(reference=SimpleNamespace(matrix=sp.csr_matrix(counts), names=range(3001)))
    np.testing.assert_allclose(Run.reference_mean.fget(run), counts.mean(0, dtype=float), rtol=1e-12)

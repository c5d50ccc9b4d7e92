"""Tables written block by block: the same as in memory, in any order of rows, bounded, whole or absent."""

import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_st import api, export, stream
from ppl_st.conformal import KNOTS, Recalibration, pit_curves
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_rows_in_any_order_leave_in_order(n, slab, size, seed, shuffled):
    """The defect it must catch: rows lost, doubled or swapped at the seam between the buffer and the scratch file."""
    import tempfile

    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 3)).astype(np.float32)
    order = np.arange(n)
    if shuffled:  # in order up to a point, as spots first and the rest after
        start = rng.integers(0, n)
        order[start:] = rng.permutation(order[start:])
    out, seen = np.full((n, 3), np.nan, np.float32), []

    def write(rows, part):
        assert 0 < len(part) <= slab
        seen.extend(range(rows.start, rows.stop))
        out[rows] = part

    with tempfile.TemporaryDirectory() as folder:
        from pathlib import Path

        slabs = stream.Slabs(write, n, (3,), slab, Path(folder))
        for start in range(0, n, size):
            slabs.put(order[start : start + size], values[order[start : start + size]])
        slabs.close()
    assert seen == list(range(n))
    np.testing.assert_array_equal(out, values)


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=2, n_cells=250, side=6, squares=6, n_types=4, n_genes=40, n_panel=30, contrast=1.0)


@pytest.fixture(scope="module")
def run(sim):
    target = sim.target[np.random.default_rng(0).permutation(250)].copy()  # the spots' order is not the file's
    target.obs["batch"] = pd.Categorical(["A"] * 250)
    overrides = ["factors=4", "chains=1", "sparsity=0.0", "sweeps=4", "fit.steps=2"]
    return api.fit("siid", target=target, reference=sim.reference, overrides=overrides, seed=3)


@pytest.fixture(scope="module")
def maps(sim):
    """Places from neighbors in other blocks, and a process over the reference's cells."""
    overrides = ["clusters=4", "smoothing=0.5", "process=0.5"]
    return api.fit("spaim", target=sim.target, reference=sim.reference, overrides=overrides, seed=3)


@pytest.mark.parametrize("suffix", ["zarr", "h5ad"])
@pytest.mark.parametrize("made", ["run", "maps"])
def test_written_is_predicted(made, tmp_path, suffix, monkeypatch, request):
    run = request.getfixturevalue(made)
    monkeypatch.setattr(stream, "MIN_SLAB", 7)
    monkeypatch.setattr(stream, "SLAB_VALUES", 160)
    path = tmp_path / f"imputed.{suffix}"
    options = {"draws": 12, "seed": 1, "memory_gb": 1e-4}  # blocks of few cells and few genes
    assert run.write(path, **options) == (250, 10)
    want = run.predict(**options)
    found = ad.read_zarr(path) if suffix == "zarr" else ad.read_h5ad(path)
    assert found.obs_names.tolist() == want.obs_names.tolist() and found.var_names.tolist() == want.var_names.tolist()
    assert set(found.layers) == set(want.layers) and found.uns["ppl_st"] == want.uns["ppl_st"]
    np.testing.assert_array_equal(found.X, want.X)
    for name in want.layers:
        np.testing.assert_array_equal(found.layers[name], want.layers[name])
    pd.testing.assert_frame_equal(found.var, want.var, rtol=1e-6, check_names=False)
    pd.testing.assert_frame_equal(found.obs, want.obs, check_names=False)
    for name in want.obsm:
        np.testing.assert_array_equal(found.obsm[name], want.obsm[name])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if made == "maps":  # a mean in closed form does not know of blocks
        np.testing.assert_allclose(found.layers["rate_mean"], run.predict(draws=2).layers["rate_mean"], rtol=1e-4)


def test_says_what_it_will_write_and_how_far_it_is(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PATIENCE", 0.0)
    lines = []
    run.write(tmp_path / "i.zarr", draws=4, memory_gb=1e-4, say=lines.append)
    assert lines[0].startswith("250 cells x 10 genes, 4 draws: 0.0 GB before compression") and "are free there" in lines[0]
    done = [int(line.split(" of 250 cells, about ")[0]) for line in lines[1:]]
    assert done and done == sorted(done) and done[-1] < 250


def test_zarr_is_read_lazily(run, tmp_path):
    run.write(tmp_path / "i.zarr", ["gene0035", "gene0002"], draws=5)
    with xr.open_zarr(tmp_path / "i.zarr", group="layers", consolidated=False) as layers:
        assert layers["count_sd"].dims == ("cell", "gene") and layers.sizes == {"cell": 250, "gene": 2}
        assert not layers["count_sd"].variable._in_memory
        assert (layers["q05"].values == 0).any()  # zeros are zeros, not missing
        np.testing.assert_allclose(layers["rate_mean"][:, 1], run.predict(["gene0035", "gene0002"], draws=5).X[:, 1])


def test_recalibrated_run_and_new_cells(run, sim, tmp_path):
    wide = replace(run, recalibration=Recalibration(0.9, [0.0], [KNOTS.tolist()] * 2, [0.95, 1.0], 3, 0.8))
    options = {"target": sim.target[:30].copy(), "draws": 6}
    wide.write(tmp_path / "a.zarr", **options)
    found, want = ad.read_zarr(tmp_path / "a.zarr"), wide.predict(**options)
    assert found.shape == (30, 10) and np.isinf(found.layers["upper"]).all()
    np.testing.assert_array_equal(found.layers["lower"], want.layers["lower"])
    np.testing.assert_array_equal(found.var["nominal_level"], want.var["nominal_level"])
    run.write_samples(tmp_path / "s.zarr", None, 3, target=sim.target[:30].copy())
    with xr.open_zarr(tmp_path / "s.zarr", consolidated=False) as samples:
        assert samples["count"].dims == ("sample", "cell", "gene") and samples["count"].shape == (3, 30, 10)


def test_rows_of_samples_that_wait_are_bounded_in_bytes(tmp_path, monkeypatch):
    sizes, real = [], stream.Slabs
    monkeypatch.setattr(stream, "Slabs", lambda write, rows, shape, slab, folder: sizes.append(slab) or real(write, rows, shape, slab, folder))
    counts = np.random.default_rng(0).poisson(2.0, (8, 100, 50)).astype(np.float32)
    cells, genes = np.array([f"c{i}" for i in range(100)]), np.array([f"g{i}" for i in range(50)])
    blocks = lambda: [(rows, counts[:, rows]) for rows in np.array_split(np.arange(100), 3)]  # noqa: E731
    for memory_gb, slab in ((1.0, 64), (3.5 * 4 * 8 * 50 / 1e9, 3), (1e-9, 1)):
        stream.write_samples(tmp_path / "s.zarr", cells, genes, 8, blocks(), {}, memory_gb)
        assert sizes[-1] == slab
        with xr.open_zarr(tmp_path / "s.zarr", consolidated=False) as samples:
            np.testing.assert_array_equal(samples["count"], counts)


def test_what_the_run_was_fitted_on_is_never_replaced(run, tmp_path):
    (tmp_path / "cells.zarr").mkdir()
    own = replace(run, manifest={**run.manifest, "inputs": {"target": {"path": str(tmp_path / "cells.zarr")}}})
    for write in (lambda path: own.write(path, draws=2), lambda path: own.write_samples(path, None, 2), own.export):
        with pytest.raises(UserError, match="is the target that the run was fitted on, which is never changed"):
            write(tmp_path / "cells.zarr")
    assert list(tmp_path.rglob("*")) == [tmp_path / "cells.zarr"]


def test_a_file_has_the_suffix_of_its_format(run, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*x\.csv: unknown suffix '\.csv'; name the output \*\.h5ad or \*\.zarr"):
        run.write(tmp_path / "x.csv", draws=2)
    with pytest.raises(UserError, match=r"cannot write .*w\.h5ad: unknown suffix '\.h5ad'; name the output \*\.zarr"):
        run.write_samples(tmp_path / "w.h5ad", None, 2)
    with pytest.raises(UserError, match=r"unknown suffix ''"):
        stream.write_whole(run.predict(draws=2), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_samples_are_those_that_predict_draws(run, tmp_path):
    run.write_samples(tmp_path / "s.zarr", None, 4, seed=2)
    table = run.predict(draws=2, samples=4, seed=2)
    with xr.open_zarr(tmp_path / "s.zarr", consolidated=False) as samples:
        for k in range(4):
            np.testing.assert_array_equal(samples["count"][k], table.layers[f"sample_{k}"])


def test_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def broken(self, rows, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream.Slabs, "put", broken)
    for name in ("i.zarr", "i.h5ad"):
        with pytest.raises(UserError, match="no space left"):
            run.write(tmp_path / name, draws=2)
    with pytest.raises(UserError, match="no space left"):
        run.write_samples(tmp_path / "s.zarr", None, 2)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """100,000 x 200 in two layers are 160 MB; rows come shuffled, so that they pass the scratch file."""
    script = f"""
import resource
import numpy as np, pandas as pd
from ppl_st import stream
n, g = 100_000, 200
order = np.random.default_rng(0).permutation(n).reshape(-1, 2000)
def blocks():
    for rows in order:
        yield rows, {{name: np.repeat(rows[:, None].astype(np.float32), g, 1) for name in ("a", "b")}}
obs = pd.DataFrame(index=[str(i) for i in range(n)])
genes = np.array([f"g{{i}}" for i in range(g)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream.write_table({str(tmp_path / "t.zarr")!r}, obs, {{}}, {{}}, genes, ["a", "b"], blocks(), lambda: pd.DataFrame(index=genes), {{}})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150  # MB: two slabs of 32, one block, names
    with xr.open_zarr(tmp_path / "t.zarr", group="layers", consolidated=False) as layers:
        np.testing.assert_array_equal(layers["b"][:, 3], np.arange(100_000))


def test_ends_beyond_the_draws_are_said(run, tmp_path):
    """An upper end at .985 of 40 draws lies beyond the largest: infinite, and the line says how many draws reach it."""
    wide, said = replace(run, recalibration=Recalibration(0.9, [], [KNOTS.tolist()], [0.97], 3, 0.8)), []
    wide.write(tmp_path / "a.zarr", ["gene0035"], draws=40, say=said.append)
    assert np.isinf(ad.read_zarr(tmp_path / "a.zarr").layers["upper"]).all() and "with --draws 66 they are finite" in said[0]
    assert np.isfinite(wide.predict(["gene0035"], draws=66).layers["upper"]).all()
    assert np.isinf(wide.predict(["gene0035"], draws=65).layers["upper"]).all()


def test_counts_of_the_panel_and_of_other_genes_are_exported_from_streams_apart(run, monkeypatch):
    from ppl_st.likelihoods import NegativeBinomial

    plan = export._Plan(run, 2, 0, None, None)
    law = NegativeBinomial(mean=torch.full((250, 10), 2.0), theta=torch.tensor(3.0))
    monkeypatch.setattr(plan.predictor, "count_dist", lambda batch, chain, drawn, local, genes: law)
    plan.panel = plan.panel[:10]
    monkeypatch.setattr(plan, "observed", run.target.matrix[:, :10])
    _, made = next(plan.blocks())
    pairs = np.stack([made["x"].ravel(), made["count"].ravel()])
    assert pairs.shape[1] >= 5000 and abs(np.corrcoef(pairs)[0, 1]) < 5 / np.sqrt(pairs.shape[1])


def test_blocks_of_an_export_are_bounded_in_bytes(run, tmp_path, monkeypatch):
    """1024 cells of a panel of 18,000 genes, 3 chains and 25 draws were 5.5 GB."""
    monkeypatch.setattr("ppl_st.export.BLOCK_BYTES", 5e4)
    for cells in (None, 50):
        plan = export._Plan(run, 5, 0, cells, None)
        sizes = [sum(values.nbytes for values in made.values()) for _, made in plan.blocks()]
        assert len(sizes) > 1 and max(sizes) < 8e4, sizes
    assert len(sizes) < 4  # few cells: few blocks
    monkeypatch.setattr("ppl_st.export.STREAMED_BYTES", 0)
    run.export(tmp_path / "p.zarr", draws=5, max_cells=None)
    with xr.open_zarr(tmp_path / "p.zarr", group="predictions", consolidated=False) as made:
        assert made.sizes["cell"] == 250 and made["rate"].encoding["chunks"][2] == 47


def test_without_coordinates_none_are_exported(run):
    """Cells without a place all lay at (0, 0)."""
    blind = replace(run, target=replace(run.target, xy=None))
    exported = [one.arviz_groups(draws=2, max_cells=5)["constant_data"] for one in (run, blind)]
    assert [sorted(frame.data_vars) for frame in exported] == [["measured", "spatial"], ["measured"]]


def test_scores_are_gathered_block_by_block(run, sim, monkeypatch):
    """All tables of a prediction of every cell were held for a few numbers per gene."""
    wide = replace(run, recalibration=Recalibration(0.9, [0.0], [KNOTS.tolist()] * 2, [], 3, 0.8))
    options = {"draws": 12, "seed": 1, "memory_gb": 1e-4}  # blocks of few cells and few genes
    truth = run.counts_of(sim.truth)
    want = wide.predict(truth.genes, truth=truth, **options)
    monkeypatch.setattr("ppl_st.posterior.posterior_predictive", None)
    monkeypatch.setattr("ppl_st.conformal.INNER_CELLS", 40)
    scores, inner = wide.score(truth, **options), wide.inner_scores(truth, **options)
    pd.testing.assert_frame_equal(scores, want.var[scores.columns], check_names=False, rtol=1e-6)
    assert {"mean_count", "coverage_95", "recalibrated_crps", "recalibrated_coverage"} <= set(scores) and scores.index.name == "gene"
    np.testing.assert_allclose(inner.pit, pit_curves(want.layers["pit_low"], want.layers["pit_high"]), atol=1e-9)
    assert inner.log_prob.shape == (40, 10)
    np.testing.assert_array_equal(inner.log_prob, want[inner.cells, inner.genes].layers["log_prob"])
    np.testing.assert_array_equal(wide.inner_scores(truth, **options | {"seed": 2}).cells, inner.cells)  # other seeds keep the same cells


def test_depth_of_scores_is_that_of_the_shared_genes(run, sim):
    from ppl_st.data import read_counts

    more = ad.AnnData(sp.hstack([sim.target.X, np.full((250, 1), 50, np.float32)], format="csr"), obs=sim.target.obs, obsm=sim.target.obsm)
    more.var_names = [*sim.target.var_names, "alone"]
    wider = replace(run, target=read_counts(more, role="target"))
    panel = np.asarray(sim.target.X.sum(1)).ravel()
    np.testing.assert_array_equal(wider.shared_total, panel)
    np.testing.assert_array_equal(wider.target.totals, panel + 50)


def test_without_an_unmeasured_gene_names_are_asked_for(run, tmp_path):
    full = replace(run, reference=run.reference.take_genes(run.target.genes))
    writes = (lambda: full.write(tmp_path / "p.h5ad"), lambda: full.write_samples(tmp_path / "s.zarr", None, 2))
    for ask in (full.predict, *writes):
        with pytest.raises(UserError, match=r"this run of siid: no gene is left to predict.*--genes"):
            ask()
    empty = (lambda: run.predict([]), lambda: run.score(run.target, genes=[]), lambda: run.write(tmp_path / "p.h5ad", []))
    for ask in (*empty, lambda: run.write_samples(tmp_path / "s.zarr", [], 2)):  # there are genes left
        with pytest.raises(UserError, match="the list of genes is empty"):
            ask()
    single = (lambda: run.predict(draws=1), lambda: run.predict(draws=0), lambda: run.write(tmp_path / "p.h5ad", draws=1))
    for ask in (*single, lambda: run.score(run.target, genes=run.target.genes[:2], draws=1)):
        with pytest.raises(UserError, match=r"draws=[01]: a predictive needs 2 or more"):
            ask()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, said",
    [
        ({"draws": 20.0}, r"draws=20\.0: is a float; give a whole number"),
        ({"draws": -2}, "draws=-2: a predictive needs 2 or more"),
        ({"seed": -1}, "seed=-1: give 0 or more"),
        ({"memory_gb": 0}, "memory_gb=0: give a number of gigabytes above 0"),
        ({"memory_gb": "2"}, "memory_gb='2'"),
        ({"genes": {"gene0035"}}, r"the list of genes: is a set, which has no order; give a list"),
        ({"genes": ["gene0035", "gene0036", "gene0035"]}, "the list of genes: 1 genes are named more than once, e.g. gene0035"),
        ({"samples": -1}, "samples=-1: give 0 or more"),
    ],
)
def test_numbers_and_genes_are_checked_alike_by_all_that_predicts(run, sim, tmp_path, options, said):
    asks = [run.predict]
    if "samples" not in options:
        asks += [lambda **more: run.write(tmp_path / "p.h5ad", **more), lambda **more: run.score(sim.truth, **more)]
    for ask in asks:
        with pytest.raises(UserError, match=said):
            ask(**options)
    samples = {"genes": None, "draws": 2} | options
    if "samples" not in options:
        with pytest.raises(UserError, match=said.replace("a predictive needs 2 or more", "give 1 or more")):
            run.write_samples(tmp_path / "s.zarr", **samples)
    with pytest.raises(UserError, match="draws=0: give 1 or more"):
        run.write_samples(tmp_path / "s.zarr", None, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_table_in_memory_is_written_so_that_xarray_opens_it_lazily(tmp_path):
    share = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    share[0] = 0.0  # zeros are values, not gaps
    table = ad.AnnData(share, layers={"sd": 0.1 * share}, obsm={"spatial": np.zeros((5, 2))}, uns={"ppl_st": "{}"})
    table.varm["profile"] = pd.DataFrame(np.eye(3), index=table.var_names, columns=["a", "b", "c"])
    stream.write_whole(table, tmp_path / "t.zarr")
    with xr.open_zarr(tmp_path / "t.zarr", group="layers", consolidated=False) as lazy:
        np.testing.assert_array_equal(lazy["mean"].values, share)
        np.testing.assert_array_equal(lazy["sd"].values, 0.1 * share)
    stream.write_whole(table, tmp_path / "t.ZARR")  # the suffix in any case
    assert (tmp_path / "t.ZARR").is_dir()
    back = ad.read_zarr(tmp_path / "t.zarr")
    np.testing.assert_array_equal(back.X, share)
    assert list(back.varm["profile"].columns) == ["a", "b", "c"] and back.uns["ppl_st"] == "{}"

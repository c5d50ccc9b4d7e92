"""Other people's methods beside ours: how `evaluate` scores them, what it refuses, and (with the extra) the real packages."""

import random
import re
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import ppl_st.peers as peers
from ppl_st.baselines import Split
from ppl_st.compare import compare
from ppl_st.data import gene_folds, read_counts
from ppl_st.errors import UserError
from ppl_st.evaluate import evaluate
from ppl_st.metrics import score_table
from ppl_st.peers import PEERS, Answer, Peer
from ppl_st.simulate import checkerboard, spatial_field

FAST = ["chains=1", "penalty=3", "reweight=false", "fit.steps=2", "batch_cells=64", "neighbors=6"]


@pytest.fixture(scope="module")
def world():
    return spatial_field(seed=1, n_cells=150, n_reference=160, n_genes=24, n_panel=20, n_types=4, rho=3.0, spatial=1.0, length=500.0)


def test_without_the_extra_it_is_named_before_any_work(world, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for name, package in (("gimvi", "scvi-tools"), ("tangram", "tangram-sc")):
        with pytest.raises(UserError, match=re.escape(f"{name} needs the package {package}: pip install 'ppl-st[peers]'")):
            evaluate(["vista", name], world.target, world.reference, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_peer_is_scored_like_everybody_and_its_draws_give_crps_and_coverage(world, monkeypatch, tmp_path):
    known = read_counts(world.target, role="target")

    def knows(split, draws):
        truth = known.take_rows(np.isin(known.names, split.target.names)).take_genes(split.held_out).matrix.toarray()
        return Answer(truth, np.random.default_rng(0).poisson(truth, (draws, *truth.shape)).astype(np.float32))

    monkeypatch.setitem(PEERS, "knows", Peer(knows, "numpy", "numpy"))
    silent = Peer(lambda split, draws: Answer(np.ones((len(split.target.names), len(split.held_out)))), "numpy", "numpy")
    monkeypatch.setitem(PEERS, "says_nothing", silent)
    done = evaluate(
        ["vista", "knows", "says_nothing"], world.target, world.reference, folds=5, max_folds=1, baselines=False, draws=8,
        overrides=FAST, out=tmp_path / "out",
    )  # fmt: skip
    table = done.scores.set_index("method")
    assert set(table.loc["knows", "kind"]) == {"peer"} and set(table.loc["vista", "kind"]) == {"method"}
    np.testing.assert_allclose(table.loc["knows", "raw_pcc"], 1)
    assert (table.loc["knows", "crps"].to_numpy() < table.loc["vista", "crps"].to_numpy()).all()
    assert table.loc["knows", "coverage_90"].between(0.85, 1).all()
    assert table.loc["says_nothing", ["crps", "coverage_90", "log_score"]].isna().all(axis=None)
    ranks = done.summary[done.summary["metric"] == "raw_pcc"].set_index("method")["rank"]
    assert ranks["knows"] == 1
    compared = compare([tmp_path / "out"], metric="raw_pcc")
    assert set(compared.reset_index().astype(str).to_numpy().ravel()) >= {"knows", "vista"}


def test_draws_of_the_training_genes_are_not_kept_and_few_genes_are_judged_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    drawn = rng.poisson(2.0, (6, 30, 20)).astype(np.float32)
    turns = iter(drawn)
    laws = SimpleNamespace(sample=lambda: torch.from_numpy(next(turns)))
    module = SimpleNamespace(n_batch=2, _run_forward=lambda x, mode, batch, labels: {"px": laws})
    target = ad.AnnData(sp.csr_matrix(np.ones((30, 8), np.float32)))
    every = np.zeros((6, 32, 12), np.float32)  # the first and the last cell have no training counts
    peers._draw_gimvi(module, target, 8, every, np.arange(1, 31))
    kept = every[:, 1:31]
    np.testing.assert_array_equal(kept, drawn[..., 8:])
    assert not every[:, [0, 31]].any()
    truth, seen, score = rng.poisson(2.0, (30, 12)), [], peers.crps_from_draws
    monkeypatch.setattr(peers, "crps_from_draws", lambda draws, truth: seen.append(draws.shape[-1]) or score(draws, truth))
    table = peers.draw_scores(kept, sp.csr_matrix(truth))
    np.testing.assert_allclose(table["crps"], score(kept, truth).mean(0))
    assert seen == [8, 4] and list(table)[1:] == ["coverage_50", "coverage_80", "coverage_90", "coverage_95"]


def test_settings_of_peers_alone_say_how_the_files_are_read_and_others_are_refused(world, monkeypatch):
    seen = []

    def constant(split, draws):
        seen.append(split)
        return Answer(np.ones((len(split.target.names), len(split.held_out)), np.float32))

    monkeypatch.setitem(PEERS, "constant", Peer(constant, "numpy", "numpy"))
    target, reference = world.target.copy(), world.reference.copy()
    for table in (target, reference):
        table.layers["doubled"] = 2 * table.X
    target.obs["slide"] = "a"
    target.var["symbol"] = target.var_names
    target.var_names = [f"ENSG{g:05d}" for g in range(target.n_vars)]
    options = {"folds": 4, "max_folds": 1, "baselines": False}
    ev = lambda **more: evaluate(["constant"], target, reference, **options, **more)  # noqa: E731
    ev(overrides=["gene_key=symbol"])
    ev(overrides=["gene_key=symbol", "layer=doubled", "library_key=slide"])
    assert seen[1].library_key == "slide" and (seen[1].target.matrix != 2 * seen[0].target.matrix).nnz == 0
    with pytest.raises(UserError, match="unknown key 'no_such'"):
        ev(overrides=["no_such=1"])
    with pytest.raises(UserError, match="unknown preset 'nonsense'"):
        ev(preset="nonsense")


def test_log_columns_of_a_peer_with_draws_are_those_of_the_mean_of_the_logarithm(world, monkeypatch):
    drawn = []

    def noisy(split, draws):
        shape = (draws, len(split.target.names), len(split.held_out))
        drawn.append((split, np.random.default_rng(0).poisson(np.linspace(0.2, 5, shape[1])[:, None], shape).astype(np.float32)))
        return Answer(drawn[-1][1].mean(0), drawn[-1][1])

    monkeypatch.setitem(PEERS, "noisy", Peer(noisy, "numpy", "numpy"))
    scores = evaluate(["noisy"], world.target, world.reference, folds=4, max_folds=1, baselines=False, draws=6).scores
    split, every = drawn[0]
    total = split.training_total
    lognorm = np.log1p(every * (np.median(total) / total)[:, None]).mean(0)
    truth = read_counts(world.target, role="target").take_genes(split.held_out).matrix
    want = score_table(truth, lognorm, total, split.held_out, scale="log")
    np.testing.assert_allclose(scores["log_rmse"], want["log_rmse"], rtol=1e-5)
    np.testing.assert_allclose(scores["raw_rmse"], score_table(truth, every.mean(0), total, split.held_out)["raw_rmse"], rtol=1e-5)


def test_peers_take_dissociated_cells(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: "installed")
    pair = checkerboard(seed=1, n_cells=60, side=4, squares=4, n_types=3, n_genes=12, n_panel=9, contrast=1)
    for name in ("gimvi", "tangram"):
        with pytest.raises(UserError, match=f"siid takes spots as reference, {name} dissociated cells"):
            evaluate(["siid", name], pair.target, pair.reference)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(PEERS))
def test_the_real_ones_predict_repeatably_and_leave_everything_as_it_was(world, name):
    pytest.importorskip(PEERS[name].module, reason="needs the extra: pip install 'ppl-st[peers]'")
    target, reference = (read_counts(x, role=r, need_spatial=False) for x, r in ((world.target, "target"), (world.reference, "reference")))
    held_out = gene_folds(target.genes, 4, 0)[0]
    split = Split(target.take_genes(target.genes[~np.isin(target.genes, held_out)]), reference, held_out, seed=3)
    before = split.target.matrix.copy(), split.reference.matrix.copy()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again = (PEERS[name].run(split, 5) for _ in range(2))
    assert torch.equal(states[0], torch.get_rng_state()) and random.getstate() == states[2]
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert all((a != b).nnz == 0 for a, b in zip(before, (split.target.matrix, split.reference.matrix), strict=True))
    np.testing.assert_array_equal(first.mean, again.mean)
    truth = target.take_genes(held_out).matrix.toarray()
    assert first.mean.shape == truth.shape and (first.mean >= 0).all() and np.isfinite(first.mean).all()
    # On the scale of counts, and with something to say.
    assert 0.1 < first.mean.mean() / truth.mean() < 10
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(first.mean.T, truth.T, strict=True)]) > 0.1
    if name == "gimvi":
        assert first.draws is not None and first.draws.shape == (5, *truth.shape)
        np.testing.assert_array_equal(first.draws, again.draws)
        assert (first.draws == np.floor(first.draws)).all()

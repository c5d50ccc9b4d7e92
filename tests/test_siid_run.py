"""A run of SIID through the front door: bitwise repeatable, saved, resumed, sound on awkward data."""

import copy
import os
import signal
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine

import ppl_st.api as api
from ppl_st import evaluate
from ppl_st.compositions import match_factors
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.models import siid
from ppl_st.models.siid.batches import Batches
from ppl_st.prepare import load_prepare
from ppl_st.simulate import checkerboard
from seeded import own_seed
from siid_problems import FAST, KNOBS

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=1, **KNOBS)


def fitted(sim, *more, **named):
    return api.fit("siid", target=sim.target, reference=sim.reference, overrides=[*FAST, *more], seed=3, **named)


@pytest.fixture(scope="module")
def run(sim, tmp_path_factory):
    return fitted(sim, out=tmp_path_factory.mktemp("siid") / "run")


def accuracy(run, sim):
    """Mean correlation with the true rate, as shares of the cell's total: size scores nothing."""
    mean, truth = (
        x / x.sum(1, keepdims=True) for x in (run.predict(sim.truth.var_names, draws=10).X, sim.truth.layers["rate"])
    )
    return float(
        np.mean(
            [np.corrcoef(mean[:, g], truth[:, g])[0, 1] if mean[:, g].std() else 0.0 for g in range(truth.shape[1])]
        )
    )


def same(one, two):
    return all(
        torch.equal(a, b)
        for x, y in zip(one.pair, two.pair, strict=True)
        for a, b in zip(x.state_dict().values(), y.state_dict().values(), strict=True)
    )


def predictions_equal(one, two):
    a, b = one.predict(draws=8), two.predict(draws=8)
    return all(np.array_equal(a.layers[name], b.layers[name]) for name in a.layers) and np.array_equal(
        a.obsm["proportions"], b.obsm["proportions"]
    )


def test_same_seed_twice_is_bitwise_identical_and_another_is_not(run, sim):
    other = fitted(sim, "fit.lr=0.02")  # two fits in one process do not meet
    again = fitted(sim)
    assert same(run, again) and predictions_equal(run, again) and not same(run, other)
    np.testing.assert_array_equal(run.record["losses"], again.record["losses"])


def test_global_random_states_and_inputs_are_left_alone(sim):
    tables = [(table.X.copy(), table.obsm["spatial"].copy()) for table in (sim.target, sim.reference)]
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted(sim, "fit.steps=1").predict(draws=2)
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == state).all()  # noqa: NPY002
    for (counts, xy), table in zip(tables, (sim.target, sim.reference), strict=True):
        assert (counts != table.X).nnz == 0 and (xy == table.obsm["spatial"]).all()


def test_save_and_load_predict_the_same(run):
    loaded = api.load(run.folder)
    assert same(run, loaded) and predictions_equal(run, loaded)
    np.testing.assert_array_equal(run.proportions(draws=5).X, loaded.proportions(draws=5).X)


def test_kill_and_resume_is_bitwise_the_same(run, sim, tmp_path):
    sim.target.write_h5ad(tmp_path / "target.h5ad")
    sim.reference.write_h5ad(tmp_path / "reference.h5ad")
    with warnings.catch_warnings():  # from Python 3.12 on: other threads of this process are not forked
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()  # a process of its own to be killed; imports would be most of the work of a new interpreter
    if not child:
        killed_at(7, tmp_path)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    with pytest.raises(UserError, match="resume"):
        api.load(tmp_path / "run")
    lines = []
    resumed = api.fit("siid", out=tmp_path / "run", resume=True, say=lines.append)
    assert any("resuming at step 4 of 10" in line for line in lines)
    assert same(run, resumed) and predictions_equal(run, resumed) and predictions_equal(run, api.load(tmp_path / "run"))


def killed_at(last, base):
    """Fits the small pair and kills its process when it is asked for the minibatch of step ``last``; never returns."""
    unhooked = Batches.at

    def deadly(self, step):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return unhooked(self, step)

    Batches.at = deadly  # type: ignore[method-assign]
    try:
        api.fit("siid", target=base / "target.h5ad", reference=base / "reference.h5ad", overrides=FAST, seed=3, out=base / "run")
    finally:
        os._exit(1)


def test_sigterm_saves_and_resume_goes_on(run, sim, tmp_path, monkeypatch):
    original = Batches.at

    def at(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(Batches, "at", at)
    with pytest.raises(api.Interrupted, match="step 6 of 10"):
        fitted(sim, out=tmp_path / "run")
    monkeypatch.undo()
    resumed = api.fit("siid", out=tmp_path / "run", resume=True)
    assert same(run, resumed) and resumed.record["losses"] == run.record["losses"]


@pytest.mark.slow
def test_place_matters_and_a_shuffled_reference_is_useless(run, sim):
    rng = np.random.default_rng(0)
    good = accuracy(run, sim)
    assert good > 0.8
    moved = sim.target.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"][rng.permutation(moved.n_obs)]
    shuffled = sim.reference[rng.permutation(sim.reference.n_obs)].copy()
    shuffled.obsm["spatial"] = sim.reference.obsm["spatial"]
    shuffled.obs_names = sim.reference.obs_names
    # the radius is given: a map inferred from nonsense would be another experiment
    settings = [*FAST, "radius=70"]
    # shuffled cells: capture ratios can pick the right cells of a spot: less is lost than with shuffled spots
    for target, reference, share in ((moved, sim.reference, 0.95), (sim.target, shuffled, 0.6)):
        other = api.fit("siid", target=target, reference=reference, overrides=settings, seed=3)
        assert not np.allclose(other.predict(draws=8).X, run.predict(draws=8).X, rtol=0.01)
        assert accuracy(other, sim) < share * good, (good, accuracy(other, sim))
    scrambled = sim.reference.copy()  # profiles that belong to no gene: nothing is left to learn
    order = np.r_[np.arange(30), 30 + rng.permutation(10)]
    scrambled.X = sp.csr_matrix(sim.reference.X[:, order])
    assert (
        accuracy(api.fit("siid", target=sim.target, reference=scrambled, overrides=settings, seed=3), sim) < 0.5 * good
    )


def test_awkward_data(sim):
    """An empty cell, genes without counts, six panel genes, one spot per batch, unmapped cells."""
    target = sim.target[:, :6].copy()
    counts = target.X.toarray()
    counts[3] = 0
    counts[:, 2] = 0
    target.X = sp.csr_matrix(counts)
    reference = sim.reference.copy()
    spots = reference.X.toarray()
    spots[:, [2, 35]] = 0  # one in the panel, one beyond it
    spots[4] = 0
    reference.X = sp.csr_matrix(spots)
    for more in (
        ["batch_spots=1", "radius=30"],
        ["batch_spots=1", "radius=60", "map_neighbors=2", "map_sigma=40"],
        ["regional=false"],
    ):
        run = api.fit("siid", target=target, reference=reference, overrides=[*FAST, "chains=1", "fit.steps=4", *more])
        table = run.predict(run.genes, draws=6)
        assert table.shape == (300, 40) and not run.record["skipped"]
        for name, layer in table.layers.items():
            assert np.isfinite(layer).all() and (layer >= 0).all(), name
        assert table[:, "gene0035"].X.mean() < 0.2 * table.X.mean()
        assert np.isfinite(table.obsm["proportions"]).all()
        spots, bare = run.proportions(draws=4), np.asarray(run.data.mapping.sum(0)).ravel() == 0
        for values in (spots.X, *spots.layers.values()):  # a row of zeros looked like a result, of factor0
            assert np.isnan(values[bare]).all() and np.isfinite(values[~bare]).all()
        assert bare.any() == ("radius=30" in more)
        alone = np.diff(run.data.mapping.indptr) == 0
        assert alone.any() and (np.isnan(table.obs["captured"]) == alone).all()


def test_a_minibatch_of_bare_spots_does_not_end_the_fit(sim):
    """Few cells on a slide of many spots: a plate without cells was a ZeroDivisionError."""
    run = api.fit("siid", target=sim.target[:3].copy(), reference=sim.reference, overrides=[*FAST, "radius=70"], seed=3)
    batches = Batches(run.data, 9, 3)
    assert any(not batch.owned.any() for batch in map(batches.at, range(10)))
    assert np.isfinite(run.record["losses"]).all() and np.isfinite(run.predict(draws=4).X).all()


def test_empty_labels_are_refused_and_few_spots_said(sim, tmp_path):
    target = sim.target.copy()
    target.obs["kind"] = np.nan
    with pytest.raises(UserError, match=r"none of its 300 cells has a label in obs column 'kind' \(label_key\)"):
        api.fit("siid", target=target, reference=sim.reference, overrides=[*FAST, "label_key=kind", "label_weight=0.1"])
    target.write_h5ad(tmp_path / "atlas.h5ad")
    with pytest.raises(UserError, match=r"atlas.h5ad\): none of its 300 cells has a value in obs column 'kind' \(profile_key\)"):
        fitted(sim, f"profiles={tmp_path / 'atlas.h5ad'}", "profile_key=kind")
    for spots, said in ((5, ["only 5 spots with counts"]), (36, [])):
        lines = []
        problem = load_prepare("siid").problem
        problem(read_counts(sim.target, role="target"), read_counts(sim.reference[:spots], role="reference"), siid.Config(), lines.append)
        assert [line[:24] for line in lines if line.startswith("only")] == said


def test_profiles_are_read_as_the_other_files_are(sim, tmp_path, monkeypatch):
    """From the layer and under the gene names of the settings: in a fit, when its run is loaded, and in every fit of an evaluation."""
    tables = {"target": sim.target[:, :14].copy(), "reference": sim.reference.copy(), "atlas": sim.target[:, :14].copy()}
    for table in tables.values():
        table.var["symbol"], table.layers["umi"] = table.var_names, table.X.copy()
        table.var_names = [f"ENSG{g:05d}" for g in range(table.n_vars)]
    for name, table in tables.items():
        table.obs["kind"] = np.where(np.arange(table.n_obs) % 2, "a", "b")
        table.X = table.X.multiply(0.5).tocsr()  # no counts
        table.write_h5ad(tmp_path / f"{name}.h5ad")
    pair = tmp_path / "target.h5ad", tmp_path / "reference.h5ad"
    settings = [*FAST, "chains=1", "fit.steps=1", f"profiles={tmp_path / 'atlas.h5ad'}", "profile_key=kind", "layer=umi", "gene_key=symbol"]
    run = api.fit("siid", target=pair[0], reference=pair[1], overrides=settings, seed=3, out=tmp_path / "run")
    panel = np.asarray(sim.target[1::2, :14].X.sum(0)).ravel() + 0.5
    found = run.data.profiles[:, run.data.panel]
    np.testing.assert_allclose(found[0] / found[0].sum(), panel / panel.sum())
    (tmp_path / "atlas.h5ad").rename(tmp_path / "moved.h5ad")
    np.testing.assert_array_equal(api.load(tmp_path / "run").data.profiles, run.data.profiles)  # a run folder needs no other file
    (tmp_path / "moved.h5ad").rename(tmp_path / "atlas.h5ad")
    runs = []
    monkeypatch.setattr(evaluate, "fit", lambda *arguments, **named: runs.append(api.fit(*arguments, **named)) or runs[-1])
    evaluate.evaluate(["siid"], *pair, overrides=settings, folds=2, max_folds=1, baselines=False, draws=4)
    np.testing.assert_array_equal(runs[0].data.profiles, run.data.profiles)


@pytest.mark.parametrize("preset, more", [("paper", ["chains=2", "factors=4", "fit.steps=8"])])
def test_paper_preset_runs_and_refuses_new_cells(sim, preset, more):
    run = api.fit("siid", target=sim.target, reference=sim.reference, preset=preset, overrides=more)
    assert len(chains_of(run.pair)) == 1 and np.isfinite(run.predict(draws=4).X).all()
    with pytest.raises(UserError, match="new cells"):
        run.predict(target=sim.target[:50].copy(), draws=2)


def test_default_learns_its_settings_and_says_so(sim):
    lines = []
    run = api.fit(
        "siid",
        target=sim.target,
        reference=sim.reference,
        overrides=["chains=1", "sweeps=6", "fit.steps=2"],
        say=lines.append,
    )
    text = "\n".join(lines)
    for word in ("radius", "factors", "sparsity", "gain sd"):
        assert word in text
    hyper = run.spec.hyper
    assert hyper.candidates and hyper.factors in {entry["factors"] for entry in hyper.candidates if "inner genes" in entry}
    assert "only" not in text  # of a panel that teaches nothing


def test_a_small_panel_learns_nothing_and_says_so(sim):
    """Panels of 5 to 14 genes had assumed hyper-priors, which only a docstring said."""
    lines = []
    settings = [name for name in FAST if not name.startswith("factors")]
    run = api.fit("siid", target=sim.target[:, :10].copy(), reference=sim.reference, overrides=[*settings, "fit.steps=1"], say=lines.append)
    (said,) = (line for line in lines if line.startswith("only 10 panel genes"))
    assert f"{run.spec.factors} factors" in said and "gain sd of 0.5" in said


def test_gene_block_cache_does_not_grow(run, sim):
    """The regional effect of one block of genes at a time: memory must not grow with the genes asked for."""
    predictor = siid.Predictor(run.pair, run.data, run.config, run.spec)
    predictor.mixed = [predictor._mixed(c) for c in range(2)]
    predictor.bandwidth, predictor.shape = 0.6, 3.0
    batch = next(iter(predictor.blocks(50)))
    local = predictor.local(batch, 0)
    drawn = poutine.trace(predictor.chains[0].guide.globals).get_trace()
    values = {name: site["value"] for name, site in drawn.nodes.items() if site["type"] == "sample"}
    for start in range(0, 40, 10):
        dist = predictor.count_dist(batch, 0, values, local, torch.arange(start, start + 10))
        assert dist.mean.shape == (int(batch.owned.sum()), 10)
    assert len(local[1]) <= 1


def test_proportions_use_every_chain_that_found_the_same_factors(run, monkeypatch):
    """Chains number their factors as they like: without matching, mixing their draws would smear all proportions."""
    one, two = (copy.deepcopy(chains_of(run.pair)[0]) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in (two.guide.xi_loc, two.guide.xi_log_scale, *(module.usage for module in two)):
            tensor.copy_(tensor[order].clone())
    compositions, sizes = siid._compositions, []
    monkeypatch.setattr(siid, "MATCHED_CELLS", 150)
    monkeypatch.setattr(siid, "_compositions", lambda chain, data, config: sizes.append(data.counts.shape[0]) or compositions(chain, data, config))
    kept, orders = siid._same_factors([one, two], run.data, run.config)
    assert len(sizes) == 2 and max(sizes) < 200  # of 300: compositions of every cell in every chain were kept
    assert len(kept) == 2 and orders[1].tolist() == torch.argsort(order).tolist()
    (alone, _), (both, _) = (
        siid.proportions(ensemble(pairs), run.data, run.config, 12, 0) for pairs in ([one], [one, two])
    )
    assert np.abs(both["mean"] - alone["mean"]).mean() < 0.02
    assert both["sd"].mean() < 1.2 * alone["sd"].mean()  # unmatched factors would spread over everything
    with torch.no_grad():
        two.guide.xi_loc.copy_(5 * torch.randn(two.guide.xi_loc.shape, generator=torch.Generator().manual_seed(0)))
    assert len(siid._same_factors([one, two], run.data, run.config)[0]) == 1


def test_chains_with_more_factors_than_types_do_not_smear_the_spots():
    """Factors that share a type have the same profile: matched by it, a whole type became another chain's small half (error .035 -> .144)."""
    world = checkerboard(seed=2, n_cells=600, squares=4, n_types=4, n_genes=60, n_panel=50, contrast=0.8)
    settings = ["factors=7", "chains=3", "sparsity=0.3", "sweeps=20", "fit.steps=10"]
    found = api.fit("siid", target=world.target, reference=world.reference, seed=0, overrides=settings)
    cells = siid.quantities(found.pair, found.data, found.config, found.spec)[0]["proportions"]
    matched = match_factors(world.truth.obsm["composition"], cells)
    spots = found.proportions(draws=12)
    true = world.proportions[world.reference.obs_names.get_indexer(spots.obs_names)]
    alone = siid.proportions(ensemble(chains_of(found.pair)[:1]), found.data, found.config, 12, 0)[0]["mean"]
    together, best = (np.abs(one[:, matched] - true).mean() for one in (spots.X, alone))
    assert together < 1.2 * best < 0.06, (together, best)


def test_intervals_of_mixed_spots_are_as_wide_as_a_copy_of_the_data_asks_for(monkeypatch):
    """Where cells are mixtures the bootstrap starts from a biased point and adds the bias again: its intervals were too short (.84 here)."""
    world = checkerboard(seed=23, n_cells=1500, side=10, squares=10, n_types=3, mixing=0.2, contrast=1.0)
    found = api.fit("siid", target=world.target, reference=world.reference, overrides=["factors=3"])
    matched = match_factors(world.truth.obsm["composition"], siid.quantities(found.pair, found.data, found.config, found.spec)[0]["proportions"])

    def held():
        table = found.proportions(draws=50)
        true = world.proportions[world.reference.obs_names.get_indexer(table.obs_names)]
        low, high = (table.layers[name][:, matched] for name in ("q05", "q95"))
        return float(((true >= low) & (true <= high))[true > 0.01].mean()), table

    wide, table = held()
    monkeypatch.setattr(siid, "shortfall", lambda *given: 1.0)
    narrow, plain = held()
    np.testing.assert_array_equal(table.X, plain.X)  # the mean stays
    assert 0.87 < wide < 0.95 and wide > narrow + 0.03, (wide, narrow)

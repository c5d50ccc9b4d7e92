"""Stacking: weights that solve the problem, draws in proportion to them, and a mixture that is the mixture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize_scalar

from machine import dear
from ppl_st import api, refit
from ppl_st.calibration import risk_coverage
from ppl_st.conformal import Recalibration
from ppl_st.errors import UserError
from ppl_st.metrics import pcc
from ppl_st.simulate import checkerboard, spatial_field
from ppl_st.stack import _inner_scores, cross_stacked, stack, stacked, stacking_weights, turns, weights_without

torch.set_num_threads(1)


def densities(seed=0, cells=200, genes=20):
    rng = np.random.default_rng(seed)
    first = rng.random((cells, genes)) < 0.7
    x = np.where(first, rng.poisson(1.0, first.shape), rng.poisson(6.0, first.shape))
    return np.stack([stats.poisson(m).logpmf(x) for m in (1.0, 6.0, 30.0)])


def test_weights_are_the_mixture_that_made_the_data():
    log_prob = densities()
    weights = stacking_weights(log_prob)
    assert weights.sum() == pytest.approx(1) and weights[:2] == pytest.approx([0.7, 0.3], abs=0.04) and weights[2] < 0.03
    two = log_prob[:2]

    def loss(w):  # the same problem by another solver: score plus prior worth a tenth of a gene
        return -(20 * stacked(two, [w, 1 - w]).mean() + 0.05 * np.log(w) + 0.05 * np.log(1 - w))

    found = minimize_scalar(loss, bounds=(1e-3, 1 - 1e-3), method="bounded", options={"xatol": 1e-7}).x
    assert stacking_weights(two)[0] == pytest.approx(found, abs=1e-4)
    best = stacked(log_prob, weights).mean()
    assert best > log_prob.mean((1, 2)).max() + 0.1
    with pytest.raises(UserError, match="finite"):
        stacking_weights(np.full((2, 3, 4), -np.inf))
    with pytest.raises(UserError, match="none of them 0"):
        stacking_weights(np.zeros((2, 0, 4)))


def test_a_useless_run_gets_next_to_nothing_and_equal_runs_share():
    log_prob = densities(1)
    assert stacking_weights(log_prob[[0, 0]]) == pytest.approx([0.5, 0.5])
    assert stacking_weights(np.stack([log_prob[0], log_prob[0] - 3]))[1] < 0.1


def test_any_first_draws_are_in_proportion():
    weights = [0.62, 0.3, 0.08]
    order = turns(weights, [2, 1, 3], 400)
    runs = np.array([k for k, _ in order])
    for draws in (10, 57, 100, 400):
        share = np.bincount(runs[:draws], minlength=3)
        assert np.abs(share - np.array(weights) * draws).max() <= 1.0
    assert [c for k, c in order if k == 0][:4] == [0, 1, 0, 1] and [c for k, c in order if k == 2][:4] == [0, 1, 2, 0]


@pytest.fixture(scope="module")
def world():
    return spatial_field(seed=1, n_cells=200, n_reference=150, n_genes=40, n_panel=24)


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Two methods on one pair, recalibrated: scores of 24 inner genes each."""
    base = tmp_path_factory.mktemp("stack")
    made = []
    settings = {"vista": ["penalty=3", "reweight=false", "process=0", "fit.steps=4"], "spaim": ["process=0", "smoothing=0.25", "clusters=8"]}
    for method, overrides in settings.items():
        run = api.fit(method, target=world.target, reference=world.reference, overrides=overrides, seed=0, out=base / method)
        made.append(refit.recalibrate(run, folds=2, draws=20))
    return made


def test_a_stack_is_the_mixture_of_its_runs(world, runs):
    both = stack(runs)
    weights = np.array(list(both.record["weights"].values()))
    assert both.method == "stack" and weights.sum() == pytest.approx(1) and both.record["inner_genes"] == 24
    scores = list(both.record["inner_log_score"].values())
    log_prob, inner = _inner_scores(runs)
    assert scores[2] == pytest.approx(float(cross_stacked(log_prob, inner).mean()))
    assert scores[2] < stacked(log_prob, weights).mean()  # by weights that were learned on the very genes
    genes = world.truth.var_names[[3, 12]].tolist()
    many = 400  # a gene's level is one number per draw, shared by all cells: its mean is off by 1 / sqrt(draws)
    options = {"target": world.target[:60].copy(), "draws": many, "truth": world.truth}
    found, parts = both.predict(genes, **options), [run.predict(genes, **options) for run in runs]
    mean = sum(w * part.X for w, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(found.X.mean(0), mean.mean(0), rtol=0.06)
    assert np.corrcoef(found.X.ravel(), mean.ravel())[0, 1] > 0.98
    second = sum(w * (p.layers["count_sd"] ** 2 + p.X**2) for w, p in zip(weights, parts, strict=True))
    np.testing.assert_allclose(found.layers["count_sd"].mean(), np.sqrt(second - mean**2).mean(), rtol=0.06)
    log_prob = stacked(np.stack([part.layers["log_prob"] for part in parts]), weights)
    assert np.abs(found.layers["log_prob"] - log_prob).mean() < 0.03
    own = both.predict([genes[0], world.target.var_names[0]], draws=10)
    np.testing.assert_array_equal(own.obsm["spatial"], world.target.obsm["spatial"])
    again = stack(runs).predict(own.var_names.tolist(), draws=10)
    np.testing.assert_array_equal(again.layers["q95"], own.layers["q95"])
    assert list(own.var["measured"]) == [False, True]


@dear
def test_trust_says_more_than_mean_expression():
    """Genes of simulated tissues that differ in how strongly they follow the cells' state: ranked by trust, the genes kept carry less risk."""
    areas = []
    for seed in (1, 2, 3):
        world = spatial_field(seed=seed, n_cells=400, n_reference=200, n_genes=120, n_panel=40)
        run = api.fit("spaim", target=world.target, reference=world.reference, overrides=["process=0"], seed=0)
        found = run.predict(world.truth.var_names.tolist(), draws=20)
        risk = 1 - pcc(world.truth.X.toarray(), found.X) ** 2
        areas.append([risk_coverage(risk, score).area for score in (found.var["trust"], found.X.mean(0), -risk, np.zeros(len(risk)))])
    trust, expression, best, none = np.mean(areas, 0)
    assert best < trust < expression - 0.005 < none


def test_a_stack_predicts_other_cells_and_samples(world, runs, tmp_path):
    both = stack(runs)
    new = world.target[:50].copy()
    table = both.predict(world.truth.var_names[:3].tolist(), target=new, draws=10)
    assert table.shape == (50, 3)
    sampled = both.predict(world.truth.var_names[:2].tolist(), draws=4, samples=3)
    assert (sampled.layers["sample_2"] == np.floor(sampled.layers["sample_2"])).all()
    assert both.write(tmp_path / "s.h5ad", world.truth.var_names[:3].tolist(), draws=4) == (200, 3)


@dear
def test_runs_that_cut_cells_in_their_own_way_lead():
    """SIID's blocks follow the spots; the others follow SIID. Two SIID runs on the same data have the same blocks."""
    sim = checkerboard(seed=1, n_cells=120, side=5, squares=5, n_types=3, n_genes=30, n_panel=20, contrast=1.0)
    fast = ["factors=3", "chains=2", "sparsity=0.0", "fit.steps=2"]
    settings = {"siid": [*fast, "sweeps=8"], "siid again": [*fast, "sweeps=1", "chains=1"], "spaim": ["clusters=8", "process=0", "smoothing=0"]}
    made = []
    for name, overrides in settings.items():
        run = api.fit(name.split()[0], target=sim.target, reference=sim.reference, overrides=overrides)
        made.append(refit.recalibrate(run, folds=2, draws=4))
    for runs in (made[:2], made[::2], made[::-1]):
        both = stack(runs)
        even = replace(both, spec=both.spec._replace(weights=[1 / len(runs)] * len(runs)))  # SpaIM's own weight is small
        table, mean = even.predict(draws=40), np.mean([run.predict(draws=20).X for run in runs], 0)
        assert np.corrcoef(table.X.ravel(), mean.ravel())[0, 1] > 0.97  # rows are where they belong


def test_what_cannot_be_stacked_is_refused(world, runs):
    with pytest.raises(UserError, match="two or more"):
        stack(runs[:1])
    other = api.fit("spaim", target=world.target[:150].copy(), reference=world.reference, overrides=["clusters=8", "process=0"], seed=0)
    with pytest.raises(UserError, match="first: ppl-st recalibrate"):
        stack([other, other])
    with pytest.raises(UserError, match=r"stack: spaim .* is given twice, .*; name each run once"):
        stack([runs[0], runs[1], replace(runs[1], record={})])
    with pytest.raises(UserError, match="other cells"):
        stack([runs[0], other])
    blind = replace(runs[1], target=runs[1].target.take_genes(runs[1].target.genes[1:]))
    with pytest.raises(UserError, match=f"1 genes were shown to one of .* e.g. {runs[1].target.genes[0]}; .*--hold-out"):
        stack([runs[0], blind])
    moved = replace(runs[1], inner=runs[1].inner._replace(cells=runs[1].inner.cells[::-1]))
    with pytest.raises(UserError, match="same held-out genes and cells"):
        stack([runs[0], moved])
    ways = {"folds": "--folds 6 --seed 0 --draws 20", "seed": "--folds 2 --seed 6 --draws 20", "draws": "--folds 2 --seed 0 --draws 6"}
    for change, own in ways.items():
        another = replace(runs[1], recalibration=runs[1].recalibration._replace(**{change: 6}))
        want = rf"spaim .* was recalibrated with {own}, vista .* with --folds 2 --seed 0 --draws 20.*`ppl-st recalibrate .*spaim --folds 2 --seed 0"
        for ask in (stack, lambda both: weights_without(both, runs[0].inner.genes[:3])):
            with pytest.raises(UserError, match=want):
                ask([runs[0], another])
    before = replace(runs[1], recalibration=Recalibration(*runs[1].recalibration[:6]))
    with pytest.raises(UserError, match=r"spaim .* by an older version, .*--folds, --seed and --draws; repeat `ppl-st recalibrate .*spaim`"):
        stack([runs[0], before])
    empty = runs[0].inner._replace(cells=np.zeros(0, str), log_prob=np.zeros((0, 24), np.float32))  # as of hidden spots
    for inner in (empty, None):
        image = replace(runs[0], method="xfuse", inner=inner)
        with pytest.raises(UserError, match="no scores per cell"):
            stack([image, image])

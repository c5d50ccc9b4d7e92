"""SIID's regional effect: the conjugate posterior, used where it helps, blind to spots without cells."""

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

import ppl_st.api as api
from ppl_st.inference.predict import draw_globals
from ppl_st.models import siid
from ppl_st.models.siid import hyper as siid_hyper
from ppl_st.models.siid.regional import gamma_at, interpolation, regional_posterior, shared_normals
from ppl_st.simulate import checkerboard
from seeded import own_seed
from siid_problems import FAST, KNOBS, tiny

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


def test_regional_effect_is_the_conjugate_posterior_and_ignores_uncovered_spots():
    rng = np.random.default_rng(0)
    spots, cells = rng.uniform(0, 4, (12, 2)), rng.uniform(0, 4, (5, 2))
    counts = sp.csr_matrix(rng.poisson(3, (12, 2)).astype(np.float32))
    expected = rng.gamma(2, 1, (12, 2)).astype(np.float32)
    expected[[1, 4]] = 0  # no cell there
    shape, rate = regional_posterior(cells, spots, counts, expected, 0.6, 3.0)
    for i in range(5):
        distance = np.linalg.norm(spots - cells[i], axis=1)
        weight = np.exp(-(distance**2) / (2 * 0.6**2)) * (np.argsort(np.argsort(distance)) < 7)
        weight[[1, 4]] = 0
        np.testing.assert_allclose(shape[i], 3 + weight @ counts.toarray(), rtol=1e-5)
        np.testing.assert_allclose(rate[i], 3 + weight @ expected, rtol=1e-5)


def test_draws_of_the_effect_are_shared_and_keep_their_law():
    """Cells of one spot drew apart what they know together: sums over a region looked surer than they were."""
    spots = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1).reshape(-1, 2)
    cells, genes = np.array([[2.1, 2.0], [2.15, 2.05], [5.0, 5.0], [90.0, 90.0]]), np.arange(3, 5)
    weights, used = interpolation(cells, spots, 0.6)
    normal = np.stack([shared_normals(weights, used, [7, d], genes) for d in range(1500)])  # [draws, cells, genes]
    np.testing.assert_allclose(normal.std(0), 1, atol=0.07)
    together = np.corrcoef(normal[:, :, 0].T)
    assert together[0, 1] > 0.98 and np.abs(together[0, 2:]).max() < 0.1 > abs(np.corrcoef(normal[:, 0].T)[0, 1])
    alone = shared_normals(*interpolation(cells[1:2], spots, 0.6), [7, 0], genes)
    np.testing.assert_allclose(alone[0], normal[0, 1], rtol=1e-4)
    place = (np.arange(4000) + 0.5) / 4000
    for shape in (1.0, 3.0, 40.0):
        law = scipy.stats.gamma(shape, scale=0.5)
        drawn = gamma_at(torch.from_numpy(scipy.stats.norm.ppf(place)), torch.tensor(shape).double(), torch.tensor(2.0)).numpy()
        assert drawn.mean() == pytest.approx(law.mean(), rel=3e-3) and drawn.std() == pytest.approx(law.std(), rel=5e-3)
        assert np.abs(law.cdf(drawn) - place).max() < 0.015


def test_a_draw_of_the_effect_does_not_depend_on_how_cells_are_cut(monkeypatch):
    sim = checkerboard(seed=2, **KNOBS)
    run = api.fit("siid", target=sim.target, reference=sim.reference, overrides=[*FAST, "chains=1", "radius=70"], seed=3)
    predictor = siid.Predictor(run.pair, run.data, run.config, run.spec)
    predictor.mixed, predictor.bandwidth, predictor.shape = [predictor._mixed(0)], 0.6, 3.0
    monkeypatch.setattr(siid, "_draw_activity", lambda posterior: posterior.shape / posterior.rate)
    (drawn,) = draw_globals(predictor.chains, 1, 0)
    found = np.zeros((2, 300, 10))
    for n, size in enumerate((40, 1000)):
        for batch in predictor.blocks(size):
            law = predictor.count_dist(batch, 0, drawn, predictor.local(batch, 0), torch.arange(30, 40))
            found[n, predictor.rows(batch)] = law.mean.detach().numpy()
    np.testing.assert_allclose(found[0], found[1], rtol=0.01)
    guide, (batch, *_), genes = predictor.guides[0], list(predictor.blocks(1000)), torch.arange(30, 40)
    used = predictor._near(batch)[1]
    rate = predictor._effect(batch, 0, genes, used)[1]
    with torch.no_grad():  # other doubt, the same mean profiles: spots expect the same (genes that few spots show had too low a mean)
        mean = guide.xi_loc + 0.5 * (2 * guide.xi_log_scale).exp()
        guide.xi_loc.copy_(mean - 0.5)
        guide.xi_log_scale.zero_()
    torch.testing.assert_close(predictor._effect(batch, 0, genes, used)[1], rate, rtol=1e-4, atol=0)
    some = batch._replace(owned=batch.owned & (batch.cells < 5))
    few = predictor._near(some)[1]
    assert 7 <= len(few) < 30  # of 36 spots: expected counts of the others are not needed
    torch.testing.assert_close(predictor._effect(some, 0, genes, few)[1], rate[:5], rtol=1e-4, atol=0)


def test_new_cells_draw_the_regional_effect_from_its_prior(monkeypatch):
    """Without spots around them they had no effect at all, and intervals narrower than those of cells of the fit far from every spot."""
    sim = checkerboard(seed=2, **KNOBS)
    run = api.fit("siid", target=sim.target, reference=sim.reference, overrides=[*FAST, "chains=1", "radius=70", "fit.steps=1"], seed=3)
    monkeypatch.setattr(siid, "_draw_activity", lambda posterior: posterior.shape / posterior.rate)
    spec, genes = run.spec._replace(hyper=run.spec.hyper._replace(bandwidth=0.6, regional_shape=3.0)), torch.arange(25, 40)
    bare = sim.target[:40].copy()
    del bare.obsm["spatial"]
    for target in (sim.target[:40].copy(), bare):
        _, data, _ = run._other(target)
        given, without = (siid.Predictor(run.pair, data, run.config, one) for one in (spec, run.spec))
        batch = next(iter(given.blocks(100)))
        local = [one.local(batch, 0) for one in (given, without)]
        effect = []
        for drawn in draw_globals(given.chains, 60, 0):
            with_it, plain = (one.count_dist(batch, 0, drawn, known, genes).mean for one, known in zip((given, without), local, strict=True))
            effect.append((with_it / plain).detach().numpy())
        effect = np.stack(effect)  # [draws, cells, genes]
        assert (effect[:, :, :5] == 1).all()  # measured genes
        place = given.squares
        assert len(np.unique(place)) == 40 if target is bare else 10 < len(np.unique(place)) < 37
        first = np.unique(place, return_index=True)[1]
        drawn = effect[:, first, 5:].reshape(-1)
        law = scipy.stats.gamma(3.0, scale=1 / 3)
        assert drawn.mean() == pytest.approx(1, abs=0.05) and drawn.std() == pytest.approx(law.std(), rel=0.05)
        np.testing.assert_allclose(effect[:, :, 5:], effect[:, first[place], 5:], rtol=1e-4)  # cells of one square would be wrong together


@pytest.mark.parametrize("uncovered", [0, 30])
def test_regional_effect_is_used_where_it_helps_cells(uncovered):
    """Cells that follow the field of their spots need the effect; cells that do not are better off without."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    field = np.exp(0.7 * np.sin(xy[:, :1] / 2 + np.arange(20)))
    field /= field.mean(0)
    far = np.c_[12 + np.arange(uncovered) % 3, np.arange(uncovered) // 3]
    spot_counts = np.r_[rng.poisson(5.0 * field), np.full((uncovered, 20), 40)]
    expected = np.r_[np.full((144, 20), 5.0), np.zeros((uncovered, 20))].astype(np.float32)
    spot = rng.integers(144, size=600)
    data = tiny()._replace(
        cell_xy=xy[spot] + rng.uniform(-0.4, 0.4, (600, 2)),
        spot_xy=np.r_[xy, far],
        spot_counts=sp.csr_matrix(spot_counts.astype(np.float32)),
    )
    for follows in (True, False):
        counts = sp.csr_matrix(rng.poisson(field[spot] if follows else field[rng.permutation(spot)]).astype(np.float32))
        rows, genes = np.arange(600), np.arange(20)
        chosen = siid_hyper._choose_regional(data, rows, genes, torch.ones(600, 20), expected, counts)
        assert (chosen[0] > 0) == follows


def test_cells_on_half_of_the_slide():
    """Spots that hold no cell must not reach the regional effect: levels at the border were 1.4 times too high."""
    sim = checkerboard(seed=1, **(KNOBS | {"n_cells": 600, "side": 10, "squares": 10, "rho": 2.0}))
    half = sim.target.obsm["spatial"][:, 0] < 500
    border = sim.target.obsm["spatial"][half, 0] > 420
    near = sim.reference.obsm["spatial"][:, 0] < 500
    truth = sim.truth.X[half].toarray()[border].sum()
    bandwidths = []
    for reference in (sim.reference, sim.reference[near].copy()):
        target, settings = sim.target[half].copy(), [*FAST, "radius=70"]
        run = api.fit("siid", target=target, reference=reference, overrides=settings, seed=3)
        level = run.predict(sim.truth.var_names, draws=20).X[border].sum() / truth
        assert 0.8 < level < 1.2, level
        bandwidths.append(run.spec.hyper.bandwidth)
    assert bandwidths[0] == bandwidths[1]

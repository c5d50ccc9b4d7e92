"""A cell's depth, and what it makes of rates and log-normalised counts in the methods that see a gene as a map over cells."""

import numpy as np
import pytest
import torch

import ppl_st
from machine import dear
from ppl_st.inference.predict import draw_globals, posterior_predictive
from ppl_st.inference.randomness import rng_scope
from ppl_st.models import spaim
from ppl_st.models.common.counts import Codes, Hyper, log_mean
from ppl_st.models.common.inner import Fold, own_depth
from spaim_problems import small_world


def test_a_depth_is_the_total_of_all_genes_of_the_target():
    """With 14 of 36 panel genes in the reference, the other 22 still tell how much was counted in a cell; the shared ones alone are a poor guess."""
    world = small_world()
    known = [g for g in world.reference.var_names if g not in set(world.target.var_names[14:])]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference[:, known], overrides=["clusters=8", "process=0", "smoothing=0"], seed=0)
    predictor = spaim.Predictor(run.pair, run.data, run.config, run.spec)
    batch = next(iter(predictor.blocks(500)))
    depth = predictor.local(batch, 0)[1].exp().numpy().ravel()
    every, shared = np.asarray(run.data.counts.sum(1)).ravel(), run.data.totals
    assert run.data.counts.shape[1] == 36 and len(run.data.panel) == 14
    np.testing.assert_allclose(np.corrcoef(depth, every)[0, 1], 1.0, rtol=1e-5)  # total + a mean total: a line
    assert np.corrcoef(depth, shared)[0, 1] < 0.95
    assert depth.sum() == pytest.approx(shared.sum(), rel=1e-3)  # levels are per count of the shared genes


def test_the_genes_of_a_cell_share_what_is_not_known_of_its_depth():
    """One draw of all that is global, many of what is local: each cell's rates move together, by as much as a depth known from its counts may."""
    world = small_world()
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8", "process=0", "depth_prior=0.5"], seed=0)
    predictor = spaim.Predictor(run.pair, run.data, run.config, run.spec)
    batch, (drawn,) = next(iter(predictor.blocks(60))), draw_globals(predictor.chains, 1, 0)
    local, rates = predictor.local(batch, 0), []
    for number in range(400):
        with torch.no_grad(), rng_scope(0, "local", number):
            first = predictor.count_dist(batch, 0, drawn, local, torch.arange(4)).mean
        with torch.no_grad(), rng_scope(0, "local", number):
            rates.append(torch.cat([first, predictor.count_dist(batch, 0, drawn, local, torch.arange(20, 24)).mean], 1).double().numpy())
    factor = np.stack(rates) / np.mean(rates, 0)  # [draws, cells, genes]
    np.testing.assert_allclose(factor, factor[:, :, :1].repeat(8, 2), rtol=1e-4)  # one number per cell, also between blocks of genes
    totals = np.asarray(run.data.counts.sum(1)).ravel()
    assert np.mean(factor[:, :, 0].var(0) * (totals[:60] + 0.5 * totals.mean())) == pytest.approx(1.0, abs=0.05)
    assert abs(np.corrcoef(factor[:, 0, 0], factor[:, 1, 0])[0, 1]) < 0.2  # each cell its own


@pytest.mark.parametrize("likelihood", ["nb", pytest.param("poisson", marks=dear)])
def test_the_closed_form_at_its_own_depth_is_what_draws_give(likelihood):
    world = small_world()
    settings = ["clusters=8", "process=0.4", "smoothing=0.25", f"likelihood={likelihood}"]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=settings, seed=0)
    predictor = spaim.Predictor(run.pair, run.data, run.config, run.spec)
    predictor.guides[0].counts.own_depth = True
    genes, factor = np.flatnonzero(~run.measured)[:8], np.median(run.data.totals) / run.data.totals
    exact = posterior_predictive(predictor, predictor.chains, genes, draws=2, seed=0, factor=factor)[0].lognorm_mean
    predictor.guides[0].counts.own_depth = False
    other = posterior_predictive(predictor, predictor.chains, genes, draws=2, seed=0, factor=factor)[0].lognorm_mean
    del predictor.closed_form
    drawn = posterior_predictive(predictor, predictor.chains, genes, draws=150, seed=0, factor=factor)[0].lognorm_mean
    np.testing.assert_allclose(exact.mean(0), drawn.mean(0), rtol=0.15)
    agreement = [[np.corrcoef(one[:, g], drawn[:, g])[0, 1] for g in range(8)] for one in (exact, other)]
    assert min(agreement[0]) > 0.9 and np.mean(agreement[0]) > np.mean(agreement[1])


def test_the_mean_of_a_log_normalised_count():
    """At the cell's own depth it is that of drawn counts (a little above: a count that is not 0 is taken at its mean)."""
    rng = np.random.default_rng(0)
    share, depth, theta = np.array([[0.002, 0.02]]), np.array([[30.0], [100.0], [300.0]]), np.array([2.0, 5.0])
    factor = 100.0 / rng.poisson(depth)
    rate = share * depth
    counts = rng.poisson(rng.gamma(theta, rate / theta, (100_000, 3, 2)))
    exact = np.log1p(counts * factor).mean(0)
    tensors = (torch.from_numpy(x) for x in (share, depth, np.log(theta)))
    found = log_mean(*tensors, 100.0, torch.from_numpy(factor)).numpy()
    assert (found > 0.98 * exact).all() and (found < 1.15 * exact).all()
    plain = log_mean(torch.from_numpy(share), torch.from_numpy(depth), None, 100.0, None).numpy()
    np.testing.assert_allclose(plain, np.log1p(100 * share))


@pytest.mark.parametrize("precise", [False, True])
def test_own_depths_are_taken_where_the_shared_genes_measure_depth_badly(precise):
    """Totals of 15 counts beside a depth known from 500: what a log-normalised count divides by is mostly noise. Where a total is the depth and
    counts are many, dividing is all that there is to it."""
    rng = np.random.default_rng(0)
    depth = rng.lognormal(0, 0.5, 1500)
    place = rng.standard_normal((1500, 1)).astype(np.float32)
    per_cell = 1e5 if precise else 15.0
    totals = rng.poisson(per_cell * depth).astype(float)
    totals = np.maximum(totals, 1.0)
    every = totals if precise else rng.poisson(500 * depth).astype(float)
    level = 200.0 if precise else 0.3
    slope = 0.3 * rng.standard_normal((1, 24))
    counts = rng.poisson(rng.gamma(2.0, 0.5, (1500, 24)) * level * depth[:, None] * np.exp(place @ slope)).astype(float)
    loadings = slope.astype(np.float32)
    test = Fold(counts, totals, every, np.ones(1500), {0.0: place}, Codes(loadings, np.zeros_like(loadings)))
    hyper = Hyper(0.0, 0.0, 1.0, 0.0, 0.0, (0.0, 1.0, 0.1), (0.0, 0.0, 0.0), (1.0, 0.0, 0.1), (np.log(2.0), 0.0, 0.1), 0.0, [])
    assert own_depth([test], hyper, np.zeros(24)) == (not precise)

"""Levels, slopes and exponents of VISTA: apart from each other, and from how many counts a gene has."""

from functools import partial

import numpy as np
import pytest
import torch

import ppl_st
from machine import dear
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import posterior_predictive
from ppl_st.inference.randomness import rng_scope
from ppl_st.models import vista
from ppl_st.models.common.counts import LARGEST
from ppl_st.models.vista.inner import CENTER, _regressions, _trend, pattern_errors
from ppl_st.models.vista.levels import interpolate, tabulate
from ppl_st.models.vista.model import sides
from ppl_st.simulate import spatial_field


def test_slopes_and_exponents_of_faint_genes_are_those_of_bright_ones():
    """The prior of a single gene's regression pulls faint ones towards slope 0 and exponent 1; a trend by level must not come of that."""
    rng = np.random.default_rng(0)
    genes, cells = 600, 800
    level = np.linspace(-6.0, 1.0, genes)
    depth = np.repeat(rng.normal(0, 0.6, (cells, 1)), genes, 1)
    score = rng.standard_normal((cells, genes))
    counts = rng.poisson(np.exp(level + 0.8 * score + 0.5 * depth)).astype(float)
    found, variance, kept = _regressions(counts, score, depth, level)
    free, variance = CENTER + (found - CENTER) / kept, variance / kept
    design = np.column_stack([np.ones(genes), level - level.mean()])
    for column, truth in ((1, 0.8), (2, 0.5)):
        ends = np.array([[1, -3.5], [1, 3.5]]) @ _trend(design, free[:, column], variance[:, column])
        np.testing.assert_allclose(ends, truth, atol=0.06)
        shrunk = np.array([1, -3.5]) @ _trend(design, found[:, column], variance[:, column])
        assert abs(shrunk - truth) > 0.05


@pytest.mark.parametrize(("furthest", "atol"), [(1.5, 2e-3), (4.0, 1e-2)])
def test_the_level_that_a_slope_adds_is_interpolated_with_its_gradient(furthest, atol):
    """Scores up to 1.5 sd: nothing is clamped at any slope. Beyond, single cells reach the clamp one by one: the level has kinks there."""
    rng = np.random.default_rng(0)
    v, log_total, exponent = rng.normal(0, 1.0, (900, 5)), rng.normal(0, 0.5, 900), np.array([0.2, 0.6, 0.8, 1.0, 1.5])
    v = v.clip(-furthest, furthest)
    table = torch.from_numpy(tabulate(lambda part: v[:, part], 5, log_total, np.zeros_like(log_total), exponent))
    genes = torch.tensor([4, 0, 2, 3])
    for slopes in ([-0.9, 0.1, 1.3, 4.6], [0.0, 5.0, 2.75, 3.01]):
        slope = torch.tensor(slopes, dtype=torch.float64, requires_grad=True)
        found = interpolate(table, slope, genes)
        grown = (slope * torch.from_numpy(v[:, genes])).clamp(-LARGEST, LARGEST)
        power = torch.from_numpy(exponent[genes] * log_total[:, None]) + grown
        exact = torch.logsumexp(power, 0) - torch.logsumexp(torch.from_numpy(log_total), 0)
        torch.testing.assert_close(found, exact, atol=atol, rtol=0)
        gradients = [torch.autograd.grad(one.sum(), slope)[0] for one in (found, exact)]
        torch.testing.assert_close(*gradients, atol=2e-2 if furthest == 1.5 else 0.2, rtol=0)


def levels_off(run, slope):
    """By how much the log totals of unmeasured genes miss the level of the reference, where every slope is ``slope``."""
    model, _ = sides(chains_of(run.pair)[0])
    predictor = vista.Predictor(run.pair, run.data, run.config, run.spec)
    genes, batch = torch.from_numpy(np.flatnonzero(model.measured.numpy() == 0)), predictor.at(np.arange(predictor.n_cells))
    local = predictor.local(batch, 0)
    drawn, alike = {name: site[0] for name, site in model.priors().items()}, torch.ones(len(model.measured))
    drawn |= {"slope": slope * alike, "log_gain": 0 * alike}
    with torch.no_grad(), rng_scope(0, "states"):
        states = [local.loc + local.scale * torch.randn_like(local.loc) for _ in range(20)]
        beyond = None if local.phi is None else model.beyond(local.phi, genes)
        depth, none = (local.log_total, local.log_usual), torch.tensor(0.0)
        mean = sum(model.count_dist(drawn, z, *depth, genes, beyond, none).mean.sum(0) for z in states) / 20
    return ((mean / float(batch.total.sum())).log() - model.level[genes]).numpy()


@pytest.mark.parametrize("likelihood", ["nb", pytest.param("poisson", marks=pytest.mark.slow)])
def test_an_unmeasured_gene_has_the_level_of_the_reference_whatever_its_slope(likelihood):
    """Platforms agree here; a level that is learned beside the slope spread as much as the slopes do, and was drawn apart from them."""
    world = spatial_field(seed=2, n_cells=500, n_reference=600, n_genes=60, n_panel=40, n_types=5, platform_sd=0.0)
    settings = ["penalty=3", "reweight=false", "fit.steps=4", "process=0.4", f"likelihood={likelihood}"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=settings, seed=0)
    for slope in (0.3, 1.5, 3.0):
        off = levels_off(run, slope)
        assert np.abs(off).max() < 0.2 and abs(off.mean()) < 0.05, (slope, off)
    assert run.spec.hyper.gain[2] < 0.1, run.spec.hyper.gain  # .18 before


def test_levels_are_those_of_the_spreads_that_were_trained():
    """The table of levels was that of the start, also where the spreads were trained; measured genes must not move with it."""
    world = spatial_field(seed=2, n_cells=250, n_reference=200, n_genes=30, n_panel=11, n_types=5, platform_sd=0.0)
    settings = ["penalty=3", "reweight=false", "process=0", "visible=1", "fit.steps=50", "fit.lr=0.1"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=settings, seed=0)
    for slope in (0.3, 1.0, 1.5):
        off = levels_off(run, slope)
        assert np.abs(off).max() < 0.2 and abs(off.mean()) < 0.05, (slope, off)
    mean = run.predict(genes=list(world.target.var_names), draws=20).layers["rate_mean"].mean(0)
    np.testing.assert_allclose(np.log(mean / world.target.X.toarray().mean(0)), 0.0, atol=0.2)  # up to .7 where gains stay


@pytest.mark.parametrize(("likelihood", "graph"), [("nb", "prior"), pytest.param("poisson", "none", marks=dear)])
def test_means_in_closed_form_are_those_of_many_draws(likelihood, graph):
    """Rates, and log-normalised counts, of measured and unmeasured genes; the mean over 60 draws cost .004 of correlation on osmFISH."""
    world = spatial_field(seed=2, n_cells=200, n_reference=300, n_genes=40, n_panel=24, n_types=5)
    settings = ["penalty=3", "reweight=false", "fit.steps=4", "process=0.4", f"likelihood={likelihood}", f"graph={graph}"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=settings, seed=0)
    predictor = vista.Predictor(run.pair, run.data, run.config, run.spec)
    genes, factor = np.arange(40), np.full(200, 2.0)
    draw = partial(posterior_predictive, predictor, predictor.chains, genes, seed=0, factor=factor)
    exact = draw(draws=2)[0]
    del predictor.closed_form
    many, few = (draw(draws=draws)[0] for draws in (1500, 60))
    for name, bias in (("rate_mean", 0.02), ("lognorm_mean", 0.03)):
        ours, theirs, rough = (getattr(one, name) for one in (exact, many, few))
        off = ours / theirs - 1
        assert np.abs(off.mean(0)).max() < 4 * bias and abs(off.mean()) < bias, (name, off.mean(0))
        apart = [np.mean([1 - np.corrcoef(one[:, g], theirs[:, g])[0, 1] for g in range(24, 40)]) for one in (ours, rough)]
        assert apart[0] < 0.01 and apart[0] < apart[1] / 2, (name, apart)


def test_genes_of_one_mean_with_more_zeros_in_the_reference_are_more_dispersed_in_the_target():
    """Half of the genes flicker on both sides: of unmeasured ones only their zeros in the reference say which."""
    world = spatial_field(seed=4, n_cells=500, n_reference=600, n_genes=90, n_panel=50, n_types=3, rho=4.0, contrast=0.3)
    rng, genes = np.random.default_rng(0), np.asarray(world.reference.var_names)
    flickers = rng.permutation(len(genes)) % 2 == 0
    for table in (world.target, world.reference, world.truth):
        theta = np.where(flickers[np.searchsorted(genes, table.var_names)], 0.5, 1e3)
        table.X = rng.poisson(table.X.toarray() * rng.gamma(theta, 1 / theta, table.shape)).astype(np.float32)
    settings = ["penalty=3", "reweight=false", "fit.steps=4", "process=0", "graph=none"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=settings)
    model, new = sides(chains_of(run.pair)[0])[0], ~run.measured
    loc, scale = (one.numpy() for one in model.priors()["log_theta"])
    assert loc[new & ~flickers].mean() - loc[new & flickers].mean() > 1.0, run.spec.hyper.parameters
    level, slope, *_ = run.spec.hyper.parameters["log_theta"]
    wide = [level, slope, 0.0, float(np.hypot(loc[new].std(), scale.mean()))]
    plain, found = run.spec._replace(hyper=run.spec.hyper._replace(parameters={"log_theta": wide})), []
    for spec in (run.spec, plain):
        model.spec = spec
        found.append(run.predict(world.truth.var_names, draws=40, truth=world.truth).var["log_score"].mean())
    assert found[0] > found[1] + 0.005, found


def test_genes_without_counts_do_not_say_that_patterns_are_right():
    """Taus of simulated errors, with and without four genes that were never counted: .22 became .02 with four of 80."""
    rng = np.random.default_rng(0)
    rows, genes, truth = 1500, 80, 0.3
    place, score, depth = rng.standard_normal((rows, 10)), rng.standard_normal((rows, genes)), rng.normal(0, 0.3, (rows, genes))
    waves = np.sqrt(2) * np.cos(rng.uniform(0, 20, (rows, 1)) + rng.uniform(0, 6, 20))
    mean = 0.3 * np.exp(0.5 * score + depth)
    counts = rng.poisson(mean * np.exp(place @ rng.normal(0, truth / np.sqrt(10), (10, genes)))).astype(float)
    found = []
    for dead in (0, 4):
        counts[:, :dead] = 0.0
        fitted = mean * (counts.sum(0) + 0.5) / mean.sum(0)
        found.append(pattern_errors(counts, fitted, score, depth, [np.arange(genes)], [place], waves))
    norms = [np.linalg.norm(tau) for tau, _ in found]
    assert abs(norms[0] - truth) < 0.06 and abs(norms[1] / norms[0] - 1) < 0.1, norms
    assert abs(found[1][1] - found[0][1]) < 0.05, found


def test_genes_of_which_the_map_says_little_have_flatter_slopes():
    """Scores have unit sd, also those of genes of which the panel knows nothing: these were given the slope of the others, all of it noise."""
    world = spatial_field(seed=3, n_cells=500, n_reference=800, n_genes=120, n_panel=60, n_types=6, theta=5.0)
    rng, genes = np.random.default_rng(0), np.asarray(world.reference.var_names)
    alone = rng.permutation(len(genes)) % 2 == 0
    for table in (world.target, world.reference, world.truth):  # half of the genes vary by themselves: the same counts, in other cells
        counts, mine = table.X.toarray(), alone[np.searchsorted(genes, table.var_names)]
        counts[:, mine] = rng.permuted(counts[:, mine], axis=0)
        table.X = counts
    settings = ["penalty=3", "reweight=false", "fit.steps=4", "graph=none", "process=0.5"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=settings)
    model, new = sides(chains_of(run.pair)[0])[0], ~run.measured
    common = model.decoder[-1] * model.map_sd  # scores have unit sd; of what genes have in common all have as much, the less the map says
    torch.testing.assert_close(common, torch.full_like(common, run.spec.hyper.common), rtol=1e-4, atol=1e-6)
    slope = model.priors()["slope"][0].numpy()
    known, unknown = (slope[new & (alone[np.searchsorted(genes, run.genes)] == one)] for one in (False, True))
    assert run.spec.hyper.slope[2] > 0.1 and np.median(unknown) < 0.6 * np.median(known), (run.spec.hyper.slope, np.median(known), np.median(unknown))

"""From maps to counts (`ppl_st.models.common.counts`): the bend, and that inner genes tell which one the data have."""


from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm

from ppl_st.inference.hyperpriors import parameter_prior, random_effects
from ppl_st.models.common.counts import (
    FINE_SLOPES,
    LOG_THETA,
    SLOPES,
    Codes,
    CountLayer,
    Hyper,
    bend,
    depths,
    refined,
    score_counts,
)
from ppl_st.models.common.inner import BENDS, DEPTH_PRIORS, DOUBT, _priors, climb, doubt_of

torch.set_num_threads(1)


@pytest.mark.parametrize("k", [*BENDS, 1.0])
def test_the_bend_has_its_slope_rises_and_stays_finite(k):
    m = torch.linspace(-50.0, 50.0, 401, dtype=torch.float64, requires_grad=True)
    value, slope = bend(m, k)
    (gradient,) = torch.autograd.grad(value.sum(), m)
    torch.testing.assert_close(slope, gradient)
    assert bool(torch.isfinite(value).all()) and bool((slope > 0).all())
    inside = m.detach()[(m > -0.5) & (m < 5)]
    if k:  # log(1 + k m) / k where the floor is far away
        torch.testing.assert_close(bend(inside, k)[0], torch.log1p(k * inside) / k, atol=0.03 / k, rtol=0)
    else:
        assert bend(inside, k)[0] is inside


def planted(k, slope, seed):
    """Counts of 8 genes in 600 cells whose rates are bent by ``k``, and a fit that knows their maps exactly."""
    rng = np.random.default_rng(seed)
    place, loadings = rng.standard_normal((600, 6)).astype(np.float32), rng.standard_normal((6, 8)).astype(np.float32) / 2
    totals = rng.gamma(5.0, 40.0, 600)
    rate = totals[:, None] * torch.exp(slope * bend(torch.from_numpy(place @ loadings), k)[0]).numpy() / 30
    counts = rng.poisson(rate * rng.gamma(4.0, 1 / 4.0, rate.shape)).astype(np.float64)
    return counts, totals, place, Codes(loadings, np.zeros_like(loadings))


@pytest.mark.parametrize("k", [0.0, 0.3])
def test_counts_tell_how_the_map_is_bent(k):
    for seed in range(2):
        counts, totals, place, codes = planted(k, 0.8, seed)
        evidence = {one: logsumexp(score_counts(counts, totals, one, place, codes), axis=(0, 1)).sum() for one in BENDS}
        assert max(evidence, key=lambda one: evidence[one]) == k
        assert evidence[k] > max(value for one, value in evidence.items() if one != k) + 3


@pytest.mark.parametrize(("mean_total", "expected"), [(4.0, 0.5), (2.0, 1.0), (400.0, 0.0)])
def test_a_total_of_few_counts_says_little_of_the_depth(mean_total, expected):
    """Depths Gamma(2) and a total that is Poisson around T times them: their posterior mean is (total + 2) / (T + 2), so a = 2 / T."""
    rng = np.random.default_rng(5)
    true = rng.gamma(2.0, 0.5, 4000)
    totals, counts = rng.poisson(mean_total * true).astype(np.float64), rng.poisson(6.0 * true[:, None], (4000, 6)).astype(np.float64)
    flat = np.zeros((1, 6), np.float32)
    place, codes, alike = np.zeros((4000, 1), np.float32), Codes(flat, flat), np.ones(4000)
    evidence = {a: logsumexp(score_counts(counts, depths(totals, alike, a), 0.0, place, codes), axis=(0, 1)).sum() for a in DEPTH_PRIORS}
    assert climb(DEPTH_PRIORS, lambda a: evidence[a]) == max(evidence, key=lambda a: evidence[a]) == expected


@pytest.mark.parametrize(("best", "expected"), [(0.0, 2), (0.15, 3), (0.6, 4)])
def test_no_option_is_scored_twice(best, expected):
    """A score may be a regression of every inner gene; options beyond the first fall are not tried at all."""
    tried = []
    assert climb(BENDS, lambda k: tried.append(k) or -abs(k - best)) == best
    assert sorted(tried) == list(BENDS[:expected])


def test_slopes_that_fall_with_the_level_are_learned_and_predicted():
    """Rare genes with steep slopes, abundant ones with flat slopes: the hyper-prior says so; where all slopes are alike it does not."""
    rng = np.random.default_rng(3)
    z, place = np.linspace(-2.0, 2.0, 24), rng.standard_normal((600, 6)).astype(np.float32)
    loadings, totals = (rng.standard_normal((6, 24)) / 2).astype(np.float32), rng.gamma(5.0, 40.0, 600)
    tilts = []
    for slopes in (1.4 - 0.5 * z, np.full(24, 1.4)):
        rate = totals[:, None] * np.exp(z - 4 + slopes * (place @ loadings) - np.square(slopes) / 2)
        counts = rng.poisson(rate * rng.gamma(4.0, 1 / 4.0, rate.shape)).astype(np.float64)
        score = score_counts(counts, totals, 0.0, place, Codes(loadings, np.zeros_like(loadings)))
        slope, _ = _priors(refined(score), z)
        assert slope[0] == pytest.approx(1.4, abs=0.2)
        tilts.append(slope[1])
    assert tilts[0] == pytest.approx(-0.5, abs=0.12) and tilts[1] == pytest.approx(0.0, abs=0.08), tilts


@pytest.mark.parametrize("said", [0.15, 0.3, 0.6, 3.0])
def test_doubt_is_how_far_inner_genes_are_from_their_maps_over_how_far_they_were_said_to_be(said):
    """Loadings are off by .3; amplitudes are as if platforms differed by a factor, which is the slopes' business."""
    rng = np.random.default_rng(1)
    place = rng.standard_normal((1500, 10)).astype(np.float32) @ np.diag(np.linspace(0.7, 1.2, 10)).astype(np.float32)
    loadings = rng.standard_normal((10, 40)) * 0.4
    true = loadings + 0.3 * rng.standard_normal(loadings.shape)
    f = place @ true
    z = 0.7 * f / f.std(0) + 0.7 * rng.standard_normal(f.shape)
    counts, totals = np.expm1(np.maximum(3 + z / 2, 0)), np.full(1500, 100.0)
    scale = 0.7 / f.std(0)  # of the loadings in standardised counts; 40 % more is said
    mean, variance = (1.4 * scale * loadings).astype(np.float32), np.broadcast_to(np.square(said * scale), loadings.shape).astype(np.float32)
    found = doubt_of([(counts, totals, place, Codes(mean, variance))], 0.0)
    assert found == pytest.approx(np.clip(0.3 / said, *DOUBT), rel=0.12)
    assert doubt_of([(counts, totals, place, Codes(mean, 0 * variance))], 0.0) == 1.0
    dead = np.hstack([counts, np.zeros((1500, 40))]), totals, place, Codes(np.hstack([mean, mean]), np.hstack([variance, variance]))
    assert doubt_of([dead], 0.0) == pytest.approx(found)  # genes without counts said that maps are surer than they are


def test_doubt_scales_draws_around_their_mean_and_leaves_the_mean():
    rng = np.random.default_rng(2)
    mean, draws = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (5, 4, 3)))
    wide = Codes(mean, np.ones_like(mean), draws).mixed(0.0, 2.0)
    assert Codes(mean, np.ones_like(mean)).mixed(0.0, 2.0).draws is None
    np.testing.assert_array_equal(wide.mean, mean)
    np.testing.assert_allclose(wide.draws - mean, 2 * (draws - mean), rtol=1e-5)
    np.testing.assert_array_equal(wide.variance, 4)


@pytest.mark.parametrize(("level", "doubt"), [(1.0, 0.4), (5.0, 0.6)])
def test_slopes_are_learned_without_a_bias_where_maps_are_in_doubt(level, doubt):
    """The true slope is among the best. With six draws instead of the quadrature it was 22 and 68 nats behind a flatter one."""
    rng, slope = np.random.default_rng(0), 1.4
    place, mean = np.ones((1500, 1), np.float32), np.zeros((1, 1), np.float32)
    place[:, 0], mean[0, 0] = rng.standard_normal(1500), 0.3
    variance = np.full((1, 1), doubt**2, np.float32)
    f = place[:, 0] * mean[0, 0] + np.abs(place[:, 0]) * doubt * rng.standard_normal(1500)
    counts = rng.poisson(level * np.exp(slope * f) * rng.gamma(2.0, 0.5, 1500)).astype(float)[:, None]
    score = score_counts(counts, np.ones(1500), 0.0, place, Codes(mean, variance))
    evidence = logsumexp(score, axis=1)[:, 0]
    assert evidence[SLOPES == slope] > evidence.max() - 4


def test_the_prior_of_slopes_is_an_integral_not_a_sum_over_uneven_points():
    """Slopes ~ Normal(2, .6), each told to .1: on the uneven grid, where steep slopes have few points, it was 2.17 where the mean is 1.98."""
    rng = np.random.default_rng(0)
    true = rng.normal(2.0, 0.6, 300)
    seen = true + 0.1 * rng.standard_normal(300)
    score = np.repeat(-0.5 * ((SLOPES[:, None] - seen) / 0.1) ** 2, len(LOG_THETA), axis=0).reshape(len(SLOPES), len(LOG_THETA), 300)
    loc, _, scale = parameter_prior(logsumexp(refined(score), axis=1), np.zeros(300), FINE_SLOPES, 1.0, 0.5)
    assert loc == pytest.approx(true.mean(), abs=0.03) and scale == pytest.approx(0.6, abs=0.06)


def test_points_between_those_of_the_grid_are_as_if_they_had_been_scored(monkeypatch):
    rng = np.random.default_rng(1)
    place = rng.standard_normal((600, 4)).astype(np.float32)
    loadings = (0.4 * rng.standard_normal((4, 5))).astype(np.float32)
    counts = rng.poisson(np.exp(2.1 * place @ loadings) * rng.gamma(2.0, 0.5, (600, 5))).astype(float)
    codes = Codes(loadings, np.zeros_like(loadings))

    def told(score, grid):
        """Posterior mean of the slopes."""
        evidence = logsumexp(score, axis=1)
        return grid @ np.exp(evidence - logsumexp(evidence, axis=0))

    plain = score_counts(counts, np.ones(600), 0.0, place, codes)
    between = told(refined(plain), FINE_SLOPES)
    monkeypatch.setattr("ppl_st.models.common.counts.SLOPES", FINE_SLOPES[::2])
    direct = told(score_counts(counts, np.ones(600), 0.0, place, codes), FINE_SLOPES[::2])
    np.testing.assert_allclose(between, direct, atol=0.02)
    assert np.abs(told(plain, SLOPES) - direct).max() > 0.05  # the grid alone would say so


def test_lines_in_the_share_stay_as_they_are_beyond_the_inner_genes():
    """A gene far rarer than all inner genes has their last slope and theta, not what a line would reach out there; its level follows its share."""
    shares = np.linspace(-8.0, 4.0, 13)
    data = SimpleNamespace(log_share=shares, share_variance=np.full(13, 1e-6), counts=np.zeros((5, 13)))
    hyper = Hyper(0, 0, 1, 0, 0, (0.0, 1.0, 0.1), (0.0, 0.0, 0.0), (1.5, -0.2, 0.1), (1.0, 0.3, 0.1), 0.0, [], span=(-2.0, 2.0))
    layer = CountLayer(data, hyper, 3)
    z = torch.from_numpy(shares).clamp(-2, 2)
    torch.testing.assert_close(layer.slope_loc.double(), 1.5 - 0.2 * z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.log_theta_loc.double(), 1.0 + 0.3 * z, rtol=1e-3, atol=1e-3)
    assert float(layer.log_gain_loc[0]) == pytest.approx(-8.0, abs=0.01)


@pytest.mark.parametrize(("genes", "least"), [(3, 0.87), (5, 0.85), (12, 0.86), (50, 0.87)])
def test_effects_of_new_genes_are_covered_also_where_few_genes_taught_their_spread(genes, least):
    """90 % intervals; the likeliest sd of 3 genes covered .69, of 5 genes .79."""
    rng, covered = np.random.default_rng(genes), []
    for _ in range(300):
        mean, sd = random_effects(0.5 * rng.standard_normal(genes) + 0.2 * rng.standard_normal(genes), np.full(genes, 0.04))
        covered.append(norm.cdf((mean + 1.645 * sd) / 0.5) - norm.cdf((mean - 1.645 * sd) / 0.5))
    assert least < np.mean(covered) < 0.94, np.mean(covered)

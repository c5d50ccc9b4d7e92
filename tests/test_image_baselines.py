"""Interpolation, regression and Gaussian processes on spots: known answers, gradients, sections kept apart."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.ndimage import gaussian_filter
from scipy.optimize import approx_fprime

from ppl_st import image_baselines as ib
from ppl_st.data import Counts
from ppl_st.evaluate_images import _scored
from ppl_st.image_features import FEATURES, image_features


def places(xy, features, section=None, intensity=None):
    n = len(xy)
    zeros = np.zeros(n)
    return ib.Places(zeros.astype(np.int64) if section is None else section, xy, features, zeros if intensity is None else intensity)


@pytest.fixture(scope="module")
def split():
    """A grid of 16 x 16 places, half of them seen: genes 0 to 9 follow space, 10 to 19 a feature that knows nothing of space."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(16.0), np.arange(16.0))
    xy = np.stack([x.ravel(), y.ravel()], 1)
    feature = rng.standard_normal((256, 2))
    wave = np.sin(xy[:, :1] / 2.5) + np.cos(xy[:, 1:] / 3)
    rate = np.exp(np.concatenate([np.repeat(wave, 10, 1), np.repeat(np.tanh(feature[:, :1]), 10, 1)], 1) + 2)
    counts = rng.poisson(rate).astype(float)
    order = rng.permutation(256)
    seen, asked = order[:128], order[128:]
    return ib.Split(places(xy[seen], feature[seen]), counts[seen], places(xy[asked], feature[asked])), rate[asked], counts[asked]


def r2(estimate, truth):
    return np.array([np.corrcoef(a, b)[0, 1] ** 2 if np.ptp(a) > 0 else 0.0 for a, b in zip(estimate.T, truth.T, strict=True)])


def test_what_is_known_of_a_gene_is_not_taken_out_with_its_own_counts():
    """A gene that is half of all counts, in a rhythm of its own: given the depth of the others its rate is as good as without."""
    rng = np.random.default_rng(0)
    rate, others = rng.gamma(5, 10, 2000), rng.poisson(50, (2000, 2))
    counts = np.column_stack([rng.poisson(rate), others])
    truth = Counts(sp.csr_matrix(counts), np.array(list("abc")), np.arange(2000).astype(str), None, pd.DataFrame(), "test", "X")
    found = _scored(truth, np.array([0, 1]), np.column_stack([rate, others[:, 0]]))
    assert found["raw_partial_pcc"]["a"] == pytest.approx(found["raw_pcc"]["a"], abs=0.01) and found["raw_pcc"]["a"] > 0.9
    assert found["raw_partial_pcc"]["b"] == pytest.approx(1)
    deep = np.column_stack([counts.sum(1) - counts[:, :2].T]).T  # an estimate that knows nothing but the others' depth
    np.testing.assert_allclose(_scored(truth, np.array([0, 1]), deep)["raw_partial_pcc"], 0)


def test_gaussian_processes_use_what_they_are_given(split):
    data, rate, _ = split
    fit = {name: r2(ib.IMAGE_BASELINES[name](data), rate) for name in ("nearest", "linear", "knn", "gp_space", "gp_image", "gp_space_image")}
    assert fit["gp_space"][:10].mean() > max(0.9, *(fit[name][:10].mean() for name in ("nearest", "linear", "knn")))
    assert fit["gp_space"][10:].mean() < 0.2 and fit["gp_image"][:10].mean() < 0.2
    assert fit["gp_image"][10:].mean() > 0.85
    # two kernels with one amplitude for all genes: no gene is as good as with the right kernel alone, all are good
    assert fit["gp_space_image"].min() > 0.6


def test_estimates_are_on_the_scale_of_counts(split):
    data, rate, _ = split
    for name, estimate in ib.IMAGE_BASELINES.items():
        values = estimate(data)
        assert values.shape == rate.shape and (values >= 0).all() and np.isfinite(values).all(), name
        assert abs(values.mean() / rate.mean() - 1) < 0.1, name


def test_the_marginal_likelihood_has_the_right_gradient(split, monkeypatch):
    data, _, _ = split
    y = (np.sqrt(data.counts) - np.sqrt(data.counts).mean(0)) / np.sqrt(data.counts).std(0)
    some = np.arange(40)
    distances = [d[np.ix_(some, some)] for d in ib._distances(data.seen, data.seen, True, True)]
    caught = {}

    def spy(loss, start, **options):
        caught["loss"], caught["start"] = loss, start
        raise StopIteration

    monkeypatch.setattr(ib, "minimize", spy)
    with pytest.raises(StopIteration):
        ib._learn(distances, y[some])
    point = caught["start"] + np.array([0.1, -0.2, 0.3, -0.1, 0.2])
    numeric = approx_fprime(point, lambda p: caught["loss"](p)[0], 1e-6)
    assert np.allclose(caught["loss"](point)[1], numeric, atol=1e-4, rtol=1e-4)
    # and the value is the mean negative log density of the genes, up to a constant
    kernel = ib._kernel(distances, point[:2], point[2:4]) + np.exp(2 * point[4]) * np.eye(40)
    density = 0.5 * np.einsum("ig,ij,jg->g", y[some], np.linalg.inv(kernel), y[some]) + 0.5 * np.linalg.slogdet(kernel)[1]
    assert caught["loss"](point)[0] == pytest.approx(density.mean())


def test_space_does_not_cross_sections(split):
    data, _, _ = split
    n = len(data.counts)
    two = ib.Places(*(np.concatenate([a, a]) for a in data.seen))._replace(section=np.repeat([0, 1], n))
    asked = data.asked._replace(section=np.zeros(len(data.asked.xy), np.int64))
    both = ib.Split(two, np.concatenate([data.counts, 0 * data.counts]), asked)  # the other section lies on top and is empty
    for name in ("nearest", "linear", "knn"):
        assert (ib.IMAGE_BASELINES[name](both) == ib.IMAGE_BASELINES[name](data)).all(), name
    assert r2(ib.gp_space(both)[:, :10], ib.gp_space(data)[:, :10]).min() > 0.9


def test_color_regression_on_bins():
    intensity = np.linspace(0, 1, 101)
    counts = np.stack([10 * (np.searchsorted([0.2, 0.4, 0.6, 0.8], intensity) + 1.0), np.full(101, 3.0)], 1)
    zeros = np.zeros((101, 2))
    data = ib.Split(places(zeros, zeros, intensity=intensity), counts, places(zeros[:2], zeros[:2], intensity=np.array([0.1, 0.9])))
    assert np.allclose(ib.color(data), [[10, 3], [50, 3]], atol=0.6)


def test_features_are_standardised_and_ignore_staining():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 180, (60, 80, 3)).astype(np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[10:50, 10:70] = True
    found = image_features(image, mask, 8.0)
    assert found.shape == (FEATURES, 60, 80) and np.abs(found[:, mask].mean(1)).max() < 0.05 and np.abs(found[:, mask].std(1) - 1).max() < 0.05
    darker = image_features((image // 2 + 10).astype(np.uint8), mask, 8.0)
    assert np.corrcoef(found[:, mask].ravel(), darker[:, mask].ravel())[0, 1] > 0.98
    into = np.full_like(found, np.nan)
    assert image_features(image, mask, 8.0, into) is into and np.array_equal(into, found)


def test_features_are_those_of_floats_of_the_whole_image():
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (400, 500, 3)).astype(np.uint8), np.ones((400, 500), bool)
    found = image_features(image, mask, 8.0)
    rgb = image.astype(np.float32) / 255
    grey, raw = rgb.mean(2), []
    gradient = np.hypot(*np.gradient(gaussian_filter(grey, 0.5)))
    for sd in (1.0, 8 / 3, 8.0):
        spread = np.sqrt(np.maximum(gaussian_filter(grey * grey, sd) - gaussian_filter(grey, sd) ** 2, 0))
        raw += [*(gaussian_filter(plane, sd) for plane in (*np.moveaxis(rgb, 2, 0), gradient)), spread]
    raw = np.stack(raw).astype(np.float64)
    exact = (raw - raw.mean((1, 2), keepdims=True)) / np.maximum(raw.std((1, 2), keepdims=True), 1e-3)
    assert np.abs(found - exact.clip(-5, 5)).max() < 2e-4  # of 5; sums of float32, term by term, were farther off


@pytest.mark.parametrize("number", [1, 2, 5])
def test_on_a_line_linear_interpolation_is_the_nearest_spot(split, number):
    data, _, _ = split
    line = data.seen._replace(xy=np.stack([np.arange(len(data.seen.xy)), np.zeros(len(data.seen.xy))], 1))
    few = data._replace(seen=ib.Places(*(values[:number] for values in line)), counts=data.counts[:number], asked=line)
    assert np.array_equal(ib.linear(few), ib.nearest(few))

"""SpaIM's closed form: the textbook's regression, the most probable scales, a kernel that knows how well it knows profiles."""

from dataclasses import replace

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import multivariate_normal

from ppl_st.models import spaim
from ppl_st.models.common.cells import Directions, find_directions, place_cells, without
from ppl_st.models.spaim import kernel
from ppl_st.models.spaim.model import RATIOS, Layer, choose, misfit
from spaim_problems import SMALL, data_of, small_world

world = pytest.fixture(small_world, scope="module")
data = pytest.fixture(data_of, scope="module")


def dense_kernel(data, genes):
    return kernel.GeneKernel(data, 0.5)(genes, genes)


def test_loadings_are_the_gaussian_process_regression_of_the_textbook(data):
    held = np.setdiff1d(np.arange(60), data.panel)[:7]
    layer = Layer(data, replace(SMALL, regression=0.5), 0, genes=held)
    mean, variance = layer.codes()[:2]
    k = dense_kernel(data, np.concatenate([data.panel, held]))
    p = len(data.panel)
    for direction in range(min(3, len(layer.ratio))):
        signal, noise = layer.ratio[direction] * layer.noise[direction], layer.noise[direction]
        gain = signal * k[p:, :p] @ np.linalg.inv(signal * k[:p, :p] + noise * np.eye(p))
        np.testing.assert_allclose(mean[direction], layer.regressed[direction] + gain @ layer.scores[direction], atol=2e-3)
        expected = signal * np.diag(k)[p:] + noise - signal * np.einsum("gp,gp->g", gain, k[p:, :p])
        np.testing.assert_allclose(variance[direction], expected, rtol=0.02)


def test_what_landmarks_leave_of_the_panel_is_doubted_once(data):
    """It is in the noise that is fitted to all genes, and was added to it once more: loadings were nearer than they were said to be."""
    held, rng = np.setdiff1d(np.arange(60), data.panel), np.random.default_rng(0)
    layer = Layer(data, replace(SMALL, landmarks=18), 0, genes=held)
    k, p = dense_kernel(data, np.concatenate([data.panel, held])), len(data.panel)
    true = rng.standard_normal((400, p + len(held))) @ np.linalg.cholesky(k + 0.05 * np.eye(len(k))).T
    loss, noise = misfit(true[:, :p], layer.phi, layer.eigenvalues)
    best = loss.argmin(1)
    layer.ratio, layer.noise, layer.scores, layer.regressed = RATIOS[best], noise[np.arange(400), best], true[:, :p], np.zeros((400, len(held)))
    found = []
    for left in (layer.left, 0.0):
        layer.left = left
        mean, variance = layer.codes()[:2]
        found.append(np.square(true[:, p:] - mean).mean() / variance.mean())
    assert found[1] + 0.08 < found[0] < 1.1, found


def test_the_elbo_is_the_log_marginal_likelihood_for_every_draw(data):
    layer = Layer(data, SMALL, 0)
    hyper = spaim.learn_hyper(without(data, np.arange(30)), SMALL, 0, lambda line: None, None)  # too few genes: wide hyper-priors
    pair = spaim.build(SMALL, spaim.Spec(layer.marks.tolist(), hyper), data, layer)
    gram = layer.phi.astype(np.float64) @ layer.phi.T
    exact = sum(
        multivariate_normal.logpdf(t, cov=s * (r * gram + np.eye(len(t))))
        for t, r, s in zip(layer.scores, layer.ratio, layer.noise, strict=True)
    )
    batch = spaim.batches(data, SMALL, 0).at(0)
    for seed in range(3):
        torch.manual_seed(seed)
        guided = poutine.trace(pair.guide).get_trace(batch)
        model = poutine.trace(poutine.replay(pair.model, guided)).get_trace(batch)
        assert (model.log_prob_sum() - guided.log_prob_sum()).item() == pytest.approx(exact, rel=2e-3)


def test_a_smoothing_without_neighbors_is_said(data):
    class Fitted(Exception):
        pass

    def fit(problem, genes):
        raise Fitted

    for smoothing, number in ((0.5, 1), (0.0, 0), ("auto", 0)):
        said = []
        with pytest.raises(Fitted):
            spaim.learn_hyper(data._replace(neighbors=None), replace(SMALL, smoothing=smoothing), 0, said.append, fit)
        assert sum("without coordinates the target has no neighbors; 0 is used" in line for line in said) == number


def test_signal_and_noise_start_at_their_maximum(data):
    layer = Layer(data, SMALL, 0)
    gram = layer.phi.astype(np.float64) @ layer.phi.T

    def loglik(k, ratio, noise):
        return multivariate_normal.logpdf(layer.scores[k], cov=noise * (ratio * gram + np.eye(len(gram))))

    for k in range(len(layer.ratio)):
        best = loglik(k, layer.ratio[k], layer.noise[k])
        for ratio in (0.3, 3.0):
            for noise in (0.7, 1.0, 1.4):
                inside = 1e-4 < ratio * layer.ratio[k] < 1e3
                assert not inside or loglik(k, ratio * layer.ratio[k], noise * layer.noise[k]) <= best + 0.05


def test_the_lengthscale_is_the_most_probable_one(data):
    """Loadings drawn from the kernel at 2 are recognised; loadings without any structure leave the usual one."""
    rng = np.random.default_rng(0)
    panel = np.arange(60)
    full = data._replace(panel=panel, columns=panel, counts=sp.csr_matrix(np.ones((3, 60), np.float32)))
    k = kernel.GeneKernel(data, 2.0)(panel, panel)
    smooth = np.linalg.cholesky(3 * k + 0.01 * np.eye(60)) @ rng.standard_normal((60, 40))
    for scores, expected in ((smooth.T, {2.0}), (rng.standard_normal((40, 60)), {0.5})):
        found = Directions(*[np.zeros(0, np.float32)] * 3, scores, 1.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ppl_st.models.spaim.model.find_directions", lambda *_, found=found: found)
            patch.setattr("ppl_st.models.spaim.model.own_share", lambda scores, n: np.zeros(scores.shape[1]))
            assert choose(full, replace(SMALL, regression=0.0), 0)[0] in expected


def test_kernel_is_a_covariance_and_badly_known_profiles_resemble_nobody(data):
    genes = np.arange(60)
    k = dense_kernel(data, genes)
    np.testing.assert_allclose(k, k.T, atol=1e-12)
    assert np.linalg.eigvalsh(k).min() > -1e-8
    np.testing.assert_allclose(np.diag(k), kernel.SELF)
    noisy = data._replace(errors=data.errors.copy())
    noisy.errors[5] *= 30
    worse = dense_kernel(noisy, genes)
    others = np.setdiff1d(genes, 5)
    assert (worse[5, others] < k[5, others]).all()
    np.testing.assert_allclose(worse[np.ix_(others, others)], k[np.ix_(others, others)])
    noisy.errors[50] *= 30
    # The training genes, hence signal and noise, are the same; only the held-out gene is known less well.
    still = data._replace(errors=noisy.errors.copy())
    still.errors[50] = data.errors[50]
    known, unknown = (Layer(d, SMALL, 0, genes=np.array([50])).codes()[1] for d in (still, noisy))
    assert (unknown >= known).all() and unknown.sum() > 1.02 * known.sum()


def test_correlations_from_dense_blocks_and_from_sparse_sums_agree(data, monkeypatch):
    a, b = np.arange(0, 60, 2), np.arange(5)
    found = []
    for share in (0.0, 2.0):
        monkeypatch.setattr(kernel, "CROWDED", share)
        found.append(kernel.GeneKernel(data, 0.5).correlation(a, b))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    logs = data.reference.toarray().astype(np.float64)
    np.testing.assert_allclose(found[0], np.corrcoef(logs.T)[np.ix_(a, b)], atol=5e-6)


def test_expected_kernel_is_the_mean_over_profile_noise():
    rng = np.random.default_rng(0)
    profiles = rng.normal(size=(2, 6)).astype(np.float32)
    errors = np.full((2, 6), 0.4, np.float32)
    reference = sp.csr_matrix(rng.poisson(1.0, (30, 2)).astype(np.float32))
    data = spaim.Data(reference, np.arange(2), np.arange(2), reference, profiles, errors, np.zeros(2), np.ones(2), np.ones(reference.shape[0]))
    both = kernel.GeneKernel(data, 0.5)
    c = both.correlation(np.array([0]), np.array([1]))[0, 0]
    near = 3 * (both(np.array([0]), np.array([1]))[0, 0] - kernel.CONSTANT) - c - np.exp(-(1 - c) / 0.5)
    sd = np.sqrt(both.noise / 6)
    shifted = [both.profiles[g] + sd[g] * rng.normal(size=(200_000, 6)) for g in (0, 1)]
    sampled = np.exp(-np.square(shifted[0] - shifted[1]).sum(1) / (2 * 0.5)).mean()
    assert near == pytest.approx(sampled, rel=0.01)


def test_directions_from_streamed_sums_are_those_of_the_whole_matrix(data, monkeypatch):
    found = find_directions(data.counts, 6, data.totals)
    place = place_cells(found, data.counts)
    logs = np.log1p(data.counts.toarray() * (found.depth / data.totals)[:, None])
    z = (logs - logs.mean(0)) / logs.std(0)
    np.testing.assert_allclose(place.T @ place / len(place), np.eye(6), atol=2e-3)
    np.testing.assert_allclose(found.scores, place.T @ z / len(z), atol=2e-3)
    monkeypatch.setattr("ppl_st.models.common.cells.DENSE_GENES", 5)
    iterated = find_directions(data.counts, 6, data.totals)
    np.testing.assert_allclose(np.abs(iterated.scores), np.abs(found.scores), atol=2e-3)


def test_fewer_landmarks_than_genes_still_predict(data):
    held = np.setdiff1d(np.arange(60), data.panel)
    exact = Layer(data, SMALL, 0, genes=held).codes()[0]
    config = replace(SMALL, landmarks=24)
    approximate = Layer(data, config, 0, genes=held)
    assert approximate.phi.shape == (len(data.panel), 24)
    ours = approximate.codes()[0]
    assert np.corrcoef(exact[0], ours[0])[0, 1] > 0.8

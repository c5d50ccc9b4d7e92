"""SpaGene's closed forms: principal components, the textbook's regressions, the reference's own where it serves, an exact posterior."""

import copy

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.stats import multivariate_normal

import ppl_st
from ppl_st.inference.ensemble import chains_of
from ppl_st.metrics import pcc
from ppl_st.models import spagene
from ppl_st.models.common.counts import smooth
from ppl_st.models.spagene.autoencoder import Autoencoder, CellBatches, autoencoder_pair, linear
from ppl_st.models.spagene.closed import Closed, choose, features, places_of
from ppl_st.models.spagene.model import PRESETS, direction_of
from ppl_st.models.spagene.regression import loadings_of_all, regress
from ppl_st.simulate import spatial_field
from ppl_st.testing import check_pair
from spagene_problems import pose, quiet, settings, small_world, some_shared, untrained

world = pytest.fixture(small_world, scope="module")
some = pytest.fixture(some_shared, scope="module")


@pytest.fixture(scope="module")
def data(world):
    return pose(world)


def test_the_linear_autoencoder_is_principal_components_and_the_elbo_knows_it(some):
    shape = PRESETS["default"].shape(0)._replace(latent=5)
    net = linear(some, shape)
    x = net.read(some, np.arange(300))
    z, scale = net.codes(some)
    torch.testing.assert_close(z.T @ z / 300, torch.eye(5), atol=1e-3, rtol=0)
    _, values, vectors = np.linalg.svd(x.numpy() / np.sqrt(300), full_matrices=False)
    projector = vectors[:5].T @ vectors[:5]
    np.testing.assert_allclose(net.decode(z).numpy(), x.numpy() @ projector, atol=2e-3)
    np.testing.assert_allclose(scale[0].numpy(), np.sqrt((values[5:] ** 2).mean() / values[:5] ** 2), rtol=1e-3)
    # With code and loadings shrunk, q is the exact posterior: every draw's ELBO is the log marginal likelihood. As it is, the ELBO is below.
    noise = float(scale[0, 0]) ** 2 * values[0] ** 2
    exact = copy.deepcopy(net)
    shrink = (1 - scale[0].square()).sqrt()
    exact.encoder[-1].weight.mul_(shrink[:, None])
    exact.decoder[-1].weight.mul_(shrink)
    w = exact.loadings.double().numpy()
    marginal = multivariate_normal.logpdf(x.double().numpy(), cov=w @ w.T + noise * np.eye(len(w))).sum()
    for one, tolerance in ((exact, 1e-5), (net, None)):
        pair = autoencoder_pair(one)
        pair.model.log_noise.data.fill_(0.5 * np.log(noise))
        guide = poutine.trace(pair.guide).get_trace(CellBatches(one, some, 0, 0).at(0))
        model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(CellBatches(one, some, 0, 0).at(0))
        elbo = (model.log_prob_sum() - guide.log_prob_sum()).item()
        assert elbo == pytest.approx(marginal, rel=tolerance) if tolerance else elbo < marginal - 10


def test_inner_genes_are_judged_where_only_the_cells_needed_are_encoded(data, monkeypatch):
    shape = PRESETS["default"].shape(0)._replace(latent=5)
    net, rows = linear(data, shape), np.array([3, 70, 200])
    codes, scale = net.codes(data)
    assert scale.shape == codes.shape and scale.untyped_storage().nbytes() == 4 * 5  # one row, seen n times
    for mix, found in places_of(net, data, rows, (0.3, 0.5)).items():
        np.testing.assert_allclose(found, smooth(codes.numpy(), data.neighbors, mix)[rows], atol=1e-5)
    read, plain = [], Autoencoder.read
    monkeypatch.setattr(Autoencoder, "read", lambda net, data, some, *more: read.append(len(some)) or plain(net, data, some, *more))
    monkeypatch.setattr("ppl_st.models.spagene.closed.CELLS", 50)
    other = linear(data.turned(), shape)
    choose(data._replace(neighbors=None), shape, other, features(other, data.panel), "auto", 0.0, 0, quiet)
    assert read == 8 * [50]  # their codes and the truth, in four folds


def test_the_translator_is_the_bayesian_regression_of_the_textbook(some):
    shape = PRESETS["default"].shape(0)._replace(latent=4)
    own, other = linear(some, shape), linear(some.turned(), shape._replace(latent=6))
    found = features(other, some.panel)
    held = np.setdiff1d(np.arange(some.reference.shape[1]), some.panel)[:7]
    closed = Closed(some, own, found, 0.5, held)
    gram = found.phi[some.panel].T @ found.phi[some.panel]
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-8)
    d = np.column_stack([other.loadings.numpy(), np.full(len(other.loadings), np.sqrt(0.2))]).astype(np.float64)
    t = own.loadings.numpy()[some.columns].T.astype(np.float64)
    mean, variance = closed.codes()[:2]
    for k, (ratio, noise) in enumerate(zip(closed.ratios, closed.noise, strict=True)):
        inverse = np.linalg.inv(d[some.panel].T @ d[some.panel] + np.eye(7) / ratio)
        np.testing.assert_allclose(mean[k], t[k] @ d[some.panel] @ inverse @ d[held].T, atol=1e-6)
        np.testing.assert_allclose(variance[k], noise * (1 + np.einsum("gi,ij,gj->g", d[held], inverse, d[held])), rtol=1e-4)

        def log_posterior(ratio, noise, k=k):
            cov = noise * (ratio * d[some.panel] @ d[some.panel].T + np.eye(20))
            return multivariate_normal.logpdf(t[k], cov=cov) - 0.5 * (np.log(ratio / 0.5) / 1.5) ** 2

        best = log_posterior(ratio, noise)
        assert all(log_posterior(a * ratio, b * noise) < best + 0.05 for a in (0.3, 1, 3) for b in (0.7, 1, 1.4))


def test_the_references_own_regression_is_ridge_on_its_standardised_cells(some):
    shape = PRESETS["default"].shape(0)._replace(latent=4)
    own, other = linear(some, shape), linear(some.turned(), shape._replace(latent=6))
    kept, inner = np.arange(5, 20), np.arange(5)
    found = regress(some, other, [inner])
    z = other.read(some.turned(), np.arange(some.reference.shape[0])).numpy().astype(np.float64)
    m, t = len(z), own.loadings.numpy()[some.columns].T.astype(np.float64)

    def ridge(on, to):
        return np.linalg.solve(z[:, on].T @ z[:, on] + m * found.penalty * np.eye(len(on)), z[:, on].T @ z[:, to])

    part = found.inner(t[:, kept], some.panel[kept], some.panel[inner])
    np.testing.assert_allclose(part, t[:, kept] @ ridge(some.panel[kept], some.panel[inner]), atol=1e-4)
    everything = loadings_of_all(some, other, found.weights(t, some.panel))
    np.testing.assert_allclose(everything, t @ ridge(some.panel, np.arange(z.shape[1])), atol=1e-4)
    # The penalty is better on the inner genes, by generalised cross-validation, than a tenth and ten times of it.
    score = {}
    for a in (found.penalty / 10, found.penalty, found.penalty * 10):
        left, right = z[:, some.panel[kept]], z[:, some.panel[inner]]
        hat = left @ np.linalg.solve(left.T @ left + m * a * np.eye(15), left.T)
        score[a] = np.mean(np.square(right - hat @ right).mean(0) / right.var(0)) / (1 - (1 + np.trace(hat)) / m) ** 2
    assert min(score, key=lambda a: score[a]) == found.penalty, score


def test_where_the_reference_is_the_same_platform_its_regression_is_chosen_and_used(world, tmp_path):
    """Halves of one experiment: what the reference's cells say of a gene holds in the target. It enters means and draws, and is stored."""
    whole = spatial_field(seed=3, n_cells=400, n_reference=1600, n_genes=30, n_panel=24, n_types=6, rho=3.0).reference
    target = whole[:800, :24].copy()
    target.obsm["spatial"] = np.random.default_rng(0).uniform(0, 1000, (800, 2))
    both = {}
    for share in ("auto", 0.0):
        overrides = [f"reference_share={share}", "process=0.0", "latent=[24, 24]", "smoothing=0", "fit.steps=2"]
        both[share] = ppl_st.fit("spagene", target=target, reference=whole[800:].copy(), overrides=overrides, seed=0, out=tmp_path / str(share))
    first = direction_of(chains_of(both["auto"].pair)[0], 0)
    assert first.share >= 0.5 and direction_of(chains_of(both[0.0].pair)[0], 0).share == 0
    genes = torch.from_numpy(np.flatnonzero((first.measured < 0).numpy()))
    mean, variance = first.mean_codes(genes)
    expected = (1 - first.share) * first.loc @ first.phi[genes].T + first.share * first.regressed[:, genes]
    torch.testing.assert_close(mean, expected)
    drawn, mean, variance = [], mean.detach(), variance.detach()
    for key in range(400):
        weights = first.loc.detach() + first.posterior_scale().detach() * torch.randn(first.loc.shape, generator=torch.Generator().manual_seed(key))
        drawn.append(first.codes({"translator": weights, "gene_key": torch.tensor(key)}, genes))
    torch.testing.assert_close(torch.stack(drawn).mean(0), mean, atol=6 * float((variance.max() / 400).sqrt()), rtol=0)
    torch.testing.assert_close(torch.stack(drawn).var(0).mean(1), variance.mean(1), rtol=0.25, atol=0)
    truth = whole[:800].to_df()[list(whole.var_names[24:])].to_numpy()
    score = {share: pcc(truth, run.predict(genes=list(whole.var_names[24:]), draws=20).to_df().to_numpy()).mean() for share, run in both.items()}
    assert score["auto"] > score[0.0] + 0.01, score
    again = direction_of(chains_of(ppl_st.load(tmp_path / "auto").pair)[0], 0)
    assert torch.equal(again.regressed, first.regressed) and again.share == first.share


def test_the_pair_of_the_linear_translator_is_a_law_abiding_pair_with_its_posterior(data):
    config = settings("default", "batch_cells=50", "batch_reference=55")
    pair = untrained(config, data)
    whole = spagene.Batches(data, 0, 0, 0).at(0)
    found = check_pair(pair, spagene.batches(data, config, 0), whole, {"cells": 300, "reference": 220})
    assert not found, found
    # For any draw, log p(t | W) + log p(W) - log q(W) is the log marginal likelihood of the loadings: q is exact.
    values = []
    for seed in range(4):
        torch.manual_seed(seed)
        guide = poutine.trace(pair.guide).get_trace(whole)
        model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(whole)
        values.append((model.log_prob_sum() - guide.log_prob_sum()).item())
    assert np.ptp(values) < 2e-3 * abs(values[0])

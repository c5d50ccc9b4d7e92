"""SpaIM: the closed form is exact, the published objective is the published one, predictions are of the genes asked for."""

from dataclasses import replace

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import multivariate_normal

import ppl_st
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.factors import content_loss, gram, style_loss
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import Pair
from ppl_st.metrics import score_table
from ppl_st.models import spaim
from ppl_st.models.common.cells import Directions, find_directions, log_shares, place_cells, without
from ppl_st.models.common.counts import level_prior
from ppl_st.models.spaim import Config, kernel
from ppl_st.models.spaim.model import Layer, choose
from ppl_st.models.spaim.network import build_network, observations
from ppl_st.models.spaim.regression import Regression, own_share
from ppl_st.prepare.spaim import cluster_profiles, leiden, problem
from ppl_st.simulate import spatial_field

SMALL = replace(Config(), clusters=8)


@pytest.fixture(scope="module")
def world():
    return spatial_field(seed=3, n_cells=500, n_reference=400, n_genes=60, n_panel=36, platform_sd=0.5)


def pose(world, config=SMALL):
    target = read_counts(world.target, role="target")
    return problem(target, read_counts(world.reference, role="reference", need_spatial=False), config, lambda line: None)


@pytest.fixture(scope="module")
def data(world):
    return pose(world)[0]


@pytest.fixture(scope="module")
def run(world):
    return ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8"], seed=0)


# ---- the closed form ----


def dense_kernel(data, genes):
    return kernel.GeneKernel(data, 0.5)(genes, genes)


def test_loadings_are_the_gaussian_process_regression_of_the_textbook(data):
    held = np.setdiff1d(np.arange(60), data.panel)[:7]
    layer = Layer(data, replace(SMALL, regression=0.5), 0, genes=held)
    mean, variance, draws = layer.codes(4000, [0])[:3]
    k = dense_kernel(data, np.concatenate([data.panel, held]))
    p = len(data.panel)
    for direction in range(min(3, len(layer.ratio))):
        signal, noise = layer.ratio[direction] * layer.noise[direction], layer.noise[direction]
        gain = signal * k[p:, :p] @ np.linalg.inv(signal * k[:p, :p] + noise * np.eye(p))
        np.testing.assert_allclose(mean[direction], layer.regressed[direction] + gain @ layer.scores[direction], atol=2e-3)
        expected = signal * np.diag(k)[p:] + noise - signal * np.einsum("gp,gp->g", gain, k[p:, :p])
        np.testing.assert_allclose(variance[direction], expected, rtol=0.02)
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(variance.max() / 4000))
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.2)


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


def factors(n, genes, seed=0, sd=1.0):
    """Standardised cells [n, genes] with five factors and noise of very different size by gene."""
    rng = np.random.default_rng(7)
    loadings, noise = rng.standard_normal((5, genes)), rng.uniform(0.3, 3.0, genes)
    draw = np.random.default_rng(seed)
    z = draw.standard_normal((n, 5)) @ loadings + sd * noise * draw.standard_normal((n, genes))
    scale = np.sqrt(np.square(loadings).sum(0) + np.square(sd * noise))
    return (z - z.mean(0)) / z.std(0), loadings / scale, np.square(sd * noise / scale)


@pytest.mark.parametrize(("n", "q"), [(4000, 60), (4000, 20), (50, 40)])
def test_own_share_is_what_the_other_genes_do_not_know(n, q):
    """Also from some of the directions only, and with fewer cells than genes."""
    z, loadings, noise = factors(n, 60)
    values, vectors = np.linalg.eigh(z.T @ z / n)
    own = own_share((vectors * np.sqrt(values.clip(0))).T[::-1][:q], n)
    cov = loadings.T @ loadings + np.diag(noise)
    truth = 1 / np.diag(np.linalg.inv(cov))
    exact = n > 60 and q == 60
    assert np.corrcoef(own, truth)[0, 1] > (0.95 if exact else 0.7)
    assert np.abs(own - truth).mean() < (0.06 if exact else 0.2)


def test_loadings_without_their_own_share_are_those_of_a_gene_that_was_not_measured():
    """The regression of one half of the cells predicts loadings in the other: signs of weak directions included."""
    z, _, _ = factors(6000, 60)
    other, _, _ = factors(6000, 60, seed=1)
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    raw = (vectors * np.sqrt(values)).T[::-1]
    strength = np.square(raw).sum(1)[:, None]
    weak = strength[:, 0] < np.median(strength)
    q = np.linalg.inv(other.T @ other / len(other))
    predicted = raw - raw @ q / np.diag(q)
    found = raw * (1 - own_share(raw, len(z)) / strength)
    assert np.corrcoef(predicted[weak].ravel(), found[weak].ravel())[0, 1] > 0.8
    assert np.corrcoef(predicted[weak].ravel(), raw[weak].ravel())[0, 1] < 0


def test_the_regression_is_that_of_the_reference_and_leaves_a_panel_gene_out(data):
    panel, genes = data.panel[::-1].copy(), np.concatenate([data.panel[:3], np.setdiff1d(np.arange(60), data.panel)[:2]])
    teacher = Regression(kernel.GeneKernel(data, 0.5), np.sort(panel), panel)
    c = kernel.GeneKernel(data, 0.5).correlation(np.arange(60), np.arange(60))
    penalty = np.linalg.eigvalsh(np.linalg.inv(teacher.inverse))[0] - np.linalg.eigvalsh(c[np.ix_(data.panel, data.panel)])[0]
    scores = np.random.default_rng(0).standard_normal((4, len(panel)))
    found = teacher.of(scores, genes)
    for j, gene in enumerate(genes):
        others = panel[panel != gene]
        slopes = np.linalg.solve(c[np.ix_(others, others)] + penalty * np.eye(len(others)), c[others, gene])
        np.testing.assert_allclose(found[:, j], scores[:, panel != gene] @ slopes, atol=1e-5)


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.75, 1.0), (True, 0.0, 0.25)])
def test_the_regression_counts_where_reference_and_target_are_alike(shuffled, low, high):
    """The reference is the other half of the same cells; or their genes carry each other's names."""
    world = spatial_field(seed=5, n_cells=3000, n_reference=50, n_genes=60, n_panel=59, spatial=0.0, theta=50, rho=20)
    other = world.target[1500:].copy()
    if shuffled:
        other.var_names = np.random.default_rng(0).permutation(other.var_names)
    posed = problem(read_counts(world.target[:1500].copy(), role="target"), read_counts(other, role="reference"), SMALL, lambda line: None)[0]
    assert low <= choose(posed, SMALL, 0)[1] <= high


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
    known, unknown = (Layer(d, SMALL, 0, genes=np.array([50])).codes(1, [0])[1] for d in (still, noisy))
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
    data = spaim.Data(reference, np.arange(2), np.arange(2), reference, profiles, errors, np.zeros(2), np.ones(2))
    both = kernel.GeneKernel(data, 0.5)
    c = both.correlation(np.array([0]), np.array([1]))[0, 0]
    near = 3 * (both(np.array([0]), np.array([1]))[0, 0] - kernel.CONSTANT) - c - np.exp(-(1 - c) / 0.5)
    sd = np.sqrt(both.noise / 6)
    shifted = [both.profiles[g] + sd[g] * rng.normal(size=(200_000, 6)) for g in (0, 1)]
    sampled = np.exp(-np.square(shifted[0] - shifted[1]).sum(1) / (2 * 0.5)).mean()
    assert near == pytest.approx(sampled, rel=0.01)


def test_directions_from_streamed_sums_are_those_of_the_whole_matrix(data, monkeypatch):
    found = find_directions(data, 6)
    place = place_cells(found, data.counts, data.totals)
    logs = np.log1p(data.counts.toarray() * (found.depth / data.totals)[:, None])
    z = (logs - logs.mean(0)) / logs.std(0)
    np.testing.assert_allclose(place.T @ place / len(place), np.eye(6), atol=2e-3)
    np.testing.assert_allclose(found.scores, place.T @ z / len(z), atol=2e-3)
    monkeypatch.setattr("ppl_st.models.common.cells.DENSE_GENES", 5)
    iterated = find_directions(data, 6)
    np.testing.assert_allclose(np.abs(iterated.scores), np.abs(found.scores), atol=2e-3)


def test_fewer_landmarks_than_genes_still_predict(data):
    held = np.setdiff1d(np.arange(60), data.panel)
    exact = Layer(data, SMALL, 0, genes=held).codes(1, [0])[0]
    config = replace(SMALL, landmarks=24)
    approximate = Layer(data, config, 0, genes=held)
    assert approximate.phi.shape == (len(data.panel), 24)
    ours = approximate.codes(1, [0])[0]
    assert np.corrcoef(exact[0], ours[0])[0, 1] > 0.8


# ---- the reference ----


def test_profiles_have_their_standard_errors_and_medians():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], [400, 100])
    values = rng.normal(3, 1, (500, 4)).astype(np.float32)
    mean, error = cluster_profiles(sp.csr_matrix(values), codes, "mean")
    np.testing.assert_allclose(mean[:, 0], values[:400].mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, np.array([[0.05, 0.1]] * 4), rtol=0.3)
    median, wider = cluster_profiles(sp.csr_matrix(values), codes, "median")
    np.testing.assert_allclose(median[:, 1], np.median(values[400:], 0), rtol=1e-5)
    assert (wider > error).all()


def test_clusters_by_label_by_number_and_by_resolution(world):
    counts = read_counts(world.reference, role="reference", need_spatial=False).matrix
    codes = leiden(counts, 9, None, 0)
    assert abs(codes.max() + 1 - 9) <= 2 and (np.diff(np.bincount(codes)) <= 0).all()
    np.testing.assert_array_equal(codes, leiden(counts, 9, None, 0))
    assert leiden(counts, 9, 0.1, 0).max() < leiden(counts, 9, 3.0, 0).max()
    labelled, _, reference = pose(world, replace(SMALL, cluster_key="type"))
    assert labelled.profiles.shape[1] == world.reference.obs["type"].nunique() and "spaim_cluster" not in reference.obs
    with pytest.raises(UserError, match="no obs column 'kind'"):
        pose(world, replace(SMALL, cluster_key="kind"))


# ---- the published objective ----


def transcription(net, x, s, wiring, kind):
    """The published losses, written out from the parameters."""

    def f(block, a):
        linear, norm, _ = block
        a = a @ linear.weight.T + linear.bias
        a = (a - a.mean(-1, keepdim=True)) / (a.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
        return torch.relu(a * norm.weight + norm.bias)

    one = torch.ones(len(x), 1)
    c1, t1 = f(net.content_x[0], x), f(net.style_x[0], x)
    c2, t2 = f(net.content_x[1], c1), f(net.style_x[1], t1)
    if wiring == "code":
        d2 = f(net.content_s[0], s)
        d1 = f(net.content_s[1], d2)
        v1, v2 = f(net.virtual[0], one), f(net.virtual[1], one)
    else:
        d1, v1 = f(net.content_s[0], s), f(net.virtual[0], one)
        d2, v2 = f(net.content_s[1], d1), f(net.virtual[1], v1)

    def decode(h1, h2, g1, g2):
        weight, bias = net.output.weight, net.output.bias
        if wiring == "code":
            return (f(net.fusion, h2 * g2) + h1 * g1) @ weight.T + bias
        second = h2.shape[1]
        return (h2 * g2) @ weight[:, :second].T + (h1 * g1) @ weight[:, second:].T + bias

    def cos(a, b):
        return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()

    st, sc = decode(c1, c2, t1, t2), decode(d1, d2, v1, v2)
    b = len(x)
    style = 0
    for v, t in ((v1, t1), (v2, t2)):
        if kind == "released":
            style = style + ((v @ v.T - t @ t.T) / (b * v.shape[1])).square().mean()
        else:
            style = style + ((v.T @ v - t.T @ t) / b).square().mean()
    content = (c1 - d1).square().mean() + (c2 - d2).square().mean()
    return {"content": content, "style": style, "reconstruction": 1 - cos(st, x), "generation": 1 - cos(st, sc)}


def paper(**changes):
    return replace(spaim.PRESETS["paper"], **{"hidden": (24, 12), "augment": 0, "batch_genes": 0, "clusters": 8, **changes})


@pytest.mark.parametrize("wiring", ["code", "paper"])
@pytest.mark.parametrize("kind", ["released", "features"])
def test_the_published_objective_term_by_term(data, wiring, kind):
    config = paper(wiring=wiring, gram=kind)
    pair = build_network(config, spaim.learn_hyper(without(data, np.arange(30)), config, 0, lambda line: None, None), data, 0)
    batch = spaim.batches(data, config, 0).at(0)
    trace = poutine.trace(pair.model).get_trace(batch)
    trace.compute_log_prob()
    expected = transcription(pair.model.net, batch.x, batch.profiles, wiring, kind)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == set(expected)
    for name, value in expected.items():
        assert -trace.nodes[name]["log_prob_sum"].item() / len(data.panel) == pytest.approx(value.item(), rel=1e-5, abs=1e-7)
    assert not poutine.trace(pair.guide).get_trace(batch).stochastic_nodes


def test_gaussian_content_of_unit_variance_is_the_content_loss():
    torch.manual_seed(0)
    a, b = torch.randn(7, 12), torch.randn(7, 12)
    log_prob = torch.distributions.Normal(a, 1.0).log_prob(b).sum()
    constant = -0.5 * a.numel() * np.log(2 * np.pi)
    assert float(log_prob - constant) == pytest.approx(float(-0.5 * a.numel() * content_loss([a], [b])), rel=1e-5)


def test_the_released_style_loss_is_inert_and_ours_is_not(data):
    config = paper(hidden=(128, 64))
    pair = build_network(config, spaim.learn_hyper(without(data, np.arange(30)), config, 0, lambda line: None, None), data, 0)
    batch = spaim.batches(data, config, 0).at(0)
    x = batch.x.repeat(10, 1)  # genes enough for the order of the loss to show
    _, style = pair.model.net.encode(x)
    virtual = pair.model.net.style(len(x))
    sizes = {kind: style_loss(virtual, style, kind).item() for kind in ("released", "features")}
    assert sizes["released"] < 1e-4 and sizes["features"] > 0.02, sizes
    assert (gram(virtual[0], "released") - gram(virtual[0], "released")[0, 0]).abs().max() < 1e-6  # one number, whatever the genes
    loss = style_loss(virtual, style, "features")
    loss.backward()
    assert all(p.grad is None for p in pair.model.net.style_x.parameters())
    assert all(p.grad is not None for p in pair.model.net.virtual.parameters())


@pytest.mark.parametrize("head", ["cosine", "power_spherical", "gaussian", "nb"])
def test_every_head_has_a_finite_loss_and_agreeing_sites(data, head):
    config = replace(spaim.PRESETS["network"], head=head, hidden=(16, 8), clusters=8, batch_genes=10)
    pair = build_network(config, spaim.learn_hyper(without(data, np.arange(30)), config, 0, lambda line: None, None), data, 0)
    batch = spaim.batches(data, config, 0).at(1)
    assert batch.x.shape == (10, 500)
    guided = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, guided)).get_trace(batch)
    latent = {n for n, site in model.nodes.items() if site["type"] == "sample" and not site["is_observed"]} - {"genes"}
    assert latent == set(guided.stochastic_nodes) - {"genes"}
    loss = guided.log_prob_sum() - model.log_prob_sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for module in pair for p in module.parameters() if p.grad is not None)


def test_point_codes_refuse_a_density(data):
    with pytest.raises(UserError, match="head='nb' needs codes='normal'"):
        build_network(paper(head="nb"), None, data, 0)


# ---- predictions ----


def test_every_gene_asked_for_is_predicted_under_its_own_name(world):
    settings = ["hidden=[16, 8]", "clusters=8", "fit.steps=30", "inner_steps=5", "batch_genes=7"]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, preset="paper", overrides=settings, seed=0)
    genes = list(run.genes[~run.measured])
    whole = run.predict(genes, draws=4)
    order = np.random.default_rng(0).permutation(len(genes))
    shuffled = run.predict([genes[i] for i in order], draws=4)
    one = run.predict([genes[3]], draws=4)
    assert list(shuffled.var_names) == [genes[i] for i in order]
    np.testing.assert_allclose(shuffled.X, whole.X[:, order], rtol=2e-4)
    np.testing.assert_allclose(one.X[:, 0], whole.X[:, 3], rtol=2e-4)
    assert whole.shape == (500, len(genes)) and (np.ptp(whole.X, axis=0) > 0).all()
    with pytest.raises(UserError, match="cannot predict others"):
        run.predict(genes, target=world.target[:50], draws=4)


def test_accuracy_and_coverage_on_simulated_genes_of_unknown_level(run, world):
    predicted = run.predict(world.truth.var_names, draws=60, truth=world.truth)
    truth = read_counts(world.truth, role="truth")
    rate = np.asarray(world.truth.layers["rate"])
    depth = run.target.totals
    ours = score_table(truth.matrix, np.asarray(predicted.X), depth, truth.genes)
    oracle = score_table(truth.matrix, rate, depth, truth.genes)
    assert ours["log_pcc"].mean() > 0.6 * oracle["log_pcc"].mean()
    assert 0.82 < predicted.var["coverage_90"].mean() < 0.97
    assert (np.asarray(predicted.layers["rate_sd"]) > 0).all()


def test_the_closed_form_mean_is_the_mean_of_the_draws(run):
    gene = run.genes[~run.measured][:3]
    exact = np.asarray(run.predict(gene, draws=4).layers["rate_mean"])
    predictor = spaim.Predictor(run.pair, run.data, run.config, run.spec)
    mean = np.zeros_like(exact)
    from ppl_st.inference.predict import draw_globals

    batch = next(iter(predictor.blocks(500)))
    index = torch.from_numpy(np.flatnonzero(np.isin(run.genes, gene)))
    drawn = draw_globals(predictor.chains, 400, 0)
    local = predictor.local(batch, 0)
    with torch.no_grad():
        for draw in drawn:
            mean += predictor.count_dist(batch, 0, draw, local, index).mean.numpy() / len(drawn)
    np.testing.assert_allclose(mean.mean(0), exact.mean(0), rtol=0.2)
    assert np.corrcoef(mean.ravel(), exact.ravel())[0, 1] > 0.9


def test_a_stored_run_predicts_the_same_and_new_cells_like_old_ones(world, tmp_path):
    settings = ["clusters=8", "smoothing=0.0"]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=settings, seed=0, out=tmp_path / "run")
    genes = run.genes[~run.measured][:5]
    first, again = run.predict(genes, draws=5), ppl_st.load(tmp_path / "run").predict(genes, draws=5)
    for name in ("rate_mean", "rate_sd", "q95"):
        np.testing.assert_array_equal(first.layers[name], again.layers[name])
    fresh = run.predict(genes, draws=5, target=world.target[:60])
    np.testing.assert_allclose(fresh.layers["rate_mean"], first.layers["rate_mean"][:60], rtol=1e-4)
    with pytest.raises(UserError, match="lacks 1 of the 36 genes"):
        run.predict(genes, target=world.target[:, 1:])


def test_places_of_cells_matter_and_a_shuffled_reference_destroys_the_prediction(world):
    settings = ["clusters=8", "smoothing=0.5"]
    truth = read_counts(world.truth, role="truth")

    def predict(target, reference):
        run = ppl_st.fit("spaim", target=target, reference=reference, overrides=settings, seed=0)
        return np.asarray(run.predict(world.truth.var_names, draws=3).X), run

    plain, run = predict(world.target, world.reference)
    moved = world.target.copy()
    moved.obsm["spatial"] = np.random.default_rng(0).permutation(moved.obsm["spatial"])
    elsewhere, _ = predict(moved, world.reference)
    assert np.abs(elsewhere - plain).max() > 1e-3
    wrong = world.reference.copy()
    unmeasured = np.flatnonzero(~np.isin(wrong.var_names, world.target.var_names))
    order = np.arange(wrong.n_vars)
    order[unmeasured] = np.roll(unmeasured, 7)
    wrong.X = wrong.X[:, order]
    shuffled, _ = predict(world.target, wrong)
    scores = [score_table(truth.matrix, x, run.target.totals, truth.genes)["log_pcc"].mean() for x in (plain, elsewhere, shuffled)]
    assert scores[0] > scores[1] and scores[2] < 0.5 * scores[0], scores


def test_cells_permuted_permute_the_prediction(world):
    order = np.random.default_rng(0).permutation(world.target.n_obs)
    predictions = []
    for target in (world.target, world.target[order]):
        # Inner genes are judged on a random subset of cells; here on all of them, so that the hyper-priors agree.
        run = ppl_st.fit("spaim", target=target, reference=world.reference, overrides=["clusters=8", "smoothing=0.25"], seed=0)
        predictions.append(np.asarray(run.predict(world.truth.var_names[:4], draws=3).X))
    np.testing.assert_allclose(predictions[1], predictions[0][order], rtol=5e-3)


def test_empty_cells_and_a_handful_of_genes(world):
    target = world.target[:120, :9].copy()
    target.X = sp.csr_matrix(np.asarray(target.X.todense()) * (np.arange(120) != 3)[:, None])
    run = ppl_st.fit("spaim", target=target, reference=world.reference, overrides=["clusters=8"], seed=0)
    predicted = run.predict(run.genes[-4:], draws=5)
    assert np.isfinite(predicted.X).all() and (predicted.X >= 0).all()


def test_arviz_groups_have_names_for_every_dimension(run):
    groups = run.arviz_groups(draws=2, max_cells=20)
    assert groups["posterior"]["weights"].dims == ("chain", "draw", "directions", "features")
    assert groups["predictions"]["count"].dims == ("chain", "draw", "cell", "gene")


def test_observations_refuse_what_does_not_fit_into_memory(data, monkeypatch):
    monkeypatch.setattr("ppl_st.models.spaim.network.LARGEST_MATRIX", 100)
    with pytest.raises(UserError, match="features='kernel'"):
        observations(data, paper())


def test_the_pair_is_a_pair(run):
    assert isinstance(run.pair, Pair)


# ---- levels ----


def test_shares_have_the_sampling_variance_that_resampling_the_cells_shows(world):
    counts = read_counts(world.reference, role="reference", need_spatial=False).matrix
    share, variance = log_shares(counts, np.arange(36))
    rng = np.random.default_rng(0)
    again = np.stack([log_shares(counts[rng.integers(counts.shape[0], size=counts.shape[0])], np.arange(36))[0] for _ in range(300)])
    many = np.asarray(counts.sum(0)).ravel() > 50
    np.testing.assert_allclose(again.var(0)[many], variance[many], rtol=0.45)
    assert np.abs(again.mean(0) - share)[many].max() < 0.1
    assert (variance > 0).all() and variance[np.asarray(counts.sum(0)).ravel() == 0].min(initial=2.0) >= 2.0


def test_level_prior_finds_agreement_gain_and_its_own_doubt():
    rng = np.random.default_rng(0)
    z, doubt = rng.normal(0, 1.5, 400), np.where(np.arange(400) % 2, 0.01, 0.5)
    seen = z + np.sqrt(doubt) * rng.standard_normal(400)
    keep = 1.5**2 / (1.5**2 + doubt)
    y = 0.3 + 0.8 * z + 0.4 * rng.standard_normal(400)
    (a, b, s), (aa, _, bb) = level_prior(y, np.full(400, 1e-4), keep * seen, keep * doubt)
    assert abs(a - 0.3) < 4 * np.sqrt(aa) and abs(b - 0.8) < 4 * np.sqrt(bb) and s == pytest.approx(0.4, abs=0.06)
    few, wide = level_prior(y[:3], np.full(3, 1e-4), 0.01 * z[:3], np.zeros(3))
    assert few[1] == pytest.approx(1, abs=0.1) and wide[2] > 10 * bb  # nothing to learn b from: the platforms agree, more or less


def test_inner_genes_teach_levels_without_a_bias():
    """Levels are per count of *all* shared genes, although a fold of them is hidden from every inner fit."""
    world = spatial_field(seed=2, n_cells=400, n_reference=800, n_genes=50, n_panel=40, platform_sd=0.0, spatial=0.0)
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8"], seed=0)
    a, b, _ = run.spec.hyper.gain
    center = run.spec.hyper.center
    typical = run.data.log_share[run.data.panel].mean()
    assert abs(a + b * (typical - center) - typical) < 0.1  # no gain was simulated; log(4 / 3) is what a hidden quarter would add
    predicted = run.predict(world.truth.var_names, draws=5)
    counts = chains_of(run.pair)[0].guide.counts
    index = [list(run.genes).index(g) for g in predicted.var_names]
    level = (counts.log_gain_loc + 0.5 * counts.log_gain_scale.square())[index].exp().numpy()
    total = np.asarray(predicted.layers["rate_mean"], dtype=np.float64).sum(0) / run.data.totals.sum()
    np.testing.assert_allclose(total, level, rtol=1e-3)  # whatever its map and slope, a gene's rates add up to its level


@pytest.fixture(scope="module")
def shallow():
    """Panel: the genes that the reference shows best; 40 shallow reference cells know little of the levels of the others."""
    parts = []
    for seed in (1, 2):
        world = spatial_field(seed=seed, n_cells=400, n_reference=40, n_genes=121, n_panel=1, platform_sd=0.2, rho=20, depth_reference=200, theta=50)
        truth = world.truth
        seen = np.asarray(world.reference[:, truth.var_names].X.sum(0)).ravel()
        order = truth.var_names[np.argsort(-seen, kind="stable")]
        parts.append((truth[:, order[:60]].copy(), world.reference[:, truth.var_names].copy(), truth[:, order[60:]].copy()))
    return parts


@pytest.mark.parametrize(("overrides", "low", "high"), [([], 0.85, 0.97), (["reference_errors=false"], 0.5, 0.82), (["gain=none"], 0.3, 0.88)])
def test_levels_are_covered_unless_gains_or_reference_errors_are_ignored(shallow, overrides, low, high):
    """90% intervals of the total of a gene over the tissue, and of its counts in cells."""
    inside, covered = [], []
    for target, reference, truth in shallow:
        run = ppl_st.fit("spaim", target=target, reference=reference, overrides=["clusters=6", *overrides], seed=0)
        counts = chains_of(run.pair)[0].guide.counts
        index = [list(run.genes).index(g) for g in truth.var_names]
        level = np.log((np.asarray(truth.X.sum(0)).ravel() + 0.5) / run.data.totals.sum())
        z = (level - counts.log_gain_loc[index].numpy()) / counts.log_gain_scale[index].numpy()
        inside.append((np.abs(z) < 1.645).mean())
        covered.append(run.predict(truth.var_names, draws=50, truth=truth).var["coverage_90"].mean())
    assert low < np.mean(inside) < high, (inside, covered)
    assert overrides or 0.87 < np.mean(covered) < 0.94, covered

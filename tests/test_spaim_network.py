"""SpaIM's network: the published objective is the published one, every head has a loss, densities and memory are refused in words."""

from dataclasses import replace

import numpy as np
import pyro.poutine as poutine
import pytest
import torch

from ppl_st.errors import UserError
from ppl_st.factors import content_loss, gram, style_loss
from ppl_st.models import spaim
from ppl_st.models.common.cells import without
from ppl_st.models.common.inner import default_hyper
from ppl_st.models.spaim.network import build_network, observations
from spaim_problems import data_of, small_world

world = pytest.fixture(small_world, scope="module")
data = pytest.fixture(data_of, scope="module")


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


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(config, data):
    """An untrained pair in double precision, and all genes as one batch."""
    pair = build_network(config, default_hyper(data, config), data, 0)
    for part in pair:
        part.double()
    batch = spaim.batches(data, config, 0).at(0)
    return pair, batch._replace(x=batch.x.double(), profiles=batch.profiles.double())


@pytest.mark.parametrize("wiring", ["code", "paper"])
@pytest.mark.parametrize("kind", ["released", "features"])
@pytest.mark.parametrize("augment", [0, 3])
def test_the_published_objective_term_by_term(double, data, wiring, kind, augment):
    """Augmented profiles of which nothing is set to 0 are copies: all terms are those of that many times the genes."""
    config = paper(wiring=wiring, gram=kind, augment=augment, augment_zero=0.0)
    pair, batch = build(config, data)
    trace = poutine.trace(pair.model).get_trace(batch)
    trace.compute_log_prob()
    copies = augment + 1
    expected = transcription(pair.model.net, batch.x.repeat(copies, 1), batch.profiles.repeat(copies, 1), wiring, kind)
    assert {name for name, site in trace.nodes.items() if site["type"] == "sample"} == set(expected)
    for name, value in expected.items():
        assert -trace.nodes[name]["log_prob_sum"].item() / len(data.panel) == pytest.approx(value.item(), rel=1e-5, abs=1e-11)
    assert not poutine.trace(pair.guide).get_trace(batch).stochastic_nodes


@pytest.mark.parametrize("wiring", ["paper", "code"])
def test_gaussian_codes_have_the_published_terms_with_wiring_paper_alone(double, data, wiring):
    config = paper(codes="normal", head="cosine", wiring=wiring)
    pair, batch = build(config, data)
    pair.model.log_scale.data.zero_()
    content, style = pair.model.net.encode(batch.x)
    values = {f"{name}{k + 1}": code for name, codes in (("content", content), ("residual", style)) for k, code in enumerate(codes)}
    shared = {f"style{k + 1}": 0.1 * torch.randn(units, dtype=torch.float64) for k, units in enumerate(config.hidden)}
    found = poutine.trace(poutine.condition(pair.model, values | shared)).get_trace(batch).log_prob_sum().item()
    losses, n = transcription(pair.model.net, batch.x, batch.profiles, wiring, "released"), len(batch.x)
    net = pair.model.net
    squares = [(c - d).square().mean() for c, d in zip(content, net.content(batch.profiles), strict=True)]
    assert sum(squares).item() == pytest.approx(losses["content"].item())
    expected = -n * (sum(h / 2 * square for h, square in zip(config.hidden, squares, strict=True)) + losses["reconstruction"])
    expected -= sum((values[f"residual{k}"] - shared[f"style{k}"]).square().sum() / 2 + shared[f"style{k}"].square().sum() / 2 for k in (1, 2))
    expected -= (2 * n + 1) * sum(config.hidden) / 2 * np.log(2 * np.pi)
    assert (found == pytest.approx(expected.item(), rel=1e-7)) == (wiring == "paper")


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


def test_settings_that_networks_cannot_heed_are_refused():
    assert spaim.PRESETS["paper"].smoothing == 0.0
    for setting in ("smoothing", "process"):
        with pytest.raises(ValueError, match=f"{setting}=0.5 would do nothing"):
            replace(spaim.PRESETS["network"], **{setting: 0.5})


def test_one_in_k_and_one_of_the_profiles_that_networks_see_is_whole(data, monkeypatch):
    """Every one had lost entries, though predictions are from whole ones."""
    config = replace(spaim.PRESETS["network"], hidden=(16, 8), clusters=8, augment=1, augment_zero=0.9)
    pair = build_network(config, spaim.learn_hyper(without(data, np.arange(30)), config, 0, lambda line: None, None), data, 0)
    seen = []
    content = pair.model.net.content
    monkeypatch.setattr(pair.model.net, "content", lambda s: seen.append((s == 0).float().mean(1)) or content(s))
    torch.manual_seed(0)
    batch = spaim.batches(data, config, 0).at(1)
    own = (batch.profiles == 0).float().mean(1)
    for _ in range(20):
        poutine.trace(poutine.replay(pair.model, poutine.trace(pair.guide).get_trace(batch))).get_trace(batch)
    whole = (torch.stack(seen) == own).float().mean()
    assert 0.4 < whole < 0.6


def test_point_codes_refuse_a_density(data):
    with pytest.raises(UserError, match="head='nb' needs codes='normal'"):
        build_network(paper(head="nb"), None, data, 0)


def test_observations_refuse_what_does_not_fit_into_memory(data, monkeypatch):
    monkeypatch.setattr("ppl_st.models.spaim.network.LARGEST_MATRIX", 100)
    with pytest.raises(UserError, match="features='kernel'"):
        observations(data, paper())

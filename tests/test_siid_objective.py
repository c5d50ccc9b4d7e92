"""SIID's joint density: the published objective, and the equalities that hold of every one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from ppl_st.models.siid.activity import aggregate
from ppl_st.models.siid.batches import Batches, Data
from ppl_st.models.siid.model import PRESETS, build, random_start
from seeded import own_seed
from siid_problems import spec_of, tiny, traces

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


def objective(pair, batch):
    """-(log p - log q) of one draw: the whole objective, read off the traces."""
    model, guide = traces(pair, batch)
    return guide.log_prob_sum() - model.log_prob_sum()


# ---- the published objective ----


def equation_2(data, p, step, entropy, lam):
    """The paper's loss with platform scaling, from eq. 2; normals' constants included. Float64."""
    tensor = lambda m: torch.tensor(m.toarray(), dtype=torch.float64)  # noqa: E731
    counts, spots, kernel = tensor(data.counts), tensor(data.spot_counts), tensor(data.mapping)
    on_panel = torch.zeros(spots.shape[1], dtype=torch.float64)
    on_panel[data.panel] = 1
    log_phi = p["log_phi_loc"] * on_panel
    profiles, composition = p["xi_loc"].softmax(1), p["eta_loc"].softmax(1)
    cells = p["log_n_loc"].exp()[:, None] * (composition @ profiles[:, data.panel])
    mixed = kernel.T @ (p["log_m_loc"].exp()[:, None] * composition)
    covered = kernel.sum(0) > 0  # a spot without cells has mean 0: it says nothing
    seen = log_phi.exp() * (mixed[covered] @ profiles)
    poisson = sum((m - x * m.log() + torch.lgamma(x + 1)).sum() for x, m in ((counts, cells), (spots[covered], seen)))
    rows = -(composition * composition.log()).sum(1)
    weight = np.exp(step / lam)
    penalty = {"none": 0.0, "sum": weight * rows.sum(), "mean": weight * rows.mean()}[entropy]
    squares = [p["xi_loc"], p["eta_loc"], p["log_n_loc"], p["log_m_loc"], log_phi]
    variance = 1 / (2 * 1e-5)
    constants = sum(value.numel() for value in squares) * 0.5 * np.log(2 * np.pi * variance)
    return poisson + penalty + 1e-5 * sum((value**2).sum() for value in squares) + constants


@pytest.mark.parametrize("entropy, step", [("sum", 0), ("sum", 700), ("mean", 3000), ("none", 10)])
@pytest.mark.parametrize("soft", [True, False])
def test_paper_objective_is_equation_2(entropy, step, soft):
    data = tiny(soft=soft)
    assert (np.diff(data.mapping.indptr) > 1).any() == soft and (np.diff(data.mapping.indptr) == 0).any()
    config = replace(PRESETS["paper"], entropy=entropy)
    pair = build(config, spec_of(data, config), data)
    random_start(pair, 3)
    own = dict(pair.guide.named_parameters())
    with torch.no_grad():
        for parameter in own.values():
            parameter += 0.3 * torch.randn(parameter.shape)
    loss = objective(pair, Batches(data, 0, 0).at(step))
    loss.backward()
    leaves = {name: value.detach().double().requires_grad_() for name, value in own.items()}
    want = equation_2(data, leaves, step, entropy, config.entropy_lambda)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert float(Trace_ELBO().loss(pair.model, pair.guide, Batches(data, 0, 0).at(step))) == pytest.approx(
        want.item(), rel=1e-5
    )
    assert set(own) == {"xi_loc", "eta_loc", "log_n_loc", "log_m_loc", "log_phi_loc"}
    for name, value in own.items():
        got = torch.zeros_like(value) if value.grad is None else value.grad
        torch.testing.assert_close(
            got.double(), leaves[name].grad, rtol=1e-4, atol=1e-5 * float(leaves[name].grad.abs().max())
        )


def test_paper_settings_are_the_published_ones():
    paper = PRESETS["paper"]
    assert (paper.fit.lr, paper.fit.steps, paper.chains, paper.entropy_lambda) == (0.05, 5000, 3, 1000.0)
    assert PRESETS["paper-deconvolution"].entropy_lambda == 500.0
    assert not np.isfinite(paper.fit.clip_norm) and paper.batch_spots == 0 and paper.keep == "best"


# ---- equalities (specs A3) ----


@pytest.mark.parametrize("platform", ["none", "paper"])
def test_rates_over_all_genes_sum_to_the_size(platform):
    data = tiny()
    config = replace(PRESETS["paper"], platform=platform)
    pair = build(config, spec_of(data, config), data)
    activity = torch.rand(5, 3) * 40
    drawn = {"xi": torch.randn(3, 12)} | ({"log_phi": torch.randn(12)} if platform == "paper" else {})
    rate = pair.model.count_dist(drawn, activity, torch.arange(12), None).mean
    torch.testing.assert_close(rate.sum(1), activity.sum(1), rtol=1e-5, atol=0)


def test_spot_rows_sum_to_the_captured_sizes():
    data = tiny()
    batch = Batches(data, 0, 0).at(0)
    activity, capture = torch.rand(24, 3), torch.rand(24)
    want = torch.from_numpy(data.mapping.T.toarray()) @ (capture * activity.sum(1))
    torch.testing.assert_close(aggregate(batch, capture[:, None] * activity).sum(1), want)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_likelihood_does_not_know_the_order_of_factors(preset):
    data = tiny()
    config = PRESETS[preset]
    pair = build(config, spec_of(data, config), data)
    batch = Batches(data, 0, 0).at(0)
    trace = poutine.trace(pair.guide).get_trace(batch)
    values = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name not in ("cells", "spots")
    }
    values["xi"] = values["xi"] + torch.randn(3, 12)
    order = torch.tensor([2, 0, 1])
    local = "activity" if preset == "default" else "eta"
    values[local] = values[local] + torch.rand(24, 3)
    swapped = values | {"xi": values["xi"][order]}
    swapped[local] = values[local][:, order]

    def likelihood(given):
        model = poutine.trace(poutine.condition(pair.model, given)).get_trace(batch)
        model.compute_log_prob()
        return [model.nodes[name]["log_prob_sum"].item() for name in ("x", "v")]

    assert likelihood(swapped) == pytest.approx(likelihood(values), rel=1e-5)
    assert likelihood(values | {"xi": swapped["xi"]}) != pytest.approx(
        likelihood(values), rel=1e-3
    )  # the test can fail


def test_poisson_additivity_of_spots():
    """p(v) of a spot equals the sum over all splits of v between two pseudo-spots that share its cells."""
    cells = sp.csr_matrix(np.array([[2, 1], [0, 3]], np.float32))
    one, two = sp.csr_matrix(np.ones((2, 1), np.float32)), sp.csr_matrix(np.eye(2, dtype=np.float32))
    v = np.array([3, 0, 2], np.float32)
    config = replace(PRESETS["paper"], entropy="none")
    xy = np.zeros((2, 2))

    def log_p(mapping, spots):
        data = Data(cells, sp.csr_matrix(np.atleast_2d(spots)), mapping, np.array([0, 1]), xy, xy[: mapping.shape[1]])
        pair = build(config, spec_of(data, config, 2), data)
        with torch.no_grad():
            for name, parameter in pair.guide.named_parameters():
                parameter.copy_(torch.linspace(-1, 1 + len(name) / 9, parameter.numel()).reshape(parameter.shape))
        model, _ = traces(pair, Batches(data, 0, 0).at(0))
        model.compute_log_prob()
        return model.nodes["v"]["log_prob_sum"].item()

    splits = [np.array(first, np.float32) for first in itertools.product(*(range(int(x) + 1) for x in v))]
    total = np.logaddexp.reduce([log_p(two, np.stack([first, v - first])) for first in splits])
    assert len(splits) == 12 and log_p(one, v) == pytest.approx(total, rel=1e-5)

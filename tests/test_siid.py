"""SIID: the published objective, equalities of the model, EM, minibatches, the contract of every method.

Run as a script, ``python tests/test_siid.py FOLDER STEP``, this file fits the small pair of the resume test
and kills itself with SIGKILL when it is asked for the minibatch of STEP.
"""

import copy
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import ppl_st.api as api
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.svi import FitConfig, rng_scope
from ppl_st.inference.svi import fit as run_svi
from ppl_st.models import siid
from ppl_st.models.siid import activity as activity_room
from ppl_st.models.siid import hyper as siid_hyper
from ppl_st.models.siid import warm_start
from ppl_st.models.siid.activity import Globals, LocalPosterior, Sheet, aggregate, sizes
from ppl_st.models.siid.batches import Batches, Data
from ppl_st.models.siid.model import PRESETS, Config, Spec, build, random_start
from ppl_st.models.siid.regional import regional_posterior
from ppl_st.product import csr_tensor
from ppl_st.simulate import checkerboard
from ppl_st.testing import check_pair

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
FAST = [
    "factors=4",
    "chains=2",
    "sparsity=0.0",
    "sweeps=6",
    "batch_spots=9",
    "fit.steps=10",
    "fit.checkpoint_every=4",
]
KNOBS = {"n_cells": 300, "side": 6, "squares": 6, "n_types": 4, "n_genes": 40, "n_panel": 30, "contrast": 1.0}


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tiny(seed=0, n=24, s=7, genes=12, panel=7, depth=2.0, soft=True):
    """A random problem: cells in one spot, in two (soft map), in none; the last spot has no cell."""
    rng = np.random.default_rng(seed)
    kernel = np.zeros((n, s))
    for i in range(n):
        if i % 5 == 4:
            continue
        own = rng.choice(s - 1, 2 if soft and i % 3 == 0 else 1, replace=False)
        kernel[i, own] = rng.dirichlet(np.ones(len(own))) * rng.uniform(0.5, 1)
    mean = rng.gamma(0.5, depth, (n, genes))
    counts, spots = rng.poisson(mean), rng.poisson(3 * kernel.T @ mean)
    spots[-1] = 2
    where = np.sort(rng.permutation(genes)[:panel])
    xy = rng.uniform(0, 3, (n, 2))
    return Data(
        sp.csr_matrix(counts[:, where], dtype=np.float32), sp.csr_matrix(spots, dtype=np.float32),
        sp.csr_matrix(kernel, dtype=np.float32), where, xy, rng.uniform(0, 3, (s, 2)),
    )  # fmt: skip


def spec_of(data, config, factors=3):
    hyper = siid_hyper.default_hyper(data, replace(config, factors=factors))
    return Spec(data.counts.shape[0], factors, [int(g) for g in data.panel], data.spot_counts.shape[1], hyper)


def traces(pair, batch):
    guide = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch)
    return model, guide


def objective(pair, batch):
    """-(log p - log q) of one draw: the whole objective, read off the traces."""
    model, guide = traces(pair, batch)
    return guide.log_prob_sum() - model.log_prob_sum()


def default_pair(data, seed=0, **settings):
    config = Config(**{"factors": 3, "sweeps": 5, "sparsity": 0.0, **settings})
    pair = build(config, spec_of(data, config), data)
    start, _, _ = warm_start.run_em(data, config, 3, 0.0, seed, 20)
    siid.model.initialise(pair, start)
    return pair, config


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


# ---- EM ----


def em_problem():
    return tiny(3, n=60, s=9, genes=20, panel=12, depth=3.0)


@pytest.mark.parametrize(
    "kappa, platform", [(np.inf, "none"), (np.inf, "hierarchical"), (10.0, "none"), (10.0, "hierarchical")]
)
def test_em_never_loses_likelihood(kappa, platform):
    """Plain sweeps from one start, flat priors: log-likelihood after 1, 2, ... sweeps."""
    data = em_problem()
    config = Config(concentration=1e-6, profile_concentration=1e-6, capture_concentration=kappa, platform=platform)
    values = np.array([warm_start.run_em(data, config, 4, 0.0, 1, sweeps)[0].log_likelihood for sweeps in range(1, 21)])
    steps = np.diff(values)
    assert steps.min() >= -1e-6 * abs(values[0]), steps
    assert values[-1] > values[0] + 10


@pytest.mark.parametrize("platform", ["none", "hierarchical"])
def test_em_ends_at_a_stationary_point(platform):
    """Gradient of the Poisson log-likelihood by log Q and log phi after many sweeps, flat priors."""
    data = em_problem()
    config = Config(concentration=1e-6, profile_concentration=1e-6, platform=platform)

    def slope(sweeps):
        start, local, problem = warm_start.run_em(data, config, 2, 0.0, 1, sweeps)
        log_q = start.g.profiles.double().log().requires_grad_()
        log_phi = start.log_phi.double().requires_grad_()
        mixed = aggregate(problem.batch, local.capture[:, None] * local.activity).double()
        x, v = (torch.from_numpy(m.toarray()).double() for m in (data.counts, data.spot_counts[:-1]))
        cells = local.activity.double() @ log_q.exp()[:, data.panel] * torch.exp(-log_phi)
        spots = mixed[:-1] @ log_q.exp()
        ((x * cells.log() - cells).sum() + (v * spots.log() - spots).sum()).backward()
        return float(log_q.grad.abs().max()), float(log_phi.grad.abs().max())

    by_q, by_phi = slope(800)
    assert by_q < 2.0 and (platform == "none" or by_phi < 2.0), (by_q, by_phi)  # counts, of hundreds per entry
    assert slope(2)[0] > 20


@pytest.mark.parametrize("density", [0.05, 0.6])
def test_sheet_paths_agree(density, monkeypatch):
    rng = np.random.default_rng(1)
    counts = rng.poisson(2, (50, 30)) * (rng.uniform(size=(50, 30)) < density)
    counts[4], counts[:, 7] = 0, 0
    tensor = csr_tensor(sp.csr_matrix(counts, dtype=np.float32))
    activity, loadings = (
        torch.from_numpy(rng.gamma(1, 1, (50, 3))).float(),
        torch.from_numpy(rng.gamma(1, 1, (3, 30))).float(),
    )
    found = []
    monkeypatch.setattr(activity_room, "BLOCK", 100)
    for threshold in (0.0, 2.0):
        monkeypatch.setattr(activity_room, "DENSE", threshold)
        sheet = Sheet(tensor)
        assert (sheet.pattern is None) == (threshold == 0.0)
        found.append(
            (
                sheet.rows(activity, loadings),
                sheet.columns(activity, loadings),
                sheet.log_likelihood(activity, loadings),
            )
        )
    x, rate = torch.tensor(counts).float(), activity @ loadings
    wanted = ((x / rate) @ loadings.T, activity.T @ (x / rate), float((x * rate.log() - rate).double().sum()))
    for rows, columns, score in found:
        torch.testing.assert_close(rows, wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(columns, wanted[1], rtol=1e-4, atol=1e-5)
        assert score == pytest.approx(wanted[2], rel=1e-4)


def globals_of(data, kappa, sparsity, concentration=0.5):
    q = torch.softmax(
        torch.from_numpy(np.random.default_rng(5).normal(size=(4, data.spot_counts.shape[1]))).float(), -1
    )
    return Globals(
        q,
        q[:, data.panel] * 1.3,
        torch.tensor([0.4, 0.3, 0.2, 0.1]),
        2.0,
        concentration,
        kappa,
        sparsity,
        0.0,
    )


@pytest.mark.parametrize("kappa, sparsity, mapped", [(np.inf, 0.0, True), (8.0, 0.0, True), (np.inf, 0.2, False)])
def test_local_posterior_is_a_stationary_point(kappa, sparsity, mapped):
    """Gradient of log p(x, v | W, r) + log priors (of log W, log r) + entropic prior at the fixed point."""
    data = em_problem()
    if not mapped:
        data = data._replace(mapping=sp.csr_matrix(data.mapping.shape, dtype=np.float32))
    g, batch = globals_of(data, kappa, sparsity), Batches(data, 0, 0).at(0)
    problem = LocalPosterior(batch)
    local = problem.start(g)
    for _ in range(1500):
        local = problem.update(local, g, 1.0, 1.0)
    log_w, log_r = (part.log().double().requires_grad_() for part in (local.activity, local.capture))
    w, r = log_w.exp(), log_r.exp()
    x, v = (torch.from_numpy(m.toarray()).double() for m in (data.counts, data.spot_counts))
    beta = g.concentration * 4 / sizes(batch.total, g).double()[:, None]
    cells = w @ g.panel_profiles.double()
    value = (x * cells.log() - cells).sum() + (g.concentration * log_w - beta * w).sum()
    if mapped:
        covered = torch.from_numpy(data.mapping.toarray().sum(0) > 0)
        seen = (torch.from_numpy(data.mapping.T.toarray()).double() @ (r[:, None] * w) @ g.profiles.double())[covered]
        value = value + (v[covered] * seen.log() - seen).sum()
    if np.isfinite(kappa):
        value = value + (kappa * log_r - kappa / g.capture * r).sum()
    if sparsity:
        composition = w / w.sum(1, keepdim=True)
        value = value + (sparsity * batch.total.double() * (composition * composition.log()).sum(1)).sum()
    value.backward()
    # In counts. At the start of the iteration the same gradients are tens.
    assert log_w.grad.abs().max() < (0.3 if sparsity else 1e-3)
    if np.isfinite(kappa):
        assert log_r.grad.abs().max() < 1e-3


def test_em_does_not_know_the_order_of_genes(monkeypatch):
    data = em_problem()
    rng = np.random.default_rng(0)
    cluster = torch.from_numpy(rng.integers(0, 4, 60))

    def same_start(data, g, total, factors, seed):
        activity = torch.full((60, 4), 0.025)
        activity[torch.arange(60), cluster] += 0.9
        ones = torch.ones(60)
        return activity_room.Local(activity * sizes(total, g)[:, None], torch.ones(60, 4), ones, ones)

    monkeypatch.setattr(warm_start, "_clustered", same_start)
    order = rng.permutation(20)
    place = np.argsort(order)
    inner = rng.permutation(12)
    moved = data._replace(
        counts=data.counts[:, inner], spot_counts=data.spot_counts[:, order], panel=place[data.panel[inner]]
    )
    one, two = (warm_start.run_em(d, Config(), 4, 0.0, 0, 8) for d in (data, moved))
    torch.testing.assert_close(two[0].g.profiles, one[0].g.profiles[:, order], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(two[1].activity, one[1].activity, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(two[0].log_phi, one[0].log_phi[inner], rtol=1e-3, atol=1e-4)


# ---- minibatches ----


@pytest.mark.parametrize("batch_spots", [0, 1, 2, 3, 50])
def test_every_spot_and_cell_once_per_epoch(batch_spots):
    data = tiny()
    batches = Batches(data, batch_spots, 5)
    for epoch in range(2):
        parts = [batches.at(epoch * len(batches) + i) for i in range(len(batches))]
        assert sorted(torch.cat([b.spots for b in parts]).tolist()) == list(range(7))
        assert sorted(torch.cat([b.cells[b.owned] for b in parts]).tolist()) == list(range(24))
        for b in parts:  # all members of a batch's spots are there, with their weights
            kernel = np.zeros((len(b.cells), len(b.spots)), np.float32)
            kernel[b.link_cell, b.link_spot] = b.link_weight
            full = data.mapping.toarray()[:, b.spots.numpy()]
            np.testing.assert_array_equal(kernel, full[b.cells.numpy()])
            assert kernel.sum() == pytest.approx(full.sum(), rel=1e-6)
    if batch_spots == 2:
        assert any(not b.owned.all() for b in parts), "no guests: the soft map is not tested"
        orders = [[batches.at(e * len(batches) + i).spots.tolist() for i in range(len(batches))] for e in (0, 1)]
        assert orders[0] != orders[1]


def test_batches_are_pure_functions_of_the_step():
    data = tiny()
    one, two = Batches(data, 2, 5), Batches(data, 2, 5)
    later = one.at(11)
    for step in (11, 3, 11):
        for a, b in zip(one.at(step), two.at(step), strict=True):
            assert torch.equal(a.to_dense(), b.to_dense()) if isinstance(a, torch.Tensor) else a == b
    assert (
        torch.equal(later.spots, one.at(11).spots) and Batches(data, 2, 6).at(11).spots.tolist() != later.spots.tolist()
    )


@pytest.mark.parametrize("max_cells", [1, 6, 1000])
def test_in_order_owns_every_cell_once(max_cells):
    data = tiny()
    for problem in (
        data,
        data._replace(spot_counts=data.spot_counts[:0], mapping=sp.csr_matrix((24, 0), dtype=np.float32)),
    ):
        cells = [b.cells[b.owned].tolist() for b in Batches(problem, 2, 0).in_order(max_cells)]
        assert sorted(itertools.chain.from_iterable(cells)) == list(range(24))


def test_in_order_shows_a_cell_all_of_its_spots():
    """With a soft map a cell's counts lie in several spots: whichever batch owns it, it must see them all."""
    data = tiny()
    pair, _ = default_pair(data)
    whole = pair.guide.local_posterior(Batches(data, 0, 0).at(0), 18).activity
    for batch in Batches(data, 0, 0).in_order(1):
        seen = torch.zeros(len(batch.cells)).index_add(0, batch.link_cell, batch.link_weight)[batch.owned]
        wanted = np.asarray(data.mapping.sum(1)).ravel()[batch.cells[batch.owned]]
        np.testing.assert_allclose(seen.numpy(), wanted, rtol=1e-6)
        found = pair.guide.local_posterior(batch, 18).activity[batch.owned]
        assert (found - whole[batch.cells[batch.owned]]).abs().sum() < 0.15 * found.sum()


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("batch_spots", [1, 2, 3])
def test_minibatch_objective_is_unbiased(preset, batch_spots):
    """Fixed latents: the mean over an epoch of minibatches' log p is the full one; guests count once."""
    data = tiny()
    config = replace(PRESETS[preset], entropy="none")
    pair = build(config, spec_of(data, config), data)
    if preset == "paper":
        random_start(pair, 0)
    full = Batches(data, 0, 0).at(0)
    trace = poutine.trace(pair.guide).get_trace(full)
    fixed = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name not in ("cells", "spots")}
    local = {name for name in fixed if trace.nodes[name]["cond_indep_stack"]}

    def log_p(batch):
        own = {name: value[batch.cells] if name in local else value for name, value in fixed.items()}
        with pyro.validation_enabled(True):
            return poutine.trace(poutine.condition(pair.model, own)).get_trace(batch).log_prob_sum().item()

    batches = Batches(data, batch_spots, 0)
    parts = [log_p(batches.at(i)) for i in range(len(batches))]
    # global priors count in full in every batch, so the mean is exact for them too
    assert np.mean(parts) == pytest.approx(log_p(full), rel=1e-5)
    assert np.ptp(parts) > 1e-3 * abs(np.mean(parts))


def test_elbo_passes_validation_on_every_batch():
    data = tiny()
    pair, _ = default_pair(data)
    with pyro.validation_enabled(True):
        for batch_spots in (0, 1, 2):
            batches = Batches(data, batch_spots, 0)
            for step in range(len(batches)):
                assert np.isfinite(Trace_ELBO().loss(pair.model, pair.guide, batches.at(step)))


def test_spots_without_cells_teach_nothing():
    """A slide larger than the field of cells must not change dispersions, capture or the regional effect."""
    data = tiny(2, n=60, s=9, genes=20, panel=12)._replace()
    covered = np.flatnonzero(np.asarray(data.mapping.sum(0)).ravel() > 0)
    without = data._replace(
        spot_counts=data.spot_counts[covered], mapping=data.mapping[:, covered], spot_xy=data.spot_xy[covered]
    )
    many = np.r_[np.arange(9), np.full(30, 8)]
    loud = data._replace(
        spot_counts=data.spot_counts[many] * 5, mapping=data.mapping[:, many], spot_xy=data.spot_xy[many]
    )
    loud = loud._replace(spot_counts=sp.csr_matrix(sp.vstack([data.spot_counts[:8], loud.spot_counts[8:]])))
    gradients = []
    for problem in (without, loud):
        pair, _ = default_pair(without, regional=False)
        batch = Batches(problem, 0, 0).at(0)
        with rng_scope(0, "noise"):
            Trace_ELBO().differentiable_loss(pair.model, pair.guide, batch).backward()
        gradients.append({name: p.grad.clone() for name, p in pair.guide.named_parameters()})
        assert warm_start._capture(batch, torch.ones(60, 3)) == pytest.approx(
            warm_start._capture(Batches(without, 0, 0).at(0), torch.ones(60, 3)), rel=1e-5
        )
    for name, value in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- the pair ----

VARIANTS = {
    "default": ("default", {}),
    "labels and sparsity": ("default", {"label_weight": 1.0, "sparsity": 0.1}),
    "poisson": ("default", {"likelihood": "poisson", "spot_likelihood": "poisson"}),
    "zinb": ("default", {"likelihood": "zinb"}),
    "platform none": ("default", {"platform": "none", "capture_concentration": float("inf")}),
    "platform paper": ("default", {"platform": "paper"}),
    "delta": ("default", {"posterior": "delta"}),
    "paper": ("paper", {}),
}


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])  # the sparse and the dense way of observing counts
def test_the_pair_obeys_the_laws_of_the_kit(likelihood):
    """Sites and plates agree, minibatches are unbiased, what is simulated fits its own likelihood."""
    data = tiny(soft=False)
    config = replace(PRESETS["default"], factors=3, chains=1, sweeps=3, sparsity=0.0, likelihood=likelihood)
    pair, _ = siid.start(data, config, 0, lambda line: None)
    assert check_pair(pair, Batches(data, 1, 0), Batches(data, 0, 0).at(0)) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sites_agree_and_no_parameter_appears(variant):
    preset, settings = VARIANTS[variant]
    config = replace(PRESETS[preset], factors=3, chains=2, sweeps=3, **settings)
    config = replace(config, fit=FitConfig(steps=3, lr=0.01))
    data = tiny()
    if config.label_weight:
        data = data._replace(labels=np.arange(24) % 4 - 1)
    pair, spec = siid.start(data, config, 0, lambda line: None)
    before = {side: set(dict(module.named_parameters())) for side, module in zip(("model", "guide"), pair, strict=True)}
    batch = Batches(data, 2, 0).at(0)
    with pyro.validation_enabled(True):
        model, guide = traces(pair, batch)
    latent = {name for name in model.stochastic_nodes if not model.nodes[name]["is_observed"]}
    plates = {"chain0/cells", "chain1/cells", "chain0/spots", "chain1/spots"}
    assert latent - plates == set(guide.stochastic_nodes) - plates and len(latent) > len(plates)
    _, info = run_svi(pair, Batches(data, 2, 0), config.fit, scale=1e-3)
    assert before == {
        side: set(dict(module.named_parameters())) for side, module in zip(("model", "guide"), pair, strict=True)
    }
    assert not before["model"] and not list(pyro.get_param_store()) and not info.skipped
    # a platform factor that is fixed has nothing to train; everything else must have moved
    allowed = (
        ("log_phi_loc", "log_phi_log_scale")
        if config.platform == "none"
        else ("log_phi_log_scale",)
        if config.platform == "paper"
        else ()
    )
    assert all(name.endswith(allowed) for name in info.untrained) if allowed else info.untrained == ()
    restored = siid.spec_from(siid.spec_to(spec))
    assert restored == spec


def test_simulating_forward_draws_counts():
    data = tiny()
    pair, _ = default_pair(data)
    out = pair.model(Batches(data, 2, 0).at(0), observe=False)
    assert out["x"].shape[1] == 7 and out["v"].shape[1] == 12 and (out["x"] == out["x"].floor()).all()


def test_paper_platform_starts_where_em_ended():
    """Q is on the cells' scale there, on the spots' scale elsewhere: the same EM must give the same means."""
    data = tiny(2, n=60, s=9, genes=20, panel=12)
    means = {}
    for platform in ("hierarchical", "paper"):
        pair, _ = default_pair(data, platform=platform)
        drawn = {
            "xi": pair.guide.xi_loc.detach(),
            "log_phi": pair.guide.log_phi_loc.detach() * pair.model.measured,
        }
        cells, spots = pair.model.loadings(torch.softmax(drawn["xi"], -1), drawn["log_phi"])
        local = pair.guide.local_posterior(Batches(data, 0, 0).at(0), 60)
        mixed = aggregate(Batches(data, 0, 0).at(0), local.capture[:, None] * local.activity)
        means[platform] = torch.cat([(local.activity @ cells[:, data.panel]).flatten(), (mixed @ spots).flatten()])
    a, b = means["hierarchical"].detach(), means["paper"].detach()
    assert float(np.corrcoef(a, b)[0, 1]) > 0.99 and float((a - b).abs().mean() / a.mean()) < 0.1


def test_local_posterior_only_permutes_with_cells():
    data = tiny(soft=False)
    pair, _ = default_pair(data)
    order = np.random.default_rng(0).permutation(24)
    moved = data._replace(counts=data.counts[order], mapping=data.mapping[order], cell_xy=data.cell_xy[order])
    one, two = (pair.guide.local_posterior(Batches(d, 0, 0).at(0), 18) for d in (data, moved))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a[order], rtol=1e-3, atol=1e-4)


# ---- through the front door ----


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=1, **KNOBS)


def fitted(sim, *more, **named):
    return api.fit("siid", target=sim.target, reference=sim.reference, overrides=[*FAST, *more], seed=3, **named)


@pytest.fixture(scope="module")
def run(sim, tmp_path_factory):
    return fitted(sim, out=tmp_path_factory.mktemp("siid") / "run")


def accuracy(run, sim):
    """Mean correlation with the true rate, as shares of the cell's total: size scores nothing."""
    mean, truth = (
        x / x.sum(1, keepdims=True) for x in (run.predict(sim.truth.var_names, draws=10).X, sim.truth.layers["rate"])
    )
    return float(
        np.mean(
            [np.corrcoef(mean[:, g], truth[:, g])[0, 1] if mean[:, g].std() else 0.0 for g in range(truth.shape[1])]
        )
    )


def same(one, two):
    return all(
        torch.equal(a, b)
        for x, y in zip(one.pair, two.pair, strict=True)
        for a, b in zip(x.state_dict().values(), y.state_dict().values(), strict=True)
    )


def predictions_equal(one, two):
    a, b = one.predict(draws=8), two.predict(draws=8)
    return all(np.array_equal(a.layers[name], b.layers[name]) for name in a.layers) and np.array_equal(
        a.obsm["proportions"], b.obsm["proportions"]
    )


def test_same_seed_twice_is_bitwise_identical_and_another_is_not(run, sim):
    other = fitted(sim, "fit.lr=0.02")  # two fits in one process do not meet
    again = fitted(sim)
    assert same(run, again) and predictions_equal(run, again) and not same(run, other)
    np.testing.assert_array_equal(run.record["losses"], again.record["losses"])


def test_global_random_states_are_left_alone(sim):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before, state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fitted(sim, "fit.steps=1").predict(draws=2)
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_save_and_load_predict_the_same(run):
    loaded = api.load(run.folder)
    assert same(run, loaded) and predictions_equal(run, loaded)
    np.testing.assert_array_equal(run.proportions(draws=5).X, loaded.proportions(draws=5).X)


def test_kill_and_resume_is_bitwise_the_same(run, sim, tmp_path):
    sim.target.write_h5ad(tmp_path / "target.h5ad")
    sim.reference.write_h5ad(tmp_path / "reference.h5ad")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, __file__, str(tmp_path), "7"]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(UserError, match="resume"):
        api.load(tmp_path / "run")
    lines = []
    resumed = api.fit("siid", out=tmp_path / "run", resume=True, say=lines.append)
    assert any("resuming at step 4 of 10" in line for line in lines)
    assert same(run, resumed) and predictions_equal(run, resumed) and predictions_equal(run, api.load(tmp_path / "run"))


def test_sigterm_saves_and_resume_goes_on(run, sim, tmp_path, monkeypatch):
    original = Batches.at

    def at(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(Batches, "at", at)
    with pytest.raises(api.Interrupted, match="step 6 of 10"):
        fitted(sim, out=tmp_path / "run")
    monkeypatch.undo()
    assert same(run, api.fit("siid", out=tmp_path / "run", resume=True))


def test_inputs_are_not_modified(sim):
    before = [(table.X.copy(), table.obsm["spatial"].copy()) for table in (sim.target, sim.reference)]
    fitted(sim, "fit.steps=1").predict(draws=2)
    for (counts, xy), table in zip(before, (sim.target, sim.reference), strict=True):
        assert (counts != table.X).nnz == 0 and (xy == table.obsm["spatial"]).all()


def test_place_matters_and_a_shuffled_reference_is_useless(run, sim):
    rng = np.random.default_rng(0)
    good = accuracy(run, sim)
    assert good > 0.8
    moved = sim.target.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"][rng.permutation(moved.n_obs)]
    shuffled = sim.reference[rng.permutation(sim.reference.n_obs)].copy()
    shuffled.obsm["spatial"] = sim.reference.obsm["spatial"]
    shuffled.obs_names = sim.reference.obs_names
    # the radius is given: a map inferred from nonsense would be another experiment
    settings = [*FAST, "radius=70"]
    # shuffled cells: capture ratios can pick the right cells of a spot: less is lost than with shuffled spots
    for target, reference, share in ((moved, sim.reference, 0.95), (sim.target, shuffled, 0.6)):
        other = api.fit("siid", target=target, reference=reference, overrides=settings, seed=3)
        assert not np.allclose(other.predict(draws=8).X, run.predict(draws=8).X, rtol=0.01)
        assert accuracy(other, sim) < share * good, (good, accuracy(other, sim))
    scrambled = sim.reference.copy()  # profiles that belong to no gene: nothing is left to learn
    order = np.r_[np.arange(30), 30 + rng.permutation(10)]
    scrambled.X = sp.csr_matrix(sim.reference.X[:, order])
    assert (
        accuracy(api.fit("siid", target=sim.target, reference=scrambled, overrides=settings, seed=3), sim) < 0.5 * good
    )


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


def test_awkward_data(sim):
    """An empty cell, genes without counts, six panel genes, one spot per batch, unmapped cells."""
    target = sim.target[:, :6].copy()
    counts = target.X.toarray()
    counts[3] = 0
    counts[:, 2] = 0
    target.X = sp.csr_matrix(counts)
    reference = sim.reference.copy()
    spots = reference.X.toarray()
    spots[:, [2, 35]] = 0  # one in the panel, one beyond it
    spots[4] = 0
    reference.X = sp.csr_matrix(spots)
    for more in (
        ["batch_spots=1", "radius=30"],
        ["batch_spots=1", "radius=60", "map_neighbors=2", "map_sigma=40"],
        ["regional=false"],
    ):
        run = api.fit("siid", target=target, reference=reference, overrides=[*FAST, *more])
        table = run.predict(run.genes, draws=6)
        assert table.shape == (300, 40) and not run.record["skipped"]
        for name, layer in table.layers.items():
            assert np.isfinite(layer).all() and (layer >= 0).all(), name
        assert table[:, "gene0035"].X.mean() < 0.2 * table.X.mean()
        assert np.isfinite(table.obsm["proportions"]).all()
        assert np.isfinite(run.proportions(draws=4).X).all()


@pytest.mark.parametrize("preset, more", [("paper", ["chains=2", "factors=4", "fit.steps=8"])])
def test_paper_preset_runs_and_refuses_new_cells(sim, preset, more):
    run = api.fit("siid", target=sim.target, reference=sim.reference, preset=preset, overrides=more)
    assert len(chains_of(run.pair)) == 1 and np.isfinite(run.predict(draws=4).X).all()
    with pytest.raises(UserError, match="new cells"):
        run.predict(target=sim.target[:50].copy(), draws=2)


def test_default_learns_its_settings_and_says_so(sim):
    lines = []
    run = api.fit(
        "siid",
        target=sim.target,
        reference=sim.reference,
        overrides=["chains=1", "sweeps=6", "fit.steps=2"],
        say=lines.append,
    )
    text = "\n".join(lines)
    for word in ("radius", "factors", "sparsity", "gain sd"):
        assert word in text
    assert run.spec.hyper.factors >= 4 and run.spec.hyper.candidates


def test_gene_block_cache_does_not_grow(run, sim):
    """The regional effect of one block of genes at a time: memory must not grow with the genes asked for."""
    predictor = siid.Predictor(run.pair, run.data, run.config, run.spec)
    predictor.mixed = [predictor._mixed(c) for c in range(2)]
    predictor.bandwidth, predictor.shape = 0.6, 3.0
    batch = next(iter(predictor.blocks(50)))
    local = predictor.local(batch, 0)
    drawn = poutine.trace(predictor.chains[0].guide.globals).get_trace()
    values = {name: site["value"] for name, site in drawn.nodes.items() if site["type"] == "sample"}
    for start in range(0, 40, 10):
        dist = predictor.count_dist(batch, 0, values, local, torch.arange(start, start + 10))
        assert dist.mean.shape == (int(batch.owned.sum()), 10)
    assert len(local[1]) <= 1


if __name__ == "__main__":
    base, last = Path(sys.argv[1]), int(sys.argv[2])
    unhooked = Batches.at

    def deadly(self, step):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return unhooked(self, step)

    Batches.at = deadly  # type: ignore[method-assign]
    api.fit(
        "siid",
        target=base / "target.h5ad",
        reference=base / "reference.h5ad",
        overrides=FAST,
        seed=3,
        out=base / "run",
    )


def test_proportions_use_every_chain_that_found_the_same_factors(run):
    """Chains number their factors as they like: without matching, mixing their draws would smear all proportions."""
    one, two = (copy.deepcopy(chains_of(run.pair)[0]) for _ in range(2))
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in (two.guide.xi_loc, two.guide.xi_log_scale, *(module.usage for module in two)):
            tensor.copy_(tensor[order].clone())
    kept, orders = siid._same_factors([one, two])
    assert len(kept) == 2 and orders[1].tolist() == torch.argsort(order).tolist()
    (alone, _), (both, _) = (
        siid.proportions(ensemble(pairs), run.data, run.config, 12, 0) for pairs in ([one], [one, two])
    )
    assert np.abs(both.mean(0) - alone.mean(0)).mean() < 0.02
    assert both.std(0).mean() < 1.2 * alone.std(0).mean()  # unmatched factors would spread over everything
    with torch.no_grad():
        two.guide.xi_loc.copy_(5 * torch.randn(two.guide.xi_loc.shape, generator=torch.Generator().manual_seed(0)))
    assert len(siid._same_factors([one, two])[0]) == 1

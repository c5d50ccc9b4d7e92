"""SIID's EM and the cells' local posterior: never worse, and at a stationary point."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ppl_st.models.siid import activity as activity_room
from ppl_st.models.siid import warm_start
from ppl_st.models.siid.activity import Globals, LocalPosterior, Sheet, aggregate, sizes
from ppl_st.models.siid.batches import Batches
from ppl_st.models.siid.model import Config
from ppl_st.product import csr_tensor
from seeded import own_seed
from siid_problems import em_problem

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


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


@pytest.mark.parametrize("steps", [1, 12, 18])
def test_the_last_sweep_has_the_whole_sparsity(steps, monkeypatch):
    """The ramp ended at (steps - 2) / steps: EM learned its profiles under another sparsity than training and prediction used."""
    data, ramps = em_problem(), []
    update = LocalPosterior.update
    monkeypatch.setattr(LocalPosterior, "update", lambda self, local, g, ramp, stride: ramps.append(ramp) or update(self, local, g, ramp, stride))
    LocalPosterior(Batches(data, 0, 0).at(0)).solve(globals_of(data, 8.0, 0.2), steps)
    assert len(ramps) == steps and ramps[-1] == 1 and min(np.diff([0, *ramps])) >= 0


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

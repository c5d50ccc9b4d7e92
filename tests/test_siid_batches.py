"""SIID's minibatches: every spot and cell once per epoch, an unbiased objective, no lesson from empty spots."""

import itertools
from dataclasses import replace

import numpy as np
import pyro
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from ppl_st.inference.svi import rng_scope
from ppl_st.models.siid import warm_start
from ppl_st.models.siid.activity import Local, LocalPosterior
from ppl_st.models.siid.batches import Batches
from ppl_st.models.siid.model import PRESETS, build, random_start
from seeded import own_seed
from siid_problems import default_pair, spec_of, tiny

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


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
        ones = Local(torch.ones(60, 3), torch.ones(60, 3), torch.ones(60), torch.ones(60))
        globals_ = pair.guide.conditioning(pair.guide.xi_loc.detach(), pair.guide.log_phi_loc.detach())
        sums = (warm_start._sums(LocalPosterior(one), globals_, ones) for one in (batch, Batches(without, 0, 0).at(0)))
        (counts, reach), wanted = ((float(one.observed), float(one.reach.sum())) for one in sums)
        assert (counts, reach) == pytest.approx(wanted, rel=1e-5)  # their ratio is rho
    for name, value in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )

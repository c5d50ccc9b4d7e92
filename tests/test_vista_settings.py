"""VISTA: the scale of published training, panels too small to choose on, settings that contradict each other, cells without neighbors."""

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.data import read_counts, shared_total
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import rng_scope
from ppl_st.models.vista import PRESETS, batches, start
from ppl_st.prepare import vista as prepare
from ppl_st.prepare.vista import problem
from ppl_st.simulate import spatial_field

FAST = ["penalty=3", "reweight=false", "process=0", "fit.steps=4", "neighbors=6"]


def simulated(**sizes):
    return spatial_field(seed=1, n_types=3, rho=3.0, spatial=1.0, length=500.0, **sizes)


@pytest.fixture(scope="module")
def world():
    return simulated(n_cells=240, n_reference=200, n_genes=36, n_panel=20)


def quiet(line):
    pass


def prepared(world, config):
    return problem(read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False), config, quiet)[0]


def test_published_networks_are_trained_per_cell(world):
    """Adam's eps and the clip know the size of a gradient: one that is a hundred times too small trains another model."""
    settings = ["batch_cells=0", "batch_reference=0", "fit.steps=1", "fit.kl_warmup_steps=0", "dropout=0"]
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, preset="gimvi", overrides=settings)
    pair, _ = start(run.data, run.config, 0, quiet)
    with rng_scope(0, "noise", 0):
        loss = TraceMeanField_ELBO().differentiable_loss(*chains_of(pair)[0], batches(run.data, run.config, 0).at(0)).item()
    assert run.record["losses"][0] == pytest.approx(loss / (240 + 200), rel=0.05)


def test_a_panel_too_small_to_choose_on_is_told_what_it_does_not_get():
    world, said = simulated(n_cells=80, n_reference=60, n_genes=20, n_panel=8), []
    ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=["fit.steps=2"], say=said.append)
    assert any("8 shared genes: too few" in line and "have no share" in line for line in said)
    assert "warning: the fit ends at KL weight 0.10: kl_warmup_steps=20 of steps=2" in said


def test_settings_that_contradict_each_other_are_said(world):
    with pytest.raises(UserError, match="add --set visible=1"):
        ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=[*FAST, "map=learned"])
    config, said = with_overrides(PRESETS["default"], [*FAST, "adversary=cross_entropy"]), []
    start(prepared(world, config), config, 0, said.append)
    assert any("adversary has nothing to move" in line for line in said)


def test_a_cell_without_neighbors_has_the_standard_prior(world):
    config = with_overrides(PRESETS["default"], [*FAST, "visible=1"])
    data = prepared(world, config)
    model = chains_of(start(data, config, 0, quiet)[0])[0].model
    torch.nn.init.constant_(model.gate, 0.8)
    alone = data.graph.tolil()
    alone[0] = 0
    batch = batches(data._replace(graph=alone.tocsr()), config, 0).of(np.arange(20))
    trace = poutine.trace(model).get_trace(batch)
    scale = trace.nodes["z"]["fn"].base_dist.scale
    assert (scale[0] == 1).all() and (scale[1:] < 0.9).all()


def test_hidden_genes_are_scored_as_if_each_were_once(world):
    """A gene that is hidden in a quarter of the steps had the posterior of a quarter of its counts: twice as wide."""
    config = with_overrides(PRESETS["default"], [*FAST, "graph=none"])
    data = prepared(world, config)
    model = chains_of(start(data, config, 0, quiet)[0])[0].model
    batch = batches(data, config, 0).of(np.arange(50))
    known = {name: loc for name, (loc, _) in model.priors().items()} | {"z": torch.zeros(50, model.latent)}

    def score(visible):
        trace = poutine.trace(poutine.condition(model, known)).get_trace(batch._replace(visible=visible))
        trace.compute_log_prob()
        return trace.nodes["x"]["log_prob_sum"].item()

    quarter = torch.arange(20) % 4
    found = [score(quarter != k) for k in range(4)]
    assert np.mean(found) == pytest.approx(score(quarter >= 0), rel=1e-5) and np.ptp(found) > 0


def test_of_more_shared_genes_than_the_closed_map_takes_those_with_most_counts_are_used(world, monkeypatch):
    """Time grew with the cube of the shared genes, without a bound."""
    monkeypatch.setattr(prepare, "MAX_PANEL", 8)
    said, sides = [], (read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False))
    data, target, reference = problem(*sides, with_overrides(PRESETS["default"], FAST), said.append)
    counts = np.asarray(world.target.X.sum(0)).ravel()
    assert sorted(counts[:20])[-8:] == sorted(counts[world.target.var_names.get_indexer(target.genes)])
    assert list(reference.genes[data.panel]) == list(target.genes) and data.others.shape[1] == 0
    assert "of 20 shared genes the 8 with most counts are used" in said[0]
    np.testing.assert_array_equal(shared_total(target, reference.genes), world.target.X.toarray().sum(1))
    assert len(problem(*sides, with_overrides(PRESETS["gimvi"], []), quiet)[0].panel) == 20

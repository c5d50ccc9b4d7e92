"""SpaGene's objective: the published one term by term, counts and decoders in the same units, factors that can be switched."""

import numpy as np
import pytest
import torch
from pyro import poutine

from ppl_st.errors import UserError
from ppl_st.models import spagene
from ppl_st.models.common.cells import without
from ppl_st.models.spagene.autoencoder import clip_limits, train
from ppl_st.models.spagene.model import NAMES, PRESETS, model_of
from spagene_problems import settings, small_world, some_shared, untrained

world = pytest.fixture(small_world, scope="module")
some = pytest.fixture(some_shared, scope="module")


def test_square_roots_are_clipped_at_mean_and_two_sd_of_positive_counts_of_training_genes(some):
    shape = settings("paper").shape(0)
    net = train(some, shape, settings("paper").stage1, 64, 0, "x")
    counts = some.counts.toarray()
    for g in range(counts.shape[1]):
        positive = counts[counts[:, g] > 0, g].astype(float)
        limit = positive.mean() + 2 * positive.std(ddof=1)
        np.testing.assert_allclose(net.read(some, np.arange(300))[:, g], np.sqrt(np.minimum(counts[:, g], limit)), rtol=1e-5)
    fewer = without(some, np.arange(4))
    np.testing.assert_allclose(clip_limits(fewer.counts), np.delete(clip_limits(some.counts), some.columns[:4]))


def direct_terms(pair, batch, drawn, config):
    """Every published term from numpy arrays, by the formulas."""
    model = model_of(pair)
    array = lambda t: t.detach().double().numpy()  # noqa: E731
    rows = (batch.rows.numpy(), batch.reference_rows.numpy())
    terms = {}
    for k, name in enumerate(NAMES):
        problem = model.problems[k]
        x = array(model.side(k).read(problem, rows[k]))
        there, other = array(drawn[f"{name}_translated"]), array(drawn[f"{NAMES[1 - k]}_z"])
        decoded = array(model.side(1 - k).decode(drawn[f"{name}_translated"]))[:, problem.panel]
        with np.errstate(invalid="ignore"):
            rho = [np.corrcoef(decoded[:, g], x[:, c])[0, 1] for g, c in enumerate(problem.columns)]
        terms[f"{name}_identity"] = config.identity_weight * (1 - np.mean(np.nan_to_num(rho)))
        back = array(model.side(k).decode(model.way(1 - k).translate(drawn[f"{name}_translated"])))
        terms[f"{name}_cycle"] = config.cycle_weight * np.mean((back - x) ** 2)
        terms[f"{name}_coral"] = config.coral_weight * np.sum((np.cov(there.T) - np.cov(other.T)) ** 2) / (4 * there.shape[1] ** 2)
        square = ((np.concatenate([there, other])[:, None] - np.concatenate([there, other])) ** 2).sum(-1)
        kernel, n = np.exp(-0.3 * square), len(there)
        terms[f"{name}_mmd"] = config.mmd_weight * (kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())
        logits = array(model.opponents[k](drawn[f"{name}_translated"]))
        hinge = np.maximum(1 - logits, 0).mean() if config.adversary == "hinge_published" else -logits.mean()
        terms[f"{name}_adversary"] = config.adversary_weight * hinge
    return terms


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_published_presets_equal_the_formulas_term_by_term(some, preset):
    config = settings(preset, "dropout=0", "translator_dropout=0")
    pair = untrained(config, some)
    batch = spagene.batches(some, config, 0).at(1)
    torch.manual_seed(0)
    guide = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch)
    drawn = {name: site["value"] for name, site in model.nodes.items() if site["type"] == "sample"}
    for k, name in enumerate(NAMES):
        way = model_of(pair).way(k)
        drawn[f"{name}_translated"] = way.translate(drawn[f"{name}_z"]) + way.noise() * drawn[f"{name}_noise"]
    size = some.counts.shape[0] * some.counts.shape[1]
    for name, value in direct_terms(pair, batch, drawn, config).items():
        assert -model.nodes[name]["fn"].log_factor.item() / size == pytest.approx(value, rel=2e-4, abs=1e-7), name
    # Nothing else is in the objective: the codes and their translations have the same law on both sides.
    everything = sum(direct_terms(pair, batch, drawn, config).values())
    assert (guide.log_prob_sum() - model.log_prob_sum()).item() / size == pytest.approx(everything, rel=2e-4)


@pytest.mark.parametrize("preset", ["paper", "network"])
def test_dropout_of_the_translators_adds_nothing_to_the_objective_but_the_noise_of_its_factors(some, preset):
    off = ["identity=off", "cycle_weight=0", "coral_weight=0", "mmd_weight=0", "adversary=off"]
    config = settings(preset, "dropout=0.5", "translator_dropout=0.5", *off)
    pair = untrained(config, some)
    pair.model.train()
    batch = spagene.batches(some, config, 0).at(1)
    guide = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch)
    assert model.log_prob_sum().item() == guide.log_prob_sum().item()
    assert not torch.equal(*(model_of(pair).way(0).translate(guide.nodes["forward_z"]["value"]) for _ in range(2)))


def test_weights_are_those_of_the_publication():
    paper, released = PRESETS["paper"], PRESETS["released"]
    assert (paper.identity_weight, paper.cycle_weight, paper.coral_weight, paper.mmd_weight, paper.adversary_weight) == (10, 6, 0.3, 0.3, 1e-3)
    assert paper.latent == (512, 256) and paper.hidden == (2048, 1024, 512) and paper.adversary == "hinge"
    assert released.adversary == "hinge_published" and released.coral_weight == 4 * paper.coral_weight


def test_the_gain_likelihood_compares_decoders_and_counts_in_the_same_units(some):
    """A decoder of log rates says -4 or -8 of a gene, standardised counts are around 0: unit gain and no offset must be a sensible start."""
    pair = untrained(settings("network", "stage1.steps=40"), some)
    model = model_of(pair)
    raw = model.decode(1, model.codes(1, torch.arange(220))[0])
    assert raw.mean() < -2
    loc, scale = model.units(1)
    inside = (raw - loc) / scale
    torch.testing.assert_close(inside.mean(0), torch.zeros(inside.shape[1]), atol=1e-3, rtol=0)
    torch.testing.assert_close(inside.std(0, correction=0), torch.ones(inside.shape[1]), atol=1e-3, rtol=0)
    whole = spagene.Batches(some, 0, 0, 0).at(0)
    guide = poutine.trace(pair.guide).get_trace(whole)
    sites = poutine.trace(poutine.replay(pair.model, guide)).get_trace(whole).nodes
    assert (sites["forward_identity"]["fn"].base_dist.loc.mean(0).abs() < 3).all()


def test_every_factor_and_critic_can_be_switched(some):
    everything = {"cycle_weight": "cycle", "coral_weight": "coral", "mmd_weight": "mmd", "adversary_weight": "adversary"}
    for off in (None, *everything):
        config = settings("paper", *([f"{off}=0", *(["adversary=off"] if off == "adversary_weight" else [])] if off else []))
        sites = poutine.trace(untrained(config, some).model).get_trace(spagene.batches(some, config, 0).at(0)).nodes
        for setting, name in everything.items():
            assert (f"forward_{name}" in sites) == (f"backward_{name}" in sites) == (setting != off)
    with pytest.raises(UserError, match="does not go with identity='pearson'"):
        settings("default", "identity=pearson")

"""SpaGene's objective: the published one term by term, counts and decoders in the same units, factors that can be switched."""

import numpy as np
import pytest
import torch
from pyro import poutine

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.models import spagene
from ppl_st.models.common.cells import without
from ppl_st.models.spagene.autoencoder import Autoencoder, CellBatches, autoencoder_pair, clip_limits, train
from ppl_st.models.spagene.model import NAMES, PRESETS, direction_of, model_of
from ppl_st.prepare import hold_out_genes
from ppl_st.prepare.spagene import problem
from spagene_problems import quiet, settings, small_world, some_shared, untrained

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
    off = ["identity=off", "cycle_weight=0", "coral_weight=0", "mmd_weight=0", "adversary=off", "adversary_weight=0"]
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


def test_units_are_of_cells_from_all_over_a_reference_that_is_sorted(some, monkeypatch):
    monkeypatch.setattr("ppl_st.models.spagene.model.UNITS_CELLS", 110)
    model = model_of(untrained(settings("network"), some))
    z = torch.linspace(-3, 3, 220)[:, None].expand(220, model.side(1).latent)
    model.cache[1] = (z, torch.zeros_like(z))
    decoded = model.decode(1, z)
    every, first = decoded.mean(0), decoded[:110].mean(0)
    assert (model.units(1)[0] - every).abs().mean() < 0.3 * (first - every).abs().mean()


def test_an_identity_per_cell_and_gene_reads_and_decodes_the_shared_genes_alone(some, monkeypatch):
    model = model_of(untrained(settings("network", "cycle_weight=0"), some))
    for k, one in enumerate(model.problems):
        model.units(k)
        side, rows, columns = model.side(k), np.arange(9), one.columns
        torch.testing.assert_close(side.read(one, rows, columns), side.read(one, rows)[:, columns])
        z = torch.randn(9, side.latent)
        torch.testing.assert_close(side.decode(z, torch.from_numpy(columns)), side.decode(z)[:, columns])
    widths = []
    for name in ("read", "decode"):
        plain = getattr(Autoencoder, name)
        monkeypatch.setattr(Autoencoder, name, lambda *given, plain=plain: widths.append((out := plain(*given)).shape[1]) or out)
    poutine.trace(model).get_trace(spagene.Batches(some, 30, 40, 0).at(0))
    assert widths == 4 * [len(some.panel)] and len(some.panel) < some.counts.shape[1]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_translations_of_the_published_presets_are_points(some, preset):
    pair = untrained(settings(preset, "dropout=0", "translator_dropout=0"), some)
    direction = direction_of(pair, 0)
    direction.learn_blur(some, np.arange(300))
    assert not direction.log_scale.requires_grad and not direction.noise().any() and not direction.cell_noise(torch.arange(24, 36)).any()


def test_settings_that_would_do_nothing_are_refused():
    for preset, setting in (("default", "identity_weight=2"), ("network", "identity_weight=2"), ("default", "preprocess=sqrt")):
        with pytest.raises(UserError, match=setting.partition("=")[0]):
            settings(preset, setting)
    for preset, setting in (("default", "adversary=hinge"), ("default", "adversary_weight=1"), ("paper", "adversary_weight=0")):
        with pytest.raises(UserError, match="does nothing: set both, or neither"):
            settings(preset, setting)


def test_every_factor_and_critic_can_be_switched(some):
    everything = {"cycle_weight": "cycle", "coral_weight": "coral", "mmd_weight": "mmd", "adversary_weight": "adversary"}
    for off in (None, *everything):
        config = settings("paper", *([f"{off}=0", *(["adversary=off"] if off == "adversary_weight" else [])] if off else []))
        sites = poutine.trace(untrained(config, some).model).get_trace(spagene.batches(some, config, 0).at(0)).nodes
        for setting, name in everything.items():
            assert (f"forward_{name}" in sites) == (f"backward_{name}" in sites) == (setting != off)
    with pytest.raises(UserError, match="does not go with identity='pearson'"):
        settings("default", "identity=pearson")


def test_the_gain_and_offset_likelihood_by_hand(some):
    """Normal(a + e^b f, sigma), f what the other side's decoder says, in its own units."""
    pair = untrained(settings("network"), some)
    model, whole = model_of(pair), spagene.Batches(some, 0, 0, 0).at(0)
    pair.guide.effect_loc.data.normal_(0, 0.3)
    guide = poutine.trace(pair.guide).get_trace(whole)
    trace = poutine.trace(poutine.replay(pair.model, guide)).get_trace(whole)
    trace.compute_log_prob()
    for k, name in enumerate(NAMES):
        problem, way = model.problems[k], model.way(k)
        z, noise, effect = (guide.nodes[f"{name}_{what}"]["value"] for what in ("z", "noise", "effect"))
        f = model.side(1 - k).decoder(way.net(z) + way.log_scale.exp() * noise)
        every = model.side(1 - k).decoder(model.side(1 - k).codes(model.problems[1 - k])[0])
        f = ((f - every.mean(0)) / every.std(0, correction=0))[:, problem.panel]
        x = model.side(k).read(problem, np.arange(problem.counts.shape[0]))[:, problem.columns]
        b, a, log_sd = effect.unbind(1)
        expected = -0.5 * ((x - a - b.exp() * f) / log_sd.exp()).square() - log_sd - 0.5 * np.log(2 * np.pi)
        torch.testing.assert_close(trace.nodes[f"{name}_identity"]["log_prob"], expected.sum(1), rtol=1e-4, atol=1e-3)


def test_the_cycle_of_a_decoder_of_log_rates_is_held_against_what_it_says_of_the_cell(some):
    config = settings("network", "cycle_weight=2")
    pair = untrained(config, some)
    model, batch = model_of(pair), spagene.batches(some, config, 0).at(1)
    guide = poutine.trace(pair.guide).get_trace(batch)
    nodes = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch).nodes
    for k, name in enumerate(NAMES):
        z, noise = (guide.nodes[f"{name}_{what}"]["value"] for what in ("z", "noise"))
        there, back, own = model.way(k), model.way(1 - k), model.side(k)
        returned = own.decoder(back.net(there.net(z) + there.log_scale.exp() * noise))
        expected = 2 * (returned - own.decoder(z)).square().mean() * some.counts.shape[0] * some.counts.shape[1]
        assert -nodes[f"{name}_cycle"]["fn"].log_factor.item() == pytest.approx(expected.item(), rel=1e-5)


def test_stage_1_with_point_codes_is_the_mean_squared_error_and_a_gaussian_up_to_constants(some):
    shape = settings("paper", "dropout=0").shape(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Autoencoder(shape, some.counts.shape[1])
    net.learn_moments(some)
    batch, n, genes = CellBatches(net, some, 100, 0).at(1), *some.counts.shape
    square = (net.decoder(net.encoder(batch.x)) - batch.x).square().mean().item()
    pair = autoencoder_pair(net)
    guide = poutine.trace(pair.guide).get_trace(batch)
    found = guide.log_prob_sum() - poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch).log_prob_sum()
    assert found.item() == pytest.approx(n * square, rel=1e-5)
    net.shape = shape._replace(codes="normal")  # the Gaussian of sd sqrt(genes / 2), at the same codes
    pair.model.log_noise.data.fill_(0.5 * np.log(genes / 2))
    trace = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch)
    trace.compute_log_prob()
    constants = n * genes * 0.5 * np.log(np.pi * genes)
    assert -trace.nodes["x"]["log_prob_sum"].item() - constants == pytest.approx(n * square, rel=1e-4)


def test_a_held_out_gene_changes_nothing_of_the_prepared_data(world):
    config, gene = settings("paper"), world.target.var_names[3]
    changed, prepared = world.target.copy(), []
    dense = changed.X.toarray()
    dense[::2, 3] += 10_000
    changed.X = dense
    for cells in (world.target, changed):
        reference = read_counts(world.reference, role="reference", need_spatial=False)
        data = problem(hold_out_genes(read_counts(cells, role="target"), reference, [gene]), reference, config, quiet)[0]
        net = Autoencoder(config.shape(0), data.counts.shape[1])
        net.learn_moments(data)
        prepared.append((data, net.read(data, np.arange(300)), net.sd))
    (a, *first), (b, *second) = prepared
    assert a.counts.shape == (300, 23) and (a.counts != b.counts).nnz == 0
    for one, other in zip((*first, *a[1:3], *a[4:7]), (*second, *b[1:3], *b[4:7]), strict=True):
        np.testing.assert_array_equal(one, other)

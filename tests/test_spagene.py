"""SpaGene: closed forms equal the textbook, the published objective is the published one, frozen means frozen, both directions, runs and refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.stats import multivariate_normal

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import fit, load_state
from ppl_st.metrics import pcc, score_table
from ppl_st.models import spagene
from ppl_st.models.common.cells import without
from ppl_st.models.common.counts import default_hyper
from ppl_st.models.spagene.alignment import linear_accuracy, mixing
from ppl_st.models.spagene.autoencoder import autoencoder_pair, clip_limits, linear, train
from ppl_st.models.spagene.closed import Closed, features
from ppl_st.models.spagene.model import NAMES, PRESETS, build, direction_of, model_of
from ppl_st.models.spagene.regression import loadings_of_all, regress
from ppl_st.prepare.spagene import problem
from ppl_st.report_sections import fit as fit_section
from ppl_st.simulate import spatial_field
from ppl_st.testing import check_pair

SMALL = [
    "latent=[6, 5]", "hidden=[12]", "translator_hidden=[8]", "backward_hidden=[7]", "critic_hidden=[8]", "stage1.steps=5", "fit.steps=4",
    "batch_cells=64", "batch_reference=48",
]  # fmt: skip


@pytest.fixture(scope="module")
def world():
    return spatial_field(seed=1, n_cells=300, n_reference=220, n_genes=40, n_panel=24, n_types=4, rho=3.0)


def quiet(line):
    pass


def settings(preset, *overrides):
    return with_overrides(PRESETS[preset], [*SMALL, *overrides])


def pose(world, config=PRESETS["default"]):
    return problem(
        read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False), config, quiet
    )[0]


@pytest.fixture(scope="module")
def data(world):
    return pose(world)


@pytest.fixture(scope="module")
def some(world):
    """The target with genes of its own beside the shared ones: the reference lacks every sixth gene of the panel."""
    kept = [g for i, g in enumerate(world.reference.var_names) if i >= 24 or i % 6]
    return pose(replace(world, reference=world.reference[:, kept].copy()))


@pytest.fixture(scope="module")
def run(world):
    return ppl_st.fit("spagene", target=world.target, reference=world.reference, overrides=["fit.steps=5"], seed=0)


def untrained(config, data, seed=0):
    """A pair with stage 1 done and nothing learned about counts."""
    problems = (data, data.turned())
    sides = tuple(train(problems[k], config.shape(k), config.stage1, config.batch_cells, seed, f"{k}") for k in range(2))
    hypers = tuple(default_hyper(one, config) for one in problems)
    spec = spagene.Spec((1.0, 1.0), ([], []), hypers, config.fit.steps, (sides[0].latent, sides[1].latent), [])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config, spec, data, sides)


# ---- closed forms ----


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
    assert autoencoder_pair(net).model.net is net


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
    mean, variance, draws = closed.codes(3000, [0])[:3]
    for k, (ratio, noise) in enumerate(zip(closed.ratios, closed.noise, strict=True)):
        inverse = np.linalg.inv(d[some.panel].T @ d[some.panel] + np.eye(7) / ratio)
        np.testing.assert_allclose(mean[k], t[k] @ d[some.panel] @ inverse @ d[held].T, atol=1e-6)
        np.testing.assert_allclose(variance[k], noise * (1 + np.einsum("gi,ij,gj->g", d[held], inverse, d[held])), rtol=1e-4)

        def log_posterior(ratio, noise, k=k):
            cov = noise * (ratio * d[some.panel] @ d[some.panel].T + np.eye(20))
            return multivariate_normal.logpdf(t[k], cov=cov) - 0.5 * (np.log(ratio / 0.5) / 1.5) ** 2

        best = log_posterior(ratio, noise)
        assert all(log_posterior(a * ratio, b * noise) < best + 0.05 for a in (0.3, 1, 3) for b in (0.7, 1, 1.4))
    np.testing.assert_allclose(draws.mean(0), mean, atol=5 * np.sqrt(variance.max() / 3000))
    np.testing.assert_allclose(draws.var(0), variance, rtol=0.2)


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
        overrides = [f"reference_share={share}", "latent=[24, 24]", "smoothing=0", "fit.steps=2"]
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


# ---- the published objective ----


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


# ---- the game ----


def flat(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("preset", ["paper", "network", "default"])
def test_frozen_weights_and_buffers_are_the_same_bits_after_stage_2(some, preset):
    config = settings(preset, "dropout=0.2", "fit.device=cpu")
    pair = untrained(config, some)
    frozen = model_of(pair).frozen
    before = flat(frozen)
    codes = model_of(pair).codes(0, torch.arange(300))[0].clone()
    ways = flat(model_of(pair).directions)
    scale = 1.0 / (some.counts.shape[0] * some.counts.shape[1])
    spagene._train(pair, some, config, 0, config.fit)
    assert scale and same(before, flat(frozen)) and not any(p.requires_grad for p in frozen.parameters())
    assert not same(ways, flat(model_of(pair).directions))
    pair.model.train()
    assert not any(module.training for side in frozen for module in side.modules())
    torch.testing.assert_close(frozen[0].codes(some)[0], codes)


def test_critics_move_in_their_own_step_only_and_translators_in_theirs(some):
    config = settings("paper", "fit.steps=1")
    pair = untrained(config, some)
    from ppl_st.inference.ensemble import ensemble

    whole = ensemble([pair])
    game = spagene.adversary(whole, config)
    assert len(game.players) == 2
    batches, model = spagene.batches(some, config, 0), model_of(pair)
    critics, ways = flat(game.module), flat(model.directions)
    nodes = poutine.trace(whole.guide).get_trace(batches.at(0)).nodes
    assert game.step({name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}, 0, 0) == ""
    moved = flat(game.module)
    assert not same(critics, moved) and same(ways, flat(model.directions))
    fit(whole, batches, config.fit)  # without the second player's step
    assert same(moved, flat(game.module)) and not same(ways, flat(model.directions))


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


def test_alignment_tells_what_mixes_from_what_does_not():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 5, generator=rng), torch.randn(300, 5, generator=rng)
    assert mixing(a, b) == pytest.approx(1, abs=0.1) and linear_accuracy(a, b) == pytest.approx(0.5, abs=0.06)
    assert mixing(a, b + 5) < 0.05 and linear_accuracy(a, b + 2) > 0.9


# ---- runs ----


def test_genes_that_only_the_target_has_place_its_cells(world, some):
    kept = [g for i, g in enumerate(world.reference.var_names) if i >= 24 or i % 6]
    reference = world.reference[:, kept].copy()
    run = ppl_st.fit("spagene", target=world.target, reference=reference, overrides=["fit.steps=2"])
    assert some.counts.shape[1] == 24 and len(some.panel) == 20
    changed = world.target.copy()
    own = [i for i in range(24) if i % 6 == 0]
    dense = changed.X.toarray()
    dense[:, own] = dense[np.random.default_rng(0).permutation(len(dense))][:, own]
    changed.X = dense
    before, after = (run.predict(target=t, draws=3).X for t in (world.target, changed))
    assert np.abs(np.log(before) - np.log(after)).max() > 0.005


def test_predictions_of_new_cells_are_those_of_the_same_cells_and_permute_with_them(run, world):
    first = run.predict(draws=4)
    again = run.predict(target=world.target, draws=4)
    np.testing.assert_allclose(first.X, again.X)
    order = np.random.default_rng(0).permutation(300)
    np.testing.assert_allclose(run.predict(target=world.target[order].copy(), draws=4).X, first.X[order], rtol=1e-4)
    with pytest.raises(UserError, match="lacks 1 of the 24 genes"):
        run.predict(target=world.target[:, 1:].copy(), draws=2)


def test_the_other_direction_gives_reference_cells_on_the_targets_platform(run, world):
    other = run.turned()
    result = other.predict(other.genes, draws=30, samples=2)
    assert list(result.obs_names) == list(run.reference.names) and list(result.var_names) == list(run.target.genes)
    assert result.var["measured"].all() and result.layers["sample_1"].shape == result.shape
    # Levels are those of the target's platform, not of the reference's.
    level = np.log(np.asarray(result.X).mean(0))
    target = np.log(np.asarray(world.target.X.mean(0)).ravel())
    reference = np.log(np.asarray(world.reference.X.mean(0)).ravel()[:24])
    assert np.corrcoef(level, target)[0, 1] > 0.95
    assert np.std(level - target) < np.std(level - reference) / 2
    assert (result.layers["count_sd"] > result.layers["rate_sd"]).all()
    # A gene varies over translated cells as it does over the cells themselves.
    own = world.reference[:, :24].X.toarray()
    total = own.sum(1, keepdims=True)
    r = [np.corrcoef(result.X[:, g], np.log1p(own[:, g] / total[:, 0] * 50))[0, 1] for g in range(24)]
    assert np.mean(r) > 0.3
    with pytest.raises(UserError, match="leave out --target"):
        other.predict(target=world.target)
    with pytest.raises(UserError, match="translates in one direction only"):
        ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=4"]).turned()


@pytest.mark.parametrize("preset", ["default", "network"])
def test_a_run_is_repeatable_loads_and_turns_the_same(world, tmp_path, preset):
    options = {"target": world.target, "reference": world.reference, "preset": preset, "overrides": [*SMALL, "checkpoints=2"], "seed": 3}
    made, again = (ppl_st.fit("spagene", out=tmp_path / name, **options) for name in "ab")
    loaded = ppl_st.load(tmp_path / "a")
    for one in (again, loaded):
        np.testing.assert_array_equal(made.predict(draws=3).X, one.predict(draws=3).X)
        np.testing.assert_array_equal(made.turned().predict(made.target.genes, draws=3).X, one.turned().predict(made.target.genes, draws=3).X)
    assert set(loaded.record["alignment"]) == {f"{name} {what}" for name in NAMES for what in ("mmd", "accuracy", "mixing")}
    assert loaded.predict(draws=2).obsm["translated"].shape[0] == 300
    assert "Alignment of the two sides." in [table.caption for table in fit_section(loaded).tables]


def test_the_game_is_watched_in_the_log_and_in_the_report_and_watching_changes_nothing(world, tmp_path, monkeypatch):
    overrides = [*SMALL, "fit.steps=20", "fit.log_every=7"]
    options = {"target": world.target, "reference": world.reference, "preset": "paper", "overrides": overrides, "seed": 1}
    run = ppl_st.fit("spagene", out=tmp_path / "a", **options)
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "forward mmd" in line]
    assert [line["step"] for line in watched] == list(range(2, 21, 2)) and watched == run.record["watched"]
    kinds = ("identity loss", "cycle loss", "coral loss", "mmd loss", "adversary loss", "critic loss", "mmd", "accuracy", "mixing")
    assert set(watched[0]) == {"step", *(f"{name} {kind}" for name in NAMES for kind in kinds)}
    assert all(np.isfinite(list(line.values())).all() for line in watched)
    assert "What was watched while training." in [table.caption for table in fit_section(ppl_st.load(tmp_path / "a")).tables]
    assert any("game" in caption for caption in fit_section(run).figures)
    monkeypatch.setattr(spagene, "watch", lambda *_: None)
    blind = ppl_st.fit("spagene", **options)
    assert not blind.record["watched"]
    np.testing.assert_array_equal(run.predict(draws=2).X, blind.predict(draws=2).X)
    monkeypatch.undo()
    assert spagene.watch(blind.pair, PRESETS["default"], 0) is None  # no game, nothing to watch


def test_half_a_fit_and_the_rest_are_a_whole_fit_with_critics(some, tmp_path):
    config = settings("paper", "fit.steps=6", "fit.checkpoint_every=3")
    finals = []
    for until in (None, 3):
        pair, _ = spagene.start(some, config, 0, quiet)
        options = {"until": until, "folder": tmp_path}
        state, _ = fit(pair, spagene.batches(some, config, 0), config.fit, adversary=spagene.adversary(pair, config), **options)
        if until:
            other = spagene.empty(config, spagene.Spec((1.0, 1.0), ([], []), (default_hyper(some, config),) * 2, 6, (6, 5), []), some, 1)
            game = spagene.adversary(other, config)
            state, _ = fit(other, spagene.batches(some, config, 0), config.fit, load_state(tmp_path / "state.pt"), adversary=game)
        finals.append(state)
    for name, value in finals[0].model.items():
        if ".counts." not in name:
            assert torch.equal(value, finals[1].model[name]), name
    for name, value in finals[0].adversary["critic"].items():
        assert torch.equal(value, finals[1].adversary["critic"][name]), name


def test_arviz_groups_and_batches_of_unequal_sizes(run, some):
    groups = run.arviz_groups(draws=3, seed=0, max_cells=20)
    assert groups["predictions"]["rate"].shape == (1, 3, 20, 16)
    assert groups["posterior"]["translator"].dims == ("chain", "draw", "directions", "features")
    for sizes in (["batch_cells=1", "batch_reference=1"], ["batch_cells=0", "batch_reference=7"]):
        config = settings("paper", *sizes, "fit.steps=2")
        pair = untrained(config, some)
        state = spagene._train(pair, some, config, 0, config.fit)
        assert np.isfinite(state.tally.recent).all()


def test_the_number_of_steps_is_chosen_where_inner_genes_are_best(some):
    config = settings("network", "fit.steps=8", "checkpoints=4")
    pair, spec = spagene.start(some, config, 0, quiet)
    best = max(spec.candidates, key=lambda one: one["inner genes"])
    assert [one["steps"] for one in spec.candidates] == [2, 4, 6, 8] and spec.steps == best["steps"]
    assert spagene.spec_from(json.loads(json.dumps(spagene.spec_to(spec)))).steps == spec.steps
    assert direction_of(chains_of(pair)[0], 0).linear is False


# ---- slow: what the whole does ----


def play(kind, seed, steps=800):
    """The game alone on codes of which one side is the other rotated and scaled, unpaired; relative squared errors of both translators, over time."""
    d = 3
    overrides = [
        "latent=[3, 3]", "hidden=[4]", "translator_hidden=[]", "backward_hidden=[]", "stage1.steps=1", f"fit.steps={steps}", "fit.lr=5e-3",
        "identity=off", "cycle_weight=0", "coral_weight=0", "mmd_weight=0", f"adversary={kind}", "adversary_weight=1", "critic_hidden=[32, 32]",
        "critic_lr=5e-3", f"fit.seed={seed}",
    ]  # fmt: skip
    config = with_overrides(PRESETS["network"], overrides)
    data = pose(spatial_field(seed=1, n_cells=1500, n_reference=1200, n_genes=12, n_panel=10, n_types=3), config)
    pair = untrained(config, data, seed)
    model, rng = model_of(pair), np.random.default_rng(seed)
    shape = np.array([0.6, 1.0, 2.0])  # skewed, each dimension in its own way: the rotation can be told
    angle, (i, j) = np.deg2rad(rng.uniform(20, 40)), rng.permutation(d)[:2]
    rotation = np.eye(d)
    rotation[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    answer = rotation * np.array([0.6, 1.0, 1.6])
    draws = [(rng.gamma(shape, 1, (n, d)) - shape) / np.sqrt(shape) for n in (1500, 1200)]
    z = [torch.from_numpy(draws[0]).float(), torch.from_numpy(draws[1] @ answer).float()]
    truth = [draws[0] @ answer, draws[1]]
    with torch.no_grad():
        for k in range(2):
            model.cache[k] = (z[k], torch.zeros_like(z[k]))
            model.way(k).net[-1].weight.copy_(torch.eye(d))
            model.way(k).net[-1].bias.zero_()
            model.way(k).log_scale.fill_(-6.0)

    def errors():
        with torch.no_grad():
            return [((model.way(k).translate(z[k]).numpy() - truth[k]) ** 2).sum() / (truth[k] ** 2).sum() for k in range(2)]

    found, state = [errors()], None
    for until in np.linspace(0, steps, 5).astype(int)[1:]:
        state = spagene._train(pair, data, config, seed, config.fit, state, int(until))
        found.append(errors())
    return np.array(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_game_finds_a_rotation_and_scaling_over_ten_seeds_and_does_not_wander_off():
    runs = np.stack([play("hinge", seed) for seed in range(10)])  # [seeds, times, directions]
    assert (runs[:, 0] > 0.15).all()  # there was something to find
    assert (runs[:, -1] < 0.05).all() and (runs[:, -1].mean(0) < 0.03).all(), runs[:, -1]
    assert (runs[:, -1] < runs[:, 2] + 0.02).all(), runs  # the second half does not undo the first
    assert (play("hinge_published", 0)[-1] > 0.15).any()  # the released sign finds nothing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ninety_percent_intervals_cover_simulated_unmeasured_genes_and_a_shuffled_reference_destroys_the_accuracy():
    covered, accuracy = [], []
    for seed in range(3):
        world = spatial_field(seed=seed, n_cells=1500, n_reference=1000, n_genes=140)
        run = ppl_st.fit("spagene", target=world.target, reference=world.reference)
        table = run.predict(draws=100, truth=world.truth)
        covered.append(table.var["coverage_90"].mean())
    shuffled = world.reference.copy()
    dense = shuffled.X.toarray()
    dense[:, 60:] = dense[:, 60 + np.random.default_rng(0).permutation(80)]  # unmeasured genes exchange their names
    shuffled.X = dense
    other = ppl_st.fit("spagene", target=world.target, reference=shuffled).predict(draws=10)
    total = np.asarray(world.target.X.sum(1)).ravel()
    for result in (table, other):
        scores = score_table(world.truth.X, result[:, world.truth.var_names].layers["rate_mean"], total, world.truth.var_names)
        accuracy.append(scores["raw_partial_pcc"].mean())
    assert 0.87 < np.mean(covered) < 0.93, covered
    assert accuracy[0] > 0.15 and abs(accuracy[1]) < accuracy[0] / 4, accuracy


@pytest.mark.slow
def test_cached_codes_make_an_epoch_of_the_latent_game_several_times_faster():
    import time

    config = with_overrides(PRESETS["network"], ["hidden=[2048, 1024, 512]", "stage1.steps=1", "cycle_weight=0", "identity=off"])
    data = pose(spatial_field(seed=0, n_cells=1500, n_reference=1500, n_genes=3500, n_panel=1000), config)
    pair = untrained(config, data)
    model, batches = model_of(pair), spagene.batches(data, config, 0)
    for k in range(2):
        model.codes(k, torch.arange(2))  # fills the cache
    cached, seconds = model.codes, []

    def encode_again(side, rows):
        return model.side(side).encode(model.side(side).read(model.problems[side], rows.numpy()))

    for codes in (cached, encode_again):
        model.__dict__["codes"] = codes
        began = time.process_time()
        for step in range(len(batches)):
            trace = poutine.trace(model).get_trace(batches.at(step))
            (-trace.log_prob_sum()).backward()
        seconds.append(time.process_time() - began)
    print(f"epoch of stage 2, cpu s: cached {seconds[0]:.2f}, encoding again {seconds[1]:.2f}")
    assert seconds[1] > 5 * seconds[0], seconds

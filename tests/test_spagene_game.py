"""SpaGene's game: frozen means frozen, critics move in their own step, it is resumed and watched, it finds what there is to find."""

import json

import numpy as np
import pytest
import torch
from pyro import poutine

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.inference.svi import fit, load_state
from ppl_st.models import spagene
from ppl_st.models.common.inner import default_hyper
from ppl_st.models.spagene.alignment import classifier_accuracy, mixing
from ppl_st.models.spagene.model import NAMES, PRESETS, model_of
from ppl_st.report_sections import fit as fit_section
from ppl_st.simulate import spatial_field
from spagene_problems import SMALL, pose, quiet, settings, small_world, some_shared, untrained

world = pytest.fixture(small_world, scope="module")
some = pytest.fixture(some_shared, scope="module")


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


def test_alignment_tells_what_mixes_from_what_does_not():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, 5, generator=rng), torch.randn(300, 5, generator=rng)
    assert mixing(a, b) == pytest.approx(1, abs=0.1) and classifier_accuracy(a, b) == pytest.approx(0.5, abs=0.06)
    assert mixing(a, b + 5) < 0.05 and classifier_accuracy(a, b + 2) > 0.9
    assert np.isnan(classifier_accuracy(a[:3], b))
    assert classifier_accuracy(a, 0.1 * b) > 0.8  # codes that a translator shrunk to nearly nothing; their mean is the same


def test_critics_of_a_linear_translator_see_the_codes_that_its_draw_makes(some):
    config = settings("default", "adversary=hinge", "adversary_weight=1")
    pair = untrained(config, some)
    model, batch = model_of(pair), spagene.batches(some, config, 0).at(0)
    nodes = poutine.trace(pair.guide).get_trace(batch).nodes
    drawn = {name: site["value"].detach() for name, site in nodes.items() if site["type"] == "sample"}
    for k, (name, player) in enumerate(zip(NAMES, spagene.game({"": model}, config).players, strict=True)):
        way = model.way(k)
        fake = drawn[f"{name}_z"] @ drawn[f"{name}_translator"] @ way.rotation + way.noise() * drawn[f"{name}_noise"]
        torch.testing.assert_close(player.codes(drawn)[1], fake.detach())


def test_critics_of_the_published_presets_learn_as_fast_as_adam_lets_them(some):
    """Its floor of .01 holds a critic back whose gradients are small beside it."""
    moved = {}
    for preset in ("network", "paper"):
        config = settings(preset, "adversary=hinge", "adversary_weight=0.001", "critic_lr=0.001")
        game = spagene.game({"": model_of(untrained(config, some))}, config)
        before = flat(game.module)
        for parameter in game.parameters:
            parameter.grad = torch.full_like(parameter, 1e-5)
        game.optimizer.step()
        moved[preset] = max(float((before[name] - value).abs().max()) for name, value in flat(game.module).items())
    assert moved["network"] < 1e-5 and moved["paper"] > 5e-4, moved


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
    caption, figure = next((caption, figure) for caption, figure in fit_section(run).figures.items() if "game" in caption)
    labels = {ax.get_title(): ax.get_ylabel() for ax in figure.axes}
    assert "nats per entry" in caption and labels["cycle loss"] == "nats per entry" and labels["critic loss"] == labels["mmd"] == "no unit"
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


# ---- slow ----


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
def test_cached_codes_make_an_epoch_of_the_latent_game_several_times_faster():
    """Of CORAL and MMD alone, which read no counts: with an identity per cell and gene every step reads the shared genes of its cells, too."""
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

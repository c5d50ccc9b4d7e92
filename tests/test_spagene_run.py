"""A run of SpaGene: all genes place the cells, both directions, repeatable and loaded the same, covered."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import ppl_st
from ppl_st.cli import app
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.settings import learning_rate
from ppl_st.metrics import score_table
from ppl_st.models import spagene
from ppl_st.models.spagene.closed import Closed, features
from ppl_st.models.spagene.model import NAMES, direction_of
from ppl_st.report_sections import fit as fit_section
from ppl_st.simulate import spatial_field
from spagene_problems import SMALL, quiet, settings, small_world, some_shared, untrained

world = pytest.fixture(small_world, scope="module")
some = pytest.fixture(some_shared, scope="module")


@pytest.fixture(scope="module")
def run(world):
    return ppl_st.fit("spagene", target=world.target, reference=world.reference, overrides=["fit.steps=5"], seed=0)


def test_genes_that_only_the_target_has_place_its_cells(world, some):
    kept = [g for i, g in enumerate(world.reference.var_names) if i >= 24 or i % 6]
    reference = world.reference[:, kept].copy()
    run = ppl_st.fit("spagene", target=world.target, reference=reference, overrides=["process=0", "smoothing=0"])
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
    assert (result.layers["rate_sd"] > 0.2 * result.X).mean() > 0.9  # what nobody counted is in doubt, 5% while the reference's own maps were taken
    # A gene varies over translated cells as it does over the cells themselves.
    own = world.reference[:, :24].X.toarray()
    total = own.sum(1, keepdims=True)
    r = [np.corrcoef(result.X[:, g], np.log1p(own[:, g] / total[:, 0] * 50))[0, 1] for g in range(24)]
    assert np.mean(r) > 0.3
    learned = replace(run, inner=object(), recalibration=object()).turned()
    assert learned.inner is None and learned.recalibration is None  # they are of the genes of the other direction
    with pytest.raises(UserError, match="leave out --target"):
        other.predict(target=world.target)
    with pytest.raises(UserError, match="predicts counts that nobody observed"):
        other.arviz_groups()
    with pytest.raises(UserError, match="translates in one direction only"):
        ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=4", "process=0", "smoothing=0"]).turned()


def test_predict_turned_gives_all_genes_of_the_other_direction(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ppl_st.api.load", lambda path: run)
    done = CliRunner().invoke(app, ["predict", "run", "--turned", "--draws", "2", "--out", str(tmp_path / "x.h5ad")])
    assert done.exit_code == 0, done.output
    assert f"x.h5ad: {len(run.reference.names)} x {len(run.target.genes)}" in done.output.replace("\n", "")


@pytest.mark.parametrize(("preset", "settings"), [("default", ["process=0.4", "smoothing=0.25"]), ("network", ["checkpoints=2"])])
def test_a_run_is_repeatable_loads_and_turns_the_same(world, tmp_path, preset, settings):
    options = {"target": world.target, "reference": world.reference, "preset": preset, "overrides": [*SMALL, *settings], "seed": 3}
    made, again = (ppl_st.fit("spagene", out=tmp_path / name, **options) for name in "ab")
    loaded = ppl_st.load(tmp_path / "a")
    for one in (again, loaded):
        np.testing.assert_array_equal(made.predict(draws=3).X, one.predict(draws=3).X)
        np.testing.assert_array_equal(made.turned().predict(made.target.genes, draws=3).X, one.turned().predict(made.target.genes, draws=3).X)
    assert set(loaded.record["alignment"]) == {f"{name} {what}" for name in NAMES for what in ("mmd", "accuracy", "mixing")}
    assert loaded.predict(draws=2).obsm["translated"].shape[0] == 300
    assert "Alignment of the two sides." in [table.caption for table in fit_section(loaded).tables]


def test_arviz_groups_and_batches_of_unequal_sizes(run, some):
    groups = run.arviz_groups(draws=3, seed=0, max_cells=20)
    assert groups["predictions"]["rate"].shape == (1, 3, 20, 16)
    assert groups["posterior"]["translator"].dims == ("chain", "draw", "directions", "features")
    for sizes in (["batch_cells=1", "batch_reference=1"], ["batch_cells=0", "batch_reference=7"]):
        config = settings("paper", *sizes, "fit.steps=2")
        pair = untrained(config, some)
        state = spagene._train(pair, some, config, 0, config.fit)
        assert np.isfinite(state.tally.recent).all()


def test_without_a_factor_nothing_is_trained_and_the_translator_stays_the_exact_one(run):
    for k, problem in enumerate((run.data, run.data.turned())):
        way = direction_of(chains_of(run.pair)[0], k)
        exact = Closed(problem, way.own, features(way.other, problem.panel), run.spec.ratios[k])
        np.testing.assert_array_equal(way.loc.detach().numpy(), exact.weights.astype(np.float32))
    assert run.record["steps"] == 0 and run.config.fit.steps == 5 and run.record["stop_reason"] == "steps"
    assert not [caption for caption in fit_section(run).figures if "Loss" in caption]


def test_training_ends_where_it_was_judged_best_on_the_schedule_that_was_judged(world, tmp_path, monkeypatch):
    monkeypatch.setattr(spagene, "choose_steps", lambda *_: (3, []))
    overrides = [*SMALL, "fit.steps=9", "fit.log_every=1"]
    run = ppl_st.fit("spagene", target=world.target, reference=world.reference, preset="network", overrides=overrides, out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == [learning_rate(run.config.fit, step) for step in range(3)]
    assert run.record["steps"] == 3 and run.record["stop_reason"] == "steps"


@pytest.mark.parametrize("preprocess", ["lognorm", "sqrt"])
def test_the_number_of_steps_is_chosen_where_inner_genes_are_best(some, monkeypatch, preprocess):
    config = settings("network", "fit.steps=8", "checkpoints=4", f"preprocess={preprocess}")
    judged, correlation = [], spagene.correlation
    monkeypatch.setattr(spagene, "correlation", lambda guess, truth: judged.append(truth) or correlation(guess, truth))
    pair, spec = spagene.start(some, config, 0, quiet)
    np.testing.assert_allclose(judged[0].mean(0), 0, atol=1e-4)  # standardised log-normalised counts, whatever encoders read
    np.testing.assert_allclose(judged[0].std(0), 1, atol=1e-4)
    best = max(spec.candidates, key=lambda one: one["inner genes"])
    assert [one["steps"] for one in spec.candidates] == [2, 4, 6, 8] and spec.steps == best["steps"]
    assert spagene.spec_from(json.loads(json.dumps(spagene.spec_to(spec)))).steps == spec.steps
    assert direction_of(chains_of(pair)[0], 0).linear is False


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

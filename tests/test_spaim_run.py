"""A run of SpaIM: predictions are of the genes asked for, accurate and covered, the same when stored, and of the right cells."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import ppl_st
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.svi import Pair
from ppl_st.metrics import score_table
from ppl_st.models import spaim
from spaim_problems import small_world

world = pytest.fixture(small_world, scope="module")


@pytest.fixture(scope="module")
def run(world):
    return ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8"], seed=0)


def test_the_latent_state_is_places_without_the_process(run):
    latent = run.predict(run.genes[:1], draws=2).obsm["latent"]
    (chain,) = spaim.chains_of(run.pair)
    directions = len(chain.guide.known)
    assert directions < 50 < len(chain.guide.known_codes(run.data.panel[:1]))  # here features would have filled up the columns
    assert latent.shape[1] == directions


def test_every_gene_asked_for_is_predicted_under_its_own_name(world):
    settings = ["hidden=[16, 8]", "clusters=8", "fit.steps=30", "inner_steps=5", "batch_genes=7"]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, preset="paper", overrides=settings, seed=0)
    genes = list(run.genes[~run.measured])
    whole = run.predict(genes, draws=4)
    order = np.random.default_rng(0).permutation(len(genes))
    shuffled = run.predict([genes[i] for i in order], draws=4)
    one = run.predict([genes[3]], draws=4)
    assert list(shuffled.var_names) == [genes[i] for i in order]
    np.testing.assert_allclose(shuffled.X, whole.X[:, order], rtol=2e-4)
    np.testing.assert_allclose(one.X[:, 0], whole.X[:, 3], rtol=2e-4)
    assert whole.shape == (500, len(genes)) and (np.ptp(whole.X, axis=0) > 0).all()
    with pytest.raises(UserError, match="cannot predict others"):
        run.predict(genes, target=world.target[:50], draws=4)


def test_accuracy_and_coverage_on_simulated_genes_of_unknown_level(run, world):
    predicted = run.predict(world.truth.var_names, draws=60, truth=world.truth)
    truth = read_counts(world.truth, role="truth")
    rate = np.asarray(world.truth.layers["rate"])
    depth = run.target.totals
    ours = score_table(truth.matrix, np.asarray(predicted.X), depth, truth.genes)
    oracle = score_table(truth.matrix, rate, depth, truth.genes)
    assert ours["log_pcc"].mean() > 0.6 * oracle["log_pcc"].mean()
    assert 0.82 < predicted.var["coverage_90"].mean() < 0.97
    assert (np.asarray(predicted.layers["rate_sd"]) > 0).all()


def test_the_closed_form_mean_is_the_mean_of_the_draws(run):
    gene = run.genes[~run.measured][:3]
    exact = np.asarray(run.predict(gene, draws=4).layers["rate_mean"])
    predictor = spaim.Predictor(run.pair, run.data, run.config, run.spec)
    mean = np.zeros_like(exact)
    from ppl_st.inference.predict import draw_globals

    batch = next(iter(predictor.blocks(500)))
    index = torch.from_numpy(np.flatnonzero(np.isin(run.genes, gene)))
    drawn = draw_globals(predictor.chains, 400, 0)
    local = predictor.local(batch, 0)
    with torch.no_grad():
        for draw in drawn:
            mean += predictor.count_dist(batch, 0, draw, local, index).mean.numpy() / len(drawn)
    np.testing.assert_allclose(mean.mean(0), exact.mean(0), rtol=0.2)
    assert np.corrcoef(mean.ravel(), exact.ravel())[0, 1] > 0.9


def test_a_stored_run_predicts_the_same_and_new_cells_like_old_ones(world, tmp_path):
    settings = ["clusters=8", "smoothing=0.0", "process=0.4"]
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=settings, seed=0, out=tmp_path / "run")
    genes = run.genes[~run.measured][:5]
    first, again = run.predict(genes, draws=5), ppl_st.load(tmp_path / "run").predict(genes, draws=5)
    for name in ("rate_mean", "rate_sd", "q95"):
        np.testing.assert_array_equal(first.layers[name], again.layers[name])
    fresh = run.predict(genes, draws=5, target=world.target[:60])
    np.testing.assert_allclose(fresh.layers["rate_mean"], first.layers["rate_mean"][:60], rtol=1e-4)
    with pytest.raises(UserError, match="lacks 1 of the 36 genes"):
        run.predict(genes, target=world.target[:, 1:])


def test_places_of_cells_matter_and_a_shuffled_reference_destroys_the_prediction(world):
    settings = ["clusters=8", "smoothing=0.5", "process=0"]
    truth = read_counts(world.truth, role="truth")

    def predict(target, reference):
        run = ppl_st.fit("spaim", target=target, reference=reference, overrides=settings, seed=0)
        return np.asarray(run.predict(world.truth.var_names, draws=3).X), run

    plain, run = predict(world.target, world.reference)
    moved = world.target.copy()
    moved.obsm["spatial"] = np.random.default_rng(0).permutation(moved.obsm["spatial"])
    elsewhere, _ = predict(moved, world.reference)
    assert np.abs(elsewhere - plain).max() > 1e-3
    wrong = world.reference.copy()
    unmeasured = np.flatnonzero(~np.isin(wrong.var_names, world.target.var_names))
    order = np.arange(wrong.n_vars)
    order[unmeasured] = np.roll(unmeasured, 7)
    wrong.X = wrong.X[:, order]
    shuffled, _ = predict(world.target, wrong)
    scores = [score_table(truth.matrix, x, run.target.totals, truth.genes)["log_pcc"].mean() for x in (plain, elsewhere, shuffled)]
    assert scores[0] > scores[1] and scores[2] < 0.5 * scores[0], scores


def test_cells_permuted_permute_the_prediction(world):
    order = np.random.default_rng(0).permutation(world.target.n_obs)
    predictions = []
    for target in (world.target, world.target[order]):
        # Inner genes are judged on a random subset of cells; here on all of them, so that the hyper-priors agree.
        run = ppl_st.fit("spaim", target=target, reference=world.reference, overrides=["clusters=8", "smoothing=0.25", "process=0"], seed=0)
        predictions.append(np.asarray(run.predict(world.truth.var_names[:4], draws=3).X))
    np.testing.assert_allclose(predictions[1], predictions[0][order], rtol=5e-3)


def test_empty_cells_and_a_handful_of_genes(world):
    target = world.target[:120, :9].copy()
    target.X = sp.csr_matrix(np.asarray(target.X.todense()) * (np.arange(120) != 3)[:, None])
    run = ppl_st.fit("spaim", target=target, reference=world.reference, overrides=["clusters=8"], seed=0)
    predicted = run.predict(run.genes[-4:], draws=5)
    assert np.isfinite(predicted.X).all() and (predicted.X >= 0).all()


def test_arviz_groups_have_names_for_every_dimension(run):
    groups = run.arviz_groups(draws=2, max_cells=20)
    assert groups["posterior"]["weights"].dims == ("chain", "draw", "directions", "features")
    assert groups["predictions"]["count"].dims == ("chain", "draw", "cell", "gene")


def test_the_pair_is_a_pair(run):
    assert isinstance(run.pair, Pair)

"""SpaGene's doubt: nothing untrained in a prediction, the encoder's and the translator's reach unmeasured genes."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine

import ppl_st
from ppl_st.calibration import coverage
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.predict import posterior_predictive
from ppl_st.models import spagene
from ppl_st.models.spagene.model import direction_of, model_of
from spagene_problems import SMALL, THETA, pose, settings, small_world, two_platforms, untrained

world = pytest.fixture(small_world, scope="module")


@pytest.fixture(scope="module")
def data(world):
    return pose(world)


FACTORS = ("cycle_weight=1", "coral_weight=1", "mmd_weight=1")


@pytest.mark.parametrize("factor", [None, *FACTORS])
def test_the_translators_noise_is_in_predictions_where_a_factor_trains_it(data, factor):
    pair = untrained(settings("default", *([factor] if factor else [])), data)
    batch, genes = spagene.Batches(data, 0, 0, 0).at(0), torch.arange(24, 40)
    guide = poutine.trace(pair.guide).get_trace(batch)
    (-poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch).log_prob_sum()).backward()
    for k in range(2):
        direction = direction_of(pair, k)
        some = torch.arange(24) if k else genes  # backward nobody has counts of the target's platform
        before = direction.cell_noise(some).square().sum(0)
        assert (direction.log_scale.grad is not None) == (direction.log_scale.requires_grad) == bool(factor)
        direction.log_scale.data.fill_(0.0)
        after = direction.cell_noise(some).square().sum(0)
        assert bool((after > before + 1e-3).all()) == bool(factor)


def test_a_networks_doubt_of_codes_and_translations_widens_unmeasured_genes(world, monkeypatch):
    # Depths as if they were known: what is not known of them would be in all three alike.
    monkeypatch.setattr("ppl_st.models.common.predictor.Gamma", lambda known, _: SimpleNamespace(sample=lambda: torch.ones_like(known)))
    run = ppl_st.fit("spagene", target=world.target, reference=world.reference, preset="network", overrides=[*SMALL, "checkpoints=0"], seed=0)
    (chain,) = chains_of(run.pair)
    direction, bias = direction_of(chain, 0), model_of(chain).side(0).encoder[-1].bias.data[6:]  # log sd of the 6 codes
    genes, found = [*world.reference.var_names[24:28], world.target.var_names[0]], []
    for log_sd, log_noise in ((-5.0, -6.9), (0.7, -6.9), (-5.0, -0.5)):
        bias.fill_(log_sd)
        direction.log_scale.data.fill_(log_noise)
        spagene.select(run.pair, run.data, run.config, 0)
        found.append(run.predict(genes, draws=20).layers["rate_sd"].mean(0))
    sure, encoded, translated = np.array(found)
    assert (encoded[:4] > 1.2 * sure[:4]).all() and (translated[:4] > 1.2 * sure[:4]).all(), found
    np.testing.assert_allclose([encoded[4], translated[4]], sure[4], rtol=1e-3)  # a measured gene has it in its dispersion


def test_blur_is_the_covariance_of_places_of_a_linear_decoder(data):
    """Without hidden layers places are translated codes: J diag(scale^2) J' + noise^2, exactly."""
    pair = untrained(settings("network", "hidden=[]", "translator_hidden=[]"), data)
    direction = direction_of(pair, 0)
    rows = np.tile(np.arange(300), 40)
    torch.manual_seed(0)
    direction.learn_blur(data, rows)
    jacobian, scale = direction.net[-1].weight, direction.own.codes(data)[1]
    expected = (jacobian @ scale.square().mean(0).diag() @ jacobian.T + direction.noise().square().diag()).detach()
    torch.testing.assert_close(direction.blur.T @ direction.blur, expected, atol=0.05 * float(expected.diag().max()), rtol=0)


def test_the_other_direction_translates_every_gene_with_the_doubt_and_the_laws_of_the_targets_platform(data):
    """Before: the reference's own loadings and slopes, no doubt, and theta around maps that are the counts themselves (log theta about 5)."""
    config = settings("default", "latent=[100, 50]")
    pair = untrained(config, data, slope=(1.7, 0.0, 0.3), log_theta=(0.2, 0.0, 0.5), bend=0.3, own_depth=True)
    spagene.select(ensemble([pair]), data, config, 0)
    back, genes = direction_of(pair, 1), torch.arange(24)
    for name, expected in (("slope", 1.7), ("log_theta", 0.2)):  # but for a millionth, which lies beyond the ends of their grids
        np.testing.assert_allclose(getattr(back.counts, f"{name}_loc"), expected, rtol=1e-6)
    assert (back.counts.slope_scale > 0.29).all() and (back.counts.log_theta_scale > 0.49).all()
    assert back.counts.bend == 0.3 and not back.counts.own_depth and (back.counts.log_gain_scale > 0.2).all()
    mean, variance = back.mean_codes(genes)
    torch.testing.assert_close(mean, back.loc @ back.phi[genes].T)
    assert (variance.sum(0) > 0.01 * mean.square().sum(0)).all()
    drawn = back.codes({"translator": back.loc + back.posterior_scale(), "gene_key": torch.tensor(0)}, genes)
    assert (drawn - mean).square().sum(0).min() > 0


def test_counts_of_the_targets_platform_in_reference_cells_are_covered():
    """The reference has other shares of types, and the target no more genes than directions: 90% intervals held .69 of the counts (single genes .38)
    while theta was of maps that are the counts, slopes and loadings were the reference's, and levels known; maps correlated .33."""
    data, hidden = two_platforms()
    config = settings("default", "latent=[100, 50]")
    pair = untrained(config, data, slope=(1.5, 0.0, 0.5), log_theta=(np.log(THETA), 0.0, 0.2))
    pair = spagene.select(ensemble([pair]), data, config, 0)
    predictor = spagene.TurnedPredictor(pair, data.turned(), config, None)
    summary, scores = posterior_predictive(predictor, predictor.chains, np.arange(40), draws=60, seed=0, memory_gb=1.0, truth=hidden)
    found = coverage(scores.pit_low, scores.pit_high, (0.9,)).per_gene
    assert 0.85 < found.mean() < 0.95 and found.min() > 0.7, found

    def correlation(rates):
        return np.mean([np.corrcoef(rates[:, g], hidden.toarray()[:, g])[0, 1] for g in range(40)])

    assert correlation(summary.rate_mean) > 0.35
    direction_of(chains_of(pair)[0], 1).loc.data.neg_()  # maps are what the translator makes of a cell
    predictor = spagene.TurnedPredictor(pair, data.turned(), config, None)
    summary, _ = posterior_predictive(predictor, predictor.chains, np.arange(40), draws=4, seed=0, memory_gb=1.0)
    assert correlation(summary.rate_mean) < -0.1


def test_a_measured_gene_without_counts_has_slope_and_theta_of_the_hyper_priors():
    """Before, those that fit the grid's middle, and sure of them."""
    data, _ = two_platforms()
    counts = data.counts.toarray()
    counts[:, 0] = 0
    data = spagene.make(sp.csr_matrix(counts), data.columns, data.panel, data.reference, None, data.relative)
    config = settings("default", "latent=[10, 10]")
    pair = untrained(config, data, slope=(1.2, 0.0, 0.2), log_theta=(-0.5, 0.0, 0.4))
    spagene.select(ensemble([pair]), data, config, 0)
    layer = direction_of(pair, 0).counts
    np.testing.assert_allclose([layer.slope_loc[0], layer.log_theta_loc[0]], [1.2, -0.5], atol=0.05)

"""XFuse's posterior predictive draws: joint over genes, additive over pixels, less sure of new images."""

import copy

import numpy as np
import pytest
import torch

from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import count_draws, draw_globals, posterior_predictive
from ppl_st.inference.svi import fit, rng_scope
from ppl_st.models import xfuse
from ppl_st.models.xfuse.model import sides
from xfuse_sections import quiet, section, settings, start_of, two_sections

data = pytest.fixture(two_sections, scope="module")
started = pytest.fixture(start_of, scope="module")


def test_counts_of_a_spot_are_those_of_its_pixels_added_up(data, started):
    pair, spec = started
    model, _ = sides(chains_of(pair)[0])
    with rng_scope(0, "x"), torch.no_grad():
        drawn = model.globals()
    parts = torch.rand(2, 4)
    genes = torch.arange(3)
    whole = model.count_dist(drawn, parts.sum(0, keepdim=True), spec.codes[0], genes)
    pieces = model.count_dist(drawn, parts, spec.codes[0], genes)
    k = torch.arange(60.0)[:, None, None]
    one, two = (pieces.log_prob(k.expand(60, 2, 3)).exp()[:, i] for i in (0, 1))
    for g in range(3):
        together = np.convolve(one[:, g].detach(), two[:, g].detach())[:60]
        np.testing.assert_allclose(together, whole.log_prob(k.expand(60, 1, 3)).exp()[:, 0, g].detach(), atol=1e-5)


def test_draws_are_joint_over_genes(data, started):
    """Two genes of one metagene go up and down together from draw to draw; the draw does not depend on the blocks of genes and locations."""
    pair, spec = started
    config = settings()
    _, guide = sides(chains_of(pair)[0])
    with torch.no_grad():
        saved = {k: v.clone() for k, v in guide.state_dict().items()}
        guide.depth_log_sd.fill_(-0.5)
    predictor = xfuse.Predictor(pair, data, config, spec)
    drawn = draw_globals(chains_of(pair), 60, 0)
    values = []
    for d, one in enumerate(drawn):
        batch = next(predictor.blocks(5))
        with torch.no_grad(), rng_scope(0, "local", 0, d):
            pieces = [predictor.count_dist(batch, 0, one, predictor.local(batch, 0), torch.tensor([g])).mean for g in (0, 1)]
        values.append(torch.cat(pieces, 1)[0])
    values = torch.stack(values).log().numpy()
    assert np.corrcoef(values.T)[0, 1] > 0.8
    whole = predictor.count_dist(batch, 0, one, predictor.local(batch, 0), torch.arange(12)).mean
    torch.testing.assert_close(whole[:, :2].log(), torch.cat(pieces, 1).log())
    guide.load_state_dict(saved)
    rows, counts = next(iter(count_draws(predictor, chains_of(pair), np.arange(4), draws=3, seed=1)))
    assert counts.shape == (3, len(rows), 4)


def test_maps_add_up_to_spots_and_stay_factored(data, started):
    pair, spec = started
    config = settings()
    predictor = xfuse.Predictor(pair, data, config, spec)
    seen = 0
    for draw in xfuse.maps(predictor, np.array([2, 5]), draws=2, seed=0):
        one = data.sections[draw.section]
        assert draw.activity.shape == (4, *one.label.shape) and draw.shape.shape == (4, 2)
        pixels = torch.einsum("mhw,mg->hwg", draw.activity, draw.shape)
        spot = torch.from_numpy(one.label == 3)
        summed = draw.activity[:, spot].sum(1) @ draw.shape
        torch.testing.assert_close(pixels[spot].sum(0), summed)
        seen += 1
    assert seen == 4


def test_the_effect_of_a_location_keeps_the_mean_and_has_one_sd_on_the_root(started):
    model, _ = sides(chains_of(started[0])[0])
    with torch.no_grad(), rng_scope(0, "effects"):
        model = copy.deepcopy(model)
        model.log_nugget.fill_(-10.0)
        model.log_nugget[0] = np.log(0.1)
        summed = torch.tensor([0.25, 1.0, 16.0, 1e-4]).repeat_interleave(20_000)[:, None] * torch.tensor([0.4, 0.3, 0.2, 0.1])
        noisy = model.with_nugget(summed, torch.randn(len(summed), 5))
    total = noisy.sum(1).unflatten(0, (4, -1))
    torch.testing.assert_close(total.mean(1), torch.tensor([0.25, 1.0, 16.0, 1e-4]), rtol=0.04, atol=0.0)
    torch.testing.assert_close(total[:3].sqrt().std(1), torch.full((3,), 0.05), rtol=0.05, atol=0.0)
    assert abs(float(total[3].log().std()) - 1) < 0.02  # where there is next to nothing the effect is bounded


def test_a_new_image_is_predicted_with_more_uncertainty_than_a_known_section(data, started):
    pair, spec = started
    config = settings()
    known = data.sections[0]
    new = known._replace(name="other", covariates=np.array([-1]))
    sds = []
    for one in (known, new):
        predictor = xfuse.Predictor(pair, data._replace(sections=(one,)), config, spec)
        summary, _ = posterior_predictive(predictor, chains_of(pair), np.arange(12), draws=40, seed=0)
        sds.append(np.median(summary.rate_sd / summary.rate_mean))
    assert sds[1] > 1.2 * sds[0]


def test_a_network_that_sees_spots_works_without_them(data):
    config = settings("condition=3", "hide=0.5", "fit.steps=2")
    pair, spec = xfuse.start(data, config, 0, quiet)
    batches = xfuse.batches(data, config, 0)
    seen = [bool(batches.at(step).spots.any()) for step in range(12)]
    assert any(seen) and not all(seen)
    fit(pair, batches, config.fit, scale=1e-3)
    for one in (data.sections[0], section("image", spots=False, code=-1)):
        predictor = xfuse.Predictor(pair, data._replace(sections=(one,)), config, spec)
        local = predictor.local((0, np.zeros(0, np.int64)), 0)
        assert bool(local.tissue.spots.any()) == (one.counts.shape[0] > 0)
        draw = next(xfuse.maps(predictor, np.arange(2), 1, 0))
        assert torch.isfinite(draw.activity).all()


def test_an_image_unlike_the_fit_is_told(data):
    """A blurred and recolored section against the tiles of the fit, after a short training on the image."""
    config = settings("fit.steps=60", "fit.lr=0.03", "fit.lr_groups={}")
    pair, spec = xfuse.start(data, config, 0, quiet)
    fit(pair, xfuse.batches(data, config, 0), config.fit, scale=1e-3)
    known = data.sections[0]
    image = known.image.copy()
    image[:, ::2] = 255  # stripes
    strange = known._replace(image=image, name="stripes")
    reference = xfuse.Predictor(pair, data, config, spec)
    again, new = (xfuse.novelty(xfuse.Predictor(pair, data._replace(sections=(one,)), config, spec), reference, 16)[0] for one in (known, strange))
    assert again.shape == (4, 5)
    assert 0.3 < np.nanmean(again) < 0.7
    assert np.nanmean(new) > 0.9

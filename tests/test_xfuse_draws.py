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
    later = list(predictor.blocks(5))[1]  # of the same section, after the first block
    with torch.no_grad():
        both = torch.cat([predictor.count_dist(part, 0, one, predictor.local(part, 0), torch.arange(12)).mean for part in (batch, later)])
    again = xfuse.Predictor(pair, data, config, spec)
    wide = next(again.blocks(10))
    with torch.no_grad(), rng_scope(0, "local", 0, d):
        whole = again.count_dist(wide, 0, one, again.local(wide, 0), torch.arange(12)).mean
    torch.testing.assert_close(whole, both)
    torch.testing.assert_close(whole[:5, :2], torch.cat(pieces, 1))
    guide.load_state_dict(saved)
    rows, counts = next(iter(count_draws(predictor, chains_of(pair), np.arange(4), draws=3, seed=1)))
    assert counts.shape == (3, len(rows), 4)


def test_measurements_of_the_fit_have_the_effects_that_it_found(data, started):
    """Before, what was exported for loo was given effects from the prior: those that the fit had found changed nothing."""
    (pair, spec), config = copy.deepcopy(started), settings()
    model, guide = sides(chains_of(pair)[0])
    with torch.no_grad():
        model.log_nugget[1:] = -10.0
        guide.location_log_sd.fill_(-10.0)
        guide.location_loc[:, 0] = torch.linspace(-2, 2, len(guide.location_loc))
    predictor, offset = xfuse.Predictor(pair, data, config, spec), 0
    (drawn,) = draw_globals(chains_of(pair), 1, 0)
    for (n, rows), number in zip(predictor.blocks(1000), spec.rows, strict=True):
        local = predictor.local((n, rows), 0)
        with torch.no_grad(), rng_scope(0, "local"):
            mean = predictor.count_dist((n, rows), 0, drawn, local, torch.arange(12)).mean
            law = predictor.measured_dist((n, rows), 0, drawn, local, torch.arange(12))
            summed = predictor._summed((n, rows), 0, drawn, local)[1][: len(rows)].sum(1)
            sd = (model.log_nugget[0].exp() / summed.sqrt()).clamp_max(1.0)
            factor = (sd * guide.location_loc[offset : offset + len(rows), 0] - sd**2 / 2).exp()
        torch.testing.assert_close(law.mean / mean, factor[:, None].expand(-1, 12), rtol=0.01, atol=0.0)
        offset += number


def test_maps_add_up_to_spots_and_stay_factored(data, started):
    pair, spec = started
    config = settings()
    predictor = xfuse.Predictor(pair, data, config, spec)
    seen, drawn = 0, draw_globals(chains_of(pair), 2, 0)
    for draw in xfuse.maps(predictor, np.array([2, 5]), draws=2, seed=0):
        one = data.sections[draw.section]
        assert draw.activity.shape == (4, *one.label.shape) and draw.shape.shape == (4, 2)
        spot = torch.from_numpy(one.label == 3)
        summed = draw.activity[:, spot].sum(1) @ draw.shape * draw.odds.exp()
        alone, third = xfuse.Predictor(pair, data, config, spec), np.flatnonzero(predictor.owners == draw.section)[2:3]
        with torch.no_grad(), rng_scope(0, "maps", draw.section, draw.draw):  # the same latent image
            law = alone.count_dist((draw.section, third), 0, drawn[draw.draw], alone.local((draw.section, third), 0), torch.tensor([2, 5]))
        torch.testing.assert_close(law.mean[0], summed)
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
        model.log_nugget[0], model.log_nugget[1:] = -10.0, np.log(0.4)
        some, sizes = summed[:60_000], (None, torch.full((60_000,), 16.0))
        spread = [(model.with_nugget(some, torch.randn(len(some), 5), size) / some).log().std(0) for size in sizes]
        torch.testing.assert_close(spread[1] / spread[0], torch.full((4,), 0.25), rtol=0.1, atol=0)  # an area of 16 spots is no single spot
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


def test_a_new_section_varies_as_much_as_sections_do(data, started):
    """Two sections vary around their own mean by half of their variance, which is what is learned; a new one by one and a half of it."""
    pair, spec = started
    predictor = xfuse.Predictor(pair, data, settings(), spec)
    (drawn,), local = draw_globals(chains_of(pair), 1, 0), predictor.local(next(iter(predictor.blocks(1000))), 0)
    with torch.no_grad():
        new = torch.stack([predictor._draw(local, 0, drawn)[1]["new_level_0"] / predictor.models[0].scale_of("level_0") for _ in range(40)])
    assert float(new.std()) == pytest.approx(np.sqrt(3), rel=0.1)


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


def test_an_image_unlike_the_fit_is_told_whatever_its_stain_and_the_glass_around_it():
    """A next section and another stain are as the fit is; stripes are not; a section is no novelty to itself, cut out as it may be."""
    fitted = [section("a", size=(160, 192)), section("b", seed=1, size=(160, 192))]
    one, following = fitted[0], section("c", seed=2, size=(160, 192))
    again = xfuse.novelty([one], fitted, 16)[0]
    assert again.shape == (10, 12) and np.nanmedian(again) < 0.4
    (next_one,) = xfuse.novelty([following], fitted, 16)
    assert 0.3 < np.nanmean(next_one) < 0.7
    pale = following._replace(image=(0.5 * following.image + 100).astype(np.uint8))
    assert np.nanmean(np.abs(xfuse.novelty([pale], fitted, 16)[0] - next_one)) < 0.1
    image = following.image.copy()
    image[:, ::2] //= 2
    (stripes,) = xfuse.novelty([following._replace(image=image)], fitted, 16)
    assert np.nanmean(stripes) > 0.9
    glass = np.full((160, 400, 3), 250, np.uint8)
    mask = np.zeros((160, 400), bool)
    glass[:, :192], mask[:, :192] = one.image, one.mask
    wide = one._replace(image=glass, mask=mask, label=np.zeros((160, 400), np.int64))
    (found,) = xfuse.novelty([wide], fitted, 16)
    inside = np.s_[2:, :9]  # off its border, where the glass is seen
    np.testing.assert_allclose(found[inside], again[inside], atol=0.05)
    assert np.isnan(found[:, 13:]).all()
    assert np.isnan(xfuse.novelty([one], [one._replace(mask=np.zeros_like(one.mask))], 16)[0]).all()

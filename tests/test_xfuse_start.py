"""XFuse's data-driven start, and the first steps of a fit from it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from scipy import stats

from ppl_st.config import with_overrides
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import draw_globals, posterior_predictive
from ppl_st.inference.svi import fit
from ppl_st.models import xfuse
from ppl_st.models.xfuse import warm_start
from ppl_st.models.xfuse.closed import Smoother
from ppl_st.models.xfuse.data import Input
from ppl_st.models.xfuse.model import random_waves, sides
from ppl_st.models.xfuse.patches import tissue
from ppl_st.models.xfuse.space import LENGTHS, lattices_over, points_of, spatial_field
from ppl_st.models.xfuse.warm_start import (
    RESIDUAL_CLIP,
    THETA,
    Kernel,
    Spots,
    constant_start,
    data_start,
    fit_kernel,
    fit_odds,
    gather,
    normal_scores,
    residuals,
    without_failed,
)
from ppl_st.prepare.xfuse import problem
from ppl_st.shapes import shapes
from xfuse_sections import SMALL, quiet, settings, start_of, two_sections

data = pytest.fixture(two_sections, scope="module")
started = pytest.fixture(start_of, scope="module")
PLAIN = [*SMALL, "fields=false", "nugget=false", "metagenes=1"]


def test_step_0_is_the_best_gene_wise_constant_model(data):
    config = with_overrides(xfuse.PRESETS["default"], PLAIN)
    pair, spec = xfuse.start(data, config, 0, quiet)
    predictor = xfuse.Predictor(pair, data, config, spec)
    for side in pair:
        side.eval()
    drawn = draw_globals(chains_of(pair), 2, 0)
    genes = torch.arange(12)
    laws = []
    for section_, rows in predictor.blocks(1000):
        local = predictor.local((section_, rows), 0)
        drawn[0]["metagenes"] = torch.zeros_like(drawn[0]["metagenes"])
        for c in ("level_0", "logit_0"):
            drawn[0][c] = torch.zeros_like(drawn[0][c])
        laws.append(predictor.count_dist((section_, rows), 0, drawn[0], local, genes))
    counts = np.vstack([s.counts.toarray()[:-1] for s in data.sections])
    mean = torch.cat([law.mean for law in laws]).detach().numpy()
    # all spots have the same size here: the gene-wise mean in every spot
    np.testing.assert_allclose(mean, np.broadcast_to(counts.mean(0), mean.shape), rtol=0.02)
    # and dispersions of maximum likelihood: no other odds are better
    model, _ = sides(chains_of(pair)[0])
    u = model.odds.detach().numpy()

    def score(u):
        return stats.nbinom.logpmf(counts, counts.mean(0) / np.exp(u), 1 / (1 + np.exp(u))).sum(0)

    assert (score(u) >= np.maximum(score(u - 0.3), score(u + 0.3)) - 1e-6).all()


def test_odds_are_found_again():
    rng = np.random.default_rng(0)
    mean = rng.gamma(3.0, 2.0, (500, 1)) * np.array([[0.3, 1.0, 5.0]])
    u = np.array([-0.5, 0.5, 1.5])
    counts = rng.negative_binomial(mean / np.exp(u), 1 / (1 + np.exp(u)))
    found = fit_odds(sp.csr_matrix(counts), mean[:, :1] / mean[0, 0] * 1.0, mean[:1])
    np.testing.assert_allclose(found, u, atol=0.35)


def test_odds_of_deep_spots_are_as_high_as_their_counts_ask_for():
    """At most 5, they left the intervals of 16 tiles with thousands of reads at .38 of .90."""
    rng = np.random.default_rng(0)
    u = np.array([4.9, 8.0, 2.0])
    mean = np.array([[500.0, 5000.0, 0.01]])
    counts = rng.negative_binomial(np.tile(mean / np.exp(u), (500, 1)), 1 / (1 + np.exp(u)))
    counts[:, 2] = 0
    found = fit_odds(sp.csr_matrix(counts), np.ones((500, 1)), mean)
    np.testing.assert_allclose(found[:2], u[:2], atol=0.35)
    assert found[2] <= 5.5  # without a count the likelihood rises for ever


def test_residuals_keep_what_many_reads_say():
    """A spot in three has a thousand reads of a gene, the others none: cut at 8, it came back as 640, and as 30 where it is absent."""
    counts = np.zeros((300, 4))
    counts[np.arange(300), np.arange(300) % 3] = 1000
    counts[7, 3] = 1  # a rare gene: one read is no reason for a component
    found = residuals(Spots(sp.csr_matrix(counts), *np.zeros((6, 300))))
    mean = np.outer(counts.sum(1) + 1, (counts.sum(0) + 0.5) / (counts.sum() + 2))
    np.testing.assert_allclose((mean + found * np.sqrt(mean + mean**2 / THETA))[:, :3], counts[:, :3], atol=1e-6)
    assert found[7, 3] == RESIDUAL_CLIP < (1 - mean[7, 3]) / np.sqrt(mean[7, 3])


def test_the_start_has_few_reads_where_a_gene_is_absent():
    """Shapes with a marker each, 1,000 reads and more in a spot: floors in shares of depth left 5% of them in the other shapes and beside them."""
    world = shapes(sections=2, size=192, spots="hexagonal")
    config = replace(settings("metagenes=6", "functions=256"), input=Input(**world.settings))
    data, _ = problem(world.slides, config.input, quiet)
    pair, spec = xfuse.start(data, config, 0, quiet)
    for side in pair:
        side.eval()
    rate = posterior_predictive(xfuse.Predictor(pair, data, config, spec), chains_of(pair), np.arange(3), draws=4, seed=0)[0].rate_mean
    counts = np.vstack([one.counts.toarray() for one in data.sections])
    assert rate[counts == 0].mean() < 0.03 * rate[counts > 900].mean()


def test_where_many_spots_are_empty_they_did_not_fail(data):
    spots = gather(data, [tissue(one) for one in data.sections])
    counts = spots.counts.tolil()
    counts[:12] = 0
    said = []
    kept = without_failed(spots._replace(counts=sp.csr_matrix(counts)), said.append)
    assert len(kept.section) == len(spots.section) == 60 and not said


def test_the_closed_form_start_already_separates_the_halves(data, started):
    pair, spec = started
    summary, _ = posterior_predictive(xfuse.Predictor(pair, data, settings(), spec), chains_of(pair), np.arange(12), draws=20, seed=0)
    counts = np.vstack([s.counts.toarray()[:-1] for s in data.sections])
    r = [np.corrcoef(summary.rate_mean[:, g], counts[:, g])[0, 1] for g in range(12)]
    assert np.median(r) > 0.5
    assert summary.rate_mean.mean() == pytest.approx(counts.mean(), rel=0.2)


def test_effects_of_an_unseen_section_are_as_large_as_those_of_the_sections_seen(started):
    model = sides(chains_of(started[0])[0])[0]
    assert model.scale_of("logit_0").max() < 0.11 and 0.1 < model.scale_of("level_0").mean() < 0.4  # these two do not differ


def test_a_spot_that_failed_is_left_out_of_the_start(data):
    """Its depth would be one more value that fields have to follow."""
    counts = data.sections[0].counts.tolil()
    counts[3] = 0
    failed = data._replace(sections=(data.sections[0]._replace(counts=sp.csr_matrix(counts)), *data.sections[1:]))
    said = []
    pair, spec = xfuse.start(failed, settings(), 0, said.append)
    assert any(line.startswith("1 of 60 spots with less than 2% of their section's median counts") for line in said)
    predictor = xfuse.Predictor(pair, failed, settings(), spec)
    rate = posterior_predictive(predictor, chains_of(pair), np.arange(12), draws=20, seed=0)[0].rate_mean.sum(1)
    whole = data.sections[0].counts.toarray().sum(1)[:-1]
    assert 0.8 < rate[3] / whole.mean() < 1.25


def test_lengths_are_those_of_the_columns_that_have_one():
    """Noise and a few extreme values beside two smooth columns; with one noise for all, or as they are, they shortened the lengths."""
    rng = np.random.default_rng(0)
    space, image = rng.uniform(0, 12, (150, 2)), rng.standard_normal((150, 4))
    apart = ((space[:, None] - space) ** 2).sum(-1)
    fields = np.linalg.cholesky(np.exp(-0.5 * apart / 3.0**2) + 1e-6 * np.eye(150)) @ rng.standard_normal((150, 2))
    columns = np.column_stack([fields + 0.3 * rng.standard_normal((150, 2)), rng.standard_normal((150, 6))])
    found = fit_kernel(space, image, columns / columns.std(0))
    assert 2.4 < found.length_space < 3.8


def test_a_few_extreme_spots_do_not_shorten_the_lengths():
    rng = np.random.default_rng(1)
    space, image = rng.uniform(0, 12, (150, 2)), rng.standard_normal((150, 4))
    apart = ((space[:, None] - space) ** 2).sum(-1)
    field = np.linalg.cholesky(np.exp(-0.5 * apart / 3.0**2) + 1e-6 * np.eye(150)) @ rng.standard_normal((150, 2))
    column = np.exp(3 * field + 0.5 * rng.standard_normal((150, 2)))
    found = fit_kernel(space, image, normal_scores(column))
    assert 2.4 < found.length_space < 3.8
    assert fit_kernel(space, image, (column - column.mean(0)) / column.std(0)).length_space < 2.0


def test_the_spatial_field_has_unit_variance_and_the_stated_kernel():
    lattices = lattices_over((0, 0), (70, 60), 5.0)
    where = torch.stack(torch.meshgrid(torch.linspace(10, 50, 9), torch.linspace(10, 45, 8), indexing="ij"), -1)
    basis = spatial_field(lattices, torch.eye(points_of(lattices)), where).flatten(1).T  # [positions, points]
    distance = torch.cdist(where.flatten(0, 1), where.flatten(0, 1))
    short, long = (torch.exp(-0.25 * (distance / (5.0 * length)) ** 2) for length in LENGTHS)
    torch.testing.assert_close(basis @ basis.T, 0.5 * (short + long), atol=0.03, rtol=0)


def test_the_start_is_less_sure_of_shares_where_counts_are_few(data, started):
    """A tenth of the counts leaves wider posteriors of the shares' fields (by a third, over seeds); from smooth shares they were a hundredth."""
    config, spec = settings(), started[1]
    ratios = []
    for seed in range(4):
        few = [s._replace(counts=sp.csr_matrix(np.random.default_rng(seed).binomial(s.counts.toarray().astype(int), 0.1).astype(np.float32)))
               for s in data.sections]  # fmt: skip
        spread = []
        for one in (data, data._replace(sections=tuple(few))):
            tissues = [tissue(section) for section in one.sections]
            torch.manual_seed(seed)
            pair, spots = xfuse.build(config, spec), gather(one, tissues)
            constant_start(pair, spots, tissues, np.random.default_rng(seed))
            data_start(pair, spots, tissues, Kernel(), np.random.default_rng(seed), quiet)
            model, guide = sides(pair)
            sd = (guide.image_weights_log_sd.exp() * model.amplitude[0].exp())[:, 1:]
            spread.append(float(sd.min(0).values.mean().detach()))  # of the direction that the spots say most about
        ratios.append(spread[1] / spread[0])
    assert np.mean(ratios) > 1.2


def closed(data, spec, seed=0):
    """Model and guide of the closed-form start with the same lengths for all data."""
    tissues = [tissue(section) for section in data.sections]
    torch.manual_seed(seed)
    pair, spots = xfuse.build(settings(), spec), gather(data, tissues)
    constant_start(pair, spots, tissues, np.random.default_rng(seed))
    data_start(pair, spots, tissues, Kernel(), np.random.default_rng(seed), quiet)
    return sides(pair)


def recounted(data, seed=0, *, left=1.0, **effects):
    """The sections with Poisson counts, ``left`` times as many in the left half; sds of effects of a spot on its ``scale``, and on its ``share``."""
    rng, sections = np.random.default_rng(seed), []
    high = np.arange(12) < 6
    for one in data.sections:
        beside = one.centers[:-1, :1] < one.label.shape[1] / 2
        scale, share = (effects.get(name, 0.0) * rng.standard_normal(beside.shape) for name in ("scale", "share"))
        mean = np.where(beside == high, 6.0, 1.0) * np.where(beside, left, 1.0) * np.exp(scale + np.where(high, share, -share))
        sections.append(one._replace(counts=sp.csr_matrix(np.vstack([rng.poisson(mean), np.zeros((1, 12))]).astype(np.float32))))
    return data._replace(sections=tuple(sections))


def test_spots_beyond_those_of_the_closed_forms_count_as_much(data, started, monkeypatch):
    """Half of the spots stand for all: for its noise the direction they say most about is as sure (it was log 2 / 2 = .35 less), no effect is 0."""
    spec, gaps, noises = started[1], [], []

    class Spy(Smoother):
        def __call__(self, y):
            found = super().__call__(y)
            noises.append(found.noise[0])
            return found

    monkeypatch.setattr(warm_start, "Smoother", Spy)
    for seed in range(3):
        found = []
        for most in (60, 30):
            monkeypatch.setattr(warm_start, "MOST_SPOTS", most)
            model, guide = closed(recounted(data, 5, left=10.0), spec, seed)
            sure = guide.image_weights_log_sd[:, 1].min() + model.amplitude[0, 1]  # of the first share, whose noise was estimated last
            found.append(float(sure.detach()) - 0.5 * np.log(noises[-1]))
            own = torch.ones(sum(spec.rows), dtype=torch.bool)
            own[torch.tensor(spec.rows).cumsum(0) - 1] = False  # the virtual measurements
            assert bool((guide.location_loc[own, 0] != 0).all()) and not bool(guide.location_loc[~own, 0].any())
        gaps.append(found[1] - found[0])
    assert abs(np.mean(gaps)) < 0.2, gaps


def test_effects_on_the_scale_are_what_counting_does_not_explain(data, started):
    """Sds from counts alone were .15 here, and a mean of the start's effects below 0 took an eighth off the depth."""
    plain, noisy = (closed(recounted(data, scale=sd), started[1]) for sd in (0.0, 0.5))
    sds = [float(model.log_nugget[0].detach().exp()) for model, _ in (plain, noisy)]
    assert sds[0] < 0.11 and sds[1] == pytest.approx(0.5, abs=0.12)
    assert all(float(model.log_nugget[1:].detach().exp().max()) < 0.1 for model, _ in (plain, noisy))  # none of it is of the shares
    effect = noisy[1].location_loc.detach()[:, 0].numpy()
    effect = effect[effect != 0]
    assert abs(effect.mean()) < 0.1 and effect.std() == pytest.approx(1.0, abs=0.15)


def test_dispersion_of_single_genes_is_not_taken_for_effects_of_locations(data, started):
    """Odds of 4 make totals vary five times as much as counting does; effects on the scale as well would say it twice (sd .3)."""
    rng, sections = np.random.default_rng(0), []
    for one in data.sections:
        beside = one.centers[:-1, :1] < one.label.shape[1] / 2
        mean = np.where(beside == (np.arange(12) < 6), 12.0, 2.0)
        counts = rng.negative_binomial(mean / 4, 1 / 5)
        sections.append(one._replace(counts=sp.csr_matrix(np.vstack([counts, np.zeros((1, 12))]).astype(np.float32))))
    model, _ = closed(data._replace(sections=tuple(sections)), started[1])
    assert float(model.log_nugget[0].detach().exp()) < 0.12, model.log_nugget
    assert abs(float(model.odds.detach().mean()) - np.log(4)) < 0.4, model.odds


def test_effects_on_shares_are_what_genes_alone_do_not_explain(data, started):
    plain, (model, guide) = (closed(recounted(data, share=sd), started[1]) for sd in (0.0, 0.8))
    plain, noisy = (one.log_nugget[1:].exp().detach() for one in (plain[0], model))
    assert (plain < 0.25).all() and ((noisy > 0.4) & (noisy < 1.1)).all()  # .1 was what both had
    # Of mean 1 under the guide as under the prior: it was .83 on breast sections, and steps made up for it in the rates, also of hidden spots
    loc, sd = guide.location_loc.detach()[:, 1:], guide.location_log_sd.detach()[:, 1:].exp()
    torch.testing.assert_close(noisy * loc + 0.5 * noisy**2 * (sd**2 - 1), torch.zeros_like(loc))


def test_effects_of_sections_start_with_the_variance_of_those_that_were_seen():
    """Two seen levels of three with effects of sd .5: around their mean they vary by half of their variance."""
    rng, genes = np.random.default_rng(0), 3000
    effects = 0.5 * rng.standard_normal((2, genes))
    counts = sp.csr_matrix(rng.poisson(2000 * np.exp(effects - effects.mean(0))))
    sds = {name: torch.zeros(genes) for name in ("metagenes", "level_0", "logit_0")}
    model = SimpleNamespace(spec=SimpleNamespace(levels=[3], codes=[[0], [2]], genes=genes), log_sd=sds)
    guide = SimpleNamespace(level_0_loc=torch.zeros(3, genes), level_0_log_sd=torch.zeros(3, genes))
    spots = Spots(counts, np.array([0, 1]), *np.zeros((5, 2)))
    warm_start._section_effects(model, guide, spots, np.ones((2, 1)), np.full((1, genes), 2000.0))
    assert float((2 * sds["level_0"]).exp().mean()) == pytest.approx(0.1**2 + 0.5**2 * 0.5, rel=0.1)


# ---- fit ----


def test_one_step_names_every_site_and_trains_every_parameter(data):
    config = settings("condition=0", "fit.steps=2")
    pair, _ = xfuse.start(data, config, 0, quiet)
    batches = xfuse.batches(data, config, 0)
    trace = poutine.trace(chains_of(pair)[0].model).get_trace(batches.at(0))
    names = {name for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert {"z0", "z1", "image", "metagenes", "level_0", "logit_0", "image_weights", "space", "depth", "location"} <= names
    assert any(name.startswith("counts_") for name in names)
    _, info = fit(pair, batches, config.fit, scale=1e-3)
    assert not info.skipped and not info.untrained
    _, again = fit(xfuse.start(data, config, 0, quiet)[0], batches, config.fit, scale=1e-3)
    assert (info.losses == again.losses).all()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_presets_run(data, preset):
    small = ["patch=32", "depth=2", "channels=4", "metagenes=3", "batch_patches=2", "fit.steps=2", "purge_every=1"]
    config = with_overrides(xfuse.PRESETS[preset], small)
    pair, spec = xfuse.start(data, config, 0, quiet)
    _, info = fit(pair, xfuse.batches(data, config, 0), config.fit, scale=1e-3, edit=xfuse.edit(pair, data, config, 0))
    assert np.isfinite(info.losses).all()
    stored = xfuse.spec_from(xfuse.spec_to(spec))
    assert stored == spec
    xfuse.empty(config, stored, data, 1).model.load_state_dict(pair.model.state_dict())


def test_regression_on_fewer_functions_than_rows_is_that_on_their_gram_matrices():
    rng = np.random.default_rng(0)
    space, image, y = rng.standard_normal((60, 20)), rng.standard_normal((60, 12)) @ rng.standard_normal((12, 15)), rng.standard_normal((60, 4))
    y[:, :2] += space[:, :3] @ rng.standard_normal((3, 2))
    wide = [np.linalg.cholesky(part @ part.T + 1e-9 * np.eye(60)) for part in (space, image)]
    few, many = (Smoother(*parts) for parts in ((space, image), wide))
    assert few.few and not many.few
    few, many = few(y), many(y)
    for name in ("fitted", "parts", "noise"):
        np.testing.assert_allclose(getattr(few, name), getattr(many, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(space.T @ few.dual[0], space.T @ many.dual[0], rtol=1e-3, atol=1e-3)


def test_functions_of_the_image_are_means_over_the_pixels_of_a_spot():
    data = two_sections()
    tissues = [tissue(one) for one in data.sections]
    model, spots = xfuse.sides(xfuse.build(settings(), xfuse._spec(data, {}, [None, None], 0.0, 2.0, 1.0, 1.0)))[0], gather(data, tissues)
    image, (first, *_) = warm_start.basis(model, spots, tissues)[1], np.flatnonzero(spots.section == 1)
    inside = tissues[1].features[:-1, tissues[1].label == spots.row[first] + 1]
    mean = torch.cos(inside.T @ model.frequency + model.phase).mean(0) * np.sqrt(2 / model.config.functions)
    np.testing.assert_allclose(image[first], mean, atol=1e-5)
    assert np.abs(image[first] - np.cos(spots.features[first] @ model.frequency.numpy() + model.phase.numpy()) * np.sqrt(2 / 32)).max() > 0.01


def test_spots_that_failed_teach_the_steps_nothing():
    """They kept an effect near 0 and pulled fields and rates down."""
    data = two_sections()
    counts = data.sections[0].counts.toarray()
    counts[4] = 0
    data = data._replace(sections=(data.sections[0]._replace(counts=sp.csr_matrix(counts)), data.sections[1]))
    first = xfuse.batches(data, settings(), 0).tissues[0]
    assert not (first.label == 5).any() and (data.sections[0].label == 5).any() and set(np.unique(first.label)) == set(range(len(counts) + 1)) - {5}


def test_the_basis_is_made_in_blocks_of_columns(monkeypatch):
    data = two_sections()
    spec = xfuse._spec(data, {}, [None, None], 0.0, 0.6, 1.0, 1.0)  # short lengths: many points
    model = xfuse.sides(xfuse.build(settings(), spec))[0]
    tissues = [tissue(one) for one in data.sections]
    spots, points = gather(data, tissues), sum(map(points_of, spec.lattices))
    monkeypatch.setattr(warm_start, "COLUMNS", points)
    whole = warm_start.basis(model, spots, tissues)[0]
    widths = []

    def spy(lattices, weights, where):
        widths.append(weights.shape[1])
        return spatial_field(lattices, weights, where)

    monkeypatch.setattr(warm_start, "COLUMNS", 100)
    monkeypatch.setattr(warm_start, "spatial_field", spy)
    np.testing.assert_allclose(warm_start.basis(model, spots, tissues)[0], whole, atol=1e-6)
    assert max(widths) == 100 and sum(widths) == points == whole.shape[1] and (whole != 0).any(0).all()


def test_random_waves_have_their_covariance_with_fewer_functions():
    """The covariance of 256 functions of 15 inputs is nearer to the stated one than that of 384 with independent frequencies; variance exactly 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 15, generator=generator) * 0.35
    exact = torch.exp(-0.5 * torch.cdist(x, x).square())

    def error(frequency, phase):
        basis = torch.cos(x @ frequency + phase) * (2 / len(phase)) ** 0.5
        return (basis @ basis.T - exact).square().mean().sqrt(), basis.square().sum(1)

    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = [error(*random_waves(15, 256)) for _ in range(5)]
        independent = [error(torch.randn(15, 384), 2 * torch.pi * torch.rand(384))[0] for _ in range(5)]
        assert random_waves(15, 5)[0].shape == (15, 5) and random_waves(15, 1)[1].shape == (1,)
    assert sum(one for one, _ in ours) < sum(independent)
    torch.testing.assert_close(ours[0][1], torch.ones(200))

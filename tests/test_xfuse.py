"""XFuse's pair: aggregation, unbiased patches, data-driven start, metagenes, joint draws."""

import copy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from scipy import stats
from torch.nn import functional as F

from ppl_st.config import with_overrides
from ppl_st.count_likelihoods import SharedOddsNegativeBinomial
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import count_draws, draw_globals, posterior_predictive
from ppl_st.inference.svi import fit, rng_scope
from ppl_st.models import xfuse
from ppl_st.models.xfuse.data import Data, Section
from ppl_st.models.xfuse.metagenes import contributions, drop, shares, split
from ppl_st.models.xfuse.model import Lattice, sides, spatial_field
from ppl_st.models.xfuse.patches import Batches, aggregate, blocks_around, inclusion, starts, tissue
from ppl_st.models.xfuse.warm_start import fit_odds

SMALL = ["patch=48", "metagenes=4", "functions=32", "depth=2", "channels=4", "fit.steps=4"]
PLAIN = [*SMALL, "fields=false", "nugget=false", "metagenes=1"]


def section(name="a", *, seed=0, size=(64, 80), genes=12, code=0, virtual=True, spots=True):
    """Spots on a grid over an image whose right half is darker and expresses other genes."""
    rng = np.random.default_rng(seed)
    height, width = size
    image = rng.integers(110, 170, (height, width, 3)).astype(np.uint8)
    image[:, width // 2 :] //= 2
    mask = np.ones(size, bool)
    mask[:6] = False
    label, centers = np.zeros(size, np.int64), []
    rows, columns = np.mgrid[:height, :width] + 0.5
    for y in range(14, height - 5, 11) if spots else []:
        for x in range(7, width - 5, 11):
            centers.append((x, y))
            label[(rows - y) ** 2 + (columns - x) ** 2 <= 16] = len(centers)
    where = np.array(centers, float).reshape(-1, 2)
    high = np.arange(genes) < genes // 2
    mean = np.where((where[:, :1] < width / 2) == high, 6.0, 1.0)
    counts = rng.negative_binomial(mean, 0.5)
    off = -1
    if virtual and spots:
        off = len(counts)
        label[:5] = off + 1
        counts = np.vstack([counts, np.zeros((1, genes), int)])
        where = np.vstack([where, [np.nan, np.nan]])
    matrix = sp.csr_matrix(counts.astype(np.float32).reshape(-1, genes))
    return Section(name, image, label, matrix, off, mask, where, 4.0, np.array([code]), None)


def data_of(*sections, levels=("a", "b")):
    genes = np.array([f"g{i}" for i in range(sections[0].counts.shape[1])])
    return Data(sections, genes, {"section": levels})


@pytest.fixture(scope="module")
def data():
    return data_of(section(), section("b", seed=1, size=(70, 66), code=1))


def settings(*overrides):
    return with_overrides(xfuse.PRESETS["default"], [*SMALL, *overrides])


def quiet(line):
    pass


@pytest.fixture(scope="module")
def started(data):
    pair, spec = xfuse.start(data, settings(), 0, quiet)
    for side in pair:
        side.eval()
    return pair, spec


# ---- aggregation ----


def test_eq_12_equals_the_sum_over_pixels_of_the_full_rates():
    rng = np.random.default_rng(0)
    label = torch.from_numpy(rng.integers(0, 4, 60))  # 0: no location
    activity = torch.from_numpy(rng.gamma(1.0, size=(60, 3)))
    loadings = torch.from_numpy(rng.gamma(1.0, size=(3, 5)))
    pixels = activity @ loadings  # [pixels, G]
    direct = torch.stack([pixels[label == k].sum(0) for k in (1, 2, 3)])
    summed = aggregate(activity, torch.where(label == 0, 3, label - 1), 3)
    torch.testing.assert_close(summed @ loadings, direct)


def test_ids_beyond_what_a_float32_can_tell_apart(data):
    number = 2**24 + 3
    location = torch.tensor([number - 1, number - 2, number - 2, number - 3])
    out = aggregate(torch.tensor([[1.0], [2.0], [4.0], [8.0]]), location, number)
    assert out[-3:, 0].tolist() == [8.0, 6.0, 1.0] and float(out.sum()) == 15.0
    # and the way from labels to rows: two neighbors that float32 would merge
    one = data.sections[0]
    far = one._replace(label=np.where(one.label == 1, one.label.max(), np.where(one.label == one.label.max(), 1, one.label)))
    assert tissue(far).label.dtype == torch.int64


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


# ---- patches ----


def test_inclusion_probabilities_by_enumeration():
    for length, side in ((30, 12), (12, 12), (31, 7)):
        p = starts(length, side)
        assert p.sum() == pytest.approx(1)
        low, high = (a.ravel() for a in np.mgrid[:length, :length])
        low, high = low[high >= low], high[high >= low]
        direct = [sum(p[y] for y in range(len(p)) if y <= a and b < y + side) for a, b in zip(low, high, strict=True)]
        np.testing.assert_allclose(inclusion(length, side, low, high), direct, atol=1e-12)


@pytest.mark.parametrize("augment", ["none", "dihedral"])
def test_sums_over_patches_are_unbiased(data, augment, monkeypatch):
    """Over all windows: spots wholly inside with their weights, and the virtual measurement's pixels with theirs, give the sums over the data."""
    monkeypatch.setattr("ppl_st.models.xfuse.patches.THIN", 1)  # every one of them, so that no chance is left
    batches = Batches([tissue(one) for one in data.sections], 44, 1, augment, 0)
    rng = np.random.default_rng(0)
    total = torch.zeros(3)
    for n, one in enumerate(data.sections):
        share = batches.section.count(n) / len(batches.section)
        for y, py in enumerate(starts(one.label.shape[0], 44)):
            for x, px in enumerate(starts(one.label.shape[1], 44)):
                batch = batches.of([n], [(y, x)], rng)
                counts = torch.cat([g.counts.to_dense() for g in batch.groups]) if batch.groups else torch.zeros(0, 12)
                spots = batch.rows >= 0
                pixels = float(batch.pixel_weight[~spots[batch.location]].sum()) * float(batch.weight[~spots].sum())
                now = torch.tensor([float((batch.weight * counts.sum(1)).sum()), float(batch.weight[spots].sum()), pixels])
                total += share * py * px * now
    wanted = [
        sum(float(s.counts.sum()) for s in data.sections),
        sum(s.counts.shape[0] - 1 for s in data.sections),
        sum(int((s.label == s.virtual + 1).sum()) for s in data.sections),
    ]
    np.testing.assert_allclose(total.numpy(), wanted, rtol=1e-4)


def test_thinned_pixels_of_the_virtual_measurement_weigh_as_much_as_all_of_them(data):
    batches = Batches([tissue(one) for one in data.sections], 30, 1, "none", 0)
    rng = np.random.default_rng(0)
    drawn = [batches.of([0], [(0, 10)], rng) for _ in range(200)]
    off = [batch.pixel_weight[batch.rows[batch.location] < 0] for batch in drawn]
    every = (1 / (inclusion(64, 30, np.arange(5), np.arange(5))[:, None] * inclusion(80, 30, np.arange(10, 40), np.arange(10, 40)))).sum()
    sums = np.array([float(weight.sum()) for weight in off])
    assert abs(sums.mean() - every) < 4 * sums.std() / np.sqrt(len(sums))
    assert np.mean([len(weight) for weight in off]) == pytest.approx(150 / 8, rel=0.1)
    assert all(set(batch.location.tolist()) <= set(range(len(batch.rows))) for batch in drawn)


def test_pixels_lie_between_blocks_as_in_an_interpolated_image():
    features, where = torch.rand(2, 3, 4, 4), torch.rand(2, 4, 4, 2)
    pixels = torch.randperm(98)[:40].sort()[0]  # of two patches of 7 x 7
    found = blocks_around(pixels, 7, features, where, [5, 9])
    between = torch.einsum("nc,ncf->nf", found.share, found.features[found.corner])
    whole = F.interpolate(features, scale_factor=2, mode="bilinear")[..., :7, :7].permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(between, whole[pixels])
    assert [part[0] for part in found.parts] == [5, 9] and found.parts[1][2] == len(found.where)
    first = found.parts[0][2]
    assert set(found.where[:first, 0].tolist()) <= set(where[0, ..., 0].flatten().tolist())


def test_locations_at_the_border_of_a_patch_are_left_out_but_the_virtual_one(data, monkeypatch):
    monkeypatch.setattr("ppl_st.models.xfuse.patches.THIN", 1)
    batches = Batches([tissue(one) for one in data.sections], 30, 1, "none", 0)
    one = data.sections[0]
    batch = batches.of([0], [(0, 10)], np.random.default_rng(0))
    window = one.label[:30, 10:40]
    whole = [k - 1 for k in np.unique(window) if k and (window == k).sum() == (one.label == k).sum()]
    cut = [k - 1 for k in np.unique(window) if k and k - 1 not in whole and k - 1 != one.virtual]
    assert whole and cut
    assert sorted(batch.rows.tolist()) == sorted([*whole, -1])
    assert (window == one.virtual + 1).sum() == (len(batch.location) - sum((one.label == k + 1).sum() for k in whole))


def test_a_batch_is_a_function_of_its_step_and_turns_change_no_sum(data, monkeypatch):
    monkeypatch.setattr("ppl_st.models.xfuse.patches.THIN", 1)
    tissues = [tissue(one) for one in data.sections]
    first, again = (Batches(tissues, 48, 2, "dihedral", 3).at(7) for _ in range(2))
    assert torch.equal(first.image, again.image) and torch.equal(first.location, again.location)
    # the turned patch holds the same pixels: those of each location average to the same color and position
    for augment in ("none", "dihedral"):
        batch = Batches(tissues, 30, 1, augment, 0).of([0], [(20, 10)], np.random.default_rng(5))
        flat = batch.image[0].flatten(1).T[batch.pixels]
        means = aggregate(flat, batch.location, len(batch.rows)) / aggregate(torch.ones(len(flat), 1), batch.location, len(batch.rows))
        if augment == "none":
            wanted = means
    torch.testing.assert_close(means, wanted)


def test_a_measurement_that_fits_in_no_patch_is_refused(data):
    with pytest.raises(UserError, match="patch=6"):
        Batches([tissue(one) for one in data.sections], 6, 1, "none", 0)


# ---- start ----


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


def test_the_closed_form_start_already_separates_the_halves(data, started):
    pair, spec = started
    summary, _ = posterior_predictive(xfuse.Predictor(pair, data, settings(), spec), chains_of(pair), np.arange(12), draws=20, seed=0)
    counts = np.vstack([s.counts.toarray()[:-1] for s in data.sections])
    r = [np.corrcoef(summary.rate_mean[:, g], counts[:, g])[0, 1] for g in range(12)]
    assert np.median(r) > 0.5
    assert summary.rate_mean.mean() == pytest.approx(counts.mean(), rel=0.2)


def test_the_spatial_field_has_unit_variance_and_the_stated_kernel():
    lattice = Lattice(-5.0, -5.0, 5.0, 14, 16)
    where = torch.stack(torch.meshgrid(torch.linspace(10, 50, 9), torch.linspace(10, 45, 8), indexing="ij"), -1)
    basis = spatial_field(lattice, torch.eye(lattice.points), where).flatten(1).T  # [positions, points]
    distance = torch.cdist(where.flatten(0, 1), where.flatten(0, 1))
    torch.testing.assert_close(basis @ basis.T, torch.exp(-0.5 * distance**2 / 50.0), atol=0.03, rtol=0)


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


# ---- metagenes ----


def rates(pair, data, config, spec):
    """Mean rates at the guide's locations with the same latent image."""
    model, guide = sides(chains_of(pair)[0])
    predictor = xfuse.Predictor(pair, data, config, spec)
    drawn = {name: guide.posterior(name)[0] for name in model.priors()}
    out = []
    for n in range(len(data.sections)):
        local = predictor.local((n, np.zeros(0, np.int64)), 0)
        local = local._replace(latents=[(loc, torch.zeros_like(loc)) for loc, _ in local.latents])
        with torch.no_grad():
            activity, full = predictor._draw(local, 0, drawn)
            shape, odds = model.loadings(full, local.codes)
        out.append((activity.flatten(1).T @ shape) * odds.exp())
    return torch.cat(out)


def test_a_split_changes_no_prediction(data):
    config = settings("metagenes=6")
    pair, spec = xfuse.start(data, config, 0, quiet)
    for side in pair:
        side.eval()
    model, _ = sides(chains_of(pair)[0])
    model.active[4:] = False
    torch.nn.init.normal_(model.expression[-1].weight, std=0.1)
    before = rates(pair, data, config, spec)
    split(chains_of(pair)[0], 1, 4)
    split(chains_of(pair)[0], 1, 5)  # and a half of it again
    after = rates(pair, data, config, spec)
    assert model.active.sum() == 6
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6 * float(before.max()))


def test_a_split_is_exact_in_double_precision(data):
    """Scale and summed activity of every gene are those from before, to 1e-6: what single precision shows is rounding."""
    pair, _ = xfuse.start(data, settings("metagenes=6"), 0, quiet)
    chain = copy.deepcopy(chains_of(pair)[0])
    model, guide = sides(chain)
    model.active[5:] = False
    torch.nn.init.normal_(model.expression[-1].weight, std=0.1)
    batch = xfuse.batches(data, settings(), 0).at(0)
    model.double()
    guide.double()

    def rates():
        drawn = {name: guide.posterior(name)[0] for name in model.priors()}
        blocks = batch.blocks
        table = model.fields(drawn, blocks.features.double(), blocks.where.double(), blocks.parts, model.spec.lattices)
        hidden = torch.linspace(-1, 1, 4, dtype=torch.float64).expand(len(table), 4)
        shape, _ = model.loadings(drawn, model.spec.codes[0])
        return model.activity(hidden, table) @ shape

    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            before = rates()
            split(chain, 1, 5)
            after = rates()
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.active.all()
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_ablations_come_from_one_decode_and_equal_a_model_without_the_metagene(data, monkeypatch):
    config = settings("nugget=false")
    pair, _ = xfuse.start(data, config, 0, quiet)
    chain = chains_of(pair)[0]
    model, _ = sides(chain)
    batches = xfuse.batches(data, config, 0)
    monkeypatch.setattr("ppl_st.models.xfuse.metagenes.EVALUATED", 1e9)  # every location for each of them
    monkeypatch.setattr("ppl_st.models.xfuse.metagenes._divergences", lambda model, guide: 0.0)
    decodes = []
    decode = type(model).decode
    monkeypatch.setattr(type(model), "decode", lambda self, *args: decodes.append(1) or decode(self, *args))
    gain = contributions(chain, batches, range(1), 1, 0)
    assert len(decodes) == 1

    def likelihood():
        for side in chain:
            side.eval()
        with torch.no_grad(), rng_scope(0, "purge", 0, 0):
            drawn = chain.guide.globals()
            batch = batches.at(0)
            activity = model.decoded(drawn, batch, chain.guide.latents(batch.image, batch.spots))
            summed, total = aggregate(activity, batch.location, len(batch.weight)), 0.0
            for group in batch.groups:
                rows = slice(group.start, group.stop)
                shape, odds = model.loadings(drawn, model.spec.codes[group.section])
                law = SharedOddsNegativeBinomial(summed[rows] @ shape, odds)
                total += float((law.log_prob(group.counts.to_dense()).sum(1) * batch.weight[rows]).sum())
        return total

    whole = likelihood()
    original = type(model).activity
    for m in range(4):  # the same globals, m taken out before the softmax

        def without(self, features, fields, m=m):
            active = self.active.clone()
            self.active[m] = False
            try:
                return original(self, features, fields)
            finally:
                self.active.copy_(active)

        monkeypatch.setattr(type(model), "activity", without)
        assert likelihood() - whole == pytest.approx(float(gain[m]), rel=1e-3, abs=0.05)
        monkeypatch.setattr(type(model), "activity", original)


def test_never_both_halves_of_a_split_nor_the_last_metagene_are_dropped(started):
    pair, _ = started
    model, _ = sides(chains_of(pair)[0])
    saved = model.active.clone(), model.partner.clone()
    model.partner.copy_(torch.tensor([1, 0, -1, -1]))
    assert drop(model, torch.tensor([3.0, 2.0, 1.0, -5.0])) == [0, 2]
    assert drop(model, torch.tensor([3.0, -2.0, -1.0, -5.0])) == [0]
    model.active.copy_(torch.tensor([True, False, False, False]))
    assert drop(model, torch.tensor([3.0, -torch.inf, -torch.inf, -torch.inf])) == []
    model.active.copy_(saved[0]), model.partner.copy_(saved[1])


# ---- prediction ----


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


def test_the_start_is_less_sure_of_shares_where_counts_are_few(data, started):
    """A tenth of the counts leaves wider posteriors of the shares' fields; from smooth shares alone they were a hundredth, and no wider."""
    few = [s._replace(counts=sp.csr_matrix(np.random.default_rng(0).binomial(s.counts.toarray().astype(int), 0.1).astype(np.float32)))
           for s in data.sections]  # fmt: skip
    config = settings()
    thin, _ = xfuse.start(data._replace(sections=tuple(few)), config, 0, quiet)
    spread = []
    for pair in (started[0], thin):
        model, guide = sides(chains_of(pair)[0])
        sd = (guide.image_weights_log_sd.exp() * model.amplitude[0].exp())[:, 1:]
        spread.append(float(sd.min(0).values.mean().detach()))  # of the direction that the spots say most about
    assert spread[1] > 1.2 * spread[0]


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


def test_shares_and_quantities(data, started):
    pair, spec = started
    config = settings()
    total = shares(chains_of(pair)[0], xfuse.batches(data, config, 0), range(2), 0)
    assert float(total.sum()) == pytest.approx(1)
    obsm, obs = xfuse.quantities(pair, data, config, spec)
    n = sum(s.counts.shape[0] - 1 for s in data.sections)
    assert obsm["metagenes"].shape == (n, 4) and obs["scale"].shape == (n,)
    np.testing.assert_allclose(obsm["metagenes"].sum(1), 1, rtol=1e-4)


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


# ---- slow: the number of metagenes ----


def planted(programs=3, genes=60, seed=0):
    """Bands of color, each with an expression program of its own."""
    rng = np.random.default_rng(seed)
    height, width = 88, 132
    band = np.minimum(np.arange(width) * programs // width, programs - 1)
    colors = np.array([[200, 120, 120], [120, 200, 120], [120, 120, 200]])
    image = np.clip(colors[band][None] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    profile = np.full((programs, genes), 0.3)
    for k in range(programs):
        profile[k, k * genes // programs : (k + 1) * genes // programs] = 3.0
    profile *= 3 * rng.gamma(4.0, 0.25, genes)
    label, centers, means = np.zeros((height, width), np.int64), [], []
    rows, columns = np.mgrid[:height, :width] + 0.5
    for y in range(6, height - 4, 9):
        for x in range(6, width - 4, 9):
            centers.append((x, y))
            disc = (rows - y) ** 2 + (columns - x) ** 2 <= 12
            label[disc] = len(centers)
            share = np.bincount(np.broadcast_to(band, disc.shape)[disc], minlength=programs) / disc.sum()
            means.append(share @ profile)
    counts = sp.csr_matrix(rng.negative_binomial(np.array(means) / 0.5, 1 / 1.5).astype(np.float32))
    one = Section(
        "p", image, label, counts, -1, np.ones(label.shape, bool), np.array(centers, float), 3.5, np.zeros(0, np.int64), None
    )  # fmt: skip
    return Data((one,), np.array([f"g{i}" for i in range(genes)]), {})


@pytest.mark.slow
@pytest.mark.parametrize(("selection", "steps"), [("split", 600), ("ard", 400)])
def test_the_planted_number_of_metagenes_is_found(selection, steps):
    data = planted()
    sets = [
        "patch=80", "depth=1", "channels=2", "image_weight=0.1", "functions=48", "metagenes=8", f"selection={selection}", "purge_every=100",
        f"fit.steps={steps}", "fit.lr=0.03", "fit.lr_groups={}", "batch_patches=1",
    ]  # fmt: skip
    config = with_overrides(xfuse.PRESETS["default"], sets)
    pair, _ = xfuse.start(data, config, 0, quiet)
    batches = xfuse.batches(data, config, 0)
    fit(pair, batches, config.fit, scale=1 / data.sections[0].counts.shape[0] / 60, edit=xfuse.edit(pair, data, config, 0))
    used = shares(chains_of(pair)[0], batches, range(3), 0)
    assert int((used > 0.02).sum()) == 3
    if selection == "split":
        assert int(sides(chains_of(pair)[0])[0].active.sum()) == 3

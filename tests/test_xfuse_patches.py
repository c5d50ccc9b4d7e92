"""XFuse's aggregation and patches: sums over pixels and over windows are the sums over the data."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.nn import functional as F

from ppl_st.errors import UserError
from ppl_st.models.xfuse import _tissue, batches
from ppl_st.models.xfuse.patches import Batches, aggregate, blocks_around, color_of, inclusion, starts, tissue
from xfuse_sections import section, settings, two_sections

data = pytest.fixture(two_sections, scope="module")


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
    # and labels are whole numbers of 64 bits on all of the way to them
    seen = tissue(data.sections[0])
    assert seen.label.dtype == torch.int64 and np.array_equal(seen.label.numpy(), data.sections[0].label)
    batch = Batches([seen], 30, 1, "none", 0).at(0)
    assert batch.location.dtype == batch.rows.dtype == torch.int64


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
    batches = Batches([tissue(one) for one in data.sections], 56, 1, augment, 0)
    rng = np.random.default_rng(0)
    total = torch.zeros(3)
    for n, one in enumerate(data.sections):
        share = batches.section.count(n) / len(batches.section)
        for y, py in enumerate(starts(one.label.shape[0], 56)):
            for x, px in enumerate(starts(one.label.shape[1], 56)):
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
        blocks = batch.blocks
        flat = torch.cat([batch.image[0].flatten(1).T[batch.pixels], (blocks.share[..., None] * blocks.where[blocks.corner]).sum(1)], 1)
        means = aggregate(flat, batch.location, len(batch.rows)) / aggregate(torch.ones(len(flat), 1), batch.location, len(batch.rows))
        if augment == "none":
            wanted = means
    torch.testing.assert_close(means, wanted)


@pytest.mark.parametrize("augment", ["none", "affine"])
def test_images_become_floats_patch_by_patch(data, augment, monkeypatch):
    """The image stays in bytes, and what the networks see is bit by bit what one array of floats would give."""
    one = data.sections[0]
    seen = tissue(one)
    pixels = one.image.astype(np.float32)
    first, last = pixels.min((0, 1)), pixels.max((0, 1))
    whole = torch.from_numpy(np.moveaxis(0.9 * (2 * (pixels - first) / np.maximum(last - first, 1.0) - 1), 2, 0).copy())
    assert seen.image.dtype == torch.uint8 and torch.equal(seen.scaled(seen.image), whole)
    for found, wanted in zip(color_of([seen, seen]), (whole.double().mean((1, 2)), whole.double().std((1, 2), correction=0)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    batch = Batches([seen], 30, 1, augment, 0).of([0], [(3, 7)], np.random.default_rng(0))
    if augment == "none":
        assert torch.equal(batch.image[0], whole[:, 3:33, 7:37])
    monkeypatch.setattr(type(seen), "scaled", lambda self, part: part)
    other = Batches([seen._replace(image=whole)], 30, 1, augment, 0).of([0], [(3, 7)], np.random.default_rng(0))
    assert torch.equal(batch.image, other.image)


def test_a_section_takes_little_more_memory_than_its_features():
    import tracemalloc

    one = section(size=(300, 400), spots=False)
    tracemalloc.start()
    seen = tissue(one)
    peak = tracemalloc.get_traced_memory()[1] / one.mask.size
    tracemalloc.stop()
    assert seen.features.shape == (16, 300, 400) and peak < 64 + 50, f"{peak:.0f} bytes per pixel"
    assert tissue(one, fields=False).features.shape == (1, 300, 400)  # what no field sees is not kept


def test_a_measurement_that_fits_in_no_patch_is_refused(data):
    with pytest.raises(UserError, match="patch=6"):
        Batches([tissue(one) for one in data.sections], 6, 1, "none", 0)


@pytest.mark.parametrize("spots", [True, False])
def test_what_is_asked_for_changes_nothing_that_the_networks_and_fields_see(spots):
    one = section(spots=spots)  # without spots: a new image
    everywhere = one.at(np.ones_like(one.label), np.array([[40.0, 32.0]]))
    again = everywhere.at(np.zeros_like(one.label), np.zeros((0, 2)))
    scores = np.arange(one.counts.shape[0], dtype=np.float32)[:, None]
    fit = tissue(one, scores)
    assert bool(fit.features[-1].any()) and bool(fit.spots.any()) == spots
    for asked in (everywhere, again):
        seen = tissue(asked, scores)
        assert torch.equal(seen.features, fit.features) and torch.equal(seen.spots, fit.spots)
        assert len(seen.size) == asked.counts.shape[0] and seen.virtual == -1


def test_a_background_that_is_no_measurement_is_not_known_to_be_empty(data):
    """Fields took e^10 off the scale there, in fits that were told to know nothing of it, and in what they predict of new images."""
    for settings_, known in ((settings(), True), (settings("input.background=false"), False)):
        seen = [batches(data, settings_, 0).tissues[0], _tissue(section(spots=False), None, settings_)]
        assert [bool(one.features[-1].any()) for one in seen] == [known, known]


def test_spots_that_the_published_augmentation_cuts_are_not_scored():
    """A turned window shows what lies around it, and what its border cuts is left out: before, spots at its old edges were scored with a part."""
    rows, columns = np.mgrid[:240, :240] + 0.5
    label = np.zeros((240, 240), np.int64)
    centers = [(x, y) for y in range(14, 230, 26) for x in range(14, 230, 26)]
    for k, (x, y) in enumerate(centers):
        label[(rows - y) ** 2 + (columns - x) ** 2 <= 11**2] = k + 1
    counts = sp.csr_matrix(np.ones((len(centers), 12), np.float32))
    one = section(size=(240, 240))._replace(label=label, counts=counts, virtual=-1, centers=np.array(centers, float), mask=np.ones_like(label, bool))
    seen = tissue(one)
    batches, kept, black = Batches([seen], 120, 1, "affine", 0), [], []
    for step in range(20):
        batch = batches.at(step)
        number = np.bincount(batch.location.numpy(), minlength=len(batch.rows))
        kept.append(number / seen.size[batch.rows.numpy()])
        middle = batches.of([0], [(60, 60)], np.random.default_rng(step)).image
        black.append(float((middle == middle[0, :, :1, :1]).all(1).float().mean()))
    assert min(share.min() for share in kept) > 0.88  # a scale of .95 leaves .90 of an area, whole pixels a little less
    assert np.mean([len(share) for share in kept]) > 5
    assert max(black) < 0.01  # a window inside the section has no empty corners

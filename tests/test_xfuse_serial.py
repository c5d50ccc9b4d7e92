"""Serial sections: one is laid over another by their images, and what is known of one says much of the other."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.ndimage import gaussian_filter, map_coordinates

from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import posterior_predictive
from ppl_st.models import xfuse
from ppl_st.models.xfuse import model, serial, warm_start
from ppl_st.models.xfuse.data import Section
from ppl_st.models.xfuse.model import sides
from ppl_st.models.xfuse.patches import tissue
from ppl_st.models.xfuse.space import points_of
from xfuse_sections import data_of, quiet, settings

PITCH, SIDE, GENES, PROGRAMS = 10.0, 200, 40, 4


def smooth(rng, sd, side=SIDE):
    """A field of unit variance on the tissue."""
    field = gaussian_filter(rng.standard_normal((side, side)), sd, mode="wrap")
    return (field - field.mean()) / field.std()


class Block:
    """A block of tissue: outline, stain that has nothing to do with the expression, programs; sections of it are cut at any angle."""

    def __init__(self, seed):
        self.rng = np.random.default_rng([seed, 5])
        rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
        angle, radius = np.arctan2(rows, columns), np.hypot(rows, columns)
        outline = 66 + 9 * np.cos(angle + 1) + 7 * np.cos(2 * angle + self.rng.uniform(0, 6)) + 5 * np.cos(3 * angle + self.rng.uniform(0, 6))
        self.inside = (radius < outline).astype(float)
        self.stain = [smooth(self.rng, sd) for sd in (3, 6, 12)]
        self.programs = [smooth(self.rng, 18) for _ in range(PROGRAMS)]
        self.loadings = self.rng.gamma(0.3, size=(PROGRAMS, GENES)) + 0.02
        self.loadings /= self.loadings.sum(1, keepdims=True)

    def cut(self, name, turn, shift, *, rho=1.0, code=0, pitch=PITCH, left=SIDE):
        """A section with pixels (x, y) at turn @ (x, y) + shift of the block, the programs correlated with its by rho; the first ``left`` columns."""
        rng = self.rng
        columns, rows = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
        x, y = np.tensordot(turn, np.stack([columns, rows]), 1) + np.reshape(shift, (2, 1, 1))

        def at(field):
            return map_coordinates(field, [y - 0.5, x - 0.5], order=1)

        mask = at(self.inside) > 0.5
        grey = sum(np.exp(-k) * at(field) for k, field in enumerate(self.stain)) + 0.5 * rng.standard_normal((SIDE, SIDE))
        image = np.where(mask, np.clip(150 + 25 * grey, 60, 215), 240).astype(np.uint8)
        image = np.repeat(image[..., None], 3, 2)
        field = np.stack([rho * at(f) + np.sqrt(1 - rho**2) * smooth(rng, 18) for f in self.programs], -1)
        share = np.exp(1.5 * field) / np.exp(1.5 * field).sum(-1, keepdims=True)
        label, where, means = np.zeros((SIDE, SIDE), np.int64), [], []
        for row in np.arange(pitch, SIDE - pitch / 2, pitch):
            for column in np.arange(pitch, left - pitch / 2, pitch):
                disc = (rows - row) ** 2 + (columns - column) ** 2 <= (0.3 * pitch) ** 2
                if mask[disc].all():
                    where.append((column, row))
                    label[disc] = len(where)
                    means.append(400 * share[disc].mean(0) @ self.loadings)
        truth, some = rng.poisson(means), np.s_[:, :left]
        kept = sp.csr_matrix(np.asarray(truth, np.float32))
        section = Section(name, image[some], label[some], kept, -1, mask[some], np.array(where), 0.3 * pitch, np.array([code]), None)
        return section._replace(pitch=pitch), truth, np.array(where)


def frame_of(angle, mirror, shift):
    """A turn about the middle, mirrored or not, and its shift."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([mirror, 1.0])
    return turn, SIDE / 2 - turn @ np.full(2, SIDE / 2) + np.array(shift)


def options(*more):
    return settings("functions=64", "patch=64", "fit.steps=1", "fit.lr=1e-9", "image_weight=0", "input.covariates=[]", *more)


@pytest.mark.parametrize(("angle", "mirror", "shift"), [(0.0, 1, (0, 0)), (0.7, 1, (12, -8)), (2.5, -1, (-6, 15)), (4.1, 1, (3, 3))])
def test_sections_are_laid_over_each_other(angle, mirror, shift):
    block, (turn, moved) = Block(0), frame_of(angle, mirror, shift)
    first, second = block.cut("a", np.eye(2), np.zeros(2))[0], block.cut("b", turn, moved)[0]
    said = []
    free, ties = serial.tied([first, second], [tissue(first), tissue(second)], said.append)
    assert ties[0] is None and list(free) == [0] and len(said) == 1 and "b lies over a" in said[0]
    assert ties[1].section == 0 and ties[1].share >= 0.9
    points = torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) * 120 + 40
    error = ties[1].moved(points).numpy() - (points.numpy() @ turn.T + moved)
    assert np.abs(error).max() < 0.25 * PITCH


def test_an_overlay_is_not_held_by_the_points_of_the_lattice():
    """A copy without its first rows and columns: the shift is theirs, whether or not it is a whole number of the lattice's steps."""
    whole = Block(0).cut("a", np.eye(2), np.zeros(2))[0]
    first, off = serial.planes_of(whole, tissue(whole)), []
    for k in range(1, 5):
        part = whole._replace(image=whole.image[k:, k:], label=whole.label[k:, k:], mask=whole.mask[k:, k:], centers=whole.centers - k)
        tie = serial.tie_of(serial.planes_of(part, tissue(part)), {0: first})
        off.append(float(np.abs(tie.moved(torch.tensor([[60.0, 60.0], [120.0, 90.0]])).numpy() - k - [[60, 60], [120, 90]]).max()))
    assert max(off) < 0.06 * PITCH, off


def test_unlike_and_empty_sections_are_not_tied():
    """The best of all overlays of two unrelated images of similar outlines; and images in which there is nothing to see."""
    cuts = [Block(seed).cut("a", np.eye(2), np.zeros(2))[0] for seed in range(6)]
    planes = [serial.planes_of(one, tissue(one)) for one in cuts]
    assert all(serial.tie_of(planes[k], {0: planes[n]}) is None for k in range(6) for n in range(k))
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    small = [one._replace(mask=np.hypot(rows, columns) < 2.5 * PITCH) for one in cuts]
    small = [serial.planes_of(one._replace(image=np.where(one.mask[..., None], one.image, 240)), tissue(one)) for one in small]
    assert all(serial.tie_of(small[k], {0: small[n]}) is None for k in range(6) for n in range(k))
    blank = cuts[0]._replace(image=np.full_like(cuts[0].image, 200), mask=np.ones_like(cuts[0].mask))
    empty = blank._replace(mask=np.zeros_like(blank.mask))
    for other in (blank, empty):
        assert serial.tie_of(serial.planes_of(other, tissue(other)), {0: planes[0], 1: serial.planes_of(other, tissue(other))}) is None


def test_fields_of_tied_sections_have_unit_variance_and_correlate():
    block, (turn, moved) = Block(1), frame_of(0.5, 1, (5, -4))
    data = data_of(block.cut("a", np.eye(2), np.zeros(2))[0], block.cut("b", turn, moved)[0])
    tissues = [tissue(one) for one in data.sections]
    tie = serial.Tie(0, 0.8, (turn[0, 0], turn[0, 1], moved[0], turn[1, 0], turn[1, 1], moved[1]))
    spec = xfuse._spec(data, {}, [None, tie], 0.0, 2.0, 1.0, 1.0)
    one, spots = sides(xfuse.build(options(), spec))[0], warm_start.gather(data, tissues)
    space = warm_start.basis(one, spots, tissues)[0]
    gram = space @ space.T
    np.testing.assert_allclose(np.diag(gram), 1.0, atol=0.03)
    second = spots.section == 1
    place = torch.from_numpy(spots.xy[second]).float()
    lattices = spec.lattices[0]
    there = warm_start.spatial_field(lattices, torch.eye(points_of(lattices)), tie.moved(place)[:, None])[..., 0].T.numpy()
    here = space[~second][:, : points_of(lattices)]
    np.testing.assert_allclose(gram[np.ix_(second, ~second)], 0.8 * there @ here.T, atol=1e-5)
    # and the model's own evaluation is these functions
    drawn = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in one.priors().items()}
    with torch.no_grad():
        one.amplitude[0] = -6.0
        parts = [(1, 0, len(place))]
        found = one.fields(drawn, torch.zeros(len(place), 16), place, parts, spec)[:, 0]
        flat = one.fields(drawn | {"space": 0 * drawn["space"]}, torch.zeros(len(place), 16), place, parts, spec)[:, 0]
    np.testing.assert_allclose((found - flat).numpy(), space[second] @ drawn["space"][:, 0].numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def worlds():
    """Of two blocks: a section that is fitted, and a second one of which only the image is known, with its counts."""
    found = []
    for seed in range(2):
        block, (turn, moved) = Block(seed), frame_of(0.6 + seed, 1 - 2 * seed, (8, -5))
        first = block.cut("a", np.eye(2), np.zeros(2))[0]
        second, truth, where = block.cut("b", turn, moved, rho=0.95)
        found.append((first, second, truth, where))
    return found


def predicted(worlds, *more):
    """Correlation of means with counts by gene, coverage of 90% intervals, and CRPS, of the second sections."""
    pcc, cover, crps = [], [], []
    for first, second, truth, _ in worlds:
        config = options(*more)
        data = data_of(first, levels=())._replace(covariates={})
        pair, spec = xfuse.start(data, config, 0, quiet)
        for side in pair:
            side.eval()
        looked = data._replace(sections=(second._replace(counts=sp.csr_matrix(second.counts.shape, dtype=np.float32)),))
        stored = xfuse.spec_from(json.loads(json.dumps(xfuse.spec_to(spec))))
        assert stored == spec
        predictor = xfuse.Predictor(pair, looked, config, stored)
        over = xfuse.lies_over(predictor, 0)
        assert over is None if more else over[0] == "a" and over[1] > 0.8
        frequent = np.argsort(-truth.sum(0))[:15]
        own = sp.csr_matrix(truth[:, frequent].astype(np.float32))
        result, scores = posterior_predictive(predictor, chains_of(pair), frequent, draws=40, seed=0, truth=own)
        pcc += [np.corrcoef(result.rate_mean[:, g], truth[:, gene])[0, 1] for g, gene in enumerate(frequent)]
        inside = np.minimum(scores.pit_high, 0.95) - np.maximum(scores.pit_low, 0.05)
        cover.append(np.mean(np.clip(inside, 0, None) / np.maximum(scores.pit_high - scores.pit_low, 1e-9)))
        crps.append(scores.crps.mean())
    return np.mean(pcc), np.mean(cover), np.mean(crps)


def test_an_image_alone_is_predicted_by_the_section_that_it_lies_over(worlds, monkeypatch):
    """Its stain says nothing of its expression here, so without the tie there is nothing to predict; with it, intervals hold what they say."""
    monkeypatch.setattr(model, "UNSEEN", 0.02)  # both sections are equally deep here
    pcc, cover, crps = predicted(worlds)
    alone, _, crps_alone = predicted(worlds, "serial=false")
    assert pcc > 0.6 and abs(alone) < 0.15
    assert crps < 0.8 * crps_alone
    assert 0.85 < cover < 0.95


@pytest.mark.parametrize(("rho", "pitch", "low", "high"), [(0.0, PITCH, 0.0, 0.4), (0.95, PITCH, 0.8, 0.99), (0.95, 7.0, 0.8, 0.99)])
def test_spots_say_how_much_of_the_images_correlation_holds_for_them(rho, pitch, low, high):
    """Both sections show the same stain; their programs are the same, or have nothing to do with each other. Their pixels may differ in size."""
    block, (turn, moved) = Block(2), frame_of(1.1, 1, (4, 4))
    moved = moved + (1 - PITCH / pitch) * turn @ np.full(2, SIDE / 2)
    turn = turn * PITCH / pitch
    second = block.cut("b", turn, moved, rho=rho, pitch=pitch)[0]
    data = data_of(block.cut("a", np.eye(2), np.zeros(2))[0], second, levels=())._replace(covariates={})
    spec = xfuse.start(data, options(), 0, quiet)[1]
    assert low <= spec.ties[1].share <= high
    by_images = serial.tied(data.sections, [tissue(one) for one in data.sections], quiet)[1][1]
    assert spec.ties[1].share == pytest.approx(by_images.shifted(spec.shift).share)


def test_a_tie_ends_where_the_other_section_does():
    """Beyond the other's crop a field is the section's own, of unit variance: the value at the border says nothing there."""
    block = Block(3)
    data = data_of(block.cut("a", np.eye(2), np.zeros(2), left=80)[0], block.cut("b", np.eye(2), np.zeros(2))[0])
    spec = xfuse._spec(data, {}, [None, serial.Tie(0, 0.9, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))], 0.0, 2.0, 1.0, 1.0)
    spec = spec._replace(lattices=[xfuse.lattices_over((0, 0), (80, SIDE), spec.lattices[0][0].step), spec.lattices[1]])  # as of a new section
    one, tissues = sides(xfuse.build(options(), spec))[0], [tissue(each) for each in data.sections]
    spots = warm_start.gather(data, tissues)
    space = warm_start.basis(one, spots, tissues)[0]
    inside, beyond = (spots.section == 1) & (spots.xy[:, 0] < 80), (spots.section == 1) & (spots.xy[:, 0] > 80 + 4 * spec.lattices[0][0].step)
    assert beyond.sum() > 10
    np.testing.assert_allclose((space[beyond] ** 2).sum(1), 1.0, atol=0.05)
    points = points_of(spec.lattices[0])
    assert (space[beyond, :points] ** 2).sum(1).max() < 0.01 and (space[inside, :points] ** 2).sum(1).min() > 0.7

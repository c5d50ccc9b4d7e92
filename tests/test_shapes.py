"""The synthetic sections: what they promise."""

import numpy as np
import pytest

from ppl_st.errors import UserError
from ppl_st.models.xfuse.data import Input
from ppl_st.prepare.xfuse import problem
from ppl_st.shapes import KINDS, shapes


def mean_by_label(world, section, data):
    """Expected counts of every spot of the label map the model gets."""
    rate, label = world.rate(section), data.sections[section].label.ravel()
    rows = data.sections[section].counts.shape[0] + 1
    return np.stack([np.bincount(label, rate[..., g].ravel(), rows) for g in range(rate.shape[2])], 1)[1:]


def test_sections_repeat_and_the_first_ones_do_not_depend_on_their_number():
    one, three = shapes(seed=3, sections=1), shapes(seed=3, sections=3)
    assert (one.sections[0].image == three.sections[0].image).all() and (one.sections[0].adata.X != three.sections[0].adata.X).nnz == 0
    assert (three.sections[0].kind != three.sections[1].kind).any() and (shapes(seed=4).sections[0].kind != one.sections[0].kind).any()


@pytest.mark.parametrize("spots", ["tiles", "hexagonal"])
def test_counts_are_the_emission_of_the_pixels_of_a_spot(spots):
    world = shapes(seed=1, sections=2, spots=spots)
    data, _ = problem(world.slides, Input(**world.settings), lambda line: None)
    for n, section in enumerate(data.sections):
        assert section.image.shape == (384, 384, 3) and section.scale == 1 and section.origin == (0, 0)
        mean, counts = mean_by_label(world, n, data), section.counts.toarray()
        order = [list(data.genes).index(f"{kind}_marker") for kind in KINDS[:3]]
        counts = counts[:, order]
        assert (counts[mean == 0] == 0).all()
        deviation = (counts - mean)[mean > 0] / np.sqrt(mean[mean > 0])
        assert abs(deviation.mean()) < 4 / np.sqrt(deviation.size) and 0.6 < deviation.var() < 1.5
    assert (np.bincount(data.sections[0].label.ravel())[1:] == (96**2 if spots == "tiles" else 137)).all() or spots == "hexagonal"


def test_kinds_differ_in_color_or_only_in_form():
    world, same = shapes(seed=0, sections=3), shapes(seed=0, sections=3, color="same")
    for one, other in zip(world.sections, same.sections, strict=True):
        assert (one.kind == other.kind).all() and set(np.unique(one.kind)) <= {0, 1, 2, 3}
        colors = [one.image[one.kind == k].mean(0) for k in np.unique(one.kind)]
        assert min(np.abs(a - b).max() for i, a in enumerate(colors) for b in colors[:i]) > 60
        shown = [other.image[other.kind == k].mean(0) for k in np.unique(other.kind) if k]
        assert max(np.abs(a - b).max() for a in shown for b in shown) < 3
    share = np.mean([one.kind > 0 for one in world.sections])
    assert 0.1 < share < 0.6


def test_shapes_keep_their_distance():
    from scipy.ndimage import binary_dilation, label

    kind = shapes(seed=5).sections[0].kind
    pieces, number = label(kind > 0, np.ones((3, 3)))
    assert number > 8
    for k in range(1, number + 1):
        near = binary_dilation(pieces == k, np.ones((3, 3)), iterations=2)
        assert set(np.unique(pieces[near])) == {0, k}


def test_harder_variants_do_what_they_say():
    plain = shapes(seed=2, spots="hexagonal")
    moved = shapes(seed=2, spots="hexagonal", misalignment=2.0)
    assert (plain.sections[0].adata.obsm["spatial"] == moved.sections[0].adata.obsm["spatial"]).all()
    assert (plain.sections[0].kind == moved.sections[0].kind).all()
    far = np.abs(plain.sections[0].adata.X - moved.sections[0].adata.X).sum() / plain.sections[0].adata.X.sum()
    assert far > 0.1
    hidden = shapes(seed=2, occlusion=0.2).sections[0].hidden
    assert 0.12 < hidden.mean() < 0.28 and not plain.sections[0].hidden.any()
    two = shapes(seed=2, sections=4, batches=2, genes=40, kinds=5)
    assert [one.adata.obs["batch"].iloc[0] for one in two.sections] == ["batch0", "batch1", "batch0", "batch1"]
    assert two.profiles.shape == (5, 40) and np.allclose(two.profiles.sum(1), 10)
    data, _ = problem(two.slides, Input(**two.settings), lambda line: None)
    assert data.covariates == {"batch": ("batch0", "batch1")}
    depth = shapes(seed=2, depth_sd=0.5).sections[0].depth
    assert np.log(depth).std() == pytest.approx(0.5) and (plain.sections[0].depth == 1).all()


@pytest.mark.parametrize("wrong", [{"kinds": 6}, {"genes": 2}, {"spots": "grid"}, {"color": "none"}, {"size": 40}])
def test_what_cannot_be_simulated_is_said(wrong):
    with pytest.raises(UserError, match="cannot be simulated"):
        shapes(**wrong)

"""SpaIM's levels of unmeasured genes: shares with their variance, gains without a bias, intervals that cover."""

import numpy as np
import pytest

import ppl_st
from ppl_st.data import read_counts
from ppl_st.inference.ensemble import chains_of
from ppl_st.models.common.cells import log_shares
from ppl_st.models.common.inner import level_prior
from ppl_st.simulate import spatial_field
from spaim_problems import small_world

world = pytest.fixture(small_world, scope="module")


def test_shares_have_the_sampling_variance_that_resampling_the_cells_shows(world):
    counts = read_counts(world.reference, role="reference", need_spatial=False).matrix
    share, variance = log_shares(counts, np.arange(36))
    rng = np.random.default_rng(0)
    again = np.stack([log_shares(counts[rng.integers(counts.shape[0], size=counts.shape[0])], np.arange(36))[0] for _ in range(300)])
    many = np.asarray(counts.sum(0)).ravel() > 50
    np.testing.assert_allclose(again.var(0)[many], variance[many], rtol=0.45)
    assert np.abs(again.mean(0) - share)[many].max() < 0.1
    assert (variance > 0).all() and variance[np.asarray(counts.sum(0)).ravel() == 0].min(initial=2.0) >= 2.0


def test_level_prior_finds_agreement_gain_and_its_own_doubt():
    rng = np.random.default_rng(0)
    z, doubt = rng.normal(0, 1.5, 400), np.where(np.arange(400) % 2, 0.01, 0.5)
    seen = z + np.sqrt(doubt) * rng.standard_normal(400)
    keep = 1.5**2 / (1.5**2 + doubt)
    y = 0.3 + 0.8 * z + 0.4 * rng.standard_normal(400)
    (a, b, s), (aa, _, bb) = level_prior(y, np.full(400, 1e-4), keep * seen, keep * doubt)
    assert abs(a - 0.3) < 4 * np.sqrt(aa) and abs(b - 0.8) < 4 * np.sqrt(bb) and s == pytest.approx(0.4, abs=0.06)
    few, wide = level_prior(y[:3], np.full(3, 1e-4), 0.01 * z[:3], np.zeros(3))
    assert few[1] == pytest.approx(1, abs=0.1) and wide[2] > 10 * bb  # nothing to learn b from: the platforms agree, more or less


@pytest.mark.slow
def test_inner_genes_teach_levels_without_a_bias():
    """Levels are per count of *all* shared genes, although a fold of them is hidden from every inner fit."""
    world = spatial_field(seed=2, n_cells=400, n_reference=800, n_genes=50, n_panel=40, platform_sd=0.0, spatial=0.0)
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8"], seed=0)
    a, b, _ = run.spec.hyper.gain
    center = run.spec.hyper.center
    typical = run.data.log_share[run.data.panel].mean()
    assert abs(a + b * (typical - center) - typical) < 0.1  # no gain was simulated; log(4 / 3) is what a hidden quarter would add
    predicted = run.predict(world.truth.var_names, draws=5)
    counts = chains_of(run.pair)[0].guide.counts
    index = [list(run.genes).index(g) for g in predicted.var_names]
    level = (counts.log_gain_loc + 0.5 * counts.log_gain_scale.square())[index].exp().numpy()
    total = np.asarray(predicted.layers["rate_mean"], dtype=np.float64).sum(0) / run.data.totals.sum()
    np.testing.assert_allclose(total, level, rtol=1e-3)  # whatever its map and slope, a gene's rates add up to its level


@pytest.fixture(scope="module")
def shallow():
    """Panel: the genes that the reference shows best; 40 shallow reference cells know little of the levels of the others."""
    parts = []
    for seed in (1, 2):
        world = spatial_field(seed=seed, n_cells=400, n_reference=40, n_genes=121, n_panel=1, platform_sd=0.2, rho=20, depth_reference=200, theta=50)
        truth = world.truth
        seen = np.asarray(world.reference[:, truth.var_names].X.sum(0)).ravel()
        order = truth.var_names[np.argsort(-seen, kind="stable")]
        parts.append((truth[:, order[:60]].copy(), world.reference[:, truth.var_names].copy(), truth[:, order[60:]].copy()))
    return parts


@pytest.mark.parametrize(("overrides", "low", "high"), [([], 0.85, 0.97), (["reference_errors=false"], 0.5, 0.82), (["gain=none"], 0.3, 0.88)])
def test_levels_are_covered_unless_gains_or_reference_errors_are_ignored(shallow, overrides, low, high):
    """90% intervals of the total of a gene over the tissue, and of its counts in cells."""
    inside, covered = [], []
    for target, reference, truth in shallow:
        run = ppl_st.fit("spaim", target=target, reference=reference, overrides=["clusters=6", *overrides], seed=0)
        counts = chains_of(run.pair)[0].guide.counts
        index = [list(run.genes).index(g) for g in truth.var_names]
        level = np.log((np.asarray(truth.X.sum(0)).ravel() + 0.5) / run.data.totals.sum())
        z = (level - counts.log_gain_loc[index].numpy()) / counts.log_gain_scale[index].numpy()
        inside.append((np.abs(z) < 1.645).mean())
        covered.append(run.predict(truth.var_names, draws=50, truth=truth).var["coverage_90"].mean())
    assert low < np.mean(inside) < high, (inside, covered)
    assert overrides or 0.87 < np.mean(covered) < 0.94, covered


def test_levels_hold_with_a_panel_too_small_to_hold_genes_out():
    """Eight shared genes: a gene's share in the reference is its level here, and not its root (the rarest fifth came out 6.8 times too high)."""
    world = spatial_field(seed=2, n_cells=200, n_reference=250, n_genes=48, n_panel=8, platform_sd=0.0)
    run = ppl_st.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=6"], seed=0)
    hidden = run.genes[~run.measured]
    predicted = run.predict(hidden, draws=20).to_df().sum().to_numpy()
    truth = np.asarray(world.truth[:, hidden].X.sum(0)).ravel()
    off = np.log(predicted[truth > 20] / truth[truth > 20])
    rare = truth[truth > 20] < np.quantile(truth[truth > 20], 0.3)
    assert abs(np.median(off[rare])) < 0.5 and abs(np.median(off)) < 0.5, (np.median(off[rare]), np.median(off))

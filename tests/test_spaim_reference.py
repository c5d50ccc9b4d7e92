"""What SpaIM learns from the reference: profiles of clusters, own shares of genes, and its regression where it is like the target."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.models.spaim import kernel
from ppl_st.models.spaim.model import choose
from ppl_st.models.spaim.regression import Regression, own_share
from ppl_st.prepare.spaim import cluster_profiles, leiden, problem
from ppl_st.simulate import spatial_field
from spaim_problems import SMALL, data_of, pose, small_world

world = pytest.fixture(small_world, scope="module")
data = pytest.fixture(data_of, scope="module")


# ---- profiles ----


def test_profiles_have_their_standard_errors_and_medians():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], [400, 100])
    values = rng.normal(3, 1, (500, 4)).astype(np.float32)
    mean, error = cluster_profiles(sp.csr_matrix(values), codes, "mean")
    np.testing.assert_allclose(mean[:, 0], values[:400].mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, np.array([[0.05, 0.1]] * 4), rtol=0.3)
    median, wider = cluster_profiles(sp.csr_matrix(values), codes, "median")
    np.testing.assert_allclose(median[:, 1], np.median(values[400:], 0), rtol=1e-5)
    assert (wider > error).all()


def test_clusters_by_label_by_number_and_by_resolution(world):
    counts = read_counts(world.reference, role="reference", need_spatial=False).matrix
    codes = leiden(counts, 9, None, 0)
    assert abs(codes.max() + 1 - 9) <= 2 and (np.diff(np.bincount(codes)) <= 0).all()
    np.testing.assert_array_equal(codes, leiden(counts, 9, None, 0))
    assert leiden(counts, 9, 0.1, 0).max() < leiden(counts, 9, 3.0, 0).max()
    labelled, _, reference = pose(world, replace(SMALL, cluster_key="type"))
    assert labelled.profiles.shape[1] == world.reference.obs["type"].nunique() and "spaim_cluster" not in reference.obs
    with pytest.raises(UserError, match="no obs column 'kind'"):
        pose(world, replace(SMALL, cluster_key="kind"))
    with pytest.raises(UserError, match=r"one cluster and at least two are needed; set resolution 0\.001, which has to be larger"):
        pose(world, replace(SMALL, resolution=0.001))  # it was fitted, and could not be loaded


# ---- its regression ----


def factors(n, genes, seed=0, sd=1.0):
    """Standardised cells [n, genes] with five factors and noise of very different size by gene."""
    rng = np.random.default_rng(7)
    loadings, noise = rng.standard_normal((5, genes)), rng.uniform(0.3, 3.0, genes)
    draw = np.random.default_rng(seed)
    z = draw.standard_normal((n, 5)) @ loadings + sd * noise * draw.standard_normal((n, genes))
    scale = np.sqrt(np.square(loadings).sum(0) + np.square(sd * noise))
    return (z - z.mean(0)) / z.std(0), loadings / scale, np.square(sd * noise / scale)


@pytest.mark.parametrize(("n", "q"), [(4000, 60), (4000, 20), (50, 40)])
def test_own_share_is_what_the_other_genes_do_not_know(n, q):
    """Also from some of the directions only, and with fewer cells than genes."""
    z, loadings, noise = factors(n, 60)
    values, vectors = np.linalg.eigh(z.T @ z / n)
    own = own_share((vectors * np.sqrt(values.clip(0))).T[::-1][:q], n)
    cov = loadings.T @ loadings + np.diag(noise)
    truth = 1 / np.diag(np.linalg.inv(cov))
    exact = n > 60 and q == 60
    assert np.corrcoef(own, truth)[0, 1] > (0.95 if exact else 0.7)
    assert np.abs(own - truth).mean() < (0.06 if exact else 0.2)


def test_loadings_without_their_own_share_are_those_of_a_gene_that_was_not_measured():
    """The regression of one half of the cells predicts loadings in the other: signs of weak directions included."""
    z, _, _ = factors(6000, 60)
    other, _, _ = factors(6000, 60, seed=1)
    values, vectors = np.linalg.eigh(z.T @ z / len(z))
    raw = (vectors * np.sqrt(values)).T[::-1]
    strength = np.square(raw).sum(1)[:, None]
    weak = strength[:, 0] < np.median(strength)
    q = np.linalg.inv(other.T @ other / len(other))
    predicted = raw - raw @ q / np.diag(q)
    found = raw * (1 - own_share(raw, len(z)) / strength)
    assert np.corrcoef(predicted[weak].ravel(), found[weak].ravel())[0, 1] > 0.8
    assert np.corrcoef(predicted[weak].ravel(), raw[weak].ravel())[0, 1] < 0


def test_the_regression_is_that_of_the_reference_and_leaves_a_panel_gene_out(data):
    panel, genes = data.panel[::-1].copy(), np.concatenate([data.panel[:3], np.setdiff1d(np.arange(60), data.panel)[:2]])
    teacher = Regression(kernel.GeneKernel(data, 0.5), np.sort(panel), panel)
    c = kernel.GeneKernel(data, 0.5).correlation(np.arange(60), np.arange(60))
    penalty = np.linalg.eigvalsh(np.linalg.inv(teacher.inverse))[0] - np.linalg.eigvalsh(c[np.ix_(data.panel, data.panel)])[0]
    scores = np.random.default_rng(0).standard_normal((4, len(panel)))
    found = teacher.of(scores, genes)
    for j, gene in enumerate(genes):
        others = panel[panel != gene]
        slopes = np.linalg.solve(c[np.ix_(others, others)] + penalty * np.eye(len(others)), c[others, gene])
        np.testing.assert_allclose(found[:, j], scores[:, panel != gene] @ slopes, atol=1e-5)


@pytest.mark.parametrize(("shuffled", "low", "high"), [(False, 0.75, 1.0), (True, 0.0, 0.25)])
def test_the_regression_counts_where_reference_and_target_are_alike(shuffled, low, high):
    """The reference is the other half of the same cells; or their genes carry each other's names."""
    world = spatial_field(seed=5, n_cells=3000, n_reference=50, n_genes=60, n_panel=59, spatial=0.0, theta=50, rho=20)
    other = world.target[1500:].copy()
    if shuffled:
        other.var_names = np.random.default_rng(0).permutation(other.var_names)
    posed = problem(read_counts(world.target[:1500].copy(), role="target"), read_counts(other, role="reference"), SMALL, lambda line: None)[0]
    assert low <= choose(posed, SMALL, 0)[1] <= high

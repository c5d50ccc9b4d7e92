"""SIID's regional effect: the conjugate posterior, used where it helps, blind to spots without cells."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import ppl_st.api as api
from ppl_st.models.siid import hyper as siid_hyper
from ppl_st.models.siid.regional import regional_posterior
from ppl_st.simulate import checkerboard
from seeded import own_seed
from siid_problems import FAST, KNOBS, tiny

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


def test_regional_effect_is_the_conjugate_posterior_and_ignores_uncovered_spots():
    rng = np.random.default_rng(0)
    spots, cells = rng.uniform(0, 4, (12, 2)), rng.uniform(0, 4, (5, 2))
    counts = sp.csr_matrix(rng.poisson(3, (12, 2)).astype(np.float32))
    expected = rng.gamma(2, 1, (12, 2)).astype(np.float32)
    expected[[1, 4]] = 0  # no cell there
    shape, rate = regional_posterior(cells, spots, counts, expected, 0.6, 3.0)
    for i in range(5):
        distance = np.linalg.norm(spots - cells[i], axis=1)
        weight = np.exp(-(distance**2) / (2 * 0.6**2)) * (np.argsort(np.argsort(distance)) < 7)
        weight[[1, 4]] = 0
        np.testing.assert_allclose(shape[i], 3 + weight @ counts.toarray(), rtol=1e-5)
        np.testing.assert_allclose(rate[i], 3 + weight @ expected, rtol=1e-5)


@pytest.mark.parametrize("uncovered", [0, 30])
def test_regional_effect_is_used_where_it_helps_cells(uncovered):
    """Cells that follow the field of their spots need the effect; cells that do not are better off without."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(12.0), np.arange(12.0)), -1).reshape(-1, 2)
    field = np.exp(0.7 * np.sin(xy[:, :1] / 2 + np.arange(20)))
    field /= field.mean(0)
    far = np.c_[12 + np.arange(uncovered) % 3, np.arange(uncovered) // 3]
    spot_counts = np.r_[rng.poisson(5.0 * field), np.full((uncovered, 20), 40)]
    expected = np.r_[np.full((144, 20), 5.0), np.zeros((uncovered, 20))].astype(np.float32)
    spot = rng.integers(144, size=600)
    data = tiny()._replace(
        cell_xy=xy[spot] + rng.uniform(-0.4, 0.4, (600, 2)),
        spot_xy=np.r_[xy, far],
        spot_counts=sp.csr_matrix(spot_counts.astype(np.float32)),
    )
    for follows in (True, False):
        counts = sp.csr_matrix(rng.poisson(field[spot] if follows else field[rng.permutation(spot)]).astype(np.float32))
        rows, genes = np.arange(600), np.arange(20)
        chosen = siid_hyper._choose_regional(data, rows, genes, torch.ones(600, 20), expected, counts)
        assert (chosen[0] > 0) == follows


def test_cells_on_half_of_the_slide():
    """Spots that hold no cell must not reach the regional effect: levels at the border were 1.4 times too high."""
    sim = checkerboard(seed=1, **(KNOBS | {"n_cells": 600, "side": 10, "squares": 10, "rho": 2.0}))
    half = sim.target.obsm["spatial"][:, 0] < 500
    border = sim.target.obsm["spatial"][half, 0] > 420
    near = sim.reference.obsm["spatial"][:, 0] < 500
    truth = sim.truth.X[half].toarray()[border].sum()
    bandwidths = []
    for reference in (sim.reference, sim.reference[near].copy()):
        target, settings = sim.target[half].copy(), [*FAST, "radius=70"]
        run = api.fit("siid", target=target, reference=reference, overrides=settings, seed=3)
        level = run.predict(sim.truth.var_names, draws=20).X[border].sum() / truth
        assert 0.8 < level < 1.2, level
        bandwidths.append(run.spec.hyper.bandwidth)
    assert bandwidths[0] == bandwidths[1]

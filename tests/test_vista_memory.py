"""VISTA on many cells: what is summed over blocks is what all cells at once give, and nothing dense grows with the cells."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.inference.ensemble import chains_of
from ppl_st.models import vista
from ppl_st.models.vista import closed
from ppl_st.models.vista.batches import Batches, Data
from ppl_st.prepare.vista import problem
from ppl_st.simulate import spatial_field

P, G, SIDE = 40, 60, 70


@pytest.fixture(scope="module")
def data():
    """Faint cells of both sides; those of the target on a grid, stored in any order, with four neighbors each but one that has none."""
    rng = np.random.default_rng(0)
    n = SIDE**2
    loads = rng.normal(0, 0.7, (4, G))

    def counts(genes, batch):
        return sp.csr_matrix(rng.poisson(np.exp(rng.normal(0, 1, (n, 4)) @ loads[:, :genes] - 3 + 0.5 * batch[:, None])).astype(np.float32))

    place = rng.permutation(n).reshape(SIDE, SIDE)
    pairs = np.concatenate([np.stack([place, np.roll(place, shift, axis)], -1).reshape(-1, 2) for shift in (1, -1) for axis in (0, 1)])
    pairs = pairs[pairs[:, 0] != 7]
    graph = sp.csr_matrix((np.ones(len(pairs), np.float32), tuple(pairs.T)), shape=(n, n))
    one, two = np.zeros(n, np.int64), np.arange(n) % 2
    return Data(
        counts(P, one), sp.csr_matrix((n, 0), dtype=np.float32), counts(G, two), np.arange(P), np.zeros((n, 0), np.float32), graph, one, two,
        np.arange(G), np.ones(n),
    )  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in (("ROWS", 128), ("ENTRIES", 2**13), ("CELLS", 64)):
        monkeypatch.setattr(closed, name, value)


def peak(work):
    """Bytes that ``work`` has at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_reference_is_summed_over_blocks(data, small_blocks, monkeypatch):
    mine, w = closed.moments(data.counts, data.batch), np.random.default_rng(1).dirichlet(np.ones(SIDE**2))
    many = closed.weights(data, mine, True, np.random.default_rng(0))
    moments = closed.second_moments(data, w, np.arange(10, G))

    def z(x):
        return (x - w @ x) / np.sqrt(w @ (x - w @ x) ** 2)

    panel = sp.csr_matrix(data.reference[:, :P])
    totals = closed.totals_of(panel)
    x = z(closed.standardise(panel, data.reference_batch, closed.moments(panel, data.reference_batch)))
    y = z(closed.log_normalised(data.reference[:, 10:], totals, float(np.median(totals))))
    np.testing.assert_allclose(moments.gram, (x * w[:, None]).T @ x, atol=1e-12)
    np.testing.assert_allclose(moments.cross, (x * w[:, None]).T @ y, atol=1e-12)
    monkeypatch.setattr(closed, "ROWS", 10**6)
    monkeypatch.setattr(closed, "ENTRIES", 10**9)
    np.testing.assert_allclose(many, closed.weights(data, mine, True, np.random.default_rng(0)), rtol=1e-9)
    assert many.std() > 0.1 * many.mean()


def test_moments_of_states_are_summed_over_blocks_of_neighbors(data, small_blocks):
    mine, reads = closed.moments(data.counts, data.batch), np.random.default_rng(1).standard_normal((P, 9))
    x = closed.project(data.counts, data.batch, mine, reads)
    degree = np.diff(data.graph.indptr)[:, None]
    around = np.where(degree > 0, (data.graph @ x) / np.maximum(degree, 1), x)

    def read(rows):
        seen.append(len(rows))
        return closed.project(data.counts[rows], data.batch[rows], mine, reads)

    for mix in (0.0, 0.4):
        seen = []
        mean, covariance = closed.moments_over_cells(data.graph, mix, read)
        mixed = (1 - mix) * x + mix * around
        np.testing.assert_allclose(mean, mixed.mean(0), atol=1e-12)
        np.testing.assert_allclose(covariance, np.cov(mixed.T, ddof=0), atol=1e-12)
        assert max(seen) < 600 and sum(seen) < 4 * SIDE**2  # neighbors are read together, whatever the order of the file


def test_nothing_dense_grows_with_the_cells(data, small_blocks):
    mine, w = closed.moments(data.counts, data.batch), np.full(SIDE**2, 1 / SIDE**2)
    reads = np.ones((P, 100))
    whole = 8 * SIDE**2 * P  # the panel in all cells
    assert peak(lambda: closed.weights(data, mine, True, np.random.default_rng(0))) < whole
    assert peak(lambda: closed.second_moments(data, w)) < whole
    read = lambda rows: closed.project(data.counts[rows], data.batch[rows], mine, reads)  # noqa: E731
    assert peak(lambda: closed.moments_over_cells(data.graph, 0.4, read)) < 8 * SIDE**2 * 100 / 2


def test_levels_of_measured_genes_are_summed_over_blocks(monkeypatch):
    """2,000 cells and all their neighbors were made dense at once: 5 GB for a panel of 5,000 genes."""
    world = spatial_field(seed=1, n_cells=400, n_reference=200, n_genes=30, n_panel=20)
    config = with_overrides(vista.PRESETS["default"], ["penalty=3", "reweight=false", "process=0", "neighbors=6"])
    sides = read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False)
    data = problem(*sides, config, lambda line: None)[0]
    pair, _ = vista.start(data, config, 0, lambda line: None)
    before = chains_of(pair)[0].guide.log_gain_loc.detach().clone()
    sizes, made = [], Batches.of
    monkeypatch.setattr(Batches, "of", lambda self, rows: sizes.append(len(rows)) or made(self, rows))
    gains = []
    for block in (48, 1000):
        monkeypatch.setattr(vista, "BLOCK", block)
        chains_of(pair)[0].guide.log_gain_loc.data.copy_(before)
        sizes.clear()
        vista.select(pair, data, config, 0)
        gains.append(chains_of(pair)[0].guide.log_gain_loc.detach()[data.panel].numpy())
        assert max(sizes) == min(block, 400) and sum(sizes) == 400
    np.testing.assert_allclose(gains[0], gains[1], atol=0.02)  # other draws of the states
    assert np.abs(gains[0] - before[data.panel].numpy()).max() > 0.02

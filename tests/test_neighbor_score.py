"""The competitor: its scale by hand, coverage where its assumption holds, and where it fails: genes with a level of their own."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp

from ppl_st.errors import UserError
from ppl_st.neighbor_score import neighbor_intervals, neighbor_scale
from ppl_st.spatial import neighbors


def test_scale_by_hand():
    p = np.array([[1.0, 0.0], [1.0, 2.0], [4.0, 0.0]])
    graph = sp.csr_matrix(np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0]], float))
    cosine = np.array([1 / np.sqrt(5), 1.0])  # of cell 0 with cells 1 and 2
    w = np.exp(cosine) / np.exp(cosine).sum()
    found = neighbor_scale(p, graph)
    np.testing.assert_allclose(found[0], 1 + np.sqrt([w[1] * 9, w[0] * 4]))
    np.testing.assert_allclose(found[1], 1 + np.sqrt([0, 4]))
    np.testing.assert_allclose(found[2], 1)
    with pytest.raises(UserError, match="need"):
        neighbor_scale(p, graph[:2])
    with pytest.raises(UserError, match=r"predicted is not finite at 1 of 9 entries, first at \[0, 2\]"):
        neighbor_intervals(p, p, np.where(np.arange(9).reshape(3, 3) == 2, np.nan, 1.0), graph)


def test_memory_of_the_scale_does_not_grow_with_neighbors_times_genes(monkeypatch):
    rng = np.random.default_rng(0)
    p, graph = rng.gamma(1, 1, (2000, 100)), neighbors(rng.uniform(0, 1, (2000, 2)), 15)
    table, found = p.nbytes, []
    for entries in (10**9, 200_000):
        monkeypatch.setattr("ppl_st.neighbor_score.BLOCK_ENTRIES", entries)
        tracemalloc.start()
        found.append((neighbor_scale(p, graph), tracemalloc.get_traced_memory()[1] / table))
        tracemalloc.stop()
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] > 25 and found[1][1] < 10  # in tables of cells x genes


def covered(level_sd):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 1, (400, 2))
    p = np.sin(6 * xy[:, :1] * rng.uniform(0.5, 2, 60)) + rng.uniform(0, 2, 60)
    y = p + 0.5 * rng.standard_normal(p.shape) + level_sd * rng.standard_normal(60)
    lower, upper = neighbor_intervals(p[:, :30], y[:, :30], p[:, 30:], neighbors(xy, 8), level=0.9)
    return ((lower <= y[:, 30:]) & (y[:, 30:] <= upper)).mean(0)


def test_coverage_holds_for_exchangeable_entries_and_not_gene_by_gene():
    alike, levels = covered(0.0), covered(1.0)
    assert alike.mean() == pytest.approx(0.9, abs=0.02) and alike.min() > 0.8
    assert levels.min() < 0.3 and ((levels > 0.8) & (levels < 0.97)).mean() < 0.5  # a gene is right or wrong as a whole

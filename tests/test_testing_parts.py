"""The parts of the law kit: the bound on surprise, the strategies."""

import math
import sys

import hypothesis
import numpy as np
import pyro.distributions as dist
import pytest
import torch

from ppl_st.errors import UserError
from ppl_st.likelihoods import Poisson
from ppl_st.testing import Subject, means, positive, shapes, sparse_counts, tables
from ppl_st.testing.exact import surprise, table
from seeded import own_seed

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


def test_the_chernoff_bound_bounds_and_bites():
    def only(d):
        t, decided = table(d, "count")
        assert decided.all()
        return t.points[:, 0], t.mass[:, 0]

    three = only(Poisson(torch.tensor([3.0], dtype=torch.float64)))
    assert surprise(*three, 3.0, 4000) == 1
    for mean in (3.1, 3.3):  # against the normal tail; a bound, and not a loose one
        z = (mean - 3) / (3 / 4000) ** 0.5
        tail = math.erfc(z / 2**0.5)
        assert 0.5 * tail < surprise(*three, mean, 4000) < 100 * tail**0.97
    point = only(dist.Delta(torch.tensor([2.0], dtype=torch.float64)))
    assert surprise(*point, 2.0, 10) == 1 and surprise(*point, 2.1, 10) == 0


def test_a_subject_says_what_is_wrong_with_it_once():
    with pytest.raises(UserError, match="likelihood: unknown support 'counts'; there are 'count', 'real', 'positive', 'sphere'"):
        Subject(Poisson, {"mean": means()}, support="counts")
    with pytest.raises(UserError, match=r"`make` does not take the parameters men \(.*\); name them as its arguments"):
        Subject(lambda mean: Poisson(mean), {"men": means()})
    with pytest.raises(UserError, match="parameters mean, theta"):
        Subject(lambda mean: Poisson(mean), {"mean": means()}, domain={"mean": means(), "theta": positive(1, 2)})


@hypothesis.settings(max_examples=50, derandomize=True, database=None, deadline=None)
@hypothesis.given(sparse_counts(), shapes())
def test_strategies_of_tables_and_shapes(matrix, shape):
    assert matrix.format == "csr" and matrix.dtype == np.float32 and (matrix.data > 0).all()
    assert 1 <= matrix.shape[0] <= 8 and 1 <= matrix.shape[1] <= 8
    assert torch.zeros(shape).numel() >= 1


def test_tables_with_empty_rows_and_columns_occur():
    def both(adata):
        m = adata.layers["counts"]
        return m.nnz > 0 and (m.sum(1) == 0).any() and (m.sum(0) == 0).any()

    settings = hypothesis.settings(derandomize=True, database=None, phases=[hypothesis.Phase.generate])  # any will do, not the smallest
    adata = hypothesis.find(tables(), both, settings=settings)
    assert adata.obsm["spatial"].shape == (adata.n_obs, 2) and adata.var_names[0] == "gene0"


def test_strategies_refuse_bad_ranges_and_name_the_missing_package(monkeypatch):
    with pytest.raises(UserError, match="0 < low < high"):
        positive(0, 1)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(UserError, match=r"pip install 'ppl-st\[test\]'"):
        means()

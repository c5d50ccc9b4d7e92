"""Draws of counts follow their law on both routes (turned round below a mean of 3, Gamma and Poisson above), whatever the number of threads."""

import numpy as np
import pytest
import scipy.stats
import torch

from ppl_st import sampling
from ppl_st.errors import UserError
from ppl_st.sampling import negative_binomial

N = 2**17 + 5


def drawn(shape: float, mean: float) -> np.ndarray:
    torch.manual_seed(0)
    return negative_binomial(torch.full((N,), shape).double(), torch.full((N,), mean / shape).double()).numpy()


@pytest.mark.parametrize("shape", [0.02, 0.11, 1.0, 30.0, 1e8])
@pytest.mark.parametrize("mean", [1e-4, 0.03, 0.8, 2.99, 3.01, 40.0])
def test_counts_follow_the_law(shape, mean):
    counts = drawn(shape, mean)
    law = scipy.stats.nbinom(shape, shape / (shape + mean)) if shape < 1e6 else scipy.stats.poisson(mean)
    edges = np.unique(law.ppf(np.linspace(0.02, 1 - 20 / N, 40)))  # P(count <= edge), the rest beyond the last
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * N
    observed = np.diff(np.concatenate([[0], [(counts <= edge).sum() for edge in edges], [N]]))
    keep = expected > 5
    observed, expected = (np.append(a[keep], a[~keep].sum()) for a in (observed, expected))
    if len(expected) > 1 and expected[-1] < 1e-9:
        assert observed[-1] == 0
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-4


def test_the_far_tail_is_there():
    counts = drawn(0.11, 0.9)  # of the slowest inversion: P(count > 30) is 9e-4
    law = scipy.stats.nbinom(0.11, 0.11 / (0.11 + 0.9))
    beyond = N * law.sf(30)
    assert abs((counts > 30).sum() - beyond) < 4 * np.sqrt(beyond) and beyond > 5


def test_nothing_comes_of_nothing():
    shape = torch.tensor([0.0, 1e-8, 1.0, 1e8]).double()
    assert torch.equal(negative_binomial(shape, torch.zeros(4).double()), torch.zeros(4).double())


@pytest.mark.parametrize("shape, odds", [(np.nan, 1.0), (1.0, np.nan), (0.01, np.nan), (np.nan, np.nan)])
def test_what_is_not_a_number_is_no_count(shape, odds):
    """Such counts were 0, and nothing said so."""
    shapes, ratios = torch.ones(N).double(), torch.full((N,), 0.1).double()
    shapes[N - 1], ratios[N - 1] = shape, odds
    with pytest.raises(UserError, match="rate of some is NaN"):
        negative_binomial(shapes, ratios)


def test_threads_change_no_draw(monkeypatch):
    rng = np.random.default_rng(0)
    shape, odds = (torch.from_numpy(rng.gamma(1.0, 1.0, N)) for _ in range(2))
    several = []
    for workers in (1, 3):
        monkeypatch.setattr(sampling, "WORKERS", workers)
        torch.manual_seed(1)
        several.append(negative_binomial(shape, odds))
    assert torch.equal(*several)

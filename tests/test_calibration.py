"""Coverage, PIT, risk against trust and the parts of the variance: known answers, and what each must tell apart."""

import tracemalloc

import numpy as np
import pytest
from scipy import stats

from ppl_st.calibration import (
    coverage,
    coverage_table,
    pit_bounds,
    pit_histogram,
    randomised_pit,
    risk_coverage,
    variance_decomposition,
)  # fmt: skip
from ppl_st.errors import UserError
from ppl_st.report_sections import _with_intervals


@pytest.fixture(scope="module")
def forecasts():
    """PIT bounds of NB counts under the truth, and under a forecaster whose genes have levels of their own that it does not know."""
    rng = np.random.default_rng(0)
    cells, genes = 600, 60
    mean = np.exp(rng.normal(-0.5, 1.0, genes)) * rng.gamma(2.0, 0.5, (cells, genes))
    level = np.exp(0.7 * rng.standard_normal(genes))

    def bounds(truth):
        return stats.poisson(mean).cdf(truth - 1), stats.poisson(mean).cdf(truth)

    return bounds(rng.poisson(mean)), bounds(rng.poisson(mean * level)), np.repeat(["a", "b"], [200, 400])


def test_the_truth_is_covered_overall_and_in_every_group(forecasts):
    right, _, groups = forecasts
    table = coverage_table(*right, groups)
    assert table["group"].tolist() == ["all"] * 4 + ["a"] * 4 + ["b"] * 4
    assert table["cells"].tolist() == [600] * 4 + [200] * 4 + [400] * 4 and (table["genes"] == 60).all()
    np.testing.assert_allclose(table["coverage"], table["level"], atol=0.01)
    assert (table["lo"] <= table["level"] + 0.004).all() and (table["level"] - 0.004 <= table["hi"]).all()
    weighted = (200 * table["coverage"][4:8].to_numpy() + 400 * table["coverage"][8:].to_numpy()) / 600
    np.testing.assert_allclose(weighted, table["coverage"][:4])


def test_a_group_of_the_name_all_is_kept_apart(forecasts):
    table = coverage_table(*forecasts[0], np.where(forecasts[2] == "a", "all", "b"), levels=(0.9,)).set_index("group")
    assert table["cells"].to_dict() == {"all cells": 600, "all": 200, "b": 400}


def test_bootstrap_intervals_see_genes_not_cells(forecasts):
    """Levels that the forecaster does not know: coverage differs between genes, so the interval must be as wide as 60 genes make it."""
    _, wrong, _ = forecasts
    row = coverage_table(*wrong, levels=(0.9,)).iloc[0]
    per_gene = coverage(*wrong, (0.9,)).per_gene[0]
    assert row["coverage"] < 0.85 and (row["hi"] - row["lo"]) / 3.92 == pytest.approx(per_gene.std() / np.sqrt(60), rel=0.15)
    with pytest.raises(UserError, match="3 group labels"):
        coverage_table(*wrong, ["a", "b", "c"])


def test_one_gene_has_coverage_and_no_interval(forecasts):
    low, high = (bounds[:, :1] for bounds in forecasts[0])
    table = coverage_table(low, high)
    assert table["coverage"].notna().all() and table[["lo", "hi"]].isna().all(axis=None)
    assert _with_intervals(table)["90%"] == f"{table['coverage'][2]:.3f}"


def test_pit_is_flat_only_for_the_truth(forecasts):
    right, wrong, _ = forecasts
    for pit in (right, wrong):
        np.testing.assert_allclose(pit_histogram(*pit, bins=10).mean(0), 1)
    assert np.abs(pit_histogram(*right, bins=10).mean(1) - 1).max() < 0.05
    wrong_shape = pit_histogram(*wrong, bins=10).mean(1)
    assert wrong_shape[-1] > 1.3 and wrong_shape[0] > wrong_shape[4] < wrong_shape[-1]  # too short: high at the ends
    u = randomised_pit(*right, seed=1)
    assert stats.kstest(u.ravel()[::7], "uniform").pvalue > 1e-3 and stats.kstest(right[1].ravel()[::7], "uniform").pvalue < 1e-6
    np.testing.assert_array_equal(u, randomised_pit(*right, seed=1))
    drawn = np.histogram(u, np.linspace(0, 1, 11))[0] / u.size * 10
    np.testing.assert_allclose(drawn, pit_histogram(*right, bins=10).mean(1), atol=0.05)
    edges = pit_histogram([[0.0], [0.5], [1.0]], [[0.0], [0.5], [1.0]], bins=2)
    np.testing.assert_allclose(edges[:, 0], [2 / 3, 4 / 3])  # points: each in one bin


def test_a_histogram_takes_the_memory_of_one_bin():
    """All 20 bins at once took 525 bytes per entry: 10 GB for the entries that a report judges."""
    low = np.random.default_rng(0).uniform(0, 0.5, (400, 50))
    tracemalloc.start()
    try:
        pit_histogram(low, low + 0.3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80 * low.size, peak / low.size


def test_pit_bounds_of_draws_are_uniform_for_any_number_of_draws():
    rng = np.random.default_rng(3)
    draws, truth = rng.poisson(0.7, (9, 4000, 2)), rng.poisson(0.7, (4000, 2))
    assert stats.kstest(randomised_pit(*pit_bounds(draws, truth)).ravel(), "uniform").pvalue > 1e-3


def test_a_truth_that_is_no_number_has_no_pit():
    with pytest.raises(ValueError, match=r"truth is NaN at 1 of 6 entries, first at \[1, 2\]"):
        pit_bounds(np.zeros((5, 2, 3)), np.array([[0, 1, 2], [3, 4, np.nan]]))
    with pytest.raises(ValueError, match=r"draws are NaN at 2 of 6 entries, first at \[0, 1\]"):
        pit_bounds(np.array([[0, np.nan], [1, np.nan], [2, 3]]), np.array([0, 1]))
    assert (pit_bounds(np.zeros((5, 2), int), np.array([0, 1]))[1] == [1, 1]).all()
    with pytest.raises(UserError, match="three layers"):
        variance_decomposition(np.ones((3, 2)), np.ones((3, 2)), np.ones((2, 2)))


def test_risk_coverage_by_hand_and_its_limits():
    risk = np.array([0.1, 0.9, 0.5, 0.3])
    best, worst, useless = (risk_coverage(risk, t) for t in (-risk, risk, np.zeros(4)))
    np.testing.assert_allclose(best.risk, [0.1, 0.2, 0.3, 0.45])
    np.testing.assert_allclose(best.retained, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(useless.risk, 0.45)
    assert best.area == pytest.approx(np.mean([0.1, 0.2, 0.3, 0.45])) and best.area < useless.area < worst.area
    with pytest.raises(UserError, match="finite"):
        risk_coverage(risk, [np.nan] * 4)


def test_variances_add_up_and_with_doubt_of_each_cell_their_share_is_the_squared_correlation():
    rng = np.random.default_rng(4)
    draws, cells = 4000, 300
    mean = rng.gamma(3.0, 1.0, (cells, 2))
    rate = mean * rng.gamma(16.0, 1 / 16, (draws, cells, 2))
    count = rng.poisson(rate)
    table = variance_decomposition(rate.mean(0), rate.std(0), count.std(0))
    np.testing.assert_allclose(table[["between", "epistemic", "noise"]].sum(axis=1), count.reshape(-1, 2).var(0), rtol=0.03)
    np.testing.assert_allclose(table["between"], mean.var(0), rtol=0.03)
    np.testing.assert_allclose(table["epistemic"], (mean**2).mean(0) / 16, rtol=0.05)
    np.testing.assert_allclose(table["noise"], mean.mean(0), rtol=0.05)
    realised = [np.mean([np.corrcoef(count[d, :, g], mean[:, g])[0, 1] ** 2 for d in range(200)]) for g in range(2)]
    np.testing.assert_allclose(table["between"] / table.sum(axis=1), realised, atol=0.02)


def test_doubt_that_all_cells_share_lowers_no_correlation():
    """One level per draw and gene: the parts add up, but between / sum is far below the squared correlation; that is the ratio without doubt."""
    rng = np.random.default_rng(5)
    draws, cells = 2000, 300
    mean = rng.gamma(3.0, 1.0, (cells, 2))
    rate = mean * rng.gamma(4.0, 1 / 4, (draws, 1, 2))
    count = rng.poisson(rate)
    table = variance_decomposition(rate.mean(0), rate.std(0), count.std(0))
    np.testing.assert_allclose(table[["between", "epistemic", "noise"]].sum(axis=1), count.reshape(-1, 2).var(0), rtol=0.05)
    realised = [np.mean([np.corrcoef(count[d, :, g], mean[:, g])[0, 1] ** 2 for d in range(400)]) for g in range(2)]
    assert (table["between"] / table.sum(axis=1) < np.array(realised) - 0.1).all()
    np.testing.assert_allclose(table["between"] / (table["between"] + table["noise"]), realised, atol=0.05)

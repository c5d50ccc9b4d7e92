"""The conformal layer over genes: its finite-sample guarantee by simulation, its strata, its refusals."""

import numpy as np
import pytest
from scipy.stats import norm

from ppl_st.calibration import GRID
from ppl_st.conformal import STRATUM, conformal_level, recalibration
from ppl_st.errors import UserError

Z = norm.ppf(0.5 + 0.5 * GRID)[:, None]


def curves(rng, genes, centre=0.3, spread=0.4):
    """Coverage at `GRID` of N(0, 1) forecasts of genes that are really N(0, s_g): the forecaster is too sure, each gene in its own way."""
    s = np.exp(centre + spread * rng.standard_normal(genes))
    return 2 * norm.cdf(Z / s) - 1


@pytest.mark.parametrize("genes", [12, 40])
def test_a_new_gene_is_covered_as_often_as_promised(genes):
    rng = np.random.default_rng(0)
    found = {True: [], False: []}
    for _ in range(1500):
        table = curves(rng, genes + 1)
        for guarantee, covered in found.items():
            level = conformal_level(table[:, :-1], 0.9, guarantee=guarantee)
            covered.append(1.0 if level == 1 else table[np.searchsorted(GRID, level), -1])
    raw = curves(rng, 5000)[np.searchsorted(GRID, 0.9)].mean()
    assert raw < 0.8  # there is something to correct
    assert 0.9 <= np.mean(found[True]) <= 0.9 + 1 / (genes + 1) + 0.02
    assert abs(np.mean(found[False]) - 0.9) < 0.015


def test_too_few_genes_get_no_finite_promise():
    """With 8 genes 1 / (m + 1) > 0.1: no interval short of everything can be promised."""
    perfect = np.repeat(GRID[:, None], 8, 1)
    assert conformal_level(perfect, 0.9) == 1.0
    assert conformal_level(perfect, 0.9, guarantee=False) == pytest.approx(0.9)


def test_a_calibrated_forecaster_is_left_alone():
    perfect = np.repeat(GRID[:, None], 2000, 1)
    assert conformal_level(perfect, 0.9) == pytest.approx(0.9, abs=0.021)


def test_strata_follow_the_covariate():
    rng = np.random.default_rng(1)
    mean = np.sort(rng.lognormal(0, 1, 4 * STRATUM))
    half = len(mean) // 2
    table = np.concatenate([curves(rng, half, 0.0, 0.0), curves(rng, half, 0.6, 0.0)], 1)
    made = recalibration(table, mean, guarantee=False)
    assert len(made.nominal) == 4 and made.genes == len(mean) and made.raw_coverage < 0.85
    low, high = made.nominal_of([mean[0], mean[-1]])
    assert low == pytest.approx(0.9, abs=0.011) and high > 0.99
    one = recalibration(table[:, :STRATUM], mean[:STRATUM])
    assert one.edges == [] and len(one.nominal) == 1


def test_wrong_shapes_are_named():
    with pytest.raises(UserError, match=r"need .* genes"):
        conformal_level(np.ones((3, 4)), 0.9)
    with pytest.raises(UserError, match="strictly between"):
        conformal_level(np.ones((len(GRID), 4)), 1.0)
    with pytest.raises(UserError, match="4 curves but 3 values"):
        recalibration(np.ones((len(GRID), 4)), np.ones(3))

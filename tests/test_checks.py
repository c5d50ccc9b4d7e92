"""Predictive checks: flat where data are the model's own, a failure where one side of the data is another."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import ppl_st.api as api
from machine import dear
from ppl_st import checks, report_sections
from ppl_st.checks import STATISTICS, predictive_checks
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.inference.predict import count_draws
from ppl_st.pooling import morans_i
from ppl_st.simulate import spatial_field
from ppl_st.spatial import neighbors

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run():
    world = spatial_field(seed=4, n_cells=200, n_genes=110, n_panel=50)
    settings = ["clusters=8", "process=0", "smoothing=0.25"]
    return api.fit("spaim", target=world.target, reference=world.reference, overrides=settings, seed=0)


@pytest.fixture(scope="module")
def own(run):
    """Counts of all unmeasured genes that the model makes up itself, [draws, cells, genes], with another seed than the checks'."""
    predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
    index = np.flatnonzero(~run.measured)
    drawn = np.zeros((6, len(run.target.names), len(index)))
    for rows, counts in count_draws(predictor, predictor.chains, index, draws=6, seed=5):
        drawn[:, rows] = counts
    return drawn


def counted(run, x) -> Counts:
    return replace(run.target, matrix=sp.csr_matrix(x, dtype=np.float32), genes=run.genes[~run.measured])


@dear
def test_the_models_own_data_pass(run, own):
    shares, library = [], []
    for one in own:
        found = predictive_checks(run, counted(run, one), draws=39)
        assert list(dict.fromkeys(found.genes["statistic"])) == list(STATISTICS)
        shares.append(found.genes.groupby("statistic")["inside"].mean())
        library.append(found.library["inside"].mean())
    assert (pd.DataFrame(shares).mean() > 0.8).all() and (pd.DataFrame(shares).mean() < 0.97).all()  # 0.9 expected
    # The cells of one draw share the genes' levels: their libraries are high or low together, and only the mean over draws is near 0.9.
    assert np.mean(library) == pytest.approx(0.9, abs=0.06), library


@pytest.mark.parametrize("mean", [0.1, 0.5, 2.0])
def test_ties_count_in_part(mean):
    """By the middle of their ranks 98.6 % of exact Poisson libraries with mean .5 lay in the middle 90 %."""
    rng = np.random.default_rng(0)
    table = checks._ranked(rng.poisson(mean, (40, 20000)), rng.poisson(mean, 20000).astype(float))
    assert table["inside"].mean() == pytest.approx(0.9, abs=0.01)
    (shown,) = report_sections.checked(checks.Checks(table[:100].assign(statistic="mean"), table), "cell", True).tables
    assert shown.frame.iloc[-1, 0] == "90% of the cells"


def test_statistics_are_those_of_the_counts(run, own):
    truth = counted(run, own[0])
    table = predictive_checks(run, truth, draws=5).genes.pivot(index="gene", columns="statistic", values="observed").loc[truth.genes]
    np.testing.assert_allclose(table["mean"], own[0].mean(0))
    np.testing.assert_allclose(table["variance"], own[0].var(0))
    np.testing.assert_allclose(table["zero fraction"], (own[0] == 0).mean(0))
    np.testing.assert_allclose(table["Moran's I"], morans_i(own[0], neighbors(run.target.xy, 8)).estimate)


def test_each_statistic_sees_its_own_fault(run, own):
    """Counts in order from left to right: a pattern, all else equal. Counts cut at one: fewer, and less varied."""

    def place(x):
        return predictive_checks(run, counted(run, x), draws=19).genes.groupby("statistic")["pit"].mean()

    whole = place(own[1])
    ordered = np.zeros_like(own[1])
    ordered[np.argsort(run.target.xy[:, 0])] = np.sort(own[1], axis=0)
    graded = place(ordered)
    assert graded["Moran's I"] > 0.9 > whole["Moran's I"]
    same = ["mean", "variance", "zero fraction"]
    np.testing.assert_allclose(graded[same], whole[same], atol=0.01)  # ties fall either way where sums are taken in another order
    cut = place(np.minimum(own[1], 1))
    assert cut["variance"] < whole["variance"] - 0.2 and cut["zero fraction"] == whole["zero fraction"]


def test_what_is_looked_at(run, monkeypatch):
    table = predictive_checks(run, draws=4).genes
    assert set(table["gene"]) == set(run.genes[run.measured])  # without a truth what the fit saw
    monkeypatch.setattr(checks, "MAX_BYTES", 4 * 4 * len(run.target.names) * 3)
    assert predictive_checks(run, draws=4).genes["gene"].nunique() == 3
    blind = replace(run, target=replace(run.target, xy=None))
    assert "Moran's I" not in set(predictive_checks(blind, draws=4).genes["statistic"])
    with pytest.raises(UserError, match="0 genes with counts"):
        predictive_checks(run, run.target, ["nonsense"])

"""The demonstration with small knobs: files, numbers beside the oracle, refusals."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ppl_st.data import read_counts
from ppl_st.demo import COLUMNS, ORACLE, demo, score_oracle
from ppl_st.errors import UserError

FAST = ["chains=1", "sparsity=0", "sweeps=5", "fit.steps=3"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    said = []
    return out, demo(out=out, cells=800, types=3, squares=6, draws=20, overrides=FAST, say=said.append), said


def test_everything_that_is_promised_lies_there(done):
    out, _, said = done
    assert {p.name for p in (out / "data").iterdir()} == {"target.h5ad", "reference.h5ad", "truth.h5ad"}
    assert len(list((out / "figures").glob("*.png"))) == 5
    page = (out / "report.html").read_text()
    assert ORACLE in page and page.count("data:image/png") == 5
    assert said and not [p for p in out.rglob("*") if ".tmp" in p.name]
    import ppl_st

    again = ppl_st.load(out / "run").predict(draws=20)  # genes that the cells never measured
    assert set(again.var_names) == set(ad.read_h5ad(out / "data" / "truth.h5ad").var_names)


def test_the_table_sets_the_fit_between_baselines_and_oracle(done):
    out, result, _ = done
    scores = result.scores
    assert list(scores.columns) == list(COLUMNS.values())
    ours, oracle = scores.loc["siid"], scores.loc[ORACLE]
    assert np.isfinite([ours, oracle]).all()
    assert scores.loc["baseline: spot_copy", "R2"] < ours["R2"] < oracle["R2"] + 0.02
    assert ours["log score"] < oracle["log score"] + 1e-3  # nobody beats the truth by more than chance
    assert oracle["coverage 90 %"] == pytest.approx(0.9, abs=0.01)
    stored = pd.read_csv(out / "scores.csv", index_col=0)
    np.testing.assert_allclose(stored.loc["siid"], ours)


def test_deconvolution_is_measured_against_the_true_types(done):
    _, result, _ = done
    facts = result.deconvolution["value"]
    assert facts["cells whose largest factor is right (share)"] > 0.8
    assert 0 <= facts["spots: JS divergence of proportions (bits, mean)"] < 0.1


def test_oracle_scores_are_those_of_the_poisson_that_made_the_counts():
    rng = np.random.default_rng(0)
    rate = rng.gamma(1, 1, (4000, 2))
    import scipy.sparse as sp

    cells = ad.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
    truth = read_counts(cells, role="truth", need_spatial=False)
    table = score_oracle(truth, rate, np.ones(4000))
    x = truth.matrix.toarray()
    np.testing.assert_allclose(table["log_score"], stats.poisson.logpmf(x, rate).mean(0))
    np.testing.assert_allclose(table["coverage_90"], 0.9, atol=0.01)
    worse = score_oracle(truth, rate * 2, np.ones(4000))
    assert (worse["crps"] > table["crps"]).all() and (worse["log_score"] < table["log_score"]).all()


def test_a_used_folder_and_an_unknown_method_are_refused(done, tmp_path):
    out, _, _ = done
    with pytest.raises(UserError, match="not empty; choose another --out"):
        demo(out=out)
    with pytest.raises(UserError, match="no simulated protocol for 'vista'"):
        demo("vista", out=tmp_path / "new")
    assert not (tmp_path / "new").exists()

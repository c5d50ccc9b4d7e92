"""compare: pairs genes, names what it leaves out, refuses what cannot be compared; runs are scored on their held-out genes."""

import numpy as np
import pandas as pd
import pytest

from ppl_st import api
from ppl_st.compare import compare
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard


def write(folder, methods, genes=40, first=0):
    """An evaluation folder: genes differ by 10, methods by what is given, with noise 0.1 per gene."""
    folder.mkdir()
    rows = []
    for name, level in methods.items():
        for g in range(first, first + genes):
            hard = 10 * np.sin(g)
            noise = 0.1 * np.random.default_rng([*map(ord, name), g]).standard_normal()
            score = np.nan if level is None else hard + level + noise
            row = {"method": name, "kind": "method", "fold": g % 5, "gene": f"g{g:03d}"}
            rows.append(row | {"log_score": score, "log_pcc": 0.5, "coverage_90": 0.8})
    pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False)
    return folder


def test_pairs_see_a_difference_far_below_the_spread_over_genes(tmp_path):
    table = compare([write(tmp_path / "a", {"one": 0.0, "two": 0.2}), write(tmp_path / "b", {"three": 0.19})])
    assert list(table.index)[2] == "one" and set(table.index[:2]) == {"two", "three"}
    one, close = table.loc["one"], table.iloc[1]
    assert one.hi < 0 and one.difference == pytest.approx(-0.2, abs=0.06) and one.wins < 0.3
    assert close.lo < 0 < close.hi  # 0.01 cannot be told
    assert table.iloc[0].difference == 0 and table["coverage_error"].iloc[0] == pytest.approx(0.1)


def test_only_common_genes_and_methods_with_the_metric(tmp_path):
    said = []
    folders = [
        write(tmp_path / "a", {"one": 0.0, "mean": None}),
        write(tmp_path / "b", {"two": 0.1}, genes=10, first=35),
    ]
    table = compare(folders, say=said.append)
    assert (table["genes"] == 5).all() and "mean" not in table.index
    assert any("mean has no log_score" in line for line in said) and any("5 of 45 genes" in line for line in said)


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = write(tmp_path / "a", {"one": 0.0}), write(tmp_path / "b", {"two": 0.1}, first=100)
    with pytest.raises(UserError, match="no held-out gene in common"):
        compare([a, b])
    with pytest.raises(UserError, match="1 methods with log_score"):
        compare([a])
    with pytest.raises(UserError, match="unknown metric 'pcc'"):
        compare([a, b], metric="pcc")
    with pytest.raises(UserError, match="does not exist"):
        compare([a, tmp_path / "nowhere"])
    twice = pd.concat([pd.read_csv(a / "scores.csv")] * 2)
    twice.to_csv(a / "scores.csv", index=False)
    with pytest.raises(UserError, match="several folds"):
        compare([a, b])


def test_runs_are_scored_on_their_held_out_genes(tmp_path):
    sim = checkerboard(seed=1, n_cells=250, side=6, squares=6, n_types=3, n_genes=40, n_panel=30, contrast=1.0)
    fast = ["factors=3", "chains=1", "sparsity=0.0", "fit.steps=2"]
    for name, sweeps in (("long", 20), ("short", 1)):
        api.fit(
            "siid",
            target=sim.target,
            reference=sim.reference,
            out=tmp_path / name,
            overrides=[*fast, f"sweeps={sweeps}"],
        )
    with pytest.raises(UserError, match="--truth"):
        compare([tmp_path / "long", tmp_path / "short"])
    table = compare([tmp_path / "short", tmp_path / "long"], truth=sim.truth, draws=20)
    assert set(table.index) == {f"siid ({tmp_path / 'long'})", "siid"} and (table["genes"] == 10).all()
    assert table["difference"].iloc[0] == 0 > table["difference"].iloc[1] and table["seconds"].notna().all()
    long = api.load(tmp_path / "long").score(sim.truth, draws=20)
    assert table.loc[f"siid ({tmp_path / 'long'})", "log_score"] == pytest.approx(long["log_score"].mean())
    measured = sim.target[:, :5].copy()
    with pytest.raises(UserError, match="none of the 5 genes"):
        compare([tmp_path / "long", tmp_path / "short"], truth=measured)

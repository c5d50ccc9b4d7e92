"""compare: pairs genes, names what it leaves out, refuses what cannot be compared; runs are scored on their held-out genes."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import poisson

from ppl_st import api
from ppl_st.compare import compare
from ppl_st.errors import UserError
from ppl_st.evaluate import UPPER
from ppl_st.evaluation_folder import write_entries
from ppl_st.posterior import Run
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
    assert table["gene_rank"].sum() == pytest.approx(6) and one.gene_rank == table["gene_rank"].max() > 2.3
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


def test_weights_and_the_mixture_of_evaluations(tmp_path):
    """Each count comes from one of two forecasters: the mixture beats both, on genes that its weights did not see."""
    rng, genes, cells = np.random.default_rng(0), [f"g{g:03d}" for g in range(30)], [f"c{i}" for i in range(120)]
    x = np.where(rng.random((120, 30)) < 0.5, rng.poisson(1.0, (120, 30)), rng.poisson(7.0, (120, 30)))
    tables = {m: pd.DataFrame(poisson(mean).logpmf(x), cells, genes) for m, mean in (("low", 1.0), ("high", 7.0))}
    for name, table in tables.items():
        (tmp_path / name).mkdir()
        rows = pd.DataFrame({"method": name, "kind": "method", "fold": "0", "gene": genes, "log_score": table.mean(0).to_numpy()})
        rows.to_csv(tmp_path / name / "scores.csv", index=False)
        write_entries(tmp_path / name, [name], [table.iloc[:, :20], table.iloc[:, 20:]])
    found = compare([tmp_path / "low", tmp_path / "high"])
    assert found.index[-1] == "stack" and found.loc["stack", "lo"] > 0.3 and found.loc["stack", "wins"] == 1
    assert found["weight"].iloc[:2].tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    best = found.iloc[0]
    difference = tables["low"].mean(0) - tables["high"].mean(0)
    assert found.iloc[1].dse == pytest.approx(difference.std(ddof=1) / np.sqrt(30)) and best.se > 0
    assert "stack" not in compare([tmp_path / "low", tmp_path / "high", write(tmp_path / "a", {"none kept": 0.0}, genes=30)]).index


@pytest.mark.parametrize("shift, rows", [(1700, True), (1900, False)])
def test_the_row_of_the_mixture_says_its_cells_and_needs_enough_of_them(tmp_path, shift, rows):
    genes = [f"g{g}" for g in range(4)]
    for n, name in enumerate(("one", "two")):  # each kept 2,000 cells of more
        table = pd.DataFrame(np.full((2000, 4), -1.0 - n), [f"c{i}" for i in range(shift * n, shift * n + 2000)], genes)
        (tmp_path / name).mkdir()
        scores = pd.DataFrame({"method": name, "kind": "method", "fold": "0", "gene": genes, "log_score": table.mean(0).to_numpy()})
        scores.to_csv(tmp_path / name / "scores.csv", index=False)
        write_entries(tmp_path / name, [name], [table])
    said = []
    found = compare([tmp_path / "one", tmp_path / "two"], say=said.append)
    assert ("stack" in found.index) == ("weight" in found) == rows
    assert ("stack rest on 300 cells" if rows else "have 100 cells in common, too few") in said[-1]


def write_sections(folder, methods, holdout=0.5, seed=0, sections=("left", "right")):
    """The evaluation of a method of images: fold = section, baselines without a log score, no log probabilities of entries."""
    folder.mkdir()
    rows = []
    for name, level in methods.items():
        for n, section in enumerate(sections):
            for g in range(20):
                score = level + np.sin(g) + 3 * n  # sections differ by 3, methods on each gene and section by their level alone
                row = {"method": name, "kind": "baseline" if name == "gp_space" else "method", "fold": section, "gene": f"g{g:03d}"}
                rows.append(row | {"raw_pcc": score, "log_score": np.nan if name == "gp_space" else score, "seconds": 1.0})
    pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False)
    (folder / "evaluation.json").write_text(json.dumps({"methods": ["xfuse"], "seed": seed, "holdout": holdout}))
    return folder


def test_evaluations_of_images_are_paired_by_gene_and_section(tmp_path):
    a, b = write_sections(tmp_path / "a", {"xfuse": 0.0, "gp_space": -1.0}), write_sections(tmp_path / "b", {"xfuse": 0.2, "gp_space": -1.0})
    table = compare([a, b])
    assert list(table.index) == [f"xfuse ({b})", f"xfuse ({a})"] and (table["genes"] == 20).all() and "weight" not in table
    assert table["difference"].tolist() == pytest.approx([0, -0.2]) and table["lo"].tolist() == pytest.approx(table["hi"].tolist())
    best = np.sin(np.arange(20)) + 1.7  # a gene's sections are no independent evidence: it counts once
    assert table["log_score"].iloc[0] == pytest.approx(best.mean()) and table["se"].iloc[0] == pytest.approx(best.std(ddof=1) / np.sqrt(20))
    assert compare([a], metric="raw_pcc").loc["gp_space", "difference"] == pytest.approx(-1.0)  # with the baselines
    said, c = [], write_sections(tmp_path / "c", {"other": 0.1}, sections=("right", "third"))
    assert compare([a, c], say=said.append).loc["xfuse", "log_score"] == pytest.approx(np.sin(np.arange(20)).mean() + 3)  # of "right"
    assert "20 of 60 pairs of gene and section" in said[-1]
    for name, options in {"seed": {"seed": 1}, "whole": {"holdout": ["left", "right"]}}.items():
        with pytest.raises(UserError, match="same spots"):
            compare([a, write_sections(tmp_path / name, {"other": 0.0}, **options)])


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = write(tmp_path / "a", {"one": 0.0}), write(tmp_path / "b", {"two": 0.1}, first=100)
    with pytest.raises(UserError, match="no held-out gene in common"):
        compare([a, b])
    with pytest.raises(UserError, match="1 methods with log_score"):
        compare([a])
    with pytest.raises(UserError, match="unknown metric 'pcc'"):
        compare([a, b], metric="pcc")
    with pytest.raises(UserError, match="a is given twice"):
        compare([a, b, a])
    c = write(tmp_path / "c", {"one": 0.0, "two": 0.1})
    assert compare([c], metric="coverage_error")["coverage_error"].tolist() == pytest.approx([0.1, 0.1])
    whole = (c / "scores.csv").read_text()
    for part, what in ((whole[:20], "has no column gene|has no row|ends in"), (whole[:-5], "ends in the middle of a row")):
        (c / "scores.csv").write_text(part)
        with pytest.raises(UserError, match=rf"c/scores.csv: ({what})"):
            compare([a, c])
    (b / "log_prob.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"b/log_prob.npz: cannot be read"):
        compare([a, b])
    with pytest.raises(UserError, match="does not exist"):
        compare([a, tmp_path / "nowhere"])
    twice = pd.concat([pd.read_csv(a / "scores.csv")] * 2)
    twice.to_csv(a / "scores.csv", index=False)
    with pytest.raises(UserError, match="several folds"):
        compare([a, b])


def test_the_reference_that_saw_the_truth_is_no_competitor(tmp_path):
    a = write(tmp_path / "a", {"one": 0.0, "two": 0.2})
    scores = pd.read_csv(a / "scores.csv")
    seer = scores[scores["method"] == "one"].assign(method="supervised_ridge", kind=UPPER, log_score=100.0)
    pd.concat([seer, scores]).to_csv(a / "scores.csv", index=False)
    assert list(compare([a]).index) == ["two", "one"]


def test_a_gene_may_be_called_nan(tmp_path):
    a = write(tmp_path / "a", {"one": 0.0, "two": 0.2}, genes=5)
    text = (a / "scores.csv").read_text().replace("g001", "nan").replace("g002", "NA")
    (a / "scores.csv").write_text(text)
    assert (compare([a])["genes"] == 5).all()


def test_evaluations_of_other_counts_are_refused_and_other_splits_said(tmp_path):
    def record(folder, sha, **more):
        inputs = {role: {"path": f"{role}.h5ad", "sha256": sha if role == "target" else "r"} for role in ("target", "reference")}
        (folder / "evaluation.json").write_text(json.dumps({"inputs": inputs, "folds": "5", "max_folds": None, "seed": 0, "draws": 100} | more))

    a, b = write(tmp_path / "a", {"one": 0.0}), write(tmp_path / "b", {"two": 0.1})
    said = []
    record(a, "x")
    record(b, "x")
    compare([a, b], say=said.append)
    assert said == []
    record(b, "x", seed=1, max_folds=2)
    compare([a, b], say=said.append)
    assert ["max_folds 2" in said[0], "seed 1" in said[1], len(said)] == [True, True, 2]
    record(b, "y")
    with pytest.raises(UserError, match=r"another target \(target.h5ad\).*same file"):
        compare([a, b])
    for role in ("target1", "image0"):  # of images
        for folder, sha in ((a, "x"), (b, "y")):
            record(folder, "x", inputs={role: {"path": f"{role}.h5ad", "sha256": sha}})
        with pytest.raises(UserError, match=rf"another {role} \({role}.h5ad\).*same file"):
            compare([a, b])


def test_a_score_that_is_not_finite_is_left_out_and_said(tmp_path):
    a, said = write(tmp_path / "a", {"one": 0.0, "two": 0.2, "three": 0.1}), []
    scores = pd.read_csv(a / "scores.csv")
    scores.loc[0, "log_score"] = -np.inf
    scores.to_csv(a / "scores.csv", index=False)
    assert set(compare([a], say=said.append).index) == {"two", "three"} and "one has no log_score that is finite for every gene" in said[0]


def test_runs_of_other_cells_are_refused_and_another_target_than_the_evaluations_said(tmp_path):
    sim = checkerboard(seed=1, n_cells=60, side=4, squares=4, n_types=2, n_genes=24, n_panel=16, contrast=1.0)
    fast = ["factors=2", "chains=1", "sparsity=0.0", "fit.steps=1", "sweeps=1"]
    for name, cells in {"all": 60, "fewer": 50}.items():
        sim.target[:cells].copy().write_h5ad(tmp_path / f"{name}.h5ad")
        api.fit("siid", target=tmp_path / f"{name}.h5ad", reference=sim.reference, out=tmp_path / name, overrides=fast)
    with pytest.raises(UserError, match=r"compare: .*fewer was fitted on other cells than .*all; fit both on the same target"):
        compare([tmp_path / "all", tmp_path / "fewer"], truth=sim.truth, draws=2)
    scores = write(tmp_path / "a", {"one": 0.0})
    table = pd.read_csv(scores / "scores.csv", dtype={"gene": str}).iloc[: sim.truth.n_vars]
    table.assign(gene=sim.truth.var_names).to_csv(scores / "scores.csv", index=False)
    inputs = json.loads((tmp_path / "all" / "manifest.json").read_text())["inputs"]
    (scores / "evaluation.json").write_text(json.dumps({"inputs": inputs}))
    said: dict[str, list[str]] = {"all": [], "fewer": []}
    for name, lines in said.items():
        compare([scores, tmp_path / name], truth=sim.truth, draws=2, say=lines.append)
    assert not any("another target" in line for line in said["all"])
    assert "fewer was fitted to another target" in said["fewer"][0] and "all.h5ad" in said["fewer"][0]


def test_runs_are_scored_on_their_held_out_genes(tmp_path, monkeypatch):
    sim = checkerboard(seed=1, n_cells=160, side=6, squares=6, n_types=3, n_genes=40, n_panel=30, contrast=1.0)
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
    long_one, short_one = (f"siid ({tmp_path / name})" for name in ("long", "short"))
    assert set(table.index) == {long_one, short_one, "stack"} and (table["genes"] == 10).all()
    assert table["difference"].iloc[0] == 0 > table["difference"].iloc[1]
    record = api.load(tmp_path / "short").record
    assert table.loc[short_one, "seconds"] == pytest.approx(record["start_seconds"] + record["seconds"]) and record["start_seconds"] > 0
    assert table["weight"].iloc[:2].sum() == pytest.approx(1) and table["weight"].iloc[0] > table["weight"].iloc[1]
    assert table.loc["stack", "difference"] > -0.01 and table["rank"].tolist()[:2] == [1, 2]
    long = api.load(tmp_path / "long").score(sim.truth, draws=20)
    assert table.loc[long_one, "log_score"] == pytest.approx(long["log_score"].mean())
    said = []
    alone = compare([tmp_path / "short", tmp_path / "long"], truth=sim.truth[:, :1].copy(), draws=5, say=said.append)
    assert len(alone) == 2 and "weight" not in alone and "1 genes and" in said[-1]  # no other gene to learn weights from
    assert not any("not the same split" in line for line in said)
    api.fit("siid", target=sim.target, reference=sim.reference, hold_out=sim.target.var_names[:3], out=tmp_path / "fewer", overrides=fast)
    compare([tmp_path / "fewer", tmp_path / "long"], truth=sim.truth, draws=5, say=said.append)
    assert any("3 genes were shown to one of" in line and "not the same split" in line for line in said)
    widths, predict = [], Run.predict
    monkeypatch.setattr(Run, "predict", lambda self, genes, **options: widths.append(len(genes)) or predict(self, genes, **options))
    monkeypatch.setattr("ppl_st.compare.BYTES_PER_PREDICTION", 1e9 / 160 / 4)  # room for four genes
    blocks = compare([tmp_path / "short", tmp_path / "long"], truth=sim.truth, draws=20)
    assert widths == 2 * [4, 4, 2] and (blocks["genes"] == 10).all()
    np.testing.assert_allclose(blocks["log_score"], table["log_score"], rtol=0.02)
    measured = sim.target[:, :5].copy()
    with pytest.raises(UserError, match="none of the 5 genes"):
        compare([tmp_path / "long", tmp_path / "short"], truth=measured)

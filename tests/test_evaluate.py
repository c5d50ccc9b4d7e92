"""evaluate: the protocol's splits, baselines equal to direct calls, truth files, ranks, files, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import ppl_st.evaluate as ev
from ppl_st.baselines import SPOT_BASELINES, Baseline, Split, spot_copy, supervised_ridge
from ppl_st.config import hash_path
from ppl_st.data import gene_folds, read_counts
from ppl_st.errors import UserError
from ppl_st.evaluate_images import evaluate_spots
from ppl_st.evaluation_folder import read_entries
from ppl_st.metrics import score_table
from ppl_st.report import overview
from ppl_st.report_run import report_folder
from ppl_st.simulate import checkerboard, spatial_field

FAST = ["factors=3", "chains=1", "sparsity=0", "sweeps=3", "fit.steps=3", "batch_spots=0"]
CELLS, PANEL, GENES = 250, 30, 40


@pytest.fixture(scope="module")
def world():
    return checkerboard(
        seed=1, n_cells=CELLS, side=6, squares=4, n_types=3, n_genes=GENES, n_panel=PANEL, contrast=1
    )


class Stub:
    """A run that repeats the counts of the reference's mean, or the truth: evaluation without a fit."""

    seen: list = []  # noqa: RUF012

    def __init__(self, target, truth):
        self.target, self.truth = read_counts(target, role="target"), truth
        Stub.seen.append(self.target)

    def predict(self, genes, **options):
        import anndata as ad

        answer = self.truth[self.target.names, list(genes)].X.toarray()
        columns = ["measured", "trust", "mean_count", "log_score", "crps", "coverage_90"]
        scores = pd.DataFrame(0.5, index=pd.Index(genes), columns=columns)
        total = np.maximum(self.target.totals, 1e-9)
        log = np.log1p(answer * (np.median(total) / total)[:, None])
        return ad.AnnData(answer, obs=pd.DataFrame(index=self.target.names), var=scores, layers={"lognorm_mean": log, "log_prob": -answer})


@pytest.fixture
def perfect(world, monkeypatch):
    import anndata as ad

    both = ad.concat([world.target, world.truth], axis=1)
    Stub.seen = []
    monkeypatch.setattr(ev, "fit", lambda method, target, reference, **options: Stub(target, both))


def test_folds_hide_their_genes_and_follow_the_protocol(world, perfect):
    done = ev.evaluate(["siid"], world.target, world.reference, folds=3, seed=4, baselines=False)
    folds = gene_folds(world.target.var_names, 3, 4)
    assert [set(seen.genes) for seen in Stub.seen] == [
        set(world.target.var_names) - set(fold) for fold in folds
    ]
    assert list(done.scores["gene"]) == [gene for fold in folds for gene in fold]
    np.testing.assert_allclose(done.scores["raw_pcc"], 1)
    assert (done.scores["raw_rmse"] == 0).all()


def test_log_probabilities_are_kept_of_the_same_cells_whatever_the_seed(world, perfect, monkeypatch, tmp_path):
    monkeypatch.setattr("ppl_st.conformal.INNER_CELLS", 40)
    kept = []
    for seed in (0, 1):
        ev.evaluate(["siid"], world.target, world.reference, folds=3, max_folds=1, seed=seed, baselines=False, out=tmp_path / str(seed))
        kept.append(read_entries(tmp_path / str(seed))["siid"].index.tolist())
    assert kept[0] == kept[1] and len(kept[0]) == 40


def test_cells_without_training_counts_are_dropped_for_every_fold(world, perfect):
    target = world.target.copy()
    fold = gene_folds(target.var_names, 3, 0)[1]
    matrix = target.X.tolil()
    matrix[7] = 0
    matrix[7, target.var_names.get_loc(fold[0])] = 9  # in one fold only: empty when that is hidden
    target.X = matrix.tocsr()
    said = []
    ev.evaluate(
        ["siid"], target, world.reference, folds=3, max_folds=1, baselines=False, say=said.append
    )
    assert len(Stub.seen) == 1 and "cell7" not in Stub.seen[0].names and len(Stub.seen[0].names) == CELLS - 1
    assert said[0].startswith("1 cells have no count")


def test_baselines_equal_direct_calls_and_the_upper_reference_is_marked(world, perfect):
    done = ev.evaluate(["siid"], world.target, world.reference, folds=3, max_folds=1)
    held_out = gene_folds(world.target.var_names, 3, 0)[0]
    target = read_counts(world.target, role="target")
    seen = target.take_genes(target.genes[~np.isin(target.genes, held_out)])
    split = Split(seen, read_counts(world.reference, role="reference"), held_out)
    truth = target.take_genes(held_out).matrix
    tables = {n: (one.estimate(split), one.scale) for n, one in SPOT_BASELINES.items()}
    tables["supervised_ridge"] = (supervised_ridge(split, truth), "log")
    for name, (estimate, scale) in tables.items():
        want = score_table(truth, estimate, split.training_total, held_out, scale=scale)
        got = done.scores[done.scores["method"] == name].set_index("gene")[want.columns]
        pd.testing.assert_frame_equal(got.astype(float), want.astype(float), check_names=False)
    kinds = done.summary.drop_duplicates("method").set_index("method")["kind"]
    assert kinds["supervised_ridge"] == ev.UPPER and kinds["spot_copy"] == "baseline"
    ranked = done.summary.dropna(subset="rank")
    assert set(ranked["metric"]) == set(ev.RANKED) and "supervised_ridge" not in set(ranked["method"])
    assert (ranked[ranked["method"] == "siid"]["rank"] == 1).all()  # it knows the truth
    everything = set(SPOT_BASELINES) | {"siid"}
    assert set(ranked[ranked["metric"] == "log_scc"]["method"]) == everything


def copied(monkeypatch, target, reference, *overrides):
    """What the baseline that copies the nearest spot answers, and its split."""
    found = []
    recorder = Baseline(lambda split: found.append((spot_copy(split), split)) or found[-1][0], "count")
    monkeypatch.setattr(ev, "SPOT_BASELINES", {"spot_copy": recorder})
    ev.evaluate(["siid"], target, reference, folds=3, max_folds=1, overrides=["radius=70", *overrides])
    return found[0]


def test_spots_in_another_frame_are_copied_where_siid_puts_them(world, perfect, monkeypatch):
    """Without `transform` the baselines copied spots from the wrong place, and SIID looked the better for it."""
    turned = world.reference.copy()
    turned.obsm["spatial"] = turned.obsm["spatial"] @ np.array([[0.0, 2.0], [-2.0, 0.0]]) + [300, -50]
    back = np.linalg.inv([[0, -2, 300], [2, 0, -50], [0, 0, 1]]).tolist()
    plain, moved = copied(monkeypatch, world.target, world.reference), copied(monkeypatch, world.target, turned, f"transform={back}")
    np.testing.assert_array_equal(moved[0], plain[0])


def test_spots_are_copied_from_the_own_section(world, perfect, monkeypatch):
    """Two sections in one range of coordinates; the spots of one of them have no counts but in one gene."""
    import anndata as ad

    barren = world.reference.copy()
    barren.X = sp.csr_matrix(np.ones(barren.shape, np.float32))
    pairs = {"target": (world.target, world.target), "reference": (world.reference, barren)}
    both = {role: ad.concat(dict(zip("ab", pair, strict=True)), label="slide", index_unique="-") for role, pair in pairs.items()}
    monkeypatch.setattr(ev, "fit", lambda method, target, reference, **options: Stub(target, both["target"]))
    found, split = copied(monkeypatch, both["target"], both["reference"], "library_key=slide")
    second = split.target.obs["slide"].to_numpy() == "b"
    assert (found[second] == 1).all() and not (found[~second] == 1).all()


def test_as_few_genes_as_a_fit_needs_are_enough_or_refused_before_it(world, perfect):
    """Ten shared genes were asked for, or a fit in the middle failed."""
    done = ev.evaluate(["siid"], world.target[:, :6].copy(), world.reference, folds=6, max_folds=1, baselines=False)
    assert len(done.scores) == 1
    Stub.seen.clear()
    with pytest.raises(UserError, match=r"hiding 2 of 6 shared genes leaves 4, but a fit needs 5: hide fewer \(--folds 6 or more\)"):
        ev.evaluate(["siid"], world.target[:, :6].copy(), world.reference, folds=5, baselines=False)
    with pytest.raises(UserError, match="hiding 1 of 5 shared genes leaves 4, but a fit needs 5: a panel of 6 or more is needed"):
        ev.evaluate(["siid"], world.target[:, :5].copy(), world.reference, folds=5, baselines=False)
    assert not Stub.seen


def test_a_folds_file_is_followed(world, perfect, tmp_path):
    genes = list(world.target.var_names)
    file = tmp_path / "folds.tsv"
    file.write_text(f"# mine\n{genes[3]}\t10\n{genes[1]}\t2\n\n{genes[0]}\t10\n")
    done = ev.evaluate(["siid"], world.target, world.reference, folds=file, baselines=False, out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["inputs"]["folds"]["sha256"] == hash_path(file)
    assert [tuple(row) for row in done.scores[["fold", "gene"]].to_numpy()] == [
        ("2", genes[1]), ("10", genes[0]), ("10", genes[3]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene0001 2\n", "line 1.*not gene<TAB>fold"),
        ("gene0001\t1\ngene0001\t2\n", "line 2: gene0001 is already in line 1"),
        ("# nothing\n", "names no gene"),
        ("gene0001\t1\nGfap\t1\n", "1 genes are not shared.*Gfap"),
    ],
)
def test_a_bad_folds_file_is_refused(world, tmp_path, text, message):
    file = tmp_path / "folds.tsv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        ev.evaluate(["siid"], world.target, world.reference, folds=file)


def test_a_real_fit_against_a_truth_file(world, tmp_path):
    # The truth may list cells in another order, and genes that the reference does not know.
    truth = world.truth[::-1].copy()
    reference = world.reference[:, :-1].copy()
    out = tmp_path / "evaluation"
    done = ev.evaluate(["siid"], world.target, reference, truth=truth, overrides=FAST, draws=20, out=out)
    ours = done.scores[done.scores["method"] == "siid"]
    assert sorted(ours["gene"]) == sorted(world.truth.var_names[:-1])
    assert np.isfinite(ours.select_dtypes("number").to_numpy()).all()
    assert {"log_score", "crps", "coverage_90", "seconds", "peak_gb"} <= set(ours)
    assert (ours["peak_gb"] > 0).all() and (ours["seconds"] > 0).all()
    # Aligned by name: a fit beats chance on genes with a contrast of 1, which shuffled cells would not.
    assert ours["raw_pcc"].mean() > 0.3
    means = done.summary.set_index(["method", "metric"])["mean"]
    assert means["siid", "raw_pcc"] == pytest.approx(ours["raw_pcc"].mean())
    # The files hold the same numbers, and the report is made from them alone.
    np.testing.assert_allclose(pd.read_csv(out / "summary.csv")["mean"], done.summary["mean"])
    assert len(pd.read_csv(out / "scores.csv")) == len(done.scores)
    (entries,) = read_entries(out).values()
    mine = done.scores[done.scores["method"] == "siid"].set_index("gene")["log_score"]
    np.testing.assert_allclose(entries.mean(0), mine[entries.columns], rtol=1e-4)  # fewer cells than are kept
    tables = overview(pd.read_csv(out / "summary.csv"))
    assert "siid\n(method)" in tables["Raw counts"].index
    assert tables["Predictive distribution"].shape[0] == 1  # baselines have no distribution
    report_folder(out, tmp_path / "report.html")
    assert "supervised_ridge" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="already holds an evaluation"):
        ev.evaluate(["siid"], world.target, reference, truth=truth, out=out)


@pytest.mark.slow
def test_memory_blocks_do_not_change_the_accuracy(world, perfect):
    a, b = (
        ev.evaluate(["siid"], world.target, world.reference, folds=3, baselines=False, memory_gb=gb).scores
        for gb in (1.0, 2 * 32 * CELLS / 1e9)
    )
    columns = ["gene", "fold", "raw_pcc", "log_scc", "raw_partial_pcc"]
    pd.testing.assert_frame_equal(a[columns], b[columns])


def test_ranks_come_from_the_mean_over_genes():
    rows = [
        {"method": m, "kind": "method", "fold": "0", "gene": g, "raw_pcc": v, "raw_js": v, "seconds": 2.0}
        for m, values in {"worse": (0.1, 0.2), "better": (0.4, 0.1)}.items()
        for g, v in zip("ab", values, strict=True)
    ]  # fmt: skip
    summary = ev.summarise(pd.DataFrame(rows).assign(peak_gb=1.0)).set_index(["method", "metric"])
    assert summary.loc[("better", "raw_pcc"), "rank"] == 1 and summary.loc[("worse", "raw_pcc"), "rank"] == 2
    assert summary.loc[("better", "raw_pcc"), "median"] == 0.25
    assert pd.isna(summary.loc[("better", "raw_js"), "rank"])
    assert summary.loc[("worse", "seconds"), "mean"] == 2


def test_wrong_requests_are_refused_before_any_fit(world):
    with pytest.raises(UserError, match="did you mean 'siid'"):
        ev.evaluate(["sid"], world.target, world.reference)
    with pytest.raises(UserError, match="name each method once"):
        ev.evaluate([], world.target, world.reference)
    for number in (0, -1):
        with pytest.raises(UserError, match=f"max_folds={number}; at least 1"):
            ev.evaluate(["siid"], world.target, world.reference, max_folds=number)
    with pytest.raises(UserError, match="no_such_knob"):
        ev.evaluate(["siid"], world.target, world.reference, overrides=["no_such_knob=1"])
    with pytest.raises(UserError, match="none of its 30 genes is new"):
        ev.evaluate(["siid"], world.target, world.reference, truth=world.target)
    with pytest.raises(UserError, match="10 of the target's 250 cells are not in it"):
        ev.evaluate(["siid"], world.target, world.reference, truth=world.truth[10:].copy())


def test_targets_without_coordinates_are_told_of_the_option():
    pair = spatial_field(seed=1, n_cells=60, n_reference=60, n_genes=24, n_panel=16)
    del pair.target.obsm["spatial"]
    with pytest.raises(UserError, match=r"no obsm\['spatial'\], which the baselines need; .*--no-baselines"):
        ev.evaluate(["spaim"], pair.target, pair.reference, folds=3)


def test_splits_are_made_one_at_a_time_and_columns_of_another_run_dropped(world, perfect, monkeypatch):
    made, target = [], world.target.copy()
    target.obs["vista_shared_total"] = 1.0
    monkeypatch.setattr(ev, "_Task", lambda *parts, task=ev._Task: made.append(parts[0]) or task(*parts))
    ev.evaluate(["siid"], target, world.reference, folds=3, max_folds=1, baselines=False)
    assert made == ["0"] and list(Stub.seen[0].obs) == list(world.target.obs)


def test_a_score_that_is_not_finite_does_not_cost_the_summary():
    rows = [{"method": m, "kind": "method", "fold": "0", "gene": g, "raw_pcc": 0.5, "seconds": 2.0, "peak_gb": 1.0} for m in "ab" for g in "xy"]
    said = []
    summary = ev.summarise(pd.DataFrame(rows).assign(log_score=[-1.0, -np.inf, -1.0, -2.0]), say=said.append)
    kept = set(zip(summary["method"], summary["metric"], strict=True))
    assert ("a", "log_score") not in kept and {("b", "log_score"), ("a", "raw_pcc")} <= kept
    assert said == ["a: log_score is not finite for 1 of 2 genes, e.g. y, and left out"]


def test_a_gene_of_several_sections_counts_once():
    """Sections of a gene agree: rows as units would make the interval of four sections half as wide as genes allow."""
    rng, gene = np.random.default_rng(0), np.random.default_rng(1).normal(size=100)
    names = [f"g{k}" for k in range(100)]
    parts = [pd.DataFrame({"method": "m", "kind": "method", "fold": f"s{k}", "gene": names, "seconds": 1.0, "peak_gb": 1.0}) for k in range(4)]
    rows = pd.concat([part.assign(raw_pcc=gene + 0.1 * rng.normal(size=100)) for part in parts])
    found, one = (ev.summarise(table).set_index("metric").loc["raw_pcc"] for table in (rows, parts[0].assign(raw_pcc=gene)))
    assert found.genes == one.genes == 100 and found["mean"] == pytest.approx(rows["raw_pcc"].mean())
    assert found["median"] == pytest.approx(np.median(rows.groupby("gene")["raw_pcc"].mean()))
    assert found.hi - found.lo == pytest.approx(one.hi - one.lo, rel=0.05)


def test_one_gene_is_printed_as_its_mean_alone():
    row = {"method": "m", "kind": "method", "fold": "0", "gene": "g", "raw_pcc": 0.5, "seconds": 2.0, "peak_gb": 1.0}
    assert overview(ev.summarise(pd.DataFrame([row])))["Raw counts"].iloc[0, 0] == "0.5"


def test_gene_names_of_either_file_may_lie_in_a_column(world, tmp_path):
    options = {"folds": 3, "max_folds": 1, "baselines": False, "draws": 10}
    reference = world.reference.copy()
    reference.var["symbol"] = reference.var_names
    reference.var_names = [f"ENSG{g:05d}" for g in range(reference.n_vars)]
    scores = [
        ev.evaluate(["siid"], world.target, table, overrides=[*FAST, *more], **options).scores.drop(columns=["seconds", "peak_gb"])
        for table, more in ((world.reference, []), (reference, ['gene_key="symbol"']))
    ]
    pd.testing.assert_frame_equal(*scores)
    with pytest.raises(UserError, match=r"gene_key 'name': neither target \(AnnData\) nor reference"):
        ev.evaluate(["siid"], world.target, reference, overrides=["gene_key=name"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_further_layers_of_the_reference_reach_the_fit(monkeypatch):
    world = spatial_field(seed=1, n_cells=120, n_reference=100, n_genes=24, n_panel=16, rho=3.0)
    world.reference.layers["spliced"] = world.reference.X.copy()
    runs, fit = [], ev.fit
    monkeypatch.setattr(ev, "fit", lambda *arguments, **options: runs.append(fit(*arguments, **options)) or runs[-1])
    fast = ["penalty=3", "reweight=false", "process=0", "fit.steps=2", 'reference_layers=["spliced"]']
    ev.evaluate(["vista"], world.target, world.reference, folds=3, max_folds=1, baselines=False, draws=4, overrides=fast)
    assert "gene0000:spliced" in runs[0].genes


@pytest.mark.parametrize("finished", [0, 1])
def test_what_a_failed_evaluation_leaves(world, perfect, monkeypatch, tmp_path, finished):
    stub, left = ev.fit, [None] * finished

    def fails(*arguments, **options):
        if not left:
            raise UserError("no GPU")
        left.pop()
        return stub(*arguments, **options)

    monkeypatch.setattr(ev, "fit", fails)
    with pytest.raises(UserError, match="no GPU"):
        ev.evaluate(["siid"], world.target, world.reference, folds=3, baselines=False, out=tmp_path / "new" / "scores")
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept == (["evaluation.json", "log_prob.npz", "scores.csv"] if finished else []) and (tmp_path / "new").exists() == bool(finished)


@pytest.mark.parametrize("name", ["scores.csv", "summary.csv", "log_prob.npz"])
def test_an_older_evaluation_is_left_as_it_is(world, perfect, monkeypatch, tmp_path, name):
    """Whatever is left of it: its record was replaced, and removed where the first split failed. Also where it appears while the data are read."""
    old = {"evaluation.json": "{}", name: "old"}

    def write():
        for file, text in old.items():
            (tmp_path / file).write_text(text)

    def kept():
        return {file.name: file.read_text() for file in tmp_path.iterdir()}

    read = ev.read_pair
    monkeypatch.setattr(ev, "read_pair", lambda *arguments, **options: write() or read(*arguments, **options))
    for _ in ("appears", "was there"):
        with pytest.raises(UserError, match=rf"already holds an evaluation \({name}\)"):
            ev.evaluate(["siid"], world.target, world.reference, folds=3, baselines=False, out=tmp_path)
        assert kept() == old
    with pytest.raises(UserError, match="already holds an evaluation"):
        evaluate_spots(["xfuse"], [tmp_path / "unread.h5ad"], out=tmp_path)
    assert kept() == old

"""The report of a run says what the run says: same scores, same choice of genes, warnings where they are due."""

import json
import re
from dataclasses import replace
from html import unescape

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch

from ppl_st import api, calibration_plots, refit, report_run, report_sections
from ppl_st.browser import decode
from ppl_st.calibration import GRID
from ppl_st.checks import Checks, predictive_checks
from ppl_st.conformal import KNOTS, Inner, Recalibration
from ppl_st.errors import UserError
from ppl_st.simulate import checkerboard
from ppl_st.warning_signs import warning_signs

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:bokeh")


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=2, n_cells=250, side=6, squares=6, n_types=4, n_genes=40, n_panel=30, contrast=1.0)


@pytest.fixture(scope="module")
def run(sim, tmp_path_factory):
    overrides = ["factors=4", "chains=1", "sparsity=0.0", "sweeps=4", "fit.steps=3"]
    out = tmp_path_factory.mktemp("report") / "run"
    return api.fit("siid", target=sim.target, reference=sim.reference, overrides=overrides, seed=3, out=out)


def data(page):
    return json.loads(re.search(r'<script type="application/json" id="gene-data">(.*?)</script>', page, re.DOTALL)[1])


def text(page):
    """What a reader reads: no scripts, no tags."""
    bare = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", bare))


@pytest.fixture(scope="module")
def raw(run, sim, tmp_path_factory):
    """A report with a truth, and what was said."""
    said, path = [], tmp_path_factory.mktemp("raw") / "r.html"
    shuffled = sim.truth[np.random.default_rng(0).permutation(250)].copy()
    report_run.report_folder(run.folder, path, truth=shuffled, draws=20, say=said.append)
    return path.read_text(encoding="utf-8"), said


def test_report_with_a_truth(run, sim, raw):
    page, said = raw
    words, stored = text(page), data(page)
    scores = run.score(sim.truth, draws=20)
    assert f"{scores['log_score'].mean():.4g}" in words and f"{scores['coverage_90'].mean():.4g}" in words
    for part in ("In short", "Gene browser", "Accuracy on held-out genes", "noise ceiling", "baseline: spot_copy", "upper reference", "Calibration",
                 "Reliable and unreliable genes", "How to read this", "250 cells with 30 genes", "36 spots with 40 genes", "seed 3"):  # fmt: skip
        assert part in words, part
    assert {gene["name"] for gene in stored["genes"]} == set(sim.truth.var_names)
    one = next(gene for gene in stored["genes"] if gene["name"] == sim.truth.var_names[4])
    np.testing.assert_array_equal(decode(one["maps"]["truth"]), sim.truth.X.toarray()[:, 4])  # in the order of the run's cells
    want = run.predict([sim.truth.var_names[4]], truth=sim.truth, draws=20)
    assert decode(one["maps"]["mean"]).mean() == pytest.approx(want.X.mean(), rel=0.2)  # other gene blocks, other draws
    pcc = [float(dict(gene["facts"])["PCC (ceiling)"].split()[0]) for gene in stored["genes"]]
    assert pcc == sorted(pcc, reverse=True)  # from the best predicted to the worst
    assert "Few shared genes: target and reference have 30" in words and "Small reference: 36 rows" in words and "intervals are raw" in words
    assert len(said) == 4 and page.count("data:image/png") >= 5
    links = re.findall(r'<a href="#gene=([^"]+)">', page)
    assert set(links) == set(sim.truth.var_names)


def test_every_figure_has_a_caption_with_a_sentence(raw):
    page = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", raw[0], flags=re.DOTALL)
    figures = re.findall(r"<figure[^>]*>(.*?)</figure>", page, re.DOTALL)
    drawn = [one for one in figures if "<table" not in one]
    assert len(drawn) == page.count("<img ") + 4  # and the maps of the browser
    for one in figures:
        caption = re.search(r"<figcaption>(.*?)</figcaption>", one, re.DOTALL)
        assert caption and re.search(r"\.$", caption[1].strip()), one[:300]
        assert "<table" in one or len(caption[1].split()) > 8, caption[1]
    assert all(re.search(r"no unit|counts|share|nats|median", one) for one in drawn)  # what is drawn has a unit


@pytest.mark.parametrize("noun", ["cell", "spot"])
def test_the_mean_count_of_genes_is_per_row(noun):
    scores = pd.DataFrame({"trust": [0.5, 0.1], "mean_count": [2.0, 1.0]}, index=["a", "b"])
    (table,) = report_sections.genes(scores, {}, noun).tables
    assert table.units["mean count"] == f"counts per {noun}" and "upper bound" in table.caption


def test_baselines_copy_spots_where_siid_puts_them(run, sim):
    """Coordinates of the file are in another frame where `transform` is set, and of several sections in the same range."""
    predicted = run.predict(sim.truth.var_names, draws=4, lognorm=True)
    elsewhere = replace(run, reference=replace(run.reference, xy=run.reference.xy[::-1]))
    plain, other = (report_run._methods(one, run.counts_of(sim.truth), predicted, 0)["baseline: spot_copy"] for one in (run, elsewhere))
    pd.testing.assert_frame_equal(plain, other)


def test_three_cells_have_a_report(run, sim, tmp_path):
    """Moran's I needs four, the upper reference five."""
    settings = [*run.manifest["overrides"], "radius=70"]
    few = api.fit("siid", target=sim.target[:3].copy(), reference=sim.reference, overrides=settings, seed=3)
    report_run.report_run(few, tmp_path / "r.html", truth=sim.truth[:3].copy(), draws=4)
    words = unescape(text((tmp_path / "r.html").read_text(encoding="utf-8")))
    assert "zero fraction" in words.split("Would the model's own data look like yours?")[1] and "spot_copy" in words
    table = predictive_checks(few, draws=4).genes
    assert set(table["statistic"]) == {"mean", "variance", "zero fraction"}


def test_a_small_panel_is_refused_before_any_refit(run, monkeypatch):
    monkeypatch.setattr(refit, "train", None)
    for genes, folds, remedy in ((6, 5, r"leaves 4, but a fit needs 5: hide fewer \(--folds 6 or more\)"), (5, 5, "a panel of 6 or more is needed")):
        small = replace(run, folder=None, target=run.target.take_genes(run.target.genes[:genes]))
        with pytest.raises(UserError, match=remedy):
            refit.recalibrate(small, folds=folds)


def test_warnings_say_what_was_measured(run):
    scores = pd.DataFrame({"trust": [0.5, 0.01], "coverage_90": 0.9}, index=["a", "b"])
    trust, intervals = warning_signs(run, scores, {}, "cell", 0)[-2:]
    assert "for 1 of 2 genes looked at (e.g. b)" in trust and "an upper bound, is below 5%" in trust and "expects" not in trust
    assert "about right on the data that it was measured on" in intervals and "hides genes of the panel in turn" in intervals


def test_sums_over_genes_that_the_model_is_too_sure_of_are_a_warning(run):
    scores = pd.DataFrame({"trust": [0.5, 0.6], "coverage_90": 0.9, "raw_pcc": 0.5}, index=["a", "b"])
    for inside, told in ((0.72, 1), (0.88, 0)):
        checks = Checks(pd.DataFrame(), pd.DataFrame({"inside": [inside] * 10}))
        found = warning_signs(run, scores, {run.method: scores}, "cell", 0, checks)
        assert sum(line.startswith("Sums over genes") and "for 72%" in line for line in found) == told


def test_genes_off_the_panel_are_a_warning_where_no_truth_judges_them(run):
    names = [run.genes[run.measured][0], *run.genes[~run.measured][:2]]
    scores = pd.DataFrame({"trust": 0.5, "coverage_90": 0.9, "raw_pcc": 0.5}, index=names)
    told = [line for line in warning_signs(run, scores, {}, "cell", 0) if line.startswith("Off the panel")]
    assert len(told) == 1 and "2 of 3 genes looked at are not among the counts of this fit" in told[0]
    assert not any("Off the panel" in line for line in warning_signs(run, scores, {run.method: scores}, "cell", 0))
    assert not any("Off the panel" in line for line in warning_signs(run, scores.iloc[:1], {}, "cell", 0))


def test_the_interval_with_the_guarantee_is_drawn_where_it_is_promised(run, monkeypatch):
    """Its ends are not those of the corrected forecast: the curve of that one stood beside coverages it did not have."""
    drawn, draw = [], calibration_plots.calibration_curve
    monkeypatch.setattr(calibration_plots, "calibration_curve", lambda *given: drawn.append(given) or draw(*given))
    rng, genes = np.random.default_rng(0), run.genes[:4]
    low = rng.uniform(0, 0.9, (50, 4))
    table = ad.AnnData(np.zeros((50, 4), np.float32), layers={"pit_low": low, "pit_high": low + 0.1})
    table.var_names = genes
    scores = pd.DataFrame({"recalibrated_coverage": [0.9, 0.95, 0.99, 1.0], "crps": 1.0, "recalibrated_crps": 1.0}, index=genes)
    scores = scores.assign(**{f"coverage_{level}": 0.9 for level in (50, 80, 90, 95)})
    layer = Recalibration(0.8, [], [np.clip(0.5 + 2 * (KNOTS - 0.5), 0, 1).tolist()], [0.96], 4, 0.7)
    shown = report_sections.calibration(replace(run, recalibration=layer), table, scores)
    levels, curves, _, promised = drawn.pop()
    assert list(curves) == ["raw"] and promised == (0.8, pytest.approx(0.96)) and "guarantee, at this level alone" in shown.text
    inner = Inner(genes, np.stack([KNOTS, KNOTS**2, KNOTS, KNOTS], 1), np.zeros(0, str), np.zeros((0, 4), np.float32))
    report_sections.inner_calibration(run, inner, layer)
    _, curves, _, promised = drawn.pop()
    assert list(curves) == ["raw"] and promised == (0.8, pytest.approx(0.96)) and len(levels) == len(GRID)  # .98^2 - .02^2 = .96, too
    report_sections.calibration(replace(run, recalibration=layer._replace(nominal=[])), table, scores)
    assert list(drawn[-1][1]) == ["raw", "recalibrated"] and drawn[-1][3] is None
    assert "80 and 97" not in shown.text  # what is about right for 90 %
    shown = report_sections.calibration(replace(run, recalibration=layer._replace(level=0.9)), table, scores)
    assert "hold 96.0% of the held-out counts (raw: " in shown.text and ", and between 80 and 97 % for 2 of the 4 genes. CRPS" in shown.text


def test_more_genes_than_a_page_can_hold_are_refused_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_run, "MAX_ENTRIES", 3.5 * 250)
    monkeypatch.setattr(type(run), "predict", None)
    with pytest.raises(UserError, match=r"4 genes in 250 rows .* name 3 or fewer \(--genes\), and use ppl-st predict"):
        report_run.report_run(run, tmp_path / "r.html", genes=run.genes[:4].tolist())
    assert not (tmp_path / "r.html").exists()


def test_a_map_that_runs_against_the_counts_is_the_greatest_risk():
    risk = report_sections.risk_of(pd.Series([0.5, -0.9, 0.1]))
    assert np.argsort(risk).tolist() == [0, 2, 1] and risk[1] == 1


def test_report_without_a_truth_and_in_memory(run, tmp_path, monkeypatch):
    monkeypatch.setattr(report_run, "SCREENED", 8)
    monkeypatch.setattr(report_run, "BROWSED", 5)
    report_run.report_run(replace(run, folder=None), tmp_path / "r.html", draws=15, seed=1)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    highest = run.genes[~run.measured][np.argsort(-run.reference_mean[~run.measured], kind="stable")[:8]]
    trust = run.predict(highest, draws=15, seed=1).var["trust"].sort_values(ascending=False, kind="stable")
    assert [gene["name"] for gene in data(page)["genes"]] == trust.index[:5].tolist()
    assert "truth" not in data(page)["genes"][0]["maps"]
    assert "Accuracy" not in text(page) and "trusts most among the 8 unmeasured genes" in text(page)


def test_chosen_genes_measured_or_not(run, sim, tmp_path):
    genes = [run.genes[run.measured][2], sim.truth.var_names[0]]
    report_run.report_run(run, tmp_path / "r.html", genes=genes, draws=10)
    stored = data((tmp_path / "r.html").read_text(encoding="utf-8"))["genes"]
    assert [gene["name"] for gene in stored] == genes
    np.testing.assert_array_equal(decode(stored[0]["maps"]["truth"]), sim.target[:, genes[0]].X.toarray().ravel())
    assert dict(stored[0]["facts"])["in the panel"].startswith("yes")
    assert np.isnan(decode(stored[1]["maps"]["truth"])).all() and dict(stored[1]["facts"])["in the panel"].startswith("no")
    with pytest.raises(UserError, match="nonsense"):
        report_run.report_run(run, tmp_path / "n.html", genes=["nonsense"], draws=4)
    assert not (tmp_path / "n.html").exists()


@pytest.mark.slow
def test_recalibrated_intervals_are_the_ones_shown(run, sim, raw, tmp_path):
    narrow = np.clip(0.5 + 2.5 * (KNOTS - 0.5), 0, 1)  # as if the raw forecasts were much too wide
    layer = Recalibration(0.9, [], [narrow.tolist()], [], 30, 0.8)
    report_run.report_run(replace(run, recalibration=layer), tmp_path / "r.html", truth=sim.truth, draws=20)
    pages = [(tmp_path / "r.html").read_text(encoding="utf-8"), raw[0]]
    widths = [sum(decode(gene["maps"]["width"]).sum() for gene in data(page)["genes"]) for page in pages]
    assert widths[0] < widths[1]  # the middle 36 % of the raw forecast against 90 %
    assert "90 % interval (recalibrated)" in pages[0] and "90 % interval (raw)" in pages[1]
    assert "Recalibrated 90% intervals hold" in text(pages[0]) and "intervals are raw" not in text(pages[0])
    titles = [set(re.findall(r"<figcaption>([^<]{20})", page)) for page in pages]
    assert titles[0] == titles[1] and {"Share of held-out co", "Randomised PIT of th", "What goes wrong (1 -"} <= titles[0]
    boundless = replace(run, recalibration=layer._replace(nominal=[1.0]))
    report_run.report_run(boundless, tmp_path / "b.html", truth=sim.truth, draws=10)
    page = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert np.isnan(decode(data(page)["genes"][0]["maps"]["width"])).all() and "No finite interval" in text(page)


def test_calibration_on_hidden_genes_stands_in_for_a_truth(run, tmp_path, monkeypatch):
    drawn, draw = {}, calibration_plots.calibration_curve
    monkeypatch.setattr(calibration_plots, "calibration_curve", lambda *given: drawn.update(given[1]) or draw(*given))
    better = refit.recalibrate(replace(run, folder=None), folds=2, draws=10)
    report_run.report_run(better, tmp_path / "r.html", draws=5)
    words = text((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "30 genes of the panel were hidden in turn" in words and f"{better.recalibration.raw_coverage:.1%} of their counts" in words
    at = np.argmin(np.abs(GRID - 0.9))
    assert drawn["raw"][at] == pytest.approx(better.recalibration.raw_coverage, abs=0.01)
    assert abs(drawn["recalibrated"][at] - 0.9) <= abs(drawn["raw"][at] - 0.9) + 1e-9


def test_what_cannot_be_reported_is_refused(run, sim, tmp_path):
    with pytest.raises(UserError, match=r"none of its 30 genes was hidden.*--hold-out"):
        report_run.report_run(run, tmp_path / "r.html", truth=sim.target, draws=4)
    with pytest.raises(UserError, match="neither a run folder nor an evaluation"):
        report_run.report_folder(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    nowhere = replace(run, target=replace(run.target, xy=None))
    report_run.report_run(nowhere, tmp_path / "r.html", truth=sim.truth, draws=4)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "no maps to browse" in text(page) and "Accuracy" in text(page) and "gene-data" not in page


def test_dissociated_reference(tmp_path):
    """A method whose reference are cells: its own baselines stand beside it."""
    from ppl_st.simulate import spatial_field

    world = spatial_field(seed=1, n_cells=150, n_reference=150, n_genes=90, n_panel=36)
    run = api.fit("spaim", target=world.target, reference=world.reference, overrides=["clusters=8", "process=0", "smoothing=0"], seed=0)
    report_run.report_run(run, tmp_path / "r.html", truth=world.truth, draws=5)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "baseline: ridge_z_smooth" in text(page) and len(data(page)["genes"]) == min(50, world.truth.n_vars)


def test_default_genes_are_the_best_the_worst_and_some_between(run, sim):
    scores = run.predict(sim.truth.var_names, truth=sim.truth, draws=3).var.assign(raw_pcc=np.linspace(1, 0, 10))
    wide = scores.loc[np.repeat(scores.index, 20)].set_axis([f"g{k}" for k in range(200)]).assign(raw_pcc=np.linspace(1, 0, 200))
    genes, said = report_run._browsed(run, wide.index.tolist(), wide, None, True)
    assert len(genes) == len(set(genes)) == 50 and "50 of 200" in said
    assert genes[:10] == [f"g{k}" for k in range(10)] and genes[-10:] == [f"g{k}" for k in range(190, 200)]


def test_sections_stand_side_by_side():
    table = ad.AnnData(np.zeros((6, 1), np.float32), obs={"section": ["b", "b", "b", "a", "a", "a"]})
    table.obsm["spatial"] = np.array([[0, 0], [10, 5], [5, 9], [2, 100], [12, 104], [3, 108]], float)
    xy = report_run._apart(table, None)
    np.testing.assert_allclose(xy[:3], [[0, 0], [10, 5], [5, 9]])
    np.testing.assert_allclose(xy[3:], [[11, 0], [21, 4], [12, 8]])
    del table.obs["section"]
    np.testing.assert_array_equal(report_run._apart(table, None), table.obsm["spatial"])


@pytest.mark.slow
def test_method_of_images(tmp_path):
    """Spots, not cells; every gene was fitted; no reference to warn about; two sections side by side."""
    from ppl_st.shapes import shapes

    world = shapes(seed=0, sections=2, size=128, spots="hexagonal", pitch=18.0)
    (tmp_path / "c.toml").write_text(tomli_w.dumps({"input": world.settings}))
    small = ["fit.steps=2", "metagenes=2", "patch=64", "batch_patches=1", "channels=4", "depth=2", "functions=32"]
    sections = {"target": [section.adata for section in world.sections], "image": [section.image for section in world.sections]}
    run = api.fit("xfuse", **sections, config=tmp_path / "c.toml", overrides=small, seed=0)
    report_run.report_run(run, tmp_path / "r.html", draws=4)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Every gene here was fitted" in text(page) and "reference" not in text(page).split("Gene browser")[0]
    stored = data(page)
    assert stored["noun"] == "spot" and len(stored["genes"]) == min(50, len(run.genes))
    np.testing.assert_array_equal(
        decode(stored["genes"][0]["maps"]["truth"]), run.target.take_genes([stored["genes"][0]["name"]]).matrix.toarray().ravel()
    )


def test_groups_checks_and_variance_are_shown_and_many_cells_thinned(run, sim, tmp_path, monkeypatch):
    monkeypatch.setattr(report_run, "MAX_CELLS", 100)
    halves = np.where(run.target.xy[:, 0] > np.median(run.target.xy[:, 0]), "east", "west")
    labelled = replace(run, target=replace(run.target, obs=run.target.obs.assign(half=halves)))
    report_run.report_run(labelled, tmp_path / "r.html", truth=sim.truth, groups="half", draws=10)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    words = unescape(text(page))
    assert len(decode(data(page)["genes"][0]["maps"]["mean"])) == 100 and "Of 250 cells 100, picked at random" in words
    table = words.split("The same in each group of cells")[1]
    assert [name for name in ("all", "east", "west") if f" {name} " in table[:400]] == ["all", "east", "west"]
    assert "On 10 genes that were hidden from the fit the mean correlation" in words and "variance: pattern" in words
    checked = words.split("Would the model's own data look like yours?")[1][:1500]
    assert "of 10 genes" in checked and "Moran's I" in checked and "hidden from the fit" in checked
    with pytest.raises(UserError, match=r"groups 'half': .* give --truth COUNTS\.h5ad, or leave out --groups"):
        report_run.report_run(labelled, tmp_path / "n.html", groups="half", draws=4)
    with pytest.raises(UserError, match="no column 'half' in obs"):
        report_run.report_run(run, tmp_path / "n.html", truth=sim.truth, groups="half", draws=4)
    assert not (tmp_path / "n.html").exists()

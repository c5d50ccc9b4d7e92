"""A fitted XFuse run on small sections: folder, places, maps, regions, evaluation, commands."""

import json
import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image
from typer.testing import CliRunner

import ppl_st
import ppl_st.demo
from ppl_st import api
from ppl_st.cli import app
from ppl_st.compare import compare
from ppl_st.errors import UserError
from ppl_st.evaluate_images import evaluate_spots, hidden_rows, visible
from ppl_st.image_cli import predict_places
from ppl_st.image_run import read_sections, spots_of
from ppl_st.models.xfuse.data import Input
from ppl_st.prepare.xfuse import problem, without
from ppl_st.report import overview
from ppl_st.shapes import shapes

KNOBS = {"sections": 2, "size": 128, "spots": "hexagonal", "pitch": 18.0}
FAST = ["fit.steps=12", "metagenes=4", "patch=64", "batch_patches=1", "channels=4", "depth=2", "functions=32"]


@pytest.fixture(scope="module")
def world():
    return shapes(seed=0, **KNOBS)


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """Files of the simulation, annotation included, and a run made by the command."""
    folder = tmp_path_factory.mktemp("xfuse")
    ok("simulate", "shapes", "--out", folder / "data", *[f"--set={key}={value}" for key, value in KNOBS.items()])
    for n, section in enumerate(world.sections):
        Image.fromarray(section.kind.astype(np.uint8)).save(folder / f"kind{n}.png")
    notes = json.dumps([str(folder / f"kind{n}.png") for n in range(2)])
    ok("fit", "xfuse", *inputs(folder), "--out", folder / "run", *sets(f"input.annotation={notes}"))
    return folder


def inputs(folder):
    found = ["--config", folder / "data/config.toml"]
    for n in range(2):
        found += ["--target", folder / f"data/section{n}.h5ad", "--image", folder / f"data/section{n}.png"]
    return found


def sets(*more):
    return [f"--set={one}" for one in (*FAST, *more)]


def ok(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], prog_name="ppl-st")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments):
    result = CliRunner().invoke(app, [str(one) for one in arguments], prog_name="ppl-st")
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def run(base):
    return ppl_st.load(base / "run")


def test_the_folder_holds_the_sections(base, world, run):
    data, spots = read_sections(base / "run")
    settings = Input(**{**world.settings, "annotation": tuple(str(base / f"kind{n}.png") for n in range(2))})
    fresh, kept = problem(world.slides, settings, lambda line: None)
    assert data.genes.tolist() == fresh.genes.tolist() and spots.names.tolist() == spots_of(fresh, kept).names.tolist()
    for stored, made in zip(data.sections, fresh.sections, strict=True):
        for name, value in made._asdict().items():
            other = getattr(stored, name)
            if name == "counts":
                assert (value != other).nnz == 0 and value.shape == other.shape
            elif isinstance(value, np.ndarray):
                assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=value.dtype.kind == "f"), name
            else:
                assert value == other or (value != value and other != other), name
    manifest = json.loads((base / "run" / "manifest.json").read_text())
    assert {"target", "image", "target1", "image1"} <= set(manifest["inputs"]) and manifest["method"] == "xfuse"


def test_a_loaded_run_predicts_what_the_fit_predicts(base, world, run):
    again = ppl_st.load(base / "run").predict(draws=4)
    first = run.predict(draws=4)
    assert first.shape == (sum(one.adata.n_obs for one in world.sections), 3) and (first.X == again.X).all()
    assert {"rate_mean", "rate_sd", "count_sd", "q05", "q50", "q95"} <= set(first.layers) and first.obs["section"].nunique() == 2
    assert (first.layers["count_sd"] >= first.layers["rate_sd"]).all()


def test_tables_of_places_hold_profiles_of_the_metagenes_for_their_genes(run, tmp_path):
    asked = ["square_marker", "circle_marker"]
    made = run.predict(asked, draws=2)
    run.write(tmp_path / "w.h5ad", asked, draws=2)
    made.write_h5ad(tmp_path / "p.h5ad")
    written, read = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in "wp")
    tables, units = run.module.profiles(run.pair, run.config)
    rows = [run.genes.tolist().index(gene) for gene in asked]
    for table in (made, written, read):
        assert set(table.varm) == set(tables) and dict(table.uns["units"]) == units
        for name, values in tables.items():
            np.testing.assert_array_equal(table.varm[name], values[rows])
    fold = made.varm["metagene_log2_fold_mean"]
    own = made.obsm["metagenes"][:, np.argmax(fold[0] - fold[1])]  # where squares are, the metagene of their marker is
    assert np.corrcoef(own, made.X[:, 0] / made.X.sum(1))[0, 1] > 0.5


def test_resume_after_a_crash_gives_the_same_weights(base, world, tmp_path):
    options = {"target": [one.adata for one in world.sections], "image": [one.image for one in world.sections], "config": base / "data/config.toml"}
    whole = api.fit("xfuse", **options, overrides=FAST, out=tmp_path / "whole")
    with pytest.raises(UserError, match="already holds a run"):
        api.fit("xfuse", **options, overrides=FAST, out=tmp_path / "whole")
    (tmp_path / "whole" / "weights.safetensors").unlink()
    resumed = api.fit("xfuse", out=tmp_path / "whole", resume=True)
    for one, other in zip(whole.pair, resumed.pair, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_spots_are_predicted_wherever_they_lie(base, run, world):
    section = run.section("section0")
    own = run.at(world.sections[0].adata, section="section0")
    assert np.array_equal(own.data.sections[0].label, section.label)
    order = np.random.default_rng(0).permutation(world.sections[0].adata.n_obs)
    mean = own.predict(draws=30).layers["rate_mean"]
    moved = run.at(world.sections[0].adata[order], section="section0").predict(draws=30)
    np.testing.assert_allclose(moved.layers["rate_mean"], mean[order], rtol=1e-4)  # rates are means over the effects of spots
    assert abs(np.log(mean[order] / mean)).mean() > 0.3 and (moved.obs["section"] == "section0").all()
    wide = run.at(world.sections[0].adata, section="section0", radius=9.0).predict(draws=30)
    inner = section.centers.min(1) > 20  # a larger disc holds more
    assert (wide.layers["rate_mean"][inner].sum(1) > mean[inner].sum(1)).mean() > 0.9
    with pytest.raises(UserError, match="--section is missing; the run has section0, section1"):
        run.at(world.sections[0].adata)
    with pytest.raises(UserError, match="no section 'x'"):
        run.at(section="x")


def test_maps_are_the_moments_of_the_draws(run, tmp_path):
    seen = run.at(section="section1")
    shape = seen.maps(tmp_path / "m.zarr", ["square_marker", "circle_marker"], draws=3, quantiles=True, seed=5)
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="r")
    assert shape == (2, 128, 128) and group.attrs["genes"] == ["square_marker", "circle_marker"]
    index = seen._index(["square_marker", "circle_marker"])
    predictor = run.module.Predictor(run.pair, seen.data, run.config, run.spec)
    draws = [
        (torch.einsum("mhw,mg->ghw", one.activity, one.shape) * one.odds.exp()[:, None, None]).double().numpy()
        for one in run.module.maps(predictor, index, 3, 5)
    ]
    assert np.allclose(group["mean"][:], np.mean(draws, 0), rtol=1e-4, atol=1e-7)
    assert np.allclose(group["sd"][:], np.std(draws, 0, ddof=1), rtol=1e-3, atol=1e-6)
    assert np.allclose(group["q95"][:], np.quantile(draws, 0.95, axis=0), rtol=1e-3, atol=1e-6)
    assert group["mean"].chunks == (1, 128, 128) and "novelty" not in group
    ome = group.attrs["ome"]
    assert [image["name"] for image in ome["multiscales"]] == ["mean", "sd", "q05", "q95"] and ome["version"] == "0.5"
    assert [axis["name"] for axis in ome["multiscales"][0]["axes"]] == list(group["mean"].metadata.dimension_names)
    assert [channel["label"] for channel in ome["omero"]["channels"]] == group.attrs["genes"]
    assert ome["omero"]["channels"][1]["window"]["end"] == pytest.approx(float(group["mean"][1].max()))


def test_areas_cells_and_spots_are_sums_of_the_map(run, world, monkeypatch, tmp_path):
    seen = run.areas("section0")
    table = seen.predict(draws=4)
    assert table.obs_names.tolist() == ["1", "2", "3"][: table.n_obs]
    kind = world.sections[0].kind
    assert table.obs["pixels"].tolist() == [(kind == k).sum() for k in np.unique(kind) if k]
    assert np.allclose(seen.target.xy[0], np.argwhere(kind == 1)[:, ::-1].mean(0) + 0.5)
    labels = np.zeros_like(kind)
    labels[:64], labels[64:] = 7, 4
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # one latent image, whatever is asked of it
    halves = run.cells(labels, "section0").predict(draws=6)
    assert halves.obs_names.tolist() == ["4", "7"]
    one = run.cells(np.ones_like(kind), "section0").predict(draws=6)
    np.testing.assert_allclose(halves.layers["rate_mean"].sum(0), one.layers["rate_mean"][0], rtol=1e-4)
    run.maps(tmp_path / "m.zarr", section="section0", draws=6)
    mean = zarr.open_group(str(tmp_path / "m.zarr"), mode="r")["mean"][:].sum((1, 2), dtype=float)
    np.testing.assert_allclose(mean, one.layers["rate_mean"][0], rtol=1e-4)
    with pytest.raises(UserError, match="no label above 0"):
        run.cells(np.zeros_like(kind), "section0")


def test_markers_differ_between_regions(run):
    table = run.differential("1", "2", draws=10)
    assert table.loc["circle_marker", "log2_fold_change"] > 1 and table.loc["square_marker", "log2_fold_change"] < -1
    assert table.loc["circle_marker", "probability_up"] == 1 and (table["q05"] <= table["q95"]).all()
    turned = run.differential("2", "1", draws=10)
    assert np.allclose(turned["log2_fold_change"].sort_index(), -table["log2_fold_change"].sort_index())
    with pytest.raises(UserError, match="no region 'tumor' in the annotation; there are 1, 2, 3"):
        run.differential("tumor", "1")


def test_summary_shows_the_kinds(run, world):
    picture = run.summary(section="section0", draws=2)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    colors = [picture[world.sections[0].kind == k].mean(0) for k in (1, 2, 3) if (world.sections[0].kind == k).any()]
    assert min(np.abs(a - b).max() for i, a in enumerate(colors) for b in colors[:i]) > 20


def test_a_color_of_the_summary_is_one_mixture_of_metagenes_in_all_sections(run, monkeypatch):
    """Where no color is cut off, colors of all sections, and of a new image, are one affine function of the mean shares."""
    fresh = run.at(image=shapes(seed=9, sections=1, size=128).sections[0].image)
    parts = []
    for one, n, name in ((run, 0, "section0"), (run, 1, "section1"), (fresh, 0, "new")):
        draws = run.module.maps(run.module.Predictor(run.pair, one.data, run.config, run.spec), np.zeros(0, np.int64), 2, 0, [n])
        share = sum((draw.activity / draw.activity.sum(0)).flatten(1).T.double().numpy() / 2 for draw in draws)
        parts.append(np.column_stack([share, np.ones(len(share)), one.summary(section=name, draws=2).reshape(-1, 3)]))
    for channel in (-3, -2, -1):
        inner = np.concatenate([part[(part[:, channel] > 0) & (part[:, channel] < 255)] for part in parts])
        x, y = inner[:, :-3], inner[:, channel]
        assert np.abs(x @ np.linalg.lstsq(x, y, rcond=None)[0] - y).max() < 0.6, channel  # whole numbers
    assert np.array_equal(run.at(section="section1").summary(draws=2), run.summary(section="section1", draws=2))
    monkeypatch.setattr("ppl_st.image_run.SAMPLED", 2000)
    assert 0 < np.abs(run.summary(section="section0", draws=2).reshape(-1, 3) - parts[0][:, -3:]).mean() < 12


def test_an_image_without_counts(run, world):
    fresh = shapes(seed=9, sections=1, size=128).sections[0]
    seen = run.at(fresh.adata, image=fresh.image)
    table = seen.predict(draws=4)
    assert seen.data.sections[0].name == "new" and table.shape == (16, 3) and np.isfinite(table.X).all()
    known = run.at(world.sections[0].adata, section="section0").predict(draws=4)
    relative = [np.median(one.layers["rate_sd"] / one.layers["rate_mean"]) for one in (table, known)]
    assert relative[0] > relative[1]  # depth and spatial field of a new section are unknown
    with pytest.raises(UserError, match="exclude each other"):
        run.at(section="section0", image=fresh.image)


def test_what_is_asked_of_a_new_image_changes_no_prediction(run):
    image = np.pad(np.random.default_rng(0).integers(90, 190, (100, 100, 3)).astype(np.uint8), ((60, 80), (60, 80), (0, 0)), constant_values=250)
    image[110, 174] = 0
    auto = replace(run, config=replace(run.config, input=replace(run.config.input, mask=("auto",))))
    xy = np.array([[100.0, 100.0], [130.0, 120.0], [172.0, 110.0]])
    asked = [ad.AnnData(obs=pd.DataFrame(index=list("abc")[:n]), obsm={"spatial": xy[:n]}) for n in (2, 3)]
    means = [auto.at(one, image=image).predict(draws=3).layers["rate_mean"] for one in asked]
    np.testing.assert_array_equal(means[1][:2], means[0])


def test_a_new_image_has_the_name_of_no_section_of_the_fit(run):
    """Of a run that looks at one section, too: under the name of another one it would have that one's field and depth."""
    first, second = run.data.sections
    named = replace(run, data=run.data._replace(sections=(first, second._replace(name="new"))))
    fresh = shapes(seed=9, sections=1, size=128).sections[0]
    for one in (named, named.at(section="section0")):
        assert one.at(image=fresh.image).data.sections[0].name == "new2"


# ---- evaluation ----


def test_hidden_counts_cannot_reach_the_fit(world):
    data, kept = problem(world.slides, Input(**world.settings), lambda line: None)
    hidden = hidden_rows(data, kept, 0.5, (), seed=0)
    assert [len(rows) for rows in hidden] == [one.adata.n_obs // 2 for one in world.sections]
    seen, spots = visible(without(data, hidden), kept, hidden)
    slides = world.slides
    for n, rows in enumerate(hidden):
        changed = slides[n].counts.matrix.tolil()
        changed[rows] = 999
        slides[n] = slides[n]._replace(counts=replace(slides[n].counts, matrix=changed.tocsr()))
    other_data, other_kept = problem(slides, Input(**world.settings), lambda line: None)
    other, other_spots = visible(without(other_data, hidden), other_kept, hidden)
    assert (spots.matrix != other_spots.matrix).nnz == 0 and len(spots.names) == sum(len(k.names) - len(h) for k, h in zip(kept, hidden, strict=True))
    for a, b, whole, rows in zip(seen.sections, other.sections, data.sections, hidden, strict=True):
        assert (a.counts != b.counts).nnz == 0 and (a.label == b.label).all()
        assert (a.label[np.isin(whole.label, rows + 1)] == 0).all()
        for row in np.setdiff1d(np.arange(len(whole.centers)), rows)[:5]:
            new = int(a.label[whole.label == row + 1][0]) - 1
            assert (a.counts[new] != whole.counts[row]).nnz == 0 and (a.centers[new] == whole.centers[row]).all()
    none, every = np.zeros(0, int), np.arange(len(kept[1].names))
    gone, table = visible(without(data, [none, every]), kept, [none, every])
    assert [(one.name, len(one.covariates)) for one in gone.sections] == [("section0", 0)] and len(table.names) == len(kept[0].names)
    three = tuple(data.sections[n]._replace(covariates=np.array([code])) for n, code in ((0, 2), (1, 1), (1, 0)))
    left, _ = visible(data._replace(covariates={"section": ("x", "y", "z")}, sections=three), [*kept, kept[1]], [none, every, none])
    assert left.covariates == {"section": ("x", "z")} and [one.covariates.tolist() for one in left.sections] == [[1], [0]]


def test_evaluation_of_hidden_spots_and_of_a_hidden_section(base, world):
    options = {"config": base / "data/config.toml", "overrides": [*FAST, "fit.steps=3"], "draws": 4}
    targets, images = [one.adata for one in world.sections], [one.image for one in world.sections]
    done = evaluate_spots(["xfuse"], targets, images, out=base / "evaluation", **options)
    table = done.scores.set_index("method")
    assert set(table.index) == {"xfuse", "gene_mean", "nearest", "linear", "knn", "color", "gp_space", "gp_image", "gp_space_image"}
    assert set(table["fold"]) == {"section", "section-2"} and len(table.loc["xfuse"]) == 6
    assert table.loc["xfuse", ["log_score", "crps", "coverage_90"]].notna().all(axis=None)
    assert table.loc["gp_space_image", "raw_pcc"].mean() > table.loc["gene_mean", "raw_pcc"].mean() + 0.3
    assert pd.read_csv(base / "evaluation/summary.csv")["method"].nunique() == 9
    assert {"Raw counts", "log(1 + count)"} <= set(overview(done.summary))  # no depth is taken out of hidden spots
    ranked = compare([base / "evaluation"], metric="raw_pcc")
    assert len(ranked) == 9 and (ranked["genes"] == 3).all()
    assert ranked.loc["xfuse", "raw_pcc"] == pytest.approx(table.loc["xfuse", "raw_pcc"].mean())
    unseen = evaluate_spots(["xfuse"], targets, images, sections=["section-2"], **options).scores
    assert set(unseen["fold"]) == {"section-2"} and set(unseen["method"]) == {"xfuse", "gene_mean", "color", "gp_image"}
    with pytest.raises(UserError, match="hold out some of the sections"):
        evaluate_spots([], targets, images, sections=["section", "section-2"], **options)
    with pytest.raises(UserError, match="takes no image"):
        evaluate_spots(["vista"], targets, images, config=None)


def test_a_failed_evaluation_leaves_nothing(base, world, monkeypatch, tmp_path):
    def fails(*arguments):
        raise UserError("no GPU")

    monkeypatch.setattr("ppl_st.evaluate_images.fit_sections", fails)
    targets, images = [one.adata for one in world.sections], [one.image for one in world.sections]
    with pytest.raises(UserError, match="no GPU"):
        evaluate_spots(["xfuse"], targets, images, config=base / "data/config.toml", overrides=FAST, out=tmp_path / "new" / "scores")
    assert not (tmp_path / "new").exists()


# ---- demonstration ----


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    from ppl_st import demo_images

    monkeypatch.setattr(demo_images, "KNOBS", {**KNOBS, "sections": 3})
    done = ppl_st.demo.demo("xfuse", out=tmp_path / "demo", draws=4, overrides=[*FAST, "fit.steps=4"])
    assert set(done.scores["where"]) == {"hidden spots of fitted sections", "unseen section, image only"}
    assert done.scores.query("where == 'unseen section, image only'").index.tolist() == ["xfuse", "gene_mean", "color", "gp_image"]
    assert {"gp_space_image", "knn"} <= set(done.scores.query("where == 'hidden spots of fitted sections'").index)
    assert done.facts["value"].notna().all() and len(done.facts) == 6
    for name in ("report.html", "figures/map_0.png", "figures/map_2.png", "maps/section2.zarr", "run/weights.safetensors", "data/section2.png"):
        assert (tmp_path / "demo" / name).exists(), name
    assert demo_images.auc(np.array([1.0, 2, 2, 3]), np.array([False, True, False, True])) == 0.875
    with pytest.raises(UserError, match="is not empty"):
        ppl_st.demo.demo("xfuse", out=tmp_path / "demo")


# ---- commands ----


def test_commands(base):
    (base / "genes.txt").write_text("circle_marker\n")
    target = base / "data/section1.h5ad"
    ok("predict", base / "run", "--target", target, "--section", "section1", "--draws", 3, "--samples", 2, "--out", base / "s.h5ad")
    assert ad.read_h5ad(base / "s.h5ad").shape[1] == 3 and (base / "s.samples.zarr").is_dir()
    ok("predict", base / "run", "--maps", base / "genes.txt", "--section", "section0", "--draws", 2, "--png", base / "png", "--out", base / "m.zarr")
    assert (base / "png" / "circle_marker.png").is_file()
    image = base / "data/section1.png"
    mapped = ok("predict", base / "run", "--maps", base / "genes.txt", "--image", image, "--quantiles", "--draws", 3, "--out", base / "n.zarr")
    group = zarr.open_group(str(base / "n.zarr"), mode="r")
    assert group["novelty"].shape == (4, 4) and group["q95"].shape == group["mean"].shape and "novelty: median" in mapped.output
    seen = ok("predict", base / "run", "--target", target, "--image", base / "data/section1.png", "--draws", 3, "--out", base / "i.h5ad")
    unlike = ad.read_h5ad(base / "i.h5ad").obs["novelty"]
    assert unlike.between(0, 1).all() and len(unlike) == 52 and "% of the tiles" in seen.output
    ok("predict", base / "run", "--areas", "--section", "section0", "--draws", 2, "--out", base / "areas.h5ad")
    ok("predict", base / "run", "--cells", base / "kind0.png", "--section", "section0", "--draws", 2, "--out", base / "cells.h5ad")
    assert (ad.read_h5ad(base / "cells.h5ad").obs["pixels"].values == ad.read_h5ad(base / "areas.h5ad").obs["pixels"].values).all()
    Image.open(base / "kind0.png").resize((256, 256), Image.Resampling.NEAREST).save(base / "fine.png")  # cells of another resolution
    ok("predict", base / "run", "--cells", base / "fine.png", "--section", "section0", "--draws", 2, "--out", base / "fine.h5ad")
    assert np.array_equal(ad.read_h5ad(base / "fine.h5ad").X, ad.read_h5ad(base / "cells.h5ad").X)
    Image.open(base / "data/section1.png").resize((256, 256), Image.Resampling.NEAREST).save(base / "fine1.png")
    more = ("--maps", base / "genes.txt", "--draws", 2, "--out", base / "f.zarr")
    ok("predict", base / "run", "--image", base / "fine1.png", "--scale", 0.5, *more)
    assert zarr.open_group(str(base / "f.zarr"), mode="r")["mean"].shape == (1, 128, 128)
    Image.open(base / "kind1.png").save(base / "new.png")
    told = ok("predict", base / "run", "--cells", base / "new.png", "--image", image, "--draws", 2, "--out", base / "new.h5ad")
    new = ad.read_h5ad(base / "new.h5ad")  # the new image's cells, not those of the label image in a section of the fit
    assert set(new.obs["section"]) == {"new"} and new.obs["novelty"].between(0, 1).all() and "novelty: median" in told.output
    ok("predict", base / "run", "--differential", "1,2", "--draws", 3, "--out", base / "d.csv")
    assert pd.read_csv(base / "d.csv").shape == (3, 7)
    ok("predict", base / "run", "--summary", "--section", "section0", "--draws", 2, "--out", base / "summary.png")
    ok("export", base / "run", "--out", base / "posterior.nc", "--draws", 2)
    ok("report", base / "run", "--draws", 4, "--out", base / "report.html")
    assert "Metagenes, the most active first" in (base / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_recalibrated_intervals_at_places(base, world, tmp_path):
    """Hidden spots teach the correction; it goes with spots of the same size in sections of the fit, with nothing else."""
    shutil.copytree(base / "run", tmp_path / "run")
    said = ok("recalibrate", tmp_path / "run", "--folds", 2, "--draws", 10)
    better = ppl_st.load(tmp_path / "run")
    assert f"{len(better.target.names)} spots" in said.stderr and better.recalibration.genes == len(better.target.names)
    assert sorted(better.inner.genes) == sorted(better.target.names) and better.inner.pit.shape[1] == len(better.target.names)
    spots = world.sections[0].adata[:5]
    made = better.at(spots, section="section0").predict(draws=20)
    low, high = (int(np.ceil(20 * end)) - 1 for end in better.recalibration.ends_of([1.0])[:, 0])
    assert (made.layers["lower"] <= made.layers["upper"]).all() and 0 <= low < high <= 19
    assert "lower" not in better.areas("section0").predict(draws=3).layers
    assert "lower" not in better.at(spots, section="section0", radius=2.0).predict(draws=3).layers
    ok("report", tmp_path / "run", "--out", tmp_path / "r.html", "--draws", 4)
    assert "spots were hidden in turn" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_seeds_together_predict_their_own_spots(base):
    ok("fit", "xfuse", *inputs(base)[:6], "--out", base / "seeds", "--seeds", 2, *sets("fit.steps=1", "functions=8"))
    ok("predict", base / "seeds", "--draws", 4, "--out", base / "together.h5ad")
    assert ad.read_h5ad(base / "together.h5ad").shape == (52, 3)  # all genes, as of one seed
    assert np.isfinite(api.load(base / "seeds").arviz_groups(draws=2)["log_likelihood"]["library"]).all()
    assert "--target give one of them" in refused("predict", base / "seeds", "--target", base / "data/section0.h5ad", "--out", base / "x.h5ad")


@pytest.mark.parametrize(
    ("want", "options"),
    [
        ("maps", "target samples"),
        ("areas", "target image pictures quantiles"),
        ("cells", "target pictures quantiles"),
        ("differential", "target section image samples pictures quantiles"),
        ("summary", "target genes samples pictures quantiles"),
        ("spots", "pictures quantiles"),
    ],
)
def test_options_that_would_be_ignored_are_refused(run, tmp_path, want, options):
    nothing = dict.fromkeys(("genes", "target", "section", "image", "scale", "mask", "cells", "regions", "pictures"))
    nothing |= {"quantiles": False, "draws": 2, "samples": 0, "seed": 0, "memory_gb": 1.0, "say": print}
    for option in options.split():
        with pytest.raises(UserError, match=f"leave out --{option.replace('pictures', 'png')}$"):
            list(predict_places(run, tmp_path / "x", want, **{**nothing, option: 2}))


def test_commands_say_what_is_wrong(base):
    run, image, table = base / "run", base / "data/section0.png", base / "data/section0.h5ad"
    assert "give one image per target" in refused("fit", "xfuse", *inputs(base), "--image", image, "--out", base / "new")
    assert "xfuse needs target" in refused("fit", "xfuse", "--out", base / "new")
    assert "leave out reference" in refused("fit", "xfuse", *inputs(base), "--reference", table, "--out", base / "new")
    assert "takes one target and no image" in refused("fit", "siid", *inputs(base)[2:], "--reference", table, "--out", base / "new")
    assert "exclude each other" in refused("predict", run, "--areas", "--summary", "--out", base / "x.h5ad")
    assert "name it *.zarr" in refused("predict", run, "--maps", base / "genes.txt", "--out", base / "x.h5ad")
    assert "which spots?" in refused("predict", run, "--section", "section0", "--out", base / "x.h5ad")
    assert "name two annotated regions" in refused("predict", run, "--differential", "1", "--out", base / "x.csv")
    assert "--scale is of a new image" in refused("predict", run, "--scale", 0.5, "--out", base / "x.h5ad")
    assert "--mask is of a new image" in refused("predict", run, "--mask", "none", "--out", base / "x.h5ad")
    assert "--areas" not in refused("predict", run, "--image", image, "--out", base / "x.h5ad")  # which a new image has not
    maps = ("--maps", base / "genes.txt")
    assert "leave out --genes" in refused("predict", run, *maps, "--genes", base / "genes.txt", "--out", base / "x.zarr")
    assert "leave out --samples" in refused("predict", run, *maps, "--samples", 2, "--out", base / "x.zarr")
    assert "one direction only" in refused("predict", run, "--turned", "--out", base / "x.h5ad")
    both = ("--image", image, "--section", "section0")
    assert "exclude each other" in refused("predict", run, "--cells", base / "kind0.png", *both, "--out", base / "x.h5ad")
    assert not any((base / f"x.{end}").exists() for end in ("zarr", "h5ad"))
    assert "52 spots (of the largest section) cannot be cut into 53 parts" in refused("recalibrate", run, "--folds", 53)
    few = ("evaluate", "--methods", "xfuse", *inputs(base), "--holdout-spots", 0.01, "--out", base / "x")
    assert "a share of 0.01 of 52 spots hides none" in refused(*few) and "is judged on hidden spots" in refused("compare", run)
    assert "needs one --target and a --reference" in refused("evaluate", "--methods", "siid", "--target", image, "--out", base / "x")
    assert not (base / "new").exists()

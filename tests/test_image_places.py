"""What is asked of a run of XFuse at places of its images: which cells count, what is off the tissue, what was never measured."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
import xarray as xr
import zarr

from ppl_st import api
from ppl_st.checks import predictive_checks
from ppl_st.conformal import KNOTS, Recalibration
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.image_cli import predict_places
from ppl_st.image_maps import Activities, ome
from ppl_st.image_run import ImageRun, spots_of, write_inputs
from ppl_st.models import xfuse
from ppl_st.prepare import xfuse as prepare_xfuse
from xfuse_sections import settings, start_of, two_sections


@pytest.fixture(scope="module")
def run():
    """A run at its start; its first section is rows 10..73 and columns 20..99 of a whole image of 80 x 110 pixels."""
    data = two_sections()
    first, second = data.sections
    data = data._replace(sections=(first._replace(frame=(80, 110), origin=(20.0, 10.0), micron=6.25), second))
    pair, spec = start_of(data)
    kept = []
    for one in data.sections:
        names = np.array([f"{one.name}{k}" for k in range(one.counts.shape[0] - 1)])
        xy = one.centers[:-1] + np.array(one.origin)
        kept.append(Counts(one.counts[:-1], data.genes, names, xy, pd.DataFrame(index=names), one.name, "X"))
    spots = spots_of(data, kept)
    return ImageRun("xfuse", xfuse, settings(), spec, pair, data, spots, spots, {}, {}, lambda counts: None)


def places(*xy, uns=None):
    names = [f"p{k}" for k in range(len(xy))]
    return ad.AnnData(obs=pd.DataFrame(index=names), obsm={"spatial": np.array(xy, float)}, uns=uns or {})


def ask(run, out, want="spots", **options):
    nothing = dict.fromkeys(("genes", "target", "section", "image", "scale", "mask", "cells", "regions", "pictures"))
    nothing |= {"quantiles": False, "draws": 2, "samples": 0, "seed": 0, "memory_gb": 1.0, "say": lambda line: None}
    return list(predict_places(run, out, want, **{**nothing, **options}))


def test_cells_that_are_cut_or_too_small_are_left_out_and_said(run, tmp_path):
    fine = np.zeros((320, 440), np.uint16)  # a fourth of a working pixel each
    fine[80:120, 160:200] = 1
    fine[20:60, 200:240] = 2  # half beyond the section
    fine[:10, :10] = 3  # in no part of it
    fine[101, 301] = 4  # between the middles of working pixels
    tifffile.imwrite(tmp_path / "cells.tif", fine)
    lines = []
    seen = run.cells(tmp_path / "cells.tif", "a", say=lines.append)
    assert seen.target.names.tolist() == ["1"] and seen.target.obs["pixels"].tolist() == [100]
    assert np.allclose(seen.target.xy, [[45, 25]])
    assert lines[0].startswith("1 of 3 cells lie partly beyond the part of the image that section 'a' covers")
    assert lines[1] == "1 of 2 cells hold no pixel (6.25 um each); fit with a larger input.pitch"
    fine[101, 305] = 5
    tifffile.imwrite(tmp_path / "cells.tif", fine)
    with pytest.raises(UserError, match=r"cells.tif\): 2 of 3 cells hold no pixel"):
        run.cells(tmp_path / "cells.tif", "a")
    tifffile.imwrite(tmp_path / "cells.tif", np.where(fine == 2, fine, 0))
    with pytest.raises(UserError, match="no label above 0 lies wholly in section 'a'"):
        run.cells(tmp_path / "cells.tif", "a")


def test_places_off_the_tissue_are_said_and_tables_are_streamed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageRun, "predict", None)  # which holds all of a table
    places([60, 40], [60, 13]).write_h5ad(tmp_path / "spots.h5ad")  # the first rows of the section are off its mask
    told = ask(run, tmp_path / "p.zarr", target=tmp_path / "spots.h5ad", section="a")
    assert told == ["1 of 2 spots lie off the tissue: little is predicted there", f"{tmp_path / 'p.zarr'}: 2 x 12"]
    table = ad.read_zarr(tmp_path / "p.zarr")
    assert table.obs["tissue"].iloc[0] == 1 and table.obs["tissue"].iloc[1] < 0.2 and table.varm["metagene_profile_mean"].shape == (12, 4)
    layers = xr.open_zarr(tmp_path / "p.zarr", group="layers")
    assert layers["rate_mean"].dims == ("cell", "gene") and np.array_equal(layers["rate_mean"], table.X)


def test_places_without_counts_were_not_measured(run):
    seen = run.at(places([60, 40], [80, 60]), section="a")
    assert not seen.predict(draws=2).var["measured"].any() and run.measured.all()
    assert set(seen.arviz_groups(draws=2)) == {"posterior", "constant_data", "predictions"}
    with pytest.raises(UserError, match="0 genes with counts"):
        predictive_checks(seen)
    own = run.target.take_rows(run.target.obs["section"].to_numpy() == "a")
    again = run.at(places(*own.xy), section="a")
    truth = Counts(own.matrix, own.genes, again.target.names, own.xy, own.obs, "truth", "X")
    assert len(predictive_checks(again, truth, draws=3).library) == len(own.names)
    assert np.isfinite(again.score(truth, draws=3)["log_score"]).all()
    groups = again.arviz_groups(draws=2, truth=truth)
    assert groups["predictions"]["log_likelihood"].dims == ("chain", "draw", "cell")


def test_places_have_the_radius_of_their_file_and_each_its_own_pixels(run):
    told = {"spatial": {"lib": {"scalefactors": {"spot_diameter_fullres": 13.0}, "images": {}}}}
    assert run.at(places([60, 40], uns=told), section="a").data.sections[0].radius == pytest.approx(5.5)
    assert run.at(places([60, 40], uns=told), section="a", radius=3.0).data.sections[0].radius == 3.0
    assert run.at(places([60, 40]), section="a").data.sections[0].radius == 4.0
    with pytest.raises(UserError, match=r"1 of 2 places hold less than 75% of their pixels, e.g. p1 0 of "):
        run.at(places([60, 40], [60, 40]), section="a")


def alone(run):
    """The run as if its first section were all of it."""
    own = run.target.take_rows(run.target.obs["section"].to_numpy() == "a")
    layer = Recalibration(0.9, [], [KNOTS.tolist()], [], 1, 0.9)
    return replace(run, data=run.data._replace(sections=run.data.sections[:1]), target=own, reference=own, recalibration=layer)


def test_a_target_given_to_predict_and_write_is_what_at_makes_of_it(run, tmp_path):
    """Spots of another radius had intervals that were learned on the fit's, and genes at them were said to be measured."""
    one, told = alone(run), {"spatial": {"lib": {"scalefactors": {"spot_diameter_fullres": 13.0}, "images": {}}}}
    for uns, corrected in ((told, False), ({}, True)):
        spots = places([60, 40], [80, 60], uns=uns)
        made = one.predict(["g1", "g3"], target=spots, draws=2)
        one.write(tmp_path / f"{corrected}.h5ad", ["g1", "g3"], target=spots, draws=2)
        for table in (made, ad.read_h5ad(tmp_path / f"{corrected}.h5ad")):
            assert ("lower" in table.layers) == corrected and not table.var["measured"].any() and (table.obs["section"] == "a").all()
        one.write_samples(tmp_path / f"{corrected}.zarr", ["g1"], 2, target=spots)
        assert zarr.open_group(str(tmp_path / f"{corrected}.zarr"), mode="r")["count"].shape == (2, 2, 1)
    with pytest.raises(UserError, match="seeds together predict their own spots"):
        prepare_xfuse.new_cells(run.target, run.target, run.data, run.config)


def test_bins_asked_of_a_run_on_discs_are_squares(run):
    """They were discs, with pi / 4 of a bin's pixels."""
    bins = {"spatial": {"lib": {"scalefactors": {"microns_per_pixel": 1.0, "bin_size_um": 8.0, "spot_diameter_fullres": 8.0}, "images": {}}}}
    one = alone(run)
    seen, discs = one.at(places([60, 40], uns=bins)), one.at(places([60, 40]))
    assert (seen.target.obs["pixels"].item(), seen.data.sections[0].square, seen.recalibration) == (64, True, None)
    assert discs.target.obs["pixels"].item() < 55 and discs.recalibration is not None
    fixed = replace(one, config=replace(one.config, input=replace(one.config.input, spot="disc")))
    assert not fixed.at(places([60, 40], uns=bins)).data.sections[0].square


def test_maps_that_do_not_fit_on_the_disk_are_refused_and_few_genes_are_held(run, tmp_path, monkeypatch):
    widths, moments = [], Activities.moments
    monkeypatch.setattr(Activities, "moments", lambda self, pixels, genes, *more: widths.append(genes) or moments(self, pixels, genes, *more))
    run.maps(tmp_path / "m.zarr", section="a", draws=2, memory_gb=1.3e-4)  # 3 genes of 64 x 80 pixels, mean and sd
    assert max(part.stop - part.start for part in widths) == 3
    monkeypatch.setattr("ppl_st.image_maps.free_bytes", lambda path: 4 * 7 * 4 * 64 * 80 - 1)
    with pytest.raises(UserError, match=r"7 draws of 4 metagenes at 5120 pixels need .* GB of disk .* lower --draws"):
        run.maps(tmp_path / "full.zarr", section="a", draws=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.zarr"]
    given = replace(run, manifest={"inputs": {"target": {"path": str(tmp_path / "m.zarr")}}})
    with pytest.raises(UserError, match="is the target that the run was fitted on"):
        given.maps(tmp_path / "m.zarr", section="a", draws=2)


def test_a_folder_that_can_be_resumed_is_whole_and_keeps_the_users_scale(run, tmp_path, monkeypatch):
    kept = run.target.take_rows(np.arange(5))
    kept = replace(kept, obs=kept.obs.drop(columns="section").assign(scale=7.0))
    spots = spots_of(run.data._replace(sections=run.data.sections[:1]), [kept])
    assert (spots.obs["target_scale"] == 7).all() and "scale" not in spots.obs
    whole = {"target.h5ad", "sections.npz", "genes.txt", "manifest.json"}
    monkeypatch.setattr("ppl_st.config.write", lambda config, path: whole.intersection_update(one.name for one in path.parent.iterdir()))
    write_inputs(tmp_path, run.config, {}, run.target, run.data)
    assert len(whole) == 4


def test_an_unknown_section_is_named_beside_those_there_are(run, tmp_path):
    for want in ("spots", "areas"):
        with pytest.raises(UserError, match="no section 'nope'; the run has a, b"):
            ask(run, tmp_path / "x.h5ad", want, section="nope")
    with pytest.raises(UserError, match="which spots"):
        ask(run, tmp_path / "x.h5ad", section="a")


def test_sections_whose_start_is_refused_leave_no_folder(run, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UserError("no")

    monkeypatch.setattr(xfuse, "start", refuse)
    with pytest.raises(UserError, match=r"^no$"):
        api.fit_sections("xfuse", run.data, run.target, run.config, {}, tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_pixels_of_a_map_lie_where_those_of_the_file_do(run):
    section = run.section("a")._replace(scale=0.25, origin=(100.0, 40.0), micron=2.0)  # um per working pixel: half a um per coordinate
    found = ome(section, ["mean"], ["a"], np.ones(1))["multiscales"][0]
    scale, translation = found["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [1, 2, 2] and {axis.get("unit") for axis in found["axes"]} == {None, "micrometer"}
    # the first working pixel covers the file's pixels 100..103 and 40..43, whose middle is at 101.5 and 41.5 pixels of half a um
    assert translation["translation"] == pytest.approx([0, 41.5 / 2, 101.5 / 2])
    bare = ome(section._replace(micron=float("nan")), ["mean"], ["a"], np.ones(1))["multiscales"][0]
    assert bare["datasets"][0]["coordinateTransformations"][1]["translation"] == pytest.approx([0, 41.5, 101.5])
    assert all("unit" not in axis for axis in bare["axes"])

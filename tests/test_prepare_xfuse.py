"""Slides -> sections: what is right comes through, what is wrong is said with a picture."""

import json
import warnings
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image

import realdata
from ppl_st.errors import UserError
from ppl_st.images import Slide
from ppl_st.models.xfuse.data import Input
from ppl_st.prepare.xfuse import new_image, problem, refuse_cut, section_at
from ppl_st.slides import positions, read_slide, read_slides

WIDTH, HEIGHT, PITCH = 400, 300, 20.0


def quiet(line):
    pass


def world(seed=0, genes=("A", "B", "RPL1", "Z")):
    """Tissue: an ellipse left of the middle; spots on a grid over it; counts that know their place."""
    rng = np.random.default_rng(seed)
    i, j = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    tissue = ((i - 150) / 120) ** 2 + ((j - 130) / 100) ** 2 < 1
    image = np.where(tissue[..., None], [150, 100, 170], [242, 240, 244]).astype(np.uint8)
    x, y = np.meshgrid(np.arange(40, 240, PITCH), np.arange(40, 280, PITCH))
    xy = np.stack([x.ravel(), y.ravel()], 1)
    xy = xy[((xy[:, 1] - 150) / 115) ** 2 + ((xy[:, 0] - 130) / 95) ** 2 < 1]
    counts = rng.poisson(5.0, (len(xy), len(genes))).astype(np.float32) + 1
    obs, var = pd.DataFrame(index=[f"s{k}" for k in range(len(xy))]), pd.DataFrame(index=list(genes))
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)
    adata.obsm["spatial"] = xy
    return adata, image, tissue


def slide(adata, image, name="one", **more):
    return read_slide(adata, image)._replace(name=name, **more)


def test_a_section_is_what_the_slide_says():
    adata, image, tissue = world()
    data, kept = problem([slide(adata, image)], Input(scale=0.5, radius=6.0), quiet)
    (section,) = data.sections
    assert data.genes.tolist() == ["A", "B", "RPL1", "Z"] and data.covariates == {} and len(section.covariates) == 0
    assert section.image.dtype == np.uint8 and section.label.dtype == np.int64 and section.scale == 0.5 and section.radius == 3.0
    assert section.counts.shape == (adata.n_obs + 1, 4) and section.virtual == adata.n_obs and section.counts[section.virtual].nnz == 0
    assert (section.counts[:-1] != adata.X).nnz == 0 and kept[0].names.tolist() == adata.obs_names.tolist()
    # the frame: spot coordinates -> pixels of the section
    mapped = (adata.obsm["spatial"] - np.array(section.origin)) * section.scale
    assert np.allclose(section.centers[:-1], mapped) and np.isnan(section.centers[-1]).all()
    for k, (x, y) in enumerate(mapped):
        assert section.label[int(y), int(x)] == k + 1
    sizes = np.bincount(section.label.ravel())[1:-1]
    assert (sizes == 32).all()  # pixels whose middle is within 3 of a corner of pixels
    # image and tissue are the part that origin names
    x0, y0 = (int(v) for v in section.origin)
    truth = tissue[y0 : y0 + 2 * section.mask.shape[0] : 2, x0 : x0 + 2 * section.mask.shape[1] : 2]
    assert (truth == section.mask).mean() > 0.97
    empty = section.label == section.virtual + 1
    assert empty.any() and not (empty & section.mask).any()
    assert image.base is None and (adata.X.data > 0).all()


def test_the_pitch_chooses_the_scale_and_images_are_never_enlarged():
    adata, image, _ = world()
    data, _ = problem([slide(adata, image)], Input(pitch=10.0), quiet)
    assert data.sections[0].scale == pytest.approx(0.5) and data.sections[0].radius == pytest.approx(2.75)
    data, _ = problem([slide(adata, image)], Input(pitch=50.0), quiet)
    assert data.sections[0].scale == 1


def test_genes_and_spots_are_filtered():
    adata, image, _ = world()
    counts = adata.X.toarray()
    counts[3], counts[:, 3], counts[3, 0] = 0, 0, 2
    adata.X = sp.csr_matrix(counts)
    lines = []
    data, kept = problem([slide(adata, image)], Input(min_counts=3, drop_genes="^RPL", background=False), lines.append)
    assert data.genes.tolist() == ["A", "B"] and "s3" not in kept[0].names and data.sections[0].virtual == -1
    assert data.sections[0].counts.shape == (adata.n_obs - 1, 2) and any("1 of" in line and "fewer than 3" in line for line in lines)
    assert not any("intervals" in line for line in lines)
    problem([slide(adata[:20].copy(), image)], Input(), lines.append)
    assert any(line.startswith("only 20 spots in all") for line in lines)
    x, y = (adata.obsm["spatial"][3] - np.array(data.sections[0].origin)) * data.sections[0].scale
    assert data.sections[0].label[int(y), int(x)] == 0  # what a dropped spot covers is unobserved
    data, _ = problem([slide(adata, image)], Input(top_genes=1), quiet)
    totals = np.asarray(adata.X.sum(0)).ravel()
    assert data.genes.tolist() == [adata.var_names[totals.argmax()]]
    with pytest.raises(UserError, match="no gene is left of 4"):
        problem([slide(adata, image)], Input(drop_genes="."), quiet)
    with pytest.raises(UserError, match="no spot has 1000000 counts"):
        problem([slide(adata, image)], Input(min_counts=1_000_000), quiet)


def test_sections_share_genes_and_know_their_levels():
    (a, image, _), (b, other, _) = world(), world(1, genes=("B", "A", "C"))
    a.obs["patient"], b.obs["patient"] = "p1", "p2"
    slides = [slide(a, image, "one"), slide(b, other, "two")]
    data, _ = problem(slides, Input(covariates=("section", "patient")), quiet)
    assert data.genes.tolist() == ["A", "B"]
    assert data.covariates == {"section": ("one", "two"), "patient": ("p1", "p2")}
    assert [section.covariates.tolist() for section in data.sections] == [[0, 0], [1, 1]]
    assert (data.sections[1].counts[:-1].toarray() == b[:, ["A", "B"]].X.toarray()).all()
    b.obs["patient"] = None
    data, _ = problem([slides[0], slide(b, other, "two"), slide(a, image, "three")], Input(covariates=("patient",)), quiet)
    assert data.covariates == {}  # one known level: nothing to learn
    a.obs["patient"], b.obs["patient"] = 1, [1.0, np.nan] + [1.0] * (b.n_obs - 2)
    data, _ = problem([slide(a, image, "one"), slide(b, other, "two")], Input(covariates=("patient",)), quiet)
    assert data.covariates == {}  # "1" and "1.0" are one patient
    a.obs["patient"] = ["p1", "p2"] * (a.n_obs // 2) + ["p1"] * (a.n_obs % 2)
    with pytest.raises(UserError, match=r"2 values .* within one section"):
        problem([slide(a, image, "one")], Input(covariates=("patient",)), quiet)
    with pytest.raises(UserError, match="no obs column 'donor'"):
        problem(slides, Input(covariates=("donor",)), quiet)


# ---- wrong input ----


def refused(adata, image, tmp_path, **settings):
    with pytest.raises(UserError) as caught:
        problem([slide(adata, image)], Input(**settings), quiet, tmp_path)
    message = str(caught.value)
    picture = tmp_path / "overlay_one.png"
    assert str(picture) in message and picture.is_file()
    with Image.open(picture) as made:
        assert (np.asarray(made) == [230, 30, 30]).all(-1).any()
    return message


def test_exchanged_axes_are_found(tmp_path):
    adata, image, _ = world()
    adata.obsm["spatial"] = adata.obsm["spatial"][:, ::-1] + np.array([150, 0])
    image = np.concatenate([np.full((150, WIDTH, 3), 242, np.uint8), image])  # the tissue is far from the diagonal
    message = refused(adata, image, tmp_path)
    assert "with x and y exchanged, 100% would lie on tissue" in message
    data, _ = problem([slide(adata, image)], Input(check=False), quiet)  # a person may know better
    assert len(data.sections) == 1


@pytest.mark.parametrize("factor", [4.0, 0.2])
def test_a_wrong_scale_is_found(tmp_path, factor):
    adata, image, _ = world()
    adata.obsm["spatial"] = adata.obsm["spatial"] * factor
    message = refused(adata, image, tmp_path)
    assert f"multiplied by about {1 / factor:.2g}"[:-1] in message
    assert ("lie outside the image" in message) == (factor > 1)


def test_mirrored_and_shifted_spots_are_found(tmp_path):
    adata, image, _ = world()
    right = adata.copy()
    right.obsm["spatial"] = np.array([WIDTH, 0]) + adata.obsm["spatial"] * [-1, 1]
    assert "x counted from the right" in refused(right, image, tmp_path)
    x, y = adata.obsm["spatial"].T
    longer = np.concatenate([image, np.full((150, WIDTH, 3), 242, np.uint8)])  # the tissue is in none of its middles
    height = len(longer)
    for how, xy in (("half a turn", (WIDTH - x, height - y)), ("a quarter to the left", (height - y, x)), ("a quarter to the right", (y, WIDTH - x))):
        right.obsm["spatial"] = np.column_stack(xy)
        assert f"turned by {how}, 100% would lie on tissue" in refused(right, longer, tmp_path)
    right.obsm["spatial"] = adata.obsm["spatial"] + [5000, 0]
    assert f"{adata.n_obs} of {adata.n_obs} spots lie outside the image (400 x 300 px)" in refused(right, image, tmp_path)


def test_mirrored_spots_are_found_where_a_fourth_of_the_tissue_is_too_pale_for_the_mask(tmp_path):
    adata, image, tissue = world()
    image = np.where((tissue & (np.arange(HEIGHT)[:, None] > 200))[..., None], [238, 235, 240], image).astype(np.uint8)
    data, _ = problem([slide(adata, image)], Input(), quiet, tmp_path)
    assert len(data.sections) == 1
    adata.obsm["spatial"] = np.array([WIDTH, 0]) + adata.obsm["spatial"] * [-1, 1]
    assert "only 18% of the spots lie on tissue" in refused(adata, image, tmp_path)


def test_masks(tmp_path):
    adata, image, tissue = world()
    Image.fromarray((255 * tissue).astype(np.uint8)).resize((200, 150)).save(tmp_path / "mask.png")  # of another resolution
    data, _ = problem([slide(adata, image)], Input(mask=(str(tmp_path / "mask.png"),)), quiet, tmp_path)
    auto, _ = problem([slide(adata, image)], Input(), quiet)
    assert (data.sections[0].mask == auto.sections[0].mask).mean() > 0.97
    none, _ = problem([slide(adata, image)], Input(mask=("none",)), quiet)
    assert none.sections[0].mask.all() and none.sections[0].virtual == -1
    Image.fromarray(np.zeros((300, 400), np.uint8)).save(tmp_path / "empty.png")
    message = refused(adata, image, tmp_path, mask=(str(tmp_path / "empty.png"),))
    assert "keeps 0% of the section and 0% of its spots" in message
    with pytest.raises(UserError, match=r"input.mask names 2 files for 1 sections"):
        problem([slide(adata, image)], Input(mask=("auto", "none")), quiet)


def test_a_spot_cut_by_the_border_is_left_out():
    adata, image, _ = world()
    cut = image[:, 37:]  # the spots at x = 40 and beyond; a disc of 5.5 px at 3 px from the border is cut
    adata.obsm["spatial"] = adata.obsm["spatial"] - [37.0, 0.0]
    _, kept = problem([slide(adata, cut)], Input(), quiet)
    gone = set(adata.obs_names) - set(kept[0].names)
    assert gone == {name for name, (x, _) in zip(adata.obs_names, adata.obsm["spatial"], strict=True) if x < 5} and gone


def test_too_small_a_scale_is_said():
    adata, image, _ = world()
    with pytest.raises(UserError, match="share all their pixels"):
        problem([slide(adata, image)], Input(scale=0.02), quiet)


def test_annotations(tmp_path):
    adata, image, _ = world()
    adata.obs["region"] = np.where(adata.obsm["spatial"][:, 0] < 130, "left", "right")
    (section,) = problem([slide(adata, image)], Input(annotation=("region",)), quiet)[0].sections
    assert section.regions == ("left", "right") and set(np.unique(section.annotation)) == {0, 1, 2}
    x = section.centers[:-1, 0] / section.scale + section.origin[0]
    assert (section.annotation[section.label == 1] == 1 + (x[0] >= 130)).all()
    polygon = [[0, 0], [130, 0], [130, 300], [0, 300]]
    (tmp_path / "p.geojson").write_text(json.dumps([{"geometry": {"type": "Polygon", "coordinates": [polygon]}, "properties": {"name": "west"}}]))
    (section,) = problem([slide(adata, image)], Input(annotation=(str(tmp_path / "p.geojson"),)), quiet)[0].sections
    edge = np.flatnonzero(section.annotation[10])[-1] + 1
    assert section.regions == ("west",) and edge == pytest.approx((130 - section.origin[0]) * section.scale, abs=1)
    with pytest.raises(UserError, match=r"neither an obs column .* nor a file"):
        problem([slide(adata, image)], Input(annotation=("zone",)), quiet)


# ---- prediction ----


def test_other_positions_and_new_images():
    adata, image, _ = world()
    data, _ = problem([slide(adata, image)], Input(), quiet)
    section = data.sections[0]
    names, xy, *_ = positions(ad.AnnData(obs=pd.DataFrame(index=["p", "q"]), obsm={"spatial": np.array([[100.0, 100.0], [130.0, 170.0]])}))
    asked = section_at(section, xy, radius=12.0)
    assert names.tolist() == ["p", "q"] and asked.counts.shape == (2, 4) and asked.radius == pytest.approx(12 * section.scale)
    own = (100 - np.array(section.origin)) * section.scale
    assert asked.label[int(own[1]), int(own[0])] == 1 and (section.label == problem([slide(adata, image)], Input(), quiet)[0].sections[0].label).all()
    with pytest.raises(UserError, match=r"1 of 2 positions lie outside section 'one', e.g. "):
        section_at(section, np.array([[100.0, 100.0], [1e4, 0.0]]))
    fresh = new_image(image[:, ::-1], data, Input(), quiet)
    assert fresh.counts.shape == (0, 4) and fresh.scale == section.scale and (fresh.label == 0).all()
    assert abs(fresh.mask.sum() / section.mask.sum() - 1) < 0.05
    half, _ = problem([slide(adata, image[::2, ::2], image_scale=0.5)], Input(pitch=8.0), quiet)  # positions in pixels of a larger image
    assert half.sections[0].scale == pytest.approx(0.4) and half.sections[0].frame == (120, 160)
    assert new_image(image[::2, ::2], half, Input(), quiet).frame == (120, 160)
    assert section.pitch == asked.pitch == fresh.pitch == pytest.approx(PITCH * section.scale)  # what is asked for changes no scale of space


def test_places_that_lose_pixels_to_others_or_to_the_border_are_refused():
    adata, image, _ = world()
    section = problem([slide(adata, image)], Input(), quiet)[0].sections[0]
    touching = np.array([[100.0, 100.0], [112.0, 100.0], [106.0, 112.0]])
    refuse_cut(section_at(section, touching, 6.0), np.array(["a", "b", "c"]))
    i, j = np.meshgrid(np.arange(5), np.arange(5))
    grid = 100 + 3.0 * np.stack([i.ravel(), j.ravel()], 1)  # pitch: half the radius
    border = np.array([section.origin]) + np.array([0.5, 60.0])
    repeated = np.array([[130.0, 150.0], [100.0, 100.0], [130.0, 150.0]])
    for xy, said in ((repeated, "1 of 3 places .* e.g. p2 0 of "), (grid, "25 of 25 places"), (border, "1 of 1 places .* e.g. p0")):
        with pytest.raises(UserError, match=said):
            refuse_cut(section_at(section, xy, 6.0), np.array([f"p{k}" for k in range(len(xy))]))


def test_a_section_of_one_spot_names_a_remedy_that_works():
    adata, image, _ = world()
    with pytest.raises(UserError, match=r"--set input.radius=... --set input.scale=...") as caught:
        problem([slide(adata[:1].copy(), image)], Input(radius=5.0), quiet)
    assert "one spot has no neighbor" in str(caught.value)
    data, kept = problem([slide(adata[:1].copy(), image)], Input(radius=5.0, scale=0.5, check=False), quiet)
    assert len(kept[0].names) == 1 and (data.sections[0].label == 1).sum() > 10 and data.sections[0].pitch == 10.0


def test_a_new_image_is_cropped_to_its_tissue_alone():
    adata, image, tissue = world()
    data, _ = problem([slide(adata, image)], Input(pitch=10.0), quiet)
    fresh = new_image(image, data, Input(margin=0.1), quiet)
    low, high = np.argwhere(tissue).min(0)[::-1], np.argwhere(tissue).max(0)[::-1]  # x, y
    margin = 0.1 * (high - low).max()
    assert np.abs(np.array(fresh.origin) - (low - margin)).max() < 4
    edge = np.array([[high[0] + 0.8 * margin, 150.0]])
    beside = section_at(fresh, edge)  # off the tissue, within the margin
    assert beside.image is fresh.image and beside.label.max() == 1
    with pytest.raises(UserError, match=r"1 of 2 positions lie outside section 'new'.*the tissue found in the new image and a margin; leave"):
        section_at(beside, np.vstack([edge, [390.0, 150.0]]))
    everything = new_image(image, data, Input(mask=("none", "none")), quiet)
    assert everything.image.shape == (150, 200, 3) and everything.mask.all()
    glass = np.full((800, 800, 3), 245, np.uint8)
    glass[200:202, 100:102] = glass[300:302, 250:252] = 60  # dust
    with pytest.raises(UserError, match="image array: no tissue is found in it"):
        new_image(glass, data, Input(), quiet, scale=1.0)
    assert new_image(glass, data, Input(), quiet, scale=1.0, mask="none").mask.all()


def test_a_new_image_of_another_resolution_is_said_and_its_tissue_can_be_given(tmp_path):
    adata, image, tissue = world()
    data, _ = problem([slide(adata, image, micron=2.0)], Input(), quiet)
    lines = []
    alike = new_image(image, data, Input(), lines.append)
    assert len(lines) == 1 and np.isnan(alike.micron)
    assert new_image(image, data, Input(), quiet, scale=0.8).micron == pytest.approx(data.sections[0].micron)
    new_image(np.repeat(np.repeat(image, 3, 0), 3, 1), data, Input(), lines.append)
    assert "its longer side is 960 working pixels, in the fit's sections 320 to 320" in lines[2] and "its area of tissue is" in lines[3]
    Image.fromarray((255 * tissue[:, ::-1]).astype(np.uint8)).save(tmp_path / "mask.png")  # the other half
    given = new_image(image, data, Input(), quiet, mask=tmp_path / "mask.png")
    assert given.origin[0] > alike.origin[0] + 100 and given.mask.mean() == pytest.approx(alike.mask.mean(), rel=0.1)


# ---- files ----


def spaceranger(folder, adata, version, image):
    """A Space Ranger folder of the given version, hires image at half the full resolution; the third is of bins of 16 um and has a protein too."""
    spatial = folder / "spatial"
    spatial.mkdir(parents=True)
    factors = {"spot_diameter_fullres": 13.0, "tissue_hires_scalef": 0.5, "tissue_lowres_scalef": 0.1, "fiducial_diameter_fullres": 20.0}
    if version == 3:
        factors |= {"spot_diameter_fullres": 3.2, "microns_per_pixel": 5.0, "bin_size_um": 16.0}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    Image.fromarray(image[::2, ::2]).save(spatial / "tissue_hires_image.png")
    xy, n = adata.obsm["spatial"], adata.n_obs
    columns = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
    places = [[name, 1, k, k, y, x] for k, (name, (x, y)) in enumerate(zip(adata.obs_names, xy, strict=True))]
    table = pd.DataFrame([*places, ["off-tissue", 0, 9, 9, 10.0, 10.0]], columns=columns)
    if version == 3:
        table.to_parquet(spatial / "tissue_positions.parquet")
    else:
        table.to_csv(spatial / ("tissue_positions_list.csv" if version == 1 else "tissue_positions.csv"), index=False, header=version == 2)
    kinds = ["Gene Expression"] * adata.n_vars + ["Antibody Capture"] * (version == 3)
    counts = sp.hstack([adata.X, np.full((n, len(kinds) - adata.n_vars), 1000, np.float32)])
    matrix = sp.csc_matrix(sp.vstack([counts, np.ones((1, len(kinds)), np.float32)]).T.astype(np.int32))  # genes x barcodes
    with h5py.File(folder / "filtered_feature_bc_matrix.h5", "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(matrix, key)
        group["shape"] = matrix.shape
        group["barcodes"] = np.array([*adata.obs_names, "off-tissue"], dtype="S")
        group["features/name"] = np.array([*adata.var_names, "CD3"][: len(kinds)], dtype="S")
        group["features/id"] = np.array([f"ENSG{k}" for k in range(len(kinds))], dtype="S")
        group["features/feature_type"] = np.array(kinds, dtype="S")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_space_ranger_folders(tmp_path, version):
    if version == 3:
        pytest.importorskip("pyarrow")
    adata, image, _ = world()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.var_names = ["A", "B", "A", "C"]  # a repeated name is summed
    spaceranger(tmp_path / "run" / "outs", adata, version, image)
    read = read_slide(tmp_path / "run" / "outs", None)
    radius = 1.6 if version == 3 else 5.5
    assert read.name == "run" and read.image_scale == 0.5 and read.micron == pytest.approx(5) and read.radius == pytest.approx(radius)
    assert read.square == (version == 3)
    assert read.counts.genes.tolist() == ["A", "B", "C"] and np.allclose(read.counts.xy, adata.obsm["spatial"])
    assert (read.counts.matrix[:, 0].toarray().ravel() == adata.X[:, [0, 2]].toarray().sum(1)).all()
    by_id = read_slide(tmp_path / "run" / "outs", None, gene_key="gene_ids").counts
    assert by_id.genes.tolist() == ["ENSG0", "ENSG1", "ENSG2", "ENSG3"] and (by_id.matrix != adata.X).nnz == 0
    for more in ({"layer": "raw"}, {"gene_key": "symbol"}):
        with pytest.raises(UserError, match="a Space Ranger folder has one table of counts"):
            read_slide(tmp_path / "run" / "outs", None, **more)
    data, _ = problem([read], Input(pitch=10.0), quiet)
    section = data.sections[0]
    assert section.scale == pytest.approx(0.5) and section.micron == pytest.approx(10) and section.radius == pytest.approx(radius / 2)
    Image.fromarray(image).save(tmp_path / "full.png")
    full, _ = problem([read_slide(tmp_path / "run" / "outs", tmp_path / "full.png")], Input(pitch=10.0), quiet)
    assert np.abs(full.sections[0].centers - section.centers)[:-1].max() < 1e-6 and full.sections[0].image.shape == section.image.shape
    hires = tmp_path / "run" / "outs" / "spatial" / "tissue_hires_image.png"
    assert read_slide(tmp_path / "run" / "outs", hires).image_scale == 0.5
    lowres = hires.with_name("tissue_lowres_image.png")
    Image.fromarray(image[::10, ::10]).save(lowres)
    assert read_slide(tmp_path / "run" / "outs", lowres).image_scale == 0.1
    if version == 2:  # columns go by their names
        table = pd.read_csv(hires.with_name("tissue_positions.csv"))
        table.assign(note=0)[[*table.columns[:4], "pxl_col_in_fullres", "note", "pxl_row_in_fullres"]].to_csv(
            hires.with_name("tissue_positions.csv"), index=False
        )
        assert np.array_equal(read_slide(tmp_path / "run" / "outs", hires).counts.xy, read.counts.xy)


def test_space_ranger_folders_that_lack_something(tmp_path):
    with pytest.raises(UserError, match="give the outs folder"):
        read_slide(tmp_path, None)
    (tmp_path / "binned_outputs" / "square_008um").mkdir(parents=True)
    with pytest.raises(UserError, match="several bin sizes"):
        read_slide(tmp_path, None)
    adata, image, _ = world()
    spaceranger(tmp_path / "run", adata, 2, image)
    spatial = tmp_path / "run" / "spatial"
    (spatial / "tissue_hires_image.png").unlink()
    with pytest.raises(UserError, match=r"tissue_hires_image.png: no such file; give the image of the section with --image"):
        read_slide(tmp_path / "run", None)
    factors = json.loads((spatial / "scalefactors_json.json").read_text())
    for key, value in (("spot_diameter_fullres", None), ("tissue_hires_scalef", "0.5"), ("spot_diameter_fullres", 0)):
        (spatial / "scalefactors_json.json").write_text(json.dumps({**factors, key: value}))
        with pytest.raises(UserError, match=f"scalefactors_json.json: {key} is {value!r}, not a number above 0"):
            read_slide(tmp_path / "run", None)


def test_anndata_with_its_own_image(tmp_path):
    adata, image, _ = world()
    with pytest.raises(UserError, match="carries no image"):
        read_slide(adata, None)
    factors = {"spot_diameter_fullres": 13.0, "tissue_hires_scalef": 0.5}
    adata.uns["spatial"] = {"lib": {"images": {"hires": image[::2, ::2] / np.float32(255)}, "scalefactors": factors}}
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = read_slide(tmp_path / "a.h5ad", None)
    assert read.name == "a" and read.image_scale == 0.5 and read.radius == pytest.approx(5.5)
    assert problem([read], Input(), quiet)[0].sections[0].scale == pytest.approx(0.5)  # that of the image: never enlarged
    Image.fromarray(image[::2, ::2]).save(tmp_path / "hires.png")
    Image.fromarray(image).save(tmp_path / "full.png")
    assert read_slide(adata, tmp_path / "hires.png").image_scale == 0.5 and read_slide(adata, tmp_path / "full.png").image_scale == 1.0
    assert positions(adata)[2:] == (pytest.approx(5.5), False)
    bins = adata.copy()
    bins.uns["spatial"]["lib"]["scalefactors"] |= {"microns_per_pixel": 0.5, "bin_size_um": 8.0, "spot_diameter_fullres": 16.0}
    read = read_slide(bins, None)
    assert (read.radius, read.micron, read.square) == (8.0, 0.5, True) and positions(bins)[2:] == (8.0, True)
    pair = read_slides([adata, adata], [])
    assert [one.name for one in pair] == ["section", "section-2"]
    with pytest.raises(UserError, match="2 --target but 1 --image"):
        read_slides([adata, adata], [image])


def test_slides_without_counts_cannot_be_fitted():
    _, image, _ = world()
    with pytest.raises(UserError, match="no section has counts"):
        problem([Slide("one", None, image)], Input(), quiet)


@pytest.mark.parametrize(("folder", "names"), [("st_olfactory_bulb", ("MOB1", "MOB2")), ("st_her2_breast", ("C2", "C3"))])
def test_real_sections(folder, names, tmp_path):
    targets = [realdata.path(f"{folder}/spatial_{name}.h5ad") for name in names]
    slides = read_slides(targets, [realdata.path(f"{folder}/he_{name}.jpg") for name in names])
    data, kept = problem(slides, Input(), quiet)
    assert data.covariates["section"] == tuple(f"spatial_{name}" for name in names)
    for section, counts in zip(data.sections, kept, strict=True):
        assert 0.3 < section.mask.mean() < 0.6 and len(counts.names) in (379, 407, 187, 180)
        on = section.mask[tuple(np.floor(section.centers[:-1, ::-1]).astype(int).T)]
        assert on.mean() > 0.94
    for one in slides:
        exchanged = one._replace(counts=replace(one.counts, xy=one.counts.xy[:, ::-1]))
        with pytest.raises(UserError, match=r"with x and y exchanged, 9.% would lie on tissue"):
            problem([exchanged], Input(), quiet, tmp_path)

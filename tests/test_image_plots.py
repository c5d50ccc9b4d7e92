"""Pictures of maps: what their colors say."""

import numpy as np
import zarr

from ppl_st import image_plots


def test_genes_whose_names_make_one_file_name_have_a_picture_each(tmp_path):
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="w")
    for name in ("mean", "sd"):
        group.create_array(name, data=np.random.default_rng(0).random((3, 20, 30), dtype=np.float32))
    group.attrs.update(genes=["A/B", "A_B", "a_b"], micron_per_pixel=None)
    written = list(image_plots.map_pictures(tmp_path / "m.zarr", np.zeros((20, 30, 3), np.uint8), tmp_path / "png"))
    assert [path.name for path in written] == ["A_B.png", "A_B-2.png", "a_b-3.png"] and all(path.is_file() for path in written)


def test_all_pictures_of_a_store_have_one_color_scale(tmp_path, monkeypatch):
    """A gene with a thousandth of the counts stays dark beside the other."""
    place = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    group = zarr.open_group(str(tmp_path / "m.zarr"), mode="w")
    for name, factor in (("mean", 1.0), ("sd", 0.2)):
        group.create_array(name, data=factor * np.stack([place, 1000 * place]))
    group.attrs.update(genes=["weak", "strong"], micron_per_pixel=None)
    figures, made = {}, image_plots.map_figure
    monkeypatch.setattr(image_plots, "map_figure", lambda *args, **options: figures.setdefault(args[3], made(*args, **options)))
    image = np.zeros((40, 50, 3), np.uint8)
    written = list(image_plots.map_pictures(tmp_path / "m.zarr", image, tmp_path / "png"))
    assert [path.name for path in written] == ["weak.png", "strong.png"] and all(path.is_file() for path in written)
    for panel, top in ((1, 1000), (2, 200)):  # mean and sd
        shown = {gene: figure.axes[panel].images[0] for gene, figure in figures.items()}
        assert shown["weak"].get_clim() == shown["strong"].get_clim() and 0.9 * top < shown["weak"].get_clim()[1] <= top
        bright = {gene: drawn.cmap(drawn.norm(drawn.get_array()))[..., :3].max() for gene, drawn in shown.items()}
        assert bright["weak"] < 0.03 and bright["strong"] > 0.9
    alone = made(image, place, 0.2 * place, "weak")  # a single figure ends at its own values
    assert 0.9 < alone.axes[1].images[0].get_clim()[1] <= 1

"""Figures: what is on the axes is what was given, units are written, limits are shared where they must be."""

import io
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection

from machine import slowness
from ppl_st import calibration_plots, plots
from ppl_st.errors import UserError

rng = np.random.default_rng(0)
XY = np.stack([rng.uniform(0, 4000, 300), rng.uniform(0, 2000, 300)], axis=1)


def png(figure):
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=60)
    return stream.getvalue()


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title() == title)


def dots(ax):
    return [c for c in ax.collections if isinstance(c, PathCollection) and c.get_array() is not None][-1]


def labels(figure):
    return [ax.get_ylabel() or ax.get_xlabel() for ax in figure.axes]


def test_gene_maps_share_limits_between_truth_and_mean_only():
    truth, mean = rng.poisson(3, (300, 2)), rng.gamma(3, 1, (300, 2))
    sd = np.sqrt(mean)
    mean[0, 0] = 10_000
    figure = plots.gene_maps(XY, truth, mean, sd, ["Gad1", "Slc17a7"], "counts per cell", xy_unit="µm")
    for gene in ("Gad1", "Slc17a7"):
        limits = [dots(panel(figure, f"{gene}: {what}")).get_clim() for what in ("truth", "mean", "sd")]
        assert limits[0] == limits[1] and limits[0] != limits[2]
        assert all(low == 0 for low, _ in limits)
    # One extreme cell must not blank the map.
    assert dots(panel(figure, "Gad1: mean")).get_clim()[1] < 100
    assert panel(figure, "Gad1: truth").get_aspect() == 1
    assert labels(figure).count("counts per cell") == 2 and labels(figure).count("sd (counts per cell)") == 2
    assert "500 µm" in [text.get_text() for text in panel(figure, "Slc17a7: truth").texts]
    assert png(figure).startswith(b"\x89PNG")


def test_every_dot_carries_the_value_of_its_own_cell():
    mean = rng.gamma(2, 1, (300, 1))
    figure = plots.gene_maps(XY, None, mean, mean, ["g"], "counts")
    drawn = dots(panel(figure, "g: mean"))
    table = {tuple(xy): value for xy, value in zip(drawn.get_offsets(), drawn.get_array(), strict=True)}
    assert table == {tuple(xy): value for xy, value in zip(XY, mean[:, 0], strict=True)}
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["g: mean", "g: sd"]
    assert drawn.get_rasterized()


def test_an_all_zero_gene_and_equal_coordinates_still_draw():
    zero = np.zeros((300, 1))
    png(plots.gene_maps(XY, zero, zero, zero, ["g"], "counts"))
    png(plots.gene_maps(np.zeros((1, 2)), None, zero[:1], zero[:1], ["g"], "counts"))


def test_fifty_thousand_cells_are_a_small_svg_in_seconds():
    xy = rng.uniform(0, 1e4, (50_000, 2))
    values = rng.poisson(1.0, (50_000, 1))
    start = time.process_time()
    stream = io.BytesIO()
    plots.gene_maps(xy, values, values, values, ["g"], "counts").savefig(stream, format="svg", dpi=100)
    assert time.process_time() - start < 15 * slowness()
    assert len(stream.getvalue()) < 2_000_000


def test_wrong_shape_is_named():
    with pytest.raises(UserError, match=r"\(300, 2\) do not fit 300 positions and 1 names"):
        plots.gene_maps(XY, None, np.ones((300, 2)), np.ones((300, 2)), ["g"], "counts")


def test_proportion_maps_use_one_scale_and_grey_for_unknown_spots():
    shares = rng.dirichlet(np.ones(5), 300)
    shares[:10] = np.nan
    figure = plots.proportion_maps(XY, shares, [f"type {k}" for k in range(5)])
    limits = {dots(panel(figure, f"type {k}")).get_clim() for k in range(5)}
    assert limits == {(0.0, np.nanmax(shares))}
    assert len(dots(panel(figure, "type 0")).get_array()) == 290
    assert "proportion of the spot (0 to 1)" in labels(figure)
    png(figure)


def test_loss_curve_ignores_the_first_plunge_and_stops_where_a_run_stops():
    losses = np.concatenate([np.full(20, 1e9), np.linspace(200, 100, 480)])
    figure = plots.loss_curve(np.stack([losses, np.where(np.arange(500) < 300, losses, np.nan)]))
    ax = figure.axes[0]
    assert ax.get_ylim()[1] < 1000 and ax.get_ylabel() == "negative ELBO (nats)"
    assert [np.isfinite(line.get_ydata()).sum() for line in ax.lines] == [500, 300]
    png(figure)
    png(plots.loss_curve([3.0]))
    with pytest.raises(UserError, match="no finite loss"):
        plots.loss_curve([np.nan, np.inf])


def test_calibration_curve_draws_what_it_got():
    levels = np.array([0.5, 0.8, 0.9])
    genes = np.clip(levels[:, None] + rng.normal(0, 0.1, (3, 40)), 0, 1)
    figure = calibration_plots.calibration_curve(levels, {"raw": [0.4, 0.7, 0.8], "conformal": levels}, genes)
    ax = figure.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(drawn["raw"]) == [0.4, 0.7, 0.8] and list(drawn["conformal"]) == list(levels)
    assert "middle 80 % of 40 genes" in [text.get_text() for text in ax.get_legend().get_texts()]
    png(figure)
    assert calibration_plots.calibration_curve(levels, levels).axes[0].lines[-1].get_label() == "all genes"


def test_pit_plot_draws_each_histogram_and_the_band_of_the_first():
    density = np.array([2.0, 1.0, 0.5, 0.5])
    figure = calibration_plots.pit_plot({"raw": density, "recalibrated": np.ones(4)}, density[:, None] + np.linspace(-0.2, 0.2, 11))
    band, raw, after = figure.axes[0].patches
    np.testing.assert_array_equal(raw.get_data().values, density)
    np.testing.assert_array_equal(after.get_data().values, np.ones(4))
    np.testing.assert_allclose(band.get_data().values - band.get_data().baseline, 0.32)
    assert labels(figure) == ["density (1 = uniform)"] and png(figure)


@pytest.mark.parametrize("draws", [99, 63, 5, 3])
def test_rank_plot_is_flat_for_uniform_ranks(draws):
    """Every rank once: each bar is exactly 1, also where ranks do not divide into the bins or are fewer than these."""
    once = np.arange(draws + 1)[:, None]
    figure = calibration_plots.rank_plot({"a": once, "b": np.zeros((50, 2)), "c": once}, draws, columns=2, bins=5)
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 3 and "50 simulations x 2" in shown[1].get_title()
    np.testing.assert_allclose(shown[0].patches[1].get_data().values, 1.0)
    assert shown[1].patches[1].get_data().values[1:].max() == 0 and png(figure)


def test_metric_strip_orders_by_median_and_names_a_missing_column():
    rows = [(m, v + 0.01 * i, i) for m, v in (("low", 0.1), ("high", 0.8), ("mid", 0.5)) for i in range(5)]
    table = pd.DataFrame(rows, columns=["method", "pcc", "rmse"])
    figure = plots.metric_strip(table, {"pcc": "Pearson r", "rmse": "RMSE (counts)"})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["low", "mid", "high"]
    assert labels(figure) == ["Pearson r", "RMSE (counts)"]
    assert "0.82" in [text.get_text() for text in figure.axes[0].texts]
    png(figure)
    with pytest.raises(UserError, match="no column 'scc'"):
        plots.metric_strip(table, ["scc"])


def test_drawing_needs_no_pyplot_and_leaves_no_state():
    code = (
        "import sys, numpy as np; from ppl_st import plots; assert 'matplotlib' not in sys.modules; "
        "plots.loss_curve(np.arange(5.0)).savefig('/dev/null', format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_check_plot_colors_what_misses_its_band():
    names = ["mean", "variance", "zero fraction", "Moran's I"]
    bands = ((0.5, 0.2, 0.8, 0.5, 1.0), (0.9, 0.0, 0.3, 0.99, 0.0), (0.1, 0.0, 0.3, 0.4, 0.7))
    rows = [(name, x, low, (low + high) / 2, high, pit, inside) for name in names for x, low, high, pit, inside in bands]
    table = pd.DataFrame(rows, columns=["statistic", "observed", "q05", "q50", "q95", "pit", "inside"])
    figure = calibration_plots.check_plot(table)
    assert [ax.get_title() for ax in figure.axes] == [f"{name}: 2 of 3 genes inside" for name in names]
    for ax in figure.axes:
        assert [len(bars.lines[0].get_xdata()) for bars in ax.containers] == [2, 1]
    png(figure)

"""Figures: spatial maps of truth, mean and sd; proportions; loss; metrics per method. Those about uncertainty are `ppl_st.calibration_plots`.

Every function takes arrays or a table and returns a matplotlib ``Figure``; nothing is shown, saved or
remembered (no ``pyplot``, so no display is needed and nothing leaks). Save with ``figure.savefig("map.png",
dpi=150)``; scatter layers are rasterised, so PDF and SVG stay small with many cells. Colour maps are viridis
and cividis, line colours those of Okabe and Ito: all readable with colour-blindness.

Images (histology) and interactive views are not here.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ppl_st.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

__all__ = ["gene_maps", "loss_curve", "metric_strip", "proportion_maps", "traces"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANEL = 3.2  # inches, longer side of one map


def gene_maps(
    xy: "NDArray[np.floating]",
    truth: "ArrayLike | None",
    mean: "ArrayLike",
    sd: "ArrayLike",
    genes: Sequence[str],
    unit: str,
    *,
    xy_unit: str = "coordinate units",
) -> "Figure":
    """One row per gene: truth, posterior mean (same limits, one bar) and posterior sd (own bar).

    Parameters
    ----------
    xy
        Positions, [n, 2].
    truth, mean, sd
        Values, [n, g]; all in ``unit``. Without a truth (``None``) the rows have two maps.
    genes
        Row titles, [g].
    unit
        What the values are, written at the bars: ``"counts per cell"``, ``"log1p CPM"``.
    xy_unit
        Unit of ``xy``, written at the scale bar.

    Notes
    -----
    Upper limits are the 99.5 % quantile of the non-zero values, so that one extreme cell does not blank the
    map; a pointed bar says that values were cut. y grows downwards, as in images. Where cells overlap, a
    random but fixed one is on top, the same in every map: drawing the highest last would flatter dense
    regions.
    """
    shared = {"truth": _matrix(truth, genes, xy)} if truth is not None else {}
    shared["mean"] = _matrix(mean, genes, xy)
    spread = _matrix(sd, genes, xy)
    figure, axes, size = _grid(xy, len(genes), len(shared) + 1)
    for row, gene in enumerate(genes):
        values = np.stack([matrix[:, row] for matrix in shared.values()])
        top = _upper(values)
        for ax, name, value in zip(axes[row], shared, values, strict=False):
            points = _scatter(ax, xy, value, top, "viridis", size)
            ax.set_title(f"{gene}: {name}", fontsize="medium")
        _bar(figure, points, list(axes[row, :-1]), unit, cut=values.max() > top)
        top = _upper(spread[:, row])
        points = _scatter(axes[row, -1], xy, spread[:, row], top, "cividis", size)
        axes[row, -1].set_title(f"{gene}: sd", fontsize="medium")
        _bar(figure, points, [axes[row, -1]], f"sd ({unit})", cut=spread[:, row].max() > top)
    _scale_bar(axes[-1, 0], xy, xy_unit)
    return figure


def proportion_maps(
    xy: "NDArray[np.floating]",
    proportions: "ArrayLike",
    names: Sequence[str],
    *,
    columns: int = 4,
    xy_unit: str = "coordinate units",
) -> "Figure":
    """One map per cell type or factor, all on one scale from 0 to the largest proportion.

    Parameters
    ----------
    xy
        Positions of the spots, [s, 2].
    proportions
        Shares of each spot, [s, K], rows sum to 1; NaN rows (spots without cells) are drawn grey.
    names
        Titles, [K].
    """
    values = _matrix(proportions, names, xy)
    columns = min(columns, len(names))
    figure, axes, size = _grid(xy, -(-len(names) // columns), columns)
    top = float(np.nanmax(values))
    for ax, name, value in zip(axes.flat, names, values.T, strict=False):
        points = _scatter(ax, xy, value, top, "viridis", size)
        ax.set_title(name, fontsize="medium")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    _bar(figure, points, list(axes.flat), "proportion of the spot (0 to 1)", cut=False)
    _scale_bar(axes[0, 0], xy, xy_unit)
    return figure


def loss_curve(losses: "ArrayLike", *, unit: str = "negative ELBO (nats)", name: str = "restart") -> "Figure":
    """Loss against step, with its running median.

    Parameters
    ----------
    losses
        [steps], or [restarts, steps] (NaN where a restart ended early). Non-finite entries leave gaps.
    unit, name
        Label of the loss; what several curves are, numbered from 1.

    Notes
    -----
    The loss axis covers what comes after the first tenth of the steps: the start is orders of magnitude
    higher and would flatten the rest.
    """
    runs = np.atleast_2d(np.asarray(losses, dtype=float))
    if not np.isfinite(runs).any():
        raise UserError("loss_curve: there is no finite loss to draw; look at the log of the fit")
    figure, ax = single_panel(5.5, 3.4)
    steps = np.arange(1, runs.shape[1] + 1)
    for i, run in enumerate(runs):
        color, label = COLORS[i % len(COLORS)], f"{name} {i + 1}" if len(runs) > 1 else "running median"
        if len(runs) == 1:
            ax.plot(steps, run, color=color, alpha=0.3, linewidth=0.8, label="each step")
        ax.plot(steps, _running_median(run), color=color, linewidth=1.5, label=label)
    late = runs[:, runs.shape[1] // 10 :]
    late = late[np.isfinite(late)] if np.isfinite(late).any() else runs[np.isfinite(runs)]
    level = abs(float(np.median(late)))
    margin = max(0.05 * float(late.max() - late.min()), 0.01 * level) or 1.0  # a loss that stands still looks so
    ax.set_ylim(late.min() - margin, late.max() + margin)
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.locator_params(axis="x", integer=True)
    ax.legend(frameon=False, fontsize="small", loc="upper right")
    return figure


def traces(table: "pd.DataFrame", units: Mapping[str, str] | None = None) -> "Figure":
    """Quantities against step: one panel per kind of quantity.

    Parameters
    ----------
    table
        Index: steps. Columns ``"<which> <kind>"``, e.g. "forward mmd" and "backward mmd": lines ``which`` in the panel ``kind``.
    units
        Kind -> unit, written at the panel's axis.
    """
    kinds: dict[str, dict[str, str]] = {}
    for column in table.columns:
        which, _, kind = str(column).partition(" ")
        kinds.setdefault(kind, {})[which] = column
    if not kinds or not len(table):
        raise UserError("traces: there is nothing to draw; give a table of steps x quantities")
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = empty_figure(2.6 * columns, 2.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, (kind, lines) in zip(axes.flat, kinds.items(), strict=False):
        for i, (which, column) in enumerate(lines.items()):
            ax.plot(table.index, table[column], color=COLORS[i % len(COLORS)], marker="o", markersize=3, linewidth=1.2, label=which)
        ax.set_title(kind, fontsize="medium")
        ax.set_xlabel("step")
        ax.set_ylabel((units or {}).get(kind, "no unit"))
    axes.flat[0].legend(frameon=False, fontsize="small", loc="best")
    for ax in axes.flat[len(kinds) :]:
        ax.set_visible(False)
    return figure


def metric_strip(
    table: "pd.DataFrame", metrics: Sequence[str] | Mapping[str, str], *, by: str = "method"
) -> "Figure":
    """One panel per metric, one row per method, one dot per gene, a bar and a number at the median.

    Parameters
    ----------
    table
        One row per method and gene, with the column ``by`` and one column per metric.
    metrics
        Columns to draw, or column -> axis label with unit and direction (``{"pcc": "Pearson r (higher is
        better)"}``).

    Notes
    -----
    Methods are ordered by the median of the first metric, highest on top. A metric that is missing for
    a method leaves its row empty.
    """
    labels = dict(metrics) if isinstance(metrics, Mapping) else {name: name for name in metrics}
    missing = [name for name in (by, *labels) if name not in table]
    if missing:
        raise UserError(
            f"metric_strip: no column {missing[0]!r} in the table, which has {', '.join(map(str, table))}"
        )
    order = table.groupby(by)[next(iter(labels))].median().sort_values(na_position="first").index
    figure = empty_figure(1.2 + 2.8 * len(labels), 0.9 + 0.36 * len(order))
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for ax, (metric, label) in zip(panels, labels.items(), strict=True):
        for row, name in enumerate(order):
            values = table.loc[table[by] == name, metric].to_numpy(dtype=float)
            values = values[np.isfinite(values)]
            if not len(values):
                continue
            spread = 0.28 * np.sin(2.4 * np.arange(len(values)))  # fixed jitter: same table, same picture
            ax.scatter(values, row + spread, s=9, color=COLORS[0], alpha=0.35, linewidths=0, rasterized=True)
            middle = float(np.median(values))
            ax.plot([middle, middle], [row - 0.38, row + 0.38], color=COLORS[1], linewidth=2.5)
            ax.annotate(
                f"{middle:.3g}",
                (1.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize="small",
                color=COLORS[1],
            )
        ax.set_xlabel(label)
        ax.grid(axis="x", color="0.9")
        ax.set_axisbelow(True)
    panels[0].set_yticks(range(len(order)), [str(name) for name in order])
    return figure


# ---- helpers ----


def empty_figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> "Figure":
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def single_panel(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure with one panel, without the upper and right line."""
    figure = empty_figure(width, height)
    ax = figure.subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _grid(xy: "NDArray[np.floating]", rows: int, columns: int) -> "tuple[Figure, NDArray[Any], float]":
    """Figure, axes [rows, columns], and the marker area (points^2) at which n markers tile the tissue."""
    extent = np.maximum(np.ptp(xy, axis=0), 1e-12)
    width, height = _PANEL * np.clip(extent / extent.max(), 0.35, 1)
    # "compressed" is the constrained layout for axes of fixed aspect.
    figure = empty_figure(columns * (width + 0.55), rows * (height + 0.5) + 0.2, layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    # The share of a coarse raster that holds any cell: tissue rarely fills its bounding box.
    bins = max(2, min(64, int(np.sqrt(len(xy) / 4))))
    filled = (np.histogram2d(xy[:, 0], xy[:, 1], bins=bins)[0] > 0).mean()
    side = 72 * 0.85 * np.sqrt(width * height * filled / len(xy))
    return figure, axes, float(np.clip(side**2, 0.15, 60))


def _scatter(
    ax: "Axes",
    xy: "NDArray[np.floating]",
    value: "NDArray[np.floating]",
    top: float,
    colors: str,
    size: float,
) -> Any:
    known = np.isfinite(value)
    grey = xy[~known]
    ax.scatter(grey[:, 0], grey[:, 1], s=size, color="0.85", linewidths=0, rasterized=True)
    order = np.random.default_rng(0).permutation(np.flatnonzero(known))
    x, y = xy[order].T
    # Smoothed edges of thousands of dots make the PNG three times larger and the map no clearer.
    points = ax.scatter(
        x, y, c=value[order], s=size, cmap=colors, vmin=0, vmax=top, linewidths=0, antialiased=False, rasterized=True
    )
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    return points


def _bar(figure: "Figure", points: Any, axes: "list[Axes]", label: str, *, cut: bool) -> None:
    figure.colorbar(points, ax=axes, label=label, extend="max" if cut else "neither", shrink=0.9, pad=0.02)


def _scale_bar(ax: "Axes", xy: "NDArray[np.floating]", unit: str) -> None:
    """A bar of a round length, about a quarter of the width, under the map."""
    target = 0.25 * max(float(np.ptp(xy[:, 0])), 1e-12)
    power = 10.0 ** np.floor(np.log10(target))
    length = power * max(step for step in (1, 2, 5) if step * power <= target)
    left = float(xy[:, 0].min())
    below = ("data", "axes fraction")
    ax.annotate(
        "",
        (left, -0.03),
        (left + length, -0.03),
        xycoords=below,
        arrowprops={"arrowstyle": "-", "linewidth": 2},
    )
    ax.annotate(
        f"{length:g} {unit}", (left, -0.05), xycoords=below, va="top", fontsize="small", annotation_clip=False
    )


def _matrix(values: "ArrayLike", names: Sequence[str], xy: "NDArray[np.floating]") -> "NDArray[np.floating]":
    matrix = np.asarray(values, dtype=float)
    if matrix.shape != (len(xy), len(names)):
        raise UserError(
            f"plots: values of shape {matrix.shape} do not fit {len(xy)} positions and {len(names)} names"
        )
    return matrix


def _upper(values: "NDArray[np.floating]") -> float:
    """The 99.5 % quantile of the positive values; 1 without any, as an all-zero gene needs a scale too."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(np.quantile(positive, 0.995)) if len(positive) else 1.0


def _running_median(values: "NDArray[np.floating]") -> "NDArray[np.floating]":
    import pandas as pd

    window = max(1, len(values) // 50)
    middle = pd.Series(values).rolling(window, center=True, min_periods=1).median().to_numpy()
    return np.where(np.isfinite(values), middle, np.nan)  # do not draw past the end of a run

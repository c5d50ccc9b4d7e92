"""Figures about uncertainty: coverage, PIT, ranks of simulations, risk by trust, noise ceiling, predictive checks.

As in `ppl_st.plots`: arrays in, a matplotlib ``Figure`` out, nothing shown, saved or remembered.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ppl_st.plots import COLORS, empty_figure, single_panel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["calibration_curve", "ceiling_plot", "check_plot", "pit_plot", "rank_plot", "risk_curve"]


def calibration_curve(
    levels: "ArrayLike",
    coverage: "ArrayLike | Mapping[str, ArrayLike]",
    per_gene: "ArrayLike | None" = None,
    promised: tuple[float, float] | None = None,
) -> "Figure":
    """Observed against nominal coverage of central intervals; the diagonal is perfect calibration.

    Parameters
    ----------
    levels
        Nominal levels in (0, 1), [L].
    coverage
        Randomised coverage over all entries, [L], or several such curves by name (``{"raw": ..., "conformal":
        ...}``).
    per_gene
        Coverage of every gene, [L, G], of the first curve: drawn as the band of the middle 80 % of genes,
        because one overall number hides badly covered genes.
    promised
        Level and coverage of the interval with the guarantee, which is of this level alone: a diamond.
    """
    curves = coverage if isinstance(coverage, Mapping) else {"all genes": coverage}
    x = np.asarray(levels, dtype=float)
    figure, ax = single_panel(4.0, 4.0)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect calibration")
    if per_gene is not None:
        genes = np.asarray(per_gene, dtype=float)
        low, high = np.nanquantile(genes, [0.1, 0.9], axis=1)
        label = f"middle 80 % of {genes.shape[1]} genes"
        ax.fill_between(x, low, high, color=COLORS[0], alpha=0.2, linewidth=0, label=label)
    for (name, curve), color in zip(curves.items(), COLORS, strict=False):
        ax.plot(x, np.asarray(curve, dtype=float), color=color, marker="o", markersize=3.5, label=name)
    if promised is not None:
        ax.plot(promised[0], promised[1], color=COLORS[1], marker="D", linestyle="none", label="interval with the guarantee")
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("nominal coverage of the interval")
    ax.set_ylabel("share of held-out counts inside (randomised)")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def pit_plot(densities: "Mapping[str, ArrayLike]", per_gene: "ArrayLike | None" = None) -> "Figure":
    """Histogram of randomised PIT values: steps at 1 everywhere under a perfect forecaster.

    Parameters
    ----------
    densities
        Name -> density in equal bins, [bins], as of `ppl_st.calibration.pit_histogram`.
    per_gene
        [bins, G], of the first name: drawn as the band of the middle 80 % of genes.
    """
    figure, ax = single_panel(5.0, 3.4)
    ax.axhline(1, color="0.6", linewidth=1, linestyle="--", label="perfect calibration")
    for k, (name, density) in enumerate(densities.items()):
        height = np.asarray(density, dtype=float)
        edges = np.linspace(0, 1, len(height) + 1)
        if k == 0 and per_gene is not None:
            low, high = np.nanquantile(np.asarray(per_gene, dtype=float), [0.1, 0.9], axis=1)
            ax.stairs(high, edges, baseline=low, fill=True, color=COLORS[0], alpha=0.2, label=f"middle 80 % of {np.shape(per_gene)[1]} genes")
        ax.stairs(height, edges, color=COLORS[k], linewidth=1.8, label=name)
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.set_xlabel("randomised PIT of the held-out count (0 to 1)")
    ax.set_ylabel("density (1 = uniform)")
    ax.legend(frameon=False, fontsize="small", loc="lower center")
    return figure


def rank_plot(ranks: "Mapping[str, ArrayLike]", draws: int, *, columns: int = 3, bins: int = 10) -> "Figure":
    """Ranks of simulation-based calibration, one panel per site: the density of all its ranks, uniform where inference is right.

    Parameters
    ----------
    ranks
        Title -> ranks of the truth among the posterior draws, [simulations, quantities].
    draws
        Posterior draws that each truth was ranked among.
    bins
        Bars of a panel, at most draws + 1.

    Notes
    -----
    The grey band holds 99 % of the bars if all ranks are uniform and independent (quantities of one simulation depend on each other, so bars vary
    more). A hollow middle: posteriors too narrow; a hill: too wide; a slope: biased.
    """
    names = list(ranks)
    columns, bins = min(columns, len(names)), min(bins, draws + 1)
    rows = -(-len(names) // columns)
    figure = empty_figure(3.0 * columns, 2.3 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    edges = np.linspace(0, 1, bins + 1)
    for ax, name in zip(panels.flat, names, strict=False):
        values = np.asarray(ranks[name], dtype=float)
        n, share = values.size, np.diff(np.ceil(edges * (draws + 1) - 1e-9)) / (draws + 1)  # whole ranks in each bin
        counts = np.histogram(values, np.ceil(edges * (draws + 1) - 1e-9) - 0.5)[0]
        sd = np.sqrt(share * (1 - share) / n)
        ax.stairs(1 + 2.58 * sd / share, edges, baseline=np.maximum(1 - 2.58 * sd / share, 0), fill=True, color="0.85")
        ax.stairs(counts / n / share, edges, color=COLORS[0], linewidth=1.8)
        ax.axhline(1, color="0.5", linewidth=1, linestyle="--")
        ax.set_title(f"{name}\n{values.shape[0]} simulations x {values.shape[1]}", fontsize="small")
        ax.set(xlim=(0, 1), ylim=(0, None))
    for ax in panels.flat[len(names) :]:
        ax.set_visible(False)
    for ax in panels[:, 0]:
        ax.set_ylabel("density", fontsize="small")
    for ax in panels[-1]:
        ax.set_xlabel("rank of the truth (share)", fontsize="small")
    return figure


def ceiling_plot(ceiling: "ArrayLike", reached: "ArrayLike", label: str) -> "Figure":
    """One dot per gene: the correlation ``reached`` against the noise ``ceiling``, both [genes]; the ceiling is an estimate."""
    figure, ax = single_panel(4.0, 4.0)
    x, y = np.asarray(ceiling, dtype=float), np.asarray(reached, dtype=float)
    low = min(0.0, float(np.nanmin(y, initial=0.0)))
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="as good as the true rate, if noise is Poisson")
    ax.scatter(x, y, s=14, color=COLORS[0], alpha=0.6, linewidths=0)
    ax.set(xlim=(0, 1), ylim=(low, 1))
    ax.set_xlabel("noise ceiling of the correlation")
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return figure


def risk_curve(curves: "Mapping[str, tuple[ArrayLike, ArrayLike]]", label: str) -> "Figure":
    """Mean risk of the genes kept, by who ranks them: name -> (share retained, risk), as of `ppl_st.calibration.risk_coverage`."""
    figure, ax = single_panel(5.0, 3.4)
    for (name, (retained, risk)), color in zip(curves.items(), COLORS, strict=False):
        ax.plot(np.asarray(retained, dtype=float), np.asarray(risk, dtype=float), color=color, label=name)
    ax.set(xlim=(0, 1))
    ax.set_xlabel("share of the genes kept, the most trusted first")
    ax.set_ylabel(label)
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return figure

def check_plot(table: "pd.DataFrame") -> "Figure":
    """Predictive checks, one panel per statistic, one dot per gene: what was measured against what the model's own data show.

    Parameters
    ----------
    table
        As of `ppl_st.checks.predictive_checks`: columns statistic, observed, q05, q50, q95, pit, inside.

    Notes
    -----
    Bars hold 90 % of the draws. Genes outside (pit below .05 or above .95) have another color; titles count ties in part. Mean and variance:
    symmetric log scale.
    """
    names = list(dict.fromkeys(table["statistic"]))
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = empty_figure(3.3 * columns, 3.0 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for ax, name in zip(panels.flat, names, strict=False):
        part = table[table["statistic"] == name]
        x, low, middle, high = (part[column].to_numpy(dtype=float) for column in ("observed", "q05", "q50", "q95"))
        inside = part["pit"].between(0.05, 0.95).to_numpy()
        for here, color in ((inside, COLORS[0]), (~inside, COLORS[1])):
            bars = np.stack([middle - low, high - middle])[:, here]
            ax.errorbar(x[here], middle[here], bars, fmt="o", markersize=3, linewidth=0.8, color=color, alpha=0.7)
        ends = np.array([min(x.min(), low.min()), max(x.max(), high.max())])
        ax.plot(ends, ends, color="0.6", linewidth=1, linestyle="--")
        if name in ("mean", "variance"):
            positive = np.concatenate([x, low])
            scale = {"linthresh": max(float(positive[positive > 0].min(initial=1.0)), 1e-6)}
            ax.set_xscale("symlog", **scale)
            ax.set_yscale("symlog", **scale)
        ax.set_title(f"{name}: {part['inside'].sum():.0f} of {len(part)} genes inside", fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels.flat[len(names) :]:
        ax.set_visible(False)
    for ax in panels[:, 0]:
        ax.set_ylabel("in the model's own data")
    for ax in panels[-1]:
        ax.set_xlabel("in the measured counts")
    return figure

"""The demonstration: simulate, fit, predict unmeasured genes, judge, report.

Methods whose reference are spots get `ppl_st.simulate.checkerboard`, those with dissociated cells `ppl_st.simulate.spatial_field`, those of
images `ppl_st.shapes` (then all is in `ppl_st.demo_images`; knobs of the others are refused).

Everything is shown beside the oracle, the true rate that generated the counts: its R2 is the ceiling that
noise leaves, its log score and coverage are those of a perfect forecaster.

OUT/
    data/     target.h5ad (cells x panel), reference.h5ad (all genes), truth.h5ad (cells x held-out)
    run/      the run folder: `ppl_st.load`, `ppl-st predict`, `ppl-st export`
    figures/  the figures as PNG
    scores.csv, facts.csv, report.html
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from ppl_st import calibration_plots, compositions, metrics, plots
from ppl_st.api import fit
from ppl_st.baselines import REFERENCE_BASELINES, SPOT_BASELINES, Split
from ppl_st.calibration import LEVELS, coverage
from ppl_st.data import Counts, read_counts
from ppl_st.errors import UserError
from ppl_st.io import atomic, write_adata
from ppl_st.models import METHODS, load_method
from ppl_st.posterior import Run
from ppl_st.report import Section, Table, write_report
from ppl_st.report_run import BROWSED, browser_of
from ppl_st.simulate import Simulation, checkerboard, spatial_field

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Demo", "demo", "score_oracle"]

# Column of a score table -> what the tables call it.
COLUMNS = {
    "raw_r2": "R2",
    "raw_pcc": "PCC",
    "raw_scc": "SCC",
    "log_pcc": "log PCC",
    "raw_partial_pcc": "PCC given depth",
    "log_score": "log score",
    "crps": "CRPS",
    "coverage_90": "coverage 90 %",
}
ORACLE = "oracle: the true rate"
ORACLE_DRAWS = 100
TYPES = 8
MAPPED_GENES = 3


class Demo(NamedTuple):
    """``scores`` [methods x `COLUMNS`] means over held-out genes; ``facts`` [quantity] one column ``value``: what else the truth says
    about the fit; the fitted ``run``; ``seconds`` of wall time in all.
    """

    scores: pd.DataFrame
    facts: pd.DataFrame
    run: Run
    seconds: float


def demo(
    method: str = "siid",
    *,
    out: str | Path,
    seed: int = 0,
    cells: int | None = None,
    types: int | None = None,
    squares: int | None = None,
    rho: float | None = None,
    mixing: float | None = None,
    draws: int = 100,
    device: str = "auto",
    overrides: Sequence[str] = (),
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Demo:
    """Run the demonstration and write everything below ``out``.

    Parameters
    ----------
    method
        Name in ``ppl_st.METHODS``.
    out
        New or empty folder.
    seed
        Seeds the simulation, the fit and the draws.
    cells, types, squares, rho, mixing
        Knobs of the protocol; None is its own default (8 types). ``squares`` and ``mixing`` belong to the checkerboard, whose fit gets
        ``factors=types``; methods of images have none of them.
    draws, device, overrides, progress
        Of the fit and the prediction, as in `ppl_st.fit`.
    say
        Receives one line per event.
    command
        As in `ppl_st.fit`.
    """
    began = time.perf_counter()
    talk = say or (lambda line: None)
    load_method(method)  # an unknown name is refused before any folder is made
    knobs = {"n_cells": cells, "n_types": types, "squares": squares, "rho": rho, "mixing": mixing}
    knobs = {name: value for name, value in knobs.items() if value is not None}
    if METHODS[method].reference == "image":
        from ppl_st.demo_images import demo_images

        if knobs:
            raise UserError(f"demo {method}: simulates sections of its own size; leave out {', '.join(knobs).replace('n_', '')}")
        return Demo(
            *demo_images(
                method, out=out, seed=seed, draws=draws, device=device, overrides=overrides, progress=progress, say=say, command=command
            )
        )
    spots = METHODS[method].reference == "spots"
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another --out or remove it")
    world = _world(method, spots, seed, {"n_types": TYPES, **knobs})
    types = types or TYPES
    talk(f"simulated {world.target.n_obs} cells of {types} types, {world.reference.n_obs} {'spots' if spots else 'reference cells'}")
    paths = {name: folder / "data" / f"{name}.h5ad" for name in ("target", "reference", "truth")}
    for name, path in paths.items():
        write_adata(getattr(world, name), path)

    run = fit(
        method,
        target=paths["target"],
        reference=paths["reference"],
        overrides=[f"factors={types}", *overrides] if spots else overrides,
        seed=seed,
        device=device,
        out=folder / "run",
        progress=progress,
        say=say,
        command=command,
    )
    talk(f"predicting {world.truth.n_vars} genes that the cells never measured")
    predicted = run.predict(world.truth.var_names, draws=draws, seed=seed, truth=world.truth, lognorm=True)
    proper = predicted.var.drop(columns=["measured", "trust"])
    talk("baselines and oracle")
    tables = _score_all(method, world, predicted, proper, spots, seed)
    means = {name: table.reindex(columns=list(COLUMNS)).mean() for name, table in tables.items()}
    scores = pd.DataFrame(means).T.rename(columns=COLUMNS).rename_axis("method")
    rows = {"held-out R2, share of the oracle's": scores["R2"].iloc[0] / scores["R2"].iloc[1]}
    covered = proper["coverage_90"]
    rows["held-out genes whose 90 % intervals cover 80 to 97 % (share)"] = float(covered.between(0.8, 0.97).mean())
    figures = _figures(world, predicted, proper, run)
    if spots:
        more, maps = _deconvolution(world, predicted, run.proportions(draws=draws, seed=seed))
        rows, figures = rows | more, figures | maps
    facts = pd.DataFrame({"value": rows}).rename_axis("quantity")

    for name, (_, figure) in figures.items():
        with atomic(folder / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    for name, table in (("scores", scores), ("facts", facts)):
        with atomic(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary)
    seconds = time.perf_counter() - began
    talk("report")
    genes = tables[method].join(predicted.var[["trust"]])
    browser = browser_of(run, predicted, genes, predicted.var_names[:BROWSED].tolist(), read_counts(world.truth, role="truth"), "cell", seed, "um")
    _report(folder / "report.html", method, scores, facts, figures, run, seconds, browser)
    return Demo(scores, facts, run, seconds)


def _world(method: str, spots: bool, seed: int, knobs: dict[str, Any]) -> Simulation:
    if spots:
        return checkerboard(seed=seed, **knobs)
    foreign = sorted({"squares", "mixing"} & set(knobs))
    if foreign:
        raise UserError(f"demo {method}: {' and '.join(foreign)} shape the checkerboard of siid only; leave them out")
    return spatial_field(seed=seed, **knobs)


def score_oracle(
    truth: Counts, rate: np.ndarray, total: np.ndarray, seed: int = 0, theta: np.ndarray | None = None
) -> pd.DataFrame:
    """Score table of the forecaster who knows the ``rate`` [cells, genes] behind the counts, and their inverse dispersion ``theta`` [genes].

    Without ``theta`` counts are Poisson. Log score and coverage are exact; the CRPS comes from `ORACLE_DRAWS` draws, gene by gene.
    """
    from scipy.stats import nbinom, poisson

    table = metrics.score_table(truth.matrix, rate, total, truth.genes)
    counts = truth.matrix.toarray()  # a simulated matrix: small
    law: Any = poisson(rate) if theta is None else nbinom(theta, theta / (theta + rate))
    table["log_score"] = np.mean(law.logpmf(counts), axis=0)
    covered = coverage(law.cdf(counts - 1), law.cdf(counts), LEVELS)
    for level, share in zip(LEVELS, covered.per_gene, strict=True):
        table[f"coverage_{round(100 * level)}"] = share
    rng = np.random.default_rng([seed, 1])
    crps = []
    for g in range(len(truth.genes)):
        mean = rate[:, g] if theta is None else rate[:, g] * rng.gamma(theta[g], 1 / theta[g], (ORACLE_DRAWS, len(rate)))
        drawn = rng.poisson(mean, (ORACLE_DRAWS, len(rate)))
        crps.append(float(np.mean(metrics.crps_from_draws(drawn, counts[:, g]))))
    return table.assign(crps=crps)


# ---- helpers ----


def _score_all(
    method: str, world: Simulation, predicted: ad.AnnData, proper: pd.DataFrame, spots: bool, seed: int
) -> dict[str, pd.DataFrame]:
    target = read_counts(world.target, role="target")
    truth = read_counts(world.truth, role="truth")
    split = Split(target, read_counts(world.reference, role="reference", need_spatial=spots), truth.genes, seed)
    mean, lognorm = np.asarray(predicted.X), np.asarray(predicted.layers["lognorm_mean"])
    ours = metrics.score_prediction(truth.matrix, mean, lognorm, target.totals, truth.genes)
    rate = np.asarray(world.truth.layers["rate"], dtype=np.float64)
    theta = world.truth.var["theta"].to_numpy() if "theta" in world.truth.var else None
    tables = {
        method: ours.join(proper.drop(columns="mean_count")),
        ORACLE: score_oracle(truth, rate, target.totals, seed, theta),
    }
    for name, one in (SPOT_BASELINES if spots else REFERENCE_BASELINES).items():
        tables[f"baseline: {name}"] = metrics.score_table(
            truth.matrix, one.estimate(split), target.totals, truth.genes, scale=one.scale
        )
    return tables


def _deconvolution(
    world: Simulation, predicted: ad.AnnData, spots: ad.AnnData
) -> "tuple[dict[str, float], dict[str, tuple[str, Figure]]]":
    """Factors against the true types, matched one to one: numbers, and maps of the spots' proportions."""
    composition, found = world.truth.obsm["composition"], predicted.obsm["proportions"]
    matched = compositions.match_factors(composition, found)
    true = _true_proportions(world, spots)
    covered = np.isfinite(np.asarray(spots.X)).all(1)  # spots without cells have no proportions
    js = compositions.proportion_js(true[covered], np.asarray(spots.X)[covered], matched)
    rows = {
        "cells whose largest factor is right (share)": float(compositions.matched_accuracy(composition, found)),
        "cells: JS divergence of compositions (bits, mean)": float(compositions.proportion_js(composition, found, matched).mean()),
        "spots: JS divergence of proportions (bits, mean)": float(js.mean()),
        "spots: JS divergence of proportions (bits, worst tenth above)": float(np.quantile(js, 0.9)),
    }
    # Factors in the order of the true types; a type without a factor is drawn grey.
    estimate = np.where(matched >= 0, np.asarray(spots.X)[:, matched], np.nan)
    names = [f"type {k}" for k in range(len(matched))]
    xy = np.asarray(spots.obsm["spatial"])
    shares = [plots.proportion_maps(xy, p, names, xy_unit="um") for p in (estimate, true)]
    return rows, {
        "proportions": ("Spots: estimated proportions, factors matched to the true types", shares[0]),
        "proportions_truth": ("Spots: true proportions", shares[1]),
    }


def _true_proportions(world: Simulation, spots: ad.AnnData) -> np.ndarray:
    """The truth of the fitted spots, in their order (spots without counts are not in the fit)."""
    assert world.proportions is not None
    index = world.reference.obs_names.get_indexer(spots.obs_names)
    return np.asarray(world.proportions[index])


def _figures(
    world: Simulation, predicted: ad.AnnData, proper: pd.DataFrame, run: Run
) -> "dict[str, tuple[str, Figure]]":
    """File stem -> (caption, figure)."""
    order = np.argsort(-proper["mean_count"].to_numpy(), kind="stable")
    chosen = order[np.linspace(0, len(order) // 2, MAPPED_GENES).astype(int)]
    genes = [str(gene) for gene in proper.index[chosen]]
    rate = np.asarray(world.truth.layers["rate"])[:, chosen]
    mean, sd = (np.asarray(predicted.layers[name])[:, chosen] for name in ("rate_mean", "rate_sd"))
    per_gene = proper[[f"coverage_{round(100 * level)}" for level in LEVELS]].to_numpy().T
    xy, unit, losses = np.asarray(world.target.obsm["spatial"]), "expected counts per cell", run.record["losses"]
    return {
        "genes": (
            "Genes that the cells never measured: true rate, posterior mean and sd of the rate",
            plots.gene_maps(xy, rate, mean, sd, genes, unit, xy_unit="um"),
        ),
        "calibration": (
            "Coverage of the intervals of held-out counts",
            calibration_plots.calibration_curve(LEVELS, per_gene.mean(1), per_gene),
        ),
        **({"loss": ("Loss of the variational fit", plots.loss_curve(losses, unit="loss per entry"))} if losses else {}),
    }


def _report(
    path: Path,
    method: str,
    scores: pd.DataFrame,
    facts: pd.DataFrame,
    figures: dict[str, Any],
    run: Run,
    seconds: float,
    browser: tuple[str, str],
) -> None:
    text = (
        f"{METHODS[method].summary}. Simulated: {METHODS[method].needs}. Scores are means over genes that the "
        "target never measured; the oracle knows the rate behind the counts.\n\n"
        f"Made in {seconds:.0f} s, the figures included."
    )
    units = {"log score": "nats per entry", "CRPS": "counts"}
    tables = [Table("Held-out genes", scores, units), Table("Against the truth of the simulation", facts)]
    maps, about = browser
    sections = [Section("Imputation", text, tables), Section("Gene browser", about, html=maps)]
    sections.append(Section("Figures", figures=dict(figures.values())))
    write_report(path, f"{method} on simulated data", sections, manifest=run.manifest)

"""The demonstration: simulate the SIID checkerboard, fit, predict unmeasured genes, judge, report.

Everything is shown beside the oracle, the true rate that generated the counts: its R2 is the ceiling that
noise leaves, its log score and coverage are those of a perfect forecaster.

OUT/
    data/     target.h5ad (cells x panel), reference.h5ad (spots x all genes), truth.h5ad (cells x held-out)
    run/      the run folder: `ppl_st.load`, `ppl-st predict`, `ppl-st export`
    figures/  the figures as PNG
    scores.csv, deconvolution.csv, report.html
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd

from ppl_st import metrics, plots
from ppl_st.api import fit
from ppl_st.baselines import SPOT_BASELINES, Split
from ppl_st.calibration import coverage
from ppl_st.data import Counts, read_counts
from ppl_st.errors import UserError
from ppl_st.io import atomic, write_adata
from ppl_st.posterior import LEVELS, Run
from ppl_st.report import Section, Table, write_report
from ppl_st.simulate import Simulation, checkerboard

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLUMNS", "Demo", "demo", "score_oracle"]

# Column of a score table -> what the tables call it.
COLUMNS = {
    "raw_r2": "R2",
    "raw_pcc": "PCC",
    "raw_scc": "SCC",
    "raw_partial_pcc": "PCC given depth",
    "log_score": "log score",
    "crps": "CRPS",
    "coverage_90": "coverage 90 %",
}
ORACLE = "oracle: the true rate"
ORACLE_DRAWS = 100
MAPPED_GENES = 3


class Demo(NamedTuple):
    """``scores`` [methods x `COLUMNS`] means over held-out genes; ``deconvolution`` [quantity] one column
    ``value``; the fitted ``run``; ``seconds`` of wall time in all.
    """

    scores: pd.DataFrame
    deconvolution: pd.DataFrame
    run: Run
    seconds: float


def demo(
    method: str = "siid",
    *,
    out: str | Path,
    seed: int = 0,
    cells: int = 6000,
    types: int = 8,
    squares: int = 20,
    rho: float = 1.0,
    mixing: float = 0.0,
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
        Only "siid" has a simulated protocol so far.
    out
        New or empty folder.
    seed
        Seeds the simulation, the fit and the draws.
    cells, types, squares, rho, mixing
        Knobs of `ppl_st.simulate.checkerboard`; the fit gets ``factors=types``.
    draws, device, overrides, progress
        Of the fit and the prediction, as in `ppl_st.fit`.
    say
        Receives one line per event.
    """
    began = time.perf_counter()
    talk = say or (lambda line: None)
    if method != "siid":
        raise UserError(f"demo: there is no simulated protocol for {method!r} yet; take siid")
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another --out or remove it")
    talk(f"simulating {cells} cells of {types} types, 256 spots")
    world = checkerboard(seed=seed, n_cells=cells, n_types=types, squares=squares, rho=rho, mixing=mixing)
    paths = {name: folder / "data" / f"{name}.h5ad" for name in ("target", "reference", "truth")}
    for name, path in paths.items():
        write_adata(getattr(world, name), path)

    run = fit(
        method,
        target=paths["target"],
        reference=paths["reference"],
        overrides=[f"factors={types}", *overrides],
        seed=seed,
        device=device,
        out=folder / "run",
        progress=progress,
        say=say,
        command=command,
    )
    talk(f"predicting {world.truth.n_vars} genes that the cells never measured")
    predicted = run.predict(world.truth.var_names, draws=draws, seed=seed, truth=world.truth)
    proper = predicted.var.drop(columns=["measured", "trust"])
    spots = run.proportions(draws=draws, seed=seed)
    talk("baselines and oracle")
    tables = _score_all(world, predicted, proper, seed)
    means = {name: table.reindex(columns=list(COLUMNS)).mean() for name, table in tables.items()}
    scores = pd.DataFrame(means).T.rename(columns=COLUMNS).rename_axis("method")
    matched = metrics.match_factors(world.truth.obsm["composition"], predicted.obsm["proportions"])
    facts = _deconvolution(world, predicted, spots, matched, scores)

    figures = _figures(world, predicted, spots, matched, proper, run)
    for name, (_, figure) in figures.items():
        with atomic(folder / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=150)
    for name, table in (("scores", scores), ("deconvolution", facts)):
        with atomic(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary)
    seconds = time.perf_counter() - began
    _report(folder / "report.html", scores, facts, figures, run, seconds)
    return Demo(scores, facts, run, seconds)


def score_oracle(truth: Counts, rate: np.ndarray, total: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Score table of the forecaster who knows the ``rate`` [cells, genes] behind Poisson counts.

    Log score and coverage are exact; the CRPS comes from `ORACLE_DRAWS` draws, gene by gene.
    """
    from scipy.stats import poisson

    table = metrics.score_table(truth.matrix, rate, total, truth.genes)
    counts = truth.matrix.toarray()  # a simulated matrix: small
    table["log_score"] = np.mean(poisson.logpmf(counts, rate), axis=0)
    covered = coverage(poisson.cdf(counts - 1, rate), poisson.cdf(counts, rate), LEVELS)
    for level, share in zip(LEVELS, covered.per_gene, strict=True):
        table[f"coverage_{round(100 * level)}"] = share
    rng = np.random.default_rng([seed, 1])
    crps = []
    for g in range(len(truth.genes)):
        drawn = rng.poisson(rate[:, g], (ORACLE_DRAWS, len(rate)))
        crps.append(float(np.mean(metrics.crps_from_draws(drawn, counts[:, g]))))
    return table.assign(crps=crps)


# ---- helpers ----


def _score_all(
    world: Simulation, predicted: ad.AnnData, proper: pd.DataFrame, seed: int
) -> dict[str, pd.DataFrame]:
    target = read_counts(world.target, role="target")
    truth = read_counts(world.truth, role="truth")
    split = Split(target, read_counts(world.reference, role="reference"), truth.genes, seed)
    ours = metrics.score_table(truth.matrix, np.asarray(predicted.X), target.totals, truth.genes)
    rate = np.asarray(world.truth.layers["rate"], dtype=np.float64)
    tables = {
        "siid": ours.join(proper.drop(columns="mean_count")),
        ORACLE: score_oracle(truth, rate, target.totals, seed),
    }
    for name, one in SPOT_BASELINES.items():
        tables[f"baseline: {name}"] = metrics.score_table(
            truth.matrix, one.estimate(split), target.totals, truth.genes, scale=one.scale
        )
    return tables


def _deconvolution(
    world: Simulation, predicted: ad.AnnData, spots: ad.AnnData, matched: np.ndarray, scores: pd.DataFrame
) -> pd.DataFrame:
    composition, found = world.truth.obsm["composition"], predicted.obsm["proportions"]
    # Spots without counts are not in the fit.
    js = metrics.proportion_js(_true_proportions(world, spots), np.asarray(spots.X), matched)
    rows = {
        "held-out R2, share of the oracle's": scores["R2"].iloc[0] / scores["R2"].iloc[1],
        "cells whose largest factor is right (share)": metrics.matched_accuracy(composition, found),
        "cells: JS divergence of compositions (bits, mean)": metrics.proportion_js(
            composition, found, matched
        ).mean(),
        "spots: JS divergence of proportions (bits, mean)": js.mean(),
        "spots: JS divergence of proportions (bits, worst tenth above)": float(np.quantile(js, 0.9)),
    }
    return pd.DataFrame({"value": rows}).rename_axis("quantity")


def _true_proportions(world: Simulation, spots: ad.AnnData) -> np.ndarray:
    """The truth of the fitted spots, in their order."""
    index = world.reference.obs_names.get_indexer(spots.obs_names)
    return np.asarray(world.proportions[index])


def _figures(
    world: Simulation,
    predicted: ad.AnnData,
    spots: ad.AnnData,
    matched: np.ndarray,
    proper: pd.DataFrame,
    run: Run,
) -> "dict[str, tuple[str, Figure]]":
    """File stem -> (caption, figure)."""
    order = np.argsort(-proper["mean_count"].to_numpy(), kind="stable")
    chosen = order[np.linspace(0, len(order) // 2, MAPPED_GENES).astype(int)]
    genes = [str(gene) for gene in proper.index[chosen]]
    rate = np.asarray(world.truth.layers["rate"])[:, chosen]
    mean, sd = (np.asarray(predicted.layers[name])[:, chosen] for name in ("rate_mean", "rate_sd"))
    levels = [f"coverage_{round(100 * level)}" for level in LEVELS]
    per_gene = proper[levels].to_numpy().T
    # Factors in the order of the true types; a type without a factor is drawn grey.
    estimate = np.where(matched >= 0, np.asarray(spots.X)[:, matched], np.nan)
    names = [f"type {k}" for k in range(len(matched))]
    xy, unit = np.asarray(world.target.obsm["spatial"]), "expected counts per cell"
    spot_xy, true = np.asarray(spots.obsm["spatial"]), _true_proportions(world, spots)
    maps = plots.gene_maps(xy, rate, mean, sd, genes, unit, xy_unit="um")
    shares = [plots.proportion_maps(spot_xy, p, names, xy_unit="um") for p in (estimate, true)]
    return {
        "genes": ("Genes that the cells never measured: true rate, posterior mean and sd of the rate", maps),
        "calibration": (
            "Coverage of the intervals of held-out counts",
            plots.calibration_curve(LEVELS, per_gene.mean(1), per_gene),
        ),
        "loss": (
            "Loss of the variational fit",
            plots.loss_curve(run.record["losses"], unit="loss per entry"),
        ),
        "proportions": ("Spots: estimated proportions, factors matched to the true types", shares[0]),
        "proportions_truth": ("Spots: true proportions", shares[1]),
    }


def _report(
    path: Path, scores: pd.DataFrame, facts: pd.DataFrame, figures: dict[str, Any], run: Run, seconds: float
) -> None:
    drawn = dict(figures.values())
    text = (
        "Simulated cells with a panel of genes, and spots with all genes, in one coordinate frame. Scores "
        "are means over genes that the cells never measured; the oracle knows the rate behind the counts.\n\n"
        f"Made in {seconds:.0f} s, the figures included."
    )
    units = {"log score": "nats per entry", "CRPS": "counts"}
    tables = [
        Table("Held-out genes", scores, units),
        Table("Factors against the true cell types, matched one to one", facts),
    ]
    sections = [
        Section("Imputation and deconvolution", text, tables),
        Section("Figures", figures=drawn),
    ]
    write_report(path, "SIID on a simulated checkerboard", sections, manifest=run.manifest)

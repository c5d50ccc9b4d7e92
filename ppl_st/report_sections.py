"""The sections of the report of a run: text, tables and figures of what `ppl_st.report_run` has computed. Nothing is fitted or predicted here."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import calibration_plots, plots
from ppl_st import config as configs
from ppl_st.calibration import GRID, LEVELS, coverage, coverage_table, pit_histogram, risk_coverage
from ppl_st.checks import Checks
from ppl_st.conformal import KNOTS, Inner, Recalibration
from ppl_st.models import METHODS
from ppl_st.posterior import Run
from ppl_st.report import Section, Table
from ppl_st.warning_signs import UPPER, reference_kind

COLUMNS = {
    "raw_pcc": "PCC", "raw_partial_pcc": "PCC given depth", "raw_scc": "SCC", "log_pcc": "PCC, log scale", "log_score": "log score",
    "crps": "CRPS", "coverage_90": "coverage 90 %", "recalibrated_coverage": "coverage, recalibrated",
}  # fmt: skip
UNITS = {
    "log score": "nats per entry", "CRPS": "counts", "coverage 90 %": "share", "doubt between fits": "share",
    "variance: pattern": "share", "variance: doubt": "share", "variance: noise": "share",
}  # fmt: skip
TOP = 8  # genes that are named of a metagene
OF_CEILING = (
    "The noise ceiling is what the true rate would reach against counts that are Poisson around it, estimated from the gene's mean and variance: "
    "counts that are noisier have a lower one, and single genes of few counts may lie above it, or have 0, by chance."
)
OF_GUARANTEE = "The interval is the one with the guarantee, at this level alone; CRPS and PIT are of the forecast that is corrected without it."

__all__ = ["accuracy", "calibration", "checked", "fit", "genes", "in_short", "inner_calibration", "metagenes", "risk_of"]


def in_short(run: Run, scores: pd.DataFrame, methods: Mapping[str, pd.DataFrame], noun: str) -> str:
    """What was fitted, on what, how long, and (with a truth) how well it did."""
    summary = METHODS[run.method].summary if run.method in METHODS else "a weighted mixture of runs"
    shared, record = int(np.isin(run.target.genes, run.genes).sum()), run.record
    training = ""
    if "losses" in record:
        why = "the loss no longer fell" if record["stop_reason"] == "converged" else "the steps were used up"
        trained = f", the {record['steps']:,} steps of training {record['seconds']:.0f} s; they ended because {why}."
        training = (
            f" The start (first values, settings chosen on the data) took {record['start_seconds']:.0f} s"
            f"{trained if record['steps'] else ' and is exact: there was nothing to train.'} Memory: {record['peak_memory_bytes'] / 1e9:.1f} GB."
        )
    rows = {"spots": "spots", "cells": "reference cells"}.get(reference_kind(run))
    other = ""
    if rows:
        other = (
            f" and {len(run.reference.names):,} {rows} with {len(run.genes):,} genes ({_source(run, 'reference')}), so "
            f"{int((~run.measured).sum()):,} genes are predicted that are not among the {noun}s' counts here"
        )
    seeds = run.record.get("seeds", [])
    if seeds:
        training += f" These are {len(seeds)} fits that differ in their seeds ({', '.join(map(str, seeds))}) as one: seconds are those of all."
    return (
        f"{run.method}: {summary}. Fitted on {len(run.target.names):,} {noun}s with {shared} genes ({_source(run, 'target')}){other}.{training} "
        f"Preset {run.manifest.get('preset')}, seed {run.manifest.get('seed')}, device {run.manifest.get('device')}."
    ) + _verdict(run, scores, methods)


def _verdict(run: Run, scores: pd.DataFrame, methods: Mapping[str, pd.DataFrame]) -> str:
    """The numbers that a reader asks for first."""
    if not methods:
        return ""
    found = f"On {len(scores)} genes that were hidden from the fit the mean correlation with the counts is {scores['raw_pcc'].mean():.2f}"
    others = {name: float(table["raw_pcc"].mean()) for name, table in methods.items() if name not in (run.method, UPPER)}
    if others:
        best = max(others, key=lambda name: others[name])
        ceiling = f"the true rates would reach about {scores['raw_ceiling'].mean():.2f} if noise were Poisson"
        found += f" (best cheap baseline: {others[best]:.2f}; {ceiling})"
    column = "recalibrated_coverage" if "recalibrated_coverage" in scores else "coverage_90"
    level, kind = (run.recalibration.level, "recalibrated ") if run.recalibration is not None else (0.9, "")
    inside = scores[column]
    return f"\n\n{found}. The {kind}{level:.0%} intervals hold {inside.mean():.1%} of the counts{_near(inside, level)}."


def _near(inside: pd.Series, level: float) -> str:
    """How many genes are covered about as they should be; what is about right is only said of 90 %."""
    return f", and between 80 and 97 % for {int(inside.between(0.8, 0.97).sum())} of the {len(inside)} genes" if abs(level - 0.9) < 1e-9 else ""


def accuracy(run: Run, scores: pd.DataFrame, methods: Mapping[str, pd.DataFrame]) -> Section:
    """Scores beside baselines and ceiling."""
    means = pd.DataFrame({name: table.reindex(columns=list(COLUMNS)).mean() for name, table in methods.items()}).T
    means = means.dropna(axis=1, how="all")
    means.loc["noise ceiling", "raw_pcc"] = scores["raw_ceiling"].mean()
    table = Table(
        f"Means over {len(scores)} held-out genes. PCC and SCC: 1 is perfect. {OF_CEILING}",
        means.rename(columns=COLUMNS).rename_axis("method"),
        UNITS,
    )
    best = sorted((name for name in methods if name not in (run.method, UPPER)), key=lambda name: -methods[name]["raw_pcc"].mean())[:3]
    shown = [name for name in (run.method, *best, UPPER) if name in methods]
    strip = pd.concat([methods[name].assign(method=name.split(":")[0] if name == UPPER else name) for name in shown])
    panels = {"raw_pcc": "PCC, raw counts", "raw_partial_pcc": "PCC given depth", "log_pcc": "PCC, log scale"}
    figures = {
        "Correlation with the held-out counts (no unit, 1 is perfect): one dot per gene, bar and number at the median, beside the three best "
        "baselines and the upper reference. The further right, the better.": plots.metric_strip(strip, panels),
        f"Correlation over cells (no unit) against the noise ceiling, one dot per gene. {OF_CEILING} What lies between a dot and the dashed line is "
        "what a better model could gain, and noise beyond Poisson.": calibration_plots.ceiling_plot(
            scores["raw_ceiling"], scores["raw_pcc"], "correlation reached"
        ),
    }
    risk = risk_of(scores["raw_pcc"])
    ranks = {"the model's trust": scores["trust"], "mean count": scores["mean_count"], "best possible order": -risk}
    curves = {name: risk_coverage(risk, rank) for name, rank in ranks.items()}
    trust, plain, best_area = (curve.area for curve in curves.values())
    verdict = f"{trust:.3f}, {'less' if trust < plain else 'no less'} than the mean count's {plain:.3f} (best possible {best_area:.3f})"
    figures[
        "What goes wrong (1 - PCC squared, 1 where the PCC is negative; no unit) on average over the genes that are kept, when genes are dropped "
        "from the least trusted on: the lower the curve, the better the ranking. Trust is worth something where its curve lies below that of the "
        f"mean count: here the area under it is {verdict}."
    ] = calibration_plots.risk_curve({name: (curve.retained, curve.risk) for name, curve in curves.items()}, "mean 1 - PCC² of the genes kept")
    return Section("Accuracy on held-out genes", tables=[table], figures=figures)


def risk_of(pcc: Any) -> NDArray[np.float64]:
    """1 - squared correlation of each gene, 1 for a map that runs against the counts."""
    return np.asarray(1 - np.maximum(pcc, 0.0) ** 2, dtype=np.float64)


def calibration(run: Run, predicted: ad.AnnData, scores: pd.DataFrame, labels: NDArray[np.str_] | None = None) -> Section:
    """Coverage and PIT on held-out genes; ``labels``: group of every cell."""
    pit = np.asarray(predicted.layers["pit_low"]), np.asarray(predicted.layers["pit_high"])
    per_gene, density = coverage(*pit, GRID).per_gene, pit_histogram(*pit)
    curves, densities = {"raw": per_gene.mean(1)}, {"raw": density.mean(1)}
    text, layer = "", run.recalibration
    promised: tuple[float, float] | None = None
    if layer is not None:
        known = run.reference_mean[pd.Index(run.genes).get_indexer(predicted.var_names)]
        corrected = layer.corrected(pit[0], known), layer.corrected(pit[1], known)
        densities["recalibrated"] = pit_histogram(*corrected).mean(1)
        after = scores["recalibrated_coverage"]
        if layer.guarantee:  # the interval is not one of the corrected forecast
            promised = layer.level, float(after.mean())
        else:
            curves["recalibrated"] = coverage(*corrected, GRID).overall
        raw = np.mean([np.interp(layer.level, GRID, curve) for curve in per_gene.T])
        text = (
            f"Recalibrated {layer.level:.0%} intervals hold {after.mean():.1%} of the held-out counts (raw: {raw:.1%}){_near(after, layer.level)}. "
            f"CRPS of the recalibrated forecast {scores['recalibrated_crps'].mean():.4g} counts, raw {scores['crps'].mean():.4g}."
            + (f" {OF_GUARANTEE}" if layer.guarantee else "")
        )
    rows = {f"{level:.0%}": scores[f"coverage_{round(100 * level)}"] for level in LEVELS}
    table = pd.DataFrame(
        {
            "overall": _with_intervals(coverage_table(*pit)),
            "worst tenth of genes below": {name: values.quantile(0.1) for name, values in rows.items()},
            "best tenth of genes above": {name: values.quantile(0.9) for name, values in rows.items()},
        }
    ).rename_axis("nominal")
    tables = [Table("Coverage of the raw intervals: share of held-out counts inside, with a 95 % bootstrap interval over genes.", table)]
    if labels is not None:
        groups = coverage_table(*pit, labels)
        wide = pd.DataFrame({str(name): _with_intervals(part) for name, part in groups.groupby("group", sort=False)}).T
        wide.insert(0, "cells", groups.drop_duplicates("group").set_index("group")["cells"])
        tables.append(Table("The same in each group of cells.", wide.rename_axis("group")))
    figures = {
        "Share of held-out counts inside central intervals (randomised) against the nominal share, no unit: on the dashed line intervals keep "
        "their word, below it they are too narrow. The band holds the middle 80 % of genes (raw).": calibration_plots.calibration_curve(
            GRID, curves, per_gene, promised
        ),
        "Randomised PIT of the held-out counts (density, no unit): flat at 1 is right; high at both ends means intervals that are too short, a "
        "hill that they are too wide, a slope that the level is off. The band holds the middle 80 % of genes (raw).": calibration_plots.pit_plot(
            densities, density
        ),
    }
    return Section("Calibration", text, tables, figures)


def _with_intervals(table: pd.DataFrame) -> dict[str, str]:
    """Level -> coverage and its interval (of one gene none), of one group of `coverage_table`."""
    rows = table[["level", "coverage", "lo", "hi"]].to_numpy(dtype=np.float64)
    return {f"{level:.0%}": f"{mean:.3f}" + ("" if np.isnan(lo) else f" [{lo:.3f},\u00a0{hi:.3f}]") for level, mean, lo, hi in rows}


def inner_calibration(run: Run, inner: Inner, layer: Recalibration) -> Section:
    """Without a truth: the genes of the panel that were hidden in turn."""
    ends = np.stack([0.5 - 0.5 * GRID, 0.5 + 0.5 * GRID])  # [2, levels]
    spots = reference_kind(run) == "image"
    known = run.reference_mean[:0] if spots else run.reference_mean[pd.Index(run.genes).get_indexer(pd.Index(inner.genes))]
    maps = np.tile(np.mean(layer.maps, 0)[:, None], len(inner.genes)) if spots else layer.maps_of(known)
    what = "spots were" if spots else "genes of the panel were"
    raw, after = (
        np.stack([np.diff(np.interp(np.interp(ends, one, KNOTS), KNOTS, pit), axis=0)[0] for one, pit in zip(by, inner.pit.T, strict=True)], 1)
        for by in (np.tile(KNOTS, (len(inner.genes), 1)), maps.T)
    )
    curves = {"raw": raw.mean(1), "recalibrated": after.mean(1)}
    promised: tuple[float, float] | None = None
    if layer.guarantee:  # the interval is not one of the corrected forecast
        nominal = np.full(len(inner.genes), np.mean(layer.nominal)) if spots else np.diff(layer.ends_of(known), axis=0)[0]
        held = [np.diff(np.interp([0.5 - at / 2, 0.5 + at / 2], KNOTS, pit))[0] for at, pit in zip(nominal, inner.pit.T, strict=True)]
        del curves["recalibrated"]
        promised = layer.level, float(np.mean(held))
    text = (
        f"There is no truth for what is predicted, so {len(inner.genes)} {what} hidden in turn and the method fitted "
        f"again without them: {layer.raw_coverage:.1%} of their counts lay inside the raw {layer.level:.0%} intervals. They also taught the "
        f"correction, so the recalibrated {'interval' if layer.guarantee else 'curve'} flatters itself a little."
    )
    caption = (
        "Share of the hidden counts inside central intervals (randomised) against the nominal share, no unit: on the dashed line intervals keep "
        "their word, below it they are too narrow. The band holds the middle 80 % of genes (raw)."
    )
    figure = calibration_plots.calibration_curve(GRID, curves, raw, promised)
    return Section(f"Calibration on {'spots' if spots else 'genes'} that were hidden in turn", text, figures={caption: figure})


def checked(checks: Checks, noun: str, true: bool) -> Section:
    """Posterior predictive checks."""
    shares = checks.genes.groupby("statistic", sort=False)["inside"].agg(["sum", "count"])
    rows = {name: f"{row['sum']:.0f} of {int(row['count'])} genes" for name, row in shares.iterrows()}
    library = float(checks.library["inside"].mean())
    rows[f"library of a {noun} (sum over the genes looked at)"] = f"{library:.0%} of the {noun}s"
    table = pd.DataFrame({"inside the middle 90 %": list(rows.values())}, index=pd.Index(list(rows), name="of the measured counts"))
    seen = "hidden from the fit: about nine in ten should lie inside" if true else (
        "that the fit saw. Their maps follow these very counts, noise included, and the model's data have noise once more: so they vary more than "
        "the measured ones, and levels, which are known, have narrow bands. Means should agree; whether the rest is right, genes say that were "
        "hidden (--hold-out and --truth)"
    )
    text = (
        "The model made up counts for all cells several times, with everything that it does not know drawn anew each time. Where the measured "
        f"counts differ from all of these, the model misses that side of the data. These are genes {seen}. Moran's I says how alike neighboring "
        f"{noun}s are (0: not at all, 1: perfectly); the zero fraction is the share of {noun}s without a count."
    )
    caption = (
        f"Properties of each gene's counts over the tissue, measured (across) and in the model's own data (up; bars hold 90 % of the draws): "
        f"mean (counts per {noun}), variance (counts squared), zero fraction (share) and Moran's I (no unit). Bars should cross the dashed line."
    )
    return Section(
        "Would the model's own data look like yours?", text, tables=[Table("Predictive checks. Values that tie with draws count in part.", table)],
        figures={caption: calibration_plots.check_plot(checks.genes)},
    )  # fmt: skip


def genes(scores: pd.DataFrame, links: Mapping[str, str], noun: str) -> Section:
    """Genes from reliable to unreliable; all of them, linked to the browser."""
    names = {
        "trust": "trust", "raw_pcc": "PCC", "raw_ceiling": "noise ceiling", "coverage_90": "coverage 90 %", "mean_count": "mean count",
        "between_fits": "doubt between fits", "between": "variance: pattern", "epistemic": "variance: doubt", "noise": "variance: noise",
    }  # fmt: skip
    shown = scores.reindex(columns=[name for name in names if name in scores]).rename(columns=names).rename_axis("gene")
    units = UNITS | {"mean count": f"counts per {noun}"}
    by = "PCC" if "PCC" in shown else "trust"
    shown = shown.sort_values(by, ascending=False, kind="stable")
    trust = "trust, an upper bound: the squared correlation that Poisson counts around the predicted rates would have with them"
    what = f"by {'correlation with the held-out counts' if by == 'PCC' else trust}"
    if len(shown) <= 20:
        return Section("Reliable and unreliable genes", tables=[Table(f"All genes {what}.", shown, units, links)])
    return Section(
        "Reliable and unreliable genes",
        tables=[
            Table(f"The ten most reliable genes {what}.", shown.head(10), units, links),
            Table(f"The ten least reliable genes {what}.", shown.tail(10), units, links),
            Table(f"All {len(shown)} genes {what}.", shown, units, links, folded=True),
        ],
    )


def fit(run: Run) -> Section:
    """How it was fitted: record, settings, loss."""
    record = run.record
    facts = {
        "method": run.method,
        "preset": run.manifest.get("preset"),
        "seed": ", ".join(map(str, record.get("seeds", [run.manifest.get("seed")]))),
        "independent chains": record.get("chains"),
        "steps": record.get("steps"),
        "stopped": record.get("stop_reason"),
        "seconds of the start": record.get("start_seconds"),
        "seconds of training": record.get("seconds"),
        "peak memory (GB)": record.get("peak_memory_bytes", float("nan")) / 1e9,
        "skipped steps (not finite)": len(record.get("skipped", [])),
    }
    settings = _flat(tomllib.loads(configs.dumps(run.config)))
    aligned = record.get("alignment", {})  # of methods that bring two sides together
    tables = [
        Table(caption, pd.DataFrame({"value": list(rows.values())}, index=pd.Index(list(rows), name="name")), folded=folded)
        for caption, rows, folded in (("The fit.", facts, False), ("Alignment of the two sides.", aligned, False), ("All settings.", settings, True))
        if rows
    ]
    figures = {}
    runs = record.get("losses", []) if "seeds" in record else [record.get("losses", [])]
    longest = max(map(len, runs), default=0)
    if longest:  # a closed form has none
        caption = (
            "Loss of the variational fit (nats per entry of the target), on the scale of all but its first tenth: it should have flattened; where it "
            "still falls, more steps would change the result."
        )
        losses = [[*run, *[np.nan] * (longest - len(run))] for run in runs]
        figures[caption] = plots.loss_curve(losses, unit="loss (nats per entry)", name="seed")
    if record.get("watched"):
        watched = pd.DataFrame(record["watched"]).set_index("step")
        tables.append(Table("What was watched while training.", watched, folded=True))
        of_critics = "nats per code" if getattr(run.config, "adversary", "off") in ("cross_entropy", "density_ratio") else "no unit"
        caption = (
            f"The game while it was played. Losses are those of the translators' factors (nats per entry, weights included) and of the critics "
            f"({of_critics}); alignment (no unit): mmd 0, accuracy 0.5 and mixing 1 where nobody can tell translated codes from the other side's own."
        )
        losses_of = {kind: "nats per entry" for kind in {name.partition(" ")[2] for name in map(str, watched)} if kind.endswith("loss")}
        figures[caption] = plots.traces(watched, losses_of | {"critic loss": of_critics})
    return Section("Fit", tables=tables, figures=figures)


def metagenes(run: Run, predicted: ad.AnnData) -> Section:
    """How much of the activity each metagene has, and the genes that are most surely its own; numbered as in what `predict` writes."""
    tables, _ = run.module.profiles(run.pair, run.config)
    fold, sd = tables["metagene_log2_fold_mean"], tables["metagene_log2_fold_sd"]  # [genes, M]
    activity = (np.asarray(predicted.obsm["metagenes"]) * predicted.obs["scale"].to_numpy()[:, None]).sum(0)
    sure = fold - 2 * sd
    rows = {}
    for k in np.argsort(-activity, kind="stable").tolist():
        best = [g for g in np.argsort(-sure[:, k])[:TOP].tolist() if sure[g, k] > 0]  # none of one that is not in use: NaN
        if not np.isnan(fold[0, k]):
            named = ", ".join(f"{run.genes[g]} ({fold[g, k]:.1f})" for g in best)
            rows[k] = {"share of the activity": activity[k] / activity.sum(), "genes": named or "none"}
    caption = (
        "Metagenes, the most active first, by their column in obsm['metagenes'] and varm of what predict writes: their share of the activity of all "
        "places, and the genes whose share in the metagene is most surely above that in the baseline, with log2 of the ratio (posterior mean)."
    )
    return Section("Metagenes", tables=[Table(caption, pd.DataFrame.from_dict(rows, orient="index").rename_axis("metagene"))])


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return flat


def _source(run: Run, role: str) -> str:
    """Name of the file that the counts came from."""
    path = (run.manifest.get("inputs", {}).get(role) or {}).get("path")
    return Path(path).name if path else "from memory"

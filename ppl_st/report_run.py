"""The report of a run: what was fitted, on what, how long; how far to trust it; a browser of its genes.

With a truth (counts of the same cells, of genes that the fit did not see) everything is judged on it, beside the baselines on the same split and
the noise ceiling. Without one the page says what the model itself expects, and what recalibration found on inner held-out genes.
Nothing is fitted here. Predictions are made once, for the genes that are judged or browsed.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import config as configs
from ppl_st import metrics, plots
from ppl_st.api import Source, load
from ppl_st.baselines import REFERENCE_BASELINES, SPOT_BASELINES, Split, supervised_ridge
from ppl_st.browser import MAX_CELLS, RELATIVE_ERROR, GeneMaps, gene_browser
from ppl_st.calibration import GRID, LEVELS, coverage, pit_histogram, risk_coverage
from ppl_st.conformal import KNOTS, Inner, Recalibration
from ppl_st.data import Counts, read_counts
from ppl_st.errors import UserError
from ppl_st.models import METHODS
from ppl_st.posterior import Run
from ppl_st.report import Section, Table, evaluation_report, read_json, write_report
from ppl_st.warning_signs import LOW_TRUST, UPPER, reference_kind, warning_signs

__all__ = ["BROWSED", "browser_of", "report_folder", "report_run"]

BROWSED = 50  # genes of the browser unless they are named
SCREENED = 150  # unmeasured genes whose trust is looked at when there is no truth
MAX_ENTRIES = 2e7  # cells x judged genes that are predicted at once
COLUMNS = {
    "raw_pcc": "PCC", "raw_partial_pcc": "PCC given depth", "raw_scc": "SCC", "log_pcc": "PCC, log scale", "log_score": "log score",
    "crps": "CRPS", "coverage_90": "coverage 90 %", "recalibrated_coverage": "coverage, recalibrated",
}  # fmt: skip
UNITS = {
    "log score": "nats per entry", "CRPS": "counts", "mean count": "counts per cell", "coverage 90 %": "share", "doubt between fits": "share",
}  # fmt: skip


def report_folder(
    folder: str | Path,
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    truth: Source | None = None,
    draws: int = 100,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the report of a run folder (see `report_run`) or of an evaluation folder, which needs nothing else.

    Raises
    ------
    UserError
        If ``folder`` is neither, or an unfinished run.
    """
    folder = Path(folder)
    if (folder / "summary.csv").is_file() and (folder / "scores.csv").is_file():
        if genes is not None or truth is not None:
            raise UserError(f"{folder}: is an evaluation; genes and truth go with the report of a run")
        evaluation_report(folder, path)
        return
    if not (folder / "manifest.json").is_file():
        inner = f"; it holds a run: give {folder / 'run'}" if (folder / "run").is_dir() else ""
        missing = "" if folder.exists() else " (it does not exist)"
        raise UserError(f"{folder}: neither a run folder nor an evaluation{missing}{inner}")
    read_json(folder / "manifest.json")  # a damaged folder is said to be one
    report_run(load(folder), path, genes=genes, truth=truth, draws=draws, seed=seed, say=say)


def report_run(
    run: Run,
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    truth: Source | None = None,
    draws: int = 100,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> None:
    """Write the report of a fitted run as one HTML file that opens offline.

    Parameters
    ----------
    path
        The file to write.
    genes
        Genes to browse; None = with a truth `BROWSED` genes of it from the best to the worst predicted, else the `BROWSED` that the model trusts
        most among the `SCREENED` unmeasured genes highest in the reference.
    truth
        Counts of the run's cells for genes that the fit did not see.
    draws, seed
        Of the predictions.
    say
        Receives one line per event.
    """
    talk = say or (lambda line: None)
    noun = "spot" if reference_kind(run) == "image" else "cell"
    counted = None if truth is None else read_counts(truth, role="truth", need_spatial=False)
    judged, note = _judged(run, counted, seed)
    talk(f"predicting {len(judged)} genes in {len(run.target.names)} {noun}s, {draws} draws")
    predicted = run.predict(judged, truth=counted, lognorm=counted is not None, draws=draws, seed=seed)
    scores, methods = predicted.var, {}
    if counted is not None:
        talk("baselines on the same split")
        methods = _methods(run, counted, predicted, seed)
        scores = methods[run.method].join(predicted.var.reindex(columns=["trust", "between_fits"]).dropna(axis=1))
    browsed, why = _browsed(run, judged, scores, genes, counted is not None)
    others = [gene for gene in browsed if gene not in set(judged)]
    if others:
        predicted = ad.concat(
            [predicted, run.predict(others, draws=draws, seed=seed)], axis=1, merge="first", uns_merge="first", join="outer"
        )
    talk(f"browser of {len(browsed)} genes")
    browser, about = browser_of(run, predicted, scores, browsed, counted, noun, seed)
    links = {gene: f"#gene={quote(gene, safe='')}" for gene in browsed}
    sections = [
        Section("In short", _in_short(run, noun) + note, warnings=warning_signs(run, scores, methods, noun)),
        Section("Gene browser", f"{why} {about}", html=browser),
    ]
    if counted is not None:
        sections += _accuracy(run, predicted[:, judged], scores, methods)
    elif run.inner is not None and run.recalibration is not None:
        sections.append(_inner_calibration(run, run.inner, run.recalibration))
    sections += [_genes(scores, links), _fit(run)]
    name = f"Run {run.folder.name} ({run.method})" if run.folder else f"Run of {run.method}"
    write_report(path, name, sections, manifest=run.manifest)


# ---- which genes ----


def _judged(run: Run, truth: Counts | None, seed: int) -> tuple[list[str], str]:
    """Genes that are predicted and judged, and what to say about the choice."""
    unmeasured = run.genes[~run.measured]
    most = max(1, int(MAX_ENTRIES // max(1, len(run.target.names))))
    if truth is None:
        order = np.argsort(-run.reference_mean[~run.measured], kind="stable")[: min(SCREENED, most)]
        if not len(unmeasured):  # a method of images, or a reference without more genes: look at what was fitted
            unmeasured, order = run.genes, np.argsort(-run.reference_mean, kind="stable")[: min(SCREENED, most)]
        chosen = unmeasured[order]
        return [str(gene) for gene in chosen], ""
    known = unmeasured[np.isin(unmeasured, truth.genes)]
    if not len(known):
        raise UserError(
            f"truth ({truth.source}): none of its {len(truth.genes)} genes was hidden from this run; fit with --hold-out, or leave out --truth"
        )
    if len(known) <= most:
        return [str(gene) for gene in known], ""
    kept = np.sort(np.random.default_rng([seed, 31]).permutation(len(known))[:most])
    return [str(gene) for gene in known[kept]], f"\n\nOf {len(known)} genes with a truth {most}, picked at random, are judged here."


def _browsed(run: Run, judged: list[str], scores: pd.DataFrame, genes: Sequence[str] | None, true: bool) -> tuple[list[str], str]:
    if genes is not None:
        return [str(gene) for gene in dict.fromkeys(genes)], "These are the genes that were asked for."
    by = "raw_pcc" if true else "trust"
    order = scores.loc[judged, by].sort_values(ascending=False, kind="stable").index
    if not true:
        chosen = order[:BROWSED].tolist()
        return chosen, (
            f"These are the {len(chosen)} genes that the model trusts most among the {len(judged)} "
            f"{'' if run.measured.all() else 'unmeasured '}genes with the highest mean count."
        )
    n, ends = len(order), BROWSED // 5  # the best, the worst, and evenly what lies between
    places = range(n) if n <= BROWSED else [*range(ends), *np.linspace(ends, n - ends - 1, BROWSED - 2 * ends).astype(int), *range(n - ends, n)]
    return order[places].tolist(), f"These are {len(places)} of {n} genes with a truth, from the best predicted to the worst."


# ---- sections ----


def _in_short(run: Run, noun: str) -> str:
    summary = METHODS[run.method].summary if run.method in METHODS else "a weighted mixture of runs"
    shared, record = int(np.isin(run.target.genes, run.genes).sum()), run.record
    training = ""
    if "losses" in record:
        why = "the loss no longer fell" if record["stop_reason"] == "converged" else "the steps were used up"
        training = (
            f" The start (first values, settings chosen on the data) took {record.get('start_seconds', float('nan')):.0f} s, "
            f"the {record['steps']:,} steps of training {record['seconds']:.0f} s; they ended because {why}. "
            f"Memory: {record['peak_memory_bytes'] / 1e9:.1f} GB."
        )
    rows = {"spots": "spots", "cells": "reference cells"}.get(reference_kind(run))
    other = ""
    if rows:
        other = (
            f" and {len(run.reference.names):,} {rows} with {len(run.genes):,} genes ({_source(run, 'reference')}), so "
            f"{int((~run.measured).sum()):,} genes are predicted that the {noun}s never measured"
        )
    seeds = run.record.get("seeds", [])
    if seeds:
        training += f" These are {len(seeds)} fits that differ in their seeds ({', '.join(map(str, seeds))}) as one: seconds are those of all."
    return (
        f"{run.method}: {summary}. Fitted on {len(run.target.names):,} {noun}s with {shared} genes ({_source(run, 'target')}){other}.{training} "
        f"Preset {run.manifest.get('preset')}, seed {run.manifest.get('seed')}, device {run.manifest.get('device')}."
    )


def _methods(run: Run, truth: Counts, predicted: ad.AnnData, seed: int) -> dict[str, pd.DataFrame]:
    """Score table per method, ours first, on the genes of ``predicted``."""
    genes = np.asarray(predicted.var_names, dtype=str)
    counts = truth.take_genes(genes).matrix[pd.Index(truth.names).get_indexer(predicted.obs_names)]
    total = run.target.totals
    ours = metrics.score_prediction(counts, np.asarray(predicted.X), np.asarray(predicted.layers["lognorm_mean"]), total, genes)
    tables = {run.method: ours.join(predicted.var.drop(columns=["measured", "trust", "between_fits", "mean_count"], errors="ignore"))}
    if run.target.xy is None:  # spots are copied by place, and the upper reference smooths over neighbors
        return tables
    split = Split(run.target, run.reference, genes, seed, getattr(run.config, "library_key", None))
    for name, one in (SPOT_BASELINES if reference_kind(run) == "spots" else REFERENCE_BASELINES).items():
        tables[f"baseline: {name}"] = metrics.score_table(counts, one.estimate(split), total, genes, scale=one.scale)
    tables[UPPER] = metrics.score_table(counts, supervised_ridge(split, counts), total, genes, scale="log")
    return tables


def _accuracy(run: Run, predicted: ad.AnnData, scores: pd.DataFrame, methods: Mapping[str, pd.DataFrame]) -> list[Section]:
    means = pd.DataFrame({name: table.reindex(columns=list(COLUMNS)).mean() for name, table in methods.items()}).T
    means = means.dropna(axis=1, how="all")
    means.loc["noise ceiling", "raw_pcc"] = scores["raw_ceiling"].mean()
    table = Table(
        f"Means over {len(scores)} held-out genes. PCC and SCC: 1 is perfect, the noise ceiling is the best that any rate could reach.",
        means.rename(columns=COLUMNS).rename_axis("method"),
        UNITS,
    )
    best = sorted((name for name in methods if name not in (run.method, UPPER)), key=lambda name: -methods[name]["raw_pcc"].mean())[:3]
    shown = [name for name in (run.method, *best, UPPER) if name in methods]
    strip = pd.concat([methods[name].assign(method=name.split(":")[0] if name == UPPER else name) for name in shown])
    panels = {"raw_pcc": "PCC, raw counts", "raw_partial_pcc": "PCC given depth", "log_pcc": "PCC, log scale"}
    accuracy = {
        "Correlation with the held-out counts (no unit, 1 is perfect): one dot per gene, bar and number at the median, beside the three best "
        "baselines and the upper reference. The further right, the better.": plots.metric_strip(strip, panels),
        "Correlation over cells (no unit) against the best that counting noise allows, one dot per gene: the distance to the dashed line is what a "
        "better model could gain.": plots.ceiling_plot(scores["raw_ceiling"], scores["raw_pcc"], "correlation reached"),
    }
    risk = 1 - scores["raw_pcc"].to_numpy() ** 2
    ranks = {"the model's trust": scores["trust"], "mean count": scores["mean_count"], "best possible order": -risk}
    curves = {name: risk_coverage(risk, rank) for name, rank in ranks.items()}
    accuracy[
        "What goes wrong (1 - PCC squared, no unit) on average over the genes that are kept, when genes are dropped from the least trusted on: the "
        "lower the curve, the better the ranking. Trust is worth something where its curve lies below that of the mean count."
    ] = plots.risk_curve({name: (curve.retained, curve.risk) for name, curve in curves.items()}, "mean 1 - PCC² of the genes kept")
    return [Section("Accuracy on held-out genes", tables=[table], figures=accuracy), _calibration(run, predicted, scores)]


def _calibration(run: Run, predicted: ad.AnnData, scores: pd.DataFrame) -> Section:
    pit = np.asarray(predicted.layers["pit_low"]), np.asarray(predicted.layers["pit_high"])
    per_gene, density = coverage(*pit, GRID).per_gene, pit_histogram(*pit)
    curves, densities = {"raw": per_gene.mean(1)}, {"raw": density.mean(1)}
    text, layer = "", run.recalibration
    if layer is not None:
        known = run.reference_mean[pd.Index(run.genes).get_indexer(predicted.var_names)]
        corrected = layer.corrected(pit[0], known), layer.corrected(pit[1], known)
        curves["recalibrated"], densities["recalibrated"] = coverage(*corrected, GRID).overall, pit_histogram(*corrected).mean(1)
        after = scores["recalibrated_coverage"]
        raw = np.mean([np.interp(layer.level, GRID, curve) for curve in per_gene.T])
        text = (
            f"Recalibrated {layer.level:.0%} intervals hold {after.mean():.1%} of the held-out counts (raw: {raw:.1%}), and between 80 and 97 % for "
            f"{after.between(0.8, 0.97).mean():.0%} of the genes. CRPS of the recalibrated forecast {scores['recalibrated_crps'].mean():.4g} counts, "
            f"raw {scores['crps'].mean():.4g}."
        )
    rows = {f"{level:.0%}": scores[f"coverage_{round(100 * level)}"] for level in LEVELS}
    table = pd.DataFrame(
        {
            "overall": {name: values.mean() for name, values in rows.items()},
            "worst tenth of genes below": {name: values.quantile(0.1) for name, values in rows.items()},
            "best tenth of genes above": {name: values.quantile(0.9) for name, values in rows.items()},
        }
    ).rename_axis("nominal")
    tables = [Table("Coverage of the raw intervals: shares of held-out counts inside.", table)]
    figures = {
        "Share of held-out counts inside central intervals (randomised) against the nominal share, no unit: on the dashed line intervals keep their "
        "word, below it they are too narrow. The band holds the middle 80 % of genes (raw).": plots.calibration_curve(GRID, curves, per_gene),
        "Randomised PIT of the held-out counts (density, no unit): flat at 1 is right; high at both ends means intervals that are too short, a hill "
        "that they are too wide, a slope that the level is off. The band holds the middle 80 % of genes (raw).": plots.pit_plot(densities, density),
    }
    return Section("Calibration", text, tables, figures)


def _inner_calibration(run: Run, inner: Inner, layer: Recalibration) -> Section:
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
    text = (
        f"There is no truth for what is predicted, so {len(inner.genes)} {what} hidden in turn and the method fitted "
        f"again without them: {layer.raw_coverage:.1%} of their counts lay inside the raw {layer.level:.0%} intervals. They also taught the "
        "correction, so the recalibrated curve flatters itself a little."
    )
    caption = (
        "Share of the hidden counts inside central intervals (randomised) against the nominal share, no unit: on the dashed line intervals keep "
        "their word, below it they are too narrow. The band holds the middle 80 % of genes (raw)."
    )
    figure = plots.calibration_curve(GRID, {"raw": raw.mean(1), "recalibrated": after.mean(1)}, raw)
    return Section(f"Calibration on {'spots' if spots else 'genes'} that were hidden in turn", text, figures={caption: figure})


def _genes(scores: pd.DataFrame, links: Mapping[str, str]) -> Section:
    """Genes from reliable to unreliable; all of them, linked to the browser."""
    names = {
        "trust": "trust", "raw_pcc": "PCC", "raw_ceiling": "noise ceiling", "coverage_90": "coverage 90 %", "mean_count": "mean count",
        "between_fits": "doubt between fits",
    }  # fmt: skip
    shown = scores.reindex(columns=[name for name in names if name in scores]).rename(columns=names).rename_axis("gene")
    by = "PCC" if "PCC" in shown else "trust"
    shown = shown.sort_values(by, ascending=False, kind="stable")
    what = f"by {'correlation with the held-out counts' if by == 'PCC' else 'the share of variance that the model expects to predict'}"
    if len(shown) <= 20:
        return Section("Reliable and unreliable genes", tables=[Table(f"All genes {what}.", shown, UNITS, links)])
    return Section(
        "Reliable and unreliable genes",
        tables=[
            Table(f"The ten most reliable genes {what}.", shown.head(10), UNITS, links),
            Table(f"The ten least reliable genes {what}.", shown.tail(10), UNITS, links),
            Table(f"All {len(shown)} genes {what}.", shown, UNITS, links, folded=True),
        ],
    )


def _fit(run: Run) -> Section:
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
    if record.get("losses"):
        caption = (
            "Loss of the variational fit (nats per entry of the target), on the scale of all but its first tenth: it should have flattened; where it "
            "still falls, more steps would change the result."
        )
        runs = record["losses"] if "seeds" in record else [record["losses"]]
        longest = max(map(len, runs))
        losses = [[*run, *[np.nan] * (longest - len(run))] for run in runs]
        figures[caption] = plots.loss_curve(losses, unit="loss (nats per entry)", name="seed")
    if record.get("watched"):
        watched = pd.DataFrame(record["watched"]).set_index("step")
        tables.append(Table("What was watched while training.", watched, folded=True))
        caption = (
            "The game while it was played. Losses are those of the translators' factors and of the critics; alignment: mmd 0, accuracy 0.5 and "
            "mixing 1 where nobody can tell translated codes from the other side's own."
        )
        figures[caption] = plots.traces(watched)
    return Section("Fit", tables=tables, figures=figures)


# ---- the browser ----


def browser_of(
    run: Run, predicted: ad.AnnData, scores: pd.DataFrame, genes: list[str], truth: Counts | None, noun: str, seed: int
) -> tuple[str, str]:
    """The browser's HTML and a paragraph about what it shows."""
    if "spatial" not in predicted.obsm:
        return "", "There are no maps to browse: the target has no coordinates (obsm['spatial'])."
    n = predicted.n_obs
    rows = np.arange(n)
    if n > MAX_CELLS:
        rows = np.sort(np.random.default_rng([seed, 32]).permutation(n)[:MAX_CELLS])
    table = predicted[rows, genes]
    names = np.asarray(table.obs_names, dtype=str)
    layer = run.recalibration
    ends = ("q05", "q95") if layer is None else ("lower", "upper")
    kind = "90 % interval (raw)" if layer is None else f"{layer.level:.0%} interval (recalibrated)".replace("%", " %")
    low, high = (np.asarray(table.layers[end], dtype=np.float64) for end in ends)
    observed = _observed(run, truth, names, genes)
    facts = [_facts(scores, gene, bool(run.measured[run.genes == gene][0])) for gene in genes]
    maps = GeneMaps(
        _apart(table, getattr(run.config, "library_key", None)), names.tolist(), genes, np.asarray(table.layers["rate_mean"]),
        np.asarray(table.layers["rate_sd"]), high - low, observed, facts, kind, noun,
    )  # fmt: skip
    about = (
        f"Every dot is a {noun}. Observed and predicted maps share one scale; its top is the 99.5 % quantile of the values above 0, so single "
        f"extreme {noun}s do not blank the map. Counts and interval widths are stored exactly, the other values to within {RELATIVE_ERROR:.1%}."
    )
    if n > MAX_CELLS:
        about += f" Of {n:,} {noun}s {MAX_CELLS:,}, picked at random, are shown."
    return gene_browser(maps), about


def _apart(table: ad.AnnData, key: str | None) -> NDArray[np.float64]:
    """Positions with the sections of several slides side by side, each beginning at the same height."""
    xy = np.array(table.obsm["spatial"], dtype=np.float64)
    column = key if key is not None else "section"  # of a method of images
    left = 0.0
    for _, rows in table.obs.groupby(column, sort=False, observed=True).indices.items() if column in table.obs else ():
        low, high = xy[rows].min(0), xy[rows].max(0)
        xy[rows] += [left - low[0], -low[1]]
        left += 1.1 * float(high[0] - low[0])
    return xy


def _observed(run: Run, truth: Counts | None, cells: NDArray[np.str_], genes: list[str]) -> NDArray[np.float64] | None:
    """Counts of the genes that have any: of the truth, or of the target where the fit saw them; NaN columns else, None without any."""
    values = np.full((len(cells), len(genes)), np.nan)
    for source in (run.target, truth):  # the truth goes over the target
        if source is None:
            continue
        at = [g for g, gene in enumerate(genes) if gene in set(source.genes)]
        if at:
            rows = pd.Index(source.names).get_indexer(pd.Index(cells))
            values[:, at] = source.take_genes([genes[g] for g in at]).matrix[rows].toarray()
    return None if np.isnan(values).all() else values


def _facts(scores: pd.DataFrame, gene: str, measured: bool) -> dict[str, str]:
    facts = {"in the panel": "yes: the fit saw these counts"} if measured else {"in the panel": "no: never measured"}
    if gene in scores.index:
        row = scores.loc[gene]
        facts["trust"] = f"{row['trust']:.2f}" + (" (low)" if row["trust"] < LOW_TRUST else "")
        if "between_fits" in row:
            facts["doubt between fits"] = f"{row['between_fits']:.0%}"
        if "raw_pcc" in row:
            facts["PCC (ceiling)"] = f"{row['raw_pcc']:.2f} ({row['raw_ceiling']:.2f})"
            facts["coverage of the raw 90 % interval"] = f"{row['coverage_90']:.0%}"
            facts["mean observed count"] = f"{row['mean_count']:.3g}"
    return facts


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return flat


def _source(run: Run, role: str) -> str:
    """Name of the file that the counts came from."""
    path = (run.manifest.get("inputs", {}).get(role) or {}).get("path")
    return Path(path).name if path else "from memory"

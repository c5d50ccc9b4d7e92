"""The report of a run: what was fitted, on what, how long; how far to trust it; a browser of its genes.

With a truth (counts of the same cells, of genes that the fit did not see) everything is judged on it, beside the baselines on the same split and
the noise ceiling. Without one the page says what the model itself expects, and what recalibration found on inner held-out genes.
Nothing is fitted here. Predictions are made once, for the genes that are judged or browsed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import metrics, report_sections
from ppl_st.api import Source, load
from ppl_st.baselines import REFERENCE_BASELINES, SPOT_BASELINES, Split, supervised_ridge
from ppl_st.browser import MAX_CELLS, RELATIVE_ERROR, GeneMaps, gene_browser
from ppl_st.calibration import variance_decomposition
from ppl_st.checks import predictive_checks
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.posterior import Run
from ppl_st.report import Section, evaluation_report, write_report
from ppl_st.run_folder import read_json
from ppl_st.stack import Spec as Mixture
from ppl_st.warning_signs import LOW_TRUST, UPPER, reference_kind, warning_signs

__all__ = ["BROWSED", "browser_of", "report_folder", "report_run"]

BROWSED = 50  # genes of the browser unless they are named
SCREENED = 150  # unmeasured genes whose trust is looked at when there is no truth
MAX_ENTRIES = 2e7  # cells x judged genes, and cells x browsed genes, that are predicted at once


def report_folder(
    folder: str | Path,
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    truth: Source | None = None,
    groups: str | None = None,
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
        if genes is not None or truth is not None or groups is not None:
            raise UserError(f"{folder}: is an evaluation; genes, truth and groups go with the report of a run")
        evaluation_report(folder, path)
        return
    if not (folder / "manifest.json").is_file():
        inner = f"; it holds a run: give {folder / 'run'}" if (folder / "run").is_dir() else ""
        missing = "" if folder.exists() else " (it does not exist)"
        raise UserError(f"{folder}: neither a run folder nor an evaluation{missing}{inner}")
    read_json(folder / "manifest.json")  # a damaged folder is said to be one
    report_run(load(folder), path, genes=genes, truth=truth, groups=groups, draws=draws, seed=seed, say=say)


def report_run(
    run: Run,
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    truth: Source | None = None,
    groups: str | None = None,
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
        Genes to browse, `MAX_ENTRIES` over the number of cells at most; None = with a truth `BROWSED` genes of it from the best to the worst
        predicted, else the `BROWSED` that the model trusts most among the `SCREENED` unmeasured genes highest in the reference.
    truth
        Counts of the run's cells for genes that the fit did not see.
    groups
        Column of the target's ``obs``: with a truth, coverage is shown in each of its groups of cells as well.
    draws, seed
        Of the predictions.
    say
        Receives one line per event.
    """
    talk = say or (lambda line: None)
    if groups is not None and truth is None:
        raise UserError(f"groups {groups!r}: coverage in groups of cells is that of a truth; give --truth COUNTS.h5ad, or leave out --groups")
    labels = _labels(run, groups)
    most = max(1, int(MAX_ENTRIES // max(1, len(run.target.names))))
    if genes is not None and len(set(genes)) > most:
        raise UserError(
            f"genes: {len(set(genes))} genes in {len(run.target.names)} rows are more than a page can hold; name {most} or fewer (--genes), and use "
            "ppl-st predict for all of them"
        )
    noun = "spot" if reference_kind(run) == "image" else "cell"
    counted = None if truth is None else run.counts_of(truth)
    judged, note = _judged(run, counted, seed, most)
    talk(f"predicting {len(judged)} genes in {len(run.target.names)} {noun}s, {draws} draws")
    predicted = run.predict(judged, truth=counted, lognorm=counted is not None, draws=draws, seed=seed)
    scores, methods = predicted.var, {}
    if counted is not None:
        talk("baselines on the same split")
        methods = _methods(run, counted, predicted, seed)
        scores = methods[run.method].join(predicted.var.reindex(columns=["trust", "between_fits"]).dropna(axis=1))
    shares = variance_decomposition(*(predicted.layers[name] for name in ("rate_mean", "rate_sd", "count_sd"))).set_axis(predicted.var_names)
    scores = scores.join(shares.div(shares.sum(axis=1), axis=0))
    boundless = int(np.isinf(predicted.layers["upper"]).any(0).sum()) if "upper" in predicted.layers else 0
    talk("predictive checks")
    checks = predictive_checks(run, counted, None if counted is None else judged, seed=seed)
    browsed, why = _browsed(run, judged, scores, genes, counted is not None)
    already = set(judged)
    others = [gene for gene in browsed if gene not in already]
    if others:
        predicted = ad.concat(
            [predicted, run.predict(others, draws=draws, seed=seed)], axis=1, merge="first", uns_merge="first", join="outer"
        )
    talk(f"browser of {len(browsed)} genes")
    unit = "px" if reference_kind(run) == "image" else "units of the file"
    browser, about = browser_of(run, predicted, scores, browsed, counted, noun, seed, unit)
    links = {gene: f"#gene={quote(gene, safe='')}" for gene in browsed}
    short = report_sections.in_short(run, scores, methods, noun) + note
    page = [
        Section("In short", short, warnings=warning_signs(run, scores, methods, noun, boundless, checks)),
        Section("Gene browser", f"{why} {about}", html=browser),
    ]
    if counted is not None:
        page += [report_sections.accuracy(run, scores, methods), report_sections.calibration(run, predicted[:, judged], scores, labels)]
    elif run.inner is not None and run.recalibration is not None:
        page.append(report_sections.inner_calibration(run, run.inner, run.recalibration))
    page += [report_sections.checked(checks, noun, counted is not None), report_sections.genes(scores, links, noun)]
    page += [report_sections.metagenes(run, predicted)] if hasattr(run.module, "profiles") else []
    page.append(report_sections.fit(run))
    name = f"{run.method}: {run.folder.name}" if run.folder else f"A run of {run.method}"
    write_report(path, name, page, manifest=run.manifest)


def _labels(run: Run, groups: str | None) -> NDArray[np.str_] | None:
    """Group of every cell."""
    if groups is None:
        return None
    if groups not in run.target.obs:
        raise UserError(f"groups: the target has no column {groups!r} in obs; it has {', '.join(map(str, run.target.obs.columns)) or 'none'}")
    return np.asarray(run.target.obs[groups].astype(str), dtype=str)


# ---- which genes ----


def _judged(run: Run, truth: Counts | None, seed: int, most: int) -> tuple[list[str], str]:
    """Genes that are predicted and judged, and what to say about the choice."""
    unmeasured = run.genes[~run.measured]
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


def _methods(run: Run, truth: Counts, predicted: ad.AnnData, seed: int) -> dict[str, pd.DataFrame]:
    """Score table per method, ours first, on the genes of ``predicted``."""
    genes = np.asarray(predicted.var_names, dtype=str)
    counts = truth.take_genes(genes).matrix[pd.Index(truth.names).get_indexer(predicted.obs_names)]
    total = run.shared_total
    ours = metrics.score_prediction(counts, np.asarray(predicted.X), np.asarray(predicted.layers["lognorm_mean"]), total, genes)
    tables = {run.method: ours.join(predicted.var.drop(columns=["measured", "trust", "between_fits", "mean_count"], errors="ignore"))}
    if run.target.xy is None:  # spots are copied by place, and the upper reference smooths over neighbors
        return tables
    spots, library_key = reference_kind(run) == "spots", getattr(run.config, "library_key", None)
    split = Split(run.target, run.reference, genes, seed, library_key)
    if spots:
        data = run.data[0] if isinstance(run.spec, Mixture) else run.data
        split = Split.placed((data, run.target, run.reference), genes, seed, library_key)
    for name, one in (SPOT_BASELINES if spots else REFERENCE_BASELINES).items():
        tables[f"baseline: {name}"] = metrics.score_table(counts, one.estimate(split), total, genes, scale=one.scale)
    tables[UPPER] = metrics.score_table(counts, supervised_ridge(split, counts, min(5, counts.shape[0])), total, genes, scale="log")
    return tables


# ---- the browser ----


def browser_of(
    run: Run, predicted: ad.AnnData, scores: pd.DataFrame, genes: list[str], truth: Counts | None, noun: str, seed: int,
    xy_unit: str,
) -> tuple[str, str]:  # fmt: skip
    """The browser's HTML and a paragraph about what it shows; ``xy_unit`` of the coordinates."""
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
    measured = dict(zip(run.genes.tolist(), run.measured.tolist(), strict=True))
    facts = [_facts(scores, gene, measured[gene]) for gene in genes]
    maps = GeneMaps(
        _apart(table, getattr(run.config, "library_key", None)), names.tolist(), genes, np.asarray(table.layers["rate_mean"]),
        np.asarray(table.layers["rate_sd"]), high - low, observed, facts, kind, noun, xy_unit,
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
        known = set(source.genes)
        at = [g for g, gene in enumerate(genes) if gene in known]
        if at:
            rows = pd.Index(source.names).get_indexer(pd.Index(cells))
            values[:, at] = source.take_genes([genes[g] for g in at]).matrix[rows].toarray()
    return None if np.isnan(values).all() else values


def _facts(scores: pd.DataFrame, gene: str, measured: bool) -> dict[str, str]:
    facts = {"in the panel": "yes: the fit saw these counts"} if measured else {"in the panel": "no: hidden from the fit, or never measured"}
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

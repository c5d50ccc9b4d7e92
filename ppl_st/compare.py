"""Runs and evaluations judged gene by gene against each other, in pairs.

Genes are the units: the methods saw the same split, so a hard gene is hard for all of them and the *difference* to the best method is far less
noisy than either score. With s_mg the score of method m on gene g and b the method with the best mean,

    difference_m = mean_g (s_mg - s_bg),   [lo, hi] = 95 % bootstrap interval of it over genes (the same resamples for every method)

An interval that holds 0 says that these genes cannot tell the two apart. Evaluations of images have a score per gene and section: methods are paired
in both, then a gene's score is its mean over sections, as its sections are no independent evidence. Those that hid other spots have none in common.

By log score there are also stacking weights (`ppl_st.stack`) and a row "stack": the mixture of all methods. Its score on a gene is that under weights
learned on the *other* parts of the genes, so the row is no better than what a user would get. Both rest on the cells whose
log probabilities all folders kept, up to 2,000, picked by name: how many is said, and where fewer than 200 of a larger number meet there is no row.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ppl_st.api import Source, load
from ppl_st.conformal import INNER_CELLS, inner_rows
from ppl_st.data import matched
from ppl_st.errors import UserError
from ppl_st.evaluate import BYTES_PER_PREDICTION, UPPER
from ppl_st.evaluation_folder import read_entries, read_scores
from ppl_st.metrics import bootstrap_mean, score_prediction
from ppl_st.models import METHODS
from ppl_st.posterior import Run
from ppl_st.run_folder import read_json
from ppl_st.stack import cross_stacked, stacking_weights, unlike_inputs

__all__ = ["METRICS", "compare"]

# Metric -> +1 if more is better, -1 if less is.
METRICS = {
    "log_score": 1, "crps": -1, "coverage_error": -1, "log_pcc": 1, "log_scc": 1, "raw_pcc": 1, "raw_scc": 1, "log_ssim": 1, "log_js": -1,
    "seconds": -1, "peak_gb": -1,
}  # fmt: skip

STACK = "stack"
LEAST_CELLS = 200  # that a mixture is judged in, where the methods have more cells than were kept


def compare(
    sources: Sequence[str | Path],
    *,
    truth: Source | None = None,
    metric: str = "log_score",
    draws: int = 100,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Compare evaluations and runs on the genes that all of them were judged on.

    Parameters
    ----------
    sources
        Folders of `ppl_st.evaluate` (every method in them, baselines too; not the upper reference, which sees the truth) and run folders.
    truth
        Counts of the cells of the runs, needed for run folders: their held-out genes are scored.
    metric
        Key of `METRICS` by which methods are ranked. Methods without it (a baseline has no log score) are left out.
    draws, seed
        Posterior draws of a run's prediction; seed of draws and bootstrap.
    say
        Receives one line per event.

    Returns
    -------
    DataFrame
        One row per method, the best first: rank, genes, the metric's mean and its standard error over genes ``se``, ``difference`` to the best with
        ``lo``, ``hi`` and standard error ``dse``, ``wins`` (share of genes on which it beats the best), ``gene_rank`` (mean over genes of its
        place among the methods), stacking ``weight``, then the means of all other metrics. ``coverage_error`` is the mean over genes of
        |coverage_90 - 0.9|, ``seconds`` of an evaluation those of start, fit and prediction, of a run without the prediction. The row "stack" is not
        among the ranks.

    Raises
    ------
    UserError
        Unknown metric, a folder that is neither, evaluations of other counts, runs of other cells, no truth for a run, or no gene in common.
    """
    talk = say or (lambda line: None)
    if metric not in METRICS:
        raise UserError(f"compare: unknown metric {metric!r}; one of {', '.join(METRICS)}")
    places = [Path(source).resolve() for source in sources]
    if twice := [source for k, source in enumerate(sources) if places[k] in places[:k]]:
        raise UserError(f"compare: {twice[0]} is given twice; name each folder once")
    _check_alike([Path(source) for source in sources], talk)
    found: list[tuple[str, Path, pd.DataFrame, pd.DataFrame | None]] = []  # method, folder, scores, log probabilities
    first: Seen | None = None  # of the runs
    for source in map(Path, sources):
        if (source / "scores.csv").is_file():
            scored, log_probs = _of_evaluation(source)
        else:
            run = load(source)
            own = Seen(source, np.sort(run.target.names), frozenset(run.genes[run.measured].tolist()), run.manifest.get("inputs", {}))
            first = first or own
            _check_seen(own, first, talk)
            scored, log_probs = _of_run(run, source, truth, draws, seed, talk)
        for name, table in scored.items():
            table = table.assign(coverage_error=(table["coverage_90"] - 0.9).abs()) if "coverage_90" in table else table
            if metric not in table or not np.isfinite(table[metric].astype(float)).all():
                talk(f"{source}: {name} has no {metric} that is finite for every gene, and is left out")
                continue
            found.append((name, source, table, log_probs.get(name)))
    names = [name for name, *_ in found]
    labels = [name if names.count(name) == 1 else f"{name} ({source})" for name, source, *_ in found]
    tables = {label: table for label, (_, _, table, _) in zip(labels, found, strict=True)}
    entries = {label: log_prob for label, (*_, log_prob) in zip(labels, found, strict=True) if log_prob is not None}
    if len(tables) < 2:
        raise UserError(f"compare: {len(tables)} methods with {metric}; there is nothing to compare")
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not common:
        raise UserError(
            "compare: the folders have no held-out gene in common; evaluate all methods with the same --folds (of images: hold out the same spots of "
            "the same sections) and --seed"
        )
    every = set.union(*(set(table.index) for table in tables.values()))
    if len(common) < len(every):
        what = "pairs of gene and section" if common[0][1] else "genes"
        talk(f"{len(common)} of {len(every)} {what} were held out in every folder; only they are compared")
    paired = {name: table.loc[common].groupby(level="gene").mean(numeric_only=True) for name, table in tables.items()}
    ranked, genes = _ranked(paired, metric, seed), sorted({gene for gene, _ in common})
    if metric != "log_score" or set(entries) != set(tables):
        return ranked
    order = [str(name) for name in ranked.index]
    return _with_stack(ranked, {name: entries[name] for name in order}, genes, seed, talk)


class Seen(NamedTuple):
    """What a run was fitted to."""

    folder: Path
    cells: np.ndarray  # names, sorted
    genes: frozenset[str]  # that the target and the reference share and the fit was shown
    inputs: dict[str, Any]


def _check_seen(own: Seen, first: Seen, say: Callable[[str], None]) -> None:
    """Refuse runs on other cells; say where they saw other genes or files: their difference is then not one of methods alone."""
    if not np.array_equal(own.cells, first.cells):
        raise UserError(f"compare: {own.folder} was fitted on other cells than {first.folder}; fit both on the same target")
    if odd := sorted(own.genes ^ first.genes):
        say(
            f"compare: {len(odd)} genes were shown to one of {own.folder} and {first.folder} and hidden from the other, e.g. {', '.join(odd[:3])}: "
            "not the same split; fit both with the same --hold-out"
        )
    for role in unlike_inputs(first.inputs, own.inputs):
        if role != "hold-out":
            say(f"compare: {own.folder} was fitted to another {role} ({own.inputs[role]['path']}) than {first.folder} ({first.inputs[role]['path']})")


def _check_alike(folders: Sequence[Path], say: Callable[[str], None]) -> None:
    """Refuse evaluations on other counts; say in what else their splits differ, and which runs were fitted to another target."""
    paths = [folder / "evaluation.json" for folder in folders]
    records = [(path.parent, read_json(path)) for path in paths if path.is_file()]
    for folder, record in records[1:]:
        first, known = records[0]
        given, others = (each.get("inputs", {}) for each in (known, record))
        for role in (role for role in given if role in others):
            one, other = given[role], others[role]
            if one["path"] and other["path"] and one["sha256"] != other["sha256"]:
                what = f"compare: {folder} is of another {role} ({other['path']}) than {first} ({one['path']})"
                if role not in ("reference", "folds"):
                    raise UserError(f"{what}; evaluate all methods on the same file")
                say(what)
        for key in ("folds", "max_folds", "seed", "draws"):
            if key in known and key in record and known[key] != record[key]:
                say(f"compare: {folder} was made with {key} {record[key]}, {first} with {known[key]}: not the same split and draws")
    runs = [folder for folder in folders if not (folder / "scores.csv").is_file() and (folder / "manifest.json").is_file()]
    for folder in runs if records else []:
        first, known = records[0]
        given, own = known.get("inputs", {}), read_json(folder / "manifest.json").get("inputs", {})
        if known.get("folds") is not None:
            say(f"compare: the fits of {first} hid one fold of genes after the other, {folder} what it was told to: they learned from other genes")
        if "target" in unlike_inputs(given, own):
            where = [one["target"]["path"] or "in memory" for one in (own, given)]
            say(f"compare: {folder} was fitted to another target ({where[0]}) than {first} is of ({where[1]}): they may be scored in other cells")


Tables = tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]


def _of_evaluation(folder: Path) -> Tables:
    """Method -> scores [(gene, section) x metrics], and method -> log predictive probabilities [cells x genes] where they are known.

    The section, with what was hidden in it, is "" but in evaluations of images.
    """
    scores = read_scores(folder).assign(section="")
    scores = scores[scores["kind"] != UPPER]  # it saw the truth: no competitor
    record = read_json(folder / "evaluation.json") if (folder / "evaluation.json").is_file() else {}
    if "holdout" in record:  # a share: which spots of each section are hidden depends on the seed
        hidden = sorted(record["holdout"]) if isinstance(record["holdout"], list) else (record["holdout"], record["seed"])
        scores["section"] = scores["fold"] + f", hidden: {hidden}"
    if scores.duplicated(["method", "gene", "section"]).any():
        raise UserError(f"{folder / 'scores.csv'}: a gene is held out in several folds; compare needs one score per gene")
    found = {str(name): table.set_index(["gene", "section"]) for name, table in scores.groupby("method", sort=False)}
    return found, read_entries(folder)


def _of_run(run: Run, folder: Path, given: Source | None, draws: int, seed: int, say: Callable[[str], None]) -> Tables:
    """The same of a run, on its held-out genes."""
    if METHODS[run.method].reference == "image":
        raise UserError(
            f"compare: {folder} is a run of {run.method}, which learns from every gene of its spots: it is judged on hidden spots. Evaluate each "
            f"variant (ppl-st evaluate --methods {run.method} ... --holdout-spots 0.5 --seed 0) and compare those folders"
        )
    if given is None:
        raise UserError(f"{folder} is a run: give the counts to judge it by (--truth)")
    truth = run.counts_of(given)
    held_out = [gene for gene in run.genes[~run.measured] if gene in set(truth.genes)]
    if not held_out:
        what = f"none of the {len(truth.genes)} genes of the truth ({truth.source}) was held out from this run"
        raise UserError(f"{folder}: {what}; fit it with --hold-out")
    say(f"{folder}: {run.method}, {len(held_out)} held-out genes; its seconds are those of the fit, an evaluation's those of prediction, too")
    cells = len(run.target.names)
    kept = inner_rows(run.target.names)
    width = max(1, int(1e9 / (BYTES_PER_PREDICTION * cells)))
    tables, logs = [], []
    for genes in (held_out[start : start + width] for start in range(0, len(held_out), width)):
        predicted = run.predict(genes, draws=draws, seed=seed, truth=truth, lognorm=True)
        mean, lognorm = np.asarray(predicted.X), np.asarray(predicted.layers["lognorm_mean"])
        table = score_prediction(matched(truth, run.target, np.array(genes)), mean, lognorm, run.shared_total, genes)
        tables.append(table.join(predicted.var[["log_score", "crps", "coverage_90"]]))
        logs.append(pd.DataFrame(predicted.layers["log_prob"][kept], predicted.obs_names[kept], genes))
    table = pd.concat(tables).set_axis(pd.MultiIndex.from_product([held_out, [""]], names=["gene", "section"]))
    seconds = run.record["start_seconds"] + run.record["seconds"]
    table = table.assign(seconds=seconds, peak_gb=run.record["peak_memory_bytes"] / 1e9)
    return {run.method: table}, {run.method: pd.concat(logs, axis=1)}


def _ranked(tables: dict[str, pd.DataFrame], metric: str, seed: int) -> pd.DataFrame:
    sign = METRICS[metric]
    places = pd.DataFrame({name: -sign * table[metric] for name, table in tables.items()}).rank(axis=1).mean()
    order = sorted(tables, key=lambda name: -sign * float(tables[name][metric].mean()))
    best = tables[order[0]][metric].to_numpy(dtype=np.float64)
    rows = []
    for rank, name in enumerate(order, start=1):
        values = tables[name][metric].to_numpy(dtype=np.float64)
        interval = bootstrap_mean(values - best, np.random.default_rng(seed))
        row = {"method": name, "rank": rank, "genes": len(values), metric: values.mean(), "se": _standard_error(values)}
        row |= {"difference": interval.mean, "lo": interval.lo, "hi": interval.hi, "dse": _standard_error(values - best)}
        row |= {"wins": float((sign * values > sign * best).mean()), "gene_rank": float(places[name])}
        others = [other for other in METRICS if other != metric and other in tables[name]]
        rows.append(row | {other: tables[name][other].mean() for other in others})
    return pd.DataFrame(rows).astype({"rank": "Int64"}).set_index("method")


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _with_stack(
    ranked: pd.DataFrame, entries: dict[str, pd.DataFrame], genes: list[str], seed: int, say: Callable[[str], None]
) -> pd.DataFrame:
    """The table with stacking weights, and the mixture as its last row; its difference is to the best method on the same cells."""
    cells = sorted(set.intersection(*(set(table.index) for table in entries.values())))
    if not cells or len(genes) < 2:
        say(f"{len(genes)} genes and {len(cells)} cells in common: too few for weights and the row {STACK}")
        return ranked
    if len(cells) < LEAST_CELLS and max(map(len, entries.values())) >= INNER_CELLS:
        say(
            f"the log probabilities that were kept have {len(cells)} cells in common, too few for weights and the row {STACK} (at least "
            f"{LEAST_CELLS}); evaluate all methods on the same target, with this version"
        )
        return ranked
    say(f"weights and the row {STACK} rest on {len(cells)} cells, those whose log probabilities every folder kept")
    log_prob = np.stack([table.loc[cells, genes].to_numpy(dtype=np.float64) for table in entries.values()])
    difference = cross_stacked(log_prob, genes, seed).mean(0) - log_prob[0].mean(0)
    interval = bootstrap_mean(difference, np.random.default_rng(seed))
    row = {"genes": len(genes), "log_score": ranked["log_score"].iloc[0] + interval.mean, "difference": interval.mean}
    row |= {"lo": interval.lo, "hi": interval.hi, "dse": _standard_error(difference), "wins": float((difference > 0).mean())}
    table = pd.concat([ranked, pd.DataFrame([row], index=pd.Index([STACK], name="method"))])
    table.insert(list(table.columns).index("gene_rank") + 1, "weight", [*stacking_weights(log_prob), np.nan])
    return table.astype({"rank": "Int64"})

"""Judge methods on genes that they were not shown, beside cheap baselines on the same split.

Two ways to know the truth:

- k folds over the genes that target and reference share: `gene_folds` with a seed, or a file of lines
  ``gene<TAB>fold``. Each fold is taken out of the target, predicted, and compared with what was measured.
- a truth file: genes that the target never measured, counted in the same cells. One fit on all of the target.

With folds, cells without a count in the training genes of any fold are dropped for everybody (they have no
depth). Every competitor sees the target's training genes and the whole reference. `supervised_ridge` is the
exception and says so: an upper reference that sees the truth in other cells.

Scores are per gene over cells (`ppl_st.metrics.score_table`, ``raw`` and ``log`` scale); methods add the log
score, CRPS and randomised coverage of their predictive distribution. Ranks use `RANKED` only: rmse and js
reward a constant. Intervals are bootstraps over genes. Memory: predictions are made in blocks of genes within
``memory_gb``; a baseline builds cells x held-out genes once.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import config as configs
from ppl_st.api import Source, fit
from ppl_st.baselines import REFERENCE_BASELINES, SPOT_BASELINES, Split, supervised_ridge
from ppl_st.conformal import inner_rows
from ppl_st.data import Counts, gene_folds, shared_genes
from ppl_st.errors import UserError
from ppl_st.evaluation_folder import begun, refuse_evaluated, write_csv, write_entries
from ppl_st.layers import read_layers
from ppl_st.metrics import bootstrap_mean, log1p_normalise, score_prediction, score_table
from ppl_st.models import METHODS, load_method
from ppl_st.pairs import as_given, read_like, read_pair
from ppl_st.peers import PEERS, check, draw_scores
from ppl_st.prepare import MIN_SHARED, load_prepare, refuse_few_genes

__all__ = ["RANKED", "Evaluation", "evaluate", "read_folds", "summarise"]

RANKED = ("raw_pcc", "raw_scc", "raw_partial_pcc", "log_pcc", "log_scc", "log_partial_pcc", "log_score")
UPPER = "upper reference: sees truth"
BYTES_PER_PREDICTION = 44  # ten float32 layers and X


class Evaluation(NamedTuple):
    """``scores``: a row per method and gene. ``summary``: a row per method and metric, over genes."""

    scores: pd.DataFrame
    summary: pd.DataFrame


@dataclass(frozen=True)
class _Reading:
    """What can be set in an evaluation of peers alone: how the files are read."""

    layer: str | None = None
    gene_key: str | None = None
    library_key: str | None = None


class _Task(NamedTuple):
    """One split: what is hidden, what was really counted there, and what may be seen."""

    fold: str
    held_out: NDArray[np.str_]
    truth: Counts
    target: Counts


def evaluate(
    methods: Sequence[str],
    target: Source,
    reference: Source,
    *,
    folds: int | str | Path = 5,
    truth: Source | None = None,
    max_folds: int | None = None,
    baselines: bool = True,
    seed: int = 0,
    preset: str = "default",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    draws: int = 100,
    memory_gb: float = 1.0,
    out: str | Path | None = None,
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Evaluation:
    """Fit and score every method on every split.

    Parameters
    ----------
    methods
        Names in ``ppl_st.METHODS`` or, where the extra ``peers`` is installed, in ``ppl_st.peers.PEERS``.
    target, reference
        As in `ppl_st.fit`.
    folds
        Number of folds, or a file of lines ``gene<TAB>fold``.
    truth
        Counts of the same cells; its genes that the target lacks and the reference has are scored instead of folds.
    max_folds
        Run only the first so many folds; cells are still dropped as if all were run.
    baselines
        Whether to run the baselines and the upper reference as well.
    seed
        Seeds folds, fits, draws and bootstraps.
    preset, config, overrides, device, progress, command
        Of every fit, as in `ppl_st.fit`.
    draws, memory_gb
        Posterior draws of a prediction, and the bound on their memory.
    out
        Folder for ``scores.csv`` and ``log_prob.npz`` (rewritten after every split, and kept where a later one fails), ``summary.csv`` and
        ``evaluation.json``; nothing stays where the first split fails.
    say
        Receives one line per event.

    Raises
    ------
    UserError
        Wrong input or settings, or a folder that already holds an evaluation.
    """
    talk = say or (lambda line: None)
    if not methods or len(set(methods)) < len(methods):
        raise UserError(f"evaluate: methods are {', '.join(methods) or 'none'}; name each method once")
    if max_folds is not None and max_folds < 1:
        raise UserError(f"evaluate: max_folds={max_folds}; at least 1")
    own, others = [m for m in methods if m not in PEERS], [m for m in methods if m in PEERS]
    check(others)
    spots = _reference_is_spots(own)
    if spots and others:
        raise UserError(f"evaluate: {', '.join(own)} takes spots as reference, {', '.join(others)} dissociated cells; evaluate apart")
    settings = _shared_settings(own, preset, config, overrides)
    layer, gene_key, library_key = (getattr(settings, name, None) for name in ("layer", "gene_key", "library_key"))
    folder, record = None if out is None else Path(out), {}
    if folder is not None:
        refuse_evaluated(folder)
        inputs = {"target": target, "reference": reference} | ({} if truth is None else {"truth": truth})
        inputs |= {} if truth is not None or isinstance(folds, int) else {"folds": folds}
        record = configs.manifest(seed=seed, device=device, inputs=inputs, command=command)
        record |= {"methods": list(methods), "preset": preset, "overrides": list(overrides)}
        record |= {"folds": str(folds) if truth is None else None, "max_folds": max_folds, "draws": draws}
    pair = read_pair(target, reference, layer=layer, gene_key=gene_key, need_spatial=(spots, spots), say=talk)
    cells, other = map(as_given, pair)
    if baselines and cells.xy is None:
        where = f"evaluate: target ({cells.source}) has no obsm['spatial'], which the baselines need"
        raise UserError(f"{where}; store x and y there, or leave the baselines out (--no-baselines; in Python baselines=False)")
    names = getattr(settings, "reference_layers", ())
    further = read_layers(reference, names, gene_key=gene_key) if names else []
    layers = {name: one.take_genes(other.genes).matrix for name, one in zip(names, further, strict=True)}
    known = None if truth is None else read_like(truth, role="truth", layer=layer, gene_key=gene_key)
    tasks = islice(_tasks(cells, other, folds, known, seed, talk), max_folds)
    first = next(tasks)  # what is wrong with the split is said before anything is written

    parts, entries = [], []
    with begun(folder, record):
        for task in chain([first], tasks):
            talk(f"fold {task.fold}: {len(task.held_out)} held-out genes, {len(task.target.names)} cells")
            split = Split(task.target, other, task.held_out, seed, library_key)
            if spots and baselines:  # they copy spots by place
                problem = load_prepare(own[0]).problem(task.target, other, settings, lambda line: None)
                split = Split.placed(problem, task.held_out, seed, library_key)
            for method in others:
                parts.append(_score_peer(method, task, split, draws))
                talk(line_of(parts[-1]))
            for method in own:
                options: dict[str, Any] = {"overrides": overrides, "config": config}
                options |= {"preset": preset, "seed": seed, "device": device, "progress": progress, "say": say}
                handed = [_adata(one, layer, gene_key, more) for one, more in ((task.target, {}), (other, layers))]
                table, log_prob = _score_method(method, task, split, handed, options, draws, memory_gb)
                parts.append(table)
                entries.append(log_prob)
                talk(line_of(parts[-1]))
            if baselines:
                for table in _score_baselines(task, split, SPOT_BASELINES if spots else REFERENCE_BASELINES):
                    parts.append(table)
                    talk(line_of(table))
            if folder is not None:
                write_csv(pd.concat(parts, ignore_index=True), folder / "scores.csv")
                if own:
                    write_entries(folder, own, entries)
    scores = pd.concat(parts, ignore_index=True)
    summary = summarise(scores, seed, talk)
    if folder is not None:
        write_csv(summary, folder / "summary.csv")
    return Evaluation(scores, summary)


def summarise(scores: pd.DataFrame, seed: int = 0, say: Callable[[str], None] = lambda line: None) -> pd.DataFrame:
    """Mean, median and 95 % bootstrap interval over genes of every metric of every method, and ranks.

    A gene that is judged in several sections (rows) counts once, with its mean over them. What is not finite for every gene (a likelihood
    may give an observed count no chance) has none of these; ``say`` gets a line about it.

    Returns
    -------
    DataFrame
        Columns method, kind, metric, mean, median, lo, hi, genes, rank. ``rank`` (1 is best, by the mean) is
        given for `RANKED`, among methods and baselines. ``seconds`` is per fold, ``peak_gb`` the largest.
    """
    labels = {"method", "kind", "fold", "gene", "seconds", "peak_gb"}
    rows = []
    for (method, kind), table in scores.groupby(["method", "kind"], sort=False):
        row = {"method": method, "kind": kind, "genes": table["gene"].nunique()}
        for metric in [column for column in scores.columns if column not in labels]:
            values = table[metric].astype(np.float64)
            if values.isna().all():  # a baseline has no predictive distribution
                continue
            if len(odd := table["gene"][~np.isfinite(values)].unique()):
                say(f"{method}: {metric} is not finite for {len(odd)} of {row['genes']} genes, e.g. {odd[0]}, and left out")
                continue
            # The same resamples of genes for every method; sections of a gene are no independent evidence.
            interval = bootstrap_mean(values.groupby(table["gene"], sort=False).mean(), np.random.default_rng(seed))
            rows.append(row | {"metric": metric} | interval._asdict())
        per_fold = table.drop_duplicates("fold")
        rows.append(row | {"metric": "seconds", "mean": per_fold["seconds"].mean()})
        rows.append(row | {"metric": "peak_gb", "mean": per_fold["peak_gb"].max()})
    summary = pd.DataFrame(rows)[["method", "kind", "metric", "mean", "median", "lo", "hi", "genes"]]
    ranked = summary["metric"].isin(RANKED) & (summary["kind"] != UPPER)
    ranks = summary[ranked].groupby("metric")["mean"].rank(ascending=False, method="min")
    return summary.assign(rank=ranks.astype("Int64"))


def read_folds(path: str | Path) -> dict[str, NDArray[np.str_]]:
    """Fold label -> sorted genes, from lines ``gene<TAB>fold``; blank lines and ``#`` lines are ignored."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"folds ({path}): cannot be read ({error}); give a number, or a text file of lines gene<TAB>fold") from error
    found: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        gene, _, fold = (part.strip() for part in line.partition("\t"))
        if not (gene and fold):
            raise UserError(f"folds ({path}), line {number}: {line!r} is not gene<TAB>fold")
        if gene in seen:
            raise UserError(f"folds ({path}), line {number}: {gene} is already in line {seen[gene]}")
        seen[gene] = number
        found.setdefault(fold, []).append(gene)
    if not found:
        raise UserError(f"folds ({path}): names no gene; write lines gene<TAB>fold")
    labels = sorted(found, key=lambda label: (not label.isdigit(), label.zfill(9)))
    return {label: np.sort(np.array(found[label])) for label in labels}


# ---- splits ----


def _reference_is_spots(methods: Sequence[str]) -> bool:
    for method in methods:
        load_method(method)
    spots = [method for method in methods if METHODS[method].reference == "spots"]
    if spots and len(spots) < len(methods):
        rest = ", ".join(method for method in methods if method not in spots)
        raise UserError(f"evaluate: {', '.join(spots)} takes spots as reference, {rest} dissociated cells; evaluate apart")
    return bool(spots)


def _shared_settings(methods: Sequence[str], preset: str, config: Any, overrides: Sequence[str]) -> Any:
    """Settings of the first method: how the files are read; checks preset, file and overrides of all before any work."""
    found = []
    for presets in [load_method(method).PRESETS for method in methods] or [{"default": _Reading()}]:
        settings: Any = configs.pick_preset(presets, preset)
        settings = settings if config is None else configs.read(config, settings)
        found.append(configs.with_overrides(settings, overrides))
    return found[0]


def _tasks(
    cells: Counts, other: Counts, folds: int | str | Path, truth: Counts | None, seed: int, say: Callable[[str], None]
) -> Iterator[_Task]:
    """One split after the other, so that the counts of one at a time are in memory."""
    shared = np.sort(shared_genes(cells, other, minimum=MIN_SHARED))
    if truth is not None:
        counted = _same_cells(truth, cells)
        wanted = np.setdiff1d(np.intersect1d(counted.genes, other.genes), cells.genes)
        if not wanted.size:
            raise UserError(
                f"truth ({counted.source}): none of its {len(counted.genes)} genes is new to the target and in the reference; without --truth the "
                "target's own genes are held out in folds"
            )
        parts = {"0": wanted}
    elif isinstance(folds, int):
        counted = cells
        parts = {str(i): genes for i, genes in enumerate(gene_folds(shared, folds, seed))}
    else:
        counted, parts = cells, read_folds(folds)
        unknown = np.setdiff1d(np.concatenate(list(parts.values())), shared)
        if unknown.size:
            shown = f"{unknown.size} genes are not shared by target and reference, e.g. {', '.join(unknown[:3])}"
            raise UserError(f"folds ({folds}): {shown}; list shared genes only")
    keep = np.ones(len(cells.names), dtype=bool)
    for genes in parts.values():
        training = shared[~np.isin(shared, genes)]
        if truth is None:
            refuse_few_genes("evaluate", len(shared), len(genes))
            keep &= cells.take_genes(training).totals > 0
    if not keep.all():
        say(f"{int((~keep).sum())} cells have no count in the training genes of some fold and are dropped")
    cells, counted = cells.take_rows(keep), counted.take_rows(keep)
    for fold, genes in parts.items():
        seen = cells.take_genes(cells.genes[~np.isin(cells.genes, genes)])
        yield _Task(fold, genes, counted.take_genes(genes), seen)


def _same_cells(truth: Counts, cells: Counts) -> Counts:
    index = pd.Index(truth.names).get_indexer(pd.Index(cells.names))
    if (index < 0).any():
        missing = cells.names[index < 0]
        shown = f"{len(missing)} of the target's {len(index)} cells are not in it, e.g. {', '.join(missing[:3])}"
        raise UserError(f"truth ({truth.source}): {shown}; the truth must count the same cells (obs_names)")
    return truth.take_rows(index)


# ---- scoring ----


def _score_method(
    method: str, task: _Task, split: Split, handed: Sequence[ad.AnnData], options: dict[str, Any], draws: int, memory_gb: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores [genes], and log predictive probabilities [cells, genes] in the cells of `inner_rows`."""
    reset_peak()
    began = time.perf_counter()
    run = fit(method, target=handed[0], reference=handed[1], **options)
    width = max(1, int(memory_gb * 1e9 / (BYTES_PER_PREDICTION * len(task.target.names))))
    parts, entries = [], []
    kept = inner_rows(task.target.names)
    seconds = time.perf_counter() - began
    for start in range(0, len(task.held_out), width):
        genes = task.held_out[start : start + width]
        began = time.perf_counter()
        truth = task.truth.take_genes(genes)
        predicted = run.predict(genes, draws=draws, seed=options["seed"], memory_gb=memory_gb, truth=truth, lognorm=True)
        seconds += time.perf_counter() - began  # proper scores included
        assert (np.asarray(predicted.obs_names) == task.truth.names).all()
        mean, lognorm = np.asarray(predicted.X), np.asarray(predicted.layers["lognorm_mean"])
        table = score_prediction(truth.matrix, mean, lognorm, split.training_total, genes)
        parts.append(table.join(predicted.var.drop(columns=["measured", "mean_count"])))
        entries.append(pd.DataFrame(predicted.layers["log_prob"][kept], predicted.obs_names[kept], list(genes)))
        del predicted
    del run
    gc.collect()  # models hold cycles; the next fit should not find them in memory
    return labelled(pd.concat(parts), method, "method", task.fold, seconds), pd.concat(entries, axis=1)


def _score_peer(name: str, task: _Task, split: Split, draws: int) -> pd.DataFrame:
    """Scores [genes] of another package's method; CRPS and coverage where it gives draws."""
    reset_peak()
    began = time.perf_counter()
    answer = PEERS[name].run(split, draws)
    seconds = time.perf_counter() - began
    table = score_table(task.truth.matrix, answer.mean, split.training_total, task.held_out)
    if answer.draws is not None:  # as methods: each scale is judged on the mean of its own quantity
        lognorm = sum(log1p_normalise(drawn, split.training_total) for drawn in answer.draws) / len(answer.draws)
        table = score_prediction(task.truth.matrix, answer.mean, lognorm, split.training_total, task.held_out)
        table = table.join(draw_scores(answer.draws, task.truth.matrix).set_axis(table.index))
    return labelled(table, name, "peer", task.fold, seconds)


def _score_baselines(task: _Task, split: Split, table: dict[str, Any]) -> list[pd.DataFrame]:
    competitors = [(name, "baseline", one.estimate, one.scale) for name, one in table.items()]
    upper = ("supervised_ridge", UPPER, lambda split: supervised_ridge(split, task.truth.matrix), "log")
    parts = []
    for name, kind, estimate, scale in [*competitors, upper]:
        reset_peak()
        began = time.perf_counter()
        values = estimate(split)
        seconds = time.perf_counter() - began
        scores = score_table(task.truth.matrix, values, split.training_total, task.held_out, scale=scale)
        parts.append(labelled(scores, name, kind, task.fold, seconds))
    return parts


def labelled(scores: pd.DataFrame, method: str, kind: str, fold: str, seconds: float) -> pd.DataFrame:
    labels = pd.DataFrame({"method": method, "kind": kind, "fold": fold, "gene": scores.index})
    cost = pd.DataFrame({"seconds": round(seconds, 3), "peak_gb": _peak_gb()}, index=labels.index)
    return pd.concat([labels, scores.reset_index(drop=True), cost], axis=1)


def line_of(table: pd.DataFrame) -> str:
    first = table.iloc[0]
    return (
        f"fold {first['fold']}: {first['method']}: raw PCC {table['raw_pcc'].mean():.3f}, "
        f"log PCC {table['log_pcc'].mean():.3f}, {first['seconds']:.1f} s"
    )


def _adata(counts: Counts, layer: str | None, gene_key: str | None, more: dict[str, Any]) -> ad.AnnData:
    """The counts where these settings look for them, wherever they came from, beside ``more`` layers."""
    var = pd.DataFrame({} if gene_key is None else {gene_key: counts.genes}, index=counts.genes)
    adata = ad.AnnData(counts.matrix, obs=counts.obs.copy(), var=var, layers={**more, layer or "counts": counts.matrix})
    adata.obs_names = counts.names
    if counts.xy is not None:
        adata.obsm["spatial"] = counts.xy
    return adata


def reset_peak() -> None:
    """Forget the process's peak memory where the system can (Linux); elsewhere peaks are those so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak_gb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

"""A method fitted again without part of what it measured: what goes wrong there goes wrong with new genes, or new places."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import run_folder
from ppl_st.api import train
from ppl_st.conformal import Inner, Recalibration, at_places, gene_strata, genes_needed, pit_curves, recalibration
from ppl_st.data import Counts, gene_folds
from ppl_st.errors import UserError
from ppl_st.image_run import ImageRun, spots_of
from ppl_st.models import METHODS
from ppl_st.posterior import Run
from ppl_st.prepare import load_prepare, refuse_few_genes
from ppl_st.prepare.xfuse import section_at, without
from ppl_st.stack import Spec as Mixture
from ppl_st.stack import weights_without


def recalibrate(
    run: Run,
    *,
    folds: int = 5,
    level: float = 0.9,
    guarantee: bool = False,
    draws: int = 100,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Run:
    """The run with forecasts of genes that the target never measured corrected on genes that it did measure.

    The method is fitted again ``folds`` times with its own settings, each time without a part of the target's genes, and scored on them: the
    honest situation of a new gene. Of a method of images, which predicts places, spots are hidden instead, in every section. See
    `ppl_st.conformal` for what is done and promised. With a folder the result is stored in it.

    Parameters
    ----------
    run
        A finished run; it is not changed.
    folds
        Parts that the target's genes are cut into, by ``seed``.
    level, guarantee
        Wanted coverage of the interval; whether the finite-sample bound shall hold (wider intervals, notably with few genes).
    draws
        Posterior draws of each prediction. Runs can be stacked where ``folds``, ``seed`` and ``draws`` of all are the same.

    Returns
    -------
    Run
        Predicts ``lower`` and ``upper`` besides the raw quantiles; `ppl_st.stack` can weigh it against other runs, but not one of a method of images.
    """
    if not 0 < level < 1:
        raise UserError(f"recalibrate: level {level} must lie strictly between 0 and 1")
    talk = say or (lambda line: None)
    if isinstance(run, ImageRun):
        inner, made = _at_hidden_spots(run, folds, level, guarantee, draws, seed, talk)
        return _recalibrated(run, inner, made._replace(folds=folds, seed=seed, draws=draws), "spots", talk)
    if run.method in METHODS and METHODS[run.method].reference == "image":
        raise UserError("recalibrate: several seeds of a method of images; recalibrate one of them")
    genes = np.sort(np.intersect1d(run.target.genes, run.genes))
    needed = genes_needed(level)
    if guarantee and len(genes) < needed:
        raise UserError(
            f"recalibrate: {len(genes)} measured genes cannot promise a coverage of {level:g}: that needs {needed} or more; lower --level, or "
            "leave out --guarantee"
        )
    parts = [
        fitted.inner_scores(truth, draws=draws, seed=seed) for truth, fitted in held_out_fits(run, folds=folds, seed=seed, say=talk)
    ]
    inner = Inner(
        np.concatenate([part.genes for part in parts]), np.concatenate([part.pit for part in parts], 1), parts[0].cells,
        np.concatenate([part.log_prob for part in parts], 1),
    )  # fmt: skip
    order = pd.Index(run.genes).get_indexer(pd.Index(inner.genes))
    made = recalibration(inner.pit, run.reference_mean[order], level, guarantee=guarantee)
    return _recalibrated(run, inner, made._replace(folds=folds, seed=seed, draws=draws), "genes", talk)


def _recalibrated(run: Run, inner: Inner, made: Recalibration, unit: str, say: Callable[[str], None]) -> Run:
    low, high = made.ends_of(run.reference_mean)
    lower, upper = (f"{end.min():.3f}" + (f" to {end.max():.3f}" if end.max() > end.min() else "") for end in (low, high))
    say(
        f"{made.genes} {unit}: raw {made.level:.0%} intervals cover {made.raw_coverage:.3f}; corrected ones lie between the quantiles "
        f"{lower} and {upper}"
        + (" (1: no finite interval will do; upper is infinite there)" if high.max() >= 1 else "")
    )
    if run.folder is not None:
        run_folder.write_inner(run.folder, inner)
        run_folder.write_json(run.folder / "recalibration.json", made._asdict())
    return replace(run, inner=inner, recalibration=made)


def _at_hidden_spots(
    run: ImageRun, folds: int, level: float, guarantee: bool, draws: int, seed: int, say: Callable[[str], None]
) -> tuple[Inner, Recalibration]:
    """Fits without each part of every section's spots in turn, and what they say about places that were not measured."""
    sections = run.data.sections
    of = run.target.obs["section"].astype(str).to_numpy()
    kept = [run.target.take_rows(np.flatnonzero(of == one.name)) for one in sections]
    parts = [np.array_split(np.random.default_rng([seed, 41, n]).permutation(len(one.names)), folds) for n, one in enumerate(kept)]
    most = max(len(one.names) for one in kept)
    if most < folds:
        raise UserError(f"recalibrate: {most} spots (of the largest section) cannot be cut into {folds} parts; lower --folds")
    edges = gene_strata(run.reference_mean)
    stratum = np.searchsorted(edges, run.reference_mean)
    names, curves = [], []
    for fold in range(folds):
        hidden = [np.sort(part[fold]) for part in parts]
        say(f"fold {fold + 1} of {folds}: {sum(map(len, hidden))} spots held out")
        data = without(run.data, hidden)
        stay = spots_of(data, [one.take_rows(np.setdiff1d(np.arange(len(one.names)), rows)) for one, rows in zip(kept, hidden, strict=True)])
        fitted = train(run.method, run.module, run.config, data, stay, stay, run.manifest, None, None, "quiet", lambda line: None)
        assert isinstance(fitted, ImageRun)
        for n, rows in enumerate(hidden):
            if not len(rows):
                continue
            truth = kept[n].take_rows(rows)
            assert truth.xy is not None
            seen = fitted.looking(section_at(data.sections[n], truth.xy), truth.names, truth.xy)
            layers = seen.predict(truth=truth, draws=draws, seed=seed).layers
            low, high = (np.asarray(layers[name]).T for name in ("pit_low", "pit_high"))
            curves.append(np.stack([pit_curves(low[stratum == k], high[stratum == k]) for k in range(len(edges) + 1)]))
            names.append(truth.names)
    pit = np.concatenate(curves, 2)
    made = at_places(pit, edges, level, guarantee=guarantee)
    return Inner(np.concatenate(names), pit.mean(0), np.zeros(0, str), np.zeros((0, pit.shape[2]), np.float32)), made


def held_out_fits(
    run: Run, *, folds: int = 5, seed: int = 0, say: Callable[[str], None] | None = None
) -> Iterator[tuple[Counts, Run]]:
    """Fit the method of ``run`` again without each part of its measured genes in turn: (counts of the hidden genes, the run that was not shown them).

    What goes wrong there goes wrong with new genes: `recalibrate` learns from it, and so can any statistic (`ppl_st.pooling.widened`).
    """
    genes = np.sort(np.intersect1d(run.target.genes, run.genes))
    parts = gene_folds(genes, folds, seed)
    refuse_few_genes("recalibrate", len(genes), max(map(len, parts)))
    for number, held in enumerate(parts):
        if say is not None:
            say(f"fold {number + 1} of {folds}: {len(held)} genes held out")
        yield run.target.take_genes(held), _refit(run, held)


def _refit(run: Run, held: NDArray[np.str_]) -> Run:
    """The run fitted again without these genes; of a mixture every run of it, and of a stack the weights, too."""
    if isinstance(run.spec, Mixture):
        runs = tuple(_refit(one, held) for one in run.spec.runs)
        weights = weights_without(run.spec.runs, held) if run.method == "stack" else run.spec.weights
        return replace(run, spec=run.spec._replace(runs=runs, weights=weights), data=tuple(one.data for one in runs))
    if not hasattr(run.module, "start"):
        raise UserError(f"recalibrate: a view of a {run.method} run (as_reference, turned) cannot be fitted again; recalibrate the run itself")
    cells = run.target.take_genes(run.target.genes[~np.isin(run.target.genes, held)])
    data, cells, other = load_prepare(run.method).problem(cells, run.reference, run.config, lambda line: None)
    return train(run.method, run.module, run.config, data, cells, other, run.manifest, None, None, "quiet", lambda line: None)

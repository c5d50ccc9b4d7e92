"""Predictive stacking: several runs as one forecaster whose predictive is the mixture of theirs (Yao, Vehtari, Simpson, Gelman 2018).

    p(x) = sum_k w_k p_k(x),   w = argmax  sum_g mean_i log sum_k w_k p_k(x_ig)  over inner held-out genes g and their cells i,

with a Dirichlet prior worth a tenth of a gene, split evenly. The problem is concave; EM solves it (w_k <- mean responsibility of run k). Inner
genes are those of `ppl_st.recalibrate`, so the weights are learned on genes that no run was shown and cost nothing more. Unlike the choice of
the best run the mixture hedges: where two runs disagree it is as wide as their disagreement.

Draw d of the mixture is a draw of run t(d), with turns so arranged that any number of first draws has the runs in proportion to their weights;
so summaries, scores, samples and files of a stack are made by the code that makes those of a run: it *is* a `Run`, of the method "stack".
Where all runs know their means in closed form, those of the mixture are their mean, in the proportion of the draws.
Runs cut cells into blocks in their own ways: one leads, the others offer ``at(rows)``, which gives them any cells.

Fits of one method with different seeds are a mixture as well (`seeds`): each counts the same, and their draws take turns. Where they disagree no
single one of them is to be believed, however short its own intervals are; ``between_sd`` of a prediction says how much of the doubt that is.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.data import Counts, gene_folds
from ppl_st.errors import UserError
from ppl_st.models import METHODS
from ppl_st.posterior import Run

__all__ = [
    "Predictor", "Spec", "cross_stacked", "quantities", "seeds", "stack", "stacked", "stacking_weights", "unlike_inputs",
    "weights_without",
]  # fmt: skip

TURNS = 1000  # draws until the order of the runs repeats itself
PRIOR_GENES = 0.1
EM_STEPS = 2000
FOLDS = 5  # of the genes, to score a mixture on genes that its weights did not see

Floats = NDArray[np.float64]


def stacking_weights(log_prob: Any) -> Floats:
    """Weights of K forecasters, [K], sum to 1, from their log predictive probabilities [K, cells, genes] of held-out counts."""
    table = np.asarray(log_prob, dtype=np.float64)
    if table.ndim != 3 or not table.size or not np.isfinite(table).all():
        raise UserError(f"stacking_weights: log probabilities have shape {table.shape}; need finite [runs, cells, genes], none of them 0")
    runs, _, genes = table.shape
    p = np.exp(table - table.max(0))
    weights = np.full(runs, 1 / runs)
    for _ in range(EM_STEPS):
        share = weights[:, None, None] * p
        new = (share / share.sum(0)).mean(1).sum(1) + PRIOR_GENES / runs
        new /= genes + PRIOR_GENES
        if np.abs(new - weights).max() < 1e-7:
            return new
        weights = new
    return weights


def stacked(log_prob: Any, weights: Any) -> Floats:
    """Log predictive probabilities of the mixture [cells, genes]."""
    table = np.asarray(log_prob, dtype=np.float64)
    return np.asarray(np.logaddexp.reduce(table + np.log(np.asarray(weights))[:, None, None], axis=0))


def cross_stacked(log_prob: Any, genes: Sequence[str] | NDArray[np.str_], seed: int = 0) -> Floats:
    """Log predictive probabilities of mixtures [cells, genes], each gene's under weights learned on other parts of ``genes`` (two or more)."""
    made = np.empty(np.shape(log_prob)[1:])
    for held in gene_folds(genes, min(FOLDS, len(genes)), seed):
        at = np.isin(genes, held)
        made[:, at] = stacked(log_prob[:, :, at], stacking_weights(log_prob[:, :, ~at]))
    return made


def weights_without(runs: Sequence[Run], genes: NDArray[np.str_]) -> list[float]:
    """Stacking weights of the runs learned on their inner held-out genes other than ``genes``."""
    log_prob, inner = _inner_scores(runs)
    return list(map(float, stacking_weights(log_prob[:, :, ~np.isin(inner, genes)])))


def stack(runs: Sequence[Run]) -> Run:
    """The runs as one, weighted by their scores on inner held-out genes.

    Parameters
    ----------
    runs
        Two or more recalibrated runs on the same cells (`ppl_st.recalibrate`, same ``folds``, ``seed`` and ``draws``); methods and settings may
        differ.

    Returns
    -------
    Run
        Predicts the genes that all of them can predict; ``record["weights"]`` are the weights, ``record["inner_log_score"]`` the mean log
        score of each run and of the mixture on the inner genes, the mixture's under weights learned on other inner genes. *Uncorrected* forecasts
        are mixed: what recalibration says of each run is not true of the mixture, so there are no ``lower`` and ``upper`` until
        `ppl_st.recalibrate` has fitted all runs of the stack again and weighed them without the genes that it hides.

    Raises
    ------
    UserError
        Fewer than two runs, a run given twice or of a method of images, other cells, other genes hidden, a run that is not recalibrated or was
        recalibrated in another way, no gene in common.
    """
    if len(runs) < 2:
        raise UserError(f"stack: {len(runs)} run; give two or more")
    names = _names(runs)
    for run, name in zip(runs, names, strict=True):
        if run.method in METHODS and METHODS[run.method].reference == "image":
            raise UserError(f"stack: {name} is recalibrated on hidden spots and so has no scores per cell to weigh it with; predict from one run")
        if not np.array_equal(run.target.names, runs[0].target.names):
            raise UserError(f"stack: {name} was fitted on other cells than {names[0]}; fit both on the same target")
        if run.inner is None:
            raise UserError(f"stack: {name} has no scores of held-out genes; first: ppl-st recalibrate {shlex.quote(str(run.folder or 'RUN'))}")
    same = [id(run) if run.folder is None else run.folder.resolve() for run in runs]
    if twice := [name for k, name in enumerate(names) if same[k] in same[:k]]:
        raise UserError(f"stack: {twice[0]} is given twice, which would count it twice; name each run once")
    common = _common([run.genes for run in runs])
    seen = [np.isin(common, run.genes[run.measured]) for run in runs]
    for own, name in zip(seen, names, strict=True):
        if (own != seen[0]).any():
            odd = common[own != seen[0]]
            raise UserError(
                f"stack: {len(odd)} genes were shown to one of {name} and {names[0]} and hidden from the other, e.g. {', '.join(odd[:3])}; fit "
                "all of them with the same --hold-out"
            )
    log_prob, inner = _inner_scores(runs)
    weights = stacking_weights(log_prob)
    scores = [float(one.mean()) for one in (*log_prob, cross_stacked(log_prob, inner))]
    record = {
        "weights": dict(zip(names, weights.tolist(), strict=True)),
        "inner_log_score": dict(zip([*names, "stack"], scores, strict=True)),
        "inner_genes": len(inner),
    }
    manifest = {"method": "stack", "weights": record["weights"], "runs": [run.manifest for run in runs]}
    return _mixture(runs, weights, "stack", manifest, record)


def seeds(runs: Sequence[Run], folder: Path | None = None) -> Run:
    """Fits of one method that differ in their seeds, as one run: what differs between them is uncertainty, too.

    Every fit counts the same. In ArviZ each of their chains is a chain; predictions have ``between_sd`` (see `Run.predict`). Of a method of images it
    predicts the spots of the fit; places, maps and other images are asked of the single fits.

    Raises
    ------
    UserError
        Fits of several methods, twice the same seed, other settings or other data, as far as they tell.
    """
    first = runs[0]
    own = [int(run.manifest["seed"]) for run in runs]
    if len({run.method for run in runs}) > 1 or len(set(own)) < len(runs):
        given = ", ".join(f"{run.method} (seed {seed})" for run, seed in zip(runs, own, strict=True))
        raise UserError(f"seeds: {given}; need one method, other seeds")
    for run, seed in zip(runs[1:], own[1:], strict=True):
        same = {
            "settings": _settings(run) == _settings(first), "cells": np.array_equal(run.target.names, first.target.names),
            "genes of the target": np.array_equal(run.target.genes, first.target.genes), "genes": np.array_equal(run.genes, first.genes),
        }  # fmt: skip
        other = [what for what, equal in same.items() if not equal] or unlike_inputs(*(one.manifest.get("inputs", {}) for one in (first, run)))
        if other:
            who = run.folder or f"the fit of seed {seed}"
            raise UserError(f"seeds: {who} has other {' and '.join(other)} than that of seed {own[0]}; remove it, and fit it anew")
    record = {**first.record, "chains": sum(run.record["chains"] for run in runs), "seeds": own}
    record["start_seconds"] = sum(run.record["start_seconds"] for run in runs)
    record["losses"] = [run.record["losses"] for run in runs]
    return replace(_mixture(runs, np.full(len(runs), 1 / len(runs)), first.method, {**first.manifest, "seeds": own}, record), folder=folder)


def unlike_inputs(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Roles in which the inputs of two manifests differ, of those that both were given as files, or both in memory."""
    both = [role for role in one if role in other and (one[role]["path"] is None) == (other[role]["path"] is None)]
    return [role for role in both if one[role]["sha256"] != other[role]["sha256"]]


def _settings(run: Run) -> Any:
    """Settings without the seed, the device, and the place of SIID's profiles, of which each folder has a copy."""
    made = replace(run.config, fit=replace(run.config.fit, seed=0, device="auto"))
    return replace(made, profiles=None) if hasattr(made, "profiles") else made


def _mixture(runs: Sequence[Run], weights: Floats, method: str, manifest: dict[str, Any], record: dict[str, Any]) -> Run:
    genes = _common([run.genes for run in runs])
    if not genes.size:
        raise UserError("stack: the runs can predict no gene in common; fit them with the same reference")
    first, spec = runs[0], Spec(tuple(runs), weights.tolist(), genes)
    seconds, memory = sum(run.record["seconds"] for run in runs), max(run.record["peak_memory_bytes"] for run in runs)
    return Run(
        method, sys.modules[__name__], first.config, spec, first.pair, tuple(run.data for run in runs),
        first.target.take_genes(_common([run.target.genes for run in runs])), first.reference.take_genes(genes), manifest,
        {**record, "seconds": seconds, "peak_memory_bytes": memory}, spec.new_cells,
    )  # fmt: skip


def _names(runs: Sequence[Run]) -> list[str]:
    return [f"{run.method} ({run.folder})" if run.folder else f"{run.method} (run {k})" for k, run in enumerate(runs)]


def _inner_scores(runs: Sequence[Run]) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Log scores [runs, cells, genes] of the inner genes that all runs were judged on, in the same folds by as many draws."""
    names, ways = _names(runs), [_way(run) for run in runs]
    for run, name, way in zip(runs, names, ways, strict=True):
        if way is None:
            command = f"ppl-st recalibrate {shlex.quote(str(run.folder or 'RUN'))}"
            raise UserError(f"stack: {name} was recalibrated by an older version, which kept no --folds, --seed and --draws; repeat `{command}`")
        if way != ways[0]:
            command = f"ppl-st recalibrate {shlex.quote(str(run.folder or 'RUN'))} {ways[0]}"
            raise UserError(f"stack: {name} was recalibrated with {way}, {names[0]} with {ways[0]}, which cannot be weighed; repeat `{command}`")
    inner = [run.inner for run in runs if run.inner is not None]
    genes = _common([one.genes for one in inner])
    if genes.size < 2 or any(not np.array_equal(one.cells, inner[0].cells) for one in inner):
        raise UserError("stack: the runs were not judged on the same held-out genes and cells; recalibrate them with the same --seed")
    columns = [pd.Index(one.genes).get_indexer(pd.Index(genes)) for one in inner]
    return np.stack([one.log_prob[:, at] for one, at in zip(inner, columns, strict=True)]), genes


def _way(run: Run) -> str | None:
    """Options of the recalibration of a run; None where it does not tell."""
    made = run.recalibration
    return None if made is None or made.folds is None else f"--folds {made.folds} --seed {made.seed} --draws {made.draws}"


def _common(genes: Sequence[NDArray[np.str_]]) -> NDArray[np.str_]:
    """Genes in all lists, in the order of the first."""
    return genes[0][np.all([np.isin(genes[0], other) for other in genes], axis=0)]


# ---- what a method's module offers to `Run` ----


class Spec(NamedTuple):
    """Runs, their weights, and the genes that can be predicted."""

    runs: tuple[Run, ...]
    weights: list[float]
    genes: NDArray[np.str_]

    def new_cells(self, counts: Counts) -> tuple[Any, Counts]:
        """The problem of every run for other cells."""
        made = [run.new_cells(counts) for run in self.runs]
        return tuple(data for data, _ in made), made[0][1]


class Block(NamedTuple):
    """The same cells as every run's batch; ``kept``: what was computed for them, by run and chain."""

    parts: list[Any]
    kept: dict[tuple[int, int], Any]


class Predictor:
    """Posterior predictive of the mixture; see `ppl_st.inference.predict.Predictor`."""

    def __init__(self, pair: Any, data: Any, config: Any, spec: Spec) -> None:
        self.parts = [
            run.module.Predictor(run.pair, own, run.config, run.spec) for run, own in zip(spec.runs, data, strict=True)
        ]
        self.columns = [pd.Index(run.genes).get_indexer(pd.Index(spec.genes)) for run in spec.runs]
        chains = [len(part.chains) for part in self.parts]
        equal = len(set(spec.weights)) == len(set(chains)) == 1  # then one round of all chains is a whole turn
        self.turns = turns(spec.weights, chains, len(chains) * chains[0] if equal else TURNS)
        self.chains = [self.parts[k].chains[c] for k, c in self.turns]
        self.fits = [k for k, _ in self.turns]
        self.n_cells = self.parts[0].n_cells
        fixed = [k for k, part in enumerate(self.parts) if not hasattr(part, "at")]
        self.lead = fixed[0] if fixed else 0
        self.fixed = fixed[1:]  # they must cut the cells as the leading run does
        if not fixed:
            self.at = lambda rows: Block([part.at(rows) for part in self.parts], {})
        if all(hasattr(part, "closed_form") for part in self.parts):
            self.closed_form = self._closed_form
        if all(hasattr(part, "measured_dist") for part in self.parts):
            self.measured_dist = self._measured_dist

    def blocks(self, max_cells: int) -> Iterator[Block]:
        """Batches of all runs that own the same cells."""
        others = {k: iter(self.parts[k].blocks(max_cells)) for k in self.fixed}
        for batch in self.parts[self.lead].blocks(max_cells):
            rows = self.parts[self.lead].rows(batch)
            found = {k: next(blocks) for k, blocks in others.items()} | {self.lead: batch}
            if any(not np.array_equal(self.parts[k].rows(found[k]), rows) for k in others):
                raise UserError("stack: two of the runs infer cells in different blocks and cannot be stacked; fit them with the same settings")
            yield Block([found[k] if k in found else part.at(rows) for k, part in enumerate(self.parts)], {})

    def restrict(self, batch: Block, keep: NDArray[np.bool_]) -> Block:
        """The block owning only the cells in ``keep`` [n]."""
        return Block([part.restrict(one, keep) for part, one in zip(self.parts, batch.parts, strict=True)], {})

    def rows(self, batch: Block) -> NDArray[np.int64]:
        """Rows of the result that the block owns."""
        return np.asarray(self.parts[self.lead].rows(batch.parts[self.lead]))

    def local(self, batch: Block, chain: int) -> Any:
        """What the run whose turn it is computes for these cells, once."""
        k, c = self.turns[chain]
        if (k, c) not in batch.kept:
            batch.kept[k, c] = self.parts[k].local(batch.parts[k], c)
        return batch.kept[k, c]

    def count_dist(self, batch: Block, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """p(count | draw) of the run whose turn it is."""
        k, c = self.turns[chain]
        return self.parts[k].count_dist(batch.parts[k], c, drawn, local, genes.new_tensor(self.columns[k])[genes])

    def _measured_dist(self, batch: Block, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """The same of the fit's own measurements; only where all runs tell them from new ones."""
        k, c = self.turns[chain]
        return self.parts[k].measured_dist(batch.parts[k], c, drawn, local, genes.new_tensor(self.columns[k])[genes])

    def _closed_form(self, batch: Block, chain: int, local: Any, genes: Tensor, factor: Tensor | None) -> Any:
        """Posterior means of the run whose turn it is; only where all runs know them."""
        k, c = self.turns[chain]
        return self.parts[k].closed_form(batch.parts[k], c, local, genes.new_tensor(self.columns[k])[genes], factor)


def turns(weights: Sequence[float], chains: Sequence[int], length: int = TURNS) -> list[tuple[int, int]]:
    """(run, chain) of every draw: each next draw goes to the run that is furthest behind its weight, within a run chain after chain."""
    done, order = np.zeros(len(weights)), []
    for d in range(length):
        k = int(np.argmax(np.asarray(weights) * (d + 1) - done))
        order.append((k, int(done[k]) % chains[k]))
        done[k] += 1
    return order


def quantities(pair: Any, data: Any, config: Any, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nothing: latent states of different methods do not mix."""
    return {}, {}

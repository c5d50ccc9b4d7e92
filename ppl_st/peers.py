"""Other people's methods on the same splits: gimVI of scvi-tools and Tangram of tangram-sc, for `evaluate` only.

Install with ``pip install 'ppl-st[peers]'``; then ``ppl-st evaluate --methods vista,gimvi,tangram ...``. Each is fed as its
own tutorial says, with its own defaults, on the genes that both sides need (training genes, and the held-out ones in the
reference):

gimvi          raw counts, cells without counts left out, 200 epochs. The estimate is the rate on the cell's own library size
               (``normalized=False``). Draws: z from its posterior, then a count from the package's negative binomial. For
               a gene that the target lacks its inverse dispersion was never trained (it stays the random number that it was
               initialised with), which is what a user of the package gets.
tangram        the reference normalised to equal totals, the target as it is, density prior from the target's counts; clusters
               (k-means, those of the baseline "nearest_centroid") are mapped instead of cells, as advised without a GPU.
tangram_cells  the same with single cells: cells x cells memory, a thousand epochs.

Tangram answers on a scale of its own; its table is multiplied by the one number that makes the training genes add up to
what was counted. It is a point estimate: on log-normalised counts the logarithm of its mean is judged, of gimVI the mean
over draws of the logarithm, as of our methods.

Both packages draw from the global generators of torch, numpy and Python; their state is put back.
"""

import contextlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from ppl_st.baselines import Split, clusters
from ppl_st.calibration import LEVELS, coverage, pit_bounds
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.metrics import crps_from_draws

__all__ = ["PEERS", "Answer", "Peer", "check", "draw_scores"]

GENES = 8  # whose draws are sorted at once


class Answer(NamedTuple):
    """Expected counts [cells, held-out genes], and posterior predictive counts [draws, cells, genes] where the peer has them."""

    mean: NDArray[np.float32]
    draws: NDArray[np.float32] | None = None


class Peer(NamedTuple):
    """A peer: ``run(split, draws)``, and the package (import name, name in the index) that it needs."""

    run: Callable[[Split, int], Answer]
    module: str
    package: str


def draw_scores(draws: Any, truth: Any) -> pd.DataFrame:
    """Columns crps and coverage_* [genes] of draws [draws, cells, genes] on sparse counts [cells, genes], a few genes at a time."""
    parts = []
    for start in range(0, truth.shape[1], GENES):
        drawn, counts = draws[..., start : start + GENES], truth[:, start : start + GENES].toarray()
        covered = coverage(*pit_bounds(drawn, counts), LEVELS)
        columns = {f"coverage_{round(100 * level)}": per_gene for level, per_gene in zip(LEVELS, covered.per_gene, strict=True)}
        parts.append(pd.DataFrame({"crps": crps_from_draws(drawn, counts).mean(0), **columns}))
    return pd.concat(parts)


def check(names: Sequence[str]) -> None:
    """Refuse, before any work, peers whose package is not installed."""
    for name in names:
        if find_spec(PEERS[name].module) is None:
            raise UserError(f"evaluate: {name} needs the package {PEERS[name].package}: pip install 'ppl-st[peers]'")


@contextlib.contextmanager
def _guest(seed: int) -> Iterator[None]:
    """Seeded global generators, put back at the end; no warnings, log lines or progress bars of the guest."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    level = logging.root.manager.disable
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
        finally:
            logging.disable(level)
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


def _table(counts: Counts, genes: NDArray[np.str_], rows: NDArray[np.int64] | None = None) -> ad.AnnData:
    """A table of its own, raw counts in CSR float32; genes are named by number, because Tangram changes the case of names."""
    matrix = sp.csr_matrix(counts.take_genes(genes).matrix, dtype=np.float32, copy=True)
    matrix = matrix if rows is None else matrix[rows]
    return ad.AnnData(matrix, obs=pd.DataFrame(index=[f"cell{i}" for i in range(matrix.shape[0])]))


def _sides(split: Split) -> tuple[ad.AnnData, ad.AnnData]:
    """Reference (training, then held-out genes) and target (training genes), cells with counts only."""
    genes = np.concatenate([split.training, split.held_out])
    reference = _table(split.reference, genes)
    reference = reference[np.asarray(reference.X.sum(1)).ravel() > 0].copy()
    target = _table(split.target, split.training)
    reference.var_names = [f"gene{i}" for i in range(len(genes))]
    target.var_names = reference.var_names[: target.n_vars]
    return reference, target


def _gimvi(split: Split, draws: int) -> Answer:
    try:
        from scvi import settings
        from scvi.external import GIMVI
    except ImportError as error:
        raise UserError(
            f"evaluate: gimvi: this scvi-tools has no GIMVI any more ({error}); pip install 'scvi-tools<1.6'"
        ) from error

    with _guest(split.seed), mock.patch.object(settings, "_seed", split.seed):  # else validation cells are drawn from the system's entropy
        reference, target = _sides(split)
        filled = split.training_total > 0
        some = target[filled].copy()
        GIMVI.setup_anndata(some)
        GIMVI.setup_anndata(reference)
        model = GIMVI(reference, some)
        quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False, "enable_model_summary": False}
        model.train(max_epochs=200, accelerator="cpu", devices=1, **quiet)
        held_out = slice(len(split.training), None)
        mean = np.zeros((target.n_obs, len(split.held_out)), dtype=np.float32)
        mean[filled] = model.get_imputed_values(normalized=False)[1][:, held_out]
        drawn = np.zeros((draws, *mean.shape), dtype=np.float32)
        _draw_gimvi(model.module, some, len(split.training), drawn, np.flatnonzero(filled))
    return Answer(mean, drawn)


def _draw_gimvi(module: Any, target: ad.AnnData, first: int, drawn: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    """Write posterior predictive counts of the target's cells, genes from the ``first`` on, into the ``rows`` of ``drawn`` [draws, cells, genes]; the
    spatial side is mode 1, its batch is the last."""
    with torch.inference_mode():
        for start in range(0, target.n_obs, 2048):
            x = torch.from_numpy(target.X[start : start + 2048].toarray())
            batch = torch.full((len(x), 1), module.n_batch - 1)
            for counts in drawn:
                law = module._run_forward(x, 1, batch, torch.zeros_like(batch))["px"]
                counts[rows[start : start + 2048]] = law.sample()[:, first:].numpy()


def _tangram(split: Split, draws: int, *, by_cluster: bool) -> Answer:
    with _guest(split.seed), contextlib.redirect_stdout(None):
        import scanpy as sc
        import tangram

        genes = np.concatenate([split.training, split.held_out])
        reference = _table(split.reference, genes, split.usable)
        reference.var_names = [f"gene{i}" for i in range(len(genes))]
        reference.obs["cluster"] = pd.Categorical(clusters(split)[split.usable].astype(str))
        training = list(reference.var_names[: len(split.training)])
        filled = split.training_total > 0
        target = _table(split.target, split.training, np.flatnonzero(filled))
        target.var_names = training
        sc.pp.normalize_total(reference)
        tangram.pp_adatas(reference, target, genes=training)
        options: dict[str, Any] = {"mode": "clusters", "cluster_label": "cluster"} if by_cluster else {"mode": "cells"}
        mapped = tangram.map_cells_to_space(
            reference, target, density_prior="rna_count_based", device="cpu", random_state=split.seed, verbose=False, **options
        )
        projected = tangram.project_genes(mapped, reference, cluster_label="cluster" if by_cluster else None)
        table = pd.DataFrame(np.asarray(projected.X), columns=projected.var_names).reindex(
            columns=[f"gene{i}" for i in range(len(genes))], fill_value=0.0
        )
    values = table.to_numpy(dtype=np.float64)
    scale = split.training_total.sum() / max(values[:, : len(training)].sum(), 1e-300)
    mean = np.zeros((len(filled), len(split.held_out)), dtype=np.float32)
    mean[filled] = scale * values[:, len(training) :]
    return Answer(mean)


def _tangram_clusters(split: Split, draws: int) -> Answer:
    return _tangram(split, draws, by_cluster=True)


def _tangram_cells(split: Split, draws: int) -> Answer:
    return _tangram(split, draws, by_cluster=False)


PEERS = {
    "gimvi": Peer(_gimvi, "scvi", "scvi-tools"),
    "tangram": Peer(_tangram_clusters, "tangram", "tangram-sc"),
    "tangram_cells": Peer(_tangram_cells, "tangram", "tangram-sc"),
}

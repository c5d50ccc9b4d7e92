"""VISTA's problem from checked counts: gene matching, anchor genes, batches, the spatial neighbor graph (once, within sections)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy import stats

from ppl_st.data import SHARED_TOTAL, Counts, labels_of, shared_genes
from ppl_st.errors import UserError
from ppl_st.layers import parents
from ppl_st.models.vista import Config, Data
from ppl_st.models.vista.closed import ROWS
from ppl_st.prepare import MIN_SHARED, refuse_single, relative_depths, same_genes
from ppl_st.spatial import neighbors, sections

MAX_OTHERS = 1000
LENGTHS, WAVES = (5.0, 10.0, 20.0, 40.0), 8  # of the waves, in distances between cells; waves of each
MAX_PANEL = 6500  # more than any targeted panel: time of the closed map grows with the cube of the panel, its memory with the square
ANCHOR_R, ANCHOR_P = 0.5, 0.05  # the paper's thresholds


def problem(
    target: Counts, reference: Counts, config: Config, say: Callable[[str], None]
) -> tuple[Data, Counts, Counts]:
    """The problem from spatial cells and dissociated cells; returns it with the counts that it uses.

    Genes: all of the reference; those that the target has too are the panel (with ``anchor_key`` only those whose pseudo-bulks agree; of the closed
    map those with most counts, at most `MAX_PANEL`; what is left out counts as not measured). Genes that only the target has help to place its cells
    (``others``; those with most counts, at most `MAX_OTHERS`). Cells of the target stay, also empty ones; reference cells without a panel gene are
    dropped. What is learned on hidden panel genes (levels, errors) is of genes like these: with ``anchor_key`` of genes that agree, and intervals of
    genes that do not are too narrow.
    """
    refuse_single(target, "target")
    panel_genes = shared_genes(target, reference, minimum=MIN_SHARED)
    others = target.take_genes(_others(target, panel_genes, config))
    rest = len(target.genes) - len(panel_genes) - len(others.genes)
    if len(others.genes) or rest:
        say(f"of the genes that only the target has {len(others.genes)} help to place its cells, {rest} are left out")
    everything, target = target, target.take_genes(panel_genes)
    if config.anchor_key is not None or len(panel_genes) > MAX_PANEL:
        everything, target, reference = (_with_depth(side, panel_genes) for side in (everything, target, reference))
    if config.anchor_key is not None:
        keep = anchors(target, reference.take_genes(panel_genes), config.anchor_key)
        say(f"{int(keep.sum())} of {len(keep)} shared genes are anchors (r > {ANCHOR_R}, p < {ANCHOR_P} over {config.anchor_key})")
        if keep.sum() < MIN_SHARED:
            raise UserError(
                f"anchor_key {config.anchor_key!r}: only {int(keep.sum())} of {len(keep)} shared genes are anchors; at least {MIN_SHARED} are "
                "needed: leave anchor_key out, or use labels with more types"
            )
        target = target.take_genes(panel_genes[keep])
    if config.map == "closed" and len(target.genes) > MAX_PANEL:
        say(f"of {len(target.genes)} shared genes the {MAX_PANEL} with most counts are used; the others are predicted as if they were not measured")
        most = np.argsort(-np.asarray(target.matrix.sum(0)).ravel(), kind="stable")[:MAX_PANEL]
        target = target.take_genes(target.genes[np.sort(most)])
    empty = np.asarray(reference.take_genes(target.genes).matrix.sum(1)).ravel() == 0
    if empty.any():
        say(f"{int(empty.sum())} reference cells without a count in the panel are left out")
        reference = reference.take_rows(~empty)
    refuse_single(reference, "reference")
    panel = pd.Index(reference.genes).get_indexer(pd.Index(target.genes)).astype(np.int64)
    near, used = graph(target, config), everything.take_genes(np.concatenate([target.genes, others.genes]))
    data = Data(
        counts=target.matrix,
        others=others.matrix,
        reference=reference.matrix,
        panel=panel,
        waves=waves(target, near, config),
        graph=near,
        batch=_codes(target, config.batch_key, "target"),
        reference_batch=_codes(reference, config.batch_key, "reference"),
        parent=parents(reference.genes, config.reference_layers),
        usual=_usual(used, used, config),
    )
    return data, used, reference


def _others(target: Counts, panel: NDArray[np.str_], config: Config) -> NDArray[np.str_]:
    """Genes that only the target has and that the closed map uses."""
    if config.map != "closed" or not config.others:
        return panel[:0]
    counts = np.asarray(target.matrix.sum(0)).ravel() * ~np.isin(target.genes, panel)
    most = np.argsort(-counts, kind="stable")[:MAX_OTHERS]
    return target.genes[np.sort(most[counts[most] > 0])]


def new_cells(target: Counts, fitted: Counts, data: Data, config: Config) -> tuple[Data, Counts]:
    """The same problem for other spatial cells with all genes of the fitted target, with their own graph and without reference cells.

    Their counts are standardised by the moments of their batch in the fit; a batch that the fit does not know has none, and is refused.
    """
    target = same_genes(target, fitted)
    codes = np.zeros(len(target.names), np.int64)
    if config.batch_key is not None:
        known = pd.Index(np.unique(labels_of(fitted, config.batch_key, "target", "batch_key")))
        labels = labels_of(target, config.batch_key, "target", "batch_key")
        codes = known.get_indexer(pd.Index(labels)).astype(np.int64)
        if (codes < 0).any():
            unknown = str(labels[codes < 0][0])
            raise UserError(
                f"target ({target.source}): the fit knows no batch {unknown!r} (obs column {config.batch_key!r}, batch_key); it knows "
                f"{', '.join(map(str, known))}: write there the one that these cells are most like, or fit again with them"
            )
    # the graph of "kl_only" never reaches a prediction
    near = graph(target, replace(config, graph="none") if config.graph == "kl_only" else config)
    fresh = data._replace(
        counts=sp.csr_matrix(target.matrix[:, : len(data.panel)]),
        others=sp.csr_matrix(target.matrix[:, len(data.panel) :]),
        reference=data.reference[:0],
        reference_batch=data.reference_batch[:0],
        waves=waves(target, near, config),
        graph=near,
        batch=codes,
        usual=_usual(target, fitted, config),
    )
    return fresh, target


def graph(target: Counts, config: Config) -> sp.csr_matrix:
    """Nearest neighbors of every cell within its section; empty where the method uses none, or where there are no coordinates."""
    n = len(target.names)
    nowhere: Any = (n, n)  # the stubs do not know csr_matrix(shape)
    if config.graph == "none" or n < 2:
        return sp.csr_matrix(nowhere, dtype=np.float32)
    if target.xy is None:
        raise UserError(
            f"target ({target.source}) has no obsm['spatial'], which graph={config.graph!r} needs; add coordinates, or fit with "
            "--set graph=none"
        )
    return neighbors(target.xy, config.neighbors, sections(target, config.library_key))


def waves(target: Counts, graph: sp.csr_matrix, config: Config) -> NDArray[np.float32]:
    """Random Fourier features of the coordinates [n, 4 WAVES], of unit mean square, for smooth fields of four length scales; none where no graph
    reaches the prediction.

    Lengths are in units of the typical distance between cells, which the graph tells.
    """
    n = len(target.names)
    if not graph.nnz or target.xy is None or config.graph == "kl_only":
        return np.zeros((n, 0), dtype=np.float32)
    rows = np.repeat(np.arange(n), np.diff(graph.indptr))
    distance = np.linalg.norm(target.xy[rows] - target.xy[graph.indices], axis=1)
    pitch = max(float(np.median(distance)) * float(np.sqrt(2 * np.pi / max(1.0, graph.nnz / n))), 1e-9)  # half of the neighbors are within
    rng = np.random.default_rng(0)
    frequency = rng.standard_normal((2, len(LENGTHS) * WAVES)) / (pitch * np.repeat(LENGTHS, WAVES))
    section = sections(target, config.library_key)
    section = np.zeros(n, np.int64) if section is None else section
    phase = rng.uniform(0, 2 * np.pi, (section.max() + 1, frequency.shape[1]))  # errors of two sections in one frame have nothing in common
    found = np.empty((n, frequency.shape[1]), np.float32)
    for start in range(0, n, ROWS):
        part = slice(start, start + ROWS)
        found[part] = np.sqrt(2) * np.cos(target.xy[part, :2] @ frequency + phase[section[part]])
    return found


def _with_depth(counts: Counts, genes: NDArray[np.str_]) -> Counts:
    """The counts with their totals over ``genes`` in obs: stored with a run, where those that it does not use are no longer among its genes."""
    if SHARED_TOTAL in counts.obs:
        return counts
    return replace(counts, obs=counts.obs.assign(**{SHARED_TOTAL: counts.take_genes(genes).totals}))


def anchors(target: Counts, reference: Counts, key: str) -> NDArray[np.bool_]:
    """Genes whose mean profile over the cell types in ``obs[key]`` agrees between the sides, [P].

    The paper's filter (Pearson r > 0.5 and p < 0.05 over the shared types), on pseudo-bulks normalised by the cells' totals in obs (`_with_depth`)
    and logged; it sees training genes only. The verdict on a gene depends on no other one but through these totals.
    """
    labels = [labels_of(side, key, role, "anchor_key") for side, role in ((target, "target"), (reference, "reference"))]
    types = np.intersect1d(labels[0], labels[1])
    if len(types) < 3:
        raise UserError(
            f"anchor_key {key!r}: target and reference share {len(types)} cell types, at least 3 are needed; leave anchor_key out"
        )
    bulks = []
    for side, own in zip((target, reference), labels, strict=True):
        member = sp.csr_matrix((own[None] == types[:, None]).astype(np.float64))
        sums = np.asarray((member @ side.matrix).todense())
        depth = member @ np.asarray(side.obs.get(SHARED_TOTAL, side.totals), dtype=np.float64)
        bulks.append(np.log1p(1e4 * sums / np.maximum(depth, 1.0)[:, None]))
    keep = np.zeros(len(target.genes), dtype=bool)
    for g in range(len(keep)):
        a, b = bulks[0][:, g], bulks[1][:, g]
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            r, p = stats.pearsonr(a, b)
            keep[g] = r > ANCHOR_R and p < ANCHOR_P
    return keep


def _usual(target: Counts, fitted: Counts, config: Config) -> NDArray[np.float64]:
    """Median total of the section (without ``library_key`` the batch) of each cell, [n]; those that do not differ from the fit beyond chance have
    its median."""
    usual = float(np.median(np.maximum(fitted.totals, 1.0)))
    return usual * relative_depths(target, fitted, config.library_key or config.batch_key)


def _codes(counts: Counts, key: str | None, role: str) -> NDArray[np.int64]:
    if key is None:
        return np.zeros(len(counts.names), np.int64)
    return np.unique(labels_of(counts, key, role, "batch_key"), return_inverse=True)[1].astype(np.int64)

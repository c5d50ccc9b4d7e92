"""SIID's problem from checked counts: gene matching, sections, cell -> spot map, labels, prior profiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.data import Counts, labels_of, shared_genes
from ppl_st.errors import UserError
from ppl_st.models.siid import Config, Data
from ppl_st.pairs import read_like
from ppl_st.prepare import MIN_SHARED, refuse_single
from ppl_st.spatial import apply_transform, cell_to_spot, infer_radius, spot_pitch

FEW_SPOTS = 30  # below: a warning
SECTION_GAP = 100.0  # pitches between sections that share no coordinate frame


def problem(
    target: Counts, reference: Counts, config: Config, say: Callable[[str], None]
) -> tuple[Data, Counts, Counts]:
    """SIID's problem from cells and spots in one coordinate frame; returns it with the counts that it uses.

    Genes: all of the reference; those that the target has too are the panel; genes that only the target has are left out (said through
    ``say``). Cells stay, also empty ones; spots without counts are dropped.
    """
    refuse_single(target, "target")
    panel_genes = shared_genes(target, reference, minimum=MIN_SHARED)
    if len(panel_genes) < len(target.genes):
        say(f"{len(target.genes) - len(panel_genes)} genes of the target are not in the reference and are left out")
    target = target.take_genes(panel_genes)
    empty = reference.empty_rows
    if empty.any():
        say(f"{int(empty.sum())} spots without counts are left out")
        reference = reference.take_rows(~empty)
    refuse_single(reference, "reference", "spot")
    if len(reference.names) < FEW_SPOTS:
        say(f"only {len(reference.names)} spots with counts: they alone tell profiles and levels of genes that cells lack; expect little of these")
    assert target.xy is not None and reference.xy is not None
    spot_xy = reference.xy if config.transform is None else apply_transform(reference.xy, np.array(config.transform))
    cell_xy, spot_xy = _separate_sections(target, reference, target.xy, spot_xy, config.library_key)
    panel = pd.Index(reference.genes).get_indexer(pd.Index(panel_genes)).astype(np.int64)
    pitch = spot_pitch(spot_xy)
    radius = config.radius
    if radius is None:
        radius, info = infer_radius(cell_xy, spot_xy, target.matrix, sp.csr_matrix(reference.matrix[:, panel]))
        say(info.reason)
        spot_xy = spot_xy + np.array(info.shift)
    mapping = cell_to_spot(cell_xy, spot_xy, radius=radius, k=config.map_neighbors, sigma=config.map_sigma)
    say(
        f"{int((np.diff(mapping.indptr) > 0).sum())} of {mapping.shape[0]} cells lie in spots (radius {radius:g}, pitch {pitch:g})"
    )
    labels, profiles = _labels(target, config, say), _profiles(reference, config)
    data = Data(
        counts=target.matrix,
        spot_counts=reference.matrix,
        mapping=mapping,
        panel=panel,
        cell_xy=cell_xy / pitch,
        spot_xy=spot_xy / pitch,
        labels=labels,
        profiles=profiles,
        named=max(0 if labels is None else int(labels.max()) + 1, 0 if profiles is None else len(profiles)),
    )
    return data, target, reference


def new_cells(target: Counts, fitted: Counts, data: Data, config: Config) -> tuple[Data, Counts]:
    """The same problem for cells that have no spots around them: the spots' part is empty.

    ``fitted`` are the counts of the target that the run was fitted on, ``data`` its problem.
    """
    panel_genes = fitted.genes
    missing = panel_genes[~np.isin(panel_genes, target.genes)]
    if len(missing):
        raise UserError(
            f"target ({target.source}) lacks {len(missing)} of the {len(panel_genes)} panel genes that the run was fitted on, e.g. "
            f"{', '.join(missing[:3])}; a run predicts cells measured with the same panel"
        )
    target = target.take_genes(panel_genes)
    n = target.matrix.shape[0]
    nowhere: Any = (n, 0)  # the stubs do not know csr_matrix(shape)
    empty = data._replace(
        counts=target.matrix,
        spot_counts=data.spot_counts[:0],
        mapping=sp.csr_matrix(nowhere, dtype=np.float32),
        cell_xy=np.zeros((n, 2)) if target.xy is None else target.xy,
        spot_xy=np.zeros((0, 2)),
        labels=None,
    )
    return empty, target


def _separate_sections(
    target: Counts, reference: Counts, cell_xy: NDArray[Any], spot_xy: NDArray[Any], key: str | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move sections far apart, so that no map, kernel or graph crosses them."""
    if key is None:
        return cell_xy, spot_xy
    cells, spots = (labels_of(counts, key, role, "library_key") for role, counts in (("target", target), ("reference", reference)))
    alone = sorted(set(cells) ^ set(spots))
    if alone:
        raise UserError(
            f"library_key {key!r}: sections {', '.join(alone[:3])} are on one side only; target and reference must hold the same sections"
        )
    names = sorted(set(cells))
    extent = max(float(np.ptp(spot_xy, axis=0).max()), float(np.ptp(cell_xy, axis=0).max()))
    pitch = min((spot_pitch(spot_xy[spots == name]) for name in names if (spots == name).sum() > 1), default=extent)
    step = np.array([extent + SECTION_GAP * pitch, 0.0])
    return (
        cell_xy + np.searchsorted(names, cells)[:, None] * step,
        spot_xy + np.searchsorted(names, spots)[:, None] * step,
    )


def _labels(target: Counts, config: Config, say: Callable[[str], None]) -> NDArray[np.int64] | None:
    if config.label_key is None:
        return None
    if config.label_key not in target.obs:
        raise UserError(
            f"target ({target.source}): no obs column {config.label_key!r} (label_key); it has {', '.join(map(str, target.obs.columns[:5]))}"
        )
    codes, names = pd.factorize(target.obs[config.label_key].astype("object"), sort=True)
    if not len(names):
        raise UserError(
            f"target ({target.source}): none of its {len(codes)} cells has a label in obs column {config.label_key!r} (label_key); name one that "
            "labels some of them, or leave label_key out"
        )
    if 0 < config.factors < len(names):
        raise UserError(
            f"label_key {config.label_key!r} has {len(names)} labels, more than factors={config.factors}; raise factors"
        )
    say(
        f"labels: factors 0 to {len(names) - 1} are {', '.join(map(str, names[:8]))}; {(codes < 0).sum()} cells unlabelled"
    )
    return codes.astype(np.int64)


def _profiles(reference: Counts, config: Config) -> NDArray[np.float64] | None:
    """Mean expression profile per cell type of a single-cell reference, on the spots' genes; genes it lacks take the spots' mean profile."""
    if config.profiles is None:
        return None
    cells = read_like(config.profiles, role="profiles", layer=config.layer, gene_key=config.gene_key)
    if config.profile_key not in cells.obs:
        raise UserError(f"profiles ({cells.source}): no obs column {config.profile_key!r} (profile_key)")
    codes, names = pd.factorize(cells.obs[config.profile_key].astype("object"), sort=True)
    if not len(names):
        raise UserError(
            f"profiles ({cells.source}): none of its {len(codes)} cells has a value in obs column {config.profile_key!r} (profile_key); name one "
            "of cell types"
        )
    if 0 < config.factors < len(names):
        raise UserError(f"profiles ({cells.source}): {len(names)} cell types, more than factors={config.factors}; raise factors")
    shared = shared_genes(reference, cells, minimum=MIN_SHARED)
    counts = cells.take_genes(shared).matrix
    known = codes >= 0
    member = sp.csr_matrix(
        (np.ones(known.sum()), (codes[known], np.flatnonzero(known))), shape=(len(names), len(codes))
    )
    sums = np.asarray((member @ counts).todense(), dtype=np.float64) + 0.5
    profiles = np.tile((np.asarray(reference.matrix.sum(0), dtype=np.float64).ravel() + 0.5)[None], (len(names), 1))
    profiles /= profiles.sum(1, keepdims=True)
    at = pd.Index(reference.genes).get_indexer(pd.Index(shared))
    profiles[:, at] = sums / sums.sum(1, keepdims=True) * profiles[:, at].sum(1, keepdims=True)
    return profiles

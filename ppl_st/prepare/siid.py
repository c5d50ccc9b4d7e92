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
from ppl_st.prepare import MIN_SHARED, refuse_single, same_genes
from ppl_st.radius import axes_look_swapped, infer_radius
from ppl_st.spatial import apply_transform, cell_to_spot, spot_pitch

FEW_SPOTS = 30  # below: a warning
OTHER_EXTENT = 2.0  # cells and spots whose extents differ by this factor may be in other units
SECTION_GAP = 100.0  # pitches between sections that share no coordinate frame


def problem(
    target: Counts, reference: Counts, config: Config, say: Callable[[str], None]
) -> tuple[Data, Counts, Counts]:
    """SIID's problem from cells and spots in one coordinate frame; returns it with the counts that it uses.

    Genes: all of the reference; those that the target has too are the panel; genes that only the target has are left out (said through
    ``say``). Cells stay, also empty ones; spots without counts are dropped.
    """
    for line in _without_effect(config):
        say(line)
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
    panel = pd.Index(reference.genes).get_indexer(pd.Index(panel_genes)).astype(np.int64)
    sections = _sections(target, reference, config.library_key)
    spot_xy, radius = _placed(target, spot_xy, sp.csr_matrix(reference.matrix[:, panel]), sections, config, say)
    cell_xy, spot_xy = _separate(target.xy, spot_xy, *sections)
    pitch = spot_pitch(spot_xy)
    if radius is None:
        radius, info = infer_radius(cell_xy, spot_xy, target.matrix, sp.csr_matrix(reference.matrix[:, panel]))
        radius = radius if config.align else info.radius_unshifted
        say(info.reason + ("" if config.align or not any(info.shift) else " (not moved: align=false)"))
        spot_xy = spot_xy + (np.array(info.shift) if config.align else 0.0)
    mapping = cell_to_spot(cell_xy, spot_xy, radius=radius, k=config.map_neighbors, sigma=config.map_sigma)
    say(
        f"{int((np.diff(mapping.indptr) > 0).sum())} of {mapping.shape[0]} cells lie in spots (radius {radius:g}, pitch {pitch:g})"
    )
    labels, profiles, names = _named(target, reference, config, say)
    data = Data(
        counts=target.matrix,
        spot_counts=reference.matrix,
        mapping=mapping,
        panel=panel,
        cell_xy=cell_xy / pitch,
        spot_xy=spot_xy / pitch,
        pitch=pitch,
        labels=labels,
        profiles=profiles,
        names=names,
    )
    return data, target, reference


def new_cells(target: Counts, fitted: Counts, data: Data, config: Config) -> tuple[Data, Counts]:
    """The same problem for cells that have no spots around them: the spots' part is empty.

    ``fitted`` are the counts of the target that the run was fitted on, ``data`` its problem.
    """
    target = same_genes(target, fitted)
    n = target.matrix.shape[0]
    nowhere: Any = (n, 0)  # the stubs do not know csr_matrix(shape)
    empty = data._replace(
        counts=target.matrix,
        spot_counts=data.spot_counts[:0],
        mapping=sp.csr_matrix(nowhere, dtype=np.float32),
        cell_xy=np.c_[np.arange(n), np.zeros(n)] if target.xy is None else target.xy / data.pitch,  # without coordinates nobody is a neighbor
        spot_xy=np.zeros((0, 2)),
        labels=None,
    )
    return empty, target


def _without_effect(config: Config) -> list[str]:
    """One line for each group of settings that are given and change nothing."""
    published = config.cells == "softmax"
    given = {
        "label_key": config.label_key is not None, "label_weight": config.label_weight > 0, "profiles": config.profiles is not None,
        "sparsity": config.sparsity not in ("auto", 0.0), "regional": config.regional,
    }  # fmt: skip
    unused = [name for name, is_given in given.items() if is_given and published]
    found = [f"warning: without effect with cells='softmax', the paper's form: {', '.join(unused)}"] if unused else []
    if config.entropy != "none" and not published:
        found.append(f"warning: entropy={config.entropy!r} is without effect with cells='conjugate'; sparsity is what it has instead")
    if config.label_weight > 0 and config.label_key is None and not published:
        found.append("warning: label_weight is without effect without label_key, the obs column of the labels")
    return found


def _sections(target: Counts, reference: Counts, key: str | None) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    """Names of the sections, and the section of every cell [n] and spot [s]."""
    if key is None:
        return [""], np.full(len(target.names), ""), np.full(len(reference.names), "")
    cells, spots = (labels_of(counts, key, role, "library_key") for role, counts in (("target", target), ("reference", reference)))
    alone = sorted(set(cells) ^ set(spots))
    if alone:
        raise UserError(
            f"library_key {key!r}: sections {', '.join(alone[:3])} are on one side only; target and reference must hold the same sections"
        )
    return sorted(set(cells)), np.asarray(cells), np.asarray(spots)


def _placed(
    target: Counts,
    spot_xy: NDArray[np.float64],
    spot_counts: sp.csr_matrix,
    sections: tuple[list[str], NDArray[Any], NDArray[Any]],
    config: Config,
    say: Callable[[str], None],
) -> tuple[NDArray[np.float64], float | None]:
    """The spots moved, section by section, to where the counts clearly want them, and their radius (None: several sections must tell it together).

    Says what speaks against one coordinate frame: extents of other size, counts that go with exchanged axes, or with no place at all.
    """
    names, of_cell, of_spot = sections
    assert target.xy is not None
    radius, moved = config.radius, spot_xy.copy()
    for name in names:
        cells, spots = np.flatnonzero(of_cell == name), np.flatnonzero(of_spot == name)
        where = f"section {name}: " if name else ""
        if len(spots) < 2:  # no pitch
            continue
        both = target.xy[cells], spot_xy[spots], target.matrix[cells], spot_counts[spots]
        extents = [float(np.ptp(xy, axis=0).max()) for xy in both[:2]]
        if max(extents) > OTHER_EXTENT * min(extents):
            say(
                f"warning: {where}the cells extend over {extents[0]:.5g}, the spots over {extents[1]:.5g}: unless one covers only a part of the "
                "tissue, their units differ (pixels and um?); --set transform= takes the spots to the cells' frame"
            )
        found, info = infer_radius(*both, known=config.radius)
        if axes_look_swapped(*both):
            say(
                f"warning: {where}the counts fit clearly better with x and y of the spots exchanged; if the axes are swapped: "
                "--set transform=[[0,1,0],[1,0,0],[0,0,1]]"
            )
        if config.align:
            moved[spots] += np.array(info.shift)
        if len(names) == 1 and radius is None:
            radius = found if config.align else info.radius_unshifted
        if config.radius is None or any(info.shift) or not info.informative:
            say(where + info.reason + ("" if config.align or not any(info.shift) else " (not moved: align=false)"))
    return moved, radius


def _separate(
    cell_xy: NDArray[np.float64], spot_xy: NDArray[np.float64], names: list[str], cells: NDArray[Any], spots: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move sections far apart, so that no map, kernel or graph crosses them."""
    extent = max(float(np.ptp(spot_xy, axis=0).max()), float(np.ptp(cell_xy, axis=0).max()))
    pitch = min((spot_pitch(spot_xy[spots == name]) for name in names if (spots == name).sum() > 1), default=extent)
    step = np.array([extent + SECTION_GAP * pitch, 0.0])
    return (
        cell_xy + np.searchsorted(names, cells)[:, None] * step,
        spot_xy + np.searchsorted(names, spots)[:, None] * step,
    )


def _named(
    target: Counts, reference: Counts, config: Config, say: Callable[[str], None]
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64] | None, tuple[str, ...]]:
    """Factor that each cell is labelled with [n] (-1: none), prior profiles [K, G], and names of the first factors.

    A label and a cell type of the profiles that are written alike are the same factor.
    """
    if config.cells == "softmax":  # knows neither
        return None, None, ()
    profiles, types = (None, []) if config.profiles is None else _profiles(reference, config)
    codes, own = (None, []) if config.label_key is None else _labels(target, config)
    names = (*types, *(name for name in own if name not in types))
    if 0 < config.factors < len(names):
        where = " and ".join([f"label_key {config.label_key!r}"] * bool(own) + [f"profiles ({config.profiles})"] * bool(types))
        what = "cell types" if types else "labels"
        raise UserError(f"{where}: {len(names)} {what}, more than factors={config.factors}; raise factors")
    if types and own and not set(own) & set(types):
        say(f"warning: no label ({own[0]}, ...) is a cell type of the profiles ({types[0]}, ...): each has its own factor; are they spelled alike?")
    if types:
        say(f"profiles: factors 0 to {len(types) - 1} start from the clusters of cells that look most like {', '.join(types)}")
    if codes is None:
        return None, profiles, names
    number = np.array([names.index(name) for name in own])
    labels = np.where(codes >= 0, number[codes], -1)
    how = "" if config.label_weight > 0 else " at the start (label_weight=0: the counts alone decide what becomes of them)"
    factors = ", ".join(f"{name} {k}" for name, k in zip(own, number, strict=True))
    say(f"labels: cells start on the factor of their label{how}: {factors}; {(codes < 0).sum()} cells unlabelled")
    return labels, profiles, names


def _labels(target: Counts, config: Config) -> tuple[NDArray[np.int64], list[str]]:
    """Code of each cell's label [n] (-1: none) and the labels."""
    if config.label_key not in target.obs:
        raise UserError(
            f"target ({target.source}): no obs column {config.label_key!r} (label_key); it has {', '.join(map(str, target.obs.columns[:5]))}"
        )
    codes, names = _text_codes(target.obs[config.label_key])
    if not len(names):
        raise UserError(
            f"target ({target.source}): none of its {len(codes)} cells has a label in obs column {config.label_key!r} (label_key); name one that "
            "labels some of them, or leave label_key out"
        )
    return codes.astype(np.int64), list(names)


def _profiles(reference: Counts, config: Config) -> tuple[NDArray[np.float64], list[str]]:
    """Mean expression profile per cell type of a single-cell reference, on the spots' genes, and the types; genes it lacks take the spots' mean."""
    assert config.profiles is not None
    cells = read_like(config.profiles, role="profiles", layer=config.layer, gene_key=config.gene_key)
    if config.profile_key not in cells.obs:
        raise UserError(f"profiles ({cells.source}): no obs column {config.profile_key!r} (profile_key)")
    codes, names = _text_codes(cells.obs[config.profile_key])
    if not len(names):
        raise UserError(
            f"profiles ({cells.source}): none of its {len(codes)} cells has a value in obs column {config.profile_key!r} (profile_key); name one "
            "of cell types"
        )
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
    return profiles, list(names)


def _text_codes(column: "pd.Series[Any]") -> tuple[NDArray[np.int64], "pd.Index[str]"]:
    """Codes [n] (-1: missing) and values of a column, as text and in alphabetical order."""
    return pd.factorize(column.astype("object").map(str, na_action="ignore"), sort=True)

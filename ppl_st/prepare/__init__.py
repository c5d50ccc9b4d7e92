"""From checked counts to a method's problem: one file per method, named as the method.

Every file has

    problem(target, reference, config, say) -> (data, target, reference)   the problem, and the counts it uses of each side
    new_cells(target, fitted, data, config) -> (data, target)              the same problem for other cells with the fitted target's genes

Methods of images have instead, as `ppl_st.prepare.xfuse` does,

    problem(slides, input, say, pictures) -> (data, counts of every section)     checked sections; a refusal leaves a picture in ``pictures``

``data`` is the ``Data`` of the method (sparse counts, maps, graphs, codes); what is left out is said through ``say``.
"""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ppl_st.asked import gene_list
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.spatial import sections

__all__ = ["MIN_SHARED", "hold_out_genes", "load_prepare", "refuse_few_genes", "refuse_single", "relative_depths", "same_genes"]

MIN_SHARED = 5  # genes of target and reference, for a fit


def load_prepare(method: str) -> ModuleType:
    """The file of ``method``; it imports the method, hence torch."""
    return import_module(f"ppl_st.prepare.{method}")


def refuse_single(counts: Counts, role: str, what: str = "cell") -> None:
    """A side of one row (or none that is usable) teaches a fit nothing: that is an error."""
    found = len(counts.names)
    if found < 2:
        raise UserError(
            f"{role} ({counts.source}): {found} {what if found else what + 's'} to learn from, at least 2 are needed; give more {what}s"
            + (", or predict this one with a run that was fitted to others (ppl-st predict RUN --target)" if role == "target" else "")
        )


def refuse_few_genes(what: str, shared: int, hidden: int) -> None:
    """Hiding so many of the shared genes at once that too few are left for a fit is an error."""
    spare = shared - MIN_SHARED
    if hidden > spare:
        remedy = f"hide fewer (--folds {-(-shared // spare)} or more)" if spare > 0 else f"a panel of {MIN_SHARED + 1} or more is needed"
        raise UserError(f"{what}: hiding {hidden} of {shared} shared genes leaves {shared - hidden}, but a fit needs {MIN_SHARED}: {remedy}")


def hold_out_genes(target: Counts, reference: Counts, genes: Sequence[str] | NDArray[np.str_]) -> Counts:
    """The target without ``genes``; asking to hold out a gene that one side does not have, or too many for a fit, is an error."""
    held = gene_list(genes, "--hold-out")
    missing = held[~np.isin(held, target.genes)]
    if len(missing):
        shown = ", ".join(missing[:3])
        raise UserError(
            f"--hold-out: {len(missing)} of {len(held)} genes are not in the target ({target.source}), e.g. {shown}; "
            "list genes that the target measured (genes it never measured need no holding out)"
        )
    unknown = held[~np.isin(held, reference.genes)]
    if len(unknown):
        raise UserError(
            f"--hold-out: {len(unknown)} of {len(held)} genes are not in the reference ({reference.source}), e.g. {', '.join(unknown[:3])}; they "
            "could not be predicted: leave them out of the list"
        )
    shared = int(np.isin(target.genes, reference.genes).sum())
    if shared - len(held) < MIN_SHARED <= shared:
        raise UserError(
            f"--hold-out: hiding {len(held)} of the {shared} genes that target and reference share leaves {shared - len(held)}, but a fit needs "
            f"{MIN_SHARED}: hide fewer"
        )
    return target.take_genes(target.genes[~np.isin(target.genes, held)])


def same_genes(target: Counts, fitted: Counts) -> Counts:
    """Other cells with the genes of the fitted target, in its order; a gene that they lack is an error."""
    missing = fitted.genes[~np.isin(fitted.genes, target.genes)]
    if len(missing):
        raise UserError(
            f"target ({target.source}) lacks {len(missing)} of the {len(fitted.genes)} genes that the run was fitted on, e.g. "
            f"{', '.join(missing[:3])}; a run predicts cells measured with the same genes"
        )
    return target.take_genes(fitted.genes)


def relative_depths(target: Counts, fitted: Counts, library_key: str | None) -> NDArray[np.float64]:
    """Usual depth of the section of each cell over that of the fitted target, [n]: what a depth that is only partly known is drawn to.

    A section is what ``obs[library_key]`` names, or all the cells. With d the log ratio of median totals and v its sampling variance, the ratio is
    exp(d (1 - 4 v / d^2)_+): 1 unless the section differs beyond chance, so that a few cells of the fit are predicted as they were among the others.

    Totals alone cannot tell a shallow section from a part of the fit whose cells have few counts (small cells, one type): such a part given as a new
    target counts as shallow, and its rates differ from those of the same cells in the fit.
    """
    logs, usual = (np.log(np.maximum(one.totals, 1.0)) for one in (target, fitted))
    found = sections(target, library_key)
    section = np.zeros(len(logs), np.int64) if found is None else found
    size = np.bincount(section)
    degrees = len(logs) - len(size)
    if degrees < 1:
        return np.ones(len(logs))
    away = np.array([np.median(logs[section == one]) for one in range(len(size))]) - np.median(usual)
    spread = np.square(logs - (np.bincount(section, logs) / size)[section]).sum() / degrees
    chance = 4 * (np.pi / 2) * spread / size  # of a median
    return np.asarray(np.exp(np.maximum(1 - chance / np.maximum(away**2, 1e-12), 0.0) * away)[section])

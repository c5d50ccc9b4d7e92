"""SpaGene's problem from checked counts: shared genes, reference cells that have some of them, spatial neighbors."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from ppl_st.data import Counts, shared_genes
from ppl_st.errors import UserError
from ppl_st.models.spagene import Config, Data, make
from ppl_st.prepare import MIN_SHARED, refuse_single, relative_depths, same_genes
from ppl_st.spatial import neighbor_mean

MIN_REFERENCE = 10


def problem(target: Counts, reference: Counts, config: Config, say: Callable[[str], None]) -> tuple[Data, Counts, Counts]:
    """SpaGene's problem; returns it with the counts that it uses.

    All genes of the target place its cells, all of the reference can be predicted; the shared ones teach the translators. Target cells stay, also
    empty ones; reference cells without a count in the shared genes are dropped.
    """
    refuse_single(target, "target")
    shared = shared_genes(target, reference, minimum=MIN_SHARED)
    at = pd.Index(reference.genes).get_indexer(pd.Index(shared)).astype(np.int64)
    usable = np.asarray(reference.matrix[:, at].sum(1)).ravel() > 0
    if usable.sum() < MIN_REFERENCE:
        raise UserError(
            f"reference ({reference.source}): {int(usable.sum())} of {len(usable)} cells have counts in the {len(shared)} shared genes; at least "
            f"{MIN_REFERENCE} are needed"
        )
    if not usable.all():
        say(f"{int((~usable).sum())} reference cells without counts in the shared genes are left out")
        reference = reference.take_rows(usable)
    columns = pd.Index(target.genes).get_indexer(pd.Index(shared)).astype(np.int64)
    near = neighbor_mean(target, config.neighbors, config.library_key)
    return make(target.matrix, columns, at, reference.matrix, near, relative_depths(target, target, config.library_key)), target, reference


def new_cells(target: Counts, fitted: Counts, data: Data, config: Config) -> tuple[Data, Counts]:
    """The same problem for other cells, measured with all the genes of the target of the fit (``fitted``)."""
    target = same_genes(target, fitted)
    near = neighbor_mean(target, config.neighbors, config.library_key)
    return data._replace(counts=target.matrix, neighbors=near, relative=relative_depths(target, fitted, config.library_key)), target

"""What VISTA offers beside imputation: its uncertainty scores, and a spatial cell decoded in the reference's style."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.randomness import rng_scope
from ppl_st.models.vista.batches import Batches, Data
from ppl_st.models.vista.model import sides

__all__ = ["as_reference", "cosine_uncertainty", "cosine_uncertainty_closed_form"]


def cosine_uncertainty(mean: NDArray[Any], draws: NDArray[Any], *, of: str = "genes") -> NDArray[np.float64]:
    """The paper's score (eq. 12, 13): 1 - median over draws of the cosine between drawn counts and their mean.

    ``mean`` [n, g], ``draws`` [L, n, g]. ``of="genes"`` compares a gene's vectors over cells, [g]; "cells" a cell's over genes, [n]. It is a
    signal-to-noise score that falls with the level of a gene; compare it with ranking by mean expression.
    """
    axis = 0 if of == "genes" else 1
    x, m = np.asarray(draws, dtype=np.float64), np.asarray(mean, dtype=np.float64)
    norm = np.sqrt((x**2).sum(axis + 1) * (m**2).sum(axis))
    cosine = np.where(norm > 0, (x * m).sum(axis + 1) / np.maximum(norm, 1e-300), 0.0)
    return np.asarray(1 - np.median(cosine, axis=0), dtype=np.float64)


def cosine_uncertainty_closed_form(mean: NDArray[Any], variance: NDArray[Any], *, of: str = "genes") -> NDArray[np.float64]:
    """The same without draws: 1 - sqrt(S / (S + V)), S the sum of squared means and V of variances; both [n, g]."""
    axis = 0 if of == "genes" else 1
    square = np.square(mean, dtype=np.float64).sum(axis)
    total = square + np.asarray(variance, dtype=np.float64).sum(axis)
    return np.asarray(1 - np.sqrt(square / np.maximum(total, 1e-300)), dtype=np.float64)


def as_reference(run: Any, genes: list[str], *, library: float | None = None, draws: int = 20, seed: int = 0) -> NDArray[np.float32]:
    """Mean counts that each spatial cell would show as a reference cell, [n, g]: its state (without the process), the reference's level, slope and
    library.

    With a reference of one condition (disease, perturbation) and a target of another this is the paper's transfer: the spatial cells in the
    reference's condition. ``library`` is the total over all genes of the reference (its median when None). A model's answer, not a measurement:
    what differs between the conditions in the map from panel to other genes is all that is transferred.
    """
    if not isinstance(run.data, Data):
        raise UserError("as_reference needs a VISTA run of one seed: fit without seeds, or load one of the runs that were mixed")
    index = torch.from_numpy(run._index(genes))
    total = float(np.median(run.reference.totals)) if library is None else float(library)
    out = np.zeros((run.data.counts.shape[0], len(genes)), dtype=np.float32)
    chains = chains_of(run.pair)
    for b, batch in enumerate(Batches(run.data, 0, 0, 0).in_order(1024)):
        for d in range(draws):
            model, guide = sides(chains[d % len(chains)])
            with torch.no_grad(), rng_scope(seed, "style", b, d):
                loc, scale = guide.states(batch)
                z = loc + scale * torch.randn_like(loc)
                log_library = torch.full((len(z),), float(np.log(total)))
                out[batch.rows.numpy()] += model.reference_log_rate(z, log_library)[:, index].exp().numpy() / draws
    return out

"""A run seen in the style of its reference: the paper's transfer of a disease or a perturbation (see `ppl_st.posterior.Run.as_reference`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ppl_st.data import labels_of
from ppl_st.errors import UserError

if TYPE_CHECKING:
    from ppl_st.posterior import Run


def in_reference_style(run: Run, condition: str | None, library: float | None) -> Run:
    """The view of ``run`` that decodes as its reference does, or as the reference's cells of ``condition`` do, at a total of ``library`` counts."""
    if not hasattr(run.module, "as_reference"):
        raise UserError(f"{run.method}: this run does not decode in the reference's style; a vista run of one seed does (RUN/seed0, say)")
    inside = np.ones(len(run.reference.names), dtype=bool)
    if condition is not None:
        key = run.config.batch_key
        if key is None:
            raise UserError(f"{condition!r}: the fit knew no conditions of its reference; fit with --set batch_key=COLUMN, in obs of both files")
        labels = labels_of(run.reference, key, "reference", "batch_key")
        inside = labels == condition
        if not inside.any():
            known = ", ".join(np.unique(labels))
            raise UserError(f"reference ({run.reference.source}): no cell has {condition!r} in obs column {key!r}; it has {known}")
    total = float(np.median(run.reference.totals[inside])) if library is None else float(library)
    if not 0 < total < np.inf:
        raise UserError(f"library {total}: give a positive total count of a cell")
    module = run.module.as_reference(run.pair, run.data, None if condition is None else inside, total)
    manifest = run.manifest | {"as_reference": {"condition": condition, "cells": int(inside.sum()), "library": total}}
    return replace(run, module=module, manifest=manifest, folder=None, inner=None, recalibration=None)

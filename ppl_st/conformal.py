"""Correcting forecasts for genes that were never measured, with the measured genes as the only independent evidence.

The conformal layer treats *genes* as the exchangeable units: the cells of one gene share its gain and dispersion, so however many they are
they count as one observation of "how wrong is a gene". Inner held-out genes g = 1..m give curves c_g(l), the coverage of the nominal level l.
The nominal level for a new gene is

    l* = min { l : (m mean_g (1 - c_g(l)) + 1) / (m + 1) <= 1 - level }

Then E[coverage of a new gene] >= level for any m, whatever the forecaster, as long as the new gene is exchangeable with the inner ones
(conformal risk control: Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024, Theorem 1; the miscoverage falls with l and lies in [0, 1]). The
"+ 1" costs up to 1 / (m + 1) of over-coverage; ``guarantee=False`` leaves it out. The guarantee is for the mean over genes, not for each gene.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ppl_st.calibration import GRID
from ppl_st.errors import UserError

__all__ = ["Recalibration", "conformal_level", "recalibration"]

STRATUM = 50  # inner genes that a stratum needs


def conformal_level(curves: Any, level: float, *, guarantee: bool = True) -> float:
    """Nominal level at which a new gene's central interval covers ``level`` on average.

    Parameters
    ----------
    curves
        Coverage of every inner gene at every nominal level of `GRID`, [levels, genes].
    level
        Wanted coverage, in (0, 1).
    guarantee
        Whether the finite-sample bound of the module's docstring holds; else the inner genes' own mean coverage reaches ``level``.

    Returns
    -------
    float
        A level of `GRID`; 1 (no finite interval will do) if even the widest covers too little.
    """
    table = np.asarray(curves, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != len(GRID) or table.shape[1] == 0:
        raise UserError(
            f"conformal_level: curves have shape {table.shape}; need [{len(GRID)}, genes] with at least one gene"
        )
    if not 0 < level < 1:
        raise UserError(f"conformal_level: level {level} must lie strictly between 0 and 1")
    genes = table.shape[1]
    miss = 1 - np.maximum.accumulate(table.mean(1))
    bound = (genes * miss + 1) / (genes + 1) if guarantee else miss
    enough = np.flatnonzero(bound <= 1 - level + 1e-12)
    return float(GRID[enough[0]]) if enough.size else 1.0


class Recalibration(NamedTuple):
    """What inner held-out genes say about the intervals of new genes; plain numbers, stored with a run."""

    level: float  # coverage that is wanted
    edges: list[float]  # values of the covariate between the strata
    nominal: list[float]  # nominal level of each stratum
    genes: int  # inner genes
    raw_coverage: float  # mean coverage of the uncorrected interval on them
    guarantee: bool

    def nominal_of(self, covariate: Any) -> np.ndarray:
        """Nominal level for genes with these values of the covariate, like ``covariate``."""
        return np.asarray(self.nominal)[np.searchsorted(self.edges, np.asarray(covariate, dtype=np.float64))]


def recalibration(curves: Any, covariate: Any, level: float = 0.9, *, guarantee: bool = True) -> Recalibration:
    """`conformal_level` in strata of a covariate, `STRATUM` inner genes or more in each (with fewer genes there is one stratum).

    ``curves`` [levels, genes] as in `conformal_level`; ``covariate`` [genes] is known of a new gene too, such as its mean count in the reference.
    """
    table, known = np.asarray(curves, dtype=np.float64), np.asarray(covariate, dtype=np.float64)
    if known.shape != table.shape[1:]:
        raise UserError(f"recalibration: {table.shape[1]} curves but {known.size} values of the covariate")
    strata = max(1, known.size // STRATUM)
    edges = [float(np.quantile(known, k / strata)) for k in range(1, strata)]
    of = np.searchsorted(edges, known)
    nominal = [conformal_level(table[:, of == k], level, guarantee=guarantee) for k in range(strata)]
    raw = float(np.mean([np.interp(level, GRID, curve) for curve in table.T]))
    return Recalibration(level, edges, nominal, known.size, raw, guarantee)

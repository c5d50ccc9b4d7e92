"""Correcting forecasts for genes that were never measured, with the measured genes as the only independent evidence.

*Genes* are the exchangeable units: the cells of one gene share its level and dispersion, so however many they are they count as one observation of
"how wrong is a gene". The method is fitted again without a part of the measured genes and scored on them (`ppl_st.recalibrate`); each such inner
gene g = 1..m gives F_g(u), the distribution function of its randomised PIT at the knots `KNOTS`: F_g(u) = u for a perfect forecast.

Recalibrated predictive (quantile mapping of the PIT). If G is the predictive distribution of a count, the corrected one is R(G), with

    R = u + f (mean_g F_g - u),     f = (1 - V / D)_+,     D = mean_u (mean_g F_g - u)^2,     V = mean_u var_g(F_g) / m

f is a positive-part shrinkage: V is what D would be by chance alone if the forecasts were right, so a forecaster that the inner
genes cannot tell from a calibrated one is left exactly as it is (f = 0), and a bad one is corrected in full (f -> 1). The interval
of level a is [R^-1((1 - a) / 2), R^-1((1 + a) / 2)] in probabilities of G. With `STRATUM` inner genes or more per stratum of a
covariate that is known of a new gene (its mean count in the reference), each stratum has its own R, shrunk in the same way towards
that of all genes.

Conformal intervals (``guarantee=True``). With c_g(l) the coverage of the central interval of nominal level l, the nominal level for a new gene is

    l* = min { l : (m mean_g (1 - c_g(l)) + 1) / (m + 1) <= 1 - level }

Then E[coverage of a new gene] >= level for any m, whatever the forecaster, as long as the new gene's curve is exchangeable with the inner ones'
(conformal risk control: Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024, Theorem 1; the miscoverage falls with l and lies in [0, 1]). In strata
it holds nearly: edges are values of inner genes, and the one at an edge is always of the lower stratum, which a new gene need not be. It is exact
for genes that the same fits were not shown. A new gene is predicted by the fit to *all* measured genes: for it the promise holds as far as that
fit errs like those to a part of them, which no theorem says (least squares with as many genes as observations is a counter-example). Where
the miscoverage has no jumps in l, the over-coverage is at most 2 / (m + 1) (Theorem 2 there: up to .074 with 26 inner genes), plus what the level is
rounded up to the next one of `GRID` (in steps of .02, from .98 on of .002). The promise is for the mean over genes, not each one.

Methods of images predict genes that they were shown, at *places* that they were not: there hidden spots are the exchangeable units. F_i is the
distribution function of the PIT over the genes of one stratum at spot i, R is made from the F_i of each stratum as above (`at_places`), and so is the
guarantee, whose "+ 1" is small where spots are many. It holds for places picked as the spots were: not for an image or a section without counts.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_st.calibration import GRID
from ppl_st.errors import UserError

__all__ = [
    "INNER_CELLS", "KNOTS", "Inner", "Recalibration", "at_places", "conformal_level", "gene_strata", "genes_needed", "inner_rows", "pit_curves",
    "recalibration", "shrunk",
]  # fmt: skip

INNER_CELLS = 2000  # cells whose log scores of inner held-out genes are kept

STRATUM = 50  # inner genes that a stratum needs
# Probabilities at which the distribution function of a PIT is kept: the ends of the central intervals of `GRID`, the median, 0 and 1.
KNOTS = np.unique(np.round(np.concatenate([[0, 0.5, 1], 0.5 - 0.5 * GRID, 0.5 + 0.5 * GRID]), 9))

Floats = NDArray[np.float64]


class Inner(NamedTuple):
    """Scores of genes of the target that were hidden in turn: what a run knows about its forecasts of new genes.

    genes [m] names; pit [knots, m] distribution function of each gene's randomised PIT at `KNOTS`; cells names of some of the cells (`inner_rows`),
    log_prob [cells, m] log predictive probability of the counts there. Of a method of images the hidden units, ``genes``, are spots, and there is no
    log_prob.
    """

    genes: NDArray[np.str_]
    pit: Floats
    cells: NDArray[np.str_]
    log_prob: NDArray[np.float32]


class Recalibration(NamedTuple):
    """What inner held-out genes say about new genes; plain numbers, stored with a run."""

    level: float  # coverage that is wanted of the interval
    edges: list[float]  # values of the covariate between the strata
    maps: list[list[float]]  # R of each stratum at `KNOTS`
    nominal: list[float]  # with the guarantee: nominal level of each stratum; else empty
    genes: int  # inner genes (of a method of images: hidden spots)
    raw_coverage: float  # mean coverage of the uncorrected interval on them
    folds: int | None = None  # parts that the units were hidden in
    seed: int | None = None  # of the parts and of the draws
    draws: int | None = None  # behind each prediction; these three are None where an older version stored it

    @property
    def guarantee(self) -> bool:
        """Whether the interval is the conformal one."""
        return bool(self.nominal)

    def maps_of(self, covariate: Any) -> Floats:
        """R at `KNOTS` for genes with these values of the covariate, [knots, genes]."""
        return np.asarray(self.maps, dtype=np.float64)[self._stratum(covariate)].T

    def corrected(self, probability: Any, covariate: Any) -> Floats:
        """R of probabilities [cells, genes] of the uncorrected predictive, such as bounds of the PIT."""
        maps = self.maps_of(covariate)
        return np.stack([np.interp(p, KNOTS, one) for p, one in zip(np.asarray(probability, dtype=np.float64).T, maps.T, strict=True)], 1)

    def mass_of(self, covariate: Any, draws: int) -> Floats:
        """What the corrected predictive gives to so many draws in rising order, [draws, genes]."""
        return np.diff([np.interp(np.linspace(0, 1, draws + 1), KNOTS, one) for one in self.maps_of(covariate).T]).T

    def ends_of(self, covariate: Any) -> Floats:
        """Probabilities of the uncorrected predictive between which the interval lies, [2, genes]; 0 or 1 where no finite end will do."""
        if self.guarantee:
            nominal = np.asarray(self.nominal)[self._stratum(covariate)]
            return np.stack([0.5 - 0.5 * nominal, 0.5 + 0.5 * nominal])
        wanted = [0.5 - 0.5 * self.level, 0.5 + 0.5 * self.level]
        ends = np.array([np.interp(wanted, one, KNOTS) for one in self.maps])
        ends[:, 0] = np.where(ends[:, 0] < KNOTS[1], 0.0, ends[:, 0])  # beyond the last knots nothing was seen
        ends[:, 1] = np.where(ends[:, 1] > KNOTS[-2], 1.0, ends[:, 1])
        return ends[self._stratum(covariate)].T

    def _stratum(self, covariate: Any) -> NDArray[np.int64]:
        return np.searchsorted(self.edges, np.asarray(covariate, dtype=np.float64))


def inner_rows(names: Iterable[str]) -> NDArray[np.int64]:
    """Rows, rising, of at most `INNER_CELLS` of the cells whose log scores are kept, those with the smallest CRC-32 of their names.

    No seed and no position enters: evaluations and runs that differ in seeds, or in a few cells, keep nearly the same cells and can be paired.
    """
    order = np.argsort([zlib.crc32(name.encode()) for name in names], kind="stable")
    return np.sort(order[:INNER_CELLS])


def pit_curves(pit_low: Any, pit_high: Any) -> Floats:
    """Distribution function of the randomised PIT of every gene at `KNOTS`, [knots, genes], from its bounds [cells, genes] (no random numbers)."""
    low, high = np.asarray(pit_low, dtype=np.float64), np.asarray(pit_high, dtype=np.float64)
    width = np.maximum(high - low, 1e-12)
    return np.stack([np.where(u >= high, 1.0, np.clip((u - low) / width, 0.0, 1.0)).mean(0) for u in KNOTS])


def shrunk(pit: Any, towards: Any = None) -> Floats:
    """R at `KNOTS` from the PIT curves [knots, genes] of inner genes; ``towards`` is what is kept if they show nothing (the identity)."""
    curves = np.asarray(pit, dtype=np.float64)
    base = KNOTS if towards is None else np.asarray(towards, dtype=np.float64)
    deviation, weight = curves.mean(1) - base, np.gradient(KNOTS)
    size = float((weight * deviation**2).sum())
    noise = float((weight * curves.var(1, ddof=1)).sum()) / curves.shape[1] if curves.shape[1] > 1 else np.inf
    return base + max(0.0, 1 - noise / size) * deviation if size > 0 else base.copy()


def conformal_level(curves: Any, level: float) -> float:
    """Nominal level at which a new gene's central interval covers ``level`` or more on average, by the bound of the module's docstring.

    Parameters
    ----------
    curves
        Coverage of every inner gene at every nominal level of `GRID`, [levels, genes].
    level
        Wanted coverage, in (0, 1).

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
    enough = np.flatnonzero((genes * miss + 1) / (genes + 1) <= 1 - level + 1e-12)
    return float(GRID[enough[0]]) if enough.size else 1.0


def recalibration(pit: Any, covariate: Any, level: float = 0.9, *, guarantee: bool = False) -> Recalibration:
    """What to correct, in strata of a covariate with `STRATUM` inner genes or more in each, with the guarantee also as many as its level needs (with
    fewer genes there is one stratum).

    ``pit`` [knots, genes] from `pit_curves`; ``covariate`` [genes] is known of a new gene too, such as its mean count in the reference.
    """
    curves, known = np.asarray(pit, dtype=np.float64), np.asarray(covariate, dtype=np.float64)
    if curves.shape != (len(KNOTS), known.size) or not known.size:
        raise UserError(f"recalibration: PIT curves have shape {curves.shape}, need [{len(KNOTS)}, {known.size}], one for each covariate")
    if not 0 < level < 1:
        raise UserError(f"recalibration: level {level} must lie strictly between 0 and 1")
    edges = gene_strata(known, max(STRATUM, genes_needed(level)) if guarantee else STRATUM)
    of = np.searchsorted(edges, known)
    return _made(curves, [curves[:, of == k] for k in range(len(edges) + 1)], edges, level, guarantee)


def at_places(pit: Any, edges: list[float], level: float = 0.9, *, guarantee: bool = False) -> Recalibration:
    """What to correct at new places: ``pit`` [strata, knots, places] PIT curves of each stratum of genes, ``edges`` from `gene_strata`."""
    curves = np.asarray(pit, dtype=np.float64)
    if curves.ndim != 3 or curves.shape[:2] != (len(edges) + 1, len(KNOTS)) or not curves.shape[2]:
        raise UserError(f"at_places: PIT curves have shape {curves.shape}, need [{len(edges) + 1}, {len(KNOTS)}, places]")
    return _made(curves.mean(0), list(curves), edges, level, guarantee)


def genes_needed(level: float) -> int:
    """How many units a guarantee of ``level`` needs: 1 / (m + 1) <= 1 - level."""
    return int(np.ceil(round(1 / (1 - level), 6))) - 1


def gene_strata(covariate: Any, size: int = STRATUM) -> list[float]:
    """Values between strata of the covariate [genes] with ``size`` genes or more in each; a stratum ends with all genes of its largest value."""
    known = np.sort(np.asarray(covariate, dtype=np.float64))
    strata, last = max(1, known.size // size), 0
    edges: list[float] = []
    for cut in np.unique(np.quantile(known, np.arange(1, strata) / strata, method="lower")):
        upto = int(np.searchsorted(known, cut, side="right"))
        if upto - last >= size and known.size - upto >= size:  # not so where many genes share a value
            edges.append(float(cut))
            last = upto
    return edges


def _made(curves: Floats, parts: list[Floats], edges: list[float], level: float, guarantee: bool) -> Recalibration:
    """From the PIT curves of all units [knots, units] and those of each stratum."""
    common = shrunk(curves)
    maps = [common if len(parts) == 1 else shrunk(part, common) for part in parts]
    nominal = [conformal_level(_central(part), level) for part in parts] if guarantee else []
    raw = float(np.mean([np.interp(level, GRID, curve) for curve in _central(curves).T]))
    return Recalibration(level, edges, [one.tolist() for one in maps], nominal, curves.shape[1], raw)


def _central(curves: Floats) -> Floats:
    """Coverage of the central intervals of `GRID`, [levels, units]."""
    return np.stack([np.interp(0.5 + 0.5 * GRID, KNOTS, F) - np.interp(0.5 - 0.5 * GRID, KNOTS, F) for F in curves.T], 1)

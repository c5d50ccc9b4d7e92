"""Posterior predictive checks: would data that the model makes up look like the data there are?

A calibrated interval of single counts does not say that the model knows how a gene's counts hang together over the tissue. So for each gene a
statistic T of all its counts is computed on the measured counts and on each of K joint posterior predictive draws of the same cells,

    mean, variance      over cells
    zero fraction       share of cells without a count
    Moran's I           how alike spatial neighbors are (`ppl_st.pooling.morans_i`)

and, cell by cell, of the ``library``: a cell's sum over the genes looked at. Where the measured value lies among the K drawn ones is its PIT, ranked
as `ppl_st.calibration.pit_bounds` ranks: below .05 or above .95 the model's data do not look like the data in this respect. A value that ties with
draws (few counts) has a stretch of ranks, and counts for the part of it that lies between: 90 % in the mean if the model is right. Draws
share a gene's level, dispersion and everything else that is not known of it, so for genes that were never measured the bands are wide, and 90 %
of the genes should lie within theirs; for genes that the fit saw bands are narrow, and a check fails sooner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st.calibration import interval_coverage, pit_bounds
from ppl_st.data import Counts, matched
from ppl_st.errors import UserError
from ppl_st.inference.predict import count_draws
from ppl_st.pooling import morans_i
from ppl_st.spatial import neighbors

if TYPE_CHECKING:
    from ppl_st.posterior import Run

__all__ = ["STATISTICS", "Checks", "predictive_checks"]

STATISTICS = ("mean", "variance", "zero fraction", "Moran's I")
NEIGHBORS = 8
MAX_BYTES = 2e8  # of the draws, which are held

Floats = NDArray[np.float64]


class Checks(NamedTuple):
    """``genes``: one row per gene and statistic, columns gene, statistic, observed, q05, q50, q95 (over draws), pit (its middle), inside (share of it
    in the middle 90 %); ``library``: one row per cell, columns observed, q05, q50, q95, pit, inside.
    """

    genes: pd.DataFrame
    library: pd.DataFrame


def predictive_checks(run: Run, truth: Counts | None = None, genes: Any = None, *, draws: int = 40, seed: int = 0) -> Checks:
    """The checks of a fitted run.

    Parameters
    ----------
    truth
        Counts of the run's cells; None = those that the fit saw.
    genes
        Names; None = all of the truth that the run knows. If their draws would take more than `MAX_BYTES`, a seeded subset is looked at.
    draws, seed
        Joint draws, and their seed.

    Raises
    ------
    UserError
        No gene to look at, fewer than two draws.
    """
    known = run.target if truth is None else truth
    asked = np.asarray(known.genes if genes is None else genes, dtype=str)
    asked = asked[np.isin(asked, run.genes) & np.isin(asked, known.genes)]
    if not len(asked) or draws < 2:
        raise UserError(
            f"predictive_checks: {len(asked)} genes with counts that the run knows, {draws} draws; need one gene and two draws or more (and where "
            "nothing was measured, a truth)"
        )
    n = len(run.target.names)
    most = max(1, int(MAX_BYTES // (4 * draws * n)))
    if len(asked) > most:
        asked = asked[np.sort(np.random.default_rng([seed, 41]).permutation(len(asked))[:most])]
    observed = np.asarray(matched(known, run.target, asked).toarray(), dtype=np.float64)
    predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
    index = pd.Index(run.genes).get_indexer(pd.Index(asked))
    drawn = np.zeros((draws, n, len(asked)), np.float32)
    for rows, counts in count_draws(predictor, predictor.chains, index, draws=draws, seed=seed):
        drawn[:, rows] = counts
    graph = _neighbors(run)

    def of(counts: Any) -> dict[str, Floats]:
        x = np.asarray(counts, dtype=np.float64)
        found = {"mean": x.mean(0), "variance": x.var(0), "zero fraction": (x == 0).mean(0)}
        return found if graph is None else {**found, "Moran's I": morans_i(x, graph).estimate}

    made, true = [of(one) for one in drawn], of(observed)
    tables = [_ranked(np.stack([one[name] for one in made]), true[name]).assign(gene=asked, statistic=name) for name in true]
    table = pd.concat(tables, ignore_index=True)
    library = _ranked(drawn.sum(-1), observed.sum(1)).set_index(pd.Index(run.target.names))
    return Checks(table[["gene", "statistic", "observed", "q05", "q50", "q95", "pit", "inside"]], library)


def _neighbors(run: Run) -> Any:
    """Nearest cells, of several slides only those of the own one; None where Moran's I has no meaning: no place, no neighbor, under four cells."""
    if run.target.xy is None or len(run.target.names) < 4:
        return None
    key = getattr(run.config, "library_key", None) or "section"  # a method of images names it so
    graph = neighbors(run.target.xy, NEIGHBORS, run.target.obs[key].to_numpy() if key in run.target.obs else None)
    return graph if graph.nnz else None


def _ranked(drawn: Any, observed: Floats) -> pd.DataFrame:
    """Quantiles of ``drawn`` [K, m], and the place of ``observed`` [m] among them: the middle of its PIT, its share in the middle 90 %."""
    low, high = pit_bounds(drawn, observed)
    q05, q50, q95 = np.quantile(drawn, [0.05, 0.5, 0.95], axis=0)
    inside = interval_coverage(low[None], high[None], (0.05, 0.95))
    return pd.DataFrame({"observed": observed, "q05": q05, "q50": q50, "q95": q95, "pit": (low + high) / 2, "inside": inside})

"""How far draws of a spot's proportions must spread, learned from a copy of the counts whose proportions are known.

Activities of factors are nearly non-negative maximum likelihood given the profiles: rare factors come out a little too common, and a bootstrap of the
counts starts from that and adds as much again, so its quantiles are too close to each other (.77 of 90% intervals of mixed simulated spots). A copy
of the counts is drawn from the fit, its profiles held; its proportions are the fit's own. They are bootstrapped as those of the data are, and the
factor is sought by which these draws must be spread around their mean to hold 90% of what they were drawn from.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_st.models.siid.activity import Globals, Local, LocalPosterior, aggregate
from ppl_st.models.siid.batches import Batch
from ppl_st.sampling import poisson, standard_gamma

STEPS = 30  # of the local posterior of a bootstrap, from the posterior of the counts themselves
COPIES = 40  # bootstraps of the copy
LEVEL, LEAST = 0.9, 0.01  # of intervals; shares that are judged lie so far from 0 and 1
FACTORS = np.arange(1.0, 4.0, 0.05)


def mixed(batch: Batch, local: Local) -> torch.Tensor:
    """Proportions of the batch's spots [s, h]."""
    made = aggregate(batch, local.capture[:, None] * local.activity)
    return made / made.sum(1, keepdim=True).clamp_min(1e-8)


def bootstrap(batch: Batch, local: Local, known: Globals) -> torch.Tensor:
    """`mixed` of counts that weigh Gamma(count, 1) / count each, solved from ``local`` on."""
    again = batch._replace(counts=_reweighted(batch.counts), spot_counts=_reweighted(batch.spot_counts))
    return mixed(batch, LocalPosterior(again).refine(local, known, STEPS))


def ends(draws: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lower and upper ends [2, s, h] of 90% intervals: ranks out of S + 1, as a new draw falls among S."""
    return np.asarray(np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method="weibull"), dtype=np.float32)


def widened(draws: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Draws [S, s, h] ``factor`` times as far from their mean, no share below 0 and all of a spot 1 together."""
    mean = draws.mean(0)
    wide = np.maximum(mean + factor * (draws - mean), 0)
    return np.asarray(wide / np.maximum(wide.sum(2, keepdims=True), 1e-8), dtype=np.float32)


def shortfall(batch: Batch, local: Local, known: Globals, steps: int, draws: NDArray[np.float32], chains: int) -> float:
    """The factor for ``draws`` [S, s, h] of chains that took turns, by the first one's posterior ``local`` given ``known``. What chains disagree
    about is in the draws already."""
    truth = mixed(batch, local).numpy()
    judged = (truth > LEAST) & (truth < 1 - LEAST)  # no draw reaches the 1 of a spot of one factor
    if not judged.any():
        return 1.0
    cells = poisson(local.activity @ known.panel_profiles)
    spots = poisson(aggregate(batch, local.capture[:, None] * local.activity) @ known.profiles)
    copy = batch._replace(counts=cells.to_sparse_csr(), spot_counts=spots.to_sparse_csr(), total=cells.sum(1))
    mean = LocalPosterior(copy).solve(known, steps)
    found = np.stack([bootstrap(copy, mean, known).numpy() for _ in range(COPIES)])

    def held(factor: float) -> float:
        low, high = ends(widened(found, factor))
        return float(((truth >= low) & (truth <= high))[judged].mean())

    factor = next((one for one in FACTORS if held(one) >= LEVEL), FACTORS[-1])
    own = np.mean([draws[c::chains].var(0).mean() for c in range(min(chains, len(draws)))])
    return max(1.0, float(factor) * float(np.sqrt(own / max(draws.var(0).mean(), 1e-12))))


def _reweighted(counts: torch.Tensor) -> torch.Tensor:
    values = standard_gamma(counts.values())
    return torch.sparse_csr_tensor(counts.crow_indices(), counts.col_indices(), values, size=counts.shape, check_invariants=False)

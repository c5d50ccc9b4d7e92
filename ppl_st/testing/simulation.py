"""Simulation-based calibration: does inference find what the model itself made up? (Talts, Betancourt, Simpson, Vehtari, Gelman 2018)

For r = 1..R draw parameters theta_r from the prior, data from the model, fit, and rank theta_r among S posterior draws. If model, simulator and
inference agree the rank is uniform on 0..S, whatever the model. `simulation_ranks` runs it, `uniformity` tests it, quantity by quantity; `spread` is
the size of a deviation in words that a user of intervals understands.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from ppl_st.errors import UserError

__all__ = ["Ranks", "simulation_ranks", "uniformity"]


class Ranks(NamedTuple):
    """``ranks`` [simulations, quantities] among ``draws`` posterior draws; ``z`` (truth - posterior mean) / posterior sd, the same shape."""

    ranks: NDArray[np.int64]
    z: NDArray[np.float64]
    draws: int

    def spread(self) -> NDArray[np.float64]:
        """Root mean square of z, [quantities]: 1 = right, 2 = posterior standard deviations are half of what they should be."""
        return np.asarray(np.sqrt(np.square(self.z).mean(0)))

    def pooled_spread(self) -> tuple[float, float]:
        """log of the root mean square of z over all quantities, 0 = right, and its standard error: simulations are the units, as the quantities of
        one depend on each other. With few simulations it sees what `uniformity`, quantity by quantity, cannot.
        """
        square = np.square(self.z).mean(1)  # [simulations]
        return 0.5 * float(np.log(square.mean())), 0.5 * float(square.std(ddof=1) / square.mean() / np.sqrt(len(square)))


def simulation_ranks(
    simulate_and_fit: Callable[[int], tuple[NDArray[np.float64], NDArray[np.float64]]], simulations: int
) -> Ranks:
    """Ranks over ``simulations``; the function gets the number of a simulation and returns the truth [quantities] and posterior draws
    [draws, quantities] of a fit to data that were simulated under it.
    """
    ranks, z, draws = [], [], 0
    for number in range(simulations):
        truth, drawn = simulate_and_fit(number)
        if number and len(drawn) != draws:
            raise UserError(f"simulation_ranks: simulation {number} has {len(drawn)} draws, those before {draws}; ranks need the same number in all")
        draws = len(drawn)
        ranks.append((drawn < truth).sum(0))
        z.append((truth - drawn.mean(0)) / np.maximum(drawn.std(0, ddof=1), 1e-12))
    return Ranks(np.stack(ranks), np.stack(z), draws)


def uniformity(found: Ranks, bins: int = 10) -> float:
    """p-value of uniform ranks: chi-squared over ``bins`` (at most draws + 1: as many as there are ranks) for each quantity, the smallest p times the
    number of quantities (they may depend on each other), at most 1.
    """
    n, quantities = found.ranks.shape
    bins = min(bins, found.draws + 1)
    if not n or bins < 2:
        raise UserError(f"uniformity: {n} simulations ranked among {found.draws} draws; need one or more of each")
    edges = np.linspace(0, found.draws + 1, bins + 1)
    expected = n * np.diff(np.ceil(edges - 1e-9)) / (found.draws + 1)  # whole ranks in each bin
    p = []
    for k in range(quantities):
        counts = np.histogram(found.ranks[:, k], np.ceil(edges - 1e-9) - 0.5)[0]
        p.append(float(chi2.sf((np.square(counts - expected) / expected).sum(), bins - 1)))
    return min(1.0, quantities * min(p))

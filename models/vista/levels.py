r"""The level of a gene apart from its slope: what exp(slope v) adds to its mean rate.

    log rate_ig = log D_i + a_g log(t_i / D_i) + level_g + log_gain_g + k_g v_ig - c_g(k_g),        v_ig = bend(score_ig)
    c_g(k)      = log mean_i D_i (t_i / D_i)^a_g exp(k v_ig) - log mean_i t_i                   over cells of the fit and draws of their states

so that log_gain_g is the log of the gene's counts per count of the target less what is known of the same in the reference, whatever its slope
and exponent: what a hyper-prior can know. D_i is the median total in the cell's section: a section that is shallower as a whole has fewer counts
of every gene. c_g is tabulated at `KNOTS` with its derivative, and interpolated by cubics (Hermite). k_g v_ig is clamped to +- `LARGEST`, here
and in the rate.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from ppl_st.models.common.counts import LARGEST
from ppl_st.models.vista.closed import Floats

STEP = 0.5
KNOTS = np.arange(-1.0, 5.0 + STEP / 2, STEP)  # slopes; beyond them the nearest
GENES = 256  # tabulated together


def tabulate(scores: Callable[[slice], Floats], genes: int, log_total: Floats, log_usual: Floats, exponent: Floats) -> Floats:
    """c and its derivative [2, knots, genes] from v [cells, some genes], log t and log D [cells] in one unit, and a [genes]."""
    table, usual = np.zeros((2, len(KNOTS), genes)), np.log(np.mean(np.exp(log_total)))
    for start in range(0, genes, GENES):
        part = slice(start, min(start + GENES, genes))
        v = scores(part)
        base = log_usual[:, None] + exponent[part] * (log_total - log_usual)[:, None]
        for k, slope in enumerate(KNOTS):
            grown = (slope * v).clip(-LARGEST, LARGEST)
            power = base + grown
            top = power.max(0)
            weight = np.exp(power - top)
            total = weight.sum(0)
            table[0, k, part] = top + np.log(total / len(v)) - usual
            table[1, k, part] = (weight * np.where(np.abs(grown) < LARGEST, v, 0.0)).sum(0) / total
    return table


def interpolate(table: Tensor, slope: Tensor, genes: Tensor) -> Tensor:
    """c_g(slope_g) [g] of ``genes`` [g] from the table [2, knots, G]; a function of the slope with a gradient."""
    place = (slope.clamp(float(KNOTS[0]), float(KNOTS[-1])) - float(KNOTS[0])) / STEP
    left = place.detach().floor().long().clamp(max=len(KNOTS) - 2)
    t = place - left
    (low, low_steep), (high, high_steep) = (table[:, k, genes] for k in (left, left + 1))
    return (
        (1 + 2 * t) * (1 - t) ** 2 * low + t**2 * (3 - 2 * t) * high + STEP * (t * (1 - t) ** 2 * low_steep + t**2 * (t - 1) * high_steep)
    )

"""Exact probabilities of one distribution on points and weights, and exact bounds for means of draws.

`table` turns a distribution with empty batch shape into points x_k and masses m_k, such that for smooth g

    E g(X) = sum_k m_k g(x_k)

Counts are enumerated until less than 1e-18 is left. Densities on the real line are integrated by the
trapezoidal rule in t, x = centre + spread * sinh(t), which is exponentially accurate for smooth densities and
reaches heavy tails; positive ones (or those above another bound) in the logarithm of the distance to it. Unit
vectors of 2 or 3 dimensions have their own rule, good to 1e-5 only where a density has a cusp.

`surprise` bounds, without any normal approximation, how probable so extreme a mean of n draws is (Chernoff).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_st.inference.randomness import rng_scope

LARGEST_COUNT = 1 << 17  # distributions with mass beyond are not summed: `Inconclusive`
_NODES = 4001


class Inconclusive(Exception):
    """This example cannot decide the law (a sum too long, say); it counts neither way."""


class Table(NamedTuple):
    """Points and their masses."""

    points: Tensor  # [K] float64, ascending; [K, D] for unit vectors
    mass: Tensor  # [K] float64

    def mean(self, values: Tensor | None = None) -> float:
        """Expectation of values [K] (default: the points), relative to the total mass."""
        return float((self.mass * (self.points if values is None else values)).sum() / self.mass.sum())

    def below(self) -> Tensor:
        """P(X <= points) for counts [K]."""
        return self.mass.cumsum(0)


def table(d: Any, support: str, *, checked: bool = True) -> Table:
    """Points and masses of `d` (float64, empty batch shape); with `checked`, `Inconclusive` on NaN masses."""
    if d.batch_shape:
        raise AssertionError("the exact table is for one distribution at a time")
    with torch.no_grad():
        result = {"count": _count, "real": _real, "positive": _positive, "sphere": _sphere}[support](d)
    if checked and not bool(result.mass.isfinite().all()):
        raise Inconclusive("masses that are not finite")
    return result


def draws_of(d: Any, n: int, *names: str | int) -> Tensor | None:
    """n draws, the same ones every time for the same names; None where the distribution cannot draw."""
    with rng_scope(0, *names):
        try:
            return d.sample(torch.Size((n,)))
        except NotImplementedError:
            return None


def _supported(d: Any, x: Tensor) -> Tensor:
    """The points that the distribution itself calls possible (all, where it does not say)."""
    try:
        return x[d.support.check(x)]
    except (NotImplementedError, AttributeError):
        return x


def _count(d: Any) -> Table:
    some = draws_of(d, 64, "reach")
    reach = float(d.mean if some is None else some.max())
    if not reach < LARGEST_COUNT / 4:
        raise Inconclusive(f"counts of {reach:g} are too many to add up")
    points, masses, start, size = [], [], 0, 64
    while start < LARGEST_COUNT:
        x = _supported(d, torch.arange(start, start + size, dtype=torch.float64))
        if len(x) == 0 and start > reach:
            break
        points.append(x)
        masses.append(d.log_prob(x).exp())
        start, size = start + size, start + size
        last = float(masses[-1].sum())
        if start > reach and not last > 1e-18:
            break
    else:
        if last > 1e-12:
            raise Inconclusive("a tail too long to add up")
    return Table(torch.cat(points), torch.cat(masses))


def _place(values: Tensor) -> tuple[float, float]:
    """Median and half the central 68 % range."""
    low, middle, high = torch.quantile(values.double(), values.new_tensor([0.16, 0.5, 0.84]).double()).tolist()
    return middle, max((high - low) / 2, 1e-12 * max(1.0, abs(middle)))


def _relevant(x: Tensor, mass: Tensor) -> Table:
    """Without the far nodes of no mass, whose squares would overflow; masses that are not finite stay."""
    keep = ~(mass.abs() < 1e-60)
    return Table(x[keep], mass[keep])


def _real(d: Any) -> Table:
    some = draws_of(d, 1000, "reach")
    centre, spread = (float(d.mean), float(d.stddev)) if some is None else _place(some)
    t = torch.linspace(-20, 20, _NODES, dtype=torch.float64)
    x = centre + spread * torch.sinh(t)
    weight = spread * torch.cosh(t) * (t[1] - t[0])
    return _relevant(x, d.log_prob(x).exp() * weight)


def _positive(d: Any) -> Table:
    lowest = float(getattr(d.support, "lower_bound", 0.0))
    some = draws_of(d, 1000, "reach")
    reach = None if some is None else (some - lowest).clamp(min=1e-300).log()
    centre, spread = (math.log(float(d.mean) - lowest), 1.0) if reach is None else _place(reach)
    t = torch.linspace(-6, 6, _NODES, dtype=torch.float64)
    y = centre + spread * torch.sinh(t)
    keep = y.abs() < 690
    x, weight = y[keep].exp(), (spread * torch.cosh(t) * (t[1] - t[0]))[keep]
    inside = lowest + x > lowest  # in float64: values at the end itself have no density
    x, weight = x[inside], weight[inside]
    return _relevant(lowest + x, d.log_prob(lowest + x).exp() * weight * x)


def _sphere(d: Any) -> Table:
    dims = d.event_shape[-1]
    if dims == 2:
        angle = torch.arange(_NODES, dtype=torch.float64) * (2 * math.pi / _NODES)
        x = torch.stack([angle.cos(), angle.sin()], -1)
        weight = torch.full((_NODES,), 2 * math.pi / _NODES, dtype=torch.float64)
    elif dims == 3:
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(128))
        angle = torch.arange(256, dtype=torch.float64) * (2 * math.pi / 256)
        radius = (1 - nodes**2).sqrt()[:, None]
        x = torch.stack([radius * angle.cos(), radius * angle.sin(), nodes[:, None].expand(128, 256)], -1)
        x, weight = x.reshape(-1, 3), (weights[:, None].expand(128, 256) * (2 * math.pi / 256)).reshape(-1)
    else:
        raise Inconclusive("unit vectors are integrated in 2 or 3 dimensions only")
    return Table(x, d.log_prob(x).exp() * weight)


def surprise(t: Table, values: Tensor, mean: float, n: int) -> float:
    """An upper bound on P(a mean of n draws of `values` [K] is at least as far out, on either side).

    Chernoff: P(mean >= m) <= exp(-n max_s (s m - log E exp(s g))), for any distribution on the points.
    """
    keep = t.mass > 1e-40
    g, log_mass = values[keep], (t.mass[keep] / t.mass.sum()).log()
    centre = float((log_mass.exp() * g).sum())
    sd = float((log_mass.exp() * (g - centre) ** 2).sum()) ** 0.5
    if abs(mean - centre) <= 1e-9 * max(abs(centre), sd):
        return 1.0
    if sd == 0:  # a point mass, and draws beside it
        return 0.0
    tilt = torch.logspace(-4, 1.5, 45, dtype=torch.float64)[:, None] / sd * math.copysign(1.0, mean - centre)
    exponent = tilt[:, 0] * (mean - centre) - torch.logsumexp(log_mass + tilt * (g - centre), 1)
    return min(1.0, 2 * math.exp(-n * max(0.0, float(exponent.max()))))

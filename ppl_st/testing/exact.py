"""Exact probabilities of many distributions at once on points and weights, and exact bounds for means of draws.

`table` turns a distribution of batch shape [n] into points x_k and masses m_k for each, such that for smooth g

    E g(X) = sum_k m_k g(x_k)

Counts are enumerated until less than about 1e-15 is left. Densities on the real line are integrated by the
trapezoidal rule in t, x = centre + spread * sinh(t), which is exponentially accurate for smooth densities and
reaches heavy tails; positive ones (or those above another bound) in the logarithm of the distance to it. Unit
vectors of 2 or 3 dimensions are integrated around the distribution's own mean direction, by the tanh-sinh rule in
the angle to it, which also integrates a cusp or a peak at that direction or opposite to it.

`surprise` bounds, without any normal approximation, how probable so extreme a mean of n draws is (Chernoff).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppl_st.inference.randomness import rng_scope

LARGEST_COUNT = 1 << 17  # distributions with mass beyond are not summed
NODES = 2001
FINE_NODES = 8001  # where the table meets something narrower than the density itself
_ENTRIES = 1 << 19  # of one table [K, n]
_ROWS = 256  # of one table


class Inconclusive(Exception):
    """Nothing in this example can decide the law (sums too long, say); it counts neither way."""


class Table(NamedTuple):
    """Points and their masses, one column per distribution."""

    points: Tensor  # [K, n] float64, ascending along K; [K, n, D] for unit vectors
    mass: Tensor  # [K, n]

    def mean(self, values: Tensor | None = None) -> Tensor:
        """Expectations [n] of values [K, n] (default: the points), relative to the total mass."""
        return (self.mass * (self.points if values is None else values)).sum(0) / self.mass.sum(0)

    def below(self) -> Tensor:
        """P(X <= points) for counts [K, n]."""
        return self.mass.cumsum(0)

    def reaching(self, levels: list[float], below: Tensor) -> Tensor:
        """Index [L, n] of the first point at which `below` reaches each level."""
        wanted = torch.tensor(levels, dtype=torch.float64).expand(below.shape[1], -1).contiguous()
        return torch.searchsorted(below.T.contiguous(), wanted).clamp(max=len(below) - 1).T

    def axes(self) -> Iterator[tuple[int, Tensor]]:
        """The points [K, n], or each of their D coordinates."""
        yield from enumerate(self.points.reshape(*self.mass.shape, -1).unbind(-1))


def tables(
    make: Callable[[list[int]], Any], n: int, support: str, *, checked: bool = True, nodes: int = NODES
) -> Iterator[tuple[list[int], Any, Table]]:
    """(indices, their distribution, its table) for groups of the n rows that ``make(indices)`` makes into one distribution.

    Rows that cannot be summed are in no group: counts that reach too far and, with `checked`, masses that are not finite.
    """
    for group in _groups(make(list(range(n))), n, support, nodes):
        d = make(group)
        t, decided = table(d, support, nodes)
        if checked:
            decided &= t.mass.isfinite().all(0)
        if not decided.all():
            group, t = [i for i, good in zip(group, decided.tolist(), strict=True) if good], Table(*(a[:, decided] for a in t))
            if group:
                d = make(group)
        if group:
            yield group, d, t


def _groups(d: Any, n: int, support: str, nodes: int) -> Iterator[list[int]]:
    """Indices in portions that fit one table each; counts sorted by how far they reach, the too far ones left out."""
    order, size = list(range(n)), torch.full((n,), float(nodes))
    if support == "count":
        reach = _reach(d)
        order = [i for i in reach.argsort().tolist() if reach[i] < LARGEST_COUNT / 4]
        size = 32 * reach.clamp(min=4)  # tails of dispersed counts are far longer than 64 draws show
    while order:
        rows = max(1, min(_ROWS, int(_ENTRIES / float(size[order[: _ROWS]].max()))))
        yield order[:rows]
        order = order[rows:]


def table(d: Any, support: str, nodes: int = NODES) -> tuple[Table, Tensor]:
    """Points and masses of `d` (float64, batch shape [n]), and whether each could be enumerated to its end [n]."""
    with torch.no_grad():
        if support == "count":
            return _count(d)
        t = _sphere(d) if support == "sphere" else {"real": _real, "positive": _positive}[support](d, nodes)
        return t, torch.ones(t.mass.shape[1], dtype=torch.bool)


def draws_of(d: Any, n: int, *names: str | int) -> Tensor | None:
    """n draws, the same ones every time for the same names; None where the distribution cannot draw."""
    with rng_scope(0, *names):
        try:
            return d.sample(torch.Size((n,)))
        except NotImplementedError:
            return None


def _reach(d: Any) -> Tensor:
    some = draws_of(d, 64, "reach")
    return (d.mean if some is None else some.amax(0)).double()


def _possible(d: Any, x: Tensor) -> Tensor:
    """Which points the distribution itself calls possible (all, where it does not say)."""
    try:
        return d.support.check(x)
    except (NotImplementedError, AttributeError):
        return torch.ones_like(x, dtype=torch.bool)


def _count(d: Any) -> tuple[Table, Tensor]:
    n, reach = d.batch_shape[0], _reach(d)
    stand_in = draws_of(d, 1, "stand-in")  # something possible, to be scored instead of what is not
    stand_in = d.mean.floor()[None] if stand_in is None else stand_in
    points, masses, start, size = [], [], 0, 64
    done = torch.zeros(n, dtype=torch.bool)
    while start < LARGEST_COUNT and not done.all():
        x = torch.arange(start, start + size, dtype=torch.float64)[:, None].expand(size, n)
        possible = _possible(d, x)
        p = d.log_prob(torch.where(possible, x, stand_in)).exp() * possible
        points.append(x)
        masses.append(p)
        start, size = start + size, max(64, (start + size) // 2)
        last = p.sum(0)
        done |= (start > reach) & ~(last > 1e-15)
    return Table(torch.cat(points), torch.cat(masses)), done | ~(last > 1e-12)


def _place(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median and half the central 68 % range of draws [S, n]."""
    low, middle, high = torch.quantile(values.double(), values.new_tensor([0.16, 0.5, 0.84]).double(), dim=0)
    return middle, torch.maximum((high - low) / 2, 1e-12 * middle.abs().clamp(min=1))


def _relevant(x: Tensor, mass: Tensor) -> Table:
    """Nodes of no mass, whose squares might overflow, are moved to the next ones that have some; masses that are not finite stay."""
    light = mass.abs() < 1e-60
    low, high = x.masked_fill(light, math.inf).amin(0), x.masked_fill(light, -math.inf).amax(0)
    return Table(torch.minimum(torch.maximum(x, low), high), mass.masked_fill(light, 0.0))


def _real(d: Any, nodes: int) -> Table:
    some = draws_of(d, 200, "reach")
    centre, spread = (d.mean, d.stddev) if some is None else _place(some)
    t = torch.linspace(-20, 20, nodes, dtype=torch.float64)[:, None]
    x = centre + spread * torch.sinh(t)
    return _relevant(x, d.log_prob(x).exp() * (spread * torch.cosh(t) * (t[1] - t[0])))


def _positive(d: Any, nodes: int) -> Table:
    lowest = torch.as_tensor(getattr(d.support, "lower_bound", 0.0), dtype=torch.float64)
    some = draws_of(d, 200, "reach")
    if some is None:
        centre, spread = (d.mean - lowest).log(), torch.ones_like(d.mean)
    else:
        centre, spread = _place((some - lowest).clamp(min=1e-300).log())
    t = torch.linspace(-5, 5, nodes, dtype=torch.float64)[:, None]
    y = centre + spread * torch.sinh(t)
    inside = (y.abs() < 690) & (lowest + y.exp() > lowest)  # in float64: values at the end itself have no density
    x = torch.where(inside, y, centre).exp()
    mass = d.log_prob(lowest + x).exp() * (spread * torch.cosh(t) * (t[1] - t[0])) * x
    return _relevant(lowest + y.clamp(-690, 690).exp(), torch.where(inside, mass, 0.0))


def _sphere(d: Any) -> Table:
    n, dims = d.batch_shape[0], d.event_shape[-1]
    if dims not in (2, 3):
        raise Inconclusive("unit vectors are integrated in 2 or 3 dimensions only")
    # theta = pi w(t), w = 1 / (1 + exp(-pi sinh t)) (tanh-sinh): sin(theta) from the nearer end, so that nothing cancels.
    t = torch.linspace(-4, 4, 201, dtype=torch.float64)
    inner = math.pi * torch.sinh(t)
    theta, rest = math.pi * torch.sigmoid(inner), math.pi * torch.sigmoid(-inner)
    step = math.pi * torch.sigmoid(inner) * torch.sigmoid(-inner) * math.pi * torch.cosh(t) * (t[1] - t[0])
    cos, sin = theta.cos(), torch.sin(torch.minimum(theta, rest))
    around = 2 if dims == 2 else 48
    angle = torch.arange(around, dtype=torch.float64) * (2 * math.pi / around)
    weight = (step if dims == 2 else step * sin * (2 * math.pi / around))[:, None].expand(-1, around).reshape(-1)
    frame = _frame(d, n, dims)  # [n, dims, dims], rows: the pole and the directions across
    across = torch.stack([angle.cos(), angle.sin()], -1)[:, : dims - 1]  # [around, dims - 1]
    local = torch.cat([cos[:, None, None].expand(-1, around, 1), sin[:, None, None] * across], -1).reshape(-1, dims)
    x = torch.einsum("kd,nde->kne", local, frame)
    return Table(x, d.log_prob(x).exp() * weight[:, None])


def _frame(d: Any, n: int, dims: int) -> Tensor:
    """Orthonormal vectors [n, dims, dims], the first along the mean (any, where there is none)."""
    try:
        pole = d.mean.double()
    except NotImplementedError:
        some = draws_of(d, 200, "reach")
        pole = torch.zeros(n, dims, dtype=torch.float64) if some is None else some.double().mean(0)
    usable = pole.isfinite().all(-1, keepdim=True) & (pole.norm(dim=-1, keepdim=True) > 1e-12)
    pole = torch.where(usable, pole, torch.eye(dims, dtype=torch.float64)[0])
    pole = pole / pole.norm(dim=-1, keepdim=True)
    least = torch.eye(dims, dtype=torch.float64)[pole.abs().argmin(-1)]
    second = least - (least * pole).sum(-1, keepdim=True) * pole
    second = second / second.norm(dim=-1, keepdim=True)
    axes = [pole, second] if dims == 2 else [pole, second, torch.linalg.cross(pole, second)]
    return torch.stack(axes, 1)


def surprise(points: Tensor, mass: Tensor, mean: float, n: int) -> float:
    """An upper bound on P(a mean of n draws of `points` [K] with masses [K] is at least as far out, on either side).

    Chernoff: P(mean >= m) <= exp(-n max_s (s m - log E exp(s g))), for any distribution on the points.
    """
    keep = mass > 1e-40
    g, log_mass = points[keep], (mass[keep] / mass.sum()).log()
    centre = float((log_mass.exp() * g).sum())
    sd = float((log_mass.exp() * (g - centre) ** 2).sum()) ** 0.5
    if abs(mean - centre) <= 1e-9 * max(abs(centre), sd):
        return 1.0
    if sd == 0:  # a point mass, and draws beside it
        return 0.0
    tilt = torch.logspace(-4, 1.5, 45, dtype=torch.float64)[:, None] / sd * math.copysign(1.0, mean - centre)
    exponent = tilt[:, 0] * (mean - centre) - torch.logsumexp(log_mass + tilt * (g - centre), 1)
    return min(1.0, 2 * math.exp(-n * max(0.0, float(exponent.max()))))

"""Spatial fields: Gaussians on lattices, a section's own or shared with the section that it is tied to (`ppl_st.models.xfuse.serial`)."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LENGTHS", "Lattice", "Tie", "field_of", "lattices_over", "points_of", "spatial_field"]

FINE = 4  # points per spacing of a lattice on which a spatial field is smoothed, linear in between
LENGTHS = (1.0, 2.5)  # of a spatial field, over the shortest: its kernel is the mean of as many squared exponentials


class Lattice(NamedTuple):
    """Where a part of a section's spatial field has its weights: h x w points, ``step`` pixels apart, from (x, y); the kernel's sd is one step."""

    x: float
    y: float
    step: float
    h: int
    w: int

    @property
    def points(self) -> int:
        """Number of weights per field."""
        return self.h * self.w


class Tie(NamedTuple):
    """How a section hangs on another: ``share`` of the other's field in its own, which is the correlation of the two at one place of the tissue.

    Pixels (x, y) of it lie at (a x + b y + c, d x + e y + f) of the other, ``section`` by its number; ``frame`` is (a, b, c, d, e, f).
    """

    section: int
    share: float
    frame: tuple[float, float, float, float, float, float]

    def share_at(self, there: Tensor, lattices: Sequence[Lattice]) -> Tensor:
        """The share at positions [..., 2] of the other section with these lattices: less, and soon 0, beyond where that has a field."""
        lattice = lattices[0]
        low = torch.tensor([lattice.x, lattice.y]) + lattice.step
        high = low + torch.tensor([lattice.w - 3, lattice.h - 3]) * lattice.step
        out = torch.maximum(low - there, there - high).clamp_min(0.0) / lattice.step
        return self.share * torch.exp(-0.5 * out.square().sum(-1))

    def shifted(self, by: float) -> "Tie":
        """With the logit of the share larger by so much."""
        return self._replace(share=1 / (1 + (1 / self.share - 1) * math.exp(-by)))

    def moved(self, where: Tensor) -> Tensor:
        """Positions [..., 2] of the section as such of the other."""
        a, b, c, d, e, f = self.frame
        x, y = where.unbind(-1)
        return torch.stack([a * x + b * y + c, d * x + e * y + f], -1)


def lattices_over(low: Sequence[float], high: Sequence[float], step: float) -> list[Lattice]:
    """The lattices from ``low`` to ``high`` (x, y), the finest with this step: one point beyond each border."""
    (left, top), (width, height) = low, (end - start for start, end in zip(low, high, strict=True))
    steps = [float(step * length) for length in LENGTHS]  # no numpy scalar: it would make tensors float64, and no JSON
    return [Lattice(left - one, top - one, one, *(math.ceil(side / one) + 3 for side in (height, width))) for one in steps]


def points_of(lattices: Sequence[Lattice]) -> int:
    """Number of weights per field of a section."""
    return sum(lattice.points for lattice in lattices)


def spatial_field(lattices: Sequence[Lattice], weights: Tensor, where: Tensor) -> Tensor:
    """Fields sum_k w_k N(d_k) of unit prior variance, equal shares by lattice, at positions: weights [points, O], where [P, P', 2] -> [O, P, P'].

    A kernel is Gaussian with an sd of one lattice step, so that the covariance is squared exponential with a length of sqrt(2) steps. It is
    formed on a lattice `FINE` times as fine, along one axis after the other, and linear in between.
    """
    field = torch.zeros(())
    for lattice, own in zip(lattices, weights.split([lattice.points for lattice in lattices]), strict=True):
        values = own.T.unflatten(1, (lattice.h, lattice.w))  # [O, h, w]
        for axis, points in ((-2, lattice.h), (-1, lattice.w)):
            fine = torch.arange((points - 1) * FINE + 1) / FINE
            kernel = torch.exp(-0.5 * (fine[:, None] - torch.arange(points)) ** 2) / math.pi**0.25
            values = kernel @ values if axis == -2 else values @ kernel.T
        offset = torch.tensor([lattice.x, lattice.y])
        span = torch.tensor([lattice.w - 1, lattice.h - 1]) * lattice.step
        grid = 2 * (where - offset) / span - 1
        field = field + F.grid_sample(values[None], grid[None], padding_mode="border", align_corners=True)[0]
    return field / math.sqrt(len(lattices))


def field_of(
    n: int, lattices: Sequence[Sequence[Lattice]], ties: Sequence[Tie | None], weights: Mapping[int, Tensor], where: Tensor
) -> Tensor:
    """Spatial field [O, P, P'] of section n, with its tie: weights [points, O] of it and of the section that it hangs on, where [P, P', 2]."""
    tie, own = ties[n], spatial_field(lattices[n], weights[n], where)
    if tie is None:
        return own
    there = tie.moved(where)
    share = tie.share_at(there, lattices[tie.section])
    return share * spatial_field(lattices[tie.section], weights[tie.section], there) + (1 - share.square()).sqrt() * own

r"""Observation model of directions: the power spherical distribution on the unit sphere in d dimensions.

    p(x) = ((1 + m.x) / 2)^kappa / Z,   log Z = b log(4 pi) + log G(a) - log G(a + b),   b = (d - 1) / 2,  a = b + kappa

by surface measure, x and m unit vectors, kappa >= 0 (0 is uniform). E[m.x] = kappa / (kappa + d - 1). The
difference of log Gammas is taken by Stirling's series after a shift, as in `ppl_st.likelihood_math`: no branch
and no cancellation for d from 2 to 1e6 and beyond and kappa from 0 to 1e12. Source: De Cao and Aziz (2020), the
power spherical distribution; the formula there has (1 + m.x)^kappa and so a further 2^kappa in Z.

The cosine loss. A published loss weight * (1 - cos(x, y)) is, with its weight fixed, minus the log density of a
von Mises-Fisher distribution with mean direction y and concentration `weight`, up to a constant that depends on
weight and d only. It is therefore the named factor ``pyro.factor("cosine", weight * (cosine(x, y) - 1))`` and no
distribution of its own: as soon as the weight is learnt the constant matters, and `PowerSpherical` has it. Near
alignment kappa log((1 + c) / 2) = -kappa / 2 (1 - c) + ..., so a power spherical with concentration 2 * weight
is the proper likelihood closest to that loss.

Vectors are normalised here, with lengths floored at `NORM_FLOOR`: any vector counts as its direction, a zero
vector as orthogonal to everything. Cosines and densities are float64 and cast back.

Not here: von Mises-Fisher (no closed normaliser), second derivatives by the concentration, a cdf.
"""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import constraints

from ppl_st.errors import UserError
from ppl_st.likelihood_math import Elementwise, log_gamma_ratio, result_dtype
from ppl_st.likelihoods import _Observation, _tensors, check_parameters, check_shape

NORM_FLOOR = 1e-12
_FARTHEST = 2.0**-53 - 1  # (cosine - 1) / 2 no closer to -1 than float64 resolves: finite at the antipode


def cosine(value: Tensor, direction: Tensor) -> Tensor:
    """Cosine of the angle between vectors along the last dimension, float64; lengths floored at `NORM_FLOOR`."""
    x, m = value.double(), direction.double()
    lengths = [torch.linalg.vector_norm(a, dim=-1).clamp(min=NORM_FLOOR) for a in (x, m)]
    return (x * m).sum(-1) / (lengths[0] * lengths[1])


def _normalizer_terms(wants: Sequence[bool], b: Tensor, kappa: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Minus log Z and its derivative by kappa."""
    ratio, slopes = log_gamma_ratio(wants, b, b + kappa)
    return ratio - b * math.log(4 * math.pi), slopes


class PowerSpherical(_Observation):
    """Unit vectors around a mean direction, with density proportional to (1 + cosine)^concentration.

    Parameters
    ----------
    direction
        Mean direction, [..., d] with d >= 2; any non-zero vector, normalised here.
    concentration
        kappa >= 0, of shape [...]; 0 is the uniform distribution.

    Batch shape is the common shape of ``direction[..., 0]`` and ``concentration``, event shape is [d]. Values are
    normalised before they are scored. Results have the parameters' dtype; arithmetic is float64. Draws are
    differentiable by both parameters.
    """

    arg_constraints = {"direction": constraints.real_vector, "concentration": constraints.nonnegative}  # noqa: RUF012
    support = pyro_constraints.sphere
    has_rsample = True

    def __init__(self, direction: Tensor, concentration: Tensor | float, *, validate_args: bool | None = None) -> None:
        direction, kappa = _tensors(direction, concentration)
        if direction.dim() < 1 or direction.shape[-1] < 2:
            raise UserError(
                f"PowerSpherical: direction must have at least two coordinates in its last dimension; its shape is "
                f"{tuple(direction.shape)}."
            )
        self._given = {"direction": direction, "concentration": kappa}
        batch = torch.broadcast_shapes(direction.shape[:-1], kappa.shape)
        super(_Observation, self).__init__(batch, direction.shape[-1:], validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            domain = {"direction": constraints.real, "concentration": constraints.nonnegative}
            check_parameters(self._given, domain, "PowerSpherical")

    @property
    def direction(self) -> Tensor:
        """Mean direction as a unit vector, [..., d] in the shape in which it was given."""
        given = self._given["direction"]
        length = torch.linalg.vector_norm(given, dim=-1, keepdim=True, dtype=torch.float64)
        return (given / length.clamp(min=NORM_FLOOR)).to(given.dtype)

    @property
    def concentration(self) -> Tensor:
        """kappa in the shape in which it was given."""
        return self._given["concentration"]

    @property
    def resultant_length(self) -> Tensor:
        """Length of the mean vector, E[cosine] = kappa / (kappa + d - 1)."""
        return (self.concentration / (self.concentration + (self.event_shape[0] - 1))).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """The mean vector, resultant length times mean direction, [..., d]; shorter than 1."""
        return self.resultant_length.unsqueeze(-1) * self.direction

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, [..., d]."""
        b = (self.event_shape[0] - 1) / 2
        a = self.concentration + b
        across = 2 * a / ((a + b) * (a + b + 1))  # E[1 - cosine^2] / (d - 1)
        along = across * (2 * b / (a + b))  # variance of the cosine
        squares = self.direction.square()
        out = along.unsqueeze(-1) * squares + across.unsqueeze(-1) * (1 - squares)
        return out.expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density by surface measure, shape sample + batch; `value` is [..., d]."""
        d = self.event_shape[0]
        if value.dim() < 1 or value.shape[-1] != d:
            raise UserError(f"PowerSpherical: a value of shape {tuple(value.shape)} has not {d} coordinates.")
        check_shape(value[..., 0], self.batch_shape, "PowerSpherical")
        if self._validate_args and not torch.isfinite(value).all():
            raise UserError("PowerSpherical: a value has coordinates that are not finite.")
        given, kappa = self._given["direction"], self.concentration.double()
        half = ((cosine(value, given) - 1) / 2).clamp(_FARTHEST, 0.0)
        b = torch.as_tensor((d - 1) / 2, dtype=torch.float64, device=kappa.device)
        constant = Elementwise.apply(_normalizer_terms, torch.is_grad_enabled(), b, kappa)
        out = kappa * torch.log1p(half) + constant
        return self._whole(out.to(result_dtype(given, self.concentration)), value[..., 0])

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable draws, [..., d]: the cosine by a Beta variable, the rest uniform around the direction.

        The Beta variable (1 + cosine) / 2 is a share of two Gamma variables, from which the sine follows without
        cancellation; a Householder reflection then takes -+e_1 to the direction, the sign such that the mirror's
        normal never vanishes.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        m = self.direction
        b = torch.full(shape, (self.event_shape[0] - 1) / 2, dtype=torch.float64, device=m.device)
        near, far = (torch._standard_gamma(p) for p in (self.concentration.double() + b, b))
        total = near + far
        across = torch.randn((*shape, self.event_shape[0] - 1), dtype=m.dtype, device=m.device)
        length = torch.linalg.vector_norm(across, dim=-1, keepdim=True, dtype=torch.float64)
        sine = (2 * (near * far).sqrt() / total).unsqueeze(-1)
        sign = torch.where(m[..., :1] < 0, -1.0, 1.0).to(m.dtype)
        along = -sign * ((near - far) / total).unsqueeze(-1)
        y = torch.cat([along.to(m.dtype), (sine / length).to(m.dtype) * across], -1)
        normal = torch.cat([m[..., :1] + sign, m[..., 1:]], -1)
        scale = 2 * (normal * y).sum(-1, keepdim=True) / normal.square().sum(-1, keepdim=True)
        return (y - scale * normal).to(result_dtype(*self._given.values()))

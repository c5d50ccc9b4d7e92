r"""Observation models: Poisson, negative binomial and Gaussian as Pyro distributions, safe in float32.

One convention everywhere: ``theta`` is the inverse dispersion, ``Var = mu + mu^2 / theta``::

    Poisson            log p(x) = x log mu - mu - log x!
    NegativeBinomial   log p(x) = log G(x + theta) - log G(theta) - log x!
                                  - theta log(1 + mu / theta) + x log(mu / (mu + theta))
    Gaussian           log p(x) = -(x - loc)^2 / (2 scale^2) - log scale - log(2 pi) / 2

Counts are scored in float64 and cast back, because the terms of a negative binomial cancel: in float32 the
textbook form is wrong by nats for large theta (`ppl_st.likelihood_math` has the formulas that do not cancel,
and the speed).

Domain. ``log_mean`` is clamped to [-28, 20] and ``log_theta`` to [-18.5, 18.5]; outside the likelihood is
constant and its gradient exactly zero. A ``mean`` enters the logarithm as max(mean, 1e-13) and everything
else as it is, so mean = 0 is allowed, finite and differentiable (at x > 0 the floored logarithm has slope
zero). Nothing is ever added inside a logarithm.

State. No attribute is computed lazily: reading moments, drawing or expanding never changes a later log_prob.

Not here: rates of product form over sparse counts (`ppl_st.product`), second derivatives, gradients with
respect to the data.
"""

import math
from collections.abc import Sequence
from typing import Any

import scipy.special
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_st.errors import UserError
from ppl_st.likelihood_math import (
    LOG_MEAN_RANGE,
    LOG_THETA_RANGE,
    MEAN_FLOOR,
    THETA_RANGE,
    Elementwise,
    common_shape,
    nb_terms,
    poisson_terms,
    result_dtype,
)
from ppl_st.sampling import negative_binomial, poisson


def check_shape(value: Tensor, shape: torch.Size, name: str) -> None:
    """Refuse a value that would enlarge the distribution's shape: (5, 1) against (5,) is not 25 terms."""
    n = len(shape)
    if value.dim() > n:  # leading sample dimensions: the rest must be the distribution's own shape
        fits = value.shape[value.dim() - n :] == shape
    else:
        fits = all(a in (1, b) for a, b in zip(value.shape[::-1], shape[::-1], strict=False))
    if not fits:
        raise UserError(
            f"{name}: a value of shape {tuple(value.shape)} does not fit a distribution of shape "
            f"{tuple(shape)}; broadcasting would score entries that do not exist. Give the value that shape "
            "(leading sample dimensions are allowed)."
        )


def check_counts(value: Tensor, name: str) -> None:
    """Refuse values that are not whole numbers >= 0."""
    good = (value >= 0) & (value == value.floor())
    if not good.all():
        bad = value[~good]
        some = ", ".join(f"{v:g}" for v in bad[:3].tolist())
        raise UserError(
            f"{name}: counts must be whole numbers >= 0; {len(bad)} of {value.numel()} values are not, "
            f"e.g. {some}. Give raw counts, or choose a Gaussian likelihood for transformed data."
        )


def check_parameters(given: dict[str, Tensor], allowed: dict[str, constraints.Constraint], name: str) -> None:
    """Refuse parameters outside their domain."""
    for key, parameter in given.items():
        flat = parameter.detach().reshape(-1)
        bad = flat[~allowed[key].check(flat)]
        if len(bad):
            some = ", ".join(f"{v:g}" for v in bad[:3].tolist())
            raise UserError(
                f"{name}: {key} must be {allowed[key]}; {len(bad)} of {len(flat)} values are not, "
                f"e.g. {some}."
            )


def _one_of(kind: str, **given: Tensor | float | None) -> tuple[str, Tensor | float]:
    """The single parameter that was given."""
    present = [(name, value) for name, value in given.items() if value is not None]
    if len(present) != 1:
        raise UserError(f"{kind}: give exactly one of {' and '.join(given)} (got {len(present)}).")
    return present[0]


def _tensors(*values: Tensor | float) -> list[Tensor]:
    """Numbers and tensors of integers become tensors of the dtype of the floats beside them (else torch's default), on the device of the tensors."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    device = tensors[0].device if tensors else None
    dtype = next((v.dtype for v in tensors if v.is_floating_point()), torch.get_default_dtype())
    return [v if isinstance(v, Tensor) and v.is_floating_point() else torch.as_tensor(v, dtype=dtype, device=device) for v in values]


LARGEST_COUNT = 1e18  # of draws and quantiles


class _Observation(TorchDistribution):
    """What the three share: shapes that broadcast without copies, and one check of the value's shape."""

    def _start(self, given: dict[str, Tensor], validate_args: bool | None) -> None:
        self._given = given
        shape = common_shape(*(p.shape for p in given.values()))
        super().__init__(shape, torch.Size(), validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:  # what was given, as it was given: torch would check the clamped properties
            check_parameters(given, self.arg_constraints, type(self).__name__)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """The same parameters under a larger batch shape; nothing is copied: per-gene terms stay per gene."""
        shape = torch.Size(batch_shape)
        own = self.batch_shape
        if len(own) > len(shape) or any(
            a not in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False)
        ):
            raise UserError(
                f"{type(self).__name__}: shape {tuple(self.batch_shape)} cannot expand to {tuple(shape)}."
            )
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = shape
        return new

    def _check(self, value: Tensor) -> None:
        check_shape(value, self.batch_shape, type(self).__name__)
        if self._validate_args and self.support is constraints.nonnegative_integer:
            check_counts(value, type(self).__name__)
        elif self._validate_args:
            self._validate_sample(value)

    def _whole(self, result: Tensor, value: Tensor) -> Tensor:
        return result.expand(common_shape(result.shape, value.shape, self.batch_shape))


def count_quantile(d: Any, q: Tensor) -> Tensor:
    """The smallest count k with P(X <= k) >= q, by doubling and bisection of `d.cdf`; q in [0, 1), fits the batch shape.

    Above 2^53 float64 does not hold every count: there it is the nearest that it holds.
    """
    check_shape(q, d.batch_shape, f"{type(d).__name__}.icdf")
    shape = common_shape(q.shape, d.batch_shape)
    low, high = torch.full(shape, -1.0, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    share = q.detach().cpu().expand(shape)
    while bool((short := (d.cdf(high).cpu() < share) & (high < LARGEST_COUNT)).any()):
        low, high = torch.where(short, high, low), torch.where(short, 2 * high + 1, high)
    middle = ((low + high) / 2).floor()
    while bool((between := (low < middle) & (middle < high)).any()):  # else they are neighbouring counts, or neighbouring numbers
        enough = d.cdf(middle).cpu() >= share
        low, high = torch.where(between & ~enough, middle, low), torch.where(between & enough, middle, high)
        middle = ((low + high) / 2).floor()
    mean = d.mean
    return high.to(device=mean.device, dtype=mean.dtype)


class Poisson(_Observation):
    """Poisson counts with the given mean.

    Parameters
    ----------
    mean, log_mean
        Exactly one; any shape (= batch shape). ``mean`` >= 0; ``log_mean`` is clamped to `LOG_MEAN_RANGE`.

    Values are counts as integer-valued floats (or integers). Results have the dtype of the parameter;
    arithmetic is float64 at counts above zero.
    """

    arg_constraints = {"mean": constraints.nonnegative, "log_mean": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mean: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        name, value = _one_of("Poisson", mean=mean, log_mean=log_mean)
        (tensor,) = _tensors(value)
        self._start({name: tensor}, validate_args)

    @property
    def mean(self) -> Tensor:
        return _mean(self._given).expand(self.batch_shape)

    @property
    def log_mean(self) -> Tensor:
        return _log_mean(self._given).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return self.mean

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), shape sample + batch."""
        self._check(value)
        is_log, m = _mean_parameter(self._given)
        return self._whole(Elementwise.apply(poisson_terms(is_log), torch.is_grad_enabled(), value, m), value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts as floats, from torch's global generator like every Pyro distribution."""
        mean = _mean(self._given).detach()
        shape = torch.Size(sample_shape) + self.batch_shape
        return poisson(mean.double().expand(shape)).to(mean.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value) by the incomplete Gamma function, by scipy on the CPU in float64; no gradient."""
        check_shape(value, self.batch_shape, "Poisson.cdf")
        mean = _mean(self._given).detach()
        k, mu = (a.detach().cpu().double() for a in torch.broadcast_tensors(value, mean))
        k = k.floor()
        below = scipy.special.gammaincc(k.clamp(min=0).numpy() + 1, mu.numpy())
        out = torch.where(k < 0, 0.0, torch.as_tensor(below))
        return self._whole(out.to(device=mean.device, dtype=mean.dtype), value)

    def icdf(self, q: Tensor) -> Tensor:
        """The smallest count k with P(X <= k) >= q; q in [0, 1)."""
        return count_quantile(self, q)


class NegativeBinomial(_Observation):
    """Counts with the given mean and inverse dispersion: Var = mean + mean^2 / theta.

    Parameters
    ----------
    mean, log_mean
        Exactly one. ``mean`` >= 0; ``log_mean`` is clamped to `LOG_MEAN_RANGE`.
    theta, log_theta
        Exactly one; typically per gene, shape [G] against means [n, G], and never expanded over cells.
        ``theta`` > 0 (used within `THETA_RANGE`); ``log_theta`` is clamped to `LOG_THETA_RANGE`.

    Values are counts as integer-valued floats (or integers). Results have the parameters' dtype; arithmetic
    is float64.
    """

    arg_constraints = {  # noqa: RUF012
        "mean": constraints.nonnegative,
        "log_mean": constraints.real,
        "theta": constraints.positive,
        "log_theta": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mean: Tensor | float | None = None,
        theta: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | None = None,
        log_theta: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        mean_name, m = _one_of("NegativeBinomial", mean=mean, log_mean=log_mean)
        theta_name, t = _one_of("NegativeBinomial", theta=theta, log_theta=log_theta)
        m, t = _tensors(m, t)
        self._start({mean_name: m, theta_name: t}, validate_args)

    @property
    def mean(self) -> Tensor:
        return _mean(self._given).expand(self.batch_shape)

    @property
    def log_mean(self) -> Tensor:
        return _log_mean(self._given).expand(self.batch_shape)

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion in the shape in which it was given."""
        given = self._given
        return (
            given["theta"].clamp(*THETA_RANGE)
            if "theta" in given
            else given["log_theta"].clamp(*LOG_THETA_RANGE).exp()
        )

    @property
    def log_theta(self) -> Tensor:
        """Its logarithm."""
        given = self._given
        return given["log_theta"].clamp(*LOG_THETA_RANGE) if "log_theta" in given else self.theta.log()

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return mean * (1 + mean / self.theta)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), shape sample + batch."""
        self._check(value)
        mean_log, m = _mean_parameter(self._given)
        theta_log = "log_theta" in self._given
        t = (
            self._given["log_theta"].clamp(*LOG_THETA_RANGE)
            if theta_log
            else self._given["theta"].clamp(*THETA_RANGE)
        )
        return self._whole(
            Elementwise.apply(nb_terms(mean_log, theta_log), torch.is_grad_enabled(), value, m, t), value
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Counts as floats, drawn in float64 so that no theta under- or overflows."""
        mean, theta = _mean(self._given).detach(), self.theta.detach()
        shape = torch.Size(sample_shape) + self.batch_shape
        wide = theta.double().expand(shape)
        return negative_binomial(wide, mean.double() / wide).to(result_dtype(mean, theta))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value) = 1 - I_q(value + 1, theta), q = mean / (mean + theta); by scipy, float64, no
        gradient."""
        check_shape(value, self.batch_shape, "NegativeBinomial.cdf")
        mean, theta = _mean(self._given).detach(), self.theta.detach()
        k, mu, size = (a.detach().cpu().double() for a in torch.broadcast_tensors(value, mean, theta))
        k = k.floor()
        below = scipy.special.betaincc(k.clamp(min=0).numpy() + 1, size.numpy(), (mu / (mu + size)).numpy())
        out = torch.where(k < 0, 0.0, torch.as_tensor(below))
        return self._whole(out.to(device=mean.device, dtype=result_dtype(mean, theta)), value)

    def icdf(self, q: Tensor) -> Tensor:
        """The smallest count k with P(X <= k) >= q; q in [0, 1)."""
        return count_quantile(self, q)


class Gaussian(_Observation):
    """Normal observations; `scale` (a standard deviation) is typically per gene, never expanded over
    cells."""

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = _tensors(loc, scale)
        self._start({"loc": self.loc, "scale": self.scale}, validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        return (self.scale * self.scale).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density, shape sample + batch."""
        self._check(value)
        z = (value - self.loc) / self.scale
        return self._whole(-0.5 * z * z - (self.scale.log() + 0.5 * math.log(2 * math.pi)), value)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable draws."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape, dtype=result_dtype(self.loc, self.scale), device=self.loc.device)
        return self.loc + self.scale * noise

    def icdf(self, q: Tensor) -> Tensor:
        """The value below which the share q lies."""
        check_shape(q, self.batch_shape, "Gaussian.icdf")
        return self._whole(self.loc + self.scale * torch.special.ndtri(q), q)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value)."""
        check_shape(value, self.batch_shape, "Gaussian.cdf")
        below = 0.5 * torch.special.erfc((self.loc - value) / (self.scale * 2**0.5))  # torch's ndtr is 0 far down
        return self._whole(below, value)


def _mean_parameter(given: dict[str, Tensor]) -> tuple[bool, Tensor]:
    """(whether it is a logarithm, the parameter as given: `likelihood_math` clamps it)."""
    return ("log_mean" in given, given["log_mean"] if "log_mean" in given else given["mean"])


def _mean(given: dict[str, Tensor]) -> Tensor:
    return given["mean"] if "mean" in given else _log_mean(given).exp()


def _log_mean(given: dict[str, Tensor]) -> Tensor:
    return (
        given["log_mean"].clamp(*LOG_MEAN_RANGE)
        if "log_mean" in given
        else given["mean"].clamp(min=MEAN_FLOOR).log()
    )

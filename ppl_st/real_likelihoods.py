r"""Observation models of real and of log1p-transformed values: Student, and any of them on log1p of the value.

    Student    log p(x) = log G((df + 1) / 2) - log G(df / 2) - log(pi df) / 2 - log scale - (df + 1) / 2 log1p(z^2 / df),  z = (x - loc) / scale
    Log1p      X = expm1(Y) with Y of the given distribution:  log p(x) = log p_Y(log1p x) - log1p x,  x > -1

`Log1p(Gaussian(loc, scale))` is the shifted log-normal, `Log1p(Student(loc, scale, df))` its robust form. They score the value itself, not its
logarithm (the Jacobian is in), so their log_prob can be compared with that of a count model of the same values, up to the step from density to
probability. E X is exp(loc + scale^2 / 2) - 1 for the log-normal and infinite for the Student, whatever its df: there use ``icdf(0.5)``.

The difference of log Gammas is the one of `ppl_st.likelihood_math` (no cancellation for df from 1e-3 to 1e8; the derivative by df loses as many
digits as df has above 1). z is formed in float64 and results are cast back. State and shapes as in `ppl_st.likelihoods`.

Not here: truncation at zero (the mass of X below 0 is that of Y below 0), second derivatives by df.
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
from ppl_st.likelihood_math import Elementwise, log_gamma_ratio, result_dtype
from ppl_st.likelihoods import Gaussian, _Observation, _tensors, check_shape
from ppl_st.sampling import standard_gamma


class Student(_Observation):
    """Student's t: a Gaussian with heavier tails, for values with outliers.

    Parameters
    ----------
    loc, scale
        Centre and width, scale > 0; `scale` is typically per gene, never expanded over cells.
    df
        Degrees of freedom > 0; the Gaussian for df -> infinity. The mean needs df > 1, the variance df > 2; below they are
        NaN and infinite.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive, "df": constraints.positive}  # noqa: RUF012
    support = constraints.real

    def __init__(
        self, loc: Tensor | float, scale: Tensor | float, df: Tensor | float, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale, self.df = _tensors(loc, scale, df)
        self._start({"loc": self.loc, "scale": self.scale, "df": self.df}, validate_args)

    @property
    def mean(self) -> Tensor:
        return torch.where(self.df > 1, self.loc, math.nan).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        finite = self.scale**2 * self.df / (self.df - 2).clamp(min=1e-30)
        return torch.where(self.df > 2, finite, torch.where(self.df > 1, math.inf, math.nan)).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density, shape sample + batch."""
        self._check(value)
        df, scale = self.df.double(), self.scale.double()
        z = (value.double() - self.loc.double()) / scale
        half = torch.full((), 0.5, dtype=torch.float64, device=df.device)
        ratio = Elementwise.apply(log_gamma_ratio, torch.is_grad_enabled(), half, df / 2)
        constant = ratio - 0.5 * torch.log(math.pi * df) - scale.log()
        out = constant - (df + 1) / 2 * torch.log1p(z * z / df)
        return self._whole(out.to(result_dtype(self.loc, self.scale, self.df)), value)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws: a normal over the root of a Gamma, in float64."""
        loc, scale, df = (p.detach().double() for p in (self.loc, self.scale, self.df))
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape, dtype=torch.float64, device=loc.device)
        chi = standard_gamma((df / 2).expand(shape)) / (df / 2)
        draw = loc + scale * noise / chi.clamp(min=1e-300).sqrt()
        return draw.to(result_dtype(self.loc, self.scale, self.df))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), by scipy in float64; no gradient."""
        check_shape(value, self.batch_shape, "Student.cdf")
        z = (value.double() - self.loc.double()) / self.scale.double()
        return self._scipy(scipy.special.stdtr, z, value)

    def icdf(self, q: Tensor) -> Tensor:
        """The value below which the share q lies, by scipy in float64; no gradient."""
        check_shape(q, self.batch_shape, "Student.icdf")
        z = self._scipy(scipy.special.stdtrit, q.double(), q).double()
        return (self.loc.detach().double() + self.scale.detach().double() * z).to(result_dtype(self.loc, self.scale))

    def _scipy(self, function: Any, argument: Tensor, value: Tensor) -> Tensor:
        df, x = (a.detach().cpu().double().numpy() for a in torch.broadcast_tensors(self.df.double(), argument))
        out = torch.as_tensor(function(df, x)).to(device=self.loc.device, dtype=result_dtype(self.loc, self.scale, self.df))
        return self._whole(out, value)


class Log1p(TorchDistribution):
    """Values whose log1p has the distribution `base`: a `Gaussian`, a `Student`, or any distribution of real numbers.

    Values are on the scale of the data, > -1; zeros are allowed.
    """

    arg_constraints = {}  # noqa: RUF012
    support = constraints.greater_than(-1.0)

    def __init__(self, base: Any, *, validate_args: bool | None = None) -> None:
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Log1p":
        """The same under a larger batch shape; parameters are not copied."""
        return Log1p(self.base.expand(torch.Size(batch_shape)), validate_args=self._validate_args)

    @property
    def mean(self) -> Tensor:
        if isinstance(self.base, Gaussian):
            return torch.expm1(self.base.mean + self.base.variance / 2)
        return torch.full(self.batch_shape, math.inf)

    @property
    def variance(self) -> Tensor:
        if isinstance(self.base, Gaussian):
            v = self.base.variance
            return torch.exp(2 * self.base.mean + v) * torch.expm1(v)
        return torch.full(self.batch_shape, math.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density of the value itself, shape sample + batch."""
        if self._validate_args and not bool((value > -1).all()):
            bad = value[~(value > -1)]
            raise UserError(f"Log1p: values must be above -1; {len(bad)} of {value.numel()} are not, e.g. {bad[0]:g}.")
        y = torch.log1p(value)
        return self.base.log_prob(y) - y

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Differentiable draws, where the base has them."""
        return _inside(self.base.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws."""
        return _inside(self.base.sample(torch.Size(sample_shape)))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value)."""
        return self.base.cdf(torch.log1p(value))

    def icdf(self, q: Tensor) -> Tensor:
        """The value below which the share q lies."""
        return torch.expm1(self.base.icdf(q))


def _inside(y: Tensor) -> Tensor:
    """Draws expm1(y) within the open support: the nearest number there, where expm1 rounds to -1 or overflows."""
    limits = torch.finfo(y.dtype)
    return torch.expm1(y).clamp(-1 + limits.eps / 2, limits.max)

r"""Counts with means activity @ loadings, scored without holding the cells x genes matrix of means.

    rate = activity @ loadings,   activity [n, h] >= 0,  loadings [h, G] >= 0,  n cells, h factors, G genes
    ProductPoisson             log p(x_i) = sum_g x_ig log rate_ig - sum_g rate_ig - sum_g log x_ig!
    ProductNegativeBinomial    log p(x_i) = sum_g log NB(x_ig; rate_ig, theta_g),  Var = rate + rate^2 / theta

One event is one cell: batch_shape [n], event_shape [G], so a log_prob has shape [n]. Counts are a dense
tensor [n, G] or a torch sparse CSR tensor of that shape; a minibatch is made by taking rows before conversion
(torch cannot index CSR rows).

Poisson, sparse: the sum of rates is ``activity @ loadings.sum(1)`` and logarithms are needed at the non-zeros
only (`torch.sparse.sampled_addmm`, whose backward is two products with the same sparsity pattern). Where
counts are dense (more than `DENSE_ABOVE` of the entries), or sampled_addmm is missing (a CPU build without
MKL), and for the negative binomial, whose zeros have a ``log1p`` each, blocks of rows are formed, used and
forgotten, once forwards and once backwards. Memory beyond the arguments is proportional to the non-zeros plus
one block. Gradients are exact. Sums over the genes of a cell, and over cells, are float64 (block by block
where dense), because the terms of a gradient cancel near the optimum.

The mean enters logarithms as max(rate, 1e-13) and everything else as it is, as in `ppl_st.likelihoods`: a
cell with zero activity is finite.

Not here: second derivatives, activities with more than two dimensions, gradients with respect to the counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints

from ppl_st.errors import UserError
from ppl_st.likelihood_math import (
    BLOCK,
    LOG_THETA_RANGE,
    MEAN_FLOOR,
    floored_ratio,
    log_factorial,
    nb_hits,
    nb_hits_slope,
    positions,
    zero_slope,
)
from ppl_st.likelihoods import check_counts, check_parameters

DENSE_ABOVE = 0.3


class _Counts:
    """Counts [n, G] in either layout, read by blocks of rows."""

    def __init__(self, value: Tensor) -> None:
        self.shape = value.shape
        self.dense: Tensor | None = None
        if value.layout == torch.sparse_csr:
            self.crow, self.col, self.data = value.crow_indices(), value.col_indices(), value.values()
            self.density = len(self.data) / max(1, value.shape[0] * value.shape[1])
        else:
            self.dense, self.density = value, 1.0

    def blocks(self) -> Iterator[slice]:
        """Slices of rows of about BLOCK entries each."""
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def entries(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Positions in the flattened block, and the counts there, of the non-zeros of these rows."""
        if self.dense is not None:
            flat = self.dense[rows].reshape(-1)
            hit = positions(flat)
            return hit, flat.index_select(0, hit)
        crow = self.crow[rows.start : rows.stop + 1].long()
        low, high = int(crow[0]), int(crow[-1])
        hit = torch.repeat_interleave(
            torch.arange(len(crow) - 1, device=crow.device) * self.shape[1], crow.diff()
        )
        return hit + self.col[low:high], self.data[low:high]

    def block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """These rows as a dense matrix."""
        if self.dense is not None:
            return self.dense[rows].to(dtype)
        hit, x = self.entries(rows)
        out = torch.zeros((rows.stop - rows.start) * self.shape[1], dtype=dtype, device=x.device)
        return out.scatter_(0, hit, x.to(dtype)).view(-1, self.shape[1])


def _row_sums(data: Tensor, crow: Tensor) -> Tensor:
    """Float64 sums of CSR data over each row (empty rows included)."""
    return torch.segment_reduce(data.double(), "sum", offsets=crow.long())


def _times(counts: _Counts, data: Tensor, dense: Tensor, transpose: bool) -> Tensor:
    """CSR (or its transpose) times a dense matrix; by scipy on the CPU: torch is 15 times slower
    transposed."""
    n, genes = counts.shape
    if data.device.type == "cpu":
        arrays = (data.numpy(), counts.col.numpy(), counts.crow.numpy())
        host = scipy.sparse.csr_matrix(arrays, shape=(n, genes), copy=False)
        return torch.from_numpy(np.asarray((host.T if transpose else host) @ dense.detach().numpy()))
    matrix = torch.sparse_csr_tensor(counts.crow, counts.col, data, (n, genes), check_invariants=False)
    return (matrix.t() if transpose else matrix) @ dense


def _pattern_rates(counts: _Counts, activity: Tensor, loadings: Tensor) -> Tensor:
    """activity @ loadings at the stored entries of the counts, in their order."""
    zeros = torch.zeros_like(counts.data, dtype=activity.dtype)
    pattern = torch.sparse_csr_tensor(
        counts.crow, counts.col, zeros, tuple(counts.shape), check_invariants=False
    )
    return torch.sparse.sampled_addmm(
        pattern, activity.contiguous(), loadings.contiguous(), beta=0.0
    ).values()


class _PoissonSparse(torch.autograd.Function):
    """log p of each row of CSR counts, float64 [n]."""

    @staticmethod
    def forward(ctx: Any, counts: _Counts, activity: Tensor, loadings: Tensor) -> Tensor:
        rate = _pattern_rates(counts, activity, loadings)
        x = counts.data.to(rate.dtype)
        terms = x * rate.clamp(min=MEAN_FLOOR).log() - log_factorial(x.double())
        ctx.counts = counts
        ctx.save_for_backward(activity, loadings, floored_ratio(x, rate))
        return _row_sums(terms, counts.crow) - activity.double() @ loadings.sum(1, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activity, loadings, ratio = ctx.saved_tensors
        counts: _Counts = ctx.counts
        weights = grad.unsqueeze(-1)
        by_activity = by_loadings = None
        if ctx.needs_input_grad[1]:
            totals = loadings.sum(1, dtype=torch.float64)
            by_activity = weights * (_times(counts, ratio, loadings.t(), transpose=False).double() - totals)
        if ctx.needs_input_grad[2]:
            # Sums over all cells that cancel near the optimum: float32 would leave 1e-4 of the gradient
            # wrong.
            weighted = weights * activity.double()
            totals = weighted.sum(0).unsqueeze(-1)
            by_loadings = _times(counts, ratio.double(), weighted, transpose=True).t() - totals
        return None, *(None if g is None else g.to(activity.dtype) for g in (by_activity, by_loadings))


class _PoissonBlocks(torch.autograd.Function):
    """The same over blocks of rows, for counts that are mostly not zero."""

    @staticmethod
    def forward(ctx: Any, counts: _Counts, activity: Tensor, loadings: Tensor) -> Tensor:
        out = -(activity.double() @ loadings.sum(1, dtype=torch.float64))
        for rows in counts.blocks():
            x = counts.block(rows, activity.dtype)
            terms = (activity[rows] @ loadings).clamp_(min=MEAN_FLOOR).log_().mul_(x)
            terms -= log_factorial(x.reshape(-1).double()).view_as(x)
            out[rows] += terms.sum(1, dtype=torch.float64)
        ctx.counts = counts
        ctx.save_for_backward(activity, loadings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activity, loadings = ctx.saved_tensors
        counts: _Counts = ctx.counts
        by_activity, by_loadings = torch.empty_like(activity), torch.zeros_like(loadings, dtype=torch.float64)
        for rows in counts.blocks():
            slope = floored_ratio(counts.block(rows, activity.dtype), activity[rows] @ loadings).sub_(1)
            slope *= grad[rows].to(activity.dtype).unsqueeze(-1)
            by_activity[rows] = slope @ loadings.t()
            by_loadings += activity[rows].t() @ slope
        return None, by_activity, by_loadings.to(loadings.dtype)


class _NegativeBinomialBlocks(torch.autograd.Function):
    """log p of each row, float64 [n]: log1p over blocks of rows, Gamma functions at the non-zeros only."""

    @staticmethod
    def forward(ctx: Any, counts: _Counts, activity: Tensor, loadings: Tensor, log_theta: Tensor) -> Tensor:
        theta = log_theta.exp()
        out = activity.new_empty(counts.shape[0], dtype=torch.float64)
        for rows in counts.blocks():
            rate = activity[rows] @ loadings
            hit, xs, mus, thetas = _hits(counts, rows, rate, theta)
            terms = torch.log1p(rate / theta).mul_(-theta)
            if len(hit):
                value = nb_hits(xs, mus.clamp(min=MEAN_FLOOR), thetas)
                terms.view(-1).scatter_add_(0, hit, value.to(terms.dtype))
            out[rows] = terms.sum(1, dtype=torch.float64)
        ctx.counts = counts
        ctx.save_for_backward(activity, loadings, log_theta)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activity, loadings, log_theta = ctx.saved_tensors
        counts: _Counts = ctx.counts
        want_theta = ctx.needs_input_grad[3]
        theta = log_theta.exp()
        by_activity, by_loadings = torch.empty_like(activity), torch.zeros_like(loadings, dtype=torch.float64)
        by_theta = torch.zeros_like(theta, dtype=torch.float64)
        for rows in counts.blocks():
            rate = activity[rows] @ loadings
            weights = grad[rows].to(activity.dtype).unsqueeze(-1)
            hit, xs, mus, thetas = _hits(counts, rows, rate, theta)
            ratio = rate / theta
            slope = -1 / (1 + ratio)
            if len(hit):
                at_hits = floored_ratio(xs, mus) - (xs + thetas) / (mus + thetas)
                slope.view(-1).scatter_(0, hit, at_hits.to(slope.dtype))
            slope *= weights
            by_activity[rows] = slope @ loadings.t()
            by_loadings += activity[rows].t() @ slope
            if want_theta:
                theta_slope = zero_slope(ratio, torch.log1p(ratio))
                if len(hit):
                    at_hits = nb_hits_slope(xs, mus.clamp(min=MEAN_FLOOR), thetas)
                    theta_slope.view(-1).scatter_(0, hit, at_hits.to(slope.dtype))
                by_theta += (weights * theta_slope).sum(0, dtype=torch.float64)
        of_theta = (by_theta * theta).to(log_theta.dtype) if want_theta else None
        return None, by_activity, by_loadings.to(loadings.dtype), of_theta


def _hits(counts: _Counts, rows: slice, rate: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the stored entries (zeros do no harm); counts, rates, thetas there in float64."""
    hit, x = counts.entries(rows)
    mus = rate.view(-1).index_select(0, hit)
    thetas = theta.index_select(0, hit % rate.shape[1])
    return hit, x.double(), mus.double(), thetas.double()


_DOMAIN = {
    "activity": constraints.nonnegative,
    "loadings": constraints.nonnegative,
    "log_theta": constraints.real,
}


class _Product(TorchDistribution):
    """What the two forms share: shapes, checks and the layouts of a value."""

    def _start(self, parameters: dict[str, Tensor], validate_args: bool | None) -> None:
        activity, loadings = parameters["activity"], parameters["loadings"]
        name = type(self).__name__
        if activity.dim() != 2 or loadings.dim() != 2 or activity.shape[1] != loadings.shape[0]:
            raise UserError(
                f"{name}: activity [cells, factors] and loadings [factors, genes] do not multiply: "
                f"their shapes are {tuple(activity.shape)} and {tuple(loadings.shape)}."
            )
        if len({p.dtype for p in parameters.values()}) > 1:
            raise UserError(
                f"{name}: parameters of different dtypes: "
                + ", ".join(f"{key} {p.dtype}" for key, p in parameters.items())
            )
        self.__dict__.update(parameters)
        super().__init__(activity.shape[:1], loadings.shape[1:], validate_args=False)
        self._validate_args = type(self)._validate_args if validate_args is None else validate_args
        if self._validate_args:
            check_parameters(parameters, _DOMAIN, name)

    activity: Tensor
    loadings: Tensor

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """The same parameters under a batch shape with more dimensions in front; nothing is copied."""
        shape = torch.Size(batch_shape)
        if shape[-1:] != self.activity.shape[:1]:
            raise UserError(
                f"{type(self).__name__}: {len(self.activity)} cells cannot expand to shape {tuple(shape)}."
            )
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = shape
        return new

    @property
    def mean(self) -> Tensor:
        """Rates, dense [n, G]: for small blocks only."""
        return (self.activity @ self.loadings).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p of each cell, shape sample + batch; `value` dense [..., n, G] or sparse CSR [n, G]."""
        shape = torch.Size((self.activity.shape[0], self.loadings.shape[1]))
        if value.shape[-2:] != shape:
            raise UserError(
                f"{type(self).__name__}: counts of shape {tuple(value.shape)} do not fit "
                f"{shape[0]} cells x {shape[1]} genes."
            )
        if value.dim() > 2:
            cells = torch.stack([self._cells(part) for part in value.reshape(-1, *shape)])
            return cells.view(value.shape[:-1]).expand(
                torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
            )
        return self._cells(value).expand(self.batch_shape)

    def _cells(self, value: Tensor) -> Tensor:
        if self._validate_args:
            check_counts(value.values() if value.layout == torch.sparse_csr else value, type(self).__name__)
        return self._score(_Counts(value.detach())).to(self.activity.dtype)

    def _score(self, counts: _Counts) -> Tensor:
        raise NotImplementedError


_NONNEGATIVE_ROWS = constraints.independent(constraints.nonnegative, 1)
_NONNEGATIVE_TABLE = constraints.independent(constraints.nonnegative, 2)


class ProductPoisson(_Product):
    """Poisson counts with means ``activity @ loadings``; one event is one cell.

    Parameters
    ----------
    activity
        Factor activities per cell, [n, h], >= 0 (sizes of cells included).
    loadings
        Mean count per unit of activity, [h, G], >= 0.
    """

    arg_constraints = {"activity": _NONNEGATIVE_ROWS, "loadings": _NONNEGATIVE_TABLE}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, activity: Tensor, loadings: Tensor, *, validate_args: bool | None = None) -> None:
        self._start({"activity": activity, "loadings": loadings}, validate_args)

    @property
    def variance(self) -> Tensor:
        """Equal to the mean."""
        return self.mean

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Dense counts as floats, sample + [n, G]: for small blocks only."""
        mean = self.mean.detach()
        return torch.poisson(mean.double().expand(self._extended_shape(torch.Size(sample_shape)))).to(
            mean.dtype
        )

    def _score(self, counts: _Counts) -> Tensor:
        on_cpu = self.activity.device.type == "cpu"
        sparse = (
            counts.dense is None
            and counts.density <= DENSE_ABOVE
            and (not on_cpu or torch.backends.mkl.is_available())
        )
        form = _PoissonSparse if sparse else _PoissonBlocks
        return form.apply(counts, self.activity, self.loadings)


class ProductNegativeBinomial(_Product):
    """Negative binomial counts with means ``activity @ loadings``, one theta per gene; one event is one cell.

    Parameters
    ----------
    activity, loadings
        As for `ProductPoisson`.
    log_theta
        Logarithm of the inverse dispersion, [G], clamped to `LOG_THETA_RANGE`; Var = mean + mean^2 / theta.
    """

    arg_constraints = {  # noqa: RUF012
        "activity": _NONNEGATIVE_ROWS,
        "loadings": _NONNEGATIVE_TABLE,
        "log_theta": constraints.independent(constraints.real, 1),
    }
    support = constraints.independent(constraints.nonnegative_integer, 1)
    log_theta: Tensor

    def __init__(
        self, activity: Tensor, loadings: Tensor, log_theta: Tensor, *, validate_args: bool | None = None
    ) -> None:
        if log_theta.shape != loadings.shape[1:]:
            raise UserError(
                f"ProductNegativeBinomial: log_theta has shape {tuple(log_theta.shape)}, not one value for "
                f"each of the {loadings.shape[-1]} genes in loadings."
            )
        self._start({"activity": activity, "loadings": loadings, "log_theta": log_theta}, validate_args)

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, [G]."""
        return self.log_theta.clamp(*LOG_THETA_RANGE).exp()

    @property
    def variance(self) -> Tensor:
        """Mean + mean^2 / theta, dense [n, G]: for small blocks only."""
        mean = self.mean
        return mean * (1 + mean / self.theta)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Dense counts as floats, sample + [n, G]: for small blocks only."""
        mean = self.mean.detach()
        theta = self.theta.detach().double().expand(self._extended_shape(torch.Size(sample_shape)))
        rate = torch._standard_gamma(theta) / theta * mean.double()
        return torch.poisson(rate.clamp(max=1e18)).to(mean.dtype)  # torch draws Poisson counts as int64

    def _score(self, counts: _Counts) -> Tensor:
        log_theta = self.log_theta.clamp(*LOG_THETA_RANGE)
        return _NegativeBinomialBlocks.apply(counts, self.activity, self.loadings, log_theta)

r"""Counts with means activity @ loadings, scored without holding the cells x genes matrix of means.

    rate = activity @ loadings,   activity [n, h] >= 0,  loadings [h, G] >= 0,  n cells, h factors, G genes
    ProductPoisson             log p(x_i) = sum_g x_ig log rate_ig - sum_g rate_ig - sum_g log x_ig!
    ProductNegativeBinomial    log p(x_i) = sum_g log NB(x_ig; rate_ig, theta_g),  Var = rate + rate^2 / theta
    ProductSharedOddsNegativeBinomial   the same of NB(shape = rate_ig, logits_g), mean rate e^logits: closed under summation

One event is one cell: batch_shape [n], event_shape [G], so a log_prob has shape [n]. Counts are a dense
tensor [n, G] or a torch sparse CSR tensor of that shape; a minibatch is made by taking rows before conversion
(torch cannot index CSR rows).

Poisson, sparse: the sum of rates is ``activity @ loadings.sum(1)`` and logarithms are needed at the non-zeros
only (`torch.sparse.sampled_addmm`, whose backward is two products with the same sparsity pattern). Where
counts are dense (more than `DENSE_ABOVE` of the entries), or sampled_addmm is missing (a CPU build without
MKL), and for the negative binomials, blocks of rows are formed, used and
forgotten, once forwards and once backwards (`ppl_st.product_math`). Memory beyond the arguments is proportional to the non-zeros plus
one block. Gradients are exact. Sums over the genes of a cell, and over cells, are float64 (block by block
where dense), because the terms of a gradient cancel near the optimum.

The mean enters logarithms as max(rate, 1e-13) and everything else as it is, as in `ppl_st.likelihoods`: a
cell with zero activity is finite.

Not here: second derivatives, activities with more than two dimensions, gradients with respect to the counts.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ppl_st.count_likelihoods import LOGITS_RANGE
from ppl_st.errors import UserError
from ppl_st.likelihood_math import LOG_THETA_RANGE
from ppl_st.likelihoods import check_counts, check_parameters
from ppl_st.product_math import Blocks, Counts, NegativeBinomialKernel, PoissonKernel, PoissonSparse, SharedOddsKernel
from ppl_st.sampling import negative_binomial, poisson

DENSE_ABOVE = 0.3


def csr_tensor(matrix: sp.csr_matrix) -> Tensor:
    """A scipy CSR matrix as a torch sparse CSR tensor of float32, a copy; entries stored twice are added up."""
    matrix = sp.csr_matrix(matrix, dtype=np.float32)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()  # the arrays are still the caller's
        matrix.sum_duplicates()
    crow, col = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    with warnings.catch_warnings():  # torch calls its CSR layout a beta
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(crow, col, torch.from_numpy(matrix.data.copy()), size=matrix.shape, check_invariants=False)


_DOMAIN = {
    "activity": constraints.nonnegative,
    "loadings": constraints.nonnegative,
    "log_theta": constraints.real,
    "logits": constraints.real,
}


class _Product(TorchDistribution):
    """What the forms share: shapes, checks and the layouts of a value."""

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
            raise UserError(f"{type(self).__name__}: {len(self.activity)} cells cannot expand to shape {tuple(shape)}.")
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
            return cells.view(value.shape[:-1]).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))
        return self._cells(value).expand(self.batch_shape)

    def _cells(self, value: Tensor) -> Tensor:
        if self._validate_args:
            check_counts(value.values() if value.layout == torch.sparse_csr else value, type(self).__name__)
        return self._score(Counts(value.detach())).to(self.activity.dtype)

    def _score(self, counts: Counts) -> Tensor:
        raise NotImplementedError


def _per_gene(parameter: Tensor, loadings: Tensor, name: str) -> None:
    if parameter.shape != loadings.shape[1:]:
        raise UserError(
            f"{name} has shape {tuple(parameter.shape)}, not one value for each of the {loadings.shape[-1]} genes in loadings."
        )


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
        return poisson(mean.double().expand(self._extended_shape(torch.Size(sample_shape)))).to(mean.dtype)

    def _score(self, counts: Counts) -> Tensor:
        on_cpu = self.activity.device.type == "cpu"
        sparse = (
            counts.dense is None and counts.density <= DENSE_ABOVE and (not on_cpu or torch.backends.mkl.is_available())
        )
        if sparse:
            return PoissonSparse.apply(counts, self.activity, self.loadings)
        return Blocks.apply(PoissonKernel(counts), self.activity, self.loadings, None)


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
        _per_gene(log_theta, loadings, "ProductNegativeBinomial: log_theta")
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
        return negative_binomial(theta, mean.double() / theta).to(mean.dtype)

    def _score(self, counts: Counts) -> Tensor:
        theta = self.theta
        return Blocks.apply(NegativeBinomialKernel(counts, theta.detach()), self.activity, self.loadings, theta)


class ProductSharedOddsNegativeBinomial(_Product):
    """Negative binomial counts with shapes ``activity @ loadings`` and one log-odds per gene; one event is one cell.

    The mean is shape * exp(logits), the variance mean * (1 + exp(logits)). Rows whose activities are sums of other rows' activities have the
    distribution of the sums of those rows' counts, which a fixed theta does not give.

    Parameters
    ----------
    activity, loadings
        As for `ProductPoisson`; their product is the shape parameter, floored at 1e-12 where there are counts.
    logits
        Log-odds, [G], clamped to `LOGITS_RANGE`.
    """

    arg_constraints = {  # noqa: RUF012
        "activity": _NONNEGATIVE_ROWS,
        "loadings": _NONNEGATIVE_TABLE,
        "logits": constraints.independent(constraints.real, 1),
    }
    support = constraints.independent(constraints.nonnegative_integer, 1)
    logits: Tensor

    def __init__(
        self, activity: Tensor, loadings: Tensor, logits: Tensor, *, validate_args: bool | None = None
    ) -> None:
        _per_gene(logits, loadings, "ProductSharedOddsNegativeBinomial: logits")
        self._start({"activity": activity, "loadings": loadings, "logits": logits}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Shape times odds, dense [n, G]: for small blocks only."""
        return super().mean * self.logits.clamp(*LOGITS_RANGE).exp()

    @property
    def variance(self) -> Tensor:
        """Mean * (1 + odds), dense [n, G]: for small blocks only."""
        return self.mean * (1 + self.logits.clamp(*LOGITS_RANGE).exp())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Dense counts as floats, sample + [n, G]: for small blocks only."""
        shape = super().mean.detach()
        wide = shape.double().expand(self._extended_shape(torch.Size(sample_shape)))
        odds = self.logits.detach().double().clamp(*LOGITS_RANGE).exp().expand(wide.shape)
        return negative_binomial(wide, odds).to(shape.dtype)

    def _score(self, counts: Counts) -> Tensor:
        return Blocks.apply(SharedOddsKernel(counts), self.activity, self.loadings, self.logits.clamp(*LOGITS_RANGE))

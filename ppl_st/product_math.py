r"""The arithmetic under the product forms: log p of counts [n, G] with rates ``activity @ loadings``, by blocks of rows.

`Blocks` is one autograd function for every likelihood whose parameter is such a product. A kernel scores one block of rows and gives the
derivative by each rate; blocks are formed, used and forgotten, once forwards and once backwards::

    PoissonKernel           rate = mean
    NegativeBinomialKernel  rate = mean,   gene = theta
    SharedOddsKernel        rate = shape,  gene = logits: log p = -r log(1 + e^u) + [x > 0] {log G(x + r) - log G(r) - log x! + x log s(u)};
                            the first term, summed over genes, is one vector of length h

Where counts are dense enough, the Gamma functions of the negative binomial, which there depend on the gene and on a small whole number only, are
looked up: with s = max(theta, 1), w_k = 1 / (theta + k),

    log p = V[g, x] + x log(mu s / (theta + mu)) - theta log1p(mu / theta),      V[g, x] = sum_{k<x} log((theta + k) / s) - log x!
    d log p / d theta = D[g, x] + log(1 + u) - u,  u = (x - mu) / (theta + mu),  D[g, x] = sum_{k<x} (w_k - log1p(w_k))

With shared odds the shape differs in every entry and nothing can be looked up; there the Gamma functions of dense float32 counts are taken on the
whole block, in float32 and without gathering (`gamma_ratio`), by Stirling's series after a shift of 4:

    log G(x + r) - log G(r) = x log t + (x + t - 1/2) log1p(x / t) - x + S(x + t) - S(t) - log [P(x + r) / P(r)],
    t = r + 4,  P(z) = z (z + 1) (z + 2) (z + 3)

Nothing in either cancels. Counts beyond LARGEST_TABLE, or not whole, go the way of the non-zeros (`likelihood_math.nb_hits`).

`PoissonSparse` is the faster form for sparse Poisson counts: logarithms at the non-zeros only.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppl_st.likelihood_math import (
    BLOCK,
    MEAN_FLOOR,
    THETA_RANGE,
    floored_ratio,
    log_factorial,
    nb_hits,
    nb_hits_slope,
    positions,
    zero_slope,
)

LARGEST_TABLE = 255  # counts up to which Gamma functions are tabulated,
TABLE_SHARE = 4  # if there are so many times more non-zeros than entries in the table
TABLE_ABOVE = 0.3  # and at least this share of all counts is not zero
NEAR = 0.2  # |u| below which log(1 + u) - u is a series: good to 1e-6 in float32


class Counts:
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
        """Positions in the flattened block, and the counts there, of the non-zeros of these rows (stored zeros do no harm)."""
        if self.dense is not None:
            flat = self.dense[rows].reshape(-1)
            hit = positions(flat)
            return hit, flat.index_select(0, hit)
        crow = self.crow[rows.start : rows.stop + 1].long()
        low, high = int(crow[0]), int(crow[-1])
        hit = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device) * self.shape[1], crow.diff())
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


def _times(counts: Counts, data: Tensor, dense: Tensor, transpose: bool) -> Tensor:
    """CSR (or its transpose) times a dense matrix; by scipy on the CPU: torch is 15 times slower
    transposed."""
    n, genes = counts.shape
    if data.device.type == "cpu":
        arrays = (data.numpy(), counts.col.numpy(), counts.crow.numpy())
        host = scipy.sparse.csr_matrix(arrays, shape=(n, genes), copy=False)
        return torch.from_numpy(np.asarray((host.T if transpose else host) @ dense.detach().numpy()))
    matrix = torch.sparse_csr_tensor(counts.crow, counts.col, data, (n, genes), check_invariants=False)
    return (matrix.t() if transpose else matrix) @ dense


def _pattern_rates(counts: Counts, activity: Tensor, loadings: Tensor) -> Tensor:
    """activity @ loadings at the stored entries of the counts, in their order."""
    zeros = torch.zeros_like(counts.data, dtype=activity.dtype)
    pattern = torch.sparse_csr_tensor(counts.crow, counts.col, zeros, tuple(counts.shape), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, activity.contiguous(), loadings.contiguous(), beta=0.0).values()


def _poisson_hits(x: Tensor, rate: Tensor) -> Tensor:
    """x log rate - log x! in float64, where the two cancel for large counts; flat tensors."""
    return rate.clamp(min=MEAN_FLOOR).double().log_().mul_(x).sub_(log_factorial(x))


class PoissonSparse(torch.autograd.Function):
    """log p of each row of CSR counts, float64 [n]."""

    @staticmethod
    def forward(ctx: Any, counts: Counts, activity: Tensor, loadings: Tensor) -> Tensor:
        rate = _pattern_rates(counts, activity, loadings)
        x = counts.data.to(rate.dtype)
        terms = _poisson_hits(counts.data.double(), rate)
        ctx.counts = counts
        ctx.save_for_backward(activity, loadings, floored_ratio(x, rate))
        return _row_sums(terms, counts.crow) - activity.double() @ loadings.sum(1, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activity, loadings, ratio = ctx.saved_tensors
        counts: Counts = ctx.counts
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


class PoissonKernel:
    """rate = mean; no parameter per gene."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def value(self, rows: slice, rate: Tensor, gene: None) -> Tensor:
        """log p of each row, float64 [r]."""
        terms = _poisson_hits(self.counts.block(rows, torch.float64).reshape(-1), rate.reshape(-1)).view_as(rate)
        return terms.sum(1) - rate.sum(1, dtype=torch.float64)

    def slopes(self, rows: slice, rate: Tensor, gene: None, want: bool) -> tuple[Tensor, None]:
        """Derivatives by rate, [r, G], and by gene."""
        return floored_ratio(self.counts.block(rows, rate.dtype), rate).sub_(1), None


class Tables(NamedTuple):
    """Sums over k < x of the negative binomial for every gene, flat [G * (top + 1)]; see above."""

    value: Tensor
    slope: Tensor
    top: int


def nb_tables(counts: Counts, theta: Tensor) -> Tables | None:
    """Tables up to the largest count, or None where they would cost more than they save."""
    data = counts.data if counts.dense is None else counts.dense
    stored, genes = int(torch.count_nonzero(data)), len(theta)
    largest = min(LARGEST_TABLE, stored // (TABLE_SHARE * max(1, genes)))
    if largest < 2 or stored < TABLE_ABOVE * counts.shape[0] * genes:
        return None
    top = int(min(float(data.max()), largest))
    k = torch.arange(top, dtype=torch.float64, device=theta.device)
    total = theta.double()[:, None] + k  # [G, top]
    w = 1 / total
    value = torch.where(theta[:, None] > 1, torch.log1p(k / theta.double()[:, None]), total.log())
    parts = (value - (k + 1).log(), w.square() * log1p_rest(w))
    value, slope = (torch.nn.functional.pad(part.cumsum(1), (1, 0)).reshape(-1).to(theta.dtype) for part in parts)
    return Tables(value, slope, top)


def log1p_rest(w: Tensor) -> Tensor:
    """(w - log1p(w)) / w^2, w > -1, by its series for small w."""
    series = torch.full_like(w, 1 / 13)
    small = w.clamp(-NEAR, NEAR)
    for k in range(12, 1, -1):
        series.mul_(-small).add_(1 / k)
    return torch.where(w.abs() < NEAR, series, (w - torch.log1p(w)) / (w * w))


class NegativeBinomialKernel:
    """rate = mean, gene = theta [G]: log1p on the whole block; Gamma functions at the non-zeros, or from tables."""

    def __init__(self, counts: Counts, theta: Tensor) -> None:
        self.counts, self.tables = counts, nb_tables(counts, theta)

    def value(self, rows: slice, rate: Tensor, theta: Tensor) -> Tensor:
        """log p of each row, float64 [r]."""
        terms = torch.log1p(rate / theta).mul_(-theta)
        if self.tables is None:
            hit, xs, mus, thetas = self._hits(rows, rate, theta)
            terms.view(-1).scatter_add_(0, hit, nb_hits(xs, mus.clamp(min=MEAN_FLOOR), thetas).to(terms.dtype))
            return terms.sum(1, dtype=torch.float64)
        x, place, tail = self._places(rows, rate.dtype, self.tables)
        scale = theta.clamp(min=1)
        terms += (rate.clamp(min=MEAN_FLOOR) * (scale / (theta + rate))).log_().mul_(x)
        terms += self.tables.value.index_select(0, place).view_as(terms)
        if len(tail):
            xs, mus, thetas = _at(tail, x, rate, theta)
            rest = nb_hits(xs, mus.clamp(min=MEAN_FLOOR), thetas) - thetas * torch.log1p(mus / thetas)
            terms.view(-1).scatter_(0, tail, rest.to(terms.dtype))
        return terms.sum(1, dtype=torch.float64)

    def slopes(self, rows: slice, rate: Tensor, theta: Tensor, want: bool) -> tuple[Tensor, Tensor | None]:
        """Derivatives by rate, [r, G], and by theta."""
        if self.tables is None:
            return self._slopes_at_hits(rows, rate, theta, want)
        x, place, tail = self._places(rows, rate.dtype, self.tables)
        total = theta + rate
        by_rate = ((x - rate) / rate.clamp(min=MEAN_FLOOR)).mul_(theta / total)  # x / rate - (x + theta) / total, of which little may be left
        if rate.min() < MEAN_FLOOR:
            by_rate = torch.where(rate < MEAN_FLOOR, -(x + theta) / total, by_rate)
        if not want:
            return by_rate, None
        u = (x - rate) / total
        far = ((theta + x) / total).log_().sub_(u)
        near = u.square() * log1p_rest(u.clamp(-NEAR, NEAR))
        by_theta = torch.where(u.abs() < NEAR, near.neg_(), far)
        by_theta += self.tables.slope.index_select(0, place).view_as(by_theta)
        if len(tail):
            xs, mus, thetas = _at(tail, x, rate, theta)
            by_theta.view(-1).scatter_(0, tail, nb_hits_slope(xs, mus.clamp(min=MEAN_FLOOR), thetas).to(rate.dtype))
        return by_rate, by_theta

    def _places(self, rows: slice, dtype: torch.dtype, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Counts [r, G], their flat places in the tables, and the flat positions of those that are not there."""
        x = self.counts.block(rows, dtype)
        index = x.clamp(max=tables.top).to(torch.int32)
        tail = positions((x - index).reshape(-1))
        width = tables.top + 1
        genes = torch.arange(0, width * x.shape[1], width, dtype=torch.int32, device=x.device)
        return x, (index + genes).reshape(-1), tail

    def _slopes_at_hits(self, rows: slice, rate: Tensor, theta: Tensor, want: bool) -> tuple[Tensor, Tensor | None]:
        hit, xs, mus, thetas = self._hits(rows, rate, theta)
        ratio = rate / theta
        by_rate = -1 / (1 + ratio)
        at_hits = floored_ratio(xs, mus) - (xs + thetas) / (mus + thetas)
        by_rate.view(-1).scatter_(0, hit, at_hits.to(by_rate.dtype))
        if not want:
            return by_rate, None
        by_theta = zero_slope(ratio, torch.log1p(ratio))
        at_hits = nb_hits_slope(xs, mus.clamp(min=MEAN_FLOOR), thetas)
        by_theta.view(-1).scatter_(0, hit, at_hits.to(by_rate.dtype))
        return by_rate, by_theta

    def _hits(self, rows: slice, rate: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Positions of the stored entries; counts, rates, thetas there in float64."""
        hit, x = self.counts.entries(rows)
        mus, thetas = _at(hit, rate, theta)
        return hit, x.double(), mus, thetas


def _quadratic(z: Tensor) -> Tensor:
    """z (z + 3) = q, so that z (z + 1) (z + 2) (z + 3) = q (q + 2)."""
    return (z + 3).mul_(z)


def gamma_ratio(x: Tensor, r: Tensor) -> Tensor:
    """log G(x + r) - log G(r), x >= 0 and r > 0 of one shape and dtype; for float32, error about 3e-7 x (|log r| + 1)."""
    t = r + 4
    top = x + t
    out = torch.log1p(x / t).mul_(top - 0.5)
    out += t.log().sub_(1).mul_(x)
    for z, sign in ((top, 1.0), (t, -1.0)):
        w = z.reciprocal()
        w2 = w * w
        out.addcmul_((w2 * (1 / 1260)).sub_(1 / 360).mul_(w2).add_(1 / 12), w, value=sign)
    above, below = _quadratic(x + r), _quadratic(r)
    return out.sub_(((above / below).mul_((above + 2).div_(below + 2))).log_())


def gamma_ratio_slope(x: Tensor, r: Tensor) -> Tensor:
    """Derivative of `gamma_ratio` by r."""
    t = r + 4
    top = x + t
    out = torch.log1p(x / t)
    for z, shape, sign in ((top, x + r, 1.0), (t, r, -1.0)):
        w = z.reciprocal()
        w2 = w * w
        # d/dz of log z - 1 / (2 z) - ..., and the four steps of the shift, sum_k 1 / (r + k) = (2 r + 3) (1 / q + 1 / (q + 2))
        part = (w2 * (-1 / 252)).add_(1 / 120).mul_(w2).sub_(1 / 12).mul_(w2).sub_(w * 0.5)
        q = _quadratic(shape)
        part -= (q + 1).div_(q).div_(q + 2).mul_(shape * 4 + 6)
        out.add_(part, alpha=sign)
    return out


class SharedOddsKernel:
    """rate = shape, gene = logits [G]; everything but the vector of the zeros at the non-zeros, or on the block where counts are dense."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        data = counts.data if counts.dense is None else counts.dense
        self.whole = int(torch.count_nonzero(data)) >= TABLE_ABOVE * counts.shape[0] * counts.shape[1]

    def value(self, rows: slice, rate: Tensor, logits: Tensor) -> Tensor:
        """log p of each row, float64 [r]."""
        out = -(rate.double() @ torch.nn.functional.softplus(logits.double()))
        if self.whole and rate.dtype == torch.float32:
            x, small, index, tail = self._block(rows, rate.dtype)
            terms = gamma_ratio(small, rate.clamp(min=THETA_RANGE[0]))
            terms += small * torch.nn.functional.logsigmoid(logits)
            terms -= log_factorial(torch.arange(LARGEST_TABLE + 1.0, device=x.device).double()).to(rate.dtype)[index]
            if len(tail):
                xs, rs, us = _at(tail, x, rate.clamp(min=THETA_RANGE[0]), logits)
                terms.view(-1).scatter_(0, tail, nb_hits(xs, rs * us.exp(), rs).to(terms.dtype))
            return out + terms.sum(1, dtype=torch.float64)
        hit, xs, rs, us = self._hits(rows, rate, logits)
        return out.index_add_(0, hit // rate.shape[1], nb_hits(xs, rs * us.exp(), rs))

    def slopes(self, rows: slice, rate: Tensor, logits: Tensor, want: bool) -> tuple[Tensor, Tensor | None]:
        """Derivatives by rate, [r, G], and by logits."""
        if self.whole and rate.dtype == torch.float32:
            return self._slopes_on_block(rows, rate, logits)
        hit, xs, rs, us = self._hits(rows, rate, logits)
        mus = rs * us.exp()
        by_rate = (-torch.nn.functional.softplus(logits)).expand_as(rate).contiguous()
        at_hits = nb_hits_slope(xs, mus, rs) + (xs - mus) / (rs + mus)  # at fixed odds
        floored = rate.view(-1).index_select(0, hit) < THETA_RANGE[0]
        at_hits = torch.where(floored, by_rate.view(-1).index_select(0, hit).double(), at_hits)
        by_rate.view(-1).scatter_(0, hit, at_hits.to(rate.dtype))
        if not want:
            return by_rate, None
        by_logits = -rate * torch.sigmoid(logits)
        by_logits.view(-1).scatter_add_(0, hit, (xs * torch.sigmoid(-us)).to(rate.dtype))
        return by_rate, by_logits

    def _slopes_on_block(self, rows: slice, rate: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        x, small, _, tail = self._block(rows, rate.dtype)
        zero = -torch.nn.functional.softplus(logits)
        by_rate = gamma_ratio_slope(small, rate.clamp(min=THETA_RANGE[0])).add_(zero)
        if len(tail):
            xs, rs, us = _at(tail, x, rate.clamp(min=THETA_RANGE[0]), logits)
            mus = rs * us.exp()
            by_rate.view(-1).scatter_(0, tail, (nb_hits_slope(xs, mus, rs) + (xs - mus) / (rs + mus)).to(rate.dtype))
        if rate.min() < THETA_RANGE[0]:  # the logarithm of the shape is constant there
            by_rate = torch.where(rate < THETA_RANGE[0], zero, by_rate)
        return by_rate, x * torch.sigmoid(-logits) - rate * torch.sigmoid(logits)

    def _block(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Counts [r, G]; the same where they are tabulated, else 0, as numbers and as indices; flat positions of the others."""
        x = self.counts.block(rows, dtype)
        index = x.clamp(max=LARGEST_TABLE).to(torch.int32)
        tail = positions((x - index).reshape(-1))
        small = x
        if len(tail):
            small, index = x.clone(), index.clone()
            small.view(-1).index_fill_(0, tail, 0.0)
            index.view(-1).index_fill_(0, tail, 0)
        return x, small, index, tail

    def _hits(self, rows: slice, rate: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hit, x = self.counts.entries(rows)
        keep = positions(x)
        hit, x = hit.index_select(0, keep), x.index_select(0, keep)
        rs, us = _at(hit, rate, logits)
        return hit, x.double(), rs.clamp(min=THETA_RANGE[0]), us


def _at(hit: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Entries of [r, G] or [G] tables at these flat positions of the block, float64; the first of them must be [r, G]."""
    genes = tables[0].shape[1]
    return tuple(t.reshape(-1).index_select(0, hit if t.dim() == 2 else hit % genes).double() for t in tables)


class Blocks(torch.autograd.Function):
    """log p of each row by a kernel, float64 [n]; gradients by activity, loadings and the parameter per gene."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, activity: Tensor, loadings: Tensor, gene: Tensor | None) -> Tensor:
        out = activity.new_empty(len(activity), dtype=torch.float64)
        for rows in kernel.counts.blocks():
            out[rows] = kernel.value(rows, activity[rows] @ loadings, gene)
        ctx.kernel = kernel
        ctx.save_for_backward(activity, loadings, gene)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        activity, loadings, gene = ctx.saved_tensors
        want = gene is not None and ctx.needs_input_grad[3]
        # Sums over all cells that cancel near the optimum: float64 from block to block.
        by_activity, by_loadings = torch.empty_like(activity), torch.zeros_like(loadings, dtype=torch.float64)
        by_gene = torch.zeros_like(gene, dtype=torch.float64) if want else None
        for rows in ctx.kernel.counts.blocks():
            weights = grad[rows].to(activity.dtype).unsqueeze(-1)
            slope, gene_slope = ctx.kernel.slopes(rows, activity[rows] @ loadings, gene, want)
            slope *= weights
            by_activity[rows] = slope @ loadings.t()
            by_loadings += activity[rows].t() @ slope
            if by_gene is not None:
                by_gene += (weights * gene_slope).sum(0, dtype=torch.float64)
        return None, by_activity, by_loadings.to(loadings.dtype), None if by_gene is None else by_gene.to(gene.dtype)

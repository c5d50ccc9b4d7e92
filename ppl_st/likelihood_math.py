r"""The arithmetic under the likelihoods: log p of counts with hand-written derivatives, by blocks in float64.

(A Poisson zero, where nothing cancels, stays in its parameter's dtype.)

Counts are mostly zero, where the Gamma functions of a negative binomial cancel exactly and one ``log1p``
remains; only the entries with x > 0 are gathered for the rest. For those, with t = theta + SHIFT,

    log G(x + theta) - log G(theta)
        = x log t + (x + t - 1/2) log1p(x / t) - x + S(x + t) - S(t) - log [P(x + theta) / P(theta)]

where S is Stirling's series and P(z) = z (z + 1) ... (z + SHIFT - 1): no branch, no cancellation from theta =
1e-8 to 1e8 and no call of lgamma or digamma. The derivatives are taken in the same pass and kept in the
parameters' dtype, so the backward pass is one product.

Three classes of shapes meet here: the counts, the means [n, G] and the dispersions [G]. Nothing is expanded
to the common shape before the block that needs it. A new elementwise likelihood is one function like
`nb_terms`; it gets blocks, broadcasting and autograd from `Elementwise`.

Not here: distributions (`ppl_st.likelihoods`), product forms (`ppl_st.product`), second derivatives,
derivatives by the data.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG_MEAN_RANGE = (-28.0, 20.0)  # 7e-13 to 5e8
LOG_THETA_RANGE = (-18.5, 18.5)  # 9e-9 to 1e8
MEAN_FLOOR = 1e-13
THETA_RANGE = (1e-12, 1e15)

SHIFT = 7  # eight terms of Stirling's series are good to 1e-15 from here on, and far better for larger arguments
BLOCK = 1 << 17  # entries per block: float64 temporaries then stay in the caches
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
_LOG_FACTORIAL = torch.lgamma(torch.arange(1, 513, dtype=torch.float64))

Terms = Callable[..., tuple[Tensor, list[Tensor | None]]]


def log_factorial(x: Tensor) -> Tensor:
    """log(x!) of flat float64 counts; a table for the small integers that counts nearly always are."""
    table = _LOG_FACTORIAL.to(x.device)
    index = x.to(torch.int64).clamp_(0, len(table) - 1)
    out = table.index_select(0, index)
    other = index != x
    if other.any():
        out[other] = torch.lgamma(x[other] + 1)
    return out


def positions(flat: Tensor) -> Tensor:
    """Indices of the non-zeros of a flat tensor (numpy compares and searches several times faster than torch)."""
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.numpy() != 0))
    return flat.nonzero().squeeze(-1)


def below(flat: Tensor, cut: float) -> Tensor:
    """Indices of the entries of a flat tensor that are below `cut`."""
    if flat.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flat.numpy() < cut))
    return (flat < cut).nonzero().squeeze(-1)


def floored_ratio(x: Tensor, mu: Tensor) -> Tensor:
    """d/dmu of x log max(mu, MEAN_FLOOR)."""
    return (x / mu.clamp(min=MEAN_FLOOR)).mul_(mu >= MEAN_FLOOR)


def zero_slope(ratio: Tensor, log1p_ratio: Tensor) -> Tensor:
    """d/dtheta of -theta log1p(r), r = mu / theta: r / (1 + r) - log1p(r), by a series where the two
    cancel."""
    cut = 0.03 if ratio.dtype == torch.float32 else 2e-4
    out = ratio / (1 + ratio) - log1p_ratio
    small = below(ratio.reshape(-1), cut)
    if len(small):
        r = ratio.reshape(-1).index_select(0, small)
        series = r * r * (-1 / 2 + r * (2 / 3 + r * (-3 / 4 + r * (4 / 5 - r * (5 / 6)))))
        out.view(-1).scatter_(0, small, series)
    return out


def _stirling(z: Tensor) -> Tensor:
    """lgamma(z) - [(z - 1/2) log z - z + log(2 pi) / 2] for z >= SHIFT."""
    w = 1 / z
    w2 = w * w
    out = torch.full_like(w, _STIRLING[-1])
    for c in _STIRLING[-2::-1]:
        out.mul_(w2).add_(c)
    return out.mul_(w)


def _stirling_slope(z: Tensor) -> Tensor:
    """Derivative of `_stirling`."""
    w2 = 1 / (z * z)
    powers = range(2 * len(_STIRLING) - 1, 0, -2)
    out = torch.zeros_like(w2)
    for k, c in zip(powers, _STIRLING[::-1], strict=True):
        out.mul_(w2).add_(-k * c)
    return out.mul_(w2)


def _rising(z: Tensor) -> Tensor:
    """z (z + 1) ... (z + SHIFT - 1)."""
    out = z.clone()
    for k in range(1, SHIFT):
        out.mul_(z + k)
    return out


def log_gamma_ratio(wants: Sequence[bool], b: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """log G(a + b) - log G(a), a, b > 0, and its derivative by a; `Terms` for `Elementwise`, b in the place of the value."""
    b, a = b.double(), a.double()
    t = a + SHIFT
    out = b * (torch.log(t) - 1) + (b + t - 0.5) * torch.log1p(b / t)
    out += _stirling(b + t) - _stirling(t) - torch.log(_rising(a + b) / _rising(a))
    slope = None
    if wants[0]:
        slope = torch.log1p(b / t) + b / (2 * t * (b + t)) + _stirling_slope(b + t) - _stirling_slope(t)
        for k in range(SHIFT):
            slope += b / ((a + k) * (a + b + k))
    return out, [slope]


def nb_hits(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """What a count x >= 0 adds to -theta log1p(mu / theta); flat float64 tensors of one shape, mu floored."""
    value = torch.log(mu * (theta / (theta + mu)))  # all of it at x = 1, the most frequent of them
    many = positions(x - 1)
    if len(many) == 0:
        return value
    x, mu, theta = (a.index_select(0, many) for a in (x, mu, theta))
    t = theta + SHIFT
    more = torch.log(mu * (t / (theta + mu))).sub_(1).mul_(x)
    more += (x + t - 0.5) * torch.log1p(x / t)
    more += _stirling(x + t) - _stirling(t)
    more -= torch.log(_rising(x + theta) / _rising(theta))
    more -= log_factorial(x)
    return value.scatter_(0, many, more)


def nb_hits_slope(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """The whole derivative of log p by theta at counts x > 0; arguments as in `nb_hits`.

    It is psi(x + theta) - psi(theta) - log1p(mu / theta) + (mu - x) / (theta + mu). At x = 1 it vanishes with
    mu, which only the short form resolves; above, with u = (x - mu) / (theta + mu), it is [log(1 + u) - u] +
    [terms of order x / theta^2], so that nothing cancels at large theta.
    """
    ratio = mu / theta
    slope = zero_slope(ratio, torch.log1p(ratio)).add_(ratio / (theta + mu))
    many = positions(x - 1)
    if len(many) == 0:
        return slope
    x, mu, theta = (a.index_select(0, many) for a in (x, mu, theta))
    t, total, top = theta + SHIFT, theta + mu, theta + x
    u = (x - mu) / total
    more = (top / total).log_().sub_(u)
    near = positions(u.abs() < 1e-2)
    if len(near):
        small = u.index_select(0, near)
        series = torch.full_like(small, 1 / 9)
        for k in range(8, 1, -1):
            series.mul_(small).add_((-1) ** (k - 1) / k)
        more.scatter_(0, near, series.mul_(small).mul_(small))
    more += torch.log1p(-SHIFT * x / (t * top))
    more += x / (2 * t * (x + t)) + _stirling_slope(x + t) - _stirling_slope(t)
    for k in range(SHIFT):
        more += x / ((theta + k) * (top + k))
    return slope.scatter_(0, many, more)


def nb_terms(log_mean: bool, log_theta: bool) -> Terms:
    """Blocks of NB log p and of its derivatives by the two parameters as given (log or not)."""

    def terms(wants: Sequence[bool], x: Tensor, m: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        x, m, t = x.double(), m.double(), t.double()
        m, outside = _inside(m) if log_mean else (m, None)
        mu = m.exp() if log_mean else m
        theta = t.exp() if log_theta else t.clamp(*THETA_RANGE)
        shape = torch.broadcast_shapes(x.shape, mu.shape, theta.shape)
        ratio = (mu / theta).expand(shape)
        log1p = torch.log1p(ratio)
        out = -theta * log1p
        by_mean = -(mu if log_mean else 1.0) / (1 + ratio) if wants[0] else None
        by_theta = zero_slope(ratio, log1p) if wants[1] else None
        hit = positions(_flat(x, shape))
        if len(hit):
            xs, raw, theta_s = (_flat(a, shape).index_select(0, hit) for a in (x, mu, theta))
            mus = raw.clamp(min=MEAN_FLOOR)
            out.view(-1).scatter_add_(0, hit, nb_hits(xs, mus, theta_s))
            if by_theta is not None:
                by_theta.view(-1).scatter_(0, hit, nb_hits_slope(xs, mus, theta_s))
            if by_mean is not None:
                by_log_mean = (xs - raw) * (theta_s / (theta_s + raw))
                if not log_mean:
                    floored = raw < MEAN_FLOOR
                    by_log_mean /= mus
                    if floored.any():
                        by_log_mean = torch.where(floored, -(xs + theta_s) / (raw + theta_s), by_log_mean)
                by_mean.view(-1).scatter_(0, hit, by_log_mean)
        if by_mean is not None and outside is not None:
            by_mean.masked_fill_(outside, 0.0)
        if by_theta is not None and log_theta:
            by_theta *= theta
        return out, [by_mean, by_theta]

    return terms


def poisson_terms(log_mean: bool) -> Terms:
    """Blocks of Poisson log p and of its derivative by the mean, or by its logarithm."""

    def terms(wants: Sequence[bool], x: Tensor, m: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        shape = torch.broadcast_shapes(x.shape, m.shape)
        m, outside = _inside(m) if log_mean else (m, None)
        # At zero nothing cancels: the parameter's own dtype is exact enough, and twice as fast.
        out = (-m.exp() if log_mean else -m).expand(shape).contiguous()
        slope = None
        if wants[0]:
            slope = out.clone() if log_mean else torch.full_like(out, -1.0)
        hit = positions(_flat(x, shape))
        if len(hit):
            xs, ms = (_flat(a, shape).index_select(0, hit).double() for a in (x, m))
            mus, log_mus = (ms.exp(), ms) if log_mean else (ms, ms.clamp(min=MEAN_FLOOR).log())
            value = xs * log_mus - mus - log_factorial(xs)
            out.view(-1).scatter_(0, hit, value.to(out.dtype))
            if slope is not None:
                at_hits = xs - mus if log_mean else floored_ratio(xs, ms) - 1
                slope.view(-1).scatter_(0, hit, at_hits.to(out.dtype))
        if slope is not None and outside is not None:
            slope.masked_fill_(outside, 0.0)
        return out, [slope]

    return terms


def _inside(log_mean: Tensor) -> tuple[Tensor, Tensor | None]:
    """Clamped to `LOG_MEAN_RANGE`, and where that changed it (None: nowhere). In here, because autograd's clamp costs as much as the rest."""
    low, high = LOG_MEAN_RANGE
    least, most = torch.aminmax(log_mean)
    if least >= low and most <= high:
        return log_mean, None
    return log_mean.clamp(low, high), (log_mean < low) | (log_mean > high)


def _flat(a: Tensor, shape: torch.Size) -> Tensor:
    return a.expand(shape).reshape(-1)


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index tuples that tile `shape` with at most about BLOCK entries each."""
    if not shape or math.prod(shape) <= BLOCK:
        yield tuple(slice(None) for _ in shape)
        return
    step = max(1, BLOCK // math.prod(shape[1:]))
    inner = list(_blocks(shape[1:])) if step == 1 else [tuple(slice(None) for _ in shape[1:])]
    for start, rest in itertools.product(range(0, shape[0], step), inner):
        yield (slice(start, start + step), *rest)


class Elementwise(torch.autograd.Function):
    """log p of broadcast tensors, with the derivatives that `terms` returns; parameters are never
    expanded."""

    @staticmethod
    def forward(ctx: Any, terms: Terms, record: bool, value: Tensor, *params: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, *(p.shape for p in params))
        like = params[0].new_empty((), dtype=result_dtype(*params))
        wants = [record and need for need in ctx.needs_input_grad[3:]]
        out = like.new_empty(shape)
        slopes = [like.new_empty(shape) if want else None for want in wants]
        views = [a.reshape((1,) * (len(shape) - a.dim()) + a.shape) for a in (value, *params)]
        for index in _blocks(shape):
            result, derivatives = terms(wants, *(_piece(view, index) for view in views))
            out[index] = result
            for slope, derivative in zip(slopes, derivatives, strict=True):
                if slope is not None and derivative is not None:
                    slope[index] = derivative
        ctx.save_for_backward(*slopes)
        ctx.like = [(p.shape, p.dtype) for p in params]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            None if slope is None else (grad * slope).sum_to_size(shape).to(dtype)
            for slope, (shape, dtype) in zip(ctx.saved_tensors, ctx.like, strict=True)
        ]
        return None, None, None, *gradients


def _piece(view: Tensor, index: tuple[slice, ...]) -> Tensor:
    """That block of a tensor with as many dimensions, those of size 1 kept at size 1."""
    own = tuple(part if size > 1 else slice(None) for part, size in zip(index, view.shape, strict=True))
    return view[own].contiguous()


def result_dtype(*tensors: Tensor) -> torch.dtype:
    out = tensors[0].dtype
    for tensor in tensors[1:]:
        out = torch.promote_types(out, tensor.dtype)
    return out

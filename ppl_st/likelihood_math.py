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
SHORT = 4  # terms where the result is float32: good to 2e-11
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


def _stirling(w: Tensor, w2: Tensor, terms: int = len(_STIRLING)) -> Tensor:
    """lgamma(z) - [(z - 1/2) log z - z + log(2 pi) / 2] for z >= SHIFT, from w = 1 / z and w^2."""
    out = torch.full_like(w, _STIRLING[terms - 1])
    for c in _STIRLING[: terms - 1][::-1]:
        out.mul_(w2).add_(c)
    return out.mul_(w)


def _stirling_slope(w2: Tensor, terms: int = len(_STIRLING)) -> Tensor:
    """Derivative of `_stirling` by z."""
    out = torch.full_like(w2, -(2 * terms - 1) * _STIRLING[terms - 1])
    for k in range(terms - 1, 0, -1):
        out.mul_(w2).add_(-(2 * k - 1) * _STIRLING[k - 1])
    return out.mul_(w2)


class _Shifted:
    """What the formulas need of G(a + x) / G(a): both arguments side by side, [2, n], so that small blocks cost few calls.

    P(z) = z (z + 1) ... (z + 6) is taken in pairs, p_c = (z + k) (z + 6 - k) = z (z + 6) + c with c = 0, 5, 8, and m = z + 3.
    """

    def __init__(self, x: Tensor, a: Tensor, terms: int = len(_STIRLING)) -> None:
        self.terms = terms
        z = torch.stack([a + x, a])
        self.x, self.top, self.t = x, z[0], a + SHIFT
        self.w = 1 / (z + SHIFT)
        self.w2 = self.w * self.w
        pair = z * (z + 6)
        self.pairs, self.middle = (pair, pair + 5, pair + 8), z + 3

    def value(self) -> Tensor:
        """(x + t - 1/2) log1p(x / t) + S(x + t) - S(t) - log [P(x + a) / P(a)], t = a + SHIFT."""
        rising = self.pairs[0] * self.pairs[1]
        rising.mul_(self.pairs[2]).mul_(self.middle)
        series = _stirling(self.w, self.w2, self.terms)
        out = (self.top + (SHIFT - 0.5)).mul_(torch.log1p(self.x / self.t))
        return out.add_(series[0]).sub_(series[1]).sub_(torch.log(rising[0] / rising[1]))

    def slope(self) -> Tensor:
        """x / (2 t (x + t)) + S'(x + t) - S'(t) + sum_k x / ((a + k) (a + x + k)), free of cancellation: with C = m(a) m(a + x) two terms of the
        sum are 2 x (C + 9 - c) / (p_c(a) p_c(a + x)) together, the middle one is x / C."""
        series = _stirling_slope(self.w2, self.terms)
        c = self.middle[0] * self.middle[1]
        out = 0.5 * self.w[0] * self.w[1] + 1 / c
        for offset, pair in zip((9, 4, 1), self.pairs, strict=True):
            out.add_((c + offset).div_(pair[0] * pair[1]), alpha=2)
        return out.mul_(self.x).add_(series[0]).sub_(series[1])


def log_gamma_ratio(wants: Sequence[bool], b: Tensor, a: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """log G(a + b) - log G(a), a, b > 0, and its derivative by a; `Terms` for `Elementwise`, b in the place of the value."""
    b, a = b.double(), a.double()
    shifted = _Shifted(*torch.broadcast_tensors(b, a))
    out = b * (torch.log(shifted.t) - 1) + shifted.value()
    return out, [torch.log1p(b / shifted.t) + shifted.slope() if wants[0] else None]


def nb_hits(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """What a count x >= 0 adds to -theta log1p(mu / theta); flat float64 tensors of one shape, mu floored."""
    return _nb_hits(x, mu, theta, True, False, True)[0]


def nb_hits_slope(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """The whole derivative of log p by theta at counts x > 0; arguments as in `nb_hits`.

    It is psi(x + theta) - psi(theta) - log1p(mu / theta) + (mu - x) / (theta + mu). At x = 1 it vanishes with
    mu, which only the short form resolves; above, with u = (x - mu) / (theta + mu), it is [log(1 + u) - u] +
    [terms of order x / theta^2], so that nothing cancels at large theta.
    """
    return _nb_hits(x, mu, theta, False, True, True)[1]


def _nb_hits(x: Tensor, mu: Tensor, theta: Tensor, want_value: bool, want_slope: bool, double: bool) -> tuple[Tensor, Tensor]:
    """`nb_hits` and `nb_hits_slope`, the work that they share done once; ``double``: to float64's precision, else to float32's."""
    total = theta + mu
    value = torch.log(mu * (theta / total)) if want_value else mu  # all of it at x = 1, the most frequent count
    slope = mu
    if want_slope:
        ratio = mu / theta
        slope = zero_slope(ratio, torch.log1p(ratio)).add_(ratio / total)
    many = positions(x - 1)
    if len(many) == 0:
        return value, slope
    x, mu, theta, total = (a.index_select(0, many) for a in (x, mu, theta, total))
    shifted = _Shifted(x, theta, len(_STIRLING) if double else SHORT)
    if want_value:
        more = torch.log(mu * (shifted.t / total)).sub_(1).mul_(x)
        more.add_(shifted.value()).sub_(log_factorial(x))
        value.scatter_(0, many, more)
    if want_slope:
        u = (x - mu) / total
        more = (shifted.top / total).log_().sub_(u)
        near = positions(u.abs() < (1e-2 if double else 1e-4))
        if len(near):
            small = u.index_select(0, near)
            series = torch.full_like(small, 1 / 9)
            for k in range(8, 1, -1):
                series.mul_(small).add_((-1) ** (k - 1) / k)
            more.scatter_(0, near, series.mul_(small).mul_(small))
        more.add_(torch.log1p(-SHIFT * x / (shifted.t * shifted.top))).add_(shifted.slope())
        slope.scatter_(0, many, more)
    return value, slope


def nb_terms(log_mean: bool, log_theta: bool) -> Terms:
    """Blocks of NB log p and of its derivatives by the two parameters as given (log or not)."""

    def terms(wants: Sequence[bool], x: Tensor, m: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        double = torch.float64 in (m.dtype, t.dtype)
        x, m, t = x.double(), m.double(), t.double()
        m, outside = _inside(m) if log_mean else (m, None)
        mu = m.exp() if log_mean else m
        theta = t.exp() if log_theta else t.clamp(*THETA_RANGE)
        shape = common_shape(x.shape, mu.shape, theta.shape)
        ratio = (mu / theta).expand(shape)
        log1p = torch.log1p(ratio)
        out = -theta * log1p
        by_mean = -(mu if log_mean else 1.0) / (1 + ratio) if wants[0] else None
        by_theta = zero_slope(ratio, log1p) if wants[1] else None
        hit = positions(_flat(x, shape))
        if len(hit):
            xs, raw, theta_s = (_flat(a, shape).index_select(0, hit) for a in (x, mu, theta))
            mus = raw.clamp(min=MEAN_FLOOR)
            value, slope = _nb_hits(xs, mus, theta_s, True, by_theta is not None, double)
            if by_theta is not None:
                by_theta.view(-1).scatter_(0, hit, slope)
            out.view(-1).scatter_add_(0, hit, value)
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
        shape = common_shape(x.shape, m.shape)
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
    if log_mean.numel() == 0:
        return log_mean, None
    least, most = torch.aminmax(log_mean)
    if least >= low and most <= high:
        return log_mean, None
    return log_mean.clamp(low, high), (log_mean < low) | (log_mean > high)


def common_shape(*shapes: torch.Size) -> torch.Size:
    """`torch.broadcast_shapes`, at once where all are the trailing dimensions of the longest."""
    wide = max(shapes, key=len)
    return wide if all(shape == wide[len(wide) - len(shape) :] for shape in shapes) else torch.broadcast_shapes(*shapes)


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
        shape = common_shape(value.shape, *(p.shape for p in params))
        dtype = result_dtype(*params)
        wants = [record and need for need in ctx.needs_input_grad[3:]]
        if math.prod(shape) <= BLOCK:
            result, derivatives = terms(wants, *(a.contiguous() for a in (value, *params)))
            out = result.to(dtype).expand(shape)
            slopes = [d.to(dtype) if want and d is not None else None for want, d in zip(wants, derivatives, strict=True)]
        else:
            out = params[0].new_empty(shape, dtype=dtype)
            slopes = [out.new_empty(shape) if want else None for want in wants]
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

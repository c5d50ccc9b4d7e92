"""Published losses that are statistics of a minibatch: they enter models as named factors, outside plates and scaled by hand."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["content_loss", "coral_loss", "cosine_loss", "gram", "mmd_loss", "pearson_loss", "style_loss"]

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the multi-scale kernel, in units of the median squared distance; each twice the one before
MEDIAN_CODES = 200  # about so many codes tell the median distance
RELEASED_GAMMA = 0.3  # of the fixed kernel in SpaGene's released code


def cosine_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean over rows of the cosine of a and b [B, C]."""
    return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()


def content_loss(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Sum over layers of the mean squared difference of two codes [B, H]."""
    return torch.stack([(x - y).square().mean() for x, y in zip(a, b, strict=True)]).sum()


def gram(code: Tensor, kind: Literal["released", "features"]) -> Tensor:
    """Gram matrix of a code [B, H]: "released" code code' / (B H), genes by genes; "features" code' code / B, as in image style transfer."""
    return code @ code.mT / code.numel() if kind == "released" else code.mT @ code / len(code)


def style_loss(virtual: Sequence[Tensor], style: Sequence[Tensor], kind: Literal["released", "features"] = "released") -> Tensor:
    """Sum over layers of the mean squared difference of Gram matrices; no gradient reaches ``style``.

    With a virtual style that is the same in every row the released matrix is a constant of order 1 / B, and the loss of order 1 / B^2: inert.
    """
    return torch.stack([(gram(v, kind) - gram(t, kind).detach()).square().mean() for v, t in zip(virtual, style, strict=True)]).sum()


def pearson_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - mean over columns of the Pearson correlation over rows of a and b [B, G]; a column that does not vary counts as uncorrelated."""
    a, b = a - a.mean(0), b - b.mean(0)
    size = (a.square().sum(0) * b.square().sum(0)).clamp_min(1e-16).sqrt()
    return 1 - ((a * b).sum(0) / size).mean()


def coral_loss(a: Tensor, b: Tensor) -> Tensor:
    """Squared Frobenius distance of the covariances of a [n, d] and b [m, d], over 4 d^2 (deep CORAL; the text of SpaGene).

    SpaGene's released code has the mean of the squared entries instead: 4 times this.
    """
    return (_covariance(a) - _covariance(b)).square().sum() / (4 * a.shape[1] ** 2)


def _covariance(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x.mT @ x / max(1, len(x) - 1)


def mmd_loss(a: Tensor, b: Tensor, kernel: Literal["median", "released"] = "median") -> Tensor:
    """Squared maximum mean discrepancy of codes a [n, d] and b [m, d].

    "median": unbiased (diagonals left out; it can be negative), mean of Gaussian kernels exp(-D / (s h)) over the scales s in `BANDWIDTHS`, h the
    median squared distance over pairs of at most `MEDIAN_CODES` of the codes, without gradient. "released": SpaGene's code, exp(-0.3 D) with the
    diagonals: in 200 and more dimensions every other entry is 0, so the value is 1 / n + 1 / m and the gradient 0.
    """
    n, m = len(a), len(b)
    if kernel == "released":

        def similar(x: Tensor, y: Tensor) -> Tensor:
            return torch.exp(-RELEASED_GAMMA * _square_distances(x, y))

        return similar(a, a).mean() + similar(b, b).mean() - 2 * similar(a, b).mean()
    if min(n, m) < 2:
        raise ValueError(f"mmd_loss: the unbiased estimate needs two codes on either side, got {n} and {m}")
    some = torch.cat([a, b]).detach()[:: max(1, (n + m) // MEDIAN_CODES)]
    distances = _square_distances(some, some)
    h = distances[~torch.eye(len(some), dtype=torch.bool, device=a.device)].median().clamp_min(1e-12)

    def multiscale(x: Tensor, y: Tensor) -> Tensor:  # each kernel is the square of the next wider one: one exponential for all
        k = torch.exp(-_square_distances(x, y) / (BANDWIDTHS[-1] * h))
        total = k
        for _ in BANDWIDTHS[1:]:
            k = k.square()
            total = total + k
        return total / len(BANDWIDTHS)

    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in (multiscale(a, a), multiscale(b, b))]
    return within[0] + within[1] - 2 * multiscale(a, b).mean()


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    d = (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT).clamp_min(0.0)
    return d * ~torch.eye(len(x), dtype=torch.bool, device=x.device) if x is y else d  # a code is at distance 0 from itself, but for rounding

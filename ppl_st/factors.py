"""Published losses that are statistics of a minibatch: they enter models as named factors, outside plates and scaled by hand."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["content_loss", "cosine_loss", "gram", "style_loss"]


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

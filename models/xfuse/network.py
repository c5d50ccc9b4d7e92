r"""The networks of XFuse in plain torch: a recognition network and a generator that meet at every resolution, like a U-Net.

    recognition R   image (and spot channels) [B, c, H, W]  ->  per level i = 0..D-1 location and log sd of z_i [B, C 2^i, H / 2^i, W / 2^i]
    generator U     z_0, ..., z_{D-1}  ->  features [B, C, H, W], from the coarsest level up
    heads           features -> maps, 1x1 convolutions; the last layer starts at zero, so that a fit starts from its biases

A block is convolution, norm, leaky ReLU (0.2). Preset "paper" (``published``): two 3x3 blocks after each resampling, 5x5 resampling convolutions
at the finer resolution, a stem, two-layer posterior heads for location and sd each, scale and metagenes with a hidden layer each, batch norm. The
default is lighter (one 3x3 block per level, upsampled after the convolution, no stem, one-layer heads) and has group norm: a batch of one patch is
like any other. Its means and variances are those of what is seen at once, a patch in training and the whole section in prediction, so the two
compute nearly, not exactly, the same function. Sides are padded (replicated) to a multiple of 2^(D-1) and cropped again.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Generator", "Norm", "Recognition", "head"]

Norm = Literal["group", "batch"]
LOG_SD = (-10.0, 3.0)  # range of the log sd of a latent


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, momentum=0.05)
    groups = next(g for g in (4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def _block(inputs: int, outputs: int, norm: Norm, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, _norm(norm, outputs), nn.LeakyReLU(0.2, inplace=True))


def _blocks(channels: int, norm: Norm, number: int) -> nn.Sequential:
    return nn.Sequential(*(_block(channels, channels, norm) for _ in range(number)))


def head(inputs: int, outputs: int, norm: Norm, parts: int = 1) -> nn.Sequential:
    """1x1 block and 1x1 convolution, whose output is zero at the start; ``parts`` hidden layers side by side, each output reads one of them."""
    last = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(last.weight)
    assert last.bias is not None
    nn.init.zeros_(last.bias)
    return nn.Sequential(_block(inputs, parts * inputs, norm, 1), last)


def _padded(x: Tensor, multiple: int) -> Tensor:
    bottom, right = (-side % multiple for side in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


class Recognition(nn.Module):
    """q(Z | image): location and sd of the latents of every level.

    Parameters
    ----------
    inputs
        Channels of the image and of what is given beside it.
    channels, depth
        Channels at full resolution (doubled at every level) and number of levels.
    norm, published
        Kind of norm; see the module.
    """

    def __init__(self, inputs: int, channels: int, depth: int, norm: Norm, published: bool = False) -> None:
        super().__init__()
        self.multiple = 2 ** (depth - 1)
        widths = [channels * 2**i for i in range(depth)]
        kernel, blocks = (5, 2) if published else (3, 1)
        self.stem = nn.Conv2d(inputs, channels, 3, 1, 1) if published else nn.Identity()
        self.levels = nn.ModuleList(
            _blocks(width, norm, blocks) if i or published else _block(inputs, width, norm) for i, width in enumerate(widths)
        )
        self.down = nn.ModuleList(_block(width, 2 * width, norm, kernel, stride=2) for width in widths[:-1])
        # location, then log sd; published: two layers each, side by side, and nothing between the two sides
        self.heads = nn.ModuleList(
            nn.Sequential(_block(width, 2 * width, norm, 1), nn.Conv2d(2 * width, 2 * width, 1, groups=2))
            if published
            else nn.Sequential(nn.Conv2d(width, 2 * width, 1))
            for width in widths
        )

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """x [B, inputs, H, W] -> (location, sd) per level, finest first; H and W rounded up to a multiple of 2^(D-1)."""
        y = self.stem(_padded(x, self.multiple))
        out = []
        for i, (level, heads) in enumerate(zip(self.levels, self.heads, strict=True)):
            y = level(self.down[i - 1](y) if i else y)
            loc, log_sd = heads(y).chunk(2, 1)
            out.append((loc, log_sd.clamp(*LOG_SD).exp()))
        return out


class Generator(nn.Module):
    """Features [B, C, H, W] of the latents; see the module."""

    def __init__(self, channels: int, depth: int, norm: Norm, published: bool = False) -> None:
        super().__init__()
        self.published = published
        widths = [channels * 2**i for i in range(depth)]
        kernel, blocks = (5, 2) if published else (3, 1)
        self.levels = nn.ModuleList(_blocks(width, norm, blocks) for width in (widths if published else widths[-1:]))
        self.up = nn.ModuleList(_block(2 * width, width, norm, kernel) for width in widths[:-1])
        self.combine = nn.ModuleList(_block(2 * width if published else width, width, norm) for width in widths[:-1])

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """z, finest first."""
        y = self.levels[-1](z[-1])
        for i in range(len(z) - 2, -1, -1):
            if self.published:
                y = self.up[i](F.interpolate(y, scale_factor=2, mode="bilinear"))
                y = self.levels[i](self.combine[i](torch.cat([y, z[i]], 1)))
            else:
                y = self.combine[i](F.interpolate(self.up[i](y), scale_factor=2, mode="bilinear") + z[i])
        out: Tensor = y
        return out

"""Plain torch modules: multi-layer perceptron with layer norm, graph attention over neighbor lists, style transfer.

LayerNorm instead of batch norm everywhere: no running statistics, and a batch of one cell is like any other.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "GraphAttention", "StyleTransfer"]

Codes = tuple[Tensor, Tensor]  # first and second layer, [B, H1] and [B, H2]


class MLP(nn.Sequential):
    """Linear -> LayerNorm -> ReLU -> dropout for every hidden size, then a linear output.

    Parameters
    ----------
    sizes
        Input, hidden ..., output widths; two numbers give a single linear layer.
    dropout
        After every hidden layer.
    zero_output
        Start with an output of exactly zero, for a residual.
    """

    def __init__(self, sizes: Sequence[int], *, dropout: float = 0.0, zero_output: bool = False) -> None:
        layers: list[nn.Module] = []
        for width, following in pairwise(sizes[:-1]):
            layers += [nn.Linear(width, following), nn.LayerNorm(following), nn.ReLU(), nn.Dropout(dropout)]
        output = nn.Linear(sizes[-2], sizes[-1])
        if zero_output:
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
        super().__init__(*layers, output)


class GraphAttention(nn.Module):
    r"""Graph attention layer of Velickovic et al. 2018 over neighbor lists, self loop included, heads averaged.

        h_i = W x_i,   e_ij = LeakyReLU(a_center . h_i + a_neighbor . h_j),   alpha_ij = softmax_{j in N(i) + i} e_ij
        y_i = mean over heads of sum_j alpha_ij h_j  + bias

    Parameters
    ----------
    width, output
        Widths of x and y.
    heads
        Number of attention heads, averaged.
    identity
        W = I (width = output), not trained, and a = 0 at the start: y is the mean over the neighborhood until the attention has learned better.
    """

    def __init__(self, width: int, output: int, heads: int = 1, *, identity: bool = False) -> None:
        super().__init__()
        self.heads, self.output = heads, output
        self.project = nn.Linear(width, heads * output, bias=False)
        self.center = nn.Parameter(torch.empty(heads, output))
        self.neighbor = nn.Parameter(torch.empty(heads, output))
        self.bias = nn.Parameter(torch.zeros(output))
        for parameter in (self.project.weight, self.center, self.neighbor):
            nn.init.xavier_uniform_(parameter)
        if identity:
            self.project.weight = nn.Parameter(torch.eye(width).repeat(heads, 1), requires_grad=False)
            self.bias.requires_grad_(False)
            nn.init.zeros_(self.center)
            nn.init.zeros_(self.neighbor)

    def forward(self, x: Tensor, neighbors: Tensor, present: Tensor) -> Tensor:
        """x [c, width] (the n centers first), neighbors [n, k] rows of x, present [n, k] whether each exists -> [n, output]."""
        n = len(neighbors)
        h = self.project(x).view(len(x), self.heads, self.output)
        own = torch.arange(n, device=x.device)[:, None]
        index = torch.cat([own, neighbors], 1)  # [n, 1 + k]
        there = torch.cat([torch.ones_like(own, dtype=torch.bool), present], 1)
        score = (h[:n] * self.center).sum(-1)[:, None] + (h * self.neighbor).sum(-1)[index]  # [n, 1 + k, heads]
        score = nn.functional.leaky_relu(score, 0.2).masked_fill(~there[..., None], -torch.inf)
        weight = torch.softmax(score, 1)
        return torch.einsum("nkh,nkhd->nhd", weight, h[index]).mean(1) + self.bias


def _dense(width: int, units: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, units), nn.LayerNorm(units), nn.ReLU())


class StyleTransfer(nn.Module):
    r"""Style transfer with layer-wise fusion (SpaIM, Li et al. 2025, doi:10.1038/s41467-025-63185-9, eq. 1-10, two layers).

    With f = ReLU(LayerNorm(linear)) everywhere, x [B, C] what is restyled, s [B, K] the other modality, h = (h1, h2) content, g = (g1, g2) style:

        content of x   h1 = f(x), h2 = f(h1)          style of x      g1 = f(x), g2 = f(g1)
        content of s   code: h2 = f(s), h1 = f(h2)    virtual style   code: g1 = f(1), g2 = f(1)     (the released wiring)
                       paper: h1 = f(s), h2 = f(h1)                   paper: g1 = f(1), g2 = f(g1)
        output         code: linear(f(h2 g2) + h1 g1)                 paper: linear(h2 g2) + linear(h1 g1)

    Parameters
    ----------
    outputs, inputs
        C and K.
    hidden
        H1 and H2.
    wiring
        "code" or "paper"; the output is linear in `fuse` for both.
    """

    def __init__(self, outputs: int, inputs: int, hidden: tuple[int, int] = (512, 256), wiring: str = "code") -> None:
        super().__init__()
        first, second = hidden
        self.code = wiring == "code"
        self.content_x = nn.ModuleList([_dense(outputs, first), _dense(first, second)])
        self.style_x = nn.ModuleList([_dense(outputs, first), _dense(first, second)])
        if self.code:
            self.content_s = nn.ModuleList([_dense(inputs, second), _dense(second, first)])
            self.virtual = nn.ModuleList([_dense(1, first), _dense(1, second)])
            self.fusion = _dense(second, first)
        else:
            self.content_s = nn.ModuleList([_dense(inputs, first), _dense(first, second)])
            self.virtual = nn.ModuleList([_dense(1, first), _dense(first, second)])
        self.output = nn.Linear(first if self.code else first + second, outputs)

    def encode(self, x: Tensor) -> tuple[Codes, Codes]:
        """Content and style of x."""
        h1, g1 = self.content_x[0](x), self.style_x[0](x)
        return (h1, self.content_x[1](h1)), (g1, self.style_x[1](g1))

    def content(self, s: Tensor) -> Codes:
        """Content of s."""
        one = self.content_s[0](s)
        two = self.content_s[1](one)
        return (two, one) if self.code else (one, two)

    def style(self, rows: int = 1) -> Codes:
        """The virtual style, the same in every row."""
        ones = torch.ones(rows, 1)
        g1 = self.virtual[0](ones)
        return g1, self.virtual[1](ones if self.code else g1)

    def fuse(self, content: Codes, style: Codes) -> Tensor:
        """Features of which the output is linear."""
        deep, shallow = content[1] * style[1], content[0] * style[0]
        return self.fusion(deep) + shallow if self.code else torch.cat([deep, shallow], -1)

    def decode(self, content: Codes, style: Codes) -> Tensor:
        """Output [B, C] of content in a style."""
        result: Tensor = self.output(self.fuse(content, style))
        return result

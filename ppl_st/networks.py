"""Plain torch modules: multi-layer perceptron with layer norm, graph attention over neighbor lists.

LayerNorm instead of batch norm everywhere: no running statistics, and a batch of one cell is like any other.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "GraphAttention"]


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
    """

    def __init__(self, width: int, output: int, heads: int = 1) -> None:
        super().__init__()
        self.heads, self.output = heads, output
        self.project = nn.Linear(width, heads * output, bias=False)
        self.center = nn.Parameter(torch.empty(heads, output))
        self.neighbor = nn.Parameter(torch.empty(heads, output))
        self.bias = nn.Parameter(torch.zeros(output))
        for parameter in (self.project.weight, self.center, self.neighbor):
            nn.init.xavier_uniform_(parameter)

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

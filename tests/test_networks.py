"""Graph attention against a dense transcription and, where installed, PyTorch Geometric; the MLP's promises."""

import numpy as np
import pytest
import torch

from ppl_st.networks import MLP, GraphAttention


def lists(n=7, k=3, seed=0):
    rng = np.random.default_rng(seed)
    chosen = [rng.choice([j for j in range(n) if j != i], k, replace=False) for i in range(n)]
    neighbors = torch.from_numpy(np.array(chosen))
    present = torch.from_numpy(rng.uniform(size=(n, k)) < 0.7)
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), neighbors, present


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_equals_the_dense_formula(heads):
    x, neighbors, present = lists()
    layer = GraphAttention(4, 5, heads)
    torch.nn.init.normal_(layer.bias)
    out = layer(x, neighbors, present)
    n = len(x)
    adjacency = torch.eye(n, dtype=torch.bool)
    for i in range(n):
        adjacency[i, neighbors[i][present[i]]] = True
    expected = torch.zeros(n, 5)
    for head in range(heads):
        h = x @ layer.project.weight[head * 5 : (head + 1) * 5].T
        score = torch.nn.functional.leaky_relu((h @ layer.center[head])[:, None] + (h @ layer.neighbor[head])[None], 0.2)
        expected += torch.softmax(score.masked_fill(~adjacency, -torch.inf), 1) @ h / heads
    torch.testing.assert_close(out, expected + layer.bias)


def test_attention_equals_pytorch_geometric():
    geometric = pytest.importorskip("torch_geometric.nn")
    x, neighbors, present = lists()
    layer = GraphAttention(4, 5, 2)
    other = geometric.GATConv(4, 5, heads=2, concat=False)
    with torch.no_grad():
        other.lin.weight.copy_(layer.project.weight)
        other.att_src[0].copy_(layer.neighbor)
        other.att_dst[0].copy_(layer.center)
        other.bias.zero_()
    edges = [(int(j), i) for i in range(len(x)) for j in neighbors[i][present[i]]]
    torch.testing.assert_close(layer(x, neighbors, present), other(x, torch.tensor(edges).T))


def test_a_cell_without_neighbors_attends_to_itself():
    x, neighbors, present = lists()
    layer = GraphAttention(4, 5)
    torch.testing.assert_close(layer(x, neighbors, torch.zeros_like(present)), layer.project(x) + layer.bias)


def test_mlp_takes_one_row_and_can_start_at_zero():
    assert MLP([3, 8, 8, 2])(torch.randn(1, 3)).shape == (1, 2)
    assert (MLP([3, 8, 2], zero_output=True)(torch.randn(5, 3)) == 0).all()
    assert len(MLP([3, 2])) == 1

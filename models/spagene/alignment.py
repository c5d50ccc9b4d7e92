"""Diagnostics of the alignment: do translated codes look like the other side's own?

    mmd        unbiased squared MMD with the multi-scale kernel; 0 on average where the two agree
    accuracy   of the critic, or (without one) of a linear classifier of codes and their squares on cells that it has not seen (translated codes are
               centered like the others, but may be shrunk); 0.5 where nobody can tell
    mixing     share of the other side among the nearest neighbors of a code, over the share expected at random; 1 where they mix
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_st.factors import mmd_loss
from ppl_st.inference.randomness import rng_scope

if TYPE_CHECKING:
    from ppl_st.models.spagene.model import Model

CELLS = 1000  # of either side
NEIGHBORS = 15
RIDGE = 1e-2


def alignment_of(model: "Model", seed: int, cells: int = CELLS) -> dict[str, float]:
    """{"forward mmd": ..., ...} on some ``cells`` of either side, with one draw of codes and translator noise."""
    found = {}
    rng = np.random.default_rng([seed, 12])
    sizes = [problem.counts.shape[0] for problem in model.problems]
    rows = [torch.from_numpy(np.sort(rng.permutation(n)[:cells])) for n in sizes]
    with torch.no_grad(), rng_scope(seed, "alignment"):
        codes = [loc + scale * torch.randn_like(loc) for loc, scale in (model.codes(side, rows[side]) for side in (0, 1))]
        for k, name in enumerate(("forward", "backward")):
            direction = model.way(k)
            mean = direction.translate(codes[k])
            fake, real = mean + direction.noise() * torch.randn_like(mean), codes[1 - k]
            found[f"{name} mmd"] = float(mmd_loss(fake, real))
            found[f"{name} accuracy"] = critic_accuracy(model.opponents[k], real, fake) if model.opponents else classifier_accuracy(real, fake)
            found[f"{name} mixing"] = mixing(real, fake)
    return found


def critic_accuracy(critic: torch.nn.Module, real: Tensor, fake: Tensor) -> float:
    """Balanced accuracy of a critic's sign."""
    return float(((critic(real) > 0).float().mean() + (critic(fake) <= 0).float().mean()) / 2)


def classifier_accuracy(real: Tensor, fake: Tensor) -> float:
    """Balanced accuracy of a linear discriminant of codes and their squares on the halves it was not fitted to; nan where a half is one cell, which
    has no spread."""
    if min(len(real), len(fake)) < 4:
        return float("nan")
    right, both = [], torch.cat([real, fake]).double()
    x = (both - both.mean(0)) / both.std(0).clamp_min(1e-12)
    real, fake = torch.cat([x, x.square()], 1).split([len(real), len(fake)])
    for fold in (0, 1):
        a, b = (side[fold::2] for side in (real, fake))
        pooled = (torch.cov(a.T) + torch.cov(b.T)) / 2
        direction = torch.linalg.solve(pooled + RIDGE * torch.eye(len(pooled), dtype=pooled.dtype), a.mean(0) - b.mean(0))
        middle = (a.mean(0) + b.mean(0)) @ direction / 2
        scores = [side[1 - fold :: 2] @ direction - middle for side in (real, fake)]
        right += [(scores[0] > 0).double().mean(), (scores[1] <= 0).double().mean()]
    return float(torch.stack(right).mean())


def mixing(real: Tensor, fake: Tensor) -> float:
    """See the file's docstring."""
    both, side = torch.cat([real, fake]), torch.cat([torch.zeros(len(real)), torch.ones(len(fake))])
    k = min(NEIGHBORS, len(both) - 1)
    distance = torch.cdist(both, both)
    distance.fill_diagonal_(torch.inf)
    near = distance.topk(k, largest=False).indices
    other = (side[near] != side[:, None]).float().mean(1)
    expected = torch.where(side == 0, float(len(fake)), float(len(real))) / (len(both) - 1)
    return float((other / expected).mean())

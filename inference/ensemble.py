"""Several independent pairs fitted in one loop, and kept together as the modes of one posterior.

Each chain is a complete (model, guide) pair with its own start; its sites carry the prefix ``chain<c>/``, so the joint trace shows every term of
every chain and the joint loss is the sum of theirs. Chains share minibatches but no parameters, hence with an element-wise optimiser and no
binding gradient clipping each follows the path that it would follow alone.
"""

from collections.abc import Sequence
from typing import Any

from pyro.contrib.autoname import scope
from torch import nn

from ppl_st.inference.pair import Pair

__all__ = ["chains_of", "ensemble"]


class _Chains(nn.Module):
    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Any, *, observe: bool = True) -> None:
        """Run every chain on the same minibatch."""
        for c, member in enumerate(self.members):
            with scope(prefix=f"chain{c}"):
                member.forward(batch, observe=observe)  # __call__ would send every parameter through the handlers, for nothing


def ensemble(pairs: Sequence[Pair]) -> Pair:
    """One pair that runs all ``pairs``."""
    return Pair(_Chains([pair.model for pair in pairs]), _Chains([pair.guide for pair in pairs]))


def chains_of(pair: Pair) -> list[Pair]:
    """The pairs that `ensemble` was made of."""
    assert isinstance(pair.model, _Chains) and isinstance(pair.guide, _Chains)
    return [Pair(model, guide) for model, guide in zip(pair.model.members, pair.guide.members, strict=True)]

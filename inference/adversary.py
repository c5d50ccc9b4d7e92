r"""The second player: a critic that tells two sets of codes apart, with its own parameters and its own optimiser.

A model holds its critic outside its own parameters (a module in a tuple, which registers nothing) and adds a named factor to its objective,
``pyro.factor("adversary", -weight * generator_loss(...))``; `ppl_st.inference.svi.fit` alternates: one step of the pair with the critic as it
is, one step of the critic on the codes that the pair drew in its own, detached. T(c) is the critic's logit, real and fake the two sides:

    kind             critic minimises                               pair minimises                              source
    cross_entropy    E softplus(-T(real)) + E softplus(T(fake))     E softplus(T(real)) + E softplus(-T(fake))   gimVI, VISTA (flipped labels)
    density_ratio    the same: T -> log p_real / p_fake             -E T(fake), an estimate of KL(fake || real)  adversarial variational Bayes
    hinge            E relu(1 - T(real)) + E relu(1 + T(fake))      -E T(fake)                                   hinge GAN, right sign
    hinge_published  E relu(1 - T(real)) + E relu(1 - T(fake))      E relu(1 - T(fake))                          SpaGene's released code (wrong sign)

Both losses are means over the codes of a minibatch. A gradient penalty adds ``penalty`` E (|grad T(c)| - ``center``)^2 over random mixtures c of a
real and a fake code to what the critic minimises: center 1 as in WGAN-GP, center 0 keeps a critic from growing without bound.
Nothing random is carried from step to step, so a resumed fit is bitwise the same.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from ppl_st.inference.objective import Drawn, total_norm
from ppl_st.inference.randomness import rng_scope

__all__ = ["Adversary", "Kind", "Player", "critic_loss", "generator_loss", "gradient_penalty", "logits"]

Kind = Literal["cross_entropy", "density_ratio", "hinge", "hinge_published"]


def critic_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises, from its logits of real [n] and fake [m] codes."""
    if kind in ("cross_entropy", "density_ratio"):
        return softplus(-real).mean() + softplus(fake).mean()
    return relu(1 - real).mean() + relu(1 + fake if kind == "hinge" else 1 - fake).mean()


def generator_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """What the maker of the codes minimises."""
    if kind == "cross_entropy":
        return softplus(real).mean() + softplus(-fake).mean()
    if kind == "hinge_published":
        return relu(1 - fake).mean()
    return -fake.mean()


def logits(critic: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """T of real [n, d] and fake [m, d] codes, [n] and [m], in one pass (critics treat every code by itself)."""
    both = critic(torch.cat([real, fake])).reshape(-1)
    return both[: len(real)], both[len(real) :]


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, center: float) -> Tensor:
    """E (|grad T(c)| - center)^2 over random mixtures c of pairs of real [n, d] and fake [m, d] codes."""
    pairs = max(len(real), len(fake))
    rows = [torch.randint(len(side), (pairs,), device=side.device) for side in (real, fake)]
    share = torch.rand(pairs, 1, device=real.device)
    mixed = (share * real[rows[0]] + (1 - share) * fake[rows[1]]).requires_grad_()
    (slope,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    return (slope.norm(dim=1) - center).square().mean()


class Player(NamedTuple):
    """One critic, and which of the values that the pair drew in its step (latent site -> detached value) are its real and fake codes."""

    critic: nn.Module
    codes: Callable[[Drawn], tuple[Tensor, Tensor]]


class Adversary:
    """Critics of one fit (one or more per chain), their Adam optimiser, and its step.

    Parameters
    ----------
    players
        Critics map codes [n, d] to logits [n] or [n, 1].
    kind
        The game.
    lr, weight_decay
        Learning rate and weight decay of Adam; as in gimVI by default.
    eps
        Adam's floor of the denominator; gimVI's 0.01 slows a critic down whose gradients are small beside it.
    penalty, center
        Gradient penalty.
    """

    def __init__(
        self, players: Sequence[Player], kind: Kind, *, lr: float = 1e-3, weight_decay: float = 1e-6, eps: float = 0.01, penalty: float = 0.0,
        center: float = 0.0,
    ) -> None:  # fmt: skip
        self.players, self.kind, self.penalty, self.center = list(players), kind, penalty, center
        self.module = nn.ModuleList([player.critic for player in players])
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=eps, weight_decay=weight_decay, fused=True)
        self._learn(False)  # for the pair the critic is a constant: no gradients of it are computed in the pair's step

    def step(self, drawn: Drawn, seed: int, step: int) -> str:
        """One update of every critic; what was not finite, or an empty text. A faulty step changes nothing."""
        self._learn(True)
        try:
            return self._step(drawn, seed, step)
        finally:
            self._learn(False)

    def _learn(self, whether: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad = whether

    def _step(self, drawn: Drawn, seed: int, step: int) -> str:
        self.optimizer.zero_grad(set_to_none=True)
        with rng_scope(seed, "critic", step):
            total = torch.zeros(())
            for player in self.players:
                real, fake = (codes.detach() for codes in player.codes(drawn))
                total = total.to(real.device) + critic_loss(self.kind, *logits(player.critic, real, fake))
                if self.penalty:
                    total = total + self.penalty * gradient_penalty(player.critic, real, fake, self.center)
            if not math.isfinite(total.item()):
                return "the loss of the critic"
            total.backward()
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not math.isfinite(total_norm(gradients)):
            return "the gradient of the critic"
        self.optimizer.step()
        return ""

    def state(self) -> dict[str, Any]:
        """A copy of parameters and moments on the CPU: tensors only."""
        moments = self.optimizer.state_dict()["state"]
        return {
            "critic": {name: tensor.detach().clone().cpu() for name, tensor in self.module.state_dict().items()},
            "moments": {k: {name: t.detach().clone().cpu() for name, t in values.items()} for k, values in moments.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Write what `state` gave back into critics and optimiser."""
        self.module.load_state_dict(state["critic"])
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {k: {name: t.clone() for name, t in values.items()} for k, values in state["moments"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

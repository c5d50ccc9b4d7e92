"""Naming the guilty when a step is not finite: sites, gradients, parameters. No healthy step comes here."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_st.inference.checkpoint import Tally
from ppl_st.inference.pair import Pair, some

__all__ = ["FitError", "despair", "guilty_sites", "guilty_tensors"]


class FitError(RuntimeError):
    """The fit cannot go on; the message names the step, the sites, the last losses and a remedy."""


def guilty_sites(pair: Pair, batch: Any, particles: int) -> str:
    """Run guide and model once more and name the sites whose value or log-probability is not finite.

    The caller provides the noise of the step in question. Sites come in sampling order, so the first one is
    the origin; empty if all are finite.
    """
    for _ in range(particles):
        with torch.no_grad():
            guide = poutine.trace(pair.guide).get_trace(batch)
            model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(batch)
            found = []
            for side, trace in (("guide", guide), ("model", model)):
                for name, site in trace.nodes.items():
                    if site["type"] != "sample" or site_is_subsample(site):
                        continue
                    what = _fault(site, replayed=side == "model" and name in guide.nodes)
                    if what:
                        found.append(f"{side} site {name!r} ({what})")
        if found:
            return some(found)
    return ""


def _fault(site: Any, replayed: bool) -> str:
    """What is wrong with one sample site; a replayed value is the guide's fault, not the model's."""
    if not replayed and not bool(torch.isfinite(site["value"]).all()):
        return "value not finite"
    if not bool(torch.isfinite(site["fn"].log_prob(site["value"])).all()):
        return "log-probability not finite"
    return ""


def guilty_tensors(tensors: Mapping[str, Tensor | None]) -> str:
    """Names of the tensors that hold NaN or infinity."""
    names = [
        n for n, tensor in tensors.items() if tensor is not None and not bool(torch.isfinite(tensor).all())
    ]
    return some(names) if names else "all parameters together (its norm overflows)"


def despair(tally: Tally, losses: list[float], lr: float, fault: str) -> str:
    """The text of the error that ends a fit."""
    shown = ", ".join(f"{loss:.5g}" for loss in losses[-5:])
    return (
        f"step {tally.step - 1}: {tally.bad_steps} steps in a row were not finite, the last one in {fault}. "
        f"Last losses: {shown}; smoothed loss before: {tally.smoothed:.5g}. "
        "Look for NaN or extreme values in the data behind that site; else lower lr "
        f"(it was halved to {lr:.3g} at last), lengthen warmup_steps or lower clip_norm."
    )

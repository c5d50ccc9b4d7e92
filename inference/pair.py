"""The live side of a fit: a pair of modules, their parameters and optimiser, to and from a state.

Not here: the loop (`ppl_st.inference.svi`) and the file format (`ppl_st.inference.checkpoint`).
"""

import copy
import dataclasses
import re
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from ppl_st.errors import UserError
from ppl_st.inference.adversary import Adversary
from ppl_st.inference.checkpoint import FitState, Tally
from ppl_st.inference.settings import FitConfig

__all__ = [
    "Pair",
    "Parameters",
    "Undo",
    "capture",
    "make_optimizer",
    "parameters_of",
    "pick_device",
    "restore",
    "some",
    "to_device",
]

# Two models in one process must not meet in Pyro's global store. Needed where modules are built and where
# they are called.
pyro.settings.set(module_local_params=True)

Parameters = dict[str, nn.Parameter]


class Pair(NamedTuple):
    """A model and its guide, with forward(batch, *, observe=True); all parameters exist before the fit.

    What belongs to the fit is in their `state_dict`: parameters and persistent buffers (running means, say).
    Large constants are better kept in the batch or in non-persistent buffers.
    """

    model: nn.Module
    guide: nn.Module


def parameters_of(pair: Pair) -> Parameters:
    """Trainable parameters as "model.<name>" and "guide.<name>"; one that both share appears once."""
    found: Parameters = {}
    seen: set[int] = set()
    for side, module in zip(Pair._fields, pair, strict=True):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{side}.{name}"] = parameter
    return found


def make_optimizer(parameters: Parameters, config: FitConfig) -> torch.optim.Adam:
    """Adam with one parameter group per distinct multiplier of the learning rate (`config.lr_groups`).

    Raises
    ------
    UserError
        A pattern is no regular expression or matches no parameter.
    """
    patterns = []
    for text, multiplier in config.lr_groups.items():
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UserError(f"fit setting lr_groups: {text!r} is no regular expression ({error})") from None
        if not any(map(pattern.search, parameters)):
            known = some(list(parameters))
            raise UserError(f"fit setting lr_groups: {text!r} matches no parameter; there are {known}")
        patterns.append((pattern, multiplier))
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        multiplier = next((m for pattern, m in patterns if pattern.search(name)), 1.0)
        groups.setdefault(multiplier, []).append(parameter)
    return torch.optim.Adam(
        [{"params": members, "multiplier": multiplier} for multiplier, members in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.optimizer == "amsgrad",
        fused=True,  # one call for all parameters, however small
    )


class Undo:
    """A copy of what a step may change in the pair: trainable parameters and persistent buffers of both sides, which models change in place.

    Not of the optimiser: where an update, or the adversary after it, is faulty, Adam's moments keep the step's gradient, which was finite.
    """

    def __init__(self, pair: Pair) -> None:
        state = [tensor for module in pair for tensor in module.state_dict(keep_vars=True).values()]
        changing = {id(tensor): tensor for tensor in state if tensor.requires_grad or not isinstance(tensor, nn.Parameter)}
        self.live = [tensor.detach() for tensor in changing.values()]
        self.kept = [tensor.clone() for tensor in self.live]

    def keep(self) -> None:
        """Take the copy."""
        if self.live:
            torch._foreach_copy_(self.kept, self.live)

    def back(self) -> None:
        """Write the copy into the live tensors."""
        if self.live:
            torch._foreach_copy_(self.live, self.kept)


def capture(
    pair: Pair,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    tally: Tally,
    adversary: Adversary | None = None,
) -> FitState:
    """A copy, on the CPU, of everything that the fit needs to go on."""
    model, guide = ({name: tensor.detach().clone().cpu() for name, tensor in module.state_dict().items()} for module in pair)
    moments = {
        name: {key: value.detach().clone().cpu() for key, value in optimizer.state[parameter].items()}
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }
    second = adversary.state() if adversary else {}
    return FitState(model, guide, moments, copy.deepcopy(tally), second)


def restore(
    state: FitState,
    pair: Pair,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    adversary: Adversary | None = None,
) -> Tally:
    """Write a state into live modules and optimiser, and return a copy of its tally.

    Raises
    ------
    UserError
        Names or shapes differ: the state belongs to another model or configuration.
    """
    if bool(state.adversary) != bool(adversary):
        raise UserError("the saved fit state belongs to another configuration: one of the two has an adversary")
    try:
        for module, tensors in zip(pair, (state.model, state.guide), strict=True):
            module.load_state_dict(tensors)
        if adversary:
            adversary.restore(state.adversary)
    except RuntimeError as error:
        raise UserError(f"the saved fit state belongs to another model or configuration: {error}") from None
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: copy.deepcopy(state.optimizer[n]) for i, n in enumerate(order) if n in state.optimizer}
    # torch's own loading knows which entries follow the parameter to its device. The groups, with the
    # learning rates and decays in them, stay those of the present configuration.
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return copy.deepcopy(state.tally)


def pick_device(name: str) -> torch.device:
    """The torch device for a setting; "auto" is the CPU, also where there is a GPU: no method has been tried on one.

    Raises
    ------
    UserError
        No such device on this machine.
    """
    if name == "auto":
        name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"fit setting device = {name!r}: use auto, cpu, cuda or cuda:<number>") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"fit setting device = {name!r}: torch finds {count} CUDA devices; use auto or cpu")
    return device


def to_device(x: Any, device: torch.device) -> Any:
    """Move the tensors of a batch; what is neither tensor nor container of tensors passes through."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(to_device(item, device) for item in x))
    if isinstance(x, list | tuple):
        return type(x)(to_device(item, device) for item in x)
    if isinstance(x, dict):
        return {key: to_device(item, device) for key, item in x.items()}
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x) if field.init]
        return dataclasses.replace(x, **{name: to_device(getattr(x, name), device) for name in names})
    return x


def some(names: list[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

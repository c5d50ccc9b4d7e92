"""What a fit needs to go on, and its file.

``state.pt`` holds tensors and plain Python scalars only, so it is read with ``weights_only=True`` (no code is
ever unpickled). There is no random-generator state in it: noise and data order are pure functions of (seed,
step), see `ppl_st.inference.randomness`. Not here: the data, the configuration, and the exported weights of a
finished run (`ppl_st.posterior`).
"""

import io
import math
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_st.errors import UserError
from ppl_st.io import atomic

__all__ = ["FitState", "Tally", "load_state", "save_state"]

FORMAT = 1  # raised when the content of state.pt changes meaning


@dataclass
class Tally:
    """What the training loop carries from step to step beside tensors."""

    step: int = 0  # completed steps, skipped ones included
    best: float = math.inf  # lowest window mean of the loss so far
    stale: int = 0  # windows in a row that did not beat `best`
    lr_scale: float = 1.0  # halved by every non-finite step
    bad_steps: int = 0  # non-finite steps in a row
    good_steps: int = 0  # finite steps since `lr_scale` last changed
    skipped: int = 0  # non-finite steps in all
    recent: list[float] = field(default_factory=list)  # the last finite losses, at most one window
    # For the record of the whole fit, however often it was resumed; nothing depends on them.
    losses: list[float] = field(default_factory=list, compare=False)  # of every step, undone ones included
    faults: list[list[Any]] = field(default_factory=list, compare=False)  # [step, reason] of those that were undone
    watched: list[dict[str, float]] = field(default_factory=list, compare=False)  # what `watch` said
    seconds: float = field(default=0.0, compare=False)

    @property
    def smoothed(self) -> float:
        """Mean of the last window of finite losses; NaN before the first."""
        return sum(self.recent) / len(self.recent) if self.recent else math.nan


@dataclass(frozen=True)
class FitState:
    """Everything needed to continue a fit, on the CPU and detached from the live modules."""

    model: dict[str, Tensor]  # state_dict of the model: parameters and persistent buffers
    guide: dict[str, Tensor]  # state_dict of the guide
    optimizer: dict[
        str, dict[str, Tensor]
    ]  # "model.<name>" or "guide.<name>" -> Adam's moments and step count
    tally: Tally
    adversary: dict[str, Any] = field(default_factory=dict)  # critics and their optimiser, where there are any

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self.tally.step


def save_state(state: FitState, path: str | Path) -> None:
    """Write `state` to `path` atomically: a failure leaves the previous file as it was.

    Raises
    ------
    UserError
        The disk is full or the folder cannot be written.
    """
    # Into memory first: torch turns a full disk into a bare RuntimeError; plain bytes give the OSError that
    # `atomic` explains.
    buffer = io.BytesIO()
    content = {
        "model": state.model,
        "guide": state.guide,
        "optimizer": state.optimizer,
        "tally": asdict(state.tally),
        "adversary": state.adversary,
    }
    torch.save({"format": FORMAT, **content}, buffer)
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: str | Path) -> FitState:
    """Read the file written by `save_state`.

    Raises
    ------
    UserError
        The file is missing, damaged, or no fit state of this version.
    """
    remedy = "resume from another checkpoint, or start again without resuming"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no saved fit state here; start the fit without resuming") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{path}: the saved fit state cannot be read ({reason}); {remedy}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: not a fit state of format {FORMAT} (found {found!r}); {remedy}")
    tally = Tally(**content["tally"])
    return FitState(
        model=content["model"],
        guide=content["guide"],
        optimizer=content["optimizer"],
        tally=tally,
        adversary=content.get("adversary", {}),
    )

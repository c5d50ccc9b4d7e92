"""Settings of a fit, and the two schedules that follow from them (pure functions of the step)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ppl_st.errors import UserError

__all__ = ["FitConfig", "kl_weight", "learning_rate", "unfinished_warmup"]


@dataclass(frozen=True)
class FitConfig:
    """Settings of one fit. A step is one minibatch; losses are in units of `scale`, see `fit`."""

    steps: int = 1000  # optimiser steps in all
    lr: float = 1e-2  # learning rate after warm-up
    lr_groups: dict[str, float] = field(
        default_factory=dict
    )  # regex -> multiplier; first hit in "guide.<name>"
    optimizer: Literal["adam", "amsgrad"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's decay of the two moments
    eps: float = 1e-8  # Adam's floor of the denominator
    weight_decay: float = 0.0  # Adam's L2 term, added to the gradient
    clip_norm: float = 10.0  # gradients are rescaled to at most this total norm; inf = never
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate, after warm-up
    warmup_steps: int = 0  # steps over which the learning rate rises linearly
    final_lr_factor: float = 0.0  # cosine only: last learning rate / lr
    kl_warmup_steps: int = 0  # steps over which the weight of latent sites rises from 1e-6 to 1
    particles: int = 1  # draws from the guide per step
    elbo: Literal["trace", "meanfield"] = "trace"  # meanfield: closed-form KL where it exists
    patience: int = 0  # windows in a row without improvement that end the fit; 0 = never
    min_delta: float = 0.0  # smallest fall of the window mean that counts as improvement
    window: int = 50  # steps per window of the smoothed loss
    min_steps: int = 0  # early stopping looks only at steps after this one, and after both warm-ups
    max_bad_steps: int = 10  # non-finite steps in a row that end the fit with an error
    seed: int = 0  # of the noise; data order has its own, in the batches
    threads: int = 0  # of torch inside one operation; many small ones are faster on 1; 0 = torch's own choice
    device: str = "auto"  # "auto" = cpu
    checkpoint_every: int = 500  # steps; 0 = only at start and end
    log_every: int = 10  # steps per line of log.jsonl

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        not_negative = (
            "warmup_steps kl_warmup_steps patience min_steps seed threads checkpoint_every weight_decay min_delta"
        )
        rules: list[tuple[str, str, Callable[[Any], bool]]] = [
            ("steps particles window max_bad_steps log_every", "at least 1", lambda x: x >= 1),
            (not_negative, "at least 0", lambda x: x >= 0),
            ("seed", "at most 2^32 - 1", lambda x: x < 2**32),  # as libraries take it
            ("lr eps clip_norm", "positive", lambda x: x > 0),
            ("final_lr_factor", "between 0 and 1", lambda x: 0 <= x <= 1),
            ("betas", "two numbers in [0, 1)", lambda x: len(x) == 2 and all(0 <= b < 1 for b in x)),
            ("optimizer", "'adam' or 'amsgrad'", lambda x: x in ("adam", "amsgrad")),
            ("schedule", "'constant' or 'cosine'", lambda x: x in ("constant", "cosine")),
            ("elbo", "'trace' or 'meanfield'", lambda x: x in ("trace", "meanfield")),
        ]
        for keys, wanted, holds in rules:
            for key in keys.split():
                if not holds(getattr(self, key)):
                    raise UserError(f"fit setting {key} = {getattr(self, key)!r}: must be {wanted}")


def learning_rate(config: FitConfig, step: int) -> float:
    """Learning rate of `step` (from 0): linear warm-up, then constant or half a cosine wave down."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (
        config.final_lr_factor + (1 - config.final_lr_factor) * 0.5 * (1 + math.cos(math.pi * done))
    )


def kl_weight(config: FitConfig, step: int) -> float:
    """Weight of the latent sites at `step` (from 0), from 1e-6 (Pyro refuses 0) to 1 at `kl_warmup_steps`."""
    return 1.0 if step >= config.kl_warmup_steps else max(1e-6, step / config.kl_warmup_steps)


def unfinished_warmup(config: FitConfig, steps: int, meant: FitConfig) -> list[str]:
    """A line, if latent sites of a fit of so many steps never get their full weight and the preset's settings, ``meant``, are others."""
    if not 0 < steps < config.kl_warmup_steps or (steps, config.kl_warmup_steps) == (meant.steps, meant.kl_warmup_steps):
        return []
    weight = kl_weight(config, steps)
    return [f"warning: the fit ends at KL weight {weight:.2f}: kl_warmup_steps={config.kl_warmup_steps} of steps={steps}"]

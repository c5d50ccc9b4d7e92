"""Stochastic variational inference: the one training loop of the package.

For a pair (model p(x, z), guide q(z | x)) and minibatches b_0, b_1, ... it minimises, with a torch optimiser,

    loss_t = -scale * E_q [ log p(x_bt | z) + factors + w_t (log p(z) - log q(z | x_bt)) ]

where w_t rises from 1e-6 to 1 over `kl_warmup_steps` and touches latent sites only: observed sites and
`pyro.factor` sites always count in full. The expectation is a Monte Carlo estimate (`Trace_ELBO`) or uses
closed-form KL terms where they exist (`TraceMeanField_ELBO`).

Nothing random is carried from step to step. The noise of step t is drawn under `rng_scope(seed, "noise",
t)` and the minibatch is a pure function `batches.at(t)`. So a fit resumed from a checkpoint equals the
uninterrupted one bit for bit on a CPU (same thread count), two fits in one process do not meet, and the
caller's random state is untouched. Pyro's handler stack is one per process all the same: do not run fits in
several threads.

A step whose loss, gradient or updated parameters are not finite is undone (parameters and persistent
buffers), halves the learning rate and is counted; `max_bad_steps` of them in a row end in a `FitError` that
names the sites.

An adversary (`ppl_st.inference.adversary`) is a second player with its own parameters and optimiser: after each step of the pair it makes one
of its own on what the pair drew in that step, and its state travels with the checkpoint.

Not here: several processes, prediction, mixed precision, the run folder beyond ``state.pt`` and
``log.jsonl``.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from ppl_st.inference.adversary import Adversary
from ppl_st.inference.checkpoint import FitState, Tally, load_state, save_state
from ppl_st.inference.faults import FitError, despair, guilty_sites, guilty_tensors
from ppl_st.inference.monitor import Progress, json_log, progress_report, stop_signals
from ppl_st.inference.objective import Estimator, estimator, total_norm
from ppl_st.inference.pair import (
    Pair,
    Parameters,
    Undo,
    capture,
    make_optimizer,
    parameters_of,
    pick_device,
    restore,
    some,
    to_device,
)
from ppl_st.inference.randomness import epoch_order, rng_scope
from ppl_st.inference.settings import FitConfig, kl_weight, learning_rate
from ppl_st.inference.threads import torch_threads

__all__ = [
    "Batches",
    "FitConfig",
    "FitError",
    "FitInfo",
    "FitState",
    "Pair",
    "Tally",
    "epoch_order",
    "fit",
    "fit_part",
    "kl_weight",
    "learning_rate",
    "load_state",
    "rng_scope",
    "save_state",
    "scale_latents",
]

# Two models in one process must not meet in Pyro's global store.
pyro.settings.set(module_local_params=True)

WATCHES = 10
RECOVERY = 100  # finite steps in a row after which a halved learning rate is doubled again


class Batches(Protocol):
    """A stateless source of minibatches; `epoch_order` gives the rows of each."""

    def __len__(self) -> int:
        """Minibatches per epoch."""

    def at(self, step: int) -> Any:
        """The minibatch of `step` (from 0): a pure function of the step."""


@dataclass(frozen=True)
class FitInfo:
    """What happened during one call of `fit`, for people and plots; not needed to go on."""

    first_step: int  # completed steps before this call
    losses: np.ndarray  # [n_steps] float64, one per step of this call; steps that were undone included
    lr: np.ndarray  # [n_steps] learning rate of parameters with multiplier 1
    grad_norms: np.ndarray  # [n_steps] total gradient norm before clipping; NaN where the loss was not finite
    skipped: tuple[tuple[int, str], ...]  # (step, reason) of the steps that were undone
    untrained: tuple[str, ...]  # parameters that never received a gradient
    seconds: float
    peak_memory: int  # bytes: largest resident size of the process so far; 0 where the system does not tell
    stop_reason: Literal["steps", "converged", "interrupted"]
    watched: tuple[dict[str, float], ...] = ()  # what `watch` said, with its step


class scale_latents(Messenger):
    """Scale the log-probability of latent sites by `weight`; observed, factor and subsample sites keep it."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg["scale"] = msg["scale"] * self.weight


def fit(
    pair: Pair,
    batches: Batches,
    config: FitConfig,
    state: FitState | None = None,
    *,
    folder: str | Path | None = None,
    scale: float = 1.0,
    progress: Progress = "quiet",
    until: int | None = None,
    adversary: Adversary | None = None,
    edit: Callable[[int, torch.optim.Optimizer], None] | None = None,
    watch: Callable[[Any], dict[str, float]] | None = None,
) -> tuple[FitState, FitInfo]:
    """Train `pair` in place; return the state to go on from and a record of what happened.

    Parameters
    ----------
    pair
        Moved to the device, trained in train mode, left in eval mode.
    batches
        Minibatches; tensors in tuples, lists, dicts and dataclasses are moved to the device.
    config
        The settings. A resumed fit needs the same ones.
    state
        Continue from here: it replaces the parameters in `pair`. None starts at step 0 from what `pair`
        holds.
    folder
        Gets ``state.pt`` and ``log.jsonl``, whose later lines are dropped on resuming; None writes nothing.
        Without `state`, both are begun anew.
    scale
        Multiplies the loss, usually 1 / number of observations, so that settings carry over between data
        sets.
    progress
        "auto": a bar or lines on stderr. "quiet": nothing.
    until
        Return after this many completed steps, as if interrupted, although `config.steps` says more.
    adversary
        The second player, whose critic the model's objective uses.
    edit
        Called with the number of completed steps and the optimiser after each of them, before a checkpoint; may change parameters, buffers and
        moments in place, as a pure function of these and the step (so that a resumed fit is the same).
    watch
        Called with the minibatch `WATCHES` times during the fit; its numbers go to the log. It changes nothing.

    Returns
    -------
    FitState, FitInfo
        After SIGTERM or SIGINT (main thread only) the running step is finished, the state saved, and
        `FitInfo.stop_reason` is "interrupted": look at it before using the result.

    Raises
    ------
    FitError
        `max_bad_steps` non-finite steps in a row, or parameters that appear during the first step.
    UserError
        Impossible setting, state of another model, checkpoint that cannot be written.
    """
    began = time.perf_counter()
    device = pick_device(config.device)
    for module in (*pair, *([adversary.module] if adversary else [])):
        module.to(device).train()
    parameters = parameters_of(pair)
    optimizer = make_optimizer(parameters, config)
    bound = estimator(config.elbo, config.particles)
    tally = Tally() if state is None else restore(state, pair, parameters, optimizer, adversary)
    first, last = tally.step, config.steps if until is None else min(until, config.steps)
    undo, store = Undo(pair), set(pyro.get_param_store())
    history: list[_Done] = []
    before, watches = tally.seconds, len(tally.watched)
    folder = None if folder is None else Path(folder)

    def reached() -> FitState:
        tally.seconds = before + time.perf_counter() - began
        return capture(pair, parameters, optimizer, tally, adversary)

    if folder is not None:  # a folder that refuses the state says so now, not after an hour
        save_state(reached(), folder / "state.pt")

    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads))
        # Pyro warns of each NaN; here every one is handled and recorded.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        stop = stack.enter_context(stop_signals())
        log = stack.enter_context(json_log(None if folder is None else folder / "log.jsonl", first))
        report = stack.enter_context(progress_report(progress, first, last))

        while tally.step < last and not _converged(tally, config) and not stop.is_set():
            step = tally.step
            batch = to_device(batches.at(step), device)
            lr = learning_rate(config, step) * tally.lr_scale
            undo.keep()
            with pyro.validation_enabled(step == 0):  # silent broadcasting shows at once; later it only costs
                done = _step(pair, batch, parameters, optimizer, bound, config, step, lr, scale)
            if step == first:
                _refuse_new_parameters(pair, parameters, store)
            if adversary and not done.fault:
                done = done._replace(fault=adversary.step(bound.drawn, config.seed, step))
            if done.fault:
                undo.back()
            _count(tally, config, done)
            history.append(done)
            if edit:
                edit(tally.step, optimizer)

            if done.fault or tally.step % config.log_every == 0:
                seconds = round(time.perf_counter() - began, 3)
                log({"step": tally.step, "smoothed": tally.smoothed, "seconds": seconds} | done._asdict())
            if watch and tally.step % max(1, config.steps // WATCHES) == 0:
                tally.watched.append({"step": tally.step} | {name: float(value) for name, value in watch(batch).items()})
                log(tally.watched[-1])
            report(tally.step, tally.smoothed)
            if tally.bad_steps >= config.max_bad_steps:
                raise FitError(despair(tally, [one.loss for one in history], lr, done.fault))
            if folder and config.checkpoint_every and tally.step % config.checkpoint_every == 0:
                save_state(reached(), folder / "state.pt")

        final = reached()
        if folder:
            save_state(final, folder / "state.pt")

    for module in pair:
        module.eval()
    untrained = tuple(name for name, parameter in parameters.items() if parameter not in optimizer.state)
    return final, replace(_info(first, history, untrained, tally.seconds - before, tally, config), watched=tuple(tally.watched[watches:]))


def fit_part(
    pair: Pair, batches: Batches, config: FitConfig, state: FitState | None = None, *, scale: float = 1.0, until: int | None = None,
    adversary: Adversary | None = None,
) -> FitState:  # fmt: skip
    """`fit` as a part of something larger, which a signal ends too: nothing goes on with a pair that is half trained.

    Raises
    ------
    KeyboardInterrupt
        After SIGTERM or SIGINT.
    """
    final, info = fit(pair, batches, config, state, scale=scale, until=until, adversary=adversary)
    if info.stop_reason == "interrupted" and final.step < (config.steps if until is None else until):
        raise KeyboardInterrupt
    return final


class _Done(NamedTuple):
    """One step: what came out, and where it was not finite if it was not (the caller then undoes it)."""

    loss: float
    lr: float
    grad_norm: float
    fault: str


def _step(
    pair: Pair,
    batch: Any,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    bound: Estimator,
    config: FitConfig,
    step: int,
    lr: float,
    scale: float,
) -> _Done:
    """One update of the parameters, complete or faulty."""
    weight = kl_weight(config, step)
    model, guide = pair if weight == 1.0 else (scale_latents(weight)(module) for module in pair)

    optimizer.zero_grad(set_to_none=True)
    with rng_scope(config.seed, "noise", step):
        loss = bound.differentiable_loss(model, guide, batch) * scale
    value = loss.item()
    if not math.isfinite(value):
        with rng_scope(config.seed, "noise", step):
            sites = guilty_sites(pair, batch, config.particles)
        return _Done(value, lr, math.nan, sites or f"the loss ({value})")

    loss.backward()
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = total_norm(gradients)
    if not math.isfinite(norm):
        named = {name: parameter.grad for name, parameter in parameters.items()}
        return _Done(value, lr, norm, f"the gradient of {guilty_tensors(named)}")

    if norm > config.clip_norm:
        torch._foreach_mul_(gradients, config.clip_norm / norm)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["multiplier"]
    optimizer.step()
    # The norm is ten times cheaper than an exact test, but it overflows for large finite numbers too.
    values = [parameter.detach() for parameter in parameters.values()]
    suspect = not math.isfinite(total_norm(values))
    if suspect and not all(bool(torch.isfinite(tensor).all()) for tensor in values):
        return _Done(value, lr, norm, f"the update of {guilty_tensors(parameters)}")
    return _Done(value, lr, norm, "")


def _count(tally: Tally, config: FitConfig, done: _Done) -> None:
    """Book one step: learning-rate scale after faults, smoothed loss, windows without improvement."""
    tally.losses.append(done.loss)
    tally.faults += [[tally.step, done.fault]] if done.fault else []
    tally.step += 1
    if not done.fault:
        tally.recent = [*tally.recent, done.loss][-config.window :]
        tally.bad_steps, tally.good_steps = 0, tally.good_steps + 1
        if tally.lr_scale < 1 and tally.good_steps >= RECOVERY:
            tally.lr_scale, tally.good_steps = min(1.0, 2 * tally.lr_scale), 0
    else:
        tally.skipped += 1
        tally.bad_steps, tally.good_steps = tally.bad_steps + 1, 0
        tally.lr_scale /= 2
    # The loss rises by design while latent sites gain weight: windows count from the end of the warm-ups.
    counted = tally.step - max(config.min_steps, config.warmup_steps, config.kl_warmup_steps)
    if counted > 0 and counted % config.window == 0:
        improved = tally.smoothed < tally.best - config.min_delta
        tally.best, tally.stale = (tally.smoothed, 0) if improved else (tally.best, tally.stale + 1)


def _converged(tally: Tally, config: FitConfig) -> bool:
    return 0 < config.patience <= tally.stale


def _info(
    first: int,
    history: list[_Done],
    untrained: tuple[str, ...],
    seconds: float,
    tally: Tally,
    config: FitConfig,
) -> FitInfo:
    ended: Literal["steps", "interrupted"] = "steps" if tally.step >= config.steps else "interrupted"
    return FitInfo(
        first_step=first,
        losses=np.array([done.loss for done in history], dtype=np.float64),
        lr=np.array([done.lr for done in history], dtype=np.float64),
        grad_norms=np.array([done.grad_norm for done in history], dtype=np.float64),
        skipped=tuple((first + i, done.fault) for i, done in enumerate(history) if done.fault),
        untrained=untrained,
        seconds=seconds,
        peak_memory=_peak_memory(),
        stop_reason="converged" if _converged(tally, config) else ended,
    )


def _refuse_new_parameters(pair: Pair, parameters: Parameters, store: set[str]) -> None:
    """A parameter born in the first step is in no optimiser and no checkpoint: a fault of the model."""
    new = sorted(set(parameters_of(pair)) - set(parameters)) + sorted(set(pyro.get_param_store()) - store)
    if new:
        remedy = "create them in __init__, without pyro.param"
        raise FitError(f"parameters that did not exist before the fit: {some(new)}; {remedy}")


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

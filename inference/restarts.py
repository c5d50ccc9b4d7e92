"""Several fits from different seeds, of which the best is kept: for losses with many valleys."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ppl_st.errors import UserError
from ppl_st.inference.checkpoint import FitState, load_state
from ppl_st.inference.monitor import Progress
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.svi import Batches, FitConfig, FitError, FitInfo, Pair, fit

__all__ = ["Restart", "best_of"]


class Restart(NamedTuple):
    """The winner of `best_of`."""

    pair: Pair
    state: FitState
    info: FitInfo
    seed: int


def best_of(
    make: Callable[[int], Pair],
    batches: Batches,
    config: FitConfig,
    seeds: Iterable[int],
    *,
    folder: str | Path | None = None,
    resume: bool = False,
    scale: float = 1.0,
    progress: Progress = "quiet",
) -> Restart:
    """Fit one pair per seed and keep the one with the lowest final smoothed loss.

    `make(seed)` builds a pair and may draw from torch's generator, which is seeded around it. Each restart
    works in ``folder/restart-<seed>``; with `resume` it goes on from the state found there. An interrupted
    restart is returned at once (see `info.stop_reason`). One that ends in `FitError` loses; if all do, the
    last error is raised.
    """
    best: Restart | None = None
    failure: FitError | None = None
    for seed in seeds:
        with rng_scope(seed, "init"):
            pair = make(seed)
        place = None if folder is None else Path(folder) / f"restart-{seed}"
        found = resume and place is not None and (place / "state.pt").exists()
        earlier = load_state(place / "state.pt") if place is not None and found else None
        own = dataclasses.replace(config, seed=seed)
        try:
            state, info = fit(pair, batches, own, earlier, folder=place, scale=scale, progress=progress)
        except FitError as error:
            failure = error
            continue
        current = Restart(pair, state, info, seed)
        if info.stop_reason == "interrupted":
            return current
        if best is None or state.tally.smoothed < best.state.tally.smoothed:
            best = current
    if best is None:
        raise failure or UserError("no restarts were asked for: give at least one seed")
    return best

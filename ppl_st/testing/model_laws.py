"""Laws of a model/guide pair and its minibatches, each a function that raises `LawBroken`.

The forward of both is ``(batch, *, observe=True)``, as in `ppl_st.inference.svi`. Everything is evaluated
without gradients, under named random streams; neither the pair nor the caller's random state is changed.

Not here: laws that depend on the method (permuting cells, say): those are in the tests of the methods.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.util import site_is_subsample

from ppl_st.inference.pair import Pair
from ppl_st.inference.randomness import rng_scope
from ppl_st.testing.subject import LawBroken

FAILURE_RATE = 1e-9  # of each law, on right code


class Minibatches(Protocol):
    """`ppl_st.inference.svi.Batches`."""

    def __len__(self) -> int:
        """Minibatches per epoch."""

    def at(self, step: int) -> Any:
        """The minibatch of `step`."""


def _traces(pair: Pair, batch: Any, seed: int = 0, observe: bool = True) -> tuple[Any, Any]:
    """(model, guide) traces; the model's latent sites are the guide's draws when it observes, else its own."""
    with rng_scope(seed, "trace"), torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(batch)
        model = poutine.replay(pair.model, guide) if observe else pair.model
        return poutine.trace(model).get_trace(batch, observe=observe), guide


def _sites(trace: Any, *, observed: bool) -> dict[str, Any]:
    """Random sites that are (not) observed; factors, subsamples and auxiliary sites left out."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"] == observed
        and not site_is_subsample(site)
        and type(site["fn"]).__name__ != "Unit"
        and not site["infer"].get("is_auxiliary")
    }


def sites_agree(pair: Pair, batch: Any) -> None:
    """Model and guide have the same latent sites, of the same shapes; the guide observes nothing."""
    with rng_scope(0, "trace"), torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(batch)
        # Not replayed: a site that the guide lacks must not fail inside Pyro first.
        model = poutine.trace(pair.model).get_trace(batch)
    ours, theirs = _sites(model, observed=False), _sites(guide, observed=False)
    lonely = sorted(ours.keys() ^ theirs.keys())
    if lonely:
        sides = ", ".join(f"{name} ({'model' if name in ours else 'guide'})" for name in lonely)
        raise LawBroken(f"latent sites that only one side has: {sides}")
    for name, site in ours.items():
        a, b = tuple(site["value"].shape), tuple(theirs[name]["value"].shape)
        if a != b:
            raise LawBroken(f"site {name}: shape {a} in the model, {b} in the guide")
    seen = sorted(_sites(guide, observed=True))
    if seen:
        raise LawBroken(f"the guide observes {', '.join(seen)}")


def plates_scale(pair: Pair, batch: Any, sizes: Mapping[str, int] | None = None) -> None:
    """Every site counts (full size / minibatch) of each plate around it, on both sides; batch shapes fit.

    `sizes` has the true full size of plates, {"cells": 5000}; of others the declared one is believed.
    """
    sizes = sizes or {}
    for side, trace in zip(Pair._fields, _traces(pair, batch), strict=True):
        sites = {**_sites(trace, observed=False), **_sites(trace, observed=True)}
        for name, site in sites.items():
            expected = 1.0
            for frame in site["cond_indep_stack"]:
                expected *= sizes.get(frame.name, frame.full_size or frame.size) / frame.size
                shape = site["fn"].batch_shape
                if frame.dim is not None and (len(shape) < -frame.dim or shape[frame.dim] not in (1, frame.size)):
                    raise LawBroken(f"{side} site {name}: batch shape {tuple(shape)} in plate {frame.name} of {frame.size}")
            if not math.isclose(float(site["scale"]), expected, rel_tol=1e-5):
                raise LawBroken(f"{side} site {name} is scaled by {float(site['scale']):g}; its plates say {expected:g}")


def minibatches_unbiased(pair: Pair, batches: Minibatches, whole: Any, draws: int = 30) -> None:
    """The mean loss over the minibatches of one epoch is the loss of the whole data.

    `whole` is all data as one batch. Exact where the guide draws nothing; else the difference, under common
    random numbers, is within its own error over `draws` repetitions. Minibatches must be of equal size:
    Pyro's scaling is unbiased only then.
    """
    loss = Trace_ELBO()(pair.model, pair.guide)
    differences = []
    for k in range(draws):
        values = []
        for batch in [whole, *(batches.at(step) for step in range(len(batches)))]:
            with rng_scope(k, "elbo"), torch.no_grad():
                values.append(float(loss(batch)))
        differences.append(sum(values[1:]) / len(batches) - values[0])
        size = abs(values[0])
    d = torch.tensor(differences, dtype=torch.float64)
    mean, error = float(d.mean()), float(d.std()) / draws**0.5
    if abs(mean) > 1e-5 * max(1.0, size) and 2 * scipy.stats.t.sf(abs(mean) / max(error, 1e-300), draws - 1) < FAILURE_RATE:
        raise LawBroken(f"the loss of minibatches is off by {mean:.6g} +- {error:.2g} on {size:.6g}")


def simulation_obeys(pair: Pair, batch: Any, draws: int = 40, fresh: int = 20) -> None:
    """With observe=False the observed sites are drawn, and their totals rank evenly among fresh draws.

    The rank of the total among `fresh` totals drawn anew from the same distribution is uniform, whatever its
    tails. Means and spreads of these ranks over `draws` simulations are z-tested.
    """
    data = _sites(_traces(pair, batch)[0], observed=True)
    ranks: dict[str, list[float]] = {name: [] for name in data}
    for k in range(draws):
        trace, _ = _traces(pair, batch, seed=k + 1, observe=False)
        simulated = _sites(trace, observed=False)
        for name in data:
            if name not in simulated:
                raise LawBroken(f"site {name} is {'still observed' if name in trace.nodes else 'missing'} with observe=False")
            site = simulated[name]
            with rng_scope(k, "fresh"), torch.no_grad():
                totals = torch.stack([site["fn"].sample().double().sum() for _ in range(fresh)])
                own, ties = site["value"].double().sum(), torch.rand(fresh, dtype=torch.float64)
                # Ties (totals of sparse counts) are broken at random.
                below = (totals < own).sum() + ((totals == own) & (ties < torch.rand((), dtype=torch.float64))).sum()
                ranks[name].append(float(below + torch.rand((), dtype=torch.float64)) / (fresh + 1))
    for name, values in ranks.items():
        u = torch.tensor(values, dtype=torch.float64)
        for what, statistic, mean, variance in (
            ("level", u, 0.5, 1 / 12),
            ("spread", (2 * u - 1) ** 2, 1 / 3, 4 / 45),
        ):
            z = float(statistic.mean() - mean) / math.sqrt(variance / draws)
            if 2 * scipy.stats.norm.sf(abs(z)) < FAILURE_RATE:
                raise LawBroken(f"site {name}: totals of simulated data are off in {what}, z = {z:.3g} over {draws} draws")


def check_pair(
    pair: Pair, batches: Minibatches, whole: Any, sizes: Mapping[str, int] | None = None, *, simulate: bool = True
) -> dict[str, str]:
    """All four laws on the first minibatch and the epoch; {law: message} of those that are broken."""
    batch = batches.at(0)
    laws: dict[str, Callable[[], None]] = {
        "sites_agree": partial(sites_agree, pair, batch),
        "plates_scale": partial(plates_scale, pair, batch, sizes),
        "minibatches_unbiased": partial(minibatches_unbiased, pair, batches, whole),
    }
    if simulate:
        laws["simulation_obeys"] = partial(simulation_obeys, pair, whole)
    found = {}
    for name, law in laws.items():
        try:
            law()
        except LawBroken as broken:
            found[name] = str(broken)
        except Exception as error:  # a pair may be too broken to run
            found[name] = f"{type(error).__name__}: {error}"
    return found

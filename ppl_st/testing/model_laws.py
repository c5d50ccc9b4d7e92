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
from torch import Tensor

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


def _traces(pair: Pair, batch: Any) -> tuple[Any, Any]:
    """(model, guide) traces; the model's latent sites are the guide's draws."""
    with rng_scope(0, "trace"), torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(batch)
        return poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch), guide


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
    """With observe=False the observed sites are drawn, from what they are scored by with observe=True.

    The model runs again with observe=True, given the simulated latent values and data; its distribution of an observed site is what is scored. The
    rank of the simulated total among `fresh` totals drawn from that is uniform, whatever its tails: means and spreads of these ranks over `draws`
    simulations are z-tested. That says nothing against a sampler that disagrees with its own distribution, so where mean and variance are defined and
    entries are independent (no event of several), totals are held against the sums of these as well. The tails of that test are approximate: those
    of sums of gamma variables with the entries' moments. A model that is not a function of its latent sites (dropout) breaks this law.
    """
    data = _sites(_traces(pair, batch)[0], observed=True)
    ranks: dict[str, list[float]] = {name: [] for name in data}
    moments: dict[str, list[tuple[float, float, float]]] = {name: [] for name in data}
    for k in range(draws):
        with rng_scope(k + 1, "trace"), torch.no_grad():
            trace = poutine.trace(pair.model).get_trace(batch, observe=False)
        simulated = _sites(trace, observed=False)
        for name in data:
            if name not in simulated:
                raise LawBroken(f"site {name} is {'still observed' if name in trace.nodes else 'missing'} with observe=False")
        given = poutine.condition(pair.model, data={name: simulated[name]["value"] for name in data})
        with rng_scope(k, "scored"), torch.no_grad():
            scored = poutine.trace(poutine.replay(given, trace)).get_trace(batch, observe=True)
        for name in data:
            fn: Any = scored.nodes[name]["fn"]
            own = simulated[name]["value"].double().sum()
            with rng_scope(k, "fresh"), torch.no_grad():
                totals = torch.stack([fn.sample().double().sum() for _ in range(fresh)])
                ties = torch.rand(fresh, dtype=torch.float64)
                # Ties (totals of sparse counts) are broken at random.
                below = (totals < own).sum() + ((totals == own) & (ties < torch.rand((), dtype=torch.float64))).sum()
                ranks[name].append(float(below + torch.rand((), dtype=torch.float64)) / (fresh + 1))
                moments[name] += _standardised(fn, own)
    for name, values in ranks.items():
        u = torch.tensor(values, dtype=torch.float64)
        for what, statistic, mean, variance in (
            ("level", u, 0.5, 1 / 12),
            ("spread", (2 * u - 1) ** 2, 1 / 3, 4 / 45),
        ):
            z = float(statistic.mean() - mean) / math.sqrt(variance / draws)
            if 2 * scipy.stats.norm.sf(abs(z)) < FAILURE_RATE:
                raise LawBroken(f"site {name}: totals of simulated data are off in {what}, z = {z:.3g} over {draws} draws")
    for name, found in moments.items():
        if found:
            _judge_moments(name, *(torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True)))


def _standardised(fn: Any, total: Tensor) -> list[tuple[float, float, float]]:
    """[((total - mean) / sd under ``fn``, bounds on skewness and excess kurtosis of the total)], or nothing where they cannot be known.

    The bounds are those of independent gamma variables with the entries' means m and variances v (a Poisson or negative binomial has less): skewness
    2 sum(v^2 / m) / sum(v)^1.5, excess 6 sum(v^3 / m^2) / sum(v)^2. Where values may be negative: 0, and 6 for each entry.
    """
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if fn.event_shape:
        return []
    try:
        m, v = (value.double().expand(fn.batch_shape).flatten() for value in (fn.mean, fn.variance))
        signed = bool(fn.support.check(torch.tensor(-1.0)).all())
    except NotImplementedError:  # torch's own, of a distribution that does not say
        return []
    whole = v.sum()
    if not (m.isfinite().all() and 0 < whole < math.inf):
        return []
    m, v, z = m[v > 0], v[v > 0], float((total - m.sum()) / whole.sqrt())
    if signed:
        return [(z, 0.0, float(6 * (v**2).sum() / whole**2))]
    return [(z, float(2 * (v**2 / m).sum() / whole**1.5), float(6 * (v**3 / m**2).sum() / whole**2))]


def _judge_moments(name: str, z: Tensor, skew: Tensor, excess: Tensor) -> None:
    """Sum and sum of squares of standardised totals [draws]: no likelier that far out than under a normal law below and a Pearson III law above (the
    lower tail is the lighter the larger the skewness, of which there is only an upper bound), and under a gamma law of the same moments.
    """
    draws, scale = len(z), 2 + float(excess.mean())  # the variance of a square
    level, spread = float(z.sum()) / math.sqrt(draws), float((z**2).sum())
    squares = scipy.stats.gamma(draws / scale, scale=scale)
    for what, below, above in (
        ("level", scipy.stats.norm.cdf(level), scipy.stats.pearson3.sf(level, float(skew.mean()) / math.sqrt(draws))),
        ("spread", squares.cdf(spread), squares.sf(spread)),
    ):
        if 2 * min(float(below), float(above)) < FAILURE_RATE:
            raise LawBroken(
                f"site {name}: totals of simulated data are off in {what} of what .mean and .variance say: over {draws} draws their standardised "
                f"values have mean {float(z.mean()):.3g} and mean square {spread / draws:.3g}"
            )


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

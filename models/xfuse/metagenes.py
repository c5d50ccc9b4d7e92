r"""How many metagenes: drop-and-split on a fixed maximum with masks, and the shrinkage of unused ones.

A metagene m contributes if the evidence bound is higher with it than without it. All ablations are made from one decoded latent image: removing m
before the softmax renormalises the others, a_m' -> a_m' / (1 - a_m) in every pixel, so

    B^(-m)_l = sum_{xy in A_l} s a / (1 - a_m),       d_m = E[log p(x | B^(-m)) - log p(x | B)] + KL_m

where KL_m is what the divergences of its profile and field weights no longer cost. Each metagene is judged on a random share of the locations, so
that the work does not grow with their number. It is dropped if d_m >= 0, the worst first and never both halves of one split: what is left of the
pair stays for the next round. Every metagene that contributes is then split while there is room: both halves inherit everything, with their
logits lowered by log 2, which at the posterior means leaves the activities of all others and the sum of the two as they were: predictions change
only in that the halves' profiles, fields and location effects vary independently from then on.

The alternative (``selection="ard"``) keeps all metagenes and adds the factor -ard G / 2 sum_m log(1 + share_m / 0.01), share_m the share of
metagene m in all activity: a prior with a peak at no use that charges each used metagene like the G parameters that it has.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.pair import Pair
from ppl_st.inference.svi import rng_scope
from ppl_st.models.xfuse.model import PER_OUTPUT, Config, Guide, Model, sides
from ppl_st.models.xfuse.patches import Batch, Batches
from ppl_st.product import ProductSharedOddsNegativeBinomial

__all__ = ["contributions", "drop", "profiles", "purge", "rounds", "shares", "split"]

PIECE = 64  # pixels of a location whose ablations are one product of matrices
ROWS = 512  # locations whose counts are dense at a time
EVALUATED = 2.0  # times the locations of a batch, over all metagenes: evaluations of the likelihood per ablation round and draw
PROFILE_DRAWS = 100


def contributions(pair: Pair, batches: Batches, steps: range, draws: int, seed: int) -> Tensor:
    """d_m of every metagene [M] (minus infinity where it is not in use): the gain of the bound without it."""
    model, guide = sides(pair)
    gain = torch.zeros(model.config.metagenes, dtype=torch.float64)
    was_training = model.training
    for side in pair:
        side.eval()
    with torch.no_grad():
        for step in steps:
            batch = batches.at(step)
            for d in range(draws):
                with rng_scope(seed, "purge", step, d):
                    gain += _gains(model, guide, batch) / (len(steps) * draws)
        gain += _divergences(model, guide)
    if was_training:
        for side in pair:
            side.train()
    return gain.masked_fill(~model.active, -torch.inf)


def _gains(model: Model, guide: Guide, batch: Batch) -> Tensor:
    """Log-likelihood without m less that with it [M], from one decode."""
    gain = torch.zeros(model.config.metagenes, dtype=torch.float64)
    number, used = len(batch.weight), model.active.nonzero().squeeze(1)
    if not number or len(used) < 2:
        return gain
    drawn = guide.globals()
    activity = model.decoded(drawn, batch, guide.latents(batch.image, batch.spots))  # [n, M], weighted
    chance = min(1.0, EVALUATED / len(used))
    place, row = (torch.rand(len(used), number) < chance).nonzero(as_tuple=True)  # pairs: metagene `used[place]` out, in location `row`
    without = _without_each(activity[:, used], batch.location, number)[row, :, place]  # [pairs, used]
    summed = torch.zeros(number, activity.shape[1]).index_add_(0, batch.location, activity)
    left = torch.zeros(len(row), activity.shape[1]).index_copy_(1, used, without)
    every = torch.arange(number)
    before, after = (
        _log_likelihood(model, drawn, batch, rows, model.noisy(drawn, batch, values, rows)) for rows, values in ((every, summed), (row, left))
    )
    return gain.index_add_(0, used[place], (after - before[row]) * batch.weight[row].double() / chance)


def _without_each(activity: Tensor, location: Tensor, number: int) -> Tensor:
    """B^(-m) of every location l and metagene m [l, :, m] of pixels' activities [n, M]: products of matrices over pieces of `PIECE` pixels."""
    order = torch.argsort(location, stable=True)
    location, activity = location[order], activity[order]
    size = torch.bincount(location, minlength=number)
    pieces = -(-size // PIECE)
    rank = torch.arange(len(location)) - (size.cumsum(0) - size)[location]
    at = (pieces.cumsum(0) - pieces)[location] + rank // PIECE, rank % PIECE
    padded = activity.new_zeros(2, int(pieces.sum()), PIECE, activity.shape[1])
    padded[0][at] = activity
    padded[1][at] = 1 / (1 - activity / activity.sum(1, keepdim=True).clamp_min(1e-30)).clamp_min(1e-6)
    found = torch.bmm(padded[0].transpose(1, 2), padded[1])  # [pieces, M, M]
    out = activity.new_zeros(number, *found.shape[1:]).index_add_(0, torch.arange(number).repeat_interleave(pieces), found)
    out.diagonal(dim1=1, dim2=2).zero_()
    return out


def _log_likelihood(model: Model, drawn: dict[str, Tensor], batch: Batch, rows: Tensor, summed: Tensor) -> Tensor:
    """Log-likelihoods [pairs] of locations ``rows`` [pairs] of a batch with summed activities [pairs, M]."""
    out = torch.zeros(len(rows), dtype=torch.float64)
    for group in batch.groups:
        counts, (shape, odds) = group.counts.to_dense(), model.loadings(drawn, model.spec.codes[group.section])
        for mine in ((rows >= group.start) & (rows < group.stop)).nonzero().squeeze(1).split(ROWS):
            law = ProductSharedOddsNegativeBinomial(summed[mine], shape, odds, validate_args=False)
            out[mine] = law.log_prob(counts[rows[mine] - group.start]).double()
    return out


def _divergences(model: Model, guide: Guide) -> Tensor:
    """KL of everything that belongs to each metagene alone [M]."""
    total = torch.zeros(model.config.metagenes, dtype=torch.float64)
    for name in model.priors():
        if name == "metagenes" or name in PER_OUTPUT:
            loc, sd = guide.posterior(name)
            kl = kl_divergence(Normal(loc, sd), Normal(torch.zeros_like(loc), model.scale_of(name))).double()
            total += kl.sum(1) if name == "metagenes" else kl[:, 1:].sum(0)
    return total


def shares(pair: Pair, batches: Batches, steps: range, seed: int) -> Tensor:
    """Share of each metagene in the activity of the measured spots [M]."""
    model, guide = sides(pair)
    total = torch.zeros(model.config.metagenes, dtype=torch.float64)
    with torch.no_grad():
        for step in steps:
            batch = batches.at(step)
            with rng_scope(seed, "shares", step):
                drawn = guide.globals()
                activity = model.decoded(drawn, batch, guide.latents(batch.image, batch.spots))
            total += activity[batch.rows[batch.location] >= 0].sum(0).double()
    return total / total.sum()


def profiles(pair: Pair, seed: int) -> dict[str, NDArray[np.float32]]:
    """What each metagene expresses: mean and sd over `PROFILE_DRAWS` posterior draws, without effects of covariates, [G, M] each.

    ``metagene_profile`` is the share of a gene in the counts that the metagene makes, p_mg = b_g e^{L_mg} / sum_h b_h e^{L_mh} over all genes of the
    fit, b = e^{t + u}; ``metagene_log2_fold`` is log2(p_mg / p_g), p_g = b_g / sum_h b_h the share at L = 0. Unlike L they stay as they are where a
    whole profile grows and the activity shrinks. Column m is the metagene m of all activities; NaN where it is not in use.
    """
    model, guide = sides(chains_of(pair)[0])
    found = {}
    with torch.no_grad(), rng_scope(seed, "profiles"):
        loc, sd = guide.posterior("metagenes")  # [M, G]
        base = torch.log_softmax(model.log_rate.double(), 0)
        draws = torch.zeros(2, 2, *loc.shape, dtype=torch.float64)  # sums of share and log2 fold, and of their squares
        for _ in range(PROFILE_DRAWS):
            log = torch.log_softmax(base + loc + sd * torch.randn_like(loc), 1)
            values = torch.stack([log.exp(), (log - base) / np.log(2.0)])
            draws += torch.stack([values, values**2])
        mean = draws[0] / PROFILE_DRAWS
        spread = ((draws[1] / PROFILE_DRAWS - mean**2).clamp_min(0) * PROFILE_DRAWS / (PROFILE_DRAWS - 1)).sqrt()
        for k, name in enumerate(("metagene_profile", "metagene_log2_fold")):
            for moment, table in (("mean", mean[k]), ("sd", spread[k])):
                found[f"{name}_{moment}"] = table.masked_fill(~model.active[:, None], torch.nan).T.float().numpy()
    return found


def drop(model: Model, gain: Tensor) -> list[int]:
    """Metagenes to drop: those with gain >= 0, worst first, at least one kept, and one half of a pair that was split from one parent."""
    dropped: list[int] = []
    spared: set[int] = set()
    partner = {m: int(p) for m, p in enumerate(model.partner.tolist()) if p >= 0}
    for m in torch.argsort(gain, descending=True).tolist():
        if gain[m] < 0 or int(model.active.sum()) - len(dropped) == 1:
            break
        if m in spared:
            continue
        dropped.append(m)
        if m in partner:
            spared.add(partner[m])
    return dropped


def _tables(model: Model, guide: Guide) -> list[tuple[Tensor, int, int]]:
    """Everything with a part per metagene: (tensor, axis, place of metagene 0 on it)."""
    tables: list[tuple[Tensor, int, int]] = [(model.bias, 0, 1)]
    last = model.expression[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    tables += [(last.weight, 0, 1), (last.bias, 0, 1)]
    if model.config.fields:
        tables.append((model.amplitude, 1, 1))
    if model.config.nugget:
        tables.append((model.log_nugget, 0, 1))
    for name in model.priors():
        if name == "metagenes" or name in PER_OUTPUT:
            for part in ("loc", "log_sd"):
                tables.append((getattr(guide, f"{name}_{part}"), *((0, 0) if name == "metagenes" else (1, 1))))
    return tables


def split(pair: Pair, m: int, to: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Metagene ``m`` becomes two, itself and ``to``, which was not in use; Adam's moments are inherited too."""
    model, guide = sides(pair)
    assert bool(model.active[m]) and not bool(model.active[to])
    with torch.no_grad():
        for tensor, axis, first in _tables(model, guide):
            held = [tensor]
            if optimizer is not None and tensor in optimizer.state:
                held += [value for value in optimizer.state[tensor].values() if value.shape == tensor.shape]
            for one in held:
                one.select(axis, first + to).copy_(one.select(axis, first + m))
        for half in (m, to):
            model.bias[1 + half] -= float(np.log(2.0))
        model.active[to] = True
        model.partner[m], model.partner[to] = to, m


def purge(pair: Pair, batches: Batches, steps: range, draws: int, seed: int, optimizer: torch.optim.Optimizer | None, extend: bool) -> None:
    """One round: drop what does not contribute, split what does."""
    model, _ = sides(pair)
    with torch.no_grad():
        for m in drop(model, contributions(pair, batches, steps, draws, seed)):
            model.active[m] = False
        model.partner.fill_(-1)
        if not extend:
            return
        free = (~model.active).nonzero().squeeze(1).tolist()
        order = model.active.nonzero().squeeze(1)[torch.argsort(model.bias[1:][model.active], descending=True)].tolist()
        for m, to in zip(order, free, strict=False):
            split(pair, m, to, optimizer)


def rounds(pair: Pair, batches: Batches, config: Config, seed: int) -> Callable[[int, torch.optim.Optimizer], None] | None:
    """What `ppl_st.inference.svi.fit` does after a step: nothing, or every ``purge_every`` steps a round of drop-and-split, and a last drop at the
    end."""
    if config.selection != "split":
        return None

    def after(step: int, optimizer: torch.optim.Optimizer) -> None:
        last = step == config.fit.steps
        if not last and (step % config.purge_every or step > config.fit.steps - config.purge_every):
            return
        for chain in chains_of(pair):
            first = step * len(batches)  # patches of their own
            purge(chain, batches, range(first, first + len(batches)), config.purge_draws, seed, optimizer, extend=not last)

    return after

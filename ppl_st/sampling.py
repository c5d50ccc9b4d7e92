"""Gamma, Poisson and negative binomial draws for tensors: on a CPU by NumPy's samplers (2 to 3 times as fast as torch's), on several threads.

A negative binomial count with shape r and odds o (mean r o) is Poisson(o Gamma(r)); where its mean is below 3 it is one uniform number turned round:
from P(0) = (1 + o)^-r on, P(k + 1) = P(k) (r + k) / (k + 1) o / (1 + o) is taken off until nothing is left, which most counts, being 0, are at once.

The stream of torch's default generator decides every draw, so `torch.manual_seed` or `rng_scope` repeats them; NumPy's global state is not used.
Work is cut into an even number of equal pieces with a generator each, so the draws do not depend on the number of threads. No gradients.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.errors import UserError

PIECE = 2**16  # values drawn by one generator, at most; a quarter of it costs half as much again, and two threads then gain nothing
INVERTED = (0.1, 3.0)  # shapes above the first with means below the second are drawn by inversion: few steps, at most some hundred
LARGEST_RATE = 1e18
# Threads that draw: the machine's, or as many as OMP_NUM_THREADS says. Not torch's number, which is 1 where its operations are small.
WORKERS = int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0] or 0) or os.cpu_count() or 1


def standard_gamma(shape: Tensor) -> Tensor:
    """Gamma(shape, rate 1) draws of the tensor's own shape and dtype (float32 or float64)."""
    shape = shape.detach()
    if shape.device.type != "cpu":
        return torch._standard_gamma(shape)
    dtype: Any = np.float64 if shape.dtype == torch.float64 else np.float32
    return _in_pieces(lambda rng, part: rng.standard_gamma(part, dtype=dtype), dtype, shape)


def poisson(rate: Tensor) -> Tensor:
    """Poisson draws as floats of the rate's dtype; rates above 1e18 are clamped to it."""
    rate = rate.detach().clamp(max=LARGEST_RATE)
    if rate.device.type != "cpu":
        return torch.poisson(rate)
    dtype: Any = np.float64 if rate.dtype == torch.float64 else np.float32
    return _in_pieces(lambda rng, part: rng.poisson(part), dtype, rate)


def negative_binomial(shape: Tensor, odds: Tensor) -> Tensor:
    """Negative binomial draws as float64: Poisson(odds x Gamma(shape)); shape and odds float64, as wide as the draws."""
    shape, odds = shape.detach(), odds.detach()
    if shape.device.type != "cpu":
        return poisson(standard_gamma(shape) * odds)
    return _in_pieces(_negative_binomial, np.float64, shape, odds)


def _negative_binomial(rng: np.random.Generator, shape: NDArray[Any], odds: NDArray[Any]) -> NDArray[Any]:
    result, rest, mass = np.zeros(len(shape)), rng.random(len(shape)), np.exp(-shape * np.log1p(odds))
    mixed = ~((shape * odds < INVERTED[1]) & (shape > INVERTED[0]))  # also what is not a number
    left = np.flatnonzero((rest > mass) | mixed)  # all others are 0
    mixed = mixed[left]
    drawn, left = left[mixed], left[~mixed]
    if len(drawn):
        if np.isnan(shape[drawn] * odds[drawn]).any():
            raise UserError(
                "counts cannot be drawn: the rate of some is NaN (shape x odds of their negative binomial); a parameter of the fit is not finite, or "
                "a likelihood of your own gives such values: fit again, or mend it"
            )
        result[drawn] = rng.poisson(np.minimum(rng.standard_gamma(shape[drawn]) * odds[drawn], LARGEST_RATE))
    rest, mass, shape, ratio = rest[left] - mass[left], mass[left], shape[left], odds[left] / (1 + odds[left])
    for k in itertools.count():  # rows that are not decided yet: what is left of their uniform number, P(k)
        if not len(left):
            break
        result[left] = k + 1
        mass *= ratio * (shape + k) / (k + 1)
        more = np.flatnonzero(rest > np.maximum(mass, 1e-15))  # what float64 cannot tell from the end of the tail is the end
        left, rest, mass, shape, ratio = left[more], rest[more] - mass[more], mass[more], shape[more], ratio[more]
    return result


def _in_pieces(draw: Callable[..., NDArray[Any]], dtype: Any, *parameters: Tensor) -> Tensor:
    flat = [parameter.contiguous().numpy().reshape(-1) for parameter in parameters]
    result = np.empty(flat[0].shape, dtype)
    seed = int(torch.randint(2**62, (1,)))
    pieces = 1 if len(result) <= PIECE else 2 * -(-len(result) // (2 * PIECE))  # even and equal: two threads end together
    size = -(-len(result) // pieces)

    def fill(piece: int) -> None:
        rows = slice(piece * size, (piece + 1) * size)
        result[rows] = draw(np.random.Generator(np.random.SFC64([seed, piece])), *(values[rows] for values in flat))

    if pieces > 1 and WORKERS > 1:
        with ThreadPoolExecutor(WORKERS) as pool:  # numpy draws without holding the interpreter
            list(pool.map(fill, range(pieces)))
    else:
        for piece in range(pieces):
            fill(piece)
    return torch.from_numpy(result.reshape(parameters[0].shape))

"""Gamma and Poisson draws for tensors: on a CPU by NumPy's samplers (2 to 3 times as fast as torch's), seeded from torch's stream.

The stream of torch's default generator decides every draw, so `torch.manual_seed` or `rng_scope` repeats them; NumPy's global state is not used.
No gradients.
"""

import numpy as np
import torch
from torch import Tensor


def _generator() -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(int(torch.randint(2**62, (1,)))))


def standard_gamma(shape: Tensor) -> Tensor:
    """Gamma(shape, rate 1) draws of the tensor's own shape and dtype (float32 or float64)."""
    shape = shape.detach()
    if shape.device.type != "cpu":
        return torch._standard_gamma(shape)
    dtype = np.float64 if shape.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.asarray(_generator().standard_gamma(shape.numpy(), dtype=dtype)))


def poisson(rate: Tensor) -> Tensor:
    """Poisson draws as floats of the rate's dtype; rates above 1e18 are clamped to it."""
    rate = rate.detach().clamp(max=1e18)
    if rate.device.type != "cpu":
        return torch.poisson(rate)
    return torch.from_numpy(np.asarray(_generator().poisson(rate.numpy()))).to(rate.dtype)

"""Random numbers as pure functions of (seed, name, step).

Nothing to save, nothing shared, the caller's generators untouched. Not for several threads: torch's default
generator is one per process, and it is the one that distributions draw from.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

__all__ = ["epoch_order", "gene_noise", "rng_scope"]


@contextmanager
def rng_scope(seed: int, *names: str | int) -> Iterator[None]:
    """Let torch draw from a stream that depends on (seed, *names) alone, then put the caller's state back.

    Covers the CPU and, once in use, CUDA generators. NumPy's global generator and Python's are neither used
    nor changed.
    """
    key = [seed, *(zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names)]
    derived = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    cuda = torch.cuda.is_initialized()
    before, before_cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    try:
        # Not torch.manual_seed: it would leave a seed behind for a CUDA that starts later.
        torch.default_generator.manual_seed(derived)
        if cuda:
            torch.cuda.manual_seed_all(derived)
        yield
    finally:
        torch.set_rng_state(before)
        if cuda:
            torch.cuda.set_rng_state_all(before_cuda)


def epoch_order(n: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Rows of the minibatch of `step`: each epoch is a fresh permutation of range(n), cut in order.

    Returns
    -------
    np.ndarray
        int64 [batch_size], or fewer for the last cut of an epoch; a pure function of the arguments. An
        epoch has ceil(n / batch_size) steps.
    """
    epoch, place = divmod(step, -(-n // batch_size))
    return _permutation(n, seed, epoch)[place * batch_size : (place + 1) * batch_size].copy()


def gene_noise(key: torch.Tensor, genes: torch.Tensor, size: int) -> torch.Tensor:
    """Standard normal numbers [size, genes], a pure function of (key, gene): the same in every block of cells and for every choice of genes."""
    rows = [np.random.Generator(np.random.SFC64([int(key), int(gene)])).standard_normal(size, dtype=np.float32) for gene in genes]
    return torch.from_numpy(np.stack(rows, 1))


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, zlib.crc32(b"order"), epoch]).permutation(n)

"""What a caller in Python asks for, looked at in one place: whole numbers, bounds of memory, lists of genes. The command line checks its own."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppl_st.errors import UserError

__all__ = ["gene_list", "refuse_draws", "whole"]


def whole(name: str, value: Any, least: int, why: str = "") -> None:
    """Refuse what is no whole number, and one that is less than ``least``; ``why`` is said instead of that."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name}={value!r}: is a {type(value).__name__}; give a whole number, {least} or more")
    if value < least:
        raise UserError(f"{name}={value}: {why or f'give {least} or more'}")


def refuse_draws(draws: Any, seed: Any = 0, memory_gb: Any = 1.0, samples: Any = 0) -> None:
    """Refuse numbers that a prediction cannot be made with; two draws are the least, as one has no spread and no fair CRPS."""
    whole("draws", draws, 2, "a predictive needs 2 or more (100 are sensible)")
    whole("samples", samples, 0)
    whole("seed", seed, 0)
    if isinstance(memory_gb, bool) or not isinstance(memory_gb, int | float | np.number) or not memory_gb > 0:
        raise UserError(f"memory_gb={memory_gb!r}: give a number of gigabytes above 0, such as 1.0")


def gene_list(genes: Sequence[str] | NDArray[np.str_] | str, what: str) -> NDArray[np.str_]:
    """Names of genes, or of one, as an array [g]; ``what`` is the argument. A set (it has no order) and a gene named twice are errors."""
    if isinstance(genes, set | frozenset):
        raise UserError(f"{what}: is a {type(genes).__name__}, which has no order; give a list, sorted(...) of it say")
    names = np.asarray([genes] if isinstance(genes, str) else genes, dtype=str)
    if names.ndim != 1:
        raise UserError(f"{what}: has shape {names.shape}; give a list of names")
    twice = [gene for gene, number in Counter(names.tolist()).items() if number > 1]
    if twice:
        raise UserError(f"{what}: {len(twice)} genes are named more than once, e.g. {', '.join(twice[:3])}; name each gene once")
    return names

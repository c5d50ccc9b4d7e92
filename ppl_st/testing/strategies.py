"""Hypothesis strategies for count data: numbers, shapes, sparse matrices and cell-by-gene tables.

Each function returns a `hypothesis.strategies.SearchStrategy`. Positive numbers are drawn on a log scale,
a million steps per decade, and shrink towards 1 on a grid of a hundred; logits and locations shrink towards 0. Parameters of a
likelihood are plain floats: `ppl_st.testing.laws` makes the tensors.

Hypothesis comes with ``pip install 'ppl-st[test]'`` and is imported only when a function here is called.
"""

import math
from typing import Any

import numpy as np
import scipy.sparse

from ppl_st.errors import UserError

Strategy = Any  # hypothesis.strategies.SearchStrategy, which must not be imported here


def hypothesis() -> Any:
    """The package `hypothesis` with its strategies, or a `UserError` that says how to get it."""
    try:
        import hypothesis
        import hypothesis.strategies
    except ImportError:
        raise UserError(
            "ppl_st.testing needs the package hypothesis: pip install 'ppl-st[test]' (or pip install hypothesis)."
        ) from None
    return hypothesis


def positive(low: float, high: float) -> Strategy:
    """Floats in [low, high], both > 0, on a log scale; shrink towards 1, and to three digits."""
    if not 0 < low < high:
        raise UserError(f"testing strategy positive: give 0 < low < high, not ({low:g}, {high:g}).")
    st = hypothesis().strategies
    hundredths = st.integers(math.floor(100 * math.log10(low)), math.ceil(100 * math.log10(high)))

    def number(drawn: tuple[int, int]) -> float:
        more, e = drawn  # ten-thousandths of hundredths of a decade: the part that shrinks first
        exact = 10.0 ** ((e + more / 10_000) / 100)
        return min(max(exact if more else float(f"{exact:.3g}"), low), high)

    return st.tuples(st.integers(0, 9999), hundredths).map(number)


def real(low: float, high: float) -> Strategy:
    """Floats in [low, high]; shrink towards 0 (or the end nearest to it)."""
    return hypothesis().strategies.floats(low, high, allow_nan=False, allow_subnormal=False)


def counts(high: int = 1_000_000) -> Strategy:
    """Whole numbers in [0, high] as floats, mostly small."""
    st = hypothesis().strategies
    tops = [top for top in (10, 1000) if top < high] + [high]
    return st.one_of([st.integers(0, top) for top in tops]).map(float)


def means(low: float = 1e-8, high: float = 1e4, *, zero: bool = False) -> Strategy:
    """Means of counts; with `zero` also exactly 0."""
    st = hypothesis().strategies
    return st.one_of(positive(low, high), st.just(0.0)) if zero else positive(low, high)


def dispersions(low: float = 1e-4, high: float = 1e8) -> Strategy:
    """Inverse dispersions theta, Var = mean + mean^2 / theta."""
    return positive(low, high)


def gate_logits(limit: float = 200.0) -> Strategy:
    """Logits of a zero-inflation gate in [-limit, limit]."""
    return real(-limit, limit)


def shapes(max_dims: int = 3, max_side: int = 4) -> Strategy:
    """Tuples of sizes >= 1; () included."""
    st = hypothesis().strategies
    return st.lists(st.integers(1, max_side), max_size=max_dims).map(tuple)


def sparse_counts(max_cells: int = 8, max_genes: int = 8, high: int = 1000) -> Strategy:
    """Count matrices [cells, genes], scipy CSR float32, about two thirds zeros.

    From two rows (columns) on, some rows (columns) may be empty; an empty row and an empty column together
    occur in every second matrix or so. Nothing is stored for a zero.
    """
    st = hypothesis().strategies

    @st.composite
    def build(draw: Any) -> scipy.sparse.csr_matrix:
        n, g = draw(st.integers(1, max_cells)), draw(st.integers(1, max_genes))
        entries = st.one_of(st.just(0), st.just(0), st.integers(0, high))
        table = np.array(draw(st.lists(entries, min_size=n * g, max_size=n * g)), dtype=np.float32).reshape(n, g)
        for size, empty in ((n, lambda i: (i, slice(None))), (g, lambda i: (slice(None), i))):
            for i in draw(st.lists(st.integers(0, size - 1), max_size=max(1, size // 3), unique=True)):
                table[empty(i)] = 0
        return scipy.sparse.csr_matrix(table)

    return build()


def tables(max_cells: int = 8, max_genes: int = 8, high: int = 1000) -> Strategy:
    """AnnData of `sparse_counts` in ``layers["counts"]`` and ``X``, coordinates in ``obsm["spatial"]``.

    Names are ``cell0``, ``cell1``, ... and ``gene0``, ...; coordinates are distinct grid positions.
    """

    def table(matrix: scipy.sparse.csr_matrix) -> Any:
        import anndata
        import pandas as pd

        n, g = matrix.shape
        side = math.ceil(math.sqrt(n))
        xy = np.stack(np.divmod(np.arange(n), side), 1).astype(float)
        return anndata.AnnData(
            X=matrix.copy(),
            obs=pd.DataFrame(index=[f"cell{i}" for i in range(n)]),
            var=pd.DataFrame(index=[f"gene{j}" for j in range(g)]),
            layers={"counts": matrix},
            obsm={"spatial": xy},
        )

    return sparse_counts(max_cells, max_genes, high).map(table)

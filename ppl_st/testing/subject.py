"""What a law is about: a likelihood with its claims, in rows of parameters; and how a broken law is told."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ppl_st.errors import UserError

Support = Literal["count", "real", "positive", "sphere"]
BOTH = (torch.float64, torch.float32)
Row = Mapping[str, Any]  # one set of parameters, {"mean": 2.0, "theta": 1.0}
Rows = Sequence[Row]


class LawBroken(AssertionError):
    """A likelihood does not obey a law; the message has the numbers."""


@dataclass(frozen=True)
class Limit:
    """With the parameters `at`, the subject is another distribution."""

    name: str
    at: Row  # {"theta": 1e9}
    other: Callable[..., Any]  # called with all parameters by name, float64 [n]
    tolerance: float = 1e-3  # of probabilities, and of their logarithms above -30


@dataclass(frozen=True)
class Subject:
    """A likelihood and what is claimed of it.

    `make` gets every parameter by name as a tensor: of shape () for one set, [n] for several (with the parameter's own
    dimensions behind, where a drawn value is a list). It returns a torch or Pyro distribution. Laws whose optional
    field is None or empty are not applied.
    """

    make: Callable[..., Any]
    parameters: Mapping[str, Any]  # name -> strategy; a range in which sums and draws are feasible
    support: Support = "count"
    name: str = "likelihood"
    domain: Mapping[str, Any] | None = None  # strategies over the whole declared domain; default `parameters`
    values: Any = None  # strategy of observations; the default follows `support`
    limits: Sequence[Limit] = field(default=())
    sum_of: Callable[[dict[str, Any], float], Row] | None = None  # (row, c) -> row whose c = a + b is X_a + X_b
    thinned: Callable[[dict[str, Any], float], Row] | None = None  # (row, share) -> row of counts kept with p
    mixed_rate: Callable[..., Any] | None = None  # parameters -> distribution of the rate of a Poisson

    def __post_init__(self) -> None:
        if self.support not in get_args(Support):
            raise UserError(f"{self.name}: unknown support {self.support!r}; there are {', '.join(map(repr, get_args(Support)))}")
        try:
            signature = inspect.signature(self.make)
        except (TypeError, ValueError):  # of some things written in C
            return
        for names in (self.parameters, self.domain or self.parameters):
            try:
                signature.bind(**dict.fromkeys(names))
            except TypeError as error:
                given = ", ".join(names) or "none"
                raise UserError(f"{self.name}: `make` does not take the parameters {given} ({error}); name them as its arguments") from None

    def at(self, row: Row, dtype: torch.dtype = torch.float64) -> Any:
        """The distribution of one set of parameters, batch shape ()."""
        return self.make(**{k: torch.as_tensor(v, dtype=dtype) for k, v in row.items()})

    def batch(self, rows: Rows, dtype: torch.dtype = torch.float64) -> Any:
        """One distribution of batch shape [len(rows)]."""
        return self.make(**columns(rows, dtype))


def columns(rows: Rows, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """{parameter: [n] or [n, ...]} of n rows."""
    return {k: stack([row[k] for row in rows], dtype) for k in rows[0]}


def stack(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers or lists of numbers as one tensor, the first dimension over them."""
    return torch.as_tensor(np.asarray(values, dtype=float), dtype=dtype)


def need(good: Tensor, rows: Rows, say: Callable[..., str]) -> None:
    """Raise `LawBroken` for the first row with an entry that is not good.

    `good` is [..., n], one column per row; ``say(..., i)`` gets the indices of the entry and tells what is wrong.
    """
    bad = (~good).movedim(-1, 0).nonzero()
    if len(bad):
        i, *rest = bad[0].tolist()
        where = "" if len(rows) == 1 else f" (row {i + 1} of {len(rows)}: {dict(rows[i])})"
        raise LawBroken(say(*rest, i) + where)


def near(a: Tensor, b: Tensor, relative: float, absolute: Tensor | float = 0.0) -> Tensor:
    """Where a and b differ by at most relative * max(|a|, |b|) + absolute; equal infinities are near."""
    return ((a - b).abs() <= relative * torch.maximum(a.abs(), b.abs()) + absolute) | (a == b)

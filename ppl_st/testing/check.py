"""Run laws on a likelihood: Hypothesis draws the examples and shrinks the first failure of each law."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_st.errors import UserError
from ppl_st.testing import laws as L
from ppl_st.testing import strategies
from ppl_st.testing.exact import Inconclusive
from ppl_st.testing.laws import LawBroken, Subject

Law = Callable[..., None]

ALL_LAWS: tuple[Law, ...] = (
    L.normalisation, L.moments, L.cdf, L.quantile, L.draw_moments, L.draw_fit, L.gradient, L.finite, L.single_precision, L.limits,
    L.mixture, L.additivity, L.thinning, L.broadcasting, L.permutation, L.mask, L.state, L.copies,
)  # fmt: skip

NEEDS: dict[Law, str] = {  # the optional field of `Subject` without which a law says nothing
    L.limits: "limits",
    L.mixture: "mixed_rate",
    L.additivity: "sum_of",
    L.thinning: "thinned",
}


@dataclass(frozen=True, repr=False)
class Finding:
    """A law that does not hold, with the smallest example found."""

    subject: str
    law: str
    message: str
    example: dict[str, Any]  # the law's arguments: law(subject, **example) repeats the failure

    def __repr__(self) -> str:
        given = "; ".join(f"{k} = {_short(v)}" for k, v in self.example.items())
        return f"{self.subject}: {self.law} broken at {given}: {self.message}"


def applicable(subject: Subject, laws: Sequence[Law] = ALL_LAWS) -> list[Law]:
    """Those laws for which the subject declares what they need."""
    return [law for law in laws if not (law in NEEDS and not getattr(subject, NEEDS[law]))]


def check_likelihood(
    subject: Subject, laws: Sequence[Law] = ALL_LAWS, examples: int = 50, seed: int = 0
) -> list[Finding]:
    """Try every applicable law on `examples` examples each; one finding per law that fails, never stopping early.

    Parameters
    ----------
    subject
        The likelihood with strategies for its parameters and what is claimed of it.
    laws
        Functions of `ppl_st.testing.laws`, or your own with arguments named as there.
    seed
        The same seed gives the same examples and the same findings, as long as the code that is loaded stays the same
        (Hypothesis also tries constants that it finds there). No global random state is changed, and no example
        database is read or written.

    Returns
    -------
    list of Finding
        Empty when all laws hold. A law that raises any other exception is a finding too, and so is one that
        no example could decide.

    Examples
    --------
    >>> from ppl_st.likelihoods import Poisson
    >>> from ppl_st.testing import Subject, check_likelihood, means
    >>> check_likelihood(Subject(Poisson, {"mean": means(1e-8, 100.0)}), examples=5)
    []
    """
    found = [_try(subject, law, examples, seed) for law in applicable(subject, laws)]
    return [finding for finding in found if finding is not None]


def _try(subject: Subject, law: Law, examples: int, seed: int) -> Finding | None:
    hypothesis = strategies.hypothesis()
    last: dict[str, Any] = {}
    decided = 0

    def run(case: dict[str, Any]) -> None:
        nonlocal decided, last
        last = case
        try:
            law(subject, **case)
        except Inconclusive:
            return
        decided += 1

    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    drawn = hypothesis.strategies.fixed_dictionaries(_arguments(subject, law))
    # Hypothesis replays the smallest failing example last, so `last` is the one that the exception is about.
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(drawn)(run)))()
    except LawBroken as broken:
        return Finding(subject.name, law.__name__, str(broken), last)
    except Exception as error:
        if isinstance(error, ExceptionGroup):  # a law that fails only sometimes: Hypothesis wraps what it saw
            error = error.exceptions[0]
        return Finding(subject.name, law.__name__, f"{type(error).__name__}: {error}", last)
    if not decided:
        return Finding(subject.name, law.__name__, "no example could decide it: narrow the parameters' ranges", last)
    return None


def _arguments(subject: Subject, law: Law) -> dict[str, Any]:
    """Strategies for the arguments of a law behind the subject."""
    st = strategies.hypothesis().strategies
    row = st.fixed_dictionaries(dict(subject.parameters))
    wide = st.fixed_dictionaries(dict(subject.domain or subject.parameters))
    value = _values(subject)
    drawn = {
        "row": row,
        "wide": wide,
        "value": value,
        "far": value,
        "cells": st.lists(st.tuples(row, value), min_size=2, max_size=5),
        "parts": st.tuples(*[st.sampled_from([1.0, 2.0, 0.5, 3.0])] * 2),
        "share": st.sampled_from([0.5, 0.1, 0.9]),
    }
    names = list(inspect.signature(law).parameters)[1:]
    unknown = [name for name in names if name not in drawn]
    if unknown:
        raise UserError(f"law {law.__name__}: nothing is known to draw for {unknown}; arguments are named {', '.join(drawn)}.")
    return {name: drawn[name] for name in names}


def _values(subject: Subject) -> Any:
    if subject.values is not None:
        return subject.values
    if subject.support == "count":
        return strategies.counts()
    if subject.support == "real":
        return strategies.real(-1e3, 1e3)
    if subject.support == "positive":
        return strategies.positive(1e-6, 1e6)
    raise UserError(f"{subject.name}: give `values`, a strategy of unit vectors as lists, for support 'sphere'.")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(v) for v in value) + "]"
    return str(value)

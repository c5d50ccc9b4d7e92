"""Run laws on a likelihood: Hypothesis draws grids of parameters and shrinks the first failure of each law.

One Hypothesis example is a grid: it draws some values of every parameter (and of the observation, where a law needs
one), and the law judges every combination of them at once. So 100,000 sets of parameters are some hundred examples. A
failing grid is shrunk like any other example, value by value and list by list, down to the one row that breaks the law.
"""

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ppl_st.errors import UserError
from ppl_st.testing import laws as L
from ppl_st.testing import shape_laws as S
from ppl_st.testing import strategies
from ppl_st.testing.exact import Inconclusive
from ppl_st.testing.subject import LawBroken, Subject

Law = Callable[..., int | None]

ALL_LAWS: tuple[Law, ...] = (
    L.normalisation, L.moments, L.cdf, L.quantile, L.draw_moments, L.draw_fit, L.gradient, L.finite, L.single_precision, L.limits,
    L.mixture, L.additivity, L.thinning, S.broadcasting, S.permutation, S.mask, S.state, S.copies,
)  # fmt: skip

NEEDS: dict[Law, str] = {  # the optional field of `Subject` without which a law says nothing
    L.limits: "limits",
    L.mixture: "mixed_rate",
    L.additivity: "sum_of",
    L.thinning: "thinned",
}

LEAST_GRIDS = 10  # per law, however few rows are asked for
LARGEST_GRID = 300  # rows on average, about


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
    subject: Subject, laws: Sequence[Law] = ALL_LAWS, examples: int = 500, seed: int = 0
) -> list[Finding]:
    """Put every applicable law to at least `examples` sets of parameters; one finding per law that fails.

    Parameters
    ----------
    subject
        The likelihood with strategies for its parameters and what is claimed of it.
    laws
        Functions of `ppl_st.testing.laws` and `shape_laws`, or your own with arguments named as there.
    examples
        Rows that each law must have judged, one row being one set of parameters (and one observation, where the law
        needs it). They come in grids, all combinations of a few drawn values: 500 rows are some ten grids or more.
    seed
        The same seed gives the same examples and the same findings, as long as the code that is loaded stays the same
        (Hypothesis also tries constants that it finds there). No global random state is changed, and no example
        database is read or written.

    Returns
    -------
    list of Finding
        Empty when all laws hold; all laws are tried, also after one failed. A law that raises any other exception is a
        finding too, and so is one that no example could decide.

    Examples
    --------
    >>> from ppl_st.likelihoods import Poisson
    >>> from ppl_st.testing import Subject, check_likelihood, means
    >>> check_likelihood(Subject(Poisson, {"mean": means(1e-8, 100.0)}), examples=50)
    []
    """
    alike: dict[tuple[str, ...], list[Law]] = {}  # laws with the same arguments judge the same grids
    for law in applicable(subject, laws):
        alike.setdefault(_names(law), []).append(law)
    found: dict[Law, Finding] = {}
    for names, group in alike.items():
        remaining = list(group)
        while remaining and (finding := _first(subject, remaining, names, examples, seed)):
            broken, found[broken] = finding
            remaining.remove(broken)
    return [found[law] for law in laws if law in found]


def _first(subject: Subject, laws: list[Law], names: tuple[str, ...], examples: int, seed: int) -> tuple[Law, Finding] | None:
    """The first of these laws that fails, on examples for all of them."""
    hypothesis = strategies.hypothesis()
    last: dict[str, Any] = {}
    judged = dict.fromkeys(laws, 0)
    culprit: Law | None = None

    def run(case: dict[str, Any]) -> None:
        nonlocal last, culprit
        last = case
        for law in [culprit] if culprit else laws:  # after a failure, only whether the smaller example still breaks that law
            if judged[law] >= examples and not culprit:
                continue
            try:
                rows = law(subject, **case)
            except Inconclusive:
                continue
            except Exception:
                culprit = law
                raise
            judged[law] += _size(case) if rows is None else rows

    settings = hypothesis.settings(
        max_examples=max(LEAST_GRIDS, min(100, examples // 200)),
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=hypothesis.Verbosity.quiet,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )
    drawn = _arguments(subject, names, min(examples / LEAST_GRIDS, LARGEST_GRID))
    # Hypothesis replays the smallest failing example last, so `last` is the one that the exception is about.
    try:
        for part in itertools.count():
            before = dict(judged)
            hypothesis.seed(seed * 1_000_003 + part)(settings(hypothesis.given(drawn)(run)))()
            if all(judged[law] >= examples or judged[law] == before[law] for law in laws):
                break
    except Exception as error:
        if isinstance(error, ExceptionGroup):  # a law that fails only sometimes: Hypothesis wraps what it saw
            error = error.exceptions[0]
        assert culprit is not None
        message = str(error) if isinstance(error, LawBroken) else f"{type(error).__name__}: {error}"
        return culprit, Finding(subject.name, culprit.__name__, message, last)
    for law, rows in judged.items():
        if not rows:
            message = "no example could decide it: narrow the parameters' ranges"
            return law, Finding(subject.name, law.__name__, message, last)
    return None


def _names(law: Law) -> tuple[str, ...]:
    """The names of a law's arguments behind the subject."""
    names = tuple(inspect.signature(law).parameters)[1:]
    known = ("rows", "values", "wide", "far", "parts", "share")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"law {law.__name__}: nothing is known to draw for {unknown}; arguments are named {', '.join(known)}.")
    return names


def _size(case: dict[str, Any]) -> int:
    """Rows of a case, for laws that judge all of them."""
    return max((len(v) for k, v in case.items() if k in ("rows", "wide")), default=1)


def _arguments(subject: Subject, names: tuple[str, ...], size: float) -> Any:
    """A strategy of the arguments of a law behind the subject, about `size` rows on average."""
    st = strategies.hypothesis().strategies
    drawn = {
        "parts": st.tuples(*[st.sampled_from([1.0, 2.0, 0.5, 3.0])] * 2),
        "share": st.sampled_from([0.5, 0.1, 0.9]),
    }
    arguments = [st.fixed_dictionaries({name: drawn[name] for name in names if name in drawn})]
    for rows, values, parameters in (("rows", "values", subject.parameters), ("wide", "far", subject.domain or subject.parameters)):
        if rows in names or values in names:
            arguments.append(_grid(subject, dict(parameters), rows, values if values in names else None, size))
    return st.tuples(*arguments).map(lambda parts: {name: value for part in parts for name, value in part.items() if name in names})


def _grid(subject: Subject, parameters: dict[str, Any], rows: str, values: str | None, size: float) -> Any:
    """{rows: all combinations of some drawn values of each parameter, values: the observation of each}."""
    st = strategies.hypothesis().strategies
    axes = [*parameters.values(), *([_values(subject)] if values else [])]

    side = size ** (1 / len(axes))  # values of each

    def some(one: Any) -> Any:
        """Lists of 1 to twice as many values; lists of lists where they are long, because Hypothesis keeps lists short."""
        if side < 7:
            return st.lists(one, min_size=1, max_size=max(2, round(2 * side)))
        most = round(2 * side**0.5)
        lists = st.lists(st.lists(one, min_size=1, max_size=most), min_size=1, max_size=most)
        return lists.map(lambda parts: [value for part in parts for value in part])

    def combined(lists: tuple[list[Any], ...]) -> dict[str, Any]:
        rows_of, observed = [], []
        for combination in itertools.product(*lists):
            rows_of.append(dict(zip(parameters, combination, strict=False)))
            observed.append(combination[-1])
        return {rows: rows_of, **({values: observed} if values else {})}

    return st.tuples(*map(some, axes)).map(combined)


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
        inner = [_short(v) for v in value[:4]] + ([f"... {len(value)} in all"] if len(value) > 4 else [])
        return inner[0] if len(inner) == 1 else "[" + ", ".join(inner) + "]"
    return str(value)

r"""Laws that every likelihood must obey, as plain functions that raise `LawBroken` with the reason.

A law takes a `Subject` and the numbers of one example; the name of each argument says what Hypothesis draws
for it (`DRAWN` in `ppl_st.testing.check`)::

    row     one set of parameters, {"mean": 2.0, "theta": 1.0}     value   one observation
    wide    the same from the whole declared domain                far     one observation to go with it
    cells   some (row, value) pairs, stacked into one batch        parts   two positive numbers
    share   a number in (0, 1)

so a law can be called by hand: ``normalisation(subject, row={"mean": 3.0})``. Exact sums and integrals are in
float64 (`ppl_st.testing.exact`). Laws about draws repeat the same draws for the same example and fail a right
sampler with probability below `FAILURE_RATE` per example: even 100,000 examples of ten likelihoods stay below
1e-6 together.

Not here: vectors in `gradient` (only scalar parameters are perturbed), exact sums of several dimensions apart
from unit vectors of 2 or 3, second derivatives.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors.torch
import scipy.stats
import torch
from torch import Tensor

from ppl_st.testing.exact import Inconclusive, Table, draws_of, surprise, table

FAILURE_RATE = 1e-13
N_DRAWS = 4000
BOTH = (torch.float64, torch.float32)
Row = Mapping[str, Any]


class LawBroken(AssertionError):
    """A likelihood does not obey a law; the message has the numbers."""


@dataclass(frozen=True)
class Limit:
    """With the parameters `at`, the subject is another distribution."""

    name: str
    at: Row  # {"theta": 1e9}
    other: Callable[..., Any]  # called with all parameters by name, float64
    tolerance: float = 1e-3  # of probabilities, and of their logarithms above -30


@dataclass(frozen=True)
class Subject:
    """A likelihood and what is claimed of it.

    `make` gets every parameter by name as a tensor: of shape () for one example, [n] for several (with the
    parameter's own dimensions behind, where a drawn value is a list). It returns a torch or Pyro distribution.
    Laws whose optional field is None or empty are not applied.
    """

    make: Callable[..., Any]
    parameters: Mapping[str, Any]  # name -> strategy; a range in which sums and draws are feasible
    support: Literal["count", "real", "positive", "sphere"] = "count"
    name: str = "likelihood"
    domain: Mapping[str, Any] | None = None  # strategies over the whole declared domain; default `parameters`
    values: Any = None  # strategy of observations; the default follows `support`
    limits: Sequence[Limit] = field(default=())
    sum_of: Callable[[dict[str, Any], float], Row] | None = None  # (row, c) -> row whose c = a + b is X_a + X_b
    thinned: Callable[[dict[str, Any], float], Row] | None = None  # (row, share) -> row of counts kept with p
    mixed_rate: Callable[..., Any] | None = None  # parameters -> distribution of the rate of a Poisson

    def at(self, row: Row, dtype: torch.dtype = torch.float64) -> Any:
        """The distribution of one set of parameters."""
        return self.make(**_tensors(row, dtype))

    def batch(self, rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> Any:
        """One distribution of batch shape [len(rows)]."""
        return self.make(**{k: torch.stack([torch.as_tensor(r[k], dtype=dtype) for r in rows]) for k in rows[0]})


def _tensors(row: Row, dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: torch.as_tensor(v, dtype=dtype) for k, v in row.items()}


def _need(good: bool, message: str) -> None:
    if not good:
        raise LawBroken(message)


def _close(a: float, b: float, relative: float, absolute: float = 0.0) -> bool:
    return abs(a - b) <= relative * max(abs(a), abs(b)) + absolute or a == b


def _read(d: Any, name: str) -> Tensor | None:
    """A moment, or None where the distribution has none or does not define it."""
    try:
        value = getattr(d, name)
    except NotImplementedError:
        return None
    return value if isinstance(value, Tensor) and bool(value.isfinite().all()) else None


def _infinite(d: Any, name: str) -> bool:
    """Whether the distribution says that this moment does not exist or is infinite."""
    try:
        value = getattr(d, name)
    except NotImplementedError:
        return False
    return isinstance(value, Tensor) and not bool(value.isfinite().all())


# ---- one distribution against its own sums ----


def normalisation(subject: Subject, row: Row) -> None:
    """Probabilities are finite and sum (densities: integrate) to one."""
    t = table(subject.at(row), subject.support, checked=False)
    bad = ~t.mass.isfinite()
    _need(not bad.any(), f"log_prob is not finite at {t.points[bad][:1].tolist()}")
    total, tolerance = float(t.mass.sum()), 1e-6 if subject.support == "count" else 1e-4
    _need(_close(total, 1.0, 0, tolerance), f"the probabilities sum to {total:.8g}")


def moments(subject: Subject, row: Row) -> None:
    """`.mean` and `.variance` are those of the probabilities."""
    d = subject.at(row)
    t = table(d, subject.support)
    total = float(t.mass.sum())
    for name in ("mean", "variance"):
        claimed = _read(d, name)
        if claimed is None:
            continue
        for axis, points in enumerate(t.points.reshape(len(t.points), -1).T):
            mean, spread = t.mean(points), t.mean(points**2) ** 0.5
            # Not divided by the total: a pmf that is only nearly normalised keeps its own moments.
            exact = mean * total if name == "mean" else t.mean((points - mean) ** 2)
            got, scale = float(claimed.reshape(-1)[axis]), 1e-6 * (spread if name == "mean" else spread**2)
            _need(_close(got, exact, 1e-5, scale), f".{name} is {got:.8g}, the probabilities say {exact:.8g}")


def cdf(subject: Subject, row: Row) -> None:
    """`.cdf`, where there is one, is the sum of the probabilities below."""
    d = subject.at(row)
    t = table(d, subject.support)
    if t.points.dim() > 1:
        return
    below = t.below() - (0 if subject.support == "count" else t.mass / 2)
    where = torch.searchsorted(below, torch.tensor([0.0, 0.01, 0.2, 0.5, 0.8, 0.99]).double())
    where = where.clamp(max=len(below) - 1).unique()
    try:
        got = d.cdf(t.points[where])
    except NotImplementedError:
        return
    for x, a, b in zip(t.points[where].tolist(), got.tolist(), below[where].tolist(), strict=True):
        _need(_close(a, b, 0, 2e-4 if subject.support != "count" else 1e-7), f"cdf({x:g}) is {a:.8g}, not {b:.8g}")


def quantile(subject: Subject, row: Row) -> None:
    """`.icdf`, where there is one, is the inverse of `.cdf`: for counts the smallest one that reaches the share."""
    d = subject.at(row)
    shares = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99], dtype=torch.float64)
    try:
        x = d.icdf(shares)
        below = d.cdf(x)
        before = d.cdf(x - 1) if subject.support == "count" else None
    except NotImplementedError:
        return
    for i, (share, value, a) in enumerate(zip(shares.tolist(), x.tolist(), below.tolist(), strict=True)):
        if before is None:
            _need(_close(a, share, 1e-5, 1e-9), f"cdf(icdf({share:g}) = {value:.6g}) is {a:.8g}")
        else:
            low = before[i].item() if value > 0 else 0.0
            _need(low < share <= a, f"icdf({share:g}) is {value:g}, where cdf goes from {low:.8g} to {a:.8g}")


# ---- draws ----


def _drawn(subject: Subject, row: Row, law: str) -> tuple[Tensor, Table] | None:
    d = subject.at(row)
    t = table(d, subject.support)
    x = draws_of(d, N_DRAWS, law)
    if x is None:
        return None
    _need(x.shape == (N_DRAWS, *d.event_shape), f"sample(({N_DRAWS},)) has shape {tuple(x.shape)}")
    return x.double(), t


def draw_moments(subject: Subject, row: Row) -> None:
    """The mean of many draws, and of their squares, is near the claimed one (Chernoff bound)."""
    drawn = _drawn(subject, row, "draw_moments")
    if drawn is None:
        return
    draws, t = drawn
    d = subject.at(row)
    claimed = _read(d, "mean")
    infinite = [_infinite(d, name) for name in ("mean", "variance")]
    if infinite[0]:  # draws that have no mean say nothing
        return
    for axis, points in enumerate(t.points.reshape(len(t.points), -1).T):
        x, centre = draws.reshape(len(draws), -1)[:, axis], t.mean(points)
        if claimed is not None:
            # The claimed mean stands where the exact one does: the bound is for the distance between the two.
            says = float(claimed.reshape(-1)[axis])
            p = surprise(t, points, float(x.mean()) - says + centre, N_DRAWS)
            _need(p > FAILURE_RATE, f"{N_DRAWS} draws have mean {x.mean():.6g}, .mean says {says:.6g}; p < {p:.1g}")
        if infinite[1]:
            continue
        squares = float(((x - centre) ** 2).mean())
        p = surprise(t, (points - centre) ** 2, squares, N_DRAWS)
        exact = t.mean((points - centre) ** 2)
        _need(p > FAILURE_RATE, f"{N_DRAWS} draws have variance {squares:.6g}, log_prob says {exact:.6g}; p < {p:.1g}")


def draw_fit(subject: Subject, row: Row) -> None:
    """The share of draws below each of a dozen thresholds is binomial with the exact probability."""
    drawn = _drawn(subject, row, "draw_fit")
    if drawn is None or drawn[1].points.dim() > 1:
        return
    draws, t = drawn
    _need(bool(draws.isfinite().all()), "draws that are not finite")
    if subject.support == "count":
        _need(bool(((draws >= 0) & (draws == draws.floor())).all()), "draws that are not counts")
        below = t.below()
    else:  # thresholds halfway between nodes: the trapezoidal masses up to there
        below, t = t.below(), t._replace(points=(t.points + torch.cat([t.points[1:], t.points[-1:]])) / 2)
    levels = torch.tensor([0.0, 0.003, 0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.98, 0.997]).double()
    where = torch.searchsorted(below, levels).clamp(max=len(below) - 1).unique()
    for threshold, share in zip(t.points[where].tolist(), below[where].clamp(0, 1).tolist(), strict=True):
        k = int((draws <= threshold).sum())
        p = 2 * min(scipy.stats.binom.cdf(k, N_DRAWS, share), scipy.stats.binom.sf(k - 1, N_DRAWS, share))
        _need(
            p * len(where) > FAILURE_RATE,
            f"{k} of {N_DRAWS} draws are <= {threshold:.6g}, where log_prob expects {share * N_DRAWS:.6g}",
        )


# ---- derivatives and precision ----


def gradient(subject: Subject, row: Row, value: Any) -> None:
    """Autograd agrees with central differences of log_prob, in float64, for every scalar parameter.

    Of several step sizes the one counts at which two neighbouring ones agree best.
    """
    leaves = {k: v.requires_grad_() for k, v in _tensors(row, torch.float64).items()}
    x = torch.as_tensor(value, dtype=torch.float64)
    log_p = subject.make(**leaves).log_prob(x)
    slopes: Sequence[Tensor | None] = [None] * len(leaves)
    if log_p.requires_grad:
        slopes = torch.autograd.grad(log_p, list(leaves.values()), allow_unused=True)
    for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
        if leaf.dim() or leaf == 0:
            continue
        got = 0.0 if slope is None else float(slope)
        theta, estimates = leaf.item(), []
        for h in (abs(theta) * 10 ** (-k / 2) for k in range(4, 13)):
            try:
                up, down = (float(subject.at({**row, name: theta + s * h}).log_prob(x)) for s in (1, -1))
            except ValueError:  # a step out of the domain
                continue
            estimates.append((h, (up - down) / (2 * h)))
        pairs = [(abs(a[1] - b[1]), *b) for a, b in itertools.pairwise(estimates)]
        if not pairs or not all(p[0] < float("inf") for p in pairs):
            raise Inconclusive("no finite differences")
        error, h, difference = min(pairs)
        rounding = 30 * error + 1e-14 * max(1.0, abs(log_p.item())) / h
        _need(_close(got, difference, 1e-4, rounding), f"d log_prob / d {name} is {got:.6g}, differences say {difference:.6g}")


def finite(subject: Subject, wide: Row, far: Any) -> None:
    """log_prob and its gradient are finite on the whole declared domain, in float64 and in float32."""
    for dtype in BOTH:
        leaves = {k: v.requires_grad_() for k, v in _tensors(wide, dtype).items()}
        log_p = subject.make(**leaves).log_prob(torch.as_tensor(far, dtype=dtype))
        _need(bool(log_p.isfinite()), f"log_prob is {log_p.item()} in {dtype}")
        if not log_p.requires_grad:
            continue
        slopes = torch.autograd.grad(log_p, list(leaves.values()), allow_unused=True)
        for name, slope in zip(leaves, slopes, strict=True):
            if slope is not None and not bool(slope.isfinite().all()):
                raise LawBroken(f"d log_prob / d {name} is {slope.tolist()} in {dtype}")


def single_precision(subject: Subject, wide: Row, far: Any) -> None:
    """float32 and float64 give the same log_prob to 2e-3 + 1e-5 |log_prob|, for the same float32 inputs."""
    row = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in wide.items()}
    x = torch.as_tensor(far, dtype=torch.float32)
    low, high = subject.at(row, torch.float32).log_prob(x), subject.at(row).log_prob(x.double())
    _need(low.dtype == torch.float32, f"log_prob of float32 parameters is {low.dtype}")
    if bool(high.isfinite()):  # else the law `finite` has the case
        a, b = float(low), float(high)
        _need(_close(a, b, 1e-5, 2e-3), f"log_prob is {a:.6g} in float32 and {b:.6g} in float64")


# ---- relations between distributions ----


def limits(subject: Subject, row: Row, value: Any) -> None:
    """At its declared limits the subject is the other distribution, in float64 and in float32."""
    for limit in subject.limits:
        there = {**row, **limit.at}
        b = float(limit.other(**_tensors(there, torch.float64)).log_prob(torch.as_tensor(value, dtype=torch.float64)))
        for dtype in BOTH:
            a = float(subject.at(there, dtype).log_prob(torch.as_tensor(value, dtype=dtype)))
            p, q = torch.tensor([a, b], dtype=torch.float64).exp().tolist()
            same = _close(p, q, 0, limit.tolerance) and (b < -30 or _close(a, b, limit.tolerance, limit.tolerance))
            _need(same, f"limit {limit.name!r}: log_prob is {a:.6g} in {dtype}, the limit's is {b:.6g}")


def _agree(d: Any, points: Tensor, expected: Tensor, what: str) -> None:
    got = d.log_prob(points).exp()
    for x, a, b in zip(points.tolist(), got.tolist(), expected.tolist(), strict=True):
        _need(_close(a, b, 1e-4, 1e-13), f"p({x:g}) is {a:.8g}, {what} {b:.8g}")


def _typical(t: Table, support: str) -> Tensor:
    """A handful of points at quantiles, and the smallest counts."""
    levels = torch.tensor([0.02, 0.3, 0.5, 0.7, 0.98], dtype=torch.float64)
    points = t.points[torch.searchsorted(t.below(), levels).clamp(max=len(t.points) - 1)]
    if support == "count":
        points = torch.cat([points, t.points[:3]])
    return points.unique()


def mixture(subject: Subject, row: Row) -> None:
    """A Poisson whose rate is drawn from `mixed_rate` has the subject's probabilities."""
    assert subject.mixed_rate is not None
    d = subject.at(row)
    x = _typical(table(d, "count"), "count")
    rates = table(subject.mixed_rate(**_tensors(row, torch.float64)), "positive")
    terms = torch.xlogy(x[:, None], rates.points) - rates.points - torch.lgamma(x + 1)[:, None]
    _agree(d, x, (terms.exp() * rates.mass).sum(1), "the mixture has")


def additivity(subject: Subject, row: Row, parts: tuple[float, float]) -> None:
    """X_a + X_b has the distribution of X_{a+b}, X_c having parameters ``sum_of(row, c)``."""
    assert subject.sum_of is not None
    one, two, both = (subject.at(subject.sum_of(dict(row), c)) for c in (*parts, sum(parts)))
    x = _typical(table(both, subject.support), subject.support)
    t = table(one, subject.support)
    t = Table(t.points[t.mass > 1e-30], t.mass[t.mass > 1e-30])
    rest = x[:, None] - t.points
    inside = torch.ones_like(rest, dtype=torch.bool) if subject.support == "real" else rest >= 0
    p = two.log_prob(torch.where(inside, rest, rest.new_ones(()))).exp() * inside
    _agree(both, x, (p * t.mass).sum(1), f"that of the sum of parts {parts[0]:g} and {parts[1]:g}")


def thinning(subject: Subject, row: Row, share: float) -> None:
    """Counts kept one by one with probability `share` have parameters ``thinned(row, share)``."""
    assert subject.thinned is not None
    thin = subject.at(subject.thinned(dict(row), share))
    k = _typical(table(thin, "count"), "count")
    t = table(subject.at(row), "count")
    x, mass = t.points[t.mass > 1e-30], t.mass[t.mass > 1e-30]
    kept = torch.from_numpy(scipy.stats.binom.pmf(k[:, None].numpy(), x.numpy(), share))
    _agree(thin, k, (kept * mass).sum(1), "that of the thinned counts")


# ---- shapes and state ----

Cells = Sequence[tuple[Row, Any]]


def _stacked(subject: Subject, cells: Cells, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
    rows, values = zip(*cells, strict=True)
    return subject.batch(rows, dtype), torch.stack([torch.as_tensor(v, dtype=dtype) for v in values])


def _same(a: Tensor, b: Tensor, what: str) -> None:
    relative = 1e-4 if a.dtype == torch.float32 else 1e-7
    good = a.shape == b.shape and torch.allclose(a, b, rtol=relative, atol=1e-9, equal_nan=True)
    _need(good, f"{what}: log_prob is {a.tolist()}, it was {b.tolist()}")


def broadcasting(subject: Subject, cells: Cells) -> None:
    """n values under n sets of parameters are n terms; a column [n, 1] of them is an error, not n^2 terms."""
    d, x = _stacked(subject, cells)
    n = len(cells)
    for lead in ((), (3,)):
        got = d.log_prob(x.expand(*lead, *x.shape)).shape
        _need(got == (*lead, n), f"log_prob of values {(*lead, *x.shape)} under batch ({n},) has shape {tuple(got)}")
    try:
        got = d.log_prob(x.unsqueeze(1)).shape
    except Exception:  # whichever way it refuses
        return
    raise LawBroken(f"values of shape {tuple(x.unsqueeze(1).shape)} under batch ({n},) are scored as {tuple(got)}")


def permutation(subject: Subject, cells: Cells) -> None:
    """Each entry is scored by its own parameters: alone, together and in any order."""
    d, x = _stacked(subject, cells)
    together = d.log_prob(x)
    reverse, y = _stacked(subject, cells[::-1])
    _same(reverse.log_prob(y).flip(0), together, "in reverse order")
    alone = torch.stack([subject.at(row).log_prob(v) for (row, _), v in zip(cells, x, strict=True)])
    _same(alone, together, "one by one")


def mask(subject: Subject, cells: Cells) -> None:
    """Masked entries count nothing and have gradient zero; the others stay as they are."""
    rows, _ = zip(*cells, strict=True)
    leaves = {k: torch.stack([torch.as_tensor(r[k], dtype=torch.float64) for r in rows]) for k in rows[0]}
    d, x = subject.make(**{k: v.requires_grad_() for k, v in leaves.items()}), _stacked(subject, cells)[1]
    if not hasattr(d, "mask"):  # plain torch.distributions
        return
    keep = torch.arange(len(cells)) % 2 == 0
    plain = d.log_prob(x)
    for masked in (d.mask(keep), d.expand((len(cells),)).mask(keep)):
        got = masked.log_prob(x)
        _same(got.detach(), torch.where(keep, plain, 0.0).detach(), f"under the mask {keep.tolist()}")
        if got.requires_grad:
            slopes = torch.autograd.grad(got.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
            for name, slope in zip(leaves, slopes, strict=True):
                hidden = slope is None or bool((slope[~keep] == 0).all())
                _need(hidden, f"masked entries have a gradient by {name}")


def _uses(x: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Ways of reading a distribution that must leave it as it is."""
    return {
        "log_prob": lambda d: d.log_prob(x),
        "mean": lambda d: d.mean,
        "variance": lambda d: d.variance,
        "sample": lambda d: draws_of(d, 3, "state"),
        "cdf": lambda d: d.cdf(x),
        "expand": lambda d: d.expand((2,)).log_prob(x),
        "the parameters": lambda d: [getattr(d, name, None) for name in d.arg_constraints],
    }


def _used(subject: Subject, params: dict[str, Tensor], x: Tensor) -> Iterator[tuple[str, Any]]:
    for name, use in _uses(x).items():
        d = subject.make(**params)
        try:
            use(d)
        except NotImplementedError:
            continue
        yield name, d


def state(subject: Subject, row: Row, value: Any) -> None:
    """Moments, draws, expansion and log_prob itself leave log_prob, the parameters and the value as they were."""
    for dtype in BOTH:
        params, x = _tensors(row, dtype), torch.as_tensor(value, dtype=dtype)
        kept = {k: v.clone() for k, v in params.items()}
        before = subject.make(**params).log_prob(x)
        for name, d in _used(subject, params, x):
            _same(d.log_prob(x), before, f"after reading {name}")
        changed = [k for k in params if not torch.equal(params[k], kept[k])]
        _need(not changed, f"the parameters {changed} were changed in place")
        _need(torch.equal(x, torch.as_tensor(value, dtype=dtype)), "the value was changed in place")


def copies(subject: Subject, row: Row, value: Any) -> None:
    """Deep copies, expansions and parameters saved and loaded give the same log_prob, also after reading moments."""
    for dtype in BOTH:
        params, x = _tensors(row, dtype), torch.as_tensor(value, dtype=dtype)
        before = subject.make(**params).log_prob(x)
        saved = safetensors.torch.load(safetensors.torch.save(params))
        _same(subject.make(**saved).log_prob(x), before, "with saved and loaded parameters")
        for name, d in _used(subject, params, x):
            _same(copy.deepcopy(d).log_prob(x), before, f"in a deep copy after reading {name}")
            _same(d.expand((2,)).log_prob(x), before.expand(2), f"expanded after reading {name}")

r"""Laws that every likelihood must obey, as plain functions that raise `LawBroken` with the reason.

A law takes a `Subject` and the numbers of one example, which is many sets of parameters at once; the name of each
argument says what `ppl_st.testing.check` draws for it::

    rows    sets of parameters, [{"mean": 2.0, "theta": 1.0}, ...]   values   one observation for each
    wide    the same from the whole declared domain                  far      one observation for each of those
    parts   two positive numbers                                     share    a number in (0, 1)

so a law can be called by hand: ``normalisation(subject, rows=[{"mean": 3.0}])``. Each row is judged on its own. A
law that sums returns how many rows it could judge, and raises `Inconclusive` if that is none; others judge all.
Exact sums and integrals are in float64 (`ppl_st.testing.exact`). Laws about draws repeat the same draws for the same
example and fail a right sampler with probability below `FAILURE_RATE` per row: 100,000 rows of each of twelve
likelihoods under both of them stay below 1e-6 together.

Not here: vectors in `gradient` (only scalar parameters are perturbed), exact sums of several dimensions apart
from unit vectors of 2 or 3, second derivatives. Shapes, masks and state: `ppl_st.testing.shape_laws`.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from ppl_st.testing.exact import FINE_NODES, Inconclusive, Table, draws_of, surprise, tables
from ppl_st.testing.subject import BOTH, Row, Rows, Subject, columns, near, need, stack

FAILURE_RATE = 1e-13  # of a law about draws, per row
N_DRAWS = 4000


def _read(d: Any, name: str) -> Tensor | None:
    """A moment with NaN where the distribution has none, or None where it does not define it."""
    try:
        value = getattr(d, name)
    except NotImplementedError:
        return None
    return value.double() if isinstance(value, Tensor) else None


def _judged(rows: int) -> int:
    if not rows:
        raise Inconclusive("no row could be summed")
    return rows


def _summed(
    subject: Subject, rows: Rows, *, checked: bool = True
) -> Iterator[tuple[list[int], list[Row], Any, Table]]:
    """Indices and rows that could be summed, in groups, with their distribution and its table."""
    for index, d, t in tables(lambda i: subject.batch([rows[k] for k in i]), len(rows), subject.support, checked=checked):
        yield index, [rows[k] for k in index], d, t


# ---- one distribution against its own sums ----


def normalisation(subject: Subject, rows: Rows) -> int:
    """Probabilities are finite and sum (densities: integrate) to one."""
    judged = 0
    for _, part, _, t in _summed(subject, rows, checked=False):
        need(t.mass.isfinite(), part, lambda k, i, t=t: f"log_prob is not finite at {t.points[k, i].tolist()}")
        total, tolerance = t.mass.sum(0), 1e-6 if subject.support == "count" else 1e-4
        need((total - 1).abs() <= tolerance, part, lambda i, total=total: f"the probabilities sum to {total[i]:.8g}")
        judged += len(part)
    return _judged(judged)


def moments(subject: Subject, rows: Rows) -> int:
    """`.mean` and `.variance` are those of the probabilities; one that is not finite may be right for a density, not for counts, which are summed to
    their end.
    """
    judged = 0
    for _, part, d, t in _summed(subject, rows):
        total = t.mass.sum(0)
        for name in ("mean", "variance"):
            claimed = _read(d, name)
            if claimed is None:
                continue
            for axis, points in t.axes():
                mean, spread = t.mean(points), t.mean(points**2).sqrt()
                # Not divided by the total: a pmf that is only nearly normalised keeps its own moments.
                exact = mean * total if name == "mean" else t.mean((points - mean) ** 2)
                got, scale = claimed.reshape(len(part), -1)[:, axis], 1e-6 * (spread if name == "mean" else spread**2)
                need(
                    near(got, exact, 1e-5, scale) | (~got.isfinite() & (subject.support != "count")),
                    part,
                    lambda i, name=name, got=got, exact=exact: f".{name} is {got[i]:.8g}, the probabilities say {exact[i]:.8g}",
                )
        judged += len(part)
    return _judged(judged)


def cdf(subject: Subject, rows: Rows) -> int | None:
    """`.cdf`, where there is one, is the sum of the probabilities below."""
    judged = 0
    for _, part, d, t in _summed(subject, rows):
        if t.points.dim() > 2:
            return None
        below = t.below() - (0 if subject.support == "count" else t.mass / 2)
        where = t.reaching([0.0, 0.01, 0.2, 0.5, 0.8, 0.99], below)
        x, exact = t.points.gather(0, where), below.gather(0, where)
        try:
            got = d.cdf(x)
        except NotImplementedError:
            return None
        need(
            near(got, exact, 0, 2e-4 if subject.support != "count" else 1e-7),
            part,
            lambda k, i, x=x, got=got, exact=exact: f"cdf({x[k, i]:g}) is {got[k, i]:.8g}, not {exact[k, i]:.8g}",
        )
        judged += len(part)
    return _judged(judged)


def quantile(subject: Subject, rows: Rows) -> None:
    """`.icdf`, where there is one, is the inverse of `.cdf`: for counts the smallest one that reaches the share."""
    d, levels = subject.batch(rows), [0.01, 0.2, 0.5, 0.8, 0.99]
    shares = torch.tensor(levels, dtype=torch.float64)[:, None].expand(-1, len(rows))
    try:
        x = d.icdf(shares)
        at = d.cdf(x)
        before = d.cdf(x - 1) if subject.support == "count" else None
    except NotImplementedError:
        return
    if before is None:
        good = near(at, shares, 1e-5, 1e-9)
        need(good, rows, lambda k, i: f"cdf(icdf({levels[k]:g}) = {x[k, i]:.6g}) is {at[k, i]:.8g}")
    else:
        low = torch.where(x > 0, before, 0.0)
        need(
            (low < shares) & (shares <= at),
            rows,
            lambda k, i: f"icdf({levels[k]:g}) is {x[k, i]:g}, where cdf goes from {low[k, i]:.8g} to {at[k, i]:.8g}",
        )


# ---- draws ----


def _drawn(subject: Subject, rows: Rows, law: str) -> Iterator[tuple[list[Row], Any, Table, Tensor]]:
    for _, part, d, t in _summed(subject, rows):
        x = draws_of(d, N_DRAWS, law)
        if x is None:
            return
        wanted = (N_DRAWS, len(part), *d.event_shape)
        need(torch.full((len(part),), x.shape == wanted), part, lambda _, x=x: f"sample(({N_DRAWS},)) has shape {tuple(x.shape)}")
        yield part, d, t, x.double()


def draw_moments(subject: Subject, rows: Rows) -> int | None:
    """The mean of many draws, and of their squares, is near the claimed one (Chernoff bound)."""
    judged = 0
    for part, d, t, draws in _drawn(subject, rows, "draw_moments"):
        claimed, variance = _read(d, "mean"), _read(d, "variance")
        for axis, points in t.axes():
            x, centre = draws.reshape(*draws.shape[:2], -1)[..., axis], t.mean(points)
            if claimed is not None:  # draws that have no mean say nothing
                # The claimed mean stands where the exact one does: the bound is for the distance between the two.
                says = claimed.reshape(len(part), -1)[:, axis]
                p = _surprises(points, t.mass, x.mean(0) - says + centre)
                need(
                    p * 6 > FAILURE_RATE,  # two tests on each of up to three axes
                    part,
                    lambda i, x=x, says=says, p=p: (
                        f"{N_DRAWS} draws have mean {x[:, i].mean():.6g}, .mean says {says[i]:.6g}; p < {p[i]:.1g}"
                    ),
                )
            squares, deviation = ((x - centre) ** 2).mean(0), (points - centre) ** 2
            if variance is not None:  # where it does not exist, squares say nothing
                known = variance.reshape(len(part), -1)[:, axis].isfinite()
                squares = torch.where(known, squares, t.mean(deviation))
            p, exact = _surprises(deviation, t.mass, squares), t.mean(deviation)
            need(
                p * 6 > FAILURE_RATE,
                part,
                lambda i, p=p, squares=squares, exact=exact: (
                    f"{N_DRAWS} draws have variance {squares[i]:.6g}, log_prob says {exact[i]:.6g}; p < {p[i]:.1g}"
                ),
            )
        judged += len(part)
    return judged or None


def _surprises(points: Tensor, mass: Tensor, means: Tensor) -> Tensor:
    """`surprise` of each column [n]; 1 where the mean is not finite or within five standard errors, which is never rare enough."""
    total = mass.sum(0)
    centre = (mass * points).sum(0) / total
    error = ((mass * (points - centre) ** 2).sum(0) / total / N_DRAWS).sqrt()
    out = torch.ones_like(means)
    for i in (means.isfinite() & ~((means - centre).abs() <= 5 * error)).nonzero()[:, 0].tolist():
        out[i] = surprise(points[:, i], mass[:, i], float(means[i]), N_DRAWS)
    return out


def draw_fit(subject: Subject, rows: Rows) -> int | None:
    """The share of draws below each of a dozen thresholds is binomial with the exact probability."""
    levels = [0.0, 0.003, 0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9, 0.98, 0.997]
    judged = 0
    for part, _, t, draws in _drawn(subject, rows, "draw_fit"):
        if t.points.dim() > 2:
            return None
        need(draws.isfinite(), part, lambda *_: "draws that are not finite")
        below, points = t.below(), t.points
        if subject.support == "count":
            need((draws >= 0) & (draws == draws.floor()), part, lambda *_: "draws that are not counts")
        else:  # thresholds halfway between nodes: the trapezoidal masses up to there
            points = (points + torch.cat([points[1:], points[-1:]])) / 2
        where = t.reaching(levels, below)
        thresholds, shares = points.gather(0, where), below.gather(0, where).clamp(0, 1)
        found = torch.stack([(draws <= threshold).sum(0) for threshold in thresholds])
        unseen = (1 - t.mass.sum(0)).abs()  # beyond the last number before a bound, say: on either side of any threshold
        k, low, high = found.numpy(), (shares - unseen).clamp(min=0).numpy(), (shares + unseen).clamp(max=1).numpy()
        p = 2 * torch.from_numpy(scipy.stats.binom.cdf(k, N_DRAWS, low)).minimum(
            torch.from_numpy(scipy.stats.binom.sf(k - 1, N_DRAWS, high))
        )
        need(
            p * len(levels) > FAILURE_RATE,
            part,
            lambda k, i, found=found, thresholds=thresholds, shares=shares: (
                f"{found[k, i]} of {N_DRAWS} draws are <= {thresholds[k, i]:.6g}, where log_prob expects {shares[k, i] * N_DRAWS:.6g}"
            ),
        )
        judged += len(part)
    return judged or None


# ---- derivatives and precision ----


def _slopes(log_p: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The slope of each row's log_prob by its own parameters (each depends on its own row only: the law `permutation`)."""
    if not log_p.requires_grad:
        return dict.fromkeys(leaves)
    return dict(zip(leaves, torch.autograd.grad(log_p.sum(), list(leaves.values()), allow_unused=True), strict=True))


def _log_prob(subject: Subject, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """log_prob [n], NaN at rows that the distribution refuses."""
    try:
        return subject.make(**params).log_prob(x)
    except ValueError:
        if len(x) == 1:
            return torch.full((1,), torch.nan, dtype=torch.float64)
    half = len(x) // 2
    sides = (slice(None, half), slice(half, None))
    return torch.cat([_log_prob(subject, {k: v[side] for k, v in params.items()}, x[side]) for side in sides])


def gradient(subject: Subject, rows: Rows, values: Sequence[Any]) -> int:
    """Autograd agrees with central differences of log_prob, in float64, for every scalar parameter.

    Of several step sizes the one counts at which two neighbouring ones agree best.
    """
    params, x = columns(rows), stack(values)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    log_p = subject.make(**leaves).log_prob(x)
    slopes, log_p = _slopes(log_p, leaves), log_p.detach()
    judged = torch.ones(len(rows), dtype=torch.bool)
    for name, theta in params.items():
        if theta.dim() > 1:
            continue
        steps = torch.stack([theta.abs() * 10 ** (-k / 2) for k in range(4, 13)])  # [9, n]
        up, down = (
            torch.stack([_log_prob(subject, {**params, name: theta + sign * h}, x) for h in steps]) for sign in (1, -1)
        )
        estimates = (up - down) / (2 * steps)
        error, best = (estimates[1:] - estimates[:-1]).abs().nan_to_num(torch.inf, torch.inf).min(0)
        difference = estimates[1:].gather(0, best[None])[0]
        h = steps[1:].gather(0, best[None])[0]
        rounding = 30 * error + 1e-14 * log_p.abs().clamp(min=1) / h
        slope = slopes[name]
        got = torch.zeros_like(theta) if slope is None else slope
        known = error.isfinite() | (theta == 0)
        need(
            near(got, difference, 1e-4, rounding) | ~known | (theta == 0),
            rows,
            lambda i, name=name, got=got, difference=difference: (
                f"d log_prob / d {name} is {got[i]:.6g}, differences say {difference[i]:.6g}"
            ),
        )
        judged &= known
    if not judged.any():
        raise Inconclusive("no finite differences")
    return int(judged.sum())


def finite(subject: Subject, wide: Rows, far: Sequence[Any]) -> None:
    """log_prob and its gradient are finite on the whole declared domain, in float64 and in float32."""
    for dtype in BOTH:
        leaves = {k: v.clone().requires_grad_() for k, v in columns(wide, dtype).items()}
        log_p = subject.make(**leaves).log_prob(stack(far, dtype))
        need(log_p.isfinite(), wide, lambda i, p=log_p: f"log_prob is {p[i].item()} in {p.dtype}")
        for name, slope in _slopes(log_p, leaves).items():
            if slope is not None:
                good = slope.isfinite().reshape(len(wide), -1).all(1)
                need(good, wide, lambda i, n=name, s=slope: f"d log_prob / d {n} is {s[i].tolist()} in {s.dtype}")


def single_precision(subject: Subject, wide: Rows, far: Sequence[Any]) -> None:
    """float32 and float64 give the same log_prob to 2e-3 + 1e-5 |log_prob|, for the same float32 inputs."""
    params, x = columns(wide, torch.float32), stack(far, torch.float32)
    low = subject.make(**params).log_prob(x)
    high = subject.make(**{k: v.double() for k, v in params.items()}).log_prob(x.double())
    need(torch.full((len(wide),), low.dtype == torch.float32), wide, lambda _: f"log_prob of float32 parameters is {low.dtype}")
    # Where it is not finite in float64 the law `finite` has the case.
    good = near(low.double(), high, 1e-5, 2e-3) | ~high.isfinite()
    need(good, wide, lambda i: f"log_prob is {low[i]:.6g} in float32 and {high[i]:.6g} in float64")


# ---- relations between distributions ----


def limits(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """At its declared limits the subject is the other distribution, in float64 and in float32."""
    for limit in subject.limits:
        there = [{**row, **limit.at} for row in rows]
        b = limit.other(**columns(there)).log_prob(stack(values)).expand(len(rows))
        for dtype in BOTH:
            a = subject.batch(there, dtype).log_prob(stack(values, dtype)).double()
            same = near(a.exp(), b.exp(), 0, limit.tolerance) & ((b < -30) | near(a, b, limit.tolerance, limit.tolerance))
            need(
                same,
                rows,
                lambda i, name=limit.name, a=a, b=b, dtype=dtype: (
                    f"limit {name!r}: log_prob is {a[i]:.6g} in {dtype}, the limit's is {b[i]:.6g}"
                ),
            )


def _agree(d: Any, points: Tensor, expected: Tensor, rows: Rows, what: str) -> None:
    got = d.log_prob(points).exp()
    need(
        near(got, expected, 1e-4, 1e-13),
        rows,
        lambda k, i: f"p({points[k, i]:g}) is {got[k, i]:.8g}, {what} {expected[k, i]:.8g}",
    )


def _typical(t: Table, support: str) -> Tensor:
    """A handful of points [L, n] at quantiles, and the smallest counts."""
    points = t.points.gather(0, t.reaching([0.02, 0.3, 0.5, 0.7, 0.98], t.below()))
    return torch.cat([points, t.points[:3]]) if support == "count" else points


def mixture(subject: Subject, rows: Rows) -> int:
    """A Poisson whose rate is drawn from `mixed_rate` has the subject's probabilities."""
    mixed_rate = subject.mixed_rate
    assert mixed_rate is not None

    def rate(rows: Rows, index: list[int]) -> Any:
        return mixed_rate(**columns([rows[k] for k in index]))

    judged = 0
    for _, part, _, t in _summed(subject, rows):
        x = _typical(t, "count")
        for index, _, rates in tables(partial(rate, part), len(part), "positive", nodes=FINE_NODES):
            own = [part[k] for k in index]
            log_rate = rates.points.log()
            terms = [torch.exp(k * log_rate - rates.points - torch.lgamma(k + 1)) * rates.mass for k in x[:, index]]
            _agree(subject.batch(own), x[:, index], torch.stack([term.sum(0) for term in terms]), own, "the mixture has")
            judged += len(own)
    return _judged(judged)


def additivity(subject: Subject, rows: Rows, parts: tuple[float, float]) -> int:
    """X_a + X_b has the distribution of X_{a+b}, X_c having parameters ``sum_of(row, c)``."""
    sum_of = subject.sum_of
    assert sum_of is not None
    one, two, both = ([sum_of(dict(row), c) for row in rows] for c in (*parts, sum(parts)))
    what = f"that of the sum of parts {parts[0]:g} and {parts[1]:g}"
    judged = 0
    for index, _, _, t in _summed(subject, both):
        x = _typical(t, subject.support)
        for inner, own, _, t_one in _summed(subject, [one[k] for k in index]):
            mine = [index[k] for k in inner]
            d = subject.batch([both[k] for k in mine])
            other = subject.batch([two[k] for k in mine])
            heavy = (t_one.mass > 1e-30).any(1)
            points, mass = t_one.points[heavy], t_one.mass[heavy]
            expected = []
            for k in x[:, inner]:
                rest = k - points
                inside = torch.ones_like(rest, dtype=torch.bool) if subject.support == "real" else rest >= 0
                p = other.log_prob(torch.where(inside, rest, 1.0)).exp() * inside
                expected.append((p * mass).sum(0))
            _agree(d, x[:, inner], torch.stack(expected), [rows[k] for k in mine], what)
            judged += len(own)
    return _judged(judged)


def thinning(subject: Subject, rows: Rows, share: float) -> int:
    """Counts kept one by one with probability `share` have parameters ``thinned(row, share)``."""
    thinned = subject.thinned
    assert thinned is not None
    log_odds, log_lost = torch.tensor(share).double().logit(), torch.tensor(-share).double().log1p()
    judged = 0
    for index, _, _, t in _summed(subject, rows):
        heavy = (t.mass > 1e-30).any(1)
        x, mass = t.points[heavy], t.mass[heavy]
        whole = torch.lgamma(x + 1) + x * log_lost
        mine = [thinned(dict(rows[k]), share) for k in index]
        for inner, own, d, t_thin in _summed(subject, mine):
            kept = _typical(t_thin, "count")
            n, m = whole[:, inner], mass[:, inner]
            expected = []
            for k in kept:
                rest = x[:, inner] - k
                p = torch.exp(n - torch.lgamma(k + 1) - torch.lgamma(rest.clamp(min=0) + 1) + k * log_odds)
                expected.append((p * (rest >= 0) * m).sum(0))
            _agree(d, kept, torch.stack(expected), [rows[index[k]] for k in inner], "that of the thinned counts")
            judged += len(own)
    return _judged(judged)

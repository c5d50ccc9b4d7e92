"""Laws of shapes and state: broadcasting, order, masks, copies, and that reading changes nothing.

Arguments and conventions as in `ppl_st.testing.laws`. Batches of fewer than two rows are repeated, where one row says nothing.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ppl_st.testing.exact import draws_of
from ppl_st.testing.subject import BOTH, LawBroken, Rows, Subject, columns, need, stack

ALONE = 32


def _same(a: Tensor, b: Tensor, rows: Rows, what: str) -> None:
    """log_prob a is b, both [..., n]."""
    relative = 1e-4 if a.dtype == torch.float32 else 1e-7
    if a.shape != b.shape:
        raise LawBroken(f"{what}: log_prob has shape {tuple(a.shape)}, it had {tuple(b.shape)}")
    good = torch.isclose(a, b, rtol=relative, atol=1e-9, equal_nan=True)
    need(good, rows, lambda *i: f"{what}: log_prob is {a[i].item():.9g}, it was {b[i].item():.9g}")


def _several(rows: Rows, values: Sequence[Any]) -> tuple[Rows, Tensor]:
    times = 1 if len(rows) > 1 else 2
    return [*rows] * times, stack([*values] * times)


def broadcasting(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """n values under n sets of parameters are n terms; a column [n, 1] of them is an error, not n^2 terms."""
    rows, x = _several(rows, values)
    d, n = subject.batch(rows), len(rows)
    for lead in ((), (3,)):
        got = d.log_prob(x.expand(*lead, *x.shape)).shape
        if got != (*lead, n):
            raise LawBroken(f"log_prob of values {(*lead, *x.shape)} under batch ({n},) has shape {tuple(got)}")
    try:
        got = d.log_prob(x.unsqueeze(1)).shape
    except Exception:  # whichever way it refuses
        return
    raise LawBroken(f"values of shape {tuple(x.unsqueeze(1).shape)} under batch ({n},) are scored as {tuple(got)}")


def permutation(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """Each entry is scored by its own parameters: together, in reverse order and alone (`ALONE` entries of a large batch)."""
    rows, x = _several(rows, values)
    together = subject.batch(rows).log_prob(x)
    _same(subject.batch(rows[::-1]).log_prob(x.flip(0)).flip(0), together, rows, "in reverse order")
    some = torch.linspace(0, len(rows) - 1, min(len(rows), ALONE)).long().tolist()
    alone = torch.stack([subject.at(rows[i]).log_prob(x[i]) for i in some])
    _same(alone, together[some], [rows[i] for i in some], "one by one")


def mask(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """Masked entries count nothing and have gradient zero; the others stay as they are."""
    rows, x = _several(rows, values)
    leaves = {k: v.clone().requires_grad_() for k, v in columns(rows).items()}
    d, n = subject.make(**leaves), len(rows)
    if not hasattr(d, "mask"):  # plain torch.distributions
        return
    keep = torch.arange(n) % 2 == 0
    plain = d.log_prob(x)
    for masked in (d.mask(keep), d.expand((n,)).mask(keep)):
        got = masked.log_prob(x)
        _same(got.detach(), torch.where(keep, plain, 0.0).detach(), rows, "with every second entry masked")
        if got.requires_grad:
            slopes = torch.autograd.grad(got.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
            for name, slope in zip(leaves, slopes, strict=True):
                if slope is not None:
                    hidden = keep | (slope.reshape(n, -1) == 0).all(1)
                    need(hidden, rows, lambda _, name=name: f"masked entries have a gradient by {name}")


def _uses(x: Tensor) -> dict[str, Callable[[Any], Any]]:
    """Ways of reading a distribution that must leave it as it is."""
    return {
        "log_prob": lambda d: d.log_prob(x),
        "mean": lambda d: d.mean,
        "variance": lambda d: d.variance,
        "sample": lambda d: draws_of(d, 3, "state"),
        "cdf": lambda d: d.cdf(x),
        "expand": lambda d: d.expand((2, len(x))).log_prob(x.expand(2, *x.shape)),
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


def state(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """Moments, draws, expansion and log_prob itself leave log_prob, the parameters and the value as they were."""
    for dtype in BOTH:
        params, x = columns(rows, dtype), stack(values, dtype)
        kept, kept_x = {k: v.clone() for k, v in params.items()}, x.clone()
        before = subject.make(**params).log_prob(x)
        for name, d in _used(subject, params, x):
            _same(d.log_prob(x), before, rows, f"after reading {name}")
        changed = [k for k in params if not torch.equal(params[k], kept[k])]
        if changed or not torch.equal(x, kept_x):
            raise LawBroken(f"the parameters {changed} were changed in place" if changed else "the value was changed in place")


def copies(subject: Subject, rows: Rows, values: Sequence[Any]) -> None:
    """Deep copies, expansions and parameters saved and loaded give the same log_prob, also after reading moments."""
    for dtype in BOTH:
        params, x = columns(rows, dtype), stack(values, dtype)
        before = subject.make(**params).log_prob(x)
        saved = safetensors.torch.load(safetensors.torch.save(params))
        _same(subject.make(**saved).log_prob(x), before, rows, "with saved and loaded parameters")
        for name, d in _used(subject, params, x):
            _same(copy.deepcopy(d).log_prob(x), before, rows, f"in a deep copy after reading {name}")
            twice = d.expand((2, len(rows))).log_prob(x.expand(2, *x.shape))
            _same(twice, before.expand(2, -1), rows, f"expanded after reading {name}")

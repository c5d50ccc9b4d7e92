"""The law kit: right likelihoods pass, every law catches a planted fault, known defects of others are found.

`SUBJECTS` is the table of likelihoods: one row puts a likelihood under every law. ``pytest -m slow`` runs it
with 100,000 sets of parameters per law (10,000 under the two laws about draws); PPL_ST_EXAMPLES sets another number.
"""

import math
import os
import random
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import hypothesis
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from ppl_st.count_likelihoods import SharedOddsNegativeBinomial, ZeroInflatedNegativeBinomial
from ppl_st.directional import PowerSpherical
from ppl_st.errors import UserError
from ppl_st.inference.pair import Pair
from ppl_st.likelihoods import Gaussian, NegativeBinomial, Poisson
from ppl_st.real_likelihoods import Log1p, Student
from ppl_st.testing import (
    ALL_LAWS,
    LawBroken,
    Limit,
    Subject,
    applicable,
    check_likelihood,
    check_pair,
    dispersions,
    gate_logits,
    means,
    positive,
    real,
    shapes,
    sparse_counts,
    tables,
)
from ppl_st.testing import laws as L
from ppl_st.testing import shape_laws as S
from ppl_st.testing.exact import surprise, table

torch.set_num_threads(1)

EXAMPLES = 100  # rows per law in the small profile
SLOW_DRAWN = 10_000  # under the laws about draws, 4,000 draws for each
SLOW_EXAMPLES = int(os.environ.get("PPL_ST_EXAMPLES", "100000"))
WIDE_MEANS = means(1e-12, 1e8, zero=True)


def _scaled(*names):
    """Parameters of the sum of c such variables, where those of the given names are proportional to c."""
    return lambda row, c: {k: v * c if k in names else v for k, v in row.items()}


def _gamma(mean, theta):
    return dist.Gamma(theta, theta / mean)


def _unit(dims):
    """Unit vectors as lists, a few directions."""
    axes = np.eye(dims).tolist()
    return hypothesis.strategies.sampled_from([*axes, *(-np.eye(dims)).tolist(), [0.6, -0.8, *[0.0] * (dims - 2)]])


def _uniform(direction, concentration):
    return SimpleNamespace(log_prob=lambda x: torch.tensor(-math.log(4 * math.pi)))


# One row per likelihood: how to make it, ranges for exact sums, the whole domain, what is claimed of it.
SUBJECTS = [
    Subject(
        Poisson, {"mean": means(1e-8, 100)}, name="Poisson", domain={"mean": WIDE_MEANS},
        sum_of=_scaled("mean"), thinned=_scaled("mean"),
    ),
    Subject(
        lambda log_mean: Poisson(log_mean=log_mean), {"log_mean": real(-18, 4.5)}, name="Poisson(log_mean)",
        domain={"log_mean": real(-40, 30)}, sum_of=lambda r, c: {"log_mean": r["log_mean"] + math.log(c)},
    ),
    Subject(
        NegativeBinomial, {"mean": means(1e-8, 30), "theta": dispersions(0.3, 1e4)}, name="NegativeBinomial",
        domain={"mean": WIDE_MEANS, "theta": dispersions(1e-8, 1e8)},
        limits=[Limit("Poisson", {"theta": 1e9}, lambda mean, theta: Poisson(mean))],
        sum_of=_scaled("mean", "theta"), thinned=_scaled("mean"), mixed_rate=_gamma,
    ),
    Subject(
        lambda log_mean, log_theta: NegativeBinomial(log_mean=log_mean, log_theta=log_theta),
        {"log_mean": real(-18, 4.5), "log_theta": real(-2, 9)}, name="NegativeBinomial(log)",
        domain={"log_mean": real(-40, 30), "log_theta": real(-30, 30)},
    ),
    Subject(
        Gaussian, {"loc": real(-10, 10), "scale": positive(0.1, 10)}, "real", name="Gaussian",
        domain={"loc": real(-1e3, 1e3), "scale": positive(1e-3, 1e3)},
        sum_of=lambda r, c: {"loc": r["loc"] * c, "scale": r["scale"] * c**0.5},
    ),
    Subject(
        ZeroInflatedNegativeBinomial,
        {"mean": means(1e-8, 30), "theta": dispersions(0.3, 1e4), "gate_logits": gate_logits(10)}, name="ZeroInflatedNegativeBinomial",
        domain={"mean": WIDE_MEANS, "theta": dispersions(1e-8, 1e8), "gate_logits": gate_logits(200)},
        limits=[
            Limit("NB", {"gate_logits": -200.0}, lambda mean, theta, gate_logits: NegativeBinomial(mean, theta)),
            Limit("point mass", {"gate_logits": 200.0}, lambda mean, theta, gate_logits: dist.Delta(torch.zeros_like(mean))),
        ],
        thinned=_scaled("mean"),
    ),
    Subject(
        SharedOddsNegativeBinomial, {"shape": positive(0.1, 30), "logits": real(-8, 1)}, name="SharedOddsNegativeBinomial",
        domain={"shape": positive(1e-8, 1e8), "logits": real(-60, 20)},
        limits=[Limit("Poisson", {"shape": 1e8, "logits": -17.0}, lambda shape, logits: Poisson(shape * logits.exp()))],
        sum_of=_scaled("shape"), thinned=lambda r, share: {**r, "logits": r["logits"] + math.log(share)},
        mixed_rate=lambda shape, logits: dist.Gamma(shape, torch.exp(-logits)),
    ),
    Subject(
        Student, {"loc": real(-10, 10), "scale": positive(0.1, 10), "df": positive(3, 100)}, "real", name="Student",
        domain={"loc": real(-1e3, 1e3), "scale": positive(1e-3, 1e3), "df": positive(0.1, 1e6)},
        limits=[Limit("Gaussian", {"df": 1e8}, lambda loc, scale, df: Gaussian(loc, scale))],
    ),
    Subject(
        lambda loc, scale: Log1p(Gaussian(loc, scale)), {"loc": real(-1, 4), "scale": positive(0.1, 1.5)}, "positive", name="Log1p(Gaussian)",
        domain={"loc": real(-20, 20), "scale": positive(1e-2, 20)},
    ),
    Subject(
        lambda loc, scale, df: Log1p(Student(loc, scale, df)), {"loc": real(-1, 4), "scale": positive(0.1, 1), "df": positive(3, 100)},
        "positive", name="Log1p(Student)", domain={"loc": real(-20, 20), "scale": positive(1e-2, 20), "df": positive(0.1, 1e6)},
    ),
    Subject(
        PowerSpherical, {"direction": _unit(3), "concentration": positive(1e-3, 500)}, "sphere", name="PowerSpherical",
        domain={"direction": _unit(3), "concentration": positive(1e-6, 1e6)}, values=_unit(3),
        limits=[Limit("uniform", {"concentration": 0.0}, _uniform)],
    ),
]  # fmt: skip


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_ours_obey_every_law(subject):
    assert check_likelihood(subject, examples=EXAMPLES) == []


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_ours_obey_every_law_in_many_examples(subject):
    drawing = [L.draw_moments, L.draw_fit]
    assert check_likelihood(subject, [law for law in ALL_LAWS if law not in drawing], examples=SLOW_EXAMPLES, seed=1) == []
    assert check_likelihood(subject, drawing, examples=min(SLOW_EXAMPLES, SLOW_DRAWN), seed=1) == []


# ---- every law has teeth: mutated likelihoods ----

NAMED = {subject.name: subject for subject in SUBJECTS}
POISSON, NB, GAUSSIAN = (NAMED[name] for name in ("Poisson", "NegativeBinomial", "Gaussian"))


class TooLikely(Poisson):
    def log_prob(self, value):
        return super().log_prob(value) + 0.01


class InvertedDispersion(NegativeBinomial):
    @property
    def variance(self):
        return self.mean * (1 + self.mean * self.theta)


class StrictlyBelow(Poisson):
    def cdf(self, value):
        return super().cdf(value - 1)


class OneTooFar(Poisson):
    def icdf(self, q):
        return super().icdf(q) + 1


class HalfWidth(Gaussian):
    def icdf(self, q):
        return (super().icdf(q) + self.loc) / 2


class TooManyDraws(Poisson):
    def sample(self, sample_shape=()):
        return Poisson(self.mean * 1.3 + 0.1).sample(sample_shape)


class DrawsWithoutDispersion(NegativeBinomial):
    def sample(self, sample_shape=()):
        return Poisson(self.mean).sample(sample_shape)


class WrongSlope(Poisson):
    def log_prob(self, value):
        exact = super().log_prob(value)
        return exact.detach() + 1.01 * (exact - exact.detach())


class Detached(Poisson):
    def log_prob(self, value):
        return super().log_prob(value).detach()


class Textbook(NegativeBinomial):
    """lgamma in the parameters' own precision: nats wrong for large theta in float32; NaN at mean 0."""

    def log_prob(self, value):
        self._check(value)
        x, mean, theta = value, self.mean, self.theta
        gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return gammas + theta * (theta / (theta + mean)).log() + x * (mean / (theta + mean)).log()


class Shifted(NegativeBinomial):
    """Another theta than it says: a normalised NB of the right mean."""

    def __init__(self, mean, theta):
        super().__init__(mean, 1 / (1 / theta + 0.2))


class NoCheck(Poisson):
    def _check(self, value):
        pass


class Coupled(Poisson):
    """The last entry is scored under the first entry's mean."""

    def log_prob(self, value):
        exact = super().log_prob(value)
        if not self.batch_shape or exact.dim() != 1 or len(exact) != self.batch_shape[0]:
            return exact
        return torch.cat([exact[:-1], Poisson(self.mean[0]).log_prob(value[-1:])])


class Unmaskable(Poisson):
    def mask(self, mask):
        return self


class LeakyMask(Poisson):
    """Masked values are right, their gradient is not gone."""

    def mask(self, mask):
        outer = self

        class Masked:
            def log_prob(self, value):
                exact = outer.log_prob(value)
                return exact - (exact * ~mask).detach()

        return Masked()

    def expand(self, batch_shape, _instance=None):
        return self


class Rounding(Poisson):
    """Reading the mean replaces it by a floored one."""

    @property
    def mean(self):
        self._given = {"mean": self._given["mean"].clamp(min=0.01)}
        return self._given["mean"]


class CountingUp(Poisson):
    def log_prob(self, value):
        exact = super().log_prob(value)
        self._given = {"mean": self._given["mean"] * 1.01}
        return exact


class Overwriting(Poisson):
    def log_prob(self, value):
        exact = super().log_prob(value)
        value.add_(1)
        return exact


class LosesOnExpansion(Poisson):
    def expand(self, batch_shape, _instance=None):
        return Poisson(self.mean * 1.001).expand(batch_shape)


class SharesCopies(Poisson):
    """A deep copy after .mean is another distribution."""

    @property
    def mean(self):
        self.cached = True
        return super().mean

    def __deepcopy__(self, memo):
        return Poisson(self._given["mean"] + (0.5 if hasattr(self, "cached") else 0.0))


FAULTS = [
    (L.normalisation, replace(POISSON, make=TooLikely)),
    (L.moments, replace(NB, make=InvertedDispersion)),
    (L.cdf, replace(POISSON, make=StrictlyBelow)),
    (L.quantile, replace(POISSON, make=OneTooFar)),
    (L.quantile, replace(GAUSSIAN, make=HalfWidth)),
    (L.draw_moments, replace(POISSON, make=TooManyDraws)),
    (L.draw_moments, replace(NB, make=DrawsWithoutDispersion)),
    (L.draw_fit, replace(NB, make=DrawsWithoutDispersion)),
    (L.gradient, replace(POISSON, make=WrongSlope)),
    (L.gradient, replace(POISSON, make=Detached)),
    (L.finite, replace(NB, make=Textbook)),
    (L.single_precision, replace(NB, make=Textbook)),
    (L.limits, replace(NB, make=Shifted)),
    (L.mixture, replace(NB, make=Shifted)),
    (L.additivity, replace(NB, sum_of=_scaled("mean"))),  # not closed with a fixed theta
    (L.additivity, replace(GAUSSIAN, sum_of=_scaled("loc", "scale"))),
    (L.thinning, replace(NB, thinned=_scaled("mean", "theta"))),
    (S.broadcasting, replace(POISSON, make=NoCheck)),
    (S.permutation, replace(POISSON, make=Coupled)),
    (S.mask, replace(POISSON, make=Unmaskable)),
    (S.mask, replace(POISSON, make=LeakyMask)),
    (S.state, replace(POISSON, make=Rounding)),
    (S.state, replace(POISSON, make=CountingUp)),
    (S.state, replace(POISSON, make=Overwriting)),
    (S.copies, replace(POISSON, make=LosesOnExpansion)),
    (S.copies, replace(POISSON, make=SharesCopies)),
]


@pytest.mark.parametrize(("law", "subject"), FAULTS, ids=lambda x: getattr(x, "__name__", None) or x.make.__name__)
def test_the_law_catches_the_fault_and_its_example_repeats_it(law, subject):
    (finding,) = check_likelihood(subject, [law], examples=60)
    assert finding.law == law.__name__
    with pytest.raises(LawBroken) as broken:
        law(subject, **finding.example)
    assert str(broken.value) == finding.message
    assert finding.message in repr(finding)


def test_every_law_has_a_fault_and_an_honest_subject():
    assert {law for law, _ in FAULTS} == set(ALL_LAWS)
    assert {law for subject in SUBJECTS for law in applicable(subject)} == set(ALL_LAWS)


def test_the_counter_example_is_the_smallest():
    class WrongAboveTen(Poisson):
        def log_prob(self, value):
            return super().log_prob(value) + (self.mean > 10) * 0.5

    (finding,) = check_likelihood(replace(POISSON, make=WrongAboveTen), [L.normalisation])
    assert finding.example == {"rows": [{"mean": 10.2}]}  # the first above 10
    assert repr(finding).startswith("Poisson: normalisation broken at rows = mean ") and "sum to 1.6487" in repr(finding)


def test_all_laws_run_although_the_first_fails_and_a_crash_is_a_finding():
    class Broken(TooLikely):
        def expand(self, batch_shape, _instance=None):
            raise RuntimeError("no expansion")

    laws = [L.normalisation, S.mask, L.moments]
    found = {f.law: f.message for f in check_likelihood(replace(POISSON, make=Broken), laws, examples=5)}
    assert set(found) == {"normalisation", "mask", "moments"} and found["mask"] == "RuntimeError: no expansion"


def test_a_law_that_nothing_could_decide_is_a_finding():
    far = Subject(Poisson, {"mean": means(1e7, 1e8)}, name="far")
    (finding,) = check_likelihood(far, [L.normalisation], examples=3)
    assert "no example could decide it" in finding.message


def test_a_law_of_ones_own():
    def mean_below_fifty(subject, rows):
        if bool((subject.batch(rows).mean >= 50).any()):
            raise LawBroken("too large")

    (finding,) = check_likelihood(POISSON, [mean_below_fifty], examples=200)
    assert finding.law == "mean_below_fifty"
    with pytest.raises(UserError, match="'rwo'"):
        check_likelihood(POISSON, [lambda subject, rwo: None])


def test_global_random_states_are_untouched_and_findings_repeat():
    subject = replace(NB, make=DrawsWithoutDispersion)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    laws = [L.draw_fit, S.state]
    first = check_likelihood(subject, laws, examples=5)
    assert [finding.law for finding in first] == ["draw_fit"]
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
    assert check_likelihood(subject, laws, examples=5) == first


# ---- known defects of others, found without being told where ----


def _torch_nb(mean, theta):
    return dist.NegativeBinomial(total_count=theta, logits=mean.log() - theta.log())


class EpsNegativeBinomial(NegativeBinomial):
    """Small numbers added inside the logarithms, as is common."""

    def log_prob(self, value):
        eps = 1e-8
        x, mean, theta = value, self.mean, self.theta
        log_sum = (theta + mean + eps).log()
        gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return theta * ((theta + eps).log() - log_sum) + x * ((mean + eps).log() - log_sum) + gammas


DEFECTIVE = {
    "Pyro's zero-inflated NB: log_prob changes after .mean": (
        Subject(
            lambda mean, theta, gate_logits: dist.ZeroInflatedNegativeBinomial(
                total_count=theta, logits=mean.log() - theta.log(), gate_logits=gate_logits
            ),
            {"mean": means(1e-3, 100), "theta": dispersions(0.1, 1e3), "gate_logits": gate_logits(50)},
        ),
        {"state", "copies"},
    ),
    "torch's NB: float32 at large total_count": (
        replace(NB, make=_torch_nb, domain={"mean": means(1e-6, 1e4), "theta": dispersions(1e-4, 1e8)}),
        {"single_precision", "limits"},
    ),
    "eps inside the logarithm: another mean at small means": (
        replace(NB, make=EpsNegativeBinomial),
        {"moments", "additivity", "mixture", "thinning", "single_precision"},
    ),
}


@pytest.mark.parametrize("name", DEFECTIVE)
def test_known_defects_are_reported(name):
    subject, expected = DEFECTIVE[name]
    examples = 400  # which examples come depends on constants in the code that is loaded
    found = {finding.law for finding in check_likelihood(subject, [law for law in ALL_LAWS if law is not S.broadcasting], examples=examples)}
    assert expected <= found


def test_torch_broadcasts_a_column_silently():
    (finding,) = check_likelihood(Subject(dist.Poisson, {"rate": means()}), [S.broadcasting], examples=3)
    assert finding.message == "values of shape (2, 1) under batch (2,) are scored as (2, 2)"


def test_sound_likelihoods_of_others_break_no_law_but_broadcasting():
    others = [
        Subject(dist.Poisson, {"rate": means(1e-8, 100)}, sum_of=_scaled("rate"), thinned=_scaled("rate")),
        Subject(
            lambda probs: dist.Binomial(10, probs), {"probs": real(0.01, 0.99)}, values=hypothesis.strategies.integers(0, 10).map(float)
        ),
        Subject(dist.Gamma, {"concentration": positive(0.1, 50), "rate": positive(0.1, 10)}, "positive"),
        Subject(dist.StudentT, {"df": positive(3, 50), "loc": real(-5, 5), "scale": positive(0.1, 5)}, "real"),
        Subject(
            dist.VonMises3D, {"concentration": real(0.1, 3).map(lambda c: [c, -c, 0.5])}, "sphere",
            values=hypothesis.strategies.sampled_from([[1.0, 0.0, 0.0], [0.0, 0.6, -0.8]]),
        ),
    ]  # fmt: skip
    for subject in others:
        assert check_likelihood(subject, [law for law in ALL_LAWS if law is not S.broadcasting], examples=8) == []


# ---- the parts ----


def test_the_chernoff_bound_bounds_and_bites():
    def only(d):
        t, decided = table(d, "count")
        assert decided.all()
        return t.points[:, 0], t.mass[:, 0]

    three = only(Poisson(torch.tensor([3.0], dtype=torch.float64)))
    assert surprise(*three, 3.0, 4000) == 1
    for mean in (3.1, 3.3):  # against the normal tail; a bound, and not a loose one
        z = (mean - 3) / (3 / 4000) ** 0.5
        tail = math.erfc(z / 2**0.5)
        assert 0.5 * tail < surprise(*three, mean, 4000) < 100 * tail**0.97
    point = only(dist.Delta(torch.tensor([2.0], dtype=torch.float64)))
    assert surprise(*point, 2.0, 10) == 1 and surprise(*point, 2.1, 10) == 0


@hypothesis.settings(max_examples=50, derandomize=True, database=None, deadline=None)
@hypothesis.given(sparse_counts(), shapes())
def test_strategies_of_tables_and_shapes(matrix, shape):
    assert matrix.format == "csr" and matrix.dtype == np.float32 and (matrix.data > 0).all()
    assert 1 <= matrix.shape[0] <= 8 and 1 <= matrix.shape[1] <= 8
    assert torch.zeros(shape).numel() >= 1


def test_tables_with_empty_rows_and_columns_occur():
    def both(adata):
        m = adata.layers["counts"]
        return m.nnz > 0 and (m.sum(1) == 0).any() and (m.sum(0) == 0).any()

    settings = hypothesis.settings(derandomize=True, database=None)
    adata = hypothesis.find(tables(), both, settings=settings)
    assert adata.obsm["spatial"].shape == (adata.n_obs, 2) and adata.var_names[0] == "gene0"


def test_strategies_refuse_bad_ranges_and_name_the_missing_package(monkeypatch):
    with pytest.raises(UserError, match="0 < low < high"):
        positive(0, 1)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(UserError, match=r"pip install 'ppl-st\[test\]'"):
        means()


# ---- pairs ----

N = 40


@dataclass
class Batch:
    x: torch.Tensor  # [b, 3]
    rows: torch.Tensor  # [b]


class Epoch:
    def __init__(self, x, size):
        self.x, self.size = x, size

    def __len__(self):
        return len(self.x) // self.size

    def at(self, step):
        rows = torch.arange(len(self.x)).view(-1, self.size)[step % len(self)]
        return Batch(self.x[rows], rows)


class Model(PyroModule):
    """level ~ Normal; depth_i ~ Gamma; x_ig ~ NB(depth_i exp(level_g)); `fault` plants one."""

    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault

    def forward(self, batch, *, observe=True):
        level = pyro.sample("level", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        full = len(batch.rows) if self.fault == "no full size" else N
        observe = observe or self.fault == "always observes"
        with pyro.plate("cells", full, subsample=batch.rows):
            depth = pyro.sample("depth", dist.Gamma(torch.full((len(batch.rows),), 2.0), 1.0))
            rate = depth[:, None] * level.exp()
            likelihood = (DrawsWithoutDispersion if self.fault == "sampler" else NegativeBinomial)(rate, torch.tensor(0.5))
            with pyro.poutine.scale(scale=2.0 if self.fault == "scaled by hand" else 1.0):
                x = pyro.sample("x", Recorded(likelihood, self.fault).to_event(1), obs=batch.x if observe else None)
        return {"x": x}


class Recorded(dist.TorchDistribution):
    """A likelihood whose first draw is not like the later ones, where that is the fault."""

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.nonnegative_integer

    def __init__(self, base, fault):
        self.base, self.fault, self.drawn = base, fault, False
        super().__init__(base.batch_shape, validate_args=False)

    def log_prob(self, value):
        return self.base.log_prob(value)

    def sample(self, sample_shape=()):
        first, self.drawn = not self.drawn, True
        draw = self.base.sample(sample_shape)
        return draw * 3 if first and self.fault == "simulates too much" else draw


class Guide(PyroModule):
    def __init__(self, fault=None):
        super().__init__()
        self.fault = fault
        self.loc = nn.Parameter(torch.tensor([0.1, -0.3, 0.4]))
        self.depth_loc = nn.Parameter(torch.linspace(0.5, 3.0, N))

    def forward(self, batch, *, observe=True):
        size = 2 if self.fault == "shape" else 3
        pyro.sample("level", dist.Normal(self.loc[:size], 0.3).to_event(1))
        if self.fault == "missing site":
            return
        full = len(batch.rows) if self.fault == "guide's full size" else N
        with pyro.plate("cells", full, subsample=batch.rows):
            pyro.sample("depth", dist.LogNormal(self.depth_loc[batch.rows].log(), 0.05))


def _check(fault=None):
    x = dist.NegativeBinomial(torch.full((N, 3), 2.0), logits=torch.zeros(N, 3)).sample()
    rows = torch.arange(N)
    return check_pair(Pair(Model(fault), Guide(fault)), Epoch(x, 8), Batch(x, rows), {"cells": N})


@pytest.fixture(autouse=True)
def _own_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_right_pair_obeys_the_model_laws():
    assert _check() == {}


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("missing site", "sites_agree"),
        ("shape", "sites_agree"),
        ("no full size", "plates_scale"),
        ("guide's full size", "plates_scale"),
        ("scaled by hand", "plates_scale"),
        ("no full size", "minibatches_unbiased"),
        ("guide's full size", "minibatches_unbiased"),
        ("always observes", "simulation_obeys"),
        ("simulates too much", "simulation_obeys"),
    ],
)
def test_model_laws_catch_planted_faults(fault, law):
    assert law in _check(fault)

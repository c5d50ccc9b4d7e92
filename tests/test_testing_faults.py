"""Every law has teeth: each catches a fault planted in a likelihood, and says the smallest example."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from law_subjects import GAUSSIAN, NB, POISSON, SUBJECTS, DrawsWithoutDispersion, scaled
from ppl_st.errors import UserError
from ppl_st.likelihoods import Gaussian, NegativeBinomial, Poisson
from ppl_st.testing import ALL_LAWS, LawBroken, Subject, applicable, check_likelihood, means
from ppl_st.testing import laws as L
from ppl_st.testing import shape_laws as S
from seeded import own_seed

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


class TooLikely(Poisson):
    def log_prob(self, value):
        return super().log_prob(value) + 0.01


class InvertedDispersion(NegativeBinomial):
    @property
    def variance(self):
        return self.mean * (1 + self.mean * self.theta)


class NoMoment(Poisson):
    @property
    def variance(self):
        return torch.full_like(self.mean, torch.nan)


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
    (L.moments, replace(POISSON, make=NoMoment)),
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
    (L.additivity, replace(NB, sum_of=scaled("mean"))),  # not closed with a fixed theta
    (L.additivity, replace(GAUSSIAN, sum_of=scaled("loc", "scale"))),
    (L.thinning, replace(NB, thinned=scaled("mean", "theta"))),
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

    (finding,) = check_likelihood(replace(POISSON, make=WrongAboveTen), [L.normalisation], examples=100)
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

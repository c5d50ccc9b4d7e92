"""Likelihoods under the laws: ours obey every one, known defects of others are found."""

import os
from dataclasses import replace

import hypothesis
import pyro.distributions as dist
import pytest
import torch

from law_subjects import NB, SUBJECTS, scaled
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.testing import ALL_LAWS, Subject, check_likelihood, dispersions, gate_logits, means, positive, real
from ppl_st.testing import laws as L
from ppl_st.testing import shape_laws as S
from seeded import own_seed

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)
EXAMPLES = 100  # rows per law in the small profile
SLOW_DRAWN = 10_000  # under the laws about draws, 4,000 draws for each
SLOW_EXAMPLES = int(os.environ.get("PPL_ST_EXAMPLES", "100000"))  # under the other laws


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
    """Only the laws that should find it are asked: each judges the same examples as among all laws, and the others take most of the time."""
    subject, expected = DEFECTIVE[name]
    examples = 400  # which examples come depends on constants in the code that is loaded
    found = {finding.law for finding in check_likelihood(subject, [law for law in ALL_LAWS if law.__name__ in expected], examples=examples)}
    assert found == expected


def test_torch_broadcasts_a_column_silently():
    (finding,) = check_likelihood(Subject(dist.Poisson, {"rate": means()}), [S.broadcasting], examples=3)
    assert finding.message == "values of shape (2, 1) under batch (2,) are scored as (2, 2)"


def test_sound_likelihoods_of_others_break_no_law_but_broadcasting():
    others = [
        Subject(dist.Poisson, {"rate": means(1e-8, 100)}, sum_of=scaled("rate"), thinned=scaled("rate")),
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

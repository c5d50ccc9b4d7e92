"""The table of likelihoods for the tests of the law kit: one row of `SUBJECTS` puts a likelihood under every law."""

import math
from types import SimpleNamespace

import hypothesis
import numpy as np
import pyro.distributions as dist
import torch

from ppl_st.count_likelihoods import SharedOddsNegativeBinomial, ZeroInflatedNegativeBinomial
from ppl_st.directional import PowerSpherical
from ppl_st.likelihoods import Gaussian, NegativeBinomial, Poisson
from ppl_st.real_likelihoods import Log1p, Student
from ppl_st.testing import Limit, Subject, dispersions, gate_logits, means, positive, real

WIDE_MEANS = means(1e-12, 1e8, zero=True)


def scaled(*names):
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
        sum_of=scaled("mean"), thinned=scaled("mean"),
    ),
    Subject(
        lambda log_mean: Poisson(log_mean=log_mean), {"log_mean": real(-18, 4.5)}, name="Poisson(log_mean)",
        domain={"log_mean": real(-40, 30)}, sum_of=lambda r, c: {"log_mean": r["log_mean"] + math.log(c)},
    ),
    Subject(
        NegativeBinomial, {"mean": means(1e-8, 30), "theta": dispersions(0.3, 1e4)}, name="NegativeBinomial",
        domain={"mean": WIDE_MEANS, "theta": dispersions(1e-8, 1e8)},
        limits=[Limit("Poisson", {"theta": 1e9}, lambda mean, theta: Poisson(mean))],
        sum_of=scaled("mean", "theta"), thinned=scaled("mean"), mixed_rate=_gamma,
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
        thinned=scaled("mean"),
    ),
    Subject(
        SharedOddsNegativeBinomial, {"shape": positive(0.1, 30), "logits": real(-8, 1)}, name="SharedOddsNegativeBinomial",
        domain={"shape": positive(1e-8, 1e8), "logits": real(-60, 20)},
        limits=[Limit("Poisson", {"shape": 1e8, "logits": -17.0}, lambda shape, logits: Poisson(shape * logits.exp()))],
        sum_of=scaled("shape"), thinned=lambda r, share: {**r, "logits": r["logits"] + math.log(share)},
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
NAMED = {subject.name: subject for subject in SUBJECTS}
POISSON, NB, GAUSSIAN = (NAMED[name] for name in ("Poisson", "NegativeBinomial", "Gaussian"))


class DrawsWithoutDispersion(NegativeBinomial):
    def sample(self, sample_shape=()):
        return Poisson(self.mean).sample(sample_shape)

"""The laws of model and guide: a right pair obeys them, planted faults are caught."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from law_subjects import DrawsWithoutDispersion
from ppl_st.inference.pair import Pair
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.testing import LawBroken, check_pair, simulation_obeys
from seeded import own_seed

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)
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
            rate = depth[:, None] * level.exp() * (3 if self.fault == "other rate when simulating" and not observe else 1)
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

    @property
    def mean(self):
        return self.base.mean

    @property
    def variance(self):
        return self.base.variance

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


def _data():
    return dist.NegativeBinomial(torch.full((N, 3), 2.0), logits=torch.zeros(N, 3)).sample()


def _check(fault=None):
    x = _data()
    return check_pair(Pair(Model(fault), Guide(fault)), Epoch(x, 8), Batch(x, torch.arange(N)), {"cells": N})


def test_a_right_pair_obeys_the_model_laws():
    assert _check() == {}


@pytest.mark.parametrize(
    ("fault", "laws"),
    [
        ("missing site", {"sites_agree"}),
        ("shape", {"sites_agree"}),
        ("no full size", {"plates_scale", "minibatches_unbiased"}),
        ("guide's full size", {"plates_scale", "minibatches_unbiased"}),
        ("scaled by hand", {"plates_scale"}),
        ("always observes", {"simulation_obeys"}),
        ("simulates too much", {"simulation_obeys"}),
    ],
)
def test_model_laws_catch_planted_faults(fault, laws):
    assert laws <= set(_check(fault))


@pytest.mark.parametrize(
    ("fault", "said"), [("other rate when simulating", "off in level"), ("sampler", r"off in spread of what \.mean and \.variance say")]
)
def test_what_is_simulated_is_held_against_what_is_scored(fault, said):
    with pytest.raises(LawBroken, match=said):
        simulation_obeys(Pair(Model(fault), Guide(fault)), Batch(_data(), torch.arange(N)))

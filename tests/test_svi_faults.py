"""Faults in training: a bad step is undone, a lasting one is named."""

import copy
import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_st.inference.svi import FitConfig, FitError, Pair, fit
from svi_pairs import NET, NormalGuide, NormalModel, Rows, empty_store, nan, net_pair, net_rows, normal_pair, same

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


def test_one_bad_batch_is_undone_and_the_fit_goes_on():
    seen = {}
    pair = net_pair()

    def watch(step):
        seen[step] = copy.deepcopy([module.state_dict() for module in pair])

    state, info = fit(pair, net_rows(spoil={4: nan}, hook=watch), replace(NET, schedule="constant"))
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(seen[4], seen[5], strict=True) for k in a
    )  # BatchNorm too
    assert not all(torch.equal(a[k], b[k]) for a, b in zip(seen[5], seen[6], strict=True) for k in a)
    assert [step for step, _ in info.skipped] == [4] and "guide site 'z'" in info.skipped[0][1]
    assert math.isnan(info.losses[4]) and np.isfinite(np.delete(info.losses, 4)).all()
    assert info.lr[4] == 0.02 and info.lr[5] == 0.01
    assert state.tally.bad_steps == 0 and state.tally.skipped == 1 and state.step == 10


def test_learning_rate_recovers_after_a_bad_step():
    config = FitConfig(steps=104, device="cpu")
    _, info = fit(normal_pair(), Rows(torch.ones(3), spoil={1: nan}), config)
    assert info.lr[1] == 0.01 and set(info.lr[2:102]) == {0.005} and set(info.lr[102:]) == {0.01}


def test_bad_steps_do_not_disturb_bitwise_resume():
    rows = net_rows(spoil={4: nan, 5: nan})
    whole, _ = fit(net_pair(), rows, NET)
    half, _ = fit(net_pair(), rows, NET, until=5)
    rest, _ = fit(net_pair(), rows, NET, half)
    assert same(whole, rest) and [step for step, _ in rest.tally.faults] == [4, 5] and rest.tally.faults == whole.tally.faults


def test_persistent_nan_ends_in_an_error_that_names_the_site():
    rows = Rows(torch.ones(3), spoil={step: nan for step in range(2, 100)})
    config = FitConfig(steps=50, max_bad_steps=4, device="cpu")
    with pytest.raises(
        FitError, match=r"step 5: 4 steps in a row .*model site 'x' \(value not finite\).*lower lr"
    ):
        fit(normal_pair(), rows, config)


def test_infinite_factor_is_named():
    class Broken(NormalModel):
        def forward(self, batch, *, observe=True):
            super().forward(batch, observe=observe)
            pyro.factor("wall", torch.tensor(-math.inf if batch.step else 0.0))

    with pytest.raises(FitError, match="model site 'wall' \\(log-probability"):
        fit(
            Pair(Broken(), NormalGuide()),
            Rows(torch.ones(3)),
            FitConfig(steps=9, max_bad_steps=2, device="cpu"),
        )


def test_bad_gradient_is_named():
    class Kinked(NormalGuide):
        def forward(self, batch, *, observe=True):
            zero = (self.loc - self.loc.detach()).abs()  # sqrt has an infinite slope here
            pyro.sample("m", dist.Normal(self.loc + (zero.sqrt() if batch.step else zero), self.scale))

    pair = Pair(NormalModel(), Kinked())
    with pytest.raises(FitError, match=r"gradient of guide\.loc\."):
        fit(pair, Rows(torch.ones(3)), FitConfig(steps=9, max_bad_steps=2, device="cpu"))
    assert math.isfinite(pair.guide.loc.item())


def test_update_to_infinity_is_undone():
    class Far(NormalGuide):
        def __init__(self):
            super().__init__()
            self.far = nn.Parameter(torch.tensor(3.4e38))  # has a gradient but no effect on the loss

        def forward(self, batch, *, observe=True):
            pyro.sample("m", dist.Normal(self.loc + (self.far - self.far.detach()), self.scale))

    pair = Pair(NormalModel(), Far())
    config = FitConfig(steps=9, lr=3e37, lr_groups={"loc|scale": 1e-38}, max_bad_steps=3, device="cpu")
    with pytest.raises(FitError, match=r"step 2: .*update of guide\.far"):
        fit(pair, Rows(torch.ones(3)), config)
    assert pair.guide.far.item() == torch.tensor(3.4e38).item() and pair.guide.loc.item() == 0.5

"""Isolation of a fit: other fits, random states, inputs and Pyro's global store are left alone."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_st.inference.svi import FitConfig, FitError, Pair, fit, rng_scope
from svi_pairs import NET, NormalGuide, NormalModel, Rows, counts, empty_store, net_pair, net_rows, normal_pair, same

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


def test_two_fits_in_one_process_do_not_meet():
    x = torch.tensor([1.0, 2.0, 4.0])
    small = FitConfig(steps=10, device="cpu", seed=4)
    net_alone, normal_alone = fit(net_pair(), net_rows(), NET)[0], fit(normal_pair(), Rows(x), small)[0]

    outer, inner, saved = net_pair(), normal_pair(), [None]

    def other(step):  # one step of the second fit inside every step of the first
        saved[0], _ = fit(inner, Rows(x), small, saved[0], until=step + 1)

    mixed, _ = fit(outer, net_rows(hook=other), NET)
    assert same(mixed, net_alone) and same(saved[0], normal_alone)


def test_random_states_of_the_caller_are_untouched():
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 - the global generator is what the test is about
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(net_pair(), net_rows(), NET)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002
    torch.manual_seed(8)
    assert same(fit(net_pair(), net_rows(), NET)[0], fit(net_pair(), net_rows(), NET)[0])


def test_rng_scope_separates_names_and_restores_after_errors():
    def draw(*key):
        with rng_scope(*key):
            return torch.rand(3)

    assert torch.equal(draw(1, "noise", 2), draw(1, "noise", 2))
    keys = [(1, "noise", 2), (1, "noise", 3), (2, "noise", 2), (1, "init", 2), (1,), (1, 2)]
    assert len({tuple(draw(*key).tolist()) for key in keys}) == len(keys)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), rng_scope(1):
        torch.rand(1)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_and_modes():
    x = counts()
    kept, pair = x.clone(), net_pair()
    fit(pair, Rows(x, 8), NET)
    assert torch.equal(x, kept) and not pair.model.training and not pair.guide.training


def test_parameters_made_while_running_are_refused():
    class Lazy(NormalGuide):
        def forward(self, batch, *, observe=True):
            if not hasattr(self, "late"):
                self.late = nn.Parameter(torch.tensor(0.0))
            pyro.sample("m", dist.Normal(self.loc + self.late, self.scale))

    with pytest.raises(FitError, match=r"guide\.late"):
        fit(Pair(NormalModel(), Lazy()), Rows(torch.ones(3)), FitConfig(steps=1, device="cpu"))

    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.0))

        def forward(self, batch, *, observe=True):
            pyro.sample("m", dist.Normal(self.loc + pyro.param("stray", torch.tensor(0.0)), 1.0))

    try:
        with pytest.raises(FitError, match="stray"):
            fit(Pair(NormalModel(), Stored()), Rows(torch.ones(3)), FitConfig(steps=1, device="cpu"))
    finally:
        pyro.clear_param_store()


def test_parameters_without_gradient_are_reported():
    pair = normal_pair()
    pair.guide.idle = nn.Parameter(torch.zeros(2))
    _, info = fit(pair, Rows(torch.ones(3)), FitConfig(steps=2, device="cpu"))
    assert info.untrained == ("guide.idle",)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fit_on_cuda_repeats_and_leaves_random_states_alone():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    config = replace(NET, device="cuda")
    state, _ = fit(net_pair(), net_rows(), config)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    half, _ = fit(net_pair(), net_rows(), config, until=5)
    rest, _ = fit(net_pair(), net_rows(), config, half)
    for a, b in ((state.model, rest.model), (state.guide, rest.guide)):
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)

"""The training loop: exact posteriors, bitwise resume, isolation, faults, checkpoints.

Run as a script, ``python tests/test_svi.py FOLDER STEP``, this file trains the pair of the resume tests and
kills itself with SIGKILL when it is asked for the minibatch of STEP.
"""

import copy
import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ppl_st.errors import UserError
from ppl_st.inference import monitor
from ppl_st.inference.svi import (
    FitConfig,
    FitError,
    Pair,
    epoch_order,
    fit,
    kl_weight,
    learning_rate,
    load_state,
    rng_scope,
    save_state,
    scale_latents,
)

torch.set_num_threads(1)
POSITIVE = dist.constraints.positive


class Batch(NamedTuple):
    x: Tensor  # [B] or [B, G]
    idx: Tensor  # [B]
    size: int
    step: int


class Rows:
    """Minibatches of a tensor; `spoil` maps a step to a change of its batch, `hook` sees every step."""

    def __init__(self, x, batch_size=None, seed=0, spoil=None, hook=None):
        self.x, self.seed = x, seed
        self.batch_size = batch_size or len(x)
        self.spoil, self.hook = spoil or {}, hook or (lambda step: None)

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def at(self, step):
        self.hook(step)
        idx = torch.as_tensor(epoch_order(len(self.x), self.batch_size, self.seed, step))
        return Batch(self.spoil.get(step, lambda x: x)(self.x[idx]), idx, len(self.x), step)


class NormalModel(PyroModule):
    """m ~ N(0, 2), x_i ~ N(m, 1), with a factor -gamma m^2 when gamma > 0."""

    def __init__(self, gamma=0.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, batch, *, observe=True):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        if self.gamma:
            pyro.factor("pull", -self.gamma * m**2)
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            pyro.sample("x", dist.Normal(m, 1.0), obs=batch.x if observe else None)


class NormalGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(0.7), POSITIVE)

    def forward(self, batch, *, observe=True):
        pyro.sample("m", dist.Normal(self.loc, self.scale))


def normal_pair(gamma=0.0):
    return Pair(NormalModel(gamma), NormalGuide())


class NetModel(PyroModule):
    """A small VAE with one global latent: every kind of state that resuming must carry."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, batch, *, observe=True):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # [B, 2]
            mean = self.decoder(z).exp()
            x = batch.x if observe else None
            pyro.sample("x", dist.GammaPoisson(theta, theta / mean).to_event(1), obs=x)  # [B, 5]


class NetGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4))
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch, *, observe=True):
        pyro.sample("theta", dist.LogNormal(self.loc, 0.1))
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            loc, log_scale = self.encoder(batch.x.log1p()).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (0.1 * log_scale).exp()).to_event(1))


def net_pair(seed=0):
    with rng_scope(seed, "init"):
        return Pair(NetModel(), NetGuide())


def counts(n=23, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).poisson(3.0, (n, 5)), dtype=torch.float32)


def net_rows(**options):
    return Rows(counts(), batch_size=8, seed=3, **options)  # 3 steps per epoch, the last with 7 rows


NET = FitConfig(
    steps=10,
    lr=0.02,
    lr_groups={r"guide\.encoder": 0.5},
    schedule="cosine",
    warmup_steps=3,
    kl_warmup_steps=8,
    window=2,
    patience=50,
    clip_norm=1.0,
    checkpoint_every=5,
    log_every=2,
    device="cpu",
)


def same(a, b):
    """Whether two fit states are equal bit for bit."""
    pairs = [(a.model, b.model), (a.guide, b.guide)]
    pairs += [(a.optimizer[name], b.optimizer.get(name, {})) for name in a.optimizer]
    tensors = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)
    return tensors and a.optimizer.keys() == b.optimizer.keys() and a.tally == b.tally


@pytest.fixture(autouse=True)
def empty_store():
    yield
    assert not list(pyro.get_param_store()), "something reached Pyro's global store"


# --- exact posteriors ----------------


class ConjugateModel(PyroModule):
    """G independent problems side by side, so that averaging over them leaves little noise to hide behind."""

    def __init__(self, prior, likelihood):
        super().__init__()
        self.prior, self.likelihood = prior, likelihood

    def forward(self, batch, *, observe=True):
        latent = pyro.sample("latent", self.prior.expand(batch.x.shape[1:]).to_event(1))  # [G]
        with pyro.plate("cells", batch.size, subsample=batch.idx):
            pyro.sample("x", self.likelihood(latent).to_event(1), obs=batch.x)  # [B, G]


class ConjugateGuide(PyroModule):
    """The exact family with free parameters."""

    def __init__(self, family, start, constraint):
        super().__init__()
        self.family = family
        self.a = PyroParam(torch.full((300,), start[0]), constraint)
        self.b = PyroParam(torch.full((300,), start[1]), POSITIVE)

    def forward(self, batch, *, observe=True):
        pyro.sample("latent", self.family(self.a, self.b).to_event(1))


@pytest.mark.parametrize("elbo", ["trace", "meanfield"])
def test_normal_posterior_is_exact(elbo):
    x = torch.as_tensor(np.random.default_rng(0).normal(1.0, 1.0, (6, 300)), dtype=torch.float32)
    model = ConjugateModel(dist.Normal(0.0, 2.0), lambda m: dist.Normal(m, 1.0))
    guide = ConjugateGuide(dist.Normal, (0.0, 1.0), dist.constraints.real)
    config = FitConfig(steps=400, lr=0.1, schedule="cosine", elbo=elbo, clip_norm=math.inf, device="cpu")
    fit(Pair(model, guide), Rows(x), config, scale=1 / len(x))
    precision = 1 / 4 + len(x)
    error = guide.a.detach() - x.sum(0) / precision
    assert abs(error.mean().item()) < 0.005 and error.std().item() < 0.05
    assert guide.b.mean().item() == pytest.approx(precision**-0.5, rel=0.02)


def test_gamma_poisson_posterior_is_exact_from_minibatches():
    x = torch.as_tensor(np.random.default_rng(0).poisson(3.0, (7, 300)), dtype=torch.float32)
    model = ConjugateModel(dist.Gamma(2.0, 1.0), dist.Poisson)
    guide = ConjugateGuide(dist.Gamma, (8.0, 4.0), POSITIVE)
    config = FitConfig(steps=1000, lr=0.3, schedule="cosine", clip_norm=math.inf, device="cpu")
    fit(Pair(model, guide), Rows(x, batch_size=4), config, scale=1 / len(x))  # batches of 4 and 3 rows
    shape, rate = 2.0 + x.sum(0), 1.0 + len(x)
    found = dist.Gamma(guide.a, guide.b)
    assert (found.mean / (shape / rate)).mean().item() == pytest.approx(1.0, abs=0.02)
    assert (found.stddev / (shape.sqrt() / rate)).mean().item() == pytest.approx(1.0, abs=0.02)


# --- the objective and the optimiser, against a loop written out by hand ----------------


def test_kl_weight_touches_latent_sites_only():
    x, gamma, w = torch.tensor([1.0, -2.0, 0.5]), 0.3, 0.25
    pair = normal_pair(gamma)
    batch = Batch(x[[0, 2]], torch.tensor([0, 2]), 3, 0)
    with rng_scope(5):
        loss = Trace_ELBO().differentiable_loss(*(scale_latents(w)(module) for module in pair), batch)
    with rng_scope(5):
        m = dist.Normal(0.5, torch.tensor(0.7)).rsample()
    likelihood = 3 / 2 * dist.Normal(m, 1.0).log_prob(batch.x).sum()
    latent = dist.Normal(0.0, 2.0).log_prob(m) - dist.Normal(0.5, 0.7).log_prob(m)
    assert loss.item() == pytest.approx(-(likelihood - gamma * m**2 + w * latent).item(), abs=1e-5)


def test_kl_weight_with_closed_form_kl():
    x, w = torch.tensor([1.0, -2.0, 0.5]), 0.25
    config = FitConfig(steps=2, lr=1e-9, kl_warmup_steps=4, elbo="meanfield", seed=5, device="cpu")
    _, info = fit(normal_pair(), Rows(x), config)  # step 1 has weight 1/4
    with rng_scope(5, "noise", 1):
        m = dist.Normal(0.5, torch.tensor(0.7)).rsample()
    kl = torch.distributions.kl_divergence(dist.Normal(0.5, 0.7), dist.Normal(0.0, 2.0))
    assert info.losses[1] == pytest.approx((w * kl - dist.Normal(m, 1.0).log_prob(x).sum()).item(), abs=1e-5)


def test_schedules_are_the_stated_functions():
    config = FitConfig(
        steps=12, lr=0.4, schedule="cosine", warmup_steps=4, final_lr_factor=0.1, kl_warmup_steps=4
    )
    rates = [learning_rate(config, step) for step in range(13)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[8] == pytest.approx(0.4 * (0.1 + 0.9 / 2)) and rates[12] == pytest.approx(0.04)
    assert learning_rate(replace(config, schedule="constant"), 11) == 0.4
    assert [kl_weight(config, step) for step in range(6)] == [1e-6, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert kl_weight(replace(config, kl_warmup_steps=0), 0) == 1.0


def test_fit_equals_a_plain_torch_loop():
    config = replace(
        NET,
        optimizer="amsgrad",
        betas=(0.8, 0.95),
        eps=1e-3,
        weight_decay=0.05,
        final_lr_factor=0.2,
        particles=2,
        clip_norm=20.0,
        seed=11,
        lr_groups={r"guide\.encoder": 0.5, r"^guide\.|bias$": 2.0},
    )
    state, info = fit(net_pair(), net_rows(), config, scale=0.3)

    pair = net_pair()
    multiplier = {"encoder": 0.5, "loc": 2.0}
    named = [(n, p, 2.0 if n.endswith("bias") else 1.0) for n, p in pair.model.named_parameters()]
    named += [(n, p, multiplier[n.split(".")[0]]) for n, p in pair.guide.named_parameters()]
    adam = torch.optim.Adam(
        [{"params": [p]} for _, p, _ in named], betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05, amsgrad=True
    )
    rows, losses, norms = net_rows(), [], []
    for step in range(10):
        w = max(1e-6, min(1, step / 8))
        model, guide = (scale_latents(w)(module) for module in pair)
        adam.zero_grad()
        with rng_scope(11, "noise", step):
            loss = 0.3 * Trace_ELBO(num_particles=2).differentiable_loss(model, guide, rows.at(step))
        loss.backward()
        norms.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for _, p, _ in named])).item())
        if norms[-1] > 20.0:
            for _, p, _ in named:
                p.grad *= 20.0 / norms[-1]
        lr = 0.02 * ((step + 1) / 3 if step < 3 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 3) / 7)) / 2)
        for group, (_, _, m) in zip(adam.param_groups, named, strict=True):
            group["lr"] = lr * m
        adam.step()
        losses.append(loss.item())
    assert max(norms) > 20.0 > min(norms)  # both branches of the clipping
    assert info.losses == pytest.approx(losses, rel=1e-4) and info.grad_norms == pytest.approx(
        norms, rel=1e-3
    )
    for side, module in zip((state.model, state.guide), pair, strict=True):
        for name, tensor in module.state_dict().items():
            assert torch.allclose(side[name].float(), tensor.float(), atol=1e-4), name


def test_first_step_refuses_silent_broadcasting():
    class Broadcast(NormalModel):
        def forward(self, batch, *, observe=True):
            m = pyro.sample("m", dist.Normal(0.0, 2.0))
            with pyro.plate("cells", batch.size, subsample=batch.idx):
                pyro.sample("x", dist.Normal(m, 1.0).expand(batch.x.shape), obs=batch.x[:, None])

    with pytest.raises(ValueError, match=r"(?s)shape.*'x'|'x'.*shape|invalid log_prob shape"):
        fit(Pair(Broadcast(), NormalGuide()), Rows(torch.ones(5)), FitConfig(steps=1, device="cpu"))


# --- resume ----------------


def test_data_order_covers_each_epoch_once_and_is_a_function_of_the_step():
    epoch = [epoch_order(23, 8, 3, step) for step in (2, 0, 1)]
    assert sorted(np.concatenate(epoch)) == list(range(23)) and len(epoch[0]) == 7
    again = epoch_order(23, 8, 3, 2)
    again[:] = 0  # the caller's copy
    assert np.array_equal(epoch_order(23, 8, 3, 2), epoch[0])
    assert not np.array_equal(epoch_order(23, 8, 3, 0), epoch_order(23, 8, 3, 3))
    assert not np.array_equal(epoch_order(23, 8, 3, 0), epoch_order(23, 8, 4, 0))


def test_five_and_five_steps_equal_ten(tmp_path):
    whole, info = fit(net_pair(), net_rows(), NET)
    half, first = fit(net_pair(), net_rows(), NET, until=5)
    assert first.stop_reason == "interrupted" and half.step == 5
    kept = copy.deepcopy(half)
    save_state(half, tmp_path / "state.pt")
    rest, second = fit(net_pair(seed=9), net_rows(), NET, load_state(tmp_path / "state.pt"))
    assert same(whole, rest) and second.stop_reason == "steps" and second.first_step == 5
    assert np.array_equal(info.losses, np.concatenate([first.losses, second.losses]))
    assert np.array_equal(info.lr, np.concatenate([first.lr, second.lr]))
    in_memory, _ = fit(net_pair(seed=9), net_rows(), NET, half)
    assert same(whole, in_memory) and same(half, kept), "the state handed in was changed"
    other, _ = fit(net_pair(), net_rows(), replace(NET, seed=1))
    assert not same(whole, other), "the comparison cannot fail"


def test_kill_and_resume_equals_the_uninterrupted_run(tmp_path):
    killed = subprocess.run(
        [sys.executable, __file__, str(tmp_path), "8"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = load_state(tmp_path / "state.pt")
    assert state.step == 5
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6, 8]
    rest, _ = fit(net_pair(), net_rows(), NET, state, folder=tmp_path)
    whole, _ = fit(net_pair(), net_rows(), NET)
    assert same(whole, rest) and same(whole, load_state(tmp_path / "state.pt"))
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    rows = net_rows(hook=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    state, info = fit(net_pair(), rows, NET, folder=tmp_path)
    assert info.stop_reason == "interrupted" and state.step == 4 and len(info.losses) == 4
    assert signal.getsignal(number) is before
    rest, _ = fit(net_pair(), net_rows(), NET, load_state(tmp_path / "state.pt"))
    assert same(rest, fit(net_pair(), net_rows(), NET)[0])


def test_second_signal_gives_up_at_once():
    rows = net_rows(hook=lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        fit(net_pair(), rows, NET)


def test_fit_outside_the_main_thread_installs_nothing():
    result = []
    worker = threading.Thread(target=lambda: result.append(fit(net_pair(), net_rows(), NET)))
    worker.start()
    worker.join()
    assert same(result[0][0], fit(net_pair(), net_rows(), NET)[0])


# --- isolation ----------------


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


# --- faults ----------------


def nan(x):
    return torch.full_like(x, math.nan)


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
    assert same(whole, fit(net_pair(), rows, NET, half)[0])


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


# --- stopping ----------------


def test_early_stop_when_the_smoothed_loss_stands_still():
    x = torch.tensor([1.0, 2.0, 4.0])
    config = FitConfig(steps=5000, lr=0.05, patience=3, window=20, min_delta=1e-2, device="cpu")
    state, info = fit(normal_pair(), Rows(x), config)
    assert info.stop_reason == "converged" and state.step < 3000 and state.step % 20 == 0
    again, later = fit(normal_pair(), Rows(x), config, state)  # a finished fit stays finished
    assert later.stop_reason == "converged" and len(later.losses) == 0 and same(again, state)
    late, _ = fit(normal_pair(), Rows(x), replace(config, min_steps=state.step + 7))
    assert late.step >= state.step + 7 + 4 * 20 and (late.step - state.step - 7) % 20 == 0
    slow, _ = fit(normal_pair(), Rows(x), replace(config, kl_warmup_steps=300))
    assert slow.step >= 300 + 4 * 20
    assert fit(normal_pair(), Rows(x), replace(config, steps=400, patience=0))[1].stop_reason == "steps"


def test_min_delta_and_patience_count_windows():
    far = torch.full((3,), 50.0)  # the loss falls all the way
    config = FitConfig(steps=200, patience=3, window=20, device="cpu")
    assert fit(normal_pair(), Rows(far), config)[1].stop_reason == "steps"
    state, info = fit(normal_pair(), Rows(far), replace(config, min_delta=1e6))
    assert info.stop_reason == "converged" and state.step == 20 + 3 * 20


def log_of(folder):
    text = (folder / "log.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def test_log_is_well_formed_after_resume(tmp_path):
    fit(net_pair(), net_rows(), NET, folder=tmp_path, until=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(
            '{"step": 6, "loss": 1.0}\n{"step": 7, "lo'
        )  # steps past the checkpoint, and a line cut short
    state = load_state(tmp_path / "state.pt")
    _, info = fit(net_pair(), net_rows(spoil={8: nan}), NET, state, folder=tmp_path)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9, 10]
    assert set(lines[0]) == {"step", "loss", "smoothed", "lr", "grad_norm", "seconds", "fault"}
    assert lines[4]["loss"] is None and "site" in lines[4]["fault"] and lines[2]["loss"] == info.losses[0]
    fit(net_pair(), net_rows(), NET, folder=tmp_path, until=2)
    assert [line["step"] for line in log_of(tmp_path)] == [2]


def test_trouble_with_the_log_does_not_stop_the_fit(tmp_path, caplog):
    (tmp_path / "log.jsonl").mkdir()
    with caplog.at_level(logging.WARNING, logger="ppl_st"):
        state, _ = fit(net_pair(), net_rows(), NET, folder=tmp_path)
    assert same(state, fit(net_pair(), net_rows(), NET)[0]) and "no log is written" in caplog.text


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    def shrink(step):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"state\.pt"):
            fit(net_pair(), net_rows(hook=shrink), NET, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_state(tmp_path / "state.pt").step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_no_space_at_the_rename_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    state, _ = fit(net_pair(), net_rows(), NET, folder=tmp_path, until=3)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"state\.pt.*space"):
        fit(net_pair(), net_rows(), NET, state, folder=tmp_path)
    monkeypatch.undo()
    assert same(load_state(tmp_path / "state.pt"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    rows = net_rows(hook=lambda step: pytest.fail("trained first"))
    with pytest.raises(UserError, match="file"):
        fit(net_pair(), rows, NET, folder=tmp_path / "file")


def test_damaged_or_foreign_states_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(UserError, match="no saved fit state"):
        load_state(path)
    save_state(fit(normal_pair(), Rows(torch.ones(3)), FitConfig(steps=1, device="cpu"))[0], path)
    with pytest.raises(UserError, match="another model"):
        fit(net_pair(), net_rows(), NET, load_state(path))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt: the saved fit state cannot be read"):
            load_state(path)
    for foreign in ({"a": torch.zeros(1)}, torch.zeros(2)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="not a fit state"):
            load_state(path)


def test_state_file_holds_no_code(tmp_path):
    fit(net_pair(), net_rows(), NET, folder=tmp_path)

    def plain(x):
        if isinstance(x, dict):
            return all(plain(k) and plain(v) for k, v in x.items())
        if isinstance(x, list):
            return all(map(plain, x))
        return isinstance(x, Tensor) or type(x) in (int, float, str)

    assert plain(torch.load(tmp_path / "state.pt", weights_only=True))


# --- settings and progress ----------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.0)},
        {"schedule": "linear"},
        {"optimizer": "sgd"},
        {"elbo": "graph"},
        {"seed": -1},
        {"final_lr_factor": 2.0},
        {"log_every": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    key = next(iter(wrong))
    with pytest.raises(UserError, match=f"{key} = "):
        FitConfig(**wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr_groups": {"decodr": 2.0}}, r"'decodr' matches no parameter; there are model\.decoder"),
        ({"lr_groups": {"(": 2.0}}, "no regular expression"),
        ({"device": "abacus"}, "'abacus'"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_settings_that_do_not_fit_the_pair_or_machine_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        fit(net_pair(), net_rows(), replace(NET, **setting))


def test_progress_lines_off_a_terminal(capsys):
    fit(net_pair(), net_rows(), replace(NET, steps=40), progress="auto")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("fit  10 %  step 4/40  loss ")
    fit(net_pair(), net_rows(), NET)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(monitor.sys.stderr, "isatty", lambda: True)
    fit(net_pair(), net_rows(), NET, progress="auto")
    assert "10/10" in capsys.readouterr().err


def test_guard_refuses_the_bare_name():
    code = "import inference"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "import ppl_st.inference" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fit_on_cuda_repeats_and_leaves_random_states_alone():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    config = replace(NET, device="auto")
    state, _ = fit(net_pair(), net_rows(), config)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    half, _ = fit(net_pair(), net_rows(), config, until=5)
    rest, _ = fit(net_pair(), net_rows(), config, half)
    for a, b in ((state.model, rest.model), (state.guide, rest.guide)):
        assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-5) for k in a)


if __name__ == "__main__":

    def kill(step):
        if step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    fit(net_pair(), net_rows(hook=kill), NET, folder=sys.argv[1])

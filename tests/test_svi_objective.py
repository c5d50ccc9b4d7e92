"""The objective and the optimiser: exact posteriors, and a loop written out by hand."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam

from ppl_st.inference.svi import FitConfig, Pair, fit, kl_weight, learning_rate, rng_scope, scale_latents
from svi_pairs import NET, POSITIVE, Batch, NormalGuide, NormalModel, Rows, empty_store, net_pair, net_rows, normal_pair

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


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


# --- against a loop written out by hand ----------------


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

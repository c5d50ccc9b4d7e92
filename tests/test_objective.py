"""The lean estimators against Pyro's own: the same loss, the same gradients, and what was drawn."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from ppl_st.inference.objective import estimator, total_norm
from ppl_st.inference.randomness import rng_scope

X = torch.tensor([[1.0, 3.0], [0.0, 2.0], [4.0, 0.0]])
ROWS = torch.tensor([0, 2])
PARAMETERS = {name: torch.tensor(value, requires_grad=True) for name, value in (("a", 0.3), ("b", -0.4), ("c", 0.2), ("d", 0.1))}


def model(batch):
    """Closed-form KL (m, z), none (t), masked by a tensor (z), masked away (u), scaled, a factor, and the guide's own site (v)."""
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    t = pyro.sample("t", dist.Gamma(torch.tensor(2.0), 1.0))
    with poutine.mask(mask=False):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("cells", 5, subsample=ROWS):
        with poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with poutine.scale(scale=0.7):
            pyro.sample("x", dist.Poisson((m + z[:, None] + 0.1 * u).exp() * t).to_event(1), obs=batch)
    pyro.factor("pull", -z.square().sum())


def guide(batch):
    a, b, c, d = PARAMETERS.values()
    pyro.sample("m", dist.Normal(torch.stack([a, b]), c.exp()).to_event(1))
    pyro.sample("t", dist.LogNormal(d, 0.5))
    pyro.sample("v", dist.Normal(b, d.exp()), infer={"is_auxiliary": True})
    with poutine.mask(mask=False):
        pyro.sample("u", dist.Normal(a, 1.0))
    with pyro.plate("cells", 5, subsample=ROWS), poutine.mask(mask=torch.tensor([True, False])):
        pyro.sample("z", dist.Normal(a * batch.sum(1), b.exp()))


def evaluated(elbo, seed=0):
    for parameter in PARAMETERS.values():
        parameter.grad = None
    with rng_scope(seed, "test"):
        loss = elbo.differentiable_loss(model, guide, X[ROWS])
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in PARAMETERS.values())]


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind, pyros", [("meanfield", TraceMeanField_ELBO), ("trace", Trace_ELBO)])
def test_loss_and_gradients_are_pyros(kind, pyros, checked):
    with pyro.validation_enabled(checked):
        for particles in (1, 3):
            torch.testing.assert_close(evaluated(estimator(kind, particles)), evaluated(pyros(num_particles=particles)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(evaluated(estimator(kind, 1))[0], evaluated(estimator(kind, 1), seed=1)[0])


@pytest.mark.parametrize("kind", ["meanfield", "trace"])
def test_what_the_guide_drew_is_kept_without_its_graph(kind):
    elbo = estimator(kind, 1)
    evaluated(elbo)
    with rng_scope(0, "test"):
        nodes = poutine.trace(guide).get_trace(X[ROWS]).nodes
    assert set(elbo.drawn) == {"m", "t", "u", "v", "z"}
    assert all(torch.equal(value, nodes[name]["value"]) and not value.requires_grad for name, value in elbo.drawn.items())


def test_a_guide_without_reparameterised_draws_is_refused_by_closed_form_kl():
    logit = torch.tensor(0.0, requires_grad=True)

    def switched(batch):
        pyro.sample("x", dist.Normal(4 * pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=batch)

    def switch(batch):
        pyro.sample("z", dist.Bernoulli(logits=logit))

    with pyro.validation_enabled(True):
        estimator("trace", 1).differentiable_loss(switched, switch, torch.tensor(4.0))
        with pytest.raises(NotImplementedError, match="fully reparameterized"):
            estimator("meanfield", 1).differentiable_loss(switched, switch, torch.tensor(4.0))


def test_the_norm_of_all_tensors_together():
    assert total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == pytest.approx(5.0)
    assert total_norm([]) == 0.0
    assert not torch.isfinite(torch.tensor(total_norm([torch.ones(2), torch.tensor([float("nan")])])))

"""The second player: losses, a game that tells two sets of codes apart, faults, state."""

import pytest
import torch
from torch import nn

from ppl_st.inference.adversary import Adversary, Player, critic_loss, generator_loss, gradient_penalty, logits
from ppl_st.networks import MLP

KINDS = ("cross_entropy", "density_ratio", "hinge", "hinge_published")


def gaussians(batch):
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(256, 2, generator=generator) + 1.5, torch.randn(256, 2, generator=generator)


def trained(kind, steps=150):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = MLP([2, 16, 1])
    game = Adversary([Player(critic, gaussians)], kind, lr=0.02)
    for step in range(steps):
        assert game.step(step, 0, step) == ""
    return game, critic


def accuracy(critic):
    with torch.no_grad():
        real, fake = (critic(codes).ravel() for codes in gaussians(999))
    return float(((real > 0).float().mean() + (fake < 0).float().mean()) / 2)


@pytest.mark.parametrize("kind", ["cross_entropy", "density_ratio", "hinge"])
def test_the_critic_learns_to_tell_two_gaussians_apart(kind):
    _, critic = trained(kind)
    assert accuracy(critic) > 0.8


def test_the_published_hinge_of_spagene_does_not_separate_what_the_right_sign_does():
    _, critic = trained("hinge_published")
    with torch.no_grad():
        real, fake = (critic(codes).ravel() for codes in gaussians(999))
    assert (fake > 0).float().mean() > 0.9 and (real > 0).float().mean() > 0.9  # it calls everything real


def test_the_density_ratio_is_the_log_ratio():
    _, critic = trained("density_ratio", 400)
    codes = torch.tensor([[0.0, 0.0], [0.75, 0.75], [1.5, 1.5]])
    exact = 1.5 * codes.sum(1) - 1.5**2  # log N(x; 1.5) - log N(x; 0) in two dimensions
    with torch.no_grad():
        torch.testing.assert_close(critic(codes).ravel(), exact, atol=0.7, rtol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_lowers_its_loss_by_moving_fakes_towards_reals(kind):
    real, fake = torch.tensor([2.0, 1.0]), torch.tensor([-2.0, -1.0], requires_grad=True)
    loss = generator_loss(kind, real, fake)
    loss.backward()
    assert (fake.grad < 0).all()
    assert critic_loss(kind, real, fake).isfinite()


def test_a_step_touches_the_critic_only_and_a_faulty_one_nothing():
    maker = nn.Linear(2, 2)
    critic = MLP([2, 4, 1])
    game = Adversary([Player(critic, lambda batch: (maker(batch), batch))], "hinge")
    game.step(torch.randn(8, 2), 0, 0)
    assert maker.weight.grad is None
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    assert game.step(torch.full((8, 2), torch.nan), 0, 1) == "the loss of the critic"
    assert all(torch.equal(before[name], value) for name, value in critic.state_dict().items())


def test_state_goes_out_and_in_bitwise():
    game, critic = trained("hinge", 5)
    other, copy = trained("hinge", 0)
    other.restore(game.state())
    for step in (5, 6):
        game.step(step, 0, step)
        other.step(step, 0, step)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), copy.parameters(), strict=True))


def test_the_pair_computes_no_gradients_of_the_critic():
    _, critic = trained("cross_entropy", 2)
    for parameter in critic.parameters():
        parameter.grad = None
    codes = torch.randn(8, 2, requires_grad=True)
    generator_loss("cross_entropy", *logits(critic, codes, codes + 1)).backward()
    assert codes.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in critic.parameters())


@pytest.mark.parametrize("center", [0.0, 1.0])
def test_the_gradient_penalty_of_a_linear_critic_is_the_distance_of_its_slope_from_the_center(center):
    critic = nn.Linear(4, 1)
    found = gradient_penalty(critic, torch.randn(9, 4), torch.randn(6, 4), center)
    assert found.item() == pytest.approx((critic.weight.norm().item() - center) ** 2, rel=1e-5)
    found.backward()  # the critic learns from it: d/dw = 2 (|w| - c) w / |w|
    slope = critic.weight.detach()
    torch.testing.assert_close(critic.weight.grad, 2 * (slope.norm() - center) * slope / slope.norm())

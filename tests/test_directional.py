"""Power spherical distribution: normaliser, limits, moments, draws and their gradients; the cosine loss as a von Mises-Fisher."""

import copy
import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from ppl_st.directional import PowerSpherical, cosine
from ppl_st.errors import UserError
from seeded import own_seed

DOUBLE = torch.float64
_own_seed = pytest.fixture(own_seed, autouse=True)


def _exact(d, kappa, c):
    """log density at that cosine and its derivative by kappa."""
    b = mpmath.mpf(d - 1) / 2
    a, kappa = b + kappa, mpmath.mpf(kappa)
    value = kappa * mpmath.log1p(c) - (a + b) * mpmath.log(2) - b * mpmath.log(mpmath.pi)
    value += mpmath.loggamma(a + b) - mpmath.loggamma(a)
    return value, mpmath.log((1 + c) / 2) + mpmath.digamma(a + b) - mpmath.digamma(a)


def _pair(d, c, dtype):
    """A direction and a unit vector at (about) that cosine; and the cosine they have once rounded."""
    direction, other = torch.zeros(d, dtype=DOUBLE), torch.zeros(d, dtype=DOUBLE)
    direction[0], other[0], other[-1] = 1.0, c, math.sqrt(1 - c * c)
    x = other.to(dtype)
    first, last = (mpmath.mpf(v.item()) for v in (x[0], x[-1]))
    return direction.to(dtype), x, first / mpmath.sqrt(first**2 + last**2)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("d", [2, 3, 10, 1000, 10**6])
def test_density_and_gradient_against_mpmath(d, dtype):
    relative, gradient = (1e-7, 1e-6) if dtype == torch.float32 else (1e-12, 1e-9)
    for c in (-0.9, 0.0, 0.6, 0.999):
        direction, x, exact_c = _pair(d, c, dtype)
        kappas = torch.tensor([0.0, 1e-6, 0.7, 30.0, 1e4, 1e6, 1e12], dtype=dtype, requires_grad=True)
        value = PowerSpherical(direction, kappas).log_prob(x)
        (slope,) = torch.autograd.grad(value.sum(), kappas)
        with mpmath.workdps(60):
            for i, kappa in enumerate(kappas.tolist()):
                want, want_slope = _exact(d, kappa, exact_c)
                assert abs(value[i].item() - want) <= relative * max(abs(want), 1), (c, kappa)
                assert abs(slope[i].item() - want_slope) <= gradient * abs(want_slope), (c, kappa)


def test_no_concentration_is_the_uniform_distribution():
    for d in (2, 3, 50, 10**6):
        area = math.log(2) + d / 2 * math.log(math.pi) - math.lgamma(d / 2)
        value = PowerSpherical(torch.ones(d, dtype=DOUBLE), 0.0).log_prob(torch.randn(2, d, dtype=DOUBLE))
        torch.testing.assert_close(value, torch.full((2,), -area, dtype=DOUBLE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kappa", [0.0, 0.5, 4.0, 200.0])
@pytest.mark.parametrize("d", [2, 3, 7])
def test_normalised_with_the_stated_resultant_length(d, kappa):
    area = (
        math.log(2) + (d - 1) / 2 * math.log(math.pi) - math.lgamma((d - 1) / 2)
    )  # of the sphere of one dimension less

    def density(angle):
        direction, x, _ = _pair(d, math.cos(angle), DOUBLE)
        return math.exp(PowerSpherical(direction, kappa).log_prob(x).item() + area) * math.sin(angle) ** (d - 2)

    total = scipy.integrate.quad(density, 0, math.pi)[0]
    mean = scipy.integrate.quad(lambda a: density(a) * math.cos(a), 0, math.pi)[0]
    assert total == pytest.approx(1, abs=1e-7)
    length = PowerSpherical(torch.ones(d, dtype=DOUBLE), kappa).resultant_length.item()
    assert mean == pytest.approx(length, abs=1e-7)


def test_lengths_do_not_matter_and_nothing_is_infinite():
    direction, x = torch.randn(5, dtype=DOUBLE), torch.randn(5, dtype=DOUBLE)
    d = PowerSpherical(direction, 3.0)
    torch.testing.assert_close(PowerSpherical(7 * direction, 3.0).log_prob(1e-9 * x), d.log_prob(x))
    corners = torch.stack([torch.zeros(5, dtype=DOUBLE), direction, -direction]).requires_grad_()
    kappa = torch.tensor([0.0, 3.0, 1e6], dtype=DOUBLE, requires_grad=True)
    value = PowerSpherical(direction, kappa).log_prob(corners.unsqueeze(1).expand(3, 3, 5))
    assert torch.isfinite(value).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value.sum(), (corners, kappa)))
    exactly = PowerSpherical(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0, 1e6])).log_prob(
        torch.tensor([-1.0, 0.0])
    )
    assert torch.isfinite(exactly).all() and (exactly[1:] < -70).all()  # the density there is 0
    across = d.log_prob(torch.linalg.svd(direction.unsqueeze(0))[2][1])
    torch.testing.assert_close(d.log_prob(corners[0]), across, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x = torch.randn(4, 3, dtype=DOUBLE, requires_grad=True)
    direction = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    kappa = torch.tensor([0.3, 2.0, 40.0, 900.0], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m, k: PowerSpherical(m, k).log_prob(x), (x, direction, kappa))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("first", [1.0, 1 - 1e-7, 1e-9, -1e-9, -1 + 1e-7, -1.0])
def test_draws_fit_the_density(first, dtype):
    n, d, kappa = 4000, 5, 6.0
    direction = torch.tensor([first, 0.0, math.sqrt(1 - first * first), 0.0, 0.0], dtype=dtype)
    model = PowerSpherical(direction, kappa)
    x = model.sample((n,))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert x.shape == (n, d) and x.dtype == dtype
    assert (torch.linalg.vector_norm(x.double(), dim=-1) - 1).abs().max() < tolerance
    b = (d - 1) / 2
    c = cosine(x, direction)
    assert scipy.stats.kstest(((1 + c) / 2).numpy(), scipy.stats.beta(b + kappa, b).cdf).pvalue > 1e-4
    rest = x.double() - c.unsqueeze(-1) * direction.double()
    rest = rest / torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
    for axis in (1, 3, 4):  # orthogonal to the direction: (1 + coordinate) / 2 of a uniform direction in 4 dimensions
        assert scipy.stats.kstest(((1 + rest[:, axis]) / 2).numpy(), scipy.stats.beta(1.5, 1.5).cdf).pvalue > 1e-4
    assert ((x.mean(0) - model.mean).abs() < 5 * (model.variance / n).sqrt() + 1e-6).all()
    torch.testing.assert_close(x.var(0), model.variance, rtol=0.12, atol=1e-3)


def test_draws_in_a_million_dimensions():
    d = 10**6
    x = PowerSpherical(torch.ones(d), torch.tensor([0.0, 1e6, 1e9])).sample()
    c = cosine(x, torch.ones(d))
    want = torch.tensor([0.0, 0.5, 1e9 / (1e9 + 1e6)], dtype=DOUBLE)
    assert (c - want).abs().max() < 6e-3
    assert (torch.linalg.vector_norm(x.double(), dim=-1) - 1).abs().max() < 1e-5


def test_draws_are_differentiable_by_both_parameters():
    d, n = 6, 40000
    direction = torch.randn(d, dtype=DOUBLE)
    direction = (direction / direction.norm()).requires_grad_()
    kappa = torch.tensor(4.0, dtype=DOUBLE, requires_grad=True)
    weights = torch.randn(d, dtype=DOUBLE)
    draws = PowerSpherical(direction, kappa).rsample((n,))
    by_direction, by_kappa = torch.autograd.grad((draws @ weights).mean(), (direction, kappa))
    exact = PowerSpherical(direction, kappa).mean @ weights
    want_direction, want_kappa = torch.autograd.grad(exact, (direction, kappa))
    torch.testing.assert_close(by_direction, want_direction, rtol=0, atol=0.02)
    torch.testing.assert_close(by_kappa, want_kappa, rtol=0, atol=0.002)
    assert want_kappa.abs() > 0.01


def test_the_largest_likelihood_is_where_the_resultant_length_is_the_mean_cosine():
    d, length = 20000, 0.6
    direction, x, _ = _pair(d, length, DOUBLE)
    # With one cosine c the maximum of kappa log((1 + c) / 2) - log Z has E log((1 + cosine) / 2) = log((1 + c) / 2).
    kappa = torch.tensor((d - 1) * length / (1 - length), dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(PowerSpherical(direction, kappa).log_prob(x), kappa)
    assert abs(slope.item()) < 1e-5


def test_the_cosine_loss_is_a_von_mises_fisher_up_to_a_constant():
    rng, weight = np.random.default_rng(0), 3.5
    direction = rng.normal(size=4)
    direction /= np.linalg.norm(direction)
    x = rng.normal(size=(20, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    loss = weight * (1 - cosine(torch.tensor(x), torch.tensor(direction)))
    density = scipy.stats.vonmises_fisher(direction, weight).logpdf(x)
    constant = density + loss.numpy()
    np.testing.assert_allclose(constant, constant[0], rtol=1e-10)
    # and the power spherical with twice the weight has the same slope by the cosine where vectors agree
    near = torch.tensor([1 - 1e-6, 1.0], dtype=DOUBLE)
    pairs = [_pair(4, c, DOUBLE) for c in near.tolist()]
    values = [PowerSpherical(m, 2 * weight).log_prob(v).item() for m, v, _ in pairs]
    assert values[1] - values[0] == pytest.approx(weight * 1e-6, rel=1e-4)


def test_shapes_are_checked_and_expand_copies_nothing():
    direction, kappa = torch.randn(5, 3), torch.rand(5)
    d = PowerSpherical(direction, kappa)
    assert d.batch_shape == (5,) and d.event_shape == (3,)
    wide = d.expand((4, 5))
    assert wide._given["direction"] is direction and wide.concentration is kappa
    assert wide.log_prob(torch.randn(5, 3)).shape == (4, 5)
    assert wide.sample((2,)).shape == (2, 4, 5, 3) and wide.mean.shape == wide.variance.shape == (4, 5, 3)
    assert PowerSpherical(direction, torch.rand(4, 1)).sample().shape == (4, 5, 3)
    for bad in (torch.randn(5, 1, 3), torch.randn(5, 4), torch.randn(4, 3)):
        with pytest.raises(UserError):
            d.log_prob(bad)
    with pytest.raises(UserError, match="cannot expand"):
        d.expand((4,))
    with pytest.raises(UserError, match="concentration must be"):
        PowerSpherical(direction, -kappa - 0.1, validate_args=True)
    with pytest.raises(UserError, match="at least two"):
        PowerSpherical(torch.ones(1), 1.0)
    with pytest.raises(UserError, match="not finite"):
        d.log_prob(torch.tensor([0.0, 1.0, float("nan")]).expand(5, 3))


def test_nothing_read_changes_log_prob_and_float32_agrees_with_float64():
    direction, kappa, x = torch.randn(5, 300), torch.rand(5) * 500, torch.randn(5, 300)
    d = PowerSpherical(direction, kappa)
    before = d.log_prob(x)
    _ = d.mean, d.variance, d.direction, d.concentration, d.sample((2,)), d.expand((2, 5)).log_prob(x)
    for other in (d, copy.deepcopy(d), d.expand((5,))):
        assert torch.equal(before, other.log_prob(x))
    wide = PowerSpherical(direction.double(), kappa.double()).log_prob(x.double())
    torch.testing.assert_close(before.double(), wide, rtol=1e-6, atol=1e-5)

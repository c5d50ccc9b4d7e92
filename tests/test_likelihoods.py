"""Observation models against mpmath and scipy; gradients, moments, shapes, state."""

import copy
import itertools
import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pyro
import pytest
import scipy.stats
import torch

from ppl_st import likelihood_math
from ppl_st.errors import UserError
from ppl_st.likelihoods import Gaussian, NegativeBinomial, Poisson, count_quantile
from seeded import own_seed

_own_seed = pytest.fixture(own_seed, autouse=True)


def _exact_nb(x, mu, theta):
    """log p and its derivatives by mu and theta, to 60 digits."""
    with mpmath.workdps(60):
        x, mu, theta = (mpmath.mpf(v) for v in (x, mu, theta))
        value = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        value += theta * mpmath.log(theta / (theta + mu)) + x * mpmath.log(mu / (mu + theta))
        by_mu = (x - mu) * theta / (mu * (mu + theta))
        by_theta = (
            mpmath.digamma(x + theta)
            - mpmath.digamma(theta)
            + mpmath.log(theta / (theta + mu))
            + (mu - x) / (theta + mu)
        )
        return value, by_mu, by_theta


def _exact_poisson(x, mu):
    with mpmath.workdps(60):
        x, mu = mpmath.mpf(x), mpmath.mpf(mu)
        return x * mpmath.log(mu) - mu - mpmath.loggamma(x + 1), x / mu - 1


GRID_X = [0, 1, 2, 7, 100, 1000, 10**6]
GRID_MEAN = [1e-12, 1e-6, 1e-2, 1.0, 5.0, 1e4, 1e8]
GRID_THETA = [1e-8, 1e-4, 0.3, 1.0, 50.0, 1e4, 1e8]


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_negative_binomial_against_mpmath(dtype, logs):
    grid = torch.tensor(list(itertools.product(GRID_X, GRID_MEAN, GRID_THETA)), dtype=torch.float64)
    x, mean, theta = (c.to(dtype) for c in grid.T)
    if logs:
        mean, theta = mean.log(), theta.log()
    mean.requires_grad_()
    theta.requires_grad_()
    d = NegativeBinomial(log_mean=mean, log_theta=theta) if logs else NegativeBinomial(mean, theta)
    value = d.log_prob(x)
    by_mean, by_theta = torch.autograd.grad(value.sum(), (mean, theta))
    relative, gradient = (1e-7, 1e-6) if dtype == torch.float32 else (1e-9, 1e-9)
    for i in range(len(x)):
        xi, m, t = float(x[i]), mpmath.mpf(float(mean[i].detach())), mpmath.mpf(float(theta[i].detach()))
        if logs:
            m, t = mpmath.exp(m), mpmath.exp(t)
        want, want_mean, want_theta = _exact_nb(xi, m, t)
        if logs:
            want_mean, want_theta = want_mean * m, want_theta * t
        where = (xi, float(m), float(t))
        assert abs(value[i].item() - want) <= relative * abs(want), where
        if xi <= 1e3 and 1e-6 <= m <= 1e4 and t >= 1e-4:
            assert abs(value[i].item() - want) <= 2e-3, where
        if abs(want_mean) > 1e-30 and abs(xi - m) > 1e-9 * xi:
            assert abs(by_mean[i].item() - want_mean) <= gradient * abs(want_mean), where
        if abs(want_theta) > 1e-30:
            assert abs(by_theta[i].item() - want_theta) <= gradient * abs(want_theta), where


def test_float64_slopes_at_random_points_are_good_to_ten_digits():
    """Also where they cross zero and the terms of digamma cancel."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.choice([0, 1, 2, 3, 5, 10, 50, 300, 10**4], 1500)).double()
    mean, theta = (torch.from_numpy(10 ** rng.uniform(*ends, 1500)).requires_grad_() for ends in ((-6, 4), (-4, 8)))
    by_mean, by_theta = torch.autograd.grad(NegativeBinomial(mean, theta).log_prob(x).sum(), (mean, theta))
    for i in range(len(x)):
        _, want_mean, want_theta = _exact_nb(x[i].item(), mean[i].item(), theta[i].item())
        assert abs(by_mean[i].item() - want_mean) <= 1e-10 * abs(want_mean)
        assert abs(by_theta[i].item() - want_theta) <= 1e-10 * abs(want_theta)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poisson_against_mpmath(dtype, logs):
    grid = torch.tensor(list(itertools.product(GRID_X, GRID_MEAN)), dtype=torch.float64)
    if logs:
        grid = grid[grid[:, 1] > 2e-12]
    x, mean = (c.to(dtype) for c in grid.T)
    mean = (mean.log() if logs else mean).requires_grad_()
    value = (Poisson(log_mean=mean) if logs else Poisson(mean)).log_prob(x)
    (slope,) = torch.autograd.grad(value.sum(), mean)
    tolerance = 1e-7 if dtype == torch.float32 else 1e-9
    for i in range(len(x)):
        m = mpmath.mpf(float(mean[i].detach()))
        m = mpmath.exp(m) if logs else m
        want, want_slope = _exact_poisson(float(x[i]), m)
        want_slope = want_slope * m if logs else want_slope
        assert abs(value[i].item() - want) <= tolerance * abs(want)
        if abs(x[i].item() - m) > 1e-9 * m:
            assert abs(slope[i].item() - want_slope) <= 1e-6 * abs(want_slope)


def test_poisson_is_the_limit_of_large_theta_in_float32():
    x, mean = torch.tensor([0.0, 1.0, 7.0, 300.0]), torch.tensor([5.0, 1.0, 5.0, 250.0])
    torch.testing.assert_close(
        NegativeBinomial(mean, 1e12).log_prob(x), Poisson(mean).log_prob(x), rtol=1e-6, atol=0
    )
    draws = NegativeBinomial(mean, 1e12).sample((20000,))
    torch.testing.assert_close(draws.var(0), mean, rtol=0.06, atol=0)


def test_scipy_twins():
    x = torch.arange(0, 60, dtype=torch.float64).unsqueeze(-1)
    mean, theta = (
        torch.tensor([0.2, 3.0, 17.0], dtype=torch.float64),
        torch.tensor([0.4, 2.0, 90.0], dtype=torch.float64),
    )
    nb, twin = (
        NegativeBinomial(mean, theta).expand((60, 3)),
        scipy.stats.nbinom(theta.numpy(), (theta / (theta + mean)).numpy()),
    )
    np.testing.assert_allclose(nb.log_prob(x), twin.logpmf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(nb.cdf(x), twin.cdf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(nb.variance[0], twin.var(), rtol=1e-9)
    poisson = Poisson(mean).expand((60, 3))
    np.testing.assert_allclose(
        poisson.log_prob(x), scipy.stats.poisson(mean.numpy()).logpmf(x.numpy()), rtol=1e-9
    )
    np.testing.assert_allclose(poisson.cdf(x), scipy.stats.poisson(mean.numpy()).cdf(x.numpy()), rtol=1e-9)
    normal, scale = Gaussian(mean, theta).expand((60, 3)), theta.numpy()
    np.testing.assert_allclose(
        normal.log_prob(x), scipy.stats.norm(mean.numpy(), scale).logpdf(x.numpy()), rtol=1e-9
    )
    np.testing.assert_allclose(normal.cdf(x), scipy.stats.norm(mean.numpy(), scale).cdf(x.numpy()), rtol=1e-9)
    below = torch.tensor([-1.0, -1.0, -1.0])
    assert not NegativeBinomial(mean, theta).cdf(below).any() and not Poisson(mean).cdf(below).any()


@pytest.mark.parametrize("kind", ["poisson", "poisson_log", "nb", "nb_log"])
def test_gradcheck(kind):
    x = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 60.0]], dtype=torch.float64)
    mean = torch.rand(2, 3, dtype=torch.float64).add_(0.3).requires_grad_()
    theta = torch.tensor([0.3, 1.0, 40.0], dtype=torch.float64, requires_grad=True)
    forms = {
        "poisson": (lambda m: Poisson(m).log_prob(x), (mean,)),
        "poisson_log": (lambda m: Poisson(log_mean=m).log_prob(x), (mean,)),
        "nb": (lambda m, t: NegativeBinomial(m, t).log_prob(x), (mean, theta)),
        "nb_log": (lambda m, t: NegativeBinomial(log_mean=m, log_theta=t).log_prob(x), (mean, theta)),
    }
    function, inputs = forms[kind]
    assert torch.autograd.gradcheck(function, inputs)


def test_blocks_do_not_change_anything(monkeypatch):
    x, log_mean = torch.poisson(torch.full((3, 7, 5), 0.7)), torch.randn(7, 1, requires_grad=True)
    theta = torch.rand(5, requires_grad=True)

    def run():
        value = NegativeBinomial(log_mean=log_mean, theta=theta).log_prob(x)
        return value, *torch.autograd.grad((value * torch.arange(5)).sum(), (log_mean, theta))

    whole = run()
    monkeypatch.setattr(likelihood_math, "BLOCK", 4)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda m: Poisson(m), lambda m: NegativeBinomial(m, 0.7), lambda m: NegativeBinomial(m, 1e7)]
)
def test_probabilities_sum_to_one(make):
    mean = torch.tensor([1e-6, 0.3, 4.0, 30.0], dtype=torch.float64)
    x = torch.arange(2000, dtype=torch.float64).unsqueeze(-1).expand(2000, 4)
    p = make(mean).log_prob(x).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close((p * x).sum(0), make(mean).mean, rtol=1e-8, atol=0)
    torch.testing.assert_close((p * x * x).sum(0) - mean**2, make(mean).variance, rtol=1e-7, atol=0)
    torch.testing.assert_close(p.cumsum(0)[:50], make(mean).cdf(x[:50]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "d",
    [
        Poisson(torch.tensor([0.02, 3.0, 700.0])),
        NegativeBinomial(torch.tensor([0.5, 3.0, 700.0]), torch.tensor([0.5, 2.0, 30.0])),
        Gaussian(torch.tensor([0.5, 3.0, 700.0]), torch.tensor([0.5, 2.0, 30.0])),
    ],
)
def test_moments_of_draws(d):
    n = 40000
    x = d.sample((n,))
    assert x.shape == (n, 3) and x.dtype == torch.float32
    z = (x.mean(0) - d.mean) / (d.variance / n).sqrt()
    assert z.abs().max() < 5
    torch.testing.assert_close(x.var(0), d.variance, rtol=0.12, atol=0)
    if not isinstance(d, Gaussian):
        assert torch.equal(x, x.floor()) and (x >= 0).all()


@pytest.mark.parametrize("theta", [1e-8, 1e-4, 1e8, 1e14])
def test_draws_at_extreme_theta_are_counts(theta):
    x = NegativeBinomial(torch.tensor([1e-6, 1.0, 1e8]), theta).sample((500,))
    assert torch.isfinite(x).all() and (x >= 0).all() and torch.equal(x, x.floor())


def test_clamps_have_zero_gradient_and_finite_values():
    log_mean = torch.tensor([-300.0, -29.0, 0.0, 21.0, 300.0], requires_grad=True)
    log_theta = torch.tensor([300.0, -300.0, 0.0, 19.0, -19.0], requires_grad=True)
    value = NegativeBinomial(log_mean=log_mean, log_theta=log_theta).log_prob(
        torch.tensor([3.0, 0.0, 2.0, 1.0, 7.0])
    )
    by_mean, by_theta = torch.autograd.grad(value.sum(), (log_mean, log_theta))
    assert torch.isfinite(value).all()
    assert (by_mean != 0).tolist() == (by_theta != 0).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("make", [lambda m: Poisson(m), lambda m: NegativeBinomial(m, 2.0)])
def test_mean_of_zero_is_finite_with_the_right_slope(make):
    mean = torch.zeros(2, requires_grad=True)
    value = make(mean).log_prob(torch.tensor([0.0, 3.0]))
    (slope,) = torch.autograd.grad(value.sum(), mean)
    assert value[0] == 0 and torch.isfinite(value).all() and slope[0] == -1 and torch.isfinite(slope).all()
    assert not make(torch.zeros(2)).sample((100,)).any()


def test_expand_copies_nothing_and_terms_of_theta_stay_per_gene():
    mean, theta = torch.rand(50, 4), torch.rand(4, requires_grad=True)
    d = NegativeBinomial(mean, theta)
    wide = d.expand((3, 50, 4))
    assert wide.batch_shape == (3, 50, 4) and wide.theta.shape == (4,) and wide._given["theta"] is theta
    assert wide.log_prob(torch.ones(50, 4)).shape == (3, 50, 4) and wide.sample().shape == (3, 50, 4)
    assert wide.mean.shape == wide.variance.shape == (3, 50, 4)
    gene = Poisson(torch.rand(4)).expand((50, 4))
    assert gene._given["mean"].shape == (4,) and gene.log_prob(torch.ones(4)).shape == (50, 4)
    with pytest.raises(UserError, match="cannot expand"):
        d.expand((7, 4))


@pytest.mark.parametrize(
    "d",
    [
        Poisson(torch.rand(3)),
        NegativeBinomial(log_mean=torch.randn(3), theta=torch.rand(3)),
        Gaussian(torch.randn(3), torch.rand(3)),
    ],
)
def test_nothing_read_changes_log_prob(d):
    x = torch.tensor([0.0, 1.0, 5.0])
    before = d.log_prob(x)
    names = [n for n in ("mean", "variance", "log_mean", "theta", "log_theta") if hasattr(d, n)]
    for name in names:
        getattr(d, name)
    d.sample((2,)), d.expand((2, 3)).log_prob(x), d.cdf(x)
    assert torch.equal(before, d.log_prob(x)) and torch.equal(before, copy.deepcopy(d).log_prob(x))
    assert torch.equal(before, d.expand((3,)).log_prob(x))


@pytest.mark.parametrize(
    "make", [lambda r: Poisson(r), lambda r: NegativeBinomial(r, 2.0), lambda r: Gaussian(r, 2.0)]
)
def test_a_value_that_would_enlarge_the_distribution_is_an_error(make):
    d = make(torch.rand(5))
    with pytest.raises(UserError, match=r"\(5, 1\).*\(5,\)"):
        d.log_prob(torch.ones(5, 1))
    with pytest.raises(UserError):
        make(torch.rand(5, 1)).log_prob(torch.ones(5))
    with pytest.raises(UserError):
        make(torch.rand(1, 5)).log_prob(torch.ones(3, 5))
    assert d.log_prob(torch.ones(5)).shape == (5,) and d.log_prob(torch.ones(7, 5)).shape == (7, 5)
    assert d.log_prob(torch.ones(1)).shape == (5,) and make(torch.tensor(1.0)).log_prob(
        torch.ones(4, 2)
    ).shape == (4, 2)

    def model():
        with pyro.plate("cells", 5):
            pyro.sample("x", d, obs=torch.ones(5, 1))

    with pytest.raises(ValueError):
        pyro.poutine.trace(model).get_trace().compute_log_prob()


def test_bad_counts_and_bad_parameters_are_refused():
    with pytest.raises(UserError, match=r"2 of 3 values are not, e\.g\. 0\.5, -1"):
        Poisson(torch.ones(3), validate_args=True).log_prob(torch.tensor([0.5, -1.0, 2.0]))
    with pytest.raises(UserError, match="whole numbers"):
        NegativeBinomial(torch.ones(1), 1.0, validate_args=True).log_prob(torch.tensor([float("nan")]))
    for bad in ({"mean": -torch.ones(2)}, {"log_mean": torch.tensor([float("nan")])}):
        with pytest.raises(UserError, match=f"Poisson: {next(iter(bad))} must be .* of . values are not"):
            Poisson(**bad, validate_args=True)
    with pytest.raises(UserError, match="theta must be"):
        NegativeBinomial(torch.ones(2), torch.zeros(2), validate_args=True)
    with pytest.raises(UserError, match="exactly one"):
        Poisson(torch.ones(1), log_mean=torch.ones(1))
    with pytest.raises(UserError, match="exactly one"):
        NegativeBinomial(torch.ones(1))


def test_counts_that_are_integers_or_fractions_without_validation():
    assert Poisson(2.0).log_prob(torch.tensor(3)).dtype == torch.float32
    half = NegativeBinomial(torch.tensor(2.0, dtype=torch.float64), 1.5, validate_args=False).log_prob(
        torch.tensor(2.5)
    )
    want = (
        math.lgamma(4.0)
        - math.lgamma(1.5)
        - math.lgamma(3.5)
        + 1.5 * math.log(1.5 / 3.5)
        + 2.5 * math.log(2 / 3.5)
    )
    assert half.item() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        Poisson,
        lambda m: Poisson(log_mean=m),
        lambda m: NegativeBinomial(m, 2.7),
        lambda m: NegativeBinomial(m, log_theta=0.9),
        lambda m: NegativeBinomial(m, torch.tensor(0.5, dtype=torch.float64)),
        lambda m: Gaussian(m, 1.7),
    ],
)
def test_parameters_that_are_integers_are_as_if_they_were_floats(make):
    x = torch.tensor([0.0, 1.0, 2.0])
    got, want = make(torch.tensor([1, 2, 3])), make(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(got.log_prob(x), want.log_prob(x))
    assert got.sample().dtype == want.sample().dtype


@pytest.mark.parametrize("given", ["mean", "log_mean"])
def test_no_cells_at_all_have_no_log_prob(given):
    none = torch.zeros(0, 5, requires_grad=True)
    for d in (Poisson(**{given: none}), NegativeBinomial(**{given: none}, theta=torch.ones(5))):
        found = d.log_prob(torch.zeros(0, 5))
        assert found.shape == (0, 5) and torch.autograd.grad(found.sum(), none)[0].shape == (0, 5)


def test_mask_and_to_event():
    x, mean = torch.tensor([[0.0, 2.0], [1.0, 9.0]]), torch.rand(2, 2)
    d = NegativeBinomial(mean, torch.rand(2))
    torch.testing.assert_close(d.to_event(1).log_prob(x), d.log_prob(x).sum(-1))
    masked = d.mask(torch.tensor([True, False])).log_prob(x)
    assert not masked[:, 1].any() and torch.equal(masked[:, 0], d.log_prob(x)[:, 0])


def test_quantiles_of_counts_beyond_whole_numbers_end():
    """Above 2^53 neighbouring numbers are more than 1 apart: the bisection never ended. A share of 0 is at 0, whatever stands beside it."""
    at = torch.tensor([1e16, 3e17, 3.0], dtype=torch.float64)
    steps = SimpleNamespace(batch_shape=at.shape, mean=at, cdf=lambda k: (k >= at).double())  # fast: Poisson(1e16).icdf(0.5) did not end either
    assert count_quantile(steps, torch.tensor([0.5, 0.9, 0.0], dtype=torch.float64)).tolist() == [1e16, 3e17, 0.0]

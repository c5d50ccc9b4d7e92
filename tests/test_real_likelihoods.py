"""Student and log1p observation models against scipy and mpmath; quantiles, also of counts; gradients, state, shapes."""

import math

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch

from ppl_st.count_likelihoods import SharedOddsNegativeBinomial, ZeroInflatedNegativeBinomial
from ppl_st.errors import UserError
from ppl_st.likelihoods import Gaussian, NegativeBinomial, Poisson
from ppl_st.real_likelihoods import Log1p, Student
from seeded import own_seed

DOUBLE = torch.float64
_own_seed = pytest.fixture(own_seed, autouse=True)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_student_against_mpmath(dtype):
    df, z = torch.meshgrid(
        torch.tensor([1e-3, 0.1, 1, 4.5, 1e3, 1e6, 1e8], dtype=dtype), torch.tensor([0, 1e-6, 0.3, 1, 7, 1e4, 1e10], dtype=dtype), indexing="ij"
    )
    df, x = df.reshape(-1).clone().requires_grad_(), z.reshape(-1) * 0.5 + 3
    loc, scale = torch.tensor(3.0, dtype=dtype, requires_grad=True), torch.tensor(0.5, dtype=dtype, requires_grad=True)
    value = Student(loc, scale, df).log_prob(x)
    (slope,) = torch.autograd.grad(value.sum(), df)
    relative, gradient = (2e-7, 1e-5) if dtype == torch.float32 else (1e-12, 1e-9)
    with mpmath.workdps(50):
        for i in range(len(x)):
            n, t = mpmath.mpf(df[i].item()), (mpmath.mpf(x[i].item()) - 3) * 2
            want = mpmath.loggamma((n + 1) / 2) - mpmath.loggamma(n / 2) - mpmath.log(mpmath.pi * n) / 2 + mpmath.log(2)
            want -= (n + 1) / 2 * mpmath.log1p(t * t / n)
            assert abs(value[i].item() - want) <= relative * max(1, abs(want)), (float(n), float(t))
            if n <= 1e3:  # beyond, digits are lost, as documented
                by = (mpmath.digamma((n + 1) / 2) - mpmath.digamma(n / 2) - 1 / n - mpmath.log1p(t * t / n)) / 2
                by += (n + 1) / 2 * t * t / (n * n + n * t * t)
                assert abs(slope[i].item() - by) <= gradient * max(abs(by), 1e-6), (float(n), float(t))


def test_scipy_twins():
    x, df = torch.linspace(-0.9, 40, 60, dtype=DOUBLE)[:, None], torch.tensor([0.5, 1.5, 3.0, 80.0], dtype=DOUBLE)
    d, twin = Student(1.0, torch.tensor(0.7, dtype=DOUBLE), df), scipy.stats.t(df.numpy(), 1.0, 0.7)
    x = x.expand(60, 4)
    np.testing.assert_allclose(d.log_prob(x), twin.logpdf(x.numpy()), rtol=1e-10)
    np.testing.assert_allclose(d.cdf(x), twin.cdf(x.numpy()), rtol=1e-9)
    q = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=DOUBLE)
    np.testing.assert_allclose(d.icdf(q), twin.ppf(q.numpy()), rtol=1e-7)
    assert d.mean.isnan().tolist() == [True, False, False, False]
    np.testing.assert_allclose(d.variance[2:], twin.var()[2:])
    assert d.variance[1] == math.inf and d.variance[0].isnan()
    scale = torch.tensor([0.3, 1.0, 2.0, 4.0], dtype=DOUBLE)
    log_normal, twin = Log1p(Gaussian(0.4, scale)), scipy.stats.lognorm(scale.numpy(), loc=-1, scale=math.exp(0.4))
    np.testing.assert_allclose(log_normal.log_prob(x), twin.logpdf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(log_normal.cdf(x), twin.cdf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(log_normal.icdf(q), twin.ppf(q.numpy()), rtol=1e-7)
    np.testing.assert_allclose(log_normal.mean, twin.mean())
    np.testing.assert_allclose(log_normal.variance, twin.var())


def test_the_log_prob_is_a_density_of_the_value_itself():
    """Change of variables by hand, and small values in float32, where log(1 + x) would lose them."""
    x = torch.tensor([0.0, 1e-7, 2.0, 1e6])
    y = torch.log1p(x.double())
    for base in (Gaussian(0.0, 1.0), Student(0.0, 1.0, 4.0)):
        np.testing.assert_allclose(Log1p(base).log_prob(x), base.log_prob(y).double() - y, rtol=3e-6)
    tiny = torch.tensor([1e-9], requires_grad=True)
    (slope,) = torch.autograd.grad(Log1p(Gaussian(torch.tensor(1e-9), torch.tensor(1e-9))).log_prob(2 * tiny).sum(), tiny)
    assert slope.item() == pytest.approx(-2e9, rel=1e-4)
    assert Log1p(Student(0.0, 1.0, 30.0)).mean == math.inf and Log1p(Student(0.0, 1.0, 30.0)).icdf(torch.tensor(0.5)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_far_draws_stay_inside_the_support(dtype):
    """expm1(-40) rounds to -1 and expm1(800) overflows: both used to be drawn, where log_prob refuses them."""
    zero = torch.zeros((), dtype=dtype)
    far = Log1p(Student(zero, zero + 1, zero + 0.5), validate_args=True), Log1p(Gaussian(zero, zero + 1000), validate_args=True)
    for draws, d in ((far[0].sample((20_000,)), far[0]), (far[1].rsample((20_000,)), far[1])):
        assert d.base.cdf(zero - 800) * 20_000 > 100  # so that some fall there
        assert bool((draws > -1).all() & draws.isfinite().all())
        assert bool(d.log_prob(draws).isfinite().all())


def test_gradcheck_and_the_gaussian_limit():
    x = torch.tensor([-0.5, 0.0, 1.3, 50.0], dtype=DOUBLE)
    leaves = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in ([0.2, 0.1, 0.0, 3.0], 0.7, [0.4, 2.0, 30.0, 900.0])]
    assert torch.autograd.gradcheck(lambda *p: Student(*p).log_prob(x), leaves)
    assert torch.autograd.gradcheck(lambda *p: Log1p(Student(*p)).log_prob(x), leaves)
    assert torch.autograd.gradcheck(lambda *p: Log1p(Gaussian(*p)).log_prob(x), leaves[:2])
    one = torch.ones((), dtype=DOUBLE)
    torch.testing.assert_close(Student(one, 2.0, 1e12).log_prob(x), Gaussian(one, 2.0).log_prob(x), rtol=1e-7, atol=1e-7)


def test_shapes_masks_and_refusals():
    loc, scale = torch.rand(5, 1), torch.rand(3) + 0.1
    for d in (Student(loc, scale, 4.0), Log1p(Student(loc, scale, 4.0)), Log1p(Gaussian(loc, scale))):
        wide, x = d.expand((2, 5, 3)), torch.rand(5, 3)
        for got in (wide.log_prob(x), wide.sample(), wide.mean, wide.variance, wide.cdf(x), wide.icdf(x)):
            assert got.shape == (2, 5, 3)
        base = getattr(wide, "base", wide)
        assert base.scale is scale  # expanded without a copy
        masked = d.mask(torch.tensor([True, False, True])).log_prob(x)
        assert not masked[:, 1].any() and torch.equal(masked[:, 0], d.log_prob(x)[:, 0])
        torch.testing.assert_close(d.to_event(1).log_prob(x), d.log_prob(x).sum(-1))
        with pytest.raises(UserError, match="does not fit"):
            d.log_prob(torch.rand(3, 1, 1))
    with pytest.raises(UserError, match="above -1; 1 of 2"):
        Log1p(Gaussian(torch.zeros(2), 1.0), validate_args=True).log_prob(torch.tensor([-1.0, 0.0]))
    with pytest.raises(UserError, match="df must be"):
        Student(0.0, 1.0, torch.tensor(-1.0), validate_args=True)


def test_quantiles_of_counts_are_scipys():
    q = torch.tensor([[0.001], [0.3], [0.5], [0.9], [0.999]], dtype=DOUBLE).expand(5, 4)
    mean, theta = torch.tensor([1e-3, 0.4, 30.0, 1e6], dtype=DOUBLE), torch.tensor([0.1, 2.0, 50.0, 3.0], dtype=DOUBLE)
    p = (theta / (theta + mean)).numpy()
    np.testing.assert_array_equal(Poisson(mean).icdf(q), scipy.stats.poisson(mean.numpy()).ppf(q))
    np.testing.assert_array_equal(NegativeBinomial(mean, theta).icdf(q), scipy.stats.nbinom(theta.numpy(), p).ppf(q))
    shared = SharedOddsNegativeBinomial(theta, (mean / theta).log())
    np.testing.assert_array_equal(shared.icdf(q), scipy.stats.nbinom(theta.numpy(), p).ppf(q))
    gate = torch.tensor(0.0, dtype=DOUBLE)
    inflated = ZeroInflatedNegativeBinomial(mean, theta, gate)
    np.testing.assert_array_equal(inflated.icdf(q)[:3], np.where(q[:3] <= 0.5, 0, 1) * NegativeBinomial(mean, theta).icdf(2 * q - 1)[:3].numpy())
    assert not Poisson(mean).icdf(torch.zeros(4, dtype=DOUBLE)).any()

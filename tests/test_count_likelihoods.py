"""Zero-inflated and shared-odds negative binomials against mpmath and scipy; limits, closure, moments, state."""

import copy
import itertools

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from ppl_st import likelihood_math
from ppl_st.count_likelihoods import SharedOddsNegativeBinomial, ZeroInflatedNegativeBinomial
from ppl_st.errors import UserError
from ppl_st.likelihoods import NegativeBinomial
from seeded import own_seed

INF = float("inf")
_own_seed = pytest.fixture(own_seed, autouse=True)


def _double(*values):
    return torch.tensor(values, dtype=torch.float64)


def _exact_nb(x, r, odds):
    """log p and its derivatives by r (at fixed odds) and by the log-odds."""
    value = mpmath.loggamma(x + r) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
    value += -r * mpmath.log1p(odds) + x * mpmath.log(odds / (1 + odds))
    by_r = mpmath.digamma(x + r) - mpmath.digamma(r) - mpmath.log1p(odds)
    return value, by_r, (x - r * odds) / (1 + odds)


def _exact_zinb(x, mu, theta, gate):
    """log p and its derivatives by mu, theta and the gate's logit."""
    odds = mu / theta
    value, by_r, by_odds = _exact_nb(x, theta, odds)
    by_mu, by_theta = by_odds / mu, by_r - by_odds / theta
    g = 1 / (1 + mpmath.exp(-gate))
    if x > 0:
        return value + mpmath.log(1 - g), by_mu, by_theta, -g
    p = g + (1 - g) * mpmath.exp(value)
    share = (1 - g) * mpmath.exp(value) / p
    return mpmath.log(p), by_mu * share, by_theta * share, g * (1 - g) * (1 - mpmath.exp(value)) / p


def _compare(got, want, relative, where):
    if abs(want) > 1e-30:
        assert abs(got.item() - want) <= relative * abs(want), (where, got.item(), float(want))


GRID_X = [0, 1, 2, 100, 1000, 10**6]
GATES = [-200.0, -30.0, -1.0, 0.0, 8.0, 200.0]


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_inflated_against_mpmath(dtype, logs):
    rows = [*itertools.product(GRID_X, [1e-12, 1e-6, 1e-2, 5.0, 1e4, 1e8], [1e-8, 1e-4, 0.3, 50.0, 1e8], GATES)]
    grid = _double(*rows)
    x, mean, theta, gate = (c.to(dtype) for c in grid.T)
    if logs:
        mean, theta = mean.log(), theta.log()
    inputs = [a.clone().requires_grad_() for a in (mean, theta, gate)]
    names = ("log_mean", "log_theta", "gate_logits") if logs else ("mean", "theta", "gate_logits")
    value = ZeroInflatedNegativeBinomial(**dict(zip(names, inputs, strict=True))).log_prob(x)
    slopes = torch.autograd.grad(value.sum(), inputs)
    relative, gradient = (1e-7, 1e-6) if dtype == torch.float32 else (1e-9, 1e-9)
    with mpmath.workdps(130):  # e^-200 beside 1
        for i in range(len(x)):
            m, t = (mpmath.mpf(a[i].item()) for a in (mean, theta))
            if logs:
                m, t = mpmath.exp(m), mpmath.exp(t)
            want, *by = _exact_zinb(mpmath.mpf(x[i].item()), m, t, mpmath.mpf(gate[i].item()))
            if logs:
                by = [by[0] * m, by[1] * t, by[2]]
            where = tuple(grid[i].tolist())
            _compare(value[i], want, relative, where)
            if where[0] <= 1e3 and 1e-6 <= where[1] <= 1e4 and where[2] >= 1e-4:
                assert abs(value[i].item() - want) <= 2e-3, where
            for k in range(3):
                if k or abs(where[0] - m) > 1e-9 * where[0]:
                    _compare(slopes[k][i], by[k], gradient, (k, *where))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_odds_against_mpmath(dtype):
    rows = itertools.product(GRID_X, [1e-8, 1e-4, 0.3, 1.0, 50.0, 1e4, 1e8], [1e-12, 1e-6, 1e-2, 5.0, 1e4, 1e8])
    grid = _double(*((x, r, np.log(mean / r)) for x, r, mean in rows))
    x, r, u = (c.to(dtype) for c in grid.T)
    r.requires_grad_()
    u.requires_grad_()
    value = SharedOddsNegativeBinomial(r, u).log_prob(x)
    slopes = torch.autograd.grad(value.sum(), (r, u))
    relative, gradient = (1e-7, 1e-6) if dtype == torch.float32 else (1e-9, 1e-9)
    with mpmath.workdps(80):
        for i in range(len(x)):
            k, size, odds = mpmath.mpf(x[i].item()), mpmath.mpf(r[i].item()), mpmath.exp(u[i].item())
            want, by_r, by_u = _exact_nb(k, size, odds)
            where = tuple(grid[i].tolist())
            _compare(value[i], want, relative, where)
            if abs(k - size * odds) > 1e-7 * k:  # at x = mean the slopes cross zero
                _compare(slopes[0][i], by_r, gradient, where)
                _compare(slopes[1][i], by_u, gradient, where)


def test_shared_odds_is_the_mean_and_theta_form_that_its_docstring_states():
    r, u = _double(1e-3, 0.4, 3.0, 2e5).unsqueeze(-1), _double(-8.0, -1.0, 0.0, 2.5)
    d, twin = SharedOddsNegativeBinomial(r, u), NegativeBinomial(mean=r * u.exp(), theta=r)
    x = torch.poisson(torch.rand(6, 4, 4, dtype=torch.float64) * 20)
    torch.testing.assert_close(d.log_prob(x), twin.log_prob(x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d.mean, twin.mean.expand(4, 4))
    torch.testing.assert_close(d.variance, twin.variance.expand(4, 4))
    torch.testing.assert_close(d.cdf(x), twin.cdf(x), rtol=1e-9, atol=1e-14)


def test_scipy_twins():
    x = torch.arange(0, 80, dtype=torch.float64).unsqueeze(-1)
    r, u, gate = _double(0.3, 2.0, 40.0), _double(1.0, -0.5, -3.0), _double(-3.0, 0.2, 1.5)
    twin = scipy.stats.nbinom(r.numpy(), torch.sigmoid(-u).numpy())
    shared = SharedOddsNegativeBinomial(r, u)
    np.testing.assert_allclose(shared.log_prob(x.expand(80, 3)), twin.logpmf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(shared.cdf(x.expand(80, 3)), twin.cdf(x.numpy()), rtol=1e-9)
    np.testing.assert_allclose(shared.variance, twin.var(), rtol=1e-9)
    g = torch.sigmoid(gate).numpy()
    inflated = ZeroInflatedNegativeBinomial(r * u.exp(), r, gate)
    want = np.log(np.where(x == 0, g, 0) + (1 - g) * twin.pmf(x.numpy()))
    np.testing.assert_allclose(inflated.log_prob(x.expand(80, 3)), want, rtol=1e-9)
    np.testing.assert_allclose(inflated.cdf(x.expand(80, 3)), g + (1 - g) * twin.cdf(x.numpy()), rtol=1e-9)
    for d in (shared, inflated):
        assert not d.cdf(torch.full((3,), -1.0)).any()


@pytest.mark.parametrize("kind", ["zinb", "zinb_log", "shared"])
def test_gradcheck(kind):
    x = _double(0, 1, 2, 5, 0, 60).view(2, 3)
    first = torch.rand(2, 3, dtype=torch.float64).add_(0.3).requires_grad_()
    gene, gate = _double(0.3, 1.0, 40.0).requires_grad_(), _double(-2.0, 3.0).view(2, 1).requires_grad_()
    forms = {
        "zinb": (lambda m, t, g: ZeroInflatedNegativeBinomial(m, t, g).log_prob(x), (first, gene, gate)),
        "zinb_log": (
            lambda m, t, g: ZeroInflatedNegativeBinomial(log_mean=m, log_theta=t, gate_logits=g).log_prob(x),
            (first, gene, gate),
        ),
        "shared": (lambda r, u: SharedOddsNegativeBinomial(r, u / 10).log_prob(x), (first, gene)),
    }
    assert torch.autograd.gradcheck(*forms[kind])


def test_limits_of_the_gate():
    x, mean, theta = _double(0, 1, 7, 0), _double(0.1, 2.0, 5.0, 300.0), _double(0.3, 1e6, 2.0, 5.0)
    plain = NegativeBinomial(mean, theta)
    for gate in (-INF, -1e6, -60.0):
        d = ZeroInflatedNegativeBinomial(mean, theta, gate)
        torch.testing.assert_close(d.log_prob(x)[:3], plain.log_prob(x)[:3], rtol=1e-12, atol=0)
        torch.testing.assert_close(d.mean, plain.mean)
    assert ZeroInflatedNegativeBinomial(mean, theta, -INF).log_prob(x)[3] == plain.log_prob(x)[3]
    point = ZeroInflatedNegativeBinomial(mean, theta, INF)
    assert point.log_prob(x).tolist() == [0.0, -INF, -INF, 0.0]
    assert not point.sample((50,)).any() and not point.mean.any() and not point.variance.any()
    gates = torch.tensor([-INF, -1e6, -200.0, 200.0, 1e6, INF], requires_grad=True)
    mean = torch.full((6,), 3.0, requires_grad=True)
    at_zero = ZeroInflatedNegativeBinomial(mean, 2.0, gates).log_prob(torch.zeros(6))
    by_gate, by_mean = torch.autograd.grad(at_zero.sum(), (gates, mean))
    torch.testing.assert_close(by_mean, torch.tensor([-0.4, -0.4, -0.4, 0.0, 0.0, 0.0]))
    assert torch.isfinite(by_gate).all() and (by_gate >= 0).all()
    wide = gates.detach().double().requires_grad_()  # in float32 e^-200 is zero
    value = ZeroInflatedNegativeBinomial(_double(3.0), 2.0, wide).log_prob(_double(0.0))
    (by_gate,) = torch.autograd.grad(value.sum(), wide)
    assert (by_gate > 1e-90).tolist() == [False, False, True, True, False, False] and value[3] < 0
    beyond = ZeroInflatedNegativeBinomial(3.0, 2.0, gates).log_prob(torch.ones(6))
    assert torch.autograd.grad(beyond[2:].sum(), gates)[0].tolist() == [0, 0, 0, -1, -1, -1]


def test_reading_the_mean_of_pyros_changes_its_log_prob_and_of_ours_does_not():
    x, r, gate = _double(5.0, 0.0), _double(2.0, 200.0), torch.tensor([30.0, -200.0])
    theirs = dist.ZeroInflatedNegativeBinomial(r.float(), logits=torch.tensor([0.0, 10.0]), gate_logits=gate)
    before = theirs.log_prob(x.float())
    _ = theirs.mean
    assert torch.isfinite(before).all() and torch.isinf(theirs.log_prob(x.float())).all()
    ours = ZeroInflatedNegativeBinomial(torch.tensor([2.0, 200 * np.exp(10.0)]), r.float(), gate)
    before = ours.log_prob(x)
    _ = ours.mean, ours.gate, ours.sample((3,))
    assert torch.isfinite(before).all() and torch.equal(before, ours.log_prob(x))


def _pmf(d, n):
    return d.log_prob(torch.arange(n, dtype=torch.float64)).exp().numpy()


def test_only_shared_odds_are_closed_under_summation():
    n, u = 400, 0.7
    parts = [SharedOddsNegativeBinomial(_double(r).squeeze(), u) for r in (1e-8, 0.2, 1.3, 4.0)]
    total = _pmf(parts[0], n)
    for part in parts[1:]:
        total = np.convolve(total, _pmf(part, n))[:n]
    whole = SharedOddsNegativeBinomial(_double(5.5 + 1e-8).squeeze(), u)
    np.testing.assert_allclose(total, _pmf(whole, n), atol=1e-13, rtol=0)
    one, two = (NegativeBinomial(_double(m).squeeze(), 1.5) for m in (3.0, 6.0))
    assert np.abs(np.convolve(_pmf(one, n), _pmf(one, n))[:n] - _pmf(two, n)).max() > 0.01


DISTRIBUTIONS = {
    "zinb": lambda dtype: ZeroInflatedNegativeBinomial(
        torch.tensor([0.3, 4.0, 30.0], dtype=dtype), torch.tensor([0.5, 2.0, 90.0], dtype=dtype), 0.4
    ),
    "zinb_log": lambda dtype: ZeroInflatedNegativeBinomial(
        log_mean=torch.tensor([-3.0, 1.0, 3.0], dtype=dtype), log_theta=0.5, gate_logits=-2.0
    ),
    "shared": lambda dtype: SharedOddsNegativeBinomial(
        torch.tensor([0.02, 3.0, 70.0], dtype=dtype), torch.tensor([1.5, -2.0, -0.5], dtype=dtype)
    ),
}
every = pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())


@every
def test_normalised_with_the_stated_moments_and_cdf(make):
    d, x = make(torch.float64), torch.arange(2000, dtype=torch.float64).unsqueeze(-1).expand(2000, 3)
    p = d.log_prob(x).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close((p * x).sum(0), d.mean, rtol=1e-8, atol=0)
    torch.testing.assert_close((p * x * x).sum(0) - d.mean**2, d.variance, rtol=1e-7, atol=0)
    torch.testing.assert_close(p.cumsum(0)[:80], d.cdf(x[:80]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d.cdf(x[:9] + 0.5), d.cdf(x[:9]))


@every
def test_draws_fit_the_density(make):
    d, n = make(torch.float32), 20000
    draws = d.sample((n,))
    assert draws.shape == (n, 3) and draws.dtype == torch.float32 and torch.equal(draws, draws.floor())
    for k in range(3):
        p = make(torch.float64).log_prob(torch.arange(2000.0).unsqueeze(-1).expand(2000, 3)).exp()[:, k].numpy()
        edges = np.unique(np.searchsorted(p.cumsum(), np.arange(1, 20) / 20))  # the last count of each bin
        expected = np.diff(np.r_[0, p.cumsum()[edges], 1]) * n
        observed = np.bincount(np.searchsorted(edges, draws[:, k].numpy()), minlength=len(expected))
        keep = expected > 5
        assert keep.sum() >= 2 or p[0] > 0.99
        chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
        assert scipy.stats.chi2.sf(chi2, keep.sum()) > 1e-4, (k, observed, expected)


@every
def test_nothing_read_changes_log_prob_and_float32_agrees_with_float64(make):
    d, x = make(torch.float32), torch.tensor([0.0, 1.0, 25.0])
    before = d.log_prob(x)
    _ = d.mean, d.variance, d.sample((2,)), d.expand((2, 3)).log_prob(x), d.cdf(x)
    for name in ("gate", "gate_logits", "base", "logits", "total_count"):
        getattr(d, name, None)
    for other in (d, copy.deepcopy(d), d.expand((3,))):
        assert torch.equal(before, other.log_prob(x))
    torch.testing.assert_close(before.double(), make(torch.float64).log_prob(x), rtol=1e-6, atol=1e-7)


@every
def test_shapes_counts_and_masks_are_checked(make):
    d = make(torch.float32)
    with pytest.raises(UserError, match=r"\(3, 1\).*\(3,\)"):
        d.log_prob(torch.ones(3, 1))
    with pytest.raises(UserError, match="cannot expand"):
        d.expand((4,))
    with pytest.raises(UserError, match="whole numbers"):
        d.log_prob(torch.tensor([0.5, 1.0, -1.0]))
    assert d.log_prob(torch.tensor(1)).shape == (3,) and d.log_prob(torch.ones(5, 3)).shape == (5, 3)
    masked = d.mask(torch.tensor([True, False, True])).log_prob(torch.ones(3))
    assert masked[1] == 0 and masked[0] == d.log_prob(torch.ones(3))[0]
    torch.testing.assert_close(d.to_event(1).log_prob(torch.ones(3)), d.log_prob(torch.ones(3)).sum())


def test_bad_parameters_are_refused():
    for make in (
        lambda: ZeroInflatedNegativeBinomial(torch.ones(2), 1.0),
        lambda: ZeroInflatedNegativeBinomial(torch.ones(2), 1.0, 0.0, log_mean=torch.ones(2)),
        lambda: ZeroInflatedNegativeBinomial(-torch.ones(2), 1.0, 0.0, validate_args=True),
        lambda: ZeroInflatedNegativeBinomial(torch.ones(2), 1.0, torch.tensor(float("nan")), validate_args=True),
        lambda: SharedOddsNegativeBinomial(-torch.ones(2), 0.0, validate_args=True),
    ):
        with pytest.raises(UserError):
            make()


def test_expand_copies_nothing_and_parameters_keep_their_shapes():
    mean, theta, gate = torch.rand(50, 1), torch.rand(4, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    d = ZeroInflatedNegativeBinomial(mean, theta, gate)
    wide = d.expand((3, 50, 4))
    assert wide._given["theta"] is theta and wide.gate_logits is gate
    assert wide.log_prob(torch.ones(50, 4)).shape == wide.sample().shape == wide.mean.shape == (3, 50, 4)
    assert wide.variance.shape == wide.cdf(torch.ones(4)).shape == (3, 50, 4)
    r, u = torch.rand(50, 1), torch.randn(4, requires_grad=True)
    shared = SharedOddsNegativeBinomial(r, u)
    assert shared.expand((3, 50, 4))._given["logits"] is u and shared.expand((3, 50, 4)).logits.shape == (4,)
    for narrow in (
        ZeroInflatedNegativeBinomial(torch.rand(4), 1.0, -1.0),
        SharedOddsNegativeBinomial(torch.rand(4), u),
    ):
        assert narrow.expand((50, 4)).log_prob(torch.ones(4)).shape == (50, 4)
        assert narrow.expand((50, 4)).sample().shape == narrow.expand((50, 4)).cdf(torch.ones(4)).shape == (50, 4)


def test_blocks_and_layouts_do_not_change_anything(monkeypatch):
    x, gate = torch.poisson(torch.full((3, 7, 5), 0.7)), torch.randn(3, 1, 1, requires_grad=True)
    log_mean, theta = torch.randn(7, 1, requires_grad=True), torch.rand(5, requires_grad=True)
    weights = torch.arange(5.0)

    def run(cells=log_mean, genes=theta):
        inflated = ZeroInflatedNegativeBinomial(log_mean=cells, theta=genes, gate_logits=gate).log_prob(x)
        shared = SharedOddsNegativeBinomial(genes, cells).log_prob(x)
        grads = torch.autograd.grad(((inflated + shared) * weights).sum(), (log_mean, theta, gate))
        return inflated, shared, *grads

    whole = run()
    dense = run(
        log_mean.expand(3, 7, 5).contiguous(), theta.expand(3, 7, 5).transpose(0, 1).contiguous().transpose(0, 1)
    )
    monkeypatch.setattr(likelihood_math, "BLOCK", 4)
    for other in (run(), dense):
        for a, b in zip(whole, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1e-8, 1e-3, 1e8])
def test_draws_at_extreme_shapes_are_counts_with_the_right_mean(r):
    d = SharedOddsNegativeBinomial(torch.tensor([r]), torch.log(torch.tensor([2.0 / max(r, 1e-3)])))
    x = d.sample((20000,))
    assert torch.isfinite(x).all() and torch.equal(x, x.floor())
    assert (x.mean(0) - d.mean).abs() <= 5 * (d.variance / len(x)).sqrt() + 1e-2


def test_clamped_logits_are_finite_with_zero_gradient():
    u = torch.tensor([-400.0, -51.0, 0.0, 41.0, 400.0], requires_grad=True)
    d = SharedOddsNegativeBinomial(2.0, u)
    value = d.log_prob(torch.tensor([3.0, 0.0, 1.0, 1.0, 9.0]))
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert torch.isfinite(value).all() and (slope != 0).tolist() == [False, False, True, False, False]
    assert torch.isfinite(d.mean).all() and torch.isfinite(d.variance).all()

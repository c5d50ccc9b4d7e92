"""Streamed posterior predictive against the closed form of a Gamma-Poisson pair, and ensembles of pairs."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from scipy import stats
from torch import nn

from ppl_st.calibration import coverage, interval_coverage
from ppl_st.inference import predict, threads
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.predict import block_sizes, count_draws, draw_globals, fits_of_draws, posterior_predictive
from ppl_st.inference.svi import FitConfig, Pair, fit
from ppl_st.likelihoods import Poisson
from ppl_st.sampling import standard_gamma

torch.set_num_threads(1)
RATE = 2.0  # b of the local posterior Gamma(a_ig, b)


class Level(nn.Module):
    """Guide with one global site: level ~ Gamma(sharpness, sharpness), mean 1; or the constants given."""

    def __init__(self, sharpness=None, constant=1.0):
        super().__init__()
        self.sharpness, self.constant = sharpness, constant

    def globals(self):
        if self.sharpness is None:
            pyro.sample("level", dist.Delta(torch.tensor(self.constant)))
        else:
            pyro.sample("level", dist.Gamma(self.sharpness, self.sharpness))


class Conjugate:
    """lambda_ig ~ Gamma(a_ig, RATE), count ~ Poisson(level lambda_ig): negative binomial at level 1."""

    def __init__(self, shape, block_of_rows=None):
        self.shape = torch.as_tensor(shape, dtype=torch.float32)
        self.n_cells = len(shape)
        self.asked, self.calls = [], 0
        self.order = np.arange(self.n_cells) if block_of_rows is None else block_of_rows

    def blocks(self, max_cells):
        self.asked.append(max_cells)
        for start in range(0, self.n_cells, max_cells):
            yield self.order[start : start + max_cells]

    def rows(self, batch):
        return batch

    def local(self, batch, chain):
        return self.shape[torch.from_numpy(batch)]

    def count_dist(self, batch, chain, drawn, local, genes):
        self.calls += 1
        return Poisson(drawn["level"] * standard_gamma(local[:, genes]) / RATE)


def chain(**kwargs):
    return Pair(nn.Module(), Level(**kwargs))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    shape = rng.gamma(2.0, 2.0, (12, 5)) + 0.3
    truth = rng.poisson(shape / RATE * rng.uniform(0.5, 2, shape.shape))
    return shape, truth, stats.nbinom(shape, RATE / (1 + RATE))


def test_summaries_and_scores_equal_the_closed_form(case):
    shape, truth, exact = case
    order = np.random.default_rng(1).permutation(12)  # blocks need not come in the order of the rows
    draws = 2500
    summary, scores = posterior_predictive(
        Conjugate(shape, order),
        [chain(), chain()],
        np.arange(5),
        draws=draws,
        seed=0,
        truth=sp.csr_matrix(truth.astype(np.float32)),
    )
    error = 5 / np.sqrt(draws)
    mean, sd = shape / RATE, np.sqrt(shape) / RATE
    assert np.abs(summary.rate_mean - mean).max() < error * sd.max()
    np.testing.assert_allclose(summary.rate_sd, sd, rtol=0.1)
    np.testing.assert_allclose(summary.count_sd, np.sqrt(mean + sd**2), rtol=0.06)
    np.testing.assert_allclose(summary.count_sd, exact.std(), rtol=0.06)
    for name, q in predict.QUANTILES.items():
        got = summary.quantiles[name]
        assert (got == np.floor(got)).all()
        # the right quantile, or its neighbor where q falls on a step of the distribution function
        assert (exact.cdf(got) >= q - 0.015).all() and (exact.cdf(got - 1) <= q + 0.015).all()
    np.testing.assert_allclose(scores.log_prob, exact.logpmf(truth), atol=0.15)
    np.testing.assert_allclose(scores.pit_low, exact.cdf(truth - 1), atol=0.03)
    np.testing.assert_allclose(scores.pit_high, exact.cdf(truth), atol=0.03)
    k = np.arange(400)[:, None, None]
    crps = np.square(exact.cdf(k) - (k >= truth)).sum(0)
    np.testing.assert_allclose(scores.crps, crps, atol=0.1)
    assert np.abs(scores.crps - crps).mean() < 0.02 and crps.mean() > 0.5


def test_a_second_thread_changes_nothing(case, monkeypatch):
    shape, truth, _ = case
    found = []
    for workers in (1, 2):
        monkeypatch.setattr(threads, "WORKERS", workers)
        asked = dict(draws=50, seed=0, memory_gb=1e-5, truth=sp.csr_matrix(truth.astype(np.float32)))
        found.append(posterior_predictive(Conjugate(shape), [chain(sharpness=5.0)], np.arange(5), **asked))
    (one, scores), (two, again) = found
    for a, b in zip([*one[:3], *one.quantiles.values(), *scores[:4]], [*two[:3], *two.quantiles.values(), *again[:4]], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_one_ahead_and_in_order(workers, monkeypatch):
    monkeypatch.setattr(threads, "WORKERS", workers)
    made, done = [], []

    def jobs():
        for k in range(5):
            made.append(k)
            yield k, lambda k=k: done.append(k) or 10 * k

    for key, result in threads.one_ahead(jobs()):
        assert result == 10 * key and key in done
        assert len(made) <= key + workers
    assert made == done == list(range(5))

    def failing():
        yield 0, lambda: 1 / 0

    with pytest.raises(ZeroDivisionError):
        list(threads.one_ahead(failing()))


def test_crps_and_quantiles_of_known_draws():
    draws = np.array([1.0, 2.0, 4.0, 8.0], np.float32)[:, None, None]
    pairs = np.abs(draws.ravel()[:, None] - draws.ravel()[None]).sum() / (4 * 3)
    assert float(predict._half_spread(draws)[0, 0]) == pytest.approx(pairs / 2)
    levels, names = (0.1, 0.2, 0.45, 0.6, 0.65, 0.85), ("q05", "lower", "q95", "upper")
    found = {name: [predict._quantile(draws, name, np.array([q]))[0, 0] for q in levels] for name in names}
    assert found["q05"] == [1, 1, 2, 4, 4, 8] and found["lower"] == [0, 1, 2, 4, 4, 8]  # ranks .5, 1, 2.25, 3, 3.25, 4.25 of 4 draws, rounded down
    assert found["q95"] == [1, 1, 4, 4, 8, 8] and found["upper"] == [1, 1, 4, 4, 8, np.inf]  # and up


def test_fair_crps_is_unbiased_for_few_draws(case):
    """With self-pairs E|X - x| - E|X - X'| / 2 is too large by E|X - X'| / (2 S): at S = 4 that shows."""
    shape, truth, exact = case
    found = np.mean(
        [
            posterior_predictive(
                Conjugate(shape),
                [chain()],
                np.arange(5),
                draws=4,
                seed=seed,
                truth=sp.csr_matrix(truth.astype(np.float32)),
            )[1].crps
            for seed in range(200)
        ],
        axis=0,
    )
    k = np.arange(400)[:, None, None]
    crps = np.square(exact.cdf(k) - (k >= truth)).sum(0)
    assert found.mean() == pytest.approx(crps.mean(), rel=0.02)


def test_coverage_of_the_true_model_is_nominal():
    rng = np.random.default_rng(2)
    shape = rng.gamma(1.0, 1.0, (400, 6)) + 0.2
    truth = rng.poisson(rng.gamma(shape) / RATE)
    _, scores = posterior_predictive(
        Conjugate(shape),
        [chain()],
        np.arange(6),
        draws=200,
        seed=0,
        truth=sp.csr_matrix(truth.astype(np.float32)),
    )
    found = coverage(scores.pit_low, scores.pit_high, (0.5, 0.9))
    assert found.overall == pytest.approx([0.5, 0.9], abs=0.025)


@pytest.mark.parametrize("draws", [20, 100])
@pytest.mark.parametrize("sure", [1, 30])  # how much narrower than the truth the forecaster is; 1: it is right
def test_intervals_hold_what_their_probabilities_say(draws, sure):
    """What is handed out is counted, not computed from ranks: with ends beyond the draws nothing but an infinite end keeps the word."""
    rng = np.random.default_rng(3)
    shape = rng.gamma(4.0, 100.0, (300, 4)) + 50
    truth = sp.csr_matrix(rng.poisson(rng.gamma(shape / sure) * sure / RATE).astype(np.float32))
    ends = np.array([[0.05, 0.02, 0.004, 0.0], [0.95, 0.98, 0.996, 0.9]])
    summary, scores = posterior_predictive(Conjugate(shape), [chain()], np.arange(4), draws=draws, seed=0, truth=truth, ends=ends)
    x, q = truth.toarray(), summary.quantiles
    held = ((q["lower"] <= x) & (x <= q["upper"])).mean(0)
    assert (held >= interval_coverage(scores.pit_low, scores.pit_high, ends) - 1e-9).all()
    assert (held >= np.array([0.88, 0.94, 0.97, 0.87]) * (sure == 1)).all()
    assert np.isinf(q["upper"][:, 2]).all() and (q["lower"][:, 2:] == 0).all() and np.isfinite(q["upper"][:, [0, 3]]).all()
    if sure == 1:
        assert ((q["q05"] <= x) & (x <= q["q95"])).mean() == pytest.approx(0.9, abs=0.025)


def test_memory_bounds_the_block_not_the_answer(case):
    shape, _, _ = case
    wide = np.tile(shape, (10, 20))  # 120 x 100
    results, asked = [], []
    for memory in (1.0, 0.0005):
        predictor = Conjugate(wide)
        results.append(
            posterior_predictive(predictor, [chain()], np.arange(100), draws=60, seed=0, memory_gb=memory)[0]
        )
        asked.append((predictor.asked, predictor.calls))
        cells, genes = block_sizes(100, 60, memory)
        assert cells * genes * 60 * predict.BYTES_PER_DRAW <= memory * 1e9
    assert asked[0][0][0] > asked[1][0][0] and asked[1][1] > asked[0][1]
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        assert a.mean() == pytest.approx(b.mean(), rel=0.01) and not np.array_equal(a, b)
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.8
    again = posterior_predictive(Conjugate(wide), [chain()], np.arange(100), draws=60, seed=0, memory_gb=1.0)[0]
    np.testing.assert_array_equal(again.rate_mean, results[0].rate_mean)
    other = posterior_predictive(Conjugate(wide), [chain()], np.arange(100), draws=60, seed=1, memory_gb=1.0)[0]
    assert not np.array_equal(other.rate_mean, results[0].rate_mean)


@pytest.mark.parametrize("draws, memory", [(1, 1.0), (100, 1e-9), (10000, 0.001)])
def test_block_sizes_are_never_empty(draws, memory):
    cells, genes = block_sizes(7, draws, memory)
    assert cells >= 1 and 1 <= genes <= 7


def test_global_draws_are_shared_between_blocks_and_genes(case):
    """One level per draw for all cells and genes: counts of different blocks correlate as it makes them."""
    shape = np.full((6, 2), 40.0)
    level, draws = 4.0, 800
    predictor = Conjugate(shape)
    parts = list(count_draws(predictor, [chain(sharpness=level)], np.arange(2), draws=draws, seed=0, memory_gb=2 * 16 * 800 * 2 / 1e9))
    assert len(parts) == 3 and sorted(np.concatenate([rows for rows, _ in parts])) == list(range(6))
    counts = np.concatenate([values for _, values in parts], axis=1)  # [draws, 6, 2]
    m, v = 20.0, 40.0 / RATE**2
    total = m + v + (v + m**2) / level  # E level = 1, Var level = 1 / 4
    want = m**2 / level / total
    found = np.corrcoef(counts.reshape(draws, -1).T)[~np.eye(12, dtype=bool)]
    assert want > 0.6 and found == pytest.approx(np.full(132, want), abs=0.1)
    # and at a fixed level nothing is shared
    alone = np.concatenate(
        [c for _, c in count_draws(predictor, [chain()], np.arange(2), draws=500, seed=0, memory_gb=2 * 16 * 500 * 2 / 1e9)],
        axis=1,
    )
    assert np.abs(np.corrcoef(alone.reshape(500, -1).T)[~np.eye(12, dtype=bool)]).max() < 0.25


def test_draws_alternate_between_chains():
    drawn = draw_globals([chain(constant=1.0), chain(constant=5.0)], 5, 0)
    assert [float(d["level"]) for d in drawn] == [1, 5, 1, 5, 1]
    shape = np.full((3, 2), 400.0)
    summary, _ = posterior_predictive(
        Conjugate(shape), [chain(constant=1.0), chain(constant=5.0)], np.arange(2), draws=400, seed=0
    )
    assert summary.rate_mean == pytest.approx(np.full((3, 2), 600.0), rel=0.03)
    assert summary.rate_sd == pytest.approx(np.full((3, 2), 400.0), rel=0.1)  # between modes


def test_prediction_leaves_the_random_state_alone(case):
    before = torch.get_rng_state()
    posterior_predictive(Conjugate(case[0]), [chain(sharpness=2.0)], np.arange(5), draws=3, seed=0)
    assert torch.equal(before, torch.get_rng_state())


# ---- ensembles ----


class Mean(PyroModule):
    """m ~ N(0, 1), x_i ~ N(m, 1); the guide's mean starts at `start`."""

    def __init__(self, start=None):
        super().__init__()
        if start is not None:
            self.loc = nn.Parameter(torch.tensor(float(start)))
        self.guide = start is not None

    def forward(self, batch, *, observe=True):
        if self.guide:
            pyro.sample("m", dist.Normal(self.loc, 0.3))
        else:
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
            with pyro.plate("cells", len(batch)):
                pyro.sample("x", dist.Normal(m, 1.0), obs=batch if observe else None)


class Whole:
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return 1

    def at(self, step):
        return self.x


def test_ensemble_is_the_sum_of_its_chains_and_trains_them_apart():
    x = torch.tensor([1.0, 2.0, 1.5])
    pairs = [Pair(Mean(), Mean(start)) for start in (-1.0, 0.5)]
    both = ensemble(pairs)
    trace = poutine.trace(both.model).get_trace(x)
    assert {"chain0/m", "chain1/m", "chain0/x", "chain1/x", "chain0/cells"} <= set(trace.nodes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        many = np.mean([Trace_ELBO().loss(both.model, both.guide, x) for _ in range(200)])
        each = sum(np.mean([Trace_ELBO().loss(p.model, p.guide, x) for _ in range(200)]) for p in pairs)
    assert many == pytest.approx(each, rel=0.1)
    config = FitConfig(steps=200, lr=0.05, schedule="cosine")
    _, info = fit(both, Whole(x), config)
    assert info.untrained == () and len(chains_of(both)) == 2
    for one in chains_of(both):  # exact posterior mean
        assert one.guide.loc.item() == pytest.approx(4.5 / 4, abs=0.1)
    assert chains_of(both)[0].guide is pairs[0].guide


def test_lognorm_mean_is_the_expectation_of_the_log_normalised_count():
    """For sparse counts the stated approximation is close to Monte Carlo; the factor is the cell's own."""
    from ppl_st.inference.predict import posterior_predictive
    from ppl_st.likelihoods import NegativeBinomial

    mean, theta, factor = torch.tensor([[0.1, 2.0], [0.6, 30.0]]), 3.0, np.array([1.0, 2.5])

    class Fixed:
        n_cells = 2
        chains = ()

        def blocks(self, max_cells):
            return [None]

        def rows(self, batch):
            return np.arange(2)

        def local(self, batch, chain):
            return None

        def count_dist(self, batch, chain, drawn, local, genes):
            return NegativeBinomial(mean[:, genes], theta)

    from types import SimpleNamespace

    chain: object = SimpleNamespace(guide=SimpleNamespace(globals=lambda: None))
    summary, _ = posterior_predictive(Fixed(), [chain], np.arange(2), draws=2, seed=0, factor=factor)
    counts = np.random.default_rng(0).poisson(mean.numpy() * np.random.default_rng(1).gamma(theta, 1 / theta, (200_000, 2, 2)))
    exact = np.log1p(counts * factor[:, None]).mean(0)
    np.testing.assert_allclose(summary.lognorm_mean, exact, rtol=0.12)
    assert (summary.lognorm_mean >= exact * 0.99).all()  # it takes positive counts at their mean: never below


def test_disagreement_of_fits_is_told_from_their_own_doubt():
    """rate = level x Gamma(4, 2): levels .5 and 1.5 of two fits, each the same in every draw of it; equal fits: none of it by chance."""
    shape = np.full((6, 4), 4.0)
    two = [chain(constant=0.5), chain(constant=1.5)]
    summary, _ = posterior_predictive(Conjugate(shape), two, np.arange(4), draws=2000, seed=0)
    np.testing.assert_allclose(summary.between_sd, 0.5 * 2.0, rtol=0.1)  # mean of the gamma is 2
    within = np.sqrt(summary.rate_sd.astype(float) ** 2 - summary.between_sd.astype(float) ** 2)
    np.testing.assert_allclose(within, np.sqrt((0.5**2 + 1.5**2) / 2), rtol=0.1)  # sd of the gamma is 1
    same = [chain(), chain(), chain()]
    few = np.stack([posterior_predictive(Conjugate(shape), same, np.arange(4), draws=6, seed=s)[0].between_sd for s in range(60)])
    assert np.mean(few**2) < 0.25 and (few == 0).mean() > 0.3  # means of two draws differ by more: variance 1 / 2
    alone, _ = posterior_predictive(Conjugate(shape), [chain()], np.arange(4), draws=6, seed=0)
    assert alone.between_sd is None


def test_draws_know_their_fit():
    one = Conjugate(np.ones((2, 2)))
    assert fits_of_draws(one, [chain()], 10) is None and fits_of_draws(one, [chain()] * 5, 5) is None  # one draw of each says nothing
    np.testing.assert_array_equal(fits_of_draws(one, [chain()] * 2, 5), [0, 1, 0, 1, 0])
    one.fits = [7, 7, 9, 9]  # two chains each of two fits
    np.testing.assert_array_equal(fits_of_draws(one, [chain()] * 4, 6), [0, 0, 1, 1, 0, 0])

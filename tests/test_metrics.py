"""Metrics: twins in scipy, identities, constants, ties, proper scores in closed form, calibrated coverage."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import special, stats
from scipy.spatial.distance import jensenshannon

from ppl_st import calibration, compositions, metrics
from ppl_st.errors import UserError


def block(seed: int = 0, cells: int = 300, genes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Counts with many ties and an estimate of their rate that is partly right."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.7, 1.0, (cells, genes)) * np.geomspace(0.2, 5, genes)
    return rng.poisson(rate).astype(np.float64), rate * rng.lognormal(0, 0.5, rate.shape)


def test_correlations_equal_scipy_gene_by_gene() -> None:
    truth, estimate = block()
    columns = range(truth.shape[1])
    want_p = [stats.pearsonr(truth[:, g], estimate[:, g]).statistic for g in columns]
    want_s = [stats.spearmanr(truth[:, g], estimate[:, g]).statistic for g in columns]
    np.testing.assert_allclose(metrics.pcc(truth, estimate), want_p, rtol=1e-10)
    np.testing.assert_allclose(metrics.scc(truth, estimate), want_s, rtol=1e-10)
    np.testing.assert_allclose(metrics.r2(truth, estimate), np.square(want_p), rtol=1e-10)


def test_ties_get_average_ranks() -> None:
    truth = np.array([[0.0], [0.0], [1.0], [2.0]])
    estimate = np.array([[5.0], [7.0], [7.0], [9.0]])
    want = stats.pearsonr([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4]).statistic
    assert metrics.scc(truth, estimate)[0] == pytest.approx(want, abs=1e-12)


def test_correlation_survives_extreme_scales_and_float32_offsets() -> None:
    truth, estimate = block()
    want = metrics.pcc(truth, estimate)
    for factor in (1e-200, 1e200):
        np.testing.assert_allclose(metrics.pcc(truth, estimate * factor), want, rtol=1e-9)
    noisy_constant = np.float32(3.1) * (1 + np.random.default_rng(0).uniform(-6e-8, 6e-8, truth.shape))
    assert (metrics.pcc(truth, noisy_constant.astype(np.float32)) == 0).all()


def test_constants_count_as_zero() -> None:
    truth, estimate = block()
    truth[:, 0] = 0
    estimate[:, 1] = 2.5
    estimate[:, 2] = 0
    for metric in (metrics.pcc, metrics.scc, metrics.r2):
        values = metric(truth, estimate)
        assert np.isfinite(values).all()
        assert (values[:3] == 0).all() and (values[3:] != 0).all()
    assert (metrics.partial_pcc(truth, estimate, truth[:, 5])[:3] == 0).all()
    for metric in (
        metrics.rmse_z,
        metrics.ssim_li,
        metrics.ssim_spagene,
        metrics.js,
        metrics.rmse,
    ):
        assert np.isfinite(metric(truth, estimate)).all(), metric.__name__
    np.testing.assert_allclose(metrics.rmse_z(truth, estimate)[:3], np.sqrt(2))


def test_rmse_of_z_scores_is_a_function_of_pcc() -> None:
    truth, estimate = block()
    direct = metrics.rmse(stats.zscore(truth, axis=0), stats.zscore(estimate, axis=0))
    np.testing.assert_allclose(metrics.rmse_z(truth, estimate), direct, rtol=1e-10)
    np.testing.assert_allclose(direct, np.sqrt(2 - 2 * metrics.pcc(truth, estimate)), rtol=1e-10)


def test_partial_correlation_equals_the_textbook_formula_and_removes_depth() -> None:
    truth, estimate = block()
    depth = np.random.default_rng(1).normal(size=len(truth))
    truth += depth[:, None]
    estimate += 2 * depth[:, None]
    for g in range(3):
        te, td, ed = (
            stats.pearsonr(a, b).statistic
            for a, b in ((truth[:, g], estimate[:, g]), (truth[:, g], depth), (estimate[:, g], depth))
        )
        want = (te - td * ed) / np.sqrt((1 - td**2) * (1 - ed**2))
        assert metrics.partial_pcc(truth, estimate, depth)[g] == pytest.approx(want, abs=1e-12)
    only_depth = np.outer(depth, np.arange(1, truth.shape[1] + 1)) + 7
    assert (np.abs(metrics.pcc(truth, only_depth)) > 0.1).all()
    assert (metrics.partial_pcc(truth, only_depth, depth) == 0).all()
    np.testing.assert_allclose(
        metrics.partial_pcc(truth, estimate, np.column_stack([depth, 3 * depth - 1])),
        metrics.partial_pcc(truth, estimate, depth),
        atol=1e-10,
    )


def test_js_is_the_natural_log_divergence() -> None:
    truth, estimate = block()
    want = [jensenshannon(truth[:, g], estimate[:, g]) ** 2 for g in range(truth.shape[1])]
    np.testing.assert_allclose(metrics.js(truth, estimate), want, rtol=1e-8)
    np.testing.assert_allclose(metrics.js(truth, estimate * 17), metrics.js(truth, estimate), rtol=1e-10)
    apart = np.array([[1.0, 0], [0, 0]]), np.array([[0.0, 0], [1, 0]])
    np.testing.assert_allclose(metrics.js(*apart), np.log(2))
    negative = np.where(estimate > 1, estimate, -5.0)
    np.testing.assert_allclose(metrics.js(truth, negative), metrics.js(truth, np.maximum(negative, 0)))


def test_ssim_variants_equal_their_three_factor_forms() -> None:
    truth, estimate = block()
    x, y = truth / truth.max(0), estimate / estimate.max(0)
    c1, c2 = 1e-4, 9e-4
    sx, sy, cov = x.std(0), y.std(0), ((x - x.mean(0)) * (y - y.mean(0))).mean(0)
    luminance = (2 * x.mean(0) * y.mean(0) + c1) / (x.mean(0) ** 2 + y.mean(0) ** 2 + c1)
    contrast = (2 * sx * sy + c2) / (sx**2 + sy**2 + c2)
    structure = (cov + c2 / 2) / (sx * sy + c2 / 2)
    np.testing.assert_allclose(metrics.ssim_li(truth, estimate), luminance * contrast * structure, rtol=1e-10)
    np.testing.assert_allclose(metrics.ssim_li(truth, truth), 1.0)
    one_cell_less = len(truth) / (len(truth) - 1)
    x, y = ((v - v.min(0)) / np.ptp(v, axis=0) for v in (truth, estimate))
    cov = ((x - x.mean(0)) * (y - y.mean(0))).mean(0) * one_cell_less
    want = (2 * x.mean(0) * y.mean(0) + 0.01) / (x.mean(0) ** 2 + y.mean(0) ** 2 + 0.01)
    want *= (2 * cov + 0.03) / (x.var(0) + y.var(0) + 0.03)
    np.testing.assert_allclose(metrics.ssim_spagene(truth, estimate), want, rtol=1e-10)
    assert (metrics.ssim_spagene(truth, estimate) > metrics.ssim_li(truth, estimate)).all()


def test_poisson_ceiling_is_what_the_true_rate_reaches() -> None:
    rng = np.random.default_rng(3)
    rate = rng.gamma(0.8, 1.0, (40_000, 4)) * np.array([0.1, 0.5, 2, 10])
    counts = rng.poisson(rate)
    reached = metrics.pcc(counts, rate)
    np.testing.assert_allclose(metrics.poisson_ceiling(counts), reached, atol=0.05)
    np.testing.assert_allclose(metrics.poisson_ceiling_of_rate(rate), reached, atol=0.03)
    flat = rng.poisson(np.full((500, 1), 0.05))
    assert 0 <= metrics.poisson_ceiling(flat)[0] < 0.4
    assert metrics.poisson_ceiling(np.zeros((5, 1)))[0] == 0


def poisson_crps(rate: float, y: int) -> float:
    """Closed form of the CRPS of Poisson(rate) at y."""
    p, cdf = stats.poisson(rate).pmf(y), stats.poisson(rate).cdf(y)
    bessel = special.ive(0, 2 * rate) + special.ive(1, 2 * rate)
    return (y - rate) * (2 * cdf - 1) + 2 * rate * p - rate * bessel


def test_crps_from_draws_meets_the_closed_form_whatever_the_number_of_draws() -> None:
    rng = np.random.default_rng(4)
    for y in (0, 3, 8):
        draws = rng.poisson(2.5, (5, 60_000))
        got = metrics.crps_from_draws(draws, np.full(60_000, y)).mean()
        assert got == pytest.approx(poisson_crps(2.5, y), abs=0.02)
    draws = rng.normal(size=(7, 3))
    truth = rng.normal(size=3)
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1)) / (2 * 7 * 6)
    np.testing.assert_allclose(metrics.crps_from_draws(draws, truth), np.abs(draws - truth).mean(0) - pairs)


def test_perfect_poisson_forecaster_is_nominal_exactly_and_plain_intervals_are_not() -> None:
    levels = np.array([0.5, 0.8, 0.9, 0.95])
    x = np.arange(200)
    for rate in (0.05, 0.7, 6.0):
        law = stats.poisson(rate)
        # All counts with their own probabilities instead of a sample: the identity holds without noise.
        got = [
            calibration.coverage(law.cdf(x - 1)[[i], None], law.cdf(x)[[i], None], levels).overall
            for i in range(len(x))
        ]
        np.testing.assert_allclose(law.pmf(x) @ np.array(got), levels, atol=1e-9)
    sparse = stats.poisson(0.05)
    plain = sparse.cdf(sparse.ppf(0.95)) - sparse.cdf(sparse.ppf(0.05) - 1)
    assert plain > 0.95


def test_randomised_pit_and_its_expectation_agree() -> None:
    rng = np.random.default_rng(5)
    truth = rng.poisson(0.8, (20_000, 2))
    low, high = stats.poisson.cdf(truth - 1, 0.5), stats.poisson.cdf(truth, 0.5)
    result = calibration.coverage(low, high, (0.5, 0.9))
    u = rng.uniform(low, high)
    for i, level in enumerate((0.5, 0.9)):
        np.testing.assert_allclose(result.per_gene[i], (np.abs(u - 0.5) <= level / 2).mean(0), atol=0.015)
    np.testing.assert_allclose(result.overall, result.per_gene.mean(1))


def test_pit_of_few_draws_stays_calibrated_and_flags_a_narrow_forecaster() -> None:
    rng = np.random.default_rng(6)
    rate = rng.gamma(1, 1, (20_000, 2))
    good = calibration.coverage(
        *calibration.pit_bounds(rng.poisson(rate, (9, *rate.shape)), rng.poisson(rate)), levels=(0.9,)
    )
    assert good.overall[0] == pytest.approx(0.9, abs=0.01)
    wide_truth = rng.poisson(rate * rng.gamma(0.2, 5, rate.shape))
    narrow = calibration.coverage(
        *calibration.pit_bounds(rng.poisson(rate, (9, *rate.shape)), wide_truth), levels=(0.9,)
    )
    assert narrow.overall[0] < 0.85


def test_point_pit_counts_inside_or_outside() -> None:
    pit = np.array([[0.5], [0.01]])
    assert calibration.coverage(pit, pit, (0.9,)).overall[0] == 0.5


def test_log1p_normalise_follows_the_protocol_dense_and_sparse() -> None:
    counts = np.array([[2.0, 0], [1, 4], [5, 5]])
    total = np.array([10.0, 20, 0])
    want = np.log1p(counts * np.array([15 / 10, 15 / 20, 0])[:, None])
    np.testing.assert_allclose(metrics.log1p_normalise(counts, total), want)
    sparse = metrics.log1p_normalise(sp.csr_matrix(counts), total)
    assert sp.issparse(sparse)
    np.testing.assert_allclose(sparse.toarray(), want, rtol=1e-6)


def test_score_table_is_the_same_in_blocks_and_on_either_scale() -> None:
    truth, estimate = block(genes=7)
    total = np.random.default_rng(7).integers(5, 50, len(truth)).astype(float)
    genes = [f"g{i}" for i in range(7)]
    whole = metrics.score_table(sp.csr_matrix(truth), estimate, total, genes)
    parts = metrics.score_table(
        sp.csr_matrix(truth), lambda where: estimate[:, where], total, genes, block_entries=700
    )
    np.testing.assert_allclose(whole.astype(float), parts.astype(float), atol=1e-12)
    log = metrics.score_table(truth, metrics.log1p_normalise(estimate, total), total, genes, scale="log")
    np.testing.assert_allclose(whole.astype(float), log.astype(float), rtol=1e-8, atol=1e-10)
    assert list(whole.index) == genes
    np.testing.assert_allclose(whole["raw_pcc"], metrics.pcc(truth, estimate))
    np.testing.assert_allclose(
        whole["log_scc"], metrics.scc(*(metrics.log1p_normalise(v, total) for v in (truth, estimate)))
    )


def test_score_table_gives_a_depth_only_estimate_no_credit_beyond_depth() -> None:
    rng = np.random.default_rng(8)
    total = rng.gamma(2, 20, 400).round()
    total[:3] = 0
    truth = rng.poisson(total[:, None] * 0.05 * rng.gamma(1, 1, (400, 3)))
    table = metrics.score_table(truth, np.outer(total, [1, 2, 3]).astype(np.float32), total, list("abc"))
    assert (table["raw_pcc"] > 0.2).all()
    assert (table[["raw_partial_pcc", "log_pcc", "log_partial_pcc"]] == 0).all(axis=None)
    assert table["log_constant"].all() and not table["raw_constant"].any()


def test_bootstrap_interval_covers_the_mean_and_repeats_with_the_seed() -> None:
    values = np.random.default_rng(9).normal(0.4, 0.1, 120)
    a, b = (metrics.bootstrap_mean(values, np.random.default_rng(0)) for _ in range(2))
    assert a == b
    assert a.mean == pytest.approx(values.mean()) and a.median == pytest.approx(np.median(values))
    half = 1.96 * values.std() / np.sqrt(120)
    assert a.lo == pytest.approx(values.mean() - half, abs=0.004)
    assert a.hi == pytest.approx(values.mean() + half, abs=0.004)


def test_one_gene_has_no_interval() -> None:
    alone = metrics.bootstrap_mean([0.3], np.random.default_rng(0))
    assert alone.mean == alone.median == 0.3 and np.isnan(alone.lo) and np.isnan(alone.hi)
    assert metrics.bootstrap_mean([0.3, 0.5], np.random.default_rng(0)).hi > 0.4


def test_bad_input_is_refused_with_the_offence_named() -> None:
    truth, estimate = block()
    estimate[3, 2] = np.nan
    with pytest.raises(UserError, match=r"estimate holds 1 non-finite.*\[2\]"):
        metrics.pcc(truth, estimate)
    with pytest.raises(UserError, match="shape"):
        metrics.pcc(truth, truth[:, :2])
    with pytest.raises(UserError, match="pit_low"):
        calibration.coverage(np.ones((2, 2)), np.zeros((2, 2)))


def test_inputs_are_left_alone() -> None:
    truth, estimate = block()
    before = truth.copy(), estimate.copy()
    metrics.score_table(truth, estimate, truth.sum(1) + 1, list("abcdef"))
    draws = np.random.default_rng(0).poisson(1.0, (4, *truth.shape))
    copy = draws.copy()
    metrics.crps_from_draws(draws, truth)
    assert (truth == before[0]).all() and (estimate == before[1]).all() and (draws == copy).all()


def test_matching_undoes_a_permutation_and_counts_the_rest_as_wrong() -> None:
    rng = np.random.default_rng(10)
    truth = rng.dirichlet(np.full(4, 0.1), 500)
    order = np.array([2, 0, 3, 1])
    shuffled = truth[:, order]
    matched = compositions.match_factors(truth, shuffled)
    np.testing.assert_array_equal(order[matched], np.arange(4))
    assert compositions.matched_accuracy(truth, shuffled) == 1
    np.testing.assert_allclose(compositions.proportion_js(truth, shuffled, matched), 0, atol=1e-12)
    # One factor too many: split one type's cells, half of them must count as wrong.
    half = rng.random(500) < 0.5
    split = np.hstack([shuffled * 1.0, np.zeros((500, 1))])
    moved = half & (truth.argmax(1) == 0)
    split[moved] = [0, 0, 0, 0, 1]
    wrong = min(moved.sum(), (~half & (truth.argmax(1) == 0)).sum()) / 500
    assert compositions.matched_accuracy(truth, split) == pytest.approx(1 - wrong)
    # One factor too few: a type stays unmatched.
    assert (compositions.match_factors(truth, shuffled[:, :3]) == -1).sum() == 1


def test_proportion_js_equals_scipy_in_bits_and_is_one_for_disjoint() -> None:
    rng = np.random.default_rng(11)
    a, b = rng.dirichlet(np.ones(5), 20), rng.dirichlet(np.ones(5), 20)
    want = [jensenshannon(p, q, base=2) ** 2 for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(compositions.proportion_js(a, b), want)
    one = np.eye(3)
    # A factor without a type takes mass that the truth does not have.
    np.testing.assert_allclose(compositions.proportion_js(one, one[:, [0, 1, 2]], np.array([0, 1, -1])), [0, 0, 1])

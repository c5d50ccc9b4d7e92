"""Rubin's rules against known answers; the statistics against brute force; intervals of imputed genes that cover what they should."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import norm

from ppl_st.errors import UserError
from ppl_st.pooling import (
    Statistic,
    draws_of,
    joined,
    ligand_receptor,
    log_fold_change,
    morans_i,
    pool,
    pooled,
    widened,
)
from ppl_st.spatial import neighbors


def test_rules_by_hand():
    found = pool([1.0, 2.0, 3.0], [0.5, 0.5, 0.2])
    within, between = 0.4, 4 / 3
    assert found.estimate == 2 and found.se == pytest.approx(np.sqrt(within + between))
    assert found.missing == pytest.approx(between / (within + between))
    assert found.df == pytest.approx(2 * ((within + between) / between) ** 2)
    assert found.lo < 2 < found.hi and found.hi - found.estimate > 1.96 * found.se
    nothing_missing = pool([[1.0, 0.0]] * 3, [[0.25, 0.0]] * 3)
    assert nothing_missing.p == pytest.approx([2 * norm.sf(2), 1.0]) and (nothing_missing.missing == 0).all()
    assert nothing_missing.hi == pytest.approx([1 + norm.ppf(0.975) * 0.5, 0.0])


def test_what_cannot_be_pooled_is_refused():
    with pytest.raises(UserError, match="K >= 2"):
        pool([1.0], [1.0])
    with pytest.raises(UserError, match="level 95 is no share"):
        pool([1.0, 2.0], [1.0, 1.0], level=95)
    with pytest.raises(UserError, match="not negative"):
        pool([1.0, 2.0], [1.0, -1.0])
    with pytest.raises(UserError, match="1 draws"):
        pooled([np.ones((5, 2))], lambda x: Statistic(x.mean(0), x.var(0)))


@pytest.fixture(scope="module")
def tissue():
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 100, (60, 2))
    return rng.poisson(2.0, (60, 3)).astype(float), neighbors(xy, 5), rng.random(60) < 0.4


def test_fold_change_is_the_ratio_of_means_and_its_variance_that_of_resampled_cells(tissue):
    x, _, group = tissue
    found = log_fold_change(sp.csr_matrix(x), group)
    np.testing.assert_allclose(found.estimate, np.log(x[group].mean(0) / x[~group].mean(0)))
    rng, resampled = np.random.default_rng(1), []
    a, b = x[group], x[~group]
    for _ in range(2000):
        means = [side[rng.integers(0, len(side), len(side))].mean(0) for side in (a, b)]
        resampled.append(np.log(means[0] / means[1]))
    np.testing.assert_allclose(found.variance, np.var(resampled, axis=0), rtol=0.2)
    with pytest.raises(UserError, match="both sides"):
        log_fold_change(x, np.ones(60))


@pytest.mark.parametrize(
    "group, said",
    [
        (np.arange(60) % 3, r"shape \(60,\), type int64 and values 0, 1, 2; .* each of the 60 cells"),
        (np.arange(60) < 30.5, None),
        (np.arange(60) % 2, None),
        (np.where(np.arange(60) % 2, 1.0, np.nan), r"type float64 and values nan, 1\.0;"),
        (np.where(np.arange(60) % 2, "T", "B"), r"values 'B', 'T'; .*labels == 'B cells'"),
        ((np.arange(60) % 2 == 0).astype(object), None),
        (np.ones(59, bool), r"shape \(59,\), type bool and values True"),
    ],
)
def test_a_group_is_true_or_false_for_every_cell(group, said):
    x = np.random.default_rng(0).poisson(3.0, (60, 2))
    if said is None:
        assert np.isfinite(log_fold_change(x, group).estimate).all()
        return
    with pytest.raises(UserError, match=f"log_fold_change: group has .*{said}"):
        log_fold_change(x, group)


def test_a_gene_that_hardly_anybody_has_does_not_differ():
    """A floor of its own for either side called it higher in the smaller one."""
    rng, group = np.random.default_rng(5), np.arange(6030) < 30
    x = np.hstack([np.zeros((6030, 1)), rng.poisson(1e-3, (6030, 200))])
    found = log_fold_change(x, group)
    assert found.estimate[0] == 0
    assert (np.abs(found.estimate) > 1.96 * np.sqrt(found.variance)).mean() < 0.1


def test_spatial_scores_have_the_moments_of_random_exchange(tissue):
    x, graph, _ = tissue
    x = x.copy()
    x[0, 0] = 40.0  # a heavy tail: the kurtosis term matters
    rng = np.random.default_rng(2)
    found = morans_i(x, graph)
    exchanged = np.stack([morans_i(x[rng.permutation(60)], graph).estimate for _ in range(4000)])
    np.testing.assert_allclose(found.variance, exchanged.var(0), rtol=0.12)
    assert np.abs(exchanged.mean(0)).max() < 5 * np.sqrt(found.variance.max() / 4000)
    pairs = [(0, 1), (2, 1)]
    score = ligand_receptor(x, graph, pairs)
    shuffled = []
    for _ in range(4000):
        y = x.copy()
        y[:, 1] = rng.permutation(y[:, 1])
        shuffled.append(ligand_receptor(y, graph, pairs).estimate)
    np.testing.assert_allclose(score.variance, np.var(shuffled, axis=0), rtol=0.12)
    assert np.abs(np.mean(shuffled, axis=0)).max() < 5 * np.sqrt(score.variance.max() / 4000)
    row = graph[7].indices  # by hand, for one cell's senders
    w = sp.csr_matrix(sp.diags(1 / np.asarray(graph.sum(1)).ravel()) @ graph)
    by_hand = sum(w[i, j] * x[i, 0] * x[j, 1] for i in range(60) for j in graph[i].indices) / 60
    sent = (w.T @ x[:, 0]).mean()
    assert len(row) and score.estimate[0] == pytest.approx(by_hand / (sent * x[:, 1].mean()) - 1)


def test_a_variance_under_exchange_makes_no_interval_for_a_population(tissue):
    x, graph, group = tissue
    for statistic in (lambda counts: morans_i(counts, graph), lambda counts: ligand_receptor(counts, graph, [(0, 1)])):
        with pytest.raises(UserError, match="population=False"):
            pooled([x, x], statistic)
        assert (pooled([x, x], statistic, population=False).se == 0).all()
    assert (pooled([x, x], lambda counts: log_fold_change(counts, group)).se > 0).all()


def test_a_pattern_is_found_and_a_constant_gene_is_nothing(tissue):
    _, graph, _ = tissue
    rng = np.random.default_rng(3)
    smooth = graph @ (graph @ rng.standard_normal((60, 1)))
    found = morans_i(np.hstack([smooth, np.ones((60, 1))]), graph)
    assert found.estimate[0] > 3 * np.sqrt(found.variance[0]) and found.estimate[1] == found.variance[1] == 0
    tenths = morans_i(np.full((60, 1), 0.1), graph)  # whose mean is not .1 in floating point
    assert tenths.estimate[0] == tenths.variance[0] == 0
    with pytest.raises(UserError, match="graph"):
        morans_i(np.ones((60, 1)), sp.csr_matrix((60, 60)))
    for pairs, said in (([["a", "b"]], "not names of genes"), ([[-1, 0]], "name column -1; there are 2 genes"), ([[0, 1, 0]], "numbers of columns")):
        with pytest.raises(UserError, match=said):
            ligand_receptor(np.ones((60, 2)), graph, pairs)


class World:
    """Gene levels of 4 cell types, known through a reference alone: conjugate, so that the imputation model is exactly right.

    lambda_tg ~ Gamma(2, 1); reference counts c_tg ~ Poisson(DEPTH lambda_tg); a cell of type t has x_ig ~ Poisson(lambda_tg).
    """

    TYPES, GENES, CELLS, DEPTH, DRAWS = 4, 40, 400, 4.0, 20

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        side = rng.uniform(0, 1, (self.CELLS, 2))
        self.types = (self.TYPES * np.clip(side[:, 0] + 0.1 * rng.standard_normal(self.CELLS), 0, 0.999)).astype(int)
        self.group, self.graph = side[:, 0] < 0.5, neighbors(side, 6)
        self.level = rng.gamma(2.0, 1.0, (self.TYPES, self.GENES))
        self.counts = rng.poisson(self.level[self.types]).astype(float)
        self.shape, self.rate = 2.0 + rng.poisson(self.DEPTH * self.level), 1.0 + self.DEPTH
        self.rng = rng

    def draws(self):
        for _ in range(self.DRAWS):
            yield self.rng.poisson(self.rng.gamma(self.shape, 1 / self.rate)[self.types]).astype(float)

    @property
    def mean(self):
        return (self.shape / self.rate)[self.types]


def covered(interval, truth):
    return float(((interval.lo <= truth) & (truth <= interval.hi)).mean())


def naive(one, level=1.959964):
    se = np.sqrt(one.variance)
    return Statistic(one.estimate - level * se, one.estimate + level * se)


def test_pooled_intervals_cover_and_imputed_means_do_not():
    """95 % intervals over 12 worlds x 40 genes: fold change of the population, Moran's I and product score of the very cells."""
    found = {name: [] for name in ("fold", "fold of means", "moran", "pairs", "error of moran of means", "error of moran")}
    for seed in range(12):
        world = World(seed)
        share = np.stack([np.bincount(world.types[side], minlength=4) / side.sum() for side in (world.group, ~world.group)])
        truth = np.log(share[0] @ world.level) - np.log(share[1] @ world.level)
        draws = list(world.draws())
        found["fold"].append(covered(pooled(draws, lambda x, w=world: log_fold_change(x, w.group)), truth))
        one = log_fold_change(world.mean, world.group)
        half = 1.96 * np.sqrt(one.variance)
        found["fold of means"].append(float((np.abs(one.estimate - truth) <= half).mean()))
        truth = morans_i(world.counts, world.graph).estimate
        interval = pooled(draws, lambda x, w=world: morans_i(x, w.graph), population=False)
        found["moran"].append(covered(interval, truth))
        found["error of moran"].append(float((interval.estimate - truth).mean()))
        found["error of moran of means"].append(float((morans_i(world.mean, world.graph).estimate - truth).mean()))
        pairs = np.arange(40).reshape(20, 2)
        truth = ligand_receptor(world.counts, world.graph, pairs).estimate
        interval = pooled(draws, lambda x, w=world, p=pairs: ligand_receptor(x, w.graph, p), population=False)
        found["pairs"].append(covered(interval, truth))
    mean = {name: np.mean(values) for name, values in found.items()}
    assert 0.93 < mean["fold"] < 0.99 and mean["fold of means"] < 0.75
    assert 0.92 < mean["moran"] < 0.98 and 0.92 < mean["pairs"] < 0.98
    assert abs(mean["error of moran"]) < 0.02 and mean["error of moran of means"] > 0.2  # a mean is smoother than counts


def test_what_the_model_forgets_is_learned_from_measured_genes():
    """Draws that know only a quarter of the doubt: pooled intervals miss; widened on half of the genes they cover the other half, as promised."""
    found = {"pooled": [], "widened": []}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        doubt, genes = rng.gamma(4.0, 0.25, 60), slice(30, None)
        truth = rng.standard_normal(60)
        center = truth + 4 * doubt * rng.standard_normal(60)
        draws = center + doubt * rng.standard_normal((20, 60))
        inner, new = (pool(draws[:, part], np.zeros_like(draws[:, part])) for part in (slice(30), genes))
        wide = widened(new, joined([inner._replace(**{k: v[:10] for k, v in inner._asdict().items()}),
                                    inner._replace(**{k: v[10:] for k, v in inner._asdict().items()})]), truth[:30], level=0.9)  # fmt: skip
        found["pooled"].append(covered(new, truth[genes]))
        found["widened"].append(covered(wide, truth[genes]))
    assert np.mean(found["pooled"]) < 0.5 and 0.885 < np.mean(found["widened"]) < 0.95
    few = widened(new, inner._replace(**{k: v[:5] for k, v in inner._asdict().items()}), truth[:5])
    assert np.isinf(few.hi).all() and (few.p >= 1 / 6).all()  # five genes cannot promise 95 %
    nothing = new._replace(estimate=np.zeros(30), se=np.zeros(30))
    assert np.isinf(widened(nothing, inner._replace(**{k: v[:5] for k, v in inner._asdict().items()}), truth[:5]).hi).all()
    with pytest.raises(UserError, match="finite"):
        widened(new, inner, np.full(30, np.nan))


def test_draws_come_from_layers_and_from_the_store(tmp_path):
    import anndata as ad
    import zarr

    counts = np.random.default_rng(0).poisson(2.0, (4, 6, 3)).astype("f4")
    table = ad.AnnData(np.zeros((6, 3)), layers={f"sample_{k}": counts[k] for k in range(4)})
    table.var_names = ["a", "bc", "c"]
    group = zarr.open_group(str(tmp_path / "x.samples.zarr"), mode="w")
    group.create_array("count", data=counts)
    group.attrs["genes"] = ["a", "bc", "c"]
    for source in (table, tmp_path / "x.samples.zarr"):
        np.testing.assert_array_equal(np.stack(list(draws_of(source, ["c", "a"]))), counts[:, :, [2, 0]])
        np.testing.assert_array_equal(np.stack(list(draws_of(source, "bc"))), counts[:, :, [1]])  # a name, no list of letters
        with pytest.raises(UserError, match="hold no z"):
            list(draws_of(source, ["z"]))
    del table.layers["sample_0"], table.layers["sample_1"], table.layers["sample_2"], table.layers["sample_3"]
    with pytest.raises(UserError, match="samples=20"):
        list(draws_of(table))
    with pytest.raises(UserError, match="no store of count draws"):
        list(draws_of(tmp_path / "nothing.zarr"))


def test_one_gene_of_a_store_is_read_alone(tmp_path):
    import tracemalloc

    import zarr

    group = zarr.open_group(str(tmp_path / "x.samples.zarr"), mode="w")
    array = group.create_array("count", shape=(2, 1000, 1000), chunks=(1, 1000, 50), dtype="f4")
    array[1, :, 700] = np.arange(1000)
    group.attrs["genes"] = [f"g{n}" for n in range(1000)]
    tracemalloc.start()
    draws = list(draws_of(tmp_path / "x.samples.zarr", ["g700"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(draws[1], np.arange(1000.0)[:, None])
    assert peak < 2e6  # a whole draw is 4e6 bytes, and 8e6 in float64

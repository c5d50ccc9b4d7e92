"""Baselines: each beats a constant on simulated data, sees no held-out truth, and equals its naive form."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from ppl_st import baselines, metrics
from ppl_st.data import Counts, gene_folds, read_counts
from ppl_st.errors import UserError
from ppl_st.ridge import fit_ridge
from realdata import path


def counts(matrix: np.ndarray, genes: np.ndarray, xy: np.ndarray | None = None) -> Counts:
    names = np.array([f"n{i}" for i in range(len(matrix))])
    return Counts(
        sp.csr_matrix(matrix, dtype=np.float32), genes, names, xy, pd.DataFrame(index=names), "simulated", "X"
    )


GENES = np.array([f"g{i}" for i in range(40)])
HELD_OUT = GENES[32:]


def simulated(seed: int = 0, spots: bool = False) -> tuple[baselines.Split, np.ndarray]:
    """Four types in four quadrants; the reference holds cells (with gene gains) or spots of summed cells."""
    rng = np.random.default_rng(seed)
    profiles = rng.dirichlet(np.full(40, 0.4), 4)
    xy = rng.uniform(0, 10, (700, 2))
    kind = 2 * (xy[:, 0] > 5) + (xy[:, 1] > 5)
    rate = rng.lognormal(np.log(60), 0.5, 700)[:, None] * profiles[kind]
    measured = rng.poisson(rate)
    if spots:
        grid = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2) * 10 / 11.0
        inside = cdist(grid, xy).argmin(0)
        sums = np.zeros((144, 40))
        np.add.at(sums, inside, measured)
        reference = counts(sums, GENES, grid)
    else:
        gain = rng.lognormal(0, 0.4, 40)
        reference = counts(rng.poisson(100 * gain * profiles[rng.integers(0, 4, 300)]), GENES)
    split = baselines.Split(counts(measured[:, :32], GENES[:32], xy), reference, HELD_OUT)
    return split, measured[:, 32:]


def mean_pcc(split: baselines.Split, truth: np.ndarray, baseline: baselines.Baseline, column: str) -> float:
    estimate = baseline.estimate(split)
    assert estimate.shape == truth.shape and estimate.dtype == np.float32
    return metrics.score_table(truth, estimate, split.training_total, HELD_OUT, scale=baseline.scale)[
        column
    ].mean()


@pytest.mark.parametrize("name", list(baselines.REFERENCE_BASELINES))
def test_reference_baselines_on_simulated_types(name: str) -> None:
    split, truth = simulated()
    score = mean_pcc(split, truth, baselines.REFERENCE_BASELINES[name], "log_pcc")
    if name == "gene_mean":
        assert score == 0
    elif name == "cell_total":
        assert abs(score) < 0.2
    else:
        assert score > 0.4


@pytest.mark.parametrize("name", list(baselines.SPOT_BASELINES))
def test_spot_baselines_on_simulated_quadrants(name: str) -> None:
    split, truth = simulated(spots=True)
    score = mean_pcc(split, truth, baselines.SPOT_BASELINES[name], "raw_pcc")
    if name == "gene_mean":
        assert score == 0
    elif name == "cell_total":
        assert mean_pcc(split, truth, baselines.SPOT_BASELINES[name], "raw_partial_pcc") == 0
    else:
        assert score > 0.3


def test_shuffled_reference_destroys_accuracy() -> None:
    split, truth = simulated()
    known = split.reference.take_genes(GENES[:32]).matrix.toarray()
    held_out = split.reference.take_genes(HELD_OUT).matrix.toarray()
    for name in ("ridge_z", "knn"):
        baseline, scores = baselines.REFERENCE_BASELINES[name], []
        # One shuffle of four types leaves chance correlations of either sign: average over several.
        for seed in range(8):
            order = np.random.default_rng(seed).permutation(len(known))
            shuffled = counts(np.hstack([known, held_out[order]]), GENES)
            scores.append(
                mean_pcc(baselines.Split(split.target, shuffled, HELD_OUT), truth, baseline, "log_pcc")
            )
        assert abs(np.mean(scores)) < 0.1 < 0.4 < mean_pcc(split, truth, baseline, "log_pcc")


def test_gene_and_cell_order_only_permute_the_answer() -> None:
    split, _ = simulated()
    rng = np.random.default_rng(2)
    rows, genes = rng.permutation(700), rng.permutation(GENES[:32])
    moved = baselines.Split(split.target.take_genes(genes).take_rows(rows), split.reference, HELD_OUT[::-1])
    for name in ("knn_z", "ridge_z_smooth"):
        one = baselines.REFERENCE_BASELINES[name].estimate
        # k-NN may swap rows at exactly equal cosine; everything else is equal up to rounding.
        differs = ~np.isclose(one(moved), one(split)[rows][:, ::-1], rtol=1e-3, atol=1e-3)
        assert differs.mean() < 0.01


def test_ridge_equals_the_dense_normal_equations_and_gcv_shrinks_noise() -> None:
    rng = np.random.default_rng(3)
    x, noise = rng.poisson(2, (200, 5)).astype(float), rng.poisson(2, (200, 3)).astype(float)
    y = np.column_stack([x @ [1, 0, 2, 0, 0.5] + 0.01 * rng.normal(size=200), x[:, 0]])
    fitted = fit_ridge(sp.csr_matrix(x), sp.csr_matrix(y))
    np.testing.assert_allclose(fitted.predict(sp.csr_matrix(x)), y, atol=0.05)
    z = (x - x.mean(0)) / x.std(0)
    nothing = fit_ridge(sp.csr_matrix(x), sp.csr_matrix(noise))
    # The slopes solve (z'z + a) b = z'y for one a: recover it from the first gene and check the rest.
    right = z.T @ (noise - noise.mean(0))
    penalty = (right - z.T @ z @ nothing.slopes)[0, 0] / nothing.slopes[0, 0]
    np.testing.assert_allclose((z.T @ z + penalty * np.eye(5)) @ nothing.slopes, right, rtol=1e-6)
    assert penalty > 200


def test_ridge_of_more_genes_than_rows_solves_the_same_equations() -> None:
    rng = np.random.default_rng(6)
    x = rng.poisson(2, (30, 90)).astype(float)
    y = x[:, :2] + x[:, 2:4] + rng.normal(size=(30, 2))
    fitted = fit_ridge(sp.csr_matrix(x), sp.csr_matrix(y))
    z, right = (x - x.mean(0)) / x.std(0), y - y.mean(0)
    inside = z.T @ right - z.T @ z @ fitted.slopes  # penalty x slopes
    penalty = float((inside * fitted.slopes).sum() / np.square(fitted.slopes).sum())
    assert penalty > 0
    np.testing.assert_allclose(inside, penalty * fitted.slopes, atol=1e-6 * np.abs(inside).max())


def test_nearest_by_cosine_equals_the_dense_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_BLOCK_ENTRIES", 200)
    rng = np.random.default_rng(4)
    x, pool, values = (rng.poisson(1.5, shape).astype(float) for shape in ((50, 8), (40, 8), (40, 3)))
    for z in (False, True):
        a, b = ((v - v.mean(0)) / v.std(0) for v in (x, pool)) if z else (x + 1e-12, pool)
        order = np.argsort(cdist(a, b, "cosine"), axis=1, kind="stable")[:, :5]
        got = baselines._nearest_by_cosine(*(sp.csr_matrix(v) for v in (x, pool, values)), 5, z=z)
        same = np.isclose(got, values[order].mean(1), atol=1e-5).all(1)
        assert same.mean() > 0.8  # small integer profiles repeat: ties at rank 5 may go either way
        if z:
            assert same.mean() > 0.95


def test_spot_copies_follow_their_definitions() -> None:
    split, _ = simulated(spots=True)
    assert split.reference.xy is not None and split.target.xy is not None
    near = cdist(split.target.xy, split.reference.xy[split.usable]).argmin(1)
    a = split.reference_held_out.toarray()[near]
    np.testing.assert_array_equal(baselines.spot_copy(split), a)
    b = a * (split.training_total / split.reference_total[near])[:, None]
    np.testing.assert_allclose(baselines.spot_copy_total(split), b, rtol=1e-5)
    ten = np.argsort(cdist(split.target.xy, split.target.xy), axis=1)[:, :10]
    np.testing.assert_allclose(baselines.spot_copy_smooth(split), a[ten].mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(baselines.spot_copy_total_smooth(split), b[ten].mean(1), rtol=1e-4, atol=1e-4)


def test_supervised_ridge_never_sees_the_truth_of_the_cell_itself() -> None:
    split, truth = simulated()
    estimate = baselines.supervised_ridge(split, truth)
    table = metrics.score_table(truth, estimate, split.training_total, HELD_OUT, scale="log")
    assert (
        table["log_pcc"].mean()
        > mean_pcc(split, truth, baselines.REFERENCE_BASELINES["ridge_z"], "log_pcc") - 0.02
    )
    noise = np.random.default_rng(5).poisson(1.0, truth.shape)
    blind = baselines.supervised_ridge(split, noise)
    assert (
        metrics.score_table(noise, blind, split.training_total, HELD_OUT, scale="log")[
            "log_partial_pcc"
        ].mean()
        < 0.1
    )
    changed = truth.copy()
    part = np.random.default_rng(split.seed).permutation(len(truth)) % 5
    changed[part == 0] += 50
    again = baselines.supervised_ridge(split, changed)
    np.testing.assert_allclose(again[part == 0], estimate[part == 0], rtol=1e-4, atol=1e-4)


def test_everything_repeats_with_the_seed_and_moves_no_global_state() -> None:
    split, truth = simulated()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - reads the global state to show that nobody touches it
    first = [b.estimate(split) for b in baselines.REFERENCE_BASELINES.values()] + [
        baselines.supervised_ridge(split, truth)
    ]
    again = simulated()[0]
    second = [b.estimate(again) for b in baselines.REFERENCE_BASELINES.values()] + [
        baselines.supervised_ridge(again, truth)
    ]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_tiny_and_empty_input() -> None:
    rng = np.random.default_rng(6)
    target, reference = rng.poisson(1.0, (12, 3)), rng.poisson(1.0, (6, 4))
    target[0], reference[0, :3] = 0, 0
    genes = np.array(["a", "b", "c", "d"])
    split = baselines.Split(
        counts(target, genes[:3], rng.uniform(size=(12, 2))),
        counts(reference, genes, rng.uniform(size=(6, 2))),
        genes[3:],
    )
    for baseline in [*baselines.REFERENCE_BASELINES.values(), *baselines.SPOT_BASELINES.values()]:
        assert np.isfinite(baseline.estimate(split)).all()


def test_wrong_splits_are_refused() -> None:
    split, _ = simulated()
    with pytest.raises(UserError, match="held-out genes are in the target"):
        baselines.Split(split.target, split.reference, GENES[30:])
    with pytest.raises(UserError, match=r"absent from the reference \(nope\)"):
        baselines.Split(split.target, split.reference, np.array(["nope"]))
    no_place = baselines.Split(counts(np.ones((20, 32)), GENES[:32]), split.reference, HELD_OUT)
    with pytest.raises(UserError, match="coordinates"):
        baselines.ridge_z_smooth(no_place)


@pytest.mark.slow
def test_osmfish_lower_bounds() -> None:
    target = anndata.read_h5ad(path("osmfish_cortex/spatial.h5ad"))
    target = read_counts(target[~target.obs["duplicate_row"].to_numpy(dtype=bool)].copy(), role="target")
    reference = read_counts(path("osmfish_cortex/scrna.h5ad"), role="reference", need_spatial=False)
    genes = np.sort(np.intersect1d(target.genes, reference.genes))
    folds = gene_folds(genes, 5, 0)
    keep = np.all([target.take_genes(np.setdiff1d(genes, f)).totals > 0 for f in folds], axis=0)
    target = target.take_rows(np.flatnonzero(keep))
    assert len(target.names) == 5901
    tables: dict[str, list[np.ndarray]] = {"ridge_z": [], "ridge_z_smooth": [], "ensemble": []}
    for held_out in folds:
        truth = target.take_genes(held_out).matrix
        split = baselines.Split(target.take_genes(np.setdiff1d(genes, held_out)), reference, held_out)
        for name, found in tables.items():
            estimate = baselines.REFERENCE_BASELINES[name].estimate(split)
            found.append(
                metrics.score_table(truth, estimate, split.training_total, held_out, scale="log")["log_pcc"]
            )
    got = {name: float(np.concatenate(found).mean()) for name, found in tables.items()}
    least = {"ridge_z": 0.26, "ridge_z_smooth": 0.275, "ensemble": 0.285}
    assert all(got[name] > bound for name, bound in least.items()), got


@pytest.mark.slow
def test_spots_to_cells_lower_bounds() -> None:
    folder = "derived_pair_xenium_brain/"
    target = read_counts(path(folder + "xenium_like_panel.h5ad"), role="target")
    reference = read_counts(path(folder + "visium_like_spots.h5ad"), role="reference")
    truth = read_counts(path(folder + "heldout_truth_cells.h5ad"), role="target")
    split = baselines.Split(target, reference, truth.genes)
    for name, least in (("spot_copy_total", 0.28), ("ridge_spots", 0.46), ("knn_spots", 0.46)):
        estimate = baselines.SPOT_BASELINES[name].estimate(split)
        assert metrics.r2(truth.matrix.toarray(), estimate).mean() > least, name


def test_smoothing_stays_within_its_section():
    rng = np.random.default_rng(0)
    xy = rng.uniform(size=(60, 2))  # two sections in one range of coordinates
    target = counts(rng.poisson(2.0, (60, 12)), GENES[:12], xy)
    target.obs["slide"] = np.arange(60) % 2
    reference = counts(rng.poisson(2.0, (40, 13)), GENES[:13])
    splits = [baselines.Split(target, reference, GENES[12:13], 0, key) for key in ("slide", None)]
    crossing = [baselines._neighbor_mean(split, 4)[::2][:, 1::2].sum() for split in splits]
    assert crossing[0] == 0 and crossing[1] > 0
    with pytest.raises(UserError, match="no obs column 'slice'"):
        baselines.Split(target, reference, GENES[12:13], 0, "slice")


@pytest.mark.parametrize("name", [name for name, one in baselines.REFERENCE_BASELINES.items() if one.scale == "log"])
def test_estimates_from_a_reference_are_at_the_depth_of_the_target(name: str) -> None:
    rng = np.random.default_rng(7)
    profile = rng.dirichlet(np.full(40, 2.0))
    xy = rng.uniform(size=(300, 2))
    target = counts(rng.poisson(100 * profile[:32], (300, 32)), GENES[:32], xy)
    split = baselines.Split(target, counts(rng.poisson(2000 * profile, (200, 40)), GENES), HELD_OUT)
    found = np.expm1(baselines.REFERENCE_BASELINES[name].estimate(split)).mean(0)
    np.testing.assert_allclose(found / (100 * profile[32:]), 1, atol=0.15)  # at the reference's depth: 20


def test_a_cell_alone_in_its_section_keeps_its_own_value() -> None:
    split, _ = simulated(spots=True)
    split.target.obs["slide"] = ["alone"] + ["rest"] * 699
    split = baselines.Split(split.target, split.reference, HELD_OUT, 0, "slide")
    for smooth, own in (
        (baselines.ridge_z_smooth, baselines.ridge_z),
        (baselines.spot_copy_smooth, baselines.spot_copy),
        (baselines.spot_copy_total_smooth, baselines.spot_copy_total),
    ):
        np.testing.assert_allclose(smooth(split)[0], own(split)[0], rtol=1e-5)

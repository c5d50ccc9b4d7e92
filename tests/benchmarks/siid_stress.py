"""SIID under platform factors, thinning and misalignment, on a real pair with known truth: accuracy and coverage, phi integrated or fixed to 1.

    python tests/benchmarks/siid_stress.py DIR > table.md
    # DIR: folder with xenium_like_panel.h5ad, visium_like_spots.h5ad, heldout_truth_cells.h5ad

Perturbations (seeded): every gene of the spots thinned by its own factor exp(sd * Normal) / exp(2 sd) (platform factor); cells and truth thinned
together, spots thinned alone (depth); spots moved along x without telling.
"""

import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from ppl_st import api, metrics

CONDITIONS = {
    "as it is": {},
    "spots shifted by 20 um": {"shift": 20.0},
    "cells x 0.5, spots x 0.3": {"cells": 0.5, "spots": 0.3},
    "platform sd 1, draw 0": {"platform_sd": 1.0},
    "platform sd 0.5, draw 0": {"platform_sd": 0.5},
    "platform sd 0.5, draw 1": {"platform_sd": 0.5, "seed": 1},
    "all three": {"platform_sd": 0.5, "cells": 0.5, "spots": 0.3, "shift": 20.0},
}


def thinned(table: ad.AnnData, share: np.ndarray, rng: np.random.Generator) -> ad.AnnData:
    """Counts kept molecule by molecule with probability ``share`` per gene [G]."""
    counts = sp.csr_matrix(table.X, copy=True)
    counts.data = rng.binomial(counts.data.astype(np.int64), share[counts.indices]).astype(np.float32)
    counts.eliminate_zeros()
    result = table.copy()
    result.X = counts
    return result


def perturb(
    panel: ad.AnnData,
    spots: ad.AnnData,
    truth: ad.AnnData,
    *,
    platform_sd: float = 0.0,
    cells: float = 1.0,
    spots_kept: float = 1.0,
    shift: float = 0.0,
    seed: int = 0,
) -> tuple[ad.AnnData, ad.AnnData, ad.AnnData]:
    """The perturbed pair and its truth."""
    rng = np.random.default_rng(seed)
    factor = np.clip(np.exp(platform_sd * rng.standard_normal(spots.n_vars) - 2 * platform_sd), 0, 1) * spots_kept
    panel = thinned(panel, np.full(panel.n_vars, cells), rng)
    truth = thinned(truth, np.full(truth.n_vars, cells), rng)
    spots = thinned(spots, factor, rng)
    spots.obsm["spatial"] = np.asarray(spots.obsm["spatial"]) + np.array([shift, 0.0])
    return panel, spots, truth


def main(folder: Path) -> None:
    """Print one row per condition and treatment of phi."""
    torch.set_num_threads(1)
    tables = [
        ad.read_h5ad(folder / f"{name}.h5ad")
        for name in ("xenium_like_panel", "visium_like_spots", "heldout_truth_cells")
    ]
    print(
        "| condition | phi | R2 | PCC | log score | coverage 90 | 5% to 95% of genes | deepest fifth of genes | genes in 80-97% | gain sd | cpu s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, wanted in CONDITIONS.items():
        settings = {("spots_kept" if key == "spots" else key): value for key, value in wanted.items()}
        panel, spots, truth = perturb(*tables, **settings)
        for platform in ("hierarchical", "none") if "platform_sd" in wanted else ("hierarchical",):
            began = time.process_time()
            run = api.fit("siid", target=panel, reference=spots, overrides=[f"platform={platform}"])
            result = run.predict(list(truth.var_names), draws=50, truth=truth)
            seconds = time.process_time() - began
            counts, scores = truth.X.toarray(), result.var
            low, high = np.quantile(scores.coverage_90, [0.05, 0.95])
            inside = ((scores.coverage_90 > 0.8) & (scores.coverage_90 < 0.97)).mean()
            deepest = scores.nlargest(len(scores) // 5, "mean_count").coverage_90
            gain = run.spec.hyper.gain_scale if platform == "hierarchical" else 0.0
            print(
                f"| {name} | {platform} "
                f"| {metrics.r2(counts, result.X).mean():.3f} | {metrics.pcc(counts, result.X).mean():.3f} "
                f"| {scores.log_score.mean():.4f} | {scores.coverage_90.mean():.3f} | {low:.3f} to {high:.3f} "
                f"| {deepest.mean():.3f} ({deepest.min():.3f} to {deepest.max():.3f}) | {inside:.2f} | {gain:.3f} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""SpaIM on many cells: seconds, cpu seconds and peak memory of `fit` and `predict`, and whether what is written is what the cells are alone.

python tests/benchmarks/spaim_million.py CELLS DIR DRAWS     (1000000 cells: 300 genes to fit, 100 more to predict, a reference of 3,000 cells)
"""

import os
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.spatial import cKDTree

import ppl_st

TYPES, GENES, PANEL, REFERENCE = 12, 400, 300, 3000
GAIN_SD, THETA = 0.4, 2.0
DEPTH, REFERENCE_DEPTH = 200.0, 2000.0
PATCHES, MIXED = 60, 0.4  # a share of the cells is of any type
CHECKED, BLOCK = 500, 50_000


def simulate(n: int, folder: Path) -> None:
    """Patches of cell types on one platform and their cells on another."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.3, 1, (TYPES, GENES)) + 0.01
    profiles /= profiles.sum(1, keepdims=True)
    gained = profiles * np.exp(rng.normal(0, GAIN_SD, GENES))
    gained /= gained.sum(1, keepdims=True)
    names = pd.Index([f"g{g:03d}" for g in range(GENES)])
    place, centers = rng.uniform(0, 10_000, (n, 2)), rng.uniform(0, 10_000, (PATCHES, 2))
    kinds = rng.integers(0, TYPES, PATCHES)[cKDTree(centers).query(place)[1]]
    mixed = rng.random(n) < MIXED
    kinds[mixed] = rng.integers(0, TYPES, mixed.sum())

    def counts(rate: NDArray[np.float64], depth: float) -> sp.csr_matrix:
        rate = rate * rng.gamma(4, depth / 4, (len(rate), 1)) * rng.gamma(THETA, 1 / THETA, rate.shape)
        return sp.csr_matrix(rng.poisson(rate).astype(np.float32))

    blocks = [counts(gained[kinds[i : i + BLOCK], :PANEL], DEPTH) for i in range(0, n, BLOCK)]
    target = ad.AnnData(sp.vstack(blocks, format="csr"), pd.DataFrame(index=[f"c{i}" for i in range(n)]), pd.DataFrame(index=names[:PANEL]))
    target.obsm["spatial"] = place
    target.write_h5ad(folder / "target.h5ad")
    cells = counts(profiles[rng.integers(0, TYPES, REFERENCE)], REFERENCE_DEPTH)
    ad.AnnData(cells, pd.DataFrame(index=[f"r{i}" for i in range(REFERENCE)]), pd.DataFrame(index=names)).write_h5ad(folder / "reference.h5ad")


def measured(name: str, *command: str) -> None:
    """Run a process of its own and say what it took; a process counts the memory of the one that starts it, which stays small."""
    began = time.monotonic()
    _, status, used = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *command]), 0)
    if status:
        raise SystemExit(f"{name} failed")
    print(f"{name}: {time.monotonic() - began:.0f} s, cpu {used.ru_utime + used.ru_stime:.0f} s, peak {used.ru_maxrss / 1e6:.2f} GB", flush=True)


def check(folder: Path) -> None:
    """The largest difference of some cells' rate_mean from the same cells, with their neighbors, alone."""
    run = ppl_st.load(folder / "run")
    rows = np.sort(np.random.default_rng(1).permutation(run.data.counts.shape[0])[:CHECKED])
    predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
    batch, genes = predictor.at(rows), torch.arange(PANEL, GENES)
    with torch.no_grad():
        alone = predictor.closed_form(batch, 0, predictor.local(batch, 0), genes, None)[0].numpy()
    with xr.open_zarr(folder / "imputed.zarr", group="layers", consolidated=False) as layers:
        written = layers["rate_mean"].isel(cell=rows).values
    print(f"{len(rows)} cells: largest difference {np.abs(written - alone).max():.2g}, relative {np.abs(written / alone - 1).max():.2g}")


def main() -> None:
    n, folder, draws = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if len(sys.argv) > 4:
        simulate(n, folder) if sys.argv[4] == "simulate" else check(folder)
        return
    folder.mkdir(parents=True)
    at = {name: str(folder / name) for name in ("target.h5ad", "reference.h5ad", "run", "imputed.zarr")}
    cli = ("-m", "ppl_st.cli")
    measured("simulate", *sys.argv, "simulate")
    measured("fit", *cli, "fit", "spaim", "--target", at["target.h5ad"], "--reference", at["reference.h5ad"], "--out", at["run"], "--quiet")
    measured("predict", *cli, "predict", at["run"], "--out", at["imputed.zarr"], "--draws", draws, "--quiet")
    measured("check", *sys.argv, "check")


if __name__ == "__main__":
    main()

"""SpaGene's published protocol: shared genes in alphabetical order, fold = index mod 5, and the paper's own scores of its own scale.

OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/spagene_published.py run PRESET DIR [SETTING=VALUE ...]     (one file per fold)
python tests/benchmarks/spagene_published.py show DIR

Cells are those with a count in every fold's training genes. Truth: square root of counts clipped at mean + 2 sd of the gene's positive ones. Networks
predict as published, D_reference(T(E(x))), from one training per fold (the reference's autoencoder sees the same cells and genes in every fold and is
trained once); no inner genes, no count layer, no draws. ``default`` predicts the square root of its mean counts.
"""

import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.data import Counts, read_counts
from ppl_st.evaluate import _adata
from ppl_st.metrics import pcc, rmse_z, scc, ssim_li, ssim_spagene
from ppl_st.models import spagene
from ppl_st.models.common.inner import default_hyper
from ppl_st.models.spagene.autoencoder import Autoencoder, clip_limits, train
from ppl_st.models.spagene.model import PRESETS, Config, Spec, build, model_of
from ppl_st.prepare.spagene import problem
from realdata import path

FOLDS, SEED = 5, 0
SCORES = {"pcc": pcc, "scc": scc, "rmse_z": rmse_z, "ssim_spagene": ssim_spagene, "ssim_li": ssim_li}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def folds() -> tuple[Counts, Counts, list[NDArray[np.str_]]]:
    """Target, reference and the genes of every fold."""
    cells = ad.read_h5ad(path("osmfish_cortex/spatial.h5ad"))
    target = read_counts(cells[~cells.obs["duplicate_row"].astype(bool)].copy(), role="target")
    reference = read_counts(path("osmfish_cortex/scrna.h5ad"), role="reference", need_spatial=False)
    shared = np.sort(np.intersect1d(target.genes, reference.genes))
    parts = [shared[k::FOLDS] for k in range(FOLDS)]
    keep = np.all([target.take_genes(np.setdiff1d(target.genes, part)).totals > 0 for part in parts], axis=0)
    return target.take_rows(keep), reference, parts


def by_networks(config: Config, seen: Counts, reference: Counts, genes: NDArray[np.str_], known: list[Autoencoder]) -> NDArray[np.float64]:
    """Predicted genes [n, genes] on the reference's scale; ``known`` has the reference's autoencoder once it is trained."""
    data, _, other = problem(seen, reference, config, say)
    target = train(data, config.shape(0), config.stage1, config.batch_cells, SEED, "side 0")
    if not known:
        known.append(train(data.turned(), config.shape(1), config.stage1, config.batch_cells, SEED, "side 1"))
    hypers = (default_hyper(data, config), default_hyper(data.turned(), config))
    spec = Spec((1.0, 1.0), ([], []), hypers, config.fit.steps, (target.latent, known[0].latent), [])
    torch.manual_seed(SEED)
    pair = build(config, spec, data, (target, known[0]))
    spagene._train(pair, data, config, SEED, config.fit)
    model = model_of(pair)
    with torch.no_grad():
        decoded = model.decode(1, model.way(0).translate(model.codes(0, torch.arange(len(seen.names)))[0]))
    return decoded[:, pd.Index(other.genes).get_indexer(pd.Index(genes))].numpy().astype(np.float64)


def run(preset: str, folder: Path, overrides: list[str]) -> None:
    """Every fold that ``folder`` lacks."""
    config = with_overrides(PRESETS[preset], overrides)
    target, reference, parts = folds()
    known: list[Autoencoder] = []
    folder.mkdir(parents=True, exist_ok=True)
    for k, genes in enumerate(parts):
        file = folder / f"{preset}_{k}.csv"
        if file.exists():
            continue
        began = time.process_time()
        seen = target.take_genes(np.setdiff1d(target.genes, genes))
        if config.translator == "network":
            guess = by_networks(config, seen, reference, genes, known)
        else:
            fitted = ppl_st.fit("spagene", target=_adata(seen), reference=_adata(reference), preset=preset, overrides=overrides, seed=SEED)
            guess = np.sqrt(np.asarray(fitted.predict(genes=list(genes), draws=100).X, dtype=np.float64))
        counts = target.take_genes(genes).matrix
        truth = np.sqrt(np.minimum(counts.toarray(), clip_limits(counts)))
        table = pd.DataFrame({name: score(truth, guess) for name, score in SCORES.items()}, index=pd.Index(genes, name="gene"))
        table.assign(fold=k, cpu_s=round(time.process_time() - began)).to_csv(file)
        say(f"{preset}, fold {k}: PCC {table['pcc'].mean():.3f}, SSIM {table['ssim_spagene'].mean():.3f}, {time.process_time() - began:.0f} cpu s")


def show(folder: Path) -> None:
    """Means over genes, and the standard error over genes of the PCC."""
    for preset in PRESETS:
        files = sorted(folder.glob(f"{preset}_?.csv"))
        if files:
            table = pd.concat([pd.read_csv(file) for file in files])
            cost = table.drop_duplicates("fold")["cpu_s"].mean()
            means = ", ".join(f"{name} {table[name].mean():.4f}" for name in SCORES)
            print(f"{preset}: {len(files)} folds, {len(table)} genes: {means}; PCC +- {table['pcc'].sem():.4f}; {cost:.0f} cpu s per fold")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "run":
        run(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    else:
        show(Path(sys.argv[2]))

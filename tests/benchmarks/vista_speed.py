"""Cells per cpu second in training: the preset "gimvi" beside scvi-tools' gimVI, one process, one thread, 128 + 128 cells per minibatch.

OMP_NUM_THREADS=1 python tests/benchmarks/vista_speed.py TARGET.h5ad REFERENCE.h5ad     (needs the extra `peers`)
"""

import sys
import time
import warnings

import anndata as ad
import numpy as np
import scvi

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.inference.svi import fit
from ppl_st.models.vista import PRESETS, adversary, batches, start
from ppl_st.prepare.vista import problem

EPOCHS, ROUNDS = 3, 3
TRAINED = 0.9  # share of the cells that scvi-tools trains on, its default (it fails without a validation set): only these are counted
warnings.filterwarnings("ignore")


def main() -> None:
    target, reference = (ad.read_h5ad(path) for path in sys.argv[1:3])
    shared = [gene for gene in target.var_names if gene in set(reference.var_names)]
    target, reference = target[:, shared].copy(), reference[np.asarray(reference.X.sum(1)).ravel() > 0].copy()
    target = target[np.asarray(target.X.sum(1)).ravel() > 0].copy()
    steps = EPOCHS * -(-max(target.n_obs, reference.n_obs) // 128)
    print(f"{target.n_obs} + {reference.n_obs} cells, {target.n_vars} and {reference.n_vars} genes, {steps} minibatches; ppl_st {ppl_st.__version__}")

    external = scvi.external.GIMVI
    for adata in (target, reference):
        adata.obs["one"] = "0"
        external.setup_anndata(adata, batch_key="one")
    counts = read_counts(target, role="target"), read_counts(reference, role="reference", need_spatial=False)

    def ours(graph: str) -> float:
        config = with_overrides(PRESETS["gimvi"], [f"fit.steps={steps}", f"graph={graph}"])
        data, _, _ = problem(*counts, config, lambda line: None)
        pair, _ = start(data, config, 0, lambda line: None)
        began = time.process_time()
        fit(pair, batches(data, config, 0), config.fit, adversary=adversary(pair, config), scale=1e-6)
        return time.process_time() - began

    def theirs() -> float:
        model = external(reference, target)
        began = time.process_time()
        model.train(max_epochs=EPOCHS, batch_size=128, train_size=TRAINED, accelerator="cpu", enable_progress_bar=False)
        return time.process_time() - began

    runs = {f"ours, graph={graph}": lambda graph=graph: ours(graph) for graph in sys.argv[3:] or ("none", "posterior")}
    runs[f"scvi-tools {scvi.__version__} gimVI"] = theirs
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):  # in turns, and the best of each counts: other jobs on the machine slow all of them, at different times
        for name, run in runs.items():
            seconds[name].append(run())
    for name, found in seconds.items():
        trained = steps if name.startswith("ours") else EPOCHS * -(-round(TRAINED * max(target.n_obs, reference.n_obs)) // 128)
        print(f"{name}: {256 * trained / min(found):.0f} cells per cpu second ({', '.join(f'{s:.1f}' for s in found)} s)", flush=True)


if __name__ == "__main__":
    main()

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

EPOCHS = 2
warnings.filterwarnings("ignore")


def main() -> None:
    target, reference = (ad.read_h5ad(path) for path in sys.argv[1:3])
    shared = [gene for gene in target.var_names if gene in set(reference.var_names)]
    target, reference = target[:, shared].copy(), reference[np.asarray(reference.X.sum(1)).ravel() > 0].copy()
    target = target[np.asarray(target.X.sum(1)).ravel() > 0].copy()
    steps = EPOCHS * -(-max(target.n_obs, reference.n_obs) // 128)
    print(f"{target.n_obs} + {reference.n_obs} cells, {target.n_vars} and {reference.n_vars} genes, {steps} minibatches; ppl_st {ppl_st.__version__}")

    for graph in sys.argv[3:] or ("none", "posterior"):
        config = with_overrides(PRESETS["gimvi"], [f"fit.steps={steps}", f"graph={graph}"])
        counts = read_counts(target, role="target"), read_counts(reference, role="reference", need_spatial=False)
        data, _, _ = problem(*counts, config, lambda line: None)
        pair, _ = start(data, config, 0, lambda line: None)
        began = time.process_time()
        fit(pair, batches(data, config, 0), config.fit, adversary=adversary(pair, config), scale=1e-6)
        seconds = time.process_time() - began
        print(f"ours, graph={graph}: {256 * steps / seconds:.0f} cells per cpu second ({seconds:.1f} s)", flush=True)

    external = scvi.external.GIMVI
    for adata in (target, reference):
        adata.obs["one"] = "0"
        external.setup_anndata(adata, batch_key="one")
    model = external(reference, target)
    began = time.process_time()
    model.train(max_epochs=EPOCHS, batch_size=128, accelerator="cpu", enable_progress_bar=False)
    seconds = time.process_time() - began
    print(f"scvi-tools {scvi.__version__} gimVI: {256 * steps / seconds:.0f} cells per cpu second ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    main()

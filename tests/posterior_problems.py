"""A small run of SIID in a folder, for the tests of what a run gives and of its exports."""

import ppl_st.api as api
from ppl_st.simulate import checkerboard

FAST = ["factors=4", "chains=2", "sparsity=0.0", "sweeps=4", "fit.steps=4"]


def small_sim():
    return checkerboard(seed=2, n_cells=250, side=6, squares=6, n_types=4, n_genes=40, n_panel=30, contrast=1.0)


def small_run(sim, tmp_path_factory):
    target = sim.target.copy()
    target.obs["batch"] = "A"
    return api.fit("siid", target=target, reference=sim.reference, overrides=FAST, seed=3, out=tmp_path_factory.mktemp("post") / "run")

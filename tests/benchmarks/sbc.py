"""Simulation-based calibration of every method: table and figure of BENCHMARKS.md.

    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/sbc.py run METHOD DIR      # siid, vista, spaim, spagene, xfuse, ..._genes
    OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/sbc.py show DIR            # prints the table, writes DIR/sbc_ranks.png
"""

import sys
import time
from pathlib import Path

import numpy as np
import sbc_methods
import torch

from ppl_st.calibration_plots import rank_plot
from ppl_st.testing.simulation import Ranks, uniformity

torch.set_num_threads(1)


def run(method, folder):
    """Write METHOD.npz."""
    began = time.process_time()
    found = sbc_methods.METHODS[method]()
    stored = {f"{name}|{field}": value for name, ranks in found.items() for field, value in ranks._asdict().items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    np.savez(Path(folder) / f"{method}.npz", **stored)
    print(f"{method}: {time.process_time() - began:.0f} cpu s", flush=True)


def show(folder):
    """The table and the figure."""
    shown = {}
    for method in sbc_methods.METHODS:
        path = Path(folder) / f"{method}.npz"
        if not path.exists():
            continue
        stored = np.load(path)
        for name in dict.fromkeys(key.split("|")[0] for key in stored.files):
            ranks = Ranks(stored[f"{name}|ranks"], stored[f"{name}|z"], int(stored[f"{name}|draws"]))
            n, quantities = ranks.ranks.shape
            p, spread = uniformity(ranks, bins=10 if n >= 100 else 4), np.median(ranks.spread())
            print(f"| {name} | {n} x {quantities} | {p:.1g} | {spread:.2f} | {ranks.z.mean():+.2f} |")
            shown[name] = ranks.ranks
    figure = rank_plot(shown, 99)
    figure.savefig(Path(folder) / "sbc_ranks.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3])
    else:
        show(sys.argv[2])

"""Lengths of XFuse's spatial kernel, in closed form: its columns at hidden spots, beside a Gaussian process per gene. Numbers in RECORD.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/xfuse_lengths.py SEEDS A.h5ad A.jpg [B.h5ad B.jpg ...]      # files of one pair, several pairs with "--"

For each seed (0 to SEEDS - 1) half of the spots of each section are hidden, as by `evaluate --holdout-spots .5`. Root depth and the scores of the
Pearson residuals are regressed on space and image (`warm_start.Smoother`, lengths of `learn_kernel`) and put together to counts at the hidden
spots; no factorisation, no pixels. Printed: median Pearson over the 100 genes with the largest totals by section; and less that of the GP on space
and image features, its mean and standard error over sections and seeds, and how often it is above.
"""

import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from ppl_st.evaluate_images import hidden_rows, score_baselines
from ppl_st.metrics import pcc
from ppl_st.models.xfuse import PRESETS, _tissues, warm_start
from ppl_st.prepare.xfuse import problem
from ppl_st.slides import read_slides

GENES, THETA = 100, warm_start.THETA
VARIANTS = {  # lengths of the kernel in space over the learned one, theta of the residuals
    "one length, theta 10": ((1.0,), 10.0),
    "one length": ((1.0,), THETA),
    "1 and 2": ((1.0, 2.0), THETA),
    "1 and 2.5": ((1.0, 2.5), THETA),
    "1 and 3": ((1.0, 3.0), THETA),
    ".7 and 2": ((0.7, 2.0), THETA),
}


def rows(spots, index):
    """Some of the spots."""
    return warm_start.Spots._make(part[index] for part in spots)


def far(spots):
    """Positions in pitches, sections far apart."""
    return np.column_stack([spots.xy / spots.pitch[:, None], 1e3 * spots.section])


def counts_at(asked, seen, lengths, kernel, genes):
    """Expected counts [m, genes] at the spots ``asked``."""
    depth, mean = warm_start._depth(seen)[1:]
    left, values, right = warm_start._components(warm_start.residuals(seen), warm_start.COMPONENTS)
    columns = np.column_stack([np.sqrt(depth), left * values])
    center = np.stack([columns[seen.section == n].mean(0) for n in range(seen.section.max() + 1)])

    def grams(spots):
        apart = cdist(far(spots), far(seen), "sqeuclidean")
        space = sum(np.exp(-apart / 2 / (kernel.length_space * length) ** 2) for length in lengths) / len(lengths)
        return space, np.exp(-cdist(spots.features, seen.features, "sqeuclidean") / 2 / kernel.length_image**2)

    roots = [np.linalg.cholesky(gram + 1e-9 * np.eye(len(gram))) for gram in grams(seen)]  # of trace n already
    found = warm_start.Smoother(*roots)(columns - center[seen.section])
    smooth = sum(gram @ dual for gram, dual in zip(grams(asked), found.dual, strict=True)) + center[asked.section]
    root = np.maximum(smooth[:, 0], warm_start.LEAST_ROOT * center[asked.section, 0])
    rate = (root**2 + found.noise[0])[:, None] * mean
    return np.maximum(rate + (smooth[:, 1:] @ right) * np.sqrt(rate + rate**2 / warm_start.THETA), 0.05 * rate)[:, genes]


def look(files, seed):
    """Section, variant, median Pearson."""
    config = PRESETS["default"]
    data, kept = problem(read_slides(files[::2], files[1::2], layer=None, gene_key=None), config.input, lambda line: None, Path())
    hidden = hidden_rows(data, kept, 0.5, (), seed)
    genes = np.sort(np.argsort(-np.sum([np.asarray(one.matrix.sum(0)).ravel() for one in kept], 0), kind="stable")[:GENES])
    spots = warm_start.gather(data, _tissues(data))
    out = np.zeros(len(spots.section), bool)
    for n, some in enumerate(hidden):
        out |= (spots.section == n) & np.isin(spots.row, some)
    seen, asked = warm_start.without_failed(rows(spots, ~out), lambda line: None), rows(spots, out)
    table = pd.concat(score_baselines(data, kept, hidden, genes))
    found = [(name, "GP", table[(table.fold == name) & (table.method == "gp_space_image")].raw_pcc.median()) for name in table.fold.unique()]
    truth = asked.counts[:, genes].toarray()
    for variant, (lengths, theta) in VARIANTS.items():
        warm_start.THETA = theta
        kernel = warm_start.learn_kernel(seen, np.random.default_rng([seed, 21]))
        expected = counts_at(asked, seen, lengths, kernel, genes)
        for n, section in enumerate(data.sections):
            mine = asked.section == n
            found.append((section.name, variant, np.median(pcc(truth[mine], expected[mine]))))
    return [(seed, *one) for one in found]


if __name__ == "__main__":
    pairs = [list(files) for split, files in groupby(sys.argv[2:], lambda one: one == "--") if not split]
    results = [one for files in pairs for seed in range(int(sys.argv[1])) for one in look(files, seed)]
    table = pd.DataFrame(results, columns=["seed", "section", "variant", "pcc"])
    table = table.pivot_table(index=["section", "seed"], columns="variant", values="pcc")
    print(table.groupby("section").mean().round(4).to_string())
    gain = table.sub(table["GP"], axis=0).drop(columns="GP")
    print(pd.DataFrame({"minus GP": gain.mean(), "se": gain.std() / np.sqrt(len(gain)), "above": (gain > 0).mean()}).round(4).to_string())

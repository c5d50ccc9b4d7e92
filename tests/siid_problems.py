"""Small problems of SIID, their pairs and the settings of a short fit, for the tests of SIID."""

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from pyro import poutine

from ppl_st.models import siid
from ppl_st.models.siid import hyper as siid_hyper
from ppl_st.models.siid import warm_start
from ppl_st.models.siid.batches import Data
from ppl_st.models.siid.model import Config, Spec, build

FAST = [
    "factors=4",
    "chains=2",
    "sparsity=0.0",
    "sweeps=6",
    "batch_spots=9",
    "fit.steps=10",
    "fit.checkpoint_every=4",
]
KNOBS = {"n_cells": 300, "side": 6, "squares": 6, "n_types": 4, "n_genes": 40, "n_panel": 30, "contrast": 1.0}


def tiny(seed=0, n=24, s=7, genes=12, panel=7, depth=2.0, soft=True):
    """A random problem: cells in one spot, in two (soft map), in none; the last spot has no cell."""
    rng = np.random.default_rng(seed)
    kernel = np.zeros((n, s))
    for i in range(n):
        if i % 5 == 4:
            continue
        own = rng.choice(s - 1, 2 if soft and i % 3 == 0 else 1, replace=False)
        kernel[i, own] = rng.dirichlet(np.ones(len(own))) * rng.uniform(0.5, 1)
    mean = rng.gamma(0.5, depth, (n, genes))
    counts, spots = rng.poisson(mean), rng.poisson(3 * kernel.T @ mean)
    spots[-1] = 2
    where = np.sort(rng.permutation(genes)[:panel])
    xy = rng.uniform(0, 3, (n, 2))
    return Data(
        sp.csr_matrix(counts[:, where], dtype=np.float32), sp.csr_matrix(spots, dtype=np.float32),
        sp.csr_matrix(kernel, dtype=np.float32), where, xy, rng.uniform(0, 3, (s, 2)),
    )  # fmt: skip


def em_problem():
    return tiny(3, n=60, s=9, genes=20, panel=12, depth=3.0)


def spec_of(data, config, factors=3):
    hyper = siid_hyper.default_hyper(data, replace(config, factors=factors))
    return Spec(data.counts.shape[0], factors, [int(g) for g in data.panel], data.spot_counts.shape[1], hyper)


def traces(pair, batch):
    guide = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(batch)
    return model, guide


def default_pair(data, seed=0, **settings):
    config = Config(**{"factors": 3, "sweeps": 5, "sparsity": 0.0, **settings})
    pair = build(config, spec_of(data, config), data)
    start, _, _ = warm_start.run_em(data, config, 3, 0.0, seed, 20)
    siid.model.initialise(pair, start)
    return pair, config

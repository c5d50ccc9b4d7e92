"""A small world of SpaGene, its problems and pairs that have learned nothing of counts, for the tests of SpaGene."""

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch

from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.models import spagene
from ppl_st.models.common.inner import default_hyper
from ppl_st.models.spagene.autoencoder import train
from ppl_st.models.spagene.data import make
from ppl_st.models.spagene.model import PRESETS, build
from ppl_st.prepare.spagene import problem
from ppl_st.simulate import spatial_field

SMALL = [
    "latent=[6, 5]", "hidden=[12]", "translator_hidden=[8]", "backward_hidden=[7]", "critic_hidden=[8]", "stage1.steps=5", "fit.steps=4",
    "batch_cells=64", "batch_reference=48",
]  # fmt: skip


def small_world():
    return spatial_field(seed=1, n_cells=300, n_reference=220, n_genes=40, n_panel=24, n_types=4, rho=3.0)


def quiet(line):
    pass


def settings(preset, *overrides):
    return with_overrides(PRESETS[preset], [*SMALL, *overrides])


def pose(world, config=PRESETS["default"]):
    return problem(
        read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False), config, quiet
    )[0]


def some_shared(world):
    """The target with genes of its own beside the shared ones: the reference lacks every sixth gene of the panel."""
    kept = [g for i, g in enumerate(world.reference.var_names) if i >= 24 or i % 6]
    return pose(replace(world, reference=world.reference[:, kept].copy()))


def untrained(config, data, seed=0, **known):
    """A pair with stage 1 done and nothing learned about counts but what is ``known`` of the forward hyper-priors."""
    problems = (data, data.turned())
    sides = tuple(train(problems[k], config.shape(k), config.stage1, config.batch_cells, seed, f"{k}") for k in range(2))
    hypers = tuple(default_hyper(one, config) for one in problems)
    hypers = (hypers[0]._replace(**known), hypers[1])
    spec = spagene.Spec((1.0, 1.0), ([], []), hypers, config.fit.steps, (sides[0].latent, sides[1].latent), [])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config, spec, data, sides)


THETA = 1.0  # of the target's platform in `two_platforms`


def two_platforms(seed=0, n=400, m=300, genes=40):
    """Cells of four types, which are as frequent in the reference as rare in the target; all genes on both platforms.

    Returns
    -------
    Data, NDArray [m, genes]
        The problem, and the counts that the target's platform would show of the reference's cells at its median depth.
    """
    rng = np.random.default_rng(seed)
    centers, loadings = 1.2 * rng.standard_normal((4, 4)), 0.5 * rng.standard_normal((4, genes))
    base, gain = rng.gamma(2.0, 1.0, genes), np.exp(0.3 * rng.standard_normal(genes))

    def profiles(cells, share):
        kind = rng.choice(4, cells, p=share)
        rates = base * np.exp((centers[kind] + 0.5 * rng.standard_normal((cells, 4))) @ loadings)
        return rates / rates.sum(1, keepdims=True)

    def counted(mean, theta):
        return sp.csr_matrix(rng.poisson(mean * rng.gamma(theta, 1 / theta, mean.shape)).astype(np.float32))

    here, there = profiles(n, [0.1, 0.2, 0.3, 0.4]), profiles(m, [0.4, 0.3, 0.2, 0.1])
    depth = 120 * np.exp(0.3 * rng.standard_normal(n))
    counts, reference = counted(depth[:, None] * here * gain, THETA), counted(1000 * there, 4.0)
    hidden = counted(np.median(np.asarray(counts.sum(1))) * there * gain / (here @ gain).mean(), THETA)
    every = np.arange(genes)
    return make(counts, every, every, reference, None, np.ones(n)), hidden

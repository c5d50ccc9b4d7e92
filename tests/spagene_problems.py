"""A small world of SpaGene, its problems and pairs that have learned nothing of counts, for the tests of SpaGene."""

from dataclasses import replace

import torch

from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.models import spagene
from ppl_st.models.common.inner import default_hyper
from ppl_st.models.spagene.autoencoder import train
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


def untrained(config, data, seed=0):
    """A pair with stage 1 done and nothing learned about counts."""
    problems = (data, data.turned())
    sides = tuple(train(problems[k], config.shape(k), config.stage1, config.batch_cells, seed, f"{k}") for k in range(2))
    hypers = tuple(default_hyper(one, config) for one in problems)
    spec = spagene.Spec((1.0, 1.0), ([], []), hypers, config.fit.steps, (sides[0].latent, sides[1].latent), [])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(config, spec, data, sides)

"""A small world of SpaIM and its problem, for the tests of SpaIM."""

from dataclasses import replace

from ppl_st.data import read_counts
from ppl_st.models.spaim import Config
from ppl_st.prepare.spaim import problem
from ppl_st.simulate import spatial_field

SMALL = replace(Config(), clusters=8)


def small_world():
    return spatial_field(seed=3, n_cells=500, n_reference=400, n_genes=60, n_panel=36, platform_sd=0.5)


def pose(world, config=SMALL):
    target = read_counts(world.target, role="target")
    return problem(target, read_counts(world.reference, role="reference", need_spatial=False), config, lambda line: None)


def data_of(world):
    return pose(world)[0]

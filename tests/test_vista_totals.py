"""Levels of VISTA's genes where the depth of a cell counts genes that only the target has, where cells are many, and where attention was trained."""

import numpy as np
import torch

import ppl_st
from ppl_st.inference.ensemble import chains_of
from ppl_st.models import vista
from ppl_st.models.vista.model import sides
from ppl_st.simulate import spatial_field
from test_vista_inner import levels_off

FAST = ["penalty=3", "reweight=false", "process=0", "batch_cells=64", "neighbors=6"]


def off_by(panel, *overrides):
    """Log of predicted over true totals of all unmeasured genes, where the target has ``panel`` shared genes and 60 of its own; platforms agree."""
    world = spatial_field(seed=2, n_cells=200, n_reference=300, n_genes=panel + 100, n_panel=panel + 60, n_types=3, rho=4.0, platform_sd=0.0)
    reference = world.reference[:, [*world.target.var_names[:panel], *world.truth.var_names]].copy()
    run = ppl_st.fit("vista", target=world.target, reference=reference, overrides=[*FAST, "fit.steps=4", "graph=none", *overrides])
    mean, gain = run.predict(list(world.truth.var_names), draws=2).layers["rate_mean"], run.spec.hyper.gain[2]
    return np.log(mean.sum() / world.truth.X.sum()) - (0.5 * gain**2 if run.config.platform == "hierarchical" else 0.0)  # the mean of what is unsure


def test_levels_know_the_share_of_the_panel_in_the_depth_where_no_gain_was_learned():
    """Levels are shares of the panel, depth is the total of all genes of the target: rates were its multiple over the panel's total."""
    assert abs(off_by(8)) < 0.5
    assert abs(off_by(11, "platform=none")) < 0.2


def test_levels_of_faint_genes_of_many_cells_are_those_of_all_cells(monkeypatch):
    monkeypatch.setattr(vista, "LEVEL_CELLS", 100)
    world = spatial_field(seed=2, n_cells=2000, n_reference=300, n_genes=30, n_panel=11, n_types=3, rho=0.3, spatial=0.3, contrast=0.3)
    world.target.X = np.random.default_rng(0).binomial(world.target.X.toarray().astype(int), [[1.0, 0.02] + 3 * [1.0, 0.1, 0.1]]).astype(np.float32)
    counts = world.target.X.sum(0)
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=[*FAST, "fit.steps=4", "graph=none"])
    mean = run.predict(list(world.target.var_names), draws=2).layers["rate_mean"].sum(0)
    assert (counts < 200).sum() > 2 and np.abs(np.log(mean / counts))[counts > 20].max() < 0.4, (counts, mean)


def test_levels_are_those_of_the_attention_that_was_trained():
    """Attention changes how much states vary; the table of levels was that of the start unless the spreads were trained, too."""
    world = spatial_field(seed=2, n_cells=250, n_reference=200, n_genes=30, n_panel=11, n_types=5, platform_sd=0.0, spatial=0.9, contrast=1.0)
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=[*FAST, "graph=posterior", "fit.steps=2"], seed=0)
    _, guide = sides(chains_of(run.pair)[0])
    with torch.no_grad():
        guide.gate.fill_(float(np.arctanh(0.7)))
        for value in guide.attention.parameters():
            value *= 2
    vista.select(run.pair, run.data, run.config, 0)
    for slope in (0.3, 1.0, 1.5):
        off = levels_off(run, slope)
        assert np.abs(off).max() < 0.2 and abs(off.mean()) < 0.05, (slope, off)

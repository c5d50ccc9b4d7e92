"""Spatial cells in the reference's style: what a condition of the reference does to a kind of cell, it does to the spatial cells of that kind."""

import json
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ppl_st
from ppl_st.cli import app
from ppl_st.errors import UserError
from ppl_st.simulate import spatial_field

HERE, EVERYWHERE = 4.0, 3.0
FAST = ["chains=1", "penalty=3", "reweight=false", "process=0", "fit.steps=4", "batch_cells=64", "neighbors=6"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A reference of two conditions: an unmeasured gene rises in one kind of ill cells, another in all of them."""
    made = spatial_field(seed=3, n_cells=300, n_reference=800, n_genes=36, n_panel=20, n_types=3, rho=6.0, spatial=0.3, contrast=1.0)
    reference = made.reference.copy()
    genes = list(made.truth.var_names[np.argsort(-np.asarray(made.truth.X.mean(0)).ravel())[:3]])
    counts, ill = np.asarray(reference[:, genes].X.todense()), np.arange(800) % 2 == 0
    kind = "type1"
    counts[ill & (reference.obs["type"] == kind).to_numpy(), 0] *= HERE
    counts[ill, 1] *= EVERYWHERE
    dense = reference.X.toarray()
    dense[:, reference.var_names.get_indexer(genes)] = counts
    reference.X, reference.obs["state"] = dense, np.where(ill, "ill", "well")
    made.target.obs["state"] = "well"
    settings = ["penalty=3", "reweight=false", "process=0", "fit.steps=60", "neighbors=6", "batch_key=state"]
    run = ppl_st.fit("vista", target=made.target, reference=reference, overrides=settings, out=tmp_path_factory.mktemp("style") / "run")
    return SimpleNamespace(target=made.target, run=run, genes=genes, of_kind=(made.target.obs["type"] == kind).to_numpy())


def test_a_condition_changes_the_genes_and_the_cells_that_it_changes_in_the_reference(world):
    ill, well = (np.log(world.run.as_reference(state).predict(world.genes, draws=20).X) for state in ("ill", "well"))
    change, kind = ill - well, world.of_kind
    assert 0.5 < change[kind, 0].mean() < np.log(HERE) + 0.2 and abs(change[~kind, 0].mean()) < 0.2, change[:, 0]  # shrunk: few cells of a kind
    np.testing.assert_allclose(change[:, 1].mean(), np.log(EVERYWHERE), atol=0.25)
    assert np.abs(change[:, 2]).mean() < 0.15


def test_what_is_not_known_of_a_change_everywhere_is_the_same_at_all_places(world):
    """It was drawn anew at each place: of the mean over cells of several kinds the doubt was that over the root of the places."""
    style = world.run.as_reference("ill")
    predictor = style.module.Predictor(style.pair, style.data, style.config, style.spec)
    effect, genes, batch = predictor.effects[0], torch.arange(36), predictor.at(np.arange(0, 300, 3))
    local = predictor.local(batch, 0)
    local = local._replace(scale=torch.zeros_like(local.scale))
    with torch.no_grad():
        rates = [predictor.count_dist(batch, 0, {"gene_key": torch.tensor(key)}, local, genes).mean.log().mean(0) for key in range(300)]
    share = effect.shares(local.loc).mean(0)
    wanted = (effect.everywhere.square() + share.square() @ effect.sd.square()).sqrt()
    np.testing.assert_allclose(torch.stack(rates).std(0), wanted, rtol=0.2)
    assert len(share) > 3 and (effect.everywhere > 0).all()


def test_it_is_a_prediction_of_these_cells_and_of_new_ones_that_says_what_it_is(world, tmp_path):
    style = world.run.as_reference("ill", library=500.0)
    table = style.predict(world.genes, draws=5)
    about = json.loads(table.uns["ppl_st"])
    assert about["as_reference"] == {"condition": "ill", "cells": 400, "library": 500.0} and about["draws"] == 5
    assert list(table.obs_names) == list(world.target.obs_names) and list(table.var_names) == world.genes
    np.testing.assert_array_equal(table.obsm["spatial"], world.target.obsm["spatial"])
    assert (table.layers["rate_sd"] > 0).all() and (table.layers["count_sd"] > table.layers["rate_sd"]).all()
    assert style.predict(world.run.genes, draws=5).layers["rate_mean"].sum(1).mean() == pytest.approx(500, rel=0.15)
    style.write(tmp_path / "a.h5ad", world.genes, draws=5)
    np.testing.assert_allclose(ad.read_h5ad(tmp_path / "a.h5ad").layers["rate_mean"], table.layers["rate_mean"])
    some = style.predict(world.genes, target=world.target[:50].copy(), draws=5)
    assert some.shape == (50, 3) and np.isfinite(some.X).all()


def test_what_it_cannot_give_is_refused_by_name(world):
    with pytest.raises(UserError, match=r"no cell has 'sick' in obs column 'state'; it has ill, well"):
        world.run.as_reference("sick")
    with pytest.raises(UserError, match="positive total"):
        world.run.as_reference(library=0.0)
    with pytest.raises(UserError, match="export the run itself"):
        world.run.as_reference().arviz_groups()
    with pytest.raises(UserError, match="cannot be fitted again"):
        ppl_st.recalibrate(world.run.as_reference())
    with pytest.raises(UserError, match="does not decode"):
        world.run.as_reference().as_reference()


def test_the_command_line_asks_for_a_condition_by_its_value(world, tmp_path):
    (tmp_path / "genes.txt").write_text("\n".join(world.genes))

    def predict(condition):
        asked = ["predict", world.run.folder, "--as-reference", condition, "--genes", tmp_path / "genes.txt", "--draws", 5]
        return CliRunner().invoke(app, [str(one) for one in [*asked, "--out", tmp_path / f"{condition}.h5ad"]], prog_name="ppl-st")

    for condition, style in (("ill", world.run.as_reference("ill")), ("all", world.run.as_reference())):
        assert predict(condition).exit_code == 0
        found = ad.read_h5ad(tmp_path / f"{condition}.h5ad").layers["rate_mean"]
        np.testing.assert_allclose(found, style.predict(world.genes, draws=5).layers["rate_mean"], rtol=1e-4)
    refused = predict("sick")
    assert refused.exit_code == 2 and "it has ill, well" in refused.stderr


def test_a_cell_decoded_as_reference_has_the_reference_levels():
    world = spatial_field(seed=5, n_cells=400, n_reference=400, n_genes=40, n_panel=25, n_types=4, rho=4, platform_sd=1.5)
    run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=FAST)
    genes = list(run.genes)
    level = np.log(run.as_reference().predict(genes, draws=20).X.mean(0))
    reference = np.log(np.asarray(world.reference.X.mean(0)).ravel())
    assert np.abs(level - reference).mean() < 0.35 < 0.8 < np.abs(np.log(run.predict(genes, draws=5).X.mean(0)) - reference).mean()

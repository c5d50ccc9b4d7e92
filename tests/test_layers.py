"""Layers of a reference: imputed together, arranged for velocity tools, stored with the run, refused with a reason."""

import numpy as np
import pytest
from scipy import sparse

import ppl_st
from ppl_st.errors import UserError
from ppl_st.layers import as_layers
from ppl_st.simulate import spatial_field

LAYERS = ["spliced", "unspliced"]


def codes(adata):
    return adata.obs["type"].astype(str).str.removeprefix("type").astype(int).to_numpy()


def average_share(made):
    spliced, unspliced = (np.asarray(made.reference.layers[name].sum(0)).ravel() for name in LAYERS)
    return unspliced / (spliced + unspliced)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


@pytest.fixture(scope="module")
def world():
    """A reference whose counts split into layers: a gene's unspliced share depends on gene and cell type."""
    made = spatial_field(seed=0, n_cells=400, n_reference=500, n_genes=60, n_panel=40, n_types=4, contrast=1.0, rho=5)
    rng = np.random.default_rng(0)
    counts = made.reference.X.toarray().astype(np.int64)
    share = rng.beta(2, 2, (4, 60))
    young = rng.binomial(counts, share[codes(made.reference)])
    made.reference.layers["unspliced"] = sparse.csr_matrix(young.astype(np.float32))
    made.reference.layers["spliced"] = sparse.csr_matrix((counts - young).astype(np.float32))
    return made, share


def test_the_share_of_a_layer_is_found_in_cells_that_measured_neither(world, tmp_path):
    made, share = world
    settings = ["penalty=3", "reweight=false", "process=0", "fit.steps=8", f"reference_layers={LAYERS}"]
    run = ppl_st.fit("vista", target=made.target, reference=made.reference, overrides=settings, out=tmp_path / "run")
    genes = [str(gene) for gene in made.reference.var_names]
    wanted = [f"{gene}:{layer}" for layer in LAYERS for gene in genes]
    table = as_layers(ppl_st.load(tmp_path / "run").predict(wanted, draws=20), LAYERS)
    assert list(table.var_names) == genes and table.shape == (400, 60) and "spatial" in table.obsm
    spliced, unspliced = (table.layers[layer] for layer in LAYERS)
    np.testing.assert_allclose(table.X, spliced + unspliced, rtol=1e-6)
    types = codes(made.target)
    found = np.stack([unspliced[types == k].sum(0) / (spliced + unspliced)[types == k].sum(0) for k in range(4)])
    average = np.broadcast_to(average_share(made), share.shape)  # what is known of a gene without knowing its cells
    assert correlation(share, found) > correlation(share, average) + 0.15
    assert correlation(share - share.mean(0), found - found.mean(0)) > 0.6
    assert run.genes.tolist() == genes + [f"{gene}:{layer}" for layer in LAYERS for gene in genes]


def test_refusals(world):
    made, _ = world
    with pytest.raises(UserError, match="no layer 'nascent'"):
        ppl_st.fit("vista", target=made.target, reference=made.reference, overrides=['reference_layers=["nascent"]', "fit.steps=2"])
    with pytest.raises(UserError, match="reference_layers names 'spliced' twice; name each layer once"):
        ppl_st.fit("vista", target=made.target, reference=made.reference, overrides=['reference_layers=["spliced", "spliced"]', "fit.steps=2"])
    run = ppl_st.fit("vista", target=made.target, reference=made.reference, overrides=["penalty=3", "reweight=false", "process=0", "fit.steps=2"])
    with pytest.raises(UserError, match="reference_layers"):
        as_layers(run.predict(list(made.reference.var_names[:3]), draws=4), LAYERS)

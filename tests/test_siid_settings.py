"""SIID's settings that name factors, starts of chains and seeds, and what is stored of a run that asks for odd things."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

import ppl_st.api as api
from ppl_st.config import merge
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.io import storable
from ppl_st.models import siid
from ppl_st.models.siid.warm_start import _like_profiles, log_share
from ppl_st.prepare import load_prepare
from ppl_st.simulate import checkerboard
from seeded import own_seed
from siid_problems import FAST, KNOBS, spec_of, tiny

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)


@pytest.fixture(scope="module")
def sim():
    return checkerboard(seed=1, **KNOBS)


def test_no_two_seeds_share_a_start(sim):
    """Chain 1 of seed 0 was chain 0 of seed 1, so what differs between seeds was understated."""
    at = []
    for seed in (0, 1):
        short = ["chains=2", "keep=all", "factors=3", "fit.steps=1"]
        run = api.fit("siid", target=sim.target, reference=sim.reference, preset="paper", overrides=short, seed=seed)
        at += [chain.guide.xi_loc.detach() for chain in chains_of(run.pair)]
    for one in range(4):
        for other in range(one):
            assert not torch.allclose(at[one], at[other], atol=0.1)


@pytest.mark.parametrize("what", ["label_key=kind", "profiles"])
def test_there_are_as_many_factors_as_are_named(sim, tmp_path, what):
    """Seven kinds: five factors, the first number tried, cannot carry them (a crash, or two labels on one factor)."""
    target = sim.target.copy()
    target.obs["kind"] = [f"kind {i % 7}" for i in range(target.n_obs)]
    target.write_h5ad(tmp_path / "atlas.h5ad")
    settings = [what, "label_weight=0.5"] if what != "profiles" else [f"profiles={tmp_path / 'atlas.h5ad'}", "profile_key=kind"]
    rest = ["chains=1", "sparsity=0.0", "sweeps=3", "fit.steps=1", *settings]
    run = api.fit("siid", target=target, reference=sim.reference, overrides=rest, seed=3)
    assert run.spec.factors >= 7 and min(entry["factors"] for entry in run.spec.hyper.candidates) == 7
    with pytest.raises(UserError, match=r"7 (labels|cell types), more than factors=5; raise factors"):
        api.fit("siid", target=target, reference=sim.reference, overrides=[*rest, "factors=5"], seed=3)


def test_labels_and_profiles_of_one_type_are_one_named_factor(sim, tmp_path):
    """Labels A, B, D beside an atlas of A, B, C, D: cells labelled D started on the factor with the profile of C; clusters on that of any type."""
    kind = np.array(list("ABCD"))[sim.truth.obsm["composition"].argmax(1)]
    target = sim.target.copy()
    target.obs["kind"] = kind
    target.write_h5ad(tmp_path / "atlas.h5ad")
    target.obs["kind"] = pd.Series(np.where((np.arange(300) % 3 == 0) & (kind != "C"), kind, None), target.obs_names)
    atlas = [*FAST, "chains=1", "fit.steps=1", f"profiles={tmp_path / 'atlas.h5ad'}", "profile_key=kind"]
    for more in (["label_key=kind", "label_weight=0.5"], []):
        lines, folder = [], tmp_path / "run" if more else None
        run = api.fit("siid", target=target, reference=sim.reference, overrides=[*atlas, *more], seed=3, say=lines.append, out=folder)
        assert run.data.names == ("A", "B", "C", "D")
        if more:
            known = run.data.labels >= 0
            assert (np.array(run.data.names)[run.data.labels[known]] == kind[known]).all() and known.sum() == (target.obs["kind"].notna()).sum()
            assert any("D 3" in line for line in lines if line.startswith("labels:"))
            run = api.load(folder)
        assert list(run.proportions(draws=1).var_names) == list("ABCD")
        assert (run.predict(run.genes[:1], draws=2).obs["factor"].astype(str) == kind).mean() > 0.9
    target.obs["kind"] = np.where(kind == "A", "T cell", "other")
    lines, config = [], siid.Config(profiles=str(tmp_path / "atlas.h5ad"), profile_key="kind", label_key="kind")
    counts = read_counts(target, role="target"), read_counts(sim.reference, role="reference")
    assert load_prepare("siid").problem(*counts, config, lines.append)[0].names == ("A", "B", "C", "D", "T cell", "other")
    assert any("spelled alike" in line for line in lines) and any("label_weight=0" in line for line in lines)


def test_a_gene_without_counts_says_nothing_of_which_profile_a_cluster_looks_like():
    """Its logarithm was minus infinity, and the fit ended in a traceback."""
    counts = np.repeat(np.array([[9, 1, 4, 0], [1, 9, 4, 0]]), 3, axis=0)
    data = tiny()._replace(counts=sp.csr_matrix(counts, dtype=np.float32), panel=np.arange(4))
    profiles = np.array([[0.1, 0.4, 0.3, 0.2], [0.4, 0.1, 0.3, 0.2]])
    np.testing.assert_array_equal(_like_profiles(data, profiles, np.arange(6) // 3, 3), [1, 0])


@pytest.mark.parametrize(
    "preset, settings, names",
    [
        ("paper", {"label_key": "kind", "label_weight": 0.5, "sparsity": 0.1}, ["label_key, label_weight, sparsity"]),
        ("default", {"entropy": "sum", "label_weight": 0.5}, ["entropy='sum'", "label_weight"]),
        ("paper", {}, []),
        ("default", {"label_key": "kind", "label_weight": 0.5, "sparsity": 0.1}, []),
    ],
)
def test_settings_without_effect_are_said(sim, preset, settings, names):
    """They were taken, stored with the run and not used."""
    target, lines = sim.target.copy(), []
    target.obs["kind"] = "a"
    config = merge(siid.PRESETS[preset], settings)
    data = load_prepare("siid").problem(read_counts(target, role="target"), read_counts(sim.reference, role="reference"), config, lines.append)[0]
    said = [line for line in lines if "without effect" in line]
    assert len(said) == len(names) and all(name in line for name, line in zip(names, said, strict=True))
    assert data.names == (("a",) if preset == "default" and "label_key" in settings else ())


def test_the_prior_of_the_profiles_does_not_depend_on_the_guide(sim):
    """posterior="delta" replaced the prior around the spots' mean profile by Normal(0, 3): all genes alike."""
    data = tiny()
    config = siid.Config(factors=3, posterior="delta")
    model = siid.build(config, spec_of(data, config), data).model
    np.testing.assert_allclose(torch.softmax(model.xi_loc, -1)[0].numpy(), np.exp(log_share(data)), rtol=1e-4)


def test_a_fit_that_kept_the_best_chain_is_resumed_where_its_weights_are_missing(sim, tmp_path):
    fit = {"preset": "paper", "overrides": ["chains=2", "factors=3", "fit.steps=4", "fit.checkpoint_every=2"], "seed": 3}
    run = api.fit("siid", target=sim.target, reference=sim.reference, out=tmp_path / "run", **fit)
    weights = tmp_path / "run" / "weights.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor[:-1].clone() if name.endswith("xi_loc") else tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(UserError, match=r"weights.safetensors: the weights do not fit .*repeat the fit \(size mismatch"):
        api.load(tmp_path / "run")
    weights.unlink()  # the disk was full
    again = api.fit("siid", out=tmp_path / "run", resume=True)
    assert len(chains_of(again.pair)) == 1
    np.testing.assert_array_equal(again.predict(draws=4).X, run.predict(draws=4).X)
    with pytest.raises(UserError, match="holds a run of siid, not of vista"):
        api.fit("vista", out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("dtype", [object, "string"])
def test_text_with_gaps_is_stored(sim, tmp_path, dtype):
    target = sim.target.copy()
    target.obs["kind"] = pd.Series(["a", None, "b"] * (target.n_obs // 3), target.obs_names, dtype=dtype)
    fast = [*FAST, "chains=1", "sweeps=1", "fit.steps=1"]
    run = api.fit("siid", target=target, reference=sim.reference, overrides=fast, seed=3, out=tmp_path / "run")
    run.write(tmp_path / "x.h5ad", run.genes[~run.measured][:1], draws=3)
    found = api.load(tmp_path / "run").target.obs["kind"]
    assert found.isna().sum() == target.n_obs // 3 and set(found.dropna()) == {"a", "b"}
    assert list(target.obs["kind"][:1]) == ["a"] and target.obs["kind"].dtype == dtype  # the caller's table is as it was
    target.obs["whole"], target.obs["yes"] = pd.Series([1, 2, 3], dtype=object).repeat(100).to_numpy(), np.full(300, True, dtype=object)
    stored = storable(target.obs)
    assert stored["whole"].dtype.kind == "i" and stored["yes"].dtype == bool and target.obs["whole"].dtype == object
    target.obs["odd"] = pd.Series(["text", 1.5, None], dtype=object).repeat(100).to_numpy()
    with pytest.raises(UserError, match=r"'odd' holds a float \(1.5\); make all of it text"):
        api.fit("siid", target=target, reference=sim.reference, overrides=FAST, seed=3, out=tmp_path / "other")


def test_sections_of_one_spot_are_kept_apart(sim):
    target, reference = sim.target.copy(), sim.reference.copy()
    target.obs["slide"], reference.obs["slide"] = "a", "a"
    target.obs.loc[target.obs_names[:40], "slide"] = "b"
    reference.obs.loc[reference.obs_names[:1], "slide"] = "b"
    settings = [*FAST, "chains=1", "sweeps=1", "fit.steps=1", "library_key=slide", "radius=70"]
    run = api.fit("siid", target=target, reference=reference, overrides=settings, seed=3)
    slides = target.obs["slide"].to_numpy()
    at = run.data.mapping.tocoo()
    assert (slides[at.row] == reference.obs["slide"].to_numpy()[at.col]).all() and at.nnz

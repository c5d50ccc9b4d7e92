"""A process over the reference's cells (`ppl_st.models.common.process`): what lines cannot say, in the maps of three methods and in a stored run."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.sparse as sp
import torch
from torch.distributions import Normal

import ppl_st
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.randomness import rng_scope
from ppl_st.models import vista
from ppl_st.models.common.cells import log_normalise, median_depth
from ppl_st.models.common.process import process
from ppl_st.models.spaim import Config
from ppl_st.prepare.spaim import problem

torch.set_num_threads(1)
SMALL = replace(Config(), clusters=8)
FAST = ["penalty=3", "reweight=false", "fit.steps=4"]  # of VISTA


ONE_TO_THREE = (1,) * 30 + (3,) * 6


def ring(n, seed, often=ONE_TO_THREE, gain=0.0):
    """Cells on a ring; gene j is a wave that goes round it ``often[j]`` times: no line leads from one frequency to another. Counts and rates."""
    rng, genes = np.random.default_rng(seed), len(often)
    angle, shift = rng.uniform(0, 2 * np.pi, n), np.random.default_rng(1).uniform(0, 2 * np.pi, genes)
    rate = np.exp(1.5 * np.cos(np.array(often) * angle[:, None] + shift) + 1.0)
    gains = np.exp(np.random.default_rng(2).normal(0, gain, genes))
    counts = rng.poisson(rate * gains * rng.gamma(8.0, 1 / 8.0, n)[:, None]).astype(np.float32)
    names = [f"g{i:02d}" for i in range(genes)]
    cells = ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=pd.DataFrame(index=names))
    cells.obsm["spatial"] = rng.uniform(0, 1000, (n, 2))
    return cells, rate


def correlation(a, b):
    return np.array([np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(a.shape[1])])


def fitted(target, reference):
    data = problem(read_counts(target, role="target"), read_counts(reference, role="reference"), SMALL, lambda line: None)[0]
    genes = np.arange(30, 36)
    found = process(data, data.reference, genes, 0)
    return data, found, found.places(data.counts)


@pytest.mark.parametrize("gain", [0.0, 0.7])
def test_it_finds_what_no_line_does_whatever_the_gains_of_the_genes(gain):
    (target, rate), (reference, _) = ring(700, 3, gain=gain), ring(900, 4)
    data, found, phi = fitted(target[:, :30].copy(), reference)
    np.testing.assert_allclose(phi.mean(0), 0, atol=1e-3)
    assert correlation(phi @ found.field.beta, np.log(rate[:, 30:])).min() > 0.85
    logs = log_normalise(sp.csr_matrix(reference.X), np.asarray(reference.X[:, :30].sum(1)).ravel(), median_depth(data.totals)).toarray()
    line = np.linalg.lstsq(logs[:, :30] - logs[:, :30].mean(0), logs[:, 30:] - logs[:, 30:].mean(0), rcond=None)[0]
    seen = log_normalise(data.counts, data.totals, median_depth(data.totals)).toarray()
    assert correlation((seen - seen.mean(0)) @ line, np.log(rate[:, 30:])).max() < 0.4


def test_weights_and_their_doubt_are_those_of_ridge_in_feature_space():
    """The posterior in the textbook's form, on the features that the code made; one of the penalties is the one that it chose."""
    (target, _), (reference, _) = ring(300, 3), ring(400, 4)
    data, found, _ = fitted(target[:, :30].copy(), reference)
    logs = data.reference.toarray().astype(np.float64)
    z = (logs[:, data.panel] - logs[:, data.panel].mean(0)) / logs[:, data.panel].std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    phi = np.exp(-(2 - 2 * z @ found.field.marks.T.astype(np.float64)) / found.field.width) @ found.field.root
    phi -= phi.mean(0)
    y = logs[:, 30:36]
    y = (y - y.mean(0)) / y.std(0)
    errors = []
    for penalty in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        inverse = np.linalg.inv(phi.T @ phi + penalty * np.eye(phi.shape[1]))
        beta, hat = inverse @ phi.T @ y, phi @ inverse @ phi.T
        noise = np.square(y - phi @ beta).sum(0) / (len(y) - 1 - np.trace(hat))
        sd = np.sqrt(np.diag(inverse)[:, None] * noise)
        errors.append([np.abs(beta - found.field.beta).max() / np.abs(beta).max(), np.abs(sd / found.field.beta_sd - 1).max()])
    mean, sd = np.array(errors).T
    assert mean.min() < 0.02 and np.sort(mean)[1] > 2 * mean.min()
    assert sd[mean.argmin()] < 0.02 and sd[mean.argmin()] == sd.min()


@pytest.mark.parametrize("method", ["spaim", "spagene"])
def test_draws_of_loadings_have_the_posteriors_mean_and_variance_and_a_small_reference_is_doubted_more(method):
    doubt = {}
    for cells in (60, 600):
        (target, _), (reference, _) = ring(300, 3), ring(cells, 4)
        settings = ["process=0.5"] + ["clusters=4"] * (method == "spaim")
        run = ppl_st.fit(method, target=target[:, :24].copy(), reference=reference, overrides=settings, seed=0)
        guide = run.pair.guide.members[0] if method == "spaim" else run.pair.model.members[0].way(0)
        genes = torch.tensor([3, 30, 35])
        with torch.no_grad(), rng_scope(0, "draws"):
            mean, variance = guide.mean_codes(genes)
            site, law = ("weights", guide.weights_dist()) if method == "spaim" else ("translator", Normal(guide.loc, guide.posterior_scale()))
            drawn = torch.stack([guide.codes({site: law.sample(), "gene_key": torch.tensor(key)}, genes) for key in range(2000)])
        first = len(mean) - len(guide.process.beta)
        assert len(mean) > first > 0 and guide.doubt != 1
        assert bool(((drawn.mean(0) - mean).abs() < 5 * (variance / 2000).sqrt() + 1e-6).all())
        np.testing.assert_allclose(drawn[:, :, 1:].var(0), variance[:, 1:], rtol=0.2)
        apart = np.corrcoef(drawn[:, first, 1], drawn[:, 0, 1])[0, 1]
        assert abs(apart) < 0.1 and (drawn[:, first:, 0] == 0).all() and (variance[:, 0] == 0).all()  # a measured gene
        place = torch.from_numpy(guide.place(run.data, np.arange(200)))
        doubt[cells] = float((place[:, first:].square() @ variance[first:, 1:]).mean())
    assert doubt[60] > 2 * doubt[600] > 0


@pytest.mark.parametrize("method", ["spaim", pytest.param("spagene", marks=pytest.mark.slow), "vista"])  # SpaGene learns it as SpaIM does
def test_inner_genes_give_it_a_share_where_it_knows_more_and_a_stored_run_keeps_it(method, tmp_path):
    """Some panel genes have a frequency of their own, as the hidden ones have: on them the share is learned."""
    often = (1,) * 20 + (2, 4, 6, 8, 3, 5, 7)
    (target, rate), (reference, _) = ring(600, 3, often), ring(800, 4, often)
    hidden = ["g24", "g25", "g26"]
    target = target[:, :24].copy()
    runs = {}
    for share in ("auto", "0.0"):
        own = {"vista": [*FAST, "graph=none"], "spaim": ["smoothing=0.0", "clusters=8"], "spagene": ["smoothing=0.0"]}[method]
        settings = [f"process={share}", *own]
        run = ppl_st.fit(method, target=target, reference=reference, overrides=settings, seed=0, out=tmp_path / share)
        runs[share] = run, run.predict(hidden, draws=8)
    run, first = runs["auto"]
    shares = [(one.spec.hypers[0] if method == "spagene" else one.spec.hyper).share for one, _ in runs.values()]
    assert shares[0] > 0 and shares[1] == 0
    better, plain = (correlation(np.log(runs[k][1].layers["rate_mean"]), np.log(rate[:, 24:])).mean() for k in ("auto", "0.0"))
    assert better > 0.6 and better > plain + 0.3, (better, plain)
    again = ppl_st.load(tmp_path / "auto").predict(hidden, draws=8)
    for name in ("rate_mean", "rate_sd", "q95"):
        np.testing.assert_array_equal(first.layers[name], again.layers[name])
    fresh = run.predict(hidden, draws=8, target=target[:60])
    np.testing.assert_allclose(fresh.layers["rate_mean"], first.layers["rate_mean"][:60], rtol=1e-4)
    measured = run.predict(["g03"], draws=8)
    assert np.isfinite(measured.layers["rate_mean"]).all() and (np.asarray(first.layers["rate_sd"]) > 0).all()


def test_vista_mixes_map_and_process_to_scores_of_unit_spread_and_leaves_measured_genes_alone():
    (target, _), (reference, _) = ring(500, 3), ring(400, 4)
    target.obsm["spatial"][:100] += 1e5 * np.arange(1, 101)[:, None]  # cells of sections of their own have no neighbors
    target.obs["slide"] = [f"s{min(i, 100)}" for i in range(500)]
    settings = ["process=0.4", "fit.steps=4", "penalty=3", "library_key=slide"]
    run = ppl_st.fit("vista", target=target[:, :30].copy(), reference=reference, overrides=settings, seed=0)
    predictor = vista.Predictor(run.pair, run.data, run.config, run.spec)
    model = predictor.models[0]
    local = predictor.local(predictor.at(np.arange(500)), 0)
    with torch.no_grad():
        own = (local.loc @ model.decoder).numpy()
        beyond = (local.phi @ torch.from_numpy(model.process.beta) - model.center).numpy()
    score = model.own.numpy() * own + model.beside.numpy() * beyond
    np.testing.assert_allclose(score.std(0), 1, atol=0.05)
    np.testing.assert_allclose(score.mean(0)[30:], own.mean(0)[30:] * model.own.numpy()[30:], atol=0.01)
    assert (model.own[:30] == 1).all() and (model.beside[:30] == 0).all() and (model.beside[30:] > 0).all()
    parts = (model.own * torch.from_numpy(own.std(0)))[30:] / 0.6, (model.beside * torch.from_numpy(beyond.std(0)))[30:] / 0.4
    torch.testing.assert_close(*parts, rtol=0.05, atol=0)  # the shares that were asked for
    assert any(one["share"] == 0.4 for one in run.spec.hyper.candidates)


def test_vista_standardises_the_rows_of_its_process_within_batches():
    """Two batches of the target, in which genes have gains of their own: as a cell of one batch, so of two."""
    often = (1,) * 20 + (2, 4, 6, 8, 3, 5, 7)
    (target, rate), (reference, _) = ring(800, 3, often), ring(800, 4, often)
    gains = np.exp(np.random.default_rng(5).normal(0, 1.0, (2, 24)))
    side = np.arange(800) % 2
    target = target[:, :24].copy()
    target.X = sp.csr_matrix(np.random.default_rng(6).poisson(rate[:, :24] * gains[side]).astype(np.float32))
    target.obs["slide"], reference.obs["slide"] = np.array(["a", "b"])[side], "c"
    settings, found = [*FAST, "graph=none", "process=0.8"], {}
    for key in ("null", "slide"):
        run = ppl_st.fit("vista", target=target, reference=reference, overrides=[*settings, *(["batch_key=slide"] if key == "slide" else [])], seed=0)
        found[key] = correlation(np.log(run.predict(["g24", "g25", "g26"], draws=8).layers["rate_mean"]), np.log(rate[:, 24:])).mean()
    assert found["slide"] > 0.6 and found["slide"] > found["null"] + 0.05, found


def test_a_handful_of_reference_cells_a_constant_gene_and_an_empty_cell():
    (target, _), (reference, _) = ring(60, 3), ring(15, 4)
    counts = target.X.toarray()
    counts[0] = 0
    target.X = sp.csr_matrix(counts)
    other = reference.X.toarray()
    other[:, [2, 33]] = 0
    reference.X = sp.csr_matrix(other)
    _, found, phi = fitted(target[:, :30].copy(), reference)
    assert phi.shape[1] <= 15 and np.isfinite(phi).all() and np.isfinite(found.field.beta).all()
    assert (found.field.beta[:, 3] == 0).all()  # a gene that does not vary in the reference


def test_a_share_that_was_set_is_kept_by_a_panel_without_inner_genes_and_one_beyond_1_is_refused():
    (target, _), (reference, _) = ring(80, 3), ring(100, 4)
    run = ppl_st.fit("spaim", target=target[:, :8].copy(), reference=reference, overrides=["clusters=8", "process=0.5"], seed=0)
    assert run.spec.hyper.share == 0.5 and run.pair.guide.members[0].process.fitted is not None
    with pytest.raises(UserError, match=r"process must be at most 1, got 1\.5"):
        ppl_st.fit("spaim", target=target, reference=reference, overrides=["process=1.5"])


def test_a_run_whose_settings_this_version_does_not_know_says_fit_again(tmp_path):
    (target, _), (reference, _) = ring(80, 3), ring(100, 4)
    ppl_st.fit("spaim", target=target[:, :8].copy(), reference=reference, overrides=["clusters=8", "process=0"], seed=0, out=tmp_path / "run")
    settings = tmp_path / "run" / "config.toml"
    settings.write_text("depth_exponent = 0.7\n" + settings.read_text())
    with pytest.raises(UserError, match=r"config.toml: unknown key 'depth_exponent'.*written by ppl_st .*: use that version, or fit again"):
        ppl_st.load(tmp_path / "run")


def test_features_have_the_signs_that_their_eigenvectors_have_not(monkeypatch):
    """A run stores places of some cells and fits the process again when it is loaded, maybe with other threads: levels went wrong by a third."""
    (target, _), (reference, _) = ring(300, 3), ring(400, 4)
    _, found, phi = fitted(target[:, :30].copy(), reference)
    eigh, rng = scipy.linalg.eigh, np.random.default_rng(0)

    def turned(*args, **kwargs):
        values, vectors = eigh(*args, **kwargs)
        return values, vectors * rng.choice([-1.0, 1.0], vectors.shape[1])

    monkeypatch.setattr(scipy.linalg, "eigh", turned)
    _, again, other = fitted(target[:, :30].copy(), reference)
    scale = np.abs(phi).max()
    np.testing.assert_allclose(other / scale, phi / scale, atol=1e-3)
    np.testing.assert_allclose(again.field.beta, found.field.beta, atol=1e-3 * np.abs(found.field.beta).max())

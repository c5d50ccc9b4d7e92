"""Levels of VISTA's genes: depth that counts genes of the target only, many cells, trained attention, layers, zeros; batches and sections."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_vista_inner import levels_off

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.models import vista
from ppl_st.models.vista.inner import learn
from ppl_st.models.vista.model import sides
from ppl_st.observation import find
from ppl_st.simulate import spatial_field

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


def small(*overrides, theta=4.0):
    """A run of a panel so small that nothing is held out to learn from; the reference has a layer with one count in a hundred."""
    world = spatial_field(seed=2, n_cells=250, n_reference=300, n_genes=24, n_panel=9, n_types=3, rho=3.0, platform_sd=0.0, theta=theta)
    world.target.obs["lane"] = world.reference.obs["lane"] = "one"
    counts = world.reference.X.toarray().astype(int)
    world.reference.layers["young"] = np.random.default_rng(0).binomial(counts, 0.01).astype(np.float32)
    overrides = [*FAST, "graph=none", "fit.steps=2", *overrides]
    return world, ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=overrides)


def test_the_level_of_a_layer_is_as_unsure_as_its_counts_are_few():
    """Gain and slope are those of its gene, which was measured: the layer's own level had no doubt."""
    _, run = small('reference_layers=["young"]')
    spec = run.spec._replace(hyper=run.spec.hyper._replace(error=[0.0] * len(run.spec.hyper.error), wave_error=0.0))
    predictor, (model, guide) = vista.Predictor(run.pair, run.data, run.config, spec), sides(chains_of(run.pair)[0])
    batch, genes = predictor.at(np.arange(3)), torch.from_numpy(np.concatenate([run.data.panel, 24 + run.data.panel]))
    local = predictor.local(batch, 0)
    local = local._replace(scale=torch.zeros_like(local.scale))
    drawn = {name: getattr(guide, f"{name}_loc") for name in model.priors()}
    with torch.no_grad():
        rates = [predictor.count_dist(batch, 0, drawn | {"gene_key": torch.tensor(key)}, local, genes).mean for key in range(1000)]
    sd = torch.stack(rates).log().std(0).numpy()  # [cells, genes]
    assert sd[:, :9].max() < 1e-6
    np.testing.assert_allclose(sd[:, 9:], np.tile(model.level_variance[genes[9:]].sqrt(), (3, 1)), rtol=0.1)


@pytest.mark.parametrize("platform", ["hierarchical", "none"])
def test_genes_and_layers_that_a_reference_hardly_shows_have_the_mean_of_their_share(platform, monkeypatch):
    """Shares are known as logarithms: their mean is above exp of where these lie. By that much levels without a gain would be too low, those of
    layers too high or low (.56, 1.5), as their gene showed more counts than they or fewer."""
    monkeypatch.setattr(vista, "MIN_INNER_PANEL", 99)
    rng, genes, panel, cells = np.random.default_rng(0), 3000, 40, 150
    share = np.exp(rng.normal(0, 2.0, genes))
    share[:panel] = share[:panel].clip(np.median(share))
    share = np.concatenate([share, share * np.exp(rng.normal(-1, 2.0, genes))]) / share[:panel].sum()  # levels are per count of the panel
    reference = rng.poisson(20 * rng.lognormal(0, 0.3, (40, 1)) * share)
    counts, whole = rng.poisson(2000 * rng.lognormal(0, 0.3, (cells, 1)) * share[:panel]), np.zeros(cells, np.int64)
    matrix = lambda x: sp.csr_matrix(x.astype(np.float32))  # noqa: E731
    data = vista.Data(
        matrix(counts), matrix(np.zeros((cells, 0))), matrix(reference), np.arange(panel), np.zeros((cells, 0), np.float32),
        matrix(np.zeros((cells, cells))), whole, whole[:40], np.tile(np.arange(genes), 2), np.full(cells, 2000.0),
    )  # fmt: skip
    config = with_overrides(vista.PRESETS["default"], [*FAST, "graph=none", f"platform={platform}"])
    model, _ = sides(chains_of(vista.start(data, config, 0, lambda line: None)[0])[0])
    level, variance = (part.numpy().astype(np.float64) for part in (model.level, model.level_variance))
    # a gain of 0 knows the doubt of the level of its gene, (1 + b)^2 of it with b = 0
    mean = np.exp(level + (0.5 * variance[data.parent] if platform == "hierarchical" else 0.0))
    seen, layer, known = reference.sum(0), np.arange(2 * genes) >= genes, ~np.isin(data.parent, data.panel)
    for some in (~layer & (seen <= 2), layer & (seen <= 2) & (seen[data.parent] > 10), layer & (seen > 5) & (seen[data.parent] <= 2)):
        some &= known
        assert some.sum() > 50 and mean[some].sum() / share[some].sum() == pytest.approx(1, abs=0.25), some.sum()


def test_levels_of_faint_genes_follow_the_line_that_was_learned_on_what_is_known_of_the_reference(monkeypatch):
    """Platforms agree by three quarters of the log share. A line that was learned on counts as they are, and applied to what is known of the shares,
    shrinks twice; one that is applied to counts as they are makes genes without any too few."""
    monkeypatch.setattr(vista, "MIN_INNER_PANEL", 9999)
    rng, genes, panel, cells = np.random.default_rng(0), 3000, 300, 150
    logs = rng.normal(0, 2.0, genes)
    reference = rng.poisson(3000 * rng.lognormal(0, 0.3, (40, 1)) * np.exp(logs) / np.exp(logs).sum() / 10)
    share = np.exp(0.75 * logs + rng.normal(0, 0.2, genes))
    share /= share[:panel].sum()
    counts, whole = rng.poisson(20_000 * rng.lognormal(0, 0.3, (cells, 1)) * share[:panel]), np.zeros(cells, np.int64)
    matrix = lambda x: sp.csr_matrix(x.astype(np.float32))  # noqa: E731
    data = vista.Data(
        matrix(counts), matrix(np.zeros((cells, 0))), matrix(reference), np.arange(panel), np.zeros((cells, 0), np.float32),
        matrix(np.zeros((cells, cells))), whole, whole[:40], np.arange(genes), np.full(cells, 20_000.0),
    )  # fmt: skip
    pair, spec = vista.start(data, with_overrides(vista.PRESETS["default"], [*FAST, "graph=none"]), 0, lambda line: None)
    model, _ = sides(chains_of(pair)[0])
    loc, sd = (part.detach().numpy().astype(np.float64) for part in model.priors()["log_gain"])
    mean, seen = np.exp(model.level.numpy().astype(np.float64) + loc + 0.5 * sd**2), reference.sum(0)
    assert 1 + spec.hyper.gain[1] == pytest.approx(0.75, abs=0.08), spec.hyper.gain
    for some in (seen == 0, (seen > 0) & (seen <= 3), seen > 20):
        some[:panel] = False
        assert some.sum() > 50 and mean[some].sum() / share[some].sum() == pytest.approx(1, abs=0.2), some.sum()


def test_a_batch_that_the_fit_does_not_know_is_refused_by_name():
    """Its cells were standardised as those of the first batch."""
    world, run = small("batch_key=lane")
    other = world.target[:40].copy()
    assert np.isfinite(run.predict(target=other, draws=2).X).all()
    other.obs["lane"] = "two"
    with pytest.raises(UserError, match=r"no batch 'two' \(obs column 'lane', batch_key\); it knows one"):
        run.predict(target=other, draws=2)


def test_the_exponent_of_depth_is_that_within_sections():
    """Of two sections of which one is ten times as deep; exponents of all cells together lie near 1."""
    rng = np.random.default_rng(0)
    cells, genes = 600, 24
    usual = np.where(np.arange(cells) % 2, 300.0, 3000.0)
    within = np.exp(rng.normal(0, 0.5, cells))
    counts = rng.poisson((usual * within**0.6)[:, None] * rng.gamma(2.0, 0.5, genes) / (8 * genes))
    others = rng.poisson(usual * within)[:, None]  # nearly all of a cell's total
    whole = np.zeros(cells, np.int64)
    matrix = lambda x: sp.csr_matrix(x.astype(np.float32))  # noqa: E731
    data = vista.Data(
        matrix(counts), matrix(others), matrix(rng.poisson(3.0, (300, genes))), np.arange(genes), np.zeros((cells, 0), np.float32),
        matrix(np.zeros((cells, cells))), whole, whole[:300], np.arange(genes), usual,
    )  # fmt: skip
    fixed = dict.fromkeys(("reweight", "denoise", "mix", "common", "process"), 0.0) | {"penalty": 3.0}
    assert learn(data, find("nb"), fixed, 0, lambda line: None).depth[0] == pytest.approx(0.6, abs=0.1)


def test_unmeasured_genes_have_their_level_whatever_share_of_counts_a_likelihood_replaces_by_zeros():
    """Gains are ratios of counts; the rate before inflation had them, and counts were too few by its share."""
    _, run = small("likelihood=zinb")
    off = levels_off(run, 0.5)
    assert np.abs(off).max() < 0.1 and abs(off.mean()) < 0.05, off


def test_what_only_genes_of_the_target_have_in_common_opens_no_gate_of_the_reference():
    _, run = small("reference_likelihood=zinb")
    model, _ = sides(chains_of(run.pair)[0])
    z = torch.randn(5, model.latent, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean = [model.reference_law(one, torch.zeros(5, 24)).mean for one in (z, torch.cat([z[:, :-1], z[:, -1:] + 3], 1))]
    torch.testing.assert_close(*mean)


def test_dispersion_in_the_reference_starts_at_what_its_zeros_tell():
    """All genes began at theta = 1, of which 100 steps lead nowhere."""
    low, high = (sides(chains_of(small(theta=theta)[1].pair)[0])[0].reference_log_theta.detach().mean() for theta in (0.3, 30.0))
    assert high - low > 1.5, (low, high)

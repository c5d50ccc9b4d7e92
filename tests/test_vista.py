"""VISTA: the graph reaches the prediction where it should, published objective term by term, hyper-priors, runs and refusals."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

import ppl_st
from ppl_st.config import with_overrides
from ppl_st.data import read_counts
from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.svi import fit, load_state, rng_scope
from ppl_st.metrics import score_table
from ppl_st.models.vista import PRESETS, batches, build, initialise, start
from ppl_st.models.vista.closed import fit_map, second_moments
from ppl_st.models.vista.config import Config
from ppl_st.pooling import draws_of, log_fold_change, pooled
from ppl_st.prepare.vista import anchors, new_cells, problem, waves
from ppl_st.simulate import spatial_field

FAST = ["chains=1", "penalty=3", "reweight=false", "process=0", "fit.steps=4", "batch_cells=64", "neighbors=6"]  # process: test_process.py
GRAPHS = ("none", "kl_only", "posterior", "prior")


@pytest.fixture(scope="module")
def world():
    return spatial_field(
        seed=1, n_cells=240, n_reference=200, n_genes=36, n_panel=20, n_types=4, rho=3.0, spatial=1.0, length=500.0
    )


def quiet(line):
    pass


def settings(*overrides, preset="default"):
    return with_overrides(PRESETS[preset], [*FAST, *overrides])


def prepared(world, config):
    return problem(
        read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=False), config, quiet
    )


def fitted(world, graph, *overrides):
    return ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=[*FAST, f"graph={graph}", *overrides])


@pytest.fixture(scope="module")
def of_prior(world):
    return fitted(world, "prior")


@pytest.mark.parametrize("graph", GRAPHS)
def test_permuted_coordinates_change_the_prediction_only_where_the_graph_reaches_it(world, graph):
    run = fitted(world, graph, "fit.steps=12" if graph == "posterior" else "fit.steps=4")
    shuffled = world.target.copy()
    shuffled.obsm["spatial"] = np.random.default_rng(0).permutation(shuffled.obsm["spatial"])
    before, after = (run.predict(target=t, draws=4).layers["rate_mean"] for t in (world.target, shuffled))
    if graph in ("none", "kl_only"):
        np.testing.assert_array_equal(before, after)
    else:
        assert np.abs(np.log(before) - np.log(after)).max() > 1e-3


def test_permuting_cells_only_permutes_the_states(world):
    config = settings("graph=prior")
    data, target, _ = prepared(world, config)
    pair, _ = start(data, config, 0, quiet)
    guide = chains_of(pair)[0].guide
    order = np.random.default_rng(0).permutation(len(target.names))
    moved, _ = new_cells(target.take_rows(order), target, data, config)
    a, b = (guide.states(next(iter(batches(d, config, 0).in_order(1000))))[0].detach() for d in (data, moved))
    torch.testing.assert_close(a[torch.from_numpy(order)], b)


@pytest.mark.parametrize("map", ["closed", "learned"])
def test_every_graph_mode_begins_as_gimvi(world, map):
    states, chosen = [], [f"map={map}", *(["visible=1"] if map == "learned" else [])]
    data, _, _ = prepared(world, settings("graph=prior"))
    _, spec = start(data, settings("graph=none", *chosen), 0, quiet)
    spec = spec._replace(hyper=spec.hyper._replace(mix=0.0))
    for graph in GRAPHS:
        config = settings(f"graph={graph}", "dropout=0", *chosen)
        with rng_scope(0, "start"):
            pair = build(config, spec)
        initialise(pair, data, 0, 0)
        pair.guide.eval()
        states.append(pair.guide.states(batches(data, config, 0).of(np.arange(50))))
    for loc, scale in states[1:]:
        torch.testing.assert_close(loc, states[0][0])
        torch.testing.assert_close(scale, states[0][1])


def test_the_closed_map_is_weighted_ridge_and_hidden_genes_use_the_same_equations(world):
    config = settings("graph=none")
    data, _, _ = prepared(world, config)
    m, p = data.reference.shape[0], len(data.panel)
    w = np.random.default_rng(0).dirichlet(np.ones(m))
    found = fit_map(second_moments(data, w), 3.0, p)
    panel = data.reference[:, data.panel].toarray()
    total = panel.sum(1)
    log = lambda counts: np.log1p(counts * (np.median(total) / total)[:, None])  # noqa: E731
    z = lambda x, w: (x - w @ x) / np.sqrt(w @ (x - w @ x) ** 2)  # noqa: E731
    x, y = z(np.clip(z(log(panel), np.full(m, 1 / m)), -8, 8), w), z(log(data.reference.toarray()), w)
    direct = np.linalg.solve((x * w[:, None]).T @ x + 3 * np.eye(p), (x * w[:, None]).T @ y)
    np.testing.assert_allclose(found.encoder @ found.decoder, direct, atol=1e-6)
    np.testing.assert_allclose(np.linalg.solve(found.gram + 3 * np.eye(p), found.cross), found.encoder, atol=1e-8)
    state = x @ found.encoder
    np.testing.assert_allclose((state * w[:, None]).T @ state, np.eye(p), atol=1e-3)


def test_hidden_genes_are_seen_by_nobody(world):
    config = settings("graph=prior", "visible=0.5")
    data, _, _ = prepared(world, config)
    pair, _ = start(data, config, 0, quiet)
    guide = chains_of(pair)[0].guide
    batch = batches(data, config, 0).at(3)
    hidden = (~batch.visible).nonzero().ravel()
    assert len(hidden) == 10
    counts = data.counts.toarray() + np.float32(5) * (np.arange(240)[:, None] % 7) * (~batch.visible).numpy()  # depth, too, must not know of them
    other = batches(data._replace(counts=type(data.counts)(counts.astype(np.float32))), config, 0)
    other.share = batches(data, config, 0).share
    torch.testing.assert_close(guide.states(batch)[0], guide.states(other.at(3))[0])


def direct_objective(pair, batch, sites, config):
    """-ELBO of gimVI (released ZINB/NB objective, kappa) written from the formulas, at given draws of the latent sites."""
    model, guide = pair
    lg = torch.lgamma

    def nb(x, mu, theta):
        return lg(x + theta) - lg(theta) - lg(x + 1) + theta * torch.log(theta / (theta + mu)) + x * torch.log(mu / (theta + mu))

    def kl(loc, scale, m=0.0, s=1.0):
        return (np.log(s) - scale.log() + (scale**2 + (loc - m) ** 2) / (2 * s**2) - 0.5).sum(-1)

    n, b = batch.n_cells, len(batch.rows)
    m, r = batch.n_reference, len(batch.reference_rows)
    z, z_r = sites["z"].double(), sites["z_reference"].double()
    a, bias, level = model.decoder.double(), model.bias.double(), model.level.double()
    rho = torch.softmax(z_r @ a + bias + level, -1)
    mu = sites["log_library"].double().exp()[:, None] * rho
    theta = model.reference_log_theta.double().exp()
    gate = torch.sigmoid((z_r @ model.dropout_logits.weight.double().T) + model.dropout_logits.bias.double())
    x = batch.reference.double()
    p0 = torch.where(x == 0, gate, torch.zeros_like(gate))
    log_x = torch.log(p0 + (1 - gate) * nb(x, mu, theta).exp()).sum(-1)
    panel = model.panel
    share = torch.softmax(z @ a + bias + level, -1)[:, panel]
    share = share / share.sum(-1, keepdim=True)
    own = batch.counts[:b].double()
    log_s = nb(own, own.sum(1).clamp_min(1)[:, None] * share, sites["log_theta"][panel].double().exp()).sum(-1)
    loc_r, scale_r = (t.double() for t in guide.encode_reference(batch))
    base, spread = (t.double() for t in guide.encode(batch))
    loc, scale = base[:b], spread[:b]
    if config.graph != "none":
        added = guide.attention_output(torch.relu(guide.attention(base.float(), batch.neighbors, batch.present)))
        loc = loc + added.double()
    total = batch.reference.double().sum(1).log() + guide.library[0].double()
    mean, sd = model.library[0].double()
    kl_l = kl(total[:, None], guide.library[1].double().exp().expand(len(total), 1), mean, float(sd))
    # flipped labels, one mean over the codes of both sides; kappa = 5
    both = model.opponent[0](torch.cat([sites["z_reference"], sites["z"]])).ravel()
    fool = torch.nn.functional.binary_cross_entropy_with_logits(both, torch.cat([torch.zeros(r), torch.ones(b)]))
    elbo = m / r * (log_x - kl(loc_r, scale_r) - kl_l).sum() + n / b * (log_s - kl(loc, scale)).sum()
    return -(elbo - 5 * (n + m) * fool.double())


@pytest.mark.parametrize("preset", ["gimvi", "released", "paper"])
def test_published_presets_equal_the_formulas(world, preset):
    config = with_overrides(PRESETS[preset], ["batch_cells=50", "batch_reference=50", "neighbors=5", "dropout=0", "latent=6"])
    data, _, _ = prepared(world, config)
    pair, _ = start(data, config, 0, quiet)
    pair = chains_of(pair)[0]
    for module in (*pair, pair.model.opponent[0]):
        module.eval()
    if preset != "gimvi":  # the graph at work
        torch.nn.init.normal_(pair.guide.attention_output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    batch = batches(data, config, 0).at(2)
    with rng_scope(0, "test"):
        trace = poutine.trace(pair.guide).get_trace(batch)
    sites = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    with rng_scope(0, "test"):
        ours = TraceMeanField_ELBO().differentiable_loss(pair.model, pair.guide, batch).item()
    assert ours == pytest.approx(direct_objective(pair, batch, sites, config).item(), rel=1e-5)


def test_one_cell_batches_and_a_full_batch_work():
    world = spatial_field(seed=1, n_cells=60, n_reference=50, n_genes=36, n_panel=20, n_types=4, rho=3.0)
    for graph in GRAPHS:
        config = settings(f"graph={graph}", "fit.steps=2")
        data, _, _ = prepared(world, config)
        pair, _ = start(data, config, 0, quiet)
        for size in (1, 0):
            sized = with_overrides(config, [f"batch_cells={size}", f"batch_reference={size}"])
            assert np.isfinite(fit(pair, batches(data, sized, 0), sized.fit)[0].tally.recent).all()
    learned = ["map=learned", "adversary=cross_entropy", "visible=1.0", "batch_cells=1", "batch_reference=0", "fit.steps=2"]
    assert np.isfinite(fitted(world, "posterior", *learned).record["losses"]).all()


def test_two_cells_are_enough(world):
    """Correlations over them are 1 or -1: one was divided by zero."""
    run = ppl_st.fit("vista", target=world.target[:2].copy(), reference=world.reference, overrides=["fit.steps=2"])
    assert np.isfinite(run.predict(draws=2).X).all()


def test_dispersion_of_unmeasured_genes_moves_with_the_data():
    found = []
    for theta in (0.5, 50.0):
        world = spatial_field(seed=2, n_cells=500, n_reference=300, n_genes=50, n_panel=30, n_types=3, theta=theta, rho=6.0)
        run = fitted(world, "prior")
        found.append(run.spec.hyper.parameters["log_theta"][0])
    assert found[1] - found[0] > 1.0
    drawn = chains_of(run.pair)[0].model.priors()["log_theta"][0]
    assert drawn[~torch.from_numpy(run.measured)].mean() == pytest.approx(found[1], abs=1.0)


def test_measured_genes_are_predicted_at_their_level():
    """They are scored when hidden and predicted when seen, where their states vary more: means were up to twice the measured ones."""
    deep = spatial_field(seed=2, n_cells=400, n_reference=300, n_genes=24, n_panel=20, n_types=4, rho=3.0, spatial=1.0, length=500.0)
    genes = list(deep.target.var_names)
    run = ppl_st.fit("vista", target=deep.target, reference=deep.reference, overrides=["chains=2", "fit.steps=30"])
    mean = run.predict(genes=genes, draws=2).layers["rate_mean"].mean(0)
    np.testing.assert_allclose(np.log(mean / deep.target.X.toarray().mean(0)), 0.0, atol=0.1)


def test_without_gains_there_is_no_level_to_move(world):
    run = fitted(world, "none", "platform=none")
    assert np.isfinite(run.predict(draws=2).layers["rate_mean"]).all()


def test_a_run_is_repeatable_resumes_bitwise_with_its_critic_and_loads(world, tmp_path):
    options = {"target": world.target, "reference": world.reference, "seed": 3}
    overrides = [*FAST, "map=learned", "graph=posterior", "adversary=density_ratio", "visible=1.0", "fit.steps=6", "fit.checkpoint_every=3"]
    whole = ppl_st.fit("vista", overrides=overrides, out=tmp_path / "a", **options)
    again = ppl_st.fit("vista", overrides=overrides, out=tmp_path / "b", **options)
    a, b = (r.predict(draws=4).X for r in (whole, ppl_st.load(tmp_path / "b")))
    np.testing.assert_array_equal(a, b)
    assert again.predict(draws=4).obsm["latent"].shape == (240, 48)
    # Half a fit, then the rest from its state.
    from ppl_st.models import vista

    config = with_overrides(PRESETS["default"], [*overrides, "fit.seed=3"])
    data, _, _ = prepared(world, config)
    finals = []
    for until in (None, 3):
        pair, _ = start(data, config, 3, quiet)
        state, _ = fit(pair, batches(data, config, 3), config.fit, adversary=vista.adversary(pair, config), until=until, folder=tmp_path / "c")
        if until:
            pair, _ = start(data, config, 3, quiet)
            state, _ = fit(
                pair, batches(data, config, 3), config.fit, load_state(tmp_path / "c" / "state.pt"), adversary=vista.adversary(pair, config)
            )
        finals.append(state)
    for side in ("model", "guide"):
        for name, value in getattr(finals[0], side).items():
            assert torch.equal(value, getattr(finals[1], side)[name]), name
    for name, value in finals[0].adversary["critic"].items():
        assert torch.equal(value, finals[1].adversary["critic"][name]), name


def unlike(table, latent, rng):
    """Counts thinned by a smooth function of the latent state drawn for every gene: a part of its pattern that no reference knows."""
    share = 1 / (1 + np.exp(-latent @ rng.normal(0, 0.8, (latent.shape[1], table.n_vars))))
    table = table.copy()
    table.X = rng.binomial(table.X.toarray().astype(int), share).astype(np.float32)
    return table


@pytest.mark.slow
def test_pooled_intervals_of_a_region_hold_the_truth_because_errors_of_a_pattern_are_shared_by_its_cells():
    world = spatial_field(seed=3, n_cells=900, n_reference=500, n_genes=110, n_panel=50, n_types=5, length=300.0, rho=3.0)
    rng = np.random.default_rng(0)
    target, truth = (unlike(table, world.truth.obsm["latent"], rng) for table in (world.target, world.truth))
    run = ppl_st.fit("vista", target=target, reference=world.reference, overrides=["penalty=3", "reweight=false", "fit.steps=20"])
    hyper = run.spec.hyper
    x, y = target.obsm["spatial"].T
    groups = [x < 400, (x > 500) & (x < 1000), x > 1200, y < 400, (y > 500) & (y < 1000), y > 1200]

    def covered(found):
        table = found.predict(list(truth.var_names), draws=30, samples=25, truth=truth)
        inside = []
        for group in groups:
            wanted = log_fold_change(truth.X, group).estimate
            one = pooled(draws_of(table), lambda counts, group=group: log_fold_change(counts, group), population=False)
            inside.append((one.lo < wanted) & (wanted < one.hi))
        return np.mean(inside), table.var["coverage_90"].mean()

    regions, entries = covered(run)
    alone = replace(run, spec=run.spec._replace(hyper=hyper._replace(error=[0.0] * len(hyper.error), wave_error=0.0)))
    without, entries_without = covered(alone)
    assert regions > 0.85 and without < regions - 0.15, (regions, without)
    assert abs(entries - 0.9) < 0.04 and abs(entries_without - 0.9) < 0.04, (entries, entries_without)


def test_the_error_of_a_pattern_is_the_same_in_every_block_and_spares_measured_genes(of_prior):
    run = of_prior
    spec = run.spec._replace(hyper=run.spec.hyper._replace(error=[0.5] * len(run.spec.hyper.error), wave_error=0.5))
    predictor = run.module.Predictor(run.pair, run.data, run.config, spec)
    genes = torch.arange(len(run.genes))
    whole, part = predictor.at(np.arange(240)), predictor.at(np.arange(100, 140))

    def rates(batch, key, genes):
        guide = predictor.guides[0]
        drawn = {name: getattr(guide, f"{name}_loc") for name in predictor.models[0].priors()} | {"gene_key": torch.tensor(key)}
        local = predictor.local(batch, 0)
        return predictor.count_dist(batch, 0, drawn, local._replace(scale=torch.zeros_like(local.scale)), genes).mean

    with torch.no_grad():
        one, again, other = rates(whole, 1, genes), rates(part, 1, genes[5:30]), rates(whole, 2, genes)
    torch.testing.assert_close(one[100:140, 5:30], again, rtol=1e-4, atol=1e-6)
    ratio = (one / other).log().abs().mean(0)
    assert ratio[torch.from_numpy(run.measured)].max() < 1e-6 and ratio[~torch.from_numpy(run.measured)].min() > 0.1


def test_genes_that_only_the_target_has_help_to_place_its_cells():
    world = spatial_field(seed=6, n_cells=500, n_reference=400, n_genes=150, n_panel=100, n_types=5, rho=1.0, spatial=0.5)
    reference = world.reference[:, [*world.target.var_names[:15], *world.truth.var_names]].copy()  # 85 genes of the target are unknown there
    accuracy = {}
    for others in ("true", "false"):
        settings = ["penalty=3", "reweight=false", "process=0", "fit.steps=8", f"others={others}"]
        run = ppl_st.fit("vista", target=world.target, reference=reference, overrides=settings)
        rate = run.predict(world.truth.var_names, draws=2).layers["rate_mean"]
        table = score_table(world.truth.X, rate, np.asarray(world.target.X.sum(1)).ravel(), world.truth.var_names)
        accuracy[others] = table["log_pcc"].mean()
    assert run.spec.measured == 15 and run.target.genes.size == 15
    assert accuracy["true"] > 1.15 * accuracy["false"], accuracy


def test_arviz_groups_and_joint_samples(of_prior):
    run = of_prior
    groups = run.arviz_groups(draws=3, seed=0, max_cells=20)
    assert groups["predictions"]["rate"].shape == (1, 3, 20, 16)
    assert groups["posterior"]["log_gain"].dims == ("chain", "draw", "any_gene")
    assert run.predict(draws=4, samples=2).layers["sample_1"].shape == (240, 16)


def test_a_new_section_is_predicted_without_refitting_and_a_changed_panel_refused(of_prior):
    run = of_prior
    other = spatial_field(seed=1, n_cells=100, n_reference=50, n_genes=36, n_panel=20, n_types=4).target
    other.obs_names = [f"new{i}" for i in range(100)]
    unsound = other.copy()
    unsound.obsm["spatial"][3] = np.nan
    with pytest.raises(UserError, match="NaN or infinite for 1 of 100 cells"):
        run.predict(target=unsound, draws=2)
    result = run.predict(target=other, draws=4)
    assert result.shape == (100, 16) and np.isfinite(result.X).all()
    with pytest.raises(UserError, match=r"lacks 1 of the 20 genes"):
        run.predict(target=other[:, 1:].copy())


def test_sections_share_no_neighbors_and_batches_are_standardised_apart(world):
    target, reference = world.target.copy(), world.reference.copy()
    target.obs["slide"] = np.where(np.arange(240) % 2, "a", "b")
    target.obs["lane"], reference.obs["lane"] = "one", np.where(np.arange(200) < 80, "one", "two")
    config = settings("library_key=slide", "batch_key=lane")
    moved = ad.AnnData(target.X, obs=target.obs, var=target.var, obsm=dict(target.obsm))
    data, target_counts, _ = problem(
        read_counts(moved, role="target"), read_counts(reference, role="reference", need_spatial=False), config, quiet
    )
    rows, columns = data.graph.nonzero()
    assert (rows % 2 == columns % 2).all()
    pair, spec = start(data, config, 0, quiet)
    assert spec.reference_batches == 2 and chains_of(pair)[0].guide.reference_mean.shape == (2, 20)
    assert not np.allclose(*(waves(replace(target_counts, xy=np.zeros((240, 2)) + 5), data.graph, config)[k] for k in (0, 1)))
    with pytest.raises(UserError, match="no obs column 'plate'"):
        prepared(world, settings("library_key=plate"))
    with pytest.raises(UserError, match="no obs column 'lane'"):
        new_cells(read_counts(world.target, role="target"), target_counts, data, config)


def test_anchor_genes_are_those_whose_pseudo_bulks_agree():
    world = spatial_field(seed=4, n_cells=600, n_reference=600, n_genes=30, n_panel=20, n_types=8, contrast=1.0, rho=5)
    target = read_counts(world.target, role="target")
    reference = read_counts(world.reference, role="reference", need_spatial=False).take_genes(target.genes)
    good = anchors(target, reference, "type")
    shuffled = reference.obs.assign(type=np.random.default_rng(0).permutation(reference.obs["type"]))
    assert good.mean() > 0.6 > 0.4 > anchors(target, replace(reference, obs=shuffled), "type").mean()


def test_refusals_name_what_is_wrong(world):
    nowhere = world.target.copy()
    del nowhere.obsm["spatial"]
    with pytest.raises(UserError, match="spatial"):
        ppl_st.fit("vista", target=nowhere, reference=world.reference, overrides=FAST)
    with pytest.raises(UserError, match="likelihood must be one of"):
        ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=["likelihood=nbb"])
    assert Config().graph == "prior"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("spatial", [0.9, 0.0])
def test_space_helps_where_there_is_some_and_intervals_cover(spatial):
    world = spatial_field(seed=0, n_cells=1500, n_reference=1000, n_genes=140, spatial=spatial, length=200.0)
    truth = world.truth.X.toarray()
    found = {}
    for graph in ("none", "prior", "posterior"):
        run = ppl_st.fit("vista", target=world.target, reference=world.reference, overrides=[f"graph={graph}"])
        table = run.predict(world.truth.var_names, draws=50, truth=world.truth)
        pcc = np.nanmean([np.corrcoef(table.layers["rate_mean"][:, g], truth[:, g])[0, 1] for g in range(truth.shape[1])])
        found[graph] = np.array([pcc, table.var["log_score"].mean(), table.var["coverage_90"].mean()])
    assert all(0.87 < value[2] < 0.93 for value in found.values()), found
    for graph in ("prior", "posterior"):
        if spatial:
            assert (found[graph][:2] > found["none"][:2]).all(), found
        else:
            assert (np.abs(found[graph] - found["none"])[:2] < 0.01).all(), found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_shuffled_reference_destroys_the_accuracy():
    world = spatial_field(seed=0, n_cells=1500, n_reference=1000)
    shuffled = world.reference.copy()
    rng = np.random.default_rng(0)
    dense = shuffled.X.toarray()
    dense[:, 60:] = dense[:, 60 + rng.permutation(140)]  # unmeasured genes exchange their names
    shuffled.X = dense
    accuracy = []
    for reference in (world.reference, shuffled):
        run = ppl_st.fit("vista", target=world.target, reference=reference, overrides=["graph=none"])
        rate = run.predict(world.truth.var_names, draws=20).layers["rate_mean"]
        table = score_table(world.truth.X, rate, np.asarray(world.target.X.sum(1)).ravel(), world.truth.var_names)
        accuracy.append(table["raw_partial_pcc"].mean())  # depth, also where it acts linearly, is real and stays
    # What all unmeasured genes have in common, their share of a cell's counts, is left: no name can take it away.
    assert accuracy[0] > 0.15 and abs(accuracy[1]) < accuracy[0] / 4, accuracy


def test_cosine_uncertainty_and_its_closed_form_agree_and_follow_noise():
    from ppl_st.models.vista.extras import cosine_uncertainty, cosine_uncertainty_closed_form

    rng = np.random.default_rng(0)
    mean = rng.gamma(2.0, 1.0, (600, 5)) * np.array([0.05, 0.3, 1.0, 5.0, 5.0])
    theta = np.array([2.0, 2.0, 2.0, 2.0, 0.2])
    draws = rng.poisson(mean * rng.gamma(theta, 1 / theta, (40, 600, 5)))
    wide, many = np.repeat(mean, 100, axis=1)[:20], np.repeat(theta, 100)  # cells over 500 genes
    sampled = cosine_uncertainty(wide, rng.poisson(wide * rng.gamma(many, 1 / many, (40, 20, 500))), of="cells")
    np.testing.assert_allclose(sampled, cosine_uncertainty_closed_form(wide, wide + wide**2 / many, of="cells"), atol=0.08)
    gene = cosine_uncertainty_closed_form(mean, mean + mean**2 / theta)
    assert (np.diff(gene[:4]) < 0).all() and gene[4] > gene[3]  # falls with the level, rises with the dispersion
    np.testing.assert_allclose(cosine_uncertainty(mean, draws), gene, atol=0.02)

"""Simulation-based calibration of every method under its own prior, at small sizes: name of a method -> {site: `Ranks`}.

What is drawn from the prior and what is held at a first fit's values is said in each function. Read by `test_sbc.py` (are the ranks uniform?) and
by `benchmarks/sbc.py` (the figure and the table of BENCHMARKS.md).
"""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from pyro import poutine
from scipy.special import logsumexp

from ppl_st.data import read_counts
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.svi import fit as run_svi
from ppl_st.models.common.counts import LARGEST, CountLayer, true_shares
from ppl_st.models.common.inner import learn_hyper
from ppl_st.prepare import load_prepare
from ppl_st.simulate import checkerboard, spatial_field
from ppl_st.testing.simulation import Ranks, simulation_ranks


def quiet(line):
    """Nothing."""


def select(found, columns):
    """Ranks of some quantities."""
    return Ranks(found.ranks[:, columns], found.z[:, columns], found.draws)


def problem(method, world, config):
    """The problem of a simulated pair."""
    spots = method == "siid"
    target, reference = read_counts(world.target, role="target"), read_counts(world.reference, role="reference", need_spatial=spots)
    return load_prepare(method).problem(target, reference, config, quiet)[0]


def halves(rate, left):
    """Log of the mean rate [n, g] over the rows in ``left`` [n], and over the others: [2 g]."""
    return torch.cat([rate[left].mean(0).log(), rate[~left].mean(0).log()]).double().numpy()


def spaim_layer():
    """Model and guide of one chain on 200 + 200 cells, 20 shared genes."""
    from ppl_st.models import spaim

    config = spaim.PRESETS["default"]
    data = problem("spaim", spatial_field(seed=1, n_cells=200, n_reference=200, n_genes=40, n_panel=20), config)
    return chains_of(spaim.start(data, config, 0, quiet)[0])[0]


def spaim(simulations=400, layer=None):
    """Weights of every direction on the two strongest features; noise and ratio are the fit's."""
    model, guide = layer or spaim_layer()
    strongest = torch.argsort(model.phi.square().sum(0))[-2:]

    def one(number):
        with torch.no_grad(), rng_scope(number, "simulate"):
            trace = poutine.trace(model).get_trace(None, observe=False)
            guide.scores.copy_(trace.nodes["scores"]["value"])
            drawn = guide.weights_dist().sample((99,))
        return trace.nodes["weights"]["value"][:, strongest].flatten().numpy(), drawn[:, :, strongest].flatten(1).numpy()

    kept = guide.scores.clone()
    found = simulation_ranks(one, simulations)
    guide.scores.copy_(kept)
    return {"SpaIM: weights": found}


def spagene(simulations=400, **settings):
    """Translator's weights of every direction on the two strongest features; signal over noise is drawn, noise a first fit's, both are estimated."""
    from ppl_st.models import spagene
    from ppl_st.models.spagene.closed import features
    from ppl_st.models.spagene.direction import Direction
    from ppl_st.models.spagene.model import direction_of

    config = replace(spagene.PRESETS["default"], **settings)
    data = problem("spagene", spatial_field(seed=1, n_cells=200, n_reference=200, n_genes=60, n_panel=40), config)
    pair, spec = spagene.start(data, config, 0, quiet)
    first = direction_of(chains_of(pair)[0], 0)
    columns, strongest = torch.from_numpy(data.columns), torch.argsort(first.phi[torch.from_numpy(data.panel)].square().sum(0))[-2:]
    other = features(first.other, data.panel)

    def one(number):
        with torch.no_grad(), rng_scope(number, "simulate"):
            trace, own = poutine.trace(first.story).get_trace(False), copy.deepcopy(first.own)
            own.decoder[-1].weight[columns] = trace.nodes["forward_identity"]["value"].T
        again = Direction("forward", data, own, first.other, other, spec.hypers[0], spec.ratios[0], spec.deviations[0], (), 0.0, 0)
        with torch.no_grad(), rng_scope(number, "draw"):
            drawn = torch.stack([again.posterior() for _ in range(99)])
        return trace.nodes["forward_translator"]["value"][:, strongest].flatten().numpy(), drawn[:, :, strongest].flatten(1).numpy()

    return {"SpaGene: translator": simulation_ranks(one, simulations)}


def count_layer(name, data, config, hyper, place, draw, fit, simulations):
    """Level, slope and theta of genes, new and measured; hyper-priors are learned anew from the simulated counts of inner genes.

    Places [n, q] are held; ``draw(rng)`` gives loadings [q, G] from the method's prior and ``fit(problem, genes, loadings)`` their posterior given
    those of the other shared genes. Counts of the shared genes follow the law of `ppl_st.models.common.counts` at the values ``hyper``. One more
    gene of the target, the same everywhere and 2,000 times as deep as the others together, makes a cell's total its depth (20 times are too few: the
    shared genes' own maps are then a part of it, and measured slopes come out flat). Levels are made to be per count of the
    shared genes. So what is ranked is what the layer infers; the directions of a method, found in the counts themselves, are not put to the test.
    """
    share, doubt = true_shares(data)
    measured, sites = np.isin(np.arange(len(share)), data.panel), ("log_gain", "slope", "log_theta")
    depth = data.totals[:, None]  # [n, 1]

    def one(number):
        rng = np.random.default_rng([number, 1])
        z = share + np.sqrt(doubt) * rng.standard_normal(len(share)) - hyper.center
        gain, slope, log_theta = (a + b * z + s * rng.standard_normal(len(z)) for a, b, s in (hyper.gain, hyper.slope, hyper.log_theta))
        gain, slope, loadings = gain - logsumexp(gain[data.panel]), slope.clip(0), draw(rng)
        grown = np.exp((slope * (place @ loadings)).clip(-LARGEST, LARGEST))
        rate = depth * np.exp(gain) * grown / (depth * grown).sum(0) * depth.sum()
        counts = np.zeros((len(depth), data.counts.shape[1] + 1), np.float32)
        counts[:, data.columns] = rng.poisson(rate * rng.gamma(np.exp(log_theta), np.exp(-log_theta), rate.shape))[:, data.panel]
        counts[:, -1:] = rng.poisson(2000 * depth)
        again = data._replace(counts=sp.csr_matrix(counts))
        learned = learn_hyper(again, config, number, quiet, lambda problem, genes: fit(problem, genes, loadings))
        layer = CountLayer(again, learned, len(loadings))
        layer.learn_own(again, lambda rows: place[rows], lambda genes: loadings[:, genes].astype(np.float32))
        with rng_scope(number, "draw"):
            traces = [poutine.trace(layer.globals).get_trace() for _ in range(99)]
        drawn = np.stack([np.concatenate([t.nodes[site]["value"].numpy() for site in sites]) for t in traces])
        return np.concatenate([gain, slope, log_theta]), drawn

    found, parts = simulation_ranks(one, simulations), {}
    for kind, genes in (("new", ~measured), ("measured", measured)):
        for k, site in enumerate(("level", "slope", "theta")):
            parts[f"{name}: {site}, {kind} genes"] = select(found, len(share) * k + np.flatnonzero(genes))
    return parts


class Held(NamedTuple):
    """A fit with known places, as `learn_hyper` wants it."""

    closed: Any  # codes() gives the inner genes' loadings
    known: np.ndarray  # [n, q]

    def codes(self):
        """Loadings of the inner genes."""
        return self.closed.codes()

    def place(self, data):
        """[n, q]."""
        return self.known


def coherent(hyper, slope):
    """A first fit's values without a bend and with slopes near ``slope``, where the loadings of simulated log-normalised counts are those drawn.

    The methods take loadings of log-normalised counts for those of the map. Steeper slopes make them larger, and e and the slopes share the factor.
    """
    return hyper._replace(slope=(slope, 0.0, 0.25), bend=0.0)


def gene_world():
    """Target and reference of the count layers: 200 + 200 cells, 20 of 40 genes shared, deep."""
    return spatial_field(seed=1, n_cells=200, n_reference=200, n_genes=40, n_panel=20, n_types=3, platform_sd=0.3, rho=10.0)


def spaim_genes(simulations=160, slope=0.9):
    """`count_layer` under SpaIM's prior of loadings; places, signal and noise are a first fit's, without process and regression. At slopes of .9 the
    doubt e, which is 1 in this world, is learned as 1.00 on average."""
    from ppl_st.models import spaim
    from ppl_st.models.spaim.kernel import SELF
    from ppl_st.models.spaim.model import Layer

    config = replace(spaim.PRESETS["default"], process=0.0, smoothing=0.0, regression=0.0, depth_prior=0.0)
    data = problem("spaim", gene_world(), config)
    pair, spec = spaim.start(data, config, 0, quiet)
    model, guide = chains_of(pair)[0]
    config = replace(config, lengthscale=spec.lengthscale)
    noise, ratio = model.log_noise.detach().exp().double().numpy(), model.log_ratio.detach().exp().double().numpy()
    phi, genes = model.features.double().numpy(), np.arange(len(model.features))
    left = np.where(np.isin(genes, data.panel), 0, (SELF - np.square(phi).sum(1)).clip(0))  # of a new gene's features

    def draw(rng):
        weights = np.sqrt(ratio * noise)[:, None] * rng.standard_normal((len(noise), phi.shape[1]))
        return weights @ phi.T + np.sqrt(np.outer(noise, 1 + 0 * left) + np.outer(ratio * noise, left)) * rng.standard_normal((len(noise), len(phi)))

    place = guide.place(data, np.arange(data.counts.shape[0]))

    def fit(problem, inner, loadings):
        layer = Layer(problem, config, 0, genes=inner)
        layer.scores, layer.ratio, layer.noise, layer.regressed = loadings[:, problem.panel], ratio, noise, np.zeros((len(noise), len(inner)))
        return Held(layer, place)

    return count_layer("SpaIM", data, config, coherent(spec.hyper, slope), place, draw, fit, simulations)


def spagene_genes(simulations=160, slope=1.1):
    """`count_layer` under the prior of SpaGene's translator; places, signal and noise are a first fit's, the latter two estimated anew. e is learned
    as .87; at slopes of 1.7 as .99, but exp(slope f) is then far from a standardised log-normalised count."""
    from ppl_st.models import spagene
    from ppl_st.models.spagene.closed import Closed, features
    from ppl_st.models.spagene.model import direction_of

    config = replace(spagene.PRESETS["default"], process=0.0, smoothing=0.0, reference_share=0.0, depth_prior=0.0)
    data = problem("spagene", gene_world(), config)
    pair, spec = spagene.start(data, config, 0, quiet)
    first = direction_of(chains_of(pair)[0], 0)
    noise, ratio = first.log_noise.detach().exp().double().numpy(), first.log_ratio.detach().exp().double().numpy()
    other = features(first.other, data.panel)
    place = first.place(data, np.arange(data.counts.shape[0]))

    def draw(rng):
        weights = np.sqrt(ratio * noise)[:, None] * rng.standard_normal((len(noise), other.phi.shape[1]))
        return weights @ other.phi.T + np.sqrt(noise)[:, None] * rng.standard_normal((len(noise), len(other.phi)))

    def fit(problem, inner, loadings):
        known = torch.zeros(problem.counts.shape[1], len(noise), dtype=torch.float64)
        known[problem.columns] = torch.from_numpy(loadings[:, problem.panel].T)
        own = SimpleNamespace(loadings=known, scale=torch.zeros(len(noise)))  # cells are placed without a doubt
        return Held(Closed(problem, own, other, spec.ratios[0], inner), place)

    return count_layer("SpaGene", data, config, coherent(spec.hypers[0], slope), place, draw, fit, simulations)


def siid(simulations=20):
    """phi, theta and expected counts of 10 measured genes and 2 new ones, 300 cells; all sites are drawn from the prior.

    Profiles xi can change places, and their level is phi's; what profiles, phi and activities say together is ranked: the log of a gene's expected
    counts, mean over the cells of the left and of the right half of the tissue.
    """
    from ppl_st.models import siid
    from ppl_st.models.siid.model import sides

    world = checkerboard(seed=3, n_cells=300, side=5, squares=5, n_types=2, n_genes=12, n_panel=10, contrast=1.0)
    default = siid.PRESETS["default"]
    config = replace(
        default, factors=2, chains=1, sparsity=0.0, regional=False, sweeps=10, loading_scale=1.0, concentration=0.5, batch_spots=0,
        fit=replace(default.fit, steps=60, lr=0.02),
    )  # fmt: skip
    data = problem("siid", world, config)
    pair, spec = siid.start(data, config, 0, quiet)
    model, _ = sides(chains_of(pair)[0])
    batch, sites, genes = siid.Batches(data, 0, 0).at(0), ("log_phi", "log_theta"), torch.arange(12)
    x = torch.from_numpy(np.asarray(world.target.obsm["spatial"])[:, 0])
    left = x < x.median()  # [n]

    def placed(values, rows, shape):
        counts = np.zeros(shape, np.float32)
        counts[rows.numpy()] = (values if values.layout == torch.strided else values.to_dense()).numpy()
        return sp.csr_matrix(counts)

    def one(number):
        with torch.no_grad(), rng_scope(number, "simulate"):
            made = {name: site["value"] for name, site in poutine.trace(model).get_trace(batch, observe=False).nodes.items() if "value" in site}
        cells, spots = placed(made["x"], batch.cells, data.counts.shape), placed(made["v"], batch.spots, data.spot_counts.shape)
        simulated = data._replace(counts=cells, spot_counts=spots)
        fitted, _ = siid.start(simulated, config, number, quiet)
        run_svi(fitted, siid.batches(simulated, config, number), replace(config.fit, seed=number), scale=1 / 3000, progress="quiet")
        drawn = draw_globals(chains_of(fitted), 99, number)
        predictor = siid.Predictor(fitted, simulated, config, spec)
        own = next(iter(predictor.blocks(1000)))
        local, functions = predictor.local(own, 0), []
        for d, one_draw in enumerate(drawn):
            with torch.no_grad(), rng_scope(number, "local", d):
                functions.append(halves(predictor.count_dist(own, 0, one_draw, local, genes).mean, left[predictor.rows(own)]))
        truth = halves(model.count_dist(made, made["activity"], genes, None).mean, left[batch.cells])
        sampled = [np.concatenate([*(one_draw[s].numpy() for s in sites), f]) for one_draw, f in zip(drawn, functions, strict=True)]
        return np.concatenate([*(made[s].numpy() for s in sites), truth]), np.stack(sampled)

    found = simulation_ranks(one, simulations)
    measured = np.isin(np.arange(12), spec.panel)
    return {
        "SIID: phi, theta of new genes": select(found, np.flatnonzero(np.tile(~measured, 2))),
        "SIID: phi, measured genes": select(found, np.flatnonzero(np.r_[measured, 0 * measured])),
        "SIID: theta, measured genes": select(found, np.flatnonzero(np.r_[0 * measured, measured])),
        "SIID: counts of a half, new genes": select(found, 24 + np.flatnonzero(np.tile(~measured, 2))),
        "SIID: counts of a half, measured genes": select(found, 24 + np.flatnonzero(np.tile(measured, 2))),
    }


def vista(simulations=20):
    """Gain, slope, theta of new genes, and of 4 hidden panel genes whose counts are drawn given the states that the other 4 say."""
    from ppl_st.models import vista
    from ppl_st.models.vista.model import sides

    world = spatial_field(seed=3, n_cells=200, n_reference=150, n_genes=16, n_panel=8, n_types=3, states=2)
    default = vista.PRESETS["default"]
    config = replace(default, graph="none", latent=3, batch_cells=0, batch_reference=0, fit=replace(default.fit, steps=200, lr=0.05))
    data = problem("vista", world, config)
    first, spec = vista.start(data, config, 0, quiet)
    model, guide = sides(chains_of(first)[0])
    seen = torch.arange(8) < 4
    batch, sites = vista.Batches(data, 0, 0, 0).of(np.arange(200))._replace(visible=seen), ("log_gain", "slope", "log_theta")

    class Whole:
        def __init__(self, batch):
            self.batch = batch

        def __len__(self):
            return 1

        def at(self, step):
            return self.batch

    def one(number):
        with torch.no_grad(), rng_scope(number, "simulate"):
            loc, scale = guide.states(batch)
            trace = poutine.trace(poutine.condition(model, {"z": loc + scale * torch.randn_like(loc)})).get_trace(batch, observe=False)
            made = {name: site["value"] for name, site in trace.nodes.items() if "value" in site}
        with rng_scope(number, "build"):
            fitted = vista.build(config, spec)
        vista.initialise(fitted, data, number, 0)
        counts = torch.where(seen, batch.counts, made["x"])
        run_svi(fitted, Whole(batch._replace(counts=counts)), replace(config.fit, seed=number), scale=1 / 1600, progress="quiet")
        drawn = draw_globals([fitted], 99, number)
        return np.concatenate([made[s].numpy() for s in sites]), np.stack([np.concatenate([d[s].numpy() for s in sites]) for d in drawn])

    found = simulation_ranks(one, simulations)
    genes = len(world.reference.var_names)
    parts = {"VISTA: gain, slope, theta of new genes": select(found, np.flatnonzero(np.tile(~np.isin(np.arange(genes), spec.panel), 3)))}
    for k, site in enumerate(("gain", "slope", "theta")):
        parts[f"VISTA: {site}, hidden panel genes"] = select(found, genes * k + np.array(spec.panel)[4:])
    return parts


def xfuse(simulations=20):
    """Expected counts of 8 genes on either half of a section, and their log-odds; every latent site is drawn, parameters are a first fit's.

    Metagenes can change places and mix, their weights with them; a gene's level effect is confounded with its baseline and its mean over metagenes,
    its log-odds effect with the baseline log-odds. Sums are identified: what they say of a place, and u + F, the log of variance over mean less 1.
    Each fit learns all parameters anew.
    """
    from ppl_st.models import xfuse
    from ppl_st.models.xfuse.model import sides
    from ppl_st.models.xfuse.patches import aggregate
    from xfuse_sections import data_of, section, settings

    config = settings("patch=64", "metagenes=2", "image_weight=0", "augment='none'", "batch_patches=1", "fit.steps=300")
    own = section(size=(64, 64), genes=8, virtual=False)  # zeros off the tissue are no draw from the model
    data = data_of(own, levels=("a",))

    def fitted(data, seed):
        pair, spec = xfuse.start(data, config, seed, quiet)
        run_svi(pair, xfuse.batches(data, config, seed), replace(config.fit, seed=seed), scale=1 / 200, progress="quiet")
        for side in pair:
            side.eval()
        return pair, spec

    pair, spec = fitted(data, 0)
    model, _ = sides(chains_of(pair)[0])
    whole, genes = xfuse.batches(data, config, 0).at(0), torch.arange(8)
    left = torch.from_numpy(own.centers[:, 0] < 32)

    def one(number):
        with torch.no_grad(), rng_scope(number, "simulate"):
            nodes = poutine.trace(model).get_trace(whole, observe=False).nodes
            made = {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}
            features = model.decode([made[f"z{i}"] for i in range(config.depth)], 64, 64)
            summed = aggregate(model.decoded(made, whole, features), whole.location, len(whole.weight))
            rate = model.count_dist(made, summed, spec.codes[0], genes).mean
        rows, simulated = whole.rows.numpy(), np.zeros(own.counts.shape, np.float32)
        drawn = made["counts_0"]
        simulated[rows] = (drawn if drawn.layout == torch.strided else drawn.to_dense()).numpy()
        everywhere = torch.zeros(own.counts.shape)
        everywhere[rows] = rate
        truth = np.concatenate([halves(everywhere, left), model.loadings(made, spec.codes[0])[1].detach().double().numpy()])
        again = data._replace(sections=(own._replace(counts=sp.csr_matrix(simulated)),))
        new, sizes = fitted(again, number)
        fresh, _ = sides(chains_of(new)[0])
        predictor = xfuse.Predictor(new, again, config, sizes)
        batch = next(iter(predictor.blocks(1000)))
        local, means = predictor.local(batch, 0), []
        for d, one_draw in enumerate(draw_globals(predictor.chains, 99, number)):
            with torch.no_grad(), rng_scope(number, "local", d):
                mean = halves(predictor.count_dist(batch, 0, one_draw, local, genes).mean, left)
                means.append(np.concatenate([mean, fresh.loadings(one_draw, sizes.codes[0])[1].double().numpy()]))
        return truth, np.stack(means)

    found = simulation_ranks(one, simulations)
    return {"XFuse: expected counts of a half": select(found, slice(16)), "XFuse: log-odds": select(found, slice(16, None))}


METHODS = {
    "siid": siid, "vista": vista, "spaim": spaim, "spaim_genes": spaim_genes, "spagene": spagene, "spagene_genes": spagene_genes, "xfuse": xfuse,
}  # fmt: skip

"""Simulation-based calibration of every method under its own prior, at small sizes: name of a method -> {site: `Ranks`}.

What is drawn from the prior and what is held at a first fit's values is said in each function. Read by `test_sbc.py` (are the ranks uniform?) and
by `benchmarks/sbc.py` (the figure and the table of BENCHMARKS.md).
"""

import copy
from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
from pyro import poutine

from ppl_st.data import read_counts
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.svi import fit as run_svi
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


def siid(simulations=20):
    """phi and theta of 10 measured genes and 2 new ones, 300 cells; all sites are drawn from the prior."""
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
    batch, sites = siid.Batches(data, 0, 0).at(0), ("log_phi", "log_theta")

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
        return np.concatenate([made[s].numpy() for s in sites]), np.stack([np.concatenate([d[s].numpy() for s in sites]) for d in drawn])

    found = simulation_ranks(one, simulations)
    measured = np.isin(np.arange(12), spec.panel)
    return {
        "SIID: phi, theta of new genes": select(found, np.flatnonzero(np.tile(~measured, 2))),
        "SIID: phi, measured genes": select(found, np.flatnonzero(np.r_[measured, 0 * measured])),
        "SIID: theta, measured genes": select(found, np.flatnonzero(np.r_[0 * measured, measured])),
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
    """Expected counts of 8 genes on the left and on the right half of a section; every latent site is drawn, parameters are a first fit's.

    Metagenes can change places and mix, so they are no quantities to rank; what they say of a place is. Each fit learns all parameters anew.
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

    def halves(rate):
        return torch.cat([rate[left].mean(0).log(), rate[~left].mean(0).log()]).double().numpy()

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
        truth = torch.zeros(own.counts.shape)
        truth[rows] = rate
        again = data._replace(sections=(own._replace(counts=sp.csr_matrix(simulated)),))
        new, sizes = fitted(again, number)
        predictor = xfuse.Predictor(new, again, config, sizes)
        batch = next(iter(predictor.blocks(1000)))
        local, means = predictor.local(batch, 0), []
        for d, one_draw in enumerate(draw_globals(predictor.chains, 99, number)):
            with torch.no_grad(), rng_scope(number, "local", d):
                means.append(halves(predictor.count_dist(batch, 0, one_draw, local, genes).mean))
        return halves(truth), np.stack(means)

    return {"XFuse: expected counts of a half": simulation_ranks(one, simulations)}


METHODS = {"siid": siid, "vista": vista, "spaim": spaim, "spagene": spagene, "xfuse": xfuse}

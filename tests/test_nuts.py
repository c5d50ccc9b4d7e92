"""The SVI answer beside NUTS on problems small enough for it: where a guide is right, where it is not, and by how much (RECORD.md).

SpaIM's exact layer is held against NUTS in `test_sbc.py`; SpaGene's translator is the same algebra.
"""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from sbc_methods import problem, quiet

from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.svi import fit as run_svi
from ppl_st.simulate import checkerboard, spatial_field

torch.set_num_threads(1)
pytestmark = pytest.mark.slow
DRAWS = 400


def nuts(model, start, samples, warmup):
    with rng_scope(0, "nuts"):
        kernel = NUTS(model, init_strategy=init_to_value(values=start), max_tree_depth=7)
        chain = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
        chain.run()
    return chain.get_samples()


def compared(name, exact, found):
    """(root mean square of the difference of means in exact sds, median ratio of sds: SVI / NUTS); printed."""
    sd = exact.std(0)
    off, ratio = float(((found.mean(0) - exact.mean(0)) / sd).square().mean().sqrt()), float((found.std(0) / sd).median())
    print(f"{name}: means differ by {off:.2f} sd, sd ratio {ratio:.2f}")
    return off, ratio


def test_siid():
    """40 cells x 7 of 10 genes, 9 spots, 2 factors. Rates are right; phi is too sure, theta of measured genes a point by design."""
    from ppl_st.models import siid
    from ppl_st.models.siid.model import sides

    world = checkerboard(seed=3, n_cells=40, side=3, squares=3, n_types=2, n_genes=10, n_panel=7, contrast=1.0)
    default = siid.PRESETS["default"]
    config = replace(
        default, factors=2, chains=1, sparsity=0.0, regional=False, sweeps=30, loading_scale=1.0, concentration=0.5, batch_spots=0,
        fit=replace(default.fit, steps=200, lr=0.02),
    )  # fmt: skip
    data = problem("siid", world, config)
    pair, _ = siid.start(data, config, 0, quiet)
    run_svi(pair, siid.batches(data, config, 0), config.fit, scale=1 / 280, progress="quiet")
    chain = chains_of(pair)[0]
    model, guide = sides(chain)
    batch, measured = siid.Batches(data, 0, 0).at(0), guide.measured > 0
    local, drawn = guide.local_posterior(batch, 60), draw_globals([chain], DRAWS, 0)
    start = {"xi": guide.xi_loc, "activity": local.activity.clamp_min(1e-3), "capture": local.capture}
    start |= {"log_phi": torch.where(measured, guide.log_phi_loc, guide.phi_loc)}
    start |= {"log_theta": torch.where(measured, guide.log_theta_loc, guide.log_theta_prior)}
    exact = nuts(lambda: model(batch), {name: value.detach() for name, value in start.items()}, 120, 80)

    def rates(xi, log_phi, activity):
        return activity @ model.loadings(torch.softmax(xi, -1), log_phi)[0]

    with torch.no_grad(), rng_scope(0, "activities"):
        law = torch.distributions.Gamma(local.shape, local.rate)
        ours = torch.stack([rates(one["xi"], one["log_phi"], law.sample()) for one in drawn])
    theirs = torch.stack([rates(*one) for one in zip(exact["xi"], exact["log_phi"], exact["activity"], strict=True)])
    for name, genes in (("measured", measured), ("new", ~measured)):
        assert np.corrcoef(ours[..., genes].mean(0).flatten(), theirs[..., genes].mean(0).flatten())[0, 1] > 0.98
        off, ratio = compared(f"SIID, rates of {name} genes", theirs[..., genes], ours[..., genes])
        assert off < 0.8 and 0.6 < ratio < 1.3
    sites = {name: torch.stack([one[name] for one in drawn]) for name in ("log_phi", "log_theta")}
    _, phi = compared("SIID, log phi of measured genes", exact["log_phi"][:, measured], sites["log_phi"][:, measured])
    assert 0.3 < phi < 0.9
    compared("SIID, log theta of measured genes", exact["log_theta"][:, measured], sites["log_theta"][:, measured])
    off, new = compared("SIID, log phi of new genes", exact["log_phi"][:, ~measured], sites["log_phi"][:, ~measured])
    assert off < 0.6 and 0.7 < new < 1.4


def test_vista():
    """120 cells, 4 of 8 panel genes hidden. The guide keeps what the visible genes say of the states, NUTS lets the hidden counts speak too."""
    from ppl_st.models import vista
    from ppl_st.models.vista.model import sides

    world = spatial_field(seed=3, n_cells=120, n_reference=150, n_genes=16, n_panel=8, n_types=3, states=2)
    default = vista.PRESETS["default"]
    config = replace(default, graph="none", latent=3, batch_cells=0, batch_reference=0, fit=replace(default.fit, steps=200, lr=0.05))
    data = problem("vista", world, config)
    pair = chains_of(vista.start(data, config, 0, quiet)[0])[0]
    model, guide = sides(pair)
    seen = torch.arange(8) < 4
    batch = vista.Batches(data, 0, 0, 0).of(np.arange(120))._replace(visible=seen)

    class Whole:
        def __len__(self):
            return 1

        def at(self, step):
            return batch

    run_svi(pair, Whole(), config.fit, scale=1 / 960, progress="quiet")
    with torch.no_grad():
        loc, scale = guide.states(batch)
    hidden, new = model.panel[~seen], torch.ones(16, dtype=torch.bool).index_fill(0, model.panel, False)
    depth, usual, drawn = batch.total[: len(loc)].log(), batch.usual.log(), draw_globals([pair], DRAWS, 0)

    def posterior():
        """p(sites, states | hidden counts), states a priori as the visible genes say."""
        sites = model.globals()
        z = pyro.sample("z", dist.Normal(loc, scale).to_event(2))
        law = model.likelihood(model.log_rate(sites, z, depth, usual, hidden).exp(), {name: value[hidden] for name, value in sites.items()})
        pyro.sample("x", law.to_event(2), obs=batch.counts[:, ~seen])

    exact = nuts(posterior, {**drawn[0], "z": loc}, 150, 100)
    found = {}
    for site in ("log_gain", "slope", "log_theta"):
        ours = torch.stack([one[site] for one in drawn])
        found[site] = compared(f"VISTA, {site} of hidden panel genes", exact[site][:, hidden], ours[:, hidden])
        off, ratio = compared(f"VISTA, {site} of new genes", exact[site][:, new], ours[:, new])
        assert off < 0.5 and 0.75 < ratio < 1.3
    assert exact["slope"][:, hidden].mean() > torch.stack([one["slope"] for one in drawn])[:, hidden].mean()  # ours are attenuated
    assert found["slope"][0] > 1 and found["log_theta"][0] > 1

"""SIID's model and guide as a pair: sites and parameters of every variant, simulation, start, order of cells."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch

from ppl_st.inference.svi import FitConfig
from ppl_st.inference.svi import fit as run_svi
from ppl_st.models import siid
from ppl_st.models.siid.activity import aggregate
from ppl_st.models.siid.batches import Batches
from ppl_st.models.siid.model import PRESETS
from ppl_st.testing import check_pair
from seeded import own_seed
from siid_problems import default_pair, tiny, traces

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)
VARIANTS = {
    "default": ("default", {}),
    "labels and sparsity": ("default", {"label_weight": 1.0, "sparsity": 0.1}),
    "poisson": ("default", {"likelihood": "poisson"}),
    "zinb": ("default", {"likelihood": "zinb"}),
    "platform none": ("default", {"platform": "none", "capture_concentration": float("inf")}),
    "platform paper": ("default", {"platform": "paper"}),
    "delta": ("default", {"posterior": "delta"}),
    "paper": ("paper", {}),
}


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])  # the sparse and the dense way of observing counts
def test_the_pair_obeys_the_laws_of_the_kit(likelihood):
    """Sites and plates agree, minibatches are unbiased, what is simulated fits its own likelihood."""
    data = tiny(soft=False)
    config = replace(PRESETS["default"], factors=3, chains=1, sweeps=3, sparsity=0.0, likelihood=likelihood)
    pair, _ = siid.start(data, config, 0, lambda line: None)
    assert check_pair(pair, Batches(data, 1, 0), Batches(data, 0, 0).at(0)) == {}


@pytest.mark.parametrize("variant", VARIANTS)
def test_sites_agree_and_no_parameter_appears(variant):
    preset, settings = VARIANTS[variant]
    config = replace(PRESETS[preset], factors=3, chains=2, sweeps=3, **settings)
    config = replace(config, fit=FitConfig(steps=3, lr=0.01))
    data = tiny()
    if config.label_weight:
        data = data._replace(labels=np.arange(24) % 4 - 1)
    pair, spec = siid.start(data, config, 0, lambda line: None)
    before = {side: set(dict(module.named_parameters())) for side, module in zip(("model", "guide"), pair, strict=True)}
    batch = Batches(data, 2, 0).at(0)
    with pyro.validation_enabled(True):
        model, guide = traces(pair, batch)
    latent = {name for name in model.stochastic_nodes if not model.nodes[name]["is_observed"]}
    plates = {"chain0/cells", "chain1/cells", "chain0/spots", "chain1/spots"}
    assert latent - plates == set(guide.stochastic_nodes) - plates and len(latent) > len(plates)
    _, info = run_svi(pair, Batches(data, 2, 0), config.fit, scale=1e-3)
    assert before == {
        side: set(dict(module.named_parameters())) for side, module in zip(("model", "guide"), pair, strict=True)
    }
    assert not before["model"] and not list(pyro.get_param_store()) and not info.skipped
    # a platform factor that is fixed has nothing to train; everything else must have moved
    allowed = (
        ("log_phi_loc", "log_phi_log_scale")
        if config.platform == "none"
        else ("log_phi_log_scale",)
        if config.platform == "paper"
        else ()
    )
    assert all(name.endswith(allowed) for name in info.untrained) if allowed else info.untrained == ()
    restored = siid.spec_from(siid.spec_to(spec))
    assert restored == spec


def test_simulating_forward_draws_counts():
    data = tiny()
    pair, _ = default_pair(data)
    out = pair.model(Batches(data, 2, 0).at(0), observe=False)
    assert out["x"].shape[1] == 7 and out["v"].shape[1] == 12 and (out["x"] == out["x"].floor()).all()


def test_paper_platform_starts_where_em_ended():
    """Q is on the cells' scale there, on the spots' scale elsewhere: the same EM must give the same means."""
    data = tiny(2, n=60, s=9, genes=20, panel=12)
    means = {}
    for platform in ("hierarchical", "paper"):
        pair, _ = default_pair(data, platform=platform)
        drawn = {
            "xi": pair.guide.xi_loc.detach(),
            "log_phi": pair.guide.log_phi_loc.detach() * pair.model.measured,
        }
        cells, spots = pair.model.loadings(torch.softmax(drawn["xi"], -1), drawn["log_phi"])
        local = pair.guide.local_posterior(Batches(data, 0, 0).at(0), 60)
        mixed = aggregate(Batches(data, 0, 0).at(0), local.capture[:, None] * local.activity)
        means[platform] = torch.cat([(local.activity @ cells[:, data.panel]).flatten(), (mixed @ spots).flatten()])
    a, b = means["hierarchical"].detach(), means["paper"].detach()
    assert float(np.corrcoef(a, b)[0, 1]) > 0.99 and float((a - b).abs().mean() / a.mean()) < 0.1


def test_local_posterior_only_permutes_with_cells():
    data = tiny(soft=False)
    pair, _ = default_pair(data)
    order = np.random.default_rng(0).permutation(24)
    moved = data._replace(counts=data.counts[order], mapping=data.mapping[order], cell_xy=data.cell_xy[order])
    one, two = (pair.guide.local_posterior(Batches(d, 0, 0).at(0), 18) for d in (data, moved))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(b, a[order], rtol=1e-3, atol=1e-4)

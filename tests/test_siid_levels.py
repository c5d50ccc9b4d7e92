"""SIID's levels: predictions sum to the counts, whatever the share of genes with few counts and whatever the likelihood."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ppl_st.inference.ensemble import ensemble
from ppl_st.models import siid
from ppl_st.models.siid.batches import Batches, Data
from seeded import own_seed
from siid_problems import default_pair

torch.set_num_threads(1)
_own_seed = pytest.fixture(own_seed, autouse=True)
RARE = 2000  # genes that share a third of the spots' counts


def many_rare_genes():
    """Two types of cells, 20 panel genes, 2,000 genes with a few counts each in all spots together."""
    rng = np.random.default_rng(0)
    n, s, panel = 200, 20, 20
    share = np.r_[np.full(panel, 0.65 / panel), np.full(RARE, 0.35 / RARE)]
    profiles = share * np.exp(rng.normal(0, 0.5, (2, len(share))))
    profiles /= profiles.sum(1, keepdims=True)
    spot = np.arange(n) % s
    mean = 100 * profiles[(np.arange(n) < n // 2).astype(int)]
    mapping = sp.csr_matrix((np.ones(n, np.float32), (np.arange(n), spot)), shape=(n, s))
    counts = sp.csr_matrix(rng.poisson(mean[:, :panel]), dtype=np.float32)
    spots = sp.csr_matrix(rng.poisson(0.5 * (mapping.T @ mean)), dtype=np.float32)
    xy = np.c_[spot, np.zeros(n)].astype(float)
    return Data(counts, spots, mapping, np.arange(panel), xy, np.c_[np.arange(s), np.zeros(s)].astype(float))


def test_levels_do_not_sink_where_most_genes_have_few_counts():
    """Activities were solved at softmax(xi_loc), which takes from genes with few counts what E exp(xi) has: all rates 9 % too low here."""
    data = many_rare_genes()
    pair, config = default_pair(data, factors=3)
    guide = pair.guide
    drawn = torch.stack([torch.softmax(guide.globals()[0], -1) for _ in range(60)]).mean(0).detach()  # [h, G] posterior mean profiles
    activity = guide.local_posterior(Batches(data, 0, 0).at(0), config.predict_steps).activity
    rates = activity @ drawn * torch.exp(-guide.log_phi_loc.detach())
    assert float(rates[:, data.panel].sum()) / data.counts.sum() == pytest.approx(1, abs=0.01)
    found = siid.proportions(ensemble([pair]), data, config, 1, 0)[1]
    np.testing.assert_allclose(found[:, data.panel].sum(1), drawn[:, data.panel].sum(1).numpy(), rtol=0.02)

"""From maps to counts, without a fit: levels of genes of rare cells, hyper-priors within their grids, measured genes that show little."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import truncnorm

from ppl_st.inference.hyperpriors import within
from ppl_st.models import vista
from ppl_st.models.common.counts import CountLayer, Hyper
from ppl_st.models.common.predictor import Kept, MapPredictor

SLOPE, LOG_THETA = (1.2, 0.0, 0.3), (0.7, 0.0, 0.5)
HYPER = Hyper(0.0, 0.0, 1.0, 0.0, 0.0, (0.0, 1.0, 0.3), (0.0, 0.0, 0.0), SLOPE, LOG_THETA, 0.0, [])


def problem(counts):
    genes = np.arange(counts.shape[1])
    return SimpleNamespace(
        counts=sp.csr_matrix(counts.astype(np.float32)), columns=genes, panel=genes, totals=counts.sum(1).astype(np.float64),
        relative=np.ones(len(counts)), log_share=np.zeros(len(genes)), share_variance=np.full(len(genes), 0.01),
    )  # fmt: skip


@pytest.mark.parametrize("loc", [0.0, 5.55, 6.4, 12.0, -4.0, -9.0])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_a_hyper_prior_means_what_was_learned_on_its_grid(loc, scale):
    """Near Poisson noise log theta was learned as "above 4" and drawn as 5.5 +- 2: intervals of deep spots were too short."""
    mean, sd = within(torch.tensor([loc]), torch.tensor([scale]), -3.0, 5.0)
    law = truncnorm((-3 - loc) / scale, (5 - loc) / scale, loc, scale)
    assert mean.item() == pytest.approx(law.mean(), rel=1e-5, abs=1e-5) and sd.item() == pytest.approx(law.std(), rel=1e-4)


def test_far_from_its_grid_a_hyper_prior_is_the_grids_end():
    """Of many standard deviations, too, where a normal distribution function is 0 or 1 in 64 bits."""
    loc = torch.tensor([60.0, 12.0, 1e4, -60.0, -9.0, -1e4])
    mean, sd = within(loc, torch.tensor([0.5, 0.3, 0.01, 0.5, 0.3, 0.01]), -3.0, 5.0)
    np.testing.assert_allclose(mean, [5.0] * 3 + [-3.0] * 3, atol=0.02)
    assert (sd < 0.05).all() and torch.isfinite(sd).all()


def test_markers_of_rare_types_keep_their_level_in_many_cells():
    """c_g was a mean over 1,000 cells, 5 of a type of .5%: totals of its markers were off by up to a factor 2."""
    rng = np.random.default_rng(0)
    kind = rng.integers(200, size=40_000)  # six of 200 types have markers
    place = np.stack([(kind == k) - 1 / 200 for k in range(6)], 1).astype(np.float32) / np.sqrt(1 / 200)
    loadings, slope = 0.35 * np.eye(6, dtype=np.float32), 1.0
    layer = CountLayer(problem(rng.poisson(5.0, (40_000, 6))), HYPER, 6)
    layer.learn_own(problem(rng.poisson(5.0, (40_000, 6))), lambda rows: place[rows], lambda genes: loadings[:, genes])
    grown = np.exp(slope * place @ loadings)
    level = layer.weight.numpy() @ np.exp(slope * layer.sample.numpy() @ loadings)
    assert grown[kind == 0, 0].mean() > 100  # nearly all of a marker is in its type
    off = np.log(level / grown.mean(0))
    assert np.abs(off).max() < 0.2, off


def test_markers_of_rare_types_keep_their_level_in_vista():
    """Its table was a mean over 2,000 cells; and where slope x score is beyond what a rate may be, rates and table agree on that."""
    rng = np.random.default_rng(0)
    kind = rng.integers(200, size=40_000)
    place, ones = np.stack([(kind == k) - 1 / 200 for k in range(6)], 1) / np.sqrt(1 / 200), torch.ones(6)
    counts = sp.csr_matrix(rng.poisson(5.0, (40_000, 6)).astype(np.float32))
    hyper = SimpleNamespace(mix=0.0, bend=0.0, share=0.0)
    model = SimpleNamespace(
        spec=SimpleNamespace(hyper=hyper), process=None, decoder=0.35 * torch.eye(6), own=ones, beside=0 * ones, center=0 * ones,
        exponents=lambda: ones, level=torch.zeros(6), parent=torch.arange(6),
    )  # fmt: skip
    data = SimpleNamespace(counts=counts, measured=counts, usual=np.full(40_000, 30.0))
    guide = SimpleNamespace(log_scale=torch.full((6,), -5.0))
    table = vista._levels(model, guide, data, SimpleNamespace(depth=30.0), lambda rows: place[rows], np.random.default_rng(0))
    model.levels = torch.from_numpy(table).float()
    log_total = torch.from_numpy(counts.toarray().sum(1)).log()
    for slope, allowed in ((1.0, 0.3), (2.0, 0.4)):
        score = torch.from_numpy(place).float() @ model.decoder
        rate = vista.Model.log_rate_at(model, {"slope": slope * ones}, score, log_total, log_total * 0 + np.log(30.0), torch.arange(6)).exp()
        off = (rate.sum(0) / log_total.exp().sum()).log()
        assert off.abs().max() < allowed, off
    assert (2 * score).max() > 9  # clamped at 8


def test_draws_of_many_genes_are_made_once_for_all_blocks_of_cells():
    """With 1,024 genes and 500 places the draws were thrown away before the next block of cells asked for them."""
    made = []
    counts = np.ones((4, 1024))
    layer = CountLayer(problem(counts), HYPER, 500)

    def codes(drawn, genes):
        made.append(int(drawn["gene_key"]))
        return torch.zeros(1, 1).expand(500, len(genes))

    guide = SimpleNamespace(
        counts=layer, codes=codes, mean_codes=lambda genes: (torch.zeros(500, len(genes)), torch.zeros(500, len(genes))),
        cell_noise=lambda genes: None, place=lambda data, rows: np.ones((len(rows), 500), np.float32),
    )  # fmt: skip
    predictor = MapPredictor([None], [guide], problem(counts), 0.0, "poisson")
    drawn = [{"log_gain": layer.log_gain_loc, "slope": layer.slope_loc, "gene_key": torch.tensor(d)} for d in range(100)]
    for batch in predictor.blocks(2):
        local = predictor.local(batch, 0)
        for one in drawn:
            predictor.count_dist(batch, 0, one, local, torch.arange(1024))
    assert made == list(range(100))


def test_what_is_kept_has_a_bound_and_is_still_of_use_beyond_it():
    """More than fits, asked for in turn: whatever is thrown away when all is full, or least recently used, would be all of it."""
    kept, made = Kept(40), []
    for _ in range(3):
        for block in range(10):  # x 4 draws x 2 numbers
            for draw in range(4):
                found = kept(torch.tensor([block, block]), draw, lambda block=block, draw=draw: made.append(1) or torch.tensor([block, draw]))
                assert found.tolist() == [block, draw]
                assert kept.size == sum(one.numel() for part in kept.blocks.values() for one in part.values()) <= 40
    assert len(made) <= 40 + 2 * 24  # of 120
    wide, made = Kept(10), []
    for _ in range(3):
        for block in (0, 1):  # each more than half of what is kept
            for draw in range(7):
                wide(torch.tensor([block]), draw, lambda: made.append(1) or torch.zeros(1))
    assert len(made) < 32  # of 42
    few = Kept(4)
    assert [few(torch.tensor([0]), draw, lambda draw=draw: torch.full((3,), draw))[0].item() for draw in (0, 1, 0)] == [0, 1, 0] and few.size == 3


def test_a_measured_gene_that_shows_little_has_the_hyper_prior():
    """A flat prior on the grid said slope 2.6 and log theta 1 of a gene without a count, and was sure of it."""
    rng = np.random.default_rng(0)
    place = rng.standard_normal((2000, 1)).astype(np.float32)
    mean = np.array([40.0, 0.02]) * np.exp(place * 0.8 - 0.32)
    counts = np.column_stack([rng.poisson(mean * rng.gamma(2.0, 0.5, mean.shape)), np.zeros(2000), np.full(2000, 50_000)])  # the last: depth
    layer = CountLayer(problem(counts), HYPER, 1)
    layer.learn_own(problem(counts), lambda rows: place[rows], lambda genes: np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)[:, genes])
    slope, theta = (np.column_stack([getattr(layer, f"{name}_{of}") for of in ("loc", "scale")]) for name in ("slope", "log_theta"))
    assert slope[0] == pytest.approx([0.8, 0.03], abs=0.06) and theta[0] == pytest.approx([np.log(2), 0.05], abs=0.15)
    assert slope[2] == pytest.approx([1.2, 0.3], abs=0.1) and theta[2] == pytest.approx([0.7, 0.5], abs=0.1)
    faint = slope[1]
    assert 0.1 < faint[1] < 0.3 and 0.6 < faint[0] < 1.3
    level = np.column_stack([layer.log_gain_loc + layer.log_gain_scale**2 / 2, layer.log_gain_scale])
    assert level[2, 1] > 1 and level[0, 1] < 0.05 and level[:, 0].argsort().tolist() == [2, 1, 0, 3]  # mean levels are the counts' shares

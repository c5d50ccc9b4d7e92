r"""SpaIM: a gene's expression over all spatial cells from its profile in a single-cell reference; a sample is a gene.

Li et al., Nature Communications 2025, doi:10.1038/s41467-025-63185-9, written anew from the equations.

GENERATIVE STORY (preset "default": the closed-form Bayesian last layer)
    z_ig    standardised log-normalised count of gene g in cell i, all genes of the target, whose counts together are a cell's depth
    u_i     place of cell i on the leading directions of z, unit variance, mixed with its spatial neighbors' mean place (`ppl_st.models.common.cells`)
    t_kg    loading of gene g on direction k: mean_i u_ik z_ig, known for measured genes
    w_k     ~ Normal(0, d_k I)                              "weights", one row per direction
    t_kg    ~ Normal(c m_kg + phi_g . w_k, s_k)             "scores", seen less the gene's own share; phi_g . phi_h = k(g, h) (`kernel.py`)
    m_kg    what a regression inside the reference predicts from loadings of the other panel genes (`regression.py`); c is 0 where platforms differ
    f_ig    = u_i . t_g                                     the gene's map: every cell is a linear read-out of the gene's features, as in SpaIM;
              (1 - s) u_i . t_g + s phi_i . beta_g          of an unmeasured gene, with what a Gaussian process over the reference's cells says
                                                            beyond lines (`ppl_st.models.common.process`); s, chosen on inner genes, is 0 where
                                                            platforms differ
    x_ig    ~ NB(depth_i exp(log_gain_g + slope_g f_ig - ...), theta_g)      depth, level, slope, dispersion: `ppl_st.models.common.counts`

GUIDE
    w | t is exact and elementwise in the eigenbasis of the features: one solve shared by all cells, whatever their number. d_k and s_k maximise the
    marginal likelihood (grid, then SVI: with the exact posterior as guide the ELBO *is* the log marginal likelihood, for every draw), c and the
    lengthscale of k a pseudo-likelihood (grid; m_k is of the other genes' loadings). An unmeasured gene has more sources of doubt, all drawn: what
    the training genes leave of its features, and s_k, both scaled so that they are as far as inner held-out genes were from their maps (e of
    `inner.py`; they do not shrink with s); beta given the reference's cells; and the hyper-priors of level (with the sampling error of the
    reference's), slope and theta, learned on inner genes. The counts do not feed back into w (a cut).

SYMBOLS  n cells, A genes of the target, P of them shared with the reference, G genes and K clusters of the reference, q directions, F features;
    u [n, q], t [q, P], phi_g [G, F], w [q, F]; of the process phi_i [n, L], beta [L, G].

DIFFERENCES from paper and released code
    * scale: the published cosine losses leave a gene's level and spread free; here both have hyper-priors, so counts and intervals mean something;
    * features: the paper's networks have millions of weights for a few hundred training genes at most; the kernel needs a handful of numbers and is
      the default, the networks are a setting (``preset="network"``, ``preset="paper"``; of these RECORD.md compares "paper" alone). Features
      that a network learns by the marginal likelihood are not offered;
    * the noise s_k is one per direction, not per cell; a dispersion per cell was tried and brought nothing;
    * coordinates enter as the share of the spatial neighbors in a cell's place (chosen on inner genes), which stands for a spatial prior on loadings;
      genes that only the target has place the cells, too;
    * standard errors of the cluster profiles reach the default's kernel, not the networks, which read the profiles as they are; the sampling error of
      a gene's share in the reference reaches the level of either;
    * the released style loss is inert (`ppl_st.factors.style_loss`); its prediction faults (only the last batch, genes in the order of a set) cannot
      occur: genes are asked for by name and decoded one by one;
    * ``preset="paper"`` has the objective term by term (`network.py`) and the released settings, but 600 steps whatever the number of genes
      (released: 300 passes).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.svi import Pair, fit_part
from ppl_st.models.common.counts import Codes, Hyper
from ppl_st.models.common.inner import default_hyper, learn_hyper
from ppl_st.models.common.predictor import MapPredictor, smoothed_place
from ppl_st.models.spaim.data import Batches, Data
from ppl_st.models.spaim.model import PRESETS, Config, Guide, Layer, Model, Spec, build, choose
from ppl_st.models.spaim.network import NetworkGuide, gene_draws, observations

__all__ = [
    "PRESETS", "Batches", "Config", "Data", "Guide", "Hyper", "Model", "Predictor", "Spec",
    "batches", "build", "empty", "quantities", "select", "spec_from", "spec_to", "start",
]  # fmt: skip

INNER_DRAWS = 6  # of the networks' loadings of inner genes
LATENT = 50  # directions of which the places are stored


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """Learn what inner held-out genes teach, and return the closed-form layer (or the untrained networks)."""
    if config.features == "network":
        fit_inner = partial(_inner_network, config, seed)
        hyper = learn_hyper(data._replace(neighbors=None), config, seed, say, fit_inner, folds=1)  # each fold costs a training
        spec = Spec([], hyper)
        return ensemble([build(config, spec, data)]), spec
    length, weight = choose(data, config, seed)
    config = replace(config, lengthscale=length, regression=weight)
    hyper = learn_hyper(data, config, seed, say, lambda problem, genes: Layer(problem, config, seed, genes=genes))
    layer = Layer(data, replace(config, process=hyper.share), seed)
    spec = Spec([int(g) for g in layer.marks], hyper, length, weight)
    pair = build(config, spec, data, layer)
    found = f"{len(layer.ratio)} directions with signal, {layer.phi.shape[1]} features"
    say(f"{found}, lengthscale {length:g}, weight of the regression inside the reference {weight:g}")
    guide = guide_of(pair)
    assert isinstance(guide, Guide)
    guide.counts.learn_own(data, partial(smoothed_place, guide, data, hyper.smoothing), guide.known_codes)
    return ensemble([pair]), spec


def guide_of(pair: Pair) -> Guide | NetworkGuide:
    """The guide of one chain with its type."""
    assert isinstance(pair.guide, Guide | NetworkGuide)
    return pair.guide


class _InnerNetwork(NamedTuple):
    """Networks fitted to part of the panel, as `learn_hyper` wants them."""

    guide: NetworkGuide
    genes: NDArray[np.int64]

    seed: int

    def codes(self) -> Codes:
        return gene_draws(self.guide, self.genes, INNER_DRAWS, [self.seed, 2, 0])

    def place(self, data: Data) -> NDArray[np.float32]:
        return np.asarray(self.guide.place(data, np.arange(data.counts.shape[0])))


def _inner_network(config: Config, seed: int, data: Data, genes: NDArray[np.int64]) -> _InnerNetwork:
    pair = build(config, Spec([], default_hyper(data, config)), data)
    scale = 1.0 / (data.counts.shape[0] * len(data.panel))
    fit_part(pair, batches(data, config, seed), replace(config.fit, steps=config.inner_steps, device="cpu"), scale=scale)
    guide = guide_of(pair)
    assert isinstance(guide, NetworkGuide)
    guide.finish(data, observations(data, config))
    return _InnerNetwork(guide, genes, seed)


def empty(config: Config, spec: Spec, data: Data, chains: int) -> Pair:
    """An ensemble with every parameter in place, to read stored weights into."""
    return ensemble([build(config, spec, data) for _ in range(chains)])


def spec_to(spec: Spec) -> dict[str, Any]:
    """The specification as plain JSON."""
    return {**spec._asdict(), "hyper": spec.hyper._asdict()}


def spec_from(stored: dict[str, Any]) -> Spec:
    """Inverse of `spec_to`."""
    return Spec(**{**stored, "hyper": Hyper(**stored["hyper"])})


def batches(data: Data, config: Config, seed: int) -> Batches:
    """Minibatches of genes; the closed form sees all of them at once."""
    network = config.features == "network"
    return Batches(data, config.batch_genes if network else 0, seed, observations(data, config) if network else None)


def select(pair: Pair, data: Data, config: Config, seed: int) -> Pair:
    """There is one chain; trained networks learn here how their maps become counts of the measured genes."""
    if config.features == "network":
        guide = guide_of(chains_of(pair)[0])
        assert isinstance(guide, NetworkGuide)
        guide.finish(data, observations(data, config))
        guide.counts.learn_own(data, lambda rows: guide.place(data, rows), guide.known_codes)
    return pair


class Predictor(MapPredictor):
    """Posterior predictive of cells; with Gaussian codes of the networks there is no closed form."""

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        chains = chains_of(pair)
        closed = config.features == "kernel" or config.codes == "point"
        guides = [guide_of(chain) for chain in chains]
        super().__init__(chains, guides, data, spec.hyper.smoothing, config.likelihood, closed_form=closed)


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """``obsm`` latent: places of the cells on the target's first 50 directions [n, q]; of the networks, 50 of the output weights of each cell."""
    chain = chains_of(pair)[0]
    n, size = data.counts.shape[0], min(LATENT, len(guide_of(chain).known))  # what follows are features of the process
    rows = (np.arange(first, min(first + 4096, n)) for first in range(0, n, 4096))
    place = [smoothed_place(guide_of(chain), data, spec.hyper.smoothing, block)[:, :size].copy() for block in rows]
    return {"latent": np.concatenate(place)}, {}

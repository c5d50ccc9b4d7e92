r"""SpaIM: a gene's expression over all spatial cells from its profile in a single-cell reference; a sample is a gene.

Li et al., Nature Communications 2025, doi:10.1038/s41467-025-63185-9, written anew from the equations.

GENERATIVE STORY (preset "default": the closed-form Bayesian last layer)
    z_ig    standardised log-normalised count of gene g in cell i, all genes of the target
    u_i     place of cell i on the leading directions of z, unit variance, mixed with its spatial neighbors' mean place (`data.py`)
    t_kg    loading of gene g on direction k: mean_i u_ik z_ig, known for measured genes
    w_k     ~ Normal(0, d_k I)                              "weights", one row per direction
    t_kg    ~ Normal(phi_g . w_k, s_k)                      "scores"; phi_g . phi_h = k(g, h), what the reference knows of two genes (`kernel.py`)
    f_ig    = u_i . t_g                                     the gene's map: every cell is a linear read-out of the gene's features, as in SpaIM
    x_ig    ~ NB(total_i exp(log_gain_g + slope_g f_ig - ...), theta_g)      level, slope, dispersion: `counts.py`

GUIDE
    w | t is exact and elementwise in the eigenbasis of the features: one solve shared by all cells, whatever their number. d_k and s_k maximise the
    marginal likelihood (grid, then SVI: with the exact posterior as guide the ELBO *is* the log marginal likelihood, for every draw). An unmeasured
    gene has three more sources of doubt, all drawn: what the training genes leave of its features, s_k, and the hyper-priors of level, slope and
    theta, learned on inner held-out genes. The counts do not feed back into w (a cut).

SYMBOLS  n cells, A genes of the target, P of them shared with the reference, G genes and K clusters of the reference, q directions, F features;
    u [n, q], t [q, P], phi [G, F], w [q, F].

DIFFERENCES from paper and released code
    * scale: the published cosine losses leave a gene's level and spread free; here both have hyper-priors, so counts and intervals mean something;
    * features: the paper's networks have millions of weights for a few hundred training genes at most; the kernel needs a handful of numbers and is
      the default, the networks are a setting (``preset="network"``, ``preset="paper"``; compared in BENCHMARKS.md);
    * coordinates, and genes that only the target has, place the cells; sampling errors of the cluster profiles widen predictions;
    * the released style loss is inert (`ppl_st.factors.style_loss`); its prediction faults (only the last batch, genes in the order of a set) cannot
      occur: genes are asked for by name and decoded one by one;
    * ``preset="paper"`` has the objective term by term (`network.py`) and the released settings.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.svi import Pair
from ppl_st.inference.svi import fit as run_svi
from ppl_st.likelihoods import NegativeBinomial, Poisson
from ppl_st.models.spaim.counts import Codes, Hyper, default_hyper, learn_hyper, log_shape
from ppl_st.models.spaim.data import Batches, Data, median_depth
from ppl_st.models.spaim.model import PRESETS, Config, Guide, Layer, Model, Spec, build
from ppl_st.models.spaim.network import NetworkGuide, gene_draws, observations

__all__ = [
    "PRESETS", "Batches", "Config", "Data", "Guide", "Hyper", "Model", "Predictor", "Spec",
    "batches", "build", "empty", "quantities", "select", "spec_from", "spec_to", "start",
]  # fmt: skip

CACHED = 512  # loadings of one draw that are kept for the next block of cells
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(7)
QUADRATURE = tuple((_NODES).tolist()), tuple((_WEIGHTS / _WEIGHTS.sum()).tolist())  # expectation over a standard normal
SPREAD_CELLS = 4096  # cells on which the variance of the places is taken


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """Learn what inner held-out genes teach, and return the closed-form layer (or the untrained networks)."""
    if config.features == "network":
        fit_inner = partial(_inner_network, config, seed)
        hyper = learn_hyper(data._replace(neighbors=None), config, seed, say, fit_inner, folds=1)  # each fold costs a training
        spec = Spec([], hyper)
        return ensemble([build(config, spec, data)]), spec
    hyper = learn_hyper(data, config, seed, say, lambda problem, genes: Layer(problem, config, seed, genes=genes))
    layer = Layer(data, config, seed)
    spec = Spec([int(g) for g in layer.marks], hyper)
    pair = build(config, spec, data, layer)
    say(f"{len(layer.ratio)} directions with signal, {layer.phi.shape[1]} features")
    guide = guide_of(pair)
    assert isinstance(guide, Guide)
    some = np.sort(np.random.default_rng([seed, 3]).permutation(data.counts.shape[0])[:SPREAD_CELLS])
    guide.place_variance.copy_(torch.from_numpy(_place(pair, data, hyper.smoothing, some).var(0)))
    guide.counts.learn_own(data, partial(_place, pair, data, hyper.smoothing), guide.known_codes)
    return ensemble([pair]), spec


def guide_of(pair: Pair) -> Guide | NetworkGuide:
    """The guide of one chain with its type."""
    assert isinstance(pair.guide, Guide | NetworkGuide)
    return pair.guide


class _InnerNetwork(NamedTuple):
    """Networks fitted to part of the panel, as `learn_hyper` wants them."""

    guide: NetworkGuide
    genes: NDArray[np.int64]

    def codes(self, draws: int, seed: list[int]) -> Codes:
        return gene_draws(self.guide, self.genes, draws, seed)

    def place(self, data: Data) -> NDArray[np.float32]:
        return np.asarray(self.guide.place(data, np.arange(data.counts.shape[0])))


def _inner_network(config: Config, seed: int, data: Data, genes: NDArray[np.int64]) -> _InnerNetwork:
    pair = build(config, Spec([], default_hyper(data, config)), data)
    scale = 1.0 / (data.counts.shape[0] * len(data.panel))
    run_svi(pair, batches(data, config, seed), replace(config.fit, steps=config.inner_steps, device="cpu"), scale=scale)
    guide = guide_of(pair)
    assert isinstance(guide, NetworkGuide)
    guide.finish(data, observations(data, config))
    return _InnerNetwork(guide, genes)


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


def _place(pair: Pair, data: Data, share: float, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Places u of cells [n, q], ``share`` of them their neighbors' mean place."""
    guide = guide_of(pair)
    own = guide.place(data, rows)
    if share == 0.0 or data.neighbors is None:
        return np.asarray(own)
    near = data.neighbors[rows]
    others, index = np.unique(near.indices, return_inverse=True)
    near = sp.csr_matrix((near.data, index, near.indptr), shape=(len(rows), len(others)))
    return np.asarray((1 - share) * own + share * (near @ guide.place(data, others.astype(np.int64))), dtype=np.float32)


class Cells(NamedTuple):
    """A block of cells to predict."""

    rows: NDArray[np.int64]


class Predictor:
    """Posterior predictive of cells; see `ppl_st.inference.predict.Predictor`."""

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        self.chains, self.data, self.config, self.spec = chains_of(pair), data, config, spec
        self.n_cells = data.counts.shape[0]
        self.depth = median_depth(data.totals)
        self.guides = [guide_of(chain) for chain in self.chains]
        self.kept: dict[tuple[int, ...], Any] = {}
        if config.features == "kernel" or config.codes == "point":
            self.closed_form = self._closed_form  # with Gaussian codes there is no closed form

    def blocks(self, max_cells: int) -> Iterator[Cells]:
        """Consecutive cells."""
        for first in range(0, self.n_cells, max_cells):
            yield Cells(np.arange(first, min(first + max_cells, self.n_cells)))

    def at(self, rows: NDArray[np.int64]) -> Cells:
        """Any cells as a block."""
        return Cells(rows)

    def restrict(self, batch: Cells, keep: NDArray[np.bool_]) -> Cells:
        """The cells of the block that are in ``keep`` [n]."""
        return Cells(batch.rows[keep[batch.rows]])

    def rows(self, batch: Cells) -> NDArray[np.int64]:
        """Rows of the result that the block owns."""
        return batch.rows

    def local(self, batch: Cells, chain: int) -> tuple[Tensor, Tensor]:
        """Places [n, q] and log depth [n, 1] of the cells."""
        counts = self.data.counts[batch.rows]
        depth = np.maximum(np.asarray(counts[:, self.data.columns].sum(1), dtype=np.float32).reshape(-1, 1), 0.5)
        place = _place(self.chains[chain], self.data, self.spec.hyper.smoothing, batch.rows)
        return torch.from_numpy(place), torch.from_numpy(np.log(depth))

    def count_dist(self, batch: Cells, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """p(count | draw): nothing is left to draw, a gene's loadings are the same in all cells."""
        place, log_depth = local
        (mean, variance), loadings = self._mean(chain, genes), self._draw(chain, drawn, genes)
        slope = drawn["slope"][genes].clamp_min(0)
        trend = place @ mean
        shape = log_shape(trend, place @ (loadings - mean), place.square() @ variance, self._spread(chain, genes), slope)
        log_rate = log_depth + drawn["log_gain"][genes] + shape
        if self.config.likelihood == "poisson":
            return Poisson(log_rate.exp())
        return NegativeBinomial(log_mean=log_rate, log_theta=drawn["log_theta"][genes])

    def _closed_form(self, batch: Cells, chain: int, local: Any, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means [n, g] of the rate and of the log-normalised count: level and deviations in closed form, the slope by quadrature.

        The maps are of log-normalised expression, so its mean is read off the rate at the median depth over the shared genes.
        """
        place, log_depth = local
        counts = self.guides[chain].counts
        trend, spread = place @ self._mean(chain, genes)[0], self._spread(chain, genes)
        loc, scale = counts.slope_loc[genes], counts.slope_scale[genes]
        share = torch.zeros_like(trend)
        for node, weight in zip(*QUADRATURE, strict=True):
            slope = (loc + node * scale).clamp_min(0)
            share += weight * log_shape(trend, 0.0, 0.0, spread, slope).exp()
        share *= (counts.log_gain_loc[genes] + 0.5 * counts.log_gain_scale[genes].square()).exp()
        return share * log_depth.exp(), torch.log1p(self.depth * share)

    def _mean(self, chain: int, genes: Tensor) -> tuple[Tensor, Tensor]:
        return self._keep((chain, -1), genes, lambda: self.guides[chain].mean_codes(genes))

    def _draw(self, chain: int, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        return self._keep((chain, int(drawn["gene_key"])), genes, lambda: self.guides[chain].codes(drawn, genes))

    def _spread(self, chain: int, genes: Tensor) -> Tensor:
        """Variance over cells of the mean map [g]."""
        return self._keep((chain, -2), genes, lambda: self.guides[chain].spread(self._mean(chain, genes)[0]))

    def _keep(self, key: tuple[int, ...], genes: Tensor, make: Callable[[], Any]) -> Any:
        """What does not depend on cells is made once per block of genes."""
        whole = (*key, len(genes), int(genes[0]), int(genes[-1]))
        if whole not in self.kept:
            if len(self.kept) >= CACHED:
                self.kept.clear()
            with torch.no_grad():
                self.kept[whole] = make()
        return self.kept[whole]


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """``obsm`` latent: places of the cells on the target's leading directions [n, q]."""
    chain = chains_of(pair)[0]
    n = data.counts.shape[0]
    place = [_place(chain, data, spec.hyper.smoothing, np.arange(first, min(first + 4096, n))) for first in range(0, n, 4096)]
    return {"latent": np.concatenate(place)}, {}

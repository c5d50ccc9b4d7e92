"""The predictive of methods whose map of a gene over cells is place [cells, q] times loadings [q, genes]: rates, draws, closed-form means."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Gamma

from ppl_st.inference.pair import Pair
from ppl_st.likelihood_math import LOG_MEAN_RANGE
from ppl_st.likelihoods import NegativeBinomial, Poisson
from ppl_st.models.common.cells import Problem, all_counts, median_depth
from ppl_st.models.common.counts import LARGEST, NODES, CountLayer, bend, log_mean, quadrature

CACHED = 1e8  # numbers (400 MB) that are kept for the next block of cells
QUADRATURE = tuple(tuple(part.tolist()) for part in quadrature(NODES))  # expectation over a standard normal


class MapGuide(Protocol):
    """What a guide knows of cells and genes."""

    @property
    def counts(self) -> CountLayer:
        """Level, slope and dispersion of every gene."""

    def place(self, data: Any, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, q] of cells of any problem with the same genes."""

    def mean_codes(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the loadings, [q, g] each."""

    def codes(self, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        """Loadings [q, g] in one draw, the same for all cells."""

    def cell_noise(self, genes: Tensor) -> Tensor | None:
        """Loadings [K, g] of what differs from cell to cell in every draw; None where nothing does."""


def smoothed_place(guide: MapGuide, data: Any, share: float, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Places of cells [n, q], ``share`` of them their neighbors' mean place."""
    own = guide.place(data, rows)
    if share == 0.0 or data.neighbors is None:
        return np.asarray(own)
    near = data.neighbors[rows]
    others, index = np.unique(near.indices, return_inverse=True)
    near = sp.csr_matrix((near.data, index, near.indptr), shape=(len(rows), len(others)))
    return np.asarray((1 - share) * own + share * (near @ guide.place(data, others.astype(np.int64))), dtype=np.float32)


class Kept:
    """What does not depend on cells, made once per draw and block of genes: at most ``limit`` numbers, but for the first of a block of genes.

    Every block of cells asks for all blocks of genes in turn. So what was asked for last, of other genes, will be needed last: it is the first to go.
    """

    def __init__(self, limit: float = CACHED) -> None:
        self.limit, self.size = limit, 0
        self.blocks: dict[tuple[int, ...], dict[Hashable, Any]] = {}

    def __call__(self, genes: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives for these genes: tensors, or None."""
        whole = tuple(genes.tolist())
        block = self.blocks[whole] = self.blocks.pop(whole, {})
        if key in block:
            return block[key]
        with torch.no_grad():
            found = make()
        while self.size + _size(found) > self.limit and len(self.blocks) > 1:
            last = list(self.blocks)[-2]
            self.size -= _size(self.blocks[last].popitem()[1])
            if not self.blocks[last]:
                del self.blocks[last]
        if not block or self.size + _size(found) <= self.limit:
            block[key] = found
            self.size += _size(found)
        return found


def _size(found: Any) -> int:
    return sum(one.numel() for one in (found if isinstance(found, tuple) else (found,)) if one is not None)


class Cells(NamedTuple):
    """A block of cells to predict."""

    rows: NDArray[np.int64]


class MapPredictor:
    """Posterior predictive of cells from places and loadings; see `ppl_st.inference.predict.Predictor`.

    ``smoothing`` is the share of the spatial neighbors in a place; ``closed_form`` says whether the mean map is known without draws.
    """

    def __init__(
        self, chains: list[Pair], guides: Sequence[MapGuide], data: Problem, smoothing: float, likelihood: str, *, closed_form: bool = True
    ) -> None:
        self.chains, self.guides, self.data = chains, guides, data
        self.smoothing, self.likelihood = smoothing, likelihood
        self.n_cells = data.counts.shape[0]
        self.depth = median_depth(data.totals)
        self.kept = Kept()
        self.block: tuple[Tensor, tuple[int, ...], tuple[Tensor, Tensor, Tensor]] | None = None
        self.sample: tuple[tuple[int, ...], Tensor] | None = None
        if closed_form:
            self.closed_form = self._closed_form

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

    def local(self, batch: Cells, chain: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Places [n, q], log depth [n, 1] of the cells, and how many counts that is known from [n, 1] (None: it is no guess)."""
        every, relative, layer = all_counts(self.data.counts[batch.rows]), self.data.relative[batch.rows], self.guides[chain].counts
        place = smoothed_place(self.guides[chain], self.data, self.smoothing, batch.rows)
        log_depth, known = layer.log_depth(every, relative), layer.known(every, relative)
        return torch.from_numpy(place), torch.from_numpy(log_depth)[:, None], torch.from_numpy(known)[:, None]

    def count_dist(self, batch: Cells, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """p(count | draw): a gene's loadings are the same in all cells; what differs from cell to cell, its depth and noise, is drawn here."""
        place, log_depth, known = local
        if known is not None:  # first: the same for every block of genes
            log_depth = log_depth + Gamma(known, known).sample().log().float()
        slope = drawn["slope"][genes].clamp_min(0)
        bent, steep, spread = self._trend(chain, place, genes)
        difference = self._draw(chain, drawn, genes) - self._mean(chain, genes)[0]
        doubtful = difference.any(1).nonzero()
        first = int(doubtful[-1]) + 1 if len(doubtful) else 0  # rows after them are the same in every draw
        deviation = place[:, :first] @ difference[:first]
        noise = self.kept(genes, (chain, "noise"), lambda: self.guides[chain].cell_noise(genes))
        if noise is not None:
            deviation, spread = deviation.addmm_(torch.randn(len(place), len(noise)), noise), spread + noise.square().sum(0)
        level = drawn["log_gain"][genes] - self._log_mean(chain, int(drawn["gene_key"]), genes, slope)
        steep = slope * steep  # below in place: log depth + level + slope bent + steep deviation - steep^2 spread / 2
        log_rate = (slope * bent).clamp_(-LARGEST, LARGEST).add_(level).add_(log_depth)
        log_rate.addcmul_(steep, deviation.addcmul_(steep, spread, value=-0.5))
        rate = log_rate.clamp_(*LOG_MEAN_RANGE).exp_()  # once: law, mean, variance and draws all ask for it
        return Poisson(rate) if self.likelihood == "poisson" else NegativeBinomial(rate, log_theta=drawn["log_theta"][genes])

    def _closed_form(self, batch: Cells, chain: int, local: Any, genes: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior means [n, g] of the rate and of the log-normalised count: level and deviations in closed form, the slope by quadrature.

        ``factor`` [n, 1]: median total over a cell's own (over the shared genes); None: log-normalised counts are not wanted.
        """
        place, log_depth, _ = local
        counts = self.guides[chain].counts
        trend, _ = bend(place @ self._mean(chain, genes)[0], counts.bend)
        loc, scale = counts.slope_loc[genes], counts.slope_scale[genes]
        level = (counts.log_gain_loc[genes] + 0.5 * counts.log_gain_scale[genes].square()).exp()
        depth, log_theta = log_depth.exp(), None if self.likelihood == "poisson" else counts.log_theta_loc[genes]
        share, lognorm = torch.zeros_like(trend), torch.zeros_like(trend)
        for k, (node, weight) in enumerate(zip(*QUADRATURE, strict=True)):
            slope = (loc + node * scale).clamp_min(0)
            one = level * ((slope * trend).clamp(-LARGEST, LARGEST) - self._log_mean(chain, -2 - k, genes, slope)).exp()
            share += weight * one
            if factor is not None and counts.own_depth:
                lognorm += weight * log_mean(one, depth, log_theta, self.depth, factor)
        if factor is not None and not counts.own_depth:
            lognorm = log_mean(share, depth, log_theta, self.depth, None)
        return share * depth, lognorm

    def _trend(self, chain: int, place: Tensor, genes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bent mean map, its slope, and the variance of the map [n, g] each: the same in every draw of a block, so made once."""
        key = chain, *genes.tolist()
        kept = self.block
        if kept is None or kept[0] is not place or kept[1] != key:
            mean, variance = self._mean(chain, genes)
            with torch.no_grad():
                kept = place, key, (*bend(place @ mean, self.guides[chain].counts.bend), place.square() @ variance)
            self.block = kept
        found: tuple[Tensor, Tensor, Tensor] = kept[2]
        return found

    def _mean(self, chain: int, genes: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.kept(genes, (chain, "mean"), lambda: self.guides[chain].mean_codes(genes))
        return found

    def _draw(self, chain: int, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        found: Tensor = self.kept(genes, (chain, int(drawn["gene_key"])), lambda: self.guides[chain].codes(drawn, genes))
        return found

    def _log_mean(self, chain: int, key: int, genes: Tensor, slope: Tensor) -> Tensor:
        """c_g(slope_g) [g] of the slopes of draw or node ``key``: log of the mean of exp(slope v) over cells of the fit, weighted by their depths."""
        counts = self.guides[chain].counts

        def make() -> Tensor:
            which = chain, *genes.tolist()
            if self.sample is None or self.sample[0] != which:  # the bent maps of the sampled cells are the same in every draw
                self.sample = which, bend(counts.sample @ self._mean(chain, genes)[0], counts.bend)[0]
            return (counts.weight @ (slope * self.sample[1]).clamp_(-LARGEST, LARGEST).exp_()).log()

        found: Tensor = self.kept(genes, (chain, key, "level"), make)
        return found

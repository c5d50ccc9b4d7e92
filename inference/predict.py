"""Streamed posterior predictive: draws of every cell and gene exist only block by block, summaries leave.

For draw d = 1..S: chain c = d mod C; global sites g_d ~ q_c once per draw, shared by all blocks (so draws are joint over cells and genes); then per
block of cells the local sites ~ q_c(. | block), the rate and one count ~ p(count | g_d, local). With S draws of a block in memory at once the
summaries are exact functions of the draws:

    rate_mean, rate_sd     mean and sd over draws of the rate                                        (epistemic)
    count_sd               sqrt(E[Var(count | draw)] + Var(rate)): the law of total variance          (epistemic + observation noise)
    between_sd             the part of rate_sd that comes from fits which disagree: with m_k the mean rate of the n_k draws of fit k and m of all,
                           sum_k n_k / S (m_k - m)^2, less what the draws within fits make of it by chance (chains of one run, runs of one mixture)
    q05, q50, q95          quantiles of the count draws: the one of rank q (S + 1), rounded outwards; of fewer than 19 draws the least and the largest
    lognorm_mean           mean over draws of E[log1p(count x factor) | draw], factor per cell (median depth over its own depth), taking
                           a count that is not 0 at its mean: P(count > 0) log1p(factor E[count | count > 0]). Where a method knows its means in
                           closed form its own: SpaIM's and SpaGene's is log1p of the expected count at the median depth, the logarithm of a mean,
                           unless their fit found cells' own depths better (`own_depth`); it orders cells, its level is as a rule too high
    scores of a truth      log mean_d p(x | d), fair CRPS of the count draws, randomised-PIT bounds

Draws take turns between chains. Where chains say different things, that makes S draws a little more spread than S from the mixture at random: pairs
from different fits count S / (S - 1) times in the CRPS, at most one part in S in its second term.

The log score is exact for the mixture of S laws. The CRPS is not: its closed form, sum_k (F(k) - 1[x <= k])^2 with F the mean of the S distribution
functions, runs over every count up to the far tail and costs a hundred times the sorted draws, whose error all but vanishes in the mean over the
cells of a gene (RECORD.md).

Peak memory is about S x cells x genes x 12 bytes of one block plus the result; ``memory_gb`` bounds the block, not the S draws of the global sites,
which all stay in memory (SIID with 160 factors and 18,000 genes: 100 draws of xi are 1.2 GB). Draws of a block are sorted and summarised beside those
of the next one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pyro.poutine as poutine
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.asked import refuse_draws
from ppl_st.inference.pair import Pair
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.threads import one_ahead

__all__ = [
    "QUANTILES", "Predictor", "Scores", "Summary", "count_draws", "draw_globals", "fits_of_draws", "posterior_predictive", "predictive_blocks",
]  # fmt: skip

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
BYTES_PER_DRAW = 16  # rate, count, sorted copy, workspace


class Predictor(Protocol):
    """What a fitted method offers for prediction; one object per set of cells."""

    n_cells: int

    def blocks(self, max_cells: int) -> Iterable[Any]:
        """Batches that own every cell exactly once."""

    def rows(self, batch: Any) -> NDArray[np.int64]:
        """Rows of the result that the batch owns."""

    def local(self, batch: Any, chain: int) -> Any:
        """Whatever is computed once per block and chain (the local posterior)."""

    def count_dist(self, batch: Any, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """p(count | one draw) of the owned cells, [rows, genes]; draws the local sites with torch's generator."""


    # Optional: at(rows) -> batch that owns these rows, in their order; only then can runs of different methods be stacked (`ppl_st.stack`).
    # Optional: fits, the number of the fit that each chain belongs to; without it every chain is one.
    # Optional: closed_form(batch, chain, local, genes, factor) -> posterior means of the rate and of log1p(count x factor) [rows, genes], without
    # the Monte Carlo error of means over draws; factor [rows, 1], or None where the second is not wanted.
    # Optional: turns, what stands behind each chain; chains of the same have the same closed form.


class Summary(NamedTuple):
    """Posterior predictive of n cells x g genes, float32."""

    rate_mean: NDArray[np.float32]
    rate_sd: NDArray[np.float32]
    count_sd: NDArray[np.float32]
    quantiles: dict[str, NDArray[np.float32]]
    lognorm_mean: NDArray[np.float32] | None  # where a factor was given
    between_sd: NDArray[np.float32] | None  # where draws come from several fits


class Scores(NamedTuple):
    """Scores of a truth [n, g] under the predictive."""

    log_prob: NDArray[np.float32]  # log predictive probability of the observed count
    crps: NDArray[np.float32]
    pit_low: NDArray[np.float32]  # P(X < x)
    pit_high: NDArray[np.float32]  # P(X <= x)
    corrected_crps: NDArray[np.float32] | None = None  # of the corrected predictive, where its mass was given


def draw_globals(chains: Sequence[Pair], draws: int, seed: int) -> list[dict[str, Tensor]]:
    """``draws`` draws of the global sites, draw d from chain d mod C."""
    drawn = []
    for d in range(draws):
        with torch.no_grad(), rng_scope(seed, "globals", d):
            sample_globals: Any = chains[d % len(chains)].guide.globals
            trace = poutine.trace(sample_globals).get_trace()
        drawn.append(
            {name: cast(Tensor, site["value"]) for name, site in trace.nodes.items() if site["type"] == "sample"}
        )
    return drawn


def fits_of_draws(predictor: Predictor, chains: Sequence[Pair], draws: int) -> NDArray[np.int64] | None:
    """Number of the fit behind every draw, [draws], counted from 0; None if it is the same one, or if no fit has two draws.

    Raises `UserError` where there are not two draws.
    """
    refuse_draws(draws)
    fits = np.asarray(getattr(predictor, "fits", range(len(chains))))
    number, of = np.unique(fits[np.arange(draws) % len(fits)], return_inverse=True)
    return of if 1 < len(number) < draws else None


def block_sizes(n_genes: int, draws: int, memory_gb: float) -> tuple[int, int]:
    """Cells and genes per block whose draws fit into ``memory_gb``."""
    entries = max(1.0, memory_gb * 1e9 / (BYTES_PER_DRAW * draws))
    genes = int(min(n_genes, max(1, entries // 64), 1024))
    return int(np.clip(entries // genes, 1, 2048)), genes


def posterior_predictive(
    predictor: Predictor,
    chains: Sequence[Pair],
    genes: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
    memory_gb: float = 1.0,
    truth: sp.csr_matrix | None = None,
    ends: NDArray[np.float64] | None = None,
    mass: NDArray[np.float64] | None = None,
    factor: NDArray[np.float64] | None = None,
) -> tuple[Summary, Scores | None]:
    """Summaries of the predictive of ``genes`` in all cells, and scores of ``truth`` [n, g] where given; ``factor`` [n] asks for
    ``lognorm_mean``.

    ``ends`` [2, g] are two probabilities per gene: quantiles "lower" and "upper", 0 and inf where the draws do not reach so far. ``mass`` [draws, g]
    is what a corrected predictive gives to the draws in rising order (1 / draws each without it): scores then have ``corrected_crps``.

    The stream of random numbers depends on ``seed``, ``draws``, the first of ``genes`` and the block sizes, hence on ``memory_gb`` and the number of
    genes; on nothing else.
    """
    n, g = predictor.n_cells, len(genes)
    empty = lambda: np.zeros((n, g), dtype=np.float32)  # noqa: E731
    quantiles = {name: empty() for name in _wanted(g, ends)}
    several = fits_of_draws(predictor, chains, draws) is not None
    summary = Summary(empty(), empty(), empty(), quantiles, None if factor is None else empty(), empty() if several else None)
    scores = None if truth is None else Scores(empty(), empty(), empty(), empty(), None if mass is None else empty())
    for rows, part, block, score in predictive_blocks(
        predictor, chains, genes, draws=draws, seed=seed, memory_gb=memory_gb, truth=truth, ends=ends, mass=mass, factor=factor
    ):
        where = np.ix_(rows, np.arange(part.start, part.stop))
        for target, value in zip(summary[:3], block[:3], strict=True):
            target[where] = value
        for maybe, found in ((summary.lognorm_mean, block.lognorm_mean), (summary.between_sd, block.between_sd)):
            if maybe is not None and found is not None:
                maybe[where] = found
        for name, value in block.quantiles.items():
            summary.quantiles[name][where] = value
        if scores is not None and score is not None:
            for maybe, found in zip(scores, score, strict=True):
                if maybe is not None and found is not None:
                    maybe[where] = found
    return summary, scores


def predictive_blocks(
    predictor: Predictor,
    chains: Sequence[Pair],
    genes: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
    memory_gb: float = 1.0,
    truth: sp.csr_matrix | None = None,
    ends: NDArray[np.float64] | None = None,
    mass: NDArray[np.float64] | None = None,
    factor: NDArray[np.float64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], slice, Summary, Scores | None]]:
    """The parts of `posterior_predictive` as they are made: (rows, slice of ``genes``, summary, scores) of [rows, slice].

    The slices of the same rows follow each other from the first gene to the last.
    """
    wanted = _wanted(len(genes), ends)
    factors = None if factor is None else torch.from_numpy(factor.astype(np.float32))
    drawn, fits = draw_globals(chains, draws, seed), fits_of_draws(predictor, chains, draws)
    cells, width = block_sizes(len(genes), draws, memory_gb)

    def blocks() -> Iterator[tuple[tuple[NDArray[np.int64], slice], Callable[[], tuple[Summary, Scores | None]]]]:
        for b, batch in enumerate(predictor.blocks(cells)):
            rows = predictor.rows(batch)
            local = [predictor.local(batch, c) for c in range(min(draws, len(chains)))]
            for start in range(0, len(genes), width):
                part = slice(start, min(start + width, len(genes)))
                x = None if truth is None else truth[rows, part].toarray()
                quantiles = {name: q[part] for name, q in wanted.items()}
                depth = None if factors is None else factors[rows, None]
                masses = None if mass is None else mass[:, part]
                yield (rows, part), _block(predictor, chains, batch, local, drawn, genes[part], (seed, b), x, quantiles, depth, masses, fits)

    for (rows, part), (summary, scores) in one_ahead(blocks()):
        yield rows, part, summary, scores


def _wanted(g: int, ends: NDArray[np.float64] | None) -> dict[str, NDArray[np.float64]]:
    """Quantile of each gene, [g], by name."""
    wanted: dict[str, NDArray[np.float64]] = {name: np.full(g, q) for name, q in QUANTILES.items()}
    if ends is not None:
        wanted |= {"lower": ends[0], "upper": ends[1]}
    return wanted


def count_draws(
    predictor: Predictor,
    chains: Sequence[Pair],
    genes: NDArray[np.int64],
    *,
    draws: int,
    seed: int,
    memory_gb: float = 1.0,
) -> Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Joint posterior predictive count draws block by block: (rows, counts [draws, rows, genes])."""
    drawn = draw_globals(chains, draws, seed)
    cells = int(np.clip(memory_gb * 1e9 / (BYTES_PER_DRAW * draws * len(genes)), 1, 1024))
    for b, batch in enumerate(predictor.blocks(cells)):
        local = [predictor.local(batch, c) for c in range(min(draws, len(chains)))]
        counts = [
            _count_dist(predictor, chains, batch, local, drawn, d, torch.from_numpy(genes), (seed, b))[1]
            for d in range(draws)
        ]
        yield predictor.rows(batch), torch.stack(counts).numpy()


def _count_dist(
    predictor: Predictor,
    chains: Sequence[Pair],
    batch: Any,
    local: list[Any],
    drawn: list[dict[str, Tensor]],
    d: int,
    genes: Tensor,
    stream: tuple[int, int],
) -> tuple[Any, Tensor]:
    """p(count | draw d) and one draw of it; local sites use a stream of their own, so they agree between gene blocks."""
    chain = d % len(chains)
    with torch.no_grad(), rng_scope(stream[0], "local", stream[1], d):
        dist = predictor.count_dist(batch, chain, drawn[d], local[chain], genes)
    with torch.no_grad(), rng_scope(stream[0], "count", stream[1], d, int(genes[0])):
        return dist, dist.sample()


def _block(
    predictor: Predictor,
    chains: Sequence[Pair],
    batch: Any,
    local: list[Any],
    drawn: list[dict[str, Tensor]],
    genes: NDArray[np.int64],
    stream: tuple[int, int],
    x: NDArray[np.float32] | None,
    wanted: dict[str, NDArray[np.float64]],
    factor: Tensor | None,
    mass: NDArray[np.float64] | None,
    fits: NDArray[np.int64] | None,
) -> Callable[[], tuple[Summary, Scores | None]]:
    """Draw a block; what is returned summarises its draws, without another random number."""
    draws, shape = len(drawn), (len(predictor.rows(batch)), len(genes))
    truth = None if x is None else torch.from_numpy(x)
    count = torch.empty((draws, *shape))
    mean, square, variance, lognorm = (torch.zeros(shape, dtype=torch.float64) for _ in range(4))
    sums = torch.zeros((0 if fits is None else int(fits.max()) + 1, *shape), dtype=torch.float64)  # of the rates of each fit
    zero = torch.zeros(shape)
    log_p = torch.full(shape, -torch.inf, dtype=torch.float64)
    below, equal, distance = (torch.zeros(shape) for _ in range(3))  # of the draws, to the truth
    for d in range(draws):
        dist, count[d] = _count_dist(predictor, chains, batch, local, drawn, d, torch.from_numpy(genes), stream)
        rate = dist.mean.double()
        delta = rate - mean  # Welford
        mean.add_(delta, alpha=1 / (d + 1))
        square.addcmul_(delta, rate - mean)
        variance += dist.variance
        if fits is not None:
            sums[fits[d]] += rate
        if factor is not None:
            positive = -torch.expm1(dist.log_prob(zero)).clamp(max=-1e-12)
            lognorm += positive * torch.log1p(factor * dist.mean / positive)
        if truth is not None:
            log_p = torch.logaddexp(log_p, dist.log_prob(truth).double())
            below += count[d] < truth
            equal += count[d] == truth
            distance += (count[d] - truth).abs()
    exact = None
    if hasattr(predictor, "closed_form"):
        turns = list(getattr(predictor, "turns", range(len(local))))[: len(local)]
        exact = [np.zeros(shape), np.zeros(shape)]
        for turn in dict.fromkeys(turns):
            c, share = turns.index(turn), turns.count(turn) / len(turns)
            with torch.no_grad():
                means = predictor.closed_form(batch, c, local[c], torch.from_numpy(genes), factor)
            exact = [total + share * value.numpy() for total, value in zip(exact, means, strict=True)]

    def summarise() -> tuple[Summary, Scores | None]:
        between = square / max(1, draws - 1)
        ordered = count.numpy()  # [S, n, g]
        ordered.sort(axis=0)
        quantiles = {name: _quantile(ordered, name, q) for name, q in wanted.items()}
        summary = Summary(
            mean.float().numpy() if exact is None else exact[0].astype(np.float32),
            between.sqrt().float().numpy(),
            (variance / draws + between).sqrt().float().numpy(),
            quantiles,
            None if factor is None else (lognorm / draws).float().numpy() if exact is None else exact[1].astype(np.float32),
            None if fits is None else _between(sums, mean, square, fits),
        )
        if x is None:
            return summary, None
        # The truth's rank among the draws: uniform for any number of draws when it is exchangeable with them (chains that agree, or draws of one).
        low, high = below / (draws + 1), (below + equal + 1) / (draws + 1)
        crps = (distance / draws - _half_spread(ordered)).numpy()
        corrected = None if mass is None else _weighted_crps(ordered, mass, x)
        return summary, Scores((log_p - np.log(draws)).float().numpy(), crps, low.numpy(), high.numpy(), corrected)

    return summarise


def _between(sums: Tensor, mean: Tensor, square: Tensor, fits: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard deviation between fits from the sums of their rates [K, n, g], the mean and the sum of squares around it over all draws [n, g]."""
    size = torch.from_numpy(np.bincount(fits)).double()[:, None, None]
    explained = (size * (sums / size - mean).square()).sum(0)
    within = (square - explained).clamp(min=0) / (len(fits) - len(size))
    return np.asarray(((explained - (len(size) - 1) * within).clamp(min=0) / len(fits)).sqrt().float())


def _weighted_crps(ordered: NDArray[np.float32], mass: NDArray[np.float64], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """CRPS of draws [S, n, g] in rising order that have these masses [S, g] (columns sum to 1); with 1 / S each it is the plain fair one.

    With other masses it is fair (free of bias for any number of draws) in the self-pairs only: what a corrected predictive puts beyond the outermost
    draws lies on them here. Forecasts whose spread is off by a factor of 2 to 3 so have a CRPS that is 2 to 3 % off with 100 draws.
    """
    weight = mass[:, None].astype(np.float32)
    distance = (weight * np.abs(ordered - x)).sum(0)
    below = np.cumsum(mass, 0)[:-1, None].astype(np.float32)
    spread = (below * (1 - below) * np.diff(ordered, axis=0)).sum(0)  # sum_{s < t} m_s m_t (x_t - x_s)
    pairs = np.maximum(1 - np.square(mass).sum(0), 1e-6)  # without the self-pairs
    return np.asarray(distance - spread / pairs, dtype=np.float32)


def _quantile(ordered: NDArray[np.float32], name: str, q: NDArray[np.float64]) -> NDArray[np.float32]:
    """Drawn count [n, g] of rank q [g] x (S + 1) among S sorted draws, rounded outwards: an interval then holds what the PIT says that it holds.

    Rank 0 and rank S + 1 are beyond all draws: 0 and infinity as ends of a recalibrated interval, the outermost draw in a plain quantile.
    """
    draws = len(ordered)
    exact = np.round(q * (draws + 1), 9)
    rank = (np.ceil(exact) if name in ("q95", "upper") else np.floor(exact)).astype(np.int64)
    found = ordered[np.clip(rank, 1, draws) - 1, :, np.arange(len(rank))].T
    if name == "lower":
        return np.where(rank < 1, np.float32(0), found)
    return np.where(rank > draws, np.float32(np.inf), found) if name == "upper" else found


def _half_spread(ordered: NDArray[np.float32]) -> Tensor:
    """E|X - X'| / 2 of sorted draws [S, n, g] without the self-pairs: the second part of the fair CRPS."""
    s = len(ordered)
    weight = (2 * np.arange(s) - s + 1).astype(np.float32)  # sum_{i<j} (x_j - x_i) = sum_i weight_i x_i
    return torch.from_numpy(np.tensordot(weight, ordered, axes=(0, 0)) / np.float32(max(1, s * (s - 1))))

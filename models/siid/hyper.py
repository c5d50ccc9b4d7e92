"""What SIID learns on genes that it holds out from itself.

Inner held-out genes are panel genes taken from the cells but left in the spots: exactly the situation of a gene that the cells never measured.
On them are chosen: the number of factors, the number of EM sweeps, the width and strength of the regional effect; on thinned counts: the sparsity
of the compositions (a composition that is too sparse, or not sparse enough, predicts the other half of the same cell's molecules worse), kept only
if the inner genes gain too. Learned on them: the hyper-priors of the gain and of the likelihood's parameters (inverse dispersion) of an unmeasured
gene, as the values that, *together with the spread of the posterior draws*, explain the inner genes' counts. Residuals of genes that the factors
were fitted to would be far too small.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.inference.hyperpriors import learn_parameters, random_effects, score_grid
from ppl_st.models.siid.activity import FLOOR, Local, aggregate
from ppl_st.models.siid.batches import Data
from ppl_st.models.siid.regional import BANDWIDTHS, SHAPES, regional_posterior
from ppl_st.models.siid.warm_start import STRIDE, Start, log_share, run_em
from ppl_st.observation import find, of_mean

if TYPE_CHECKING:
    from ppl_st.models.siid.model import Config

Say = Callable[[str], None]
CANDIDATES = (5, 10, 20, 40, 80, 160)  # numbers of factors that are tried
# Sweeps of EM: few stop early, which is what many factors want; many converge, which is what mixed cells want.
SWEEPS = (20, 60, 180)
SPARSITIES = (0.0, 0.1, 0.3)
SELECTION_CELLS = 15_000  # cells on which settings are chosen
INNER_CELLS = 5000  # cells on which gain and dispersion of inner genes are learned
INNER_DRAWS = 4  # posterior draws per start there
START_CELLS = 1000  # cells on which the parameters of measured genes are started


class Hyper(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run."""

    factors: int
    sweeps: int
    sparsity: float
    gain_loc: float  # log gain (cells per spots) of an unmeasured gene: mean
    gain_scale: float  # and standard deviation
    # Each parameter of the cells' likelihood (log_theta) in an unmeasured gene: [mean at the mean of the covariate, slope per unit of the
    # covariate (log share of the spots' counts), standard deviation].
    parameters: dict[str, list[float]]
    covariate_mean: float
    bandwidth: float  # regional effect: kernel width in spot pitches, 0 = none
    regional_shape: float
    candidates: list[dict[str, float]]  # every setting tried, with its score per inner count
    # of the centered covariate among the inner genes: the parameters' lines stay as they are at its ends
    span: tuple[float, float] = (-99.0, 99.0)


def default_hyper(data: Data, config: "Config") -> Hyper:
    """Hyper-priors where nothing can be learned (a tiny panel, or the published settings): wide, and said so in the log."""
    factors = config.factors or max(data.named, min(20, max(2, data.counts.shape[0] // 20)))
    sparsity = 0.0 if config.sparsity == "auto" else float(config.sparsity)
    return Hyper(
        factors,
        config.sweeps or SWEEPS[0],
        sparsity,
        0.0,
        0.5,
        {name: [loc, 0.0, scale] for name, (loc, scale) in find(config.likelihood).priors.items()},
        float(log_share(data).mean()),
        0.0,
        1.0,
        [],
    )


def inner_split(data: Data, rng: np.random.Generator, fold: int, share: float = 0.2) -> tuple[Data, NDArray[np.int64]]:
    """The problem without a fifth of the panel in the cells, and the positions of those genes in the panel."""
    order = rng.permutation(len(data.panel))
    size = max(1, round(share * len(order)))
    inner = np.sort(order[fold * size : (fold + 1) * size])
    kept = np.setdiff1d(np.arange(len(data.panel)), inner)
    return data._replace(counts=data.counts[:, kept], panel=data.panel[kept]), inner


def learn_hyper(data: Data, config: "Config", seed: int, say: Say) -> Hyper:
    """Choose settings and learn hyper-priors on inner held-out genes; see the file's docstring."""
    mapped_share = float((np.diff(data.mapping.indptr) > 0).mean())
    data = subset(data, SELECTION_CELLS, np.random.default_rng([seed, 5]))
    split, inner = inner_split(data, np.random.default_rng([seed, 1]), 0)
    truth = sp.csr_matrix(data.counts[:, inner])
    candidates: list[dict[str, float]] = []

    def inner_score(factors: int, sparsity: float, sweeps: int) -> NDArray[np.float64]:
        start, _, problem = run_em(split, config, factors, sparsity, seed, sweeps)
        rate = (
            problem.solve(start.g, local_steps(config.predict_steps, sweeps)).activity
            @ start.g.profiles[:, torch.from_numpy(data.panel[inner])]
        )
        score = _poisson_score(truth, rate, fit_level=True)
        candidates.append(
            {"factors": factors, "sparsity": sparsity, "sweeps": sweeps, "inner genes": float(score.sum())}
        )
        say(
            f"{factors} factors, {sweeps} sweeps, sparsity {sparsity:g}: inner held-out genes score {score.sum():.4f} nats per count"
        )
        return score

    factors, best = config.factors, None
    sweeps = config.sweeps or SWEEPS[0]
    if factors == 0:
        limit = max(CANDIDATES[0], data.named, min(data.counts.shape[0] // 20, data.spot_counts.shape[0], 8 * len(data.panel)))
        for candidate in sorted({max(c, data.named) for c in CANDIDATES if c <= limit}):
            score = inner_score(candidate, 0.0, sweeps)
            if best is not None and _clearly_worse(score, best):
                break
            best, factors = score, candidate  # in doubt the larger number: chains are averaged, which favors it
    best = inner_score(factors, 0.0, sweeps) if best is None else best
    if config.sweeps == 0:
        for more in SWEEPS[1:]:
            score = inner_score(factors, 0.0, more)
            if score.sum() <= best.sum():
                break
            best, sweeps = score, more
    if config.sparsity == "auto":
        sparsity = _choose_sparsity(data, config, factors, sweeps, seed, candidates, say)
        # Both must gain: other molecules of the same genes, and other genes.
        while sparsity > 0 and inner_score(factors, sparsity, sweeps).sum() < best.sum():
            sparsity = max((s for s in SPARSITIES if s < sparsity), default=0.0)
    else:
        sparsity = float(config.sparsity)
    return _learn_priors(data, config, factors, sweeps, sparsity, mapped_share, seed, candidates, say)


def local_steps(steps: int, sweeps: int) -> int:
    """Sweeps of the local posterior that go with so many sweeps of EM: both stop early or neither."""
    return round(steps * min(3.0, max(1.0, sweeps / SWEEPS[0])))


def subset(data: Data, cells: int, rng: np.random.Generator) -> Data:
    """At most about ``cells`` cells: random spots with their cells, and as large a share of the cells between spots."""
    n = data.counts.shape[0]
    if n <= cells:
        return data
    spots = np.arange(data.mapping.shape[1])
    mapped = np.diff(data.mapping.indptr) > 0
    if mapped.sum() > cells / 2:  # else keep every spot: the spots teach the unmeasured genes
        share = cells / 2 / mapped.sum()
        spots = np.sort(rng.permutation(spots)[: max(2, int(share * len(spots)))])
    inside = np.flatnonzero(np.asarray(data.mapping[:, spots].sum(1)).ravel() > 0)
    outside = rng.permutation(np.flatnonzero(~mapped))[: max(0, cells - len(inside))]
    return data.take_rows(np.sort(np.concatenate([inside, outside])), spots)


def _clearly_worse(score: NDArray[np.float64], best: NDArray[np.float64]) -> bool:
    """Whether the sum over genes is worse by more than one standard error of the paired differences."""
    difference = score - best
    return bool(difference.sum() < -np.sqrt(len(difference)) * difference.std(ddof=1))


def _choose_sparsity(
    data: Data, config: "Config", factors: int, sweeps: int, seed: int, candidates: list[dict[str, float]], say: Say
) -> float:
    """The sparsity under which half of a cell's molecules predict the other half best."""
    kept = data.counts.copy()
    kept.data = np.random.default_rng([seed, 4]).binomial(kept.data.astype(np.int64), 0.5).astype(np.float32)
    rest = sp.csr_matrix(data.counts - kept)
    best, chosen = -np.inf, 0.0
    for sparsity in SPARSITIES:
        start, _, problem = run_em(data._replace(counts=kept), config, factors, sparsity, seed, sweeps)
        local = problem.solve(start.g, local_steps(config.predict_steps, sweeps))
        score = float(_poisson_score(rest, local.activity @ start.g.panel_profiles, fit_level=False).sum())
        candidates.append({"factors": factors, "sparsity": sparsity, "thinned counts": score})
        say(f"sparsity {sparsity:g}: thinned counts score {score:.4f} nats per count")
        if score < best:
            break
        best, chosen = score, sparsity
    return chosen


def _poisson_score(truth: sp.csr_matrix, rate: Tensor, *, fit_level: bool) -> NDArray[np.float64]:
    """Each gene's part of the Poisson log-likelihood per count; ``fit_level`` fits each gene's level (the level is the gain's business)."""
    total = torch.zeros(rate.shape[1], dtype=torch.float64)
    level = torch.ones(rate.shape[1])
    if fit_level:
        level = (torch.from_numpy(np.asarray(truth.sum(0), dtype=np.float32).ravel()) + 0.5) / (rate.sum(0) + 0.5)
    for rows in range(0, rate.shape[0], 4096):
        x = torch.from_numpy(truth[rows : rows + 4096].toarray())
        scaled = (rate[rows : rows + 4096] * level).clamp_min(FLOOR)
        total += (x * scaled.log() - scaled).double().sum(0)
    return total.numpy() / max(float(truth.sum()), 1.0)


def _learn_priors(
    data: Data,
    config: "Config",
    factors: int,
    sweeps: int,
    sparsity: float,
    mapped_share: float,
    seed: int,
    candidates: list[dict[str, float]],
    say: Say,
) -> Hyper:
    share = log_share(data)
    gains, noises, covariate, inner_genes = [], [], [], []
    bandwidth, regional_shape = 0.0, 1.0
    for fold in range(2):
        split, inner = inner_split(data, np.random.default_rng([seed, 1]), fold)
        genes = data.panel[inner]
        rows = _representative(data, mapped_share, np.random.default_rng([seed, 2, fold]))
        counts = sp.csr_matrix(data.counts[rows][:, inner])
        draws: list[Tensor] = []
        for mode in range(2):
            start, _, problem = run_em(split, config, factors, sparsity, seed + STRIDE * mode, sweeps)
            local = problem.solve(start.g, local_steps(config.predict_steps, sweeps))  # as in prediction
            mixed = aggregate(problem.batch, local.capture[:, None] * local.activity)  # [s, h]
            if fold == 0 and mode == 0 and config.regional:
                rate = local.activity[rows] @ start.g.profiles[:, torch.from_numpy(genes)]
                expected = (mixed @ start.g.profiles[:, torch.from_numpy(genes)]).numpy()
                bandwidth, regional_shape = _choose_regional(split, rows, genes, rate, expected, counts)
                say(f"regional effect: bandwidth {bandwidth:g} pitches, shape {regional_shape:g}")
            draws += _draw_rates(
                split, config, start, local, mixed, rows, genes, (bandwidth, regional_shape), [seed, 3, fold, mode]
            )
        x, rates = torch.from_numpy(counts.toarray()).double(), torch.stack(draws).double()
        level = (x.sum(0) + 0.5) / (rates.mean(0).sum(0) + 0.5)
        gains.append(level.log().numpy())
        inner_genes.append((x, rates * level))
        spot_totals = np.asarray(split.spot_counts[:, genes].sum(0), dtype=np.float64).ravel()
        noises.append(
            1 / (np.asarray(counts.sum(0)).ravel() + 0.5) + 1 / (spot_totals + 0.5)
        )  # Poisson variance of the log ratio of two totals
        covariate.append(share[genes])
    gain, z = np.concatenate(gains), np.concatenate(covariate)
    parameters = learn_parameters(of_mean(find(config.likelihood)), inner_genes, z - share.mean())
    gain_loc, gain_scale = random_effects(gain, np.concatenate(noises))
    said = [f"{name} {a:.2f} + {b:.2f} log share, sd {s:.2f}" for name, (a, b, s) in parameters.items()]
    say(", ".join([f"gain sd {gain_scale:.3f}", *said]) + f" ({len(gain)} inner genes)")
    return Hyper(
        factors, sweeps, sparsity, gain_loc, gain_scale, parameters, float(share.mean()), bandwidth, regional_shape, candidates,
        (float(z.min() - share.mean()), float(z.max() - share.mean())),
    )  # fmt: skip


def _representative(data: Data, mapped_share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Up to INNER_CELLS cells, as many of them in spots as in the whole data (the subset for selection favors cells in spots)."""
    mapped = np.diff(data.mapping.indptr) > 0
    inside, outside = rng.permutation(np.flatnonzero(mapped)), rng.permutation(np.flatnonzero(~mapped))
    n = min(INNER_CELLS, len(mapped))
    if len(outside):
        n = min(n, int(len(outside) / max(1 - mapped_share, 1e-9)))
    k = round(n * mapped_share)
    return np.sort(np.concatenate([inside[:k], outside[: n - k]]))


def _choose_regional(
    data: Data,
    rows: NDArray[np.int64],
    genes: NDArray[np.int64],
    rate: Tensor,
    expected: NDArray[np.float32],
    counts: sp.csr_matrix,
) -> tuple[float, float]:
    """Bandwidth and shape that predict the inner genes best in the cells ``rows``; bandwidth 0 if the rates alone [rows, genes] do."""
    best, chosen = float(_poisson_score(counts, rate, fit_level=True).sum()), (0.0, 1.0)
    for bandwidth in BANDWIDTHS:
        for shape in SHAPES:
            a, b = regional_posterior(
                data.cell_xy[rows], data.spot_xy, data.spot_counts[:, genes], expected, bandwidth, shape
            )
            score = float(_poisson_score(counts, rate * torch.from_numpy(a / b), fit_level=True).sum())
            if score > best:
                best, chosen = score, (bandwidth, shape)
    return chosen


def _draw_rates(
    data: Data,
    config: "Config",
    start: Start,
    local: Local,
    mixed: Tensor,
    rows: NDArray[np.int64],
    genes: NDArray[np.int64],
    regional: tuple[float, float],
    seed: list[int],
) -> list[Tensor]:
    """Posterior draws of the rates of ``genes`` in the cells ``rows``: activities and regional effect, [INNER_DRAWS] of [rows, genes]."""
    rng = np.random.default_rng(seed)
    profiles = start.g.profiles[:, torch.from_numpy(genes)]
    shape, rate = local.shape[rows].numpy(), local.rate[rows].numpy()
    effect = None
    if regional[0] > 0:
        effect = regional_posterior(
            data.cell_xy[rows], data.spot_xy, data.spot_counts[:, genes], (mixed @ profiles).numpy(), *regional
        )
    draws = []
    for _ in range(INNER_DRAWS):
        activity = torch.from_numpy((rng.standard_gamma(shape) / rate).astype(np.float32))
        drawn = activity @ profiles
        if effect is not None:
            drawn = drawn * torch.from_numpy((rng.standard_gamma(effect[0]) / effect[1]).astype(np.float32))
        draws.append(drawn.clamp_min(1e-6))
    return draws


def start_parameters(
    data: Data, some: Data, config: "Config", hyper: Hyper, em: Start, local: Local, seed: int
) -> dict[str, Tensor]:
    """Posterior mean of each parameter of each measured gene, [P], given EM's rates in the cells of ``some``; two rounds where there are several."""
    likelihood = of_mean(find(config.likelihood))
    rows = np.random.default_rng([seed, 7]).permutation(some.counts.shape[0])[:START_CELLS]
    x = torch.from_numpy(some.counts[rows].toarray()).double()
    rates = (local.activity[rows].double() @ em.g.panel_profiles.double()).clamp_min(FLOOR)[None]
    z = (torch.from_numpy(log_share(data))[data.panel] - hyper.covariate_mean).clamp(*hyper.span)
    prior = {name: a + b * z for name, (a, b, _) in hyper.parameters.items()}
    found = dict(prior)
    for _ in range(min(2, len(found))):
        for name, (_, _, scale) in hyper.parameters.items():
            grid = likelihood.grid(name)[:, None]
            log_p = torch.from_numpy(score_grid(likelihood, name, found, x, rates))
            weight = torch.softmax(log_p - 0.5 * ((grid - prior[name]) / scale) ** 2, 0)
            found[name] = (weight * grid).sum(0)
    return {name: values.float() for name, values in found.items()}

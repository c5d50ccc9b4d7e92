r"""SIID: joint imputation and deconvolution from cells with a small panel and spots with many genes.

Zheng, Sarkar, Raphael, Genome Res 2025, doi:10.1101/gr.280555.125 (eq. 2 with platform scaling), written anew from the equations.

GENERATIVE STORY (preset "default")
    xi_kg        ~ Normal(log q0_g, 3)                      Q_k = softmax_g(xi_k), profiles on the spots' scale
    log phi_g    ~ Normal(m_phi, s_phi)                     platform factor, spots per cells; hyper-prior learned on held-out panel genes
    log theta_g  ~ Normal(a + b log share_g, s_theta)       inverse dispersion of the cells' counts (or the parameters of another likelihood)
    W_i          ~ Gamma(alpha, alpha h / size_i)           activities = N_i P_i of the paper, [h] per cell
    r_i          ~ Gamma(kappa, kappa / rho)                capture ratio = M_i / N_i of the paper
    x_ig         ~ NB(sum_k W_ik Q_kg / phi_g, theta_g)     cells, panel genes
    v_jg         ~ Poisson(sum_k U_jk Q_kg)                 spots, all genes;  U_jk = sum_i K_ij r_i W_ik, K the cell -> spot map
    "entropy"    factor -omega n_i H(P_i)                   sparse compositions, omega chosen by the data (0 where cells are mixed)
    "labels"     factor  w n_i log P_i,label                optional semi-supervision; factors with a label or a prior profile have its name

GUIDE
    normal q(xi), q(log phi), points for theta of measured genes, *hyper-priors* for phi and theta of genes that the cells never measured,
    q(W_i, r_i | x, v, Q): the closed-form gamma posterior after a fixed number of EM sweeps (`activity.py`), no per-cell parameters. Training
    uses its mean (with draws, independent noise in the activities distorts the profiles, RECORD.md); prediction draws from it. Several starts
    (``chains``) are fitted side by side and kept as the modes of the posterior: averaging over modes is worth more than any single one.

LIKELIHOOD OF THE CELLS (``likelihood=``: "nb", "poisson", "zinb" or a function of your own, `ppl_st.observation`)
    Taken as a function of the mean of the counts (`of_mean`), also with zero inflation: gain, phi and rho are ratios of counts.
    It scores x in the objective, so it decides profiles, platform factors and its own parameters in every SVI step; it is the count of the
    predictive; its hyper-priors are learned with it. What it does *not* reach: the EM start, the choices on inner genes of sweeps, sparsity and
    regional effect, and q(W_i, r_i), which are Poisson whatever the likelihood. An outlying count therefore still pulls the activities of its cell as
    a Poisson count would, also where the likelihood allows for it; ``cells="softmax"`` (the paper's point estimates by gradient) has no such step.

PREDICTIVE of gene g in cell i:  rate = sum_k W_ik Q_kg / phi_g  x  regional effect (`regional.py`, unmeasured genes only);  count ~ NB(rate, theta_g)

SYMBOLS  n cells, s spots, h factors, G genes of the spots, P panel genes; W [n, h], Q [h, G], U [s, h], K [n, s] sparse, phi, theta [G], r [n].

DIFFERENCES from paper and released code
    * a gene that Xenium never had can be imputed (released: only common genes), and all genes of the spots train the factors;
    * phi off the panel is integrated over its hyper-prior instead of fixed to 1; levels and intervals of imputed genes therefore mean something;
    * the start is data-driven (k-means, EM) instead of random; h, EM sweeps, sparsity and the regional effect are chosen on inner held-out genes
      and thinned counts instead of by hand (`hyper.py`);
    * locals are integrated (gamma) instead of point estimates; ``preset="paper"`` has the point estimates, L2, entropy schedule and Adam settings
      of the paper (``entropy="mean"`` is the released reading of its regulariser);
    * cells between spots are not assigned to spots: the radius is inferred from the counts (paper: nearest spot within 100 um), and a small shift
      of each section's spots is mended (``align``).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.svi import Pair, rng_scope
from ppl_st.inference.threads import torch_threads
from ppl_st.models.siid.activity import Local, aggregate
from ppl_st.models.siid.batches import Batch, Batches, Data
from ppl_st.models.siid.hyper import Hyper, default_hyper, learn_hyper, local_steps, start_parameters, subset
from ppl_st.models.siid.model import PRESETS, Config, Guide, Model, Spec, build, initialise, random_start, sides
from ppl_st.models.siid.regional import gamma_at, interpolation, regional_posterior, shared_normals, squares
from ppl_st.models.siid.spread import bootstrap, ends, mixed, shortfall, widened
from ppl_st.models.siid.warm_start import EM_CELLS, STREAMED, STRIDE, run_em, sweep_on
from ppl_st.sampling import standard_gamma

__all__ = [
    "PRESETS", "Batch", "Batches", "Config", "Data", "Guide", "Hyper", "Model", "Predictor", "Spec",
    "batches", "build", "empty", "factor_names", "proportions", "quantities", "select", "spec_from", "spec_to", "start",
]  # fmt: skip

CONVERGED = 3  # compositions are read off after so many times the sweeps of imputation, which stops early
NEGLIGIBLE = 0.05  # counts: a factor with fewer in a cell adds less than this to the variance of the cell's counts
SAME_FACTORS = 0.9  # share of the average cell from which two chains are said to have found the same factors
MATCHED_CELLS = 20_000  # cells by which the factors of chains are matched
MIN_INNER_PANEL = 15  # panel genes below which nothing is held out to learn settings from


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """Choose settings, run EM for every chain, and return the initialised ensemble with its specification."""
    with torch_threads(config.fit.threads):
        return _start(data, config, seed, say)


def _start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    n, genes = data.counts.shape[0], data.spot_counts.shape[1]
    conjugate = config.cells == "conjugate"
    if conjugate and len(data.panel) >= MIN_INNER_PANEL:
        hyper = learn_hyper(data, config, seed, say)
    else:
        hyper = default_hyper(data, config)
        if conjugate:
            say(
                f"only {len(data.panel)} panel genes (fewer than {MIN_INNER_PANEL}), so none are held out to learn from: {hyper.factors} factors, no "
                f"regional effect, and for new genes an assumed gain sd of {hyper.gain_scale:g} and the declared prior of the likelihood's parameters"
            )
    spec = Spec(n, hyper.factors, [int(g) for g in data.panel], genes, hyper)
    pairs = []
    for chain in range(config.chains):
        own = seed + STRIDE * chain
        pair = build(config, spec, data)
        if conjugate:
            some = subset(data, EM_CELLS, np.random.default_rng([seed, 6, chain]))
            em, local, _ = run_em(some, config, hyper.factors, hyper.sparsity, own, hyper.sweeps)
            say(f"chain {chain}: EM log-likelihood {em.log_likelihood:.6g}")
            if some.spot_counts.shape[0] < data.spot_counts.shape[0]:
                em = sweep_on(data, config, em, local_steps(config.local_steps, hyper.sweeps))
                say(f"chain {chain}: EM ran on {some.spot_counts.shape[0]} spots; {STREAMED} more sweeps over all {data.spot_counts.shape[0]}")
            if config.likelihood != "nb":
                em = em._replace(parameters=start_parameters(data, some, config, hyper, em, local, own))
            initialise(pair, em)
        else:
            random_start(pair, own)
        pairs.append(pair)
    return ensemble(pairs), spec


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
    """Minibatches of spots with their cells."""
    return Batches(data, config.batch_spots, seed)


def select(pair: Pair, data: Data, config: Config, seed: int) -> Pair:
    """Chains by rising loss on up to four minibatches, the best first; only that one with ``keep="best"``."""
    from pyro.infer import Trace_ELBO

    minibatches = batches(data, config, seed)
    chains = chains_of(pair)
    losses = []
    for chain in chains:
        with torch.no_grad(), rng_scope(seed, "select"):
            losses.append(
                sum(
                    float(Trace_ELBO().loss(chain.model, chain.guide, minibatches.at(step)))
                    for step in range(min(4, len(minibatches)))
                )
            )
    order = np.argsort(losses, kind="stable")
    return ensemble([chains[c] for c in (order if config.keep == "all" else order[:1])])


class Predictor:
    """Posterior predictive of cells; see `ppl_st.inference.predict.Predictor`."""

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        if config.cells == "softmax" and data.counts.shape[0] and not data.spot_counts.shape[0]:
            raise UserError(
                "the paper's form (cells='softmax') has parameters for the cells of the fit alone: it cannot predict new cells; refit"
            )
        self.chains, self.data, self.config = chains_of(pair), data, config
        self.models, self.guides = zip(*(sides(chain) for chain in self.chains), strict=True)
        self.n_cells = data.counts.shape[0]
        self.batches = Batches(data, config.batch_spots, 0)
        self.bandwidth, self.shape = spec.hyper.bandwidth, spec.hyper.regional_shape
        # Only where there is a regional effect: U of each chain [s, h], or the squares of cells that have no spots around them [n].
        self.mixed: list[Tensor] = []
        self.squares: NDArray[np.int64] | None = None
        if config.regional and self.bandwidth > 0 and data.spot_counts.shape[0]:
            self.mixed = [self._mixed(c) for c in range(len(self.chains))]
        elif config.regional and self.bandwidth > 0:
            self.squares = squares(data.cell_xy)

    def _mixed(self, chain: int) -> Tensor:
        result = torch.zeros(self.data.spot_counts.shape[0], self.guides[chain].spec.factors)
        for batch in self.batches.in_order(2048):
            if batch.spots.numel():
                local = self._posterior(batch, chain)
                result[batch.spots] = aggregate(batch, local.capture[:, None] * local.activity)
        return result

    def _posterior(self, batch: Batch, chain: int) -> Local:
        return self.guides[chain].local_posterior(batch, self.config.predict_steps)

    def blocks(self, max_cells: int) -> Any:
        """Batches that own every cell once."""
        return self.batches.in_order(max_cells)

    def restrict(self, batch: Batch, keep: NDArray[np.bool_]) -> Batch:
        """The batch owning only cells in ``keep`` [n]; the others still inform the spots."""
        return batch._replace(owned=batch.owned & torch.from_numpy(keep[batch.cells.numpy()]))

    def rows(self, batch: Batch) -> NDArray[np.int64]:
        """Rows of the result that the batch owns."""
        return batch.cells[batch.owned].numpy()

    def local(self, batch: Batch, chain: int) -> tuple[Local, dict[tuple[int, int], Any], Any]:
        """Local posterior of the owned cells, a place for the regional effect of the genes asked for, and the spots that it needs."""
        local = self._posterior(batch, chain)
        return Local(*(part[batch.owned] for part in local)), {}, self._near(batch)

    def _near(self, batch: Batch) -> tuple[Any, NDArray[np.int64]] | None:
        """Kernel [rows, u] over the u spots (or squares) near the owned cells, and their numbers [u]; None without a regional effect."""
        rows = self.rows(batch)
        if self.squares is not None:
            used, column = np.unique(self.squares[rows], return_inverse=True)
            return sp.csr_matrix((np.ones(len(rows), np.float32), (np.arange(len(rows)), column)), shape=(len(rows), len(used))), used
        return interpolation(self.data.cell_xy[rows], self.data.spot_xy, self.bandwidth) if self.mixed else None

    def count_dist(self, batch: Batch, chain: int, drawn: dict[str, Tensor], local: Any, genes: Tensor) -> Any:
        """p(count | draw): activities and regional effect are drawn here, the effect alike in every block that the draw of the globals is used in."""
        posterior, effects, near = local
        activity = _draw_activity(posterior)
        effect = None
        if near is not None:
            key = (int(genes[0]), len(genes))
            if key not in effects:
                effects.clear()  # one block of genes at a time: memory must not grow with the genes asked for
                effects[key] = self._effect(batch, chain, genes, near[1])
            (shape, rate), (weights, spots) = effects[key], near
            # Points have no draw to know it by: then the effect is shared within the block only.
            draw: Any = [torch.initial_seed()] if self.config.posterior == "delta" else drawn["xi"].detach().flatten()[:4].numpy().view(np.uint32)
            effect = gamma_at(torch.from_numpy(shared_normals(weights, spots, draw, genes.numpy())), shape, rate)
        return self.models[chain].count_dist(drawn, activity, genes, effect)

    def _effect(self, batch: Batch, chain: int, genes: Tensor, used: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Shape and rate of the regional effect [rows, genes] (both a, its prior, where there are no spots) by the spots ``used`` [u]."""
        if self.squares is not None:
            return torch.tensor(self.shape), torch.tensor(self.shape)
        profiles = torch.softmax(self.guides[chain].mean_logits().detach(), -1)[:, genes]
        expected = (self.mixed[chain][used] @ profiles).numpy()
        counts = self.data.spot_counts[used][:, genes.numpy()]
        where = self.data.cell_xy[self.rows(batch)]
        shape, rate = regional_posterior(where, self.data.spot_xy[used], counts, expected, self.bandwidth, self.shape)
        return torch.from_numpy(shape), torch.from_numpy(rate)


def _draw_activity(posterior: Local) -> Tensor:
    """One draw of the activities [n, h]; shapes below `NEGLIGIBLE` (most factors of a cell) keep their mean, which costs no draw."""
    flat = posterior.shape.reshape(-1)
    drawn = torch.nonzero(flat > NEGLIGIBLE).squeeze(1)
    return flat.index_copy(0, drawn, standard_gamma(flat[drawn])).view_as(posterior.shape) / posterior.rate


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the best chain, for every cell: ``obsm`` proportions [n, h]; ``obs`` factor (the largest), size and captured (N and M of the paper).

    Cells in no spot have no capture: NaN.
    """
    shares, sizes = _compositions(chains_of(pair)[0], data, config)
    sizes[np.diff(data.mapping.indptr) == 0, 1] = np.nan
    names = np.array(factor_names(data, spec.factors))
    factor = pd.Categorical(names[shares.argmax(1)], categories=names)
    return {"proportions": shares}, {"factor": factor, "size": sizes[:, 0], "captured": sizes[:, 1]}


def _compositions(chain: Pair, data: Data, config: Config) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Factor proportions of every cell [n, h], its size and what is captured of it [n, 2]."""
    _, guide = sides(chain)
    shares = np.zeros((data.counts.shape[0], guide.spec.factors), np.float32)
    sizes = np.zeros((data.counts.shape[0], 2), np.float32)
    for batch in Batches(data, config.batch_spots, 0).in_order(2048):
        local: Local = guide.local_posterior(batch, CONVERGED * config.predict_steps)
        rows, total = batch.cells[batch.owned].numpy(), local.activity.sum(1)
        shares[rows] = (local.activity / total[:, None].clamp_min(1e-8))[batch.owned].numpy()
        sizes[rows] = torch.stack([total, total * local.capture], 1)[batch.owned].numpy()
    return shares, sizes


def factor_names(data: Data, factors: int) -> list[str]:
    """Names of the factors: cell types of the prior profiles and labels come first, the others are factor<k>."""
    rest = (f"factor{k}" for k in range(data.named, factors))
    return [*data.names, *(f"{name} (no label)" if name in data.names else name for name in rest)]


def proportions(
    pair: Pair, data: Data, config: Config, draws: int, seed: int
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.float32]]:
    """Factor proportions of the spots, their mean, sd, q05 and q95 over draws, [s, h] each, and mean profiles [h, G] of the best chain.

    A spot without cells has no proportions: NaN. With ``cells="softmax"`` (the paper's presets) all is a point: sd 0, q05 = q95 = mean.

    A draw weighs every count by Gamma(count, 1) / count (weighted likelihood bootstrap), draws the profiles from the guide of its chain and solves
    for the activities again: unlike independent gamma posteriors of the activities it keeps the trade-off between factors that explain the same
    counts. Chains that found the same factors (`_same_factors`) take turns: what differs between fits is uncertainty too. Draws are spread by what
    such intervals miss in a copy of the counts whose proportions are known (`spread.py`).
    """
    chains, orders = _same_factors(chains_of(pair), data, config)
    guides = [sides(chain)[1] for chain in chains]
    nothing = np.full((data.spot_counts.shape[0], guides[0].spec.factors), np.nan, np.float32)
    found = {name: nothing.copy() for name in ("mean", "sd", "q05", "q95")}
    drawn = draw_globals(chains, draws, seed)
    for b, batch in enumerate(Batches(data, config.batch_spots, 0).in_order(8192)):
        if not batch.spots.numel():
            continue
        spots = np.zeros((draws, len(batch.spots), guides[0].spec.factors), np.float32)
        means = [guide.local_posterior(batch, CONVERGED * config.predict_steps) for guide in guides[:draws]]
        for d in range(draws):
            c = d % len(chains)
            if config.cells == "conjugate":
                log_phi = drawn[d].get("log_phi", torch.zeros_like(guides[c].measured))
                with torch.no_grad(), rng_scope(seed, "proportions", b, d):
                    share = bootstrap(batch, means[c], guides[c].conditioning(drawn[d]["xi"], log_phi))
            else:
                share = mixed(batch, means[c])
            spots[d] = share[:, orders[c]].numpy()
        rows = batch.spots.numpy()  # each holds a cell
        found["mean"][rows] = spots.mean(0)
        if config.cells == "conjugate":
            known = guides[0].conditioning(guides[0].mean_logits().detach(), guides[0].log_phi_loc.detach())
            steps = local_steps(CONVERGED * config.predict_steps, guides[0].spec.hyper.sweeps)
            with torch.no_grad(), rng_scope(seed, "copy", b):
                spots = widened(spots, shortfall(batch, means[0], known, steps, spots, len(chains)))
        found["sd"][rows], (found["q05"][rows], found["q95"][rows]) = spots.std(0), ends(spots)
    return found, torch.softmax(guides[0].mean_logits().detach(), -1).numpy()


def _same_factors(chains: list[Pair], data: Data, config: Config) -> tuple[list[Pair], list[Tensor]]:
    """The chains whose factors are those of the first one, and for each the order that makes them so.

    Factors are matched one to one by the cells that are made of them, not by their profiles: two factors that share a type have
    the same. A chain is left out when less than `SAME_FACTORS` of the average cell is of the same factors (with many factors every start cuts the
    cells in another way).
    """
    if len(chains) == 1:
        return chains, [torch.arange(sides(chains[0])[1].spec.factors)]
    if config.cells == "conjugate":  # else cells have parameters of their own, by their row
        data = subset(data, MATCHED_CELLS, np.random.default_rng(0))
    shares = [_compositions(chain, data, config)[0] for chain in chains]
    kept, orders = [], []
    for chain, one in zip(chains, shares, strict=True):
        order = linear_sum_assignment(shares[0].T @ one, maximize=True)[1]
        if np.minimum(shares[0], one[:, order]).sum(1).mean() >= SAME_FACTORS:
            kept.append(chain)
            orders.append(torch.from_numpy(order))
    return kept, orders

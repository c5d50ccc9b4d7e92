r"""VISTA: imputation of spatial cells from dissociated cells through one latent state, with a spatial graph that reaches the prediction.

Liu et al., VISTA (2025), after gimVI (Lopez et al. 2019), written anew from the equations. ``graph="none"`` is gimVI.

GENERATIVE STORY (preset "default"; reference cells n, spatial cells i, G genes of the reference, P of them the panel)
    z_n            ~ Normal(0, I_d)                                              reference cells
    z_i            ~ Normal(w . mean_{j near i} z_j, 1 - w^2)                    spatial cells ("prior"); Normal(0, I) in the other graph modes
    log l_n        ~ Normal(m, v)                                                library of a reference cell
    x_ng           ~ NB(l_n softmax_g(b_g + s_g (z_n A)_g), theta_g)             reference counts (or ZINB); A without its last row there,
    delta_g, k_g, log theta'_g ~ Normal(hyper-priors learned on inner held-out genes)    gain, slope, inverse dispersion in the target
    x'_ig          ~ NB(D_i (l'_i / D_i)^a_g exp(b_g + delta_g + k_g bend((z_i A)_g) - c_g(k_g)), theta'_g)    spatial counts; l' the cell's total,
                                                                                 D its section's median, a_g an exponent; bend:
                                                                                 `ppl_st.models.common.counts`; c_g takes off what
                                                                                 the slope adds to the level (`levels.py`). Of an unmeasured
                                                                                 gene z_i A is mixed with a process over the reference's
                                                                                 cells (`process.py`)
    "adversary"    factor -kappa N loss of a critic that tells the two sides' z apart (off by default)

GUIDE
    q(z | x)       normal; location = closed-form map of the panel genes, log-normalised and z-scored within each modality (`closed.py`): no gene-wise
                   platform effect enters, and the map is the same on both sides. Genes that only the target has denoise the panel and give
                   the depth. Several chains are Bayesian bootstraps of the reference.
    graph          "prior": location moved towards the neighbors' mean by a share chosen on inner held-out genes; "posterior": moved by that share
                   towards what graph attention makes of cell and neighbors, which starts as their mean (closed map) or at zero (learned map);
                   "kl_only": the released code, where the graph alters the KL term alone. Shares are zero in `build`: gimVI in every mode.
    training       in each step a quarter of the panel is hidden from the encoder, in cells and neighbors alike, and only hidden genes are scored:
                   attention, gains, slopes and dispersions are learned in the situation in which they will be used. The log-likelihood of
                   the |H| of P genes that are hidden counts P / |H| times: over steps that hide each gene equally often,
                   E (P / |H|) sum_{g in H} log p(x_g | visible) = sum_g E[log p(x_g | visible) | g hidden], every count once, as
                   every gene has one prior; unscaled, gene-level posteriors were those of a quarter of the counts. (``visible=1``: the
                   whole evidence bound, which trains shares and spreads too.) After the fit, gains of measured genes are set with all genes seen.

PREDICTIVE of gene g in cell i: z_i ~ q(z | x', neighbors); where g was not measured delta_g, k_g, theta'_g ~ hyper-prior, and the error of its
pattern, drawn once for all cells along directions of the target and smooth waves of the coordinates (`inner.py`); count ~ NB(rate, theta'). Means of
rates and of log-normalised counts are integrated, not drawn.

``map="learned"`` (presets "paper", "released", "gimvi") has networks, softmax over the panel, ZINB reference, classifier and settings.

SYMBOLS  n spatial, m reference cells, G genes, P panel, A panel and genes that only the target has, d latent dimensions;
         of a batch: B seeds, c seeds and their neighbors, R reference cells.

DIFFERENCES from paper and released code
    * the graph is computed once over all cells, with rows that are row numbers, within sections; released: kNN among 128 random cells, per step;
    * prediction uses the same graph; released: none;
    * gain and dispersion of an unmeasured gene come from hyper-priors; released: dispersion is a random initialisation that never trained;
    * networks of the presets differ from the published ones in layers that `config.py` lists (encoders, library, dispersion, graph attention);
    * LayerNorm instead of BatchNorm: a batch of one cell is like any other; no argument is modified;
    * KL warm-up in "paper" follows gimVI (weight t / 8000 over 4000 steps); the default's ends;
    * minibatches stand for n spatial and m reference cells; released: each side counts as half, whatever its size (reference_weight = n / m does it).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.errors import UserError
from ppl_st.inference.adversary import Adversary, Player
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.randomness import gene_noise, rng_scope
from ppl_st.inference.svi import Pair
from ppl_st.models.common.counts import bend, log_mean, quadrature
from ppl_st.models.common.predictor import QUADRATURE, Kept
from ppl_st.models.common.process import Field
from ppl_st.models.vista.batches import Batch, Batches, Data, panel_share
from ppl_st.models.vista.closed import (
    SPREAD,
    Floats,
    Moments,
    directions_above_noise,
    fit_map,
    log_share,
    mixed_rows,
    moments,
    moments_over_cells,
    project,
    read_directions,
    second_moments,
    target_encoder,
    theta_of_zeros,
    totals_of,
    weights,
)
from ppl_st.models.vista.config import PRESETS, Config
from ppl_st.models.vista.inner import Hyper, default_hyper, error_loads, learn, levels_of
from ppl_st.models.vista.levels import interpolate, tabulate
from ppl_st.models.vista.model import LOG_SCALE, RESERVED, Guide, Model, Spec, build, sides
from ppl_st.models.vista.process import fit_process, mixed_features, weigh
from ppl_st.models.vista.style import as_reference
from ppl_st.observation import find, of_mean

__all__ = [
    "PRESETS", "Batch", "Batches", "Config", "Data", "Guide", "Hyper", "Model", "Predictor", "Spec", "adversary", "as_reference",
    "batches", "build", "empty", "initialise", "loss_scale", "quantities", "select", "spec_from", "spec_to", "start",
]  # fmt: skip

NODES = tuple(zip(*(part.tolist() for part in quadrature(3)), strict=True))  # and their weights
LEVEL_ROWS, LEVEL_CELLS, LEVEL_DRAWS = 2000, 10_000, 30  # over which the mean rate of a gene is taken: cells come again up to the first
BLOCK, PHI_ROWS = 256, 2048  # cells, with their neighbors, that are made dense, or have features, together
MIN_INNER_PANEL = 12  # panel genes below which nothing is held out to learn settings from


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """Choose settings, fit the closed-form map of every chain, and return the initialised ensemble with its specification."""
    likelihood = of_mean(find(config.likelihood, RESERVED))
    if config.map == "learned" and config.visible < 1:
        raise UserError(
            f"map='learned' with visible={config.visible}: networks are fitted to the whole evidence bound, with all genes visible, as published; "
            "add --set visible=1"
        )
    if config.adversary != "off" and config.map == "closed" and config.graph != "posterior":
        say(f"the adversary has nothing to move: the map is closed and graph={config.graph!r} has no attention")
    settings = {"penalty": config.penalty, "reweight": config.reweight, "denoise": config.denoise, "common": config.common, "process": config.process}
    fixed = {name: None if value == "auto" else float(value) for name, value in settings.items()}
    fixed["mix"] = None if config.graph in ("prior", "posterior") else 0.0
    if config.map == "closed" and len(data.panel) >= MIN_INNER_PANEL:
        hyper = learn(data, likelihood, fixed, seed, say)
    else:
        hyper = default_hyper(data, likelihood, fixed, config.map == "closed")
        if config.map == "closed":
            say(
                f"{len(data.panel)} shared genes: too few to hold some out (from {MIN_INNER_PANEL} on), so nothing is chosen on them: neighbors "
                "have no share in a cell's state, the hyper-priors of unmeasured genes are wide but for their levels"
            )
    totals = np.log(totals_of(data.reference))
    codes = range(int(data.reference_batch.max(initial=0)) + 1)
    library = [[float(part.mean()), float(max(part.std(), 0.05))] for part in (totals[data.reference_batch == b] for b in codes)]
    mine = moments(data.measured, data.batch)
    panel = [int(g) for g in data.panel]
    spec = Spec(panel, data.measured.shape[1], data.reference.shape[1], len(mine.mean), len(library), library, mine.depth, hyper)
    process = process_of(config, spec, data)
    pairs = []
    for chain in range(config.chains):
        with rng_scope(seed, "start", chain):
            pair = build(config, spec)
        initialise(pair, data, seed, chain, process)
        pairs.append(pair)
    return ensemble(pairs), spec


def loss_scale(data: Data, config: Config) -> float:
    """What the loss is multiplied by: one over the target's entries; of learned networks, whose Adam (eps .01) and clipping know how large a
    gradient is, one over the cells of both sides, as published."""
    n, genes = data.measured.shape
    return 1.0 / (n + data.reference.shape[0]) if config.map == "learned" else 1.0 / (n * genes)


def process_of(config: Config, spec: Spec, data: Data) -> Field | None:
    """The process over the reference's cells, where it has a share in the scores."""
    if config.map != "closed" or not spec.hyper.share:
        return None
    return fit_process(data, np.arange(data.reference.shape[1]), config.fit.seed)


def initialise(pair: Pair, data: Data, seed: int, chain: int, process: Field | None = None) -> None:
    """Write what is known from the data in closed form into a pair that `build` made, and give it the ``process``."""
    model, guide = sides(pair)
    model.process = process
    config, hyper = model.config, model.spec.hyper
    share = log_share(data)
    panel = sp.csr_matrix(data.reference[:, data.panel])
    mine, theirs = moments(data.measured, data.batch), moments(panel, data.reference_batch)
    with torch.no_grad():
        _write(model.covariate, share)
        _write(model.zeros, theta_of_zeros(data))
        model.parent.copy_(torch.from_numpy(data.parent))
        level, doubt = levels_of(data) if model.closed else (share - np.log(np.exp(share[data.panel]).sum()), np.zeros_like(share))
        mean, gains = level + 0.5 * doubt, "log_gain" in model.priors()  # gains make up for the doubt of their gene's level
        own = mean - 0.5 * doubt[data.parent] if gains else mean + panel_share(data)
        for to, value in ((model.level_variance, doubt), (model.level, own), (model.bias, mean - own if gains else np.zeros_like(own))):
            _write(to, value)
        for name, value in (("mean", mine.mean), ("sd", mine.sd), ("reference_mean", theirs.mean), ("reference_sd", theirs.sd)):
            _write(getattr(guide, name), value)
        _write(guide.depths, np.array([mine.depth, theirs.depth]))
        if model.closed:
            rng = np.random.default_rng([seed, 4, chain])
            w = weights(data, mine, hyper.reweight, rng) * (rng.standard_exponential(panel.shape[0]) if config.chains > 1 else 1.0)
            found = fit_map(second_moments(data, w / w.sum()), hyper.penalty, config.latent)
            loadings = directions_above_noise(data, mine, np.random.default_rng([seed, 5]))
            encoder = target_encoder(found, loadings, hyper.denoise)
            encoder = np.column_stack([encoder, np.full(len(encoder), 1 / len(encoder))])
            measured, n, d = data.measured, data.counts.shape[0], encoder.shape[1]
            both = np.column_stack([encoder, read_directions(loadings)])
            center, covariance = moments_over_cells(
                data.graph, hyper.mix, lambda some: project(measured[some], data.batch[some], mine, both)
            )
            sd = np.sqrt(np.maximum(np.diag(covariance), 0.0))
            _write(guide.place_mean, center[d:])
            _write(guide.place_sd, np.maximum(sd[d:], 1e-6))
            size = np.append(np.ones(d - 1), 1 / max(float(sd[d - 1]), 1e-6))
            encoder *= size
            covariance = covariance[:d, :d] * np.outer(size, size) * n / max(n - 1, 1)
            decoder = np.vstack([found.decoder, np.full(len(share), hyper.common)])
            spread = np.sqrt(np.maximum(np.einsum("dg,de,eg->g", decoder, covariance, decoder), 1e-12))
            for name, value in (("gram", found.gram), ("cross", found.cross), ("loadings", loadings), ("encoder", encoder)):
                _write(getattr(guide, name), value)
            _write(guide.reference_encoder, np.pad(found.encoder, ((0, 0), (0, 1))))
            _write(model.decoder, decoder / spread)  # score of unit sd over the target's cells
            _write(model.map_sd, spread)
            _write(model.reference_slope, found.scale * spread)
            _write(model.reference_log_theta, theta_of_zeros(data))
            _write(guide.log_scale, np.log(SPREAD * np.maximum(size * sd[:d], 1e-3)))
            _write(guide.reference_log_scale, np.full(d, np.log(SPREAD)))
            for side in (model, guide):
                if hasattr(side, "gate"):
                    side.gate.fill_(float(np.arctanh(hyper.mix)))

            def states(rows: NDArray[np.int64]) -> Floats:
                return mixed_rows(data.graph, hyper.mix, rows, lambda some: project(measured[some], data.batch[some], mine, encoder))

            _write(model.levels, _levels(model, guide, data, mine, states, rng))
        for name, (loc, _) in model.priors().items():
            getattr(guide, f"{name}_loc").copy_(loc)
        if "log_gain" in model.priors():
            counts = np.asarray(data.counts.sum(0), dtype=np.float64).ravel() + 0.5
            observed = torch.from_numpy(np.log(counts / counts.sum()) + panel_share(data)).float()
            guide.log_gain_loc[model.panel] = observed - model.level[model.panel]


def _levels(
    model: Model, guide: Guide, data: Data, mine: Moments, states: Callable[[NDArray[np.int64]], NDArray[Any]], rng: np.random.Generator
) -> Floats:
    """Weights of the process, where there is one, and the table of `levels.py`, from some cells and their ``states`` (rows -> [rows, d])."""
    hyper, found = model.spec.hyper, model.process
    some = rng.permutation(data.counts.shape[0])[:LEVEL_CELLS]
    rows = np.sort(np.resize(some, max(len(some), LEVEL_ROWS)))
    distinct, place = np.unique(rows, return_inverse=True)
    decoder, z, phi = model.decoder.numpy().astype(np.float64), states(distinct)[place].astype(np.float64), None
    if found is not None:
        parts = np.array_split(distinct, -(-len(distinct) // PHI_ROWS))
        phi = np.concatenate([mixed_features(data, mine, found, hyper.mix, part) for part in parts])[place]
        for name, value in weigh(phi, z, decoder, found, hyper.share, data.panel)._asdict().items():
            _write(getattr(model, name), value)
    own, beside, center = (value.numpy().astype(np.float64) for value in (model.own, model.beside, model.center))
    drawn = z + guide.log_scale.clamp(*LOG_SCALE).exp().numpy() * rng.standard_normal(z.shape)

    def scores(part: slice) -> Floats:
        score = own[part] * (drawn @ decoder[:, part])
        if phi is not None and found is not None:
            score += beside[part] * (phi @ found.beta[:, part] - center[part])
        return bend(torch.from_numpy(score), hyper.bend)[0].numpy()

    log_total, log_usual = (np.log(total[rows] / mine.depth) for total in (totals_of(data.measured), data.usual))
    return tabulate(scores, decoder.shape[1], log_total, log_usual, model.exponents().numpy().astype(np.float64))


def _write(to: Tensor, value: NDArray[Any]) -> None:
    to.copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))


def empty(config: Config, spec: Spec, data: Data, chains: int) -> Pair:
    """An ensemble with every parameter in place, to read stored weights into."""
    with rng_scope(0, "empty"):
        pair = ensemble([build(config, spec) for _ in range(chains)])
    for side in pair:
        side.eval()  # stored weights are for prediction: no dropout
    process = process_of(config, spec, data)
    for chain in chains_of(pair):
        sides(chain)[0].process = process
    return pair


def spec_to(spec: Spec) -> dict[str, Any]:
    """The specification as plain JSON."""
    return {**spec._asdict(), "hyper": spec.hyper._asdict()}


def spec_from(stored: dict[str, Any]) -> Spec:
    """Inverse of `spec_to`."""
    return Spec(**{**stored, "hyper": Hyper(**stored["hyper"])})


def batches(data: Data, config: Config, seed: int) -> Batches:
    """Minibatches of spatial cells with their neighbors, and of reference cells."""
    return Batches(data, config.batch_cells, config.batch_reference, seed, config.visible)


def adversary(pair: Pair, config: Config) -> Adversary | None:
    """The critics of all chains, or None."""
    if config.adversary == "off":
        return None

    def player(c: int, chain: Pair) -> Player:
        critic = sides(chain)[0].opponent[0]
        assert critic is not None
        return Player(critic, lambda drawn: (drawn[f"chain{c}/z_reference"], drawn[f"chain{c}/z"]))

    return Adversary([player(c, chain) for c, chain in enumerate(chains_of(pair))], config.adversary)


def select(pair: Pair, data: Data, config: Config, seed: int) -> Pair:
    """All chains are kept: they are draws of one posterior, not competitors.

    Measured genes were scored when they were hidden from the encoder, and are predicted when they are not: their states vary more then. So their
    gains, where there are any, move to where the mean rate over cells is the measured one. With ``visible=1`` they were seen in training too, but the
    states' spreads were trained, with ``graph="posterior"`` the attention: the table of levels of the closed map is made anew.
    """
    chains = chains_of(pair)
    if config.map == "closed" and (config.visible == 1 or sides(chains[0])[1].attends):
        for c, chain in enumerate(chains):
            _renew_levels(*sides(chain), data, np.random.default_rng([seed, 7, c]))
    if config.visible == 1 or config.platform != "hierarchical":
        return pair
    predictor = Predictor(pair, data, config, sides(chains[0])[0].spec)
    rows = np.sort(np.random.default_rng([seed, 6]).permutation(predictor.n_cells)[:LEVEL_CELLS])
    counts, depth = torch.from_numpy(np.asarray(data.counts.sum(0), dtype=np.float32).ravel()), float(totals_of(data.measured).sum())
    for c, chain in enumerate(chains):
        model, guide = sides(chain)
        drawn, total, seen = draw_globals([chain], LEVEL_DRAWS, seed), torch.zeros(len(counts)), 0.0
        with torch.no_grad(), rng_scope(seed, "levels", c):
            for batch in predictor.batches.in_order(BLOCK, rows):
                local = predictor.local(batch, c)
                total += sum(predictor.count_dist(batch, c, one, local, model.panel).mean.sum(0) for one in drawn) / LEVEL_DRAWS
                seen += float(batch.total[: len(batch.rows)].sum())
            every = total * (depth / seen)  # in all cells: of a faint gene some have no count at all
            guide.log_gain_loc[model.panel] += ((counts + 0.5) / (every + 0.5)).log()
    return pair


def _renew_levels(model: Model, guide: Guide, data: Data, rng: np.random.Generator) -> None:
    """The table of levels of the trained states; gains of measured genes take up the difference at their slopes."""
    panel, before, every = model.panel, model.levels.clone(), Batches(data, 0, 0, 0)
    with torch.no_grad():
        states = lambda rows: np.concatenate([guide.states(batch)[0].numpy() for batch in every.in_order(BLOCK, rows)])  # noqa: E731
        _write(model.levels, _levels(model, guide, data, moments(data.measured, data.batch), states, rng))
        if "log_gain" in model.priors():
            after, before = (interpolate(table, guide.slope_loc[panel], panel) for table in (model.levels, before))
            guide.log_gain_loc[panel] += after - before


class Local(NamedTuple):
    """Cells of a block before the draws."""

    loc: Tensor  # [n, d] of q(z)
    scale: Tensor
    log_total: Tensor  # [n]
    log_usual: Tensor  # [n] of the median total in the cell's section
    along: Tensor | None  # [n, q + K] along what patterns err, in sd of the log rate
    phi: Tensor | None  # [n, F] features of the process
    beyond: dict[tuple[int, ...], Tensor]  # the process's part of the scores of the last genes asked for, the same in all draws


class Predictor:
    """Posterior predictive of spatial cells; see `ppl_st.inference.predict.Predictor`."""

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        self.chains = chains_of(pair)
        self.models, self.guides = zip(*(sides(chain) for chain in self.chains), strict=True)
        self.n_cells = data.counts.shape[0]
        self.data, self.batches = data, Batches(data, 0, 0, 0)
        self.loads = error_loads(spec.hyper, data.waves.shape[1])  # [q + K]
        if config.map == "closed" and config.platform == "hierarchical" and config.likelihood in ("nb", "poisson"):
            self.closed_form = self._closed_form
        self.kept = Kept()

    def blocks(self, max_cells: int) -> Any:
        """Batches that own every cell once."""
        return self.batches.in_order(max_cells)

    def at(self, rows: NDArray[np.int64]) -> Batch:
        """Any cells as a batch."""
        return self.batches.of(rows)

    def restrict(self, batch: Batch, keep: NDArray[np.bool_]) -> Batch:
        """The batch owning only cells in ``keep`` [n]; their neighbors still inform them."""
        kept = np.flatnonzero(keep[batch.rows.numpy()])
        return self.batches.of(batch.rows.numpy()[kept])

    def rows(self, batch: Batch) -> NDArray[np.int64]:
        """Rows of the result that the batch owns."""
        return batch.rows.numpy()

    def local(self, batch: Batch, chain: int) -> Local:
        """What is known of the owned cells before the draws."""
        with torch.no_grad():
            loc, scale = self.guides[chain].states(batch)
            phi, along = self.guides[chain].features(batch), None
            if self.models[chain].closed:
                features = torch.cat([self.guides[chain].places(batch), torch.from_numpy(self.data.waves[batch.rows.numpy()])], 1)
                along = features * torch.from_numpy(self.loads).float()  # [n, q + K]
            return Local(loc, scale, batch.total[: len(batch.rows)].log(), batch.usual.log(), along, phi, {})

    def count_dist(self, batch: Batch, chain: int, drawn: dict[str, Tensor], local: Local, genes: Tensor) -> Any:
        """p(count | draw): states are drawn here; the error of an unmeasured gene's pattern is the same in all blocks of cells."""
        model, error, beyond = self.models[chain], torch.tensor(0.0), None
        if local.along is not None:
            noise = self.kept(genes, int(drawn["gene_key"]), lambda: gene_noise(drawn["gene_key"], genes, len(self.loads) + 1))
            doubt = self._layer_doubt(model, genes)
            error = local.along @ noise[:-1] - 0.5 * local.along.square().sum(1, keepdim=True)
            error = error * (1 - model.measured[genes]) + doubt.sqrt() * noise[-1] - 0.5 * doubt
        if local.phi is not None:
            beyond = self._beyond(model, local, genes)
        z = local.loc + local.scale * torch.randn_like(local.loc)
        return model.count_dist(drawn, z, local.log_total, local.log_usual, genes, beyond, error)

    def _layer_doubt(self, model: Model, genes: Tensor) -> Tensor:
        """Variance [g] of the log levels of genes ``GENE:layer``: their gain is that of the gene, and knows the doubt of the gene's level only."""
        return model.level_variance[genes] * (model.parent[genes] != genes) * (model.config.platform == "hierarchical")

    def _beyond(self, model: Model, local: Local, genes: Tensor) -> Tensor:
        assert local.phi is not None
        key = tuple(genes.tolist())
        if key not in local.beyond:
            local.beyond.clear()  # one block of genes at a time: memory must not grow with the genes asked for
            local.beyond[key] = model.beyond(local.phi, genes)
        return local.beyond[key]

    def _closed_form(self, batch: Batch, chain: int, local: Local, genes: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior means [n, g] of the rate and of log1p(count x ``factor`` [n, 1]): states, slopes and, in the latter, levels by quadrature.

        The gain's doubt, and those of a layer's level and of the pattern, whose factors have mean 1, are integrated in the rate exactly.
        """
        model, laws = self.models[chain], self.guides[chain].gene_laws()
        decoder = model.decoder[:, genes]
        mean, noise = local.loc @ decoder, (local.scale.square() @ decoder.square()).sqrt()
        if local.phi is not None:
            mean, noise = model.own[genes] * mean + self._beyond(model, local, genes), model.own[genes] * noise
        (gain, gain_sd), (slope, slope_sd) = laws["log_gain"], laws["slope"]
        drawn, log_theta = {"log_gain": gain + 0.5 * gain_sd.square()}, laws["log_theta"][0][genes] if "log_theta" in laws else None
        spread = gain_sd[model.parent[genes]].square()[None] + self._layer_doubt(model, genes)
        if local.along is not None:
            spread = spread + local.along.square().sum(1, keepdim=True) * (1 - model.measured[genes])
        rate, lognorm, one = torch.zeros_like(mean), torch.zeros_like(mean), torch.ones(1)
        for slope_node, slope_weight in zip(*QUADRATURE, strict=True):
            drawn["slope"] = slope + slope_node * slope_sd
            for node, weight in NODES:
                found = model.log_rate_at(drawn, mean + node * noise, local.log_total, local.log_usual, genes).exp()
                rate += slope_weight * weight * found
                for level, level_weight in NODES if factor is not None else ():
                    drifted = found * (level * spread.sqrt() - 0.5 * spread).exp()
                    lognorm += slope_weight * weight * level_weight * log_mean(drifted, one, log_theta, 1.0, factor)
        return rate, lognorm


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the first chain, for every cell: ``obsm`` latent [n, d], the posterior mean of its state."""
    return {"latent": _states(sides(chains_of(pair)[0])[1], data)}, {}


def _states(guide: Guide, data: Data) -> NDArray[np.float32]:
    """Posterior means of the states of all cells, [n, d]."""
    with torch.no_grad():
        return np.concatenate([guide.states(batch)[0].numpy() for batch in Batches(data, 0, 0, 0).in_order(2048)])

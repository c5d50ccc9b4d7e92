r"""SpaGene: two autoencoders, two translators between their codes, and a game that aligns them.

Budhkar et al., bioRxiv 2025, doi:10.1101/2025.10.03.680242, written anew from the equations.

GENERATIVE STORY
    stage 1, either side alone (`autoencoder.py`)
        z_i ~ Normal(0, I);   x_i ~ p(x | decoder(z_i))                        then frozen; q(z | x) of every cell is computed once
    stage 2 (`model.py`, `direction.py`), forward: spatial cells to reference codes; backward alike with the sides exchanged
        z_i   ~ q(z | x_i)                                                     "forward_z"           [B, q]
        W     ~ Normal(0, r_k s_k)                                             "forward_translator"  [q, F]
        y_i   = z_i W R + e^a noise_i,  noise_i ~ Normal(0, I)                 "forward_noise"       [B, L] code in the reference's latent; only
                                                                               factors read it: without one (default) predictions leave it out
        t_g   ~ Normal(W d_g, s)                                               "forward_identity"    [q, P] shared genes, see `closed.py`
    factors, all optional and by name
        forward_cycle      -w N mean (D_own(T_back(y)) - x)^2                  a decoder of log rates is held against D_own(z) in x's place
        forward_coral      -w N |cov(y) - cov(z_reference)|^2 / 4 d^2          statistics of the two minibatches, of any two sizes
        forward_mmd        -w N MMD^2(y, z_reference)
        forward_adversary  -w N loss of a critic (`ppl_st.inference.adversary`), one per direction
    counts of gene g in cell i (`ppl_st.models.common.counts`)
        f_ig = (1 - s) z_i . ((1 - c) W d_g + c b_g) + s phi_i . beta_g + z_i . deviation_g
               b_g by the reference's own regression (`regression.py`), beta_g by a Gaussian process over the reference's cells
               (`ppl_st.models.common.process`), of use where both sides are alike; c and s are chosen on inner genes
        x_ig ~ NB(depth_i exp(log_gain_g + slope_g f_ig - ...), theta_g)

GUIDE
    default: W | t is Gaussian and exact at the start, for either direction; factors, if any, then move its mean by SVI. An unmeasured gene integrates
    over W and its own deviation (every gene differs between platforms by more than a gain), both scaled so that they are as far as inner held-out
    genes were from their maps (e of `inner.py`), beta, the code's doubt, and level, slope, theta from hyper-priors learned on inner genes. ``z`` and
    ``noise`` have the same law in model and guide: what is known of them is what stage 1 and T say.
    Measured genes keep their own loadings, slope and theta. Their codes have read their counts: theta is of the rest around maps that partly are
    these counts (all of them where there are no more genes than directions), so residuals, predictive checks and log-likelihoods of these flatter.
    Backward, counts of the target's platform in reference cells: every gene is translated and in doubt as above; slope and theta by the forward
    hyper-priors, level the tissue's (`direction.on_target`).
    ``translator="network"``: networks for everything, trained; identity per cell and gene with hierarchical gain, offset and noise, or the published
    Pearson factor; the number of steps is chosen on inner held-out genes. Its predictive has the doubt of a cell's code and the translator's noise,
    carried through translator and decoder by draws in cells of the fit (their mean covariance, the same for all cells whatever their depth), and that
    of the hyper-priors; the weights of translators and decoders are points.

SYMBOLS  n spatial and M reference cells, A genes of the target, G of the reference, P of both; q and L latent dimensions; B cells of a minibatch.

DIFFERENCES from paper and released code
    * default: the autoencoders are linear and in closed form, so is the translator; coordinates smooth the codes; both compared in RECORD.md;
    * genes that only the target has place its cells, as in the paper; no gene or cell is filtered out;
    * preprocessing of ``preset="paper"`` (square root, clipped at mean + 2 sd of positive counts) sees training genes only;
    * frozen means frozen: evaluation mode, codes cached. Released: dropout and batch statistics move on in stage 2, and every step re-encodes;
    * LayerNorm and ReLU, no activation on codes. Released: BatchNorm and LeakyReLU, on codes too;
    * translators of the published presets are points, as published; "network" has the noise above, and learns it;
    * hinge with the right sign in "paper"; ``preset="released"`` has the fault (both terms push up) and the dominating gradient penalty;
    * MMD: multi-scale and unbiased; "released" kernel (fixed 0.3) in the published presets, where it is the constant 1/n + 1/m;
    * published epochs are steps here (2000); the learning rate of stage 2, halved every tenth of 50 epochs, falls along a cosine to a twentieth; and
      the best epoch is not chosen on the training genes.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine

from ppl_st.inference.adversary import Adversary, Player, critic_loss, logits
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.objective import Drawn, drawn_by
from ppl_st.inference.randomness import rng_scope
from ppl_st.inference.svi import Pair, fit_part
from ppl_st.models.common.cells import all_counts, median_depth, without
from ppl_st.models.common.counts import Codes, Hyper
from ppl_st.models.common.inner import MIN_PANEL, SHARES, default_hyper, learn_hyper
from ppl_st.models.common.predictor import MapPredictor, smoothed_place
from ppl_st.models.spagene.alignment import alignment_of
from ppl_st.models.spagene.autoencoder import Autoencoder, linear, train
from ppl_st.models.spagene.closed import Choice, Closed, choose, correlation, features, process_of
from ppl_st.models.spagene.data import Batch, Batches, Data, make
from ppl_st.models.spagene.direction import Direction
from ppl_st.models.spagene.model import (
    NAMES,
    PRESETS,
    Config,
    Guide,
    Model,
    Spec,
    build,
    direction_of,
    empty_sides,
    model_of,
)
from ppl_st.models.spagene.regression import Regression, loadings_of_all

__all__ = [
    "PRESETS", "Batch", "Batches", "Config", "Data", "Guide", "Hyper", "Model", "Predictor", "Spec", "adversary", "alignment",
    "batches", "build", "empty", "make", "quantities", "select", "spec_from", "spec_to", "start", "turned", "watch",
]  # fmt: skip

SPREAD_CELLS = 4096  # cells on which the spread of the places is taken
INNER_SHARE = 4  # one of so many shared genes is held out to choose the number of steps
WATCHED_CELLS = 300  # of either side, for the alignment while training


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """Stage 1, what inner held-out genes teach, and the translators at their start."""
    problems = (data, data.turned())
    make_linear = config.translator == "linear"
    sides = [train(problems[k], config.shape(k), config.stage1, config.batch_cells, seed, f"side {k}") for k in range(2)]
    both = (sides[0], sides[1])
    say(f"stage 1: codes of {sides[0].latent} and {sides[1].latent} dimensions")
    hypers, candidates, steps = [], [], config.fit.steps if config.noisy or not make_linear else 0  # 0: the start is exact
    ratios, deviations = [1.0, 1.0], [[], []]  # type: tuple[list[float], list[list[float]]]
    regressions: list[Regression | None] = [None, None]
    shares = [0.0, 0.0]
    for k in range(2):
        problem = problems[k]
        if make_linear:
            other = features(both[1 - k], problem.panel)
            chosen, regressions[k] = choose(problem, config.shape(k), both[1 - k], other, config.smoothing, config.reference_share, seed, say)
            fit_inner: Callable[[Data, NDArray[np.int64]], Any] = partial(_closed, config, k, other, chosen, regressions[k])
            hypers.append(learn_hyper(problem, replace(config, smoothing=chosen.smoothing), seed, say, fit_inner))
            ratios[k], deviations[k], shares[k] = chosen.ratio, chosen.deviations, chosen.share
            candidates += [{"direction": float(k), **one} for one in chosen.candidates]
        elif k == 0:
            steps, candidates = choose_steps(data, config, both[1], seed, say)
            hypers.append(learn_hyper(data, config, seed, say, partial(_inner_network, config, both[1], steps, seed), folds=1))
        else:
            hypers.append(default_hyper(problem, config))
    sizes = (both[0].latent, both[1].latent)
    spec = Spec((ratios[0], ratios[1]), (deviations[0], deviations[1]), (hypers[0], hypers[1]), steps, sizes, candidates, (shares[0], shares[1]))
    pair = _build(config, spec, data, both, seed)
    for k, regression in enumerate(regressions):
        if regression and shares[k]:
            scores = direction_of(pair, k).scores.numpy().astype(np.float64)
            found = loadings_of_all(problems[k], both[1 - k], regression.weights(scores, problems[k].panel))
            direction_of(pair, k).regressed.copy_(torch.from_numpy(found))
    return ensemble([pair]), spec


def _build(config: Config, spec: Spec, data: Data, sides: tuple[Autoencoder, Autoencoder], seed: int) -> Pair:
    with rng_scope(seed, "start"):
        return build(config, spec, data, sides)


def _closed(config: Config, k: int, other: Any, chosen: Choice, regression: Regression | None, data: Data, genes: NDArray[np.int64]) -> Closed:
    process_shares = SHARES if config.process == "auto" else (float(config.process),)
    found = process_of(data, genes, config.fit.seed) if max(process_shares) > 0 else None
    own = linear(data, config.shape(k))
    return Closed(data, own, other, chosen.ratio, genes, chosen.deviations, regression, chosen.share, found, process_shares, config.noisy)


class _Inner(NamedTuple):
    """Networks fitted to part of the panel, as `learn_hyper` wants them."""

    direction: Direction
    genes: NDArray[np.int64]

    def codes(self) -> Codes:
        genes = torch.from_numpy(self.genes)
        mean, noise = (part.detach().numpy() for part in (self.direction.mean_codes(genes)[0], self.direction.cell_noise(genes)))
        return Codes(mean, np.zeros_like(mean), noise=noise)

    def place(self, data: Data) -> NDArray[np.float32]:
        return self.direction.place(data, np.arange(data.counts.shape[0]))


def _inner_pair(config: Config, reference: Autoencoder, data: Data, seed: int) -> Pair:
    """Stage 1 of a target without inner genes, and stage 2 before training; the reference's side is the one of the whole problem."""
    target = train(data, config.shape(0), config.stage1, config.batch_cells, seed, "inner")
    hypers = (default_hyper(data, config), default_hyper(data.turned(), config))
    spec = Spec((1.0, 1.0), ([], []), hypers, config.fit.steps, (target.latent, reference.latent), [])
    return _build(config, spec, data, (target, reference), seed)


def _inner_network(config: Config, reference: Autoencoder, steps: int, seed: int, data: Data, genes: NDArray[np.int64]) -> _Inner:
    pair = _inner_pair(config, reference, data, seed)
    _train(pair, data, config, seed, config.fit, until=steps)
    direction = direction_of(pair, 0)
    _learn_spread(direction, data, seed)
    return _Inner(direction, genes)


def _train(pair: Pair, data: Data, config: Config, seed: int, settings: Any, state: Any = None, until: int | None = None) -> Any:
    scale = 1.0 / (data.counts.shape[0] * data.counts.shape[1])
    critics = game({"": model_of(pair)}, config)
    device = replace(settings, device="cpu")
    return fit_part(pair, batches(data, config, seed), device, state, scale=scale, until=until, adversary=critics)


def choose_steps(data: Data, config: Config, reference: Autoencoder, seed: int, say: Callable[[str], None]) -> tuple[int, list[dict[str, float]]]:
    """Training steps after which inner held-out genes are predicted best: they peak early and fall while training genes still climb."""
    whole = config.fit.steps
    if not config.checkpoints or len(data.panel) < MIN_PANEL:
        return whole, []
    order = np.random.default_rng([seed, 6]).permutation(len(data.panel))
    inner = np.sort(order[: len(order) // INNER_SHARE])
    split = without(data, inner)
    rows = np.sort(np.random.default_rng([seed, 7]).permutation(data.counts.shape[0])[:SPREAD_CELLS])
    truth = linear(data, config.shape(0)._replace(kind="linear", preprocess="lognorm")).read(data, rows, data.columns[inner]).numpy()
    pair, state, tried = _inner_pair(config, reference, split, seed), None, []
    for until in sorted({-(-whole * (i + 1) // config.checkpoints) for i in range(config.checkpoints)}):
        state = _train(pair, split, config, seed, config.fit, state, until)
        direction = direction_of(pair, 0)
        with torch.no_grad():
            guess = direction.place(split, rows) @ direction.other.loadings[torch.from_numpy(data.panel[inner])].numpy().T
        tried.append({"steps": float(until), "inner genes": float(correlation(guess, truth).mean())})
    best = max(tried, key=lambda one: one["inner genes"])
    say(f"{int(best['steps'])} of {whole} steps (correlation {best['inner genes']:.3f} on inner held-out genes)")
    return int(best["steps"]), tried


def empty(config: Config, spec: Spec, data: Data, chains: int) -> Pair:
    """An ensemble with every parameter in place, to read stored weights into."""
    return ensemble([_build(config, spec, data, empty_sides(config, spec.latent, data), 0) for _ in range(chains)])


def spec_to(spec: Spec) -> dict[str, Any]:
    """The specification as plain JSON."""
    return {**spec._asdict(), "hypers": [hyper._asdict() for hyper in spec.hypers]}


def spec_from(stored: dict[str, Any]) -> Spec:
    """Inverse of `spec_to`."""
    first, second = (Hyper(**hyper) for hyper in stored["hypers"])
    return Spec(**{**stored, "hypers": (first, second)})


def batches(data: Data, config: Config, seed: int) -> Batches:
    """Minibatches of both sides."""
    return Batches(data, config.batch_cells, config.batch_reference, seed)


def adversary(pair: Pair, config: Config) -> Adversary | None:
    """Two critics per chain: is a code of the reference real or translated, and of the target."""
    return game({f"chain{c}/": model_of(chain) for c, chain in enumerate(chains_of(pair))}, config)


def game(models: dict[str, Model], config: Config) -> Adversary | None:
    """The critics of these models, whose sites have these prefixes."""
    if config.adversary == "off":
        return None

    def player(prefix: str, model: Model, k: int) -> Player:
        def codes(drawn: Drawn) -> tuple[torch.Tensor, torch.Tensor]:
            way, name = model.way(k), f"{prefix}{NAMES[k]}"
            with torch.no_grad():
                translated = way.translate(drawn[f"{name}_z"], drawn.get(f"{name}_translator")) + way.noise() * drawn[f"{name}_noise"]
            return drawn[f"{prefix}{NAMES[1 - k]}_z"], translated

        return Player(model.opponents[k], codes)

    players = [player(prefix, model, k) for prefix, model in models.items() for k in range(2)]
    decay = 1e-3 if config.identity == "pearson" else 1e-6
    options = {"eps": config.critic_eps, "penalty": config.gradient_penalty, "center": config.gradient_center}
    return Adversary(players, config.adversary, lr=config.critic_lr, weight_decay=decay, **options)


def select(pair: Pair, data: Data, config: Config, seed: int) -> Pair:
    """All chains are kept; here they learn the spread of their maps, what measured genes show themselves, and over which cells levels are means."""
    problems = (data, data.turned())
    for chain in chains_of(pair):
        for k in range(2):
            if not direction_of(chain, k).linear:
                _learn_spread(direction_of(chain, k), problems[k], seed)  # as the inner fits, whose slopes it gets
        forward, backward = direction_of(chain, 0), direction_of(chain, 1)
        forward.counts.learn_own(data, partial(smoothed_place, forward, data, smoothing_of(chain, 0)), forward.known_codes)
        rows = np.random.default_rng(0).permutation(data.reference.shape[0])[: len(backward.counts.sample)]
        backward.counts.sample.copy_(torch.from_numpy(backward.place(problems[1], rows)))
    return pair


def smoothing_of(pair: Pair, k: int) -> float:
    """Share of the neighbors in a code, as chosen."""
    return float(model_of(pair).smoothing[k])


def _learn_spread(direction: Direction, data: Data, seed: int) -> None:
    some = np.sort(np.random.default_rng([seed, 3]).permutation(data.counts.shape[0])[:SPREAD_CELLS])
    direction.learn_spread(smoothed_place(direction, data, 0.0, some))
    with rng_scope(seed, "blur"):
        direction.learn_blur(data, some)


class Predictor(MapPredictor):
    """Posterior predictive of the reference's genes in spatial cells."""

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        chains = chains_of(pair)
        directions = [direction_of(chain, 0) for chain in chains]
        super().__init__(chains, directions, data, spec.hypers[0].smoothing, config.likelihood, closed_form=True)


class TurnedPredictor(MapPredictor):
    """Posterior predictive of the target's genes in reference cells, as the target's platform would count them in a cell of median depth."""

    restrict = None  # type: ignore[assignment]  # nobody has these counts: there is nothing to export beside them

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        chains = chains_of(pair)
        directions = [direction_of(chain, 1) for chain in chains]
        super().__init__([Pair(chain.model, one) for chain, one in zip(chains, directions, strict=True)], directions, data, 0.0, config.likelihood)
        self.depth = median_depth(all_counts(data.reference))

    def local(self, batch: Any, chain: int) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Places [n, q] and the common log depth [n, 1]."""
        place, log_depth, _ = super().local(batch, chain)
        return place, torch.full_like(log_depth, float(np.log(self.depth))), None


def turned(pair: Pair, data: Data) -> tuple[Any, Data]:
    """What `ppl_st.posterior.Run.turned` needs: a method whose cells are the reference's and whose genes are the target's, and its data."""
    return SimpleNamespace(Predictor=TurnedPredictor, Model=Model, quantities=lambda *_: ({}, {})), data.turned()


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """``obsm`` latent: codes of the cells [n, q]; translated: their mean codes in the reference's latent [n, L]."""
    chain = chains_of(pair)[0]
    with torch.no_grad():
        codes = model_of(chain).side(0).codes(data)[0]
        return {"latent": codes.numpy(), "translated": direction_of(chain, 0).translate(codes).numpy()}, {}


def watch(pair: Pair, config: Config, seed: int) -> Callable[[Batch], dict[str, float]] | None:
    """What the log says of the game while it is played: factors and critics' losses on a minibatch, alignment on some cells. None without a game."""
    if not (config.cycle_weight or config.coral_weight or config.mmd_weight or config.adversary != "off" or config.identity == "pearson"):
        return None
    first = chains_of(pair)[0]
    model = model_of(first)
    critics = game({"": model}, config)

    def look(batch: Batch) -> dict[str, float]:
        model.eval()
        size = model.problems[0].counts.shape[0] * model.problems[0].counts.shape[1]
        with torch.no_grad(), rng_scope(seed, "watch"):
            drawn = poutine.trace(first.guide).get_trace(batch)
            nodes = poutine.trace(poutine.replay(first.model, drawn)).get_trace(batch).nodes
            factors = {name: getattr(site.get("fn"), "log_factor", None) for name, site in nodes.items()}
            found = {f"{name.replace('_', ' ')} loss": -float(value) / size for name, value in factors.items() if value is not None}
            if critics:
                for name, player in zip(NAMES, critics.players, strict=True):
                    found[f"{name} critic loss"] = float(critic_loss(critics.kind, *logits(player.critic, *player.codes(drawn_by(drawn)))))
        model.train()
        return found | alignment_of(model, seed, WATCHED_CELLS)

    return look


def alignment(pair: Pair, data: Data, config: Config, seed: int) -> dict[str, float]:
    """How well translated codes and the other side's own mix, in either direction; see `alignment.py`."""
    return alignment_of(model_of(chains_of(pair)[0]), seed)

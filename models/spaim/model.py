"""Config and presets, and the closed-form SpaIM: Gaussian loadings of cell directions on gene features, with their exact posterior."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.inference.randomness import gene_noise
from ppl_st.inference.svi import FitConfig, Pair
from ppl_st.models.common.cells import Directions, all_counts, find_directions, place_cells
from ppl_st.models.common.counts import Codes, CountLayer, Hyper
from ppl_st.models.common.inner import SHARES
from ppl_st.models.common.process import Part, Process, beside, process
from ppl_st.models.spaim.data import Batch, Data
from ppl_st.models.spaim.kernel import SELF, GeneKernel, features, landmarks
from ppl_st.models.spaim.network import build_network
from ppl_st.models.spaim.regression import Regression, own_share, positions

RATIOS = np.geomspace(1e-4, 1e3, 50)  # signal over noise of a direction: grid of the start
LENGTHSCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
REGRESSIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
USUAL, USUAL_SD = 0.5, 0.35  # log lengthscale ~ Normal(log 0.5, 0.35^2): others need some nats of evidence
LEADING = 50  # directions that the kernel sees where the regression has no weight
SILENT = 3e-3  # directions below this ratio say nothing of an unmeasured gene: left to the counts' dispersion


@dataclass(frozen=True)
class Config:
    """Settings of SpaIM. `PRESETS` has the default, the neural pair and the published values."""

    features: Literal["kernel", "network"] = "kernel"  # closed-form Bayesian layer, or the style-transfer networks
    directions: int = field(default=200, metadata={"ge": 1})  # of the cells, at most; without weight of the regression 50
    landmarks: int = field(default=512, metadata={"ge": 2})  # genes that carry the features; no approximation below this panel size
    # of the radial kernels, in units of 1 - correlation; auto: pseudo-likelihood
    lengthscale: float | Literal["auto"] = field(default="auto", metadata={"gt": 0})
    # weight of the regression inside the reference, 0 to 1; auto: pseudo-likelihood
    regression: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    # share of the process over the reference's cells in an unmeasured gene's map; auto: chosen on inner held-out genes
    process: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    reference_errors: bool = True  # propagate the sampling errors of the cluster profiles
    # share of the spatial neighbors in a cell's place; auto: chosen on inner held-out genes
    smoothing: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    neighbors: int = field(default=10, metadata={"ge": 1})  # spatial neighbors that smoothing averages over
    # mean totals that are added to a cell's own for its depth; auto: chosen on inner held-out genes
    depth_prior: float | Literal["auto"] = field(default="auto", metadata={"ge": 0})
    library_key: str | None = None  # obs column of the section; neighbors stay within it
    likelihood: Literal["nb", "poisson"] = "nb"  # of the predicted counts
    gain: Literal["hierarchical", "none"] = "hierarchical"  # level of unmeasured genes: from a hyper-prior, or the reference's as it is
    cluster_key: str | None = None  # obs column of the reference with its clusters; none: Leiden
    clusters: int = field(default=40, metadata={"ge": 2})  # number that Leiden's resolution is searched for
    resolution: float | None = field(default=None, metadata={"gt": 0})  # of Leiden, instead of a number of clusters
    profile: Literal["mean", "median"] = "mean"  # of a cluster
    # divide by the total over the shared genes before log1p (published: no); features="kernel": of the reference, the target always is
    normalise: bool = True
    layer: str | None = None  # layer with the counts
    gene_key: str | None = None  # var column with the gene names, of each file that has it; none = var_names
    # ---- features="network" only
    head: Literal["cosine", "power_spherical", "gaussian", "nb"] = "gaussian"  # p(x | decoded gene)
    codes: Literal["normal", "point"] = "normal"  # content and style: Gaussian latents, or the published deterministic codes
    wiring: Literal["code", "paper"] = "code"  # of encoders and decoder, where the released code and the text differ
    hidden: tuple[int, int] = (512, 256)  # widths of the two layers of encoder and decoder
    content_weight: float = field(default=1.0, metadata={"ge": 0})  # of the published losses, codes="point"
    style_weight: float = field(default=1.0, metadata={"ge": 0})  # likewise
    gram: Literal["released", "features"] = "released"  # Gram matrices of the style loss; the released ones are inert
    # copies of a minibatch whose profiles lose entries at random; codes="normal": one copy, whole with probability 1 / (1 + augment)
    augment: int = field(default=0, metadata={"ge": 0})
    augment_zero: float = field(default=0.5, metadata={"ge": 0, "le": 1})  # share of the entries that such a profile loses
    batch_genes: int = field(default=0, metadata={"ge": 0})  # genes per minibatch; 0 = all
    inner_steps: int = field(default=150, metadata={"ge": 1})  # training steps of the fit to inner genes that calibrates counts
    fit: FitConfig = FitConfig(steps=20, lr=0.02, clip_norm=1e3, window=10, checkpoint_every=0)

    def __post_init__(self) -> None:
        asked = [f"{name}={value}" for name in ("smoothing", "process") if (value := getattr(self, name)) not in ("auto", 0.0)]
        if self.features == "network" and asked:
            raise ValueError(f"features='network' has no places of cells to mix: {' and '.join(asked)} would do nothing")


_network_fit = FitConfig(steps=600, lr=1e-3, clip_norm=float("inf"), checkpoint_every=0)
PRESETS = {
    "default": Config(),
    "network": Config(features="network", fit=_network_fit, augment=1, augment_zero=0.2),
    "paper": Config(
        features="network", head="cosine", codes="point", augment=3, batch_genes=500, normalise=False, smoothing=0.0, fit=_network_fit
    ),
}


class Spec(NamedTuple):
    """What a pair is built from beside the data; plain numbers, stored with the run."""

    landmarks: list[int]  # positions among the reference's genes
    hyper: Hyper
    lengthscale: float = USUAL
    regression: float = 0.0


class Layer:
    """The closed-form layer on one problem: directions over cells, features of genes, signal and noise of every direction by marginal likelihood.

    For the loadings t_k = (t_kg) of direction k on the P training genes, less their own share and a constant times the reference's regression m_k
    (`regression.py`):  w_k ~ N(0, d_k I_F),  t_k ~ N(Phi w_k, s_k I_P);  Phi' Phi = diag(lambda), so with r = d / s everything is elementwise in F:

        -2 log p(t_k) = P log s + sum_f log(1 + r lambda_f) + (|t_k|^2 - sum_f r a_f^2 / (1 + r lambda_f)) / s,     a = Phi' t_k
        w_kf | t_k    ~ N( r a_f / (1 + r lambda_f),  d / (1 + r lambda_f) )
    """

    def __init__(
        self,
        data: Data,
        config: Config,
        seed: int,
        marks: NDArray[np.int64] | None = None,
        genes: NDArray[np.int64] | None = None,
    ) -> None:
        self.shares = SHARES if config.process == "auto" else (float(config.process),)
        self.directions: Directions = find_directions(data.counts, config.directions, all_counts(data.counts))
        self.marks = landmarks(data.panel, config.landmarks, seed) if marks is None else marks
        length = USUAL if config.lengthscale == "auto" else config.lengthscale
        kernel = GeneKernel(data, length, errors=config.reference_errors)
        everything = np.arange(data.profiles.shape[0]) if genes is None else genes
        both, at = np.unique(np.concatenate([data.panel, everything]), return_inverse=True)
        found, self.eigenvalues = features(kernel, self.marks, data.panel, both)
        self.phi, self.features = found[at[: len(data.panel)]], found[at[len(data.panel) :]]  # [P, F], [genes asked for, F]
        self.left = left_of(torch.from_numpy(self.phi))
        self.known = self.directions.scores[:, data.columns]  # loadings of measured genes [q, P]
        self.scores = comparable(self.directions, data)
        weight = 0.0 if config.regression == "auto" else config.regression
        self.regressed = np.zeros((len(self.scores), len(everything)))  # [q, genes asked for]
        if weight > 0:
            regression = Regression(kernel, self.marks, data.panel)
            self.scores -= weight * regression.of(self.known, data.panel)  # t [q, P]
            self.regressed = weight * regression.of(self.known, everything)
        loss, noise = misfit(self.scores, self.phi, self.eigenvalues)
        best = loss.argmin(1)
        kept = np.ones(len(best), bool)
        if weight == 0:  # the regression speaks in every direction, the kernel in the first ones and not where there is no signal
            kept[LEADING:] = False
            kept &= best >= min(int(np.searchsorted(RATIOS, SILENT)), best[:LEADING].max())
        self.ratio, self.noise = RATIOS[best][kept], noise[np.arange(len(best)), best][kept]
        self.scores, self.known, self.regressed = self.scores[kept], self.known[kept], self.regressed[kept]
        self.process: Process | None = None
        if max(self.shares) > 0:
            self.process = process(data, data.reference, everything, seed)
        self.directions = self.directions._replace(loadings=self.directions.loadings[:, kept], scores=self.directions.scores[kept])

    def codes(self) -> Codes:
        """Loadings of the genes asked for: posterior mean and variance [q, genes], and the process's weights."""
        precision = 1 + self.ratio[:, None] * self.eigenvalues
        signal = (self.ratio * self.noise)[:, None]
        weights = self.ratio[:, None] * (self.scores @ self.phi) / precision
        square = np.square(self.features, dtype=np.float64)
        rest = signal * np.clip(SELF - square.sum(1) - self.left, 0, None) + self.noise[:, None]  # [q, genes]
        mean, variance = self.regressed + weights @ self.features.T, (signal / precision) @ square.T + rest
        return Codes(mean.astype(np.float32), variance.astype(np.float32), process=self.process, shares=self.shares)

    def place(self, data: Data) -> NDArray[np.float32]:
        """(u, phi) [n, q + F] of the problem's cells."""
        return beside(place_cells(self.directions, data.counts), self.process, data.counts)


def left_of(phi: Tensor) -> float:
    """What the features [P, F] leave of the training genes' own k_gg, on average: 0 but where these are more than the landmarks. s_k, fitted to all
    of them, has it already."""
    return float((SELF - phi.square().sum(1)).clamp_min(0).mean())


def misfit(
    scores: NDArray[np.float64], phi: NDArray[np.floating], eigenvalues: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """-2 log p(t_k) but for a constant, and s_k at its maximum, both [q, grid of r]; see `Layer`."""
    projected, square, p = scores @ phi, np.square(scores).sum(1), scores.shape[1]
    shrink = RATIOS[:, None] / (1 + RATIOS[:, None] * eigenvalues)  # [grid, F]
    noise = (square[:, None] - np.square(projected) @ shrink.T).clip(1e-10) / p
    return p * np.log(noise) + np.log1p(RATIOS[:, None] * eigenvalues).sum(1), noise


def comparable(directions: Directions, data: Data) -> NDArray[np.float64]:
    """Loadings [q, P] of the measured genes less their own share in the directions."""
    scores = directions.scores[:, data.columns]
    own = own_share(directions.scores, data.counts.shape[0])[data.columns]
    return np.asarray(scores * (1 - own / np.square(directions.scores).sum(1)[:, None]))


def choose(data: Data, config: Config, seed: int) -> tuple[float, float]:
    """The most probable lengthscale and weight of the regression given all loadings of the training genes (of some, where they are many).

    The regression of a gene is on the loadings of the others, so this is a pseudo-likelihood: log |det(I - weight R)|, which would make it the
    density of all loadings together, is left out.
    """
    directions = find_directions(data.counts, config.directions, all_counts(data.counts))
    genes = landmarks(data.panel, config.landmarks, seed)
    at = positions(data.panel, genes)
    known, scores = directions.scores[:, data.columns[at]], comparable(directions, data)[:, at]
    weights = REGRESSIONS if config.regression == "auto" else (float(config.regression),)
    lengths = LENGTHSCALES if config.lengthscale == "auto" else (float(config.lengthscale),)
    kernel = GeneKernel(data, USUAL, errors=config.reference_errors)
    regressed = Regression(kernel, genes, genes).of(known, genes) if max(weights) > 0 else 0.0
    correlation = kernel.correlation(genes, genes)
    found = {}
    for length in lengths:
        kernel.lengthscale = length
        values, vectors = np.linalg.eigh(kernel.mix(correlation, genes, genes))
        values = values.clip(1e-9)
        log_prior = -0.5 * (np.log(length / USUAL) / USUAL_SD) ** 2
        for weight in weights:
            loss, _ = misfit(scores - weight * regressed, vectors * np.sqrt(values), values)
            found[length, weight] = log_prior - 0.5 * loss.min(1).sum()
    return max(found, key=lambda one: found[one])


class Model(PyroModule):
    """p: loadings of the directions on the training genes, given the genes' features."""

    DIMS = {  # noqa: RUF012
        "weights": ("directions", "features"), "log_gain": ("genes",), "slope": ("genes",), "log_theta": ("genes",), "gene_key": (),
        "style1": ("style1_units",), "style2": ("style2_units",),
    }  # fmt: skip
    phi: Tensor  # [P, F] buffers
    features: Tensor  # [G, F]
    scores: Tensor  # [q, P] what the regression leaves

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("phi", torch.from_numpy(layer.phi), persistent=False)
        self.register_buffer("features", torch.from_numpy(layer.features), persistent=False)
        self.register_buffer("scores", torch.from_numpy(layer.scores).float(), persistent=False)
        self.directions = layer.directions
        self.log_ratio = nn.Parameter(torch.from_numpy(np.log(layer.ratio)).float())
        self.log_noise = nn.Parameter(torch.from_numpy(np.log(layer.noise)).float())

    def forward(self, batch: Batch, *, observe: bool = True) -> Tensor:
        """Run the generative story; ``observe=False`` draws the loadings of the training genes [q, P]."""
        q, p = self.scores.shape
        noise = (0.5 * self.log_noise).exp()
        signal = noise * (0.5 * self.log_ratio).exp()
        with pyro.plate("directions", q):
            weights = pyro.sample("weights", dist.Normal(0, signal[:, None].expand(q, self.phi.shape[1])).to_event(1))  # [q, F]
            mean = weights @ self.phi.T
            scores: Tensor = pyro.sample(
                "scores", dist.Normal(mean, noise[:, None].expand(q, p)).to_event(1), obs=self.scores if observe else None
            )  # [q, P]
        return scores


class Guide(PyroModule):
    """q: the exact posterior of the loadings given signal and noise (shared with the model), and the count layer of every gene."""

    phi: Tensor  # [P, F] buffers, as in the model
    features: Tensor  # [G, F]
    scores: Tensor  # [q, P]
    known: Tensor  # [q, P] loadings of the measured genes
    regressed: Tensor  # [q, G] what the regression says of a gene's loadings
    measured: Tensor  # [G] position among the P, -1

    def __init__(self, model: Model, layer: Layer, data: Data, hyper: Hyper) -> None:
        super().__init__()
        self.log_ratio, self.log_noise = model.log_ratio, model.log_noise
        self.register_buffer("phi", model.phi, persistent=False)
        self.register_buffer("features", model.features, persistent=False)
        self.register_buffer("scores", model.scores, persistent=False)
        self.register_buffer("known", torch.from_numpy(layer.known).float(), persistent=False)
        self.register_buffer("regressed", torch.from_numpy(layer.regressed).float(), persistent=False)
        measured = torch.full((model.features.shape[0],), -1)
        measured[torch.from_numpy(data.panel)] = torch.arange(len(data.panel))
        self.register_buffer("measured", measured, persistent=False)
        self.doubt = hyper.doubt
        self.process = Part(layer.process, hyper.share, len(model.features))
        self.counts = CountLayer(data, hyper, len(self.scores) + len(self.process.beta))
        self.directions = model.directions

    def weights_dist(self) -> Any:
        """q(w | t) [q, F]: elementwise, see `Layer`."""
        ratio, values = self.log_ratio.exp()[:, None], self.phi.square().sum(0)
        precision = 1 + ratio * values
        variance = ratio * self.log_noise.exp()[:, None] / precision
        return dist.Normal(ratio * (self.scores @ self.phi) / precision, variance.sqrt())

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Draw the loadings' weights from their posterior."""
        with pyro.plate("directions", self.log_ratio.shape[0]):
            pyro.sample("weights", self.weights_dist().to_event(1))  # [q, F]

    def globals(self) -> None:
        """One joint draw for prediction: weights, count layer of all genes, key of the gene-specific noise."""
        pyro.sample("weights", self.weights_dist().to_event(2))  # [q, F]
        self.counts.globals()

    def mean_codes(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of the loadings of genes, both [q + F, g]; those of a measured gene are known."""
        phi, at = self.features[genes], self.measured[genes]
        weights = self.weights_dist()
        variance = self.doubt**2 * (weights.variance @ phi.square().T + self._rest(phi)).masked_fill(at >= 0, 0.0)
        return self._loadings(weights.mean, genes, 0.0), self.process.variance(variance, genes, at >= 0)

    def codes(self, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        """Loadings [q + F, g] of genes in one draw, with the part that no feature explains, the same for all cells."""
        noise = self._rest(self.features[genes]).sqrt() * gene_noise(drawn["gene_key"], genes, len(self.scores))
        deviation = (drawn["weights"] - self.weights_dist().mean) @ self.features[genes].T
        return self._loadings(self.weights_dist().mean, genes, self.doubt * (deviation + noise), drawn["gene_key"])

    def _loadings(self, weights: Tensor, genes: Tensor, deviation: Tensor | float, key: Tensor | None = None) -> Tensor:
        """Loadings [q + F, g]: known ones, or (1 - share) of what the weights [q, F] and the regression say, and the process's share.

        What is not known of the former, ``deviation``, stays in full.
        """
        at = self.measured[genes]
        found = (1 - self.process.share) * (self.regressed[:, genes] + weights @ self.features[genes].T) + deviation
        known = torch.where(at >= 0, self.known[:, at.clamp_min(0)], found)
        return self.process.loadings(known, genes, at >= 0, key)

    def _rest(self, phi: Tensor) -> Tensor:
        """Variance [q, g] of loadings given the weights: what the features leave to a gene beyond `left_of`, and its noise."""
        noise = self.log_noise.exp()[:, None]
        return noise * self.log_ratio.exp()[:, None] * (SELF - phi.square().sum(1) - left_of(self.phi)).clamp_min(0) + noise

    def known_codes(self, genes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Loadings [q + F, g] of measured genes."""
        return nn.functional.pad(self.known[:, self.measured[torch.from_numpy(genes)]], (0, 0, 0, len(self.process.beta))).numpy()

    def cell_noise(self, genes: Tensor) -> None:
        """Nothing differs from cell to cell: the places are data."""

    def place(self, data: Data, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Places (u, phi) [n, q + F] of cells; any cells, not only those of the fit."""
        counts = data.counts[rows]
        return beside(place_cells(self.directions, counts), self.process.fitted, counts)


def build(config: Config, spec: Spec, data: Data, layer: Layer | None = None) -> Pair:
    """The pair with every parameter in place."""
    if config.features == "network":
        return build_network(config, spec.hyper, data, config.fit.seed)
    if layer is None:
        known = replace(config, lengthscale=spec.lengthscale, regression=spec.regression, process=spec.hyper.share)
        layer = Layer(data, known, config.fit.seed, np.array(spec.landmarks))
    model = Model(layer)
    return Pair(model, Guide(model, layer, data, spec.hyper))

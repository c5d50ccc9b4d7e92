"""One direction of translation: from the codes of one side to the genes of the other, with the count layer of those genes.

Both directions are the same class with the sides exchanged. It is what the predictive needs (`ppl_st.models.common.predictor.MapGuide`): the map
of gene g over cells is place times loadings.

    linear     place u [n, q], the cell's own code; loadings (1 - c) W d_g + c b_g + deviation [q]; of measured genes the known ones
    network    place h(T(z)) [n, F], last hidden layer of the other side's decoder, centered; loadings its output weights, maps scaled to variance 1

Forward, genes are known that the target measured. Backward, counts of the target's platform in reference cells are forecast, which nobody has: every
gene is translated, and in doubt as an unmeasured one, also those that the reference has. The process, whose features are the shared genes
themselves, is left out of these.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.inference.randomness import gene_noise
from ppl_st.models.common.cells import all_counts
from ppl_st.models.common.counts import CountLayer, Hyper
from ppl_st.models.common.process import Part, beside
from ppl_st.models.spagene.autoencoder import Autoencoder, blocks
from ppl_st.models.spagene.closed import RATIO_SD, START_NOISE, Closed, Features, process_of
from ppl_st.models.spagene.data import Data
from ppl_st.networks import MLP

BLUR = 64  # directions at most in which a network's places are in doubt
LOG_NOISE = (-6.9, 1.0)  # of the translator's standard deviation: floor 1e-3
LEVEL_SD = 0.05  # of a gene's log level on the platform that measured it, at least


def on_target(hyper: Hyper, data: Data) -> Hyper:
    """Hyper-priors of the counts of the target's genes that its platform would show of reference cells, from those of the forward direction.

    Slope, theta and bend: what inner genes of the target taught; a gene's place on the lines is its level there, as if the platforms agreed (b = 1).
    Level: its share of all counts of the tissue, with the spread of the forward levels. That is how far platforms differ; how much of it is probes,
    and how much other shares of cell types in the reference, totals cannot tell. The mean rate is at the tissue's level.
    """
    a, _, s = hyper.gain
    s = float(np.hypot(s, LEVEL_SD))
    shared = float(np.log((data.totals.sum() + 1) / (all_counts(data.counts).sum() + 1)))
    return hyper._replace(gain=(a + shared - s**2 / 2, 1.0, s), gain_covariance=(0.0, 0.0, 0.0), center=a, own_depth=False)


class Direction(PyroModule):
    """Translator, its posterior, and the genes it leads to. ``own`` and ``other`` are the frozen autoencoders, no part of this module."""

    phi: Tensor  # [G, F] buffers; linear
    rotation: Tensor  # [F, L]
    scores: Tensor  # [q, P]
    measured: Tensor  # [G] position among the P shared genes, -1 of those whose counts are forecast: backward all
    shared: Tensor  # [G] bool
    panel: Tensor  # [P]
    columns: Tensor  # [P]
    center: Tensor  # [F] mean and covariance [F, F] of the places over the cells of the fit; network
    covariance: Tensor
    blur: Tensor  # [K, F] sd and direction of what is not known of a cell's place; network
    deviation: Tensor  # [q] variance of an unmeasured gene's own part in its loadings; linear
    regressed: Tensor  # [q, G] loadings by the reference's own regression; linear, with a share of it

    def __init__(
        self, name: str, data: Data, own: Autoencoder, other: Autoencoder, features: Features | None, hyper: Hyper, ratio: float,
        deviations: Sequence[float], hidden: tuple[int, ...], dropout: float, seed: int, share: float = 0.0,
        noisy: bool = True, platform: Hyper | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = name
        self.__dict__["own"], self.__dict__["other"] = own, other
        measured = torch.full((len(other.mean),), -1)
        measured[torch.from_numpy(data.panel)] = torch.arange(len(data.panel))
        self.register_buffer("shared", measured >= 0, persistent=False)
        self.register_buffer("measured", measured if platform is None else torch.full_like(measured, -1), persistent=False)
        self.register_buffer("panel", torch.from_numpy(data.panel), persistent=False)
        self.register_buffer("columns", torch.from_numpy(data.columns), persistent=False)
        self.linear = features is not None
        self.share, self.noisy = share, noisy  # c, and whether a term of the objective reads the noise
        self.log_scale = nn.Parameter(torch.full((other.latent,), float(np.log(START_NOISE))), requires_grad=noisy)  # translator noise
        if features is not None:
            self.register_buffer("phi", torch.from_numpy(features.phi).float())
            self.register_buffer("rotation", torch.from_numpy(features.rotation).float())
            self.register_buffer("scores", own.loadings[self.columns].T.clone())
            closed = Closed(data, own, features, ratio, deviations=deviations)
            self.register_buffer("deviation", torch.from_numpy(closed.deviation).float())
            self.loc = nn.Parameter(torch.from_numpy(closed.weights).float())  # [q, F] posterior mean of W
            self.log_noise = nn.Parameter(torch.from_numpy(np.log(closed.noise)).float())  # log s [q]
            self.center_ratio = float(np.log(ratio))
            self.log_ratio = nn.Parameter(torch.from_numpy(np.log(closed.ratios)).float())  # log r_k [q]
            width = len(closed.noise)
            if share:
                self.register_buffer("regressed", torch.zeros(width, len(other.mean)))
        else:
            self.net = MLP([own.latent, *hidden, other.latent], dropout=dropout)
            width = other.loadings.shape[1]
            self.register_buffer("center", torch.zeros(width))
            self.register_buffer("covariance", torch.eye(width))
            self.register_buffer("blur", torch.zeros(min(width, BLUR), width))
        found = process_of(data, np.arange(len(other.mean)), seed) if self.linear and hyper.share else None
        self.doubt = hyper.doubt
        self.process = Part(found, hyper.share, len(other.mean))
        self.counts = CountLayer(data, platform or hyper, width + len(self.process.beta))  # platform: backward, see `on_target`

    # ---- the translator ----

    def posterior_scale(self) -> Tensor:
        """Standard deviation of W given the shared genes' loadings [q, F]."""
        values = self.phi[self.panel].square().sum(0)
        return (self.log_noise.exp()[:, None] / ((-self.log_ratio).exp()[:, None] + values)).sqrt()

    def story(self, observe: bool) -> Tensor:
        """Sample the translator from its prior [q, F], and the shared genes' loadings given it: gain, offset and deviation of every gene."""
        q, p = self.scores.shape
        noise = (0.5 * self.log_noise).exp()[:, None]
        with pyro.plate(f"{self.name}_directions", q):
            log_ratio = pyro.sample(f"{self.name}_log_ratio", dist.Normal(self.center_ratio, RATIO_SD).expand([q]))  # [q]
            law: Any = dist.Normal(torch.zeros_like(self.loc), (0.5 * log_ratio).exp()[:, None] * noise)
            weights: Tensor = pyro.sample(f"{self.name}_translator", law.to_event(1))  # [q, F]
            law = dist.Normal(weights @ self.phi[self.panel].T, noise.expand(q, p))
            pyro.sample(f"{self.name}_identity", law.to_event(1), obs=self.scores if observe else None)  # [q, P]
        return weights

    def posterior(self) -> Tensor:
        """Sample the translator from q, [q, F]."""
        with pyro.plate(f"{self.name}_directions", self.loc.shape[0]):
            pyro.sample(f"{self.name}_log_ratio", dist.Delta(self.log_ratio))  # [q] a point
            weights: Tensor = pyro.sample(f"{self.name}_translator", dist.Normal(self.loc, self.posterior_scale()).to_event(1))  # [q, F]
        return weights

    def translate(self, z: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean code of the other side [B, L] for codes z [B, q]."""
        if self.linear:
            return z @ (self.loc if weights is None else weights) @ self.rotation
        result: Tensor = self.net(z)
        return result

    def noise(self) -> Tensor:
        """Standard deviation of a translated code [L]; 0 where no term of the objective learns it."""
        return self.log_scale.clamp(*LOG_NOISE).exp() if self.noisy else torch.zeros_like(self.log_scale)

    def unmeasured(self, weights: Tensor, genes: Tensor) -> Tensor:
        """Loadings [q, g] of genes given a translator, without their own deviations."""
        translated = weights @ self.phi[genes].T
        return (1 - self.share) * translated + self.share * self.regressed[:, genes] if self.share else translated

    # ---- the predictive ----

    def globals(self) -> None:
        """One joint draw: translator, and level, slope and dispersion of every gene."""
        if self.linear:
            pyro.sample("translator", dist.Normal(self.loc, self.posterior_scale()).to_event(2))  # [q, F]
        self.counts.globals()

    def place(self, data: Data, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, q] or [n, F], and the features of the process."""
        parts = []
        with torch.no_grad():
            for part in blocks(len(rows), data.counts.shape[1]):
                code = self.own.encode(self.own.read(data, rows[part]))[0]
                if not self.linear:
                    code = self.other.features(self.translate(code)) - self.center
                parts.append(code.numpy())
        return beside(np.concatenate(parts), self.process.fitted, data.counts[rows])

    def mean_codes(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of loadings."""
        if not self.linear:
            mean = self._output(genes)
            return mean, torch.zeros_like(mean)
        phi, at = self.phi[genes], self.measured[genes]
        mean = torch.where(at >= 0, self.scores[:, at.clamp_min(0)], self._own_share(genes) * self.unmeasured(self.loc, genes))
        variance = (1 - self.share) ** 2 * self.posterior_scale().square() @ phi.square().T + self.deviation[:, None]
        variance = self.doubt**2 * variance.masked_fill(at >= 0, 0.0)
        return self.process.loadings(mean, genes, self.shared[genes]), self.process.variance(variance, genes, self.shared[genes])

    def codes(self, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        """Loadings in one draw."""
        if not self.linear:
            return self._output(genes)
        at = self.measured[genes]
        deviation = self.deviation.sqrt()[:, None] * gene_noise(drawn["gene_key"], genes, len(self.scores))
        mean = self.unmeasured(self.loc, genes)
        unsure = self.doubt * (self.unmeasured(drawn["translator"], genes) - mean + deviation)
        found = torch.where(at >= 0, self.scores[:, at.clamp_min(0)], self._own_share(genes) * mean + unsure)
        return self.process.loadings(found, genes, self.shared[genes], drawn["gene_key"])

    def cell_noise(self, genes: Tensor) -> Tensor:
        """The encoder's doubt of a cell's code, and the translator's noise if learned; measured genes have it in their dispersion."""
        if self.linear:
            noise = self.own.scale[:, None] * self.unmeasured(self.loc, genes)
            if self.noisy:
                noise = torch.cat([noise, (1 - self.share) * self.noise()[:, None] * self.other.loadings[genes].T])
        else:
            noise = self.blur @ self._output(genes)
        return noise.masked_fill(self.measured[genes] >= 0, 0.0)

    def _own_share(self, genes: Tensor) -> Tensor:
        """What the process leaves of a map to the translator [g]."""
        return 1 - self.process.share * (~self.shared[genes]).float()

    def known_codes(self, genes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Loadings of measured genes."""
        return self.mean_codes(torch.from_numpy(genes))[0].detach().numpy()

    def _output(self, genes: Tensor) -> Tensor:
        """Output weights of the other side's decoder, such that the maps have variance 1 over the cells of the fit."""
        weights = self.other.loadings[genes].T
        return weights / ((self.covariance @ weights) * weights).sum(0).clamp_min(1e-12).sqrt()

    def learn_spread(self, place: NDArray[np.float32]) -> None:
        """Mean and covariance of the places [n, F] of some cells of the fit; for networks."""
        self.center += torch.from_numpy(place.mean(0))
        self.covariance.copy_(torch.from_numpy(np.cov(place.T.astype(np.float64), bias=True).reshape(self.covariance.shape)))

    def learn_blur(self, data: Data, rows: NDArray[np.int64]) -> None:
        """Leading directions of the covariance of a cell's place under q(z | x) and the translator's noise, mean over some cells; for networks."""
        total = torch.zeros(self.covariance.shape, dtype=torch.float64)
        with torch.no_grad():
            for part in blocks(len(rows), data.counts.shape[1]):
                loc, scale = self.own.encode(self.own.read(data, rows[part]))
                codes = [self.translate(loc + scale * torch.randn_like(loc)) for _ in range(2)]
                one, two = (self.other.features(code + self.noise() * torch.randn_like(code)).double() for code in codes)
                total += (one - two).T @ (one - two) / (2 * len(rows))
        values, vectors = torch.linalg.eigh(total)
        self.blur.copy_((values.clamp_min(0).sqrt() * vectors).T.flip(0)[: len(self.blur)])

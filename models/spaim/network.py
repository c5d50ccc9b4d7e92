r"""SpaIM by networks: the published objective as named factors (``codes="point"``), and the pair with Gaussian content and style.

``codes="normal"``, gene g of the minibatch, s its reference profile (1 and 2: layers):
    style_l    ~ Normal(0, 1)                                  shared by all genes
    content2   ~ Normal(h2(s), e^a2)    content1 ~ Normal(h1, e^a1), h1 from content2 (wiring "code") or from s ("paper")
    residual_l ~ Normal(style_l, e^b_l)                        the gene's own style
    effect     ~ Normal(m, e^c) [2]                            heads gaussian and nb: log gain; log noise or log theta
    x          ~ Head(decode(content, residual))
guide: content and residual from the encoders of x, normal tables for effect and style.

With wiring "paper", unit variances, the cosine head and the residual at the encoder's style, -log p of a gene is H/2 times the published content
loss of each layer, plus the published reconstruction loss, plus a Gaussian term of residual - style, plus constants.
With wiring "code" content1's mean is a function of the sampled content2, where the published term takes the one that the profile gives. The cosine of
the generator and the Gram term of the styles are in ``codes="point"`` alone, which has the published objective as it is.

Predictions take gain, slope and theta of a gene from `ppl_st.models.common.counts.CountLayer`: the effects of the heads gaussian and nb, and kappa,
serve the training alone.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.directional import PowerSpherical, cosine
from ppl_st.errors import UserError
from ppl_st.factors import content_loss, cosine_loss, style_loss
from ppl_st.inference.randomness import gene_noise, rng_scope
from ppl_st.inference.svi import Pair
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.models.common.cells import log_normalise, median_depth
from ppl_st.models.common.counts import Codes, CountLayer, Hyper
from ppl_st.models.spaim.data import Batch, Data
from ppl_st.networks import StyleTransfer

if TYPE_CHECKING:
    from ppl_st.models.spaim.model import Config

LARGEST_MATRIX = 400_000_000  # entries of genes x cells that the encoders read densely


def observations(data: Data, config: "Config") -> NDArray[np.float32]:
    """x [P, n]: counts for the head "nb", else log1p of normalised (or raw) counts; dense, because encoders read whole genes."""
    if data.counts.shape[0] * len(data.panel) > LARGEST_MATRIX:
        raise UserError(
            f"features='network' needs genes x cells = {len(data.panel)} x {data.counts.shape[0]} in memory; take features='kernel'"
        )
    counts = data.counts[:, data.columns]
    if config.head != "nb":
        totals = data.totals if config.normalise else np.ones(counts.shape[0])
        counts = log_normalise(counts, totals, median_depth(totals))
    return np.ascontiguousarray(counts.T.toarray(), dtype=np.float32)


class NetworkModel(PyroModule):
    """p: see the file's docstring."""

    def __init__(self, config: "Config", data: Data) -> None:
        super().__init__()
        if config.codes == "point" and config.head != "cosine":
            raise UserError(f"codes='point' is the published objective, which is cosine; head={config.head!r} needs codes='normal'")
        self.config = config
        self.net = StyleTransfer(data.counts.shape[0], data.profiles.shape[1], config.hidden, config.wiring)
        if config.codes == "normal":
            self.log_scale = nn.Parameter(torch.full((4,), -1.0))  # a1, a2, b1, b2
            self.effect_loc = nn.Parameter(torch.zeros(2))
            self.effect_log_scale = nn.Parameter(torch.full((2,), -0.7))
            self.log_kappa = nn.Parameter(torch.tensor(float(np.log(data.counts.shape[0]))))

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Run the story, or add the published losses, on one minibatch of genes."""
        (self._published if self.config.codes == "point" else self._probabilistic)(batch, observe)

    def _published(self, batch: Batch, observe: bool) -> None:
        c, net = self.config, self.net
        x, s = batch.x, batch.profiles
        if c.augment and self.training:
            zeroed = s.repeat(c.augment, 1) * (torch.rand(c.augment * len(s), s.shape[1]) >= c.augment_zero)
            x, s = x.repeat(c.augment + 1, 1), torch.cat([s, zeroed])
        content, style = net.encode(x)
        generated_content, virtual = net.content(s), net.style(len(s))
        decoded, generated = net.decode(content, style), net.decode(generated_content, virtual)
        n = batch.n_genes
        pyro.factor("content", -n * c.content_weight * content_loss(content, generated_content))
        pyro.factor("style", -n * c.style_weight * style_loss(virtual, style, c.gram))
        pyro.factor("reconstruction", -n * cosine_loss(decoded, x))
        pyro.factor("generation", -n * cosine_loss(decoded, generated))

    def styles(self) -> tuple[Tensor, Tensor]:
        """Sample the shared style, [H1] and [H2]."""
        zero = [torch.zeros(units) for units in self.config.hidden]
        return pyro.sample("style1", dist.Normal(zero[0], 1.0).to_event(1)), pyro.sample("style2", dist.Normal(zero[1], 1.0).to_event(1))

    def content_means(self, s: Tensor, content2: Tensor) -> Tensor:
        """Mean of content1 given the profile and content2 (only one of which the wiring uses)."""
        stage = self.net.content_s
        result: Tensor = stage[1](content2) if self.net.code else stage[0](s)
        return result

    def _probabilistic(self, batch: Batch, observe: bool) -> None:
        shared, scale = self.styles(), self.log_scale.exp()
        s = batch.profiles
        if self.config.augment and self.training:
            whole = torch.rand(len(s), 1) * (1 + self.config.augment) < 1  # prediction is from whole profiles
            s = s * (whole | (torch.rand(s.shape) >= self.config.augment_zero))
        with pyro.plate("genes", batch.n_genes, subsample=batch.genes):
            content2 = pyro.sample("content2", dist.Normal(self.net.content(s)[1], scale[1]).to_event(1))  # [B, H2]
            content1 = pyro.sample("content1", dist.Normal(self.content_means(s, content2), scale[0]).to_event(1))  # [B, H1]
            g1 = pyro.sample("residual1", dist.Normal(shared[0].expand_as(content1), scale[2]).to_event(1))  # [B, H1]
            g2 = pyro.sample("residual2", dist.Normal(shared[1].expand_as(content2), scale[3]).to_event(1))  # [B, H2]
            decoded = self.net.decode((content1, content2), (g1, g2))  # [B, n]
            self._head(decoded, batch, observe)

    def _head(self, decoded: Tensor, batch: Batch, observe: bool) -> None:
        head = self.config.head
        x = batch.x if observe else None
        if head == "cosine":  # the published loss at its fixed concentration: no density, nothing to draw
            pyro.factor("x", cosine(batch.x, decoded).float() - 1)
            return
        if head == "power_spherical":
            pyro.sample("x", PowerSpherical(decoded, self.log_kappa.exp()), obs=x)  # [B, n] directions
            return
        loc, sd = self.effect_loc, self.effect_log_scale.exp()
        effect = pyro.sample("effect", dist.Normal(loc.expand(len(decoded), 2), sd).to_event(1))  # [B, 2]
        if head == "gaussian":
            pyro.sample("x", dist.Normal(effect[:, :1].exp() * decoded, effect[:, 1:].exp()).to_event(1), obs=x)  # [B, n]
        else:
            log_mean = batch.totals.clamp_min(0.5).log() + effect[:, :1] + nn.functional.softplus(decoded).log()
            pyro.sample("x", NegativeBinomial(log_mean=log_mean, log_theta=effect[:, 1:]).to_event(1), obs=x)  # [B, n]


class NetworkGuide(PyroModule):
    """q: encoders of what was measured; after the fit, loadings of genes on the output layer's rows, one row per cell."""

    measured: Tensor  # [G] position among the P, -1
    profiles: Tensor  # [G, K]
    known: Tensor  # [F + 1, P] loadings of the measured genes
    center: Tensor  # [F + 1] mean over cells of the rows
    covariance: Tensor  # [F + 1, F + 1]

    def __init__(self, model: NetworkModel, data: Data, hyper: Hyper) -> None:
        super().__init__()
        self.config = model.config
        self.__dict__["model"] = model  # shared, but a part of the model alone
        panel = len(data.panel)
        measured = torch.full((data.profiles.shape[0],), -1)
        measured[torch.from_numpy(data.panel)] = torch.arange(panel)
        self.register_buffer("measured", measured, persistent=False)
        self.register_buffer("profiles", torch.from_numpy(data.profiles), persistent=False)
        width = model.net.output.in_features + 1
        self.register_buffer("known", torch.zeros(width, panel))
        self.register_buffer("center", torch.zeros(width))
        self.register_buffer("covariance", torch.eye(width))
        if self.config.codes == "normal":
            self.log_scale = nn.Parameter(torch.full((4,), -2.0))
            self.style_loc = nn.ParameterList([nn.Parameter(code[0].detach().clone()) for code in model.net.style()])
            self.style_log_scale = nn.ParameterList([nn.Parameter(torch.full((units,), -3.0)) for units in self.config.hidden])
            self.effect_loc = nn.Parameter(torch.zeros(panel, 2))
            self.effect_log_scale = nn.Parameter(torch.full((panel, 2), -2.0))
        self.counts = CountLayer(data, hyper, width)

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Draw the codes of a minibatch of genes; nothing with point codes."""
        if self.config.codes == "point":
            return
        self._styles()
        x = torch.log1p(batch.x) if self.config.head == "nb" else batch.x
        (c1, c2), (g1, g2) = self.model.net.encode(x)
        scale = self.log_scale.exp()
        with pyro.plate("genes", batch.n_genes, subsample=batch.genes):
            means = {"content2": (c2, 1), "content1": (c1, 0), "residual1": (g1, 2), "residual2": (g2, 3)}
            for name, (mean, k) in means.items():
                pyro.sample(name, dist.Normal(mean, scale[k]).to_event(1))  # [B, H]
            if self.config.head in ("gaussian", "nb"):
                loc, sd = self.effect_loc[batch.genes], self.effect_log_scale[batch.genes].exp()
                pyro.sample("effect", dist.Normal(loc, sd).to_event(1))  # [B, 2]

    def _styles(self) -> None:
        for k, name in enumerate(("style1", "style2")):
            pyro.sample(name, dist.Normal(self.style_loc[k], self.style_log_scale[k].exp()).to_event(1))  # [H]

    def globals(self) -> None:
        """One joint draw for prediction."""
        if self.config.codes == "normal":
            self._styles()
        self.counts.globals()

    # ---- after the fit: f = standardised rows of the output layer (one per cell) times loadings of genes ----

    def finish(self, data: Data, x: NDArray[np.float32]) -> None:
        """Moments of the output layer's rows over cells, and the loadings of the measured genes; nothing of it is trained."""
        with torch.no_grad():
            rows = self._rows().double()
            self.center.copy_(rows.mean(0))
            self.covariance.copy_(torch.from_numpy(np.cov(rows.numpy().T, bias=True)))
            seen = torch.from_numpy(np.log1p(x) if self.config.head == "nb" else x)
            self.known.copy_(self._scaled(self.model.net.fuse(*self.model.net.encode(seen))))

    def _rows(self) -> Tensor:
        output = self.model.net.output
        return torch.cat([output.weight, output.bias[:, None]], 1).detach()

    def _scaled(self, features: Tensor) -> Tensor:
        """Loadings [F + 1, g] of features [g, F], such that the map over cells has variance 1."""
        loadings = torch.cat([features, torch.ones(len(features), 1)], 1)
        variance = ((loadings @ self.covariance) * loadings).sum(1, keepdim=True)
        return (loadings / variance.clamp_min(1e-12).sqrt()).mT

    def place(self, data: Data, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Centered rows of the output layer [n, F + 1]."""
        return np.asarray((self._rows() - self.center)[torch.from_numpy(rows)].numpy())

    def cell_noise(self, genes: Tensor) -> None:
        """Nothing differs from cell to cell: the rows of the output layer are parameters."""

    def known_codes(self, genes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Loadings of measured genes, as the autoencoder sees them."""
        return np.asarray(self.known[:, self.measured[torch.from_numpy(genes)]].numpy())

    def mean_codes(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Loadings at the means of all codes; no variance is known in closed form."""
        net = self.model.net
        style = net.style() if self.config.codes == "point" else (self.style_loc[0][None], self.style_loc[1][None])
        mean = self._merge(self._scaled(net.fuse(net.content(self.profiles[genes]), style)), genes)
        return mean, torch.zeros_like(mean)

    def codes(self, drawn: dict[str, Tensor], genes: Tensor) -> Tensor:
        """Loadings in one draw: content and the gene's own style from their priors, given the profile."""
        if self.config.codes == "point":
            return self.mean_codes(genes)[0]
        net, s, scale = self.model.net, self.profiles[genes], self.model.log_scale.exp()
        first, second = self.config.hidden
        noise = gene_noise(drawn["gene_key"], genes, 2 * (first + second)).mT.split([first, second, first, second], 1)
        content2 = net.content(s)[1] + scale[1] * noise[1]
        content1 = self.model.content_means(s, content2) + scale[0] * noise[0]
        style = drawn["style1"] + scale[2] * noise[2], drawn["style2"] + scale[3] * noise[3]
        return self._merge(self._scaled(net.fuse((content1, content2), style)), genes)

    def _merge(self, loadings: Tensor, genes: Tensor) -> Tensor:
        at = self.measured[genes]
        return torch.where(at >= 0, self.known[:, at.clamp_min(0)], loadings)


def build_network(config: "Config", hyper: Hyper, data: Data, seed: int) -> Pair:
    """The pair with every parameter in place, at a seeded random start."""
    with rng_scope(seed, "weights"):
        model = NetworkModel(config, data)
        return Pair(model, NetworkGuide(model, data, hyper))


def gene_draws(guide: NetworkGuide, genes: NDArray[np.int64], draws: int, seed: list[int]) -> Codes:
    """Mean and draws of loadings, as `ppl_st.models.common.counts.Codes` has them."""
    from pyro import poutine

    index = torch.from_numpy(genes)
    drawn = []
    with torch.no_grad():
        mean, none = guide.mean_codes(index)
        for d in range(draws):
            with rng_scope(seed[0], *seed[1:], d):
                nodes = poutine.trace(guide.globals).get_trace().nodes
            values = {name: torch.as_tensor(site["value"]) for name, site in nodes.items() if site["type"] == "sample"}
            drawn.append(guide.codes(values, index).numpy())
    return Codes(mean.numpy(), none.numpy(), np.stack(drawn))

"""The VISTA pair: Model p(x, x', z, ...), Guide q(z | x, graph), and the predictive of any gene in any spatial cell."""

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.count_likelihoods import ZeroInflatedNegativeBinomial
from ppl_st.inference.adversary import Kind, generator_loss, logits
from ppl_st.inference.hyperpriors import within
from ppl_st.inference.svi import Pair
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.models.common.counts import LARGEST, bend
from ppl_st.models.common.process import Field, unit
from ppl_st.models.vista.batches import Batch, mixed, neighbor_mean
from ppl_st.models.vista.closed import CLIP, DIRECTIONS, FAR
from ppl_st.models.vista.config import Config
from ppl_st.models.vista.inner import EXPONENTS, Hyper, log_signal
from ppl_st.models.vista.levels import KNOTS, interpolate
from ppl_st.networks import MLP, GraphAttention
from ppl_st.observation import find, of_mean

RESERVED = (
    "log_gain", "slope", "reference_log_theta", "z", "z_reference", "z_context", "z_graph", "log_library", "x", "x_reference", "cells",
    "reference", "context", "adversary",
)  # fmt: skip
LOG_RATE = (-18.0, 17.0)  # clamp of the logarithm of a rate: counts up to 2^24 are read
LEAST_SLOPE = 0.05  # mean of a gene's slope
LOG_SCALE = (-5.0, 2.0)  # and of a posterior's standard deviation


class Spec(NamedTuple):
    """Sizes and constants that a pair is built from; plain numbers, stored with the run."""

    panel: list[int]  # positions of the panel among the genes
    measured: int  # A: panel and genes that only the target has
    n_genes: int
    batches: int  # of the target
    reference_batches: int
    library: list[list[float]]  # mean and sd of the log totals of each reference batch
    depth: float  # median total of the target's cells
    hyper: Hyper


class Model(PyroModule):
    """p: see the package docstring for the story and the symbols."""

    panel: Tensor  # [P] buffers
    measured: Tensor  # [G]
    parent: Tensor  # [G] gene whose gain and slope a gene has: itself, or of GENE:layer the gene
    library: Tensor  # [batches, 2]
    covariate: Tensor  # [G] log share in the reference
    zeros: Tensor  # [G] log theta that zeros in the reference tell (`closed.theta_of_zeros`)
    level: Tensor  # [G] log of the gene's share of the reference's panel counts: where it lies, exp(level + variance / 2) is its mean
    level_variance: Tensor  # [G] of what is not known of it; 0 where the level is learned
    own: Tensor  # [G] weights of the closed map and of the process in a gene's score, and the latter's mean (`process.py`)
    beside: Tensor  # [G]
    center: Tensor  # [G]
    map_sd: Tensor  # [G] of what the closed map, and the process, say of a gene's z-scores, over the target's cells (`inner.log_signal`)
    curve_sd: Tensor  # [G]
    levels: Tensor  # [2, knots, G] (`levels.py`)
    DIMS = {"log_gain": ("genes",), "slope": ("genes",), "log_theta": ("genes",), "gate_logits": ("genes",), "gene_key": ()}  # noqa: RUF012

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.config, self.spec, self.closed = config, spec, config.map == "closed"
        self.likelihood = of_mean(find(config.likelihood, RESERVED))
        # The closed map has one more coordinate, what all genes of a spatial cell have in common: the last one.
        d, genes = min(config.latent, len(spec.panel)) + 1 if self.closed else config.latent, spec.n_genes
        self.latent = d
        # Hidden genes given visible ones, log p(x_hidden | x_visible): the prior of z is then q(z | x_visible) itself, without a KL term.
        self.scores_states = config.visible == 1
        self.register_buffer("panel", torch.tensor(spec.panel))
        self.register_buffer("measured", torch.zeros(genes).index_fill(0, self.panel, 1.0))
        self.register_buffer("parent", torch.arange(genes))
        self.register_buffer("library", torch.tensor(spec.library))
        for name in ("covariate", "zeros", "level", "level_variance"):
            self.register_buffer(name, torch.zeros(genes))
        self.process: Field | None = None  # over the reference's cells; a function of them, not stored with the weights
        for name, value in (("own", 1.0), ("beside", 0.0), ("center", 0.0), ("map_sd", 0.0), ("curve_sd", 0.0)):
            self.register_buffer(name, torch.full((genes,), value))
        self.register_buffer("levels", torch.zeros(2, len(KNOTS), genes if self.closed else 0))
        decoder = torch.zeros(d, genes) if self.closed else nn.init.xavier_uniform_(torch.empty(d, genes))
        self.decoder = nn.Parameter(decoder, requires_grad=not self.closed)  # A
        self.bias = nn.Parameter(torch.zeros(genes))  # of the reference's log rates, beside the level
        self.reference_slope = nn.Parameter(torch.ones(genes), requires_grad=self.closed)
        self.reference_log_theta = nn.Parameter(torch.zeros(genes))
        if config.reference_likelihood == "zinb":
            self.dropout_logits = nn.Linear(d - self.closed, genes)
        if config.graph == "prior":
            self.gate = nn.Parameter(torch.zeros(d), requires_grad=self.scores_states)  # W: p(z) = Normal(gate x neighbors' mean, 1 - gate^2)
        critic = MLP([d, 32, 32, 32, 1], dropout=0.1) if config.adversary != "off" else None
        self.opponent = (critic,)  # in a tuple: the critic is no part of this module

    # ---- global sites ----

    def priors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of the hyper-prior of every gene-level site, [G] each."""
        hyper, z = self.spec.hyper, self.covariate - self.spec.hyper.covariate_mean
        found = {}
        if self.config.platform == "hierarchical":
            ((a, b, s), (aa, ab, bb)), x = (hyper.gain, hyper.gain_covariance), self.level - hyper.level_mean
            found["log_gain"] = (a + b * x, (s**2 + aa + 2 * ab * x + bb * x**2 + (1 + b) ** 2 * self.level_variance).sqrt())
        z, zeros = z.clamp(*hyper.span[:2]), (self.zeros - hyper.zeros_mean).clamp(*hyper.span[2:4])  # but levels are those of the reference
        if "log_gain" in found and self.closed:
            signal = (log_signal(self.map_sd, self.curve_sd, hyper.share) - hyper.signal_mean).clamp(*hyper.span[4:])
            mean = hyper.slope[0] + hyper.slope[1] * z + hyper.slope[2] * signal
            found["slope"] = (mean.clamp(LEAST_SLOPE, float(KNOTS[-1])), torch.full_like(z, hyper.slope[3]))
        for name, (a, b, c, s) in ((one, hyper.parameters[one]) for one in self.likelihood.priors):
            low, high = (float(end) for end in self.likelihood.grid(name)[[0, -1]])
            found[name] = within(a + b * z + c * zeros, torch.full_like(z, s), low, high)
        return found

    def globals(self) -> dict[str, Tensor]:
        """Sample gain, slope and the likelihood's parameters of every gene, [G] each; published settings have no prior on them."""
        with poutine.mask(mask=self.config.platform == "hierarchical"):
            return {name: pyro.sample(name, dist.Normal(loc, s).to_event(1)) for name, (loc, s) in self.priors().items()}

    # ---- rates ----

    def log_rate(
        self, drawn: dict[str, Tensor], z: Tensor, log_total: Tensor, log_usual: Tensor, genes: Tensor, beyond: Tensor | None = None
    ) -> Tensor:
        """Log rate of ``genes`` [g] in spatial cells with states z [n, d], log totals [n], log median totals of their sections [n] and, if any, the
        process's part of their scores: [n, g]."""
        if not self.closed:  # shares are relative to the panel, as in gimVI
            level = self.level + self.bias + (drawn["log_gain"] if "log_gain" in drawn else 0.0)
            panel = z @ self.decoder.index_select(1, self.panel) + level.index_select(0, self.panel)
            own = panel if genes is self.panel else z @ self.decoder[:, genes] + level[genes]
            return (own + (log_total[:, None] - torch.logsumexp(panel, -1, keepdim=True))).clamp(*LOG_RATE)
        score = z @ self.decoder[:, genes]
        return self.log_rate_at(drawn, score if beyond is None else self.own[genes] * score + beyond, log_total, log_usual, genes)

    def log_rate_at(self, drawn: dict[str, Tensor], score: Tensor, log_total: Tensor, log_usual: Tensor, genes: Tensor) -> Tensor:
        """The same [n, g] at scores [n, g] of the closed map."""
        level = self.level[genes] + (drawn["log_gain"][self.parent[genes]] if "log_gain" in drawn else 0.0)
        slope = drawn["slope"][self.parent[genes]] if "slope" in drawn else self.reference_slope[genes]
        depth = log_usual[:, None] + self.exponents()[genes] * (log_total - log_usual)[:, None]  # [n, g]
        grown = (slope * bend(score, self.spec.hyper.bend)[0]).clamp(-LARGEST, LARGEST)
        return (depth + level + grown - interpolate(self.levels, slope, genes)).clamp(*LOG_RATE)

    def beyond(self, phi: Tensor, genes: Tensor) -> Tensor:
        """What the process says of the scores of ``genes`` [g] where its features are phi [n, F]: [n, g]."""
        assert self.process is not None
        beta = torch.from_numpy(self.process.beta[:, genes.numpy()])
        return self.beside[genes] * (phi @ beta - self.center[genes])

    def exponents(self) -> Tensor:
        """Of a cell's total in the rate of every gene, [G]."""
        hyper = self.spec.hyper
        return (hyper.depth[0] + hyper.depth[1] * (self.covariate[self.parent] - hyper.covariate_mean).clamp(*hyper.span[:2])).clamp(*EXPONENTS)

    def reference_log_rate(self, z: Tensor, log_library: Tensor) -> Tensor:
        """Log rate of every gene in reference cells, [R, G]; the library is the total of all genes."""
        return (log_library[:, None] + torch.log_softmax(self.reference_logits(z), -1)).clamp(*LOG_RATE)

    def reference_logits(self, z: Tensor, genes: Any = slice(None)) -> Tensor:
        """Log shares of ``genes`` in reference cells before they are normalised over all, [R, g]."""
        own = self.latent - self.closed
        score = z[:, :own] @ self.decoder[:own, genes]
        return self.level[genes] + self.bias[genes] + (score * self.reference_slope[genes] if self.closed else score)

    # ---- local sites, likelihood ----

    def forward(self, batch: Batch, *, observe: bool = True) -> dict[str, Tensor]:
        """Run the generative story on one minibatch; ``observe=False`` draws the counts. Where H of P genes are scored, they count P / H times."""
        c, drawn = self.config, self.globals()
        out, codes = {}, {}
        if len(batch.reference_rows):
            with pyro.plate("reference", batch.n_reference, subsample=batch.reference_rows):
                with poutine.mask(mask=self.scores_states):
                    z = pyro.sample("z_reference", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))  # [R, d]
                mean, sd = self.library[batch.reference_batch].unbind(1)
                log_library = pyro.sample("log_library", dist.Normal(mean, sd))  # [R]
                law = self.reference_law(z, self.reference_log_rate(z, log_library))
                if c.visible < 1:  # what the encoder saw is not scored: the map is judged as it will be used
                    scored = torch.ones(self.spec.n_genes, dtype=torch.bool)
                    scored[self.panel[batch.visible]] = False
                    law = law.mask(scored)
                with poutine.scale(scale=c.reference_weight):
                    out["x_reference"] = pyro.sample("x_reference", law.to_event(1), obs=batch.reference if observe else None)  # [R, G]
            codes["reference"] = z
        if len(batch.rows):
            cells: Any = pyro.plate("cells", batch.n_cells, subsample=batch.rows)
            z = self._states(batch, cells)  # [B, d]
            own = batch.counts[: len(batch.rows)]
            rate = self.log_rate(drawn, z, batch.total[: len(own)].log(), batch.usual.log(), self.panel).exp()
            law = self.likelihood(rate, {name: value[self.panel] for name, value in drawn.items()})
            scored = batch.visible if bool(batch.visible.all()) else ~batch.visible  # [P]
            with cells, poutine.scale(scale=len(scored) / int(scored.sum())):
                out["x"] = pyro.sample("x", law.mask(scored).to_event(1), obs=own if observe else None)  # [B, P]
            codes["cells"] = z
        if self.opponent[0] is not None and len(codes) == 2:
            kind: Kind = c.adversary  # type: ignore[assignment]
            size = batch.n_cells + batch.n_reference
            pyro.factor("adversary", -c.adversary_weight * size * generator_loss(kind, *logits(self.opponent[0], codes["reference"], codes["cells"])))
        return out

    def _states(self, batch: Batch, cells: Any) -> Tensor:
        """Sample the seeds' states z [B, d]."""
        standard = dist.Normal(torch.zeros(self.latent), 1.0).to_event(1)
        prior: Any = standard
        if self.config.graph == "prior":
            n = len(batch.counts)
            with pyro.plate("context", n), poutine.mask(mask=False):  # each is scored when it is a seed
                around = pyro.sample("z_context", standard)  # [c, d]
            gate = torch.tanh(self.gate) * batch.present.any(1, keepdim=True)  # [B, d]; a cell without neighbors has the standard prior
            prior = dist.Normal(gate * neighbor_mean(around, batch), (1 - gate**2).clamp_min(1e-3).sqrt()).to_event(1)
        with cells:
            if self.config.graph == "kl_only":  # the released code: the graph changes the KL term and nothing else
                pyro.sample("z_graph", standard)  # [B, d]
                with poutine.mask(mask=False):
                    z: Tensor = pyro.sample("z", standard)
                    return z
            with poutine.mask(mask=self.scores_states):
                z = pyro.sample("z", prior)  # [B, d]
                return z

    def reference_law(self, z: Tensor, log_rate: Tensor, genes: Any = slice(None)) -> Any:
        """Law of the counts of ``genes`` in reference cells [R, g]."""
        log_theta = self.reference_log_theta[genes]
        if self.config.reference_likelihood == "zinb":
            gate = self.dropout_logits(z[:, : self.latent - self.closed])  # as the rate: not of what only the target's genes have in common
            return ZeroInflatedNegativeBinomial(log_mean=log_rate, log_theta=log_theta, gate_logits=gate[:, genes])
        return NegativeBinomial(log_mean=log_rate, log_theta=log_theta)

    # ---- prediction ----

    def count_dist(
        self, drawn: dict[str, Tensor], z: Tensor, log_total: Tensor, log_usual: Tensor, genes: Tensor, beyond: Tensor | None, error: Tensor
    ) -> Any:
        """p(count | draw) of ``genes`` [g] in spatial cells, see `log_rate`; its mean is the rate [n, g], ``error`` is added to its log."""
        rate = (self.log_rate(drawn, z, log_total, log_usual, genes, beyond) + error).exp()
        return self.likelihood(rate, {name: drawn[name][genes] for name in self.likelihood.priors})


class Guide(PyroModule):
    """q: encoder of the standardised panel (closed) or networks (learned), and what the graph adds."""

    mean: Tensor  # [batches, A] buffers: moments of the target's genes
    sd: Tensor
    reference_mean: Tensor  # [batches, P] the same of the reference
    reference_sd: Tensor
    depths: Tensor  # [2] median totals of target and reference (over the panel)
    gram: Tensor  # [P, P]
    cross: Tensor  # [P, d - 1]
    loadings: Tensor  # [A, q]
    encoder: Tensor  # [A, d]
    reference_encoder: Tensor  # [P, d]
    place_mean: Tensor  # [q] of the cells' places along the directions
    place_sd: Tensor  # [q]

    def __init__(self, config: Config, spec: Spec, model: Model) -> None:
        super().__init__()
        self.config, self.spec, self.closed = config, spec, model.closed
        self.model = (model,)  # its hyper-priors are the posterior of unmeasured genes; no parameter of this module
        p, a, d = len(spec.panel), spec.measured, model.latent
        for side, n, genes in (("", spec.batches, a), ("reference_", spec.reference_batches, p)):
            self.register_buffer(f"{side}mean", torch.zeros(n, genes))
            self.register_buffer(f"{side}sd", torch.ones(n, genes))
        self.register_buffer("depths", torch.ones(2))
        if self.closed:
            self.register_buffer("gram", torch.eye(p))
            self.register_buffer("cross", torch.zeros(p, d - 1))
            self.register_buffer("loadings", torch.zeros(a, DIRECTIONS))
            self.register_buffer("encoder", torch.zeros(a, d))
            for name in ("place_mean", "place_sd"):
                self.register_buffer(name, torch.ones(DIRECTIONS))
            self.register_buffer("reference_encoder", torch.zeros(p, d))
            learned = config.visible == 1  # without a KL term nothing would keep the spread from vanishing
            self.log_scale = nn.Parameter(torch.full((d,), -0.7), requires_grad=learned)
            self.reference_log_scale = nn.Parameter(torch.full((d,), -0.7), requires_grad=learned)
        else:
            width = config.hidden
            self.reference_input = MLP([spec.n_genes, width, width], dropout=config.dropout)
            self.target_input = MLP([p, width, width], dropout=config.dropout)
            self.shared = MLP([width, width, 2 * d], dropout=config.dropout)
        self.library = nn.Parameter(torch.tensor([0.0, -2.0]))  # log library: shift from the observed, log sd
        # The closed map's coordinates are kept: the attention learns which neighbors count (all alike at the start), the gate how much.
        self.attends = self.closed and config.graph == "posterior"
        if self.attends:
            self.attention = GraphAttention(d, d, config.heads, identity=True)
        elif config.graph in ("posterior", "kl_only"):
            self.attention = GraphAttention(d, d, config.heads)
            self.attention_output = nn.Linear(d, d, bias=False)
            nn.init.zeros_(self.attention_output.weight)
        if config.graph == "prior" or self.attends:
            # Else the share chosen on inner genes stays: learned by likelihood it follows the few strongest genes.
            self.gate = nn.Parameter(torch.zeros(d), requires_grad=model.scores_states)
        for name, (loc, _) in model.priors().items():
            setattr(self, f"{name}_loc", nn.Parameter(loc.clone()))
            log_scale = nn.Parameter(torch.full_like(loc, -2.0), requires_grad=config.platform == "hierarchical")
            setattr(self, f"{name}_log_scale", log_scale)

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Sample all latent sites of one minibatch."""
        self.gene_sites()
        (reference_loc, reference_scale), (base, spread) = self.encode_both(batch)
        if len(batch.reference_rows):
            with pyro.plate("reference", batch.n_reference, subsample=batch.reference_rows):
                with poutine.mask(mask=self.model[0].scores_states):
                    pyro.sample("z_reference", dist.Normal(reference_loc, reference_scale).to_event(1))  # [R, d]
                total = batch.reference.sum(1).clamp_min(1.0).log()
                pyro.sample("log_library", dist.Normal(total + self.library[0], self.library[1].exp()))  # [R]
        if not len(batch.rows):
            return
        loc, scale = self.with_graph(base, spread, batch)
        if self.config.graph == "prior":
            with pyro.plate("context", len(base)), poutine.mask(mask=False):
                pyro.sample("z_context", dist.Normal(base, spread).to_event(1))  # [c, d]
        n = len(batch.rows)
        kl_only = self.config.graph == "kl_only"
        with pyro.plate("cells", batch.n_cells, subsample=batch.rows):
            if kl_only:
                pyro.sample("z_graph", dist.Normal(loc, scale).to_event(1))  # [B, d]
                loc, scale = base[:n], spread[:n]
            with poutine.mask(mask=self.model[0].scores_states and not kl_only):
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))  # [B, d]

    def globals(self) -> None:
        """One joint draw for prediction: gene-level sites, and the key of the genes' pattern errors."""
        self.gene_sites()
        pyro.deterministic("gene_key", torch.randint(2**31, ()))

    def gene_sites(self) -> None:
        """Sample gene-level sites: measured genes their own normal, the others the hyper-prior."""
        with poutine.mask(mask=self.config.platform == "hierarchical"):
            for name, (loc, scale) in self.gene_laws().items():
                pyro.sample(name, dist.Normal(loc, scale).to_event(1))  # [G]

    def gene_laws(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and scale of every gene-level site, [G] each."""
        measured, found = self.model[0].measured > 0, {}
        for name, (prior_loc, prior_scale) in self.model[0].priors().items():
            own = getattr(self, f"{name}_log_scale").exp() if self.config.platform == "hierarchical" else 1e-3
            found[name] = torch.where(measured, getattr(self, f"{name}_loc"), prior_loc), torch.where(measured, own, prior_scale)
        return found

    def _encoders(self, visible: Tensor) -> tuple[Tensor, Tensor]:
        """What turns the z-scores of all genes of the target [A, d], and of the panel in the reference [P, d], into states when only these genes
        of the panel are visible; rows of the others are 0. See `ppl_st.models.vista.closed`."""
        if bool(visible.all()):
            return self.encoder, self.reference_encoder
        inside = self.gram[visible][:, visible]
        own = torch.zeros_like(self.cross)
        own[visible] = torch.linalg.solve(inside + self.spec.hyper.penalty * torch.eye(len(inside)), self.cross[visible])
        seen = torch.cat([visible, visible.new_ones(self.spec.measured - len(visible))])
        loadings = self.loadings * seen[:, None]
        encoder = own.new_zeros(len(seen), self.encoder.shape[1])
        inner = torch.eye(loadings.shape[1]) + loadings.T @ loadings
        denoise = self.spec.hyper.denoise
        encoder[:, :-1] = denoise * loadings @ torch.linalg.solve(inner, loadings[: len(own)].T @ own)
        encoder[: len(own), :-1] += (1 - denoise) * own
        encoder[:, -1] = self.encoder[:, -1] * seen * (len(seen) / seen.sum())
        return encoder, nn.functional.pad(own, (0, 1))

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Location and scale of q(z) of spatial cells without the graph, [c, d] each."""
        if self.closed:
            loc = self.z_scores(batch) @ self._encoders(batch.visible)[0]
            return loc, self.log_scale.clamp(*LOG_SCALE).exp().expand_as(loc)
        return self._heads(self.shared(self._target_features(batch)))

    def encode_reference(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same of reference cells; closed: from the visible panel genes, as the target's."""
        if self.closed:
            law, panel = (self.reference_mean, self.reference_sd, batch.reference_batch), batch.reference[:, self.model[0].panel]
            loc = _standardise(panel, batch.reference_total, self.depths[1], *law) @ self._encoders(batch.visible)[1]
            return loc, self.reference_log_scale.clamp(*LOG_SCALE).exp().expand_as(loc)
        return self._heads(self.shared(self._reference_features(batch)))

    def encode_both(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`encode_reference` and `encode`; of learned networks the shared layers run once, over the cells of both sides."""
        if self.closed:
            return self.encode_reference(batch), self.encode(batch)
        loc, scale = self._heads(self.shared(torch.cat([self._reference_features(batch), self._target_features(batch)])))
        n = len(batch.reference_rows)
        return (loc[:n], scale[:n]), (loc[n:], scale[n:])

    def _target_features(self, batch: Batch) -> Tensor:
        return torch.relu(self.target_input(torch.log1p(batch.counts * batch.visible)))

    def _reference_features(self, batch: Batch) -> Tensor:
        return torch.relu(self.reference_input(torch.log1p(batch.reference)))

    @staticmethod
    def _heads(out: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_scale = out.chunk(2, -1)
        return loc, log_scale.clamp(*LOG_SCALE).exp()

    def with_graph(self, base: Tensor, spread: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """q(z) of the seeds [B, d]: what the neighbors add to location and scale of the context [c, d]; nothing at the start."""
        n = len(batch.rows)
        loc, scale = base[:n], spread[:n]
        if self.config.graph == "prior":
            return mixed(base, batch, torch.tanh(self.gate)), scale
        if self.attends:
            return loc + torch.tanh(self.gate) * (self.attention(base, batch.neighbors, batch.present) - loc), scale
        if self.config.graph in ("posterior", "kl_only"):
            loc = loc + self.attention_output(torch.relu(self.attention(base, batch.neighbors, batch.present)))
        return loc, scale

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Location and scale of the q(z) that is decoded, of the seeds [B, d]."""
        base, spread = self.encode(batch)
        if self.config.graph == "kl_only":
            return base[: len(batch.rows)], spread[: len(batch.rows)]
        return self.with_graph(base, spread, batch)

    def z_scores(self, batch: Batch) -> Tensor:
        """Of all measured genes in the context cells [c, A]."""
        genes = torch.cat([batch.counts, batch.others], 1)
        return _standardise(genes, batch.total, self.depths[0], self.mean, self.sd, batch.batch)

    def places(self, batch: Batch) -> Tensor:
        """Places of the seeds [B, q] along the directions of the target, with their neighbors' share, in standard deviations."""
        inner = torch.eye(self.loadings.shape[1]) + self.loadings.T @ self.loadings
        u = self.z_scores(batch) @ torch.linalg.solve(inner, self.loadings.T).T
        return ((mixed(u, batch, self.spec.hyper.mix) - self.place_mean) / self.place_sd).clamp(-FAR, FAR)

    def features(self, batch: Batch) -> Tensor | None:
        """phi of the seeds [B, F] with their neighbors' share; None where there is no process."""
        found = self.model[0].process
        if found is None:
            return None
        rows = unit(self.z_scores(batch)[:, : len(self.spec.panel)].numpy())
        return mixed(torch.from_numpy(found.features(rows)), batch, self.spec.hyper.mix)


def _standardise(counts: Tensor, total: Tensor, depth: Tensor, mean: Tensor, sd: Tensor, batch: Tensor) -> Tensor:
    code = batch if len(mean) > 1 else batch[:1]  # one batch: no copy of its moments for every cell
    return ((torch.log1p(counts * (depth / total)[:, None]) - mean[code]) / sd[code]).clamp(-CLIP, CLIP)


def build(config: Config, spec: Spec) -> Pair:
    """A pair with every parameter in place; `ppl_st.models.vista.initialise` moves it to the data."""
    model = Model(config, spec)
    return Pair(model, Guide(config, spec, model))


def sides(pair: Pair) -> tuple[Model, Guide]:
    """The pair of one chain with its types."""
    model, guide = pair
    assert isinstance(model, Model) and isinstance(guide, Guide)
    return model, guide

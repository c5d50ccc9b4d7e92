"""The SIID pair: Config and presets, Model p(x, v, W, r, Q, phi, theta), Guide q(...), and the predictive of any gene in any cell."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.errors import UserError
from ppl_st.inference.svi import FitConfig, Pair
from ppl_st.models.siid.activity import FLOOR, Globals, Local, LocalPosterior, aggregate
from ppl_st.models.siid.batches import Batch, Data
from ppl_st.models.siid.hyper import Hyper, local_steps
from ppl_st.models.siid.warm_start import Start, log_share, prior_profiles
from ppl_st.observation import check_name, find, of_mean
from ppl_st.product import ProductNegativeBinomial, ProductPoisson

RESERVED = (
    "xi", "phi", "log_phi", "activity", "capture", "entropy", "labels", "eta", "log_n", "log_m", "x", "v", "cells", "spots",
)  # fmt: skip
LARGE = 223.607  # sd of the normal prior that equals the paper's L2 weight 1e-5


@dataclass(frozen=True)
class Config:
    """Settings of SIID. `PRESETS` has the default and the published values."""

    factors: int = field(default=0, metadata={"ge": 0})  # h; 0 = chosen on inner held-out genes
    chains: int = field(default=4, metadata={"ge": 1})  # independent starts, all kept as modes of the posterior
    keep: Literal["all", "best"] = "all"  # best: only the chain with the lowest loss (the paper's restarts)
    cells: Literal["conjugate", "softmax"] = "conjugate"  # softmax: the paper's N, P, M, from the released random start
    # of the cells: "nb", "poisson", "zinb" or "module:function" (`ppl_st.observation`)
    likelihood: str = "nb"
    # phi of unmeasured genes: from a hyper-prior, or fixed to 1
    platform: Literal["hierarchical", "paper", "none"] = "hierarchical"
    # of a spot, coordinate units; none = inferred from the counts
    radius: float | None = field(default=None, metadata={"gt": 0})
    align: bool = True  # move the spots of each section, by at most .3 of their pitch, where the counts clearly ask for it
    map_neighbors: int = field(default=1, metadata={"ge": 1})  # spots a cell may contribute to
    map_sigma: float | None = field(default=None, metadata={"gt": 0})  # width of the soft map, coordinate units
    # 3x3 homogeneous matrix applied to the spots' coordinates
    transform: tuple[tuple[float, float, float], ...] | None = None
    library_key: str | None = None  # obs column of the section, on both sides; sections share Q
    layer: str | None = None  # layer with the counts
    gene_key: str | None = None  # var column with the gene names, of each file that has it; none = var_names
    label_key: str | None = None  # obs column of the cells with partial labels (semi-supervision)
    label_weight: float = field(default=0.0, metadata={"ge": 0})  # pseudo-counts of a label, share of the cell's counts
    # h5ad of scRNA-seq whose mean profiles per ``profile_key`` are the prior of the first factors; ``layer`` and ``gene_key`` apply where it has them
    profiles: str | None = None
    profile_key: str = "cell_type"
    # gamma shape of Q around the spots' mean profile
    profile_concentration: float = field(default=0.1, metadata={"gt": 0})
    given_profile_concentration: float = field(default=5.0, metadata={"gt": 0})  # and around given profiles
    concentration: float = field(default=0.002, metadata={"gt": 0})  # alpha: gamma shape of an activity
    # kappa: gamma shape of the capture ratio; inf = the same for all
    capture_concentration: float = field(default=10.0, metadata={"gt": 0})
    sparsity: float | Literal["auto"] = field(default="auto", metadata={"ge": 0})  # omega: weight of the entropy of compositions, nats per count
    # the paper's schedule omega_t = exp(t / entropy_lambda), reading it as sum or mean
    entropy: Literal["none", "sum", "mean"] = "none"
    entropy_lambda: float = field(default=1000.0, metadata={"gt": 0})
    regional: bool = True  # use what nearby spots say about unmeasured genes
    loading_scale: float = field(default=3.0, metadata={"gt": 0})  # prior sd of the logits xi of Q
    posterior: Literal["normal", "delta"] = "normal"  # of the global sites
    sweeps: int = field(default=0, metadata={"ge": 0})  # of EM; 0 = chosen on inner held-out genes
    local_steps: int = field(default=12, metadata={"ge": 1})  # sweeps of the local posterior in a training step
    predict_steps: int = field(default=18, metadata={"ge": 1})  # and in prediction
    batch_spots: int = field(default=64, metadata={"ge": 0})  # spots per minibatch, with their cells; 0 = all
    fit: FitConfig = FitConfig(steps=30, lr=0.005, schedule="cosine", clip_norm=1e3, window=10, threads=1, checkpoint_every=10)

    def __post_init__(self) -> None:
        check_name(self.likelihood)


_paper_fit = FitConfig(steps=5000, lr=0.05, clip_norm=float("inf"), checkpoint_every=500)
PAPER = Config(
    factors=20, chains=3, keep="best", cells="softmax", likelihood="poisson", platform="paper", radius=100.0, align=False,
    sparsity=0.0, entropy="sum", regional=False, loading_scale=LARGE, posterior="delta", batch_spots=0, fit=_paper_fit,
)  # fmt: skip
PRESETS = {
    "default": Config(),
    "paper": PAPER,  # imputation; lambda 500 in "paper-deconvolution"
    "paper-deconvolution": replace(PAPER, entropy_lambda=500.0),
}


class Spec(NamedTuple):
    """Sizes and constants that a pair is built from; plain numbers, stored with the run."""

    n_cells: int
    factors: int
    panel: list[int]  # positions of the panel among the genes
    n_genes: int
    hyper: Hyper


class Model(PyroModule):
    """p: eq. 2 of the paper with platform scaling; see the package docstring for the story and the symbols."""

    panel: Tensor  # [P] buffers
    measured: Tensor  # [G]
    phi_loc: Tensor  # [G]
    usage: Tensor  # [h]
    capture: Tensor  # []
    DIMS = {"xi": ("factors", "genes"), "log_phi": ("genes",), "log_theta": ("genes",)}  # noqa: RUF012

    def __init__(self, config: Config, spec: Spec, log_share: Tensor, prior: Tensor) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.likelihood = of_mean(find(config.likelihood, RESERVED))  # rates are means: gain, phi and rho are ratios of counts
        hyper = spec.hyper
        self.register_buffer("panel", torch.tensor(spec.panel))
        measured = torch.zeros(spec.n_genes)
        measured[spec.panel] = 1.0
        self.register_buffer("measured", measured)  # [G]
        self.register_buffer(
            "xi_loc", prior.log() if config.cells == "conjugate" else torch.zeros_like(prior)  # the paper's L2 pulls to 0
        )  # [h, G]
        # Unmeasured genes need the hyper-prior of the gain; measured genes keep their own level.
        self.register_buffer("phi_loc", torch.where(measured > 0, 0.0, -hyper.gain_loc))  # [G]
        _refuse_other_parameters(config.likelihood, set(self.likelihood.priors), set(hyper.parameters))
        covariate = (log_share - hyper.covariate_mean).clamp(*hyper.span)  # [G]
        for name, (loc, slope, _) in hyper.parameters.items():  # of the cells' likelihood, usually log_theta
            self.register_buffer(f"{name}_prior", loc + slope * covariate)  # [G]
        self.register_buffer("usage", torch.full((spec.factors,), 1.0 / spec.factors))
        self.register_buffer("capture", torch.ones(()))

    # ---- global sites ----

    def globals(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sample Q [h, G], log phi [G], parameters of the cells' likelihood [G] each."""
        c, hyper = self.config, self.spec.hyper
        xi = pyro.sample("xi", dist.Normal(self.xi_loc, c.loading_scale).to_event(2))  # [h, G]
        log_phi = torch.zeros_like(self.measured)
        if c.platform == "hierarchical":
            log_phi = pyro.sample("log_phi", dist.Normal(self.phi_loc, hyper.gain_scale).to_event(1))  # [G]
        elif c.platform == "paper":  # free on the panel, 1 off it
            log_phi = pyro.sample("log_phi", dist.Normal(log_phi, LARGE).to_event(1))  # [G]
        parameters = {
            name: pyro.sample(name, dist.Normal(getattr(self, f"{name}_prior"), scale).to_event(1))  # [G]
            for name, (_, _, scale) in hyper.parameters.items()
        }
        return torch.softmax(xi, -1), log_phi, parameters

    def loadings(self, profiles: Tensor, log_phi: Tensor) -> tuple[Tensor, Tensor]:
        """Profiles as the cells see them [h, G] and as the spots see them [h, G].

        The paper scales the spots by phi (free on the panel only); ours keeps Q on the spots' scale, where every gene is measured, and scales
        the cells by 1 / phi, so that an unmeasured gene's level follows from the hyper-prior.
        """
        if self.config.platform == "paper":
            return profiles, profiles * log_phi.exp()
        return profiles * (-log_phi).exp(), profiles

    # ---- local sites, likelihood ----

    def forward(self, batch: Batch, *, observe: bool = True) -> dict[str, Tensor]:
        """Run the generative story on one minibatch; ``observe=False`` draws the counts."""
        profiles, log_phi, parameters = self.globals()
        cell_loadings, spot_loadings = self.loadings(profiles, log_phi)
        panel_loadings = cell_loadings[:, self.panel]  # [h, P]
        with pyro.plate("cells", batch.n_cells, subsample=batch.cells), poutine.mask(mask=batch.owned):  # type: ignore[call-overload]
            activity, capture = self.cell_latents(batch, panel_loadings)  # [n, h], [n]
            counts = batch.counts
            own = {name: value[self.panel] for name, value in parameters.items()}
            x_dist: Any
            if self.config.likelihood == "poisson":  # these two have a sparse form
                x_dist = ProductPoisson(activity, panel_loadings)
            elif self.config.likelihood == "nb":
                x_dist = ProductNegativeBinomial(activity, panel_loadings, own["log_theta"])
            else:
                x_dist = self.likelihood((activity @ panel_loadings).clamp_min(FLOOR), own).to_event(1)
                counts = counts.to_dense()
            x = pyro.sample("x", x_dist, obs=counts if observe else None)  # [n, P]
        v = None
        if batch.spots.numel():
            covered = torch.zeros_like(batch.spots, dtype=torch.bool).index_fill(
                0, batch.link_spot, True
            )  # no cell: no mean, no likelihood
            with pyro.plate("spots", batch.n_spots, subsample=batch.spots), poutine.mask(mask=covered):  # type: ignore[call-overload]
                mixed = aggregate(batch, capture[:, None] * activity)  # [s, h]
                v = pyro.sample("v", ProductPoisson(mixed, spot_loadings), obs=batch.spot_counts if observe else None)  # [s, G]
        return {"x": x} if v is None else {"x": x, "v": v}

    def cell_latents(self, batch: Batch, panel_loadings: Tensor) -> tuple[Tensor, Tensor]:
        """Sample activity W = N P [n, h] and capture ratio r = M / N [n], with the entropy and label factors."""
        c = self.config
        if c.cells == "softmax":
            flat = dist.Normal(batch.total.new_zeros(()), LARGE)
            eta = pyro.sample("eta", flat.expand((len(batch.cells), self.spec.factors)).to_event(1))  # [n, h]
            log_n = pyro.sample("log_n", flat)  # [n]
            log_m = pyro.sample("log_m", flat)  # [n]
            composition = torch.softmax(eta, -1)
            self._paper_entropy(eta, composition, batch)
            return log_n.exp()[:, None] * composition, (log_m - log_n).exp()
        size = (batch.total / (self.usage @ panel_loadings.detach().sum(1)).clamp_min(FLOOR)).clamp_min(1.0)  # [n]
        shape = torch.full((len(size), self.spec.factors), c.concentration)
        rate = (c.concentration * self.spec.factors / size)[:, None].expand_as(shape)
        activity = pyro.sample("activity", dist.Gamma(shape, rate).to_event(1))  # [n, h]
        capture = self.capture.expand(len(size))
        if np.isfinite(c.capture_concentration):
            kappa = torch.tensor(c.capture_concentration)
            capture = pyro.sample("capture", dist.Gamma(kappa, kappa / self.capture))  # [n]
        composition = activity / activity.sum(-1, keepdim=True).clamp_min(FLOOR)
        log_p = composition.clamp_min(1e-12).log()
        if self.spec.hyper.sparsity > 0:
            pyro.factor("entropy", self.spec.hyper.sparsity * batch.total * (composition * log_p).sum(-1))  # [n]
        if c.label_weight > 0:
            known = batch.labels >= 0
            label_log_p = log_p.gather(-1, batch.labels.clamp_min(0)[:, None]).squeeze(-1)
            pyro.factor("labels", c.label_weight * batch.total * known * label_log_p)  # [n]
        return activity, capture

    def _paper_entropy(self, eta: Tensor, composition: Tensor, batch: Batch) -> None:
        c = self.config
        if c.entropy != "none":
            weight = float(np.exp(batch.step / c.entropy_lambda)) / (batch.n_cells if c.entropy == "mean" else 1)
            pyro.factor("entropy", weight * (composition * torch.log_softmax(eta, -1)).sum(-1))  # [n] = -omega_t H(P_i)

    # ---- prediction ----

    def count_dist(self, drawn: dict[str, Tensor], activity: Tensor, genes: Tensor, effect: Tensor | None) -> Any:
        """p(count | draw) of ``genes`` [g] in cells with the given activity [n, h]; its mean is the rate [n, g].

        ``drawn`` holds one draw of the global sites; ``effect`` [n, g] multiplies the rate of genes that the cells did not measure.
        """
        log_phi = drawn.get("log_phi", torch.zeros_like(self.measured))
        cell_loadings, _ = self.loadings(torch.softmax(drawn["xi"], -1), log_phi)
        rate = (activity @ cell_loadings[:, genes]).clamp_min(FLOOR)
        if effect is not None:
            rate = torch.where(self.measured[genes] > 0, rate, rate * effect)
        return self.likelihood(rate, {name: drawn[name][genes] for name in self.likelihood.priors})


class Guide(PyroModule):
    """q: normal (or delta) global sites, and the closed-form local posterior (or tables of deltas for the paper's form)."""

    panel: Tensor  # [P] buffers, as in the model
    measured: Tensor  # [G]
    phi_loc: Tensor  # [G]
    usage: Tensor  # [h]
    capture: Tensor  # []

    def __init__(self, config: Config, spec: Spec, model: Model) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        priors = [f"{name}_prior" for name in spec.hyper.parameters]
        for name in ("panel", "measured", "phi_loc", "usage", "capture", *priors):
            self.register_buffer(name, getattr(model, name).clone())
        h, genes = spec.factors, spec.n_genes
        self.xi_loc = nn.Parameter(model.xi_loc.clone())
        self.log_phi_loc = nn.Parameter(torch.zeros(genes))
        if config.posterior == "normal":
            self.xi_log_scale = nn.Parameter(torch.full((h, genes), -2.0))
            self.log_phi_log_scale = nn.Parameter(torch.full((genes,), -3.0))
        for name in spec.hyper.parameters:
            self.register_parameter(f"{name}_loc", nn.Parameter(getattr(model, f"{name}_prior").clone()))
        if config.cells == "softmax":
            self.eta_loc = nn.Parameter(torch.zeros(spec.n_cells, h))
            self.log_n_loc = nn.Parameter(torch.ones(spec.n_cells))
            self.log_m_loc = nn.Parameter(torch.ones(spec.n_cells))

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Sample all latent sites of one minibatch."""
        xi, log_phi = self.globals()
        with pyro.plate("cells", batch.n_cells, subsample=batch.cells), poutine.mask(mask=batch.owned):  # type: ignore[call-overload]
            if self.config.cells == "softmax":
                pyro.sample("eta", dist.Delta(self.eta_loc[batch.cells], event_dim=1))  # [n, h]
                pyro.sample("log_n", dist.Delta(self.log_n_loc[batch.cells]))  # [n]
                pyro.sample("log_m", dist.Delta(self.log_m_loc[batch.cells]))  # [n]
                return
            with torch.no_grad():  # the fixed point is a stationary point of the bound: no gradient flows through it
                local = LocalPosterior(batch).solve(
                    self.conditioning(xi, log_phi), self._steps(self.config.local_steps)
                )
            pyro.sample("activity", dist.Delta(local.activity, event_dim=1))  # [n, h]
            if np.isfinite(self.config.capture_concentration):
                pyro.sample("capture", dist.Delta(local.capture))  # [n]

    def globals(self) -> tuple[Tensor, Tensor]:
        """Sample the global sites; unmeasured genes draw log phi and log theta from their hyper-priors."""
        c, hyper = self.config, self.spec.hyper
        delta = c.posterior == "delta"
        xi_dist = (
            dist.Delta(self.xi_loc, event_dim=2)
            if delta
            else dist.Normal(self.xi_loc, self.xi_log_scale.exp()).to_event(2)
        )
        xi = pyro.sample("xi", xi_dist)  # [h, G]
        measured = self.measured > 0
        log_phi = torch.zeros_like(self.measured)
        if c.platform == "hierarchical":
            own = self.log_phi_log_scale.exp() if not delta else torch.full_like(log_phi, 1e-3)
            scale = torch.where(measured, own, hyper.gain_scale)
            log_phi = pyro.sample(
                "log_phi", dist.Normal(torch.where(measured, self.log_phi_loc, self.phi_loc), scale).to_event(1)
            )
        elif c.platform == "paper":
            log_phi = pyro.sample("log_phi", dist.Delta(self.log_phi_loc * self.measured, event_dim=1))  # [G]
        for name, (_, _, prior_scale) in hyper.parameters.items():  # measured genes: a point; others: the hyper-prior
            loc = torch.where(measured, getattr(self, f"{name}_loc"), getattr(self, f"{name}_prior"))
            pyro.sample(name, dist.Normal(loc, torch.where(measured, 1e-2, prior_scale)).to_event(1))  # [G]
        return xi, log_phi

    def _steps(self, steps: int) -> int:
        return local_steps(steps, self.spec.hyper.sweeps)

    def conditioning(self, xi: Tensor, log_phi: Tensor) -> Globals:
        """What the local posterior needs of the global sites."""
        c = self.config
        profiles = torch.softmax(xi, -1)
        gain = (-log_phi).exp() if c.platform == "hierarchical" else torch.ones_like(log_phi)
        seen = profiles * (log_phi * self.measured).exp() if c.platform == "paper" else profiles  # as in Model.loadings
        return Globals(
            seen, profiles[:, self.panel] * gain[self.panel], self.usage, float(self.capture), c.concentration, c.capture_concentration,
            self.spec.hyper.sparsity, c.label_weight,
        )  # fmt: skip

    def mean_logits(self) -> Tensor:
        """Logits of the posterior mean profiles, up to a constant per factor, [h, G].

        E exp(xi) = exp(loc + sd^2 / 2): genes with few counts are wide, and softmax(loc) would give their share of a factor to the others.
        """
        return self.xi_loc + 0.5 * (2 * self.xi_log_scale).exp() if self.config.posterior == "normal" else self.xi_loc

    def local_posterior(self, batch: Batch, steps: int) -> Local:
        """The local posterior at the posterior mean of the globals."""
        with torch.no_grad():
            if self.config.cells == "softmax":
                activity = self.log_n_loc[batch.cells].exp()[:, None] * torch.softmax(self.eta_loc[batch.cells], -1)
                ones = torch.ones_like(batch.total)
                big = 1e12  # a point mass, as a very sharp gamma
                return Local(
                    activity * big,
                    ones[:, None] * big,
                    (self.log_m_loc - self.log_n_loc)[batch.cells].exp() * big,
                    ones * big,
                )
            return LocalPosterior(batch).solve(self.conditioning(self.mean_logits(), self.log_phi_loc), self._steps(steps))


def build(config: Config, spec: Spec, data: Data) -> Pair:
    """A pair with every parameter in place, at the prior; `initialise` moves it to the data."""
    share = torch.from_numpy(log_share(data)).float()
    model = Model(config, spec, share, torch.from_numpy(prior_profiles(data, spec.factors)).float())
    return Pair(model, Guide(config, spec, model))


def sides(pair: Pair) -> tuple[Model, Guide]:
    """The pair of one chain with its types."""
    model, guide = pair
    assert isinstance(model, Model) and isinstance(guide, Guide)
    return model, guide


def _refuse_other_parameters(likelihood: str, asked: set[str], stored: set[str]) -> None:
    if asked != stored:
        raise UserError(
            f"likelihood {likelihood!r} has the parameters {sorted(asked)}, the run was fitted with {sorted(stored)}: it is another function now"
        )


def initialise(pair: Pair, start: Start) -> None:
    """Write an EM result into the pair: means of the globals, their spread from the counts behind each entry, usage and capture."""
    model, guide = sides(pair)
    profiles, usage = start.g.profiles / start.g.profiles.sum(1, keepdim=True), start.g.usage
    if model.config.platform == "paper":  # Q on the cells' scale: rows to sum 1 again, their scale into the activities
        profiles = profiles.index_copy(1, model.panel, profiles[:, model.panel] * (-start.log_phi).exp())
        usage = usage * profiles.sum(1) / (usage @ profiles.sum(1))
        profiles = profiles / profiles.sum(1, keepdim=True)
    with torch.no_grad():
        for module in (model, guide):
            module.usage.copy_(usage)
            module.capture.fill_(start.g.capture)
        sd = (1.0 / (start.evidence + 1.0 / model.config.loading_scale**2)).sqrt().clamp(1e-3, 1.0)
        guide.xi_loc.copy_(profiles.clamp_min(1e-12).log())
        if model.config.posterior == "normal":
            guide.xi_loc.sub_(0.5 * sd**2)
            guide.xi_log_scale.copy_(sd.log())
        guide.log_phi_loc[model.panel] = start.log_phi
        for name in guide.spec.hyper.parameters:
            getattr(guide, f"{name}_loc")[model.panel] = start.parameters[name]


def random_start(pair: Pair, seed: int) -> None:
    """The released start: Xavier-uniform logits, N = M = e, log phi ~ Normal(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    _, guide = sides(pair)
    with torch.no_grad():
        for logits in (guide.xi_loc, guide.eta_loc):
            bound = float(np.sqrt(6.0 / sum(logits.shape)))
            logits.uniform_(-bound, bound, generator=generator)
        guide.log_phi_loc.normal_(generator=generator)

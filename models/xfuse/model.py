"""XFuse's settings, generative model and guide; the story and the symbols are in `ppl_st.models.xfuse`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_st.count_likelihoods import SharedOddsNegativeBinomial
from ppl_st.image_features import FEATURES
from ppl_st.inference.settings import FitConfig
from ppl_st.inference.svi import Pair
from ppl_st.models.xfuse.data import Input
from ppl_st.models.xfuse.network import Generator, Norm, Recognition, head
from ppl_st.models.xfuse.patches import Augment, Batch, aggregate
from ppl_st.models.xfuse.serial import PLANES
from ppl_st.models.xfuse.space import Lattice, Tie, field_of, points_of
from ppl_st.product import ProductSharedOddsNegativeBinomial

__all__ = ["PRESETS", "Config", "Guide", "Measured", "Model", "Spec", "build", "random_waves", "sides"]

NEGLIGIBLE = 0.01  # share of a metagene below which the shrinkage is flat
LOG_RATE = (-30.0, 20.0)  # range of a log loading
PER_OUTPUT = ("image_weights", "space", "location")  # sites with a column for the scale and one per metagene
TURNED = 1200  # weights of a section's field up to which they are rotated: a matrix of their square is kept
OUTSIDE = -10.0  # log scale off the tissue at the start, less that on it
MOST_EFFECT = 1.0  # sd of the log effect of a location on its scale
UNSEEN = 0.5  # sd of the log depth of a section


@dataclass(frozen=True)
class Config:
    """Settings of XFuse; ``PRESETS`` has the two that are meant."""

    patch: int = field(default=256, metadata={"ge": 8})  # side of a training patch in pixels
    batch_patches: int = field(default=2, metadata={"ge": 1})
    augment: Augment = "dihedral"
    depth: int = field(default=3, metadata={"ge": 1, "le": 8})  # levels of the latent image, each half as fine as the one before
    channels: int = field(default=8, metadata={"ge": 1})  # at the finest level; doubled at each coarser one
    network: Literal["light", "published"] = "light"
    norm: Norm = "group"
    condition: int = field(default=0, metadata={"ge": 0})  # scores of the spots that the recognition network sees; 0: the image alone
    hide: float = field(default=0.5, metadata={"ge": 0, "le": 1})  # how often it does not see them in training, so that it works without
    fields: bool = True  # spatial field and regression on image features, in scale and metagene activities
    serial: bool = True  # sections whose images agree share a part of their spatial fields (`ppl_st.models.xfuse.serial`)
    nugget: bool = True  # log-normal effect of each location on its scale and metagenes: what no field explains
    functions: int = field(default=256, metadata={"ge": 1})  # random waves of the regression on image features (`random_waves`)
    image_weight: float = field(default=1.0, metadata={"ge": 0})  # of the image's log-likelihood
    metagenes: int = field(default=20, metadata={"ge": 1})  # most that there can be
    selection: Literal["fixed", "split", "ard"] = "fixed"  # how their number is found
    purge_every: int = field(default=500, metadata={"ge": 1})  # steps between two rounds of drop-and-split
    purge_draws: int = field(default=3, metadata={"ge": 1})
    ard: float = field(default=4.0, metadata={"ge": 0})  # strength of the shrinkage: 1 charges a metagene in full use half the genes x log 100 nats
    layer: str | None = None
    gene_key: str | None = None
    input: Input = Input()  # noqa: RUF009
    fit: FitConfig = FitConfig()

    def __post_init__(self) -> None:
        """Refuse combinations that mean nothing; learning rates of what is off are left out, as they would name no parameter."""
        if self.augment == "affine" and self.fields:
            raise ValueError("augment='affine' is the published augmentation of the network's input; it needs fields=false (use 'dihedral')")
        if self.selection == "split" and 2 * self.purge_every > self.fit.steps:
            raise ValueError(
                f"selection='split' never splits: purge_every={self.purge_every} is more than half of fit.steps={self.fit.steps}; "
                f"set purge_every to at most {self.fit.steps // 2}, or raise fit.steps"
            )
        if self.selection == "split" and self.fit.patience:
            raise ValueError(f"selection='split' drops metagenes at the last step: fit.patience={self.fit.patience} may end it; set fit.patience=0")
        off = () if self.fields else (FIELDS, COMPONENTS)  # without fields the effects of locations are learned
        kept = {pattern: factor for pattern, factor in self.fit.lr_groups.items() if pattern not in off}
        object.__setattr__(self, "fit", replace(self.fit, lr_groups=kept))


NETWORKS = r"recognition|generator|image_mean|image_sd|expression"
FIELDS = r"(space|image_weights)_loc"  # start at their closed-form posterior: at the full rate noisy gradients take them away from it
# Stay as the start found them, by marginal likelihoods and moments (with fields). Independent normals of fields and of location effects each take
# the other for known, so under them the fields become certain, and rougher, and what they do not explain seems little: intervals grow too short.
COMPONENTS = r"amplitude|log_nugget|(space|image_weights)_log_sd"
PUBLISHED = FitConfig(
    steps=100_000, lr=3e-4, optimizer="amsgrad", clip_norm=math.inf, threads=0,
    lr_groups={r"log_rate$|\.odds$": 5.0, r"(metagenes|level_\d+|logit_\d+)_(loc|log_sd)": 2.0},
)  # fmt: skip
PRESETS = {
    "default": Config(
        fit=FitConfig(
            steps=200, lr=1e-2, schedule="cosine", final_lr_factor=0.02, clip_norm=math.inf, threads=1,
            lr_groups={COMPONENTS: 0.0, NETWORKS: 0.2, FIELDS: 0.2, r"\.odds$": 5.0},
            elbo="meanfield",
        ),
    ),
    "paper": Config(
        patch=768, batch_patches=4, augment="affine", depth=6, channels=16, network="published", norm="batch", fields=False, nugget=False,
        metagenes=40, selection="split", purge_every=1000, fit=PUBLISHED,
    ),
}  # fmt: skip


class Spec(NamedTuple):
    """What fixes the shapes of a pair."""

    genes: int
    sections: list[str]
    lattices: list[list[Lattice]]  # of each section, one per entry of `LENGTHS`
    ties: list[Tie | None]  # of each section to an earlier one
    shift: float  # of the logit of a tie's share, from the images' correlation to the spots'
    planes: list[tuple[int, int, float]]  # of each section that others can be tied to: lattice of `Planes`, and its step; (0, 0, 0) of others
    rows: list[int]  # locations of each section
    levels: list[int]  # levels of each covariate, unknown ones included
    codes: list[list[int]]  # [sections][covariates] level of each
    length: float  # length scale of the regression in standardised features
    unit: float  # of the scale per pixel: its softplus is linear well above it and exponential well below


class Model(PyroModule):
    """p(Z, L, E, F, fields, counts, image)."""

    DIMS = {  # noqa: RUF012
        "metagenes": ["metagene", "genes"], "image_weights": ["function", "output"], "space": ["lattice", "output"], "depth": ["section"],
        "location": ["measurement", "effect"],
    }  # fmt: skip
    active: Tensor  # [M] bool buffer: metagenes in use
    partner: Tensor  # [M] int64 buffer: the other half of the last split; -1: none
    image_start: Tensor  # [3, 2] buffer
    frequency: Tensor  # [F, J]
    phase: Tensor  # [J]
    turn_image: Tensor  # [J, J]

    def __init__(self, config: Config, spec: Spec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        genes, most, outputs = spec.genes, config.metagenes, 1 + config.metagenes
        self.generator = Generator(config.channels, config.depth, config.norm, config.network == "published")
        self.image_mean = head(config.channels, 3, config.norm)
        self.image_sd = head(config.channels, 3, config.norm)
        # scale, then metagenes; published: each side with a hidden layer of its own, here the halves of one
        self.expression = head(config.channels, outputs, config.norm, 1 + (config.network == "published"))
        self.bias = nn.Parameter(torch.zeros(outputs))  # of the scale per pixel before the softplus, and of the metagenes' logits
        self.log_rate = nn.Parameter(torch.zeros(genes))  # t + u: the mean stays where it is while the odds move
        self.odds = nn.Parameter(torch.zeros(genes))  # u
        self.log_sd = nn.ParameterDict({name: nn.Parameter(torch.zeros(genes)) for name in ("metagenes", *self._effects())})  # of L, E, F
        started = torch.arange(most) < (1 if config.selection == "split" else most)
        self.register_buffer("active", started)
        self.register_buffer("partner", torch.full((most,), -1))
        if config.fields:
            frequency, phase = random_waves(FEATURES, config.functions)
            self.register_buffer("frequency", frequency / spec.length)
            self.register_buffer("phase", phase)
            # Rotations of the weights to what is nearly independent given the spots, so that independent normals can be their posterior.
            self.register_buffer("turn_image", torch.eye(config.functions))
            for n, points in enumerate(map(points_of, spec.lattices)):
                self.register_buffer(f"turn_{n}", torch.eye(points if points <= TURNED else 0))
                h, w, _ = spec.planes[n]
                self.register_buffer(f"planes_{n}", torch.zeros(PLANES, h, w) if h else torch.zeros(0))
            self.amplitude = nn.Parameter(torch.zeros(2, outputs))  # log sd of the regression and of the spatial field
            self.outside = nn.Parameter(torch.tensor(OUTSIDE))  # of the scale
        if config.nugget:
            self.log_nugget = nn.Parameter(torch.full((outputs,), math.log(0.1)))  # log sd; of the scale at a sum of 1, a typical location
        self.register_buffer("image_start", torch.zeros(3, 2))  # of each channel: location before tanh, sd before softplus

    def _effects(self) -> list[str]:
        return [f"{kind}_{c}" for c in range(len(self.spec.levels)) for kind in ("level", "logit")]

    def priors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the global sites."""
        spec, outputs = self.spec, 1 + self.config.metagenes
        found: dict[str, tuple[int, ...]] = {"metagenes": (self.config.metagenes, spec.genes)}
        for c, levels in enumerate(spec.levels):
            found |= {f"level_{c}": (levels, spec.genes), f"logit_{c}": (levels, spec.genes)}
        if self.config.fields:
            found["image_weights"] = (self.config.functions, outputs)
            found["space"] = (sum(map(points_of, spec.lattices)), outputs)
            found["depth"] = (len(spec.sections),)
        if self.config.nugget:
            found["location"] = (sum(spec.rows), outputs)
        return found

    def scale_of(self, name: str) -> Tensor | float:
        """Prior sd of a global site, broadcast over its last dimension."""
        if name in self.log_sd:
            return self.log_sd[name].clamp(-6.0, 2.0).exp() + 1e-8
        return UNSEEN if name == "depth" else 1.0

    def globals(self) -> dict[str, Tensor]:
        """Sample all global sites from their priors."""
        drawn = {}
        for name, shape in self.priors().items():
            prior = dist.Normal(torch.zeros(shape), self.scale_of(name)).to_event(len(shape))
            drawn[name] = pyro.sample(name, prior)
        return drawn

    # ---- expression ----

    def fields(
        self, drawn: dict[str, Tensor], features: Tensor, where: Tensor, parts: Sequence[tuple[int, int, int]], spec: Spec
    ) -> Tensor:
        """Of k blocks of pixels, see `Blocks`: regression and spatial field of scale and metagenes, and log depth of the section [k, 1 + M + 1].

        ``spec``: the model's, or that with lattices and tie of a new section at its end, whose weights are the last of those drawn.
        """
        regression, spatial = self.amplitude.clamp(-6.0, 3.0).exp()
        x = torch.addmm(self.phase, features[:, :-1], self.frequency).cos_()  # [k, J]
        weights = self.turn_image @ (drawn["image_weights"] * regression) * math.sqrt(2 / self.config.functions)
        lattice_weights = drawn["space"].split([points_of(own) for own in spec.lattices])
        used = {n for n, _, _ in parts}
        own, space, depth = {}, [], []
        for n in used | {tie.section for n in used if (tie := spec.ties[n])}:
            own[n] = lattice_weights[n] * spatial
            if n < len(self.spec.lattices) and len(own[n]) <= TURNED:
                own[n] = getattr(self, f"turn_{n}") @ own[n]
        for n, start, stop in parts:
            space.append(field_of(n, spec.lattices, spec.ties, own, where[None, start:stop])[:, 0].T)
            depth.append(drawn["depth"][n].expand(stop - start))
        values = torch.addmm(torch.cat(space), x, weights) + F.pad(self.outside * features[:, -1:], (0, self.config.metagenes))
        return torch.cat([values, torch.cat(depth)[:, None]], 1)

    def hidden(self, features: Tensor) -> Tensor:
        """Last hidden layer of the expression's head: [B, C, H, W] -> [B H W, C], published [B H W, 2 C]: of the scale, then of the metagenes."""
        return torch.as_tensor(self.expression[0](features)).permute(0, 2, 3, 1).flatten(0, 2)

    def activity(self, hidden: Tensor, fields: Tensor | None) -> Tensor:
        """Scale times metagene activities, s a: [n, M] of n pixels from their `hidden` [n, C or 2 C] and `fields` [n, 1 + M + 1]."""
        last = self.expression[1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        weight, bias = last.weight.flatten(1), last.bias + self.bias
        if self.config.network == "published":
            own, others = hidden.chunk(2, 1)
            out = torch.cat([F.linear(own, weight[:1], bias[:1]), F.linear(others, weight[1:], bias[1:])], 1)
        else:
            out = F.linear(hidden, weight, bias)
        scale: Tensor | float = self.spec.unit
        if fields is not None:
            out, scale = out + fields[:, :-1], scale * fields[:, -1:].exp()
        a = out[:, 1:] if bool(self.active.all()) else out[:, 1:].masked_fill(~self.active, -torch.inf)
        return scale * F.softplus(out[:, :1]) * torch.softmax(a, 1)

    def with_nugget(self, summed: Tensor, effect: Tensor, spots: Tensor | None = None) -> Tensor:
        """Summed activities B [rows, M] with standard normal effects [rows, 1 + M] of their locations; the mean stays as it is.

        The sd of the scale's effect is sd_0 / sqrt(sum_m B_m), that is, constant for the root of a depth; at most `MOST_EFFECT`. Of effects on
        metagenes a spot has one, a location as large as some ``spots`` [rows] the mean of so many.
        """
        sd = self.log_nugget.clamp(-6.0, 0.5).exp()
        depth, number = summed.sum(1, keepdim=True).clamp_min(1e-6), torch.ones(len(summed)) if spots is None else spots.clamp_min(1)
        sd = torch.cat([(sd[0] / depth.sqrt()).clamp_max(MOST_EFFECT), sd[1:] / number.sqrt()[:, None]], 1)
        log = sd * effect - 0.5 * sd**2
        return summed * (log[:, :1] + log[:, 1:]).exp()

    def loadings(self, drawn: dict[str, Tensor], codes: list[int] | None, genes: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Shape per unit of activity e^{L + t + E} [M, g] and log-odds u + F [g] of a section with these levels.

        A level of -1, or codes None, is a new one: its effects are drawn from their prior. The mean is shape x exp(log-odds).
        """
        level, odds = self.log_rate[genes] - self.odds[genes], self.odds[genes]
        for c in range(len(self.spec.levels)):
            code = -1 if codes is None else codes[c]
            for kind in ("level", "logit"):
                name = f"{kind}_{c}"
                if code >= 0:
                    effect = drawn[name][code]
                else:
                    effect = drawn[f"new_{name}"]
                level, odds = (level + effect[genes], odds) if kind == "level" else (level, odds + effect[genes])
        shape = (drawn["metagenes"][:, genes] + level).clamp(*LOG_RATE).exp()
        return shape, odds

    def count_dist(self, drawn: dict[str, Tensor], activity: Tensor, codes: list[int] | None, genes: Tensor) -> Any:
        """p(count | one draw) of locations with summed activities [rows, M]: [rows, g]."""
        shape, odds = self.loadings(drawn, codes, genes)
        return SharedOddsNegativeBinomial(activity @ shape, odds)

    def decoded(self, drawn: dict[str, Tensor], batch: Batch, z: Tensor | list[tuple[Tensor, Tensor]]) -> Tensor:
        """s a of a batch's pixels, times their weight [n, M]; z: the generator's features, or q(Z), to be drawn from and decoded."""
        if not isinstance(z, Tensor):
            z = self.decode([loc + sd * torch.randn_like(loc) for loc, sd in z], *batch.image.shape[-2:])
        fields, blocks = None, batch.blocks
        if self.config.fields and len(batch.pixels):
            table = self.fields(drawn, blocks.features, blocks.where, blocks.parts, self.spec)
            fields = F.embedding_bag(blocks.corner, table, per_sample_weights=blocks.share, mode="sum")
        return self.activity(self.hidden(z)[batch.pixels], fields) * batch.pixel_weight[:, None]

    def noisy(self, drawn: dict[str, Tensor], batch: Batch, summed: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Summed activities of all (or the ``chosen``) locations of a batch with the effects of their locations [rows, M]."""
        if not self.config.nugget or not len(summed):
            return summed
        offset = torch.tensor([0, *self.spec.rows]).cumsum(0)
        first = torch.cat([offset[group.section].expand(group.stop - group.start) for group in batch.groups])
        row = torch.where(batch.rows >= 0, first + batch.rows, -1)
        row = row if chosen is None else row[chosen]
        changed = self.with_nugget(summed, drawn["location"][row.clamp_min(0)])
        return torch.where(row[:, None] >= 0, changed, summed)

    # ---- image ----

    def decode(self, z: list[Tensor], height: int, width: int) -> Tensor:
        """Features of the latents, cropped to the image."""
        return self.generator(z)[..., :height, :width]

    def image_law(self, features: Tensor) -> Any:
        """p(image | features)."""
        mean = torch.tanh(self.image_mean(features) + self.image_start[:, :1, None])
        sd = F.softplus(self.image_sd(features) + self.image_start[:, 1:, None]) + 1e-3
        return dist.Normal(mean, sd)

    # ---- story ----

    def forward(self, batch: Batch, *, observe: bool = True) -> dict[str, Tensor]:
        """Run the generative story on one minibatch; ``observe=False`` draws image and counts."""
        config = self.config
        drawn = self.globals()
        number, _, height, width = batch.image.shape
        out = {}
        with poutine.scale(scale=batch.patches / number), pyro.plate("patches", number):
            z = []
            for i in range(config.depth):
                size = latent_shape(config, i, height, width)
                z.append(pyro.sample(f"z{i}", dist.Normal(torch.zeros(size), 1.0).to_event(3)))  # [B, C 2^i, H / 2^i, W / 2^i]
            features = self.decode(z, height, width)
            if config.image_weight:
                with poutine.scale(scale=config.image_weight):
                    law = self.image_law(features).to_event(3)
                    out["image"] = pyro.sample("image", law, obs=batch.image if observe else None)  # [B, 3, p, p]
        weighted = self.decoded(drawn, batch, features)
        summed = aggregate(weighted, batch.location, len(batch.weight))  # B_lm, eq. 12
        if config.selection == "ard" and len(summed):
            spots = (summed * batch.weight[:, None])[batch.rows >= 0].sum(0)
            share = spots / spots.sum().clamp_min(1e-30)
            pyro.factor("ard", -0.5 * config.ard * self.spec.genes * torch.log1p(share / NEGLIGIBLE).sum())
        summed = self.noisy(drawn, batch, summed)
        for group in batch.groups:
            rows = slice(group.start, group.stop)
            shape, odds = self.loadings(drawn, self.spec.codes[group.section])
            law = ProductSharedOddsNegativeBinomial(summed[rows], shape, odds)
            name = f"counts_{group.section}"
            with pyro.plate(f"locations_{group.section}", group.stop - group.start), poutine.scale(scale=batch.weight[rows]):
                out[name] = pyro.sample(name, law, obs=group.counts if observe else None)  # [locations, G]
        return out


class Guide(PyroModule):
    """q: normal factors of every global site, and the recognition network's latents."""

    center: Tensor  # [G] buffer: mean and axes of what the recognition network sees of the counts
    axes: Tensor  # [G, k] buffer

    def __init__(self, config: Config, spec: Spec, model: Model) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        self.model = (model,)  # for its priors: what is not in use has its prior as posterior; no parameter of this module
        channels = config.condition + 1 if config.condition else 0
        self.recognition = Recognition(3 + channels, config.channels, config.depth, config.norm, config.network == "published")
        if config.condition:
            self.register_buffer("center", torch.zeros(spec.genes))
            self.register_buffer("axes", torch.zeros(spec.genes, config.condition))
        for name, shape in model.priors().items():
            setattr(self, f"{name}_loc", nn.Parameter(torch.zeros(shape)))
            setattr(self, f"{name}_log_sd", nn.Parameter(torch.full(shape, math.log(1e-2))))

    def globals(self) -> dict[str, Tensor]:
        """Sample all global sites; metagenes that are not in use, and their fields, from their priors."""
        model, drawn = self.model[0], {}
        for name in model.priors():
            loc, sd = self.posterior(name)
            drawn[name] = pyro.sample(name, dist.Normal(loc, sd).to_event(loc.dim()))
        return drawn

    def posterior(self, name: str) -> tuple[Tensor, Tensor]:
        """Location and sd of a global site."""
        model = self.model[0]
        loc, sd = getattr(self, f"{name}_loc"), getattr(self, f"{name}_log_sd").clamp(-10.0, 3.0).exp()
        used = model.active
        if bool(used.all()) or not (name == "metagenes" or name in PER_OUTPUT):
            return loc, sd
        keep = used[:, None] if name == "metagenes" else torch.cat([torch.ones_like(used[:1]), used])
        return torch.where(keep, loc, 0.0), torch.where(keep, sd, model.scale_of(name))

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Sample all latent sites of one minibatch."""
        self.globals()
        number = len(batch.image)
        with poutine.scale(scale=batch.patches / number), pyro.plate("patches", number):
            for i, (loc, sd) in enumerate(self.latents(batch.image, batch.spots)):
                pyro.sample(f"z{i}", dist.Normal(loc, sd).to_event(3))

    def latents(self, image: Tensor, spots: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Location and sd of every level of Z given the image [B, 3, H, W] and the spots' channels."""
        out: list[tuple[Tensor, Tensor]] = self.recognition(torch.cat([image, spots], 1))
        return out


class Measured(NamedTuple):
    """A count at a location with a drawn effect of the measurement; the effect is observation noise, so the rate is the mean over it.

    ``log_prob`` is that given the effect: averaged over draws it is the mixture.
    """

    law: Any
    mean: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the count around ``mean``: unbiased over effects."""
        return torch.as_tensor(self.law.variance + (self.law.mean - self.mean) ** 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Given the effect."""
        return torch.as_tensor(self.law.log_prob(value))

    def sample(self) -> Tensor:
        """One count per location and gene."""
        return torch.as_tensor(self.law.sample())


def random_waves(inputs: int, number: int) -> tuple[Tensor, Tensor]:
    """Frequencies [inputs, number] and phases [number]: sqrt(2 / number) cos(x frequency + phase) have the covariance exp(-|x - y|^2 / 2), nearly.

    Cosine and sine of each frequency; directions are orthogonal, as many at a time as there are inputs, lengths those of normal vectors. On
    two pairs of sections 256 were as good as 500 to 1,000 with independent frequencies and phases (Yu et al., 2016; Sutherland and Schneider, 2015).
    """
    pairs = -(-number // 2)
    turns = [torch.linalg.qr(torch.randn(inputs, inputs))[0] for _ in range(-(-pairs // inputs))]
    waves = torch.cat(turns, 1)[:, :pairs] * torch.randn(inputs, pairs).norm(dim=0)
    return waves.repeat_interleave(2, 1)[:, :number], torch.tensor([0.0, -0.5 * math.pi]).repeat(pairs)[:number]


def latent_shape(config: Config, level: int, height: int, width: int) -> tuple[int, int, int]:
    """Channels and sides of one level of Z for an image of this size."""
    multiple = 2 ** (config.depth - 1)
    rows, columns = (-(-side // multiple) * multiple // 2**level for side in (height, width))
    return config.channels * 2**level, rows, columns


def build(config: Config, spec: Spec) -> Pair:
    """A pair with every parameter in place; `ppl_st.models.xfuse.warm_start` moves it to the data."""
    model = Model(config, spec)
    return Pair(model, Guide(config, spec, model))


def sides(pair: Pair) -> tuple[Model, Guide]:
    """The pair of one chain with its types."""
    model, guide = pair
    assert isinstance(model, Model) and isinstance(guide, Guide)
    return model, guide

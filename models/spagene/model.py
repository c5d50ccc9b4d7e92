"""Config and presets of SpaGene, and the pair of stage 2: two translators between frozen autoencoders, and every factor of the published game."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.factors import coral_loss, mmd_loss, pearson_loss
from ppl_st.inference.adversary import Kind, generator_loss, logits
from ppl_st.inference.svi import FitConfig, Pair
from ppl_st.models.common.counts import Hyper
from ppl_st.models.spagene.autoencoder import Autoencoder, Shape
from ppl_st.models.spagene.closed import features
from ppl_st.models.spagene.data import Batch, Data
from ppl_st.models.spagene.direction import Direction, on_target
from ppl_st.networks import MLP

UNITS_CELLS = 4096  # over which the units of a decoder are taken
NAMES = ("forward", "backward")  # target to reference, reference to target


@dataclass(frozen=True)
class Config:
    """Settings of SpaGene. `PRESETS` has the default, neural pairs, the paper's and the released code's values."""

    # linear: closed form; network: neural autoencoders and translators, trained
    translator: Literal["linear", "network"] = "linear"
    latent: tuple[int, int] = (100, 50)  # at most, of target and reference
    # loadings: closed likelihood of the shared genes' loadings (linear); gain_offset: per cell and gene, Normal(a_g + b_g decoded, sigma_g)
    identity: Literal["loadings", "gain_offset", "pearson", "off"] = "loadings"
    identity_weight: float = field(default=1.0, metadata={"ge": 0})  # of pearson
    cycle_weight: float = field(default=0.0, metadata={"ge": 0})  # of the mean squared error, there and back
    coral_weight: float = field(default=0.0, metadata={"ge": 0})  # of unlike covariances of translated and own codes
    mmd_weight: float = field(default=0.0, metadata={"ge": 0})  # of the maximum mean discrepancy between the same two
    mmd_kernel: Literal["median", "released"] = "median"  # widths from the median distance, or one fixed width as released
    # loss of the critics that tell translated codes from own ones; hinge_published: with the released sign
    adversary: Literal["off", "hinge", "density_ratio", "cross_entropy", "hinge_published"] = "off"
    adversary_weight: float = field(default=0.0, metadata={"ge": 0})  # of what the translators lose to the critics
    critic_lr: float = field(default=5e-4, metadata={"gt": 0})  # learning rate of the critics
    critic_eps: float = field(default=0.01, metadata={"gt": 0})  # of the critics' Adam
    critic_hidden: tuple[int, ...] = (64, 64)  # widths of their layers
    gradient_penalty: float = field(default=1.0, metadata={"ge": 0})  # of the critics
    gradient_center: float = field(default=0.0, metadata={"ge": 0})  # norm of the gradient that is not penalised; WGAN-GP: 1
    # share of the spatial neighbors in a cell's code; auto: chosen on inner held-out genes
    smoothing: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    # of the reference's own regression in an unmeasured gene's loadings (linear); auto: likewise
    reference_share: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    # of a process over the reference's cells in an unmeasured gene's map (linear); auto: likewise
    process: float | Literal["auto"] = field(default="auto", metadata={"ge": 0, "le": 1})
    neighbors: int = field(default=20, metadata={"ge": 1})  # spatial neighbors that smoothing averages over
    # mean totals that are added to a cell's own for its depth; auto: chosen on inner held-out genes
    depth_prior: float | Literal["auto"] = field(default="auto", metadata={"ge": 0})
    library_key: str | None = None  # obs column of the section; neighbors stay within it
    likelihood: Literal["nb", "poisson"] = "nb"  # of the predicted counts
    gain: Literal["hierarchical", "none"] = "hierarchical"  # level of unmeasured genes: from a hyper-prior, or the reference's as it is
    batch_cells: int = field(default=256, metadata={"ge": 0})  # spatial cells per minibatch; 0 = all
    batch_reference: int = field(default=256, metadata={"ge": 0})  # reference cells per minibatch; 0 = all
    layer: str | None = None  # layer with the counts
    gene_key: str | None = None  # var column with the gene names, of each file that has it; none = var_names
    # ---- translator="network" only
    preprocess: Literal["lognorm", "sqrt"] = "lognorm"  # what encoders read; sqrt: clipped square roots, as published
    observation: Literal["nb", "gaussian"] = "nb"  # of stage 1
    codes: Literal["normal", "point"] = "normal"  # variational, or plain autoencoders
    hidden: tuple[int, ...] = (128,)  # of encoders, and backwards of decoders
    dropout: float = field(default=0.0, metadata={"ge": 0, "lt": 1})  # in both
    translator_hidden: tuple[int, ...] = (128,)  # of the translator from target to reference
    backward_hidden: tuple[int, ...] = (128,)  # and back
    translator_dropout: float = field(default=0.0, metadata={"ge": 0, "lt": 1})  # in both translators
    checkpoints: int = field(default=5, metadata={"ge": 0})  # numbers of steps tried on inner genes; 0: all steps
    stage1: FitConfig = FitConfig(
        steps=1000, lr=3e-3, schedule="cosine", final_lr_factor=0.1, kl_warmup_steps=200, elbo="meanfield", checkpoint_every=0
    )
    fit: FitConfig = FitConfig(steps=30, lr=1e-3, schedule="cosine", final_lr_factor=0.1, checkpoint_every=0)

    def __post_init__(self) -> None:
        if (self.translator == "linear") != (self.identity in ("loadings",)):
            raise ValueError(
                f"translator={self.translator!r} does not go with identity={self.identity!r}: the linear translator is the posterior given the "
                "shared genes' loadings (identity='loadings'), networks take 'gain_offset', 'pearson' or 'off'"
            )
        if self.identity_weight != 1 and self.identity not in ("pearson", "off"):
            raise ValueError(f"identity_weight={self.identity_weight:g} weighs identity='pearson' only; {self.identity!r} is a likelihood")
        if self.preprocess != "lognorm" and self.translator == "linear":
            raise ValueError(f"preprocess={self.preprocess!r} is for translator='network'; the linear one reads log-normalised counts")
        if (self.adversary == "off") != (self.adversary_weight == 0):
            raise ValueError(f"adversary={self.adversary!r} with adversary_weight={self.adversary_weight:g} does nothing: set both, or neither")

    @property
    def noisy(self) -> bool:
        """Some term of the objective reads translated codes: their noise is learned, and enters predictions. Published translators have none."""
        read = self.identity == "gain_offset" or self.cycle_weight + self.coral_weight + self.mmd_weight + self.adversary_weight > 0
        return read and self.identity != "pearson"

    def shape(self, side: int) -> Shape:
        """Of the autoencoder of the target (0) or the reference (1)."""
        kind = self.translator
        if kind == "linear":
            return Shape("linear", "lognorm", "gaussian", "normal", (), self.latent[side], 0.0, "shared" if side else "all")
        return Shape("network", self.preprocess, self.observation, self.codes, self.hidden, self.latent[side], self.dropout, "shared")


_stage1 = FitConfig(steps=2000, lr=1e-3, clip_norm=float("inf"), checkpoint_every=0)
_paper = Config(
    translator="network", latent=(512, 256), preprocess="sqrt", identity="pearson", identity_weight=10.0, cycle_weight=6.0, coral_weight=0.3,
    mmd_weight=0.3, mmd_kernel="released", adversary="hinge", adversary_weight=1e-3, critic_lr=5e-4, critic_eps=1e-8,
    critic_hidden=(256, 128, 128, 64), gradient_penalty=0.0, smoothing=0.0,
    batch_cells=128, batch_reference=128, observation="gaussian", codes="point", hidden=(2048, 1024, 512),
    dropout=0.2, translator_hidden=(512, 512, 512, 1024, 1024), backward_hidden=(512, 256, 256, 128, 128), translator_dropout=0.1,
    checkpoints=0, stage1=_stage1, fit=replace(_stage1, weight_decay=1e-3, schedule="cosine", final_lr_factor=0.05),
)  # fmt: skip
PRESETS = {
    "default": Config(),
    "network": Config(
        translator="network", latent=(32, 32), identity="gain_offset", cycle_weight=1.0, coral_weight=1.0, mmd_weight=1.0,
        fit=FitConfig(steps=600, lr=2e-3, schedule="cosine", final_lr_factor=0.1, checkpoint_every=0),
    ),
    "paper": _paper,
    # the sign of the critics' hinge and the dominating gradient penalty, as released
    "released": replace(_paper, adversary="hinge_published", gradient_penalty=1e5, gradient_center=1.0, coral_weight=1.2),
}  # fmt: skip


class Spec(NamedTuple):
    """What the inner held-out genes taught; plain numbers, stored with the run. One entry per direction."""

    ratios: tuple[float, float]
    deviations: tuple[list[float], list[float]]
    hypers: tuple[Hyper, Hyper]
    steps: int  # of the fit
    latent: tuple[int, int]  # of the autoencoders as they are
    candidates: list[dict[str, float]]
    shares: tuple[float, float] = (0.0, 0.0)  # of the reference's own regression


class Model(PyroModule):
    """p: see the package docstring. The autoencoders are frozen; their codes are computed once."""

    DIMS = {  # noqa: RUF012
        "translator": ("directions", "features"), "log_gain": ("genes",), "slope": ("genes",), "log_theta": ("genes",), "gene_key": (),
    }  # fmt: skip

    def __init__(self, config: Config, spec: Spec, data: Data, sides: tuple[Autoencoder, Autoencoder]) -> None:
        super().__init__()
        self.config = config
        self.smoothing = [hyper.smoothing for hyper in spec.hypers]
        self.frozen = nn.ModuleList(sides)
        problems = (data, data.turned())
        self.__dict__["problems"], self.__dict__["cache"] = problems, {}
        hidden = (config.translator_hidden, config.backward_hidden)
        linear = config.translator == "linear"
        self.directions = nn.ModuleList(
            Direction(
                name, problems[k], sides[k], sides[1 - k], features(sides[1 - k], problems[k].panel) if linear else None, spec.hypers[k],
                spec.ratios[k], spec.deviations[k], hidden[k], config.translator_dropout, config.fit.seed, spec.shares[k], config.noisy,
                on_target(spec.hypers[0], data) if k else None,
            )
            for k, name in enumerate(NAMES)
        )  # fmt: skip
        if config.identity == "gain_offset":  # hyper-priors of gain, offset and noise of a gene, [direction, 3]
            self.effect_loc = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0]] * 2))
            self.effect_log_scale = nn.Parameter(torch.full((2, 3), -0.7))
        width = [side.latent for side in sides]
        critics = [MLP([width[1 - k], *config.critic_hidden, 1]) for k in range(2)] if config.adversary != "off" else []
        self.opponents = tuple(critics)  # in a tuple: the critics are no part of this module

    def side(self, k: int) -> Autoencoder:
        """The frozen autoencoder of the target (0) or the reference (1)."""
        found = self.frozen[k]
        assert isinstance(found, Autoencoder)
        return found

    def way(self, k: int) -> Direction:
        """The forward (0) or backward (1) direction."""
        found = self.directions[k]
        assert isinstance(found, Direction)
        return found

    def codes(self, side: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Cached location and scale of q(z) of some cells of one side, [B, L] each."""
        if side not in self.cache:
            self.cache[side] = self.side(side).codes(self.problems[side])
        loc, scale = (tensor.to(rows.device) for tensor in self.cache[side])
        return loc[rows], scale[rows]

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Run the story on one minibatch; ``observe=False`` draws what was observed."""
        c = self.config
        size = float(self.problems[0].counts.shape[0] * self.problems[0].counts.shape[1])  # the runner divides by it: factors weigh as published
        rows, plates = (batch.rows, batch.reference_rows), cell_plates(batch)
        z, translated = [], []
        for k in range(2):
            direction = self.way(k)
            weights = direction.story(observe) if direction.linear else None
            codes, noise = story_codes(self, k, rows[k], plates[k])
            z.append(codes)
            mean = direction.translate(codes, weights)
            translated.append(mean + direction.noise() * noise)  # [B, L]
        if c.identity == "gain_offset":
            self._gain_offset(plates, rows, translated, observe)
        factors: dict[str, Tensor] = {}
        if c.identity == "pearson":
            for k, name in enumerate(NAMES):
                factors[f"{name}_identity"] = c.identity_weight * pearson_loss(self.decode_shared(k, translated[k]), self.read_shared(k, rows[k]))
        if c.cycle_weight:  # back in the side's own units; a decoder of log rates is held against what it says of the cell itself
            gaussian = c.translator == "linear" or c.observation == "gaussian"
            for k, name in enumerate(NAMES):
                own = self.side(k).read(self.problems[k], rows[k].cpu().numpy()) if gaussian else self.decode(k, z[k])
                back = self.way(1 - k).translate(translated[k])
                factors[f"{name}_cycle"] = c.cycle_weight * (self.decode(k, back) - own).square().mean()
        for k, name in enumerate(NAMES):
            if c.coral_weight:
                factors[f"{name}_coral"] = c.coral_weight * coral_loss(translated[k], z[1 - k])
            if c.mmd_weight and min(len(translated[k]), len(z[1 - k])) > 1:
                factors[f"{name}_mmd"] = c.mmd_weight * mmd_loss(translated[k], z[1 - k], c.mmd_kernel)
            if self.opponents:
                kind: Kind = c.adversary  # type: ignore[assignment]
                real, fake = logits(self.opponents[k], z[1 - k], translated[k])
                factors[f"{name}_adversary"] = c.adversary_weight * generator_loss(kind, real, fake)
        for name, value in factors.items():
            pyro.factor(name, -size * value)

    def units(self, side: int) -> tuple[Tensor, Tensor]:
        """Mean and sd over cells of one side of what its decoder says of every gene [genes]: log rates are held against standardised counts."""
        key = ("units", side)
        if key not in self.cache:
            rng = np.random.default_rng([self.config.fit.seed, 15])
            z = self.codes(side, torch.from_numpy(np.sort(rng.permutation(self.problems[side].counts.shape[0])[:UNITS_CELLS])))[0]
            with torch.no_grad():
                decoded = self.decode(side, z)
            self.cache[key] = decoded.mean(0), decoded.std(0, correction=0).clamp_min(1e-3)
        loc, scale = self.cache[key]
        return loc, scale

    def decode(self, side: int, z: Tensor) -> Tensor:
        """What the frozen decoder of one side makes of codes, [B, genes]."""
        return self.side(side).decode(z)

    def decode_shared(self, k: int, translated: Tensor) -> Tensor:
        """What the other side's decoder makes of translated codes, shared genes only, [B, P]."""
        return self.side(1 - k).decode(translated, torch.from_numpy(self.problems[k].panel))

    def read_shared(self, k: int, rows: Tensor) -> Tensor:
        """Preprocessed shared genes of some cells [B, P]; no other counts are made dense."""
        return self.side(k).read(self.problems[k], rows.cpu().numpy(), self.problems[k].columns)

    def _gain_offset(self, plates: list[Any], rows: tuple[Tensor, Tensor], translated: list[Tensor], observe: bool) -> None:
        for k, name in enumerate(NAMES):
            panel = torch.from_numpy(self.problems[k].panel)
            with pyro.plate(f"{name}_genes", len(panel)):
                effect = pyro.sample(
                    f"{name}_effect", dist.Normal(self.effect_loc[k].expand(len(panel), 3), self.effect_log_scale[k].exp()).to_event(1)
                )  # [P, 3] log gain, offset, log noise
            loc, scale = self.units(1 - k)
            decoded = (self.decode_shared(k, translated[k]) - loc[panel]) / scale[panel]
            mean = effect[:, 1] + effect[:, 0].clamp(-5, 5).exp() * decoded
            law: Any = dist.Normal(mean, effect[:, 2].clamp(-4, 4).exp())
            with plates[k]:
                pyro.sample(f"{name}_identity", law.to_event(1), obs=self.read_shared(k, rows[k]) if observe else None)  # [B, P]


def cell_plates(batch: Batch) -> list[Any]:
    """Plates of the cells of either side."""
    sizes = (("cells", batch.n_cells, batch.rows), ("reference", batch.n_reference, batch.reference_rows))
    return [pyro.plate(name, n, subsample=rows) for name, n, rows in sizes]


def story_codes(model: Model, k: int, rows: Tensor, plate: Any) -> tuple[Tensor, Tensor]:
    """Sample codes of one side from the frozen posterior, and the standard noise of their translation; model and guide alike.

    The translator itself runs in the model alone: two passes would hold the dropout of one against the other's.
    """
    loc, scale = model.codes(k, rows)
    with plate:
        z = pyro.sample(f"{NAMES[k]}_z", dist.Normal(loc, scale.clamp_min(1e-3)).to_event(1))  # [B, q]
        noise = pyro.sample(f"{NAMES[k]}_noise", dist.Normal(torch.zeros(model.side(1 - k).latent, device=z.device), 1.0).to_event(1))  # [B, L]
    return z, noise


class Guide(PyroModule):
    """q: posterior of the translators; codes and translations as in the model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.__dict__["model"] = model  # its directions are shared, but a part of the model alone
        if model.config.identity == "gain_offset":
            panel = len(model.problems[0].panel)
            self.effect_loc = nn.Parameter(torch.zeros(2, panel, 3))
            self.effect_log_scale = nn.Parameter(torch.full((2, panel, 3), -3.0))

    def forward(self, batch: Batch, *, observe: bool = True) -> None:
        """Sample all latent sites of one minibatch."""
        model: Model = self.model
        plates = cell_plates(batch)
        for k, name in enumerate(NAMES):
            if model.way(k).linear:
                model.way(k).posterior()
            if model.config.identity == "gain_offset":
                with pyro.plate(f"{name}_genes", self.effect_loc.shape[1]):
                    law: Any = dist.Normal(self.effect_loc[k], self.effect_log_scale[k].exp())
                    pyro.sample(f"{name}_effect", law.to_event(1))  # [P, 3]
            story_codes(model, k, (batch.rows, batch.reference_rows)[k], plates[k])

    def globals(self) -> None:
        """One joint draw for prediction in the target's cells."""
        self.model.way(0).globals()


def build(config: Config, spec: Spec, data: Data, sides: tuple[Autoencoder, Autoencoder]) -> Pair:
    """The pair of stage 2 between frozen autoencoders."""
    model = Model(config, spec, data, sides)
    return Pair(model, Guide(model))


def model_of(pair: Pair) -> Model:
    """The model of one chain with its type."""
    assert isinstance(pair.model, Model)
    return pair.model


def direction_of(pair: Pair, k: int) -> Direction:
    """The forward (0) or backward (1) direction of one chain."""
    return model_of(pair).way(k)


def empty_sides(config: Config, latent: tuple[int, int], data: Data) -> tuple[Autoencoder, Autoencoder]:
    """Autoencoders with every parameter in place, frozen, to read weights into."""
    genes = data.counts.shape[1], data.reference.shape[1]
    target, reference = (Autoencoder(config.shape(k)._replace(latent=latent[k]), genes[k]).freeze() for k in range(2))
    return target, reference


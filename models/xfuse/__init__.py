r"""XFuse: histology and spot counts fused into super-resolved expression with uncertainty.

Bergenstrahle et al., Nat Biotechnol 2022, doi:10.1038/s41587-021-01075-3, written anew from the equations.

GENERATIVE STORY (n section, pixel xy, location l with pixels A_l, gene g, metagene m, covariate c)
    z_i          ~ Normal(0, 1)                     latent image, level i = 0..D-1 at resolution 1 / 2^i with C 2^i channels
    L_mg         ~ Normal(0, sigma_Lg)              metagenes;  E_cg ~ Normal(0, sigma_Eg), F_cg ~ Normal(0, sigma_Fg) effects of covariates;
                                                    the sigmas are learned per gene
    v_j, w_nk    ~ Normal(0, 1)                     weights of the regression on image features, and of the spatial field of section n
    delta_n      ~ Normal(0, 0.5)                   log depth of a section
    eta_o(xy)    = b_o + alpha_o sum_j v_jo psi_j(f(xy)) + tau_o sum_k w_nko N(xy - x_k) + head_o(U(z))
    s, a         = e^{delta_n} unit softplus(eta_0), softmax(eta_1..M)                        scale and metagene activities
    image        ~ Normal(tanh(head(U(z))), softplus(head(U(z))))                             per pixel and channel
    B_lm         = sum_{xy in A_l} s a_m                                                      eq. 12: aggregated before the genes
    o_lm         ~ Normal(0, 1), B_lm times exp(d_l o_l0 - d_l^2 / 2) exp(e_m o_lm - e_m^2 / 2), d_l = d / sqrt(sum_m B_lm): what no field explains
    x_lg         ~ NB(e^{t_g + E_g} sum_m B_lm e^{L_mg}, odds e^{u_g + F_g})                  closed under summation: pixels add up to spots
    psi_j are random waves (a Gaussian process on color, gradient and local spread at three smoothings), N Gaussians on a fine and a coarse
    lattice (a Gaussian process in space, half of its variance each). Of a section that lies over an earlier one (serial sections, `serial.py`) the
    spatial field is rho that of the other at the same place of the tissue + sqrt(1 - rho^2) its own. ``fields=False`` leaves all and delta out.

GUIDE
    normal q for all global sites (fields included), q(z | image, spots) by the recognition network. Step 0 is data-driven (`warm_start.py`);
    variances of fields and location effects, and the posterior sd of the fields' weights, stay what marginal likelihood and moments say there
    (``fields=False``: variances of location effects are learned).

PREDICTIVE: globals once per draw and one latent image per draw and section, so draws are joint over genes and places; B_d is kept, any gene is
    then one matrix product. Spatial field, depth and covariate effects of a section that the fit never saw are drawn from their priors, the field's
    share of a section of the fit that it lies over excepted.

SYMBOLS  B patches of p x p pixels, M metagenes, G genes, J features, D levels, C channels.

DIFFERENCES from paper and released code
    * spatial field and image regression in the generator: networks alone, trained for minutes, are below a Gaussian process (RECORD.md);
    * genes of one draw share one latent image (released: a new one for every ten genes); location ids are int64 (released: float32);
    * weights of spots make the sums over measurements unbiased (`patches.py`); metagenes on a fixed maximum with masks (`metagenes.py`), a split
      subtracts log 2 and changes no mean; group norm; log-odds shared, Gamma functions at the non-zero counts only;
    * ``preset="paper"`` has the published networks, augmentation, weights and schedule.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ppl_st.errors import UserError
from ppl_st.inference.ensemble import chains_of, ensemble
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.svi import Pair, rng_scope
from ppl_st.inference.threads import torch_threads
from ppl_st.models.xfuse import warm_start
from ppl_st.models.xfuse.data import Data, Input, Section
from ppl_st.models.xfuse.metagenes import profiles as metagene_profiles
from ppl_st.models.xfuse.metagenes import rounds
from ppl_st.models.xfuse.model import PRESETS, Config, Guide, Measured, Model, Spec, build, sides
from ppl_st.models.xfuse.novelty import novelty
from ppl_st.models.xfuse.patches import COARSE, Batch, Batches, Tissue, aggregate, coarse, pitch_of, tissue
from ppl_st.models.xfuse.serial import Planes, corners, lattices_of, planes_of, tie_of, tied
from ppl_st.models.xfuse.space import Lattice, Tie, lattices_over, points_of

__all__ = [
    "PRESETS", "Batch", "Batches", "Config", "Data", "Guide", "Input", "MapDraw", "Model", "Predictor", "Section", "Spec", "batches", "build",
    "edit", "empty", "lies_over", "maps", "novelty", "profiles", "quantities", "select", "spec_from", "spec_to", "start",
]  # fmt: skip


def start(data: Data, config: Config, seed: int, say: Callable[[str], None]) -> tuple[Pair, Spec]:
    """The initialised pair (as an ensemble of one) and its specification."""
    with torch_threads(config.fit.threads):
        rng = np.random.default_rng([seed, 21])
        axes = _axes(data, config.condition)
        tissues = _tissues(data, axes, config)
        spots = warm_start.gather(data, tissues)
        working = warm_start.without_failed(spots, say) if config.fields else spots
        planes, ties = tied(data.sections, tissues, say) if config.fields and config.serial else ({}, [None] * len(tissues))
        kernel = warm_start.learn_kernel(working, rng) if config.fields else None
        pitches = np.array([pitch_of(section) for section in data.sections])
        shift = warm_start.learn_shift(working, kernel, ties, pitches, rng) if kernel else 0.0
        ties = [tie and tie.shifted(shift) for tie in ties]
        if any(ties):
            say(f"their spatial fields: by {', '.join(f'{tie.share:.2g}' for tie in ties if tie)}")
        lengths = (kernel.length_space, kernel.length_image) if kernel else (1.0, 1.0)
        spec = _spec(data, planes, ties, shift, *lengths, warm_start.UNIT / float(spots.size.mean()) if config.fields else 1.0)
        with rng_scope(seed, "start"):
            pair = build(config, spec)
        for n, own in planes.items():
            getattr(sides(pair)[0], f"planes_{n}").copy_(torch.from_numpy(own.values))
        if axes is not None:
            guide = sides(pair)[1]
            guide.center.copy_(torch.from_numpy(axes[0]))
            guide.axes.copy_(torch.from_numpy(axes[1]))
        warm_start.constant_start(pair, spots, tissues, rng)
        if kernel:
            warm_start.data_start(pair, working, tissues, kernel, rng, say)
    return ensemble([pair]), spec


def _tissues(data: Data, axes: tuple[NDArray[np.float32], NDArray[np.float32]] | None, config: Config) -> list[Tissue]:
    return [_tissue(section, axes, config) for section in data.sections]


def _tissue(section: Section, axes: tuple[NDArray[np.float32], NDArray[np.float32]] | None, config: Config) -> Tissue:
    """The section as the fit sees it, also where other places of it are asked for."""
    scores = None if axes is None else _scores(section.shown or section, axes)
    return tissue(section, scores, config.fields, config.input.background)


def _axes(data: Data, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Mean [G] and first principal axes [G, k] of the spots' log-normalised counts, for the recognition network; None: it sees the image alone."""
    if not number:
        return None
    x = np.concatenate([_log_normalised(section)[_real_rows(section)] for section in data.sections])
    if min(x.shape) < number:
        raise UserError(f"condition={number}: there are {x.shape[0]} spots and {x.shape[1]} genes; ask for fewer scores")
    mean = x.mean(0)
    left, values, right = np.linalg.svd(x - mean, full_matrices=False)
    del left
    return mean.astype(np.float32), (right[:number] / values[:number, None] * np.sqrt(len(x))).T.astype(np.float32)


def _log_normalised(section: Section) -> NDArray[np.float64]:
    counts = section.counts.toarray().astype(np.float64)
    return np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1.0)))


def _scores(section: Section, axes: tuple[NDArray[np.float32], NDArray[np.float32]]) -> NDArray[np.float32]:
    """Scores of unit variance of the measurements [rows, k]; 0 where there are no counts."""
    found = (_log_normalised(section) - axes[0]) @ axes[1]
    return np.where(np.asarray(section.counts.sum(1)) > 0, found, 0.0).astype(np.float32)


def _spec(data: Data, planes: dict[int, Planes], ties: list[Tie | None], shift: float, space: float, image: float, unit: float) -> Spec:
    levels = [len(names) for names in data.covariates.values()]
    codes = []
    for section in data.sections:
        mine = [int(code) for code in section.covariates]
        for c, code in enumerate(mine):
            if code < 0:  # unknown: a level of its own, shrunk towards the others by its prior
                mine[c], levels[c] = levels[c], levels[c] + 1
        codes.append(mine)
    lattices = [lattices_of(n, data.sections, ties, space) for n in range(len(data.sections))]
    rows = [section.counts.shape[0] for section in data.sections]
    shapes = [(*planes[n].values.shape[1:], float(planes[n].step)) if n in planes else (0, 0, 0.0) for n in range(len(data.sections))]
    return Spec(len(data.genes), [section.name for section in data.sections], lattices, ties, shift, shapes, rows, levels, codes, image, unit)


def empty(config: Config, spec: Spec, data: Data, chains: int) -> Pair:
    """An ensemble with every parameter in place, to read stored weights into."""
    with rng_scope(0, "empty"):
        pair = ensemble([build(config, spec) for _ in range(chains)])
    for side in pair:
        side.eval()
    return pair


def spec_to(spec: Spec) -> dict[str, Any]:
    """The specification as plain JSON."""
    return spec._asdict()


def spec_from(stored: dict[str, Any]) -> Spec:
    """Inverse of `spec_to`."""
    lattices = [[Lattice(*values) for values in own] for own in stored["lattices"]]
    ties = [tie and Tie(tie[0], tie[1], tuple(tie[2])) for tie in stored["ties"]]
    return Spec(**{**stored, "lattices": lattices, "ties": ties, "planes": [tuple(shape) for shape in stored["planes"]]})


def batches(data: Data, config: Config, seed: int) -> Batches:
    """Minibatches of patches; spots that failed, which the start has left out, are not measurements there either."""
    tissues = _tissues(data, _axes(data, config.condition), config)
    tissues = warm_start.measured(data, tissues) if config.fields else tissues
    return Batches(tissues, config.patch, config.batch_patches, config.augment, seed, config.hide)


def edit(pair: Pair, data: Data, config: Config, seed: int) -> Callable[[int, torch.optim.Optimizer], None] | None:
    """What happens between steps: rounds of drop-and-split, or nothing."""
    return rounds(pair, batches(data, config, seed), config, seed) if config.selection == "split" else None


def select(pair: Pair, data: Data, config: Config, seed: int) -> Pair:
    """All chains are kept."""
    return pair


class MapDraw(NamedTuple):
    """One posterior draw of one section."""

    section: int
    draw: int
    activity: Tensor  # [M, H, W] s a per pixel
    shape: Tensor  # [M, g] of the genes asked for: the NB shape of a pixel is activity' shape
    odds: Tensor  # [g] log-odds: mean = shape x e^odds


class _Canvas(NamedTuple):
    """A section as the networks see it, and its q(Z)."""

    tissue: Tissue
    section: int
    known: int  # position among the sections of the fit; -1: a new one
    codes: list[int] | None
    latents: list[tuple[Tensor, Tensor]]


class Predictor:
    """Posterior predictive of the locations of all sections (virtual ones left out); see `ppl_st.inference.predict.Predictor`.

    A section with the name of one of the fit's is that section (its spatial field, depth and effects are known); others are new.
    """

    def __init__(self, pair: Pair, data: Data, config: Config, spec: Spec) -> None:
        self.chains, self.data, self.config, self.spec = chains_of(pair), data, config, spec
        self.models, self.guides = zip(*(sides(chain) for chain in self.chains), strict=True)
        if len(data.genes) != spec.genes:
            raise UserError(f"xfuse: the sections have {len(data.genes)} genes and the fit {spec.genes}; give sections made for this fit")
        owners = [np.full(len(rows), n) for n, rows in enumerate(map(_real_rows, data.sections))]
        self.owners = np.concatenate(owners or [np.zeros(0)]).astype(np.int64)
        self.n_cells = len(self.owners)
        self.canvas: dict[tuple[int, int], _Canvas] = {}
        self.specs: dict[int, Spec] = {}  # by section: of a new one the fit's with it at the end
        self.summed: dict[int, tuple[Any, Tensor, Tensor, dict[str, Tensor]]] = {}  # by draw: of the section that is being predicted
        self.current = (-1, -1)

    def blocks(self, max_cells: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """(section, rows of the result) of at most ``max_cells`` locations."""
        for n in range(len(self.data.sections)):
            rows = np.flatnonzero(self.owners == n)
            for first in range(0, len(rows), max(1, max_cells)):
                yield n, rows[first : first + max_cells]

    def restrict(self, batch: tuple[int, NDArray[np.int64]], keep: NDArray[np.bool_]) -> tuple[int, NDArray[np.int64]]:
        """The block with only the locations in ``keep`` [n_cells]."""
        section, rows = batch
        return section, rows[keep[rows]]

    def rows(self, batch: tuple[int, NDArray[np.int64]]) -> NDArray[np.int64]:
        """Rows of the result that the block owns."""
        return batch[1]

    def local(self, batch: tuple[int, NDArray[np.int64]], chain: int) -> _Canvas:
        """q(Z) of the block's section."""
        return self._canvas(batch[0], chain)

    def count_dist(
        self, batch: tuple[int, NDArray[np.int64]], chain: int, drawn: dict[str, Tensor], local: _Canvas, genes: Tensor
    ) -> Any:
        """p(count | draw). The latent image is drawn once per draw and section and serves all blocks of locations and genes."""
        own, summed, noisy, full = self._summed(batch, chain, drawn, local)
        model = self.models[chain]
        law = model.count_dist(full, noisy[own], local.codes, genes)
        return Measured(law, model.count_dist(full, summed[own], local.codes, genes).mean) if self.config.nugget else law

    def measured_dist(
        self, batch: tuple[int, NDArray[np.int64]], chain: int, drawn: dict[str, Tensor], local: _Canvas, genes: Tensor
    ) -> Any:
        """p(count | draw) of the fit's own measurements: given the drawn effects that they have had, not those of new ones there."""
        if not self.config.nugget:
            return self.count_dist(batch, chain, drawn, local, genes)
        own, summed, _, full = self._summed(batch, chain, drawn, local)
        first, model = sum(self.spec.rows[: local.known]), self.models[chain]
        return model.count_dist(full, model.with_nugget(summed[own], drawn["location"][first + own]), local.codes, genes)

    def _summed(
        self, batch: tuple[int, NDArray[np.int64]], chain: int, drawn: dict[str, Tensor], local: _Canvas
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Rows of the block's locations in their section, summed activities of the section without and with effects, drawn globals."""
        section, rows = batch
        if (section, chain) != self.current:
            if section != self.current[0]:
                self.summed.clear()
            self.current = (section, chain)
        if id(drawn) not in self.summed:
            activity, full = self._draw(local, chain, drawn)
            number = len(local.tissue.size)
            flat = activity.flatten(1).T
            location = local.tissue.label.reshape(-1) - 1
            summed = aggregate(flat, torch.where(location < 0, number, location), number)
            noisy = summed
            if self.config.nugget:  # of a new measurement there
                many = torch.from_numpy(local.tissue.size * (self.spec.unit / warm_start.UNIT)).float() if self.config.fields else None  # spots large
                noisy = self.models[chain].with_nugget(summed, torch.randn(number, 1 + self.config.metagenes), many)
            self.summed[id(drawn)] = drawn, summed, noisy, full
        _, summed, noisy, full = self.summed[id(drawn)]
        first = int(np.searchsorted(self.owners, section))
        return torch.from_numpy(_real_rows(self.data.sections[section])[rows - first]), summed, noisy, full

    def _canvas(self, section: int, chain: int) -> _Canvas:
        if (section, chain) not in self.canvas:
            self.canvas.clear()  # one section at a time: images are large
            one = self.data.sections[section]
            known = self.spec.sections.index(one.name) if one.name in self.spec.sections else -1
            codes = self.spec.codes[known] if known >= 0 else [int(code) for code in one.covariates]
            guide = self.guides[chain]
            axes = (guide.center.numpy(), guide.axes.numpy()) if self.config.condition else None
            seen = _tissue(one, axes, self.config)
            with torch.no_grad():
                latents = guide.latents(seen.scaled(seen.image)[None], seen.spots[None])
            self.canvas[section, chain] = _Canvas(seen, section, known, codes, latents)
        return self.canvas[section, chain]

    def spec_with(self, local: _Canvas) -> Spec:
        """The fit's specification; with a section that it never saw at the end, and the tie of this."""
        if local.known < 0 and local.section not in self.specs:
            self.specs[local.section] = _with_new(self.models[0], self.data.sections[local.section], local.tissue)
        return self.spec if local.known >= 0 else self.specs[local.section]

    def _draw(self, local: _Canvas, chain: int, drawn: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """s a of one section [M, H, W] for one draw of the globals, and these with the effects of levels that the fit never saw."""
        model, spec = self.models[chain], self.spec_with(local) if self.config.fields else self.spec
        height, width = local.tissue.label.shape
        z = [loc + sd * torch.randn_like(loc) for loc, sd in local.latents]
        full = dict(drawn)
        for name in model.priors():
            if name.startswith(("level_", "logit_")):
                # K levels vary around their own mean by s^2 (1 - 1 / K), which is what they taught; a new one by s^2 (1 + 1 / K)
                seen = len({codes[int(name.split("_")[1])] for codes in self.spec.codes})
                full[f"new_{name}"] = math.sqrt((seen + 1) / max(seen - 1, 1)) * model.scale_of(name) * torch.randn(self.spec.genes)
        if self.config.fields and local.known < 0:
            points, outputs = points_of(spec.lattices[-1]), 1 + self.config.metagenes
            full["space"] = torch.cat([drawn["space"], torch.randn(points, outputs)])
            full["depth"] = torch.cat([drawn["depth"], (model.scale_of("depth") * torch.randn(1)).reshape(1)])
        fields = None
        if self.config.fields:
            columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
            where = coarse(torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)]))
            features = coarse(local.tissue.features)
            part = (local.known if local.known >= 0 else len(self.spec.lattices), 0, where[0].numel())
            table = model.fields(full, features.flatten(1).T, where.flatten(1).T, [part], spec).T.unflatten(1, where.shape[1:])
            fine = F.interpolate(table[None], scale_factor=COARSE, mode="bilinear")[0, :, :height, :width]
            fields = fine.flatten(1).T
        activity = model.activity(model.hidden(model.decode(z, height, width)), fields)
        return activity.T.unflatten(1, (height, width)), full


def _with_new(model: Model, section: Section, seen: Tissue) -> Spec:
    """With a section that the fit never saw: lattices as fine as those of the first (all are at the working resolution), tie by its image."""
    spec, low, high = model.spec, *corners(section)[[0, 3]].tolist()
    free = {n: Planes(getattr(model, f"planes_{n}").numpy(), step) for n, (*_, step) in enumerate(spec.planes) if step}
    tie = tie_of(planes_of(section, seen), free) if free else None
    lattices = [*spec.lattices, lattices_over(low, high, spec.lattices[0][0].step)]
    return spec._replace(lattices=lattices, ties=[*spec.ties, tie and tie.shifted(spec.shift)])


def _real_rows(section: Section) -> NDArray[np.int64]:
    rows = np.arange(section.counts.shape[0])
    return rows[rows != section.virtual]


def maps(
    predictor: Predictor, genes: NDArray[np.int64], draws: int, seed: int, sections: list[int] | None = None
) -> Iterator[MapDraw]:
    """Joint posterior draws of whole sections, one after the other: all draws of a section, then the next.

    The mean count of gene g in pixel xy is (activity[:, xy] @ shape[:, g]) exp(odds[g]); over an area, activities are summed first.
    Nothing of the size pixels x genes is formed here.
    """
    drawn = draw_globals(predictor.chains, draws, seed)
    wanted = torch.from_numpy(genes)
    for section in range(len(predictor.data.sections)) if sections is None else sections:
        for d in range(draws):
            chain = d % len(predictor.chains)
            with torch.no_grad(), rng_scope(seed, "maps", section, d):
                local = predictor.local((section, np.zeros(0, np.int64)), chain)
                activity, full = predictor._draw(local, chain, drawn[d])
                shape, odds = predictor.models[chain].loadings(full, local.codes, wanted)
            yield MapDraw(section, d, activity, shape, odds)


def lies_over(predictor: Predictor, section: int) -> tuple[str, float] | None:
    """Name of the fit's section that a section lies over (`ppl_st.models.xfuse.serial`) and the correlation of their fields; None: over none."""
    if not predictor.config.fields:
        return None
    local = predictor.local((section, np.zeros(0, np.int64)), 0)
    tie = predictor.spec_with(local).ties[local.known]
    return None if tie is None else (predictor.spec.sections[tie.section], tie.share)


def quantities(pair: Pair, data: Data, config: Config, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every location: ``obsm`` metagenes [n, M], mean share of each over 10 draws; ``obs`` scale, mean of the summed scale."""
    predictor = Predictor(pair, data, config, spec)
    shares = np.zeros((predictor.n_cells, config.metagenes), np.float32)
    scale = np.zeros(predictor.n_cells, np.float32)
    for section, rows in predictor.blocks(predictor.n_cells + 1):
        one = data.sections[section]
        location = torch.from_numpy(one.label).reshape(-1) - 1
        number = one.counts.shape[0]
        total = torch.zeros(number, config.metagenes)
        for draw in maps(predictor, np.zeros(0, np.int64), 10, config.fit.seed, [section]):
            total += aggregate(draw.activity.flatten(1).T, torch.where(location < 0, number, location), number) / 10
        mean = total[torch.from_numpy(_real_rows(one))].numpy()
        scale[rows] = mean.sum(1)
        shares[rows] = mean / np.maximum(mean.sum(1, keepdims=True), 1e-30)
    return {"metagenes": shares}, {"scale": scale}


def profiles(pair: Pair, config: Config) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """Profiles of the metagenes [G, M] by name (`ppl_st.models.xfuse.metagenes.profiles`), and the unit of each and of what `quantities` gives."""
    same, over = "column k is the metagene k of obsm['metagenes']; NaN: not in use", "over posterior draws"
    share = "share of the gene in the counts that the metagene makes, sum 1 over all genes of the fit"
    fold = "log2 of that share over the gene's share in the fit's baseline"
    units = {"metagenes": "share of the metagene in the activity at the place", "scale": "sum of the activity at the place, no unit"}
    for name, text in (("metagene_profile", share), ("metagene_log2_fold", fold)):
        units |= {f"{name}_mean": f"{text}, mean {over}; {same}", f"{name}_sd": f"{text}, sd {over}; {same}"}
    return metagene_profiles(pair, config.fit.seed), units

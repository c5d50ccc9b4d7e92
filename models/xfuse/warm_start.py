r"""Where a fit starts: the best gene-wise constant model, and on top of it metagenes and fields in closed form.

1. Gene-wise constant model: r_lg = size_l e^{t_g}, odds e^{u_g} by maximum likelihood. With the last layers of all heads at zero and
   ``fields=False``, this is what a pair predicts before its first step.
2. Length scales of space and image: marginal likelihood of Gaussian processes on the square root of the depth and the first principal components of
   the counts' Pearson residuals, as normal scores (a few extreme spots would make lengths short), each column with variances of its own:
   K_k = a_sk exp(-d_s^2 / 2 l_s^2) + a_ik exp(-d_i^2 / 2 l_i^2) + noise_k, d_s in spot pitches within a section, d_i between standardised image
   features. A few spots that failed (depth below `FAILED` of their section's median) are left out. The model's own kernel in space has a
   longer length beside l_s (`LENGTHS`): a depth varies more slowly than what the genes differ in.
   How far fields of sections that lie over each other correlate (`serial.py`): marginal likelihood of the same columns, given the lengths.
3. Metagenes: each column is smoothed with its own share of noise (the eigenvectors of K serve all), the smooth counts are factorised
   (Kullback-Leibler NMF), and profiles and shares of the factors are the start of e^L and of the activities. Depth is smoothed as its square root:
   in the logarithm a spot that failed outweighs all others.
4. Fields: Gaussian process regression of smooth depth (through the inverse of the softplus; with `UNIT`, a Gaussian field then follows a depth much
   as its root does) and of the logs of shares, written as weights of the model's own basis functions, with the diagonal of the posterior
   precision as their posterior sd. Smooth shares seem to be free of noise: variances of noise and fields of the shares are those of the shares
   that the same profiles give to scores before they are smoothed.
5. Odds again, given the rates of 4. Effects of locations: their sd on metagenes is what smooth scores leave beyond the noise of single genes, one
   for all; on the scale what smooth roots of depths leave beyond the law of the counts and those; of every spot's effect on the scale, its mean
   given its depth.

3 to 5 are solved on about `MOST_SPOTS` spots, the same share of every section (but for every spot's effect): each then stands for the others in
the posterior precision.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.special import gammaln
from torch import Tensor
from torch.nn import functional as F

from ppl_st.inference.pair import Pair
from ppl_st.models.xfuse.closed import Kernel, Smoother, fit_kernel, logits_of, nmf, normal_scores, project
from ppl_st.models.xfuse.data import Data
from ppl_st.models.xfuse.model import MOST_EFFECT, TURNED, Guide, Model, sides
from ppl_st.models.xfuse.patches import Tissue, color_of, pitch_of
from ppl_st.models.xfuse.space import LENGTHS, Tie, points_of, spatial_field

__all__ = ["Kernel", "constant_start", "data_start", "fit_kernel", "fit_odds", "learn_kernel", "measured", "normal_scores", "without_failed"]

COMPONENTS = 25
FAILED = 0.02  # of its section's median depth
MOST_FAILED = 0.05  # of all spots; where more are empty it is the tissue that is
MOST_SPOTS = 3000  # or a few more, on which closed forms are solved: their cost grows with the cube, or with that of the functions, if fewer
PIXELS = 2**15  # whose functions are computed at once
COLUMNS = 256  # points of a lattice whose functions are made at once
ODDS = np.linspace(-5.0, 12.0, 35)  # they grow with the counts of a spot, so that deep spots need high ones
RARE = 5.0  # above, the likelihood is followed only for genes for which it still rises, and that several spots show
THETA = 100.0  # inverse dispersion in Pearson residuals
RESIDUAL_CLIP = 8.0  # or the root of the count or its mean, if larger: single reads of rare genes are cut, what many reads say is not
SHIFTS = np.linspace(-4.0, 2.0, 13)  # of the logit of a correlation of images, with a standard normal prior
LEAST_ROOT = 0.2  # of its section's mean: floor of the smooth root of a depth
LEAST_READS = 0.5  # floors of rates and profiles are at most this: a gene of which thousands of reads could be seen may be nearly absent
LEAST_EFFECT = 0.1  # prior sd of covariates' effects, with which a new section draws its own; from 1 on, hundreds of steps do not bring it there
UNIT = 0.5  # of the softplus of the scale, over the mean scale: a Gaussian field becomes a depth much as its root would
MOST_NUGGET = 3.0  # sds that the effect of a spot starts at
LEAST_NUGGET = 0.05  # sd of these effects
SURE = 0.5  # sd of what is known of a spot's effect, in prior sds
BLOCK = 4096  # spots whose fields are computed at once
Array = NDArray[np.float64]


class Spots(NamedTuple):
    """Locations of all training sections, without virtual ones."""

    counts: sp.csr_matrix  # [n, G]
    section: NDArray[np.int64]  # [n]
    size: Array  # [n] pixels
    xy: Array  # [n, 2] in pixels
    features: Array  # [n, F] means over the pixels of each
    pitch: Array  # [n] of its section, pixels
    row: NDArray[np.int64]  # [n] in its section


def gather(data: Data, tissues: Sequence[Tissue]) -> Spots:
    """The training spots of all sections."""
    parts = []
    for n, (section, one) in enumerate(zip(data.sections, tissues, strict=True)):
        rows = np.flatnonzero((one.size > 0) & (np.arange(len(one.size)) != one.virtual))
        if not len(rows):
            continue
        flat = one.label.numpy().ravel()
        total = np.stack([np.bincount(flat, plane.ravel(), len(one.size) + 1)[1:] for plane in one.features.numpy()], 1)
        means = total[rows] / one.size[rows, None]
        pitch = np.full(len(rows), pitch_of(section))
        size = one.size[rows].astype(float)
        parts.append((one.counts[rows], np.full(len(rows), n), size, section.centers[rows], means[:, :-1], pitch, rows))
    counts, *rest = zip(*parts, strict=True)
    return Spots._make([sp.csr_matrix(sp.vstack(counts)), *(np.concatenate(part) for part in rest)])


def fit_odds(counts: sp.csr_matrix, activity: Array, loadings: Array) -> Array:
    """Log-odds u [G] by maximum likelihood on `ODDS` (parabola through the best three) when the means are activity [n, h] @ loadings [h, G]."""
    x = sp.coo_matrix(counts)
    gene, count = x.col, x.data
    mean = np.maximum(np.concatenate([(activity[i] * loadings[:, j].T).sum(1) for i, j in _chunks(x.row, x.col)] or [np.zeros(0)]), 1e-12)
    total = activity.sum(0) @ loadings
    score = np.empty((len(ODDS), loadings.shape[1]))
    rises, several = np.ones(loadings.shape[1], bool), np.bincount(gene, minlength=loadings.shape[1]) > 1
    for k, u in enumerate(ODDS):
        if u > RARE:
            rises = several & (score[k - 1] > score[k - 2])
            keep = rises[gene]
            gene, count, mean = gene[keep], count[keep], mean[keep]
        r = mean * np.exp(-u)
        at = gammaln(count + r) - gammaln(r) - count * np.logaddexp(0.0, -u)
        value = np.bincount(gene, at, loadings.shape[1]) - total * np.exp(-u) * np.logaddexp(0.0, u)
        score[k] = np.where(rises, value, score[k - 1] - 1)
    best = np.clip(score.argmax(0), 1, len(ODDS) - 2)
    genes = np.arange(len(best))
    left, middle, right = (score[best + d, genes] for d in (-1, 0, 1))
    bend = np.minimum(left - 2 * middle + right, -1e-9)
    return np.asarray(ODDS[best] + np.clip(0.5 * (left - right) / bend, -1, 1) * (ODDS[1] - ODDS[0]))


def _chunks(row: NDArray[np.int32], col: NDArray[np.int32], size: int = 200_000) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    return [(row[k : k + size], col[k : k + size]) for k in range(0, len(row), size)]


def without_failed(spots: Spots, say: Callable[[str], None]) -> Spots:
    """The spots whose depth is at least `FAILED` of their section's median; all where more than `MOST_FAILED` of them would go."""
    depth = np.asarray(spots.counts.sum(1), np.float64).ravel()
    typical = np.empty_like(depth)
    for n in np.unique(spots.section):
        typical[spots.section == n] = np.median(depth[spots.section == n])
    keep = np.flatnonzero(depth >= FAILED * typical)
    if len(keep) < (1 - MOST_FAILED) * len(depth):
        return spots
    if len(keep) < len(depth):
        say(f"{len(depth) - len(keep)} of {len(depth)} spots with less than {FAILED:.0%} of their section's median counts are left out of the start")
    return Spots._make(part[keep] for part in spots)


def measured(data: Data, tissues: Sequence[Tissue]) -> list[Tissue]:
    """The tissues without the labels of spots that failed: what the start has left out teaches the steps nothing."""
    spots, found = gather(data, tissues), []
    kept = without_failed(spots, lambda line: None)
    for n, one in enumerate(tissues):
        failed = np.setdiff1d(spots.row[spots.section == n], kept.row[kept.section == n]) + 1
        kept_label = one.label.masked_fill(torch.isin(one.label, torch.from_numpy(failed)), 0) if len(failed) else one.label
        found.append(one._replace(label=kept_label))
    return found


def _inverse_softplus(x: Array | float) -> Array:
    return np.asarray(x + np.log(-np.expm1(-np.asarray(x))))


def _write(to: Tensor, value: Array | float) -> None:
    with torch.no_grad():
        to.copy_(torch.as_tensor(np.asarray(value), dtype=to.dtype).expand_as(to))


def constant_start(pair: Pair, spots: Spots, tissues: Sequence[Tissue], rng: np.random.Generator) -> None:
    """Step 1, and an image of the mean color."""
    model, guide = sides(pair)
    relative = spots.size / spots.size.mean()
    total = np.asarray(spots.counts.sum(0), np.float64).ravel()
    mean = (total + 0.5) / relative.sum()
    odds = fit_odds(spots.counts, relative[:, None], mean[None])
    _write(model.odds, odds)
    _write(model.log_rate, np.log(mean))
    with torch.no_grad():
        model.bias.zero_()
        model.bias[0] = float(_inverse_softplus(1 / spots.size.mean() / model.spec.unit))
    color, sd = color_of([one for one in tissues if one.counts.shape[0]])
    _write(model.image_start[:, 0], np.arctanh(np.clip(color, -0.99, 0.99)))
    _write(model.image_start[:, 1], _inverse_softplus(np.maximum(sd, 1e-2)))
    if model.config.metagenes > 1:  # equal profiles would stay equal
        _write(guide.metagenes_loc, 0.01 * rng.standard_normal(tuple(guide.metagenes_loc.shape)))


def data_start(
    pair: Pair, spots: Spots, tissues: Sequence[Tissue], kernel: Kernel, rng: np.random.Generator, say: Callable[[str], None]
) -> None:
    """Steps 3 to 5."""
    model, guide = sides(pair)
    whole, used = spots, MOST_SPOTS / len(spots.section)
    if used < 1:
        own = (np.flatnonzero(spots.section == n) for n in np.unique(spots.section))
        keep = np.concatenate([np.sort(rng.permutation(rows)[: math.ceil(used * len(rows))]) for rows in own])
        spots = Spots._make(part[keep] for part in spots)
    stands_for = (np.bincount(whole.section) / np.maximum(np.bincount(spots.section), 1))[spots.section]  # spots of its section
    _, depth, mean = _depth(spots)
    left, values, right = _components(residual := residuals(spots), COMPONENTS)
    basis_space, basis_image = rotate(model, spots, *basis(model, spots, tissues))
    smoother = Smoother(basis_space, basis_image)
    columns = np.column_stack([np.sqrt(depth), left * values])
    center = _by_section(columns, spots.section)
    regressed = smoother(columns - center)
    smooth = regressed.fitted + center
    root = np.maximum(smooth[:, 0], LEAST_ROOT * center[:, 0])
    smooth_depth = root**2 + regressed.noise[0]

    def rates(scores: Array) -> Array:
        rate = smooth_depth[:, None] * mean
        return np.asarray(np.maximum(rate + (scores @ right) * np.sqrt(rate + rate**2 / THETA), np.minimum(0.05 * rate, LEAST_READS)))

    m = int(model.active.sum())
    rate = rates(smooth[:, 1:])
    w, h = nmf(rate, m, rng)
    logits = logits_of(w)
    level = _by_section(smooth_depth[:, None], spots.section)[:, 0]
    relative = _inverse_softplus(smooth_depth / level / UNIT)
    middle = np.append(relative.mean(), logits.mean(0))
    found = smoother(np.column_stack([relative, logits]) - middle)
    # What is smooth says nothing of noise: that of depth is known from its root, that of the shares from those of scores that are not smoothed.
    noise_of_log = 4 * regressed.noise[0] / root**2
    x = smooth_depth / level / UNIT
    rough = smoother((raw := logits_of(project(rates(columns[:, 1:]), w, h))) - raw.mean(0))
    found.noise[:] = np.append((noise_of_log * (x / -np.expm1(-x)) ** 2).mean(), rough.noise)
    found.parts[:, 1:] = rough.parts
    for k, (name, function) in enumerate((("image_weights", basis_image), ("space", basis_space))):
        # prior variance of one weight: the part's, spread over functions that give the Gram matrix its trace
        variance = found.parts[1 - k] * len(function) / (function**2).sum()
        if m == 1:  # its logits say nothing; those that it will be split into need room
            variance[1:] = (kernel.image, kernel.space)[k] * len(function) / (function**2).sum()
        sd = np.sqrt(np.maximum(variance, 1e-8))  # [1 + m]
        trace = len(function) / (function**2).sum()
        location = trace * (function.T @ found.dual[1 - k]) / sd  # a weight is its posterior mean over its prior sd
        precision = 1 + (stands_for @ function**2)[:, None] * sd**2 / np.maximum(found.noise, 1e-6)
        _write(getattr(guide, f"{name}_loc")[:, : 1 + m], location)
        _write(getattr(guide, f"{name}_log_sd")[:, : 1 + m], -0.5 * np.log(precision))
        _write(model.amplitude[k, : 1 + m], np.log(sd))
        if m == 1:
            _write(getattr(guide, f"{name}_loc")[:, 1:], 0.0)
            _write(getattr(guide, f"{name}_log_sd")[:, 1:], -1.0)
    fitted = found.fitted + middle
    with torch.no_grad():
        model.bias[: 1 + m] = torch.from_numpy(middle).float()
    expected = level * UNIT * np.logaddexp(0.0, fitted[:, 0])  # depth without effects of locations
    size = spots.size / spots.size.mean()
    every = np.array([float((np.log(level / size))[spots.section == n].mean()) if (spots.section == n).any() else 0.0
                      for n in range(len(model.spec.sections))])  # fmt: skip
    seen = np.unique(spots.section)
    typical = every[seen].mean()
    _write(guide.depth_loc, np.where(np.isin(np.arange(len(every)), seen), every - typical, 0.0))
    profile = np.log(mean / mean.sum())
    loading = np.log(h + np.minimum(0.02 * np.exp(profile), LEAST_READS / np.maximum(w.sum(0), 1.0)[:, None])) - profile
    _write(guide.metagenes_loc[:m], loading)
    _write(guide.metagenes_log_sd, np.log(0.1))
    # odds given the rates, then the baseline so that mean = shape x odds
    activity = np.exp(fitted[:, 1:])
    # with location effects the depth is the observed one: what they explain is not to be explained by the odds once more
    activity *= ((depth if model.config.nugget else expected) / activity.sum(1))[:, None]
    profiles = np.exp(loading + profile)
    predicted = activity @ profiles
    correction = (np.asarray(spots.counts.sum(0)).ravel() + 0.5) / np.maximum(predicted.sum(0), 1e-8)
    odds = fit_odds(spots.counts, activity, profiles * correction)
    _write(model.odds, odds)
    _write(model.log_rate, profile + np.log(correction) + typical)
    if model.config.nugget:
        left_over = residual - smooth[:, 1:] @ right * np.sqrt(depth / smooth_depth)[:, None]  # residuals are relative to the observed depth
        of_shares = 0.0
        if model.config.metagenes > 1:
            w_h = (w, h) if m > 1 else nmf(rate, model.config.metagenes, rng)  # one has no shares: those of what it will be split into
            of_shares = min(max(_variance_of_shares(left_over, mean, smooth_depth, *w_h), 0.0), MOST_EFFECT**2)
        _write(model.log_nugget[1:], np.log(max(math.sqrt(of_shares), LEAST_NUGGET)))
        # The root of a depth varies by (1 + odds) / 4 as its law has it, and by what effects on the metagenes add up to.
        of_law, of_metagenes = float(1 + mean @ np.exp(odds)) / 4, of_shares * (np.square(activity).sum(1) / activity.sum(1)).mean() / 4
        of_scale = 4 * max(regressed.noise[0] - of_law - of_metagenes, 0.0) / np.exp(typical)
        _write(model.log_nugget[0], np.log(max(math.sqrt(of_scale), LEAST_NUGGET)))
        levels = np.bincount(spots.section, level) / np.maximum(np.bincount(spots.section), 1)
        _location_effects(model, guide, whole, levels, typical, 4 * of_law)
    _section_effects(model, guide, spots, activity, profiles * correction)
    say(
        f"start: length {kernel.length_space:.2g} pitches in space and {kernel.length_image:.2g} in image features; variance {kernel.space:.2g} "
        f"space, {kernel.image:.2g} image, {kernel.noise:.2g} noise; {m} metagenes"
    )


def _variance_of_shares(residual: Array, mean: Array, depth: Array, w: Array, h: Array) -> float:
    """Variance e^2 of the logs of metagene activities w [n, m] from location to location, from what smooth scores leave of the residuals [n, G].

    An effect o of metagene m changes them by o w_m c_m / sqrt(depth), c_m = (h_m - mean) / sqrt(mean) (and less, as they are, where counts are high),
    in all genes at once: what their sums along the c_m vary more than single genes with the same variances would, those of the effects included.
    """
    shrunk = 1 / np.sqrt(1 + mean * depth.mean() / THETA)
    contrast, total = (h - mean) / np.sqrt(mean) * shrunk, np.sqrt(mean) * shrunk  # the depth is given: residuals do not vary along the latter
    alone = np.einsum("ng,ng->g", residual, residual) / len(residual) / np.maximum(1 - mean, 1e-3)
    own, along = np.square(contrast), ((residual @ contrast.T) ** 2).mean(0)
    of_one = ((contrast @ contrast.T) ** 2 - own @ own.T) @ (w**2 / depth[:, None]).mean(0)  # of effects with variance 1
    return float((along - own @ alone + (contrast @ total) ** 2).sum() / max(of_one.sum(), 1e-12))


def _location_effects(model: Model, guide: Guide, spots: Spots, level: Array, typical: float, noise: float) -> None:
    """What the closed-form fields leave of every spot's depth as its effect on the scale, shrunk by the ``noise`` of a count over its mean and by the
    effects on the metagenes; level [sections], and the log of what is 1 in the scale's unit."""
    _write(guide.location_log_sd, np.log(SURE))
    # Under q as under the prior the effects on metagenes have mean 1: else rates rise to make up for it, and are too high where no spot was.
    with torch.no_grad():
        guide.location_loc[:, 1:] = 0.5 * (1 - SURE**2) * model.log_nugget[1:].exp()
    _, depth, _ = _depth(spots)
    drawn = {"image_weights": guide.image_weights_loc, "space": guide.space_loc, "depth": torch.zeros(len(model.spec.sections))}
    first, of_shares = np.cumsum([0, *model.spec.rows]), float((2 * model.log_nugget[-1]).detach().exp())
    for n in np.unique(spots.section).tolist():
        mine = np.flatnonzero(spots.section == n)
        for rows in np.split(mine, range(BLOCK, len(mine), BLOCK)):
            features, where = (torch.from_numpy(part[rows]).float() for part in (spots.features, spots.xy))
            with torch.no_grad():
                field = model.bias + model.fields(drawn, F.pad(features, (0, 1)), where, [(n, 0, len(rows))], model.spec)[:, :-1]
                share = field[:, 1:].masked_fill(~model.active, -torch.inf).softmax(1).square().sum(1).double().numpy()
                expected = level[n] * UNIT * F.softplus(field[:, 0]).double().numpy()
                sd = np.minimum(float(model.log_nugget[0].exp()) * np.exp(typical / 2) / np.sqrt(expected), MOST_EFFECT)
                left_over = np.log(depth[rows] / expected) + 0.5 * sd**2
                effect = (left_over * sd / (sd**2 + noise / expected + of_shares * share)).clip(-MOST_NUGGET, MOST_NUGGET)
                guide.location_loc[torch.from_numpy(first[n] + spots.row[rows]), 0] = torch.from_numpy(effect).float()


def _section_effects(model: Model, guide: Guide, spots: Spots, activity: Array, profiles: Array) -> None:
    """E of the first covariate, observed over predicted totals of each level, shrunk; prior sds of all effects as large as these ask for."""
    if not model.spec.levels:
        return
    codes = np.array(model.spec.codes)[spots.section, 0]
    effect = np.zeros((model.spec.levels[0], model.spec.genes))
    seen = np.unique(codes)
    for level in seen:
        mine = codes == level
        predicted = activity[mine].sum(0) @ profiles
        effect[level] = np.log((np.asarray(spots.counts[mine].sum(0)).ravel() + 10.0) / (predicted + 10.0))
    _write(guide.level_0_loc, effect)
    _write(guide.level_0_log_sd, np.log(0.1))
    size = (effect[seen] ** 2).mean(0)
    for name, sd in model.log_sd.items():
        if name != "metagenes":
            _write(sd, 0.5 * np.log(LEAST_EFFECT**2 + name.startswith("level_") * 0.5 * (size + size.mean())))


def _depth(spots: Spots) -> tuple[sp.csr_matrix, Array, Array]:
    """Counts, depth of each location, share of each gene."""
    depth = np.asarray(spots.counts.sum(1), np.float64).ravel() + 1.0
    total = np.asarray(spots.counts.sum(0), np.float64).ravel() + 0.5
    return spots.counts, depth, total / total.sum()


def residuals(spots: Spots) -> Array:
    """Pearson residuals under depth x share [n, G]."""
    counts, mean = spots.counts.toarray(), np.outer(*_depth(spots)[1:])
    most = np.maximum(RESIDUAL_CLIP, np.sqrt(np.maximum(counts, mean)))
    return np.asarray(np.clip((counts - mean) / np.sqrt(mean + mean**2 / THETA), -most, most))


def _by_section(values: Array, section: NDArray[np.int64]) -> Array:
    """Mean over the section that each row is in."""
    return np.stack([values[section == n].mean(0) for n in section])


def _components(x: Array, number: int) -> tuple[Array, Array, Array]:
    """Leading left vectors [n, k], values [k] and right vectors [k, G], by the smaller of the two Gram matrices."""
    k = min(number, *x.shape)
    left, values, right = np.linalg.svd(x, full_matrices=False)
    return left[:, :k], values[:k], right[:k]


def learn_kernel(spots: Spots, rng: np.random.Generator, most: int = 300) -> Kernel:
    """Step 2 on at most ``most`` spots."""
    spots, scores = _some_scores(spots, rng, most)
    return fit_kernel(np.column_stack([spots.xy / spots.pitch[:, None], 1e3 * spots.section]), spots.features, scores)


def learn_shift(spots: Spots, kernel: Kernel, ties: Sequence[Tie | None], pitches: Array, rng: np.random.Generator, most: int = 300) -> float:
    """What is to be added to the logit of the images' correlation of tied sections for that of their spots, by marginal likelihood given the lengths
    of `learn_kernel`; 0 where no two tied sections have spots. ``pitches`` [sections] in pixels of each."""
    found = {n: tie for n in np.unique(spots.section).tolist() if (tie := ties[n])}
    if not any((spots.section == tie.section).any() for tie in found.values()):
        return 0.0
    spots, scores = _some_scores(spots, rng, most)
    block, place = spots.section.copy(), spots.xy.copy()  # the section that each hangs on, and places in it
    for n, tie in found.items():
        mine = spots.section == n
        block[mine], place[mine] = tie.section, tie.moved(torch.from_numpy(spots.xy[mine])).numpy()
    where = np.column_stack([place / pitches[block][:, None], 1e3 * block])
    apart, same = cdist(where, where, "sqeuclidean"), spots.section[:, None] == spots.section
    space = np.mean([np.exp(-apart / 2 / (kernel.length_space * length) ** 2) for length in LENGTHS], 0)
    image = _root(np.exp(-cdist(spots.features, spots.features, "sqeuclidean") / 2 / kernel.length_image**2))
    evidence = []
    for shift in SHIFTS:
        share = np.array([found[n].shifted(shift).share if n in found else 1.0 for n in spots.section.tolist()])
        smooth = Smoother(_root(np.where(same, 1.0, share[:, None] * share) * space), image)(scores)
        evidence.append(smooth.evidence.sum() - 0.5 * shift**2)
    return float(SHIFTS[np.argmax(evidence)])


def _some_scores(spots: Spots, rng: np.random.Generator, most: int, components: int = 8) -> tuple[Spots, Array]:
    """At most ``most`` spots with normal scores of root depth and components, those of at most `MOST_SPOTS`: residuals are dense."""
    seen = np.sort((order := rng.permutation(len(spots.section)))[:MOST_SPOTS])
    keep, spots = np.isin(seen, order[:most]), Spots._make(part[seen] for part in spots)
    left, values, _ = _components(residuals(spots), components)
    scores = np.column_stack([np.sqrt(_depth(spots)[1]), left * values])
    return Spots._make(part[keep] for part in spots), normal_scores(scores - _by_section(scores, spots.section))[keep]


def _root(gram: Array) -> Array:
    return np.asarray(np.linalg.cholesky(gram + 1e-6 * np.eye(len(gram))))


def rotate(model: Model, spots: Spots, space: Array, image: Array) -> tuple[Array, Array]:
    """Turn the weights to the right singular vectors of the basis at the spots, where their posterior precision is diagonal; the turned basis."""
    turn = np.linalg.svd(image, full_matrices=True)[2].T
    _write(model.turn_image, turn)
    image, space = image @ turn, space.copy()
    offsets = np.cumsum([0, *map(points_of, model.spec.lattices)])
    for n in range(len(model.spec.lattices)):
        heirs = [n, *(k for k, tie in enumerate(model.spec.ties) if tie and tie.section == n)]
        part = np.ix_(np.isin(spots.section, heirs), np.arange(offsets[n], offsets[n + 1]))
        if part[1].size <= TURNED and part[0].size:
            turn = np.linalg.svd(space[part], full_matrices=True)[2].T
            _write(getattr(model, f"turn_{n}"), turn)
            space[part] = space[part] @ turn
    return space, image


def basis(model: Model, spots: Spots, tissues: Sequence[Tissue]) -> tuple[Array, Array]:
    """The model's basis functions at the spots: spatial, at their middles [n, points of all lattices], ties included; of the image, as the model has
    them means over the pixels (functions of the mean features vary more) [n, J]; prior variance 1 each in sum."""
    offsets = np.cumsum([0, *map(points_of, model.spec.lattices)])
    space = np.zeros((len(spots.section), offsets[-1]))
    for n in range(len(tissues)):
        mine, tie = np.flatnonzero(spots.section == n), model.spec.ties[n]
        where = torch.from_numpy(spots.xy[mine]).float()[:, None]  # [s, 1, 2]
        parts = [(n, torch.ones(len(mine)), where)]
        if tie is not None:
            share = tie.share_at(there := tie.moved(where), model.spec.lattices[tie.section])[:, 0]
            parts = [(n, (1 - share.square()).sqrt(), where), (tie.section, share, there)]
        for k, share, there in parts:
            lattices, points = model.spec.lattices[k], points_of(model.spec.lattices[k])
            for first in range(0, points if len(mine) else 0, COLUMNS):
                some = torch.eye(points, min(COLUMNS, points - first)).roll(first, 0)
                values = spatial_field(lattices, some, there)[..., 0]  # [some, s]
                space[mine, offsets[k] + first : offsets[k] + first + len(values)] = (share * values).T.numpy()
    image = np.zeros((len(spots.section), model.config.functions))
    for n, one in enumerate(tissues):
        mine, place = np.flatnonzero(spots.section == n), np.full(len(one.size) + 1, -1)
        place[spots.row[mine] + 1] = mine
        at, features = place[one.label.numpy().ravel()], one.features[:-1].flatten(1)
        pixels = np.flatnonzero(at >= 0)
        for part in np.split(pixels, range(PIXELS, len(pixels), PIXELS)):
            waves = torch.cos(features[:, torch.from_numpy(part)].T @ model.frequency + model.phase).numpy()
            image += sp.csr_matrix((np.ones(len(part)), (at[part], np.arange(len(part)))), (len(image), len(part))) @ waves
        image[mine] /= one.size[spots.row[mine]][:, None]
    return space, image * math.sqrt(2 / model.config.functions)

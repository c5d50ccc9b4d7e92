r"""Sections as tensors, and training patches drawn so that sums over measurements are unbiased estimates of the sums over all sections.

A patch is a square window of side p. Along an axis of length H its first row is y0 = clip(u - p // 2, 0, H - p), u uniform on 0..H-1: uniform, but
for more windows flush with the border, without which the border would hardly ever be seen. A location l with rows low..high is used only when
it lies wholly inside (a cut disc would be biased), which along this axis happens with probability

    pi_y(l) = P(y0 <= low) - P(y0 <= high - p),      pi(l) = pi_y(l) pi_x(l)

so with section n drawn with probability q_n and B patches, its log-likelihood is weighed by 1 / (B q_n pi(l)). The virtual measurement off the
tissue has zero counts: its log-likelihood is linear in its pixels, which are therefore weighed one by one by 1 / pi(pixel) and used wherever
they are seen; one in `THIN` of them is drawn, and weighs as much as `THIN`. Turns by 90 degrees and flips (``augment="dihedral"``) leave the set
of windows as it is.

Image and KL(q(Z) || p(Z)) weigh N / B per patch, N = sum_n N_n the number of patches that cover the sections, N_n = ceil(H_n W_n / p^2), q_n =
N_n / N. Their sums are not unbiased: those of section n are N_n p^2 / (H_n W_n) >= 1 times too large, and pixels near a border count less than
others. ``augment="affine"`` is the published augmentation (rotation, scale, shear, color) of a window cut out `ENLARGED` times as large and cropped
after the turn; it weighs everything by N / B, as published, which is not unbiased either: spots near the border of a section count less.

Features of the image at every pixel (`ppl_st.image_features`) are those of a hand-made regression: color, gradient and local spread smoothed at
several shares of the spot pitch, standardised within each section's tissue, which takes out differences in staining.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from ppl_st.errors import UserError
from ppl_st.image_features import FEATURES, image_features
from ppl_st.inference.svi import epoch_order
from ppl_st.models.xfuse.data import Section
from ppl_st.product import csr_tensor

__all__ = ["Augment", "Batch", "Batches", "Group", "Tissue", "aggregate", "color_of", "pitch_of", "tissue"]

Augment = Literal["none", "dihedral", "affine"]
OUTSIDE = 0.5  # pixels: smoothing of the edge of the tissue
COARSE = 2  # pixels per side of a block in which features and positions are averaged
ENLARGED = 1.65  # side of what is turned over that of a patch: sqrt(2) x 1.09 (shear by 10 degrees) / .95 (scale) and a little
ROWS = 64  # of an image, of which the mean color is found
THIN = 8  # of so many pixels of the virtual measurement one is used in a step


class Tissue(NamedTuple):
    """One section as tensors: per pixel 3 bytes of the image, 4 (F + 1) of features and 8 of labels (and 4 S of spots)."""

    image: Tensor  # [3, H, W] uint8: floats are made patch by patch, see `scaled`
    ends: Tensor  # [3, 2] smallest and largest value of each channel
    features: Tensor  # [F + 1, H, W]; the last one is 1 off tissue and spots, else 0 (everywhere where the background was no measurement)
    label: Tensor  # [H, W] int64
    counts: sp.csr_matrix
    virtual: int  # row; -1: none
    size: NDArray[np.int64]  # [rows] pixels of each location
    low: NDArray[np.int64]  # [rows, 2] first y and x of each location
    high: NDArray[np.int64]  # [rows, 2] last y and x
    spots: Tensor  # [S, H, W] what the recognition network sees of the counts: scores where there are spots, and whether there are

    def scaled(self, part: Tensor) -> Tensor:
        """A part of the image [3, h, w] as floats, each channel scaled to [-.9, .9] over the section."""
        first, last = self.ends[:, :, None, None].unbind(1)
        return 0.9 * (2 * (part.float() - first) / (last - first).clamp_min(1.0) - 1)


class Group(NamedTuple):
    """Locations of one section in a batch."""

    section: int
    start: int  # first of its rows among the batch's locations
    stop: int
    counts: Tensor  # CSR [stop - start, G]


class Blocks(NamedTuple):
    """k blocks of COARSE x COARSE pixels, for what varies slowly, and n pixels between them."""

    features: Tensor  # [k, F + 1] means over the block
    where: Tensor  # [k, 2] x and y of its middle in pixels of its section
    parts: tuple[tuple[int, int, int], ...]  # section, first and last (exclusive) of its blocks
    corner: Tensor  # [n, 4] int64: the blocks around each pixel
    share: Tensor  # [n, 4] of each, bilinear


class Batch(NamedTuple):
    """Tensors of one minibatch of B patches of p x p pixels, of which n are in locations; these lie in or beside k blocks."""

    image: Tensor  # [B, 3, p, p]
    spots: Tensor  # [B, S, p, p]
    pixels: Tensor  # [n] int64: which of the B p p
    location: Tensor  # [n] int64: row among the batch's locations
    pixel_weight: Tensor  # [n]
    blocks: Blocks
    weight: Tensor  # [locations] of their log-likelihoods
    rows: Tensor  # [locations] row in its section; -1: the virtual one
    groups: tuple[Group, ...]
    patches: int  # that cover all sections


def aggregate(values: Tensor, location: Tensor, number: int) -> Tensor:
    """Sums over the pixels of each location: values [n, M], location [n] int64 -> [number, M]; ids from ``number`` on are dropped."""
    kept = (location < number).nonzero().squeeze(1)
    out = values.new_zeros(number, values.shape[1])
    return out.index_add(0, location[kept], values[kept])


def pitch_of(section: Section) -> float:
    """Distance between neighboring spots of the slide; of a section that does not say, the median distance from a spot to the nearest other."""
    if np.isfinite(section.pitch):
        return section.pitch
    xy = section.centers[np.isfinite(section.centers).all(1)]
    if len(xy) < 2:
        return 4 * section.radius
    distance = np.asarray(cKDTree(xy).query(xy, 2)[0])
    return float(np.median(distance[:, 1]))


def tissue(section: Section, scores: NDArray[np.float32] | None = None, fields: bool = True, background: bool = True) -> Tissue:
    """A section as tensors; ``scores`` [rows, S - 1] of the spots of the fit are painted into the channels that the recognition network sees.

    Without ``fields`` no features are kept (F = 0). Without ``background`` (`Input`) nothing is known of the area off the tissue.
    """
    rows, fit = section.counts.shape[0], section.shown or section
    # int64 throughout: a float32 cannot tell ids beyond 2^24 apart
    label = section.label
    size = np.bincount(label.ravel(), minlength=rows + 1)[1:]
    low, high = np.zeros((rows, 2), np.int64), np.full((rows, 2), -1, np.int64)
    for row, box in enumerate(find_objects(label, max_label=rows)):
        if box is not None:
            low[row], high[row] = [b.start for b in box], [b.stop - 1 for b in box]
    ends = np.stack([section.image.min((0, 1)), section.image.max((0, 1))], 1).astype(np.float32)
    features = np.empty((FEATURES * fields + 1, *label.shape), np.float32)
    if fields:
        image_features(section.image, section.mask, pitch_of(fit), features[:-1])
    features[-1] = gaussian_filter(_beyond(fit), OUTSIDE) if background else 0.0
    painted = np.zeros((0, *label.shape), np.float32)
    if scores is not None:
        there = (fit.label > 0) & (fit.label != fit.virtual + 1)
        table = np.vstack([np.zeros((1, scores.shape[1]), np.float32), scores])
        painted = np.concatenate([np.moveaxis(table[fit.label] * there[..., None], 2, 0), there[None].astype(np.float32)])
    return Tissue(
        torch.from_numpy(np.ascontiguousarray(np.moveaxis(section.image, 2, 0))), torch.from_numpy(ends), torch.from_numpy(features),
        torch.from_numpy(label), section.counts, section.virtual, size, low, high, torch.from_numpy(painted),
    )  # fmt: skip


def color_of(tissues: Sequence[Tissue]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sd of each channel, scaled, over all pixels [3]; `ROWS` rows are floats at a time."""
    number, total, square = 0, np.zeros(3), np.zeros(3)
    for one in tissues:
        for rows in one.image.split(ROWS, 1):
            values = one.scaled(rows).double().flatten(1).numpy()
            number, total, square = number + values.shape[1], total + values.sum(1), square + (values**2).sum(1)
    mean = total / number
    return mean, np.sqrt(np.maximum(square / number - mean**2, 0.0))


def _beyond(section: Section) -> NDArray[np.float32]:
    """1 farther than a spot's radius from tissue and spots: the area of the virtual measurement where there is one; 0 elsewhere [H, W]."""
    spots = (section.label > 0) & (section.label != section.virtual + 1)
    return (distance_transform_edt(~(section.mask | spots)) > section.radius).astype(np.float32)


def starts(length: int, side: int) -> NDArray[np.float64]:
    """Distribution of a window's first row, on 0..length - side."""
    first = np.clip(np.arange(length) - side // 2, 0, length - side)
    return np.bincount(first, minlength=length - side + 1) / length


def inclusion(length: int, side: int, low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probability that rows low..high lie wholly in a window."""
    cdf = np.append(0.0, np.cumsum(starts(length, side)))  # cdf[k + 1] = P(y0 <= k)
    at = np.minimum(low, length - side) + 1
    before = np.clip(high - side + 1, 0, length - side + 1)
    return np.maximum(cdf[at] - cdf[before], 0.0)


class Batches:
    """Minibatches of patches, a pure function of the step.

    Parameters
    ----------
    tissues
        Sections with counts take part; others are for prediction.
    side
        Of a patch; at most the shortest side of a section.
    size
        Patches per batch.
    augment
        See the module.
    hide
        Probability that the recognition network does not see the spots of a patch.
    """

    def __init__(
        self, tissues: Sequence[Tissue], side: int, size: int, augment: Augment, seed: int, hide: float = 0.5
    ) -> None:
        self.tissues, self.size, self.augment, self.seed, self.hide = tissues, size, augment, seed, hide
        used = [n for n, one in enumerate(tissues) if one.counts.shape[0]]
        self.side = min([side, *(min(tissues[n].label.shape) for n in used)])
        area = self.side**2
        self.section = [n for n in used for _ in range(math.ceil(tissues[n].label.numel() / area))]  # of each patch
        share = {n: self.section.count(n) / len(self.section) for n in used}
        self.weights, self.pixels = {}, {}  # of locations, and of pixels by row and by column
        for n in used:
            one = tissues[n]
            chance = np.ones(len(one.size))
            for axis, length in enumerate(one.label.shape):
                chance *= inclusion(length, self.side, one.low[:, axis], one.high[:, axis])
                every = np.arange(length)
                self.pixels[n, axis] = torch.from_numpy(1 / inclusion(length, self.side, every, every)).float()
            spots = one.size > 0
            if one.virtual >= 0:
                spots[one.virtual] = False
            if (chance[spots] == 0).any():
                largest = int((one.high - one.low + 1)[spots].max())
                raise UserError(
                    f"patch={side}: the largest of the measurements spans {largest} pixels and lies in no patch of side {self.side}; "
                    "raise patch, or lower input.scale"
                )
            with np.errstate(divide="ignore"):
                self.weights[n] = torch.from_numpy(np.where(chance > 0, 1 / chance, 0.0) / (share[n] * size)).float()
            if one.virtual >= 0:
                self.weights[n][one.virtual] = 1 / (share[n] * size)

    def __len__(self) -> int:
        return max(1, math.ceil(len(self.section) / self.size))

    def at(self, step: int) -> Batch:
        """The minibatch of ``step``."""
        rng = np.random.default_rng([self.seed, 11, step])
        # Every batch has the same size: the last cut of an epoch is filled up from the following one.
        drawn = [int(epoch_order(len(self.section), 1, self.seed, step * self.size + k)[0]) for k in range(self.size)]
        sections = [self.section[i] for i in drawn]
        corners = []
        for n in sections:
            corners.append([int(rng.choice(length - self.side + 1, p=starts(length, self.side))) for length in self.tissues[n].label.shape])
        return self.of(sections, corners, rng)

    def of(self, sections: Sequence[int], corners: Sequence[Sequence[int]], rng: np.random.Generator) -> Batch:
        """The minibatch of windows with these first rows and columns in these sections; ``rng`` turns and hides."""
        order = np.argsort(sections, kind="stable")
        parts: list[tuple[Tensor, ...]] = []
        groups, weights, numbers, location, pixel_weight = [], [], [], [], []
        total = 0
        ordered = [int(sections[i]) for i in order]
        for section in sorted(set(ordered)):
            one = self.tissues[section]
            mine = [i for i in order if sections[i] == section]
            rows, labels = [], []
            for i in mine:
                crop, label, used, weight = self._patch(section, corners[i], rng)
                parts.append(crop)
                rows.append(used)
                labels.append((label, weight))
            for label, used, (_, weight) in zip((pair[0] for pair in labels), rows, labels, strict=True):
                slot = torch.full((len(one.size) + 1,), -1, dtype=torch.int64)
                slot[torch.from_numpy(used) + 1] = torch.arange(total, total + len(used))
                location.append(slot[label.reshape(-1)])
                pixel_weight.append(weight.reshape(-1))
                total += len(used)
            everything = np.concatenate(rows)
            if len(everything):
                counts = csr_tensor(one.counts[everything])
                groups.append(Group(section, total - len(everything), total, counts))
                weights.append(self.weights[section][torch.from_numpy(everything)])
                numbers.append(torch.from_numpy(np.where(everything == one.virtual, -1, everything)))
        flat, every = torch.cat(location), torch.cat(pixel_weight)
        image, features, where, spots = (torch.stack(columns) for columns in zip(*parts, strict=True))
        weight = torch.cat(weights) if weights else torch.zeros(0)
        number = torch.cat(numbers) if numbers else torch.zeros(0, dtype=torch.int64)
        if self.augment == "affine":
            weight = torch.full_like(weight, len(self.section) / len(sections))
        pixels = ((flat >= 0) & (every > 0)).nonzero().squeeze(1)
        blocks = blocks_around(pixels, self.side, features, where, ordered)
        return Batch(image, spots, pixels, flat[pixels], every[pixels], blocks, weight, number, tuple(groups), len(self.section))

    def _patch(
        self, section: int, corner: Sequence[int], rng: np.random.Generator
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, NDArray[np.int64], Tensor]:
        """(image, features, where, spots), labels [p, p], rows used, pixel weights [p, p]."""
        one, side = self.tissues[section], self.side
        y, x = (slice(start, start + side) for start in corner)
        rows, columns = torch.arange(y.start, y.stop) + 0.5, torch.arange(x.start, x.stop) + 0.5
        where = torch.stack([columns.expand(side, side), rows[:, None].expand(side, side)])  # [2, p, p]
        label, weight = one.label[y, x], torch.ones(side, side)
        planes = torch.cat([one.scaled(one.image[:, y, x]), one.features[:, y, x], one.spots[:, y, x], where])
        if one.virtual >= 0 and self.augment != "affine":
            weight = torch.where(label == one.virtual + 1, self.pixels[section, 0][y][:, None] * self.pixels[section, 1][x], 1.0)
        if self.augment == "dihedral":
            quarter, flip = int(rng.integers(4)), bool(rng.integers(2))
            planes, label, weight = (_turned(t, quarter, flip) for t in (planes, label, weight))
        elif self.augment == "affine":
            extra = math.ceil(side * (ENLARGED - 1) / 2)
            image = _around(one.image, corner, side, extra, one.scaled)
            wide = [_around(plane, corner, side, extra) for plane in (one.features, one.spots)]
            planes = torch.cat([image, *wide, F.pad(where, (extra, extra, extra, extra))])  # positions are of no use without fields
            planes, label = _published_augmentation(planes, _around(one.label, corner, side, extra), side, rng)
        if one.virtual >= 0:
            drawn = torch.from_numpy(rng.random((side, side)) < 1 / THIN)
            weight = torch.where(label == one.virtual + 1, THIN * drawn * weight, weight)
        seen, number = np.unique(label.numpy(), return_counts=True)
        number, seen = number[seen > 0], seen[seen > 0] - 1
        whole = number == one.size[seen]
        if self.augment == "affine":
            border = np.unique(torch.cat([label[0], label[-1], label[:, 0], label[:, -1]]).numpy()) - 1
            whole = ~np.isin(seen, border)
        image, features, spots, where = planes.split([3, len(one.features), len(one.spots), 2])
        if len(spots) and rng.random() < self.hide:
            spots = torch.zeros_like(spots)
        features, where = coarse(features), coarse(where)
        return (image, features, where.permute(1, 2, 0), spots), label, seen[whole | (seen == one.virtual)], weight


def blocks_around(pixels: Tensor, side: int, features: Tensor, where: Tensor, sections: Sequence[int]) -> Blocks:
    """The blocks around ``pixels`` [n] of patches with blocks' features [B, F + 1, P, P] and positions [B, P, P, 2]."""
    patch, number = pixels // side**2, features.shape[-1]
    low, share = [], []
    for at in (pixels % side**2 // side, pixels % side):
        middle = ((at + 0.5) / COARSE - 0.5).clamp_min(0)
        low.append(middle.long())
        share.append(middle - low[-1])
    corner, weight = [], []
    for down in (0, 1):
        for right in (0, 1):
            y, x = (low[0] + down).clamp_max(number - 1), (low[1] + right).clamp_max(number - 1)
            corner.append((patch * number + y) * number + x)
            weight.append((share[0] if down else 1 - share[0]) * (share[1] if right else 1 - share[1]))
    used, index = torch.stack(corner, 1).unique(return_inverse=True)
    stop = np.searchsorted(used.numpy(), number**2 * np.arange(len(features) + 1))
    parts = tuple((section, int(stop[b]), int(stop[b + 1])) for b, section in enumerate(sections) if stop[b + 1] > stop[b])
    flat = features.permute(0, 2, 3, 1).flatten(0, 2)
    return Blocks(flat[used], where.flatten(0, 2)[used], parts, index, torch.stack(weight, 1))


def coarse(planes: Tensor) -> Tensor:
    """Means over blocks of `COARSE` x `COARSE` pixels: [c, H, W] -> [c, ceil(H / COARSE), ceil(W / COARSE)]."""
    return F.avg_pool2d(planes[None], COARSE, ceil_mode=True, count_include_pad=False)[0]


def _turned(x: Tensor, quarter: int, flip: bool) -> Tensor:
    x = torch.rot90(x, quarter, (-2, -1))
    return x.flip(-1) if flip else x


def _around(x: Tensor, corner: Sequence[int], side: int, extra: int, scaled: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The window [..., side + 2 extra, side + 2 extra] with ``extra`` pixels on each side of a patch, ``scaled``; 0 beyond the section."""
    (top, left), (height, width), wide = (start - extra for start in corner), x.shape[-2:], side + 2 * extra
    inside = x[..., max(top, 0) : top + wide, max(left, 0) : left + wide]
    inside = inside if scaled is None else scaled(inside)
    return F.pad(inside, (max(-left, 0), max(left + wide - width, 0), max(-top, 0), max(top + wide - height, 0)))


def _published_augmentation(planes: Tensor, label: Tensor, side: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Rotation, scale, shear of planes [c, P, P] (bilinear) and labels (nearest), cropped to the middle [side, side]; color jitter of the first
    three planes."""
    whole = label.shape[0]
    turn, shear = rng.uniform(0, 2 * math.pi), math.tan(math.radians(rng.uniform(0, 10)))
    zoom = rng.uniform(0.95, 1.05)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = torch.from_numpy(rotation @ np.array([[1.0, shear], [0.0, 1.0]]) / zoom).float()
    middle = (whole - 1) / 2
    offset = torch.arange(side) - (side - 1) / 2
    grid = torch.stack([offset.expand(side, side), offset[:, None].expand(side, side)], -1) @ matrix.T  # [p, p, 2] x, y
    nearest = (grid + middle).round().long()
    inside = ((nearest >= 0) & (nearest < whole)).all(-1)
    nearest = nearest.clamp(0, whole - 1)
    warped = torch.where(inside, label[nearest[..., 1], nearest[..., 0]], 0)
    planes = F.grid_sample(planes[None], grid[None] * 2 / whole, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    image = planes[:3]
    brightness, contrast, saturation = 1 + rng.uniform(-0.05, 0.05, 3)
    image = (image + 1) * brightness - 1
    image = (image - image.mean()) * contrast + image.mean()
    grey = image.mean(0, keepdim=True)
    image = (image - grey) * saturation + grey
    hue = 2 * math.pi * rng.uniform(-0.05, 0.05)  # rotation about the grey axis
    cos, sin = math.cos(hue), math.sin(hue) / math.sqrt(3)
    wheel = torch.full((3, 3), (1 - cos) / 3) + cos * torch.eye(3) + sin * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    image = torch.einsum("cd,dhw->chw", wheel, image).clamp(-1, 1)
    return torch.cat([image, planes[3:]]), warped

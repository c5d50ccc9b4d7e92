r"""Serial sections: slices cut one after the other from a block of tissue look alike, and what is known of one says much of the next.

A section k whose image agrees with that of an earlier section r, itself not tied, is tied to it. Its spatial field is

    field_k(xy) = rho f_r(A xy + t) + sqrt(1 - rho^2) f_k(xy),    A a rotation, mirrored or not

with f_r, f_k independent Gaussian fields of unit variance, so that rho is the correlation of the two sections at one place of the tissue.
Everything here comes from the images, so a section without counts can be tied as well. Where both sections have spots these say how much of the
images' correlation holds for them (`warm_start.learn_shift`), and then also for new sections.

1. Overlay: tissue masks and smoothed image features on a lattice of `PER_PITCH` points per spot pitch. For every angle the best shift is the largest
   of all cross-correlations (Fourier transform); the best angle and shift are then refined.
2. Correlation: the features of both sections at points one pitch apart and a pitch from the border (nearer to it they show the glass, whatever the
   tissue), as Gaussian processes with the covariance of the model's fields (shortest length 1 pitch) in the common frame, times rho between the
   sections, plus noise. rho is its posterior mean given all features together, 0 where that gains less than `GAIN`. Sections are tied if rho is at
   least `LEAST` and twice as near to 1 as where the images are laid over each other otherwise (mirrored, turned) as well as can be: unrelated images
   have 0 to .6 both ways, serial ones .85 against .2 and .4.

Sections hang on sections that hang on none. They are taken at one scale: pitches of both have the same length in the tissue. Not found are sections
of tissue that is its own mirror image, as of a whole brain, and such as show less than half of what the other does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import affine_transform, binary_erosion, map_coordinates, uniform_filter
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from torch import Tensor

from ppl_st.models.xfuse.closed import NOISE_SHARES
from ppl_st.models.xfuse.data import Section
from ppl_st.models.xfuse.patches import Tissue, pitch_of
from ppl_st.models.xfuse.space import LENGTHS, Lattice, Tie, lattices_over

__all__ = ["PLANES", "Planes", "corners", "lattices_of", "planes_of", "tie_of", "tied"]

PER_PITCH = 4.0  # points of the lattice per spot pitch
SIDE = 64  # points of the longer side of the lattice on which all angles are tried, about
ANGLES = np.deg2rad(np.arange(0, 360, 6))
SMOOTH = slice(5, 15)  # the features smoothed over a third of a pitch and a pitch
PLANES = 11  # the mask and these
COMPARED = slice(1, 6)  # of the planes: those smoothed over a third, of which the correlation is found
FEATURE = 0.1  # weight of a feature's square in an overlay, that of the mask is 1
PROMISING = 0.6  # cosine of two overlaid sections; below, no correlation is looked for
RHO = np.array([0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96])
GAIN = 10.0  # nats of log marginal likelihood over rho = 0, below which a correlation is not believed: there is little tissue
LEAST = 0.7
NEARER = 0.5  # of what the correlation elsewhere lacks to 1, at most: a small or smooth tissue can be laid over any other fairly well
APART = np.deg2rad(40)
POINTS = 600  # at which features are compared, at most
Array = NDArray[np.float64]


class Planes(NamedTuple):
    """Tissue mask and smoothed features (0 off the tissue) [1 + 10, h, w] of a section on a lattice, ``step`` pixels apart, from its first pixel."""

    values: NDArray[np.float32]
    step: float


def tied(sections: Sequence[Section], tissues: Sequence[Tissue], say: Callable[[str], None]) -> tuple[dict[int, Planes], list[Tie | None]]:
    """What sections can be tied to, by their numbers, and the tie of every section."""
    free: dict[int, Planes] = {}
    ties: list[Tie | None] = []
    for n, (section, one) in enumerate(zip(sections, tissues, strict=True)):
        planes = planes_of(section, one)
        ties.append(tie := tie_of(planes, free))
        if tie is None:
            free[n] = planes
        else:
            other = sections[tie.section].name
            say(f"{section.name} lies over {other}: their images correlate by {tie.share:.2g}")
    return free, ties


def corners(section: Section) -> Tensor:
    """Positions [4, 2] of the corners of a section."""
    height, width = section.label.shape
    return torch.tensor([[0.0, 0.0], [width, 0.0], [0.0, height], [width, height]])


def lattices_of(n: int, sections: Sequence[Section], ties: Sequence[Tie | None], length: float) -> list[Lattice]:
    """The lattices over a section and what is tied to it; shortest length in pitches."""
    own = [corners(sections[n]), *(tie.moved(corners(sections[k])) for k, tie in enumerate(ties) if tie and tie.section == n)]
    low, high = torch.aminmax(torch.cat(own), dim=0)
    return lattices_over(low.tolist(), high.tolist(), max(length * pitch_of(sections[n]) / np.sqrt(2), 2.0))


def planes_of(section: Section, tissue: Tissue) -> Planes:
    """What is compared of a section."""
    step, mask = pitch_of(section.shown or section) / PER_PITCH, section.mask
    at = np.meshgrid(*(np.arange(0, side - 0.5, step) for side in mask.shape), indexing="ij")
    width = 2 * (round(step) // 2) + 1  # odd: a mean about the middle of a pixel
    values = np.empty((PLANES, *at[0].shape), np.float32)
    for n, plane in enumerate((np.float32(1), *tissue.features.numpy()[SMOOTH])):
        map_coordinates(uniform_filter(np.asarray(plane * mask, np.float32), width), at, values[n], order=1, mode="nearest")
    return Planes(values, step)


def tie_of(one: Planes, others: Mapping[int, Planes]) -> Tie | None:
    """The tie of a section to that of the ``others`` (by their number) with which it correlates most; None: to none."""
    best = None
    for number, other in others.items():
        found = []
        for rough in _search(one, other):
            alike, turn, shift = _refined(one, other, *rough)
            found.append((_correlation(one, other, turn, shift) if alike > PROMISING else 0.0, turn, shift))
            if not found[0][0] >= LEAST:
                break
        (rho, turn, shift), elsewhere = found[0], found[-1][0]
        if rho >= LEAST and 1 - rho <= NEARER * (1 - elsewhere) and (best is None or rho > best.share):
            matrix = turn[::-1, ::-1] * other.step / one.step  # rows and columns to x and y, lattices to pixels, whose middles are at .5
            moved = shift[::-1] * other.step + 0.5 - matrix @ (0.5, 0.5)
            best = Tie(number, rho, (*matrix[0].tolist(), float(moved[0]), *matrix[1].tolist(), float(moved[1])))
    return best


def _search(one: Planes, other: Planes) -> list[tuple[float, float, Array]]:
    """Angle, mirror and shift (points of lattices) of the best overlay of `ANGLES`, mirrored or not, with whole shifts; and of the best of another
    mirror or an angle that is `APART`: how well the two can be laid over each other where they do not belong."""
    every = _spacing(one, other)
    b, a = _thinned(one, every), _thinned(other, every)
    side = int(np.ceil(np.hypot(*b.shape[1:]))) + 1
    full = [side + n for n in a.shape[1:]]
    spectrum = np.fft.rfft2(a, full)
    middle, center = (np.array(b.shape[1:]) - 1) / 2, np.full(2, (side - 1) / 2)
    found = []
    for mirror in (1.0, -1.0):
        for angle in ANGLES.tolist():
            turn = _turn(angle, mirror)
            turned = np.stack([affine_transform(plane, turn.T, middle - turn.T @ center, (side, side), order=1) for plane in b])
            product = np.fft.irfft2((spectrum * np.conj(np.fft.rfft2(turned, full))).sum(0), full)
            at = np.array(np.unravel_index(product.argmax(), full))
            shift = np.where(at < a.shape[1:], at, at - full) + center - turn @ middle
            found.append((product.max() / max(float(np.linalg.norm(turned)), 1e-9), angle, mirror, shift * every))
    found.sort(key=lambda overlay: -overlay[0])
    _, angle, mirror, _ = found[0]
    other_one = next(overlay for overlay in found if overlay[2] != mirror or np.cos(overlay[1] - angle) < np.cos(APART))
    return [found[0][1:], other_one[1:]]


def _refined(one: Planes, other: Planes, angle: float, mirror: float, shift: Array) -> tuple[float, Array, Array]:
    """How like ``other`` a section is near an overlay of `_search` (a cosine); matrix and shift that take points of its lattice to the other's."""
    every = max(1, _spacing(one, other) // 2)
    b, a = _thinned(one, every), _thinned(other, every)
    points, mask = np.indices(b.shape[1:]).reshape(2, -1), np.maximum(b[0].ravel(), 1e-9)
    middle = np.average(points, axis=1, weights=mask)  # of the tissue, about which it is turned
    there = _turn(angle, mirror) @ middle + shift / every
    norm, reach = max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-9), max(float(middle.max()), 1.0)
    least = 0.5 * float(np.linalg.norm(a))  # of what is laid over: a corner that fits is no overlay

    def placed(x: Array) -> tuple[Array, Array]:
        turn = _turn(angle + float(x[0]) / reach, mirror)
        return turn, there + x[1:] - turn @ middle

    def product(x: Array) -> tuple[float, float]:
        """Of the planes with what they are laid over, and the norm of that: between points it is smaller, as interpolation blurs."""
        turn, moved = placed(x)
        at = turn @ points + moved[:, None]
        found = [map_coordinates(p, at, order=1) for p in a]
        return float(sum(f @ q.ravel() for f, q in zip(found, b, strict=True))), float(np.sqrt(sum(f @ f for f in found)))

    def loss(x: Array) -> float:
        both, size = product(x)
        return -both / max(size, least, 1e-9) / max(float(np.linalg.norm(b)), 1e-9)

    simplex = np.vstack([np.zeros(3), 2 * np.eye(3)])  # in points of the lattice
    found = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"initial_simplex": simplex, "xatol": 0.05, "fatol": 1e-5})
    turn, moved = placed(found.x)
    return product(found.x)[0] / norm, turn, moved * every


def _spacing(one: Planes, other: Planes) -> int:
    """Of the points of lattices that have about `SIDE` along the longer side."""
    return max(1, round(max(*one.values.shape[1:], *other.values.shape[1:]) / SIDE))


def _thinned(planes: Planes, every: int) -> Array:
    """Every so many points of the planes, weighted."""
    weights = np.append(1.0, np.full(len(planes.values) - 1, np.sqrt(FEATURE)))
    return np.asarray(planes.values[:, ::every, ::every] * weights[:, None, None])


def _turn(angle: float, mirror: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle) * mirror], [np.sin(angle), np.cos(angle) * mirror]])


def _correlation(one: Planes, other: Planes, turn: Array, shift: Array) -> float:
    """rho of step 2."""
    places, columns, section = [], [], []
    rng = np.random.default_rng(0)
    for n, planes in enumerate((other, one)):
        rows, cols = (np.arange(0, side, int(PER_PITCH)) for side in planes.values.shape[1:])
        at = np.stack(np.meshgrid(rows, cols, indexing="ij")).reshape(2, -1)
        at = at[:, binary_erosion(planes.values[0] > 0.5, iterations=round(PER_PITCH), border_value=1)[at[0], at[1]]]
        at = at[:, np.sort(rng.permutation(at.shape[1])[: POINTS // 2])]
        if at.shape[1] < 2:
            return 0.0
        values = planes.values[COMPARED, at[0], at[1]].T.astype(np.float64)
        columns.append((values - values.mean(0)) / np.maximum(values.std(0), 1e-6))
        places.append((at if n == 0 else turn @ at + shift[:, None]).T / PER_PITCH)
        section.append(np.full(at.shape[1], n))
    y, where, own = np.concatenate(columns), np.concatenate(places), np.concatenate(section)
    apart, same, evidence = cdist(where, where, "sqeuclidean"), own[:, None] == own, []
    gram = np.mean([np.exp(-apart / 2 / length**2) for length in LENGTHS], 0)
    for rho in RHO:
        values, vectors = np.linalg.eigh(np.where(same, gram, rho * gram))
        spectrum = (1 - NOISE_SHARES)[:, None] * np.maximum(values, 0.0) + NOISE_SHARES[:, None]  # [shares, n]
        variance = ((vectors.T @ y) ** 2).T @ (1 / spectrum.T) / len(y)  # [features, shares]
        log_p = -0.5 * len(y) * np.log(np.maximum(variance, 1e-12)) - 0.5 * np.log(spectrum).sum(1)
        evidence.append(log_p.max(1).sum())
    weight = np.exp(np.array(evidence) - max(evidence))
    return float(RHO @ weight / weight.sum()) if max(evidence) - evidence[0] >= GAIN else 0.0

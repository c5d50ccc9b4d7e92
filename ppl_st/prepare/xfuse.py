"""XFuse's problem: slides -> sections at the working resolution, with label maps, masks, common genes and covariates.

What can be told from image and positions alone is checked here, because a wrong scale or exchanged axes otherwise end in a fit that runs
and means nothing: spots outside the image, spots off the tissue that another reading of the coordinates would put on it, masks that keep
nothing. Such an error writes a picture of the overlay beside the run and names it.
"""

import re
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.annotations import Regions, regions_from_geojson, regions_from_image, regions_from_spots
from ppl_st.data import Counts, as_text
from ppl_st.errors import UserError
from ppl_st.images import (
    Slide,
    Source,
    image_size,
    label_spots,
    overlay,
    read_image,
    read_labels,
    sizes_alone,
    tissue_mask,
    without_marks,
)
from ppl_st.models.xfuse.data import FEW_SPOTS, Data, Input, Section
from ppl_st.prepare.xfuse_frame import Frame, box_around, check_positions, inside_share, lie_outside, share_on
from ppl_st.spatial import DEFAULT_FRACTION, spot_pitch

__all__ = ["new_cells", "new_image", "problem", "refuse_cut", "section_at", "without"]

INSIDE = 0.9  # share of its disc that a spot must have inside the image
ALIKE = 2.0  # an image whose size or tissue differs by a larger factor from those of the fit may be of another resolution
WHOLE = 0.75  # share of the pixels of its disc that a place must have for itself


def problem(
    slides: Sequence[Slide], config: Input, say: Callable[[str], None], pictures: Path = Path()
) -> tuple[Data, list[Counts]]:
    """The problem of several slides, and the counts of each section's rows (without the virtual one).

    Parameters
    ----------
    slides
        From `ppl_st.slides`.
    config, say
        Settings; receives one line per event.
    pictures
        Folder for the overlay of a section that is refused.
    """
    if not any(slide.counts for slide in slides):
        raise UserError("xfuse: no section has counts; a fit needs at least one target with counts")
    for name in ("mask", "annotation"):
        given = getattr(config, name)
        if len(given) > 1 and len(given) != len(slides):
            raise UserError(f"input.{name} names {len(given)} files for {len(slides)} sections; give one for all, or one each in their order")
    genes = _genes(slides, config, say)
    sections, kept = [], []
    levels = _covariates(slides, config)
    for number, slide in enumerate(slides):
        codes = np.array([_code(slide, key, names) for key, names in levels.items()], np.int64)
        section, counts = _section(slide, number, genes, codes, config, say, pictures)
        sections.append(section)
        kept.append(counts)
    spots = sum(len(counts.names) for counts in kept)
    if spots < FEW_SPOTS:
        say(f"only {spots} spots in all: variances are learned from them alone, and intervals can come out too short")
    return Data(tuple(sections), genes, levels), kept


def section_at(section: Section, xy: NDArray[np.float64], radius: float | None = None, square: bool | None = None) -> Section:
    """The section with other measurements in it: discs (or squares) at ``xy`` [n, 2] and of ``radius``, in coordinates of the file; no counts.

    Raises
    ------
    UserError
        If a disc has its middle outside the section's image: nothing was seen there.
    """
    centers = (xy - np.array(section.origin)) * section.scale
    outside = lie_outside(centers, section.image.shape[:2])
    if outside.any():
        first = xy[outside][0]
        height, width = section.image.shape[:2]
        low, high = np.array(section.origin), np.array(section.origin) + np.array([width, height]) / section.scale
        held = "the spots of the fit and a margin; fit with a larger one (--set input.margin=...)"
        if not (section.shown or section).counts.shape[0]:
            held = "the tissue found in the new image and a margin; leave them out, or if they lie on tissue, give --mask"
        raise UserError(
            f"target: {outside.sum()} of {len(xy)} positions lie outside section {section.name!r}, e.g. ({first[0]:.6g}, {first[1]:.6g}); it spans "
            f"x {low[0]:.6g} to {high[0]:.6g} and y {low[1]:.6g} to {high[1]:.6g} in the coordinates of its file, {held}"
        )
    pixels = section.radius if radius is None else radius * section.scale
    square = section.square if square is None else square
    label = label_spots(section.label.shape, centers, pixels, square=square)
    return section.at(label, centers)._replace(radius=pixels, square=square)


def new_cells(*problem: Any) -> Any:
    """Other places need a section: runs of several seeds together have none in common to give."""
    raise UserError("seeds together predict their own spots; other places are asked of one of them: ppl_st.load('RUN/seed0'), say, and its .at(...)")


def refuse_cut(asked: Section, names: NDArray[np.str_]) -> None:
    """Refuse the places of `section_at` that lost much of their discs to others or to the border: their sums would be too small.

    Raises
    ------
    UserError
        If a place holds less than `WHOLE` of the pixels that it would hold alone.
    """
    held = np.bincount(asked.label.ravel(), minlength=len(names) + 1)[1:]
    alone = sizes_alone(asked.centers, asked.radius, square=asked.square)
    cut = np.flatnonzero(held < WHOLE * alone)
    if len(cut):
        first = int(cut[0])
        raise UserError(
            f"target: {len(cut)} of {len(names)} places hold less than {WHOLE:.0%} of their pixels, e.g. {names[first]} {held[first]} of "
            f"{alone[first]}: they overlap or repeat others, or the border of section {asked.name!r} cuts them, a pixel counts for one place; ask "
            "for them in several files or with a smaller radius, and leave out those at the border"
        )


def new_image(
    image: Source,
    like: Data,
    config: Input,
    say: Callable[[str], None],
    *,
    name: str = "new",
    scale: float | None = None,
    mask: str | Path | None = None,
) -> Section:
    """A section of an image without counts, for prediction: its tissue and a margin; covariates unknown.

    The margin around the tissue is that around the spots of the fit. What is kept of the image scales its colors and places its spatial field, so it
    does not depend on the places that are asked for.

    ``scale``: working pixels per pixel of the image; None: that of the first section of the fit, hence an image of the same resolution,
    which is taken on trust: the size of a pixel is then unknown. ``mask``: "none" (all of the image is tissue) or a file over it that is not 0 on
    tissue; None: as in the fit where that was "none", else found in the image.

    Raises
    ------
    UserError
        If there is no tissue in the image.
    """
    height, width = image_size(image)
    first = like.sections[0]
    micron = first.micron if scale is not None else float("nan")
    if scale is None:
        scale = first.file_scale if np.isfinite(first.file_scale) else min(1.0, first.scale)
    pixels = read_image(image, scale=scale)
    frame = (pixels.shape[0], pixels.shape[1])
    if mask == "none" or (mask is None and set(config.mask) == {"none"}):
        on = np.ones(frame, bool)
    else:
        on = tissue_mask(pixels) if mask is None else read_labels(Path(mask), frame, mask=True) > 0
    if mask is None and (marks := on & ~without_marks(pixels, on)).any():
        say(f"{name}: small gray pieces ({marks.sum() / on.sum():.0%} of what is not glass) are taken for marks on the slide; if not, give --mask")
        on &= ~marks
    what = image if isinstance(image, str | Path) else "array"
    if np.ptp(pixels.reshape(-1, 3), axis=0).max() == 0:
        color = ", ".join(map(str, pixels[0, 0]))
        raise UserError(f"image {what}: is one color everywhere ({color}): nothing can be predicted from it; is it the right file?")
    if not on.any() and mask not in (None, "none"):
        raise UserError(f"image {what}: the mask {mask} is 0 everywhere on it; give an image that is not 0 on the tissue")
    if not on.any():
        raise UserError(
            f"image {what}: no tissue is found in it; if there is some, give --mask, an image that is not 0 on it, or --mask none: it is all tissue"
        )
    tissue = np.argwhere(on)[:, ::-1].astype(np.float64)
    box = box_around(tissue, pixels.shape[:2], max(config.margin * np.ptp(tissue, axis=0).max(), 4 * first.radius))
    pixels, on = pixels[box[0] : box[1], box[2] : box[3]], on[box[0] : box[1], box[2] : box[3]]
    say(f"{name}: {width} x {height} px at scale {scale:.3g}: {pixels.shape[1]} x {pixels.shape[0]} px, {on.mean():.0%} tissue")
    for what, own, known in (
        ("longer side", max(frame), [max(one.frame) or max(one.mask.shape) for one in like.sections]),
        ("area of tissue", int(on.sum()), [int(one.mask.sum()) for one in like.sections]),
    ):
        if not min(known) / ALIKE <= own <= ALIKE * max(known):
            say(
                f"{name}: its {what} is {own:.3g} working pixels, in the fit's sections {min(known):.3g} to {max(known):.3g}: is its resolution "
                f"the one that is taken, {scale:.3g} working pixels per pixel? if not, give another --scale"
            )
    nowhere = _no_counts(0, len(like.genes))
    return Section(
        name, np.ascontiguousarray(pixels), np.zeros(on.shape, np.int64), nowhere, -1, on, np.zeros((0, 2)), first.radius,
        np.full(len(like.covariates), -1, np.int64), None, scale=scale, origin=(box[2] / scale, box[0] / scale), micron=micron,
        square=first.square, pitch=first.pitch, frame=frame, file_scale=scale,
    )  # fmt: skip


def without(data: Data, hidden: Sequence[NDArray[np.int64]]) -> Data:
    """The problem as if rows ``hidden`` of each section had not been measured: their pixels are in no measurement."""
    sections = []
    for section, rows in zip(data.sections, hidden, strict=True):
        keep = np.ones(section.counts.shape[0], bool)
        keep[rows] = False
        number = np.append(0, np.cumsum(keep) * keep)
        virtual = -1 if section.virtual < 0 else int(number[section.virtual + 1]) - 1
        sections.append(section._replace(label=number[section.label], counts=section.counts[keep], centers=section.centers[keep], virtual=virtual))
    return data._replace(sections=tuple(sections))


# ---- genes and covariates ----


def _genes(slides: Sequence[Slide], config: Input, say: Callable[[str], None]) -> NDArray[np.str_]:
    """Genes that every section with counts has, after the filters, sorted."""
    tables = [slide.counts for slide in slides if slide.counts is not None]
    everywhere = np.sort(reduce(np.intersect1d, [table.genes for table in tables]))
    genes = everywhere
    if config.drop_genes:
        try:
            pattern = re.compile(config.drop_genes)
        except re.error as error:
            raise UserError(f"input.drop_genes={config.drop_genes!r} is no regular expression ({error})") from error
        genes = genes[[pattern.search(gene) is None for gene in genes.tolist()]]
    if len(genes):
        total = np.sum([np.asarray(table.take_genes(genes).matrix.sum(0), np.float64).ravel() for table in tables], 0)
        enough = total >= config.min_gene_counts
        genes, total = genes[enough], total[enough]
        if config.top_genes is not None and len(genes) > config.top_genes:
            genes = np.sort(genes[np.argsort(-total, kind="stable")[: config.top_genes]])
    if not len(genes):
        raise UserError(
            f"xfuse: no gene is left of {len(everywhere)} that all sections share; check gene names (var_names), input.drop_genes and "
            "input.min_gene_counts"
        )
    most = max(len(table.genes) for table in tables)
    if len(genes) < most:
        say(f"{len(genes)} genes of up to {most} stay: those that all sections have and the filters keep")
    return np.asarray(genes, dtype=str)


def _covariates(slides: Sequence[Slide], config: Input) -> dict[str, tuple[str, ...]]:
    """Levels of every covariate that differs between the sections; one that does not explains nothing and is left out."""
    found = {}
    for key in config.covariates:
        values = {_level(slide, key) for slide in slides} - {None}
        if len(values) > 1:
            found[key] = tuple(sorted(value for value in values if value is not None))
    return found


def _level(slide: Slide, key: str) -> str | None:
    """The one value of a slide; None where it is unknown."""
    if slide.counts is None:
        return None
    if key == "section":
        return slide.name
    if key not in slide.counts.obs:
        has = ", ".join(map(str, slide.counts.obs.columns[:5])) or "none"
        raise UserError(f"target ({slide.counts.source}): no obs column {key!r} (input.covariates); it has {has}")
    values = as_text(slide.counts.obs[key]).unique()
    if len(values) > 1:
        raise UserError(
            f"target ({slide.counts.source}): obs[{key!r}] has {len(values)} values ({', '.join(values[:3])}, ...) within one section; a covariate "
            "has one value per section: split the file, or use it as input.annotation"
        )
    return str(values[0]) if len(values) else None


def _code(slide: Slide, key: str, names: tuple[str, ...]) -> int:
    value = _level(slide, key)
    return -1 if value is None else names.index(value)


def _no_counts(rows: int, genes: int) -> sp.csr_matrix:
    shape: Any = (rows, genes)  # the stubs do not know csr_matrix(shape)
    return sp.csr_matrix(shape, dtype=np.float32)


# ---- one section ----


def _section(
    slide: Slide, number: int, genes: NDArray[np.str_], codes: NDArray[np.int64], config: Input, say: Callable[[str], None], pictures: Path
) -> tuple[Section, Counts]:
    if slide.counts is None:
        raise UserError(f"{slide.name}: has no counts; images without counts are for prediction")
    counts = slide.counts.take_genes(genes)
    enough = slide.counts.totals >= config.min_counts
    if not enough.any():
        raise UserError(f"target ({counts.source}): no spot has {config.min_counts} counts (input.min_counts); lower it, or check the counts")
    frame = _frame(slide, config)
    if config.check:
        check_positions(slide, frame, pictures)
    shape = frame.image.shape[:2]
    inside = inside_share(frame.centers, frame.radius, shape) >= INSIDE
    keep = enough & inside
    if not keep.all():
        say(
            f"{slide.name}: {int((~keep).sum())} of {len(keep)} spots are left out ({int((~enough).sum())} with fewer than "
            f"{config.min_counts} counts, {int((~inside).sum())} not wholly in the image)"
        )
    if not keep.any():
        raise UserError(f"target ({counts.source}): no spot is left of {len(keep)}")
    box = box_around(frame.centers, shape, max(config.margin * np.ptp(frame.centers, axis=0).max(), 4 * frame.radius))
    crop = (slice(box[0], box[1]), slice(box[2], box[3]))
    image = np.ascontiguousarray(frame.image[crop])
    centers = frame.centers - [box[2], box[0]]
    mask = _mask(slide, number, image, shape, crop, centers[keep], config, frame, pictures)

    square = slide.square if config.spot == "auto" else config.spot == "square"
    everything = label_spots(image.shape[:2], centers, frame.radius, square=square)
    label = np.append(0, np.cumsum(keep) * keep)[everything]
    mask |= label > 0  # also where a spot is pale: hidden later, it is still known to be tissue
    if (np.bincount(label.ravel(), minlength=keep.sum() + 1)[1:] == 0).any():
        raise UserError(
            f"{slide.name}: at scale {frame.scale / slide.image_scale:.3g} some spots share all their pixels with others; raise input.scale "
            "or input.pitch, or check for repeated positions"
        )
    regions = _annotation(slide, number, label, shape, box, frame, keep, config)
    rows = counts.take_rows(keep)
    matrix, where, virtual = rows.matrix, centers[keep], -1
    if config.background:
        far = _beyond(mask | (everything > 0), frame.radius)
        if far.any():
            virtual = matrix.shape[0]
            label[far] = virtual + 1
            matrix = sp.csr_matrix(sp.vstack([matrix, _no_counts(1, matrix.shape[1])], dtype=np.float32))
            where = np.vstack([where, [np.nan, np.nan]])
    say(
        f"{slide.name}: {int(keep.sum())} spots, {image.shape[1]} x {image.shape[0]} px, spot radius {frame.radius:.3g} px, tissue {mask.mean():.0%}"
        f"{'' if virtual < 0 else f', off tissue {np.mean(label == virtual + 1):.0%}'}"
    )
    section = Section(
        slide.name, image, label, matrix, virtual, mask, where, frame.radius, codes, None if regions is None else regions[0],
        () if regions is None else regions[1], frame.scale, (box[2] / frame.scale, box[0] / frame.scale), slide.micron / frame.scale,
        square, _pitch(frame), None, shape, frame.scale / slide.image_scale,
    )  # fmt: skip
    return section, rows


def _pitch(frame: Frame) -> float:
    return spot_pitch(frame.centers) if len(frame.centers) > 1 else 4 * frame.radius


def _frame(slide: Slide, config: Input) -> Frame:
    assert slide.counts is not None and slide.counts.xy is not None
    xy = slide.counts.xy
    radius = config.radius or slide.radius
    needed = radius is None or config.scale is None
    if needed and len(xy) < 2:
        raise UserError(
            f"target ({slide.counts.source}): one spot has no neighbor to measure a pitch from; give its radius in coordinates and the scale, --set "
            "input.radius=... --set input.scale=..."
        )
    pitch = spot_pitch(xy) if needed else None
    if radius is None:
        assert pitch is not None
        radius = DEFAULT_FRACTION * pitch
    if config.scale is not None:
        file_scale = config.scale
    else:
        assert pitch is not None
        file_scale = min(1.0, config.pitch / (pitch * slide.image_scale))
        height, width = image_size(slide.image)
        file_scale = max(file_scale, min(1.0, 64 / max(height, width)))  # positions in another unit: enough pixels to see it
        file_scale = min(file_scale, 6000 / max(height, width))
    image = read_image(slide.image, scale=file_scale)
    scale = file_scale * slide.image_scale
    return Frame(image, xy * scale, radius * scale, scale)


def _mask(
    slide: Slide, number: int, image: NDArray[np.uint8], shape: tuple[int, ...], crop: tuple[slice, slice], centers: NDArray[np.float64],
    config: Input, frame: Frame, pictures: Path,
) -> NDArray[np.bool_]:  # fmt: skip
    choice = config.mask[number if len(config.mask) > 1 else 0]
    if choice == "none":
        return np.ones(image.shape[:2], bool)
    if choice == "auto":
        return tissue_mask(image, centers)
    mask = read_labels(Path(choice), (shape[0], shape[1]), mask=True)[crop] > 0
    share = share_on(mask, centers)
    if not mask.any() or share < 0.01:
        path = overlay(pictures / f"overlay_{slide.name}.png", np.where(mask[..., None], image, image // 2), centers, frame.radius)
        raise UserError(
            f"section {slide.name}: mask {choice} keeps {mask.mean():.0%} of the section and {share:.0%} of its spots; it must be an image over the "
            f"whole of {slide.image if isinstance(slide.image, str | Path) else 'the image'} that is not 0 on tissue (is it inverted?); see {path}"
        )
    return mask


def _beyond(mask: NDArray[np.bool_], distance: float) -> NDArray[np.bool_]:
    """Pixels farther than ``distance`` from the mask: what lies at the edge of the tissue is neither tissue nor surely empty."""
    from scipy.ndimage import distance_transform_edt

    if not mask.any():
        return np.ones_like(mask)
    return np.asarray(distance_transform_edt(~mask) > distance)


def _annotation(
    slide: Slide, number: int, label: NDArray[np.int64], shape: tuple[int, ...], box: tuple[int, int, int, int], frame: Frame,
    keep: NDArray[np.bool_], config: Input,
) -> Regions | None:  # fmt: skip
    if not config.annotation:
        return None
    choice = config.annotation[number if len(config.annotation) > 1 else 0]
    assert slide.counts is not None
    if choice in slide.counts.obs:
        return regions_from_spots(slide.counts.obs[choice][keep], label)
    path = Path(choice)
    if path.suffix.lower() in (".json", ".geojson"):
        origin = np.array([box[2], box[0]]) / frame.scale
        return regions_from_geojson(path, label.shape, frame.scale, origin)
    if path.is_file():
        return regions_from_image(path, (shape[0], shape[1]), box)
    columns = ", ".join(map(str, slide.counts.obs.columns[:5])) or "none"
    raise UserError(f"input.annotation={choice!r} is neither an obs column of {slide.counts.source} (it has {columns}) nor a file")

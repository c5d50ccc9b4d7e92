"""Histology: image files -> uint8 RGB at a working resolution, tissue masks, label maps, pictures of the overlay.

Coordinates are continuous: x runs right and y down, and pixel (row i, column j) covers [j, j + 1) x [i, i + 1).
Shrinking is the mean over areas. PNG and JPEG are read by pillow (JPEG shrinks while it is decoded); TIFF and its
relatives (OME, pyramids, tiles, strips) by tifffile, segment by segment from the smallest sufficient level of the
pyramid, so that memory holds the result and one tile.

What files get wrong is put right in `to_rgb`: an alpha channel is laid on white, gray becomes three equal channels,
12 and 16 bits and floats become 8 bits by the range that the values use.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label as ndimage_label

from ppl_st.data import Counts
from ppl_st.errors import UserError

__all__ = [
    "VISIUM_RADIUS", "VISIUM_SPOT", "Slide", "Source", "image_size", "label_image", "label_spots", "nearest", "overlay", "read_image", "read_labels",
    "resize", "sizes_alone", "tissue_mask", "to_rgb", "without_marks",
]  # fmt: skip

Source: TypeAlias = str | Path | NDArray[Any]
_TIFF = (".tif", ".tiff", ".btf", ".tf8", ".svs", ".ndpi", ".scn", ".qptiff")
_PILLOW = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MAX_SIDE = 8000  # pixels of a working image: more is hardly ever meant
STRIP = 64  # rows
ORIENTATION = 274  # EXIF tag: 1 where the image is stored as it is to be shown
MOST = 0.999  # share of an image's values that its full scale must hold
MARK, GRAYER = 0.2, 0.7  # of the largest piece's area, and of how far it is from gray: smaller and grayer ones are no tissue
SMALLEST = 1e-4  # share of the image below which a piece of tissue, or a hole in it, is dirt (the published (1 %)^2)

VISIUM_SPOT = 65.0  # um: Space Ranger's spot_diameter_fullres is the size in pixels of a theoretical spot of 65 um, not of the printed one
VISIUM_RADIUS = 27.5  # um: the printed spots


class Slide(NamedTuple):
    """One section as it lies in files.

    Attributes
    ----------
    name
        Of the section.
    counts
        With ``xy`` in the coordinates of the slide; None for an image without counts.
    image
        File, or array.
    image_scale
        Pixels of the image per unit of the coordinates: 1 where they are pixels of this image.
    radius
        Of the spots in coordinates; None: unknown.
    micron
        Micrometers per unit of the coordinates; NaN: unknown.
    square
        Whether spots are squares of twice the radius (bins) instead of discs.
    """

    name: str
    counts: Counts | None
    image: Source
    image_scale: float = 1.0
    radius: float | None = None
    micron: float = float("nan")
    square: bool = False


# ---- reading ----


def image_size(source: Source) -> tuple[int, int]:
    """Height and width in pixels of a file or array, without decoding it."""
    if isinstance(source, np.ndarray):
        return int(source.shape[0]), int(source.shape[1])
    with _opened(source) as (kind, file):
        if kind == "pillow":
            return int(file.height), int(file.width)
        level = file.series[0]
        return int(level.shape[level.axes.index("Y")]), int(level.shape[level.axes.index("X")])


def read_image(source: Source, *, scale: float = 1.0) -> NDArray[np.uint8]:
    """An image shrunk to ``scale``.

    Parameters
    ----------
    source
        Path of a PNG, JPEG or TIFF (also OME, tiled, pyramidal), or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    scale
        Side of the result over side of the file, in (0, 1].

    Returns
    -------
    uint8 [round(H scale), round(W scale), 3]

    Raises
    ------
    UserError
        For a missing or damaged file, an unknown kind, a number of channels that is no color, a result of more than `MAX_SIDE` pixels a side.
    """
    if not 0 < scale <= 1:
        raise UserError(f"image {_name(source)}: scale {scale:g} must lie in (0, 1]; images are never enlarged")
    height, width = image_size(source)
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    if max(shape) > MAX_SIDE:
        raise UserError(
            f"image {_name(source)}: {width} x {height} px at scale {scale:g} is more than {MAX_SIDE} px a side; about 1,000 px work best: "
            f"--set input.scale={1000 / max(height, width):.2g}"
        )
    if isinstance(source, np.ndarray):
        return resize(to_rgb(source, _name(source)), shape)
    with _opened(source) as (kind, file):
        if kind == "tiff":
            pixels, box = _shrunk_tiff(file, shape, _name(source))
            return resize(to_rgb(pixels, _name(source)), shape, box)
        if (turned := int(file.getexif().get(ORIENTATION, 1))) != 1:
            raise UserError(
                f"image {_name(source)}: is stored turned (EXIF orientation {turned}), so programs differ in where its pixels lie; save it upright "
                "(PIL.ImageOps.exif_transpose), with positions in the pixels of that"
            )
        drafted = file.draft("RGB" if file.mode != "L" else "L", (shape[1], shape[0])) if file.format == "JPEG" else None
        if file.mode in ("P", "PA", "LA", "La", "RGBa"):
            file = file.convert("RGBA")
        elif file.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV"):
            file = file.convert("RGB")
        return resize(to_rgb(np.asarray(file), _name(source)), shape, drafted[1] if drafted else None)


def resize(image: NDArray[np.uint8], shape: tuple[int, int], box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    """Area means of an image [h, w, 3], or of its part ``box`` (left, top, right, bottom), on a grid of ``shape`` (height, width)."""
    from PIL import Image

    if image.shape[:2] == shape:
        return image
    return np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BOX, box))


def read_labels(path: Path, shape: tuple[int, int], *, mask: bool = False) -> NDArray[np.int64]:
    """A label or mask image over a whole image, of any resolution, on a grid of ``shape`` (height, width) by nearest pixel, [H, W] int64.

    Of color images whether a pixel is not black; several colors are no labels, only a ``mask``.
    """
    return _labels_of(nearest(_plane(path, shape), shape), path, mask).astype(np.int64)


def label_image(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """Labels as in `read_labels`, in the pixels of their file."""
    return _labels_of(_plane(path, shape), path, False)


def nearest(values: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """The nearest of the pixels [h, w, ...] to each pixel of a grid of ``shape``."""
    rows, columns = ((np.arange(new) + 0.5) * old / new for new, old in zip(shape, values.shape, strict=False))
    return np.asarray(values[rows.astype(np.int64)[:, None], columns.astype(np.int64)])


def _plane(path: Path, shape: tuple[int, int]) -> NDArray[Any]:
    """[h, w] or [h, w, channels] of a file that has the proportions of ``shape``."""
    with _opened(path) as (kind, file):
        values: NDArray[Any] = file.asarray() if kind == "tiff" else np.asarray(file)
    values = np.squeeze(values)
    if values.ndim != 2 and (values.ndim != 3 or values.shape[2] not in (2, 3, 4)):
        raise UserError(f"label image {path}: shape {values.shape} is no plane image")
    (height, width), size = shape, values.shape
    if abs(size[0] * width / (size[1] * height) - 1) > 0.02 + 1 / height + 1 / width:
        raise UserError(
            f"label image {path}: {size[1]} x {size[0]} px have other proportions than the section's image ({width} x {height} px at the working "
            "resolution); give labels over the whole image, at any resolution"
        )
    return values


def _labels_of(values: NDArray[Any], path: Path, mask: bool) -> NDArray[Any]:
    if values.ndim == 2:
        return values
    color = values[..., : 3 if values.shape[2] > 2 else 1]
    colored = np.asarray(color.any(2))
    if not mask and colored.any() and np.ptp(color[colored], axis=0).any():
        raise UserError(f"label image {path}: several colors are no labels; save the number of each region or cell in one channel")
    return colored


def to_rgb(values: NDArray[Any], name: str = "array") -> NDArray[np.uint8]:
    """uint8 [H, W, 3] of any image array [H, W] or [H, W, 1, 2 (gray, alpha), 3 or 4 (RGB, alpha)].

    Full scale is that of 8, 10, 12, 14 or 16 bits for integers and 1 or 255 for floats: the smallest that holds `MOST` of the values, so that a few
    pixels that overshoot do not decide; they are cut.
    """
    pixels = values[..., None] if values.ndim == 2 else values
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4):
        raise UserError(
            f"image {name}: shape {values.shape} is no color image; give RGB [H, W, 3] (of a fluorescence stack: choose or combine three channels)"
        )
    if pixels.dtype == np.uint8 and pixels.shape[2] == 3:
        return pixels
    if (pixels.dtype.kind == "f" and not np.isfinite(pixels).all()) or pixels.min() < 0:
        raise UserError(f"image {name}: holds negative or non-finite values; store intensities from 0 up")
    colors = pixels[..., : 3 if pixels.shape[2] > 2 else 1]
    top = float(colors.max())
    scales = [255.0] if pixels.dtype == np.uint8 else [1.0, 255.0] if pixels.dtype.kind in "fb" else [2.0**b - 1 for b in (8, 10, 12, 14, 16)]
    over = (int(np.count_nonzero(colors > one)) for one in scales)
    full = next((one for one, k in zip(scales, over, strict=True) if k <= (1 - MOST) * colors.size), None)
    if full is None:
        raise UserError(f"image {name}: values up to {top:g} of type {pixels.dtype} fit no usual range; convert it to 8 bits")
    opaque = max(1.0, float(np.float32(pixels[..., -1].max()) / np.float32(full)))  # 12-bit color with 16-bit alpha exists
    out = np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in _strips(len(out)):
        color = pixels[rows].astype(np.float32) / np.float32(full)
        if pixels.shape[2] in (2, 4):
            alpha = color[..., -1:] / opaque
            color = color[..., :-1] * alpha + (1 - alpha)
        out[rows] = np.rint(255 * color.clip(max=1))
    return out


def _strips(height: int) -> Iterator[slice]:
    """Rows of an image that are floats at a time."""
    for first in range(0, height, STRIP):
        yield slice(first, first + STRIP)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("pillow" or "tiff", open file); whatever the decoders throw becomes one sentence."""
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"image: no such file: {path}; check the path (the working directory is {Path.cwd()})")
    if suffix not in _TIFF + _PILLOW:
        raise UserError(f"image: cannot read {path}: unknown suffix {suffix!r}; give a PNG, JPEG or TIFF file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow warns of large images: they are what we are for
            if suffix in _TIFF:
                import tifffile

                with tifffile.TiffFile(path) as file:
                    yield "tiff", file
            else:
                from PIL import Image

                limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
                try:
                    with Image.open(path) as picture:
                        yield "pillow", picture
                finally:
                    Image.MAX_IMAGE_PIXELS = limit
    except (UserError, MemoryError):
        raise
    except Exception as error:  # decoders raise many types for a damaged file
        if "imagecodecs" in str(error):
            raise UserError(f"image: {path} is compressed in a way that needs one more package: pip install imagecodecs") from error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(f"image: cannot read {path}: {reason}; it is probably damaged or of another kind") from error


def _shrunk_tiff(file: Any, shape: tuple[int, int], name: str) -> tuple[NDArray[Any], tuple[float, float, float, float]]:
    """The smallest sufficient level, divided by the whole factor that still leaves at least ``shape``, [h, w, channels] in the file's type.

    And the box (left, top, right, bottom) in it that the image covers: the last row and column are means of what is left.
    """
    fits = [level for level in file.series[0].levels if level.shape[level.axes.index("Y")] >= shape[0]]
    level = fits[-1]
    axes = "".join(one for one, size in zip(level.axes, level.shape, strict=True) if size > 1 or one in "YX")
    if axes not in ("YX", "YXS", "SYX", "CYX", "YXC"):
        raise UserError(f"image {name}: axes {level.axes} {level.shape} are no plane image; export one plane in RGB")
    stored, packed = level.keyframe.photometric.name, level.keyframe.compression.name
    if stored not in ("MINISBLACK", "MINISWHITE", "RGB") and not (stored == "YCBCR" and "JP" in packed):  # JPEG's decoder returns RGB
        raise UserError(f"image {name}: its colors are stored as {stored}; save it in RGB")
    height, width = level.shape[level.axes.index("Y")], level.shape[level.axes.index("X")]
    if stored != "RGB" and not level.keyframe.extrasamples and int(np.prod(level.shape)) // (height * width) in (2, 4):
        raise UserError(f"image {name}: its {axes} {level.shape} are no color and no alpha; of a fluorescence stack choose or combine three channels")
    channels = max(1, int(np.prod(level.shape)) // (height * width))
    factor = max(1, int(min(height / shape[0], width / shape[1])))
    as_stored = factor == 1 and level.dtype.kind in "uif"  # nothing to average: no floats
    sums = np.zeros((-(-height // factor), -(-width // factor), channels), level.dtype if as_stored else np.float64)
    for number, page in enumerate(level.pages):
        for segment, (plane, _, y, x, _), _ in page.segments():
            if segment is None:  # a tile that was never written
                continue
            block = segment[0, : height - y, : width - x]
            rows, columns = (np.arange(start, start + size) // factor for start, size in ((y, block.shape[0]), (x, block.shape[1])))
            block = block if as_stored else block.astype(np.float64)
            for axis, index in ((0, rows), (1, columns)) if factor > 1 else ():
                block = np.add.reduceat(block, np.flatnonzero(np.diff(index, prepend=-1)), axis=axis)
            first = number if len(level.pages) > 1 else plane
            sums[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, first : first + block.shape[2]] += block
    means = sums
    if factor > 1:
        per_row, per_column = (np.bincount(np.arange(size) // factor) for size in (height, width))
        means /= (per_row[:, None] * per_column)[..., None]
    if level.keyframe.photometric.name == "MINISWHITE":
        means = (2**level.keyframe.bitspersample - 1 if level.dtype.kind in "ub" else means.max()) - means
    pixels = means if as_stored or level.dtype.kind == "f" else np.rint(means, out=means).astype(level.dtype)
    return pixels, (0.0, 0.0, width / factor, height / factor)


def _name(source: Source) -> str:
    return "array" if isinstance(source, np.ndarray) else str(source)


# ---- tissue ----


def tissue_mask(image: NDArray[np.uint8], xy: NDArray[np.float64] | None = None) -> NDArray[np.bool_]:
    """Where the tissue is: Otsu's threshold on the distance from the color of the glass, [H, W].

    The glass is the median color of the lightest quarter of the frame of the image (of the darkest, where most of the frame is dark, as in
    fluorescence); the distance is smoothed over 1/300 of the image. With ``xy`` [n, 2], positions known to lie on tissue, the threshold is lowered
    until 95 % of them do. Pieces and holes below `SMALLEST` of the image are removed. An image without contrast is tissue everywhere.
    """
    from skimage.filters import threshold_otsu
    from skimage.morphology import remove_small_holes, remove_small_objects

    distance = _from_glass(image)
    if np.ptp(distance) < 8:  # of 255: nothing to tell apart
        return np.ones(image.shape[:2], bool)
    threshold = float(threshold_otsu(distance))
    if xy is not None and len(xy):
        threshold = min(threshold, float(np.quantile(distance[_pixels(xy, distance.shape)], 0.05)))
    size = max(8, int(SMALLEST * distance.size))
    return np.asarray(remove_small_holes(remove_small_objects(distance >= threshold, max_size=size), max_size=size), bool)


def without_marks(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A tissue mask [H, W] without what looks like marks and shadows on the slide: pieces below `MARK` of the largest, gray where that is not.

    Of the mean difference of a piece from the color of the glass the spread of the channels is taken over its length: less than `GRAYER` of that
    of the largest piece, whatever the depth of the stain. Gray images lose nothing.
    """
    pieces, number = ndimage_label(mask)
    if number < 2:
        return mask
    area = np.bincount(pieces.ravel())[1:]
    color = np.stack([np.bincount(pieces.ravel(), image[..., c].ravel())[1:] for c in range(3)], 1) / area[:, None]
    difference = color - _glass(image)
    hue = np.ptp(difference, axis=1) / np.maximum(np.linalg.norm(difference, axis=1), 1.0)
    marks = (area < MARK * area.max()) & (hue < GRAYER * hue[area.argmax()])
    return np.asarray(mask & ~np.append(False, marks)[pieces])


def _glass(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The color of the glass [3]; see `tissue_mask`."""
    edge = max(1, min(image.shape[:2]) // 20)
    inner = np.zeros(image.shape[:2], bool)
    inner[edge:-edge, edge:-edge] = True
    frame = image[~inner].astype(np.float32)
    brightness = frame.mean(1)
    light = np.median(brightness) > 127
    cut = np.quantile(brightness, 0.75 if light else 0.25)
    return np.asarray(np.median(frame[brightness >= cut] if light else frame[brightness <= cut], axis=0))


def _from_glass(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Smooth distance of every pixel from the color of the glass [H, W]."""
    from skimage.filters import gaussian

    glass = _glass(image)
    distance = np.empty(image.shape[:2], np.float32)
    for rows in _strips(len(distance)):
        distance[rows] = np.linalg.norm(image[rows].astype(np.float32) - glass, axis=2)
    return np.asarray(gaussian(distance, max(1.0, max(image.shape[:2]) / 300)), np.float32)


def _pixels(xy: NDArray[np.float64], shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of the pixels that hold ``xy``, clipped to the image."""
    column, row = np.floor(xy).astype(np.int64).T
    return row.clip(0, shape[0] - 1), column.clip(0, shape[1] - 1)


# ---- label maps ----


def label_spots(
    shape: tuple[int, int], centers: NDArray[np.float64], radius: float, *, square: bool = False
) -> NDArray[np.int64]:
    """[H, W] int64: k + 1 where the pixel's middle lies within ``radius`` of center k (the nearest one, where spots overlap), 0 elsewhere.

    Spots are discs, or with ``square`` upright squares of twice the radius. One that holds no pixel's middle still gets the pixel that its center
    is in. A center outside the image paints what of its spot is inside.
    """
    label = np.zeros(shape, np.int64)
    nearest = np.full(shape, np.inf)
    reach = int(np.ceil(radius)) + 1
    for k, (x, y) in enumerate(centers):
        top, left = int(np.floor(y)) - reach, int(np.floor(x)) - reach
        rows = slice(max(0, top), max(0, min(shape[0], top + 2 * reach + 1)))
        columns = slice(max(0, left), max(0, min(shape[1], left + 2 * reach + 1)))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        i, j = np.ogrid[rows, columns]
        across, down = np.abs(j + 0.5 - x), np.abs(i + 0.5 - y)
        distance = np.maximum(across, down) ** 2 if square else across**2 + down**2
        inside = (distance <= radius**2) | ((i == np.floor(y)) & (j == np.floor(x)))
        inside &= distance < nearest[rows, columns]
        nearest[rows, columns][inside] = distance[inside]
        label[rows, columns][inside] = k + 1
    return label


def sizes_alone(centers: NDArray[np.float64], radius: float, *, square: bool = False) -> NDArray[np.int64]:
    """Pixels [n] that each spot of `label_spots` would hold if it were alone in an endless image."""
    reach = int(np.ceil(radius)) + 2
    shape = (2 * reach + 1, 2 * reach + 1)
    moved = centers - np.floor(centers) + reach
    return np.array([np.count_nonzero(label_spots(shape, one[None], radius, square=square)) for one in moved], np.int64)


def overlay(path: Path, image: NDArray[np.uint8], centers: NDArray[np.float64], radius: float) -> Path:
    """Write a PNG of the image (at most 1,000 px a side, on a wider canvas where spots lie outside) with the spots as circles; returns ``path``."""
    from PIL import Image, ImageDraw

    from ppl_st.io import atomic

    low = np.minimum(np.nanmin(centers, 0, initial=0.0) - radius, 0)
    high = np.maximum(np.nanmax(centers, 0, initial=0.0) + radius, image.shape[1::-1])
    high = np.minimum(high, low + 20 * np.array(image.shape[1::-1]))  # spots in another unit can be anywhere
    shrink = min(1.0, 1000 / (high - low).max())
    size = np.maximum(1, np.ceil((high - low) * shrink).astype(int))
    canvas = Image.new("RGB", tuple(size), (128, 128, 128))
    small = resize(image, tuple(max(1, round(side * shrink)) for side in image.shape[:2]))
    canvas.paste(Image.fromarray(small), tuple(np.round(-low * shrink).astype(int)))
    draw = ImageDraw.Draw(canvas)
    for x, y in (centers - low) * shrink:
        r = max(1.5, radius * shrink)
        draw.ellipse([x - r, y - r, x + r, y + r], outline=(230, 30, 30))
    with atomic(path) as temporary:
        canvas.save(temporary)
    return path

"""Pictures of sections: maps of genes with their uncertainty, each with a color scale from 0 in counts and a scale bar in um (or pixels)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ppl_st.io import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["map_figure", "map_pictures", "scale_bar"]

SHOWN = 0.999  # quantile at which a color scale ends
STEPS = (1, 2, 5)  # a scale bar is one of these times a power of ten


def map_figure(
    image: NDArray[np.uint8], mean: NDArray[Any], sd: NDArray[Any], title: str, *, micron: float = float("nan"), truth: NDArray[Any] | None = None,
    limits: tuple[float, float] | None = None,
) -> "Figure":
    """The histology, (the truth,) the posterior mean and the sd of one gene, [H, W] each; mean and truth share one color scale that begins at 0.

    ``limits``: ends of the color scales of mean and sd, the same for pictures to be compared; None: those of this gene.
    """
    import matplotlib.pyplot as plt

    panels: list[tuple[str, NDArray[Any]]] = [("posterior mean", mean), ("posterior sd", sd)]
    panels = panels if truth is None else [("truth", truth), *panels]
    own = max(float(np.quantile(one, SHOWN)) for name, one in panels if name != "posterior sd"), float(np.quantile(sd, SHOWN))
    top, top_sd = limits or own
    ratio = image.shape[0] / image.shape[1]
    figure, axes = plt.subplots(
        1, 1 + len(panels), figsize=(3.4 * (1 + len(panels)), 3.2 * ratio + 0.6), layout="constrained", squeeze=False
    )
    axes[0, 0].imshow(image)
    axes[0, 0].set_title("histology")
    for axis, (name, values) in zip(axes[0, 1:], panels, strict=True):
        limit = top if name != "posterior sd" else top_sd
        drawn = axis.imshow(values, vmin=0, vmax=limit or 1.0, cmap="magma", interpolation="nearest")
        axis.set_title(f"{title}: {name}")
        figure.colorbar(drawn, ax=axis, shrink=0.8, label="expected counts per pixel")
    for axis in axes[0]:
        axis.set_axis_off()
    scale_bar(axes[0, 0], image.shape[1], image.shape[0], micron)
    plt.close(figure)
    return figure


def scale_bar(axis: "Axes", width: int, height: int, micron: float) -> None:
    """A bar of a round length, about a fifth of the width, in micrometers where their size is known, else in pixels."""
    known = np.isfinite(micron)
    per_pixel = micron if known else 1.0
    goal = width * per_pixel / 5
    power = 10.0 ** np.floor(np.log10(goal))
    length = max(step * power for step in STEPS if step * power <= goal)
    pixels = length / per_pixel
    right, y = 0.96 * width, 0.95 * height
    axis.plot([right - pixels, right], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    axis.text(right - pixels / 2, y - 0.02 * height, f"{length:g} {'µm' if known else 'px'}", ha="center", va="bottom", fontsize=8)
    axis.set_xlim(-0.5, width - 0.5)
    axis.set_ylim(height - 0.5, -0.5)


def map_pictures(store: Path, image: NDArray[np.uint8], folder: Path) -> Iterator[Path]:
    """A PNG per gene of a store that `ppl_st.image_run.ImageRun.maps` wrote, all on the color scales of its strongest gene.

    Characters of a gene's name that a file's may not have become "_", and a number is added where another gene has that name.
    """
    import zarr

    group = zarr.open_group(str(store), mode="r")
    about = dict(group.attrs)
    micron = about["micron_per_pixel"]
    arrays: dict[str, Any] = {name: group[name] for name in ("mean", "sd")}
    genes = [str(gene) for gene in about["genes"]]  # type: ignore[union-attr]
    top, top_sd = (max(float(np.quantile(np.asarray(arrays[name][g]), SHOWN)) for g in range(len(genes))) for name in ("mean", "sd"))
    taken: set[str] = set()
    for g, gene in enumerate(genes):
        figure = map_figure(
            image, np.asarray(arrays["mean"][g]), np.asarray(arrays["sd"][g]), gene, micron=float("nan") if micron is None else float(micron),  # type: ignore[arg-type]
            limits=(top, top_sd),
        )  # fmt: skip
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in gene)
        name = next(name for name in (stem, *(f"{stem}-{k}" for k in range(2, len(genes) + 2))) if name.lower() not in taken)
        taken.add(name.lower())
        path = folder / f"{name}.png"
        with atomic(path) as temporary:
            figure.savefig(temporary, dpi=120)
        yield path

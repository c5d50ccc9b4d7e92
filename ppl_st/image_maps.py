"""The maps of `ppl_st.image_run`: moments of all pixels over draws that lie in a scratch file, and what OME-Zarr says of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppl_st.errors import UserError
from ppl_st.io import free_bytes
from ppl_st.models.xfuse.data import Section

if TYPE_CHECKING:
    from ppl_st.image_run import ImageRun

__all__ = ["Activities", "ome"]


class Activities:
    """Draws of one section's activities in a scratch file, and the moments of any genes and pixels over them."""

    def __init__(self, run: "ImageRun", section: Section, genes: NDArray[np.int64], draws: int, seed: int, folder: Path) -> None:
        import tempfile

        number = [one.name for one in run.data.sections].index(section.name)
        predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
        existing = folder
        while not existing.is_dir():
            existing = existing.parent
        needed, free = 4 * draws * run.config.metagenes * section.label.size, free_bytes(existing / "maps")
        if needed > free:  # a full disk would kill the process that writes into the mapped file
            raise UserError(
                f"maps: {draws} draws of {run.config.metagenes} metagenes at {section.label.size} pixels need {needed / 1e9:.3g} GB of disk while "
                f"the maps are made, and {free / 1e9:.3g} GB are free at {existing}; lower --draws, or write to another disk"
            )
        self.file = tempfile.TemporaryFile(dir=existing)  # has no name and vanishes with the process
        self.loadings: list[Tensor] = []  # [genes, M] of each draw
        for draw in run.module.maps(predictor, genes, draws, seed, [number]):
            flat = draw.activity.flatten(1).numpy()  # [M, pixels]
            if not self.loadings:
                self.values = np.memmap(self.file, np.float32, "w+", shape=(draws, *flat.shape))
            self.values[draw.draw] = flat
            self.loadings.append((draw.shape * draw.odds.exp()).T.contiguous())

    def moments(self, pixels: slice, genes: slice, quantiles: bool) -> dict[str, NDArray[np.float32]]:
        """mean, sd (and q05, q95) [genes, pixels]: sums of differences to the first draw, which do not cancel."""
        activity = [torch.from_numpy(values[:, pixels]) for values in self.values]
        first = self.loadings[0][genes] @ activity[0]
        total, square, number = torch.zeros_like(first), torch.zeros_like(first), len(activity)
        differences = [torch.zeros_like(first)]
        for one, loading in zip(activity[1:], self.loadings[1:], strict=True):
            difference = torch.addmm(first, loading[genes], one, beta=-1)
            total += difference
            square.addcmul_(difference, difference)
            if quantiles:
                differences.append(difference)
        variance = (square - total * total / number).clamp_(min=0) / max(1, number - 1)
        found = {"mean": (first + total / number).numpy(), "sd": variance.sqrt_().numpy()}
        if quantiles:
            ends = torch.quantile(torch.stack(differences), torch.tensor([0.05, 0.95]), dim=0) + first
            found["q05"], found["q95"] = ends[0].numpy(), ends[1].numpy()
        return found

    def __enter__(self) -> "Activities":
        return self

    def __exit__(self, *error: object) -> None:
        del self.values
        self.file.close()


def ome(section: Section, names: Sequence[str], genes: Sequence[str], top: NDArray[np.float64]) -> dict[str, Any]:
    """OME-Zarr metadata of maps: pixel size and place in um where known, else in coordinates of the file, and a channel per gene.

    The place of a pixel is that of its middle, and the middle of the file's first pixel is 0.
    """
    known = bool(np.isfinite(section.micron))
    unit = {"unit": "micrometer"} if known else {}
    coordinate = section.micron * section.scale if known else 1.0  # um per coordinate
    step = coordinate / section.scale
    place = [coordinate * (v - 0.5) + step / 2 for v in reversed(section.origin)]
    axes = [{"name": "c", "type": "channel"}, *({"name": name, "type": "space", **unit} for name in "yx")]
    moved = [{"type": "scale", "scale": [1.0, float(step), float(step)]}, {"type": "translation", "translation": [0.0, *map(float, place)]}]
    scales = [{"name": name, "axes": axes, "datasets": [{"path": name, "coordinateTransformations": moved}]} for name in names]
    channels = [
        {"label": str(gene), "color": "FFFFFF", "active": k == 0, "window": {"start": 0.0, "end": float(high), "min": 0.0, "max": float(high)}}
        for k, (gene, high) in enumerate(zip(genes, top, strict=True))
    ]
    return {"version": "0.5", "multiscales": scales, "omero": {"channels": channels}}

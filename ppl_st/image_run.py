"""A fitted method on sections of tissue: a `Run` that answers for any place of an image, and keeps its sections in the run folder.

    run.at(target=..., section="A")     the same run looking at other spots of section A; .predict, .write, .to_arviz as of any run
    run.at(target=..., image="new.jpg") ... of an image without counts
    run.areas() / run.cells(labels)     ... at the annotated regions, or at the cells of a label image
    run.maps("maps.zarr", genes)        mean and sd of every pixel, OME-Zarr
    run.novelty()                       how unlike the fit's images every tile of this one is
    run.lies_over()                     the section of the fit that this image lies over, if they are serial sections
    run.differential("tumor", "stroma") posterior log2 fold changes between annotated regions
    run.summary()                       the activities' principal components as colors, the same in all sections

In the folder of the run ``target.h5ad`` holds the spots of all sections (``obs["section"]``) and ``sections.npz`` images, label maps, masks and
annotations: `ppl_st.load` needs nothing else.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.data import Counts, read_counts
from ppl_st.errors import UserError
from ppl_st.image_maps import Activities, ome
from ppl_st.images import Source, label_image, nearest
from ppl_st.io import atomic, refuse_inputs, refuse_suffix
from ppl_st.models.xfuse.data import Data, Section
from ppl_st.posterior import Run
from ppl_st.prepare.xfuse import new_image, refuse_cut, section_at
from ppl_st.run_folder import inputs_of, read_arrays, write_json, write_text
from ppl_st.slides import positions

__all__ = ["ImageRun", "read_sections", "spots_of", "write_inputs"]

CHUNK = 512  # pixels a side of a chunk of a map
NOVELTY_TILE = 32
SAMPLED = 2**15  # pixels of a section on which the colors of summaries are found
PIXELS, GENES = 2048, 64  # of the blocks in which maps are computed, at most: they stay in the processor's cache


@dataclass(frozen=True, repr=False)
class ImageRun(Run):
    """See the module's docstring. ``target`` holds the rows of all sections of ``data`` in their order, virtual measurements left out.

    ``fitted`` are the sections of the fit where ``data`` is another one (None: ``data``).
    """

    fitted: Data | None = None

    def at(
        self,
        target: str | Path | ad.AnnData | None = None,
        *,
        section: str | None = None,
        image: Source | None = None,
        radius: float | None = None,
        scale: float | None = None,
        mask: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> "ImageRun":
        """The run looking at other spots: of a section of the fit, or of a new image.

        Parameters
        ----------
        target
            AnnData with ``obsm["spatial"]`` in the coordinates of the section, or of the new image; its counts are ignored. None: no spots.
        section
            Name; may be left out where the fit has one section.
        image, scale
            A new image, and working pixels per pixel of it (by default as the sections of the fit were shrunk).
        mask
            The tissue of a new image: a file over it that is not 0 there, or "none": all of it. None: found, or all of it where the fit's is "none".
        radius
            Of the spots in coordinates; None: what the target says in scanpy's convention, unless the fit was told (``input.radius``); else as in
            the fit. Whether they are squares goes likewise, by ``input.spot``.
        say
            Receives a line about what is seen of a new image, and one where it looks of another resolution than the fit's sections.

        Raises
        ------
        UserError
            If places overlap or are cut, so that they would get too few counts: each pixel counts for one place.
        """
        names, xy, told, square = (np.zeros(0, str), np.zeros((0, 2)), None, None) if target is None else positions(target)
        if radius is None and self.config.input.radius is None:
            radius = told
        square = square if self.config.input.spot == "auto" else None
        if image is not None:
            if section is not None:
                raise UserError("section and image exclude each other: a new image is no section of the fit")
            taken = {one.name for data in (self.data, self.fitted) if data is not None for one in data.sections}
            name = next(name for name in ("new", *(f"new{k}" for k in range(2, 1000))) if name not in taken)
            like = self.data if self.fitted is None else self.fitted
            base = new_image(image, like, self.config.input, say, name=name, scale=scale, mask=mask)
        else:
            base = self.section(section)
        asked = section_at(base, xy, radius, square)
        refuse_cut(asked, names)
        seen = self.looking(asked, names, xy)
        spots_alike = image is None and asked.square == base.square and np.isclose(asked.radius, base.radius)
        return seen if spots_alike else replace(seen, inner=None, recalibration=None)

    def areas(self, section: str | None = None) -> "ImageRun":
        """The run looking at the annotated regions of a section; their counts are sums over all of their pixels."""
        one = self.section(section)
        if one.annotation is None or not one.regions:
            raise UserError(f"section {one.name!r} has no annotation; fit with --set input.annotation=...")
        return self._at_labels(one, one.annotation, np.array(one.regions))

    def cells(
        self, labels: str | Path | NDArray[Any], section: str | None = None, *, say: Callable[[str], None] = lambda line: None
    ) -> "ImageRun":
        """The run looking at the cells of a label image (0: none, else the cell), an array as large as the section or a file over its whole image.

        Of a file, cells that lie partly beyond the section are left out, and so are those that hold no pixel; ``say`` gets a line about each.
        """
        one = self.section(section)
        found = np.asarray(labels) if not isinstance(labels, str | Path) else _cells_of(Path(labels), one, say)
        if found.shape != one.label.shape:
            raise UserError(f"cells: labels have shape {found.shape}, section {one.name!r} has {one.label.shape}")
        values, index = np.unique(found, return_inverse=True)
        known = values > 0
        if not known.any():
            raise UserError(f"cells: no label above 0 lies wholly in section {one.name!r}")
        ranks = np.cumsum(known) * known
        return self._at_labels(one, ranks[index].reshape(found.shape), values[known].astype(str))

    def section(self, name: str | None = None) -> Section:
        """A section of the fit by its name; None where there is only one."""
        names = [one.name for one in self.data.sections]
        if name is None and len(names) == 1:
            return self.data.sections[0]
        if name not in names:
            raise UserError(f"{'--section is missing' if name is None else f'no section {name!r}'}; the run has {', '.join(names)}")
        return self.data.sections[names.index(name)]

    def maps(
        self,
        path: str | Path,
        genes: Sequence[str] | None = None,
        *,
        section: str | None = None,
        draws: int = 20,
        quantiles: bool = False,
        seed: int = 0,
        memory_gb: float = 1.0,
    ) -> tuple[int, int, int]:
        """Write expected counts per pixel of ``genes`` as zarr ``mean``, ``sd`` (and ``q05``, ``q95``) [gene, y, x] in chunks of one gene; the shape.

        The group is OME-Zarr 0.5: each array is an image of ``multiscales`` (one level) with the size and place of its pixels, channels are genes.
        Of an image without counts ``novelty`` [tile y, tile x] is written too (see `novelty`).
        Mean, sd and quantiles are over joint posterior draws of the rate. The activities of all draws lie in a scratch file beside ``path``; then
        any gene is a product of matrices, in blocks that stay in the cache. ``memory_gb`` bounds the genes that are mapped at once.
        """
        import zarr
        from zarr.codecs import BloscCodec

        refuse_suffix(path, (".zarr",))
        refuse_inputs(path, self.manifest)
        one = self.section(section)
        index = self._index(genes)
        height, width = one.label.shape
        shape = (len(index), height, width)
        names = ["mean", "sd", *(("q05", "q95") if quantiles else ())]
        wide = int(np.clip(memory_gb * 1e9 / (4 * one.label.size * len(names)), 1, GENES))
        with atomic(path) as temporary, Activities(self, one, index, draws, seed, Path(path).parent) as kept:
            group = zarr.open_group(str(temporary), mode="w")
            arrays = {
                name: group.create_array(
                    name, shape=shape, chunks=(1, min(CHUNK, height), min(CHUNK, width)), dtype="f4", dimension_names=("c", "y", "x"),
                    compressors=BloscCodec(cname="lz4", clevel=1, shuffle="shuffle"),  # gzip and zstd cost more than the maps
                )
                for name in names
            }
            top = np.zeros(len(index))
            for first in range(0, len(index), wide):
                part = slice(first, min(first + wide, len(index)))
                block = {name: np.empty((part.stop - first, height * width), np.float32) for name in names}
                for start in range(0, height * width, PIXELS):
                    pixels = slice(start, min(start + PIXELS, height * width))
                    for name, values in kept.moments(pixels, part, quantiles).items():
                        block[name][:, pixels] = values
                top[part] = block["mean"].max(1)
                for name, array in arrays.items():
                    array[part] = block[name].reshape(-1, height, width)
            if self.fitted is not None and one.counts.shape[0] == 0 and one.name not in {known.name for known in self.fitted.sections}:
                unlike = self.novelty().astype(np.float32)
                group.create_array("novelty", data=unlike, dimension_names=("tile_y", "tile_x")).attrs["pixels_per_tile"] = NOVELTY_TILE
            group.attrs.update(
                ome=ome(one, names, self.genes[index].tolist(), top),
                genes=self.genes[index].tolist(), section=one.name, unit="expected counts per pixel", draws=draws,
                micron_per_pixel=None if np.isnan(one.micron) else float(one.micron), scale=float(one.scale),
                origin=[float(v) for v in one.origin], manifest=json.dumps(self.manifest),
            )  # fmt: skip
        return shape

    def lies_over(self, *, section: str | None = None) -> tuple[str, float] | None:
        """The section of the fit that this one, or a new image, lies over (serial sections), and the correlation of their spatial fields; None: over
        none.

        So far what the spots of one say holds for the other at the same place of the tissue: as far as the images agree, and the spots of serial
        sections in the fit, if there are.
        """
        one = self.data._replace(sections=(self.section(section),))
        found: tuple[str, float] | None = self.module.lies_over(self.module.Predictor(self.pair, one, self.config, self.spec), 0)
        return found

    def novelty(self, *, section: str | None = None) -> NDArray[np.float64]:
        """Of every tile of `NOVELTY_TILE` pixels a side: the share of the fit's tiles that are more like the others [tiles y, tiles x].

        About .5 where it is like the fit's; near 1 nothing like it was in the fit, and what is predicted there is extrapolation. NaN off the tissue.
        """
        fitted = self.data if self.fitted is None else self.fitted
        return np.asarray(self.module.novelty([self.section(section)], fitted.sections, NOVELTY_TILE)[0])

    def differential(
        self, first: str, second: str, genes: Sequence[str] | None = None, *, draws: int = 50, seed: int = 0
    ) -> pd.DataFrame:
        """Posterior log2 fold change of every gene's share of the expression between two annotated regions, pooled over sections.

        Returns
        -------
        DataFrame [genes]
            log2_fold_change (mean over draws), sd, q05, q95, probability_up (share of draws above 0) and ratio, |mean| / sd, which ranks.
        """
        wanted = self._index(genes)
        if first == second:
            raise UserError(f"differential: {first!r} is compared with itself; name two annotated regions")
        every = np.arange(len(self.genes))
        regions = [(n, one) for n, one in enumerate(self.data.sections) if one.annotation is not None]
        for name in (first, second):
            if not any(name in one.regions for _, one in regions):
                known = sorted({region for _, one in regions for region in one.regions})
                raise UserError(f"no region {name!r} in the annotation; there are {', '.join(known) or 'none: fit with --set input.annotation=...'}")
        expected = np.zeros((draws, 2, len(every)))
        predictor = self.module.Predictor(self.pair, self.data, self.config, self.spec)
        for draw in self.module.maps(predictor, every, draws, seed, [n for n, _ in regions]):
            one = self.data.sections[draw.section]
            flat = draw.activity.flatten(1).numpy()
            for k, name in enumerate((first, second)):
                inside: Any = np.flatnonzero((one.annotation == one.regions.index(name) + 1).ravel()) if name in one.regions else []
                expected[draw.draw, k] += flat[:, inside].sum(1, dtype=np.float64) @ draw.shape.double().numpy() * np.exp(draw.odds.double().numpy())
        share = np.log2(np.maximum(expected, 1e-300) / np.maximum(expected.sum(2, keepdims=True), 1e-300))
        change = (share[:, 0] - share[:, 1])[:, wanted]
        table = pd.DataFrame(index=pd.Index(self.genes[wanted], name="gene"))
        table["log2_fold_change"], table["sd"] = change.mean(0), change.std(0, ddof=1)
        table["q05"], table["q95"] = np.quantile(change, 0.05, axis=0), np.quantile(change, 0.95, axis=0)
        table["probability_up"] = (change > 0).mean(0)
        table["ratio"] = table["log2_fold_change"].abs() / table["sd"].clip(lower=1e-12)
        return table.sort_values("ratio", ascending=False)

    def summary(self, *, section: str | None = None, draws: int = 10, seed: int = 0) -> NDArray[np.uint8]:
        """The section as a picture [H, W, 3]: the first three principal components of the mean metagene shares as colors, black off the tissue.

        Components and the ends of the colors are those of all sections of the fit together (of at most `SAMPLED` pixels of tissue of each, picked by
        ``seed``), so that one color is one mixture of metagenes in every section and new image. In each component the largest entry is positive.
        """
        one, fit = self.section(section), self.data if self.fitted is None else self.fitted
        shares, sample = None, []
        for n, other in enumerate(fit.sections):
            found = self._shares(fit, n, draws, seed)
            on = np.flatnonzero(other.mask) if other.mask.any() else np.arange(other.mask.size)
            sample.append(found[np.random.default_rng([seed, 41, n]).permutation(on)[:SAMPLED]])
            if other.name == one.name:
                shares = found
        if shares is None:  # a new image
            shares = self._shares(self.data._replace(sections=(one,)), 0, draws, seed)
        known = np.concatenate(sample).astype(np.float64)
        middle = known.mean(0)
        axes = np.linalg.eigh((known - middle).T @ (known - middle))[1][:, ::-1][:, :3]
        axes *= np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
        low, high = np.quantile((known - middle) @ axes, (0.01, 0.99), axis=0)
        color = np.zeros((len(shares), 3))
        score = shares @ axes.astype(np.float32) - middle @ axes
        color[:, : axes.shape[1]] = ((score - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        on = one.mask if one.mask.any() else np.ones_like(one.mask)
        return np.rint(255 * color * on.reshape(-1, 1)).astype(np.uint8).reshape(*one.mask.shape, 3)

    def _shares(self, data: Data, number: int, draws: int, seed: int) -> NDArray[np.float32]:
        """Mean share of each metagene in every pixel of a section of ``data`` [H W, M]."""
        predictor = self.module.Predictor(self.pair, data, self.config, self.spec)
        total = np.zeros((self.config.metagenes, data.sections[number].mask.size), np.float32)
        for draw in self.module.maps(predictor, np.zeros(0, np.int64), draws, seed, [number]):
            activity = draw.activity.flatten(1).numpy()
            total += activity / np.maximum(activity.sum(0), 1e-30) / draws
        return total.T

    def _index(self, genes: Sequence[str] | NDArray[np.str_] | None) -> NDArray[np.int64]:
        return np.arange(len(self.genes)) if genes is None else super()._index(genes)

    def _other(self, target: str | Path | ad.AnnData | None) -> tuple[Run, Any, Counts]:
        other = self if target is None else self.at(target)
        return other, other.data, other.target

    def _at_labels(self, section: Section, label: NDArray[Any], names: NDArray[np.str_]) -> "ImageRun":
        flat, (i, j) = label.ravel(), np.indices(label.shape).reshape(2, -1) + 0.5
        size = np.maximum(np.bincount(flat, minlength=len(names) + 1)[1:], 1)
        middle = np.stack([np.bincount(flat, axis, len(names) + 1)[1:] / size for axis in (j, i)], 1)
        xy = middle / section.scale + np.array(section.origin)
        whole = replace(self, inner=None, recalibration=None)  # it was learned on spots
        return whole.looking(section.at(label, middle), names, xy)

    def looking(self, section: Section, names: NDArray[np.str_], xy: NDArray[np.float64]) -> "ImageRun":
        """The run looking at the measurements of ``section``, in which no gene was measured; ``obs["tissue"]`` is the share of them on its mask."""
        label = section.label.ravel()
        size, on = (np.bincount(label, weights, len(names) + 1)[1:] for weights in (None, section.mask.ravel()))
        obs = pd.DataFrame({"section": section.name, "pixels": size, "tissue": on / np.maximum(size, 1)}, index=names)
        counts = Counts(_empty(len(names), 0), np.zeros(0, str), names, xy, obs, section.name, "X")
        fitted = self.data if self.fitted is None else self.fitted
        return replace(self, data=self.data._replace(sections=(section,)), target=counts, fitted=fitted)


def _empty(rows: int, genes: int) -> sp.csr_matrix:
    shape: Any = (rows, genes)  # the stubs do not know csr_matrix(shape)
    return sp.csr_matrix(shape, dtype=np.float32)


def _cells_of(path: Path, section: Section, say: Callable[[str], None]) -> NDArray[Any]:
    """Labels [H, W] of the cells that lie wholly in a section, from a label image over its whole image."""
    if not section.frame[0]:
        raise UserError(f"section {section.name!r}: the run does not know the size of its whole image; fit again with this version")
    fine = label_image(path, section.frame)
    ends = []  # first and last pixel along each axis: of the section, and of it in the file
    for size, whole, length, origin in zip(fine.shape, section.frame, section.label.shape, reversed(section.origin), strict=True):
        first = round(origin * section.scale)
        ends.append((slice(first, first + length), slice(first * size // whole, -(-(first + length) * size // whole))))
    (rows, fine_rows), (columns, fine_columns) = ends
    rest = fine[: fine_rows.start], fine[fine_rows.stop :], fine[fine_rows, : fine_columns.start], fine[fine_rows, fine_columns.stop :]
    within = _positive(fine[fine_rows, fine_columns])
    cut = np.intersect1d(within, np.concatenate([_positive(part) for part in rest]))
    whole_ones = np.setdiff1d(within, cut)
    found = nearest(fine, section.frame)[rows, columns]
    found = np.where(np.isin(found, cut), 0, found)
    if len(cut):
        say(f"{len(cut)} of {len(within)} cells lie partly beyond the part of the image that section {section.name!r} covers, and are left out")
    gone = len(np.setdiff1d(whole_ones, found))
    if gone:
        pixel = "" if np.isnan(section.micron) else f" ({section.micron:.3g} um each)"
        lost = f"{gone} of {len(whole_ones)} cells hold no pixel{pixel}; fit with a larger input.pitch"
        if 2 * gone > len(whole_ones):
            raise UserError(f"cells ({path}): {lost}")
        say(lost)
    return found


def _positive(labels: NDArray[Any]) -> NDArray[Any]:
    """The labels above 0 that there are."""
    values = pd.unique(labels.ravel())
    return np.asarray(values[values > 0])


# ---- sections and spots ----


def spots_of(data: Data, kept: Sequence[Counts]) -> Counts:
    """The rows of all sections as one table: names unique (with the section's name where they are not), ``obs["section"]``.

    An obs column "scale" becomes "target_scale": predictions have a scale of their own.
    """
    names = np.concatenate([one.names for one in kept])
    if len(set(names.tolist())) < len(names):
        names = np.concatenate([[f"{s.name}:{name}" for name in one.names] for s, one in zip(data.sections, kept, strict=True)])
    tables = [
        one.obs.dropna(axis=1, how="all").rename(columns={"scale": "target_scale"}).assign(section=s.name)
        for s, one in zip(data.sections, kept, strict=True)
    ]
    obs = pd.concat(tables).set_axis(pd.Index(names.astype(str)))
    xy = np.concatenate([one.xy for one in kept if one.xy is not None])
    matrix = sp.csr_matrix(sp.vstack([one.matrix for one in kept], dtype=np.float32))
    return Counts(matrix, data.genes, names.astype(str), xy, obs, ", ".join(one.source for one in kept), kept[0].key)


def write_inputs(folder: Path, config: Any, manifest: dict[str, Any], spots: Counts, data: Data) -> None:
    """Begin a run folder, or leave none behind: everything that a resumed fit needs except the state."""
    from ppl_st import config as configs

    fields: list[dict[str, Any]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for n, one in enumerate(data.sections):
        values = one._asdict()
        del values["counts"]  # in target.h5ad
        arrays |= {f"{n}/{name}": value for name, value in values.items() if isinstance(value, np.ndarray)}
        fields.append({name: value for name, value in values.items() if not isinstance(value, np.ndarray)})
    with inputs_of(folder, {"target": spots}):
        with atomic(folder / "sections.npz") as temporary:
            np.savez_compressed(temporary, allow_pickle=False, about=np.array(json.dumps([fields, data.covariates])), **arrays)
        write_text(folder / "genes.txt", "\n".join(["# gene\tmeasured in the target", *(f"{gene}\t1" for gene in data.genes)]) + "\n")
        write_json(folder / "manifest.json", manifest)
        configs.write(config, folder / "config.toml")  # last: a folder that has it can be resumed


def read_sections(folder: Path) -> tuple[Data, Counts]:
    """What `write_inputs` wrote."""
    spots = read_counts(folder / "target.h5ad", role="target", layer="X")
    arrays = read_arrays(folder / "sections.npz")
    fields, covariates = json.loads(str(arrays.pop("about")))
    sections = []
    for n, (values, matrix) in enumerate(zip(fields, _split(spots, fields), strict=True)):
        values |= {name.partition("/")[2]: array for name, array in arrays.items() if name.startswith(f"{n}/")}
        values["counts"] = matrix if values["virtual"] < 0 else sp.csr_matrix(sp.vstack([matrix, _empty(1, matrix.shape[1])], dtype=np.float32))
        values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}  # regions, origin, frame
        sections.append(Section(**values))
    return Data(tuple(sections), spots.genes, {key: tuple(names) for key, names in covariates.items()}), spots


def _split(spots: Counts, fields: Sequence[dict[str, Any]]) -> Iterator[sp.csr_matrix]:
    section = spots.obs["section"].astype(str).to_numpy()
    for values in fields:
        yield sp.csr_matrix(spots.matrix[section == values["name"]])

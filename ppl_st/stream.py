"""Tables that reach the disk while they are computed: a prediction of a million cells never exists in memory.

A predictor gives blocks of rows, in whatever order its method infers cells in; a file wants its rows in slabs, in order. `Slabs` stands
between: rows that follow the last ones wait in one slab of memory, and from the first row out of turn on, rows wait in a nameless scratch
file beside the output (raw float32), from which the slabs are read at the end. So memory is one slab per layer whatever the order.

A table is the AnnData of `ppl_st.posterior.Run.predict`, as ``.zarr`` or ``.h5ad``: ``X`` and ``layers/<name>`` are chunked [cell, gene] arrays that
anndata reads back at once or lazily, and that xarray opens lazily with ``xr.open_zarr(path, group="layers")``.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import anndata as ad
import h5py  # type: ignore[import-untyped]
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st.inference.predict import QUANTILES, Summary, fits_of_draws, predictive_blocks
from ppl_st.io import atomic, free_bytes, hdf5_target, refuse_inputs, refuse_suffix, storable

if TYPE_CHECKING:
    from ppl_st.posterior import Run

__all__ = ["Slabs", "layers_of", "var_of", "varm_of", "write_prediction", "write_samples", "write_table", "write_whole"]

SLAB_VALUES = 2**23  # float32 values of one slab: 32 MiB per layer
MIN_SLAB, MAX_SLAB = 64, 16384  # rows
PATIENCE = 30.0  # seconds between two lines about progress
GENE_CHUNK = 64  # genes of a chunk, so that the map of one gene is read from few bytes


class Slabs:
    """Rows that come in any order, each exactly once, go out in order, in slabs.

    Parameters
    ----------
    write
        Receives (slice of the rows, values [rows, ...]) of each slab, in order.
    rows, shape
        Number of rows; shape of one row.
    slab
        Rows of a slab.
    folder
        Where the scratch file goes if one is needed; it has no name and vanishes with the process.
    """

    def __init__(
        self, write: Callable[[slice, NDArray[np.float32]], None], rows: int, shape: tuple[int, ...], slab: int, folder: Path
    ) -> None:
        self.write, self.rows, self.folder = write, rows, folder
        self.buffer = np.empty((min(slab, rows), *shape), dtype=np.float32)
        self.row_bytes = 4 * int(np.prod(shape))
        self.done = self.filled = self.received = 0  # rows written; waiting in the buffer; seen at all
        self.scratch: IO[bytes] | None = None

    def put(self, rows: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Take ``values`` [len(rows), ...] of these rows."""
        self.received += len(rows)
        following = self.done + self.filled
        if self.scratch is None and np.array_equal(rows, np.arange(following, following + len(rows))):
            while len(values):
                room = len(self.buffer) - self.filled
                part, values = values[:room], values[room:]
                self.buffer[self.filled : self.filled + len(part)] = part
                self._filled(len(part))
            return
        if self.scratch is None:
            self.scratch = tempfile.TemporaryFile(dir=self.folder)
        order = np.argsort(rows)
        for near in np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1):  # neighbours in one piece
            self.scratch.seek(int(rows[near[0]]) * self.row_bytes)
            self.scratch.write(np.ascontiguousarray(values[near], dtype=np.float32).data)

    def close(self) -> None:
        """Write what still waits."""
        assert self.received == self.rows, f"{self.received} of {self.rows} rows came"
        if self.scratch is not None:
            self.scratch.seek((self.done + self.filled) * self.row_bytes)
            while self.done + self.filled < self.rows:
                stop = min(len(self.buffer), self.rows - self.done)
                part = self.buffer[self.filled : stop]
                part[:] = np.frombuffer(self.scratch.read(part.nbytes), np.float32).reshape(part.shape)
                self._filled(len(part))
            self.scratch.close()
        if self.filled:
            self._flush()

    def _filled(self, rows: int) -> None:
        self.filled += rows
        if self.filled == len(self.buffer):
            self._flush()

    def _flush(self) -> None:
        self.write(slice(self.done, self.done + self.filled), self.buffer[: self.filled])
        self.done, self.filled = self.done + self.filled, 0


def write_prediction(
    run: "Run",
    path: str | Path,
    predictor: Any,
    index: NDArray[np.int64],
    counts: Any,
    ends: NDArray[np.float64] | None,
    *,
    own: bool,
    draws: int,
    seed: int,
    memory_gb: float,
    say: Callable[[str], None],
) -> tuple[int, int]:
    """Write the summaries of the genes ``index`` in the cells of ``counts`` (``own``: those of the fit); see `ppl_st.posterior.Run.write`."""
    refuse_suffix(path)
    refuse_inputs(path, run.manifest)
    n, several = predictor.n_cells, fits_of_draws(predictor, predictor.chains, draws) is not None
    moments = np.zeros((4, len(index)))  # per gene: sums of the rate, its square, its variance, the part of that between fits

    def blocks() -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]]:
        whole: dict[str, NDArray[np.float32]] = {}
        done, tell = 0, _pace(n, say)
        for rows, part, summary, _ in predictive_blocks(
            predictor, predictor.chains, index, draws=draws, seed=seed, memory_gb=memory_gb, ends=ends
        ):
            layers = layers_of(summary)
            rate = layers["rate_mean"].astype(np.float64)
            doubt, between = (np.square(layers.get(name, np.zeros((0, 1))), dtype=np.float64).sum(0) for name in ("rate_sd", "between_sd"))
            moments[:, part] += np.stack(np.broadcast_arrays(rate.sum(0), (rate**2).sum(0), doubt, between))
            if part.start == 0:
                whole = {name: np.empty((len(rows), len(index)), np.float32) for name in layers}
            for name, values in layers.items():
                whole[name][:, part] = values
            if part.stop == len(index):
                yield rows, whole
                done += len(rows)
                tell(done)

    def var() -> pd.DataFrame:
        rate, square, doubt, between = moments / max(1, n)
        return var_of(run, index, rate, np.maximum(square - rate**2, 0), (doubt, between) if several else None, ends)

    obs, obsm = counts.obs.set_axis(pd.Index(counts.names)), {} if counts.xy is None else {"spatial": counts.xy}
    if own:
        more, columns = run.module.quantities(run.pair, run.data, run.config, run.spec)
        obs, obsm = obs.assign(**columns), obsm | more
    names = ["rate_mean", "rate_sd", "count_sd", *(["between_sd"] if several else []), *QUANTILES, *([] if ends is None else ["lower", "upper"])]
    size, free = 4e-9 * n * len(index) * (1 + len(names)), free_bytes(path) / 1e9
    if ends is not None and (beyond := (ends[1] * (draws + 1) > draws) & (ends[1] < 1)).any():
        needed = int(np.ceil(round(float((ends[1] / (1 - ends[1]))[beyond].max()), 6)))
        say(f"upper ends of {int(beyond.sum())} genes lie beyond {draws} draws and are infinite; with --draws {needed} they are finite")
    say(f"{n} cells x {len(index)} genes, {draws} draws: {size:.1f} GB before compression, {free:.1f} GB are free there")
    varm, uns = varm_of(run, index)
    write_table(path, obs, obsm, {"ppl_st": json.dumps(run.manifest | {"draws": draws}), **uns}, run.genes[index], names, blocks(), var, varm)
    return n, len(index)


def _pace(n: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """A function that is told how many of n cells are done, and now and then says so and how long the rest may take."""
    started = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= PATIENCE and done < n:
            told = now
            say(f"{done} of {n} cells, about {(now - started) * (n - done) / done / 60:.1f} minutes left")

    return tell


def layers_of(summary: Summary) -> dict[str, NDArray[np.float32]]:
    """The arrays of a summary by the names that `ppl_st.posterior.Run.predict` gives them."""
    layers = {"rate_mean": summary.rate_mean, "rate_sd": summary.rate_sd, "count_sd": summary.count_sd}
    for name, values in (("between_sd", summary.between_sd), ("lognorm_mean", summary.lognorm_mean)):
        if values is not None:
            layers[name] = values
    return layers | summary.quantiles


def var_of(
    run: "Run",
    index: NDArray[np.int64],
    mean: NDArray[np.float64],
    spread: NDArray[np.float64],
    doubt: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
    ends: NDArray[np.float64] | None,
) -> pd.DataFrame:
    """What is known of the genes, from mean and variance over cells of the predicted rate; ``doubt``: mean over cells of rate_sd^2, between_sd^2.

    ``trust`` is the squared correlation that Poisson counts around the predicted rates would have with them. What the model does not know of a
    gene's level or dispersion is left out: a level does not lower a correlation, a dispersion that was never seen is a guess; both made the ranking
    of genes worse (RECORD.md). ``between_fits`` is the share of the doubt about the rate that comes from fits (seeds, chains) which disagree.
    """
    var = pd.DataFrame({"measured": run.measured[index]}, index=run.genes[index])
    var["trust"] = spread / np.maximum(spread + mean, 1e-12)
    if doubt is not None:
        var["between_fits"] = doubt[1] / np.maximum(doubt[0], 1e-300)
    return var if ends is None else var.assign(nominal_level=ends[1] - ends[0])


def varm_of(run: "Run", index: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.float32]], dict[str, dict[str, str]]]:
    """``varm`` of these genes and its ``uns["units"]``: of methods with `profiles`, as they are for these genes; else nothing."""
    if not hasattr(run.module, "profiles"):
        return {}, {}
    tables, units = run.module.profiles(run.pair, run.config)
    return {name: values[index] for name, values in tables.items()}, {"units": units}


def write_table(
    path: str | Path,
    obs: pd.DataFrame,
    obsm: Mapping[str, Any],
    uns: Mapping[str, Any],
    genes: NDArray[np.str_],
    layers: Iterable[str],
    blocks: Iterable[tuple[NDArray[np.int64], Mapping[str, NDArray[np.float32]]]],
    var: Callable[[], pd.DataFrame],
    varm: Mapping[str, NDArray[np.float32]],
) -> None:
    """Write an AnnData block by block to ``.zarr`` or ``.h5ad``: the whole of it or nothing.

    Parameters
    ----------
    obs, obsm, uns
        Of the AnnData, [n] rows.
    genes
        Names of its columns, [g].
    layers
        Names of the arrays [n, g] in every block; the first is ``X`` as well.
    blocks
        (rows, name -> values [rows, g]) until every row came once.
    var
        Called at the end: table [g] of what is known of the genes after all blocks.
    varm
        Of the AnnData, [g] rows.
    """
    path = Path(path)
    refuse_suffix(path)
    names, n, g = list(layers), len(obs), len(genes)
    rows, columns = _chunk(n, g)
    with atomic(path) as temporary, _store(temporary) as store:
        skeleton = ad.AnnData(obs=storable(obs), var=pd.DataFrame(index=genes), obsm=dict(obsm), varm=dict(varm), uns=dict(uns))
        ad.io.write_elem(store, "/", skeleton)
        arrays = {name: _array(store, name, (n, g), (rows, columns)) for name in ("X", *(f"layers/{one}" for one in names))}
        slabs = {name: Slabs(_writer(arrays, name, name == names[0]), n, (g,), rows, path.parent) for name in names}
        for at, values in blocks:
            for name, slab in slabs.items():
                slab.put(at, values[name])
        for slab in slabs.values():
            slab.close()
        ad.io.write_elem(store, "var", var())


def write_whole(table: ad.AnnData, path: str | Path) -> None:
    """Write an AnnData of dense arrays that is in memory as `write_table` does; its ``X`` is the layer "mean" as well."""
    layers: dict[str, Any] = {"mean": table.X, **table.layers}
    write_table(
        path, table.obs, table.obsm, table.uns, np.asarray(table.var_names, dtype=str), layers, [(np.arange(table.n_obs), layers)],
        lambda: table.var, table.varm,
    )  # fmt: skip


def write_samples(
    path: str | Path,
    cells: NDArray[np.str_],
    genes: NDArray[np.str_],
    samples: int,
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    manifest: Mapping[str, Any],
    memory_gb: float = 1.0,
) -> None:
    """Write ``count[sample, cell, gene]`` as a zarr store from blocks (rows, counts [samples, rows, genes]): the whole of it or nothing.

    ``memory_gb`` bounds the rows that wait for their turn.
    """
    import zarr

    refuse_suffix(path, (".zarr",))
    refuse_inputs(path, manifest)
    path = Path(path)
    rows = _chunk(len(cells), len(genes))[0]
    fitting = int(memory_gb * 1e9 / (4 * samples * len(genes)))
    slab = max(1, min(fitting, max(min(MIN_SLAB, rows), rows // samples)))
    columns = int(min(len(genes), max(GENE_CHUNK, 2**20 // slab)))
    with atomic(path) as temporary:
        group = zarr.open_group(str(temporary), mode="w")
        array = group.create_array(
            "count",
            shape=(samples, len(cells), len(genes)),
            chunks=(1, slab, columns),
            dtype="f4",
            dimension_names=("sample", "cell", "gene"),
        )

        def write(at: slice, values: NDArray[np.float32]) -> None:
            array[:, at] = values.swapaxes(0, 1)

        waiting = Slabs(write, len(cells), (samples, len(genes)), slab, path.parent)
        for at, counts in blocks:
            waiting.put(at, counts.swapaxes(0, 1))
        waiting.close()
        group.attrs.update(cells=cells.tolist(), genes=genes.tolist(), manifest=json.dumps(manifest))


# ---- helpers ----


def _chunk(n: int, g: int) -> tuple[int, int]:
    """Rows and columns of a chunk; a slab is as many rows of all genes."""
    rows = int(min(max(1, n), np.clip(SLAB_VALUES // max(1, g), MIN_SLAB, MAX_SLAB)))
    return rows, int(min(max(1, g), max(GENE_CHUNK, 2**20 // rows)))


@contextmanager
def _store(path: Path) -> Iterator[Any]:
    """An empty zarr (format 2, as anndata writes) or HDF5 store, by suffix."""
    if path.suffix.lower() == ".zarr":
        import zarr

        yield zarr.open_group(str(path), mode="w", zarr_format=2)
        zarr.consolidate_metadata(str(path), zarr_format=2)
        return
    with hdf5_target(path) as target, h5py.File(target, "w") as file:
        yield file


def _array(store: Any, name: str, shape: tuple[int, int], chunks: tuple[int, int]) -> Any:
    if isinstance(store, h5py.File):
        array = store.create_dataset(name, shape=shape, chunks=chunks, dtype="f4", compression="gzip", compression_opts=1)
    else:
        array = store.create_array(name, shape=shape, chunks=chunks, dtype="f4", fill_value=None)  # xarray would read the fill value as missing
        array.attrs["_ARRAY_DIMENSIONS"] = ["cell", "gene"]  # for xarray
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # for anndata
    return array


def _writer(arrays: Mapping[str, Any], name: str, first: bool) -> Callable[[slice, NDArray[np.float32]], None]:
    def write(rows: slice, values: NDArray[np.float32]) -> None:
        arrays[f"layers/{name}"][rows] = values
        if first:
            arrays["X"][rows] = values

    return write

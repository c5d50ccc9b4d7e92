"""A run as xarray Datasets in ArviZ's schema, built by hand so that ArviZ 0.x (InferenceData) and 1.x (DataTree) read the same file.

posterior             global sites [chain, draw, ...]; chain = independent variational fit (not MCMC: no R-hat). Of a stack, whose runs have different
                      sites: run [chain, draw], the number of the run behind each draw of the mixture, one chain
posterior_predictive  x [chain, draw, cell, panel_gene] counts of measured genes in a seeded subset of cells; library [chain, draw, cell] their sum
observed_data         x [cell, panel_gene] what was measured there, library [cell]
log_likelihood        library [chain, draw, cell]: log p(x_cell | draw) summed over measured genes (never cells x genes x draws). It is that of all
                      counts of a cell, the unit that `az.loo` leaves out, and has this name because `loo_pit` weights the library of a cell by it.
                      Of XFuse it, x and library are given the drawn effects that the fit's spots have had, a part of the posterior
constant_data         coordinates of the cells where the target has them, whether a gene was measured
predictions           count, rate [chain, draw, cell, gene] of genes that the target never measured (a subset when there are many); with a truth also
                      log_likelihood [chain, draw, cell], summed over all of the truth's genes that the target did not measure
predictions_constant_data   with a truth: count [cell, gene] of those genes

Where nothing was measured (XFuse's run.at, .areas and .cells) there are no posterior_predictive, observed_data and log_likelihood.

`az.loo(idata)` and `loo_pit` run, and mean little here: the counts that a cell is judged by have placed it (SpaIM and SpaGene by no sampled site at
all), and importance weights cannot take them back (Pareto k is often above .7). `az.compare` of two methods says who follows the shown counts more
closely, not who predicts better: 5,500 nats of 300 simulated cells where .002 nats an entry are the truth. Methods are compared by counts that they
were not shown: the predictions' log_likelihood, `ppl_st.compare`.

So these work as they stand: of ArviZ 0.x `plot_bpv` of x, `plot_ppc` and `loo_pit(idata, y="library")`; of ArviZ 1.x
`plot_ppc_tstat` of x, `plot_ppc_dist`, `plot_ppc_pit` and `loo_pit(idata, var_names="library")`, which needs 25 draws or more.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_st.data import Counts, matched
from ppl_st.errors import UserError
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.svi import rng_scope
from ppl_st.io import atomic, free_bytes, hdf5_target

if TYPE_CHECKING:
    import xarray as xr

    from ppl_st.posterior import Run

MAX_PREDICTED = 50  # unmeasured genes whose draws are exported
MAX_BYTES = 4e9  # of draws that are held in memory
STREAMED_BYTES = 5e8  # a .zarr with more draws is written block by block
BLOCK_CELLS = 1024  # of a block, at most
BLOCK_BYTES = 5e8  # of the draws of a block
IN_SAMPLE = (
    "Of counts that the fit saw and that placed their cells: loo, loo_pit and compare cannot take them back. Compare methods by counts that they "
    "were not shown: log_likelihood of the predictions (export with a truth), or ppl-st compare."
)


class _Plan:
    """Which draws of which cells and genes, and how to make those of one block of cells after the other.

    Attributes
    ----------
    panel, unmeasured, hidden, cells
        Columns of measured genes, of unmeasured ones whose draws are exported, of all that the truth judges; rows in rising order.
    turns, drawn
        Fit behind every draw, and global sites: [chains][draws].
    size, block
        Bytes of the draws, global sites included; cells whose draws are made at once.
    """

    def __init__(self, run: "Run", draws: int, seed: int, max_cells: int | None, truth: Counts | None) -> None:
        self.run, self.seed, self.draws, self.truth = run, seed, draws, truth
        self.predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
        if getattr(self.predictor, "restrict", None) is None:
            raise UserError(
                f"{run.method}: this view of a run (as_reference, turned) predicts counts that nobody observed, and has none to set beside them; "
                "export the run itself, and of the view use predict, write or write_samples"
            )
        chains = self.predictor.chains
        self.panel = np.flatnonzero(run.measured)
        self.hidden = np.flatnonzero(~run.measured)
        if truth is not None:
            self.hidden = self.hidden[np.isin(run.genes[self.hidden], truth.genes)]
            if not self.hidden.size:
                raise UserError(f"truth ({truth.source}): none of its {len(truth.genes)} genes is unmeasured in the target and known to the run")
        self.unmeasured = self.hidden[:MAX_PREDICTED]
        self.cells = np.sort(np.random.default_rng([seed, 7]).permutation(self.predictor.n_cells)[:max_cells])
        if run.method == "stack":  # one chain, in which the runs take turns
            self.turns, self.drawn = [np.arange(draws) % len(chains)], [draw_globals(chains, draws, seed)]
        else:
            self.turns = [np.full(draws, c) for c in range(len(chains))]
            self.drawn = [draw_globals([chain], draws, seed + c) for c, chain in enumerate(chains)]
        cell = 4 * len(self.turns) * draws * (len(self.panel) + 2 * len(self.unmeasured) + 3)
        sites = [] if run.method == "stack" else [value for chain in self.drawn for one in chain for value in one.values()]
        self.size = cell * len(self.cells) + sum(value.numel() * value.element_size() for value in sites)
        self.block = int(np.clip(BLOCK_BYTES // cell, 1, BLOCK_CELLS))
        self.observed = run.target.take_genes(run.genes[self.panel]).matrix
        self.held_out = None if truth is None else matched(truth, run.target, run.genes[self.hidden])

    def empty(self, cells: int) -> dict[str, NDArray[np.float32]]:
        """Arrays [chain, draw, cell, ...] for so many cells."""
        lead = (len(self.turns), self.draws, cells)
        shapes = {"x": (len(self.panel),), "count": (len(self.unmeasured),), "rate": (len(self.unmeasured),), "log_lik": (), "held_lik": ()}
        return {name: np.zeros((*lead, *last), np.float32) for name, last in shapes.items()}

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]]:
        """(rows of the target, arrays of `empty` for them), in whatever order the method infers cells in."""
        keep = np.zeros(self.predictor.n_cells, dtype=bool)
        keep[self.cells] = True
        cells = min(BLOCK_CELLS, self.block * self.predictor.n_cells // max(1, len(self.cells)))  # of these about `block` are kept
        for b, whole in enumerate(self.predictor.blocks(cells)):
            batch = self.predictor.restrict(whole, keep)
            rows = self.predictor.rows(batch)
            if len(rows):
                yield rows, self._block(b, batch, rows)

    def _block(self, b: int, batch: Any, rows: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        made = self.empty(len(rows))
        seen = torch.from_numpy(self.observed[rows].toarray())
        truth = None if self.held_out is None else torch.from_numpy(self.held_out[rows].toarray())
        local = {c: self.predictor.local(batch, c) for c in np.unique(self.turns).tolist()}

        def dist(c: int, d: int, genes: NDArray[np.int64], made: str = "count_dist") -> Any:
            t = int(self.turns[c][d])
            return getattr(self.predictor, made)(batch, t, self.drawn[c][d], local[t], torch.from_numpy(genes))

        seen_as = "measured_dist" if hasattr(self.predictor, "measured_dist") else "count_dist"

        for c, turn in enumerate(self.turns):
            for d in range(len(turn)):
                if len(self.panel):
                    with torch.no_grad(), rng_scope(self.seed, "export", b, c, d):
                        one = dist(c, d, self.panel, seen_as)
                    with rng_scope(self.seed, "export panel", b, c, d):
                        made["x"][c, d] = one.sample().numpy()
                    made["log_lik"][c, d] = one.log_prob(seen).sum(1).numpy()
                if len(self.unmeasured):
                    with torch.no_grad(), rng_scope(self.seed, "export", b, c, d):  # the same draw of the local sites
                        one = dist(c, d, self.unmeasured)
                    with rng_scope(self.seed, "export count", b, c, d):
                        made["count"][c, d], made["rate"][c, d] = one.sample().numpy(), one.mean.numpy()
                if truth is not None:
                    with torch.no_grad(), rng_scope(self.seed, "export", b, c, d):
                        one = dist(c, d, self.hidden)
                    made["held_lik"][c, d] = one.log_prob(truth).sum(1).numpy()
        return made

    def groups(self, rows: NDArray[np.int64], made: dict[str, NDArray[np.float32]], *, first: bool = True) -> "dict[str, xr.Dataset]":
        """The datasets of these cells; the posterior, which has no cells, only where they are the ``first``."""
        import xarray as xr

        run, sample = self.run, ("chain", "draw", "cell")
        seen = self.observed[rows].toarray()
        names = {"cell": run.target.names[rows], "panel_gene": run.genes[self.panel], "gene": run.genes[self.unmeasured]}
        frames: dict[str, Any] = {"constant_data": _constant(run, rows)}
        if first:
            frames["posterior"] = _posterior(run, self.drawn) if run.method != "stack" else _runs_of(run, self.predictor.fits, self.turns)
        if len(self.panel):
            frames["posterior_predictive"] = xr.Dataset({"x": ((*sample, "panel_gene"), made["x"]), "library": (sample, made["x"].sum(-1))})
            frames["observed_data"] = xr.Dataset({"x": (("cell", "panel_gene"), seen), "library": (("cell",), seen.sum(-1))})
            frames["log_likelihood"] = xr.Dataset({"library": (sample, made["log_lik"])}, attrs={"note": IN_SAMPLE})
        if len(self.unmeasured):
            frames["predictions"] = xr.Dataset({name: ((*sample, "gene"), made[name]) for name in ("count", "rate")})
        if self.held_out is not None:
            frames["predictions"]["log_likelihood"] = (sample, made["held_lik"])
            known = self.held_out[rows].toarray()[:, : len(self.unmeasured)]
            frames["predictions_constant_data"] = xr.Dataset({"count": (("cell", "gene"), known)})
        return {name: _finish(frame, names, run, name) for name, frame in frames.items()}


def arviz_groups(run: "Run", *, draws: int, seed: int, max_cells: int | None, truth: Counts | None = None) -> "dict[str, xr.Dataset]":
    """See the module's docstring; ``draws`` per chain, ``truth`` counts of unmeasured genes in the run's cells."""
    return _in_memory(_Plan(run, draws, seed, max_cells, truth))


def _in_memory(plan: _Plan) -> "dict[str, xr.Dataset]":
    if plan.size > MAX_BYTES:
        raise UserError(
            f"export: draws of {plan.size / 1e9:.1f} GB are too many to hold (at most {MAX_BYTES / 1e9:.0f}); write them to a .zarr "
            f"(ppl-st export RUN --out posterior.zarr --cells {len(plan.cells)}), block by block, or lower --cells or --draws"
        )
    whole = plan.empty(len(plan.cells))
    for rows, made in plan.blocks():
        to = np.searchsorted(plan.cells, rows)
        for name, values in made.items():
            whole[name][:, :, to] = values
    return plan.groups(plan.cells, whole)


def write_groups(
    run: "Run", path: Path, *, draws: int, seed: int, max_cells: int | None, truth: Counts | None, say: Callable[[str], None]
) -> None:
    """Write the groups as ``.nc`` or ``.zarr``; many draws go to a ``.zarr`` block by block, cells in the order in which the method infers them."""
    import xarray as xr

    plan = _Plan(run, draws, seed, max_cells, truth)
    free = free_bytes(path)
    size = f"{plan.size / 1e9:.2g} GB before compression, {free / 1e9:.1f} GB are free there"
    say(f"{len(plan.cells)} cells, {len(plan.turns)} x {draws} draws: {size}")
    with atomic(path) as temporary:
        if path.suffix == ".zarr" and plan.size > STREAMED_BYTES:
            _append(plan, temporary)
            return
        tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in _in_memory(plan).items()})
        if path.suffix == ".zarr":
            tree.to_zarr(temporary, consolidated=False, zarr_format=2)
        else:
            write: Any = tree.to_netcdf
            with hdf5_target(temporary) as file:
                write(file, engine="h5netcdf")


def _gathered(
    blocks: Iterable[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]], cells: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]]:
    """Blocks joined until they hold so many cells: of a subset of the cells each block has few."""
    waiting: list[tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]] = []

    def joined() -> tuple[NDArray[np.int64], dict[str, NDArray[np.float32]]]:
        rows, parts = [one[0] for one in waiting], [one[1] for one in waiting]
        waiting.clear()
        return np.concatenate(rows), {name: np.concatenate([part[name] for part in parts], axis=2) for name in parts[0]}

    for block in blocks:
        waiting.append(block)
        if sum(len(rows) for rows, _ in waiting) >= cells:
            yield joined()
    if waiting:
        yield joined()


def _append(plan: _Plan, path: Path) -> None:
    """Block after block along the cells; what has no cells is written with the first."""
    import zarr

    zarr.open_group(str(path), mode="w", zarr_format=2)
    for k, (rows, made) in enumerate(_gathered(plan.blocks(), plan.block)):
        for name, frame in plan.groups(rows, made, first=k == 0).items():
            if k == 0:
                along = [v for v in frame.variables if "cell" in frame[v].dims]
                chunks: Any = {v: {"chunks": tuple(plan.block if d == "cell" else n for d, n in frame[v].sizes.items())} for v in along}
                frame.to_zarr(path, group=name, mode="a", consolidated=False, zarr_format=2, encoding=chunks)
            elif "cell" in frame.dims:
                fixed = [v for v in frame.variables if "cell" not in frame[v].dims]
                frame.drop_vars(fixed).to_zarr(path, group=name, append_dim="cell", consolidated=False, zarr_format=2)


def _runs_of(run: "Run", runs: list[int], turns: list[NDArray[np.int64]]) -> "xr.Dataset":
    import xarray as xr

    names = list(run.record["weights"])
    made = xr.Dataset({"run": (("chain", "draw"), np.array(runs)[np.stack(turns)])})
    return made.assign_attrs(runs=json.dumps(names))


def _posterior(run: "Run", drawn: list[list[dict[str, Any]]]) -> "xr.Dataset":
    import xarray as xr

    module = run.spec.runs[0].module if "seeds" in run.manifest else run.module
    dims = module.Model.DIMS
    singular = {"factors": "factor", "genes": "any_gene"}
    data = {}
    for name in drawn[0][0]:
        if len({chain[0][name].shape for chain in drawn}) > 1:  # a size that every fit chooses anew, such as a number of factors
            continue
        values = np.stack([[d[name].numpy() for d in chain] for chain in drawn])
        # A site that the method does not list is a parameter of the user's own likelihood, one per gene, or an effect: level x gene.
        listed = dims.get(name, [*(f"{name}_{k}" for k in range(values.ndim - 3)), "genes"])
        data[name] = (("chain", "draw", *(singular.get(d, d) for d in listed)), values)
    return xr.Dataset(data, coords={"any_gene": run.genes.astype(object)})


def _constant(run: "Run", cells: NDArray[np.int64]) -> "xr.Dataset":
    import xarray as xr

    made = xr.Dataset({"measured": (("any_gene",), run.measured.astype(np.int8))}, coords={"any_gene": run.genes.astype(object)})
    if run.target.xy is None:
        return made
    return made.assign(spatial=(("cell", "axis"), run.target.xy[cells])).assign_coords(axis=np.array(["x", "y"], dtype=object))


def _finish(frame: "xr.Dataset", names: dict[str, NDArray[np.str_]], run: "Run", group: str) -> "xr.Dataset":
    """Coordinates for every dimension, attributes that say what was fitted (netCDF knows no dicts: JSON)."""
    coords: dict[str, Any] = {dim: values.astype(object) for dim, values in names.items() if dim in frame.dims}
    coords |= {str(dim): np.arange(frame.sizes[dim]) for dim in frame.dims if dim not in {*coords, *frame.coords}}
    versions = run.manifest.get("versions", {})
    attrs = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "creation_library": "ppl_st",
        "creation_library_version": str(versions.get("ppl_st", "")),
        "inference_library": "pyro",
        "inference_library_version": str(versions.get("pyro-ppl", "")),
        "method": run.method,
        "chains": "one: a mixture of runs" if run.method == "stack" else "independent variational fits",
        "group": group,
        "manifest": json.dumps(run.manifest),
    }
    return frame.assign_coords(coords).assign_attrs({**attrs, **frame.attrs})

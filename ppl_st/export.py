"""A run as xarray Datasets in ArviZ's schema, built by hand so that ArviZ 0.x (InferenceData) and 1.x (DataTree) read the same file.

posterior             global sites [chain, draw, ...]; chain = independent variational fit (not MCMC: no R-hat). Of a stack, whose runs have different
                      sites: run [chain, draw], the number of the run behind each draw of the mixture, one chain
posterior_predictive  x [chain, draw, cell, panel_gene] counts of measured genes in a seeded subset of cells; library [chain, draw, cell] their sum
observed_data         x [cell, panel_gene] what was measured there, library [cell]
log_likelihood        library [chain, draw, cell]: log p(x_cell | draw) summed over measured genes (never cells x genes x draws). It is that of all
                      counts of a cell, the unit that `az.loo` leaves out, and has this name because `loo_pit` weights the library of a cell by it
constant_data         coordinates of the cells, whether a gene was measured
predictions           count, rate [chain, draw, cell, gene] of genes that the target never measured (a subset when there are many); with a truth also
                      log_likelihood [chain, draw, cell], summed over all of the truth's genes that the target did not measure
predictions_constant_data   with a truth: count [cell, gene] of those genes

So `az.loo(idata)`, `az.plot_bpv` of x, `az.plot_ppc` (ArviZ 1.x: `plot_ppc_dist`) and `az.loo_pit` of the library work as they stand.
"""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppl_st.data import Counts, matched
from ppl_st.errors import UserError
from ppl_st.inference.predict import draw_globals
from ppl_st.inference.svi import rng_scope

if TYPE_CHECKING:
    import xarray as xr

    from ppl_st.posterior import Run

MAX_PREDICTED = 50  # unmeasured genes whose draws are exported
MAX_BYTES = 4e9  # of the draws


def arviz_groups(
    run: "Run", *, draws: int, seed: int, max_cells: int, truth: Counts | None = None
) -> "dict[str, xr.Dataset]":
    """See the module's docstring; ``draws`` per chain, ``truth`` counts of unmeasured genes in the run's cells."""
    import xarray as xr

    predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
    chains = predictor.chains
    panel = np.flatnonzero(run.measured)
    unmeasured = np.flatnonzero(~run.measured)
    if truth is not None:
        unmeasured = unmeasured[np.isin(run.genes[unmeasured], truth.genes)]
        if not unmeasured.size:
            raise UserError(f"truth ({truth.source}): none of its {len(truth.genes)} genes is unmeasured in the target and known to the run")
    hidden, unmeasured = unmeasured, unmeasured[:MAX_PREDICTED]
    cells = np.sort(np.random.default_rng([seed, 7]).permutation(predictor.n_cells)[:max_cells])
    if run.method == "stack":  # one chain, in which the runs take turns
        turns, drawn = [np.arange(draws) % len(chains)], [draw_globals(chains, draws, seed)]
    else:
        turns = [np.full(draws, c) for c in range(len(chains))]
        drawn = [draw_globals([chain], draws, seed + c) for c, chain in enumerate(chains)]
    _refuse_too_much(4 * len(turns) * draws * len(cells) * (len(panel) + 2 * len(unmeasured) + 3))
    observed = run.target.take_genes(run.genes[panel]).matrix[cells].toarray()
    held_out = None if truth is None else matched(truth, run.target, run.genes[hidden])[cells].toarray()
    shape = (len(turns), draws, len(cells))
    counts = np.zeros((*shape, len(panel)), np.float32)
    log_lik, held_lik = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    predicted = {name: np.zeros((*shape, len(unmeasured)), np.float32) for name in ("count", "rate")}
    keep = np.zeros(predictor.n_cells, dtype=bool)
    keep[cells] = True
    for b, whole in enumerate(predictor.blocks(1024)):
        batch = predictor.restrict(whole, keep)
        to = np.searchsorted(cells, predictor.rows(batch))
        if not len(to):
            continue
        local = {c: predictor.local(batch, c) for c in np.unique(turns).tolist()}
        for c, turn in enumerate(turns):
            for d, t in enumerate(turn.tolist()):
                with torch.no_grad(), rng_scope(seed, "export", b, c, d):
                    dist = predictor.count_dist(batch, t, drawn[c][d], local[t], torch.from_numpy(panel))
                    counts[c, d, to] = dist.sample().numpy()
                log_lik[c, d, to] = dist.log_prob(torch.from_numpy(observed[to])).sum(1).numpy()
                if len(unmeasured):
                    with torch.no_grad(), rng_scope(seed, "export", b, c, d):  # the same draw of the local sites
                        dist = predictor.count_dist(batch, t, drawn[c][d], local[t], torch.from_numpy(unmeasured))
                        predicted["count"][c, d, to], predicted["rate"][c, d, to] = (
                            dist.sample().numpy(),
                            dist.mean.numpy(),
                        )
                if held_out is not None:
                    with torch.no_grad(), rng_scope(seed, "export", b, c, d):
                        dist = predictor.count_dist(batch, t, drawn[c][d], local[t], torch.from_numpy(hidden))
                    held_lik[c, d, to] = dist.log_prob(torch.from_numpy(held_out[to])).sum(1).numpy()
    names = {"cell": run.target.names[cells], "panel_gene": run.genes[panel], "gene": run.genes[unmeasured]}
    frames: dict[str, Any] = {
        "posterior": _posterior(run, drawn) if run.method != "stack" else _runs_of(run, predictor.fits, turns),
        "posterior_predictive": xr.Dataset(
            {"x": (("chain", "draw", "cell", "panel_gene"), counts), "library": (("chain", "draw", "cell"), counts.sum(-1))}
        ),
        "observed_data": xr.Dataset({"x": (("cell", "panel_gene"), observed), "library": (("cell",), observed.sum(-1))}),
        "log_likelihood": xr.Dataset({"library": (("chain", "draw", "cell"), log_lik)}),
        "constant_data": _constant(run, cells),
    }
    if len(unmeasured):
        frames["predictions"] = xr.Dataset(
            {name: (("chain", "draw", "cell", "gene"), values) for name, values in predicted.items()}
        )
    if held_out is not None:
        frames["predictions"]["log_likelihood"] = (("chain", "draw", "cell"), held_lik)
        frames["predictions_constant_data"] = xr.Dataset({"count": (("cell", "gene"), held_out[:, : len(unmeasured)])})
    return {name: _finish(frame, names, run, name) for name, frame in frames.items()}


def _refuse_too_much(size: int) -> None:
    """Draws of cells x genes are held in memory until they are written."""
    if size > MAX_BYTES:
        raise UserError(
            f"export: draws of {size / 1e9:.0f} GB are too many to hold (at most {MAX_BYTES / 1e9:.0f}); lower --cells or --draws. Summaries and "
            "draws of any number of cells are written block by block: ppl-st predict RUN --out imputed.zarr --samples 20"
        )


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

    xy = np.zeros((len(cells), 2)) if run.target.xy is None else run.target.xy[cells]
    return xr.Dataset(
        {"spatial": (("cell", "axis"), xy), "measured": (("any_gene",), run.measured.astype(np.int8))},
        coords={"axis": np.array(["x", "y"], dtype=object), "any_gene": run.genes.astype(object)},
    )


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

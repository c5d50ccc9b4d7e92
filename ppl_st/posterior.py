"""The fitted run: predictions as AnnData, scores, ArviZ. What it is stored as is in `ppl_st.run_folder`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st.asked import gene_list, refuse_draws, whole
from ppl_st.calibration import score_columns
from ppl_st.conformal import KNOTS, Inner, Recalibration, inner_rows, pit_curves
from ppl_st.data import Counts, matched, shared_total
from ppl_st.errors import UserError
from ppl_st.inference.predict import Summary, count_draws, posterior_predictive, predictive_blocks
from ppl_st.inference.svi import Pair
from ppl_st.io import refuse_inputs
from ppl_st.pairs import read_like
from ppl_st.stream import layers_of, var_of, varm_of, write_prediction, write_samples

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, repr=False)
class Run:
    """A fitted method on its data.

    Attributes
    ----------
    method, module
        Name and file of the method.
    config, spec
        Effective settings and sizes.
    pair
        The fitted model and guide (all chains).
    data
        The method's problem.
    target, reference
        The counts it was made from.
    manifest, record
        Provenance; record of the fit (seconds, losses, stop_reason, ...).
    new_cells
        Turns other counts of the same panel into a problem of the same kind.
    folder
        Where the run is stored, if anywhere.
    inner, recalibration
        Scores of inner held-out genes, and the correction that they teach, after `ppl_st.recalibrate`.
    """

    method: str
    module: ModuleType
    config: Any
    spec: Any
    pair: Pair
    data: Any
    target: Counts
    reference: Counts
    manifest: dict[str, Any]
    record: dict[str, Any]
    new_cells: Callable[[Counts], tuple[Any, Counts]]
    folder: Path | None = None
    inner: Inner | None = None
    recalibration: Recalibration | None = None

    def __repr__(self) -> str:
        known, every = int(self.measured.sum()), len(self.genes)
        where = "in memory" if self.folder is None else f"in {self.folder}"
        size = f"{len(self.target.names)} cells or spots x {every} genes"
        return f"<{self.method} run: {size}, {known} measured and {every - known} unmeasured, {where}>"

    @property
    def genes(self) -> NDArray[np.str_]:
        """Every gene that can be predicted."""
        return self.reference.genes

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Whether the target measured each of `genes`."""
        return np.isin(self.genes, self.target.genes)

    @property
    def shared_total(self) -> NDArray[np.float64]:
        """Counts of each cell over the genes shared with the reference: the depth of scores on log-normalised counts."""
        return shared_total(self.target, self.genes)

    @property
    def reference_mean(self) -> NDArray[np.float64]:
        """Mean count of each of `genes` in the reference."""
        return np.asarray(np.ones(len(self.reference.names)) @ self.reference.matrix, dtype=np.float64) / len(self.reference.names)

    def predict(
        self,
        genes: Sequence[str] | NDArray[np.str_] | None = None,
        *,
        target: str | Path | ad.AnnData | None = None,
        draws: int = 100,
        samples: int = 0,
        seed: int = 0,
        memory_gb: float = 1.0,
        truth: str | Path | ad.AnnData | Counts | None = None,
        lognorm: bool = False,
    ) -> ad.AnnData:
        """Posterior predictive of ``genes`` in every cell.

        Parameters
        ----------
        genes
            Names; None = every gene that the target did not measure.
        target
            Other cells with the same panel (path or AnnData), predicted without refitting, and without neighbors in space where they have no
            coordinates; None = the cells of the fit.
        draws
            Posterior draws behind the summaries.
        samples
            Also keep this many joint count draws in ``layers["sample_<k>"]`` (for many, use `write_samples`).
        seed, memory_gb
            Seed of the draws; bound on the memory of one block of draws.
        truth
            Counts of the same cells and genes to judge by: the columns of `score` are added to ``var``, and layers ``log_prob`` (log predictive
            probability of the count), ``pit_low``, ``pit_high`` (see `ppl_st.calibration`).
        lognorm
            Also a layer ``lognorm_mean``: posterior mean of log1p(count / cell's total x median total), totals over genes shared with the reference.
            SpaIM and SpaGene give log1p of the expected count at the median depth (as a rule larger) unless the fit found cells' own depths better.

        Returns
        -------
        AnnData
            ``X`` posterior mean count; layers ``rate_mean``, ``rate_sd`` (epistemic), ``count_sd`` (with observation noise), ``q05``, ``q50``,
            ``q95`` of the count; ``var`` measured, trust (squared correlation of the predicted rate with Poisson counts around it).
            Where draws come from several fits (chains, ``seeds=``, a stack) also layer ``between_sd``, the part of ``rate_sd`` that is their
            disagreement, and ``var["between_fits"]``, its share of the variance.
            Of a recalibrated run also layers ``lower``, ``upper`` (the interval that covers ``recalibration.level`` of the counts of a new gene
            on average) and ``var["nominal_level"]``.
            Of a method with metagenes also ``varm``, their profiles; ``uns["units"]`` says what each table is.
        """
        refuse_draws(draws, seed, memory_gb, samples)
        run, data, counts = self._other(target)
        index = self._index(genes)
        predictor = run.module.Predictor(run.pair, data, run.config, run.spec)
        observed = None if truth is None else matched(self.counts_of(truth), counts, self.genes[index])
        ends, maps, mass = run._correction(index, draws)
        summary, scores = posterior_predictive(
            predictor, predictor.chains, index, draws=draws, seed=seed, memory_gb=memory_gb, truth=observed, ends=ends, mass=mass,
            factor=_factor(counts, self.genes) if lognorm else None,
        )  # fmt: skip
        result = run._table(summary, index, counts, ends)
        result.uns["ppl_st"] = json.dumps(self.manifest | {"draws": draws})
        if scores is not None and observed is not None:
            result.var = result.var.join(score_columns(scores, observed, result.var_names, ends, maps))
            for name in ("log_prob", "pit_low", "pit_high"):
                result.layers[name] = getattr(scores, name)
        if samples:
            kept = np.zeros((samples, *result.shape), dtype=np.float32)
            for rows, drawn in count_draws(predictor, predictor.chains, index, draws=samples, seed=seed, memory_gb=memory_gb):
                kept[:, rows] = drawn
            for k in range(samples):
                result.layers[f"sample_{k}"] = kept[k]
        if data is run.data:
            obsm, obs = run.module.quantities(run.pair, data, run.config, run.spec)
            result.obsm.update(obsm)
            result.obs = result.obs.assign(**obs)
        return result

    def write(
        self,
        path: str | Path,
        genes: Sequence[str] | NDArray[np.str_] | None = None,
        *,
        target: str | Path | ad.AnnData | None = None,
        draws: int = 100,
        seed: int = 0,
        memory_gb: float = 1.0,
        say: Callable[[str], None] | None = None,
    ) -> tuple[int, int]:
        """What `predict` returns, written block by block to ``.zarr`` or ``.h5ad``; memory does not grow with the cells. Returns the shape.

        ``say`` gets lines about size and progress.
        """
        refuse_draws(draws, seed, memory_gb)
        run, data, counts = self._other(target)
        index = self._index(genes)
        predictor = run.module.Predictor(run.pair, data, run.config, run.spec)
        ends = None if run.recalibration is None else run.recalibration.ends_of(self.reference_mean[index])
        own, talk = data is run.data, say or (lambda line: None)
        if counts.xy is None and self.target.xy is not None:
            talk(f"target ({counts.source}): no usable coordinates (obsm['spatial']), which those of the fit have; neighbors in space are not used")
        return write_prediction(run, path, predictor, index, counts, ends, own=own, draws=draws, seed=seed, memory_gb=memory_gb, say=talk)

    def write_samples(
        self,
        path: str | Path,
        genes: Sequence[str] | None,
        draws: int,
        seed: int = 0,
        *,
        target: str | Path | ad.AnnData | None = None,
        memory_gb: float = 1.0,
    ) -> None:
        """Write ``count[sample, cell, gene]``, joint posterior predictive draws, as a zarr store, block by block."""
        whole("draws", draws, 1)
        refuse_draws(2, seed, memory_gb)
        run, data, counts = self._other(target)
        index = self._index(genes)
        predictor = run.module.Predictor(run.pair, data, run.config, run.spec)
        blocks = count_draws(predictor, predictor.chains, index, draws=draws, seed=seed, memory_gb=memory_gb)
        write_samples(path, counts.names, self.genes[index], draws, blocks, self.manifest, memory_gb)

    def score(
        self,
        truth: str | Path | ad.AnnData | Counts,
        *,
        genes: Sequence[str] | None = None,
        draws: int = 100,
        seed: int = 0,
        memory_gb: float = 1.0,
    ) -> pd.DataFrame:
        """Proper scores and coverage of the predictive on counts of the same cells.

        Returns
        -------
        DataFrame
            One row per gene of ``genes`` (None: those of the truth that the run can predict and the fit did not see): mean_count, log_score (mean log
            predictive probability, nats), crps (counts), coverage_50/80/90/95 (expected randomised coverage of the central interval); of a
            recalibrated run also recalibrated_crps (of the corrected predictive) and recalibrated_coverage (of the interval lower, upper).
        """
        refuse_draws(draws, seed, memory_gb)
        known = self.counts_of(truth)
        ours = known.genes[np.isin(known.genes, self.genes)]  # a target's blanks, say, are unknown to the reference
        ours = ours if len(ours) else known.genes  # `_index` names some
        unseen = ours if self.measured.all() else ours[~np.isin(ours, self.target.genes)]
        if genes is None and not len(unseen):
            what = f"no gene is left to predict, the fit was shown its {len(ours)} genes; give counts of held-out genes, or name some (genes=[...])"
            raise UserError(f"truth ({known.source}): {what}")
        index = self._index(unseen if genes is None else genes)
        predictor = self.module.Predictor(self.pair, self.data, self.config, self.spec)
        observed, names = matched(known, self.target, self.genes[index]), pd.Index(self.genes[index], name="gene")
        ends, maps, mass = self._correction(index, draws)
        parts: dict[int, Any] = {}  # every score is a mean over cells: no table of cells is needed
        for rows, part, _, scores in predictive_blocks(
            predictor, predictor.chains, index, draws=draws, seed=seed, memory_gb=memory_gb, truth=observed, ends=ends, mass=mass
        ):
            if scores is not None and len(rows):
                own = (None if values is None else values[:, part] for values in (ends, maps))
                share = len(rows) / predictor.n_cells
                parts[part.start] = parts.get(part.start, 0.0) + share * score_columns(scores, observed[rows, part], names[part], *own)
        return pd.concat([parts[start] for start in sorted(parts)])

    def counts_of(self, source: str | Path | ad.AnnData | Counts, *, role: str = "truth") -> Counts:
        """Counts of a file, by default to judge by: from the layer and under the gene names of the fit, where the file has these."""
        if isinstance(source, Counts):
            return source
        return read_like(source, role=role, layer=self.config.layer, gene_key=self.config.gene_key)

    def inner_scores(self, truth: Counts, *, draws: int = 100, seed: int = 0, memory_gb: float = 1.0) -> Inner:
        """Scores of the genes of ``truth`` (counts of the run's cells), as `ppl_st.recalibrate` keeps them of genes that the run was not shown."""
        index = self._index(truth.genes)
        predictor = self.module.Predictor(self.pair, self.data, self.config, self.spec)
        observed = matched(truth, self.target, self.genes[index])
        cells = inner_rows(self.target.names)
        curves, log_prob = np.zeros((len(KNOTS), len(index))), np.zeros((len(cells), len(index)), np.float32)
        for rows, part, _, scores in predictive_blocks(
            predictor, predictor.chains, index, draws=draws, seed=seed, memory_gb=memory_gb, truth=observed
        ):
            if scores is not None and len(rows):
                curves[:, part] += len(rows) / predictor.n_cells * pit_curves(scores.pit_low, scores.pit_high)
                kept = np.isin(rows, cells)
                log_prob[np.searchsorted(cells, rows[kept]), part] = scores.log_prob[kept]
        return Inner(self.genes[index], curves, self.target.names[cells], log_prob)

    def turned(self) -> "Run":
        """The run in its other direction: its cells are those of the reference, its genes those that the target measured.

        `predict`, `write` and `write_samples` of it give the counts that the target's platform would show of each reference cell, at the target's
        median depth; "measured" are the genes that the reference has, too, on its own platform: all are forecast alike. Nobody observed these counts:
        there is nothing to export beside them, and `score` wants a truth of this kind. It is a view: nothing is fitted, and it has no folder.
        """
        if not hasattr(self.module, "turned"):
            raise UserError(f"{self.method}: this run translates in one direction only; a spagene run of one seed has another (RUN/seed0, say)")
        module, data = self.module.turned(self.pair, self.data)

        def refuse(counts: Counts) -> tuple[Any, Counts]:
            raise UserError("the other direction is of the reference's own cells; leave out --target")

        return replace(
            self, module=module, data=data, target=self.reference, reference=self.target, new_cells=refuse, folder=None, inner=None,
            recalibration=None,
        )  # fmt: skip

    def as_reference(self, condition: str | None = None, *, library: float | None = None) -> "Run":
        """The run in the reference's style: the paper's transfer of a disease or a perturbation.

        `predict`, `write` and `write_samples` of it give the counts that each spatial cell, of the fit or of a new target, would show as a cell of
        the reference that has its state: the reference's level, slope, dispersion and library. It is a view: nothing is fitted, and it has no folder.

        Parameters
        ----------
        condition
            Value of the reference's obs column ``batch_key`` (a setting of the fit), as "diseased": also what this condition adds. None: the
            reference as a whole.
        library
            Total count of a cell over all genes of the reference; None: the median of the condition's cells.
        """
        from ppl_st.style import in_reference_style

        return in_reference_style(self, condition, library)

    def proportions(self, *, draws: int = 50, seed: int = 0) -> ad.AnnData:
        """Factor proportions of every spot: ``X`` posterior mean, layers sd, q05, q95; NaN of a spot that holds no cell of the target.

        Factors have the names of the fit's labels and cell types. The paper's presets are points: there sd is 0 and q05 = q95 = ``X``.
        """
        if not hasattr(self.module, "proportions"):
            raise UserError(f"{self.method}: this run deconvolves no spots; a siid run of one seed does (RUN/seed0, say)")
        spots, profiles = self.module.proportions(self.pair, self.data, self.config, draws, seed)
        factors = pd.DataFrame(index=self.module.factor_names(self.data, len(profiles)))
        result = ad.AnnData(spots.pop("mean"), obs=self.reference.obs.copy(), var=factors, layers=spots)
        result.obs_names = self.reference.names
        result.varm["profile"] = pd.DataFrame(profiles, index=factors.index, columns=self.genes)
        result.obsm["spatial"] = self.reference.xy
        result.uns["ppl_st"] = json.dumps(self.manifest)
        return result

    def to_arviz(
        self,
        *,
        draws: int = 25,
        seed: int = 0,
        max_cells: int | None = 500,
        truth: str | Path | ad.AnnData | Counts | None = None,
    ) -> Any:
        """InferenceData (ArviZ 0.x) or DataTree (ArviZ 1.x); see `arviz_groups`."""
        import xarray as xr

        groups = self.arviz_groups(draws=draws, seed=seed, max_cells=max_cells, truth=truth)
        import arviz as az

        if not az.__version__.startswith("0."):
            return xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
        container: Any = az.InferenceData
        return container(**groups)

    def export(
        self,
        path: str | Path,
        *,
        draws: int = 25,
        seed: int = 0,
        max_cells: int | None = 500,
        truth: str | Path | ad.AnnData | Counts | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Write the ArviZ groups as ``.nc`` (netCDF4) or ``.zarr``; ``az.from_netcdf`` and xarray read them back.

        ``max_cells=None``: all cells. Many draws are written to a ``.zarr`` block by block, in memory that does not grow with the cells; ``say`` gets
        a line about the size.
        """
        from ppl_st.export import write_groups

        refuse_inputs(path := Path(path), self.manifest)
        if path.suffix not in (".nc", ".zarr"):
            raise UserError(f"{path}: cannot tell the format; name it posterior.nc (netCDF) or posterior.zarr")
        known = None if truth is None else self.counts_of(truth)
        write_groups(self, path, draws=draws, seed=seed, max_cells=max_cells, truth=known, say=say or (lambda line: None))

    def arviz_groups(
        self,
        *,
        draws: int = 25,
        seed: int = 0,
        max_cells: int | None = 500,
        truth: str | Path | ad.AnnData | Counts | None = None,
    ) -> "dict[str, xr.Dataset]":
        """Datasets posterior (global sites), posterior_predictive and observed_data (measured genes), predictions (unmeasured genes),
        log_likelihood per cell, constant_data; chain = independent variational fits, draw = draws of each. Cells are a seeded subset of
        ``max_cells``. ``truth``: counts of genes that were held out; they and their log-likelihood per cell are added to the predictions.
        """
        from ppl_st.export import arviz_groups

        known = None if truth is None else self.counts_of(truth)
        return arviz_groups(self, draws=draws, seed=seed, max_cells=max_cells, truth=known)

    # ---- helpers ----

    def _index(self, genes: Sequence[str] | NDArray[np.str_] | None) -> NDArray[np.int64]:
        index = np.flatnonzero(~self.measured)
        genes = None if genes is None else gene_list(genes, "the list of genes")
        if genes is not None and not len(genes):
            raise UserError("the list of genes is empty; name one or more, or leave it out for every gene that the target did not measure")
        if genes is not None:
            index = pd.Index(self.genes).get_indexer(pd.Index(genes))
            if (index < 0).any():
                missing = genes[index < 0]
                close = get_close_matches(str(missing[0]), self.genes.tolist(), n=1)
                raise UserError(
                    f"{len(missing)} of {len(index)} genes cannot be predicted by this run, e.g. {', '.join(missing[:3])}"
                    f"{f' (did you mean {close[0]}?)' if close else ''}; it knows the {len(self.genes)} genes of genes.txt in its folder"
                )
        if not index.size:
            raise UserError(f"{self.folder or f'this run of {self.method}'}: no gene is left to predict, all are measured; name genes with --genes")
        return index.astype(np.int64)

    def _correction(self, index: NDArray[np.int64], draws: int) -> tuple[Any, Any, Any]:
        """Of a recalibrated run, for each of these genes: ends of the interval [2, g], map [knots, g], mass of the sorted draws [draws, g]."""
        if self.recalibration is None:
            return None, None, None
        known = self.reference_mean[index]
        return self.recalibration.ends_of(known), self.recalibration.maps_of(known), self.recalibration.mass_of(known, draws)

    def _other(self, target: str | Path | ad.AnnData | None) -> "tuple[Run, Any, Counts]":
        """The run to ask, the problem (its own, or one of new cells) and the cells to predict."""
        return (self, self.data, self.target) if target is None else (self, *self.new_cells(self.counts_of(target, role="target")))

    def _table(self, summary: Summary, index: NDArray[np.int64], counts: Counts, ends: NDArray[np.float64] | None) -> ad.AnnData:
        moments = (summary.rate_mean.mean(0, dtype=np.float64), summary.rate_mean.var(0, dtype=np.float64))
        parts = summary.rate_sd, summary.between_sd
        doubt = None if parts[1] is None else (np.square(parts[0], dtype=np.float64).mean(0), np.square(parts[1], dtype=np.float64).mean(0))
        var = var_of(self, index, *moments, doubt, ends)
        result = ad.AnnData(summary.rate_mean, obs=counts.obs.copy(), var=var)
        result.obs_names = counts.names
        for name, values in layers_of(summary).items():
            result.layers[name] = values
        result.layers["rate_mean"] = summary.rate_mean.copy()  # X is it, too
        if counts.xy is not None:
            result.obsm["spatial"] = counts.xy
        varm, uns = varm_of(self, index)
        result.varm.update(varm)
        result.uns.update(ppl_st=json.dumps(self.manifest), **uns)
        return result


def _factor(counts: Counts, genes: NDArray[np.str_]) -> NDArray[np.float64]:
    """Median over each cell's own total of the genes shared with the reference, as scores are normalised; 1 for a cell without such counts."""
    total = shared_total(counts, genes)
    positive = total > 0
    return np.where(positive, np.median(total[positive]) / np.where(positive, total, 1.0), 1.0)

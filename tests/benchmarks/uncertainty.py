"""Calibration of unmeasured genes on real data: raw, recalibrated, TISSUE-style; trust; stacking. Numbers in BENCHMARKS.md.

    OMP_NUM_THREADS=1 python tests/benchmarks/uncertainty.py collect DATA METHOD FOLD DIR      # osmfish, starmap, spots: folds 0 to 4; xenium: 0
    OMP_NUM_THREADS=1 python tests/benchmarks/uncertainty.py table DIR
    OMP_NUM_THREADS=1 python tests/benchmarks/uncertainty.py downstream DATA METHOD FOLD  # Rubin's rules on fold changes and Moran's I
    OMP_NUM_THREADS=1 python tests/benchmarks/uncertainty.py places DATA STEPS FOLDS      # mob, her2: XFuse's intervals at hidden spots

"collect" hides one fifth of the shared genes (xenium: nothing; its truth is another file), fits, and scores the hidden genes; then does the same with
each fifth of the *remaining* genes hidden as well, as `ppl_st.recalibrate` does; what is there already is not done again, and a last argument
such as "-" or "01" asks for some of these six parts only. In "spots" the pseudo-spots of the xenium pair are the target, its cells the reference.
"table" learns corrections and weights on the inner genes and judges them on the hidden ones. "places" hides half of the spots of both
sections, fits, recalibrates on parts of the other half and judges the 100 genes with the largest totals at the hidden spots.
Data: $PPL_ST_DATA or ../shared/data.
"""

import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppl_st
import realdata
from ppl_st.calibration import coverage, interval_coverage, risk_coverage, variance_decomposition
from ppl_st.conformal import KNOTS, pit_curves, recalibration
from ppl_st.data import gene_folds, read_counts, shared_genes
from ppl_st.inference.predict import count_draws
from ppl_st.metrics import bootstrap_mean, crps_from_draws, pcc, poisson_ceiling_of_rate
from ppl_st.neighbor_score import neighbor_intervals
from ppl_st.pooling import draws_of, joined, log_fold_change, morans_i, pooled, widened
from ppl_st.prepare import MIN_SHARED
from ppl_st.refit import held_out_fits
from ppl_st.spatial import neighbors
from ppl_st.stack import stacked, stacking_weights

XENIUM = [f"derived_pair_xenium_brain/{name}.h5ad" for name in ("xenium_like_panel", "visium_like_spots", "heldout_truth_cells")]
FILES = {  # target, reference (a list: genes of the same cells), truth where it is another file
    "osmfish": ("osmfish_cortex/spatial.h5ad", "osmfish_cortex/scrna.h5ad", None),
    "starmap": ("starmap_visual_cortex/spatial.h5ad", "starmap_visual_cortex/scrna_zeisel500.h5ad", None),
    "xenium": tuple(XENIUM),
    "spots": (XENIUM[1], [XENIUM[0], XENIUM[2]], None),
}
DISSOCIATED = ["vista", "spaim", "spagene"]
METHODS = {"osmfish": DISSOCIATED, "starmap": DISSOCIATED, "xenium": ["siid", *DISSOCIATED], "spots": DISSOCIATED}
FOLDS, MOST_CELLS, CELLS, DRAWN_CELLS, DRAWS = 5, 6000, 4000, 400, 100  # of more than MOST_CELLS cells CELLS are judged


def problem(name):
    """Cells with every gene, reference, hidden genes of every fold, truth (Counts) of the hidden genes."""
    target, reference, other = (None if one is None else table_of(one) for one in FILES[name])
    if "duplicate_row" in target.obs:
        target = target[~target.obs["duplicate_row"].astype(bool)].copy()
    cells = read_counts(target, role="target")
    known = read_counts(reference, role="reference", need_spatial=name == "xenium")
    if other is not None:
        truth = read_counts(other, role="truth", need_spatial=False)
        return cells, known, [truth.genes[np.isin(truth.genes, known.genes)]], truth
    shared = np.sort(shared_genes(cells, known, MIN_SHARED))
    folds, keep = gene_folds(shared, FOLDS, 0), np.ones(len(cells.names), bool)
    for hidden in folds:
        keep &= cells.take_genes(shared[~np.isin(shared, hidden)]).totals > 0
    cells = cells.take_rows(keep)
    return cells, known, folds, cells


def table_of(files):
    """The AnnData of a file, or of several with the genes of the same cells."""
    if isinstance(files, str):
        return ad.read_h5ad(realdata.path(files))
    tables = [ad.read_h5ad(realdata.path(one)) for one in files]
    return ad.concat([one[tables[0].obs_names] for one in tables], axis=1, merge="first")


def collect(name, method, fold, folder, wanted="-01234"):
    """Write NAME.METHOD.FOLD.-.npz (hidden genes) and .0 to .4.npz (inner genes)."""
    cells, reference, folds, truth = problem(name)
    seen = cells.take_genes(cells.genes[~np.isin(cells.genes, folds[fold])])
    inner = gene_folds(np.sort(np.intersect1d(seen.genes, reference.genes)), FOLDS, 0)
    for part, held in [("-", folds[fold]), *((str(k), genes) for k, genes in enumerate(inner))]:
        path = Path(folder) / f"{name}.{method}.{fold}.{part}.npz"
        if path.exists() or part not in wanted:
            continue
        began = time.process_time()
        target = seen.take_genes(seen.genes[~np.isin(seen.genes, held)])
        run = ppl_st.fit(method, target=as_adata(target), reference=as_adata(reference), overrides=["layer=X"], seed=0)
        counts = (truth if part == "-" else seen).take_genes(held)
        predicted = run.predict(list(held), draws=DRAWS, truth=counts)
        seconds = time.process_time() - began
        judged_cells = CELLS if len(cells.names) > MOST_CELLS else MOST_CELLS
        rows = [np.sort(np.random.default_rng(k).permutation(len(cells.names))[:n]) for k, n in ((6, judged_cells), (5, DRAWN_CELLS))]
        drawn = np.zeros((DRAWS, len(rows[1]), len(held)), np.uint16)
        predictor = run.module.Predictor(run.pair, run.data, run.config, run.spec)
        for at, values in count_draws(predictor, predictor.chains, run._index(list(held)), draws=DRAWS, seed=0):
            mine = np.isin(at, rows[1])
            drawn[:, np.searchsorted(rows[1], at[mine])] = values[:, mine]
        dense = counts.matrix.toarray()
        layers = {name: predicted.layers[name][rows[0]] for name in ("rate_mean", "rate_sd", "count_sd", "log_prob")}
        np.savez(
            path, genes=held, ref_mean=run.reference_mean[run._index(list(held))], some=rows[0], sub=rows[1], truth=dense[rows[0]],
            truth_sub=dense[rows[1]], mean=dense.mean(0), draws=drawn,
            low=predicted.layers["pit_low"][rows[0]], high=predicted.layers["pit_high"][rows[0]],
            crps=predicted.var["crps"].to_numpy(), log_score=predicted.var["log_score"].to_numpy(), xy=target.xy[rows[0]], seconds=seconds, **layers,
        )  # fmt: skip
        print(path.name, len(held), f"{seconds:.0f} cpu s, log score {predicted.var['log_score'].mean():.4f}", flush=True)


def as_adata(counts):
    made = ad.AnnData(counts.matrix, obs=counts.obs.copy(), var=pd.DataFrame(index=counts.genes))
    made.obs_names = counts.names
    if counts.xy is not None:
        made.obsm["spatial"] = counts.xy
    return made


def parts(folder, name, method, fold):
    """Hidden genes, and the inner genes joined; None if not all was collected."""
    paths = [Path(folder) / f"{name}.{method}.{fold}.{part}.npz" for part in "-01234"]
    if not all(path.exists() for path in paths):
        return None
    hidden, *inner = ({key: values for key, values in np.load(path).items()} for path in paths)
    joined = {
        key: np.concatenate([one[key] for one in inner], axis=-1)
        for key in ("genes", "ref_mean", "low", "high", "log_prob", "rate_mean", "truth", "mean")
    }
    return hidden, joined


def judged(hidden, inner, name, level=0.9):
    """Scores of the hidden genes, one row per gene, and the shrinkage that was chosen."""
    rows = pd.DataFrame(index=hidden["genes"])
    rows["raw"] = coverage(hidden["low"], hidden["high"], (level,)).per_gene[0]
    ordered, x = np.sort(hidden["draws"].astype(np.float64), axis=0), hidden["truth_sub"].astype(np.float64)
    rows["crps raw"] = crps_from_draws(ordered, x).mean(0)
    for label, guarantee in (("recalibrated", False), ("guaranteed", True)):
        made = recalibration(pit_curves(inner["low"], inner["high"]), inner["ref_mean"], level, guarantee=guarantee)
        rows[label] = interval_coverage(hidden["low"], hidden["high"], made.ends_of(hidden["ref_mean"]))
    maps = made.maps_of(hidden["ref_mean"])
    p = np.arange(DRAWS + 1) / DRAWS
    mass = np.stack([np.diff(np.interp(p, KNOTS, one)) for one in maps.T], 1)[:, None]
    below = np.cumsum(mass, 0)[:-1]
    spread = (below * (1 - below) * np.diff(ordered, axis=0)).sum(0) / (1 - (mass**2).sum(0))
    rows["crps recalibrated"] = ((mass * np.abs(ordered - x)).sum(0) - spread).mean(0)
    found = neighbor_intervals(
        np.log1p(inner["rate_mean"]), np.log1p(inner["truth"]), np.log1p(hidden["rate_mean"]), neighbors(hidden["xy"], 15), level=level
    )
    y = np.log1p(hidden["truth"])
    rows["TISSUE"] = ((found.lower <= y) & (y <= found.upper)).mean(0)
    rows["risk"] = 1 - pcc(hidden["truth"], hidden["rate_mean"]) ** 2
    found = variance_decomposition(hidden["rate_mean"], hidden["rate_sd"], hidden["count_sd"])
    rows["all variances"] = (found["between"] / found.sum(axis=1)).to_numpy()
    rows["trust"] = poisson_ceiling_of_rate(hidden["rate_mean"]) ** 2  # as in `Run.predict`
    rows["expression"], rows["reference"] = hidden["rate_mean"].mean(0), hidden["ref_mean"]
    rows["touched"] = np.abs(maps - KNOTS[:, None]).max(0)
    return rows


def table(folder):
    """Print the rows of BENCHMARKS.md: calibration, which genes to believe, stacking; after them what the text quotes."""
    calibration, ranking, stacking, spread = [], [], [], []
    for name, methods in METHODS.items():
        for method in methods:
            found = [parts(folder, name, method, fold) for fold in range(FOLDS)]
            rows = [judged(*one, name) for one in found if one is not None]
            if rows:
                show(name, method, len(rows), pd.concat(rows), calibration, ranking, spread)
        stacking += stack(folder, name, methods)
    print("| data | method, folds, genes | raw | recalibrated | with `--guarantee` | TISSUE-style | CRPS raw -> recalibrated | change [95%] |")
    print("|---|---|---|---|---|---|---|---|", *calibration, sep="\n")
    print("\n| | trust | all variances | mean expression | reference mean | no ranking | perfect | trust - expression, 95% bootstrap |")
    print("|---|---|---|---|---|---|---|---|", *ranking, sep="\n")
    print("\n| data | genes | VISTA, SpaIM, SpaGene (xenium: SIID first) | stack | stack - best [95% bootstrap] | weights by fold, in this order |")
    print("|---|---|---|---|---|---|", *stacking, "", *spread, sep="\n")


def short(value, digits=3):
    """A number below 1 without its leading 0."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def show(name, method, folds, rows, calibration, ranking, spread):
    cells = []
    for label in ("raw", "recalibrated", "guaranteed", "TISSUE"):
        values = rows[label]
        mean, (low, high) = bootstrap_mean(values, np.random.default_rng(0)), values.quantile([0.05, 0.95])
        interval = f" [{short(mean.lo)}, {short(mean.hi)}]" if label == "raw" else ""
        cells.append(f"{short(mean.mean)}{interval} ({values.between(0.8, 0.97).mean():.2f})")
        spread.append(f"{name} {method} {label}: 5% to 95% of genes {short(low, 2)} to {short(high, 2)}, lowest {short(values.min(), 2)}")
    change = bootstrap_mean(rows["crps recalibrated"] - rows["crps raw"], np.random.default_rng(0))
    crps = " -> ".join(f"{rows[label].mean():.4g}" for label in ("crps raw", "crps recalibrated"))
    cells += [crps, f"{change.mean:+.4f} [{change.lo:+.4f}, {change.hi:+.4f}]"]
    calibration.append(f"| {name} | {method}, {folds}, {len(rows)} | {' | '.join(cells)} |")
    spread.append(f"{name} {method}: corrections move probabilities by up to {rows['touched'].max():.3f}")
    risk = rows["risk"].to_numpy()
    scores = {score: rows[score].to_numpy() for score in ("trust", "all variances", "expression", "reference")} | {"none": 0 * risk, "best": -risk}
    areas = " | ".join(short(risk_coverage(risk, values).area) for values in scores.values())
    picks = np.random.default_rng(1).integers(0, len(rows), (1000, len(rows)))
    gap = [risk_coverage(risk[i], scores["trust"][i]).area - risk_coverage(risk[i], scores["expression"][i]).area for i in picks]
    low, high = np.quantile(gap, [0.025, 0.975])
    ranking.append(f"| {name}, {method}, {len(rows)} genes | {areas} | {low:+.3f} to {high:+.3f} |")


def stack(folder, name, methods):
    """Row of the stack of all methods, on the folds that all of them have."""
    scores, weights = [], []
    for fold in range(FOLDS):
        found = [one for one in (parts(folder, name, method, fold) for method in methods) if one is not None]
        if len(found) < len(methods):
            continue
        learned = stacking_weights(np.stack([inner["log_prob"] for _, inner in found]))
        log_prob = np.stack([hidden["log_prob"] for hidden, _ in found])
        scores.append(np.vstack([log_prob.mean(1, dtype=np.float64), stacked(log_prob, learned).mean(0)]))
        weights.append(" ".join(short(w, 2) for w in learned))
    if not scores:
        return []
    every = np.hstack(scores)
    best = int(every[:-1].mean(1).argmax())
    gain = bootstrap_mean(every[-1] - every[best], np.random.default_rng(0))
    single = ", ".join(f"{score:.4f}" for score in every[:-1].mean(1))
    ties = f"{gain.mean:+.4f} over {methods[best]} [{gain.lo:+.4f}, {gain.hi:+.4f}]"
    return [f"| {name} | {every.shape[1]} | {single} | {every[-1].mean():.4f} | {ties} | {'; '.join(weights)} |"]


def downstream(name, method, fold):
    """Share of 95 % intervals that hold the statistic of the measured counts: means as data, pooled by Rubin's rules, widened by inner genes."""
    cells, reference, folds, _ = problem(name)
    began, label = time.process_time(), cells.obs["region"].astype(str).to_numpy()
    graph = neighbors(cells.xy, 8)
    regions = [one for one in np.unique(label) if (label == one).sum() > 100 and one != "Excluded"]
    statistics = {f"fold change {one}": lambda x, one=one: log_fold_change(x, label == one) for one in regions}
    statistics["Moran's I"] = lambda x: morans_i(x, graph)
    seen = cells.take_genes(cells.genes[~np.isin(cells.genes, folds[fold])])
    run = ppl_st.fit(method, target=as_adata(seen), reference=as_adata(reference), overrides=["layer=X"], seed=0)

    def of(fitted, truth):
        made = fitted.predict(list(truth.genes), draws=20, samples=25)
        known, drawn = truth.matrix.toarray(), list(draws_of(made))
        return {key: (pooled(drawn, one, population=False), one(np.asarray(made.X)), one(known).estimate) for key, one in statistics.items()}

    new, inner = of(run, cells.take_genes(folds[fold])), [of(fitted, truth) for truth, fitted in held_out_fits(run)]
    held = {}
    for key, (found, naive, truth) in new.items():
        wide = widened(found, joined([one[key][0] for one in inner]), np.concatenate([one[key][2] for one in inner]))
        inside = [np.abs(naive.estimate - truth) <= 1.96 * np.sqrt(naive.variance), *((one.lo <= truth) & (truth <= one.hi) for one in (found, wide))]
        held.setdefault(key.split(" ")[0], []).append([*np.mean(inside, 1), np.median((wide.hi - wide.lo) / (found.hi - found.lo))])
    for kind, rows in held.items():
        means, pooling, widening, ratio = np.mean(rows, 0)
        print(f"{name} {method} {fold} {kind}: means as data {means:.2f}, pooled {pooling:.2f}, widened {widening:.2f} (x {ratio:.1f})", flush=True)
    print(f"{time.process_time() - began:.0f} cpu s, {len(folds[fold])} genes, {len(regions)} regions", flush=True)


IMAGES = {"mob": ("st_olfactory_bulb", "MOB1", "MOB2"), "her2": ("st_her2_breast", "C2", "C3")}


def places(name, steps, folds):
    """Coverage of 90 % intervals at hidden spots, raw and recalibrated."""
    from ppl_st.api import fit_sections
    from ppl_st.config import manifest, with_overrides
    from ppl_st.evaluate_images import hidden_rows, score_hidden, visible
    from ppl_st.models import xfuse
    from ppl_st.prepare.xfuse import problem as sections_of
    from ppl_st.prepare.xfuse import without
    from ppl_st.slides import read_slides

    folder, *sections = IMAGES[name]
    files = [[realdata.path(f"{folder}/{kind}_{one}.{suffix}") for one in sections] for kind, suffix in (("spatial", "h5ad"), ("he", "jpg"))]
    began, settings = time.process_time(), with_overrides(xfuse.PRESETS["default"], ["fit.seed=0", f"fit.steps={steps}"])
    data, kept = sections_of(read_slides(*files, layer=None, gene_key=None), settings.input, lambda line: None, Path())
    hidden = hidden_rows(data, kept, 0.5, (), 0)
    judged = np.sort(np.argsort(-np.sum([np.asarray(one.matrix.sum(0)).ravel() for one in kept], 0), kind="stable")[:100])
    seen, spots = visible(without(data, hidden), kept, hidden)
    run = fit_sections("xfuse", seen, spots, settings, manifest(seed=0, device="auto", inputs={}, command=None))
    better = ppl_st.recalibrate(run, folds=folds, say=print)
    for section, table in zip(sections, score_hidden(better, data, kept, hidden, judged), strict=True):
        for label in ("coverage_90", "recalibrated_coverage"):
            values = table[label]
            mean, (low, high) = bootstrap_mean(values, np.random.default_rng(0)), values.quantile([0.05, 0.95])
            inside = values.between(0.8, 0.97).mean()
            print(f"{section} {label} {mean.mean:.3f} [{mean.lo:.3f}, {mean.hi:.3f}], genes {low:.2f} to {high:.2f}, in 80-97% {inside:.2f}")
        change = bootstrap_mean(table["recalibrated_crps"] - table["crps"], np.random.default_rng(0))
        print(f"  CRPS {table['crps'].mean():.4f} -> {table['recalibrated_crps'].mean():.4f} [{change.lo:+.4f}, {change.hi:+.4f}]")
    print(f"{name}, {steps} steps, {folds} folds: {time.process_time() - began:.0f} cpu s")


if __name__ == "__main__":
    if sys.argv[1] == "collect":
        collect(sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:])
    elif sys.argv[1] == "downstream":
        downstream(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1] == "places":
        places(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        table(sys.argv[2])

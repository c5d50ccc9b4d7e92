"""The demonstration of methods of images: simulated shapes, fit, maps and hidden spots against the truth, report.

Every kind of shape expresses a marker of its own and has a color of its own. Half of the spots of the first sections are shown to the fit; the
other half, and all of the last section, of which only the image is seen, are to be predicted.

OUT/
    data/     section<n>.h5ad, .png, .truth.npz and config.toml, as ``ppl-st simulate shapes`` writes them
    run/      the run folder
    maps/     <section>.zarr: mean and sd of every marker at every pixel
    figures/  pictures
    scores.csv, facts.csv, report.html
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from ppl_st import calibration_plots, plots
from ppl_st import config as configs
from ppl_st.api import fit_sections
from ppl_st.calibration import LEVELS
from ppl_st.errors import UserError
from ppl_st.evaluate_images import hidden_rows, score_baselines, score_hidden, visible
from ppl_st.image_cli import write_shapes
from ppl_st.image_plots import map_figure
from ppl_st.image_run import ImageRun
from ppl_st.io import atomic
from ppl_st.models import METHODS, load_method
from ppl_st.prepare import load_prepare
from ppl_st.prepare.xfuse import without
from ppl_st.report import Section, Table, write_report
from ppl_st.shapes import Shapes, shapes

__all__ = ["KNOBS", "OVERRIDES", "auc", "demo_images"]

# Sizes at which the whole takes well under three minutes on one idle core.
KNOBS: dict[str, Any] = {"sections": 4, "size": 256, "spots": "hexagonal", "pitch": 24.0}
OVERRIDES = ("fit.steps=200", "patch=128", "metagenes=6")
COLUMNS = {"raw_pcc": "PCC", "raw_r2": "R2", "log_score": "log score", "crps": "CRPS", "coverage_90": "coverage 90 %"}
CALLED = 0.5  # share of the reads of a shape from which a pixel counts as expressing


def demo_images(
    method: str,
    *,
    out: str | Path,
    seed: int = 0,
    draws: int = 50,
    device: str = "auto",
    overrides: Sequence[str] = (),
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, ImageRun, float]:
    """Run the demonstration and write everything below ``out``; scores, facts, the run, seconds. See `ppl_st.demo.demo`."""
    began = time.perf_counter()
    talk = say or (lambda line: None)
    folder = Path(out)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose another --out or remove it")
    world = shapes(seed=seed, **KNOBS)
    for _ in write_shapes(folder / "data", KNOBS, seed):
        pass
    talk(f"simulated {len(world.sections)} sections with {world.sections[0].adata.n_obs} spots each; the last is seen as an image only")
    settings = configs.merge(configs.pick_preset(load_method(method).PRESETS, "default"), {"input": _table(world.settings)})
    settings = configs.with_overrides(settings, [*OVERRIDES, *overrides, f"fit.seed={seed}", f"fit.device={device}"])
    data, kept = load_prepare(method).problem(world.slides, settings.input, lambda line: None)
    hidden = hidden_rows(data, kept, 0.5, (), seed)
    hidden[-1] = np.arange(len(kept[-1].names))
    fitted, spots = visible(without(data, hidden), kept, hidden)
    manifest = configs.manifest(seed=seed, device=device, inputs={}, command=command)
    manifest |= {"method": method, "preset": "default", "overrides": [*OVERRIDES, *overrides]}
    run = fit_sections(method, fitted, spots, settings, manifest, folder / "run", progress, talk)

    talk("hidden spots")
    genes = np.arange(len(data.genes))
    tables = pd.concat([*score_hidden(run, data, kept, hidden, genes, draws=draws), *score_baselines(data, kept, hidden, genes)])
    tables["fold"] = np.where(tables["fold"] == data.sections[-1].name, "unseen section, image only", "hidden spots of fitted sections")
    columns = tables.groupby(["fold", "method"], sort=False)[list(COLUMNS)].mean()
    scores = columns.rename(columns=COLUMNS).reset_index().set_index("method").rename(columns={"fold": "where"})
    talk("maps")
    facts, figures = _maps(run, world, data.genes, folder, draws, seed)
    mine = tables[(tables["method"] == method) & (tables["fold"] != "unseen section, image only")]
    coverage = mine[[f"coverage_{round(100 * level)}" for level in LEVELS]].to_numpy().T
    figures["calibration"] = ("Coverage of the intervals of hidden spots", calibration_plots.calibration_curve(LEVELS, coverage.mean(1), coverage))
    figures["loss"] = ("Loss of the variational fit", plots.loss_curve(run.record["losses"], unit="loss per entry"))
    for name, (_, figure) in figures.items():
        with atomic(folder / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=120)
    for name, table in (("scores", scores), ("facts", facts)):
        with atomic(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary)
    seconds = time.perf_counter() - began
    text = (
        f"{METHODS[method].summary}. Simulated: shapes whose kind is told by color and by a marker gene. Scores are means over markers and "
        f"sections.\n\nMade in {seconds:.0f} s, the figures included."
    )
    tables_of = [Table("Spots that the fit did not see", scores), Table("Maps against the truth", facts)]
    page = [Section("Sections", text, tables_of), Section("Figures", figures=dict(figures.values()))]
    write_report(folder / "report.html", f"{method} on simulated shapes", page, manifest=run.manifest)
    return scores, facts, run, seconds


def auc(score: NDArray[Any], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the probability that a positive pixel scores higher than another; NaN where a class is empty."""
    ones = int(positive.sum())
    if ones in (0, positive.size):
        return float("nan")
    ranks = rankdata(score.ravel())
    return float((ranks[positive.ravel()].sum() - ones * (ones + 1) / 2) / (ones * (positive.size - ones)))


def _maps(
    run: ImageRun, world: Shapes, genes: NDArray[np.str_], folder: Path, draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, tuple[str, Any]]]:
    """Maps of every marker in the first section and, from its image, in the last one, against the true rates."""
    import zarr

    order = [list(genes).index(gene) for gene in world.sections[0].adata.var_names]
    rows: dict[str, float] = {}
    figures: dict[str, tuple[str, Any]] = {}
    last = len(world.sections) - 1
    for n, place in ((0, "fitted section"), (last, "unseen section")):
        seen = run.at(section=f"section{n}") if n < last else run.at(image=world.sections[n].image, scale=1.0)
        path = folder / "maps" / f"section{n}.zarr"
        seen.maps(path, draws=draws, seed=seed)
        group = zarr.open_group(str(path), mode="r")
        one = seen.data.sections[0]
        left, top = (round(v) for v in one.origin)
        window = (slice(top, top + one.label.shape[0]), slice(left, left + one.label.shape[1]))
        kind, rate = world.sections[n].kind[window], world.rate(n)[window]
        arrays: dict[str, Any] = {name: group[name] for name in ("mean", "sd")}
        wrong, spread = [], []
        found = []
        for k, g in enumerate(order):
            mean, sd = np.asarray(arrays["mean"][g]), np.asarray(arrays["sd"][g])
            found.append(auc(mean, kind == k + 1))
            threshold = CALLED * world.profiles[k, k]
            wrong.append(((mean > threshold) != (rate[..., k] > threshold)).ravel())
            spread.append(sd.ravel())
            if k == 0:
                figures[f"map_{n}"] = (f"{place}: marker of circles", map_figure(one.image, mean, sd, str(genes[g]), truth=rate[..., k]))
        rows[f"{place}: AUC of the markers' maps (mean over kinds)"] = float(np.nanmean(found))
        tenth = np.quantile(np.concatenate(spread), (0.5, 0.9))
        error, sds = np.concatenate(wrong), np.concatenate(spread)
        rows[f"{place}: wrong calls where the sd is below its median (share)"] = float(error[sds <= tenth[0]].mean())
        rows[f"{place}: wrong calls where the sd is in its top tenth (share)"] = float(error[sds >= tenth[1]].mean())
    return pd.DataFrame({"value": rows}).rename_axis("quantity"), figures


def _table(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as TOML would give them."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

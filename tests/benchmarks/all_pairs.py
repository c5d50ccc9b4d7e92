"""Every method of the zoo on every real pair there is, one code, one table: what a change of a method has to be looked at with.

    OMP_NUM_THREADS=1 python tests/benchmarks/all_pairs.py run DIR [NAME ...]      # all of `PAIRS` (about 35 minutes), or some
    python tests/benchmarks/all_pairs.py show DIR [OLD_DIR]                        # tables as in BENCHMARKS.md; beside those of another code

Defaults, seed 0, 100 draws, five folds over genes (images: half of the spots of both sections hidden, then each section's image alone; SIID: the
truth that is another file). A pair whose folder holds scores is not run again. Data: $PPL_ST_DATA or ../shared/data, made ready in DIR/data.
"""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import realdata

CELLS, SPOTS = "vista,spaim,spagene", "derived_pair_xenium_brain/visium_like_spots.h5ad"
STARMAP, BULB, BREAST = "starmap_visual_cortex", "st_olfactory_bulb", "st_her2_breast"
PAIRS = {  # methods; target and reference, or sections with images and the ways to hide spots
    "osmFISH": (CELLS, "osmfish.h5ad", "osmfish_cortex/scrna.h5ad"),
    "STARmap 500": (CELLS, f"{STARMAP}/spatial.h5ad", f"{STARMAP}/scrna_zeisel500.h5ad"),
    "STARmap 1464": (CELLS, f"{STARMAP}/spatial.h5ad", f"{STARMAP}/scrna_zeisel1464.h5ad"),
    "STARmap 200": (CELLS, f"{STARMAP}/spatial.h5ad", f"{STARMAP}/scrna_zeisel200_5types.h5ad"),
    "pseudo-spots": (CELLS, SPOTS, "xenium.h5ad"),
    "bulb": (CELLS, f"{BULB}/spatial_MOB1.h5ad", f"{STARMAP}/scrna_zeisel500.h5ad"),
    "STARmap by Xenium": (CELLS, f"{STARMAP}/spatial.h5ad", "xenium.h5ad"),
    "Xenium": ("siid", "derived_pair_xenium_brain/xenium_like_panel.h5ad", SPOTS),
}
IMAGES = {"MOB": (BULB, "MOB1", "MOB2"), "her2": (BREAST, "C2", "C3")}
SCORES = [
    "log_pcc", "log_scc", "log_partial_pcc", "log_ssim", "log_js", "raw_pcc", "raw_scc", "raw_r2", "raw_partial_pcc", "crps", "log_score",
    "coverage_90",
]  # fmt: skip
LESS_IS_BETTER = ("log_js", "crps")
SEES_THE_TRUTH = "supervised_ridge"


def made(folder: Path, name: str) -> Path:
    """A file of the data folder, or one that is made of such files."""
    if "/" in name:
        return realdata.path(name)
    out = folder / "data" / name
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        if name == "osmfish.h5ad":
            whole = ad.read_h5ad(realdata.path("osmfish_cortex/spatial.h5ad"))
            result = whole[~whole.obs["duplicate_row"].astype(bool)].copy()
        else:
            parts = [ad.read_h5ad(realdata.path(f"derived_pair_xenium_brain/{part}.h5ad")) for part in ("xenium_like_panel", "heldout_truth_cells")]
            result = ad.concat(parts, axis=1, merge="first")
        result.write_h5ad(out)
    return out


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments of `ppl-st evaluate` by name."""
    found = {}
    for name, (methods, target, reference) in PAIRS.items():
        split = ["--truth", str(realdata.path("derived_pair_xenium_brain/heldout_truth_cells.h5ad"))] if methods == "siid" else ["--folds", "5"]
        found[name] = ["--methods", methods, "--target", str(made(folder, target)), "--reference", str(made(folder, reference)), *split]
    for name, (place, *sections) in IMAGES.items():
        files = []
        for one in sections:
            files += ["--target", str(realdata.path(f"{place}/spatial_{one}.h5ad")), "--image", str(realdata.path(f"{place}/he_{one}.jpg"))]
        found[name] = ["--methods", "xfuse", *files, "--holdout-spots", "0.5"]
        for one in sections:
            found[f"{one} by its image"] = ["--methods", "xfuse", *files, "--holdout-section", f"spatial_{one}"]
    return found


def run(folder: Path, names: list[str]) -> None:
    known = commands(folder)
    for name in names or known:
        out = folder / name.replace(" ", "_")
        if not (out / "scores.csv").exists():
            evaluate = [sys.executable, "-m", "ppl_st.cli", "evaluate", *known[name], "--seed", "0", "--quiet", "--out", str(out)]
            subprocess.run(evaluate, check=True)


def table_of(folder: Path) -> pd.DataFrame:
    """Mean scores (of images also the median of raw PCC) of every pair, method, and of the best baseline column by column."""
    rows = []
    for file in sorted(folder.glob("*/scores.csv")):
        scores = pd.read_csv(file)
        scores = scores.reindex(columns=scores.columns.union(SCORES, sort=False))
        parts = scores.groupby("fold") if (scores["method"] == "xfuse").any() else [("", scores)]
        for fold, part in parts:
            pair = f"{file.parent.name.replace('_', ' ')} {fold}".strip()
            mean = part.groupby(["kind", "method"])[SCORES].mean()
            mean["median raw_pcc"] = part.groupby(["kind", "method"])["raw_pcc"].median()
            mean["genes in 80-97%"] = part.groupby(["kind", "method"])["coverage_90"].apply(lambda x: x.between(0.8, 0.97).mean())
            cheap = mean.loc["baseline"].drop(index=SEES_THE_TRUTH, errors="ignore")
            best = pd.Series({column: cheap[column].min() if column in LESS_IS_BETTER else cheap[column].max() for column in mean})
            best["genes in 80-97%"] = float("nan")
            rows += [{"pair": pair, "method": method, **values} for method, values in mean.loc["method"].iterrows()]
            rows.append({"pair": pair, "method": "best baseline, column by column", **best})
    return pd.DataFrame(rows).set_index(["pair", "method"])


def show(folder: Path, old: Path | None) -> None:
    table = table_of(folder)
    if old is not None:
        before = table_of(old)
        common = table.index.intersection(before.index)
        both = {"before": before.loc[common], "now": table.loc[common]}
        table = pd.concat(both, names=["code"]).reorder_levels(["pair", "method", "code"]).sort_index()
    text = table.reset_index().map(lambda x: ("" if pd.isna(x) else f"{x:.3f}") if isinstance(x, float) else str(x))
    print("| " + " | ".join(text.columns) + " |\n|" + "---|" * len(text.columns))
    for row in text.itertuples(index=False):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), sys.argv[3:])
    else:
        show(Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)

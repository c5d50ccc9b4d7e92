"""The command line ``ppl-st``: arguments in, library calls, messages out.

Nothing heavy is imported before a command needs it. Results go to stdout, progress and errors to stderr. Exit
codes: 0 done, 2 a mistake that the message tells how to mend (or a machine that refused), 130 interrupted.
Output paths are tried before any computation. No statistics here; what commands share is `ppl_st.terminal`.
"""

import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ppl_st.errors import UserError
from ppl_st.terminal import (
    Commands,
    check_file,
    check_folder,
    command_line,
    knobs_of,
    print_evaluation,
    print_table,
    progress,
    speaker,
)

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Spatial-transcriptomics methods as explicit Pyro models, with posterior predictive uncertainty.",
)

Target = Annotated[Path | None, typer.Option("--target", help="The spatial data to improve (.h5ad, .zarr).")]
Targets = Annotated[
    list[Path] | None, typer.Option("--target", help="The spatial data; of methods of images one per section, also folders.")
]
Images = Annotated[list[Path] | None, typer.Option("--image", help="Histology, one per --target in the same order.")]
Reference = Annotated[
    Path | None, typer.Option("--reference", help="What knows more genes; for SIID: spots (.h5ad, .zarr).")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="One seed for everything.")]
Device = Annotated[str, typer.Option("--device", help="auto or cpu; no GPU has been tried.")]
Preset = Annotated[str, typer.Option("--preset", help="Named settings: default, paper, ...")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings over the preset.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value over preset and file; repeatable.")]
Draws = Annotated[int, typer.Option("--draws", min=2, help="Posterior draws behind every summary.")]
MemoryGb = Annotated[float, typer.Option("--memory-gb", min=0.01, help="Bound on the memory of the draws.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]


@app.command()
def methods() -> None:
    """The zoo: what each method needs and gives."""
    from ppl_st.models import METHODS

    for name, method in METHODS.items():
        typer.echo(f"{name}: {method.summary}\n  needs  {method.needs}\n  gives  {method.gives}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="New folder for data, run, figures and report.")],
    method: Annotated[str, typer.Argument(help="Name of the method.")] = "siid",
    seed: Seed = 0,
    cells: Annotated[int | None, typer.Option("--cells", min=100, help="Cells to simulate.")] = None,
    types: Annotated[int | None, typer.Option("--types", help="h: cell types; default: 8.")] = None,
    squares: Annotated[int | None, typer.Option("--squares", min=1, help="l: squares per side (siid).")] = None,
    rho: Annotated[float | None, typer.Option("--rho", min=0.001, help="Depth of the cells, 1 = 150 counts (default).")] = None,
    mixing: Annotated[float | None, typer.Option("--mixing", min=0, help="Dirichlet of mixed cells (siid).")] = None,
    overrides: Set = None,
    device: Device = "auto",
    draws: Draws = 100,
    quiet: Quiet = False,
) -> None:
    """Simulate, fit, predict, judge and report; all defaults, one to four minutes on two cores."""
    check_folder(out)
    from ppl_st.demo import demo as run_demo

    done = run_demo(
        method, out=out, seed=seed, cells=cells, types=types, squares=squares, rho=rho, mixing=mixing,
        draws=draws, device=device, overrides=overrides or (), progress=progress(quiet), say=speaker(quiet),
        command=command_line(),
    )  # fmt: skip
    images = "where" in done.scores
    print_table("Spots that were not shown (means over genes)" if images else "Genes that the cells never measured (means over genes)", done.scores)
    print_table("Against the truth of the simulation", done.facts)
    typer.echo(f"{done.seconds:.0f} s; see {out / 'report.html'}, {out / 'figures'} and run {out / 'run'}")


@app.command()
def simulate(
    protocol: Annotated[str, typer.Argument(help="checkerboard, blocks, spatial_field or shapes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    seed: Seed = 0,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Knob, as n_cells=2000.")] = None,
) -> None:
    """Write a simulated pair and its truth; of shapes: sections with images, the kinds behind them, and settings to fit them with."""
    check_folder(out)
    from ppl_st.io import write_adata
    from ppl_st.shapes import shapes
    from ppl_st.simulate import PROTOCOLS

    protocols = cast(dict[str, Callable[..., Any]], {**PROTOCOLS, "shapes": shapes})
    if protocol not in protocols:
        raise UserError(f"unknown protocol {protocol!r}; available: {', '.join(protocols)}")
    if protocol == "shapes":
        from ppl_st.image_cli import write_shapes

        for line in write_shapes(out, knobs_of(shapes, protocol, overrides or []), seed):
            typer.echo(line)
        return
    paths = {name: out / f"{name}.h5ad" for name in ("target", "reference", "truth")}
    taken = [str(path) for path in paths.values() if path.exists()]
    if taken:
        raise UserError(f"{', '.join(taken)}: already there; choose another --out or remove them")
    simulator = protocols[protocol]
    world = simulator(seed=seed, **knobs_of(simulator, protocol, overrides or []))
    for name, path in paths.items():
        write_adata(getattr(world, name), path)
        typer.echo(path)


@app.command()
def fit(
    method: Annotated[str, typer.Argument(help="Name of the method (see `ppl-st methods`).")],
    out: Annotated[Path, typer.Option("--out", help="Run folder.")],
    target: Targets = None,
    reference: Reference = None,
    image: Images = None,
    hold_out: Annotated[
        Path | None, typer.Option("--hold-out", help="Genes to hide from the fit, one per line.")
    ] = None,
    preset: Preset = "default",
    config: ConfigFile = None,
    overrides: Set = None,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="So many fits, seeds --seed and up, as one run: shows what differs between fits.")] = 1,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out with its own data and settings.")] = False,
    quiet: Quiet = False,
) -> None:
    """Fit a method and write the run folder."""
    from ppl_st.models import METHODS, load_method

    if method not in METHODS:
        load_method(method)  # says which name is closest
    check_folder(out)
    from ppl_st import api

    run = api.fit(
        method, target=target or None, reference=reference, image=image or None, hold_out=hold_out, preset=preset, config=config,
        overrides=overrides or (), seed=seed, seeds=seeds, device=device, out=out, resume=resume,
        progress=progress(quiet), say=speaker(quiet), command=command_line(),
    )  # fmt: skip
    known, unknown = int(run.measured.sum()), int((~run.measured).sum())
    more = f"next: ppl-st predict {shlex.quote(str(out))} --out imputed.h5ad"
    if not unknown and METHODS[method].reference != "image":
        more = "no gene is left to impute (--hold-out hides some from a fit)"
    typer.echo(f"{out}: {known} measured and {unknown} unmeasured genes; {more}")


@app.command()
def predict(
    runs: Annotated[list[Path], typer.Argument(help="Run folder; several (recalibrated) are stacked.")],
    out: Annotated[Path, typer.Option("--out", help="Output .h5ad or .zarr.")],
    genes: Annotated[Path | None, typer.Option("--genes", help="Gene list; default: unmeasured (--turned: all).")] = None,
    target: Annotated[Path | None, typer.Option("--target", help="Other cells of the same panel.")] = None,
    draws: Draws = 100,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Also K joint count draws.")] = 0,
    seed: Seed = 0,
    memory_gb: MemoryGb = 1.0,
    proportions: Annotated[bool, typer.Option("--proportions", help="Deconvolve the spots.")] = False,
    turned: Annotated[bool, typer.Option("--turned", help="Reference cells as the target's platform would show them.")] = False,
    as_reference: Annotated[
        str | None, typer.Option("--as-reference", help="vista: cells as reference cells of this condition (a value of batch_key), or all.")
    ] = None,
    section: Annotated[str | None, typer.Option("--section", help="xfuse: section to look at.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="xfuse: a new image without counts.")] = None,
    scale: Annotated[
        float | None, typer.Option("--scale", help="xfuse: side of the new image as used over its own; default: as of the fit's images.")
    ] = None,
    mask: Annotated[str | None, typer.Option("--mask", help="xfuse: tissue of the new image, a file not 0 there, or none: all of it.")] = None,
    maps: Annotated[Path | None, typer.Option("--maps", help="xfuse: genes to map at every pixel (out: .zarr).")] = None,
    quantiles: Annotated[bool, typer.Option("--quantiles", help="xfuse: maps of the 5 and 95 % quantiles too.")] = False,
    png: Annotated[Path | None, typer.Option("--png", help="xfuse: folder for a picture per map, all on one color scale.")] = None,
    areas: Annotated[bool, typer.Option("--areas", help="xfuse: the annotated regions.")] = False,
    cells: Annotated[Path | None, typer.Option("--cells", help="xfuse: cells of a label image.")] = None,
    differential: Annotated[str | None, typer.Option("--differential", help="xfuse: REGION,REGION (out: .csv).")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="xfuse: activities as colors (out: .png).")] = False,
    quiet: Quiet = False,
) -> None:
    """Impute genes in every cell, or (--proportions) deconvolve the spots of the run. Several runs: their mixture, weighted by held-out scores.

    --turned: the reference's cells as the target's platform would show them. --as-reference: the target's cells as the reference's would show.
    """
    wanted = {"maps": maps, "areas": areas, "cells": cells, "differential": differential, "summary": summary}
    asked = [name for name, value in wanted.items() if value]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} exclude each other; run predict once for each")
    if maps and genes:
        raise UserError(f"--genes {genes} goes not with --maps {maps}, which names the genes to map; leave out --genes")
    check_file(out, asked[0] if asked else "predict", inputs=[target, *(run / f"{role}.h5ad" for run in runs for role in ("target", "reference"))])
    store = out.with_name(f"{out.stem}.samples.zarr")
    if proportions and (genes or target or samples or len(runs) > 1 or turned or as_reference):
        raise UserError("--proportions goes with one run, without --genes, --target, --samples, --turned and --as-reference; run predict twice")
    from ppl_st.api import load
    from ppl_st.data import read_genes
    from ppl_st.io import refuse_inputs
    from ppl_st.models import METHODS
    from ppl_st.stream import write_whole

    names = None if genes is None else read_genes(genes)
    loaded, say = [load(run) for run in runs], speaker(quiet)
    for path, one in product((out, store), loaded):
        refuse_inputs(path, one.manifest)
    fitted = loaded[0]
    several = "seeds" in fitted.manifest
    if METHODS[fitted.method].reference == "image" and len(runs) == 1 and not proportions and not several:
        from ppl_st.image_cli import predict_places

        if turned:
            fitted.turned()  # says that there is no other direction
        if as_reference:
            fitted.as_reference()
        lines = predict_places(
            cast(Any, fitted), out, cast(Any, asked[0] if asked else "spots"), genes=maps or genes, target=target, section=section, image=image,
            scale=scale, mask=mask, cells=cells, regions=differential, pictures=png, quantiles=quantiles, draws=draws, samples=samples, seed=seed,
            memory_gb=memory_gb, say=say,
        )  # fmt: skip
        for line in lines:
            typer.echo(line)
        return
    places = several and METHODS[fitted.method].reference == "image"
    names = fitted.genes if places and names is None else names
    beside = {"section": section, "image": image, "scale": scale, "mask": mask, "png": png, "quantiles": quantiles, "target": places and target}
    if options := ", ".join(f"--{one}" for one in (*asked, *(name for name, value in beside.items() if value))):
        if several:
            raise UserError(f"{runs[0]}: seeds together predict their own cells or spots; for {options} give one of them, {runs[0]}/seed0, say")
        raise UserError(f"{runs[0]}: a run of {fitted.method} has no images; leave out {options}")
    if len(runs) > 1:
        from ppl_st.stack import stack

        fitted = stack(loaded)
        for name, score in fitted.record["inner_log_score"].items():
            share = f"{fitted.record['weights'].get(name, 1):.3f}"
            say(f"weight {share}, log score {score:.4f} on {fitted.record['inner_genes']} held-out genes: {name}")
        say("forecasts are mixed uncorrected: no layers lower and upper; in Python ppl_st.recalibrate(ppl_st.stack.stack(runs)) makes them")
    if turned:
        fitted = fitted.turned()
        names = fitted.genes if names is None else names
    if as_reference:
        fitted = fitted.as_reference(None if as_reference == "all" else as_reference)
    if proportions:
        result = fitted.proportions(draws=draws, seed=seed)
        write_whole(result, out)
        shape = result.shape
    else:
        shape = fitted.write(out, names, target=target, draws=draws, seed=seed, memory_gb=memory_gb, say=say)
    typer.echo(f"{out}: {shape[0]} x {shape[1]}")
    if samples:
        say(f"{samples} joint draws")
        fitted.write_samples(store, None if names is None else list(names), samples, seed, target=target, memory_gb=memory_gb)
        typer.echo(f"{store}: count[{samples}, {shape[0]}, {shape[1]}]")


@app.command()
def recalibrate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    folds: Annotated[int, typer.Option("--folds", min=2, help="Fits, each without a part of the genes.")] = 5,
    level: Annotated[float, typer.Option("--level", help="Wanted coverage of the intervals.")] = 0.9,
    guarantee: Annotated[bool, typer.Option(help="Keep the finite-sample promise (wider with few genes).")] = False,
    draws: Draws = 100,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Correct the forecasts of new genes on held-out genes of the target; predict then adds layers lower and upper."""
    from ppl_st.api import load
    from ppl_st.refit import recalibrate as run_recalibration

    run_recalibration(
        load(run), folds=folds, level=level, guarantee=guarantee, draws=draws, seed=seed, say=speaker(quiet)
    )
    typer.echo(f"{run / 'recalibration.json'}; next: ppl-st predict {shlex.quote(str(run))} --out imputed.h5ad")


@app.command()
def evaluate(
    methods: Annotated[str, typer.Option("--methods", help="Names, separated by commas.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for scores.csv and summary.csv.")],
    target: Targets = None,
    reference: Reference = None,
    image: Images = None,
    holdout_spots: Annotated[
        float | None, typer.Option("--holdout-spots", help="xfuse: share of every section's spots to hide; default: 0.5.")
    ] = None,
    holdout_section: Annotated[list[str] | None, typer.Option("--holdout-section", help="xfuse: hide all spots of it.")] = None,
    top_genes: Annotated[int | None, typer.Option("--top-genes", min=1, help="xfuse: how many genes are judged; default: 100.")] = None,
    folds: Annotated[str | None, typer.Option("--folds", help="A number (default: 5), or a file of lines gene<TAB>fold.")] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", help="No folds: counts of other genes in the same cells.")
    ] = None,
    max_folds: Annotated[int | None, typer.Option("--max-folds", min=1, help="Only the first N.")] = None,
    baselines: Annotated[bool, typer.Option(help="Run the cheap baselines on the same split.")] = True,
    seed: Seed = 0,
    preset: Preset = "default",
    config: ConfigFile = None,
    overrides: Set = None,
    device: Device = "auto",
    draws: Draws = 100,
    memory_gb: MemoryGb = 1.0,
    quiet: Quiet = False,
) -> None:
    """Score methods on genes they were not shown, or methods of images on spots they were not shown, with baselines on the same split."""
    check_folder(out)
    from ppl_st.models import METHODS

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UserError(f"--methods {methods!r}: names no method; give one or more of {', '.join(METHODS)}, with commas between")
    images = any(name in METHODS and METHODS[name].reference == "image" for name in names)
    genes = {"reference": reference, "folds": folds, "truth": truth, "max-folds": max_folds}
    spots = {"holdout-spots": holdout_spots, "holdout-section": holdout_section or None, "top-genes": top_genes}
    if foreign := [f"--{name}" for name, value in (genes if images else spots).items() if value is not None]:
        raise UserError(f"evaluate: {methods} is judged on hidden {'spots' if images else 'genes'}; leave out {', '.join(foreign)}")
    if truth is not None and (beside := [f"--{name}" for name in ("folds", "max-folds") if genes[name] is not None]):
        raise UserError(f"evaluate: --truth names the genes that are judged, so there are no folds; leave out {' and '.join(beside)}, or --truth")
    if images:
        from ppl_st.evaluate_images import evaluate_spots

        share, most = 0.5 if holdout_spots is None else holdout_spots, 100 if top_genes is None else top_genes
        judged = evaluate_spots(
            names, target or [], image or [], share=share, sections=holdout_section or (), genes=most, baselines=baselines, seed=seed,
            preset=preset, config=config, overrides=overrides or (), device=device, draws=draws, memory_gb=memory_gb, out=out,
            progress=progress(quiet), say=speaker(quiet), command=command_line(),
        )  # fmt: skip
        print_evaluation(judged.summary, out)
        return
    if target is None or len(target) != 1 or reference is None or image:
        raise UserError(f"evaluate: {methods} needs one --target and a --reference, and no --image")
    from ppl_st.evaluate import evaluate as run_evaluation

    done = run_evaluation(
        names, target[0], reference,
        folds=5 if folds is None else int(folds) if folds.lstrip("-").isdigit() else folds, truth=truth, max_folds=max_folds,
        baselines=baselines, seed=seed, preset=preset, config=config, overrides=overrides or (),
        device=device, draws=draws, memory_gb=memory_gb, out=out, progress=progress(quiet), say=speaker(quiet),
        command=command_line(),
    )  # fmt: skip
    print_evaluation(done.summary, out)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Evaluation folders and run folders.")],
    truth: Annotated[Path | None, typer.Option("--truth", help="Counts that judge the runs' held-out genes.")] = None,
    metric: Annotated[str, typer.Option("--metric", help="What ranks: log_score, crps, log_pcc, raw_pcc, ...")] = "log_score",
    out: Annotated[Path | None, typer.Option("--out", help="Also write the table as .csv.")] = None,
    draws: Draws = 100,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Rank methods on the genes they were all judged on, with paired uncertainty over genes."""
    if out is not None:
        check_file(out, "compare", inputs=[truth])
    from ppl_st.compare import compare as run_comparison
    from ppl_st.io import atomic

    table = run_comparison(folders, truth=truth, metric=metric, draws=draws, seed=seed, say=speaker(quiet))
    about = [name for name in (metric, "rank", "se", "difference", "lo", "hi", "dse", "wins", "gene_rank", "weight") if name in table]
    print_table(f"By {metric}; difference to the best, 95 % bootstrap interval over {table['genes'].iloc[0]} genes", table[about])
    others = table.drop(columns=[*about, "genes"])
    print_table("Means of the other scores", others.loc[~others.isna().all(axis=1)])
    if out is not None:
        with atomic(out) as temporary:
            table.to_csv(temporary)


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="What to vary, a TOML file (see `ppl_st.sweep`).")],
    out: Annotated[Path, typer.Option("--out", help="Folder; one that holds a part of this sweep is continued.")],
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Variants of a method on the same splits, with paired uncertainty over genes and seeds."""
    check_folder(out)
    from ppl_st.sweep import sweep as run_sweep

    table = run_sweep(spec, out=out, device=device, progress=progress(quiet), say=speaker(quiet), command=command_line())
    for metric, rows in table.groupby("metric", sort=False):
        print_table(f"{metric}: difference to {rows['variant'].iloc[0]}, 95 % interval over genes", rows.drop(columns="metric").set_index("variant"))


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(help="Run folder; several (recalibrated) are stacked.")],
    out: Annotated[Path, typer.Option("--out", help="posterior.nc or posterior.zarr.")],
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws per chain.")] = 25,
    cells: Annotated[str, typer.Option("--cells", help="How many cells' draws (picked by --seed), or all.")] = "500",
    truth: Annotated[Path | None, typer.Option("--truth", help="Counts of held-out genes: adds their log-likelihood.")] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write the posterior in ArviZ's schema; of several runs that of their mixture. Any number of cells goes to a .zarr."""
    if cells != "all" and not (cells.isdigit() and int(cells)):
        raise UserError(f"--cells {cells}: give a number of cells, or all")
    check_file(out, "export", inputs=[truth])
    from ppl_st.api import load
    from ppl_st.stack import stack

    run = load(runs[0]) if len(runs) == 1 else stack(list(map(load, runs)))
    run.export(out, draws=draws, seed=seed, max_cells=None if cells == "all" else int(cells), truth=truth, say=speaker(quiet))
    typer.echo(out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder or evaluation folder.")],
    out: Annotated[Path, typer.Option("--out", help="The .html file to write.")],
    genes: Annotated[Path | None, typer.Option("--genes", help="Genes to browse, one per line; default: 50.")] = None,
    truth: Annotated[Path | None, typer.Option("--truth", help="Counts that judge the run's held-out genes.")] = None,
    groups: Annotated[str | None, typer.Option("--groups", help="Column of the target's obs: coverage in each group of cells.")] = None,
    draws: Draws = 100,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained HTML page about a run (with a browser of its genes) or an evaluation."""
    check_file(out, "report", inputs=[genes, truth])
    from ppl_st.data import read_genes
    from ppl_st.report_run import report_folder

    names = None if genes is None else list(read_genes(genes))
    report_folder(folder, out, genes=names, truth=truth, groups=groups, draws=draws, seed=seed, say=speaker(quiet))
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Entry point of ``ppl-st``."""
    app(prog_name="ppl-st")


if __name__ == "__main__":  # python -m ppl_st.cli
    main()

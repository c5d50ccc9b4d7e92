"""What ``ppl-st predict`` does with a run of a method of images, and the files of ``ppl-st simulate shapes``."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppl_st.data import read_genes
from ppl_st.errors import UserError
from ppl_st.image_run import NOVELTY_TILE, ImageRun
from ppl_st.io import atomic, write_adata

__all__ = ["Want", "predict_places", "write_shapes"]

UNLIKE = 0.99  # share of the fit's tiles that are nearer to the others, above which an image's tile is unlike the fit
ON = 0.5  # share of a place on tissue, below which it lies off it
Want = Literal["spots", "areas", "cells", "maps", "differential", "summary"]
REFUSED: dict[Want, tuple[str, ...]] = {  # options that mean nothing beside what is wanted
    "spots": ("png", "quantiles"),
    "areas": ("target", "image", "png", "quantiles"),
    "cells": ("target", "png", "quantiles"),
    "maps": ("target", "samples"),
    "differential": ("target", "section", "image", "samples", "png", "quantiles"),
    "summary": ("target", "genes", "samples", "png", "quantiles"),
}
REMEDIES = {
    "target": "spots of your own are predicted without --maps, --areas, --cells, --differential and --summary",
    "image": "a new image has no annotated regions; give --cells, a label image over it",
    "section": "--differential pools all annotated sections",
    "genes": "--summary shows the activities of all genes",
    "samples": "joint draws are of spots, --areas and --cells",
    "png": "pictures are of --maps",
    "quantiles": "q05 and q95 of spots, --areas and --cells are always written; --quantiles is of --maps",
}


def predict_places(
    run: ImageRun,
    out: Path,
    want: Want,
    *,
    genes: Path | None,
    target: Path | None,
    section: str | None,
    image: Path | None,
    scale: float | None,
    mask: str | None,
    cells: Path | None,
    regions: str | None,
    pictures: Path | None,
    quantiles: bool,
    draws: int,
    samples: int,
    seed: int,
    memory_gb: float,
    say: Callable[[str], None],
) -> Iterator[str]:
    """Write ``out``; yields a line per file. ``regions``: two names with a comma between; ``pictures``: folder for a PNG per mapped gene."""
    given = {"target": target, "section": section, "image": image, "genes": genes, "samples": samples, "png": pictures, "quantiles": quantiles}
    for option in REFUSED[want]:
        if given[option]:
            beside = "" if want == "spots" else f" goes not with --{want}"
            raise UserError(f"--{option}{beside}: {REMEDIES[option]}; leave out --{option}")
    for option, value in (("scale", scale), ("mask", mask)):
        if value is not None and image is None:
            raise UserError(f"--{option} is of a new image; give one with --image")
    if section is not None and image is None:
        run.section(section)  # says which there are
    names = None if genes is None else list(read_genes(genes))
    if want == "differential":
        first, comma, second = (regions or "").partition(",")
        if not comma:
            raise UserError(f"--differential {regions}: name two annotated regions, as --differential tumor,stroma")
        table = run.differential(first.strip(), second.strip(), names, draws=draws, seed=seed)
        with atomic(out) as temporary:
            table.to_csv(temporary)
        yield f"{out}: {len(table)} genes"
        return
    if want in ("maps", "summary"):
        seen = run.at(section=section, image=image, scale=scale, mask=mask, say=say)
        if want == "summary":
            from PIL import Image

            with atomic(out) as temporary:
                Image.fromarray(seen.summary(draws=draws, seed=seed)).save(temporary)
            yield str(out)
            return
        say(f"mapping {len(run.genes) if names is None else len(names)} genes, {draws} draws")
        shape = seen.maps(out, names, draws=draws, quantiles=quantiles, seed=seed, memory_gb=memory_gb)
        yield f"{out}: mean, sd{', q05, q95' if quantiles else ''} [{', '.join(map(str, shape))}]"
        if image is not None:
            import zarr

            stored: Any = zarr.open_group(str(out), mode="r")["novelty"]
            yield _unlike(np.asarray(stored)) + _over(seen)
        if pictures is not None:
            from ppl_st.image_plots import map_pictures

            yield from map(str, map_pictures(out, seen.data.sections[0].image, pictures))
        return
    if want == "areas":
        seen = run.areas(section)
    elif cells is not None:
        base = run if image is None else run.at(section=section, image=image, scale=scale, mask=mask, say=say)
        seen = base.cells(cells, section, say=say)
    elif target is None and section is None and image is None:
        seen = run  # the spots of the fit
    elif target is None:
        areas = "" if image is not None else " --areas,"
        raise UserError(f"which spots? give --target with their positions, or --maps,{areas} --cells, --summary")
    else:
        seen = run.at(target, section=section, image=image, scale=scale, mask=mask, say=say)
    say(f"predicting {len(run.genes) if names is None else len(names)} genes at {len(seen.target.names)} {want}, {draws} draws")
    if seen is not run and (off := int((seen.target.obs["tissue"] < ON).sum())):
        yield f"{off} of {len(seen.target.names)} {want} lie off the tissue{'' if image is None else ' found'}: little is predicted there"
    if image is not None:
        unlike = seen.novelty()
        column, row = (seen.data.sections[0].centers // NOVELTY_TILE).astype(int).T
        seen = replace(seen, target=replace(seen.target, obs=seen.target.obs.assign(novelty=unlike[row, column])))
        yield _unlike(unlike) + _over(seen)
    rows, columns = seen.write(out, names, draws=draws, seed=seed, memory_gb=memory_gb, say=say)
    yield f"{out}: {rows} x {columns}"
    if samples:
        store = out.with_name(f"{out.stem}.samples.zarr")
        seen.write_samples(store, names, samples, seed, memory_gb=memory_gb)
        yield f"{store}: count[{samples}, {rows}, {columns}]"


def _unlike(novelty: NDArray[np.float64]) -> str:
    """A sentence about the novelty of the tiles of an image."""
    known = novelty[np.isfinite(novelty)]
    median, share = (np.median(known), np.mean(known > UNLIKE)) if len(known) else (np.nan, 0.0)
    return f"novelty: median {median:.2f}; {share:.0%} of the tiles above {UNLIKE}"


def _over(seen: ImageRun) -> str:
    """Words about the section of the fit that a new image lies over."""
    over = seen.lies_over()
    return "" if over is None else f"; lies over {over[0]}, whose spots have a say (correlation {over[1]:.2g})"


def write_shapes(out: Path, knobs: dict[str, Any], seed: int) -> Iterator[str]:
    """OUT/section0.h5ad, section0.png, section0.truth.npz (kind, depth, hidden, profiles), ..., config.toml; yields a line per section."""
    import tomli_w
    from PIL import Image

    from ppl_st.shapes import shapes

    if (out / "config.toml").exists() or (out / "section0.h5ad").exists():
        raise UserError(f"{out}: holds a simulation already; choose another --out or remove it")
    world = shapes(seed=seed, **knobs)
    for n, section in enumerate(world.sections):
        path = out / f"section{n}.h5ad"
        write_adata(section.adata, path)
        with atomic(path.with_suffix(".png")) as temporary:
            Image.fromarray(section.image).save(temporary)
        with atomic(out / f"section{n}.truth.npz") as temporary:
            truth = {"kind": section.kind, "depth": section.depth, "hidden": section.hidden, "profiles": world.profiles}
            np.savez_compressed(temporary, allow_pickle=False, **truth)
        yield str(path)
    with atomic(out / "config.toml") as temporary:
        temporary.write_text(tomli_w.dumps({"input": world.settings}), encoding="utf-8")
    yield str(out / "config.toml")

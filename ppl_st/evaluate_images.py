"""Judge methods of images on spots that they were not shown, beside interpolation and Gaussian processes on the same split.

Two ways to hide spots:

- a share of every section's spots, at random: ``default_rng(seed).permutation(n)[: int(share n)]`` for each section;
- whole sections: their image is seen, none of their spots (in-silico expression).

Sections are prepared once from all spots (positions are no secret; counts of hidden ones are taken out, their pixels then belong to no
measurement), so a hidden spot is judged where it lies. So scale, crop and mask of a hidden section, too, are those that its spots give; a new image
without spots (`ppl_st.prepare.xfuse.new_image`) has to do without. Genes judged are those with the largest totals. Scores are per gene over hidden
spots of a section (fold = section), on raw counts and on log1p(count); methods add log score, CRPS and randomised coverage.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import config as configs
from ppl_st.api import Source, fit_sections
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.evaluate import Evaluation, labelled, line_of, reset_peak, summarise
from ppl_st.evaluation_folder import begun, refuse_evaluated, write_csv
from ppl_st.image_baselines import IMAGE_BASELINES, SPATIAL, Places, Split
from ppl_st.image_features import image_features
from ppl_st.image_run import ImageRun, spots_of
from ppl_st.images import Source as ImageSource
from ppl_st.metrics import partial_pcc, score_table
from ppl_st.models import METHODS, load_method
from ppl_st.models.xfuse.data import Data, Section
from ppl_st.prepare import load_prepare
from ppl_st.prepare.xfuse import section_at, without
from ppl_st.slides import read_slides

__all__ = ["evaluate_spots", "hidden_rows", "score_baselines", "score_hidden", "visible"]

Rows = list[NDArray[np.int64]]


def evaluate_spots(
    methods: Sequence[str],
    targets: Sequence[Source],
    images: Sequence[ImageSource] = (),
    *,
    share: float = 0.5,
    sections: Sequence[str] = (),
    genes: int = 100,
    baselines: bool = True,
    seed: int = 0,
    preset: str = "default",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    draws: int = 100,
    memory_gb: float = 1.0,
    out: str | Path | None = None,
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Evaluation:
    """Fit on the spots that stay, score on the hidden ones.

    Parameters
    ----------
    methods
        Names in ``ppl_st.METHODS``, of images; may be empty to score the baselines alone.
    targets, images
        As in `ppl_st.fit`.
    share, sections
        Share of every section's spots that is hidden; or the sections (names: the files' without suffix) of which all spots are.
    genes
        How many genes are judged, those with the largest totals over all spots.
    baselines
        Whether `ppl_st.image_baselines` are run as well.
    seed, preset, config, overrides, device, draws, memory_gb, out, progress, say, command
        As in `ppl_st.evaluate.evaluate`.
    """
    talk = say or (lambda line: None)
    for method in methods:
        load_method(method)
        if METHODS[method].reference != "image":
            raise UserError(f"evaluate: {method} takes no image; hidden spots judge methods of images, --folds judges the others")
    settings = configs.pick_preset(load_method(methods[0] if methods else "xfuse").PRESETS, preset)
    settings = settings if config is None else configs.read(config, settings)
    settings = configs.with_overrides(settings, [*overrides, f"fit.seed={seed}", f"fit.device={device}"])
    folder = None if out is None else Path(out)
    if folder is not None:
        refuse_evaluated(folder)
    slides = read_slides(targets, images, layer=settings.layer, gene_key=settings.gene_key)
    pictures = Path() if folder is None else folder.parent
    data, kept = load_prepare("xfuse").problem(slides, settings.input, talk, pictures)
    hidden = hidden_rows(data, kept, share, sections, seed)
    inputs = {f"target{n}": one for n, one in enumerate(targets)}
    inputs |= {f"image{n}": one for n, one in enumerate(images) if not isinstance(one, np.ndarray)}
    manifest = configs.manifest(seed=seed, device=device, inputs=inputs, command=command)
    manifest |= {"methods": list(methods), "preset": preset, "overrides": list(overrides), "draws": draws, "genes": genes}
    manifest |= {"holdout": list(sections) or share}

    total = np.sum([np.asarray(one.matrix.sum(0), np.float64).ravel() for one in kept], 0)
    judged = np.sort(np.argsort(-total, kind="stable")[:genes])
    seen = without(data, hidden)
    parts = []
    with begun(folder, manifest):
        for method in methods:
            reset_peak()
            began = time.perf_counter()
            fitted, spots = visible(seen, kept, hidden)
            run = fit_sections(method, fitted, spots, settings, manifest, None, progress, talk)
            seconds = time.perf_counter() - began
            parts += score_hidden(run, data, kept, hidden, judged, seconds=seconds, draws=draws, memory_gb=memory_gb, say=talk)
        if baselines:
            parts += score_baselines(data, kept, hidden, judged, talk)
    scores = pd.concat(parts, ignore_index=True)
    summary = summarise(scores, seed, talk)
    if folder is not None:
        write_csv(scores, folder / "scores.csv")
        write_csv(summary, folder / "summary.csv")
    return Evaluation(scores, summary)


def hidden_rows(data: Data, kept: Sequence[Counts], share: float, names: Sequence[str], seed: int) -> Rows:
    """Rows of each section that are taken out."""
    known = [one.name for one in data.sections]
    unknown = [name for name in names if name not in known]
    if unknown or (names and set(names) >= set(known)):
        raise UserError(f"evaluate: hold out some of the sections {', '.join(known)}, not {', '.join(unknown or names)}")
    if names:
        return [np.arange(len(one.names)) if name in names else np.zeros(0, np.int64) for name, one in zip(known, kept, strict=True)]
    if not 0 < share < 1:
        raise UserError(f"evaluate: the share of hidden spots is {share:g}; it must lie between 0 and 1")
    hidden = [np.sort(np.random.default_rng(seed).permutation(len(one.names))[: int(share * len(one.names))]) for one in kept]
    if not any(map(len, hidden)):
        raise UserError(f"evaluate: a share of {share:g} of {max(len(one.names) for one in kept)} spots hides none; raise --holdout-spots")
    return hidden


def visible(seen: Data, kept: Sequence[Counts], hidden: Rows) -> tuple[Data, Counts]:
    """What a fit may see of `without`'s problem: a section without a spot left is no part of it, nor are covariates that only it tells apart."""
    stay = [one.take_rows(np.setdiff1d(np.arange(len(one.names)), rows)) for one, rows in zip(kept, hidden, strict=True)]
    keep = [n for n, one in enumerate(stay) if len(one.names)]
    sections, covariates, codes = [seen.sections[n] for n in keep], {}, []
    for c, (name, levels) in enumerate(seen.covariates.items()):
        own = [int(one.covariates[c]) for one in sections]
        known = sorted(set(own) - {-1})
        if len(known) > 1:
            covariates[name] = tuple(levels[code] for code in known)
            codes.append([known.index(code) if code >= 0 else -1 for code in own])
    table = np.array(codes, np.int64).reshape(-1, len(sections)).T
    data = seen._replace(sections=tuple(one._replace(covariates=row) for one, row in zip(sections, table, strict=True)), covariates=covariates)
    return data, spots_of(data, [stay[n] for n in keep])


def score_hidden(
    run: ImageRun,
    data: Data,
    kept: Sequence[Counts],
    hidden: Rows,
    judged: NDArray[np.int64],
    *,
    seconds: float = 0.0,
    draws: int = 100,
    memory_gb: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[pd.DataFrame]:
    """A score table per section with hidden spots; a section that the run does not know is predicted from its image alone, which is prepared with the
    places of its spots."""
    known = {one.name: one for one in run.data.sections}
    parts = []
    for section, one, rows in zip(without(data, hidden).sections, kept, hidden, strict=True):
        if not len(rows):
            continue
        began = time.perf_counter()
        truth = one.take_rows(rows)
        assert truth.xy is not None
        base = known.get(section.name, section._replace(covariates=np.full(len(run.data.covariates), -1)))
        predicted = run.looking(section_at(base, truth.xy), truth.names, truth.xy).predict(
            list(data.genes[judged]), draws=draws, seed=run.config.fit.seed, memory_gb=memory_gb, truth=truth.take_genes(data.genes[judged])
        )
        table = _scored(truth, judged, np.asarray(predicted.X)).join(predicted.var.drop(columns=["measured", "mean_count"]))
        parts.append(labelled(table, run.method, "method", section.name, seconds + time.perf_counter() - began))
        say(line_of(parts[-1]))
    return parts


def _scored(truth: Counts, judged: NDArray[np.int64], counts: NDArray[Any]) -> pd.DataFrame:
    """`score_table` with the ``log`` scale log1p(count): the depth of a hidden spot is part of what is asked. Given depth: raw_partial_pcc,
    the depth being the count of all genes but the judged one, which would else be taken out of itself."""
    genes, matrix = truth.genes[judged], truth.matrix[:, judged]
    own = matrix.toarray().astype(np.float64)  # [spots, judged]
    rest = np.maximum(truth.totals[:, None] - own, 1.0)
    columns = zip(own.T[..., None], counts.T[..., None], rest.T, strict=True)
    given_depth = [partial_pcc(x, estimate, np.column_stack([np.log(depth), depth]))[0] for x, estimate, depth in columns]
    table = score_table(matrix, counts, np.ones(len(truth.names)), genes)
    return table.drop(columns="log_partial_pcc").assign(raw_partial_pcc=given_depth)


def score_baselines(
    data: Data, kept: Sequence[Counts], hidden: Rows, judged: NDArray[np.int64], say: Callable[[str], None] = lambda line: None
) -> list[pd.DataFrame]:
    """A score table per baseline and section with hidden spots."""
    places = [_places(section, n, len(one.names)) for n, (section, one) in enumerate(zip(data.sections, kept, strict=True))]
    stay = [np.setdiff1d(np.arange(len(one.names)), rows) for one, rows in zip(kept, hidden, strict=True)]
    counts = np.concatenate([one.matrix[rows][:, judged].toarray().astype(np.float64) for one, rows in zip(kept, stay, strict=True)])
    split = Split(_join(places, stay), counts, _join(places, hidden))
    measured = np.isin(split.asked.section, split.seen.section)
    parts = []
    for name, estimate in IMAGE_BASELINES.items():
        possible = measured if name in SPATIAL else np.ones_like(measured)
        if not possible.any():
            continue
        reset_peak()
        began = time.perf_counter()
        values = np.full((len(measured), len(judged)), np.nan)
        values[possible] = estimate(split._replace(asked=_join([split.asked], [np.flatnonzero(possible)])))
        seconds = time.perf_counter() - began
        for n, (section, rows) in enumerate(zip(data.sections, hidden, strict=True)):
            if possible[split.asked.section == n].any():
                truth = kept[n].take_rows(rows)
                mine = split.asked.section == n
                parts.append(labelled(_scored(truth, judged, values[mine]), name, "baseline", section.name, seconds))
                say(line_of(parts[-1]))
    return parts


def _places(section: Section, number: int, rows: int) -> Places:
    """The spots of a section, seen from the middle of each; the image in the spot for its mean intensity."""
    xy = section.centers[:rows]
    column, row = np.floor(xy).astype(np.int64).T
    features = image_features(section.image, section.mask, section.pitch)[:, row, column].T.astype(np.float64)
    grey = section.image.mean(2) / 255
    label = section.label.ravel()
    sums = np.bincount(label, grey.ravel(), section.counts.shape[0] + 1)[1 : rows + 1]
    size = np.bincount(label, minlength=section.counts.shape[0] + 1)[1 : rows + 1]
    return Places(np.full(rows, number), xy / section.pitch, features, sums / np.maximum(size, 1))


def _join(places: Sequence[Places], rows: Rows) -> Places:
    return Places(*(np.concatenate([values[at] for values, at in zip(field, rows, strict=True)]) for field in zip(*places, strict=True)))

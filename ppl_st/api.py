"""fit and load: from files or AnnData to a `Run`. The only room that knows data, methods and inference at once."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from ppl_st import config as configs
from ppl_st import run_folder
from ppl_st.asked import whole
from ppl_st.data import Counts, read_genes
from ppl_st.errors import UserError
from ppl_st.image_run import ImageRun, read_sections, spots_of, write_inputs
from ppl_st.images import Source as ImageSource
from ppl_st.inference.ensemble import chains_of
from ppl_st.inference.settings import unfinished_warmup
from ppl_st.inference.svi import fit as run_svi
from ppl_st.inference.svi import load_state, pick_device
from ppl_st.layers import with_layers
from ppl_st.models import METHODS, load_method
from ppl_st.observation import name_of
from ppl_st.pairs import as_given, read_pair
from ppl_st.posterior import Run
from ppl_st.prepare import hold_out_genes, load_prepare
from ppl_st.slides import read_slides
from ppl_st.stack import seeds as seeds_of
from ppl_st.stack import unlike_inputs

Source: TypeAlias = str | Path | AnnData
INTERRUPTED = "interrupted"


class Interrupted(RuntimeError):
    """The fit was stopped by a signal; its state is saved (if it has a folder)."""


def fit(
    method: str,
    *,
    target: Source | Sequence[Source] | None = None,
    reference: Source | None = None,
    image: ImageSource | Sequence[ImageSource] | None = None,
    hold_out: Sequence[str] | NDArray[np.str_] | str | Path | None = None,
    preset: str = "default",
    likelihood: str | Callable[..., Any] | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    seed: int = 0,
    seeds: int = 1,
    device: str = "auto",
    out: str | Path | None = None,
    resume: bool = False,
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> Run:
    """Fit a method of the zoo.

    Parameters
    ----------
    method
        Name in ``ppl_st.METHODS``.
    target, reference
        AnnData, ``.h5ad`` or ``.zarr`` with raw counts (``layers["counts"]``, else ``X``); never modified. For SIID: cells and spots.
    image
        For methods of images: one per target (a list of targets: several sections), as path or array. None: the targets carry their own.
    hold_out
        Genes (or a file with one per line) taken out of the target before the fit, to be predicted and judged.
    preset, config, overrides
        Named settings, a TOML file over them, ``"key=value"`` over both.
    likelihood
        Over all of these, the likelihood of the target's counts: a name, or a function of your own (contract: `ppl_st.observation`).
    seed, device
        One seed for everything; "auto" is the CPU (with ``resume``: the device that the run began on). A GPU is refused.
    seeds
        So many fits, with the seeds ``seed``, ``seed`` + 1, ...: together one run whose draws take turns, so that what differs between fits is
        part of its doubt and can be looked at (``between_sd`` of `Run.predict`, chains in ArviZ). Each is a run folder of its own within ``out``.
    out
        Run folder; None keeps the run in memory.
    resume
        Continue the interrupted run in ``out`` with its own data and settings; anything else than ``device`` beside it is refused. With
        ``seeds`` it continues those that had begun, and fits the others as is asked: with the same data, genes held out and settings, which is
        checked first. Other seeds than before undo a correction by `ppl_st.recalibrate`, which was that of the earlier ones.
    progress, say
        Progress bar of the training loop; a function that receives one line per event.
    command
        The command line that asked for it, to be kept in the manifest.

    Raises
    ------
    UserError
        Wrong input, settings or folder.
    Interrupted
        After SIGTERM or Ctrl-C; with ``out`` the state is saved and ``resume=True`` goes on.
    """
    whole("seed", seed, 0)
    whole("seeds", seeds, 1)
    module = load_method(method)
    folder = None if out is None else Path(out)
    talk = say or (lambda line: None)
    law = [] if likelihood is None else [f"likelihood={likelihood if isinstance(likelihood, str) else name_of(likelihood)}"]
    asked = partial(_settings, module, preset, config, [*overrides, *law], device)
    targets, pictures = _listed(target), _listed(image)
    inputs: dict[str, Any] = {f"target{n or ''}": one for n, one in enumerate(targets)} | ({} if reference is None else {"reference": reference})
    inputs |= {f"image{n or ''}": one for n, one in enumerate(pictures) if not isinstance(one, np.ndarray)}
    inputs |= {} if hold_out is None else {"hold-out": hold_out}
    options: dict[str, Any] = {"target": target, "reference": reference, "image": image, "hold-out": hold_out}
    options |= {"preset": preset != "default" or None, "likelihood": likelihood, "config": config, "set": overrides or None}
    if seeds > 1:
        one = partial(
            fit, method, target=target, reference=reference, image=image, hold_out=hold_out, preset=preset, likelihood=likelihood, config=config,
            overrides=overrides, device=device, progress=progress, command=command,
        )  # fmt: skip
        again = partial(fit, method, device=device, resume=True, progress=progress)
        given = inputs if inputs or any(value is not None for value in options.values()) else None
        return _fit_seeds(one, again, asked, range(seed, seed + seeds), folder, resume, talk, given)
    if resume:
        beside = ", ".join(f"--{name}" for name, value in (options | {"seed": seed or None}).items() if value is not None)
        if beside:
            raise UserError(f"--resume: {folder} is continued with its own data and settings; leave out {beside}, or fit anew with another --out")
        return _resume(method, module, folder, device, progress, talk)
    images = METHODS[method].reference == "image"
    if target is None or (reference is None and not images):
        raise UserError(f"{method} needs target{'' if images else ' and reference'} (see `ppl-st methods`); give {'it' if images else 'both'}")
    if images and (reference is not None or hold_out is not None):
        raise UserError(f"{method} takes images, no reference, and predicts the genes that it was shown: leave out reference and hold_out")
    if not images and (image is not None or len(targets) > 1):
        raise UserError(f"{method} takes one target and no image (see `ppl-st methods`)")
    if folder is not None:
        _refuse_used(folder)
    settings, overrides = asked(seed), [*overrides, *law]
    _on_cpu(settings.fit.device)  # refused before anything is written
    if images:
        manifest = configs.manifest(seed=seed, device=device, inputs=inputs, command=command)
        manifest |= {"method": method, "preset": preset, "overrides": list(overrides)}
        slides = read_slides(targets, pictures, layer=settings.layer, gene_key=settings.gene_key)
        data, kept = load_prepare(method).problem(slides, settings.input, talk, Path() if folder is None else folder.parent)
        return fit_sections(method, data, spots_of(data, kept), settings, manifest, folder, progress, talk)
    assert reference is not None
    spots = METHODS[method].reference == "spots"
    pair = read_pair(targets[0], reference, layer=settings.layer, gene_key=settings.gene_key, need_spatial=(spots, spots), say=talk)
    cells, other = map(as_given, pair)
    if cells.xy is None:
        talk(f"target ({cells.source}): no coordinates (obsm['spatial']): neighbors in space cannot inform its cells")
    if hold_out is not None:
        cells = hold_out_genes(cells, other, read_genes(hold_out) if isinstance(hold_out, str | Path) else hold_out)
    if getattr(settings, "reference_layers", ()):
        other = with_layers(other, reference, settings.reference_layers, gene_key=settings.gene_key)
    data, cells, other = load_prepare(method).problem(cells, other, settings, talk)
    manifest = configs.manifest(seed=seed, device=device, inputs=inputs, command=command)
    manifest |= {"method": method, "preset": preset, "overrides": list(overrides)}
    with run_folder.fresh(folder):
        if folder is not None:
            run_folder.write_inputs(folder, settings, manifest, cells, other)
        return train(method, module, settings, data, cells, other, manifest, folder, None, progress, talk)


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _on_cpu(device: str) -> None:
    """Refuse a GPU: the loop can use one, but starts, models and predictors of the zoo make tensors on the CPU."""
    if pick_device(device).type != "cpu":
        raise UserError(f"fit setting device = {device!r}: the methods compute on the CPU, no GPU has been tried; use auto or cpu")


def _settings(module: Any, preset: str, config: str | Path | None, overrides: Sequence[str], device: str, seed: int) -> Any:
    settings = configs.pick_preset(module.PRESETS, preset)
    settings = settings if config is None else configs.read(config, settings)
    return configs.with_overrides(settings, [*overrides, f"fit.seed={seed}", f"fit.device={device}"])


def _fit_seeds(
    one: Callable[..., Run],
    again: Callable[..., Run],
    asked: Callable[[int], Any],
    numbers: Sequence[int],
    folder: Path | None,
    resume: bool,
    say: Callable[[str], None],
    given: Mapping[str, Any] | None = None,
) -> Run:
    """The fits of several seeds as one run; in a folder each has its own, and ``manifest.json`` beside them is written last.

    ``one`` fits a seed, ``again`` continues it, ``asked`` gives the settings of a new one and ``given`` its inputs by role (None: no option was
    given at all): those of a seed that had begun must be the same.
    """
    if folder is not None and not resume:
        _refuse_used(folder)
    runs = []
    begun = [n for n in numbers if resume and folder is not None and (folder / f"seed{n}" / "config.toml").is_file()]
    described = {role: configs.describe(source) for role, source in (given or {}).items()} if begun else {}
    for number in begun if given is not None or len(begun) < len(numbers) else []:
        assert folder is not None
        wanted, place = asked(number), folder / f"seed{number}"
        stored = configs.read(place / "config.toml", wanted)
        if replace(stored, fit=replace(stored.fit, device=wanted.fit.device)) != wanted:
            raise UserError(f"--resume: {place} was begun with other settings (config.toml); all seeds need the same, as in the first command")
        before = run_folder.read_json(place / "manifest.json").get("inputs", {})
        other = sorted({*unlike_inputs(before, described), *(set(before) ^ set(described))}) if described else []
        if other:
            raise UserError(f"--resume: {place} was begun with another --{' and --'.join(other)}; all seeds need the same, as in the first command")
    for number in numbers:
        own = None if folder is None else folder / f"seed{number}"
        how = again if number in begun else partial(one, seed=number)
        try:
            runs.append(how(out=own, say=lambda line, n=number: say(f"seed {n}: {line}")))
        except Interrupted as error:
            kept = "nothing is kept" if folder is None else "continue with the same command and --resume"
            raise Interrupted(f"seed {number}: {str(error).partition(';')[0]}; {kept}") from error
    joint = seeds_of(runs, folder)
    if folder is None:
        return joint
    if (folder / "manifest.json").is_file() and _seeds(folder) != list(numbers) and run_folder.drop_correction(folder):
        say(f"the correction in {folder} was that of other seeds and is removed; next: ppl-st recalibrate {shlex.quote(str(folder))}")
    run_folder.write_json(folder / "manifest.json", joint.manifest)
    return _corrected(joint, folder)


def _corrected(run: Run, folder: Path) -> Run:
    inner, layer = run_folder.read_inner(folder)
    return replace(run, inner=inner, recalibration=layer)


def fit_sections(
    method: str,
    data: Any,
    spots: Counts,
    settings: Any,
    manifest: dict[str, Any],
    folder: Path | None = None,
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] = lambda line: None,
) -> ImageRun:
    """Fit a method of images to checked sections (`ppl_st.prepare.xfuse.problem`) whose rows are ``spots``."""
    _on_cpu(settings.fit.device)
    with run_folder.fresh(folder):
        if folder is not None:
            write_inputs(folder, settings, manifest, spots, data)
        run = train(method, load_method(method), settings, data, spots, spots, manifest, folder, None, progress, say)
    assert isinstance(run, ImageRun)
    return run


def load(path: str | Path) -> Run:
    """Open a finished run folder; needs nothing but the folder."""
    folder = Path(path)
    numbers = _seeds(folder)
    if numbers:
        return _corrected(seeds_of([load(folder / f"seed{number}") for number in numbers], folder), folder)
    if not (folder / "weights.safetensors").is_file():
        what = (
            "was interrupted: continue it with --resume"
            if (folder / "config.toml").is_file()
            else "is not a run folder"
        )
        raise UserError(f"{folder}: {what}" + ("" if folder.exists() else " (it does not exist)"))
    method, module, settings, data, cells, other, manifest = _stored(folder)
    record = run_folder.read_json(folder / "fit.json")
    spec = _spec_from(module, record, manifest, folder)
    pair = module.empty(settings, spec, data, record["chains"])
    run_folder.load_weights(folder, pair)
    return _run(method, module, settings, spec, pair, data, cells, other, manifest, record, folder)


def _seeds(folder: Path) -> list[int]:
    """Seeds of the fits in a folder of several; none in that of a run."""
    if (folder / "config.toml").is_file() or not (folder / "manifest.json").is_file():
        begun = sorted(one.name for one in folder.glob("seed*") if (one / "config.toml").is_file())
        if begun:
            raise UserError(f"{folder}: holds {', '.join(begun)}, and not all seeds are finished: continue with --resume and the same --seeds")
        return []
    return list(run_folder.read_json(folder / "manifest.json").get("seeds", []))


def _spec_from(module: Any, record: dict[str, Any], manifest: dict[str, Any], folder: Path) -> Any:
    try:
        return module.spec_from(record["spec"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'fit.json'}: its specification does not fit this ppl_st ({error}); {_writer(manifest)}") from error


def _writer(manifest: dict[str, Any]) -> str:
    version = manifest.get("versions", {}).get("ppl_st", "unknown")
    return f"the run was written by ppl_st {version}: use that version, or fit again"


def _refuse_used(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give a folder for the run (--out)")
    if folder.is_dir() and any(folder.iterdir()):
        several = (folder / "manifest.json").is_file() and not (folder / "target.h5ad").is_file()  # runs of several seeds lie in it
        known = several or (folder / "config.toml").is_file()
        remedy = (
            "--resume and --out alone continue it; else choose another --out" if known else "choose an empty or new folder (--out)"
        )
        raise UserError(f"{folder}: {'already holds a run' if known else 'is not empty and not a run'}; {remedy}")


def _stored(folder: Path) -> tuple[str, Any, Any, Any, Counts, Counts, dict[str, Any]]:
    """Method, settings and data of a run folder."""
    manifest = run_folder.read_json(folder / "manifest.json")
    method = manifest.get("method")
    if method not in METHODS:
        raise UserError(f"{folder / 'manifest.json'}: names no method of this ppl_st ({method}); is {folder} a run folder? If so, it is damaged")
    module = load_method(method)
    try:
        settings = configs.read(folder / "config.toml", module.PRESETS["default"])
    except UserError as error:
        raise UserError(f"{error}; {_writer(manifest)}") from error
    if METHODS[method].reference == "image":
        data, cells = read_sections(folder)
        return method, module, settings, data, cells, cells, manifest
    if (folder / "profiles.h5ad").is_file():
        settings = replace(settings, profiles=str(folder / "profiles.h5ad"))
    spots = METHODS[method].reference == "spots"
    cells, other = read_pair(folder / "target.h5ad", folder / "reference.h5ad", layer="X", need_spatial=(spots, spots))
    data, cells, other = load_prepare(method).problem(cells, other, settings, lambda line: None)
    return method, module, settings, data, cells, other, manifest


def _resume(
    method: str, module: Any, folder: Path | None, device: str, progress: Literal["auto", "quiet"], say: Callable[[str], None]
) -> Run:
    if folder is None or not (folder / "config.toml").is_file():
        raise UserError(f"--resume: {folder} is not a run folder; name the folder of the interrupted run (--out)")
    if (folder / "weights.safetensors").is_file():
        run = load(folder)
        if run.method != method:
            raise UserError(f"--resume: {folder} holds a run of {run.method}, not of {method}")
        say("the run is already finished")
        return run
    stored, module, settings, data, cells, other, manifest = _stored(folder)
    if stored != method:
        raise UserError(f"--resume: {folder} holds a run of {stored}, not of {method}")
    try:
        _on_cpu(settings.fit.device if device == "auto" else device)
    except UserError as error:
        raise UserError(f"--resume: {folder}: {error}: name one with --device") from error
    if device not in ("auto", settings.fit.device):
        settings = replace(settings, fit=replace(settings.fit, device=device))
        configs.write(settings, folder / "config.toml")
    record = None
    if (folder / "fit.json").is_file() and (folder / "state.pt").is_file():
        record = run_folder.read_json(folder / "fit.json")
    return train(stored, module, settings, data, cells, other, manifest, folder, record, progress, say)


def train(
    method: str,
    module: Any,
    settings: Any,
    data: Any,
    cells: Counts,
    other: Counts,
    manifest: dict[str, Any],
    folder: Path | None,
    record: dict[str, Any] | None,
    progress: Literal["auto", "quiet"],
    say: Callable[[str], None],
) -> Run:
    """Warm start (or the stored state), SVI, selection, storage."""
    seed = settings.fit.seed
    state = None
    if record is None:
        began = time.perf_counter()
        pair, spec = module.start(data, settings, seed, say)
        record = {"spec": module.spec_to(spec), "chains": len(chains_of(pair)), "status": "training"}
        record["start_seconds"] = time.perf_counter() - began
        if folder is not None:
            run_folder.write_json(folder / "fit.json", record)
    else:
        assert folder is not None
        spec = _spec_from(module, record, manifest, folder)
        pair = module.empty(settings, spec, data, record.get("trained", record["chains"]))  # the state has all of them
        state = load_state(folder / "state.pt")
        say(f"resuming at step {state.step} of {settings.fit.steps}")
    steps = getattr(spec, "steps", settings.fit.steps)  # some methods choose them on inner held-out genes
    preset = module.PRESETS.get(manifest.get("preset"), module.PRESETS["default"])
    for line in unfinished_warmup(settings.fit, steps, preset.fit):
        say(line)
    batches = module.batches(data, settings, seed)
    adversary = module.adversary(pair, settings) if hasattr(module, "adversary") else None
    edit = module.edit(pair, data, settings, seed) if hasattr(module, "edit") else None
    watch = module.watch(pair, settings, seed) if hasattr(module, "watch") else None
    scale = module.loss_scale(data, settings) if hasattr(module, "loss_scale") else 1.0 / (cells.matrix.shape[0] * cells.matrix.shape[1])
    options: dict[str, Any] = {"folder": folder, "scale": scale, "progress": progress, "adversary": adversary, "edit": edit, "watch": watch}
    state, info = run_svi(pair, batches, settings.fit, state, until=steps, **options)
    if info.stop_reason == INTERRUPTED and state.step < steps:
        kept = "nothing is kept" if folder is None else f"continue with --resume --out {shlex.quote(str(folder))}"
        raise Interrupted(f"interrupted at step {state.step} of {steps}; {kept}")
    reason = "steps" if info.stop_reason == INTERRUPTED else info.stop_reason  # fewer steps than the settings have are no interruption
    trained = len(chains_of(pair))
    pair = module.select(pair, data, settings, seed)
    done = state.tally  # of the whole fit, what came before an interruption included
    say(f"SVI: {state.step} steps, {done.seconds:.1f} s, stopped: {reason}")
    record = {
        "spec": record["spec"],
        "chains": len(chains_of(pair)),
        "trained": trained,
        "status": "done",
        "steps": state.step,
        "stop_reason": reason,
        "start_seconds": record["start_seconds"],
        "seconds": done.seconds,
        "peak_memory_bytes": info.peak_memory,
        "skipped": done.faults,
        "losses": done.losses,
        "watched": done.watched,
    }
    if hasattr(module, "alignment"):
        record["alignment"] = module.alignment(pair, data, settings, seed)
        say("alignment: " + ", ".join(f"{name} {value:.3f}" for name, value in record["alignment"].items()))
    if folder is not None:
        run_folder.write_result(folder, pair, record)
    return _run(method, module, settings, spec, pair, data, cells, other, manifest, record, folder)


def _run(
    method: str,
    module: Any,
    settings: Any,
    spec: Any,
    pair: Any,
    data: Any,
    cells: Counts,
    other: Counts,
    manifest: dict[str, Any],
    record: dict[str, Any],
    folder: Path | None,
) -> Run:
    prepared = load_prepare(method)
    inner, layer = (None, None) if folder is None else run_folder.read_inner(folder)

    def new_cells(counts: Counts) -> tuple[Any, Counts]:
        return prepared.new_cells(counts, cells, data, settings)

    kind = ImageRun if METHODS[method].reference == "image" else Run
    return kind(method, module, settings, spec, pair, data, cells, other, manifest, record, new_cells, folder, inner, layer)

"""Variants of a method on the same splits, over seeds: what a likelihood, a prior or a factor brings, with paired uncertainty.

A specification (TOML; relative paths are taken from its folder):

    method = "vista"
    target = "cells.h5ad"
    reference = "scrna.h5ad"
    folds = 5                     # of the genes; also: truth = "truth.h5ad", max_folds = 2, draws = 50, preset = "default"
    seeds = [0, 1, 2, 3, 4]       # each splits the genes anew and fits anew

    [variants.default]            # the first one is what the others are compared with
    [variants.gimvi]
    graph = "none"
    [variants.published]
    preset = "paper"
    fit.steps = 500

    [grid]                        # and all combinations of these over the first variant
    likelihood = ["nb", "poisson"]
    platform = ["hierarchical", "none"]

Result: DIR/<variant>/seed<k> are evaluations (`ppl_st.evaluate`, for ``ppl-st compare``), DIR/scores.csv all their genes, DIR/summary.csv the
table. A sweep that was stopped goes on where it was; variants and seeds may be added.

For a metric m, variant v, seed k, gene g:  d_g = mean_k (m_vkg - m_0kg),  difference = mean_g d_g with its 95 % bootstrap interval over genes, and
``seed_se`` = sd over seeds of mean_g (m_vkg - m_0kg) over the root of their number: the one says whether other genes, the other whether another
split and start would tell the same.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tomli_w

from ppl_st import config as configs
from ppl_st.compare import METRICS
from ppl_st.errors import UserError
from ppl_st.evaluate import evaluate, read_folds
from ppl_st.evaluation_folder import is_of_sweep, read_scores
from ppl_st.io import atomic
from ppl_st.metrics import bootstrap_mean
from ppl_st.models import load_method
from ppl_st.run_folder import read_json

__all__ = ["read_spec", "summarise", "sweep"]

FILE, COUNT = "the name of a file in quotes", "a whole number"
# Key -> types of its value, the least number, what to give.
KEYS: dict[str, tuple[tuple[type, ...], int, str]] = {
    "method": ((str,), 0, "the name of a method in quotes"), "target": ((str,), 0, FILE), "reference": ((str,), 0, FILE), "truth": ((str,), 0, FILE),
    "folds": ((int, str), 2, f"{COUNT}, 2 or more, or {FILE}"), "max_folds": ((int,), 1, f"{COUNT}, 1 or more"),
    "draws": ((int,), 2, f"{COUNT}, 2 or more"), "preset": ((str,), 0, "the name of a preset in quotes"),
    "seeds": ((list,), 0, "a list of different whole numbers, such as [0, 1, 2]"), "variants": ((dict,), 0, "tables, as [variants.default]"),
    "grid": ((dict,), 0, "a table of lists"),
}  # fmt: skip
FIRST = "default"  # variant of a sweep that has a grid only
OTHERS = ("evaluation.json", "log_prob.npz", "config.toml", "manifest.json")  # files of an evaluation or a run, which no sweep has at its top


def read_spec(path: str | Path) -> dict[str, Any]:
    """The specification with every default in place and ``variants``: name -> settings, the grid's combinations among them.

    Raises
    ------
    UserError
        Unreadable, unknown or missing keys, a value of the wrong type or out of range, or a name that cannot be a folder.
    """
    path = Path(path)
    spec = configs.read_toml(path)
    unknown, missing = sorted(set(spec) - set(KEYS)), [key for key in ("method", "target", "reference") if key not in spec]
    if unknown or missing:
        what = f"unknown key {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        raise UserError(f"{path}: {what}; a sweep has {', '.join(sorted(KEYS))}")
    for key, value in spec.items():
        _check(path, key, key, value)
    if "truth" in spec and (beside := [key for key in ("folds", "max_folds") if key in spec]):
        raise UserError(f"{path}: truth names the genes that are judged, so there are no folds; leave out {' and '.join(beside)}, or truth")
    spec = {"folds": 5, "max_folds": None, "draws": 50, "preset": "default", "seeds": [0], "truth": None, "grid": {}} | spec
    seeds = spec["seeds"]
    if not seeds or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds = {seeds!r}; give {KEYS['seeds'][2]}")
    for key in ("target", "reference", "truth", "folds"):
        if isinstance(spec[key], str):
            spec[key] = path.parent / spec[key]
    variants = dict(spec.get("variants", {})) or {FIRST: {}}
    first = next(iter(variants.values()))
    grid = _dotted(spec["grid"])
    for key, values in grid.items():
        if not isinstance(values, list):
            raise UserError(f"{path}: grid.{key} = {values!r}; give a list of values")
    for values in itertools.product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        if changes:  # a dotted key comes after the first variant's table, and the last one of two wins
            variants[" ".join(f"{key}={value}" for key, value in changes.items())] = first | changes
    for name, settings in variants.items():
        if not isinstance(settings, dict) or not name or name.startswith(".") or set(name) & set("/\\\0"):
            raise UserError(f"{path}: variants.{name}: give a table of settings under a name that can be a folder")
        _check(path, f"variants.{name}.preset", "preset", settings.get("preset", spec["preset"]))
        if isinstance(settings.get("profiles"), str) and settings["profiles"] != "none":
            variants[name] = settings | {"profiles": str(path.parent / settings["profiles"])}
    if len(variants) < 2:
        raise UserError(f"{path}: {len(variants)} variant; name at least two under [variants], or a [grid]")
    return spec | {"variants": variants}


def _check(path: Path, name: str, key: str, value: Any) -> None:
    """Refuse a value of ``name`` that is none for the key of `KEYS`."""
    kinds, least, what = KEYS[key]
    if type(value) not in kinds or (isinstance(value, int) and value < least):
        raise UserError(f"{path}: {name} = {value!r}; give {what}")


def sweep(
    spec: str | Path,
    *,
    out: str | Path,
    device: str = "auto",
    progress: Literal["auto", "quiet"] = "quiet",
    say: Callable[[str], None] | None = None,
    command: str | None = None,
) -> pd.DataFrame:
    """Evaluate every variant of ``spec`` (file) for every seed into ``out``, and return `summarise` of it.

    Raises
    ------
    UserError
        What `read_spec` and `ppl_st.evaluate` refuse, or a folder that holds something else than a sweep.
    """
    talk, folder = say or (lambda line: None), Path(out)
    plan = read_spec(spec)
    _refuse_others(folder)
    if isinstance(plan["folds"], Path):
        try:
            read_folds(plan["folds"])
        except UserError as error:
            raise UserError(f"{spec}: {error}") from None
    presets = load_method(plan["method"]).PRESETS
    for name, settings in plan["variants"].items():  # a mistake in the last variant is said before the first is fitted
        preset, overrides = _settings(settings, plan["preset"])
        try:
            configs.with_overrides(configs.pick_preset(presets, preset), overrides)
        except UserError as error:
            raise UserError(f"{spec}: variant {name!r}: {error}") from None
    tables = []
    for seed, (name, settings) in itertools.product(plan["seeds"], plan["variants"].items()):
        place = folder / name / f"seed{seed}"
        preset, overrides = _settings(settings, plan["preset"])
        if (place / "summary.csv").is_file():
            _refuse_other(place, plan, preset, overrides)
        else:
            if place.exists() and any(place.iterdir()):
                if (place / "config.toml").exists() or not (place / "evaluation.json").is_file():
                    raise UserError(f"{place}: is no part of a sweep, and stays as it is; choose another --out, or give the variant another name")
                talk(f"{place}: unfinished, done again")
                shutil.rmtree(place)
            talk(f"{name}, seed {seed}")
            evaluate(
                [plan["method"]], plan["target"], plan["reference"], folds=plan["folds"], truth=plan["truth"], max_folds=plan["max_folds"],
                baselines=False, seed=seed, preset=preset, overrides=overrides, device=device, draws=plan["draws"], out=place,
                progress=progress, say=talk, command=command,
            )  # fmt: skip
        scores = read_scores(place)
        scores.insert(0, "variant", name)
        tables.append(scores.assign(seed=seed))
        _write(pd.concat(tables), folder / "scores.csv")
    summary = summarise(pd.concat(tables))
    _write(summary, folder / "summary.csv")
    return summary


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per variant and metric: mean, difference to the first variant with its interval over genes, standard error over seeds.

    A metric that is not finite for every gene has no row.

    Parameters
    ----------
    scores
        Columns variant, seed, gene and metrics, as in scores.csv; the first variant in it is what the others are compared with.
    """
    scores = scores.assign(coverage_error=(scores["coverage_90"] - 0.9).abs()) if "coverage_90" in scores else scores
    metrics = [metric for metric in METRICS if metric in scores and metric != "peak_gb"] + ["coverage_90"] * ("coverage_90" in scores)
    values = scores.set_index(["variant", "seed", "gene"])[metrics].astype(float)
    names = list(dict.fromkeys(scores["variant"]))
    first, rows = values.loc[names[0]], []
    for name in names:
        own = values.loc[name]
        difference = own - first  # rows pair by seed and gene
        genes, seeds = difference.groupby("gene").mean(), difference.groupby("seed").mean()
        for metric in metrics:
            if not np.isfinite(genes[metric]).all():
                continue
            interval = bootstrap_mean(genes[metric].to_numpy(), np.random.default_rng(0))
            error = float(seeds[metric].std() / np.sqrt(len(seeds)))  # nan with one seed
            rows.append({
                "variant": name, "metric": metric, "mean": own[metric].mean(), "difference": interval.mean, "lo": interval.lo, "hi": interval.hi,
                "seed_se": error, "genes": len(genes), "seeds": len(seeds),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Lists of a grid by dotted key: ``fit.steps = [1, 2]`` is a table within a table to TOML."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _settings(variant: Mapping[str, Any], preset: str) -> tuple[str, list[str]]:
    """Preset and ``key=value`` texts of a variant."""
    return variant.get("preset", preset), _overrides({key: value for key, value in variant.items() if key != "preset"})


def _overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings, tables within them flattened, as ``key=value`` texts."""
    texts = []
    for key, value in settings.items():
        if isinstance(value, dict) and key == "fit":
            texts += _overrides(value, f"{prefix}{key}.")
        elif isinstance(value, dict):  # as `fit.lr_groups`: a table in one line
            texts.append(f"{prefix}{key}={{{', '.join(f'{json.dumps(name, ensure_ascii=False)} = {_toml(one)}' for name, one in value.items())}}}")
        else:
            texts.append(f"{prefix}{key}={_toml(value)}")
    return texts


def _toml(value: Any) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def _refuse_others(folder: Path) -> None:
    """Refuse a folder that is an evaluation or a run: its tables would be overwritten."""
    other = [name for name in OTHERS if (folder / name).exists()]
    tables = [folder / name for name in ("scores.csv", "summary.csv")]
    other += [table.name for table in tables if table.is_file() and not is_of_sweep(table)]
    if other:
        raise UserError(f"{folder}: holds an evaluation or a run ({', '.join(other)}), no sweep, and stays as it is; choose another --out")


def _refuse_other(place: Path, plan: Mapping[str, Any], preset: str, overrides: list[str]) -> None:
    """Refuse what an earlier sweep into the same folder left, unless it was made as this one would make it."""
    stored = read_json(place / "evaluation.json")
    if (stored["preset"], stored["overrides"]) != (preset, overrides):
        raise UserError(
            f"{place}: was made with preset {stored['preset']} and {', '.join(stored['overrides']) or 'nothing set'}, now it is preset {preset} and "
            f"{', '.join(overrides) or 'nothing set'}; choose another --out, or give the variant another name"
        )
    wanted = {"folds": None if plan["truth"] else str(plan["folds"]), "max_folds": plan["max_folds"], "draws": plan["draws"]}
    before = {key: stored.get(key) for key in wanted}  # evaluations of older versions lack some
    for role in ("target", "reference", "truth", *(["folds"] if isinstance(plan["folds"], Path) and not plan["truth"] else [])):
        wanted[role] = configs.hash_path(plan[role]) if plan[role] else None
        before[role] = stored["inputs"].get(role, {}).get("sha256")
    if other := [key for key in wanted if wanted[key] != before[key]]:
        raise UserError(f"{place}: was made with another {' and another '.join(other)}; what is compared must share it: choose another --out")


def _write(table: pd.DataFrame, path: Path) -> None:
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)

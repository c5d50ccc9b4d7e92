"""Frozen dataclasses to and from TOML, command-line overrides, and the manifest of a run.

A configuration is a value: an instance of a frozen dataclass, possibly nested. A preset is such a value,
defined beside its method. Reading a file or applying ``--set`` means laying a partial table over a value
(``merge``), so everything that is not mentioned keeps the value of the preset, and everything that is
mentioned must exist, have the annotated type and lie in the declared range.

A field declares its type by its annotation (bool, int, float, str, Path, Literal, tuple, dict, a nested
dataclass, each or ``None``) and its range by ``field(default=..., metadata={"gt": 0, "le": 1})`` with the
keys ``gt``, ``ge``, ``lt``, ``le``. What a range cannot say goes into ``__post_init__`` as a ``ValueError``.
TOML has no null: ``None`` is written and read as the string "none".

This module does not know any method and keeps no global settings.
"""

import dataclasses
import hashlib
import math
import operator
import platform
import tomllib
import types
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import tomli_w

from ppl_st.errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "check",
    "describe",
    "dumps",
    "hash_adata",
    "hash_path",
    "manifest",
    "merge",
    "pick_preset",
    "read",
    "with_overrides",
    "write",
]

Config = TypeVar("Config")

_NONE = "none"
_BOUNDS = {
    "gt": (operator.gt, "greater than"),
    "ge": (operator.ge, "at least"),
    "lt": (operator.lt, "less than"),
    "le": (operator.le, "at most"),
}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Path: "a path in quotes",
}


class _Mismatch(Exception):
    """A value does not have the wanted type; carries the words for what was wanted."""


# ---- reading ----


def merge(config: Config, table: Mapping[str, Any], *, source: str = "config") -> Config:
    """A copy of ``config`` with the keys of ``table`` laid over it.

    Parameters
    ----------
    config
        Instance of a frozen dataclass; keys that ``table`` does not mention keep its values.
    table
        Partial, possibly nested, table of TOML values.
    source
        Where the table came from (a file name, "--set"); every message starts with it.

    Raises
    ------
    UserError
        Unknown key, wrong type, value out of range, or a combination that the dataclass refuses.
    """
    return _merge(config, table, source, prefix="")


def check(config: Config, *, source: str = "config") -> Config:
    """Return ``config`` if every value has its type and range; a dataclass built in Python checks neither.

    Raises
    ------
    UserError
        As ``merge`` does.
    """
    merge(config, _to_table(config), source=source)
    return config


def read(path: str | Path, config: Config) -> Config:
    """Lay the TOML file ``path`` over ``config`` (a preset) and return the result; see ``merge``."""
    return merge(config, read_toml(path), source=str(path))


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file, or ``UserError`` naming it."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Apply ``key=value`` texts (``--set``); of two for one key the last one wins. What a dataclass refuses is judged of all of them together.

    Keys may be dotted (``fit.lr=0.01``). Values are TOML literals (``0.01``, ``true``, ``[1, 2]``); what does
    not parse as one is taken as a bare string (``likelihood=nb``).
    """
    every: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        keys = [part.strip() for part in key.split(".")]
        if not equals or not all(keys):
            raise UserError(f"--set {item!r}: expected key=value, for example --set likelihood=nb")
        table: Any = _literal(text)
        for part in reversed(keys):
            table = {part: table}
        every = _overlay(config, every, table)
    return merge(config, every, source="--set")


def _overlay(config: Any, below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Table ``above`` over ``below``: of a nested dataclass key by key, any other value whole."""
    out = dict(below)
    for key, value in above.items():
        inner, old = getattr(config, key, None), below.get(key)
        if dataclasses.is_dataclass(inner) and isinstance(old, dict) and isinstance(value, dict):
            value = _overlay(inner, old, value)
        out[key] = value
    return out


def pick_preset(presets: Mapping[str, Config], name: str) -> Config:
    """The preset called ``name``, or ``UserError`` naming the closest one."""
    if name not in presets:
        raise UserError(f"unknown preset {name!r}{_closest(name, presets)} Available: {', '.join(presets)}")
    return presets[name]


def _merge(config: Config, table: Mapping[str, Any], source: str, prefix: str) -> Config:
    assert dataclasses.is_dataclass(config) and not isinstance(config, type), config
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}
    unknown = [key for key in table if key not in fields]
    if unknown:
        shown = ", ".join(repr(prefix + key) for key in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        valid = ", ".join(prefix + key for key in fields)
        raise UserError(
            f"{source}: unknown key{'s'[: len(unknown) - 1]} {shown}"
            f"{_closest(unknown[0], fields, prefix)} Valid keys: {valid}"
        )
    hints = get_type_hints(type(config))
    changes = {}
    for key, value in table.items():
        name = prefix + key
        current = getattr(config, key)
        try:
            changes[key] = _convert(value, hints[key], current, source, name)
        except _Mismatch as mismatch:
            raise UserError(f"{source}: {name} must be {mismatch}, got {value!r}") from None
        _check_range(changes[key], fields[key].metadata, source, name)
    try:
        return dataclasses.replace(config, **changes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except ValueError as error:
        raise UserError(f"{source}: {prefix.rstrip('.') or 'configuration'}: {error}") from error


def _convert(value: Any, hint: Any, current: Any, source: str, name: str) -> Any:
    """``value`` as an instance of the annotation ``hint``; raises ``_Mismatch`` where it cannot be one."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _Mismatch(f"a table ([{name}])")
        assert isinstance(hint, type)
        return _merge(current if isinstance(current, hint) else hint(), value, source, f"{name}.")
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, current, source, name)
    if origin is Literal:
        if value not in args:
            close = _closest(value, args) if isinstance(value, str) else ""
            raise _Mismatch(f"one of {', '.join(map(repr, args))}{close.rstrip('.')}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Mismatch("a list, for example [1, 2]")
        members = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(members) != len(value):
            raise _Mismatch(f"a list of {len(members)} values")
        return tuple(
            _convert(v, m, None, source, f"{name}[{i}]")
            for i, (v, m) in enumerate(zip(value, members, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _Mismatch(f"a table ([{name}])")
        return {key: _convert(v, args[1], None, source, f"{name}.{key}") for key, v in value.items()}
    return _convert_scalar(value, hint, name)


def _convert_union(value: Any, members: tuple[Any, ...], current: Any, source: str, name: str) -> Any:
    wanted = []
    if types.NoneType in members and (value is None or value == _NONE):
        return None
    for member in members:
        if member is types.NoneType:
            wanted.append(f'"{_NONE}"')
            continue
        try:
            return _convert(value, member, current, source, name)
        except _Mismatch as mismatch:
            wanted.append(str(mismatch))
    raise _Mismatch(" or ".join(wanted))


def _convert_scalar(value: Any, hint: Any, name: str) -> Any:
    assert hint in _NAMES, f"{name}: a configuration field cannot be annotated {hint}"
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    # bool is an int in Python; a flag where a number is wanted is a mistake, not a 1.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and not math.isnan(value):
        return float(value)
    if (
        hint is int and number and math.isfinite(value) and value == int(value)
    ):  # 1e4 is a natural way to write 10000 steps
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise _Mismatch(_NAMES[hint])


def _check_range(value: Any, metadata: Mapping[str, Any], source: str, name: str) -> None:
    if value is None:
        return
    for i, entry in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
        for bound, (holds, words) in _BOUNDS.items():
            if bound in metadata and not isinstance(entry, str) and not holds(entry, metadata[bound]):
                where = name if i is None else f"{name}[{i}]"
                raise UserError(f"{source}: {where} must be {words} {metadata[bound]}, got {entry!r}")


def _literal(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return table["value"] if len(table) == 1 else text.strip()


def _closest(name: Any, valid: Iterable[Any], prefix: str = "") -> str:
    close = get_close_matches(str(name), [str(entry) for entry in valid], n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else "."


# ---- writing ----


def dumps(config: Any) -> str:
    """The whole effective configuration as TOML text; ``merge`` of it over any instance of the same class
    gives ``config`` back.
    """
    return tomli_w.dumps(_to_table(config))


def write(config: Any, path: str | Path) -> None:
    """Write ``dumps(config)`` to ``path``: the whole file or nothing."""
    from ppl_st.io import atomic

    with atomic(path) as temporary:
        Path(temporary).write_text(dumps(config), encoding="utf-8")


def _to_table(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _to_table(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, tuple | list):
        return [_to_table(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _to_table(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    return _NONE if value is None else value


# ---- manifest ----


def manifest(
    *,
    seed: int,
    device: str,
    inputs: Mapping[str, "str | Path | AnnData | Iterable[str]"],
    command: str | None = None,
) -> dict[str, Any]:
    """Everything needed to repeat a run: versions, seed, device, platform, UTC time, command, input hashes.

    Parameters
    ----------
    inputs
        Role (``"target"``, ``"reference"``, ...) to a file, a zarr folder, an AnnData in memory or a list of names
        (both hashed by content).
    command
        The command line, if there was one.

    Returns
    -------
    dict
        Plain JSON types only. ``uns`` of an h5ad file cannot hold nested ``None``: store
        ``json.dumps(manifest)`` there.
    """
    from ppl_st import __version__

    versions: dict[str, str | None] = {"ppl_st": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "pyro-ppl", "numpy", "scipy", "anndata")}
    return {
        "versions": versions,
        "seed": int(seed),
        "device": str(device),
        "platform": platform.platform(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "inputs": {role: describe(source) for role, source in inputs.items()},
    }


def hash_path(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder as the sorted relative names and contents of its files."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\n{hash_path(file)}\n".encode())
    return total.hexdigest()


def hash_adata(adata: "AnnData") -> str:
    """SHA-256 of names, counts (``X`` and layers) and ``obsm`` arrays.

    By value: sparse or dense, int or float, sorted or not, the same numbers give the same hash. Read in
    blocks of rows; never densified.
    """
    total = hashlib.sha256()
    for names in (adata.obs_names, adata.var_names):
        total.update("\n".join(map(str, names)).encode())
        total.update(b"\n\n")
    matrices = {"X": adata.X} | {f"layers/{key}": adata.layers[key] for key in sorted(adata.layers)}
    for key, matrix in matrices.items():
        if matrix is not None:
            total.update(key.encode())
            _hash_matrix(matrix, total)
    for key in sorted(adata.obsm):
        if isinstance(adata.obsm[key], np.ndarray) and adata.obsm[key].dtype.kind in "biuf":
            total.update(f"obsm/{key}{adata.obsm[key].shape}".encode())
            total.update(np.ascontiguousarray(adata.obsm[key], dtype="<f8").tobytes())
    return total.hexdigest()


def _hash_matrix(matrix: Any, total: Any) -> None:
    from scipy import sparse

    total.update(str(tuple(matrix.shape)).encode())
    for start in range(0, matrix.shape[0], 4096):
        block = sparse.csr_matrix(matrix[start : start + 4096], dtype="<f8", copy=True)
        block.sum_duplicates()
        block.eliminate_zeros()
        for part, dtype in ((block.indptr, "<i8"), (block.indices, "<i8"), (block.data, "<f8")):
            total.update(part.astype(dtype).tobytes())


def describe(source: "str | Path | AnnData | Iterable[str]") -> dict[str, Any]:
    """Path and hash of an input, as in a manifest; the order of a list of names does not matter."""
    if isinstance(source, str | Path):
        return {"path": str(Path(source).absolute()), "sha256": hash_path(source)}
    if not hasattr(source, "obs_names"):
        return {"path": None, "sha256": hashlib.sha256("\n".join(sorted(map(str, source))).encode()).hexdigest()}
    return {"path": None, "sha256": hash_adata(source)}


@cache  # metadata of a large package are slow to read, and stay the same while a process lives
def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None

"""Files in and out: AnnData from .h5ad or .zarr, and writes that either finish or leave nothing behind.

`read_adata` turns every way in which a file can be wrong into a `UserError`; it does not look at counts or
coordinates (that is `ppl_st.data`). `atomic` is the only road by which the package writes files: a sibling
temporary path is filled, then renamed onto the target.
"""

import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import anndata
import h5py  # type: ignore[import-untyped]
import pandas as pd

from ppl_st.errors import UserError

_ZARR_MARKERS = ("zarr.json", ".zgroup", ".zattrs", ".zmetadata")
_CONVERT = {
    ".h5": "a 10x .h5 file is converted by scanpy.read_10x_h5(...).write_h5ad(...)",
    ".loom": "convert it with scanpy.read_loom(...).write_h5ad(...)",
    ".mtx": "convert its folder with scanpy.read_10x_mtx(...).write_h5ad(...)",
    ".csv": "convert it with anndata.read_csv(...) and write_h5ad(...)",
    ".rds": "export it from R to .h5ad first",
}
_NO_CATEGORIES = ("interval", "datetime64", "datetime", "date", "timedelta64", "timedelta", "time", "period")  # that a file can hold
_WRITE_REMEDY = {
    errno.ENOSPC: "no space left: free some, or choose another output path",
    errno.EDQUOT: "disk quota exceeded: free some space, or choose another output path",
    errno.EFBIG: "the file grew over a size limit of the system: choose another output path",
    errno.EACCES: "permission denied: choose a path that you may write",
    errno.EPERM: "permission denied: choose a path that you may write",
    errno.EROFS: "the file system is read-only: choose another output path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another output path",
    errno.EEXIST: "a part of the path is a file, not a folder: choose another output path",
    errno.EIO: "input/output error: check the disk, or choose another output path",
    errno.ENAMETOOLONG: "the file name is too long: choose a shorter one",
}


def read_adata(source: str | Path | anndata.AnnData, *, role: str) -> anndata.AnnData:
    """Read an AnnData from a `.h5ad` file or a `.zarr` folder.

    An AnnData object is returned as it is, neither copied nor modified.

    Parameters
    ----------
    source : path of a `.h5ad` file or `.zarr` folder, or an AnnData.
    role : what the data are for ("target", "reference", ...), named in errors.

    Raises
    ------
    UserError
        For a missing file, an unknown suffix, a folder that is not zarr, and anything unreadable (corrupted,
        truncated, not AnnData).
    """
    if isinstance(source, anndata.AnnData):
        return source
    if not isinstance(source, str | Path):
        raise UserError(f"{role}: a {type(source).__name__} is no AnnData; make one of it (anndata.AnnData), or give a file")
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix not in (".h5ad", ".zarr"):
        remedy = _CONVERT.get(suffix, "give a .h5ad file or a .zarr folder")
        raise UserError(f"{role}: cannot read {path}: unknown suffix {suffix!r}; {remedy}")
    if not path.exists():
        raise UserError(
            f"{role}: no such file: {path}; check the path (the working directory is {Path.cwd()})"
        )
    if suffix == ".zarr":
        _check_zarr_folder(path, role)
    elif path.is_dir():
        raise UserError(f"{role}: {path} is a folder, not a .h5ad file; a zarr store must be named *.zarr")
    try:
        with warnings.catch_warnings():
            # Old formats and repeated names are anndata's to warn about; ppl_st.data turns
            # those that matter into errors.
            warnings.simplefilter("ignore")
            adata = anndata.read_zarr(path) if suffix == ".zarr" else anndata.read_h5ad(path)
    except MemoryError:
        raise
    except PermissionError as error:
        raise UserError(
            f"{role}: may not read {path}: permission denied; change its permissions or copy it"
        ) from error
    except Exception as error:  # h5py, zarr and anndata raise many types for a damaged file
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UserError(
            f"{role}: cannot read {path} as AnnData: {reason}; the file is probably damaged, cut short or "
            "of another kind: copy or download it again and check that anndata can open it"
        ) from error
    if not isinstance(adata, anndata.AnnData):
        raise UserError(
            f"{role}: {path} holds a {type(adata).__name__}, not one AnnData; write the table itself as .h5ad"
        )
    return adata


def _check_zarr_folder(path: Path, role: str) -> None:
    if not path.is_dir():
        raise UserError(
            f"{role}: {path} is a file, not a zarr folder; unpack it, or rename it to .h5ad if it is HDF5"
        )
    if not any((path / marker).exists() for marker in _ZARR_MARKERS):
        raise UserError(
            f"{role}: {path} is not a zarr store (none of {', '.join(_ZARR_MARKERS)} in it); "
            "give the folder that adata.write_zarr made"
        )


def write_adata(adata: anndata.AnnData, path: str | Path) -> None:
    """Write an AnnData to `.h5ad` or `.zarr` (by suffix): complete, or not at all. `adata` is not modified.

    Raises
    ------
    UserError
        For an unknown suffix, and for a path that cannot be written (see `atomic`).
    """
    path = Path(path)
    suffix = refuse_suffix(path)
    with atomic(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Turning strings into categories would change the caller's obs and var in place.
        if suffix == ".zarr":
            adata.write_zarr(temporary, convert_strings_to_categoricals=False)
            return
        with hdf5_target(temporary) as target, h5py.File(target, "w") as file:
            options = {"compression": "gzip", "compression_opts": 1}
            anndata.io.write_elem(file, "/", adata, dataset_kwargs=options)


def refuse_suffix(path: str | Path, known: Sequence[str] = (".h5ad", ".zarr")) -> str:
    """The suffix of an output; the format follows it, so another one than these is refused."""
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise UserError(f"cannot write {path}: unknown suffix {suffix!r}; name the output *{' or *'.join(known)}")
    return suffix


def storable(table: pd.DataFrame, role: str = "") -> pd.DataFrame:
    """A copy of ``obs`` that every AnnData file can hold; errors name the ``role`` of the data, where it is given.

    Text with gaps becomes categories, objects that are all numbers become numbers; names of columns, and what is neither number nor text (dates,
    intervals), become text.

    Raises
    ------
    UserError
        A column holds neither numbers nor text, or its name is that of another one (as text) or of the index of files.
    """
    whose = f"{role}: " if role else ""
    names = table.columns.map(str)
    twice = names[names.duplicated()]
    if len(twice):
        raise UserError(f"{whose}obs has several columns named {twice[0]!r} (names are text in a file); rename all but one, or drop them")
    if "_index" in names:
        raise UserError(f"{whose}obs column '_index' has the name that files keep for the names of cells; rename it, or drop it")
    made = table.infer_objects()
    made.columns = names
    for column in made.columns:
        values = made[column]
        if isinstance(values.dtype, pd.CategoricalDtype):
            if pd.api.types.infer_dtype(values.cat.categories) in _NO_CATEGORIES:
                made[column] = values.cat.rename_categories(list(values.cat.categories.map(str)))
            continue
        if not (pd.api.types.is_numeric_dtype(values) or pd.api.types.is_object_dtype(values) or isinstance(values.dtype, pd.StringDtype)):
            values = values.astype(object).map(str, na_action="ignore")
        if not (pd.api.types.is_object_dtype(values) or isinstance(values.dtype, pd.StringDtype)):
            continue
        known = values.dropna()
        odd = next((value for value in known if not isinstance(value, str)), "")
        if odd != "":
            raise UserError(
                f"{whose}obs column {column!r} holds a {type(odd).__name__} ({str(odd)[:30]}); make all of it text or numbers, or drop it"
            )
        text = values.astype(object)
        made[column] = text if len(known) == len(values) else text.where(values.notna(), None).astype("category")
    return made


@contextmanager
def hdf5_target(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` as a file object for HDF5 writers, to be used inside `atomic`.

    For `h5py.File(target, "w")` or `Dataset.to_netcdf(target, engine="h5netcdf")`. HDF5 cannot close a file
    whose disk is full: it leaks open handles and the interpreter crashes on exit. Here the first failed write
    is kept aside, the rest is dropped so that HDF5 closes in peace, and the error is raised at the end.
    """
    target = _PatientFile(path, "w+")
    try:
        yield cast(BinaryIO, target)
    finally:
        try:
            target.close()
        except OSError as error:
            target.failure = target.failure or error
        if target.failure is not None:
            raise target.failure


class _PatientFile(FileIO):
    """A file that remembers its first failed write and pretends that it and all later ones went well."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.failure is None:
            try:
                written = super().write(data)
                while written < size:  # a short write comes before the error that explains it
                    written += super().write(memoryview(data).cast("B")[written:])
            except OSError as error:
                self.failure = error
        return size

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer)
        if self.failure is not None:
            memoryview(buffer).cast("B")[got:] = bytes(memoryview(buffer).nbytes - got)
            return memoryview(buffer).nbytes
        return got

    def truncate(self, size: int | None = None) -> int:
        if self.failure is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.failure = error
        return size or 0

    def flush(self) -> None:
        if self.failure is None:
            super().flush()


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write (a file or a folder); it becomes `path` when the block ends
    well, and is removed otherwise.

    Missing parent folders are made. An existing `path` is replaced, or untouched if the block fails.

    Raises
    ------
    UserError
        When the file system refuses (full, read-only, no permission, ...), naming the path and the remedy.
        Other errors pass through.
    """
    path = Path(path)
    # The suffix stays last, because writers choose their format by it.
    temporary = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(4)}.tmp{path.suffix}")
    made: list[Path] = []
    try:
        made = _make_parents(path.parent)
        yield temporary
        if not temporary.exists():
            raise RuntimeError(f"nothing was written to {temporary}")
        _replace(temporary, path)
    except BaseException as error:
        _remove(temporary)
        for folder in made:  # innermost first; only those that this call made and that are still empty
            try:
                folder.rmdir()
            except OSError:
                break
        code = _errno_of(error)
        if code in _WRITE_REMEDY and not isinstance(error, UserError):
            raise UserError(f"cannot write {path}: {_WRITE_REMEDY[code]}") from error
        raise


def refuse_inputs(path: str | Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to write onto a file that a fit with this manifest, or a fit of this mixture, was given."""
    fits = [manifest, *manifest.get("runs", [])]
    for role, given in ((role, given) for fit in fits for role, given in fit.get("inputs", {}).items()):
        if given["path"] is not None and Path(given["path"]).resolve() == Path(path).resolve():
            raise UserError(f"{path}: is the {role} that the run was fitted on, which is never changed; choose another name (--out)")


def free_bytes(path: str | Path) -> int:
    """Free space where `path` will be written, whose parent folders need not be there yet."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder` and its missing parents; returns those made, innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    made: list[Path] = []
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        made.insert(0, new)
    return made


def _replace(temporary: Path, path: Path) -> None:
    """Rename onto `path`; a folder in the way is moved aside first and comes back if the rename fails."""
    if temporary.is_dir() != path.is_dir() and path.exists():
        kind = "folder" if path.is_dir() else "file"
        raise UserError(
            f"cannot write {path}: a {kind} of that name is in the way; remove it or choose another path"
        )
    if not temporary.is_dir():
        with open(temporary, "r+b") as handle:  # Windows flushes only what may be written
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        return
    aside = temporary.with_name(temporary.name + ".old")
    moved = path.exists()
    if moved:
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        if moved:
            os.replace(aside, path)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink()
        except OSError:  # never made, or its folder is gone
            pass


def _errno_of(error: BaseException | None) -> int:
    """The errno behind an error or its causes, 0 if none: HDF5 and anndata wrap 'no space left' in theirs."""
    for _ in range(10):
        if error is None:
            return 0
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            if os.strerror(code) in text or f"errno = {code}," in text:
                return code
        error = error.__cause__ or error.__context__
    return 0

"""Reading refuses every damaged file with a remedy; writing finishes or leaves nothing."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from ppl_st.errors import UserError
from ppl_st.io import atomic, hdf5_target, read_adata, refuse_inputs, storable, write_adata


@pytest.fixture
def adata() -> anndata.AnnData:
    rng = np.random.default_rng(0)
    matrix = sparse.csr_matrix(rng.poisson(0.5, (30, 12)).astype(np.float32))
    obs = pd.DataFrame({"label": ["a", "b"] * 15}, index=[f"cell_{i}" for i in range(30)])
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(12)])
    return anndata.AnnData(matrix, obs=obs, var=var, obsm={"spatial": rng.random((30, 2))})


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr", "new/folder/a.h5ad"])
def test_round_trip_leaves_the_input_as_it_was(tmp_path: Path, adata: anndata.AnnData, name: str) -> None:
    dtype = adata.obs["label"].dtype
    write_adata(adata, tmp_path / name)
    write_adata(adata, tmp_path / name)  # replaces, also a zarr folder
    assert adata.obs["label"].dtype == dtype  # anndata's writer turns strings into categories in place
    back = read_adata(tmp_path / name, role="target")
    assert (back.X != adata.X).nnz == 0 and list(back.obs["label"]) == list(adata.obs["label"])
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]


def test_an_anndata_object_passes_through(adata: anndata.AnnData) -> None:
    assert read_adata(adata, role="target") is adata


def test_missing_and_foreign_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target: no such file: .*none\.h5ad.*check the path"):
        read_adata(tmp_path / "none.h5ad", role="target")
    with pytest.raises(UserError, match=r"reference: .*unknown suffix '\.h5'; .*read_10x_h5"):
        read_adata(str(tmp_path / "a.h5"), role="reference")
    with pytest.raises(UserError, match=r"unknown suffix '\.txt'; give a \.h5ad"):
        read_adata(tmp_path / "a.txt", role="target")
    (tmp_path / "plain.zarr").mkdir()
    with pytest.raises(UserError, match=r"not a zarr store"):
        read_adata(tmp_path / "plain.zarr", role="target")
    (tmp_path / "file.zarr").write_text("x")
    with pytest.raises(UserError, match=r"not a zarr folder"):
        read_adata(tmp_path / "file.zarr", role="target")
    (tmp_path / "folder.h5ad").mkdir()
    with pytest.raises(UserError, match=r"is a folder"):
        read_adata(tmp_path / "folder.h5ad", role="target")


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "overwritten", "not_anndata"])
def test_damaged_h5ad(tmp_path: Path, adata: anndata.AnnData, damage: str) -> None:
    file = tmp_path / "a.h5ad"
    write_adata(adata, file)
    content = file.read_bytes()
    if damage == "text":
        file.write_text("hello")
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        file.write_bytes(content[:2000] + b"\xff" * (len(content) - 2000))
    else:
        with h5py.File(file, "w") as handle:
            handle["x"] = np.arange(3)
    with pytest.raises(
        UserError, match=r"target: cannot read .*a\.h5ad as AnnData.*copy or download"
    ) as caught:
        read_adata(file, role="target")
    assert caught.value.__cause__ is not None


def test_anndata_warnings_do_not_leak(tmp_path: Path, adata: anndata.AnnData) -> None:
    adata.obs_names = ["same"] * 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.write_h5ad(tmp_path / "a.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_adata(tmp_path / "a.h5ad", role="target").shape == (30, 12)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_keeps_the_old_when_the_block_fails(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out.x"

    def fill(path: Path, text: str) -> None:
        if kind == "folder":
            path.mkdir()
            path = path / "inside"
        path.write_text(text)

    with atomic(target) as temporary:
        fill(temporary, "old")
    with pytest.raises(KeyboardInterrupt), atomic(target) as temporary:
        fill(temporary, "half")
        raise KeyboardInterrupt
    assert ((target / "inside") if kind == "folder" else target).read_text() == "old"
    with atomic(target) as temporary:
        fill(temporary, "new")
    assert ((target / "inside") if kind == "folder" else target).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out.x"]


def test_atomic_names_path_and_remedy(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"out\.nc: no space left: free some"),
        atomic(tmp_path / "deep" / "out.nc") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no space left"), atomic(tmp_path / "out.nc"):
        # HDF5 reports a full disk as a RuntimeError with the errno in its text
        raise RuntimeError(
            "Can't close file (file write failed: errno = 28, error message = 'No space left on device')"
        )
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "out.nc"):
        raise ZeroDivisionError
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"), atomic(tmp_path / "file" / "out.nc"):
        pass
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(UserError, match="a folder of that name is in the way"),
        atomic(tmp_path / "folder") as temporary,
    ):
        temporary.write_text("x")
    with pytest.raises(RuntimeError, match="nothing was written"), atomic(tmp_path / "out.nc"):
        pass


def test_unwritable_folder(tmp_path: Path, adata: anndata.AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:  # as the system does, but to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ppl_st.io._PatientFile", refuse)
    with pytest.raises(UserError, match="permission denied: choose a path"):
        write_adata(adata, tmp_path / "a.h5ad")
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_was_fitted_on_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"inputs": {"target": {"path": str(tmp_path / "cells.h5ad")}, "reference": {"path": None}}}
    monkeypatch.chdir(tmp_path)
    for fitted in (manifest, {"method": "stack", "runs": [{"inputs": {}}, manifest]}):
        refuse_inputs(tmp_path / "other.h5ad", fitted)
        for path in ("cells.h5ad", tmp_path / "new" / ".." / "cells.h5ad"):
            with pytest.raises(UserError, match=r"cells\.h5ad: is the target that the run was fitted on"):
                refuse_inputs(path, fitted)


def test_dates_intervals_and_numbered_columns_are_stored_as_text(tmp_path: Path, adata: anndata.AnnData) -> None:
    obs = adata.obs.copy()
    obs["size"] = pd.cut(np.arange(30.0), 3)
    obs["day"] = pd.to_datetime(["2026-01-02", None, "2026-01-03"] * 10)
    obs["month"] = pd.Categorical(pd.PeriodIndex(["2026-01", "2026-02"] * 15, freq="M"))
    obs[7] = pd.Categorical([1, 2] * 15)
    before = obs.copy()
    adata.obs = storable(obs)
    pd.testing.assert_frame_equal(obs, before)
    write_adata(adata, tmp_path / "a.h5ad")
    found = read_adata(tmp_path / "a.h5ad", role="target").obs
    assert list(found.columns) == ["label", "size", "day", "month", "7"]
    assert found["size"].iloc[0] == str(before["size"].iloc[0]) and found["month"].iloc[1] == "2026-02" and found["7"].iloc[1] == 2
    assert str(found["day"].iloc[0]).startswith("2026-01-02") and found["day"].isna().sum() == 10


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["a", "a"], "target: obs has several columns named 'a' .*rename all but one"),
        ([1, "1"], "target: obs has several columns named '1'"),
        (["a", "_index"], "target: obs column '_index' has the name that files keep .*rename it"),
        (["a", "mixed"], r"target: obs column 'mixed' holds a bool \(True\)"),
    ],
)
def test_columns_that_no_file_can_hold_are_refused_by_name(columns: list[object], message: str) -> None:
    table = pd.DataFrame(np.ones((4, 2)), columns=columns)
    if "mixed" in columns:
        table["mixed"] = [True, None] * 2
    with pytest.raises(UserError, match=message):
        storable(table, "target")


def test_write_refuses_an_unknown_suffix(tmp_path: Path, adata: anndata.AnnData) -> None:
    with pytest.raises(UserError, match=r"name the output \*\.h5ad or \*\.zarr"):
        write_adata(adata, tmp_path / "a.csv")


_FULL_DISK = """
import resource, sys
import anndata, numpy as np
from scipy import sparse
from ppl_st.errors import UserError
from ppl_st.io import write_adata
adata = anndata.AnnData(sparse.random(2000, 300, 0.3, format="csr", dtype=np.float32,
rng=np.random.default_rng(0)))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    write_adata(adata, sys.argv[1])
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_full_disk_ends_in_peace(tmp_path: Path) -> None:
    # Left to itself HDF5 cannot close such a file: it prints tracebacks and the interpreter dies by
    # SIGSEGV on exit.
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "a.h5ad")]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr and "size limit" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_hdf5_target_is_a_plain_hdf5_file(tmp_path: Path) -> None:
    with hdf5_target(tmp_path / "a.h5") as target, h5py.File(target, "w") as file:
        file.create_dataset("x", data=np.arange(100_000), compression="gzip")
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["x"][:], np.arange(100_000))

"""Every notebook is stored with its outputs, shows nothing of the machine it ran on, and still runs (smoke sizes)."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Home and working folders of Linux, macOS and Windows, temporary folders, installed packages.
MACHINE_PATH = re.compile(r"(?<![\w.])(/(?:home|root|Users|work|tmp|var/folders)/|[A-Za-z]:\\\\?Users)|site-packages")
LARGEST = 1_500_000  # bytes
LONGEST_CELL = 12  # lines

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def blemishes(notebook):
    """What is wrong with the stored form of a notebook, as sentences."""
    found = []
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed from top to bottom in one go: execution counts {counts}")
    if not any(cell.outputs for cell in cells):
        found.append("no outputs")
    for i, cell in enumerate(notebook.cells):
        if machine := MACHINE_PATH.search(cell.source):
            found.append(f"cell {i}: the text holds {machine[0]}")
        if cell.cell_type != "code":
            continue
        if len(cell.source.splitlines()) > LONGEST_CELL:
            found.append(f"cell {i}: {len(cell.source.splitlines())} lines of code")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {i}: {output.ename}: {output.evalue}")
            if output.get("name") == "stderr":
                found.append(f"cell {i}: stderr: {output.text[:200]}")
            text = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
            if machine := MACHINE_PATH.search(json.dumps(text) + output.get("text", "")):
                found.append(f"cell {i}: an output holds {machine[0]}")
    return found


RUNNER = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, kernel_name="this", timeout=None).execute()
nbformat.write(notebook, sys.argv[1])
"""


def execute(path, folder, seconds):
    """The notebook as run anew in ``folder``, by this interpreter, at smoke sizes, on one thread, without real data.

    A process of its own, because the client leaves sockets to the garbage collector; a kernel specification of our own, because a
    fresh environment may have none, and one that is installed may start another Python.
    """
    kernel = folder / "kernels" / "this"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}), encoding="utf-8")
    copy = shutil.copy(path, folder / path.name)
    environment = {name: value for name, value in os.environ.items() if name not in ("PPL_ST_DATA", "MPLBACKEND")}
    environment |= {"PPL_ST_SMOKE": "1", "OMP_NUM_THREADS": "1", "JUPYTER_PATH": str(folder)}
    environment |= {name: str(folder / name.lower()) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(copy)], cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return nbformat.read(copy, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


@every
def test_stored_with_outputs_and_without_traces_of_the_machine(path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert blemishes(notebook) == []


def test_the_check_sees_what_it_is_for():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    assert len(blemishes(notebook)) == 2  # never executed, no outputs
    cell = notebook.cells[0]
    cell.execution_count = 1
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="fine: 5/root and data/home/x\n")]
    assert blemishes(notebook) == []
    for bad in (
        nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]),
        nbformat.v4.new_output("stream", name="stderr", text="FutureWarning"),
        nbformat.v4.new_output("stream", name="stdout", text="read '/home/somebody/x.h5ad'"),
        nbformat.v4.new_output("execute_result", {"text/html": "<td>C:\\Users\\x</td>"}),
    ):
        cell.outputs = [bad]
        assert len(blemishes(notebook)) == 1, bad


@every
def test_runs_in_smoke_mode(path, tmp_path):
    assert blemishes(execute(path, tmp_path, seconds=120)) == []

"""Every notebook is stored with its outputs, shows nothing of the machine it ran on, and still runs (smoke sizes)."""

import json
import os
import re
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
LONGEST, IMPORTS = 60.0, 6.0  # processor seconds: of a notebook, where those of the imports are these; a slow machine has more of both

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
import os, sys, time, nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config
import anndata, arviz, matplotlib.pyplot, pandas, pyro, torch, zarr, ppl_st.api  # once, for all the processes that are forked below

class Shell(InteractiveShell):
    def enable_gui(self, gui=None):  # pictures are inline
        pass

def run(path):
    notebook = nbformat.read(path, as_version=4)
    shell = Shell.instance(config=Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "NoColor"}}))
    for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        with capture_output() as got:
            done = shell.run_cell(cell.source, store_history=True)
        streams = [("stdout", got.stdout), ("stderr", got.stderr)]
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in streams if text]
        cell.outputs += [nbformat.v4.new_output("display_data", shown.data) for shown in got.outputs]
        if error := done.error_before_exec or done.error_in_exec:
            cell.outputs.append(nbformat.v4.new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[]))
            break
    nbformat.write(notebook, path)

print("imports", time.process_time())
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]).step()  # brings the rest of torch along, which every fit would load for itself
for path in sys.argv[1:]:
    sys.stdout.flush()
    if child := os.fork():
        _, status, used = os.wait4(child, 0)
        print(os.path.basename(path), used.ru_utime + used.ru_stime)
        if status:
            print(path, "ended with status", status, file=sys.stderr)
        continue
    os.chdir(os.path.dirname(path))
    run(path)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)
"""


def execute(paths, folder, seconds):
    """The notebooks as run anew, one working folder each, by this interpreter, at smoke sizes, on one thread, without real data.

    One process imports the libraries and is forked for each notebook, which so starts as clean as in a kernel of its own: importing
    them anew for every notebook would be most of the work. A notebook that ends its process is found without execution counts.
    Returns notebooks by name, what was said, and processor seconds: of each by name, and of the "imports".
    """
    copies = []
    for path in paths:
        (folder / path.stem).mkdir()
        copies.append(folder / path.stem / path.name)
        notebook = nbformat.read(path, as_version=4)
        for cell in code_cells(notebook):
            cell.execution_count, cell.outputs = None, []
        nbformat.write(notebook, copies[-1])
    environment = {name: value for name, value in os.environ.items() if name not in ("PPL_ST_DATA", "MPLBACKEND")}
    environment |= {"PPL_ST_SMOKE": "1", "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / "ipython")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", RUNNER, *map(str, copies)]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=seconds, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    spent = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    return {copy.name: nbformat.read(copy, as_version=4) for copy in copies}, done.stderr[-5000:], spent


@pytest.fixture(scope="module")
def executed(request, tmp_path_factory):
    """Every notebook that this session asks for, run."""
    asked = [item.callspec.params["path"] for item in request.session.items if "executed" in getattr(item, "fixturenames", ())]
    return execute(asked, tmp_path_factory.mktemp("notebooks"), seconds=3500)


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


@pytest.mark.timeout(3600)  # all of them run before the first is looked at
@every
def test_runs_in_smoke_mode(path, executed):
    notebooks, said, spent = executed
    assert blemishes(notebooks[path.name]) == [], said
    assert spent[path.name] < LONGEST * max(1.0, spent["imports"] / IMPORTS), spent

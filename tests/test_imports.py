"""Who may import whom (one way), one import name, and a command line that starts at once."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from machine import slowness

ROOT = Path(__file__).resolve().parents[1]

# Room -> rooms it may import. Every room may import itself and `errors`. A module that is not listed has no
# place yet: give it one. Data flows one way:
# io -> data -> models + inference -> posterior -> metrics, calibration -> plots, report -> cli.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "likelihood_math": set(),
    "sampling": set(),
    "likelihoods": {"likelihood_math", "sampling"},
    "count_likelihoods": {"likelihoods", "likelihood_math", "sampling"},
    "real_likelihoods": {"likelihoods", "likelihood_math", "sampling"},
    "directional": {"likelihoods", "likelihood_math"},
    "product_math": {"likelihood_math"},
    "product": {"product_math", "likelihoods", "count_likelihoods", "likelihood_math", "sampling"},
    "factors": set(),
    "asked": set(),
    "networks": set(),
    "io": set(),
    "data": {"io"},
    "spatial": {"io", "data"},
    "radius": {"spatial"},  # what counts say about places
    "layers": {"io", "data"},
    "pairs": {"io", "data"},  # the two files of a fit
    "images": {"io", "data"},
    "annotations": {"images"},
    "shapes": {"data", "images", "simulate"},  # the simulated sections
    "slides": {"io", "data", "images", "spaceranger", "spatialdata_zarr"},  # one section's counts and image, whatever holds them
    "spaceranger": {"data", "images"},
    "spatialdata_zarr": {"data", "images", "spatial"},
    "simulate": {"likelihoods"},
    "config": {"io"},
    "inference": {"io", "data", "sampling", "asked"},  # the writer of files and row blocks; never a named method
    "observation": {"likelihoods", "count_likelihoods"},  # a likelihood by its name
    "models": {
        "observation", "likelihoods", "likelihood_math", "count_likelihoods", "real_likelihoods", "directional", "product", "sampling", "factors",
        "networks", "simulate", "inference", "image_features",
    },
    "metrics": {"data"},
    "compositions": {"metrics"},
    "ridge": set(),
    "baselines": {"data", "spatial", "metrics", "ridge"},
    "peers": {"data", "baselines", "calibration", "metrics"},  # other people's methods, imported when they are run
    "calibration": {"data", "metrics"},
    "conformal": {"calibration"},
    "neighbor_score": set(),
    "pooling": {"metrics"},
    "image_features": set(),
    "image_baselines": set(),
    "image_plots": {"io"},
    "image_maps": {"io", "models"},
    "image_run": {"io", "data", "config", "image_maps", "images", "slides", "models", "prepare", "posterior", "run_folder"},
    "prepare": {"asked", "data", "pairs", "spatial", "radius", "layers", "images", "annotations", "models"},  # checked counts -> a method's problem
    "stream": {"io", "inference"},  # tables that are written while they are computed
    "run_folder": {"io", "data", "pairs", "config", "conformal", "inference"},
    "evaluation_folder": {"io", "run_folder"},
    "style": {"data"},  # a run seen as its reference
    "posterior": {"asked", "io", "data", "pairs", "inference", "metrics", "calibration", "conformal", "export", "stream", "style"},
    "export": {"io", "data", "inference"},
    "testing": {"inference"},  # any distribution, any pair: no likelihood and no method of ours
    "checks": {"data", "inference", "spatial", "posterior", "calibration", "pooling"},
    "plots": {"data", "posterior", "metrics", "calibration"},
    "calibration_plots": {"plots"},
    "report": {"io", "data", "posterior", "metrics", "calibration", "plots", "run_folder", "evaluation_folder"},
}
ROOMS["stack"] = {"data", "inference", "models", "posterior"}
ROOMS["browser"] = set()  # arrays -> an interactive page fragment
ROOMS["api"] = set(ROOMS)
ROOMS["refit"] = set(ROOMS)
ROOMS["evaluate"] = set(ROOMS)
ROOMS["evaluate_images"] = set(ROOMS)
ROOMS["image_cli"] = set(ROOMS)
ROOMS["demo_images"] = set(ROOMS)
ROOMS["compare"] = set(ROOMS)
ROOMS["sweep"] = set(ROOMS)
ROOMS["warning_signs"] = {"models", "posterior", "checks"}
ROOMS["report_sections"] = {
    "report", "plots", "calibration_plots", "calibration", "conformal", "checks", "config", "models", "posterior", "warning_signs",
}  # fmt: skip
ROOMS["report_run"] = set(ROOMS)
ROOMS["demo"] = set(ROOMS)
ROOMS["terminal"] = {"api", "inference", "report"}  # what commands share
ROOMS["cli"] = set(ROOMS) | {""}
ROOMS[""] = set(ROOMS)  # ppl_st/__init__.py, the public face

# Costly to import, needed by few functions: only inside functions (or for type checking).
LAZY = {"arviz", "sklearn", "matplotlib", "spatialdata", "skimage", "tifffile", "PIL", "bokeh"}
# `ppl-st --help` imports these modules: nothing heavy at their top.
START = {"cli", "terminal", "", "config", "errors"}
HEAVY = LAZY | {"torch", "pyro", "anndata", "pandas", "scipy", "xarray", "zarr", "h5py", "jinja2"}
# Tensors only: no files, tables of cells, figures or command line below these rooms.
NUMERIC = {
    "likelihood_math", "likelihoods", "count_likelihoods", "real_likelihoods", "directional", "product_math", "product", "observation",
    "factors", "networks", "models", "inference",
}
NOT_NUMERIC = LAZY - {"sklearn"} | {"anndata", "zarr", "h5py", "xarray", "typer", "jinja2"}


def files():
    yield from (ROOT / "ppl_st").glob("*.py")
    for folder in ("testing", "prepare"):
        yield from (ROOT / "ppl_st" / folder).glob("*.py")
    for folder in ("models", "inference"):
        yield from (ROOT / folder).rglob("*.py")


def room(file):
    path = file.relative_to(ROOT)
    if path.parts[0] != "ppl_st":
        return path.parts[0]
    if len(path.parts) > 2:  # a room that is a folder
        return path.parts[1]
    return "" if path.stem == "__init__" else path.stem


def imported(tree):
    """(dotted name, runs at import time) of every import statement; `from a import b` gives a.b.

    Imports for type checking only are no dependency and are left out.
    """
    deferred, typing = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            deferred |= {id(child) for child in ast.walk(node)}
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write from ppl_st.x import y"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in deferred


def violations(file_room, tree):
    for name, at_import in imported(tree):
        top, *rest = name.split(".")
        if top in ("models", "inference"):
            yield f"{name}: the bare name loads a second copy"
        elif top == "ppl_st":
            # `from ppl_st import x`: x is a room, or a name of the public face.
            target = rest[0] if rest and rest[0] in ROOMS else ""
            if target not in ROOMS[file_room] | {file_room, "errors"} and name != "ppl_st.__version__":
                yield f"{name}: {file_room or '__init__'} may not import {target or 'the public face'}"
        if at_import and top in (HEAVY if file_room in START else LAZY):
            yield f"{name}: import it inside the function that needs it"
        if file_room in NUMERIC and top in NOT_NUMERIC:
            yield f"{name}: {file_room} sees tensors only"


@pytest.mark.parametrize("file", sorted(files()), ids=lambda file: str(file.relative_to(ROOT)))
def test_module_imports_only_what_its_room_may(file):
    assert room(file) in ROOMS, f"{file.name} has no room: add it to ROOMS"
    assert list(violations(room(file), ast.parse(file.read_text(encoding="utf-8")))) == []


def test_the_table_itself_has_no_circle():
    tuple(graphlib.TopologicalSorter({k: v - {""} for k, v in ROOMS.items() if k}).static_order())


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("inference", "from ppl_st.models.siid import Model"),
        ("inference", "def f():\n    import ppl_st.models.siid"),
        ("data", "from ppl_st.posterior import Run"),
        ("metrics", "from ppl_st import plots"),
        ("models", "import anndata as ad"),
        ("models", "from models import siid"),
        ("plots", "import matplotlib.figure"),
        ("cli", "import torch"),
        ("io", "import ppl_st"),
    ],
)
def test_the_rules_can_fail(where, code):
    assert list(violations(where, ast.parse(code)))


def test_the_rules_let_lazy_and_typing_imports_pass():
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import arviz"
    assert not list(violations("cli", ast.parse(code)))


def python(code, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize("name", ["models", "inference"])
def test_the_bare_names_are_refused(name):
    done = python(f"import {name}")
    assert done.returncode == 1 and f"ppl_st.{name}" in done.stderr and "ImportError" in done.stderr


def test_importing_the_package_and_its_list_of_methods_loads_nothing_heavy(tmp_path):
    code = f"""
import sys, ppl_st
assert ppl_st.METHODS and "fit" in dir(ppl_st) and issubclass(ppl_st.UserError, ValueError)
heavy = {sorted(HEAVY)!r}
print([name for name in heavy if name in sys.modules])
"""
    done = python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_unknown_attribute_and_unknown_method_are_named():
    import ppl_st
    from ppl_st.models import load_method

    with pytest.raises(AttributeError, match="fti"):
        _ = ppl_st.fti
    with pytest.raises(ppl_st.UserError, match=r"'sid'; did you mean 'siid'\? Available: siid"):
        load_method("sid")


def test_every_listed_method_has_a_file():
    from ppl_st.models import METHODS

    for name, method in METHODS.items():
        assert method.module == f"ppl_st.models.{name}"
        assert (ROOT / "models" / f"{name}.py").exists() or (
            ROOT / "models" / name / "__init__.py"
        ).exists(), name
        assert (ROOT / "ppl_st" / "prepare" / f"{name}.py").exists()


def test_the_modules_that_the_readme_calls_need_no_import_of_their_own():
    import ppl_st

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`[^`]*\bppl_st\.([a-z_]+)\.", text) if (ROOT / "ppl_st" / f"{name}.py").is_file()}
    assert named and {"pooling", "neighbor_score", "stack"} <= named
    for name in named:  # as on first use; the attribute itself may be there because another test imported the module
        assert ppl_st.__getattr__(name) is sys.modules[f"ppl_st.{name}"]


needs_cli = pytest.mark.skipif(
    not (ROOT / "ppl_st" / "cli.py").exists(), reason="the command line is not written yet"
)


@needs_cli
def test_every_public_name_resolves():
    import ppl_st

    for name in ppl_st.__all__:
        assert getattr(ppl_st, name) is not None


@needs_cli
@pytest.mark.parametrize("argument", ["--help", "methods"])
def test_the_command_line_starts_in_under_a_second(argument):
    code = (
        f"import sys; sys.argv = ['ppl-st', {argument!r}]\n"
        "from ppl_st.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "import time; sys.stderr.write(str(time.process_time()))"
    )
    runs = [python(code) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert "siid" in runs[0].stdout.lower() or "fit" in runs[0].stdout
    # Processor time, best of three: the machine may be busy with other tests.
    assert min(float(run.stderr) for run in runs) < slowness()

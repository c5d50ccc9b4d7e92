"""The command line: every command once, exit codes, one message and no traceback, nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import ppl_st.api
from machine import slowness
from ppl_st.cli import app
from ppl_st.errors import UserError
from ppl_st.posterior import Run

ROOT = Path(__file__).resolve().parents[1]
FAST = [f"--set={item}" for item in ("factors=3", "chains=1", "sparsity=0", "sweeps=3", "fit.steps=3")]
KNOBS = {"n_cells": 250, "side": 6, "squares": 4, "n_types": 3, "n_genes": 40, "n_panel": 30}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ppl-st")


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*arguments, code=2):
    """The one message of a command that must fail without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    return lines[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Simulated data and a fitted run, made by the commands themselves."""
    base = tmp_path_factory.mktemp("cli")
    ok("simulate", "checkerboard", "--out", base / "data", *[f"--set={k}={v}" for k, v in KNOBS.items()])
    ok("fit", "siid", *pair(base), "--out", base / "run", *FAST)
    return base


def pair(base):
    return ["--target", base / "data/target.h5ad", "--reference", base / "data/reference.h5ad"]


def test_simulate_writes_what_its_knobs_say(folder):
    target = ad.read_h5ad(folder / "data" / "target.h5ad")
    assert target.shape == (250, 30) and ad.read_h5ad(folder / "data" / "reference.h5ad").n_obs == 36
    assert "already there" in refused("simulate", "checkerboard", "--out", folder / "data")


def test_simulate_shapes_writes_sections_images_truth_and_settings(tmp_path):
    ok("simulate", "shapes", "--out", tmp_path, "--set", "size=192", "--set", "sections=2", "--set", "color=same")
    section = ad.read_h5ad(tmp_path / "section1.h5ad")
    with np.load(tmp_path / "section1.truth.npz") as truth:
        assert truth["kind"].shape == (192, 192) and truth["profiles"].shape == (3, 3)
    assert section.shape == (16, 3) and (tmp_path / "section1.png").is_file()
    assert 'spot = "square"' in (tmp_path / "config.toml").read_text()
    assert "holds a simulation already" in refused("simulate", "shapes", "--out", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chess"], "unknown protocol 'chess'; available: checkerboard, blocks, spatial_field, shapes"),
        (["checkerboard", "--set", "n_cell=3"], "did you mean 'n_cells'"),
        (["checkerboard", "--set", "n_cells=many"], "n_cells must be a whole number"),
        (["checkerboard", "--set", "rho=x"], "rho must be a number"),
        (["checkerboard", "--set", "n_panel=900"], "n_panel=900 cannot be simulated; it must lie between 1 and 299"),
        *((["checkerboard", "--set", f"rho={value}"], f"rho={value}") for value in ("-1", "nan", "inf", "0")),
        *((["checkerboard", "--set", f"{knob}=nan"], f"{knob}=nan") for knob in ("contrast", "mixing", "platform_sd", "shift")),
        (["checkerboard", "--set", "squares=0"], "squares=0"),
        (["checkerboard", "--set", "platform_sd=1000"], "platform_sd=1000"),
        (["blocks", "--set", "n_spots=0"], "n_spots=0"),
        (["blocks", "--set", "zeros=-1"], "zeros=-1"),
        *((["spatial_field", "--set", f"{knob}=-1"], f"{knob}=-1") for knob in ("rho", "length", "theta", "depth_reference", "contrast")),
        *((["shapes", "--set", f"{knob}=nan"], f"{knob}=nan") for knob in ("reads", "pitch", "noise", "occlusion", "batch_sd", "depth_sd")),
        (["shapes", "--set", "batches=0"], "batches=0"),
    ],
)
def test_simulate_refuses(tmp_path, arguments, message):
    assert message in refused("simulate", *arguments, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_methods_lists_the_zoo():
    assert "siid:" in ok("methods").output


def test_fit_leaves_a_run_with_its_command(folder):
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["command"].startswith("ppl-st") and manifest["seed"] == 0
    assert 'factors = 3' in (folder / "run" / "config.toml").read_text()


def test_predict_writes_unmeasured_genes_by_default(folder, tmp_path):
    ok("predict", folder / "run", "--out", tmp_path / "new" / "p" / "imputed.h5ad", "--draws", 10)
    imputed = ad.read_h5ad(tmp_path / "new" / "p" / "imputed.h5ad")
    truth = ad.read_h5ad(folder / "data" / "truth.h5ad")
    assert set(imputed.var_names) == set(truth.var_names) and imputed.n_obs == 250
    assert {"rate_mean", "rate_sd", "count_sd", "q05", "q50", "q95"} <= set(imputed.layers)


def test_predict_samples_proportions_and_zarr(folder, tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("gene0035\ngene0001\n")
    store = tmp_path / "some.zarr"
    ok("predict", folder / "run", "--out", store, "--genes", genes, "--draws", 5, "--samples", 3)
    assert list(ad.read_zarr(tmp_path / "some.zarr").var_names) == ["gene0035", "gene0001"]
    import zarr

    count = zarr.open_group(str(tmp_path / "some.samples.zarr"), mode="r")["count"]
    assert count.shape == (3, 250, 2)
    ok("predict", folder / "run", "--out", tmp_path / "spots.h5ad", "--proportions", "--draws", 5)
    spots = ad.read_h5ad(tmp_path / "spots.h5ad")
    assert spots.n_obs == 36
    np.testing.assert_allclose(np.asarray(spots.X).sum(1), 1, atol=1e-4)


def test_recalibrate_changes_what_predict_writes(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    said = ok("recalibrate", tmp_path / "run", "--folds", 2, "--draws", 10)
    assert "recalibration.json" in said.output
    ok("predict", tmp_path / "run", "--out", tmp_path / "imputed.h5ad", "--draws", 10)
    imputed = ad.read_h5ad(tmp_path / "imputed.h5ad")
    assert {"lower", "upper"} <= set(imputed.layers) and "nominal_level" in imputed.var
    assert "strictly between" in refused("recalibrate", tmp_path / "run", "--level", "1.5", "--folds", 2)
    assert "first: ppl-st recalibrate" in refused("predict", tmp_path / "run", folder / "run", "--out", tmp_path / "both.h5ad")
    shutil.copytree(tmp_path / "run", tmp_path / "twin")
    said = ok("predict", tmp_path / "run", tmp_path / "twin", "--out", tmp_path / "both.h5ad", "--draws", 10)
    assert "weight 0.500" in said.stderr and "forecasts are mixed uncorrected: no layers lower and upper" in said.stderr
    assert json.loads(ad.read_h5ad(tmp_path / "both.h5ad").uns["ppl_st"])["method"] == "stack"


def test_compare_ranks_runs_and_evaluations(folder, tmp_path):
    truth = folder / "data" / "truth.h5ad"
    shutil.copytree(folder / "run", tmp_path / "twin")
    said = ok("compare", folder / "run", tmp_path / "twin", "--truth", truth, "--draws", 5, "--out", tmp_path / "c.csv")
    assert "difference to the best" in said.output and "not the same split" not in said.output
    assert pd.read_csv(tmp_path / "c.csv")["difference"].tolist() == pytest.approx([0, 0, 0], abs=1e-6)  # the last is the stack
    assert "--truth" in refused("compare", folder / "run", tmp_path / "twin")
    assert "is given twice" in refused("compare", folder / "run", folder / "run", "--truth", truth)


def test_export_and_report(folder, tmp_path):
    ok("export", folder / "run", "--out", tmp_path / "new" / "posterior.nc", "--draws", 2)
    import xarray as xr

    with xr.open_datatree(tmp_path / "new" / "posterior.nc", engine="h5netcdf") as tree:
        assert "posterior" in tree and "predictions" in tree
    ok("report", folder / "run", "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "seconds of training" in page and "fit.clip_norm" in page and "data:image/png" in page


def test_evaluate_prints_and_writes(folder, tmp_path):
    result = ok(
        "evaluate", "--methods", "siid", *pair(folder), "--folds", 3, "--max-folds", 1, "--no-baselines",
        "--out", tmp_path / "scores", "--draws", 10, *FAST,
    )  # fmt: skip
    assert "PCC given depth" in result.output and "siid" in result.output
    assert (tmp_path / "scores" / "summary.csv").exists()


def test_demo_refuses_an_unknown_method(tmp_path):
    assert "unknown method 'vist'" in refused("demo", "vist", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "sid"], "did you mean 'siid'? Available: siid, "),
        (["fit", "nope"], "unknown method 'nope'. Available: siid, "),
        (["evaluate", "--methods", " ,"], "--methods ' ,': names no method; give one or more of siid, vista, "),
        (["fit", "siid"], "needs target and reference"),
        (["fit", "siid", "--target", "no.h5ad", "--reference", "no.h5ad"], "no such file: no.h5ad"),
        (["fit", "siid", "--resume"], "not a run folder"),
        (["predict", "absent"], "name it *.h5ad or *.zarr"),
        (["report", "absent"], "name it *.html"),
        (["export", "absent"], "name it *.nc or *.zarr"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments, "--out", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_of_a_fit_are_named(folder, tmp_path):
    out = tmp_path / "new"
    assert "'likelihod'; did you mean 'likelihood'" in refused(
        "fit", "siid", *pair(folder), "--out", out, "--set", "likelihod=nb"
    )
    assert "unknown preset 'papr'; did you mean 'paper'" in refused(
        "fit", "siid", *pair(folder), "--out", out, "--preset", "papr"
    )
    assert not out.exists()


@pytest.mark.parametrize("method", ["siid", "vista", "spaim", "spagene"])
def test_a_single_cell_or_spot_is_refused(folder, tmp_path, method):
    files = {role: folder / "data" / f"{role}.h5ad" for role in ("target", "reference")}
    for role in ("target", "reference"):
        one = tmp_path / "one.h5ad"
        ad.read_h5ad(files[role])[:1].write_h5ad(one)
        both = [f"--{name}={one if name == role else file}" for name, file in files.items()]
        message = refused("fit", method, *both, "--out", tmp_path / "run")
        assert f"{role} ({one}): 1 " in message and "needed" in message and not (tmp_path / "run").exists()


def test_a_used_run_folder_is_refused_and_a_finished_one_resumes(folder):
    assert "--resume and --out alone continue it" in refused("fit", "siid", *pair(folder), "--out", folder / "run")
    assert "already finished" in ok("fit", "siid", "--resume", "--out", folder / "run").output
    own = ["--set", "factors=9", "--seed", 4, "--preset", "paper", "--target", folder / "data/target.h5ad"]
    said = refused("fit", "siid", "--resume", "--out", folder / "run", *own)
    assert "leave out --target, --preset, --set, --seed, or fit anew" in said


def test_the_next_command_can_be_copied(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run z")
    assert f"next: ppl-st predict '{tmp_path / 'run z'}' --out" in ok("fit", "siid", "--resume", "--out", tmp_path / "run z").output


def test_a_fit_with_nothing_left_to_impute_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ppl_st.api, "fit", lambda *arguments, **options: SimpleNamespace(measured=np.ones(3, bool), genes=np.array(["a", "b", "c"])))
    said = ok("fit", "siid", "--out", tmp_path / "run").output
    assert "3 measured and 0 unmeasured genes; no gene is left to impute (--hold-out hides some from a fit)" in said and "predict" not in said
    assert "next: ppl-st predict" in ok("fit", "xfuse", "--out", tmp_path / "run").output


def test_a_device_that_is_not_there_leaves_nothing_and_a_resumed_run_may_change_it(folder, tmp_path):
    import torch

    absent = f"cuda:{torch.cuda.device_count()}"
    assert "CUDA devices" in refused("fit", "siid", *pair(folder), "--out", tmp_path / "new", "--device", absent, *FAST)
    assert not (tmp_path / "new").exists()
    shutil.copytree(folder / "run", tmp_path / "run")  # as one that was interrupted on a machine with a GPU
    (tmp_path / "run" / "weights.safetensors").unlink()
    config = tmp_path / "run" / "config.toml"
    config.write_text(config.read_text().replace('device = "auto"', f'device = "{absent}"'))
    assert "name one with --device" in refused("fit", "siid", "--resume", "--out", tmp_path / "run")
    ok("fit", "siid", "--resume", "--out", tmp_path / "run", "--device", "cpu")
    assert 'device = "cpu"' in config.read_text() and (tmp_path / "run" / "weights.safetensors").is_file()


def test_methods_compute_on_the_cpu_where_there_is_a_gpu_too(folder, tmp_path, monkeypatch):
    import torch

    from ppl_st.inference.svi import pick_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cpu"
    said = refused("fit", "siid", *pair(folder), "--out", tmp_path / "new", "--device", "cuda", *FAST)
    assert "compute on the CPU, no GPU has been tried; use auto or cpu" in said
    assert not (tmp_path / "new").exists()


def test_predict_refuses_what_it_cannot_do(folder, tmp_path):
    out = tmp_path / "x.h5ad"
    genes = tmp_path / "genes.txt"
    genes.write_text("Gfap\n")
    assert "does not exist" in refused("predict", tmp_path / "absent", "--out", out)
    assert "Gfap" in refused("predict", folder / "run", "--out", out, "--genes", genes)
    assert "run predict twice" in refused(
        "predict", folder / "run", "--out", out, "--genes", genes, "--proportions"
    )
    target = folder / "data" / "target.h5ad"
    before = target.read_bytes()
    assert "is also an input" in refused("predict", folder / "run", "--target", target, "--out", target)
    assert "is the target that the run was fitted on" in refused("predict", folder / "run", "--out", target)
    assert target.read_bytes() == before and not out.exists()
    assert run("predict", folder / "run", "--out", out, "--seed", 2**32).exit_code == 2 and not out.exists()
    assert "give --truth COUNTS.h5ad, or leave out --groups" in refused("report", folder / "run", "--out", tmp_path / "r.html", "--groups", "half")


def test_memory_of_the_draws_bounds_the_samples(folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(Run, "write", lambda self, *arguments, **options: (1, 1))
    monkeypatch.setattr(Run, "write_samples", lambda self, *arguments, **options: given.append(options["memory_gb"]))
    ok("predict", folder / "run", "--out", tmp_path / "x.h5ad", "--samples", 2, "--memory-gb", 0.25)
    assert given == [0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xfuse", "--reference", "r.h5ad", "--folds", 5, "--max-folds", 1], "hidden spots; leave out --reference, --folds, --max-folds"),
        (["siid", "--top-genes", 9, "--holdout-spots", 0], "hidden genes; leave out --holdout-spots, --top-genes"),
        (["vista", "--holdout-section", "A"], "hidden genes; leave out --holdout-section"),
        (["vista", "--reference", "r.h5ad", "--truth", "t.h5ad", "--folds", "f.tsv"], "no folds; leave out --folds, or --truth"),
    ],
)
def test_evaluate_refuses_options_of_the_other_kind(tmp_path, arguments, message):
    assert message in refused("evaluate", "--target", "t.h5ad", "--out", tmp_path / "new", "--methods", *arguments)


def test_an_unwritable_output_is_refused_before_any_work(folder, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the computation had begun")

    monkeypatch.setattr(ppl_st.api, "fit", never)
    monkeypatch.setattr(ppl_st.api, "load", never)
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "run"
    assert "Not a directory" in refused("fit", "siid", *pair(folder), "--out", inside)
    assert "Not a directory" in refused("predict", folder / "run", "--out", inside / "x.h5ad")
    assert "Not a directory" in refused("export", folder / "run", "--out", inside / "x.nc")

    def refuse(**options):  # as the system does, but to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ppl_st.terminal.tempfile.TemporaryFile", refuse)
    assert f"cannot write in {tmp_path} (Permission denied)" in refused("fit", "siid", *pair(folder), "--out", tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "--resume"),
        (MemoryError(), 2, "out of memory"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (UserError("mend this"), 2, "error: mend this"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "out of memory"),
        ("FitError", 2, "step 3 was not finite"),
        ("Interrupted", 130, "interrupted at step 3"),
    ],
)
def test_failures_become_messages_and_exit_codes(tmp_path, monkeypatch, error, code, message):
    from ppl_st.inference.faults import FitError

    named = {"FitError": FitError("step 3 was not finite")}
    named["Interrupted"] = ppl_st.api.Interrupted("interrupted at step 3 of 9")

    def fail(*arguments, **options):
        raise named.get(error, error) if isinstance(error, str) else error

    monkeypatch.setattr(ppl_st.api, "fit", fail)
    assert message in refused("fit", "siid", "--out", tmp_path / "new", code=code)


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def bug(*arguments, **options):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(ppl_st.api, "fit", bug)
    result = run("fit", "siid", "--out", tmp_path / "new")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1


def shell(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from ppl_st.cli import main; main()", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT)


def test_the_program_starts_fast_and_exits_with_its_codes(tmp_path):
    times = []
    for _ in range(3):
        began = time.perf_counter()
        process = shell("--help")
        out, err = process.communicate()
        times.append(time.perf_counter() - began)
        assert process.returncode == 0 and "evaluate" in out and not err
    assert min(times) < slowness()
    process = shell("fit", "sid", "--out", tmp_path / "new")
    _, err = process.communicate()
    assert process.returncode == 2 and err.count("\n") == 1 and err.startswith("error: unknown method")
    process = shell("fit", "siid", "--sett", "a=b")
    _, err = process.communicate()
    assert process.returncode == 2 and "--sett" in err and "Traceback" not in err


@pytest.mark.slow
def test_sigterm_in_the_middle_leaves_a_run_that_resumes(folder, tmp_path):
    out = tmp_path / "run"
    process = shell("fit", "siid", *pair(folder), "--out", out, *FAST[:-1], "--set=fit.steps=100000")
    deadline = time.monotonic() + 600
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130 and "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert (out / "state.pt").exists() and not [p for p in out.iterdir() if ".tmp" in p.name]
    assert "was interrupted: continue it" in refused("predict", out, "--out", tmp_path / "x.h5ad")
    assert "was interrupted: continue it" in refused("report", out, "--out", tmp_path / "x.html")

"""What is shipped: wheel and sdist carry every module once, under one name; README and CI say the same."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ppl_st

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Names inside the sdist and inside the wheel that is built from it, without network."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ppl_st", "models", "inference", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as tar:
        shipped = {member.name.split("/", 1)[-1]: member for member in tar.getmembers()}
    with zipfile.ZipFile(wheel) as archive:
        return (
            shipped,
            archive.namelist(),
            archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))),
        )


def modules():
    """Every module of the checkout as the path it must have inside the wheel."""
    package = {f"ppl_st/{file.name}" for file in (ROOT / "ppl_st").glob("*.py")}
    for folder in ("testing", "prepare"):
        package |= {f"ppl_st/{folder}/{file.name}" for file in (ROOT / "ppl_st" / folder).glob("*.py")}
    for folder in ("models", "inference"):
        package |= {f"ppl_st/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / folder).rglob("*.py")}
    return package


def test_wheel_holds_every_module_once_and_nothing_else(archives):
    _, wheel, metadata = archives
    code = [name for name in wheel if ".dist-info/" not in name]
    assert sorted(code) == sorted(modules() | {"ppl_st/py.typed", "ppl_st/browser.js"})
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    assert f"Version: {ppl_st.__version__}\n".encode() in metadata


def test_sdist_holds_real_files_not_links(archives):
    sdist, _, _ = archives
    assert modules() | {"ppl_st/py.typed", "LICENSE", "README.md", "pyproject.toml"} <= set(sdist)
    assert not [name for name, member in sdist.items() if member.issym() or member.islnk()]
    assert not [name for name in sdist if name.startswith(("models/", "inference/"))]


def test_links_are_relative_links():
    for folder in ("models", "inference"):
        link = ROOT / "ppl_st" / folder
        assert link.is_symlink() and link.readlink() == Path("..") / folder


def test_dependencies_have_lower_bounds_only():
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.fullmatch(r"[a-z0-9-]+>=[\d.]+", requirement), requirement


def readme_blocks():
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [body for language, body in fences if language in ("bash", "sh", "shell")]


def test_readme_opens_with_the_main_job_and_the_tests():
    main_job, tests = readme_blocks()[:2]
    for block in (main_job, tests):
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt ")
        subprocess.run(["bash", "-n", "-c", block], check=True)
    assert ".venv/bin/ppl-st demo --out demo" in main_job and "[test]" not in main_job
    assert "'.[test]'" in tests and ".venv/bin/python -m pytest" in tests


def test_ci_runs_the_second_readme_block_as_it_is_written():
    command = [str(ROOT / ".ci" / "readme_block"), "2"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == readme_blocks()[1]
    script = (ROOT / ".ci" / "run").read_text()
    assert (
        "test_command=$(.ci/readme_block 2)" in script and 'bash -euo pipefail -c "$test_command"' in script
    )
    assert "pytest" not in script, "the test command lives in the README only"
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert subprocess.run([command[0], "99"], capture_output=True, check=False).returncode == 1


def test_the_checkout_names_no_other_place():
    """No home folders and no package-index addresses in any file that is shipped or run."""
    files = [
        ROOT / name for name in ("README.md", "pyproject.toml", "constraints.txt", ".ci/run", ".gitignore")
    ]
    files += [ROOT / name for name in modules()]  # models and inference through their links
    pattern = re.compile(r"/(?:root|home|Users)/\w|--(?:extra-)?index-url|--find-links")
    assert not [str(file) for file in files if pattern.search(file.read_text(encoding="utf-8"))]

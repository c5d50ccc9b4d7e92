"""Configurations: round trips, and one clear sentence for every way a user can get a key wrong."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ppl_st import config as cfg
from ppl_st.errors import UserError


@dataclass(frozen=True)
class Fit:
    lr: float = field(default=0.05, metadata={"gt": 0, "le": 1})
    steps: int = field(default=5000, metadata={"ge": 1})
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"ge": 0, "lt": 1})
    patience: int | None = 50


@dataclass(frozen=True)
class Config:
    factors: int = field(default=20, metadata={"ge": 1})
    likelihood: Literal["poisson", "nb"] = "poisson"
    entropy: bool = True
    transform: tuple[tuple[float, ...], ...] | None = None
    labels: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)
    title: str = ""
    fit: Fit = field(default_factory=Fit)

    def __post_init__(self) -> None:
        if self.likelihood == "nb" and self.factors > 100:
            raise ValueError("more than 100 factors need likelihood = 'poisson'")


RICH = Config(
    factors=7,
    likelihood="nb",
    entropy=False,
    transform=((1.0, 0.0), (0.0, 1.0)),
    labels=Path("labels.csv"),
    weights={"a b": 0.5},
    title='say "hi"\n= 3',
    fit=Fit(lr=0.1, patience=None),
)


@pytest.mark.parametrize("value", [Config(), RICH])
def test_file_round_trip_over_a_different_preset(tmp_path, value):
    file = tmp_path / "config.toml"
    file.write_text(cfg.dumps(value))
    other = Config(factors=3, fit=Fit(patience=None, steps=9), labels=Path("x"))
    assert cfg.read(file, value) == value
    # Whole effective config, None included: nothing of the other preset may shine through (dicts are
    # replaced, not united).
    assert cfg.read(file, other) == value


@settings(deadline=None)  # a machine that stalls is not an error
@given(
    lr=st.floats(1e-300, 1),
    steps=st.integers(1, 2**62),
    title=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_value_survives_toml_exactly(lr, steps, title):
    value = Config(title=title, fit=Fit(lr=lr, steps=steps))
    assert cfg.merge(Config(), cfg.tomllib.loads(cfg.dumps(value))) == value


def test_write_is_readable_back(tmp_path):
    pytest.importorskip("ppl_st.io")
    cfg.write(RICH, tmp_path / "config.toml")
    assert cfg.read(tmp_path / "config.toml", Config()) == RICH
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.toml"]


def test_a_partial_file_keeps_the_preset(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("factors = 40\n[fit]\nlr = 0.01\n")
    preset = Config(title="paper", fit=Fit(steps=77))
    merged = cfg.read(file, preset)
    assert merged == dataclasses.replace(preset, factors=40, fit=Fit(lr=0.01, steps=77))
    assert preset.factors == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("facters = 3", ["c.toml", "'facters'", "did you mean 'factors'?", "Valid keys"]),
        ("[fit]\nlearning = 1", ["c.toml", "'fit.learning'", "fit.lr"]),
        ("[fit]\nstep = 1\nzzz = 2", ["keys 'fit.step', 'fit.zzz'", "did you mean 'fit.steps'?"]),
        ("factors = 'many'", ["factors must be a whole number", "'many'"]),
        ("factors = 2.5", ["factors must be a whole number", "2.5"]),
        ("factors = true", ["factors must be a whole number", "True"]),
        ("entropy = 1", ["entropy must be true or false", "1"]),
        ("factors = 0", ["factors must be at least 1", "0"]),
        ("likelihood = 'nbb'", ["'poisson', 'nb'", "did you mean 'nb'", "'nbb'"]),
        ("[fit]\nlr = 2.0", ["fit.lr must be at most 1", "2.0"]),
        ("[fit]\nlr = nan", ["fit.lr must be a number", "nan"]),
        ("[fit]\nbetas = [0.9, 1.0]", ["fit.betas[1] must be less than 1", "1.0"]),
        ("[fit]\nbetas = [0.9]", ["fit.betas must be a list of 2 values", "[0.9]"]),
        ("[fit]\npatience = 'never'", ['a whole number or "none"', "'never'"]),
        ("fit = 3", ["fit must be a table", "3"]),
        ("weights = {a = 'x'}", ["weights must be a number", "'x'"]),
        ("title = 2026-01-01", ["title must be text in quotes", "2026"]),
        ("likelihood = 'nb'\nfactors = 101", ["c.toml", "more than 100 factors"]),
        ("factors = = 3", ["c.toml", "not valid TOML", "line 1"]),
    ],
)
def test_mistakes_name_file_key_value_and_remedy(tmp_path, text, words):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        cfg.read(file, Config())
    for word in words:
        assert word in str(error.value)


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml.*No such file"):
        cfg.read(tmp_path / "absent.toml", Config())


def test_overrides_take_literals_bare_strings_and_dotted_keys():
    got = cfg.with_overrides(
        Config(),
        [
            "factors=40",
            "fit.steps=1e4",
            "likelihood=nb",
            "fit.patience=none",
            "transform=[[1,0],[0,1]]",
            "entropy=false",
        ],
    )
    assert got.factors == 40 and got.likelihood == "nb" and got.entropy is False
    assert got.fit == Fit(steps=10000, patience=None) and isinstance(got.fit.steps, int)
    assert got.transform == ((1.0, 0.0), (0.0, 1.0))


def test_overrides_keep_equals_signs_and_the_last_one_wins():
    assert cfg.with_overrides(Config(), ["title=a=b", "factors=3", "factors=4"]) == Config(
        title="a=b", factors=4
    )
    # A line break must not smuggle in a second key.
    assert cfg.with_overrides(Config(), ["title=1\nfactors = 9"]).factors == 20


@dataclass(frozen=True)
class Between:
    """Settings that refuse each other."""

    low: int = 0
    high: int = 1
    fit: Fit = Fit()

    def __post_init__(self):
        if self.low >= self.high:
            raise ValueError(f"low={self.low} is not below high={self.high}")


def test_overrides_are_judged_together_and_tables_laid_over_each_other():
    for items in (["low=5", "high=6"], ["high=6", "low=5"]):
        assert cfg.with_overrides(Between(), items) == Between(5, 6)
    with pytest.raises(UserError, match="--set: configuration: low=5 is not below high=1"):
        cfg.with_overrides(Between(), ["low=5"])
    made = cfg.with_overrides(Between(), ["fit.steps=3", "fit={lr=0.5}", "fit.steps=4"])
    assert made.fit == Fit(steps=4, lr=0.5)


@pytest.mark.parametrize("item", ["factors", "=3", "fit.=3", "fit.lr.x=3", "lr=3", "entropy=True"])
def test_bad_overrides_name_the_option(item):
    with pytest.raises(UserError, match="--set"):
        cfg.with_overrides(Config(), [item])


def test_check_finds_what_python_lets_through():
    assert cfg.check(RICH) is RICH
    with pytest.raises(UserError, match=r"fit\.lr must be greater than 0, got -1"):
        cfg.check(Config(fit=Fit(lr=-1)))


def test_preset_names():
    presets = {"default": Config(), "paper": Config(factors=8)}
    assert cfg.pick_preset(presets, "paper").factors == 8
    with pytest.raises(UserError, match=r"'papers'; did you mean 'paper'\? Available: default, paper"):
        cfg.pick_preset(presets, "papers")


def _adata(matrix):
    import anndata as ad
    import pandas as pd

    n, g = matrix.shape
    obs, var = (
        pd.DataFrame(index=[f"c{i}" for i in range(n)]),
        pd.DataFrame(index=[f"g{j}" for j in range(g)]),
    )
    return ad.AnnData(matrix, obs=obs, var=var, obsm={"spatial": np.arange(2.0 * n).reshape(n, 2)})


def test_adata_hash_sees_values_and_nothing_else():
    counts = np.random.default_rng(0).poisson(0.3, (5000, 7))
    first = cfg.hash_adata(_adata(sparse.csr_matrix(counts.astype(np.float32))))
    assert first == cfg.hash_adata(_adata(counts.astype(np.int64)))
    assert first == cfg.hash_adata(_adata(sparse.csc_matrix(counts.astype(np.float64))))
    changed = counts.copy()
    changed[4999, 6] += 1
    moved = _adata(counts)
    moved.obsm["spatial"] = moved.obsm["spatial"] + 1e-9
    renamed = _adata(counts)
    renamed.var_names = [*renamed.var_names[:-1], "other"]
    assert len({first, cfg.hash_adata(_adata(changed)), cfg.hash_adata(moved), cfg.hash_adata(renamed)}) == 4
    labelled = _adata(counts)
    labelled.obsm["names"] = np.array([["a", "b"]] * 5000)  # text is no number to hash
    assert cfg.hash_adata(labelled) == first


def test_manifest_names_inputs_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.h5ad").write_bytes(b"abc")
    got = cfg.manifest(seed=0, device="cpu", inputs={"target": "t.h5ad"})
    assert got["inputs"]["target"]["path"] == str(tmp_path / "t.h5ad")


def test_manifest_is_plain_json_and_hashes_what_it_was_given(tmp_path):
    file = tmp_path / "target.h5ad"
    file.write_bytes(b"abc")
    folder = tmp_path / "ref.zarr"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "c").write_bytes(b"abc")
    adata = _adata(np.ones((2, 3)))
    got = cfg.manifest(
        seed=3,
        device="cpu",
        inputs={"target": file, "reference": folder, "other": adata},
        command="ppl-st fit",
    )
    assert json.loads(json.dumps(got)) == got
    assert got["inputs"]["target"] == {"path": str(file), "sha256": hashlib.sha256(b"abc").hexdigest()}
    assert got["inputs"]["other"]["sha256"] == cfg.hash_adata(adata)
    before = got["inputs"]["reference"]["sha256"]
    (folder / "0" / "c").rename(folder / "0" / "d")
    assert cfg.hash_path(folder) != before
    assert {"ppl_st", "python", "torch", "pyro-ppl", "numpy", "anndata"} <= set(got["versions"])
    assert all(got["versions"].values())

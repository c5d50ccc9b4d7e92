"""sweep: variants on the same splits, continued where it stopped, paired differences as defined, refusals."""

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ppl_st import sweep as sw
from ppl_st.cli import app
from ppl_st.compare import compare
from ppl_st.errors import UserError
from ppl_st.io import write_adata
from ppl_st.report_run import report_folder
from ppl_st.simulate import spatial_field

SPEC = """
method = "spaim"
target = "target.h5ad"
reference = "reference.h5ad"
folds = 3
max_folds = 1
draws = 8
seeds = [0, 1]
[variants.default]
fit.steps = 2
[variants.level]
fit.steps = 2
gain = "none"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sweep")
    world = spatial_field(seed=3, n_cells=100, n_reference=100, n_genes=32, n_panel=20)
    for name in ("target", "reference"):
        write_adata(getattr(world, name), made / f"{name}.h5ad")
    (made / "spec.toml").write_text(SPEC)
    return made


def test_variants_share_their_splits_and_a_stopped_sweep_goes_on(folder, monkeypatch):
    out = folder / "out"
    ran = []
    real = sw.evaluate

    def counted(methods, target, reference, **options):
        ran.append((options["seed"], options["overrides"]))
        if len(ran) == 3:  # the power goes
            raise KeyboardInterrupt
        return real(methods, target, reference, **options)

    monkeypatch.setattr(sw, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        sw.sweep(folder / "spec.toml", out=out)
    assert ran == [(0, ["fit.steps=2"]), (0, ["fit.steps=2", 'gain="none"']), (1, ["fit.steps=2"])]
    (out / "default" / "seed1").mkdir(parents=True, exist_ok=True)
    (out / "default" / "seed1" / "evaluation.json").write_text("{}")  # what an interrupted evaluation leaves
    table = sw.sweep(folder / "spec.toml", out=out)
    assert len(ran) == 5 and ran[3] == ran[2]
    scores = pd.read_csv(out / "scores.csv")
    held = scores.groupby(["seed", "variant"])["gene"].apply(frozenset)
    assert held[0]["default"] == held[0]["level"] != held[1]["default"]
    score = table[(table["metric"] == "log_score") & (table["variant"] == "level")].iloc[0]
    assert score["difference"] != 0 and score["lo"] < score["difference"] < score["hi"] and score["seeds"] == 2
    done = CliRunner().invoke(app, ["sweep", str(folder / "spec.toml"), "--out", str(out), "--quiet"])
    assert done.exit_code == 0 and len(ran) == 5 and "level" in done.output
    (folder / "other.toml").write_text(SPEC.replace('"none"', '"hierarchical"'))
    with pytest.raises(UserError, match=r"level.*seed0.*another --out"):
        sw.sweep(folder / "other.toml", out=out)
    (folder / "deeper.toml").write_text(SPEC.replace("draws = 8", "draws = 9"))
    with pytest.raises(UserError, match=r"default.*seed0: was made with another draws; .*another --out"):
        sw.sweep(folder / "deeper.toml", out=out)
    (folder / "swapped.toml").write_text(SPEC.replace('target = "target', 'target = "reference'))
    with pytest.raises(UserError, match=r"seed0: was made with another target; "):
        sw.sweep(folder / "swapped.toml", out=out)


def test_differences_pair_by_seed_and_gene():
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        for gene in range(50):
            hard = 5 * rng.standard_normal()
            for name, shift in (("a", 0.0), ("b", 0.1 + 0.02 * (seed - 1.5))):
                value = hard + shift + (0.05 * rng.standard_normal() if name == "b" else 0.0)
                rows.append({"variant": name, "seed": seed, "gene": f"g{gene}", "log_score": value, "coverage_90": 0.8})
    table = sw.summarise(pd.DataFrame(rows)).set_index(["variant", "metric"])
    b = table.loc["b", "log_score"]
    assert b["difference"] == pytest.approx(0.1, abs=0.02) and 0.08 < b["lo"] < b["difference"] < b["hi"] < 0.12
    assert b["seed_se"] == pytest.approx(0.02 * np.sqrt(5 / 3) / 2, abs=0.008)  # sd of (-.03, -.01, .01, .03) over 2
    assert (table.loc["a", ["difference", "lo", "hi"]].to_numpy() == 0).all()
    assert table.loc["b", "coverage_error"]["mean"] == pytest.approx(0.1)


def test_the_difference_is_that_of_its_interval():
    """Folds that were left out judge other genes with each seed: every gene counts once, not every row."""
    scores = {"a": {0: [("x", 0.0), ("y", 0.0)], 1: [("x", 0.0)]}, "b": {0: [("x", 1.0), ("y", 0.0)], 1: [("x", 1.0)]}}
    rows = [{"variant": v, "seed": k, "gene": g, "log_score": s} for v, of in scores.items() for k, pairs in of.items() for g, s in pairs]
    table = sw.summarise(pd.DataFrame(rows)).set_index("variant")
    assert table.loc["b", "difference"] == pytest.approx(0.5) and table.loc["b", "lo"] == 0 and table.loc["b", "hi"] == 1


def test_tables_of_settings_are_varied_too():
    presets = sw.load_method("spaim").PRESETS
    groups = {r"log_theta\.loc$": 0.5, 'a "b"': 2.0}
    _, overrides = sw._settings({"fit": {"steps": 3, "lr_groups": groups}}, "default")
    made = sw.configs.with_overrides(presets["default"], overrides)
    assert made.fit.lr_groups == groups and made.fit.steps == 3


def test_a_grid_varies_the_first_variant(folder):
    (folder / "grid.toml").write_text(SPEC.split("[variants.level]")[0] + '[grid]\ngain = ["hierarchical", "none"]\nneighbors = [5, 10]\n')
    variants = sw.read_spec(folder / "grid.toml")["variants"]
    assert list(variants)[:2] == ["default", "gain=hierarchical neighbors=5"] and len(variants) == 5
    assert variants["gain=none neighbors=10"] == {"fit": {"steps": 2}, "gain": "none", "neighbors": 10}


@pytest.mark.parametrize("grid", ["fit.steps = [1, 3]", '"fit.steps" = [1, 3]', "[grid.fit]\nsteps = [1, 3]"])
def test_a_grid_takes_dotted_keys(folder, grid):
    first = "[variants.default]\nfit = { steps = 2, lr = 0.1 }\n"
    (folder / "dotted.toml").write_text(SPEC.split("[variants.")[0] + f"{first}[grid]\n{grid}\n")
    variants = sw.read_spec(folder / "dotted.toml")["variants"]
    assert list(variants) == ["default", "fit.steps=1", "fit.steps=3"]
    preset, overrides = sw._settings(variants["fit.steps=3"], "default")
    made = sw.configs.with_overrides(sw.load_method("spaim").PRESETS[preset], overrides)
    assert made.fit.steps == 3 and made.fit.lr == 0.1
    (folder / "dotted.toml").write_text(SPEC.split("[variants.")[0] + "[grid]\nfit.steps = 3\n")
    with pytest.raises(UserError, match=r"grid\.fit\.steps = 3; give a list"):
        sw.read_spec(folder / "dotted.toml")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("method", "methods", "unknown key 'methods'"),
        ('target = "target.h5ad"', "", "'target' is missing"),
        ("[0, 1]", "3", "seeds = 3"),
        ('[variants.level]\nfit.steps = 2\ngain = "none"', "", "at least two"),
        ("[variants.level]", '[variants."../level"]', "can be a folder"),
        ("folds = 3", "folds = ", "not valid TOML"),
        ("folds = 3", 'folds = 3\ntruth = "t.h5ad"', "no folds; leave out folds and max_folds"),
        ('gain = "none"', 'gain = "nonee"', "variant 'level'.*gain"),
        ('"target.h5ad"', '"nowhere.h5ad"', "no such file.*nowhere"),
        ("max_folds = 1", "max_folds = 0", r"bad\.toml: max_folds = 0; give a whole number, 1 or more"),
        ("max_folds = 1", 'max_folds = "2"', r"bad\.toml: max_folds = '2'; give a whole"),
        ("folds = 3", "folds = 4.5", r"bad\.toml: folds = 4\.5; give a whole number, 2 or more, or the name of a file"),
        ("folds = 3", "folds = 1", r"bad\.toml: folds = 1; give"),
        ("folds = 3", 'folds = "x"', r"bad\.toml: folds \(.*x\): cannot be read"),
        ('"target.h5ad"', "3", r"bad\.toml: target = 3; give the name of a file"),
        ("draws = 8", "draws = 20.5", r"bad\.toml: draws = 20\.5; give"),
        ("draws = 8", "draws = 0", r"bad\.toml: draws = 0; give a whole number, 2 or more"),
        ("draws = 8", "draws = true", r"bad\.toml: draws = True; give"),
        ("draws = 8", "draws = 1", r"bad\.toml: draws = 1; give"),
        (SPEC[SPEC.index("[variants.d") :], 'variants = ["a"]', r"bad\.toml: variants = \['a'\]; give tables"),
        ("[0, 1]", "[1, 1]", r"bad\.toml: seeds = \[1, 1\]; give a list of different"),
        ('gain = "none"', "preset = 3", r"bad\.toml: variants\.level\.preset = 3; give the name of a preset"),
    ],
)
def test_refusals_name_the_key(folder, old, new, message):
    (folder / "bad.toml").write_text(SPEC.replace(old, new))
    with pytest.raises(UserError, match=message):
        sw.sweep(folder / "bad.toml", out=folder / "bad")
    assert not (folder / "bad").exists()


def test_paths_are_taken_from_the_folder_of_the_specification(folder):
    text = SPEC.replace("folds = 3", 'folds = "folds.tsv"').replace('gain = "none"', 'profiles = "types.h5ad"')
    (folder / "paths.toml").write_text(text + '[variants.given]\nprofiles = "none"\n')
    plan = sw.read_spec(folder / "paths.toml")
    assert plan["folds"] == folder / "folds.tsv" and plan["variants"]["level"]["profiles"] == str(folder / "types.h5ad")
    assert plan["variants"]["given"] == {"profiles": "none"} and plan["variants"]["default"] == {"fit": {"steps": 2}}


@pytest.mark.parametrize("left", ["scores.csv", "summary.csv", "evaluation.json", "log_prob.npz", "config.toml", "manifest.json"])
def test_an_evaluation_or_a_run_is_left_as_it_is(folder, monkeypatch, tmp_path, left):
    monkeypatch.setattr(sw, "evaluate", None)
    (tmp_path / left).write_text("method,kind,fold,gene\n")
    with pytest.raises(UserError, match=rf"holds an evaluation or a run \({left}\), no sweep, .*another --out"):
        sw.sweep(folder / "spec.toml", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_sweep_is_reported_and_compared_by_its_evaluations(tmp_path):
    for name in ("scores.csv", "summary.csv"):
        (tmp_path / name).write_text("variant,method,kind,fold,gene,log_score,seed\ndefault,spaim,method,0,g,-1.0,0\n")
    for refused in (lambda: compare([tmp_path]), lambda: report_folder(tmp_path, tmp_path / "r.html")):
        with pytest.raises(UserError, match=r"is a sweep; give one or several of its evaluations, .*/<variant>/seed<k>"):
            refused()


@pytest.mark.parametrize("left", [["config.toml", "evaluation.json"], ["notes.txt"]])
def test_what_is_no_part_of_a_sweep_stays(folder, monkeypatch, tmp_path, left):
    monkeypatch.setattr(sw, "evaluate", None)
    place = tmp_path / "default" / "seed0"
    place.mkdir(parents=True)
    for name in left:
        (place / name).write_text("mine")
    with pytest.raises(UserError, match="seed0: is no part of a sweep"):
        sw.sweep(folder / "spec.toml", out=tmp_path)
    assert sorted(path.name for path in place.iterdir()) == left


def test_a_changed_folds_file_is_noticed(folder, tmp_path):
    (folder / "folds.tsv").write_text("gene0001\t0\n")
    (folder / "folds.toml").write_text(SPEC.replace("folds = 3", 'folds = "folds.tsv"'))
    plan = sw.read_spec(folder / "folds.toml")
    inputs = {role: {"sha256": sw.configs.hash_path(plan[role])} for role in ("target", "reference", "folds")}
    record = {"preset": "default", "overrides": [], "inputs": inputs, "folds": "elsewhere", "max_folds": 1, "draws": 8}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    sw._refuse_other(tmp_path, plan, "default", [])
    (folder / "folds.tsv").write_text("gene0002\t0\n")
    with pytest.raises(UserError, match="made with another folds;"):
        sw._refuse_other(tmp_path, plan, "default", [])


def test_a_metric_that_is_not_finite_has_no_row():
    rows = [{"variant": v, "seed": 0, "gene": g, "log_score": s, "crps": 1.0} for v, g, s in (("a", "x", -1.0), ("a", "y", -np.inf), ("b", "x", 0.0))]
    table = sw.summarise(pd.DataFrame([*rows, {"variant": "b", "seed": 0, "gene": "y", "log_score": -2.0, "crps": 2.0}]))
    assert set(table["metric"]) == {"crps"} and len(table) == 2

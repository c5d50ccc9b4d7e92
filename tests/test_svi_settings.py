"""Settings of a fit: what is refused, when it stops, what progress it shows."""

import math
from dataclasses import replace

import pytest
import torch

from ppl_st.errors import UserError
from ppl_st.inference import monitor
from ppl_st.inference.settings import unfinished_warmup
from ppl_st.inference.svi import FitConfig, fit
from svi_pairs import NET, Rows, empty_store, net_pair, net_rows, normal_pair, same

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"betas": (0.9, 1.0)},
        {"schedule": "linear"},
        {"optimizer": "sgd"},
        {"elbo": "graph"},
        {"seed": -1},
        {"seed": 2**32},
        {"final_lr_factor": 2.0},
        {"log_every": 0},
    ],
)
def test_impossible_settings_are_refused(wrong):
    key = next(iter(wrong))
    with pytest.raises(UserError, match=f"{key} = "):
        FitConfig(**wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr_groups": {"decodr": 2.0}}, r"'decodr' matches no parameter; there are model\.decoder"),
        ({"lr_groups": {"(": 2.0}}, "no regular expression"),
        ({"device": "abacus"}, "'abacus'"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_settings_that_do_not_fit_the_pair_or_machine_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        fit(net_pair(), net_rows(), replace(NET, **setting))


def test_a_warm_up_that_does_not_end_is_said_unless_the_preset_means_it():
    short, long = FitConfig(steps=100, kl_warmup_steps=200), FitConfig(steps=4000, kl_warmup_steps=8000)
    line = "warning: the fit ends at KL weight 0.50: kl_warmup_steps=200 of steps=100"
    assert unfinished_warmup(short, 100, FitConfig()) == unfinished_warmup(short, 100, long) == [line]
    assert unfinished_warmup(long, 4000, long) == unfinished_warmup(FitConfig(steps=100, kl_warmup_steps=100), 100, long) == []
    assert unfinished_warmup(long, 400, long) == ["warning: the fit ends at KL weight 0.05: kl_warmup_steps=8000 of steps=400"]


def test_early_stop_when_the_smoothed_loss_stands_still():
    x = torch.tensor([1.0, 2.0, 4.0])
    config = FitConfig(steps=5000, lr=0.05, patience=3, window=20, min_delta=1e-2, device="cpu")
    state, info = fit(normal_pair(), Rows(x), config)
    assert info.stop_reason == "converged" and state.step < 3000 and state.step % 20 == 0
    again, later = fit(normal_pair(), Rows(x), config, state)  # a finished fit stays finished
    assert later.stop_reason == "converged" and len(later.losses) == 0 and same(again, state)
    late, _ = fit(normal_pair(), Rows(x), replace(config, min_steps=state.step + 7))
    assert late.step >= state.step + 7 + 4 * 20 and (late.step - state.step - 7) % 20 == 0
    slow, _ = fit(normal_pair(), Rows(x), replace(config, kl_warmup_steps=300))
    assert slow.step >= 300 + 4 * 20
    assert fit(normal_pair(), Rows(x), replace(config, steps=400, patience=0))[1].stop_reason == "steps"


def test_min_delta_and_patience_count_windows():
    far = torch.full((3,), 50.0)  # the loss falls all the way
    config = FitConfig(steps=200, patience=3, window=20, device="cpu")
    assert fit(normal_pair(), Rows(far), config)[1].stop_reason == "steps"
    state, info = fit(normal_pair(), Rows(far), replace(config, min_delta=1e6))
    assert info.stop_reason == "converged" and state.step == 20 + 3 * 20


def test_progress_lines_off_a_terminal(capsys):
    fit(net_pair(), net_rows(), replace(NET, steps=40), progress="auto")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0].startswith("fit  10 %  step 4/40  loss ")
    fit(net_pair(), net_rows(), NET)
    assert capsys.readouterr() == ("", "")


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(monitor.sys.stderr, "isatty", lambda: True)
    fit(net_pair(), net_rows(), NET, progress="auto")
    assert "10/10" in capsys.readouterr().err

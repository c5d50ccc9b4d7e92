"""The files of a fit: a log that stays well formed, checkpoints that survive a full disk, states that hold no code."""

import errno
import logging
import os
import resource

import pytest
import torch
from torch import Tensor

from ppl_st.errors import UserError
from ppl_st.inference.svi import FitConfig, fit, load_state, save_state
from svi_pairs import NET, Rows, empty_store, log_of, nan, net_pair, net_rows, normal_pair, same

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


def test_log_is_well_formed_after_resume(tmp_path):
    fit(net_pair(), net_rows(), NET, folder=tmp_path, until=5)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(
            '{"step": 6, "loss": 1.0}\n{"step": 7, "lo'
        )  # steps past the checkpoint, and a line cut short
    state = load_state(tmp_path / "state.pt")
    _, info = fit(net_pair(), net_rows(spoil={8: nan}), NET, state, folder=tmp_path)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9, 10]
    assert set(lines[0]) == {"step", "loss", "smoothed", "lr", "grad_norm", "seconds", "fault"}
    assert lines[4]["loss"] is None and "site" in lines[4]["fault"] and lines[2]["loss"] == info.losses[0]
    fit(net_pair(), net_rows(), NET, folder=tmp_path, until=2)
    assert [line["step"] for line in log_of(tmp_path)] == [2]


def test_trouble_with_the_log_does_not_stop_the_fit(tmp_path, caplog):
    (tmp_path / "log.jsonl").mkdir()
    with caplog.at_level(logging.WARNING, logger="ppl_st"):
        state, _ = fit(net_pair(), net_rows(), NET, folder=tmp_path)
    assert same(state, fit(net_pair(), net_rows(), NET)[0]) and "no log is written" in caplog.text


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    def shrink(step):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"state\.pt"):
            fit(net_pair(), net_rows(hook=shrink), NET, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_state(tmp_path / "state.pt").step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_no_space_at_the_rename_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    state, _ = fit(net_pair(), net_rows(), NET, folder=tmp_path, until=3)

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"state\.pt.*space"):
        fit(net_pair(), net_rows(), NET, state, folder=tmp_path)
    monkeypatch.undo()
    assert same(load_state(tmp_path / "state.pt"), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "state.pt"]


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    rows = net_rows(hook=lambda step: pytest.fail("trained first"))
    with pytest.raises(UserError, match="file"):
        fit(net_pair(), rows, NET, folder=tmp_path / "file")


def test_damaged_or_foreign_states_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    with pytest.raises(UserError, match="no saved fit state"):
        load_state(path)
    save_state(fit(normal_pair(), Rows(torch.ones(3)), FitConfig(steps=1, device="cpu"))[0], path)
    with pytest.raises(UserError, match="another model"):
        fit(net_pair(), net_rows(), NET, load_state(path))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt: the saved fit state cannot be read"):
            load_state(path)
    for foreign in ({"a": torch.zeros(1)}, torch.zeros(2)):
        torch.save(foreign, path)
        with pytest.raises(UserError, match="not a fit state"):
            load_state(path)


def test_state_file_holds_no_code(tmp_path):
    fit(net_pair(), net_rows(), NET, folder=tmp_path)

    def plain(x):
        if isinstance(x, dict):
            return all(plain(k) and plain(v) for k, v in x.items())
        if isinstance(x, list):
            return all(map(plain, x))
        return isinstance(x, Tensor) or type(x) in (int, float, str)

    assert plain(torch.load(tmp_path / "state.pt", weights_only=True))

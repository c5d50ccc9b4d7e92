"""A fit that was interrupted, killed or told to stop goes on bit for bit as if it had not been."""

import copy
import os
import signal
import threading
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import ppl_st
from ppl_st.inference.settings import learning_rate
from ppl_st.inference.svi import epoch_order, fit, fit_part, load_state, save_state
from spaim_problems import small_world
from svi_pairs import NET, empty_store, log_of, net_pair, net_rows, same

torch.set_num_threads(1)
_empty_store = pytest.fixture(empty_store, autouse=True)


def test_data_order_covers_each_epoch_once_and_is_a_function_of_the_step():
    epoch = [epoch_order(23, 8, 3, step) for step in (2, 0, 1)]
    assert sorted(np.concatenate(epoch)) == list(range(23)) and len(epoch[0]) == 7
    again = epoch_order(23, 8, 3, 2)
    again[:] = 0  # the caller's copy
    assert np.array_equal(epoch_order(23, 8, 3, 2), epoch[0])
    assert not np.array_equal(epoch_order(23, 8, 3, 0), epoch_order(23, 8, 3, 3))
    assert not np.array_equal(epoch_order(23, 8, 3, 0), epoch_order(23, 8, 4, 0))


def test_five_and_five_steps_equal_ten(tmp_path):
    whole, info = fit(net_pair(), net_rows(), NET)
    half, first = fit(net_pair(), net_rows(), NET, until=5)
    assert first.stop_reason == "interrupted" and half.step == 5
    kept = copy.deepcopy(half)
    save_state(half, tmp_path / "state.pt")
    rest, second = fit(net_pair(seed=9), net_rows(), NET, load_state(tmp_path / "state.pt"))
    assert same(whole, rest) and second.stop_reason == "steps" and second.first_step == 5
    assert rest.tally.losses == whole.tally.losses == info.losses.tolist() and half.tally.losses == first.losses.tolist()
    assert rest.tally.seconds == pytest.approx(first.seconds + second.seconds)
    assert np.array_equal(info.losses, np.concatenate([first.losses, second.losses]))
    assert np.array_equal(info.lr, np.concatenate([first.lr, second.lr]))
    in_memory, _ = fit(net_pair(seed=9), net_rows(), NET, half)
    assert same(whole, in_memory) and same(half, kept), "the state handed in was changed"
    other, _ = fit(net_pair(), net_rows(), replace(NET, seed=1))
    assert not same(whole, other), "the comparison cannot fail"


def test_kill_and_resume_equals_the_uninterrupted_run(tmp_path):
    with warnings.catch_warnings():  # from Python 3.12 on: other threads of this process are not forked
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()  # a process of its own to be killed; imports would be most of the work of a new interpreter
    if not child:
        killed_at(8, tmp_path)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    state = load_state(tmp_path / "state.pt")
    assert state.step == 5
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6, 8]
    rest, _ = fit(net_pair(), net_rows(), NET, state, folder=tmp_path)
    whole, _ = fit(net_pair(), net_rows(), NET)
    assert same(whole, rest) and same(whole, load_state(tmp_path / "state.pt"))
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6, 8, 10]


def killed_at(last, folder):
    """Trains the pair of these tests and kills its process when it is asked for the minibatch of step ``last``; never returns."""

    def kill(step):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        fit(net_pair(), net_rows(hook=kill), NET, folder=folder)
    finally:
        os._exit(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tmp_path, number):
    before = signal.getsignal(number)
    rows = net_rows(hook=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    state, info = fit(net_pair(), rows, NET, folder=tmp_path)
    assert info.stop_reason == "interrupted" and state.step == 4 and len(info.losses) == 4
    assert signal.getsignal(number) is before
    rest, _ = fit(net_pair(), net_rows(), NET, load_state(tmp_path / "state.pt"))
    assert same(rest, fit(net_pair(), net_rows(), NET)[0])


def test_second_signal_gives_up_at_once():
    rows = net_rows(hook=lambda step: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        fit(net_pair(), rows, NET)


def test_a_signal_ends_what_a_fit_is_a_part_of():
    """Once it ended an inner fit only, and a method went on with networks that were half trained."""
    rows = net_rows(hook=lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        fit_part(net_pair(), rows, NET)
    state = fit_part(net_pair(), net_rows(), NET, until=4)
    assert state.step == 4  # stopping where it should is no interruption
    assert same(fit_part(net_pair(), net_rows(), NET, state), fit(net_pair(), net_rows(), NET)[0])


@pytest.mark.parametrize(("method", "options"), [("spagene", {"preset": "network"}), ("spaim", {"overrides": ["features=network"]})])
def test_a_signal_during_the_trainings_within_a_method_ends_the_fit(method, options, monkeypatch):
    world, steps = small_world(), []

    def signalled(*arguments, **options):
        steps.append(0)
        if len(steps) == 1:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(*arguments, **options)

    monkeypatch.setattr("ppl_st.inference.svi.learning_rate", signalled)
    with pytest.raises(KeyboardInterrupt):
        ppl_st.fit(method, target=world.target, reference=world.reference, **options)
    assert len(steps) == 1


def test_fit_outside_the_main_thread_installs_nothing():
    result = []
    worker = threading.Thread(target=lambda: result.append(fit(net_pair(), net_rows(), NET)))
    worker.start()
    worker.join()
    assert same(result[0][0], fit(net_pair(), net_rows(), NET)[0])

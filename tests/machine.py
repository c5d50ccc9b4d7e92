"""How slow this machine is just now. Bounds in seconds are of an idle machine of 2025; one that is slower or busy gets in proportion."""

import time

import pytest

NORMAL = 0.08  # processor seconds that the work below takes on such a machine
TOO_SLOW = 3.0


def slowness():
    """At least 1: how many times longer than normal a piece of plain Python takes, the larger of two tries."""
    return max(1.0, *(_work() / NORMAL for _ in range(2)))


def _work():
    start = time.process_time()
    pairs = [(i, str(i)) for i in range(300_000)]
    assert len(pairs) == 300_000
    return time.process_time() - start


# A statistical test of minutes where a machine is slow: there it waits for one that is not, and is reported as skipped.
dear = pytest.mark.skipif((now := slowness()) > TOO_SLOW, reason=f"a dear test, and this machine is {now:.0f} times slower than normal")

"""How many threads torch uses inside one operation, and results that are made beside the next one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from ppl_st.sampling import WORKERS

__all__ = ["one_ahead", "torch_threads"]

Key = TypeVar("Key")
Result = TypeVar("Result")


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use ``number`` threads inside an operation (0: leave it as it is), and put it back afterwards."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_ahead(jobs: Iterable[tuple[Key, Callable[[], Result]]]) -> Iterator[tuple[Key, Result]]:
    """(key, result of its job) in order; where there are threads a job runs beside the making of the next one, so two of them are alive at most."""
    if WORKERS == 1:
        yield from ((key, job()) for key, job in jobs)
        return
    waiting: deque[tuple[Key, Future[Result]]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for key, job in jobs:
            waiting.append((key, pool.submit(job)))
            if len(waiting) > 1:
                first, result = waiting.popleft()
                yield first, result.result()
        for key, last in waiting:
            yield key, last.result()

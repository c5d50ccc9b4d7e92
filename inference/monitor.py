"""What a fit tells the outside (JSONL log, progress) and hears from it (signals).

Nothing here can change a result, and no failure to log can stop a fit.
"""

import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

__all__ = ["Progress", "json_log", "progress_report", "stop_signals"]

Progress = Literal["auto", "quiet"]
_logger = logging.getLogger("ppl_st")


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into a flag; a second one raises KeyboardInterrupt.

    Handlers can only be installed in the main thread; elsewhere the flag never rises. The previous handlers
    come back on exit.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            # None marks a handler that was not installed from Python and cannot be put back by it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def json_log(path: Path | None, first_step: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a log of one JSON object per line, each with a `step`, and yield the function that writes one.

    Lines past `first_step`, and a last line cut short by a crash, are dropped: a resumed fit writes them
    again. Non-finite numbers become null. The first OSError is reported to the logger and ends the logging,
    not the fit.
    """
    file: IO[bytes] | None = None
    try:
        if path is not None:
            keep = _length_until(path, first_step)
            file = path.open("ab")
            file.truncate(keep)
    except OSError as error:
        _logger.warning("%s: no log is written (%s)", path, error)
        file = None

    def write(entry: dict[str, Any]) -> None:
        nonlocal file
        if file is None:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        try:
            file.write(json.dumps(clean).encode() + b"\n")
            file.flush()
        except OSError as error:
            _logger.warning("%s: logging stops here (%s)", path, error)
            _close(file)
            file = None

    try:
        yield write
    finally:
        if file is not None:
            _close(file)


def _length_until(path: Path, last_step: int) -> int:
    """Bytes of an earlier log that hold whole lines up to and including `last_step`."""
    length = 0
    if last_step > 0 and path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            length += len(line)
    return length


def _close(file: IO[bytes]) -> None:
    """Close a log; what a full disk refused to take is lost, and that is all."""
    try:
        file.close()
    except OSError:
        pass


@contextmanager
def progress_report(
    mode: Progress, first_step: int, last_step: int
) -> Iterator[Callable[[int, float], None]]:
    """Yield `report(step, loss)`, to stderr: a bar on a terminal, elsewhere a line per tenth of the way."""
    if mode == "quiet" or last_step <= first_step:
        yield lambda step, loss: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("fit"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
        )
        with Bar(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("fit", total=last_step, completed=first_step, loss="")
            yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.5g}")
    else:
        start = time.perf_counter()

        def line(step: int, loss: float) -> None:
            done, total = step - first_step, last_step - first_step
            if done * 10 // total > (done - 1) * 10 // total:
                elapsed = time.perf_counter() - start
                percent = 100 * done // total
                sys.stderr.write(
                    f"fit {percent:3d} %  step {step}/{last_step}  loss {loss:.5g}  {elapsed:.0f} s\n"
                )

        yield line

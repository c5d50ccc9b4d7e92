"""What the commands of ``ppl-st`` share: mistakes become one message and an exit code, output paths are tried first, tables are printed.

Imported by ``ppl-st --help``: nothing heavy at the top.
"""

import errno
import os
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from typer.core import TyperGroup

from ppl_st.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Commands", "check_file", "check_folder", "command_line", "knobs_of", "print_evaluation", "print_table", "progress", "speaker"]

FAILED, INTERRUPTED = 2, 130
_SUFFIXES = {
    "predict": (".h5ad", ".zarr"), "areas": (".h5ad", ".zarr"), "cells": (".h5ad", ".zarr"), "maps": (".zarr",),
    "differential": (".csv",), "summary": (".png",), "compare": (".csv",), "export": (".nc", ".zarr"), "report": (".html",),
}  # fmt: skip


class Commands(TyperGroup):
    """The group of commands; turns what goes wrong outside the program into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with _sigterm_as_interrupt():
                return super().invoke(ctx)
        except UserError as error:
            raise _failed(str(error)) from None
        except KeyboardInterrupt:
            more = "; if there is a run folder already, --resume and --out alone continue it (of --seeds: the same command and --resume)"
            typer.echo(f"interrupted{more if ctx.invoked_subcommand == 'fit' else ''}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError:
            raise _failed(_OUT_OF_MEMORY) from None
        except BrokenPipeError:  # `ppl-st methods | head`
            raise
        except OSError as error:
            raise _failed(f"{error}; check the path, its permissions and the space left") from None
        except RuntimeError as error:
            _fail_of_runtime(error)
            raise


_OUT_OF_MEMORY = (
    "out of memory: lower --memory-gb or --draws, take fewer cells or genes, or fit in smaller minibatches: --set batch_spots=16 (siid), "
    "batch_cells=64 (vista, spagene), batch_genes=100 (spaim with features=network), batch_patches=1 (xfuse)"
)


def _failed(message: str) -> typer.Exit:
    typer.echo(f"error: {message}", err=True)
    return typer.Exit(FAILED)


def _fail_of_runtime(error: RuntimeError) -> None:
    """Exit for the three runtime errors that are no bug; whatever else returns and keeps its traceback."""
    from ppl_st.api import Interrupted
    from ppl_st.inference.faults import FitError

    if isinstance(error, Interrupted):
        typer.echo(str(error), err=True)
        raise typer.Exit(INTERRUPTED) from None
    if isinstance(error, FitError):
        raise _failed(str(error)) from None
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        raise _failed(_OUT_OF_MEMORY) from None


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that temporary files go; a fit has its own handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def check_file(path: Path, command: str, inputs: list[Path | None]) -> None:
    """Refuse an output of the wrong kind, one that is also an input, and one that cannot be written."""
    suffixes = _SUFFIXES[command]
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--out {path}: name it *{' or *'.join(suffixes)}")
    if path.suffix.lower() != ".zarr" and path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file")
    if path.resolve() in [given.resolve() for given in inputs if given is not None]:
        raise UserError(f"--out {path}: is also an input, which is never changed; choose another name")
    check_folder(path.parent)


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written, by writing into the part of it that exists."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(
            f"--out {path}: cannot write in {existing} ({error.strerror}); choose another path"
        ) from error


def knobs_of(protocol: Callable[..., Any], name: str, items: list[str]) -> dict[str, Any]:
    """``key=value`` texts as arguments of a protocol, each of the type of its default."""
    from difflib import get_close_matches
    from inspect import signature

    defaults = {key: one.default for key, one in signature(protocol).parameters.items() if key != "seed"}
    knobs = {}
    for item in items:
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or key not in defaults:
            close = get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(f"--set {item!r}: no such knob of {name}{hint} Knobs: {', '.join(defaults)}")
        kind = type(defaults[key])
        try:
            knobs[key] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--set {item!r}: {key} must be {what}") from None
    return knobs


def speaker(quiet: bool) -> Callable[[str], None]:
    """Where progress goes, line by line: stderr or nowhere."""
    return (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))


def progress(quiet: bool) -> Literal["auto", "quiet"]:
    """The progress bar of a fit."""
    return "quiet" if quiet else "auto"


def command_line() -> str:
    """The command as it was typed, for the manifest."""
    return shlex.join(["ppl-st", *sys.argv[1:]])


def print_table(title: str, frame: "pd.DataFrame") -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(str(frame.index.name or ""))
    for column in frame.columns:
        table.add_column(str(column), justify="right")
    for name, row in frame.iterrows():
        table.add_row(str(name), *(_cell(value) for value in row))
    # A file or pipe has no width: wide enough for every table here.
    Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False).print(table)


def print_evaluation(summary: "pd.DataFrame", out: Path) -> None:
    """The tables of an evaluation, and where it lies."""
    from ppl_st.report import overview

    for title, table in overview(summary).items():
        print_table(title, table)
    typer.echo("mean / median over genes, [95 % bootstrap interval of the mean], #rank")
    typer.echo(f"{out / 'scores.csv'}, {out / 'summary.csv'}; next: ppl-st report {shlex.quote(str(out))} --out report.html")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3f}"
    return str(value)

"""The folder of an evaluation: what is in it, and how it is written and read.

    evaluation.json   what was judged and how: versions, seed, hashes of the inputs, folds or hidden spots; written first
    scores.csv        a row per method and gene (of images: and section), rewritten after every split
    log_prob.npz      log predictive probabilities of held-out counts, methods x cells x genes, of some of the cells
    summary.csv       a row per method and metric; a folder with this file is finished
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ppl_st.errors import UserError
from ppl_st.io import atomic
from ppl_st.run_folder import read_arrays, remove_empty, write_json

__all__ = ["begun", "is_of_sweep", "read_entries", "read_scores", "read_summary", "refuse_evaluated", "write_csv", "write_entries"]


@contextmanager
def begun(folder: Path | None, record: dict[str, Any]) -> Iterator[None]:
    """An evaluation in ``folder``, which gets ``evaluation.json`` first: what cannot be written is said before any fit.

    Where the block ends with an error and no scores, the record and the folders made for it go again; scores of finished splits stay.
    """
    if folder is None:
        yield
        return
    refuse_evaluated(folder)  # again: another process may have written there while the data were read
    made = [one for one in (folder, *folder.parents) if not one.exists()]  # innermost first
    write_json(folder / "evaluation.json", record)
    try:
        yield
    except BaseException:
        if not (folder / "scores.csv").exists():
            (folder / "evaluation.json").unlink(missing_ok=True)
            remove_empty(made)
        raise


def refuse_evaluated(folder: Path) -> None:
    """A folder with anything of an older evaluation is no place for a new one, which would be mixed with it."""
    old = [name for name in ("scores.csv", "summary.csv", "log_prob.npz") if (folder / name).exists()]
    if old:
        raise UserError(f"{folder}: already holds an evaluation ({', '.join(old)}); choose another --out, or remove the folder")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all."""
    with atomic(path) as temporary:
        table.to_csv(temporary, index=False)


def read_scores(folder: Path) -> pd.DataFrame:
    """``scores.csv``, a row per method and gene; gene and fold are text, also where they read "nan".

    That of a sweep is refused.
    """
    if is_of_sweep(folder / "scores.csv"):
        raise UserError(f"{folder}: is a sweep; give one or several of its evaluations, {folder}/<variant>/seed<k>")
    return _whole(folder / "scores.csv", ("method", "kind", "fold", "gene"), converters={"gene": str, "fold": str})


def read_summary(folder: Path) -> pd.DataFrame:
    """``summary.csv``, a row per method and metric."""
    return _whole(folder / "summary.csv", ("method", "kind", "metric", "mean", "rank"))


def is_of_sweep(table: Path) -> bool:
    """Whether a ``scores.csv`` or ``summary.csv`` is that of a sweep: it has variants."""
    with open(table, encoding="utf-8") as lines:
        return "variant" in lines.readline().strip().split(",")


def _whole(path: Path, columns: Sequence[str], **options: Any) -> pd.DataFrame:
    """A table of ours; one that lacks columns or rows, or ends in the middle of a row, is refused."""
    try:
        table = pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the folder is damaged, evaluate again") from error
    absent = [name for name in columns if name not in table]
    if absent or table.empty or not path.read_bytes().endswith(b"\n"):
        what = f"has no column {', '.join(absent)}" if absent else "has no row" if table.empty else "ends in the middle of a row"
        raise UserError(f"{path}: {what}; the folder is damaged, evaluate again")
    return table


def write_entries(folder: Path, methods: list[str], entries: list[pd.DataFrame]) -> None:
    """Store log predictive probabilities [cells, genes] of every method, given split after split, methods in turn, as ``log_prob.npz``."""
    tables = [pd.concat(entries[k :: len(methods)], axis=1) for k in range(len(methods))]
    with atomic(folder / "log_prob.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, methods=np.array(methods), cells=tables[0].index.to_numpy(dtype=str), genes=tables[0].columns.to_numpy(dtype=str),
            log_prob=np.stack([table.to_numpy(dtype=np.float32) for table in tables]),
        )  # fmt: skip


def read_entries(folder: Path) -> dict[str, pd.DataFrame]:
    """Method -> log predictive probabilities [cells, genes]; nothing if the evaluation kept none."""
    if not (folder / "log_prob.npz").is_file():
        return {}
    stored = read_arrays(folder / "log_prob.npz", "the folder is damaged, evaluate again")
    tables = (pd.DataFrame(one, stored["cells"], stored["genes"]) for one in stored["log_prob"])
    return dict(zip(stored["methods"].tolist(), tables, strict=True))

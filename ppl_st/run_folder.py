"""The folder of a run: what is in it, and how it is written and read.

    config.toml         the effective settings
    manifest.json       versions, seed, hashes, device, command
    genes.txt           genes that can be predicted, in order; "gene<TAB>measured" (1: measured in the target)
    target.h5ad         the counts that the fit saw (training genes only), coordinates, obs
    reference.h5ad      the same of the reference
    profiles.h5ad       the cells behind SIID's given profiles, where there are any
    inner.npz           scores of genes of the target that were hidden in turn, after `ppl_st.recalibrate`
    recalibration.json  what they say about the forecasts of new genes
    fit.json            specification and record of the fit (status, seconds, losses live in log.jsonl)
    state.pt, log.jsonl resume point and log of the training loop
    weights.safetensors parameters and buffers of the fitted pair: a folder with this file is a finished run

Loading needs no other file and never unpickles. Every file is written whole or not at all. A folder of several seeds holds a folder per seed
and ``manifest.json``.
"""

import json
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ppl_st import config as configs
from ppl_st.conformal import Inner, Recalibration
from ppl_st.data import Counts
from ppl_st.errors import UserError
from ppl_st.inference.svi import Pair
from ppl_st.io import atomic, storable, write_adata
from ppl_st.pairs import read_like

INPUTS = ("target.h5ad", "reference.h5ad", "profiles.h5ad", "sections.npz", "genes.txt", "manifest.json", "config.toml")


def write_inputs(folder: Path, config: Any, manifest: dict[str, Any], target: Counts, reference: Counts) -> None:
    """Begin a run folder, or leave none behind: everything that a resumed fit needs except the state."""
    tables = {"target": target, "reference": reference}
    if getattr(config, "profiles", None) is not None:  # SIID's third file
        tables["profiles"] = read_like(config.profiles, role="profiles", layer=config.layer, gene_key=config.gene_key)
    with inputs_of(folder, tables):
        lines = [
            f"{gene}\t{int(known)}"
            for gene, known in zip(reference.genes, np.isin(reference.genes, target.genes), strict=True)
        ]
        write_text(folder / "genes.txt", "\n".join(["# gene\tmeasured in the target", *lines]) + "\n")
        write_json(folder / "manifest.json", manifest)
        configs.write(config, folder / "config.toml")  # last: a folder that has it can be resumed


@contextmanager
def inputs_of(folder: Path, tables: Mapping[str, Counts]) -> Iterator[None]:
    """A new run folder with a file per role, all of which are checked before anything is written; the block writes the rest of `INPUTS`.

    After an error the files, and the folders made for them, go again: they would be in the way of the next try.
    """
    for role, counts in tables.items():
        storable(counts.obs, role)
    made = [one for one in (folder, *folder.parents) if not one.exists()]  # innermost first
    new = [folder / name for name in INPUTS if not (folder / name).exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for role, counts in tables.items():
            write_counts(counts, folder / f"{role}.h5ad")
        yield
    except BaseException:
        for file in new:
            file.unlink(missing_ok=True)
        remove_empty(made)
        raise


@contextmanager
def fresh(folder: Path | None) -> Iterator[None]:
    """A fit that begins in ``folder``, where nothing was: its inputs go again where its start refuses the data, so that the next try is not refused.

    From ``fit.json`` on the fit has begun; and what is interrupted before it can be resumed.
    """
    made = [] if folder is None else [one for one in (folder, *folder.parents) if not one.exists()]  # innermost first
    try:
        yield
    except ValueError:  # UserError is one
        if folder is not None and not (folder / "fit.json").exists():
            for name in INPUTS:
                (folder / name).unlink(missing_ok=True)
            remove_empty(made)
        raise


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, innermost first, up to the first that holds something."""
    for one in folders:
        if not one.is_dir():
            continue
        if any(one.iterdir()):
            break
        one.rmdir()


def write_counts(counts: Counts, path: Path) -> None:
    """Store counts so that `read_counts` gives them back."""
    adata = ad.AnnData(counts.matrix, obs=storable(counts.obs), var=pd.DataFrame(index=counts.genes))
    adata.obs_names = counts.names
    if counts.xy is not None:
        adata.obsm["spatial"] = counts.xy
    adata.uns["source"] = counts.source
    write_adata(adata, path)


def write_result(folder: Path, pair: Pair, record: dict[str, Any]) -> None:
    """Finish a run folder: weights last, so that their presence means a finished run."""
    from safetensors.torch import save_file

    write_json(folder / "fit.json", record)
    tensors: dict[str, Any] = {}
    for side, module in zip(("model", "guide"), pair, strict=True):
        tensors |= {
            f"{side}.{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()
        }
    with atomic(folder / "weights.safetensors") as temporary:
        save_file(tensors, str(temporary))


def load_weights(folder: Path, pair: Pair) -> None:
    """Read the weights of a finished run into ``pair``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(folder / "weights.safetensors"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'weights.safetensors'}: cannot be read ({error}); the file is damaged, repeat the fit") from error
    try:
        for side, module in zip(("model", "guide"), pair, strict=True):
            module.load_state_dict({name[len(side) + 1 :]: tensor for name, tensor in tensors.items() if name.startswith(f"{side}.")})
    except RuntimeError as error:
        raise UserError(
            f"{folder / 'weights.safetensors'}: the weights do not fit what settings and data of the run give here, another version or another "
            f"machine's arithmetic wrote them; repeat the fit ({str(error).splitlines()[-1].strip()})"
        ) from error


def write_inner(folder: Path, inner: Inner) -> None:
    """Store the scores of inner held-out genes."""
    with atomic(folder / "inner.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **inner._asdict())


def read_inner(folder: Path) -> tuple[Inner | None, Recalibration | None]:
    """Scores of inner held-out genes and the correction, if the run has them."""
    if not (folder / "recalibration.json").is_file():
        return None, None
    remedy = f"repeat `ppl-st recalibrate {shlex.quote(str(folder))}`"
    made, stored = read_json(folder / "recalibration.json", remedy), read_arrays(folder / "inner.npz", remedy)
    try:
        return Inner(*(stored[name] for name in Inner._fields)), Recalibration(**made)
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder}: recalibration.json and inner.npz are not of this ppl_st ({error}); {remedy}") from error


def drop_correction(folder: Path) -> bool:
    """Remove what `ppl_st.recalibrate` left, and say whether there was anything."""
    found = (folder / "recalibration.json").is_file()
    for name in ("recalibration.json", "inner.npz"):
        (folder / name).unlink(missing_ok=True)
    return found


def read_json(path: Path, remedy: str = "the folder is damaged, make it again") -> dict[str, Any]:
    """The object in a JSON file of a folder of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no object ({str(content)[:60]}); {remedy}")
    return content


def read_arrays(path: Path, remedy: str = "the folder is damaged, make it again") -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file of a folder of ours."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all."""
    with atomic(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")

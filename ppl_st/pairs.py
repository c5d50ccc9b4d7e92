"""Files that are read by one ``layer`` and one ``gene_key`` although they need not look alike: target and reference, and what judges a run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from anndata import AnnData

from ppl_st.data import CLUSTER, SHARED_TOTAL, Counts, in_raw, read_counts
from ppl_st.errors import UserError
from ppl_st.io import read_adata

__all__ = ["as_given", "read_like", "read_pair"]

Source: TypeAlias = str | Path | AnnData


def read_pair(
    target: Source,
    reference: Source,
    *,
    layer: str | None = None,
    gene_key: str | None = None,
    need_spatial: tuple[bool, bool] = (True, True),
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Counts, Counts]:
    """Target and reference; ``need_spatial``: whether coordinates of the one, of the other may not be absent; those of the target must be sound.
    ``say`` gets what `read_counts` says.

    ``gene_key`` names the genes of each that has such a column in ``var``; the other keeps its ``var_names``.

    Raises
    ------
    UserError
        As `read_counts` does, and where neither has the column.
    """
    found, named = [], gene_key is None
    for source, role, needed in zip((target, reference), ("target", "reference"), need_spatial, strict=True):
        adata = read_adata(source, role=role)
        own = _own_key(adata, layer, gene_key)
        named |= own is not None
        needed |= role == "target" and "spatial" in adata.obsm
        found.append(read_counts(adata, role=role, layer=layer, gene_key=own, need_spatial=needed, file=_file(source), say=say))
    if not named:
        raise UserError(
            f"gene_key {gene_key!r}: neither target ({found[0].source}) nor reference ({found[1].source}) has such a column in var; name a column "
            "that at least one of them has, or leave gene_key out"
        )
    return found[0], found[1]


def as_given(counts: Counts) -> Counts:
    """A user's counts: genes sorted by name; obs without the columns that a run writes for itself, which another run may have left in the file."""
    return replace(counts.in_name_order(), obs=counts.obs.drop(columns=[SHARED_TOTAL, CLUSTER], errors="ignore"))


def read_like(source: Source, *, role: str, layer: str | None, gene_key: str | None) -> Counts:
    """Counts beside those of a fit with these settings, which apply where the file has such a layer or column; coordinates may be absent, those of a
    target must be sound."""
    adata = read_adata(source, role=role)
    own = layer if layer == "X" or layer in adata.layers or in_raw(adata, layer) else None
    needed = role == "target" and "spatial" in adata.obsm
    return read_counts(adata, role=role, layer=own, gene_key=_own_key(adata, own, gene_key), need_spatial=needed, file=_file(source))


def _own_key(adata: AnnData, layer: str | None, gene_key: str | None) -> str | None:
    """The column if the table with the counts has it."""
    return gene_key if gene_key in (adata.raw if in_raw(adata, layer) else adata).var else None


def _file(source: Source) -> str | None:
    return None if isinstance(source, AnnData) else str(source)

"""Checked counts: AnnData -> `Counts`, gene matching, gene folds, blocks.

Shapes: `matrix` [n, G] canonical CSR (sorted indices, no duplicates, no explicit zeros) float32 with integer
values in [0, 2^24] (beyond that float32 skips integers); `xy` [n, 2] float64 in the unit of the file. Rows
are cells or spots.

Not done here: normalisation, gene or cell selection by quality, anything dense of size [n, G], any change to
the caller's AnnData.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from ppl_st.errors import UserError
from ppl_st.io import read_adata

MAX_COUNT = 2**24
CLUSTER = "spaim_cluster"  # obs column of the stored reference of SpaIM: the cluster of each cell
SHARED_TOTAL = "vista_shared_total"  # obs column of a run that uses some of the genes that it shares with its reference: total over all of them
# Values looked at together when a matrix is checked or made sparse: bounds the temporaries.
_BLOCK_VALUES = 2**24


@dataclass(frozen=True)
class Counts:
    """Counts that passed every check of `read_counts`.

    `matrix` may share memory with the AnnData that it came from: never write into it.

    Attributes
    ----------
    matrix : CSR float32 [n, G], canonical.
    genes : [G] unique gene names.
    names : [n] unique cell or spot names.
    xy : [n, 2] float64 coordinates, or None.
    obs : [n] table of the AnnData.
    source : the file, or "AnnData".
    key : where the counts lay: "X" or "layers['...']".
    """

    matrix: sparse.csr_matrix
    genes: NDArray[np.str_]
    names: NDArray[np.str_]
    xy: NDArray[np.float64] | None
    obs: pd.DataFrame
    source: str
    key: str

    @property
    def totals(self) -> NDArray[np.float64]:
        """[n] sum of counts of each row."""
        return np.asarray(self.matrix.sum(axis=1, dtype=np.float64)).ravel()

    @property
    def empty_rows(self) -> NDArray[np.bool_]:
        """[n] rows without a single count."""
        return np.diff(self.matrix.indptr) == 0

    def take_genes(self, genes: Sequence[str] | NDArray[np.str_]) -> "Counts":
        """The same rows with `genes`, in the order asked for; unknown or repeated genes are a `UserError`."""
        wanted = np.asarray(genes, dtype=str)
        _refuse_duplicates(wanted, f"{self.source}: the genes asked for", "name each gene once")
        index = pd.Index(self.genes).get_indexer(pd.Index(wanted))
        missing = wanted[index < 0]
        if missing.size:
            shown = f"{missing.size} of {wanted.size} genes are not in it: {_some(missing)}"
            raise UserError(f"{self.source}: {shown}; check the spelling, or drop them from the list")
        matrix = self.matrix[:, index]
        matrix.sort_indices()
        return replace(self, matrix=matrix, genes=self.genes[index])

    def in_name_order(self) -> "Counts":
        """The same rows with the genes sorted by name, so that nothing downstream depends on the order in a file."""
        ordered = np.sort(self.genes)
        return self if np.array_equal(ordered, self.genes) else self.take_genes(ordered)

    def take_rows(self, index: NDArray[Any] | Sequence[int]) -> "Counts":
        """The rows `index` (positions, or a mask [n]), in that order."""
        rows = np.arange(len(self.names))[np.asarray(index)]
        xy = None if self.xy is None else self.xy[rows]
        return replace(self, matrix=self.matrix[rows], names=self.names[rows], xy=xy, obs=self.obs.iloc[rows])


def read_counts(
    source: str | Path | anndata.AnnData,
    *,
    role: str,
    layer: str | None = None,
    need_spatial: bool = True,
    gene_key: str | None = None,
    drop_empty: bool = False,
    file: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Read raw counts and check every stored value, every name and every coordinate.

    The source is never modified. Counts come from `layer` if given, else from `layers["counts"]`, else from `X`.
    "X" means X; "raw", where no layer has that name, `adata.raw` with the genes that it has.

    Parameters
    ----------
    source : `.h5ad` file, `.zarr` folder or AnnData.
    role : "target", "reference", ...; named in errors.
    need_spatial : whether a missing or malformed `obsm["spatial"]` is an error; otherwise it gives `xy=None`.
    gene_key : column of `var` that holds the gene names, instead of `var_names`.
    drop_empty : drop rows without a single count. By default they stay: every row of the target gets its
        prediction.
    file : where an AnnData was read from, named in errors.
    say : gets a line where a third coordinate, the same (or none) for all cells, is left out.

    Raises
    ------
    UserError
        With file, key, offending values and remedy.
    """
    adata = read_adata(source, role=role)
    file = file or ("AnnData" if isinstance(source, anndata.AnnData) else str(source))
    where = f"{role} ({file})"
    if 0 in adata.shape:
        raise UserError(f"{where}: {adata.n_obs} cells x {adata.n_vars} genes: there is nothing to fit; check the filter that made it")
    raw, key = _find_counts(adata, layer, where)
    genes = _gene_names(adata.raw if in_raw(adata, layer) else adata, gene_key, where)
    names = np.asarray(adata.obs_names, dtype=str)
    remedy = "obs_names_make_unique() renames them; concatenated sections need their own prefix"
    _refuse_duplicates(names, f"{where}: cell names (obs_names)", remedy)
    matrix = _to_csr(raw, f"{where}, {key}")
    _check_values(matrix, genes, names, f"{where}, {key}", _remedy(adata, key))
    matrix = matrix.astype(np.float32, copy=False)
    if matrix.nnz == 0:
        raise UserError(f"{where}, {key}: all {len(names)} x {len(genes)} values are zero; check the layer and the filter that made it")
    xy = _coordinates(adata, names, where, need_spatial, say)
    counts = Counts(matrix, genes, names, xy, adata.obs.copy(), file, key)
    return counts.take_rows(~counts.empty_rows) if drop_empty and counts.empty_rows.any() else counts


def in_raw(adata: anndata.AnnData, layer: str | None) -> bool:
    """Whether `layer` means the table `adata.raw`, which has genes of its own."""
    return layer == "raw" and "raw" not in adata.layers and adata.raw is not None


def _find_counts(adata: anndata.AnnData, layer: str | None, where: str) -> tuple[Any, str]:
    if in_raw(adata, layer):
        return adata.raw.X, "raw"
    layers = [*adata.layers.keys(), *(["raw"] if adata.raw is not None else [])]
    if layer is not None and layer != "X":
        if layer not in layers:
            raise UserError(f"{where}: no layer {layer!r}; it has {_some(layers) or 'no layers'}; give one of these, or X")
        return adata.layers[layer], f"layers[{layer!r}]"
    if layer is None and "counts" in layers:
        return adata.layers["counts"], "layers['counts']"
    if adata.X is None:
        raise UserError(
            f"{where}: it has neither X nor layers['counts'] (layers: {_some(layers) or 'none'}); name the "
            "layer with raw counts, --set layer=..."
        )
    return adata.X, "X"


def _gene_names(adata: Any, gene_key: str | None, where: str) -> NDArray[np.str_]:
    if gene_key is None:
        genes, label = adata.var_names.to_series(), "gene names (var_names)"
    elif gene_key not in adata.var.columns:
        raise UserError(
            f"{where}: no column {gene_key!r} in var; it has "
            f"{_some(list(adata.var.columns)) or 'no columns'}; name one of these with gene_key"
        )
    else:
        genes, label = adata.var[gene_key], f"gene names (var[{gene_key!r}])"
    nameless = np.asarray(genes.isna()) | (np.asarray(genes.astype(str)) == "")
    if nameless.any():
        rows = adata.var_names[nameless]
        raise UserError(
            f"{where}: {label}: {nameless.sum()} of {len(genes)} are empty (var_names {_some(rows)}); fill or drop these genes"
        )
    names = np.asarray(genes.astype(str), dtype=str)
    remedy = "sum or drop the repeated genes" + (", or rename them with var_names_make_unique()" if gene_key is None else ", or rename them")
    _refuse_duplicates(names, f"{where}: {label}", remedy)
    return names


def _to_csr(raw: Any, where: str) -> sparse.csr_matrix:
    """Canonical CSR [n, G]; the arrays of `raw` are shared where it is already so, never changed."""
    if hasattr(raw, "to_memory"):  # sparse on disk (backed AnnData)
        raw = raw.to_memory()
    if not hasattr(raw, "dtype") or not hasattr(raw, "shape"):
        raise UserError(f"{where}: a {type(raw).__name__} is no matrix of counts; store a numpy array or a scipy sparse matrix")
    if raw.dtype.kind not in "biuf":
        raise UserError(f"{where}: values of type {raw.dtype} are no counts; store integers or floats")
    # scipy computes with neither half precision nor truth values
    safe = np.float32 if raw.dtype == bool or raw.dtype == np.float16 else raw.dtype
    if sparse.issparse(raw):
        shared = sparse.csr_matrix(cast(Any, raw), dtype=safe)
    else:
        size = max(1, _BLOCK_VALUES // max(1, raw.shape[1]))
        blocks = [sparse.csr_matrix(np.asarray(raw[rows], dtype=safe)) for rows in row_blocks(raw.shape[0], size)]
        shared = blocks[0] if len(blocks) == 1 else sparse.csr_matrix(sparse.vstack(blocks, format="csr"))
    if not shared.has_canonical_format or len(shared.data) != shared.nnz or (shared.data == 0).any():
        shared = shared.astype(np.float64)  # a copy, as the arrays may be the caller's; small integers could not hold the sums
        shared.sum_duplicates()
        shared.eliminate_zeros()
    return shared


def _check_values(
    matrix: sparse.csr_matrix, genes: NDArray[np.str_], names: NDArray[np.str_], where: str, remedy: str
) -> None:
    """Refuse stored values that are no integers in [0, 2^24], with their share and up to three examples."""
    found: dict[str, tuple[int, list[int]]] = {}
    for block in row_blocks(matrix.nnz, _BLOCK_VALUES):
        data = matrix.data[block]
        finite = np.isfinite(data)
        with np.errstate(invalid="ignore"):
            bad = {
                "NaN or infinite": ~finite,
                "negative": finite & (data < 0),
                "not an integer": finite & (data >= 0) & (data != np.rint(data)),
                f"over 2^24 = {MAX_COUNT}": finite & (data > MAX_COUNT),
            }
        for kind, mask in bad.items():
            if mask.any():
                number, examples = found.get(kind, (0, []))
                examples = examples + [int(i) + block.start for i in np.flatnonzero(mask)[: 3 - len(examples)]]
                found[kind] = (number + int(mask.sum()), examples)
    if not found:
        return
    parts = []
    for kind, (number, examples) in found.items():
        rows = np.searchsorted(matrix.indptr, examples, side="right") - 1
        shown = ", ".join(
            f"{matrix.data[i]:.6g} in cell {str(names[row])!r} gene {str(genes[matrix.indices[i]])!r}"
            for i, row in zip(examples, rows, strict=True)
        )
        parts.append(f"{number} of {matrix.nnz} stored values ({number / matrix.nnz:.2%}) are {kind}, for example {shown}")
    if "not an integer" in found or "negative" in found:
        parts.append(_looks_like(matrix))
    elif "NaN or infinite" in found:
        remedy = f"replace or drop them; {remedy}"
    else:
        remedy = f"such values are no molecule counts; {remedy}"
    raise UserError(f"{where}: " + "; ".join(filter(None, parts)) + f"; {remedy}")


def _looks_like(matrix: sparse.csr_matrix) -> str:
    """What was probably done to the counts, judged by their range and row sums."""
    data = matrix.data[np.isfinite(matrix.data)]
    if data.size and data.min() < 0:
        return "this looks scaled (centred)"
    if data.size and data.max() < 20:
        return "this looks log-normalised"
    totals = np.asarray(matrix.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if totals.size > 1 and np.ptp(totals) < 1e-2 * totals.mean():
        return f"this looks normalised to a total of {totals.mean():.6g} per cell"
    return "this looks normalised or corrected"


def _remedy(adata: anndata.AnnData, key: str) -> str:
    others = [f"layers[{name!r}]" for name in adata.layers if f"layers[{name!r}]" != key]
    if adata.raw is not None and key != "raw":
        others.append("raw")
    have = f" (this file also has {_some(others)})" if others else ""
    return f"pass the raw counts as layers['counts'], or name their layer with --set layer=... of fit and evaluate{have}"


def _coordinates(
    adata: anndata.AnnData, names: NDArray[np.str_], where: str, needed: bool, say: Callable[[str], None]
) -> NDArray[np.float64] | None:
    """obsm["spatial"] as [n, 2] float64; without need, what is absent or malformed is None."""
    if "spatial" not in adata.obsm:
        if not needed:
            return None
        keys = _some(list(adata.obsm.keys())) or "nothing"
        raise UserError(
            f"{where}: no obsm['spatial'] (obsm has {keys}); store x and y there, for example "
            "adata.obsm['spatial'] = adata.obs[['x', 'y']].to_numpy()"
        )
    problem = ""
    raw = np.asarray(adata.obsm["spatial"])
    try:
        xy = raw.astype(np.float64)
    except (TypeError, ValueError):
        xy = np.empty((0, 0))
        problem = f"obsm['spatial'] has values of type {raw.dtype}, not numbers; store x and y as numbers"
    if xy.ndim == 2 and xy.shape[1] == 3 and len(np.unique(xy[~np.isnan(xy[:, 2]), 2])) < 2:
        say(f"{where}: obsm['spatial'] has a third column that is the same for all cells; its first two, x and y, are used")
        xy = xy[:, :2]
    if not problem and (xy.ndim != 2 or xy.shape[1] != 2):
        problem = f"obsm['spatial'] has shape {xy.shape}, not ({len(names)}, 2); keep the two columns x and y"
    elif not problem and not np.isfinite(xy).all():
        bad = names[~np.isfinite(xy).all(axis=1)]
        share = f"{bad.size} of {len(names)} cells ({_some(bad)})"
        problem = f"obsm['spatial'] is NaN or infinite for {share}; drop them or fill the coordinates in"
    if not problem:
        return xy
    if needed:
        raise UserError(f"{where}: {problem}")
    return None


def shared_genes(
    target: Counts | Sequence[str] | NDArray[np.str_],
    reference: Counts | Sequence[str] | NDArray[np.str_],
    minimum: int,
) -> NDArray[np.str_]:
    """Genes that both sides have, matched exactly, in the target's order.

    Raises
    ------
    UserError
        With fewer than `minimum`: says how many would match without regard to case, and without Ensembl
        versions (`.12`).
    """
    left = target.genes if isinstance(target, Counts) else np.asarray(target, dtype=str)
    right = reference.genes if isinstance(reference, Counts) else np.asarray(reference, dtype=str)
    shared = left[np.isin(left, right)]
    if shared.size >= minimum:
        return shared
    folded = len({g.casefold() for g in left} & {g.casefold() for g in right})
    stripped = len({_without_version(g) for g in left} & {_without_version(g) for g in right})
    hints = []
    if folded > shared.size:
        hints.append("write both in one case (mouse Abc1, human ABC1: are both the same species?)")
    if stripped > shared.size:
        hints.append("strip the Ensembl versions")
    if _mostly_ensembl(left) != _mostly_ensembl(right):
        hints.append("one side has Ensembl ids: name its var column of gene symbols with gene_key")
    remedy = "; ".join(hints) or "check that both name genes in the same way; another var column can be named with gene_key"
    raise UserError(
        f"target and reference share {shared.size} genes, at least {minimum} are needed; "
        f"{folded} would match without regard to case, {stripped} without Ensembl versions; "
        f"target has {left.size} ({_some(left)}), reference has {right.size} ({_some(right)}); {remedy}"
    )


def _mostly_ensembl(genes: NDArray[np.str_]) -> bool:
    return 2 * int(np.char.startswith(genes, "ENS").sum()) > genes.size


def _without_version(gene: str) -> str:
    stem, dot, version = gene.rpartition(".")
    return stem if dot and version.isdigit() and gene.startswith("ENS") else gene


def matched(truth: Counts, cells: Counts, genes: NDArray[np.str_]) -> sparse.csr_matrix:
    """The truth's counts of ``genes`` in the order of ``cells``, by name."""
    counts = truth.take_genes(genes)
    order = pd.Index(counts.names).get_indexer(pd.Index(cells.names))
    if (order < 0).any():
        missing = cells.names[order < 0]
        lost = f"{len(missing)} of the {len(order)} cells, e.g. {missing[0]}"
        raise UserError(f"truth ({counts.source}) lacks {lost}; give counts of the run's own cells, under their names")
    return sparse.csr_matrix(counts.matrix[order])


def shared_total(counts: Counts, genes: NDArray[np.str_]) -> NDArray[np.float64]:
    """Total [n] of each cell over those of ``genes`` that it measured, also where a run uses some of them only (`SHARED_TOTAL`)."""
    own = counts.take_genes(counts.genes[np.isin(counts.genes, genes)]).totals
    return np.asarray(counts.obs.get(SHARED_TOTAL, own), dtype=np.float64)


def labels_of(counts: Counts, key: str, role: str, setting: str) -> NDArray[np.str_]:
    """Column `key` of `obs`, which `setting` names, as text [n]; a cell without a value is an error, as it belongs nowhere."""
    if key not in counts.obs:
        columns = _some(list(counts.obs.columns), 5) or "none"
        raise UserError(f"{role} ({counts.source}): no obs column {key!r} ({setting}); it has {columns}")
    missing = counts.obs[key].isna().to_numpy()
    if missing.any():
        raise UserError(
            f"{role} ({counts.source}): {missing.sum()} of {len(missing)} cells have no value in obs column {key!r} ({setting}), e.g. "
            f"{_some(counts.names[missing])}; fill it in, or drop them"
        )
    return np.asarray(as_text(counts.obs[key]), dtype=str)


def as_text(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """The known values as text; whole numbers without a point, also where a missing value beside them made the column one of floats."""
    known = column.dropna()
    if isinstance(known.dtype, pd.CategoricalDtype):
        known = known.astype(known.cat.categories.dtype)
    if pd.api.types.is_float_dtype(known):
        numbers = known.to_numpy(np.float64)
        if (np.abs(numbers) < 2**53).all() and (numbers == np.floor(numbers)).all():
            known = known.astype(np.int64)
    return known.astype(str)


def gene_folds(genes: Sequence[str] | NDArray[np.str_], k: int, seed: int) -> list[NDArray[np.str_]]:
    """Split genes into `k` folds, each gene in exactly one, whatever the order of `genes`.

    With the genes sorted and `order = default_rng(seed).permutation(n)`, fold i is `sorted(order[i::k])`.
    """
    ordered = np.sort(np.asarray(genes, dtype=str))
    _refuse_duplicates(ordered, "gene folds: genes", "name each gene once")
    if not 2 <= k <= ordered.size:
        raise UserError(f"gene folds: {k} folds of {ordered.size} genes; choose between 2 and {ordered.size} folds")
    order = np.random.default_rng(seed).permutation(ordered.size)
    return [ordered[np.sort(order[i::k])] for i in range(k)]


def read_genes(path: str | Path) -> NDArray[np.str_]:
    """Gene names of a text file, one per line, in its order; blank lines and `#` lines are ignored."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"gene list: no such file: {path}; give a text file with one gene per line (in Python a list of genes, too)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"gene list: cannot read {path}: {error}; give a plain text file with one gene per line") from error
    stripped = [line.strip() for line in lines]
    genes = np.asarray([line for line in stripped if line and not line.startswith("#")], dtype=str)
    if genes.size == 0:
        raise UserError(f"gene list: {path} names no gene; write one gene per line")
    _refuse_duplicates(genes, f"gene list: {path}", "name each gene once")
    return genes


def row_blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(n) in order."""
    assert size > 0
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _refuse_duplicates(values: NDArray[np.str_], what: str, remedy: str) -> None:
    names, number = np.unique(values, return_counts=True)
    repeated = names[number > 1]
    if repeated.size:
        raise UserError(f"{what}: {repeated.size} names occur more than once: {_some(repeated)}; {remedy}")


def _some(values: Any, number: int = 3) -> str:
    """The first few values, and how many more there are."""
    shown = ", ".join(str(v) for v in list(values)[:number])
    more = len(values) - number
    return f"{shown} and {more} more" if more > 0 else shown

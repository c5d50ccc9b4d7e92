"""Several layers of one reference at once: spliced and unspliced counts, say, imputed together, so that velocity tools can run on spatial cells.

A gene of a further layer is one more gene of the reference, named ``GENE:layer``; no target measures it, so it is predicted as an unmeasured gene,
from the same latent state and in the same draws as the others, with the platform's gain and slope of its gene (shares of layers need no gain).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from ppl_st.data import Counts, read_counts
from ppl_st.errors import UserError
from ppl_st.io import read_adata

__all__ = ["as_layers", "parents", "read_layers", "with_layers"]


def read_layers(source: str | Path | ad.AnnData, layers: Sequence[str], *, gene_key: str | None = None) -> list[Counts]:
    """The counts in each of these layers of a reference, whose genes ``gene_key`` names if it has that column of ``var``."""
    adata = read_adata(source, role="reference")
    own, file = gene_key if gene_key in adata.var else None, None if isinstance(source, ad.AnnData) else str(source)
    found = (read_counts(adata, role="reference", layer=name, need_spatial=False, gene_key=own, file=file) for name in layers)
    return [counts.in_name_order() for counts in found]


def with_layers(counts: Counts, source: str | Path | ad.AnnData, layers: Sequence[str], *, gene_key: str | None = None) -> Counts:
    """The reference's counts [m, G] with the genes of ``layers`` of its ``source`` beside them [m, G (1 + layers)].

    Raises
    ------
    UserError
        A layer that is named twice, is not there or holds no counts, or a gene whose name has a layer's ending already.
    """
    if twice := [name for k, name in enumerate(layers) if name in layers[:k]]:
        raise UserError(f"reference ({counts.source}): reference_layers names {twice[0]!r} twice; name each layer once")
    taken = [gene for gene in counts.genes if gene.rsplit(":", 1)[-1] in layers and ":" in gene]
    if taken:
        raise UserError(f"reference ({counts.source}): gene {taken[0]!r} looks like a gene of a layer (reference_layers); rename it")
    others = read_layers(source, layers, gene_key=gene_key)
    return replace(
        counts,
        matrix=sp.csr_matrix(sp.hstack([counts.matrix, *(other.matrix for other in others)], format="csr")),
        genes=np.concatenate([counts.genes, *([f"{gene}:{name}" for gene in other.genes] for name, other in zip(layers, others, strict=True))]),
    )


def parents(genes: NDArray[np.str_], layers: Sequence[str]) -> NDArray[np.int64]:
    """Position of the gene of every ``GENE:layer``, of every other gene its own, [G]."""
    names = pd.Index(genes)
    found = np.arange(len(genes))
    for layer in layers:
        at = np.flatnonzero(names.str.endswith(f":{layer}"))
        found[at] = names.get_indexer(names[at].str.removesuffix(f":{layer}"))
    return np.where(found < 0, np.arange(len(genes)), found).astype(np.int64)


def as_layers(imputed: ad.AnnData, layers: Sequence[str], *, of: str = "rate_mean") -> ad.AnnData:
    """Predicted genes ``GENE:layer`` as one table of genes with a layer for each: what velocity tools read.

    Parameters
    ----------
    imputed
        Prediction of a run that was fitted with ``reference_layers``.
    layers
        The same names.
    of
        Which of its layers to arrange: ``rate_mean``, ``rate_sd``, ``q05``, ...

    Returns
    -------
    AnnData
        Cells x the genes that are there in every layer; ``layers[name]`` float32, ``X`` their sum; obs and obsm as in ``imputed``.
    """
    names = [str(gene) for gene in imputed.var_names]
    found = [{gene.rsplit(":", 1)[0] for gene in names if gene.endswith(f":{layer}")} for layer in layers]
    genes = [gene for gene in dict.fromkeys(name.rsplit(":", 1)[0] for name in names) if all(gene in own for own in found)]
    if not genes:
        raise UserError(f"as_layers: no gene is predicted in every layer ({', '.join(layers)}); predict GENE:layer of a fit with reference_layers")
    parts = {layer: np.asarray(imputed[:, [f"{gene}:{layer}" for gene in genes]].layers[of], dtype=np.float32) for layer in layers}
    result = ad.AnnData(np.sum(list(parts.values()), axis=0), obs=imputed.obs.copy(), layers=parts)
    result.var_names = genes
    for key in imputed.obsm:
        result.obsm[key] = imputed.obsm[key]
    return result

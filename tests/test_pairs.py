"""Two files read by one gene_key: it counts where the column is, and it must be somewhere."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from ppl_st.errors import UserError
from ppl_st.pairs import read_pair


def table(genes, **var):
    made = ad.AnnData(np.ones((4, len(genes)), np.float32), var=pd.DataFrame(var, index=genes))
    made.obs_names = [f"c{i}" for i in range(4)]
    made.obsm["spatial"] = np.zeros((4, 2))
    return made


def test_a_column_names_the_genes_of_each_file_that_has_it(tmp_path):
    ids, symbols = table(["ENSG1", "ENSG2"], symbol=["Gad1", "Sst"]), table(["Gad1", "Sst"])
    for pair in ((ids, symbols), (symbols, ids), (ids, ids)):
        target, reference = read_pair(*pair, gene_key="symbol")
        assert target.genes.tolist() == reference.genes.tolist() == ["Gad1", "Sst"]
    assert read_pair(ids, symbols)[0].genes.tolist() == ["ENSG1", "ENSG2"]
    symbols.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(UserError, match=r"'symbol': neither target \(.*t\.h5ad\) nor reference \(AnnData\) has such a column"):
        read_pair(tmp_path / "t.h5ad", symbols, gene_key="symbol")


def test_errors_name_the_file(tmp_path):
    bad = table(["a", "b"])
    bad.X = bad.X + 0.5
    bad.write_h5ad(tmp_path / "t.h5ad")
    with pytest.raises(UserError, match=r"^target \(.*t\.h5ad\), X: 8 of 8 stored values"):
        read_pair(tmp_path / "t.h5ad", table(["a"]))

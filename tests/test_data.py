"""Counts are checked to the last value, never changed; gene matching, folds and thinning keep their "
"promises."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from ppl_st import data
from ppl_st.data import gene_folds, labels_of, read_counts, read_genes, row_blocks, shared_genes
from ppl_st.errors import UserError
from realdata import path


def make(matrix: object = None, **fields: object) -> anndata.AnnData:
    if matrix is None:
        matrix = np.random.default_rng(0).poisson(1.0, (20, 8)).astype(np.float32)
    n, genes = matrix.shape  # type: ignore[attr-defined]
    adata = anndata.AnnData(
        matrix,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
    )
    adata.obsm["spatial"] = np.arange(2 * n).reshape(n, 2)
    for name, value in fields.items():
        setattr(adata, name, value)
    return adata


FORMS = {
    "dense": np.asarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "int32": lambda x: sparse.csr_matrix(x.astype(np.int32)),
    "uint16 dense": lambda x: x.astype(np.uint16),
    "float64": lambda x: sparse.csr_matrix(x.astype(np.float64)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_storage_gives_the_same_canonical_csr(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_BLOCK_VALUES", 50)  # several blocks of rows and of values
    values = np.random.default_rng(0).poisson(1.0, (20, 8)).astype(np.float32)
    counts = read_counts(make(FORMS[form](values)), role="target")
    assert isinstance(counts.matrix, sparse.csr_matrix) and counts.matrix.dtype == np.float32
    assert np.array_equal(counts.matrix.toarray(), values)
    assert counts.matrix.has_canonical_format and (counts.matrix.data != 0).all()
    assert counts.xy is not None and counts.xy.dtype == np.float64
    assert list(counts.genes[:2]) == ["g0", "g1"] and counts.key == "X" and counts.source == "AnnData"


def test_untidy_csr_is_tidied_in_a_copy() -> None:
    # duplicates, unsorted indices and an explicit zero
    raw = sparse.csr_matrix(
        (np.array([1.0, 2.0, 0.0, 3.0]), np.array([2, 2, 0, 1]), np.array([0, 3, 4])), shape=(2, 3)
    )
    adata = make()[:2, :3].copy()
    adata.X = raw
    before = adata.X.data.copy(), adata.X.indices.copy()
    counts = read_counts(adata, role="target")
    assert np.array_equal(counts.matrix.toarray(), [[0, 0, 3], [0, 3, 0]]) and counts.matrix.nnz == 2
    assert np.array_equal(adata.X.data, before[0]) and np.array_equal(adata.X.indices, before[1])


def test_small_integers_stored_twice_add_up() -> None:
    adata = make()[:2, :3].copy()
    adata.X = sparse.csr_matrix((np.array([200, 100, 7], np.uint8), np.array([1, 1, 0]), np.array([0, 2, 3])), shape=(2, 3))
    assert np.array_equal(read_counts(adata, role="target").matrix.toarray(), [[0, 300, 0], [7, 0, 0]])


def test_layer_choice() -> None:
    adata = make()
    adata.layers["counts"] = np.full(adata.shape, 2.0)
    adata.layers["raw"] = np.full(adata.shape, 3.0)
    assert (
        read_counts(adata, role="t").matrix[0, 0] == 2
        and read_counts(adata, role="t").key == "layers['counts']"
    )
    assert read_counts(adata, role="t", layer="raw").matrix[0, 0] == 3
    assert read_counts(adata, role="t", layer="X").key == "X"
    with pytest.raises(UserError, match=r"target \(AnnData\): no layer 'spliced'; it has counts, raw"):
        read_counts(adata, role="target", layer="spliced")
    del adata.layers["counts"]
    adata.X = None
    with pytest.raises(UserError, match="neither X nor layers"):
        read_counts(adata, role="target")


def test_counts_of_raw_come_with_its_own_genes(tmp_path: Path) -> None:
    whole = make()
    whole.var["symbol"] = [f"S{i}" for i in range(8)]
    adata = whole[:, :5].copy()
    adata.X = np.log1p(adata.X)
    adata.raw = whole
    with pytest.raises(UserError, match=r"looks log-normalised; .*--set layer=.*has raw"):
        read_counts(adata, role="target")
    adata.write_h5ad(tmp_path / "t.h5ad")
    for source in (adata, tmp_path / "t.h5ad"):
        counts = read_counts(source, role="target", layer="raw", gene_key="symbol")
        assert counts.key == "raw" and counts.genes.tolist() == [f"S{i}" for i in range(8)] and counts.xy is not None
        assert np.array_equal(counts.matrix.toarray(), whole.X)
    with pytest.raises(UserError, match="no layer 'umi'; it has raw; give one of these"):
        read_counts(adata, role="target", layer="umi")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (-1.0, "negative"),
        (0.5, "not an integer"),
        (2.0**24 + 2, "over 2^24"),
    ],
)
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_one_bad_value_anywhere_is_found_and_named(
    value: float, words: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_BLOCK_VALUES", 50)
    values = np.ones((20, 8))
    values[17, 5] = value
    with pytest.raises(UserError) as caught:
        read_counts(make(FORMS[form](values)), role="target")
    message = str(caught.value)
    assert "target (AnnData), X: 1 of 160 stored values" in message and words in message
    assert "in cell 'c17' gene 'g5'" in message and "layers['counts']" in message


def test_half_precision_and_big_integers() -> None:
    assert read_counts(make(np.ones((3, 2), dtype=np.float16)), role="t").matrix.sum() == 6
    with pytest.raises(UserError, match="over 2"):  # float32 would round it silently
        read_counts(make(np.full((3, 2), 2**24 + 1, dtype=np.int64)), role="t")
    assert read_counts(make(np.full((3, 2), 2**24, dtype=np.int64)), role="t").matrix[0, 0] == 2**24


def test_normalised_data_are_recognised() -> None:
    counts = np.random.default_rng(0).poisson(3.0, (20, 8)) + 1.0
    scaled = counts / counts.sum(axis=1, keepdims=True) * 1e4
    adata = make(np.log1p(scaled))
    adata.layers["umi"] = counts
    with pytest.raises(
        UserError,
        match=r"\(100\.00%\) are not an integer, .*looks log-normalised; .*--set layer=.*has layers\['umi'\]",
    ):
        read_counts(adata, role="target")
    with pytest.raises(UserError, match="looks normalised to a total of 10000 per cell"):
        read_counts(make(scaled), role="target")
    with pytest.raises(UserError, match="looks scaled"):
        read_counts(make(counts - counts.mean()), role="target")


def test_names() -> None:
    repeated = make(var_names=["a", "b", "a", "c", "d", "e", "f", "b"])
    with pytest.raises(
        UserError,
        match=r"gene names \(var_names\): 2 names occur more than once: a, b; .*var_names_make_unique",
    ):
        read_counts(repeated, role="target")
    adata = make()
    adata.var["symbol"] = [f"S{i}" for i in range(8)]
    assert list(read_counts(adata, role="t", gene_key="symbol").genes[:2]) == ["S0", "S1"]
    adata.var["symbol"] = pd.Series(["x", None] * 4, index=adata.var_names)
    with pytest.raises(UserError, match=r"var\['symbol'\]\): 4 of 8 are empty"):
        read_counts(adata, role="t", gene_key="symbol")
    adata.var["symbol"] = ["S0"] * 8
    with pytest.raises(UserError, match=r"var\['symbol'\]\): 1 names occur more than once: S0; sum or drop the repeated genes, or rename them$"):
        read_counts(adata, role="t", gene_key="symbol")
    with pytest.raises(UserError, match="no column 'name' in var; it has symbol"):
        read_counts(adata, role="t", gene_key="name")
    cells = make(obs_names=["x"] * 20)
    with pytest.raises(UserError, match=r"cell names \(obs_names\): 1 names occur more than once: x"):
        read_counts(cells, role="target")


def test_coordinates() -> None:
    adata = make()
    del adata.obsm["spatial"]
    adata.obsm["X_pca"] = np.zeros((20, 5))
    with pytest.raises(UserError, match=r"no obsm\['spatial'\] \(obsm has X_pca\)"):
        read_counts(adata, role="target")
    assert read_counts(adata, role="reference", need_spatial=False).xy is None
    adata.obsm["spatial"] = np.arange(60).reshape(20, 3)
    with pytest.raises(UserError, match=r"shape \(20, 3\), not \(20, 2\)"):
        read_counts(adata, role="target")
    said: list[str] = []
    for third in (np.full(20, 7.0), np.full(20, np.nan)):
        adata.obsm["spatial"] = np.column_stack([np.arange(40).reshape(20, 2), third])
        assert np.array_equal(read_counts(adata, role="target", say=said.append).xy, np.arange(40).reshape(20, 2))
    assert len(said) == 2 and "target (AnnData): obsm['spatial'] has a third column that is the same for all cells" in said[1]
    xy = np.zeros((20, 2))
    xy[[3, 7]] = np.nan
    adata.obsm["spatial"] = xy
    with pytest.raises(UserError, match=r"NaN or infinite for 2 of 20 cells \(c3, c7\)"):
        read_counts(adata, role="target")
    adata.obsm["spatial"] = pd.DataFrame(np.ones((20, 2)), index=adata.obs_names, columns=["x", "y"])
    assert read_counts(adata, role="target").xy is not None


def test_a_label_that_is_missing_is_refused() -> None:
    adata = make()
    adata.obs["slide"] = ["a", "b"] * 10
    assert labels_of(read_counts(adata, role="target"), "slide", "target", "library_key").tolist() == ["a", "b"] * 10
    with pytest.raises(UserError, match=r"target \(AnnData\): no obs column 'lane' \(library_key\); it has slide"):
        labels_of(read_counts(adata, role="target"), "lane", "target", "library_key")
    for missing in (None, np.nan, pd.NA):
        adata.obs["slide"] = pd.Categorical(["a", missing] * 10)
        with pytest.raises(UserError, match=r"10 of 20 cells have no value in obs column 'slide' \(library_key\), e.g. c1, c3, c5 and 7 more"):
            labels_of(read_counts(adata, role="target"), "slide", "target", "library_key")


@pytest.mark.parametrize("kind", ["int64", "float64", "Int64", "Float32", "category"])
def test_whole_numbers_are_the_same_labels_in_any_column(kind: str) -> None:
    adata = make()
    adata.obs["slide"] = pd.Series([1.0, 20.0] * 10, adata.obs_names).astype(kind)
    assert labels_of(read_counts(adata, role="target"), "slide", "target", "library_key").tolist() == ["1", "20"] * 10
    adata.obs["slide"] = [1.0, 1.5] * 10
    assert labels_of(read_counts(adata, role="target"), "slide", "target", "library_key").tolist() == ["1.0", "1.5"] * 10


def test_empty_rows_and_matrices() -> None:
    values = np.ones((20, 8))
    values[4], values[:, 6] = 0, 0
    counts = read_counts(make(values), role="target")
    assert list(np.flatnonzero(counts.empty_rows)) == [4]
    assert counts.totals[0] == 7 and counts.totals[4] == 0
    dropped = read_counts(make(values), role="target", drop_empty=True)
    assert len(dropped.names) == len(dropped.obs) == len(dropped.xy) == 19 and "c4" not in dropped.names
    with pytest.raises(UserError, match="all 20 x 8 values are zero"):
        read_counts(make(np.zeros((20, 8))), role="target")
    with pytest.raises(UserError, match="20 cells x 0 genes"):
        read_counts(make()[:, :0].copy(), role="target")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    adata = make(sparse.csr_matrix(np.ones((20, 8))))
    file = tmp_path / "a.h5ad"
    adata.write_h5ad(file)
    before, keys = file.read_bytes(), set(adata.obs.columns)
    counts = read_counts(adata, role="target")
    counts.obs["new"] = 1
    assert set(adata.obs.columns) == keys and adata.X.dtype == np.float64
    read_counts(file, role="target")
    assert file.read_bytes() == before
    backed = anndata.read_h5ad(file, backed="r")
    assert np.array_equal(read_counts(backed, role="target").matrix.toarray(), counts.matrix.toarray())
    backed.file.close()


def test_take_genes_and_rows() -> None:
    counts = read_counts(make(), role="target")
    dense = counts.matrix.toarray()
    some = counts.take_genes(["g5", "g1", "g3"])
    assert np.array_equal(some.matrix.toarray(), dense[:, [5, 1, 3]]) and some.matrix.has_canonical_format
    with pytest.raises(UserError, match=r"2 of 3 genes are not in it: Zeb2, Actb"):
        counts.take_genes(["g1", "Zeb2", "Actb"])
    with pytest.raises(UserError, match="more than once: g1"):
        counts.take_genes(["g1", "g1"])
    rows = counts.take_rows([7, 2])
    assert list(rows.names) == ["c7", "c2"] == list(rows.obs.index) and np.array_equal(
        rows.matrix.toarray(), dense[[7, 2]]
    )
    assert np.array_equal(rows.xy, counts.xy[[7, 2]])  # type: ignore[index]
    mask = np.arange(20) < 3
    assert list(counts.take_rows(mask).names) == ["c0", "c1", "c2"]


def test_shared_genes_counts_near_matches() -> None:
    target = [f"Gene{i}" for i in range(20)]
    assert list(shared_genes(target, target[::-1], 10)) == target  # target order
    with pytest.raises(UserError) as caught:
        shared_genes(target, [g.upper() for g in target], 10)
    message = str(caught.value)
    assert "share 0 genes, at least 10" in message and "20 would match without regard to case" in message
    assert "Gene0, Gene1, Gene2 and 17 more" in message and "GENE0, GENE1, GENE2" in message
    ids = [f"ENSG0000{i}" for i in range(12)]
    with pytest.raises(UserError, match=r"12 without Ensembl versions.*strip the Ensembl versions"):
        shared_genes([f"{g}.{i + 1}" for i, g in enumerate(ids)], ids, 10)
    with pytest.raises(UserError, match=r"one side has Ensembl ids: .*gene_key"):
        shared_genes(target, ids, 10)
    # dots in symbols are no versions
    with pytest.raises(UserError, match="0 without Ensembl versions"):
        shared_genes([f"RP11.{i}" for i in range(12)], ["RP11"], 10)
    assert len(shared_genes(target, target[:3], 3)) == 3


@given(
    st.sets(st.text("abcdXYZ1.-", min_size=1, max_size=6), min_size=4, max_size=40),
    st.integers(2, 4),
    st.integers(0, 5),
)
@settings(max_examples=50, deadline=None)
def test_folds_partition_the_genes_whatever_their_order(genes: set[str], k: int, seed: int) -> None:
    given_order = list(genes)
    folds = gene_folds(given_order, k, seed)
    assert sorted(np.concatenate(folds)) == sorted(genes)
    again = gene_folds(given_order[::-1], k, seed)
    assert all(np.array_equal(a, b) for a, b in zip(folds, again, strict=True))
    order = np.random.default_rng(seed).permutation(len(genes))
    assert [list(f) for f in folds] == [[sorted(genes)[j] for j in sorted(order[i::k])] for i in range(k)]


def test_folds_refuse_nonsense() -> None:
    for k in (0, 1, 4):
        with pytest.raises(UserError, match="choose between 2 and 3"):
            gene_folds(["a", "b", "c"], k, 0)
    with pytest.raises(UserError, match="more than once: a"):
        gene_folds(["a", "a", "b"], 2, 0)


def test_read_genes(tmp_path: Path) -> None:
    file = tmp_path / "genes.txt"
    file.write_bytes(b"\xef\xbb\xbfZeb2\r\n\n# a comment\n  Actb  \n")
    assert list(read_genes(file)) == ["Zeb2", "Actb"]
    file.write_text("a\nb\na\n")
    with pytest.raises(UserError, match=r"genes\.txt: 1 names occur more than once: a"):
        read_genes(file)
    file.write_text("# nothing\n\n")
    with pytest.raises(UserError, match="names no gene"):
        read_genes(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="plain text file"):
        read_genes(file)
    with pytest.raises(UserError, match=r"no such file.*in Python a list of genes"):
        read_genes(tmp_path / "none.txt")


def test_row_blocks_cover_in_order() -> None:
    assert [list(range(10))[b] for b in row_blocks(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(row_blocks(0, 4)) == []


def test_real_pair_passes() -> None:
    spots = read_counts(path("derived_pair_xenium_brain/visium_like_spots.h5ad"), role="reference")
    cells = read_counts(path("derived_pair_xenium_brain/xenium_like_panel.h5ad"), role="target")
    assert spots.matrix.shape == (1377, 248) and cells.matrix.shape == (36602, 124)
    assert np.array_equal(shared_genes(cells, spots, 10), cells.genes)

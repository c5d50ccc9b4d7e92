"""Product forms against their dense twins: value, gradient, layouts, memory, and inside a Pyro plate."""

import itertools

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ppl_st import product, product_math
from ppl_st.count_likelihoods import SharedOddsNegativeBinomial
from ppl_st.errors import UserError
from ppl_st.likelihoods import NegativeBinomial, Poisson
from ppl_st.product import ProductNegativeBinomial, ProductPoisson, ProductSharedOddsNegativeBinomial, csr_tensor
from seeded import own_seed

_own_seed = pytest.fixture(own_seed, autouse=True)


def _example(dtype=torch.float32, n=40, genes=30, h=4, scale=0.3, seed=1):
    """Parameters, and counts with an empty row, an empty column and cells without activity."""
    rng = np.random.default_rng(seed)
    activity, loadings = rng.gamma(0.5, 1, (n, h)), rng.gamma(0.5, 1, (h, genes)) * scale
    counts = rng.poisson(activity @ loadings)
    counts[3] = 0
    counts[:, 5] = 0
    activity[7] = 0  # a cell whose rate is zero, with and without counts
    activity[8] = 0
    counts[7, 2] = 2
    counts[8] = 0
    log_theta = rng.normal(size=genes)
    leaves = [torch.tensor(a, dtype=dtype).requires_grad_() for a in (activity, loadings, log_theta)]
    return leaves, counts.astype(np.float64)


def _values(counts, dtype):
    matrix = scipy.sparse.csr_matrix(counts.astype(np.float32))
    return {"csr": csr_tensor(matrix), "dense": torch.tensor(counts, dtype=dtype)}


def _product(kind, activity, loadings, gene):
    if kind == "poisson":
        return ProductPoisson(activity, loadings)
    form = ProductNegativeBinomial if kind == "nb" else ProductSharedOddsNegativeBinomial
    return form(activity, loadings, gene)


def _dense(kind, activity, loadings, gene):
    rate = activity @ loadings
    if kind == "poisson":
        return Poisson(rate).to_event(1)
    d = NegativeBinomial(rate, log_theta=gene) if kind == "nb" else SharedOddsNegativeBinomial(rate, gene)
    return d.to_event(1)


@pytest.mark.parametrize("form", ["sparse", "blocks", "no_mkl", "no_tables"])
@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("kind", ["poisson", "nb", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_equals_dense(kind, layout, dtype, form, monkeypatch):
    if form == "no_mkl":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(product_math, "TABLE_ABOVE", 0.0)
    if form == "no_tables":
        monkeypatch.setattr(product_math, "LARGEST_TABLE", 0)
    monkeypatch.setattr(product, "DENSE_ABOVE", 0.0 if form == "blocks" else 1.0)
    monkeypatch.setattr(product_math, "BLOCK", 100)  # several blocks of rows, the last one short
    leaves, counts = _example(dtype)
    weight = torch.linspace(0.2, 2.0, len(counts), dtype=dtype)
    used = leaves[:2] if kind == "poisson" else leaves
    want = _dense(kind, *leaves).log_prob(torch.tensor(counts, dtype=dtype))
    got = _product(kind, *leaves).log_prob(_values(counts, dtype)[layout])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert got.shape == (len(counts),) and got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), used),
        torch.autograd.grad((want * weight).sum(), used),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize("kind", ["poisson", "nb", "shared"])
def test_product_gradcheck(kind, layout):
    leaves, counts = _small()
    value = _values(counts, torch.float64)[layout]
    used = leaves[:2] if kind == "poisson" else leaves
    rest = leaves[len(used) :]
    assert torch.autograd.gradcheck(lambda *a: _product(kind, *a, *rest).log_prob(value), tuple(used))


def _small():
    rng = np.random.default_rng(4)
    activity, loadings = rng.uniform(0.3, 1, (6, 2)), rng.uniform(0.3, 1, (2, 9))
    counts = rng.poisson(activity @ loadings * 0.4)
    leaves = [torch.tensor(a, requires_grad=True) for a in (activity, loadings, rng.normal(size=9))]
    return leaves, counts.astype(np.float64)


def test_stored_zeros_and_duplicate_free_order_do_not_matter():
    leaves, counts = _small()
    matrix = scipy.sparse.csr_matrix(counts.astype(np.float32))
    rows, cols = np.nonzero(counts == 0)
    padded = scipy.sparse.csr_matrix(
        (
            np.r_[matrix.data, np.zeros(len(rows), np.float32)],
            (np.r_[matrix.tocoo().row, rows], np.r_[matrix.indices, cols]),
        )
    )
    assert padded.nnz == counts.size
    for kind in ("poisson", "nb", "shared"):
        a, b = (_product(kind, *leaves).log_prob(csr_tensor(m)) for m in (matrix, padded))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_tables_are_right_for_any_theta_and_counts_beyond_them(monkeypatch):
    """float32 against the dense form in float64: theta 1e-8 to 1e8, counts that are in the tables and that are not."""
    monkeypatch.setattr(product_math, "LARGEST_TABLE", 30)
    rng = np.random.default_rng(3)
    log_theta = torch.linspace(-18.4, 18.4, 24)
    activity, loadings = (torch.tensor(rng.gamma(1.0, 2.0, s), dtype=torch.float32) for s in ((800, 3), (3, 24)))
    counts = torch.tensor(rng.poisson((activity @ loadings).numpy() * rng.gamma(1, 1, (800, 24))), dtype=torch.float32)
    counts[5, 3], counts[6, 20] = 1e6, 1e5
    assert (counts > 30).any() and (counts == 0).any()
    leaves = [a.requires_grad_() for a in (activity, loadings, log_theta)]
    d = ProductNegativeBinomial(*leaves)
    assert product_math.nb_tables(product_math.Counts(counts), d.theta.detach()).top == 30
    got = d.log_prob(counts)
    rate = (activity @ loadings).double()  # the same rounding of the rate
    want = NegativeBinomial(rate, log_theta=log_theta.double()).log_prob(counts.double()).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3)
    for name, a, b in zip("WQt", torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        error = (a - b).abs() / b.abs().max() if name != "t" else (a - b).abs() / (1e-3 + b.abs())
        assert error.max() < (1e-5 if name != "t" else 1e-4), (name, error.max())
    fractional = counts + 0.5  # validation off: no table, the Gamma functions themselves
    d = ProductNegativeBinomial(*leaves, validate_args=False)
    want = NegativeBinomial(rate, log_theta=log_theta.double(), validate_args=False).log_prob(fractional.double()).sum(1)
    torch.testing.assert_close(d.log_prob(fractional).double(), want, rtol=1e-5, atol=1e-3)


def test_shared_odds_of_merged_rows_is_that_of_the_sum():
    """Closure: the merged spot's log p is the convolution of its parts' by enumeration."""
    activity, loadings = torch.tensor([[0.4, 0.1], [1.2, 0.7]], dtype=torch.float64), torch.rand(2, 1, dtype=torch.float64)
    logits = torch.tensor([0.3], dtype=torch.float64)
    merged = ProductSharedOddsNegativeBinomial(activity.sum(0, keepdim=True), loadings, logits)
    first, second = (ProductSharedOddsNegativeBinomial(activity[i : i + 1], loadings, logits) for i in range(2))
    k = torch.arange(6.0, dtype=torch.float64)
    p, q = (torch.stack([d.log_prob(v.reshape(1, 1)) for v in k]).exp().view(-1) for d in (first, second))
    for n in range(6):
        total = (p[: n + 1] * q[: n + 1].flip(0)).sum()
        assert merged.log_prob(k[n].reshape(1, 1)).exp().item() == pytest.approx(total.item(), rel=1e-12)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns while active."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.parametrize("kind, dense_above", [("poisson", 1.0), ("poisson", 0.0), ("nb", 1.0), ("shared", 1.0)])
def test_memory_is_the_nonzeros_plus_a_block(kind, dense_above, monkeypatch):
    monkeypatch.setattr(product, "DENSE_ABOVE", dense_above)
    monkeypatch.setattr(product_math, "BLOCK", 2000)
    leaves, counts = _example(n=600, genes=100, scale=0.05)
    value = _values(counts, torch.float32)["csr"]
    nonzeros = int((counts > 0).sum())
    assert nonzeros < counts.size / 10
    with _Largest() as largest:
        _product(kind, *leaves).log_prob(value).sum().backward()
    assert largest.numel <= max(nonzeros, 2000, 600 * 4), "something of size cells x genes was formed"
    with _Largest() as largest:
        _dense(kind, *leaves).log_prob(torch.tensor(counts, dtype=torch.float32)).sum().backward()
    assert largest.numel >= counts.size  # the measure sees what it should see


@pytest.mark.parametrize("kind", ["poisson", "nb", "shared"])
def test_product_draws_moments_and_shapes(kind):
    leaves, _ = _small()
    d = _product(kind, *leaves)
    x = d.sample((20000,))
    assert (
        x.shape == (20000, 6, 9)
        and d.batch_shape == (6,)
        and d.event_shape == (9,)
        and torch.equal(x, x.floor())
    )
    z = (x.mean(0) - d.mean) / (d.variance / 20000).sqrt()
    assert z.abs().max() < 5
    torch.testing.assert_close(x.var(0), d.variance.detach(), rtol=0.3, atol=0)
    wide = d.expand((2, 6))
    assert wide.batch_shape == (2, 6) and wide.activity is leaves[0] and wide.log_prob(x[0]).shape == (2, 6)
    torch.testing.assert_close(d.log_prob(x[:3]), torch.stack([d.log_prob(v) for v in x[:3]]))


def test_product_refuses_what_does_not_fit():
    leaves, counts = _small()
    d = ProductPoisson(*leaves[:2], validate_args=True)
    with pytest.raises(UserError, match="do not fit 6 cells x 9 genes"):
        d.log_prob(torch.tensor(counts[:1]))
    with pytest.raises(UserError, match="whole numbers"):
        d.log_prob(csr_tensor(scipy.sparse.csr_matrix((counts + 0.5).astype(np.float32))))
    with pytest.raises(UserError, match="do not multiply"):
        ProductPoisson(leaves[0], leaves[1].T)
    with pytest.raises(UserError, match="log_theta"):
        ProductNegativeBinomial(*leaves[:2], torch.zeros(3, dtype=torch.float64))
    with pytest.raises(UserError, match="dtypes"):
        ProductNegativeBinomial(*leaves[:2], torch.zeros(9))
    with pytest.raises(ValueError):
        ProductPoisson(-leaves[0], leaves[1], validate_args=True)
    with pytest.raises(UserError, match="cannot expand"):
        d.expand((6, 2))


@pytest.mark.parametrize("kind", ["poisson", "nb", "shared"])
def test_in_a_subsampled_plate_with_sparse_observations(kind):
    """Validation on, Trace_ELBO: minibatch losses and gradients over a partition average to the full ones."""
    (activity, loadings, log_theta), counts = _example(torch.float64)
    matrix = scipy.sparse.csr_matrix(counts.astype(np.float32))
    activity = activity.detach()
    n, genes = counts.shape

    def model(rows):
        q = pyro.sample("loadings", dist.Gamma(torch.ones(4, genes, dtype=torch.float64), 1.0).to_event(2))
        t = pyro.sample("log_theta", dist.Normal(torch.zeros(genes, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("cells", n, subsample=torch.as_tensor(rows)) as index:
            pyro.sample("x", _product(kind, activity[index], q, t), obs=csr_tensor(matrix[rows]))

    with pyro.validation_enabled(True), pyro.settings.context(module_local_params=True):
        start = {"loadings": loadings.detach(), "log_theta": log_theta.detach()}
        guide = AutoDelta(model, init_loc_fn=lambda site: start[site["name"]])
        guide(np.arange(n))

        def loss(rows):
            guide.zero_grad()
            value = Trace_ELBO().differentiable_loss(model, guide, rows)
            value.backward()
            return value.item(), guide.loadings_unconstrained.grad.clone()

        full, full_grad = loss(np.arange(n))
        parts = [loss(rows) for rows in np.array_split(np.arange(n), 4)]
    assert full == pytest.approx(np.mean([p[0] for p in parts]), rel=1e-10)
    torch.testing.assert_close(full_grad, torch.stack([p[1] for p in parts]).mean(0), rtol=1e-9, atol=1e-9)


def test_gamma_ratios_of_dense_counts_are_exact_in_float32():
    """Shapes 1e-12 to 1e8, counts to 255: against mpmath."""
    r, counts = torch.logspace(-11.9, 8, 60), [0.0, 1.0, 2.0, 5.0, 30.0, 255.0]
    x = torch.tensor(counts).expand(60, -1)
    r = r[:, None].expand(-1, len(counts))
    value, slope = product_math.gamma_ratio(x, r).double(), product_math.gamma_ratio_slope(x, r).double()
    for i, j in itertools.product(range(60), range(len(counts))):
        a, b = mpmath.mpf(r[i, j].item()), counts[j]
        assert value[i, j].item() == pytest.approx(float(mpmath.loggamma(a + b) - mpmath.loggamma(a)), rel=2e-6, abs=2e-6)
        assert slope[i, j].item() == pytest.approx(float(mpmath.digamma(a + b) - mpmath.digamma(a)), rel=3e-6)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_csr_tensor_multiplies_and_is_a_copy(index):
    matrix = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(0.5, (20, 8)).astype(np.float32))
    matrix.indices, matrix.indptr = matrix.indices.astype(index), matrix.indptr.astype(index)
    matrix.data.flags.writeable = False  # torch would warn
    tensor = csr_tensor(matrix)
    assert tensor.layout == torch.sparse_csr and tensor.dtype == torch.float32
    dense = torch.ones(8, 3, requires_grad=True)
    product = tensor @ dense
    product.sum().backward()
    np.testing.assert_allclose(product.detach().numpy(), matrix @ np.ones((8, 3)))
    np.testing.assert_allclose(dense.grad.numpy()[:, 0], np.asarray(matrix.sum(axis=0)).ravel())
    tensor.values().zero_()
    assert matrix.data.min() > 0


def test_csr_tensor_adds_up_entries_stored_twice_and_leaves_the_callers_arrays():
    parts = np.array([1.0, 2.0, 4.0], np.float32), np.array([3, 1, 3]), np.array([0, 3])
    matrix = scipy.sparse.csr_matrix(tuple(part.copy() for part in parts), shape=(1, 5))
    tensor = csr_tensor(matrix)
    assert tensor.values().tolist() == [2.0, 5.0] and tensor.col_indices().tolist() == [1, 3]
    for own, given in zip((matrix.data, matrix.indices, matrix.indptr), parts, strict=True):
        np.testing.assert_array_equal(own, given)


@pytest.mark.parametrize("form", ["sparse", "blocks"])
def test_large_poisson_counts_lose_nothing_in_float32(form):
    """x log(rate) and log x! cancel: at counts of 1e6 float32 left an error of 1.6 of -42."""
    rate = torch.full((1, 6), 1e6)
    counts = torch.poisson(rate.expand(50, 6))
    wide = torch.cat([counts, torch.zeros(50, 54)], 1) if form == "sparse" else counts
    loadings = torch.cat([rate, torch.full((1, wide.shape[1] - 6), 1e-6)], 1)
    got = ProductPoisson(torch.ones(50, 1), loadings).log_prob(csr_tensor(scipy.sparse.csr_matrix(wide.numpy())))
    want = Poisson(loadings.double().expand(wide.shape)).log_prob(wide.double()).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_slopes_from_tables_are_right_where_a_gene_is_overdispersed():
    """x / mu - (x + theta) / (mu + theta) cancels when theta is far below mu and x."""
    leaves = [torch.rand(300, 3) * 1000 + 1, torch.rand(3, 10), torch.full((10,), -9.0)]
    counts = torch.poisson(torch.full((300, 10), 3.0))
    slopes = []
    for form, dtype in ((ProductNegativeBinomial, torch.float32), (lambda a, b, t: NegativeBinomial(a @ b, log_theta=t).to_event(1), torch.float64)):
        own = [a.to(dtype).requires_grad_() for a in leaves]
        slopes.append(torch.autograd.grad(form(*own).log_prob(counts.to(dtype)).sum(), own[:2]))
    for a, b in zip(*slopes, strict=True):
        assert ((a - b).abs() / b.abs()).max() < 1e-4

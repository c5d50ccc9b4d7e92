"""q(W, r | x, v, Q): the closed-form local posterior of SIID, a function of the counts and the global profiles alone.

A Poisson count is a sum of independent Poisson counts, one per factor; given the shares of the factors in the current rate, the gamma prior of
the activities is conjugate. Iterating (shares -> gamma posterior -> mean activity) is EM; its last gamma posterior is the guide:

    c_ik = W_ik ( sum_g x_ig L_kg / (W L)_ig + r_i sum_j K_ij sum_g v_jg Q_kg / (U Q)_jg )        counts attributed to factor k, L = Q_panel / phi
    W_ik ~ Gamma(alpha + c_ik,  alpha h / size_i + sum_g L_kg + r_i K_i. sum_g Q_kg)
    r_i  ~ Gamma(kappa + spot counts attributed to cell i,  kappa / rho + K_i. sum_k W_ik)

No table of cells is kept: the start is the same for every cell (its total spread over the factors by their usage), so the posterior of a cell
that was never seen costs the same iterations, and memory does not grow with the number of cells.

The entropic prior exp(-omega n_i H(P_i)) on compositions P_i = W_i / sum W_i (``sparsity`` = omega, nats per count) enters the fixed point
exactly: c_ik + omega n_i P_ik (log P_ik + H(P_i)), ramped up over the second half of the iterations.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppl_st.models.siid.batches import Batch

FLOOR = 1e-8
BLOCK = 2**22  # dense values in one block of rows
DENSE = 0.25  # share of non-zeros above which a dense matrix product is faster than a sampled one
STRIDE = 1.8  # exponent of the accelerated multiplicative step (1 = EM); the last steps are plain


class Sheet:
    """A table of counts [n, G] ready for (x / rate) products, dense in row blocks or sampled on its non-zeros."""

    def __init__(self, counts: Tensor) -> None:
        self.shape = counts.shape
        n, genes = counts.shape
        crow, col, values = counts.crow_indices(), counts.col_indices(), counts.values()
        self.blocks: list[tuple[slice, Tensor]] = []
        self.pattern: Tensor | None = None
        if len(values) < DENSE * n * genes and torch.backends.mkl.is_available():
            self.pattern = counts
            rows = torch.repeat_interleave(torch.arange(n), crow[1:] - crow[:-1])
            self.order = torch.argsort(col, stable=True)
            self.crow_t = torch.zeros(genes + 1, dtype=crow.dtype)
            self.crow_t[1:] = torch.cumsum(torch.bincount(col, minlength=genes), 0)
            self.col_t = rows[self.order]
            return
        size = max(1, BLOCK // max(1, genes))
        for start in range(0, n, size):
            stop = min(start + size, n)
            low, high = int(crow[start]), int(crow[stop])
            dense = torch.zeros(stop - start, genes, dtype=values.dtype, device=values.device)
            lengths = crow[start + 1 : stop + 1] - crow[start:stop]
            dense[torch.repeat_interleave(torch.arange(stop - start, device=values.device), lengths), col[low:high]] = (
                values[low:high]
            )
            self.blocks.append((slice(start, stop), dense))

    def _ratio(self, activity: Tensor, loadings: Tensor) -> Tensor:
        """Counts / rate on the non-zeros, [nnz]."""
        assert self.pattern is not None
        rate = torch.sparse.sampled_addmm(self.pattern, activity, loadings, beta=0.0)
        return self.pattern.values() / rate.values().clamp_min(FLOOR)

    def rows(self, activity: Tensor, loadings: Tensor) -> Tensor:
        """sum_g x_ng / rate_ng loadings_kg, [n, h]."""
        if self.pattern is not None:
            return (
                _csr(
                    self.pattern.crow_indices(), self.pattern.col_indices(), self._ratio(activity, loadings), self.shape
                )
                @ loadings.T.contiguous()
            )
        result = torch.empty_like(activity)
        for rows, counts in self.blocks:
            result[rows] = (counts / (activity[rows] @ loadings).clamp_min_(FLOOR)) @ loadings.T
        return result

    def columns(self, activity: Tensor, loadings: Tensor) -> Tensor:
        """sum_n activity_nk x_ng / rate_ng, [h, G]."""
        if self.pattern is not None:
            ratio = self._ratio(activity, loadings)[self.order]
            return (_csr(self.crow_t, self.col_t, ratio, (self.shape[1], self.shape[0])) @ activity).T
        result = torch.zeros_like(loadings)
        for rows, counts in self.blocks:
            result += activity[rows].T @ (counts / (activity[rows] @ loadings).clamp_min_(FLOOR))
        return result

    def log_likelihood(self, activity: Tensor, loadings: Tensor) -> float:
        """Poisson log-likelihood without the constant of the counts."""
        total = -float((activity.double().sum(0) * loadings.double().sum(1)).sum())
        if self.pattern is not None:
            rate = torch.sparse.sampled_addmm(self.pattern, activity, loadings, beta=0.0).values()
            return total + float((self.pattern.values() * rate.clamp_min(FLOOR).log()).double().sum())
        for rows, counts in self.blocks:
            total += float((counts * (activity[rows] @ loadings).clamp_min_(FLOOR).log_()).double().sum())
        return total


def _csr(crow: Tensor, col: Tensor, values: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, size=tuple(shape), check_invariants=False)


class Globals(NamedTuple):
    """Global quantities that the local posterior is conditioned on, and its constants."""

    profiles: Tensor  # [h, G] Q
    panel_profiles: Tensor  # [h, P] L = Q_panel / phi
    usage: Tensor  # [h] sums to 1
    capture: float  # rho, prior mean of r
    concentration: float  # alpha
    capture_concentration: float  # kappa; infinite keeps r = rho
    sparsity: float  # omega
    label_weight: float  # pseudo-counts of a label, as a share of the cell's counts


class Local(NamedTuple):
    """Gamma posteriors of the activities and of the capture ratio of n cells."""

    shape: Tensor  # [n, h]
    rate: Tensor  # [n, h]
    capture_shape: Tensor  # [n]
    capture_rate: Tensor  # [n]

    @property
    def activity(self) -> Tensor:
        """Posterior mean of W, [n, h]."""
        return self.shape / self.rate

    @property
    def capture(self) -> Tensor:
        """Posterior mean of r, [n]."""
        return self.capture_shape / self.capture_rate


def sizes(total: Tensor, g: Globals) -> Tensor:
    """Prior mean of a cell's total activity: what its panel counts would make of the usual composition, [n]."""
    return (total / (g.usage @ g.panel_profiles.sum(1)).clamp_min(FLOOR)).clamp_min(1.0)


def aggregate(batch: Batch, activity: Tensor) -> Tensor:
    """U_jk = sum_i K_ij activity_ik, [s, h]; add before multiplying by genes."""
    result = activity.new_zeros(batch.spot_counts.shape[0], activity.shape[1])
    return result.index_add(0, batch.link_spot, batch.link_weight[:, None] * activity[batch.link_cell])


class LocalPosterior:
    """The iteration for one batch; keeps the batch's sheets so that EM can call it sweep by sweep."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.cells = Sheet(batch.counts)
        self.spots = Sheet(batch.spot_counts) if batch.spot_counts.shape[0] else None
        n = batch.counts.shape[0]
        self.reach = torch.zeros(n).index_add(0, batch.link_cell, batch.link_weight)  # sum_j K_ij, [n]

    def start(self, g: Globals) -> Local:
        """The same composition for every cell: its size spread over the factors by their usage."""
        activity = sizes(self.batch.total, g)[:, None] * g.usage
        ones = torch.ones_like(self.batch.total)
        return Local(activity, torch.ones_like(activity), g.capture * ones, ones)

    def update(self, local: Local, g: Globals, ramp: float, stride: float) -> Local:
        """One sweep: attribute the counts, then the gamma posteriors; ``ramp`` in [0, 1] scales the sparsity."""
        activity, capture = local.activity, local.capture
        counts = self.cells.rows(activity, g.panel_profiles)  # [n, h] per unit of activity
        expected = g.panel_profiles.sum(1).expand_as(activity)
        shape_r, rate_r = local.capture_shape, local.capture_rate
        if self.spots is not None:
            captured = self.reach[:, None] * g.profiles.sum(1)  # [n, h]
            back = self._from_spots(activity, capture, g)
            if np.isfinite(
                g.capture_concentration
            ):  # r first, then W given r: both at once would count the same evidence twice
                shape_r = g.capture_concentration + capture * (activity * back).sum(1)
                rate_r = g.capture_concentration / g.capture + (activity * captured).sum(1)
                capture = shape_r / rate_r
                back = self._from_spots(activity, capture, g)
            counts = counts + capture[:, None] * back
            expected = expected + capture[:, None] * captured
        counts = self._with_priors(activity * counts, activity, g, ramp)
        shape = g.concentration + counts
        rate = g.concentration * activity.shape[1] / sizes(self.batch.total, g)[:, None] + expected
        if stride != 1:
            target = shape / rate
            shape = (activity * (target / activity.clamp_min(1e-30)).clamp(1e-3, 30.0) ** stride).clamp_min(
                1e-20
            ) * rate
        return Local(shape, rate, shape_r, rate_r)

    def _from_spots(self, activity: Tensor, capture: Tensor, g: Globals) -> Tensor:
        """sum_j K_ij sum_g v_jg Q_kg / (U Q)_jg, [n, h]."""
        assert self.spots is not None
        per_spot = self.spots.rows(aggregate(self.batch, capture[:, None] * activity), g.profiles)  # [s, h]
        links = self.batch.link_weight[:, None] * per_spot[self.batch.link_spot]
        return torch.zeros_like(activity).index_add(0, self.batch.link_cell, links)

    def _with_priors(self, counts: Tensor, activity: Tensor, g: Globals, ramp: float) -> Tensor:
        """Labels and sparsity move counts between the factors of a cell; their sum stays."""
        total = self.batch.total[:, None]  # n_i of the factors in the model: the cell's own counts
        mass = counts.sum(1, keepdim=True)
        labelled = self.batch.labels >= 0
        if g.label_weight > 0 and bool(labelled.any()):
            share = torch.nn.functional.one_hot(self.batch.labels.clamp_min(0), counts.shape[1]) * labelled[:, None]
            counts = counts + g.label_weight * total * share
        if g.sparsity * ramp > 0:
            composition = (activity / activity.sum(1, keepdim=True).clamp_min(FLOOR)).clamp_min(1e-12)
            log_p = composition.log()
            entropy = -(composition * log_p).sum(1, keepdim=True)
            counts = (counts + g.sparsity * ramp * total * composition * (log_p + entropy)).clamp_min(1e-6)
        return counts * mass / counts.sum(1, keepdim=True).clamp_min(FLOOR)

    def refine(self, local: Local, g: Globals, steps: int) -> Local:
        """``steps`` more sweeps from ``local``, with the whole sparsity."""
        for t in range(steps):
            local = self.update(local, g, 1.0, STRIDE if t < steps - 3 and not g.sparsity else 1.0)
        return local

    def solve(self, g: Globals, steps: int) -> Local:
        """``steps`` sweeps from the common start."""
        local = self.start(g)
        for t in range(steps):
            ramp = max(0.0, (2 * (t + 1) - steps) / steps) if g.sparsity else 0.0  # 1 in the last sweep
            local = self.update(local, g, ramp, STRIDE if t < steps - 3 and not ramp else 1.0)
        return local

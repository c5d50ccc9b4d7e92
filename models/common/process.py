r"""What the reference's cells say of a gene beyond straight lines: a Gaussian process over cells, from the panel to every gene.

    a_i       log-normalised panel genes of a cell, standardised within its own platform, scaled to unit length   (target cells and reference cells)
    y_g(i)    ~ N(phi(a_i) . beta_g, s_g^2),    beta_g ~ N(0, s_g^2 I / p),    phi(a) . phi(b) = exp(-|a - b|^2 / (2 l m))

m is the median squared distance of the landmarks, l a lengthscale; phi is the Nystroem feature map of at most `LANDMARKS` reference cells, rotated
so that its Gram matrix over the reference is diagonal: the posterior of beta is elementwise. l and p are chosen by generalised cross-validation
inside the reference; s_g^2 is what is left there, per degree of freedom. Standardising removes gene-wise platform effects, unit length the difference
in noise between platforms; where a cell lies in the tissue's manifold is what is left.

Where target and reference are alike this beats a linear regression by far (Molecular Cartography, .47 -> .52 of correlation, RECORD.md);
how much of it enters a map is chosen on inner held-out genes (`ppl_st.models.common.inner.learn_hyper`; VISTA: `ppl_st.models.vista.inner`).

n target cells, M reference cells, P panel genes, L landmarks, F features, g genes.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppl_st.inference.randomness import gene_noise
from ppl_st.models.common.cells import Problem, all_counts, log_normalise, median_depth, moments

LANDMARKS = 500
CELLS = 20_000  # of the reference, at most; fewer where the panel is large, so that they take
ENTRIES = 40_000_000  # cells x panel genes
DENSE = 4_000_000  # entries made dense together
CENTER = 2000  # target cells over which the features have mean 0
JUDGED = 200  # genes on which lengthscale and penalty are chosen, at most
LENGTHSCALES = (0.5, 1.0, 2.0)
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FREEDOM = 0.9  # share of the cells that the features may use up
FAINT = 0.01  # features whose weights shrink below this are left out
JITTER = 1e-6

Floats = NDArray[np.float64]


class Field(NamedTuple):
    """Genes regressed on the features of rows of unit length."""

    marks: NDArray[np.float32]  # [L, P] landmarks
    width: float  # 2 l m
    root: NDArray[np.float32]  # [L, F]
    beta: NDArray[np.float32]  # [F, g] posterior mean of the weights of the genes asked for
    beta_sd: NDArray[np.float32]  # [F, g] and standard deviation

    def features(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """phi [n, F] of rows [n, P]."""
        step = DENSE // len(self.marks)
        return np.concatenate([_kernel(rows[i : i + step], self.marks, self.width) @ self.root for i in range(0, max(1, len(rows)), step)])


class Process(NamedTuple):
    """A field over the reference's cells, and how target cells are placed in it."""

    field: Field
    columns: NDArray[np.int64]  # [P] of the panel in the target
    mean: Floats  # [P] of the log-normalised target
    sd: Floats  # [P]
    depth: float
    center: NDArray[np.float32]  # [F]

    def places(self, counts: sp.csr_matrix) -> NDArray[np.float32]:
        """phi [n, F] of target cells with all genes of the target, centered."""
        found = np.empty((counts.shape[0], len(self.center)), np.float32)
        step = max(64, DENSE // len(self.columns))
        for start in range(0, len(found), step):
            part = slice(start, start + step)
            panel = counts[part][:, self.columns]
            logs = log_normalise(panel, all_counts(panel), self.depth)
            found[part] = self.field.features(_unit(logs, self.mean, self.sd)) - self.center
        return found


def beside(own: NDArray[np.float32], found: Process | None, counts: sp.csr_matrix) -> NDArray[np.float32]:
    """Places [n, q + F] of target cells: a method's ``own`` [n, q], and the features of the process if there is one."""
    return own if found is None else np.hstack([own, found.places(counts)])


class Part(nn.Module):
    """``share`` of the process in the maps of unmeasured genes, beside a method's own loadings [q, g].

    The method multiplies its loadings by 1 - ``share`` and leaves its doubt in full; here they get F more rows, those of measured genes 0.
    """

    beta: Tensor  # [F, G] buffers, the share included; F = 0 without a process
    sd: Tensor  # [F, G]

    def __init__(self, found: Process | None, share: float, genes: int) -> None:
        super().__init__()
        self.fitted, self.share = found, share
        for name, value in (("beta", found and found.field.beta), ("sd", found and found.field.beta_sd)):
            part = torch.zeros(0, genes) if value is None else share * torch.from_numpy(value)
            self.register_buffer(name, part, persistent=False)

    def loadings(self, own: Tensor, genes: Tensor, measured: Tensor, key: Tensor | None = None) -> Tensor:
        """Loadings [q + F, g]: posterior means, or the draw ``key``; ``measured`` [g] says which genes are."""
        beta = self.beta[:, genes]
        if key is not None and len(beta):
            beta = beta + self.sd[:, genes] * gene_noise(key, genes, len(own) + len(beta))[len(own) :]  # the first q are the method's
        return torch.cat([own, beta.masked_fill(measured, 0.0)])

    def variance(self, own: Tensor, genes: Tensor, measured: Tensor) -> Tensor:
        """Posterior variance [q + F, g] of the loadings."""
        return torch.cat([own, self.sd[:, genes].square().masked_fill(measured, 0.0)])


def process(data: Problem, reference: sp.csr_matrix, genes: NDArray[np.int64], seed: int) -> Process:
    """Fit to the log-normalised ``reference`` [M, G], from the shared genes to ``genes`` [g]."""
    rng = np.random.default_rng([seed, 12])
    panel = data.panel
    logs = sp.csr_matrix(reference)[some_cells(reference.shape[0], len(panel), rng)]
    mean, sd = moments(logs)
    unseen = np.flatnonzero(~np.isin(genes, panel))
    found = field(_unit(logs[:, panel], mean[panel], sd[panel]), logs[:, genes], unseen, rng)
    depth = median_depth(data.totals)
    own = moments(log_normalise(data.counts[:, data.columns], data.totals, depth))
    fitted = Process(found, data.columns, *own, depth, np.zeros(found.root.shape[1], np.float32))
    rows = np.sort(rng.permutation(data.counts.shape[0])[:CENTER])
    return fitted._replace(center=fitted.places(data.counts[rows]).mean(0))


def some_cells(n: int, panel: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of the reference that a field is fitted to."""
    return np.sort(rng.permutation(n)[: min(CELLS, ENTRIES // panel)])


def field(inside: NDArray[np.float32], outputs: sp.csr_matrix, unseen: NDArray[np.int64], rng: np.random.Generator) -> Field:
    """Fit log-normalised genes [M, g] to rows of unit length [M, P]; lengthscale and penalty are those that suit the columns ``unseen``."""
    marks = inside[np.sort(rng.permutation(len(inside))[:LANDMARKS])]
    apart = _squares(marks, marks)
    median = float(np.median(apart[np.triu_indices(len(apart), 1)])) if len(apart) > 1 else 0.0
    median = median or 1.0
    _, sd = moments(outputs)
    judged = unseen if len(unseen) else np.arange(outputs.shape[1])
    judged = judged[:: -(-len(judged) // JUDGED)]
    some = outputs[:, judged]
    best: tuple[float, float, float, Floats, Floats, NDArray[np.float32]] | None = None
    for length in LENGTHSCALES:
        width = 2 * length * median
        values, vectors = scipy.linalg.eigh(np.exp(-apart / width) + JITTER * np.eye(len(apart)))
        half = vectors / np.sqrt(np.maximum(values, JITTER))
        phi = _kernel(inside, marks, width) @ half.astype(np.float32)
        phi -= phi.mean(0)
        strength, rotation = scipy.linalg.eigh(phi.T.astype(np.float64) @ phi)
        strength = np.maximum(strength, 0.0)
        square = np.square(rotation.T @ _moments(phi, some, sd[judged]))  # [F, judged]
        for penalty in PENALTIES:
            keep = strength / (strength + penalty)
            freedom = (keep.sum() + 1) / len(inside)
            left = (len(inside) - ((1 + penalty / (strength + penalty)) / (strength + penalty)) @ square).sum() / (1 - min(freedom, FREEDOM)) ** 2
            if best is None or left < best[0]:
                best = float(left), width, penalty, half, rotation[:, keep > FAINT], phi
    assert best is not None
    _, width, penalty, half, rotation, phi = best
    root = half @ rotation
    sign = np.sign(root[np.abs(root).argmax(0), np.arange(root.shape[1])])  # eigenvectors have none; what a run stores beside the fit needs one
    root, phi = root * sign, phi @ (rotation * sign).astype(np.float32)
    found, strength = _moments(phi, outputs, sd), np.square(phi, dtype=np.float64).sum(0)[:, None]
    whole = strength + penalty
    freedom = min(float((strength / whole).sum() + 1), FREEDOM * len(phi))
    noise = np.maximum(len(phi) - ((1 + penalty / whole) / whole * np.square(found)).sum(0), 0) / (len(phi) - freedom)  # s_g^2
    return Field(marks, width, *(one.astype(np.float32) for one in (root, found / whole, np.sqrt(noise / whole))))


def _unit(logs: sp.csr_matrix, mean: Floats, sd: Floats) -> NDArray[np.float32]:
    """Standardised rows, scaled to unit length."""
    found = np.empty(logs.shape, np.float32)
    step = max(64, DENSE // logs.shape[1])
    for start in range(0, len(found), step):
        found[start : start + step] = unit((logs[start : start + step].toarray() - mean) / sd)
    return found


def unit(x: NDArray[Any]) -> NDArray[np.float32]:
    """Rows [n, P] scaled to unit length."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9), dtype=np.float32)


def _squares(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distances [n, L] of rows of unit length."""
    return np.maximum(2 - 2 * (a @ b.T), 0)


def _kernel(a: NDArray[np.float32], b: NDArray[np.float32], width: float) -> NDArray[np.float32]:
    return np.asarray(np.exp(-_squares(a, b) / np.float32(width)))


def _moments(phi: NDArray[np.float32], outputs: sp.csr_matrix, sd: Floats) -> Floats:
    """phi' y [F, g] for standardised outputs; phi has mean 0."""
    return np.asarray((outputs.T @ phi).T, dtype=np.float64) / sd

r"""Stage 1: an autoencoder of either side, as a Pyro pair, frozen afterwards.

    z_i ~ Normal(0, I_L)                         code of a cell (codes="point": no prior, a plain autoencoder)
    h_i = hidden layers of the decoder           no hidden layer: h = z
    x_i ~ Normal(W h_i + b, sigma)               observation="gaussian", x the preprocessed counts of a cell [A]
    c_i ~ NB(total_i exp(W h_i + b), theta)      observation="nb", c the counts
    q(z_i | x_i) = Normal(encoder(x_i))          codes="point": the encoder's location

With codes="point" and observation="gaussian" the objective is the published one, N times the mean squared error.

``kind="linear"`` is the Gaussian pair without hidden layers at its optimum in closed form, probabilistic principal components (Tipping & Bishop 1999)
of the standardised cells: with eigenvalues l_k, eigenvectors v_k of the genes' correlation matrix and noise s (mean of the eigenvalues left out),
code z_k = v_k . x / sqrt(l_k), of unit variance over cells; loadings W_k = sqrt(l_k) v_k; sd of the code given the cell sqrt(s / l_k). The optimum
itself has code and loadings times sqrt(1 - s / l_k): that factor is left out.

PREPROCESSING   lognorm: log1p(counts depth / total), standardised by gene; total over the shared genes; linear, target: over all of its genes.
                sqrt: sqrt(min(counts, mean + 2 sd of the positive entries)), as published; nothing else.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_st.inference.randomness import epoch_order, rng_scope
from ppl_st.inference.svi import FitConfig, Pair, fit_part
from ppl_st.likelihoods import NegativeBinomial
from ppl_st.models.common.cells import all_counts, find_directions, log_normalise, median_depth, moments
from ppl_st.models.spagene.data import Data
from ppl_st.networks import MLP

BLOCK_ENTRIES = 8_000_000  # of cells made dense together
LOG_SCALE = (-5.0, 2.0)  # of a posterior's standard deviation
FLOOR = -4.0  # of log sigma


class Shape(NamedTuple):
    """What an autoencoder is built from."""

    kind: Literal["linear", "network"]
    preprocess: Literal["lognorm", "sqrt"]
    observation: Literal["gaussian", "nb"]
    codes: Literal["normal", "point"]
    hidden: tuple[int, ...]
    latent: int
    dropout: float
    total: Literal["all", "shared"]  # genes over which a cell's total is taken


    def totals(self, counts: sp.csr_matrix, columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """[n] totals of cells [n, A]; ``columns`` are the shared genes."""
        return all_counts(counts if self.total == "all" else counts[:, columns])


class Autoencoder(nn.Module):
    """Encoder and decoder of one side. ``frozen`` keeps evaluation mode for good: no dropout noise, nothing moves."""

    mean: Tensor  # [A] buffers
    sd: Tensor  # [A]; sqrt: the clipping limit
    depth: Tensor
    scale: Tensor  # [L] sd of a code given its cell; linear

    def __init__(self, shape: Shape, genes: int) -> None:
        super().__init__()
        self.shape, self.frozen = shape, False
        latent = min(shape.latent, genes) if shape.kind == "linear" else shape.latent
        self.latent = latent
        hidden = () if shape.kind == "linear" else shape.hidden
        out = latent if shape.kind == "linear" or shape.codes == "point" else 2 * latent
        self.encoder = MLP([genes, *hidden, out], dropout=shape.dropout)
        self.decoder = MLP([latent, *reversed(hidden), genes], dropout=shape.dropout)
        for name, start in (("mean", torch.zeros(genes)), ("sd", torch.ones(genes)), ("depth", torch.ones(())), ("scale", torch.zeros(latent))):
            self.register_buffer(name, start)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Switch the mode, unless frozen."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> "Autoencoder":
        """No gradient, evaluation mode."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    # ---- cells ----

    def learn_moments(self, data: Data) -> None:
        """What preprocessing needs to know of the fit's cells."""
        if self.shape.preprocess == "sqrt":
            limit = clip_limits(data.counts)
            self.sd.copy_(torch.from_numpy(limit))
            return
        totals = self.shape.totals(data.counts, data.columns)
        depth = median_depth(totals)
        mean, sd = moments(log_normalise(data.counts, totals, depth))
        self.mean.copy_(torch.from_numpy(mean))
        self.sd.copy_(torch.from_numpy(sd))
        self.depth.fill_(depth)

    def read(self, data: Data, rows: NDArray[np.int64], genes: NDArray[np.int64] | None = None) -> Tensor:
        """Preprocessed cells [B, A], or some ``genes`` of them."""
        every = data.counts[rows]
        some: Any = slice(None) if genes is None else genes
        counts, mean, sd = every[:, some], self.mean[some], self.sd[some]
        if self.shape.preprocess == "sqrt":
            return torch.minimum(torch.from_numpy(counts.toarray()).float(), sd.cpu()).sqrt().to(sd.device)
        x = torch.from_numpy(log_normalise(counts, self.shape.totals(every, data.columns), float(self.depth)).toarray()).to(sd.device)
        return (x - mean) / sd

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of q(z) [B, L]; the scale of a point is 0."""
        out: Tensor = self.encoder(x)
        if out.shape[1] == self.latent:
            return out, self.scale.expand_as(out)
        loc, log_scale = out.chunk(2, -1)
        return loc, log_scale.clamp(*LOG_SCALE).exp()

    def features(self, z: Tensor) -> Tensor:
        """Last hidden layer of the decoder [B, F], of which the output is linear."""
        for layer in list(self.decoder)[:-1]:
            z = layer(z)
        return z

    def decode(self, z: Tensor, genes: Tensor | None = None) -> Tensor:
        """What the decoder says of every gene [B, A], or of some ``genes``, on the scale of the observation."""
        if genes is None:
            result: Tensor = self.decoder(z)
            return result
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        return nn.functional.linear(self.features(z), last.weight[genes], last.bias[genes])

    @property
    def loadings(self) -> Tensor:
        """[A, F] weights of the output on the features."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        return last.weight

    def codes(self, data: Data) -> tuple[Tensor, Tensor]:
        """Location and scale of q(z) of every cell, [n, L] each; block by block."""
        n, genes = data.counts.shape
        size = max(1, BLOCK_ENTRIES // genes)
        with torch.no_grad():
            parts = [self.encode(self.read(data, np.arange(i, min(i + size, n)))) for i in range(0, n, size)]
        constant = self.shape.kind == "linear" or self.shape.codes == "point"  # a view, not n copies of it
        scale = self.scale.expand(n, self.latent) if constant else torch.cat([p[1] for p in parts])
        return torch.cat([p[0] for p in parts]), scale


def clip_limits(counts: sp.csr_matrix) -> NDArray[np.float64]:
    """Mean + 2 sd (ddof 1) of the positive entries of every gene [A]; the largest entry where there are fewer than two."""
    columns = sp.csc_matrix(counts)
    limits = np.ones(columns.shape[1])
    for g in range(columns.shape[1]):
        x = columns.data[columns.indptr[g] : columns.indptr[g + 1]]
        x = x[x > 0].astype(np.float64)
        limits[g] = x.mean() + 2 * x.std(ddof=1) if len(x) > 1 else x.max(initial=1.0)
    return limits


class CellBatch(NamedTuple):
    """Cells of one minibatch of stage 1."""

    rows: Tensor  # [B]
    x: Tensor  # [B, A] preprocessed
    counts: Tensor  # [B, A]; empty for the Gaussian
    total: Tensor  # [B]
    n_cells: int


class CellBatches:
    """Minibatches of one side's cells; a pure function of the step."""

    def __init__(self, net: Autoencoder, data: Data, size: int, seed: int) -> None:
        self.net, self.data, self.seed = net, data, seed
        self.n = data.counts.shape[0]
        self.size = min(size or self.n, self.n)

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def at(self, step: int) -> CellBatch:
        """The minibatch of ``step``."""
        rows = np.sort(epoch_order(self.n, self.size, self.seed, step))
        counts = self.data.counts[rows]
        total = torch.from_numpy(np.asarray(counts[:, self.data.columns].sum(1), dtype=np.float32).ravel()).clamp_min(1.0)
        dense = torch.from_numpy(counts.toarray()).float() if self.net.shape.observation == "nb" else torch.zeros(len(rows), 0)
        return CellBatch(torch.from_numpy(rows), self.net.read(self.data, rows), dense, total, self.n)


class AutoencoderModel(PyroModule):
    """p(x, z) of one side; see the file's docstring."""

    def __init__(self, net: Autoencoder) -> None:
        super().__init__()
        self.net = net
        genes = len(net.mean)
        self.log_noise = nn.Parameter(torch.zeros(genes))  # log sigma, or log theta

    def forward(self, batch: CellBatch, *, observe: bool = True) -> None:
        """Run the story on a minibatch; ``observe=False`` draws the observations."""
        net, shape = self.net, self.net.shape
        with pyro.plate("cells", batch.n_cells, subsample=batch.rows):
            with poutine.mask(mask=shape.codes == "normal"):
                z = pyro.sample("z", dist.Normal(torch.zeros(net.latent), 1.0).to_event(1))  # [B, L]
            out = net.decode(z)  # [B, A]
            if shape.observation == "nb":
                law: Any = NegativeBinomial(log_mean=batch.total.log()[:, None] + out.clamp(-20, 10), log_theta=self.log_noise)
                pyro.sample("counts", law.to_event(1), obs=batch.counts if observe else None)  # [B, A]
            elif shape.codes == "normal":
                sd = self.log_noise.clamp_min(FLOOR).exp()
                pyro.sample("x", dist.Normal(out, sd).to_event(1), obs=batch.x if observe else None)  # [B, A]
        if shape.observation == "gaussian" and shape.codes == "point":
            pyro.factor("reconstruction", -batch.n_cells * (out - batch.x).square().mean())


class AutoencoderGuide(PyroModule):
    """q(z | x)."""

    def __init__(self, net: Autoencoder) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: CellBatch, *, observe: bool = True) -> None:
        """Sample the codes of a minibatch."""
        loc, scale = self.net.encode(batch.x)
        normal = self.net.shape.codes == "normal"
        with pyro.plate("cells", batch.n_cells, subsample=batch.rows), poutine.mask(mask=normal):
            law: Any = dist.Normal(loc, scale) if normal else dist.Delta(loc)
            pyro.sample("z", law.to_event(1))  # [B, L]


def autoencoder_pair(net: Autoencoder) -> Pair:
    """The pair of stage 1."""
    return Pair(AutoencoderModel(net), AutoencoderGuide(net))


def linear(data: Data, shape: Shape) -> Autoencoder:
    """The linear Gaussian autoencoder of the target's side of ``data``, in closed form and frozen."""
    genes = data.counts.shape[1]
    found = find_directions(data.counts, shape.latent, shape.totals(data.counts, data.columns))
    values = np.square(found.scores).sum(1)
    net = Autoencoder(shape._replace(latent=len(values)), genes)
    left = genes - len(values)
    noise = max(0.0, genes - values.sum()) / left if left else 0.0
    with torch.no_grad():
        for to, value in (
            (net.encoder[-1].weight, found.loadings.T),
            (net.decoder[-1].weight, found.scores.T),
            (net.mean, found.mean),
            (net.sd, found.sd),
            (net.scale, np.sqrt(np.minimum(noise / values, 1.0))),
        ):
            assert isinstance(to, Tensor)
            to.copy_(torch.from_numpy(np.ascontiguousarray(value)))
        for layer in (net.encoder[-1], net.decoder[-1]):
            layer.bias.zero_()  # type: ignore[operator]
        net.depth.fill_(found.depth)
    return net.freeze()


def train(data: Data, shape: Shape, config: FitConfig, batch_cells: int, seed: int, name: str) -> Autoencoder:
    """The autoencoder of the target's side of ``data``: closed form, or stage 1 by SVI; frozen."""
    if shape.kind == "linear":
        return linear(data, shape)
    with rng_scope(seed, "autoencoder", name):
        net = Autoencoder(shape, data.counts.shape[1])
    net.learn_moments(data)
    if shape.observation == "nb":  # the level of every gene: a start near the data
        level = np.log((np.asarray(data.counts.sum(0)).ravel() + 0.5) / (data.totals.sum() + 1))
        with torch.no_grad():
            net.decoder[-1].bias.copy_(torch.from_numpy(level))  # type: ignore[operator]
    scale = 1.0 / data.counts.shape[0] if shape.codes == "point" else 1.0 / (data.counts.shape[0] * data.counts.shape[1])
    fit_part(autoencoder_pair(net), CellBatches(net, data, batch_cells, seed), config, scale=scale)
    return net.freeze()


def blocks(n: int, genes: int) -> Iterator[NDArray[np.int64]]:
    """Rows in blocks whose dense form stays small."""
    size = max(1, BLOCK_ENTRIES // max(1, genes))
    for start in range(0, n, size):
        yield np.arange(start, min(start + size, n))

r"""The linear Gaussian translator in closed form, and what inner held-out genes teach.

IDENTITY. Let u [n, q] be the codes of one side's cells (unit variance), x_g the standardised expression of a gene there and t_g = u'x_g / n its
loadings. If translating and decoding is to give the gene back, u W d_g = x_g for every shared gene, d_g the loadings of the *other* side's decoder.
Genes differ between platforms by more than a gain and an offset, so every gene has its own deviation in every direction k:

    log r_k ~ Normal(log r, 1.5^2)                signal over noise of direction k
    w_k  ~ Normal(0, r_k s_k I)                   row k of the translator W [q, F]
    t_kg ~ Normal(d_g . w_k, s_k)                 shared genes g

With the other side's latent rotated so that sum_g d_g d_g' = diag(lambda), everything is elementwise:

    w_kf | t ~ Normal( sum_g t_kg d_gf / (1 / r_k + lambda_f),  s_k / (1 / r_k + lambda_f) ),      s_k = mean_g t_kg (t_kg - d_g . w_k)
    -2 log p(t_k) = P log s_k + sum_f log(1 + r_k lambda_f) + P                                    at that s_k

r_k maximises the marginal likelihood times its prior: many shared genes tell apart directions that the reference knows of from those it does not, few
leave all of them near r. A gene that this side never measured has loadings W d_g + Normal(0, v): the evidence behind W is the number of shared genes,
not of cells. A measured gene takes part in the directions, the weak ones above all, so its deviations s are larger than those of other genes: v is
what is left of inner held-out genes, direction by direction, beyond the sampling error of their loadings. One column of d is a constant: what all
genes have in common, depth mostly. r, the share c of the reference's own regression (`regression.py`) in an unmeasured gene's loadings, and the share
of the spatial neighbors in a code are chosen on inner held-out genes, too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppl_st.models.common.cells import all_counts, log_normalise, median_depth, without
from ppl_st.models.common.counts import Codes
from ppl_st.models.common.inner import MIN_PANEL
from ppl_st.models.common.process import Process, beside, process
from ppl_st.models.spagene.autoencoder import Autoencoder, Shape, blocks, linear
from ppl_st.models.spagene.data import Data
from ppl_st.models.spagene.regression import Regression, regress

CONSTANT = 0.2  # square of the constant column
RATIOS = (0.1, 0.3, 1.0, 3.0)
RATIO_SD = 1.5  # of log r_k around log r
GRID = np.geomspace(1e-4, 1e3, 60)  # of r_k
MIXES = (0.0, 0.15, 0.3, 0.5)  # shares of the neighbors in a code
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # c
USUAL = (1.0, 0.0, 0.3)  # r, c and share of the neighbors that others must beat by a standard error
FOLDS = 4
START_NOISE = float(np.exp(-3.0))  # of a translated code, before it is learned
CELLS = 2000  # on which inner genes are judged

Say = Callable[[str], None]


class Features(NamedTuple):
    """Decoder loadings of the other side in the coordinates in which their Gram matrix over the shared genes is diagonal."""

    phi: NDArray[np.float64]  # [genes, F]
    rotation: NDArray[np.float64]  # [F, L]: phi = [d, constant] @ rotation_full; latent code = (u W) @ rotation


def features(other: Autoencoder, panel: NDArray[np.int64]) -> Features:
    """See `Features`; ``panel`` are the shared genes' positions on the other side."""
    d = other.loadings.detach().numpy().astype(np.float64)
    d = np.column_stack([d, np.full(len(d), np.sqrt(CONSTANT))])
    _, rotation = np.linalg.eigh(d[panel].T @ d[panel])
    rotation = rotation[:, ::-1]  # directions that no shared gene has stay: what they add to other genes is as the prior says
    rotation = rotation * np.sign(rotation[np.abs(rotation).argmax(0), np.arange(rotation.shape[1])])
    return Features(d @ rotation, rotation[:-1].T)


class Closed:
    """The closed-form translator from one side's codes to the other's, on one problem."""

    def __init__(
        self, data: Data, own: Autoencoder, other: Features, ratio: float, genes: NDArray[np.int64] | None = None,
        deviations: Sequence[float] = (), regression: Regression | None = None, reference_share: float = 0.0,
        process: Process | None = None, process_shares: tuple[float, ...] = (0.0,), noisy: bool = False,
    ) -> None:  # fmt: skip
        self.reference_share, self.noisy = reference_share, noisy  # c, and whether the translator's noise will be learned
        self.process, self.process_shares = process, process_shares  # over the reference's cells, and what it may have of a map
        self.own, self.rotation = own, other.rotation
        self.scores = own.loadings.detach().numpy().astype(np.float64)[data.columns].T  # t [q, P]
        self.shared = other.phi[data.panel]  # [P, F]
        self.genes = other.phi if genes is None else other.phi[genes]
        # Without some genes the Gram matrix is only nearly diagonal: solve it as it is.
        gram = self.shared.T @ self.shared
        values, vectors = np.linalg.eigh(gram)
        values, self.vectors = np.maximum(values, 0.0), vectors
        projected = self.scores @ self.shared @ vectors  # [q, F]
        square, p = np.square(self.scores).sum(1), self.scores.shape[1]
        noise = (square[:, None] - np.square(projected) @ (1 / (1 / GRID[:, None] + values)).T).clip(1e-8 * p) / p  # s [q, grid]
        log_prior = -0.5 * (np.log(GRID / ratio) / RATIO_SD) ** 2
        evidence = -0.5 * (p * np.log(noise) + np.log1p(GRID[:, None] * values).sum(1)) + log_prior
        best = evidence.argmax(1)
        self.ratios, self.noise = GRID[best], noise[np.arange(len(best)), best]  # r_k and s_k [q]
        self.precision = 1 / self.ratios[:, None] + values  # [q, F]
        self.weights = (projected / self.precision) @ vectors.T  # [q, F]
        self.deviation = of_rank(deviations, self.noise)  # v [q]
        self.regressed: NDArray[np.float64] | float = 0.0  # b [q, genes]
        if regression is not None and genes is not None and reference_share:
            self.regressed = regression.inner(self.scores, data.panel, genes)

    def codes(self) -> Codes:
        """Loadings of the genes asked for, [q, genes]; the encoder's doubt as noise of the cells."""
        g = (1 - self.reference_share) * self.genes
        mean = self.weights @ g.T + self.reference_share * self.regressed
        rest = np.broadcast_to(self.deviation[:, None], mean.shape)
        sd = np.sqrt(self.noise[:, None] / self.precision)  # [q, F] in the eigenbasis
        variance = np.square(sd) @ np.square(g @ self.vectors).T + rest
        noise = np.concatenate([self.own.scale.numpy()[:, None] * mean, *([START_NOISE * (g @ self.rotation).T] if self.noisy else [])])
        mean, variance, noise = (one.astype(np.float32) for one in (mean, variance, noise))
        return Codes(mean, variance, None, noise, self.process, self.process_shares)

    def place(self, data: Data) -> NDArray[np.float32]:
        """Codes of the problem's cells, and their features in the process, [n, q + F]."""
        return beside(self.own.codes(data)[0].numpy(), self.process, data.counts)


def process_of(data: Data, genes: NDArray[np.int64], seed: int) -> Process:
    """The process over the cells of ``data``'s reference, for some of its genes."""
    totals = all_counts(data.reference[:, data.panel])
    return process(data, log_normalise(data.reference, totals, median_depth(totals)), genes, seed)


def of_rank(deviations: Sequence[float], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """v of every direction [q]: what directions of the same rank taught, the last of them further on; s where nothing was learned."""
    if not len(deviations):
        return noise
    return np.asarray(deviations, dtype=np.float64)[np.minimum(np.arange(len(noise)), len(deviations) - 1)]


class Choice(NamedTuple):
    """What inner held-out genes say of one direction's translator."""

    ratio: float  # r
    share: float  # c
    smoothing: float  # share of the neighbors
    deviations: list[float]  # v
    candidates: list[dict[str, float]]


def choose(
    data: Data, shape: Shape, other: Autoencoder, found: Features, smoothing: float | str, share: float | str, seed: int, say: Say
) -> tuple[Choice, Regression | None]:
    """r, c and the share of the neighbors, by the mean correlation of the translated map with what was measured of inner held-out genes; v at them.

    ``other``: the autoencoder of the other side; ``found``: its `features`.
    """
    mixes = (0.0,) if data.neighbors is None else MIXES if smoothing == "auto" else (float(smoothing),)
    small = len(data.panel) < MIN_PANEL
    shares = ((0.0,) if small else SHARES) if share == "auto" else (float(share),)
    rng = np.random.default_rng([seed, 5])
    n = data.counts.shape[0]
    rows = np.sort(rng.permutation(n)[:CELLS])
    order = rng.permutation(len(data.panel))
    parts = [np.sort(order[fold::FOLDS]) for fold in range(FOLDS)]
    regression = regress(data, other, parts) if shares != (0.0,) else None
    shares = shares if regression else (0.0,)
    if small:
        return Choice(1.0, shares[0], mixes[0], [], []), regression
    values: dict[tuple[float, float, float], list[NDArray[np.float64]]] = {}
    rest: dict[tuple[float, float], list[NDArray[np.float64]]] = {}
    whole = linear(data, shape)
    for inner in parts:
        split, genes = without(data, inner), data.panel[inner]
        own = linear(split, shape)
        places = places_of(own, split, rows, mixes)
        truth = np.concatenate([whole.read(data, rows[part], data.columns[inner]).numpy() for part in blocks(len(rows), data.counts.shape[1])])
        measured = places[0.0].T @ truth / len(rows)
        regressed: NDArray[np.float64] | float = 0.0
        for ratio in RATIOS:
            closed = Closed(split, own, found, ratio, genes)
            translated = closed.weights @ closed.genes.T
            if regression and ratio == RATIOS[0]:
                regressed = regression.inner(closed.scores, split.panel, genes)
            for c in shares:
                loadings = (1 - c) * translated + c * regressed
                rest.setdefault((ratio, c), []).append(np.square(measured - loadings).mean(1) - 1 / len(rows))
                for mix in mixes:
                    values.setdefault((ratio, c, mix), []).append(correlation(places[mix] @ loadings.astype(np.float32), truth))
    means = {key: float(np.mean(np.concatenate(one))) for key, one in values.items()}
    best = max(means, key=lambda key: means[key])
    usual = min(means, key=lambda key: (abs(key[2] - USUAL[2]), abs(key[1] - USUAL[1]), abs(key[0] - USUAL[0])))
    gains = np.concatenate(values[best]) - np.concatenate(values[usual])
    if gains.mean() < gains.std() / np.sqrt(len(gains)):  # few genes choose badly: what is usual stays unless they agree
        best = usual
    ratio, c, mix = best
    say(f"signal over noise {ratio:g}, {c:.0%} from the reference, {mix:.0%} from neighbors (correlation {means[best]:.3f} on inner held-out genes)")
    ranks = min(map(len, rest[ratio, c]))
    deviations = np.maximum(np.mean([one[:ranks] for one in rest[ratio, c]], axis=0), 1e-6)
    tried = [{"ratio": key[0], "share": key[1], "smoothing": key[2], "inner genes": value} for key, value in means.items()]
    return Choice(ratio, c, mix, [float(v) for v in deviations], tried), regression


def places_of(own: Autoencoder, data: Data, rows: NDArray[np.int64], mixes: Sequence[float]) -> dict[float, NDArray[np.float32]]:
    """Codes of some cells [rows, q] by the share of the spatial neighbors in them, 0 among the shares; no other cell is encoded."""
    near = None if data.neighbors is None else data.neighbors[rows]
    needed = rows if near is None else np.unique(np.concatenate([rows, near.indices])).astype(np.int64)
    parts = (needed[part] for part in blocks(len(needed), data.counts.shape[1]))
    codes = np.concatenate([own.encode(own.read(data, part))[0].numpy() for part in parts])
    alone = codes[np.searchsorted(needed, rows)]
    around = alone if near is None else near[:, needed] @ codes
    return {mix: np.asarray((1 - mix) * alone + mix * around, dtype=np.float32) for mix in {0.0, *mixes}}


def correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Pearson correlation of columns; 0 where one does not vary."""
    a, b = a - a.mean(0, dtype=np.float64), b - b.mean(0, dtype=np.float64)
    size = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    return np.where(size > 1e-12, (a * b).sum(0) / np.maximum(size, 1e-12), 0.0)

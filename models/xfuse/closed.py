"""Closed forms of XFuse's start: Gaussian process regression of many columns at once, and factors of counts."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import ndtri
from scipy.stats import rankdata

__all__ = ["Kernel", "Smooth", "Smoother", "fit_kernel", "logits_of", "nmf", "normal_scores", "project"]

SPACE_SHARES = np.linspace(0.0, 1.0, 6)  # of the signal's variance, the rest is the image's
NOISE_SHARES = np.linspace(0.02, 0.98, 49)  # of all variance
LEAST_SHARE = 0.05  # of a factor in a location, over equal shares: floor in the log
TINY = 1e-10  # of the largest eigenvalue: below, there is none
Array = NDArray[np.float64]


class Kernel(NamedTuple):
    """Hyper-parameters of step 2; lengths in pitches and in standardised features, variances (means over columns) as shares."""

    length_space: float = 2.0
    length_image: float = 4.0
    space: float = 0.2
    image: float = 0.4
    noise: float = 0.4


def normal_scores(x: Array) -> Array:
    """Columns [n, k] with the ranks of x and the values of a standard normal."""
    return np.asarray(ndtri((rankdata(x, axis=0) - 0.5) / len(x)))


def fit_kernel(space: Array, image: Array, values: Array) -> Kernel:
    """Step 2: lengths shared by the columns of ``values`` [n, k] (standardised), variances of each, by marginal likelihood.

    Positions [n, 2] of different sections are far apart; image features are [n, F].
    """
    n, k = values.shape
    distance = [torch.from_numpy(((x[:, None] - x[None]) ** 2).sum(-1)) for x in (space, image)]
    columns = torch.from_numpy(values).T[..., None]  # [k, n, 1]
    typical = np.log(np.array(Kernel()))
    start = np.append(typical[:2], np.repeat(typical[2:], k))  # variances [3, k] of space, image and noise
    spread = np.append([0.3, 0.3], np.full(3 * k, 1.5))  # weak log-normal priors keep what the data do not tell

    def loss(x: Array) -> tuple[float, Array]:
        log = torch.tensor(x, requires_grad=True)
        length, variance = log[:2].exp(), log[2:].exp().reshape(3, k, 1, 1)
        gram = sum(variance[i] * torch.exp(-0.5 * d / length[i] ** 2) for i, d in enumerate(distance))
        factor = torch.linalg.cholesky(gram + (variance[2] + 1e-6) * torch.eye(n, dtype=torch.float64))  # [k, n, n]
        fit = 0.5 * torch.linalg.solve_triangular(factor, columns, upper=False).square().sum()
        total = fit + factor.diagonal(dim1=1, dim2=2).log().sum() + 0.5 * (((log - torch.from_numpy(start)) / torch.from_numpy(spread)) ** 2).sum()
        total.backward()
        assert log.grad is not None
        return float(total.detach()), log.grad.numpy()

    bounds = [(value - 4 * s, value + 4 * s) for value, s in zip(start, spread, strict=True)]
    found = np.exp(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}).x)
    return Kernel(*(float(v) for v in (*found[:2], *found[2:].reshape(3, k).mean(1))))


class Smooth(NamedTuple):
    """Gaussian process regression of k columns, averaged over shares of space, image and noise by their marginal likelihood."""

    fitted: Array  # [n, k] posterior mean
    dual: Array  # [2, n, k] of space and image: the posterior mean of a part is its Gram matrix (trace n) @ dual
    parts: Array  # [2, k] variances of space and image
    noise: Array  # [k]
    evidence: Array  # [k] log marginal likelihood averaged over the shares, up to what depends on n alone


class Smoother:
    """Regression on functions of space [n, P] and of the image [n, J], whose Gram matrices are scaled to trace n.

    With B = (sqrt(share) space, sqrt(1 - share) image) the eigenvectors of B B' are found as those V of B' B where functions are fewer than rows,
    U = B V / sqrt(values). What of a column lies outside of their span is noise.
    """

    def __init__(self, space: Array, image: Array) -> None:
        n = len(space)
        self.functions = [part * np.sqrt(n / np.square(part).sum()) for part in (space, image)]
        self.together, self.spectra = np.hstack(self.functions), []
        self.few = self.together.shape[1] < n
        grams = [self.together.T @ self.together] if self.few else [part @ part.T for part in self.functions]
        for share in SPACE_SHARES:
            if self.few:
                root = np.repeat(np.sqrt([share, 1 - share]), [part.shape[1] for part in self.functions])
                values, vectors = np.linalg.eigh(root[:, None] * grams[0] * root)
                seen = values > TINY * values[-1]
                values, vectors = values[seen], root[:, None] * vectors[:, seen] / np.sqrt(values[seen])
            else:
                values, vectors = np.linalg.eigh(share * grams[0] + (1 - share) * grams[1])
            self.spectra.append((share, np.maximum(values, 0.0), vectors))

    def __call__(self, y: Array) -> Smooth:
        """Columns of y [n, k], each without its mean."""
        n, k = y.shape
        inside = self.together.T @ y if self.few else y
        evidence, fits = [], []
        for share, values, vectors in self.spectra:
            rotated = vectors.T @ inside  # U'y [r, k]
            spectrum = (1 - NOISE_SHARES)[:, None] * values + NOISE_SHARES[:, None]  # [s, r]
            outside = np.maximum(np.square(y).sum(0) - np.square(rotated).sum(0), 0.0) / NOISE_SHARES[:, None]  # [s, k]
            variance = np.maximum(((rotated[None] ** 2 / spectrum[..., None]).sum(1) + outside) / n, 1e-12)  # [s, k] by maximum likelihood
            log_det = np.log(spectrum).sum(1) + (n - len(values)) * np.log(NOISE_SHARES)
            log_p = -0.5 * n * np.log(variance) - 0.5 * log_det[:, None]
            evidence.append(log_p)
            fits.append((share, variance, rotated, spectrum, vectors))
        log_p = np.stack(evidence)  # [mixes, s, k]
        weight = np.exp(log_p - (most := log_p.max((0, 1))))
        total = weight.sum((0, 1))
        weight /= total
        dual, parts, noise = np.zeros((2, *inside.shape)), np.zeros((2, k)), np.zeros(k)
        for w, (share, variance, rotated, spectrum, vectors) in zip(weight, fits, strict=True):
            signal = 1 - NOISE_SHARES[:, None]
            mean = vectors @ (rotated * ((w * signal).T @ (1 / spectrum)).T)  # sum over noise shares
            for part, size in enumerate((share, 1 - share)):
                dual[part] += size * mean
                parts[part] += size * (w * signal * variance).sum(0)
            noise += (w * variance * NOISE_SHARES[:, None]).sum(0)
        dual = self.together @ dual if self.few else dual
        fitted = sum(part @ (part.T @ one) for part, one in zip(self.functions, dual, strict=True))
        return Smooth(np.asarray(fitted), dual, parts, noise, most + np.log(total))


def nmf(x: Array, factors: int, rng: np.random.Generator, sweeps: int = 200) -> tuple[Array, Array]:
    """x [n, G] ~ w @ h by multiplicative updates of the Kullback-Leibler divergence; rows of h sum to 1."""
    n = len(x)
    shares = x / x.sum(1, keepdims=True)
    # k-means++ rows of the shares as first profiles: far from each other
    chosen = [int(rng.integers(n))]
    distance = np.full(n, np.inf)
    for _ in range(factors - 1):
        distance = np.minimum(distance, ((np.sqrt(shares) - np.sqrt(shares[chosen[-1]])) ** 2).sum(1))
        chosen.append(int(rng.choice(n, p=distance / distance.sum())) if distance.sum() > 0 else int(rng.integers(n)))
    h = shares[chosen] + 1e-2 * shares.mean(0)
    w = np.full((n, factors), 1.0) * x.sum(1, keepdims=True) / factors
    for _ in range(sweeps):
        w *= (x / (w @ h)) @ h.T / h.sum(1)
        h *= w.T @ (x / (w @ h)) / np.maximum(w.sum(0)[:, None], 1e-12)
    total = h.sum(1)
    return w * total, h / total[:, None]


def project(x: Array, w: Array, h: Array, sweeps: int = 30) -> Array:
    """w [n, factors] of x [n, G] ~ w @ h with rows of h that sum to 1, from a first w on."""
    for _ in range(sweeps):
        w = w * ((x / (w @ h)) @ h.T)
    return w


def logits_of(w: Array) -> Array:
    """Logs of shares w / sum w with a floor, without their mean [n, factors]."""
    logits = np.log(w / w.sum(1, keepdims=True) + LEAST_SHARE / w.shape[1])
    return np.asarray(logits - logits.mean(1, keepdims=True))
